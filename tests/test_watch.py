"""Watch: collapse is found, a saved watch resumes, and the policy decides."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arcshard.head.batch import mean_pairwise_cosine
from arcshard.losses import CosFace
from arcshard.partial_fc import PartialFC
from training.divergence import (
    COLLAPSE_STEPS,
    READ_AT_LEAST_EVERY,
    SETTLE_STEPS,
    Diverged,
    DivergenceMonitor,
    DivergencePolicy,
    RollBack,
    StepStats,
)
from training.step import StepOutcome

CPU = torch.device("cpu")


def outcome(loss: float, bad: bool = False) -> StepOutcome:
    return StepOutcome(torch.tensor(loss), torch.tensor(1.0), torch.tensor(bad), torch.tensor(1.0))


def watch_of(losses: list[float]) -> DivergenceMonitor:
    watch = DivergenceMonitor(CPU)
    for loss in losses:
        watch.observe(outcome(loss, bad=not math.isfinite(loss)))
    return watch


def test_a_finite_loss_of_a_bad_step_counts_in_the_mean_loss():
    watch = DivergenceMonitor(CPU)
    watch.observe(outcome(5.0))
    watch.observe(outcome(7.0, bad=True))  # finite loss, non-finite gradient
    report = watch.report()
    assert (report.loss, report.bad_steps) == (6.0, 1)


@given(
    st.lists(st.sampled_from([1.0, 4.0, 900.0, math.nan]), min_size=2, max_size=40),
    st.data(),
)
def test_a_saved_watch_goes_on_as_if_it_had_not_been_interrupted(losses, data):
    losses = [4.0] * SETTLE_STEPS + losses
    cut = data.draw(st.integers(1, len(losses) - 1))
    whole = watch_of(losses)
    first = watch_of(losses[:cut])
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    filled, loaded = watch_of([7.0]), watch_of([7.0])
    for name, tensor in filled.state_dict().items():
        tensor.copy_(saved[name])  # as torch.distributed.checkpoint loads
    loaded.load_state_dict(saved)
    expected = whole.report()
    for watch in (filled, loaded):
        for loss in losses[cut:]:
            watch.observe(outcome(loss, bad=not math.isfinite(loss)))
        for ours, theirs in zip(watch.report(), expected, strict=True):
            assert ours == theirs or (math.isnan(ours) and math.isnan(theirs))


def test_a_watch_that_an_earlier_version_saved_goes_on():
    """It also counted loss spikes: 4 of them, at most 31.5, and a mean and a variance of 298."""
    spikes, steady = [4.0, 31.5], [298.0, 4.2, 0.1]
    saved = [300.0, 12.0, 2.0, 3.0, 2.0, 290.0, *spikes, 1.0, *steady, 0.995, 99.0]
    watch = DivergenceMonitor(CPU)
    watch.load_state_dict({"tally": torch.tensor(saved, dtype=torch.float64)})
    watch.observe(outcome(math.nan, bad=True), torch.tensor(0.998, dtype=torch.float64))
    expected = StepStats(
        loss=6.0,
        bad_steps=4,
        longest_streak=2,
        grad_norm=1.0,
        loss_scale=1.0,
        longest_ended_ago=0,
        mean_pairwise_cosine=0.998,
        alike_streak=100,
    )
    assert watch.report()[:-1] == expected[:-1]  # NaN, without a teacher
    assert watch.state_dict()["tally"].shape == (len(saved),)


def test_a_saved_watch_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\), this version's"):
        DivergenceMonitor(CPU).load_state_dict({"tally": torch.zeros(3, dtype=torch.float64)})


def test_steps_that_wait_on_the_device_are_bounded():
    watch = watch_of([1.0] * (READ_AT_LEAST_EVERY + 5))
    assert len(watch._unread) == 5
    assert watch.report().loss == 1.0


def collapsed(watch: DivergenceMonitor, steps: int, value: float = 0.999) -> StepStats:
    for _ in range(steps):
        watch.observe(outcome(3.0), torch.tensor(value))
    return watch.report()


def test_a_collapse_that_lasts_ends_the_run():
    watch = DivergenceMonitor(CPU)
    report = collapsed(watch, SETTLE_STEPS + COLLAPSE_STEPS - 1)
    assert report.alike_streak == COLLAPSE_STEPS - 1
    DivergencePolicy(3).decide(report, 699, 0.1)
    report = collapsed(watch, 1)
    with pytest.raises(Diverged, match=r"for 500 steps the embeddings .*mean cosine 0\.9990"):
        DivergencePolicy(3).decide(report, 700, 0.1)


def test_one_step_with_different_embeddings_ends_a_collapse():
    watch = DivergenceMonitor(CPU)
    collapsed(watch, 600)
    assert collapsed(watch, 1, 0.4).alike_streak == 0
    watch.observe(outcome(3.0))  # unknown
    report = watch.report()
    assert report.alike_streak == 0
    assert math.isnan(report.mean_pairwise_cosine)


def test_alikeness_is_the_mean_cosine_of_different_rows():
    rows = torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64).abs())
    real = torch.tensor([True, True, False, True, True])
    cosines = (rows[real] @ rows[real].T).flatten()[:-1].view(3, 5)[:, 1:]  # off the diagonal
    assert float(mean_pairwise_cosine(rows, real)) == pytest.approx(float(cosines.mean()))
    assert float(mean_pairwise_cosine(rows[:1].repeat(4, 1), torch.ones(4, dtype=torch.bool))) == (
        pytest.approx(1.0)
    )
    for _ in range(100):  # a single real row, whatever the rounding of its length
        others = torch.nn.functional.normalize(torch.randn(5, 3, dtype=torch.float64))
        assert float(mean_pairwise_cosine(others, torch.arange(5) == 0)) == 0.0
    assert math.isnan(float(mean_pairwise_cosine(rows * math.nan, real)))


def _alikeness_of_the_head(rank: int, world_size: int, embeddings: torch.Tensor) -> float:
    head = PartialFC(CosFace(), 4, 10, dtype=torch.float64)
    assert head.mean_pairwise_cosine is None
    share = embeddings.tensor_split(world_size)[rank]
    head(share, torch.arange(len(share)))
    assert head.mean_pairwise_cosine is not None
    return float(head.mean_pairwise_cosine)


def test_the_head_tells_every_rank_the_alikeness_of_the_global_batch(ranks):
    embeddings = torch.randn(5, 4, dtype=torch.float64) + 1
    unit = torch.nn.functional.normalize(embeddings)
    expected = float(mean_pairwise_cosine(unit, torch.ones(5, dtype=torch.bool)))
    answers = ranks.run(3, _alikeness_of_the_head, embeddings)
    assert answers == pytest.approx([expected] * 3)
    assert len(set(answers)) == 1


BAD = StepStats(2.0, 4, 4, 1.0, 1.0, longest_ended_ago=3)


def test_the_bad_steps_of_a_roll_back_are_the_longest_row():
    policy = DivergencePolicy(4, True, max_rollbacks=1)
    with pytest.raises(RollBack, match="4 steps in a row") as caught:
        policy.decide(BAD, 100, 0.1)
    assert caught.value.bad_steps == range(93, 97)
    assert caught.value.number == 1
    with pytest.raises(Diverged, match=r"rolled back 1 times already \(max_rollbacks=1\)"):
        policy.decide(BAD, 100, 0.1)


def test_the_range_a_watch_reports_is_where_the_bad_steps_were():
    losses = [1.0] * 10 + [math.nan] * 2 + [1.0] * 3 + [math.nan] * 3 + [1.0] * 4
    with pytest.raises(RollBack) as caught:
        DivergencePolicy(3, rolls_back=True).decide(watch_of(losses).report(), len(losses), 0.1)
    assert caught.value.bad_steps == range(15, 18)


def test_a_streak_over_two_reports_keeps_its_beginning():
    watch = watch_of([1.0, math.nan, math.nan])
    DivergencePolicy(3, rolls_back=True).decide(watch.report(), 3, 0.1)
    watch.observe(outcome(math.nan, bad=True))
    with pytest.raises(RollBack) as caught:
        DivergencePolicy(3, rolls_back=True).decide(watch.report(), 4, 0.1)
    assert caught.value.bad_steps == range(1, 4)


def test_stop_is_the_default_and_fewer_bad_steps_are_no_end():
    with pytest.raises(Diverged, match="max_bad_steps=4"):
        DivergencePolicy(4).decide(BAD, 100, 0.1)
    DivergencePolicy(5).decide(BAD, 100, 0.1)
