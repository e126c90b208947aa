"""What the reader cannot see, the manifest can: every record that changed is named, no other is."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.index import read_index
from data.recordio import PART_HEADER, RECORD_HEADER, RecordError, RecordReader
from data.tools.manifest import Entry, ManifestLines, MultisetDigest, read_manifest, verify_records
from data.tools.record_writer import IM2REC, INSIGHTFACE, RecordSetWriter
from tests.record_helpers import PAYLOADS

NUM_IMAGES = 7
WIDE = 2**24 + 5


@pytest.fixture(scope="module", params=[INSIGHTFACE, IM2REC])
def intact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set: payloads with padding, one in several parts, one wide class, identities."""
    out = tmp_path_factory.mktemp(request.param)
    with RecordSetWriter(out, 112, style=request.param) as writer:
        for i in range(NUM_IMAGES):
            content = (b"image number %d" % i) + b"x" * i
            if i == 3:
                content += b"\x0a\x23\xd7\xce" * 3
            writer.add(content, WIDE if i == NUM_IMAGES - 1 and request.param == IM2REC else i // 2)
        writer.finish()
    return out


def payloads_of(path: Path) -> dict[int, bytes | None]:
    """Payload by key as the reader gives it, None where it refuses."""
    reader = RecordReader(path)
    index = read_index(path.with_suffix(".idx"), reader.size)
    ends = [*index.offsets.tolist()[1:], reader.size]
    if any(a >= b for a, b in pairwise([-1, *index.offsets.tolist()])):
        ends = [None] * len(ends)  # only neighbors in the file bound each other
    found: dict[int, bytes | None] = {}
    for key, offset, end in zip(index.keys.tolist(), index.offsets.tolist(), ends, strict=True):
        try:
            found[key] = reader.read_at(offset, key, end)
        except RecordError:
            found[key] = None
    return found


def named_by_verify(path: Path) -> dict[int, str]:
    reader = RecordReader(path)
    index = read_index(path.with_suffix(".idx"), reader.size)
    manifest = path.with_suffix(".manifest")
    return dict(verify_records(reader, index, manifest, num_threads=0))


@pytest.fixture
def copy(intact: Path, tmp_path: Path) -> Path:
    for path in intact.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / "train.rec"


def test_an_intact_set_is_verified(copy: Path) -> None:
    assert named_by_verify(copy) == {}


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_exactly_the_records_whose_bytes_changed_are_named(
    data: st.DataObject, intact: Path, tmp_path: Path
) -> None:
    before = payloads_of(intact / "train.rec")
    mutated = bytearray((intact / "train.rec").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        mutated[at] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "train.rec"
    path.write_bytes(mutated)
    for name in ("train.idx", "train.manifest"):
        (tmp_path / name).write_bytes((intact / name).read_bytes())
    after = payloads_of(path)
    assert named_by_verify(path).keys() == {key for key in before if after[key] != before[key]}


def place(path: Path, key: int) -> int:
    """Byte offset of a record."""
    index = read_index(path.with_suffix(".idx"), path.stat().st_size)
    return int(index.offsets[index.keys.tolist().index(key)])


def test_a_label_that_became_another_valid_one_is_named_with_both_classes(copy: Path) -> None:
    content = bytearray(copy.read_bytes())
    at = place(copy, 3) + PART_HEADER.size + 4
    content[at : at + 4] = np.float32(0).tobytes()
    copy.write_bytes(content)
    assert payloads_of(copy)[3] is not None  # a reader sees nothing
    assert list(named_by_verify(copy)) == [3]
    assert "class 0, packed was 1" in named_by_verify(copy)[3]


def test_a_flip_inside_an_image_is_named(copy: Path) -> None:
    content = bytearray(copy.read_bytes())
    content[place(copy, 2) + PART_HEADER.size + RECORD_HEADER.size + 4] ^= 1
    copy.write_bytes(content)
    assert list(named_by_verify(copy)) == [2]
    assert "its bytes differ" in named_by_verify(copy)[2]


def test_lengthening_a_record_within_its_padding_is_named(copy: Path) -> None:
    content = bytearray(copy.read_bytes())
    key = next(k for k, p in payloads_of(copy).items() if p and len(p) % 4 and k not in (0, 3))
    at = place(copy, key) + 4
    content[at] += 1
    copy.write_bytes(content)
    longer = payloads_of(copy)[key]
    assert longer is not None  # a reader sees nothing
    assert list(named_by_verify(copy)) == [key]
    assert f"{len(longer)} bytes, packed were {len(longer) - 1}" in named_by_verify(copy)[key]


def test_missing_and_added_keys_are_named(copy: Path) -> None:
    path_idx = copy.with_suffix(".idx")
    lines = path_idx.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace(lines[2].split("\t")[0], "900", 1)
    path_idx.write_text("".join(lines))
    named = named_by_verify(copy)
    assert named == {
        2: "missing: the index does not list it",
        900: "added: the manifest does not list it",
    }


def test_two_swapped_records_of_the_index_are_both_named(copy: Path) -> None:
    path_idx = copy.with_suffix(".idx")
    keys, offsets = zip(*(line.split() for line in path_idx.read_text().splitlines()), strict=True)
    swapped = [offsets[0], offsets[2], offsets[1], *offsets[3:]]
    path_idx.write_text("".join(f"{k}\t{o}\n" for k, o in zip(keys, swapped, strict=True)))
    assert sorted(named_by_verify(copy)) == [1, 2]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_manifest_is_an_error_and_not_a_false_alarm(
    data: st.DataObject, intact: Path, tmp_path: Path
) -> None:
    content = bytearray((intact / "train.manifest").read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[at:]
    path = tmp_path / "train.manifest"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=r"train\.manifest, line \d+: "):
        list(read_manifest(path))


ENTRIES = st.lists(
    st.builds(
        Entry,
        st.integers(0, 10**18 - 1),
        st.none() | st.integers(0, 10**18 - 1),
        st.integers(0, 2**29),
        st.binary(min_size=20, max_size=20),
    ),
    max_size=5,
)


@given(entries=ENTRIES)
def test_entries_survive_writing_and_reading(
    entries: list[Entry], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("m") / "train.manifest"
    lines = ManifestLines()
    path.write_bytes(b"".join([lines.first(), *map(lines.line, entries), lines.last()]))
    assert list(read_manifest(path)) == entries


@given(images=st.lists(st.tuples(st.integers(0, 3), PAYLOADS), max_size=6), data=st.data())
def test_the_multiset_digest_ignores_order_and_nothing_else(
    images: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    def digest(items: list[tuple[int, bytes]]) -> MultisetDigest:
        result = MultisetDigest()
        for class_id, image in items:
            result.add(class_id, image)
        return result

    assert digest(images) == digest(data.draw(st.permutations(images)))
    other = data.draw(st.lists(st.tuples(st.integers(0, 3), PAYLOADS), max_size=6))
    assert (digest(images) == digest(other)) == (sorted(images) == sorted(other))


def mutations(size: int, rng: np.random.Generator, count: int) -> Iterator[tuple[int, int]]:
    yield from zip(
        rng.integers(0, size, count).tolist(), rng.integers(0, 8, count).tolist(), strict=True
    )


@pytest.mark.slow
def test_20000_mutated_files_are_named_exactly(intact: Path, tmp_path: Path) -> None:
    """Verify names whatever changed, or the index reader refuses it, and nothing else is named."""
    before = payloads_of(intact / "train.rec")
    contents = {name: (intact / name).read_bytes() for name in ("train.rec", "train.idx")}
    (tmp_path / "train.manifest").write_bytes((intact / "train.manifest").read_bytes())
    path = tmp_path / "train.rec"
    rng = np.random.default_rng(0)
    num_named = num_refused = 0
    for name, count in (("train.rec", 7000), ("train.idx", 3000)):
        for at, bit in mutations(len(contents[name]), rng, count):  # x 2 styles: 20,000 files
            mutated = bytearray(contents[name])
            mutated[at] ^= 1 << bit
            for other in contents:
                (tmp_path / other).write_bytes(mutated if other == name else contents[other])
            try:
                after, named = payloads_of(path), named_by_verify(path)
            except RecordError:
                assert name == "train.idx"
                num_refused += 1
                continue
            keys = before.keys() | after.keys()
            changed = {key for key in keys if after.get(key) != before.get(key)}
            assert named.keys() >= changed
            assert all(key in keys for key in named)
            if name == "train.rec":
                assert named.keys() == changed
            num_named += bool(named)
    assert num_named > 5000
    assert num_refused > 1000
