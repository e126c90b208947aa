"""The slow, readable truth: every fast or sharded path is compared with what stands here."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from arcshard.losses import (
    DERIVATIVE_CLAMP,
    AdaFace,
    CombinedMargin,
    CurricularFace,
    ElasticFace,
    MagFace,
    Margin,
    Softmax,
)


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
    margin: CombinedMargin,
    embeddings: Tensor,
    labels: Tensor,
    weight: Tensor,
    classes: Tensor | None = None,
) -> Tensor:
    """Mean loss over the whole batch with all class centers on one device.

    Args:
        margin: The margin of the loss.
        embeddings: [B, D] embeddings.
        labels: [B] int64 classes.
        weight: [C, D] class centers.
        classes: int64 classes that take part (a sample; must hold every label), None for all.
    """
    unit_embeddings = embeddings / embeddings.norm(dim=1, keepdim=True).clamp_min(1e-12)
    unit_centers = weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-12)
    losses = []
    for embedding, label in zip(unit_embeddings, labels, strict=True):
        cosines = unit_centers @ embedding  # [C]
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
    One rank, ArcFace (1, 0.5, 0), straight-through gradient. In place where the published head
    is; without the copies it makes in backward. On a GPU the product is fp16, as there with
    fp16=True.

    Args:
        weight: [C, D] class centers.
        sample_rate: below 1 a sample is drawn as the published head does (a random number per
            class, topk), and the gradient is still dense.
    """

    def __init__(
        self, weight: Tensor, learning_rate: float = 0.1, sample_rate: float = 1.0
    ) -> None:
        self.weight = torch.nn.Parameter(weight)
        self.sample_rate = sample_rate
        self.optimizer = torch.optim.SGD(
            [self.weight], learning_rate, momentum=0.9, weight_decay=5e-4
        )

    def step(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Forward, backward and update; the embeddings' gradient is left in `.grad`."""
        weight: Tensor = self.weight
        if self.sample_rate < 1.0:
            with torch.no_grad():
                priority = torch.rand(len(weight), device=weight.device)
                priority[labels.unique()] = 2.0
                count = int(self.sample_rate * len(weight))
                classes = priority.topk(count).indices.sort().values
                labels = torch.searchsorted(classes, labels)
            weight = weight[classes]
        with torch.autocast("cuda", torch.float16, enabled=weight.is_cuda):
            cosines = torch.nn.functional.linear(
                torch.nn.functional.normalize(embeddings), torch.nn.functional.normalize(weight)
            )
        cosines = cosines.float().clamp(-1, 1)
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


def dense_loss_by_paper(
    margin: Margin,
    embeddings: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    centers_per_class: int = 1,
    classes: Tensor | None = None,
    margins_drawn: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """(mean loss, running values after it) of any loss, written as its paper's code has it.

    Everything is autograd's; only values inside the domain are meant (no cosine of +-1).

    Args:
        margin: The margin of the loss.
        embeddings: [B, D] embeddings.
        labels: [B] int64 classes.
        weight: [C K, D] class centers.
        bias: [C K] biases, None for none.
        centers_per_class: K.
        classes: those that take part, None for all.
        margins_drawn: [B] of ElasticFace, in the order of drawing.
    """
    rows = torch.arange(len(labels))
    norms = embeddings.norm(dim=1)
    e = embeddings / norms[:, None] if margin.normalize else embeddings
    w = weight / weight.norm(dim=1, keepdim=True) if margin.normalize else weight
    similarity = e @ w.T if bias is None else e @ w.T + bias
    similarity = similarity.view(len(e), -1, centers_per_class).max(dim=2).values  # [B, C]
    cosine = similarity[rows, labels]
    others, state, penalty = similarity, {}, torch.zeros(())

    if isinstance(margin, Softmax):
        phi = cosine
    elif isinstance(margin, CombinedMargin):
        phi = dense_target(margin, cosine)
        threshold = margin.interclass_filtering_threshold
        if threshold > 0:
            value = -math.inf if margin.interclass_filtering_mode == "remove" else 0.0
            others = torch.where(similarity > threshold, value, similarity)
    elif isinstance(margin, AdaFace):
        safe = norms.detach().clamp(0.001, 100)
        state["norm_mean"] = margin.t_alpha * safe.mean() + (1 - margin.t_alpha) * 20.0
        state["norm_std"] = margin.t_alpha * safe.std() + (1 - margin.t_alpha) * 100.0
        scaler = (safe - state["norm_mean"]) / (state["norm_std"] + 1e-3) * margin.h
        scaler = scaler.clamp(-1, 1)
        theta = (cosine.acos() - margin.margin * scaler).clamp(1e-3, math.pi - 1e-3)
        phi = theta.cos() - (margin.margin + margin.margin * scaler)
    elif isinstance(margin, MagFace):
        a = norms.clamp(margin.l_a, margin.u_a)
        slope = (margin.u_margin - margin.l_margin) / (margin.u_a - margin.l_a)
        m = slope * (a - margin.l_a) + margin.l_margin
        moved = cosine * m.cos() - (1 - cosine**2).sqrt() * m.sin()
        phi = torch.where(cosine > (math.pi - m).cos(), moved, cosine - (math.pi - m).sin() * m)
        penalty = margin.lambda_g * (a / margin.u_a**2 + 1 / a).mean()
    elif isinstance(margin, CurricularFace):
        m = margin.margin
        moved = cosine * math.cos(m) - (1 - cosine**2).sqrt() * math.sin(m)
        t = state["t"] = margin.alpha * cosine.detach().mean()
        others = torch.where(similarity > moved[:, None], similarity * (t + similarity), similarity)
        phi = torch.where(cosine > math.cos(math.pi - m), moved, cosine - math.sin(math.pi - m) * m)
    elif isinstance(margin, ElasticFace):
        assert margins_drawn is not None
        m = margins_drawn
        if margin.plus:  # the largest margin for the smallest cosine
            m = torch.empty_like(m)
            m[cosine.argsort()] = margins_drawn.sort(descending=True).values
        phi = (cosine.acos() + m).cos() if margin.kind == "arc" else cosine - m
    else:
        raise TypeError(f"no reference for {margin!r}")

    logits = margin.scale * others.clone()
    logits[rows, labels] = margin.scale * phi
    if classes is not None:
        absent = torch.ones(logits.shape[1], dtype=torch.bool)
        absent[classes] = False
        logits = logits.masked_fill(absent, -math.inf)
    loss = torch.nn.functional.cross_entropy(logits, labels) + penalty
    return loss, {name: float(value) for name, value in state.items()}


def dense_divergence(
    embeddings: Tensor,
    teacher_embeddings: Tensor,
    weight: Tensor,
    teacher_weight: Tensor,
    scale: float,
    temperature: float,
) -> Tensor:
    """T^2 KL(teacher || student), mean over the batch, of class probabilities without margin.

    Args:
        embeddings: [B, D] embeddings of the student.
        teacher_embeddings: [B, D_t] embeddings of the teacher.
        weight: [n, K, D] class centers of the student.
        teacher_weight: [n, K_t, D_t] class centers of the teacher, of the same classes.
        scale: Scale of the logits.
        temperature: T.
    """

    def log_probabilities(rows: Tensor, centers: Tensor) -> Tensor:
        unit = rows / rows.norm(dim=1, keepdim=True)
        unit_centers = centers / centers.norm(dim=2, keepdim=True)
        cosine = torch.einsum("bd,nkd->bnk", unit, unit_centers).amax(dim=2)
        return torch.log_softmax(scale * cosine / temperature, dim=1)

    student = log_probabilities(embeddings, weight)
    teacher = log_probabilities(teacher_embeddings, teacher_weight)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(dim=1).mean()
