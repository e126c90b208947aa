"""Groups of images, pairs or templates from the columns of a CSV file, for every metric here.

The first column says what a line is about (a path, a template, the number of a pair). Each other
column is one way of grouping (race, age, quality, mask):

    name,race,mask
    alice/alice_0001.jpg,asian,no
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError


class Groups:
    """Columns of a CSV file by the key in its first one.

    Attributes:
        path: Path of the file.
        key: Name of the first column.
        columns: Names of the others.
    """

    def __init__(self, path: Path, key: str, columns: list[str], lines: dict[str, list[str]]):
        self.path, self.key, self.columns, self._lines = path, key, columns, lines

    @classmethod
    def read(cls, path: Path, keys: Sequence[str]) -> Groups:
        """Reads a file of groups.

        Args:
            path: Path of the file.
            keys: Allowed names of the first column.

        Raises:
            UserError: The file does not exist or has another form.
        """
        if not path.is_file():
            raise UserError(f"{path}: no such file of groups")
        lines: dict[str, list[str]] = {}
        with open(path, newline="", encoding="utf-8-sig") as file:
            try:
                rows = list(csv.reader(file))
            except (csv.Error, UnicodeDecodeError) as error:
                raise UserError(f"{path}: not a CSV file ({error})") from error
        header = [name.strip() for name in rows[0]] if rows else []
        if len(header) < 2 or header[0] not in keys:
            raise UserError(
                f"{path}, line 1: the header is {header}; needed is {' or '.join(keys)} and then "
                "at least one column to group by"
            )
        if len(set(header)) < len(header) or "" in header:
            raise UserError(f"{path}, line 1: {header}: every column needs a name of its own")
        for number, row in enumerate(rows[1:], start=2):
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{path}, line {number}: {len(row)} columns; the header has {len(header)}"
                )
            key = row[0].strip()
            if key in lines:
                raise UserError(f"{path}, line {number}: {key!r} is there twice")
            lines[key] = [cell.strip() for cell in row[1:]]
        return cls(path, header[0], header[1:], lines)

    def of(self, keys: Sequence[str]) -> dict[str, NDArray[np.str_]]:
        """Returns {column: value [n]} of `keys` [n].

        Raises:
            UserError: A key has no line.
        """
        missing = [key for key in keys if key not in self._lines]
        if missing:
            raise UserError(
                f"{self.path}: no line for {missing[0]!r}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + f"; the column {self.key} must name all of them"
            )
        return {
            column: np.array([self._lines[key][i] for key in keys], dtype=np.str_)
            for i, column in enumerate(self.columns)
        }


def pair_groups(
    values: NDArray[np.str_], first: NDArray[np.integer], second: NDArray[np.integer]
) -> tuple[list[str], NDArray[np.int64]]:
    """Groups pairs of items by the values of both items.

    The group of a pair is the value that both share, or "a / b" in alphabetical order. A pair has a
    number and not a word, because IJB-C has 15 million of them.

    Args:
        values: [n] value of each item.
        first: [P] positions of the pairs' first items.
        second: [P] positions of the pairs' second items.

    Returns:
        The names of the groups, and the group [P] of every pair.
    """
    names, code = np.unique(values, return_inverse=True)
    combined = np.minimum(code[first], code[second]) * len(names)
    combined += np.maximum(code[first], code[second])
    found, group = np.unique(combined, return_inverse=True)
    labels = [
        str(names[a]) if a == b else f"{names[a]} / {names[b]}"
        for a, b in (divmod(int(one), len(names)) for one in found)
    ]
    return labels, group
