"""A damaged run made readable again: what is whole stays where it is, what is not is moved aside, and nothing is deleted.

A damaged chunk makes one quantity missing in the records it holds; all else of them is kept, and the run's attribute `damaged` says which. What
tells records and matrices apart, their steps and names, is taken from another group that was recorded beside; where there is none, the records of
that chunk of steps, or the group, are moved aside.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from .array_metadata import stored_array
from .files import METADATA, json_bytes, replace_file
from .format import DAMAGED, chunk_map, chunks_written, schema_of, seal
from .lock import RunLock
from .root_document import Node
from .stored_array import StoredArray
from .verifying import Damage, Verification, lineages_of, verify, verify_one

# Coordinates without which the rows of a group mean nothing.
NEEDED = {"name", "operator", "rows", "cols"}


def repair(path: str | Path) -> dict[str, Any]:
    """Repair the run at `path`, and what was done: `aside`, the folder with what was moved, or None; `done`, a sentence for each step.

    Readers find a whole run at any moment: everything that is new is written first, then one rename changes over, then what is damaged is moved. One
    that is broken off is finished by another.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        RunError: it is no run, or is being written.
    """
    verify(path)  # of something else no lock is made
    folder = Path(path).resolve()
    lock = RunLock(folder)
    try:
        done, asides = _repaired(folder, "", None)
        for place, entry in lineages_of(verify_one(folder).contents).items():
            further = _repaired(folder, place, entry)
            done, asides = done + further[0], asides + further[1]
        aside = None if not asides else str(folder / DAMAGED / (asides[0] if len(set(asides)) == 1 else ""))
        return {"aside": aside, "done": done}
    finally:
        lock.release()


def _repaired(run: Path, place: str, lineage: Mapping[str, Any] | None) -> tuple[list[str], list[str]]:
    """Repair what one document of the run describes, the root's or that of a lineage: what was done, and where what was damaged is."""
    done: list[str] = []
    asides: list[str] = []
    while (found := verify_one(run / place, lineage)).damage:
        one = _Repair(run, place, found)
        one.carry_out()
        asides.append(one.time)
        done += [f"{place}/{sentence}" if place else sentence for sentence in one.done]
        if not one.done:
            break
    return done, asides


class _Repair:
    """One repair: the new document, and the files to be moved once it is in place."""

    def __init__(self, run: Path, place: str, found: Verification) -> None:
        self.run, self.folder, self.found = run, run / place, found
        self.time = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%fZ")
        self.aside = run / DAMAGED / self.time / place
        self.document: dict[str, Any] = json.loads(json.dumps(found.document))
        self.attributes: dict[str, Any] = self.document["attributes"]
        self.nodes: dict[str, Any] = self.document["consolidated_metadata"]["metadata"]
        self.groups = {node.path: node for node in found.contents.groups}
        self.damaged = {(one.array, one.number) for one in found.damage if one.array}
        self.moves: list[str] = []
        self.done: list[str] = []
        self.cut: set[str] = set()
        self.lost: dict[tuple[str, str], dict[int, tuple[int, int] | None]] = {}  # steps, by array and kind, by chunk along them

    def carry_out(self) -> None:
        self.aside.mkdir(parents=True)
        damage = [asdict(one) for one in self.found.damage]
        (self.aside / "damage.json").write_text(json.dumps({"time": self.time, "damage": damage}, indent=2), encoding="utf-8")
        if (self.folder / METADATA).is_file():
            shutil.copyfile(self.folder / METADATA, self.aside / METADATA)
        for one in sorted((one for one in self.found.damage if one.array), key=lambda one: str(one.array).endswith("/step")):
            self._repair_chunk(one)
        self._commit()
        for file in self.moves:
            self._move(file)
        for one in self.found.damage:
            if one.array is None and one.file != METADATA:
                self._rewrite(one.file)

    def _repair_chunk(self, damage: Damage) -> None:
        path, _, name = str(damage.array).rpartition("/")
        if f"{path}/{name}" not in self.nodes or path not in self.groups:
            return  # went with its group
        group = self.groups[path]
        array = group.arrays[name]
        if name != "step" and array.has_steps:
            self._lose_values(damage, array)
        elif damage.number is not None and (source := self._beside(group, array, damage.number)):
            self._copy_over(source, damage.file)
            self.done.append(f"{damage.file}: taken from {source}, which was recorded beside it")
        elif path in self.cut:
            return  # another of its chunks of steps, which is found again
        elif name == "step" and damage.number is not None and self._cut(group, damage.number[0]):
            self.cut.add(path)
            self.done.append(f"{path}: its records of {damage.file} are moved aside, for their steps are lost")
        elif name in NEEDED or name == "step":
            for lost in [node for node in self.nodes if node == path or node.startswith(f"{path}/")]:
                self._forget(lost)
            self.moves.append(path)
            self.done.append(f"{path}: moved aside, for {name} is lost and no other group has it")
        else:
            self._forget(array.path)
            self.moves.append(str(damage.array))
            self.done.append(f"{damage.array}: moved aside")

    def _lose_values(self, damage: Damage, array: StoredArray) -> None:
        """What the chunk held is missing from now on."""
        if damage.number is None:
            return  # what is not of one chunk is of the steps
        if array.written is not None:
            maps = self.attributes["chunks"]
            maps[array.path] = chunk_map(set(chunks_written(maps.get(array.path, "0"))) - {array.place(damage.number)})
        records = "" if damage.steps is None else f" in the records of steps {damage.steps[0]} to {damage.steps[1]}"
        self.lost.setdefault((array.path, damage.kind), {})[damage.number[0]] = damage.steps
        self.moves.append(damage.file)
        self.done.append(f"{damage.file}: {array.path} is missing{records}")

    def _beside(self, group: Node, array: StoredArray, number: tuple[int, ...]) -> str | None:
        """The same chunk of a group that has the same records, or matrices, as far as both are whole."""
        name = array.name
        along = [other for other in group.arrays.values() if other.dimensions == array.dimensions and "step" not in other.dimensions[1:]]
        for other in self.groups.values():
            twin = other.arrays.get(name)
            if other is group or twin is None or (twin.path, number) in self.damaged or twin.path not in self.nodes:
                continue
            if any(
                self.nodes[twin.path][key] != self.nodes[array.path][key]
                for key in ("shape", "chunk_grid", "codecs", "data_type", "chunk_key_encoding")
            ):
                continue
            shared = [array] if name == "step" else [one for one in along if one.name in other.arrays]
            if all(self._alike(one, other.arrays[one.name]) for one in shared):
                return twin.key(number)
        return None

    def _alike(self, one: StoredArray, other: StoredArray) -> bool:
        """Whether the chunks that are whole in both are equal, byte for byte."""
        if one.shape != other.shape or one.grid != other.grid:
            return False
        for numbers in product(*map(range, one.grid)):
            if (one.path, numbers) not in self.damaged and (other.path, numbers) not in self.damaged:
                files = [self.folder / array.key(numbers) for array in (one, other)]
                contents = [file.read_bytes() if file.is_file() else None for file in files]
                if contents[0] != contents[1]:
                    return False
        return True

    def _cut(self, group: Node, number: int) -> bool:
        """Take a chunk of steps out of a group, and what lies in the same records; false where chunks do not end where it does.

        The files that stay get their new numbers as second names, under the other key encoding, which the new document changes over to.
        """
        steps = group.arrays["step"]
        first, last = number * steps.shard[0], min((number + 1) * steps.shard[0], steps.shape[0])
        arrays = [array for array in group.arrays.values() if array.has_steps]
        if any(steps.shard[0] % array.shard[0] for array in arrays):
            return False
        for array in arrays:
            node = self.nodes[array.path]
            node["shape"][0] -= last - first
            node["chunk_key_encoding"] = {"name": "default", "configuration": {"separator": "." if array.separator == "/" else "/"}}
            after = stored_array(array.path, node)
            taken = range(first // array.shard[0], -(-last // array.shard[0]))
            kept: list[int] = []
            for numbers in product(*map(range, array.grid)):
                old = self.folder / array.key(numbers)
                if numbers[0] in taken or (array.path, numbers) in self.damaged or not old.is_file():
                    continue
                new = (numbers[0] - (len(taken) if numbers[0] >= taken.stop else 0), *numbers[1:])
                target = self.folder / after.key(new)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                os.link(old, target)
                kept.append(after.place(new))
            if array.written is not None:
                self.attributes["chunks"][array.path] = chunk_map(kept)
            old_keys = {array.key(numbers) for numbers in product(*map(range, array.grid))}
            self.moves += [f"{array.path}/c"] if array.separator == "/" else sorted(old_keys)
        return True

    def _forget(self, path: str) -> None:
        self.nodes.pop(path, None)
        self.attributes.get("chunks", {}).pop(path, None)

    def _tell_what_is_lost(self) -> None:
        """Neighbouring chunks in one entry: the document has a bound."""
        told = self.attributes.setdefault("damaged", []) if self.lost else []
        for (path, kind), chunks in self.lost.items():
            for number, steps in sorted(chunks.items()):
                if number - 1 not in chunks:
                    told.append({"array": path, "kind": kind, "steps": steps and list(steps), "repaired": self.time})
                elif steps and told[-1]["steps"]:
                    told[-1]["steps"][1] = steps[1]

    def _commit(self) -> None:
        self._tell_what_is_lost()
        if schema_of(self.attributes) != 1:
            self.attributes["checksum"] = seal(self.document)
        self._replace(METADATA, json_bytes(self.document))
        if any(one.file == METADATA for one in self.found.damage):
            self.done.append("zarr.json: made again from the metadata of groups and arrays")

    def _rewrite(self, file: str) -> None:
        """The document of a group or an array, as the root has it."""
        path = file.removesuffix(f"/{METADATA}")
        if path not in self.nodes:
            return
        if os.path.lexists(self.folder / file):
            self._move(file)
        own = {key: value for key, value in self.nodes[path].items() if key != "consolidated_metadata"}
        self._replace(file, json_bytes(own))
        self.done.append(f"{file}: written again from the root's")

    def _copy_over(self, source: str, file: str) -> None:
        content = (self.folder / source).read_bytes()
        if os.path.lexists(self.folder / file):
            kept = self.aside / file
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self.folder / file, kept, follow_symlinks=False)
        self._replace(file, content)

    def _move(self, file: str) -> None:
        if os.path.lexists(self.folder / file):
            (self.aside / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.folder / file, self.aside / file)

    def _replace(self, file: str, content: bytes) -> None:
        partial = self.run / f".repair.{os.getpid()}.partial"
        partial.unlink(missing_ok=True)
        replace_file(self.folder / file, [content], partial)
