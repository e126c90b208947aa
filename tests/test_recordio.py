"""Records and indexes read as MXNet wrote them, and damage is named, never passed on."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.datasets import DataError, RecordDataset
from data.index import image_lines, read_index, read_property
from data.recordio import (
    FIRST,
    MAGIC_BYTES,
    PART_HEADER,
    RECORD_HEADER,
    WHOLE,
    RecordError,
    RecordReader,
    class_of,
    frame_record,
    pack_range,
    pack_record,
    range_of,
    unpack_record,
)
from tests.helpers import GOLDEN
from tests.record_helpers import PAYLOADS, RecordWriter

GOLDEN_RECORDS = (
    "insightface_style",
    "im2rec_scalar_label",
    "im2rec_vector_label",
    "im2rec_first_key_1",
    "magic_inside",
)


def write_records(folder: Path, payloads: list[bytes], name: str = "train") -> Path:
    path = folder / f"{name}.rec"
    with RecordWriter(path, path.with_suffix(".idx")) as writer:
        for key, payload in enumerate(payloads):
            writer.write(key, payload)
    return path


def image_records(count: int) -> list[bytes]:
    """Payloads of `count` records with the bytes `image <i>` and label i."""
    return [pack_record(b"image %d" % i, i, i) for i in range(count)]


@pytest.mark.parametrize("name", GOLDEN_RECORDS)
def test_golden_records_read_as_the_manifest_says(name: str) -> None:
    folder = GOLDEN / "recordio"
    manifest = json.loads((folder / "manifest.json").read_text())["files"][name]
    source = RecordDataset(folder / f"{name}.rec")
    found = []
    for i in range(len(source)):
        encoded, label = source.read_encoded(i)
        found.append([int(source.keys[i]), label, hashlib.sha1(encoded).hexdigest()])
    assert found == manifest


@pytest.mark.parametrize("name", GOLDEN_RECORDS)
def test_writing_golden_records_again_gives_the_same_files(name: str, tmp_path: Path) -> None:
    golden = GOLDEN / "recordio" / f"{name}.rec"
    reader = RecordReader(golden)
    index = read_index(golden.with_suffix(".idx"), reader.size)
    ours = tmp_path / "ours.rec"
    with RecordWriter(ours, ours.with_suffix(".idx")) as writer:
        for key, offset in zip(*index, strict=True):
            writer.write(int(key), reader.read_at(int(offset), int(key)))
    assert ours.read_bytes() == golden.read_bytes()
    assert ours.with_suffix(".idx").read_bytes() == golden.with_suffix(".idx").read_bytes()


@pytest.mark.parametrize("name", GOLDEN_RECORDS)
def test_a_scan_finds_what_the_index_lists(name: str) -> None:
    golden = GOLDEN / "recordio" / f"{name}.rec"
    reader = RecordReader(golden)
    offsets = read_index(golden.with_suffix(".idx"), reader.size).offsets
    assert [place.offset for place in reader.scan()] == offsets.tolist()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(payloads=st.lists(PAYLOADS, min_size=1, max_size=5))
def test_any_payload_survives_writing_and_reading(
    payloads: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_records(tmp_path_factory.mktemp("any"), payloads)
    reader = RecordReader(path)
    index = read_index(path.with_suffix(".idx"), reader.size)
    assert index.keys.tolist() == list(range(len(payloads)))
    assert [reader.read_at(int(offset)) for offset in index.offsets] == payloads
    assert [place.payload_length for place in reader.scan()] == [len(p) for p in payloads]


def test_records_larger_than_one_read_survive(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(100_000)
    payloads = [noise, noise[:50_000] + MAGIC_BYTES + noise[50_000:], b""]
    reader = RecordReader(write_records(tmp_path, payloads))
    assert [reader.read_at(place.offset) for place in reader.scan()] == payloads


@pytest.mark.parametrize("label", [0.0, 7, (3.0, 4.0), (1,), tuple(range(10))])
def test_labels_and_ids_survive_packing(label: float | tuple[float, ...]) -> None:
    header, image = unpack_record(pack_record(b"bytes", label, 5, 2**63))
    assert header.labels.tolist() == list(np.atleast_1d(label))
    assert (header.id, header.id2, bytes(image)) == (5, 2**63, b"bytes")


def test_reading_only_the_header_gives_the_first_label(tmp_path: Path) -> None:
    magic_as_id = pack_record(b"", 4, int.from_bytes(MAGIC_BYTES, "little"))  # header in two parts
    reader = RecordReader(
        write_records(tmp_path, [pack_record(b"x" * 50, 3), pack_record(b"", (9, 8)), magic_as_id])
    )
    headers = [reader.read_header(place.offset) for place in reader.scan()]
    assert [float(header.labels[0]) for header in headers] == [3, 9, 4]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_byte_of_the_framing_is_refused_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    payloads = [*image_records(3), pack_record(MAGIC_BYTES * 2, 3)]
    path = write_records(tmp_path_factory.mktemp("flip"), payloads)
    original = path.read_bytes()
    offsets = read_index(path.with_suffix(".idx"), len(original)).offsets.tolist()
    record = data.draw(st.integers(0, len(offsets) - 1))
    at = offsets[record] + data.draw(st.integers(0, PART_HEADER.size - 1))
    damaged = bytearray(original)
    damaged[at] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    reader = RecordReader(path)
    for offset, end, payload in zip(offsets, [*offsets[1:], None], payloads, strict=True):
        try:
            read = reader.read_at(offset, end=end)
        except RecordError:
            continue
        # Padding cannot be told from payload: a length may grow into it.
        assert read.rstrip(b"\0") == payload.rstrip(b"\0")


@pytest.mark.parametrize(("parts", "damaged_part"), [(1, 0), (2, 0), (2, 1)])
def test_a_length_that_shrinks_within_its_word_is_refused(
    tmp_path: Path, parts: int, damaged_part: int
) -> None:
    payload = pack_record(MAGIC_BYTES * (parts - 1) + b"image 0", 3)
    path = write_records(tmp_path, [payload, pack_record(b"next", 4)])
    damaged = bytearray(path.read_bytes())
    at = damaged_part * (PART_HEADER.size + RECORD_HEADER.size)
    magic, word = PART_HEADER.unpack_from(damaged, at)
    PART_HEADER.pack_into(damaged, at, magic, word - 2)
    path.write_bytes(damaged)
    with pytest.raises(RecordError, match="the length is damaged"):
        RecordReader(path).read_at(0)


def test_a_length_that_grows_over_the_next_part_or_record_is_refused(tmp_path: Path) -> None:
    head = RECORD_HEADER.size
    parts = [pack_record(MAGIC_BYTES * 2 + b"tail", 3)]  # in parts of head, 0 and 4 bytes
    whole = [pack_record(b"four", 1), pack_record(b"next", 2), pack_record(b"last", 3)]
    for payloads, grown in (
        (parts, head + PART_HEADER.size),  # the first part swallows the empty middle one
        (whole, 2 * head + 4 + PART_HEADER.size + 4),  # the first record swallows the second
        (whole, 3 * head + 8 + 2 * PART_HEADER.size + 4),  # ... and the last, to the file's end
    ):
        path = write_records(tmp_path, payloads)
        damaged = bytearray(path.read_bytes())
        flag = int.from_bytes(damaged[4:8], "little") >> 29
        damaged[4:8] = (flag << 29 | grown).to_bytes(4, "little")
        path.write_bytes(damaged)
        for read in (
            lambda reader: reader.read_at(0),
            lambda reader: reader.read_at(0, end=reader.size),
            lambda reader: next(reader.scan()),
        ):
            with pytest.raises(RecordError, match=r"at byte 0: .* holds the magic"):
                read(RecordReader(path))


def test_every_truncation_is_an_error_that_names_the_offset(tmp_path: Path) -> None:
    path = write_records(tmp_path, [pack_record(b"only one image here", 0)])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(RecordError, match=r"train\.rec: record with key 7 at byte 0"):
            RecordReader(path).read_at(0, key=7)


def test_a_hostile_length_is_refused_without_allocating_it(tmp_path: Path) -> None:
    path = tmp_path / "hostile.rec"
    path.write_bytes(PART_HEADER.pack(0xCED7230A, (1 << 29) - 1) + b"short")
    tracemalloc.start()
    with pytest.raises(RecordError, match="536870911 bytes at byte 0 reaches past the end"):
        RecordReader(path).read_at(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_hostile_label_count_is_refused(tmp_path: Path) -> None:
    payload = struct.pack("<IfQQ", 0xFFFFFFFF, 0, 0, 0) + b"image"
    with pytest.raises(RecordError, match="4294967295 labels"):
        unpack_record(payload, "a.rec")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (frame_record(b"abcd")[1:] + b"\0", "expected the magic"),
        (PART_HEADER.pack(0xCED7230A, FIRST << 29 | 4) + b"abcd", "file ends at byte 12"),
        (PART_HEADER.pack(0xCED7230A, 2 << 29 | 4) + b"abcd", "continue flag 2"),
        (PART_HEADER.pack(0xCED7230A, 7 << 29 | 4) + b"abcd", "continue flag 7"),
        (frame_record(b"abcd") + b"junkjunk", "what follows it: expected the magic"),
        (PART_HEADER.pack(0xCED7230A, WHOLE << 29 | 0), None),
    ],
)
def test_framing_that_makes_no_sense_is_refused(
    content: bytes, message: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "odd.rec"
    path.write_bytes(content)
    if message is None:
        assert RecordReader(path).read_at(0) == b""
        return
    with pytest.raises(RecordError, match=message):
        RecordReader(path).read_at(0)


def test_a_record_may_not_reach_into_the_next_one_of_the_index(tmp_path: Path) -> None:
    path = write_records(tmp_path, [b"a" * 32, b"b" * 32])
    content = bytearray(path.read_bytes())
    content[4] = 72  # 32 + 8 + 32: the first record now ends exactly where the second does
    path.write_bytes(content)
    with pytest.raises(RecordError, match="holds the magic at byte 40"):
        RecordReader(path).read_at(0)
    with pytest.raises(RecordError, match="past byte 40, where the index starts the next record"):
        RecordReader(path).read_at(0, end=40)


@pytest.mark.parametrize("offset", [-4, 2, 40, 4096])
def test_an_offset_where_no_record_can_start_is_refused(offset: int, tmp_path: Path) -> None:
    reader = RecordReader(write_records(tmp_path, [b"a" * 32]))
    with pytest.raises(RecordError, match=f"at byte {offset}: no record can start there"):
        reader.read_at(offset)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("0\t0\n1\tx\n", 2),
        ("0\t0\n1\n", 2),
        ("0\t0\n1\t8\t9\n2\n", 2),
        ("0 0\n\n1 8\n", 2),
        ("0\t0\n-1\t8\n", 2),
        ("0\t0\n1\t99999999999999999999\n", 2),
        ("0\t0\n1\t8\n1\t16\n", 3),
        ("0\t0\n1\t6\n", 2),
        ("0\t0\n1\t4096\n", 2),
        ("\x80\x00 binary", 1),
    ],
)
def test_a_malformed_index_is_an_error_that_names_the_line(
    text: str, line: int, tmp_path: Path
) -> None:
    path = tmp_path / "train.idx"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecordError, match=rf"train\.idx, line {line}: "):
        read_index(path, rec_size=100)


@pytest.mark.parametrize("text", ["0\t0\n1\t8\n", "0\t0\r\n1\t8\r\n", "0 0\n1 8", "0\t0\n1\t8\n\n"])
def test_line_ends_and_blanks_do_not_matter(text: str, tmp_path: Path) -> None:
    path = tmp_path / "train.idx"
    path.write_bytes(text.encode())
    keys, offsets = read_index(path, rec_size=100)
    assert (keys.tolist(), offsets.tolist()) == ([0, 1], [0, 8])


def test_an_empty_index_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.idx").write_bytes(b"")
    with pytest.raises(RecordError, match="the index is empty"):
        read_index(tmp_path / "train.idx", 100)


def test_an_index_read_in_several_chunks_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.idx"
    path.write_text("".join(f"{i}\t{8 * i}\n" for i in range(1000)))
    monkeypatch.setattr("data.index._CHUNK_BYTES", 64)
    keys, offsets = read_index(path, rec_size=8000)
    assert keys.tolist() == list(range(1000))
    assert offsets.tolist() == list(range(0, 8000, 8))


def insightface_records(last_image: int, stated: int) -> list[bytes]:
    header = pack_record(b"", (stated, stated + 1))
    images = [pack_record(b"image", 0, key) for key in range(1, last_image + 1)]
    return [header, *images, pack_record(b"", (1, last_image + 1))]


def test_header_and_identity_records_are_no_images(tmp_path: Path) -> None:
    reader = RecordReader(write_records(tmp_path, insightface_records(5, stated=6)))
    index = read_index(tmp_path / "train.idx", reader.size)
    assert index.keys[image_lines(index, reader)].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("stated", [4, 5, 6, 7, 8])
def test_a_count_rounded_by_float32_is_put_right(
    stated: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.index._EXACT_FLOAT32", 3)
    reader = RecordReader(write_records(tmp_path, insightface_records(5, stated)))
    index = read_index(tmp_path / "train.idx", reader.size)
    assert index.keys[image_lines(index, reader)].tolist() == [1, 2, 3, 4, 5]


def test_an_index_that_lacks_promised_images_is_an_error(tmp_path: Path) -> None:
    path = write_records(tmp_path, insightface_records(5, stated=9))
    with pytest.raises(RecordError, match="promises the images 1 to 8, but the index lists 6"):
        RecordDataset(path)


def test_two_labels_per_image_are_not_mistaken_for_a_header_record(tmp_path: Path) -> None:
    path = write_records(tmp_path, [pack_record(b"image", (2, 3)) for _ in range(4)])
    assert len(RecordDataset(path)) == 4


@pytest.mark.parametrize("text", ["", "10,112", "a,112,112", "0,112,112", "-1,2,3", "9" * 300])
def test_a_malformed_property_file_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "property").write_text(text)
    with pytest.raises(RecordError, match="num_classes,height,width"):
        read_property(tmp_path / "property")


@pytest.mark.parametrize(
    "read",
    [RecordReader, lambda path: read_index(path, 100), read_property],
    ids=["rec", "idx", "p"],
)
def test_a_file_the_system_does_not_let_us_read_is_named_with_the_reason(
    read: Callable[[Path], object], tmp_path: Path
) -> None:
    (tmp_path / "file").symlink_to("file")  # a circle, which root cannot read either
    with pytest.raises(RecordError, match=r"file: cannot be read \(Too many levels.*another path"):
        read(tmp_path / "file")


def test_an_error_of_the_disk_while_reading_names_the_file(tmp_path: Path) -> None:
    reader = RecordReader(write_records(tmp_path, image_records(3)))
    reader.close()  # stands for the disk that fails
    with pytest.raises(RecordError, match=r"train\.rec: cannot be read \(Bad file descriptor\)"):
        reader.read_at(0)


WIDE = [2**24 - 1, 2**24, 2**24 + 1, 2**24 + 2, 33_554_433, 42_474_557, 2**31 + 1, 2**40 + 1]


@pytest.mark.parametrize("label", WIDE)
def test_a_class_beyond_float32_is_exact_and_still_a_rounded_label(label: int) -> None:
    for payload in (pack_record(b"x", label, 5), pack_record(b"x", (label, 2.5), 5)):
        header, image = unpack_record(payload)
        assert class_of(header) == label
        assert (float(header.labels[0]), header.id) == (float(np.float32(label)), 5)
        assert header.id2 == (label if label > 2**24 else 0)
        assert bytes(image) == b"x"
    assert range_of(unpack_record(pack_range(label, label + 7, 5))[0]) == (label, label + 7)


def test_a_wide_label_without_its_exact_class_is_refused(tmp_path: Path) -> None:
    rounded = float(np.float32(2**24 + 2))
    for name, payload in {
        "no_id2": pack_record(b"x", rounded),
        "other_id2": pack_record(b"x", rounded, 0, 2**24 + 5),
    }.items():
        path = write_records(tmp_path, [payload], name)
        with pytest.raises(DataError, match=r"record with key 0 .* exact only up to 16777216"):
            RecordDataset(path, num_classes=2**25).read_encoded(0)
    with pytest.raises(RecordError, match="takes the place of id2"):
        pack_record(b"x", 2**24 + 2, 0, 7)


def test_wide_classes_are_read_and_counted(tmp_path: Path) -> None:
    path = write_records(tmp_path, [pack_record(b"x", label) for label in WIDE[:6]])
    source = RecordDataset(path)
    assert [source.read_encoded(i)[1] for i in range(6)] == WIDE[:6]
    assert source.num_classes == 42_474_558
