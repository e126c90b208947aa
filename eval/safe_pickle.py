"""Reads pickles of plain data without running them.

There are two checks. A scan allows only the opcodes that such a file needs. Then an unpickler
replaces the few globals that an array needs by our own stand-ins. No global of the file's choice is
imported, numpy never sees a state that the file made up, and what is allocated is bounded by the
file's length.
"""

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from utils.errors import UserError

_ALLOWED_OPCODES = set(
    """
    PROTO FRAME STOP MARK POP POP_MARK DUP EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE
    TUPLE1 TUPLE2 TUPLE3 NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET
    MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD
    """.split()  # noqa: SIM905, 48 quoted names would hide the list
)
_PLAIN_DTYPE = re.compile(r"\?|[<>|=]?[biu][1248]")
_MAX_DIMENSIONS = 4


def read_plain_pickle(path: Path) -> Any:
    """Reads a pickle file that holds plain data only.

    Lists, tuples, bytes, bytearrays, text, numbers, booleans and None are returned as they are (the
    strings of Python 2 as bytes), numpy booleans and integers as Python's, numpy arrays of booleans
    and integers as `PickledArray`.

    Args:
        path: Path of the file.

    Raises:
        UserError: The file is refused; the message names it, and the global or opcode.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}). Make it readable, or give "
            "another file"
        ) from error
    replacements = _stand_ins(len(content))
    try:
        # Reading from memory bounds every declared length by the file's own.
        _scan_opcodes(path, content, replacements)
        return _RestrictedUnpickler(path, content, replacements).load()
    except UserError:
        raise
    except Exception as error:  # a hostile pickle can make the unpickler raise nearly anything
        raise UserError(
            f"{path}: not a readable pickle of plain data ({type(error).__name__}: "
            f"{str(error)[:200]}); the file is damaged or something else"
        ) from error


def _scan_opcodes(path: Path, content: bytes, replacements: dict[tuple[str, str], Any]) -> None:
    """Refuses what can be refused before anything is unpickled."""
    argument: Any  # its type depends on the opcode
    for opcode, argument, position in pickletools.genops(io.BytesIO(content)):
        if opcode.name not in _ALLOWED_OPCODES:
            raise UserError(
                f"{path}: refused, pickle opcode {opcode.name} at byte {position}; only lists, "
                "bytes, booleans and plain arrays are read"
            )
        if opcode.name == "LONG_BINPUT" and argument > len(content):
            # The unpickler allocates slots up to the highest number.
            raise UserError(
                f"{path}: refused, memo slot {argument} at byte {position} of a file of "
                f"{len(content)} bytes"
            )
        if opcode.name == "GLOBAL":
            module, name = argument.split(" ", 1)
            _look_up(path, replacements, module, name)


def _look_up(path: Path, replacements: dict[tuple[str, str], Any], module: str, name: str) -> Any:
    try:
        return replacements[module, name]
    except KeyError:
        raise UserError(
            f"{path}: refused, the pickle names the global {module[:80]}.{name[:80]}; only lists, "
            "bytes, booleans and plain arrays are read. Do not load this file with anything else"
        ) from None


class _RestrictedUnpickler(pickle.Unpickler):
    def __init__(
        self, path: Path, content: bytes, replacements: dict[tuple[str, str], Any]
    ) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._path = path
        self._stand_ins = replacements

    def find_class(self, module: str, name: str) -> Any:
        return _look_up(self._path, self._stand_ins, module, name)


class _StandIn:
    """A callable given in place of a global; unlike a function, BUILD cannot alter it."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a global cannot be given a state")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a stand-in is constant")


class _PickledDtype:
    """A numpy dtype of the file: booleans and integers only, checked before numpy sees it."""

    def __init__(self, name: Any, align: Any = False, copy: Any = False) -> None:
        text = name.decode("latin1") if isinstance(name, bytes) else name
        if not isinstance(text, str) or not _PLAIN_DTYPE.fullmatch(text):
            raise pickle.UnpicklingError("dtype is not a plain integer or bool")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        version, order, *rest = state
        text = order.decode("latin1") if isinstance(order, bytes) else order
        if version not in (3, 4) or text not in ("<", ">", "|", "=") or any(rest[:3]):
            raise pickle.UnpicklingError("dtype is not a plain integer or bool")
        if text in ("<", ">"):
            self.dtype = self.dtype.newbyteorder("<" if text == "<" else ">")


class PickledArray:
    """A numpy array of the file.

    Attributes:
        array: View of the file's bytes, with the dtype and shape that the file states.
    """

    def __init__(self) -> None:
        self.array: NDArray[Any] = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, data = state
        self.fill(data, dtype, shape, "F" if is_fortran else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: Any) -> None:
        """Sets the array.

        Args:
            data: Bytes of the elements.
            dtype: A `_PickledDtype`.
            shape: Tuple of lengths.
            order: "F" for Fortran order, else C order.

        Raises:
            UnpicklingError: The arguments do not fit each other.
        """
        if not isinstance(dtype, _PickledDtype) or not isinstance(data, (bytes, bytearray)):
            raise pickle.UnpicklingError("array is not of plain integers or booleans")
        # Every length is checked separately first: a zero would let another be anything, and the
        # product of integers of a million digits would take too long.
        if (
            not isinstance(shape, tuple)
            or len(shape) > _MAX_DIMENSIONS
            or not all(isinstance(length, int) and 0 < length <= len(data) for length in shape)
        ):
            raise pickle.UnpicklingError(
                f"array shape is not up to {_MAX_DIMENSIONS} lengths that fit its data"
            )
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise pickle.UnpicklingError(f"array shape does not fit its {len(data)} bytes")
        fortran = order in ("F", b"F")
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")


def _reconstruct(subtype: Any, shape: Any, typecode: Any) -> PickledArray:
    # numpy always writes the empty shape here and the real one in the state that follows.
    if subtype is not _NDARRAY or shape != (0,):
        raise pickle.UnpicklingError("array is not rebuilt from an empty numpy.ndarray")
    return PickledArray()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, *_axes: Any) -> PickledArray:
    array = PickledArray()
    array.fill(data, dtype, shape, order)
    return array


def _scalar(dtype: Any, data: Any) -> int:
    return _frombuffer(data, dtype, (), "C").array.item()


class _Latin1Encoder:
    """Reads bytes as protocol 2 spells them: `_codecs.encode(text, "latin1")`.

    Each such text is part of the file, so together they cannot be longer than it. More means that
    one text is multiplied to fill the memory.
    """

    def __init__(self, limit: int) -> None:
        self.remaining = limit

    def encode(self, text: Any, encoding: Any) -> bytes:
        if not isinstance(text, str) or encoding not in _LATIN1:
            raise pickle.UnpicklingError("bytes are allowed from latin1 text only")
        self.remaining -= len(text)
        if self.remaining < 0:
            raise pickle.UnpicklingError("one text is used for more bytes than the file has")
        return text.encode("latin1")

    def to_bytes(self, *arguments: Any) -> bytes | bytearray:
        if len(arguments) == 2:
            return self.encode(*arguments)
        if not arguments:
            return b""
        (value,) = arguments
        if not isinstance(value, (bytes, bytearray)):  # an integer would allocate that many
            raise pickle.UnpicklingError("bytes are allowed from bytes only")
        return value


_LATIN1 = ("latin1", b"latin1", "latin-1", b"latin-1")
_NDARRAY = object()  # only ever compared with; not callable


def _stand_ins(limit: int) -> dict[tuple[str, str], Any]:
    """Returns what a file may name, and its stand-in; `limit` is the file's length in bytes."""
    encoder = _Latin1Encoder(limit)
    given: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): _NDARRAY,
        ("numpy", "dtype"): _StandIn(_PickledDtype),
        ("_codecs", "encode"): _StandIn(encoder.encode),
    }
    for core in ("numpy.core", "numpy._core"):
        given[f"{core}.multiarray", "_reconstruct"] = _StandIn(_reconstruct)
        given[f"{core}.multiarray", "scalar"] = _StandIn(_scalar)
        given[f"{core}.numeric", "_frombuffer"] = _StandIn(_frombuffer)
    for builtins in ("builtins", "__builtin__"):
        given[builtins, "bytes"] = _StandIn(encoder.to_bytes)
        given[builtins, "bytearray"] = _StandIn(encoder.to_bytes)
    return given
