"""A training step keeps to its device and never asks it for a number, for every option.

On an accelerator in name only (tests/fake_accelerator.py): no GPU is needed, and no arithmetic is
proved. `make gpu-check` has the same steps on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16", "gradient_acc": 2},
    "sampled": {"sample_rate": 0.1},
    "sampled, centers in host memory": {"sample_rate": 0.1, "head_offload": True},
    "autograd": {"head_update": "autograd", "clip_grad_norm": 0.0},
    "adamw, bf16 centers": {
        "optimizer": "adamw",
        "head_weight_dtype": "bf16",
        "head_state_dtype": "bf16",
    },
    "adaface": {"loss": "adaface", "gradient_acc": 2},
    "curricularface": {"loss": "curricularface"},
    "magface": {"loss": "magface", "sub_centers": 2},
    "elasticface": {"loss": "elasticface_arc"},
    "softmax": {"loss": "softmax", "softmax_bias": True},
    "filtering": {"interclass_filtering_threshold": 0.2},
    "serious": {"ema_decay": 0.9, "layer_decay": 0.8, "decay_norms_and_biases": False},
    "frozen": {"freeze_epoch": 1, "is_frozen": True},
    "statistics": {"freeze_batch_norm": True, "dropout": 0.2, "gradient_checkpointing": True},
    "vit": {"network": "vit_t", "mask_ratio": 0.1, "drop_path_rate": 0.1, "precision": "bf16"},
    "mbf": {"network": "mbf"},
    "teacher, cosine": {"teacher": True},
    "teacher, logits": {"teacher": True, "distillation": "logits", "precision": "bf16"},
}
DEFECTS = {
    "waits": ({"defect": "waits"}, "DataDependentOutputException"),
    "mixes": ({"defect": "mixes"}, "device"),
}


@pytest.fixture(scope="module")
def errors() -> dict[str, str | None]:
    cases = CASES | {name: changes for name, (changes, _) in DEFECTS.items()}
    result = subprocess.run(
        [sys.executable, "-m", "tests.fake_accelerator", json.dumps(cases)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, str | None] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_step_mixes_no_devices_and_asks_for_no_number(errors, case):
    assert errors[case] is None, errors[case]


@pytest.mark.parametrize("case", DEFECTS)
def test_a_step_that_would_is_found(errors, case):
    assert DEFECTS[case][1] in (errors[case] or "")
