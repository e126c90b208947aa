"""Do two faces show the same person?

    python scripts/compare.py A.jpg B.jpg --model work_dirs/ms1mv3_r50
    python scripts/compare.py A.jpg B.jpg --model M --evaluation result.json --far 1e-3

The command prints the cosine of the two (image and mirror image summed, as in the evaluation). With
the JSON file of `eval.verification` it also prints the decision at the threshold that kept that FAR
there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.cli import add_model_options, cache_of, choose_dist_context, open_models, run_command
from eval.extract import FileImages, embed_images
from utils.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    parser = argparse.ArgumentParser(prog="compare.py", description="Compare two aligned faces.")
    parser.add_argument("images", nargs=2, type=Path, metavar="IMAGE")
    add_model_options(parser)
    parser.add_argument("--resize", action="store_true", help="resize images of another size")
    parser.add_argument("--evaluation", type=Path, help="JSON of eval.verification of this model")
    parser.add_argument("--far", type=float, default=1e-3, help="false accept rate (default 1e-3)")
    parser.add_argument("--set", help="which set of the evaluation, if it has several")
    options = parser.parse_args(arguments)
    return run_command(lambda: _compare(options))


def _compare(options: argparse.Namespace) -> int:
    evaluation = _read(options.evaluation) if options.evaluation else None
    world = choose_dist_context(options.device)
    (model,) = open_models(options, world)
    threshold = None
    if evaluation is not None:
        if evaluation.get("model", {}).get("key") != model.key:
            raise UserError(
                f"{options.evaluation} is of another model or other preprocessing; its thresholds "
                "say nothing about this one. Evaluate this one: python -m eval.verification --json"
            )
        threshold = find_threshold(evaluation, options.far, options.set, str(options.evaluation))
    rows = embed_images(
        model.embed,
        FileImages(options.images, model.input_size, options.resize),
        sum_flip=True,
        batch_size=options.batch_size,
        input_size=model.input_size,
        cache=cache_of(options, model),
    ).astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1)
    for path, length in zip(options.images, lengths, strict=True):
        if not (np.isfinite(length) and length > 0):
            raise UserError(f"{path}: its embedding is zero or not finite")
    cosine = float(rows[0] @ rows[1] / lengths.prod())
    print(f"cosine {cosine:.4f}")
    if threshold is not None:
        name, at = threshold
        same = cosine >= at["threshold_cosine"]
        print(
            f"{'same person' if same else 'different people'} at FAR {at['far']:g}: the threshold "
            f"is {at['threshold_cosine']:.4f}, with {at['false_accepts']} false accepts among "
            f"{at['num_impostors']} impostors of {name}"
        )
    return 0


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a JSON file that can be read ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{file}: not written by eval.verification --json")
    return content


def find_threshold(
    evaluation: dict[str, Any], far: float, name: str | None, where: str
) -> tuple[str, dict[str, Any]]:
    """Returns the set and the entry of its `tar_at_far` for a FAR that was evaluated.

    Args:
        evaluation: Content of the JSON file.
        far: The FAR.
        name: Name of the set; None if there is only one.
        where: Name of the file in errors.

    Raises:
        UserError: There is no such set or FAR, or no threshold for it.
    """
    sets = {
        key: value
        for key, value in evaluation.items()
        if isinstance(value, dict) and "tar_at_far" in value
    }
    if name is None and len(sets) == 1:
        (name,) = sets
    if name not in sets:
        raise UserError(f"{where} has the sets {', '.join(sets) or 'none'}; pass --set")
    entries = sets[name]["tar_at_far"]
    for entry in entries:
        if entry["far"] == far:
            if entry["threshold_cosine"] is None:
                raise UserError(f"{where}: on {name} no threshold accepts anything at {far}")
            return name, entry
    known = ", ".join(f"{entry['far']:g}" for entry in entries)
    raise UserError(f"{where}: FAR {far:g} was not evaluated on {name}; there are {known}")


if __name__ == "__main__":
    sys.exit(main())
