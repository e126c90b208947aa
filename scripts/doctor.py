"""Examine a record set, and name what is wrong with it.

    python scripts/doctor.py DATA                      everything; images: a sample of 10,000
    python scripts/doctor.py DATA --decode all         every image decoded
    python scripts/doctor.py DATA --against lfw.bin    also: is this verification set in it?
    python scripts/doctor.py DATA --verify             every record against train.manifest
    python scripts/doctor.py DATA --rebuild-index      train.idx by scanning train.rec
    python scripts/doctor.py DATA --fix OUT            what can be read, as a new set

Exit code 0: healthy; 1: something is wrong (it is named); 2: the command cannot be carried out.
`--allow CHECK` makes a check's findings notes, for what you know and accept. For example, a part of
a larger set has gaps between its labels. Nothing is ever changed in place.

The command takes about 120 bytes of memory per image (5 GB for 42 million) and nothing else that
grows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.datasets import IMAGE_SUFFIXES
from data.pairs import read_pairs
from data.tools.image_records import rec_path
from data.tools.repair import fix, rebuild
from data.tools.report import CHECKS
from data.tools.validate import Others, content_hash, examine, verify
from eval.verification_sets import load_verification_set
from utils.cli import cli_command
from utils.files import atomic_write


def read_others(other: Path) -> Others:
    """Reads image hashes and identity names of a .bin, a pairs file or a folder."""
    if other.suffix == ".bin":
        encoded = load_verification_set(other).images
        hashes = (content_hash(image) for image in encoded if isinstance(image, bytes))
        return Others(str(other), frozenset(hashes), frozenset())
    if other.is_dir():
        files = [p for p in sorted(other.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
        hashes = (content_hash(path.read_bytes()) for path in tqdm(files, desc=other.name))
        people = (path.parent.name for path in files if path.parent != other)
        return Others(str(other), frozenset(hashes), frozenset(people))
    pairs = read_pairs(other)
    people = (name for pair in pairs for name, _ in (pair.first, pair.second))
    return Others(str(other), frozenset(), frozenset(people))


def plot_histogram(counts: np.ndarray, path: Path, title: str) -> None:
    """Plots the images per class as a PNG.

    Args:
        counts: [classes] int64, each 1 or more.
        path: File of the figure.
        title: Name of the set.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    edges = np.unique(np.geomspace(1, counts.max() + 1, 41).round())
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    axis.hist(
        counts, bins=(edges - 0.5).tolist(), color="#4878a8", edgecolor="white", linewidth=0.5
    )
    median = float(np.median(counts))
    axis.axvline(median, color="#c44e52", linestyle="--", label=f"median {median:g}")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="images of a class",
        ylabel="classes",
        title=f"{title}: {counts.sum():,} images of {len(counts):,} classes, "
        f"{(counts == 1).sum():,} with one image",
    )
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_ylim(bottom=0.7)
    axis.grid(alpha=0.3)
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="doctor.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("data", type=Path, metavar="DATA", nargs="?", help="folder with train.rec, or a .rec")
    add("--decode", default="10000", metavar="N|all", help="images to decode (default 10000)")
    add(
        "--against",
        type=Path,
        action="append",
        default=[],
        metavar="SET",
        help="a .bin, a pairs file or a folder that must not be in the set; repeats",
    )
    add(
        "--allow",
        action="append",
        default=[],
        choices=CHECKS,
        metavar="CHECK",
        help=f"findings to accept: {', '.join(CHECKS)}",
    )
    add(
        "--histogram",
        type=Path,
        metavar="PNG",
        help="images per class (default: NAME_classes.png in the current folder)",
    )
    add("--json", nargs="?", const="-", metavar="FILE", help="the report as JSON (-: to stdout)")
    add("--verify", action="store_true", help="only compare with train.manifest")
    add("--rebuild-index", action="store_true", help="write an index by scanning the records")
    add("--fix", type=Path, metavar="OUT", help="write what can be read to a new folder")
    add("--out", type=Path, help="of --rebuild-index: the .idx to write")
    add("--force", action="store_true", help="with --fix: replace the set in OUT")
    add("--num-thread", type=int, default=2, metavar="N", help="threads (default 2)")
    return parser


@cli_command("stopped; nothing was written")
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code: 0, 1, 2, or 130 for Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.data is None and args.json not in (None, "-"):  # doctor.py --json DATA
        args.data, args.json = Path(args.json), "-"
    if args.data is None:
        parser.error("DATA is missing: a folder with train.rec, or a .rec")
    if args.decode != "all" and not args.decode.isdigit():
        parser.error(f"--decode {args.decode}: allowed are a number and all")
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    if args.rebuild_index:
        count, damages = rebuild(args.data, args.out)
        print(f"{count} records in the index, {len(damages)} damaged places passed over")
        for damage in damages:
            print(damage.error)
        return 1 if damages else 0
    if args.fix is not None:
        report, count = fix(args.data, args.fix, force=args.force)
        report.facts["written"] = f"{count} images to {args.fix}"
    elif args.verify:
        report = verify(args.data, allowed=args.allow, num_threads=args.num_thread)
    else:
        report, counts = examine(
            args.data,
            num_decoded=None if args.decode == "all" else int(args.decode),
            against=[read_others(other) for other in args.against],
            allowed=args.allow,
            num_threads=args.num_thread,
        )
        name = rec_path(args.data).resolve().parent.name
        if len(counts):
            histogram = args.histogram or Path(f"{name}_classes.png")
            plot_histogram(counts, histogram, name)
            report.facts["class_histogram"] = str(histogram)
    text = json.dumps(report.as_json(), indent=1)
    if args.json == "-":
        print(text)
    else:
        if args.json:
            with atomic_write(args.json) as file:
                file.write(f"{text}\n".encode())
        print(report.as_text())
    return 0 if report.healthy else 1


if __name__ == "__main__":
    sys.exit(main())
