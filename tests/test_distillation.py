"""Distillation: equal to its dense twin on any number of ranks, and a teacher that is felt."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from arcshard.head.centers import ClassCenters
from arcshard.head.distillation import DistillationInputs, TeacherCenters, sharded_divergence
from arcshard.partial_fc import PartialFC
from arcshard.shard import class_range
from backbones import get_model
from backbones.weights import WeightsError, load_model
from configs.base import Config, default_of
from tests.conftest import Ranks
from tests.record_helpers import (
    FACES,
    NEW,
    OLD,
    write_faces,
    write_records,
)
from tests.reference import dense_divergence
from tests.run_helpers import (
    CHECKPOINTED_RUN,
    EXACT,
    assert_same,
    copy_of_run,
    weights_after_one_step,
    whole_run,
)
from train_v2 import run_on
from training.build import build
from training.checkpoint.checkpointer import CheckpointError
from training.distillation import Teacher
from utils.distributed import DistContext
from utils.errors import UserError

CLASSES, WIDTH, TEACHERS_WIDTH, SCALE, TEMPERATURE = 23, 7, 5, 16.0, 3.0
ROWS = (3, 0, 4, 1)  # of each rank


def example(k: int, k_teacher: int) -> dict[str, Tensor]:
    """Both sides of everything, float64; every third class is not the teacher's."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sampled = torch.rand(CLASSES, generator=generator) < 0.5
    sampled[:8] = False  # all that the first of three ranks has
    return {
        "embeddings": draw(sum(ROWS), WIDTH),
        "taught": draw(sum(ROWS), TEACHERS_WIDTH),
        "weight": draw(CLASSES, k, WIDTH),
        "teacher": draw(CLASSES, k_teacher, TEACHERS_WIDTH),
        "known": torch.arange(CLASSES) % 3 > 0,
        "sampled": sampled,
    }


CASES = ((1, 1, False, 1), (1, 2, True, 10**6), (3, 1, True, 4000), (2, 2, False, 6000))
"""Centers per class of student and teacher, sampled or not, bytes for a block."""


def divergences_here(rank: int, world_size: int) -> list[tuple[float, Tensor]]:
    return [divergence_here(rank, world_size, *case) for case in CASES]


def divergence_here(
    rank: int, world_size: int, k: int, k_teacher: int, is_sampled: bool, budget: int
) -> tuple[float, Tensor]:
    """Loss, and gradient of this rank's embeddings."""
    given = example(k, k_teacher)
    mine = class_range(CLASSES, rank, world_size)
    here = slice(mine.start, mine.stop)
    counts = [*ROWS[: world_size - 1], sum(ROWS) - sum(ROWS[: world_size - 1])]
    local = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    embeddings = given["embeddings"][local].requires_grad_(True)
    rows, classes = None, None
    if is_sampled:
        classes = given["sampled"][here].nonzero().squeeze(1)
        rows = (classes[:, None] * k + torch.arange(k)).view(-1)
    unit = normalize(given["teacher"][here], dim=2) * given["known"][here, None, None]
    sides = DistillationInputs(
        ClassCenters(given["weight"][here].reshape(-1, WIDTH), None, rows=rows),
        k,
        classes,
        TeacherCenters(unit, given["known"][here]),
        SCALE,
        TEMPERATURE,
        max(counts),
        dist.group.WORLD if world_size > 1 else None,
        budget,
    )
    loss = sharded_divergence(normalize(embeddings), normalize(given["taught"][local]), sides)
    (2 * loss).backward()
    assert embeddings.grad is not None
    return loss.item(), embeddings.grad / 2


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_logits_equal_the_dense_twin_loss_and_gradient(ranks: Ranks, world_size: int) -> None:
    found = ranks.run(world_size, divergences_here)
    for number, (k, k_teacher, is_sampled, _) in enumerate(CASES):
        given = example(k, k_teacher)
        counted = given["known"] & given["sampled"] if is_sampled else given["known"]
        embeddings = given["embeddings"].requires_grad_(True)
        expected = dense_divergence(
            embeddings,
            given["taught"],
            given["weight"][counted],
            given["teacher"][counted],
            SCALE,
            TEMPERATURE,
        )
        (gradient,) = torch.autograd.grad(expected, embeddings)
        assert gradient.abs().max() > 1e-3
        parts = [each[number] for each in found]
        for loss, _ in parts:
            assert loss == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(
            torch.cat([part for _, part in parts]), gradient, rtol=0, atol=1e-13
        )


def test_a_step_whose_classes_the_teacher_does_not_know_teaches_nothing() -> None:
    embeddings = torch.randn(3, 4, requires_grad=True)
    centers = ClassCenters(torch.randn(5, 4), None)
    teacher = TeacherCenters(torch.zeros(5, 1, 6), torch.zeros(5, dtype=torch.bool))
    sides = DistillationInputs(centers, 1, None, teacher, SCALE, TEMPERATURE, 3, None, 10**6)
    loss = sharded_divergence(normalize(embeddings), torch.randn(3, 6), sides)
    loss.backward()
    assert loss.item() == 0
    assert embeddings.grad is not None
    assert not embeddings.grad.any()


@pytest.fixture(scope="module")
def teacher(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank over OLD, wider than its students, with two centers per class."""
    folder = tmp_path_factory.mktemp("teacher")
    changes = {
        **FACES,
        "rec": str(write_records(folder / "data", OLD)),
        "max_steps": 6,
        "sub_centers": 2,
    }
    ranks.run(1, whole_run, str(folder / "run"), changes)
    return folder / "run"


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The students' people, four of whom the teacher knows."""
    return write_faces(tmp_path_factory.mktemp("students") / "data", NEW, images=6)


def student(teacher: Path, faces: Path, kind: str, **changes: Any) -> dict[str, Any]:
    """Settings of a student's run; logits with another embedding size than the teacher's."""
    return {
        **FACES,
        "rec": str(faces),
        "teacher": str(teacher),
        "distillation": kind,
        "embedding_size": 16 if kind == "cosine" else 8,
        "max_steps": 5,
        "num_epoch": 3,
        "keep_checkpoints": 0,
        "seed": 3,
        **changes,
    }


def metrics(folder: Path, key: str) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record[key] for record in map(json.loads, lines) if key in record]


@pytest.mark.parametrize("kind", ["cosine", "logits"])
def test_both_losses_do_not_depend_on_the_number_of_ranks(
    ranks: Ranks, tmp_path: Path, teacher: Path, faces: Path, kind: str
) -> None:
    changes = student(teacher, faces, kind, **EXACT)
    for world_size in (1, 2, 3):
        ranks.run(world_size, whole_run, str(tmp_path / str(world_size)), changes)
    for key in ("loss", "distillation_loss"):
        alone = metrics(tmp_path / "1", key)
        assert len(alone) == 5
        assert alone[0] != alone[-1]
        for world_size in (2, 3):
            others = metrics(tmp_path / str(world_size), key)
            np.testing.assert_allclose(others, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["cosine", "logits"])
@pytest.mark.parametrize("loss", ["cosface", "adaface"])  # the second embeds ahead
def test_accumulated_steps_with_a_teacher_equal_the_big_batch(
    ranks: Ranks, tmp_path: Path, teacher: Path, faces: Path, kind: str, loss: str
) -> None:
    options = student(teacher, faces, kind, loss=loss, precision="fp64", sample_rate=0.6)
    del options["max_steps"]
    options["margin_list"] = default_of("margin_list")
    big = ranks.run(2, weights_after_one_step, str(tmp_path), {**options, "batch_size": 6})
    small = ranks.run(
        2, weights_after_one_step, str(tmp_path), {**options, "batch_size": 2, "gradient_acc": 3}
    )
    for (weights, head, calls), (expected, expected_head, expected_calls) in zip(
        small, big, strict=True
    ):
        for key, value in weights.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-9)
        torch.testing.assert_close(head, expected_head, rtol=0, atol=1e-9)
        assert kind == "cosine" or calls == expected_calls


def one_step(settings: dict[str, Any], spoil: bool = False) -> tuple[Any, dict[str, Tensor], Any]:
    """(outcome, backbone, head with its state) after a step in this process."""
    cfg = Config(**{**CHECKPOINTED_RUN, "output": "unused", **settings})
    assert not cfg.problems()
    parts = build(cfg, DistContext(0, 0, 1, torch.device("cpu")))
    parts.step.model.train()
    if spoil:
        distillation: Any = parts.step.distillation
        distillation.teacher = lambda images: torch.full((len(images), 16), torch.nan)
    outcome = parts.step([next(iter(parts.loader))], 0.1)
    assert isinstance(parts.head, PartialFC)
    rule = dict(parts.head.optimized_parameters())[parts.head.weight]
    head = [parts.head.weight.detach().clone(), *rule.state(parts.head.weight).values()]
    return outcome, {k: v.clone() for k, v in parts.backbone.state_dict().items()}, head


@pytest.mark.parametrize("kind", ["cosine", "logits"])
def test_the_class_centers_learn_from_the_labels_alone_and_the_backbone_from_both(
    teacher: Path, faces: Path, kind: str, one_thread: None
) -> None:
    settings = student(teacher, faces, kind)
    outcome, backbone, head = one_step(settings)
    alone, backbone_alone, head_alone = one_step({**settings, "teacher": None})
    assert torch.equal(outcome.loss, alone.loss)
    assert float(outcome.distillation) > 0
    assert alone.distillation is None
    for part, expected in zip(head, head_alone, strict=True):
        assert torch.equal(part, expected)
    assert any(not torch.equal(backbone[key], backbone_alone[key]) for key in backbone)


@pytest.mark.parametrize("kind", ["cosine", "logits"])
def test_a_teacher_that_is_not_finite_makes_a_bad_step_and_nothing_moves(
    teacher: Path, faces: Path, kind: str, one_thread: None
) -> None:
    settings = student(teacher, faces, kind)
    outcome, backbone, head = one_step(settings, spoil=True)
    assert bool(outcome.bad)
    _, before, head_before = one_step({**settings, "teacher": None, "lr": 0.0})
    fresh = build(
        Config(**{**CHECKPOINTED_RUN, "output": "unused", **settings}),
        DistContext(0, 0, 1, torch.device("cpu")),
    )
    for key, value in fresh.backbone.state_dict().items():
        assert torch.equal(backbone[key], value)
    assert torch.equal(head[0], fresh.head.weight)
    assert not head[1].any()
    assert head_before[1].any()  # a good step moves at least the momentum
    assert before.keys() == backbone.keys()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_weight_towards_zero_is_no_distillation(
    tmp_path: Path, teacher: Path, faces: Path, precision: str, one_thread: None
) -> None:
    settings = student(
        teacher,
        faces,
        "logits",
        distillation_weight=1e-30,
        precision=precision,
        max_steps=2,
        batch_size=4,
    )
    with_teacher = whole_run(0, 1, str(tmp_path / "with"), settings)
    without = whole_run(0, 1, str(tmp_path / "without"), {**settings, "teacher": None})
    assert_same([with_teacher], [without])
    assert not metrics(tmp_path / "without", "distillation_loss")
    assert all(np.isfinite(metrics(tmp_path / "with", "distillation_loss")))


def test_a_student_ends_nearer_to_its_teacher_than_without_it(
    tmp_path: Path, teacher: Path, faces: Path, one_thread: None
) -> None:
    images = torch.randint(
        0, 256, (32, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    pixels = (images.float() - 127.5) / 127.5
    cosines = {}
    for name, path in (("with", str(teacher)), ("without", None)):
        settings = student(
            teacher, faces, "cosine", max_steps=24, num_epoch=10, distillation_weight=20.0
        )
        whole_run(0, 1, str(tmp_path / name), {**settings, "teacher": path})
        with torch.no_grad():
            ours, theirs = (load_model(each)[0](pixels) for each in (tmp_path / name, teacher))
        cosines[name] = float(cosine_similarity(ours, theirs).mean())
    assert cosines["with"] > cosines["without"] + 0.2, cosines
    taught = metrics(tmp_path / "with", "distillation_loss")
    assert np.mean(taught[-3:]) < 0.7 * np.mean(taught[:3])


def test_logits_bring_the_student_to_the_teachers_probabilities(
    tmp_path: Path, teacher: Path, faces: Path, one_thread: None
) -> None:
    settings = student(
        teacher,
        faces,
        "logits",
        max_steps=24,
        num_epoch=10,
        distillation_weight=5.0,
        distillation_temperature=2.0,
    )
    whole_run(0, 1, str(tmp_path / "run"), settings)
    taught = metrics(tmp_path / "run", "distillation_loss")
    assert np.mean(taught[-3:]) < 0.7 * np.mean(taught[:3])


def test_a_resumed_student_is_the_uninterrupted_one_bit_for_bit(
    ranks: Ranks, tmp_path: Path, teacher: Path, faces: Path
) -> None:
    changes = student(
        teacher,
        faces,
        "logits",
        sample_rate=0.6,
        keep_checkpoints=9,
        max_steps=7,
        checkpoint_every=4,
    )
    left_alone = ranks.run(2, whole_run, str(tmp_path / "run"), changes)
    resumed = copy_of_run(tmp_path / "run", tmp_path / "resumed", 4)
    again = ranks.run(2, whole_run, str(resumed), {**changes, "resume": "auto"})
    assert_same(again, left_alone)
    state = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert set(state) == set(get_model("r_nano", num_features=8, input_size=32).state_dict())


def test_a_run_may_go_on_without_its_teacher_and_says_so(
    tmp_path: Path, teacher: Path, faces: Path, caplog: pytest.LogCaptureFixture, one_thread: None
) -> None:
    changes = student(teacher, faces, "cosine", keep_checkpoints=9, max_steps=2)
    whole_run(0, 1, str(tmp_path / "run"), changes)
    with caplog.at_level(logging.WARNING):
        whole_run(
            0,
            1,
            str(tmp_path / "run"),
            {**changes, "max_steps": 3, "teacher": None, "resume": "auto"},
        )
    assert "resuming with another teacher" in caplog.text


def test_the_frozen_teacher_is_left_alone(
    tmp_path: Path, teacher: Path, faces: Path, one_thread: None
) -> None:
    cfg = Config(
        **{**CHECKPOINTED_RUN, **student(teacher, faces, "logits"), "output": str(tmp_path)}
    )
    parts = run_on(cfg, DistContext(0, 0, 1, torch.device("cpu")), tmp_path)
    assert parts.step.distillation is not None
    frozen = parts.step.distillation.teacher
    assert isinstance(frozen, Teacher)
    model = frozen.model
    assert not model.training
    original, _ = load_model(teacher)
    for key, value in original.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[key], value)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"embedding_size": 8, "distillation": "cosine"},
            UserError,
            "embeddings of size 16, this run 8.*distillation=logits",
        ),
        ({"input_size": 48}, UserError, "32 pixels.*this run has 48 pixels"),
        ({"rec": "synthetic", "num_classes": 9, "num_image": 60}, UserError, "names none"),
        ({"teacher": "nowhere"}, FileNotFoundError, "nowhere"),
    ],
)
def test_what_does_not_fit_the_teacher_is_said(
    teacher: Path, faces: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    own = student(teacher, faces, "logits")
    settings = {**CHECKPOINTED_RUN, **own, "output": "unused", **changes}
    if changes.get("input_size") == 48:
        settings |= {"rec": "synthetic", "num_classes": 9, "num_image": 60}
    with pytest.raises(error, match=words):
        build(Config(**settings), DistContext(0, 0, 1, torch.device("cpu")))


def test_a_teacher_without_its_name_or_its_classes_is_refused(
    tmp_path: Path, teacher: Path, faces: Path
) -> None:
    def start(**changes: Any) -> None:
        own = student(teacher, faces, "logits")
        settings = {**CHECKPOINTED_RUN, **own, "output": "unused", **changes}
        build(Config(**settings), DistContext(0, 0, 1, torch.device("cpu")))

    nameless = tmp_path / "backbone.pth"
    torch.save(load_model(teacher)[0].state_dict(), nameless)
    with pytest.raises(WeightsError, match="has to say its network itself"):
        start(teacher=str(nameless))
    with pytest.raises(CheckpointError, match=r"no usable checkpoint there"):
        start(teacher=str(teacher / "model.pt"))
    strangers = write_faces(tmp_path / "strangers", ("x", "y", "z"))
    with pytest.raises(CheckpointError, match=r"knows no class of this run.*distillation=cosine"):
        start(rec=str(strangers))
    other = shutil.copytree(teacher, tmp_path / "other")
    (other / "label_map.txt").write_text("0\tcarl\n1\tcarl\n")
    with pytest.raises(UserError, match="'carl' stands for classes 0 and 1"):
        start(teacher=str(other))


def test_what_distillation_is_not_for_is_refused_by_the_config() -> None:
    settings = {**CHECKPOINTED_RUN, "teacher": "RUN"}
    both = Config(**{**settings, "distillation": "logits", "loss": "softmax"}).problems()
    assert any('distillation="logits" compares cosines' in problem for problem in both)
    forgotten = Config(**{**CHECKPOINTED_RUN, "distillation": "logits"})
    assert forgotten.unused() == ["distillation='logits' is not used: there is no teacher"]
    task = {"task": "classification", "loss": "softmax"}
    assert any("teacher='RUN'" in problem for problem in Config(**{**settings, **task}).problems())
