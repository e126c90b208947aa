"""The complete state of a run: what a checkpoint holds, and how it is restored.

Tensors are named after where they belong:

    backbone/<name>            parameters and buffers
    optimizer/<key>/<name>     the backbone's optimizer
    head/weight, head/bias     class centers, by rows; head/<parameter>/<key>: their optimizer's
    head/margin_<name>         running values of the margin
    watch/<name>               running statistics of the divergence monitor
    ema/backbone/<name>, ema/updates: the average of the backbone (training/ema.py)
    ranks/<what>               one row per rank: batch-norm statistics, RNG states, counts

Everything else is plain values: see `facts`. On another number of ranks, the centers and their
state go to the ranks that own them now, batch-norm statistics become the mean over the saved ranks,
and RNG states (dropout, masks) are derived from the seed, the step and the rank.

Where this run keeps an average and the checkpoint has none, it starts from the checkpoint's
weights. An average that this run does not use is left out. Both are logged.
"""

from __future__ import annotations

import logging
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arcshard.random import hash_key
from training.batch_norm import BatchNormStatistics
from training.build import TrainComponents
from training.checkpoint import sharded_io
from training.checkpoint.checkpointer import Checkpoint, RankGroup
from training.checkpoint.sharded_io import State, StorageError, TensorShard
from training.classifier import LayerClassifier
from training.divergence import DivergenceMonitor, RollBack
from training.optimizer import is_spread, own_optimizer, own_parameters
from utils.distributed import DistContext

logger = logging.getLogger("train")

RANKS = "ranks/"
EMA = "ema/"
EMA_ROW = "ema_batch_norm"
OPTIMIZER_STATE = ("momentum_buffer", "step", "exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a run has come. Only the methods here change it.

    Attributes:
        step: Optimizer steps done.
        position: Global batches of the data order that were used. It exceeds `step` by those that
            rollbacks left out.
        best: Highest mean accuracy.
        best_step: Step of the highest mean accuracy.
        evaluated_step: Step of the last verification.
        rollbacks: Number of rollbacks so far.
    """

    step: int = 0
    position: int = 0
    best: float = float("-inf")
    best_step: int = -1
    evaluated_step: int = -1
    rollbacks: int = 0

    @property
    def is_best(self) -> bool:
        """Whether the last step has the highest mean accuracy so far."""
        return self.best_step == self.step

    def count_step(self) -> None:
        """Count an optimizer step and its global batch."""
        self.step += 1
        self.position += 1

    def count_evaluation(self, score: float) -> bool:
        """Count a verification with this mean accuracy; return whether it is the best so far."""
        self.evaluated_step = self.step
        is_best = score > self.best  # never for NaN
        if is_best:
            self.best, self.best_step = score, self.step
        return is_best

    def go_back(self, saved: Progress, bad: RollBack) -> None:
        """Return to a saved progress, but past the data of the bad steps."""
        position = self.position - (self.step - bad.bad_steps.stop)
        vars(self).update({**vars(saved), "position": position, "rollbacks": bad.number})


class RunState:
    """Collects the state of a run, and restores a saved one.

    Args:
        parts: Parts of the run.
        world: This process among the ranks.
        monitor: Divergence monitor of the loop.
        seed: Seed of the run.
    """

    def __init__(
        self, parts: TrainComponents, world: DistContext, monitor: DivergenceMonitor, seed: int
    ) -> None:
        self.parts, self.world, self.monitor, self.seed = parts, world, monitor, seed

    def tensors(self) -> State:
        """Return every tensor itself, without copies."""
        return {**self._on_all_ranks(), **self._by_class(), **self._by_rank()}

    def facts(self, progress: Progress) -> dict[str, Any]:
        """Return what is not a tensor, as plain values. Waits for the device under fp16."""
        scaler = self.parts.step.scaler
        head = self.parts.head.get_extra_state()
        return {
            "progress": asdict(progress),
            "world_size": self.world.world_size,
            "scaler": None if scaler is None else scaler.state_dict(),
            "head": {key: head[key] for key in ("samples_drawn", "forwards", "seed")},
        }

    def bytes_on_disk(self) -> int:
        """Return the size of the whole state over all ranks (of ZeRO's, by this rank's share)."""
        size = sum(
            stored.shape.numel() * stored.local.itemsize for stored in self.tensors().values()
        )
        if is_spread(self.parts.step.optimizer):
            mine = sum(t.numel() * t.itemsize for t in self._optimizer().values())
            size += mine * (self.world.world_size - 1)
        return size

    def load(self, found: Checkpoint, ranks: RankGroup) -> Progress:
        """Restore a checkpoint; all ranks call this together, and each reads its own rows.

        Args:
            found: The checkpoint.
            ranks: The ranks.

        Returns:
            The saved progress.

        Raises:
            CheckpointError: It does not hold what this run needs.
        """
        has_average = ranks.run_on_all_ranks(lambda: self._make_room(found.path))[0]
        wanted = {
            name: stored
            for name, stored in {**self._on_all_ranks(), **self._by_class()}.items()
            if has_average or not name.startswith(EMA)
        }
        facts = found.manifest.facts
        saved_ranks = int(facts["world_size"])
        same_ranks = saved_ranks == self.world.world_size
        by_rank = self._by_rank()
        if not has_average:
            by_rank.pop(RANKS + EMA_ROW, None)
        if not same_ranks:
            by_rank = {
                name: TensorShard.whole(
                    stored.local.new_empty(saved_ranks, *stored.local.shape[1:]), False
                )
                for name, stored in by_rank.items()
                if "generator" not in name
            }
        ranks.run_on_all_ranks(
            lambda: sharded_io.read(found.path, {**wanted, **by_rank}, ranks.group, ranks.is_alone)
        )
        rows = {
            name: stored.local.squeeze(0) if same_ranks else stored.local
            for name, stored in by_rank.items()
        }
        if same_ranks:
            self._set_generators(rows)
        else:
            rows = {name: self._joined(name, each) for name, each in rows.items()}
            torch.manual_seed(hash_key(self.seed, found.manifest.step, 1 + self.world.rank))
        self._set_rows(rows, facts)
        self._set_average(rows, has_average, found.path)
        if self.parts.step.scaler is not None and facts["scaler"] is not None:
            self.parts.step.scaler.load_state_dict(facts["scaler"])
        return Progress(**facts["progress"])

    # --- the three kinds of tensors ----------------------------------------------------------

    def _on_all_ranks(self) -> dict[str, TensorShard]:
        """Return what is the same on every rank; the ranks share the writing by size."""
        tensors = self._backbone()
        if not is_spread(self.parts.step.optimizer):
            tensors |= self._optimizer()
        for name, buffer in self.parts.head.named_buffers():
            tensors[f"head/{name}"] = buffer
        for name, value in self.monitor.state_dict().items():
            tensors[f"watch/{name}"] = value
        total = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        stored, before = {}, 0
        for name, tensor in tensors.items():
            writer = before * self.world.world_size // max(total, 1)
            stored[name] = TensorShard.whole(tensor.detach(), writer == self.world.rank)
            before += tensor.numel() * tensor.itemsize
        if is_spread(self.parts.step.optimizer):  # each tensor has one owner
            stored |= {name: TensorShard.whole(t, True) for name, t in self._optimizer().items()}
        return stored

    def _by_class(self) -> dict[str, TensorShard]:
        """Return this rank's part of class centers, biases and their optimizer state."""
        head = self.parts.head
        names = {id(parameter): name for name, parameter in head.named_parameters()}
        stored = {}
        for parameter, rule in head.optimized_parameters():
            name = f"head/{names[id(parameter)]}"
            stored[name] = self._part_of_head(parameter.detach())
            for key, value in rule.state(parameter).items():
                stored[f"{name}/{key}"] = self._part_of_head(value)
        return stored

    def _part_of_head(self, tensor: Tensor) -> TensorShard:
        """Return this rank's part of a tensor with a row per class center.

        The part is its rows, or its columns where features are split. Where nothing is split it is
        the whole tensor, which one rank writes.
        """
        head = self.parts.head
        if isinstance(head, LayerClassifier) and head.dim == 0 and tensor.dim() == 2:
            return TensorShard(tensor, head.features.start, head.embedding_size, dim=1)
        is_part = head.num_classes_local < head.num_classes
        return TensorShard(
            tensor,
            head.class_range.start * head.centers_per_class,
            head.num_classes * head.centers_per_class,
            is_part or self.world.is_main,
        )

    def _by_rank(self) -> dict[str, TensorShard]:
        """Return what differs between ranks."""
        _, numpy_words, *numpy_place, numpy_gauss = np.random.get_state(legacy=True)
        kind, words, gauss = random.getstate()
        rows: dict[str, Tensor] = {
            "counts": torch.tensor(
                [self.parts.loader.num_skipped, *self.parts.head.get_extra_state()["roundings"]]
            ),
            "generator_torch": torch.get_rng_state(),
            "generator_numpy": torch.tensor([*map(int, numpy_words), *numpy_place]),
            "generator_numpy_gauss": torch.tensor(numpy_gauss, dtype=torch.float64),
            "generator_python": torch.tensor([kind, *words, gauss is not None]),
            "generator_python_gauss": torch.tensor(gauss or 0.0, dtype=torch.float64),
        }
        if self.world.device.type == "cuda":
            rows["generator_cuda"] = torch.cuda.get_rng_state(self.world.device)
        if self.parts.batch_norm.statistics.numel():
            rows["batch_norm"] = self.parts.batch_norm.statistics
            rows["batch_norm_counts"] = self.parts.batch_norm.counts
            if self.parts.average is not None:
                rows[EMA_ROW] = self.parts.average.batch_norm.statistics
        rank, world_size = self.world.rank, self.world.world_size
        return {RANKS + n: TensorShard.of_rank(row, rank, world_size) for n, row in rows.items()}

    # --- details -----------------------------------------------------------------------------

    def _backbone(self) -> dict[str, Tensor]:
        """Return parameters and buffers, without the statistics that differ between ranks."""
        state = _common_state("backbone/", self.parts.backbone, self.parts.batch_norm)
        average = self.parts.average
        if average is not None:
            state |= _common_state(f"{EMA}backbone/", average.model, average.batch_norm)
            state[f"{EMA}updates"] = average.updates
        return state

    def _optimizer(self) -> dict[str, Tensor]:
        state = own_optimizer(self.parts.step.optimizer).state
        return {
            f"optimizer/{key}/{name}": value
            for name, parameter in self.parts.backbone.named_parameters()
            for key, value in state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def _make_room(self, folder: Path) -> bool:
        """Create the state that the optimizer makes only at its first step, and compare all names.

        Returns:
            Whether the checkpoint has an average of the backbone.

        Raises:
            StorageError: The checkpoint has other tensors than this run.
        """
        saved = sharded_io.describe(folder)
        optimizer = own_optimizer(self.parts.step.optimizer)
        own = {id(parameter) for parameter in own_parameters(optimizer)}
        elsewhere: set[str] = set()  # state that other ranks hold
        for name, parameter in self.parts.backbone.named_parameters():
            if id(parameter) not in own and parameter.requires_grad:
                elsewhere |= {f"optimizer/{key}/{name}" for key in OPTIMIZER_STATE}
                continue
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"optimizer/{key}/{name}" in saved:
                    # Averages have their parameter's memory format: fused kernels rely on it.
                    like = parameter.new_zeros((), dtype=torch.float32)
                    optimizer.state[parameter].setdefault(
                        key, like if key == "step" else torch.zeros_like(parameter)
                    )
        here = {**self._on_all_ranks(), **self._by_class(), **self._by_rank()}
        free = (RANKS, EMA)
        extra = sorted(n for n in saved.keys() - here.keys() - elsewhere if not n.startswith(free))
        missing = sorted(n for n in here.keys() - saved.keys() if not n.startswith(free))
        if extra or missing:
            raise StorageError(
                f"{folder} belongs to another kind of run: only there {extra[:4]}, only here "
                f"{missing[:4]}"
            )
        return f"{EMA}updates" in saved

    def _joined(self, name: str, rows: Tensor) -> Tensor:
        """Make this rank's row from the rows of another number of ranks."""
        if name in (RANKS + "batch_norm", RANKS + EMA_ROW):
            return torch.where((rows == rows[0]).all(dim=0), rows[0], rows.mean(dim=0))
        if name == RANKS + "counts":  # the sum of skipped images, the maximum of rounding draws
            skipped = rows[:, 0].sum() if self.world.is_main else rows.new_zeros(())
            return torch.cat([skipped[None], rows[:, 1:].amax(dim=0)])
        return rows.amax(dim=0)

    def _set_rows(self, rows: dict[str, Tensor], facts: dict[str, Any]) -> None:
        if self.parts.batch_norm.statistics.numel():
            self.parts.batch_norm.statistics.copy_(rows[RANKS + "batch_norm"])
            self.parts.batch_norm.counts.copy_(rows[RANKS + "batch_norm_counts"])
        skipped, *roundings = rows[RANKS + "counts"].tolist()
        self.parts.loader.num_skipped = skipped
        self.parts.head.set_extra_state({**facts["head"], "roundings": roundings})

    def _set_average(self, rows: dict[str, Tensor], is_saved: bool, folder: Path) -> None:
        average = self.parts.average
        if average is None:
            if is_saved:
                logger.info("%s has an average of the weights; ema_decay=0 leaves it out", folder)
        elif not is_saved:
            average.start_over()
            logger.info("%s has no average of the weights: it starts from them now", folder)
        elif RANKS + EMA_ROW in rows:
            average.batch_norm.statistics.copy_(rows[RANKS + EMA_ROW])
            average.batch_norm.counts.copy_(self.parts.batch_norm.counts)

    def _set_generators(self, rows: dict[str, Tensor]) -> None:
        torch.set_rng_state(rows[RANKS + "generator_torch"])
        if RANKS + "generator_cuda" in rows:
            torch.cuda.set_rng_state(rows[RANKS + "generator_cuda"].cpu(), self.world.device)
        *key, position, has_gauss = rows[RANKS + "generator_numpy"].tolist()
        gauss = float(rows[RANKS + "generator_numpy_gauss"])
        np.random.set_state(("MT19937", np.array(key, np.uint32), position, has_gauss, gauss))
        kind, *words, has_gauss = rows[RANKS + "generator_python"].tolist()
        gauss = float(rows[RANKS + "generator_python_gauss"])
        random.setstate((kind, tuple(words), gauss if has_gauss else None))


def _common_state(
    prefix: str, model: nn.Module, batch_norm: BatchNormStatistics
) -> dict[str, Tensor]:
    """Return a model's state dict without the statistics that differ between ranks."""
    own = {
        t.untyped_storage().data_ptr()
        for t in (batch_norm.statistics, batch_norm.counts)
        if t.numel()
    }
    return {
        prefix + name: tensor
        for name, tensor in model.state_dict().items()
        if tensor.untyped_storage().data_ptr() not in own
    }
