"""How long a step would take, by the roofline model (Williams et al., 2009, "Roofline").

Every operation runs at the rate of arithmetic or of memory, whichever is slower. The operations are
those of the traced step (training/planner/memory.py), one after the other, unfused. The fraction of
the peaks that real kernels reach is assumed (SHARE_OF_PEAK). A measured minute
(`scripts/plan.py --measure`) is better wherever the machine is available.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from training.planner.head_step import HeadOperations
from training.planner.trace import Operation, Trace

if TYPE_CHECKING:  # memory.py imports all of the trainer, which counting alone does not need
    from training.planner.memory import HeadWork, Requirements


@dataclass(frozen=True)
class Machine:
    """One device and its links.

    Attributes:
        name: Name of the device in the table.
        memory_gib: Memory as its driver reports it.
        gigabytes_per_second: Rate of its memory.
        half: Peak teraflops of dense products with operands of 16 bits.
        tf32: Peak teraflops of dense products in TF32; 0 if it does not have it.
        single: Peak teraflops of dense products in fp32.
        has_bf16: Whether it has bf16, at the rate of fp16.
        link_gigabytes_per_second: Rate to the other devices of its host in one direction.
        source: Where the numbers are from.
    """

    name: str
    memory_gib: float
    gigabytes_per_second: float
    half: float
    tf32: float
    single: float
    has_bf16: bool
    link_gigabytes_per_second: float
    source: str


# Peaks without sparsity. Memory as nvidia-smi shows it. Read 2026-11-21.
GPUS = {
    machine.name: machine
    for machine in (
        Machine(
            "h200",
            140.4,
            4800,
            989.4,
            494.7,
            66.9,
            True,
            450,
            "NVIDIA H200 datasheet, SXM, NVLink 4",
        ),
        Machine(
            "h100",
            79.6,
            3350,
            989.4,
            494.7,
            66.9,
            True,
            450,
            "NVIDIA H100 datasheet, SXM5 80 GB, NVLink 4",
        ),
        Machine(
            "a100",
            80.0,
            2039,
            312,
            156,
            19.5,
            True,
            300,
            "NVIDIA A100 datasheet, SXM4 80 GB, NVLink 3",
        ),
        Machine(
            "v100",
            31.7,
            900,
            125,
            0,
            15.7,
            False,
            150,
            "NVIDIA V100 datasheet, SXM2 32 GB, NVLink 2",
        ),
        Machine(
            "rtx4090",
            24.0,
            1008,
            165.2,
            82.6,
            82.6,
            True,
            32,
            "NVIDIA Ada whitepaper, 16 bits with fp32 sums, PCIe 4 x16",
        ),
        Machine("l40s", 45.0, 864, 362.1, 183, 91.6, True, 32, "NVIDIA L40S datasheet, PCIe 4 x16"),
    )
}

# Assumptions by kind of device: the fraction of the peaks above that kernels reach. For GPUs they
# are set so that they give the throughputs published for V100s (docs/speed.md says how closely);
# newer ones were not compared. On a CPU the peaks are measured, by a large product and a copy.
SHARE_OF_PEAK = {
    "cuda": {"products": 0.4, "memory": 0.5, "links": 0.7},
    "cpu": {"products": 0.8, "memory": 0.8, "links": 0.7},
}
# Seconds that Python and the driver need to start an operation: the lower limit of small batches.
LAUNCH_SECONDS = {"cuda": 8e-6, "cpu": 8e-6}
# The same for the head, whose loop is in Python: 23,282 operations took 499 ms beside an H100. Its
# Triton kernels took 26 to 80 us.
HEAD_LAUNCH_SECONDS, TRITON_LAUNCH_SECONDS = 21e-6, 55e-6
# The all-reduce of the network's gradients can overlap with backward, which takes this fraction of
# the network's time.
BACKWARD_SHARE = 2 / 3
# How often the matrices [B, rows] of student and teacher are read or written where their class
# probabilities are compared: counted in arcshard/head/distillation.py, not measured.
PASSES_OF_TEACHING = 45


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on one rank.

    Attributes:
        backbone: Forward and backward of the network, all micro-steps.
        head: The head.
        teacher: The teacher and its loss.
        optimizer: The network's optimizer.
        collectives: The part of the collectives that does not overlap with computation.
    """

    backbone: float
    head: float
    teacher: float
    optimizer: float
    collectives: float

    @property
    def total(self) -> float:
        """Seconds of all parts, one after the other."""
        return self.backbone + self.head + self.teacher + self.optimizer + self.collectives


@dataclass(frozen=True)
class Links:
    """How ranks are connected.

    Attributes:
        ranks_per_host: Number of ranks on a host.
        network_gbit: Rate of the network of a host in Gbit/s.
    """

    ranks_per_host: int = 8
    network_gbit: float = 100.0

    def bytes_per_second(self, machine: Machine, world_size: int) -> float:
        """Return the rate of the slowest hop on a ring through all ranks.

        The rate is per rank within a host, and per host otherwise.
        """
        share = SHARE_OF_PEAK[_kind(machine)]["links"]
        if world_size <= self.ranks_per_host:
            return share * machine.link_gigabytes_per_second * 1e9
        return share * min(self.network_gbit / 8, machine.link_gigabytes_per_second) * 1e9


def estimate(
    needs: Requirements,
    machine: Machine,
    links: Links,
    world_size: int,
    gradient_acc: int,
    needs_full_batch: bool,
) -> StepTime:
    """Estimate the time of a step from the peaks.

    Args:
        needs: Memory and work of one rank.
        machine: The device and its links.
        links: How ranks are connected.
        world_size: Number of ranks.
        gradient_acc: Micro-steps per step.
        needs_full_batch: Whether the loss needs the whole batch, so that every micro-batch goes
            forward twice.

    Returns:
        Seconds by part.
    """
    trace = needs.backbone
    backbone = gradient_acc * (
        operations_seconds(trace.forward, machine) * (1 + needs_full_batch)
        + operations_seconds(trace.backward, machine)
    )
    passes = 1 if needs_full_batch else gradient_acc
    head = head_seconds(needs.head, machine, passes)
    teacher = 0.0
    if needs.teacher is not None:
        teacher = gradient_acc * operations_seconds(needs.teacher.forward, machine)
        teacher += passes * teaching_seconds(needs.head, needs.teacher.width, machine)
    # Clipping reads the gradients twice and writes them; the update reads them, and reads and
    # writes weights and state.
    moved = 6 * needs.trainable_bytes + 2 * needs.footprint.optimizer
    optimizer = moved / _memory_rate(machine)
    collectives = collective_seconds(needs, machine, links, world_size, backbone, passes)
    return StepTime(backbone, head, teacher, optimizer, collectives)


def operations_seconds(operations: Iterable[Operation], machine: Machine) -> float:
    """Sum the seconds of operations, each limited by its products, its memory or its launch."""
    start = LAUNCH_SECONDS[_kind(machine)]
    return sum(max(_work_seconds(op, machine), start) for op in operations)


def _work_seconds(operation: Operation, machine: Machine) -> float:
    return max(
        operation.flops / _product_rate(machine, operation.dtype),
        operation.bytes_moved / _memory_rate(machine),
    )


def forward_share(trace: Trace, machine: Machine) -> float:
    """Return the fraction of a network's time that its forward pass takes."""
    forward = operations_seconds(trace.forward, machine)
    return forward / (forward + operations_seconds(trace.backward, machine))


def head_seconds(head: HeadWork, machine: Machine, passes: int) -> float:
    """Estimate the seconds of all passes of a step: forward, backward, update of the centers."""
    if head.trace is not None:
        seconds = operations_seconds([*head.trace.forward, *head.trace.backward], machine)
        row_bytes = 5 * 4 * head.width + 2 * head.state_bytes_per_row
        return passes * (seconds + head.rows * row_bytes / _memory_rate(machine))
    assert head.operations is not None
    counted = head.operations()
    if _kind(machine) == "cpu":
        return counted.total(lambda operations: operations_seconds(operations, machine))
    return max(launch_seconds(counted), device_seconds(counted, machine))


def launch_seconds(counted: HeadOperations) -> float:
    """Estimate how long the host takes to start the operations, while a GPU works in parallel."""

    def seconds(operations: Sequence[Operation]) -> float:
        triton = sum(operation.is_triton for operation in operations)
        return triton * TRITON_LAUNCH_SECONDS + (len(operations) - triton) * HEAD_LAUNCH_SECONDS

    return counted.total(seconds)


def device_seconds(counted: HeadOperations, machine: Machine) -> float:
    """Estimate how long a GPU works on the operations if it never waits for the host."""
    return counted.total(lambda operations: sum(_work_seconds(op, machine) for op in operations))


def teaching_seconds(head: HeadWork, width: int, machine: Machine) -> float:
    """Estimate one pass over the class probabilities of student and teacher.

    See arcshard/head/distillation.py.

    Args:
        head: Work of the head.
        width: `TeacherWork.width`.
        machine: The device.
    """
    if not width:
        return 0.0
    columns = 3 * head.width + 2 * width  # both sides twice, and the gradient
    products = 2 * head.batch * head.rows * columns / _product_rate(machine, head.matmul_dtype)
    moved = 4 * head.rows * (PASSES_OF_TEACHING * head.batch + columns)
    return products + moved / _memory_rate(machine)


def collective_seconds(
    needs: Requirements,
    machine: Machine,
    links: Links,
    world_size: int,
    backbone: float,
    passes: int,
) -> float:
    """Estimate the collectives' time that does not overlap with computation; all are rings.

    These are the head's all-gather, reduce-scatter and sums, and the part of the gradients'
    all-reduce that is longer than the backward pass it overlaps with.
    """
    if world_size == 1:
        return 0.0
    rate = links.bytes_per_second(machine, world_size)
    on_the_way = (world_size - 1) / world_size
    head = needs.head
    embeddings = head.batch * (4 * head.gathered_width + 8)  # with their labels
    gradients = head.batch * 4 * head.gathered_width
    exchange = passes * (embeddings + gradients) + 2 * head.summed_bytes
    all_reduce = 2 * on_the_way * needs.all_reduced_bytes / rate
    return on_the_way * exchange / rate + max(0.0, all_reduce - BACKWARD_SHARE * backbone / passes)


def this_cpu() -> Machine:
    """Return this machine's CPU as it was measured by this process, and its available memory."""
    single, rate = _cpu_rates(torch.get_num_threads())
    return Machine(
        "cpu",
        available_memory_gib(),
        rate,
        single,
        single,
        single,
        True,
        rate / 2,
        f"measured here, {torch.get_num_threads()} threads",
    )


@functools.cache
def _cpu_rates(num_threads: int) -> tuple[float, float]:
    """Measure a matrix product (TFLOP/s) and a copy (GB/s), for about a second in all."""
    size = 1024
    left, right = torch.randn(size, size), torch.randn(size, size)
    product = torch.empty(size, size)
    single = 2 * size**3 / _seconds(lambda: torch.mm(left, right, out=product)) / 1e12
    source, copy = torch.zeros(2**26, dtype=torch.uint8), torch.zeros(2**26, dtype=torch.uint8)
    return single, 2 * source.numel() / _seconds(lambda: copy.copy_(source)) / 1e9


def available_memory_gib() -> float:
    """Return the memory of this machine that is available now (Linux)."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 2**20
    raise OSError("/proc/meminfo has no MemAvailable")


def _seconds(work: object) -> float:
    """Return the least time of several runs, which take about half a second."""
    assert callable(work)
    best, end = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _kind(machine: Machine) -> str:
    return "cpu" if machine.name == "cpu" else "cuda"


def _memory_rate(machine: Machine) -> float:
    return SHARE_OF_PEAK[_kind(machine)]["memory"] * machine.gigabytes_per_second * 1e9


def _product_rate(machine: Machine, dtype: torch.dtype) -> float:
    """Return the FLOPs per second of products."""
    if dtype in (torch.float16, torch.bfloat16):
        peak = machine.half
    elif dtype == torch.float64:
        peak = machine.single / 2
    else:
        peak = machine.single
    return SHARE_OF_PEAK[_kind(machine)]["products"] * peak * 1e12
