"""Measures the rows of benchmarks/gpu_bench.py: each function gives the figures of one row.

The functions are called in a child process with plain arguments. They also run on a CPU, where
their figures mean nothing and only prove that the code runs. A module that needs more packages than
PyTorch is imported by the row that needs it.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn import functional

from arcshard.head import kernels
from arcshard.head.kernels import KernelMode
from arcshard.head.row_optimizer import AdamWRows, SGDRows
from arcshard.head.workspace import choose_workspace, memory_bytes_of
from benchmarks.bench_head import Case, held_mib, median_seconds, time_step
from benchmarks.count_head import DTYPES, WIDTH, Peaks, count, limit_seconds
from benchmarks.runs import run_training
from utils.files import atomic_write

MOST_TRACE_BYTES = 12 * 2**20
SECONDS_TO_WARM_UP = 1.0


def ceilings(device: str, is_rehearsal: bool) -> dict[str, Any]:
    """Measures what this card reaches: a large product of random numbers, and a copy.

    Args:
        device: "cuda" or "cpu".
        is_rehearsal: Whether the sizes are tiny.

    Returns:
        matmul_tflops (bf16), fp32_tflops, and copy_gigabytes_per_second, read and written.
    """
    _clean(device)
    size, numbers, repeats = (256, 2**20, 3) if is_rehearsal else (8192, 2**30, 10)
    left = torch.randn(size, size, device=device)
    half = left.bfloat16()
    product = torch.empty_like(half)
    end = time.monotonic() + (0 if is_rehearsal else SECONDS_TO_WARM_UP)
    while time.monotonic() < end:  # an idle card runs at a fraction of its clock rate
        median_seconds(lambda: torch.mm(half, half, out=product), device, repeats)
    seconds = median_seconds(lambda: torch.mm(half, half, out=product), device, repeats)
    result = torch.empty_like(left)
    single = median_seconds(lambda: torch.mm(left, left, out=result), device, 3)
    source = torch.ones(numbers, dtype=torch.float32, device=device)
    copied = torch.empty_like(source)
    copying = median_seconds(lambda: copied.copy_(source), device, repeats)
    return {
        "matmul_tflops": 2 * size**3 / seconds / 1e12,
        "fp32_tflops": 2 * size**3 / single / 1e12,
        "copy_gigabytes_per_second": 2 * 4 * numbers / copying / 1e9,
    }


def head(
    case: Sequence[Any],
    device: str,
    repeats: int,
    workspace_mib: float | str,
    measured: Mapping[str, float],
) -> dict[str, Any]:
    """Measures one head (benchmarks/bench_head.py) against the limit of this card.

    Args:
        case: Fields of a `Case`.
        device: "cuda" or "cpu".
        repeats: Number of measured steps.
        workspace_mib: Workspace of the fused head in MiB, or "auto".
        measured: Result of `ceilings`.
    """
    one = Case(*case)
    _clean(device)
    seconds, peak_mib = time_step(one, device, repeats, workspace_mib)
    _clean(device)
    found = {"step_ms": 1e3 * seconds, "peak_mib": peak_mib, "held_mib": held_mib(one)}
    if "matmul_tflops" in measured:
        peaks = Peaks(
            "here", measured["matmul_tflops"] * 1e12, measured["copy_gigabytes_per_second"] * 1e9
        )
        limit = limit_seconds(peaks, one.batch, one.num_classes * one.sample_rate, *one[4:7])
        found |= {"limit_ms": 1e3 * limit, "share_of_limit": limit / seconds}
    if one.head == "fused":
        workspace = choose_workspace(workspace_mib, device, memory_bytes_of(torch.device(device)))
        mode: KernelMode = "torch" if one.kernels == "torch" else "triton"
        counted = count(
            one.num_classes,
            one.batch,
            one.sample_rate,
            workspace.budget_bytes / 2**20,
            *one[4:7],
            kernels=mode,
        )
        for key in ("launches", "gigabytes_moved", "products"):
            found[f"{key}_counted"] = counted[key]
        found["blocks"] = counted["blocks"]
    return found


def launch(kernel: str, settings: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Measures a kernel of the head with launch settings, on a block of 131,072 centers.

    Args:
        kernel: "logits", "normalize" or "update".
        settings: Fields of a `Tile`, or of `Rows`.
        options: tma (of the logits); dtype of the centers, "fp32" or "bf16"; optimizer.

    Returns:
        Milliseconds, and TFLOP/s of the product or GB/s read and written.
    """
    _clean("cuda")
    n, batch = 131_072, 1024
    drawn: dict[str, Any] = {"device": "cuda"}
    chosen = kernels.settings_of(torch.device("cuda:0"))
    if kernel == "logits":
        tile = kernels.Tile(*settings)
        chosen = chosen._replace(tile=tile, tma_tile=tile if options["tma"] else None)
    else:
        rows = kernels.Rows(*settings)
        chosen = chosen._replace(normalize=rows, update=rows)
    dtype = DTYPES[options.get("dtype", "fp32")]
    weight = torch.randn(n, WIDTH, **drawn).to(dtype)
    if kernel == "logits":
        operand, _ = kernels.normalize_rows(weight, None, torch.bfloat16)
        unit = (64 * functional.normalize(torch.randn(batch, WIDTH, **drawn))).bfloat16()
        column = torch.arange(batch, **drawn)
        run = partial(kernels.softmax_numerators, unit, operand, column, 0, None, True)
    elif kernel == "normalize":
        run = partial(kernels.normalize_rows, weight, None, torch.bfloat16)
        moved = n * WIDTH * (dtype.itemsize + 2)
    else:
        state_dtype = torch.bfloat16 if dtype == torch.bfloat16 else None
        is_sgd = options["optimizer"] == "sgd"
        rule = SGDRows(state_dtype=state_dtype) if is_sgd else AdamWRows(state_dtype=state_dtype)
        gradient, bad = torch.randn(n, WIDTH, **drawn), torch.zeros((), dtype=torch.bool, **drawn)
        run = partial(kernels.update_rows, rule, weight, gradient, 0.0, bad)
        moved = n * WIDTH * (4 + (4 if is_sgd else 6) * dtype.itemsize)
    with mock.patch.object(kernels, "settings_of", return_value=chosen):
        seconds = _device_seconds(run)
    if kernel == "logits":
        return {"ms": 1e3 * seconds, "tflops": 2 * n * batch * WIDTH / seconds / 1e12}
    return {"ms": 1e3 * seconds, "gigabytes_per_second": moved / seconds / 1e9}


def _device_seconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Returns the median of the device's time for a call, after a warm-up."""
    run()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in pairs:
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return 1e-3 * statistics.median(before.elapsed_time(after) for before, after in pairs)


def products(device: str, batch: int, rows: int) -> dict[str, Any]:
    """Measures the head's products of one block: a ceiling for each shape.

    Args:
        device: "cuda" or "cpu".
        batch: B.
        rows: n, classes of the block; it has n x B numerators.

    Returns:
        Milliseconds and TFLOP/s of each shape, and the extremes.
    """
    _clean(device)
    weight = torch.randn(rows, WIDTH, device=device).bfloat16()
    unit = torch.randn(batch, WIDTH, device=device).bfloat16()
    by_class = torch.rand(rows, batch, device=device).bfloat16()
    by_sample = torch.rand(batch, rows, device=device).bfloat16()
    shapes = {
        "logits, E W^T [B, D] x [D, n]": (unit, weight.t()),
        "logits, W E^T [n, D] x [D, B]": (weight, unit.t()),
        "dE, [B, n] x [n, D]": (by_sample, weight),
        "dE, [n, B]^T x [n, D]": (by_class.t(), weight),
        "dW, [B, n]^T x [B, D]": (by_sample.t(), unit),
        "dW, [n, B] x [B, D]": (by_class, unit),
    }
    found: dict[str, dict[str, float]] = {}
    for name, (left, right) in shapes.items():
        flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
        for dtype in ("bf16", "fp32"):
            options: dict[str, Any] = {}
            if dtype == "fp32":
                if device == "cpu":
                    continue  # a CPU has no product of bf16 operands with an fp32 result
                options = {"out_dtype": torch.float32}
            multiply = partial(torch.mm, left, right, **options)
            seconds = median_seconds(multiply, device, 10)
            found[f"{name} -> {dtype}"] = {"ms": 1e3 * seconds, "tflops": flops / seconds / 1e12}
    rates = [one["tflops"] for one in found.values()]
    return {"slowest_tflops": min(rates), "fastest_tflops": max(rates), "products": found}


def training(
    keys: Mapping[str, Any], measured: Mapping[str, float], profile_to: str | None = None
) -> dict[str, Any]:
    """Runs train_v2.py as a process and reads its metrics.jsonl.

    Args:
        keys: Keys of the config.
        measured: Result of `ceilings`.
        profile_to: File for the trace if `keys` ask for a profile, whose page is in the result.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "profile") if profile_to else None
        reading = run_training(keys, profile_to=folder)
        found = {} if folder is None or profile_to is None else _profile(folder, Path(profile_to))
    found |= {
        "samples_per_second": reading.samples_per_second,
        "peak_mib": reading.peak_mib,
        "data_wait_share": reading.data_wait_share,
        "compile_seconds": reading.compile_seconds,
    }
    peak = "matmul_tflops" if keys.get("precision") in ("bf16", "fp16") else "fp32_tflops"
    if peak in measured:
        from benchmarks.bench_train import utilization

        in_step = keys["num_classes"] * keys.get("sample_rate", 1.0)
        found["mfu"], found["mfu_with_head"] = utilization(
            keys["network"], in_step, reading.samples_per_second, measured[peak] * 1e12
        )
    return found


def _profile(folder: Path, trace_to: Path) -> dict[str, Any]:
    """Returns the page that the profiler wrote, and copies its trace to a file if it is small."""
    page, trace = folder / "summary.txt", folder / "trace.json.gz"
    found = {"profile": page.read_text() if page.exists() else "no page was written\n"}
    size = trace.stat().st_size if trace.exists() else 0
    if not 0 < size <= MOST_TRACE_BYTES:
        return {**found, "trace": f"left out: {size / 2**20:.1f} MiB"}
    trace_to.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(trace_to) as file:
        file.write(trace.read_bytes())
    return found


def dali(keys: Mapping[str, Any], images: int, measured: Mapping[str, float]) -> dict[str, Any]:
    """Does `training` from JPEG records that DALI decodes on the GPU."""
    from benchmarks.bench_data import make_records

    with tempfile.TemporaryDirectory() as folder:
        make_records(Path(folder), images)
        return training({**keys, "rec": folder, "num_image": "auto"}, measured)


def _clean(device: str) -> None:
    """Frees the memory that the previous row has left."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
