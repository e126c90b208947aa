"""Build the loss, the head and the teacher that a config names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from arcshard.head.row_optimizer import AdamWRows, RowOptimizer, SGDRows
from arcshard.head.workspace import Workspace, choose_workspace, memory_bytes_of
from arcshard.losses import (
    AdaFace,
    ArcFace,
    CombinedMargin,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    Margin,
    NormFace,
    Softmax,
    SphereFace,
)
from arcshard.partial_fc import PartialFC
from arcshard.shard import class_range
from configs.base import Config
from data.datasets import ImageDataset
from training.classifier import Head, LayerClassifier, SplitClassifier
from training.distillation import Distillation, Teacher, load_teacher, make_distillation
from training.precision import Precision
from training.setup import is_classification
from utils.distributed import DistContext
from utils.errors import UserError


def make_margin(cfg: Config) -> Margin:
    """Make the loss that the config names.

    Raises:
        UserError: A value is outside the loss's domain.
    """
    fixed: dict[str, Any] = {
        "scale": cfg.scale,
        "gradient": cfg.margin_gradient,
        "interclass_filtering_threshold": cfg.interclass_filtering_threshold,
        "interclass_filtering_mode": cfg.interclass_filtering_mode,
    }
    m: dict[str, Any] = {} if cfg.margin is None else {"margin": cfg.margin}
    elastic: dict[str, Any] = {"std": cfg.elastic_std, "plus": cfg.elastic_plus, "scale": cfg.scale}
    m1, m2, m3 = cfg.margin_list
    makers: dict[str, Callable[[], Margin]] = {
        "combined": lambda: CombinedMargin(m1, m2, m3, **fixed),
        "softmax": lambda: Softmax(bias=cfg.softmax_bias),
        "normface": lambda: NormFace(cfg.scale),
        "arcface": lambda: ArcFace(**m, **fixed),
        "subcenter_arcface": lambda: ArcFace(**m, **fixed),
        "cosface": lambda: CosFace(**m, **fixed),
        "sphereface": lambda: SphereFace(**m, **fixed),
        "adaface": lambda: AdaFace(
            **m, h=cfg.adaface_h, t_alpha=cfg.adaface_t_alpha, scale=cfg.scale
        ),
        "magface": lambda: MagFace(
            *cfg.magface_norms, *cfg.magface_margins, cfg.magface_lambda_g, cfg.scale
        ),
        "curricularface": lambda: CurricularFace(**m, alpha=cfg.curricular_alpha, scale=cfg.scale),
        "elasticface_arc": lambda: ElasticFace("arc", **{"margin": 0.5, **m}, **elastic),
        "elasticface_cos": lambda: ElasticFace("cos", **{"margin": 0.35, **m}, **elastic),
    }
    try:
        return makers[cfg.loss]()
    except ValueError as error:
        raise UserError(f"loss={cfg.loss!r}: {error}") from error


def make_head(cfg: Config, world: DistContext, num_classes: int, precision: Precision) -> Head:
    """Make the head of this rank, with its row optimizer.

    Raises:
        UserError: The head cannot be built with this loss or of this size.
    """
    if has_layer(cfg):
        return _make_layer(cfg, world, num_classes, precision)
    margin = make_margin(cfg)
    kind = SplitClassifier if is_classification(cfg) else PartialFC
    centers_per_class = cfg.sub_centers or (3 if cfg.loss == "subcenter_arcface" else 1)
    dtype = torch.bfloat16 if cfg.head_weight_dtype == "bf16" else precision.dtype
    # A margin that needs the whole batch gets all micro-batches at once (training/step.py).
    passes = cfg.gradient_acc if needs_full_batch(cfg, margin) else 1
    try:
        return kind(
            margin,
            cfg.embedding_size,
            num_classes,
            cfg.sample_rate,
            row_optimizer=_make_row_optimizer(cfg),
            update=cfg.head_update,
            batch_size_per_rank=cfg.batch_size * passes,
            centers_per_class=centers_per_class,
            workspace_mib=cfg.head_workspace_mib,
            half=precision.head_matmul,
            seed=cfg.seed,
            device=world.device,
            dtype=dtype,
            center_device="cpu" if cfg.head_offload else None,
            kernels=cfg.head_kernels,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:  # the allocator raises nothing more specific
        rows = num_classes * centers_per_class
        size = rows * cfg.embedding_size * dtype.itemsize / world.world_size / 2**30
        raise UserError(
            f"the class centers of num_classes={num_classes} need {size:,.1f} GiB per rank, which "
            f"cannot be had: more ranks, fewer classes, a smaller embedding_size, "
            f'head_weight_dtype="bf16" or head_offload=True ({error})'
        ) from error


def workspace_of(cfg: Config, device: torch.device) -> Workspace:
    """Return the workspace of a fused head on that device."""
    return choose_workspace(cfg.head_workspace_mib, device.type, memory_bytes_of(device))


def has_layer(cfg: Config) -> bool:
    """Return whether the head is a LayerClassifier, which forms all logits and gradients."""
    return is_classification(cfg) and (cfg.parallel_dim in (None, 0) or cfg.label_smoothing > 0)


def rank0_equivalent(cfg: Config, world_size: int, num_classes: int) -> tuple[Config, int]:
    """Return config and number of classes of a single rank whose head does the work of rank 0."""
    if has_layer(cfg) and cfg.parallel_dim is None:
        return cfg, num_classes
    cfg = cfg.replace(batch_size=cfg.batch_size * world_size)
    if has_layer(cfg) and cfg.parallel_dim == 0:
        mine = len(class_range(cfg.embedding_size, 0, world_size))
        return cfg.replace(embedding_size=mine), num_classes
    return cfg, len(class_range(num_classes, 0, world_size))


def needs_full_batch(cfg: Config, margin: Margin) -> bool:
    """Return whether all micro-batches must be embedded before the head sees any."""
    return cfg.gradient_acc > 1 and margin.reads_batch


def _make_layer(
    cfg: Config, world: DistContext, num_classes: int, precision: Precision
) -> LayerClassifier:
    try:
        return LayerClassifier(
            cfg.embedding_size,
            num_classes,
            cfg.parallel_dim,
            bias=cfg.softmax_bias,
            label_smoothing=cfg.label_smoothing,
            row_optimizer=_make_row_optimizer(cfg),
            bias_update=_make_row_optimizer(cfg),
            batch_size_per_rank=cfg.batch_size,
            half=precision.head_matmul,
            seed=cfg.seed,
            device=world.device,
            dtype=precision.dtype,
        )
    except RuntimeError as error:
        raise UserError(
            f"parallel_dim={cfg.parallel_dim!r}: a last layer of {num_classes} classes cannot be "
            f"had on this rank; parallel_dim=1 and more ranks make its part smaller ({error})"
        ) from error


def _make_row_optimizer(cfg: Config) -> RowOptimizer:
    state_dtype = torch.bfloat16 if cfg.head_state_dtype == "bf16" else None
    if cfg.optimizer == "sgd":
        return SGDRows(cfg.momentum, cfg.weight_decay, state_dtype)
    return AdamWRows(weight_decay=cfg.weight_decay, state_dtype=state_dtype)


def make_teacher(cfg: Config, precision: Precision, device: torch.device) -> Teacher | None:
    """Load the teacher, if the config names one.

    Raises:
        UserError: The embeddings or images of the teacher are not those of this run.
        WeightsError: The teacher's file cannot be used.
        FileNotFoundError: There is no such file.
    """
    if cfg.teacher is None:
        return None
    return load_teacher(
        cfg.teacher,
        cfg.distillation,
        precision,
        device,
        input_size=cfg.input_size,
        embedding_size=cfg.embedding_size,
    )


def make_second_loss(
    cfg: Config, teacher: Teacher | None, head: Head, source: ImageDataset, world: DistContext
) -> Distillation | None:
    """Make the distillation loss, which is added to the head's own; None without a teacher.

    Raises:
        UserError: The teacher does not fit this run.
        CheckpointError: The teacher's class centers cannot be used.
        FileNotFoundError: There is no such run.
    """
    if teacher is None:
        return None
    assert isinstance(head, PartialFC)
    try:
        return make_distillation(
            cfg.distillation,
            teacher,
            head,
            source,
            world,
            weight=cfg.distillation_weight,
            scale=cfg.scale,
            temperature=cfg.distillation_temperature,
            workspace=workspace_of(cfg, head.device),
        )
    except UserError:
        raise
    except ValueError as error:  # not one class fits the head's workspace
        raise UserError(str(error)) from error
