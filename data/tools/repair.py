"""Repairs a record set into new files: an index by scanning, a set of all readable images."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tqdm import tqdm

from data.class_names import read_label_map
from data.datasets import DataError, MissingDataError, check_label
from data.decode import decode_image, image_size
from data.index import is_header_record, read_property
from data.recordio import (
    RECORD_HEADER,
    RecordError,
    RecordPlace,
    RecordReader,
    class_of,
    unpack_record,
)
from data.tools.image_records import rec_path
from data.tools.record_writer import IM2REC, INSIGHTFACE, RecordSetWriter
from data.tools.report import Report
from data.tools.scan import Damage, rebuild_index, scan_on, write_index
from utils.errors import UserError


def fix(data: Path, out: Path, *, force: bool = False) -> tuple[Report, int]:
    """Writes what can be read as a new set.

    It keeps all images that decode and have a class, in the order of the file, whether the index
    lists them or not. Index, keys, header record, identity records, property and manifest are newly
    made. Labels, duplicates and gaps stay as they are, because their repair would be a guess.

    Args:
        data: Folder with train.rec, or a .rec file.
        out: Folder of the new set.
        force: Whether an existing set in `out` is replaced.

    Returns:
        A report of what was left out, and the number of images.

    Raises:
        MissingDataError: The .rec does not exist.
        DataError: `out` is the set's own folder, or no image can be read.
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
    if isinstance(first, RecordPlace) and first.payload_length >= RECORD_HEADER.size:
        has_header = is_header_record(reader.read_header(first.offset), first.payload_length)
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
                except UserError as error:
                    report.add("images", "left out", str(error))
                    continue
                writer.add_payload(payload, label)
        if not writer.num_images:
            raise DataError(f"{path}: no image can be read; nothing was written")
        writer.finish(read_label_map(path.parent), num_classes)
    return report, writer.num_images


def _usual_size(reader: RecordReader, sample: int = 1000) -> tuple[int, int]:
    """Returns the most common height and width of the first images, in pixels, or (112, 112)."""
    sizes: dict[tuple[int, int], int] = {}
    for number, place in enumerate(scan_on(reader)):
        if number == sample:
            break
        if isinstance(place, Damage):
            continue
        try:
            image = unpack_record(reader.read_at(place.offset, end=place.end))[1]
            size = image_size(image, "image")
        except UserError:
            continue
        sizes[size] = sizes.get(size, 0) + 1
    return max(sizes, key=lambda size: sizes[size], default=(112, 112))


def rebuild(data: Path, out: Path | None) -> tuple[int, list[Damage]]:
    """Writes an index made by scanning.

    Args:
        data: Folder with train.rec, or a .rec file.
        out: Path of the index; None means beside the .rec.

    Returns:
        The number of lines of the index, and what could not be read.

    Raises:
        MissingDataError: The .rec does not exist.
        DataError: The index exists, or no record can be read.
    """
    path = rec_path(data)
    if not path.is_file():
        raise MissingDataError(f"{path} does not exist; give a folder with train.rec, or a .rec")
    target = out or path.with_suffix(".idx")
    if target.exists():
        raise DataError(
            f"{target} exists, and nothing is changed in place: move it away, or give "
            "another file with --out"
        )
    reader = RecordReader(path)
    with tqdm(total=reader.size, desc="scanning", unit="B", unit_scale=True) as bar:
        index, damages = rebuild_index(reader, bar.update)
    if not len(index.keys):
        raise DataError(f"{path}: no record can be read; no index was written")
    write_index(target, index)
    return len(index.keys), damages
