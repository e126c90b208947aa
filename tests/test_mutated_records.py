"""Whatever byte of a record set's framing is damaged, nothing is read as what it is not.

`pytest -m slow tests/test_mutated_records.py` mutates 20,000 files; the usual run a few hundred.
"""

from __future__ import annotations

import collections
import hashlib
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data.datasets import RecordDataset
from data.recordio import (
    MAGIC_BYTES,
    PART_HEADER,
    RECORD_HEADER,
    RecordReader,
    pack_range,
    pack_record,
)
from dataset import DATA_ERRORS
from tests.record_helpers import SIZE, RecordWriter, jpeg

NUM_IMAGES, NUM_CLASSES = 8, 4
STYLES = ("insightface", "im2rec", "vector", "wide")
KINDS = (
    "magic",
    "length",
    "flag",
    "index",
    "header record",
    "cut records",
    "cut index",
    "property",
)


class Sound:
    """A sound set, what reading it gives, and where its framing lies."""

    def __init__(self, folder: Path, style: str) -> None:
        self.folder, self.style = folder, style
        folder.mkdir(exist_ok=True)
        wide = 2**24 + 1 if style == "wide" else 0
        payloads = []
        for i in range(NUM_IMAGES):
            image = jpeg(i)
            if i % 3 == 0:  # in several parts: the magic at a multiple of 4 bytes
                image += bytes(-len(image) % 4) + MAGIC_BYTES * 2 + b"more"[: i % 4]
            label = i * NUM_CLASSES // NUM_IMAGES + wide
            payloads.append(pack_record(image, (label, 0.5) if style == "vector" else label, i))
        if style == "insightface":
            end = NUM_IMAGES + 1
            identities = [pack_range(1 + 2 * i, 3 + 2 * i, end + i) for i in range(NUM_CLASSES)]
            payloads = [pack_range(end, end + NUM_CLASSES), *payloads, *identities]
        with RecordWriter(folder / "train.rec", folder / "train.idx") as writer:
            self.offsets = [writer.write(key, payload) for key, payload in enumerate(payloads)]
        (folder / "property").write_text(f"{NUM_CLASSES + wide},{SIZE},{SIZE}\n")
        self.files = {
            name: (folder / name).read_bytes() for name in ("train.rec", "train.idx", "property")
        }
        self.images = read_all(folder)[0]
        assert len(self.images) == NUM_IMAGES
        reader = RecordReader(folder / "train.rec")
        rec = self.files["train.rec"]
        self.parts = []  # every part of every record
        for place in reader.scan():
            at = place.offset
            while at < place.end:
                self.parts.append(at)
                length = int.from_bytes(rec[at + 4 : at + 8], "little") & (1 << 29) - 1
                at += PART_HEADER.size + (length + 3 & ~3)

    def mutate(self, rng: random.Random) -> str:
        """Damage one file of the set; the others are sound. Returns what was done."""
        kind = rng.choice(KINDS)
        name = "train.idx" if "index" in kind else "property" if kind == "property" else "train.rec"
        content = bytearray(self.files[name])
        if kind.startswith("cut"):
            content = content[: rng.randrange(len(content))]
        else:
            part, record = rng.choice(self.parts), rng.choice(self.offsets)
            at = {
                "magic": lambda: part + rng.randrange(4),
                "length": lambda: part + 4 + rng.randrange(4),
                "flag": lambda: record + PART_HEADER.size + rng.randrange(4),
                "header record": lambda: (
                    PART_HEADER.size
                    + rng.choice(
                        [*range(4), *range(RECORD_HEADER.size, RECORD_HEADER.size + 4)]
                        if self.style == "insightface"
                        else [*range(4)]
                    )
                ),
            }.get(kind, lambda: rng.randrange(len(content)))()
            flipped, digit = content[at] ^ 1 << rng.randrange(8), ord(rng.choice("0189\t\n"))
            content[at] = rng.choice([flipped, rng.randrange(256), digit])
        for other, sound in self.files.items():
            (self.folder / other).write_bytes(content if other == name else sound)
        return kind


def read_all(folder: Path) -> tuple[dict[int, tuple[int, str]], list[str]]:
    """{record id: (label, hash of the pixels)} of all that can be read, and the errors."""
    found: dict[int, tuple[int, str]] = {}
    errors: list[str] = []
    try:
        source = RecordDataset(folder, input_size=SIZE)
    except DATA_ERRORS as error:
        return found, [str(error)]
    for i in range(len(source)):
        try:
            image, label = source.read(i)
            offset = int(source.offsets[i])
            record = source.reader.read_header(offset).id
            assert record not in found, "one record under two keys"
            found[record] = label, hashlib.sha1(image.tobytes()).hexdigest()
        except DATA_ERRORS as error:
            errors.append(str(error))
    return found, errors


def run_mutations(folder: Path, count: int, seed: int) -> collections.Counter:
    """Mutate `count` files; every image read must be one of the sound set, with its label."""
    rng = random.Random(seed)
    sets = [Sound(folder / style, style) for style in STYLES]
    largest = max(len(content) for each in sets for content in each.files.values())
    outcomes: collections.Counter = collections.Counter()
    tracemalloc.start()
    try:
        for number in range(count):
            each = sets[number % len(sets)]
            kind = each.mutate(rng)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            found, errors = read_all(each.folder)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < 40 * largest + 500_000, (number, each.style, kind, peak)
            for record, image in found.items():
                assert image == each.images[record], (number, each.style, kind, record)
            for error in errors:
                assert "train." in error or "property" in error, error
                assert any(
                    word in error
                    for word in (
                        "byte",
                        "line",
                        "empty",
                        "index",
                        "expected",
                        "pixels",
                        "num_classes",
                    )
                ), error
            lost = NUM_IMAGES - len(found)
            # Only an index may lose images without an error of their own: those that it omits.
            assert not lost or errors or kind == "cut index" or kind == "index", (number, kind)
            outcomes[kind, "refused" if errors else "harmless" if not lost else "omitted"] += 1
    finally:
        tracemalloc.stop()
    return outcomes


@pytest.mark.parametrize("seed", [1, 2])
def test_a_few_hundred_mutated_files_are_refused_or_harmless(tmp_path: Path, seed: int) -> None:
    outcomes = run_mutations(tmp_path, 200, seed)
    for kind in KINDS:
        assert outcomes[kind, "refused"] > 0


@pytest.mark.slow
def test_twenty_thousand_mutated_files_are_refused_or_harmless(tmp_path: Path) -> None:
    outcomes = run_mutations(tmp_path, 20_000, 3)
    print()
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:14} {outcome:9} {count:6}")


def test_a_damaged_count_of_images_does_not_make_the_set_smaller(tmp_path: Path) -> None:
    sound = Sound(tmp_path / "set", "insightface")
    for count in range(1, NUM_IMAGES + NUM_CLASSES + 4):
        content = bytearray(sound.files["train.rec"])
        at = PART_HEADER.size + RECORD_HEADER.size
        content[at : at + 4] = np.float32(count).tobytes()
        (sound.folder / "train.rec").write_bytes(content)
        found, errors = read_all(sound.folder)
        assert bool(errors) != (count == NUM_IMAGES + 1), count
        assert len(found) == (0 if errors else NUM_IMAGES)
