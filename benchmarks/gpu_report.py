"""Formats the rows of benchmarks/gpu_bench.py as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def report(rows: Sequence[Row]) -> str:
    """Formats rows as Markdown: environment, tables per section, what was left out or failed."""
    facts = next((row for row in rows if row["section"] == "environment"), {})
    heading = "GPU benchmark"
    if facts.get("params", {}).get("rehearsal"):
        heading += ": a rehearsal on a CPU, whose figures mean nothing"
    parts = [f"# {heading}", _environment(facts)]
    for section, heading, columns in (
        ("ceilings", "What this card reaches", CEILINGS),
        ("head", "Head: forward, backward and update", HEAD),
        (
            "launch",
            "Launch settings of the head's kernels, 131,072 centers of 512, B = 1024",
            LAUNCH,
        ),
        ("step", "Whole step: train_v2.py on generated images", TRAINING),
        ("published", "Identities on this one GPU", TRAINING),
        ("dali", "Records decoded by DALI", TRAINING),
    ):
        done = [row for row in rows if row["section"] == section and _is_done(row)]
        if section in RATIOS:
            done = [{**row, "ratio": _ratio(row, done, *RATIOS[section])} for row in done]
        if done:
            parts += [
                f"## {heading}",
                _table(
                    [name for name, _, _ in columns],
                    [[_cell(row, key, style) for _, key, style in columns] for row in done],
                ),
            ]
        if section == "head":
            parts += _products(rows)
        if section == "step":
            parts += _profile(done)
    return "\n\n".join([*parts, *_checks(rows), *_not_done(rows)]) + "\n"


# Settings that distinguish rows of one name, and their format.
NAMED = {
    "network": "{}",
    "num_classes": "C = {:,}",
    "sample_rate": "r = {:g}",
    "optimizer": "{}",
    "workspace_mib": "workspace {}",
    "kernels": "kernels {}",
    "settings": "{}",
    "dtype": "{}",
}
# Section: (baseline's name, figure to compare at the same settings, whether smaller is better).
RATIOS = {"head": ("dense", "step_ms", True), "step": ("plain", "samples_per_second", False)}
SETTINGS = (
    "num_classes",
    "batch",
    "batch_size",
    "sample_rate",
    "network",
    "optimizer",
    "weight_dtype",
)
CEILINGS = (
    ("bf16 product, TFLOP/s", "matmul_tflops", ".4g"),
    ("fp32 product, TFLOP/s", "fp32_tflops", ".4g"),
    ("copy, read and written, GB/s", "copy_gigabytes_per_second", ",.0f"),
)
HEAD = (
    ("head", "name", ""),
    ("classes", "num_classes", ",d"),
    ("B", "batch", "d"),
    ("r", "sample_rate", "g"),
    ("optimizer", "optimizer", ""),
    ("centers", "weight_dtype", ""),
    ("workspace, MiB", "workspace_mib", ""),
    ("kernels", "kernels", ""),
    ("step, ms", "step_ms", ",.2f"),
    ("times the dense head's speed", "ratio", ".2f"),
    ("limit, ms", "limit_ms", ",.2f"),
    ("share of the limit", "share_of_limit", ".1%"),
    ("peak beside centers and state, MiB allocated", "peak_mib", ",.0f"),
    ("launches, counted", "launches_counted", ",d"),
    ("GB moved, counted", "gigabytes_moved_counted", ".1f"),
)
LAUNCH = (
    ("kernel", "name", ""),
    ("settings", "settings", ""),
    ("TMA", "tma", ""),
    ("optimizer", "optimizer", ""),
    ("centers", "dtype", ""),
    ("ms", "ms", ".4f"),
    ("TFLOP/s", "tflops", ".4g"),
    ("GB/s", "gigabytes_per_second", ",.0f"),
)
TRAINING = (
    ("configuration", "name", ""),
    ("network", "network", ""),
    ("classes", "num_classes", ",d"),
    ("B", "batch_size", "d"),
    ("r", "sample_rate", "g"),
    ("precision", "precision", ""),
    ("img/s", "samples_per_second", ",.0f"),
    ("times plain", "ratio", ".2f"),
    ("peak, MiB reserved", "peak_mib", ",.0f"),
    ("MFU", "mfu", ".1%"),
    ("MFU with the head", "mfu_with_head", ".1%"),
    ("compiling, s", "compile_seconds", ".0f"),
    ("data wait", "data_wait_share", ".1%"),
)


def _ratio(
    row: Row, rows: Sequence[Row], baseline: str, key: str, smaller_is_better: bool
) -> float | None:
    """Returns how many times better than the baseline a row is, if that was measured."""
    for other in rows:
        is_same = all(row["params"].get(k) == other["params"].get(k) for k in SETTINGS)
        if other["name"] == baseline and is_same and row["name"] != baseline:
            ratio = other[key] / row[key]
            return ratio if smaller_is_better else 1 / ratio
    return None


def _is_done(row: Row) -> bool:
    return "error" not in row and "left_out" not in row


def _cell(row: Row, key: str, style: str) -> str:
    value = row.get(key, row["params"].get(key))
    if value is None:
        return "-"
    return format(value, style) if isinstance(value, (int, float)) else str(value)


def _table(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heading, ["---"] * len(heading), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _environment(row: Row) -> str:
    facts = {k: v for k, v in row.items() if k not in ("section", "name", "params", "seconds")}
    params = row.get("params", {})
    first = f"{params.get('date')}, {facts.get('gpu') or 'no GPU'}, `{params.get('command')}`"
    lines = [f"- {key.replace('_', ' ')}: {value}" for key, value in facts.items()]
    return "\n".join([first, "", *lines])


def _products(rows: Sequence[Row]) -> list[str]:
    """Formats the table of all shapes of products and sizes of blocks."""
    lines = []
    for row in rows:
        if row["section"] == "product" and _is_done(row):
            sizes = [f"{row['params'][key]:,}" for key in ("batch", "rows")]
            lines += [
                [shape, *sizes, f"{found['ms']:.3f}", f"{found['tflops']:.4g}"]
                for shape, found in row["products"].items()
            ]
    if not lines:
        return []
    heading = ["product -> dtype of its result", "B", "n", "ms", "TFLOP/s"]
    return ["## The head's products, bf16 operands, D = 512", _table(heading, lines)]


def _profile(rows: Sequence[Row]) -> list[str]:
    return [
        f"### Profile of {row['name']}, {row['params']['network']}, "
        f"{row['params']['num_classes']:,} classes\n\n```\n{row['profile']}```"
        for row in rows
        if "profile" in row
    ]


def _checks(rows: Sequence[Row]) -> list[str]:
    checks = [row for row in rows if row["section"] == "check"]
    if not checks:
        return []
    passed = sum(_is_done(row) for row in checks)
    lines = [[row["name"], _outcome(row), f"{row['seconds']:.1f}"] for row in checks]
    return [
        f"## Checks: {passed} of {len(checks)} passed",
        _table(["check", "result", "seconds"], lines),
    ]


def _outcome(row: Row) -> str:
    if "error" in row:
        return "FAILED"
    return f"left out: {row['left_out']}" if "left_out" in row else "passed"


def _not_done(rows: Sequence[Row]) -> list[str]:
    """Formats what failed, with the end of its error, and what was left out, with the reason."""
    failed = [row for row in rows if "error" in row]
    left_out = [row for row in rows if "left_out" in row and row["section"] != "check"]
    parts = []
    if left_out:
        lines = [f"- {row['section']}: {title(row)}: {row['left_out']}" for row in left_out]
        parts.append("## Left out\n\n" + "\n".join(lines))
    if failed:
        parts.append("## Failed")
        parts += [f"{row['section']}: {title(row)}\n\n```\n{row['error']}\n```" for row in failed]
    return parts


def title(row: Row) -> str:
    """Returns a row's name with the settings that distinguish it."""
    known = {key: value for key, value in row["params"].items() if value is not None}
    told = [form.format(known[key]) for key, form in NAMED.items() if key in known]
    return f"{row['name']} ({', '.join(told)})" if told else str(row["name"])
