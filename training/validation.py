"""Verification while training, on all ranks together, and which model was best."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from backbones.weights import save_model
from eval.verification import verify
from training.build import Parts
from training.state import Progress
from utils.distributed import World


class Validation:
    """Scores the backbone on the run's verification sets and keeps the best weights.

    Args:
        parts: of the run.
        world: this process among the ranks.
        folder: where model.pt and model_best.pt go.
        batch_size: images per rank embedded at a time.
        input_size: height and width of the images.
        progress: of the run; its best accuracy is kept here.
    """

    def __init__(
        self, parts: Parts, world: World, folder: Path, batch_size: int, input_size: int,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.parts, self.world, self.folder = parts, world, folder
        self.batch_size, self.input_size = batch_size, input_size
        self.progress = progress

    def run(self, step: int, epoch: int) -> dict[str, dict[str, float]]:
        """Metrics of every target; the same on every rank. Saves model_best.pt if it is."""
        self.parts.batch_norm.average(self.world.world_size)
        results = verify(
            self.parts.embedder,
            self.parts.verification_sets,
            rank=self.world.rank,
            world_size=self.world.world_size,
            batch_size=self.batch_size,
            input_size=self.input_size,
        )
        self.progress.evaluated_step = step
        scores = [metrics["accuracy_flip"] for metrics in results.values()]
        score = sum(scores) / len(scores) if scores else math.nan
        if score > self.progress.best:  # never for NaN
            self.progress.best, self.progress.best_step = score, step
            self.save("model_best.pt", step, epoch)
        return {name: dict(metrics) for name, metrics in results.items()}

    def save(self, name: str, step: int, epoch: int) -> None:
        """Write the backbone with its metadata, atomically, on rank 0."""
        self.parts.batch_norm.average(self.world.world_size)
        if self.world.is_main:
            metadata = dataclasses.replace(self.parts.metadata, step=step, epoch=epoch)
            save_model(self.folder / name, self.parts.backbone, metadata)
