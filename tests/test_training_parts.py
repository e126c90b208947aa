"""Schedule, precision and watch: small pure parts of the loop."""

from __future__ import annotations

import math
import signal
from types import SimpleNamespace

import pytest
import torch

from training.checkpoint_manager import CheckpointManager, Stopped
from training.divergence import Diverged, DivergenceMonitor, DivergencePolicy, RollBack
from training.precision import choose_precision
from training.schedule import Schedule
from training.state import Progress
from training.step import StepOutcome
from utils.distributed import DistContext


def test_warm_up_rises_from_zero_in_a_straight_line():
    schedule = Schedule(0.4, 100, 10)
    assert [schedule(step) for step in range(11)] == pytest.approx([0.04 * s for s in range(11)])


@pytest.mark.parametrize(
    ("kind", "middle", "end"), [("polynomial", 0.25, 0.0), ("cosine", 0.5, 0.0), ("constant", 1, 1)]
)
def test_the_schedule_falls_as_its_name_says(kind, middle, end):
    schedule = Schedule(1.0, 110, 10, kind)
    assert schedule(10) == 1.0
    assert schedule(60) == pytest.approx(middle)
    assert schedule(110) == pytest.approx(end, abs=1e-12)
    rates = [schedule(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_without_warm_up_the_first_step_has_the_peak():
    assert Schedule(0.1, 10)(0) == 0.1


@pytest.mark.parametrize("arguments", [(1.0, 10, 11), (1.0, 10, -1), (1.0, 10, 1, "linear")])
def test_an_impossible_schedule_is_refused(arguments):
    with pytest.raises(ValueError, match=r"warmup_steps|kind"):
        Schedule(*arguments)


@pytest.mark.parametrize(
    ("wanted", "fp16", "device", "name", "warns"),
    [
        (None, False, "cpu", "fp32", False),
        (None, True, "cuda", "fp16", False),
        (None, True, "cpu", "fp32", True),
        ("bf16", True, "cpu", "bf16", False),
        ("fp16", False, "cpu", "fp16", False),
    ],
)
def test_an_explicit_precision_wins_and_fp16_alone_depends_on_the_device(
    wanted, fp16, device, name, warns
):
    precision, warning = choose_precision(wanted, fp16, torch.device(device))
    assert precision.name == name
    assert precision.needs_scaler == (name == "fp16")
    assert bool(warning) == warns


def outcome(loss: float, bad: bool, scale: float = 1.0) -> StepOutcome:
    return StepOutcome(
        torch.tensor(loss), torch.tensor(1.0), torch.tensor(bad), torch.tensor(scale)
    )


def test_the_mean_loss_leaves_bad_steps_out_and_streaks_cross_reports():
    watch = DivergenceMonitor(torch.device("cpu"))
    for loss, bad in ((1.0, False), (math.nan, True), (3.0, False), (math.nan, True)):
        watch.observe(outcome(loss, bad))
    report = watch.report()
    assert (report.loss, report.bad_steps, report.longest_streak) == (2.0, 2, 1)
    for _ in range(2):
        watch.observe(outcome(math.inf, True))
    report = watch.report()
    assert math.isnan(report.loss)
    assert report.longest_streak == 3
    with pytest.raises(Diverged, match="3 steps in a row"):
        DivergencePolicy(3).decide(report, 100, 0.1)
    DivergencePolicy(4).decide(report, 100, 0.1)


def test_a_step_that_only_shrinks_the_loss_scale_is_not_bad():
    watch = DivergenceMonitor(torch.device("cpu"))
    watch.observe(outcome(1.0, True, scale=65536.0))
    assert watch.report().bad_steps == 0
    watch.observe(outcome(1.0, True, scale=1.0))
    assert watch.report().bad_steps == 1


def test_a_signal_at_a_new_best_accuracy_marks_its_checkpoint_as_the_best():
    saved = []

    def save(step, tensors, facts, **options):
        saved.append((step, options))

    manager = CheckpointManager(
        DistContext(0, 0, 1, torch.device("cpu")),
        SimpleNamespace(facts=lambda progress: {}, tensors=dict),
        {},
        SimpleNamespace(save=save, failed_in_a_row=0, is_busy=False, gave_up=False),
        SimpleNamespace(received=signal.SIGTERM),
        every_steps=0,
        every_minutes=0.0,
        is_on=True,
    )
    progress = Progress()
    for score in (0.9, 0.8):
        progress.count_step()
        progress.count_evaluation(score)
    manager.after_step(progress, epoch_ends=False, is_last=False)  # the signal is known from here
    progress.count_step()
    assert progress.count_evaluation(0.95)
    with pytest.raises(Stopped, match="SIGTERM signal at step 3; the state is saved"):
        manager.after_step(progress, epoch_ends=False, is_last=False)
    assert saved == [(3, {"is_best": True, "wait": True})]


def test_progress_counts_steps_scores_and_the_data_that_a_rollback_leaves_out():
    progress = Progress()
    for _ in range(10):
        progress.count_step()
    assert (progress.step, progress.position, progress.is_best) == (10, 10, False)
    assert not progress.count_evaluation(float("nan"))
    assert progress.evaluated_step == 10
    saved = Progress(step=5, position=5, best=0.5, best_step=4, evaluated_step=4)
    progress.go_back(saved, RollBack("diverged", range(6, 9), 1))
    # Of the ten global batches, those up to the bad steps' end are used.
    assert progress == Progress(5, 9, 0.5, 4, 4, 1)
