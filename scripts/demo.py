"""`make demo`: makes images, trains, verifies and exports, in about five minutes on 2 cores.

It makes a set of images, trains configs/demo on 2 ranks (or on the GPUs of the machine), verifies
on identities that are not in training, exports to ONNX and compares, draws the curves, and ends
with one line of results.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from backbones import get_model
from backbones.weights import load_model
from eval.metrics import pair_distances, roc_curve
from eval.model import Embedder
from eval.plots import plot_roc, plot_training_curve
from eval.verification import embed_set, verify
from eval.verification_sets import VerificationSet, load_verification_set
from scripts.make_synthetic import make_synthetic
from utils.cli import cli_command
from utils.config import load_config

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path("demo_data")  # made anew each time; other folders are not replaced


@cli_command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns 0 if the whole job succeeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="where the images go")
    parser.add_argument("--output", type=Path, default=Path("work_dirs/demo"))
    parser.add_argument("--identities", type=int, default=300)
    parser.add_argument("--images-per-identity", type=int, default=14)
    parser.add_argument("--verification-pairs", type=int, default=800)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="key=value for the training")
    options = parser.parse_args(arguments)
    start = time.monotonic()

    make_synthetic(
        options.data,
        identities=options.identities,
        images_per_identity=options.images_per_identity,
        verification_pairs=options.verification_pairs,
        seed=options.seed,
        force=options.data == DATA,
    )
    words = [f"rec={options.data}", f"output={options.output}", *options.overrides]
    train(words)
    faces = load_verification_set(options.data / "synthetic.bin")
    untrained_accuracy, untrained_roc = score_untrained(words, faces)
    trained, _ = load_model(options.output)
    trained_accuracy = last_accuracy(options.output / "metrics.jsonl")
    run_module("torch2onnx", str(options.output))
    curve = plot_training_curve(
        options.output / "metrics.jsonl", options.output / "training_curve.png"
    )
    roc = plot_roc(
        {"trained": roc_of(Embedder(trained), faces), "untrained": untrained_roc},
        options.output / "roc.png",
        title="Generated images, identities not in training",
    )
    print(
        f"demo: accuracy {trained_accuracy:.4f} on unseen identities (untrained network "
        f"{untrained_accuracy:.4f}) in {time.monotonic() - start:.0f} s; everything is in "
        f"{options.output}: model.pt, model.onnx, {curve.name}, {roc.name}, training.log, "
        f"metrics.jsonl; the images are in {options.data}"
    )
    return 0


def train(words: Sequence[str]) -> None:
    """Runs train_v2.py on 2 CPU ranks, or on one or two GPUs if there are any."""
    ranks = min(torch.cuda.device_count(), 2) if torch.cuda.is_available() else 2
    run_module(
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        "train_v2.py",
        "configs/demo",
        *words,
    )


def run_module(module: str, *arguments: str) -> None:
    """Runs a Python module as a process in the repository and raises if it fails."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run(
        [sys.executable, "-m", module, *arguments], check=True, cwd=REPOSITORY, env=environment
    )


def score_untrained(
    words: Sequence[str], faces: VerificationSet
) -> tuple[float, tuple[list[float], list[float]]]:
    """Returns flip accuracy and ROC of the network from which the training started."""
    cfg = load_config(REPOSITORY / "configs/demo", words)
    torch.manual_seed(cfg.seed)
    embedder = Embedder(get_model(cfg.network, num_features=cfg.embedding_size))
    accuracy = verify(embedder, [faces])[faces.name]["accuracy_flip"]
    return accuracy, roc_of(embedder, faces)


def roc_of(embedder: Embedder, faces: VerificationSet) -> tuple[list[float], list[float]]:
    """Returns (FAR, TAR) of the flip embeddings' scores."""
    plain, flipped = embed_set(embedder, faces)
    curve = roc_curve(-pair_distances(plain + flipped), faces.issame)
    return list(curve.far), list(curve.tar)


def last_accuracy(metrics: Path) -> float:
    """Returns the flip accuracy of the last verification in a run's metrics.jsonl."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    last = [record["eval"] for record in records if "eval" in record][-1]
    return next(iter(last.values()))["accuracy_flip"]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
