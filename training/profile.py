"""`profile=N`: where the time of N steps goes, as a trace to look into and a page to read."""

from __future__ import annotations

import gzip
import json
import logging
import tempfile
import time
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

logger = logging.getLogger("train")

FOLDER = "profile"
TRACE, SUMMARY = "trace.json.gz", "summary.txt"
WARM_UP_STEPS = 5  # caches, buckets and workers settle before anything is measured
PHASES = {
    "data": "waiting for data",
    "forward": "backbone, forward",
    "head": "head: logits, loss, their gradients, class centres",
    "teacher": "teacher: its embeddings, the distillation loss",
    "backward": "backbone, backward (with its all-reduce)",
    "optimizer": "clipping and the backbone's optimizer",
}
_PREFIX = "arcshard/"
_COLLECTIVES = ("gloo:", "nccl:", "ncclDevKernel", "mpi:")


def phase(name: str) -> AbstractContextManager[object]:
    """What the code below belongs to; costs next to nothing while nobody profiles."""
    return record_function(_PREFIX + name)


class StepProfile:
    """Watches some steps of a run, on one rank; calls itself off once it has written.

    Args:
        folder: of the run. num_steps: to watch; 0: nothing is ever done. device: of the run.
    """

    def __init__(self, folder: Path, num_steps: int, device: torch.device) -> None:
        self.folder, self.num_steps, self.device = folder / FOLDER, num_steps, device
        self._steps_left_out = WARM_UP_STEPS
        self._watched = 0
        self._profile: profile | None = None

    def after_step(self) -> None:
        """Call at the end of every step; writes when the last one to watch is done."""
        if not self.num_steps:
            return
        if self._profile is None:
            self._steps_left_out -= 1
            if self._steps_left_out <= 0:
                self._begin()
            return
        self._watched += 1
        if self._watched == self.num_steps:
            self._end(self._profile)

    def close(self) -> None:
        """Say so if the run was too short; nothing is written then."""
        if self.num_steps:
            logger.warning(
                "profile=%d: the run ended before %d steps after the first %d were done; nothing "
                "was written", self.num_steps, self.num_steps, WARM_UP_STEPS,
            )  # fmt: skip
            if self._profile is not None:
                self._profile.stop()
            self.num_steps = 0

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self.device)
        self._profile = profile(activities=activities)
        self._profile.start()
        self._start = time.perf_counter()

    def _end(self, done: profile) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        milliseconds = 1e3 * (time.perf_counter() - self._start) / self.num_steps
        done.stop()
        page = summary(done, self.num_steps, milliseconds, self.device.type == "cuda")
        try:
            self._write(done, page)
        except OSError as error:  # a disk that is full costs the files, not the run
            logger.error("%s cannot be written (%s): training goes on", self.folder, error)
        logger.info("profile of %d steps in %s:\n%s", self.num_steps, self.folder, page)
        self.num_steps, self._profile = 0, None

    def _write(self, done: profile, page: str) -> None:
        """The page and the trace; no half of a trace is left if it fails."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / SUMMARY).write_text(page)
        trace = self.folder / TRACE
        try:
            with tempfile.TemporaryDirectory(dir=self.folder) as aside:
                plain = Path(aside, "trace.json")
                done.export_chrome_trace(str(plain))
                content = plain.read_bytes() if plain.exists() else b""
            json.loads(content)  # the profiler says nothing of a disk that took a part, or none
            trace.write_bytes(gzip.compress(content, 5))
        except (OSError, ValueError) as error:
            trace.unlink(missing_ok=True)
            raise OSError(f"{TRACE} is not whole: {error}") from error


def summary(done: profile, num_steps: int, milliseconds: float, on_device: bool) -> str:
    """The page: a line per phase in ms per step and percent of the step, and the largest costs.

    Args:
        milliseconds: of a step, from end to end.
        on_device: times are the device's; else the host's.
    """
    events = done.key_averages()

    def total(event: object, own: bool) -> float:
        where = "device" if on_device else "cpu"
        name = f"self_{where}_time_total" if own else f"{where}_time_total"
        return float(getattr(event, name)) / 1e3 / num_steps

    def line(name: str, ms: float) -> str:
        return f"{name:54} {ms:10.2f} {100 * ms / milliseconds:7.1f}"

    spent = {event.key: total(event, own=False) for event in events}
    if on_device:  # the host waits for data while the device has nothing to do
        waiting = [e for e in events if e.key == _PREFIX + "data"]
        spent[_PREFIX + "data"] = sum(float(e.cpu_time_total) for e in waiting) / 1e3 / num_steps
    phases = {  # a run without a teacher has no line for it
        text: spent[_PREFIX + name] for name, text in PHASES.items() if _PREFIX + name in spent
    }
    collectives = sum(total(e, own=False) for e in events if e.key.startswith(_COLLECTIVES))
    lines = [
        f"{num_steps} steps, {milliseconds:.2f} ms each",
        f"{'':54} {'ms':>10} {'%':>7}",
        *(line(text, ms) for text, ms in phases.items()),
        line("everything else", max(milliseconds - sum(phases.values()), 0.0)),
        line("collectives, within these or beside them", collectives),
        "",
        "largest costs by name",
    ]
    named = [e for e in events if not e.key.startswith((_PREFIX, "ProfilerStep"))]
    named.sort(key=lambda e: -total(e, own=True))
    lines += [line(e.key[:54], total(e, own=True)) for e in named[:3]]
    return "\n".join(lines) + "\n"
