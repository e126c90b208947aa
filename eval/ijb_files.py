"""Reads the files of the IJB layout completely and checks every line before any work starts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError

GALLERIES = {"IJBB": ("S1", "S2"), "IJBC": ("G1", "G2")}
_BYTES_PER_READ = 1 << 24


@dataclass(frozen=True)
class Gallery:
    """Templates with their subjects.

    Attributes:
        name: Name of the gallery, or "mixed" for the probes.
        templates: [n] positions in `IjbSet.template_ids`.
        subjects: [n] subject of each template.
    """

    name: str
    templates: NDArray[np.int64]
    subjects: NDArray[np.int64]


@dataclass(frozen=True)
class IjbSet:
    """The content of a target's files.

    Attributes:
        target: IJBB or IJBC.
        paths: Path of each of the n images.
        places: File and line where each image is named.
        landmarks: [n, 5, 2] pixels.
        faceness: [n], the detector's score.
        template_ids: [T], ascending.
        row_image: Image index of every line of face_tid_mid.
        row_template: Position in `template_ids` of every such line.
        row_media: Media id of every such line.
        pair_first: [P] positions in `template_ids`.
        pair_second: [P] positions in `template_ids`.
        issame: [P], whether a pair shows one subject.
        galleries: Galleries for identification; empty if the set has no such files.
        probe: Probes for identification; None if the set has no such files.
    """

    target: str
    paths: list[Path]
    places: list[str]
    landmarks: NDArray[np.float64]
    faceness: NDArray[np.float32]
    template_ids: NDArray[np.int64]
    row_image: NDArray[np.int64]
    row_template: NDArray[np.int64]
    row_media: NDArray[np.int64]
    pair_first: NDArray[np.int32]
    pair_second: NDArray[np.int32]
    issame: NDArray[np.bool_]
    galleries: tuple[Gallery, ...] = ()
    probe: Gallery | None = None

    def counts(self) -> dict[str, int]:
        """Returns the numbers of images, templates, media and pairs."""
        media = len(self.media_sizes()[1])
        same = int(np.count_nonzero(self.issame))
        return {
            "images": len(self.paths),
            "templates": len(self.template_ids),
            "media": media,
            "pairs": len(self.issame),
            "same_pairs": same,
            "impostor_pairs": len(self.issame) - same,
        }

    def media_sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the medium of every row, and the number of images of every medium.

        A medium belongs to one template: the same media id in another template is another medium.
        """
        number = np.unique(self.row_media, return_inverse=True)[1]
        code = self.row_template * (number.max() + 1) + number
        _, medium, sizes = np.unique(code, return_inverse=True, return_counts=True)
        return medium, sizes


def read_ijb(root: str | Path, target: str) -> IjbSet:
    """Reads and checks ROOT/meta, or ROOT/<TARGET>/meta, and that every image exists.

    Args:
        root: Folder that holds meta/ and loose_crop/, or <TARGET>/ with both.
        target: IJBB or IJBC.

    Raises:
        UserError: A file is missing or wrong; the message names it, and the line or what is not
            there.
    """
    if target not in GALLERIES:
        raise UserError(f"target is {target!r}; allowed are {', '.join(GALLERIES)}")
    folder = Path(root)
    if not (folder / "meta").is_dir() and (folder / target / "meta").is_dir():
        folder = folder / target
    prefix = folder / "meta" / target.lower()
    file_landmarks, file_media, file_pairs = (
        Path(f"{prefix}_{name}.txt")
        for name in ("name_5pts_score", "face_tid_mid", "template_pair_label")
    )
    for file in (file_landmarks, file_media, file_pairs):
        if not file.is_file():
            raise UserError(
                f"{file}: no such file; --root is the folder that holds meta/ and loose_crop/, or "
                f"one that holds {target}/"
            )
    names, places, landmarks, faceness = _read_landmarks(file_landmarks)
    paths = [folder / "loose_crop" / name for name in names]
    _check_images(folder / "loose_crop", names)
    row_image, templates, row_media = _read_media(file_media, names, file_landmarks)
    template_ids, row_template = np.unique(templates, return_inverse=True)
    first, second, issame = _read_pairs(file_pairs, template_ids, file_media)
    galleries, probe = _read_identification(prefix, target, template_ids, file_media)
    return IjbSet(
        target,
        paths,
        places,
        landmarks,
        faceness,
        template_ids,
        row_image,
        row_template,
        row_media,
        first,
        second,
        issame,
        galleries,
        probe,
    )


def _read_landmarks(
    file: Path,
) -> tuple[list[str], list[str], NDArray[np.float64], NDArray[np.float32]]:
    names, numbers = [], []
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            columns = line.split()
            try:
                if len(columns) != 12:
                    raise ValueError
                values = [float(text) for text in columns[1:]]
                if not all(map(math.isfinite, values)):
                    raise ValueError
            except ValueError:
                raise UserError(
                    f"{file}, line {number}: expected a name, ten landmark numbers and a score, "
                    f"got {line[:100]!r}"
                ) from None
            if "/" in columns[0] or columns[0].startswith("."):
                raise UserError(f"{file}, line {number}: {columns[0]!r} is no file of loose_crop")
            names.append(columns[0])
            numbers.append(values)
    if not names:
        raise UserError(f"{file}: is empty")
    table_ = np.array(numbers)
    places = [f"{file}, line {number}" for number in range(1, len(names) + 1)]
    return names, places, table_[:, :10].reshape(-1, 5, 2).copy(), table_[:, 10].astype(np.float32)


def _check_images(folder: Path, names: Sequence[str]) -> None:
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = sorted(set(names) - there)
    if missing:
        raise UserError(
            f"{folder}: {len(missing):,} of {len(set(names)):,} images are missing, for example "
            f"{', '.join(missing[:3])}"
        )


def _read_media(
    file: Path, names: Sequence[str], file_landmarks: Path
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns image index, template id and media id of every line."""
    position: dict[str, int] | None = None  # made only if the two files are in different orders
    images, templates, media = [], [], []
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines):
            columns = line.split()
            if len(columns) != 3 or not all(text.isdigit() for text in columns[1:]):
                raise UserError(
                    f"{file}, line {number + 1}: expected a name, a template and a media number, "
                    f"got {line[:100]!r}"
                )
            index = number
            if number >= len(names) or names[number] != columns[0]:
                if position is None:
                    position = {name: at for at, name in enumerate(names)}
                    if len(position) < len(names):
                        raise UserError(
                            f"{file_landmarks}: names an image twice, and {file.name} is in "
                            "another order, so which is meant cannot be known"
                        )
                found = position.get(columns[0])
                if found is None:
                    raise UserError(
                        f"{file}, line {number + 1}: {columns[0]} is not in {file_landmarks.name}"
                    )
                index = found
            images.append(index)
            templates.append(int(columns[1]))
            media.append(int(columns[2]))
    if not images:
        raise UserError(f"{file}: is empty")
    unused = len(names) - len(set(images))
    if unused:
        raise UserError(f"{file}: {unused:,} images of {file_landmarks.name} are in no template")
    largest = np.iinfo(np.int64).max
    if max(max(templates), max(media)) > largest:
        raise UserError(f"{file}: a number beyond {largest}")
    return np.array(images), np.array(templates), np.array(media)


def _read_pairs(
    file: Path, template_ids: NDArray[np.int64], file_media: Path
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
    """Returns the position of the first template, of the second, and whether they are the same."""
    firsts, seconds, sames = [], [], []
    largest = int(template_ids[-1])
    position: NDArray[np.int32] | None = None
    pair: NDArray[np.integer]
    if largest <= 100 * len(template_ids) + 1_000_000:  # a table is quicker than searching
        position = np.full(largest + 1, -1, np.int32)
        position[template_ids] = np.arange(len(template_ids))
    line = 1  # the line of the first pair of the block
    with open(file, "rb") as stream:
        rest = b""
        while True:
            block = stream.read(_BYTES_PER_READ)
            text = rest + block
            cut = len(text) if not block else text.rfind(b"\n") + 1
            text, rest = text[:cut], text[cut:]
            if text.strip():
                numbers = _three_numbers(text, file, line)
                asked = numbers[:, :2]
                if position is None:
                    pair = np.searchsorted(template_ids, asked)
                    pair[template_ids[np.minimum(pair, len(template_ids) - 1)] != asked] = -1
                else:
                    pair = position[np.minimum(asked, largest)]
                    pair[asked > largest] = -1
                for bad, what in (
                    ((pair < 0).any(1), f"names a template that is not in {file_media.name}"),
                    (numbers[:, 2] > 1, "has a label that is neither 0 nor 1"),
                ):
                    if bad.any():
                        at = int(np.argmax(bad))
                        raise UserError(f"{file}, line {line + at}: {numbers[at].tolist()} {what}")
                firsts.append(pair[:, 0].astype(np.int32))
                seconds.append(pair[:, 1].astype(np.int32))
                sames.append(numbers[:, 2] == 1)
                line += len(numbers)
            if not block:
                break
    if not sames:
        raise UserError(f"{file}: is empty")
    issame = np.concatenate(sames)
    if issame.all() or not issame.any():
        kind = "same" if issame.all() else "different"
        raise UserError(
            f"{file}, lines 1 to {len(issame)}: all pairs are of one kind ({kind}); a verification "
            "needs both"
        )
    return np.concatenate(firsts), np.concatenate(seconds), issame


def _three_numbers(text: bytes, file: Path, first_line: int) -> NDArray[np.int64]:
    """Parses whole lines to int64 [lines, 3]; an error names the line that has something else.

    All numbers of a block are computed at once, one decimal place at a time: IJB-C's 15.7 million
    lines take seconds, where a loop over lines takes a minute.
    """
    digits = np.frombuffer(text, np.uint8) - np.uint8(ord("0"))  # others wrap around to 10 and more
    blank = np.frombuffer(text, np.uint8) <= 32
    starts = np.flatnonzero(~blank & np.concatenate(([True], blank[:-1])))
    ends = np.flatnonzero(~blank & np.concatenate((blank[1:], [True])))  # the last digit of each
    lengths = ends - starts + 1
    line_ends = np.flatnonzero(digits == np.uint8((ord("\n") - ord("0")) % 256))
    if text[-1:] != b"\n":
        line_ends = np.append(line_ends, len(text))
    per_line = np.diff(np.concatenate(([0], np.searchsorted(starts, line_ends))))
    is_plain = not ((digits > 9) & ~blank).any() and lengths.max(initial=0) < 19
    if not is_plain or (per_line != 3).any():
        for number, one in enumerate(text.decode("utf-8", "replace").split("\n"), first_line):
            columns = one.encode().split()  # bytes, because digits of other scripts do not count
            if len(columns) != 3 or not all(c.isdigit() and len(c) < 19 for c in columns):
                raise UserError(
                    f"{file}, line {number}: expected two templates and 0 or 1, got {one[:100]!r}"
                )
        raise UserError(f"{file}, from line {first_line}: characters that are no plain digits")
    numbers = np.zeros(len(ends), np.int64)
    for place in range(int(lengths.max())):
        has = lengths > place
        numbers[has] += digits[ends[has] - place].astype(np.int64) * 10**place
    return numbers.reshape(-1, 3)


def _read_identification(
    prefix: Path, target: str, template_ids: NDArray[np.int64], file_media: Path
) -> tuple[tuple[Gallery, ...], Gallery | None]:
    names = [*(f"gallery_{part}" for part in GALLERIES[target]), "probe_mixed"]
    files = [Path(f"{prefix}_1N_{name}.csv") for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if len(missing) == len(files):
        return (), None
    if missing:
        raise UserError(f"{prefix.parent}: identification needs {', '.join(missing)} too")
    *galleries, probe = (
        _read_gallery(file, name.split("_")[1], template_ids, file_media)
        for file, name in zip(files, names, strict=True)
    )
    return tuple(galleries), probe


def _read_gallery(
    file: Path, name: str, template_ids: NDArray[np.int64], file_media: Path
) -> Gallery:
    """Reads template and subject of every line after the header, each template once."""
    subject_of: dict[int, int] = {}
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            columns = [column.strip() for column in line.split(",")]
            if number == 1 or not line.strip():
                continue
            if len(columns) < 2 or not all(text.isdigit() for text in columns[:2]):
                raise UserError(
                    f"{file}, line {number}: expected a template and a subject number first, got "
                    f"{line[:100]!r}"
                )
            template, subject = int(columns[0]), int(columns[1])
            if subject_of.setdefault(template, subject) != subject:
                raise UserError(f"{file}, line {number}: template {template} is of two subjects")
            at = int(np.searchsorted(template_ids, template))
            if at == len(template_ids) or template_ids[at] != template:
                raise UserError(
                    f"{file}, line {number}: template {template} is not in {file_media.name}"
                )
    if not subject_of:
        raise UserError(f"{file}: is empty")
    templates = np.searchsorted(template_ids, np.array(list(subject_of)))
    return Gallery(name, templates, np.array(list(subject_of.values())))
