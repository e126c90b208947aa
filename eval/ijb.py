"""IJB-B and IJB-C: verification and identification of templates made of photographs and frames.

    torchrun --nproc_per_node=8 -m eval.ijb --model work_dirs/ms1mv3_r50 --root IJB_release \
        --target IJBC

The story: `read_ijb` checks everything that is written down, `embed_images` aligns and embeds,
`template_features` makes one vector of a template's media, `pair_scores` compares templates,
`tars_at_fars` judges. What the published scripts do in loops is done here in blocks, to the same
numbers (golden/eval/ijbc_layout.npz), with one correction: a TAR never exceeds its FAR.
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

from eval.command import (
    add_model_options,
    cache_of,
    check_outputs,
    choose_world,
    model_name,
    open_models,
    parse_rates,
    run_command,
    table,
    write_json,
)
from eval.embedder import Model
from eval.embedding import AlignedImages, embed_images
from eval.groups import Groups, pair_groups
from eval.identification import format_summaries, search, summarise
from eval.metrics import allowed_false_accepts, auc, rate_name, tars_at_fars
from utils.distributed import World

DEFAULT_FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_GALLERIES = {"IJBB": ("S1", "S2"), "IJBC": ("G1", "G2")}
_ROWS_PER_BLOCK = 2048  # float64 rows: 8 MiB at 512 numbers
_SCORES_PER_BLOCK = 4_000_000
_PAIRS_PER_BLOCK = 1_000_000
# Up to here products are computed in float64, as published; beyond it in float32 (1e-7 apart).
_EXACT_PRODUCTS = 100_000_000
# How many products the blocked matrix may compute for each pair that is asked for, before
# fetching the two rows of every pair is faster.
_PRODUCTS_PER_PAIR = 50
_BYTES_PER_READ = 1 << 24


class IjbError(ValueError):
    """Files of the IJB layout that are missing or wrong; names file and line."""


@dataclass(frozen=True)
class Gallery:
    """Templates enrolled as people: position in `IjbSet.template_ids`, and subject."""

    name: str
    templates: NDArray[np.int64]
    subjects: NDArray[np.int64]


@dataclass(frozen=True)
class IjbSet:
    """What the files of a target say.

    Attributes:
        target: IJBB or IJBC.
        paths: of the n images; `places`: file and line where each is named.
        landmarks: [n, 5, 2] pixels; `faceness`: [n], the detector's score.
        template_ids: [T], rising.
        row_image, row_template, row_media: of every line of face_tid_mid: image index, position in
            `template_ids`, media id.
        pair_first, pair_second: [P] positions in `template_ids`; `issame` [P].
        galleries, probe: for identification; none and None where the set has no such files.
    """

    target: str
    paths: list[Path]
    places: list[str]
    landmarks: NDArray[np.float64]
    faceness: NDArray[np.float32]
    template_ids: NDArray[np.int64]
    row_image: NDArray[np.int64]
    row_template: NDArray[np.int64]
    row_media: NDArray[np.int64]
    pair_first: NDArray[np.int32]
    pair_second: NDArray[np.int32]
    issame: NDArray[np.bool_]
    galleries: tuple[Gallery, ...] = ()
    probe: Gallery | None = None

    def counts(self) -> dict[str, int]:
        """How many of everything."""
        media = len(self.media_sizes()[1])
        same = int(np.count_nonzero(self.issame))
        return {
            "images": len(self.paths),
            "templates": len(self.template_ids),
            "media": media,
            "pairs": len(self.issame),
            "same_pairs": same,
            "impostor_pairs": len(self.issame) - same,
        }


    def media_sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(medium of every row, images of every medium), a medium being one of a template."""
        number = np.unique(self.row_media, return_inverse=True)[1]
        code = self.row_template * (number.max() + 1) + number
        _, medium, sizes = np.unique(code, return_inverse=True, return_counts=True)
        return medium, sizes


# --------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------


def read_ijb(root: str | Path, target: str) -> IjbSet:
    """Read and check ROOT/meta, or ROOT/<TARGET>/meta, and that every image is there.

    Raises IjbError naming the file, and the line or the first of what is missing.
    """
    if target not in _GALLERIES:
        raise IjbError(f"target is {target!r}; allowed are {', '.join(_GALLERIES)}")
    folder = Path(root)
    if not (folder / "meta").is_dir() and (folder / target / "meta").is_dir():
        folder = folder / target
    prefix = folder / "meta" / target.lower()
    file_landmarks, file_media, file_pairs = (
        Path(f"{prefix}_{name}.txt")
        for name in ("name_5pts_score", "face_tid_mid", "template_pair_label")
    )
    for file in (file_landmarks, file_media, file_pairs):
        if not file.is_file():
            raise IjbError(
                f"{file}: no such file; --root is the folder that holds meta/ and loose_crop/, or "
                f"one that holds {target}/"
            )
    names, places, landmarks, faceness = _read_landmarks(file_landmarks)
    paths = [folder / "loose_crop" / name for name in names]
    _check_images(folder / "loose_crop", names)
    row_image, templates, row_media = _read_media(file_media, names, file_landmarks)
    template_ids, row_template = np.unique(templates, return_inverse=True)
    first, second, issame = _read_pairs(file_pairs, template_ids, file_media)
    galleries, probe = _read_identification(prefix, target, template_ids, file_media)
    return IjbSet(
        target, paths, places, landmarks, faceness, template_ids, row_image, row_template,
        row_media, first, second, issame, galleries, probe,
    )  # fmt: skip


def _read_landmarks(
    file: Path,
) -> tuple[list[str], list[str], NDArray[np.float64], NDArray[np.float32]]:
    names, numbers = [], []
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            columns = line.split()
            try:
                if len(columns) != 12:
                    raise ValueError
                values = [float(text) for text in columns[1:]]
                if not all(map(math.isfinite, values)):
                    raise ValueError
            except ValueError:
                raise IjbError(
                    f"{file}, line {number}: expected a name, ten landmark numbers and a score, "
                    f"got {line[:100]!r}"
                ) from None
            if "/" in columns[0] or columns[0].startswith("."):
                raise IjbError(f"{file}, line {number}: {columns[0]!r} is no file of loose_crop")
            names.append(columns[0])
            numbers.append(values)
    if not names:
        raise IjbError(f"{file}: is empty")
    table_ = np.array(numbers)
    places = [f"{file}, line {number}" for number in range(1, len(names) + 1)]
    return names, places, table_[:, :10].reshape(-1, 5, 2).copy(), table_[:, 10].astype(np.float32)


def _check_images(folder: Path, names: Sequence[str]) -> None:
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = sorted(set(names) - there)
    if missing:
        raise IjbError(
            f"{folder}: {len(missing):,} of {len(set(names)):,} images are missing, for example "
            f"{', '.join(missing[:3])}"
        )


def _read_media(
    file: Path, names: Sequence[str], file_landmarks: Path
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(image index, template id, media id) of every line."""
    position: dict[str, int] | None = None  # made only if the two files are in different orders
    images, templates, media = [], [], []
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines):
            columns = line.split()
            if len(columns) != 3 or not all(text.isdigit() for text in columns[1:]):
                raise IjbError(
                    f"{file}, line {number + 1}: expected a name, a template and a media number, "
                    f"got {line[:100]!r}"
                )
            index = number
            if number >= len(names) or names[number] != columns[0]:
                if position is None:
                    position = {name: at for at, name in enumerate(names)}
                    if len(position) < len(names):
                        raise IjbError(
                            f"{file_landmarks}: names an image twice, and {file.name} is in "
                            "another order, so which is meant cannot be known"
                        )
                found = position.get(columns[0])
                if found is None:
                    raise IjbError(
                        f"{file}, line {number + 1}: {columns[0]} is not in {file_landmarks.name}"
                    )
                index = found
            images.append(index)
            templates.append(int(columns[1]))
            media.append(int(columns[2]))
    if not images:
        raise IjbError(f"{file}: is empty")
    unused = len(names) - len(set(images))
    if unused:
        raise IjbError(f"{file}: {unused:,} images of {file_landmarks.name} are in no template")
    largest = np.iinfo(np.int64).max
    if max(max(templates), max(media)) > largest:
        raise IjbError(f"{file}: a number beyond {largest}")
    return np.array(images), np.array(templates), np.array(media)


def _read_pairs(
    file: Path, template_ids: NDArray[np.int64], file_media: Path
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
    """(position of the first template, of the second, same) of every line."""
    firsts, seconds, sames = [], [], []
    largest = int(template_ids[-1])
    position: NDArray[np.int32] | None = None
    pair: NDArray[np.integer]
    if largest <= 100 * len(template_ids) + 1_000_000:  # a table is quicker than searching
        position = np.full(largest + 1, -1, np.int32)
        position[template_ids] = np.arange(len(template_ids))
    line = 1  # of the first pair of the block
    with open(file, "rb") as stream:
        rest = b""
        while True:
            block = stream.read(_BYTES_PER_READ)
            text = rest + block
            cut = len(text) if not block else text.rfind(b"\n") + 1
            text, rest = text[:cut], text[cut:]
            if text.strip():
                numbers = _three_numbers(text, file, line)
                asked = numbers[:, :2]
                if position is None:
                    pair = np.searchsorted(template_ids, asked)
                    pair[template_ids[np.minimum(pair, len(template_ids) - 1)] != asked] = -1
                else:
                    pair = position[np.minimum(asked, largest)]
                    pair[asked > largest] = -1
                for bad, what in (
                    ((pair < 0).any(1), f"names a template that is not in {file_media.name}"),
                    (numbers[:, 2] > 1, "has a label that is neither 0 nor 1"),
                ):
                    if bad.any():
                        at = int(np.argmax(bad))
                        raise IjbError(f"{file}, line {line + at}: {numbers[at].tolist()} {what}")
                firsts.append(pair[:, 0].astype(np.int32))
                seconds.append(pair[:, 1].astype(np.int32))
                sames.append(numbers[:, 2] == 1)
                line += len(numbers)
            if not block:
                break
    if not sames:
        raise IjbError(f"{file}: is empty")
    issame = np.concatenate(sames)
    if issame.all() or not issame.any():
        kind = "same" if issame.all() else "different"
        raise IjbError(
            f"{file}, lines 1 to {len(issame)}: all pairs are of one kind ({kind}); a verification "
            "needs both"
        )
    return np.concatenate(firsts), np.concatenate(seconds), issame


def _three_numbers(text: bytes, file: Path, first_line: int) -> NDArray[np.int64]:
    """int64 [lines, 3] of whole lines; an error names the line that has something else.

    All numbers of a block are made at once, a decimal place at a time: IJB-C's 15.7 million lines
    take seconds, where a loop over lines takes a minute.
    """
    digits = np.frombuffer(text, np.uint8) - np.uint8(ord("0"))  # others wrap around to 10 and more
    blank = np.frombuffer(text, np.uint8) <= 32
    starts = np.flatnonzero(~blank & np.concatenate(([True], blank[:-1])))
    ends = np.flatnonzero(~blank & np.concatenate((blank[1:], [True])))  # the last digit of each
    lengths = ends - starts + 1
    line_ends = np.flatnonzero(digits == np.uint8((ord("\n") - ord("0")) % 256))
    if text[-1:] != b"\n":
        line_ends = np.append(line_ends, len(text))
    per_line = np.diff(np.concatenate(([0], np.searchsorted(starts, line_ends))))
    is_plain = not ((digits > 9) & ~blank).any() and lengths.max(initial=0) < 19
    if not is_plain or (per_line != 3).any():
        for number, one in enumerate(text.decode("utf-8", "replace").split("\n"), first_line):
            columns = one.encode().split()  # bytes, because digits of other scripts are none here
            if len(columns) != 3 or not all(c.isdigit() and len(c) < 19 for c in columns):
                raise IjbError(
                    f"{file}, line {number}: expected two templates and 0 or 1, got {one[:100]!r}"
                )
        raise IjbError(f"{file}, from line {first_line}: characters that are no plain digits")
    numbers = np.zeros(len(ends), np.int64)
    for place in range(int(lengths.max())):
        has = lengths > place
        numbers[has] += digits[ends[has] - place].astype(np.int64) * 10**place
    return numbers.reshape(-1, 3)


def _read_identification(
    prefix: Path, target: str, template_ids: NDArray[np.int64], file_media: Path
) -> tuple[tuple[Gallery, ...], Gallery | None]:
    names = [*(f"gallery_{part}" for part in _GALLERIES[target]), "probe_mixed"]
    files = [Path(f"{prefix}_1N_{name}.csv") for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if len(missing) == len(files):
        return (), None
    if missing:
        raise IjbError(f"{prefix.parent}: identification needs {', '.join(missing)} too")
    *galleries, probe = (
        _read_gallery(file, name.split("_")[1], template_ids, file_media)
        for file, name in zip(files, names, strict=True)
    )
    return tuple(galleries), probe


def _read_gallery(
    file: Path, name: str, template_ids: NDArray[np.int64], file_media: Path
) -> Gallery:
    """Template and subject of every line after the header, a template once."""
    subject_of: dict[int, int] = {}
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            columns = [column.strip() for column in line.split(",")]
            if number == 1 or not line.strip():
                continue
            if len(columns) < 2 or not all(text.isdigit() for text in columns[:2]):
                raise IjbError(
                    f"{file}, line {number}: expected a template and a subject number first, got "
                    f"{line[:100]!r}"
                )
            template, subject = int(columns[0]), int(columns[1])
            if subject_of.setdefault(template, subject) != subject:
                raise IjbError(f"{file}, line {number}: template {template} is of two subjects")
            at = int(np.searchsorted(template_ids, template))
            if at == len(template_ids) or template_ids[at] != template:
                raise IjbError(
                    f"{file}, line {number}: template {template} is not in {file_media.name}"
                )
    if not subject_of:
        raise IjbError(f"{file}: is empty")
    templates = np.searchsorted(template_ids, np.array(list(subject_of)))
    return Gallery(name, templates, np.array(list(subject_of.values())))


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
    """Unit vectors [T, D] of the templates, from the embeddings [n, D] of the images.

    The images of one medium are averaged, the media of a template added, the sum normalised.

    Args:
        features: embeddings; with flip (F) the sum of image's and mirror image's.
        use_norm: keep the length of embeddings (N1); otherwise every image counts the same (N0).
        use_detector: weigh images by the detector's score (D1), or not (D0).

    A template whose sum is zero or not finite becomes NaN. Source: the published IJB scripts.
    """
    if features.ndim != 2 or len(features) != len(one.paths):
        raise ValueError(
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
        if (np.diff(images) == 1).all():  # as the files have it: no copy
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
    """Cosines [P] of unit vectors [T, D] at positions `first` and `second` [P].

    The lists of IJB compare most of some templates with most of others, so products are computed
    as blocks of a matrix and picked from it; where pairs are few among many templates, row by row.
    float64 for all but very large sets, which are float32.
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
    # Among 15 million pairs every array counts: a pair's place in the whole matrix grows out of its
    # row, in the same memory.
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
    """(the distinct positions, rising; where each of `count` is among them)."""
    is_used = np.zeros(count, np.bool_)
    is_used[positions] = True
    return np.flatnonzero(is_used), (np.cumsum(is_used) - 1).astype(np.int32)


def verification_report(
    scores: NDArray[np.floating],
    issame: NDArray[np.bool_],
    fars: Sequence[float] = DEFAULT_FARS,
) -> dict[str, Any]:
    """TAR at each FAR with what is behind it, and the AUC, as JSON has them."""
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
    """{gallery: rates}: each gallery by itself (open set), their mean, and both together.

    A probe whose subject is only in the other gallery is unmated. The published script searches
    both galleries as one, where everybody is found somewhere: that is `both`, ranks only.
    """
    assert one.probe is not None
    probes = templates[one.probe.templates]
    reports: dict[str, dict[str, Any]] = {}
    for gallery in one.galleries:
        found = search(
            probes, one.probe.subjects, templates[gallery.templates], gallery.subjects,
            device=device,
        )  # fmt: skip
        reports[gallery.name] = summarise(found)
    reports["mean"] = _mean_report(list(reports.values()))
    found = search(
        probes, one.probe.subjects,
        np.concatenate([templates[gallery.templates] for gallery in one.galleries]),
        np.concatenate([gallery.subjects for gallery in one.galleries]),
        device=device,
    )  # fmt: skip
    reports["both"] = summarise(found)
    return reports


def _mean_report(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates averaged, counts added."""
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
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.ijb", description="Evaluate models on IJB-B or IJB-C."
    )
    add_model_options(parser, several=True)
    add = parser.add_argument
    add("--root", type=Path, required=True, help="folder that holds meta/ and loose_crop/")
    add("--target", choices=tuple(_GALLERIES), required=True)
    add("--no-norm", action="store_true", help="N0: embeddings of length 1 before aggregation")
    add("--no-detector", action="store_true", help="D0: not weighed by the detector's score")
    add("--no-flip", action="store_true", help="F0: without the mirror image")
    add("--far", type=parse_rates, default=list(DEFAULT_FARS), help="default 1e-6, .., 1e-1")
    add("--groups", type=Path, help="CSV: template, then columns to group by")
    add(
        "--out", type=Path,
        help="folder for result.json, scores_<model>.npy, roc.pdf, roc.png (default TARGET_result)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    return run_command(lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> int:
    out: Path = options.out or Path(f"{options.target}_result")
    names = [model_name(path) for path in options.model]
    if len(set(names)) < len(names):
        raise ValueError(f"two models share the name {names}: give copies of other names")
    world = choose_world(options.device)
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
                    str(value): verification_report(
                        scores[values == value], one.issame[values == value], options.far
                    )
                    for value in np.unique(values)
                }
                for column, values in groups.items()
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
    model: Model, one: IjbSet, options: argparse.Namespace, world: World
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
    """One image without direction would make its template, and every metric, undefined."""
    for start in range(0, len(features), _ROWS_PER_BLOCK):
        block = features[start : start + _ROWS_PER_BLOCK]
        bad = np.flatnonzero(~np.isfinite(block).all(1) | ~block.any(1))
        if len(bad):
            at = start + int(bad[0])
            raise IjbError(
                f"{one.places[at]}: {name} gives {one.paths[at].name} an embedding that is zero or "
                "not finite; nothing was evaluated"
            )


def _groups_of_pairs(file: Path, one: IjbSet) -> dict[str, NDArray[np.str_]]:
    columns = Groups.read(file, ("template",)).of([str(i) for i in one.template_ids.tolist()])
    return {
        column: pair_groups(values[one.pair_first], values[one.pair_second])
        for column, values in columns.items()
    }


def format_reports(target: str, switches: dict[str, bool], reports: dict[str, Any]) -> str:
    """Tables: verification of every model and group, then identification."""
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
    """Scores and figures first, result.json last: where it is, all of it is."""
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
