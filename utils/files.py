"""Files and folders that are written atomically."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

_TOKEN = ".job"  # file in a staging folder that holds the token of its job
_LISTED = 20  # number of problems named in an error; the rest is counted


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment it is the old one, the new one, or absent."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # mkstemp gives 0600, but data sets are shared
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def list_some(problems: Sequence[str], limit: int = _LISTED) -> str:
    """Lists the first problems, one per line, and says how many more there are."""
    more = [f"... and {len(problems) - limit} more"] if len(problems) > limit else []
    return "\n".join([*problems[:limit], *more])


def write_whole(path: Path, content: bytes) -> None:
    """Writes one of many files so that it appears atomically, and makes its folder.

    It is not flushed to the disk by itself: the staging folder that holds the files is renamed when
    all are there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_bytes(content)
    os.replace(aside, path)


def staging_folder(out: Path, token: str) -> Path:
    """Returns the hidden folder beside `out` in which a job writes, for `publish_folder`.

    It holds what an interrupted job with the same token left. What another job left is removed.

    Args:
        out: The folder that the job makes.
        token: A hash of the job's inputs and options.
    """
    staging = out.with_name(f".{out.name}.partial")
    noted = staging / _TOKEN
    if not noted.is_file() or noted.read_text() != token:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        noted.write_text(token)
    return staging


def publish_folder(staging: Path, out: Path) -> None:
    """Renames the staging folder to `out`, which must not exist."""
    (staging / _TOKEN).unlink()
    os.rename(staging, out)
