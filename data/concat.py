"""Joins several sets into one, and leaves out some images of a set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.datasets import DataError, ImageDataset, MissingDataError
from data.fingerprint import Sample, sample_bytes


class ConcatDataset(ImageDataset):
    """Sets one after the other, for one head: the classes of each come after those of the last.

    Attributes:
        sources: The sets.
        sizes: Number of images of each set.
        label_offsets: What is added to the labels of each set.
    """

    def __init__(self, sources: Sequence[ImageDataset]) -> None:
        self.sources = list(sources)
        self.input_size = self.sources[0].input_size
        self.sizes = [len(source) for source in self.sources]
        self._ends = np.cumsum(self.sizes)
        classes = np.cumsum([0, *(source.num_classes for source in self.sources)])
        self.label_offsets: list[int] = classes[:-1].tolist()
        self.num_classes = int(classes[-1])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def samples(self) -> list[Sample]:
        """Returns the samples of all sets, in their order; see ImageDataset."""
        return [
            sample._replace(name=f"{number}: {sample.name}")
            for number, source in enumerate(self.sources)
            for sample in source.samples()
        ]

    def _locate(self, index: int) -> tuple[int, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return which, index - int(self._ends[which]) + self.sizes[which]

    def describe(self, index: int) -> str:
        """Describes the image as the set that it belongs to does."""
        which, local = self._locate(index)
        return self.sources[which].describe(local)

    def read_into(self, index: int, out: np.ndarray) -> int:
        """See ImageDataset."""
        which, local = self._locate(index)
        return self.sources[which].read_into(local, out) + self.label_offsets[which]

    def read_encoded(self, index: int) -> tuple[bytes | memoryview, int]:
        """See ImageDataset."""
        which, local = self._locate(index)
        encoded, label = self.sources[which].read_encoded(local)
        return encoded, label + self.label_offsets[which]

    def labels(self) -> np.ndarray:
        """See ImageDataset."""
        kind = np.int32 if self.num_classes <= 2**31 else np.int64
        labels = np.empty(len(self), kind)
        for source, end, offset in zip(self.sources, self._ends, self.label_offsets, strict=True):
            np.add(source.labels(), offset, out=labels[end - len(source) : end], casting="unsafe")
        return labels

    def will_need(self, begin: int, end: int) -> None:
        """See ImageDataset."""
        for source, last, size in zip(self.sources, self._ends.tolist(), self.sizes, strict=True):
            low, high = max(begin, last - size), min(end, last)
            if low < high:
                source.will_need(low - last + size, high - last + size)


class Subset(ImageDataset):
    """A set without the images and classes that a list names; classes keep their numbers.

    The list is a text file with one entry per line: `image NAME` or `class NAME`. Empty lines and
    lines that begin with # are ignored. In records an image's name is its key and a class's name
    its number; in folders they are <class folder>/<file> and <class folder>.

    Args:
        source: The whole set.
        path_list: Path of the list.

    Raises:
        DataError: A line names something that is not in the set, or no image is left.
    """

    def __init__(self, source: ImageDataset, path_list: str | Path) -> None:
        self.source = source
        self.num_classes, self.input_size = source.num_classes, source.input_size
        images: list[int] = []
        classes: list[int] = []
        for number, kind, name in _lines(Path(path_list)):
            try:
                if kind == "image":
                    images.append(source.find(name))
                else:
                    classes.append(source.find_class(name))
            except DataError as error:
                raise DataError(
                    f"{path_list}, line {number}: {error}. Correct the list, or give the one of "
                    "this set."
                ) from error
        keep = np.ones(len(source), bool)
        keep[images] = False
        if classes:
            keep &= ~np.isin(source.labels(), np.unique(classes))
        kept = np.flatnonzero(keep)
        if not len(kept):
            raise DataError(f"{path_list} leaves no image of the set; correct the list")
        self.num_excluded = len(source) - len(kept)
        self._kept = kept if len(source) >= 2**31 else kept.astype(np.int32)

    def __len__(self) -> int:
        return len(self._kept)

    def samples(self) -> list[Sample]:
        """Returns the samples of the whole set, and one of what is left of it; see ImageDataset."""
        return [*self.source.samples(), sample_bytes("kept", self._kept.tobytes())]

    def describe(self, index: int) -> str:
        """Describes the image as the whole set does."""
        return self.source.describe(int(self._kept[index]))

    def read_into(self, index: int, out: np.ndarray) -> int:
        """See ImageDataset."""
        return self.source.read_into(int(self._kept[index]), out)

    def read_encoded(self, index: int) -> tuple[bytes | memoryview, int]:
        """See ImageDataset."""
        return self.source.read_encoded(int(self._kept[index]))

    def labels(self) -> np.ndarray:
        """See ImageDataset."""
        return self.source.labels()[self._kept]

    def will_need(self, begin: int, end: int) -> None:
        """See ImageDataset."""
        self.source.will_need(int(self._kept[begin]), int(self._kept[end - 1]) + 1)


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yields (line number, "image" or "class", name) of an exclusion list."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise MissingDataError(f"{path} does not exist; check the path (`exclude`)") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from error
    for number, line in enumerate(text.splitlines(), 1):
        kind, _, name = line.strip().partition(" ")
        if not kind or kind.startswith("#"):
            continue
        if kind not in ("image", "class") or not name.strip():
            raise DataError(
                f"{path}, line {number}: expected 'image NAME' or 'class NAME', got {line[:60]!r}"
            )
        yield number, kind, name.strip()
