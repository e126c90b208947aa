"""What a run reports: log lines, metrics.jsonl, TensorBoard, and wandb if configured."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from training.divergence import StepStats
from utils.files import atomic_write
from utils.json_values import without_nan
from utils.meter import Rates

logger = logging.getLogger("train")

MAX_DATA_WAIT_SHARE = 0.2
_WARN_AGAIN_AFTER = 100  # log lines


class MetricsLogger:
    """Writes log lines and files on rank 0; other ranks write only to wandb, if they have a run.

    Args:
        folder: The run's output folder.
        is_main: True on rank 0.
        wandb_run: A run from `start_wandb`, or None.
        step: Optimizer steps that a resumed run has done before.
    """

    def __init__(self, folder: Path, is_main: bool, wandb_run: Any = None, step: int = 0) -> None:
        self._folder = folder
        self._journal: JsonlWriter | None = None
        self._board: Any = None
        self._wandb = wandb_run
        self._lines_until_wait_warning = 1  # the first line includes the start of the workers
        if is_main:
            self._journal = JsonlWriter(folder, step)
            self._open_board(step)

    def step(
        self, step: int, epoch: int, learning_rate: float, report: StepStats, rates: Rates
    ) -> None:
        """Write a log line and an object in metrics.jsonl for the steps since the last line."""
        logger.info(
            "Speed %.2f samples/sec   Loss %.4f   LearningRate %.6f   Epoch: %d   "
            "Global Step: %d   Fp16 Grad Scale: %2.f   Required: %.1f hours   "
            "GradNorm: %.3f   DataWait: %.1f%%   Memory: %.2f GiB",
            rates.samples_per_second,
            report.loss,
            learning_rate,
            epoch,
            step,
            report.loss_scale,
            rates.hours_left,
            report.grad_norm,
            100 * rates.data_wait_share,
            rates.peak_memory_gib,
        )
        taught = {}
        if not math.isnan(report.distillation):
            taught = {"distillation_loss": report.distillation}
            logger.info("Distillation Loss %.4f", report.distillation)
        if report.bad_steps:
            logger.warning(
                "%d bad steps since the last line (non-finite loss or gradient; nothing moved), "
                "at most %d in a row",
                report.bad_steps,
                report.longest_streak,
            )
        self._warn_of_data_wait(rates.data_wait_share)
        self._write(
            step,
            {
                "step": step,
                "epoch": epoch,
                "loss": report.loss,
                **taught,
                "learning_rate": learning_rate,
                "samples_per_second": rates.samples_per_second,
                "grad_norm": report.grad_norm,
                "loss_scale": report.loss_scale,
                "bad_steps": report.bad_steps,
                "data_wait_share": rates.data_wait_share,
                "peak_memory_gib": rates.peak_memory_gib,
                "hours_left": rates.hours_left,
            },
        )

    def _warn_of_data_wait(self, share: float) -> None:
        if self._lines_until_wait_warning:
            self._lines_until_wait_warning -= 1
        elif share > MAX_DATA_WAIT_SHARE:
            self._lines_until_wait_warning = _WARN_AGAIN_AFTER
            logger.warning(
                "%.0f%% of the time goes into waiting for data: raise num_workers towards cores / "
                "ranks, put the records on a local disk (or set shuffle_block=1024), or try "
                "dali=True; see docs/speed.md",
                100 * share,
            )

    def evaluation(self, step: int, epoch: int, results: dict[str, dict[str, float]]) -> None:
        """Write the log lines of every target, and one object in metrics.jsonl."""
        for target, metrics in results.items():
            if "top1" in metrics:
                logger.info(
                    "[%s][%d]Top-1: %1.5f   Top-5: %1.5f",
                    target,
                    step,
                    metrics["top1"],
                    metrics["top5"],
                )
                continue
            logger.info("[%s][%d]XNorm: %f", target, step, metrics["xnorm"])
            logger.info(
                "[%s][%d]Accuracy: %1.5f+-%1.5f",
                target,
                step,
                metrics["accuracy"],
                metrics["accuracy_std"],
            )
            logger.info(
                "[%s][%d]Accuracy-Flip: %1.5f+-%1.5f   TAR@FAR=1e-3: %1.5f",
                target,
                step,
                metrics["accuracy_flip"],
                metrics["accuracy_flip_std"],
                metrics["tar_at_far_1e-3"],
            )
        self._write(step, {"step": step, "epoch": epoch, "eval": results})

    def upload(self, model: Path) -> None:
        """Upload model.pt to wandb as an artifact, if there is a wandb run."""
        if self._wandb is not None:
            self._wandb.log_artifact(str(model), name=model.parent.name, type="model")

    def go_back(self, step: int) -> None:
        """Archive the lines of steps after `step`, because these steps will run again."""
        if self._journal is not None:
            self._journal.close()
            self._journal = JsonlWriter(self._folder, step)
            self._to_board({}, 0, is_last=True)
            self._open_board(step)

    def close(self) -> None:
        """Flush and close everything."""
        if self._journal is not None:
            self._journal.close()
        self._to_board({}, 0, is_last=True)
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, step: int, record: dict[str, Any]) -> None:
        scalars = dict(_scalars(record))
        if self._journal is not None:
            if self._journal.write(without_nan(record)) and self._board is None:
                self._open_board(step - 1)  # the disk accepts files again
            self._to_board(scalars, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def _open_board(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(
            str(self._folder / "tensorboard"), purge_step=step + 1 if step else None
        )

    def _to_board(self, scalars: dict[str, float], step: int, *, is_last: bool = False) -> None:
        """Write to TensorBoard, and give it up at the first error.

        Its writer is a thread, so a full disk shows only at a later call, and the thread does not
        recover.
        """
        if self._board is None:
            return
        try:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
            if is_last:
                self._board.close()
        except OSError as error:
            logger.error("TensorBoard's file cannot be written (%s); metrics.jsonl has it", error)
            self._board = None


def _scalars(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += _scalars(value, f"{prefix}{key}/")
        elif key != "step" and isinstance(value, (int, float)):
            found.append((prefix + key, value))
    return found


def start_wandb(
    *,
    name: str,
    entity: str | None,
    project: str | None,
    resume: bool,
    notes: str,
    group: str | None,
    settings: dict[str, Any],
    folder: Path,
) -> Any:
    """Start a wandb run. The key comes from WANDB_API_KEY or `wandb login`, never from a config."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    return wandb.init(
        name=name,
        entity=entity,
        project=project,
        resume="allow" if resume else None,
        notes=notes,
        group=group,
        config=settings,
        dir=str(folder),
    )


class JsonlWriter:
    """Appends to metrics.jsonl. Lines that cannot be written wait in memory for the next call.

    Args:
        folder: Folder of the run.
        step: Optimizer steps that a resumed run has done before; 0 begins a new file.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        if step:
            discard_after(folder, step)
        self._file: BinaryIO = self.path.open("ab" if step else "wb", buffering=0)
        self._waiting: list[bytes] = []

    def write(self, record: dict[str, Any]) -> bool:
        """Append a line; return False if the disk does not accept it now, which is logged once."""
        self._waiting.append(json.dumps(record).encode() + b"\n")
        data = b"".join(self._waiting)
        size = self._file.seek(0, 2)
        try:
            written = self._file.write(data)
            if written != len(data):  # the disk became full during the write
                self._file.truncate(size)
                raise OSError(f"{written} of {len(data)} bytes written")
        except OSError as error:
            if len(self._waiting) == 1:
                logger.error(
                    "%s cannot be written (%s): its lines wait in memory, training goes on",
                    self.path,
                    error,
                )
            return False
        if len(self._waiting) > 1:
            logger.info("%s can be written again; no line is lost", self.path)
        self._waiting.clear()
        return True

    def close(self) -> None:
        """Close the file, and log an error if lines were never written."""
        if self._waiting:
            logger.error("%d last lines of %s could not be written", len(self._waiting), self.path)
        self._file.close()


def discard_after(folder: Path, step: int) -> None:
    """Remove the lines of steps after `step` from metrics.jsonl; these steps will run again.

    The lines go to metrics_discarded.jsonl, with those that a killed process left incomplete.
    """
    path = folder / "metrics.jsonl"
    kept: list[str] = []
    discarded: list[str] = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            is_kept = int(json.loads(line)["step"]) <= step and line.endswith("\n")
        except (ValueError, KeyError, TypeError):
            is_kept = False
        (kept if is_kept else discarded).append(line)
    if discarded:
        with (folder / "metrics_discarded.jsonl").open("a") as file:
            file.write("".join(line.rstrip("\n") + "\n" for line in discarded))
        with atomic_write(path) as rewritten:
            rewritten.write("".join(kept).encode())
