"""A child process that runs functions one after another, so that Python and torch start once."""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

T = TypeVar("T")
_SECONDS_TO_END = 10  # Limit for a process to end after it was told to or was killed.
_SECONDS_TO_LOOK = 0.2  # Interval at which a wait checks that the process is alive.


class WorkerDied(RuntimeError):
    """The process ended before its function did; the message says how."""


class ChildTraceback(Exception):
    """The traceback of the child process as text; the cause of what `Worker.run` raises."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


class Worker:
    """A spawned process, which starts at the first `run`, and again at the next one after it died.

    The process leads a process group, and what its functions have started ends with it. It ends
    itself when the parent process ends. Its stdout and stderr are those of the parent.
    """

    def __init__(self) -> None:
        self._child: tuple[BaseProcess, Connection] | None = None

    def run(self, function: Callable[..., T], *arguments: Any, seconds: float | None = None) -> T:
        """Runs `function(*arguments)` in the process and returns its result.

        Args:
            function: The function; picklable, as is its result.
            *arguments: Its arguments; picklable.
            seconds: Time limit, which includes the start of the process if it does not run yet;
                None for no limit.

        Raises:
            WorkerDied: The process died.
            TimeoutError: `seconds` have passed, and the process was killed.
            TypeError: The function, an argument or the result cannot be pickled.
            BaseException: The exception that `function` raised, with a ChildTraceback as its cause.
                The process keeps running.
        """
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        message = _pickle((function, arguments), f"{_name(function)} or an argument of it")
        if self._child is not None and not self._child[0].is_alive():
            self._kill()
        process, connection = self._child = self._child or self._start()
        reply = b""
        try:
            with contextlib.suppress(EOFError, OSError):  # The process died.
                connection.send_bytes(message)
                while not reply and process.is_alive() and time.monotonic() < deadline:
                    if connection.poll(min(_SECONDS_TO_LOOK, deadline - time.monotonic())):
                        reply = connection.recv_bytes()
            if not reply and time.monotonic() >= deadline:
                raise TimeoutError(f"{_name(function)} did not end within {seconds:g} seconds")
            if not reply:
                process.join(_SECONDS_TO_END)
                raise WorkerDied(f"{_name(function)}: {_ending(process.exitcode)}")
        except BaseException:  # A late reply would be taken for that of the next call.
            self._kill()
            raise
        try:
            value, child_traceback = pickle.loads(reply)
        except Exception as error:
            raise TypeError(f"the result of {_name(function)} cannot be unpickled") from error
        if child_traceback is not None:
            raise value from ChildTraceback(child_traceback)
        result: T = value
        return result

    def close(self) -> None:
        """Ends the process, if there is one, and waits for it; a later `run` starts another."""
        if self._child is None:
            return
        process, connection = self._child
        with contextlib.suppress(OSError):
            connection.send_bytes(b"")
        process.join(_SECONDS_TO_END)
        self._kill()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> tuple[BaseProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        connection, its_connection = context.Pipe()
        # At exit Python ends a daemon, whereas it would wait for any other process.
        process = context.Process(target=_serve, args=(its_connection,), daemon=True)
        process.start()
        its_connection.close()
        return process, connection

    def _kill(self) -> None:
        """Ends the process at once, with what its functions have started."""
        if self._child is None:
            return
        process, connection = self._child
        self._child = None
        process.kill()
        assert process.pid is not None
        with contextlib.suppress(OSError):  # There is no such group, or it is empty.
            os.killpg(process.pid, signal.SIGKILL)
        process.join(_SECONDS_TO_END)
        connection.close()


def _serve(connection: Connection) -> None:
    """Serves calls in the process until an empty message arrives or the parent ends."""
    os.setpgid(0, 0)
    multiprocessing.current_process().daemon = False  # A daemon may have no child processes.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # The parent process has ended.
        while message := connection.recv_bytes():
            connection.send_bytes(_answer(message))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)  # Kills this process and what its functions started.


def _answer(message: bytes) -> bytes:
    """Returns the pickled result and None, or the exception and its traceback."""
    try:
        function, arguments = pickle.loads(message)
        result = function(*arguments)
        sys.stdout.flush()
        return _pickle((result, None), f"the result of {_name(function)}")
    except BaseException as error:  # Not kept in a variable: its traceback holds the tensors.
        return pickle.dumps((_picklable(error), traceback.format_exc()))


def _picklable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _pickle(value: object, what: str) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise TypeError(f"{what} cannot be pickled: {error}") from error


def _name(function: Callable[..., object]) -> str:
    if isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", repr(function))


def _ending(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"the process ended with exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = "; memory may have run out" if name == "SIGKILL" else ""
    return f"the process was killed by {name}{hint}"
