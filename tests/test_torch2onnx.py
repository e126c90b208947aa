"""An exported file computes what PyTorch does for any batch and says what it is, or is absent."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import torch2onnx
from backbones import Backbone, get_model, model_names
from backbones.weights import ModelMetadata, save_model
from torch2onnx import ParityError, export_onnx, main
from utils.errors import UserError

Recipe = tuple[str, int, int, dict[str, Any]]  # name, num_features, input_size, options
# The quickest to export that there is, for all that is not about the network.
TINY: Recipe = ("vit_t", 16, 36, {"embed_dim": 32, "depth": 1, "num_heads": 2})
# One network per family, each plain or simplified (the slow test does every network).
FAMILIES: list[tuple[Recipe, bool]] = [
    (("r_nano", 512, 48, {}), False),
    (("mbf", 512, 48, {}), True),
    (("vit_t", 64, 48, {"embed_dim": 64, "depth": 2}), False),
]
IN_TWO_FILES = ("r2060", "vit_h")  # and too large to be exported in a test
# Differ from vit_t, vit_s and vit_b in training only.
SAME_GRAPH = ("vit_t_dp005_mask0", "vit_s_dp005_mask_0", "vit_b_dp005_mask_005")


pytestmark = pytest.mark.usefixtures("one_thread")


def trained(name: str, num_features: int, size: int, options: dict[str, Any]) -> Backbone:
    """A network whose norms do something, and whose activations stay finite at any depth."""
    torch.manual_seed(0)
    net = get_model(name, num_features=num_features, input_size=size, **options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.get_buffer("running_mean"), std=0.1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.25, 1.0)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return net


def metadata_for(name: str, num_features: int, size: int, options: dict[str, Any]) -> ModelMetadata:
    return ModelMetadata(
        name, num_features=num_features, input_size=size, options=options, step=7, config="demo"
    )


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return trained(*TINY)


@pytest.fixture(scope="module")
def exported(tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network's file, exported once, with every metadata field in use."""
    path = tmp_path_factory.mktemp("exported") / "tiny.onnx"
    metadata = replace(metadata_for(*TINY), mean=0.0, std=255.0, color="BGR", epoch=1)
    export_onnx(tiny, metadata, path)
    return path


@pytest.fixture
def run(tiny: Backbone, tmp_path: Path) -> Path:
    """A run folder of the tiny network."""
    save_model(tmp_path / "model.pt", tiny, metadata_for(*TINY))
    return tmp_path


def dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize(("recipe", "simplify"), FAMILIES, ids=lambda value: str(value)[:9])
def test_a_network_of_every_family_agrees_for_any_batch(
    recipe: Recipe, simplify: bool, tmp_path: Path
):
    _, num_features, size, _ = recipe
    net, path = trained(*recipe), tmp_path / "face.onnx"
    report = export_onnx(net, metadata_for(*recipe), path, simplify=simplify)

    assert report.files == (path,)
    assert report.size_bytes == path.stat().st_size
    assert set(report.differences) == {1, 3, 32}
    assert report.max_relative_difference <= 1e-4
    assert os.listdir(tmp_path) == ["face.onnx"]  # no side file, no temporary one

    model = onnx.load(path)
    assert [(i.name, dims(i)) for i in model.graph.input] == [("data", ["batch", 3, size, size])]
    assert [(o.name, dims(o)) for o in model.graph.output] == [
        ("embedding", ["batch", num_features])
    ]
    session = onnxruntime.InferenceSession(path)
    images = np.random.default_rng(1).uniform(-1, 1, (5, 3, size, size)).astype(np.float32)
    with torch.no_grad():  # 5: a batch the export did not check
        expected = net.eval()(torch.from_numpy(images)).numpy()
    found = np.asarray(session.run(None, {"data": images})[0])
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_file_says_what_it_is_and_what_it_wants(exported: Path):
    facts = dict(onnxruntime.InferenceSession(exported).get_modelmeta().custom_metadata_map)
    assert json.loads(facts.pop("options")) == TINY[3]
    assert facts.pop("exported_with").startswith(f"torch {torch.__version__}")
    assert facts == {
        "network": "vit_t",
        "embedding_size": "16",
        "input_size": "36",
        "in_channels": "3",
        "mean": "0.0",
        "std": "255.0",
        "color": "BGR",
        "step": "7",
        "epoch": "1",
        "config": "demo",
    }


def test_the_file_tells_nothing_about_the_machine_that_wrote_it(exported: Path):
    content = exported.read_bytes()
    assert str(Path(torch2onnx.__file__).parent).encode() not in content
    assert b"stack_trace" not in content


def test_exporting_leaves_the_network_as_it_was_and_simplifying_leaves_fewer_nodes(
    exported: Path, tmp_path: Path
):
    net = trained(*TINY).double().train()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    report = export_onnx(net, metadata_for(*TINY), tmp_path / "m.onnx", simplify=True)
    assert net.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert report.nodes < len(onnx.load(exported).graph.node)


def test_a_disagreement_leaves_no_file_and_exit_code_1(
    run: Path, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    model = onnx.load(exported)
    for tensor in model.graph.initializer:
        if tensor.name == "feature.2.weight":
            values = onnx.numpy_helper.to_array(tensor) * np.float32(1.001)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    monkeypatch.setattr(torch2onnx, "_translate", lambda *arguments: model)
    assert main([str(run)]) == 1
    assert "differs from PyTorch by" in capsys.readouterr().err
    assert os.listdir(run) == ["model.pt"]


def test_a_network_that_gives_nan_is_not_exported(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch2onnx, "_translate", lambda *arguments: onnx.load(exported))
    net = trained(*TINY)
    nn.init.constant_(net.get_parameter("feature.2.weight"), float("nan"))
    with pytest.raises(ParityError, match=r"in PyTorch itself .* not finite"):
        export_onnx(net, metadata_for(*TINY), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_the_command_writes_beside_the_weights_and_says_so(
    run: Path, capfd: pytest.CaptureFixture[str]
):
    assert main([str(run)]) == 0
    out, err = capfd.readouterr()
    assert sorted(os.listdir(run)) == ["model.onnx", "model.pt"]
    assert "vit_t, 3 x 36 x 36 -> 16" in out
    assert "agrees with PyTorch on batches of 1, 3, 32: largest relative difference" in out
    assert len(out.splitlines()) <= 4
    assert err == ""  # torch's remarks are not the user's business


def test_foreign_weights_export_once_their_network_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    net = trained("r_nano", 16, 112, {})
    torch.save({"state_dict": net.state_dict()}, tmp_path / "old.pth.tar")
    options = ["--network", "r_nano", "--opset", "20", "--simplify"]
    assert main([str(tmp_path / "old.pth.tar"), *options]) == 0
    assert onnx.load(tmp_path / "old.onnx").opset_import[0].version == 20
    assert "opset 20" in (out := capsys.readouterr().out)
    assert "simplified" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.pt"], "no file or run folder"),
        (["plain.pt"], "does not say which network it holds"),
        (["plain.pt", "--network", "r_nani"], "Did you mean 'r_nano'"),
        (["plain.pt", "--network", "mbf"], "does not fit the network 'mbf'"),
        (["broken.pt", "--network", "mbf"], "is refused"),
        (["model.pt", "--opset", "11"], "opset 11 is not possible: 18 to"),
    ],
)
def test_bad_input_is_exit_code_2_and_a_sentence(
    run: Path,
    tiny: Backbone,
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
):
    torch.save(tiny.state_dict(), run / "plain.pt")
    (run / "broken.pt").write_bytes(b"?")
    before = sorted(os.listdir(run))
    assert main([str(run / arguments[0]), *arguments[1:]]) == 2
    assert words in capsys.readouterr().err
    assert sorted(os.listdir(run)) == before


def test_metadata_that_is_not_the_networks_is_refused(tiny: Backbone, tmp_path: Path):
    with pytest.raises(UserError, match=r"metadata says num_features=512, .* has 16"):
        export_onnx(tiny, ModelMetadata("vit_t", input_size=36), tmp_path / "m.onnx")


def test_a_folder_as_output_is_refused_before_any_work(run: Path, capsys):
    assert main([str(run), "--output", str(run)]) == 2
    assert "is a folder: give the name of a file" in capsys.readouterr().err
    assert os.listdir(run) == ["model.pt"]


def test_exactly_the_networks_beyond_protobufs_limit_need_a_second_file():
    def weight_bytes(name: str) -> int:
        with torch.device("meta"):
            return 4 * sum(tensor.numel() for tensor in get_model(name).state_dict().values())

    assert torch2onnx.LARGEST_SINGLE_FILE < 2**31
    large = {name for name in model_names() if weight_bytes(name) > torch2onnx.LARGEST_SINGLE_FILE}
    assert large == set(IN_TWO_FILES)


@pytest.mark.parametrize("simplify", [False, True])
def test_weights_beyond_the_limit_lie_in_one_file_beside_the_model(
    simplify: bool, tiny: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch2onnx, "LARGEST_SINGLE_FILE", 1000)
    monkeypatch.chdir(tmp_path)  # an older file of weights must not disturb, wherever we are
    path, data = tmp_path / "face.onnx", tmp_path / "face.onnx.data"
    path.write_bytes(b"old")
    data.write_bytes(b"old")
    report = export_onnx(tiny, metadata_for(*TINY), path, simplify=simplify)
    assert report.files == (path, data)
    assert report.size_bytes == path.stat().st_size + data.stat().st_size
    assert sorted(os.listdir(tmp_path)) == ["face.onnx", "face.onnx.data"]
    assert path.stat().st_mode == data.stat().st_mode  # who may read one may read both
    weights = sum(4 * parameter.numel() for parameter in tiny.parameters())
    assert 0.9 * weights < data.stat().st_size < 1.1 * weights

    moved = tmp_path / "elsewhere"  # the two together, so the place inside is relative
    moved.mkdir()
    for file in report.files:
        file.rename(moved / file.name)
    tensors = onnx.load(moved / "face.onnx", load_external_data=False).graph.initializer
    places = [{e.key: e.value for e in tensor.external_data}.get("location") for tensor in tensors]
    assert set(places) == {"face.onnx.data", None}
    session = onnxruntime.InferenceSession(moved / "face.onnx")
    images = np.random.default_rng(1).uniform(-1, 1, (5, 3, 36, 36)).astype(np.float32)
    with torch.no_grad():
        expected = tiny.eval()(torch.from_numpy(images)).numpy()
    found = np.asarray(session.run(None, {"data": images})[0])
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_disagreement_leaves_neither_of_two_files_and_older_ones_as_they_were(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch2onnx, "LARGEST_SINGLE_FILE", 1000)
    monkeypatch.setattr(torch2onnx, "TOLERANCE", -1.0)
    assert main([str(run)]) == 1
    assert "differs from PyTorch by" in capsys.readouterr().err
    assert os.listdir(run) == ["model.pt"]
    for name in ("model.onnx", "model.onnx.data"):
        (run / name).write_bytes(b"old")
    assert main([str(run)]) == 1
    assert [(run / name).read_bytes() for name in ("model.onnx", "model.onnx.data")] == [b"old"] * 2


def test_a_model_in_one_file_takes_the_place_of_one_in_two(run: Path):
    for name in ("model.onnx", "model.onnx.data"):
        (run / name).write_bytes(b"old")
    assert main([str(run)]) == 0
    assert sorted(os.listdir(run)) == ["model.onnx", "model.pt"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in model_names() if name not in (*IN_TWO_FILES, *SAME_GRAPH)]
)
def test_every_network_agrees(name: str, tmp_path: Path):
    report = export_onnx(
        trained(name, 512, 112, {}), ModelMetadata(name), tmp_path / "m.onnx", simplify=True
    )
    assert report.max_relative_difference <= 1e-4


# --- precision, normalization, verification ---


@pytest.fixture(scope="module")
def verification_bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pickle

    pixels = np.random.default_rng(4).integers(0, 256, (40, 36, 36, 3), dtype=np.uint8)
    pixels[1::4] = np.clip(pixels[0::4].astype(int) + 30, 0, 255).astype(np.uint8)  # a same pair
    path = tmp_path_factory.mktemp("sets") / "made_up.bin"
    path.write_bytes(pickle.dumps((list(pixels), [True, False] * 10), protocol=4))
    return path


def test_fp16_is_half_the_size_takes_and_gives_floats_and_says_what_it_cost(
    run: Path, tiny: Backbone, verification_bin: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([str(run)]) == 0
    full = (run / "model.onnx").stat().st_size
    assert main([str(run), "--precision", "fp16", "--verify", str(verification_bin)]) == 0
    printed = capsys.readouterr().out
    assert "made_up: accuracy" in printed
    assert "with the file in fp16" in printed
    weights = 4 * sum(parameter.numel() for parameter in tiny.parameters())
    assert full - (run / "model.onnx").stat().st_size > 0.4 * weights
    session = onnxruntime.InferenceSession(run / "model.onnx")
    assert session.get_inputs()[0].type == session.get_outputs()[0].type == "tensor(float)"
    images = np.random.default_rng(1).uniform(-1, 1, (5, 3, 36, 36)).astype(np.float32)
    with torch.no_grad():
        expected = tiny.eval()(torch.from_numpy(images)).numpy()
    found = np.asarray(session.run(None, {"data": images})[0])
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1)
    assert (cosines / np.linalg.norm(expected, axis=1) > 0.9999).all()


def test_the_first_spelling_of_the_option_to_fold_still_works() -> None:
    for option in ("--fold-normalization", "--fold-normalisation", "--fold"):
        words = torch2onnx._present_options(["model.pt", option])
        assert torch2onnx._parser().parse_args(words).fold_normalization


def test_folded_normalization_is_the_same_network_on_pixels(
    run: Path, tiny: Backbone, verification_bin: Path, capsys: pytest.CaptureFixture[str]
):
    from eval.submission import begins_with_normalization

    assert not begins_with_normalization(onnx.load(_export(run)).graph)
    path = _export(run, "--fold-normalization", "--verify", str(verification_bin))
    assert "with the file in fp32" in capsys.readouterr().out
    model = onnx.load(path)
    assert begins_with_normalization(model.graph)
    names = [node.name for node in model.graph.node[:4]]  # the two, and their constants
    assert {"Sub_normalise", "Mul_normalise"} <= set(names)
    session = onnxruntime.InferenceSession(path)
    facts = session.get_modelmeta().custom_metadata_map
    assert (facts["mean"], facts["std"]) == ("0.0", "1.0")
    pixels = np.random.default_rng(1).integers(0, 256, (5, 3, 36, 36)).astype(np.float32)
    with torch.no_grad():
        expected = tiny.eval()(torch.from_numpy((pixels - 127.5) / 127.5)).numpy()
    found = np.asarray(session.run(None, {"data": pixels})[0])
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def _export(run: Path, *options: str) -> Path:
    assert main([str(run), *options]) == 0
    return run / "model.onnx"


def test_another_accuracy_through_onnxruntime_leaves_no_file(
    run: Path,
    verification_bin: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    class Constant:
        def embed(self, images: torch.Tensor) -> torch.Tensor:
            return torch.arange(len(images) * 2.0).reshape(-1, 2)

    monkeypatch.setattr(torch2onnx, "open_model", lambda path: Constant())
    assert main([str(run), "--verify", str(verification_bin)]) == 1
    assert "on made_up the ONNX model has accuracy" in capsys.readouterr().err
    assert os.listdir(run) == ["model.pt"]


def test_a_verification_set_of_another_size_is_refused_before_the_export(
    run: Path, shared_dir: Path, capsys: pytest.CaptureFixture[str]
):
    path = shared_dir / "data" / "lfw112" / "lfw_part.bin"
    assert main([str(run), "--verify", str(path)]) == 2
    assert "112 x 112 pixels; the model takes 36 x 36" in capsys.readouterr().err
