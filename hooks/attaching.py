"""`attach`: checking what is asked for, laying out the run, and setting a recorder on its optimizers."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from ..diagnostics.about import Value
from ..diagnostics.catalogue import DEFAULT_GROUPS, MEASURES
from ..diagnostics.operators import OperatorRule
from ..diagnostics.options import HeadsGiven, OnError, Options, Together, head_counts
from ..diagnostics.store.continuing import nothing_or_a_run
from ..diagnostics.store.forking import fork
from ..diagnostics.store.lock import RunLock
from ..diagnostics.store.writer import Writer
from .observing.composites import compose
from .observing.matrices import Names, find_matrices
from .observing.matrix import Matrix
from .observing.watched import Watched, watch
from .ranks.joining import Joined, Unable, join
from .ranks.no_store import NoStore, RunWriter
from .recorder import Recorder
from .recording.agreed_cadence import AgreedCadence
from .recording.cadence import Cadence
from .recording.layout import Layout, belongs
from .recording.provenance import describe_optimizer, describe_software
from .recording.readable_log import readable
from .recording.resuming import own_steps, steps_taken
from .recording.second_session import close, left_behind
from .recording.session import Session
from .recording.step_hooks import watch_steps

log = logging.getLogger("optiscope")
log.addFilter(readable)  # names of a model stand in what all modules log


def attach(
    optimizers: Optimizer | Iterable[Optimizer],
    model: nn.Module | None,
    store: str | Path,
    *,
    every: int | None = None,
    overhead: float = 0.01,
    measure: Sequence[str] = DEFAULT_GROUPS,
    operators: OperatorRule | None = None,
    heads: HeadsGiven = None,
    first_step: int | None = None,
    background: bool = False,
    about: Mapping[str, Value] | None = None,
    ranks: Together = "auto",
    rank_timeout: float = 10.0,
    on_error: OnError = "warn",
) -> "Recorder":
    """Record what `optimizers` do to the matrices of `model`, into the run at `store`.

    Where several processes train one model, call it on every rank, with the same store: rank 0 writes one run of all matrices, and what lies in pieces
    (a DTensor, as FSDP2 and tensor parallel make them) is put together on one rank and measured as if it had never been cut (docs/distributed.md).

    Training is bitwise what it would be without: nothing is changed, no random number is drawn, and no exception of the
    recorder leaves a hook. Curvature is recorded when you call the result's `curvature`. Use the result as a context manager, or call its `close()`; the run can be read meanwhile.

    Args:
        optimizers: one `torch.optim.Optimizer` or several. They share one step counter: the number of steps of the one
            that has stepped most. Recorded are their dense floating-point parameters with two or more dimensions; complex, integer, 8-bit and
            sparse ones, and those whose gradients are sparse, are named in a warning.
        model: where parameter names come from; without it they are numbered by optimizer and group.
        store: a path for the run; where it is relative, from the present working folder. An existing run of the same matrices is continued. One that
            holds later records, the training having been restarted from a checkpoint, goes back: they are kept as a lineage of their own, which
            `open_run(store, lineage=n)` shows.
        every: record every N-th step; None spaces records so that they take at most `overhead` of the time.
        overhead: share of training time that recording may take, with `every=None`.
        measure: groups of quantities to record: "geometry", "update" and "second_moment"; on request "second_moment_map", and, each at
            about the cost of the geometry, "gradient" (its spectrum, beside that of the NS input or momentum), "blocks" (queries, keys,
            values and heads of attention projections, as matrices of their own), "stacking" (pairs of neighbouring layers, as TEON
            would stack them) and "precision" (the Newton–Schulz iteration in bfloat16, at two to three times that cost).
        operators: your own naming: a mapping from regular expressions to operator types, or a function of the name.
        heads: attention heads, or (query heads, key/value heads), of all layers; None: found on the model's modules and configuration.
        first_step: steps already taken, when training resumes. By default of an existing run what the optimizers' own state tells (Adam's counts
            steps, Muon's and SGD's do not; load a checkpoint before you attach), else the last recorded step.
        background: measure and write in a thread of the recorder's own: the training waits only while what a record needs is copied. A record that is
            due while the one before is still being measured is left out and counted in `missed`. What is recorded is the same. For parameters on
            the CPU: on an accelerator it has not been made safe yet.
        about: what you state about this training, kept with the run: texts, numbers and truth values. `data`, `tokens_per_step`, `seed`
            and `budget` are read by `diag compare`.
        ranks: with several processes, "auto": matrices that are whole on several ranks, as under DDP, are measured by the first; "share": they are dealt out, as
            those in pieces always are; "alone": this process records what it has whole, and knows of no other.
        rank_timeout: seconds that a rank waits for another at most, once: then recording ends, and training goes on.
        on_error: "warn": one log message when recording fails, and training goes on; "raise": for tests.

    Raises:
        TypeError: something in `optimizers` is no optimizer, `model` no module, or something in `about` no plain value.
        ValueError: no matrix to record, an argument out of range, or a `store` that cannot be continued, that another process is writing, or that an
            open recorder of this process records: one of an earlier training of the same matrices (a cell that is run again) is closed instead.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = torch.optim.Muon([model.weight], lr=0.1)
        >>> store = tempfile.mkdtemp() + "/run.zarr"
        >>> with attach(optimizer, model, store, every=1) as recorder:
        ...     model(torch.ones(2, 4)).sum().backward()
        ...     _ = optimizer.step()
        >>> recorder.step
        1
    """
    options = Options(
        every=every,
        overhead=overhead,
        measure=measure,
        operators=operators,
        heads=heads,
        background=background,
        about=about,
        ranks=ranks,
        rank_timeout=rank_timeout,
        on_error=on_error,
    )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module or None, got {type(model).__name__}")
    if first_step is not None and (isinstance(first_step, bool) or not isinstance(first_step, Integral) or first_step < 0):
        raise ValueError(f"first_step: expected the number of steps already taken, 0 or more, got {first_step!r}")
    named, store = str(store), Path(store).absolute()  # training may change its working folder
    watched = watch(as_list(optimizers))
    names = Names(model, operators, head_counts(heads))
    own = find_matrices(watched, names)
    if background and (elsewhere := {m.parameter.device.type for m in own} - {"cpu"}):
        raise ValueError(
            f"background: expected parameters on the CPU, got some on {' and '.join(sorted(elsewhere))}; leave background out there"
        )
    try:
        joined = join(own, options, named)
        matrices = own if joined is None else joined.matrices
        matrices = matrices + compose(watched, matrices, options.measure)
        if not any(belongs(m, group) for m in matrices for group in options.measure):
            raise ValueError(
                f"optimizers: {', '.join(w.label for w in watched)} hold no weight matrix (a dense floating-point parameter with two or more dimensions) to record "
                f"{' and '.join(options.measure)} of, so nothing can be recorded"
            )
        given = None if first_step is None else int(first_step)
        if joined is None or joined.writes:
            return _record(store, watched, names, matrices, options, given, joined)
        return _take_part(store, watched, names, matrices, options, joined)
    except Unable as why:
        log.warning("optiscope: nothing is recorded here: %s. Training goes on.", why)
        writer = NoStore(store, {})
        return Recorder(Session(names, Layout(writer, ()), writer, Cadence(options.every, options.overhead), 0, raise_errors=False))


def _record(
    store: Path, watched: list[Watched], names: Names, matrices: list[Matrix], options: Options, given: int | None, joined: Joined | None
) -> Recorder:
    """Begin or continue the run at `store`, and record into it."""
    try:
        nothing_or_a_run(store)  # before a lock is left in somebody's folder
        close(left_behind(store, watched, matrices))
        lock = _locked(store)
    except BaseException as error:
        if joined is not None:
            joined.say_refused(str(error))
        raise
    begun: list[Session] = []
    try:
        stated: dict[str, Any] = {"about": options.about} if options.about else {}
        if joined is not None:
            stated["ranks"] = joined.describe()
        session = {**describe_software(), "optimizers": [{**describe_optimizer(w), "own_steps": own_steps(w)} for w in watched], **stated}
        writer = Writer(store, {"first_step": given or 0, **session}, lock)
        layout = Layout(writer, [group for group in MEASURES if group in options.measure])
        if not layout.describes(matrices):
            raise ValueError(f"store: {writer.path} holds a run of other matrices; record to another path")
        first_step = (given or 0) if writer.is_new else _continue(writer, given, session)
        layout.include(matrices)
        return _begin(layout, writer, watched, names, matrices, options, first_step, joined, begun)
    except BaseException as error:
        if joined is not None:
            joined.say_refused(str(error))
        for recording in begun:
            recording.abandon()
        lock.release()
        raise


def _take_part(store: Path, watched: list[Watched], names: Names, matrices: list[Matrix], options: Options, joined: Joined) -> Recorder:
    """Measure what is this rank's to measure; rank 0 writes it."""
    close(left_behind(store, watched, matrices))
    first_step = joined.hear_begun()
    writer = NoStore(store, {"optimizers": [describe_optimizer(w) for w in watched]})
    layout = Layout(writer, [group for group in MEASURES if group in options.measure])
    layout.include(matrices)
    begun: list[Session] = []
    try:
        return _begin(layout, writer, watched, names, matrices, options, first_step, joined, begun)
    except BaseException:
        for recording in begun:
            recording.abandon()
        raise


def _begin(
    layout: Layout, writer: RunWriter, watched: list[Watched], names: Names, matrices: list[Matrix], options: Options, first_step: int,
    joined: Joined | None, begun: list[Session],
) -> Recorder:  # fmt: skip
    """Set a recorder on the optimizers; its session is put into `begun` first, for whoever is to undo it."""
    own = Cadence(options.every, options.overhead)
    ranks, cadence = None, cast(Cadence | AgreedCadence, own)
    if joined is not None:
        if joined.writes:
            joined.say_begun(first_step)
        ranks, cadence = joined.meet(matrices, [one.label for one in watched]), AgreedCadence(own)
    cadence.start(first_step)
    here = {id(p) for one in watched for group in one.optimizer.param_groups for p in group["params"]}
    for one in watched:
        one.steps = first_step
        one.matrices = [m for m in matrices if m.optimizer == one.label and all(id(part.parameter) in here for part in m.members or (m,))]
    recording = Session(
        names, layout, writer, cadence, first_step, raise_errors=options.on_error == "raise", background=options.background, ranks=ranks
    )
    begun.append(recording)
    recorder = Recorder(recording)
    for one in watched:
        watch_steps(recording, one)
    recording.begin()
    return recorder  # within: an exception of a signal handler that comes now undoes all


def _continue(writer: Writer, given: int | None, session: dict[str, Any]) -> int:
    """Make the run ready for a further recording, which `session` describes; the steps that its training has taken."""
    held, attributes = writer.last_step, writer.attributes[""]
    told = steps_taken(attributes, {one["label"]: one["own_steps"] for one in session["optimizers"]})
    first_step = next(step for step in (given, told, held) if step is not None)
    why = "" if given is not None or told in (None, held) else ", as its optimizers' own state counts"
    if first_step < held:
        number = fork(writer, first_step)
        log.warning(
            "optiscope: %s holds records up to step %d, and this training goes on from step %d%s: the later ones are kept as lineage %d, which "
            "`diag info` lists, and it is recorded from step %d on", writer.path, held, first_step, why, number, first_step + 1,
        )  # fmt: skip
    else:
        why = why or ("; if it was restarted from an earlier checkpoint, pass first_step" if given is told is None else "")
        log.warning(
            "optiscope: %s holds records up to step %d; this training is recorded after them, from step %d on%s",
            writer.path, held, first_step + 1, why,
        )  # fmt: skip
    entry = {"first_step": first_step, **session}
    if any(writer.committed.values()):
        # One that recorded nothing leaves no trace: the next takes its place.
        continued = [other for other in attributes.get("continued", []) if other["first_step"] < first_step]
        attributes["continued"] = [*continued, entry]
    else:
        for key in ("about", "continued"):
            attributes.pop(key, None)
        attributes.update(entry)
    return first_step


def _locked(store: Path) -> RunLock:
    """The lock of the run at `store`, and a word of what is odd about it."""
    lock = RunLock(store)
    if lock.former is not None:
        log.info("optiscope: %s was being written by %s, which ended without closing it; recording goes on", store, lock.former)
    if lock.unlocked is not None:
        log.warning(
            "optiscope: the file system of %s has no locks (%s), so that a second recorder of the same run would not be refused: one of them ends "
            "when it sees what the other has written. Give every training a path of its own.", store, lock.unlocked,
        )  # fmt: skip
    return lock


def as_list(optimizers: Optimizer | Iterable[Optimizer]) -> list[Any]:
    """One optimizer or several as a list. Raises ValueError for none."""
    given: list[Any] = [optimizers] if hasattr(optimizers, "param_groups") else list(optimizers)
    if not given:
        raise ValueError("optimizers: expected at least one optimizer, got none")
    return given
