"""What a step would allocate and compute, found without doing either.

PyTorch's fake tensors run the real code, autograd's formulas, autocast and recomputation included,
on tensors that have a shape, a stride and a dtype but no memory. `MemoryTracker` observes every
operation: when a storage is created and when its last tensor is freed, and what each operation
reads, writes and multiplies.

The operations are those of a CPU. What an operation uses internally, such as the workspace of a
convolution, is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula
from torch.utils.weak import WeakIdKeyDictionary

import arcshard.head.kernels  # noqa: F401  # registers the operations that are counted here

aten = torch.ops.aten
CPU = torch.device("cpu")

# The CPU's attention has no formula; its first arguments are those of the formulas used here.
_SAME_FLOPS = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        aten._scaled_dot_product_flash_attention_backward
    ),
}


_WITHOUT_META_KERNEL = (aten._fused_sgd_.default, aten._fused_sgd_.tensor_lr)
_NO_KERNEL = frozenset(
    {
        "_local_scalar_dense",
        "_unsafe_view",
        "as_strided_",
        "detach_",
        "is_same_size",
        "item",
        "promote_types",
        "resize_",
        "result_type",
        "set_",
        "squeeze_",
        "t_",
        "transpose_",
        "unsqueeze_",
    }
)
# Operations that touch some places of their first operand, not all of it.
_PICKS = frozenset({"embedding", "gather", "index", "index_select", "take"})
_PUTS = frozenset(
    {
        "index_add_",
        "index_copy_",
        "index_put_",
        "index_fill_",
        "scatter_",
        "scatter_add_",
        "arcshard::fill_targets_",
    }
)
_OVERWRITES = frozenset({"copy_", "fill_", "normal_", "random_", "uniform_", "zero_"})
_TAKES_SHAPE = frozenset(
    {
        "full_like",
        "new_full",
        "new_ones",
        "new_zeros",
        "ones_like",
        "rand_like",
        "zeros_like",
    }
)


@register_flop_formula(torch.ops.arcshard.softmax_numerators)
def _numerators_flops(unit: Any, operand: Any, *_: Any, **__: Any) -> int:
    """Count the floating-point operations of the product, from the shapes of its operands."""
    return 2 * unit[0] * unit[1] * operand[0]


class Operation(NamedTuple):
    """One operation.

    Attributes:
        name: Its name without "aten::".
        flops: Floating-point operations in products, 0 for all other operations.
        bytes_moved: Bytes that it reads and writes.
        dtype: dtype of its largest operand.
        named_bytes: Bytes of the tensors that are arguments or results. An operation that returns
            nothing, such as a fused optimizer, writes more; one that overwrites its first operand
            reads less.
    """

    name: str
    flops: int
    bytes_moved: int
    dtype: torch.dtype
    named_bytes: int = 0

    @property
    def is_triton(self) -> bool:
        """Whether it is a Triton kernel of the head."""
        return self.name.startswith("arcshard::")


@dataclass
class Trace:
    """One forward and backward pass. Bytes do not include tensors that existed before.

    Attributes:
        saved_bytes: Bytes alive after the forward pass: what backward needs, and the result.
        peak_bytes: Most bytes at one moment, gradients of parameters included.
        gradient_bytes_at_peak: Bytes of gradients of parameters at that moment.
        peak_without_gradients: Most bytes at one moment, without gradients of parameters.
        gradient_bytes: Bytes of all gradients of parameters.
        forward: Operations of the forward pass in order, without views.
        backward: Operations of the backward pass in order, without views.
    """

    saved_bytes: int = 0
    peak_bytes: int = 0
    gradient_bytes_at_peak: int = 0
    peak_without_gradients: int = 0
    gradient_bytes: int = 0
    forward: list[Operation] = field(default_factory=list)
    backward: list[Operation] = field(default_factory=list)


class OperationLog(TorchDispatchMode):
    """Records every operation while it is active, except views and allocations.

    Attributes:
        operations: Operations so far, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = self._run(func, args, kwargs)
        if _is_work(func):
            self._record(func, args, kwargs, out)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in _WITHOUT_META_KERNEL and args[0][0].is_meta:
            return None  # it returns nothing, and there is nothing to change
        return func(*args, **kwargs)

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func._overloadpacket
        given = _arguments(func, args, kwargs)
        read, made = _tensors(given), _tensors(out)
        formula = flop_registry.get(_SAME_FLOPS.get(packet, packet))
        flops = formula(*args, **kwargs, out_val=out) if formula is not None else 0
        operands = read or made  # a product of half-precision operands may have an fp32 result
        if operands:
            name = packet._qualified_op_name.removeprefix("aten::")
            named, dtype = _named_bytes(name, read, made), max(operands, key=_size).dtype
            moved = named
            if name in _OVERWRITES:
                moved -= _size(args[0])
            elif not made and name not in _PUTS:
                moved += sum(map(_size, _written(func, given)))
            else:
                moved -= sum(map(_size, _tensors(kwargs.get("out"))))
            self.operations.append(Operation(name, flops, moved, dtype, named))


class MemoryTracker(OperationLog):
    """Tracks storages and operations while it is active.

    Args:
        existing: Tensors that existed before and do not count.

    Attributes:
        live: Bytes now.
        peak: Most bytes so far.
        gradients: Bytes of parameters' gradients, see `is_gradient`.
        gradients_at_peak: See `Trace.gradient_bytes_at_peak`.
        peak_without_gradients: See `Trace.peak_without_gradients`.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = 0
        self.gradients_at_peak = self.peak_without_gradients = 0
        self._sizes: Any = WeakIdKeyDictionary()  # storage -> bytes
        for tensor in existing:
            self._sizes[tensor.untyped_storage()] = 0

    def is_gradient(self, tensor: Tensor) -> None:
        """Count `tensor` as a parameter's gradient from now on."""
        self.gradients += self._sizes.get(tensor.untyped_storage(), 0)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = super()._run(func, args, kwargs)
        for tensor in _tensors(out):
            self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor if it is new."""
        storage = tensor.untyped_storage()
        if storage in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[storage] = size
        weakref.finalize(storage, self._forget, size)
        self.live += size
        if self.live > self.peak:
            self.peak, self.gradients_at_peak = self.live, self.gradients
        self.peak_without_gradients = max(self.peak_without_gradients, self.live - self.gradients)

    def _forget(self, size: int) -> None:
        self.live -= size


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


@cache
def _is_work(func: Any) -> bool:
    """Return whether an operation starts a kernel: not a view, an allocation or a host query."""
    name = func._overloadpacket._qualified_op_name.removeprefix("aten::")
    if name.startswith(("empty", "new_empty", "prim::")) or name in _NO_KERNEL:
        return False
    returned = [value.alias_info for value in func._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returned)
    return not is_view


def _arguments(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments by name, those of the head's kernels cut to the rows that they visit."""
    given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
    if func.namespace == "arcshard" and isinstance(given.get("rows"), Tensor):
        count = len(given["rows"])
        given["weight"] = given["weight"][:count]
        given["state"] = [part[:count] for part in given.get("state", [])]
    return given


def _written(func: Any, given: dict[str, Any]) -> list[Tensor]:
    """Return the operands that an operation changes.

    Fused optimizers may change gradients too, but only where they remove a loss scale, which does
    not happen here.
    """
    return _tensors(
        [
            given.get(one.name)
            for one in func._schema.arguments
            if one.alias_info is not None and one.alias_info.is_write and one.name != "grads"
        ]
    )


def _named_bytes(name: str, read: list[Tensor], made: list[Tensor]) -> int:
    """Sum the bytes of the tensors that are arguments or results.

    Tensors count whole, except for operations that access some places of their first operand, or
    use only its shape.
    """
    if name in _PICKS:
        return sum(map(_size, read[1:])) + 2 * sum(map(_size, made))
    if name in _PUTS:  # indices and values are read; the places of the values, read and written
        values = max(map(_size, read[1:]), default=0)
        return sum(map(_size, read[1:])) + 2 * values
    if name in _TAKES_SHAPE:
        return sum(map(_size, made))
    return sum(map(_size, read)) + sum(map(_size, made))


def _size(tensor: Tensor) -> int:
    """Return the bytes that an operation on a tensor touches: at most those of its storage."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def trace_step(
    forward: Callable[[], Tensor], parameters: Iterable[nn.Parameter], existing: Iterable[Tensor]
) -> Trace:
    """Trace `forward()` and the backward pass from its result, all on fake tensors.

    Args:
        forward: Computes the result. What it makes and does not hold on to is freed.
        parameters: Parameters whose gradients are counted separately. Their `grad` is None before
            and after.
        existing: Tensors that do not count, beside the parameters.

    Returns:
        The trace.
    """
    parameters = list(parameters)
    ledger = MemoryTracker([*parameters, *existing])
    trace = Trace()
    hooks = [
        parameter.register_post_accumulate_grad_hook(
            lambda p: ledger.is_gradient(p.grad) if p.grad is not None else None
        )
        for parameter in parameters
        if parameter.requires_grad
    ]
    try:
        with ledger:
            result = forward()
            trace.saved_bytes = ledger.live
            trace.forward, ledger.operations = ledger.operations, []
            if result.dim():
                result.backward(torch.empty_like(result))
            else:
                result.backward()
    finally:
        for hook in hooks:
            hook.remove()
    trace.backward = ledger.operations
    trace.peak_bytes, trace.gradient_bytes_at_peak = ledger.peak, ledger.gradients_at_peak
    trace.peak_without_gradients = ledger.peak_without_gradients
    trace.gradient_bytes = ledger.gradients
    for parameter in parameters:
        parameter.grad = None
    return trace


def as_fake(tensor: Tensor, mode: FakeTensorMode, device: torch.device = CPU) -> Tensor:
    """Make a fake tensor on `device` from one on the meta device. Not while `mode` is active."""
    return FakeTensor(mode, tensor.detach(), device)


def make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Turn a module on the meta device into one of fake tensors on the CPU, in place.

    Do not call it while `mode` is active. A network is built on the meta device and not under the
    mode, because some initializations ask for values.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = nn.Parameter(as_fake(parameter, mode), parameter.requires_grad)
                part._parameters[name] = fake
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = as_fake(buffer, mode)
