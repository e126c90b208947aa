"""Worker processes outlive the signals that ask a run to stop, and end with their loader."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import wait_until

ROOT = Path(__file__).resolve().parent.parent

RUN = """
import os, signal, sys
from dataset import get_dataloader

if __name__ == "__main__":
    received, receive = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: os.write(receive, b"x"))
    loader = get_dataloader(
        "synthetic", 4, num_classes=5, num_images=400, input_size=16, num_workers=2,
        worker_type="processes",
    )
    batches = iter(loader)
    next(batches)
    print("begun", flush=True)
    os.read(received, 1)
    sys.stdin.readline()  # the signal has been sent to every worker
    print(sum(1 for _ in batches) + 1, flush=True)
"""


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(
            pytest.param(number, marks=pytest.mark.slow)
            for number in (signal.SIGINT, signal.SIGUSR1)
        ),
    ],
)
def test_workers_go_on_when_the_whole_process_group_is_signalled(tmp_path, number):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        os.killpg(process.pid, number)
        output, _ = process.communicate("sent\n", timeout=60)
        assert (process.returncode, output) == (0, "100\n")
        wait_until(lambda: not _group_lives(process.pid), 10)  # no worker was left behind
    finally:
        if _group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
