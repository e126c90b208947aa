"""Verification metrics: from embeddings or scores of pairs to the numbers that are published.

numpy only; nothing here knows about files, models or ranks. Conventions throughout:

- `embeddings` are [2N, D]; rows 2i and 2i + 1 are pair i. `issame` is bool [N].
- A *distance* is the squared Euclidean distance of two normalised embeddings, in [0, 4]; a
  *score* is anything where larger means more alike (a cosine, a negated distance).
- Pairs with equal scores cannot be told apart by a threshold, so they are accepted together.
- NaN is the answer where there is none: a score that is not finite, no same pair, no different
  pair, embeddings that carry no information (`is_collapsed`). Wrong shapes are a ValueError.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]

DISTANCE_THRESHOLDS: Floats = np.arange(0, 4, 0.01)
"""The 400 distance thresholds the published 10-fold protocol chooses from."""

_ROWS_PER_BLOCK = 65_536  # bounds the float64 copies: 256 MiB at 512 dimensions


class FoldResult(NamedTuple):
    """Outcome of the k-fold protocol: one accuracy and one distance threshold per fold."""

    accuracies: Floats  # [folds], share of the fold's pairs judged rightly
    thresholds: Floats  # [folds], squared distance, chosen on the other folds
    mean: float
    std: float  # of the population (divided by folds), as published


class TarAtFar(NamedTuple):
    """Largest true accept rate within a false accept rate, and what is behind it."""

    tar: float
    threshold: float  # accept a pair when score >= threshold; +inf: nothing is accepted
    false_accepts: int  # different pairs accepted at that threshold


class RocCurve(NamedTuple):
    """One point per distinct score, from accepting nothing to accepting everything."""

    far: Floats  # [P + 1], false accepts / different pairs, rising
    tar: Floats  # [P + 1], true accepts / same pairs, rising
    thresholds: Floats  # [P + 1], accept when score >= threshold; the first is +inf


def l2_normalise(embeddings: ArrayLike) -> Floats:
    """Rows of `embeddings` [N, D] scaled to length 1, as float64.

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
    """Whether `embeddings` [N, D] carry no information about who is who.

    True if any value is not finite, any row has length zero, or all rows point the same way up
    to the rounding of their dtype: a network that answers the same for every face.
    """
    rows = _matrix(embeddings)
    resolution = np.finfo(rows.dtype).eps if rows.dtype.kind == "f" else 0.0
    first = l2_normalise(rows[:1])
    for start in range(0, len(rows), _ROWS_PER_BLOCK):
        block = l2_normalise(rows[start : start + _ROWS_PER_BLOCK])
        if not np.isfinite(block).all():
            return True
        if np.abs(block - first).max() > 16 * resolution:
            # One differing block settles it, but a NaN further on must still be found.
            rest = rows[start + _ROWS_PER_BLOCK :]
            return not _all_have_direction(rest)
    return True


def pair_distances(embeddings: ArrayLike) -> Floats:
    """Squared distances [N], float64, of the normalised pairs of `embeddings` [2N, D].

    A pair with an embedding that has no direction has distance NaN.
    """
    rows = _matrix(embeddings)
    if len(rows) % 2:
        raise ValueError(
            f"embeddings have {len(rows)} rows; pairs need an even number (rows 2i and 2i + 1)"
        )
    distances = np.empty(len(rows) // 2)
    for start in range(0, len(rows), _ROWS_PER_BLOCK):
        block = l2_normalise(rows[start : start + _ROWS_PER_BLOCK])
        difference = block[0::2] - block[1::2]
        distances[start // 2 : start // 2 + len(difference)] = np.einsum(
            "nd,nd->n", difference, difference
        )
    return distances


def ten_fold_accuracy(
    embeddings_or_distances: ArrayLike, issame: ArrayLike, folds: int = 10
) -> FoldResult:
    """Accuracy of the published 10-fold protocol.

    The pairs are cut into `folds` contiguous parts (the first N % folds hold one more). For each
    part, the threshold of `DISTANCE_THRESHOLDS` with the best accuracy on the other parts (the
    lowest of equals) judges it: same when distance < threshold.

    Takes embeddings [2N, D] or distances [N]. Collapsed embeddings or a distance that is not
    finite give NaN throughout. Fewer pairs than folds is a ValueError.
    Source: LFW's protocol as InsightFace's `verification.py` scores it; equal per fold.
    """
    values = np.asarray(embeddings_or_distances)
    collapsed = values.ndim == 2 and is_collapsed(values)
    distances = pair_distances(values) if values.ndim == 2 else values
    distances, same = _pairs(distances, issame)
    if folds < 2:
        raise ValueError(f"folds is {folds}; at least 2 are needed (10 in the published protocol)")
    if len(distances) < folds:
        raise ValueError(
            f"{len(distances)} pairs cannot be cut into {folds} folds; give at least {folds} pairs"
        )
    if collapsed or not np.isfinite(distances).all():
        nothing = np.full(folds, np.nan)
        return FoldResult(nothing, nothing.copy(), math.nan, math.nan)

    # A pair is accepted from the first threshold above its distance on, so one histogram over
    # those positions and a running sum count every threshold at once.
    num_thresholds = len(DISTANCE_THRESHOLDS)
    accepted_from = np.searchsorted(DISTANCE_THRESHOLDS, distances, side="right")
    sizes = np.full(folds, len(distances) // folds)
    sizes[: len(distances) % folds] += 1
    correct = np.empty((folds, num_thresholds), dtype=np.int64)
    ends = np.cumsum(sizes)
    for fold, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        part, part_same = accepted_from[start:end], same[start:end]
        length = num_thresholds + 1
        true_accepts = np.cumsum(np.bincount(part[part_same], minlength=length)[:-1])
        false_accepts = np.cumsum(np.bincount(part[~part_same], minlength=length)[:-1])
        correct[fold] = true_accepts + (np.count_nonzero(~part_same) - false_accepts)

    best = np.argmax(correct.sum(axis=0) - correct, axis=1)  # [folds], chosen on the others
    accuracies = correct[np.arange(folds), best] / sizes
    return FoldResult(
        accuracies, DISTANCE_THRESHOLDS[best], float(accuracies.mean()), float(accuracies.std())
    )


def tar_at_far(scores: ArrayLike, issame: ArrayLike, far: float) -> TarAtFar:
    """The largest true accept rate whose false accept rate does not exceed `far`.

    `scores` [N], larger means more alike; `far` in [0, 1]. No interpolation: the result is a
    threshold that exists. With fewer than 1 / far different pairs no false accept is allowed.
    (Reading the ROC at the point nearest to `far`, as is often done, may exceed it.)
    """
    if not 0 <= far <= 1:
        raise ValueError(f"far is {far}; it is a rate in [0, 1], for example 1e-3")
    values, same = _pairs(scores, issame)
    genuine, impostor = values[same], values[~same]
    if not (len(genuine) and len(impostor) and np.isfinite(values).all()):
        return TarAtFar(math.nan, math.nan, 0)

    allowed = min(math.floor(far * len(impostor)), len(impostor))
    # The product is rounded; what counts is whether the quotient exceeds `far`.
    while allowed < len(impostor) and (allowed + 1) / len(impostor) <= far:
        allowed += 1
    while allowed / len(impostor) > far:
        allowed -= 1
    if allowed == len(impostor):
        return TarAtFar(1.0, float(values.min()), allowed)

    # The best impostor that must stay out; everything above it may come in.
    position = len(impostor) - 1 - allowed
    barred = np.partition(impostor, position)[position]
    accepted = genuine[genuine > barred]
    false_accepts = impostor[impostor > barred]
    threshold = min(accepted.min(initial=math.inf), false_accepts.min(initial=math.inf))
    return TarAtFar(len(accepted) / len(genuine), float(threshold), len(false_accepts))


def roc_curve(scores: ArrayLike, issame: ArrayLike) -> RocCurve:
    """Every point of the ROC of `scores` [N] (larger: more alike), equal scores as one point.

    A rate whose pairs do not exist (no same pair, no different pair), or any score that is not
    finite, gives NaN in the rates concerned.
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
    """Area under the ROC: the chance that a same pair scores above a different one.

    Ties count half. NaN without a same pair, without a different pair, or with a score that is
    not finite.
    """
    values, same = _pairs(scores, issame)
    num_same = np.count_nonzero(same)
    num_different = len(same) - num_same
    if not (num_same and num_different and np.isfinite(values).all()):
        return math.nan
    false_accepts, true_accepts, _ = _accept_counts(values, same)
    # Trapezoids in whole numbers: exact up to 4e9 pairs of either kind.
    doubled = np.sum(np.diff(false_accepts) * (true_accepts[1:] + true_accepts[:-1]))
    return float(doubled / (2.0 * num_same * num_different))


def eer(scores: ArrayLike, issame: ArrayLike) -> float:
    """Equal error rate: where the ROC, drawn with straight lines, meets FAR = 1 - TAR.

    NaN without a same pair, without a different pair, or with a score that is not finite.
    """
    far, tar, _ = roc_curve(scores, issame)
    excess = far - (1 - tar)  # rises from -1 (nothing accepted) to 1 (everything accepted)
    if not np.isfinite(excess).all():
        return math.nan
    after = int(np.argmax(excess >= 0))
    before = after - 1
    weight = -excess[before] / (excess[after] - excess[before])
    return float(far[before] + weight * (far[after] - far[before]))


def xnorm(*embeddings: ArrayLike) -> float:
    """Mean length of all rows of the given arrays [N, D]; NaN if a value is not finite.

    The published log prints it over the plain and the flipped embeddings together.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = [np.linalg.norm(_matrix(e).astype(np.float64), axis=1) for e in embeddings]
    joined = np.concatenate(lengths)
    return float(joined.mean()) if np.isfinite(joined).all() else math.nan


def verification_metrics(
    embeddings: ArrayLike, embeddings_flip: ArrayLike, issame: ArrayLike
) -> dict[str, float]:
    """All numbers of one verification set, as a flat dictionary.

    `embeddings` and `embeddings_flip` [2N, D] are of the images and of their mirror images.
    `accuracy` and `accuracy_std` use the first alone; everything else (`accuracy_flip`,
    `accuracy_flip_std`, `threshold`: mean squared distance over the folds, `tar_at_far_1e-3`,
    `auc`, `eer`) the sum of the two. `xnorm` is over both, `num_pairs` is N. Embeddings that are
    collapsed give NaN for what depends on them.
    """
    plain_embeddings, flip_embeddings = _matrix(embeddings), _matrix(embeddings_flip)
    if plain_embeddings.shape != flip_embeddings.shape:
        raise ValueError(
            f"embeddings have shape {plain_embeddings.shape}, their mirror images' "
            f"{flip_embeddings.shape}; the two must be equal"
        )
    plain = ten_fold_accuracy(plain_embeddings, issame)
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is what we report
        summed = plain_embeddings.astype(np.float64) + flip_embeddings
    # The sum is float64 but as exact as what came in, so collapse is judged in that dtype.
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
        raise ValueError(
            f"embeddings have shape {rows.shape} and dtype {rows.dtype}; "
            "allowed are non-empty [N, D] arrays of real numbers"
        )
    return rows


def _pairs(values: ArrayLike, issame: ArrayLike) -> tuple[NDArray, Bools]:
    """Checked (values [N], issame [N]); nothing is copied that already has the right type."""
    values, same = np.asarray(values), np.asarray(issame)
    if values.ndim != 1 or same.ndim != 1 or len(values) != len(same) or not len(values):
        raise ValueError(
            f"values of pairs have shape {values.shape} and issame {same.shape}; "
            "one value and one label per pair, at least one pair, is what is needed"
        )
    if same.dtype != np.bool_:
        if not np.isin(same, (0, 1)).all():
            raise ValueError("issame holds something else than True and False (or 1 and 0)")
        same = same.astype(np.bool_)
    return values, same


def _accept_counts(values: NDArray, same: Bools) -> tuple[NDArray, NDArray, Floats]:
    """(false accepts, true accepts, thresholds), each [P + 1], at every distinct score."""
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
        bool(np.isfinite(l2_normalise(rows[start : start + _ROWS_PER_BLOCK])).all())
        for start in range(0, len(rows), _ROWS_PER_BLOCK)
    )
