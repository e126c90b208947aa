"""MACs meet the published "GFLOPs", and nothing is computed to find them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from backbones import get_model
from backbones.macs import Macs, count_macs
from scripts import flops

# As published with the networks, to the digits given there.
PUBLISHED = {
    "r18": "2.6",
    "r50": "6.3",
    "r100": "12.1",
    "r200": "23.5",
    "vit_t": "1.5",
    "vit_s": "5.7",
    "vit_b": "11.4",
    "vit_l_dp005_mask_005": "25.3",
    "mbf": "0.45",
}


@pytest.mark.parametrize("network", PUBLISHED)
def test_published_gflops_are_our_gmacs(network):
    published = PUBLISHED[network]
    digits = len(published.partition(".")[2])
    found = flops.describe(network, {})
    assert f"{found['as_published'] / 1e9:.{digits}f}" == published
    assert found["macs"] <= found["as_published"] < 1.03 * found["macs"]
    assert found["flops"] == 2 * found["macs"]
    kinds = ("convolution", "linear", "attention")
    assert found["macs"] == sum(found[f"macs_{kind}"] for kind in kinds)


def test_each_kind_is_counted_by_its_formula():
    with torch.device("meta"):
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.PReLU(8),
            nn.Flatten(),
            nn.Linear(8 * 100, 7),
        )
    macs = count_macs(network, 10)
    assert macs == Macs(convolution=100 * 8 * 27, linear=800 * 7, elements=3 * 800)
    assert macs.total == 100 * 8 * 27 + 800 * 7
    assert macs.as_published == macs.total + 2400
    with torch.device("meta"):
        vit = get_model("vit_t")
    # two products of 144 x 144 tokens, 256 wide, in 12 blocks
    assert count_macs(vit, 112).attention == 12 * 2 * 144 * 144 * 256


def test_masking_is_a_matter_of_training_and_the_mode_comes_back():
    with torch.device("meta"):
        vit = get_model("vit_t", mask_ratio=0.5)
    assert count_macs(vit, 112).total == flops.describe("vit_t", {"mask_ratio": 0.0})["macs"]
    assert vit.training


def test_a_network_that_holds_memory_is_refused():
    with pytest.raises(ValueError, match=r'build it under torch.device\("meta"\)'):
        count_macs(nn.Linear(3, 3), 112)


def test_a_product_of_an_unknown_kind_is_an_error():
    class Odd(nn.Module):
        def forward(self, images):
            return torch.nn.functional.conv_transpose2d(
                images, torch.empty(3, 1, 2, 2, device="meta")
            ).flatten(1) @ torch.empty(113 * 113, 2, device="meta")

    assert count_macs(Odd(), 112).linear == 113 * 113 * 2  # the transposed one is a convolution

    class Odder(nn.Module):
        def forward(self, images):
            scale = torch.ones((), device="meta")
            left = torch.empty(16, 16, device="meta", dtype=torch.float8_e4m3fn)
            return torch._scaled_mm(left, left.t(), scale, scale)

    with pytest.raises(ValueError, match="_scaled_mm has products, but"):
        count_macs(Odder(), 112)


def test_the_command_prints_a_table_and_json(capsys):
    assert flops.main(["r18", "mbf", "num_features=128"]) == 0
    text = capsys.readouterr().out
    assert "GMACs" in text
    assert "1 MAC = 2 FLOPs" in text
    assert flops.main(["r18", "--json", "input_size=64"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["macs"] < 1e9
    for words, error in (
        (["r51"], "there is no backbone 'r51'"),
        (["r50", "input_size=big"], "input_size=big: a number"),
        (["input_size=112"], "no network named"),
    ):
        assert flops.main(words) == 2
        assert error in capsys.readouterr().err
