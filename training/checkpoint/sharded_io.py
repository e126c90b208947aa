"""How the state of a run is stored on disk: torch.distributed.checkpoint with explicit rows.

A state is `{name: TensorShard}`. Every rank says which rows (or columns) of each tensor it holds,
and the planners below pass this to torch.distributed.checkpoint in pieces of at most PIECE_BYTES,
so that a shard of many gigabytes is written and read with one piece in memory beside it. (The
default planners write a DTensor's shard as one piece. Reading it takes the memory of the shard a
second time.) A rank reads the rows it wants, from whatever rank wrote them, so a state saved on n
ranks loads on any other number.

Every file's size and SHA-256 are taken while it is written. Only tensors are stored here. The
metadata file, which is a pickle, is read by an unpickler that admits only its own classes.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

PIECE_BYTES = 16 * 2**20
_READ_BYTES = 2**20


class StorageError(RuntimeError):
    """A saved state is damaged, or does not hold what is asked for."""


@dataclass(frozen=True)
class TensorShard:
    """Rows of one named tensor that this rank holds, or its columns with dim=1.

    Attributes:
        local: [rows, ...], or a scalar, which every rank holds.
        first_row: Index of the first local row (column) in the whole tensor.
        num_rows: Number of rows (columns) of the whole tensor.
        is_written: Whether this rank writes it. Of a tensor that all ranks hold, one writes it.
        dim: Dimension along which the whole tensor is split, 0 or 1.
    """

    local: Tensor
    first_row: int
    num_rows: int
    is_written: bool = True
    dim: int = 0

    @classmethod
    def whole(cls, tensor: Tensor, is_written: bool) -> TensorShard:
        """Describe a tensor that every rank holds."""
        return cls(tensor, 0, tensor.shape[0] if tensor.dim() else 1, is_written)

    @classmethod
    def of_rank(cls, tensor: Tensor, rank: int, world_size: int) -> TensorShard:
        """Describe a tensor that differs between ranks, as row `rank` of `[world_size, ...]`."""
        return cls(tensor.unsqueeze(0), rank, world_size)

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole tensor."""
        sizes = list(self.local.shape)
        if sizes:
            sizes[self.dim] = self.num_rows
        return torch.Size(sizes)

    @property
    def offsets(self) -> torch.Size:
        """Offsets of the local part in the whole tensor."""
        return torch.Size(
            self.first_row if dim == self.dim else 0 for dim in range(self.local.dim())
        )

    def pieces(self) -> Iterator[ChunkStorageMetadata]:
        """Yield offsets and sizes, in the whole tensor, of what is written at a time."""
        if self.local.dim() == 0:
            yield ChunkStorageMetadata(torch.Size(), torch.Size())
            return
        if not self.local.numel():
            return
        rows, rest = self.local.shape[0], self.local.shape[1:]
        row_bytes = max(rest.numel() * self.local.itemsize, 1)
        step = max(PIECE_BYTES // row_bytes, 1)
        first, *others = self.offsets
        for start in range(0, rows, step):
            offsets = torch.Size((first + start, *others))
            yield ChunkStorageMetadata(offsets, torch.Size((min(step, rows - start), *rest)))

    def piece(self, offsets: torch.Size, sizes: torch.Size) -> Tensor:
        """Return the local rows of a piece."""
        if self.local.dim() == 0:
            return self.local
        return self.local.narrow(0, offsets[0] - self.offsets[0], sizes[0])


State = Mapping[str, TensorShard]


class FileDigest(NamedTuple):
    """Expected content of a file.

    Attributes:
        size: Size in bytes.
        sha256: SHA-256, hexadecimal.
    """

    size: int
    sha256: str


def write(
    folder: Path, state: State, group: dist.ProcessGroup | None, is_alone: bool
) -> dict[str, FileDigest]:
    """Write the state into `folder`, all ranks together; each file is read back and compared.

    Args:
        folder: Folder of the saved state.
        state: The tensors by name.
        group: Process group of the ranks.
        is_alone: Whether this process writes alone, without collectives.

    Returns:
        The files that this rank wrote, by name.

    Raises:
        StorageError: Writing failed on some rank; every rank raises it. A file does not read back;
            the rank that wrote it raises it.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    writer.fs = files = _HashedFiles()
    with _plain_errors(files):
        dcp.save(
            dict(state),
            storage_writer=writer,
            planner=_SavePlanner(),
            process_group=group,
            no_dist=is_alone,
        )
    for name, digest in files.digests.items():
        problem = verify_file(folder / name, digest)
        if problem:
            raise StorageError(f"what was written does not read back: {problem}")
    return files.digests


def read(folder: Path, state: State, group: dist.ProcessGroup | None, is_alone: bool) -> None:
    """Fill the tensors of `state` from `folder`, all ranks together; each reads its own rows.

    Args:
        folder: Folder of the saved state.
        state: The tensors by name, which are filled in place.
        group: Process group of the ranks.
        is_alone: Whether this process reads alone, without collectives.

    Raises:
        StorageError: Reading failed on some rank, or the saved state has other names, sizes or
            dtypes. Every rank raises it.
    """
    reader = _Reader(folder)
    with _plain_errors(reader):
        dcp.load(
            dict(state),
            storage_reader=reader,
            planner=_LoadPlanner(),
            process_group=group,
            no_dist=is_alone,
        )


@contextmanager
def _plain_errors(files: _HashedFiles | _Reader) -> Iterator[None]:
    """Raise a failure on some rank as a StorageError; DCP's is derived from BaseException only.

    The message is that of this rank's own files if they failed: PyTorch's writer hides it, and so
    does the reader of torch 2.11.
    """
    try:
        yield
    except CheckpointException as error:
        if files.failure is not None:
            raise StorageError(str(files.failure)) from error
        causes = {
            f"rank {rank}: {cause} ({type(cause).__name__})"
            for rank, (cause, _) in error.failures.items()
        }
        raise StorageError("; ".join(sorted(causes))) from error


def describe(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return shape and dtype of every tensor of a saved state."""
    found = _Reader(folder).read_metadata().state_dict_metadata
    return {
        name: (each.size, each.properties.dtype)
        for name, each in found.items()
        if isinstance(each, TensorStorageMetadata)
    }


def verify_file(path: Path, digest: FileDigest) -> str | None:
    """Describe in a sentence how a file differs from its digest; None if it does not."""
    try:
        size = path.stat().st_size
        if size != digest.size:
            return f"{path} has {size} bytes, {digest.size} were written"
        with path.open("rb") as file:
            found = hashlib.sha256()
            while block := file.read(_READ_BYTES):
                found.update(block)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error})"
    return None if found.hexdigest() == digest.sha256 else f"{path} has changed: another SHA-256"


class _SavePlanner(DefaultSavePlanner):
    """Plans to write the rows that each rank says it holds."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(name, piece.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=piece,
                        properties=TensorProperties(dtype=stored.local.dtype),
                        size=stored.shape,
                    ),
                )
                for name, stored in self.state_dict.items()
                if stored.is_written
                for piece in stored.pieces()
            ]
        )
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.tensor_data is not None
        piece = write_item.tensor_data.chunk
        stored: TensorShard = self.state_dict[write_item.index.fqn]
        return stored.piece(piece.offsets, piece.sizes)


class _LoadPlanner(DefaultLoadPlanner):
    """Plans to read the rows that this rank wants, from the pieces that hold them."""

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, stored in self.state_dict.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata):
                raise StorageError(f"{name} is not in the saved state")
            if saved.size != stored.shape or saved.properties.dtype != stored.local.dtype:
                raise StorageError(
                    f"{name} was saved as {list(saved.size)} of {saved.properties.dtype}, wanted "
                    f"here is {list(stored.shape)} of {stored.local.dtype}"
                )
            if stored.local.numel() == 0:
                continue
            wanted = ChunkStorageMetadata(stored.offsets, stored.local.shape)
            items += create_read_items_for_chunk_list(name, saved, [wanted])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        stored: TensorShard = self.state_dict[index.fqn]
        return stored.local.detach()


class _Reader(dcp.FileSystemReader):
    """Reads the metadata with an unpickler that admits only its own classes."""

    failure: Exception | None = None  # the error of reading the metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            return self._read_metadata()
        except Exception as error:
            self.failure = error
            raise

    def _read_metadata(self) -> Metadata:
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise StorageError(f"{path} is no metadata of a saved state")
        for place in (metadata.storage_data or {}).values():
            if Path(place.relative_path).name != place.relative_path:
                raise StorageError(f"{path} points outside its folder: {place.relative_path!r}")
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = frozenset(
        {
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "ChunkStorageMetadata",
            "_StorageInfo",
            "_MEM_FORMAT_ENCODING",
        }
    )
    _OTHERS = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "Path"),
            ("pathlib._local", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (
            is_dtype
            or (module, name) in self._OTHERS
            or (module in self._MODULES and name in self._NAMES)
        ):
            return super().find_class(module, name)
        raise StorageError(f"the metadata of the saved state asks for {module}.{name}: refused")


class _HashedFiles(FileSystem):
    """Computes size and SHA-256 of everything written; `digests` has them by file name."""

    def __init__(self) -> None:
        self.digests: dict[str, FileDigest] = {}
        self.failure: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with Path(path).open(mode) as raw:
            if "w" not in mode:
                yield raw
                return
            stream = _HashingStream(raw, self)
            yield stream
            self.digests[Path(path).name] = FileDigest(stream.size, stream.sha256.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)


class _HashingStream(io.RawIOBase):
    def __init__(self, raw: Any, files: _HashedFiles) -> None:
        super().__init__()
        self.raw, self.files, self.size, self.sha256 = raw, files, 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        block = memoryview(data).cast("B")
        try:
            self.raw.write(block)
        except OSError as error:
            self.files.failure = error
            raise
        self.sha256.update(block)
        self.size += len(block)
        return len(block)

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        return int(self.raw.fileno())

    def flush(self) -> None:
        if not self.raw.closed:
            self.raw.flush()

    def close(self) -> None:
        self.flush()
        super().close()
