"""Training runs, checkpoints and heads that several test modules use."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import unittest.mock
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from arcshard.head.row_optimizer import SGDRows
from arcshard.losses import Margin
from arcshard.partial_fc import PartialFC
from configs.base import Config
from eval.verification_sets import VerificationSet
from tests.conftest import Ranks
from train_v2 import run_on
from training.build import build
from training.checkpoint.checkpointer import FOLDER, Checkpointer, list_checkpoints
from training.checkpoint.checkpointer import RankGroup as RanksOfRun
from training.checkpoint.sharded_io import TensorShard
from utils.distributed import DistContext

TINY_RUN: dict[str, Any] = {
    "rec": "synthetic",
    "num_classes": 23,
    "num_image": 240,
    "network": "r_nano",
    "embedding_size": 16,
    "input_size": 32,
    "batch_size": 12,
    "num_epoch": 4,
    "lr": 0.05,
    "frequent": 1,
    "verbose": 0,
    "num_workers": 1,
    "scale": 16.0,
    "margin_list": (1.0, 0.0, 0.2),
    "device": "cpu",
}
"""Settings of a run of 80 steps on one rank: 240 images, 4 epochs."""

CHECKPOINTED_RUN: dict[str, Any] = {
    "rec": "synthetic",
    "num_classes": 23,
    "num_image": 96,
    "network": "r_nano",
    "embedding_size": 16,
    "input_size": 32,
    "batch_size": 12,
    "num_epoch": 2,
    "lr": 0.05,
    "frequent": 1,
    "verbose": 0,
    "num_workers": 1,
    "scale": 16.0,
    "margin_list": (1.0, 0.0, 0.2),
    "device": "cpu",
    "checkpoint_every": 5,
    "keep_checkpoints": 100,
}
"""Settings of a run of 16 steps on one rank: 96 images, 2 epochs, a checkpoint every 5 steps."""

EXACT = {"precision": "fp64", "freeze_batch_norm": True}
"""With these, the losses of a run do not depend on the number of ranks, but for 1e-8."""


# --- runs ------------------------------------------------------------------------------------


def run_training(rank: int, world_size: int, folder: str, changes: dict[str, Any]) -> list[float]:
    """A whole run in this process; returns the losses of all steps."""
    cfg = Config(**{**TINY_RUN, "output": folder, **changes})
    assert not cfg.problems()
    world = DistContext(rank, rank, world_size, torch.device("cpu"))
    Path(folder).mkdir(parents=True, exist_ok=True)
    run_on(cfg, world, Path(folder))
    if rank:
        return []
    return [record["loss"] for record in read_metrics(folder) if "loss" in record]


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses_on(ranks: Ranks, world_size: int, folder: Path, **changes: Any) -> np.ndarray:
    """The losses of all steps of a run of TINY_RUN whose global batch is 12."""
    changes = {"batch_size": 12 // world_size, **changes}
    out = str(folder / f"{world_size}_{len(list(folder.iterdir()))}")
    return np.array(ranks.run(world_size, run_training, out, changes)[0])


def weights_after_one_step(
    rank: int, world_size: int, folder: str, changes: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], torch.Tensor, int]:
    """Backbone and head after one optimizer step, and how often gradients were all-reduced."""
    cfg = Config(**{**TINY_RUN, "output": folder, "freeze_batch_norm": True, **changes})
    parts = build(cfg, DistContext(rank, rank, world_size, torch.device("cpu")))
    batches = list(parts.loader)[: cfg.gradient_acc]
    parts.step.model.train()
    with torch.profiler.profile() as profile:
        parts.step(batches, 0.1)
    trace = Path(folder) / f"trace_{rank}.json"
    profile.export_chrome_trace(str(trace))  # to summarize the events took 4 times the step
    calls = trace.read_text().count('"name": "c10d::allreduce_"')
    weights = {k: v.clone() for k, v in parts.backbone.state_dict().items()}
    return weights, parts.head.weight.detach().clone(), calls


class Unhurried(Checkpointer):
    """Waits for every save: such short steps would leave checkpoints out, here or there."""

    def save(self, *arguments: Any, **options: Any) -> None:
        super().save(*arguments, **{**options, "wait": True})


def whole_run(rank: int, world_size: int, folder: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A run in this process: its losses by step, and its final weights."""
    settings = {**CHECKPOINTED_RUN, "batch_size": 12 // world_size, "output": folder, **changes}
    cfg = Config(**settings)
    assert not cfg.problems()
    Path(folder).mkdir(parents=True, exist_ok=True)
    world = DistContext(rank, rank, world_size, torch.device("cpu"))
    with unittest.mock.patch("training.start.Checkpointer", Unhurried):
        parts = run_on(cfg, world, Path(folder))
    backbone = hashlib.sha256()
    for value in parts.backbone.state_dict().values():
        backbone.update(value.numpy().tobytes())
    state = [p.detach().clone() for p in parts.head.parameters()]
    for parameter, rule in parts.head.optimized_parameters():
        state += [value.clone() for value in rule.state(parameter).values()]
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines() if rank == 0 else []
    losses = {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}
    return {"losses": losses, "backbone": backbone.hexdigest(), "head": state}


def copy_of_run(run: Path, target: Path, step: int) -> Path:
    """The run's folder as it was left just after the checkpoint of `step`."""
    shutil.copytree(run, target)
    for path in list_checkpoints(target / FOLDER):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return target


def assert_same(run: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """Losses and weights of two results of `whole_run` are equal to the last bit."""
    for one, two in zip(run, other, strict=True):
        assert one["losses"] == two["losses"]
        assert one["backbone"] == two["backbone"]
        for part, expected in zip(one["head"], two["head"], strict=True):
            assert torch.equal(part, expected)


def write_pairs(folder: Path, size: int = 32) -> VerificationSet:
    """A verification set of 20 pairs, also as pairs.bin in the folder."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(40):
        small = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        image = np.ascontiguousarray(np.kron(small, np.ones((size // 4, size // 4, 1), np.uint8)))
        images.append(simplejpeg.encode_jpeg(image, quality=95))
    issame = [bool(k % 2) for k in range(20)]
    with (folder / "pairs.bin").open("wb") as file:
        pickle.dump((images, issame), file)
    return VerificationSet("pairs", images, np.array(issame))


# --- checkpoints -----------------------------------------------------------------------------


def some_state(value: float = 1.0) -> dict[str, TensorShard]:
    """One tensor of 1000 equal numbers."""
    return {"x": TensorShard.whole(torch.full((1000,), value), True)}


class Disk:
    """A folder whose checkpoints can be made to fail, in the way of a real error."""

    def __init__(self, folder: Path) -> None:
        ranks = RanksOfRun(DistContext(0, 0, 1, torch.device("cpu")))
        self.saver = Checkpointer(folder, ranks, keep=2, max_failed=2)
        self.folder = folder

    def save(self, step: int, value: float = 1.0, is_best: bool = False) -> None:
        self.saver.save(step, some_state(value), {}, is_best=is_best, wait=True)


# --- heads -----------------------------------------------------------------------------------

PATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "autograd": ("autograd", {}),
    "fused": ("fused", {}),
    "fused, blocks of a few classes": ("fused", {"workspace_mib": 0.006}),
    "deferred": ("deferred", {}),
    "deferred, blocks of a few classes": ("deferred", {"workspace_mib": 0.006}),
}
"""Name -> the arguments `path` and `options` of `loss_and_gradients`."""


def batch_for(rank: int, sizes: list[int], num_classes: int, width: int, seed: int = 0):
    """This rank's part of a batch made from the seed, and the whole of it."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(sum(sizes), width, generator=generator, dtype=torch.float64)
    labels = torch.randint(num_classes, (sum(sizes),), generator=generator)
    start = sum(sizes[:rank])
    part = slice(start, start + sizes[rank])
    return embeddings[part].clone().requires_grad_(True), labels[part], embeddings, labels


def loss_and_gradients(
    rank: int,
    world_size: int,
    margin: Margin,
    num_classes: int,
    sizes: list[int],
    sample_rate: float,
    width: int,
    path: str = "autograd",
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One step of plain gradient descent at rate 1, so that centers move by their gradient."""
    head = PartialFC(
        margin,
        width,
        num_classes,
        sample_rate,
        row_optimizer=SGDRows(0.0, 0.0),
        seed=3,
        update="autograd" if path == "autograd" else "fused",
        dtype=torch.float64,
        **(options or {}),
    )
    if head.bias is not None:
        torch.nn.init.normal_(head.bias, generator=torch.Generator().manual_seed(rank))
    before = [p.detach().clone() for p in head.parameters()]
    embeddings, labels, _, _ = batch_for(rank, sizes, num_classes, width)
    loss = head(embeddings, labels, 1.0 if path == "fused" else None)
    loss.backward()
    _, sample = head.sampled_centers()
    classes = range(head.num_classes_local) if sample is None else sample
    classes = torch.tensor([head.class_range.start + int(c) for c in classes])
    head.step(1.0)
    gradients = [old - new.detach() for old, new in zip(before, head.parameters(), strict=True)]
    return {
        "loss": loss.detach(),
        "weight": before[0],
        "bias": before[1] if head.bias is not None else None,
        "grad_weight": gradients[0],
        "grad_bias": gradients[1] if head.bias is not None else None,
        "grad_embeddings": embeddings.grad,
        "classes": classes,
        "range": (head.class_range.start, head.class_range.stop),
        "state": {name: value.clone() for name, value in head.named_buffers()},
    }


# --- weights of the golden files -------------------------------------------------------------


def golden_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values for the tensors of a backbone's `state_dict`, by the rule of golden/README.md."""
    return {
        key: torch.from_numpy(np.asarray(_golden_weight(key, tuple(tensor.shape)))).to(tensor.dtype)
        for key, tensor in state.items()
    }


def _golden_weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The initial value of one tensor, in float64."""
    random = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape)
    if key.endswith("running_var"):
        return random.uniform(0.5, 1.5, shape)
    if key.endswith("running_mean"):
        return 0.1 * random.standard_normal(shape)
    if key in ("pos_embed", "mask_token"):
        return 0.02 * random.standard_normal(shape)
    if len(shape) == 1:
        return (
            random.uniform(0.25, 1.0, shape)
            if key.endswith("weight")
            else 0.1 * random.standard_normal(shape)
        )
    return random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
