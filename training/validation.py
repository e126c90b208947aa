"""Verification, or top-1 and top-5, during training on all ranks, and the files of the model."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path

from torch import Tensor

from backbones.weights import save_model
from eval.extract import OtherRankFailed
from training.build import TrainComponents
from training.checkpoint_manager import CheckpointManager
from training.heartbeat import Heartbeat
from training.metrics_logger import MetricsLogger
from training.state import Progress
from utils.distributed import DistContext

logger = logging.getLogger("train")


class CutShort(Exception):
    """This rank left a verification, because it is asked to stop."""


class Validation:
    """Scores the model on the run's sets, and writes model_best.pt and model.pt.

    All ranks call each method together.

    Args:
        parts: Parts of the run.
        world: This process among the ranks.
        folder: Folder of model.pt and model_best.pt.
        progress: Progress of the run, which holds its best accuracy.
        checkpoints: Saves and stops the run where a signal comes in the middle.
        heartbeat: Gets a mark before each verification and each model.pt.
        metrics: Gets the scores.
        every: Optimizer steps between two verifications; 0 for the one at the end only.
        final_step: Optimizer step at which the run ends.
        batch_size: Images that a rank embeds at a time.
        input_size: Height and width of the images in pixels.
    """

    def __init__(
        self,
        parts: TrainComponents,
        world: DistContext,
        folder: Path,
        progress: Progress,
        checkpoints: CheckpointManager,
        heartbeat: Heartbeat,
        metrics: MetricsLogger,
        *,
        every: int,
        final_step: int,
        batch_size: int,
        input_size: int,
    ) -> None:
        self.parts, self.world, self.folder, self.progress = parts, world, folder, progress
        self.checkpoints, self.heartbeat, self.metrics = checkpoints, heartbeat, metrics
        self.every, self.final_step = every, final_step
        self.batch_size, self.input_size = batch_size, input_size

    def is_due(self) -> bool:
        """Return whether the step that the run has reached is one to be scored."""
        step = self.progress.step
        is_time = step == self.final_step or (self.every > 0 and step % self.every == 0)
        return is_time and bool(self.parts.verification_sets)

    def run(self) -> None:
        """Score every set; write the scores, and model_best.pt if they are the best so far.

        Raises:
            Stopped: A signal came to some rank. The state is saved, and the run that resumes from
                it repeats the verification.
        """
        step = self.progress.step
        epoch = (self.progress.position - 1) // self.parts.steps_per_epoch
        self.heartbeat.mark("verification", step)
        self.parts.evaluated[1].average(self.world.world_size)
        try:
            results = self.parts.evaluate(
                self._embed,
                self.parts.verification_sets,
                rank=self.world.rank,
                world_size=self.world.world_size,
                batch_size=self.batch_size,
                input_size=self.input_size,
            )
        except (CutShort, OtherRankFailed):  # on the ranks that were asked, and on the others
            self.checkpoints.stop_if_asked(self.progress)
            raise
        scores = [metrics[self.parts.best_by] for metrics in results.values()]
        if self.progress.count_evaluation(sum(scores) / len(scores) if scores else math.nan):
            self._save("model_best.pt", epoch)
        self.metrics.evaluation(step, epoch, {name: dict(of) for name, of in results.items()})

    def save_model(self, *, required: bool) -> None:
        """Write model.pt.

        Args:
            required: Whether a failure is raised instead of only logged.

        Raises:
            OSError: It cannot be written, and is required.
        """
        self.heartbeat.mark("model.pt", self.progress.step)
        self._save(
            "model.pt", self.progress.position // self.parts.steps_per_epoch, required=required
        )

    def catch_up(self) -> None:
        """Do what the run that is resumed still had to do at the step it had reached.

        That is the verification that a signal interrupted; and where no step is left, the files
        of the run are written in any case.
        """
        progress = self.progress
        if progress.step and self.is_due() and progress.evaluated_step != progress.step:
            self.run()
            self.checkpoints.save_now(progress)
        if progress.step >= self.final_step:
            self.checkpoints.save_now(progress)
            self.save_model(required=True)

    def _embed(self, images: Tensor) -> Tensor:
        if self.checkpoints.is_asked_to_stop():
            raise CutShort("asked to stop")
        return self.parts.embedder(images)

    def _save(self, name: str, epoch: int, *, required: bool = False) -> None:
        """Write the model with its metadata atomically on rank 0; all ranks call this."""
        self.parts.evaluated[1].average(self.world.world_size)
        weights = self.parts.model_state()
        if not self.world.is_main:
            return
        step = self.progress.step
        metadata = dataclasses.replace(self.parts.metadata, step=step, epoch=epoch)
        try:
            save_model(self.folder / name, weights, metadata)
        except OSError as error:
            if required:
                raise
            logger.error(
                "%s OF STEP %d COULD NOT BE WRITTEN (%s). Training goes on; the one before is "
                "unharmed",
                self.folder / name,
                step,
                error,
            )
