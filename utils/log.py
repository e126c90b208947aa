"""Log lines: rank 0 writes to the terminal and to training.log, other ranks write only errors."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

FORMAT = "Training: %(asctime)s-%(message)s"  # as arcface_torch writes them; scripts parse it


def init_logging(is_main: bool, folder: str | Path | None = None) -> None:
    """Sends log records of all modules to stderr and, on rank 0, to `folder`/training.log.

    Args:
        is_main: Whether this is rank 0. Other ranks log records of level ERROR and above only.
        folder: Folder of training.log; None for no file.
    """
    # One process needs no process group; torch's checkpoints warn about that at every save.
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
