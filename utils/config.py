"""Reads a config file and `key=value` words into one checked `Config`.

The schema's defaults (configs/base.py) come first, then the module's `config`, then the command
line. All problems are collected and raised together in one UserError.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import ValidationError

from configs.base import Config
from utils.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent


class Alias(NamedTuple):
    """What a key of arcface_torch or of an earlier version is now.

    Attributes:
        key: The present key; "" if the key has no effect any more.
        values: Present values by old ones, where they changed as well.
        remark: For a key without effect: what to do instead, if there is anything to do.
    """

    key: str
    values: Mapping[Any, Any] = types.MappingProxyType({})
    remark: str = ""


ALIASES: Mapping[str, Alias] = {
    "all_reduce_dtype": Alias("grad_reduce_dtype"),
    "dali_aug": Alias("augment"),  # with dali=True only: see _add_dali_aug
    "head_buffer_mib": Alias("head_workspace_mib"),
    "head_device": Alias("head_offload", {"auto": False, "cpu": True}),
    "save_all_states": Alias(""),  # checkpoints are always complete
    "static_graph": Alias("", remark="it made no step faster"),
    "sub_centres": Alias("sub_centers"),
    "wandb_key": Alias("", remark="keep keys in the environment (WANDB_API_KEY)"),
    "worker_type": Alias("", remark="threads decode the images"),
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
    values, problems = _read_words(overrides)
    settings, remarks, more = standard_settings(_read_module(file), values)
    problems += more
    problems += [unknown_key(key) for key in settings if key not in Config.model_fields]
    known = {key: value for key, value in settings.items() if key in Config.model_fields}
    try:
        config = Config(**known)
    except ValidationError as error:
        places: dict[str, Any] = {}  # the first of each key; a union has one for each type
        for wrong in error.errors():
            places.setdefault(str(wrong["loc"][0]), wrong["loc"])
        problems += [_wrong_value(key, known.pop(key), place) for key, place in places.items()]
        config = Config(**known)
    if config.output is None:
        config.output = str(Path("work_dirs") / file.stem)
    config._remarks = tuple(remarks)
    # A rule over a key that is wrong by itself would judge the default instead.
    broken = {re.split(r"\W", problem)[0] for problem in problems}
    problems += [text for text in config.problems() if re.split(r"\W", text)[0] not in broken]
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
    near = [f"configs/{name}" for name in difflib.get_close_matches(given.stem, shipped, n=3)]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f"no config file at {given} (tried with and without .py){hint}")


def standard_settings(
    *sources: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Joins settings, and translates old spellings of keys and values to the present ones.

    Args:
        sources: Values by key; a later source overrides an earlier one.

    Returns:
        (values by present key, a sentence for each key that is left out and matters, problems).
    """
    settings: dict[str, Any] = {}
    remarks, problems = [], []
    for source in sources:
        spellings: dict[str, str] = {}
        for spelling, value in source.items():
            alias = ALIASES.get(spelling)
            if alias is None or spelling == "dali_aug":
                key = spelling
            elif not alias.key:
                if value and alias.remark:
                    remarks.append(f"{spelling} is ignored: {alias.remark}")
                continue
            else:
                key = alias.key
                try:
                    value = _standard_value(spelling, value)
                except ValueError as error:
                    problems.append(str(error))
                    continue
            if spellings.setdefault(key, spelling) != spelling:
                both = f"{spellings[key]} and {spelling}"
                problems.append(f"{both}: two spellings of one key; leave one out")
            renamed = VALUE_ALIASES.get(key, {})
            settings[key] = renamed.get(value, value) if isinstance(value, str) else value
    _add_dali_aug(settings, remarks, problems)
    return settings, remarks, problems


def _standard_value(old_key: str, value: Any) -> Any:
    """Returns the present value of an old key.

    Raises:
        ValueError: The key was renamed together with its values, and this is none of the old ones.
    """
    key, values, _ = ALIASES[old_key]
    if not values:
        return value
    for old, new in values.items():
        if type(old) is type(value) and old == value:  # True == 1
            return new
    listed = ", ".join(f"{old_key}={old} ({key}={new})" for old, new in values.items())
    raise ValueError(f"{old_key}={value!r}: {old_key} is {key} now; known are {listed}")


def _add_dali_aug(settings: dict[str, Any], remarks: list[str], problems: list[str]) -> None:
    """Replaces dali_aug by the augmentations of that name, where DALI reads the images."""
    wanted = settings.pop("dali_aug", False)
    others = settings.get("augment", [])
    if not isinstance(wanted, bool):
        problems.append(f"dali_aug={wanted!r}: allowed is True or False")
    elif wanted and settings.get("dali") is not True:
        remarks.append(
            "dali_aug=True has an effect only with dali=True, as in arcface_torch; "
            "augment=[dali_aug] works without DALI too"
        )
    elif wanted and isinstance(others, list | tuple):
        settings["augment"] = ["dali_aug", *(name for name in others if name != "dali_aug")]


def save_config(config: Config, path: str | Path, **resolved: object) -> None:
    """Writes the resolved config as JSON.

    Args:
        config: The config.
        path: The file.
        resolved: What the run found out itself (world size, number of classes, ...).
    """
    values = {**plain_values(config), "resolved": resolved}
    Path(path).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def plain_values(config: Config) -> dict[str, object]:
    """Returns the value of every key as JSON represents it."""
    return config.model_dump(mode="json")


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


def _read_words(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Returns the values of `key=text` words, and a problem for each word without `=`."""
    values, problems = {}, []
    for word in words:
        key, equals, text = word.partition("=")
        if equals:
            values[key] = _parse(text, _types_of(key))
        else:
            problems.append(f"{word!r}: after the config come key=value words, such as lr=0.02")
    return values, problems


def _types_of(key: str) -> list[Any]:
    """Returns the types that a key of the command line admits."""
    alias = ALIASES.get(key)
    if alias is not None and (alias.values or not alias.key or key == "dali_aug"):
        return [bool, str, type(None)]
    field = Config.model_fields.get(key if alias is None else alias.key)
    return [str] if field is None else [kind for kind, _ in _alternatives(field.annotation)]


def _parse(text: str, kinds: Sequence[Any]) -> Any:
    """Reads a command-line word as a value of one of `kinds`; names in lists need no quotes.

    Returns:
        The value, or the text where it is none, for pydantic to refuse.
    """
    plain = {typing.get_origin(kind) or kind for kind in kinds}
    if Literal in plain:
        plain |= {type(v) for kind in kinds for v in typing.get_args(kind)}
    if type(None) in plain and text in ("None", "none", "null"):
        return None
    if bool in plain and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if plain & {list, tuple} and (str not in plain or text.strip()[:1] in ("[", "(")):
        item = next(
            a for k in kinds if typing.get_origin(k) in (list, tuple) for a in typing.get_args(k)
        )
        inner = text.strip().removeprefix("[").removeprefix("(")
        words = inner.removesuffix("]").removesuffix(")").split(",")
        types_of_items = [kind for kind, _ in _alternatives(item)]
        return [_parse(word.strip(), types_of_items) for word in words if word.strip()]
    if plain & {int, float}:
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                continue
    is_quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if is_quoted and str in plain else text


def _alternatives(annotation: Any, details: Sequence[Any] = ()) -> Iterator[tuple[Any, list[Any]]]:
    """Yields each type of a union, with its pydantic details (ranges, titles)."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        for detail in arguments[1:]:
            details = [*details, detail, *getattr(detail, "metadata", ())]
        yield from _alternatives(arguments[0], details)
    elif origin is typing.Union or isinstance(annotation, types.UnionType):
        for argument in arguments:
            yield from _alternatives(argument, details)
    else:
        yield annotation, list(details)


def unknown_key(key: str) -> str:
    """Returns the sentence on a key that does not exist, with the nearest that do."""
    near = difflib.get_close_matches(key, [*Config.model_fields, *ALIASES], n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(near)}?" if near else ""
    return f"unknown key {key!r}{hint} (train_v2.py --help lists all keys)"


def _wrong_value(key: str, value: Any, place: Sequence[int | str]) -> str:
    """Says what a key allows, or one of its items.

    Args:
        key: The key.
        value: Its value.
        place: Where pydantic found the problem: the key, and the number of an item.
    """
    items = typing.get_args(Config.model_fields[key].annotation)
    number = place[-1]
    if isinstance(number, int) and isinstance(value, list | tuple) and len(value) == len(items):
        ((item, details),) = _alternatives(items[number])
        for title in filter(None, (getattr(detail, "title", None) for detail in details)):
            return f"{key} {title}={value[number]!r}: allowed is {_describe(item, details)}"
    words = allowed(key)
    if isinstance(value, float) and not math.isfinite(value):
        words = words.replace("a number", "a finite number")
    choices = words.removeprefix("are ").split(", ") if words.startswith("are ") else []
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key}={value!r}: allowed {words}{hint}"


def allowed(key: str) -> str:
    """Returns what a key allows: "are sgd, adamw", or "is a number in [0, 1), or None"."""
    field = Config.model_fields[key]
    kinds = list(_alternatives(field.annotation, field.metadata))
    choices: list[Any] = []
    for kind, _ in kinds:
        choices += [None] if kind is type(None) else typing.get_args(kind)
    if all(kind is type(None) or typing.get_origin(kind) is Literal for kind, _ in kinds):
        return f"are {', '.join(map(str, choices))}"
    return f"is {', or '.join(_describe(kind, details) for kind, details in kinds)}"


def _describe(kind: Any, details: Sequence[Any]) -> str:
    """Returns, for example, "a number in [0, 1)" of a type and its pydantic details."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return ", ".join(json.dumps(value) for value in arguments)
    if typing.get_origin(kind) is list:
        return f"a list, each {_describe(*next(_alternatives(arguments[0])))}"
    if typing.get_origin(kind) is tuple:
        return f"{len(arguments)} numbers"
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
    bounds = {
        sign: {math.pi: "pi", 2**63: "2**63"}.get(value, value)
        for detail in details
        for sign in ("ge", "gt", "le", "lt")
        if (value := getattr(detail, sign, None)) is not None
    }
    low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
    if high is not None:
        edges = "[" if "ge" in bounds else "(", "]" if "le" in bounds else ")"
        return f"{names[kind]} in {edges[0]}{low}, {high}{edges[1]}"
    if low is not None:
        return f"{names[kind]} {'of at least' if 'ge' in bounds else 'above'} {low}"
    return names.get(kind, "None")
