"""TAR at FAR over all pairs is the dense computation's, to the pair, however it was found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import all_pairs as module
from eval.all_pairs import all_pairs
from eval.metrics import tars_at_fars

pytestmark = pytest.mark.usefixtures("one_thread")

FARS = [0.0, 1e-6, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0]


def _dense(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Every score and whether it is of one person, from the whole matrix in float64."""
    rows, people = first
    columns, others = second or first
    scores = rows.astype(np.float64) @ columns.astype(np.float64).T
    same = people[:, None] == others[None]
    if second is None:
        upper = np.triu_indices(len(rows), 1)
        return scores[upper], same[upper]
    return scores.ravel(), same.ravel()


def _check(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray] | None = None
) -> None:
    scores, same = _dense(first, second)
    found = all_pairs(*first, FARS, against=second, normalize=False)
    for one, far in zip(found, FARS, strict=True):
        assert (one.num_genuine, one.num_impostors) == (same.sum(), (~same).sum())
        if not same.any() or same.all():
            assert math.isnan(one.tar)
            continue
        expected = tars_at_fars(scores, same, [far])[0]
        assert one.tar == expected.tar
        assert one.false_accepts == expected.false_accepts
        accepted = scores > one.score_above
        assert one.true_accepts == np.count_nonzero(accepted & same)
        assert one.false_accepts == np.count_nonzero(accepted & ~same)


def _exact(random: np.random.Generator, count: int, people: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings whose products are small whole numbers: exact in fp32, and full of ties."""
    return (
        random.integers(-2, 3, (count, 6)).astype(np.float32),
        random.integers(0, people, count),
    )


@settings(max_examples=60)
@given(st.integers(2, 60), st.integers(1, 30), st.integers(0, 2**32 - 1), st.booleans())
def test_every_count_is_the_dense_one_ties_included(
    count: int, people: int, seed: int, is_rectangle: bool
) -> None:
    random = np.random.default_rng(seed)
    first = _exact(random, count, people)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 7)
        _check(first, _exact(random, 25, people) if is_rectangle else None)


@pytest.mark.parametrize("kind", ["ties", "floats", "two people", "one score"])
@pytest.mark.parametrize("sampled", [50, 2000])
def test_a_poor_sample_or_little_memory_costs_passes_but_not_exactness(
    kind: str, sampled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 64)
    monkeypatch.setattr(module, "_KEPT", 2000)  # of about 80,000 impostors
    monkeypatch.setattr(module, "_SAMPLED_PAIRS", sampled)
    random = np.random.default_rng(1)
    rows, people = _exact(random, 400, 40)
    if kind == "floats":  # distinct, and exact: few bits each
        rows = (random.integers(-(2**8), 2**8, (400, 6)) / 2**8).astype(np.float32)
    elif kind == "two people":
        people = (np.arange(400) == 399).astype(np.int64) + (np.arange(400) % 7 == 0)
    elif kind == "one score":
        rows = np.ones((400, 6), np.float32)
    _check((rows, people))


def test_one_pass_is_enough_with_a_sample_of_the_usual_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BLOCK", 512)
    monkeypatch.setattr(module, "_KEPT", 800_000)
    monkeypatch.setattr(module, "_SAMPLED_PAIRS", 200_000)
    random = np.random.default_rng(2)
    rows = random.standard_normal((2000, 16)).astype(np.float32)
    computed: list[int] = []
    all_pairs(rows, np.arange(2000) // 4, [1e-6, 1e-3, 0.1], on_block=computed.append)
    assert sum(computed) < 1.5 * 2000**2 / 2 * 1.3  # one triangle of blocks, and the diagonal


def test_lengths_are_taken_off_unless_told_otherwise() -> None:
    rows = np.array([[3.0, 0.0], [0.0, 0.5], [0.6, 0.8], [8.0, 6.0]])
    people = np.array([0, 1, 1, 0])
    (one,) = all_pairs(rows, people, [0.0])
    assert (one.tar, one.false_accepts, one.num_genuine, one.num_impostors) == (0.0, 0, 2, 4)
    assert one.score_above == pytest.approx(0.96)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_an_embedding_without_direction_is_named(bad: float) -> None:
    rows = np.ones((9, 4))
    rows[5] = bad
    with pytest.raises(ValueError, match="embedding 5 is zero or not finite"):
        all_pairs(rows, np.arange(9), [0.1])


def test_bad_arguments_are_errors() -> None:
    with pytest.raises(ValueError, match="far is 2"):
        all_pairs(np.ones((3, 2)), np.arange(3), [2.0])
    with pytest.raises(ValueError, match="one person per row"):
        all_pairs(np.ones((3, 2)), np.arange(4), [0.1])
    with pytest.raises(ValueError, match="numbers against 3"):
        all_pairs(np.ones((3, 2)), np.arange(3), [0.1], against=(np.ones((3, 3)), np.arange(3)))
