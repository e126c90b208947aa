"""The slow, readable truth: every fast or sharded path is compared with what stands here."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from losses import DERIVATIVE_CLAMP, CombinedMargin


def dense_target(margin: CombinedMargin, cosine: Tensor) -> Tensor:
    """phi(cos theta) written from the formula, differentiable by autograd (exact mode).

    Autograd differentiates arccos, so the cosine is clamped as the product clamps it, inside
    the derivative only.
    """
    inner = cosine.clamp(-1 + DERIVATIVE_CLAMP, 1 - DERIVATIVE_CLAMP)

    def phi(value: Tensor) -> Tensor:
        angle = margin.m1 * torch.acos(value) + margin.m2
        k = torch.floor(angle / math.pi)
        return (-1.0) ** k * torch.cos(angle) - 2 * k - margin.m3

    if margin.m1 == 1.0 and margin.m2 == 0.0:
        return cosine - margin.m3
    value = phi(cosine.detach().clamp(-1, 1))
    if margin.gradient == "straight_through":
        return value + (cosine - cosine.detach())
    # autograd's slope at the clamped cosine, passed to the cosine itself
    point = inner.detach().requires_grad_(True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(phi(point).sum(), point)
    return value + slope * (cosine - cosine.detach())


def dense_loss(
    margin: CombinedMargin, embeddings: Tensor, labels: Tensor, weight: Tensor,
    classes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Mean loss over the whole batch with all class centres on one device.

    Args:
        embeddings: [B, D]; labels: [B] int64; weight: [C, D].
        classes: int64 classes that take part (a sample; must hold every label), None for all.
    """
    unit_embeddings = embeddings / embeddings.norm(dim=1, keepdim=True).clamp_min(1e-12)
    unit_centres = weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-12)
    losses = []
    for embedding, label in zip(unit_embeddings, labels, strict=True):
        cosines = unit_centres @ embedding  # [C]
        logits = []
        candidates = range(len(weight)) if classes is None else classes.tolist()
        for other in candidates:
            if other == int(label):
                logits.append(margin.scale * dense_target(margin, cosines[other]))
                continue
            cosine = cosines[other]
            threshold = margin.interclass_filtering_threshold
            if threshold > 0 and cosine.detach() > threshold:
                if margin.interclass_filtering_mode == "remove":
                    continue
                cosine = cosine * 0.0
            logits.append(margin.scale * cosine)
        target = margin.scale * dense_target(margin, cosines[int(label)])
        losses.append(torch.logsumexp(torch.stack(logits), dim=0) - target)
    return torch.stack(losses).mean()
