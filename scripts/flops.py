"""Count a network's work: MACs and FLOPs of one image, and parameters.

    python scripts/flops.py r50
    python scripts/flops.py r18 r50 r100 vit_b [input_size=112] [num_features=512] [--json]

FLOPs are 2 x MACs. The "GFLOPs" published with these networks are GMACs, with two for every element
of a batch norm and one for every element of a PReLU: the column "as published". The counts are for
inference (a ViT masks no patches then) and include convolutions, linear layers and attention's
products, but not norms, activations, softmax and additions. A training step is about three times
one forward pass. Nothing is computed and no weights are made.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbones import get_model
from backbones.macs import count_macs
from eval.cli import run_command, table
from utils.errors import UserError

HEADINGS = (
    "network",
    "M parameters",
    "GMACs",
    "GFLOPs",
    "as published",
    "convolution GMACs",
    "linear GMACs",
    "attention GMACs",
)


def describe(network: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns parameters, MACs (by kind too) and FLOPs of one image.

    Args:
        network: Name of the network.
        options: Options of `backbones.get_model`.

    Raises:
        ValueError: There is no such network or option.
    """
    with torch.device("meta"):
        model = get_model(network, **options)
    macs = count_macs(model, model.input_size, model.in_channels)
    return {
        "network": network,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": macs.total,
        "flops": 2 * macs.total,
        "as_published": macs.as_published,
        **{f"macs_{kind}": value for kind, value in macs._asdict().items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="flops.py", description="MACs, FLOPs (2 x MACs) and parameters per image."
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="NETWORK|key=value",
        help="networks, and options of backbones.get_model for all of them",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: _print(options.words, options.json))


def _print(words: Sequence[str], as_json: bool) -> int:
    options = dict(_option(word) for word in words if "=" in word)
    networks = [word for word in words if "=" not in word]
    if not networks:
        raise UserError(f"{' '.join(words)}: no network named; for example: flops.py r50")
    found = [describe(network, options) for network in networks]
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    rows = [
        [
            one["network"],
            f"{one['parameters'] / 1e6:.2f}",
            *(
                f"{one[key] / 1e9:.2f}"
                for key in (
                    "macs",
                    "flops",
                    "as_published",
                    "macs_convolution",
                    "macs_linear",
                    "macs_attention",
                )
            ),
        ]
        for one in found
    ]
    print(table([HEADINGS, *rows]))
    print('per image, one forward pass; 1 MAC = 2 FLOPs; the published "GFLOPs" are GMACs')
    return 0


def _option(word: str) -> tuple[str, Any]:
    key, _, text = word.partition("=")
    try:
        return key, ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        raise UserError(f"{word}: a number or True/False is needed after '='") from error


if __name__ == "__main__":
    sys.exit(main())
