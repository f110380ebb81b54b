"""The SLURM jobs, with stand-ins for srun and scontrol: their commands parse, and time running out requeues them.

Run: python -m pytest tests/test_slurm.py
"""

import importlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "scripts/slurm"
# what each job is given, and the script that it starts on the nodes
JOBS = {
    "pretrain": (["DATA", "RUN", "--batch_size", "64", "--accum_iter", "4"], "main_pretrain"),
    "transfer": (["DATA", "W", "RUNS", "--rank", "16"], "main_lora"),
    "benchmark": (["README.md", "OUT"], None),
}

SRUN = """#!/usr/bin/env bash
trap 'touch "$STUBS/saved"; exit 143' TERM
env >"$STUBS/env"
printf '%s\\n' "$@" >"$STUBS/part" && mv "$STUBS/part" "$STUBS/srun"
for _ in $(seq 600); do
    [ ! -e "$STUBS/finish" ] || exit "$(cat "$STUBS/finish")"
    sleep 0.05
done
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
show) printf 'node1\\nnode2\\n' ;;
*) echo "$*" >>"$STUBS/scontrol" ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """start(name): the job, running, its step begun."""
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": "#!/bin/sh\nexit 0\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SUBMIT_DIR": ROOT, "JOB_ID": 77, "JOB_NODELIST": "node[1-2]", "NNODES": 2, "GPUS_ON_NODE": 8}
    environment = {f"SLURM_{name}": str(value) for name, value in {**slurm, "CPUS_PER_TASK": 64}.items()}
    environment |= {
        "STUBS": str(tmp_path),
        "ANIMASK_USE_ACTIVE_ENV": "1",
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }
    jobs = []

    def run(name: str, **more: str) -> subprocess.Popen:
        command = ["bash", FOLDER / f"{name}.sbatch", *JOBS[name][0]]
        jobs.append(
            subprocess.Popen(command, env={**os.environ, **environment, **more}, stdout=subprocess.PIPE, text=True)
        )
        until = time.monotonic() + 60
        while not (tmp_path / "srun").exists() and time.monotonic() < until:
            time.sleep(0.02)
        return jobs[-1]

    yield run
    (tmp_path / "finish").write_text("1")
    for job in jobs:
        job.wait(60)


def parsed(lines: list[str]):
    """The flags of the Python script that a command starts, read by that script."""
    at = next(i for i, word in enumerate(lines) if word.endswith(".py"))
    return importlib.import_module(lines[at].removesuffix(".py")).get_args(lines[at + 1 :])


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_shell_reads_it(path):
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("name", JOBS)
def test_help_and_directives(name):
    path = FOLDER / f"{name}.sbatch"
    answer = subprocess.run(["bash", path, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"sbatch scripts/slurm/{name}.sbatch" in answer.stdout
    directives = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert "#SBATCH --requeue" in directives and any("--signal=B:USR1@" in line for line in directives)
    # in one place only
    assert not any(word in line for line in directives for word in ("account", "partition", "qos"))


def test_pretraining_meets_at_the_first_node(start, tmp_path):
    job = start("pretrain")
    lines = (tmp_path / "srun").read_text().splitlines()
    assert {"--nnodes=2", "--nproc_per_node=8", "--rdzv_backend=c10d", "--rdzv_endpoint=node1:20077"} <= set(lines)
    args = parsed(lines)
    assert (args.data_path, args.output_dir, args.resume) == ("DATA", "RUN", "auto")
    assert (args.batch_size, args.accum_iter) == (64, 4)
    assert "SRUN_CPUS_PER_TASK=64" in (tmp_path / "env").read_text().splitlines()
    (tmp_path / "finish").write_text("0")
    assert job.wait(60) == 0 and not (tmp_path / "scontrol").exists()


def test_transfer_takes_its_seed_from_the_array(start, tmp_path):
    job = start("transfer", SLURM_ARRAY_TASK_ID="2")
    args = parsed((tmp_path / "srun").read_text().splitlines())
    assert (args.seed, args.output_dir, args.init, args.rank) == (2, "RUNS/seed=2", "W", 16)
    (tmp_path / "finish").write_text("3")
    assert job.wait(60) == 3  # a failure is one, and is not tried again


def test_benchmark_uses_every_card(start, tmp_path):
    start("benchmark")
    assert (tmp_path / "srun").read_text().splitlines() == ["bash", "scripts/benchmark.sh", "README.md", "OUT"]
    assert "BENCH=--devices 0,1,2,3,4,5,6,7 " in (tmp_path / "env").read_text().splitlines()


@pytest.mark.parametrize("signum, back", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_stop_lets_the_step_save(start, tmp_path, signum, back):
    """Time running out brings the job back; scancel and preemption leave that to SLURM."""
    job = start("pretrain")
    job.send_signal(signum)
    assert job.wait(60) == (0 if back else 143)
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "scontrol").exists() == back
    if back:
        assert (tmp_path / "scontrol").read_text() == "requeue 77\n"
