"""Checks before anything is built, and the folder of a run."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
import shutil
import tempfile
from pathlib import Path

from configs.base import Config
from utils.distributed import DistContext
from utils.errors import UserError

logger = logging.getLogger("train")

RUN_FILES = (
    "model.pt",
    "model_best.pt",
    "model.onnx",
    "model.onnx.data",
    "config.json",
    "metrics.jsonl",
    "metrics_discarded.jsonl",
    "tensorboard",
    "checkpoints",
    "profile",
    "label_map.txt",
)


def check_output(output: str | Path) -> Path:
    """Create the run's folder if needed, and test it by writing a file.

    Returns:
        The folder.

    Raises:
        UserError: It cannot be written, or belongs to a training set.
    """
    folder = Path(output)
    if any(folder.glob("*.rec")):  # label_map.txt there belongs to the set and must not be moved
        raise UserError(
            f"output={str(output)!r} has records in it: choose a folder of the run's own"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"output={str(output)!r} cannot be written ({error.strerror or error}); choose a "
            "folder with output=..."
        ) from error
    return folder


def archive_earlier_run(folder: Path) -> None:
    """Move the files of an earlier run from the folder to previous_<k>/.

    So nothing is overwritten, and files of two runs are not mixed.
    """
    earlier = [folder / name for name in RUN_FILES if (folder / name).exists()]
    if not earlier:
        return
    numbers = itertools.count(1)
    target = next(p for k in numbers if not (p := folder / f"previous_{k}").exists())
    target.mkdir()
    for path in earlier:
        path.rename(target / path.name)
    logger.info("an earlier run's files are now in %s", target)


def share_global_batch(cfg: Config, world_size: int) -> Config:
    """Replace `global_batch_size` by batch_size and gradient_acc.

    Returns:
        The changed config.

    Raises:
        UserError: The ranks cannot share it equally.
    """
    if cfg.global_batch_size is None:
        return cfg
    share, rest = divmod(cfg.global_batch_size, world_size)
    if rest or not share:
        raise UserError(
            f"global_batch_size={cfg.global_batch_size} cannot be shared equally by {world_size} "
            "ranks: choose a multiple of every number of ranks the run may have"
        )
    micro_steps = next(
        k for k in range(1, share + 1) if share % k == 0 and share <= k * cfg.batch_size
    )
    return cfg.replace(batch_size=share // micro_steps, gradient_acc=micro_steps)


def is_classification(cfg: Config) -> bool:
    """Return whether the last layer is a plain classifier of images."""
    return cfg.task == "classification"


def check_wandb(cfg: Config) -> None:
    """Check that wandb is installed if the config uses it.

    Raises:
        UserError: It is not installed.
    """
    if cfg.using_wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "using_wandb=True, but wandb is not installed: pip install wandb, or using_wandb=False"
        )


def check_step_options(cfg: Config, world: DistContext) -> None:
    """Check the options of the step that depend on this machine.

    Raises:
        UserError: This machine cannot serve an option.
    """
    on_gpu = world.device.type == "cuda"
    if cfg.grad_reduce_dtype == "bf16" and not on_gpu and world.world_size > 1:
        raise UserError(
            "grad_reduce_dtype=bf16 needs GPUs (NCCL): on CPUs gradients are added up in fp32 or "
            "fp16"
        )
    compiler = os.environ.get("CXX", "g++")
    if cfg.compile and not on_gpu and shutil.which(compiler) is None:
        raise UserError(
            f"compile=True needs a C++ compiler, and there is no {compiler!r}: install one, name "
            "another in the environment variable CXX, or leave compile out"
        )
    if cfg.compile and on_gpu and importlib.util.find_spec("triton") is None:
        raise UserError("compile=True needs triton: pip install triton, or leave compile out")
    # Triton builds the launchers of its kernels with a C compiler.
    if (
        cfg.compile
        and on_gpu
        and not any(
            map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ("gcc", "clang"))
        )
    ):
        raise UserError(
            "compile=True needs a C compiler for triton, and there is no gcc or clang: install one "
            "(and Python's headers), name another in the environment variable CC, or leave compile "
            "out"
        )
