"""Estimate memory and time of a run before it is launched.

    python scripts/plan.py configs/ms1mv3_r50 --world-size 8 --gpu h100
    python scripts/plan.py configs/wf42m_pfc02_r100 batch_size=256 --world-size 8 --gpu v100
    python scripts/plan.py configs/lfw_nano rec=FOLDER --measure          # a minute on this machine
    python scripts/plan.py CONFIG --world-size 16 --gpu a100 --json

The command prints memory per rank by part, from the code that allocates; the time of a step, from
the peaks of the device and assumed shares of them, or with --measure from this machine; samples per
second and hours. If a config does not fit, it lists what would change that, computed for each
change. The time does not include reading and decoding images, verification and checkpoints.
docs/speed.md says what is assumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbones import get_model
from backbones.macs import count_macs
from configs.base import Config
from eval.cli import run_command, table
from training.planner.memory import Requirements
from training.planner.plan import (
    Plan,
    Setting,
    choose_machine,
    device_type,
    make_plan,
    policy,
    sizes,
    what_would_fit,
)
from training.planner.roofline import (
    GPUS,
    SHARE_OF_PEAK,
    Links,
    Machine,
    device_seconds,
    launch_seconds,
)
from training.setup import share_global_batch
from utils.config import load_config
from utils.errors import UserError

PART_WORDS = {
    "weights": "network: weights",
    "gradients": "network: gradients",
    "optimizer": "network: optimizer",
    "activations": "network: activations",
    "centers": "class centers",
    "center_state": "class centers: optimizer",
    "head": "head: workspace",
    "global_batch": "head: global batch",
    "teacher": "teacher",
    "images": "batches of images",
    "overhead": "holes and workspaces (assumed)",
}


def describe(cfg: Config, setting: Setting, plan: Plan) -> dict[str, Any]:
    """Returns all facts of a plan, with values that JSON knows."""
    with torch.device("meta"):
        network = get_model(cfg.network, num_features=cfg.embedding_size, input_size=cfg.input_size)
    footprint = plan.needs.footprint
    return {
        "network": cfg.network,
        "parameters": plan.needs.parameters,
        "macs_per_image": count_macs(network, cfg.input_size).total,
        "num_classes": setting.num_classes,
        "num_images": setting.num_images,
        "classes_per_rank": plan.needs.classes_per_rank,
        "classes_per_step_and_rank": plan.needs.head.rows,
        "precision": policy(cfg, setting.machine).name,
        "batch_size_per_rank": cfg.batch_size,
        "gradient_acc": cfg.gradient_acc,
        "world_size": setting.world_size,
        "global_batch": cfg.batch_size * setting.world_size * cfg.gradient_acc,
        "machine": dataclasses.asdict(setting.machine),
        "links": dataclasses.asdict(setting.links),
        "memory": {
            "unit": "bytes per rank",
            **footprint.parts(),
            "total": footprint.total,
            "room": plan.room,
            "fits": plan.fits,
            "on_host": footprint.on_host,
            "peak_is_in": footprint.peak_is_in,
        },
        "time": {
            "unit": "seconds per step",
            "is_measured": setting.measured_seconds > 0,
            **dataclasses.asdict(plan.time),
            "total": plan.time.total,
        },
        "head": describe_head(plan.needs, setting.machine),
        "samples_per_second": plan.samples_per_second,
        "steps_per_epoch": plan.steps_per_epoch,
        "num_epoch": cfg.num_epoch,
        "total_steps": plan.total_steps,
        "frozen_steps": plan.frozen_steps,
        "frozen_seconds_per_step": plan.frozen_seconds,
        "hours": plan.hours,
        "assumed": None
        if setting.measured_seconds
        else SHARE_OF_PEAK[device_type(setting.machine)],
    }


def describe_head(needs: Requirements, machine: Machine) -> dict[str, Any] | None:
    """Returns kernel launches and gigabytes of a step of the fused head; None for other heads.

    All passes of the step are counted. On a GPU the result also has the seconds that the host takes
    to start the kernels, and the device to run them.
    """
    if needs.head.operations is None:
        return None
    counted = needs.head.operations()
    found = {"launches": counted.launches, "gigabytes": counted.bytes_moved / 1e9}
    if device_type(machine) == "cpu":
        return found
    return found | {
        "launch_seconds": launch_seconds(counted),
        "device_seconds": device_seconds(counted, machine),
    }


def show(facts: dict[str, Any], proposals: Sequence[tuple[str, Plan]]) -> str:
    """Formats `describe` as text.

    Args:
        facts: Result of `describe`.
        proposals: Changes in words and their plans, shown if the config does not fit.
    """
    memory, time, machine = facts["memory"], facts["time"], facts["machine"]
    macs = facts["macs_per_image"] / 1e9
    rows = [["memory per rank", "MiB"]]
    rows += [
        [f"  {words}", f"{memory[part] / 2**20:,.0f}"]
        for part, words in PART_WORDS.items()
        if memory[part] or part != "teacher"
    ]
    rows.append(["  total, at most", f"{memory['total'] / 2**20:,.0f}"])
    times = [["time per step", "ms"]]
    names = {
        "backbone": "network, and its optimizer" if time["is_measured"] else "network",
        "head": "head",
        "teacher": "teacher, and its loss",
        "optimizer": "optimizer of the network",
        "collectives": "collectives that nothing hides",
    }
    times += [
        [f"  {words}", f"{1e3 * time[part]:,.1f}"]
        for part, words in names.items()
        if time[part] or part not in ("optimizer", "teacher")
    ]
    times.append(["  total", f"{1e3 * time['total']:,.1f}"])
    head = facts["head"] or {}
    verdict = "fits" if memory["fits"] else "DOES NOT FIT"
    lines = [
        f"{facts['network']}, {facts['parameters'] / 1e6:.1f} M parameters, {macs:.2f} GMACs "
        f"({2 * macs:.2f} GFLOPs) per image; {facts['num_classes']:,} classes, "
        f"{facts['classes_per_rank']:,} per rank, {facts['classes_per_step_and_rank']:,} of them "
        f"in a step",
        f"{facts['world_size']} x {machine['name']}, {facts['precision']}, global batch "
        f"{facts['global_batch']:,} = {facts['batch_size_per_rank']} x {facts['world_size']} ranks "
        f"x {facts['gradient_acc']} micro-steps",
        "",
        table(rows),
        f"{verdict}: room for {memory['room'] / 2**20:,.0f} MiB of {machine['memory_gib']:.1f} GiB "
        f"({machine['source']}); the peak is in the {memory['peak_is_in']}",
    ]
    if memory["on_host"]:
        lines.append(f"in host memory besides: {memory['on_host'] / 2**20:,.0f} MiB")
    lines += ["", table(times)]
    assumed = facts["assumed"]
    lines.append(
        "measured here, without decoding of images"
        if assumed is None
        else "from the peaks; assumed: " + ", ".join(f"{v:.0%} of {k}" for k, v in assumed.items())
    )
    if "launch_seconds" in head and assumed is not None:
        lines.append(
            f"head: {head['launches']:,} kernel launches, which the host starts in "
            f"{1e3 * head['launch_seconds']:,.1f} ms, and {head['gigabytes']:,.1f} GB moved; with "
            f"its products the GPU works {1e3 * head['device_seconds']:,.1f} ms"
        )
    lines.append(
        f"{facts['samples_per_second']:,.0f} samples/s; {facts['num_epoch']} epochs of "
        f"{facts['steps_per_epoch']:,} steps; {facts['total_steps']:,} steps take "
        f"{facts['hours']:,.1f} hours"
    )
    if facts["frozen_steps"]:
        lines.append(
            f"the first {facts['frozen_steps']:,} of them frozen: "
            f"{1e3 * facts['frozen_seconds_per_step']:,.1f} ms each"
        )
    if not memory["fits"]:
        lines += ["", "what would change it, each by itself (if none fits, then together):"]
        heading = ["change", "MiB", "", "samples/s"]
        lines.append(
            table(
                [
                    heading,
                    *(
                        [
                            words,
                            f"{plan.needs.footprint.total / 2**20:,.0f}",
                            "fits" if plan.fits else "does not fit",
                            f"{plan.samples_per_second:,.0f}",
                        ]
                        for words, plan in proposals
                    ),
                ]
            )
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="plan.py", description="Will this config fit, and how long will it take?"
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("words", nargs="*", metavar="key=value", help="as train_v2.py takes them")
    parser.add_argument("--world-size", type=int, default=1, help="ranks (default 1)")
    parser.add_argument("--gpu", help=f"{', '.join(GPUS)} or cpu (default: what is here)")
    parser.add_argument("--ranks-per-host", type=int, default=8, help="default 8")
    parser.add_argument(
        "--network-gbit", type=float, default=100.0, help="network of a host, Gbit/s (default 100)"
    )
    parser.add_argument(
        "--measure",
        type=float,
        nargs="?",
        const=60.0,
        default=0.0,
        metavar="SECONDS",
        help="time a step here, for about a minute",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: _plan(options))


def _plan(options: argparse.Namespace) -> int:
    for name in ("world_size", "ranks_per_host", "network_gbit"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: above 0")
    if options.measure < 0:
        raise UserError(f"--measure {options.measure}: seconds, above 0")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if options.measure and options.gpu is not None and (options.gpu == "cpu") != (here == "cpu"):
        raise UserError(f"--measure --gpu {options.gpu}: this machine is a {here}; leave --gpu out")
    cfg = load_config(options.config, options.words)
    num_classes, num_images = sizes(cfg)
    setting = Setting(
        choose_machine(options.gpu),
        options.world_size,
        Links(options.ranks_per_host, options.network_gbit),
        num_classes,
        num_images,
        options.measure,
    )
    cfg = share_global_batch(cfg, options.world_size)
    plan = make_plan(cfg, setting)
    proposals = [] if plan.fits else what_would_fit(cfg, setting)
    facts = describe(cfg, setting, plan)
    if options.json:
        facts["changes"] = [
            {
                "words": words,
                "total": one.needs.footprint.total,
                "fits": one.fits,
                "samples_per_second": one.samples_per_second,
            }
            for words, one in proposals
        ]
        print(json.dumps(facts, indent=2))
    else:
        print(show(facts, proposals))
    return 0


if __name__ == "__main__":
    sys.exit(main())
