"""Writes a record set: `train.rec`, `train.idx`, `train.manifest`, `property`, `label_map.txt`.

Everything is written to the folder `OUT/.packing` and renamed at the end. A writer with a resume
token saves its state from time to time. After a kill, another writer with the same token truncates
the files to the last saved state and continues from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from data.datasets import DataError
from data.recordio import RecordError, frame_record, pack_range, pack_record
from data.tools.manifest import ManifestLines, entry_of, read_manifest
from utils.files import atomic_write

INSIGHTFACE, IM2REC = "insightface", "im2rec"
STYLES = (INSIGHTFACE, IM2REC)
STAGING = ".packing"
_NOTE_EVERY_SECONDS = 10.0
_STATE = "state.json"
_MANY = 100_000  # this many labels without an image still get identity records
_RECORDS = ("train.rec", "train.idx", "train.manifest")


class RecordSetWriter:
    """Writes one record set into the folder `out`; all files appear at `finish`.

    Without a resume token, leaving the `with` block without `finish` leaves nothing behind. With
    one it leaves the staging folder.

    Args:
        out: Folder of the set.
        size: Pixels per side, or (height, width), for `property`.
        force: Whether an existing set is replaced.
        style: "insightface" has a header record with key 0, images from key 1 on, and one record
            per identity if the images come class by class with increasing labels. In "im2rec" every
            record is an image, with keys from 0 on, or as given.
        resume_token: Identifies the job (a hash of its inputs and options); None cannot be resumed.
        restart: Whether the beginning of another job is dropped.

    Attributes:
        progress: What the job noted last, {} for a new job.
        num_images: Number of images so far.
        num_classes: Largest label so far plus one.

    Raises:
        DataError: `out` holds a set (unless `force`), another writer's lock, or the beginning of
            another job (unless `restart`).
    """

    def __init__(
        self,
        out: Path,
        size: int | tuple[int, int],
        force: bool = False,
        *,
        style: str = INSIGHTFACE,
        resume_token: str | None = None,
        restart: bool = False,
    ) -> None:
        if style not in STYLES:
            raise DataError(f"style {style!r}: allowed are {', '.join(STYLES)}")
        self.out, self.style = out, style
        self.height, self.width = (size, size) if isinstance(size, int) else size
        self.progress: dict[str, Any] = {}
        self.num_images = 0
        self.num_classes = 0
        self._token = resume_token
        self._staging = out / STAGING
        self._finished = False
        self._runs = _ClassRuns()
        self._manifest = ManifestLines()
        self._last_key = 0 if style == INSIGHTFACE else -1
        self._last_note = time.monotonic()
        self._files: list[BinaryIO] = []
        state = self._read_state()
        ours = state is not None and resume_token is not None and state["token"] == resume_token
        if not ours:
            self._check_free(force)
            if state is not None and not restart:
                raise DataError(
                    f"{self._staging} holds the beginning of another job ({state['num_images']} "
                    "images). Run that job's command again to go on with it, or drop it with "
                    "--restart."
                )
        self._out_is_new = not out.exists()
        self._staging.mkdir(parents=True, exist_ok=True)
        self._lock = self._take_lock()
        try:
            if ours and state is not None:
                self._continue(state)
            else:
                self._begin()
        except BaseException:
            self._close_files()
            raise

    def add(self, encoded: bytes, label: int | Sequence[float], key: int | None = None) -> None:
        """Adds an image.

        Args:
            encoded: Encoded image.
            label: Class, or a sequence of labels, which is kept whole; its first is the class.
            key: Key of the record; None counts.
        """
        key = self._last_key + 1 if key is None else key
        class_id = label if isinstance(label, int) else int(label[0])
        self.add_payload(pack_record(encoded, label, key), class_id, key)

    def add_payload(self, payload: bytes, class_id: int, key: int | None = None) -> None:
        """Adds an image as the payload of its record.

        Args:
            payload: Payload of the record.
            class_id: Class of the image.
            key: Key of the record, distinct from all others, which is not checked; None counts.

        Raises:
            DataError: The class is negative, or the key does not fit the style.
        """
        if class_id < 0:
            raise DataError(f"label {class_id}: allowed are whole numbers from 0 on")
        if key is None:
            key = self._last_key + 1
        elif self.style == INSIGHTFACE and key != self._last_key + 1:
            raise DataError(f"key {key} after {self._last_key}: this style counts them")
        self._write(key, class_id, payload)
        self._count(key, class_id)

    def note(self, **progress: Any) -> None:
        """Keeps what the job needs to continue from here. It is saved to disk every 10 seconds."""
        self.progress = progress
        if self._token and time.monotonic() - self._last_note >= _NOTE_EVERY_SECONDS:
            self._make_durable()

    def finish(self, class_names: Sequence[str] | None = None, num_classes: int = 0) -> None:
        """Writes the identity records and puts all files in place.

        Args:
            class_names: Names for label_map.txt; None writes no such file.
            num_classes: Number of classes for `property`, if it exceeds the largest label plus one.
        """
        if not self.progress.get("finished"):
            num_classes = max(num_classes, self.num_classes, len(class_names or ()))
            if self.style == INSIGHTFACE:
                self._write_identities(num_classes)
            self._files[2].write(self._manifest.last())
            texts = {"property": f"{num_classes},{self.height},{self.width}\n"}
            if class_names is not None:
                texts["label_map.txt"] = "".join(f"{i}\t{n}\n" for i, n in enumerate(class_names))
            for name, text in texts.items():
                (self._staging / name).write_text(text, encoding="utf-8")
            self.progress = {**self.progress, "finished": True}
            self._make_durable()
        self._publish()

    def _write_identities(self, num_classes: int) -> None:
        first_identity = self.num_images + 1
        identities = self._runs.ranges(num_classes, first_identity)
        for label, (first, end) in enumerate(identities):
            key = first_identity + label
            self._write(key, None, pack_range(first, end, key))
        header = pack_range(first_identity, first_identity + len(identities))
        framed = frame_record(header)
        if len(framed) != len(frame_record(pack_range(0, 0))):
            raise RecordError(f"a header record for {first_identity} does not fit its place")
        self._files[0].seek(0)
        self._files[0].write(framed)
        self._files[0].seek(0, os.SEEK_END)
        # Its manifest line was left out at the start, so it is written last.
        self._files[2].write(self._manifest.line(entry_of(0, None, header)))

    def _write(self, key: int, class_id: int | None, payload: bytes) -> None:
        rec, idx, manifest = self._files
        idx.write(b"%d\t%d\n" % (key, self._offset))
        self._offset += rec.write(frame_record(payload))
        manifest.write(self._manifest.line(entry_of(key, class_id, payload)))

    def _count(self, key: int, class_id: int) -> None:
        self.num_images += 1
        self.num_classes = max(self.num_classes, class_id + 1)
        self._last_key = max(self._last_key, key)
        if self.style == INSIGHTFACE:
            self._runs.add(key, class_id)

    def _begin(self) -> None:
        for path in self._staging.iterdir():
            if path.name != "lock":
                path.unlink()
        for name in _RECORDS:
            self._files.append(open(self._staging / name, "wb"))  # noqa: SIM115 (_close_files)
        self._offset = 0
        self._files[2].write(self._manifest.first())
        if self.style == INSIGHTFACE:  # a placeholder: the counts are known at the end
            self._offset = self._files[0].write(frame_record(pack_range(0, 0)))
            self._files[1].write(b"0\t0\n")
        if self._token:
            self._make_durable()

    def _continue(self, state: dict[str, Any]) -> None:
        self.progress = state["progress"]
        if self.progress.get("finished"):
            self.num_images = state["num_images"]
            return
        for name, length in zip(_RECORDS, state["lengths"], strict=True):
            file = open(self._staging / name, "r+b")  # noqa: SIM115 (closed by _close_files)
            self._files.append(file)
            if file.seek(0, os.SEEK_END) < length:
                raise DataError(
                    f"{self._staging / name} is shorter than when it was noted. The beginning "
                    "cannot be used; drop it with --restart."
                )
            file.truncate(length)
            file.seek(length)
        self._offset = state["lengths"][0]
        staged = self._staging / "train.manifest"
        for entry in read_manifest(staged, unfinished_bytes=state["lengths"][2]):
            self._manifest.line(entry)
            assert entry.class_id is not None  # identities are written at the very end
            self._count(entry.key, entry.class_id)

    def _read_state(self) -> dict[str, Any] | None:
        try:
            return json.loads((self._staging / _STATE).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DataError(
                f"{self._staging / _STATE} is damaged ({error}); delete {self._staging}"
            ) from error

    def _make_durable(self) -> None:
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        state = {
            "token": self._token,
            "lengths": [file.tell() for file in self._files],
            "num_images": self.num_images,
            "progress": self.progress,
        }
        with atomic_write(self._staging / _STATE) as noted:
            noted.write(json.dumps(state).encode())
        self._last_note = time.monotonic()

    def _publish(self) -> None:
        """Renames the files into place.

        The old index is removed first and the new one comes last, and without it nothing opens the
        set. So a kill between two steps never leaves old facts beside new records.
        """
        names = [*_RECORDS, "property", "label_map.txt"]
        names.sort(key=lambda name: name == "train.idx")
        if (self._staging / "train.rec").exists():  # else an earlier run has renamed it
            for name in ("train.idx", *names):
                (self.out / name).unlink(missing_ok=True)
        for name in names:
            if (self._staging / name).exists():
                os.replace(self._staging / name, self.out / name)
        self._finished = True
        self._close_files()
        shutil.rmtree(self._staging)

    def _check_free(self, force: bool) -> None:
        existing = [name for name in ("train.rec", "train.idx") if (self.out / name).exists()]
        if existing and not force:
            raise DataError(
                f"{self.out} already holds {' and '.join(existing)}; give another folder, or "
                "--force to replace them"
            )

    def _take_lock(self) -> BinaryIO:
        lock = open(self._staging / "lock", "wb")  # noqa: SIM115 (held until _close_files)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise DataError(
                f"another process is writing to {self.out}; wait for it or give another folder"
            ) from error
        return lock

    def _close_files(self) -> None:
        for file in (*self._files, self._lock):
            file.close()
        self._files = []

    def __enter__(self) -> RecordSetWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._finished:
            return
        try:
            if self._token and self._files:
                self._make_durable()
        finally:
            self._close_files()
        if not self._token:
            self.discard()

    def discard(self) -> None:
        """Removes what was written so far; nothing can be continued afterwards."""
        self._finished = True
        self._close_files()
        shutil.rmtree(self._staging, ignore_errors=True)
        if self._out_is_new:
            with contextlib.suppress(OSError):  # other files have appeared there meanwhile
                self.out.rmdir()


class _ClassRuns:
    """The keys of each class, as long as the images come class by class with increasing labels."""

    def __init__(self) -> None:
        self._labels, self._firsts = array("q"), array("q")
        self._in_order = True

    def add(self, key: int, class_id: int) -> None:
        """Counts an image."""
        if not self._in_order or (self._labels and self._labels[-1] == class_id):
            return
        if self._labels and class_id < self._labels[-1]:
            self._in_order = False
            self._labels, self._firsts = array("q"), array("q")
            return
        self._labels.append(class_id)
        self._firsts.append(key)

    def ranges(self, num_classes: int, end: int) -> list[tuple[int, int]]:
        """Returns (first key, last key + 1) of every class.

        The result is empty if the classes are mixed, or if most labels have no image (one label of
        2**30 would make as many records).
        """
        if not self._in_order or num_classes > 2 * len(self._labels) + _MANY:
            return []
        ranges: list[tuple[int, int]] = []
        for i, (label, first) in enumerate(zip(self._labels, self._firsts, strict=True)):
            ranges += [(first, first)] * (label - len(ranges))  # classes without an image
            ranges.append((first, self._firsts[i + 1] if i + 1 < len(self._firsts) else end))
        return ranges + [(end, end)] * (num_classes - len(ranges))
