"""An accelerator in name only: shapes, dtypes and places are followed, no number is computed.

    python -m tests.fake_accelerator '{"name": {"loss": "adaface"}, ...}'

Does training steps of configs on it and prints {"name": error or null}. PyTorch's fake tensors
refuse what a GPU would refuse or wait for: operands on two devices, and a number, or a size that
depends on numbers, asked of the device. What they cannot show is the arithmetic. In a process of
its own, because PyTorch can have one such device, and never gets rid of it.

Where a fake tensor of this device is not enough, this file stands in: copies of modules and
tensors, initial values, autocast (which has tables for real devices only), random generators, the
fused SGD, and the class centers of a teacher.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.library import Library, fallthrough_kernel
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

import training.build
import training.distillation
from arcshard.head.distillation import TeacherCenters
from arcshard.partial_fc import PartialFC
from backbones import get_model
from backbones.weights import ModelMetadata, save_model
from configs.base import Config
from dataset import Batch
from utils.distributed import DistContext

DEVICE, AUTOCAST = "pretended:0", "AutocastPrivateUse1"
NUM_CLASSES, WIDTH = 5001, 32
# What autocast on CUDA makes half precision, of what our networks use.
HALVED = ("conv2d", "linear", "mm", "matmul", "prelu", "scaled_dot_product_attention")
BASE: dict[str, Any] = {
    "rec": "synthetic",
    "num_classes": NUM_CLASSES,
    "num_image": 256,
    "network": "r_nano",
    "embedding_size": WIDTH,
    "batch_size": 8,
    "num_epoch": 2,
    "lr": 0.05,
    "verbose": 0,
    "precision": "fp32",
}


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def install() -> None:
    """Make `DEVICE` known to PyTorch, for the rest of this process."""
    backend_registration._setup_privateuseone_for_python_backend("pretended", _Module())
    anything, aten = Library("_", "IMPL"), Library("aten", "IMPL")
    anything.fallback(fallthrough_kernel, AUTOCAST)
    for name in HALVED:
        aten.impl(name, _halved(getattr(torch.ops.aten, name).default), AUTOCAST)
    kept.extend((anything, aten))
    for place, name, stand_in in (
        (nn.Module, "_apply", _apply),
        (FakeTensor, "__deepcopy__", _copied),
        (nn.Parameter, "__deepcopy__", _copied),
        (nn.init, "trunc_normal_", lambda tensor, **_: tensor),  # it looks at its bounds' values
        (torch, "tensor", _blank),
        (torch, "Generator", lambda _=None: _RealGenerator()),
        (torch, "_fused_sgd_", _fused_sgd),
        (training.distillation, "_centers_of", _teacher_centers),
        # Verification is no part of a step; it looks at its mean and std when it is made.
        (training.build, "Embedder", lambda *_, **__: None),
    ):
        setattr(place, name, stand_in)


kept: list[Library] = []  # a registration ends with its library
_real_tensor, _RealGenerator = torch.tensor, torch.Generator


def _halved(operation: Any) -> Callable[..., Any]:
    key = torch._C._parse_dispatch_key(AUTOCAST)
    assert key is not None
    bare = torch._C.DispatchKeySet(key)

    def call(*arguments: Any, **options: Any) -> Any:
        dtype = torch.get_autocast_dtype("pretended")

        def cast(value: Any) -> Any:
            is_wide = isinstance(value, Tensor) and value.dtype == torch.float32
            return value.to(dtype) if is_wide else value

        with torch._C._ExcludeDispatchKeyGuard(bare):
            return operation(*tree_map(cast, arguments), **options)

    return call


def _apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
    for child in self.children():
        child._apply(function)
    for name, weight in self._parameters.items():
        if weight is not None:
            moved = function(weight.detach())
            self._parameters[name] = nn.Parameter(moved, weight.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = function(buffer)
    return self


def _copied(self: Tensor, memo: dict[int, Any]) -> Tensor:
    clone = self.detach().clone()
    is_weight = isinstance(self, nn.Parameter)
    memo[id(self)] = nn.Parameter(clone, self.requires_grad) if is_weight else clone
    return memo[id(self)]


def _blank(value: Any, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Tensor:
    wanted = _real_tensor(value)
    return torch.zeros(wanted.shape, dtype=dtype or wanted.dtype, device=device)


def _fused_sgd(*arguments: Any, **options: Any) -> None:
    places = {t.device for t in tree_leaves((arguments, options)) if isinstance(t, Tensor)}
    assert places == {torch.device(DEVICE)}, f"fused SGD over {places}"


def _teacher_centers(_path: str, _meta: Any, head: PartialFC, *_: Any) -> tuple[Any, int]:
    unit = torch.zeros(head.num_classes_local, head.centers_per_class, WIDTH, device=DEVICE)
    known = torch.zeros(head.num_classes_local, dtype=torch.bool, device=DEVICE)
    return TeacherCenters(unit, known), 1


def steps(folder: Path, teacher: Path, changes: dict[str, Any]) -> None:
    """Build, and two steps; "is_frozen" and "defect" are ours, all else is the config's."""
    changes = copy.copy(changes)
    is_frozen, defect = changes.pop("is_frozen", False), changes.pop("defect", "")
    if changes.get("teacher"):
        changes["teacher"] = str(teacher)
    cfg = Config(**{**BASE, "output": str(folder), **changes})
    parts = training.build.build(cfg, DistContext(0, 0, 1, torch.device(DEVICE)))
    parts.step.model.train()
    for _ in range(2):
        images = torch.zeros(cfg.batch_size, 3, 112, 112, dtype=torch.uint8)
        labels = torch.zeros(cfg.batch_size, dtype=torch.int64)
        batches = [Batch(images, labels) for _ in range(cfg.gradient_acc)]
        outcome = parts.step(batches, 0.01, is_frozen=is_frozen)
        assert all(x is None or x.device == torch.device(DEVICE) for x in outcome)
    if defect == "waits":
        float(outcome.loss)
    elif defect == "mixes":
        parts.head.weight + torch.zeros(len(parts.head.weight), 1)


def main() -> int:
    """All cases of the JSON object given, each in a mode of its own."""
    cases: dict[str, dict[str, Any]] = json.loads(sys.argv[1])
    errors: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as name:
        teacher = Path(name) / "teacher.pt"
        metadata = ModelMetadata("r_nano", num_features=WIDTH)
        save_model(teacher, get_model("r_nano", num_features=WIDTH), metadata)
        install()
        for case, changes in cases.items():
            try:
                with FakeTensorMode():
                    steps(Path(name), teacher, changes)
                errors[case] = None
            except Exception:
                errors[case] = traceback.format_exc()
    print(json.dumps(errors))
    return 0


if __name__ == "__main__":
    sys.exit(main())
