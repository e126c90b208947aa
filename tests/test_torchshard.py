"""What docs/torchshard.md says can be typed: its commands are configs, its names are ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from arcshard import parallel
from utils.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "torchshard.md").read_text()
COMMANDS = [
    line.split() for line in PAGE.splitlines() if line.startswith("    ") and "configs/" in line
]


def words_of(command: list[str]) -> list[str]:
    """The config and its overrides."""
    place = next(i for i, word in enumerate(command) if word.startswith("configs/"))
    return command[place:]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(words_of(command)[1:]))
def test_every_command_of_the_page_is_a_config_that_loads(command: list[str]) -> None:
    name, *overrides = words_of(command)
    assert load_config(ROOT / name, overrides).num_classes == 85_742


def test_the_page_has_four_trainings_on_one_node_and_a_launch_on_two() -> None:
    single = [tuple(words_of(c)) for c in COMMANDS if "torchrun" in c]
    assert len(set(single)) == 4
    ranks = {word for c in COMMANDS for word in c if word.startswith("NODE_RANK=")}
    assert ranks == {"NODE_RANK=0", "NODE_RANK=1"}


def test_every_function_the_page_names_on_our_side_exists() -> None:
    library = PAGE.split("## The library")[1].split("### What")[0]
    ours = [line.split("|")[2] for line in library.splitlines() if line.startswith("| `ts.")]
    theirs = [line.split("|")[1] for line in library.splitlines() if line.startswith("| `ts.")]
    for here, there in zip(ours, theirs, strict=True):
        text = there if "the same name" in here else here
        names = [re.sub(r"\(.*", "", n).split(".")[-1] for n in re.findall(r"`([^`]+)`", text)]
        assert names
        for name in names:
            assert name in parallel.__all__, name
