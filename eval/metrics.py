"""Verification metrics: from embeddings or scores of pairs to the numbers that are published.

This module uses numpy only and does not depend on files, models or ranks. Its conventions are:

- `embeddings` are [2N, D]; rows 2i and 2i + 1 are pair i. `issame` is bool [N].
- A *distance* is the squared Euclidean distance of two normalized embeddings, in [0, 4]. A *score*
  is anything where larger means more alike (a cosine, a negated distance).
- A threshold cannot separate pairs with equal scores, so they are accepted together.
- The result is NaN if a score is not finite, if there is no same pair or no different pair, or if
  the embeddings carry no information (`is_collapsed`). Wrong shapes are a ValueError.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from utils.errors import UserError

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]

DISTANCE_THRESHOLDS: Floats = np.arange(0, 4, 0.01)
"""The 400 distance thresholds the published 10-fold protocol chooses from."""

_ROWS_PER_BLOCK = 65_536  # bounds the float64 copies: 256 MiB at 512 dimensions


class FoldResult(NamedTuple):
    """Result of the k-fold protocol.

    Attributes:
        accuracies: [folds], share of each fold's pairs that are judged correctly.
        thresholds: [folds], squared distance, chosen on the other folds.
        mean: Mean of the accuracies.
        std: Their standard deviation, of the population (divided by folds), as published.
    """

    accuracies: Floats
    thresholds: Floats
    mean: float
    std: float


class TarAtFar(NamedTuple):
    """Largest true accept rate within a false accept rate.

    Attributes:
        tar: True accept rate.
        threshold: A pair is accepted when score >= threshold; +inf accepts none.
        false_accepts: Number of different pairs accepted at that threshold.
    """

    tar: float
    threshold: float
    false_accepts: int


class ValidationRate(NamedTuple):
    """Result of the published validation rate.

    Attributes:
        rates: [folds], share of each fold's same pairs that are accepted.
        fars: [folds], share of each fold's different pairs that are accepted.
        thresholds: [folds], squared distance, found on the other folds; may be +inf.
        mean: Mean of the rates.
        std: Their standard deviation, of the population (divided by folds), as published.
        far: Mean of the fars: the rate that was reached, not the target.
    """

    rates: Floats
    fars: Floats
    thresholds: Floats
    mean: float
    std: float
    far: float


class RocCurve(NamedTuple):
    """One point per distinct score, from accepting nothing to accepting everything.

    Attributes:
        far: [P + 1], false accepts / different pairs, ascending.
        tar: [P + 1], true accepts / same pairs, ascending.
        thresholds: [P + 1], a pair is accepted when score >= threshold; the first is +inf.
    """

    far: Floats
    tar: Floats
    thresholds: Floats


def l2_normalize(embeddings: ArrayLike) -> Floats:
    """Scales rows of `embeddings` [N, D] to length 1, as float64.

    A row of length zero or with a value that is not finite has no direction: it becomes NaN.
    """
    rows = _matrix(embeddings).astype(np.float64)
    # Scaling by the largest value first keeps the squares of huge or tiny rows in range.
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
        rows /= largest
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def is_collapsed(embeddings: ArrayLike) -> bool:
    """Returns whether `embeddings` [N, D] carry no information about identities.

    True if any value is not finite, any row has length zero, or all rows have the same direction up
    to the rounding of their dtype, as from a network that gives every face the same embedding.
    """
    rows = _matrix(embeddings)
    resolution = np.finfo(rows.dtype).eps if rows.dtype.kind == "f" else 0.0
    first = l2_normalize(rows[:1])
    for start in range(0, len(rows), _ROWS_PER_BLOCK):
        block = l2_normalize(rows[start : start + _ROWS_PER_BLOCK])
        if not np.isfinite(block).all():
            return True
        if np.abs(block - first).max() > 16 * resolution:
            # One differing block decides, but a NaN further on must still be found.
            rest = rows[start + _ROWS_PER_BLOCK :]
            return not _all_have_direction(rest)
    return True


def pair_distances(embeddings: ArrayLike) -> Floats:
    """Computes squared distances [N], float64, of the normalized pairs of `embeddings` [2N, D].

    A pair with an embedding that has no direction has distance NaN.
    """
    rows = _matrix(embeddings)
    if len(rows) % 2:
        raise UserError(
            f"embeddings have {len(rows)} rows; pairs need an even number (rows 2i and 2i + 1)"
        )
    distances = np.empty(len(rows) // 2)
    for start in range(0, len(rows), _ROWS_PER_BLOCK):
        block = l2_normalize(rows[start : start + _ROWS_PER_BLOCK])
        difference = block[0::2] - block[1::2]
        distances[start // 2 : start // 2 + len(difference)] = np.einsum(
            "nd,nd->n", difference, difference
        )
    return distances


def ten_fold_accuracy(
    embeddings_or_distances: ArrayLike, issame: ArrayLike, folds: int = 10
) -> FoldResult:
    """Computes the accuracy of the published 10-fold protocol.

    The pairs are cut into `folds` contiguous parts (the first N % folds hold one more). Each part
    is judged with the threshold of `DISTANCE_THRESHOLDS` that has the best accuracy on the other
    parts (the lowest of equals): same when distance < threshold. Collapsed embeddings or a distance
    that is not finite give NaN throughout. Source: LFW's protocol as InsightFace's
    `verification.py` scores it; equal per fold.

    Args:
        embeddings_or_distances: Embeddings [2N, D] or distances [N].
        issame: [N] booleans.
        folds: Number of folds.

    Raises:
        UserError: Shapes do not fit, or there are fewer pairs than folds.
    """
    values = np.asarray(embeddings_or_distances)
    collapsed = values.ndim == 2 and is_collapsed(values)
    distances = pair_distances(values) if values.ndim == 2 else values
    distances, same = _pairs(distances, issame)
    _fold_sizes(len(distances), folds)
    if collapsed or not np.isfinite(distances).all():
        nothing = np.full(folds, np.nan)
        return FoldResult(nothing, nothing.copy(), math.nan, math.nan)

    cells, sizes = _fold_cells(distances, same, folds)
    accuracies, best = _judge_folds(cells, sizes)
    return FoldResult(
        accuracies, DISTANCE_THRESHOLDS[best], float(accuracies.mean()), float(accuracies.std())
    )


def validation_rate(
    distances: ArrayLike, issame: ArrayLike, far: float = 1e-3, folds: int = 10
) -> ValidationRate:
    """Computes the true accept rate at thresholds that keep to `far` on the other folds.

    The folds are those of `ten_fold_accuracy`. A fold is judged (accepted: distance < threshold) at
    the largest threshold whose false accept rate on the other folds does not exceed `far`: the
    distance of the nearest different pair that has to stay out. The published `calculate_val` finds
    it by interpolation between steps of 0.001. So its thresholds lie within one step of these
    unless `far` is a whole number of pairs; and its SciPy call fails where rates repeat.

    A fold without a same or without a different pair is NaN, and so are the means then. Everything
    is NaN if a distance is not finite. Source: Schroff et al. 2015, "FaceNet", section 4, as
    InsightFace's `verification.py` has it.

    Args:
        distances: [N] squared distances.
        issame: [N] booleans.
        far: Target FAR in [0, 1].
        folds: Number of folds.

    Raises:
        UserError: Shapes do not fit, `far` is not a rate, or there are fewer pairs than folds.
    """
    values, same = _pairs(distances, issame)
    if not 0 <= far <= 1:
        raise UserError(f"far is {far}; it is a rate in [0, 1], for example 1e-3")
    sizes = _fold_sizes(len(values), folds)
    rates, fars, thresholds = (np.full(folds, np.nan) for _ in range(3))
    fold_of = np.repeat(np.arange(folds), sizes)
    impostors = np.flatnonzero(~same)
    impostors = impostors[np.argsort(values[impostors], kind="stable")]  # the nearest first
    for fold in range(folds) if np.isfinite(values).all() else ():
        others = values[impostors[fold_of[impostors] != fold]]
        mine = fold_of == fold
        if not len(others) or not same[mine].any() or same[mine].all():
            continue
        allowed = allowed_false_accepts(far, len(others))
        thresholds[fold] = others[allowed] if allowed < len(others) else math.inf
        accepted = values[mine] < thresholds[fold]
        rates[fold], fars[fold] = accepted[same[mine]].mean(), accepted[~same[mine]].mean()
    return ValidationRate(
        rates, fars, thresholds, float(rates.mean()), float(rates.std()), float(fars.mean())
    )


def tar_at_far(scores: ArrayLike, issame: ArrayLike, far: float) -> TarAtFar:
    """Computes the largest true accept rate whose false accept rate does not exceed `far`.

    There is no interpolation: the result is a threshold that exists. With fewer than 1 / far
    different pairs no false accept is allowed. (Reading the ROC at the point nearest to `far`, as
    is often done, may exceed it.)

    Args:
        scores: [N], larger means more alike.
        issame: [N] booleans.
        far: Target FAR in [0, 1].

    Raises:
        UserError: Shapes do not fit, or `far` is not a rate.
    """
    return tars_at_fars(scores, issame, [far])[0]


def tars_at_fars(scores: ArrayLike, issame: ArrayLike, fars: Sequence[float]) -> list[TarAtFar]:
    """Computes `tar_at_far` for several targets; sorts once, and only the best different pairs.

    Args:
        scores: [N], larger means more alike.
        issame: [N] booleans.
        fars: Target FARs in [0, 1].

    Raises:
        UserError: Shapes do not fit, or a FAR is not a rate.
    """
    for far in fars:
        if not 0 <= far <= 1:
            raise UserError(f"far is {far}; it is a rate in [0, 1], for example 1e-3")
    values, same = _pairs(scores, issame)
    genuine, impostor = values[same], values[~same]
    if not (len(genuine) and len(impostor) and np.isfinite(values).all()):
        return [TarAtFar(math.nan, math.nan, 0) for _ in fars]

    total = len(impostor)
    all_allowed = [allowed_false_accepts(far, total) for far in fars]
    needed = min(max(all_allowed, default=0) + 1, total)
    if needed < total:
        impostor.partition(total - needed)
        impostor = impostor[total - needed :]
    genuine.sort()
    impostor.sort()  # [needed], the best ones, ascending
    results = []
    for allowed in all_allowed:
        if allowed == total:
            results.append(TarAtFar(1.0, float(values.min()), total))
            continue
        # The best impostor that must stay out; everything above it may come in.
        barred = impostor[needed - 1 - allowed]
        first_genuine = int(np.searchsorted(genuine, barred, side="right"))
        first_impostor = int(np.searchsorted(impostor, barred, side="right"))
        threshold = min(
            genuine[first_genuine] if first_genuine < len(genuine) else math.inf,
            impostor[first_impostor] if first_impostor < needed else math.inf,
        )
        accepted = len(genuine) - first_genuine
        results.append(TarAtFar(accepted / len(genuine), float(threshold), needed - first_impostor))
    return results


def allowed_false_accepts(far: float, num_different: int) -> int:
    """Returns the largest number of false accepts whose rate is at most `far`."""
    allowed = min(math.floor(far * num_different), num_different)
    # The product is rounded; what counts is whether the quotient exceeds `far`.
    while allowed < num_different and (allowed + 1) / num_different <= far:
        allowed += 1
    while allowed and allowed / num_different > far:
        allowed -= 1
    return allowed


def roc_curve(scores: ArrayLike, issame: ArrayLike) -> RocCurve:
    """Computes every point of the ROC, equal scores as one point.

    A rate without pairs (no same pair, no different pair) is NaN, and with a score that is not
    finite both are.

    Args:
        scores: [N], larger means more alike.
        issame: [N] booleans.
    """
    values, same = _pairs(scores, issame)
    if not np.isfinite(values).all():
        nothing = np.full(1, np.nan)
        return RocCurve(nothing, nothing.copy(), np.full(1, np.inf))
    false_accepts, true_accepts, thresholds = _accept_counts(values, same)
    return RocCurve(
        _rate(false_accepts, np.count_nonzero(~same)),
        _rate(true_accepts, np.count_nonzero(same)),
        thresholds,
    )


def auc(scores: ArrayLike, issame: ArrayLike) -> float:
    """Computes the area under the ROC: the chance that a same pair scores above a different one.

    Ties count half. The area is NaN without a same pair, without a different pair, or with a score
    that is not finite.

    Args:
        scores: [N], larger means more alike.
        issame: [N] booleans.
    """
    values, same = _pairs(scores, issame)
    num_same = np.count_nonzero(same)
    num_different = len(same) - num_same
    if not (num_same and num_different and np.isfinite(values).all()):
        return math.nan
    # For each same pair count the different ones below it, and those that tie as halves. The counts
    # are whole numbers, so they are exact up to 4e9 pairs of either kind.
    impostor, genuine = np.sort(values[~same]), np.sort(values[same])
    below = np.searchsorted(impostor, genuine, side="left")
    doubled = int(below.sum()) + int(np.searchsorted(impostor, genuine, side="right").sum())
    return float(doubled / (2.0 * num_same * num_different))


def eer(scores: ArrayLike, issame: ArrayLike) -> float:
    """Computes the equal error rate: where the ROC, drawn with straight lines, has FAR = 1 - TAR.

    It is NaN without a same pair, without a different pair, or with a score that is not finite.

    Args:
        scores: [N], larger means more alike.
        issame: [N] booleans.
    """
    far, tar, _ = roc_curve(scores, issame)
    return _crossing(far, tar) if np.isfinite(far + tar).all() else math.nan


def bootstrap_intervals(
    distances: ArrayLike,
    issame: ArrayLike,
    fars: Sequence[float] = (),
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    folds: int = 10,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Computes percentile bootstrap intervals of the metrics of pairs.

    Pairs are drawn with replacement. For `accuracy` they are drawn within each fold, and the whole
    k-fold protocol is repeated. For `auc`, `eer` and `tar_at_far_<far>` the same and the different
    pairs are drawn separately. Pairs are taken as independent; if they share identities, as in LFW,
    the true intervals are somewhat wider. Source: Efron and Tibshirani, An Introduction to the
    Bootstrap (1993), chapter 13.

    Args:
        distances: [N] squared distances.
        issame: [N] booleans.
        fars: Target FARs in [0, 1].
        resamples: Number of draws.
        confidence: Confidence of the intervals, between 0 and 1.
        folds: Number of folds.
        seed: Seed of the draws; the same seed gives the same intervals.

    Returns:
        {metric: (low, high)}; NaN if the metric itself is NaN.

    Raises:
        UserError: Shapes do not fit, or `resamples` or `confidence` is out of range.
    """
    if resamples < 1 or not 0 < confidence < 1:
        raise UserError(
            f"resamples is {resamples} and confidence {confidence}; at least 1, and between 0 and 1"
        )
    values, same = _pairs(distances, issame)
    names = ["accuracy", "auc", "eer", *(f"tar_at_far_{rate_name(far)}" for far in fars)]
    drawn = np.full((len(names), resamples), np.nan)
    finite = bool(np.isfinite(values).all())
    random = np.random.default_rng(seed)
    if finite and len(values) >= folds:
        cells, sizes = _fold_cells(values, same, folds)
        ends = np.cumsum(sizes)
        fold_start, fold_size = np.repeat(ends - sizes, sizes), np.repeat(sizes, sizes)
        for turn in range(resamples):
            draw = fold_start + (random.random(len(values)) * fold_size).astype(np.int64)
            drawn[0, turn] = _judge_folds(cells[draw], sizes)[0].mean()
    num_same = int(np.count_nonzero(same))
    num_different = len(same) - num_same
    if finite and num_same and num_different:
        # Position of each pair's distance among the distinct ones: the most alike come first.
        distinct, position = np.unique(values, return_inverse=True)
        genuine, impostor = position[same], position[~same]
        allowed = [allowed_false_accepts(far, num_different) for far in fars]
        for turn in range(resamples):
            true_accepts = _accepted(random.choice(genuine, num_same), len(distinct))
            false_accepts = _accepted(random.choice(impostor, num_different), len(distinct))
            drawn[1, turn] = _area(false_accepts, true_accepts)
            drawn[2, turn] = _crossing(false_accepts / num_different, true_accepts / num_same)
            for row, limit in enumerate(allowed, start=3):
                at = np.searchsorted(false_accepts, limit, side="right") - 1
                drawn[row, turn] = true_accepts[at] / num_same
    tail = 50 * (1 - confidence)
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=1)
    return {n: (float(a), float(b)) for n, a, b in zip(names, low, high, strict=True)}


def xnorm(*embeddings: ArrayLike) -> float:
    """Computes the mean length of all rows of the arrays [N, D]; NaN if a value is not finite.

    The published log prints it over the plain and the flipped embeddings together.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = [np.linalg.norm(_matrix(e).astype(np.float64), axis=1) for e in embeddings]
    joined = np.concatenate(lengths)
    return float(joined.mean()) if np.isfinite(joined).all() else math.nan


def verification_metrics(
    embeddings: ArrayLike, embeddings_flip: ArrayLike, issame: ArrayLike
) -> dict[str, float]:
    """Computes all numbers of one verification set, as a flat dictionary.

    `accuracy` and `accuracy_std` use the images alone. Everything else (`accuracy_flip`,
    `accuracy_flip_std`, `threshold`: mean squared distance over the folds, `tar_at_far_1e-3`,
    `auc`, `eer`) uses the sum of image and mirror image. `xnorm` is over both, `num_pairs` is N.
    Collapsed embeddings give NaN for what depends on them.

    Args:
        embeddings: [2N, D] embeddings of the images.
        embeddings_flip: [2N, D] embeddings of the mirror images.
        issame: [N] booleans.

    Raises:
        UserError: Shapes do not fit, or there are fewer pairs than folds.
    """
    plain_embeddings, flip_embeddings = _matrix(embeddings), _matrix(embeddings_flip)
    if plain_embeddings.shape != flip_embeddings.shape:
        raise UserError(
            f"embeddings have shape {plain_embeddings.shape}, their mirror images' "
            f"{flip_embeddings.shape}; the two must be equal"
        )
    plain = ten_fold_accuracy(plain_embeddings, issame)
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is reported
        summed = plain_embeddings.astype(np.float64) + flip_embeddings
    # The sum is float64 but no more exact than its terms, so collapse is judged in their dtype.
    collapsed = is_collapsed(plain_embeddings) or is_collapsed(
        summed.astype(plain_embeddings.dtype)
    )
    distances = pair_distances(summed)
    if collapsed:
        distances[:] = np.nan
    flip = ten_fold_accuracy(distances, issame)
    return {
        "accuracy": plain.mean,
        "accuracy_std": plain.std,
        "accuracy_flip": flip.mean,
        "accuracy_flip_std": flip.std,
        "threshold": float(flip.thresholds.mean()),
        "tar_at_far_1e-3": tar_at_far(-distances, issame, 1e-3).tar,
        "auc": auc(-distances, issame),
        "eer": eer(-distances, issame),
        "xnorm": xnorm(plain_embeddings, flip_embeddings),
        "num_pairs": len(distances),
    }


def _matrix(embeddings: ArrayLike) -> NDArray:
    rows = np.asarray(embeddings)
    if rows.ndim != 2 or not rows.size or rows.dtype.kind not in "fiu":
        raise UserError(
            f"embeddings have shape {rows.shape} and dtype {rows.dtype}; "
            "allowed are non-empty [N, D] arrays of real numbers"
        )
    return rows


def _pairs(values: ArrayLike, issame: ArrayLike) -> tuple[NDArray, Bools]:
    """Checks and returns (values [N], issame [N]); what has the right type is not copied."""
    values, same = np.asarray(values), np.asarray(issame)
    if values.ndim != 1 or same.ndim != 1 or len(values) != len(same) or not len(values):
        raise UserError(
            f"values of pairs have shape {values.shape} and issame {same.shape}; "
            "one value and one label per pair, at least one pair, is what is needed"
        )
    if same.dtype != np.bool_:
        if not np.isin(same, (0, 1)).all():
            raise UserError("issame holds something else than True and False (or 1 and 0)")
        same = same.astype(np.bool_)
    return values, same


def _accept_counts(values: NDArray, same: Bools) -> tuple[NDArray, NDArray, Floats]:
    """Returns false accepts, true accepts and thresholds, each [P + 1], at every distinct score."""
    order = np.argsort(values)[::-1]
    ordered = values[order]
    last_of_equals = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    true_accepts = np.cumsum(same[order], dtype=np.int64)[last_of_equals]
    false_accepts = last_of_equals + 1 - true_accepts
    return (
        np.concatenate(([0], false_accepts)),
        np.concatenate(([0], true_accepts)),
        np.concatenate(([np.inf], ordered[last_of_equals])),
    )


def _rate(counts: NDArray, total: int | np.signedinteger) -> Floats:
    return counts / total if total else np.full(len(counts), np.nan)


def _all_have_direction(rows: NDArray) -> bool:
    return all(
        bool(np.isfinite(l2_normalize(rows[start : start + _ROWS_PER_BLOCK])).all())
        for start in range(0, len(rows), _ROWS_PER_BLOCK)
    )


def _fold_sizes(count: int, folds: int) -> NDArray[np.int64]:
    """Returns the pairs in each contiguous fold; the first count % folds hold one more."""
    if folds < 2:
        raise UserError(f"folds is {folds}; at least 2 are needed (10 in the published protocol)")
    if count < folds:
        raise UserError(
            f"{count} pairs cannot be cut into {folds} folds; give at least {folds} pairs"
        )
    sizes = np.full(folds, count // folds)
    sizes[: count % folds] += 1
    return sizes


def _fold_cells(distances: NDArray, same: Bools, folds: int) -> tuple[NDArray, NDArray]:
    """Returns the cell of every pair and the size of every fold, which `_judge_folds` counts.

    A pair is accepted from the first threshold above its distance on. So one histogram over (fold,
    same, that position) and a running sum judge every threshold at once.
    """
    sizes = _fold_sizes(len(distances), folds)
    accepted_from = np.searchsorted(DISTANCE_THRESHOLDS, distances, side="right")
    fold = np.repeat(np.arange(folds), sizes)
    return (fold * 2 + same) * (len(DISTANCE_THRESHOLDS) + 1) + accepted_from, sizes


def _judge_folds(cells: NDArray, sizes: NDArray) -> tuple[Floats, NDArray]:
    """Returns accuracy and position of the threshold of every fold, chosen on the others."""
    folds, length = len(sizes), len(DISTANCE_THRESHOLDS) + 1
    histogram = np.bincount(cells, minlength=folds * 2 * length).reshape(folds, 2, length)
    accepts = np.cumsum(histogram[:, :, :-1], axis=2)  # [folds, 2, thresholds]
    num_different = histogram[:, 0].sum(axis=1)
    correct = accepts[:, 1] + (num_different[:, None] - accepts[:, 0])
    best = np.argmax(correct.sum(axis=0) - correct, axis=1)  # [folds]
    return correct[np.arange(folds), best] / sizes, best


def _accepted(positions: NDArray, length: int) -> NDArray:
    """Counts the pairs accepted [length + 1] when the first 0, 1, ... distinct distances are."""
    return np.concatenate(([0], np.cumsum(np.bincount(positions, minlength=length))))


def _area(false_accepts: NDArray, true_accepts: NDArray) -> float:
    """Computes the area under the ROC of these counts [P + 1], which end at the totals."""
    # Trapezoids in whole numbers: exact up to 4e9 pairs of either kind.
    doubled = np.sum(np.diff(false_accepts) * (true_accepts[1:] + true_accepts[:-1]))
    return float(doubled / (2.0 * true_accepts[-1] * false_accepts[-1]))


def _crossing(far: Floats, tar: Floats) -> float:
    """Returns the FAR where the ROC, drawn with straight lines, has FAR = 1 - TAR."""
    excess = far - (1 - tar)  # rises from -1 (nothing accepted) to 1 (everything accepted)
    after = int(np.argmax(excess >= 0))
    before = after - 1
    weight = -excess[before] / (excess[after] - excess[before])
    return float(far[before] + weight * (far[after] - far[before]))


def rate_name(rate: float) -> str:
    """Spells a rate as in the keys of metrics: 0.001 as `1e-3`."""
    mantissa, exponent = f"{rate:.12e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if 0 < rate < 1 else f"{rate:g}"
