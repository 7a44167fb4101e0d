"""The byte counter against cases whose bytes are known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.live_bytes import LiveBytes, allocated_bytes, to_meta

MIB = 1 << 20
MIB_FLOATS = MIB // 4
DEVICES = pytest.mark.parametrize("device", ["meta", "cpu"])


@DEVICES
def test_storages_count_while_someone_holds_them(device: str) -> None:
    with torch.inference_mode(), LiveBytes(device) as live:
        x = torch.empty(MIB_FLOATS, device=device)
        y = x + 1
        assert live.current_bytes == 2 * MIB
        view = y.view(2, -1)[1]
        del y
        assert live.current_bytes == 2 * MIB  # the view keeps all of it
        del view
        assert live.current_bytes == MIB
        x.add_(1).mul_(2)
        assert live.current_bytes == MIB
        del x
        assert live.current_bytes == 0
    assert live.peak_bytes == 2 * MIB


@DEVICES
def test_chained_temporaries_die_when_python_drops_them(device: str) -> None:
    """Of a chain of three, two are alive at a time; the first is alive while the second is made."""
    with torch.inference_mode(), LiveBytes(device) as live:
        x = torch.empty(MIB_FLOATS, device=device)
        live.mark()
        y = ((x + 1) * 2).relu()
        assert live.peak_since_mark_bytes == 3 * MIB
        assert live.current_bytes == 2 * MIB
        del x, y


@DEVICES
def test_composite_operators_are_taken_apart(device: str) -> None:
    """In inference mode too, where torch hands them over whole: normalize makes a norm inside."""
    x = torch.empty(1, 8, MIB_FLOATS // 8, device=device)
    with torch.inference_mode(), LiveBytes(device) as live:
        y = F.normalize(x, dim=1)
    # x was there before and does not count; the clamped norm and the result do.
    assert live.peak_bytes == MIB + MIB // 8
    assert live.current_bytes == MIB == y.numel() * 4


@DEVICES
def test_flattening_a_permuted_tensor_copies(device: str) -> None:
    x = torch.empty(512, 512, device=device)
    with torch.inference_mode(), LiveBytes(device) as live:
        assert x.flatten().shape == (512 * 512,)
        assert live.peak_bytes == 0
        x.t().flatten()
    assert live.peak_bytes == MIB


def test_sizes_are_rounded_up_as_by_the_allocator() -> None:
    assert [allocated_bytes(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    with torch.inference_mode(), LiveBytes("meta") as live:
        x = torch.empty(129, device="meta")
    assert live.current_bytes == 1024
    del x


def test_the_peak_says_what_was_alive() -> None:
    network = to_meta(nn.Linear(1024, 256, bias=False))
    x = torch.empty(256, 1024, device="meta")
    with torch.inference_mode(), LiveBytes("meta") as live:
        live.add(network, x)
        y = network(x)
        assert live.current_bytes == 2 * MIB + MIB // 4
        assert [one.shape for one in live.at_peak] == [(256, 1024), (256, 1024), (256, 256)]
        assert live.at_peak[2].op == "aten.mm.default"
        assert "0.002 GiB" in live.table()
        del y
    assert live.current_bytes == 2 * MIB


def test_what_kernels_are_known_to_hide() -> None:
    """A convolution's contiguous copy; the scores of attention that no fused kernel takes."""
    conv = to_meta(nn.Conv2d(4, 4, 1, bias=False))
    x = torch.empty(1, 256, 4, 256, device="meta")
    with torch.inference_mode(), LiveBytes("meta") as live:
        conv(x.transpose(1, 2))
    assert live.peak_bytes == 2 * MIB
    q = torch.empty(1, 1, 1024, 64, device="meta")
    strided = torch.empty(1, 1, 64, 1024, device="meta").transpose(2, 3)
    for operand, scores in ((q, 0), (strided, 2)):
        with torch.inference_mode(), LiveBytes("meta") as live:
            F.scaled_dot_product_attention(operand, operand, operand)
        assert live.peak_bytes == MIB // 4 + scores * 4 * MIB


def test_results_brought_to_the_host_leave_the_count() -> None:
    x = torch.empty(MIB_FLOATS, device="meta")
    with torch.inference_mode(), LiveBytes("meta") as live, LiveBytes("cpu") as host:
        y = (x + 1).cpu()
        z = torch.empty(MIB_FLOATS)
        z.copy_(x)
    assert live.peak_bytes == MIB
    assert live.current_bytes == 0
    assert host.peak_bytes == 2 * MIB
    del y


def test_training_counts_what_autograd_keeps() -> None:
    x = torch.empty(MIB_FLOATS, device="meta", requires_grad=True)
    with LiveBytes("meta") as live:
        y = (x * x).sigmoid()
        assert live.current_bytes == MIB  # x is saved for the product, the sigmoid's result too
        y.sum().backward()
    assert x.grad is not None
