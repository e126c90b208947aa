"""Imports flow one way between the packages, and nothing happens at import."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.helpers import ENTRY_POINTS, PACKAGES, ROOT

# importer -> what of ours it may import (prefixes of module names; its own package is free)
ALLOWED: dict[str, tuple[str, ...]] = {
    "configs.base": (),
    "configs": ("configs.base",),
    "utils.config": ("configs.base", "utils.errors"),
    "utils": (),
    "arcshard": (),
    "losses": ("arcshard",),
    "partial_fc": ("arcshard",),
    "backbones": ("utils.errors", "utils.files"),
    "eval.metrics": ("utils.errors",),
    "data": ("utils.errors", "utils.files"),
    "dataset": ("data", "utils.errors", "utils.moved"),
    "eval": ("utils", "backbones", "data", "eval"),
    "eval.classification": ("data", "arcshard.head.ranking", "utils", "backbones"),
    "training": ("configs.base", "arcshard", "dataset", "data", "eval", "backbones", "utils"),
    "torch2onnx": ("backbones", "eval", "utils"),
    "train_v2": ("backbones", "configs.base", "dataset", "eval", "training", "utils"),
    # old names that work for one release
    **dict.fromkeys(("head", "margins", "eval.embedder"), ("utils.moved",)),
    "parallel": ("utils.moved", "arcshard.parallel"),
}
NEVER_IMPORTED = ("train_v2", "torch2onnx", "scripts", "benchmarks")
LATER_PARTS = {"training": "training.planner", "data": "data.tools"}  # the rest imports none of it
EARLIER_PART = "training.checkpoint."  # imports nothing of training but itself
OLD_NAMES = ("head", "margins", "parallel", "eval.embedder")  # for users only, for one release


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file, made once for all tests."""
    return ast.parse(path.read_text())


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def our_files() -> list[Path]:
    files = [ROOT / f"{name}.py" for name in ENTRY_POINTS]
    files += [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return sorted(path for path in files if path.exists())


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return {name for name in found if name.split(".")[0] in (*PACKAGES, *ENTRY_POINTS)}


def rule_for(module: str) -> tuple[str, ...] | None:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        rule = ALLOWED.get(".".join(parts[:length]))
        if rule is not None:
            return rule
    return None


@pytest.mark.parametrize("path", our_files(), ids=module_name)
def test_imports_flow_one_way(path):
    module = module_name(path)
    package = module.split(".")[0]
    for imported in imports_of(path):
        if module not in (*OLD_NAMES, "tests.test_moved"):
            is_old = any(imported == old or imported.startswith(old + ".") for old in OLD_NAMES)
            assert not is_old, f"{module} imports {imported}, which goes away with the next release"
        if f"{module}.".startswith(EARLIER_PART) and imported.startswith("training"):
            assert f"{imported}.".startswith(EARLIER_PART), f"{module} imports {imported}"
        if package not in ("tests", "benchmarks"):  # benchmarks take their baselines from tests
            assert imported.split(".")[0] != "tests", f"{module} imports {imported}"
        if package in ("scripts", "benchmarks", "tests"):
            if package == "scripts":
                assert not imported.startswith(("train_v2", "benchmarks"))
            continue
        assert not imported.startswith(NEVER_IMPORTED), f"{module} imports {imported}"
        later = LATER_PARTS.get(package)
        if later is not None and not module.startswith(later):
            assert not imported.startswith(later), f"{module} imports {imported}"
        allowed = rule_for(module)
        assert allowed is not None, f"{module} has no rule in ALLOWED"
        strict = module in ("configs.base", "eval.metrics", "utils.config")
        own_package = imported.split(".")[0] == package and not strict
        fits = any(imported == a or imported.startswith(a + ".") for a in allowed)
        assert fits or own_package, f"{module} imports {imported}"


def test_no_test_module_imports_another():
    """Neither by a statement nor in the code of a child process: tests/*helpers.py are for that."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = path.read_text()
        found = {name for name in imports_of(path) if name.startswith("tests.test_")}
        found |= set(re.findall(r"(?:from|import) +(tests\.test_\w+)", text))
        found |= set(re.findall(r"from tests import .*\b(test_\w+)", text))
        assert not found, f"{path.name} imports {', '.join(sorted(found))}"


@pytest.mark.parametrize("path", our_files(), ids=module_name)
def test_nothing_happens_at_import(path):
    """Module level holds definitions, constants and docstrings: no loop, no bare call."""
    for node in parsed(path).body:
        if isinstance(node, ast.If):  # `if TYPE_CHECKING` and the command-line guard
            text = ast.unparse(node.test)
            known = ("__name__", "TYPE_CHECKING", "not __package__")  # the last: run as a file
            assert any(word in text for word in known), f"{path}:{node.lineno}"
        else:
            assert not isinstance(node, (ast.For, ast.While, ast.With)), f"{path}:{node.lineno}"
            is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            assert not is_call, f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", our_files(), ids=module_name)
def test_mxnet_is_never_imported(path):
    if module_name(path).split(".")[0] == "tests":
        return
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not any(name.split(".")[0] == "mxnet" for name in names)
