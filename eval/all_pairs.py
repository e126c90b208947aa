"""Computes the exact TAR at FAR over all pairs of a set, without holding the matrix of scores.

N images have N (N - 1) / 2 scores, and FAR 1e-6 asks for one of them: the best impostor that must
stay out. Finding it needs only the scores near it:

1. A random sample of pairs says between which two scores it lies, within five sigma.
2. One pass over the matrix, block by block, counts the impostors above that bracket and keeps
   those inside (some millions, whatever N is).
3. A pass over the blocks along the diagonal, where the images of one identity meet (images are
   sorted by identity), counts the genuine pairs above it.

The counts say whether the bracket was right. If not, another pass follows with the bounds known by
then. The sample decides how long it takes, never the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.metrics import allowed_false_accepts
from utils.errors import UserError

BLOCK = 4096  # images on a side: 64 MiB of scores
_SAMPLED_PAIRS = 20_000  # at least; beyond 3e8 impostors one of 16,000
_SIGMAS = 5.0
_FEW = 400  # sampled pairs; a sample cannot bound a score from above with fewer than these
_KEPT = 48_000_000  # scores of a bracket kept at most: 192 MB


@dataclass(frozen=True)
class AllPairs:
    """The result of `all_pairs` for one target FAR.

    Attributes:
        far: Target; the rate itself is false_accepts / num_impostors.
        tar: true_accepts / num_genuine, the largest whose FAR does not exceed the target.
        score_above: A pair is accepted when its score is greater than this; -inf accepts all.
        true_accepts: Exact number of genuine pairs accepted.
        false_accepts: Exact number of impostor pairs accepted.
        num_genuine: Number of pairs of one identity.
        num_impostors: Number of pairs of two identities.
    """

    far: float
    tar: float
    score_above: float
    true_accepts: int
    false_accepts: int
    num_genuine: int
    num_impostors: int


@dataclass
class _Bracket:
    """Scores low <= s <= high, in which some of the ranks are searched."""

    low: float
    high: float
    above: int = 0  # impostors beyond `high`
    inside: int = 0
    overflowed: bool = False
    kept_count: int = 0

    def __post_init__(self) -> None:
        self.values: list[NDArray[np.float32]] = []
        self.counts: list[NDArray[np.int64] | None] = []  # None: each value once

    def keep(self, values: NDArray[np.float32]) -> None:
        """Keeps scores that are inside; when they become many, equal ones are kept as one."""
        self.inside += len(values)
        if self.overflowed:
            return
        self.values.append(values)
        self.counts.append(None)
        self.kept_count += len(values)
        if self.kept_count > _KEPT:
            distinct, counts = self.collected()
            self.values, self.counts, self.kept_count = [distinct], [counts], len(distinct)
            self.overflowed = len(distinct) > _KEPT // 2

    def find(self, rank: int) -> tuple[float, int]:
        """Returns the rank-th best of all impostors, which is inside, and how many are better."""
        if all(count is None for count in self.counts):
            every = np.concatenate(self.values)
            every.sort()
            value = float(every[len(every) - (rank - self.above)])
            beyond = len(every) - int(np.searchsorted(every, np.float32(value), side="right"))
            return value, self.above + beyond
        values, counts = self.collected()
        better = self.above + int(counts.sum()) - np.cumsum(counts)  # than values[i], falling
        at = int(np.argmax(better < rank))
        return float(values[at]), int(better[at])

    def narrow(self, rank: int) -> tuple[float, float]:
        """Returns where `rank` should be in an overflowed bracket, judged by the kept part."""
        values, counts = self.collected()
        share = np.cumsum(counts) / counts.sum()  # at or below values[i]
        middle = 1 - (rank - self.above) / self.inside
        half = min(0.25, _KEPT / 8 / self.inside)
        last = len(values) - 1
        low = values[min(int(np.searchsorted(share, middle - half)), last)]
        return float(low), float(values[min(int(np.searchsorted(share, middle + half)), last)])

    def collected(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Returns the distinct kept scores, ascending, and how often each was seen."""
        values = np.concatenate([np.empty(0, np.float32), *self.values])
        weights = [
            np.ones(len(v), np.int64) if c is None else c
            for v, c in zip(self.values, self.counts, strict=True)
        ]
        if all(c is None for c in self.counts):
            return np.unique(values, return_counts=True)
        distinct, position = np.unique(values, return_inverse=True)
        counts = np.zeros(len(distinct), np.int64)
        np.add.at(counts, position, np.concatenate(weights))
        return distinct, counts


class _Scores:
    """The blocks of the score matrix of one set with itself (each pair once) or of two sets."""

    def __init__(
        self,
        rows: tuple[Tensor, Tensor],
        columns: tuple[Tensor, Tensor] | None,
        on_block: Callable[[int], None],
    ) -> None:
        self.rows, self.row_people = rows
        self.is_triangle = columns is None
        self.columns, self.column_people = rows if columns is None else columns
        self.on_block = on_block
        height = min(BLOCK, len(self.rows))
        width = min(BLOCK, len(self.columns))
        self._buffer = torch.empty(height * width, device=self.rows.device)

    def blocks(self, shared_people: bool | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields the scores of each block, and which of them are genuine (None if none is).

        For a block on the diagonal of a triangle only the part above the diagonal is given, as one
        row.

        Args:
            shared_people: Yields only blocks with (or without) identities on both sides; None
                yields all.
        """
        for top in range(0, len(self.rows), BLOCK):
            left = top if self.is_triangle else 0
            for start in range(left, len(self.columns), BLOCK):
                row_part, column_part = slice(top, top + BLOCK), slice(start, start + BLOCK)
                own, other = self.row_people[row_part], self.column_people[column_part]
                # Both are sorted by identity.
                overlap = bool((own[0] <= other[-1]) & (other[0] <= own[-1]))
                if shared_people is not None and overlap != shared_people:
                    continue
                scores = self._buffer[: len(own) * len(other)].view(len(own), len(other))
                torch.mm(self.rows[row_part], self.columns[column_part].T, out=scores)
                self.on_block(len(own) * len(other))
                if not overlap:
                    yield scores, None
                    continue
                genuine = own[:, None] == other[None, :]
                if self.is_triangle and start == top:
                    upper = torch.triu(torch.ones_like(genuine), diagonal=1)
                    yield _pick(scores, upper), _pick(genuine, upper)
                else:
                    yield scores, genuine

    def impostors(self) -> Iterator[Any]:
        """Yields scores of different identities per block: arrays on the CPU, tensors on a GPU."""
        for scores, genuine in self.blocks():
            flat = scores.reshape(-1) if genuine is None else _pick(scores, ~genuine)
            yield flat.numpy() if flat.device.type == "cpu" else flat


def _pick(values: Tensor, mask: Tensor) -> Tensor:
    """Returns values[mask]; on a CPU NumPy does it, in a tenth of the time."""
    if values.device.type == "cpu":
        return torch.from_numpy(values.numpy()[mask.numpy()])
    return values[mask]


def all_pairs(
    embeddings: NDArray[np.floating],
    people: NDArray[np.integer],
    fars: Sequence[float],
    *,
    against: tuple[NDArray[np.floating], NDArray[np.integer]] | None = None,
    normalize: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
    on_block: Callable[[int], None] = lambda count: None,
) -> list[AllPairs]:
    """Computes the exact TAR at each of `fars` over all pairs of a set.

    Scores are fp32 products of fp32 rows; equal scores are accepted together.

    Args:
        embeddings: [N, D] of any length; see `normalize`.
        people: [N] integers, the identity of each row.
        fars: Targets in [0, 1].
        against: (embeddings [M, D], people [M]) of another set. Every row of the first set is then
            compared with every row of the second, and not with its own set.
        normalize: Whether rows are scaled to length 1 first, so that scores are cosines.
        device: Device of the products.
        seed: Seed of the sample; it does not change the result.
        on_block: Is called with the number of scores of every block that was computed.

    Returns:
        One AllPairs per target; a TAR is NaN if there are no genuine or no impostor pairs.

    Raises:
        UserError: Shapes do not fit, a FAR is outside [0, 1], or a row is not finite or (when
            normalizing) zero.
    """
    for far in fars:
        if not 0 <= far <= 1:
            raise UserError(f"far is {far}; it is a rate in [0, 1], for example 1e-6")
    first = _prepare(embeddings, people, normalize, device)
    second = None if against is None else _prepare(*against, normalize, device)
    if second is not None and first[0].shape[1] != second[0].shape[1]:
        raise UserError(
            f"embeddings of {first[0].shape[1]} numbers against {second[0].shape[1]}; use one model"
        )
    scores = _Scores(first, second, on_block)
    num_genuine, total = _count_pairs(scores)
    num_impostors = total - num_genuine
    if not num_genuine or not num_impostors:
        nothing = math.nan, math.nan, 0, 0, num_genuine, num_impostors
        return [AllPairs(far, *nothing) for far in fars]
    allowed = [allowed_false_accepts(far, num_impostors) for far in fars]
    with _full_precision():
        ranks = sorted({count + 1 for count in allowed if count < num_impostors})
        found = _select(scores, ranks, num_impostors, seed)  # {rank: (score, impostors above it)}
        found[num_impostors + 1] = -math.inf, num_impostors
        limits = [found[count + 1][0] for count in allowed]
        true_accepts = _count_genuine(scores, limits)
    return [
        AllPairs(
            far,
            accepted / num_genuine,
            limit,
            accepted,
            found[count + 1][1],
            num_genuine,
            num_impostors,
        )
        for far, accepted, limit, count in zip(fars, true_accepts, limits, allowed, strict=True)
    ]


def _prepare(
    embeddings: NDArray[np.floating],
    people: NDArray[np.integer],
    normalize: bool,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Returns fp32 rows sorted by identity, and the identities, on the device."""
    if embeddings.ndim != 2 or len(embeddings) != len(people) or not embeddings.size:
        raise UserError(
            f"embeddings have shape {list(embeddings.shape)} for {len(people)} people; needed is a "
            "non-empty [N, D] and one person per row"
        )
    order = np.argsort(people, kind="stable")
    rows = np.empty(embeddings.shape, np.float32)
    for start in range(0, len(order), BLOCK):
        block = embeddings[order[start : start + BLOCK]].astype(np.float64)
        lengths = np.linalg.norm(block, axis=1)
        bad = ~np.isfinite(lengths) | ((lengths == 0) if normalize else False)
        if bad.any():
            row = int(order[start + int(np.argmax(bad))])
            raise UserError(f"embedding {row} is zero or not finite: it has no direction")
        rows[start : start + BLOCK] = block / lengths[:, None] if normalize else block
    return (
        torch.from_numpy(rows).to(device),
        torch.from_numpy(np.ascontiguousarray(people[order])).to(device),
    )


def _count_pairs(scores: _Scores) -> tuple[int, int]:
    """Returns the numbers of genuine pairs and of all pairs, as integers of any size."""
    people, counts = torch.unique(scores.row_people, return_counts=True)
    if scores.is_triangle:
        number = len(scores.rows)
        return sum(n * (n - 1) // 2 for n in counts.tolist()), number * (number - 1) // 2
    others, other_counts = torch.unique(scores.column_people, return_counts=True)
    of_person = dict(zip(others.tolist(), other_counts.tolist(), strict=True))
    genuine = sum(
        count * of_person.get(person, 0)
        for person, count in zip(people.tolist(), counts.tolist(), strict=True)
    )
    return genuine, len(scores.rows) * len(scores.columns)


def _select(
    scores: _Scores, ranks: Sequence[int], num_impostors: int, seed: int
) -> dict[int, tuple[float, int]]:
    """Returns {rank: (the rank-th best impostor score, how many are better)}, ranks from 1."""
    sample = np.empty(0, np.float32)
    if num_impostors > _KEPT // 2:
        sample = _sample_impostors(scores, max(_SAMPLED_PAIRS, num_impostors // 16_000), seed)
    found: dict[int, tuple[float, int]] = {}
    surely = dict.fromkeys(ranks, (-math.inf, math.inf))
    ranges = {rank: _guess(rank / num_impostors, sample, _SIGMAS) for rank in ranks}
    sigmas = _SIGMAS
    while ranges:
        brackets = _disjoint(list(ranges.values()))
        _fill(scores, brackets)
        sigmas *= 4
        remaining = {}
        for rank in ranges:
            low, high = surely[rank]
            guess = None
            for bracket in brackets:  # from the best scores down
                if rank <= bracket.above:  # it is better than this bracket
                    low = max(low, _next_up(bracket.high))
                elif rank > bracket.above + bracket.inside:  # it is worse
                    high = min(high, _next_down(bracket.low))
                elif not bracket.overflowed:
                    found[rank] = bracket.find(rank)
                else:  # too many to keep, so look closer
                    low, high = max(low, bracket.low), min(high, bracket.high)
                    guess = bracket.narrow(rank)
            if rank not in found:
                guess = guess or _guess(rank / num_impostors, sample, sigmas)
                inside = max(low, guess[0]), min(high, guess[1])
                surely[rank] = low, high
                remaining[rank] = inside if inside[0] <= inside[1] else (low, high)
        ranges = remaining
    return found


def _guess(share: float, sample: NDArray[np.float32], sigmas: float) -> tuple[float, float]:
    """Estimates (low, high) around the score that this share of the impostors reaches."""
    size = len(sample)
    if not size:
        return -math.inf, math.inf
    few = min(_FEW / size, 1.0)  # a sample says little about a smaller share, but all above fits
    is_few = share <= few
    share = min(max(share, few), 1.0)
    margin = sigmas * math.sqrt(share * (1 - share) / size)
    bottom, top = int((1 - share - margin) * size), math.ceil((1 - share + margin) * size)
    low = float(sample[bottom]) if bottom > 0 else -math.inf
    high = float(sample[top]) if top < size and not is_few else math.inf
    return low, high


def _disjoint(ranges: Sequence[tuple[float, float]]) -> list[_Bracket]:
    """Returns brackets that cover the ranges and do not overlap, from the best scores down."""
    merged: list[list[float]] = []
    for low, high in sorted(ranges, reverse=True):
        if merged and high >= merged[-1][0]:
            merged[-1] = [low, max(merged[-1][1], high)]
        else:
            merged.append([low, high])
    return [_Bracket(low, high) for low, high in merged]


def _fill(scores: _Scores, brackets: Sequence[_Bracket]) -> None:
    """Fills counts and kept scores of every bracket in one pass over all impostors."""
    for flat in scores.impostors():
        rest = flat
        for bracket in reversed(brackets):  # from the worst scores up, ever fewer
            if bracket.low > -math.inf:
                rest = rest[rest >= np.float32(bracket.low)]
            inside = rest
            if bracket.high < math.inf:
                is_above = rest > np.float32(bracket.high)
                inside, rest = rest[~is_above], rest[is_above]
                bracket.above += len(rest)
            else:
                rest = rest[:0]
            kept = inside if isinstance(inside, np.ndarray) else inside.cpu().numpy()
            bracket.keep(kept.copy() if kept.base is not None else kept)


def _sample_impostors(scores: _Scores, count: int, seed: int) -> NDArray[np.float32]:
    """Returns scores of random pairs of different identities, ascending."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(0, count, 2 * BLOCK):
        left = torch.from_numpy(random.integers(0, len(scores.rows), 2 * BLOCK))
        right = torch.from_numpy(random.integers(0, len(scores.columns), 2 * BLOCK))
        left, right = left.to(scores.rows.device), right.to(scores.rows.device)
        other = scores.row_people[left] != scores.column_people[right]
        own, others = scores.rows.index_select(0, left), scores.columns.index_select(0, right)
        products = torch.einsum("nd,nd->n", own, others)[other]
        found.append(products.cpu().numpy())
    return np.sort(np.concatenate(found))


def _count_genuine(scores: _Scores, limits: Sequence[float]) -> list[int]:
    """Counts the genuine pairs that score above each limit."""
    counts = [0] * len(limits)
    for block, genuine in scores.blocks(shared_people=True):
        assert genuine is not None
        own = _pick(block, genuine)
        for position, limit in enumerate(limits):
            counts[position] += int(torch.count_nonzero(own > limit))
    return counts


def _next_up(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def _next_down(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(-np.inf)))


class _full_precision:
    """Computes fp32 products on a GPU in fp32, whatever the process has chosen for training."""

    def __enter__(self) -> None:
        self._before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self._before)
