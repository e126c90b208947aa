"""The doctor names what is wrong with a set, finds nothing in a good one, and changes nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.datasets import RecordDataset
from data.decode import decode_image
from data.index import read_index
from data.pairs import write_verification_set
from data.recordio import PART_HEADER, RECORD_HEADER, RecordReader, pack_range, pack_record
from data.tools.image_records import ImageRecords
from data.tools.record_writer import IM2REC, INSIGHTFACE, RecordSetWriter
from data.tools.scan import Damage, rebuild_index, scan_on
from scripts import doctor
from tests.helpers import GOLDEN
from tests.record_helpers import RecordWriter

SIZE = 24
LABELS = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]


def picture(number: int, size: int = SIZE) -> bytes:
    pixels = cv2.resize(
        np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8), (size, size)
    )
    return simplejpeg.encode_jpeg(pixels)


def write_set(
    out: Path,
    labels: list[int] | None = None,
    images: dict[int, bytes] | None = None,
    style: str = INSIGHTFACE,
) -> Path:
    """A set of drawn pictures; `images` replaces some by position."""
    with RecordSetWriter(out, SIZE, style=style) as writer:
        for i, label in enumerate(labels or LABELS):
            writer.add((images or {}).get(i) or picture(i), label)
        writer.finish([f"name{i}" for i in range(max(labels or LABELS) + 1)])
    return out


def examine(data: Path, *options: object, tmp: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of a run."""
    path = tmp / "report.json"
    histogram = tmp / "histogram.png"
    arguments = [data, "--json", path, "--histogram", histogram, *options]
    code = doctor.main([str(a) for a in arguments])
    return code, json.loads(path.read_text())


def problems(report: dict[str, Any]) -> dict[str, Any]:
    return {f["check"]: f for f in report["findings"] if f["severity"] == "problem"}


def content(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha1(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(params=[INSIGHTFACE, IM2REC])
def healthy(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", style=request.param)


def test_a_good_set_is_healthy_and_untouched(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(healthy)
    code, report = examine(healthy, tmp=tmp_path)
    assert (code, report["healthy"], problems(report)) == (0, True, {})
    facts = report["facts"]
    assert (facts["num_images"], facts["num_classes"], facts["singletons"]) == (10, 4, 0)
    assert facts["size_pixels"] == f"{SIZE} x {SIZE}"
    assert facts["images_decoded"] == "all 10"
    assert "0 differ" in facts["manifest"]
    assert content(healthy) == before
    assert decode_image((tmp_path / "histogram.png").read_bytes(), "plot").shape[1] > 300
    text = capsys.readouterr().out
    assert "num images: 10" in text
    assert text.rstrip().endswith("healthy")


def test_json_goes_to_stdout_when_no_file_is_named(
    healthy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in ([str(healthy), "--json"], ["--json", str(healthy)]):
        assert doctor.main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["healthy"] is True
    assert (tmp_path / "set_classes.png").exists()


@pytest.mark.parametrize(
    "name",
    ["insightface_style", "im2rec_scalar_label", "im2rec_vector_label", "im2rec_first_key_1"],
)
def test_records_of_mxnet_are_structurally_healthy(name: str, tmp_path: Path) -> None:
    golden = GOLDEN / "recordio" / f"{name}.rec"
    _, report = examine(golden, tmp=tmp_path)
    found = set(problems(report)) - {"images", "sizes", "duplicates", "conflicts"}
    assert found == set()


def patch_bytes(path: Path, at: int, new: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[at : at + len(new)] = new
    path.write_bytes(whole)


def place(data: Path, key: int) -> int:
    index = read_index(data / "train.idx", (data / "train.rec").stat().st_size)
    return int(index.offsets[index.keys.tolist().index(key)])


def drop_manifest(data: Path) -> Path:
    """Most checks are to be seen without the manifest's help."""
    (data / "train.manifest").unlink()
    return data


def test_an_image_that_does_not_decode_is_named(tmp_path: Path) -> None:
    data = drop_manifest(write_set(tmp_path / "set", images={4: picture(4)[:200]}))
    code, report = examine(data, tmp=tmp_path)
    assert code == 1
    assert list(problems(report)) == ["images"]
    assert "record with key 5 at byte" in problems(report)["images"]["examples"][0]


def test_another_size_is_named(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", images={4: picture(4, size=30)})
    code, report = examine(data, tmp=tmp_path)
    assert (code, list(problems(report))) == (1, ["sizes"])
    assert "30 x 30 pixels where most are 24 x 24" in problems(report)["sizes"]["message"]
    assert "key 5" in problems(report)["sizes"]["examples"][0]


def test_gray_images_are_noted(tmp_path: Path) -> None:
    gray = simplejpeg.encode_jpeg(np.full((SIZE, SIZE, 1), 7, np.uint8), colorspace="GRAY")
    data = write_set(tmp_path / "set", images={4: gray})
    code, report = examine(data, tmp=tmp_path)
    assert code == 0
    assert "1 of 10 images are gray" in report["findings"][0]["message"]


def test_gaps_are_problems_and_singletons_notes(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", labels=[0, 0, 1, 4, 4, 6, 6])
    code, report = examine(data, tmp=tmp_path)
    assert (code, list(problems(report))) == (1, ["gaps"])
    assert problems(report)["gaps"]["examples"] == ["2 to 3", "5"]
    assert report["facts"]["singletons"] == 1
    assert report["facts"]["empty_classes_below_the_largest"] == 3
    assert examine(data, "--allow", "gaps", tmp=tmp_path)[0] == 0


def test_duplicates_within_a_class_and_across_classes_are_told_apart(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", images={1: picture(0), 5: picture(3), 9: picture(3)})
    code, report = examine(data, tmp=tmp_path)
    assert (code, set(problems(report))) == (1, {"duplicates", "conflicts"})
    assert problems(report)["duplicates"]["examples"] == ["key 1 (class 0) and key 2 (class 0)"]
    assert problems(report)["conflicts"]["examples"] == [
        "key 4 (class 1) and key 6 (class 2)",
        "key 6 (class 2) and key 10 (class 3)",
    ]
    assert report["facts"]["copies_of_another_image"] == 3


def test_images_and_people_of_a_verification_set_are_found(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set")
    clean = [picture(i) for i in range(100, 140)]
    write_verification_set(tmp_path / "clean.bin", clean, [True] * 20)
    write_verification_set(tmp_path / "dirty.bin", [picture(5), *clean[1:]], [True] * 20)
    (tmp_path / "pairs.txt").write_text("name2 1 2\nother 1 name9 2\n")
    folder = tmp_path / "folder" / "name1"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(picture(8))
    assert examine(data, "--against", tmp_path / "clean.bin", tmp=tmp_path)[0] == 0
    code, report = examine(data, "--against", tmp_path / "dirty.bin", tmp=tmp_path)
    assert code == 1
    assert problems(report)["overlap"]["examples"] == ["key 6, class 2 (name2)"]
    code, report = examine(data, "--against", tmp_path / "pairs.txt", tmp=tmp_path)
    assert (code, problems(report)["overlap"]["examples"]) == (1, ["name2"])
    code, report = examine(data, "--against", tmp_path / "folder", tmp=tmp_path)
    found = [f["examples"] for f in report["findings"] if f["check"] == "overlap"]
    assert (code, found) == (1, [["key 9, class 3 (name3)"], ["name1"]])


def test_real_people_of_training_and_verification_do_not_overlap(
    shared_dir: Path, tmp_path: Path
) -> None:
    from scripts.pack import list_folder, pack_listing

    lfw = shared_dir / "data" / "lfw112"
    pack_listing(list_folder(lfw / "train", ("A*", "B*")), tmp_path / "set")
    options = ("--against", lfw / "lfw_part.bin", "--against", lfw / "lfw_part_pairs.txt")
    code, report = examine(tmp_path / "set", *options, tmp=tmp_path)
    assert "overlap" not in problems(report)
    assert code == (1 if problems(report) else 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3,24,24\n", "says 3 classes, the labels need 4"),
        ("4,112,112\n", "says 112 x 112 pixels, images are 24 x 24"),
        ("four\n", "num_classes,height,width"),
    ],
)
def test_a_property_that_disagrees_is_a_problem(text: str, message: str, tmp_path: Path) -> None:
    data = write_set(tmp_path / "set")
    (data / "property").write_text(text)
    code, report = examine(data, tmp=tmp_path)
    assert (code, list(problems(report))) == (1, ["property"])
    assert message in problems(report)["property"]["message"]


def test_a_property_with_more_classes_is_a_note(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set")
    (data / "property").write_text("8,24,24\n")
    code, report = examine(data, tmp=tmp_path)
    assert (code, [f["check"] for f in report["findings"]]) == (0, ["property"])


def test_a_header_record_that_counts_wrongly_is_a_problem(tmp_path: Path) -> None:
    data = drop_manifest(write_set(tmp_path / "set"))
    patch_bytes(data / "train.rec", PART_HEADER.size, pack_range(9, 15))
    code, report = examine(data, tmp=tmp_path)
    assert code == 1
    assert "says (9, 15)" in problems(report)["header"]["message"]
    assert "(11, 15)" in problems(report)["header"]["message"]


def test_an_identity_record_that_points_elsewhere_is_a_problem(tmp_path: Path) -> None:
    data = drop_manifest(write_set(tmp_path / "set"))
    patch_bytes(data / "train.rec", place(data, 12) + PART_HEADER.size, pack_range(4, 7, 12))
    code, report = examine(data, tmp=tmp_path)
    assert (code, list(problems(report))) == (1, ["identities"])
    (example,) = problems(report)["identities"]["examples"]
    assert example == "key 12, class 1: says keys [4, 7), its images are [4, 6)"


@pytest.mark.parametrize("label", [1.5, -1.0, float("nan"), 2.0**24 + 2])
def test_a_label_that_is_no_class_is_named(label: float, tmp_path: Path) -> None:
    data = drop_manifest(write_set(tmp_path / "set", style=IM2REC))
    patch_bytes(
        data / "train.rec", place(data, 2) + PART_HEADER.size + 4, np.float32(label).tobytes()
    )
    code, report = examine(data, tmp=tmp_path)
    assert (code, list(problems(report))) == (1, ["labels"])
    assert "record with key 2 at byte" in problems(report)["labels"]["examples"][0]


def change_index(data: Path, change: Callable[[list[str]], list[str]]) -> None:
    lines = (data / "train.idx").read_text().splitlines(keepends=True)
    (data / "train.idx").write_text("".join(change(lines)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "does not list a record"),
        (lambda lines: [*lines[:3], "3\t4\n", *lines[4:]], "points where no record starts"),
        (lambda lines: [*lines[:3], lines[4].replace("4", "3", 1), *lines[4:]], "a second time"),
        (lambda lines: [*lines[:3], "garbage\n"], "expected 'key<tab>offset'"),
        (lambda lines: [], "the index is empty"),
    ],
)
def test_an_index_that_disagrees_with_the_records_is_a_problem(
    change: Callable[[list[str]], list[str]], message: str, tmp_path: Path
) -> None:
    data = drop_manifest(write_set(tmp_path / "set"))
    change_index(data, change)
    code, report = examine(data, tmp=tmp_path)
    assert code == 1
    assert any(message in f["message"] for f in report["findings"] if f["check"] == "index")
    assert report["facts"]["num_images"] == 10


def test_damaged_framing_is_named_and_the_rest_examined(tmp_path: Path) -> None:
    data = drop_manifest(write_set(tmp_path / "set"))
    patch_bytes(data / "train.rec", place(data, 4), b"\0\0\0\0")
    code, report = examine(data, tmp=tmp_path)
    assert code == 1
    assert report["facts"]["num_images"] == 9
    assert f"at byte {place(data, 4)}" in problems(report)["records"]["examples"][0]


@pytest.mark.parametrize("mutate", ["label", "image", "padding"])
def test_verify_names_what_no_reader_sees(
    mutate: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = 7
    image = picture(key - 1)
    image += b"\0" * ((1 - len(image)) % 4)  # one byte more than a multiple: padded by three
    data = write_set(tmp_path / "set", images={key - 1: image})
    at = place(data, key)
    if mutate == "label":
        patch_bytes(data / "train.rec", at + PART_HEADER.size + 4, np.float32(1).tobytes())
    elif mutate == "image":
        byte = at + PART_HEADER.size + RECORD_HEADER.size + len(image) // 2
        patch_bytes(data / "train.rec", byte, bytes([image[len(image) // 2] ^ 4]))
    else:
        length = RECORD_HEADER.size + len(image)
        patch_bytes(data / "train.rec", at + 4, (length + 2).to_bytes(4, "little"))
    assert len(RecordDataset(data, input_size=SIZE)) == 10
    RecordDataset(data, input_size=SIZE).read_encoded(key - 1)
    assert doctor.main([str(data), "--verify"]) == 1
    text = capsys.readouterr().out
    assert "key 7: changed: " in text
    assert text.count("key ") == 1
    assert f"at byte {at}" in text


def test_verify_passes_a_good_set_and_needs_a_manifest(
    healthy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main([str(healthy), "--verify"]) == 0
    drop_manifest(healthy)
    assert doctor.main([str(healthy), "--verify"]) == 2
    assert "nothing to verify against" in capsys.readouterr().err


def test_verify_names_every_record_however_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_set(tmp_path / "set", labels=[0] * 300, images={i: b"x%d" % i for i in range(300)})
    other = write_set(tmp_path / "b", labels=[0] * 300, images={i: b"y%d" % i for i in range(300)})
    (data / "train.rec").write_bytes((other / "train.rec").read_bytes())
    assert doctor.main([str(data), "--verify"]) == 1
    assert capsys.readouterr().out.count("changed: its bytes differ") == 300


# ---------------------------------------------------------------- index and salvage


@pytest.mark.parametrize(
    "name",
    [
        "insightface_style",
        "im2rec_scalar_label",
        "im2rec_vector_label",
        "im2rec_first_key_1",
        "magic_inside",
    ],
)
def test_the_rebuilt_index_is_mxnets(name: str, tmp_path: Path) -> None:
    golden = GOLDEN / "recordio" / f"{name}.rec"
    (tmp_path / "train.rec").write_bytes(golden.read_bytes())
    assert doctor.main([str(tmp_path), "--rebuild-index"]) == 0
    assert (tmp_path / "train.idx").read_bytes() == golden.with_suffix(".idx").read_bytes()


def test_the_rebuilt_index_is_ours(healthy: Path) -> None:
    before = (healthy / "train.idx").read_bytes()
    (healthy / "train.idx").unlink()
    assert doctor.main([str(healthy), "--rebuild-index"]) == 0
    assert (healthy / "train.idx").read_bytes() == before


def test_an_index_that_is_there_is_not_overwritten(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (healthy / "train.idx").write_text("old")
    assert doctor.main([str(healthy), "--rebuild-index"]) == 2
    assert "nothing is changed in place" in capsys.readouterr().err
    assert (healthy / "train.idx").read_text() == "old"
    assert doctor.main([str(healthy), "--rebuild-index", "--out", str(tmp_path / "new.idx")]) == 0


def test_ids_that_do_not_rise_make_no_keys(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "train.rec", tmp_path / "train.idx") as writer:
        for key, record_id in enumerate([5, 5, 1]):
            writer.write(key, pack_record(b"image", 0, record_id))
    index, damages = rebuild_index(RecordReader(tmp_path / "train.rec"))
    assert (index.keys.tolist(), damages) == ([0, 1, 2], [])


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_salvage_yields_every_record_that_was_not_touched(
    data: st.DataObject, tmp_path: Path
) -> None:
    path = tmp_path / "train.rec"
    if not path.exists():
        write_set(tmp_path, images={3: b"12345678\x0a\x23\xd7\xce1234" * 2})
        (tmp_path / "intact").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "intact").read_bytes())
    index = read_index(tmp_path / "train.idx", len(content))
    ends = [*index.offsets.tolist()[1:], len(content)]
    if data.draw(st.booleans(), label="truncate"):
        touched = range(data.draw(st.integers(0, len(content))), len(content))
        del content[touched.start :]
    else:
        at = data.draw(st.integers(0, len(content) - 1))
        touched = range(at, min(len(content), at + data.draw(st.integers(1, 3000))))
        content[touched.start : touched.stop] = bytes(len(touched))
    path.write_bytes(content)
    reader = RecordReader(path)
    places = list(scan_on(reader))
    found = {place.offset for place in places if not isinstance(place, Damage)}
    for begin, end in zip(index.offsets.tolist(), ends, strict=True):
        if end <= touched.start or begin >= touched.stop:
            assert begin in found
    covered = [(p.offset, p.end) for p in places]
    assert all(a[1] == b[0] for a, b in pairwise(covered))
    assert not covered or (covered[0][0], covered[-1][1]) == (0, len(content))


def test_records_too_short_for_a_header_stop_neither_index_nor_mending(tmp_path: Path) -> None:
    data = tmp_path / "set"
    data.mkdir()
    with RecordWriter(data / "train.rec", data / "train.idx") as writer:
        for key, payload in enumerate([b"", b"short", pack_record(picture(1), 0, 2)]):
            writer.write(key, payload)
    before = (data / "train.idx").read_bytes()
    (data / "train.idx").unlink()
    assert doctor.main([str(data), "--rebuild-index"]) == 0
    assert (data / "train.idx").read_bytes() == before
    code, report = examine(data, tmp=tmp_path)
    assert (code, problems(report)["records"]["count"]) == (1, 2)
    assert doctor.main([str(data), "--fix", str(tmp_path / "fixed")]) == 1
    assert [bytes(r.image) for r in ImageRecords(tmp_path / "fixed")] == [picture(1)]


def test_fix_writes_what_can_be_read_to_a_new_set(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", images={1: picture(1)[:150], 5: b"no image"})
    patch_bytes(data / "train.rec", place(data, 4), b"\0\0\0\0")
    (data / "train.idx").unlink()
    (data / "property").write_text("2,112,112\n")
    before = content(data)
    assert doctor.main([str(data), "--fix", str(tmp_path / "fixed")]) == 1  # things were left out
    assert content(data) == before
    kept = [i for i in range(10) if i not in (1, 3, 5)]
    records = list(ImageRecords(tmp_path / "fixed"))
    assert [bytes(r.image) for r in records] == [picture(i) for i in kept]
    assert [r.class_id for r in records] == [LABELS[i] for i in kept]
    assert [r.key for r in records] == list(range(1, 8))
    assert examine(tmp_path / "fixed", tmp=tmp_path)[0] == 0
    assert (tmp_path / "fixed" / "property").read_text() == f"4,{SIZE},{SIZE}\n"


def test_fix_of_a_good_set_is_the_same_set(healthy: Path, tmp_path: Path) -> None:
    assert doctor.main([str(healthy), "--fix", str(tmp_path / "fixed")]) == 0
    assert content(tmp_path / "fixed") == content(healthy)


@pytest.mark.parametrize("options", [["--fix", "{data}"], ["--fix", "{other}"]])
def test_fix_replaces_nothing(options: list[str], healthy: Path, tmp_path: Path) -> None:
    other = write_set(tmp_path / "other")
    before = content(healthy), content(other)
    options = [option.format(data=healthy, other=other) for option in options]
    assert doctor.main([str(healthy), *options]) == 2
    assert (content(healthy), content(other)) == before


@pytest.mark.parametrize("arguments", [[], ["--decode", "some"], ["nowhere", "--allow", "all"]])
def test_impossible_commands_end_with_exit_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        doctor.main(arguments)
    assert stop.value.code == 2


def test_a_missing_set_ends_with_exit_code_2(tmp_path: Path) -> None:
    assert doctor.main([str(tmp_path / "nowhere")]) == 2
