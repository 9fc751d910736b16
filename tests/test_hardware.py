"""What a device could do is looked up by its name, and unknown where it is unknown."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unimrg.hardware import device_name, peak_flops, peak_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NAMES = {
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
    "NVIDIA A10": None,
    "Tesla T4": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(GPU) == NAMES[name]
    assert peak_flops(GPU, tflops=1.5) == 1.5e12


def test_a_cpu_has_the_peak_that_it_is_given() -> None:
    assert peak_flops(CPU) is None
    assert peak_flops(CPU, tflops=0.1) == 1e11


def test_results_are_stored_with_the_device_s_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert device_name("cuda") == "NVIDIA H100 80GB HBM3"
    assert device_name("meta") == "meta" and device_name()


def test_memory_of_the_process() -> None:
    before = peak_memory(CPU)
    block = np.ones(before // 8 + 2**23)  # as much again, and 64 MiB
    assert peak_memory(CPU) >= block.nbytes > before > 2**26
