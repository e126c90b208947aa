"""Random cases of PartialFC on 1 to 4 ranks, against a dense float64 truth.

    python -m benchmarks.fuzz_head [--cases 1000] [--seed 0] [--ranks 1 2 3 4] [--json FILE]
    python -m benchmarks.fuzz_head --only SEED
    python -m benchmarks.fuzz_head --kernels [--cases 300]

A case follows from its seed, --ranks and --orders (tests/head_fuzz.py): loss, sizes, optimizer,
sample rate, batches, and the order in which the head is called. The cases are sorted by number of
ranks, so that a group of gloo ranks is made once per number and again after a failure. A rank that
does not answer in time, or ends, is a failure of its case. The exit code is 1 if a case failed.

--kernels runs heads in fp32 whose Triton kernels the interpreter executes, in the cases that have
any (update="fused"), against the same truth. A case in which the head without kernels is as wrong
is ill-conditioned in fp32: it is named and counts as no failure.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.conftest import Ranks
from tests.head_fuzz import ORDERS, Case, check_case, draw_case, in_fp32, run_case


class Pool:
    """Gloo ranks that run cases; they start again after a case in which one did not answer.

    Args:
        folder: Folder for the files by which the ranks find each other.
        seconds: Time for the answer to one case, without the start.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds, self.starts = folder, seconds, 0
        self.ranks: Ranks | None = None

    def reason_of_failure(self, case: Case) -> str:
        """Runs one case; returns why it failed, or an empty string."""
        if self.ranks is None:
            self.starts += 1
            folder = self.folder / str(self.starts)
            folder.mkdir()
            self.ranks = Ranks(folder)
            self.ranks.run(4, run_case, draw_case(0, (), (4,)))  # imports what a case needs
            self.ranks.seconds = self.seconds
        try:
            check_case(case, self.ranks.run(case.world_size, run_case, case))
        except (TimeoutError, EOFError) as error:
            self.ranks = None
            return f"{error}"
        except Exception as error:  # whatever it is, it is the result of this case
            return f"{type(error).__name__}: {error}"
        return ""

    def stop(self) -> None:
        """Ends the ranks."""
        if self.ranks is not None:
            self.ranks.stop()


def features(case: Case) -> dict[str, set[str]]:
    """Returns what the end of the run counts cases by."""
    return {
        "loss": {case.loss},
        "K": {str(case.centers_per_class)},
        "r": {f"{case.sample_rate:g}"},
        "optimizer": {f"{case.rule} {case.update}"},
        "ranks": {str(case.world_size)},
        "call order": case.orders,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; prints counts and failed seeds, and writes them as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="number of cases")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case")
    parser.add_argument("--only", type=int, help="run the case of this seed alone")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4], choices=range(1, 5))
    parser.add_argument(
        "--orders",
        nargs="*",
        default=list(ORDERS),
        help=f"call orders among {', '.join(ORDERS)}; none for forward, backward and step alone",
    )
    parser.add_argument("--kernels", action="store_true", help="Triton kernels, interpreted, fp32")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds per case")
    parser.add_argument("--json", type=Path, help="write counts and failures here")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.orders) - set(ORDERS))
    if unknown:
        parser.error(f"--orders {', '.join(unknown)}: choose from {', '.join(ORDERS)}")

    torch.set_num_threads(1)
    first, count = options.seed, options.cases
    if options.only is not None:
        first, count = options.only, 1
    drawn = (
        draw_case(seed, tuple(options.orders), tuple(options.ranks))
        for seed in range(first, first + count)
    )
    if options.kernels:
        os.environ["TRITON_INTERPRET"] = "1"  # the ranks, which have not started, inherit it
        drawn = (one for case in drawn if (one := in_fp32(case, "triton")) is not None)
    cases = sorted(drawn, key=lambda case: case.world_size)  # stable: seeds ascend in each group
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failed_by: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failures: list[dict[str, Any]] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fuzz_head_") as folder:
        pool = Pool(Path(folder), options.timeout)
        for number, case in enumerate(cases, 1):
            reason = pool.reason_of_failure(case)
            if reason and options.kernels:
                plain = pool.reason_of_failure(replace(case, kernels="torch"))
                if plain:
                    print(f"ill-conditioned {case}\n    {_last_line(reason)}", flush=True)
                    print(f"    without kernels: {_last_line(plain)}", flush=True)
                    reason = ""
            for name, values in features(case).items():
                counts[name].update(values)
                failed_by[name].update(values if reason else ())
            if reason:
                failures.append({"seed": case.seed, "case": str(case), "reason": reason})
                print(f"FAILED {case}\n    {_last_line(reason)}", flush=True)
            if number % 100 == 0 or number == len(cases):
                seconds = time.perf_counter() - start
                print(f"{number} of {len(cases)} cases, {seconds:.0f} s", flush=True)
        pool.stop()

    for name, counter in counts.items():
        parts = [
            f"{value} {n}"
            + (f" ({failed_by[name][value]} failed)" if failed_by[name][value] else "")
            for value, n in sorted(counter.items())
        ]
        print(f"{name}: {', '.join(parts)}")
    for failure in failures:
        print(f"seed {failure['seed']}: {_last_line(failure['reason'])}")
    if options.only is not None and failures:
        print(failures[0]["reason"])
    print(f"{len(failures)} of {len(cases)} cases failed")
    if options.json:
        record = {
            "options": {**vars(options), "json": str(options.json)},
            "counts": counts,
            "failed": failures,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if failures else 0


def _last_line(reason: str) -> str:
    return (reason.strip().splitlines() or [""])[-1]


if __name__ == "__main__":
    sys.exit(main())
