"""MFR: checks and packs a submission, or runs the protocol on images of one's own.

    python -m eval.mfr check work_dirs/ms1mv3_r50 --track ms1m
    python -m eval.mfr pack work_dirs/ms1mv3_r50 submission.zip
    python -m eval.mfr run --model work_dirs/ms1mv3_r50 --data FOLDER --groups groups.csv

The protocol compares every image with every other one and computes TAR at FAR 1e-6 over all pairs,
for each group (race, age) separately, and between the two values of a column that has two (masked,
unmasked).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.all_pairs import BLOCK, AllPairs, all_pairs
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
from eval.extract import FileImages, Progress, embed_images
from eval.groups import Groups
from eval.identification import list_images
from eval.metrics import rate_name
from eval.model import open_model
from eval.onnx_model import metadata_of
from eval.submission import Report, check_submission, find_track
from utils.errors import UserError
from utils.files import atomic_write

DEFAULT_FARS = (1e-6, 1e-5, 1e-4, 1e-3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; exit code 0, 1 (the submission breaks a rule) or 2 (wrong input)."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.mfr", description="MFR submissions, and its protocol on own images."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="whether a folder keeps the submission rules")
    check.add_argument("folder", type=Path, help="holds one .onnx; nothing is written into it")
    pack = commands.add_parser("pack", help="export a run, check it, and zip it")
    pack.add_argument("run", type=Path, help="output folder of a run, or a model.pt")
    pack.add_argument("zip", type=Path, metavar="OUT.zip")
    pack.add_argument("--network", help="architecture, for a model.pt that does not say")
    pack.add_argument("--track", help="default: ms1m, or glint for embeddings wider than 512")
    check.add_argument("--track", required=True, help="ms1m.., glint.., cfat.., unconstrained..")
    for one in (check, pack):
        one.add_argument("--enforce-time", action="store_true", help="fail if it is too slow here")
        one.add_argument("--json", type=Path, help="write the report there")
    run = commands.add_parser("run", help="the all-to-all protocol on a folder of images")
    add_model_options(run)
    run.add_argument("--data", type=Path, required=True, help="DIR/<identity>/*, or <identity>_*")
    run.add_argument("--groups", type=Path, help="CSV: name (path in DIR), columns to group by")
    run.add_argument("--far", type=parse_rates, default=list(DEFAULT_FARS), help="default 1e-6, ..")
    run.add_argument("--flip", action="store_true", help="add the mirror image's embedding")
    run.add_argument("--resize", action="store_true", help="resize images of another size")
    run.add_argument("--json", type=Path, help="write the metrics there (NaN as null)")
    options = parser.parse_args(arguments)
    work = {"check": _check, "pack": _pack, "run": _run}[options.command]
    return run_command(lambda: work(options))


# --------------------------------------------------------------------------------------------
# Submissions
# --------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> int:
    check_outputs({"--json": options.json})
    if options.json and options.folder.resolve() in options.json.resolve().parents:
        raise UserError(f"--json {options.json}: nothing is written into the folder checked")
    return _say(check_submission(options.folder, options.track, options.enforce_time), options.json)


def _say(report: Report, json_file: Path | None) -> int:
    print(report)
    if json_file:
        write_json(report.as_json(), json_file)
    return 0 if report.passed else 1


def _pack(options: argparse.Namespace) -> int:
    if options.track:
        find_track(options.track)
    check_outputs({"OUT.zip": options.zip, "--json": options.json})
    facts = open_model(options.run, network=options.network).facts
    if facts["color"] != "RGB":
        raise UserError(f"{options.run} takes {facts['color']}; the checker feeds RGB")
    with tempfile.TemporaryDirectory(prefix="submission.") as name:
        folder = Path(name)
        export = [sys.executable, str(Path(__file__).resolve().parent.parent / "torch2onnx.py")]
        export += [str(options.run), "--output", str(folder / "model.onnx")]
        if options.network:
            export += ["--network", options.network]
        if (facts["mean"], facts["std"]) != (127.5, 127.5):
            export.append("--fold-normalization")  # else the checker normalizes with 127.5, 127.5
        exported = subprocess.run(export, capture_output=True, text=True)
        if exported.returncode:
            raise UserError(f"the export failed: {exported.stderr.strip()[-500:]}")
        track = options.track
        if track is None:
            said = metadata_of(folder / "model.onnx")
            track = "ms1m" if int(said["embedding_size"]) <= 512 else "glint"
        report = check_submission(folder, track, options.enforce_time)
        report.folder = str(options.run)
        code = _say(report, options.json)
        if code:
            print(f"error: {options.zip} was not written", file=sys.stderr)
            return code
        with (
            atomic_write(options.zip) as packed,
            zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for file in sorted(folder.glob("model.onnx*")):
                archive.write(file, file.name)
    print(f"{options.zip}: {options.zip.stat().st_size / 1024**2:.1f} MiB")
    return 0


# --------------------------------------------------------------------------------------------
# The protocol
# --------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    check_outputs({"--json": options.json})
    world = choose_dist_context(options.device)
    images = list_images(options.data)
    groups = Groups.read(options.groups, ("name",)).of(images.names) if options.groups else {}
    (model,) = open_models(options, world)
    features = embed_images(
        model.embed,
        FileImages(images.paths, model.input_size, options.resize),
        name=str(options.data),
        flip=options.flip,
        sum_flip=True,
        rank=world.rank,
        world_size=world.world_size,
        batch_size=options.batch_size,
        input_size=model.input_size,
        cache=cache_of(options, model),
        show_progress=world.is_main,
    )
    if not world.is_main:
        return 0
    bad = np.flatnonzero(~np.isfinite(features).all(1) | ~features.any(1))
    if len(bad):
        raise UserError(
            f"{images.paths[bad[0]]} (and {len(bad) - 1} more): its embedding is zero or not finite"
        )
    people = np.unique(images.identities, return_inverse=True)[1]
    results = evaluate_groups(features, people, groups, options.far, device=world.device)
    print(format_results(results))
    if options.json:
        content = {name: [asdict(one) for one in found] for name, found in results.items()}
        write_json(
            {
                "images": len(people),
                "people": int(people.max()) + 1,
                "flip": options.flip,
                "model": model.facts,
                "groups": content,
            },
            options.json,
        )
    return 0


def evaluate_groups(
    features: NDArray[np.floating],
    people: NDArray[np.integer],
    groups: dict[str, NDArray[np.str_]],
    fars: Sequence[float],
    *,
    device: Any = "cpu",
    show_progress: bool = True,
) -> dict[str, list[AllPairs]]:
    """Runs the protocol on all images and on each group.

    Args:
        features: [N, D] embeddings.
        people: [N] identities.
        groups: {column: value [N]}.
        fars: Target FARs in [0, 1].
        device: Device of the products.
        show_progress: Whether progress is shown on stderr.

    Returns:
        {group: result per FAR}, with the groups "all", "column=value", and "column=a against b" for
        a column of two values.
    """
    jobs: dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_] | None]] = {
        "all": (np.ones(len(people), np.bool_), None)
    }
    for column, values in groups.items():
        found = np.unique(values)
        for value in found:
            jobs[f"{column}={value}"] = values == value, None
        if len(found) == 2:
            first, second = found
            jobs[f"{column}={first} against {second}"] = values == first, values == second
    results = {}
    for name, (members, others) in jobs.items():
        count = int(np.count_nonzero(members))
        total = count * (count + BLOCK) // 2
        if others is not None:
            total = count * int(np.count_nonzero(others))
        progress = Progress(total, f"comparing {name}", show_progress, unit="scores")
        try:
            results[name] = all_pairs(
                features[members],
                people[members],
                fars,
                against=None if others is None else (features[others], people[others]),
                device=device,
                on_block=progress.add,
            )
        finally:
            progress.close()
    return results


def format_results(results: dict[str, list[AllPairs]]) -> str:
    """Formats a table, one line per group."""
    fars = [rate_name(one.far) for one in next(iter(results.values()))]
    rows = [["all to all", "genuine", "impostors", *(f"TAR@{far}" for far in fars)]]
    for name, found in results.items():
        counts = [f"{found[0].num_genuine:,}", f"{found[0].num_impostors:,}"]
        rows.append([name, *counts, *(f"{one.tar:.6f}" for one in found)])
    return table(rows)


if __name__ == "__main__":
    sys.exit(main())
