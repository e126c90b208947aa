"""Which checkpoint a run resumes from, and whether it may."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.base import Run, Verification, WeightsAndBiases
from training.checkpoint.checkpointer import (
    FOLDER,
    MANIFEST,
    Checkpoint,
    CheckpointError,
    RankGroup,
    check_intact,
    find_intact,
    list_checkpoints,
)
from utils.config import standard_settings

logger = logging.getLogger("train")

# Keys of the config by what a change of them means for a run that resumes.
FREE = frozenset(
    {
        *Run.model_fields,
        *Verification.model_fields,
        *WeightsAndBiases.model_fields,
        "batch_size",
        "channels_last",
        "collective_timeout_s",
        "compile",
        "dali",
        "device",
        "fp16",
        "global_batch_size",
        "gradient_acc",
        "gradient_checkpointing",
        "head_kernels",
        "head_offload",
        "head_update",
        "head_workspace_mib",
        "init_backbone",
        "init_head",
        "max_bad_steps",
        "max_rollbacks",
        "max_steps",
        "num_classes",
        "num_image",
        "num_workers",
        "on_divergence",
        "parallel_dim",
        "rec",
        "zero_stage",
    }
)
"""These keys do not change the result, or what they determine is compared directly."""
FIXED = frozenset(
    {
        "task",
        "network",
        "embedding_size",
        "input_size",
        "loss",
        "sub_centers",
        "softmax_bias",
        "optimizer",
        "seed",
        "samples_per_class",
        "shuffle_block",
        "rec_weights",
        "head_weight_dtype",
        "head_state_dtype",
        "freeze_batch_norm",
        "mask_ratio",
    }
)
"""These keys must not change: state or data order would not fit. Changes of others are logged."""


def config_sha256(config: Mapping[str, Any]) -> str:
    """Return a hash of the settings that determine the result."""
    told = {key: value for key, value in config.items() if key not in FREE}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def find(resume: bool | str, output: Path, ranks: RankGroup) -> Checkpoint | None:
    """Find the checkpoint to resume from.

    Args:
        resume: True or "auto" for the newest intact checkpoint in `output`, if there is any. A path
            for a checkpoint, a folder of checkpoints or a run. "never" for none. False for none,
            but "auto" where torchrun has restarted the ranks.
        output: The run's output folder.
        ranks: The ranks.

    Returns:
        The checkpoint, None to start a new run.

    Raises:
        CheckpointError: The path has no usable checkpoint.
    """
    if resume is False and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        resume = "auto"
    if resume in (False, "never"):
        return None
    if resume in (True, "auto"):
        found = find_intact(output / FOLDER, ranks)
        if found is None:
            logger.info("resume=%s: no checkpoint in %s yet, starting anew", resume, output)
        return found
    found = find_at(Path(str(resume)), ranks)
    if found is None:
        raise CheckpointError(
            f"resume={str(resume)!r}: no usable checkpoint there. Give a run's folder, its "
            f"checkpoints folder or one step_... folder, or resume=False to start anew"
        )
    return found


def find_at(path: Path, ranks: RankGroup) -> Checkpoint | None:
    """Find the checkpoint that a path means.

    It is the path itself, or the newest intact one of a run or of a folder of checkpoints; None if
    there is none.

    Raises:
        CheckpointError: The path is a checkpoint and is damaged.
    """
    if (path / MANIFEST).exists():
        return check_intact(path, ranks)
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    return find_intact(folder, ranks) if list_checkpoints(folder) else None


def check(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare the facts of a checkpoint with those of this run.

    Both have "config" with every key, and under "data" numbers that must be equal: num_classes,
    num_images, global_batch and steps_per_epoch. "data set" is the fingerprint of the set; a
    difference there is only logged.

    Args:
        saved: Facts of the checkpoint.
        now: Facts of this run.

    Raises:
        CheckpointError: A difference would make it another run. The message lists all of them.
    """
    # A checkpoint may be older than the present spelling of a key.
    before, _, problems = standard_settings(saved["config"])
    after = now["config"]
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old == new or key in FREE:
            continue
        if key in FIXED:
            problems.append(f"{key} was {old!r}, is {new!r}")
        else:
            logger.warning("resuming with another %s: %r, was %r", key, new, old)
    advice = {
        "global_batch": "; set batch_size and gradient_acc so that batch_size x ranks x "
        "gradient_acc is what it was, or global_batch_size, which follows any number of ranks",
        "num_images": "; the data order would be another one: start a new run with "
        "init_backbone=RUN",
        "num_classes": "; start a new run with init_backbone=RUN init_head=RUN",
    }
    for key, old in saved["data"].items():
        new = now["data"].get(key)
        if new != old:
            problems.append(f"{key} was {old!r}, is {new!r}{advice.get(key, '')}")
    if saved["data set"] != now["data set"]:
        logger.warning(
            "the data set has as many images and classes as that of the checkpoint, but it is "
            "another one: %s, was %s",
            now["data set"],
            saved["data set"],
        )
    if problems:
        raise CheckpointError("this is not the run of the checkpoint: " + "; ".join(problems))
