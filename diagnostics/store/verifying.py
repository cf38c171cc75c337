"""Whether a run is whole: every file that its last commit names, against its checksum, and what else lies in its folder."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .bounded_json import MAX_BYTES, parse_bounded
from .bounds import MAX_DAMAGE
from .files import METADATA
from .format import DAMAGED, LINEAGES, newer_schema, schema_of
from .lock import LOCK_FILES
from .opening import ascending, described, labels
from .reading import decode_file, open_inside, read_all, read_file
from .rebuilding import rebuilt
from .root_document import Contents, Node, contents, of_lineage
from .run_error import RunError
from .stored_array import StoredArray


@dataclass(frozen=True)
class Damage:
    """One thing that is not whole.

    Attributes:
        kind: "flipped bit", "truncated chunk", "damaged chunk", "missing chunk", "missing metadata", "damaged metadata" or "disorder".
        file: within the run.
        why: a sentence's end.
        array: path of the array it belongs to, None for metadata.
        steps: first and last optimizer step of the records affected, None where it is none or unknown.
        number: of the chunk.
    """

    kind: str
    file: str
    why: str
    array: str | None = None
    steps: tuple[int, int] | None = None
    number: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        damage: what is not whole; no more chunks are looked at after `MAX_DAMAGE`.
        harmless: of which files that belong to no commit there are how many: a writer that was killed leaves them.
        arrays, chunks: how many were checked; chunks that were never written, and hold missing values alone, are none.
        checksums: whether chunks carry one; without, a flipped bit that still decodes is not seen.
        document: of the root, as far as it could be read or made again.
        contents: what it describes.
    """

    damage: list[Damage]
    harmless: dict[str, int]
    arrays: int
    chunks: int
    checksums: bool
    document: dict[str, Any] = field(repr=False)
    contents: Contents = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "whole": not self.damage, "damage": [asdict(one) for one in self.damage], "harmless": self.harmless, "arrays": self.arrays,
            "chunks": self.chunks, "checksums": self.checksums,
        }  # fmt: skip


def verify(path: str | Path) -> Verification:
    """Check a run, reading all of it. One that is written to meanwhile is checked as of its last commit.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        RunError: it is no Optiscope run, one of a newer schema, or holds what no recorder writes.
    """
    folder = Path(path).resolve()
    if not folder.exists():
        raise FileNotFoundError(f"run: nothing found at {path}; give the folder that was passed to `attach`, for example run.zarr")
    for _ in range(3):
        before = _signature(folder)
        try:
            found = _whole(folder)
        except RunError as error:
            raise error.told(place=path) from error
        if not found.damage or _signature(folder) == before:
            break  # else a writer has changed it, and what seemed missing may be elsewhere
    return found


def _signature(folder: Path) -> tuple[int, int] | None:
    try:
        status = (folder / METADATA).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _whole(folder: Path) -> Verification:
    """A run, and each lineage in it as a run of its own."""
    root = verify_one(folder)
    damage, harmless, left = list(root.damage), dict(root.harmless), lineages_of(root.contents)
    for place, entry in left.items():
        one = verify_one(folder / place, entry)
        damage += [replace(each, file=f"{place}/{each.file}", array=each.array and f"{place}/{each.array}") for each in one.damage]
        for kind, count in one.harmless.items():
            harmless[kind] = harmless.get(kind, 0) + count
        root = replace(root, arrays=root.arrays + one.arrays, chunks=root.chunks + one.chunks, checksums=root.checksums and one.checksums)
    there = (folder / LINEAGES).iterdir() if (folder / LINEAGES).is_dir() else ()
    if copies := sum(f"{LINEAGES}/{path.name}" not in left for path in there):
        harmless["lineage half copied"] = copies
    return replace(root, damage=damage, harmless=harmless)


def lineages_of(run: Contents) -> dict[str, dict[str, Any]]:
    """What a run says of the lineages in it, by the folder of each."""
    return {f"{LINEAGES}/{entry['lineage']}": entry for entry in run.attributes.get(LINEAGES, [])}


def verify_one(folder: Path, lineage: Mapping[str, Any] | None = None) -> Verification:
    """Check what one document describes: a run without the lineages in it, or one of these, of which the run says `lineage`."""
    document, found, damage = _root(folder, lineage)
    arrays = {array.path: array for node in found.groups for array in node.arrays.values()}
    damage += _own_documents(folder, document)
    chunks = 0
    for node in found.groups:
        steps = _steps(folder, node)
        if steps is not None and not ascending(steps):
            damage.append(Damage("disorder", f"{node.path}/step", "steps are not in ascending order from 0 on", f"{node.path}/step"))
        for array in node.arrays.values():
            for numbers in array.files():
                if len(damage) >= MAX_DAMAGE:
                    break
                chunks += 1
                if (one := _chunk(folder, array, numbers)) is not None:
                    damage.append(replace(one, steps=_affected(array, numbers, steps)))
    if not damage:
        try:
            labels(folder, found)
        except RunError as error:
            damage.append(Damage("disorder", METADATA, error.reason))
    checksums = all(array.checksum for array in arrays.values())
    return Verification(damage, _others(folder, arrays), len(arrays), chunks, checksums, document, found)


def _root(folder: Path, lineage: Mapping[str, Any] | None) -> tuple[dict[str, Any], Contents, list[Damage]]:
    """The root's document, or one made from the others where it is lost."""
    content: bytes | None = b""
    try:
        content = read_file(folder, METADATA, MAX_BYTES)
        if content is None:
            raise RunError("there is no such file", file=METADATA)
        document = parse_bounded(content)
        attributes = document.get("attributes") if isinstance(document, dict) else None
        if attributes is None or schema_of(attributes) is None:
            raise RunError("it is not that of a run", file=METADATA)
        newer = newer_schema(attributes)
        if not newer:
            return document, described(folder, document if lineage is None else of_lineage(document, lineage)), []
    except ValueError as error:
        why = error.reason if isinstance(error, RunError) else str(error)
        damage = Damage("missing metadata" if content is None else "damaged metadata", METADATA, why)
        document = rebuilt(folder, content or b"", lineage)
        return document, contents(document), [damage]
    raise newer


def _own_documents(folder: Path, document: Mapping[str, Any]) -> Iterator[Damage]:
    """Each array's and group's own metadata, which may be of an earlier commit, or of one that was not finished."""
    for path, node in document.get("consolidated_metadata", {}).get("metadata", {}).items():
        file = f"{path}/{METADATA}"
        try:
            content = read_file(folder, file, MAX_BYTES)
            if content is None:
                yield Damage("missing metadata", file, "there is no such file; the root's has the same")
                continue
            own = parse_bounded(content)
            if not isinstance(own, dict) or _lasting(own) != _lasting(node):
                yield Damage("damaged metadata", file, "it says something else than the root's")
        except ValueError as error:
            yield Damage("damaged metadata", file, error.reason if isinstance(error, RunError) else str(error))


def _lasting(node: Mapping[str, Any]) -> dict[str, Any]:
    """What of a node's document no commit changes."""
    changes = {"shape", "chunk_grid", "chunk_key_encoding", "codecs"} if node.get("node_type") == "array" else {"attributes"}
    return {key: value for key, value in node.items() if key not in changes | {"consolidated_metadata"}}


def _steps(folder: Path, node: Node) -> Any:
    try:
        return read_all(folder, node.arrays["step"]) if "step" in node.arrays else None
    except RunError:
        return None


def _chunk(folder: Path, array: StoredArray, numbers: tuple[int, ...]) -> Damage | None:
    key = array.key(numbers)
    try:
        file = open_inside(folder, key)
        if file is None:
            missing = array.expects(numbers)
            return Damage("missing chunk", key, "there is no such file", array.path, number=numbers) if missing else None
        with file:
            for _ in decode_file(file, key, array):
                pass
    except RunError as error:
        return Damage(_kind(folder, key, array), key, error.reason, array.path, number=numbers)
    return None


def _kind(folder: Path, key: str, array: StoredArray) -> str:
    """A Blosc buffer says its length, by which one that is cut short is told from one that was changed."""
    path = folder / key
    if array.sharded or array.compression != "blosc" or path.is_symlink() or not path.is_file():
        return "damaged chunk"
    with path.open("rb") as file:
        header = file.read(16)
    size = path.stat().st_size - (4 if array.checksum else 0)
    return "truncated chunk" if len(header) < 16 or int.from_bytes(header[12:], "little") > size else "flipped bit"


def _affected(array: StoredArray, numbers: tuple[int, ...], steps: Any) -> tuple[int, int] | None:
    if not array.has_steps or steps is None:
        return None
    own = steps[numbers[0] * array.shard[0] : (numbers[0] + 1) * array.shard[0]]
    return (int(own[0]), int(own[-1])) if len(own) else None


def _others(folder: Path, arrays: Mapping[str, StoredArray]) -> dict[str, int]:
    """How many files there are that belong to no commit, by what they are."""
    counts = {"half-written file": 0, "chunk after the last commit": 0, "other file": 0}
    for place, folders, files in os.walk(folder):
        inside = os.path.relpath(place, folder).replace(os.sep, "/")
        folders[:] = [name for name in folders if inside != "." or name not in (DAMAGED, LINEAGES)]
        array = arrays.get(inside.partition("/c/")[0].removesuffix("/c"))
        for name in files:
            if name.endswith(".partial"):
                counts["half-written file"] += 1
            elif name == METADATA or (inside == "." and name in LOCK_FILES):
                continue
            elif array is None:
                counts["other file"] += 1
            elif (numbers := array.numbers(f"{inside}/{name}")) is None or (array.written is not None and not array.expects(numbers)):
                counts["chunk after the last commit"] += 1
    return {kind: count for kind, count in counts.items() if count}
