"""Build the parts of a run from its config; cheap checks come first.

The config is taken apart here and in the other build_ files; every part gets plain arguments.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import arcshard
from arcshard.partial_fc import PartialFC
from backbones.base import Backbone
from backbones.weights import ModelMetadata
from configs.base import Config
from data.crop import ImageFolder
from dataset import DataLoader
from eval.classification import classify
from eval.model import Embedder
from eval.verification import verify
from eval.verification_sets import VerificationSet
from training.batch_norm import BatchNormStatistics
from training.build_backbone import make_backbone
from training.build_data import load_image_folder, load_verification_sets, make_loader
from training.build_head import (
    has_layer,
    make_head,
    make_margin,
    make_second_loss,
    make_teacher,
    needs_full_batch,
)
from training.classifier import Head, LayerClassifier, SplitClassifier, whole_classifier
from training.ema import ModelEma
from training.optimizer import make_optimizer
from training.parallelize import parallelize
from training.precision import MixedPrecisionBackbone, allow_tf32, choose_precision
from training.schedule import Schedule
from training.setup import check_step_options, check_wandb, is_classification
from training.step import TrainStep
from utils.config import plain_values
from utils.distributed import DistContext
from utils.errors import UserError

logger = logging.getLogger("train")

VERSION = f"ArcShard {arcshard.__version__}"


@dataclass
class TrainComponents:
    """Everything the loop needs, built and on its device.

    Attributes:
        loader: Loader of this rank's batches.
        backbone: The network that is trained.
        head: The head of this rank.
        step: The training step.
        schedule: Learning rate by step.
        batch_norm: Running statistics of the backbone.
        embedder: Embeds images for verification, with the averaged backbone if there is one.
        metadata: What model.pt says about the network.
        steps_per_epoch: Optimizer steps per epoch.
        global_batch: Images per optimizer step, over all ranks and micro-batches.
        verification_sets: Sets that the model is scored on.
        evaluate: Function that scores the model on them.
        best_by: Name of the metric whose mean over sets chooses the best model.
        classifier: Name of the head in model.pt where it is the network's last layer, else None.
        average: Moving average of the backbone (ema_decay), which is verified and saved instead.
    """

    loader: DataLoader
    backbone: Backbone
    head: Head
    step: TrainStep
    schedule: Schedule
    batch_norm: BatchNormStatistics
    embedder: Embedder
    metadata: ModelMetadata
    steps_per_epoch: int
    global_batch: int
    verification_sets: list[VerificationSet] | list[ImageFolder] = field(default_factory=list)
    evaluate: Callable[..., dict[str, dict[str, float]]] = verify
    best_by: str = "accuracy_flip"
    classifier: str | None = None
    average: ModelEma | None = None

    @property
    def evaluated(self) -> tuple[Backbone, BatchNormStatistics]:
        """The network that is verified and saved, with its statistics: the average, if any."""
        if self.average is not None:
            return self.average.model, self.average.batch_norm
        return self.backbone, self.batch_norm

    def model_state(self) -> dict[str, torch.Tensor]:
        """Return what model.pt holds, complete on the first rank.

        All ranks call this, because a split head is collected from them.
        """
        state = dict(self.evaluated[0].state_dict())
        if self.classifier is not None:
            whole = whole_classifier(self.head)
            state |= {f"{self.classifier}.{name}": value for name, value in whole.items()}
        return state

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.schedule.total_steps


def build(cfg: Config, world: DistContext) -> TrainComponents:
    """Build all parts of the run, with every check that needs files, networks or devices.

    Raises:
        UserError: The config cannot be trained on this machine or data.
        DataError: The training set is missing or damaged.
        WeightsError: A file of weights cannot be used.
        UserError: A verification set is missing or malformed.
    """
    check_wandb(cfg)
    check_step_options(cfg, world)
    for sentence in cfg.unused():
        logger.warning(sentence)
    precision, warning = choose_precision(cfg.precision, cfg.fp16, world.device)
    if warning:
        logger.warning(warning)
    loader = make_loader(cfg, world)
    sets = load_image_folder(cfg) if is_classification(cfg) else load_verification_sets(cfg)
    if not has_layer(cfg):
        make_margin(cfg)  # refuses values outside the loss's domain before anything slow
    teacher = make_teacher(cfg, precision, world.device)
    torch.manual_seed(cfg.seed)  # the same initial backbone on every rank
    backbone = make_backbone(cfg)
    num_classes = loader.num_classes if cfg.num_classes == "auto" else int(cfg.num_classes)

    global_batch = cfg.batch_size * world.world_size * cfg.gradient_acc
    steps_per_epoch = len(loader) // cfg.gradient_acc
    if steps_per_epoch == 0:
        raise UserError(
            f"an epoch has {loader.images_per_epoch} images, less than one global batch of "
            f"{global_batch} (batch_size {cfg.batch_size} x {world.world_size} ranks x "
            f"gradient_acc {cfg.gradient_acc}): lower batch_size or gradient_acc"
        )

    mean, std = (backbone.MEAN, backbone.STD) if is_classification(cfg) else (127.5, 127.5)
    allow_tf32(False)  # the training step switches it on where the precision asks for it
    model = MixedPrecisionBackbone(
        backbone, precision, cfg.freeze_batch_norm, cfg.channels_last, mean, std
    )
    model.place(world.device)
    batch_norm = BatchNormStatistics(model, cfg.freeze_batch_norm)
    average = ModelEma(backbone, batch_norm, cfg.ema_decay) if cfg.ema_decay else None
    trained = parallelize(
        model,
        world.world_size,
        world.device,
        batch_norm,
        batch_size=cfg.batch_size,
        input_size=cfg.input_size,
        grad_reduce_dtype=cfg.grad_reduce_dtype,
        compiles=cfg.compile,
        tf32=precision.tf32,
    )
    head = make_head(cfg, world, num_classes, precision)
    optimizer = make_optimizer(
        backbone,
        cfg.optimizer,
        lr=cfg.lr,
        momentum=cfg.momentum,
        weight_decay=cfg.weight_decay,
        decay_norms_and_biases=cfg.decay_norms_and_biases,
        layer_decay=cfg.layer_decay,
        spread=cfg.zero_stage > 0 and world.world_size > 1,
    )
    step = TrainStep(
        trained,
        head,
        optimizer,
        batch_norm,
        clip_grad_norm=cfg.clip_grad_norm,
        scaler=_make_scaler(world.device) if precision.needs_scaler else None,
        needs_full_batch=needs_full_batch(cfg, head.margin),
        distillation=make_second_loss(cfg, teacher, head, loader.source, world),
        tf32=precision.tf32,
        average=average,
    )
    seed = cfg.seed + 1 + world.rank  # from here on every rank draws other numbers (dropout)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    parts = TrainComponents(
        loader=loader,
        backbone=backbone,
        head=head,
        step=step,
        schedule=_make_schedule(cfg, global_batch, steps_per_epoch),
        batch_norm=batch_norm,
        embedder=Embedder(average.model if average else backbone, mean, std, device=world.device),
        metadata=ModelMetadata(
            network=cfg.network,
            num_features=num_classes if is_classification(cfg) else cfg.embedding_size,
            input_size=cfg.input_size,
            mean=mean,
            std=std,
            config=Path(cfg.output or "").name,
            trained_with=VERSION,
        ),
        steps_per_epoch=steps_per_epoch,
        global_batch=global_batch,
        verification_sets=sets,
        average=average,
    )
    if isinstance(head, SplitClassifier | LayerClassifier):
        parts.evaluate = partial(classify, places=head.target_rank, width=cfg.embedding_size)
        parts.best_by, parts.classifier = "top1", backbone.CLASSIFIER
    _announce(cfg, world, parts, precision.name)
    return parts


def facts_of(cfg: Config, parts: TrainComponents) -> dict[str, Any]:
    """Return the facts of a run that its checkpoints store and resume.py compares."""
    return {
        "config": plain_values(cfg),
        "data set": parts.loader.fingerprint(),
        "data": {
            "num_classes": parts.head.num_classes,
            "num_images": parts.loader.num_images,
            "global_batch": parts.global_batch,
            "steps_per_epoch": parts.steps_per_epoch,
        },
    }


def _make_scaler(device: torch.device) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device.type, growth_interval=100)  # as published


def _make_schedule(cfg: Config, global_batch: int, steps_per_epoch: int) -> Schedule:
    peak = cfg.lr
    if cfg.lr_base_batch is not None:
        peak = cfg.lr * global_batch / cfg.lr_base_batch
        logger.info(
            "learning rate %g x %d / %d = %g", cfg.lr, global_batch, cfg.lr_base_batch, peak
        )
    total = cfg.num_epoch * steps_per_epoch
    return Schedule(peak, total, round(max(cfg.warmup_epoch, 0) * steps_per_epoch), cfg.lr_schedule)


def _announce(cfg: Config, world: DistContext, parts: TrainComponents, precision: str) -> None:
    loader, head = parts.loader, parts.head
    logger.info(
        "%d images of %d classes in %s; %d dropped per epoch; head of %d classes, %d here%s",
        loader.num_images,
        loader.num_classes,
        cfg.rec,
        loader.images_per_epoch - parts.steps_per_epoch * parts.global_batch,
        head.num_classes,
        head.num_classes_local,
        " (more than the labels need)" if head.num_classes > loader.num_classes else "",
    )
    logger.info(
        "%s, %.1f M parameters, embedding %d, %s on %d x %s",
        cfg.network,
        sum(p.numel() for p in parts.backbone.parameters()) / 1e6,
        cfg.embedding_size,
        precision,
        world.world_size,
        world.device.type,
    )
    groups = parts.step.optimizer.param_groups
    if len(groups) > 1:
        logger.info(
            "%d groups of parameters: weight decay %s, learning rate times %s",
            len(groups),
            *(
                ", ".join(f"{value:.3g}" for value in sorted({group[key] for group in groups}))
                for key in ("weight_decay", "lr_factor")
            ),
        )
    if cfg.freeze_epoch:
        logger.info(
            "freeze_epoch=%d: only the class centers move in the first %d steps",
            cfg.freeze_epoch,
            cfg.freeze_epoch * parts.steps_per_epoch,
        )
        if cfg.init_backbone is None:
            logger.warning("freeze_epoch without init_backbone freezes random features")
    if cfg.ema_decay:
        logger.info("ema_decay=%g: the average of the weights is verified and saved", cfg.ema_decay)
    logger.info(
        "head: %s; sample rate %g%s; %s",
        head.margin.describe(),
        cfg.sample_rate,
        f"; {head.centers_per_class} centers per class" if head.centers_per_class > 1 else "",
        head.describe_memory(),
    )
    if isinstance(head, PartialFC):
        is_missed = cfg.head_kernels == "triton" and not head.has_kernels
        logger.log(
            logging.WARNING if is_missed else logging.INFO, "head %s", head.describe_kernels()
        )
    if cfg.gradient_acc > 1:
        logger.info(
            "gradient_acc=%d: %s",
            cfg.gradient_acc,
            "this loss looks at the whole batch, so every micro-batch is embedded twice (one more "
            "forward pass of the backbone)"
            if needs_full_batch(cfg, head.margin)
            else "class centers move once all micro-batches are seen (one more matmul in the head)"
            if head.fused is not None
            else "gradients of the class centers are added up",
        )
    logger.info(
        "global batch %d = %d per rank x %d ranks x %d micro-steps; %d steps per epoch, %d in all",
        parts.global_batch,
        cfg.batch_size,
        world.world_size,
        cfg.gradient_acc,
        parts.steps_per_epoch,
        parts.total_steps,
    )
    if world.device.type == "cpu" and world.world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        logger.warning("several CPU ranks without OMP_NUM_THREADS compete for cores")
