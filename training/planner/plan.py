"""A plan: memory and time of one configuration on one kind of machine, and ways to save memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from configs.base import Config
from training.build_data import make_loader
from training.build_head import has_layer, make_margin, needs_full_batch
from training.planner.measure import time_step
from training.planner.memory import Requirements, estimate_requirements
from training.planner.roofline import (
    GPUS,
    Links,
    Machine,
    StepTime,
    collective_seconds,
    estimate,
    forward_share,
    this_cpu,
)
from training.precision import Precision, choose_precision, named_policy
from training.setup import share_global_batch
from utils.distributed import DistContext
from utils.errors import UserError

# What a process holds beside its tensors: Python, libraries, the context of CUDA.
PROCESS_GIB = {"cpu": 0.3, "cuda": 0.8}


@dataclass(frozen=True)
class Plan:
    """One configuration on one kind of machine. Sizes are in bytes on rank 0, times in seconds.

    Attributes:
        needs: Memory and work of rank 0.
        time: Time of one optimizer step.
        room: Memory that a rank may use.
        samples_per_second: Images per second over all ranks.
        steps_per_epoch: Optimizer steps per epoch.
        total_steps: Optimizer steps of the run.
        frozen_steps: Those of `total_steps` in which the backbone is frozen.
        frozen_seconds: Time of one such step.
    """

    needs: Requirements
    time: StepTime
    room: int
    samples_per_second: float
    steps_per_epoch: int
    total_steps: int
    frozen_steps: int
    frozen_seconds: float

    @property
    def fits(self) -> bool:
        """Whether rank 0's memory is enough."""
        return self.needs.footprint.total <= self.room

    @property
    def hours(self) -> float:
        """Hours of the whole run."""
        moving = self.total_steps - self.frozen_steps
        return (moving * self.time.total + self.frozen_steps * self.frozen_seconds) / 3600


@dataclass(frozen=True)
class Setting:
    """What a plan depends on beside the config.

    Attributes:
        machine: The device and its links.
        world_size: Number of ranks.
        links: How ranks are connected.
        num_classes: Number of classes.
        num_images: Number of images.
        measured_seconds: Seconds to spend on measuring; with 0 times come from the peaks.
    """

    machine: Machine
    world_size: int
    links: Links
    num_classes: int
    num_images: int
    measured_seconds: float = 0.0


def make_plan(cfg: Config, setting: Setting) -> Plan:
    """Estimate memory and time of `cfg` as it would run.

    Raises:
        UserError: The machine lacks the precision, an epoch has less than one global batch, or
            the parts of the run cannot be built.
    """
    cfg = share_global_batch(cfg, setting.world_size)
    machine, world_size = setting.machine, setting.world_size
    kind = device_type(machine)
    precision = policy(cfg, machine)
    if precision.tf32:
        machine = dataclasses.replace(machine, single=machine.tf32)
    memory_bytes = int(machine.memory_gib * 2**30)
    needs = estimate_requirements(
        cfg, world_size, setting.num_classes, precision, kind, memory_bytes
    )
    embeds_twice = needs_full_batch(cfg, make_margin(cfg))
    if setting.measured_seconds:
        rest, head, teacher = time_step(
            cfg, world_size, setting.num_classes, torch.device(kind), setting.measured_seconds
        )
        passes = 1 if embeds_twice else cfg.gradient_acc
        collectives = collective_seconds(needs, machine, setting.links, world_size, rest, passes)
        time = StepTime(rest, head, teacher, 0.0, collectives)
    else:
        time = estimate(needs, machine, setting.links, world_size, cfg.gradient_acc, embeds_twice)
    global_batch = cfg.batch_size * world_size * cfg.gradient_acc
    steps_per_epoch = setting.num_images // global_batch
    if steps_per_epoch == 0:
        raise UserError(
            f"an epoch has {setting.num_images} images, less than one global batch of "
            f"{global_batch}: lower batch_size, gradient_acc or --world-size"
        )
    total = cfg.num_epoch * steps_per_epoch
    ranks_here = min(world_size, setting.links.ranks_per_host) if kind == "cpu" else 1
    room = machine.memory_gib / ranks_here - PROCESS_GIB[kind]
    total = total if cfg.max_steps is None else min(total, cfg.max_steps)
    frozen = time.head + time.backbone * forward_share(needs.backbone, machine)
    return Plan(
        needs,
        time,
        int(room * 2**30),
        global_batch / time.total,
        steps_per_epoch,
        total,
        min(total, cfg.freeze_epoch * steps_per_epoch),
        frozen,
    )


def device_type(machine: Machine) -> str:
    """Return the device type of PyTorch, "cpu" or "cuda"."""
    return "cpu" if machine.name == "cpu" else "cuda"


def policy(cfg: Config, machine: Machine) -> Precision:
    """Return the precision of `cfg` on that machine, which may be another one than this.

    Raises:
        UserError: The machine does not have it.
    """
    if device_type(machine) == "cpu":
        return choose_precision(cfg.precision, cfg.fp16, torch.device("cpu"))[0]
    wanted = cfg.precision or ("fp16" if cfg.fp16 else None)
    if wanted in ("bf16", "tf32") and not machine.has_bf16:  # both came with the same GPUs
        raise UserError(f"precision={wanted}: a {machine.name} has none; precision=fp16 or fp32")
    return named_policy(wanted, machine.has_bf16)


def changes(cfg: Config, world_size: int) -> list[tuple[str, Config, int]]:
    """List what may be changed to need less memory: (words, changed config, world size)."""

    def with_(**values: Any) -> tuple[str, Config, int]:
        words = " ".join(f"{key}={value}" for key, value in values.items())
        return words, cfg.replace(**values), world_size

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
        if not cfg.head_offload:
            found.append(with_(head_offload=True, sample_rate=min(cfg.sample_rate, 0.1)))
        if isinstance(cfg.head_workspace_mib, str) or cfg.head_workspace_mib > 64:
            found.append(with_(head_workspace_mib=64))
    if not cfg.gradient_checkpointing:
        found.append(with_(gradient_checkpointing=True))
    if cfg.global_batch_size is not None:
        found.append(with_(batch_size=max(1, cfg.batch_size // 2)))
    elif cfg.batch_size % 2 == 0 and cfg.batch_size > 2:
        found.append(with_(batch_size=cfg.batch_size // 2, gradient_acc=2 * cfg.gradient_acc))
    found.append((f"--world-size {2 * world_size}", cfg, 2 * world_size))
    return found


def what_would_fit(cfg: Config, setting: Setting) -> list[tuple[str, Plan]]:
    """Plan each change that saves a percent or more, the largest saving first.

    If none is enough, the last entry combines as many of them as are needed.
    """
    setting = dataclasses.replace(setting, measured_seconds=0.0)
    now = make_plan(cfg, setting).needs.footprint.total
    found = []
    for words, changed, ranks in changes(cfg, setting.world_size):
        try:
            plan = make_plan(changed, dataclasses.replace(setting, world_size=ranks))
        except UserError:  # not possible here: an epoch too short, for example
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
    """Return classes and images of the run; "auto" takes those of the set.

    Raises:
        DataError: The set is missing or damaged.
    """
    classes, images = cfg.num_classes, cfg.num_image
    if classes == "auto" or images == "auto":
        loader = make_loader(cfg, DistContext(0, 0, 1, torch.device("cpu")))
        classes = loader.num_classes if classes == "auto" else classes
        images = loader.num_images if images == "auto" else images
    return int(classes), int(images)


def choose_machine(name: str | None) -> Machine:
    """Return the machine of that name, or this machine for None.

    Raises:
        UserError: The name is unknown, or the GPU of this machine is not in the table.
    """
    if name is None and torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0)
        known = here.name.lower().replace(" ", "")
        of_table = next((key for key in GPUS if key in known), None)
        if of_table is None:
            raise UserError(f"{here.name}: not in the table; pass --gpu {'|'.join(GPUS)}")
        # Some GPUs have the same name but another size of memory.
        return dataclasses.replace(GPUS[of_table], memory_gib=here.total_memory / 2**30)
    if name is None or name == "cpu":
        return this_cpu()
    if name not in GPUS:
        raise UserError(f"--gpu {name}: known are {', '.join(GPUS)} and cpu")
    return GPUS[name]
