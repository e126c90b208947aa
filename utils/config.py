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
import sys
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
        key: The present key; None if the key has no effect any more.
        values: Present values by old ones, where they changed as well.
        remark: What else there is to say, such as what to do instead.
    """

    key: str | None
    values: Mapping[Any, Any] = types.MappingProxyType({})
    remark: str = ""


ALIASES: Mapping[str, Alias] = {
    "all_reduce_dtype": Alias("grad_reduce_dtype"),
    "dali_aug": Alias("augment", remark="dali_aug=True, with dali=True, is augment=[dali_aug]"),
    "head_buffer_mib": Alias("head_workspace_mib"),
    "head_device": Alias("head_offload", {"auto": False, "cpu": True}),
    "save_all_states": Alias(None, remark="checkpoints are always complete"),
    "static_graph": Alias(None, remark="it made no step faster"),
    "sub_centres": Alias("sub_centers"),
    "wandb_key": Alias(None, remark="keep keys in the environment (WANDB_API_KEY)"),
    "worker_type": Alias(None, remark="threads decode the images"),
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
    broken: set[str] = set()
    try:
        config = Config(**known)
    except ValidationError as error:
        places = [(str(wrong["loc"][0]), wrong["loc"]) for wrong in error.errors()]
        # A union has an error for each of its types, which all become the same sentence.
        problems += dict.fromkeys(_wrong_value(key, known[key], place) for key, place in places)
        broken = {key for key, _ in places}
        config = Config(**{key: value for key, value in known.items() if key not in broken})
    if config.output is None:
        config.output = str(Path("work_dirs") / file.stem)
    config._remarks = tuple(remarks)
    # A rule that names a key whose value is wrong by itself would judge the default instead.
    problems += [rule for rule in config.problems() if broken.isdisjoint(re.findall(r"\w+", rule))]
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
    runs = {path.stem for path in (REPOSITORY / "configs").glob("*.py")}
    shipped = sorted(runs - {"__init__", "base", "datasets"})
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
            elif alias.key is None:
                if _shown(value) not in ("None", "False", "''", "'threads'"):  # the old defaults
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
    raise ValueError(f"{old_key}={_shown(value)}: {old_key} is {key} now; known are {listed}")


def _add_dali_aug(settings: dict[str, Any], remarks: list[str], problems: list[str]) -> None:
    """Replaces dali_aug by the augmentations of that name, where DALI reads the images."""
    wanted = settings.pop("dali_aug", False)
    others = settings.get("augment", [])
    if not isinstance(wanted, bool):
        problems.append(f"dali_aug={_shown(wanted)}: allowed is True or False")
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
            shown = "wandb..." if "wandb" in word.lower() else word  # it may hold a key
            problems.append(f"{shown!r}: after the config come key=value words, such as lr=0.02")
    return values, problems


def _types_of(key: str) -> list[Any]:
    """Returns the types that the value of a word may have; text for an unknown key."""
    alias = ALIASES.get(key, Alias(key))
    if alias.key is None or alias.values or key == "dali_aug":
        return [bool, str, type(None)]
    field = Config.model_fields.get(alias.key)
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
    known = [*Config.model_fields, *(old for old, now in ALIASES.items() if now.key is not None)]
    near = difflib.get_close_matches(key.lower(), known, n=3)
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
        if title := _title(details):
            shown, words = _shown(value[number]), _describe(item, details)
            return f"{key} {title}={shown}: allowed is {_finite(words, value[number])}"
    words = allowed(key)
    choices = words.removeprefix("are ").split(", ") if words.startswith("are ") else []
    near = isinstance(value, str) and difflib.get_close_matches(value.lower(), choices, 1, 0.7)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key}={_shown(value)}: allowed {_finite(words, value)}{hint}"


def _finite(words: str, value: Any) -> str:
    """Adds that a number must be finite, where one in `value` is not, or is none for a float."""
    numbers = value if isinstance(value, list | tuple) else [value]
    if all(not isinstance(n, int | float) or abs(n) <= sys.float_info.max for n in numbers):
        return words
    return words.replace("a number", "a finite number").replace("f numbers", "f finite numbers")


def _shown(value: Any) -> str:
    """Returns the start of repr(value), whatever the value is."""
    try:
        text = repr(value)
    except Exception as error:  # of a huge int, or of a class that is not ours
        return f"<{type(value).__name__}: {type(error).__name__}>"
    return text if len(text) <= 200 else f"{text[:200]}..."


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
        item = _describe(*next(_alternatives(arguments[0])))
        plural = item.removeprefix("a ").replace("number", "numbers").replace("text", "texts")
        return f"a list of {plural}"
    if typing.get_origin(kind) is tuple:
        items = [next(_alternatives(item)) for item in arguments]
        named = [f"{_title(about)} {_describe(item, about)}" for item, about in items]
        return f"{len(items)} numbers" + (f": {'; '.join(named)}" if _title(items[0][1]) else "")
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


def _title(details: Sequence[Any]) -> str:
    return next(filter(None, (getattr(detail, "title", None) for detail in details)), "")
