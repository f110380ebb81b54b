"""Questions to the device: memory, precision, compiling. Run: python -m pytest tests/test_device.py"""

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from util.run import device as devices
from util.run.device import cpu_has_bf16, free_memory_bytes, precision_warning, use_compile

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

FAULTS = """
import resource, sys
import torch
from util.run.device import keep_freed_memory, pick_device

if sys.argv[1] == "kept":
    assert keep_freed_memory()
elif sys.argv[1] == "picked":
    pick_device("cpu")
else:
    pick_device("cpu", keep_memory=False)
torch.set_num_threads(1)
for _ in range(12):  # until there are enough free blocks, memory comes from the system in any case
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 24)  # 64 MB
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_freed_memory_is_kept_and_not_faulted_in_again(run_script):
    kept, picked, given_back = (int(run_script("-c", FAULTS, how).stdout) for how in ("kept", "picked", "given back"))
    assert kept < 20 and picked < 20
    assert given_back > 10 * 20  # 32 of 2 MB each time, where pages are huge


ARENAS = """
import ctypes, sys, threading
from util.run.device import pick_device

pick_device("cpu", keep_memory=sys.argv[1] == "kept")
everyone = threading.Barrier(12)

def take():
    block = bytes(100_000)
    everyone.wait()

threads = [threading.Thread(target=take) for _ in range(12)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has arenas")
def test_threads_of_a_server_share_two_arenas(run_script):
    kept, shared = (run_script("-c", ARENAS, how).stdout.count("<heap nr=") for how in ("kept", "shared"))
    assert kept > 4 and shared == 2


def test_compiling_is_a_function_of_the_run():
    assert use_compile("on", CPU, 1) and not use_compile("off", CUDA, 10**9)
    assert [use_compile("auto", CUDA, steps) for steps in (999, 1000)] == [False, True]
    assert not use_compile("auto", CPU, 10**9) and not use_compile("auto", MPS, 10**9)


@pytest.mark.parametrize(
    "machine, has",
    [("avx2 avx512f", False), ("avx512_bf16 fma", True), ("amx_tile amx_bf16", True), ("asimd bf16", True)],
)
def test_bf16_instructions_are_read_off_the_processor(monkeypatch, machine, has):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "read_text", lambda path: f"model name : x86 or Arm\nflags : {machine}\n")
    assert cpu_has_bf16() == has
    assert (precision_warning("bf16", CPU) is None) == has


@LINUX
def test_bf16_agrees_with_torch():
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if known is None or platform.machine() != "x86_64":
        pytest.skip("this torch cannot tell")
    if known():
        assert cpu_has_bf16()
    if not cpu_has_bf16():
        assert not known()


def test_bf16_on_a_mac(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    for text, code, has in (("1\n", 0, True), ("0\n", 0, False), ("", 1, False)):
        done = subprocess.CompletedProcess([], code, stdout=text)
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        assert cpu_has_bf16() == has


def test_only_an_emulated_precision_is_warned_of(monkeypatch):
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: False)
    assert "--precision bf16" in precision_warning("bf16", CPU)
    assert precision_warning("fp32", CPU) is None
    assert precision_warning("bf16", CUDA) is None and precision_warning("fp16", MPS) is None


@LINUX
def test_free_memory_is_within_the_machine():
    total = resource.getpagesize() * int(subprocess.check_output(["getconf", "_PHYS_PAGES"]))
    assert 0 < free_memory_bytes(CPU) < total


def test_free_memory_on_mps_is_what_metal_recommends(monkeypatch):
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 1000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 300)
    assert free_memory_bytes(MPS) == 700


def test_free_memory_of_a_card_counts_what_torch_holds_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert free_memory_bytes(CUDA) == 1200


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_limits_of_control_groups(tmp_path):
    """Version 2: the group of the process has none, the one above it has. What files are cached in gives way."""
    group = "sys/fs/cgroup/job"
    second = write(
        tmp_path / "v2",
        {
            "proc/self/cgroup": "0::/job/step",
            f"{group}/step/memory.max": "max",
            f"{group}/step/memory.current": "100",
            f"{group}/step/memory.stat": "inactive_file 10",
            f"{group}/memory.max": "5000",
            f"{group}/memory.current": "2000",
            f"{group}/memory.stat": "anon 7\ninactive_file 500",
        },
    )
    assert devices._control_group_rooms(second) == [3500]
    memory = "sys/fs/cgroup/memory"
    first = write(
        tmp_path / "v1",
        {
            "proc/self/cgroup": "5:cpu:/job\n4:memory:/job",
            f"{memory}/job/memory.limit_in_bytes": "4000",
            f"{memory}/job/memory.usage_in_bytes": "4500",
            f"{memory}/job/memory.stat": "inactive_file 1\ntotal_inactive_file 100",
            f"{memory}/memory.limit_in_bytes": "9223372036854771712",  # no limit
            f"{memory}/memory.usage_in_bytes": "1",
            f"{memory}/memory.stat": "total_inactive_file 0",
        },
    )
    assert devices._control_group_rooms(first) == [0]
    assert devices._control_group_rooms(tmp_path / "nowhere") == []
