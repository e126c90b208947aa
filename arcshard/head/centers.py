"""The rows of a step: the class centers (and biases) that take part, read and moved in blocks.

arcshard/head/fused.py knows this protocol only. `LocalCenters` reads the shard where it lies, all
of it or the rows of a sample; arcshard/head/offload.py keeps the shard in host memory.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from arcshard.head.row_optimizer import RowOptimizer


class ClassCenters(Protocol):
    """Rows 0 .. num_rows - 1 of one step; K sub-centers of a class are K rows in a row."""

    num_rows: int
    reads_copies: bool
    """`read` gives a copy (sampled rows, half precision) rather than a view of the shard."""
    rule_matrices: int
    """Matrices [rows, D] that moving a block makes on the way."""

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """[stop - start, D] in working precision; `out` is used for it where it is a copy."""

    def read_rows(self, rows: Tensor) -> Tensor:
        """[n, D] of any rows, as constants."""

    def read_bias(self, start: int, stop: int) -> Tensor | None:
        """[stop - start], None where there is no bias."""

    def read_bias_rows(self, rows: Tensor) -> Tensor | None:
        """[n] of any rows, None where there is no bias."""

    def update(
        self,
        start: int,
        stop: int,
        current: Tensor,
        gradient: Tensor,
        bias_gradient: Tensor | None,
        learning_rate: float,
        bad: Tensor | None,
    ) -> None:
        """One step of the rule for these rows.

        Args:
            current: the rows as `read` gave them; overwritten, as the gradients may be.
        """

    def flush(self) -> None:
        """Called when all rows of the step have moved."""


class LocalCenters:
    """Rows of this rank's shard, on the device the head works on.

    Args:
        weight: [num_rows_local, D].
        rule: moves it, and owns its state.
        bias: [num_rows_local] or None; bias_rule: its rule.
        rows: [S] int64 distinct rows that take part, None for all.
        state: the rule's state for `weight`; None: what the rule owns.
    """

    def __init__(
        self,
        weight: Tensor,
        rule: RowOptimizer | None,
        bias: Tensor | None = None,
        bias_rule: RowOptimizer | None = None,
        rows: Tensor | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        self.weight, self.rule, self.bias, self.bias_rule = weight, rule, bias, bias_rule
        self.rows, self.state = rows, state
        self.num_rows = weight.shape[0] if rows is None else rows.shape[0]
        self.reads_copies = rows is not None or weight.dtype == torch.bfloat16
        self.rule_matrices = 0
        if rule is not None:
            self.rule_matrices = rule.matrices_per_block(weight, rows is not None, state)

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """[stop - start, D]: a view of the shard, or copies of the sampled rows."""
        weight = self.weight.detach()
        if weight.dtype == torch.bfloat16:
            block = weight[start:stop] if self.rows is None else weight[self.rows[start:stop]]
            return block.float() if out is None else out.copy_(block)
        if self.rows is None:
            return weight[start:stop]
        return torch.index_select(weight, 0, self.rows[start:stop], out=out)

    def read_rows(self, rows: Tensor) -> Tensor:
        """[n, D] of any rows."""
        return _working(self._pick(self.weight, rows))

    def read_bias(self, start: int, stop: int) -> Tensor | None:
        """[stop - start] or None."""
        if self.bias is None:
            return None
        bias = self.bias.detach()
        return bias[start:stop] if self.rows is None else bias[self.rows[start:stop]]

    def read_bias_rows(self, rows: Tensor) -> Tensor | None:
        """[n] or None."""
        return None if self.bias is None else self._pick(self.bias, rows)

    def update(
        self,
        start: int,
        stop: int,
        current: Tensor,
        gradient: Tensor,
        bias_gradient: Tensor | None,
        learning_rate: float,
        bad: Tensor | None,
    ) -> None:
        """Move these rows and their state, nothing else."""
        assert self.rule is not None
        rows = slice(start, stop) if self.rows is None else self.rows[start:stop]
        self.rule.update_rows(
            self.weight,
            gradient,
            rows,
            learning_rate,
            bad,
            state=self.state,
            current=current if self.reads_copies else None,
        )
        if self.bias is not None and self.bias_rule is not None and bias_gradient is not None:
            self.bias_rule.update_rows(self.bias, bias_gradient, rows, learning_rate, bad)

    def flush(self) -> None:
        """Nothing: rows move where they lie."""

    def _pick(self, values: Tensor, rows: Tensor) -> Tensor:
        rows = rows if self.rows is None else self.rows[rows]
        return values.detach().index_select(0, rows)


def _working(rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype == torch.bfloat16 else rows
