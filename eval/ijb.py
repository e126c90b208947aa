r"""IJB-B and IJB-C: verification and identification of templates made of photographs and frames.

    torchrun --nproc_per_node=8 -m eval.ijb --model work_dirs/ms1mv3_r50 --root IJB_release \
        --target IJBC

`read_ijb` checks all files, `embed_images` aligns and embeds, `template_features` makes one vector
of a template's media, `pair_scores` compares templates, and `tars_at_fars` computes the rates. The
published scripts' loops are done in blocks here, with the same numbers
(tests/golden/eval/ijbc_layout.npz) but for one correction: a TAR never exceeds its FAR.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eval.cli import (
    add_model_options,
    cache_of,
    check_outputs,
    choose_dist_context,
    model_name,
    open_models,
    parse_rates,
    run_command,
    table,
    write_json,
)
from eval.extract import AlignedImages, embed_images
from eval.groups import Groups, pair_groups
from eval.identification import format_summaries, search, summarize
from eval.ijb_files import GALLERIES, IjbSet, read_ijb
from eval.metrics import allowed_false_accepts, auc, rate_name, tars_at_fars
from eval.model import Model
from utils.distributed import DistContext
from utils.errors import UserError

DEFAULT_FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_ROWS_PER_BLOCK = 2048  # float64 rows: 8 MiB at 512 numbers
_SCORES_PER_BLOCK = 4_000_000
_PAIRS_PER_BLOCK = 1_000_000
# Up to here products are computed in float64, as published; beyond it in float32 (1e-7 apart).
_EXACT_PRODUCTS = 100_000_000
# How many products the blocked matrix may compute for each pair that is asked for, before
# fetching the two rows of every pair is faster.
_PRODUCTS_PER_PAIR = 50


# --------------------------------------------------------------------------------------------
# From image embeddings to numbers
# --------------------------------------------------------------------------------------------


def template_features(
    features: NDArray[np.floating],
    one: IjbSet,
    *,
    use_norm: bool = True,
    use_detector: bool = True,
) -> NDArray[np.float64]:
    """Computes unit vectors of the templates from the embeddings of the images.

    The images of one medium are averaged, the media of a template added, and the sum normalized. A
    template whose sum is zero or not finite becomes NaN. Source: the published IJB scripts.

    Args:
        features: [n, D] embeddings; with flip (F) the sum of image's and mirror image's.
        one: The IJB set.
        use_norm: Whether embeddings keep their length (N1); otherwise every image counts the same
            (N0).
        use_detector: Whether images are weighted by the detector's score (D1) or not (D0).

    Returns:
        [T, D] float64.

    Raises:
        UserError: `features` does not have one row per image.
    """
    if features.ndim != 2 or len(features) != len(one.paths):
        raise UserError(
            f"features have shape {list(features.shape)}; {one.target} has {len(one.paths)} images"
        )
    medium, sizes = one.media_sizes()
    # A mean inside and a sum outside are one weighted sum.
    weights = 1.0 / sizes[medium]
    if use_detector:
        weights *= one.faceness[one.row_image]
    width = features.shape[1]
    sums = torch.zeros(len(one.template_ids), width, dtype=torch.float64)
    for start in range(0, len(weights), _ROWS_PER_BLOCK):
        part = slice(start, start + _ROWS_PER_BLOCK)
        images, scale = one.row_image[part], weights[part]
        if (np.diff(images) == 1).all():  # the usual order of the files: no copy
            rows = features[images[0] : images[0] + len(images)]
        else:
            rows = features[images]
        with np.errstate(divide="ignore", invalid="ignore"):
            if not use_norm:
                scale = scale / np.linalg.norm(rows.astype(np.float64), axis=1)
            weighted = np.multiply(rows, scale[:, None], dtype=np.float64)
        sums.index_add_(0, torch.from_numpy(one.row_template[part]), torch.from_numpy(weighted))
    templates = sums.numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        templates /= np.linalg.norm(templates, axis=1, keepdims=True)
    return templates


def pair_scores(
    templates: NDArray[np.floating],
    first: NDArray[np.integer],
    second: NDArray[np.integer],
) -> NDArray[np.floating]:
    """Computes cosines of pairs of templates.

    The lists of IJB compare most of some templates with most of others. So products are computed as
    blocks of a matrix and picked from it, or row by row if pairs are few among many templates.

    Args:
        templates: [T, D] unit vectors.
        first: [P] positions of the pairs' first templates.
        second: [P] positions of the pairs' second templates.

    Returns:
        [P] float64; float32 for very large sets.
    """
    used_first, row_of = _used(first, len(templates))
    used_second, column_of = _used(second, len(templates))
    products = len(used_first) * len(used_second)
    dtype = np.float64 if products <= _EXACT_PRODUCTS else np.float32
    if products > _PRODUCTS_PER_PAIR * len(first):
        picked: NDArray[np.floating] = np.empty(len(first), dtype)
        for start in range(0, len(first), _ROWS_PER_BLOCK):
            part = slice(start, start + _ROWS_PER_BLOCK)
            left = templates[first[part]].astype(dtype)
            picked[part] = np.einsum("nd,nd->n", left, templates[second[part]].astype(dtype))
        return picked
    rows = torch.from_numpy(templates[used_first].astype(dtype))
    columns = torch.from_numpy(templates[used_second].astype(dtype)).T
    # With 15 million pairs every array costs memory, so a pair's place in the whole matrix is
    # computed in the array of its row.
    place = row_of[first] if products < 2**31 else row_of[first].astype(np.int64)
    ends = np.cumsum(np.bincount(place, minlength=len(used_first)))
    order = None
    if (place[1:] < place[:-1]).any():
        # Sorting 16-bit numbers takes NumPy a tenth of the time.
        narrow = place.astype(np.uint16) if len(used_first) <= 2**16 else place
        order = np.argsort(narrow, kind="stable")
        if len(first) < 2**31:
            order = order.astype(np.int32)
        del narrow
    place *= len(used_second)
    for start in range(0, len(place), _PAIRS_PER_BLOCK):
        part = slice(start, start + _PAIRS_PER_BLOCK)
        place[part] += column_of[second[part]]
    scores: NDArray[np.floating] = np.empty(len(first), dtype)
    step = max(1, _SCORES_PER_BLOCK // len(used_second))
    product = torch.empty(min(step, len(used_first)), len(used_second), dtype=rows.dtype)
    begin = 0
    for start in range(0, len(used_first), step):
        stop = min(start + step, len(used_first))
        block = torch.mm(rows[start:stop], columns, out=product[: stop - start]).numpy().ravel()
        end = int(ends[stop - 1])
        pairs = slice(begin, end) if order is None else order[begin:end]
        scores[pairs] = block[place[pairs] - start * len(used_second)]
        begin = end
    return scores


def _used(
    positions: NDArray[np.integer], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Returns the distinct positions, ascending, and the place of each of `count` among them."""
    is_used = np.zeros(count, np.bool_)
    is_used[positions] = True
    return np.flatnonzero(is_used), (np.cumsum(is_used) - 1).astype(np.int32)


def verification_report(
    scores: NDArray[np.floating],
    issame: NDArray[np.bool_],
    fars: Sequence[float] = DEFAULT_FARS,
) -> dict[str, Any]:
    """Computes TAR at each FAR with its counts, and the AUC, as JSON has them.

    Args:
        scores: [P], larger means more alike.
        issame: [P] boolean.
        fars: Target FARs in [0, 1].
    """
    num_impostors = int(np.count_nonzero(~issame))
    return {
        "num_pairs": len(issame),
        "num_impostors": num_impostors,
        "auc": auc(scores, issame),
        "tar_at_far": [
            {
                "far": far,
                "tar": at.tar,
                "threshold_cosine": at.threshold,
                "false_accepts": at.false_accepts,
                "num_impostors": num_impostors,
                "allowed_false_accepts": allowed_false_accepts(far, num_impostors),
            }
            for far, at in zip(fars, tars_at_fars(scores, issame, fars), strict=True)
        ],
    }


def identification_report(
    templates: NDArray[np.floating], one: IjbSet, device: torch.device | str = "cpu"
) -> dict[str, dict[str, Any]]:
    """Computes rates per gallery (open set), their mean, and rates of both galleries together.

    A probe whose subject is only in the other gallery is unmated. The published script searches
    both galleries as one, where every probe has a mate: that is `both`, which has ranks only.

    Args:
        templates: [T, D] unit vectors.
        one: The IJB set.
        device: Device of the products.
    """
    assert one.probe is not None
    probes = templates[one.probe.templates]
    reports: dict[str, dict[str, Any]] = {}
    for gallery in one.galleries:
        found = search(
            probes,
            one.probe.subjects,
            templates[gallery.templates],
            gallery.subjects,
            device=device,
        )
        reports[gallery.name] = summarize(found)
    reports["mean"] = _mean_report(list(reports.values()))
    found = search(
        probes,
        one.probe.subjects,
        np.concatenate([templates[gallery.templates] for gallery in one.galleries]),
        np.concatenate([gallery.subjects for gallery in one.galleries]),
        device=device,
    )
    reports["both"] = summarize(found)
    return reports


def _mean_report(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Averages rates and adds counts."""
    mean: dict[str, Any] = {}
    for key, value in reports[0].items():
        if key.startswith("num_"):
            mean[key] = sum(report[key] for report in reports)
        elif key == "tpir_at_fpir":
            mean[key] = [
                {
                    "fpir": at["fpir"],
                    "tpir": float(np.mean([report[key][i]["tpir"] for report in reports])),
                }
                for i, at in enumerate(value)
            ]
        else:
            mean[key] = float(np.mean([report[key] for report in reports]))
    return mean


# --------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.ijb", description="Evaluate models on IJB-B or IJB-C."
    )
    add_model_options(parser, several=True)
    add = parser.add_argument
    add("--root", type=Path, required=True, help="folder that holds meta/ and loose_crop/")
    add("--target", choices=tuple(GALLERIES), required=True)
    add("--no-norm", action="store_true", help="N0: embeddings of length 1 before aggregation")
    add("--no-detector", action="store_true", help="D0: not weighed by the detector's score")
    add("--no-flip", action="store_true", help="F0: without the mirror image")
    add("--far", type=parse_rates, default=list(DEFAULT_FARS), help="default 1e-6, .., 1e-1")
    add("--groups", type=Path, help="CSV: template, then columns to group by")
    add(
        "--out",
        type=Path,
        help="folder for result.json, scores_<model>.npy, roc.pdf, roc.png (default TARGET_result)",
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> int:
    out: Path = options.out or Path(f"{options.target}_result")
    names = [model_name(path) for path in options.model]
    if len(set(names)) < len(names):
        raise UserError(f"two models share the name {names}: give copies of other names")
    world = choose_dist_context(options.device)
    one = read_ijb(options.root, options.target)
    groups = _groups_of_pairs(options.groups, one) if options.groups else {}
    if world.is_main:
        counted = ", ".join(f"{count:,} {what}" for what, count in one.counts().items())
        print(f"{options.target}: {counted}".replace("_", " "), file=sys.stderr)
    models = open_models(options, world)
    if world.is_main:
        check_outputs({"--out": out / "result.json"})
    switches = {"N": not options.no_norm, "D": not options.no_detector, "F": not options.no_flip}
    reports: dict[str, Any] = {}
    all_scores: dict[str, NDArray[np.floating]] = {}
    for name, model in zip(names, models, strict=True):
        features = _embed(model, one, options, world)
        if not world.is_main:
            continue
        _check_features(features, one, name)
        templates = template_features(
            features, one, use_norm=switches["N"], use_detector=switches["D"]
        )
        del features
        scores = pair_scores(templates, one.pair_first, one.pair_second)
        reports[name] = {
            "model": model.facts,
            "verification": verification_report(scores, one.issame, options.far),
            "groups": {
                column: {
                    label: verification_report(
                        scores[of_pair == number], one.issame[of_pair == number], options.far
                    )
                    for number, label in enumerate(labels)
                }
                for column, (labels, of_pair) in groups.items()
            },
        }
        if one.probe is not None:
            reports[name]["identification"] = identification_report(templates, one, world.device)
        all_scores[name] = scores
    if world.is_main:
        print(format_reports(options.target, switches, reports))
        _write(out, options.target, switches, one, reports, all_scores)
        print(f"{out}: result.json, scores, roc.pdf and roc.png", file=sys.stderr)
    return 0


def _embed(
    model: Model, one: IjbSet, options: argparse.Namespace, world: DistContext
) -> NDArray[np.floating]:
    return embed_images(
        model.embed,
        AlignedImages(one.paths, one.landmarks, model.input_size, one.places),
        name=one.target,
        flip=not options.no_flip,
        sum_flip=True,
        rank=world.rank,
        world_size=world.world_size,
        batch_size=options.batch_size,
        input_size=model.input_size,
        cache=cache_of(options, model),
        show_progress=world.is_main,
    )


def _check_features(features: NDArray[np.floating], one: IjbSet, name: str) -> None:
    """Refuses an image without direction: its template and every metric would be undefined."""
    for start in range(0, len(features), _ROWS_PER_BLOCK):
        block = features[start : start + _ROWS_PER_BLOCK]
        bad = np.flatnonzero(~np.isfinite(block).all(1) | ~block.any(1))
        if len(bad):
            at = start + int(bad[0])
            raise UserError(
                f"{one.places[at]}: {name} gives {one.paths[at].name} an embedding that is zero or "
                "not finite; nothing was evaluated"
            )


def _groups_of_pairs(file: Path, one: IjbSet) -> dict[str, tuple[list[str], NDArray[np.int64]]]:
    columns = Groups.read(file, ("template",)).of([str(i) for i in one.template_ids.tolist()])
    return {
        column: pair_groups(values, one.pair_first, one.pair_second)
        for column, values in columns.items()
    }


def format_reports(target: str, switches: dict[str, bool], reports: dict[str, Any]) -> str:
    """Formats tables: verification of every model and group, then identification.

    Args:
        target: IJBB or IJBC.
        switches: N, D and F, and whether each is on.
        reports: Report of each model.
    """
    setting = " ".join(f"{name}{int(on)}" for name, on in switches.items())
    rows: list[list[str]] = []
    found: dict[str, dict[str, Any]] = {}
    for name, report in reports.items():
        parts = {name: report["verification"]}
        for column, values in report["groups"].items():
            parts |= {f"{name} {column}={value}": part for value, part in values.items()}
        for label, part in parts.items():
            fars = [f"TAR@{rate_name(at['far'])}" for at in part["tar_at_far"]]
            if not rows:
                rows.append([f"{target} 1:1, {setting}", "impostors", "AUC", *fars])
            rates = [part["auc"], *(at["tar"] for at in part["tar_at_far"])]
            rows.append([label, f"{part['num_impostors']:,}", *(f"{rate:.5f}" for rate in rates)])
        for gallery, part in report.get("identification", {}).items():
            found[f"{name} {gallery}"] = part
    text = table(rows)
    if found:
        return f"{text}\n{format_summaries(found)}"
    return f"{text}\n{target} 1:N: no gallery and probe files in meta/, so not evaluated"


def _write(
    out: Path,
    target: str,
    switches: dict[str, bool],
    one: IjbSet,
    reports: dict[str, Any],
    all_scores: dict[str, NDArray[np.floating]],
) -> None:
    """Writes scores and figures first and result.json last: if it exists, all of them do."""
    from eval.plots import plot_roc  # matplotlib takes a second to import

    (out / "result.json").unlink(missing_ok=True)
    smallest = max(1e-6, 0.5 / max(int(np.count_nonzero(~one.issame)), 1))
    fars = np.geomspace(smallest, 1.0, 200)
    curves = {}
    for name, scores in all_scores.items():
        np.save(out / f"scores_{name}.npy", scores)
        points = tars_at_fars(scores, one.issame, fars.tolist())
        curves[name] = fars, np.array([point.tar for point in points])
    setting = " ".join(f"{name}{int(on)}" for name, on in switches.items())
    for suffix in ("pdf", "png"):
        plot_roc(curves, out / f"roc.{suffix}", f"{target} verification, {setting}")
    write_json(
        {"target": target, "switches": switches, "counts": one.counts(), "models": reports},
        out / "result.json",
    )


if __name__ == "__main__":
    sys.exit(main())
