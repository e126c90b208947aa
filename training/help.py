"""What `train_v2.py --help` and `train_v2.py help KEY` print."""

from __future__ import annotations

import textwrap
from itertools import groupby

from backbones import backbone_class, model_names
from configs.base import LOSSES, Config, default_of
from training.build_head import make_margin
from utils.config import ALIASES, allowed, unknown_key
from utils.errors import UserError

SUBJECTS = tuple(reversed(Config.__bases__))


def describe_all() -> str:
    """Return all keys by subject, each with its default and one sentence; networks and losses."""
    lines = ["Keys by subject, with defaults. `train_v2.py help KEY` says all about one of them."]
    for subject in SUBJECTS:
        lines += ["", subject.__doc__ or ""]
        for key in subject.__annotations__:
            choices = allowed(key).removeprefix("are ") if allowed(key).startswith("are ") else ""
            beside = f"    of {choices}" if 0 < len(choices) < 60 else ""
            lines += [f"  {key} = {default_of(key)!r}{beside}", _indented(_in_short(key))]
    return "\n".join(
        [*lines, "", "Networks.", describe_networks(), "", "Losses.", describe_losses()]
    )


def describe_networks() -> str:
    """Return the names of all networks, a paragraph for each family."""
    families = groupby(model_names(), lambda name: backbone_class(name).__name__)
    return "\n".join(_indented(f"{family}: {', '.join(names)}") for family, names in families)


def describe_losses() -> str:
    """Return the name of each loss and its formula with the default settings."""
    width = max(map(len, LOSSES))
    formulas = (make_margin(Config(loss=name)).describe() for name in LOSSES)
    return "\n".join(f"    {n:{width}}  {f}" for n, f in zip(LOSSES, formulas, strict=True))


def describe_key(key: str) -> str:
    """Return default, allowed values and meaning of a key, which may be an old spelling.

    Raises:
        UserError: There is no such key.
    """
    key, _, _ = key.partition("=")  # what follows may be a secret
    if key in ALIASES:
        now, values, remark = ALIASES[key]
        if now is None:
            return f"{key} is accepted and has no effect: {remark}"
        listed = "".join(f"; {key}={old} is {now}={new}" for old, new in values.items())
        return f"{key} is {now} now{listed}{remark and '; '}{remark}\n{describe_key(now)}"
    if key not in Config.model_fields:
        raise UserError(unknown_key(key))
    (subject,) = (s.__doc__ for s in SUBJECTS if key in s.__annotations__)
    lines = [
        f"{key} = {default_of(key)!r}    ({(subject or '').rstrip('.')})",
        _indented(f"Allowed {allowed(key)}."),
        _indented(_help_of(key)),
    ]
    more = {"network": describe_networks, "loss": describe_losses}
    return "\n".join([*lines, *([more[key]()] if key in more else [])])


def _in_short(key: str) -> str:
    """Return the first sentence of a key's help, and those on what None and 0 mean."""
    first, *more = _help_of(key).removesuffix(".").split(". ")
    kept = [sentence for sentence in more if sentence.startswith(("None", "0:", "Required"))]
    return ". ".join([first, *kept]) + "."


def _help_of(key: str) -> str:
    return " ".join((Config.model_fields[key].description or "").split())


def _indented(text: str) -> str:
    indent = "    "
    return textwrap.fill(
        text, 100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
