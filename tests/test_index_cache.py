"""A large index is parsed once, and what is mapped afterwards is what was parsed."""

from __future__ import annotations

import io
import json
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import cache
from data.cache import Cached, open_or_build, read_cache, stamp_of
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


def kept_arrays(path: Path) -> dict[str, int]:
    """Lengths of the arrays in a cache, which np.load reads one after another."""
    with open(path, "rb") as file:
        names = json.loads(np.load(file).tobytes())["names"]
        lengths = {name: len(np.load(file)) for name in names}
        assert not file.read()
    return lengths


def test_consecutive_keys_are_not_stored_and_others_are(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", 500, first_key=7)
    source = RecordDataset(root)
    assert kept_arrays(root / "train.idx.cache") == {"offsets": 501}
    assert source.keys.tolist() == list(range(7, 507))
    lines = (root / "train.idx").read_text().splitlines()
    (root / "train.idx").write_text("\n".join([*lines[:100], *lines[101:]]) + "\n")
    shorter = RecordDataset(root)
    assert kept_arrays(root / "train.idx.cache") == {"offsets": 500, "keys": 499}
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
    really = cache.atomic_write

    def write(path: Path, *, durable: bool) -> Any:
        if any(folder in path.parents for folder in folders):
            raise OSError(30, "Read-only file system")
        return really(path, durable=durable)

    monkeypatch.setattr(cache, "atomic_write", write)


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


def test_a_pickled_source_opens_its_records_for_itself(tmp_path: Path) -> None:
    source = RecordDataset(write_set(tmp_path / "set", 30))
    text, expected = pickle.dumps(source), contents(source)
    del source  # and with it the descriptor of its file
    assert contents(pickle.loads(text)) == expected


def test_a_cache_of_the_first_format_is_replaced(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", 30)
    path = root / "train.idx.cache"
    path.write_bytes(b"ArcShard cache 1\n" + bytes(8 * 600))
    assert len(RecordDataset(root)) == 30
    assert kept_arrays(path) == {"offsets": 31}


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
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
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
    built, begun, go_on = [], threading.Event(), threading.Event()

    def build() -> Cached:
        built.append(1)
        begun.set()
        go_on.wait(10)
        return Cached({"n": 1}, {"a": np.arange(3)})

    found: list[Cached] = []
    threads = [
        threading.Thread(target=lambda: found.append(open_or_build(made_from, ".c", stamp, build)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert built == [1]
    assert [one.facts for one in found] == [{"n": 1}] * 3
    assert [one.arrays["a"].tolist() for one in found] == [[0, 1, 2]] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "file.c"]


def test_of_two_that_write_at_once_without_locks_both_leave_a_whole_cache(tmp_path: Path) -> None:
    """As on a network file system that has none."""
    path, stamp = tmp_path / "file.c", {"of": "test"}
    with cache.atomic_write(path, durable=False) as first:
        first.write(b"half a ca")
        cache._write(path, stamp, Cached({}, {"a": np.arange(3)}))
        assert read_cache(path, stamp).arrays["a"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="magic"):  # that of the last one, as it wrote it
        read_cache(path, stamp)
    assert list(tmp_path.iterdir()) == [path]


def altered(good: bytes, old: bytes, new: bytes) -> bytes:
    """Replaces a text in the header of the array "a", the second of the file."""
    begin = good.rindex(b"\x93NUMPY")
    end = good.index(b"\n", begin)
    header = good[begin:end].replace(old, new).rstrip(b" ")
    return good[:begin] + header.ljust(end - begin) + good[end:]


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda good: b"", "magic"),
    "cut": (lambda good: good[:-1], "mmap length"),
    "longer": (lambda good: good + b"x", "damaged"),
    "another dtype": (lambda good: altered(good, b"<i8", b"<f8"), "no list of whole numbers"),
    "other bytes first": (lambda good: altered(good, b"<i8", b">i8"), "no list of whole numbers"),
    "objects": (lambda good: altered(good, b"<i8", b"|O"), "no list of whole numbers"),
    "more than there is": (lambda good: altered(good, b"(3,)", b"(4,)"), "mmap length"),
    "a petabyte": (lambda good: altered(good, b"(3,)", b"(%d,)" % 10**15), "mmap length"),
    "beyond 64 bits": (lambda good: altered(good, b"(3,)", b"(%d,)" % 10**30), "too large"),
    "less than there is": (lambda good: altered(good, b"(3,)", b"(2,)"), "damaged"),
    "negative": (lambda good: altered(good, b"(3,)", b"(-3,)"), "negative"),
    "a matrix": (lambda good: altered(good, b"(3,)", b"(1, 3)"), "no list of whole numbers"),
    "a call": (lambda good: altered(good, b"(3,)", b"(exit(3),)"), "malformed"),
    "not closed": (lambda good: altered(good, b"(3,)", b"((((("), "parse header|EOF"),
    "no text first": (lambda good: npy(np.arange(3)), "decode"),
    "a pickle": (lambda good: pickle.dumps(Exploding()), "magic"),
    "pickled objects": (lambda good: npy(np.array([Exploding()])), "no list of whole numbers"),
    "other facts": (lambda good: good.replace(b'"n": 1', b'"n": 2'), "damaged"),
    "another name": (lambda good: good.replace(b'["a"]', b'["b"]'), "damaged"),
    "a name too many": (lambda good: good.replace(b'["a"]', b"[1,2]"), "magic"),
    "of other files": (lambda good: good.replace(b'"file": [1', b'"file": [2'), "another version"),
}


class Exploding:
    """Ends the test run if it is unpickled."""

    def __reduce__(self) -> Any:
        return os._exit, (66,)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_cache_is_refused_and_made_anew(tmp_path: Path, name: str) -> None:
    spoil, words = HOSTILE[name]
    made_from, path = tmp_path / "file", tmp_path / "file.c"
    made_from.write_bytes(b"x")
    stamp = stamp_of(made_from)
    built = Cached({"n": 1}, {"a": np.arange(3)})
    open_or_build(made_from, ".c", stamp, lambda: built)
    good = path.read_bytes()
    assert spoil(good) != good
    path.write_bytes(spoil(good))
    with pytest.raises(Exception, match=words):  # numpy's exceptions share no base class
        read_cache(path, stamp)
    assert open_or_build(made_from, ".c", stamp, lambda: built).arrays["a"].tolist() == [0, 1, 2]
    assert path.read_bytes() == good


def test_a_pipe_in_the_place_of_a_cache_is_replaced_not_read(tmp_path: Path) -> None:
    made_from, path = tmp_path / "file", tmp_path / "file.c"
    made_from.write_bytes(b"x")
    os.mkfifo(path)
    held = os.open(path, os.O_RDWR)
    os.write(held, bytes(5000))  # so that whoever reads it all the same does not wait for ever
    with pytest.raises(ValueError, match="is no file"):
        read_cache(path, stamp_of(made_from))
    built = Cached({}, {"a": np.arange(3)})
    assert open_or_build(made_from, ".c", stamp_of(made_from), lambda: built).arrays["a"][2] == 2
    assert path.is_file()
    os.close(held)
