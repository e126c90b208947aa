"""Kernel launches, bytes and products of one step of the fused head, counted without a GPU.

`python -m benchmarks.bench_head --count` prints what this module counts. The head's own code runs
on the meta device and takes the path of a GPU there (training/planner/head_step.py). There are two
parts:

    loop     the passes over the classes: forward, backward, update. `launches`, `gigabytes`,
             `gigabytes_moved` and `products` are of this part.
    around   gathering and normalizing the batch, finding its targets, drawing the sample

launches: operations that start a kernel; a few, such as sorting and the fused optimizers on large
blocks, start more than one.
gigabytes_moved: bytes that they read and write. gigabytes: the tensors that they are given and
return, which leaves out what a fused optimizer writes, and counts what a copy overwrites.
products: units of 2 B S D floating-point operations, the batch with all S classes of the step.
The limit to compare with is 3 products at the rate of a large matmul plus, as if one came after the
other, the bytes that must move at the rate of a copy: centers read twice and written once,
optimizer state read and written once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from arcshard.head.fused import FusedMarginSoftmax
from arcshard.head.kernels import KernelMode
from arcshard.head.row_optimizer import AdamWRows, RowOptimizer, SGDRows
from arcshard.head.step import SoftmaxInputs, StepContext
from arcshard.head.target import find_positive_logits
from arcshard.losses import ArcFace
from arcshard.partial_fc import PartialFC
from training.planner.head_step import HeadOperations, count_head_step, trace_head_step
from training.planner.roofline import GPUS, Machine, launch_seconds
from training.planner.trace import Operation, OperationLog

WIDTH = 512
LEARNING_RATE = 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PREDICTED = ("h100", "h200", "a100")
# Assumed shares of a GPU's data sheet that the head's products and elementwise kernels reach.
REACHED = {"products": 0.6, "memory": 0.9}
KINDS = {
    "matrix products": {"addmm", "baddbmm", "bmm", "dot", "mm", "mv"},
    "kernels of the head": {
        "arcshard::fill_targets_",
        "arcshard::normalize_rows",
        "arcshard::softmax_numerators",
        "arcshard::update_rows_",
    },
    "optimizer": {"_fused_sgd_"},
    "sums and norms": {
        "_weight_norm_interface_backward",
        "all",
        "amax",
        "any",
        "cumsum",
        "linalg_vector_norm",
        "max",
        "mean",
        "sum",
    },
    "casts and copies": {"_to_copy", "cat", "clone", "copy_", "stack"},
    "gather, scatter, sort": {
        "argsort",
        "gather",
        "index",
        "index_add_",
        "index_copy_",
        "index_put_",
        "index_select",
        "scatter_",
        "searchsorted",
        "sort",
    },
    "fills": {
        "arange",
        "full",
        "full_like",
        "new_full",
        "new_zeros",
        "ones",
        "ones_like",
        "scalar_tensor",
        "zeros",
        "zeros_like",
    },
}
OTHERS = "elementwise"


class Peaks(NamedTuple):
    """What a GPU reaches.

    Attributes:
        name: Name of the GPU.
        flops: FLOP/s of bf16 products.
        bytes_per_second: Bytes read and written per second.
    """

    name: str
    flops: float
    bytes_per_second: float


def peaks_of(machine: Machine) -> Peaks:
    """Returns what a GPU is assumed to reach, from its data sheet."""
    return Peaks(
        machine.name,
        REACHED["products"] * machine.half * 1e12,
        REACHED["memory"] * machine.gigabytes_per_second * 1e9,
    )


def make_row_update(optimizer: str, state_dtype: str) -> RowOptimizer:
    """Makes the update rule of the centers.

    Args:
        optimizer: "sgd" or "adamw".
        state_dtype: "fp32" or "bf16".
    """
    dtype = torch.bfloat16 if state_dtype == "bf16" else None
    return SGDRows(state_dtype=dtype) if optimizer == "sgd" else AdamWRows(state_dtype=dtype)


def limit_seconds(
    peaks: Peaks,
    batch: int,
    num_classes: float,
    optimizer: str = "sgd",
    weight_dtype: str = "fp32",
    state_dtype: str = "fp32",
) -> float:
    """Returns the time of 3 products, and then of the bytes that must move.

    Args:
        peaks: Rates of the GPU.
        batch: B.
        num_classes: Classes that take part in the step, S.
        optimizer: "sgd" or "adamw".
        weight_dtype: Dtype of the centers, "fp32" or "bf16".
        state_dtype: Dtype of the optimizer state, "fp32" or "bf16".
    """
    state = (1 if optimizer == "sgd" else 2) * DTYPES[state_dtype].itemsize
    moved = num_classes * WIDTH * (3 * DTYPES[weight_dtype].itemsize + 2 * state)
    return 6 * batch * num_classes * WIDTH / peaks.flops + moved / peaks.bytes_per_second


def count(
    num_classes: int,
    batch: int,
    rate: float,
    workspace_mib: float,
    optimizer: str = "sgd",
    weight_dtype: str = "fp32",
    state_dtype: str = "fp32",
    peaks: Iterable[Peaks] = (),
    kernels: KernelMode = "triton",
) -> dict[str, Any]:
    """Counts what a step of the head on one GPU starts, moves and multiplies, as one row.

    Args:
        num_classes: C of this GPU.
        batch: B, the global batch.
        rate: r.
        workspace_mib: Workspace of the head in MiB.
        optimizer: "sgd" or "adamw".
        weight_dtype: Dtype of the centers, "fp32" or "bf16".
        state_dtype: Dtype of the optimizer state, "fp32" or "bf16".
        peaks: Rates of the GPUs for which times are predicted.
        kernels: "triton", or "torch" as on a GPU that the kernels do not serve.
    """

    def make(classes: int) -> PartialFC:
        return PartialFC(
            ArcFace(gradient="straight_through"),
            WIDTH,
            classes,
            rate,
            row_optimizer=make_row_update(optimizer, state_dtype),
            batch_size_per_rank=batch,
            device="meta",
            dtype=DTYPES[weight_dtype],
            workspace_mib=workspace_mib,
            half=torch.bfloat16,
            kernels=kernels,
        )

    plan = make(num_classes).planned_blocks()
    loop = count_head_step(make, num_classes, _trace_loop)
    whole = count_head_step(make, num_classes, trace_head_step)
    size = plan.num_rows
    products = loop.flops / (2 * batch * size * WIDTH)
    return {
        "name": "fused",
        "params": {
            "num_classes": num_classes,
            "batch": batch,
            "sample_rate": rate,
            "optimizer": optimizer,
            "weight_dtype": weight_dtype,
            "state_dtype": state_dtype,
            "workspace_mib": workspace_mib,
            "kernels": kernels,
        },
        "launches": loop.launches,
        "gigabytes": loop.named_bytes / 1e9,
        "gigabytes_moved": loop.bytes_moved / 1e9,
        "products": round(products, 3),
        "launches_around": whole.launches - loop.launches,
        "gigabytes_moved_around": (whole.bytes_moved - loop.bytes_moved) / 1e9,
        "blocks": len(plan.blocks()),
        "rows_per_block": plan.rows_per_block,
        "kept_share": plan.kept_rows / max(plan.num_rows, 1),
        "workspace_used_mib": plan.total_bytes / 2**20,
        "kinds": _by_kind(loop),
        "predicted": {
            one.name: predict(one, whole)
            | {
                "limit_ms": 1e3
                * limit_seconds(one, batch, size, optimizer, weight_dtype, state_dtype)
            }
            for one in peaks
        },
    }


def predict(peaks: Peaks, counted: HeadOperations) -> dict[str, float]:
    """Predicts milliseconds of the host, which starts the kernels, and of the device.

    The step takes the longer of the two.

    Args:
        peaks: Rates of the GPU.
        counted: Operations of the step.
    """
    host = launch_seconds(counted)
    device = counted.total(
        lambda operations: sum(
            max(op.flops / peaks.flops, op.bytes_moved / peaks.bytes_per_second)
            for op in operations
        )
    )
    return {"host_ms": 1e3 * host, "device_ms": 1e3 * device, "step_ms": 1e3 * max(host, device)}


def _trace_loop(head: PartialFC) -> list[Operation]:
    """Returns the operations of the passes over the classes alone."""
    batch = head.batch_size_per_rank
    assert batch is not None
    assert head.fused is not None
    assert head.row_optimizer is not None
    head.row_optimizer.state(head.weight)
    unit = torch.empty(batch, WIDTH, device="meta", requires_grad=True)
    column = torch.empty(batch, dtype=torch.int64, device="meta")
    head.prepare([column])
    step = StepContext(*head.sampled_centers())
    target = find_positive_logits(
        unit.detach(), column, step.centers, head.margin.normalize, head.centers_per_class
    )
    weight, veto = unit.new_empty(batch), torch.empty((), dtype=torch.bool, device="meta")
    with OperationLog() as log:
        inputs = SoftmaxInputs(unit, None, target, {}, weight, veto)
        settings = (head.weight, head.fused, step, inputs, LEARNING_RATE, True)
        loss = FusedMarginSoftmax.apply(unit, None, *settings)
        loss.backward(torch.empty_like(loss))
    return log.operations


def kind_of(operation: Operation) -> str:
    """Returns the line of the table that an operation belongs to."""
    return next((kind for kind, names in KINDS.items() if operation.name in names), OTHERS)


def _by_kind(counted: HeadOperations) -> dict[str, dict[str, float]]:
    return {
        kind: {
            "launches": round(counted.total(partial(_launches, kind))),
            "gigabytes_moved": counted.total(partial(_bytes_moved, kind)) / 1e9,
        }
        for kind in (*KINDS, OTHERS)
    }


def _launches(kind: str, operations: Sequence[Operation]) -> int:
    return sum(kind_of(op) == kind for op in operations)


def _bytes_moved(kind: str, operations: Sequence[Operation]) -> int:
    return sum(op.bytes_moved for op in operations if kind_of(op) == kind)


def table(row: dict[str, Any]) -> str:
    """Formats a counted row as text."""
    params = row["params"]
    lines = [
        f"C = {params['num_classes']:,}, B = {params['batch']:,}, D = {WIDTH}, "
        f"r = {params['sample_rate']:g}, {params['optimizer']}, "
        f"centers {params['weight_dtype']}, state {params['state_dtype']}, products bf16",
        f"workspace {row['workspace_used_mib']:,.0f} of at most {params['workspace_mib']:,.0f} "
        f"MiB: {row['blocks']:,} blocks of {row['rows_per_block']:,} classes, "
        f"{row['kept_share']:.0%} of the numerators kept",
        f"{'':24}{'launches':>10}{'GB moved':>10}",
    ]
    lines += [
        f"{kind:24}{found['launches']:>10,}{found['gigabytes_moved']:>10.2f}"
        for kind, found in row["kinds"].items()
        if found["launches"]
    ]
    lines += [
        f"{'loop over the classes':24}{row['launches']:>10,}{row['gigabytes_moved']:>10.2f}"
        f"   {row['products']:.2f} products [B, D] x [D, S]; tensors given and returned "
        f"{row['gigabytes']:.2f} GB",
        f"{'around it':24}{row['launches_around']:>10,}{row['gigabytes_moved_around']:>10.2f}",
    ]
    if row["predicted"]:
        lines.append(f"{'predicted, ms':24}{'host':>10}{'device':>10}{'step':>10}{'limit':>10}")
    lines += [
        f"  {name:22}{one['host_ms']:>10.1f}{one['device_ms']:>10.1f}{one['step_ms']:>10.1f}"
        f"{one['limit_ms']:>10.1f}"
        for name, one in row["predicted"].items()
    ]
    return "\n".join(lines)


def assumed_peaks() -> list[Peaks]:
    """Returns the assumed rates of the GPUs for which times are predicted."""
    return [peaks_of(GPUS[name]) for name in PREDICTED]
