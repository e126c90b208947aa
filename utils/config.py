"""Reads a config file and `key=value` words into one checked `Config`.

The schema's defaults (configs/base.py) come first, then the module's `config`, then the command
line. All problems are collected and raised together in one UserError.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import itertools
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from configs.base import Config
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
NEVER_SAVED = ("wandb_key",)


class Alias(NamedTuple):
    """The present name of an old key.

    Attributes:
        key: The present key.
        values: Present values by old ones, where they changed as well.
    """

    key: str
    values: Mapping[Any, Any] = types.MappingProxyType({})


ALIASES: Mapping[str, Alias] = {
    "all_reduce_dtype": Alias("grad_reduce_dtype"),
    "head_buffer_mib": Alias("head_workspace_mib"),
    "head_device": Alias("head_offload", {"auto": False, "cpu": True}),
    "sub_centres": Alias("sub_centers"),
    "zero": Alias("zero_stage", {False: 0, True: 1}),
}
"""Present keys by their old spellings, which configs, command lines and saved configs may have."""
VALUE_ALIASES: Mapping[str, Mapping[str, str]] = {
    "loss": {"subcentre_arcface": "subcenter_arcface"},
}
"""Present values by their old spellings, by key."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads the config module at `path` and the `key=value` words after it.

    Args:
        path: A Python file that defines `config` (EasyDict or any mapping), with or without `.py`;
            relative to the current folder, else to this repository.
        overrides: Words such as `lr=0.02`, `val_targets=[lfw]`, `margin_list=(1.0,0.5,0.0)`.

    Raises:
        UserError: There is no such file, it cannot be run, or it has problems, which the message
            lists.
    """
    file = find_config_file(path)
    values, problems = _standard_names(_read_module(file))
    problems += [_unknown_key(key) for key in values if key not in _FIELD_TYPES]
    values = {key: value for key, value in values.items() if key in _FIELD_TYPES}

    spellings: dict[str, str] = {}
    for word in overrides:
        spelled, equals, text = word.partition("=")
        key = ALIASES[spelled].key if spelled in ALIASES else spelled
        if spellings.setdefault(key, spelled) != spelled:
            both = f"{spellings[key]} and {spelled}"
            problems.append(f"{both}: two spellings of one key; leave one out")
        if not equals:
            problems.append(f"{word!r}: after the config come key=value words, such as lr=0.02")
        elif key not in _FIELD_TYPES:
            problems.append(_unknown_key(key))
        else:
            try:
                values[key] = _parse_word(spelled, text)
            except ValueError as error:
                shown = f"{key}=***" if key in NEVER_SAVED else word
                problems.append(f"{shown!r}: {error}")

    for key, value in list(values.items()):
        try:
            values[key] = _coerce(value, _FIELD_TYPES[key])
        except TypeError as error:
            shown = "***" if key in NEVER_SAVED else repr(value)
            problems.append(f"{key}={shown}: {error}")
            del values[key]

    config = Config(**values)
    if config.output is None:
        config.output = str(Path("work_dirs") / file.stem)
    broken = {problem.split("=")[0] for problem in problems}
    problems += [text for text in config.problems() if text.split("=")[0] not in broken]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{file}: {count}\n{listed}")
    return config


def find_config_file(path: str | Path) -> Path:
    """Finds the config file that a user means by `path`.

    Args:
        path: Path with or without `.py`, relative to the current folder, else to this repository.

    Raises:
        UserError: There is no such file. The message suggests similar names.
    """
    given = Path(path)
    if not given.name:
        raise UserError(f"{str(path)!r} is no config file: name one, such as configs/ms1mv3_r50")
    names = [given] if given.suffix == ".py" else [given.with_name(given.name + ".py"), given]
    for folder in (Path.cwd(), REPOSITORY):
        for name in names:
            candidate = folder / name
            if candidate.is_file():
                return candidate
    shipped = sorted(p.stem for p in (REPOSITORY / "configs").glob("*.py"))
    near = difflib.get_close_matches(given.stem, shipped, n=3)
    hint = f"; did you mean {' or '.join('configs/' + n for n in near)}?" if near else ""
    raise UserError(f"no config file at {given} (tried with and without .py){hint}")


def save_config(config: Config, path: str | Path, **resolved: object) -> None:
    """Writes the resolved config as JSON, without secrets.

    Args:
        config: The config.
        path: The file.
        resolved: What the run found out itself (world size, number of classes, ...).
    """
    values = {**plain_values(config), "resolved": resolved}
    Path(path).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def plain_values(config: Config) -> dict[str, object]:
    """Returns the value of every key as JSON represents it, without secrets."""
    told = {k: v for k, v in dataclasses.asdict(config).items() if k not in NEVER_SAVED}
    values: dict[str, object] = json.loads(json.dumps(told))
    return values


def describe_fields() -> str:
    """Returns every key with its default and docstring, as text for --help."""
    source = (REPOSITORY / "configs" / "base.py").read_text()
    body = next(
        node.body
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "Config"
    )
    lines = []
    for statement, following in itertools.pairwise(body):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        text = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            text = re.sub(r"\s+", " ", str(following.value.value)).strip()
        default = ast.unparse(statement.value) if statement.value is not None else ""
        default = "[]" if default == "field(default_factory=list)" else default
        lines.append(f"{statement.target.id} = {default}\n    {text}")
    return "\n".join(lines)


_FIELD_TYPES: dict[str, Any] = typing.get_type_hints(Config)


def _read_module(file: Path) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location(f"arcshard_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file}: running it failed: {type(error).__name__}: {error}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, Mapping):
        raise UserError(
            f"{file}: no `config` found; define config = EasyDict(...) (any mapping will do)"
        )
    return {str(key): value for key, value in config.items()}


def _standard_names(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Translates old spellings, and returns a problem for each key that is there in both."""
    problems = [
        f"{old} and {alias.key}: two spellings of one key; leave {old} out"
        for old, alias in ALIASES.items()
        if old in values and alias.key in values
    ]
    found = {}
    for key, value in values.items():
        try:
            new_key, new_value = standard_setting(key, value)
        except ValueError as error:
            problems.append(str(error))
        else:
            found[new_key] = new_value
    return found, problems


def standard_setting(key: str, value: Any) -> tuple[str, Any]:
    """Translates a key and its value from an old spelling to the present one.

    Args:
        key: Any key, an old spelling or not.
        value: Its value.

    Returns:
        The present key and value.

    Raises:
        ValueError: The key was renamed together with its values, and this is none of the old ones.
    """
    if key in ALIASES:
        alias = ALIASES[key]
        if alias.values:
            known = [
                new
                for old, new in alias.values.items()
                if type(old) is type(value) and old == value
            ]
            if not known:
                listed = ", ".join(
                    f"{key}={old} ({alias.key}={new})" for old, new in alias.values.items()
                )
                raise ValueError(f"{key}={value!r}: {key} is {alias.key} now; known are {listed}")
            value = known[0]
        key = alias.key
    old_values = VALUE_ALIASES.get(key, {})
    return key, old_values.get(value, value) if isinstance(value, str) else value


def _parse_word(key: str, text: str) -> Any:
    """Parses the value of a `key=text` word, whose key may be an old spelling.

    Raises:
        ValueError: The text is no value of the field's type.
    """
    alias = ALIASES.get(key)
    if alias is None or not alias.values:
        standard = key if alias is None else alias.key
        return standard_setting(standard, _parse(text, _FIELD_TYPES[standard]))[1]
    kinds = {type(old) for old in alias.values}
    return standard_setting(key, _parse(text, kinds.pop()))[1]


def _unknown_key(key: str) -> str:
    near = difflib.get_close_matches(key, _FIELD_TYPES, n=3, cutoff=0.5)
    hint = f"; nearest known: {', '.join(near)}" if near else ""
    return f"unknown key {key!r}{hint} (train_v2.py --help lists all keys)"


def _alternatives(kind: Any) -> tuple[Any, ...]:
    is_union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if is_union else (kind,)


def _type_name(kind: Any) -> str:
    names = [
        "None"
        if a is type(None)
        else getattr(a, "__name__", str(a))
        if not typing.get_args(a)
        else str(a)
        for a in _alternatives(kind)
    ]
    return " or ".join(names)


def _coerce(value: Any, kind: Any) -> Any:
    """Converts `value` to the field's type; tuples may be lists, and numbers int or float.

    Raises:
        TypeError: The value is of another type.
    """
    for alternative in _alternatives(kind):
        origin, arguments = typing.get_origin(alternative), typing.get_args(alternative)
        if alternative is type(None) and value is None:
            return None
        if alternative is bool and isinstance(value, bool):
            return value
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if alternative is int and is_number and math.isfinite(value) and int(value) == value:
            return int(value)
        if alternative is float and is_number:
            return float(value)
        if alternative is str and isinstance(value, (str, Path)):
            return str(value)
        if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
            return tuple(_coerce(v, a) for v, a in zip(value, arguments, strict=True))
        if origin is list and isinstance(value, (list, tuple)):
            return [_coerce(v, arguments[0]) for v in value]
    raise TypeError(f"{type(value).__name__} given, {_type_name(kind)} needed")


def _parse(text: str, kind: Any) -> Any:
    """Parses a command-line word as the field's type; names inside lists need no quotes.

    Raises:
        ValueError: The text is no value of the type.
    """
    alternatives = _alternatives(kind)
    if text in ("None", "none", "null") and type(None) in alternatives:
        return None
    if bool in alternatives and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for alternative in alternatives:
        origin, arguments = typing.get_origin(alternative), typing.get_args(alternative)
        if origin in (list, tuple) and (str not in alternatives or text.strip()[:1] in ("[", "(")):
            inner = text.strip().removeprefix("[").removeprefix("(")
            inner = inner.removesuffix("]").removesuffix(")")
            words = [word.strip() for word in inner.split(",") if word.strip()]
            return [_parse(word, arguments[0]) for word in words]
        if alternative in (int, float):
            try:
                return alternative(text)
            except ValueError:
                if alternative is int and re.fullmatch(r"[+-]?\d+(\.0*)?e\+?\d+", text.lower()):
                    return float(text)  # 1e5 is accepted as a whole number
                continue
    if str in alternatives:
        return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" else text
    raise ValueError(f"{_type_name(kind)} needed")
