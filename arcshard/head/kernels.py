"""When Triton kernels serve a head, with which launch settings, and their launches.

The kernels (arcshard/head/triton_kernels.py) are registered as operations of torch, so that a
profile names them, and the meta device counts them without Triton.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from arcshard.head.block import NORM_FLOOR
from arcshard.head.row_optimizer import AdamWRows, RowOptimizer, SGDRows

KernelMode = Literal["auto", "triton", "torch"]
MODES = ("auto", "triton", "torch")
LEAST_TRITON = (3, 6)  # the version of torch 2.11; older ones were not tried
LEAST_CAPABILITY = (8, 0)  # tensor cores for bf16
MOST_WIDTH = 8192  # a row of centers is in the registers of one program


class Tile(NamedTuple):
    """Launch settings of the kernel of the logits.

    Attributes:
        n: Classes of a tile.
        b: Rows of the batch of a tile.
        d: Columns per step of the product.
        warps: Warps of a program.
        stages: Steps of the product in flight.
    """

    n: int
    b: int
    d: int
    warps: int
    stages: int


class Rows(NamedTuple):
    """Launch settings of a kernel that visits rows of centers.

    Attributes:
        n: Rows of a program, at D <= 512; fewer of longer rows.
        warps: Warps of a program, at D <= 512; more for longer rows.
    """

    n: int
    warps: int


class LaunchSettings(NamedTuple):
    """Launch settings of all kernels on one kind of GPU.

    Attributes:
        tile: Of the logits.
        tma_tile: Of the logits where the tensor memory accelerator can move the tiles (B and D are
            multiples of 8) and the block is large. None on a GPU without it.
        normalize: Of the normalized copies.
        update: Of the update.
        least_tma: Numerators of the smallest block for `tma_tile`. A tensor descriptor makes a
            launch 25 us longer, as much as it saves of a product of so many (on an H100).
    """

    tile: Tile
    tma_tile: Tile | None
    normalize: Rows
    update: Rows
    least_tma: int = 2**25


# The tiles need 32 KiB of shared memory, of which consumer GPUs have 99. Never timed.
_EVERYWHERE = LaunchSettings(Tile(128, 128, 32, 8, 3), None, Rows(1, 1), Rows(1, 1))
# By compute capability; a GPU takes the settings of the highest one that is not above its own.
# Those of 9.0 were the fastest of some 40 on an H100; `benchmarks.gpu_bench` measures some again.
SETTINGS = {
    (8, 0): _EVERYWHERE,
    (9, 0): LaunchSettings(
        Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 4, 2), Rows(1, 1), Rows(1, 1)
    ),
    (10, 0): _EVERYWHERE,
}
# Of the interpreter, for tests.
SMALL = LaunchSettings(
    Tile(32, 16, 16, 4, 1), Tile(64, 32, 32, 4, 1), Rows(16, 4), Rows(16, 4), least_tma=0
)


@cache
def settings_of(device: torch.device) -> LaunchSettings:
    """Returns the launch settings for a device."""
    if device.type == "cpu":
        return SMALL
    is_here = device.type == "cuda"  # and not on the meta device
    capability = torch.cuda.get_device_capability(device) if is_here else (9, 0)
    return SETTINGS[max(key for key in SETTINGS if key <= max(capability, LEAST_CAPABILITY))]


def why_not(
    mode: KernelMode,
    device: torch.device,
    operand_dtype: torch.dtype,
    width: int,
    rule: RowOptimizer | None,
    weight_dtype: torch.dtype = torch.float32,
) -> str:
    """Says why the kernels do not serve a head, "" if they do.

    The meta device counts as a GPU on which they do.

    Args:
        mode: "auto"; "triton", with which Triton's interpreter may run them on a CPU; or "torch".
        device: Device where the head computes.
        operand_dtype: Dtype of the operands of its products.
        width: D.
        rule: Row optimizer of the class centers.
        weight_dtype: Dtype of the class centers.
    """
    may_be_cpu = mode == "triton" and device.type == "cpu"
    if mode == "torch":
        return "as kernels='torch' says"
    if device.type not in ("cuda", "meta") and not (may_be_cpu and _is_interpreted()):
        return f"Triton's need a CUDA device, and this one is {device.type}"
    if operand_dtype != torch.bfloat16 and not (may_be_cpu and operand_dtype == torch.float32):
        return f"the products are {_short(operand_dtype)}, and those of Triton's are bf16"
    if type(rule) not in (SGDRows, AdamWRows):
        return f"Triton's update as SGDRows and AdamWRows do, and not as {type(rule).__name__}"
    if width > MOST_WIDTH:
        return f"embedding_size={width}, and Triton's have at most {MOST_WIDTH:,} columns"
    if device.type == "meta":
        return ""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            found = ".".join(map(str, capability))
            return f"Triton's need compute capability 8.0, and this GPU has {found}"
        if _is_interpreted():
            return "TRITON_INTERPRET is set"
    assert rule is not None
    state_dtype = torch.bfloat16 if rule.state_dtype == torch.bfloat16 else weight_dtype
    return _triton_problem() or _launch_problem(device, type(rule), weight_dtype, state_dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "fp")


@cache
def _triton_problem() -> str:
    """Says why Triton cannot be used, or returns ""."""
    try:
        import triton

        version = str(triton.__version__)
    except ImportError as error:
        return f"Triton cannot be imported (python -m pip install triton): {error}"
    except Exception as error:  # whatever a broken installation raises
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < LEAST_TRITON:
        return f"Triton {'.'.join(map(str, LEAST_TRITON))} is needed, and {version} is installed"
    return ""


def _is_interpreted() -> bool:
    """Returns whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1)."""
    if "TRITON_INTERPRET" not in os.environ or _triton_problem():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def _launch_problem(
    device: torch.device,
    rule: type[RowOptimizer],
    weight_dtype: torch.dtype,
    state_dtype: torch.dtype,
) -> str:
    """Launches every kernel once; returns what is wrong in one line, or ""."""
    try:
        with torch.no_grad():
            _try_kernels(device, rule, weight_dtype, state_dtype)
    except Exception as error:  # a compiler or a driver that does not fit raises anything
        lines = str(error).strip().splitlines() or [""]
        return f"Triton fails here: {type(error).__name__}: {lines[-1]}"
    return ""


def _try_kernels(
    device: torch.device,
    rule: type[RowOptimizer],
    weight_dtype: torch.dtype,
    state_dtype: torch.dtype,
) -> None:
    """Compares each kernel with PyTorch on a few numbers.

    Raises:
        ArithmeticError: A kernel computes something else.
    """
    generator = torch.Generator().manual_seed(0)
    n, width = (4096, 64) if device.type == "cuda" else (40, 16)
    weight = torch.randn(n, width, generator=generator).to(device, weight_dtype)
    operand, norm = normalize_rows(weight, None, torch.bfloat16)
    unit = functional.normalize(weight.float())
    _must_be_close(operand.float(), unit)
    _must_be_close(norm, torch.linalg.vector_norm(weight.float(), dim=1))
    for batch in (8192, 31) if device.type == "cuda" else (8, 7):  # with the TMA and without it
        rows = torch.arange(batch, device=device) % n
        x, at_target = operand[rows], operand[rows, 0].contiguous()
        expected = torch.exp(operand.float() @ x.float().t())
        numerators, sums = softmax_numerators(x, operand, rows, 0, None, True)
        fill_targets(numerators, rows, 0, at_target)
        expected[rows, torch.arange(batch, device=device)] = 0.0
        _must_be_close(sums.sum(0), expected.sum(0))
        again, _ = softmax_numerators(x, operand, rows, 0, at_target, False)
        expected[rows, torch.arange(batch, device=device)] = at_target.float()
        for found in (numerators, again):
            _must_be_close(found.float(), expected)
    half = torch.bfloat16 if state_dtype == torch.bfloat16 else None
    moved, results = rule(state_dtype=half), []
    gradient = torch.randn(n, width, generator=generator).to(device)
    for uses_kernel in (True, False):
        rows, state = weight.clone(), moved.create_state(weight)
        if uses_kernel:
            update_rows(moved, rows, gradient, 0.1, None, state=state, normalizes=False)
        else:
            moved.update_rows(rows, gradient.clone(), None, 0.1, state=state)
        results.append([rows, *state.values()])
    for ours, theirs in zip(*results, strict=True):
        _must_be_close(ours.float(), theirs.float())


def _must_be_close(ours: Tensor, theirs: Tensor) -> None:
    error = float((ours - theirs).norm() / theirs.norm())
    if not error < 1e-2:
        raise ArithmeticError(f"a kernel differs by {error:.2g} from PyTorch")


# ---------------------------------------------------------------- the operations of torch

_LIBRARY = torch.library.Library("arcshard", "FRAGMENT")


def _operation(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as an operation of torch without a gradient.

    Its tensors may be on the meta device, where it allocates its results and launches nothing.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        # torch.compile takes the operation as it is. torch.compiler.disable would do the same, and
        # import the compiler here, which takes 1.4 s and 150 MB in every process.
        @torch._disable_dynamo
        def launch(tensor: Tensor, *arguments: Any) -> Any:
            with torch.cuda.device_of(tensor):  # Triton launches on the current device
                return function(tensor, *arguments)

        _LIBRARY.define(schema)
        name = schema.split("(")[0]
        _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
        return getattr(torch.ops.arcshard, name).default

    return register


def _kernels() -> Any:
    from arcshard.head import triton_kernels

    return triton_kernels


def _written(dtype: torch.dtype, like: Tensor) -> torch.dtype:
    """Returns the dtype in which a kernel reads operands and writes.

    The interpreter multiplies bf16 wrongly and cuts where a GPU rounds to bf16, so that torch
    rounds what it has written as fp32. On other devices this costs nothing.
    """
    return torch.float32 if like.is_cpu and dtype == torch.bfloat16 else dtype


def _must_be_contiguous(*tensors: Tensor) -> None:
    for tensor in tensors:
        if not tensor.is_contiguous():
            shape, stride = tuple(tensor.shape), tensor.stride()
            raise ValueError(
                f"a matrix of the head of shape {shape} has stride {stride}: it must be contiguous"
            )


def columns_of_program(width: int) -> int:
    """Returns the columns of a program that visits rows of D numbers, a power of 2."""
    return max(16, 1 << (width - 1).bit_length())


def launch_of(settings: Rows, width: int) -> Rows:
    """Returns the launch settings for rows of D numbers: a program has registers for so many."""
    times = max(1, columns_of_program(width) // 512)
    return Rows(max(1, settings.n // times), min(16, settings.warps * times))


def tile_of(settings: LaunchSettings, n: int, batch: int, width: int) -> tuple[Tile, bool]:
    """Returns the tile of the logits, and whether the tensor memory accelerator moves it."""
    is_large = n * batch >= settings.least_tma
    if settings.tma_tile is not None and batch % 8 == width % 8 == 0 and is_large:
        return settings.tma_tile, True
    return settings.tile, False


@_operation("normalize_rows(Tensor weight, Tensor? rows, ScalarType dtype) -> (Tensor, Tensor)")
def normalize_rows(
    weight: Tensor, rows: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes normalized rows [n, D] in `dtype`, and their norms [n] in fp32.

    Args:
        weight: [N, D] in fp32 or bf16.
        rows: [n] int64 rows, or None for all.
        dtype: Dtype of the result.
    """
    n, width = len(weight if rows is None else rows), weight.shape[1]
    _must_be_contiguous(weight)
    operand = weight.new_empty(n, width, dtype=_written(dtype, weight))
    norm = weight.new_empty(n, dtype=torch.float32)
    if n and not weight.is_meta:
        launch = launch_of(settings_of(weight.device).normalize, width)
        _kernels().normalize_rows_kernel[(-(-n // launch.n),)](
            weight,
            weight if rows is None else rows,
            operand,
            norm,
            n,
            NORM_FLOOR,
            D=width,
            BLOCK_D=columns_of_program(width),
            BLOCK_N=launch.n,
            HAS_ROWS=rows is not None,
            num_warps=launch.warps,
        )
    return operand.to(dtype), norm


@_operation(
    "softmax_numerators(Tensor unit, Tensor operand, Tensor column, int start, Tensor? at_target, "
    "bool sums) -> (Tensor, Tensor)"
)
def softmax_numerators(
    unit: Tensor,
    operand: Tensor,
    column: Tensor,
    start: int,
    at_target: Tensor | None,
    sums: bool,
) -> tuple[Tensor, Tensor]:
    """Computes exp(operand unit^T) and its sums.

    Args:
        unit: [B, D] embeddings times s.
        operand: [n, D] normalized centers of the block, of the same dtype.
        column: [B] int64 target among the classes of the step, negative where there is none.
        start: First class of the block among the classes of the step.
        at_target: [B] what stands in the targets' places, None for 0.
        sums: Whether sums are wanted.

    Returns:
        (numerators [n, B] in the operands' dtype, sums [tiles, B] in fp32 of the numerators of each
        tile of classes; no tiles if they are not wanted).
    """
    (batch, width), n = unit.shape, len(operand)
    tile, has_tma = tile_of(settings_of(unit.device), n, batch, width)
    tiles, dtype = -(-n // tile.n), unit.dtype
    unit, operand = (part.to(_written(dtype, part)).contiguous() for part in (unit, operand))
    numerators = unit.new_empty(n, batch)
    totals = unit.new_empty(tiles if sums else 0, batch, dtype=torch.float32)
    if n and batch and not unit.is_meta:
        found = _kernels()
        described = [unit, operand, numerators]
        if has_tma:
            blocks = ([tile.b, tile.d], [tile.n, tile.d], [tile.n, tile.b])
            described = [
                found.TensorDescriptor.from_tensor(part, block)
                for part, block in zip(described, blocks, strict=True)
            ]
        found.softmax_numerators_kernel[(tiles * -(-batch // tile.b),)](
            *described[:2],
            column,
            unit if at_target is None else at_target,
            described[2],
            totals if sums else unit,
            batch,
            n,
            start,
            D=width,
            BLOCK_N=tile.n,
            BLOCK_B=tile.b,
            BLOCK_D=tile.d,
            HAS_TMA=has_tma,
            HAS_AT_TARGET=at_target is not None,
            HAS_SUMS=sums,
            DTYPE=found.TYPES[numerators.dtype],
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return numerators.to(dtype), totals


@_operation(
    "fill_targets_(Tensor(a!) numerators, Tensor column, int start, Tensor at_target) -> ()"
)
def fill_targets(numerators: Tensor, column: Tensor, start: int, at_target: Tensor) -> None:
    """Writes `at_target` [B] into the targets' places of numerators [n, B].

    Args:
        numerators: [n, B], written in place.
        column: [B] int64 target among the classes of the step, negative where there is none.
        start: First class of the block among the classes of the step.
        at_target: [B] of the numerators' dtype.
    """
    n, batch = numerators.shape
    _must_be_contiguous(numerators)
    if n and batch and not numerators.is_meta:
        _kernels().fill_targets_kernel[(-(-batch // 256),)](
            numerators, column, at_target, batch, n, start, BLOCK_B=256
        )


def update_rows(
    rule: RowOptimizer,
    weight: Tensor,
    gradient: Tensor,
    learning_rate: float,
    bad: Tensor | None,
    *,
    state: dict[str, Tensor] | None = None,
    rows: Tensor | None = None,
    numbers: Tensor | None = None,
    first_row: int = 0,
    normalizes: bool = True,
) -> None:
    """Applies one step of SGD or AdamW to rows in place, as `RowOptimizer.update_rows` does.

    Args:
        rule: Row optimizer.
        weight: [N, D] in fp32 or bf16.
        gradient: [n, D] in fp32, of the normalized rows if it `normalizes`, else of the rows.
        learning_rate: Learning rate of this step.
        bad: Boolean scalar on the device, or None. Where it is True, nothing is updated.
        state: State of `weight`, of as many rows; None for the state that the rule owns.
        rows: [n] int64 rows of `weight`; None for all, in order.
        numbers: [n] int64 numbers of these rows in the shard; None for `first_row` + row.
        first_row: See `numbers`.
        normalizes: Whether the gradient goes through the normalization of the rows.
    """
    state = rule.state(weight) if state is None else state
    if isinstance(rule, AdamWRows):
        parts = [state["exp_avg"], state["exp_avg_sq"], state["step"]]
        rates = [rule.weight_decay, *rule.betas, rule.eps]
    else:
        assert isinstance(rule, SGDRows)
        parts, rates = list(state.values()), [rule.weight_decay, rule.momentum]
    _update_rows(
        weight,
        parts,
        gradient,
        rows,
        numbers,
        None if bad is None else bad.view(torch.uint8),
        first_row,
        list(rule.rounding_keys()),
        learning_rate,
        rates,
        normalizes,
    )


@_operation(
    "update_rows_(Tensor(a!) weight, Tensor(b!)[] state, Tensor gradient, Tensor? rows, "
    "Tensor? numbers, Tensor? bad, int first_row, int[] keys, float learning_rate, float[] rates, "
    "bool normalizes) -> ()"
)
def _update_rows(
    weight: Tensor,
    state: list[Tensor],
    gradient: Tensor,
    rows: Tensor | None,
    numbers: Tensor | None,
    bad: Tensor | None,
    first_row: int,
    keys: list[int],
    learning_rate: float,
    rates: list[float],
    normalizes: bool,
) -> None:
    """Launches the update; SGD has [weight decay, momentum], AdamW [weight decay, betas, eps]."""
    (n, width), is_adamw = gradient.shape, len(rates) == 4
    decay, beta1, beta2, eps = rates if is_adamw else (*rates, 0.5, 0.0)
    averages = [part for part in state if part.dim() == 2]
    gradient = gradient.contiguous()
    _must_be_contiguous(weight, *state)
    if not n or weight.is_meta:
        return
    launch = launch_of(settings_of(weight.device).update, width)
    _kernels().update_rows_kernel[(-(-n // launch.n),)](
        gradient,
        weight,
        averages[0] if averages else weight,
        averages[1] if is_adamw else weight,
        state[2] if is_adamw else weight,
        weight if rows is None else rows,
        weight if numbers is None else numbers,
        weight if bad is None else bad,
        n,
        first_row,
        *keys,
        NORM_FLOOR,
        learning_rate,
        decay,
        beta1,
        1.0 - beta1,
        1.0 - beta2,
        eps,
        math.log(beta1) if beta1 else -math.inf,
        math.log(beta2) if beta2 else -math.inf,
        D=width,
        BLOCK_D=columns_of_program(width),
        BLOCK_N=launch.n,
        IS_ADAMW=is_adamw,
        HAS_MOMENTUM=bool(averages),
        NORMALIZES=normalizes,
        HAS_ROWS=rows is not None,
        HAS_NUMBERS=numbers is not None,
        HAS_VETO=bad is not None,
        ROUNDS_WEIGHT=weight.dtype == torch.bfloat16,
        ROUNDS_STATE=bool(averages) and averages[0].dtype == torch.bfloat16,
        num_warps=launch.warps,
    )
    torch.autograd.graph.increment_version([weight, *state])
