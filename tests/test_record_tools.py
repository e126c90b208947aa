"""Tools that copy, spoil, unpack, align and fetch: what comes out is exactly what was promised."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from data.alignment import align
from data.datasets import DataError, RecordDataset
from data.decode import decode_image
from data.index import read_index
from data.recordio import RecordReader, class_of, pack_record, unpack_record
from data.tools.encode import encode_jpeg
from data.tools.image_records import ImageRecords, relabeled
from data.tools.manifest import manifest_path, verify_records
from data.tools.record_writer import IM2REC, INSIGHTFACE, RecordSetWriter
from data.tools.workers import ordered_map
from eval.verification_sets import load_verification_set
from scripts import align as align_tool
from scripts import fetch_lfw, make_noise, pack, shuffle_rec, unpack
from utils.files import TEMPORARY, atomic_write

ROOT = Path(__file__).resolve().parent.parent
WIDE = 2**24 + 3


def write_set(out: Path, labels: list[int], style: str = INSIGHTFACE, size: int = 24) -> Path:
    """A record set of one JPEG per label, all different."""
    with RecordSetWriter(out, size, style=style) as writer:
        for i, label in enumerate(labels):
            pixels = np.full((size, size, 3), (i * 7 % 256, i // 37, 90), np.uint8)
            writer.add(simplejpeg.encode_jpeg(pixels), label)
        writer.finish()
    return out


def multiset(folder: Path) -> Counter[tuple[int, str]]:
    records = ImageRecords(folder)
    return Counter((r.class_id, hashlib.sha1(r.image).hexdigest()) for r in records)


def images_in_order(folder: Path) -> list[bytes]:
    return [bytes(record.image) for record in ImageRecords(folder)]


def is_verified(folder: Path) -> bool:
    reader = RecordReader(folder / "train.rec")
    index = read_index(folder / "train.idx", reader.size)
    return not list(verify_records(reader, index, manifest_path(reader.path)))


# ---------------------------------------------------------------- shuffle_rec


@pytest.mark.parametrize("style", [INSIGHTFACE, IM2REC])
def test_shuffling_keeps_the_multiset_the_style_and_the_files_beside(
    style: str, tmp_path: Path
) -> None:
    labels = [*(i // 4 for i in range(199)), WIDE]
    data = write_set(tmp_path / "faces", labels, style)
    (data / "lfw.bin").write_bytes(b"a verification set")
    (data / "train.lst").write_text("0\t0\ta.jpg\n")
    assert shuffle_rec.main([str(data)]) == 0
    out = tmp_path / "shuffled_faces"
    assert multiset(out) == multiset(data)
    assert images_in_order(out) != images_in_order(data)
    assert ImageRecords(out).style == style
    first = 1 if style == INSIGHTFACE else 0
    assert ImageRecords(out).keys.tolist() == list(range(first, first + 200))
    for name in ("lfw.bin", "train.lst", "property"):
        assert (out / name).read_bytes() == (data / name).read_bytes()
    assert is_verified(out)
    assert len(RecordDataset(out, input_size=24)) == 200


def test_the_order_depends_on_the_seed_and_not_on_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_set(tmp_path / "faces", [i // 5 for i in range(300)])
    shuffle_rec.shuffle_records(data, tmp_path / "a")
    shuffle_rec.shuffle_records(data, tmp_path / "c", seed=1)
    size = (data / "train.rec").stat().st_size
    monkeypatch.setattr(shuffle_rec, "_MIB", size // 5)  # six files on disk
    shuffle_rec.shuffle_records(data, tmp_path / "b", memory_mib=1)
    assert (tmp_path / "a" / "train.rec").read_bytes() == (
        tmp_path / "b" / "train.rec"
    ).read_bytes()
    assert images_in_order(tmp_path / "a") != images_in_order(tmp_path / "c")
    assert multiset(tmp_path / "c") == multiset(data)


def test_every_place_is_equally_likely(tmp_path: Path) -> None:
    data = write_set(tmp_path / "faces", [0] * 400)
    before = {image: i for i, image in enumerate(images_in_order(data))}
    assert len(before) == 400
    shuffle_rec.shuffle_records(data, tmp_path / "out")
    places = np.array([before[image] for image in images_in_order(tmp_path / "out")])
    assert abs(np.corrcoef(places, np.arange(400))[0, 1]) < 0.15
    assert (np.abs(np.diff(places)) < 10).mean() < 0.15  # neighbors are parted


def test_a_faulty_disk_is_noticed_and_the_copy_is_not_left_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_set(tmp_path / "faces", [0, 0, 1])
    frame = shuffle_rec.RecordSetWriter.add_payload

    def damage(
        self: RecordSetWriter, payload: bytes, class_id: int, key: int | None = None
    ) -> None:
        frame(self, payload[:-1] + bytes([payload[-1] ^ 1]), class_id, key)

    monkeypatch.setattr(shuffle_rec.RecordSetWriter, "add_payload", damage)
    with pytest.raises(DataError, match="what was read back is not what was written"):
        shuffle_rec.shuffle_records(data, tmp_path / "out")
    assert not (tmp_path / "out" / "train.idx").exists()


def test_a_set_is_never_shuffled_in_place_nor_over_another(tmp_path: Path) -> None:
    data = write_set(tmp_path / "faces", [0, 1])
    assert shuffle_rec.main([str(data), str(data)]) == 2
    other = write_set(tmp_path / "other", [0])
    before = (other / "train.rec").read_bytes()
    assert shuffle_rec.main([str(data), str(other)]) == 2
    assert (other / "train.rec").read_bytes() == before


def test_shuffling_shows_how_much_of_its_work_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shuffle_rec.shuffle_records(write_set(tmp_path / "faces", [0, 0, 1, 1]), tmp_path / "out")
    assert "12/12 " in capsys.readouterr().err  # every record read, written, read again


@pytest.mark.parametrize("tool", ["shuffle_rec", "make_noise"])
def test_ctrl_c_leaves_nothing_behind(tool: str, tmp_path: Path) -> None:
    data = write_set(tmp_path / "faces", [0, 0, 1, 1])
    code = f"""
import os, signal, sys
from data.tools import record_writer
from scripts import {tool} as tool
add = record_writer.RecordSetWriter.add_payload
def stop(self, *args):
    add(self, *args)
    os.kill(os.getpid(), signal.SIGINT)
record_writer.RecordSetWriter.add_payload = stop
sys.exit(tool.main(sys.argv[1:]))
"""
    options = ["--flip", "0.5"] if tool == "make_noise" else []
    command = [sys.executable, "-c", code, str(data), str(tmp_path / "out"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert "stopped; nothing was written" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces"]


def test_without_a_property_the_images_say_their_size(tmp_path: Path) -> None:
    data = write_set(tmp_path / "faces", [0, 1, 1], size=40)
    (data / "property").unlink()
    shuffle_rec.shuffle_records(data, tmp_path / "shuffled")
    make_noise.make_noise(data, tmp_path / "noisy", flip=0.5)
    for name in ("shuffled", "noisy"):
        assert (tmp_path / name / "property").read_text() == "2,40,40\n"


# ---------------------------------------------------------------- unpack


def test_unpacking_and_packing_again_gives_the_same_records(tmp_path: Path) -> None:
    data = write_set(tmp_path / "faces", [0, 0, 1, 2, WIDE], IM2REC)
    assert unpack.main([str(data), str(tmp_path / "files")]) == 0
    assert (
        pack.main([str(tmp_path / "files" / "train.lst"), str(tmp_path / "again"), "--size", "24"])
        == 0
    )
    for name in ("train.rec", "train.idx", "train.manifest"):
        assert (tmp_path / "again" / name).read_bytes() == (data / name).read_bytes()


def test_unpacked_classes_get_their_names(tmp_path: Path) -> None:
    data = write_set(tmp_path / "faces", [0, 1])
    (data / "label_map.txt").write_text("0\tann\n1\tbob\n")
    unpack.unpack(data, tmp_path / "files")
    assert sorted(p.name for p in (tmp_path / "files").iterdir()) == ["ann", "bob", "train.lst"]
    image = images_in_order(data)[1]
    assert (tmp_path / "files" / "bob" / "2.jpg").read_bytes() == image


@pytest.mark.parametrize("name", ["../evil", "..", "", "/etc", "a/b", ".hidden"])
def test_a_hostile_class_name_leads_nowhere(name: str, tmp_path: Path) -> None:
    data = write_set(tmp_path / "faces", [0])
    (data / "label_map.txt").write_text(f"0\t{name}\n")
    with pytest.raises(DataError, match="is no folder"):
        unpack.unpack(data, tmp_path / "files")


def test_two_classes_of_one_name_are_not_mixed(tmp_path: Path) -> None:
    data = write_set(tmp_path / "faces", [0, 1])
    (data / "label_map.txt").write_text("0\tann\n1\tann\n")
    with pytest.raises(DataError, match="'ann' names 2 classes"):
        unpack.unpack(data, tmp_path / "files")


def test_an_interrupted_unpacking_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_set(tmp_path / "faces", [0, 0, 1])
    written: list[Path] = []

    def write(path: Path, *, durable: bool) -> Any:
        if len(written) == 2:
            (path.parent / f".a.jpg.12{TEMPORARY}").touch()  # as a killed process leaves it
            raise KeyboardInterrupt
        written.append(path)
        return atomic_write(path, durable=durable)

    with monkeypatch.context() as patch:
        patch.setattr(unpack, "atomic_write", write)
        assert unpack.main([str(data), str(tmp_path / "files")]) == 130
    assert not (tmp_path / "files").exists()
    assert unpack.main([str(data), str(tmp_path / "files")]) == 0
    files = sorted((tmp_path / "files").rglob("*.jpg"))
    assert [path.read_bytes() for path in files] == images_in_order(data)
    everything = [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
    assert sorted(path.name for path in everything if path not in files) == ["train.lst"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faces", "files"]


# ---------------------------------------------------------------- make_noise


@settings(max_examples=60)
@given(
    classes=st.lists(st.integers(0, 9), min_size=2, max_size=80).filter(lambda c: len(set(c)) > 1),
    share=st.floats(0, 1),
    seed=st.integers(0, 5),
)
def test_flipping_changes_exactly_the_share_to_other_classes_of_the_set(
    classes: list[int], share: float, seed: int
) -> None:
    before = np.array(classes)
    after = make_noise.flip_labels(before, share, seed)
    assert (after != before).sum() == round(share * len(before))
    assert set(after.tolist()) <= set(classes)


def test_flips_are_spread_evenly_over_the_other_classes() -> None:
    before = np.zeros(20_000, np.int64)
    before[:10] = range(10)
    counts = np.bincount(make_noise.flip_labels(before, 1.0, seed=0)[10:], minlength=10)
    assert counts[0] == 0
    assert abs(counts[1:] - counts[1:].mean()).max() < 5 * counts[1:].mean() ** 0.5


@settings(max_examples=60)
@given(
    classes=st.lists(st.integers(0, 9), min_size=1, max_size=80),
    share=st.floats(0, 1),
    parts=st.integers(2, 4),
)
def test_splitting_keeps_people_apart_and_makes_dense_new_classes(
    classes: list[int], share: float, parts: int
) -> None:
    before = np.array(classes)
    after = make_noise.split_classes(before, share, parts, seed=0)
    present = np.unique(before)
    new = np.unique(after[after > before.max()])
    assert new.tolist() == list(range(before.max() + 1, before.max() + 1 + len(new)))
    for label in np.unique(after):  # no class mixes two people
        assert len(np.unique(before[after == label])) == 1
    pieces = [np.unique(after[before == label], return_counts=True)[1] for label in present]
    assert sum(len(p) > 1 for p in pieces) <= round(share * len(present))
    for piece, label in zip(pieces, present.tolist(), strict=True):
        assert len(piece) in (1, min(parts, (before == label).sum()))
        assert np.ptp(piece) <= 1  # split evenly


def test_the_published_share_gives_the_published_number_of_classes() -> None:
    classes = np.repeat(np.arange(61_797), 4)
    after = make_noise.split_classes(classes, 20_000 / 61_797, parts=3, seed=0)
    assert len(np.unique(after)) == 101_797  # a tenth of WF12M-Conflict's 1,017,970


@pytest.mark.parametrize("style", [INSIGHTFACE, IM2REC])
@pytest.mark.parametrize("options", [["--flip", "0.4"], ["--conflict", "0.5"]])
def test_noise_changes_labels_as_it_says_and_no_image(
    options: list[str], style: str, tmp_path: Path
) -> None:
    data = write_set(tmp_path / "faces", [i // 6 for i in range(60)], style)
    assert make_noise.main([str(data), str(tmp_path / "out"), *options]) == 0
    out = tmp_path / "out"
    assert images_in_order(out) == images_in_order(data)
    before = {r.key: r.class_id for r in ImageRecords(data)}
    after = {r.key: r.class_id for r in ImageRecords(out)}
    lines = (out / "noise.tsv").read_text().splitlines()[1:]
    truth = {int(key): (int(given), int(true)) for key, given, true in map(str.split, lines)}
    assert truth == {k: (after[k], before[k]) for k in before if after[k] != before[k]}
    assert len(truth) == (24 if "--flip" in options else len(truth))
    assert len(truth) > 0
    source = RecordDataset(out, input_size=24)
    assert source.num_classes == max(after.values()) + 1
    assert is_verified(out)


def test_labels_are_never_spoilt_in_place(tmp_path: Path) -> None:
    data = write_set(tmp_path / "faces", [0, 1])
    before = (data / "train.rec").read_bytes()
    assert make_noise.main([str(data), str(data), "--flip", "1", "--force"]) == 2
    assert (data / "train.rec").read_bytes() == before


@pytest.mark.parametrize("options", [["--flip", "1.2"], ["--conflict", "-1"], []])
def test_an_impossible_share_ends_with_exit_code_2(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        make_noise.main([str(tmp_path), str(tmp_path / "out"), *options])
    assert stop.value.code == 2


@pytest.mark.parametrize("old", [3, WIDE])
@pytest.mark.parametrize("new", [0, WIDE + 2])
@pytest.mark.parametrize("vector", [False, True])
def test_relabeling_changes_the_class_and_nothing_else(old: int, new: int, vector: bool) -> None:
    label = [old, 0.5] if vector else old
    after, image = unpack_record(relabeled(pack_record(b"image", label, 7), new))
    assert (class_of(after), after.id, bytes(image)) == (new, 7, b"image")
    assert after.labels[1:].tolist() == ([0.5] if vector else [])


# ---------------------------------------------------------------- align


def landmarks(shared: Path) -> Path:
    return shared / "data" / "ijbc_layout" / "meta" / "ijbc_name_5pts_score.txt"


def test_real_photographs_are_aligned_as_the_formula_says(shared_dir: Path, tmp_path: Path) -> None:
    images = shared_dir / "data" / "ijbc_layout" / "loose_crop"
    some = tmp_path / "some.txt"
    some.write_text("".join(landmarks(shared_dir).read_text().splitlines(keepends=True)[:9]))
    for suffix, options in {".jpg": [], ".png": ["--png"]}.items():
        out = tmp_path / suffix[1:]
        assert align_tool.main([str(images), str(some), str(out), *options]) == 0
        for line in some.read_text().splitlines():
            name, *numbers = line.split()
            photograph = decode_image((images / name).read_bytes(), name)
            expected = align(photograph, np.array(numbers[:10], float).reshape(5, 2))
            written = (out / name).with_suffix(suffix).read_bytes()
            if suffix == ".jpg":
                assert written == encode_jpeg(expected)
            else:
                np.testing.assert_array_equal(decode_image(written, name), expected)


def test_aligned_faces_look_alike(shared_dir: Path, tmp_path: Path) -> None:
    """The mean face of aligned photographs has eyes: darker than the cheeks below them."""
    images = shared_dir / "data" / "ijbc_layout" / "loose_crop"
    out = tmp_path / "out"
    arguments = [str(images), str(landmarks(shared_dir)), str(out), "--num-thread", "2"]
    assert align_tool.main(arguments) == 0
    files = sorted(out.iterdir())
    assert len(files) == 627
    mean = np.mean([decode_image(p.read_bytes(), "face") for p in files[::10]], axis=0).mean(-1)
    for x, y in ((38, 52), (74, 52)):
        assert (
            mean[y - 2 : y + 3, x - 3 : x + 4].mean() + 15
            < mean[y + 14 : y + 20, x - 3 : x + 4].mean()
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg 1 2 3\n", "line 1: expected a path and ten numbers"),
        ("../a.jpg" + " 1" * 10 + "\n", "leads out of the folder"),
        ("/a.jpg" + " 1" * 10 + "\n", "leads out of the folder"),
        ("a.jpg 1 2 3 4 5 6 7 8 9 10\n" * 2, "line 2: 'a.jpg' a second time"),
        ("", "lists no image"),
        ("a.jpg" + " 1" * 10 + "\na.png" + " 1" * 10, "differ only in their suffix"),
        (
            "a.jpg 1 2 3 4 5 6 7 8 9 10\n",
            r"1 of 1 images cannot be aligned:\n.*a\.jpg: cannot be read",
        ),
    ],
)
def test_landmarks_that_cannot_be_used_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        align_tool.align_folder(tmp_path, tmp_path / "l.txt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_photographs_are_left_out_only_when_asked(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "good.png"), np.full((200, 200, 3), 90, np.uint8))
    (tmp_path / "bad.png").write_bytes(b"no image")
    points = "70,80,110,80,90,100,75,120,105,120"
    (tmp_path / "l.csv").write_text(f"file,x1\ngood.png,{points}\nbad.png,{points}\n")
    arguments = [str(tmp_path), str(tmp_path / "l.csv"), str(tmp_path / "out")]
    assert align_tool.main(arguments) == 2
    assert align_tool.main([*arguments, "--skip-bad"]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.jpg"]


# ---------------------------------------------------------------- fetch_lfw


@pytest.fixture
def lfw(tmp_path: Path) -> Path:
    """LFW as its releases are laid out: 3 people with 5 images, 24 with 2, two folds of pairs."""
    source = tmp_path / "lfw_home"
    names = [f"Many_{i}" for i in range(3)] + [f"Few_{i:02d}" for i in range(24)]
    for person, name in enumerate(names):
        for number in range(1, 6 if name.startswith("Many") else 3):
            path = source / "lfw_funneled" / name / f"{name}_{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.full((250, 250, 3), 100, np.uint8)
            pixels[69:181, 69:181] = (person * 9, number * 40, 0)
            path.write_bytes(simplejpeg.encode_jpeg(pixels, quality=95))
    lines = ["2\t6"]
    for fold in range(2):
        few = [f"Few_{12 * fold + i:02d}" for i in range(12)]
        lines += [f"{name}\t1\t2" for name in few[:5]]
        lines += [f"Many_{fold}\t1\t2"]
        lines += [f"{few[i]}\t1\t{few[i + 6]}\t2" for i in range(5)]
        lines += [f"Many_0\t{fold + 1}\t{few[fold]}\t1"]
    (source / "pairs.txt").write_text("\n".join(lines) + "\n")
    return source


def test_people_with_many_images_are_packed_and_the_others_paired(
    lfw: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert fetch_lfw.main([str(out), "--source", str(lfw), "--min-images", "5"]) == 0
    source = RecordDataset(out)
    assert (len(source), source.num_classes) == (15, 3)
    assert (out / "label_map.txt").read_text() == "0\tMany_0\n1\tMany_1\n2\tMany_2\n"
    image, label = source.read(14)
    assert label == 2
    assert image.shape == (112, 112, 3)
    assert abs(image.reshape(-1, 3).mean(0) - (18, 200, 0)).max() < 4  # the middle, nothing else
    pairs = load_verification_set(out / "lfw_part.bin", input_size=112)
    assert pairs.issame.tolist() == ([True] * 5 + [False] * 5) * 2


def test_nobody_is_in_training_and_in_the_pairs(lfw: Path, tmp_path: Path) -> None:
    pairs = fetch_lfw.balanced_folds(
        fetch_lfw.read_pairs(lfw / "pairs.txt"), 2, {"Many_0", "Many_1", "Many_2"}
    )
    names = {name for pair in pairs for name, _ in (pair.first, pair.second)}
    assert all(name.startswith("Few") for name in names)


def test_a_real_local_copy_with_finished_pairs_is_taken(shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "data" / "lfw112"
    out = tmp_path / "out"
    assert fetch_lfw.main([str(out), "--source", str(source), "--min-images", "60"]) == 0
    records = RecordDataset(out)
    names = [line.split("\t")[1] for line in (out / "label_map.txt").read_text().splitlines()]
    folders = {p.name: len(list(p.iterdir())) for p in (source / "train").iterdir()}
    assert names == sorted(name for name, count in folders.items() if count >= 60)
    assert len(records) == sum(count for count in folders.values() if count >= 60)
    assert (out / "lfw_part.bin").read_bytes() == (source / "lfw_part.bin").read_bytes()


def test_the_download_is_scikit_learns(
    lfw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("sklearn.datasets")

    def pretend(data_home: str, funneled: bool, min_faces_per_person: int) -> None:
        assert funneled
        lfw.rename(Path(data_home) / "lfw_home")

    monkeypatch.setattr(datasets, "fetch_lfw_people", pretend)
    assert fetch_lfw.main([str(tmp_path / "out"), "--min-images", "5"]) == 0
    assert len(RecordDataset(tmp_path / "out")) == 15


GONE = "2\t1\n" + "Few_00\t1\t9\nFew_00\t1\tFew_01\t1\n" * 2


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda lfw: (lfw / "pairs.txt").unlink(), "neither pairs.txt"),
        (lambda lfw: (lfw / "lfw_funneled").rename(lfw / "else"), "no NAME/NAME_0001.jpg"),
        (lambda lfw: (lfw / "pairs.txt").write_text(GONE), "Few_00_0009.jpg does not exist"),
    ],
)
def test_an_incomplete_copy_is_an_error_and_leaves_nothing(
    prepare: object, message: str, lfw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(lfw)  # type: ignore[operator]
    out = tmp_path / "out"
    assert fetch_lfw.main([str(out), "--source", str(lfw), "--min-images", "5"]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists() or list(out.iterdir()) == []


# ---------------------------------------------------------------- workers


# `eval` is a function that workers find without importing this module and all it imports.
PROCESS = "__import__('os').getpid()"


def test_processes_hand_results_back_in_order() -> None:
    tasks = (f"({i} * {i}, {PROCESS})" for i in range(50))
    results = list(ordered_map(eval, tasks, 2))
    assert [number for number, _ in results] == [i * i for i in range(50)]
    assert os.getpid() not in {process for _, process in results}


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal, sys\n"
        "from data.tools.workers import ordered_map\n"
        "if __name__ == '__main__':\n"
        f"    for pid in ordered_map(eval, [{PROCESS!r}] * 10**6, 2):\n"
        "        print(pid, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=60
    )  # stdout is shared with the workers: this returns only when they have ended, too
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split()[0].isdigit()
