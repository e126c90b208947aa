"""Examine a record set: is it what it should be, and what is wrong?

    python scripts/doctor.py DATA                      everything; images: a sample of 10,000
    python scripts/doctor.py DATA --decode all         every image decoded
    python scripts/doctor.py DATA --against lfw.bin    also: is this verification set in it?
    python scripts/doctor.py DATA --verify             every record against train.manifest
    python scripts/doctor.py DATA --rebuild-index      train.idx by scanning train.rec
    python scripts/doctor.py DATA --fix OUT            what can be read, as a new set

Exit code 0: healthy; 1: something is wrong (it is named); 2: the command cannot be carried out.
`--allow CHECK` makes a check's findings notes, for what you know and accept: a part of a larger set
has gaps between its labels, say. Nothing is ever changed in place.

Memory: about 120 bytes per image (5 GB for 42 million), and nothing else that grows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.decode import ImageError, decode_image, image_size
from data.files import list_some
from data.image_records import read_label_map, rec_path
from data.index import RecordIndex, is_header_record, read_index, read_property
from data.manifest import manifest_path, verify_records
from data.order import shuffled_indices
from data.pairs import read_pairs
from data.prefetch import OrderedPrefetch
from data.record_set import IM2REC, INSIGHTFACE, RecordSetWriter
from data.recordio import RecordError, RecordReader, class_of, range_of, unpack_record
from data.salvage import Damage, rebuild_index, scan_on, write_index
from data.sources import IMAGE_SUFFIXES, DataError, MissingDataError, check_label
from eval.verification import VerificationSetError, load_verification_set

PROBLEM, NOTE = "problem", "note"
CHECKS = (
    "index", "records", "header", "identities", "labels", "images", "sizes", "channels", "gaps",
    "singletons", "duplicates", "conflicts", "overlap", "property", "manifest",
)  # fmt: skip
_KEPT = 1000  # examples kept of a finding; the rest is counted
_CHUNK = 64  # images per task handed to a thread


@dataclass
class Finding:
    """What a check found: how often, and where at first."""

    check: str
    severity: str
    message: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < _KEPT or self.check == "manifest":  # verify names every record
            self.examples.append(example)


class Report:
    """Facts about a set and what is wrong with it."""

    def __init__(self, dataset: str, allowed: Sequence[str]) -> None:
        self.dataset = dataset
        self.allowed = frozenset(allowed)
        self.facts: dict[str, Any] = {}
        self._findings: dict[tuple[str, str], Finding] = {}

    def add(self, check: str, message: str, example: str | None = None, note: bool = False) -> None:
        """One more case of what `message` says."""
        assert check in CHECKS
        severity = NOTE if note or check in self.allowed else PROBLEM
        finding = self._findings.setdefault((check, message), Finding(check, severity, message))
        finding.add(example or "")

    @property
    def findings(self) -> list[Finding]:
        """Problems first, each kind in the order found."""
        return sorted(self._findings.values(), key=lambda finding: finding.severity == NOTE)

    @property
    def healthy(self) -> bool:
        """Whether nothing but notes was found."""
        return all(finding.severity == NOTE for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """What `--json` writes."""
        return {
            "dataset": self.dataset,
            "healthy": self.healthy,
            "facts": self.facts,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def as_text(self) -> str:
        """What people read."""
        lines = [self.dataset]
        lines += [f"  {name.replace('_', ' ')}: {value}" for name, value in self.facts.items()]
        for finding in self.findings:
            times = f" ({finding.count} times)" if finding.count > 1 else ""
            lines.append(f"{finding.severity.upper()} {finding.check}: {finding.message}{times}")
            shown = [example for example in finding.examples if example]
            limit = len(shown) if finding.check == "manifest" else 10
            lines += [f"    {line}" for line in list_some(shown, limit).splitlines()]
        lines.append("healthy" if self.healthy else "NOT healthy: see the problems above")
        return "\n".join(lines)


class Images(NamedTuple):
    """The images of a set in the order of the file; their records lie from offsets to ends.

    keys: -1 where the index does not list them. classes: -1 where the label is none.
    hashes: the first 8 bytes of the sha1 of the encoded image. All int64 [n].
    """

    keys: np.ndarray
    offsets: np.ndarray
    ends: np.ndarray
    classes: np.ndarray
    hashes: np.ndarray


class Described(NamedTuple):
    """The records that only describe others, in the order of the file: their keys (int64 [m], -1
    where the index does not list them) and the two numbers they state (float64 [m])."""

    keys: np.ndarray
    first: np.ndarray
    end: np.ndarray


def examine(
    data: Path,
    *,
    num_decoded: int | None = 10_000,
    against: Sequence[Path] = (),
    allowed: Sequence[str] = (),
    histogram: Path | None = None,
    num_threads: int = 2,
) -> Report:
    """Every check. num_decoded: how many images are decoded (None: all), drawn at random."""
    report, reader, index = _open(data, allowed)
    if index is not None and manifest_path(reader.path).is_file():
        _verify(reader, index, report, num_threads)  # first: it needs memory of its own
    else:
        report.facts["manifest"] = "none to compare with (scripts/pack.py writes one)"
    images, described = _read_all(reader, index, report)
    _check_header(index, images, described, report)
    _check_property(reader, images, report)
    sizes = _check_images(reader, images, num_decoded, num_threads, report)
    _check_sizes(reader, images, sizes, report)
    counts = _check_classes(images, report)
    if histogram is not None and len(counts):
        plot_histogram(counts, histogram, Path(report.dataset).parent.name)
        report.facts["class_histogram"] = str(histogram)
    _check_duplicates(reader, images, report)
    for other in against:
        _check_overlap(reader, images, other, report)
    return report


def verify(data: Path, *, allowed: Sequence[str] = (), num_threads: int = 2) -> Report:
    """Only the comparison with the manifest, which has to be there."""
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
    """The report to fill, the records, and the index where it can be read."""
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
    """Scan the file once: the records against the index, every header and every hash."""
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
                values = (key, place.offset, end, _class(report, header, where), _hash(image))
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


def _hash(content: bytes | memoryview) -> int:
    return int.from_bytes(hashlib.sha1(content).digest()[:8], "little", signed=True)


def _check_header(
    index: RecordIndex | None, images: Images, described: Described, report: Report
) -> None:
    """The header record against the images, the records of identities against the labels."""
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
    """Decode images; returns {(height, width): positions}, each list cut after some."""
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
                found.append((position, (height, width), _is_grey(pixels), ""))
            except ImageError as error:
                found.append((position, None, False, str(error)))
        return found

    sizes: dict[tuple[int, int], list[int]] = {}
    num_grey = 0
    chunks = range(-(-count // _CHUNK))
    running = OrderedPrefetch(look, chunks, num_threads if len(chunks) > 1 else 0)
    try:
        with tqdm(total=count, desc="images", unit=" images") as bar:
            for results in running:
                for position, size, grey, error in results:
                    if size is None:
                        report.add("images", "cannot be decoded", error)
                    else:
                        sizes.setdefault(size, []).append(position)
                        num_grey += grey
                bar.update(len(results))
    finally:
        running.close()
    report.facts["images_decoded"] = count if count < total else f"all {count}"
    if num_grey:
        report.add("channels", f"{num_grey} of {count} images are grey", note=True)
    return sizes


def _is_grey(pixels: np.ndarray) -> bool:
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
    """Images per class, of the classes that have any: int64 [classes]."""
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


def _check_duplicates(reader: RecordReader, images: Images, report: Report) -> None:
    """Images with the same content: within a class, and under several classes."""
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


def _check_overlap(reader: RecordReader, images: Images, other: Path, report: Report) -> None:
    """Images and people of `other` (.bin, pairs file or folder) that are in the set too."""
    names = read_label_map(reader.path.parent)
    hashes, people = _content_of(other)
    if hashes:
        wanted = np.unique(np.fromiter(hashes, np.int64, len(hashes)))
        found = np.flatnonzero(np.isin(images.hashes, wanted))
        for position in found.tolist():
            label = int(images.classes[position])
            person = f" ({names[label]})" if names and 0 <= label < len(names) else ""
            report.add("overlap", f"an image of {other} is in the set, so its person is too",
                       f"{_name(images, position)}, class {label}{person}")  # fmt: skip
    if people and names is None:
        report.add(
            "overlap", f"{other}: people cannot be compared without label_map.txt", note=True
        )
    for person in sorted(people & set(names or ())):
        report.add("overlap", f"a person of {other} is in the set", person)
    compared = report.facts.setdefault("compared_with", {})
    compared[str(other)] = f"{len(hashes)} images, {len(people)} names"


def _content_of(other: Path) -> tuple[set[int], set[str]]:
    """Hashes of the images and names of the people of a .bin, a pairs file or a folder."""
    if other.suffix == ".bin":
        encoded = load_verification_set(other).images
        return {_hash(image) for image in encoded if isinstance(image, bytes)}, set()
    if other.is_dir():
        files = [p for p in sorted(other.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
        hashes = {_hash(path.read_bytes()) for path in tqdm(files, desc=other.name)}
        return hashes, {path.parent.name for path in files if path.parent != other}
    pairs = read_pairs(other)
    return set(), {name for pair in pairs for name, _ in (pair.first, pair.second)}


def _verify(reader: RecordReader, index: RecordIndex, report: Report, num_threads: int) -> None:
    path = manifest_path(reader.path)
    count = 0
    try:
        with tqdm(total=len(index.keys), desc="manifest", unit=" records") as bar:
            for mismatch in verify_records(
                reader, index, path, num_threads=num_threads, progress=bar.update
            ):
                count += 1
                report.add("manifest", "a record is not what was packed",
                           f"key {mismatch.key}: {mismatch.what}")  # fmt: skip
    except RecordError as error:
        report.add("manifest", str(error))
        return
    report.facts["manifest"] = f"{len(index.keys)} records compared, {count} differ"


def plot_histogram(counts: np.ndarray, path: Path, title: str) -> None:
    """Images per class as a PNG. counts: int64 [classes], each 1 or more."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    edges = np.unique(np.geomspace(1, counts.max() + 1, 41).round())
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.hist(
        counts, bins=(edges - 0.5).tolist(), color="#4878a8", edgecolor="white", linewidth=0.5
    )
    median = float(np.median(counts))
    axis.axvline(median, color="#c44e52", linestyle="--", label=f"median {median:g}")
    axis.set(
        xscale="log", yscale="log", xlabel="images of a class", ylabel="classes",
        title=f"{title}: {counts.sum():,} images of {len(counts):,} classes, "
        f"{(counts == 1).sum():,} with one image",
    )  # fmt: skip
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_ylim(bottom=0.7)
    axis.grid(alpha=0.3)
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    figure.savefig(aside, format="png", dpi=120)
    plt.close(figure)
    aside.replace(path)


def fix(data: Path, out: Path, *, force: bool = False) -> tuple[Report, int]:
    """Write what can be read as a new set; returns what was left out or mended, and the count.

    Kept are all images that decode and have a class, in the order of the file, listed by the index
    or not. Made anew are index, keys, header record, identity records, property and manifest.
    Labels, duplicates and gaps stay as they are: what to do about them is not ours to guess.
    """
    path = rec_path(data)
    if not path.is_file():
        raise MissingDataError(f"{path} does not exist; give a folder with train.rec, or a .rec")
    if out.resolve() == path.parent.resolve():
        raise DataError(f"{out}: a set is never mended in place; give another folder")
    report = Report(str(path), ())
    reader = RecordReader(path)
    has_header = False
    num_classes = 0
    path_property = path.with_name("property")
    if path_property.is_file():
        try:
            num_classes = read_property(path_property).num_classes
        except RecordError as error:
            report.add("property", str(error))
    first = next(scan_on(reader), None)
    if first is not None and not isinstance(first, Damage):
        payload = reader.read_at(first.offset, end=first.end)
        has_header = is_header_record(unpack_record(payload)[0], len(payload))
    style = INSIGHTFACE if has_header else IM2REC
    size = _usual_size(reader)
    with RecordSetWriter(out, size, force, style=style) as writer:
        with tqdm(total=reader.size, unit="B", unit_scale=True) as bar:
            for place in scan_on(reader):
                bar.update(place.end - place.offset)
                if isinstance(place, Damage):
                    report.add("records", "left out: damaged", place.error)
                    continue
                where = reader.where(place.offset)
                payload = reader.read_at(place.offset, end=place.end)
                try:
                    header, image = unpack_record(payload, where)
                    if is_header_record(header, len(payload)):
                        continue
                    label = check_label(class_of(header), None, partial(str, where))
                    decode_image(image, where)
                except (RecordError, DataError, ImageError) as error:
                    report.add("images", "left out", str(error))
                    continue
                writer.add_payload(payload, label)
        if not writer.num_images:
            raise DataError(f"{path}: no image can be read; nothing was written")
        writer.finish(read_label_map(path.parent), num_classes)
    return report, writer.num_images


def _usual_size(reader: RecordReader, sample: int = 1000) -> tuple[int, int]:
    """The most common height and width of the first images, in pixels; 112 where none has any."""
    sizes: dict[tuple[int, int], int] = {}
    for number, place in enumerate(scan_on(reader)):
        if number == sample:
            break
        if isinstance(place, Damage):
            continue
        try:
            image = unpack_record(reader.read_at(place.offset, end=place.end))[1]
            size = image_size(image, "image")
        except (RecordError, ImageError):
            continue
        sizes[size] = sizes.get(size, 0) + 1
    return max(sizes, key=lambda size: sizes[size], default=(112, 112))


def rebuild(data: Path, out: Path | None) -> tuple[int, list[Damage]]:
    """Write an index made by scanning; returns its lines and what could not be read."""
    path = rec_path(data)
    if not path.is_file():
        raise MissingDataError(f"{path} does not exist; give a folder with train.rec, or a .rec")
    target = out or path.with_suffix(".idx")
    if target.exists():
        raise DataError(f"{target} exists, and nothing is changed in place: move it away, or give "
                        "another file with --out")  # fmt: skip
    reader = RecordReader(path)
    with tqdm(total=reader.size, desc="scanning", unit="B", unit_scale=True) as bar:
        index, damages = rebuild_index(reader, bar.update)
    if not len(index.keys):
        raise DataError(f"{path}: no record can be read; no index was written")
    write_index(target, index)
    return len(index.keys), damages


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="doctor.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", nargs="?", help="folder with train.rec, or a .rec")
    add("--decode", default="10000", metavar="N|all", help="images to decode (default 10000)")
    add("--against", type=Path, action="append", default=[], metavar="SET",
        help="a .bin, a pairs file or a folder that must not be in the set; repeats")  # fmt: skip
    add("--allow", action="append", default=[], choices=CHECKS, metavar="CHECK",
        help=f"findings to accept: {', '.join(CHECKS)}")  # fmt: skip
    add("--histogram", type=Path, metavar="PNG",
        help="images per class (default: NAME_classes.png in the current folder)")  # fmt: skip
    add("--json", nargs="?", const="-", metavar="FILE", help="the report as JSON (-: to stdout)")
    add("--verify", action="store_true", help="only compare with train.manifest")
    add("--rebuild-index", action="store_true", help="write an index by scanning the records")
    add("--fix", type=Path, metavar="OUT", help="write what can be read to a new folder")
    add("--out", type=Path, help="of --rebuild-index: the .idx to write")
    add("--force", action="store_true", help="with --fix: replace the set in OUT")
    add("--num-thread", type=int, default=2, metavar="N", help="threads (default 2)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1, 2, or 130 for Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.data is None and args.json not in (None, "-"):  # doctor.py --json DATA
        args.data, args.json = Path(args.json), "-"
    if args.data is None:
        parser.error("DATA is missing: a folder with train.rec, or a .rec")
    if args.decode != "all" and not args.decode.isdigit():
        parser.error(f"--decode {args.decode}: allowed are a number and all")
    try:
        return _run(args)
    except (DataError, RecordError, VerificationSetError, OSError) as error:
        print(f"doctor.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("doctor.py: stopped; nothing was written", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    if args.rebuild_index:
        count, damages = rebuild(args.data, args.out)
        print(f"{count} records in the index, {len(damages)} damaged places passed over")
        print("\n".join(damage.error for damage in damages))
        return 1 if damages else 0
    if args.fix is not None:
        report, count = fix(args.data, args.fix, force=args.force)
        report.facts["written"] = f"{count} images to {args.fix}"
    elif args.verify:
        report = verify(args.data, allowed=args.allow, num_threads=args.num_thread)
    else:
        path = rec_path(args.data).resolve()
        report = examine(
            args.data,
            num_decoded=None if args.decode == "all" else int(args.decode),
            against=args.against,
            allowed=args.allow,
            histogram=args.histogram or Path(f"{path.parent.name}_classes.png"),
            num_threads=args.num_thread,
        )
    text = json.dumps(report.as_json(), indent=1)
    if args.json == "-":
        print(text)
    else:
        if args.json:
            Path(args.json).write_text(text + "\n")
        print(report.as_text())
    return 0 if report.healthy else 1


if __name__ == "__main__":
    sys.exit(main())
