"""model.pt is a plain state dict for everyone, knows its network, and never runs code or lies."""

from __future__ import annotations

import os
import pickle
import resource
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from backbones import get_model, model_names
from backbones.weights import (
    ModelMetadata,
    WeightsError,
    load_matching,
    load_model,
    read_state_dict,
    save_model,
)

SIZES: dict[str, Any] = {"num_features": 16, "input_size": 32}
METADATA = ModelMetadata(
    "r_nano", **SIZES, step=120, epoch=3, config="demo", trained_with="arcshard 0.1.0"
)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return get_model("r_nano", **SIZES).eval()


@pytest.fixture
def run(net: nn.Module, tmp_path: Path) -> Path:
    """A run folder with the net's model.pt."""
    save_model(tmp_path / "run" / "model.pt", net, METADATA)
    return tmp_path / "run"


def assert_same_state(found, expected):
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_run_folder_gives_back_the_network_and_its_metadata(net: nn.Module, run: Path):
    loaded, metadata = load_model(run)
    assert metadata == METADATA
    assert not loaded.training
    assert_same_state(loaded.state_dict(), net.state_dict())
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in net.named_parameters() if p.requires_grad}
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), net(images))


def test_a_foreign_tool_reads_a_plain_state_dict(net: nn.Module, run: Path):
    state = torch.load(run / "model.pt", weights_only=True)
    assert type(state) is OrderedDict
    assert_same_state(state, net.state_dict())
    get_model("r_nano", **SIZES).load_state_dict(state)


def test_every_saved_tensor_is_contiguous_and_owns_its_storage(tmp_path: Path):
    whole = torch.arange(24.0).reshape(2, 3, 2, 2)
    state = {
        "a.weight": whole.to(memory_format=torch.channels_last),
        "a.bias": whole[0, 0, 0],  # a view of 2 of 24 numbers
    }
    save_model(tmp_path / "m.pt", state, METADATA)
    loaded = torch.load(tmp_path / "m.pt", weights_only=True)
    assert all(tensor.is_contiguous() for tensor in loaded.values())
    assert loaded["a.bias"].untyped_storage().nbytes() == 8
    assert torch.equal(loaded["a.weight"], whole)


def test_saving_a_wrapped_network_takes_the_prefixes_off(net: nn.Module, tmp_path: Path):
    state = {f"module._orig_mod.{key}": tensor for key, tensor in net.state_dict().items()}
    save_model(tmp_path / "m.pt", state, METADATA)
    assert_same_state(torch.load(tmp_path / "m.pt", weights_only=True), net.state_dict())


@pytest.mark.parametrize("room", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_save_that_the_disk_refuses_is_an_os_error_and_leaves_the_old_file_and_nothing_else(
    net: nn.Module, run: Path, room: float
):
    before = (run / "model.pt").read_bytes()
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room * len(before)), hard))
    try:
        with pytest.raises(OSError, match="File too large"):  # wherever torch's writer meets it
            save_model(run / "model.pt", net, METADATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / "model.pt").read_bytes() == before
    assert os.listdir(run) == ["model.pt"]


def test_an_error_of_serializing_that_is_not_the_disk_s_stays_what_it_is(
    net: nn.Module, run: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(state, file):
        raise RuntimeError("not the disk")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="not the disk"):
        save_model(run / "model.pt", net, METADATA)
    assert os.listdir(run) == ["model.pt"]


def test_metadata_that_would_make_the_file_unreadable_is_refused(net: nn.Module, tmp_path: Path):
    metadata = ModelMetadata("r_nano", step=np.int64(3))  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=r"step=np.int64.3. is a int64: make it"):
        save_model(tmp_path / "m.pt", net, metadata)
    assert not (tmp_path / "m.pt").exists()


def test_options_of_the_network_are_kept(tmp_path: Path):
    options: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    net = get_model("vit_t", **SIZES, **options)
    save_model(tmp_path / "m.pt", net, ModelMetadata("vit_t", **SIZES, options=options))
    loaded, _ = load_model(tmp_path / "m.pt")
    assert_same_state(loaded.state_dict(), net.state_dict())


@pytest.mark.parametrize(
    ("prefix", "wrap"),
    [
        ("", lambda state: state),
        ("module.", lambda state: state),
        ("module.backbone.", lambda state: {"state_dict": state, "epoch": 3}),
        ("_orig_mod.module.", lambda state: {"state_dict_backbone": state, "global_step": 9}),
        ("features.module.", lambda state: {"state_dict": state, "epoch": 3, "best": 0.5}),
        ("module.features.module.", lambda state: {"state_dict": state, "arch": "mbf"}),
    ],
)
def test_a_foreign_file_loads_once_its_network_is_named(tmp_path: Path, prefix: str, wrap):
    net = get_model("mbf", num_features=24)
    state = {f"{prefix}{key}": tensor for key, tensor in net.state_dict().items()}
    torch.save(wrap(state), tmp_path / "model.pth.tar")
    loaded, metadata = load_model(tmp_path / "model.pth.tar", network="mbf")
    assert_same_state(loaded.state_dict(), net.state_dict())
    assert metadata == ModelMetadata("mbf", num_features=24)  # the size is read off the weights


def test_the_classes_in_a_checkpoint_of_torchshard_are_left_out(tmp_path: Path) -> None:
    state = get_model("r18").state_dict()
    content = {f"module.{key}": value for key, value in state.items()}
    content["module.arcface_linear.weight"] = torch.randn(512, 11)
    torch.save(
        {"epoch": 3, "arch": "iresnet18", "state_dict": content, "optimizer": {"state": {}}},
        tmp_path / "checkpoint.pth.tar",
    )
    loaded, _ = load_model(tmp_path / "checkpoint.pth.tar", network="r18")
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "features.module."])
def test_a_checkpoint_of_a_trainer_keeps_the_layer_that_is_called_features(
    net: nn.Module, tmp_path: Path, prefix: str
):
    network = get_model("r_nano", num_features=16)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    torch.save(
        {
            "epoch": 7,
            "best_acc1": torch.tensor(0.5),
            "optimizer": optimizer.state_dict(),
            "state_dict": {f"{prefix}{k}": v for k, v in network.state_dict().items()},
        },
        tmp_path / "checkpoint.pth.tar",
        _use_new_zipfile_serialization=False,
    )
    loaded, _ = load_model(tmp_path / "checkpoint.pth.tar", network="r_nano")
    assert_same_state(loaded.state_dict(), network.state_dict())
    report = load_matching(get_model("r_nano", num_features=16), tmp_path / "checkpoint.pth.tar")
    assert len(report.matched) == len(network.state_dict())


def test_keys_of_a_checkpoint_that_are_missing_or_too_many_are_named(tmp_path: Path):
    state = {f"features.module.{k}": v for k, v in get_model("mbf").state_dict().items()}
    missing = list(state)[-1]
    del state[missing]
    state["classifier.weight"] = torch.zeros(2, 512)
    torch.save({"state_dict": state}, tmp_path / "checkpoint.pth.tar")
    plain = missing.removeprefix("features.module.")
    with pytest.raises(
        WeightsError,
        match=rf"1 are not in the file: {plain}; 1 are not in the model: classifier\.weight",
    ):
        load_model(tmp_path / "checkpoint.pth.tar", network="mbf")


def test_a_foreign_file_without_a_name_gets_the_list_of_names(net: nn.Module, tmp_path: Path):
    torch.save(net.state_dict(), tmp_path / "m.pt")
    with pytest.raises(WeightsError, match=f"--network.*{', '.join(model_names())}"):
        load_model(tmp_path / "m.pt")
    with pytest.raises(ValueError, match="Did you mean 'r_nano'"):
        load_model(tmp_path / "m.pt", network="r_nani")


def test_half_precision_weights_come_back_as_fp32(tmp_path: Path):
    net = get_model("mbf", num_features=24).half()
    torch.save(net.state_dict(), tmp_path / "m.pt")
    loaded, _ = load_model(tmp_path / "m.pt", network="mbf")
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}


def test_what_contradicts_the_file_is_named(run: Path):
    with pytest.raises(WeightsError, match="holds the network 'r_nano', not 'r18'"):
        load_model(run, network="r18")
    with pytest.raises(WeightsError, match="embeddings of size 16, not 512"):
        load_model(run, num_features=512)


def test_weights_of_another_network_are_named_by_their_first_keys(run: Path):
    state = torch.load(run / "model.pt", weights_only=True)
    torch.save(dict(state), run / "plain.pt")
    with pytest.raises(WeightsError, match=r"patch_embed.proj.weight.*in the file: conv1.weight"):
        load_model(run / "plain.pt", network="vit_t")
    with pytest.raises(
        WeightsError,
        match=r"another shape: conv1.weight \(file \[16, 3, 3, 3\], model \[64, 3, 3, 3\]\).*"
        r"36 are not in the file: layer1.1.bn1.weight, .*and 32 more",
    ):
        load_model(run / "plain.pt", network="r18")
    state["head.weight"] = state.pop("fc.bias")
    save_model(run / "model.pt", state, METADATA)
    with pytest.raises(WeightsError, match=r"not in the file: fc.bias.*not in the model: head.wei"):
        load_model(run)


class Hostile:
    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return os.mkdir, (str(self.flag),)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: _pickle(content, path)])
def test_a_hostile_file_is_refused_and_does_not_run(tmp_path: Path, write):
    write({"conv1.weight": Hostile(tmp_path / "flag")}, tmp_path / "m.pt")
    with pytest.raises(WeightsError, match=r"refused: unpickling it would call \w+\.mkdir"):
        load_model(tmp_path / "m.pt", network="r18")
    assert not (tmp_path / "flag").exists()


def _pickle(content, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


NEWER_PICKLE = pickle.dumps({"conv1.weight": [1.0]}, protocol=5)


@pytest.mark.parametrize("damage", [b"", b"not a model", NEWER_PICKLE, b"PK\x03\x04 no zip", None])
def test_a_damaged_file_is_refused(run: Path, damage: bytes | None):
    file = run / "model.pt"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage is None else damage)
    with pytest.raises(WeightsError, match=r"model.pt is refused: .* damaged \(\w+\)\. Copy") as e:
        load_model(run)
    assert_in_our_words(e.value)


def assert_in_our_words(error: WeightsError) -> None:
    """Torch's own text advises to load the file without its protection."""
    for words in ("weights_only", "PyTorch", "torch.load", "trust", "\n"):
        assert words not in str(error)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (
            lambda path: torch.save(nn.Linear(1, 1), path),
            r"would call torch\.nn\.modules\.linear\.",
        ),
        (
            lambda path: torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path),
            "TorchScript program",
        ),
    ],
    ids=["module", "program"],
)
def test_a_refusal_says_in_our_words_what_to_save_instead(tmp_path: Path, write, words: str):
    write(tmp_path / "m.pt")
    with pytest.raises(
        WeightsError, match=rf"refused: .*{words}.*torch\.save\(net\.state_dict"
    ) as e:
        read_state_dict(tmp_path / "m.pt")
    assert_in_our_words(e.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(3), "holds Tensor, not a state dict"),
        ({}, "holds dict, not a state dict"),
        ({"epoch": 3, "net": {}}, "under 'epoch' it has int"),
        ({"module.a": torch.ones(1), "a": torch.ones(1)}, "'a' twice"),
    ],
)
def test_what_is_no_state_dict_is_named(tmp_path: Path, content, words: str):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(WeightsError, match=words):
        read_state_dict(tmp_path / "m.pt")


def test_a_missing_file_is_not_a_broken_one(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"has no model\.pt: give the output folder"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file or run folder .*nothing\.pt"):
        load_model(tmp_path / "nothing.pt")


def test_matching_loads_what_fits_in_place_and_reports_the_rest(net: nn.Module, run: Path):
    other = get_model("r_nano", num_features=8, input_size=32)
    before = dict(other.named_parameters())
    report = load_matching(other, run)
    assert "conv1.weight" in report.matched
    assert ("fc.weight", (16, 512), (8, 512)) in report.skipped
    assert (report.missing, report.unexpected) == ((), ())
    assert all(parameter is before[name] for name, parameter in other.named_parameters())
    assert torch.equal(other.state_dict()["conv1.weight"], net.state_dict()["conv1.weight"])
    assert str(report).startswith(
        "145 tensors fit; 6 have another shape: fc.weight (file [16, 512]"
    )


def test_matching_nothing_is_an_error(run: Path):
    with pytest.raises(WeightsError, match=r"nothing in .* fits the backbone, so this would train"):
        load_matching(get_model("mbf"), run)
