"""The class centers (and biases) that take part in a step, read and updated in blocks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from arcshard.head import kernels
from arcshard.head.row_optimizer import RowOptimizer, Rows, State, in_working_precision, take


class ClassCenters:
    """Rows 0 .. num_rows - 1 of one step, on the device where the head computes.

    They are the shard or the rows of a sample; the K sub-centers of a class are K consecutive rows.
    arcshard/head/offload.py has those of a shard in host memory.

    Args:
        weight: [num_rows_local, D] class centers.
        rule: Row optimizer that updates `weight` and owns its state.
        bias: [num_rows_local], or None.
        bias_rule: Row optimizer of `bias`.
        rows: [S] int64 distinct rows that take part, None for all.
        state: Optimizer state of `weight`; None for the state that `rule` owns.

    Attributes:
        num_rows: Number of rows that take part.
        reads_copies: Whether `read` returns a copy (sampled rows, half precision) rather than a
            view of the shard.
        rule_matrices: Number of temporary matrices [rows, D] that the update of a block needs.
    """

    def __init__(
        self,
        weight: Tensor,
        rule: RowOptimizer | None,
        bias: Tensor | None = None,
        bias_rule: RowOptimizer | None = None,
        rows: Tensor | None = None,
        state: State | None = None,
    ) -> None:
        self.weight, self.rule, self.bias, self.bias_rule = weight, rule, bias, bias_rule
        self.rows, self.state = rows, state
        self.num_rows = weight.shape[0] if rows is None else rows.shape[0]
        self.reads_copies = rows is not None or weight.dtype == torch.bfloat16
        self.rule_matrices = 0
        if rule is not None:
            self.rule_matrices = rule.matrices_per_block(weight, rows is not None, state)

    def read(self, start: int, stop: int) -> Tensor:
        """Returns rows [stop - start, D] in working precision."""
        return in_working_precision(take(self.weight.detach(), self._in_shard(start, stop)))

    def read_rows(self, rows: Tensor) -> Tensor:
        """Returns any rows [n, D] in working precision, as constants."""
        rows = rows if self.rows is None else self.rows[rows]
        return in_working_precision(take(self.weight.detach(), rows))

    def read_bias(self, start: int, stop: int) -> Tensor | None:
        """Returns the biases [stop - start], or None without a bias."""
        return None if self.bias is None else take(self.bias.detach(), self._in_shard(start, stop))

    def read_bias_rows(self, rows: Tensor) -> Tensor | None:
        """Returns the biases [n] of any rows, or None without a bias."""
        rows = rows if self.rows is None else self.rows[rows]
        return None if self.bias is None else take(self.bias.detach(), rows)

    def update(
        self,
        start: int,
        stop: int,
        current: Tensor,
        gradient: Tensor,
        learning_rate: float,
        bad: Tensor | None,
    ) -> None:
        """Applies one step of the row optimizer to rows start .. stop - 1, and to no other row.

        Args:
            start: First row.
            stop: Row after the last one.
            current: [stop - start, D] the rows as `read` returned them; overwritten.
            gradient: [stop - start, D]; may be overwritten.
            learning_rate: Learning rate of this step.
            bad: Boolean scalar on the device. Where it is True, nothing is updated.
        """
        assert self.rule is not None
        self.rule.update_rows(
            self.weight,
            gradient,
            self._in_shard(start, stop),
            learning_rate,
            bad,
            state=self.state,
            current=current if self.reads_copies else None,
            numbers=self.numbers(start, stop),
        )

    def normalized(self, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns normalized rows [stop - start, D] and their norms [stop - start], by a kernel."""
        weight, rows = self.weight.detach(), self._in_shard(start, stop)
        if isinstance(rows, slice):
            return kernels.normalize_rows(weight[rows], None, dtype)
        return kernels.normalize_rows(weight, rows, dtype)

    def update_by_kernel(
        self,
        start: int,
        stop: int,
        gradient: Tensor,
        learning_rate: float,
        bad: Tensor | None,
        normalizes: bool,
    ) -> None:
        """Does what `update` does, by one kernel.

        Args:
            start: First row.
            stop: Row after the last one.
            gradient: [stop - start, D] of the normalized rows if it `normalizes`, else of the rows.
            learning_rate: Learning rate of this step.
            bad: Boolean scalar on the device. Where it is True, nothing is updated.
            normalizes: Whether the gradient goes through the normalization.
        """
        assert self.rule is not None
        rows, weight, numbers = self._in_shard(start, stop), self.weight.detach(), None
        state = self.rule.state(self.weight) if self.state is None else self.state
        first_row = self.rule.first_row
        if isinstance(rows, slice):
            weight, state = weight[rows], {name: part[rows] for name, part in state.items()}
            numbers = self.numbers(start, stop)
            first_row += start if numbers is None else 0
        kernels.update_rows(
            self.rule,
            weight,
            gradient,
            learning_rate,
            bad,
            state=state,
            rows=None if isinstance(rows, slice) else rows,
            numbers=numbers,
            first_row=first_row,
            normalizes=normalizes,
        )

    def update_bias(
        self, start: int, stop: int, gradient: Tensor, learning_rate: float, bad: Tensor | None
    ) -> None:
        """Applies one step of the row optimizer to biases start .. stop - 1.

        Args:
            start: First row.
            stop: Row after the last one.
            gradient: [stop - start].
            learning_rate: Learning rate of this step.
            bad: Boolean scalar on the device. Where it is True, nothing is updated.
        """
        assert self.bias is not None
        assert self.bias_rule is not None
        self.bias_rule.update_rows(
            self.bias, gradient, self._in_shard(start, stop), learning_rate, bad
        )

    def numbers(self, start: int, stop: int) -> Tensor | None:
        """Returns [stop - start] numbers of rows in the shard; None where `weight` is the shard."""
        return None

    def flush(self) -> None:
        """Completes the step when all its rows are updated; here they are updated in place."""
        for rule in (self.rule, self.bias_rule):
            if rule is not None:
                rule.end_step()

    def _in_shard(self, start: int, stop: int) -> Rows:
        return slice(start, stop) if self.rows is None else self.rows[start:stop]
