"""The folder that `diag run` puts in front of a script's PYTHONPATH, for the `sitecustomize` in it."""
