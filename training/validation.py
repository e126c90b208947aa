"""Verification, or top-1 and top-5, during training on all ranks together, and the best model."""

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
    """This rank left a verification, because it is asked to stop."""


CUT_SHORT = (CutShort, OtherRankFailed)
"""Raised together: CutShort on the ranks that were asked, OtherRankFailed on the others."""


class Validation:
    """Scores the model on the run's sets, and saves the best weights.

    Args:
        parts: Parts of the run.
        world: This process among the ranks.
        folder: Folder of model.pt and model_best.pt.
        batch_size: Images that a rank embeds at a time.
        input_size: Height and width of the images in pixels.
        progress: Progress of the run, which holds its best accuracy.
        is_asked_to_stop: Called before every batch.
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
        """Compute the metrics of every target, and save model_best.pt if they are the best so far.

        Returns:
            Metrics by target, the same on every rank.

        Raises:
            CutShort: This rank was asked to stop.
            OtherRankFailed: Another rank was asked to stop.
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
        """Write the model with its metadata atomically on rank 0; all ranks call this.

        Args:
            name: Name of the file in the run's folder.
            step: Optimizer steps done.
            epoch: Epochs done.
            must: Whether a failure is raised instead of only logged.

        Raises:
            OSError: It cannot be written, and `must` is set.
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
