"""Examines a record set: framing, index, headers, labels, images, copies, overlap, manifest."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data.class_names import read_label_map
from data.datasets import DataError, MissingDataError, check_label
from data.decode import ImageError, decode_image
from data.index import RecordIndex, is_header_record, read_index, read_property
from data.order import shuffled_indices
from data.prefetch import OrderedPrefetch
from data.recordio import RecordError, RecordReader, class_of, range_of, unpack_record
from data.tools.image_records import rec_path
from data.tools.manifest import manifest_path, verify_records
from data.tools.record_writer import IM2REC, INSIGHTFACE
from data.tools.report import Report
from data.tools.scan import Damage, scan_on

_CHUNK = 64  # images per task handed to a thread


class Images(NamedTuple):
    """The images of a set in the order of the file.

    Attributes:
        keys: [n] int64, -1 if the index does not list the record.
        offsets: [n] int64, where the records begin, in bytes.
        ends: [n] int64, where the records end, in bytes.
        classes: [n] int64, -1 if the label is not a class.
        hashes: [n] int64, the first 8 bytes of the sha1 of the encoded image.
    """

    keys: np.ndarray
    offsets: np.ndarray
    ends: np.ndarray
    classes: np.ndarray
    hashes: np.ndarray


class Described(NamedTuple):
    """The records that only describe others, in the order of the file.

    Attributes:
        keys: [m] int64, -1 if the index does not list the record.
        first: [m] float64, the first number that they state.
        end: [m] float64, the second number that they state.
    """

    keys: np.ndarray
    first: np.ndarray
    end: np.ndarray


class Others(NamedTuple):
    """What must not be in the set.

    Attributes:
        name: Name of the other set.
        hashes: `content_hash` of its images.
        people: Names of its identities.
    """

    name: str
    hashes: frozenset[int]
    people: frozenset[str]


def examine(
    data: Path,
    *,
    num_decoded: int | None = 10_000,
    against: Sequence[Others] = (),
    allowed: Sequence[str] = (),
    num_threads: int = 2,
) -> tuple[Report, np.ndarray]:
    """Runs every check. It takes about 120 bytes of memory per image.

    Args:
        data: Folder with train.rec, or a .rec file.
        num_decoded: Number of images to decode, drawn at random; None means all.
        against: Sets that must not overlap with this one.
        allowed: Checks whose findings are only notes.
        num_threads: Number of threads that decode and hash.

    Returns:
        The report, and the images per class, int64 [classes that have any].

    Raises:
        DataError: The .rec does not exist.
    """
    report, reader, index = _open(data, allowed)
    if index is not None and manifest_path(reader.path).is_file():
        _verify(reader, index, report, num_threads)  # first, because its memory is then freed
    else:
        report.facts["manifest"] = "none to compare with (scripts/pack.py writes one)"
    images, described = _read_all(reader, index, report)
    _check_header(index, images, described, report)
    _check_property(reader, images, report)
    sizes = _check_images(reader, images, num_decoded, num_threads, report)
    _check_sizes(reader, images, sizes, report)
    counts = _check_classes(images, report)
    _check_duplicates(images, report)
    for other in against:
        _check_overlap(reader, images, other, report)
    return report, counts


def verify(data: Path, *, allowed: Sequence[str] = (), num_threads: int = 2) -> Report:
    """Compares the records with the manifest, and nothing else.

    Args:
        data: Folder with train.rec, or a .rec file.
        allowed: Checks whose findings are only notes.
        num_threads: Number of threads that read and hash.

    Raises:
        MissingDataError: The .rec or the manifest does not exist.
    """
    report, reader, index = _open(data, allowed)
    path = manifest_path(reader.path)
    if not path.is_file():
        raise MissingDataError(
            f"{path} does not exist, so there is nothing to verify against; scripts/pack.py writes "
            "it beside the records"
        )
    if index is not None:
        _verify(reader, index, report, num_threads)
    return report


def _open(data: Path, allowed: Sequence[str]) -> tuple[Report, RecordReader, RecordIndex | None]:
    """Opens the report, the records, and the index if it can be read."""
    path = rec_path(data)
    if not path.is_file():
        raise MissingDataError(f"{path} does not exist; give a folder with train.rec, or a .rec")
    report = Report(str(path), allowed)
    reader = RecordReader(path)
    report.facts["size_bytes"] = reader.size
    path_idx = path.with_suffix(".idx")
    if not path_idx.is_file():
        report.add("index", f"{path_idx} does not exist; --rebuild-index makes it")
        return report, reader, None
    try:
        return report, reader, read_index(path_idx, reader.size)
    except RecordError as error:
        report.add("index", str(error))
        return report, reader, None


def _read_all(
    reader: RecordReader, index: RecordIndex | None, report: Report
) -> tuple[Images, Described]:
    """Scans the file once: compares records with the index and reads every header and hash."""
    if index is None:
        listed, keys = np.empty(0, np.int64), np.empty(0, np.int64)
    else:
        listed, keys = index.offsets, index.keys
        if not (listed[1:] > listed[:-1]).all():
            order = np.argsort(listed, kind="stable")
            listed, keys = listed[order], keys[order]
    columns = [array("q") for _ in Images._fields]
    described_keys, described_numbers = array("q"), array("d")
    num_records, line = 0, 0
    with tqdm(total=reader.size, desc="records", unit="B", unit_scale=True) as bar:
        for place in scan_on(reader):
            end = place.end
            while line < len(listed) and listed[line] < place.offset:
                line = _not_a_record(report, keys, listed, line)
            if isinstance(place, Damage):
                report.add("records", "damaged: no record can be read there", place.error)
                bar.update(end - place.offset)
                continue
            num_records += 1
            key = -1
            if line < len(listed) and listed[line] == place.offset:
                key, line = int(keys[line]), line + 1
            where = reader.where(place.offset, None if key < 0 else key)
            if key < 0 and index is not None:
                report.add("index", "does not list a record of the .rec", where)
            payload = reader.read_at(place.offset, end=end)
            try:
                header, image = unpack_record(payload, where)
            except RecordError as error:
                report.add("records", "a record without a header", str(error))
                continue
            if is_header_record(header, len(payload)):
                described_keys.append(key)
                described_numbers.extend(range_of(header))
            else:
                values = (
                    key,
                    place.offset,
                    end,
                    _class(report, header, where),
                    content_hash(image),
                )
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
            bar.update(end - place.offset)
    while line < len(listed):
        line = _not_a_record(report, keys, listed, line)
    report.facts |= {"num_records": num_records, "num_images": len(columns[0])}
    if not columns[0]:
        report.add("records", "holds no image")
    images = Images(*(np.frombuffer(column, np.int64) for column in columns))
    numbers = np.frombuffer(described_numbers, np.float64)
    return images, Described(np.frombuffer(described_keys, np.int64), numbers[::2], numbers[1::2])


def _not_a_record(report: Report, keys: np.ndarray, offsets: np.ndarray, line: int) -> int:
    report.add("index", "points where no record starts", f"key {keys[line]}, byte {offsets[line]}")
    return line + 1


def _class(report: Report, header: Any, where: str) -> int:
    try:
        return check_label(class_of(header), None, lambda: where)
    except DataError as error:
        report.add("labels", "a label that is no class", str(error))
        return -1


def content_hash(content: bytes | memoryview) -> int:
    """Returns the first 8 bytes of the sha1 of an encoded image as an int64."""
    return int.from_bytes(hashlib.sha1(content).digest()[:8], "little", signed=True)


def _check_header(
    index: RecordIndex | None, images: Images, described: Described, report: Report
) -> None:
    """Compares the header record with the images, and the identity records with the labels."""
    is_header = described.keys == 0
    report.facts["style"] = INSIGHTFACE if len(described.keys) else IM2REC
    if index is None or not is_header.any():
        return
    num_identities = int((~is_header).sum())
    first, end = len(images.keys) + 1, len(images.keys) + 1 + num_identities
    stated = float(described.first[is_header][0]), float(described.end[is_header][0])
    # Published sets beyond 2**24 images state rounded counts.
    if np.float32(stated[0]) != np.float32(first) or np.float32(stated[1]) != np.float32(end):
        report.add(
            "header",
            f"the header record says ({stated[0]:.0f}, {stated[1]:.0f}), found were images with "
            f"keys below {first} and {num_identities} records of identities: ({first}, {end})",
        )
    wrong = images.keys[(images.keys < 1) | (images.keys >= first)]
    for key in wrong.tolist():
        report.add("header", "an image outside the keys that the header states", f"key {key}")
    if num_identities and not len(wrong):
        identities = Described(*(column[~is_header] for column in described))
        _check_identities(images, identities, first, report)


def _check_identities(
    images: Images, identities: Described, first_identity: int, report: Report
) -> None:
    classes = images.classes
    if not (images.keys[1:] > images.keys[:-1]).all():
        classes = classes[np.argsort(images.keys, kind="stable")]  # by key, from key 1 on
    begins = np.concatenate([[0], np.flatnonzero(np.diff(classes)) + 1])
    ends = np.append(begins[1:], len(classes))
    order = np.argsort(classes[begins], kind="stable")  # runs of one class, by class
    labels = identities.keys - first_identity
    places = np.minimum(np.searchsorted(classes[begins][order], labels), len(order) - 1)
    runs = order[places]
    there = classes[begins][runs] == labels
    fits = there & (np.float32(begins[runs] + 1) == np.float32(identities.first))
    fits &= np.float32(ends[runs] + 1) == np.float32(identities.end)
    fits |= ~there & (identities.first == identities.end)  # a class without an image
    for at in np.flatnonzero(~fits).tolist():
        run = runs[at]
        found = f"[{begins[run] + 1}, {ends[run] + 1})" if there[at] else "nowhere"
        report.add(
            "identities",
            "the record of an identity does not say where its images are",
            f"key {identities.keys[at]}, class {labels[at]}: says keys "
            f"[{identities.first[at]:.0f}, {identities.end[at]:.0f}), its images are {found}",
        )


def _check_property(reader: RecordReader, images: Images, report: Report) -> None:
    path = reader.path.with_name("property")
    if not path.is_file():
        report.add("property", "there is no property file: labels are counted", note=True)
        return
    try:
        stated = read_property(path)
    except RecordError as error:
        report.add("property", str(error))
        return
    report.facts["property"] = f"{stated.num_classes},{stated.height},{stated.width}"
    needed = int(images.classes.max(initial=-1)) + 1
    if stated.num_classes < needed:
        report.add("property", f"says {stated.num_classes} classes, the labels need {needed}")
    elif stated.num_classes > needed:
        report.add(
            "property", f"says {stated.num_classes} classes, the labels use {needed}", note=True
        )


def _check_images(
    reader: RecordReader,
    images: Images,
    num_decoded: int | None,
    num_threads: int,
    report: Report,
) -> dict[tuple[int, int], list[int]]:
    """Decodes images and returns {(height, width): positions}."""
    total = len(images.keys)
    count = total if num_decoded is None else min(num_decoded, total)
    chosen = np.arange(total)
    if count < total:
        chosen = np.sort(shuffled_indices(np.arange(count), total, seed=0, epoch=0))

    def look(chunk: int) -> list[tuple[int, tuple[int, int] | None, bool, str]]:
        found: list[tuple[int, tuple[int, int] | None, bool, str]] = []
        for position in chosen[chunk * _CHUNK : (chunk + 1) * _CHUNK].tolist():
            where = _where(reader, images, position)
            payload = reader.read_at(int(images.offsets[position]), end=int(images.ends[position]))
            encoded = unpack_record(payload)[1]
            try:
                pixels = decode_image(encoded, where)
                height, width, _ = pixels.shape
                found.append((position, (height, width), _is_gray(pixels), ""))
            except ImageError as error:
                found.append((position, None, False, str(error)))
        return found

    sizes: dict[tuple[int, int], list[int]] = {}
    num_gray = 0
    chunks = range(-(-count // _CHUNK))
    running = OrderedPrefetch(look, chunks, num_threads if len(chunks) > 1 else 0)
    try:
        with tqdm(total=count, desc="images", unit=" images") as bar:
            for results in running:
                for position, size, gray, error in results:
                    if size is None:
                        report.add("images", "cannot be decoded", error)
                    else:
                        sizes.setdefault(size, []).append(position)
                        num_gray += gray
                bar.update(len(results))
    finally:
        running.close()
    report.facts["images_decoded"] = count if count < total else f"all {count}"
    if num_gray:
        report.add("channels", f"{num_gray} of {count} images are gray", note=True)
    return sizes


def _is_gray(pixels: np.ndarray) -> bool:
    return bool(
        (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1:2] == pixels[..., 2:]).all()
    )


def _check_sizes(
    reader: RecordReader,
    images: Images,
    sizes: dict[tuple[int, int], list[int]],
    report: Report,
) -> None:
    if not sizes:
        return
    usual = max(sizes, key=lambda size: len(sizes[size]))
    report.facts["size_pixels"] = f"{usual[0]} x {usual[1]}"
    for size, positions in sorted(sizes.items()):
        if size != usual:
            message = f"{size[0]} x {size[1]} pixels where most are {usual[0]} x {usual[1]}"
            for position in positions:
                report.add("sizes", message, _where(reader, images, position))
    path = reader.path.with_name("property")
    if path.is_file() and report.facts.get("property"):
        stated = read_property(path)
        if (stated.height, stated.width) != usual:
            report.add(
                "property",
                f"says {stated.height} x {stated.width} pixels, images are {usual[0]} x {usual[1]}",
            )


def _where(reader: RecordReader, images: Images, position: int) -> str:
    key = int(images.keys[position])
    return reader.where(int(images.offsets[position]), None if key < 0 else key)


def _check_classes(images: Images, report: Report) -> np.ndarray:
    """Returns the images per class, of the classes that have any: int64 [classes]."""
    present, counts = np.unique(images.classes[images.classes >= 0], return_counts=True)
    if not len(present):
        return counts
    report.facts |= {
        "num_classes": len(present),
        "largest_label": int(present[-1]),
        "images_per_class": f"min {counts.min()}, median {np.median(counts):.0f}, "
        f"mean {counts.mean():.1f}, max {counts.max()}",
    }
    before = np.concatenate([[-1], present[:-1]])
    for low, high in zip(
        before[present - before > 1].tolist(), present[present - before > 1].tolist(), strict=True
    ):
        text = f"{low + 1}" if high - low == 2 else f"{low + 1} to {high - 1}"
        report.add("gaps", "classes below the largest without an image", text)
    report.facts["empty_classes_below_the_largest"] = int(present[-1]) + 1 - len(present)
    singles = present[counts == 1]
    report.facts["singletons"] = len(singles)
    for label in singles.tolist():
        report.add("singletons", "classes with one image", f"class {label}", note=True)
    return counts


def _check_duplicates(images: Images, report: Report) -> None:
    """Finds images with the same content, within a class and under several classes."""
    order = np.argsort(images.hashes, kind="stable")
    again = np.flatnonzero(np.diff(images.hashes[order]) == 0)
    for at in again.tolist():
        first, second = int(order[at]), int(order[at + 1])
        a, b = int(images.classes[first]), int(images.classes[second])
        example = f"{_name(images, first)} (class {a}) and {_name(images, second)} (class {b})"
        if a == b:
            report.add("duplicates", "the same image twice in one class", example)
        else:
            report.add("conflicts", "the same image under two classes", example)
    report.facts["copies_of_another_image"] = len(again)


def _name(images: Images, position: int) -> str:
    key = int(images.keys[position])
    return f"key {key}" if key >= 0 else f"the image at byte {images.offsets[position]}"


def _check_overlap(reader: RecordReader, images: Images, other: Others, report: Report) -> None:
    """Finds images and identities of `other` that are in the set too."""
    names = read_label_map(reader.path.parent)
    if other.hashes:
        wanted = np.fromiter(other.hashes, np.int64, len(other.hashes))
        found = np.flatnonzero(np.isin(images.hashes, wanted))
        for position in found.tolist():
            label = int(images.classes[position])
            person = f" ({names[label]})" if names and 0 <= label < len(names) else ""
            report.add(
                "overlap",
                f"an image of {other.name} is in the set, so its person is too",
                f"{_name(images, position)}, class {label}{person}",
            )
    if other.people and names is None:
        report.add(
            "overlap", f"{other.name}: people cannot be compared without label_map.txt", note=True
        )
    for person in sorted(other.people & set(names or ())):
        report.add("overlap", f"a person of {other.name} is in the set", person)
    compared = report.facts.setdefault("compared_with", {})
    compared[other.name] = f"{len(other.hashes)} images, {len(other.people)} names"


def _verify(reader: RecordReader, index: RecordIndex, report: Report, num_threads: int) -> None:
    path = manifest_path(reader.path)
    count = 0
    try:
        with tqdm(total=len(index.keys), desc="manifest", unit=" records") as bar:
            for mismatch in verify_records(
                reader, index, path, num_threads=num_threads, progress=bar.update
            ):
                count += 1
                report.add(
                    "manifest",
                    "a record is not what was packed",
                    f"key {mismatch.key}: {mismatch.what}",
                )
    except RecordError as error:
        report.add("manifest", str(error))
        return
    report.facts["manifest"] = f"{len(index.keys)} records compared, {count} differ"
