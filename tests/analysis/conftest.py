"""Built runs: the tree that `open_run` gives, made in memory from chosen spectra, so that a study's answer is known beforehand."""

import numpy as np
import pytest
import xarray as xr

from optiscope.diagnostics.catalogue import EXTRA_COORDINATES, EXTRA_DIMENSIONS, GROUPS, PARTITIONS, SECOND_MOMENT_FORMS, in_group
from optiscope.diagnostics.operators import classify, layer_index
from optiscope.diagnostics.spectra.spectrum_sketch import sketch, sketch_levels

JORDAN = (3.4445, -4.7750, 2.0315)


def naive_interval(statistic, *labels):
    """2.5 and 97.5 % of `statistic(members of the first set, …)` over 999 draws of layers, a loop; the i-th set of layers by seed i."""
    draws = []
    for seed, label in enumerate(labels):
        members = [[i for i, own in enumerate(label) if own == layer] for layer in sorted(set(label))]
        drawn = np.random.default_rng(seed).integers(len(members), size=(999, len(members)))
        draws.append([[i for layer in row for i in members[layer]] for row in drawn])
    return np.quantile([statistic(*chosen) for chosen in zip(*draws, strict=True)], [0.025, 0.975])


def naive_output(x, coefficients):
    """Singular values of O, the polynomial written out."""
    for a, b, c in coefficients:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.fixture(scope="session")
def resample():
    return naive_interval


@pytest.fixture(scope="session")
def output():
    return naive_output


@pytest.fixture(scope="session")
def build_run():
    """`build_run({name: matrix, …})`, a matrix being a dict of what differs from these defaults:

    sigma: singular values, descending, the same at every step, or a list with those of each step (None: not recorded);
    shape: (r, r); optimizer: "Muon", or any other name for one that does not orthogonalise; schedule: index into
    `schedules`; target: RMS of ΔW/lr for an exact polar factor; size: factor on the update; floor: κ is a bound;
    update, geometry: entries of those groups that are set to something else.

    `groups={"second_moment": {"rank1_information": values, …}}` adds quantities of other groups, or of these two, as arrays of
    shape (steps, matrices) or (steps, matrices, extra); `scalars={"loss": values}` what was logged.
    """

    def build_run(matrices, *, steps=(10, 20, 30), schedules=((JORDAN,) * 5,), eps=1e-7, lr=0.02, attrs=None, groups=None, scalars=None):
        steps, names = np.array(steps), list(matrices)
        described = [_described(matrix, len(steps)) for matrix in matrices.values()]
        text = np.dtypes.StringDType()
        coords = {
            "name": ("matrix", np.array(names, dtype=text)),
            "operator": ("matrix", np.array([classify(name) for name in names], dtype=text)),
            "layer": ("matrix", np.array([layer_index(name) for name in names], dtype="int32")),
            "rows": ("matrix", np.array([m["shape"][0] for m in described])),
            "cols": ("matrix", np.array([m["shape"][1] for m in described])),
            "optimizer": ("matrix", np.array([m["optimizer"] for m in described], dtype=text)),
            "query_heads": ("matrix", np.zeros(len(names), dtype="int32")),
            "kv_heads": ("matrix", np.zeros(len(names), dtype="int32")),
            "expert": ("matrix", np.full(len(names), -1, dtype="int32")),
            "step": steps,
        }
        levels = np.stack([sketch_levels(min(m["shape"])) for m in described])
        cells = [[_cell(m, t, schedules, _at(lr, t)) for m in described] for t in range(len(steps))]
        built = {}
        for group in dict.fromkeys(("geometry", "update", *(groups or {}))):
            dtypes = {"geometry": GEOMETRY, "update": UPDATE}.get(group, {})
            variables = {
                name: (("step", "matrix", *extra), np.array([[cell[group][name] for cell in row] for row in cells], dtype=dtype))
                for name, (dtype, *extra) in dtypes.items()
            }
            given = (groups or {}).get(group, {})
            for quantity in in_group(group):
                dims, sizes = _dims(quantity)
                if quantity.name in given or quantity.name not in variables:
                    values = np.full((len(steps), len(names), *sizes), quantity.missing, dtype=quantity.dtype)
                    values[...] = given.get(quantity.name, values)
                    variables[quantity.name] = (("step", "matrix", *dims), values)
            along = {q.extra: list(EXTRA_COORDINATES[q.extra]) for q in in_group(group) if q.extra in EXTRA_COORDINATES}
            built[group] = xr.Dataset(variables, coords={**coords, **along})
            if any(q.extra == "quantile" for q in in_group(group)):
                built[group] = built[group].assign_coords(quantile_level=(("matrix", "quantile"), levels))
        built["geometry"].attrs["ns_schedules"] = [{"coefficients": [list(t) for t in s], "eps": eps} for s in schedules]
        if "second_moment" in built:
            built["second_moment"].attrs |= {"forms": list(SECOND_MOMENT_FORMS), "partitions": list(PARTITIONS)}
        if scalars:
            built["scalars"] = xr.Dataset({name: ("step", np.asarray(v, float)) for name, v in scalars.items()}, coords={"step": steps})
        root = {"optiscope_schema": 1, "created": "2026-01-01T00:00:00+00:00", "optimizers": [], "versions": {}, **(attrs or {})}
        return xr.DataTree.from_dict({"/": xr.Dataset(attrs=root), **built})

    return build_run


@pytest.fixture(scope="session")
def add_rows():
    """`add_rows(run, "blocks", {name: {quantity: values, …}, …})`: the run with a group whose rows are no parameters' own matrices.

    Values are broadcast to (steps,) or (steps, extra); `shape` and, of a block, `of` and `operator` are coordinates.
    """

    def add_rows(run, group, rows):
        steps, names = run["geometry"]["step"].values, list(rows)
        first = {name: name.split("|")[0].split("[")[0] for name in names}
        text = np.dtypes.StringDType()
        coords = {
            "name": ("matrix", np.array(names, dtype=text)),
            "operator": ("matrix", np.array([row.get("operator", classify(first[name])) for name, row in rows.items()], dtype=text)),
            "layer": ("matrix", np.array([layer_index(first[name]) for name in names], dtype="int32")),
            "rows": ("matrix", np.array([row["shape"][0] for row in rows.values()])),
            "cols": ("matrix", np.array([row["shape"][1] for row in rows.values()])),
            "optimizer": ("matrix", np.array(["Muon" for _ in names], dtype=text)),
            "step": steps,
        }
        if group == "blocks":
            coords["of"] = ("matrix", np.array(list(first.values()), dtype=text))
        variables = {}
        for quantity in in_group(group):
            dims, sizes = _dims(quantity)
            values = np.full((len(steps), len(names), *sizes), quantity.missing, dtype=quantity.dtype)
            for i, row in enumerate(rows.values()):
                values[:, i] = row.get(quantity.name, quantity.missing)
            variables[quantity.name] = (("step", "matrix", *dims), values)
        along = {q.extra: list(EXTRA_COORDINATES[q.extra]) for q in in_group(group) if q.extra in EXTRA_COORDINATES}
        built = run.copy()
        built[group] = xr.DataTree(xr.Dataset(variables, coords={**coords, **along}))
        return built

    return add_rows


GEOMETRY = {
    "sigma_quantile": ("float32", "quantile"), "fro_norm": ("float64",), "condition_number": ("float64",), "condition_is_floor": ("bool",),
    "stable_rank": ("float32",), "below_floor": ("float32",), "ns_schedule": ("int16",), "ns_residual": ("float32", "ns_step"),
    "ns_residual_polar": ("float32", "ns_step"), "ns_residual_achieved": ("float32",), "alignment": ("float32",),
}  # fmt: skip
UPDATE = {
    name: {"update_noise": ("float32",), "changed_outside": ("int16",)}.get(name, ("float64",))
    for name in (
        "update_rms", "update_norm", "update_rms_per_lr", "update_noise", "weight_rms", "grad_rms", "momentum_rms",
        "update_to_weight", "update_rms_target", "update_rms_intended", "lr", "weight_decay", "changed_outside",
    )
}  # fmt: skip


def _dims(quantity):
    return ((), ()) if quantity.extra is None else ((quantity.extra,), (EXTRA_DIMENSIONS[quantity.extra],))


def _described(matrix, steps):
    sigma = matrix["sigma"] if isinstance(matrix["sigma"], list) else [matrix["sigma"]] * steps
    rank = len(next(s for s in [*sigma, [1.0]] if s is not None))
    return {"shape": (rank, rank), "optimizer": "Muon", "schedule": 0, "target": 0.2, "size": 1.0, "floor": False, **matrix, "sigma": sigma}


def _at(value, t):
    return value[t] if isinstance(value, (list, tuple)) else value


def _cell(m, t, schedules, lr):
    """Everything recorded of one matrix at one step."""
    sigma = m["sigma"][t]
    missing = {"condition_is_floor": False, "ns_schedule": -1}
    geometry = {name: missing.get(name, np.full(_size(extra), np.nan)) for name, (_, *extra) in GEOMETRY.items()}
    update = {**dict.fromkeys(UPDATE, np.nan), "changed_outside": -1}
    if sigma is None:
        return {"geometry": geometry, "update": update}
    sigma = np.asarray(sigma, dtype=np.float64)
    x = sigma / np.linalg.norm(sigma)
    geometry |= {
        "sigma_quantile": sketch(x), "fro_norm": np.linalg.norm(sigma), "condition_number": sigma[0] / sigma[-1],
        "condition_is_floor": m["floor"], "stable_rank": 1 / x[0] ** 2, "below_floor": 0,
    }  # fmt: skip
    per_lr = m["size"] * 0.2
    if m["optimizer"] == "Muon":
        own = schedules[_at(m["schedule"], t)]
        steps = [own[min(k, len(own) - 1)] if own else (1.0, 0.0, 0.0) for k in range(10)]
        o = naive_output(x, own)
        gram = lambda o: np.sqrt(np.mean((1 - o**2) ** 2))  # noqa: E731
        geometry |= {
            "ns_schedule": _at(m["schedule"], t),
            "ns_residual": [gram(naive_output(x, steps[:k])) for k in range(11)],
            "ns_residual_polar": [np.sqrt(np.mean((1 - naive_output(x, steps[:k])) ** 2)) for k in range(11)],
            "ns_residual_achieved": gram(m["size"] * o),  # O is read back as large as the update is
            "alignment": m["size"] * float(sigma @ o / sigma.sum()),
        }
        per_lr = m["size"] * m["target"] * np.sqrt(np.mean(o**2))
    size = np.sqrt(m["shape"][0] * m["shape"][1])
    update |= {
        "update_rms": lr * per_lr, "update_norm": lr * per_lr * size, "update_rms_per_lr": per_lr, "update_noise": 1e-6, "weight_rms": 0.1,
        "grad_rms": np.linalg.norm(sigma) / size, "momentum_rms": np.linalg.norm(sigma) / size, "update_to_weight": lr * per_lr / 0.1,
        "lr": lr, "weight_decay": 0.0, "changed_outside": 0,
        "update_rms_target": m["target"] if m["optimizer"] == "Muon" else np.nan,
    }  # fmt: skip
    return {"geometry": geometry | m.get("geometry", {}), "update": update | m.get("update", {})}


def _size(extra):
    return [{"quantile": 64, "ns_step": 11}[name] for name in extra]


@pytest.fixture(scope="session")
def complete_run(build_run, add_rows):
    """`complete_run(matrices, …)`: as `build_run`, with every quantity of every group and a loss: numbers between 0.1 and 0.9 where spectra do not tell it.

    Blocks are two heads of the first matrix of every layer, pairs its and the next layer's; `without`: quantities that stay missing.
    """

    def complete_run(matrices, *, without=(), **how):
        rng = np.random.default_rng(7)
        size = build_run(matrices, **how)["geometry"]["fro_norm"].shape
        groups = {}
        for group in GROUPS:
            if group not in ("blocks", "stacking"):
                groups[group] = {
                    q.name: _some(rng, q, size) for q in in_group(group) if q.name not in without and q.name not in {**GEOMETRY, **UPDATE}
                }  # fmt: skip
        groups["update"]["weight_decay"] = 0.1
        run = build_run(matrices, groups=groups, **{"scalars": {"loss": np.linspace(3, 2, size[0])}, **how})
        run["update"]["update_rms"] *= 1.01  # with a decay that `update_rms_per_lr` does not hold
        firsts = {layer_index(name): name for name in reversed(matrices)}
        for group, names in (
            ("blocks", [f"{name}[head {i}]" for name in firsts.values() for i in (0, 1)]),
            ("stacking", [f"{firsts[i]}|{firsts[i + 1]}" for i in sorted(firsts) if i + 1 in firsts]),
        ):
            values = {q.name: _some(rng, q, (len(names), size[0])) for q in in_group(group) if q.name not in without}
            rows = {name: {"shape": (8, 16), **{key: value[i] for key, value in values.items()}} for i, name in enumerate(names)}
            run = add_rows(run, group, rows) if rows else run
        return run

    return complete_run


def _some(rng, quantity, size):
    if quantity.dtype != "float32" and quantity.dtype != "float64":
        return np.zeros(size, dtype=quantity.dtype)
    values = rng.uniform(0.1, 0.9, (*size, *_dims(quantity)[1]))
    return np.sort(values, axis=-1) if quantity.extra in ("quantile", "level") else values


@pytest.fixture(scope="session")
def model():
    """Matrices of three layers with six random spectra each, of one square operator, one wide and one tall."""
    rng = np.random.default_rng(1)
    shapes = {"attn.q_proj": (16, 16), "attn.k_proj": (8, 16), "mlp.up_proj": (40, 16)}
    return {
        f"layers.{layer}.{operator}.weight": {
            "shape": shape,
            "sigma": [np.sort(10 ** -rng.uniform(0, rng.uniform(1, 4), min(shape)))[::-1] for _ in range(6)],
        }
        for layer in range(3)
        for operator, shape in shapes.items()
    }


@pytest.fixture(scope="session")
def model_run(build_run, model):
    """The run of `model`, recorded at steps 10 to 60."""
    return build_run(model, steps=range(10, 70, 10), scalars={"loss": [6.0, 5.0, 4.5, 4.0, 3.8, 3.7]})


@pytest.fixture(scope="session")
def model_run_complete(complete_run, model):
    """The same with every quantity of every group."""
    return complete_run(model, steps=range(10, 70, 10))
