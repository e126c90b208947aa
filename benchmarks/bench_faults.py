"""Kills runs at random moments, and compares the final state of the restarted ones.

    python -m benchmarks.bench_faults [--quick] [--json FILE] [--seed 0]

The runs are real processes on the CPU, 2 to 4 ranks, on images of scripts/make_synthetic.py, with
configs/demo made small. At a random moment one rank or all are killed (SIGKILL), in two of
three runs while a checkpoint is being written. The remaining ranks end by themselves or are killed
as well. The run is started again with resume=auto:

same      on the same number of ranks: everything in its last checkpoint (weights, centers,
          momentum, RNG states, counts) has to equal that of the uninterrupted run bit for bit.
changed   on another number of ranks, in float64 with frozen batch norm: centers, momentum and data
          position have to arrive unchanged, and all losses have to be within 1e-8.

In the end the folder may hold only named checkpoints. The command prints one line per run, and a
count.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.runs import start_ranks, wait_for
from scripts.make_synthetic import make_synthetic
from training.checkpoint import sharded_io
from training.checkpoint.checkpointer import (
    FOLDER,
    LATEST,
    Checkpoint,
    Manifest,
    find_corruption,
    list_checkpoints,
    step_of,
)
from training.checkpoint.sharded_io import TensorShard

GLOBAL_BATCH = 12
STEPS = 30
SETTINGS = (
    "configs/demo",
    "val_targets=[]",
    "num_workers=1",
    "lr_base_batch=None",
    "lr=0.05",
    "frequent=1",
    "checkpoint_every=3",
    "keep_checkpoints=3",
    "num_epoch=100",
    f"max_steps={STEPS}",
)
FP64 = ("precision=fp64", "freeze_batch_norm=True")


@dataclass
class Result:
    """One killed run.

    Attributes:
        name: Number of the run.
        kind: "same" or "changed".
        ranks: Number of ranks before and after.
        victims: Ranks that were killed.
        killed_at_step: Last logged step.
        while_saving: Whether a checkpoint was being written.
        resumed_at_step: Step of the last intact checkpoint.
        seconds: Time of the whole comparison.
        problems: What is not as it has to be.
    """

    name: str
    kind: str
    ranks: str
    victims: str
    killed_at_step: int
    while_saving: bool
    resumed_at_step: int
    seconds: float
    problems: list[str]

    def line(self) -> str:
        """Formats a line of the table."""
        moment = "saving" if self.while_saving else "between"
        return (
            f"{self.name:>4} {self.kind:8} {self.ranks:>6} {self.victims:>7} {moment:>8} "
            f"{self.killed_at_step:>6} {self.resumed_at_step:>7} {self.seconds:>7.1f}  "
            + ("ok" if not self.problems else "; ".join(self.problems))
        )


class Run:
    """The ranks of one training run, as processes.

    Args:
        output: Folder of the run.
        data: Folder of the records.
        world_size: Number of ranks.
        words: Further key=value words.
        settings: Config and its words; None means SETTINGS.
    """

    def __init__(
        self,
        output: Path,
        data: Path,
        world_size: int,
        words: Sequence[str],
        settings: Sequence[str] | None = None,
    ) -> None:
        self.output = output
        if settings is None:
            settings = (*SETTINGS, f"batch_size={GLOBAL_BATCH // world_size}")
        words = ["train_v2.py", *settings, f"rec={data}", f"output={output}", *words]
        self.log = (output.parent / f"{output.name}.log").open("ab")
        self.processes = start_ranks(words, world_size, self.log, threads=1)

    def wait(self) -> list[int]:
        """Returns exit codes; ranks that outlive a failed one by too long are killed."""
        codes = wait_for(self.processes)
        self.log.close()
        return codes

    def step(self) -> int:
        """Returns the last logged step."""
        path = self.output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except ValueError:
                continue  # being written just now
        return 0

    def is_saving(self) -> bool:
        """Returns whether a checkpoint is being written now."""
        return any(self.output.glob(f"{FOLDER}/*.saving"))


def kill_at_random(run: Run, rng: random.Random, while_saving: bool) -> tuple[str, int]:
    """Kills one rank or all; returns which, and the last logged step.

    Args:
        run: The run.
        rng: Decides step, moment and ranks.
        while_saving: Whether to wait until a checkpoint is being written.
    """
    wanted_step = rng.randrange(1, STEPS - 4)
    while run.step() < wanted_step:
        if any(process.poll() is not None for process in run.processes):
            raise RuntimeError(f"a rank ended before it was killed: see {run.log.name}")
        time.sleep(0.005)
    if while_saving:
        while not run.is_saving() and run.step() < STEPS:
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.1)
    else:
        time.sleep(rng.random() * 0.3)
    everyone = rng.random() < 0.5
    victims = run.processes if everyone else [rng.choice(run.processes)]
    saved = run.is_saving()
    for process in victims:
        process.send_signal(signal.SIGKILL)
    who = "all" if everyone else f"rank {run.processes.index(victims[0])}"
    if while_saving and not saved:
        who += "*"  # the checkpoint was finished a moment too early
    return who, run.step()


def whole_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Reads every tensor of a checkpoint, unsharded."""
    state = {
        name: TensorShard.whole(torch.empty(shape, dtype=dtype), False)
        for name, (shape, dtype) in sharded_io.describe(checkpoint).items()
    }
    sharded_io.read(checkpoint, state, None, True)
    return {name: stored.local for name, stored in state.items()}


def losses(output: Path) -> dict[int, float]:
    """Returns the loss of every logged step."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Returns whether two tensors are equal to the last bit, NaN included."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


def differences(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[str]:
    """Returns names of tensors that are not bit for bit the same."""
    return sorted(
        name
        for name in one.keys() | two.keys()
        if name not in one or name not in two or not same_bits(one[name], two[name])
    )


def leftovers(output: Path) -> list[str]:
    """Returns what lies in the folder besides named, intact checkpoints."""
    folder = output / FOLDER
    known = {LATEST, *(path.name for path in list_checkpoints(folder))}
    found = [path.name for path in folder.iterdir() if path.name not in known]
    for path in list_checkpoints(folder):
        problem = find_corruption(Checkpoint(path, Manifest.read(path)))
        if problem:
            found.append(problem)
    return found


def arrives_unchanged(
    checkpoint: Path, data: Path, world_size: int, words: Sequence[str]
) -> list[str]:
    """Loads a checkpoint on `world_size` ranks, saves it again, and returns what differs."""
    step = step_of(checkpoint)
    output = checkpoint.parent.parent.with_name(f"{checkpoint.parent.parent.name}_resharded")
    words = (*words, f"resume={checkpoint}", f"max_steps={step}")
    codes = Run(output, data, world_size, words).wait()
    if any(codes):
        return [f"loading it on {world_size} ranks ended with {codes}: see {output}.log"]
    again = output / FOLDER / checkpoint.name
    before, after = whole_state(checkpoint), whole_state(again)
    shared = [name for name in before if not name.startswith("ranks/")]
    changed = [name for name in shared if not same_bits(before[name], after[name])]
    facts = [Manifest.read(path).facts["progress"] for path in (checkpoint, again)]
    return changed + ([] if facts[0] == facts[1] else [f"data position {facts}"])


def one_run(
    number: int,
    folder: Path,
    data: Path,
    before: int,
    after: int,
    rng: random.Random,
    while_saving: bool,
    reference: Path,
) -> Result:
    """Starts a run, kills it, starts it again, and compares it.

    Args:
        number: Number of the run.
        folder: Folder of all runs.
        data: Folder of the records.
        before: Number of ranks before the kill.
        after: Number of ranks after it.
        rng: Decides step, moment and ranks.
        while_saving: Whether it is killed while a checkpoint is being written.
        reference: Folder of the uninterrupted run.
    """
    start = time.monotonic()
    kind = "same" if before == after else "changed"
    words = FP64 if kind == "changed" else ()
    output = folder / f"run_{number}"
    run = Run(output, data, before, words)
    who, killed_at = kill_at_random(run, rng, while_saving)
    run.wait()
    intact = list_checkpoints(output / FOLDER)
    resumed_at = step_of(intact[-1]) if intact else 0
    problems: list[str] = []
    if intact and after != before:
        problems += arrives_unchanged(intact[-1], data, after, words)
    codes = Run(output, data, after, (*words, "resume=auto")).wait()
    if any(codes):
        problems.append(f"the restarted run ended with {codes}: see {output}.log")
        return Result(
            str(number),
            kind,
            f"{before}>{after}",
            who,
            killed_at,
            while_saving,
            resumed_at,
            time.monotonic() - start,
            problems,
        )
    problems += leftovers(output)
    expected, found = losses(reference), losses(output)
    if expected.keys() != found.keys():
        problems.append(f"steps {sorted(expected.keys() ^ found.keys())} are missing or too many")
    last = f"step_{STEPS:08d}"
    if kind == "same":
        one, two = (whole_state(each / FOLDER / last) for each in (reference, output))
        problems += differences(one, two)
        problems += [] if expected == found else ["losses differ"]
    else:
        worst = max(abs(found[step] - expected[step]) for step in found)
        problems += [] if worst <= 1e-8 else [f"losses differ by {worst:.1e}"]
    return Result(
        str(number),
        kind,
        f"{before}>{after}",
        who,
        killed_at,
        while_saving and "*" not in who,
        resumed_at,
        time.monotonic() - start,
        problems,
    )


def reference_run(folder: Path, data: Path, world_size: int, words: Sequence[str]) -> Path:
    """Runs without interruption, once per setting, and returns the folder."""
    output = folder / f"reference_{world_size}{'_fp64' if words else ''}"
    if not output.exists():
        codes = Run(output, data, world_size, words).wait()
        if any(codes):
            raise RuntimeError(f"the run that is left alone ended with {codes}: see {output}.log")
    return output


def campaign(same: int, changed: int, seed: int, folder: Path, data: Path) -> list[Result]:
    """Kills `same` and `changed` runs, two of three while saving, and prints a line for each."""
    rng = random.Random(seed)
    print(
        f"{'run':>4} {'kind':8} {'ranks':>6} {'killed':>7} {'moment':>8} {'step':>6} "
        f"{'resumed':>7} {'seconds':>7}"
    )
    results = []
    for number in range(same + changed):
        before = rng.choice([2, 3, 4])
        after = before
        if number >= same:
            before = rng.choice([1, 2, 3, 4])
            after = rng.choice([n for n in (1, 2, 3, 4) if n != before])
        reference = reference_run(folder, data, before, FP64 if number >= same else ())
        result = one_run(number, folder, data, before, after, rng, number % 3 != 2, reference)
        results.append(result)
        print(result.line(), flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three runs, about two minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--keep", type=Path, help="leave the runs' folders here")
    options = parser.parse_args(arguments)
    same, changed = (2, 1) if options.quick else (20, 10)
    with tempfile.TemporaryDirectory(prefix="bench_faults_") as temporary:
        folder = options.keep or Path(temporary)
        data = folder / "faces"
        make_synthetic(data, identities=20, images_per_identity=8, verification_pairs=40, seed=1)
        results = campaign(same, changed, options.seed, folder, data)
    lost = [result for result in results if result.problems]
    saving = sum(result.while_saving for result in results)
    print(
        f"{len(results) - len(lost)} of {len(results)} runs lost nothing; {saving} of them were "
        "killed while a checkpoint was being written"
    )
    if options.json:
        rows = [
            {
                "name": f"kill {result.name}",
                "params": {
                    "kind": result.kind,
                    "ranks": result.ranks,
                    "killed": result.victims,
                    "while_saving": result.while_saving,
                    "killed_at_step": result.killed_at_step,
                    "resumed_at_step": result.resumed_at_step,
                    "problems": result.problems,
                },
                "median_ms": 1000 * result.seconds,
            }
            for result in results
        ]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
