"""The environment of a report: facts, None for what is absent, and a name for the code's state."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy
import pytest
import torch

from utils import environment
from utils.environment import (
    compiler_problem,
    describe_environment,
    missing_packages,
    source_sha256,
    triton_problem,
)


def make_code(folder: Path) -> Path:
    for name in ("train_v2.py", "arcshard/head/fused.py", "scripts/launch/ranks.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n")
    return folder


def test_facts_are_plain_values_and_what_is_absent_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = describe_environment(make_code(tmp_path))
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["torch"], facts["numpy"]) == (torch.__version__, numpy.__version__)
    absent = ("gpu", "gpu_memory_mib", "gpu_capability", "gpu_driver", "c_compiler", "git_commit")
    assert [facts[name] for name in absent] == [None] * len(absent)
    assert facts["python_headers"] is False
    assert facts["cpu_cores"] >= 1
    assert facts["source_sha256"] == source_sha256(tmp_path)


def test_the_driver_comes_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 595.71.05\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert describe_environment(tmp_path)["gpu_driver"] == "595.71.05"
    program.write_text("#!/bin/sh\necho it does not answer; exit 9\n")
    assert describe_environment(tmp_path)["gpu_driver"] is None


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_says_whether_files_differ_from_it(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        command = ["git", "-C", str(code), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    code = make_code(tmp_path / "code")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert describe_environment(code)["git_commit"] == commit
    (code / "train_v2.py").write_text("# changed\n")
    assert describe_environment(code)["git_commit"] == f"{commit}-dirty"
    inside = make_code(code / "copy")
    assert describe_environment(inside)["git_commit"] is None


def test_the_hash_is_of_names_and_contents_of_the_code(tmp_path: Path) -> None:
    first = source_sha256(make_code(tmp_path / "one"))
    two = make_code(tmp_path / "two")
    assert source_sha256(two) == first
    assert len(first) == 12
    assert int(first, 16) >= 0
    (two / "work_dirs").mkdir()
    (two / "work_dirs" / "config.py").write_text("not ours")
    (two / "arcshard" / "notes.txt").write_text("not code")
    assert source_sha256(two) == first
    (two / "arcshard" / "head" / "fused.py").write_text("# other\n")
    assert source_sha256(two) != first
    three = make_code(tmp_path / "three")
    (three / "arcshard" / "head" / "fused.py").rename(three / "arcshard" / "head" / "motor.py")
    assert source_sha256(three) != first


def test_what_triton_lacks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path))
        assert compiler_problem() == "no C compiler"
    if shutil.which("gcc") is None and shutil.which("clang") is None:
        pytest.skip("no C compiler here")
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    assert compiler_problem() is None
    (tmp_path / "Python.h").unlink()
    assert compiler_problem() == "no Python.h"
    monkeypatch.setenv("CC", "no-such-compiler")
    assert compiler_problem() == "no C compiler"


def test_packages_that_are_not_there_are_named() -> None:
    assert missing_packages("torch", "json") == ""
    assert missing_packages("no_a", "json", "no_b") == "not installed: no_a, no_b"


def test_triton_needs_a_compiler_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, object] = {"triton": None}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found[name])
    monkeypatch.setattr("utils.environment.compiler_problem", lambda: "no Python.h")
    assert triton_problem() == "Triton is not installed"
    found["triton"] = object()
    assert triton_problem() == "no Python.h"


def test_a_folder_that_has_a_packages_name_is_no_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a_mere_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert environment._version("a_mere_folder") is None
    assert environment._version("torch") == torch.__version__
