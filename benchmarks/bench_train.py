"""The whole training step against the plain configuration that users run today.

    python -m benchmarks.bench_train [--must | --quick] [--records] [--repeats 3] [--json FILE]
        [--markdown FILE] [--plot FILE] [--device cuda] [--network r50 r100] [--classes N ...]
        [--ours key=value ...]
    python -m benchmarks.bench_train --options      # what each option gives

Every figure comes from a run of train_v2.py as a process, by its metrics.jsonl, without the first
log interval; input is generated, or read from JPEG records made here (--records). The two sides of
a row take turns; a ratio is the median of those of neighboring runs, with the least and the most.

Plain: the same program with NCHW, every logit and the whole gradient of the class centers in memory
(autograd), no torch.compile; on a GPU fp16 with a loss scaler and fp16 all-reduce, on a CPU fp32.
Ours: compiled, bf16 on a GPU, fp32 on a CPU. One row has ours without the compiler, and on a CPU
one row has plain with the C library's allocator as other programs have it (slower, smaller).

Memory: rank 0's peak of the whole process on a CPU, of PyTorch's reserved memory on a GPU. "Above
start" leaves out the whole peak of a tiny run (r_nano, 64 classes, batch 4); on a GPU nothing.
MFU: 3 x 2 x MACs x images/s over the measured peak of a large matmul in the side's precision. It
does not include the head's FLOPs; "with head" adds its three products, 3 x 2 x D x C x r per image.

The exit code is 1 if a target of a row is missed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.bench_data import make_records
from benchmarks.comparison import (
    COMPILED,
    HEADER,
    INTERVALS,
    OPTIONS_HEADER,
    OURS,
    Comparison,
    Keys,
    Result,
    Row,
    Side,
    as_json,
    draw,
    line,
    option_line,
    plain,
    ratio_of_pairs,
    table_row,
)
from benchmarks.runs import Reading, RunFailed, in_a_process, run_training
from configs.base import default_of
from scripts.flops import describe

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


# ---------------------------------------------------------------- what is compared


def rows(device: str, which: str, more: Keys) -> list[Row]:
    """Returns the rows of the first table.

    Args:
        device: "cpu" or "cuda".
        which: "quick", "must" or "all".
        more: Keys of our side.
    """
    uncompiled = plain(device), Side("ours, not compiled", {**OURS[device], **more})
    if which == "quick":
        return [Row(*uncompiled, "r_nano", 2_000, 8)]
    sides = uncompiled[0], Side("ours", {**OURS[device], **COMPILED, **more})
    if device == "cpu":
        must = Row(*sides, "r_nano", 200_000, 64, least_speed=2.0, most_memory=0.5)
        as_it_is = sides[0]._replace(name="plain, allocator as it is", own_allocator=False)
        others = [
            Row(*uncompiled, "r_nano", 200_000, 64),
            Row(as_it_is, sides[1], "r_nano", 200_000, 64),
            Row(*sides, "r_nano", 200_000, 64, 0.1),
            Row(*sides, "r_nano", 10_000, 64),
            Row(*sides, "mbf", 200_000, 32),
        ]
        return [must] if which == "must" else [must, *others]
    classes = (360_000, 2_000_000)
    must_rows = [Row(*sides, n, c, 512, least_speed=1.5) for n in ("r50", "r100") for c in classes]
    if which == "must":
        return must_rows
    fp16 = Side("ours", {**sides[1].keys, "precision": "fp16"})
    tf32 = Side("ours", {**sides[1].keys, "precision": "tf32"})
    return [
        *must_rows,
        Row(*uncompiled, "r50", 360_000, 512),
        *(Row(*sides, "r50", 2_000_000, 512, rate) for rate in (0.2, 0.1)),
        *(Row(*sides, network, 360_000, 512) for network in ("vit_b", "mbf")),
        *(Row(sides[0], side, "r50", 360_000, 512) for side in (fp16, tf32)),
    ]


def option_rows(device: str, network: str, quick: bool, more: Keys) -> list[Row]:
    """Returns the rows of the second table: ours against ours with one key changed.

    They have few classes, so that the backbone is most of the step, but for the head's own option.

    Args:
        device: "cpu" or "cuda".
        network: Name of the network.
        quick: Whether the sizes are tiny.
        more: Keys of our side.
    """
    few, many, batch = (2_000, 2_000, 8) if quick else (2_000, 100_000, 64)
    keys = {**OURS[device], **more}
    ours = Side("ours", keys)

    def changed(**key: Any) -> Side:
        return Side(" ".join(f"{k}={v}" for k, v in key.items()), {**keys, **key})

    alone = [
        changed(channels_last=False),
        changed(compile=True),
        changed(gradient_checkpointing=True),
        changed(precision="bf16" if device == "cpu" else "fp32"),
    ]
    if device == "cpu":
        alone.append(Side("allocator as it is", keys, own_allocator=False))
    found = [Row(ours, side, network, few, batch) for side in alone]
    found.append(Row(ours, changed(head_update="autograd"), network, many, batch))
    if device == "cuda":
        return found  # with one GPU there are no ranks to exchange anything
    # A sum in bf16 needs NCCL, so the reduced dtype on a CPU is fp16.
    together = [
        changed(zero_stage=1),
        changed(grad_reduce_dtype="fp16"),
    ]
    return found + [Row(ours, side, network, few, batch // 2, ranks=2) for side in together]


# ---------------------------------------------------------------- measuring


class Bench:
    """Compares rows on one device.

    Args:
        device: "cpu" or "cuda".
        steps: Steps per log interval.
        repeats: Runs of each side.
        records: Folder of records, or None for generated input.
    """

    def __init__(self, device: str, steps: int, repeats: int, records: Path | None) -> None:
        self.device, self.steps, self.repeats, self.records = device, steps, repeats, records
        self.peaks: dict[str, float] = {}
        self._start_mib: float | None = None

    def keys(self, row: Row) -> Keys:
        """Returns the keys that both sides of a row share."""
        steps = self.steps * INTERVALS
        return {
            "network": row.network,
            "num_classes": row.num_classes,
            "batch_size": row.batch_size,
            "sample_rate": row.sample_rate,
            "device": self.device,
            "max_steps": steps,
            "num_image": "auto" if self.records else row.batch_size * row.ranks * steps,
            "frequent": self.steps,
            "num_epoch": 1,
            "num_workers": min(8, os.cpu_count() or 1),
            **({"rec": self.records} if self.records else {}),
        }

    def compare(self, row: Row) -> Comparison:
        """Runs both sides in turn, `repeats` times."""
        keys = self.keys(row)
        pairs = [
            (row.baseline.run(keys, row.ranks), row.changed.run(keys, row.ranks))
            for _ in range(self.repeats)
        ]
        before, after = zip(*pairs, strict=True)
        return Comparison(
            row,
            self._result(row, row.baseline, before),
            self._result(row, row.changed, after),
            ratio_of_pairs([(b.samples_per_second, a.samples_per_second) for b, a in pairs]),
        )

    def _result(self, row: Row, side: Side, readings: Sequence[Reading]) -> Result:
        firsts = [r.compile_seconds for r in readings if r.compile_seconds is not None]
        speed = median(r.samples_per_second for r in readings)
        peak_mib = median(r.peak_mib for r in readings)
        return Result(
            speed,
            peak_mib,
            peak_mib - self.start_mib(),
            median(r.data_wait_share for r in readings),
            median(firsts) if firsts else None,
            utilization(
                row.network,
                row.num_classes * row.sample_rate,
                speed,
                self.matmul_peak(side.keys["precision"]),
            ),
        )

    def start_mib(self) -> float:
        """Returns the peak of a process that trains next to nothing; 0 on a GPU."""
        if self._start_mib is None:
            tiny = {
                "network": "r_nano",
                "num_classes": 64,
                "batch_size": 4,
                "num_image": 8,
                "num_epoch": 1,
                "frequent": 1,
                "device": self.device,
            }
            on_cpu = self.device == "cpu"
            self._start_mib = run_training(tiny).peak_mib if on_cpu else 0.0
        return self._start_mib

    def matmul_peak(self, precision: str) -> float:
        """Returns FLOP/s of a matmul, measured once per precision.

        It is measured in a separate process, because a run that is started from here would
        otherwise count its memory as its own peak.
        """
        if precision not in self.peaks:
            self.peaks[precision] = in_a_process(measure_matmul, self.device, precision)
        return self.peaks[precision]


def measure_matmul(device: str, precision: str) -> float:
    """Returns FLOP/s of a large square matmul, the best of ten."""
    size = 2048 if device == "cpu" else 8192
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    left = torch.randn(size, size, device=device).to(DTYPES.get(precision, torch.float32))
    product, best = torch.empty_like(left), float("inf")
    for _ in range(11):
        start = time.perf_counter()
        torch.mm(left, left, out=product)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def utilization(
    network: str, num_classes: float, samples_per_second: float, peak: float
) -> tuple[float, float]:
    """Returns the share of `peak` FLOP/s that the backbone's products take, and with the head's.

    The backward pass counts as two forward passes, and recomputation does not count; a ViT's masked
    patches are counted.

    Args:
        network: Name of the network.
        num_classes: Classes in a step.
        samples_per_second: Measured speed.
        peak: FLOP/s.
    """
    width = default_of("embedding_size")
    backbone = 3 * describe(network, {"num_features": width})["flops"]
    head = 3 * 2 * width * num_classes
    per_second = samples_per_second / peak
    return backbone * per_second, (backbone + head) * per_second


# ---------------------------------------------------------------- the command


def values(words: Sequence[str]) -> Keys:
    """Parses key=value words; what is not a Python value is text."""
    found: Keys = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise SystemExit(f"error: --ours {word}: key=value is needed, as precision=bf16")
        try:
            found[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[key] = text
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="r_nano, tiny: under a minute")
    parser.add_argument("--must", action="store_true", help="the rows with targets only")
    parser.add_argument("--options", action="store_true", help="what each option gives instead")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--network", nargs="+", help="only rows of these; --options: its network")
    parser.add_argument("--classes", type=int, nargs="+", help="only rows of these")
    parser.add_argument("--ours", nargs="+", default=[], metavar="key=value", help="of our side")
    parser.add_argument("--records", action="store_true", help="read JPEG records, made here")
    parser.add_argument("--repeats", type=int, help="runs of each side; default 3")
    parser.add_argument("--steps", type=int, help="per log interval; default 4, on a GPU 20")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--plot", type=Path, help="write a PNG here")
    words = list(sys.argv[1:] if arguments is None else arguments)
    return parser.parse_args(words, argparse.Namespace(words=words))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 if a target is missed."""
    options = parse(arguments)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda, but this PyTorch sees no GPU", file=sys.stderr)
        return 2
    steps = options.steps or (1 if options.quick else 4 if device == "cpu" else 20)
    repeats = options.repeats or (1 if options.quick else 3)
    more = values(options.ours)
    if options.options:
        networks = options.network or ["r_nano" if device == "cpu" else "r50"]
        chosen = [row for n in networks for row in option_rows(device, n, options.quick, more)]
    else:
        which = "quick" if options.quick else "must" if options.must else "all"
        chosen = [
            row
            for row in rows(device, which, more)
            if row.network in (options.network or [row.network])
            and row.num_classes in (options.classes or [row.num_classes])
        ]
    with tempfile.TemporaryDirectory() as temporary:
        records = Path(temporary) if options.records else None
        if records is not None:
            count = max(row.batch_size * row.ranks for row in chosen) * steps * INTERVALS
            make_records(records, count)
        return report(Bench(device, steps, repeats, records), chosen, options)


def report(bench: Bench, chosen: Sequence[Row], options: argparse.Namespace) -> int:
    """Measures the rows and reports each at once, so that an interrupted table is still a table."""
    where = torch.cuda.get_device_name() if bench.device == "cuda" else platform.machine()
    source = "JPEG records" if bench.records else "generated input"
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    header, tell = (OPTIONS_HEADER, option_line) if options.options else (HEADER, line)
    text: list[str] = []
    json_rows: list[dict[str, Any]] = []
    missed: list[str] = []

    def say(words: str) -> None:
        text.append(words)
        print(words, flush=True)

    say(
        f"{time.strftime('%Y-%m-%d')}, {where}, {threads} threads, torch {torch.__version__}, "
        f"D = {default_of('embedding_size')}, {source}; medians of {bench.repeats} runs of "
        f"{bench.steps * INTERVALS} steps, the first {bench.steps} left out\n"
    )
    say(f"    python -m benchmarks.bench_train {' '.join(options.words)}\n")
    say(f"| {header} |\n|{'---|' * len(header.split(' | '))}")
    for row in chosen:
        try:
            found = bench.compare(row)
        except RunFailed as error:
            if "out of memory" not in str(error):
                raise
            say(table_row([row.setting, "out of memory"]))
            missed += [f"{row.setting}: not measured"] if row.least_speed else []
            continue
        say(tell(found))
        json_rows.append(as_json(found))
        missed += found.missed()
        if options.json:
            options.json.write_text(json.dumps(json_rows, indent=1) + "\n")
        if options.markdown:
            options.markdown.write_text("\n".join(text) + "\n")
        if options.plot:
            draw(json_rows, options.plot)
    peaks = ", ".join(f"{name} {peak / 1e12:.3g}" for name, peak in bench.peaks.items())
    say(f"\nA large matmul, TFLOP/s: {peaks}. A tiny run takes {bench.start_mib():,.0f} MiB.")
    wanted = any(row.least_speed or row.most_memory for row in chosen)
    for sentence in missed:
        say(f"MISSED: {sentence}")
    if wanted and not missed:
        say("All targets are met.")
    if options.markdown:
        options.markdown.write_text("\n".join(text) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
