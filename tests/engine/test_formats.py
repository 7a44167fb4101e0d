"""Every model in every format: each key of a file is taken, none is made up, and values survive.

At full size the files are holes with true headers; for tiny models they hold true data. That the
names written here are the true ones is for `test_keys`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.checkpoints import (
    WIDE_T2V,
    Weights,
    meta_weights,
    random_weights,
    write_all_in_one,
    write_comfy,
    write_diffusers,
    write_gguf,
    write_json,
    write_kijai,
    write_lightx2v,
    write_official,
)
from tests.engine.plans import hand_made_plan
from tests.engine.tiny_models import TINY_I2V, TINY_T2V, TINY_TI2V, tiny_tokenizer
from wanfit.engine.pipeline import generate_frames
from wanfit.engine.weights.checkpoint import choose, open_parts
from wanfit.engine.weights.convert import convert_model
from wanfit.engine.weights.depot import Depot
from wanfit.engine.weights.files import map_file, tensor_at
from wanfit.engine.weights.keys import network_names
from wanfit.engine.weights.networks import on_meta, shapes_of
from wanfit.engine.weights.open import open_model
from wanfit.events import FramesReady
from wanfit.plan.plan import NetworkName
from wanfit.request import VideoRequest, resolve
from wanfit.specs import I2V_A14B, T2V_A14B, TI2V_5B, ModelSpec

CPU = torch.device("cpu")
FULL = (T2V_A14B, I2V_A14B, TI2V_5B)
TINY = (TINY_T2V, TINY_I2V, TINY_TI2V)
Write = Callable[[Path, ModelSpec, Weights], Weights]

# What a file holds beside weights.
BESIDE = (
    ".scale_weight", ".scale_input", ".weight_scale", ".comfy_quant", "scaled_fp8", "spiece_model",
)  # fmt: skip

PLAIN: dict[str, Write] = {
    "official fp32": lambda p, s, w: write_official(p, s, weights=w, num_shards=3),
    "official bf16": lambda p, s, w: write_official(p, s, weights=w, dtype=torch.bfloat16),
    "diffusers bf16": lambda p, s, w: write_diffusers(p, s, weights=w, dtype=torch.bfloat16),
    "diffusers fp32": lambda p, s, w: write_diffusers(p, s, weights=w, num_shards=3),
    "comfy fp16": lambda p, s, w: write_comfy(p, s, weights=w),
    "comfy bf16": lambda p, s, w: write_comfy(p, s, weights=w, storage="bf16"),
}
QUANTISED: dict[str, Write] = {
    "comfy fp8 scaled": lambda p, s, w: write_comfy(p, s, weights=w, storage="fp8_scaled"),
    "comfy quant": lambda p, s, w: write_comfy(p, s, weights=w, storage="comfy_quant"),
    "comfy metadata": lambda p, s, w: write_comfy(p, s, weights=w, storage="comfy_metadata"),
    "kijai fp8": lambda p, s, w: write_kijai(p, s, weights=w),
    "kijai e5m2 cast": lambda p, s, w: write_kijai(
        p, s, weights=w, dtype=torch.float8_e5m2, scaled=False
    ),
    "lightx2v fp8 by block": lambda p, s, w: write_lightx2v(p, s, weights=w, by_block=True),
    "lightx2v int8": lambda p, s, w: write_lightx2v(p, s, weights=w, dtype=torch.int8),
}
GGUF: dict[str, Write] = {
    f"gguf {kind}": lambda p, s, w, kind=kind: write_gguf(p, s, weights=w, qtype=kind)  # type: ignore[misc]
    for kind in ("F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_1", "Q4_0")
}
HOLLOW = PLAIN | QUANTISED | GGUF


@pytest.fixture(scope="module")
def hollow() -> dict[str, Weights]:
    return {spec.name: meta_weights(spec) for spec in FULL}


@pytest.fixture(scope="module")
def tiny() -> dict[str, Weights]:
    return {spec.name: random_weights(spec) for spec in (*TINY, WIDE_T2V)}


@pytest.mark.parametrize("name", HOLLOW)
@pytest.mark.parametrize("spec", FULL, ids=lambda spec: spec.name)
def test_at_full_size_every_key_is_taken_and_none_is_made_up(
    spec: ModelSpec, name: str, hollow: dict[str, Weights], tmp_path: Path
) -> None:
    """By the true names, shapes and lengths of files of up to 114 GB, which are holes."""
    HOLLOW[name](tmp_path, spec, hollow[spec.name])
    chosen = choose(tmp_path, spec)
    files = open_parts(chosen)
    assert chosen.is_plain == (name in PLAIN or name in ("gguf F16", "gguf BF16"))
    for network, part in chosen.networks.items():
        entries = files.entries(network)
        assert {n: e.shape for n, e in entries.items()} == shapes_of(on_meta(spec, network))
        taken = [(entry.file, entry.name) for entry in entries.values()]
        held = [
            (entry.file, entry.name)
            for entry in part.container.entries.values()
            if not entry.name.endswith(BESIDE)
        ]
        assert sorted(taken) == sorted(held)
        held_bytes = sum(entry.num_bytes for entry in entries.values())
        assert (
            part.num_bytes > held_bytes > 250e6
        )  # of true length: the smallest is VAE 2.1 in bf16


@pytest.mark.parametrize("spec", FULL, ids=lambda spec: spec.name)
def test_without_a_name_the_model_is_the_one_that_it_is(
    spec: ModelSpec, hollow: dict[str, Weights], tmp_path: Path
) -> None:
    for name in ("official fp32", "diffusers bf16", "comfy fp16", "gguf Q4_K"):
        HOLLOW[name](tmp_path / name, spec, hollow[spec.name])
        assert choose(tmp_path / name).spec == spec


@pytest.mark.parametrize("name", PLAIN | QUANTISED)
@pytest.mark.parametrize("spec", TINY, ids=lambda spec: spec.name)
def test_a_store_has_the_values_of_every_format(
    spec: ModelSpec, name: str, tiny: dict[str, Weights], tmp_path: Path
) -> None:
    held = (PLAIN | QUANTISED)[name](tmp_path / "source", spec, tiny[spec.name])
    _check_store(tmp_path, spec, held)


@pytest.mark.parametrize("name", GGUF)
def test_a_store_has_the_values_of_every_gguf(
    name: str, tiny: dict[str, Weights], tmp_path: Path
) -> None:
    held = GGUF[name](tmp_path / "source", WIDE_T2V, tiny[WIDE_T2V.name])
    _check_store(tmp_path, WIDE_T2V, held)


def test_a_store_has_the_values_of_an_all_in_one_file(
    tiny: dict[str, Weights], tmp_path: Path
) -> None:
    (tmp_path / "source").mkdir()
    file = tmp_path / "source/all.safetensors"
    held = write_all_in_one(file, TINY_TI2V, weights=tiny["tiny-ti2v"])
    _check_store(tmp_path, TINY_TI2V, held)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("spec", TINY, ids=lambda spec: spec.name)
def test_plain_files_are_read_bit_by_bit(
    spec: ModelSpec, name: str, tiny: dict[str, Weights], tmp_path: Path
) -> None:
    """Networks straight from the files, without a store between."""
    held = PLAIN[name](tmp_path, spec, tiny[spec.name])
    files = open_model(tmp_path, spec)
    networks: dict[NetworkName, torch.nn.Module] = {
        "umt5": files.load_umt5(CPU, torch.float32),
        "vae": files.load_vae(CPU, torch.float32),
    }
    for expert in spec.experts:
        networks[expert] = files.load_dit(expert, CPU, torch.float32)
    for network, module in networks.items():
        found = module.state_dict()
        assert found.keys() == held[network].keys()
        assert all(torch.equal(found[n], value) for n, value in held[network].items())


RUNNABLE: dict[str, Write] = PLAIN | {
    "comfy fp32": lambda p, s, w: write_comfy(p, s, weights=w, storage="fp32"),
}


@pytest.mark.parametrize("spec", TINY[::2], ids=lambda spec: spec.name)
def test_a_clip_is_the_same_from_every_plain_format(spec: ModelSpec, tmp_path: Path) -> None:
    """The weights are such that every format holds them exactly, so frames are equal too."""
    weights = {
        network: {name: _exact(value) for name, value in tensors.items()}
        for network, tensors in random_weights(spec).items()
    }
    clips = {}
    for name, write in RUNNABLE.items():
        write(tmp_path / name, spec, weights)
        write_json(tmp_path / name / "tokenizer/tokenizer.json", tiny_tokenizer())
        clips[name] = _clip(tmp_path / name, spec)
    expected = clips["diffusers fp32"]
    assert expected.shape[0] == 5
    assert expected.std() > 1
    assert [name for name, clip in clips.items() if not np.array_equal(clip, expected)] == []


def test_a_clip_is_the_same_from_plain_gguf_and_from_one_file(tmp_path: Path) -> None:
    for spec, name in ((WIDE_T2V, "gguf"), (TINY_TI2V, "one file")):
        weights = {
            network: {key: _exact(value) for key, value in tensors.items()}
            for network, tensors in random_weights(spec).items()
        }
        write_comfy(tmp_path / spec.name, spec, weights=weights)
        if name == "gguf":
            write_gguf(tmp_path / name, spec, weights=weights, qtype="F16")
        else:
            (tmp_path / name).mkdir()
            write_all_in_one(tmp_path / name / "all.safetensors", spec, weights=weights)
        expected = _clip(tmp_path / spec.name, spec)
        assert np.array_equal(_clip(tmp_path / name, spec), expected)


def _check_store(folder: Path, spec: ModelSpec, held: Weights) -> None:
    """A bf16 store made of `folder`/source has these values, each rounded once to its dtype."""
    convert_model(open_parts(choose(folder / "source", spec)), folder / "store", "bf16")
    store = open_model(folder / "store", spec)
    for network in network_names(spec):
        entries = store.entries(network)
        assert entries.keys() == _of(held, network, spec).keys()
        for name, value in _of(held, network, spec).items():
            entry = entries[name]
            stored = tensor_at(map_file(entry.file), entry)
            assert torch.equal(stored, value.to(stored.dtype).view(stored.shape)), name
    assert store.tokenizer().encode("a red star").ids[-1] == 1


def _of(held: Weights, network: NetworkName, spec: ModelSpec) -> dict[str, Tensor]:
    assert set(held) == set(network_names(spec))
    return held[network]


def _exact(value: Tensor) -> Tensor:
    """The nearest values that bf16 and fp16 both have."""
    rounded = value.bfloat16().float()
    rounded = torch.where(rounded.abs() < 1e-3, 0.0, rounded)
    assert torch.equal(rounded.half().float(), rounded)
    return rounded


def _clip(path: Path, spec: ModelSpec) -> np.ndarray[Any, np.dtype[np.uint8]]:
    side = 2 * spec.grid_px
    request = VideoRequest(
        prompt="a red star", negative_prompt="a", width=side, height=side, num_frames=5,
        num_inference_steps=2, seed=1,
    )  # fmt: skip
    plan = hand_made_plan(resolve(request, spec), where="registered", precision="fp32")
    events = generate_frames(plan, open_model(path, spec), None, Depot(CPU))
    return np.concatenate([event.frames for event in events if isinstance(event, FramesReady)])
