"""`make gpu-check`: what a GPU must get right; says so and exits 0 where there is none.

    1. the head on the GPU equals the head on the CPU, for every loss: loss, gradient, centres;
    2. a step waits for the device nowhere (CUDA's sync debug mode raises);
    3. fp32, tf32, bf16 and fp16 runs of train_v2.py end with a finite, falling loss.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from backbones import get_model
from backbones.weights import ModelMetadata, save_model
from configs.base import Config
from dataset import get_dataloader
from head.row_update import AdamWRows, SGDRows
from losses import (
    AdaFace,
    ArcFace,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    Margin,
    NormFace,
    Softmax,
)
from partial_fc import PartialFC
from training.build import build
from utils.distributed import World

REPOSITORY = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, Any] = {
    "rec": "synthetic", "num_classes": 5000, "num_image": 6400, "network": "r_nano",
    "embedding_size": 64, "batch_size": 64, "num_epoch": 1, "lr": 0.05, "verbose": 0,
    "frequent": 10, "warmup_epoch": 0.2,
}  # fmt: skip


LOSSES = (
    (ArcFace(), 1), (NormFace(96.0), 1), (Softmax(bias=True), 1), (AdaFace(), 1), (MagFace(), 1),
    (CurricularFace(), 1), (ElasticFace(plus=True), 1), (ArcFace(), 3),
    (CosFace(interclass_filtering_threshold=0.1), 1),
)  # fmt: skip


def head_equals_cpu(
    margin: Margin, tolerance: float, half: torch.dtype | None = None, **options: Any
) -> None:
    """Loss, gradient and moved class centres after 3 steps of one head on both devices.

    half: of the GPU's products; the CPU, which rounds their sums too, works in fp32, and the
    centres move by SGD: AdamW's first steps are of one size whatever the gradient's, so that
    roundings of small gradients would be a tenth of the centres.
    """
    results = []
    for device in ("cpu", "cuda"):
        rule = AdamWRows() if half is None else SGDRows()
        head = PartialFC(
            margin, 64, 5001, row_update=rule, device=device, buffer_mib=4,
            half=half if device == "cuda" else None, **options,
        )  # fmt: skip
        seen = []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            embeddings = torch.randn(32, 64, generator=generator).to(device).requires_grad_(True)
            labels = torch.randint(5001, (32,), generator=generator).to(device)
            loss = head(embeddings, labels, 0.01 if step else None)
            loss.backward()
            head.step(0.01)
            assert embeddings.grad is not None
            seen += [loss.detach().cpu(), embeddings.grad.cpu()]
        results.append([*seen, head.weight.detach().cpu()])
    for cpu, gpu in zip(*results, strict=True):
        error = float((cpu - gpu).norm() / cpu.norm())
        assert error < tolerance, f"{margin}, {half}, {options}: GPU and CPU differ by {error:.2e}"


def step_does_not_wait(**changes: Any) -> None:
    """A step under CUDA's sync debug mode, from the loader's own batches, after a warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = Config(**{**SETTINGS, "output": folder, **changes})
        parts = build(cfg, World(0, 0, 1, torch.device("cuda", 0)))
    batches = iter(parts.loader)
    parts.step.model.train()
    for number in range(4):
        group = list(islice(batches, cfg.gradient_acc))
        if number == 3:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            parts.step(group, 0.01)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def batches_arrive_whole() -> None:
    """Batches copied one ahead to the GPU are those of the host, while the GPU is kept busy."""
    device = torch.device("cuda", 0)
    options: dict[str, Any] = {"num_classes": 10, "num_images": 512, "input_size": 112}
    host = get_dataloader("synthetic", 16, **options)
    there = get_dataloader("synthetic", 16, pin_memory=True, device=device, **options)
    busy = torch.randn(4096, 4096, device=device)
    for expected, batch in zip(host, there, strict=True):
        busy = (busy @ busy).clamp(-1, 1)
        assert batch.images.device == device
        assert torch.equal(batch.images.cpu(), expected.images)
        assert torch.equal(batch.labels.cpu(), expected.labels)


def run_trains(precision: str) -> None:
    """train_v2.py as a process; the loss is finite and falls."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "gpu_check.py"
        config.write_text(f"config = {SETTINGS!r}\n")
        words = [f"output={folder}/run", f"precision={precision}", "device=cuda"]
        subprocess.run(
            [sys.executable, "train_v2.py", str(config), *words], check=True, cwd=REPOSITORY
        )
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0], f"{precision}: loss went from {losses[0]} to {losses[-1]}"


def main() -> int:
    """Run all checks; 0 when they pass or there is no GPU."""
    if not torch.cuda.is_available():
        print("gpu-check: this PyTorch sees no GPU; nothing was checked")
        return 0
    for margin, centres_per_class in LOSSES:
        head_equals_cpu(margin, 1e-3, centres_per_class=centres_per_class)
    for options in (
        {"update": "autograd"}, {"sample_rate": 0.1},
        {"sample_rate": 0.1, "centre_device": "cpu"},
    ):  # fmt: skip
        head_equals_cpu(ArcFace(), 1e-3, **options)
    head_equals_cpu(CosFace(), 1e-2, torch.bfloat16)
    batches_arrive_whole()
    for sample_rate in (1.0, 0.1):
        for gradient_acc in (1, 2):
            step_does_not_wait(sample_rate=sample_rate, gradient_acc=gradient_acc)
    step_does_not_wait(precision="fp16", freeze_batch_norm=True)
    for loss in ("adaface", "curricularface", "elasticface_arc", "magface", "softmax"):
        step_does_not_wait(loss=loss)
    step_does_not_wait(loss="adaface", gradient_acc=2)
    step_does_not_wait(optimizer="adamw", precision="bf16")
    step_does_not_wait(compile=True)
    step_does_not_wait(ema_decay=0.99, layer_decay=0.8, decay_norms_and_biases=False)
    with tempfile.TemporaryDirectory() as folder:
        size = SETTINGS["embedding_size"]
        teacher = Path(folder) / "teacher.pt"
        save_model(
            teacher, get_model("r18", num_features=size), ModelMetadata("r18", num_features=size)
        )
        step_does_not_wait(teacher=teacher)
    step_does_not_wait(channels_last=False, precision="tf32")
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        run_trains(precision)
    print(f"gpu-check: all passed on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
