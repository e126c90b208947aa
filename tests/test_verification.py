"""Verification sets are read without running them, and every number of ranks gives one answer."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from torch import Tensor, nn

from eval.extract import share_of_batches
from eval.groups import Groups
from eval.model import Embedder
from eval.verification import embed_set, main, report_set, verify
from eval.verification_sets import (
    VerificationSet,
    find_verification_sets,
    load_pairs,
    load_verification_set,
)
from tests.conftest import RankFailure
from tests.helpers import GOLDEN
from utils.errors import UserError

SIZE = 16  # pixels; small, because only arithmetic is at stake


def _pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def _set(pairs: int = 13, name: str = "made_up") -> VerificationSet:
    images = [simplejpeg.encode_jpeg(image, 95) for image in _pixels(2 * pairs)]
    return VerificationSet(name, list(images), np.arange(pairs) % 2 == 0)


def _write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def _network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(1176, 8)
    )


# --- finding sets ---


def test_targets_are_found_with_and_without_suffix(tmp_path: Path) -> None:
    for name in ("lfw", "cfp_fp"):
        (tmp_path / f"{name}.bin").touch()
    found = find_verification_sets(tmp_path, ["cfp_fp.bin", "lfw"])
    assert found == [tmp_path / "cfp_fp.bin", tmp_path / "lfw.bin"]


def test_a_missing_target_names_itself_the_folder_and_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "lfw.bin").touch()
    with pytest.raises(UserError, match=r"not found: agedb_30 .*sets there: lfw") as e:
        find_verification_sets(tmp_path, ["lfw", "agedb_30"])
    assert str(tmp_path) in str(e.value)
    with pytest.raises(UserError, match="no such directory"):
        find_verification_sets(tmp_path / "nowhere", ["lfw"])
    with pytest.raises(UserError, match="named twice: lfw"):
        find_verification_sets(tmp_path, ["lfw", "lfw.bin"])


# --- pickles that are sets ---


@pytest.mark.parametrize("protocol", range(1, 6))
@pytest.mark.parametrize("kind", ["bytes", "bytearrays", "encoded arrays", "pixel arrays"])
@pytest.mark.parametrize("labels", ["list", "array", "scalars", "integers"])
def test_every_way_python_3_writes_a_set_is_read(
    tmp_path: Path, protocol: int, kind: str, labels: str
) -> None:
    expected, issame = _pixels(20), np.arange(10) % 3 == 0
    encoded = [simplejpeg.encode_jpeg(image, 95) for image in expected]
    images = {
        "bytes": encoded,
        "bytearrays": [bytearray(one) for one in encoded],
        "encoded arrays": [np.frombuffer(one, np.uint8) for one in encoded],
        "pixel arrays": list(expected),
    }[kind]
    written = {
        "list": issame.tolist(),
        "array": issame,
        "scalars": list(issame),
        "integers": issame.astype(int).tolist(),
    }[labels]
    one = load_verification_set(_write(tmp_path / "a.bin", (images, written), protocol))
    assert one.name == "a"
    assert one.issame.dtype == np.bool_
    np.testing.assert_array_equal(one.issame, issame)
    for image, pixels, file in zip(one.images, expected, encoded, strict=True):
        if kind == "pixel arrays":
            np.testing.assert_array_equal(image, pixels)
        else:
            assert bytes(image) == file


def test_all_images_in_one_array_and_fortran_order_are_read(tmp_path: Path) -> None:
    expected = _pixels(20)
    path = _write(tmp_path / "a.bin", [np.asfortranarray(expected), [True] * 10])
    np.testing.assert_array_equal(np.stack(load_verification_set(path).images), expected)


def _python_2_string(data: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(data)) + data  # BINSTRING


def _python_2_array(pixels: np.ndarray) -> bytes:
    """What cPickle of Python 2 wrote for a uint8 array, protocol 2."""
    shape = b"".join(b"K" + bytes([length]) for length in pixels.shape)
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff" + (
        b"J\xff\xff\xff\xffK\x00tb"
    )
    return b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01(" + (
        shape + b"t" + dtype + b"\x89" + _python_2_string(pixels.tobytes()) + b"tb"
    )


@pytest.mark.parametrize("write", [_python_2_string, _python_2_array])
def test_python_2_pickles_are_read(tmp_path: Path, write: Any) -> None:
    expected = _pixels(20)
    images = [e.tobytes() for e in expected] if write is _python_2_string else list(expected)
    labels = b"](" + b"\x88\x89" * 5 + b"e"
    path = tmp_path / "lfw.bin"
    path.write_bytes(b"\x80\x02](" + b"".join(map(write, images)) + b"e" + labels + b"\x86.")
    one = load_verification_set(path)
    assert one.issame.tolist() == [True, False] * 5
    assert all(np.array_equal(a, b) for a, b in zip(one.images, images, strict=True))


def test_the_real_set_is_held_encoded(shared_dir: Path) -> None:
    path = shared_dir / "data" / "lfw112" / "lfw_part.bin"
    one = load_verification_set(path)
    assert (one.name, one.num_pairs, int(one.issame.sum())) == ("lfw_part", 800, 400)
    assert sum(len(image) for image in one.images) < path.stat().st_size


# --- pickles that are not ---


class _Call:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    path = _write(tmp_path / "lfw.bin", _Call(os.system, f"touch {trace}"), protocol)
    with pytest.raises(UserError, match=r"lfw\.bin: refused, .*system"):
        load_verification_set(path)
    assert not trace.exists()


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


_RECONSTRUCT = _global("numpy.core.multiarray", "_reconstruct") + _global("numpy", "ndarray")
_ENCODE = _global("_codecs", "encode")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (_RECONSTRUCT + b"J\xff\xff\xff\x7f\x85U\x01b\x87R.", "not rebuilt from an empty"),
        (_RECONSTRUCT + b"K\x00\x85U\x01b\x87R(K\x01M\xff\xffM\xff\xff\x86NN\x89t b.", "pickle"),
        (_global("numpy", "ndarray") + b"J\xff\xff\xff\x7f\x85R.", "not a readable pickle"),
        (_global("builtins", "bytes") + b"J\xff\xff\xff\x7f\x85R.", "bytes are allowed from bytes"),
        (_global("builtins", "eval") + b"U\x011\x85R.", r"refused, .*builtins\.eval"),
        (_global("numpy", "load") + b"U\x01a\x85R.", r"refused, .*numpy\.load"),
        (_global("numpy.core.multiarray", "fromfile") + b".", "refused"),
        (_global("numpy", "dtype") + b"U\x02O8\x85R.", "not a plain integer"),
        (_global("numpy", "dtype") + b"U\x08V9999999\x85R.", "not a plain integer"),
        (_ENCODE + b"X\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "latin1 text only"),
        (_ENCODE + b"}X\x01\x00\x00\x00ab.", "opcode EMPTY_DICT"),
        (_ENCODE + b"N(X\x08\x00\x00\x00__call__K\x01t\x86b.", "cannot be given a state"),
        (b"r\xff\xff\xff\x7f.", "memo slot"),
        (b"}.", "opcode EMPTY_DICT"),
        (b"(ios\nsystem\n.", "opcode INST"),
        (b"\x82\x01.", "opcode EXT1"),
        (b"B\xff\xff\xff\x7fabc", "not a readable pickle"),
        (b"\x96\xff\xff\xff\xff\xff\x00\x00\x00abc", "not a readable pickle"),
        (b"]" * 1000, "not a readable pickle"),
        (b"", "not a readable pickle"),
    ],
)
def test_hostile_pickles_are_refused_by_name(tmp_path: Path, body: bytes, words: str) -> None:
    path = tmp_path / "hostile.bin"
    path.write_bytes(b"\x80\x02" + body)
    with pytest.raises(UserError, match=rf"(?s)hostile\.bin.*{words}"):
        load_verification_set(path)


def test_a_short_file_cannot_multiply_one_text_into_much_memory(tmp_path: Path) -> None:
    text = b"X" + struct.pack("<I", 10_000) + b"a" * 10_000 + b"q\x010"
    one = _ENCODE + b"h\x01X\x06\x00\x00\x00latin1\x86R"
    path = tmp_path / "bomb.bin"
    path.write_bytes(b"\x80\x02" + text + b"](" + one * 100 + b"e.")
    with pytest.raises(UserError, match="more bytes than the file has"):
        load_verification_set(path)


def test_an_array_without_bytes_cannot_have_a_trillion_rows(tmp_path: Path) -> None:
    buffer = _global("numpy.core.numeric", "_frombuffer")
    dtype = _global("numpy", "dtype") + b"U\x02u1\x85R"
    shape = b"(\x8a\x06\x00\x00\x00\x00\x00\x01K\x00K\x01K\x03t"  # (2**40, 0, 1, 3)
    path = tmp_path / "endless.bin"
    path.write_bytes(b"\x80\x02" + buffer + b"(U\x00" + dtype + shape + b"U\x01Ct" + b"R](e\x86.")
    with pytest.raises(UserError, match="lengths that fit its data"):
        load_verification_set(path)


def test_a_list_that_multiplies_itself_is_refused_without_being_written_out(tmp_path: Path) -> None:
    doubled = b"N\x85" + b"2\x86" * 60  # ((..., ...), (..., ...)): 2**60 leaves
    path = tmp_path / "laughs.bin"
    path.write_bytes(b"\x80\x02" + _global("numpy", "dtype") + doubled + b"\x85R.")
    with pytest.raises(UserError, match="not a plain integer"):
        load_verification_set(path)
    path.write_bytes(b"\x80\x02" + doubled + b".")
    with pytest.raises(UserError, match="label 0 is a tuple of length 2"):
        load_verification_set(path)


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_truncated_set_is_an_error_that_names_the_file(tmp_path: Path, cut: int) -> None:
    path = _write(tmp_path / "cut.bin", (_set().images, [True] * 13))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match=r"cut\.bin: not a readable pickle"):
        load_verification_set(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([b"a"] * 20, "a list of length 20; a set is a pair"),
        (([b"a"] * 21, [True] * 10), "21 images for 10 labels"),
        (([b"a"] * 18, [True] * 9), "9 pairs; the 10-fold protocol needs at least 10"),
        (([b"a"] * 19 + [""], [True] * 10), "image 19 is a str"),
        (([b"a"] * 19 + [b""], [True] * 10), "image 19 is a bytes of length 0"),
        (([b"a"] * 20, [True] * 9 + [2]), "label 9 is the integer 2"),
        (([b"a"] * 20, [True] * 9 + [None]), "label 9 is a NoneType"),
        ((b"a" * 20, [True] * 10), "images are a bytes"),
        (([b"a"] * 20, b"\1" * 10), "labels are a bytes"),
        (([np.zeros((4, 4), np.uint8)] * 20, [True] * 10), r"image 0 is an array \[4, 4\]"),
        (([np.zeros((4, 4, 3), np.int64)] * 20, [True] * 10), "image 0 is an array .* of int64"),
        ((np.zeros(0, np.uint8), [True] * 10), "shape is not up to 4 lengths"),
        ((np.zeros(7, np.uint8), [True] * 10), r"images are an array \[7\]"),
        (([b"a"] * 20, np.full(10, 2)), r"labels are an array \[10\]"),
        (([np.zeros(3, np.float32)] * 20, [True] * 10), "not a plain integer or bool"),
    ],
)
def test_another_structure_is_an_error_that_says_what_is_wrong(
    tmp_path: Path, content: Any, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        load_verification_set(_write(tmp_path / "a.bin", content))


# --- sharing and embedding ---


def test_shares_are_whole_batches_that_cover_every_image_once() -> None:
    for images in (1, 20, 64, 65, 1000):
        for batch in (1, 7, 64, 2000):
            for world in (1, 2, 3, 5, 64):
                shares = [share_of_batches(images, batch, rank, world) for rank in range(world)]
                assert [s for s, _ in shares] == [0] + [e for _, e in shares[:-1]]
                assert shares[-1][1] == images
                assert all(start % batch == 0 or start == images for start, _ in shares)
                batches = [-(-(end - start) // batch) for start, end in shares]
                assert max(batches) - min(batches) <= 1


def test_both_sides_are_embedded_in_order_and_the_mirror_image_is_mirrored() -> None:
    pixels = _pixels(26)
    one = VerificationSet("arrays", list(pixels), np.arange(13) % 2 == 0)

    def embed(images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return images.flatten(1).double()

    plain, flipped = embed_set(embed, one, batch_size=7, input_size=SIZE)
    channels_first = pixels.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(plain, channels_first.reshape(26, -1))
    np.testing.assert_array_equal(flipped, channels_first[..., ::-1].reshape(26, -1))
    assert plain.dtype == np.float64


def _verify_on_a_rank(rank: int, world_size: int, batch_size: int) -> dict[str, dict[str, float]]:
    embed = Embedder(_network())
    sets = [_set(13, "thirteen"), _set(10, "ten")]
    return verify(
        embed, sets, rank=rank, world_size=world_size, batch_size=batch_size, input_size=SIZE
    )


@pytest.mark.parametrize("batch_size", [1, 5, 64])  # 64: some ranks have no image
def test_one_two_three_ranks_give_identical_numbers(ranks: Any, batch_size: int) -> None:
    (alone,) = ranks.run(1, _verify_on_a_rank, batch_size)
    assert not any(math.isnan(v) for values in alone.values() for v in values.values())
    for world_size in (2, 3):
        for result in ranks.run(world_size, _verify_on_a_rank, batch_size):
            assert result == alone


def _verify_with_a_bad_rank(rank: int, world_size: int) -> None:
    def embed(images: Tensor) -> Tensor:
        if rank == 1:
            raise ZeroDivisionError("broken")
        return images.flatten(1).float()

    verify(embed, [_set()], rank=rank, world_size=world_size, batch_size=4, input_size=SIZE)


def test_an_error_on_one_rank_reaches_all_and_nobody_waits(ranks: Any) -> None:
    with pytest.raises(RankFailure) as failure:
        ranks.run(3, _verify_with_a_bad_rank)
    errors = failure.value.errors
    assert isinstance(errors[1], ZeroDivisionError)
    for rank in (0, 2):
        assert "failed on rank 1" in str(errors[rank])


def test_collapsed_embeddings_give_nan_and_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        values = verify(lambda x: torch.ones(len(x), 4), [_set()], input_size=SIZE)["made_up"]
    assert math.isnan(values["accuracy"])
    assert values["xnorm"] == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "accuracy_flip" in caplog.text


def test_an_image_of_another_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"set made_up, image 0: shape is \[16, 16, 3\]"):
        verify(lambda x: x.flatten(1).float(), [_set()], input_size=112)


def test_another_size_is_found_while_loading_from_the_headers(tmp_path: Path) -> None:
    path = _write(tmp_path / "small.bin", (_set().images, [True] * 13))
    assert load_verification_set(path, input_size=SIZE).num_pairs == 13
    with pytest.raises(UserError, match=r"small\.bin, image 0: 16 x 16 pixels; the"):
        load_verification_set(path, input_size=112)


@pytest.mark.parametrize("damaged", [b"no image", b"\xff\xd8\xff\xe0 cut"])
def test_a_damaged_header_is_found_while_loading_and_names_set_and_image(
    tmp_path: Path, damaged: bytes
) -> None:
    images = _set().images
    images[5] = damaged
    path = _write(tmp_path / "small.bin", (images, [True] * 13))
    with pytest.raises(UserError, match=r"small\.bin, image 5: "):
        load_verification_set(path, input_size=SIZE)


def test_a_set_that_cannot_be_read_is_an_error_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    path = _write(tmp_path / "small.bin", (_set().images, [True] * 13))
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"small\.bin: cannot be read \(Permission den"):
        load_verification_set(path)


def test_a_damaged_image_is_named() -> None:
    one = _set()
    one.images[3] = bytes(one.images[3])[:200]
    with pytest.raises(ValueError, match="set made_up, image 3"):
        verify(lambda x: x.flatten(1).float(), [one], input_size=SIZE)


def test_bad_arguments_are_errors() -> None:
    def embed(images: Tensor) -> Tensor:
        return torch.zeros(1, 4)

    with pytest.raises(ValueError, match="share a name"):
        verify(embed, [_set(), _set()])
    with pytest.raises(ValueError, match="batch_size is 0"):
        verify(embed, [_set()], batch_size=0)
    with pytest.raises(ValueError, match="rank is 2"):
        verify(embed, [_set()], rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"embed gave shape \[1, 4\] for 26 images"):
        verify(embed, [_set()], input_size=SIZE)


# --- the embedder ---


def test_the_embedder_normalizes_evaluates_and_gives_every_module_its_mode_back() -> None:
    network = _network().train()
    network.get_submodule("1").eval()  # a frozen batch norm stays frozen
    before = [module.training for module in network.modules()]
    images = torch.from_numpy(_pixels(4).transpose(0, 3, 1, 2).copy())
    embeddings = Embedder(network, mean=127.5, std=[127.5] * 3)(images)
    assert [module.training for module in network.modules()] == before
    assert not embeddings.requires_grad
    expected = network.eval()((images.float() - 127.5) / 127.5)
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=0)


def test_the_embedder_restores_modes_after_an_error_and_keeps_float64() -> None:
    network = _network().double().train()
    embedder = Embedder(network)
    with pytest.raises(RuntimeError):
        embedder(torch.zeros(2, 3, 5, 5, dtype=torch.uint8))
    assert all(module.training for module in network.modules())
    assert embedder(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).dtype == torch.float64
    with pytest.raises(ValueError, match="uint8"):
        embedder(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match="std has 2 values"):
        Embedder(network, std=[1.0, 2.0])


# --- the command ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from backbones import get_model
    from backbones.weights import ModelMetadata, save_model

    path = tmp_path_factory.mktemp("run") / "model.pt"
    backbone = get_model("mbf", num_features=32)
    return save_model(path, backbone, ModelMetadata("mbf", num_features=32))


def test_the_command_prints_a_table_and_writes_json_and_a_figure(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 112, 112, 3), dtype=np.uint8)
    _write(tmp_path / "small.bin", (list(pixels), [True, False] * 5))
    out, figure = tmp_path / "out.json", tmp_path / "roc.png"
    arguments = ["--model", str(model), "--data", str(tmp_path), "--device", "cpu"]
    assert main([*arguments, "--json", str(out), "--plot", str(figure)]) == 0
    printed = capsys.readouterr().out
    values = json.loads(out.read_text())["small"]
    assert f"{values['accuracy_flip']:.5f}" in printed
    assert values["num_pairs"] == 10
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_the_command_says_what_is_wrong_and_exits_with_2(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(model), "--data", str(tmp_path)]) == 2
    assert "no .bin set in this folder" in capsys.readouterr().err
    assert main(["--model", str(tmp_path / "none.pt"), "--data", str(model)]) == 2
    assert "none.pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--device", "foo"],
            "--device foo: PyTorch cannot use such a device here; give one of cpu",
        ),
        (["--device", "meta"], "--device meta: PyTorch cannot use"),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch cannot use"),
        (["--json", "."], r"--json . is a folder; give the name of a file"),
        (["--plot", "folder.png"], r"--plot folder.png is a folder"),
        (["--plot", "roc.docx"], r"the name must end in .png, .pdf, .svg"),
        (["--json", "taken/out.json"], "taken"),
    ],
)
def test_the_command_checks_device_and_outputs_before_it_works(
    options: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "taken").touch()
    # The model is missing too, which would be the first error of any work.
    assert main(["--model", "none.pt", "--data", "none.bin", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "taken"]


# --- pictures ---


def test_pictures_are_drawn_from_torn_and_nan_records_and_bad_ones_are_named(
    tmp_path: Path,
) -> None:
    from eval.plots import plot_roc, plot_training_curve

    log = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 10, "epoch": 0, "loss": 3.5, "learning_rate": 0.1}',
        '{"step": 20, "epoch": 0, "loss": NaN, "learning_rate": 0.1}',
        '{"step": 20, "epoch": 0, "eval": {"lfw": {"accuracy_flip": null}}}',
    ]
    log.write_text("\n".join([*lines, '{"step": 30, "lo']))
    assert plot_training_curve(log, tmp_path / "curve.png").stat().st_size > 1000
    log.write_text("\n".join([lines[0], "{", lines[1]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        plot_training_curve(log, tmp_path / "curve.png")
    log.write_text(lines[2])
    with pytest.raises(ValueError, match="nothing to draw yet"):
        plot_training_curve(log, tmp_path / "curve.png")

    curves = {"a": ([0.0, 0.5, 1.0], [0.2, 0.9, 1.0]), "collapsed": ([np.nan], [np.nan])}
    assert plot_roc(curves, tmp_path / "roc.pdf", "made up").read_bytes()[:4] == b"%PDF"
    with pytest.raises(ValueError, match="no ROC curve"):
        plot_roc({}, tmp_path / "roc.png", "none")


# --- pairs files, groups, figures, ranks ---


@pytest.fixture(scope="module")
def pooling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.models import OURS, write_pooling_model

    return write_pooling_model(tmp_path_factory.mktemp("models") / "pool.onnx", metadata=OURS)


def _people(folder: Path, people: int = 12, size: int = 112) -> str:
    """Two images each of some people, and the lines of a pairs file: same and different."""
    random = np.random.default_rng(0)
    lines = []
    for person in range(people):
        base = random.integers(0, 256, (7, 7, 3))
        (folder / f"p{person}").mkdir(parents=True)
        for number in (1, 2):
            small = np.clip(base + random.normal(0, 70, base.shape), 0, 255).astype(np.uint8)
            pixels = np.ascontiguousarray(small.repeat(size // 7, 0).repeat(size // 7, 1))
            path = folder / f"p{person}" / f"p{person}_{number:04d}.jpg"
            path.write_bytes(simplejpeg.encode_jpeg(pixels, 95))
        other = (person + 1) % people
        lines += [f"p{person} 1 2", f"p{person}/p{person}_0001.jpg\tp{other}/p{other}_0001.jpg\t0"]
    return "\n".join(lines)


def test_a_pairs_file_is_judged_with_intervals_groups_and_figures(
    tmp_path: Path, pooling: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs.txt").write_text(_people(tmp_path / "faces"))
    names = [f"p{p}/p{p}_{n:04d}.jpg" for p in range(12) for n in (1, 2)]
    rows = [f"{name},{'ab'[i // 2 % 2]}\n" for i, name in enumerate(names)]
    (tmp_path / "groups.csv").write_text("name,race\n" + "".join(rows))
    arguments = ["--model", str(pooling), "--pairs", str(tmp_path / "pairs.txt")]
    arguments += ["--folder", str(tmp_path / "faces"), "--groups", str(tmp_path / "groups.csv")]
    for option, name in (("--json", "o.json"), ("--plot", "roc.pdf"), ("--wrong", "wrong.png")):
        arguments += [option, str(tmp_path / name)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "o.json").read_text())
    report = content["pairs"]
    assert (report["num_pairs"], report["num_impostors"]) == (24, 12)
    assert [at["far"] for at in report["tar_at_far"]] == [0.1, 0.01, 0.001, 0.0001]
    assert [at["allowed_false_accepts"] for at in report["tar_at_far"]] == [1, 0, 0, 0]
    low, high = report["confidence_95"]["accuracy_flip"]
    assert low <= report["accuracy_flip"] <= high
    assert {k: v["num_pairs"] for k, v in report["groups"]["race"].items()} == {
        "a": 6,
        "b": 6,
        "a / b": 12,
    }
    assert "12 impostors, so allowed are 1 at 1e-1, 0 at 1e-2" in printed
    assert "pairs race=a / b" in printed
    assert (tmp_path / "roc.pdf").read_bytes()[:4] == b"%PDF"
    assert (tmp_path / "wrong.png").read_bytes()[:4] == b"\x89PNG"
    assert content["model"]["key"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("p0 1 7", r"pairs\.txt, line 24: .*p0_0007\.jpg: cannot be read"),
        ("../x.jpg p0/p0_0001.jpg 1", r"pairs\.txt, line 24: '\.\./x\.jpg' leads out"),
        ("a b c d e f", r"pairs\.txt, line 24: expected 'name n1 n2'"),
        ("p0/p0_0001.jpg p1/p1_0001.jpg -2", r"pairs\.txt, line 24: expected .*1 or 0 \(or -1\)"),
        ("p0/p0_0001.jpg p1/p1_0001.jpg -1", r"0 in line 2 and -1 in line 24; is -1 something"),
    ],
)
def test_a_bad_line_of_a_pairs_file_is_named(tmp_path: Path, line: str, words: str) -> None:
    lines = _people(tmp_path / "faces").splitlines()
    (tmp_path / "pairs.txt").write_text("\n".join([*lines[:-1], line]))
    with pytest.raises(UserError, match=words):
        load_pairs(tmp_path / "pairs.txt", tmp_path / "faces")


@pytest.mark.parametrize("gap", [" ", "\t", "   "])
@pytest.mark.parametrize("different", ["0", "-1"])
def test_a_pair_list_of_torchshard_is_read_with_either_label_and_gap(
    tmp_path: Path, gap: str, different: str
) -> None:
    _people(tmp_path / "faces")
    lines, expected = [], []
    for person in range(12):
        for other, number, label in ((person, 2, "1"), ((person + 1) % 12, 1, different)):
            names = [f"p{person}/p{person}_0001.jpg", f"p{other}/p{other}_{number:04d}.jpg"]
            lines.append(gap.join([*names, label]))
            expected += names
    (tmp_path / "pair.list").write_text("\n".join(lines) + "\n")
    one = load_pairs(tmp_path / "pair.list", tmp_path / "faces")
    assert one.name == "pair"
    assert one.image_names == expected
    assert one.issame.tolist() == [True, False] * 12
    assert one.images[1] == (tmp_path / "faces" / expected[1]).read_bytes()


def test_the_report_prints_the_published_line_and_is_right_about_it(
    tmp_path: Path, pooling: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = _people(tmp_path / "faces", people=20).splitlines()
    (tmp_path / "pair.list").write_text("\n".join(lines))
    pixels = np.random.default_rng(1).integers(0, 256, (40, 112, 112, 3), dtype=np.uint8)
    _write(tmp_path / "packed.bin", (list(pixels), [True, False] * 10))
    arguments = [
        "--model",
        str(pooling),
        "--pairs",
        str(tmp_path / "pair.list"),
        "--folder",
        str(tmp_path / "faces"),
        "--data",
        str(tmp_path / "packed.bin"),
        "--json",
        str(tmp_path / "o.json"),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    reports = json.loads((tmp_path / "o.json").read_text())
    for name in ("packed", "pair"):
        at = reports[name]["validation_rate"]
        assert at["far_wanted"] == 1e-3
        assert (
            f"{name}: Validation rate: {at['rate']:.5f}+-{at['std']:.5f} @ FAR={at['far']:.5f}\n"
        ) in printed
        (row,) = [line for line in printed.splitlines() if line.startswith(f"{name} ")]
        assert f"{reports[name]['auc']:.5f}  {reports[name]['eer']:.5f}" in row


def test_groups_by_pair_and_by_image_number(tmp_path: Path) -> None:
    one = _set(20)
    rows = np.random.default_rng(0).standard_normal((40, 6))
    (tmp_path / "a.csv").write_text("pair,k\n" + "".join(f"{i},{i // 10}\n" for i in range(20)))
    (tmp_path / "b.csv").write_text("image,k\n" + "".join(f"{i},{i // 20}\n" for i in range(40)))
    found = [
        report_set(one, rows, rows, resamples=0, groups=groups)
        for groups in (
            Groups.read(tmp_path / name, ("pair", "image")) for name in ("a.csv", "b.csv")
        )
    ]
    assert found[0]["groups"] == found[1]["groups"]
    assert found[0]["groups"]["k"]["0"]["num_pairs"] == 10
    (tmp_path / "c.csv").write_text("name,k\nx,1\n")
    with pytest.raises(UserError, match="images of made_up have no names"):
        report_set(one, rows, rows, groups=Groups.read(tmp_path / "c.csv", ("name",)))


def test_the_golden_set_has_its_accuracies_and_an_interval_around_them() -> None:
    with np.load(GOLDEN / "eval" / "lfw_part.npz") as golden:
        one = VerificationSet("lfw_part", [b""] * 1600, golden["issame"])
        report = report_set(one, golden["embeddings"], golden["embeddings_flip"], resamples=200)
    assert (report["accuracy"], report["accuracy_flip"]) == pytest.approx((0.9925, 0.995))
    rate = report["validation_rate"]
    assert (rate["rate"], rate["far"]) == pytest.approx((0.95, 0.0025))
    low, high = report["confidence_95"]["accuracy_flip"]
    assert low < 0.995 < high
    assert high - low < 0.02


def test_the_labels_of_the_golden_set_are_those_of_its_file(shared_dir: Path) -> None:
    one = load_verification_set(shared_dir / "data" / "lfw112" / "lfw_part.bin")
    assert len(one.images) == 1600
    with np.load(GOLDEN / "eval" / "lfw_part.npz") as golden:
        np.testing.assert_array_equal(one.issame, golden["issame"])


def test_the_command_on_two_ranks_writes_what_it_writes_alone(
    tmp_path: Path, pooling: Path
) -> None:
    import subprocess
    import sys

    images = [simplejpeg.encode_jpeg(i, 95) for i in np.repeat(_pixels(24), 7, 1).repeat(7, 2)]
    _write(tmp_path / "a.bin", (images, [True, False] * 6))
    arguments = ["--model", str(pooling), "--data", str(tmp_path), "--device", "cpu"]
    assert main([*arguments, "--batch-size", "5", "--json", str(tmp_path / "1.json")]) == 0
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port",
        str(20000 + os.getpid() % 20000),
        "-m",
        "eval.verification",
    ]
    done = subprocess.run(
        [*command, *arguments, "--batch-size", "5", "--json", str(tmp_path / "2.json")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    assert done.stdout.count("AUC") == 1  # one rank speaks


def test_a_collapsed_model_is_reported_as_undefined_and_can_be_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from eval.plots import plot_contact_sheet, plot_scores
    from eval.verification import format_results, set_distances, wrong_pairs

    one, rows = _set(20), np.ones((40, 6), np.float32)
    report = report_set(one, rows, rows, resamples=10)
    assert math.isnan(report["tar_at_far"][0]["tar"])
    assert math.isnan(report["confidence_95"]["auc"][0])
    assert "undefined" in caplog.text
    assert "nan" in format_results({"made_up": report})
    distances = set_distances(one, rows, rows)
    assert wrong_pairs(one, distances, report["threshold"]) == []
    plot_scores({"made_up": (1 - distances / 2, one.issame)}, tmp_path / "a.png", "t")
    plot_contact_sheet([], tmp_path / "b.png", "t")
    assert (tmp_path / "a.png").exists()
