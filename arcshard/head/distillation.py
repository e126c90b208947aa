"""Knowledge distillation through class probabilities, the classes sharded over the ranks.

For a row with cosines c_j to the student's class centers and d_j to the teacher's, scale s and
temperature T, over the classes j that take part in the step and that the teacher knows:

    a_j = s c_j / T,   t_j = s d_j / T,   p = softmax(t),   q = softmax(a)
    loss = T^2 sum_j p_j (log p_j - log q_j),     dloss/dc_j = s T (q_j - p_j)

(Hinton et al. 2015, arXiv:1503.02531; no margin on either side.) Only the embeddings learn from it:
the student's centers are constants here, and get their gradient from the labels.

Blocks of classes are visited twice in the forward pass, once for the two log-sum-exps and
sum_j p_j (t_j - a_j), once for the gradient: 5 matmuls of B x D x C, and no B x C matrix. Backward
only scales what is ready, so the centers may have moved by then. Per step: one all-gather of both
embeddings, one of 5 B numbers, one reduce-scatter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arcshard.collectives import Group, all_gather_single, gather_rows, reduce_scatter_single
from arcshard.head.block import inverse_norms, matmul
from arcshard.head.centers import ClassCenters


@dataclass(frozen=True)
class TeacherCenters:
    """The teacher's class centers for this rank's classes, frozen.

    Attributes:
        unit: [num_classes_local, K, D] of length 1, zero where the teacher does not know the class.
        known: [num_classes_local] boolean.
    """

    unit: Tensor
    known: Tensor


@dataclass(frozen=True)
class DistillationInputs:
    """Both sides' centers of one step, and how they are compared.

    Attributes:
        student: rows of the step; centers_per_class: K of them in a row for a class.
        classes: [S] int64 local classes of the step, None for all.
        teacher: of all local classes.
        scale: s. temperature: T.
        capacity: rows per rank in the gathered batch. group: the ranks.
        budget_bytes: for the block in work.
        half: dtype of the operands of the large matmuls, None for full precision.
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
    """Mean of the loss above over the global batch, the same number on every rank.

    Args:
        local_unit: [b, D] the student's embeddings, of length 1; gets the gradient of the mean.
        local_teacher: [b, D_t] the teacher's, of length 1.

    Returns:
        Scalar; 0 where the teacher knows none of the step's classes.
    """
    loss: Tensor = _ShardedDivergence.apply(local_unit, local_teacher, sides)
    return loss


class _ShardedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, local_unit: Tensor, local_teacher: Tensor, sides: DistillationInputs
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
        if ctx.needs_input_grad[0]:
            factor = row_weight * (squared * sides.scale / sides.temperature)
            gradient = torch.zeros_like(blocks.student)
            for block in blocks:
                slope = (block.a - student_lse[:, None]).exp_()
                slope -= (block.t - teacher_lse[:, None]).exp_()
                gradient += block.through_centers(slope.mul_(factor[:, None]))
            ctx.save_for_backward(_own_rows(gradient, sides)[:rows])
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradients[0] * gradient, None, None


@dataclass
class _Block:
    """Some classes of the step: a, t [B, n], -inf where the teacher does not know the class, their
    difference t - a, and what the student's gradient goes through.
    """

    a: Tensor
    t: Tensor
    difference: Tensor
    rows: Tensor
    inverse_norm: Tensor
    best: Tensor | None
    dtype: torch.dtype

    def through_centers(self, slope: Tensor) -> Tensor:
        """[B, n] gradient to the student's cosines -> [B, D] to its embeddings."""
        if self.best is not None:
            k = len(self.rows) // slope.shape[1]
            slope = (
                slope.new_zeros(*slope.shape, k)
                .scatter_(2, self.best[:, :, None], slope[:, :, None])
                .view(len(slope), -1)
            )
        return matmul(slope * self.inverse_norm, self.rows, self.dtype)


class _Blocks:
    """The step's classes, a block at a time; `student` [B, D], `teacher` [B, D_t]."""

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
        inverse_norm = inverse_norms(rows)
        a = matmul(self.student, rows.t(), dtype).mul_(inverse_norm * factor)
        best = None
        if k > 1:
            a, best = a.view(len(a), -1, k).max(dim=2)
        unit, known = self._of_teacher(start, stop)
        t = matmul(self.teacher, unit.flatten(0, 1).t(), dtype).mul_(factor)
        t = t.view(len(t), -1, unit.shape[1]).amax(dim=2)
        difference = t - a
        difference.masked_fill_(~known, 0.0)
        t, a = t.masked_fill(~known, -math.inf), a.masked_fill(~known, -math.inf)
        return _Block(a, t, difference, rows, inverse_norm, best, dtype)

    def _of_teacher(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Its centers [n, K, D_t] and what it knows [n], where the work is done."""
        teacher, device = self.sides.teacher, self.student.device
        if self.sides.classes is None:
            unit, known = teacher.unit[start:stop], teacher.known[start:stop]
        else:
            classes = self.sides.classes[start:stop].to(teacher.unit.device)
            unit, known = teacher.unit[classes], teacher.known[classes]
        return unit.to(device, self.student.dtype), known.to(device)


def _sums_here(blocks: _Blocks) -> Tensor:
    """[5, B] over this rank's classes: peak of t, sum of exp(t - peak), the same of a, and
    sum of exp(t - peak) (t - a).
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
    """Over all ranks, [B] each: the divergence of p from q, log-sum-exp of t and of a (0 where
    there is no class).
    """
    parts = sums[None]
    if group is not None:
        parts = sums.new_empty(group.size() * 5, sums.shape[1])
        all_gather_single(parts, sums, group)
        parts = parts.view(-1, *sums.shape)
    totals, lse = [], []
    for first in (0, 2):
        peak = parts[:, first].amax(dim=0)
        shift = peak.masked_fill(peak == -math.inf, 0.0)
        factor = torch.exp(parts[:, first] - shift)
        total = (parts[:, first + 1] * factor).sum(dim=0)
        totals.append(total)
        lse.append(torch.where(total == 0, 0.0, shift + total.log()))
        if first == 0:
            cross = (parts[:, 4] * factor).sum(dim=0)
    divergence = cross / totals[0] - (lse[0] - lse[1])
    return torch.where(totals[0] == 0, 0.0, divergence), lse[0], lse[1]


def _own_rows(gradient: Tensor, sides: DistillationInputs) -> Tensor:
    """This rank's rows [capacity, D] of the sum over ranks."""
    if sides.group is None:
        return gradient
    own = gradient.new_empty(sides.capacity, gradient.shape[1])
    reduce_scatter_single(own, gradient, sides.group)
    return own
