"""The real first run: faces of LFW, people not in training, as a user would start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def train(output: Path, ranks: int, *words: str) -> float:
    """Flip accuracy at the end of configs/lfw_nano."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["train_v2.py", "configs/lfw_nano", "val_targets=[lfw_part]", f"output={output}"]
    environment = {"OMP_NUM_THREADS": str(max(1, 2 // ranks)), **os.environ}
    subprocess.run([*command, *words], check=True, cwd=REPOSITORY, env=environment)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [r["eval"]["lfw_part"]["accuracy_flip"] for r in records if "eval" in r][-1]


@pytest.mark.slow
def test_two_ranks_on_records_reach_84_percent_on_unseen_people(shared_dir, tmp_path):
    faces = shared_dir / "data/lfw112"
    packing = [sys.executable, "scripts/pack.py", str(faces / "train"), str(tmp_path / "set")]
    subprocess.run(packing, check=True, cwd=REPOSITORY)
    words = [f"rec={tmp_path / 'set'}", f"val_dir={faces}"]
    assert train(tmp_path / "run", 2, *words) >= 0.84


@pytest.mark.slow
def test_one_process_on_the_image_folder_reaches_84_percent_on_unseen_people(shared_dir, tmp_path):
    faces = shared_dir / "data/lfw112"
    words = [f"rec={faces / 'train'}", f"val_dir={faces}"]
    assert train(tmp_path / "run", 1, *words) >= 0.84
