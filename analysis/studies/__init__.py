"""One file per study: `study(run) -> xarray.Dataset`, `plot(dataset) -> Figure`, `summary(dataset) -> str`.

Each also says, in plain words, what it asks (`QUESTION`) and how its picture is read (`READING`).
"""
