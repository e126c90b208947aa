"""The wheel holds the library alone, needs PyTorch alone, and the README's example runs from it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import arcshard

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = next(
    block
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    if "from arcshard import" in block
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, because setuptools writes beside what it reads."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ours = ["*.py", "*.toml", "*.md", "LICENSE"]
    source.mkdir()
    for pattern in ours:
        for path in ROOT.glob(pattern):
            shutil.copy(path, source)
    for package in ("arcshard", "data", "training"):
        shutil.copytree(
            ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    subprocess.run([*command, "--quiet", "-w", str(folder), str(source)], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_arcshard_only_with_every_module_and_its_types(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    information = f"arcshard-{arcshard.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"arcshard", information}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "arcshard").rglob("*.py")}
    assert {name for name in names if name.startswith("arcshard/")} == modules | {
        "arcshard/py.typed"
    }


def test_the_version_of_the_wheel_is_the_package_s_and_it_needs_torch_alone(wheel: Path) -> None:
    assert wheel.name == f"arcshard-{arcshard.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
        metadata = archive.read(name).decode()
    needed = re.findall(r"^Requires-Dist: (\w+)", metadata, re.MULTILINE)
    assert needed == ["torch"]
    in_requirements = re.search(
        r"^(torch\S+)", (ROOT / "requirement.txt").read_text(), re.MULTILINE
    )
    assert in_requirements is not None
    assert f"Requires-Dist: {in_requirements[1]}\n" in metadata


@pytest.mark.parametrize("path", sorted((ROOT / "arcshard").rglob("*.py")), ids=lambda p: p.name)
def test_a_module_of_the_library_imports_torch_and_the_standard_library_only(path: Path) -> None:
    allowed = {"torch", "arcshard", *sys.stdlib_module_names}
    if path.name in ("kernels.py", "triton_kernels.py"):  # within functions, where one is launched
        allowed.add("triton")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] in allowed


def test_the_library_imports_neither_triton_nor_the_compiler() -> None:
    """Together they take 1.4 s and 150 MB."""
    code = "import sys, arcshard; print({'triton', 'torch._dynamo'} & sys.modules.keys())"
    words = [sys.executable, "-c", code]
    run = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "set()"


def run_example(installed: Path, folder: Path, ranks: int) -> list[float]:
    """The losses that the README's example prints, from the installed wheel alone."""
    script = folder / "example.py"
    script.write_text(EXAMPLE)
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*launch, str(script)],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return [float(line.split()[1]) for line in run.stdout.splitlines()]


def test_the_example_of_the_readme_gives_the_same_losses_on_one_rank_and_on_two(
    installed: Path, tmp_path: Path
) -> None:
    assert len(EXAMPLE.splitlines()) <= 25
    alone = run_example(installed, tmp_path, 1)
    assert len(alone) == 20
    assert alone[-1] < alone[0]
    assert run_example(installed, tmp_path, 2) == pytest.approx(alone, rel=1e-12)


def test_what_the_package_exports_is_documented_and_there() -> None:
    for name in arcshard.__all__:
        value = getattr(arcshard, name)
        assert isinstance(value, str) or value.__doc__
