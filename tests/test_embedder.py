"""Every kind of model becomes the same function of images; embeddings are kept by content."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import simplejpeg
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from backbones import get_model
from backbones.weights import ModelMetadata, WeightsError, save_model
from data.decode import ImageError
from data.recordio import pack_record
from eval.extract import EmbeddingCache, FileImages, embed_images
from eval.model import open_model, parse_channels
from eval.onnx_model import OnnxEmbedder
from scripts import compare, embed
from tests.models import OURS, write_pooling_model
from tests.record_helpers import RecordWriter
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGENET: dict[str, Any] = {
    "mean": (123.675, 116.28, 103.53),
    "std": (58.395, 57.12, 57.375),
    "color": "RGB",
}


def _pixels(count: int, size: int = 112, seed: int = 0) -> Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(0, 256, (count, 3, size, size), dtype=np.uint8))


# --- ONNX files of any vendor ---


class _ThirdParty(nn.Module):
    """A small network as others write them: NHWC, ImageNet normalization outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 5, stride=4)
        self.last = nn.Linear(8, 20)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(images.permute(0, 3, 1, 2))).mean((2, 3)))


@pytest.fixture(scope="module")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """An exported file with a fixed batch of 1, NHWC, that says nothing of its preprocessing."""
    torch.manual_seed(0)
    net = _ThirdParty().eval()
    path = tmp_path_factory.mktemp("vendor") / "vendor.onnx"
    program = torch.onnx.export(
        net, (torch.zeros(1, 112, 112, 3),), dynamo=True, verbose=False, external_data=False
    )
    assert program is not None
    program.save(path)
    return path, net


def test_a_third_party_file_with_batch_1_and_imagenet_normalization_is_the_network(
    third_party: tuple[Path, nn.Module],
) -> None:
    path, net = third_party
    model = open_model(path, **IMAGENET)
    assert (model.facts["layout"], model.facts["fixed_batch"], model.input_size) == ("NHWC", 1, 112)
    images = _pixels(5)
    mean, std = (torch.tensor(IMAGENET[k]).reshape(1, 1, 1, 3) for k in ("mean", "std"))
    with torch.no_grad():
        expected = net((images.permute(0, 2, 3, 1).float() - mean) / std)
    found = model.embed(images)
    assert found.shape == (5, 20)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_a_file_does_not_say_has_to_be_said(third_party: tuple[Path, nn.Module]) -> None:
    path, _ = third_party
    with pytest.raises(UserError, match=r"mean, std, color of .*pass --mean --std --color"):
        open_model(path)
    with pytest.raises(UserError, match=r"does not say color .*pass --color\. Usual"):
        open_model(path, mean=127.5, std=127.5)


@pytest.mark.parametrize("batch", ["batch", 1, 4])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("color", ["RGB", "BGR"])
def test_every_batch_layout_and_color_order_gives_the_same_embeddings(
    tmp_path: Path, batch: int | str, layout: str, color: str
) -> None:
    images = _pixels(6)
    plain = write_pooling_model(tmp_path / "plain.onnx", metadata=OURS)
    expected = open_model(plain).embed(images if color == "RGB" else images.flip(1))
    other = write_pooling_model(tmp_path / "other.onnx", batch=batch, layout=layout, metadata=OURS)
    found = open_model(other, color=color).embed(images)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-5)


def _two_dimensional(path: Path) -> None:
    node = helper.make_node("Identity", ["a"], ["b"])
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3]) for n in "ab"]
    graph = helper.make_graph([node], "g", value[:1], value[1:])
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)


def test_a_file_that_cannot_be_used_is_an_error_that_says_why(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    with pytest.raises(UserError, match="no such file"):
        open_model(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"onnxruntime .* cannot load it"):
        open_model(path)
    _two_dimensional(path)
    with pytest.raises(UserError, match=r"one input of 4 dimensions .*it has a "):
        open_model(path, mean=0, std=1, color="RGB")
    write_pooling_model(path, two_outputs=True, metadata=OURS)
    with pytest.raises(UserError, match="has the outputs flat, embedding; pass --output"):
        open_model(path)
    assert open_model(path, output="embedding").embed(_pixels(1)).shape == (1, 24)
    with pytest.raises(UserError, match="takes images of 112 pixels, not 128"):
        open_model(path, output="embedding", input_size=128)
    with pytest.raises(UserError, match="cannot be NHWC: that has 112 channels"):
        open_model(path, output="embedding", layout="NHWC")
    write_pooling_model(path, size=3, cells=1, metadata={**OURS, "input_size": "3"})
    with pytest.raises(UserError, match="pass --layout NCHW or --layout NHWC"):
        open_model(path)
    assert open_model(path, layout="NCHW").input_size == 3
    with pytest.raises(UserError, match="std is 0"):
        OnnxEmbedder(path, 0, 0, layout="NCHW")
    with pytest.raises(UserError, match="needs no --network"):
        open_model(path, network="r50")


def test_channels_are_one_number_or_three() -> None:
    assert parse_channels("mean", "127.5") == 127.5
    assert parse_channels("mean", "1,2,3") == (1.0, 2.0, 3.0)
    for text in ("a", "1,2", "", "1,2,3,4"):
        with pytest.raises(UserError, match="give one number, or three"):
            parse_channels("--mean", text)


# --- files of weights ---


def test_weights_with_and_without_metadata_are_opened_and_say_how_they_see(tmp_path: Path) -> None:
    net = get_model("mbf", num_features=32).eval()
    save_model(tmp_path / "model.pt", net, ModelMetadata("mbf", 32, mean=0.0, std=255.0))
    torch.save(net.state_dict(), tmp_path / "plain.pt")
    images = _pixels(2)
    run = open_model(tmp_path)
    assert (run.facts["mean"], run.facts["std"]) == (0.0, 255.0)
    assert run.facts["preprocessing_from"] == "the file"
    with torch.no_grad():
        torch.testing.assert_close(run.embed(images), net(images.float() / 255))
    plain = open_model(tmp_path / "plain.pt", network="mbf")
    assert plain.facts["mean"] == 127.5
    assert "the file says none" in plain.facts["preprocessing_from"]
    given = open_model(tmp_path / "plain.pt", network="mbf", mean=0, std=255, color="BGR")
    torch.testing.assert_close(given.embed(images), run.embed(images.flip(1)))
    assert len({run.key, plain.key, given.key}) == 3
    assert open_model(tmp_path / "model.pt").key == run.key
    with pytest.raises(WeightsError, match="--network"):
        open_model(tmp_path / "plain.pt")
    with pytest.raises(UserError, match="--layout is for ONNX files"):
        open_model(tmp_path, layout="NCHW")


# --- many images ---


def _folder(root: Path, count: int = 11, size: int = 112) -> list[Path]:
    root.mkdir(parents=True, exist_ok=True)
    images = _pixels(count, size).permute(0, 2, 3, 1).numpy()
    paths = []
    for index, image in enumerate(images):
        paths.append(root / f"p{index // 3}_{index}.jpg")
        paths[-1].write_bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(image), 95))
    return paths


class _Counting:
    """An embedder that knows how many images it was asked for."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return images.float().mean(2).flatten(1)[:, :50]


def test_the_cache_is_keyed_by_content_model_and_settings(tmp_path: Path) -> None:
    images = FileImages(_folder(tmp_path / "a"), 112)
    count = _Counting()
    cache = EmbeddingCache(tmp_path / "cache", "model 1")
    first = embed_images(count, images, batch_size=4, cache=cache)
    assert count.images == 22
    np.testing.assert_array_equal(embed_images(count, images, batch_size=4, cache=cache), first)
    assert count.images == 22
    np.testing.assert_array_equal(embed_images(count, images, batch_size=4), first)
    assert count.images == 44
    # The same bytes elsewhere are the same images; one other byte makes its batch anew.
    moved = FileImages(_folder(tmp_path / "b"), 112)
    embed_images(count, moved, batch_size=4, cache=cache)
    assert count.images == 44
    moved.paths[5].write_bytes(images.paths[0].read_bytes())
    embed_images(count, moved, batch_size=4, cache=cache)
    assert count.images == 44 + 8
    for other in (EmbeddingCache(tmp_path / "cache", "model 2"), cache):
        before = count.images
        embed_images(count, images, batch_size=4, flip=other is not cache, cache=other)
        assert count.images > before
    # A damaged file of the cache is not believed.
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(embed_images(count, images, batch_size=4, cache=cache), first)


def test_images_of_another_size_are_resized_only_when_asked(tmp_path: Path) -> None:
    paths = _folder(tmp_path, 3, size=96)
    with pytest.raises(ImageError, match=r"p0_0\.jpg: 96 x 96 pixels; .*pass --resize"):
        embed_images(_Counting(), FileImages(paths, 112))
    assert embed_images(_Counting(), FileImages(paths, 112, resize=True)).shape == (3, 100)
    with pytest.raises(ValueError, match="there is no image"):
        embed_images(_Counting(), FileImages([], 112))


def _embed_on_a_rank(rank: int, world_size: int, folder: str, cache: str) -> bytes:
    paths = sorted(Path(folder).glob("*.jpg"))
    count = _Counting()
    rows = embed_images(
        count,
        FileImages(paths, 112),
        sum_flip=True,
        rank=rank,
        world_size=world_size,
        batch_size=2,
        cache=EmbeddingCache(cache, "m"),
    )
    return rows.tobytes()


def test_one_two_three_ranks_give_identical_rows_also_from_the_cache(
    tmp_path: Path, ranks: Any
) -> None:
    _folder(tmp_path / "a")
    answers = []
    for world_size in (1, 2, 3, 2):
        cache = str(tmp_path / f"cache{world_size}")
        answers += ranks.run(world_size, _embed_on_a_rank, str(tmp_path / "a"), cache)
    assert len(set(answers)) == 1


# --- scripts/embed.py and scripts/compare.py ---


def test_embed_writes_rows_and_names_and_goes_on_after_a_kill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(_folder(tmp_path / "a"))
    model = write_pooling_model(tmp_path / "m.onnx", metadata=OURS)
    arguments = ["--model", str(model), "--batch-size", "2", str(tmp_path / "a")]
    assert embed.main([*arguments, str(tmp_path / "whole")]) == 0
    expected = np.load(tmp_path / "whole" / "embeddings.npy")
    names = (tmp_path / "whole" / "names.txt").read_text().split()
    assert names == [path.name for path in paths]
    assert sorted(os.listdir(tmp_path / "whole")) == ["embeddings.npy", "names.txt"]
    opened = open_model(model)
    rows = embed_images(opened.embed, FileImages(paths, 112), sum_flip=True, batch_size=2)
    np.testing.assert_array_equal(expected, rows)

    damaged = paths[7].read_bytes()
    paths[7].write_bytes(damaged[:500])
    out = str(tmp_path / "out")
    assert embed.main([*arguments, out]) == 2
    assert paths[7].name in capsys.readouterr().err
    assert not (tmp_path / "out" / "embeddings.npy").exists()
    paths[7].write_bytes(damaged)
    assert embed.main([*arguments, "--no-flip", out]) == 2
    assert "unfinished work of another" in capsys.readouterr().err
    assert embed.main([*arguments, out]) == 0
    assert "3 of 6 batches are there" in capsys.readouterr().err
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "embeddings.npy"), expected)
    assert embed.main([*arguments, out]) == 2
    assert "already holds embeddings.npy" in capsys.readouterr().err
    assert embed.main([*arguments, "--restart", out]) == 0


def test_embed_takes_lists_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = _folder(tmp_path / "a", 4)
    model = write_pooling_model(tmp_path / "m.onnx", metadata=OURS)
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(f"a/{path.name}" for path in reversed(paths)))
    common = ["--model", str(model), "--no-flip"]
    assert embed.main([*common, str(listed), str(tmp_path / "1")]) == 0
    with RecordWriter(tmp_path / "x.rec", tmp_path / "x.idx") as writer:
        for key, path in enumerate(paths, 1):
            writer.write(key, pack_record(path.read_bytes(), float(key % 2), key))
    assert embed.main([*common, str(tmp_path / "x.rec"), str(tmp_path / "2")]) == 0
    rows = [np.load(tmp_path / name / "embeddings.npy") for name in "12"]
    np.testing.assert_allclose(rows[0], rows[1][::-1], atol=1e-4)
    assert np.load(tmp_path / "2" / "labels.npy").tolist() == [1, 0, 1, 0]
    listed.write_text("a/none.jpg\n")
    capsys.readouterr()
    assert embed.main([*common, str(listed), str(tmp_path / "3")]) == 2
    assert "list.txt, line 1: " in capsys.readouterr().err


def test_compare_prints_the_cosine_and_decides_by_a_saved_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = map(str, _folder(tmp_path / "a", 2))
    model = write_pooling_model(tmp_path / "m.onnx", metadata=OURS)
    arguments = [first, second, "--model", str(model)]
    assert compare.main(arguments) == 0
    cosine = float(capsys.readouterr().out.split()[1])
    assert compare.main([first, first, "--model", str(model)]) == 0
    assert capsys.readouterr().out == "cosine 1.0000\n"

    saved = tmp_path / "result.json"
    at = {"far": 1e-3, "threshold_cosine": cosine - 0.01, "false_accepts": 3, "num_impostors": 3000}
    content = {"lfw": {"tar_at_far": [at]}, "model": {"key": open_model(model).key}}
    saved.write_text(json.dumps(content))
    more = ["--evaluation", str(saved)]
    assert compare.main([*arguments, *more]) == 0
    assert "same person at FAR 0.001" in capsys.readouterr().out
    at["threshold_cosine"] = cosine + 0.01
    saved.write_text(json.dumps(content))
    assert compare.main([*arguments, *more]) == 0
    assert "different people at FAR 0.001" in capsys.readouterr().out
    assert compare.main([*arguments, *more, "--far", "1e-5"]) == 2
    assert "FAR 1e-05 was not evaluated on lfw; there are 0.001" in capsys.readouterr().err
    content["model"] = {"key": "another"}
    saved.write_text(json.dumps(content))
    assert compare.main([*arguments, *more]) == 2
    assert "is of another model" in capsys.readouterr().err
    saved.write_text("{")
    assert compare.main([*arguments, *more]) == 2
    assert "not a JSON file" in capsys.readouterr().err
