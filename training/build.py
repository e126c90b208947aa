"""From the config to the parts of a run, cheap checks first: nothing starts that cannot end.

This is the only place where the config is taken apart; every part gets plain arguments.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from backbones import backbone_class, get_model, model_names
from backbones.base import Backbone
from backbones.weights import ModelMetadata, load_matching
from configs.base import Config
from data.crop import PictureFolder, RandomResizedCrop
from data.dali import dali_is_installed
from data.sources import MissingDataError, list_class_names
from dataset import DataLoader, get_dataloader
from eval.classification import classify
from eval.embedder import Embedder
from eval.verification import (
    VerificationSet,
    find_verification_sets,
    load_verification_set,
    verify,
)
from head.row_update import AdamWRows, RowUpdate, SGDRows
from head.shard import class_range
from losses import (
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
from partial_fc import PartialFC
from training.batch_norm import BatchNormStatistics
from training.classifier import Head, LayerClassifier, SplitClassifier, whole_classifier
from training.distillation import Distillation, make_distillation
from training.ema import WeightAverage
from training.optimizer import make_optimizer
from training.precision import (
    Precision,
    TrainedBackbone,
    allow_tf32,
    choose_precision,
    tf32_allowed,
)
from training.schedule import Schedule
from training.step import TrainStep, compile_backbone, distribute, settle_buckets
from utils.config import plain_values
from utils.distributed import World

logger = logging.getLogger("train")

VERSION = "ArcShard 0.1.0"
RUN_FILES = (
    "model.pt", "model_best.pt", "model.onnx", "model.onnx.data", "config.json", "metrics.jsonl",
    "metrics_discarded.jsonl", "tensorboard", "checkpoints", "profile", "label_map.txt",
)  # fmt: skip


class SetupError(ValueError):
    """The run cannot start; the message says what to change."""


@dataclass
class Parts:
    """Everything the loop needs, built and on its device."""

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
    verification_sets: list[VerificationSet] | list[PictureFolder] = field(default_factory=list)
    evaluate: Callable[..., dict[str, dict[str, float]]] = verify
    best_by: str = "accuracy_flip"
    classifier: str | None = None
    """Name of the head in model.pt, where it is the network's last layer."""
    average: WeightAverage | None = None
    """Of the backbone (ema_decay): verified and saved in its place."""

    @property
    def evaluated(self) -> tuple[Backbone, BatchNormStatistics]:
        """What is verified and saved: the average where there is one, and its statistics."""
        if self.average is not None:
            return self.average.model, self.average.batch_norm
        return self.backbone, self.batch_norm

    def model_state(self) -> dict[str, torch.Tensor]:
        """What model.pt holds, on the first rank; all ranks call it, a split head is collected."""
        state = dict(self.evaluated[0].state_dict())
        if self.classifier is not None:
            whole = whole_classifier(self.head)
            state |= {f"{self.classifier}.{name}": value for name, value in whole.items()}
        return state

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.schedule.total_steps


def check_output(output: str | Path) -> Path:
    """The run's folder, made if need be and tried out by writing a file.

    Raises:
        SetupError: it cannot be written, or belongs to a training set.
    """
    folder = Path(output)
    if any(folder.glob("*.rec")):  # label_map.txt there is not ours to set aside
        raise SetupError(
            f"output={str(output)!r} has records in it: choose a folder of the run's own"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SetupError(
            f"output={str(output)!r} cannot be written ({error.strerror or error}); choose a "
            "folder with output=..."
        ) from error
    return folder


def set_aside_earlier_run(folder: Path) -> None:
    """Move what an earlier run left in the folder into previous_<k>/: nothing is overwritten,
    and files of two runs are not mixed."""
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
    """The config with `global_batch_size` turned into batch_size and gradient_acc.

    Raises:
        SetupError: the ranks cannot share it equally.
    """
    if cfg.global_batch_size is None:
        return cfg
    share, rest = divmod(cfg.global_batch_size, world_size)
    if rest or not share:
        raise SetupError(
            f"global_batch_size={cfg.global_batch_size} cannot be shared equally by {world_size} "
            "ranks: choose a multiple of every number of ranks the run may have"
        )
    micro_steps = next(
        k for k in range(1, share + 1) if share % k == 0 and share <= k * cfg.batch_size
    )
    return dataclasses.replace(cfg, batch_size=share // micro_steps, gradient_acc=micro_steps)


def build(cfg: Config, world: World) -> Parts:
    """All parts of the run, with every check that needs files, networks or devices.

    Raises:
        SetupError, and the errors of the parts (data, weights, verification sets).
    """
    _check_wandb(cfg)
    _check_step_options(cfg, world)
    for sentence in cfg.unused():
        logger.warning(sentence)
    precision, warning = choose_precision(cfg.precision, cfg.fp16, world.device)
    if warning:
        logger.warning(warning)
    loader = _make_loader(cfg, world)
    sets = _load_pictures(cfg) if is_classification(cfg) else _load_verification_sets(cfg)
    torch.manual_seed(cfg.seed)  # the same initial backbone on every rank
    backbone = make_backbone(cfg)
    num_classes = loader.num_classes if cfg.num_classes == "auto" else int(cfg.num_classes)

    global_batch = cfg.batch_size * world.world_size * cfg.gradient_acc
    steps_per_epoch = len(loader) // cfg.gradient_acc
    if steps_per_epoch == 0:
        raise SetupError(
            f"an epoch has {loader.images_per_epoch} images, less than one global batch of "
            f"{global_batch} (batch_size {cfg.batch_size} x {world.world_size} ranks x "
            f"gradient_acc {cfg.gradient_acc}): lower batch_size or gradient_acc"
        )

    mean, std = (backbone.MEAN, backbone.STD) if is_classification(cfg) else (127.5, 127.5)
    allow_tf32(False)  # but in steps that ask for it
    model = TrainedBackbone(
        backbone, precision, cfg.freeze_batch_norm, cfg.channels_last, mean, std
    )
    model.place(world.device)
    batch_norm = BatchNormStatistics(model, cfg.freeze_batch_norm)
    average = WeightAverage(backbone, batch_norm, cfg.ema_decay) if cfg.ema_decay else None
    distributed = distribute(
        model, world.world_size, world.device,
        static_graph=cfg.static_graph, all_reduce_dtype=cfg.all_reduce_dtype,
    )  # fmt: skip
    settle_buckets(distributed, cfg.input_size, world.device, batch_norm)
    if cfg.compile:
        with tf32_allowed(precision.tf32):
            seconds = compile_backbone(
                distributed, cfg.batch_size, cfg.input_size, world.device, batch_norm
            )
        logger.info("compile: the first pass took %.1f s", seconds)
    head = make_head(cfg, world, num_classes, precision)
    optimizer = make_optimizer(
        backbone, cfg.optimizer, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay,
        decay_norms_and_biases=cfg.decay_norms_and_biases, layer_decay=cfg.layer_decay,
        spread=cfg.zero and world.world_size > 1,
    )  # fmt: skip
    step = TrainStep(
        distributed,
        head,
        optimizer,
        batch_norm,
        clip_grad_norm=cfg.clip_grad_norm,
        scaler=_make_scaler(world.device) if precision.needs_scaler else None,
        embed_ahead=embeds_ahead(cfg, head.margin),
        distillation=_make_distillation(cfg, head, loader, precision, world),
        tf32=precision.tf32,
        average=average,
    )
    seed = cfg.seed + 1 + world.rank  # from here on ranks draw their own (dropout)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    parts = Parts(
        loader=loader,
        backbone=backbone,
        head=head,
        step=step,
        schedule=_make_schedule(cfg, global_batch, steps_per_epoch),
        batch_norm=batch_norm,
        embedder=Embedder(
            average.model if average else backbone, mean, std, device=world.device
        ),
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
        parts.evaluate = partial(classify, places=head.target_places, width=cfg.embedding_size)
        parts.best_by, parts.classifier = "top1", backbone.CLASSIFIER
    _announce(cfg, world, parts, precision.name)
    return parts


def facts_of(cfg: Config, parts: Parts) -> dict[str, Any]:
    """What a checkpoint says of its run, for training/resume.py to compare."""
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


def is_classification(cfg: Config) -> bool:
    """Whether the last layer is a plain classifier of pictures."""
    return cfg.task == "classification"


def _check_wandb(cfg: Config) -> None:
    if cfg.using_wandb and importlib.util.find_spec("wandb") is None:
        raise SetupError(
            "using_wandb=True, but wandb is not installed: pip install wandb, or using_wandb=False"
        )
    if cfg.wandb_key:
        logger.warning("wandb_key is ignored: keep keys in the environment (WANDB_API_KEY)")


def _check_step_options(cfg: Config, world: World) -> None:
    on_gpu = world.device.type == "cuda"
    if cfg.all_reduce_dtype == "bf16" and not on_gpu and world.world_size > 1:
        raise SetupError(
            "all_reduce_dtype=bf16 needs GPUs (NCCL): on CPUs gradients are added up in fp32 or "
            "fp16"
        )
    compiler = os.environ.get("CXX", "g++")
    if cfg.compile and not on_gpu and shutil.which(compiler) is None:
        raise SetupError(
            f"compile=True needs a C++ compiler, and there is no {compiler!r}: install one, name "
            "another in the environment variable CXX, or leave compile out"
        )
    if cfg.compile and on_gpu and importlib.util.find_spec("triton") is None:
        raise SetupError("compile=True needs triton: pip install triton, or leave compile out")


def make_margin(cfg: Config) -> Margin:
    """The loss the config names.

    Raises:
        SetupError: a value outside the loss's domain.
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
        "subcentre_arcface": lambda: ArcFace(**m, **fixed),
        "cosface": lambda: CosFace(**m, **fixed),
        "sphereface": lambda: SphereFace(**m, **fixed),
        "adaface": lambda: AdaFace(
            **m, h=cfg.adaface_h, t_alpha=cfg.adaface_t_alpha, scale=cfg.scale
        ),
        "magface": lambda: MagFace(
            *cfg.magface_norms, *cfg.magface_margins, cfg.magface_lambda_g, cfg.scale
        ),
        "curricularface": lambda: CurricularFace(
            **m, alpha=cfg.curricular_alpha, scale=cfg.scale
        ),
        "elasticface_arc": lambda: ElasticFace("arc", **{"margin": 0.5, **m}, **elastic),
        "elasticface_cos": lambda: ElasticFace("cos", **{"margin": 0.35, **m}, **elastic),
    }  # fmt: skip
    try:
        return makers[cfg.loss]()
    except ValueError as error:
        raise SetupError(f"loss={cfg.loss!r}: {error}") from error


def make_backbone(cfg: Config) -> Backbone:
    """The network that the config names, with `init_backbone` in it.

    Raises:
        SetupError: it cannot be built so, or not trained for this task.
    """
    try:
        options = _options_of_the_network(cfg)
        if is_classification(cfg):
            if backbone_class(cfg.network).CLASSIFIER is None:
                able = [n for n in model_names() if backbone_class(n).CLASSIFIER is not None]
                raise SetupError(
                    f"network={cfg.network!r} ends in an embedding; task=\"classification\" trains "
                    f"networks that end in a classifier: {', '.join(able)}"
                )
            options["with_fc"] = False  # the head is the fc
        backbone = get_model(
            cfg.network,
            num_features=cfg.embedding_size,
            dropout=cfg.dropout,
            input_size=cfg.input_size,
            gradient_checkpointing=cfg.gradient_checkpointing,
            **options,
        )
        if cfg.init_backbone is not None:
            report = load_matching(backbone, cfg.init_backbone)
            logger.info("init_backbone %s: %s", cfg.init_backbone, report)
    except (ValueError, FileNotFoundError) as error:
        raise SetupError(str(error)) from error
    return backbone


def _options_of_the_network(cfg: Config) -> dict[str, Any]:
    """The keys that stand for options of some networks, where they are set."""
    options: dict[str, Any] = {}
    for key in ("drop_path_rate", "mask_ratio"):
        value = getattr(cfg, key)
        if value is None:
            continue
        if key not in backbone_class(cfg.network).OPTIONS:
            able = [name for name in model_names() if key in backbone_class(name).OPTIONS]
            raise SetupError(
                f"{key}={value!r}: network={cfg.network!r} has no such option; leave it at None, "
                f"or choose one of {', '.join(able)}"
            )
        options[key] = value
    return options


def _make_loader(cfg: Config, world: World) -> DataLoader:
    assert cfg.rec is not None
    use_dali = cfg.dali and dali_is_installed()
    if cfg.dali and not use_dali:
        logger.warning(
            "dali=True, but NVIDIA DALI is not installed (docs/installing_dali.md): our own reader "
            "gives the same images in the same order, with the same augmentation"
        )
    augment = list(cfg.augment)
    if cfg.dali_aug and cfg.dali:
        augment.insert(0, "dali_aug")
    elif cfg.dali_aug:
        logger.warning(
            "dali_aug=True has an effect only with dali=True, as in arcface_torch; "
            "augment=[dali_aug] works without DALI too"
        )
    on_gpu = world.device.type == "cuda"
    lists = cfg.exclude if isinstance(cfg.exclude, list) else [cfg.exclude or "-"]
    return get_dataloader(
        _training_folder(cfg),
        cfg.batch_size,
        rank=world.rank,
        world_size=world.world_size,
        seed=cfg.seed,
        num_workers=cfg.num_workers,
        input_size=cfg.input_size,
        num_classes=None if cfg.num_classes == "auto" else int(cfg.num_classes),
        num_images=None if cfg.num_image == "auto" else int(cfg.num_image),
        augment=augment,
        crop=RandomResizedCrop(cfg.crop_area) if is_classification(cfg) else None,
        weights=cfg.rec_weights,
        samples_per_class=cfg.samples_per_class,
        shuffle_block=cfg.shuffle_block,
        exclude=[None if path == "-" else path for path in lists],
        on_bad_record=cfg.on_bad_record,
        worker_type=cfg.worker_type,
        dali=use_dali,
        pin_memory=on_gpu,
        device=world.device if on_gpu else None,
    )


def _training_folder(cfg: Config) -> str | list[str]:
    assert cfg.rec is not None
    if not is_classification(cfg) or cfg.rec == "synthetic" or isinstance(cfg.rec, list):
        return cfg.rec
    train = Path(cfg.rec) / "train"
    if not train.is_dir():
        raise MissingDataError(
            f"rec={cfg.rec!r} has no folder train/ in it: task=\"classification\" takes a folder "
            "with train/<class>/<picture> and val/<class>/<picture>"
        )
    return str(train)


def _load_pictures(cfg: Config) -> list[PictureFolder]:
    """What classification is scored on: val/, its labels by the names of the training classes."""
    if cfg.rec == "synthetic":
        return []
    train = Path(str(_training_folder(cfg)))
    val = Path(cfg.val_dir) if cfg.val_dir is not None else train.with_name("val")
    if not val.is_dir():
        raise MissingDataError(
            f"{val} is not a folder: classification is scored on class folders there; make it, or "
            "point val_dir at them"
        )
    return [PictureFolder(val, cfg.input_size, list_class_names(train))]


def _load_verification_sets(cfg: Config) -> list[VerificationSet]:
    if not cfg.val_targets:
        return []
    assert cfg.rec is not None
    folder = Path(cfg.val_dir or (cfg.rec if isinstance(cfg.rec, str) else cfg.rec[0]))
    if folder.suffix == ".rec":
        folder = folder.parent
    return [
        load_verification_set(path, input_size=cfg.input_size)
        for path in find_verification_sets(folder, cfg.val_targets)
    ]


def make_head(cfg: Config, world: World, num_classes: int, precision: Precision) -> Head:
    """The head of this rank, with its update rule.

    Raises:
        SetupError: a loss or a size that it cannot be built with.
    """
    if has_layer(cfg):
        return _make_layer(cfg, world, num_classes, precision)
    margin = make_margin(cfg)
    kind = SplitClassifier if is_classification(cfg) else PartialFC
    centres_per_class = cfg.sub_centres or (3 if cfg.loss == "subcentre_arcface" else 1)
    dtype = torch.bfloat16 if cfg.head_weight_dtype == "bf16" else precision.dtype
    # A margin that looks at the whole batch meets all micro-batches at once (training/step.py).
    passes = cfg.gradient_acc if embeds_ahead(cfg, margin) else 1
    try:
        return kind(
            margin,
            cfg.embedding_size,
            num_classes,
            cfg.sample_rate,
            row_update=_make_row_update(cfg),
            update=cfg.head_update,  # type: ignore[arg-type]
            batch_size_per_rank=cfg.batch_size * passes,
            centres_per_class=centres_per_class,
            buffer_mib=cfg.head_buffer_mib,
            half=precision.head_matmul if cfg.head_update == "fused" else None,
            seed=cfg.seed,
            device=world.device,
            dtype=dtype,
            centre_device="cpu" if cfg.head_device == "cpu" else None,
        )
    except ValueError as error:
        raise SetupError(str(error)) from error
    except RuntimeError as error:  # the allocator has no other way to say that it is too much
        rows = num_classes * centres_per_class
        size = rows * cfg.embedding_size * dtype.itemsize / world.world_size / 2**30
        raise SetupError(
            f"the class centres of num_classes={num_classes} need {size:,.1f} GiB per rank, which "
            f"cannot be had: more ranks, fewer classes, a smaller embedding_size, "
            f'head_weight_dtype="bf16" or head_device="cpu" ({error})'
        ) from error


def has_layer(cfg: Config) -> bool:
    """Whether the head is a LayerClassifier, with whole logits and gradients."""
    return is_classification(cfg) and (cfg.parallel_dim in (None, 0) or cfg.label_smoothing > 0)


def rank_0_alone(cfg: Config, world_size: int, num_classes: int) -> tuple[Config, int]:
    """Config and number of classes of one rank alone whose head does the work of rank 0."""
    if has_layer(cfg) and cfg.parallel_dim is None:
        return cfg, num_classes
    cfg = dataclasses.replace(cfg, batch_size=cfg.batch_size * world_size)
    if has_layer(cfg) and cfg.parallel_dim == 0:
        mine = len(class_range(cfg.embedding_size, 0, world_size))
        return dataclasses.replace(cfg, embedding_size=mine), num_classes
    return cfg, len(class_range(num_classes, 0, world_size))


def embeds_ahead(cfg: Config, margin: Margin) -> bool:
    """Whether all micro-batches are embedded before the head sees any."""
    return cfg.gradient_acc > 1 and margin.reads_batch


def _make_layer(
    cfg: Config, world: World, num_classes: int, precision: Precision
) -> LayerClassifier:
    try:
        return LayerClassifier(
            cfg.embedding_size, num_classes, cfg.parallel_dim,
            bias=cfg.softmax_bias, label_smoothing=cfg.label_smoothing,
            row_update=_make_row_update(cfg), bias_update=_make_row_update(cfg),
            batch_size_per_rank=cfg.batch_size, half=precision.head_matmul, seed=cfg.seed,
            device=world.device, dtype=precision.dtype,
        )  # fmt: skip
    except RuntimeError as error:
        raise SetupError(
            f"parallel_dim={cfg.parallel_dim!r}: a last layer of {num_classes} classes cannot be "
            f"had on this rank; parallel_dim=1 and more ranks make its part smaller ({error})"
        ) from error


def _make_distillation(
    cfg: Config, head: Head, loader: DataLoader, precision: Precision, world: World
) -> Distillation | None:
    if cfg.teacher is None:
        return None
    assert isinstance(head, PartialFC)
    try:
        return make_distillation(
            cfg.teacher, cfg.distillation, head, loader.source, precision, world,
            weight=cfg.distillation_weight, scale=cfg.scale,
            temperature=cfg.distillation_temperature, input_size=cfg.input_size,
            buffer_mib=cfg.head_buffer_mib,
        )  # fmt: skip
    except ValueError as error:
        raise SetupError(str(error)) from error


def _make_row_update(cfg: Config) -> RowUpdate:
    state_dtype = torch.bfloat16 if cfg.head_state_dtype == "bf16" else None
    if cfg.optimizer == "sgd":
        return SGDRows(cfg.momentum, cfg.weight_decay, state_dtype)
    return AdamWRows(weight_decay=cfg.weight_decay, state_dtype=state_dtype)


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


def _announce(cfg: Config, world: World, parts: Parts, precision: str) -> None:
    loader, head = parts.loader, parts.head
    logger.info(
        "%d images of %d classes in %s; %d dropped per epoch; head of %d classes, %d here%s",
        loader.num_images, loader.num_classes, cfg.rec,
        loader.images_per_epoch - parts.steps_per_epoch * parts.global_batch,
        head.num_classes, head.num_classes_local,
        " (more than the labels need)" if head.num_classes > loader.num_classes else "",
    )  # fmt: skip
    logger.info(
        "%s, %.1f M parameters, embedding %d, %s on %d x %s",
        cfg.network, sum(p.numel() for p in parts.backbone.parameters()) / 1e6,
        cfg.embedding_size, precision, world.world_size, world.device.type,
    )  # fmt: skip
    groups = parts.step.optimizer.param_groups
    if len(groups) > 1:
        logger.info(
            "%d groups of parameters: weight decay %s, learning rate times %s", len(groups),
            *(", ".join(f"{value:.3g}" for value in sorted({group[key] for group in groups}))
              for key in ("weight_decay", "lr_factor")),
        )  # fmt: skip
    if cfg.freeze_epoch:
        logger.info(
            "freeze_epoch=%d: only the class centres move in the first %d steps",
            cfg.freeze_epoch, cfg.freeze_epoch * parts.steps_per_epoch,
        )  # fmt: skip
        if cfg.init_backbone is None:
            logger.warning("freeze_epoch without init_backbone freezes random features")
    if cfg.ema_decay:
        logger.info("ema_decay=%g: the average of the weights is verified and saved", cfg.ema_decay)
    logger.info(
        "head: %s; sample rate %g%s; %s",
        head.margin.describe(), cfg.sample_rate,
        f"; {head.centres_per_class} centres per class" if head.centres_per_class > 1 else "",
        head.describe_memory(),
    )  # fmt: skip
    if cfg.gradient_acc > 1:
        logger.info(
            "gradient_acc=%d: %s", cfg.gradient_acc,
            "this loss looks at the whole batch, so every micro-batch is embedded twice (one more "
            "forward pass of the backbone)" if embeds_ahead(cfg, head.margin) else
            "class centres move once all micro-batches are seen (one more matmul in the head)"
            if head.engine is not None else "gradients of the class centres are added up",
        )  # fmt: skip
    logger.info(
        "global batch %d = %d per rank x %d ranks x %d micro-steps; %d steps per epoch, %d in all",
        parts.global_batch, cfg.batch_size, world.world_size, cfg.gradient_acc,
        parts.steps_per_epoch, parts.total_steps,
    )  # fmt: skip
    if world.device.type == "cpu" and world.world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        logger.warning("several CPU ranks without OMP_NUM_THREADS compete for cores")
