"""What a measurement or a check ran on: versions, GPU, compiler and the state of the code."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
CODE_FOLDERS = (
    "arcshard",
    "backbones",
    "benchmarks",
    "configs",
    "data",
    "eval",
    "head",
    "margins",
    "parallel",
    "scripts",
    "tests",
    "training",
    "utils",
)


def describe_environment(repository: Path = REPOSITORY) -> dict[str, Any]:
    """Returns facts for a report; None stands for what is absent or does not answer."""
    import torch

    compiler = c_compiler()
    driver_query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "gpu": None,
        "gpu_memory_mib": None,
        "gpu_capability": None,
        "gpu_driver": _output(driver_query),
        "cpu_cores": os.cpu_count(),
        "c_compiler": compiler,
        "python_headers": compiler is not None and _finds_python_headers(compiler),
        "git_commit": _git_commit(repository),
        "source_sha256": source_sha256(repository),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": gpu.name,
            "gpu_memory_mib": gpu.total_memory // 2**20,
            "gpu_capability": f"{gpu.major}.{gpu.minor}",
        }
    return facts


def compiler_problem() -> str | None:
    """Says why Triton cannot build its launchers ("no C compiler" or "no Python.h"), else None."""
    compiler = c_compiler()
    if compiler is None:
        return "no C compiler"
    return None if _finds_python_headers(compiler) else "no Python.h"


def triton_problem() -> str | None:
    """Says why Triton cannot compile anything here, or returns None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return compiler_problem()


def missing_packages(*names: str) -> str:
    """Returns "not installed: ..." with the packages that cannot be imported, or "" if all can."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def c_compiler() -> str | None:
    """Returns the compiler that Triton uses: CC's if CC is set, else gcc, else clang, else None."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return next(filter(None, map(shutil.which, names)), None)


def source_sha256(repository: Path = REPOSITORY) -> str:
    """Returns the first 12 hex digits of a SHA-256 over names and contents of the code's files.

    The files are the *.py files of the repository's folder and of CODE_FOLDERS. The hash is the
    same for a commit and for a copy of its files without .git.
    """
    files = [*repository.glob("*.py")]
    for folder in CODE_FOLDERS:
        files += (repository / folder).rglob("*.py")
    total = hashlib.sha256()
    for name in sorted(file.relative_to(repository).as_posix() for file in files):
        content = hashlib.sha256((repository / name).read_bytes())
        total.update(f"{name} {content.hexdigest()}\n".encode())
    return total.hexdigest()[:12]


def _finds_python_headers(compiler: str) -> bool:
    """Returns whether the compiler finds Python.h in the folder that Triton passes to it."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    include = sysconfig.get_path("include", scheme)
    words = [compiler, "-E", "-x", "c", "-include", "Python.h", f"-I{include}", os.devnull]
    return _output(words) is not None


def _git_commit(repository: Path) -> str | None:
    if not (repository / ".git").exists():  # A parent folder may be another repository.
        return None
    words = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return _output(["git", "-C", str(repository), *words])


def _version(module: str) -> str | None:
    try:
        return str(importlib.import_module(module).__version__)
    except (ImportError, AttributeError):  # a mere folder of that name has no __version__
        return None


def _output(words: Sequence[str]) -> str | None:
    """Returns what a command prints; None if it is absent, fails or takes more than 10 seconds."""
    try:
        result = subprocess.run(words, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
