"""Which wheels another machine needs, without asking pip for any."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts import gpu_wheels
from scripts.gpu_wheels import PRESENT, collect, main, read_requirements
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PINS = {pin.name: pin for pin in read_requirements(ROOT / "constraints.txt")}
REQUIRES = {
    "first": ["Torch>=2", "second<3", "other; python_version < '3.12'", "extra-1; extra == 'all'"],
    "second": [
        "third.part>=1 ; sys_platform == 'linux' and python_version >= '3.12'",
        "first",
        "windows; sys_platform == 'win32'",
    ],
    "third-part": [],
}


class Index:
    """What stands for pip: makes wheels whose metadata is REQUIRES, and notes what was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, requirement: str, folder: Path, python: str) -> None:
        self.asked.append(requirement)
        name = requirement.split("=")[0].split(">")[0]
        lines = [f"Name: {name}", *(f"Requires-Dist: {one}" for one in REQUIRES[name])]
        stem = f"{name.replace('-', '_')}-1.0"
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(lines))
            archive.writestr("vendored/copy-1.0.dist-info/METADATA", "Requires-Dist: nothing")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "requirement.txt").write_text(
        "# What it needs.\ntorch>=2.11   # tensors\n\nFirst>=1.0    # the first\n"
    )
    (tmp_path / "constraints.txt").write_text("first==1.4.2\nsecond==2.0\ntorch==2.13.0\n")
    return tmp_path


def test_what_wheels_require_comes_too_at_its_pinned_version(project: Path) -> None:
    index = Index()
    wheels = collect(project / "wheels", "3.12", ["torch"], project, index)
    assert index.asked == ["first==1.4.2", "second==2.0", "third-part>=1"]
    assert [wheel.name.split("-")[0] for wheel in wheels] == ["first", "second", "third_part"]
    assert collect(project / "wheels", "3.12", ["torch"], project, index) == wheels
    index = Index()
    collect(project / "others", "3.12", ["torch", "Second"], project, index)
    assert index.asked == ["first==1.4.2"]


def test_wheels_that_were_there_before_are_refused(project: Path) -> None:
    folder = project / "wheels"
    folder.mkdir()
    stale = folder / "first-0.9-py3-none-any.whl"
    with zipfile.ZipFile(stale, "w") as archive:
        archive.writestr("first-0.9.dist-info/METADATA", "Name: first")
    with pytest.raises(UserError, match=r"older wheels, choose an empty folder: .*first-0\.9-py3"):
        collect(folder, "3.12", ["torch"], project, Index())
    stale.rename(folder / "unknown-0.9-py3-none-any.whl")
    with pytest.raises(UserError, match=r"empty folder: .*unknown-0\.9-py3"):
        collect(folder, "3.12", ["torch"], project, Index())


def test_our_own_requirements_are_read_and_pinned() -> None:
    names = {requirement.name for requirement in read_requirements(ROOT / "requirement.txt")}
    assert set(PRESENT) < names
    assert names - set(PRESENT) <= PINS.keys()
    assert all(str(pin.specifier).startswith("==") for pin in PINS.values())


def test_the_command_prints_what_came_and_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> SimpleNamespace:
        commands.append(command)
        name, _, version = command[-1].partition("==")
        with zipfile.ZipFile(tmp_path / f"{name}-{version}-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}-{version}.dist-info/METADATA", f"Name: {name}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    assert main([str(tmp_path), "--python", "3.13"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [command[-1].partition("==")[0] for command in commands] == ["simplejpeg", "easydict"]
    assert all("--no-deps" in command and "3.13" in command for command in commands)
    assert [line.split()[2].partition("-")[0] for line in printed[:2]] == ["simplejpeg", "easydict"]
    assert printed[-1] == (
        "python3 -m pip install --no-index --no-deps --target SITE "
        f"{tmp_path}/*.whl && export PYTHONPATH=SITE"
    )


def test_a_version_without_a_wheel_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution found")
    monkeypatch.setattr(gpu_wheels.subprocess, "run", lambda *_, **__: failed)
    assert main([str(tmp_path), "--python", "3.99"]) == 2
    said = capsys.readouterr().err
    assert f"{PINS['simplejpeg']}: pip downloaded no wheel for Python 3.99" in said
    assert "No matching distribution" in said
