"""`profile=N`: where the time of N steps goes, as a trace for a viewer and a page of text."""

from __future__ import annotations

import gzip
import json
import logging
import tempfile
import time
from bisect import bisect_right
from collections import defaultdict
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

logger = logging.getLogger("train")

FOLDER = "profile"
TRACE, SUMMARY = "trace.json.gz", "summary.txt"
WARM_UP_STEPS = 5  # not measured, because caches, buckets and workers settle in them
PHASES = {
    "data": "waiting for data",
    "forward": "backbone, forward",
    "head": "head: logits, loss, their gradients, class centers",
    "teacher": "teacher: its embeddings, the distillation loss",
    "backward": "backbone, backward (with its all-reduce)",
    "optimizer": "clipping and the backbone's optimizer",
}
_PREFIX = "arcshard/"
_COLLECTIVES = ("gloo:", "nccl:", "ncclDevKernel", "mpi:")


def phase(name: str) -> AbstractContextManager[object]:
    """Assign the code inside the context to a phase; costs almost nothing without a profiler."""
    return record_function(_PREFIX + name)


class StepProfile:
    """Profiles some steps of a run on one rank, and switches itself off once it has written.

    Args:
        folder: Folder of the run.
        num_steps: Number of steps to profile; with 0 nothing is ever done.
        device: Device of the run.
    """

    def __init__(self, folder: Path, num_steps: int, device: torch.device) -> None:
        self.folder, self.num_steps, self.device = folder / FOLDER, num_steps, device
        self._steps_left_out = WARM_UP_STEPS
        self._watched = 0
        self._profile: profile | None = None

    def after_step(self) -> None:
        """Count a step; call this at the end of every step. Writes after the last profiled step."""
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
        """Log a warning if the run was too short; nothing is written then."""
        if self.num_steps:
            logger.warning(
                "profile=%d: the run ended before %d steps after the first %d were done; nothing "
                "was written",
                self.num_steps,
                self.num_steps,
                WARM_UP_STEPS,
            )
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
        except OSError as error:  # a full disk must not end the run
            logger.error("%s cannot be written (%s): training goes on", self.folder, error)
        logger.info("profile of %d steps in %s:\n%s", self.num_steps, self.folder, page)
        self.num_steps, self._profile = 0, None

    def _write(self, done: profile, page: str) -> None:
        """Write the page and the trace; an incomplete trace is removed."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / SUMMARY).write_text(page)
        trace = self.folder / TRACE
        try:
            with tempfile.TemporaryDirectory(dir=self.folder) as aside:
                plain = Path(aside, "trace.json")
                done.export_chrome_trace(str(plain))
                content = plain.read_bytes() if plain.exists() else b""
            json.loads(content)  # the profiler does not report a disk that is full
            trace.write_bytes(gzip.compress(content, 5))
        except (OSError, ValueError) as error:
            trace.unlink(missing_ok=True)
            raise OSError(f"{TRACE} is not whole: {error}") from error


def summary(done: profile, num_steps: int, milliseconds: float, on_device: bool) -> str:
    """Return the page: per phase ms per step and percent of the step, then the largest costs.

    Args:
        done: The finished profile.
        num_steps: Number of profiled steps.
        milliseconds: Milliseconds of a step from end to end.
        on_device: Whether times are those of the device instead of the host.
    """
    spent, collectives, named = _device_costs(done) if on_device else _host_costs(done)
    spent, named = (
        {name: cost / 1e3 / num_steps for name, cost in costs.items()} for costs in (spent, named)
    )
    collectives /= 1e3 * num_steps

    def line(name: str, ms: float) -> str:
        return f"{name:54} {ms:10.2f} {100 * ms / milliseconds:7.1f}"

    phases = {  # without a teacher there is no line for it
        text: spent[_PREFIX + name] for name, text in PHASES.items() if _PREFIX + name in spent
    }
    lines = [
        f"{num_steps} steps, {milliseconds:.2f} ms each",
        f"{'':54} {'ms':>10} {'%':>7}",
        *(line(text, ms) for text, ms in phases.items()),
        line("everything else", max(milliseconds - sum(phases.values()), 0.0)),
        line("collectives, within these or beside them", collectives),
        "",
        "largest costs by name",
    ]
    largest = sorted(named, key=lambda name: -named[name])
    lines += [line(name[:54], named[name]) for name in largest[:3]]
    return "\n".join(lines) + "\n"


Costs = tuple[dict[str, float], float, dict[str, float]]
"""Microseconds of all steps: by phase, of collectives, and by name of operation."""


def _host_costs(done: profile) -> Costs:
    events = done.key_averages()
    spent = {e.key: e.cpu_time_total for e in events if e.key.startswith(_PREFIX)}
    collectives = sum(e.cpu_time_total for e in events if e.key.startswith(_COLLECTIVES))
    named = {
        e.key: e.self_cpu_time_total
        for e in events
        if not e.key.startswith((_PREFIX, "ProfilerStep"))
    }
    return spent, collectives, named


def _device_costs(done: profile) -> Costs:
    """Assign the work of the device to the phase in which the host started it.

    The profiler's own sums by range leave out backward, whose operations start in threads of
    autograd, and count the time between kernels where the range is shown on the device.
    """
    spent: dict[str, float] = defaultdict(float)
    named: dict[str, float] = defaultdict(float)
    on_host = [e for e in done.events() if e.device_type == DeviceType.CPU]
    ranges = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in on_host
        if e.name.startswith(_PREFIX)
    )
    starts = [start for start, _, _ in ranges]
    for start, end, name in ranges:
        # While the host waits for data, the device has nothing to do.
        spent[name] += end - start if name == _PREFIX + "data" else 0.0
    for event in on_host:
        place = bisect_right(starts, event.time_range.start) - 1
        _, end, name = ranges[place] if place >= 0 else (0.0, -1.0, "")
        for kernel in event.kernels:
            named[kernel.name] += kernel.duration
            if event.time_range.start <= end and name != _PREFIX + "data":
                spent[name] += kernel.duration
    collectives = sum(cost for name, cost in named.items() if name.startswith(_COLLECTIVES))
    return spent, collectives, named
