"""Real MXNet 1.9.1 is the judge: it reads what we write, and we read what it writes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import simplejpeg

from data.datasets import RecordDataset
from data.index import read_index
from data.recordio import (
    MAGIC_BYTES,
    RecordReader,
    class_of,
    pack_range,
    pack_record,
    unpack_record,
)
from scripts import pack, shuffle_rec
from tests.record_helpers import RecordWriter

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-mxnet"
JUDGE = Path(__file__).with_name("mxnet_judge.py")
SIZE = 24
WIDE = (2**24 - 1, 2**24, 2**24 + 1, 2**24 + 3, 42_474_557, 2**31 + 7)


class Record(NamedTuple):
    key: int
    label: int | list[float]
    image: bytes
    id: int = 0
    id2: int = 0


@pytest.fixture(scope="session")
def python_with_mxnet() -> Path:
    python = ENVIRONMENT / "bin" / "python"
    if (ENVIRONMENT / ".ready").exists():
        return python
    noted = ENVIRONMENT / ".unavailable"
    reason = noted.read_text().strip() if noted.exists() else "not built: run `make test-mxnet`"
    if os.environ.get("REQUIRE_MXNET"):
        pytest.fail(f"no environment with MXNet 1.9.1: {reason}")
    pytest.skip(f"no environment with MXNet 1.9.1: {reason}")


def judge(python: Path, command: str, spec: dict[str, Any], folder: Path) -> str:
    path = folder / f"{command}.json"
    path.write_text(json.dumps(spec))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MXNET_CPU_WORKER_NTHREADS": "1"}
    done = subprocess.run(
        [python, JUDGE, command, path], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1] if done.stdout else ""


def payloads_with_magic(count: int) -> list[bytes]:
    """Bytes that hold the magic at multiples of 4 and elsewhere, at the ends and twice in a row."""
    rng = np.random.default_rng(0)
    pieces = (MAGIC_BYTES, MAGIC_BYTES[:3], MAGIC_BYTES[1:], b"\0\0\0\0", b"abc", b"1234")
    chosen = [rng.integers(0, len(pieces), rng.integers(0, 12)) for _ in range(count)]
    return [b"".join(pieces[i] for i in choice) for choice in chosen]


def sets() -> dict[str, list[Record]]:
    """The records of every kind that both sides write."""
    magic = payloads_with_magic(150)
    images = [b"image %d" % i for i in range(12)]
    header = [Record(0, [13.0, 16.0], b"")]
    identities = [Record(13 + i, [1.0 + 4 * i, 5.0 + 4 * i], b"", 13 + i) for i in range(3)]
    return {
        "insightface": [
            *header,
            *(Record(1 + i, i // 4, image, 1 + i) for i, image in enumerate(images)),
            *identities,
        ],
        "im2rec": [Record(5 + 3 * i, i // 4, image, 5 + 3 * i) for i, image in enumerate(images)],
        "vector": [Record(i, [i // 4, 0.5, -2.0], image, i) for i, image in enumerate(images)],
        "multipart": [Record(i, i, image, i) for i, image in enumerate(magic)],
        "magic_as_id": [Record(0, 3, b"image", int.from_bytes(MAGIC_BYTES, "little"))],
        "wide": [Record(i, c, b"wide", i, c if c > 2**24 else 0) for i, c in enumerate(WIDE)],
        "wide_vector": [
            Record(i, [c, 0.25], b"wide", i, c if c > 2**24 else 0) for i, c in enumerate(WIDE)
        ],
    }


def write_ours(path: Path, records: list[Record]) -> None:
    with RecordWriter(path, path.with_suffix(".idx")) as writer:
        for record in records:
            if isinstance(record.label, list) and not record.image:
                first, end = map(int, record.label)
                payload = pack_range(first, end, record.id)
            else:
                payload = pack_record(record.image, record.label, record.id)
            writer.write(record.key, payload)


@pytest.fixture(scope="session")
def both(python_with_mxnet: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every set written by both sides, and what MXNet reads of ours."""
    folder = tmp_path_factory.mktemp("judge")
    spec, ours = {}, {}
    for name, records in sets().items():
        write_ours(folder / f"{name}_ours.rec", records)
        ours[name] = str(folder / f"{name}_ours.rec")
        spec[str(folder / f"{name}_theirs.rec")] = [
            {**record._asdict(), "image": record.image.hex()} for record in records
        ]
    judge(python_with_mxnet, "write", spec, folder)
    seen = json.loads(judge(python_with_mxnet, "read", ours, folder))
    return {"folder": folder, "seen": seen}


@pytest.mark.parametrize("name", sets())
def test_mxnet_reads_what_we_write(name: str, both: dict[str, Any]) -> None:
    seen = both["seen"][name]
    expected = sets()[name]
    assert seen["scanned"] == len(expected)
    for found, record in zip(seen["records"], expected, strict=True):
        assert found["label"] == np.float32(np.atleast_1d(record.label)).tolist()
        assert (found["key"], found["id"], found["id2"]) == (record.key, record.id, record.id2)
        assert found["sha1"] == hashlib.sha1(record.image).hexdigest()


@pytest.mark.parametrize("name", sets())
def test_we_read_what_mxnet_writes(name: str, both: dict[str, Any]) -> None:
    path = both["folder"] / f"{name}_theirs.rec"
    reader = RecordReader(path)
    index = read_index(path.with_suffix(".idx"), reader.size)
    found = {}
    for key, offset in zip(index.keys.tolist(), index.offsets.tolist(), strict=True):
        found[key] = unpack_record(reader.read_at(offset, key))
    expected = {record.key: record for record in sets()[name]}
    assert found.keys() == expected.keys()
    for key, (header, image) in found.items():
        record = expected[key]
        assert bytes(image) == record.image
        assert header.labels.tolist() == np.float32(np.atleast_1d(record.label)).tolist()
        assert (header.id, header.id2) == (record.id, record.id2)


@pytest.mark.parametrize("name", sets())
def test_both_write_the_same_bytes(name: str, both: dict[str, Any]) -> None:
    for suffix in (".rec", ".idx"):
        ours = (both["folder"] / f"{name}_ours{suffix}").read_bytes()
        assert ours == (both["folder"] / f"{name}_theirs{suffix}").read_bytes()


@pytest.mark.parametrize("name", ["wide", "wide_vector"])
def test_class_ids_beyond_2_24_come_back_exactly_both_ways(name: str, both: dict[str, Any]) -> None:
    path = both["folder"] / f"{name}_theirs.rec"
    reader = RecordReader(path)
    offsets = read_index(path.with_suffix(".idx"), reader.size).offsets.tolist()
    assert [class_of(reader.read_header(offset)) for offset in offsets] == list(WIDE)
    seen = both["seen"][name]["records"]
    assert [record["id2"] or record["label"][0] for record in seen] == list(WIDE)


def test_mxnet_reads_packed_shuffled_and_listed_sets_as_published_loaders_do(
    python_with_mxnet: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    content = {}
    for i in range(20):
        pixels = cv2.resize(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), (SIZE, SIZE))
        path = tmp_path / "faces" / f"person{i // 5}" / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(simplejpeg.encode_jpeg(pixels))
        content[hashlib.sha1(path.read_bytes()).hexdigest()] = i // 5
    lines = [f"{100 + i}\t{i // 5:.6f}\tperson{i // 5}/{i:02d}.jpg\n" for i in range(20)]
    (tmp_path / "list.lst").write_text("".join(lines))
    faces = str(tmp_path / "faces")
    out = tmp_path / "packed"
    assert pack.main([faces, str(out), "--size", str(SIZE)]) == 0
    listed = tmp_path / "listed"
    arguments = [str(tmp_path / "list.lst"), str(listed), "--root", faces, "--size", str(SIZE)]
    assert pack.main(arguments) == 0
    shuffle_rec.shuffle_records(out, tmp_path / "shuffled")
    names = ("packed", "listed", "shuffled")
    spec = {name: str(tmp_path / name / "train.rec") for name in names}
    seen = json.loads(judge(python_with_mxnet, "read", spec, tmp_path))
    for name in names:
        records = {record["key"]: record for record in seen[name]["records"]}
        if name == "listed":
            assert list(records) == list(range(100, 120))
            images = list(records.values())
        else:  # as MXFaceDataset: the header record says where the images end
            assert records[0]["flag"] == 2
            images = [records[key] for key in range(1, int(records[0]["label"][0]))]
        assert {r["sha1"]: int(r["label"][0]) for r in images} == content
        assert all(r["shape"] == [SIZE, SIZE, 3] for r in images)
        assert len(RecordDataset(spec[name], input_size=SIZE)) == 20
