"""On what a run was made: versions and machine, for whoever reads its results later."""

import os
import platform
import re
import resource
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")  # Linux's account of this process


def environment() -> dict[str, str]:
    """Versions of what decides the numbers, the device, and the time in UTC."""
    packages = {name: version(name) for name in ("lmdqn", "torch", "transformers", "peft", "sacrebleu")}
    cpu = f"{platform.machine()} CPU, {os.cpu_count()} cores, torch threads: {torch.get_num_threads()}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {
        "python": platform.python_version(),
        **packages,
        "device": device,
        "ended": f"{datetime.now(UTC):%F %H:%M} UTC",
    }


def peak_memory_mib() -> dict[str, float]:
    """The most memory that this process has held so far, in MiB: `resident`, and `gpu` where torch has used one."""
    peak = {"resident": round(_peak_resident_bytes() / 2**20, 1)}
    if torch.cuda.is_available() and (reserved := torch.cuda.max_memory_reserved()):
        peak["gpu"] = round(reserved / 2**20, 1)
    return peak


def _peak_resident_bytes() -> int:
    """`getrusage` would also count the process that started this one, so Linux's own account comes first."""
    if STATUS.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
