"""Build the training set's loader and the sets that a config is scored on."""

from __future__ import annotations

import logging
from pathlib import Path

from configs.base import Config
from data.crop import ImageFolder, RandomResizedCrop
from data.dali import dali_is_installed
from data.datasets import MissingDataError, list_class_names
from dataset import DataLoader, get_dataloader
from eval.verification_sets import (
    VerificationSet,
    find_verification_sets,
    load_verification_set,
)
from training.setup import is_classification
from utils.distributed import DistContext

logger = logging.getLogger("train")


def make_loader(cfg: Config, world: DistContext) -> DataLoader:
    """Make the loader of this rank's share of the training set; it prefetches to a GPU.

    Raises:
        MissingDataError: The set is not there.
        DataError: The set is damaged or does not fit the config.
    """
    assert cfg.rec is not None
    use_dali = cfg.dali and dali_is_installed()
    if cfg.dali and not use_dali:
        logger.warning(
            "dali=True, but NVIDIA DALI is not installed (docs/installing_dali.md): our own reader "
            "gives the same images in the same order, with the same augmentation"
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
        augment=cfg.augment,
        crop=RandomResizedCrop(cfg.crop_area) if is_classification(cfg) else None,
        weights=cfg.rec_weights,
        samples_per_class=cfg.samples_per_class,
        shuffle_block=cfg.shuffle_block,
        exclude=[None if path == "-" else path for path in lists],
        on_bad_record=cfg.on_bad_record,
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
            f'rec={cfg.rec!r} has no folder train/ in it: task="classification" takes a folder '
            "with train/<class>/<picture> and val/<class>/<picture>"
        )
    return str(train)


def load_image_folder(cfg: Config) -> list[ImageFolder]:
    """Open the validation images of classification, labeled by the names of the training classes.

    Returns:
        One folder, or an empty list for the synthetic set.

    Raises:
        MissingDataError: There is no such folder.
    """
    if cfg.rec == "synthetic":
        return []
    train = Path(str(_training_folder(cfg)))
    val = Path(cfg.val_dir) if cfg.val_dir is not None else train.with_name("val")
    if not val.is_dir():
        raise MissingDataError(
            f"{val} is not a folder: classification is scored on class folders there; make it, or "
            "point val_dir at them"
        )
    return [ImageFolder(val, cfg.input_size, list_class_names(train))]


def load_verification_sets(cfg: Config) -> list[VerificationSet]:
    """Load the `val_targets` into memory.

    Raises:
        UserError: A set is missing or malformed.
    """
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
