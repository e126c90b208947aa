"""Files and folders that are written atomically."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"  # end of the name of an unfinished file
_TOKEN = ".job"  # file in a staging folder that holds the token of its job
_LISTED = 20  # number of problems named in an error; the rest is counted


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears under its name only when the block ends.

    Until then it is `.<name>.<random>.tmp` in the same folder, which must exist. At any moment
    `path` is the old file, the new one, or absent. After an error in the block it is the old file,
    and nothing else is left. A killed process leaves the temporary file.

    Args:
        path: The file.
        durable: Whether the file and its name are on the disk when this returns.
    """
    path = Path(path)
    # A name may have 255 bytes, which 40 characters and the rest never exceed.
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}{TEMPORARY}")
    with open(temporary, "xb") as file:  # not mkstemp: the umask says who may read it
        try:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            file.close()  # a network file system may tell of a full disk here only
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flushes the names of a folder's files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_some(problems: Sequence[str], limit: int = _LISTED) -> str:
    """Lists the first problems, one per line, and says how many more there are."""
    more = [f"... and {len(problems) - limit} more"] if len(problems) > limit else []
    return "\n".join([*problems[:limit], *more])


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
    """Renames the staging folder to `out`, which must not exist, without what kills have left."""
    for unfinished in staging.rglob(f".*{TEMPORARY}"):
        unfinished.unlink()
    (staging / _TOKEN).unlink()
    os.rename(staging, out)
