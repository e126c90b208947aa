"""The loop: the same run on any number of ranks, accumulation, bad steps, files, exit codes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from backbones import get_model
from backbones.weights import ModelMetadata, load_model, save_model
from configs.base import LOSSES, Config
from tests.run_helpers import (
    TINY_RUN,
    losses_on,
    read_metrics,
    run_training,
    weights_after_one_step,
    write_pairs,
)
from train_v2 import run_on, training_batches
from training.build import build
from training.precision import batch_norms
from training.state import Progress
from utils.distributed import DistContext
from utils.errors import UserError
from utils.meter import SpeedMeter


def test_losses_do_not_depend_on_the_number_of_ranks_in_float64(ranks, tmp_path):
    changes = {"num_image": 120, "max_steps": 15}  # one epoch and a half
    exact = {"precision": "fp64", "freeze_batch_norm": True, **changes}
    alone = losses_on(ranks, 1, tmp_path, **exact)
    assert len(alone) == 15
    assert alone[-1] != alone[0]
    for world_size in (2, 3):
        np.testing.assert_allclose(
            losses_on(ranks, world_size, tmp_path, **exact), alone, rtol=0, atol=1e-8
        )


def test_first_losses_do_not_depend_on_the_number_of_ranks_in_float32(ranks, tmp_path):
    changes = {"freeze_batch_norm": True, "max_steps": 5, "warmup_epoch": 0.5}
    alone = losses_on(ranks, 1, tmp_path, **changes)
    assert abs(alone[4] - alone[0]) > 1e-3  # it moves
    for world_size in (2, 3):
        losses = losses_on(ranks, world_size, tmp_path, **changes)
        np.testing.assert_allclose(losses, alone, rtol=1e-5)


def test_the_same_run_twice_is_bit_identical(ranks, tmp_path):
    first = losses_on(ranks, 2, tmp_path, max_steps=6, sample_rate=0.5)
    assert np.array_equal(first, losses_on(ranks, 2, tmp_path, max_steps=6, sample_rate=0.5))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "head",
    [
        {},
        {"head_update": "autograd"},
        {"sample_rate": 0.5},
        {"loss": "adaface", "adaface_t_alpha": 0.5},  # looks at the whole batch
        {"loss": "curricularface", "curricular_alpha": 0.5, "sample_rate": 0.5},
        {"loss": "magface", "sub_centers": 2},
    ],
    ids=str,
)
def test_accumulated_steps_equal_the_big_batch(ranks, tmp_path, optimizer, head, world_size):
    share = 12 // world_size
    options = {"optimizer": optimizer, "precision": "fp64", **head}
    big = ranks.run(
        world_size, weights_after_one_step, str(tmp_path), {**options, "batch_size": share}
    )
    small = ranks.run(
        world_size,
        weights_after_one_step,
        str(tmp_path),
        {**options, "batch_size": share // 3, "gradient_acc": 3},
    )
    for (weights, head, calls), (expected, expected_head, expected_calls) in zip(
        small, big, strict=True
    ):
        for key, value in weights.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)
        torch.testing.assert_close(head, expected_head, rtol=0, atol=1e-6)
        assert calls == expected_calls  # none on the inner micro-steps


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_of_the_config_trains_and_the_log_has_its_formula(tmp_path, caplog, loss):
    settings = {"output": str(tmp_path), "loss": loss, "max_steps": 2, "head_workspace_mib": 1}
    if loss != "softmax":
        settings |= {"sample_rate": 0.5, "head_offload": True, "head_state_dtype": "bf16"}
    cfg = Config(**{**TINY_RUN, **settings})
    world = DistContext(0, 0, 1, torch.device("cpu"))
    with caplog.at_level(logging.INFO):
        parts = run_on(cfg, world, tmp_path)
    assert parts.head.margin.describe() in caplog.text
    assert parts.head.centers_per_class == (3 if loss == "subcenter_arcface" else 1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line)["loss"]) for line in lines)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "adaface", "margin": 2.0}, "margin=2.0"),
        ({"loss": "magface", "magface_norms": (5.0, 4.0)}, "l_a < u_a"),
        (
            {
                "embedding_size": 512,
                "batch_size": 1000,
                "head_workspace_mib": 1,
                "sub_centers": 100,
            },
            "head_workspace_mib must be at least 2",
        ),
        ({"head_offload": True, "sample_rate": 0.5, "loss": "softmax"}, "without bias"),
    ],
)
def test_a_head_that_cannot_be_is_refused_before_training(tmp_path, changes, words):
    cfg = Config(**{**TINY_RUN, "num_image": 3000, "output": str(tmp_path), **changes})
    with pytest.raises(UserError, match=words):
        build(cfg, DistContext(0, 0, 1, torch.device("cpu")))


@pytest.mark.parametrize("loss", ["adaface", "cosface"])
def test_accumulation_draws_dropout_once_and_counts_images_once(tmp_path, loss):
    cfg = Config(
        **{
            **TINY_RUN,
            "output": str(tmp_path),
            "loss": loss,
            "gradient_acc": 3,
            "batch_size": 4,
            "dropout": 0.5,
        }
    )
    parts = build(cfg, DistContext(0, 0, 1, torch.device("cpu")))
    seen: list[torch.Tensor] = []
    parts.step.model.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    parts.step.model.train()
    batches = list(parts.loader)[:3]
    parts.step(batches, 0.0)
    assert int(parts.batch_norm.counts.max()) == 3
    times = 2 if loss == "adaface" else 1
    assert len(seen) == 3 * times
    for first, again in zip(seen[:3], seen[-3:], strict=True):
        assert torch.equal(first, again)
    parts.step(batches, 0.0)
    assert not torch.equal(seen[0], seen[3 * times])  # another step draws anew


def everything(parts: Any) -> list[torch.Tensor]:
    """Copies of all weights, buffers and optimizer states of a run."""
    tensors = [*parts.backbone.state_dict().values(), parts.head.weight.detach()]
    tensors += list(parts.head.row_optimizer.state(parts.head.weight).values())
    for state in parts.step.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_nothing_moves_in_a_bad_step(tmp_path, optimizer, sample_rate):
    cfg = Config(
        **{**TINY_RUN, "output": str(tmp_path), "optimizer": optimizer, "sample_rate": sample_rate}
    )
    parts = build(cfg, DistContext(0, 0, 1, torch.device("cpu")))
    batches = iter(parts.loader)
    parts.step.model.train()
    assert not parts.step([next(batches)], 0.1).bad

    before = everything(parts)
    first_layer = next(m for m in parts.backbone.modules() if isinstance(m, torch.nn.Conv2d))
    poison = first_layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * torch.nan,))
    assert parts.step([next(batches)], 0.1).bad
    poison.remove()
    for tensor, kept in zip(everything(parts), before, strict=True):
        assert torch.equal(tensor, kept)

    outcome = parts.step([next(batches)], 0.1)
    assert not outcome.bad
    assert torch.isfinite(outcome.loss)
    assert not all(torch.equal(a, b) for a, b in zip(everything(parts), before, strict=True))


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        ("sgd", "fp32"),
        ("adamw", "fp32"),
        ("sgd", "fp16"),
        pytest.param("adamw", "fp16", marks=pytest.mark.slow),
    ],
)
def test_a_bad_first_step_leaves_no_trace(tmp_path, optimizer, precision, monkeypatch):
    """Optimizer state that the first step creates must not be what lay in memory before."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    settings = {"output": str(tmp_path), "optimizer": optimizer, "precision": precision}
    parts = build(Config(**{**TINY_RUN, **settings}), DistContext(0, 0, 1, torch.device("cpu")))
    parts.step.model.train()
    batches = iter(parts.loader)
    weights = [p.detach().clone() for p in parts.backbone.parameters()]
    first_layer = next(m for m in parts.backbone.modules() if isinstance(m, torch.nn.Conv2d))
    poison = first_layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * torch.nan,))
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        assert parts.step([next(batches)], 0.1).bad
    finally:
        torch.use_deterministic_algorithms(False)
    poison.remove()
    for parameter, kept in zip(parts.backbone.parameters(), weights, strict=True):
        assert torch.equal(parameter, kept)
    for _ in range(12):  # fp16: the loss scale may still have to come down
        outcome = parts.step([next(batches)], 0.01)
        assert torch.isfinite(outcome.loss)
    assert not outcome.bad
    assert all(torch.isfinite(p).all() for p in parts.backbone.parameters())


def test_a_non_finite_loss_moves_nothing_under_the_loss_scaler_either(tmp_path):
    settings = {"output": str(tmp_path), "precision": "fp16"}
    parts = build(Config(**{**TINY_RUN, **settings}), DistContext(0, 0, 1, torch.device("cpu")))
    parts.step.model.train()
    batches = list(parts.loader)
    for batch in batches[:10]:
        parts.step([batch], 0.01)
    before = everything(parts)
    parts.head.register_forward_hook(lambda *arguments: arguments[2] + torch.nan)
    assert parts.step([batches[10]], 0.01).bad  # the gradients themselves are finite
    for tensor, kept in zip(everything(parts), before, strict=True):
        assert torch.equal(tensor, kept)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_with_float32_weights_and_embeddings(tmp_path, precision):
    losses = run_training(
        0, 1, str(tmp_path), {"precision": precision, "max_steps": 12, "batch_size": 4}
    )
    assert np.isfinite(losses).all()
    backbone, _ = load_model(tmp_path)
    assert all(p.dtype == torch.float32 for p in backbone.parameters())


def test_frozen_batch_norm_keeps_its_statistics_to_the_bit_on_3_ranks(ranks, tmp_path):
    torch.manual_seed(0)
    backbone = get_model("r_nano", num_features=16, input_size=32)
    for layer in batch_norms(backbone):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 1.5)
    metadata = ModelMetadata("r_nano", num_features=16, input_size=32)
    save_model(tmp_path / "start.pt", backbone, metadata)
    changes = {"freeze_batch_norm": True, "max_steps": 2, "batch_size": 4}
    changes["init_backbone"] = str(tmp_path / "start.pt")
    ranks.run(3, run_training, str(tmp_path / "run"), changes)
    trained, _ = load_model(tmp_path / "run")
    for before, after in zip(batch_norms(backbone), batch_norms(trained), strict=True):
        assert torch.equal(before.running_mean, after.running_mean)
        assert torch.equal(before.running_var, after.running_var)
        assert int(after.num_batches_tracked) == 0


def test_a_second_run_in_the_same_folder_loses_nothing_of_the_first(run_main, tmp_path):
    assert run_main("max_steps=2")[0] == 0
    first = (tmp_path / "run/model.pt").read_bytes()
    assert run_main("max_steps=3")[0] == 0
    assert (tmp_path / "run/previous_1/model.pt").read_bytes() == first
    assert len(read_metrics(tmp_path / "run")) == 3
    assert len(read_metrics(tmp_path / "run/previous_1")) == 2


def test_a_run_leaves_its_files_and_metrics(ranks, tmp_path):
    ranks.run(2, run_training, str(tmp_path), {"batch_size": 6, "num_epoch": 1, "frequent": 5})
    assert (tmp_path / "model.pt").is_file()
    assert list((tmp_path / "tensorboard").iterdir())
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [5, 10, 15, 20]
    for key in (
        "epoch",
        "loss",
        "learning_rate",
        "samples_per_second",
        "grad_norm",
        "data_wait_share",
    ):
        assert key in records[0]
    backbone, metadata = load_model(tmp_path)
    assert (metadata.network, metadata.num_features, metadata.step) == ("r_nano", 16, 20)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert set(state) == set(backbone.state_dict())


def verified_training(rank: int, world_size: int, folder: str, data: str) -> list[dict[str, Any]]:
    changes = {
        "batch_size": 12 // world_size,
        "max_steps": 4,
        "verbose": 2,
        "val_targets": ["pairs"],
        "val_dir": data,
        "val_batch_size": 8,
    }
    run_training(rank, world_size, folder, changes)
    return read_metrics(folder) if rank == 0 else []


def test_verification_runs_every_so_often_and_at_the_end_on_all_ranks(ranks, tmp_path):
    write_pairs(tmp_path)
    records = ranks.run(2, verified_training, str(tmp_path / "run"), str(tmp_path))[0]
    evaluations = [record for record in records if "eval" in record]
    assert [record["step"] for record in evaluations] == [2, 4]
    metrics = evaluations[0]["eval"]["pairs"]
    assert {"accuracy", "accuracy_flip", "tar_at_far_1e-3", "xnorm"} <= set(metrics)
    assert (tmp_path / "run" / "model_best.pt").is_file()


# --- wrong inputs: message and exit code ----------------------------------------------------


@pytest.fixture
def records(tmp_path):
    """A small set of records of 3 classes, 32 x 32, and its folder."""
    import cv2

    from scripts.pack import main as pack

    rng = np.random.default_rng(0)
    for label in range(3):
        folder = tmp_path / "images" / f"person{label}"
        folder.mkdir(parents=True)
        for number in range(8):
            image = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / f"{number}.jpg"), image)
    assert pack([str(tmp_path / "images"), str(tmp_path / "set"), "--size", "32"]) == 0
    return tmp_path / "set"


def on(records: Path) -> list[str]:
    return [f"rec={records}", "num_classes=auto", "num_image=auto", "batch_size=8", "max_steps=2"]


def test_a_good_run_exits_with_0(run_main, records):
    code, text = run_main(*on(records))
    assert code == 0
    assert "Loss" in text
    assert "Global Step: 2" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learning_rat=0.1"], "unknown key 'learning_rat'"),
        (["lr=fast"], "allowed is a number"),
        (["sample_rate=1.5"], "sample_rate=1.5: allowed is a number in [0, 1]"),
        (["rec=/not/there"], "/not/there"),
        (["network=r51"], "r50"),
        (["output=/proc/nowhere"], "cannot be written"),
        (["batch_size=1000"], "1000"),
        (["val_targets=[lfw]", "val_dir=/not/there"], "lfw"),
        (["init_backbone=/not/there.pt"], "/not/there.pt"),
        (["resume=/not/there"], "no usable checkpoint"),
        (["global_batch_size=12", "gradient_acc=2"], "gradient_acc"),
        (["on_divergence=ignore"], "allowed are stop, rollback"),
        (["augment=[blurr]"], "augment: 'blurr'; allowed are"),
        (["on_bad_record=ignore"], "allowed are error, skip"),
        (["using_wandb=True"], "pip install wandb"),
        (["batch_size=1"], "batch norm"),
        (["seed=99999999999999999999999"], "2**63"),
    ],
)
def test_wrong_words_are_explained_and_exit_with_2(run_main, words, message):
    code, text = run_main(*words)
    assert code == 2
    assert message in text
    assert "Traceback" not in text


def test_a_folder_of_records_is_no_output(run_main, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.rec").write_bytes(b"")
    (data / "label_map.txt").write_text("0\tann\n")
    code, text = run_main(f"output={data}")
    assert code == 2
    assert "has records in it" in text
    assert sorted(path.name for path in data.iterdir()) == ["label_map.txt", "train.rec"]


@pytest.mark.parametrize("last", [0, 3])
def test_a_loader_that_ends_before_its_epoch_is_an_error_not_an_endless_epoch(last):
    class Loader:
        def set_epoch(self, epoch, start_step):
            pass

        def __iter__(self):
            return iter(range(last))

    parts = SimpleNamespace(steps_per_epoch=4, loader=Loader())
    progress = Progress()
    batches = training_batches(parts, 1, progress, SpeedMeter(1, 8))
    for number in range(last):
        assert next(batches) == [number]
        progress.count_step()
    with pytest.raises(RuntimeError, match=f"ended at step {last} of 4 of epoch 0"):
        next(batches)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none_exits_with_2(run_main):
    code, text = run_main("device=cuda")
    assert code == 2
    assert "device=cpu" in text


def test_a_missing_index_exits_with_2(run_main, records):
    (records / "train.idx").unlink()
    code, text = run_main(*on(records))
    assert code == 2
    assert "train.idx" in text


def test_a_truncated_record_file_exits_with_2(run_main, records):
    path = records / "train.rec"
    path.write_bytes(path.read_bytes()[:-3000])
    code, text = run_main(*on(records), "max_steps=3")
    assert code == 2
    assert ".rec was cut off" in text
    assert str(records) in text


def test_a_corrupt_image_exits_with_2_and_names_its_record(run_main, records):
    path = records / "train.rec"
    data = bytearray(path.read_bytes())
    start = data.find(b"\xff\xd8\xff", len(data) // 2)
    data[start + 20 : start + 400] = bytes(380)
    path.write_bytes(bytes(data))
    code, text = run_main(*on(records), "max_steps=3")
    assert code == 2
    assert "train.rec" in text
    assert "key" in text


def test_fewer_classes_than_the_labels_need_exit_with_2(run_main, records):
    code, text = run_main(*on(records), "num_classes=2")
    assert code == 2
    assert "num_classes" in text


def test_a_label_outside_the_range_exits_with_2_and_names_its_record(run_main, records):
    (records / "property").unlink()
    code, text = run_main(*on(records), "num_classes=2", "max_steps=3")
    assert code == 2
    assert "label" in text
    assert "2" in text


class _Boom:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("kind", ["bin", "pt"])
def test_hostile_pickles_are_refused_unread_and_exit_with_2(run_main, tmp_path, capsys, kind):
    import pickle

    path = tmp_path / f"hostile.{kind}"
    if kind == "bin":
        path.write_bytes(pickle.dumps(([_Boom()], [True])))
        code, text = run_main("val_targets=[hostile]", f"val_dir={tmp_path}")
    else:
        torch.save({"conv1.weight": _Boom()}, path)
        code, text = run_main(f"init_backbone={path}")
    assert code == 2
    assert f"hostile.{kind}" in text
    assert "executed" not in text + capsys.readouterr().out


def test_divergence_exits_with_3_and_a_report(run_main):
    code, text = run_main("lr=1e38", "max_bad_steps=3", "max_steps=20")
    assert code == 3
    for word in ("diverged", "step", "learning rate", "scale", "gradient norm"):
        assert word in text
