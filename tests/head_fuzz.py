"""Random cases of PartialFC, and the dense float64 truth that they are compared with.

A case follows from one integer: `draw_case(seed)`. `run_case` runs it on every rank with a head in
float64, and `check_case` compares what the ranks recorded with formulas that stand here: all
classes on one process, autograd, nothing of the head's own formulas. Every step is checked by
itself: its truth starts from the values that the head had before the step.

`in_fp32` makes of a case one of a head in fp32, with the kernels of Triton (which then need
TRITON_INTERPRET=1 in the environment of the ranks) or without. The truth stays float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arcshard import losses
from arcshard.head.kernels import KernelMode
from arcshard.head.row_optimizer import AdamWRows, SGDRows
from arcshard.partial_fc import PartialFC, UpdateMode
from arcshard.random import hash_key
from arcshard.shard import class_range

NO_TRACE = ("no_grad between", "evaluation before", "evaluation between", "evaluation after")
"""Forwards that may not change any later number: the truth does not know of them."""

ORDERS = (*NO_TRACE, "thrown away", "two forwards", "frozen empty", "not finite")
"""What a step may contain beside forward, backward and step.

    no_grad between      a forward without gradient between forward and backward
    evaluation before    a forward in evaluation mode before the forward, between forward and
      / between / after  backward, or between backward and step
    thrown away          a forward in training whose loss is not used, before the real one
    two forwards         all forwards of the step, then all backwards; for r < 1 without `prepare`:
                         two forwards, then the backward of the first loss
    frozen empty         ranks with an empty batch bring it without requires_grad
    not finite           an embedding of the last micro-batch is NaN or infinite
"""

LOSSES = (
    "Softmax",
    "NormFace",
    "ArcFace",
    "CosFace",
    "SphereFace",
    "CombinedMargin",
    "AdaFace",
    "MagFace",
    "CurricularFace",
    "ElasticFace",
)
FAR = -1e30  # a logit that takes no part: its exponential is 0 and so is its gradient


# --- what is drawn ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A global batch: rows per rank, seeds of embeddings and labels, size of the embeddings.

    `aligned` rows have a cosine of +-1 with an initial center of their class; `strange` is NaN or
    infinity in one embedding, or None.
    """

    sizes: tuple[int, ...]
    seed: int
    label_seed: int
    size: float
    aligned: bool = False
    strange: float | None = None

    def rows(self, case: Case) -> tuple[Tensor, Tensor]:
        """Embeddings [B, D] and labels [B] of all ranks."""
        count, width = sum(self.sizes), case.embedding_size
        generator = torch.Generator().manual_seed(self.label_seed)
        labels = torch.randint(case.num_classes, (count,), generator=generator)
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(count, width, generator=generator, dtype=torch.float64) * self.size
        x *= torch.randn(count, 1, generator=generator, dtype=torch.float64).exp()
        if self.aligned:
            own = case.initial("weight")[labels[::2] * case.centers_per_class]
            x[::2] = own * x[::2, :1].sign() * x[::2].norm(dim=1, keepdim=True) / own.norm()
        if self.strange is not None:
            x[self.seed % count, self.seed % width] = self.strange
        return x, labels

    def part(self, case: Case, rank: int) -> tuple[Tensor, Tensor]:
        """The rows of one rank."""
        start = sum(self.sizes[:rank])
        x, labels = self.rows(case)
        return x[start : start + self.sizes[rank]], labels[start : start + self.sizes[rank]]


@dataclass(frozen=True)
class Step:
    """One optimizer step: micro-batches, how the head is called, and what else is called."""

    parts: tuple[Batch, ...]
    orders: dict[str, Batch]  # of ORDERS, each with the batch that its own forward brings
    learning_rate: float
    in_backward: bool  # the learning rate is passed to forward
    prepare: bool
    factor: float  # multiplies the loss
    divide: bool  # whether the factor is passed to `step` as gradient_scale
    bad: bool | None
    frozen: bool  # no embedding requires a gradient
    keeps: bool  # whether losses that are not used live until the end of the step

    @property
    def waits(self) -> bool:
        return "two forwards" in self.orders


@dataclass(frozen=True)
class Case:
    seed: int
    world_size: int
    loss: str
    options: dict[str, Any]
    centers_per_class: int
    num_classes: int
    embedding_size: int
    rule: str
    rule_options: dict[str, Any]
    sample_rate: float
    update: UpdateMode
    workspace_mib: float
    batch_size_per_rank: int | None
    center_device: str | None
    weight_size: float
    steps: tuple[Step, ...]
    kernels: KernelMode | None = None  # of a head in fp32; None for one in float64

    def __str__(self) -> str:
        """All but the steps, and their orders."""
        orders = [" + ".join(step.orders) or "plain" for step in self.steps]
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return (
            f"seed {self.seed}: {self.loss}({options}), K {self.centers_per_class}, "
            f"C {self.num_classes}, D {self.embedding_size}, r {self.sample_rate}, "
            f"{self.rule} {self.update}, ranks {self.world_size}, orders {orders}"
            + (f", fp32 {self.kernels}" if self.kernels else "")
        )

    @property
    def orders(self) -> set[str]:
        return {name for step in self.steps for name in (step.orders or ("plain",))}

    @property
    def scale(self) -> float:
        return self.options["scale"]

    @property
    def rtol(self) -> float:
        """Allowed error of a number, relative to the largest one of its kind."""
        return 2e-4 if self.kernels else 1e-9

    @property
    def noise(self) -> float:
        """Allowed error of a cosine, which a gradient has however small it is."""
        return 1e-6 if self.kernels else 1e-13

    @property
    def normalizes(self) -> bool:
        return self.options.get("normalize", True)

    def initial(self, name: str) -> Tensor:
        """Class centers [C K, D] or biases [C K] before the first step."""
        rows = self.num_classes * self.centers_per_class
        shape = (rows, self.embedding_size) if name == "weight" else (rows,)
        generator = torch.Generator().manual_seed(hash_key(self.seed, len(shape)))
        return torch.randn(shape, generator=generator, dtype=torch.float64) * self.weight_size


def draw_case(
    seed: int, orders: tuple[str, ...] = ORDERS, ranks: tuple[int, ...] = (1, 2, 3, 4)
) -> Case:
    """The case of a seed.

    Args:
        seed: Any integer.
        orders: Those of ORDERS that may occur; () for forward, backward and step alone.
        ranks: Numbers of ranks to choose from.
    """
    random = Random(seed)
    world_size = random.choice(ranks)
    loss = random.choice(LOSSES)
    options = _draw_options(loss, random)
    r = random.choice((1.0, 1.0, 0.6, 0.3, 0.05, 0.0))
    updates: tuple[UpdateMode, ...] = ("fused", "fused", "autograd")
    update = random.choice(updates)
    k, num_classes = random.choice((1, 1, 2, 3)), random.randint(1, random.choice((5, 60)))
    width, limit = random.randint(2, 16), random.randint(1, 6)
    rule = random.choice(("SGDRows", "AdamWRows"))
    rule_options: dict[str, Any] = {"weight_decay": random.choice((0.0, 0.1))}
    if rule == "SGDRows":
        rule_options["momentum"] = random.choice((0.0, 0.9))
    else:
        rule_options |= {"betas": (0.8, 0.95), "eps": random.choice((1e-8, 1e-3))}
    # Memory for a few classes, whose logits and centers need several matrices; or for all.
    touches = loss == "CurricularFace" or options.get("interclass_filtering_threshold", 0) > 0
    matrices = 1 + 3 * touches + 3 * (k > 1)
    per_class = 8 * k * (world_size * limit * matrices + 6 * width + 8)
    workspace = random.choice((random.choice((1.5, 3.0, 8.0)) * per_class / 2**20, 64.0))
    can_offload = update == "fused" and r < 1 and not options.get("bias")
    case = Case(
        seed=seed,
        world_size=world_size,
        loss=loss,
        options=options,
        centers_per_class=k,
        num_classes=num_classes,
        embedding_size=width,
        rule=rule,
        rule_options=rule_options,
        sample_rate=r,
        update=update,
        workspace_mib=workspace,
        batch_size_per_rank=random.choice((None, limit)),
        center_device="cpu" if can_offload and random.random() < 0.4 else None,
        weight_size=random.choice((0.05, 1.0)),
        steps=(),
    )
    steps: list[Step] = []
    for _ in range(random.randint(1, 4)):
        steps.append(_draw_step(case, random, limit, orders, is_first=not steps))
        if "two forwards" in steps[-1].orders and r < 1 and not steps[-1].prepare:
            break  # the head may refuse this step, and nothing says how a refused step continues
    return replace(case, steps=tuple(steps))


def in_fp32(case: Case, kernels: KernelMode) -> Case | None:
    """The case of a head in fp32 with these kernels; None where fp32 has no answer.

    That is update="autograd", which has no kernels, and cosines of +-1, where the slope of a margin
    is a quotient of rounding errors.
    """
    is_aligned = any(part.aligned for step in case.steps for part in step.parts)
    return None if case.update != "fused" or is_aligned else replace(case, kernels=kernels)


def _draw_options(loss: str, random: Random) -> dict[str, Any]:
    options: dict[str, Any] = {"scale": random.choice((1.0, 8.0, 30.0, 64.0, 64.5, 100.0))}
    if loss == "Softmax":
        options = {"scale": random.choice((1.0, 3.0)), "normalize": random.random() < 0.3}
        options["bias"] = random.random() < 0.6
    elif loss in ("ArcFace", "CosFace", "SphereFace", "CombinedMargin"):
        choices = {"ArcFace": (0.0, 0.5, 2.5), "CosFace": (0.0, 0.4), "SphereFace": (0.7, 1.7, 4.0)}
        if loss == "CombinedMargin":
            options |= {"m1": random.choice((0.9, 1.0, 1.35, 3.0))}
            options |= {"m2": random.choice((0.0, 0.3, 3.0)), "m3": random.choice((0.0, 0.2, 2.0))}
        else:
            options["margin"] = random.choice(choices[loss])
        options["gradient"] = random.choice(("exact", "exact", "straight_through"))
        options["interclass_filtering_threshold"] = random.choice((0.0, 0.0, 0.1, 0.5))
        options["interclass_filtering_mode"] = random.choice(("remove", "legacy"))
    elif loss == "AdaFace":
        options |= {"margin": random.choice((0.4, 1.2)), "h": random.choice((0.333, 3.0))}
        options["t_alpha"] = random.choice((0.01, 0.5, 1.0))
    elif loss == "MagFace":
        bounds = random.choice(({"l_a": 10.0, "u_a": 110.0}, {"l_a": 0.5, "u_a": 3.0}))
        options |= {"l_margin": random.choice((0.0, 0.45)), "u_margin": random.choice((0.8, 1.5))}
        options |= {**bounds, "lambda_g": random.choice((0.0, 20.0))}
    elif loss == "CurricularFace":
        options |= {"margin": random.choice((0.1, 0.5)), "alpha": random.choice((0.01, 0.7))}
    elif loss == "ElasticFace":
        options |= {"kind": random.choice(("arc", "cos")), "margin": random.choice((0.1, 0.5))}
        options |= {"std": random.choice((0.0125, 0.3)), "plus": random.random() < 0.5}
    return options


def _draw_step(
    case: Case, random: Random, limit: int, allowed: tuple[str, ...], is_first: bool
) -> Step:
    def batch(some_empty: bool = False) -> Batch:
        sizes = [random.randint(0, limit) * (random.random() < 0.8) for _ in range(case.world_size)]
        if some_empty:
            sizes[random.randrange(case.world_size)] = 0
        if not any(sizes):  # the global batch needs a row
            sizes[sizes.index(0, random.randrange(len(sizes)))] = limit
        size = random.choice((0.1, 1.0, 5.0, 30.0) if case.normalizes else (0.1, 0.5))
        return Batch(tuple(sizes), random.getrandbits(40), random.getrandbits(40), size)

    names = random.sample(allowed, min(len(allowed), random.choice((0, 1, 1, 2, 3))))
    sampled, fused = case.sample_rate < 1, case.update == "fused"
    count = random.choice((1, 1, 2, 3))
    if case.world_size == 1:
        names = [name for name in names if name != "frozen empty"]
    if "two forwards" in names:
        count = random.choice((2, 3))
    prepare = random.random() < 0.3 or (count > 1 and "two forwards" not in names)
    if "two forwards" in names and sampled and not prepare:
        count, names = 2, [name for name in names if name != "not finite"]
    parts = [batch(some_empty="frozen empty" in names) for _ in range(count)]
    if is_first and case.normalizes and not case.options.get("plus") and random.random() < 0.15:
        parts[0] = replace(parts[0], aligned=True)
    orders = {name: batch() for name in names}
    if "thrown away" in orders:  # `prepare` knows the labels of the step only
        orders["thrown away"] = replace(parts[0], seed=random.getrandbits(40), aligned=False)
    if "not finite" in orders:
        strange = random.choice((math.nan, math.inf, -math.inf))
        parts[-1] = replace(parts[-1], strange=strange, aligned=False)
    in_backward = count == 1 and random.random() < (0.5 if fused else 0.2)
    return Step(
        parts=tuple(parts),
        orders=orders,
        learning_rate=random.choice((0.01, 0.3)),
        in_backward=in_backward,
        prepare=prepare,
        factor=random.choice((1.0, 1.0, 0.125, 1024.0)),
        divide=not in_backward and random.random() < 0.8,
        bad=None if in_backward else random.choice((None, None, False, True)),
        frozen=random.random() < 0.05,
        keeps=random.random() < 0.5,
    )


# --- what a rank does ------------------------------------------------------------------------


def run_case(rank: int, world_size: int, case: Case) -> list[dict[str, Any]]:
    """Runs the case on this rank; returns what it saw in each step."""
    assert world_size == case.world_size
    records = _run(rank, case)
    has_trace = any(set(step.orders) & set(NO_TRACE) for step in case.steps)
    if case.sample_rate < 1 and has_trace:
        # The truth takes the classes from the head, so these are compared with those of a head
        # for which the forwards that may leave no trace do not happen.
        for record, plain in zip(records, _run(rank, _without_no_trace(case)), strict=True):
            record["classes_without"] = plain["classes"]
    return records


def _without_no_trace(case: Case) -> Case:
    def plain(step: Step) -> Step:
        kept = {name: value for name, value in step.orders.items() if name not in NO_TRACE}
        return replace(step, orders=kept)

    return replace(case, steps=tuple(plain(step) for step in case.steps))


def _run(rank: int, case: Case) -> list[dict[str, Any]]:
    rule = {"SGDRows": SGDRows, "AdamWRows": AdamWRows}[case.rule](**case.rule_options)
    head = PartialFC(
        getattr(losses, case.loss)(**case.options),
        case.embedding_size,
        case.num_classes,
        case.sample_rate,
        row_optimizer=rule,
        update=case.update,
        batch_size_per_rank=case.batch_size_per_rank,
        centers_per_class=case.centers_per_class,
        workspace_mib=case.workspace_mib,
        seed=case.seed,
        dtype=torch.float32 if case.kernels else torch.float64,
        center_device=case.center_device,
        kernels=case.kernels or "torch",
    )
    assert head.has_kernels == (case.kernels == "triton"), head.describe_kernels()
    here, k = head.class_range, case.centers_per_class
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(case.initial(name)[here.start * k : here.stop * k])
    return [_run_step(head, case, step, rank) for step in case.steps]


def _run_step(head: PartialFC, case: Case, step: Step, rank: int) -> dict[str, Any]:
    record: dict[str, Any] = {"before": _snapshot(head), "losses": [], "classes": []}
    record |= {"other_losses": {}, "refused": False, "gradients": []}
    kept: list[Tensor] = []

    def bring(batch: Batch) -> tuple[Tensor, Tensor]:
        x, y = batch.part(case, rank)
        if step.frozen or ("frozen empty" in step.orders and len(x) == 0):
            return x, y
        return x.requires_grad_(True), y

    def other_forward(name: str) -> None:
        if name not in step.orders:
            return
        head.train(not name.startswith("evaluation"))
        with torch.set_grad_enabled(name not in NO_TRACE or (step.keeps and not head.training)):
            loss = head(*bring(step.orders[name]), rate)
        head.train()
        record["other_losses"].setdefault(name, []).append(loss.item())
        if step.keeps:
            kept.append(loss)

    rate = step.learning_rate if step.in_backward else None
    inputs = [bring(part) for part in step.parts]
    waiting: list[Tensor] = []
    is_alone = step.waits and case.sample_rate < 1 and not step.prepare

    def calls() -> None:
        if step.prepare:
            head.prepare([y for _, y in inputs])
        other_forward("evaluation before")
        other_forward("thrown away")
        for x, y in inputs:
            loss = head(x, y, rate)
            classes = head.sampled_centers()[1]
            record["losses"].append(loss.item())
            record["classes"].append(None if classes is None else classes.numpy().copy())
            other_forward("no_grad between")
            other_forward("evaluation between")
            waiting.append(loss * step.factor / (1 if is_alone else len(inputs)))
            if not step.waits:
                waiting.pop().backward()
        for loss in waiting[:1] if is_alone else reversed(waiting):
            loss.backward()
        other_forward("evaluation after")
        bad = None if step.bad is None else torch.tensor(step.bad)
        scale = torch.tensor(step.factor, dtype=torch.float64) if step.divide else None
        head.step(step.learning_rate, bad, scale)

    try:
        calls()
    except RuntimeError as error:
        if not is_alone:
            raise
        record["refused"] = str(error)
    record["gradients"] = [None if x.grad is None else x.grad.numpy() for x, _ in inputs]
    record["after"] = _snapshot(head)
    return record


def _snapshot(head: PartialFC) -> dict[str, np.ndarray]:
    """Copies of centers, biases, their optimizer state, and running values of the margin."""
    found: dict[str, Tensor] = dict(head.named_parameters())
    names = {id(parameter): name for name, parameter in found.items()}
    for parameter, rule in head.optimized_parameters():
        for name, part in rule.state(parameter).items():
            found[f"{names[id(parameter)]}.{name}"] = part
    found |= {name: value for name, value in head.named_buffers() if name.startswith("margin_")}
    return {name: value.detach().cpu().numpy().copy() for name, value in found.items()}


# --- the truth -------------------------------------------------------------------------------


def past_pi(angle: Tensor) -> Tensor:
    """cos(a), continued monotonically past pi: (-1)^k cos(a) - 2k with k = floor(a / pi)."""
    k = torch.floor(angle / math.pi).clamp_min(0)
    return (1 - 2 * (k % 2)) * torch.cos(angle) - 2 * k


def linear_tail(cosine: Tensor, m: Tensor) -> Tensor:
    """cos(theta + m) up to theta + m = pi, and cos(theta) - m sin(m) beyond."""
    angle = torch.acos(cosine) + m
    return torch.where(angle <= math.pi, torch.cos(angle), cosine - m * torch.sin(m))


def with_clamped_slope(phi: Any, cosine: Tensor, straight_through: bool = False) -> Tensor:
    """phi(cosine) whose derivative is taken at the cosine clamped to +-(1 - 1e-6)."""
    at = cosine.detach().clamp(-1 + 1e-6, 1 - 1e-6).requires_grad_(True)
    (slope,) = torch.autograd.grad(phi(at).sum(), at, retain_graph=True)
    slope = torch.ones_like(slope) if straight_through else slope
    return phi(cosine.detach().clamp(-1, 1)) + slope * (cosine - cosine.detach())


def elastic_margins(case: Case, batch: Batch, own: Tensor, key: int) -> Tensor:
    """[B] draws, one per row of the padded batch; with `plus` the hardest row has the largest."""
    capacity = case.batch_size_per_rank or max(batch.sizes)
    draws = torch.randn(
        case.world_size * capacity,
        generator=torch.Generator().manual_seed(hash_key(case.seed, 0xD4A3, key)),
        dtype=torch.float64,
    ).view(case.world_size, capacity)
    drawn = torch.cat([row[:size] for row, size in zip(draws, batch.sizes, strict=True)])
    margins = case.options["margin"] + case.options["std"] * drawn
    if case.options["plus"]:
        easiest_first = own.detach().argsort(descending=True)
        margins[easiest_first] = margins.sort().values.clone()
    return margins


def row_losses(
    case: Case,
    batch: Batch,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    takes_part: Tensor,
    state: dict[str, Tensor],
    key: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """[B] losses of a global batch, differentiable, and the margin's running values after it."""
    o, norms, penalty, after = case.options, x.norm(dim=1), torch.zeros(()), state
    if case.normalizes:
        x, weight = x / norms[:, None], weight / weight.norm(dim=1, keepdim=True)
    similarities = x @ weight.T + (0 if bias is None else bias)  # [B, C K]
    f = similarities.view(len(x), case.num_classes, -1).max(dim=2).values  # [B, C]: the best of K
    own = f.gather(1, y[:, None]).squeeze(1)
    if case.loss in ("Softmax", "NormFace"):
        phi = own
    elif case.loss == "AdaFace":
        a = norms.detach().clamp(1e-3, 100.0)
        std = ((a - a.mean()).square().sum() / max(len(a) - 1, 1)).sqrt()
        after = {
            name: o["t_alpha"] * new + (1 - o["t_alpha"]) * state[name]
            for name, new in (("norm_mean", a.mean()), ("norm_std", std))
        }
        n = o["h"] * (a - after["norm_mean"]) / (after["norm_std"] + 1e-3)
        m = o["margin"] * n.clamp(-1, 1)
        phi = with_clamped_slope(
            lambda c: torch.cos((torch.acos(c) - m).clamp(1e-3, math.pi - 1e-3)), own
        ) - (o["margin"] + m)
    elif case.loss == "MagFace":
        a = norms.clamp(o["l_a"], o["u_a"])
        growth = (o["u_margin"] - o["l_margin"]) / (o["u_a"] - o["l_a"])
        m = o["l_margin"] + growth * (a - o["l_a"])
        phi = with_clamped_slope(lambda c: linear_tail(c, m), own)
        penalty = o["lambda_g"] * (a / o["u_a"] ** 2 + 1 / a)
    elif case.loss == "CurricularFace":
        m, cosine = torch.tensor(o["margin"], dtype=torch.float64), own.detach().clamp(-1, 1)
        after = {"t": o["alpha"] * cosine.mean() + (1 - o["alpha"]) * state["t"]}
        phi = with_clamped_slope(lambda c: linear_tail(c, m), own)
        is_hard = f.detach() > torch.cos(torch.acos(cosine) + m)[:, None]
        f = torch.where(is_hard, f * (after["t"] + f), f)
    elif case.loss == "ElasticFace":
        m = elastic_margins(case, batch, own, key)
        phi = own - m
        if o["kind"] == "arc":
            phi = with_clamped_slope(lambda c: past_pi(torch.acos(c) + m), own)
    else:
        m1, m2, m3 = {
            "ArcFace": lambda: (1.0, o["margin"], 0.0),
            "CosFace": lambda: (1.0, 0.0, o["margin"]),
            "SphereFace": lambda: (o["margin"], 0.0, 0.0),
            "CombinedMargin": lambda: (o["m1"], o["m2"], o["m3"]),
        }[case.loss]()
        phi = with_clamped_slope(
            lambda c: past_pi(m1 * torch.acos(c) + m2) - m3, own, o["gradient"] != "exact"
        )
        limit = o["interclass_filtering_threshold"]
        is_filtered = (f.detach() > limit) & (limit > 0)
        is_removed = o["interclass_filtering_mode"] == "remove"
        f = f.masked_fill(is_filtered, FAR if is_removed else 0.0)
    is_other = takes_part & (torch.arange(case.num_classes) != y[:, None])
    others = torch.where(is_other, case.scale * f, FAR).logsumexp(dim=1)
    return torch.logaddexp(torch.zeros(()), others - case.scale * phi) + penalty, after


def optimizer_step(
    case: Case, rate: float, w: Tensor, g: Tensor, state: dict[str, Tensor], noise: Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(rows, their state, allowed error of the rows), where the gradient is right up to `noise`."""
    decay = case.rule_options["weight_decay"]
    if case.rule == "SGDRows":
        v = g + decay * w
        if "momentum_buffer" in state:
            v = case.rule_options["momentum"] * state["momentum_buffer"] + v
            state = {"momentum_buffer": v}
        return w - rate * v, state, rate * noise
    (beta1, beta2), eps = case.rule_options["betas"], case.rule_options["eps"]
    step = state["step"] + 1
    m = beta1 * state["exp_avg"] + (1 - beta1) * g
    v = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
    t = step.view(-1, *[1] * (w.dim() - 1))
    scale = (v / (1 - beta2**t)).sqrt() + eps
    moved = w * (1 - rate * decay) - rate * m / (1 - beta1**t) / scale
    return moved, {"exp_avg": m, "exp_avg_sq": v, "step": step}, rate * noise / scale


# --- the comparison --------------------------------------------------------------------------


def check_case(case: Case, results: list[list[dict[str, Any]]]) -> None:
    """Compares the records of all ranks with the truth.

    Raises:
        AssertionError: Something differs. The message names the case, the step and what it is.
    """
    try:
        _check(case, results, counts_unused=True)
    except AssertionError as error:
        # Whether a forward in training whose loss is not used counts for running values and draws
        # is not promised; it has to be the same in all steps.
        try:
            _check(case, results, counts_unused=False)
        except AssertionError:
            raise error from None


def _check(case: Case, results: list[list[dict[str, Any]]], counts_unused: bool) -> None:
    forwards = 0  # number of forwards in training so far, the key of ElasticFace's draws
    for number, step in enumerate(case.steps):
        records = [of_rank[number] for of_rank in results]
        try:
            forwards = _check_step(case, step, records, forwards, counts_unused)
        except AssertionError as error:
            raise AssertionError(f"step {number}: {error} [{case}]") from None


def _check_step(
    case: Case,
    step: Step,
    records: list[dict[str, Any]],
    forwards: int,
    counts_unused: bool,
) -> int:
    before, after = (_joined([record[when] for record in records]) for when in ("before", "after"))
    refused = [bool(record["refused"]) for record in records]
    assert all(refused) or not any(refused), f"refused on some ranks only: {refused}"
    if any(refused):  # the forwards have moved the running values, as they do in any case
        _check_unmoved(before, after, slice(None))
        return forwards
    is_alone = step.waits and case.sample_rate < 1 and not step.prepare
    used = step.parts[:1] if is_alone else step.parts
    takes_part = _check_classes(case, step, used, records)

    # The loss, and its gradients by autograd. Running values move from forward to forward.
    weight = before["weight"].requires_grad_(True)
    bias = before["bias"].requires_grad_(True) if "bias" in before else None
    state = {name[7:]: value for name, value in before.items() if name.startswith("margin_")}
    inputs: list[Tensor] = []
    known, total = [(state, forwards)], torch.zeros((), dtype=torch.float64)
    unused_before = [step.orders["thrown away"]] if "thrown away" in step.orders else []
    unused_after = step.parts[1:] if is_alone else ()
    is_finite = True
    rtol = 1e-5 if any(part.aligned for part in step.parts) else case.rtol
    for batch in (*unused_before, *used, *unused_after):
        x, y = batch.rows(case)
        x.requires_grad_(True)
        arguments = (weight, bias, takes_part, state, forwards)
        each, new = row_losses(case, batch, x, y, *arguments)
        is_finite = is_finite and batch.strange is None
        if batch in used:
            given = [record["losses"][len(inputs)] for record in records]
            assert all(np.isfinite(given)) == is_finite or not is_finite, f"losses {given}"
            if batch.strange is not None:
                assert not any(np.isfinite(given)), f"losses {given} with a {batch.strange}"
            if is_finite:
                for value in given:
                    _close("loss", value, each.mean(), rtol, rtol * 1e-2 * case.scale)
                total = total + each.mean() * step.factor / len(used)
            inputs.append(x)
        if batch in used or counts_unused:
            state, forwards = new, forwards + 1
            known.append((new, forwards))
    if total.requires_grad:  # a first embedding that is not finite leaves nothing to compare
        total.backward()
    _check_other_losses(case, step, records, weight, bias, takes_part, known, rtol)

    for number, (batch, x) in enumerate(zip(used, inputs, strict=True)):
        # x.grad is None after an embedding that is not finite.
        if x.grad is not None and not step.frozen and (is_finite or not step.waits):
            parts = [record["gradients"][number] for record in records]
            noise = case.noise * case.scale * step.factor / len(used)
            if case.normalizes:
                noise = noise / x.detach().norm(dim=1, keepdim=True)
            for rank, (part, size) in enumerate(zip(parts, batch.sizes, strict=True)):
                assert size == 0 or part is not None, f"no gradient of rank {rank}'s embeddings"
            joined = torch.cat([torch.from_numpy(part) for part in parts if part is not None])
            _close(f"gradient of embeddings {number}", joined, x.grad, rtol, noise)

    if step.bad or not is_finite:
        _check_unmoved(before, after, None)
        return forwards
    for name, value in state.items():
        _close(f"margin_{name}", after[f"margin_{name}"], value, rtol)
    rows = takes_part.repeat_interleave(case.centers_per_class)
    _check_unmoved(before, after, ~rows)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _check_update(case, step, name, parameter, before, after, rows, rtol)
    return forwards


def _check_update(
    case: Case,
    step: Step,
    name: str,
    parameter: Tensor,
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    rows: Tensor,
    rtol: float,
) -> None:
    """Checks centers or biases, and their optimizer state, after a step that was not vetoed."""
    assert parameter.grad is not None
    was, factor = parameter.detach(), step.factor
    g = parameter.grad / (factor if step.divide else 1.0)
    noise = rtol * g.abs().max() + case.noise * case.scale * (1.0 if step.divide else factor)
    if case.normalizes and name == "weight":
        noise = noise / was.norm(dim=1, keepdim=True).clamp(max=1.0)
    old = {key[len(name) + 1 :]: v for key, v in before.items() if key.startswith(f"{name}.")}
    moved, state, error = optimizer_step(case, step.learning_rate, was, g, old, noise)
    for key, value in state.items():
        expected = torch.where(_by_row(rows, value), value, old[key])
        error_here = noise * (2 * g.abs().max() if key == "exp_avg_sq" else 1)
        _close(f"{name}.{key}", after[f"{name}.{key}"], expected, rtol, error_here)
    expected = torch.where(_by_row(rows, moved), moved, was)
    _close(name, after[name], expected, 0.0, error + case.noise * was.abs().max())


def _check_classes(
    case: Case, step: Step, used: tuple[Batch, ...], records: list[dict[str, Any]]
) -> Tensor:
    """Checks the sample of each rank; returns [C] whether a class takes part."""
    takes_part = torch.zeros(case.num_classes, dtype=torch.bool)
    labels = torch.cat([part.rows(case)[1] for part in used])
    for rank, record in enumerate(records):
        here = class_range(case.num_classes, rank, case.world_size)
        drawn = record["classes"][: len(used)]
        if case.sample_rate == 1:
            assert all(classes is None for classes in drawn), "a sample at r = 1"
            takes_part[:] = True
            continue
        classes = torch.from_numpy(drawn[0])
        for later in drawn[1:]:
            assert np.array_equal(later, drawn[0]), f"rank {rank}: micro-batches differ in classes"
        for mine, plain in zip(record["classes"], record.get("classes_without", []), strict=False):
            assert np.array_equal(mine, plain), (
                f"rank {rank}: classes {mine.tolist()}, and {plain.tolist()} without the forwards "
                "that may not leave a trace"
            )
        assert torch.equal(classes, classes.unique()), f"rank {rank}: classes {classes}"
        positives = {int(label) - here.start for label in labels if int(label) in here}
        size = max(len(positives), math.floor(case.sample_rate * len(here) + 0.5))
        assert positives <= set(classes.tolist()) <= set(range(len(here))), f"classes {classes}"
        if "thrown away" not in step.orders:
            assert len(classes) == size, f"rank {rank}: {len(classes)} classes instead of {size}"
        takes_part[here.start + classes] = True
    return takes_part


def _check_other_losses(
    case: Case,
    step: Step,
    records: list[dict[str, Any]],
    weight: Tensor,
    bias: Tensor | None,
    takes_part: Tensor,
    known: list[tuple[dict[str, Tensor], int]],
    rtol: float,
) -> None:
    """Checks losses of forwards that may leave no trace, where the classes are known.

    Which running values of the step in progress they see is not promised.
    """
    for name in set(step.orders) & set(NO_TRACE):
        values = np.array([record["other_losses"][name] for record in records])
        assert np.array_equal(values, values[:1].repeat(len(values), 0)), f"{name}: {values}"
        has_moved = name == "evaluation after" and step.in_backward and case.update == "fused"
        if case.sample_rate < 1 or has_moved or any(p.strange is not None for p in step.parts):
            continue
        batch = step.orders[name]
        x, y = batch.rows(case)
        fits = [
            row_losses(case, batch, x, y, weight, bias, takes_part, *one)[0].mean().item()
            for one in known
        ]
        for value in values[0]:
            close = [abs(value - fit) <= rtol * (abs(value) + case.scale) for fit in fits]
            assert any(close), f"loss {value} of {name}, not among {fits}"


def _joined(snapshots: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """The shards of all ranks in one; running values are the same on all."""
    found = {}
    for name in snapshots[0]:
        parts = [torch.from_numpy(snapshot[name]).double() for snapshot in snapshots]
        if name.startswith("margin_"):
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs: {parts}"
            found[name] = parts[0]
        else:
            found[name] = torch.cat(parts)
    return found


def _check_unmoved(
    before: dict[str, Tensor], after: dict[str, Tensor], rows: Tensor | slice | None
) -> None:
    """Rows (or all, and the running values, for None) are the same to the last bit."""
    for name, value in before.items():
        if rows is not None and name.startswith("margin_"):
            continue
        old, new = (value, after[name]) if rows is None else (value[rows], after[name][rows])
        assert torch.equal(old, new), f"{name} moved where nothing may move"


def _close(
    what: str, given: Any, expected: Tensor, rtol: float, atol: float | Tensor = 0.0
) -> None:
    """|given - expected| <= rtol max|expected| + atol."""
    given, expected = torch.as_tensor(given, dtype=torch.float64), expected.detach()
    assert given.shape == expected.shape, f"{what}: {given.shape} instead of {expected.shape}"
    if given.numel() == 0:
        return
    error = (given - expected).abs()
    excess = error / (rtol * expected.abs().max() + atol + 1e-300)
    assert bool((excess <= 1).all()), (
        f"{what} is off by {float(error.max()):.3g} where at most {float(expected.abs().max()):.3g}"
        f" is expected ({float(excess.max()):.3g} times the tolerance)"
    )


def _by_row(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (like.dim() - 1))
