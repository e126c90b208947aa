"""The math of one block of class centers, without a loop, a collective or a state.

Shapes: B rows of the global batch, n classes in the block, K centers per class, n K rows of D. All
sums here leave the target class out: it has a logit of its own (arcshard/head/fused.py).

With E_ij = exp(z_ij - m_i) slope_ij, and per-row factors r_i that turn it into the gradient of the
loss with respect to the similarity, the block gives

    dE_i += r_i sum_j E_ij w^_j        dw^_j = sum_i r_i E_ij e^_i       w^ = w / |w|
    dw_j = (dw^_j - <dw^_j, w^_j> w^_j) / |w_j|

1 / |w_j| is multiplied into the columns of E rather than into the rows of w: for B <= 2 D fewer
bytes are read and written, and no normalized copy of w has to exist.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from arcshard.margins.base import Context, Margin

NORM_FLOOR = 1e-12  # as torch.nn.functional.normalize


def inverse_norms(centers: Tensor) -> Tensor:
    """Returns 1 / |w_j| of centers [rows, D], with the floor of torch's normalize."""
    return torch.linalg.vector_norm(centers, dim=1).clamp_min_(NORM_FLOOR).reciprocal_()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Returns a context in which autocast is off.

    The meta device, where a step's operations are counted, has no autocast.
    """
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def matmul(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Multiplies `left` by `right` with operands in `dtype`.

    Half-precision products are summed in fp32. A GPU returns those sums; a CPU rounds them once.

    Args:
        left: [n, k] matrix.
        right: [k, m] matrix.
        dtype: Dtype of the operands.
        out: [n, m] result matrix, used for fp32 and fp64 operands only.

    Returns:
        [n, m] in fp32, or in fp64 for fp64 operands.
    """
    if dtype in (torch.float32, torch.float64):
        return torch.mm(left, right, out=out)
    left, right = left.to(dtype), right.to(dtype)
    if left.device.type in ("cuda", "meta"):
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right).float()


def logits_are_small(margin: Margin) -> bool:
    """Says whether exp(z) of all other classes is safe in fp32 without subtracting a maximum.

    It is for cosines times s <= 64: exp(z) lies between exp(-64) = 1.6e-28 and exp(64) = 6e27, and
    a sum over 10^9 classes stays below 10^37.
    """
    return margin.normalize and not margin.bias and not margin.touches_others and margin.scale <= 64


def exponentials(
    similarities: Tensor,
    margin: Margin,
    context: Context,
    target_column: Tensor,
    centers_per_class: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the softmax numerators of the classes that are not the target, in place.

    Args:
        similarities: [B, n K] similarities, multiplied by s unless the margin touches the other
            classes; overwritten.
        margin: The loss.
        context: What `margin.begin` returned for this batch.
        target_column: [B] int64 column (class) of the target in this block; a number outside [0, n)
            where the target is in another block.
        centers_per_class: K; a class counts with its best center.

    Returns:
        (E [B, n K] multiplied by the slope of `margin.others`, 0 for the target and for centers
        that are not the best of their class; m [B], the row maxima (-inf where no class is left),
        or 0 where `logits_are_small`; row sums of exp(z - m) [B]).
    """
    best: Tensor | None = None
    z = similarities
    if centers_per_class > 1:
        z, best = similarities.view(len(similarities), -1, centers_per_class).max(dim=2)
    slope: Tensor | None = None
    if margin.touches_others:
        values, slope = margin.others(z, context)
        z = z.copy_(values) if values is not z else z
    inside = (target_column >= 0) & (target_column < z.shape[1])
    column = target_column.clamp(0, z.shape[1] - 1)[:, None]
    z.scatter_(1, column, torch.where(inside[:, None], -math.inf, z.gather(1, column)))

    if logits_are_small(margin):
        row_max = z.new_zeros(len(z))
    else:
        row_max = z.amax(dim=1)
        z.sub_(row_max.masked_fill(row_max == -math.inf, 0.0)[:, None])  # not -inf - -inf
    if margin.touches_others:
        z.mul_(margin.scale)
        row_max = row_max * margin.scale
    z.exp_()
    row_sum = z.sum(dim=1)
    if slope is not None:
        z.mul_(slope)
    if best is not None:
        grouped = similarities.zero_().view(*z.shape, centers_per_class)
        grouped.scatter_(2, best[:, :, None], z[:, :, None])
    return similarities, row_max, row_sum


def normalization_backward(gradient: Tensor, centers: Tensor, inverse_norm: Tensor) -> Tensor:
    """Computes dw from dw^ / |w|: dw_j = g_j - <g_j, w_j> w_j / |w_j|^2.

    This is the backward of v -> g v / |v| at g = |v|, for which torch has a kernel that visits the
    rows once (it serves torch.nn.utils.parametrizations.weight_norm). Computed by dot products, a
    product and a difference it took three times as long on a CPU.

    Args:
        gradient: [rows, D], g_j = sum_i r_i E_ij e^_i / |w_j|.
        centers: [rows, D], w.
        inverse_norm: [rows], 1 / |w_j|.

    Returns:
        [rows, D], a new tensor.
    """
    norm = inverse_norm.reciprocal()[:, None]
    projected: Tensor = torch.ops.aten._weight_norm_interface_backward(
        gradient, centers, norm, norm, 0
    )[0]
    return projected
