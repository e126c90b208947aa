"""Face verification on sets of pairs: embeds on all ranks together and scores.

`eval.verification_sets` reads the sets once, the training loop calls `verify` for each evaluation,
and `eval.metrics` scores. The command (`python -m eval.verification --help`) offers more: pairs
files, confidence intervals, groups, figures. `report_set` makes what it writes.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from data.decode import decode_image
from eval.cli import (
    add_model_options,
    cache_of,
    check_outputs,
    choose_dist_context,
    open_models,
    parse_rates,
    run_command,
    table,
    write_json,
)
from eval.extract import Embed, EmbeddingCache, embed_images
from eval.groups import Groups, pair_groups
from eval.metrics import (
    allowed_false_accepts,
    auc,
    bootstrap_intervals,
    eer,
    pair_distances,
    rate_name,
    tars_at_fars,
    ten_fold_accuracy,
    validation_rate,
    verification_metrics,
)
from eval.verification_sets import (
    MIN_PAIRS,
    VerificationSet,
    load_pairs,
    load_verification_set,
)
from utils.errors import UserError

logger = logging.getLogger(__name__)

VerificationResult = dict[str, float]


DEFAULT_FARS = (1e-1, 1e-2, 1e-3, 1e-4)

VALIDATION_FAR = 1e-3
"""The false accept rate of the published validation rate."""


@dataclass(frozen=True)
class _SetImages:
    """The images of a set, as `embed_images` takes them."""

    one: VerificationSet

    def __len__(self) -> int:
        return len(self.one.images)

    def encoded(self, index: int) -> bytes:
        """Returns the file of an image, or its shape and pixels; see `eval.extract.Images`."""
        image = self.one.images[index]
        if isinstance(image, bytes) or image.ndim == 1:
            return bytes(image)
        return f"pixels {image.shape} ".encode() + image.tobytes()

    def pixels(self, index: int, encoded: bytes) -> NDArray[np.uint8]:
        """Returns an image as RGB [H, W, 3]; see `eval.extract.Images`."""
        image = self.one.images[index]
        if isinstance(image, bytes) or image.ndim == 1:
            return decode_image(encoded, self.one.describe(index))
        return image


def verify(
    embed: Embed,
    sets: Sequence[VerificationSet],
    *,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    batch_size: int = 64,
    input_size: int = 112,
) -> dict[str, VerificationResult]:
    """Scores `embed` on every set; all ranks of `group` call it together.

    All ranks get the same result.

    Args:
        embed: uint8 RGB [n, 3, H, W] on the CPU -> [n, D], float32 or float64, on any device. Every
            rank must have the same weights. It is called with the images and, separately, with
            their mirror images.
        sets: The same sets on every rank.
        rank: This rank.
        world_size: Number of ranks; torch.distributed is used only if it is more than 1.
        group: Process group of the ranks.
        batch_size: Images per call of `embed`; the last batch of a set may be smaller.
        input_size: Height and width in pixels that every image must have.

    Returns:
        {set name: metrics} with the metrics of `eval.metrics.verification_metrics`. Embeddings that
        are collapsed or not finite give NaN and one logged warning.

    Raises:
        UserError: An argument is wrong, two sets share a name, or an image or an embedding has
            another shape. An error of one rank raises there.
        OtherRankFailed: Another rank failed; the message names it. No rank is left waiting.
    """
    if len({one.name for one in sets}) != len(sets):
        raise UserError(f"two sets share a name: {', '.join(one.name for one in sets)}")
    results = {}
    for one in sets:
        plain, flipped = embed_set(
            embed,
            one,
            rank=rank,
            world_size=world_size,
            group=group,
            batch_size=batch_size,
            input_size=input_size,
        )
        results[one.name] = score_set(one, plain, flipped, warn=rank == 0)
    return results


def score_set(
    one: VerificationSet,
    plain: NDArray[np.floating],
    flipped: NDArray[np.floating],
    warn: bool = True,
) -> VerificationResult:
    """Computes `eval.metrics.verification_metrics` of a set.

    Args:
        one: The set.
        plain: [2N, D] embeddings of the images.
        flipped: [2N, D] embeddings of the mirror images.
        warn: Whether one logged warning names the metrics that are NaN.
    """
    result = verification_metrics(plain, flipped, one.issame)
    undefined = [key for key, value in result.items() if math.isnan(value)]
    if undefined and warn:
        logger.warning(
            "verification on %s: %s undefined (NaN): the embeddings are collapsed or not finite, "
            "or the set has one kind of pair only",
            one.name,
            ", ".join(undefined),
        )
    return result


def embed_set(
    embed: Embed,
    one: VerificationSet,
    *,
    rank: int = 0,
    world_size: int = 1,
    group: dist.ProcessGroup | None = None,
    batch_size: int = 64,
    input_size: int = 112,
    cache: EmbeddingCache | None = None,
    show_progress: bool = False,
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Embeds the images of a set and their mirror images, complete on every rank.

    Args:
        embed: As in `verify`.
        one: The set.
        rank: This rank.
        world_size: Number of ranks.
        group: Process group of the ranks.
        batch_size: Images per call of `embed`.
        input_size: Height and width in pixels that every image must have.
        cache: Cache in which batches are looked up and kept.
        show_progress: Whether progress is shown on stderr.

    Returns:
        The embeddings of the images and of the mirror images, each [2N, D].

    Raises:
        UserError: As in `verify`.
        OtherRankFailed: As in `verify`.
    """
    rows = embed_images(
        embed,
        _SetImages(one),
        name=f"verification set {one.name}",
        rank=rank,
        world_size=world_size,
        group=group,
        batch_size=batch_size,
        input_size=input_size,
        cache=cache,
        show_progress=show_progress,
    )
    width = rows.shape[1] // 2
    return rows[:, :width], rows[:, width:]


# --------------------------------------------------------------------------------------------
# A whole report of a set
# --------------------------------------------------------------------------------------------


def report_set(
    one: VerificationSet,
    plain: NDArray[np.floating],
    flipped: NDArray[np.floating],
    *,
    fars: Sequence[float] = DEFAULT_FARS,
    resamples: int = 1000,
    groups: Groups | None = None,
) -> dict[str, Any]:
    """Computes the full report of a set, as JSON has it.

    It has the flat metrics of `verify` and `threshold_cosine`. `validation_rate` is {rate, std,
    far, far_wanted} of the published protocol. `tar_at_far` is a list of {far, tar,
    threshold_cosine, false_accepts, num_impostors, allowed_false_accepts}. `confidence_95` is
    {metric: [low, high]} by bootstrap. `groups` is {column: {value: metrics of the pairs in it}},
    with the value "a / b" for a pair whose sides differ.

    Args:
        one: The set.
        plain: [2N, D] embeddings of the images.
        flipped: [2N, D] embeddings of the mirror images.
        fars: Target FARs in [0, 1].
        resamples: Number of the bootstrap's draws; 0 leaves the intervals out.
        groups: Groups of pairs or images.

    Raises:
        UserError: The groups do not name all pairs or images, or they have image names, and the set
            has none.
    """
    distances = set_distances(one, plain, flipped)
    report: dict[str, Any] = dict(score_set(one, plain, flipped))
    report["threshold_cosine"] = 1 - report["threshold"] / 2
    at = validation_rate(distances, one.issame, VALIDATION_FAR)
    report["validation_rate"] = {
        "rate": at.mean,
        "std": at.std,
        "far": at.far,
        "far_wanted": VALIDATION_FAR,
    }
    report |= _pair_report(distances, one.issame, fars, resamples)
    if groups is not None:
        report["groups"] = {
            column: {
                label: _group_report(distances, one.issame, of_pair == number, fars)
                for number, label in enumerate(labels)
            }
            for column, (labels, of_pair) in _groups_of_pairs(one, groups).items()
        }
    return report


def set_distances(
    one: VerificationSet, plain: NDArray[np.floating], flipped: NDArray[np.floating]
) -> NDArray[np.floating]:
    """Computes squared distances [N] of the summed embeddings; all NaN if they are collapsed.

    Args:
        one: The set.
        plain: [2N, D] embeddings of the images.
        flipped: [2N, D] embeddings of the mirror images.
    """
    distances = pair_distances(plain.astype(np.float64) + flipped)
    values = verification_metrics(plain, flipped, one.issame)
    if math.isnan(values["accuracy_flip"]):  # collapsed: the distances are only rounding errors
        distances[:] = np.nan
    return distances


def _pair_report(
    distances: NDArray[np.floating],
    issame: NDArray[np.bool_],
    fars: Sequence[float],
    resamples: int,
) -> dict[str, Any]:
    num_impostors = int(np.count_nonzero(~issame))
    report: dict[str, Any] = {
        "num_same": len(issame) - num_impostors,
        "num_impostors": num_impostors,
        "tar_at_far": [
            {
                "far": far,
                "tar": at.tar,
                "threshold_cosine": 1 + at.threshold / 2,  # the score is minus the distance
                "false_accepts": at.false_accepts,
                "num_impostors": num_impostors,
                "allowed_false_accepts": allowed_false_accepts(far, num_impostors),
            }
            for far, at in zip(fars, tars_at_fars(-distances, issame, fars), strict=True)
        ],
    }
    if resamples:
        intervals = bootstrap_intervals(distances, issame, fars, resamples=resamples)
        report["confidence_95"] = {
            "accuracy_flip" if name == "accuracy" else name: list(interval)
            for name, interval in intervals.items()
        }
        report["bootstrap_resamples"] = resamples
    return report


def _group_report(
    distances: NDArray[np.floating],
    issame: NDArray[np.bool_],
    members: NDArray[np.bool_],
    fars: Sequence[float],
) -> dict[str, Any]:
    """Reports some of the pairs; the k-fold accuracy is NaN if they are too few."""
    inside, same = distances[members], issame[members]
    enough = len(inside) >= MIN_PAIRS
    return {
        "num_pairs": len(inside),
        "accuracy_flip": ten_fold_accuracy(inside, same).mean if enough else math.nan,
        "auc": auc(-inside, same),
        "eer": eer(-inside, same),
        **_pair_report(inside, same, fars, 0),
    }


def _groups_of_pairs(
    one: VerificationSet, groups: Groups
) -> dict[str, tuple[list[str], NDArray[np.int64]]]:
    """Returns {column: (names of groups, group [N] of every pair)}."""
    pairs = np.arange(one.num_pairs)
    if groups.key == "pair":
        of_pairs = groups.of([str(index) for index in pairs.tolist()])
        return {column: pair_groups(values, pairs, pairs) for column, values in of_pairs.items()}
    if groups.key == "name":
        if one.image_names is None:
            raise UserError(
                f"{groups.path}: the images of {one.name} have no names; let the first column be "
                "pair (0, 1, ..) or image (0, 1, ..)"
            )
        sides = groups.of(one.image_names)
    else:
        sides = groups.of([str(index) for index in range(2 * one.num_pairs)])
    left, right = 2 * pairs, 2 * pairs + 1
    return {column: pair_groups(values, left, right) for column, values in sides.items()}


def format_results(results: dict[str, dict[str, Any]]) -> str:
    """Formats tables of reports: a line per set, then a line per group."""
    fars = [at["far"] for report in results.values() for at in report["tar_at_far"]]
    fars = list(dict.fromkeys(fars))
    head = ["set", "pairs", "accuracy", "flip", "95%", "threshold", "AUC", "EER"]
    rows = [[*head, *(f"TAR@{rate_name(far)}" for far in fars)]]
    notes, grouped = [], []
    for name, report in results.items():
        low, high = report.get("confidence_95", {}).get("accuracy_flip", (math.nan, math.nan))
        rows.append(
            [
                name,
                str(report["num_pairs"]),
                f"{report['accuracy']:.5f} ± {report['accuracy_std']:.5f}",
                f"{report['accuracy_flip']:.5f} ± {report['accuracy_flip_std']:.5f}",
                "" if math.isnan(low) else f"{low:.4f}-{high:.4f}",
                f"{report['threshold_cosine']:.3f}",
                f"{report['auc']:.5f}",
                f"{report['eer']:.5f}",
                *(f"{at['tar']:.5f}" for at in report["tar_at_far"]),
            ]
        )
        allowed = ", ".join(
            f"{at['allowed_false_accepts']} at {rate_name(at['far'])}"
            for at in report["tar_at_far"]
        )
        at = report["validation_rate"]
        notes.append(
            f"{name}: Validation rate: {at['rate']:.5f}+-{at['std']:.5f} @ FAR={at['far']:.5f}"
        )
        notes.append(f"{name}: {report['num_impostors']} impostors, so allowed are {allowed}")
        for column, values in report.get("groups", {}).items():
            for value, part in values.items():
                grouped.append(
                    [
                        f"{name} {column}={value}",
                        str(part["num_pairs"]),
                        str(part["num_impostors"]),
                        f"{part['accuracy_flip']:.5f}",
                        f"{part['auc']:.5f}",
                        f"{part['eer']:.5f}",
                        *(f"{at['tar']:.5f}" for at in part["tar_at_far"]),
                    ]
                )
    text = table(rows) + "\n" + "\n".join(notes)
    if grouped:
        head = ["group", "pairs", "impostors", "flip", "AUC", "EER"]
        text += "\n" + table([[*head, *(f"TAR@{rate_name(far)}" for far in fars)], *grouped])
    return text


# --------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code (2 for wrong input, as in argparse)."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.verification", description="Verify a model on sets of pairs."
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--data", nargs="+", default=[], help=".bin files, or folders (every .bin in them)")
    add("--pairs", type=Path, help="a pairs file, whose images are in --folder")
    add("--folder", type=Path, help="folder of the images of --pairs")
    add("--far", type=parse_rates, default=list(DEFAULT_FARS), help="default 1e-1,1e-2,1e-3,1e-4")
    add("--bootstrap", type=int, default=1000, help="resamples (0: no intervals; default 1000)")
    add("--groups", type=Path, help="CSV: pair (or image, or name), then columns to group by")
    add("--json", type=Path, help="write the metrics there (NaN as null)")
    add("--plot", type=Path, help="ROC and histograms of scores (.png, .pdf, .svg)")
    add("--wrong", type=Path, help="contact sheet of the wrongly judged pairs (.png, .pdf, .svg)")
    options = parser.parse_args(arguments)
    return run_command(lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> int:
    check_outputs(
        {"--json": options.json, "--plot": options.plot, "--wrong": options.wrong},
        plots=("--plot", "--wrong"),
    )
    if bool(options.pairs) != bool(options.folder):
        raise UserError("--pairs and --folder go together: the file and where its images are")
    if not options.data and not options.pairs:
        raise UserError("nothing to verify on: give --data, or --pairs with --folder")
    if options.bootstrap < 0:
        raise UserError(f"--bootstrap {options.bootstrap}: 0 or more resamples")
    world = choose_dist_context(options.device)
    paths = [path for given in options.data for path in _bin_files(Path(given))]
    groups = Groups.read(options.groups, ("pair", "image", "name")) if options.groups else None
    (model,) = open_models(options, world)
    reports: dict[str, dict[str, Any]] = {}
    distances: dict[str, tuple[NDArray, NDArray]] = {}
    wrong: list[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]] = []
    sources: list[tuple[Path, VerificationSet | None]] = [(path, None) for path in paths]
    if options.pairs:
        sources.append((options.pairs, load_pairs(options.pairs, options.folder)))
    for path, loaded in sources:
        one = loaded or load_verification_set(path)
        if one.name in reports:
            raise UserError(f"{path}: a set named {one.name} was already given")
        plain, flipped = embed_set(
            model.embed,
            one,
            rank=world.rank,
            world_size=world.world_size,
            batch_size=options.batch_size,
            input_size=model.input_size,
            cache=cache_of(options, model),
            show_progress=world.is_main,
        )
        if not world.is_main:
            reports[one.name] = {}
            continue
        # With a million pairs a few hundred draws give intervals that are as certain.
        resamples = min(options.bootstrap, max(100, 20_000_000 // one.num_pairs))
        reports[one.name] = report_set(
            one,
            plain,
            flipped,
            fars=options.far,
            resamples=resamples if options.bootstrap else 0,
            groups=groups,
        )
        distances[one.name] = set_distances(one, plain, flipped), one.issame
        if options.wrong:
            wrong += wrong_pairs(one, distances[one.name][0], reports[one.name]["threshold"])
    if world.is_main:
        print(format_results(reports))
        if options.json:
            write_json({**reports, "model": model.facts}, options.json)
        _draw(options, distances, wrong)
    return 0


def wrong_pairs(
    one: VerificationSet, distances: NDArray[np.floating], threshold: float, most: int = 40
) -> list[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]]:
    """Returns (caption, image, image) of the pairs that a threshold judges wrongly, worst first.

    Args:
        one: The set.
        distances: [N] squared distances.
        threshold: Squared distance below which a pair is judged to be the same.
        most: Largest number of pairs returned.
    """
    excess = np.where(one.issame, distances - threshold, threshold - distances)
    wrong = np.flatnonzero(np.where(one.issame, distances >= threshold, distances < threshold))
    order = wrong[np.argsort(-excess[wrong], kind="stable")][:most]
    images = _SetImages(one)
    found = []
    for pair in order.tolist():
        kind = "same person" if one.issame[pair] else "different people"
        caption = f"{one.name} {pair}: {kind}, cosine {1 - distances[pair] / 2:.3f}"
        left, right = (images.pixels(i, images.encoded(i)) for i in (2 * pair, 2 * pair + 1))
        found.append((caption, left, right))
    return found


def _draw(
    options: argparse.Namespace,
    distances: dict[str, tuple[NDArray, NDArray]],
    wrong: list[tuple[str, NDArray[np.uint8], NDArray[np.uint8]]],
) -> None:
    if options.plot:
        from eval.plots import plot_scores  # matplotlib takes a second to import

        scores = {name: (1 - far / 2, same) for name, (far, same) in distances.items()}
        plot_scores(scores, options.plot, "Verification, image and mirror image summed")
    if options.wrong:
        from eval.plots import plot_contact_sheet

        plot_contact_sheet(wrong, options.wrong, "Wrongly judged pairs, the most wrong first")


def _bin_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]  # reading it checks that it exists
    found = sorted(path.glob("*.bin"))
    if not found:
        raise UserError(f"{path}: no .bin set in this folder")
    return found


if __name__ == "__main__":
    sys.exit(main())
