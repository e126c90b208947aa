"""init_head keeps the centers and states of kept identities bit for bit.

New identities start at the mean embedding of their images, whatever the order of the classes and
the number of ranks.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from backbones.weights import load_model
from benchmarks.bench_faults import whole_state
from configs.base import Config
from data.class_names import class_names, label_map_text, read_label_map
from data.datasets import DataError
from dataset import open_datasets
from scripts.hold_out import hold_out
from tests.conftest import RankFailure, Ranks
from tests.record_helpers import (
    FACES,
    NEW,
    OLD,
    write_faces,
    write_records,
)
from tests.run_helpers import CHECKPOINTED_RUN, whole_run
from train_v2 import main
from training.checkpoint import class_centers
from training.checkpoint.checkpointer import FOLDER, CheckpointError, list_checkpoints
from training.checkpoint.class_centers import match_names
from training.init_head import SUB_CENTER_TILT

KEPT = ("carl", "dora", "gina", "ines")


@pytest.fixture(scope="module")
def old(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks over OLD, from records."""
    folder = tmp_path_factory.mktemp("old")
    changes = {**FACES, "rec": str(write_records(folder / "data", OLD))}
    ranks.run(2, whole_run, str(folder / "run"), changes)
    return folder / "run"


def saved_rows(run: Path) -> dict[str, Tensor]:
    state = whole_state(list_checkpoints(run / FOLDER)[-1])
    return {name: value for name, value in state.items() if name.startswith("head/")}


def fresh_heads(
    ranks: Ranks, world_size: int, old: Path, folder: Path, data: Path, **changes: Any
) -> list[Tensor]:
    """Centers and their state right at the start, joined over the ranks."""
    settings = {
        **FACES,
        "max_steps": 0,
        "rec": str(data),
        "init_head": str(old),
        "init_backbone": str(old),
        "keep_checkpoints": 0,
        **changes,
    }
    heads = [one["head"] for one in ranks.run(world_size, whole_run, str(folder), settings)]
    return [torch.cat(parts) for parts in zip(*heads, strict=True)]


def mean_embedding(run: Path, folder: Path) -> Tensor:
    """[D] direction of a class's mean embedding by the backbone of `run`, the plain way."""
    backbone, _ = load_model(run)
    read = [np.asarray(cv2.imread(str(path))) for path in sorted(folder.iterdir())]
    pixels = torch.from_numpy(np.stack(read)).flip(3).permute(0, 3, 1, 2)  # BGR to RGB
    with torch.no_grad():
        embeddings = backbone((pixels.float() - 127.5) / 127.5)
    return normalize(normalize(embeddings).mean(dim=0), dim=0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_kept_identities_keep_centers_and_state_and_new_ones_start_at_their_mean(
    ranks: Ranks, old: Path, tmp_path: Path, world_size: int
) -> None:
    data = write_faces(tmp_path / "data", NEW)
    centers, momentum = fresh_heads(ranks, world_size, old, tmp_path / "run", data)
    there = saved_rows(old)
    assert there["head/weight/momentum_buffer"].abs().min() > 0
    for name in KEPT:
        assert torch.equal(centers[NEW.index(name)], there["head/weight"][OLD.index(name)])
        assert torch.equal(
            momentum[NEW.index(name)], there["head/weight/momentum_buffer"][OLD.index(name)]
        )
    length = there["head/weight"][[OLD.index(name) for name in KEPT]].norm(dim=1).mean()
    for name in sorted({*NEW} - {*KEPT}):
        expected = mean_embedding(old, data / name) * length
        torch.testing.assert_close(centers[NEW.index(name)], expected, rtol=0, atol=4e-6)  # fp32
        assert not momentum[NEW.index(name)].any()


def test_the_order_of_the_classes_does_not_matter_and_padding_stays_random(
    ranks: Ranks, old: Path, tmp_path: Path
) -> None:
    names = ("zoe", "ines", "carl", "anna")
    data = write_records(tmp_path / "data", names)
    changes = {"num_classes": 6, "optimizer": "sgd"}
    centers, _ = fresh_heads(ranks, 2, old, tmp_path / "run", data, **changes)
    there = saved_rows(old)["head/weight"]
    assert torch.equal(centers[1], there[OLD.index("ines")])
    assert torch.equal(centers[2], there[OLD.index("carl")])
    random = {**changes, "init_head": None}
    untouched, _ = fresh_heads(ranks, 2, old, tmp_path / "random", data, **random)
    assert torch.equal(centers[4:], untouched[4:])
    assert read_label_map(tmp_path / "run") == list(names)


def test_a_list_of_sets_is_matched_by_its_joined_order(
    ranks: Ranks, old: Path, tmp_path: Path
) -> None:
    first, second = ("hugo", "new1"), ("bea", "ines", "new2")
    sets = [write_records(tmp_path / "a", first), write_faces(tmp_path / "b", second)]
    changes = {"rec": [str(path) for path in sets]}
    centers, _ = fresh_heads(ranks, 1, old, tmp_path / "run", sets[0], **changes)
    assert read_label_map(tmp_path / "run") == [*first, *second]
    for label, name in ((0, "hugo"), (2, "bea"), (3, "ines")):
        assert torch.equal(centers[label], saved_rows(old)["head/weight"][OLD.index(name)])


def test_adamw_sub_centers_and_step_counts_are_kept_row_by_row(
    ranks: Ranks, tmp_path: Path
) -> None:
    changes = {
        **FACES,
        "optimizer": "adamw",
        "lr": 1e-3,
        "sub_centers": 2,
        "sample_rate": 0.5,
        "head_state_dtype": "bf16",
    }
    data = {"rec": str(write_faces(tmp_path / "old_data", OLD))}
    ranks.run(3, whole_run, str(tmp_path / "old"), {**changes, **data})
    faces = write_faces(tmp_path / "data", NEW)
    changes = {**changes, "max_steps": 0, "head_state_dtype": "fp32"}
    parts = fresh_heads(ranks, 2, tmp_path / "old", tmp_path / "run", faces, **changes)
    there = saved_rows(tmp_path / "old")
    keys = ("head/weight", "head/weight/exp_avg", "head/weight/exp_avg_sq", "head/weight/step")
    assert there[keys[3]].unique().numel() > 1  # sampled: rows have stepped differently often
    for key, found in zip(keys, parts, strict=True):
        for name in KEPT:
            for k in range(2):
                expected = there[key][2 * OLD.index(name) + k].to(found.dtype)
                assert torch.equal(found[2 * NEW.index(name) + k], expected)
    mean = mean_embedding(tmp_path / "old", faces / "anna")
    one, two = normalize(parts[0][:2])
    assert mean @ one > 0.99
    assert mean @ two > 0.99
    assert 0 < torch.acos(one @ two) < 2 * SUB_CENTER_TILT  # or they would stay the same for ever


def test_another_optimizer_takes_the_centers_and_says_that_state_starts_at_zero(
    old: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, one_thread: None
) -> None:
    data = write_faces(tmp_path / "data", NEW)
    with caplog.at_level(logging.INFO):
        run = whole_run(
            0,
            1,
            str(tmp_path / "run"),
            {
                **FACES,
                "max_steps": 0,
                "rec": str(data),
                "optimizer": "adamw",
                "init_head": str(list_checkpoints(old / FOLDER)[-1]),
            },
        )
    weight, *state = run["head"]
    assert torch.equal(weight[NEW.index("carl")], saved_rows(old)["head/weight"][OLD.index("carl")])
    assert not any(part.any() for part in state)
    assert "their optimizer state starts at zero" in caplog.text
    assert "without init_backbone" in caplog.text
    assert "4 kept, 3 new, 3 dropped" in caplog.text


def test_rows_are_read_in_bounded_pieces_and_those_nobody_wants_are_not(
    ranks: Ranks, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    sizes: list[int] = []
    read = class_centers.sharded_io.read

    def spy(folder: Path, state: Any, *rest: Any, **options: Any) -> None:
        sizes.extend(len(each.local) for each in state.values())
        read(folder, state, *rest, **options)

    monkeypatch.setattr(class_centers, "BLOCK_BYTES", 3 * 16 * 4)  # three rows
    monkeypatch.setattr(class_centers.sharded_io, "read", spy)
    settings = {
        **FACES,
        "max_steps": 0,
        "rec": str(write_faces(tmp_path / "data", NEW)),
        "init_head": str(old),
        "init_backbone": str(old),
    }
    weight, momentum = whole_run(0, 1, str(tmp_path / "run"), settings)["head"]
    # carl and dora are rows 1, 2; gina row 4; ines row 6: three blocks, centers and momentum
    assert sizes == [2, 2, 1, 1, 1, 1]
    there = saved_rows(old)
    for name in KEPT:
        assert torch.equal(weight[NEW.index(name)], there["head/weight"][OLD.index(name)])
        assert torch.equal(
            momentum[NEW.index(name)], there["head/weight/momentum_buffer"][OLD.index(name)]
        )


def test_a_resumed_run_keeps_what_it_has_learnt(ranks: Ranks, old: Path, tmp_path: Path) -> None:
    changes = {
        **FACES,
        "rec": str(write_faces(tmp_path / "data", NEW)),
        "init_head": str(old),
        "init_backbone": str(old),
    }
    (first,) = ranks.run(1, whole_run, str(tmp_path / "run"), changes)
    (again,) = ranks.run(1, whole_run, str(tmp_path / "run"), {**changes, "resume": "auto"})
    assert torch.equal(again["head"][0], first["head"][0])


def test_plain_classification_by_classes_is_taken_over_too(ranks: Ranks, tmp_path: Path) -> None:
    changes = {
        **FACES,
        "task": "classification",
        "loss": "softmax",
        "network": "resnet_nano",
        "embedding_size": 128,
        "batch_size": 4,
        "verbose": 0,
    }
    for name, classes in (("old", OLD), ("new", NEW)):
        hold_out(write_faces(tmp_path / f"{name}_faces", classes), tmp_path / name, every=5)
    old = {**changes, "rec": str(tmp_path / "old")}
    ranks.run(2, whole_run, str(tmp_path / "old_run"), old)
    new = {
        **changes,
        "rec": str(tmp_path / "new"),
        "init_head": str(tmp_path / "old_run"),
        "max_steps": 0,
        "keep_checkpoints": 0,
    }
    heads = [one["head"] for one in ranks.run(2, whole_run, str(tmp_path / "run"), new)]
    parts = [torch.cat(each) for each in zip(*heads, strict=True)]
    there = saved_rows(tmp_path / "old_run")
    assert there["head/bias"].all()
    keys = ("head/weight", "head/bias", "head/weight/momentum_buffer", "head/bias/momentum_buffer")
    for key, found in zip(keys, parts, strict=True):
        for name in KEPT:
            assert torch.equal(found[NEW.index(name)], there[key][OLD.index(name)])
    assert Config(**{**CHECKPOINTED_RUN, **new, "label_smoothing": 0.1}).problems() == [
        f"init_head={new['init_head']!r}: only with parallel_dim=1 and label_smoothing=0"
    ]


def test_a_class_without_images_keeps_its_random_center(
    old: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, one_thread: None
) -> None:
    data = write_faces(tmp_path / "data", NEW)
    (tmp_path / "without").write_text("class zoe\nclass carl\n")
    settings = {
        **FACES,
        "max_steps": 0,
        "rec": str(data),
        "init_backbone": str(old),
        "exclude": str(tmp_path / "without"),
    }
    random = whole_run(0, 1, str(tmp_path / "random"), settings)["head"][0]
    filled = whole_run(0, 1, str(tmp_path / "run"), {**settings, "init_head": str(old)})["head"][0]
    assert torch.equal(filled[NEW.index("zoe")], random[NEW.index("zoe")])
    assert not torch.equal(filled[NEW.index("anna")], random[NEW.index("anna")])
    assert torch.equal(filled[NEW.index("carl")], saved_rows(old)["head/weight"][OLD.index("carl")])
    assert "1 new classes have no image" in caplog.text


def broken(how: str, old: Path, folder: Path) -> dict[str, Any]:
    """A copy of the old run with something missing, and the settings of a new one."""
    run = shutil.copytree(old, folder / "old")
    changes = {
        **FACES,
        "max_steps": 0,
        "rec": str(folder / "data"),
        "init_head": str(run),
        "init_backbone": str(old),
    }
    names: tuple[str, ...] = NEW
    if how == "no checkpoint":
        shutil.rmtree(run / FOLDER)
    elif how == "nothing matches":
        names = ("x", "y", "w")
    elif how == "another width":
        changes |= {"embedding_size": 8, "init_backbone": None}
    elif how == "other sub-centers":
        changes["sub_centers"] = 3
    elif how == "no names here":
        changes |= {"rec": "synthetic", "num_classes": 5, "num_image": 60}
    elif how == "a name twice":
        (run / "label_map.txt").write_text("".join(f"{i}\tcarl\n" for i in range(len(OLD))))
    elif how == "too many names":
        (run / "label_map.txt").write_text("".join(f"{i}\t{i}\n" for i in range(len(OLD) + 1)))
    elif how == "no label map":
        (run / "label_map.txt").unlink()
        os.rename(old.parent / "data", old.parent / "away")
    write_faces(folder / "data", names)
    return changes


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("no checkpoint", CheckpointError, r"no usable checkpoint.*model\.pt alone"),
        ("nothing matches", Exception, "no class of this run is one of that run.*'x'.*'bea'"),
        ("another width", Exception, "embedding_size=16, sub_centers=1; this run has .*=8"),
        ("other sub-centers", Exception, "sub_centers=1; this run.*sub_centers=3"),
        ("no names here", DataError, r"training set names none.*label_map\.txt"),
        ("a name twice", DataError, "'carl' stands for classes 0 and 1"),
        ("too many names", CheckpointError, "has 7 classes, and its label map names 8"),
        ("no label map", CheckpointError, "cannot be asked.*Write that file"),
    ],
)
def test_what_does_not_fit_is_said(
    old: Path, tmp_path: Path, how: str, error: type[Exception], words: str, one_thread: None
) -> None:
    changes = broken(how, old, tmp_path)
    try:
        with pytest.raises(error, match=words):
            whole_run(0, 1, str(tmp_path / "run"), changes)
    finally:
        if (old.parent / "away").exists():
            os.rename(old.parent / "away", old.parent / "data")


def test_without_a_label_map_the_old_set_is_asked_if_it_is_still_the_same(
    old: Path, tmp_path: Path, one_thread: None
) -> None:
    run = shutil.copytree(old, tmp_path / "old")
    (run / "label_map.txt").unlink()
    settings = {
        **FACES,
        "max_steps": 0,
        "rec": str(write_faces(tmp_path / "data", NEW)),
        "init_head": str(run),
        "init_backbone": str(old),
    }
    weight = whole_run(0, 1, str(tmp_path / "run"), settings)["head"][0]
    expected = saved_rows(old)["head/weight"][OLD.index("gina")]
    assert torch.equal(weight[NEW.index("gina")], expected)

    stated = old.parent / "data" / "property"
    stated.write_text("8,32,32\n")
    try:
        with pytest.raises(CheckpointError, match="has changed since"):
            whole_run(0, 1, str(tmp_path / "again"), settings)
    finally:
        stated.write_text("7,32,32\n")


def spoilt_images(rank: int, world_size: int, folder: str, changes: dict[str, Any]) -> None:
    whole_run(rank, world_size, folder, changes)


def test_an_image_that_one_rank_cannot_read_stops_all_of_them(
    ranks: Ranks, old: Path, tmp_path: Path
) -> None:
    data = write_faces(tmp_path / "data", NEW)
    (data / "zoe" / "3.png").write_bytes(b"no image")
    changes = {
        **FACES,
        "max_steps": 0,
        "rec": str(data),
        "init_head": str(old),
        "init_backbone": str(old),
    }
    with pytest.raises(RankFailure) as failure:
        ranks.run(2, spoilt_images, str(tmp_path / "run"), changes)
    assert len(failure.value.errors) == 2
    assert all("zoe/3.png" in str(error) for error in failure.value.errors.values())
    ranks.run(2, spoilt_images, str(tmp_path / "run"), {**changes, "on_bad_record": "skip"})


def test_the_command_fine_tunes_a_run_to_new_classes(
    old: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], one_thread: None
) -> None:
    data = write_faces(tmp_path / "data", NEW)
    config = tmp_path / "tiny.py"
    own = {"rec": str(data), "output": str(tmp_path / "run"), "batch_size": 12}
    plain = {**CHECKPOINTED_RUN, **FACES, **own}
    config.write_text(f"config = {plain!r}\n")
    words = [f"init_backbone={old}", f"init_head={old}"]
    assert main([str(config), *words]) == 0
    assert "4 kept, 3 new, 3 dropped" in (tmp_path / "run" / "training.log").read_text()
    assert read_label_map(tmp_path / "run") == list(NEW)
    onwards = [f"init_backbone={tmp_path / 'run'}", f"init_head={tmp_path / 'run'}"]
    assert main([str(config), *onwards]) == 0  # read before it is set aside
    assert "7 kept, 0 new, 0 dropped" in (tmp_path / "run" / "training.log").read_text()
    assert read_label_map(tmp_path / "run" / "previous_1") == list(NEW)
    assert read_label_map(tmp_path / "run") == list(NEW)
    assert main([str(config), *words, "init_head=nowhere"]) == 2
    assert "init_head='nowhere': no usable checkpoint there" in capfd.readouterr().err


names_of_classes = st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=20)


@given(names_of_classes)
def test_names_come_back_from_a_label_map_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("map")
    if any(len(f"-{name}-".splitlines()) > 1 for name in names):
        with pytest.raises(DataError, match="one line of text"):
            label_map_text(names)
        return
    text = label_map_text(names)
    (folder / "label_map.txt").write_text(text, encoding="utf-8", newline="")
    assert read_label_map(folder) == names


@given(st.permutations(range(12)), st.sets(st.integers(0, 11)), st.sets(st.integers(0, 11)))
def test_classes_are_matched_by_name_alone(
    order: list[int], here: set[int], there: set[int]
) -> None:
    ours = [f"n{i}" for i in order if i in here]
    theirs = [f"n{i}" for i in sorted(there)]
    found = match_names([*ours, ""], ["", *theirs], ("here", "there"))
    for name, place in zip(ours, found.tolist(), strict=False):
        assert (["", *theirs][place] == name) if place >= 0 else name not in theirs
    assert found[-1] == -1


def test_a_map_of_more_classes_than_the_set_has_is_refused(tmp_path: Path) -> None:
    data = write_records(tmp_path / "data", ("a", "b"))
    (data / "label_map.txt").write_text("0\ta\n1\tb\n2\tc\n")
    with pytest.raises(DataError, match="names 3 classes, but the set has 2"):
        class_names(open_datasets([data], 32))


def test_a_run_whose_folders_have_impossible_names_goes_on_without_a_map(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_datasets([write_faces(tmp_path / "data", ("two\nlines", "c"))], 32)
    class_centers.remember_class_names(source, tmp_path)
    assert "will not know the names of its classes" in caplog.text
    assert not (tmp_path / "label_map.txt").exists()
    with pytest.raises(DataError, match="needs names of one line of text"):
        label_map_text(["good", "\udcff"])  # bytes in a folder's name that are no text
