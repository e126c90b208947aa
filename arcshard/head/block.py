"""The math of one block of class centers, without a loop, a collective or a state.

Shapes: B rows of the global batch, n classes in the block, K centers per class, n K rows of D. All
sums here leave the target class out: it has a logit of its own (arcshard/head/fused.py).

With numerators N_ij = exp(z_ij - m_i) df/dcos_ij, the block gives

    dE_i += r_i sum_j N_ij w^_j        dw^_j = sum_i r_i N_ij e^_i       w^ = w / |w|
    dw_j = (dw^_j - <dw^_j, w^_j> w^_j) / |w_j|

where r_i are numbers of a row of the batch. The division by |w| costs least where something is
written anyway. Operands in half precision are normalized as they are cast. In full precision the
centers are read in place, and the numerators are N_ij / |w_j|, which both products need.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from arcshard.margins.base import Context, Margin

NORM_FLOOR = 1e-12  # as torch.nn.functional.normalize
# exp(z - LEVEL) / |w| of |z| <= 64 and |w| >= NORM_FLOOR is at most 1.2e38. A row's factor is at
# most exp(LEVEL + 64) s = 2e31, which a loss scale of 2^16 does not make infinite.
LEVEL = 4.0


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Returns a context in which autocast is off.

    The meta device, where a step's operations are counted, has no autocast.
    """
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiplies `left` by `right`.

    Half-precision operands are multiplied exactly and summed in fp32. A CPU has no product of half
    precision that returns its sums. It is given the operands as fp32, and may round them to bf16,
    where its instructions for bf16 take half the time of fp32 (measured); they are rounded already.

    Args:
        left: [n, k] matrix.
        right: [k, m] matrix of the same dtype.

    Returns:
        [n, m] in fp32, or in fp64 for fp64 operands.
    """
    if left.dtype in (torch.float32, torch.float64):
        return torch.mm(left, right)
    if left.device.type == "cpu":
        with _operands_rounded_to_bf16():
            return torch.mm(left.float(), right.float())
    return torch.mm(left, right, out_dtype=torch.float32)


@contextmanager
def _operands_rounded_to_bf16() -> Iterator[None]:
    """Lets a CPU compute fp32 products of operands that it rounds to bf16."""
    # torch replaces this module by an object when it is imported, which mypy does not see.
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds `left` times `right`, as `matmul` computes it, to `total` in place."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(matmul(left, right))


def is_finite(values: Tensor) -> Tensor:
    """Returns what torch.isfinite returns, with half of its kernels."""
    return values.abs() < math.inf


def norms_of(centers: Tensor) -> Tensor:
    """Returns |w_j| of centers [rows, D], with the floor of torch's normalize."""
    return torch.linalg.vector_norm(centers, dim=1).clamp_min_(NORM_FLOOR)


def as_operand(centers: Tensor, norm: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Returns centers [rows, D] for products in `dtype`.

    Args:
        centers: [rows, D] in working precision.
        norm: [rows] norms, None where the margin does not normalize.
        dtype: Dtype of the operands.

    Returns:
        The centers themselves in full precision. In half precision they are rounded, and divided
        by their norms if there are any.
    """
    if dtype == centers.dtype:
        return centers
    rounded = torch.empty_like(centers, dtype=dtype)
    return (
        rounded.copy_(centers) if norm is None else torch.div(centers, norm[:, None], out=rounded)
    )


def logits_are_small(margin: Margin) -> bool:
    """Says whether |z| <= 64 for all other classes, so that no maximum has to be subtracted.

    exp(z) of such logits lies between 1.6e-28 and 6e27, and a sum over 10^9 classes stays below
    10^37.
    """
    return margin.normalize and not margin.bias and not margin.touches_others and margin.scale <= 64


def add_at_target(matrix: Tensor, column: Tensor, values: Tensor | float) -> None:
    """Adds one value per row to a matrix [B, n], where the row's target is among its columns.

    Args:
        matrix: [B, n], written in place.
        column: [B] int64 column of the target; a number outside [0, n) where it is elsewhere.
        values: [B] of the matrix's dtype, or one number.
    """
    inside = column.clamp(0, matrix.shape[1] - 1)
    if isinstance(values, float):
        values = matrix.new_full(column.shape, values)
    values = values.masked_fill(inside != column, 0.0)
    matrix.scatter_add_(1, inside[:, None], values[:, None])


def exponentials_of_small_logits(
    z: Tensor, column: Tensor, norm: Tensor | None, row_sum: Tensor, out: Tensor
) -> None:
    """Computes softmax numerators of logits at most 64, without subtracting their maximum.

    The numerators are exp(z), or exp(z - LEVEL) / |w| with `norm`, and 0 for the target.

    Args:
        z: [B, n] logits, multiplied by |w| if `norm` is given; overwritten.
        column: [B] int64 column of the target; a number outside [0, n) where it is elsewhere.
        norm: [n] |w|, or None.
        row_sum: [B], receives the sums of exp(z), or of exp(z - LEVEL) with `norm`.
        out: [B, n], receives the numerators; may be `z`.
    """
    if norm is not None:
        torch.addcmul(-(norm.log() + LEVEL), z, norm.reciprocal(), out=z)
    add_at_target(z, column, -math.inf)
    torch.exp(z, out=out)
    if norm is not None:
        torch.mv(out, norm, out=row_sum)
    else:
        torch.sum(out, dim=1, dtype=row_sum.dtype, out=row_sum)


def exponentials(
    z: Tensor,
    column: Tensor,
    norm: Tensor | None,
    row_sum: Tensor,
    margin: Margin,
    context: Context,
    bias: Tensor | None,
    centers_per_class: int,
) -> Tensor:
    """Computes softmax numerators of any margin in place, relative to the row maxima m.

    The numerators are exp(z - m) times the slope of `margin.others`, divided by |w| with `norm`; 0
    for the target and for centers that are not the best of their class.

    Args:
        z: [B, n K] similarities without bias, multiplied by |w| if `norm` is given and by s unless
            the margin touches the other classes; overwritten.
        column: [B] int64 column (class) of the target; a number outside [0, n) where it is in
            another block.
        norm: [n K] |w|, or None.
        row_sum: [B], receives the sums of exp(z - m).
        margin: The loss.
        context: What `margin.begin` returned for this batch.
        bias: [n K], or None.
        centers_per_class: K; a class counts with its best center.

    Returns:
        m [B], -inf where no class is left.
    """
    numerators, best, slope = z, None, None
    if norm is not None:
        z.div_(norm)
    if bias is not None:
        z.add_(bias, alpha=1.0 if margin.touches_others else margin.scale)
    if centers_per_class > 1:
        z, best = z.view(len(z), -1, centers_per_class).max(dim=2)
    if margin.touches_others:
        values, slope = margin.others(z, context)
        z = torch.mul(values, margin.scale, out=z)
    add_at_target(z, column, -math.inf)
    row_max = z.amax(dim=1)
    z.sub_(row_max.masked_fill(row_max == -math.inf, 0.0)[:, None])  # not -inf - -inf
    torch.sum(z.exp_(), dim=1, out=row_sum)
    if slope is not None:
        z.mul_(slope)
    if best is not None:
        grouped = numerators.zero_().view(*z.shape, centers_per_class)
        grouped.scatter_(2, best[:, :, None], z[:, :, None])
    if norm is not None:
        numerators.div_(norm)
    return row_max


def normalization_backward(
    gradient: Tensor, centers: Tensor, norm: Tensor, is_divided: bool
) -> Tensor:
    """Computes dw_j = (g_j - <g_j, w^_j> w^_j) / |w_j| with w^ = w / |w|.

    This is the backward of v -> c v / |v|, for which torch has a kernel that visits the rows once
    (it serves torch.nn.utils.parametrizations.weight_norm). Computed by dot products, a product
    and a difference it took three times as long on a CPU.

    Args:
        gradient: [rows, D], g, or g / |w| if it `is_divided`.
        centers: [rows, D], w.
        norm: [rows], |w|.
        is_divided: Whether the gradient is divided by |w| already.

    Returns:
        [rows, D], a new tensor.
    """
    norm = norm[:, None]
    c = norm if is_divided else torch.ones_like(norm)
    dw: Tensor = torch.ops.aten._weight_norm_interface_backward(gradient, centers, c, norm, 0)[0]
    return dw
