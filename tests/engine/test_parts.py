"""What a file holds, told by its content: every network, encoding and model, and the refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch
from torch import Tensor

from tests.checkpoints import (
    TINY_PIECES,
    WIDE_T2V,
    Files,
    Weights,
    gguf_named,
    meta_weights,
    named,
    plain,
    prefixed,
    random_weights,
    save_gguf,
    save_pth,
    save_safetensors,
    tiny_spiece,
    write_all_in_one,
    write_comfy,
    write_diffusers,
    write_gguf,
    write_kijai,
    write_lightx2v,
    write_official,
)
from tests.engine.tiny_models import TINY_I2V, TINY_T2V, TINY_TI2V
from tests.lora_files import random_adapters, write_lora
from wanfit.engine.weights.parts import Part, expert_named, read_part, read_parts
from wanfit.errors import WeightsBroken, WeightsMismatch, WeightsMissing
from wanfit.specs import I2V_A14B, MODELS, T2V_A14B, TI2V_5B, Expert, ModelSpec

TINY = (TINY_T2V, TINY_I2V)
A14B = (T2V_A14B, I2V_A14B)
FP16 = plain(torch.float16)


@pytest.fixture(scope="module")
def hollow() -> dict[str, Weights]:
    """The true shapes of every model, without values."""
    return {spec.name: meta_weights(spec) for spec in MODELS}


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.rglob(pattern)
    return found


class Case(NamedTuple):
    """A written checkpoint, and what its high-noise expert is."""

    write: Callable[[Path, ModelSpec, Weights], object]
    high: str  # a pattern that finds it
    naming: str
    storage: str


CASES: dict[str, Case] = {
    "official": Case(
        lambda path, spec, weights: write_official(path, spec, weights=weights),
        "high_noise_model/*.index.json", "official", "fp32",
    ),
    "diffusers": Case(
        lambda path, spec, weights: write_diffusers(
            path, spec, weights=weights, dtype=torch.bfloat16
        ),
        "transformer/*.safetensors", "diffusers", "bf16",
    ),
    "comfy": Case(
        lambda path, spec, weights: write_comfy(path, spec, weights=weights),
        "*high*.safetensors", "official", "fp16",
    ),
    "comfy fp8": Case(
        lambda path, spec, weights: write_comfy(path, spec, weights=weights, storage="fp8_scaled"),
        "*high*.safetensors", "official", "fp8 scaled",
    ),
    "comfy fp8, newer": Case(
        lambda path, spec, weights: write_comfy(path, spec, weights=weights, storage="comfy_quant"),
        "*high*.safetensors", "official", "fp8 scaled",
    ),
    "comfy with a prefix": Case(
        lambda path, spec, weights: write_comfy(
            path, spec, weights=weights, prefix="diffusion_model."
        ),
        "*high*.safetensors", "official", "fp16",
    ),
    "kijai": Case(
        lambda path, spec, weights: write_kijai(path, spec, weights=weights),
        "*HIGH*.safetensors", "official", "fp8 scaled",
    ),
    "kijai e5m2": Case(
        lambda path, spec, weights: write_kijai(
            path, spec, weights=weights, dtype=torch.float8_e5m2, scaled=False
        ),
        "*HIGH*.safetensors", "official", "fp8 e5m2",
    ),
    "lightx2v by block": Case(
        lambda path, spec, weights: write_lightx2v(path, spec, weights=weights, by_block=True),
        "high_noise_model/*.index.json", "official", "fp8 scaled",
    ),
    "lightx2v int8": Case(
        lambda path, spec, weights: write_lightx2v(path, spec, weights=weights, dtype=torch.int8),
        "*high*.safetensors", "official", "int8",
    ),
    "gguf": Case(
        lambda path, spec, weights: write_gguf(path, spec, weights=weights, qtype="Q4_K"),
        "*HighNoise*.gguf", "gguf", "Q4_K",
    ),
}  # fmt: skip


@pytest.mark.parametrize("spec", A14B, ids=lambda spec: spec.name)
@pytest.mark.parametrize("name", [name for name in CASES if name not in (
    "comfy fp8, newer", "lightx2v by block", "lightx2v int8", "kijai", "kijai e5m2",
)])  # fmt: skip
def test_every_format_of_the_true_models(
    name: str, spec: ModelSpec, hollow: dict[str, Weights], tmp_path: Path
) -> None:
    """At full size: which network, of which models, which expert, how stored, how large."""
    case = CASES[name]
    case.write(tmp_path, spec, hollow[spec.name])
    part = read_part(one(tmp_path, case.high))
    assert (part.family, part.models, part.expert) == ("dit", (spec,), "high_noise")
    assert (part.naming, part.storage) == (case.naming, case.storage)
    assert part.num_bytes == sum(file.stat().st_size for file in part.container.files)
    assert part.is_plain == (case.storage in ("fp32", "fp16", "bf16"))
    assert len(part.weights) == 1095


@pytest.mark.parametrize("name", CASES)
def test_every_format_of_a_tiny_model(name: str, tmp_path: Path) -> None:
    """All parts of a checkpoint are told, and nothing else."""
    CASES[name].write(tmp_path, WIDE_T2V, random_weights(WIDE_T2V))
    parts = list(all_parts(tmp_path, (WIDE_T2V,)))
    found = sorted((part.family, part.expert or "") for part in parts)
    assert found == [("dit", "high_noise"), ("dit", "low_noise"), ("umt5", ""), ("vae", "")]
    assert all(part.models == (WIDE_T2V,) for part in parts)


def test_a_dense_model_has_no_expert(hollow: dict[str, Weights], tmp_path: Path) -> None:
    """Not even where the name says one."""
    write_official(tmp_path / "high_noise", TI2V_5B, weights=hollow["ti2v-5b"], num_shards=3)
    part = read_part(one(tmp_path, "*.index.json"))
    assert (part.models, part.expert) == ((TI2V_5B,), None)
    assert len(part.container.files) == 3
    vae = read_part(one(tmp_path, "Wan2.2_VAE.pth"))
    assert (vae.family, vae.models, vae.container.kind) == ("vae", (TI2V_5B,), "pth")


def test_text_encoder_and_vae_belong_to_several_models(
    hollow: dict[str, Weights], tmp_path: Path
) -> None:
    write_official(tmp_path, T2V_A14B, weights=hollow["t2v-a14b"])
    assert read_part(tmp_path / "Wan2.1_VAE.pth").models == A14B
    umt5 = read_part(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    assert umt5.models == (TI2V_5B, *A14B)
    assert not umt5.has_vocabulary


@pytest.mark.parametrize(
    ("storage", "words"), [("fp16", "fp16"), ("fp8_scaled", "fp8 scaled + fp16")]
)
def test_a_vocabulary_is_no_weight(storage: str, words: str, tmp_path: Path) -> None:
    write_comfy(tmp_path, TINY_T2V, storage=storage)  # type: ignore[arg-type]
    part = read_part(one(tmp_path, "umt5*"), TINY)
    assert part.has_vocabulary
    assert part.sentencepiece() == tiny_spiece(TINY_PIECES)
    assert part.storage == words
    assert "spiece_model" not in part.weights


def test_gguf_metadata_is_a_vocabulary(tmp_path: Path) -> None:
    write_gguf(tmp_path, WIDE_T2V)
    part = read_part(one(tmp_path, "umt5*"), (WIDE_T2V,))
    assert part.has_vocabulary
    assert part.sentencepiece() is None


def test_an_all_in_one_file_holds_three_parts(tmp_path: Path) -> None:
    file = tmp_path / "all.safetensors"
    write_all_in_one(file, TINY_TI2V)
    parts = read_parts(file, (TINY_TI2V,))
    assert [part.family for part in parts] == ["dit", "vae", "umt5"]
    assert sum(part.num_bytes for part in parts) < file.stat().st_size
    assert parts[2].has_vocabulary
    with pytest.raises(WeightsMismatch, match="several networks: transformer, VAE, text encoder"):
        read_part(file, (TINY_TI2V,))


def test_the_prefix_of_a_bundle_does_not_hide_a_stranger(tmp_path: Path) -> None:
    """A tensor beside the three networks is named, not passed over."""
    file = tmp_path / "all.safetensors"
    tensors = _bundle(TINY_TI2V) | {"clip_vision.weight": torch.zeros(2)}
    save_safetensors(file, tensors)
    with pytest.raises(WeightsBroken, match=r"holds clip_vision\.weight, which no network"):
        read_parts(file, (TINY_TI2V,))
    del tensors["clip_vision.weight"]
    tensors["text_encoders.umt5xxl.logit_scale"] = torch.zeros(())
    save_safetensors(file, tensors)
    assert len(read_parts(file, (TINY_TI2V,))) == 3


@pytest.mark.parametrize("style", ["native", "diffusers"])
def test_a_lora_is_an_adapter(style: str, tmp_path: Path) -> None:
    """Even with a patch embedding in it, or named as an expert of I2V."""
    file = tmp_path / "wan2.2_i2v_high_noise_lora.safetensors"
    begin = "transformer" if style == "diffusers" else "diffusion_model"
    layer = "attn1.to_q" if style == "diffusers" else "self_attn.q"
    save_safetensors(file, {
        f"{begin}.blocks.0.{layer}.lora_A.weight": torch.zeros(2, 8),
        f"{begin}.blocks.0.{layer}.lora_B.weight": torch.zeros(8, 2),
        f"{begin}.patch_embedding.diff": torch.zeros(8, 4, 1, 2, 2),
        f"{begin}.head.modulation": torch.zeros(1, 2, 8),
    })  # fmt: skip
    part = read_part(file)
    assert (part.family, part.expert, part.models) == ("lora", "high_noise", ())


def test_a_whole_lora_is_an_adapter(tmp_path: Path) -> None:
    write_lora(tmp_path / "style.safetensors", random_adapters(TINY_T2V))
    assert read_part(tmp_path / "style.safetensors", TINY).family == "lora"


@pytest.mark.parametrize(
    ("path", "expert"),
    [
        ("diffusion_models/wan2.2_t2v_high_noise_14B_fp16.safetensors", "high_noise"),
        ("diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors", "low_noise"),
        ("I2V/Wan2_2-I2V-A14B-HIGH_fp8_e4m3fn_scaled_KJ.safetensors", "high_noise"),
        ("I2V/Wan2_2-I2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors", "low_noise"),
        ("LowNoise/Wan2.2-T2V-A14B-LowNoise-Q4_K_M.gguf", "low_noise"),
        ("HighNoise/model.gguf", "high_noise"),
        ("high_noise_model/diffusion_pytorch_model.safetensors.index.json", "high_noise"),
        ("transformer/diffusion_pytorch_model.safetensors", "high_noise"),
        ("transformer_2/diffusion_pytorch_model.safetensors", "low_noise"),
        ("wan22_highnoise.safetensors", "high_noise"),
        ("high/wan_low.safetensors", "low_noise"),
        ("x/low_lightx2v.safetensors", "low_noise"),
        ("high_noise/wan_high_and_low.safetensors", None),
        ("models/wan2.2_t2v_14B.safetensors", None),
        ("workflow/slow_motion.safetensors", None),
        ("x/wan_lowvram_highres.safetensors", None),
        ("deep/high/inner/wan.safetensors", None),
    ],
)
def test_names_tell_the_experts(path: str, expert: Expert | None) -> None:
    """The file's before the folder's; parts of words tell nothing."""
    assert expert_named(Path(path)) == expert


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ("img_emb.proj.0.weight", "Wan 2.1 I2V"),
        ("blocks.0.cross_attn.k_img.weight", "Wan 2.1 I2V"),
        ("img_emb.emb_pos", "Wan 2.1 FLF2V"),
        ("vace_patch_embedding.weight", "VACE"),
        ("vace_blocks.0.after_proj.bias", "VACE"),
        ("motion_encoder.dec.direction.weight", "Animate"),
        ("pose_patch_embedding.weight", "Animate"),
        ("audio_injector.injector.0.q.weight", "S2V"),
        ("audio_proj.audio_proj_glob_1.layer.weight", "HuMo"),
        ("control_adapter.conv.weight", "camera control"),
        ("ref_conv.weight", "Fun Control"),
    ],
)
def test_other_models_of_the_family_are_refused_by_name(
    extra: str, what: str, hollow: dict[str, Weights], tmp_path: Path
) -> None:
    """I2V-A14B's tensors, and one that only the other has."""
    tensors, _ = named(I2V_A14B, "high_noise", hollow["i2v-a14b"], "official", FP16)
    file = tmp_path / "wan2.2_i2v_high_noise.safetensors"
    save_safetensors(file, tensors | {extra: _meta(8)})
    with pytest.raises(WeightsMismatch, match=what) as raised:
        read_part(file)
    assert "wanfit does not run" in raised.value.message
    assert "i2v-a14b" in raised.value.hint


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_heads": 12, "num_blocks": 30, "ffn_width": 8960}, r"Wan 2\.1 T2V-1\.3B"),
        ({"in_channels": 32}, "40 blocks of width 5120 and 32 input channels"),
        ({"in_channels": 52, "out_channels": 16}, "52 input channels"),
        ({"num_blocks": 39}, "39 blocks"),
    ],
)
def test_derivatives_are_refused_by_their_shapes(
    changes: dict[str, Any], what: str, tmp_path: Path
) -> None:
    spec = replace(T2V_A14B, dit=replace(T2V_A14B.dit, **changes))
    tensors, _ = named(spec, "high_noise", meta_weights(spec), "official", FP16)
    save_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(WeightsMismatch, match=what):
        read_part(tmp_path / "x.safetensors")


def test_a_model_that_was_not_asked_for_is_named(
    hollow: dict[str, Weights], tmp_path: Path
) -> None:
    write_comfy(tmp_path, I2V_A14B, weights=hollow["i2v-a14b"])
    file = one(tmp_path, "*high*")
    with pytest.raises(WeightsMismatch, match="transformer of i2v-a14b, and t2v-a14b was asked"):
        read_part(file, (T2V_A14B,))


def test_text_encoders_and_vaes_of_others_are_refused(tmp_path: Path) -> None:
    """T5-XXL of other models has the same names; so does a VAE with another width."""
    t5 = {"shared.weight": _meta(32128, 4096), "encoder.final_layer_norm.weight": _meta(4096)}
    save_safetensors(tmp_path / "t5.safetensors", t5)
    with pytest.raises(WeightsMismatch, match=r"table of \[32128, 4096\], not UMT5"):
        read_part(tmp_path / "t5.safetensors")
    vae = {
        "decoder.middle.0.residual.0.gamma": _meta(512, 1, 1, 1),
        "decoder.conv1.weight": _meta(512, 32, 3, 3, 3),
    }
    save_pth(tmp_path / "vae.pth", {n: torch.zeros(t.shape) for n, t in vae.items()})
    with pytest.raises(WeightsMismatch, match=r"begins with \[512, 32, 3, 3, 3\], not Wan's"):
        read_part(tmp_path / "vae.pth")


def test_files_of_other_programs_are_none(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "clip.safetensors", {
        f"text_model.layers.{i}.weight": _meta(4) for i in range(5)
    })  # fmt: skip
    with pytest.raises(WeightsMismatch, match=r"is not of Wan 2\.2: it holds text_model.* 2 more"):
        read_part(tmp_path / "clip.safetensors")
    save_safetensors(tmp_path / "empty.safetensors", {})
    with pytest.raises(WeightsMismatch, match="holds no tensors"):
        read_part(tmp_path / "empty.safetensors")


def test_a_shard_without_its_index_is_told(tmp_path: Path) -> None:
    """The first has the telling tensors and lacks blocks; the others have blocks alone."""
    write_official(tmp_path, TINY_T2V, num_shards=3)
    folder = tmp_path / "high_noise_model"
    one(folder, "*.index.json").unlink()
    for shard in folder.glob("*.safetensors"):
        with pytest.raises(WeightsBroken, match="one of 3 shards, and no index lists it"):
            read_part(shard, TINY)


def test_a_missing_shard_is_missing(tmp_path: Path) -> None:
    write_official(tmp_path, TINY_T2V, num_shards=3)
    one(tmp_path / "low_noise_model", "*-00002-*").unlink()
    with pytest.raises(WeightsMissing, match=r"00002-of-00003\.safetensors is not there, 1 of 3"):
        read_part(one(tmp_path / "low_noise_model", "*.index.json"), TINY)


def test_a_gguf_without_its_patch_embedding_is_told(tmp_path: Path) -> None:
    tensors, _ = gguf_named(
        WIDE_T2V, "high_noise", random_weights(WIDE_T2V), gguf.GGMLQuantizationType.Q8_0
    )
    del tensors["patch_embedding.weight"]
    save_gguf(tmp_path / "high.gguf", tensors, "wan")
    with pytest.raises(WeightsBroken, match=r"lacks patch_embedding\.weight, which the quantiser"):
        read_part(tmp_path / "high.gguf", (WIDE_T2V,))


@pytest.mark.parametrize("arch", ["wan", "pig", None])
def test_a_gguf_needs_no_architecture(arch: str | None, tmp_path: Path) -> None:
    write_gguf(tmp_path, WIDE_T2V, arch=arch)
    part = read_part(one(tmp_path, "*HighNoise*.gguf"), (WIDE_T2V,))
    assert (part.family, part.naming, part.models) == ("dit", "gguf", (WIDE_T2V,))


def test_reading_parts_imports_no_torch(tmp_path: Path) -> None:
    write_official(tmp_path, TINY_T2V)
    write_gguf(tmp_path / "gguf", WIDE_T2V)
    code = f"""
import sys
from pathlib import Path
from wanfit.engine.weights.parts import read_part
from wanfit.errors import WeightsMismatch
for path in Path({str(tmp_path)!r}).rglob("*"):
    if path.suffix in (".gguf", ".pth") or path.name.endswith("index.json"):
        try:
            read_part(path)
        except WeightsMismatch:
            pass  # tiny
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def all_parts(folder: Path, models: tuple[ModelSpec, ...]) -> Iterator[Part]:
    indexes = list(folder.rglob("*.index.json"))
    shards = {file for index in indexes for file in read_part(index, models).container.files}
    for file in [*indexes, *folder.rglob("*.safetensors"), *folder.rglob("*.gguf")]:
        if file not in shards:
            yield read_part(file, models)
    for file in folder.rglob("*.pth"):
        yield read_part(file, models)


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float16, device="meta")


def _bundle(spec: ModelSpec) -> Files:
    weights = meta_weights(spec)
    dit, _ = named(spec, "high_noise", weights, "official", FP16)
    vae, _ = named(spec, "vae", weights, "official", FP16)
    umt5, _ = named(spec, "umt5", weights, "diffusers", FP16)
    return (
        prefixed(dit, "model.diffusion_model.")
        | prefixed(vae, "vae.")
        | prefixed(umt5, "text_encoders.umt5xxl.transformer.")
    )
