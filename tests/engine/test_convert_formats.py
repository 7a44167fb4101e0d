"""Convert from every encoding: the store holds what the source means, rounded once or not at all.

Names and choice of files are others' tests; here each file is named by hand.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch
from torch import Tensor

from tests.checkpoints import (
    T5_PTH,
    WIDE_T2V,
    Weights,
    save_gguf,
    write_comfy,
    write_gguf,
    write_json,
    write_kijai,
    write_lightx2v,
    write_official,
)
from tests.engine.test_convert import _ENVIRONMENT, ROOT, _snapshot
from tests.engine.tiny_models import tiny_tokenizer
from wanfit.engine.ops.linear import quantise
from wanfit.engine.weights import convert, writer
from wanfit.engine.weights.container import open_container, weights_of
from wanfit.engine.weights.convert import ConvertStep, convert_model
from wanfit.engine.weights.files import ModelFiles, map_file, tensor_at
from wanfit.engine.weights.headers import TensorEntry
from wanfit.engine.weights.keys import Naming, network_names, rows_of, their_name
from wanfit.engine.weights.networks import on_meta, shapes_of
from wanfit.engine.weights.open import open_model
from wanfit.engine.weights.verify import verify_units
from wanfit.errors import BadOutput, WeightsBroken
from wanfit.plan.plan import NetworkName, Precision
from wanfit.specs import Expert, ModelSpec

SPEC = WIDE_T2V
OFFICIAL: Naming = "official"
DIFFUSERS: Naming = "diffusers"
GGUF: Naming = "gguf"
Files = Mapping[NetworkName, tuple[Path, Naming]]
INDEX = "diffusion_pytorch_model.safetensors.index.json"


class Source(NamedTuple):
    files: ModelFiles
    held: Weights  # what they mean


def opened(folder: Path, spec: ModelSpec, files: Files) -> ModelFiles:
    """A model whose networks are in these files, under these names."""
    write_json(folder / "tokenizer/tokenizer.json", tiny_tokenizer())
    entries = {}
    for network in network_names(spec):
        path, naming = files[network]
        found = weights_of(open_container(path))
        shapes, rows = shapes_of(on_meta(spec, network)), rows_of(spec, network)
        entries[network] = {
            name: replace(found[their_name(name, rows, naming)], shape=shape)
            for name, shape in shapes.items()
        }
    return ModelFiles(folder, spec, entries)


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.rglob(pattern)
    return found


def experts(spec: ModelSpec, path: Callable[[str], Path], naming: Naming) -> Files:
    words: dict[Expert, str] = {"high_noise": "[hH][iI][gG][hH]", "low_noise": "[lL][oO][wW]"}
    return {expert: (path(words[expert]), naming) for expert in spec.experts}


def official(path: Path, dtype: torch.dtype = torch.float32) -> Source:
    held = write_official(path, SPEC, dtype=dtype)
    files = dict(experts(SPEC, lambda word: one(path, f"{word}*/{INDEX}"), OFFICIAL))
    files["umt5"] = path / T5_PTH, OFFICIAL
    files["vae"] = path / "Wan2.1_VAE.pth", OFFICIAL
    return Source(opened(path, SPEC, files), held)


def comfy(path: Path, storage: Any) -> Source:
    held = write_comfy(path, SPEC, storage=storage)
    files = dict(experts(SPEC, lambda word: one(path / "diffusion_models", f"*{word}*"), OFFICIAL))
    files["umt5"] = one(path / "text_encoders", "*"), DIFFUSERS
    files["vae"] = one(path / "vae", "*"), OFFICIAL
    return Source(opened(path, SPEC, files), held)


def kijai(path: Path, dtype: torch.dtype, *, scaled: bool) -> Source:
    held = write_kijai(path, SPEC, dtype=dtype, scaled=scaled)
    files = dict(experts(SPEC, lambda word: one(path, f"*-{word}_*"), OFFICIAL))
    files["umt5"] = one(path, "umt5*"), OFFICIAL
    bare = path / "vae.safetensors"  # the prefix is not what is tested here
    _without_prefix(one(path, "*_VAE_*"), bare)
    files["vae"] = bare, OFFICIAL
    return Source(opened(path, SPEC, files), held)


def lightx2v(path: Path, dtype: torch.dtype) -> Source:
    held = write_lightx2v(path, SPEC, dtype=dtype)
    files = dict(experts(SPEC, lambda word: one(path, f"wan*{word}*"), OFFICIAL))
    files["umt5"] = one(path, "models_t5*"), OFFICIAL
    files["vae"] = one(path, "*_VAE.pth"), OFFICIAL
    return Source(opened(path, SPEC, files), held)


def from_gguf(path: Path, qtype: str) -> Source:
    held = write_gguf(path, SPEC, qtype=qtype)
    files = dict(experts(SPEC, lambda word: one(path, f"*-{word}Noise-*"), GGUF))
    files["umt5"] = one(path, "umt5*"), GGUF
    files["vae"] = one(path, "*VAE.safetensors"), OFFICIAL
    return Source(opened(path, SPEC, files), held)


SOURCES: dict[str, Callable[[Path], Source]] = {
    "official fp32": official,
    "official bf16": partial(official, dtype=torch.bfloat16),
    "comfy fp16": partial(comfy, storage="fp16"),
    "comfy fp8_scaled": partial(comfy, storage="fp8_scaled"),
    "comfy comfy_quant": partial(comfy, storage="comfy_quant"),
    "kijai e4m3": partial(kijai, dtype=torch.float8_e4m3fn, scaled=True),
    "kijai e5m2": partial(kijai, dtype=torch.float8_e5m2, scaled=True),
    "kijai e4m3 cast": partial(kijai, dtype=torch.float8_e4m3fn, scaled=False),
    "lightx2v fp8": partial(lightx2v, dtype=torch.float8_e4m3fn),
    "lightx2v int8": partial(lightx2v, dtype=torch.int8),
    "gguf Q8_0": partial(from_gguf, qtype="Q8_0"),
    "gguf Q4_K": partial(from_gguf, qtype="Q4_K"),
    "gguf Q5_1": partial(from_gguf, qtype="Q5_1"),
}


def store_tensors(path: Path, network: NetworkName) -> dict[str, Tensor]:
    store = open_model(path, SPEC)
    return {
        name: tensor_at(map_file(entry.file), entry).clone()
        for name, entry in store.entries(network).items()
    }


@pytest.mark.parametrize("name", SOURCES)
def test_a_store_holds_what_its_source_means(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 every value is rounded once; in fp8 it is quantised from fp32, or kept as it was.

    UMT5 is bf16 and the VAE has the precision of its source in both.
    """
    monkeypatch.setattr(convert, "PIECE_ELEMENTS", 1000)
    source = SOURCES[name](tmp_path / "source")
    for precision in ("bf16", "fp8"):
        convert_model(source.files, tmp_path / precision, _precision(precision))
        list(verify_units(open_model(tmp_path / precision, SPEC)))
        for network in network_names(SPEC):
            found = store_tensors(tmp_path / precision, network)
            entries = source.files.entries(network)
            for parameter, value in source.held[network].items():
                stored = found[parameter]
                wanted = value.reshape(stored.shape)
                if stored.dtype == torch.float8_e4m3fn:
                    scale = found[f"{parameter.removesuffix('weight')}scale"]
                    _check_fp8(stored, scale, wanted, entries[parameter])
                else:
                    assert network != "umt5" or stored.dtype == torch.bfloat16
                    assert torch.equal(stored, wanted.to(stored.dtype)), parameter
            if network == "vae":
                dtypes = {entry.dtype for entry in entries.values()}
                store = open_model(tmp_path / precision, SPEC)
                assert {entry.dtype for entry in store.entries("vae").values()} == dtypes


def _check_fp8(stored: Tensor, scale: Tensor, wanted: Tensor, entry: TensorEntry) -> None:
    if entry.dtype == "F8_E4M3":
        assert torch.equal(stored.float() * scale, wanted)  # exactly
        return
    weight, expected_scale = quantise(wanted)
    assert torch.equal(stored.view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(scale, expected_scale)


def test_parts_of_different_formats(tmp_path: Path) -> None:
    """A GGUF expert beside an fp8 one, a text encoder of ComfyUI and a VAE in a .pth."""
    held = {
        "high_noise": write_gguf(tmp_path / "gguf", SPEC, qtype="Q4_K", umt5=False)["high_noise"],
        "low_noise": write_lightx2v(tmp_path / "lightx2v", SPEC)["low_noise"],
        "umt5": write_comfy(tmp_path / "comfy", SPEC, storage="fp8_scaled")["umt5"],
        "vae": write_official(tmp_path / "official", SPEC)["vae"],
    }
    files: dict[NetworkName, tuple[Path, Naming]] = {
        "high_noise": (one(tmp_path / "gguf", "*High*.gguf"), GGUF),
        "low_noise": (one(tmp_path / "lightx2v", "wan*low*"), OFFICIAL),
        "umt5": (one(tmp_path / "comfy/text_encoders", "*"), DIFFUSERS),
        "vae": (tmp_path / "official/Wan2.1_VAE.pth", OFFICIAL),
    }
    source = opened(tmp_path / "official", SPEC, files)
    convert_model(source, tmp_path / "store", "bf16")
    for network in network_names(SPEC):
        found = store_tensors(tmp_path / "store", network)
        for parameter, value in held[network].items():
            expected = value.reshape(found[parameter].shape).to(found[parameter].dtype)
            assert torch.equal(found[parameter], expected)


def test_a_quantised_autoencoder_becomes_fp32(tmp_path: Path) -> None:
    """It runs in fp32, and no other dtype holds its values."""
    source = official(tmp_path / "source")
    entries = {network: source.files.entries(network) for network in network_names(SPEC)}
    held = source.held["vae"]["decoder.conv_in.weight"]
    data = gguf.quants.quantize(held.reshape(-1, 32).numpy(), gguf.GGMLQuantizationType.Q8_0)
    shape = (held.numel() // 32, 32)
    save_gguf(tmp_path / "x", {"w": (data, gguf.GGMLQuantizationType.Q8_0, shape)}, "wan")
    vae = dict(entries["vae"])
    vae["decoder.conv_in.weight"] = replace(
        open_container(tmp_path / "x").entries["w"], shape=tuple(held.shape)
    )
    files = ModelFiles(source.files.path, SPEC, {**entries, "vae": vae})
    convert_model(files, tmp_path / "store", "bf16")
    found = store_tensors(tmp_path / "store", "vae")["decoder.conv_in.weight"]
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(found, torch.from_numpy(expected).view(held.shape))


class TestResuming:
    def test_a_file_anywhere_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stopped, then one part is another file, elsewhere: nothing is continued."""
        monkeypatch.setattr(writer, "SYNC_BYTES", 1)
        source = official(tmp_path / "source")
        other = official(tmp_path / "other")

        def stop(step: ConvertStep) -> None:
            if step.network == "low_noise":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert_model(source.files, tmp_path / "store", "bf16", stop)
        entries = {network: source.files.entries(network) for network in network_names(SPEC)}
        mixed = ModelFiles(
            source.files.path, SPEC, {**entries, "umt5": other.files.entries("umt5")}
        )
        assert convert_model(mixed, tmp_path / "store", "bf16").resumed_bytes == 0

    def test_it_continues_from_files_elsewhere(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writer, "SYNC_BYTES", 1)
        source = from_gguf(tmp_path / "source", "Q8_0")
        (tmp_path / "elsewhere").mkdir()
        files = ModelFiles(
            tmp_path / "elsewhere", SPEC,
            {network: source.files.entries(network) for network in network_names(SPEC)},
        )  # fmt: skip
        write_json(tmp_path / "elsewhere/tokenizer/tokenizer.json", tiny_tokenizer())
        convert_model(files, tmp_path / "whole", "fp8")

        def stop(step: ConvertStep) -> None:
            if step.network == "low_noise":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert_model(files, tmp_path / "store", "fp8", stop)
        assert convert_model(files, tmp_path / "store", "fp8").resumed_bytes > 0
        assert _snapshot(tmp_path / "store") == _snapshot(tmp_path / "whole")

    def test_a_part_elsewhere_is_not_overwritten(self, tmp_path: Path) -> None:
        source = official(tmp_path / "source")
        files = ModelFiles(
            tmp_path / "elsewhere", SPEC,
            {network: source.files.entries(network) for network in network_names(SPEC)},
        )  # fmt: skip
        with pytest.raises(BadOutput, match="holds the source"):
            convert_model(files, tmp_path / "source", "bf16")


def test_no_weight_is_made_of_whole_numbers(tmp_path: Path) -> None:
    source = official(tmp_path / "source")
    entries = {network: source.files.entries(network) for network in network_names(SPEC)}
    high = dict(entries["high_noise"])
    bias = high["head.linear.bias"]
    high["head.linear.bias"] = replace(bias, dtype="I32")
    files = ModelFiles(source.files.path, SPEC, {**entries, "high_noise": high})
    with pytest.raises(WeightsBroken, match="as I32, which no weight is"):
        convert_model(files, tmp_path / "store", "bf16")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["F32", "Q4_K"])
def test_memory_is_bounded_whatever_the_size(name: str, tmp_path: Path) -> None:
    """500 M weights in one file, a hole: 2 GB in fp32, and 64 MB are held at most.

    The bar is 2 GB for 57 GB. What is held does not grow with the file: a piece is a piece.
    """
    grown_bytes, store_bytes = _child(_MEMORY, str(tmp_path), name).split()
    assert int(store_bytes) > 0.9e9
    assert int(grown_bytes) < 64e6, grown_bytes


_MEMORY = """
    import sys
    from dataclasses import replace
    from pathlib import Path
    import torch
    from tests.engine.test_convert_formats import hollow
    from tests.engine.tiny_models import TINY_T2V
    from wanfit.engine.ops.linear import quantise
    from wanfit.engine.weights.convert import convert_model

    def resident_bytes(field):
        for line in open("/proc/self/status"):
            if line.startswith(field):
                return 1024 * int(line.split()[1])

    source = hollow(Path(sys.argv[1]), sys.argv[2])
    quantise(torch.ones(2, 2))  # what the first use loads is not what is measured
    import gguf.quants
    before = resident_bytes("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    report = convert_model(source, Path(sys.argv[1]) / "store", "bf16")
    print(resident_bytes("VmHWM") - before, sum(report.files.values()))
    """


def hollow(folder: Path, dtype: str) -> ModelFiles:
    """A model whose one transformer has about 500 M weights in `dtype`, all zeros in a hole."""
    dit = replace(SPEC.dit, num_heads=64, ffn_width=16_384, head_dim=64, num_blocks=2)
    spec = replace(SPEC, name="wide", boundary=None, dit=dit)
    small = official(folder / "source").files
    entries: dict[str, TensorEntry] = {}
    at = 4096
    for name, shape in shapes_of(on_meta(spec, "high_noise")).items():
        whole = len(shape) == 2 and shape[1] % 256 == 0
        entry = TensorEntry(folder / "hole", name, dtype if whole else "F32", shape, at)
        entries[name] = entry
        at += entry.num_bytes
    with (folder / "hole").open("wb") as stream:
        stream.truncate(at)
    return ModelFiles(
        small.path, spec,
        {"high_noise": entries, "umt5": small.entries("umt5"), "vae": small.entries("vae")},
    )  # fmt: skip


def _without_prefix(file: Path, bare: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, bare)


def _precision(name: str) -> Precision:
    return "fp8" if name == "fp8" else "bf16"


def _child(script: str, *arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        cwd=ROOT, env=_ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended
    return ended.stdout
