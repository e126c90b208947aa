r"""Does an option cost accuracy? Runs training with and without it, from several seeds.

    python -m benchmarks.bench_accuracy configs/demo rec=demo_data num_epoch=1 max_steps=26 \
        --ranks 2 --variant precision=bf16
    python -m benchmarks.bench_accuracy configs/lfw_nano rec=FOLDER val_dir=... num_epoch=2 \
        --ranks 2 --variant compile=True --variant "zero_stage=1 compile=True"

Every variant is the base with some keys changed. Each is a run of train_v2.py as a process per
seed; its number is the last verification of its metrics.jsonl (flip accuracy, the mean over the
sets). A variant has fallen if its mean lies below the base's by more than the spread of the base's
own seeds (largest less smallest); the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

from benchmarks.runs import RunFailed, start_ranks, wait_for


class Row(NamedTuple):
    """A variant and its results.

    Attributes:
        words: Changed keys, "" for the base.
        accuracies: Accuracy of each seed.
        seconds: Time of all runs.
    """

    words: str
    accuracies: list[float]
    seconds: float

    def has_fallen(self, base: Row) -> bool:
        """Returns whether the mean lies below the base's by more than the base's seeds differ."""
        spread = max(base.accuracies) - min(base.accuracies)
        return mean(self.accuracies) < mean(base.accuracies) - spread

    def line(self, base: Row) -> str:
        """Formats a line of a Markdown table."""
        each = ", ".join(f"{accuracy:.4f}" for accuracy in self.accuracies)
        difference = mean(self.accuracies) - mean(base.accuracies)
        verdict = "" if self is base else "fallen" if self.has_fallen(base) else "within the spread"
        return (
            f"| {self.words or 'base'} | {each} | {mean(self.accuracies):.4f} | "
            f"{difference:+.4f} | {verdict} | {self.seconds:.0f} |"
        )


def last_accuracy(metrics: Path) -> float:
    """Returns the flip accuracy of a run's last verification, the mean over its sets.

    Raises:
        ValueError: The run has no verification.
    """
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    results = [record["eval"] for record in records if "eval" in record]
    if not results:
        raise ValueError(f"{metrics} has no verification: set val_targets and val_dir")
    return mean(scores["accuracy_flip"] for scores in results[-1].values())


def train_once(words: Sequence[str], ranks: int) -> float:
    """Trains once in a temporary folder and returns the accuracy."""
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "run"
        with (Path(temporary) / "log").open("w+b") as log:
            command = ["train_v2.py", *words, f"output={output}", "keep_checkpoints=0"]
            codes = wait_for(start_ranks(command, ranks, log, 1 if ranks > 1 else None))
            if any(codes):
                log.seek(0)
                end = log.read().decode(errors="replace")[-2000:]
                raise RunFailed(f"exit codes {codes} of {' '.join(command)}:\n{end}")
        return last_accuracy(output / "metrics.jsonl")


def run_variant(words: Sequence[str], variant: str, seeds: Sequence[int], ranks: int) -> Row:
    """Runs all seeds of one variant.

    Args:
        words: Config and keys of all variants.
        variant: Keys of this variant, separated by blanks.
        seeds: The seeds.
        ranks: Number of ranks.
    """
    start = time.perf_counter()
    found = [train_once([*words, *variant.split(), f"seed={seed}"], ranks) for seed in seeds]
    return Row(variant, found, time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns 0 if no variant has fallen, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="as of train_v2.py")
    parser.add_argument("words", nargs="*", metavar="key=value", help="of the base and all others")
    parser.add_argument("--variant", action="append", default=[], metavar="WORDS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_intermixed_args(arguments)
    words = [options.config, *options.words]
    text = [
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {torch.__version__}, "
        f"{options.ranks} rank(s), seeds {', '.join(map(str, options.seeds))}: "
        f"`train_v2.py {' '.join(words)}`",
        "",
        "| keys | flip accuracy of each seed | mean | against base | verdict | s |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(text), flush=True)
    rows: list[Row] = []
    for variant in ["", *options.variant]:
        rows.append(run_variant(words, variant, options.seeds, options.ranks))
        text.append(rows[-1].line(rows[0]))
        print(text[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text("\n".join(text) + "\n")
    fallen = [row.words for row in rows[1:] if row.has_fallen(rows[0])]
    print(f"fallen: {fallen}" if fallen else "nothing has fallen by more than the seeds differ")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
