"""Start a run: check that all ranks can, then begin anew or resume from a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

from configs.base import Config
from training.build import VERSION, TrainComponents, facts_of
from training.checkpoint import resume
from training.checkpoint.checkpointer import (
    FOLDER,
    Checkpointer,
    RankGroup,
    list_checkpoints,
    remove_incomplete,
)
from training.checkpoint.class_centers import remember_class_names
from training.checkpoint_manager import CheckpointManager
from training.divergence import DivergenceMonitor
from training.init_head import init_head
from training.metrics_logger import MetricsLogger, start_wandb
from training.preflight import code_version, device_kind, library_versions, preflight
from training.setup import archive_earlier_run
from training.signals import StopSignals
from training.state import Progress, RunState
from utils.config import plain_values, save_config
from utils.distributed import DistContext, barrier

logger = logging.getLogger("train")

REPOSITORY = Path(__file__).resolve().parent.parent


class Started(NamedTuple):
    """What a run continues with.

    Attributes:
        progress: How far it has come: nowhere, or as far as the checkpoint.
        monitor: Counts skipped steps and collapsed embeddings.
        checkpoints: Saves the run.
    """

    progress: Progress
    monitor: DivergenceMonitor
    checkpoints: CheckpointManager


def start_run(
    cfg: Config, world: DistContext, parts: TrainComponents, folder: Path, signals: StopSignals
) -> Started:
    """Begin a new run, or resume one from a checkpoint, once all ranks have passed their checks.

    Args:
        cfg: The config.
        world: This process among the ranks; all call this together.
        parts: Parts of the run; a checkpoint, or init_head, is loaded into them.
        folder: The run's folder. What another run left there is moved to previous_<k>/.
        signals: Stop signals of this process.

    Raises:
        UserError: The ranks disagree, or one of them cannot train.
        CheckpointError: The checkpoint cannot be used, or is that of another run.
    """
    monitor = DivergenceMonitor(world.device)
    state = RunState(parts, world, monitor, cfg.seed)
    facts = facts_of(cfg, parts)
    # At most keep_checkpoints, the best one and the one being written; some may be there already.
    to_be_written = cfg.keep_checkpoints + 2 - len(list_checkpoints(folder / FOLDER))
    preflight(
        world,
        {
            "config": resume.config_sha256(plain_values(cfg)),
            "data": f"{facts['data']} {facts['data set']}",
            "code": code_version(VERSION, REPOSITORY),
            "device": device_kind(world.device),
            **library_versions(),
        },
        folder,
        state.bytes_on_disk() * max(to_be_written, 1) if cfg.keep_checkpoints else 0,
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
    checkpoints = CheckpointManager(
        world,
        state,
        facts,
        Checkpointer(folder / FOLDER, ranks, max(cfg.keep_checkpoints, 1), cfg.max_failed_saves),
        signals,
        every_steps=cfg.checkpoint_every,
        every_minutes=cfg.checkpoint_minutes,
        is_on=cfg.keep_checkpoints > 0,
    )
    return Started(progress, monitor, checkpoints)


def open_metrics(cfg: Config, world: DistContext, folder: Path, step: int) -> MetricsLogger:
    """Open the run's metrics, after `step` optimizer steps; with wandb if the config says so."""
    wandb_run = None
    if cfg.using_wandb and (world.is_main or cfg.wandb_log_all):
        name = folder.name + (f"_{cfg.suffix_run_name}" if cfg.suffix_run_name else "")
        wandb_run = start_wandb(
            name=name if world.world_size == 1 else f"{name}_rank{world.rank}",
            entity=cfg.wandb_entity,
            project=cfg.wandb_project,
            resume=cfg.wandb_resume,
            notes=cfg.notes,
            group=name,
            folder=folder,
            settings=plain_values(cfg),
        )
    return MetricsLogger(folder, world.is_main, wandb_run, step)
