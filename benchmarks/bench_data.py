"""Images per second and memory of the loaders, and what opening a large index costs.

    python -m benchmarks.bench_data [--quick] [--json FILE] [--folder FOLDER]

Loaders: all run on the same records in one run, each in a separate process bound to 1 or 2 cores,
in turn; the figures are medians of the rounds. They are a Pillow loader as users write it (below: a
dict of keys, seek and read, Pillow, float tensors, PyTorch's DataLoader with one worker per core),
libjpeg-turbo alone on images in memory, ours with threads, and DALI on the CPU if it is installed.
Ours and DALI deliver uint8 and int64. libjpeg-turbo alone is measured twice: into a new array each
time, as it is usually called, and into one array where it does not write past the cache (as ours
does, see `empty_pixels` in data/decode.py), which no loader can exceed. Memory is the proportional
set size (PSS) of the process and its workers at the end, less that before the loader.

The records are made here: 112 x 112 JPEG with the power spectrum of natural images (amplitude
falling as 1 / frequency), quality 85, which makes them as large as aligned faces.

Index: `.idx` files of 1,000,000 and 42,474,557 images are opened by four processes at once, and
compared with a dict of keys as MXNet's reader holds it, in one process.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing as mp
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from tqdm import tqdm

from data.dali import dali_is_installed
from data.datasets import RecordDataset
from data.decode import empty_pixels
from data.index import open_index
from data.recordio import (
    RecordReader,
    frame_record,
    pack_range,
    unpack_record,
)
from data.tools.record_writer import IM2REC, RecordSetWriter
from dataset import get_dataloader

BATCH = 128
IMAGES_WEBFACE42M, CLASSES_WEBFACE42M = 42_474_557, 2_059_906
LOADERS = (
    "pillow",
    "libjpeg-turbo alone",
    "the same, cached",
    "threads",
    "dali",
)
BASELINES = ("pillow", "libjpeg-turbo alone", "the same, cached", "dali")


# ---------------------------------------------------------------- what is read


def make_records(folder: Path, count: int) -> None:
    """Writes records of `count` images of natural statistics in 100 classes, classes in turn."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(112)[:, None], np.fft.rfftfreq(112)[None])
    frequency[0, 0] = np.inf
    colors = np.array([[1, 0.5, 0.2], [1, 0, -0.1], [1, -0.5, 0.2]]) * [[45, 45, 45]]
    with RecordSetWriter(folder, 112, style=IM2REC) as writer:
        for key in tqdm(range(count), "making records", unit=" images", disable=None):
            noise = rng.standard_normal((3, 112, 57)) + 1j * rng.standard_normal((3, 112, 57))
            planes = np.fft.irfft2(noise / frequency, (112, 112))
            planes /= planes.std(axis=(1, 2), keepdims=True)
            image = np.clip(np.moveaxis(planes, 0, 2) @ colors.T + 127, 0, 255).astype(np.uint8)
            encoded = simplejpeg.encode_jpeg(image, quality=85, colorsubsampling="420")
            writer.add(encoded, key % 100)
        writer.finish(num_classes=100)


def make_index(folder: Path, images: int) -> Path:
    """Writes a sparse `.rec`, filled only at its ends, and its `.idx` with `images` images."""
    path = folder / f"{images}.rec"
    classes = CLASSES_WEBFACE42M * images // IMAGES_WEBFACE42M
    lines, offset = images + 1 + classes, 40
    with open(path.with_suffix(".idx"), "wb") as index:
        index.write(b"0\t0\n")
        for begin in tqdm(range(1, lines, 1_000_000), "writing an index", disable=None):
            keys = np.arange(begin, min(begin + 1_000_000, lines))
            ends = offset + np.cumsum((4000 + keys * 7919 % 2000) // 4 * 4)
            offsets = [offset, *ends[:-1].tolist()]
            index.write(b"".join(b"%d\t%d\n" % pair for pair in zip(keys, offsets, strict=True)))
            last, offset = offsets[-1], int(ends[-1])
    with open(path, "wb") as records:
        records.write(frame_record(pack_range(images + 1, lines)))
        records.seek(last)
        records.write(frame_record(pack_range(1, 2)))
    return path


# ---------------------------------------------------------------- the loaders


class PillowSet(torch.utils.data.Dataset):
    """The published way without MXNet.

    It has a dict of keys, one file handle per worker, Pillow, and float tensors.
    """

    def __init__(self, root: Path) -> None:
        self.path = root / "train.rec"
        lines = (root / "train.idx").read_text().splitlines()
        self.index = {int(key): int(offset) for key, offset in map(str.split, lines)}
        self.keys = list(self.index)
        self.file: io.BufferedReader | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, torch.Tensor]:
        from PIL import Image

        if self.file is None:
            self.file = open(self.path, "rb")  # noqa: SIM115 - it lives as long as the worker
        self.file.seek(self.index[self.keys[item]])
        head = self.file.read(8)
        header, encoded = unpack_record(
            self.file.read(int.from_bytes(head[4:], "little") & (1 << 29) - 1)
        )
        image = np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))
        if torch.rand(1) < 0.5:
            image = image[:, ::-1]
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        return pixels.float().div(255).sub(0.5).div(0.5), torch.tensor(int(header.labels[0]))


def start(loader: str, root: Path, cores: int) -> Callable[[], Iterable[Any]]:
    """Prepares a loader and returns a function that begins an epoch of it.

    Args:
        loader: One of LOADERS.
        root: Folder of the records.
        cores: Number of cores, each with one worker.
    """
    if loader == "pillow":
        batches = torch.utils.data.DataLoader(
            PillowSet(root),
            BATCH,
            shuffle=True,
            num_workers=cores,
            drop_last=True,
            persistent_workers=True,
        )
        return lambda: batches
    if loader in ("libjpeg-turbo alone", "the same, cached"):
        source = RecordDataset(root)
        files = [bytes(source.read_encoded(i)[0]) for i in range(len(source))]
        return lambda: decode_only(files, cores, cached=loader == "the same, cached")
    ours = get_dataloader(root, BATCH, num_workers=cores, dali=loader == "dali")
    return lambda: ours


def decode_only(files: list[bytes], cores: int, cached: bool) -> list[tuple[None, list[bytes]]]:
    """Decodes all files, a part per core, and returns them as one batch for counting."""

    def decode(part: list[bytes]) -> None:
        room = empty_pixels(112, 112, 3) if cached else None
        for file in part:
            simplejpeg.decode_jpeg(file, "RGB", strict=True, buffer=room)

    threads = [threading.Thread(target=decode, args=(files[i::cores],)) for i in range(cores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [(None, files)]


def measure_loader(loader: str, root: Path, cores: int, connection: Any) -> None:
    """Measures a loader in a process whenever it gets a "go".

    It answers with images per second, images per second of CPU time, and MiB of the loader.

    Args:
        loader: One of LOADERS.
        root: Folder of the records.
        cores: Number of cores to use.
        connection: Receives True for "go" and False for the end.
    """
    os.sched_setaffinity(0, range(cores))
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    before = pss_mib()
    epoch = start(loader, root, cores)
    for _ in epoch():  # workers started, caches warm
        pass
    while connection.recv():
        begin, cpu_begin, count = time.perf_counter(), cpu_seconds(), 0
        for _, labels in epoch():
            count += len(labels)
        seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu_begin
        connection.send((count / seconds, count / max(cpu, 0.01), pss_mib() - before))


def pss_mib() -> float:
    """Returns the proportional set size of this process and all its descendants (Linux)."""
    rollups = read_of_family("smaps_rollup")
    lines = (line for text in rollups for line in text.splitlines() if line.startswith("Pss:"))
    return sum(int(line.split()[1]) for line in lines) / 1024


def cpu_seconds() -> float:
    """Returns the CPU time of this process and all its living descendants (Linux)."""
    fields = (text.rpartition(")")[2].split() for text in read_of_family("stat"))
    return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")


def read_of_family(name: str) -> list[str]:
    """Reads /proc/<pid>/<name> of this process and all its descendants."""
    texts, todo = [], [os.getpid()]
    while todo:
        folder = Path(f"/proc/{todo.pop()}")
        try:
            texts.append((folder / name).read_text())
            for task in (folder / "task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return texts


def compare_loaders(root: Path, cores: int, rounds: int) -> list[dict[str, Any]]:
    """Returns one row per loader: medians over rounds in which they take turns."""
    context = mp.get_context("spawn")
    running = {}
    for loader in LOADERS:
        if loader == "dali" and not dali_is_installed():
            print("dali: not installed, left out")
            continue
        ours, theirs = context.Pipe()
        process = context.Process(target=measure_loader, args=(loader, root, cores, theirs))
        process.start()
        running[loader] = (process, ours)
    results: dict[str, list[tuple[float, float, float]]] = {loader: [] for loader in running}
    for number in range(rounds + 1):
        for loader, (_, connection) in running.items():
            connection.send(True)
            result = connection.recv()
            if number:  # in the first round some are still starting
                results[loader].append(result)
    for process, connection in running.values():
        connection.send(False)
        process.join(30)

    def over(loader: str, other: str, what: int) -> float:
        pairs = zip(results[loader], results[other], strict=True)
        return statistics.median(a[what] / b[what] for a, b in pairs)

    rows: list[dict[str, Any]] = []
    for loader, measured in results.items():
        row: dict[str, Any] = {
            "name": loader,
            "params": {"cores": cores, "batch": BATCH},
            "per_second": statistics.median(m[0] for m in measured),
            "per_cpu_second": statistics.median(m[1] for m in measured),
            "peak_mib": max(m[2] for m in measured),
            "ratio_to_baseline": over(loader, "pillow", 0),
        }
        for other in BASELINES:
            if other in results:
                row[f"ratio_to {other}"] = over(loader, other, 0)
                row[f"ratio_to {other}, CPU time"] = over(loader, other, 1)
        rows.append(row)
    return rows


# ---------------------------------------------------------------- the index


def open_ours(path: Path, barrier: Any, connection: Any) -> None:
    """Opens the index and reads all of it; sends seconds, and PSS once every process has opened."""
    reader, before = RecordReader(path), pss_mib()
    begin = time.perf_counter()
    index = open_index(path.with_suffix(".idx"), reader)
    seconds = time.perf_counter() - begin
    assert int(index.offsets.max()) < reader.size
    barrier.wait()
    connection.send((seconds, pss_mib() - before))
    barrier.wait()


def open_dict(path: Path, barrier: Any, connection: Any) -> None:
    """Makes a dict of keys, as MXNet's reader does; sends seconds and PSS."""
    before, begin = pss_mib(), time.perf_counter()
    index, keys = {}, []
    with open(path.with_suffix(".idx")) as file:
        for line in file:
            key, offset = line.split("\t")
            keys.append(int(key))
            index[keys[-1]] = int(offset)
    connection.send((time.perf_counter() - begin, pss_mib() - before))


def open_in_processes(target: Callable[..., None], path: Path, count: int) -> tuple[float, float]:
    """Returns the longest opening and the memory of all of `count` processes at once."""
    context = mp.get_context("spawn")
    barrier, running = context.Barrier(count), []
    for _ in range(count):
        ours, theirs = context.Pipe()
        process = context.Process(target=target, args=(path, barrier, theirs))
        process.start()
        running.append((process, ours))
    results = [connection.recv() for _, connection in running]
    for process, _ in running:
        process.join()
    return max(seconds for seconds, _ in results), sum(mib for _, mib in results)


def compare_indexes(folder: Path, images: int, rounds: int) -> list[dict[str, Any]]:
    """Returns rows for a dict of keys, for ours at the first opening, and for ours when cached."""
    path = make_index(folder, images)
    dict_seconds, dict_mib = open_in_processes(open_dict, path, 1)
    first = open_in_processes(open_ours, path, 1)
    again = [open_in_processes(open_ours, path, 4) for _ in range(rounds)]
    cached = (statistics.median(s for s, _ in again), max(mib for _, mib in again))
    path.with_suffix(".idx").unlink()
    return [
        {
            "name": name,
            "params": {"images": images, "processes": processes},
            "median_ms": 1000 * seconds,
            "peak_mib": mib,
            "ratio_to_baseline": seconds / dict_seconds,
        }
        for name, processes, (seconds, mib) in (
            ("dict of keys", 1, (dict_seconds, dict_mib)),
            ("ours, first opening", 1, first),
            ("ours, from the cache", 4, cached),
        )
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; prints tables and writes rows as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="smaller, about a minute on 2 cores")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--folder", type=Path, help="where to make the records (deleted after)")
    options = parser.parse_args(arguments)
    count, rounds = (2_560, 3) if options.quick else (5_120, 5)
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"simplejpeg {simplejpeg.__version__}, medians of {rounds}"
    )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_records(folder, count)
        size = (folder / "train.rec").stat().st_size / count
        print(f"{count:,} images of {size:,.0f} bytes, batches of {BATCH}")
        print("Ratios: of images/s, and in brackets of images per second of CPU time")
        print(
            f"{'loader':20}{'cores':>6}{'images/s':>10}{'/ Pillow':>15}{'/ libjpeg':>15}"
            f"{'/ cached':>15}{'/ DALI':>15}{'MiB':>7}"
        )
        for cores in range(1, min(2, os.cpu_count() or 1) + 1):
            for row in compare_loaders(folder, cores, rounds):
                rows.append(row)
                ratios = "".join(
                    f"{row[f'ratio_to {other}']:>8.2f} ({row[f'ratio_to {other}, CPU time']:.2f})"
                    if f"ratio_to {other}" in row
                    else f"{'-':>15}"
                    for other in BASELINES
                )
                print(
                    f"{row['name']:20}{cores:>6}{row['per_second']:>10,.0f}{ratios}"
                    f"{row['peak_mib']:>7.0f}"
                )
        print(f"\n{'index':22}{'images':>12}{'processes':>10}{'open, ms':>12}{'MiB, all':>10}")
        for images in (1_000_000,) if options.quick else (1_000_000, IMAGES_WEBFACE42M):
            for row in compare_indexes(folder, images, 3):
                rows.append(row)
                print(
                    f"{row['name']:22}{images:>12,}{row['params']['processes']:>10}"
                    f"{row['median_ms']:>12,.1f}{row['peak_mib']:>10,.0f}"
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
