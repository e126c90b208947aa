"""Every backbone is the published network, in two halves that work in any dtype and size."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from backbones import Backbone, get_model, model_names
from backbones.vit import DropPath, _drop_patches, _restore_patches
from tests.helpers import GOLDEN
from tests.run_helpers import golden_weights

GOLDEN_NETWORKS = ["mbf", "r18", "r34", "r50", "r100", "vit_t", "vit_s"]

# Published GMACs at 112 x 112, where there are any.
PUBLISHED_GMACS = {
    "mbf": 0.45,
    "r18": 2.6,
    "r34": 4.5,
    "r50": 6.3,
    "r100": 12.1,
    "r200": 23.5,
    "vit_t": 1.5,
    "vit_s": 5.7,
    "vit_b": 11.4,
    "vit_l_dp005_mask_005": 25.3,
}

# One network per family, as small as it goes: (name, arguments).
TINY_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = {
    "iresnet": ("r_nano", {"input_size": 32}),
    "mobilefacenet": ("mbf", {"input_size": 32}),
    "vit": ("vit_t", {"input_size": 36, **TINY_VIT}),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def small(family: str, **changes) -> Backbone:
    """The family's small network, with running statistics that are not 0 and 1."""
    name, arguments = SMALL[family]
    torch.manual_seed(0)
    net = get_model(name, num_features=16, **{**arguments, **changes})
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.get_buffer("running_mean"), std=0.1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
    return net


def images_for(net: Backbone, batch: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, net.in_channels, net.input_size, net.input_size, generator=generator)


@pytest.mark.parametrize("name", GOLDEN_NETWORKS)
def test_keys_shapes_and_outputs_are_the_published_ones(name: str):
    folder = GOLDEN / "backbones"
    published = json.loads((folder / f"{name}.json").read_text())
    with torch.device("meta"):
        net = get_model(name)
    state = net.state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == published["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == published["parameters"]

    net.load_state_dict(golden_weights(state), assign=True)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 112, 112)).astype(np.float32)
    with torch.no_grad():
        found = net.eval()(torch.from_numpy(images)).numpy()
    with np.load(folder / f"{name}.npz") as file:
        expected = file["output"]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("name", PUBLISHED_GMACS)
def test_cost_is_the_published_one(name: str):
    with torch.device("meta"):
        net, images = get_model(name).eval(), torch.empty(1, 3, 112, 112)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(images)
    gmacs = counter.get_total_flops() / 2e9
    assert gmacs == pytest.approx(PUBLISHED_GMACS[name], rel=0.03)  # they also count norms


@pytest.mark.parametrize(
    ("name", "stage", "blocks", "weight", "shape"),
    [
        ("r200", "layer1", 6, "conv2.weight", (64, 64, 3, 3)),
        ("r200", "layer2", 26, "conv2.weight", (128, 128, 3, 3)),
        ("r200", "layer3", 60, "conv2.weight", (256, 256, 3, 3)),
        ("r200", "layer4", 6, "conv2.weight", (512, 512, 3, 3)),
        ("r2060", "layer1", 3, "conv2.weight", (64, 64, 3, 3)),
        ("r2060", "layer2", 128, "conv2.weight", (128, 128, 3, 3)),
        ("r2060", "layer3", 896, "conv2.weight", (256, 256, 3, 3)),
        ("r2060", "layer4", 3, "conv2.weight", (512, 512, 3, 3)),
        ("mbf_large", "layers.1.layers", 2, "layers.2.layers.0.weight", (256, 128, 1, 1)),
        ("mbf_large", "layers.3.layers", 8, "layers.2.layers.0.weight", (256, 128, 1, 1)),
        ("mbf_large", "layers.5.layers", 12, "layers.2.layers.0.weight", (512, 256, 1, 1)),
        ("mbf_large", "layers.7.layers", 4, "layers.2.layers.0.weight", (512, 256, 1, 1)),
        ("vit_b", "blocks", 24, "attn.qkv.weight", (1536, 512)),
        ("vit_l_dp005_mask_005", "blocks", 24, "attn.qkv.weight", (2304, 768)),
        ("vit_h", "blocks", 48, "attn.qkv.weight", (3072, 1024)),
    ],
)
def test_every_stage_has_its_published_number_of_blocks(
    name: str, stage: str, blocks: int, weight: str, shape: tuple[int, ...], on_meta: dict
):
    if name not in on_meta:
        with torch.device("meta"):
            on_meta[name] = get_model(name).state_dict()
    assert tuple(on_meta[name][f"{stage}.{blocks - 1}.{weight}"].shape) == shape
    assert f"{stage}.{blocks}.{weight}" not in on_meta[name]


@pytest.fixture(scope="module")
def on_meta() -> dict[str, dict[str, torch.Tensor]]:
    """State dicts without storage, by name, built once."""
    return {}


@pytest.mark.parametrize(
    ("name", "drop_path_rate", "mask_ratio"),
    [
        ("vit_t", 0.1, 0.1),
        ("vit_t_dp005_mask0", 0.05, 0.0),
        ("vit_s", 0.1, 0.1),
        ("vit_s_dp005_mask_0", 0.05, 0.0),
        ("vit_b", 0.1, 0.1),
        ("vit_b_dp005_mask_005", 0.05, 0.05),
        ("vit_l_dp005_mask_005", 0.05, 0.05),
        ("vit_h", 0.1, 0.0),
    ],
)
def test_vit_names_mean_their_stochastic_depth_and_mask(
    name: str, drop_path_rate: float, mask_ratio: float
):
    with torch.device("meta"):
        net = get_model(name)
    rates = [module.rate for module in net.modules() if isinstance(module, DropPath)]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(drop_path_rate)
    assert np.diff(rates) == pytest.approx(drop_path_rate / (len(rates) - 1))
    assert net.mask_ratio == mask_ratio


@pytest.mark.parametrize("name", [name for name in model_names() if name != "r2060"])
def test_every_name_builds_and_says_its_sizes(name: str):
    with torch.device("meta"):
        net = get_model(name, num_features=256)
    assert (net.num_features, net.input_size, net.in_channels) == (256, 112, 3)
    assert net.state_dict()[net.EMBEDDING_KEY].shape == (256,)
    assert net.state_dict()[net.STEM_KEY].shape[1] == 3


@pytest.mark.parametrize("family", SMALL)
def test_forward_is_its_two_halves(family: str):
    net = small(family).eval()
    images = images_for(net)
    with torch.no_grad():
        halves = net.forward_embedding(net.forward_features(images))
        assert torch.equal(net(images), halves)
    assert halves.shape == (4, 16)


@pytest.mark.parametrize("family", SMALL)
def test_float64_and_channels_last_give_the_same_embeddings(family: str):
    net = small(family).eval()
    images = images_for(net)
    with torch.no_grad():
        expected = net(images)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        in_other_layout = net(images.contiguous(memory_format=torch.channels_last))
        in_float64 = net.double()(images.double())
    scale = expected.abs().max().item()
    assert in_float64.dtype == torch.float64
    torch.testing.assert_close(in_other_layout, expected, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(in_float64.float(), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("family", SMALL)
def test_the_body_runs_under_autocast_and_the_end_in_fp32(family: str):
    net = small(family).train()
    with torch.autocast("cpu", torch.bfloat16):
        features = net.forward_features(images_for(net))
    embeddings = net.forward_embedding(features.float())
    embeddings.square().mean().backward()
    assert embeddings.dtype == torch.float32
    trained = [p for p in net.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("changes", [{"input_size": 50}, {"in_channels": 1}])
def test_other_sizes_work(family: str, changes: dict):
    net = small(family, **changes).eval()
    with torch.no_grad():
        assert net(images_for(net, 2)).shape == (2, 16)


@pytest.mark.parametrize("family", SMALL)
def test_an_image_of_the_wrong_size_is_named(family: str):
    net = small(family)
    with pytest.raises(ValueError, match=rf"\[2, 3, 40, 40\].*takes \[N, 3, {net.input_size}, "):
        net(torch.zeros(2, 3, 40, 40))


@pytest.mark.parametrize("family", SMALL)
def test_checkpointing_changes_neither_gradients_nor_running_statistics(family: str):
    results = []
    for checkpointing in (False, True):
        net = small(family, gradient_checkpointing=checkpointing).double().train()
        torch.manual_seed(2)  # stochastic depth and masking must draw the same both times
        net(images_for(net).double()).square().sum().backward()
        gradients = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
        results.append((gradients, dict(net.named_buffers())))
    for kept, recomputed in zip(*results, strict=True):
        assert kept.keys() == recomputed.keys()
        for name in kept:
            torch.testing.assert_close(recomputed[name], kept[name], msg=name)


def test_checkpointing_keeps_fewer_activations():
    kept = []
    for checkpointing in (False, True):
        net = small("iresnet", gradient_checkpointing=checkpointing).train()
        sizes = []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            net(images_for(net))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_the_scale_of_the_last_iresnet_norm_is_one_and_not_trained():
    net = small("iresnet")
    assert torch.equal(net.features.weight, torch.ones(16))
    assert not net.features.weight.requires_grad
    assert net.features.bias.requires_grad


def test_iresnet_starts_as_published():
    net = get_model("r_nano")
    spread = torch.cat([m.weight.flatten() for m in net.modules() if isinstance(m, nn.Conv2d)])
    assert spread.mean().item() == pytest.approx(0, abs=2e-3)
    assert spread.std().item() == pytest.approx(0.1, rel=0.02)
    zeroed = get_model("r_nano", zero_init_residual=True)
    assert all(not block.bn2.weight.any() for block in zeroed.layer2)


def test_vit_starts_as_published():
    net = get_model("vit_t")
    for weight in (net.pos_embed, net.blocks[3].attn.qkv.weight, net.feature[0].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not net.blocks[3].mlp.fc1.bias.any()


def test_dropout_is_only_before_the_fully_connected_layer():
    net = small("iresnet", dropout=0.4).train()
    features = torch.ones(2, 128, 2, 2)
    seen = []
    net.fc.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    net.forward_embedding(features)
    share = (seen[0] == 0).double().mean().item()
    assert share == pytest.approx(0.4, abs=0.06)
    assert [m for m in net.modules() if isinstance(m, nn.Dropout)] == [net.dropout]


def test_dropped_patches_come_back_in_their_places_as_the_mask_token():
    tokens = torch.arange(3 * 10 * 4.0).reshape(3, 10, 4)
    torch.manual_seed(0)
    kept, order = _drop_patches(tokens, 0.25)
    assert kept.shape == (3, 7, 4)  # int(10 * 0.75)
    mask_token = torch.full((1, 1, 4), -1.0)
    restored = _restore_patches(kept, mask_token, order)
    masked = (restored == -1).all(dim=2)
    assert masked.sum(dim=1).tolist() == [3, 3, 3]
    assert torch.equal(restored[~masked], tokens[~masked])
    assert not torch.equal(masked[0], masked[1])  # every sample draws its own


def test_masking_is_for_training_only():
    net = small("vit", mask_ratio=0.5, drop_path_rate=0.0)
    images = images_for(net)
    with torch.no_grad():
        assert torch.equal(net.eval().forward_features(images), net.forward_features(images))
        net.train()
        assert not torch.equal(net.forward_features(images), net.forward_features(images))


def test_a_mask_token_that_is_never_used_is_not_trained():
    assert small("vit", mask_ratio=0.1).mask_token.requires_grad
    assert not small("vit", mask_ratio=0.0).mask_token.requires_grad  # DDP would wait for it


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    dropped = DropPath(0.25).train()(torch.ones(4000, 2, 3))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert torch.equal(dropped.amax(dim=(1, 2)), dropped.amin(dim=(1, 2)))
    assert dropped.mean().item() == pytest.approx(1, abs=0.04)


def test_a_misspelt_name_gets_the_list_and_the_nearest():
    with pytest.raises(ValueError, match=r"'vit_bb'.*Did you mean 'vit_b'.*r18, r34.*vit_h"):
        get_model("vit_bb")


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("r18", {"num_features": 0}, "num_features=0 must be an integer of at least 1"),
        ("r18", {"input_size": 8}, "input_size=8 must be an integer of at least 16"),
        ("r18", {"in_channels": 1.0}, "in_channels=1.0 must be an integer"),
        ("r18", {"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ("mbf", {"dropout": 0.4}, "MobileFaceNet has no dropout layer: pass 0"),
        ("vit_t", {"dropout": 0.4}, "ViT has no dropout layer: pass 0"),
        ("vit_t", {"patch_size": 200}, "patch_size=200 must lie in 1..input_size=112"),
        ("vit_t", {"mask_ratio": 1.0}, "mask_ratio=1.0 must be at least 0 and below 1"),
        ("vit_t", {"num_heads": 7}, "embed_dim=256 is not a multiple of num_heads=7"),
        ("r18", {"mask_ratio": 0.1}, "no option mask_ratio.*it takes: zero_init_residual"),
        ("r18", {"fp16": True}, "no option fp16.*Precision is the trainer's choice"),
    ],
)
def test_an_argument_that_does_not_fit_is_explained(name: str, arguments: dict, words: str):
    with pytest.raises(ValueError, match=words):
        get_model(name, **arguments)


def test_r_nano_is_small_enough_to_train_on_a_laptop():
    with torch.device("meta"):
        net, images = get_model("r_nano").train(), torch.empty(1, 3, 112, 112)
    with FlopCounterMode(display=False) as counter:
        net.forward_features(images)
    assert counter.get_total_flops() / 2e9 < 0.15
    assert math.isclose(sum(p.numel() for p in net.parameters()), 3.6e6, rel_tol=0.01)
