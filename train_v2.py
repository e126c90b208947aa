"""Train a face-recognition network: read this first.

    python train_v2.py configs/demo
    torchrun --nproc_per_node=8 train_v2.py configs/ms1mv3_r50 rec=/data/ms1m lr=0.05
    torchrun --nproc_per_node=4 train_v2.py configs/ms1mv3_r50 resume=auto
    torchrun --nproc_per_node=8 train_v2.py configs/ms1mv3_r50 --dry-run
    python train_v2.py help [KEY ...]

Exit codes: 0 done; 2 bad input (config, data, weights, device), found before or while training,
with the reason on stderr; 3 diverged; 4 stopped by a signal, with the state saved: start again
with resume=auto; 5 another rank was lost; 6 checkpoints could not be written; 130 Ctrl-C
before training, or a second one.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Generator, Sequence
from itertools import islice
from pathlib import Path

from configs.base import Config
from dataset import Batch
from training.build import TrainComponents, build
from training.checkpoint_manager import SavesFailed, Stopped
from training.divergence import Diverged, DivergencePolicy, RollBack
from training.heartbeat import Heartbeat, heartbeat_store
from training.help import describe_all, describe_key
from training.profile import StepProfile, phase
from training.setup import check_output, share_global_batch
from training.signals import StopSignals
from training.start import Started, open_metrics, start_run
from training.state import Progress
from training.validation import Validation
from utils.cli import EXIT_BAD_INPUT, cli_command
from utils.config import load_config
from utils.distributed import DistContext, barrier, destroy_distributed, init_distributed
from utils.log import init_logging
from utils.memory import keep_freed_memory
from utils.meter import SpeedMeter

EXIT_DIVERGED, EXIT_STOPPED, EXIT_NOT_SAVED = 3, 4, 6

logger = logging.getLogger("train")


def train(
    cfg: Config,
    world: DistContext,
    parts: TrainComponents,
    folder: Path,
    started: Started,
    heartbeat: Heartbeat,
) -> None:
    """Run the loop. The comment above each phase says how often it runs, and on which ranks."""
    progress, monitor, checkpoints = started
    final_step = parts.total_steps
    if cfg.max_steps is not None:
        final_step = min(final_step, cfg.max_steps)
    metrics = open_metrics(cfg, world, folder, progress.step)
    validation = Validation(
        parts,
        world,
        folder,
        progress,
        checkpoints,
        heartbeat,
        metrics,
        every=cfg.verbose,
        final_step=final_step,
        batch_size=cfg.val_batch_size,
        input_size=cfg.input_size,
    )
    policy = DivergencePolicy(
        cfg.max_bad_steps, cfg.on_divergence == "rollback", cfg.max_rollbacks, progress.rollbacks
    )
    profile = StepProfile(folder, cfg.profile if world.is_main else 0, world.device)
    parts.step.model.train()

    # Once, all ranks: what the run that is resumed still had to do at the step it had reached.
    validation.catch_up()
    meter = SpeedMeter(parts.global_batch, final_step, progress.step)
    batches = training_batches(parts, cfg.gradient_acc, progress, meter)
    while progress.step < final_step:
        # Every step, all ranks: data, forward, head, backward, update. The host runs ahead of the
        # device.
        micro_batches = next(batches)
        heartbeat.mark("step", progress.step)
        learning_rate = parts.schedule(progress.step)
        epoch = progress.position // parts.steps_per_epoch
        outcome = parts.step(micro_batches, learning_rate, is_frozen=epoch < cfg.freeze_epoch)
        monitor.observe(outcome, parts.head.mean_pairwise_cosine)
        profile.after_step()
        progress.count_step()
        step, is_last = progress.step, progress.step == final_step
        epoch_ends = progress.position % parts.steps_per_epoch == 0

        # Every `frequent` steps and after the final one, all ranks: wait for the device, read the
        # losses, and stop or roll back if the run has diverged. Rank 0 writes the log line.
        if step % cfg.frequent == 0 or is_last:
            report = monitor.report()
            metrics.step(step, epoch, learning_rate, report, meter.read(step, world.device))
            try:
                policy.decide(report, step, learning_rate)
            except RollBack as bad:
                batches.close()
                checkpoints.roll_back(progress, bad)
                metrics.go_back(progress.step)
                meter.restart(progress.step)
                batches = training_batches(parts, cfg.gradient_acc, progress, meter)
                continue

        # Every `verbose` steps and after the final one, all ranks: verification, of which each rank
        # embeds its share of the images. Rank 0 writes the scores, and model_best.pt.
        if validation.is_due():
            validation.run()
            meter.restart(step)

        # Every epoch and after the final step, all ranks: join their statistics. Rank 0 writes
        # model.pt.
        if epoch_ends or is_last:
            validation.save_model(required=is_last)
            meter.restart(step)

        # Every step, all ranks: agree whether to stop, and whether to write a checkpoint, of which
        # each rank writes its share in the background.
        checkpoints.after_step(progress, epoch_ends=epoch_ends, is_last=is_last)

    batches.close()
    checkpoints.finish()
    profile.close()
    if cfg.save_artifacts and world.is_main:
        metrics.upload(folder / "model.pt")
    metrics.close()
    logger.info("done after %d steps; the model is %s", progress.step, folder / "model.pt")


def training_batches(
    parts: TrainComponents, gradient_acc: int, progress: Progress, meter: SpeedMeter
) -> Generator[list[Batch], None, None]:
    """Yield the micro-batches of one optimizer step after another, from the run's position on.

    Each epoch has its own order. Micro-batches at its end that do not fill a step are left out.
    The meter counts the time spent waiting.

    Raises:
        RuntimeError: The loader ended before its epoch did, so that images would be seen twice.
    """
    while True:
        epoch, steps_done = divmod(progress.position, parts.steps_per_epoch)
        parts.loader.set_epoch(epoch, steps_done * gradient_acc)
        batches = iter(parts.loader)
        while True:
            start = time.perf_counter()
            with phase("data"):
                group = list(islice(batches, gradient_acc))
            meter.waited(time.perf_counter() - start)
            if len(group) < gradient_acc:
                break
            yield group
        if progress.position != (epoch + 1) * parts.steps_per_epoch:
            raise RuntimeError(
                f"the loader ended at step {progress.position - epoch * parts.steps_per_epoch} of "
                f"{parts.steps_per_epoch} of epoch {epoch}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, CONFIG [key=value ...], and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != "--dry-run"]
    if not words or words[0] in ("-h", "--help", "help"):
        return max(show_help(words[1:]), 0 if words else EXIT_BAD_INPUT)
    try:
        return run(words, is_dry=len(words) < len(given))
    finally:
        destroy_distributed()


@cli_command()
def show_help(keys: Sequence[str]) -> int:
    """Print what the named keys of a config mean, or how to use the command and all keys."""
    print("\n\n".join(map(describe_key, keys)) if keys else f"{__doc__}\n{describe_all()}")
    return 0


@cli_command()
def run(words: Sequence[str], is_dry: bool = False) -> int:
    """Set up and train; return the exit code. No object of the run outlives this call.

    A dry run makes every check and two steps in a folder beside the output, and removes it.
    """
    try:
        cfg = load_config(words[0], words[1:])
        world = init_distributed(cfg.device)
        if is_dry:
            cfg = cfg.replace(
                output=f"{cfg.output}.dry_run",
                max_steps=2,
                resume="never",
                frequent=1,
                using_wandb=False,
                freeze_epoch=0,  # frozen steps would test only half of a step
            )
        if world.device.type == "cpu":
            keep_freed_memory()
        folder = check_output(cfg.output or "")
        init_logging(world.is_main, folder)
        run_on(cfg, world, folder)
        barrier(world)  # leave together: rank 0 still writes while the others are done
        if is_dry and world.is_main:
            logging.shutdown()
            shutil.rmtree(folder)
            print("dry run: two steps done; all is well, nothing is left behind", file=sys.stderr)
    except Diverged as error:
        logger.error("%s", error)
        return EXIT_DIVERGED
    except Stopped as error:
        logger.warning("%s", error)
        return EXIT_STOPPED
    except SavesFailed as error:
        logger.error("%s", error)
        return EXIT_NOT_SAVED
    return 0


def run_on(cfg: Config, world: DistContext, folder: Path) -> TrainComponents:
    """Run the whole training on initialized ranks; `folder` is writable."""
    cfg = share_global_batch(cfg, world.world_size)
    with StopSignals() as signals:
        parts = build(cfg, world)
        started = start_run(cfg, world, parts, folder, signals)
        store = heartbeat_store() if world.world_size > 1 else None
        timeout_s = cfg.collective_timeout_s
        with Heartbeat(world.rank, world.world_size, store, world.device, timeout_s) as heartbeat:
            train(cfg, world, parts, folder, started, heartbeat)
    return parts


if __name__ == "__main__":
    sys.exit(main())
