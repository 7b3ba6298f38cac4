"""On what a run was made: versions and machine, for whoever reads its results later."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version

import torch


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
