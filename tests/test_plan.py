"""The plan's sizes are those of parts that run, and its time follows from the peaks it names."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from arcshard.head.row_optimizer import AdamWRows, SGDRows
from arcshard.losses import ArcFace, CurricularFace
from arcshard.partial_fc import PartialFC
from backbones import get_model
from backbones.weights import ModelMetadata, save_model
from configs.base import Config
from scripts import plan
from training.build import build
from training.classifier import LayerClassifier
from training.planner.memory import HEAD_BATCH_MATRICES, estimate_requirements
from training.planner.roofline import (
    BACKWARD_SHARE,
    GPUS,
    HEAD_LAUNCH_SECONDS,
    LAUNCH_SECONDS,
    SHARE_OF_PEAK,
    TRITON_LAUNCH_SECONDS,
    Links,
    collective_seconds,
    head_seconds,
    operations_seconds,
)
from training.planner.trace import MemoryTracker, Operation, as_fake, make_fake, trace_step
from training.precision import POLICIES
from utils.distributed import DistContext
from utils.errors import UserError

ALONE = DistContext(0, 0, 1, torch.device("cpu"))
SMALL: dict[str, Any] = {
    "rec": "synthetic",
    "num_classes": 300,
    "num_image": 4096,
    "network": "r_nano",
    "embedding_size": 64,
    "input_size": 32,
    "batch_size": 8,
    "num_workers": 0,
    "output": "unused",
    "head_workspace_mib": 1,
}
WORDS = [f"{key}={value}" for key, value in SMALL.items() if key != "output"]

pytestmark = pytest.mark.usefixtures("one_thread")


def small(**more: Any) -> Config:
    return Config(**{**SMALL, **more})


def needs_of(cfg: Config, world_size: int = 1, precision: str = "fp32", device: str = "cpu"):
    assert isinstance(cfg.num_classes, int)
    return estimate_requirements(cfg, world_size, cfg.num_classes, POLICIES[precision], device)


# --- the traced step -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "precision", "checkpointing"),
    [("r_nano", "fp32", False), ("mbf", "bf16", False), ("vit_t", "bf16", True)],
)
def test_the_traced_network_allocates_what_a_real_one_does(network, precision, checkpointing):
    cfg = small(network=network, gradient_checkpointing=checkpointing, precision=precision)
    planned = needs_of(cfg, precision=precision).backbone
    model = build(cfg, ALONE).step.model
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    images = images.to(memory_format=torch.channels_last)
    model.train()
    real = trace_step(lambda: model(images), model.parameters(), [images, *model.buffers()])
    assert planned.saved_bytes == pytest.approx(real.saved_bytes, rel=0.01)
    assert planned.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
    assert planned.peak_without_gradients == pytest.approx(real.peak_without_gradients, rel=0.01)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned.gradient_bytes == real.gradient_bytes == 4 * trained
    operations = [*planned.forward, *planned.backward]
    assert not [op.name for op in operations if op.name.startswith(("prim", "view", "detach"))]
    flops = [sum(op.flops for op in ops) for ops in (planned.forward, planned.backward)]
    assert flops == [sum(op.flops for op in ops) for ops in (real.forward, real.backward)]


def test_checkpointing_needs_less_memory_and_one_more_forward_pass():
    whole = needs_of(small()).backbone
    again = needs_of(small(gradient_checkpointing=True)).backbone
    assert again.saved_bytes < 0.7 * whole.saved_bytes
    forward, backward = (sum(op.flops for op in ops) for ops in (whole.forward, whole.backward))
    # all but the stem and the embedding layer is computed again
    assert backward + 0.9 * forward < sum(op.flops for op in again.backward) < backward + forward


def test_the_ledger_forgets_what_is_let_go_of_and_knows_views_from_copies():
    base = torch.ones(1000)
    with MemoryTracker([base]) as ledger:
        view = base[:10].view(2, 5)
        assert (ledger.live, ledger.operations) == (0, [])
        doubled = base * 2
        assert ledger.live == ledger.peak == 4000
        doubled.add_(1)
        del doubled
        assert (ledger.live, ledger.peak) == (0, 4000)
        product = base[None, :] @ view.new_ones(1000, 3)
    assert [op.name for op in ledger.operations][:2] == ["mul", "add_"]
    assert ledger.operations[-1].flops == 2 * 1000 * 3
    assert ledger.operations[0].bytes_moved == 8000
    assert product.shape == (1, 3)


def test_fake_parameters_have_no_memory_and_keep_what_they_are():
    with torch.device("meta"):
        model = torch.nn.BatchNorm1d(5)
    model.weight.requires_grad_(False)
    mode = FakeTensorMode()
    make_fake(model, mode)
    assert [p.requires_grad for p in model.parameters()] == [False, True]
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert as_fake(torch.empty(3, device="meta"), mode, torch.device("cuda")).device.type == "cuda"


# --- memory by part --------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_and_states_are_those_of_a_run_after_a_step(optimizer):
    cfg = small(optimizer=optimizer, sub_centers=2)
    planned = needs_of(cfg)
    parts = build(cfg, ALONE)
    parts.step.model.train()
    parts.step(list(islice(iter(parts.loader), 1)), 0.01)
    state = parts.step.optimizer.state.values()
    assert planned.footprint.optimizer == sum(
        t.numel() * t.itemsize for of_one in state for t in of_one.values()
    )
    head = parts.head
    assert planned.footprint.centers == head.weight.numel() * 4 == 600 * 64 * 4
    assert head.row_optimizer is not None
    assert planned.footprint.center_state == sum(
        t.numel() * t.itemsize for t in head.row_optimizer.state(head.weight).values()
    )
    weights = [*parts.step.model.parameters(), *parts.step.model.buffers()]
    size = sum(t.numel() * t.itemsize for t in weights)
    kept = sum(t.numel() * t.itemsize for t in parts.batch_norm._kept)
    assert planned.footprint.weights == size + kept
    assert planned.parameters == sum(p.numel() for p in parts.step.model.parameters())


@pytest.mark.parametrize(("num_classes", "world_size", "most"), [(10, 3, 4), (300, 4, 75)])
def test_rank_0_is_planned_which_has_the_most_classes(num_classes, world_size, most):
    planned = needs_of(small(num_classes=num_classes), world_size)
    assert planned.classes_per_rank == most
    assert planned.footprint.centers == most * 64 * 4
    assert planned.head.batch == 8 * world_size


@pytest.mark.parametrize(
    ("rate", "optimizer", "loss"),
    [(1.0, "sgd", "arcface"), (0.3, "adamw", "arcface"), (0.3, "sgd", "curricularface")],
)
def test_the_heads_work_is_no_more_than_planned_and_not_much_less(rate, optimizer, loss):
    classes, width, batch = 20_000, 64, 64
    rule = SGDRows if optimizer == "sgd" else AdamWRows
    margin = ArcFace() if loss == "arcface" else CurricularFace()
    cfg = small(
        num_classes=classes, sample_rate=rate, batch_size=batch, optimizer=optimizer, loss=loss
    )
    planned = needs_of(cfg)
    head = PartialFC(
        margin,
        width,
        classes,
        rate,
        row_optimizer=rule(),
        batch_size_per_rank=batch,
        workspace_mib=1,
    )
    assert head.row_optimizer is not None
    embeddings = torch.randn(batch, width, requires_grad=True)
    labels = torch.randint(classes, (batch,))
    state = head.row_optimizer.state(head.weight).values()
    with MemoryTracker([embeddings, labels, head.weight, *state, *head.buffers()]) as ledger:
        head(embeddings, labels, 0.1).backward()
        head.step(0.1)
    batch_bytes = HEAD_BATCH_MATRICES * batch * width * 4
    # the numbers of a sample's classes, 8 bytes each and several of them, are not in the plan
    numbers = 100 * planned.head.rows if rate < 1 else 0
    workspace = head.planned_blocks().total_bytes
    assert workspace <= 2**20
    assert ledger.peak <= workspace + batch_bytes + numbers
    assert ledger.peak >= 0.7 * workspace
    # The backbone's backward begins when the head's workspace is free again.
    assert planned.footprint.head == (workspace if planned.footprint.peak_is_in == "head" else 0)


def test_the_batchs_matrices_in_the_head_are_as_many_as_planned():
    batch, width, classes = 512, 256, 600
    head = PartialFC(
        ArcFace(),
        width,
        classes,
        row_optimizer=SGDRows(),
        batch_size_per_rank=batch,
        workspace_mib=4,
    )
    embeddings = torch.randn(batch, width, requires_grad=True)
    labels = torch.randint(classes, (batch,))
    assert head.row_optimizer is not None
    state = head.row_optimizer.state(head.weight).values()
    with MemoryTracker([embeddings, labels, head.weight, *state]) as ledger:
        head(embeddings, labels, 0.1).backward()
    cfg = small(num_classes=classes, batch_size=batch, embedding_size=width, head_workspace_mib=4)
    matrices = (ledger.peak - needs_of(cfg).footprint.head) / (batch * width * 4)
    assert 0.6 * HEAD_BATCH_MATRICES <= matrices <= HEAD_BATCH_MATRICES


def test_the_autograd_head_is_planned_with_its_logits_and_gradient():
    cfg = small(num_classes=20_000, head_update="autograd", batch_size=64)
    planned = needs_of(cfg)
    trace = planned.head.trace
    assert trace is not None
    head = PartialFC(
        ArcFace(), 64, 20_000, row_optimizer=SGDRows(), update="autograd", batch_size_per_rank=64
    )
    embeddings = torch.randn(64, 64, requires_grad=True)
    labels = torch.randint(20_000, (64,))
    assert head.row_optimizer is not None
    state = head.row_optimizer.state(head.weight).values()  # made at first use
    with MemoryTracker([embeddings, labels, head.weight, *state]) as ledger:
        head(embeddings, labels).backward()
    assert trace.peak_bytes == pytest.approx(ledger.peak, rel=0.05)
    assert trace.gradient_bytes == 20_000 * 64 * 4
    fused = needs_of(small(num_classes=20_000, batch_size=64))
    assert planned.footprint.total > fused.footprint.total + 2 * 20_000 * 64 * 4


@pytest.mark.parametrize(
    ("loss", "update"),
    [
        ("adaface", "fused"),
        ("softmax", "fused"),
        ("magface", "autograd"),
        ("curricularface", "autograd"),
        ("elasticface_arc", "autograd"),
        ("softmax", "autograd"),
    ],
)
def test_other_losses_can_be_planned(loss, update):
    planned = needs_of(small(loss=loss, head_update=update, sample_rate=0.5))
    assert planned.footprint.total > planned.footprint.activations > 0


CLASSIFY: dict[str, Any] = {
    "task": "classification",
    "loss": "softmax",
    "network": "resnet_nano",
    "embedding_size": 128,
    "num_classes": 9000,
}


@pytest.mark.parametrize(
    ("dim", "smoothing", "width", "classes", "batch"),
    [(None, 0.1, 128, 9000, 8), (0, 0.0, 43, 9000, 24), (1, 0.1, 128, 3000, 24)],
)
def test_a_layer_by_autograd_is_planned_with_the_part_that_rank_0_has(
    dim, smoothing, width, classes, batch
):
    cfg = small(**CLASSIFY, parallel_dim=dim, label_smoothing=smoothing)
    planned = needs_of(cfg, world_size=3)
    head = LayerClassifier(
        width,
        classes,
        dim,
        label_smoothing=smoothing,
        row_optimizer=SGDRows(),
        bias_update=SGDRows(),
    )
    state = [v for p, rule in head.optimized_parameters() for v in rule.state(p).values()]
    embeddings = torch.randn(batch, width, requires_grad=True)
    labels = torch.randint(classes, (batch,))
    with MemoryTracker([embeddings, labels, *head.parameters(), *state]) as ledger:
        head(embeddings, labels).backward()
    trace, work = planned.head.trace, planned.head
    assert trace is not None
    assert trace.peak_bytes == pytest.approx(ledger.peak, rel=0.05)
    assert planned.footprint.centers == (width + 1) * classes * 4 == planned.footprint.center_state
    assert planned.footprint.head >= trace.gradient_bytes == planned.footprint.centers
    assert (work.rows, work.batch) == (classes, batch)
    exchanged = {None: (0, 129 * 9000 * 4), 0: (128, 24 * 9000 * 4), 1: (128, 0)}
    assert (work.gathered_width, work.summed_bytes) == exchanged[dim]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("words", ["parallel_dim=None", "parallel_dim=0", "label_smoothing=0.1"])
def test_a_layer_by_autograd_is_measured(capsys, words, world_size):
    settings = [f"{key}={value}" for key, value in CLASSIFY.items()]
    arguments = ["--measure", "0.05", "--world-size", str(world_size)]
    found = run(capsys, *settings, words, *arguments)
    assert found["time"]["head"] > 0
    assert (found["time"]["collectives"] > 0) == (world_size > 1)


def test_a_whole_layer_that_does_not_fit_is_advised_to_be_split(capsys):
    settings = [f"{key}={value}" for key, value in CLASSIFY.items()]
    words = ["num_classes=25_000_000", "parallel_dim=None", "--gpu", "v100", "--world-size", "8"]
    found = run(capsys, *settings, *words)
    assert found["memory"]["fits"] is False
    changes = {one["words"]: one["fits"] for one in found["changes"]}
    assert changes["parallel_dim=1"] is True
    assert not any(words.startswith("head_") for words in changes)


def test_gradients_stay_where_ddp_or_micro_steps_keep_them():
    once = needs_of(small())
    size = once.backbone.gradient_bytes
    assert once.footprint.gradients <= size
    for kept in (needs_of(small(gradient_acc=2)), needs_of(small(), world_size=2)):
        assert kept.footprint.gradients == size


def test_centers_in_bf16_take_half_and_on_the_host_none_of_the_device():
    full = needs_of(small(num_classes=50_000)).footprint
    half = needs_of(
        small(num_classes=50_000, head_weight_dtype="bf16", head_state_dtype="bf16")
    ).footprint
    assert (half.centers, half.center_state) == (full.centers // 2, full.center_state // 2)
    host = needs_of(
        small(num_classes=50_000, head_offload=True, sample_rate=0.1), device="cuda"
    ).footprint
    assert host.centers == full.centers // 10
    assert host.on_host == pytest.approx(1.1 * (full.centers + full.center_state))
    assert "on_host" not in host.parts()


def test_nothing_is_allocated_for_millions_of_classes():
    cfg = small(num_classes=50_000_000, embedding_size=512)
    planned = needs_of(cfg)  # 95 GiB of centers
    assert planned.footprint.centers == 50_000_000 * 512 * 4


# --- time ------------------------------------------------------------------------------------


def test_an_operation_takes_as_long_as_its_slowest_side():
    v100 = GPUS["v100"]
    share = SHARE_OF_PEAK["cuda"]
    half = Operation("mm", 10**12, 100, torch.float16)
    assert operations_seconds([half], v100) == pytest.approx(1 / (share["products"] * 125))
    full = half._replace(dtype=torch.float32)
    assert operations_seconds([full], v100) == pytest.approx(1 / (share["products"] * 15.7))
    moved = Operation("add", 0, 9 * 10**9, torch.float32)
    assert operations_seconds([moved], v100) == pytest.approx(0.01 / share["memory"])
    short = Operation("add", 0, 4, torch.float32)
    assert operations_seconds([short] * 5, v100) == pytest.approx(5 * LAUNCH_SECONDS["cuda"])


@pytest.mark.parametrize(
    ("precision", "fp16", "gpu", "name"),
    [
        (None, False, "h100", "bf16"),
        (None, False, "v100", "fp32"),
        (None, True, "h100", "fp16"),
        ("tf32", False, "a100", "tf32"),
        ("fp32", False, "h100", "fp32"),
    ],
)
def test_the_plan_has_the_precision_the_run_would_have_on_that_gpu(precision, fp16, gpu, name):
    cfg = small(precision=precision, fp16=fp16)
    assert plan.policy(cfg, GPUS[gpu]).name == name


def test_tf32_is_faster_than_fp32_where_there_is_any_and_refused_elsewhere():
    setting = plan.Setting(GPUS["a100"], 1, Links(), 1000, 10_000)
    fp32, tf32 = (
        plan.make_plan(small(precision=precision, batch_size=256), setting).time
        for precision in ("fp32", "tf32")
    )
    assert tf32.backbone < fp32.backbone
    with pytest.raises(UserError, match="tf32"):
        plan.policy(small(precision="tf32"), GPUS["v100"])


def test_gradients_in_half_precision_are_half_the_traffic():
    whole, half = (needs_of(small(grad_reduce_dtype=d), world_size=8) for d in ("fp32", "bf16"))
    assert half.all_reduced_bytes * 2 == whole.all_reduced_bytes == whole.trainable_bytes


def test_the_heads_time_grows_where_numerators_are_made_again():
    h100 = GPUS["h100"]

    def seconds(passes: int = 1, **more: Any) -> float:
        keys = {"num_classes": 100_000, "batch_size": 1024, "embedding_size": 512, **more}
        work = needs_of(small(**keys), precision="bf16", device="cuda").head
        return head_seconds(work, h100, passes)

    kept, again = seconds(head_workspace_mib=2048), seconds(head_workspace_mib=128)
    deferred = seconds(head_workspace_mib=128, gradient_acc=2) / 2
    assert kept < again < deferred
    product = 2 * 1024 * 512 * 100_000 / (SHARE_OF_PEAK["cuda"]["products"] * 989.4e12)
    assert kept > 3 * product
    large: dict[str, Any] = {"num_classes": 4_000_000, "head_workspace_mib": 8192}
    assert seconds(**large, sample_rate=0.1) < 0.3 * seconds(**large)


def test_a_head_of_many_blocks_takes_at_least_the_time_of_its_launches():
    """C = 2M, B = 1024, 256 MiB on an H100, PyTorch's kernels: 6,208 launches of 21 us."""
    setting = plan.Setting(GPUS["h100"], 1, Links(), 2_000_000, 10_000_000)
    keys = {"num_classes": 2_000_000, "batch_size": 1024, "embedding_size": 512}
    keys |= {"head_workspace_mib": 256, "precision": "bf16", "head_kernels": "torch"}
    cfg = small(**keys)
    planned = plan.make_plan(cfg, setting)
    assert planned.needs.head.operations is not None
    launches = planned.needs.head.operations().launches
    assert launches == pytest.approx(6_208, rel=0.02)
    assert planned.time.head == pytest.approx(launches * HEAD_LAUNCH_SECONDS)
    triton = plan.make_plan(cfg.replace(head_kernels="auto"), setting)
    assert triton.needs.head.operations is not None
    counted = triton.needs.head.operations()
    kernels = counted.total(lambda operations: sum(op.is_triton for op in operations))
    others = counted.launches - kernels
    assert triton.time.head == pytest.approx(
        kernels * TRITON_LAUNCH_SECONDS + others * HEAD_LAUNCH_SECONDS
    )
    assert triton.time.head < planned.time.head / 2
    automatic = plan.make_plan(cfg.replace(head_workspace_mib="auto"), setting)
    assert automatic.time.head < planned.time.head
    facts = plan.describe_head(automatic.needs, setting.machine)
    assert facts is not None
    assert facts["launches"] < 500
    assert automatic.time.head == max(facts["launch_seconds"], facts["device_seconds"])
    assert automatic.needs.footprint.peak_is_in == "head"
    assert 5000 * 2**20 < automatic.needs.footprint.head < GPUS["h100"].memory_gib * 2**30 / 8


def test_collectives_cost_nothing_alone_and_hide_behind_backward():
    planned = needs_of(small(), world_size=8)
    a100, links = GPUS["a100"], Links()
    assert collective_seconds(planned, a100, links, 1, 0.0, 1) == 0
    exposed = collective_seconds(planned, a100, links, 8, 0.0, 1)
    hidden = collective_seconds(planned, a100, links, 8, 10.0, 1)
    rate = SHARE_OF_PEAK["cuda"]["links"] * 300e9
    assert hidden == pytest.approx(7 / 8 * 64 * (2 * 4 * 64 + 8) / rate)
    all_reduce = 2 * 7 / 8 * planned.trainable_bytes / rate
    assert exposed == pytest.approx(hidden + all_reduce)
    some = all_reduce / BACKWARD_SHARE / 2
    assert collective_seconds(planned, a100, links, 8, some, 1) == pytest.approx(
        hidden + all_reduce / 2
    )
    between = Links(ranks_per_host=4, network_gbit=80)
    assert between.bytes_per_second(a100, 8) == pytest.approx(0.7 * 10e9)


def test_published_scaling_from_8_to_16_gpus_is_near():
    """Published with 512 images per GPU: 5,900 and 11,000 images per second, a ratio of 1.86."""
    speeds = []
    for world_size, config in ((8, "8gpus_r50_bs4k"), (16, "16gpus_r50_bs8k")):
        cfg = plan.load_config(f"configs/wf42m_pfc02_{config}")
        setting = plan.Setting(GPUS["v100"], world_size, Links(), 2_059_906, 42_474_557)
        speeds.append(plan.make_plan(cfg, setting).samples_per_second)
    assert speeds[0] == pytest.approx(5_900, rel=0.3)
    assert 1.8 < speeds[1] / speeds[0] < 2.01


# --- the command -----------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert plan.main(["configs/lfw_nano", *WORDS, "val_targets=[]", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_json_says_what_the_table_says(capsys):
    found = run(capsys, "--gpu", "h100", "--world-size", "4", "num_epoch=3")
    memory, time = found["memory"], found["time"]
    assert memory["fits"] is True
    assert found["changes"] == []
    assert memory["total"] == sum(memory[part] for part in plan.PART_WORDS)
    assert memory["total"] < memory["room"] < 80 * 2**30
    parts = ("backbone", "head", "optimizer", "collectives")
    assert time["total"] == pytest.approx(sum(time[part] for part in parts))
    assert found["global_batch"] == 32
    assert found["total_steps"] == 3 * (4096 // 32)
    assert found["samples_per_second"] == pytest.approx(32 / time["total"])
    assert found["hours"] == pytest.approx(found["total_steps"] * time["total"] / 3600)
    assert (
        plan.main(
            ["configs/lfw_nano", *WORDS, "val_targets=[]", "--gpu", "h100", "--world-size", "4"]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert "4 x h100, bf16, global batch 32 = 8 x 4 ranks x 1 micro-steps" in text
    assert f"{memory['total'] / 2**20:,.0f}" in text
    assert "fits: room for" in text
    assert "from the peaks; assumed: 40% of products" in text


def teacher_file(folder: Path, network: str) -> str:
    path = folder / f"{network}.pt"
    sizes: dict[str, Any] = {"num_features": 64, "input_size": 32}
    save_model(path, get_model(network, **sizes), ModelMetadata(network, **sizes))
    return str(path)


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return teacher_file(tmp_path, "mbf")


def test_a_teacher_takes_its_weights_and_a_forward_pass_without_a_graph(teacher):
    network = get_model("mbf", num_features=64, input_size=32)
    weights = sum(t.numel() * t.itemsize for t in network.state_dict().values())
    alone, taught = needs_of(small()), needs_of(small(teacher=teacher))
    work = taught.teacher
    assert alone.teacher is None
    assert work is not None
    assert work.kept_bytes == pytest.approx(weights, rel=0.01)
    assert 0 < work.peak_bytes < needs_of(small(network="mbf")).footprint.activations
    assert [op.name for op in work.forward if "backward" in op.name] == []
    assert taught.footprint.total - alone.footprint.total >= work.kept_bytes

    logits = needs_of(small(teacher=teacher, distillation="logits"), world_size=3)
    assert logits.teacher is not None
    assert logits.teacher.kept_bytes - work.kept_bytes == 100 * (64 * 4 + 1)


def test_a_teacher_may_be_where_most_memory_is_needed(tmp_path):
    sizes: dict[str, Any] = {"batch_size": 64, "gradient_checkpointing": True}
    needs = needs_of(small(teacher=teacher_file(tmp_path, "r18"), **sizes))
    assert needs.teacher is not None
    found = needs.footprint
    assert found.peak_is_in == "teacher"
    assert found.teacher == needs.teacher.kept_bytes + needs.teacher.peak_bytes
    assert found.activations == needs.backbone.saved_bytes
    assert found.global_batch == 0


@pytest.mark.parametrize("kind", ["cosine", "logits"])
def test_a_teacher_takes_time_by_the_peaks_and_by_measuring(capsys, teacher, kind):
    words = (f"teacher={teacher}", f"distillation={kind}")
    assert run(capsys)["time"]["teacher"] == 0
    planned = run(capsys, *words, "--gpu", "h100")["time"]
    forward = run(capsys, f"teacher={teacher}", "--gpu", "h100")["time"]["teacher"]
    assert (planned["teacher"] > forward) == (kind == "logits")
    measured = run(capsys, *words, "--gpu", "cpu", "--measure", "0.1")["time"]
    for time in (planned, measured):
        assert time["teacher"] > 0
        parts = ("backbone", "head", "teacher", "optimizer", "collectives")
        assert time["total"] == pytest.approx(sum(time[part] for part in parts))


def test_frozen_epochs_take_a_forward_pass_and_the_head(capsys):
    whole = run(capsys, "num_epoch=4", "--gpu", "v100")
    found = run(capsys, "num_epoch=4", "freeze_epoch=1", "--gpu", "v100")
    assert (whole["frozen_steps"], found["frozen_steps"]) == (0, found["steps_per_epoch"])
    frozen, step = found["frozen_seconds_per_step"], found["time"]["total"]
    time = found["time"]
    assert time["head"] < frozen < time["head"] + 0.6 * time["backbone"] < step
    assert found["hours"] == pytest.approx(whole["hours"] * (0.75 + 0.25 * frozen / step))
    assert run(capsys, "freeze_epoch=2", "num_epoch=4", "max_steps=3")["frozen_steps"] == 3


def test_a_teacher_that_is_not_there_or_does_not_fit_is_one_line(capsys, teacher):
    for words, said in (
        (("teacher=work_dirs/none",), "work_dirs/none"),
        ((f"teacher={teacher}", "embedding_size=32"), "set embedding_size=64"),
    ):
        assert plan.main(["configs/lfw_nano", *WORDS, "val_targets=[]", *words]) == 2
        assert said in capsys.readouterr().err


def test_what_does_not_fit_comes_with_changes_worked_out_anew(capsys):
    words = ["num_classes=40_000_000", "embedding_size=512", "--gpu", "v100"]
    words.append("head_workspace_mib=256")
    found = run(capsys, *words)
    assert found["memory"]["fits"] is False
    changes = {one["words"]: one for one in found["changes"]}
    assert changes["head_offload=True sample_rate=0.1"]["fits"] is True
    halved = changes["head_weight_dtype=bf16 head_state_dtype=bf16"]
    assert halved["total"] == pytest.approx(found["memory"]["total"] / 2, rel=0.02)
    assert not halved["fits"]
    again = run(capsys, *words, "head_offload=True", "sample_rate=0.1")
    assert again["memory"]["total"] == changes["head_offload=True sample_rate=0.1"]["total"]
    assert again["memory"]["on_host"] > 150 * 2**30


def test_as_many_changes_together_as_are_needed_where_one_is_not_enough(monkeypatch):
    def sized(cfg, setting):
        total = 100 - 20 * cfg.gradient_checkpointing - 15 * (cfg.head_workspace_mib == 64)
        total -= 10 * (cfg.head_weight_dtype == "bf16") + 5 * (setting.world_size == 2)
        return SimpleNamespace(
            needs=SimpleNamespace(footprint=SimpleNamespace(total=total)), fits=total <= limit
        )

    monkeypatch.setattr("training.planner.plan.make_plan", sized)
    cfg = small(head_workspace_mib=256)
    setting = plan.Setting(GPUS["v100"], 1, Links(), 300, 4096)
    limit = 60
    found = [(words, one.needs.footprint.total) for words, one in plan.what_would_fit(cfg, setting)]
    dtypes = "head_weight_dtype=bf16 head_state_dtype=bf16"
    assert found == [
        ("gradient_checkpointing=True", 80),
        ("head_workspace_mib=64", 85),
        (dtypes, 90),
        ("--world-size 2", 95),
        (f"gradient_checkpointing=True head_workspace_mib=64 {dtypes}", 55),
    ]
    limit = 65
    assert plan.what_would_fit(cfg, setting)[-1][0].split() == [
        "gradient_checkpointing=True",
        "head_workspace_mib=64",
    ]
    limit = 80  # one is enough
    assert [words for words, _ in plan.what_would_fit(cfg, setting)][-1] == "--world-size 2"


@pytest.mark.parametrize("more", [(), ("gradient_acc=2", "loss=adaface")])
def test_measured_time_is_of_the_runs_own_parts(capsys, more):
    found = run(capsys, "--measure", "0.1", "--gpu", "cpu", *more)
    time = found["time"]
    assert time["is_measured"] is True
    assert found["assumed"] is None
    assert time["head"] > 0
    assert time["collectives"] == 0
    assert found["samples_per_second"] == pytest.approx(found["global_batch"] / time["total"])


def test_measured_for_several_ranks_the_head_meets_the_global_batch(capsys, monkeypatch):
    seen = []
    real = PartialFC.forward

    def forward(self, embeddings, labels, learning_rate=None):
        seen.append((len(embeddings), self.num_classes))
        return real(self, embeddings, labels, learning_rate)

    monkeypatch.setattr(PartialFC, "forward", forward)
    found = run(capsys, "--measure", "0.1", "--world-size", "3")
    assert set(seen) == {(8, 100), (24, 100)}
    assert found["time"]["collectives"] > 0
    assert found["global_batch"] == 24


def test_numbers_of_the_set_are_looked_up_where_the_config_says_auto(tmp_path, capsys):
    import cv2
    import numpy as np

    for person in range(3):
        (tmp_path / f"p{person}").mkdir()
        for number in range(4):
            path = tmp_path / f"p{person}" / f"{number}.png"
            cv2.imwrite(str(path), np.zeros((32, 32, 3), np.uint8))
    found = run(capsys, f"rec={tmp_path}", "num_classes=auto", "num_image=auto", "--gpu", "a100")
    assert (found["num_classes"], found["num_images"]) == (3, 12)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--gpu", "v100", "precision=bf16"], "a v100 has none; precision=fp16 or fp32"),
        (["--gpu", "h1000"], "--gpu h1000: known are h200, h100"),
        (["--gpu", "h100", "--world-size", "600"], "less than one global batch of 4800"),
        (["--world-size", "0"], "--world-size 0: above 0"),
        (["--gpu", "h100", "network=r51"], "there is no backbone 'r51'"),
        (["--gpu", "h100", "batch_siz=3"], "did you mean batch_size"),
        (
            ["--gpu", "h100", "head_workspace_mib=1", "embedding_size=400000"],
            "head_workspace_mib must",
        ),
        (["--measure", "-1"], "--measure -1.0: seconds"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_exit_code_2(words, error, capsys):
    if torch.cuda.is_available() and "--measure" in words:
        pytest.skip("about machines without a GPU")
    assert plan.main(["configs/lfw_nano", *WORDS, "val_targets=[]", *words]) == 2
    assert error in capsys.readouterr().err


def test_the_gpu_that_is_here_has_its_own_memory(monkeypatch):
    here = SimpleNamespace(name="NVIDIA A100-SXM4-40GB", total_memory=40 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: here)
    found = plan.choose_machine(None)
    assert (found.name, found.memory_gib) == ("a100", 40)
    here.name = "Another GPU"
    with pytest.raises(UserError, match=r"Another GPU.*--gpu"):
        plan.choose_machine(None)


def test_measuring_a_gpu_that_is_not_here_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("about machines without a GPU")
    arguments = ["configs/lfw_nano", *WORDS, "val_targets=[]", "--measure", "--gpu", "h100"]
    assert plan.main(arguments) == 2
    assert "this machine is a cpu; leave --gpu out" in capsys.readouterr().err
