"""A submission is judged by every rule and left as it is; the protocol's numbers are the dense."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import simplejpeg
from onnx import TensorProto, helper, numpy_helper

from eval.metrics import tars_at_fars
from eval.mfr import evaluate_groups, main
from eval.submission import begins_with_normalization, check_submission
from tests.models import OURS, write_pooling_model

pytestmark = pytest.mark.usefixtures("one_thread")


def _write(
    folder: Path,
    *,
    width: int = 16,
    batch: int | str = "batch",
    size: int = 112,
    nodes: int = 8,
    dtype: type = np.float32,
    value: float = 0.01,
    outputs: int = 1,
    normalizes: tuple[str, ...] = (),
    name: str = "model.onnx",
) -> Path:
    """A folder with a graph that keeps the rules, but for what the arguments say."""
    folder.mkdir(exist_ok=True)
    made: list[onnx.NodeProto] = []
    at = "data"
    weights = [numpy_helper.from_array(np.array(127.5, np.float32), "c")]
    for kind in normalizes:
        made.append(helper.make_node(kind, [at, "c"], [f"n{len(made)}"]))
        at = f"n{len(made) - 1}"
    made.append(helper.make_node("GlobalAveragePool", [at], ["pooled"]))
    made.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    made.append(helper.make_node("Cast", ["matrix"], ["wide"], to=TensorProto.FLOAT))
    weights.append(numpy_helper.from_array(np.full((3, width), value, dtype), "matrix"))
    made.append(helper.make_node("MatMul", ["flat", "wide"], ["x"]))
    at = "x"
    while len(made) < nodes:
        made.append(helper.make_node("Abs", [at], [f"y{len(made)}"]))
        at = f"y{len(made) - 1}"
    names = [at, "flat"][:outputs]
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [batch, None]) for n in names],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / name)
    return folder


def _broken(folder: Path, track: str = "ms1m") -> list[str]:
    report = check_submission(folder, track)
    return [check["name"] for check in report.checks if check["passed"] is False]


def test_a_folder_that_keeps_the_rules_passes_and_is_left_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _write(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    os.chmod(folder, 0o555)
    report = tmp_path / "report.json"
    try:
        assert main(["check", str(folder), "--track", "ms1m", "--json", str(report)]) == 0
    finally:
        os.chmod(folder, 0o755)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    content = json.loads(report.read_text())
    assert content["passed"] is True
    assert (content["input_mean"], content["input_std"]) == (127.5, 127.5)
    assert content["ms_per_image"] > 0
    assert "passes the rules of track ms1m" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "broken"),
    [
        ({"width": 513}, "feature width"),
        ({"batch": 1}, "batch"),
        ({"size": 128}, "height x width"),
        ({"nodes": 7}, "graph nodes"),
        ({"dtype": np.float16}, "bytes of an initializer's element"),
        ({"value": np.inf}, "batch of 32"),
        ({"outputs": 2}, "outputs"),
    ],
)
def test_each_broken_rule_is_named_and_is_exit_code_1(
    tmp_path: Path, options: dict[str, Any], broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _write(tmp_path / "run", **options)
    assert _broken(folder) == [broken]
    assert main(["check", str(folder), "--track", "ms1m"]) == 1
    assert f"BROKEN {broken}" in capsys.readouterr().out


def test_tracks_differ_in_width_and_unknown_ones_are_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _write(tmp_path / "run", width=1024)
    for track, broken in [
        ("ms1m", ["feature width"]),
        ("glint360k", []),
        ("unconstrained", []),
        ("cfat_v2", ["feature width"]),
    ]:
        assert _broken(folder, track) == broken
    assert main(["check", str(folder), "--track", "wf42m"]) == 2
    assert "begins with ms1m, glint, cfat, unconstrained" in capsys.readouterr().err
    assert main(["check", str(tmp_path / "none"), "--track", "ms1m"]) == 2
    inside = str(folder / "r.json")
    assert main(["check", str(folder), "--track", "ms1m", "--json", inside]) == 2
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]


def test_no_file_two_files_and_a_broken_file_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    assert _broken(folder) == ["ONNX files"]
    (folder / "a.onnx").write_bytes(b"no graph at all")
    assert _broken(folder) == ["loads"]
    _write(folder)
    assert _broken(folder) == ["ONNX files"]


def test_crop_and_pixel_norm_count_for_cfat_only(tmp_path: Path) -> None:
    folder = _write(tmp_path / "run", size=96)
    (folder / "crop.txt").write_text("0\n0\n100\n100\n96\n96\n")
    (folder / "pixel_norm.txt").write_text("120\n60.5\n")
    report = check_submission(folder, "cfat")
    assert report.passed
    assert (report.input_mean, report.input_std, report.height) == (120.0, 60.5, 96)
    assert _broken(folder, "ms1m") == ["height x width"]
    for text in ("0\n0\n100\n", "a\n" * 6, "5\n5\n5\n5\n96\n96\n", "0\n0\n9\n9\n0\n96\n"):
        (folder / "crop.txt").write_text(text)
        assert _broken(folder, "cfat") == ["crop.txt"]
    (folder / "crop.txt").unlink()
    (folder / "pixel_norm.txt").write_text("1\n0\n")
    assert _broken(folder, "cfat") == ["pixel_norm.txt"]


@pytest.mark.parametrize(
    ("normalizes", "expected"),
    [
        (("Sub", "Mul"), True),
        (("Sub", "Div"), True),
        (("Mul", "Add"), True),
        (("Sub",), False),
        (("Sub", "Sub"), False),
        ((), False),
    ],
)
def test_a_graph_that_normalizes_by_itself_is_fed_plain_pixels(
    tmp_path: Path, normalizes: tuple[str, ...], expected: bool
) -> None:
    folder = _write(tmp_path / "run", normalizes=normalizes)
    assert begins_with_normalization(onnx.load(folder / "model.onnx").graph) is expected
    report = check_submission(folder, "ms1m")
    assert (report.input_mean, report.input_std) == ((0, 1) if expected else (127.5, 127.5))


def test_time_fails_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.submission.time_single_images", lambda *arguments: 10.5)
    folder = _write(tmp_path / "run")
    assert check_submission(folder, "ms1m").passed
    assert not check_submission(folder, "ms1m", enforce_time=True).passed
    assert check_submission(folder, "cfat", enforce_time=True).passed


def test_a_run_is_packed_checked_and_zipped_or_nothing_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from backbones import get_model
    from backbones.weights import ModelMetadata, save_model

    options: dict[str, Any] = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    net = get_model("vit_t", num_features=32, input_size=112, **options)
    metadata = ModelMetadata("vit_t", 32, 112, mean=0.0, std=255.0, options=options)
    save_model(tmp_path / "run" / "model.pt", net, metadata)
    out = tmp_path / "out.zip"
    assert main(["pack", str(tmp_path / "run"), str(out)]) == 0
    assert "passes the rules of track ms1m" in capfd.readouterr().out
    with zipfile.ZipFile(out) as archive:
        assert archive.namelist() == ["model.onnx"]
        archive.extractall(tmp_path / "unpacked")
    report = check_submission(tmp_path / "unpacked", "ms1m")
    assert report.passed
    assert (report.input_mean, report.input_std) == (0.0, 1.0)  # 0 and 255 are in the graph
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model.pt"]
    session = onnxruntime.InferenceSession(tmp_path / "unpacked" / "model.onnx")
    assert session.get_outputs()[0].shape == ["batch", 32]


# --- the protocol ---


def _faces(folder: Path, people: int = 6, each: int = 3) -> list[str]:
    random = np.random.default_rng(5)
    names = []
    for person in range(people):
        base = random.integers(0, 256, (8, 8, 3))
        (folder / f"p{person}").mkdir(parents=True)
        for number in range(each):
            small = np.clip(base + random.normal(0, 60, base.shape), 0, 255).astype(np.uint8)
            pixels = np.ascontiguousarray(small.repeat(14, 0).repeat(14, 1))
            name = f"p{person}/{number}.jpg"
            (folder / name).write_bytes(simplejpeg.encode_jpeg(pixels, 95))
            names.append(name)
    return names


def test_the_protocol_on_a_folder_with_groups_is_the_dense_computation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = _faces(tmp_path / "faces")
    lines = [f"{name},{'ab'[i % 2]},{'xyz'[i % 3]}\n" for i, name in enumerate(names)]
    (tmp_path / "groups.csv").write_text("name,mask,race\n" + "".join(lines))
    model = write_pooling_model(tmp_path / "pool.onnx", metadata=OURS)
    out = tmp_path / "out.json"
    arguments = ["run", "--model", str(model), "--data", str(tmp_path / "faces")]
    more = ["--groups", str(tmp_path / "groups.csv"), "--far", "1e-2,0.1", "--json", str(out)]
    assert main([*arguments, *more]) == 0
    content = json.loads(out.read_text())
    assert list(content["groups"]) == [
        "all",
        "mask=a",
        "mask=b",
        "mask=a against b",
        "race=x",
        "race=y",
        "race=z",
    ]
    assert (content["images"], content["people"]) == (18, 6)

    from eval.extract import FileImages, embed_images
    from eval.model import open_model

    opened = open_model(model)
    images = FileImages([tmp_path / "faces" / name for name in names], 112)
    rows = embed_images(opened.embed, images, flip=False).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    people = np.arange(18) // 3
    upper = np.triu_indices(18, 1)
    scores, same = (rows @ rows.T)[upper], people[upper[0]] == people[upper[1]]
    for one, expected in zip(
        content["groups"]["all"], tars_at_fars(scores, same, [1e-2, 0.1]), strict=True
    ):
        assert (one["tar"], one["false_accepts"]) == (expected.tar, expected.false_accepts)
    cross = content["groups"]["mask=a against b"][0]
    assert cross["num_genuine"] + cross["num_impostors"] == 81
    assert "mask=a against b" in capsys.readouterr().out


def test_groups_that_do_not_fit_are_named_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = _faces(tmp_path / "faces", people=2, each=1)
    groups = tmp_path / "groups.csv"
    arguments = ["run", "--model", "none.onnx", "--data", str(tmp_path / "faces")]
    for text, words in [
        ("name,race\n" + f"{names[0]},a\n", f"no line for '{names[1]}'"),
        ("file,race\n", "line 1: the header is ['file', 'race']; needed is name"),
        ("name,race\np0/0.jpg,a,b\n", "line 2: 3 columns; the header has 2"),
        ("name,race\np0/0.jpg,a\np0/0.jpg,b\n", "line 3: 'p0/0.jpg' is there twice"),
        ("name,race,race\n", "every column needs a name of its own"),
        ("", "the header is []"),
    ]:
        groups.write_text(text)
        assert main([*arguments, "--groups", str(groups)]) == 2
        assert words in capsys.readouterr().err


def test_one_person_only_leaves_no_tar() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 4))
    (one,) = evaluate_groups(rows, np.zeros(5, int), {}, [0.1], show_progress=False)["all"]
    assert np.isnan(one.tar)
    assert (one.num_genuine, one.num_impostors) == (10, 0)
