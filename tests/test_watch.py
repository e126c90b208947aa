"""Watch: spikes and collapse are found, a saved watch goes on, and the policy decides."""

from __future__ import annotations

import math
import random

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
    SPIKE_FACTOR,
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


def noisy(mean: float, deviation: float, steps: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [max(draw.gauss(mean, deviation), 0.0) for _ in range(steps)]


def test_a_loss_far_above_the_usual_is_a_spike_with_its_height():
    watch = watch_of([*noisy(5.0, 0.3, SETTLE_STEPS), 20.0, *noisy(5.0, 0.3, 10), 12.0])
    report = watch.report()
    assert (report.spikes, report.worst_spike) == (2, 20.0)
    assert report.usual_loss == pytest.approx(5.0, abs=0.2)
    watch.observe(outcome(5.0))
    assert watch.report().spikes == 0  # counted once


def test_noise_and_a_falling_loss_have_no_spikes():
    falling = [45 * math.exp(-step / 400) + 0.5 for step in range(3000)]
    noise = noisy(0.0, 0.05, 3000)
    losses = [loss * (1 + part) for loss, part in zip(falling, noise, strict=True)]
    assert watch_of(losses).report().spikes == 0


def test_a_rise_of_many_deviations_but_a_small_share_is_no_spike():
    """Large batches: the deviation is a permille of the mean."""
    assert watch_of([*noisy(5.0, 0.005, 400), 5.2]).report().spikes == 0
    assert watch_of([*noisy(5.0, 0.005, 400), 5.2 * SPIKE_FACTOR]).report().spikes == 1


def test_a_multiple_of_the_mean_within_the_deviations_is_no_spike():
    """Late in a run: mostly 0, now and then a hard image."""
    losses = [1.0 if step % 10 == 0 else 0.01 for step in range(400)]
    assert watch_of(losses).report().spikes == 0


def test_nothing_is_a_spike_while_the_run_settles():
    assert watch_of([*[5.0] * (SETTLE_STEPS - 1), 50.0]).report().spikes == 0
    assert watch_of([*[5.0] * SETTLE_STEPS, 50.0]).report().spikes == 1


def test_a_spike_does_not_hide_the_next_and_a_new_level_is_accepted():
    usual = noisy(5.0, 0.3, 400)
    assert watch_of([*usual, 500.0, 20.0]).report().spikes == 2
    watch = watch_of([*usual, *noisy(20.0, 0.3, 2000)])
    spikes = watch.report().spikes
    assert 1 <= spikes < 200
    for loss in noisy(20.0, 0.3, 300):
        watch.observe(outcome(loss))
    assert watch.report().spikes == 0


def test_bad_steps_do_not_move_the_usual_loss():
    clean, mixed = [5.0] * 300, [5.0, math.nan, math.inf] * 300
    assert watch_of(clean).report().usual_loss == watch_of(mixed).report().usual_loss == 5.0
    watch = DivergenceMonitor(CPU)
    for _ in range(300):
        watch.observe(outcome(5.0))
        watch.observe(outcome(5000.0, bad=True))  # finite loss, non-finite gradient
    report = watch.report()
    assert (report.usual_loss, report.spikes, report.bad_steps) == (5.0, 0, 300)


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
    assert DivergencePolicy(3).decide(report, 699, 0.1) == []
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
    assert DivergencePolicy(3, rolls_back=True).decide(watch.report(), 3, 0.1) == []
    watch.observe(outcome(math.nan, bad=True))
    with pytest.raises(RollBack) as caught:
        DivergencePolicy(3, rolls_back=True).decide(watch.report(), 4, 0.1)
    assert caught.value.bad_steps == range(1, 4)


def test_stop_is_the_default_and_a_spike_only_warns():
    with pytest.raises(Diverged, match="max_bad_steps=4"):
        DivergencePolicy(4).decide(BAD, 100, 0.1)
    assert DivergencePolicy(5).decide(BAD, 100, 0.1) == []
    spiky = BAD._replace(longest_streak=0, spikes=2, worst_spike=31.5, usual_loss=4.25)
    (warning,) = DivergencePolicy(5).decide(spiky, 100, 0.1)
    assert warning.startswith("2 loss spikes since the last line, up to 31.5000 (usual: 4.2500)")
