"""Metrics equal the published scorer per fold and scikit-learn to the bit of its rounding."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve
from sklearn.model_selection import KFold

from eval.metrics import (
    DISTANCE_THRESHOLDS,
    auc,
    bootstrap_intervals,
    eer,
    is_collapsed,
    l2_normalize,
    pair_distances,
    rate_name,
    roc_curve,
    tar_at_far,
    tars_at_fars,
    ten_fold_accuracy,
    validation_rate,
    verification_metrics,
    xnorm,
)
from tests.helpers import GOLDEN


@pytest.fixture(autouse=True)
def _no_numpy_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "eval" / "lfw_part.npz") as file:
        return dict(file)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels with both kinds of pair: random, heavily tied, or separable."""
    count = draw(st.integers(2, 60))
    same = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    same[:2] = True, False
    kind = draw(st.sampled_from(["random", "tied", "separable"]))
    if kind == "tied":
        values = st.integers(0, 3).map(float)
    else:
        values = st.floats(-1, 1, allow_nan=False, width=32)
    scores = np.array(draw(st.lists(values, min_size=count, max_size=count)))
    return (scores + 3 * same if kind == "separable" else scores), same


def _every_threshold(scores: np.ndarray, same: np.ndarray) -> list[tuple[float, float]]:
    """(FAR, TAR) of every rule `score >= t` there is, by counting."""
    rates = [(0.0, 0.0)]
    for threshold in np.unique(scores):
        accepted = scores >= threshold
        rates.append((float(accepted[~same].mean()), float(accepted[same].mean())))
    return rates


# --- the published protocol ---


def test_plain_accuracy_is_the_published_one_in_every_fold(golden: dict[str, np.ndarray]) -> None:
    result = ten_fold_accuracy(golden["embeddings"], golden["issame"])
    np.testing.assert_array_equal(result.accuracies, golden["accuracy_plain_per_fold"])
    assert result.mean == pytest.approx(0.9925, abs=1e-12)


def test_flip_accuracy_is_the_published_one_in_every_fold(golden: dict[str, np.ndarray]) -> None:
    summed = golden["embeddings"] + golden["embeddings_flip"]
    result = ten_fold_accuracy(summed, golden["issame"])
    np.testing.assert_array_equal(result.accuracies, golden["accuracy_flip_per_fold"])
    assert result.std == np.std(golden["accuracy_flip_per_fold"])


def test_all_metrics_of_the_golden_set(golden: dict[str, np.ndarray]) -> None:
    values = verification_metrics(golden["embeddings"], golden["embeddings_flip"], golden["issame"])
    assert values["accuracy"] == pytest.approx(0.9925, abs=1e-12)
    assert values["accuracy_flip"] == pytest.approx(0.995, abs=1e-12)
    assert values["xnorm"] == pytest.approx(float(golden["xnorm"]), rel=1e-6)
    assert values["num_pairs"] == 800
    assert all(type(value) in (int, float) for value in values.values())  # JSON takes them


def test_rates_at_the_400_thresholds_are_the_published_ones(golden: dict[str, np.ndarray]) -> None:
    distances = pair_distances(golden["embeddings"] + golden["embeddings_flip"])
    accepted = distances[:, None] < DISTANCE_THRESHOLDS  # [800, 400]
    rates = [
        (accepted[part][same].mean(0), accepted[part][~same].mean(0))
        for _, part in KFold(10).split(distances)
        for same in [golden["issame"][part]]
    ]
    tpr, fpr = np.mean(rates, axis=0)
    np.testing.assert_allclose(tpr, golden["tpr_mean"], atol=1e-12)
    np.testing.assert_allclose(fpr, golden["fpr_mean"], atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 5), st.integers(5, 33), st.integers(0, 2**32 - 1))
def test_folds_equal_the_protocol_written_as_a_loop(folds: int, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    # Multiples of .05 lie on thresholds, where < and <= differ.
    distances = generator.integers(0, 85, count) * 0.05
    same = generator.random(count) < 0.5
    accuracies, thresholds = [], []
    for others, part in KFold(folds).split(distances):
        correct = [np.sum((distances[others] < t) == same[others]) for t in DISTANCE_THRESHOLDS]
        best = DISTANCE_THRESHOLDS[int(np.argmax(correct))]
        thresholds.append(best)
        accuracies.append(np.mean((distances[part] < best) == same[part]))
    result = ten_fold_accuracy(distances, same, folds)
    np.testing.assert_array_equal(result.accuracies, accuracies)
    np.testing.assert_array_equal(result.thresholds, thresholds)


def test_fewer_pairs_than_folds_is_an_error_that_says_how_many_are_needed() -> None:
    with pytest.raises(ValueError, match="9 pairs cannot be cut into 10 folds"):
        ten_fold_accuracy(np.zeros(9), np.zeros(9, bool))


@pytest.mark.parametrize(
    ("values", "issame", "words"),
    [
        (np.zeros((3, 4)), np.zeros(1, bool), "even number"),
        (np.zeros(12), np.zeros(11, bool), "one label per pair|one value and one label"),
        (np.zeros(12), np.full(12, 2), "something else than True and False"),
        (np.zeros((24, 0)), np.zeros(12, bool), "non-empty"),
    ],
)
def test_wrong_shapes_are_errors(values: np.ndarray, issame: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ten_fold_accuracy(values, issame)


# --- ROC against scikit-learn ---


@settings(max_examples=200, deadline=None)
@given(pairs())
def test_roc_and_auc_are_scikit_learns(data: tuple[np.ndarray, np.ndarray]) -> None:
    scores, same = data
    far, tar, thresholds = sklearn_roc_curve(same, scores, drop_intermediate=False)
    ours = roc_curve(scores, same)
    np.testing.assert_allclose(ours.far, far, rtol=0, atol=1e-15)
    np.testing.assert_allclose(ours.tar, tar, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(ours.thresholds, thresholds)
    assert auc(scores, same) == pytest.approx(roc_auc_score(same, scores), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(pairs())
def test_eer_lies_on_the_roc_and_makes_both_errors_equal(
    data: tuple[np.ndarray, np.ndarray],
) -> None:
    scores, same = data
    far, tar, _ = roc_curve(scores, same)
    rate = eer(scores, same)
    points = np.stack([far, tar], axis=1)
    along = np.diff(points, axis=0)  # the ROC's pieces
    to_point = np.array([rate, 1 - rate]) - points[:-1]
    length = np.sum(along**2, axis=1)
    part = np.clip(np.sum(to_point * along, axis=1) / length, 0, 1)
    distance = np.linalg.norm(to_point - part[:, None] * along, axis=1)
    assert distance.min() < 1e-9


def test_eer_of_known_curves() -> None:
    same = np.array([True, True, False, False])
    assert eer([4, 3, 2, 1], same) == 0
    assert eer([1, 2, 3, 4], same) == 1
    assert eer([4, 2, 3, 1], same) == 0.5
    assert eer([1, 1, 1, 1], same) == 0.5  # one tie: the diagonal


# --- TAR at FAR ---


@settings(max_examples=200, deadline=None)
@given(pairs(), st.sampled_from([0.0, 1e-3, 0.1, 1 / 3, 0.29, 0.5, 0.7, 1.0]))
def test_tar_is_the_largest_whose_far_does_not_exceed_the_target(
    data: tuple[np.ndarray, np.ndarray], target: float
) -> None:
    scores, same = data
    tar, threshold, false_accepts = tar_at_far(scores, same, target)
    assert tar == max(t for f, t in _every_threshold(scores, same) if f <= target)
    accepted = scores >= threshold
    assert accepted[same].mean() == tar
    assert accepted[~same].sum() == false_accepts
    assert false_accepts / np.sum(~same) <= target


def test_the_nearest_roc_point_overstates_tar_and_ours_does_not() -> None:
    # Of 1,900 different pairs one false accept is FAR 5.3e-4, two are 1.05e-3: nearest to 1e-3,
    # but above it. Between the two lie a fifth of the same pairs.
    genuine = np.linspace(0.5, 1.0, 100)
    impostor = np.concatenate([[0.9, 0.6], np.full(1898, 0.1)])
    scores, same = np.concatenate([genuine, impostor]), np.arange(2000) < 100
    far, tar, _ = sklearn_roc_curve(same, scores)
    far, tar = far[::-1], tar[::-1]  # as the published IJB script has them
    nearest = np.argmin(np.abs(far - 1e-3))
    assert far[nearest] > 1e-3
    assert tar[nearest] == 1.0
    assert tar_at_far(scores, same, 1e-3) == (0.8, genuine[20], 1)


def test_equal_scores_are_accepted_together() -> None:
    scores = np.array([0.9, 0.5, 0.5, 0.5, 0.1])
    same = np.array([True, True, True, False, False])
    # At FAR 0 the different pair at .5 keeps the two same pairs at .5 out.
    assert tar_at_far(scores, same, 0.0) == (1 / 3, 0.9, 0)
    assert tar_at_far(scores, same, 0.5) == (1.0, 0.5, 1)


def test_a_rate_that_no_float_product_hits_is_still_reached() -> None:
    # 0.29 * 100 is 28.999..., yet 29 false accepts of 100 do not exceed FAR 0.29.
    scores = np.concatenate([[70.5], np.arange(100.0)])
    same = np.arange(101) == 0
    assert tar_at_far(scores, same, 0.29) == (1.0, 70.5, 29)


def test_golden_ijb_scores_give_the_golden_tars(shared_dir: Path) -> None:
    with np.load(GOLDEN / "eval" / "ijbc_layout.npz") as file:
        golden = dict(file)
    lines = (shared_dir / "data/ijbc_layout/meta/ijbc_template_pair_label.txt").read_text()
    same = np.array([line.split()[2] == "1" for line in lines.splitlines()])
    for prefix in ("", "weak_"):
        tars = [tar_at_far(golden[prefix + "scores"], same, f).tar for f in golden["far"]]
        np.testing.assert_array_equal(tars, golden[prefix + "tar"])


def test_a_far_outside_zero_to_one_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"far is 1\.5; it is a rate"):
        tar_at_far([0.0, 1.0], [True, False], 1.5)


# --- no information ---


def _random_set(pairs: int = 20) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(7)
    return generator.standard_normal((2 * pairs, 8)).astype(np.float32), np.arange(pairs) % 2 == 0


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_makes_every_metric_nan(broken: float) -> None:
    embeddings, same = _random_set()
    flipped = embeddings.copy()
    flipped[17, 3] = broken
    values = verification_metrics(flipped, embeddings, same)
    assert all(math.isnan(value) for key, value in values.items() if key != "num_pairs")
    # Broken mirror images leave the plain accuracy standing.
    values = verification_metrics(embeddings, flipped, same)
    assert not math.isnan(values["accuracy"])
    assert math.isnan(values["accuracy_flip"])
    assert math.isnan(values["tar_at_far_1e-3"])


def test_embeddings_that_are_all_equal_give_nan_and_their_length() -> None:
    _, same = _random_set()
    collapsed = np.tile(np.array([3, 4, 0, 0], np.float32), (40, 1))
    # Rounding noise and another length do not make it information.
    collapsed[::3] *= np.float32(1.1)
    values = verification_metrics(collapsed, collapsed, same)
    assert values["xnorm"] == pytest.approx(5.175, abs=1e-3)
    assert all(
        math.isnan(value) for key, value in values.items() if key not in ("xnorm", "num_pairs")
    )


def test_an_embedding_of_length_zero_has_no_direction() -> None:
    embeddings, same = _random_set()
    embeddings[5] = 0
    assert is_collapsed(embeddings)
    assert np.isnan(pair_distances(embeddings)).tolist() == [i == 2 for i in range(20)]
    assert math.isnan(ten_fold_accuracy(embeddings, same).mean)


def test_a_late_nan_is_found_in_many_embeddings() -> None:
    embeddings = np.random.default_rng(0).standard_normal((140_000, 2)).astype(np.float32)
    assert not is_collapsed(embeddings)
    embeddings[-1, 0] = np.nan
    assert is_collapsed(embeddings)


def test_huge_and_tiny_embeddings_keep_their_direction() -> None:
    rows = np.array([[3e300, 4e300], [3e-300, 4e-300], [3, 4]])
    np.testing.assert_allclose(l2_normalize(rows), [[0.6, 0.8]] * 3, rtol=1e-15)


@pytest.mark.parametrize("same", [np.ones(20, bool), np.zeros(20, bool)])
def test_one_kind_of_pair_only_leaves_the_accuracy_and_nothing_else(same: np.ndarray) -> None:
    embeddings, _ = _random_set()
    values = verification_metrics(embeddings, embeddings, same)
    assert not math.isnan(values["accuracy"])
    assert all(math.isnan(values[key]) for key in ("tar_at_far_1e-3", "auc", "eer"))
    far, tar, _ = roc_curve(np.arange(20.0), same)
    assert np.isnan(far).all() == same.all()
    assert np.isnan(tar).all() == (not same.any())


def test_scores_that_are_not_finite_give_nan() -> None:
    scores, same = np.array([1.0, np.nan, 0.5]), np.array([True, False, False])
    assert math.isnan(auc(scores, same))
    assert math.isnan(eer(scores, same))
    assert math.isnan(tar_at_far(scores, same, 0.1).tar)
    assert np.isnan(roc_curve(scores, same).tar).all()


def test_xnorm_is_the_mean_length_over_all_arrays() -> None:
    assert xnorm([[3.0, 4.0]], [[0.0, 1.0]]) == 3.0
    assert math.isnan(xnorm([[3.0, np.inf]]))


# --- several targets at once, and intervals ---


@settings(max_examples=100, deadline=None)
@given(pairs(), st.lists(st.sampled_from([0.0, 1e-3, 0.1, 0.5, 1.0]), min_size=1, max_size=4))
def test_several_targets_at_once_are_each_by_itself(
    data: tuple[np.ndarray, np.ndarray], targets: list[float]
) -> None:
    scores, same = data
    assert tars_at_fars(scores, same, targets) == [tar_at_far(scores, same, t) for t in targets]


def test_intervals_hold_the_metrics_shrink_with_pairs_and_repeat_with_the_seed() -> None:
    generator = np.random.default_rng(0)
    widths = []
    for count in (200, 5000):
        same = np.arange(count) % 2 == 0
        distances = np.clip(generator.normal(1.8 - 0.7 * same, 0.35), 0, 4)
        found = bootstrap_intervals(distances, same, [0.01, 0.1], resamples=300)
        values = {
            "accuracy": ten_fold_accuracy(distances, same).mean,
            "auc": auc(-distances, same),
            "eer": eer(-distances, same),
            "tar_at_far_1e-2": tar_at_far(-distances, same, 0.01).tar,
            "tar_at_far_1e-1": tar_at_far(-distances, same, 0.1).tar,
        }
        assert found.keys() == values.keys()
        for name, (low, high) in found.items():
            assert low <= values[name] <= high
        widths.append({name: high - low for name, (low, high) in found.items()})
        assert found == bootstrap_intervals(distances, same, [0.01, 0.1], resamples=300)
    assert all(widths[1][name] < 0.5 * widths[0][name] for name in widths[0])


def test_the_interval_of_accuracy_has_the_binomial_width() -> None:
    generator = np.random.default_rng(1)
    same = np.arange(2000) % 2 == 0
    distances = np.where(same, 0.5, 2.5)
    wrong = generator.random(2000) < 0.1
    distances[wrong] = np.where(same, 2.5, 0.5)[wrong]
    low, high = bootstrap_intervals(distances, same, resamples=600)["accuracy"]
    expected = 2 * 1.96 * math.sqrt(0.1 * 0.9 / 2000)
    assert high - low == pytest.approx(expected, rel=0.15)


def test_intervals_of_nothing_are_nan_and_bad_arguments_errors() -> None:
    same = np.array([True, False] * 10)
    found = bootstrap_intervals(np.full(20, np.nan), same, [0.1], resamples=5)
    assert all(math.isnan(value) for pair in found.values() for value in pair)
    found = bootstrap_intervals(np.arange(20.0), np.ones(20, bool), [0.1], resamples=5)
    assert not math.isnan(found["accuracy"][0])
    assert math.isnan(found["auc"][0])
    with pytest.raises(ValueError, match="resamples is 0"):
        bootstrap_intervals(np.arange(20.0), same, resamples=0)


def _published_val(
    distances: np.ndarray, same: np.ndarray, far: float, folds: int
) -> list[tuple[float, float, float]]:
    """(threshold, rate, FAR) of every fold as `calculate_val` finds them, without its crash.

    The threshold is interpolated where the FARs at 0, 0.001, .. first reach `far`.
    """
    grid = np.arange(0, 4, 0.001)
    found = []
    for others, mine in KFold(folds).split(distances):
        rivals = distances[others][~same[others]]
        fars = (rivals[:, None] < grid).mean(0)
        threshold = 0.0
        if fars.max() >= far:
            after = int(np.argmax(fars >= far))
            share = (far - fars[after - 1]) / (fars[after] - fars[after - 1])
            threshold = grid[after - 1] + share * (grid[after] - grid[after - 1])
        accepted = distances[mine] < threshold
        found.append((threshold, accepted[same[mine]].mean(), accepted[~same[mine]].mean()))
    return found


@pytest.mark.parametrize("far", [1e-3, 0.013, 0.11])
@pytest.mark.parametrize("count", [400, 407])
def test_the_validation_rate_is_the_published_one_to_a_step_of_its_grid(
    far: float, count: int
) -> None:
    random = np.random.default_rng(count)
    same = np.arange(count) % 2 == 0
    distances = np.where(same, 0.9, 1.6) + 0.3 * random.standard_normal(count)
    distances = distances.clip(0.01, 3.9)
    ours = validation_rate(distances, same, far)
    published = np.array(_published_val(distances, same, far, 10))
    np.testing.assert_allclose(ours.thresholds, published[:, 0], atol=1e-3)
    # A pair judged otherwise lies within that step; the means then differ by so many pairs.
    near = np.abs(distances[:, None] - ours.thresholds) <= 1e-3
    slack = near.sum() / (count / 2 // 10)
    assert ours.mean == pytest.approx(published[:, 1].mean(), abs=slack / 10 + 1e-12)
    assert ours.far == pytest.approx(published[:, 2].mean(), abs=slack / 10 + 1e-12)
    assert ours.std == pytest.approx(np.std(ours.rates))
    assert 0 < ours.mean < 1


def test_the_validation_rate_keeps_to_the_far_on_the_other_folds(golden: dict) -> None:
    summed, same = golden["embeddings"] + golden["embeddings_flip"], golden["issame"]
    distances = pair_distances(summed)
    for far in (1e-3, 1e-2, 0.1):
        result = validation_rate(distances, same, far)
        for fold, (others, mine) in enumerate(KFold(10).split(distances)):
            rivals = distances[others][~same[others]]
            threshold = result.thresholds[fold]
            assert (rivals < threshold).mean() <= far
            assert (rivals <= threshold).mean() > far  # one more would be too many
            accepted = distances[mine] < threshold
            assert result.rates[fold] == accepted[same[mine]].mean()
            assert result.fars[fold] == accepted[~same[mine]].mean()
    assert validation_rate(distances, same, 1e-3).mean == pytest.approx(0.95)


def test_the_validation_rate_is_nan_where_there_is_none() -> None:
    same = np.arange(100) % 2 == 0
    distances = np.where(same, 0.5, 2.0)
    assert validation_rate(distances, same).mean == 1.0
    assert validation_rate(distances, same, far=1.0).far == 1.0
    sorted_same = np.arange(100) < 50  # folds of one kind
    assert math.isnan(validation_rate(distances, sorted_same).mean)
    distances[3] = np.nan
    assert np.isnan(validation_rate(distances, same).rates).all()
    with pytest.raises(ValueError, match="9 pairs cannot be cut into 10 folds"):
        validation_rate(np.ones(9), same[:9])
    with pytest.raises(ValueError, match=r"far is 2; it is a rate"):
        validation_rate(np.ones(100), same, far=2)


def test_rates_are_spelt_as_keys() -> None:
    names = [rate_name(rate) for rate in (1e-3, 1e-1, 0.05, 1.0, 1e-6, 0.0)]
    assert names == ["1e-3", "1e-1", "5e-2", "1", "1e-6", "0"]


def test_the_published_interpolation_of_val_crashes_where_fars_repeat_and_ours_does_not() -> None:
    # The published `calculate_val` interpolates the threshold over the FARs at the 400 thresholds;
    # at any separable set most of them are equal, which SciPy refuses.
    from scipy.interpolate import interp1d

    same = np.arange(200) % 2 == 0
    distances = np.where(same, 0.5, 2.0) + np.linspace(0, 0.4, 200)
    fars = (distances[:, None] < DISTANCE_THRESHOLDS)[~same].mean(0)
    with pytest.raises(ValueError, match="duplicates"):
        interp1d(fars, DISTANCE_THRESHOLDS, kind="slinear")
    assert tar_at_far(-distances, same, 1e-3).tar == 1.0
