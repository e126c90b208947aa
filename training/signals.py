"""Signals that ask the run to stop: noticed at once, obeyed at the end of a step.

Slurm and Kubernetes send SIGTERM (Slurm also SIGUSR1 if configured) before they take the machine
away; Ctrl-C is SIGINT. Python runs a handler only between bytecodes of the main thread, which may
wait in a collective. The interpreter's wake-up pipe is written at once, so a thread reads that.
"""

from __future__ import annotations

import os
import signal
import threading
from types import TracebackType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_AT_ONCE = 130


class StopSignals:
    """While entered, the first SIGTERM, SIGINT or SIGUSR1 sets `received`.

    A second SIGINT ends the process at once with exit code 130. It can only be entered in the main
    thread.

    Attributes:
        received: The first signal, None before it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupts = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in STOPPING:
            # The handler does nothing, but without one the signal is not written to the pipe.
            self._before[number] = signal.signal(number, lambda number, frame: None)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)  # ends the thread
        self._thread.join()
        os.close(self._read_end)

    def _listen(self) -> None:
        while numbers := os.read(self._read_end, 64):
            for number in numbers:
                if number not in STOPPING:
                    continue
                self._interrupts += number == signal.SIGINT
                if self._interrupts > 1:
                    os._exit(EXIT_AT_ONCE)
                self.received = self.received or signal.Signals(number)
