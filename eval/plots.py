"""Figures: the training curve of metrics.jsonl, ROC curves, score histograms, wrong pairs.

matplotlib is imported only when a figure is drawn, and used without its global state. So drawing
changes nothing in the process and needs no display.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.errors import UserError

_DOTS_PER_INCH = 120


def plot_training_curve(metrics_jsonl: str | Path, out_png: str | Path) -> Path:
    """Draws loss, learning rate and, if there are any, verification accuracies over the steps.

    Values that are NaN leave a gap. A torn last line (the run was killed while writing) is left
    out.

    Args:
        metrics_jsonl: File of one JSON object per line. Lines with `loss` are logged steps, lines
            with `eval` are evaluations {target: {accuracy_flip, ...}}.
        out_png: File of the figure.

    Raises:
        UserError: Another line is damaged, or no step was logged; the message names file and line.
    """
    from matplotlib.figure import Figure

    source = Path(metrics_jsonl)
    lines = _read_lines(source)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "eval" in line]
    if not steps:
        raise UserError(f"{source}: no line has a loss; there is nothing to draw yet")

    rows = 3 if evaluations else 2
    figure = Figure(figsize=(8, 1.2 + 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, height_ratios=[2, 1, 1.5][:rows])
    x = [line["step"] for line in steps]
    axes[0].plot(x, [_number(line["loss"]) for line in steps], color="tab:blue", linewidth=1.2)
    axes[0].set_ylabel("loss")
    rates = [_number(line.get("learning_rate")) for line in steps]
    axes[1].plot(x, rates, color="tab:orange", linewidth=1.2)
    axes[1].set_ylabel("learning rate")
    axes[1].set_ylim(bottom=0)
    if evaluations:
        _draw_accuracies(axes[2], evaluations)
    axes[-1].set_xlabel("optimizer step")
    for one in axes:
        one.grid(alpha=0.3)
    figure.suptitle(f"Training curve: {source.resolve().parent.name}")
    return _save(figure, out_png)


def plot_roc(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]], out_png: str | Path, title: str
) -> Path:
    """Draws one ROC per name, as steps, on a logarithmic FAR axis.

    The axis begins at the smallest FAR that a set can show (one false accept). A curve of NaN is
    named in the legend as undefined.

    Args:
        curves: {name: (far, tar)}, both [P] and ascending, as `eval.metrics.roc_curve` gives them.
        out_png: File of the figure; its suffix sets the format (.png, .pdf).
        title: Title of the figure.

    Raises:
        UserError: There is no curve.
    """
    from matplotlib.figure import Figure

    if not curves:
        raise UserError("no ROC curve was given; give at least one (far, tar)")
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    _draw_roc(axes, curves)
    axes.set_title(title)
    return _save(figure, out_png)


def plot_scores(
    scores: Mapping[str, tuple[NDArray[np.floating], NDArray[np.bool_]]],
    out: str | Path,
    title: str,
) -> Path:
    """Draws ROC curves beside a histogram of scores per set.

    A set with scores that are not finite, or with one kind of pair only, is named as undefined in
    the ROC.

    Args:
        scores: {name: (cosines [N], issame [N])}.
        out: File of the figure; its suffix sets the format.
        title: Title of the figure.

    Raises:
        UserError: There is no set.
    """
    from matplotlib.figure import Figure

    from eval.metrics import roc_curve

    if not scores:
        raise UserError("no set was given; give the scores of at least one")
    curves = {}
    for name, (values, same) in scores.items():
        far, tar, _ = roc_curve(values, same)
        curves[name] = (far, tar)
    figure = Figure(figsize=(12, max(5.0, 1.9 * len(scores))), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.1, 1], squeeze=False)[0]
    _draw_roc(left.subplots(), curves)
    axes = right.subplots(len(scores), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, (values, same)) in zip(axes, scores.items(), strict=True):
        finite = np.isfinite(values)
        if finite.any():
            low, high = float(values[finite].min()), float(values[finite].max())
            bins = np.linspace(low, high if high > low else low + 1e-6, 81)
            kinds = (~same, "different", "tab:red"), (same, "same", "tab:blue")
            for kind, label, color in kinds:
                count = int(np.count_nonzero(finite & kind))
                if count:
                    # Shares within each kind: otherwise sets with a thousand impostors per same
                    # pair would show the impostors only.
                    axis.hist(
                        values[finite & kind],
                        bins,
                        weights=np.full(count, 1 / count),
                        alpha=0.55,
                        color=color,
                        label=f"{label} ({count:,})",
                    )
            axis.legend(fontsize="small")
        else:
            axis.text(0.5, 0.5, "scores undefined", ha="center", transform=axis.transAxes)
        axis.set_title(name, fontsize="medium")
        axis.set_ylabel("share of pairs")
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("score (cosine)")
    figure.suptitle(title)
    return _save(figure, out)


def plot_contact_sheet(
    pairs: Sequence[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]],
    out: str | Path,
    title: str,
    columns: int = 4,
) -> Path:
    """Draws pairs of images side by side with a caption each, or says that there are none.

    Args:
        pairs: (caption, RGB [H, W, 3], RGB of the same height) of each pair.
        out: File of the figure; its suffix sets the format.
        title: Title of the figure.
        columns: Pairs per row.
    """
    from matplotlib.figure import Figure

    rows = max(-(-len(pairs) // columns), 1)
    figure = Figure(figsize=(3.4 * columns, 2.0 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    for axis in axes:
        axis.axis("off")
    for axis, (caption, left, right) in zip(axes, pairs, strict=False):
        gap = np.full((left.shape[0], max(left.shape[1] // 28, 1), 3), 255, np.uint8)
        axis.imshow(np.concatenate([left, gap, right], axis=1))
        axis.set_title(caption, fontsize=7)
    if not pairs:
        axes[0].text(0.0, 0.5, "no pair was judged wrongly")
    figure.suptitle(title)
    return _save(figure, out)


def _draw_roc(axes: Any, curves: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> None:
    smallest = []
    for name, (far, tar) in curves.items():
        x, y = np.asarray(far, dtype=float), np.asarray(tar, dtype=float)
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            axes.plot([], [], label=f"{name} (undefined)")
            continue
        smallest.append(x[x > 0].min(initial=1.0))
        # A threshold exists only at the points, so between them the curve is a step. A log axis
        # has no zero: the part before the first false accept begins at the left edge.
        axes.step(np.maximum(x, 1e-12), y, where="post", label=name, linewidth=1.5)
    left = 10.0 ** math.floor(math.log10(min(smallest, default=1e-4)))
    axes.set_xscale("log")
    axes.set_xlim(min(left, 0.1), 1.0)
    axes.set_ylim(0.0, 1.01)
    axes.set_xlabel("false accept rate (log scale)")
    axes.set_ylabel("true accept rate")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="lower right")


def _score(metrics: dict[str, Any]) -> Any:
    """Returns the plotted value of an evaluation: flip accuracy of faces, top-1 of a classifier."""
    return metrics.get("accuracy_flip", metrics.get("top1"))


def _draw_accuracies(axes: Any, evaluations: list[dict[str, Any]]) -> None:
    targets = sorted({target for line in evaluations for target in line["eval"]})
    for target in targets:
        at = [line for line in evaluations if target in line["eval"]]
        axes.plot(
            [line["step"] for line in at],
            [_number(_score(line["eval"][target])) for line in at],
            marker="o",
            markersize=3.5,
            linewidth=1.2,
            label=target,
        )
    is_top1 = any("top1" in one for line in evaluations for one in line["eval"].values())
    axes.set_ylabel("top-1" if is_top1 else "accuracy, flip")
    axes.legend(loc="lower right", fontsize="small", ncols=min(len(targets), 4))


def _read_lines(source: Path) -> list[dict[str, Any]]:
    lines = source.read_text(encoding="utf-8").split("\n")
    read = []
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(lines):  # no newline follows: the line was being written
                break
            raise UserError(f"{source}, line {number}: not a JSON object ({error})") from error
        if not isinstance(value, dict) or "step" not in value:
            raise UserError(f"{source}, line {number}: not a JSON object with a step")
        read.append(value)
    return read


def _number(value: Any) -> float:
    """Converts a value to a float; None (JSON's NaN) and missing values become NaN, a gap."""
    return math.nan if value is None else float(value)


def _save(figure: Any, out: str | Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=_DOTS_PER_INCH)
    return path
