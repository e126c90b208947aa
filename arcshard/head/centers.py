"""The class centers (and biases) that take part in a step, read and updated in blocks of rows.

arcshard/head/fused.py knows this protocol only. `LocalCenters` reads the shard in place, all of it
or the rows of a sample; arcshard/head/offload.py keeps the shard in host memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arcshard.head.row_optimizer import RowOptimizer


class ClassCenters:
    """Rows of this rank's shard, on the device where the head computes.

    Args:
        weight: [num_rows_local, D] class centers.
        rule: Row optimizer that updates `weight` and owns its state.
        bias: [num_rows_local], or None.
        bias_rule: Row optimizer of `bias`.
        rows: [S] int64 distinct rows that take part, None for all.
        state: Optimizer state of `weight`; None for the state that `rule` owns.
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
        """Returns [stop - start, D]: a view of the shard, or copies of sampled or bf16 rows."""
        weight = self.weight.detach()
        if weight.dtype == torch.bfloat16:
            block = weight[start:stop] if self.rows is None else weight[self.rows[start:stop]]
            return block.float() if out is None else out.copy_(block)
        if self.rows is None:
            return weight[start:stop]
        return torch.index_select(weight, 0, self.rows[start:stop], out=out)

    def read_rows(self, rows: Tensor) -> Tensor:
        """Returns any rows [n, D] in working precision."""
        return _working(self._pick(self.weight, rows))

    def read_bias(self, start: int, stop: int) -> Tensor | None:
        """Returns the biases [stop - start], or None."""
        if self.bias is None:
            return None
        bias = self.bias.detach()
        return bias[start:stop] if self.rows is None else bias[self.rows[start:stop]]

    def read_bias_rows(self, rows: Tensor) -> Tensor | None:
        """Returns the biases [n] of any rows, or None."""
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
        """Updates these rows and their state, and no other row."""
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
        """Does nothing, because rows are updated in place."""

    def _pick(self, values: Tensor, rows: Tensor) -> Tensor:
        rows = rows if self.rows is None else self.rows[rows]
        return values.detach().index_select(0, rows)


def _working(rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype == torch.bfloat16 else rows
