"""Names of the classes of a set: from its folders, or from label_map.txt beside the records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data.concat import ConcatDataset, Subset
from data.datasets import DataError, FolderDataset, ImageDataset, RecordDataset

LABEL_MAP = "label_map.txt"


def class_names(source: ImageDataset) -> list[str] | None:
    """Returns the name of every class by its label, or None where no class has a name.

    A class without a name has "". The names of joined sets follow one another. There may be fewer
    names than classes (a head may be padded), never more.

    Args:
        source: The data set.

    Raises:
        DataError: The label_map.txt is damaged or names more classes than the set has.
    """
    if isinstance(source, FolderDataset):
        return list(source.class_names)
    if isinstance(source, Subset):  # classes keep their numbers
        return class_names(source.source)
    if isinstance(source, ConcatDataset):
        parts = [class_names(each) for each in source.sources]
        if not any(parts):
            return None
        names: list[str] = []
        for part, offset in zip(parts, source.label_offsets, strict=True):
            names += [""] * (offset - len(names)) + (part or [])
        return names
    if not isinstance(source, RecordDataset):
        return None
    folder = source.path_rec.parent
    found = read_label_map(folder)
    if found is not None and len(found) > source.num_classes:
        raise DataError(
            f"{folder / LABEL_MAP} names {len(found)} classes, but the set has "
            f"{source.num_classes}: it belongs to another set; correct it or delete the file"
        )
    return found


def label_map_text(names: Sequence[str]) -> str:
    """Returns the content of a label_map.txt, as `read_label_map` reads it.

    Raises:
        DataError: A line of text cannot hold one of the names.
    """
    for label, name in enumerate(names):
        if len(f"-{name}-".splitlines()) > 1 or not _is_text(name):
            raise DataError(f"class {label}, {name!r}: {LABEL_MAP} needs names of one line of text")
    return "".join(f"{label}\t{name}\n" for label, name in enumerate(names))


def _is_text(name: str) -> bool:
    """Returns False for a folder name with bytes that are not text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_label_map(folder: Path) -> list[str] | None:
    """Reads class names by label from `label_map.txt`; None if the folder has none.

    Raises:
        DataError: The file is not UTF-8 text, or a line is not the next label and a name.
    """
    path = folder / LABEL_MAP
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no UTF-8 text ({error}); correct it or delete it") from error
    names: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        label, tab, name = line.partition("\t")
        if not tab or label != str(number - 1):
            raise DataError(
                f"{path}, line {number}: expected '{number - 1}<tab>name', got {line[:80]!r}; "
                "correct it or delete the file"
            )
        names.append(name)
    return names
