"""metrics.jsonl: one object per line, whole lines only, none lost to a disk that is full."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger("train")


class Journal:
    """Appends to metrics.jsonl. What cannot be written waits in memory for the next line.

    Args:
        folder: the run's.
        step: optimizer steps done before, of a resumed run; 0 begins a new file.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        if step:
            discard_after(folder, step)
        self._file: BinaryIO = self.path.open("ab" if step else "wb", buffering=0)
        self._waiting: list[bytes] = []

    def write(self, record: dict[str, Any]) -> bool:
        """Append a line; False if the disk does not take it now, which is logged once."""
        self._waiting.append(json.dumps(record).encode() + b"\n")
        data = b"".join(self._waiting)
        size = self._file.seek(0, 2)
        try:
            written = self._file.write(data)
            if written != len(data):  # a disk that became full within it
                self._file.truncate(size)
                raise OSError(f"{written} of {len(data)} bytes written")
        except OSError as error:
            if len(self._waiting) == 1:
                logger.error(
                    "%s cannot be written (%s): its lines wait in memory, training goes on",
                    self.path, error,
                )  # fmt: skip
            return False
        if len(self._waiting) > 1:
            logger.info("%s can be written again; no line is lost", self.path)
        self._waiting.clear()
        return True

    def close(self) -> None:
        """Close the file; says so if lines never reached it."""
        if self._waiting:
            logger.error("%d last lines of %s could not be written", len(self._waiting), self.path)
        self._file.close()


def discard_after(folder: Path, step: int) -> None:
    """Take the lines of steps beyond `step` out of metrics.jsonl: they will be run again.

    They go to metrics_discarded.jsonl; what a killed process wrote half goes, too.
    """
    path = folder / "metrics.jsonl"
    kept: list[str] = []
    discarded: list[str] = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            is_kept = int(json.loads(line)["step"]) <= step and line.endswith("\n")
        except (ValueError, KeyError, TypeError):
            is_kept = False
        (kept if is_kept else discarded).append(line)
    if discarded:
        with (folder / "metrics_discarded.jsonl").open("a") as file:
            file.write("".join(line.rstrip("\n") + "\n" for line in discarded))
        aside = path.with_name(path.name + ".tmp")
        aside.write_text("".join(kept))
        aside.replace(path)
