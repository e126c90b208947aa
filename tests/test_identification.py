"""Ranks, TPIR and mAP are what counting by hand gives, with ties against the model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from data.datasets import DataError
from eval import identification
from eval.identification import NOBODY, list_images, main, search, summarize
from tests.models import OURS, write_pooling_model

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=60)
@given(st.integers(1, 25), st.integers(1, 25), st.integers(0, 2**32 - 1), st.sampled_from([1, 4]))
def test_every_rate_is_the_one_a_loop_counts(
    num_probes: int, num_gallery: int, seed: int, bits: int
) -> None:
    random = np.random.default_rng(seed)
    # Few values, so that there are ties; lengths 1 to the last bit, so that they stay ties.
    rows = np.eye(6)[random.integers(0, 6, num_probes + num_gallery)]
    if bits > 1:
        rows = random.standard_normal((num_probes + num_gallery, 6))
    ids = random.integers(NOBODY, 5, len(rows))
    probes, gallery = rows[:num_probes], rows[num_probes:]
    probe_ids, gallery_ids = ids[:num_probes], ids[num_probes:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identification, "_SCORES_PER_BLOCK", 3 * num_gallery)
        found = search(probes, probe_ids, gallery, gallery_ids, average_precision=True)
    assert found.average_precision is not None
    alarms, right, ranks = [], [], []
    for row in range(num_probes):
        scores = gallery @ probes[row] / np.linalg.norm(probes[row])
        scores = (scores / np.linalg.norm(gallery, axis=1)).astype(np.float32)
        own = (gallery_ids == probe_ids[row]) & (probe_ids[row] != NOBODY)
        assert found.mated[row] == own.any()
        if not own.any():
            alarms.append(scores.max())
            assert found.rank[row] == 0
            continue
        ranks.append(1 + int((scores[~own] >= scores[own].max() - 1e-6).sum()))
        assert found.rank[row] == ranks[-1]
        if ranks[-1] == 1:
            right.append(scores[own].max())
        if len(np.unique(scores)) == len(scores):  # sklearn breaks ties its own way
            expected = average_precision_score(own, scores)
            assert found.average_precision[row] == pytest.approx(expected, abs=1e-9)
    result = summarize(found, ranks=(1, 3), fpirs=(0.0, 0.2, 1.0))
    if not ranks:
        assert math.isnan(result["rank_1"])
        return
    assert result["rank_3"] == np.mean(np.array(ranks) <= 3)
    for at in result["tpir_at_fpir"]:
        if not alarms:
            assert math.isnan(at["tpir"])
            continue
        # The best of all thresholds whose share of false alarms is allowed.
        best = 0.0
        for threshold in [-math.inf, *alarms, *right]:
            if np.mean(np.array(alarms) > threshold + 1e-6) <= at["fpir"]:
                best = max(best, sum(s > threshold + 1e-6 for s in right) / len(ranks))
        assert at["tpir"] == best


def test_a_model_that_says_the_same_of_everybody_finds_nobody() -> None:
    ones = np.ones((4, 3))
    result = summarize(search(ones, np.arange(4), ones, np.arange(4)))
    assert result["rank_1"] == 0.0  # an argmax would have called one of four right


def test_what_does_not_fit_is_an_error() -> None:
    ones = np.ones((4, 3))
    with pytest.raises(ValueError, match="probes have shape"):
        search(ones, np.arange(3), ones, np.arange(4))
    with pytest.raises(ValueError, match="the gallery 2"):
        search(ones, np.arange(4), np.ones((4, 2)), np.arange(4))
    broken = ones.copy()
    broken[2] = np.nan
    with pytest.raises(ValueError, match="gallery: embedding 2"):
        search(ones, np.arange(4), broken, np.arange(4))
    with pytest.raises(ValueError, match="gallery have shape"):
        search(ones, np.arange(4), np.empty((0, 3)), np.arange(0))


def _write_faces(folder: Path, names: list[str], noise: float, seed: int) -> None:
    import simplejpeg

    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for name in names:
        base = np.random.default_rng(int(name.split("_")[0])).integers(0, 256, (8, 8, 3))
        small = np.clip(base + random.normal(0, noise, base.shape), 0, 255).astype(np.uint8)
        pixels = np.ascontiguousarray(small.repeat(14, 0).repeat(14, 1))
        (folder / f"{name}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, 95))


def test_tinyface_folders_are_searched_and_reported_in_groups(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write_faces(tmp_path / "gallery", [f"{i}_1" for i in range(6)], 30, 1)
    _write_faces(tmp_path / "probe", [f"{i}_2" for i in range(6)], 30, 2)
    _write_faces(tmp_path / "distractors", [f"{i}_9" for i in range(50, 60)], 30, 3)
    lines = [f"{i}_2.jpg,{'ab'[i % 2]}\n" for i in range(6)]
    (tmp_path / "groups.csv").write_text("name,quality\n" + "".join(lines))
    model = write_pooling_model(tmp_path / "pool.onnx", cells=8, metadata=OURS)
    out = tmp_path / "out.json"
    arguments = ["--model", str(model), "--json", str(out)]
    for part in ("gallery", "probe", "distractors"):
        arguments += [f"--{part}", str(tmp_path / part)]
    assert main([*arguments, "--groups", str(tmp_path / "groups.csv")]) == 0
    content = json.loads(out.read_text())
    assert content["all"]["num_gallery"] == 16
    assert content["all"]["num_mated_probes"] == 6
    assert content["all"]["rank_1"] > 0.5
    assert content["quality=a"]["num_mated_probes"] == 3
    assert 0 < content["all"]["map"] <= 1
    assert "mAP" in capsys.readouterr().out


def test_identities_come_from_folders_or_names_and_never_from_both(tmp_path: Path) -> None:
    _write_faces(tmp_path / "flat", ["1_a", "1_b", "2_a"], 0, 0)
    assert list_images(tmp_path / "flat").identities == ["1", "1", "2"]
    _write_faces(tmp_path / "nested" / "ann", ["7_a"], 0, 0)
    found = list_images(tmp_path / "nested")
    assert (found.identities, found.names) == (["ann"], ["ann/7_a.jpg"])
    (tmp_path / "nested" / "8_a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="not both"):
        list_images(tmp_path / "nested")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image in it"):
        list_images(tmp_path / "empty")
    with pytest.raises(DataError, match="no such folder"):
        list_images(tmp_path / "none")
