"""Identification in a gallery: rank-k, TPIR at FPIR, mAP; for TinyFace and any folders.

    python -m eval.identification --model M --gallery DIR [--distractors DIR] --probe DIR

Scores are cosines, computed one block of probes at a time: the matrix of all probes is never held.
Equal scores count against the model: a mate that ties with another identity is ranked behind it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.datasets import IMAGE_SUFFIXES, DataError
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
from eval.extract import FileImages, embed_images
from eval.groups import Groups
from eval.metrics import allowed_false_accepts, rate_name
from utils.errors import UserError

NOBODY = -1
"""Identity of a distractor: an image in the gallery that is no probe's mate."""

DEFAULT_RANKS, DEFAULT_FPIRS = (1, 5, 10), (1e-2, 1e-1)
_SCORES_PER_BLOCK = 16_000_000  # 64 MB


@dataclass(frozen=True)
class Searches:
    """The result of searching every probe [P] in the gallery.

    Attributes:
        mated: [P], whether the gallery holds an image of the probe's identity.
        rank: [P], 1 + images of others that score at least as high as the best mate; 0 without a
            mate.
        mate_score: [P], best score of the probe's own identity; -inf without a mate.
        other_score: [P], best score of all other identities; -inf without others.
        average_precision: [P], over the whole ranking, NaN without a mate; None if not requested.
        num_gallery: Number of images searched.
    """

    mated: NDArray[np.bool_]
    rank: NDArray[np.int64]
    mate_score: NDArray[np.float32]
    other_score: NDArray[np.float32]
    average_precision: NDArray[np.float64] | None
    num_gallery: int


def search(
    probes: NDArray[np.floating],
    probe_ids: NDArray[np.integer],
    gallery: NDArray[np.floating],
    gallery_ids: NDArray[np.integer],
    *,
    average_precision: bool = False,
    device: torch.device | str = "cpu",
) -> Searches:
    """Searches probes in a gallery.

    Embeddings need not be normalized. Average precision is sklearn's: the mean over the identity's
    images of (own images up to here) / (images up to here), ties counting against.

    Args:
        probes: [P, D] embeddings.
        probe_ids: [P] identities.
        gallery: [G, D] embeddings.
        gallery_ids: [G] identities; NOBODY for distractors.
        average_precision: Whether it is computed.
        device: Device of the products.

    Raises:
        UserError: Shapes do not fit, a side is empty, or an embedding has no direction.
    """
    for name, rows, ids in (("probes", probes, probe_ids), ("gallery", gallery, gallery_ids)):
        if rows.ndim != 2 or len(rows) != len(ids) or not rows.size:
            raise UserError(
                f"{name} have shape {list(rows.shape)} and {len(ids)} identities; needed is a "
                "non-empty [N, D] and one identity per row"
            )
    if probes.shape[1] != gallery.shape[1]:
        raise UserError(
            f"probes have {probes.shape[1]} numbers, the gallery {gallery.shape[1]}; use one model"
        )
    searched = _unit_rows("probes", probes, device)
    against = _unit_rows("gallery", gallery, device).T  # [D, G]
    owners = torch.as_tensor(gallery_ids, device=device)
    asked = torch.as_tensor(probe_ids, device=device)
    count = len(probes)
    rank, mated = np.zeros(count, np.int64), np.zeros(count, np.bool_)
    mate, other = np.full(count, -np.inf, np.float32), np.full(count, -np.inf, np.float32)
    precision = np.full(count, np.nan) if average_precision else None
    block = max(1, _SCORES_PER_BLOCK // len(gallery))
    for start in range(0, count, block):
        part = slice(start, min(start + block, count))
        scores = searched[part] @ against  # [b, G]
        own = (owners == asked[part, None]) & (asked[part, None] != NOBODY)
        best_mate = scores.masked_fill(~own, -math.inf).amax(1)
        others = scores.masked_fill(own, -math.inf)
        mated[part] = own.any(1).cpu().numpy()
        behind = torch.count_nonzero((others >= best_mate[:, None]) & ~own, dim=1)
        rank[part] = (1 + behind).cpu().numpy()
        mate[part], other[part] = best_mate.cpu().numpy(), others.amax(1).cpu().numpy()
        if precision is not None:
            for row in range(len(scores)):
                mates = np.sort(scores[row][own[row]].cpu().numpy())[::-1]
                if not len(mates):
                    continue
                rest = np.sort(scores[row][~own[row]].cpu().numpy())
                before = len(rest) - np.searchsorted(rest, mates, side="left")
                hits = np.arange(1, len(mates) + 1)
                precision[start + row] = float((hits / (hits + before)).mean())
    rank[~mated] = 0
    return Searches(mated, rank, mate, other, precision, len(gallery))


def _unit_rows(name: str, rows: NDArray[np.floating], device: torch.device | str) -> torch.Tensor:
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        raise UserError(
            f"{name}: embedding {bad[0]} (and {len(bad) - 1} more) has no direction: it is zero or "
            "not finite"
        )
    return torch.from_numpy((rows / lengths[:, None]).astype(np.float32)).to(device)


def summarize(
    searches: Searches,
    select: NDArray[np.bool_] | None = None,
    ranks: Sequence[int] = DEFAULT_RANKS,
    fpirs: Sequence[float] = DEFAULT_FPIRS,
) -> dict[str, Any]:
    """Computes the rates of all probes, or of the selected ones, as JSON has them.

    `rank_k` is the share of mated probes whose mate is among the first k. `tpir_at_fpir` is the
    share of mated probes that come first **and** score above a threshold, which at most that share
    of the unmated probes exceed with any image; it is NaN without unmated probes. `map` is the mean
    average precision. Source: NIST, Face Recognition Vendor Test part 2 (FNIR = 1 - TPIR, at rank
    1).

    Args:
        searches: Result of `search`.
        select: [P], which probes count; None means all.
        ranks: Values of k.
        fpirs: Target FPIRs in [0, 1].
    """
    chosen = np.ones(len(searches.rank), np.bool_) if select is None else select
    mated, unmated = chosen & searches.mated, chosen & ~searches.mated
    num_mated, num_unmated = int(np.count_nonzero(mated)), int(np.count_nonzero(unmated))
    rank = searches.rank[mated]
    result: dict[str, Any] = {
        "num_gallery": searches.num_gallery,
        "num_mated_probes": num_mated,
        "num_unmated_probes": num_unmated,
    }
    for k in ranks:
        hits = int(np.count_nonzero(rank <= k))
        result[f"rank_{k}"] = hits / num_mated if num_mated else math.nan
    false_alarms = np.sort(searches.other_score[unmated])
    right = searches.mate_score[mated][rank == 1]
    result["tpir_at_fpir"] = []
    for fpir in fpirs:
        tpir = threshold = math.nan
        allowed = allowed_false_accepts(fpir, num_unmated) if num_unmated else 0
        if num_unmated and num_mated:
            # The threshold is the best false alarm that must not be raised.
            threshold = -math.inf
            if allowed < num_unmated:
                threshold = float(false_alarms[num_unmated - 1 - allowed])
            tpir = int(np.count_nonzero(right > threshold)) / num_mated
        result["tpir_at_fpir"].append(
            {"fpir": fpir, "tpir": tpir, "score_above": threshold, "allowed_false_alarms": allowed}
        )
    if searches.average_precision is not None:
        values = searches.average_precision[mated]
        result["map"] = float(values.mean()) if num_mated else math.nan
    return result


def format_summaries(summaries: dict[str, dict[str, Any]]) -> str:
    """Formats a table, one line per summary."""
    first = next(iter(summaries.values()))
    ranks = [key for key in first if key.startswith("rank_")]
    fpirs = [f"TPIR@{rate_name(at['fpir'])}" for at in first["tpir_at_fpir"]]
    rows = [
        ["identification", "gallery", "mated", "unmated", *ranks, *fpirs]
        + (["mAP"] if "map" in first else [])
    ]
    for name, one in summaries.items():
        rates = [one[key] for key in ranks] + [at["tpir"] for at in one["tpir_at_fpir"]]
        rates += [one["map"]] if "map" in first else []
        counts = [one["num_gallery"], one["num_mated_probes"], one["num_unmated_probes"]]
        rows.append([name, *map(str, counts), *(f"{rate:.5f}" for rate in rates)])
    return table(rows)


# --------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderImages:
    """Images below a folder.

    Attributes:
        paths: Path of each image.
        names: Name of each image relative to the folder.
        identities: Identity of each image.
    """

    paths: list[Path]
    names: list[str]
    identities: list[str]


def list_images(folder: Path) -> FolderImages:
    """Lists every image below a folder, sorted, with its identity.

    In FOLDER/<identity>/<image> the identity is the folder. Directly in FOLDER it is the part of
    the file's name before the first underscore, as in TinyFace. The two cannot be mixed.

    Args:
        folder: The folder.

    Raises:
        DataError: The folder does not exist, has no image, or mixes the two layouts.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of images")
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        wanted = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"{folder}: no image in it (looked for {wanted})")
    parts = [path.relative_to(folder).parts for path in found]
    depths = {len(part) > 1 for part in parts}
    if len(depths) > 1:
        raise DataError(
            f"{folder}: some images lie in it and some in folders of it; whose they are is either "
            "the folder's name or the beginning of the file's, not both"
        )
    if depths == {True}:
        identities = [part[0] for part in parts]
    else:
        identities = [path.stem.split("_")[0] for path in found]
    return FolderImages(found, ["/".join(part) for part in parts], identities)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.identification",
        description="Search the faces of a folder among those of another.",
    )
    add_model_options(parser)
    add = parser.add_argument
    add("--gallery", type=Path, required=True, help="DIR/<identity>/*, or <identity>_*.jpg in it")
    add("--probe", type=Path, required=True, help="likewise")
    add("--distractors", type=Path, help="more of the gallery, nobody's mates")
    add("--resize", action="store_true", help="resize images of another size than the model's")
    add("--no-flip", action="store_true", help="without the mirror image's embedding added")
    add("--fpir", type=parse_rates, default=list(DEFAULT_FPIRS), help="default 1e-2,1e-1")
    add("--groups", type=Path, help="CSV: name (of the probe in its folder), columns to group by")
    add("--json", type=Path, help="write the metrics there (NaN as null)")
    options = parser.parse_args(arguments)
    return run_command(lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> int:
    check_outputs({"--json": options.json})
    world = choose_dist_context(options.device)
    gallery, probes = list_images(options.gallery), list_images(options.probe)
    distractors = list_images(options.distractors) if options.distractors else None
    groups = Groups.read(options.groups, ("name",)).of(probes.names) if options.groups else {}
    (model,) = open_models(options, world)

    def embed(paths: list[Path], name: str) -> NDArray[np.floating]:
        return embed_images(
            model.embed,
            FileImages(paths, model.input_size, options.resize),
            name=name,
            flip=not options.no_flip,
            sum_flip=True,
            rank=world.rank,
            world_size=world.world_size,
            batch_size=options.batch_size,
            input_size=model.input_size,
            cache=cache_of(options, model),
            show_progress=world.is_main,
        )

    features = [embed(gallery.paths, "gallery")]
    people = sorted({*gallery.identities, *probes.identities})
    codes = {person: code for code, person in enumerate(people)}
    owners = [codes[person] for person in gallery.identities]
    if distractors is not None:
        features.append(embed(distractors.paths, "distractors"))
        owners += [NOBODY] * len(distractors.paths)
    probe_features = embed(probes.paths, "probes")
    if not world.is_main:
        return 0
    searches = search(
        probe_features,
        np.array([codes[person] for person in probes.identities]),
        np.concatenate(features),
        np.array(owners),
        average_precision=True,
        device=world.device,
    )
    summaries = {"all": summarize(searches, fpirs=options.fpir)}
    for column, values in groups.items():
        for value in np.unique(values):
            summaries[f"{column}={value}"] = summarize(
                searches, values == value, fpirs=options.fpir
            )
    print(format_summaries(summaries))
    if options.json:
        content = {**summaries, "flip": not options.no_flip, "model": model.facts}
        write_json(content, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
