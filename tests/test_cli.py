"""Wrong input ends every command in the same way: exit code 2 and one line on stderr."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from backbones.weights import WeightsError
from data.alignment import AlignmentError
from data.datasets import DataError
from data.decode import ImageError
from data.recordio import RecordError
from tests.helpers import ROOT
from training.checkpoint.checkpointer import CheckpointError
from utils.cli import cli_command
from utils.errors import UserError


@pytest.mark.parametrize(
    "kind",
    [
        UserError,
        WeightsError,
        CheckpointError,
        DataError,
        RecordError,
        ImageError,
        AlignmentError,
        OSError,
        FileNotFoundError,
    ],
)
def test_wrong_input_is_one_line_on_stderr_and_exit_code_2(
    kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    @cli_command()
    def main(name: str) -> int:
        raise kind(f"{name} is no file; give another")

    assert main("x") == 2
    assert capsys.readouterr().err == "error: x is no file; give another\n"


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyError, AssertionError, SystemExit])
def test_any_other_exception_keeps_its_traceback(kind: type[BaseException]) -> None:
    @cli_command()
    def main() -> int:
        raise kind("a bug")

    with pytest.raises(kind, match="a bug") as error:
        main()
    assert error.traceback[-1].name == "main"


def test_a_command_may_name_further_exceptions(capsys: pytest.CaptureFixture[str]) -> None:
    @cli_command(also=(TimeoutError, EOFError))
    def main() -> int:
        raise EOFError("cut off")

    assert main() == 2
    assert capsys.readouterr().err == "error: cut off\n"


def test_ctrl_c_says_what_is_left_and_is_exit_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    @cli_command("stopped; nothing was written")
    def main() -> int:
        raise KeyboardInterrupt

    assert main() == 130
    assert capsys.readouterr().err == "stopped; nothing was written\n"


def test_what_users_caught_before_catches_it_still() -> None:
    assert issubclass(UserError, ValueError)
    for kind in (WeightsError, CheckpointError):
        assert issubclass(kind, RuntimeError)
        assert issubclass(kind, UserError)


COMMANDS = {
    "train_v2": ["none.py"],
    "torch2onnx": ["none.pt"],
    "eval.classification": ["--model", "none.pt", "--data", "none"],
    "eval.identification": ["--model", "none.pt", "--gallery", "none", "--probe", "none"],
    "eval.ijb": ["--model", "none.pt", "--root", "none", "--target", "IJBC"],
    "eval.mfr": ["check", "none", "--track", "none"],
    "eval.verification": ["--model", "none.pt", "--data", "none"],
    "scripts.align": ["none", "none.txt", "out"],
    "scripts.compare": ["a.jpg", "b.jpg", "--model", "none.pt"],
    "scripts.demo": ["--data", "taken"],
    "scripts.doctor": ["none"],
    "scripts.embed": ["none", "out", "--model", "none.pt"],
    "scripts.fetch_lfw": ["out", "--source", "none"],
    "scripts.flops": ["r99"],
    "scripts.hold_out": ["none", "out"],
    "scripts.import_checkpoint": ["none", "none.py"],
    "scripts.inference": ["a.jpg", "--model", "none.pt"],
    "scripts.make_noise": ["none", "out", "--flip", "0.1"],
    "scripts.make_synthetic": ["taken"],
    "scripts.pack": ["none", "out"],
    "scripts.plan": ["none.py"],
    "scripts.shuffle_rec": ["none", "out"],
    "scripts.unpack": ["none", "out"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_so(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    for file in ("train.rec", "train.idx", "file"):
        Path("taken", file).touch()
    assert importlib.import_module(name).main(COMMANDS[name]) == 2
    said = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error: ") for line in said) == 1
    assert "Traceback" not in "".join(said)


def test_no_command_is_left_out_above() -> None:
    files = [*ROOT.glob("*.py"), *(ROOT / "eval").glob("*.py"), *(ROOT / "scripts").glob("*.py")]
    commands = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in files
        if re.search(r"^def main\(", file.read_text(), re.MULTILINE)
    }
    assert commands - COMMANDS.keys() == {"scripts.gpu_check"}  # its input is this machine
