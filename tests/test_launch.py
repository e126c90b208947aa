"""The launch scripts: what they call exists, signals and restarts arrive, Slurm jobs go on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from tests.helpers import catches, wait_until

LAUNCH = Path(__file__).resolve().parent.parent / "scripts" / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
RUNNABLE = [path for path in SCRIPTS if path.name != "common.sh"]


def run(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "NNODES"))}
    return subprocess.run(
        ["bash", str(LAUNCH / script), *words],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def executable(path: Path, text: str) -> str:
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def echo(tmp_path: Path) -> str:
    """An interpreter that says how it was called; its torchrun has the options of HELP."""
    return executable(
        tmp_path / "python",
        'if [[ "${!#}" == --help ]]; then echo "${HELP:-}"; exit; fi\n'
        'printf "%s\\n" "$@"\nenv | grep ^TORCH_\n',
    )


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_bash_and_uses_flags_torchrun_has(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    known = set(get_args_parser()._option_string_actions)
    text = "\n".join(
        line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")
    )
    calls = re.findall(
        r"torchrun_options=\((.*?)\)|torch\.distributed\.run (.*?)train_v2", text, re.S
    )
    flags = {flag for call in calls for part in call for flag in re.findall(r"--[a-z-]+", part)}
    assert flags or path.name == "slurm.sh"
    assert flags <= known


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.name)
def test_a_script_can_be_run_and_explains_itself(path):
    assert os.access(path, os.X_OK)
    result = run(path.name)
    assert result.returncode == 2
    assert "usage:" in result.stdout + result.stderr


@pytest.mark.parametrize("timeout", ["--shutdown-timeout", ""])  # torchrun of torch 2.11 has none
@pytest.mark.parametrize(
    ("script", "environment", "expected"),
    [
        ("run.sh", {}, ["--standalone", "--nproc-per-node=3", "--max-restarts=0"]),
        ("run.sh", {"MAX_RESTARTS": "4"}, ["--max-restarts=4"]),
        (
            "dist.sh",
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0"},
            ["--nnodes=2", "--node-rank=1", "--master-addr=host0", "--master-port=29500"],
        ),
        (
            "elastic.sh",
            {"NNODES": "2:4", "RDZV": "host0:29400", "RUN_ID": "seven"},
            [
                "--nnodes=2:4",
                "--rdzv-backend=c10d",
                "--rdzv-endpoint=host0:29400",
                "--rdzv-id=seven",
                "--max-restarts=10",
            ],
        ),
    ],
)
def test_a_script_calls_torchrun_so_that_signals_and_restarts_work(
    echo, script, environment, expected, timeout
):
    result = run(
        script,
        "configs/a",
        "b=1 2",
        PYTHON=echo,
        NPROC="3",
        HELP=f"  {timeout} SECONDS" if timeout else "",
        **environment,
    )
    words = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    assert [word for word in words if "timeout" in word] == ([f"{timeout}=60"] if timeout else [])
    for word in (
        *expected,
        "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
    ):
        assert word in words
    place = words.index(str(LAUNCH.parent.parent / "train_v2.py"))
    assert words[place + 1 : place + 3] == ["configs/a", "b=1 2"]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RDZV": "host0:29400"}, "NNODES is not set"),
        ({"NNODES": "2"}, "RDZV is not set"),
        ({"NNODES": "4:2", "RDZV": "h:1"}, "NNODES is '4:2'; MIN:MAX"),
        ({"NNODES": "two", "RDZV": "h:1"}, "NNODES is 'two'"),
        ({"NNODES": "2", "RDZV": "host0"}, "RDZV is 'host0'; HOST:PORT"),
    ],
)
def test_elastic_says_which_variable_is_wrong(environment, words):
    result = run("elastic.sh", "configs/a", PYTHON="false", NPROC="1", **environment)
    assert result.returncode == 2
    assert words in result.stderr


WORKER = """
import os, pathlib, signal, sys
import torch, torch.distributed as dist
rank, attempt = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"]
folder = pathlib.Path(sys.argv[1])
received, receive = os.pipe()
signal.signal(signal.SIGUSR1, lambda number, frame: os.write(receive, b"x"))
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
if attempt == "0":
    dist.barrier()  # nobody is still in the sum
    os._exit(5 if rank == 1 else 0)
(folder / f"sum{rank}").write_text(str(total.item()))
os.read(received, 1)
(folder / f"saved{rank}").touch()
sys.exit(4)
"""


def test_a_lost_rank_restarts_the_group_and_sigusr1_reaches_every_worker(tmp_path):
    """The real torchrun; train_v2.py stands in for the real one."""
    launch = tmp_path / "scripts" / "launch"
    shutil.copytree(LAUNCH, launch)
    (tmp_path / "train_v2.py").write_text(WORKER)
    environment = os.environ | {
        "PYTHON": sys.executable,
        "NPROC": "2",
        "MAX_RESTARTS": "1",
        "OMP_NUM_THREADS": "1",
    }
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            ["bash", str(launch / "run.sh"), str(tmp_path)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            sums = [tmp_path / f"sum{rank}" for rank in range(2)]
            wait_until(lambda: process.poll() is not None or all(path.exists() for path in sums))
            assert process.poll() is None, (tmp_path / "log").read_text()
            process.send_signal(signal.SIGUSR1)
            code = process.wait(30)
        finally:
            if process.poll() is None:
                process.kill()
    assert code == 1, "torchrun's, whatever its workers say"
    assert [path.read_text() for path in sums] == ["2.0", "2.0"]
    assert all((tmp_path / f"saved{rank}").exists() for rank in range(2))


def slurm_job(
    tmp_path: Path, srun: str, signal_to_send: int | None, show: str = ""
) -> tuple[int, str, str]:
    """slurm.sh among stand-ins of Slurm's commands: exit code, output, what they were called.

    `show` runs in `scontrol show`, before srun.
    """
    calls, ready = tmp_path / "calls", tmp_path / "ready"
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    executable(
        bin_folder / "scontrol",
        f'echo "scontrol $*" >> {calls}\n[[ $1 == show ]] && {{ {show} echo host7; }}\nexit 0\n',
    )
    executable(
        bin_folder / "srun",
        f'echo "srun $* NNODES=$NNODES RDZV=$RDZV RUN_ID=$RUN_ID" >> {calls}\n'
        f"{srun.replace('READY', f'touch {ready}')}\n",
    )
    process = subprocess.Popen(
        ["bash", str(LAUNCH / "slurm.sh"), "configs/a", "b=1"],
        env=os.environ
        | {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "host[7-8]",
            "SLURM_SUBMIT_DIR": str(LAUNCH.parent.parent),
            "SLURM_RESTART_COUNT": "3",
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        if signal_to_send is not None:
            wait_until(lambda: ready.exists() and catches(process.pid, signal_to_send), 20)
            process.send_signal(signal_to_send)
        output, _ = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
    return process.returncode, output, calls.read_text()


WAITS_AND_SAVES = "trap 'sleep 0.3; exit 1' USR1\nREADY\nfor _ in {1..200}; do sleep 0.1; done\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_slurm_job_that_is_stopped_saves_and_goes_back_into_the_queue(tmp_path, number):
    code, output, calls = slurm_job(tmp_path, WAITS_AND_SAVES, number)
    assert code == 0
    assert "goes back into the queue" in output
    assert calls.splitlines()[-1] == "scontrol requeue 12345"
    assert "elastic.sh configs/a resume=auto b=1 NNODES=2 RDZV=host7:32345 RUN_ID=12345-3" in calls


def test_a_signal_before_the_run_has_begun_sends_the_slurm_job_back_too(tmp_path):
    to_the_job = "kill -USR1 $(awk '{print $4}' /proc/$PPID/stat);"
    code, output, calls = slurm_job(tmp_path, WAITS_AND_SAVES, None, to_the_job)
    assert code == 0
    assert "goes back into the queue" in output
    assert calls.splitlines()[-1] == "scontrol requeue 12345"


@pytest.mark.parametrize("code", [0, 1])
def test_a_slurm_job_that_ends_by_itself_stays_ended(tmp_path, code):
    returned, _, calls = slurm_job(tmp_path, f"exit {code}\n", None)
    assert returned == code
    assert "requeue" not in calls


def test_a_slurm_job_that_is_done_in_spite_of_the_signal_stays_ended(tmp_path):
    saves = WAITS_AND_SAVES.replace("exit 1", "exit 0")
    returned, _, calls = slurm_job(tmp_path, saves, signal.SIGUSR1)
    assert returned == 0
    assert "requeue" not in calls
