"""A run that is interrupted and resumed is the run that was not.

Bit for bit on the same number of ranks; in float64 with frozen batch norm on any other number.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import unittest.mock
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.base import Config
from tests.conftest import RankFailure, Ranks
from tests.helpers import is_pending, wait_until
from tests.run_helpers import (
    CHECKPOINTED_RUN,
    EXACT,
    assert_same,
    copy_of_run,
    whole_run,
    write_pairs,
)
from train_v2 import run_on
from training.checkpoint import checkpointer as checkpoints
from training.checkpoint.checkpointer import (
    FOLDER,
    Checkpoint,
    Manifest,
    list_checkpoints,
    resolve_pointer,
)
from training.checkpoint_manager import CheckpointManager, Stopped
from training.divergence import DivergencePolicy, StepStats
from training.metrics_logger import JsonlWriter
from training.state import Progress
from training.validation import Validation
from utils.config import load_config
from utils.distributed import DistContext

ROOT = Path(__file__).resolve().parent.parent
LONG = partial(pytest.param, marks=pytest.mark.slow)  # run by `make test-all` only
LONG_VARIANTS = ("softmax with bias, clipped, fp16", "magface, host centers")
VARIANTS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "sampled, adamw": {"optimizer": "adamw", "lr": 1e-3, "sample_rate": 0.3},
    "adaface, accumulated": {"loss": "adaface", "gradient_acc": 2, "num_epoch": 3},
    "curricularface, bf16 centers": {"loss": "curricularface", "head_weight_dtype": "bf16"},
    "magface, host centers": {"loss": "magface", "sample_rate": 0.5, "head_offload": True},
    "dropout, autograd": {"dropout": 0.4, "head_update": "autograd", "loss": "elasticface_arc"},
    "softmax with bias, clipped, fp16": {
        "loss": "softmax",
        "precision": "fp16",
        "lr": 0.01,
        "max_steps": 8,
    },
    "sub-centers, cosine, photometric": {
        "loss": "subcenter_arcface",
        "margin_list": (1.0, 0.5, 0.0),
        "lr_schedule": "cosine",
        "augment": ["photometric"],
    },
}


@pytest.mark.parametrize(
    ("world_size", "variant"),
    [(n, "sgd") for n in (1, 2, 3)]
    + [
        (LONG if name in LONG_VARIANTS else pytest.param)(1 + i % 3, name)
        for i, name in enumerate(VARIANTS)
        if i
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    ranks: Ranks, tmp_path: Path, world_size: int, variant: str
) -> None:
    changes = {"max_steps": 12, **VARIANTS[variant], "frequent": 2}  # an epoch has 8
    left_alone = ranks.run(world_size, whole_run, str(tmp_path / "run"), changes)
    resumed = copy_of_run(tmp_path / "run", tmp_path / "resumed", 5)
    again = ranks.run(world_size, whole_run, str(resumed), {**changes, "resume": "auto"})
    assert_same(again, left_alone)


@pytest.mark.parametrize(
    ("before", "after", "sample_rate"),
    [(1, 2, 1.0), (2, 3, 0.0), (3, 1, 1.0), LONG(4, 3, 1.0), LONG(2, 4, 1.0)],
)
def test_on_another_number_of_ranks_the_losses_are_those_of_the_uninterrupted_run(
    ranks: Ranks, tmp_path: Path, before: int, after: int, sample_rate: float
) -> None:
    # r = 0: only the batch's own classes, so that the sample does not depend on the ranks
    changes = {**EXACT, "max_steps": 12, "sample_rate": sample_rate}
    left_alone = ranks.run(before, whole_run, str(tmp_path / "run"), changes)
    resumed = copy_of_run(tmp_path / "run", tmp_path / "resumed", 5)
    again = ranks.run(after, whole_run, str(resumed), {**changes, "resume": "auto"})
    expected = left_alone[0]["losses"]
    assert len(expected) == 12
    for step, loss in again[0]["losses"].items():
        assert loss == pytest.approx(expected[step], rel=0, abs=1e-8)
    assert again[0]["losses"].keys() == expected.keys()
    for i in range(2):  # centers and momentum, joined over the ranks
        whole = torch.cat([each["head"][i] for each in again])
        torch.testing.assert_close(
            whole, torch.cat([each["head"][i] for each in left_alone]), rtol=0, atol=1e-8
        )


def state_after_loading(rank: int, world_size: int, folder: str, changes: dict[str, Any]) -> Any:
    """Head and its state right after resuming: max_steps is where it was saved."""
    return whole_run(rank, world_size, folder, {**changes, "resume": "auto"})["head"]


@pytest.mark.parametrize(("before", "after"), [(3, 4), (4, 1), (1, 3)])
def test_centers_momentum_and_step_counts_arrive_at_their_owner_unchanged(
    ranks: Ranks, tmp_path: Path, before: int, after: int
) -> None:
    changes = {
        "max_steps": 7,
        "optimizer": "adamw",
        "sample_rate": 0.4,
        "sub_centers": 2,
        "head_state_dtype": "bf16",
        "num_classes": 29,
    }
    saved = ranks.run(before, whole_run, str(tmp_path), changes)
    loaded = ranks.run(after, state_after_loading, str(tmp_path), changes)
    for i in range(4):  # weight, exp_avg, exp_avg_sq, step
        assert torch.equal(
            torch.cat([each["head"][i] for each in saved]), torch.cat([each[i] for each in loaded])
        )


def test_batch_statistics_become_their_mean_on_another_number_of_ranks(
    ranks: Ranks, tmp_path: Path
) -> None:
    changes = {"max_steps": 6, "checkpoint_every": 3}
    whole = ranks.run(2, whole_run, str(tmp_path / "run"), changes)
    resumed = copy_of_run(tmp_path / "run", tmp_path / "resumed", 6)
    (alone,) = ranks.run(1, whole_run, str(resumed), {**changes, "resume": True})
    assert alone["backbone"] == whole[0]["backbone"]  # the end of a run averages them, too


def test_metrics_of_steps_that_are_run_again_are_not_told_twice(
    ranks: Ranks, tmp_path: Path
) -> None:
    ranks.run(1, whole_run, str(tmp_path / "run"), {"max_steps": 9})
    resumed = copy_of_run(tmp_path / "run", tmp_path / "resumed", 5)
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # the line a killed process was writing
    ranks.run(1, whole_run, str(resumed), {"max_steps": 9, "resume": "auto"})
    lines = (resumed / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 10))
    assert len((resumed / "metrics_discarded.jsonl").read_text().splitlines()) == 5


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: -len(content) // 3] if how == "truncated" else content)
    if how == "missing":
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
@pytest.mark.parametrize("name", ["checkpoint.json", ".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_is_used(
    ranks: Ranks, tmp_path: Path, name: str, how: str, damaged_run: tuple[Path, Any]
) -> None:
    run, left_alone = damaged_run
    folder = copy_of_run(run, tmp_path / "run", 10)
    damage(folder / FOLDER / "step_00000010" / name, how)
    again = ranks.run(2, whole_run, str(folder), {"resume": "auto", "max_steps": 12})
    assert_same(again, left_alone)
    path = folder / FOLDER / "step_00000010.damaged"
    with pytest.raises(RankFailure) as refused:
        ranks.run(2, whole_run, str(tmp_path / "new"), {"resume": str(path), "max_steps": 12})
    wanted = "no usable checkpoint" if (name, how) == ("checkpoint.json", "missing") else name
    assert len(refused.value.errors) == 2
    assert all(wanted in str(error) for error in refused.value.errors.values())


@pytest.fixture(scope="module")
def damaged_run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run of 12 steps on 2 ranks with checkpoints at 5, 8, 10 and 12."""
    folder = tmp_path_factory.mktemp("damaged") / "run"
    return folder, ranks.run(2, whole_run, str(folder), {"max_steps": 12})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_classes": 24}, "num_classes was 23, is 24"),
        ({"embedding_size": 8}, "embedding_size was 16, is 8"),
        ({"network": "mbf"}, "network was 'r_nano', is 'mbf'"),
        ({"batch_size": 3}, "global_batch was 12, is 6; set batch_size and gradient_acc"),
        ({"num_image": 100}, "num_images was 96, is 100"),
        ({"optimizer": "adamw"}, "optimizer was 'sgd', is 'adamw'"),
        ({"seed": 1}, "seed was 2048, is 1"),
    ],
)
def test_what_would_be_another_run_is_refused_with_the_difference_named(
    ranks: Ranks, tmp_path: Path, damaged_run: tuple[Path, Any], changes: Any, words: str
) -> None:
    folder = copy_of_run(damaged_run[0], tmp_path / "run", 12)
    with pytest.raises(RankFailure) as refused:
        ranks.run(2, whole_run, str(folder), {"resume": "auto", **changes})
    assert all(words in str(error) for error in refused.value.errors.values())
    assert len(list_checkpoints(folder / FOLDER)) == 4


def test_ranks_batch_accumulation_workers_and_output_may_change(
    ranks: Ranks, tmp_path: Path, damaged_run: tuple[Path, Any]
) -> None:
    run, _ = damaged_run
    changes = {
        "resume": str(run),
        "batch_size": 2,
        "gradient_acc": 3,
        "num_workers": 0,
        "max_steps": 14,
    }
    again = ranks.run(2, whole_run, str(tmp_path / "elsewhere"), changes)
    assert sorted(again[0]["losses"]) == [13, 14]
    elastic = {"resume": str(run), "global_batch_size": 12, "batch_size": 4, "max_steps": 14}
    again = ranks.run(1, whole_run, str(tmp_path / "elastic"), elastic)
    assert sorted(again[0]["losses"]) == [13, 14]


def test_the_newest_are_kept_and_the_pointer_names_the_last(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, whole_run, str(tmp_path), {"checkpoint_every": 1, "keep_checkpoints": 2})
    folder = tmp_path / FOLDER
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000015", "step_00000016"]
    assert resolve_pointer(folder, "latest") == folder / "step_00000016"
    assert Manifest.read(folder / "step_00000016").facts["progress"]["step"] == 16
    assert {p.name for p in folder.iterdir()} == {"latest", "step_00000015", "step_00000016"}


def words_for(folder: Path, *words: str) -> list[str]:
    """CHECKPOINTED_RUN on a command line, with changes."""
    settings = {**CHECKPOINTED_RUN, "output": folder, "margin_list": "[1,0,0.2]"}
    given = [f"{key}={value}" for key, value in settings.items()]
    return ["configs/demo", "val_targets=[]", "lr_base_batch=None", *given, *words]


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "train_v2.py", *words_for(folder, *words)]


def run_of_command(rank: int, world_size: int, folder: Path, words: tuple[str, ...]) -> None:
    """What `command` does, in this process, which has all modules loaded."""
    config, *given = words_for(folder, *words)
    cfg = load_config(config, given)
    folder.mkdir(exist_ok=True)
    run_on(cfg, DistContext(rank, rank, world_size, torch.device("cpu")), folder)


def assert_same_model(run: Path, other: Path, name: str = "model.pt") -> None:
    """Both runs have the same weights, bit for bit."""
    weights = [torch.load(folder / name, weights_only=True) for folder in (run, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def wait_for_step(folder: Path, step: int) -> None:
    """Until the run has logged `step`."""
    path = folder / "metrics.jsonl"
    wait_until(lambda: path.exists() and f'"step": {step},' in path.read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, LONG(signal.SIGINT), LONG(signal.SIGUSR1)])
def test_a_signal_saves_ends_with_code_4_and_the_run_goes_on_exactly(
    ranks: Ranks, tmp_path: Path, number: signal.Signals
) -> None:
    words = ("num_epoch=40", "max_steps=80", "checkpoint_every=0")
    ranks.run(1, run_of_command, tmp_path / "whole", words)
    process = subprocess.Popen(
        command(tmp_path / "run", *words), cwd=ROOT, env=environment(), stderr=subprocess.PIPE
    )
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(number)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 4
    assert f"stopped by {number.name}" in text.decode()
    assert len(list_checkpoints(tmp_path / "run" / FOLDER)) == 1
    ranks.run(1, run_of_command, tmp_path / "run", (*words, "resume=auto"))
    assert_same_model(tmp_path / "run", tmp_path / "whole")


def fill(folder: Path) -> Path:
    """A file that takes all room that is left; it grows if it is there."""
    ballast = folder / "ballast"
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(2**16)) == 2**16:
            pass
    return ballast


def test_a_disk_that_is_full_for_a_while_costs_nothing_but_the_checkpoints_of_that_while(
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip("a small file system of its own can only be mounted by root")
    try:
        words = (
            "num_epoch=40",
            "checkpoint_every=3",
            "keep_checkpoints=2",
            "max_failed_saves=9999",
            "max_steps=100",
        )
        run = disk / "run"
        process = subprocess.Popen(
            command(run, *words), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
        )
        wait_for_step(run, 10)
        lines: Iterator[str] = iter(process.stderr or ())
        told: list[str] = []
        while not any("THE CHECKPOINT" in line for line in told):
            ballast = fill(disk)  # again and again: a checkpoint taken away leaves room
            told.append(next(lines, ""))
            assert told[-1], f"it ended: {''.join(told)}"
        failed = [line for line in told if "COULD NOT BE WRITTEN" in line]
        assert all("No space left" in line for line in failed)  # of model.pt, too
        for path in list_checkpoints(run / FOLDER):
            if path.exists():  # none that carries a name is damaged
                assert checkpoints.find_corruption(Checkpoint(path, Manifest.read(path))) is None
        ballast.unlink()
        assert "done after 100 steps" in "".join(lines)
        assert process.wait(timeout=60) == 0
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
        assert steps == list(range(1, 101))
        kept = [path.name for path in list_checkpoints(run / FOLDER)]
        assert len(kept) == 2
        assert kept[-1] == "step_00000100"
        assert not list(run.glob(f"{FOLDER}/*.saving"))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


class FullDisk(io.BytesIO):
    """Takes `room` bytes and no more, as a file on a disk that is full."""

    room = 0

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = super().write(data[: self.room])
        self.room -= taken
        return taken


@pytest.mark.parametrize("room", [0, 1, 20])
def test_metrics_wait_in_memory_while_the_disk_is_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    journal = JsonlWriter(tmp_path, 0)
    journal._file.close()
    journal._file = disk = FullDisk()
    disk.room = room
    assert not journal.write({"step": 1, "text": "longer than the room that is left"})
    assert not journal.write({"step": 2})
    assert caplog.text.count("cannot be written") == 1
    disk.room = 10**6
    assert journal.write({"step": 3})
    assert [json.loads(line)["step"] for line in disk.getvalue().splitlines()] == [1, 2, 3]


def test_a_run_whose_last_checkpoint_was_not_written_does_not_end_well(
    tmp_path: Path, run_main: Callable[..., tuple[int, str]]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / FOLDER).symlink_to(tmp_path / "a disk that is not mounted" / "there")
    code, said = run_main("max_steps=16", "checkpoint_every=0", "max_failed_saves=100")
    assert code == 6
    assert "could not be written" in said
    assert (folder / "model.pt").exists()


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path, "num_epoch=1000"), cwd=ROOT, env=environment(), stderr=subprocess.PIPE
    )
    wait_for_step(tmp_path, 2)
    process.send_signal(signal.SIGSTOP)  # both arrive before a step can end
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: not is_pending(process.pid, signal.SIGINT))  # they do not become one
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def run_that_is_stopped_while_verifying(
    rank: int, world_size: int, folder: str, changes: dict[str, Any]
) -> int:
    """A signal reaches the last rank at its second batch of the verification of step 6."""
    world = DistContext(rank, rank, world_size, torch.device("cpu"))
    own = {"batch_size": 12 // world_size, "output": folder}
    cfg = Config(**{**CHECKPOINTED_RUN, **own, **changes})
    Path(folder).mkdir(exist_ok=True)
    asked: list[int] = []
    progress: list[Progress] = []

    def is_asked(keeper: CheckpointManager) -> bool:
        asked.append(progress[0].step)
        return rank == world_size - 1 and asked.count(6) > 1

    real_init = Validation.__init__

    def remember(self: Validation, *arguments: Any, **options: Any) -> None:
        real_init(self, *arguments, **options)
        progress.append(self.progress)

    with (
        unittest.mock.patch.object(CheckpointManager, "is_asked_to_stop", is_asked),
        unittest.mock.patch.object(Validation, "__init__", remember),
        pytest.raises(Stopped) as stopped,
    ):
        run_on(cfg, world, Path(folder))
    assert "the state is saved" in str(stopped.value)
    return max(asked)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "eval" in line]


@pytest.mark.parametrize("max_steps", [6, 9])
def test_a_signal_during_a_verification_stops_all_ranks_and_it_is_made_good(
    ranks: Ranks, tmp_path: Path, max_steps: int
) -> None:
    write_pairs(tmp_path)
    changes = {
        "verbose": 3,
        "val_targets": ["pairs"],
        "val_dir": str(tmp_path),
        "val_batch_size": 4,
        "max_steps": max_steps,
        "checkpoint_every": 0,
    }
    left_alone = ranks.run(2, whole_run, str(tmp_path / "whole"), changes)
    folder = tmp_path / "run"
    steps = ranks.run(2, run_that_is_stopped_while_verifying, str(folder), changes)
    assert steps == [6, 6]
    assert [path.name for path in list_checkpoints(folder / FOLDER)][-1] == "step_00000006"
    assert [line["step"] for line in evaluations(folder)] == [3]
    again = ranks.run(2, whole_run, str(folder), {**changes, "resume": "auto"})
    assert_same(again, left_alone)
    assert evaluations(folder) == evaluations(tmp_path / "whole")
    for name in ("model.pt", "model_best.pt"):
        assert_same_model(folder, tmp_path / "whole", name)


class GivesUpOnce(DivergencePolicy):
    """Finds step 7 bad, the first time."""

    def _trouble(
        self, report: StepStats, step: int, learning_rate: float
    ) -> tuple[str, range] | None:
        if step == 7 and not self.rollbacks:
            return "diverged: made up", range(6, 7)
        return super()._trouble(report, step, learning_rate)


def run_that_rolls_back(rank: int, world_size: int, folder: str, changes: dict[str, Any]) -> Any:
    with unittest.mock.patch("train_v2.DivergencePolicy", GivesUpOnce):
        return whole_run(rank, world_size, folder, changes)["losses"]


def test_a_rollback_goes_to_the_last_good_checkpoint_and_past_the_bad_data(
    ranks: Ranks, tmp_path: Path
) -> None:
    ranks.run(2, run_that_rolls_back, str(tmp_path), {"on_divergence": "rollback"})
    progress = Manifest.read(list_checkpoints(tmp_path / FOLDER)[-1]).facts["progress"]
    assert (progress["step"], progress["rollbacks"]) == (16, 1)
    assert progress["position"] == 18  # back from 7 to 5, past the data of step 6
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines] == list(range(1, 17))


def test_without_a_checkpoint_a_divergence_ends_the_run(ranks: Ranks, tmp_path: Path) -> None:
    changes = {"on_divergence": "rollback", "checkpoint_every": 0, "num_epoch": 3}
    with pytest.raises(RankFailure) as failed:
        ranks.run(2, run_that_rolls_back, str(tmp_path), changes)
    assert all("no checkpoint to go back to" in str(e) for e in failed.value.errors.values())


def test_a_dry_run_checks_everything_and_leaves_nothing_behind(
    tmp_path: Path, run_main: Callable[..., tuple[int, str]]
) -> None:
    before = list(tmp_path.iterdir())
    code, said = run_main("--dry-run")
    assert code == 0
    assert "dry run: two steps done" in said
    assert list(tmp_path.iterdir()) == before


def test_a_killed_rank_ends_the_others_and_the_run_goes_on_exactly(
    ranks: Ranks, tmp_path: Path
) -> None:
    """One killed run of benchmarks/bench_faults.py, by torchrun, which restarts it by itself."""
    words = ("batch_size=6", "num_epoch=40", "max_steps=60")  # a second or two to be killed in
    ranks.run(2, run_of_command, tmp_path / "whole", words)
    python, *rest = command(tmp_path / "run", *words)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"]
    process = subprocess.Popen(
        [python, *launch, "--standalone", *rest],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        # one store per attempt, as scripts/launch/ has it: gloo finds no dead addresses
        env=environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
    )
    wait_for_step(tmp_path / "run", 7)
    listed = subprocess.run(
        ["pgrep", "-f", f"output={tmp_path / 'run'}"], capture_output=True, text=True
    )
    workers = [int(pid) for pid in listed.stdout.split() if int(pid) != process.pid]
    saved = tmp_path / "run" / FOLDER  # written beside the steps
    wait_until(lambda: process.poll() is not None or bool(list_checkpoints(saved)))
    assert process.poll() is None
    os.kill(workers[-1], signal.SIGKILL)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 0, text.decode()
    assert "resuming at step" in text.decode()
    assert_same_model(tmp_path / "run", tmp_path / "whole")
