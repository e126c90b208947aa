"""Log lines: to the terminal and to training.log, on rank 0 only."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

FORMAT = "Training: %(asctime)s-%(message)s"  # as arcface_torch writes them; scripts parse it


def init_logging(is_main: bool, folder: str | Path | None = None) -> None:
    """Send log records of all our modules to stderr and, if given, to `folder`/training.log.

    Ranks other than 0 only speak up with warnings of their own errors.
    """
    # One process needs no process group; torch's checkpoints remark on it at every save.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.setLevel(logging.INFO if is_main else logging.ERROR)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if is_main and folder is not None:
        handlers.append(logging.FileHandler(Path(folder) / "training.log"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(FORMAT))
        root.addHandler(handler)
