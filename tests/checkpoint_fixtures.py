"""Makes tests/fixtures/checkpoints.tar.xz: checkpoints that every later version must resume.

    python -m tests.checkpoint_fixtures ARCHIVE

The committed archive was made by commit 05dddeb, the last before the head moved to arcshard/, with
torch 2.13.0. It is not made again: a version that cannot resume from it would lose the runs of its
users.

Each run has 160 classes, a backbone of two channels and fp64 weights, stops after 4 steps with a
checkpoint, and goes on to step 8; expected.json holds the losses of all 8 steps and the SHA-256
sums of the global class centers and their state after step 4.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import sys
import tarfile
import tempfile
import unittest.mock
from pathlib import Path
from typing import Any

import torch

from backbones import iresnet
from configs.base import Config
from tests.conftest import Ranks
from train_v2 import run_on
from training.state import Progress, RunState
from utils.distributed import DistContext

ARCHIVE = Path(__file__).parent / "fixtures" / "checkpoints.tar.xz"
SETTINGS: dict[str, Any] = {
    "rec": "synthetic",
    "num_classes": 160,
    "num_image": 96,
    "network": "r_fixture",
    "embedding_size": 8,
    "input_size": 32,
    "num_epoch": 2,
    "frequent": 1,
    "verbose": 0,
    "num_workers": 1,
    "scale": 16.0,
    "margin_list": (1.0, 0.0, 0.2),
    "device": "cpu",
    "precision": "fp64",
    "freeze_batch_norm": True,
    "checkpoint_every": 4,
    "keep_checkpoints": 9,
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.05},
    "adamw": {"optimizer": "adamw", "lr": 1e-3},
}
CASES = list(itertools.product(OPTIMIZERS, (1, 2), (1, 3)))  # optimizer, centers per class, ranks
GLOBAL_BATCH, SAVED_STEP, LAST_STEP = 12, 4, 8


def name_of(optimizer: str, centers: int, ranks: int) -> str:
    """Of the folder of a case."""
    return f"{optimizer}_{centers}_centers_{ranks}_ranks"


def train(
    rank: int, world_size: int, folder: str, optimizer: str, centers: int, changes: dict[str, Any]
) -> dict[str, Any]:
    """A run in this process: its losses by step, and this rank's rows of the head and its state.

    Returns:
        "losses" by step on rank 0; "rows" at the end; "loaded": rows as a checkpoint gave them.
    """
    cfg = Config(
        **{
            **SETTINGS,
            **OPTIMIZERS[optimizer],
            "sub_centers": centers,
            "output": folder,
            "batch_size": GLOBAL_BATCH // world_size,
            **changes,
        }
    )
    assert not cfg.problems()
    Path(folder).mkdir(parents=True, exist_ok=True)
    world = DistContext(rank, rank, world_size, torch.device("cpu"))
    loaded: list[torch.Tensor] = []
    load = RunState.load

    def load_and_look(state: RunState, *arguments: Any) -> Progress:
        progress = load(state, *arguments)
        loaded.extend(rows_of(state.parts.head))
        return progress

    tiny = {"r_fixture": (iresnet.IResNet, {"layers": (1, 1, 1, 1), "width": 2})}
    with (
        unittest.mock.patch.dict("backbones._REGISTRY", tiny),
        unittest.mock.patch.object(RunState, "load", load_and_look),
    ):
        parts = run_on(cfg, world, Path(folder))
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines() if rank == 0 else []
    losses = {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}
    return {"losses": losses, "rows": rows_of(parts.head), "loaded": loaded}


def rows_of(head: Any) -> list[torch.Tensor]:
    """Copies of this rank's class centers and of each optimizer state."""
    rows = [head.weight.detach()]
    for parameter, rule in head.optimized_parameters():
        rows += [value for _, value in sorted(rule.state(parameter).items())]
    return [value.clone() for value in rows]


def sums(rows_by_rank: list[list[torch.Tensor]]) -> list[str]:
    """SHA-256 of the rows of all ranks together: class centers, then each optimizer state."""
    joined = (torch.cat(parts) for parts in zip(*rows_by_rank, strict=True))
    return [hashlib.sha256(whole.numpy().tobytes()).hexdigest() for whole in joined]


def _without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def main() -> None:
    """Write every case into an archive."""
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary, "archive")
        pool = Ranks(Path(temporary))
        for optimizer, centers, ranks in CASES:
            name = name_of(optimizer, centers, ranks)
            run = str(Path(temporary, name))
            arguments = (run, optimizer, centers)
            saved = pool.run(ranks, train, *arguments, {"max_steps": SAVED_STEP})
            shutil.copytree(
                Path(run, "checkpoints", f"step_{SAVED_STEP:08}"), target / name / "checkpoint"
            )
            changes = {"max_steps": LAST_STEP, "resume": "auto"}
            losses = pool.run(ranks, train, *arguments, changes)[0]["losses"]
            expected = {"losses": losses, "sha256": sums([one["rows"] for one in saved])}
            (target / name / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
        pool.stop()
        with tarfile.open(sys.argv[1], "x:xz") as archive:
            for path in sorted(target.iterdir()):
                archive.add(path, path.name, filter=_without_owner)


if __name__ == "__main__":
    main()
