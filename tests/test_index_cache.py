"""A large index is parsed once, and what is mapped afterwards is what was parsed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import cache
from data.cache import Cached, open_or_build, stamp_of
from data.datasets import RecordDataset
from data.index import open_index
from data.recordio import RecordError, RecordReader, pack_range, pack_record
from tests.record_helpers import RecordWriter


@pytest.fixture(autouse=True)
def always_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small sets are cached too, and nobody's own cache folder is touched."""
    monkeypatch.setattr("data.index.CACHE_FROM_BYTES", 0)
    monkeypatch.setattr("data.datasets._KEEP_LABELS_FROM", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


def write_set(folder: Path, count: int, first_key: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    with RecordWriter(folder / "train.rec", folder / "train.idx") as writer:
        for i in range(count):
            writer.write(first_key + i, pack_record(b"image %d" % i, i % 7, i))
    return folder


def no_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr("data.index.read_index", fail)


def contents(source: RecordDataset) -> list[tuple[bytes, int]]:
    return [(bytes(e), label) for e, label in map(source.read_encoded, range(len(source)))]


def test_the_second_opening_parses_nothing_and_reads_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_set(tmp_path / "set", 50)
    first = RecordDataset(root)
    assert (root / "train.idx.cache").is_file()
    labels = first.labels()
    assert (root / "train.rec.labels.cache").is_file()
    no_parsing(monkeypatch)
    again = RecordDataset(root)
    assert contents(again) == contents(first)
    assert np.array_equal(again.labels(), labels)
    assert again.keys.tolist() == list(range(50))
    assert len(again.offsets) == 50


def test_consecutive_keys_are_not_stored_and_others_are(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", 500, first_key=7)
    source = RecordDataset(root)
    assert (root / "train.idx.cache").stat().st_size == 4096 + 8 * 501
    assert source.keys.tolist() == list(range(7, 507))
    lines = (root / "train.idx").read_text().splitlines()
    (root / "train.idx").write_text("\n".join([*lines[:100], *lines[101:]]) + "\n")
    shorter = RecordDataset(root)
    assert (root / "train.idx.cache").stat().st_size == 4096 + 8 * 500 + 8 * 499
    assert shorter.keys.tolist() == [*range(7, 107), *range(108, 507)]
    assert shorter.find("108") == 100


@pytest.mark.parametrize("changed", ["train.rec", "train.idx"])
def test_a_changed_file_makes_the_cache_anew(tmp_path: Path, changed: str) -> None:
    root = write_set(tmp_path / "set", 20)
    RecordDataset(root)
    before = (root / "train.idx.cache").stat().st_ino
    write_set(root, 25)
    assert len(RecordDataset(root)) == 25
    assert (root / "train.idx.cache").stat().st_ino != before
    stat = (root / changed).stat()
    os.utime(root / changed, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    before = (root / "train.idx.cache").stat().st_ino
    RecordDataset(root)
    assert (root / "train.idx.cache").stat().st_ino != before


def refuse_below(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """As on read-only media; permissions would not stop root."""
    really = cache.tempfile.mkstemp

    def mkstemp(dir: Path, **kwargs):
        if any(folder == dir or folder in dir.parents for folder in folders):
            raise OSError(30, "Read-only file system")
        return really(dir=dir, prefix=kwargs["prefix"])

    monkeypatch.setattr(cache.tempfile, "mkstemp", mkstemp)


def test_read_only_records_are_cached_in_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_set(tmp_path / "set", 30)
    refuse_below(monkeypatch, root)
    first = contents(RecordDataset(root))
    assert len(list((tmp_path / "user" / "arcshard").iterdir())) == 2  # index and labels
    assert not (root / "train.idx.cache").exists()
    no_parsing(monkeypatch)
    assert contents(RecordDataset(root)) == first


def test_where_nothing_can_be_written_the_index_is_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_set(tmp_path / "set", 30)
    refuse_below(monkeypatch, root, tmp_path / "user")
    source = RecordDataset(root)
    assert len(contents(source)) == 30
    assert not list(tmp_path.rglob("*.cache"))
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)  # a worker's copy


def test_a_source_is_pickled_by_path_not_by_content(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", 3000)
    source = RecordDataset(root)
    text = pickle.dumps(source)
    assert len(text) < 2000
    assert contents(pickle.loads(text))[2999] == (b"image 2999", 2999 % 7)


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_cache_is_made_anew_or_named(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = write_set(tmp_path_factory.mktemp("set"), 30)
    sound = contents(RecordDataset(root))
    path = root / "train.idx.cache"
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        header_or_offsets = st.one_of(st.integers(0, 400), st.integers(4096, len(content) - 1))
        content[data.draw(header_or_offsets)] ^= data.draw(st.integers(1, 255))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    path.write_bytes(content)
    source = RecordDataset(root)
    assert len(source) == 30
    for i in range(30):
        message = f"key {i}"
        try:
            encoded, label = source.read_encoded(i)
        except RecordError as error:
            message = str(error)
        else:
            assert (bytes(encoded), label) == sound[i]
        assert f"key {i}" in message


def test_insightface_sets_leave_their_header_records_out_of_the_cache(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "train.rec", tmp_path / "train.idx") as writer:
        writer.write(0, pack_range(6, 7))
        for key in range(1, 6):
            writer.write(key, pack_record(b"image %d" % key, 0, key))
        writer.write(6, pack_range(1, 6, 6))
    for _ in range(2):
        source = RecordDataset(tmp_path)
        assert [bytes(source.read_encoded(i)[0]) for i in range(5)] == [
            b"image %d" % key for key in range(1, 6)
        ]
        assert len(source) == 5
        assert source.keys.tolist() == [1, 2, 3, 4, 5]


def test_large_offsets_survive(tmp_path: Path) -> None:
    """Far beyond what 32 bits hold, in a sparse file."""
    gap = 5 * 2**37  # 687 GB
    path = tmp_path / "train.rec"
    with RecordWriter(path, path.with_suffix(".idx")) as writer:
        writer.write(0, pack_record(b"first", 1))
        end = writer.write(1, pack_record(b"second", 2))
    content = path.read_bytes()
    with open(path, "wb") as file:
        file.write(content[:end])
        file.seek(gap)
        file.write(content[end:])
    path.with_suffix(".idx").write_text(f"0\t0\n1\t{gap}\n")
    for _ in range(2):
        index = open_index(path.with_suffix(".idx"), RecordReader(path))
        assert index.place(1) == (gap, gap + len(content) - end)
        assert RecordReader(path).read_at(*index.place(1)[:1]).endswith(b"second")


def test_an_index_that_stops_before_the_records_do_is_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_set(tmp_path / "set", 20)
    text = (root / "train.idx").read_text().splitlines()
    (root / "train.idx").write_text("\n".join(text[:15]) + "\n")
    assert len(RecordDataset(root)) == 15
    assert "ends with key 14, but train.rec goes on for" in caplog.text


def test_two_keys_with_one_offset_are_refused(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", 3)
    lines = (root / "train.idx").read_text().splitlines()
    (root / "train.idx").write_text(f"{lines[0]}\n1\t0\n{lines[2]}\n")
    with pytest.raises(RecordError, match="line 2: byte offset 0 appears a second time"):
        RecordDataset(root)


def test_labels_are_read_vectorized_and_checked(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "train.rec", tmp_path / "train.idx") as writer:
        expected = []
        for key in range(40):
            label = [key % 5, 2**24 + 1 + key, key % 3][key % 3]
            vector = key % 4 == 0
            magic = int.from_bytes(b"\x0a\x23\xd7\xce", "little") if key % 6 == 0 else key
            writer.write(key, pack_record(b"x", (label, 1.5) if vector else label, magic))
            expected.append(label)
    source = RecordDataset(tmp_path)
    assert source.labels().tolist() == expected
    assert source.num_classes == max(expected) + 1
    reader = RecordReader(tmp_path / "train.rec")
    found, sure = reader.read_classes(source.offsets)
    assert found[sure].tolist() == [e for e, s in zip(expected, sure, strict=True) if s]
    assert 10 < sure.sum() < 40


def test_of_several_that_open_at_once_one_builds(tmp_path: Path) -> None:
    made_from = tmp_path / "file"
    made_from.write_bytes(b"x")
    stamp = stamp_of(made_from)
    built = []

    def build() -> cache.Built:
        built.append(1)
        # While this one builds, another one has finished.
        return {"n": 1}, {"a": np.arange(3)}

    first = open_or_build(made_from, ".c", stamp, build)
    second = open_or_build(made_from, ".c", stamp, build)
    assert built == [1]
    assert first.facts == second.facts == {"n": 1}
    assert second.arrays["a"].tolist() == [0, 1, 2]
    assert isinstance(second, Cached)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda h: h.replace(b'"int64"', b'"object"'),
        lambda h: h.replace(b"4096", b"9999"),
        lambda h: b"",
    ],
)
def test_a_hostile_cache_is_not_believed(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    made_from = tmp_path / "file"
    made_from.write_bytes(b"x")
    stamp = stamp_of(made_from)
    open_or_build(made_from, ".c", stamp, lambda: ({}, {"a": np.arange(3)}))
    path = tmp_path / "file.c"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"file\.c"):
        Cached(str(path), stamp)


def test_a_pipe_in_the_place_of_a_cache_is_replaced_not_read(tmp_path: Path) -> None:
    made_from, path = tmp_path / "file", tmp_path / "file.c"
    made_from.write_bytes(b"x")
    os.mkfifo(path)
    held = os.open(path, os.O_RDWR)
    os.write(held, bytes(5000))  # so that whoever reads it all the same does not wait for ever
    with pytest.raises(ValueError, match="is no file"):
        Cached(str(path), stamp_of(made_from))
    built: tuple[dict[str, Any], dict[str, np.ndarray]] = ({}, {"a": np.arange(3)})
    assert open_or_build(made_from, ".c", stamp_of(made_from), lambda: built).arrays["a"][2] == 2
    assert path.is_file()
    os.close(held)
