"""What a worker's device could do at best, and how much memory has been needed on it."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path

import torch

PEAKS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("A10G", 70.0),
    ("L40S", 362.0),
)
"""Dense bfloat16 TFLOP/s by a word in the GPU's name, from data sheets; the first word found counts."""


def peak_flops(device: torch.device, tflops: float = 0.0) -> float | None:
    """What a device could do at best, FLOP/s: `tflops` if given, else by its name; None where unknown.

    A part of a GPU (MIG) is unknown: its name says of which GPU it is a part.
    """
    if tflops:
        return tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return None if "MIG" in name else next((peak * 1e12 for word, peak in PEAKS if word in name), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: of torch's tensors on a GPU, of the whole process (resident) on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def device_name(device: str | torch.device = "cpu") -> str:
    """What results are stored with: the GPU's name, or the processor's; other devices by their own word."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor_name() if kind == "cpu" else kind


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
