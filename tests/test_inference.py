"""scripts/inference.py: the embedder's numbers, and what it says of images that do not fit."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from eval.extract import FileImages, embed_images
from eval.model import open_model
from scripts import inference
from tests.models import OURS, write_pooling_model


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_pooling_model(tmp_path / "m.onnx", metadata=OURS))


def write_images(folder: Path, *sizes: int) -> list[str]:
    random = np.random.default_rng(3)
    paths = []
    for number, size in enumerate(sizes):
        path = folder / f"{number}.png"
        cv2.imwrite(str(path), random.integers(0, 256, (size, size, 3), dtype=np.uint8))
        paths.append(str(path))
    return paths


def test_it_prints_what_the_embedder_gives(tmp_path, model, capsys):
    paths = write_images(tmp_path, 112, 112)
    opened = open_model(model)
    expected = embed_images(opened.embed, FileImages([Path(p) for p in paths], 112), flip=False)
    assert inference.main([*paths, "--model", model]) == 0
    first, second, cosine = capsys.readouterr().out.splitlines()
    rows = np.array([first.split(), second.split()], dtype=np.float64)
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    assert cosine == f"cosine {unit[0] @ unit[1]:.4f}"
    assert inference.main([paths[0], "--model", model]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1  # no cosine of one image


def test_flip_adds_the_mirror_image_and_npy_takes_the_place_of_printing(tmp_path, model, capsys):
    paths = write_images(tmp_path, 112, 112, 112)
    file = tmp_path / "new" / "e.npy"
    assert inference.main([*paths, "--model", model, "--flip", "--npy", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: 3 embeddings of 24 numbers\n"
    files = FileImages([Path(p) for p in paths], 112)
    expected = embed_images(open_model(model).embed, files, flip=True, sum_flip=True)
    rows = np.load(file, allow_pickle=False)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, expected)


def test_an_image_of_another_size_is_refused_with_the_way_out(tmp_path, model, capsys):
    paths = write_images(tmp_path, 112, 200)
    assert inference.main([*paths, "--model", model]) == 2
    error = capsys.readouterr().err
    assert "1.png: 200 x 200 pixels; the model takes 112 x 112" in error
    assert "scripts/align.py" in error
    assert inference.main([*paths, "--model", model, "--resize"]) == 0


def test_bad_input_ends_with_exit_code_2_and_one_line(tmp_path, model, capsys):
    (path,) = write_images(tmp_path, 112)
    for words, error in (
        ([str(tmp_path / "none.jpg"), "--model", model], "none.jpg"),
        ([path, "--model", str(tmp_path / "none.onnx")], "none.onnx: no such file"),
        ([path, "--model", model, "--npy", str(tmp_path)], "is a folder; give the name of a file"),
    ):
        assert inference.main(words) == 2
        assert error in capsys.readouterr().err.splitlines()[-1]


def test_an_embedding_that_is_not_finite_is_an_error(tmp_path, model, capsys, monkeypatch):
    (path,) = write_images(tmp_path, 112)
    monkeypatch.setattr(inference, "embed_images", lambda *a, **k: np.full((1, 4), np.nan))
    assert inference.main([path, "--model", model]) == 2
    assert "0.png: its embedding is zero or not finite" in capsys.readouterr().err
