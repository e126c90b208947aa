"""Shared code of the commands of this folder: model options, ranks, errors, outputs.

Every `python -m eval.X` is `run_command(work)`. It joins the ranks that torchrun started (or none),
reports wrong input in one line on stderr with exit code 2, and leaves the ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from eval.extract import EmbeddingCache, OtherRankFailed
from eval.model import Model, open_model, parse_channels
from utils.cli import cli_command
from utils.distributed import DistContext, destroy_distributed, init_distributed
from utils.errors import UserError
from utils.files import atomic_write
from utils.json_values import without_nan

PLOT_SUFFIXES = (".png", ".pdf", ".svg")


def add_model_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Adds the options that say which model, how images reach it, and where it runs.

    Args:
        parser: Parser to extend.
        several: Whether --model takes several models.
    """
    add = parser.add_argument
    add(
        "--model",
        required=True,
        nargs="+" if several else None,
        help="folder of a run, its model.pt, or an .onnx of any vendor",
    )
    add("--network", help="architecture, for a model.pt that does not say")
    add("--mean", help="of pixels 0..255: one number or R,G,B; needed where the file does not say")
    add("--std", help="likewise")
    add("--color", choices=("RGB", "BGR"), help="channel order the model takes; likewise")
    add("--layout", choices=("NCHW", "NHWC"), help="for an .onnx whose input does not show it")
    add("--input-size", type=int, help="pixels, for an .onnx that does not say")
    add("--output", help="the embedding's name, for an .onnx with several outputs")
    add("--batch-size", type=int, default=64, help="images per call (default 64)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU per rank where there are any)")
    add("--cache", type=Path, help="keep embeddings in this folder, by content, and reuse them")


def open_models(options: argparse.Namespace, world: DistContext) -> list[Model]:
    """Opens the models of `add_model_options` on this rank's device.

    The main rank prints how images reach each of them.
    """
    paths = options.model if isinstance(options.model, list) else [options.model]
    models = []
    for path in paths:
        model = open_model(
            path,
            network=options.network,
            mean=None if options.mean is None else parse_channels("--mean", options.mean),
            std=None if options.std is None else parse_channels("--std", options.std),
            color=options.color,
            layout=options.layout,
            input_size=options.input_size,
            output=options.output,
            device=world.device,
        )
        if world.is_main:
            facts = model.facts
            print(
                f"{path}: {facts['network']}, {facts['input_size']} pixels {facts['color']}, mean "
                f"{facts['mean']}, std {facts['std']} from {facts['preprocessing_from']}",
                file=sys.stderr,
            )
        models.append(model)
    return models


def cache_of(options: argparse.Namespace, model: Model) -> EmbeddingCache | None:
    """Returns the cache that --cache asks for."""
    return None if options.cache is None else EmbeddingCache(options.cache, model.key)


def choose_dist_context(device: str | None) -> DistContext:
    """Joins torchrun's ranks, on the device that --device asks for.

    Raises:
        UserError: PyTorch cannot use the device, or several ranks share one GPU number.
    """
    if device is not None:
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:  # AssertionError: a PyTorch without CUDA
            usable = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
            raise UserError(
                f"--device {device}: PyTorch cannot use such a device here; give one of "
                f"{', '.join(usable)}, or leave it out"
            ) from error
    if device is None or device in ("cpu", "cuda"):
        return init_distributed(device or "auto")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"--device {device} with several ranks: each takes the GPU of its number; give "
            "--device cuda or cpu"
        )
    return DistContext(0, 0, 1, torch.device(device))


def run_command(work: Callable[[], int]) -> int:
    """Returns the exit code of `work()`, as utils/cli.py defines it, and leaves the ranks."""
    try:
        return cli_command(also=(OtherRankFailed, torch.OutOfMemoryError))(work)()
    finally:
        destroy_distributed()


def check_outputs(files: dict[str, Path | None], plots: Iterable[str] = ()) -> None:
    """Makes the folders of output files and checks that all can be written, before any work.

    Args:
        files: {option: file or None}.
        plots: Options whose file must be a figure's.

    Raises:
        UserError: A file has the wrong suffix, is a folder, or cannot be written.
    """
    for option, file in files.items():
        if file is not None and option in plots and file.suffix not in PLOT_SUFFIXES:
            raise UserError(f"{option} {file}: the name must end in {', '.join(PLOT_SUFFIXES)}")
    for option, file in files.items():
        if file is None:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise UserError(f"{option} {file} is a folder; give the name of a file to write")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise UserError(f"{option} {file} is not writable; give another name, or allow it")


def write_json(content: Any, path: Path) -> None:
    """Writes JSON atomically; NaN and infinities, which JSON does not have, become null."""
    with atomic_write(path) as file:
        file.write((json.dumps(without_nan(content), indent=2) + "\n").encode())


def parse_rates(text: str) -> list[float]:
    """Parses `1e-3,1e-4` to numbers in [0, 1], for argparse."""
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = [-1.0]
    if not all(0 <= rate <= 1 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r}: rates in [0, 1], for example 1e-3,1e-4")
    return rates


def table(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows as text, the first column aligned left and the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def model_name(path: str) -> str:
    """Returns the name of a model in tables and files: its run, or the file's name."""
    given = Path(path).resolve()
    if given.is_dir():
        return given.name
    return given.parent.name if given.stem in ("model", "backbone") else given.stem
