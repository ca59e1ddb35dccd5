"""Answers about images, a JSON line each, in a folder that many processes fill and any takes up again.

    FOLDER/settings.json            all that decides the answers
    FOLDER/part-00001-of-00004.jsonl  those of one shard, in the order found

An answer depends on its image and the settings alone, so parts of any sharding belong together. A line that a
crash cut short is not there: it is asked again. Numbers come back bit for bit; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cdm_core.checkpoints import disk, write_synced
from cdm_core.errors import UserError
from cdm_core.files import write_bytes
from cdm_core.processes import Place

Row = dict[str, Any]
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, from 1."""

    index: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """`2/4` as the second of four; `UserError` on anything else."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise UserError(f"--shard {text!r} is no part of a whole: write 2/4 for the second of four")
        return cls(int(index), int(count))

    @classmethod
    def of(cls, place: Place) -> Self:
        """The part of one of the processes that a launcher started."""
        return cls(place.rank + 1, place.world)

    def share(self, total: int) -> range:
        """Its images of `total`: contiguous, sizes within 1."""
        return range(total * (self.index - 1) // self.count, total * self.index // self.count)


WHOLE = Shard()


def digest(settings: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that change with the settings."""
    return hashlib.blake2b(_text(settings).encode(), digest_size=4).hexdigest()


def _text(settings: Mapping[str, Any]) -> str:
    try:
        return json.dumps(settings, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except ValueError as error:
        raise UserError(f"settings that are no numbers cannot be written down: {settings}") from error


class Results:
    """A folder of answers under `settings`; made where it is not there.

    `UserError` where the folder holds answers under other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        file, wanted = folder / SETTINGS, _text(settings)
        if not file.is_file():
            write_bytes(file, wanted.encode())
        elif file.read_text(encoding="utf-8") != wanted:
            raise UserError(f"{folder} holds answers under other settings: delete it, or name another folder")

    def rows(self) -> dict[int, Row]:
        """Every answer, by image, in ascending order; of a damaged part `UserError`."""
        found: dict[int, Row] = {}
        for part in sorted(self.folder.glob("part-*.jsonl")):
            found |= {row["image"]: row for row in _read(part)}
        return dict(sorted(found.items()))

    def missing(self, images: Iterable[int]) -> list[int]:
        """Which of the images have no answer yet."""
        found = self.rows()
        return [image for image in images if image not in found]

    def writer(self, shard: Shard) -> Writer:
        """Adds answers to the part of a shard, of which there is one writer at a time."""
        return Writer(self.folder / f"part-{shard.index:05d}-of-{shard.count:05d}.jsonl")


class Writer:
    """Appends to one part, each time onto the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_file():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):  # cut short by a crash: what follows would be lost with it
                with disk(path):
                    aside = path.with_name(f".{path.name}.{os.getpid()}")
                    write_synced(aside, content[:whole])
                    aside.replace(path)

    def add(self, rows: Sequence[Row]) -> None:
        """Write answers, each with its `image`; all numbers finite."""
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        with disk(self.path), self.path.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())


def _read(part: Path) -> list[Row]:
    lines = part.read_bytes().split(b"\n")[:-1]  # behind the last newline: nothing, or half a line
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["image"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{part}, line {number}, is no answer ({error}): delete the file") from error
        rows.append(row)
    return rows
