"""What may be switched about a step: the same numbers, or the ones that its name promises."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.base import Config
from tests.conftest import Ranks
from tests.run_helpers import TINY_RUN, losses_on, run_training
from training import build as building
from training import setup
from training.batch_norm import BatchNormStatistics
from training.build import build
from training.parallelize import compile_backbone
from training.precision import POLICIES, MixedPrecisionBackbone, allow_tf32, choose_precision
from training.step import TrainStep
from utils.distributed import DistContext
from utils.errors import UserError

ALONE = DistContext(0, 0, 1, torch.device("cpu"))

pytestmark = pytest.mark.usefixtures("one_thread")


def parts_of(folder: Path, **changes: Any) -> building.TrainComponents:
    parts = build(Config(**{**TINY_RUN, "output": str(folder), **changes}), ALONE)
    parts.step.model.train()
    return parts


# --- waiting for the device ------------------------------------------------------------------

WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__")
FREE = ("if bool(bad):", "torch.searchsorted(self.rows", "for flag in message.tolist()")
"""Lines that ask where asking is free: behind a branch for CPUs, or of the flags, which never leave
the host. (`make gpu-check` has CUDA's own alarm for all others.)"""


class WaitCounter:
    """Counts what would wait for a GPU: a tensor's number asked for by the host."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def watched(self, name: str, original: Any) -> Any:
        def call(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is threading.main_thread():  # not the reader's
                caller = traceback.extract_stack(limit=2)[0]
                if not any(line in str(caller.line) for line in FREE):
                    self.seen.append(f"{name} in {Path(caller.filename).name}: {caller.line}")
            return original(tensor, *arguments, **options)

        return call


@pytest.fixture
def waits() -> Iterator[WaitCounter]:
    counter = WaitCounter()
    patches = [
        patch.object(Tensor, name, counter.watched(name, getattr(Tensor, name))) for name in WAITS
    ]
    for each in patches:
        each.start()
    yield counter
    for each in patches:
        each.stop()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_update": "autograd"},
        {"sample_rate": 0.5},
        {"gradient_acc": 2},
        {"optimizer": "adamw", "precision": "bf16"},
        {"loss": "adaface", "clip_grad_norm": 0.0},
        {"gradient_checkpointing": True},
        {"ema_decay": 0.9, "layer_decay": 0.5, "decay_norms_and_biases": False},
        {"freeze_epoch": 1},
    ],
    ids=str,
)
def test_a_step_never_asks_the_device_for_a_number(tmp_path, waits, changes):
    parts = parts_of(tmp_path, **changes)
    batches = iter(parts.loader)
    for _ in range(3):
        group = list(islice(batches, parts.global_batch // TINY_RUN["batch_size"]))
        waits.seen.clear()  # before the first step optimizers make their state
        # The check of labels waits on CPUs alone.
        with patch("arcshard.head.batch.BatchGatherer._refuse_unknown", return_value=None):
            parts.step(group, 0.01, is_frozen="freeze_epoch" in changes)
    assert waits.seen == []


def test_the_loop_asks_at_log_lines_only(tmp_path, waits):
    begins: list[int] = []
    step = TrainStep.__call__

    def noted(self: TrainStep, *arguments: Any, **options: Any) -> Any:
        begins.append(len(waits.seen))
        return step(self, *arguments, **options)

    with (
        patch.object(TrainStep, "__call__", noted),
        patch("arcshard.head.batch.BatchGatherer._refuse_unknown", return_value=None),
    ):
        run_training(0, 1, str(tmp_path), {"frequent": 4, "max_steps": 9, "keep_checkpoints": 0})
    between = [later - earlier for earlier, later in pairwise(begins)]
    assert len(between) == 8
    assert [n for n, waited in enumerate(between, start=1) if waited] == [4, 8], waits.seen


def test_the_counter_of_waits_counts(waits):
    value = torch.ones(2)
    assert value[0] > 0
    value.tolist()
    float(value[1])
    assert {word.split()[0] for word in waits.seen} >= {"__bool__", "tolist", "__float__"}


# --- precision -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "fp16", "has_bf16", "name"),
    [
        (None, False, True, "bf16"),
        (None, False, False, "fp32"),
        (None, True, True, "fp16"),
        ("fp32", True, True, "fp32"),
        ("tf32", False, True, "tf32"),
    ],
)
def test_bf16_is_the_usual_precision_of_gpus_that_have_it(wanted, fp16, has_bf16, name):
    with patch("torch.cuda.is_bf16_supported", return_value=has_bf16):
        policy, warning = choose_precision(wanted, fp16, torch.device("cuda"))
    assert (policy.name, warning) == (name, "")


def test_tf32_on_a_cpu_is_fp32_and_says_so():
    policy, warning = choose_precision("tf32", False, torch.device("cpu"))
    assert policy == POLICIES["fp32"]
    assert "tf32" in warning


class Ends(nn.Module):
    """Two layers that look at the switches when they are used, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.embedding = nn.Linear(3, 4), nn.Linear(4, 2)
        self.seen: dict[str, bool] = {}

    def _look(self, name: str, value: Tensor) -> Tensor:
        self.seen[name] = torch.backends.cuda.matmul.allow_tf32
        value.register_hook(
            lambda _: self.seen.update({f"{name}, backward": torch.backends.cuda.matmul.allow_tf32})
        )
        return value

    def forward_features(self, pixels: Tensor) -> Tensor:
        return self._look("body", self.body(pixels.mean(dim=(2, 3))))

    def forward_embedding(self, features: Tensor) -> Tensor:
        return self._look("embedding", self.embedding(features))


def test_tf32_is_for_the_body_and_never_for_the_embedding_layer_or_verification(tmp_path):
    ends = Ends()
    model = MixedPrecisionBackbone(ends, POLICIES["tf32"])
    parts = parts_of(tmp_path, embedding_size=2)
    step = parts.step
    allow_tf32(False)
    step.model, step.tf32 = model, True
    step(list(islice(iter(parts.loader), 1)), 0.0)
    assert ends.seen == {
        "body": True,
        "embedding": False,
        "embedding, backward": False,
        "body, backward": True,
    }
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_a_run_switches_off_the_tf32_that_pytorch_allows_by_itself(tmp_path):
    torch.backends.cudnn.allow_tf32 = True
    parts_of(tmp_path)
    assert not torch.backends.cudnn.allow_tf32


# --- memory format, compiler, DDP ------------------------------------------------------------


def test_both_memory_formats_train_alike(tmp_path):
    outcomes = {}
    for channels_last in (True, False):
        parts = parts_of(tmp_path, channels_last=channels_last, precision="fp64")
        conv = next(m for m in parts.backbone.modules() if isinstance(m, nn.Conv2d))
        inputs = []
        conv.register_forward_hook(lambda _, given, __, kept=inputs: kept.append(given[0]))
        losses = [parts.step([batch], 0.05).loss for batch in islice(iter(parts.loader), 3)]
        kind = torch.channels_last if channels_last else torch.contiguous_format
        assert inputs[0].is_contiguous(memory_format=kind)
        assert conv.weight.is_contiguous(memory_format=kind) or conv.weight.shape[1] == 1
        outcomes[channels_last] = torch.stack(losses)
    torch.testing.assert_close(outcomes[True], outcomes[False], rtol=1e-9, atol=0)


def test_gradients_added_up_in_fp16_are_near_and_not_the_same(ranks, tmp_path):
    changes = {"max_steps": 4, "freeze_batch_norm": True}
    usual = losses_on(ranks, 2, tmp_path, **changes)
    half = losses_on(ranks, 2, tmp_path, grad_reduce_dtype="fp16", **changes)
    assert usual[0] == half[0]
    assert not np.array_equal(usual, half)
    np.testing.assert_allclose(half, usual, rtol=2e-2)


def build_two(rank: int, world_size: int, folder: str, changes: dict[str, Any]) -> str:
    cfg = Config(**{**TINY_RUN, "output": folder, **changes})
    with pytest.raises(UserError) as caught:
        build(cfg, DistContext(rank, rank, world_size, torch.device("cpu")))
    return str(caught.value)


def test_bf16_sums_on_cpus_are_refused_before_anything_starts(ranks: Ranks, tmp_path):
    for sentence in ranks.run(2, build_two, str(tmp_path), {"grad_reduce_dtype": "bf16"}):
        assert "grad_reduce_dtype=bf16" in sentence
        assert "fp16" in sentence


def calls_of_the_compiled(rank: int, world_size: int, folder: str) -> int:
    """Of DDP itself, which is what `compile` compiles, in a step that embeds everything twice."""
    changes: dict[str, Any] = {"output": folder, "loss": "adaface", "gradient_acc": 2}
    cfg = Config(**{**TINY_RUN, **changes})
    parts = build(cfg, DistContext(rank, rank, world_size, torch.device("cpu")))
    parts.step.model.train()
    with patch.object(parts.step.model, "_call_impl", wraps=parts.step.model._call_impl) as call:
        parts.step(list(islice(iter(parts.loader), 2)), 0.05)
    return call.call_count


def test_embeddings_made_twice_are_made_by_the_same_code(ranks: Ranks, tmp_path):
    """The module in DDP draws other masks than its compiled graph."""
    assert ranks.run(2, calls_of_the_compiled, str(tmp_path)) == [4, 4]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that captures the graphs and runs them as they are: seconds, not minutes."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module,
        "compile",
        lambda self, **options: compile_module(self, **options, backend="aot_eager"),
    )


@pytest.mark.parametrize("changes", [{}, {"freeze_batch_norm": True, "gradient_acc": 2}], ids=str)
def test_a_captured_step_equals_the_plain_one(tmp_path, captured, changes):
    losses, weights = {}, {}
    for compiled in (False, True):
        parts = parts_of(tmp_path, compile=compiled, precision="fp64", **changes)
        batches = iter(parts.loader)
        count = parts.global_batch // TINY_RUN["batch_size"]
        losses[compiled] = torch.stack(
            [parts.step(list(islice(batches, count)), 0.05).loss for _ in range(3)]
        )
        weights[compiled] = parts.model_state()
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-9, atol=0)
    torch.testing.assert_close(weights[True], weights[False], rtol=1e-6, atol=1e-9)


def test_a_captured_backbone_may_be_frozen_at_first(tmp_path, captured):
    losses = {}
    for compiled in (False, True):
        parts = parts_of(tmp_path, compile=compiled, precision="fp64")
        batches = iter(parts.loader)
        losses[compiled] = torch.stack(
            [parts.step([next(batches)], 0.05, is_frozen=n < 2).loss for n in range(4)]
        )
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-9, atol=0)


def test_compiling_needs_a_compiler_and_says_so_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no_such_compiler")
    with pytest.raises(UserError, match=r"compile=True.*CXX"):
        parts_of(tmp_path, compile=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "adaface", "adaface_t_alpha": 2.0}, "adaface"),
        ({"teacher": "no_such_run"}, "no_such_run"),
    ],
)
def test_what_cannot_start_is_refused_before_the_compiler_takes_its_minute(
    tmp_path, changes, words
):
    compiled = AssertionError("compiled")
    never = patch("training.parallelize.compile_backbone", side_effect=compiled)
    with never, pytest.raises((UserError, FileNotFoundError), match=words):
        parts_of(tmp_path, compile=True, **changes)


def test_compiling_for_a_gpu_needs_a_c_compiler(monkeypatch):
    monkeypatch.setenv("CC", "no_such_compiler")
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: name)
    on_gpu = DistContext(0, 0, 1, torch.device("cuda", 0))
    with pytest.raises(UserError, match=r"compile=True.*C compiler.*CC"):
        setup.check_step_options(Config(**{**TINY_RUN, "compile": True}), on_gpu)


class Floats(nn.Module):
    """Takes images, as what is compiled does."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.network(images / 255)
        return found


@pytest.mark.slow  # a minute or more of compiling
def test_a_compiled_backbone_equals_the_plain_one():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.Flatten())
    statistics = BatchNormStatistics(network)
    before = statistics.statistics.clone()
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    model = Floats(network)
    expected = model(images)
    statistics.statistics.copy_(before)
    compile_backbone(model, 4, 8, torch.device("cpu"), statistics)
    assert torch.equal(statistics.statistics, before)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
