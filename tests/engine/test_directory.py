"""Model directories: written, opened, read, and refused with the reason."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.tiny_models import (
    TINY_I2V,
    TINY_T2V,
    TINY_TI2V,
    TinyModel,
    reference_class,
    tiny_tokenizer,
    write_tiny,
)
from wanfit.engine.models.dit import Dit
from wanfit.engine.weights.configs import (
    check_config,
    dit_config,
    umt5_config,
    vae_config,
)
from wanfit.engine.weights.directory import file_tensors, write_directory
from wanfit.engine.weights.networks import AnyNetwork
from wanfit.engine.weights.open import open_model
from wanfit.errors import BadOutput, WeightsBroken, WeightsMismatch, WeightsMissing
from wanfit.specs import I2V_A14B, MODELS, T2V_A14B, TI2V_5B, Expert, ModelSpec

CPU = torch.device("cpu")
DIT_FILE = "transformer/diffusion_pytorch_model.safetensors"
EXPERTS: tuple[Expert, ...] = ("high_noise", "low_noise")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A T2V model, fp32. Tests that change files take `copy`."""
    return write_tiny(tmp_path_factory.mktemp("models") / "t2v", TINY_T2V, seed=3)


@pytest.fixture
def copy(written: TinyModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written.path, tmp_path / "t2v"))


def test_what_is_written_is_read_back(written: TinyModel) -> None:
    """Bit by bit in fp32; each expert gets its own weights."""
    opened = open_model(written.path, TINY_T2V)
    _assert_same(opened.load_umt5(CPU, torch.float32), written.umt5)
    _assert_same(opened.load_vae(CPU, torch.float32), written.vae)
    for expert in EXPERTS:
        _assert_same(opened.load_dit(expert, CPU, torch.float32), written.dits[expert])
    assert opened.tokenizer().encode("a red star").ids == (4, 5, 8, 1)


def test_networks_come_without_gradients_in_eval_mode(written: TinyModel) -> None:
    dit = open_model(written.path, TINY_T2V).load_dit("high_noise", CPU, torch.float32)
    assert not dit.training
    assert not any(parameter.requires_grad for parameter in dit.parameters())


def test_bf16_keeps_in_fp32_what_the_network_says(written: TinyModel) -> None:
    """Read in bf16 from fp32 files: all but Dit.FP32_PARAMETERS, which lose nothing."""
    dit = open_model(written.path, TINY_T2V).load_dit("high_noise", CPU, torch.bfloat16)
    original = dict(written.dits["high_noise"].named_parameters())
    for name, parameter in dit.named_parameters():
        kept = any(part in name for part in Dit.FP32_PARAMETERS)
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
        assert torch.equal(parameter, original[name].to(parameter.dtype)), name


def test_written_in_bf16_the_kept_parts_lose_nothing(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "i2v", TINY_I2V, dtype=torch.bfloat16)
    dit = open_model(model.path, TINY_I2V).load_dit("low_noise", CPU, torch.float32)
    written_dit = model.dits["low_noise"]
    assert torch.equal(dit.head.modulation, written_dit.head.modulation)
    assert torch.equal(dit.head.linear.weight, written_dit.head.linear.weight.bfloat16().float())


@pytest.mark.filterwarnings("ignore")  # of diffusers and transformers about themselves
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", [TINY_TI2V, TINY_T2V, TINY_I2V], ids=lambda spec: spec.name)
def test_diffusers_reads_what_is_written(
    spec: ModelSpec, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Every component, with our shift, boundary and tokens; and every weight as it was."""
    model = write_tiny(tmp_path / "model", spec, dtype=dtype)
    name = "WanImageToVideoPipeline" if spec.needs_image else "WanPipeline"
    pipeline = reference_class("diffusers", name).from_pretrained(model.path)
    assert pipeline.config.boundary_ratio == spec.boundary
    assert pipeline.config.expand_timesteps == (spec.task == "ti2v")
    assert pipeline.scheduler.config.flow_shift == spec.sampling.shift
    assert pipeline.scheduler.config.prediction_type == "flow_prediction"
    assert pipeline.tokenizer("a red star").input_ids == [4, 5, 8, 1]
    components: dict[str, AnyNetwork] = {"vae": model.vae, "text_encoder": model.umt5}
    components |= dict(zip(("transformer", "transformer_2"), model.dits.values(), strict=False))
    for component, network in components.items():
        read = getattr(pipeline, component).state_dict()
        for key, tensor in file_tensors(network, dtype).items():
            assert torch.equal(read[key].float(), tensor.float()), (component, key)
    assert (pipeline.transformer_2 is None) == (spec.boundary is None)


@pytest.mark.filterwarnings("ignore")
def test_what_diffusers_writes_is_read(written: TinyModel, tmp_path: Path) -> None:
    """A pipeline saved by diffusers in small shards opens here, with the same weights."""
    pipeline = reference_class("diffusers", "WanPipeline").from_pretrained(written.path)
    pipeline.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    shards = sorted((tmp_path / "saved/transformer").glob("*.safetensors"))
    assert len(shards) > 1
    opened = open_model(tmp_path / "saved", TINY_T2V)
    for expert in EXPERTS:
        _assert_same(opened.load_dit(expert, CPU, torch.float32), written.dits[expert])
    _assert_same(opened.load_vae(CPU, torch.float32), written.vae)
    _assert_same(opened.load_umt5(CPU, torch.float32), written.umt5)

    shards[0].unlink()
    with pytest.raises(WeightsMissing, match=f"{shards[0].name} is not there, 1 of {len(shards)}"):
        open_model(tmp_path / "saved", TINY_T2V)


def test_opening_and_loading_do_not_import_torch_s_compiler(written: TinyModel) -> None:
    """It takes seconds, and initialising weights on the meta device would import it."""
    code = f"""
import sys, torch
from pathlib import Path
from tests.engine.tiny_models import TINY_T2V
from wanfit.engine.weights.open import open_model
before = set(sys.modules)
opened = open_model(Path({str(written.path)!r}), TINY_T2V)
opened.load_umt5(torch.device("cpu"), torch.bfloat16)
opened.load_vae(torch.device("cpu"), torch.float32)
opened.load_dit("high_noise", torch.device("cpu"), torch.bfloat16)
assert not {{"sympy", "torch._inductor"}} & (set(sys.modules) - before)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_an_absent_directory_is_missing(tmp_path: Path) -> None:
    with pytest.raises(WeightsMissing, match="no model directory at"):
        open_model(tmp_path / "nowhere", TINY_T2V)


def test_an_empty_directory_has_no_transformer(tmp_path: Path) -> None:
    (tmp_path / "high_noise_model").mkdir()
    with pytest.raises(WeightsMissing, match=r"has no high-noise expert of tiny-t2v"):
        open_model(tmp_path, TINY_T2V)


def test_without_its_index_a_directory_is_known_by_its_files(
    written: TinyModel, copy: Path
) -> None:
    (copy / "model_index.json").unlink()
    opened = open_model(copy, TINY_T2V)
    _assert_same(opened.load_dit("low_noise", CPU, torch.float32), written.dits["low_noise"])


@pytest.mark.parametrize(
    "file",
    [
        "transformer/config.json",
        "transformer_2/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ],
)
def test_an_absent_file_is_missing_by_name(file: str, copy: Path) -> None:
    (copy / file).unlink()
    with pytest.raises(WeightsMissing, match=f"{file} is not there"):
        open_model(copy, TINY_T2V)


def test_a_pickle_is_named_and_not_read(copy: Path) -> None:
    (copy / DIT_FILE).rename(copy / "transformer/diffusion_pytorch_model.bin")
    with pytest.raises(WeightsMissing, match=r"model\.bin is a pickle, which is never read"):
        open_model(copy, TINY_T2V)


@pytest.mark.parametrize("left_bytes", [0, 5, 100, -1])
def test_a_truncated_file_is_broken_and_tells_both_sizes(left_bytes: int, copy: Path) -> None:
    """Cut within the length, within the header, and one byte before the end."""
    file = copy / DIT_FILE
    whole_bytes = file.stat().st_size
    kept_bytes = left_bytes if left_bytes >= 0 else whole_bytes + left_bytes
    os.truncate(file, kept_bytes)
    reason = str(kept_bytes) if left_bytes > 5 or left_bytes < 0 else "is not a weight file"
    with pytest.raises(WeightsBroken, match=reason) as raised:
        open_model(copy, TINY_T2V)
    if left_bytes < 0:
        assert f"truncated: {kept_bytes} bytes instead of {whole_bytes}" in raised.value.message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<html>404: not found</html>" * 20, "is not a weight file"),
        ((4).to_bytes(8, "little") + b"{ope", "header that is not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "is not a weight file"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "malformed entry for a"),
        (
            (2).to_bytes(8, "little") + b"{}" + b"rest",
            "has 14 bytes, and its header tells of only 10",
        ),
    ],
)
def test_a_file_of_another_kind_is_broken(content: bytes, reason: str, copy: Path) -> None:
    (copy / DIT_FILE).write_bytes(content)
    with pytest.raises(WeightsBroken, match=reason):
        open_model(copy, TINY_T2V)


def test_a_tensor_that_is_missing_is_named(copy: Path) -> None:
    _edit(copy / DIT_FILE, drop="blocks.1.ffn.net.2.bias")
    with pytest.raises(WeightsMissing, match=r"lacks blocks\.1\.ffn\.net\.2\.bias"):
        open_model(copy, TINY_T2V)


def test_a_tensor_that_no_network_takes_is_named(copy: Path) -> None:
    """Wan 2.1's image keys, adapters: never ignored."""
    _edit(copy / DIT_FILE, add={"blocks.0.attn2.add_k_proj.weight": torch.zeros(2)})
    with pytest.raises(WeightsBroken, match=r"holds blocks\.0\.attn2\.add_k_proj\.weight, which"):
        open_model(copy, TINY_T2V)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(copy: Path) -> None:
    _edit(copy / DIT_FILE, add={"proj_out.bias": torch.zeros(17)})
    with pytest.raises(WeightsMismatch, match=r"proj_out\.bias of shape \[17\].*needs \[16\]"):
        open_model(copy, TINY_T2V)


def test_a_dtype_that_no_weight_has_is_refused(copy: Path) -> None:
    _edit(copy / DIT_FILE, add={"proj_out.bias": torch.zeros(16, dtype=torch.int64)})
    with pytest.raises(WeightsBroken, match=r"proj_out\.bias as I64, which is not read"):
        open_model(copy, TINY_T2V)


def test_either_name_of_the_text_embedding_will_do(copy: Path, written: TinyModel) -> None:
    """transformers ties two names to one tensor; files have the first, the second, or both."""
    file = copy / "text_encoder/model.safetensors"
    table = load_file(file)["shared.weight"]
    _edit(file, add={"encoder.embed_tokens.weight": table})
    _assert_same(open_model(copy, TINY_T2V).load_umt5(CPU, torch.float32), written.umt5)
    _edit(file, drop="shared.weight")
    _assert_same(open_model(copy, TINY_T2V).load_umt5(CPU, torch.float32), written.umt5)


def test_an_index_cannot_reach_outside_its_folder(copy: Path) -> None:
    index = {"weight_map": {"proj_out.bias": "../vae/diffusion_pytorch_model.safetensors"}}
    file = copy / "transformer/diffusion_pytorch_model.safetensors.index.json"
    file.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(WeightsBroken, match="which is not a file name"):
        open_model(copy, TINY_T2V)


def test_an_index_that_places_a_tensor_wrongly_is_broken(copy: Path) -> None:
    index = {"weight_map": {"no.such.tensor": "diffusion_pytorch_model.safetensors"}}
    file = copy / "transformer/diffusion_pytorch_model.safetensors.index.json"
    file.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(WeightsBroken, match=r"lacks no\.such\.tensor, which .* places there"):
        open_model(copy, TINY_T2V)


@pytest.mark.parametrize("content", ["{", "[1]", '"text"'])
def test_a_config_that_is_not_json_is_broken(content: str, copy: Path) -> None:
    (copy / "vae/config.json").write_text(content, encoding="utf-8")
    with pytest.raises(WeightsBroken, match=r"vae/config\.json"):
        open_model(copy, TINY_T2V)


def test_a_tokenizer_larger_than_the_text_encoder_does_not_fit(
    written: TinyModel, tmp_path: Path
) -> None:
    small = replace(TINY_T2V, umt5=replace(TINY_T2V.umt5, vocab_size=10))
    model = write_tiny(tmp_path / "small", small)
    with pytest.raises(WeightsMismatch, match=r"knows 16 tokens, .* has 10"):
        open_model(model.path, small).tokenizer()


def test_another_model_is_told_by_its_config(copy: Path) -> None:
    """The answer to a wrong directory names both models, and the field that differs."""
    _set(copy / "transformer/config.json", in_channels=36)
    with pytest.raises(WeightsMismatch, match="in_channels 36 instead of 4"):
        open_model(copy, TINY_T2V)
    with pytest.raises(
        WeightsMismatch,
        match="t2v-a14b was asked for, and this transformer is that of i2v-a14b:"
        " in_channels 36 instead of 16",
    ):
        check_config(dit_config(I2V_A14B.dit), T2V_A14B, "transformer")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("boundary_ratio", None, "boundary_ratio None, and tiny-t2v has 0.875"),
        ("expand_timesteps", True, "expand_timesteps True, and tiny-t2v is t2v"),
    ],
)
def test_another_kind_of_model_is_told_by_the_index(
    field: str, value: Any, reason: str, copy: Path
) -> None:
    _set(copy / "model_index.json", **{field: value})
    with pytest.raises(WeightsMismatch, match=reason):
        open_model(copy, TINY_T2V)


@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.name)
def test_every_model_accepts_its_own_configs_and_no_other(spec: ModelSpec) -> None:
    check_config(dit_config(spec.dit), spec, "transformer")
    check_config(vae_config(spec.vae), spec, "vae")
    check_config(umt5_config(spec.umt5), spec, "text_encoder")
    for other in MODELS:
        if other.dit != spec.dit:
            with pytest.raises(WeightsMismatch, match=f"transformer is that of {other.name}"):
                check_config(dit_config(other.dit), spec, "transformer")


def test_published_configs_are_accepted() -> None:
    """Sparse where diffusers' defaults hold, with fields of their own where they do not."""
    check_config({"_class_name": "AutoencoderKLWan"}, T2V_A14B, "vae")
    published = vae_config(TI2V_5B.vae) | {"clip_output": False, "latents_mean": [
        mean + 1e-9 for mean in TI2V_5B.vae.latents_mean
    ]}  # fmt: skip
    check_config(published, TI2V_5B, "vae")
    transformer = dit_config(TI2V_5B.dit)
    del transformer["rope_max_seq_len"], transformer["image_dim"], transformer["patch_size"]
    check_config(transformer, TI2V_5B, "transformer")


def test_wan_2_1_with_its_image_encoder_is_refused() -> None:
    config = dit_config(I2V_A14B.dit) | {"image_dim": 1280, "added_kv_proj_dim": 5120}
    with pytest.raises(WeightsMismatch, match="added_kv_proj_dim 5120 instead of None"):
        check_config(config, I2V_A14B, "transformer")


def test_latent_statistics_of_another_vae_are_refused() -> None:
    config = vae_config(TI2V_5B.vae) | {"latents_std": [1.0] * 48}
    with pytest.raises(WeightsMismatch, match="latents_std"):
        check_config(config, TI2V_5B, "vae")


def test_writing_replaces_a_model_and_leaves_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    first = write_tiny(tmp_path / "models/m", TINY_TI2V, seed=1)
    loaded = open_model(first.path, TINY_TI2V).load_vae(CPU, torch.float32)
    second = write_tiny(tmp_path / "models/m", TINY_TI2V, seed=2)
    again = open_model(second.path, TINY_TI2V).load_vae(CPU, torch.float32)
    _assert_same(again, second.vae)
    _assert_same(loaded, first.vae)  # its files are gone by name, but still mapped
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"m", "m-tokenizer.json"}


def test_a_failed_write_leaves_what_was_there(written: TinyModel, copy: Path) -> None:
    """Here the tokenizer cannot be copied, after all weights were written."""
    before = _snapshot(copy)
    with pytest.raises(FileNotFoundError):
        write_directory(
            copy, TINY_T2V, umt5=written.umt5, dits=written.dits, vae=written.vae,
            tokenizer_json=copy / "absent.json",
        )  # fmt: skip
    assert _snapshot(copy) == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_something_else_is_never_overwritten(written: TinyModel, tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday/photo.jpg").write_text("dear", encoding="utf-8")
    tokenizer_json = tmp_path / "tokenizer.json"
    tokenizer_json.write_text(json.dumps(tiny_tokenizer()), encoding="utf-8")
    with pytest.raises(BadOutput, match="holiday is there and is not a model directory"):
        write_directory(
            tmp_path / "holiday", TINY_T2V, umt5=written.umt5, dits=written.dits,
            vae=written.vae, tokenizer_json=tokenizer_json,
        )  # fmt: skip
    assert (tmp_path / "holiday/photo.jpg").read_text(encoding="utf-8") == "dear"


def _assert_same(ours: torch.nn.Module, expected: torch.nn.Module) -> None:
    found, wanted = ours.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def _edit(file: Path, *, add: dict[str, Tensor] | None = None, drop: str = "") -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors.pop(drop, None)
    save_file(tensors | (add or {}), file, metadata={"format": "pt"})


def _set(file: Path, **fields: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | fields), encoding="utf-8")


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
