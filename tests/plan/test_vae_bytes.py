"""The planned bytes of the VAE against those of the real code, traced on meta tensors."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import cpu_time
from tests.live_bytes import LiveBytes, to_meta
from wanfit.engine.decode import decode
from wanfit.engine.models.vae import Vae
from wanfit.plan.vae import (
    decode_bytes,
    encode_bytes,
    host_frames_bytes,
    num_tiles,
    tile_sizes,
    tile_spans,
    tiled_share,
)
from wanfit.specs import DEMO, VAE_21, VAE_22, VaeSpec

SPECS = {"2.1": VAE_21, "2.2": VAE_22, "demo": DEMO.vae}
MIB = 1 << 20


@cache
def built(name: str) -> Vae:
    return to_meta(Vae(SPECS[name]))


def network(name: str) -> Vae:
    """As it is loaded: the first use brings its weights into another order."""
    vae = built(name)
    for parameter in vae.parameters():
        parameter.data = torch.empty(parameter.shape, device="meta")
    return vae


@st.composite
def clips(draw: st.DrawFn) -> tuple[str, int, int, int, int | None]:
    """(VAE, width, height, frames, tile side), with at most 4 tiles, to be quick."""
    name = draw(st.sampled_from(list(SPECS)))
    stride = SPECS[name].stride_px
    width, height = draw(st.integers(2, 90)), draw(st.integers(2, 90))
    least = max(2, max(width, height) * 2 // 3)
    tile = draw(st.none() | st.integers(least, least + 10))
    frames = draw(st.sampled_from([1, 5, 9, 17]))
    return name, width * stride, height * stride, frames, tile and tile * stride


def traced_decode(name: str, width: int, height: int, frames: int, tile_px: int | None) -> int:
    vae = network(name)
    stride = vae.spec.stride_px
    shape = (1, vae.spec.latent_channels, (frames + 3) // 4, height // stride, width // stride)
    with torch.inference_mode(), LiveBytes("meta") as live:
        latents = torch.empty(shape, device="meta")
        live.add(vae)
        if tile_px is None:
            for chunk in vae.decode(latents):
                del chunk
        else:
            for band in vae.decode_tiles(latents, tile_px):
                del band
    return live.peak_bytes


def traced_encode(name: str, width: int, height: int, frames: int, tile_px: int | None) -> int:
    vae = network(name)
    clip = torch.zeros(()).expand(1, 3, frames, height, width)
    with torch.inference_mode(), LiveBytes("meta") as live:
        live.add(vae)
        vae.encode(clip, tile_px=tile_px)
    return live.peak_bytes


@given(clips())
@settings(max_examples=12)
def test_planned_decode_is_what_the_code_takes(
    clip: tuple[str, int, int, int, int | None],
) -> None:
    planned = decode_bytes(SPECS[clip[0]], *clip[1:])
    check(planned["weights"], sum(planned.values()), traced_decode(*clip))


@given(clips())
@settings(max_examples=10)
def test_planned_encode_is_what_the_code_takes(
    clip: tuple[str, int, int, int, int | None],
) -> None:
    planned = encode_bytes(SPECS[clip[0]], *clip[1:])
    check(planned["weights"], sum(planned.values()), traced_encode(*clip))


def check(weights: int, planned: int, traced: int) -> None:
    """Within 1 % in all, and, weights apart, within 1 % or a MiB."""
    assert abs(planned - traced) <= 0.01 * traced
    assert abs(planned - traced) <= max(0.01 * (traced - weights), MIB)


@pytest.mark.parametrize(
    ("name", "width", "height", "frames"),
    [("2.1", 1280, 720, 17), ("2.1", 832, 480, 81), ("2.2", 1280, 704, 17)],
)
def test_planned_bytes_at_the_models_own_sizes(
    name: str, width: int, height: int, frames: int
) -> None:
    """Within 0.5 %; one of them for a whole clip, the others until all histories are full."""
    spec = SPECS[name]
    traced = traced_decode(name, width, height, frames, None)
    assert abs(sum(decode_bytes(spec, width, height, frames, None).values()) / traced - 1) < 5e-3
    traced = traced_encode(name, width, height, frames, None)
    assert abs(sum(encode_bytes(spec, width, height, frames, None).values()) / traced - 1) < 5e-3


@given(
    st.sampled_from(list(SPECS)), st.integers(4, 12), st.integers(4, 12), st.integers(0, 3),
    st.integers(3, 8),
)  # fmt: skip
@settings(max_examples=5)
def test_planned_host_bytes_cover_a_tiled_decode(
    name: str, width: int, height: int, times: int, tile: int
) -> None:
    """The torch tensors of the host, and the clip in uint8, which is numpy's."""
    vae = network(name)
    stride, frames = vae.spec.stride_px, 4 * times + 1
    latents = torch.empty(1, vae.spec.latent_channels, times + 1, height, width, device="meta")
    with torch.inference_mode(), LiveBytes("cpu") as host:
        for event in decode(vae, latents, tile * stride):
            del event
    clip = 3 * frames * width * height * stride**2
    planned = host_frames_bytes(vae.spec, width * stride, height * stride, frames, tile * stride)
    assert host.peak_bytes + clip <= 1.02 * planned + MIB
    assert planned <= 1.05 * (host.peak_bytes + clip) + MIB


@pytest.mark.parametrize("spec", [VAE_21, VAE_22], ids=["2.1", "2.2"])
def test_the_peak_has_no_workspace(spec: VaeSpec) -> None:
    """The one convolution with few outputs runs in bands, so that it is not where the peak is."""
    assert decode_bytes(spec, 1280, 704, 81, None)["workspace"] == 0
    assert encode_bytes(spec, 1280, 704, 81, None)["workspace"] == 0


def test_planning_a_vae_is_quick() -> None:
    """Under 20 ms for one size, which no other test has planned."""

    def both() -> None:
        decode_bytes(VAE_22, 1248, 736, 117, None)
        encode_bytes(VAE_22, 1248, 736, 117, None)

    assert cpu_time.of_this_thread_s(both) < 0.02


@given(st.integers(1, 200), st.integers(2, 60))
def test_tiles_cover_everything_and_overlap_by_a_quarter(size: int, tile: int) -> None:
    spans = tile_spans(size, tile)
    assert (spans[0].start, spans[-1].stop) == (0, size)
    assert {span.stop - span.start for span in spans} == {min(size, tile)}
    for before, after in itertools.pairwise(spans):
        assert before.stop - after.start >= max(1, tile // 4)
    fewer = len(spans) - 1
    assert fewer * tile - max(0, fewer - 1) * max(1, tile // 4) < size  # these would not do


@given(st.sampled_from(list(SPECS)), st.integers(2, 100), st.integers(2, 100))
def test_each_tile_size_offered_is_worth_its_bytes(name: str, width: int, height: int) -> None:
    """Largest first; each runs fewer pixels than any smaller one, and takes more memory."""
    spec = SPECS[name]
    size = (width * spec.stride_px, height * spec.stride_px)
    sides = tile_sizes(spec, *size)
    assert all(side % spec.stride_px == 0 and side >= 128 for side in sides)
    assert list(sides) == sorted(sides, reverse=True)
    shares = [tiled_share(spec, *size, side) for side in sides]
    assert shares == sorted(shares)
    totals = [sum(decode_bytes(spec, *size, 81, side).values()) for side in sides]
    assert totals == sorted(totals, reverse=True)
    assert all(num_tiles(spec, *size, side) > 1 for side in sides)
