"""Train a face-recognition network: read this first.

    python train_v2.py configs/demo
    torchrun --nproc_per_node=8 train_v2.py configs/ms1mv3_r50 rec=/data/ms1m lr=0.05
    torchrun --nproc_per_node=4 train_v2.py configs/ms1mv3_r50 resume=auto
    torchrun --nproc_per_node=8 train_v2.py configs/ms1mv3_r50 --dry-run

Exit codes: 0 done; 2 bad input (config, data, weights, device), found before or while training,
with the reason on stderr; 3 diverged; 4 stopped by a signal, with the state saved: start again
with resume=auto; 5 another rank was lost; 6 checkpoints could not be written; 130 Ctrl-C
before training, or a second one.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from configs.base import Config
from dataset import Batch, DataLoader
from training.build import VERSION, TrainComponents, build, facts_of
from training.checkpoint import resume
from training.checkpoint.checkpointer import (
    FOLDER,
    Checkpointer,
    RankGroup,
    list_checkpoints,
    remove_incomplete,
)
from training.checkpoint.class_centers import remember_class_names
from training.checkpoint_manager import CheckpointManager, SavesFailed, Stopped
from training.divergence import Diverged, DivergenceMonitor, DivergencePolicy, RollBack
from training.heartbeat import EXIT_RANK_LOST, Heartbeat, heartbeat_store, is_collective_failure
from training.init_head import init_head
from training.metrics_logger import MetricsLogger, start_wandb
from training.preflight import (
    code_version,
    device_kind,
    library_versions,
    preflight,
)
from training.profile import StepProfile, phase
from training.setup import (
    archive_earlier_run,
    check_output,
    share_global_batch,
)
from training.signals import StopSignals
from training.state import Progress, RunState
from training.validation import CUT_SHORT, Validation
from utils.cli import EXIT_BAD_INPUT, cli_command
from utils.config import describe_keys, load_config, plain_values, save_config
from utils.distributed import (
    DistContext,
    barrier,
    destroy_distributed,
    init_distributed,
)
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
    progress: Progress,
    watch: DivergenceMonitor,
    keeper: CheckpointManager,
    heartbeat: Heartbeat,
) -> None:
    """Run the loop: data and step, and at intervals a log line, a verification, a checkpoint."""
    limit = parts.total_steps if cfg.max_steps is None else cfg.max_steps
    last_step = min(parts.total_steps, limit)
    reporter = MetricsLogger(folder, world.is_main, _wandb(cfg, world, folder), progress.step)
    validation = Validation(
        parts, world, folder, cfg.val_batch_size, cfg.input_size, progress, keeper.is_asked_to_stop
    )
    meter = SpeedMeter(parts.global_batch, last_step)
    meter.restart(progress.step)
    policy = DivergencePolicy(
        cfg.max_bad_steps, cfg.on_divergence == "rollback", cfg.max_rollbacks, progress.rollbacks
    )
    profile = StepProfile(folder, cfg.profile if world.is_main else 0, world.device)
    parts.step.model.train()

    def verification_is_due() -> bool:
        is_time = cfg.verbose and progress.step % cfg.verbose == 0
        return bool(parts.verification_sets) and bool(is_time or progress.step == last_step)

    def verify(epoch: int) -> None:
        heartbeat.mark("verification", progress.step)
        try:
            results = validation.run(progress.step, epoch)
        except CUT_SHORT:  # on all ranks; the verification is repeated when the run resumes
            keeper.stop_if_asked(progress)
            raise
        reporter.evaluation(progress.step, epoch, results)
        meter.restart(progress.step)

    def run_epoch() -> None:
        epoch, steps_done = divmod(progress.position, parts.steps_per_epoch)
        parts.loader.set_epoch(epoch, steps_done * cfg.gradient_acc)
        for batches in micro_batches(parts.loader, cfg.gradient_acc, meter):
            heartbeat.mark("step", progress.step)
            learning_rate = parts.schedule(progress.step)
            outcome = parts.step(batches, learning_rate, is_frozen=epoch < cfg.freeze_epoch)
            watch.observe(outcome, parts.head.mean_pairwise_cosine)
            profile.after_step()
            progress.step += 1
            progress.position += 1
            step, is_last = progress.step, progress.step == last_step
            epoch_ends = progress.position % parts.steps_per_epoch == 0

            if step % cfg.frequent == 0 or is_last:
                report = watch.report()  # the only place that waits for the device
                reporter.step(step, epoch, learning_rate, report, meter.read(step, world.device))
                policy.decide(report, step, learning_rate)
            if verification_is_due():
                verify(epoch)
            if epoch_ends or is_last:
                heartbeat.mark("model.pt", step)
                validation.save("model.pt", step, epoch + epoch_ends, must=is_last)
                meter.restart(step)
            keeper.after_step(
                progress, epoch_ends=epoch_ends, is_best=progress.best_step == step, is_last=is_last
            )
            if is_last:
                return

    if progress.step and verification_is_due() and progress.evaluated_step != progress.step:
        verify((progress.position - 1) // parts.steps_per_epoch)  # a signal interrupted it
        keeper.save_now(progress, is_best=progress.best_step == progress.step)
    if progress.step >= last_step:  # no step is left; the files of the run are still written
        keeper.save_now(progress)
        epochs = progress.position // parts.steps_per_epoch
        validation.save("model.pt", progress.step, epochs, must=True)
    while progress.step < last_step:
        try:
            run_epoch()
        except RollBack as bad:
            keeper.roll_back(progress, bad)
            reporter.go_back(progress.step)
            meter.restart(progress.step)

    keeper.finish()
    profile.close()
    if cfg.save_artifacts and world.is_main:
        reporter.upload(folder / "model.pt")
    reporter.close()
    logger.info("done after %d steps; the model is %s", progress.step, folder / "model.pt")


def micro_batches(loader: DataLoader, count: int, meter: SpeedMeter) -> Iterator[list[Batch]]:
    """Yield the epoch's batches in groups of `count`, one group per optimizer step.

    An incomplete group at the end of the epoch is dropped. The meter counts the time spent waiting.
    """
    batches = iter(loader)
    while True:
        start = time.perf_counter()
        with phase("data"):
            group = list(islice(batches, count))
        meter.waited(time.perf_counter() - start)
        if len(group) < count:
            return
        yield group


def _wandb(cfg: Config, world: DistContext, folder: Path) -> object:
    if not cfg.using_wandb or not (world.is_main or cfg.wandb_log_all):
        return None
    name = folder.name + (f"_{cfg.suffix_run_name}" if cfg.suffix_run_name else "")
    return start_wandb(
        name=name if world.world_size == 1 else f"{name}_rank{world.rank}",
        entity=cfg.wandb_entity,
        project=cfg.wandb_project,
        resume=cfg.wandb_resume,
        notes=cfg.notes,
        group=name,
        folder=folder,
        settings=dict(vars(cfg)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, CONFIG [key=value ...], and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__}\n{describe_keys()}\n\n{describe_choices()}")
        return 0 if words else EXIT_BAD_INPUT
    is_dry = "--dry-run" in words
    try:
        return run([word for word in words if word != "--dry-run"], is_dry)
    finally:
        destroy_distributed()


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
        progress, watch, keeper = begin(cfg, world, parts, folder, signals)
        store = heartbeat_store() if world.world_size > 1 else None
        heartbeat = Heartbeat(
            world.rank, world.world_size, store, world.device, cfg.collective_timeout_s
        )
        try:
            train(cfg, world, parts, folder, progress, watch, keeper, heartbeat)
        except RuntimeError as error:
            if not is_collective_failure(error):
                heartbeat.close(f"{type(error).__name__}: {error}")
                raise
            logger.error("%s", heartbeat.describe_stragglers(error))
            logging.shutdown()
            os._exit(EXIT_RANK_LOST)  # threads that wait for the lost rank cannot be ended
        except Exception as error:
            heartbeat.close(f"{type(error).__name__}: {error}")
            raise
        heartbeat.close()
    return parts


def begin(
    cfg: Config, world: DistContext, parts: TrainComponents, folder: Path, signals: StopSignals
) -> tuple[Progress, DivergenceMonitor, CheckpointManager]:
    """Start a new run, or resume one from a checkpoint, once all ranks have passed their checks."""
    watch = DivergenceMonitor(world.device)
    state = RunState(parts, world, watch, cfg.seed)
    facts = facts_of(cfg, parts)
    checkpoints = (
        cfg.keep_checkpoints + 2 - len(list_checkpoints(folder / FOLDER))
    )  # the others that may exist: `best`, and the one being written
    preflight(
        world,
        {
            "config": resume.config_sha256(plain_values(cfg)),
            "data": f"{facts['data']} {facts['data set']}",
            "code": code_version(VERSION, Path(__file__).resolve().parent),
            "device": device_kind(world.device),
            **library_versions(),
        },
        folder,
        state.bytes_on_disk() * max(checkpoints, 1) if cfg.keep_checkpoints else 0,
    )
    ranks = RankGroup(world)
    found = resume.find(cfg.resume, folder, ranks)
    progress = Progress()
    if found is not None:
        resume.check(found.manifest.facts, facts)
        progress = state.load(found, ranks)
        logger.info("resuming at step %d from %s", progress.step, found.path)
    elif cfg.init_head is not None:
        init_head(
            cfg.init_head,
            parts,
            ranks,
            has_backbone=cfg.init_backbone is not None,
            batch_size=cfg.batch_size,
            num_workers=cfg.num_workers,
        )
    if world.is_main:
        if found is None or not found.path.resolve().is_relative_to(folder.resolve()):
            archive_earlier_run(folder)
        for place in (folder, folder / FOLDER):
            remove_incomplete(place)
        save_config(
            cfg,
            folder / "config.json",
            world_size=world.world_size,
            num_classes=parts.head.num_classes,
            num_images=parts.loader.num_images,
            total_steps=parts.total_steps,
        )
        remember_class_names(parts.loader.source, folder)
    barrier(world)
    keep = max(cfg.keep_checkpoints, 1)
    keeper = CheckpointManager(
        world,
        state,
        facts,
        Checkpointer(folder / FOLDER, ranks, keep, cfg.max_failed_saves),
        signals,
        every_steps=cfg.checkpoint_every,
        every_minutes=cfg.checkpoint_minutes,
        is_on=cfg.keep_checkpoints > 0,
    )
    return progress, watch, keeper


if __name__ == "__main__":
    sys.exit(main())
