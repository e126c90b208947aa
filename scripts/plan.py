"""Will it fit, and how long will it take? Before anything is launched.

    python scripts/plan.py configs/ms1mv3_r50 --world-size 8 --gpu h100
    python scripts/plan.py configs/wf42m_pfc02_r100 batch_size=256 --world-size 8 --gpu v100
    python scripts/plan.py configs/lfw_nano rec=FOLDER --measure          # a minute on this machine
    python scripts/plan.py CONFIG --world-size 16 --gpu a100 --json

Memory per rank by part, from the code that allocates; time of a step from the peaks of the device
and assumed shares of them, or with --measure from this machine; samples per second, hours. What
does not fit comes with what would change it, worked out anew for each. Reading and decoding
images, verification and checkpoints are not in the time. docs/speed.md says what is assumed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not __package__:  # run as a file: the modules lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from backbones import get_model
from backbones.macs import count_macs
from configs.base import Config
from eval.command import run_command, table
from training.build_data import make_loader
from training.build_head import embeds_ahead, has_layer, make_margin
from training.footprint import Needs, find_needs
from training.precision import Precision, choose_precision, named_policy
from training.roofline import (
    GPUS,
    SHARE_OF_PEAK,
    Links,
    Machine,
    StepTime,
    collective_seconds,
    device_seconds,
    estimate,
    forward_share,
    launch_seconds,
    this_cpu,
)
from training.setup import SetupError, share_global_batch
from training.stopwatch import time_step
from utils.config import load_config
from utils.distributed import World

# What a process holds beside its tensors: Python, libraries, the context of CUDA.
PROCESS_GIB = {"cpu": 0.3, "cuda": 0.8}
PART_WORDS = {
    "weights": "network: weights",
    "gradients": "network: gradients",
    "optimizer": "network: optimizer",
    "activations": "network: activations",
    "centres": "class centres",
    "centre_state": "class centres: optimizer",
    "head": "head: workspace",
    "global_batch": "head: global batch",
    "teacher": "teacher",
    "images": "batches of images",
    "overhead": "holes and workspaces (assumed)",
}


class PlanError(ValueError):
    """There is no plan for this; the message says what to change."""


@dataclass(frozen=True)
class Plan:
    """One configuration on one kind of machine. Sizes in bytes on rank 0, times in seconds.

    frozen_steps: of total_steps, in which the backbone is only read; frozen_seconds: of one.
    """

    needs: Needs
    time: StepTime
    room: int
    samples_per_second: float
    steps_per_epoch: int
    total_steps: int
    frozen_steps: int
    frozen_seconds: float

    @property
    def fits(self) -> bool:
        """Rank 0's memory is enough."""
        return self.needs.footprint.total <= self.room

    @property
    def hours(self) -> float:
        """Of the whole run."""
        moving = self.total_steps - self.frozen_steps
        return (moving * self.time.total + self.frozen_steps * self.frozen_seconds) / 3600


@dataclass(frozen=True)
class Setting:
    """What a plan is for, beside the config."""

    machine: Machine
    world_size: int
    links: Links
    num_classes: int
    num_images: int
    measured_seconds: float = 0.0  # to spend on measuring; 0: from the peaks


def make_plan(cfg: Config, setting: Setting) -> Plan:
    """Memory and time of `cfg` as it would run.

    Raises:
        PlanError, SetupError: it could not run so.
    """
    cfg = share_global_batch(cfg, setting.world_size)
    machine, world_size = setting.machine, setting.world_size
    kind = device_type(machine)
    precision = policy(cfg, machine)
    if precision.tf32:
        machine = dataclasses.replace(machine, single=machine.tf32)
    memory_bytes = int(machine.memory_gib * 2**30)
    needs = find_needs(cfg, world_size, setting.num_classes, precision, kind, memory_bytes)
    embeds_twice = embeds_ahead(cfg, make_margin(cfg))
    if setting.measured_seconds:
        rest, head, teacher = time_step(
            cfg, world_size, setting.num_classes, torch.device(kind), setting.measured_seconds
        )
        passes = 1 if embeds_twice else cfg.gradient_acc
        collectives = collective_seconds(
            needs, machine, setting.links, world_size, rest, passes
        )
        time = StepTime(rest, head, teacher, 0.0, collectives)
    else:
        time = estimate(
            needs, machine, setting.links, world_size, cfg.gradient_acc, embeds_twice
        )
    global_batch = cfg.batch_size * world_size * cfg.gradient_acc
    steps_per_epoch = setting.num_images // global_batch
    if steps_per_epoch == 0:
        raise PlanError(
            f"an epoch has {setting.num_images} images, less than one global batch of "
            f"{global_batch}: lower batch_size, gradient_acc or --world-size"
        )
    total = cfg.num_epoch * steps_per_epoch
    ranks_here = min(world_size, setting.links.ranks_per_host) if kind == "cpu" else 1
    room = machine.memory_gib / ranks_here - PROCESS_GIB[kind]
    total = total if cfg.max_steps is None else min(total, cfg.max_steps)
    frozen = time.head + time.backbone * forward_share(needs.backbone, machine)
    return Plan(
        needs, time, int(room * 2**30), global_batch / time.total, steps_per_epoch,
        total, min(total, cfg.freeze_epoch * steps_per_epoch), frozen,
    )  # fmt: skip


def device_type(machine: Machine) -> str:
    """Of PyTorch: "cpu" or "cuda"."""
    return "cpu" if machine.name == "cpu" else "cuda"


def policy(cfg: Config, machine: Machine) -> Precision:
    """The precision `cfg` has on that machine, which need not be here.

    Raises:
        PlanError: the machine does not have it.
    """
    if device_type(machine) == "cpu":
        return choose_precision(cfg.precision, cfg.fp16, torch.device("cpu"))[0]
    wanted = cfg.precision or ("fp16" if cfg.fp16 else None)
    if wanted in ("bf16", "tf32") and not machine.has_bf16:  # both came with the same GPUs
        raise PlanError(f"precision={wanted}: a {machine.name} has none; precision=fp16 or fp32")
    return named_policy(wanted, machine.has_bf16)


def changes(cfg: Config, world_size: int) -> list[tuple[str, Config, int]]:
    """What may be changed to need less: (words, the config so, the world size so)."""

    def with_(**values: Any) -> tuple[str, Config, int]:
        words = " ".join(f"{key}={value}" for key, value in values.items())
        return words, dataclasses.replace(cfg, **values), world_size

    found = []
    if has_layer(cfg):
        if cfg.parallel_dim != 1:
            found.append(with_(parallel_dim=1))
    elif cfg.head_update == "autograd":
        found.append(with_(head_update="fused"))
        if cfg.sample_rate > 0.1:
            found.append(with_(sample_rate=0.1))
    else:
        if cfg.head_weight_dtype == "fp32":
            found.append(with_(head_weight_dtype="bf16", head_state_dtype="bf16"))
        if cfg.head_device == "auto":
            found.append(with_(head_device="cpu", sample_rate=min(cfg.sample_rate, 0.1)))
        if isinstance(cfg.head_workspace_mib, str) or cfg.head_workspace_mib > 64:
            found.append(with_(head_workspace_mib=64))
    if not cfg.gradient_checkpointing:
        found.append(with_(gradient_checkpointing=True))
    if cfg.global_batch_size is not None:
        found.append(with_(batch_size=max(1, cfg.batch_size // 2)))
    elif cfg.batch_size % 2 == 0 and cfg.batch_size > 2:
        found.append(
            with_(batch_size=cfg.batch_size // 2, gradient_acc=2 * cfg.gradient_acc)
        )
    found.append((f"--world-size {2 * world_size}", cfg, 2 * world_size))
    return found


def what_would_fit(cfg: Config, setting: Setting) -> list[tuple[str, Plan]]:
    """Each change that saves a percent or more, planned anew, the most saving one first; then, if
    none is enough, as many of them together as are needed."""
    setting = dataclasses.replace(setting, measured_seconds=0.0)
    now = make_plan(cfg, setting).needs.footprint.total
    found = []
    for words, changed, ranks in changes(cfg, setting.world_size):
        try:
            plan = make_plan(changed, dataclasses.replace(setting, world_size=ranks))
        except (PlanError, SetupError):  # not possible here: an epoch too short, for example
            continue
        if plan.needs.footprint.total < 0.99 * now:
            found.append((words, plan))
    found.sort(key=lambda one: one[1].needs.footprint.total)
    if any(plan.fits for _, plan in found):
        return found
    together, changed = [], cfg
    for words in [words for words, _ in found if not words.startswith("--")]:
        # One change may have made another pointless, or no longer possible.
        still = {own: config for own, config, _ in changes(changed, setting.world_size)}
        if words not in still:
            continue
        together.append(words)
        changed = still[words]
        plan = make_plan(changed, setting)
        if plan.fits:
            break
    if len(together) > 1:
        found.append((" ".join(together), plan))
    return found


def sizes(cfg: Config) -> tuple[int, int]:
    """Classes and images of the run; "auto" is looked up in the set. Raises DataError."""
    classes, images = cfg.num_classes, cfg.num_image
    if classes == "auto" or images == "auto":
        loader = make_loader(cfg, World(0, 0, 1, torch.device("cpu")))
        classes = loader.num_classes if classes == "auto" else classes
        images = loader.num_images if images == "auto" else images
    return int(classes), int(images)


def choose_machine(name: str | None) -> Machine:
    """The machine of that name; without one, what is here.

    Raises:
        PlanError: an unknown name, or a GPU here that is not in the table.
    """
    if name is None and torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0)
        known = here.name.lower().replace(" ", "")
        of_table = next((key for key in GPUS if key in known), None)
        if of_table is None:
            raise PlanError(f"{here.name}: not in the table; pass --gpu {'|'.join(GPUS)}")
        # Some have the same name with other sizes.
        return dataclasses.replace(GPUS[of_table], memory_gib=here.total_memory / 2**30)
    if name is None or name == "cpu":
        return this_cpu()
    if name not in GPUS:
        raise PlanError(f"--gpu {name}: known are {', '.join(GPUS)} and cpu")
    return GPUS[name]


def describe(cfg: Config, setting: Setting, plan: Plan) -> dict[str, Any]:
    """Everything, as JSON knows values."""
    with torch.device("meta"):
        network = get_model(
            cfg.network, num_features=cfg.embedding_size, input_size=cfg.input_size
        )
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
        "assumed": None if setting.measured_seconds else SHARE_OF_PEAK[
            device_type(setting.machine)
        ],
    }  # fmt: skip


def describe_head(needs: Needs, machine: Machine) -> dict[str, Any] | None:
    """Kernel launches and gigabytes of a step of the fused head, all its passes; None for others.
    On a GPU also the seconds that the host takes to start them, and the device to run them."""
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
    """`describe` as text."""
    memory, time, machine = facts["memory"], facts["time"], facts["machine"]
    macs = facts["macs_per_image"] / 1e9
    rows = [["memory per rank", "MiB"]]
    rows += [
        [f"  {words}", f"{memory[part] / 2**20:,.0f}"] for part, words in PART_WORDS.items()
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
        [f"  {words}", f"{1e3 * time[part]:,.1f}"] for part, words in names.items()
        if time[part] or part not in ("optimizer", "teacher")
    ]  # fmt: skip
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
        "measured here, without decoding of images" if assumed is None else
        "from the peaks; assumed: " + ", ".join(f"{v:.0%} of {k}" for k, v in assumed.items())
    )  # fmt: skip
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
        lines.append(table([heading, *(
            [words, f"{plan.needs.footprint.total / 2**20:,.0f}",
             "fits" if plan.fits else "does not fit", f"{plan.samples_per_second:,.0f}"]
            for words, plan in proposals
        )]))  # fmt: skip
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="plan.py", description="Will this config fit, and how long will it take?"
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("words", nargs="*", metavar="key=value", help="as train_v2.py takes them")
    parser.add_argument("--world-size", type=int, default=1, help="ranks (default 1)")
    parser.add_argument("--gpu", help=f"{', '.join(GPUS)} or cpu (default: what is here)")
    parser.add_argument("--ranks-per-host", type=int, default=8, help="default 8")
    parser.add_argument("--network-gbit", type=float, default=100.0,
                        help="network of a host, Gbit/s (default 100)")  # fmt: skip
    parser.add_argument("--measure", type=float, nargs="?", const=60.0, default=0.0,
                        metavar="SECONDS", help="time a step here, for about a minute")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_intermixed_args(arguments)
    return run_command(lambda: _plan(options))


def _plan(options: argparse.Namespace) -> int:
    for name in ("world_size", "ranks_per_host", "network_gbit"):
        if getattr(options, name) <= 0:
            raise PlanError(f"--{name.replace('_', '-')} {getattr(options, name)}: above 0")
    if options.measure < 0:
        raise PlanError(f"--measure {options.measure}: seconds, above 0")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if options.measure and options.gpu is not None and (options.gpu == "cpu") != (here == "cpu"):
        raise PlanError(f"--measure --gpu {options.gpu}: this machine is a {here}; leave --gpu out")
    cfg = load_config(options.config, options.words)
    num_classes, num_images = sizes(cfg)
    setting = Setting(
        choose_machine(options.gpu), options.world_size,
        Links(options.ranks_per_host, options.network_gbit), num_classes, num_images,
        options.measure,
    )  # fmt: skip
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
