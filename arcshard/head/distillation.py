"""Knowledge distillation through class probabilities, with the classes sharded over the ranks.

A row has cosines c_j to the student's class centers and d_j to the teacher's. With scale s and
temperature T, over the classes j that take part in the step and that the teacher knows:

    a_j = s c_j / T,   t_j = s d_j / T,   p = softmax(t),   q = softmax(a)
    loss = T^2 sum_j p_j (log p_j - log q_j),     dloss/dc_j = s T (q_j - p_j)

(Hinton et al. 2015, arXiv:1503.02531; without a margin on either side.) Only the embeddings get a
gradient from this loss: the student's centers are constants here, and get theirs from the labels.

The forward pass visits the blocks of classes twice, once for the two log-sum-exps and sum_j p_j
(t_j - a_j), once for the gradient. This costs 5 matmuls of B x D x C and no B x C matrix. Backward
only scales the finished gradient, so the centers may be updated before it. A step has one
all-gather of both embeddings, one of 5 B numbers, and one reduce-scatter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arcshard.collectives import (
    Group,
    all_gather_single,
    gather_rows,
    merge_exponentials,
    reduce_scatter_single,
)
from arcshard.head.block import matmul, norms_of
from arcshard.head.centers import ClassCenters


@dataclass(frozen=True)
class TeacherCenters:
    """The teacher's frozen class centers for the classes of this rank.

    Attributes:
        unit: [num_classes_local, K, D_t] centers of length 1, zero where the teacher does not know
            the class.
        known: [num_classes_local] boolean, True where the teacher knows the class.
    """

    unit: Tensor
    known: Tensor


@dataclass(frozen=True)
class DistillationInputs:
    """The centers of student and teacher in one step, and how they are compared.

    Attributes:
        student: Rows of the step.
        centers_per_class: K, the number of consecutive rows of a class.
        classes: [S] int64 local classes of the step, None for all.
        teacher: Centers of all local classes.
        scale: s.
        temperature: T.
        capacity: Rows per rank in the gathered batch.
        group: Process group of the ranks, None for one rank.
        budget_bytes: Memory for the block that is being computed.
        half: Dtype of the operands of the large matmuls, None for full precision.
    """

    student: ClassCenters
    centers_per_class: int
    classes: Tensor | None
    teacher: TeacherCenters
    scale: float
    temperature: float
    capacity: int
    group: Group
    budget_bytes: int
    half: torch.dtype | None = None


def sharded_divergence(
    local_unit: Tensor, local_teacher: Tensor, sides: DistillationInputs
) -> Tensor:
    """Computes the mean of the distillation loss over the global batch, the same on every rank.

    Args:
        local_unit: [b, D] the student's embeddings, of length 1. They get the gradient of the mean.
        local_teacher: [b, D_t] the teacher's embeddings, of length 1.
        sides: Centers of student and teacher, and how they are compared.

    Returns:
        Scalar, 0 where the teacher knows none of the step's classes.
    """
    # Every rank computes and exchanges the gradient, also one whose own embeddings require none.
    wants_gradient = torch.is_grad_enabled() and (
        sides.group is not None or local_unit.requires_grad
    )
    loss: Tensor = _ShardedDivergence.apply(local_unit, local_teacher, sides, wants_gradient)
    return loss


class _ShardedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        local_unit: Tensor,
        local_teacher: Tensor,
        sides: DistillationInputs,
        wants_gradient: bool,
    ) -> Tensor:
        rows, width = local_unit.shape
        both = torch.cat([local_unit, local_teacher.to(local_unit.dtype)], dim=1)
        marks = torch.zeros(rows, dtype=torch.int64, device=both.device)
        both, marks = gather_rows(both, marks, -1, sides.capacity, sides.group)
        blocks = _Blocks(sides, both[:, :width].contiguous(), both[:, width:].contiguous())
        is_real = marks == 0
        row_weight = is_real.to(both.dtype) / is_real.sum()

        divergence, teacher_lse, student_lse = _combine(_sums_here(blocks), sides.group)
        squared = sides.temperature**2
        loss = torch.where(is_real, divergence * row_weight, 0.0).sum() * squared
        if wants_gradient:
            factor = row_weight * (squared * sides.scale / sides.temperature)
            gradient = torch.zeros_like(blocks.student)
            for block in blocks:
                slope = (block.a - student_lse[:, None]).exp_()
                slope -= (block.t - teacher_lse[:, None]).exp_()
                gradient += block.through_centers(slope.mul_(factor[:, None]))
            ctx.save_for_backward(_own_rows(gradient, sides)[:rows])
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradients[0] * gradient, None, None, None


@dataclass
class _Block:
    """Some classes of the step, as the gradient of the student needs them.

    Attributes:
        a: [B, n], -inf where the teacher does not know the class.
        t: [B, n], -inf where the teacher does not know the class.
        difference: [B, n] t - a, 0 where the teacher does not know the class.
        rows: [n K, D] the student's centers.
        inverse_norm: [n K] 1 / |w| of these centers.
        best: [B, n] int64 number of the best of K centers, None for K = 1.
        dtype: Dtype of the operands of the large matmuls.
    """

    a: Tensor
    t: Tensor
    difference: Tensor
    rows: Tensor
    inverse_norm: Tensor
    best: Tensor | None
    dtype: torch.dtype

    def through_centers(self, slope: Tensor) -> Tensor:
        """Computes the gradient [B, D] of the embeddings from that of the cosines [B, n]."""
        if self.best is not None:
            k = len(self.rows) // slope.shape[1]
            slope = (
                slope.new_zeros(*slope.shape, k)
                .scatter_(2, self.best[:, :, None], slope[:, :, None])
                .view(len(slope), -1)
            )
        slope = slope * self.inverse_norm
        return matmul(slope.to(self.dtype), self.rows.to(self.dtype))


class _Blocks:
    """Iterates over the step's classes in blocks; `student` is [B, D], `teacher` [B, D_t]."""

    def __init__(self, sides: DistillationInputs, student: Tensor, teacher: Tensor) -> None:
        self.sides, self.student, self.teacher = sides, student, teacher
        self.num_classes = sides.student.num_rows // sides.centers_per_class
        k, k_teacher = sides.centers_per_class, sides.teacher.unit.shape[1]
        per_class = student.itemsize * (
            len(student) * (6 + 2 * k + k_teacher)
            + 3 * (k * student.shape[1] + k_teacher * teacher.shape[1])
        )
        self.step = max(1, sides.budget_bytes // per_class)

    def __iter__(self) -> Iterator[_Block]:
        for start in range(0, self.num_classes, self.step):
            yield self._block(start, min(start + self.step, self.num_classes))

    def _block(self, start: int, stop: int) -> _Block:
        sides, k = self.sides, self.sides.centers_per_class
        dtype = self.student.dtype
        if sides.half is not None and dtype == torch.float32:
            dtype = sides.half
        factor = sides.scale / sides.temperature
        rows = sides.student.read(start * k, stop * k)
        inverse_norm = norms_of(rows).reciprocal_()
        a = matmul(self.student.to(dtype), rows.t().to(dtype)).mul_(inverse_norm * factor)
        best = None
        if k > 1:
            a, best = a.view(len(a), -1, k).max(dim=2)
        unit, known = self._of_teacher(start, stop)
        t = matmul(self.teacher.to(dtype), unit.flatten(0, 1).t().to(dtype)).mul_(factor)
        t = t.view(len(t), -1, unit.shape[1]).amax(dim=2)
        difference = t - a
        difference.masked_fill_(~known, 0.0)
        t, a = t.masked_fill(~known, -math.inf), a.masked_fill(~known, -math.inf)
        return _Block(a, t, difference, rows, inverse_norm, best, dtype)

    def _of_teacher(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Returns the teacher's centers [n, K, D_t] and known [n] on the device of the work."""
        teacher, device = self.sides.teacher, self.student.device
        if self.sides.classes is None:
            unit, known = teacher.unit[start:stop], teacher.known[start:stop]
        else:
            classes = self.sides.classes[start:stop].to(teacher.unit.device)
            unit, known = teacher.unit[classes], teacher.known[classes]
        return unit.to(device, self.student.dtype), known.to(device)


def _sums_here(blocks: _Blocks) -> Tensor:
    """Computes the sums [5, B] over this rank's classes.

    They are the peak of t, the sum of exp(t - peak), the same two of a, and the sum of exp(t -
    peak) (t - a).
    """
    sums = blocks.student.new_zeros(5, len(blocks.student))
    sums[0], sums[2] = -math.inf, -math.inf
    for block in blocks:
        for first, z in ((0, block.t), (2, block.a)):
            peak = torch.maximum(sums[first], z.amax(dim=1))
            shift = peak.masked_fill(peak == -math.inf, 0.0)  # no class so far
            before = torch.exp(sums[first] - shift)
            numerators = torch.exp(z - shift[:, None])
            sums[first + 1] = sums[first + 1] * before + numerators.sum(dim=1)
            if first == 0:
                sums[4] = sums[4] * before + (numerators * block.difference).sum(dim=1)
            sums[first] = peak
    return sums


def _combine(sums: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """Combines the sums of all ranks.

    Returns:
        ([B] divergence of p from q, [B] log-sum-exp of t, [B] log-sum-exp of a); 0 where there is
        no class.
    """
    parts = sums[None]
    if group is not None:
        parts = sums.new_empty(group.size() * 5, sums.shape[1])
        all_gather_single(parts, sums, group)
        parts = parts.view(-1, *sums.shape)
    t_peak, (t_total, cross) = merge_exponentials(parts[:, 0], parts[:, 1], parts[:, 4])
    a_peak, (a_total,) = merge_exponentials(parts[:, 2], parts[:, 3])
    t_lse = torch.where(t_total == 0, 0.0, t_peak + t_total.log())
    a_lse = torch.where(a_total == 0, 0.0, a_peak + a_total.log())
    divergence = cross / t_total - (t_lse - a_lse)
    return torch.where(t_total == 0, 0.0, divergence), t_lse, a_lse


def _own_rows(gradient: Tensor, sides: DistillationInputs) -> Tensor:
    """Returns this rank's rows [capacity, D] of the sum over ranks."""
    if sides.group is None:
        return gradient
    own = gradient.new_empty(sides.capacity, gradient.shape[1])
    reduce_scatter_single(own, gradient, sides.group)
    return own
