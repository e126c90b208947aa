"""Measure a step on this machine: the run's own parts (training/build.py) on generated images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator
from itertools import islice
from typing import Any

import torch

from arcshard.head.distillation import TeacherCenters
from arcshard.partial_fc import PartialFC
from arcshard.shard import class_range
from configs.base import Config
from dataset import Batch, DataLoader
from training.build import build
from training.build_head import (
    make_head,
    make_teacher,
    needs_full_batch,
    rank0_equivalent,
    workspace_of,
)
from training.classifier import Head
from training.distillation import LogitsDistillation, block_budget
from training.precision import Precision, choose_precision
from utils.distributed import DistContext
from utils.memory import keep_freed_memory

WARM_UP_STEPS = 3  # not measured: kernels are chosen and memory is allocated in them
LEAST_STEPS, MOST_STEPS = 5, 1000


def time_step(
    cfg: Config, world_size: int, num_classes: int, device: torch.device, seconds: float
) -> tuple[float, float, float]:
    """Measure the parts of a step of rank 0, without collectives.

    One process does the work of one rank: its batch goes through the network, and the global batch
    through a head of its share of the classes. Images are generated, so decoding is not included.

    Args:
        cfg: The config after training.setup.share_global_batch.
        world_size: Number of ranks.
        num_classes: Number of classes over all ranks.
        device: Device to measure on.
        seconds: About how long to measure; at least 5 steps are made.

    Returns:
        Seconds of everything else, of the head, and of the teacher.

    Raises:
        UserError: The parts cannot be built.
    """
    if device.type == "cpu":
        keep_freed_memory()
    local = len(class_range(num_classes, 0, world_size))
    taught = cfg
    cfg = cfg.replace(
        rec="synthetic",
        num_classes=local,
        init_backbone=None,
        teacher=None,
        val_targets=[],
        num_image=cfg.batch_size * cfg.gradient_acc * 1000,
        exclude=None,
        rec_weights=None,
        samples_per_class=0,
        shuffle_block=0,
        using_wandb=False,
    )
    world = DistContext(0, 0, 1, device)
    precision, _ = choose_precision(cfg.precision, cfg.fp16, device)
    whole, own = _time_parts(cfg, world, precision, seconds)
    rest = max(whole - own, 0.0)
    teacher = make_teacher(taught, precision, device)
    if world_size == 1 and teacher is None:
        return rest, own, 0.0
    alone, local = rank0_equivalent(cfg, world_size, num_classes)
    head = make_head(alone, world, local, precision)
    own = _time_head(head, alone, device, precision, 0.15 * seconds)
    if teacher is None:
        return rest, own, 0.0
    shape = (cfg.batch_size, 3, cfg.input_size, cfg.input_size)
    images = torch.zeros(shape, dtype=torch.uint8, device=device)
    images = images.to(memory_format=torch.channels_last)
    forward = cfg.gradient_acc * _median(lambda: teacher(images), device, 0.15 * seconds)
    if cfg.distillation == "cosine":
        return rest, own, forward
    assert isinstance(head, PartialFC)
    second = _second_loss(cfg, head, teacher.metadata.num_features, precision)
    both = _time_head(head, alone, device, precision, 0.15 * seconds, second)
    return rest, own, forward + max(both - own, 0.0)


def _second_loss(
    cfg: Config, head: PartialFC, width: int, precision: Precision
) -> LogitsDistillation:
    """Make the loss of a teacher that knows all classes and returns random embeddings."""
    options: dict[str, Any] = {"device": head.device, "dtype": head.work_dtype}
    unit = torch.randn(head.num_classes_local, 1, width, **options) / width**0.5
    known = torch.ones(head.num_classes_local, dtype=torch.bool, device=head.device)
    return LogitsDistillation(
        lambda images: torch.randn(len(images), width, **options) / width**0.5,
        TeacherCenters(unit, known),
        head,
        weight=1.0,
        scale=cfg.scale,
        temperature=cfg.distillation_temperature,
        budget_bytes=block_budget(workspace_of(cfg, head.device)),
        half=precision.head_matmul,
    )


def _time_parts(
    cfg: Config, world: DistContext, precision: Precision, seconds: float
) -> tuple[float, float]:
    """Measure the seconds of a whole step and of its head alone, and free the parts."""
    parts = build(cfg, world)
    parts.step.model.train()
    groups = _groups(parts.loader, cfg.gradient_acc)
    whole = _median(lambda: parts.step(next(groups), 0.0), world.device, 0.7 * seconds)
    groups.close()
    return whole, _time_head(parts.head, cfg, world.device, precision, 0.15 * seconds)


def _time_head(
    head: Head,
    cfg: Config,
    device: torch.device,
    precision: Precision,
    seconds: float,
    second: LogitsDistillation | None = None,
) -> float:
    """Measure the seconds of all micro-steps of the head, with a second loss if there is one."""
    calls = 1 if needs_full_batch(cfg, head.margin) else cfg.gradient_acc
    is_deferred = cfg.gradient_acc > 1 or precision.needs_scaler
    batch = cfg.batch_size
    if isinstance(head, PartialFC):
        assert head.batch_size_per_rank is not None  # training.build_head always names it
        batch = head.batch_size_per_rank
    embeddings = torch.randn(batch, cfg.embedding_size, device=device, dtype=head.work_dtype)
    embeddings.requires_grad_(True)
    labels = [torch.randint(head.num_classes, (batch,), device=device) for _ in range(calls)]

    def step() -> None:
        if calls > 1:
            head.prepare(labels)
        for each in labels:
            loss = head(embeddings, each, None if is_deferred else 0.0)
            if second is not None:
                loss = loss + second([embeddings], embeddings)
            loss.backward()
        head.step(0.0)
        embeddings.grad = None

    return _median(step, device, seconds)


def _groups(loader: DataLoader, count: int) -> Generator[list[Batch], None, None]:
    """Yield the batches of one optimizer step after another, without end."""
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        batches = iter(loader)
        while len(group := list(islice(batches, count))) == count:
            yield group
        epoch += 1


def _median(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    for _ in range(WARM_UP_STEPS):
        work()
    times: list[float] = []
    _wait(device)
    end = time.perf_counter() + seconds
    while len(times) < LEAST_STEPS or (time.perf_counter() < end and len(times) < MOST_STEPS):
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
