"""Verification, or top-1 and top-5, while training, on all ranks together; the best model."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from backbones.weights import save_model
from eval.extract import OtherRankFailed
from training.build import TrainComponents
from training.state import Progress
from utils.distributed import DistContext

logger = logging.getLogger("train")


class CutShort(Exception):
    """A verification that was left on this rank, because it is asked to stop."""


CUT_SHORT = (CutShort, OtherRankFailed)
"""Raised on all ranks together: the one on those that were asked, the other elsewhere."""


class Validation:
    """Scores the model on the run's sets and keeps the best weights.

    Args:
        parts: of the run.
        world: this process among the ranks.
        folder: where model.pt and model_best.pt go.
        batch_size: images per rank embedded at a time.
        input_size: height and width of the images.
        progress: of the run; its best accuracy is kept here.
        is_asked_to_stop: looked at before every batch.
    """

    def __init__(
        self,
        parts: TrainComponents,
        world: DistContext,
        folder: Path,
        batch_size: int,
        input_size: int,
        progress: Progress,
        is_asked_to_stop: Callable[[], bool],
    ) -> None:
        self.parts, self.world, self.folder = parts, world, folder
        self.batch_size, self.input_size = batch_size, input_size
        self.progress, self.is_asked_to_stop = progress, is_asked_to_stop

    def run(self, step: int, epoch: int) -> dict[str, dict[str, float]]:
        """Metrics of every target; the same on every rank. Saves model_best.pt if it is.

        Raises:
            CutShort, OtherRankFailed: on all ranks, where one of them is asked to stop.
        """
        self.parts.evaluated[1].average(self.world.world_size)
        results = self.parts.evaluate(
            self._embed,
            self.parts.verification_sets,
            rank=self.world.rank,
            world_size=self.world.world_size,
            batch_size=self.batch_size,
            input_size=self.input_size,
        )
        self.progress.evaluated_step = step
        scores = [metrics[self.parts.best_by] for metrics in results.values()]
        score = sum(scores) / len(scores) if scores else math.nan
        if score > self.progress.best:  # never for NaN
            self.progress.best, self.progress.best_step = score, step
            self.save("model_best.pt", step, epoch)
        return {name: dict(metrics) for name, metrics in results.items()}

    def _embed(self, images: Tensor) -> Tensor:
        if self.is_asked_to_stop():
            raise CutShort("asked to stop")
        return self.parts.embedder(images)

    def save(self, name: str, step: int, epoch: int, *, must: bool = False) -> None:
        """Write the model with its metadata, atomically, on rank 0; all ranks call it.

        Raises:
            OSError: it cannot be written and `must` be; else that is logged only.
        """
        self.parts.evaluated[1].average(self.world.world_size)
        weights = self.parts.model_state()
        if not self.world.is_main:
            return
        metadata = dataclasses.replace(self.parts.metadata, step=step, epoch=epoch)
        try:
            save_model(self.folder / name, weights, metadata)
        except OSError as error:
            if must:
                raise
            logger.error(
                "%s OF STEP %d COULD NOT BE WRITTEN (%s). Training goes on; the one before is "
                "unharmed",
                self.folder / name,
                step,
                error,
            )
