"""The slow, readable truth: every fast or sharded path is compared with what stands here."""

from __future__ import annotations

import math
from typing import Any

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


class _InPlaceCrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy with the passes over the logits the published head makes."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        logits = logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
        logits.div_(logits.sum(dim=1, keepdim=True))
        ctx.save_for_backward(logits, labels)
        return logits.gather(1, labels[:, None]).clamp_min(1e-30).log().mean().neg()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        probabilities, labels = ctx.saved_tensors
        one_hot = torch.zeros_like(probabilities)
        one_hot.scatter_(1, labels[:, None], 1)
        return probabilities.sub_(one_hot).div_(len(labels)).mul_(gradients[0]), None


class DenseHead:
    """What users run today, for benchmarks: every step of the head is a pass over B x C.

    Logits, clamp, arccos, margin, cos, scale, softmax, one-hot, dense gradient, torch.optim.SGD.
    One rank, ArcFace (1, 0.5, 0), straight-through gradient.

    Args:
        weight: [C, D] class centres; a sampled head is one with fewer of them.
    """

    def __init__(self, weight: Tensor, learning_rate: float = 0.1) -> None:
        self.weight = torch.nn.Parameter(weight)
        self.optimizer = torch.optim.SGD(
            [self.weight], learning_rate, momentum=0.9, weight_decay=5e-4
        )

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Forward, backward and update; the embeddings' gradient is left in `.grad`."""
        cosines = torch.nn.functional.linear(
            torch.nn.functional.normalize(embeddings), torch.nn.functional.normalize(self.weight)
        ).clamp(-1, 1)
        rows = torch.arange(len(labels), device=labels.device)
        with torch.no_grad():
            cosines.arccos_()
            cosines[rows, labels] += 0.5
            cosines.cos_()
        loss = _InPlaceCrossEntropy.apply(cosines * 64.0, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()
