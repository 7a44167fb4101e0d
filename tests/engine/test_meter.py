"""The meter reads what the kernel and torch count, stage by stage."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
import torch

from wanfit.engine.meter import Meter

MIB = 2**20
resets_peak = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel's mark cannot be reset here"
)


def test_each_stage_has_its_own_seconds_and_order() -> None:
    meter = Meter(torch.device("cpu"))
    meter.begin("text")
    meter.begin("denoise")
    time.sleep(0.05)
    meter.begin("decode")
    text, denoise, decode = meter.finish()
    assert [use.stage for use in (text, denoise, decode)] == ["text", "denoise", "decode"]
    assert 0.05 <= denoise.elapsed_s < 1
    assert text.elapsed_s < denoise.elapsed_s
    assert decode.elapsed_s < denoise.elapsed_s


@resets_peak
def test_the_host_peak_holds_what_was_allocated_and_let_go_within_the_stage() -> None:
    meter = Meter(torch.device("cpu"))
    meter.begin("text")
    meter.begin("denoise")
    np.ones(200 * MIB, dtype=np.uint8)  # freed at once
    text, denoise = meter.finish()
    grown = denoise.host_resident_bytes - text.host_resident_bytes
    assert 150 * MIB < grown < 260 * MIB


@resets_peak
def test_the_host_peak_is_reset_at_the_border() -> None:
    meter = Meter(torch.device("cpu"))
    meter.begin("text")
    np.ones(200 * MIB, dtype=np.uint8)
    meter.begin("denoise")
    text, denoise = meter.finish()
    assert text.host_resident_bytes - denoise.host_resident_bytes > 150 * MIB


def test_without_cuda_there_are_no_device_bytes() -> None:
    meter = Meter(torch.device("cpu"))
    meter.begin("decode")
    (use,) = meter.finish()
    assert use.device_allocated_bytes is None
    assert use.device_reserved_bytes is None


@pytest.mark.gpu
def test_device_peaks_are_those_of_the_stage() -> None:
    device = torch.device("cuda", 0)
    meter = Meter(device)
    meter.begin("text")
    torch.ones(256 * MIB, dtype=torch.uint8, device=device)  # freed at once
    meter.begin("denoise")
    torch.ones(16 * MIB, dtype=torch.uint8, device=device)
    text, denoise = meter.finish()
    assert text.device_allocated_bytes is not None
    assert denoise.device_allocated_bytes is not None
    assert text.device_reserved_bytes is not None
    assert text.device_allocated_bytes - denoise.device_allocated_bytes == 240 * MIB
    assert text.device_reserved_bytes >= text.device_allocated_bytes
