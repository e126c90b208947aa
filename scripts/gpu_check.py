"""`make gpu-check`: checks what a GPU must get right; exits with 0 if there is none, and says so.

    1. the head on the GPU equals the head on the CPU, for every loss: loss, gradient, centers; its
       Triton kernels equal PyTorch's, and two runs of them are the same to the bit;
    2. batches arrive on the GPU as they left the host;
    3. a step never waits for the device (CUDA's sync debug mode raises);
    4. fp32, tf32, bf16 and fp16 runs of train_v2.py end with a finite, falling loss;
    5. the compiled step never waits either, if Triton can build what it needs.

Every check has a time limit and runs in a child process, which is replaced after an error that may
be CUDA's: an error or a hang does not stop the others. The exit code is 1 if a check failed.
--rehearse runs the code of the checks on a CPU, which proves nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from arcshard.head.kernels import LEAST_CAPABILITY, KernelMode
from arcshard.losses import (
    AdaFace,
    ArcFace,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    Margin,
    NormFace,
    Softmax,
)
from utils.environment import describe_environment, missing_packages, triton_problem
from utils.files import atomic_write
from utils.worker import Worker

# A module that needs more packages than PyTorch is imported by the check that needs it.

REPOSITORY = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, Any] = {
    "rec": "synthetic",
    "num_classes": 5000,
    "num_image": 6400,
    "network": "r_nano",
    "embedding_size": 64,
    "batch_size": 64,
    "num_epoch": 1,
    "lr": 0.05,
    "verbose": 0,
    "frequent": 10,
    "warmup_epoch": 0.2,
}
REHEARSAL_SETTINGS: dict[str, Any] = {
    "num_classes": 20,
    "num_image": 160,
    "batch_size": 8,
    "frequent": 4,
    "input_size": 32,
}
LOSSES: dict[str, tuple[Margin, int]] = {
    "ArcFace": (ArcFace(), 1),
    "NormFace": (NormFace(96.0), 1),
    "Softmax with bias": (Softmax(bias=True), 1),
    "AdaFace": (AdaFace(), 1),
    "MagFace": (MagFace(), 1),
    "CurricularFace": (CurricularFace(), 1),
    "ElasticFace+": (ElasticFace(plus=True), 1),
    "ArcFace, 3 centers per class": (ArcFace(), 3),
    "CosFace, inter-class filtering": (CosFace(interclass_filtering_threshold=0.1), 1),
}
HEAD_OPTIONS: tuple[dict[str, Any], ...] = (
    {"update": "autograd"},
    {"sample_rate": 0.1},
    {"sample_rate": 0.1, "center_device": "cpu"},
)
# What the Triton kernels are compared in: batch, and arguments of PartialFC and of its optimizer.
KERNEL_OPTIONS: tuple[dict[str, Any], ...] = (
    {"batch": 1000, "rule": "sgd"},
    {"batch": 1000, "rule": "sgd", "size": 24, "num_classes": 40_001, "workspace_mib": 1024},
    {"batch": 33, "rule": "sgd", "size": 100, "deferred": True},
    {"batch": 48, "rule": "adamw", "deferred": True},
    {"batch": 48, "rule": "sgd", "dtype": "bfloat16"},
    {"batch": 48, "rule": "adamw", "dtype": "bfloat16", "sample_rate": 0.3},
    {"batch": 48, "rule": "sgd", "sample_rate": 0.3, "center_device": "cpu"},
    {"batch": 48, "rule": "sgd", "centers_per_class": 3},
    {"batch": 1, "rule": "sgd", "num_classes": 1},
)
STEPS: tuple[dict[str, Any], ...] = (
    {"sample_rate": 1.0, "gradient_acc": 1},
    {"sample_rate": 1.0, "gradient_acc": 2},
    {"sample_rate": 0.1, "gradient_acc": 1},
    {"sample_rate": 0.1, "gradient_acc": 2},
    {"precision": "fp16", "freeze_batch_norm": True},
    {"loss": "adaface"},
    {"loss": "curricularface"},
    {"loss": "elasticface_arc"},
    {"loss": "magface"},
    {"loss": "softmax"},
    {"loss": "adaface", "gradient_acc": 2},
    {"optimizer": "adamw", "precision": "bf16"},
    {"ema_decay": 0.99, "layer_decay": 0.8, "decay_norms_and_biases": False},
    {"channels_last": False, "precision": "tf32"},
)
LINES_OF_AN_ERROR = 15
TRAINER_NEEDS = ("cv2", "onnxruntime", "simplejpeg", "tqdm")


class Check(NamedTuple):
    """A check by its name.

    Attributes:
        name: Name of the check.
        function: Raises an exception if the check fails; must be picklable.
        seconds: Time limit, which includes the start of a new process.
        left_out: Why it is not to be run, or "".
        expected: Seconds that it takes on a GPU, about (assumed).
    """

    name: str
    function: Callable[[], None]
    seconds: float = 120
    left_out: str = ""
    expected: float = 1.0


class Row(NamedTuple):
    """Result of a check.

    Attributes:
        name: Name of the check.
        result: "passed", "FAILED", or why it was not run.
        seconds: Time that it took.
        error: The last lines of what it raised, or "".
    """

    name: str
    result: str
    seconds: float
    error: str


def head_equals_cpu(
    where: str,
    margin: Margin,
    tolerance: float,
    half: torch.dtype | None = None,
    sgd: bool = False,
    **options: Any,
) -> None:
    """Compares loss, gradient and class centers after 3 steps of one head on both devices.

    With `half` the centers should move by SGD. AdamW's first steps have one size whatever the
    gradient's, so roundings of small gradients would be a tenth of the centers.

    Args:
        where: Device to compare with the CPU.
        margin: The loss.
        tolerance: Largest relative difference.
        half: Dtype of the device's products. The CPU, which would round their sums too, works in
            fp32.
        sgd: Whether the centers move by SGD instead of AdamW.
        **options: Further arguments of PartialFC.
    """
    from arcshard.head.row_optimizer import AdamWRows, SGDRows
    from arcshard.partial_fc import PartialFC

    results = []
    for device, half_there in (("cpu", None), (where, half)):
        head = PartialFC(
            margin,
            64,
            5001,
            row_optimizer=SGDRows() if sgd else AdamWRows(),
            device=device,
            workspace_mib=4,
            half=half_there,
            **options,
        )
        seen = []
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            embeddings = torch.randn(32, 64, generator=generator).to(device).requires_grad_(True)
            labels = torch.randint(5001, (32,), generator=generator).to(device)
            loss = head(embeddings, labels, 0.01 if step else None)
            loss.backward()
            head.step(0.01)
            assert embeddings.grad is not None
            seen += [loss.detach().cpu(), embeddings.grad.cpu()]
        results.append([*seen, head.weight.detach().cpu()])
    for cpu, gpu in zip(*results, strict=True):
        error = float((cpu - gpu).norm() / cpu.norm())
        assert error < tolerance, f"{margin}, {half}, {options}: GPU and CPU differ by {error:.2e}"


def kernels_equal_torch(
    where: str,
    batch: int,
    rule: str,
    size: int = 512,
    num_classes: int = 5001,
    dtype: str = "float32",
    deferred: bool = False,
    **options: Any,
) -> None:
    """Compares a head with Triton kernels with one without, and with itself.

    Args:
        where: Device.
        batch: B.
        rule: "sgd" or "adamw", whose eps is so large that its steps follow the gradient's size.
        size: D.
        num_classes: C.
        dtype: Dtype of the centers and of their state.
        deferred: Whether the centers are updated in `step`, under a veto in the first one.
        **options: Further arguments of PartialFC.
    """
    from arcshard.head.row_optimizer import AdamWRows, SGDRows
    from arcshard.partial_fc import PartialFC

    if where == "cpu":  # it has no kernels: only this check itself is run
        num_classes = min(num_classes, 501)

    def run(kernels: KernelMode) -> list[torch.Tensor]:
        torch.manual_seed(0)
        state = torch.bfloat16 if dtype == "bfloat16" else None
        head = PartialFC(
            ArcFace(),
            size,
            num_classes,
            row_optimizer=AdamWRows(eps=1e-3, state_dtype=state)
            if rule == "adamw"
            else SGDRows(state_dtype=state),
            device=where,
            batch_size_per_rank=batch,
            half=torch.bfloat16,
            dtype=getattr(torch, dtype),
            kernels=kernels,
            **{"workspace_mib": 8, **options},
        )
        assert head.has_kernels == (kernels == "triton" and where != "cpu"), head.describe_kernels()
        seen = []
        for number in range(3):
            embeddings = torch.randn(batch, size).to(where).requires_grad_(True)
            labels = torch.randint(num_classes, (batch,)).to(where)
            labels[0] = num_classes - 1
            loss = head(embeddings, labels, None if deferred else 0.1)
            loss.backward()
            head.step(0.1, torch.tensor(deferred and number == 0, device=where))
            assert embeddings.grad is not None
            seen += [loss.detach(), embeddings.grad]
        assert head.row_optimizer is not None
        seen += [head.weight.detach(), *head.row_optimizer.state(head.weight).values()]
        return [part.double().cpu() for part in seen]

    ours, again, theirs = run("triton"), run("triton"), run("torch")
    for one, two, three in zip(ours, again, theirs, strict=True):
        assert torch.equal(one, two), "two runs of the kernels differ"
        error = float((one - three).norm() / three.norm().clamp_min(1e-9))
        assert error < 1e-2, f"the kernels differ by {error:.2e} from PyTorch's"


def batches_arrive_whole(where: str) -> None:
    """Checks that batches copied one ahead to a busy GPU are those of the host."""
    from dataset import get_dataloader

    device = torch.device(where)
    on_gpu = device.type == "cuda"
    options: dict[str, Any] = {"num_classes": 10, "num_images": 512, "input_size": 112}
    host = get_dataloader("synthetic", 16, **options)
    there = get_dataloader("synthetic", 16, pin_memory=on_gpu, device=device, **options)
    size = 4096 if on_gpu else 64
    busy = torch.randn(size, size, device=device)
    for expected, batch in zip(host, there, strict=True):
        busy = (busy @ busy).clamp(-1, 1)
        assert batch.images.device == device
        assert torch.equal(batch.images.cpu(), expected.images)
        assert torch.equal(batch.labels.cpu(), expected.labels)


def step_does_not_wait(where: str, **changes: Any) -> None:
    """Runs a step under CUDA's sync debug mode, on the loader's own batches, after a warm-up."""
    from configs.base import Config
    from training.build import build
    from utils.distributed import DistContext

    with tempfile.TemporaryDirectory() as folder:
        cfg = Config(**{**_settings(where), "output": folder, **changes})
        parts = build(cfg, DistContext(0, 0, 1, torch.device(where)))
    batches = iter(parts.loader)
    parts.step.model.train()
    for number in range(4):
        group = list(islice(batches, cfg.gradient_acc))
        is_watched = number == 3 and where != "cpu"
        if is_watched:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            parts.step(group, 0.01)
        finally:
            if is_watched:
                torch.cuda.set_sync_debug_mode("default")


def step_with_teacher_does_not_wait(where: str) -> None:
    """Runs `step_does_not_wait` with a teacher, whose weights are random."""
    from backbones import get_model
    from backbones.weights import ModelMetadata, save_model

    settings = _settings(where)
    options = {
        "num_features": settings["embedding_size"],
        "input_size": settings.get("input_size", 112),
    }
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / "teacher.pt"
        save_model(teacher, get_model("r18", **options), ModelMetadata("r18", **options))
        step_does_not_wait(where, teacher=teacher)


def run_trains(where: str, precision: str) -> None:
    """Runs train_v2.py as a process and checks that the loss falls."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "gpu_check.py"
        config.write_text(f"config = {_settings(where)!r}\n")
        device = torch.device(where).type
        words = [f"output={folder}/run", f"precision={precision}", f"device={device}"]
        run = subprocess.run(
            [sys.executable, "train_v2.py", str(config), *words],
            cwd=REPOSITORY,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            errors="replace",
        )
        if run.returncode:
            raise RuntimeError(f"train_v2.py ended with {run.returncode}:\n{run.stdout[-2000:]}")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0], f"{precision}: loss went from {losses[0]} to {losses[-1]}"


def quick_checks(where: str) -> list[Check]:
    """Returns checks of small heads."""
    equal = partial(head_equals_cpu, where, sgd=True)
    tolerance = 5e-2 if where == "cpu" else 1e-2  # a CPU rounds the sums of bf16 products too
    checks = [
        Check("head: ArcFace, SGD, fp32", partial(equal, ArcFace(), 1e-3)),
        Check("head: CosFace, SGD, bf16", partial(equal, CosFace(), tolerance, torch.bfloat16)),
    ]
    return [*checks, *_kernel_checks(where, KERNEL_OPTIONS[:1])]


def _kernel_checks(where: str, options: Sequence[dict[str, Any]]) -> list[Check]:
    """Returns a check of the head's Triton kernels for each of the options."""
    left_out = _why_no_kernels(where)
    return [
        Check(
            f"kernels: {_words(one)}", partial(kernels_equal_torch, where, **one), left_out=left_out
        )
        for one in options
    ]


def _why_no_kernels(where: str) -> str:
    """Says why a GPU cannot have the head's Triton kernels, or returns ""."""
    if torch.device(where).type != "cuda" or not torch.cuda.is_available():
        return ""
    if torch.cuda.get_device_capability(where) < LEAST_CAPABILITY:
        return "compute capability below 8.0"
    return triton_problem() or ""


def all_checks(where: str, compiler_is_missing: str = "") -> list[Check]:
    """Returns all checks, those that tell most in little time first.

    Args:
        where: Device to check.
        compiler_is_missing: Why the compiled step is left out, or "".
    """
    equal, does_not_wait = partial(head_equals_cpu, where), partial(step_does_not_wait, where)
    checks = quick_checks(where) + _kernel_checks(where, KERNEL_OPTIONS[1:])
    for name, (margin, centers) in LOSSES.items():
        function = partial(equal, margin, 1e-3, centers_per_class=centers)
        checks.append(Check(f"head: {name}", function))
    for options in HEAD_OPTIONS:
        function = partial(equal, ArcFace(), 1e-3, **options)
        checks.append(Check(f"head: {_words(options)}", function))
    of_trainer = [Check("batches arrive whole", partial(batches_arrive_whole, where))]
    for changes in STEPS:
        of_trainer.append(Check(f"step: {_words(changes)}", partial(does_not_wait, **changes)))
    of_trainer.append(Check("step: teacher", partial(step_with_teacher_does_not_wait, where)))
    for precision in ("fp32", "tf32", "bf16", "fp16") if where != "cpu" else ("fp32",):
        function = partial(run_trains, where, precision)
        of_trainer.append(Check(f"training run: {precision}", function, 240, expected=20))
    compiled = partial(does_not_wait, compile=True)
    of_trainer.append(Check("step: compile=True", compiled, 300, compiler_is_missing, 75))
    missing = missing_packages(*TRAINER_NEEDS)
    return [*checks, *(one._replace(left_out=missing or one.left_out) for one in of_trainer)]


def run_checks(
    checks: Sequence[Check], seconds: float | None = None, report: Path | None = None
) -> list[Row]:
    """Runs checks one after another, each in a child process.

    Args:
        checks: The checks.
        seconds: No check starts later than this or continues for longer; None means no limit.
        report: JSON file that has the rows so far after every check.
    """
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    rows: list[Row] = []
    with Worker() as worker:
        for check in checks:
            rows.append(_run_check(check, worker, deadline))
            print(f"{check.name}: {rows[-1].result}, {rows[-1].seconds:.1f} s", flush=True)
            if report is not None:
                _write(report, rows)
    return rows


def _write(report: Path, rows: Sequence[Row]) -> None:
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(report) as file:
            file.write(json.dumps([row._asdict() for row in rows], indent=1).encode())
    except OSError as error:  # the checks matter more than their file
        print(f"error: not written: {error}", file=sys.stderr, flush=True)


def _run_check(check: Check, worker: Worker, deadline: float) -> Row:
    begun = time.monotonic()
    result, error, is_spoiled = "passed", "", False
    if check.left_out:
        result = f"left out: {check.left_out}"
    elif begun >= deadline:
        result = "not started: no time left"
    else:
        try:
            worker.run(check.function, seconds=min(check.seconds, deadline - begun))
        except (Exception, SystemExit) as failure:
            result, error = "FAILED", last_lines(failure)
            is_spoiled = needs_new_process(failure)
    seconds = time.monotonic() - begun
    if is_spoiled:
        worker.close()
    return Row(check.name, result, round(seconds, 2), error)


def needs_new_process(failure: BaseException) -> bool:
    """Returns whether a failure may be CUDA's, after which every call of its process fails."""
    return not isinstance(failure, (AssertionError, ImportError, torch.OutOfMemoryError))


def table(rows: Sequence[Row]) -> str:
    """Formats all results, and below them what each failed check raised."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'check':{width}}  seconds  result"]
    lines += [f"{row.name:{width}}  {row.seconds:7.1f}  {row.result}" for row in rows]
    for row in rows:
        if row.error:
            lines += ["", f"{row.name}: {row.result}", row.error]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks; returns 0 if none fails or there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="two checks of the head only")
    add("--seconds", type=float, metavar="N", help="start no check after N seconds")
    add("--json", type=Path, metavar="FILE", help="the rows so far, rewritten after every check")
    add("--rehearse", action="store_true", help="run the code of the checks on a CPU")
    add("--rehearse-compile", action="store_true", help="with that of the compiled step")
    options = parser.parse_args(arguments)
    rehearses = options.rehearse or options.rehearse_compile
    if not rehearses and not torch.cuda.is_available():
        print("gpu-check: this PyTorch sees no GPU; nothing was checked")
        return 0

    title, where, missing = "gpu-check", "cuda:0", triton_problem() or ""
    if rehearses:
        title, where = "gpu-check, a rehearsal on a CPU", "cpu"
        missing = "" if options.rehearse_compile else "rehearsed with --rehearse-compile only"
    facts = describe_environment()
    print(f"{title}:", ", ".join(f"{name} {fact}" for name, fact in facts.items()), flush=True)
    checks = quick_checks(where) if options.quick else all_checks(where, missing)
    if rehearses:
        checks = [check._replace(name=f"rehearsal of {check.name}") for check in checks]
    rows = run_checks(checks, options.seconds, options.json)
    failed = sum(row.result == "FAILED" for row in rows)
    passed = sum(row.result == "passed" for row in rows)
    print(f"\n{table(rows)}\n")
    print(
        f"{title}: {passed} of {len(rows)} passed, {failed} FAILED, on "
        f"{where if rehearses else facts['gpu']}, torch {torch.__version__}"
    )
    return int(failed > 0)


def _settings(where: str) -> dict[str, Any]:
    return SETTINGS | (REHEARSAL_SETTINGS if where == "cpu" else {})


def _words(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def last_lines(failure: BaseException) -> str:
    """Returns the last lines of an error, or of the child's traceback if it has one."""
    text = str(failure.__cause__ or "".join(traceback.format_exception_only(failure)))
    lines = [line for line in text.strip('\n"').splitlines() if line.strip()]
    return "\n".join(lines[-LINES_OF_AN_ERROR:])


if __name__ == "__main__":
    sys.exit(main())
