"""Turn a record set back into class folders: the encoded images byte for byte.

    python scripts/unpack.py DATA OUT

The command writes OUT/<class>/<key>.jpg (or .png, ...), with the classes' names from label_map.txt
or else their numbers, and OUT/train.lst, which packs them again with the same keys and labels:
python scripts/pack.py OUT/train.lst AGAIN --style im2rec.
Everything is written to .OUT.partial beside OUT and renamed at the end. After an interruption the
same command continues.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.class_names import read_label_map
from data.datasets import DataError
from data.recordio import unpack_record
from data.tools.image_records import ImageRecords
from utils.cli import cli_command
from utils.files import atomic_write, publish_folder, staging_folder

_SUFFIXES = ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"BM", ".bmp"), (b"RIFF", ".webp"))


def unpack(data: Path, out: Path) -> int:
    """Writes the images of DATA as files below OUT, which must not exist; returns their number.

    Args:
        data: Folder with train.rec, or a .rec file.
        out: Folder to make.

    Raises:
        DataError: `out` exists, or label_map.txt does not fit.
        RecordError: A record is damaged.
    """
    if out.exists():
        raise DataError(f"{out} already exists; give another folder, or remove it")
    records = ImageRecords(data)
    names = read_label_map(records.path_rec.parent)
    if names:
        _check_names(names, records.path_rec.with_name("label_map.txt"))
    facts = records.path_rec.stat()
    token = f"{records.path_rec.resolve()} {facts.st_size} {facts.st_mtime_ns} {names}"
    staging = staging_folder(out, hashlib.sha1(token.encode()).hexdigest())
    digits = len(str(int(records.keys.max()))) if len(records) else 1
    with open(staging / "train.lst", "w", encoding="utf-8") as listing:
        for record in tqdm(records, total=len(records), unit=" images"):
            if names is not None and record.class_id < len(names):
                folder = names[record.class_id]
            else:
                folder = f"{record.class_id:07d}"
            file = f"{folder}/{record.key:0{digits}d}{_suffix(bytes(record.image[:12]))}"
            labels = [record.class_id, *unpack_record(record.payload)[0].labels[1:].tolist()]
            listing.write("\t".join([str(record.key), *map(str, labels), file]) + "\n")
            target = staging / file
            if target.exists() and target.stat().st_size == len(record.image):
                continue  # written before an interruption: files are written atomically
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target, durable=False) as written:
                written.write(record.image)
    publish_folder(staging, out)
    return len(records)


def _check_names(names: list[str], path: Path) -> None:
    """Refuses names that lead elsewhere or name two classes, because label maps are downloaded."""
    for name in names:
        inside = os.path.basename(name) == name and not name.startswith(".")
        if not (name and inside and name.isprintable()):
            raise DataError(f"{path}: {name!r} is no folder; rename it, or move the file away")
    ((name, uses),) = Counter(names).most_common(1)
    if uses > 1:
        raise DataError(
            f"{path}: {name!r} names {uses} classes, whose images would be mixed; rename them, or "
            "move the file away to get numbers"
        )


def _suffix(head: bytes) -> str:
    return next((suffix for magic, suffix in _SUFFIXES if head.startswith(magic)), ".img")


@cli_command("stopped; the same command resumes here")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code: 0, 2 with a message on stderr, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="unpack.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with train.rec, or a .rec")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    args = parser.parse_args(argv)
    count = unpack(args.data, args.out)
    print(f"{args.out}: {count} images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
