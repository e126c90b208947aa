"""A run of arcface_torch, given as the files it leaves, goes on here as if it had begun here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backbones import get_model
from backbones.weights import WeightsError
from benchmarks.bench_faults import whole_state
from configs.base import Config
from scripts.import_checkpoint import import_checkpoint
from tests.conftest import Ranks
from tests.run_helpers import CHECKPOINTED_RUN, assert_same, copy_of_run, whole_run
from training.checkpoint.arcface_torch import read_run
from training.checkpoint.checkpointer import FOLDER, CheckpointError

STEPS_PER_EPOCH = CHECKPOINTED_RUN["num_image"] // CHECKPOINTED_RUN["batch_size"]
NUM_CLASSES = CHECKPOINTED_RUN["num_classes"]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    "adamw": {"optimizer": "adamw", "lr": 1e-3},
}
KEYS = {"sgd": ("momentum_buffer",), "adamw": ("step", "exp_avg", "exp_avg_sq")}


def write_published(checkpoint: Path, folder: Path, world_size: int, optimizer: str) -> None:
    """What arcface_torch's save_all_states leaves of a state, written from one of our own."""
    state = whole_state(checkpoint)
    net = get_model("r_nano", num_features=16, input_size=32)
    backbone = {k: state.get(f"backbone/{k}", v) for k, v in net.state_dict().items()}
    names = [name for name, _ in net.named_parameters()]
    folder.mkdir()
    for rank in range(world_size):
        share, rest = divmod(NUM_CLASSES, world_size)  # arcface_torch's own cut
        start = rank * share + min(rank, rest)
        mine = slice(start, start + share + (rank < rest))
        numbered: dict[int, dict[str, Tensor]] = {
            i: {key: state[f"optimizer/{key}/{name}"] for key in KEYS[optimizer]}
            for i, name in enumerate(names)
            if f"optimizer/{KEYS[optimizer][0]}/{name}" in state
        }
        numbered[len(names)] = {
            key: torch.tensor(float(state["head/weight/step"][0]))
            if key == "step"
            else state[f"head/weight/{key}"][mine].clone()
            for key in KEYS[optimizer]
        }
        content = {
            "epoch": 1,
            "global_step": STEPS_PER_EPOCH,
            "state_dict_backbone": backbone,
            "state_dict_softmax_fc": {"weight": state["head/weight"][mine].clone()},
            "state_optimizer": {
                "state": numbered,
                "param_groups": [
                    {"lr": 0.1, "params": list(range(len(names)))},
                    {"lr": 0.1, "params": [len(names)]},
                ],
            },
            "state_lr_scheduler": {"last_epoch": STEPS_PER_EPOCH, "power": 2, "base_lrs": [0.1]},
        }
        torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")


@pytest.fixture(scope="module")
def published(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By optimizer: a whole run of two ranks, and its first epoch as published files."""
    made = {}
    for optimizer, settings in OPTIMIZERS.items():
        folder = tmp_path_factory.mktemp(optimizer)
        changes = {**settings, "freeze_batch_norm": True, "checkpoint_every": STEPS_PER_EPOCH}
        left_alone = ranks.run(2, whole_run, str(folder / "run"), changes)
        checkpoint = folder / "run" / FOLDER / f"step_{STEPS_PER_EPOCH:08d}"
        write_published(checkpoint, folder / "published", 2, optimizer)
        made[optimizer] = (folder, changes, left_alone)
    return made


def config(output: Path, **changes: Any) -> Config:
    return Config(**{**CHECKPOINTED_RUN, "batch_size": 6, "output": str(output), **changes})


def edited(old: Path, new: Path, change: Callable[[int, dict[str, Any]], None]) -> Path:
    """A copy of a published run, each rank's file changed in place."""
    new.mkdir()
    for rank, path in enumerate(sorted(old.iterdir())):
        content = torch.load(path, weights_only=True)
        change(rank, content)
        torch.save(content, new / path.name)
    return new


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_that_was_taken_over_ends_as_the_one_that_began_here(
    ranks: Ranks, tmp_path: Path, published: dict[str, Any], optimizer: str
) -> None:
    folder, changes, left_alone = published[optimizer]
    copy = copy_of_run(folder / "run", tmp_path / "run", 0)  # its log lines, no checkpoint
    path = import_checkpoint(folder / "published", config(copy, **changes))
    assert path.name == f"step_{STEPS_PER_EPOCH:08d}"
    again = ranks.run(2, whole_run, str(copy), {**changes, "resume": "auto"})
    assert_same(again, left_alone)


def test_it_goes_on_on_another_number_of_ranks(
    ranks: Ranks, tmp_path: Path, published: dict[str, Any]
) -> None:
    folder, changes, left_alone = published["sgd"]
    cfg = config(tmp_path / "run", **{**changes, "batch_size": 4})
    import_checkpoint(folder / "published", cfg, world_size=3)
    again = ranks.run(3, whole_run, str(tmp_path / "run"), {**changes, "resume": "auto"})
    after = {step: loss for step, loss in left_alone[0]["losses"].items() if step > STEPS_PER_EPOCH}
    assert again[0]["losses"] == pytest.approx(after, rel=1e-4)


def test_batch_norm_goes_on_from_the_mean_of_the_ranks(
    tmp_path: Path, published: dict[str, Any]
) -> None:
    folder, changes, _ = published["sgd"]

    def other_statistics(rank: int, content: dict[str, Any]) -> None:
        for key, value in content["state_dict_backbone"].items():
            if key.endswith("running_var"):
                value.fill_(1.0 + 2 * rank)

    old = edited(folder / "published", tmp_path / "old", other_statistics)
    cfg = config(tmp_path / "run", **{**changes, "freeze_batch_norm": False})
    path = import_checkpoint(old, cfg)
    state = whole_state(path)
    assert 2.0 in state["ranks/batch_norm"]
    assert 3.0 not in state["ranks/batch_norm"]


def test_older_files_give_centers_and_momentum_and_want_the_epoch(
    tmp_path: Path, published: dict[str, Any]
) -> None:
    folder, changes, _ = published["sgd"]
    run = read_run(folder / "published")
    old = tmp_path / "old"
    old.mkdir()
    torch.save(run.backbone[0], old / "backbone.pth")
    for rank in range(2):
        torch.save(run.centers[rank].clone(), old / f"rank_{rank}_softmax_weight.pt")
        momentum = run.center_state[rank]["momentum_buffer"].clone()
        torch.save(momentum, old / f"rank_{rank}_softmax_weight_mom.pt")
    cfg = config(tmp_path / "run", **changes)
    with pytest.raises(WeightsError, match="give --epoch"):
        import_checkpoint(old, cfg)
    state = whole_state(import_checkpoint(old, cfg, epoch=1))
    assert torch.equal(state["head/weight"], torch.cat(run.centers))
    momentum = torch.cat([each["momentum_buffer"] for each in run.center_state])
    assert torch.equal(state["head/weight/momentum_buffer"], momentum)


def test_files_are_cut_as_arcface_torch_cuts_them_and_not_as_we_do(tmp_path: Path) -> None:
    whole = torch.randn(10, 4)
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "backbone.pth")

    def write(sizes: list[int]) -> None:
        for rank, part in enumerate(whole.split(sizes)):
            torch.save(part.clone(), tmp_path / f"rank_{rank}_softmax_weight.pt")

    write([3, 3, 2, 2])
    assert torch.equal(torch.cat(read_run(tmp_path).centers), whole)
    write([3, 3, 3, 1])
    with pytest.raises(WeightsError, match=r"rank 2 of 4 holds centers of shape \[3, 4\]"):
        read_run(tmp_path)


def test_momentum_of_a_sampled_head_is_left_out_and_said_so(
    tmp_path: Path, published: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    folder, changes, _ = published["sgd"]

    def sampled(rank: int, content: dict[str, Any]) -> None:
        state = content["state_optimizer"]["state"]
        last = max(state)
        state[last]["momentum_buffer"] = state[last]["momentum_buffer"][:3].clone()

    old = edited(folder / "published", tmp_path / "old", sampled)
    path = import_checkpoint(old, config(tmp_path / "run", **changes))
    assert "it starts at zero" in caplog.text
    assert not whole_state(path)["head/weight/momentum_buffer"].any()


def test_what_does_not_fit_is_refused_with_its_reason(
    tmp_path: Path, published: dict[str, Any]
) -> None:
    folder, changes, _ = published["sgd"]
    files = sorted((folder / "published").iterdir())
    cfg = config(tmp_path / "run", **changes)

    def refused(match: str, *names: str, cfg: Config = cfg) -> None:
        old = tmp_path / f"old_{len(list(tmp_path.iterdir()))}"
        old.mkdir()
        for file, name in zip(files, names, strict=False):
            (old / name).write_bytes(file.read_bytes())
        with pytest.raises((WeightsError, CheckpointError), match=match):
            import_checkpoint(old, cfg)
        assert not (tmp_path / "run" / FOLDER).exists()

    first, second = (path.name for path in files)
    refused("none of ranks", "unused", second)
    refused(r"wants 23", first)
    refused("no checkpoint_gpu")
    more = cfg.replace(num_classes=24)
    refused("num_classes, embedding_size", first, second, cfg=more)
    refused("set optimizer=", first, second, cfg=cfg.replace(optimizer="adamw"))
    content = torch.load(files[1], weights_only=True)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / first).write_bytes(files[0].read_bytes())
    torch.save({**content, "epoch": 2}, tmp_path / "mixed" / second)
    with pytest.raises(WeightsError, match="not written at the same moment"):
        import_checkpoint(tmp_path / "mixed", cfg)
    (tmp_path / "hostile").mkdir()
    torch.save(Path("x"), tmp_path / "hostile" / "checkpoint_gpu_0.pt")
    with pytest.raises(WeightsError, match="refused"):
        import_checkpoint(tmp_path / "hostile", cfg)
    import_checkpoint(folder / "published", cfg)
    with pytest.raises(CheckpointError, match="has checkpoints already"):
        import_checkpoint(folder / "published", cfg)
