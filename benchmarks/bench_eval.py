"""What evaluation costs after the embeddings are computed, against the usual code.

    python -m benchmarks.bench_eval [--quick] [--only ijb|pairs] [--json FILE] [--markdown FILE]

IJB at a tenth and at the full size of IJB-C (469,375 images, 23,124 templates, 15,658,489 pairs;
random features of 512 numbers): aggregation, pair scores, TAR at six FARs. The baseline is the
published scripts' method, written here: float32, template by template, blocks of 100,000 pairs,
scikit-learn's ROC read at the nearest point. Then the all-to-all protocol is compared with the
matmul of the upper triangle alone, and with a dense computation. Each row runs in a separate
process, in turn, with medians of the repeats. Peak memory is above what the process held before its
inputs were made, inputs included.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.runs import in_a_process
from eval.all_pairs import BLOCK, all_pairs
from eval.ijb import DEFAULT_FARS, pair_scores, template_features
from eval.ijb_files import IjbSet
from eval.metrics import tars_at_fars

WIDTH = 512
FULL = {"images": 469_375, "templates": 23_124, "gallery": 3_531, "pairs": 15_658_489}
SAME = 19_557  # number of IJB-C's same pairs
REPEATS = 3  # the slowest rows run once
STEPS = ("templates", "pair scores", "TAR at FAR")


def make_set(share: float) -> tuple[np.ndarray, IjbSet]:
    """Makes features [n, 512] float32 and a random set with `share` of IJB-C's sizes.

    As in IJB-C, pairs are of some templates (the gallery's) with the others; here in random order.
    """
    images, templates, gallery, pairs = (round(count * share) for count in FULL.values())
    random = np.random.default_rng(0)
    features = random.standard_normal((images, WIDTH), dtype=np.float32)
    row_template = np.sort(
        np.concatenate([np.arange(templates), random.integers(0, templates, images - templates)])
    )
    row_media = np.arange(images) // 3  # a frame of three belongs to one medium
    first = random.integers(0, gallery, pairs).astype(np.int32)
    second = random.integers(gallery, templates, pairs).astype(np.int32)
    one = IjbSet(
        "IJBC",
        [Path()] * images,
        [""] * images,
        np.empty((0, 5, 2)),
        random.uniform(0.5, 1, images).astype(np.float32),
        np.arange(templates),
        np.arange(images),
        row_template,
        row_media,
        first,
        second,
        np.arange(pairs) % (pairs // round(SAME * share)) == 0,
    )
    return features, one


def run_ours(features: np.ndarray, one: IjbSet) -> tuple[list[float], list[float]]:
    """Runs our functions; returns the seconds of each step, and the TARs."""
    clock = [time.perf_counter()]
    templates = template_features(features, one)
    clock.append(time.perf_counter())
    scores = pair_scores(templates, one.pair_first, one.pair_second)
    clock.append(time.perf_counter())
    tars = [at.tar for at in tars_at_fars(scores, one.issame, DEFAULT_FARS)]
    clock.append(time.perf_counter())
    return np.diff(clock).tolist(), tars


def run_loops(features: np.ndarray, one: IjbSet) -> tuple[list[float], list[float]]:
    """Runs the published scripts' method; returns the same as `run_ours`."""
    from sklearn.metrics import roc_curve

    clock = [time.perf_counter()]
    weighted = features * one.faceness[:, None]
    templates = np.zeros((len(one.template_ids), features.shape[1]), np.float32)
    for position in range(len(templates)):
        (members,) = np.where(one.row_template == position)
        faces, media = weighted[members], one.row_media[members]
        parts = []
        for medium, count in zip(*np.unique(media, return_counts=True), strict=True):
            (own,) = np.where(media == medium)
            parts.append(faces[own] if count == 1 else faces[own].mean(0, keepdims=True))
        templates[position] = np.concatenate(parts).sum(0)
    templates /= np.sqrt((templates**2).sum(-1, keepdims=True))
    clock.append(time.perf_counter())
    scores = np.zeros(len(one.pair_first))
    for start in range(0, len(scores), 100_000):
        block = slice(start, start + 100_000)
        left, right = templates[one.pair_first[block]], templates[one.pair_second[block]]
        scores[block] = np.sum(left * right, -1)
    clock.append(time.perf_counter())
    far, tar, _ = roc_curve(one.issame, scores)
    far, tar = far[::-1], tar[::-1]
    tars = [float(tar[np.argmin(np.abs(far - target))]) for target in DEFAULT_FARS]
    clock.append(time.perf_counter())
    return np.diff(clock).tolist(), tars


def measure_ijb(how: str, share: float, repeats: int) -> tuple[list[float], float]:
    """Returns medians of the steps' seconds, and peak MiB; runs in a separate process."""
    before = _peak_mib()
    features, one = make_set(share)
    run = run_ours if how == "ours" else run_loops
    times = [run(features, one)[0] for _ in range(repeats)]
    seconds = [statistics.median(column) for column in zip(*times, strict=True)]
    return seconds, _peak_mib() - before


def measure_all_pairs(how: str, count: int, repeats: int) -> tuple[list[float], float]:
    """Returns seconds and peak MiB of the protocol, of the matmul alone, or of the dense method."""
    before = _peak_mib()
    random = np.random.default_rng(0)
    people = random.integers(0, count // 10, count)
    rows = random.standard_normal((count // 10, WIDTH), dtype=np.float32)[people]
    for start in range(0, count, BLOCK):  # noise a block at a time: no second copy in the peak
        part = rows[start : start + BLOCK]
        part += 1.5 * random.standard_normal(part.shape, dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    work: dict[str, Callable[[], object]] = {
        "matmul": lambda: _upper_triangle(torch.from_numpy(rows)),
        "ours": lambda: all_pairs(rows, people, DEFAULT_FARS),
        "dense": lambda: _dense(rows, people),
    }
    times = []
    for _ in range(repeats):
        start_time = time.perf_counter()
        work[how]()
        times.append(time.perf_counter() - start_time)
    return [statistics.median(times)], _peak_mib() - before


def _upper_triangle(rows: torch.Tensor) -> None:
    """Computes the products of every pair, in blocks, and nothing else."""
    buffer = torch.empty(BLOCK * BLOCK)
    for top in range(0, len(rows), BLOCK):
        for left in range(top, len(rows), BLOCK):
            own, other = rows[top : top + BLOCK], rows[left : left + BLOCK]
            out = buffer[: len(own) * len(other)].view(len(own), len(other))
            torch.mm(own, other.T, out=out)


def _dense(rows: np.ndarray, people: np.ndarray) -> None:
    """Computes the whole matrix, its upper triangle, and the metrics over it."""
    scores = (torch.from_numpy(rows) @ torch.from_numpy(rows).T).numpy()
    upper = np.triu_indices(len(rows), 1)
    tars_at_fars(scores[upper], people[upper[0]] == people[upper[1]], DEFAULT_FARS)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _compare_ijb(share: float, lines: list[str], rows: list[dict[str, Any]]) -> None:
    """Compares loops and ours at a share of IJB-C's size: adds a table, and rows for JSON."""
    lines += [
        "",
        f"| IJB, {share:g} of IJB-C | templates s | pair scores s | TAR s | sum s | faster "
        "| peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    print(lines[-2], flush=True)
    baseline = 0.0
    for how in ("loops", "ours"):
        repeats = REPEATS if how == "ours" or share < 1 else 1
        seconds, peak = in_a_process(measure_ijb, how, share, repeats)
        total = sum(seconds)
        baseline = total if how == "loops" else baseline
        steps = " | ".join(f"{one:.2f}" for one in seconds)
        lines.append(f"| {how} | {steps} | {total:.2f} | {baseline / total:.1f} | {peak:.0f} |")
        print(lines[-1], flush=True)
        rows.append(
            {
                "name": f"ijb {how}",
                "params": {"share": share, "width": WIDTH},
                "median_ms": total * 1e3,
                "peak_mib": peak,
                "ratio_to_baseline": total / baseline,
                "steps_ms": {s: t * 1e3 for s, t in zip(STEPS, seconds, strict=True)},
            }
        )


def _compare_all_pairs(count: int, lines: list[str], rows: list[dict[str, Any]]) -> None:
    """Compares the matmul alone, the protocol and, if it fits, the dense method in the same way."""
    lines += ["", f"| all pairs of {count:,} | s | of the matmul | peak MiB |", "|---|---|---|---|"]
    print(lines[-2], flush=True)
    baseline = 0.0
    for how in ("matmul", "ours", "dense") if count <= 10_000 else ("matmul", "ours"):
        repeats = REPEATS if count <= 20_000 else 1
        (total,), peak = in_a_process(measure_all_pairs, how, count, repeats)
        baseline = total if how == "matmul" else baseline
        lines.append(f"| {how} | {total:.2f} | {total / baseline:.2f} | {peak:.0f} |")
        print(lines[-1], flush=True)
        rows.append(
            {
                "name": f"all pairs {how}",
                "params": {"images": count, "width": WIDTH},
                "median_ms": total * 1e3,
                "peak_mib": peak,
                "ratio_to_baseline": total / baseline,
            }
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; prints tables, and writes rows as JSON and the report on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth only; about a minute")
    parser.add_argument("--only", choices=("ijb", "pairs"), help="one half of it")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the report here")
    options = parser.parse_args(arguments)
    lines = [
        f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, numpy {np.__version__}, medians of {REPEATS}",
    ]
    rows: list[dict[str, Any]] = []
    if options.only != "pairs":
        for share in (0.1,) if options.quick else (0.1, 1.0):
            _compare_ijb(share, lines, rows)
    if options.only != "ijb":
        for count in (10_000, 20_000) if options.quick else (10_000, 20_000, 100_000):
            _compare_all_pairs(count, lines, rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
