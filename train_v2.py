"""Train a face-recognition network: read this first.

    python train_v2.py configs/demo
    torchrun --nproc_per_node=8 train_v2.py configs/ms1mv3_r50 rec=/data/ms1m lr=0.05

Exit codes: 0 done; 2 bad input (config, data, weights, device), found before or while training,
with the reason on stderr; 3 diverged.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from backbones.weights import WeightsError
from configs.base import Config
from dataset import DATA_ERRORS, Batch, DataLoader
from eval.verification import VerificationSetError
from training.build import Parts, SetupError, build, check_output, set_aside_earlier_run
from training.report import Reporter, start_wandb
from training.validation import Validation
from training.watch import Diverged, Watch, stop_if_diverged
from utils.config import ConfigError, describe_fields, load_config, save_config
from utils.distributed import DeviceError, World, barrier, join_world, leave_world
from utils.log import init_logging
from utils.memory import keep_freed_memory
from utils.meter import SpeedMeter

BAD_INPUT = (
    ConfigError, DeviceError, SetupError, WeightsError, VerificationSetError, *DATA_ERRORS, OSError,
)  # fmt: skip
EXIT_BAD_INPUT, EXIT_DIVERGED = 2, 3

logger = logging.getLogger("train")


def train(cfg: Config, world: World, parts: Parts, folder: Path) -> None:
    """The loop: data, step, and every so often a log line, a verification, a saved model."""
    limit = parts.total_steps if cfg.max_steps is None else cfg.max_steps
    last_step = min(parts.total_steps, limit)
    reporter = Reporter(folder, world.is_main, _wandb(cfg, world, folder))
    validation = Validation(parts, world, folder, cfg.val_batch_size, cfg.input_size)
    watch = Watch(world.device)
    meter = SpeedMeter(parts.global_batch, last_step)
    parts.step.model.train()

    def verify_now(step: int, epoch: int) -> None:
        if parts.verification_sets and validation.last_step != step:
            reporter.evaluation(step, epoch, validation.run(step, epoch))
            meter.restart(step)

    step = epoch = 0
    while step < last_step:
        epoch = step // parts.steps_per_epoch
        parts.loader.set_epoch(epoch)
        for batches in micro_batches(parts.loader, cfg.gradient_acc, meter):
            learning_rate = parts.schedule(step)
            outcome = parts.step(batches, learning_rate)
            watch.see(outcome)
            step += 1
            if step % cfg.frequent == 0 or step == last_step:
                report = watch.report()  # the only place that waits for the device
                reporter.step(step, epoch, learning_rate, report, meter.read(step, world.device))
                stop_if_diverged(report, cfg.max_bad_steps, step, learning_rate)
            if cfg.verbose and step % cfg.verbose == 0:
                verify_now(step, epoch)
            if step == last_step:
                break
        if step % parts.steps_per_epoch == 0 and step < last_step:
            validation.save("model.pt", step, epoch + 1)
            meter.restart(step)

    verify_now(step, epoch)
    validation.save("model.pt", step, step // parts.steps_per_epoch)
    if cfg.save_artifacts and world.is_main:
        reporter.upload(folder / "model.pt")
    reporter.close()
    logger.info("done after %d steps; the model is %s", step, folder / "model.pt")


def micro_batches(
    loader: DataLoader, count: int, meter: SpeedMeter
) -> Iterator[list[Batch]]:
    """The epoch's batches in groups of `count`, one group per optimizer step; a group that
    stays incomplete at the end is dropped. Time spent waiting goes to the meter."""
    batches = iter(loader)
    while True:
        start = time.perf_counter()
        group = list(islice(batches, count))
        meter.waited(time.perf_counter() - start)
        if len(group) < count:
            return
        yield group


def _wandb(cfg: Config, world: World, folder: Path) -> object:
    if not cfg.using_wandb or not (world.is_main or cfg.wandb_log_all):
        return None
    name = folder.name + (f"_{cfg.suffix_run_name}" if cfg.suffix_run_name else "")
    return start_wandb(
        name=name if world.world_size == 1 else f"{name}_rank{world.rank}",
        entity=cfg.wandb_entity, project=cfg.wandb_project, resume=cfg.wandb_resume,
        notes=cfg.notes, group=name, folder=folder,
        settings={k: v for k, v in vars(cfg).items() if k != "wandb_key"},
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: CONFIG [key=value ...]. Returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        print("Keys of a config, with defaults:\n")
        print(describe_fields())
        return 0 if words else EXIT_BAD_INPUT
    try:
        return run(words)
    finally:
        leave_world()


def run(words: Sequence[str]) -> int:
    """Set up and train; returns the exit code. Nothing of the run outlives this call."""
    try:
        cfg = load_config(words[0], words[1:])
        world = join_world(cfg.device)
        if world.device.type == "cpu":
            keep_freed_memory()
        folder = check_output(cfg.output or "")
        init_logging(world.is_main, folder)
        parts = build(cfg, world)
        if world.is_main:
            set_aside_earlier_run(folder)
            save_config(
                cfg, folder / "config.json", world_size=world.world_size,
                num_classes=parts.head.num_classes, num_images=parts.loader.num_images,
                total_steps=parts.total_steps,
            )  # fmt: skip
        barrier(world)  # everyone has passed its checks
        train(cfg, world, parts, folder)
        barrier(world)  # leave together: rank 0 still writes while the others are done
    except BAD_INPUT as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except Diverged as error:
        logger.error("%s", error)
        return EXIT_DIVERGED
    return 0


if __name__ == "__main__":
    sys.exit(main())
