"""Two data sets are told apart by a look at them, two copies of one are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.fingerprint import SAMPLE_BYTES, sample_file
from dataset import DataLoader, get_dataloader
from scripts.pack import main as pack


def test_a_sample_tells_files_apart_by_size_beginning_and_end(tmp_path: Path) -> None:
    path = tmp_path / "train.rec"
    content = bytearray(2 * SAMPLE_BYTES + 100)
    path.write_bytes(content)
    first = sample_file(path)
    assert first[:2] == ("train.rec", len(content))
    for place in (0, len(content) - 1):
        content[place] ^= 1
        path.write_bytes(content)
        assert sample_file(path)[2] != first[2]
        content[place] ^= 1
    for size in (0, 5, SAMPLE_BYTES, SAMPLE_BYTES + 5):
        path.write_bytes(bytes(size))
        assert sample_file(path)[1] == size
        if size:
            before = sample_file(path)
            path.write_bytes(bytes(size - 1) + b"1")
            assert sample_file(path)[2] != before[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import cv2
    import numpy as np

    for label in range(3):
        (tmp_path / "set" / f"p{label}").mkdir(parents=True)
        for number in range(2):
            image = np.full((32, 32, 3), 40 * label + number, np.uint8)
            cv2.imwrite(str(tmp_path / "set" / f"p{label}" / f"{number}.jpg"), image)
    return tmp_path / "set"


def loader(*roots: Path, **options: Any) -> DataLoader:
    rec = [str(root) for root in roots] if len(roots) > 1 else str(roots[0])
    return get_dataloader(rec, 2, input_size=32, num_workers=0, **options)


def test_folders_differ_by_their_names_not_by_where_they_lie(folder: Path) -> None:
    first = loader(folder).fingerprint()
    copy = folder.with_name("copy")
    folder.rename(copy)
    assert loader(copy).fingerprint() == first
    (copy / "p1" / "1.jpg").rename(copy / "p2" / "2.jpg")  # the same numbers of both
    assert loader(copy).fingerprint() != first


def test_records_differ_by_their_content(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert pack([str(folder), str(tmp_path / name), "--size", "32"]) == 0
    one, two = loader(tmp_path / "a"), loader(tmp_path / "b")
    assert one.fingerprint() == two.fingerprint()
    content = bytearray((tmp_path / "b" / "train.rec").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "b" / "train.rec").write_bytes(content)
    assert loader(tmp_path / "b").fingerprint() != one.fingerprint()


def test_joined_sets_differ_by_their_order_and_an_exclusion_shows(
    folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    (other / "q").mkdir(parents=True)
    (other / "q" / "0.jpg").write_bytes((folder / "p0" / "0.jpg").read_bytes())
    (other / "q" / "1.jpg").write_bytes((folder / "p0" / "1.jpg").read_bytes())
    assert loader(folder, other).fingerprint() != loader(other, folder).fingerprint()
    left_out = tmp_path / "exclude.txt"
    left_out.write_text("image p0/0.jpg\n")
    assert loader(folder, exclude=[left_out]).fingerprint() != loader(folder).fingerprint()
