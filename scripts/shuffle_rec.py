"""Write a record set in random order, for readers that go through the file from front to back.

    python scripts/shuffle_rec.py DATA          writes shuffled_DATA beside it
    python scripts/shuffle_rec.py DATA OUT

Our own loader needs no such copy: its order is random over the whole set (docs/data.md).

The order is that of a 64-bit hash of (seed, position), so it depends only on the seed and the
number of images. Sets larger than --memory are first sorted into files on disk and then shuffled
file by file: both disks are read and written from front to back. At the end the new set is read
again and must hold the same images under the same classes (`MultisetDigest` in
data/tools/manifest.py).
"""

from __future__ import annotations

import argparse
import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.class_names import read_label_map
from data.datasets import DataError
from data.order import derive_key, hash_indices
from data.tools.image_records import ImageRecords
from data.tools.manifest import MultisetDigest
from data.tools.record_writer import STAGING, RecordSetWriter
from utils.cli import cli_command

_COPIED = ("*.bin", "*.lst")
_MAX_BUCKETS = 512  # files open at once
_MIB = 2**20
_ITEM = struct.Struct("<QQQ")  # hash, class, bytes of the payload
_BLOCK = 4096  # positions hashed at once


class ShuffleReport(NamedTuple):
    """What was written.

    Attributes:
        num_images: Number of images written.
        digest: Hash of the multiset of (class, image), the same before and after.
    """

    num_images: int
    digest: str


def shuffle_records(
    data: Path, out: Path, *, seed: int = 0, memory_mib: int = 1024, force: bool = False
) -> ShuffleReport:
    """Writes the images of DATA to OUT in random order, with .bin, .lst and property beside them.

    InsightFace style is kept, but without the records of identities, whose images no longer lie
    together. Payloads stay byte for byte. Peak memory is about 1.5 times memory_mib, whatever the
    size of the set, and about 100 bytes per image for two indices. After an error nothing is
    written.

    Args:
        data: Folder with train.rec and train.idx.
        out: Folder to write to.
        seed: Seed of the order.
        memory_mib: Memory for records in MiB.
        force: Whether an existing set is replaced.

    Raises:
        DataError: The set or an argument does not fit, or the new set has other content.
        RecordError: A record is damaged.
    """
    records = ImageRecords(data)
    folder = records.path_rec.parent
    if out.resolve() == folder.resolve():
        raise DataError(f"{out}: a set is never shuffled in place; give another folder")
    stated = records.stated()
    class_names = read_label_map(folder)
    num_buckets = -(-records.reader.size // (memory_mib * _MIB))
    if num_buckets > _MAX_BUCKETS:
        needed = -(-records.reader.size // (_MAX_BUCKETS * _MIB))
        raise DataError(f"--memory {memory_mib}: this set needs {needed} MiB or more")
    before = MultisetDigest()
    after = MultisetDigest()
    with (
        RecordSetWriter(out, (stated.height, stated.width), force, style=records.style) as writer,
        tqdm(total=3 * len(records), unit=" records") as bar,
    ):
        for bucket in _in_buckets(records, out / STAGING, num_buckets, seed, before, bar):
            for _, class_id, payload in bucket:
                writer.add_payload(payload, class_id)
                bar.update()
        for pattern in _COPIED:
            for path in sorted(folder.glob(pattern)):
                shutil.copyfile(path, out / path.name)
        writer.finish(class_names, stated.num_classes)
        for record in ImageRecords(out):
            after.add(record.class_id, record.image)
            bar.update()
    if before != after:
        (out / "train.idx").unlink()
        raise DataError(
            f"{out}: what was read back is not what was written ({after.count} images, digest "
            f"{after.hexdigest()[:16]}; expected {before.count}, {before.hexdigest()[:16]}). The "
            "disk or the memory is faulty; its index was removed. Shuffle again elsewhere."
        )
    return ShuffleReport(after.count, after.hexdigest())


Item = tuple[int, int, bytes]  # hash, class, payload


def _in_buckets(
    records: ImageRecords,
    staging: Path,
    num_buckets: int,
    seed: int,
    digest: MultisetDigest,
    bar: tqdm,
) -> Iterator[list[Item]]:
    """Yields the records in lists that follow each other in the order of the hash, each sorted."""
    if num_buckets == 1:
        yield sorted(_hashed(records, seed, digest, bar), key=_by_hash)
        return
    paths = [staging / f"bucket_{i}" for i in range(num_buckets)]
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        for hash_, class_id, payload in _hashed(records, seed, digest, bar):
            file = files[hash_ * num_buckets >> 64]
            file.write(_ITEM.pack(hash_, class_id, len(payload)))
            file.write(payload)
    for path in paths:
        yield sorted(_read_bucket(path), key=_by_hash)
        path.unlink()


def _hashed(records: ImageRecords, seed: int, digest: MultisetDigest, bar: tqdm) -> Iterator[Item]:
    key = derive_key(seed)
    for begin in range(0, len(records), _BLOCK):
        positions = np.arange(begin, min(begin + _BLOCK, len(records)))
        for position, hash_ in zip(
            positions.tolist(), hash_indices(positions, key).tolist(), strict=True
        ):
            record = records.read(position)
            digest.add(record.class_id, record.image)
            bar.update()
            yield hash_, record.class_id, record.payload


def _read_bucket(path: Path) -> Iterator[Item]:
    with open(path, "rb") as file:
        while head := file.read(_ITEM.size):
            hash_, class_id, length = _ITEM.unpack(head)
            yield hash_, class_id, file.read(length)


def _by_hash(item: Item) -> int:
    return item[0]


@cli_command("stopped; nothing was written")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code: 0, 2 with a message on stderr, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="shuffle_rec.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", help="folder with train.rec and train.idx")
    add("out", type=Path, metavar="OUT", nargs="?", help="default: shuffled_DATA beside DATA")
    add("--seed", type=int, default=0, help="another seed, another order (default 0)")
    add("--memory", type=int, default=1024, metavar="MIB", help="for records (default 1024 MiB)")
    add("--force", action="store_true", help="replace what is there")
    args = parser.parse_args(argv)
    if args.memory < 1:
        parser.error(f"--memory {args.memory}: allowed are 1 or more (MiB)")
    data = args.data.resolve()
    folder = data.parent if data.suffix == ".rec" else data
    out = args.out or folder.with_name(f"shuffled_{folder.name}")
    report = shuffle_records(
        args.data, out, seed=args.seed, memory_mib=args.memory, force=args.force
    )
    print(
        f"{out}: {report.num_images} images; the multiset of (class, image) is that of {args.data}"
        f" (digest {report.digest})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
