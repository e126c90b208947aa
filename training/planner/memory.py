"""Memory that a run needs on one rank, by part, before anything is allocated.

Every size comes from the code that allocates: `training/build.py` makes the network, the optimizer
and the head on the meta device, the head's own plan gives the workspace, and a traced step
(training/planner/trace.py) the activations. Only the memory beside PyTorch's tensors is a named
assumption (OVERHEAD).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from arcshard.head.centers import ClassCenters
from arcshard.head.reference import reference_loss
from arcshard.head.sampling import sample_size
from arcshard.head.step import SoftmaxInputs
from arcshard.head.target import PositiveLogits
from arcshard.head.workspace import Workspace, choose_workspace
from arcshard.losses import BatchFacts
from arcshard.partial_fc import PartialFC
from configs.base import Config
from training.batch_norm import BatchNormStatistics
from training.build_backbone import make_backbone
from training.build_head import make_head, make_teacher, needs_full_batch, rank0_equivalent
from training.classifier import Head, LayerClassifier
from training.distillation import block_budget
from training.optimizer import make_optimizer
from training.planner.head_step import HeadOperations, count_head_step, trace_head_step
from training.planner.trace import MemoryTracker, Operation, Trace, as_fake, make_fake, trace_step
from training.precision import MixedPrecisionBackbone, Precision
from utils.distributed import DistContext

# Most matrices [B, D] of the global batch that the head holds at once: the gathered bytes, the
# embeddings made from them, these divided by their norms, the centers of their targets, the
# gradient, one block's part of it, and the targets' part of the centers' gradient with its
# unsorted source. tests/test_plan.py compares with a head that runs.
HEAD_BATCH_MATRICES = 9

# Memory of a process beyond its tensors, as a fraction of the temporary ones: activations,
# gradients, and what an autograd head makes. On a CPU this is fragmentation of the C library's
# heap, which train_v2.py never returns (utils/memory.py): 0.2 to 0.6 with glibc 2.36, measured by
# benchmarks/bench_plan.py, where the same steps with every tensor mapped by itself took no more
# than their tensors. Small runs, whose tensors fit into existing gaps, have less. On a GPU it is
# what CUDA's allocator rounds up and what its libraries need: assumed, not measured.
OVERHEAD = {"cpu": 0.38, "cuda": 0.05}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at the moment when most are in use.

    Attributes:
        weights: Parameters and buffers of the network, and the copy of batch-norm statistics that
            is kept for skipped steps. With ema_decay all of it counts twice.
        gradients: Gradients of the network that exist at that moment. These are all of them where
            DDP's buckets or several micro-steps keep them.
        optimizer: State of the network's optimizer.
        activations: What backward needs, and temporary results of operations.
        centers: Class centers and biases.
        center_state: Optimizer state of the class centers and biases.
        head: The workspace, or the logits and gradients with head_update="autograd".
        global_batch: Embeddings of the global batch and their gradients in the head.
        teacher: Weights and class centers of the teacher, and what it needs at the peak.
        images: Batches that wait for the step.
        overhead: Fragmentation and workspaces of libraries, see OVERHEAD.
        on_host: Centers, their state and copies in host memory (head_offload=True). They are not in
            `total` where the training runs on a GPU.
        peak_is_in: When the peak occurs: "head" or "teacher", which come between forward and
            backward, or "backward".
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    centers: int
    center_state: int
    head: int
    global_batch: int
    teacher: int
    images: int
    overhead: int
    on_host: int
    peak_is_in: str

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Return the bytes on the device by part."""
        left_out = ("on_host", "peak_is_in")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}


@dataclass(frozen=True)
class HeadWork:
    """What the head's step computes on one rank.

    Attributes:
        rows: Number S K of class centers that take part.
        batch: Rows of the global batch in one pass.
        width: Embedding size D.
        state_bytes_per_row: Bytes of optimizer state per center.
        matmul_dtype: dtype of the operands of matmuls.
        trace: One pass of a head with autograd, None for a fused head.
        operations: Counts, when called, all passes of a fused head and its update; None with
            autograd.
        gathered_width: Columns of the global batch's embeddings that ranks exchange in a pass.
        summed_bytes: Bytes of tensors that are summed over ranks, per optimizer step.
    """

    rows: int
    batch: int
    width: int
    state_bytes_per_row: float
    matmul_dtype: torch.dtype
    trace: Trace | None = None
    operations: Callable[[], HeadOperations] | None = None
    gathered_width: int = 0
    summed_bytes: int = 0


@dataclass(frozen=True)
class TeacherWork:
    """What a teacher holds and computes on one rank.

    Attributes:
        kept_bytes: Bytes of weights and class centers.
        peak_bytes: Largest temporary memory, in its forward pass or for the block of classes in
            work.
        forward: Operations of the forward pass of a micro-batch.
        width: Embedding size D_t of its class centers, one per class; 0 where it teaches cosines.
    """

    kept_bytes: int
    peak_bytes: int
    forward: list[Operation]
    width: int


@dataclass(frozen=True)
class Requirements:
    """Memory and work of one rank.

    Attributes:
        footprint: The memory.
        backbone: One forward and backward pass of the network.
        head: Work of the head.
        teacher: Work of the teacher, if there is one.
        parameters: Number of parameters of the network.
        trainable_bytes: Bytes of the parameters that have gradients.
        all_reduced_bytes: Bytes of their gradients as they are summed over ranks.
        classes_per_rank: Classes of rank 0.
    """

    footprint: MemoryEstimate
    backbone: Trace
    head: HeadWork
    teacher: TeacherWork | None
    parameters: int
    trainable_bytes: int
    all_reduced_bytes: int
    classes_per_rank: int


def estimate_requirements(
    cfg: Config,
    world_size: int,
    num_classes: int,
    precision: Precision,
    device_type: str,
    memory_bytes: int | None = None,
) -> Requirements:
    """Estimate memory and work of rank 0, which has the most classes.

    Args:
        cfg: The config after training.setup.share_global_batch.
        world_size: Number of ranks.
        num_classes: Number C of classes.
        precision: The policy on that device.
        device_type: "cpu" or "cuda", where the training would run.
        memory_bytes: Memory of that GPU, if it is known. It determines head_workspace_mib="auto".

    Returns:
        The estimate.

    Raises:
        UserError: The network or the head cannot be built so, or the teacher does not fit.
        WeightsError: The teacher's file cannot be used.
        FileNotFoundError: There is no such teacher.
    """
    workspace = choose_workspace(cfg.head_workspace_mib, device_type, memory_bytes)
    cfg = cfg.replace(init_backbone=None, head_workspace_mib=workspace.budget_bytes // 2**20)
    teacher = _teacher_needs(cfg, world_size, num_classes, precision, workspace)
    with torch.device("meta"):
        backbone = make_backbone(cfg)
        model = MixedPrecisionBackbone(
            backbone, precision, cfg.freeze_batch_norm, cfg.channels_last
        )
    model.place()
    model.train()
    statistics = BatchNormStatistics(model, cfg.freeze_batch_norm)
    kept = _bytes([statistics.statistics, statistics.counts])
    alone, local = rank0_equivalent(cfg, world_size, num_classes)
    alone = alone.replace(head_offload=False)
    if device_type == "cpu":  # the meta device counts as a GPU
        alone = alone.replace(head_kernels="torch")

    def make(classes: int) -> Head:
        head = make_head(alone, DistContext(0, 0, 1, torch.device("meta")), classes, precision)
        if head.fused is not None:
            head.fused.workspace = workspace
        return head

    def make_fused(classes: int) -> PartialFC:
        head = make(classes)
        assert isinstance(head, PartialFC)
        return head

    head = make(local)
    average = 0
    if cfg.ema_decay:
        average = _bytes([*backbone.parameters(), *backbone.buffers()]) + kept
    mode = FakeTensorMode()
    make_fake(model, mode)
    with mode:
        parameters = list(model.parameters())
        optimizer = make_optimizer(
            backbone,
            cfg.optimizer,
            lr=cfg.lr,
            momentum=cfg.momentum,
            weight_decay=cfg.weight_decay,
            decay_norms_and_biases=cfg.decay_norms_and_biases,
            layer_decay=cfg.layer_decay,
        )
        optimizer_bytes = _optimizer_bytes(optimizer) // (world_size if cfg.zero_stage else 1)
        images = torch.empty(
            cfg.batch_size, 3, cfg.input_size, cfg.input_size, dtype=torch.uint8
        ).to(memory_format=torch.channels_last)
        trace = trace_step(lambda: model(images), parameters, [images, *model.buffers()])
    if isinstance(head, LayerClassifier):
        centers, state, work, buffer = _layer_needs(head, alone.batch_size, cfg, world_size)
    else:
        centers, state, work, buffer = _head_needs(head, world_size, device_type)
        if head.fused is not None:
            passes = 1 if needs_full_batch(cfg, head.margin) else cfg.gradient_acc
            trace_step_of = partial(
                trace_head_step, passes=passes, is_deferred=precision.needs_scaler
            )
            count = cache(lambda: count_head_step(make_fused, local, trace_step_of))
            work = dataclasses.replace(work, operations=count)

    keeps_gradients = world_size > 1 or cfg.gradient_acc > 1
    batch_bytes = HEAD_BATCH_MATRICES * work.batch * work.gathered_width * head.work_dtype.itemsize
    logits = gradient = 0
    if work.trace is not None:
        logits, gradient = work.trace.peak_bytes, work.trace.gradient_bytes
    # An update that waits for the end of the step needs the kept numerators until then.
    in_workspace = buffer if precision.needs_scaler or cfg.gradient_acc > 1 else 0
    in_head = trace.saved_bytes + logits + buffer + batch_bytes
    in_head += trace.gradient_bytes if keeps_gradients else 0
    in_backward = (
        gradient
        + in_workspace
        + (
            trace.gradient_bytes + trace.peak_without_gradients
            if keeps_gradients
            else trace.peak_bytes
        )
    )
    in_teacher = 0
    if teacher is not None:
        in_teacher = in_head - batch_bytes + teacher.peak_bytes
    moments = {"head": in_head, "teacher": in_teacher, "backward": in_backward}
    peak_is_in = max(moments, key=lambda moment: moments[moment])
    is_in_head = peak_is_in != "backward"
    if is_in_head:
        gradients = trace.gradient_bytes if keeps_gradients else 0
        activations = trace.saved_bytes
    elif keeps_gradients:
        gradients, activations = trace.gradient_bytes, trace.peak_without_gradients
    else:
        gradients = trace.gradient_bytes_at_peak
        activations = trace.peak_bytes - gradients
    on_host = 0
    rows_here = 1.0
    if cfg.head_offload:
        share = min(1.0, work.rows / max(head.weight.shape[0], 1))
        staged = round((centers + state) * share)
        on_host = centers + state + staged
        rows_here = share
        if device_type == "cpu":
            rows_here += 1
            on_host = 0
    batches = cfg.gradient_acc + (cfg.num_workers + 2 if device_type == "cpu" else 1)
    taught = 0
    if teacher is not None:
        taught = teacher.kept_bytes + (teacher.peak_bytes if peak_is_in == "teacher" else 0)
    footprint = MemoryEstimate(
        weights=_bytes(parameters) + _bytes(model.buffers()) + kept + average,
        gradients=gradients,
        optimizer=optimizer_bytes,
        activations=activations,
        centers=round(centers * rows_here),
        center_state=round(state * rows_here),
        head=buffer + logits if is_in_head else in_workspace + gradient,
        global_batch=batch_bytes if peak_is_in == "head" else 0,
        teacher=taught,
        images=batches * _bytes([images]),
        overhead=0,
        on_host=on_host,
        peak_is_in=peak_is_in,
    )
    comes_and_goes = activations + gradients + (logits if is_in_head else gradient)
    if teacher is not None and peak_is_in == "teacher":
        comes_and_goes += teacher.peak_bytes
    overhead = round(OVERHEAD[device_type] * comes_and_goes)
    return Requirements(
        footprint=dataclasses.replace(footprint, overhead=overhead),
        backbone=trace,
        head=work,
        teacher=teacher,
        parameters=sum(p.numel() for p in parameters),
        trainable_bytes=_bytes(p for p in parameters if p.requires_grad),
        all_reduced_bytes=sum(
            p.numel() * (p.itemsize if cfg.grad_reduce_dtype == "fp32" else 2)
            for p in parameters
            if p.requires_grad
        ),
        classes_per_rank=head.num_classes,
    )


def _teacher_needs(
    cfg: Config, world_size: int, num_classes: int, precision: Precision, workspace: Workspace
) -> TeacherWork | None:
    """Estimate the teacher; its file is read to check that it fits."""
    teacher = make_teacher(cfg, precision, torch.device("cpu"))
    if teacher is None:
        return None
    model = teacher.model.to("meta")
    mode = FakeTensorMode()
    make_fake(model, mode)
    existing = [*model.parameters(), *model.buffers()]
    with mode:
        images = torch.empty(
            cfg.batch_size, 3, cfg.input_size, cfg.input_size, dtype=torch.uint8
        ).to(memory_format=torch.channels_last)
        with MemoryTracker([*existing, images]) as ledger:
            teacher(images)
    kept, peak, width = _bytes(existing), ledger.peak, 0
    if cfg.distillation == "logits":
        width = teacher.metadata.num_features
        _, local = rank0_equivalent(cfg, world_size, num_classes)
        kept += local * (width * precision.dtype.itemsize + 1)  # 1 byte says if the class is known
        peak = max(peak, block_budget(workspace))
    return TeacherWork(kept, peak, ledger.operations, width)


def _optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of state of a new optimizer of fake parameters after its first step."""
    if isinstance(optimizer, torch.optim.AdamW):  # makes its averages in that step
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return _bytes(
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def _head_needs(
    head: PartialFC, world_size: int, device_type: str
) -> tuple[int, int, HeadWork, int]:
    """Return bytes of centers, bytes of their state, the head's work, bytes of its workspace."""
    mode, device = FakeTensorMode(), torch.device(device_type)
    weight = as_fake(head.weight, mode, device)
    bias = None if head.bias is None else as_fake(head.bias, mode, device)
    with mode:
        rule = head.row_optimizer
        assert rule is not None
        state = rule.state(weight)
        state_bytes, centers = _bytes(state.values()), _bytes([weight])
        if bias is not None:
            centers += _bytes([bias])
            state_bytes += _bytes(rule.create_state(bias).values())

        k, local = head.centers_per_class, head.num_classes
        batch = head.batch_size_per_rank
        assert batch is not None  # training.build_head always names it
        rows = None
        num_rows = local * k
        if head.sample_rate < 1:
            positives = local * -math.expm1(-batch / (local * world_size))  # expected, distinct
            num_rows = k * max(sample_size(local, head.sample_rate), round(positives))
            rows = torch.empty(num_rows, dtype=torch.int64, device=device)
        buffer, plan, matmul_dtype = 0, None, head.work_dtype
        if head.fused is not None:
            shard = ClassCenters(weight, rule, bias, None, rows, state=state)
            plan = head.fused.plan(shard, batch, head.embedding_size)
            buffer = plan.total_bytes
            matmul_dtype = head.fused.operand_dtype
    trace = None if plan is not None else _trace_autograd_head(head, num_rows, batch)
    work = HeadWork(
        rows=num_rows,
        batch=batch,
        width=head.embedding_size,
        state_bytes_per_row=state_bytes / max(local * k, 1),
        matmul_dtype=matmul_dtype,
        trace=trace,
        gathered_width=head.embedding_size,
    )
    return centers, state_bytes, work, buffer


def _layer_needs(
    head: LayerClassifier, batch: int, cfg: Config, world_size: int
) -> tuple[int, int, HeadWork, int]:
    """Estimate as `_head_needs` does, for rank 0's part of a layer (`head`, on the meta device)."""
    mode = FakeTensorMode()
    make_fake(head, mode)
    with mode:
        pairs = head.optimized_parameters()
        parameters = [parameter for parameter, _ in pairs]
        state = _bytes(v for parameter, rule in pairs for v in rule.state(parameter).values())
        embeddings = torch.empty(
            batch, head.embedding_size, dtype=head.work_dtype, requires_grad=True
        )
        labels = torch.empty(batch, dtype=torch.int64)
        trace = trace_step(
            lambda: head.row_losses(embeddings, labels).mean(), parameters, [embeddings, labels]
        )
    summed = 0
    if cfg.parallel_dim is None:
        summed = _bytes(parameters)  # their gradients
    elif cfg.parallel_dim == 0:
        summed = cfg.gradient_acc * batch * head.num_classes * head.work_dtype.itemsize  # logits
    work = HeadWork(
        rows=head.num_classes,
        batch=batch,
        width=head.embedding_size,
        state_bytes_per_row=state / head.num_classes,
        matmul_dtype=head.matmul_dtype,
        trace=trace,
        gathered_width=0 if cfg.parallel_dim is None else cfg.embedding_size,
        summed_bytes=summed if world_size > 1 else 0,
    )
    return _bytes(parameters), state, work, 0


def _trace_autograd_head(head: PartialFC, num_rows: int, batch: int) -> Trace:
    """Trace the reference path with its whole gradient; sampled rows are copies of the shard's."""
    mode = FakeTensorMode()
    weight = nn.Parameter(as_fake(head.weight, mode))
    bias = None if head.bias is None else nn.Parameter(as_fake(head.bias, mode))
    with mode:
        embeddings = torch.empty(
            batch, head.embedding_size, dtype=head.work_dtype, requires_grad=True
        )
        column = torch.empty(batch, dtype=torch.int64)
        rows = torch.empty(num_rows, dtype=torch.int64) if head.sample_rate < 1 else None
        row_weight = torch.empty(batch, dtype=head.work_dtype)
        state = {n: torch.empty((), dtype=head.work_dtype) for n in head.margin.initial_state()}

        def forward() -> Tensor:
            norms = None
            if head.margin.reads_norms:
                norms = torch.linalg.vector_norm(embeddings, dim=1)
            targets = row_weight if head.margin.reads_all_targets else None
            with torch.no_grad():
                facts = BatchFacts(norms, targets, row_weight > 0, 0)
                context, _ = head.margin.begin(facts, state)
            unit = nn.functional.normalize(embeddings) if head.margin.normalize else embeddings
            of_step = (
                (weight, bias)
                if rows is None
                else (weight[rows], None if bias is None else bias[rows])
            )
            target = PositiveLogits(column, column, row_weight, row_weight)
            veto = torch.zeros((), dtype=torch.bool)
            inputs = SoftmaxInputs(unit, norms, target, context, row_weight, veto)
            k, half = head.centers_per_class, head.matmul_half
            return reference_loss(head.margin, inputs, *of_step, k, None, half)

        parameters = [weight] if bias is None else [weight, bias]
        return trace_step(forward, parameters, [embeddings, column, row_weight, *state.values()])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
