"""Peaks by the name a device gives itself, and memory used."""

import types

import jax
import numpy as np
import pytest

from sit_jax.parallel import hardware


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("TPU v6 lite", 918.0),
        ("TPU v5 lite", 197.0),
        ("TPU v5", 459.0),  # what a v5p calls itself
        ("TPU v3", 61.5),
        ("Radeon", None),
    ],
)
def test_peak_of_chips(kind, tflops):
    device = types.SimpleNamespace(device_kind=kind)
    assert hardware.peak_flops(device) == (tflops and tflops * 1e12)


@pytest.mark.parametrize("chip", [c for c in hardware.CHIPS.values() if c.clock])
def test_clocks_agree_with_peaks(chip):
    """A TPU's products in a cycle are a power of two."""
    operations = np.log2(chip.peak_flops / chip.clock)
    assert abs(operations - round(operations)) < 0.005
    assert chip.link_bandwidth


def test_peak_memory_grows_with_what_is_held():
    before = hardware.peak_memory()
    held = np.ones(before // 2, np.uint8)
    assert before > 2**20 and hardware.peak_memory() < 2**40  # bytes, not kilobytes
    assert hardware.peak_memory() >= before
    del held


def test_peak_memory_of_an_accelerator_is_its_own_count(monkeypatch):
    for stats, wanted in (({"peak_bytes_in_use": 5}, 5), (None, None)):
        chip = types.SimpleNamespace(platform="gpu", memory_stats=lambda s=stats: s)
        monkeypatch.setattr(jax, "local_devices", lambda c=chip: [c])
        assert hardware.peak_memory() == wanted
