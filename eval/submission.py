"""Checks the rules of an MFR submission as the challenge's own checker does.

Nothing is written into the folder that is checked, and nothing in it is run but the ONNX graph.
Rules and limits: docs/evaluation.md, "MFR".
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from eval.onnx_model import open_session
from utils.errors import UserError

MIB = 1024**2
LARGEST_MIB = 1024
FEWEST_NODES = 8
CHECKED_BATCH = 32
TIMED_RUNS, TIMED_RANK = 50, 6  # the sixth fastest of fifty counts


@dataclass(frozen=True)
class Track:
    """Limits of some tracks.

    Attributes:
        prefix: The limits hold for tracks whose name begins with this.
        feature_width: Largest number of an embedding's values.
        ms_per_image: Largest time in milliseconds per image.
    """

    prefix: str
    feature_width: int
    ms_per_image: float


TRACKS = (
    Track("ms1m", 512, 10),
    Track("glint", 1024, 20),
    Track("cfat", 512, 15),
    Track("unconstrained", 1024, 30),
)


@dataclass
class Report:
    """What was found, what each rule allows, and what the checker will feed the model.

    Attributes:
        folder: The folder that was checked.
        track: Name of the track.
        checks: {name, passed, found, allowed}; `passed` is None for what is only reported.
        input_mean: Mean with which the checker will normalize pixels; NaN if the graph was not
            read.
        input_std: Standard deviation with which it will do so; NaN if the graph was not read.
        height: Height of the images that it will feed, in pixels.
        width: Width of these images.
        ms_per_image: Milliseconds on this machine; only an indication of the checker's time.
    """

    folder: str
    track: str
    checks: list[dict[str, Any]] = field(default_factory=list)
    input_mean: float = math.nan
    input_std: float = math.nan
    height: int = 112
    width: int = 112
    ms_per_image: float = math.nan

    def add(self, name: str, passed: bool | None, found: Any, allowed: Any) -> bool:
        """Records a rule and returns whether to continue.

        Args:
            name: Name of the rule.
            passed: Whether it is kept; None for what is only reported.
            found: What was found.
            allowed: What is allowed.
        """
        self.checks.append({"name": name, "passed": passed, "found": found, "allowed": allowed})
        return passed is not False

    @property
    def passed(self) -> bool:
        """Whether no rule is broken."""
        return all(check["passed"] is not False for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Returns the content of the JSON report."""
        return {"passed": self.passed, **asdict(self)}

    def __str__(self) -> str:
        signs = {True: "ok    ", False: "BROKEN", None: "note  "}
        lines = [
            f"{signs[check['passed']]} {check['name']}: {check['found']} "
            f"(allowed: {check['allowed']})"
            for check in self.checks
        ]
        verdict = "passes" if self.passed else "does NOT pass"
        return "\n".join([*lines, f"{self.folder} {verdict} the rules of track {self.track}"])


def find_track(name: str) -> Track:
    """Returns the limits of a track by the beginning of its name.

    Raises:
        UserError: The track is unknown.
    """
    for track in TRACKS:
        if name.startswith(track.prefix):
            return track
    raise UserError(
        f"track {name!r} is unknown; a track's name begins with "
        f"{', '.join(track.prefix for track in TRACKS)}"
    )


def check_submission(folder: str | Path, track_name: str, enforce_time: bool = False) -> Report:
    """Checks a folder against the rules of a track; broken rules are in the report.

    Args:
        folder: The folder.
        track_name: Name of the track.
        enforce_time: Whether a time above the limit on this machine breaks a rule.

    Raises:
        UserError: The track is unknown, or the folder does not exist.
    """
    track, folder = find_track(track_name), Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds the .onnx")
    report = Report(str(folder), track_name)
    files = sorted(path for path in folder.glob("*.onnx") if path.is_file())
    found = ", ".join(path.name for path in files) or "none"
    if not report.add("ONNX files", len(files) == 1, found, "exactly one"):
        return report
    (file,) = files
    if not _read_side_files(report, folder, track):
        return report
    parts = [file, file.with_name(file.name + ".data")]
    mib = sum(part.stat().st_size for part in parts if part.is_file()) / MIB
    if not report.add("file size", mib <= LARGEST_MIB, f"{mib:.1f} MiB", f"{LARGEST_MIB} MiB"):
        return report
    try:
        model = onnx.load(file)
        session = open_session(file)
    except (OSError, ValueError) as error:
        report.add("loads", False, str(error)[:300], "a valid ONNX file")
        return report
    except Exception as error:  # protobuf's and onnx's exceptions share no base class
        report.add("loads", False, f"{type(error).__name__}: {error}"[:300], "a valid ONNX file")
        return report
    _check_graph(report, model, session, track)
    if not report.passed:
        return report
    if _chooses_by_itself(track, folder):
        pass  # pixel_norm.txt was read above
    elif begins_with_normalization(model.graph):
        report.input_mean, report.input_std = 0.0, 1.0
    else:
        report.input_mean = report.input_std = 127.5
    report.add(
        "pixels the checker feeds",
        None,
        f"({report.input_mean:g}, {report.input_std:g})",
        "(pixel - mean) / std, RGB",
    )
    _run(report, session, track, enforce_time)
    return report


def _chooses_by_itself(track: Track, folder: Path) -> bool:
    return track.prefix == "cfat" and (folder / "pixel_norm.txt").is_file()


def _read_side_files(report: Report, folder: Path, track: Track) -> bool:
    """Reads crop.txt and pixel_norm.txt, which count for track cfat only."""
    crop, norm = folder / "crop.txt", folder / "pixel_norm.txt"
    if track.prefix != "cfat":
        for file in (crop, norm):
            if file.is_file():
                report.add(file.name, None, "is not read for this track", "track cfat only")
        return True
    if crop.is_file():
        numbers = _numbers(crop, int, 6)
        good = numbers is not None and (
            0 <= numbers[0] < numbers[2] and 0 <= numbers[1] < numbers[3] and min(numbers[4:]) > 0
        )
        text = "not six lines of integers" if numbers is None else str(numbers)
        if not report.add("crop.txt", good, text, "x1, y1, x2, y2, width, height: six lines"):
            return False
        assert numbers is not None
        report.width, report.height = numbers[4], numbers[5]
    if norm.is_file():
        values = _numbers(norm, float, 2)
        good = values is not None and math.isfinite(values[0]) and 0 < values[1] < math.inf
        text = "not two lines of numbers" if values is None else str(values)
        if not report.add("pixel_norm.txt", good, text, "mean and std: two lines"):
            return False
        assert values is not None
        report.input_mean, report.input_std = values
    return True


def _numbers(file: Path, kind: Any, count: int) -> list[Any] | None:
    lines = file.read_text(encoding="utf-8", errors="replace")[:4096].split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    try:
        return [kind(line) for line in lines] if len(lines) == count else None
    except ValueError:
        return None


def _check_graph(report: Report, model: onnx.ModelProto, session: Any, track: Track) -> None:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    shapes = ", ".join(str(list(one.shape)) for one in inputs)
    if report.add("inputs", len(inputs) == 1 and len(inputs[0].shape) == 4, shapes, "one, 4-D"):
        batch, channels, height, width = inputs[0].shape
        report.add("batch", not isinstance(batch, int), batch, "symbolic")
        report.add("channels", channels == 3, channels, 3)
        wanted = f"{report.height} x {report.width}"
        fits = (height, width) == (report.height, report.width)
        report.add("height x width", fits, f"{height} x {width}", wanted)
    shapes = ", ".join(str(list(one.shape)) for one in outputs)
    if report.add("outputs", len(outputs) == 1 and len(outputs[0].shape) == 2, shapes, "one, 2-D"):
        width = outputs[0].shape[1]
        if isinstance(width, int):
            most = track.feature_width
            report.add("feature width", width <= most, width, f"at most {most}")
    nodes = len(model.graph.node)
    report.add("graph nodes", nodes >= FEWEST_NODES, nodes, f"at least {FEWEST_NODES}")
    narrow = [
        tensor.name
        for tensor in model.graph.initializer
        if onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize < 4
    ]
    found = f"{len(narrow)} narrower, for example {narrow[0]}" if narrow else "none narrower"
    report.add("bytes of an initializer's element", not narrow, found, "4 or more")


def begins_with_normalization(graph: onnx.GraphProto) -> bool:
    """Returns whether the graph first shifts its input by a constant and scales it by another.

    The two come in either order, as Sub or Add and Mul or Div; they are found by following the
    graph, not by names.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    constants = set(weights) | {n.output[0] for n in graph.node if n.op_type == "Constant"}
    at = next((one.name for one in graph.input if one.name not in weights), None)
    kinds: list[str] = []
    while at is not None and len(kinds) < 2:
        users = [node for node in graph.node if at in node.input and node.op_type != "Shape"]
        if len(users) != 1 or users[0].op_type not in ("Sub", "Add", "Mul", "Div"):
            break
        others = [name for name in users[0].input if name != at]
        if not all(name in constants for name in others):
            break
        kinds.append("shift" if users[0].op_type in ("Sub", "Add") else "scale")
        at = users[0].output[0]
    return sorted(kinds) == ["scale", "shift"]


def _run(report: Report, session: Any, track: Track, enforce_time: bool) -> None:
    """Checks that a batch of 32 gives finite values, and measures the time of single images."""
    name = session.get_inputs()[0].name
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (CHECKED_BATCH, 3, report.height, report.width))
    images = ((pixels - report.input_mean) / report.input_std).astype(np.float32)
    try:
        features = np.asarray(session.run(None, {name: images})[0])
    except Exception as error:  # onnxruntime's exceptions share no base class
        report.add(f"batch of {CHECKED_BATCH}", False, str(error)[:300], "runs")
        return
    good = features.ndim == 2 and len(features) == CHECKED_BATCH and np.isfinite(features).all()
    text = f"{list(features.shape)}, {'finite' if np.isfinite(features).all() else 'NOT finite'}"
    if not report.add(f"batch of {CHECKED_BATCH}", bool(good), text, "finite values, [32, D]"):
        return
    most = track.feature_width
    if features.shape[1] > most:  # the graph does not always state the width
        report.add("feature width", False, features.shape[1], f"at most {most}")
        return
    report.ms_per_image = time_single_images(session, name, images)
    slow = report.ms_per_image > track.ms_per_image
    report.add(
        "time of an image, here",
        (not slow) if enforce_time else None,
        f"{report.ms_per_image:.1f} ms",
        f"{track.ms_per_image:g} ms on the checker's machine",
    )


def time_single_images(session: Any, name: str, images: np.ndarray) -> float:
    """Returns the milliseconds of the sixth fastest of fifty runs of one image.

    Args:
        session: Session of onnxruntime.
        name: Name of the input.
        images: [n, 3, H, W], used in turn.
    """
    times = []
    for turn in range(TIMED_RUNS):
        one = images[turn % len(images)][None]
        start = time.perf_counter()
        session.run(None, {name: one})
        times.append(time.perf_counter() - start)
    return sorted(times)[TIMED_RANK - 1] * 1000
