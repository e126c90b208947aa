"""How long a step would take: every operation at the rate of arithmetic or of memory, whichever
is slower (Williams et al. 2009, "Roofline").

The operations are those of the traced step (training/planner/memory.py), one after the other,
unfused. What real kernels reach of the peaks is assumed (SHARE_OF_PEAK); a measured minute
(`scripts/plan.py --measure`) is better wherever the machine is at hand.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from training.planner.head_step import HeadOperations
from training.planner.trace import Operation, Trace

if TYPE_CHECKING:  # it imports all of the trainer, which counting on a bare machine does not need
    from training.planner.memory import HeadWork, Requirements


@dataclass(frozen=True)
class Machine:
    """One device and its links.

    Attributes:
        memory_gib: as its driver reports it. gigabytes_per_second: of its memory.
        half, tf32, single: peak teraflops of dense products with operands of 16 bits, in TF32 and
            in fp32; 0 for what it does not have. has_bf16: bf16 at the rate of fp16.
        link_gigabytes_per_second: to the other devices of its host, one direction.
        source: of the numbers.
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

# Assumptions, by kind of device: what kernels reach of the peaks above. For GPUs set so that the
# throughputs published for V100s are met (docs/speed.md has how far); for newer ones nobody has
# tried. On a CPU the peaks are measured ones, of a large product and of a copy.
SHARE_OF_PEAK = {
    "cuda": {"products": 0.4, "memory": 0.5, "links": 0.7},
    "cpu": {"products": 0.8, "memory": 0.8, "links": 0.7},
}
# Seconds it takes Python and the driver to start an operation: the floor of small batches.
LAUNCH_SECONDS = {"cuda": 8e-6, "cpu": 8e-6}
# Share of the all-reduce of the network's gradients that can hide behind backward, which is two
# thirds of the network's time.
BACKWARD_SHARE = 2 / 3
# How often the matrices [B, rows] of student and teacher are read or written where their class
# probabilities are compared: counted in arcshard/head/distillation.py, not measured.
PASSES_OF_TEACHING = 45


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on one rank: of the network (forward, backward, all
    micro-steps), the head, the teacher and its loss, the network's optimizer, and of the
    collectives what nothing hides.
    """

    backbone: float
    head: float
    teacher: float
    optimizer: float
    collectives: float

    @property
    def total(self) -> float:
        """One after the other."""
        return self.backbone + self.head + self.teacher + self.optimizer + self.collectives


@dataclass(frozen=True)
class Links:
    """How ranks reach each other: ranks per host, and the network of a host in Gbit/s."""

    ranks_per_host: int = 8
    network_gbit: float = 100.0

    def bytes_per_second(self, machine: Machine, world_size: int) -> float:
        """Of the slowest hop on a ring through all ranks, per rank (within a host) or host."""
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
    """Time of a step from the peaks.

    Args:
        gradient_acc: micro-steps per step.
        needs_full_batch: the loss looks at the whole batch: every micro-batch goes forward twice.
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
    """One operation after the other, each as slow as its products, its memory or its start."""
    start = LAUNCH_SECONDS[_kind(machine)]
    return sum(max(_work_seconds(op, machine), start) for op in operations)


def _work_seconds(operation: Operation, machine: Machine) -> float:
    return max(
        operation.flops / _product_rate(machine, operation.dtype),
        operation.bytes_moved / _memory_rate(machine),
    )


def forward_share(trace: Trace, machine: Machine) -> float:
    """Of a network's time, that of its forward pass."""
    forward = operations_seconds(trace.forward, machine)
    return forward / (forward + operations_seconds(trace.backward, machine))


def head_seconds(head: HeadWork, machine: Machine, passes: int) -> float:
    """All passes of a step: forward, backward, and the update of the class centers."""
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
    """How long the host takes to start them; a GPU works through a queue meanwhile."""
    return counted.launches * LAUNCH_SECONDS["cuda"]


def device_seconds(counted: HeadOperations, machine: Machine) -> float:
    """How long a GPU works on them, one after the other, if it never waits for the host."""
    return counted.total(lambda operations: sum(_work_seconds(op, machine) for op in operations))


def teaching_seconds(head: HeadWork, width: int, machine: Machine) -> float:
    """One pass over the class probabilities of both sides (arcshard/head/distillation.py); `width`
    as
    TeacherWork has it.
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
    """The head's all-gather, reduce-scatter and sums, and what backward does not hide of the
    gradients' all-reduce; all by rings.
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
    """This machine's CPU: a product of matrices and a copy, timed for about a second, and the
    memory that is available now.
    """
    size = 1024
    left, right = torch.randn(size, size), torch.randn(size, size)
    product = torch.empty(size, size)
    single = 2 * size**3 / _seconds(lambda: torch.mm(left, right, out=product)) / 1e12
    source, copy = torch.zeros(2**26, dtype=torch.uint8), torch.zeros(2**26, dtype=torch.uint8)
    rate = 2 * source.numel() / _seconds(lambda: copy.copy_(source)) / 1e9
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


def available_memory_gib() -> float:
    """Of this machine, now (Linux)."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 2**20
    raise OSError("/proc/meminfo has no MemAvailable")


def _seconds(work: object) -> float:
    """Least of several runs, about half a second."""
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
    """FLOPs per second."""
    if dtype in (torch.float16, torch.bfloat16):
        peak = machine.half
    elif dtype == torch.float64:
        peak = machine.single / 2
    else:
        peak = machine.single
    return SHARE_OF_PEAK[_kind(machine)]["products"] * peak * 1e12
