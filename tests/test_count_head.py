"""What a step of the head costs on a GPU, by counting: launches, bytes, products."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from arcshard.head import fused
from arcshard.head.row_optimizer import AdamWRows, RowOptimizer, SGDRows
from arcshard.head.workspace import AUTO_MIB, MOST_WORK_BYTES, choose_workspace, memory_bytes_of
from arcshard.losses import AdaFace, ArcFace, CosFace, CurricularFace, ElasticFace, MagFace
from arcshard.partial_fc import PartialFC
from benchmarks import bench_head
from benchmarks.count_head import Peaks, count, limit_seconds
from training.checkpoint import resume
from training.planner.head_step import MOST_BLOCKS, count_head_step, trace_head_step
from training.planner.trace import OperationLog

GIB = 2**30
EIGHTY_GB = choose_workspace("auto", "cuda", int(79.6 * GIB)).budget_bytes / 2**20


@pytest.mark.parametrize(
    ("classes", "workspace_mib", "optimizer", "launches", "gigabytes"),
    [
        (2_000_000, 256, "sgd", 6_500, 127),
        (2_000_000, EIGHTY_GB, "sgd", 400, 91),
        (2_000_000, EIGHTY_GB, "adamw", 1_200, 165),
        (250_000, EIGHTY_GB, "sgd", 170, 12),
    ],
)
def test_a_step_starts_and_moves_no_more_than_was_counted(
    classes, workspace_mib, optimizer, launches, gigabytes
):
    row = count(classes, 1024, 1.0, workspace_mib, optimizer, kernels="torch")
    assert row["launches"] <= launches
    assert row["gigabytes"] <= gigabytes
    assert row["launches_around"] <= 80
    assert row["products"] == pytest.approx(4 - row["kept_share"], abs=0.01)
    assert (row["kept_share"] == 1) == (workspace_mib == EIGHTY_GB)


def test_a_step_with_bf16_products_makes_only_the_passes_that_it_needs():
    """Passes over the centers [C, D] and over the logits [B, C], in bytes of a number."""
    row = count(2_000_000, 1024, 1.0, EIGHTY_GB, kernels="torch")
    # Forward: norms (4), the operand (4 + 2), its product (2). Backward: the operand (4 + 2), two
    # products (2 + 4), the projection (4 + 4 + 4), SGD (5 x 4).
    of_centers = 4 + 6 + 2 + 6 + 6 + 12 + 20
    # The product (4), the numerators (4 + 2), their sums (2), two products (2 + 2).
    of_logits = 4 + 6 + 2 + 4
    moved = 2_000_000 * (512 * of_centers + 1024 * of_logits) / 1e9
    assert row["gigabytes_moved"] == pytest.approx(moved, rel=0.01)
    assert row["kinds"]["optimizer"]["gigabytes_moved"] == pytest.approx(5 * 4.096, rel=0.001)


def test_one_more_pass_over_the_logits_is_found(monkeypatch):
    before = count(2_000_000, 1024, 1.0, 4096, kernels="torch")
    real = fused.exponentials_of_small_logits

    def slower(z, *arguments):
        return real(z.mul_(1.0), *arguments)

    monkeypatch.setattr(fused, "exponentials_of_small_logits", slower)
    after = count(2_000_000, 1024, 1.0, 4096, kernels="torch")
    assert before["kept_share"] < 1
    visits = before["blocks"] * (2 - before["kept_share"])
    assert after["launches"] - before["launches"] == round(visits)
    moved = 2 * 4 * 1024 * 2_000_000 * (2 - before["kept_share"]) / 1e9
    assert after["gigabytes_moved"] - before["gigabytes_moved"] == pytest.approx(moved, rel=0.01)


@pytest.mark.parametrize(
    ("workspace_mib", "rate", "rule", "options"),
    [
        (1.0, 1.0, SGDRows, {}),  # nearly nothing is kept
        (3.0, 1.0, SGDRows, {"half": torch.bfloat16}),
        (3.3, 0.5, AdamWRows, {}),  # all is kept, and some of the copies
        (2.0, 0.5, SGDRows, {"centers_per_class": 2}),
        (1.8, 1.0, AdamWRows, {"dtype": torch.bfloat16}),
    ],
)
def test_a_step_of_many_blocks_is_counted_from_a_few(workspace_mib, rate, rule, options):
    passes, is_deferred = (2, True) if rule is SGDRows and rate == 1.0 else (1, False)

    def make(classes: int) -> PartialFC:
        return PartialFC(
            ArcFace(),
            64,
            classes,
            rate,
            row_optimizer=rule(),
            batch_size_per_rank=32,
            device="meta",
            workspace_mib=workspace_mib,
            **options,
        )

    def trace(head: PartialFC):
        return trace_head_step(head, passes, is_deferred)

    plan = make(20_000).planned_blocks()
    assert len(plan.blocks()) > MOST_BLOCKS
    counted, exact = count_head_step(make, 20_000, trace), trace(make(20_000))
    assert counted.launches == len(exact)
    last = 1 / len(plan.blocks())  # the last block may be smaller
    assert counted.flops == pytest.approx(sum(op.flops for op in exact), rel=last)
    assert counted.bytes_moved == pytest.approx(sum(op.bytes_moved for op in exact), rel=last)


@pytest.mark.parametrize(
    ("rate", "batch", "workspace_mib"),
    [(0.1, 2048, 2), (0.1, 512, 1), (0.02, 2048, 2), (0.0, 2048, 2)],
)
def test_blocks_of_a_sample_that_the_batch_makes_large_are_counted_one_by_one(
    rate, batch, workspace_mib
):
    """A few blocks have fewer classes than the batch has rows: no smaller head has so few."""

    def make(classes: int) -> PartialFC:
        return PartialFC(
            ArcFace(),
            64,
            classes,
            rate,
            row_optimizer=SGDRows(),
            batch_size_per_rank=batch,
            device="meta",
            workspace_mib=workspace_mib,
        )

    assert len(make(40_000).planned_blocks().blocks()) > MOST_BLOCKS
    counted = count_head_step(make, 40_000, trace_head_step)
    assert counted.launches == len(trace_head_step(make(40_000)))


@pytest.mark.parametrize(
    "margin",
    [
        AdaFace(),
        CurricularFace(),
        ElasticFace(),
        MagFace(),
        CosFace(interclass_filtering_threshold=0.2),
    ],
    ids=lambda margin: type(margin).__name__,
)
@pytest.mark.parametrize("rate", [1.0, 0.1, 0.001])  # the last: fewer classes than the batch
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_every_loss_can_be_counted(margin, rate, kernels):
    rule: RowOptimizer = SGDRows()
    head = PartialFC(
        margin,
        64,
        1000,
        rate,
        row_optimizer=rule,
        batch_size_per_rank=32,
        device="meta",
        half=torch.bfloat16,
        kernels=kernels,
    )
    operations = trace_head_step(head)
    assert {op.dtype for op in operations if op.flops > 2 * 32 * 64} == {torch.bfloat16}
    names = [op.name for op in operations]
    logits = "arcshard::softmax_numerators"
    has_kernel = kernels == "triton" and not margin.touches_others
    assert names.count(logits) == has_kernel
    assert names.count("mm") == 4 - has_kernel  # the last is of the batch's mean cosine
    assert ("arcshard::update_rows_" if kernels == "triton" else "_fused_sgd_") in names
    assert not {"view", "t", "empty", "slice", "detach", "expand"} & set(names)


@pytest.mark.parametrize("rate", [0.0, 0.0001])
def test_a_sample_smaller_than_the_batch_is_counted_as_large_as_the_batch_makes_it(rate):
    row = count(200_000, 256, rate, 256)
    assert (row["blocks"], row["rows_per_block"], row["products"]) == (1, 256, 3)


def test_places_that_are_picked_are_counted_and_not_the_whole_matrix():
    matrix = torch.empty(1000, 64, device="meta")
    index = torch.empty(10, dtype=torch.int64, device="meta")
    rows = torch.empty(10, 64, device="meta")
    with OperationLog() as log:
        matrix.index_select(0, index)
        matrix[index]
        matrix.index_copy_(0, index, rows)
        matrix.index_add_(0, index, rows)
        matrix.new_zeros(3)
        rows.copy_(rows)
        rows.mul_(2)
    picked = 2 * 10 * 64 * 4 + 10 * 8
    assert [op.bytes_moved for op in log.operations] == [
        picked,
        picked,
        picked + 10 * 64 * 4,
        picked + 10 * 64 * 4,
        12,
        2 * 10 * 64 * 4,
        2 * 10 * 64 * 4,
    ]


# --- the workspace ---------------------------------------------------------------------------


def test_the_automatic_workspace_is_a_share_of_a_gpus_memory_and_256_mib_elsewhere():
    gpu = choose_workspace("auto", "cuda", 80 * GIB)
    assert (gpu.budget_bytes, gpu.work_bytes) == (10 * GIB, MOST_WORK_BYTES)
    small = choose_workspace("auto", "cuda", 8 * GIB)
    assert (small.budget_bytes, small.work_bytes) == (GIB, GIB // 2)
    assert choose_workspace("auto", "cpu", 80 * GIB).budget_bytes == AUTO_MIB * 2**20
    assert choose_workspace("auto", "xpu").budget_bytes == AUTO_MIB * 2**20
    assert choose_workspace(1024, "cuda", GIB).budget_bytes == GIB
    too_much = choose_workspace(2048, "cuda", GIB)
    assert too_much.budget_bytes == GIB // 8
    assert too_much.note == "2,048 MiB were asked for, the device has 1,024: automatic"
    assert choose_workspace(256, "cpu").work_bytes == 16 * 2**20
    assert memory_bytes_of(torch.device("cpu")) is None


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_the_log_says_how_large_the_workspace_is_and_what_is_kept(rate):
    def words(workspace_mib: float) -> str:
        head = PartialFC(
            ArcFace(),
            64,
            40_000,
            rate,
            row_optimizer=SGDRows(),
            batch_size_per_rank=32,
            workspace_mib=workspace_mib,
        )
        return head.describe_memory()

    rows = round(40_000 * rate)
    assert f"numerators of {rows:,} of {rows:,} centers kept" in words(64)
    assert f"numerators of 300 of {rows:,} centers kept" in words(0.04)
    assert "of at most 64 MiB" in words(64)


def test_a_sampled_head_refuses_a_workspace_without_room_for_a_class_when_it_is_made():
    with pytest.raises(ValueError, match="head_workspace_mib must be at least 2"):
        PartialFC(
            ArcFace(),
            100_000,
            10,
            0.5,
            row_optimizer=SGDRows(),
            batch_size_per_rank=8,
            workspace_mib=1,
        )
    for wrong in ("automatic", 0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"workspace_mib=.*MiB above 0, or 'auto'"):
            PartialFC(ArcFace(), 8, 10, row_optimizer=SGDRows(), workspace_mib=wrong)


def test_a_checkpoint_with_the_old_spelling_resumes_without_a_word(caplog):
    facts: dict[str, Any] = {"data": {}, "data set": "the same"}
    saved = {
        "head_buffer_mib": 256,
        "head_device": "cpu",
        "zero": True,
        "sub_centres": 2,
        "loss": "subcentre_arcface",
        "all_reduce_dtype": "fp16",
    }
    now = {
        "head_workspace_mib": "auto",
        "head_offload": True,
        "zero_stage": 1,
        "sub_centers": 2,
        "loss": "subcenter_arcface",
        "grad_reduce_dtype": "fp16",
    }
    resume.check({"config": saved, **facts}, {"config": now, **facts})
    assert caplog.text == ""
    other = {**now, "head_workspace_mib": 256}
    assert resume.config_sha256(other) == resume.config_sha256(now)


# --- the command -----------------------------------------------------------------------------


def test_the_limit_is_three_products_and_the_bytes_that_must_move():
    """C = 2M, B = 1024 at 798 TFLOP/s and 3.0 TB/s: 14.7 ms."""
    h100 = Peaks("h100", 798e12, 3.0e12)
    assert limit_seconds(h100, 1024, 2_000_000) == pytest.approx(14.7e-3, rel=0.01)
    moved = 2_000_000 * 512 * 4 / 3.0e12  # one more average, read and written
    more = limit_seconds(h100, 1024, 2_000_000, "adamw") - limit_seconds(h100, 1024, 2_000_000)
    assert more == pytest.approx(2 * moved)


def test_the_command_writes_a_row_for_each_combination(tmp_path, capsys):
    path = tmp_path / "rows.json"
    words = ["--count", "--classes", "1000", "2000", "--batch", "8", "--rate", "1", "0.5"]
    words += ["--optimizer", "adamw", "--matmul-tflops", "798", "--copy-gigabytes", "3000"]
    assert bench_head.main([*words, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [(r["params"]["num_classes"], r["params"]["sample_rate"]) for r in rows] == [
        (1000, 1.0),
        (1000, 0.5),
        (2000, 1.0),
        (2000, 0.5),
    ]
    for row in rows:
        assert row["launches"] > 50
        assert row["gigabytes"] > 0
        assert row["products"] == 3
        kinds = row["kinds"].values()
        assert sum(kind["launches"] for kind in kinds) == row["launches"]
        moved = sum(kind["gigabytes_moved"] for kind in kinds)
        assert moved == pytest.approx(row["gigabytes_moved"])
        assert set(row["predicted"]) == {"h100", "h200", "a100", "as given"}
        for one in row["predicted"].values():
            assert one["step_ms"] == max(one["host_ms"], one["device_ms"]) > one["limit_ms"]
    said = capsys.readouterr().out
    assert "Times are predicted, not measured" in said
    assert "loop over the classes" in said


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--matmul-tflops", "798"], "both, above 0, or neither"),
        (["--matmul-tflops", "-1", "--copy-gigabytes", "3000"], "both, above 0, or neither"),
        (["--rate", "1.5"], "sample_rate=1.5"),
        (["--classes", "0"], "at least 1 each"),
        (["--workspace-mib", "0.001"], "head_workspace_mib must be at least 1"),
        (["--workspace-mib", "inf"], "--memory-gib and --workspace-mib: above 0"),
        (["--memory-gib", "nan"], "--memory-gib and --workspace-mib: above 0"),
        (["--json", "/nonexistent/rows.json"], "No such file or directory"),
        (["--head", "dense", "--quick"], "--count with --quick, --head: leave them out"),
    ],
)
def test_what_cannot_be_counted_is_one_line(words, error, capsys):
    assert bench_head.main(["--count", "--classes", "100", "--batch", "8", *words]) == 2
    said = capsys.readouterr().err
    assert error in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
