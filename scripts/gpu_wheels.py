"""Collect wheels that a GPU machine with a usual PyTorch image lacks, for use without a network.

    python -m scripts.gpu_wheels DIR [--python 3.12] [--present NAME ...]     (make gpu-wheels)

The command downloads the packages of requirement.txt that such an image does not have, at the
versions of constraints.txt, and what these packages themselves require; for Linux on x86-64. It
prints the command that installs them on the other machine.
"""

from __future__ import annotations

import argparse
import email
import subprocess
import sys
import zipfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from utils.cli import cli_command
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
# Images with PyTorch for CUDA have these; another torch or numpy would not fit the image's others.
PRESENT = (
    "torch",
    "numpy",
    "opencv-python-headless",
    "tqdm",
    "tensorboard",
    "matplotlib",
    "onnx",
    "onnxscript",
    "onnxruntime",
)
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
    "any",
)


def read_requirements(path: Path) -> list[Requirement]:
    """Reads a file with a requirement per line and comments behind #."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def requirements_of(wheel: Path, python: str) -> list[Requirement]:
    """Returns what a wheel requires on Linux on x86-64, without extras.

    Args:
        wheel: Path of the wheel.
        python: Version of Python, such as 3.12.
    """
    with zipfile.ZipFile(wheel) as archive:
        # METADATA in deeper folders belongs to packages of which the wheel has copies.
        (name,) = (
            name
            for name in archive.namelist()
            if name.endswith(".dist-info/METADATA") and name.count("/") == 1
        )
        metadata = email.message_from_bytes(archive.read(name))
    environment = {
        "python_version": ".".join(python.split(".")[:2]),
        "python_full_version": python if python.count(".") > 1 else f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "extra": "",
    }
    found = map(Requirement, metadata.get_all("Requires-Dist", []))
    return [r for r in found if r.marker is None or r.marker.evaluate(environment)]


def download(requirement: str, folder: Path, python: str) -> None:
    """Downloads one wheel into a folder by pip.

    Args:
        requirement: Name and version.
        folder: The folder.
        python: Version of Python, such as 3.12.

    Raises:
        UserError: pip finds no wheel.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--implementation",
        "cp",
        "--python-version",
        python,
        "--dest",
        str(folder),
        *(f"--platform={platform}" for platform in PLATFORMS),
        requirement,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(
            f"{requirement}: pip downloaded no wheel for Python {python} on Linux x86-64\n"
            f"{result.stderr[-2000:]}"
        )


def collect(
    folder: Path,
    python: str,
    present: Collection[str] = PRESENT,
    repository: Path = REPOSITORY,
    download: Callable[[str, Path, str], None] = download,
) -> list[Path]:
    """Downloads the wheels that the other machine lacks.

    Args:
        folder: Folder of the wheels.
        python: Version of Python, such as 3.12.
        present: Packages that the other machine has.
        repository: Folder of requirement.txt and constraints.txt.
        download: Downloads one wheel.

    Returns:
        The wheels in the folder.

    Raises:
        UserError: A wheel cannot be downloaded, or the folder has others too.
    """
    constraints = read_requirements(repository / "constraints.txt")
    versions = {canonicalize_name(pin.name): str(pin.specifier) for pin in constraints}
    wanted = read_requirements(repository / "requirement.txt")
    done = {canonicalize_name(name) for name in present}
    folder.mkdir(parents=True, exist_ok=True)
    wheels: list[Path] = []
    while wanted:
        requirement = wanted.pop(0)
        name = canonicalize_name(requirement.name)
        if name in done:
            continue
        done.add(name)
        download(f"{name}{versions.get(name, requirement.specifier)}", folder, python)
        here = [p for p in folder.glob("*.whl") if parse_wheel_filename(p.name)[0] == name]
        wheels += here
        wanted += [one for wheel in here for one in requirements_of(wheel, python)]
    others = {*folder.glob("*.whl")} - {*wheels}
    names = [parse_wheel_filename(path.name)[0] for path in wheels]
    if others or len({*names}) < len(names):
        listed = ", ".join(sorted(path.name for path in {*wheels, *others}))
        raise UserError(f"{folder} has older wheels, choose an empty folder: {listed}")
    return wheels


@cli_command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="where the wheels go")
    add("--python", default="3.12", metavar="X.Y", help="of the other machine (default 3.12)")
    add(
        "--present",
        nargs="*",
        default=PRESENT,
        metavar="NAME",
        help=f"packages that it has (default {' '.join(PRESENT)})",
    )
    options = parser.parse_args(arguments)
    wheels = collect(options.folder, options.python, options.present)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:8.2f} MiB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    print(f"{total:8.2f} MiB  in all. This installs them into a folder SITE on the other machine:")
    print(
        "python3 -m pip install --no-index --no-deps --target SITE "
        f"{options.folder}/*.whl && export PYTHONPATH=SITE"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
