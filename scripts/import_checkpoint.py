"""Import a run of arcface_torch, so that it continues here with class centers and momentum.

    python scripts/import_checkpoint.py OLD_RUN CONFIG [key=value ...] [--world-size N] [--epoch E]

OLD_RUN is its output folder with checkpoint_gpu_<rank>.pt of all ranks (save_all_states=True; from
several machines: copied together). Older versions wrote rank_<rank>_softmax_weight.pt beside
backbone.pth; then --epoch says how many epochs were finished. CONFIG and its words are those of the
run that shall continue, output= included; a checkpoint is written into its folder. Then:

    torchrun --nproc_per_node=N train_v2.py CONFIG [key=value ...] resume=auto

N need not be the old number of ranks, but --world-size has to be N (default: the old number),
because the global batch depends on it. Imported are weights, class centers, momentum or Adam's
averages of both, and the finished epochs. The old files do not hold the loss scale, RNG states and
best accuracy; the order of the data and the learning rate follow from the epoch. Batch norm
continues from the mean of the ranks' statistics. If the head sampled its classes, the old files
have no complete momentum: it starts at zero, and the command says so.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbones.weights import WeightsError
from configs.base import Config
from training.build import TrainComponents, build, facts_of
from training.checkpoint.arcface_torch import ArcfaceTorchRun, read_run
from training.checkpoint.checkpointer import (
    FOLDER,
    Checkpointer,
    CheckpointError,
    RankGroup,
    list_checkpoints,
)
from training.divergence import DivergenceMonitor
from training.setup import check_output
from training.state import Progress, RunState
from utils.cli import cli_command
from utils.config import load_config
from utils.distributed import DistContext

logger = logging.getLogger("import_checkpoint")


def import_checkpoint(
    old: Path, cfg: Config, world_size: int | None = None, epoch: int | None = None
) -> Path:
    """Writes a checkpoint of `cfg`'s run from the files of an old one; returns its folder.

    Args:
        old: Folder of the old run.
        cfg: Config of the run that shall continue.
        world_size: Number of its ranks; None means as many as the old run had.
        epoch: Finished epochs, if the old files do not say.

    Raises:
        WeightsError: The old files are incomplete or do not fit the config.
        UserError: The output folder cannot be used.
        CheckpointError: The folder has checkpoints already, or writing failed.
    """
    folder = check_output(cfg.output or "") / FOLDER
    if list_checkpoints(folder):
        raise CheckpointError(f"{folder} has checkpoints already: choose another output=...")
    run = read_run(old)
    if run.epoch is None and epoch is None:
        raise WeightsError(f"the files in {old} do not say how many epochs are done: give --epoch")
    if run.epoch is not None and epoch not in (None, run.epoch):
        raise WeightsError(f"the files in {old} are of epoch {run.epoch}, not {epoch}")
    finished = epoch if run.epoch is None else run.epoch
    assert finished is not None
    ranks = world_size or run.world_size
    # This process builds the whole run: one rank with the global batch of all ranks.
    world = DistContext(0, 0, 1, torch.device("cpu"))
    parts = build(
        cfg.replace(
            batch_size=cfg.global_batch_size or cfg.batch_size * cfg.gradient_acc * ranks,
            gradient_acc=1,
            global_batch_size=None,
            val_targets=[],
            device="cpu",
            num_workers=0,
            dali=False,
            init_backbone=None,
            teacher=None,
            ema_decay=0.0,  # the average starts when the run continues
        ),
        world,
    )
    state = RunState(parts, world, DivergenceMonitor(world.device), cfg.seed)
    _fill(run, parts, old)
    steps = min(finished * parts.steps_per_epoch, parts.total_steps)
    progress = Progress(step=steps, position=steps)
    facts = {**facts_of(cfg, parts), **state.facts(progress)}
    checkpointer = Checkpointer(folder, RankGroup(world), keep=1, max_failed=1)
    checkpointer.save(progress.step, state.tensors(), facts, wait=True)
    if checkpointer.failed_in_a_row:
        raise CheckpointError(checkpointer.last_error)
    logger.info(
        "taken over: %s classes of %d ranks, after %d epochs (step %d)",
        f"{run.num_classes:,}",
        run.world_size,
        finished,
        progress.step,
    )
    return folder / f"step_{progress.step:08d}"


def _fill(run: ArcfaceTorchRun, parts: TrainComponents, old: Path) -> None:
    """Copies the state of the old run into the parts of this one."""
    head = parts.head
    wanted = [head.num_classes, parts.metadata.num_features]
    if [run.num_classes, run.centers[0].shape[1]] != wanted or head.centers_per_class != 1:
        raise WeightsError(
            f"{old} has {run.num_classes} classes of width {run.centers[0].shape[1]}, one center "
            f"each; this config wants {wanted[0]} of width {wanted[1]}, {head.centers_per_class} "
            "each: num_classes, embedding_size and sub_centers have to be the old run's"
        )
    try:
        parts.backbone.load_state_dict(_mean_over_ranks(run))
    except RuntimeError as error:
        raise WeightsError(
            f"the backbone in {old} is not this config's network: {error}"
        ) from error
    optimizer = parts.step.optimizer
    adam = isinstance(optimizer, torch.optim.AdamW)
    keys = {"step", "exp_avg", "exp_avg_sq"} if adam else {"momentum_buffer"}
    found = {key for each in run.backbone_state.values() for key in each}
    if found and found != keys:
        raise WeightsError(
            f"{old} was trained with an optimizer that keeps {sorted(found)}, this config's "
            f"{'adamw' if adam else 'sgd'} keeps {sorted(keys)}: set optimizer= as it was"
        )
    if not found:
        logger.warning("no optimizer state of the backbone in %s: it starts at zero", old)
    for name, parameter in parts.backbone.named_parameters():
        for key, value in run.backbone_state.get(name, {}).items():
            here = optimizer.state[parameter].setdefault(
                key, torch.zeros_like(parameter if value.dim() else value)
            )
            here.copy_(value)
    _fill_centers(run, parts, old)


def _fill_centers(run: ArcfaceTorchRun, parts: TrainComponents, old: Path) -> None:
    weight = parts.head.weight
    state = dict(parts.head.optimized_parameters())[weight].state(weight)
    if not run.center_state[0].keys() >= state.keys():
        logger.warning(
            "no whole optimizer state of the class centers in %s (they were sampled, or moved by "
            "another optimizer): it starts at zero",
            old,
        )
        state = {}
    start = 0
    with torch.no_grad():
        for centers, kept in zip(run.centers, run.center_state, strict=True):
            rows = slice(start, start + len(centers))
            weight[rows] = centers.to(weight.dtype)
            for key, value in state.items():
                value[rows] = kept[key].to(value.dtype)
            start = rows.stop


def _mean_over_ranks(run: ArcfaceTorchRun) -> dict[str, Tensor]:
    """Returns rank 0's weights, with the mean of the ranks' batch-norm statistics."""
    first, *others = run.backbone
    return {
        name: torch.stack([each[name] for each in run.backbone]).mean(0)
        if others and name.endswith(("running_mean", "running_var"))
        else value
        for name, value in first.items()
    }


@cli_command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code: 0, or 2 with a message on stderr."""
    parser = argparse.ArgumentParser(
        prog="import_checkpoint.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", type=Path, metavar="OLD_RUN")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--world-size", type=int, help="ranks that will go on (default: as many)")
    parser.add_argument("--epoch", type=int, help="epochs finished, for old files without it")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cfg = load_config(options.config, options.words)
    path = import_checkpoint(options.old, cfg, options.world_size, options.epoch)
    print(f"{path}: go on with resume=auto and output={cfg.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
