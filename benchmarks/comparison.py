"""Compares two configurations of train_v2.py: defines the rows and formats the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.runs import ENTRY, ENTRY_PLAIN_ALLOCATOR, Reading, run_training

Keys = dict[str, Any]

PLAIN: dict[str, Keys] = {
    "cpu": {"precision": "fp32"},
    "cuda": {"precision": "fp16", "grad_reduce_dtype": "fp16"},
}
PLAIN_EVERYWHERE: Keys = {"channels_last": False, "head_update": "autograd", "compile": False}
OURS: dict[str, Keys] = {"cpu": {"precision": "fp32"}, "cuda": {"precision": "bf16"}}
COMPILED: Keys = {"compile": True}
INTERVALS = 5  # log intervals of a run; the first is left out

HEADER = (
    "network | classes | batch | r | plain | ours | samples/s plain | ours | ours / plain "
    "| peak MiB plain | ours | ours / plain | above start | MFU plain | ours | with head | "
    "data wait plain | ours"
)
OPTIONS_HEADER = (
    "option | network | classes | batch | ranks | samples/s ours | with it | with it / ours | "
    "peak MiB ours | with it | with it / ours | above start | compiling, s"
)


class Side(NamedTuple):
    """One of the two configurations of a row.

    Attributes:
        name: Name in the table.
        keys: Keys of the config.
        own_allocator: Whether the allocator is set by utils/memory.py, as train_v2.py does.
    """

    name: str
    keys: Keys
    own_allocator: bool = True

    def run(self, keys: Keys, ranks: int) -> Reading:
        """Trains once with `keys` and the changes of this side."""
        entry = ENTRY if self.own_allocator else ENTRY_PLAIN_ALLOCATOR
        return run_training({**keys, **self.keys}, ranks=ranks, entry=entry)


def plain(device: str) -> Side:
    """Returns the configuration that users run today."""
    return Side("plain", {**PLAIN_EVERYWHERE, **PLAIN[device]})


class Row(NamedTuple):
    """What is compared; targets are of ours / plain.

    Attributes:
        baseline: First side.
        changed: Second side.
        network: Name of the network.
        num_classes: C.
        batch_size: Batch per rank.
        sample_rate: r.
        ranks: Number of ranks.
        least_speed: Smallest ratio of speeds that meets the target, or None.
        most_memory: Largest ratio of peaks that meets the target, or None.
    """

    baseline: Side
    changed: Side
    network: str
    num_classes: int
    batch_size: int
    sample_rate: float = 1.0
    ranks: int = 1
    least_speed: float | None = None
    most_memory: float | None = None

    @property
    def setting(self) -> str:
        """Settings of the row in words."""
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        return (
            f"{self.network}, C = {self.num_classes:,}, B = {self.batch_size}, "
            f"r = {self.sample_rate:g}{ranks}"
        )


class Result(NamedTuple):
    """Medians over the repeats of one side.

    Attributes:
        speed: Samples per second.
        peak_mib: Peak memory in MiB.
        above_mib: Peak memory above a tiny run's, in MiB.
        data_wait_share: Share of the time that waits for data.
        compile_seconds: Time of compiling, or None.
        utilization: Share of the peak FLOP/s without and with the head.
    """

    speed: float
    peak_mib: float
    above_mib: float
    data_wait_share: float
    compile_seconds: float | None
    utilization: tuple[float, float]


class Comparison(NamedTuple):
    """Results of a row; ratios are changed / baseline.

    Attributes:
        row: The row.
        baseline: Result of the first side.
        changed: Result of the second side.
        speed_ratio: (median, least, most) of neighboring runs.
    """

    row: Row
    baseline: Result
    changed: Result
    speed_ratio: tuple[float, float, float]

    @property
    def memory_ratio(self) -> float:
        """Ratio of the whole peaks."""
        return self.changed.peak_mib / self.baseline.peak_mib

    @property
    def above_ratio(self) -> float | None:
        """Ratio of the peaks above start; None if the baseline has none."""
        base = self.baseline.above_mib
        return self.changed.above_mib / base if base > 0 else None

    def missed(self) -> list[str]:
        """Returns targets that were not met, a sentence each."""
        row, speed, found = self.row, self.speed_ratio[0], []
        if row.least_speed is not None and speed < row.least_speed:
            found.append(f"{row.setting}: {speed:.2f} x samples/s, wanted {row.least_speed:g} x")
        if row.most_memory is not None and self.memory_ratio > row.most_memory:
            found.append(
                f"{row.setting}: {self.memory_ratio:.2f} x peak memory, wanted at most "
                f"{row.most_memory:g} x"
            )
        return found


def ratio_of_pairs(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Returns (median, least, most) of after / before."""
    ratios = [after / before for before, after in pairs]
    return median(ratios), min(ratios), max(ratios)


def line(found: Comparison) -> str:
    """Formats a row of the first table."""
    row, (before, after) = found.row, found[1:3]
    sides = (f"{side.name} ({side.keys['precision']})" for side in (row.baseline, row.changed))
    return table_row(
        [
            row.network,
            f"{row.num_classes:,}",
            row.batch_size,
            f"{row.sample_rate:g}",
            *sides,
            *_speed_and_memory(found),
            f"{before.utilization[0]:.1%}",
            *(f"{share:.1%}" for share in after.utilization),
            f"{before.data_wait_share:.1%}",
            f"{after.data_wait_share:.1%}",
        ]
    )


def option_line(found: Comparison) -> str:
    """Formats a row of the second table."""
    row, seconds = found.row, found.changed.compile_seconds
    return table_row(
        [
            row.changed.name,
            row.network,
            f"{row.num_classes:,}",
            row.batch_size,
            row.ranks,
            *_speed_and_memory(found),
            "-" if seconds is None else f"{seconds:.1f}",
        ]
    )


def _speed_and_memory(found: Comparison) -> list[str]:
    before, after, above = found.baseline, found.changed, found.above_ratio
    middle, least, most = found.speed_ratio
    return [
        f"{before.speed:,.1f}",
        f"{after.speed:,.1f}",
        f"**{middle:.2f}** ({least:.2f}-{most:.2f})",
        f"{before.peak_mib:,.0f}",
        f"{after.peak_mib:,.0f}",
        f"**{found.memory_ratio:.2f}**",
        "-" if above is None else f"{above:.2f}",
    ]


def table_row(cells: Sequence[Any]) -> str:
    """Formats one line of a Markdown table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def as_json(found: Comparison) -> dict[str, Any]:
    """Returns one row of the benchmark's JSON."""
    row = found.row
    return {
        "name": row.changed.name,
        "baseline": row.baseline.name,
        "params": {
            **{k: getattr(row, k) for k in Row._fields[2:7]},
            "keys": row.changed.keys,
            "baseline_keys": row.baseline.keys,
        },
        "per_second": found.changed.speed,
        "baseline_per_second": found.baseline.speed,
        "ratio_to_baseline": found.speed_ratio[0],
        "ratio_range": found.speed_ratio[1:],
        "peak_mib": found.changed.peak_mib,
        "baseline_peak_mib": found.baseline.peak_mib,
        "memory_ratio_to_baseline": found.memory_ratio,
        "above_start_ratio": found.above_ratio,
        "mfu": found.changed.utilization[0],
        "mfu_with_head": found.changed.utilization[1],
        "baseline_mfu": found.baseline.utilization[0],
        "data_wait_share": found.changed.data_wait_share,
        "baseline_data_wait_share": found.baseline.data_wait_share,
        "compile_seconds": found.changed.compile_seconds,
        "missed": found.missed(),
    }


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws samples per second and peak memory of both sides of every row, with their ratio."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(max(6.0, 1.7 * len(found) + 2), 8))
    for axis, key, ratio, unit, shrink in (
        (axes[0], "per_second", "ratio_to_baseline", "samples/s", 1),
        (axes[1], "peak_mib", "memory_ratio_to_baseline", "peak memory, GiB", 1024),
    ):
        for place, row in enumerate(found):
            for shift, name, color in ((-0.2, f"baseline_{key}", "C7"), (0.2, key, "C0")):
                axis.bar(place + shift, row[name] / shrink, 0.38, color=color)
            axis.text(
                place + 0.2,
                row[key] / shrink,
                f"x {row[ratio]:.2f}",
                ha="center",
                va="bottom",
                fontsize=9,
            )
        axis.set_xticks(range(len(found)), [_label(row) for row in found], fontsize=8)
        axis.set_ylabel(unit)
        axis.margins(y=0.12)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    names = ("ours", "with the option") if found[0]["baseline"] == "ours" else ("plain", "ours")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in ("C7", "C0")]
    figure.legend(handles, names, loc="upper right", ncol=2, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path, dpi=110)


def _label(row: Mapping[str, Any]) -> str:
    params = row["params"]
    lines = [] if row["name"] == "ours" else [row["name"].replace("=", "=\n")]
    lines += [] if row["baseline"] in ("ours", "plain") else [f"to: {row['baseline']}"]
    lines.append(f"{params['network']}, B={params['batch_size']}, {params['keys']['precision']}")
    lines.append(f"C={params['num_classes']:,}")
    lines += [] if params["sample_rate"] == 1.0 else [f"r={params['sample_rate']:g}"]
    return "\n".join(lines)
