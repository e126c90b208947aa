"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

_TOKEN = ".job"  # in a staging folder: what it was begun for
_LISTED = 20  # problems named in an error; the rest is counted


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment it is the old one, the new one, or absent."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # mkstemp gives 0600; a data set is meant to be shared
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def list_some(problems: Sequence[str], limit: int = _LISTED) -> str:
    """The first problems, one per line, and how many more there are."""
    more = [f"... and {len(problems) - limit} more"] if len(problems) > limit else []
    return "\n".join([*problems[:limit], *more])


def write_whole(path: Path, content: bytes) -> None:
    """Write one of many files so that it appears whole; its folder is made. Not flushed to the
    disk one by one: the staging folder they lie in is renamed when all are there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_bytes(content)
    os.replace(aside, path)


def staging_folder(out: Path, token: str) -> Path:
    """The hidden folder beside `out` in which a job makes it, to be passed to `publish_folder`.

    It holds what an interrupted job with the same token (a hash of inputs and options) left;
    what another job left is removed.
    """
    staging = out.with_name(f".{out.name}.partial")
    noted = staging / _TOKEN
    if not noted.is_file() or noted.read_text() != token:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        noted.write_text(token)
    return staging


def publish_folder(staging: Path, out: Path) -> None:
    """Rename the staging folder to `out`, which must not exist."""
    (staging / _TOKEN).unlink()
    os.rename(staging, out)
