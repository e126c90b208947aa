"""What pack.py and make_synthetic.py write is what went in, readable by old tools, or nothing."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg

from data.datasets import DataError, RecordDataset
from data.decode import decode_image
from data.index import read_index
from data.recordio import RecordReader, class_of, unpack_record
from data.tools.manifest import manifest_path, verify_records
from scripts import make_synthetic as synthetic
from scripts import pack

SIZE = 24


def picture(number: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    rng = np.random.default_rng(number)
    return cv2.resize(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), (width, height))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three people with 2, 3 and 4 JPEGs of the right size."""
    root = tmp_path / "faces"
    for label, name in enumerate(("0_ann", "0_bob", "1_cy")):
        (root / name).mkdir(parents=True)
        for i in range(1, label + 3):
            content = simplejpeg.encode_jpeg(picture(label * 10 + i))
            (root / name / f"{name}_{i:04d}.jpg").write_bytes(content)
    return root


def run(*arguments: object) -> int:
    return pack.main([str(a) for a in arguments])


def files_below(root: Path) -> list[str]:
    return sorted(p.name for p in root.rglob("*") if p.is_file()) if root.exists() else []


def test_jpegs_of_the_right_size_are_packed_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "out", "--size", SIZE) == 0
    source = RecordDataset(tmp_path / "out", input_size=SIZE)
    packed = [(bytes(encoded), label) for encoded, label in map(source.read_encoded, range(9))]
    expected = [
        (path.read_bytes(), label)
        for label, name in enumerate(("0_ann", "0_bob", "1_cy"))
        for path in sorted((folder / name).iterdir())
    ]
    assert packed == expected
    assert (tmp_path / "out" / "property").read_text() == "3,24,24\n"
    label_map = (tmp_path / "out" / "label_map.txt").read_text()
    assert label_map == "0\t0_ann\n1\t0_bob\n2\t1_cy\n"


def test_records_are_insightface_style(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "out", "--size", SIZE) == 0
    reader = RecordReader(tmp_path / "out" / "train.rec")
    index = read_index(tmp_path / "out" / "train.idx", reader.size)
    assert index.keys.tolist() == list(range(13))
    headers = [unpack_record(reader.read_at(int(offset)))[0] for offset in index.offsets]
    assert (headers[0].flag, headers[0].labels.tolist()) == (2, [10, 13])
    assert [h.labels.tolist() for h in headers[10:]] == [[1, 3], [3, 6], [6, 10]]
    assert [h.id for h in headers] == list(range(13))


def test_other_sizes_and_formats_are_cropped_resized_and_encoded(
    folder: Path, tmp_path: Path
) -> None:
    wide = picture(77, height=60, width=100)
    cv2.imwrite(str(folder / "0_ann" / "z.png"), wide[:, :, ::-1])
    assert run(folder, tmp_path / "out", "--size", SIZE) == 0
    image, label = RecordDataset(tmp_path / "out", input_size=SIZE).read(2)
    expected = cv2.resize(wide[:, 20:80], (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    assert label == 0
    assert abs(image.astype(int) - expected).mean() < 3


def test_a_quality_encodes_every_image_anew(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "out", "--size", SIZE, "--quality", 30) == 0
    source = RecordDataset(tmp_path / "out", input_size=SIZE)
    first = sorted((folder / "0_ann").iterdir())[0].read_bytes()
    assert bytes(source.read_encoded(0)[0]) != first


def test_include_takes_only_matching_class_folders(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "out", "--size", SIZE, "--include", "0_*") == 0
    source = RecordDataset(tmp_path / "out", input_size=SIZE)
    assert (len(source), source.num_classes) == (5, 2)


def test_unreadable_images_are_listed_and_nothing_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "0_ann" / "bad.jpg").write_bytes(b"no image")
    (folder / "1_cy" / "cut.jpg").write_bytes(simplejpeg.encode_jpeg(picture(1))[:300])
    assert run(folder, tmp_path / "out", "--size", SIZE) == 2
    message = capsys.readouterr().err
    assert "2 of 11 images cannot be used; nothing was written" in message
    assert "bad.jpg: no image we can decode" in message
    assert "cut.jpg: " in message
    assert files_below(tmp_path / "out") == []


def test_skip_bad_counts_and_lists_what_it_leaves_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "0_ann" / "0_bad.jpg").write_bytes(b"no image")
    assert run(folder, tmp_path / "out", "--size", SIZE, "--skip-bad") == 0
    text = capsys.readouterr().out
    assert "9 images of 3 classes, 0 encoded anew, 1 left out" in text
    assert "0_bad.jpg" in text
    assert len(RecordDataset(tmp_path / "out", input_size=SIZE)) == 9


def test_entries_that_cannot_be_read_are_listed_or_left_out_like_bad_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "0_ann" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "0_bob" / "folder.jpg").mkdir()  # no image, so not counted
    assert run(folder, tmp_path / "out", "--size", SIZE) == 2
    assert "1 of 10 images cannot be used" in capsys.readouterr().err
    assert run(folder, tmp_path / "out", "--size", SIZE, "--skip-bad") == 0
    text = capsys.readouterr().out
    assert "9 images of 3 classes, 0 encoded anew, 1 left out" in text
    assert "gone.jpg: cannot be read (No such file or directory)" in text
    assert len(RecordDataset(tmp_path / "out", input_size=SIZE)) == 9


def test_existing_records_are_replaced_only_by_force(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(folder, out, "--size", SIZE) == 0
    before = hashlib.sha1((out / "train.rec").read_bytes()).digest()
    assert run(folder, out, "--size", SIZE, "--include", "1_*") == 2
    assert "already holds train.rec and train.idx" in capsys.readouterr().err
    assert hashlib.sha1((out / "train.rec").read_bytes()).digest() == before
    assert run(folder, out, "--size", SIZE, "--include", "1_*", "--force") == 0
    assert len(RecordDataset(out, input_size=SIZE)) == 4
    assert files_below(out) == [
        "label_map.txt",
        "property",
        "train.idx",
        "train.manifest",
        "train.rec",
    ]


@pytest.mark.parametrize("options", [["--size", "0"], ["--quality", "101"], ["--num-thread", "0"]])
def test_impossible_options_end_with_exit_code_2(options: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, tmp_path / "out", *options)
    assert stop.value.code == 2


def test_a_missing_folder_ends_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "nowhere", tmp_path / "out") == 2
    assert "nowhere is not a folder" in capsys.readouterr().err


def packed(out: Path) -> list[tuple[int, int, bytes]]:
    """(key, class, image) of every image of a set, in the order of its keys."""
    source = RecordDataset(out, input_size=SIZE)
    read = map(source.read_encoded, range(len(source)))
    return [(int(k), label, bytes(e)) for k, (e, label) in zip(source.keys, read, strict=True)]


def is_verified(out: Path) -> bool:
    reader = RecordReader(out / "train.rec")
    index = read_index(out / "train.idx", reader.size)
    return not list(verify_records(reader, index, manifest_path(reader.path)))


@pytest.mark.parametrize("labels", ["{label}", "{label}.000000"])
def test_an_im2rec_list_keeps_its_keys_labels_and_order(
    labels: str, folder: Path, tmp_path: Path
) -> None:
    rows = [
        (70, 5, "1_cy/1_cy_0001.jpg"),
        (3, 0, "0_ann/0_ann_0002.jpg"),
        (4, 5, "0_bob/0_bob_0001.jpg"),
    ]
    text = "".join(f"{key}\t{labels.format(label=label)}\t{path}\n" for key, label, path in rows)
    (tmp_path / "a.lst").write_text(text)
    out = tmp_path / "out"
    assert run(tmp_path / "a.lst", out, "--root", folder, "--size", SIZE) == 0
    reader = RecordReader(out / "train.rec")
    index = read_index(out / "train.idx", reader.size)
    assert index.keys.tolist() == [70, 3, 4]
    for (key, label, path), offset in zip(rows, index.offsets.tolist(), strict=True):
        header, image = unpack_record(reader.read_at(offset))
        assert (class_of(header), header.id, bytes(image)) == (
            label,
            key,
            (folder / path).read_bytes(),
        )
    assert (out / "property").read_text() == f"6,{SIZE},{SIZE}\n"
    assert not (out / "label_map.txt").exists()
    assert is_verified(out)


def test_several_labels_of_a_list_are_kept_in_the_record(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.lst").write_text("0\t2\t0.5\t-1\t1_cy/1_cy_0001.jpg\n")
    out = tmp_path / "out"
    assert run(tmp_path / "a.lst", out, "--root", folder, "--size", SIZE) == 0
    header, _ = unpack_record(RecordReader(out / "train.rec").read_at(0))
    assert (header.flag, header.labels.tolist()) == (3, [2, 0.5, -1])


@pytest.mark.parametrize("style", ["insightface", "im2rec"])
def test_class_ids_beyond_2_24_are_packed_exactly(style: str, folder: Path, tmp_path: Path) -> None:
    wide = [2**24, 2**24 + 1, 42_474_557]
    lines = [f"{i + 1}\t{label}\t0_ann/0_ann_0001.jpg\n" for i, label in enumerate(wide)]
    (tmp_path / "a.lst").write_text("".join(lines))
    out = tmp_path / "out"
    assert run(tmp_path / "a.lst", out, "--root", folder, "--size", SIZE, "--style", style) == 0
    assert [label for _, label, _ in packed(out)] == wide
    assert is_verified(out)


CSV_NAMES = (
    "identity,path\nbob,0_bob/0_bob_0001.jpg\nann,0_ann/0_ann_0001.jpg\nbob,0_bob/0_bob_0002.jpg\n"
)
CSV_NUMBERS = "0_bob/0_bob_0001.jpg,1\n0_ann/0_ann_0001.jpg,0\n0_bob/0_bob_0002.jpg,1\n"


@pytest.mark.parametrize("text", [CSV_NAMES, CSV_NUMBERS])
def test_a_csv_is_packed_class_by_class_with_names_or_numbers(
    text: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.csv").write_text(text)
    out = tmp_path / "out"
    assert run(tmp_path / "a.csv", out, "--root", folder, "--size", SIZE) == 0
    paths = ["0_ann/0_ann_0001.jpg", "0_bob/0_bob_0001.jpg", "0_bob/0_bob_0002.jpg"]
    contents = [(folder / path).read_bytes() for path in paths]
    assert packed(out) == [(1, 0, contents[0]), (2, 1, contents[1]), (3, 1, contents[2])]
    named = out / "label_map.txt"
    assert not named.exists() if text == CSV_NUMBERS else named.read_text() == "0\tann\n1\tbob\n"


def test_include_selects_paths_of_a_list(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV_NUMBERS)
    out = tmp_path / "out"
    arguments = ("--root", folder, "--size", SIZE, "--include", "0_b*")
    assert run(tmp_path / "a.csv", out, *arguments) == 0
    assert [label for _, label, _ in packed(out)] == [1, 1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.lst", "0\t0\tx.jpg\n1\tx.jpg\n", "line 2: expected 'key<tab>label<tab>path'"),
        ("a.lst", "0\t0.5\tx.jpg\n", "line 1: expected"),
        ("a.lst", "0\t-1\tx.jpg\n", "line 1: expected"),
        ("a.lst", "7\t0\tx.jpg\n7\t0\ty.jpg\n", "key 7 appears twice"),
        ("a.lst", "0\t0\tx\n1\t0\t1\tx\n", "different numbers of labels"),
        ("a.lst", "", "lists no image"),
        ("a.csv", "path,label\nx.jpg\n", "line 2: expected 'path,label'"),
        ("a.txt", "x.jpg 0", "allowed are a folder, a .lst file"),
    ],
)
def test_a_list_that_cannot_be_read_is_an_error_that_names_the_line(
    name: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    assert run(tmp_path / name, tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_shuffle_changes_the_order_by_the_seed_and_nothing_else(
    folder: Path, tmp_path: Path
) -> None:
    outs = {}
    for name, options in (("plain", ""), ("a", "--shuffle"), ("b", "--shuffle --seed=1")):
        assert run(folder, tmp_path / name, "--size", SIZE, *options.split()) == 0
        outs[name] = [record[1:] for record in packed(tmp_path / name)]
        assert is_verified(tmp_path / name)
    assert sorted(outs["a"]) == sorted(outs["b"]) == sorted(outs["plain"])
    assert outs["a"] != outs["plain"] != outs["b"] != outs["a"]


@pytest.fixture
def large_folder(tmp_path: Path) -> Path:
    """600 images of 12 people: several tasks for several processes."""
    root = tmp_path / "many"
    for i in range(600):
        path = root / f"p{i // 50:02d}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(simplejpeg.encode_jpeg(np.full((SIZE, SIZE, 3), i % 256, np.uint8)))
    return root


def digests(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha1(p.read_bytes()).hexdigest() for p in out.iterdir()}


def test_several_processes_write_the_same_files_as_one(large_folder: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        out = tmp_path / str(processes)
        assert run(large_folder, out, "--size", SIZE, "--num-thread", processes) == 0
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


KILLED_AFTER = """
import os, signal, sys
from data.tools import record_writer
from scripts import pack
record_writer._NOTE_EVERY_SECONDS = 0
note, calls = record_writer.RecordSetWriter.note, 0
def note_and_die(self, **progress):
    global calls
    note(self, **progress)
    calls += 1
    if calls == int(sys.argv[1]):
        self.add(b"half a chunk that nobody noted", 99)
        self._files[0].flush()
        os.kill(os.getpid(), int(sys.argv[2]))
record_writer.RecordSetWriter.note = note_and_die
sys.exit(pack.main(sys.argv[3:]))
"""


def run_and_kill(after: int, number: int, *arguments: object) -> int:
    command = [sys.executable, "-c", KILLED_AFTER, after, number, *arguments]
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True).returncode


@pytest.mark.parametrize("options", [[], ["--shuffle"]])
def test_a_killed_packing_goes_on_and_ends_with_the_same_files(
    options: list[str], large_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (large_folder, tmp_path / "killed", "--size", SIZE, "--num-thread", 1, *options)
    assert run_and_kill(3, signal.SIGKILL, *arguments) == -signal.SIGKILL
    assert files_below(tmp_path / "killed").count("state.json") == 1
    assert not (tmp_path / "killed" / "train.rec").exists()
    assert run(*arguments) == 0
    assert "going on after 192 of 600 images" in capsys.readouterr().err
    assert run(large_folder, tmp_path / "whole", "--size", SIZE, "--num-thread", 1, *options) == 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert is_verified(tmp_path / "killed")


def test_the_beginning_of_another_job_is_dropped_only_by_restart(
    large_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        run_and_kill(2, signal.SIGINT, large_folder, out, "--size", SIZE, "--num-thread", 1) == 130
    )
    assert run(large_folder, out, "--size", SIZE, "--include", "p00") == 2
    assert "holds the beginning of another job" in capsys.readouterr().err
    assert run(large_folder, out, "--size", SIZE, "--include", "p00", "--restart") == 0
    assert len(packed(out)) == 50


def test_a_kill_while_files_are_put_in_place_is_mended_by_the_next_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert run(folder, whole, "--size", SIZE) == 0
    for renames in range(5):
        replace, calls = os.replace, [0]

        def dying_replace(source: Path, target: Path) -> None:
            if Path(source).parent.name == ".packing" and Path(target).parent == out:
                calls[0] += 1  # noqa: B023 (used within the iteration)
                if calls[0] > renames:  # noqa: B023
                    raise KeyboardInterrupt
            replace(source, target)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying_replace)
            assert run(folder, out, "--size", SIZE, "--force") == 130
        assert not (out / "train.idx").exists()  # so nothing opens the half-finished set
        assert run(folder, out, "--size", SIZE, "--force") == 0
        assert digests(out) == digests(whole)


def test_two_writers_do_not_share_a_folder(folder: Path, tmp_path: Path) -> None:
    with pack.RecordSetWriter(tmp_path, SIZE), pytest.raises(DataError, match="another process"):
        pack.pack_listing(pack.list_folder(folder), tmp_path, size=SIZE)


def test_a_class_name_that_would_break_the_label_map_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "0_ann").rename(folder / "a\tb")
    with pytest.raises(DataError, match="one line, no tabs"):
        pack.pack_listing(pack.list_folder(folder), tmp_path / "out", size=SIZE)


LFW_LAYOUT = "1\t2\n0_ann\t1\t2\n1_cy\t4\t1\n0_ann\t1\t0_bob\t3\n0_bob\t1\t1_cy\t2\n"
FIVE_COLUMNS = "0_ann 1 0_ann 2 1\n1_cy 4 1_cy 1 1\n0_ann 1 0_bob 3 0\n0_bob 1 1_cy 2 0\n"


@pytest.mark.parametrize("text", [LFW_LAYOUT, FIVE_COLUMNS])
def test_both_pairs_layouts_give_the_same_verification_set(
    text: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "pairs.txt").write_text(text)
    out = tmp_path / "set.bin"
    assert run("--pairs", tmp_path / "pairs.txt", folder, out, "--size", SIZE) == 0
    images, same = pickle.loads(out.read_bytes())
    assert same == [True, True, False, False]
    assert all(type(answer) is bool for answer in same)
    names = ["0_ann 1", "0_ann 2", "1_cy 4", "1_cy 1", "0_ann 1", "0_bob 3", "0_bob 1", "1_cy 2"]
    paths = [folder / n / f"{n}_{int(i):04d}.jpg" for n, i in (name.split() for name in names)]
    assert images == [path.read_bytes() for path in paths]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0_ann 1 2\n0_ann 1 9\n", r"pairs\.txt, line 2: .*0_ann_0009\.jpg does not exist"),
        ("0_ann 1\n", r"line 1: expected 'name n1 n2'"),
        ("0_ann x 2\n", "line 1: expected"),
        ("0_ann 1 0_bob 2 yes\n", "line 1: expected"),
        (".. 1 2\n", "line 1: '..' is no folder name"),
        ("10 300\n", "holds no pairs"),
    ],
)
def test_a_bad_pairs_file_is_an_error_that_names_the_line(
    text: str, message: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        pack.pack_pairs(tmp_path / "pairs.txt", folder, tmp_path / "set.bin", size=SIZE)
    assert not (tmp_path / "set.bin").exists()


def test_a_verification_set_is_replaced_only_by_force(tmp_path: Path) -> None:
    pack.write_verification_set(tmp_path / "a.bin", [b"1", b"2"], [True])
    with pytest.raises(DataError, match="already exists"):
        pack.write_verification_set(tmp_path / "a.bin", [b"3", b"4"], [True])
    pack.write_verification_set(tmp_path / "a.bin", [b"3", b"4"], [True], force=True)


def test_real_faces_are_packed_untouched(shared_dir: Path, tmp_path: Path) -> None:
    train = shared_dir / "data" / "lfw112" / "train"
    report = pack.pack_listing(pack.list_folder(train, ("Ab*", "Al*")), tmp_path)
    source = RecordDataset(tmp_path)
    assert (report.num_classes, report.num_images) == (source.num_classes, len(source))
    assert report.num_classes >= 2
    assert report.num_reencoded == 0
    names = [line.split("\t")[1] for line in (tmp_path / "label_map.txt").read_text().splitlines()]
    packed = {(names[label], bytes(e)) for e, label in map(source.read_encoded, range(len(source)))}
    on_disk = {(name, path.read_bytes()) for name in names for path in (train / name).iterdir()}
    assert packed == on_disk


def test_the_shared_pairs_file_parses(shared_dir: Path) -> None:
    pairs = pack.read_pairs(shared_dir / "data" / "lfw112" / "lfw_part_pairs.txt")
    assert len(pairs) == 800
    assert sum(pair.same for pair in pairs) == 400
    assert all((pair.first[0] == pair.second[0]) == pair.same for pair in pairs)


# ---------------------------------------------------------------- synthetic images


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synthetic")
    synthetic.make_synthetic(
        out, identities=6, images_per_identity=4, verification_pairs=40, size=64, num_processes=1
    )
    return out


def test_synthetic_images_are_a_record_set_and_balanced_folds(generated: Path) -> None:
    source = RecordDataset(generated, input_size=64)
    assert (len(source), source.num_classes) == (24, 6)
    assert [source.read(i)[1] for i in range(24)] == [i // 4 for i in range(24)]
    images, same = pickle.loads((generated / "synthetic.bin").read_bytes())
    assert len(images) == 80
    assert same == [True, True, False, False] * 10
    assert len(set(images)) == 80
    assert decode_image(images[0], "image").shape == (64, 64, 3)


def test_synthetic_images_of_one_identity_are_alike_and_not_the_same() -> None:
    pairs = [synthetic.draw_encoded((0, 0, identity, (0, 1), 32)) for identity in range(100)]
    pixels = np.array([[decode_image(image, "image").ravel() for image in pair] for pair in pairs])
    unit = pixels - pixels.mean(axis=2, keepdims=True)
    unit /= np.linalg.norm(unit, axis=2, keepdims=True)
    cosine = unit[:, 0] @ unit[:, 1].T  # of the first image of each identity and a second one
    assert 0.1 < cosine.diagonal().mean() < 0.4
    assert abs(cosine[~np.eye(100, dtype=bool)].mean()) < 0.02


def test_verification_identities_keep_to_their_fold_and_pairs_are_what_they_say() -> None:
    images, same = synthetic.verification_plan(200, seed=3)
    pairs = list(zip(images[0::2], images[1::2], strict=True))
    assert all((a[0] == b[0]) == answer for (a, b), answer in zip(pairs, same, strict=True))
    assert len(set(images)) == 400
    folds = [{f[0] for f in images[i : i + 40]} for i in range(0, 400, 40)]
    assert all(not a & b for i, a in enumerate(folds) for b in folds[:i])


def test_synthetic_images_depend_on_the_seed_only(generated: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        synthetic.make_synthetic(
            tmp_path / str(seed),
            identities=6,
            images_per_identity=4,
            verification_pairs=40,
            size=64,
            seed=seed,
            num_processes=2 if seed == 0 else 1,
        )
    for name in ("train.rec", "train.idx", "synthetic.bin"):
        assert (tmp_path / "0" / name).read_bytes() == (generated / name).read_bytes()
    assert (tmp_path / "1" / "train.rec").read_bytes() != (generated / "train.rec").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--verification-pairs", "30"], "verification_pairs=30: 10 folds, each half same"),
        (["--verification-pairs", "20"], "need a multiple of 20, at least 40"),
        (["--identities", "0"], "identities=0, images_per_identity=15, size=112, seed=0: allowed"),
        (["--seed", "-1"], "seed=-1: allowed are 1 or more, 1 or more, 16 or more, 0 or more"),
    ],
)
def test_numbers_that_do_not_fit_end_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert synthetic.main([str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err
    assert files_below(tmp_path) == []


def test_an_existing_synthetic_set_is_replaced_only_by_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path), "--identities", "2", "--images-per-identity", "2", "--size", "32"]
    words += ["--verification-pairs", "40"]
    assert synthetic.main(words) == 0
    assert "4 images of 2 identities, and synthetic.bin with 40 pairs" in capsys.readouterr().out
    before = files_below(tmp_path)
    assert synthetic.main([*words, "--seed", "1"]) == 2
    assert "synthetic.bin already exists; --force replaces it" in capsys.readouterr().err
    assert files_below(tmp_path) == before
    first = (tmp_path / "train.rec").read_bytes()
    assert synthetic.main([*words, "--seed", "1", "--force"]) == 0
    assert (tmp_path / "train.rec").read_bytes() != first
