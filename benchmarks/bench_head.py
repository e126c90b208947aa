"""What a step of the head costs: forward, backward and update, against the usual heads.

    python -m benchmarks.bench_head [--quick] [--json FILE] [--plot FILE] [--device cuda]
        [--classes N ...] [--batch N ...] [--rate R ...] [--head NAME ...] [--workspace-mib N]
    python -m benchmarks.bench_head --count --classes 2000000 --batch 1024 [--optimizer adamw]
        [--rate R] [--weight-dtype bf16] [--state-dtype bf16] [--memory-gib 80] [--json FILE]

The first command measures. The second needs no GPU: it counts what a step would start, move and
multiply on one (benchmarks/count_head.py) and predicts its time.

One run compares, each in a separate process: plain data parallel (the whole weight on every rank,
out-of-place autograd), the dense sharded head as users have it (tests/reference.py DenseHead),
torch's linear_cross_entropy (no margin, plain softmax; since torch 2.13), our readable autograd
path and our fused one.
The units are one matmul [B, D] x [D, C] over all classes, measured between the steps, and the
limit, which is 6 B S D FLOPs at the measured matmul rate plus the bytes that must move (centers
read twice and written, momentum read and written) at the measured copy rate. Figures are medians
after a warm-up; peak memory is above weights and momentum. The usual heads run with the unchanged
allocator, ours with utils/memory.py, as train_v2.py sets it; "dense, memory kept" shows the
difference (CPU only). On a GPU the products of the usual heads are fp16, as in arcface_torch with
fp16=True, ours bf16, and the matmul of the unit is bf16 for all.

A row takes some ten seconds on a GPU, most of them to start: --classes, --batch, --rate and --head
choose among the rows (a row "of dense" needs the dense one); the files are written after each.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import cross_entropy, linear, normalize

from arcshard import partial_fc
from arcshard.head.kernels import KernelMode
from arcshard.head.workspace import choose_workspace
from arcshard.losses import ArcFace
from benchmarks.count_head import (
    DTYPES,
    REACHED,
    WIDTH,
    Peaks,
    assumed_peaks,
    count,
    limit_seconds,
    make_row_update,
    table,
)
from benchmarks.runs import in_a_process
from tests.reference import DenseHead
from training.planner.roofline import GPUS, HEAD_LAUNCH_SECONDS, TRITON_LAUNCH_SECONDS
from utils.memory import keep_freed_memory

LEARNING_RATE = 0.1
BASELINE = "dense"
COLUMNS = (
    "head",
    "classes",
    "batch",
    "r",
    "step ms",
    "/ matmul",
    "/ limit",
    "of dense",
    "peak MiB",
)


class Case(NamedTuple):
    """One row of the table.

    Attributes:
        head: Name of the head.
        num_classes: C.
        batch: B.
        sample_rate: r.
        optimizer: "sgd" or "adamw", for the fused head.
        weight_dtype: "fp32" or "bf16", for the fused head.
        state_dtype: "fp32" or "bf16", for the fused head.
        kernels: "auto" or "torch", for the fused head.
    """

    head: str
    num_classes: int
    batch: int
    sample_rate: float
    optimizer: str = "sgd"
    weight_dtype: str = "fp32"
    state_dtype: str = "fp32"
    kernels: KernelMode = "auto"


class Result(NamedTuple):
    """Medians of one row.

    Attributes:
        step: Seconds of a step.
        matmul: Seconds of the matmul.
        limit: Seconds of the limit.
        peak_mib: Peak memory in MiB.
    """

    step: float
    matmul: float
    limit: float
    peak_mib: float


def cases(quick: bool, device: str, memory_gib: float) -> list[Case]:
    """Returns all combinations that fit into memory.

    The dense heads need about 8 B C bytes beside their weights.
    """
    rates: tuple[float, ...] = (1.0, 0.3, 0.1)
    if quick:
        sizes, rates = [(100_000, 128)], (1.0, 0.1)
    elif device == "cpu":
        sizes = [(100_000, 128), (100_000, 512), (100_000, 1024), (400_000, 128), (1_000_000, 128)]
    else:
        sizes = [(c, b) for c in (100_000, 400_000, 1_000_000, 2_000_000) for b in (128, 512, 1024)]
    found = []
    for num_classes, batch in sizes:
        for rate in rates:
            weights = 8 * WIDTH * num_classes / 2**30
            logits = 4 * batch * num_classes * rate / 2**30
            for head, needed, only_full in (
                ("data parallel", 2 * weights + 7 * logits, True),
                ("dense", 1.7 * weights + 4 * logits, False),
                ("dense, memory kept", 1.7 * weights + 6 * logits, True),
                ("linear_cross_entropy", 2 * weights, True),
                ("autograd", 2 * weights + 6 * logits, False),
                ("fused", weights + 0.5, False),
            ):
                if head == "dense, memory kept" and device != "cpu":
                    continue  # on a GPU it is the same as "dense"
                is_long = num_classes * batch > 60_000_000 and device == "cpu"
                if is_long and head not in ("dense", "fused"):
                    continue  # minutes per row
                if head.startswith("linear") and num_classes * batch > 20_000_000:
                    continue  # 40 times the fused head's time on a CPU
                if head.startswith("linear") and not hasattr(functional, "linear_cross_entropy"):
                    continue  # before torch 2.13
                if needed < 0.8 * memory_gib and (rate == 1.0 or not only_full):
                    found.append(Case(head, num_classes, batch, rate))
    return found


def growth_cases(quick: bool, memory_gib: float) -> list[Case]:
    """Returns cases of the fused head with 20,000 sampled classes each, as C grows."""
    sizes = [100_000, 400_000] if quick else [100_000, 400_000, 1_000_000, 4_000_000]
    fitting = [c for c in sizes if 8 * WIDTH * c / 2**30 < 0.75 * memory_gib]
    return [Case("fused", c, 128, 20_000 / c) for c in fitting]


def make_step(case: Case, device: str, workspace_mib: float | str) -> Callable[[], None]:
    """Returns a function that does one step of the head, on fixed random input."""
    drawn: dict[str, Any] = {
        "generator": torch.Generator(device).manual_seed(0),
        "device": device,
    }
    embeddings = torch.randn(case.batch, WIDTH, requires_grad=True, **drawn)
    labels = torch.randint(case.num_classes, (case.batch,), **drawn)
    if case.head in ("autograd", "fused"):
        return _our_step(case, embeddings, labels, device, workspace_mib)

    weight = torch.randn(case.num_classes, WIDTH, **drawn).mul_(0.01)
    if case.head.startswith("dense"):
        dense = DenseHead(weight, LEARNING_RATE, case.sample_rate)
        return lambda: _clear(embeddings, dense.step(embeddings, labels))

    centers = torch.nn.Parameter(weight)
    optimizer = torch.optim.SGD([centers], LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    options = torch.nn.LinearCrossEntropyOptions() if case.head.startswith("linear") else None

    def step() -> None:
        if options is not None:
            loss = functional.linear_cross_entropy(embeddings, centers, labels, options=options)
        else:
            with torch.autocast(device, torch.float16, enabled=device == "cuda"):
                cosines = linear(normalize(embeddings), normalize(centers))
            logits = ArcFace().logits(cosines.float(), labels)
            loss = cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _clear(embeddings, loss)

    return step


def _our_step(
    case: Case, embeddings: Tensor, labels: Tensor, device: str, workspace_mib: float | str
) -> Callable[[], None]:
    # Draws centers on the device: a CPU takes 10 s for 2 million, and their values do not matter.
    with mock.patch.object(partial_fc, "init_centers", _fill_on_the_device):
        head = partial_fc.PartialFC(
            ArcFace(gradient="straight_through"),
            WIDTH,
            case.num_classes,
            case.sample_rate,
            row_optimizer=make_row_update(case.optimizer, case.state_dtype),
            batch_size_per_rank=case.batch,
            device=device,
            dtype=DTYPES[case.weight_dtype],
            update="fused" if case.head == "fused" else "autograd",
            half=torch.bfloat16 if device == "cuda" else None,
            workspace_mib=workspace_mib,
            kernels=case.kernels,
        )
    rate = LEARNING_RATE if case.head == "fused" else None

    def step() -> None:
        loss = head(embeddings, labels, rate)
        loss.backward()
        head.step(LEARNING_RATE)
        _clear(embeddings, loss)

    return step


def _fill_on_the_device(weight: Tensor, *_: Any) -> None:
    with torch.no_grad():
        for rows in weight.split(2**18):
            rows.normal_(std=0.01)


def _clear(embeddings: Tensor, loss: Tensor) -> None:
    assert embeddings.device.type != "cpu" or torch.isfinite(loss)
    embeddings.grad = None


def measure(case: Case, device: str, repeats: int, workspace_mib: float | str) -> Result:
    """Measures one case; runs in a separate process, because a CPU's peak memory counts."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left = torch.randn(case.batch, WIDTH, device=device, dtype=dtype)
    right = torch.randn(min(case.num_classes, 1_000_000), WIDTH, device=device, dtype=dtype)
    matmul, copy = _matmul_and_copy(left, right, device, repeats)
    matmul *= case.num_classes / len(right)
    bytes_per_second = 2 * right.numel() * right.itemsize / copy  # reads and writes
    del left, right
    peaks = Peaks("here", 2 * case.batch * case.num_classes * WIDTH / matmul, bytes_per_second)
    limit = limit_seconds(peaks, case.batch, case.num_classes * case.sample_rate, *case[4:7])
    seconds, peak_mib = time_step(case, device, repeats, workspace_mib)
    return Result(seconds, matmul, limit, peak_mib)


def time_step(
    case: Case, device: str, repeats: int, workspace_mib: float | str
) -> tuple[float, float]:
    """Returns median seconds of a step, and MiB of its peak above the centers and their state."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        if case.head in ("autograd", "fused", "dense, memory kept"):
            keep_freed_memory()
    before = _used_mib(device)
    step = make_step(case, device, workspace_mib)
    step()
    seconds = median_seconds(step, device, repeats)
    return seconds, _peak_mib(device) - before - held_mib(case)


def held_mib(case: Case) -> float:
    """Returns MiB of the class centers and the state of their optimizer."""
    averages = 1 if case.optimizer == "sgd" else 2
    sizes = DTYPES[case.weight_dtype].itemsize + averages * DTYPES[case.state_dtype].itemsize
    return case.num_classes * WIDTH * sizes / 2**20


def _matmul_and_copy(left: Tensor, right: Tensor, device: str, repeats: int) -> tuple[float, float]:
    """Returns seconds of left @ right.T into a given result, and of copying `right`."""
    product, copied = left.new_empty(len(left), len(right)), torch.empty_like(right)
    return (
        median_seconds(lambda: torch.mm(left, right.t(), out=product), device, repeats),
        median_seconds(lambda: copied.copy_(right), device, repeats),
    )


def median_seconds(function: Callable[[], object], device: str, repeats: int) -> float:
    """Returns the median of `repeats` calls after a warm-up, each waited for."""
    times = []
    function()
    for _ in range(repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _used_mib(device: str) -> float:
    """Returns what this process holds now (resident memory on Linux, or the GPU's allocations)."""
    if device == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws step time in matmuls and peak memory of every head, and growth with C at fixed S."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    full = [row for row in rows if row["params"]["sample_rate"] == 1.0]
    sizes = sorted({(row["params"]["num_classes"], row["params"]["batch"]) for row in full})
    heads = list(dict.fromkeys(row["name"] for row in full))
    figure, axes = plt.subplots(1, 3, figsize=(17, 5))
    for axis, key, title in (
        (axes[0], "ratio_to_matmul", "step, in matmuls [B, 512] x [512, C]; r = 1"),
        (axes[1], "peak_mib", "peak above weights and momentum, MiB; r = 1"),
    ):
        for number, head in enumerate(heads):
            values = {
                (r["params"]["num_classes"], r["params"]["batch"]): r[key]
                for r in full
                if r["name"] == head
            }
            places = [i + 0.14 * (number - len(heads) / 2) for i in range(len(sizes))]
            axis.bar(places, [max(values.get(s, 0), 0) for s in sizes], 0.13, label=head)
        axis.set_xticks(range(len(sizes)), [f"C={c:,}\nB={b}" for c, b in sizes], fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[1].set_yscale("log")
    growth = [row for row in rows if row["params"].get("growth")]
    classes = [row["params"]["num_classes"] for row in growth]
    axes[2].plot(classes, [row["median_ms"] for row in growth], "o-", label="step, ms")
    axes[2].plot(classes, [row["peak_mib"] for row in growth], "s--", label="peak, MiB")
    axes[2].set(xscale="log", xlabel="classes", ylim=(0, None))
    axes[2].set_title("fused head at 20,000 sampled classes, B = 128", fontsize=10)
    axes[2].legend(fontsize=8)
    axes[2].grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; prints a table and writes rows as JSON and a plot on request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one size, about a minute on 2 cores")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory-gib", type=float, help="of the device; larger cases are left out")
    parser.add_argument("--classes", type=int, nargs="+", help="only rows of these")
    parser.add_argument("--batch", type=int, nargs="+", help="only rows of these")
    parser.add_argument("--rate", type=float, nargs="+", help="only rows of these sample rates")
    parser.add_argument("--head", nargs="+", help="only rows of these, as the table names them")
    parser.add_argument(
        "--workspace-mib",
        "--buffer-mib",
        type=mib,
        default="auto",
        help="of the fused head (default auto)",
    )
    parser.add_argument(
        "--kernels",
        choices=("auto", "torch"),
        default="auto",
        help="of the fused head: Triton's where they serve, or PyTorch's",
    )
    parser.add_argument("--count", action="store_true", help="count instead of measuring; no GPU")
    parser.add_argument(
        "--optimizer", choices=("sgd", "adamw"), default="sgd", help="of the fused head's centers"
    )
    for name in ("--weight-dtype", "--state-dtype"):
        parser.add_argument(name, choices=tuple(DTYPES), default="fp32", help="of the fused head")
    parser.add_argument("--matmul-tflops", type=float, help="with --count: a measured peak")
    parser.add_argument(
        "--copy-gigabytes", type=float, help="with --count: a measured peak per second, both ways"
    )
    options = parser.parse_args(arguments)
    if options.count:
        return report_counts(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda, but this PyTorch sees no GPU", file=sys.stderr)
        return 2
    memory_gib = options.memory_gib or _memory_gib(options.device)
    repeats = 5 if options.quick else 7
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(
        f"{time.strftime('%Y-%m-%d')}, {where}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, D = {WIDTH}, SGD, medians of {repeats}; the fused head: "
        f"{options.optimizer}, centers {options.weight_dtype}, state {options.state_dtype}"
    )
    print("{:22} {:>9} {:>6} {:>6} {:>9} {:>9} {:>8} {:>9} {:>9}".format(*COLUMNS))
    rows: list[dict[str, Any]] = []
    baseline: dict[tuple[Any, ...], float] = {}
    of_fused = (options.optimizer, options.weight_dtype, options.state_dtype, options.kernels)
    for is_growth, case in [
        *((False, c) for c in cases(options.quick, options.device, memory_gib)),
        *((True, c) for c in growth_cases(options.quick, memory_gib)),
    ]:
        wanted = (options.head, options.classes, options.batch, options.rate)
        if any(some and value not in some for some, value in zip(wanted, case[:4], strict=True)):
            continue
        if case.head == "fused":
            case = Case(*case[:4], *of_fused)
        result = in_a_process(measure, case, options.device, repeats, options.workspace_mib)
        key = case[1:7]  # another optimizer or dtype has no row of the dense head to compare with
        if case.head == BASELINE:
            baseline[key] = result.step
        ratio = result.step / baseline[key] if key in baseline else None
        print(
            f"{case.head:22} {case.num_classes:>9,} {case.batch:>6} {case.sample_rate:>6.3g} "
            f"{result.step * 1e3:>9.1f} {result.step / result.matmul:>9.2f} "
            f"{result.step / result.limit:>8.2f} {'-' if ratio is None else f'{ratio:.3f}':>9} "
            f"{result.peak_mib:>9.0f}",
            flush=True,
        )
        rows.append(
            {
                "name": case.head,
                "params": {
                    "num_classes": case.num_classes,
                    "batch": case.batch,
                    "sample_rate": case.sample_rate,
                    "growth": is_growth,
                    "optimizer": case.optimizer,
                    "kernels": case.kernels,
                    "weight_dtype": case.weight_dtype,
                    "state_dtype": case.state_dtype,
                },
                "median_ms": result.step * 1e3,
                "peak_mib": result.peak_mib,
                "ratio_to_baseline": ratio,
                "ratio_to_matmul": result.step / result.matmul,
                "ratio_to_limit": result.step / result.limit,
            }
        )
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
        if options.plot:
            draw(rows, options.plot)
    return 0


def mib(text: str) -> float | str:
    """Parses a size in MiB, or "auto", for argparse."""
    return text if text == "auto" else float(text)


def report_counts(options: argparse.Namespace) -> int:
    """Does the work of `--count`: prints a table per combination, and writes rows as JSON."""
    given = (options.matmul_tflops, options.copy_gigabytes)
    if any(peak is not None and not peak > 0 for peak in given) or (None in given) != (
        given == (None, None)
    ):
        print(
            "error: --matmul-tflops and --copy-gigabytes: both, above 0, or neither",
            file=sys.stderr,
        )
        return 2
    unused = [name for name in ("quick", "plot", "head") if getattr(options, name)]
    unused += ["device"] if options.device != "cpu" else []
    if unused:
        print(
            f"error: --count with --{', --'.join(unused)}: leave them out; what is counted is "
            "the fused head on a GPU",
            file=sys.stderr,
        )
        return 2
    peaks = assumed_peaks()
    if None not in given:
        peaks.append(Peaks("as given", given[0] * 1e12, given[1] * 1e9))
    memory_gib = GPUS["h100"].memory_gib if options.memory_gib is None else options.memory_gib
    sizes = [memory_gib, 1 if options.workspace_mib == "auto" else options.workspace_mib]
    if not all(0 < size < math.inf for size in sizes):
        print("error: --memory-gib and --workspace-mib: above 0", file=sys.stderr)
        return 2
    workspace = choose_workspace(options.workspace_mib, "cuda", int(memory_gib * 2**30))
    rows = []
    for num_classes in options.classes or [2_000_000]:
        for batch in options.batch or [1024]:
            for rate in options.rate or [1.0]:
                try:
                    row = count(
                        num_classes,
                        batch,
                        rate,
                        workspace.budget_bytes / 2**20,
                        options.optimizer,
                        options.weight_dtype,
                        options.state_dtype,
                        peaks,
                        "torch" if options.kernels == "torch" else "triton",
                    )
                    rows.append(row)
                    if options.json:
                        options.json.write_text(json.dumps(rows, indent=1) + "\n")
                except (ValueError, OSError) as error:  # a wrong value, or a file error
                    print(f"error: {error}", file=sys.stderr)
                    return 2
                print(table(row), end="\n\n", flush=True)
    share = ", ".join(f"{value:.0%} of {name}" for name, value in REACHED.items())
    print(
        f"Counted on the meta device. Times are predicted, not measured: of the data sheets "
        f"{share} is assumed, and {1e6 * HEAD_LAUNCH_SECONDS:g} us a launch, "
        f"{1e6 * TRITON_LAUNCH_SECONDS:g} of a Triton kernel."
    )
    return 0


def _memory_gib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    available = Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]
    return int(available) / 2**20


if __name__ == "__main__":
    sys.exit(main())
