"""Which files make up a model, whatever their layout; and what is wrong with those that do not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoints import (
    WIDE_T2V,
    Files,
    Weights,
    gguf_named,
    meta_weights,
    named,
    plain,
    random_weights,
    save_gguf,
    save_safetensors,
    tiny_spiece,
    write_all_in_one,
    write_comfy,
    write_diffusers,
    write_gguf,
    write_json,
    write_kijai,
    write_lightx2v,
    write_official,
)
from tests.engine.tiny_models import TINY_I2V, TINY_T2V, TINY_TI2V, tiny_tokenizer
from wanfit.engine.weights.checkpoint import Chosen, choose, open_parts
from wanfit.engine.weights.files import ModelFiles
from wanfit.engine.weights.open import open_model
from wanfit.engine.weights.parts import Part
from wanfit.errors import (
    BadOption,
    WeightsBroken,
    WeightsError,
    WeightsMismatch,
    WeightsMissing,
)
from wanfit.specs import I2V_A14B, T2V_A14B, TI2V_5B

FP16 = plain(torch.float16)


@pytest.fixture
def comfy(tmp_path: Path) -> Path:
    """A tiny T2V as ComfyUI has it, fp16."""
    write_comfy(tmp_path / "models", TINY_T2V)
    return tmp_path / "models"


def one(folder: Path, pattern: str) -> Path:
    (found,) = folder.rglob(pattern)
    return found


def edited(file: Path, change: Callable[[Files], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_safetensors(file, tensors)


def opened(path: Path, **given: Path) -> ModelFiles:
    return open_parts(choose(path, TINY_T2V, **given))


class TestChoosing:
    def test_every_network_comes_from_its_folder(self, comfy: Path) -> None:
        chosen = choose(comfy, TINY_T2V)
        found = {network: part.path.name for network, part in chosen.networks.items()}
        assert found == {
            "umt5": "umt5_xxl_fp16.safetensors",
            "high_noise": "wan2.2_t2v_high_noise_14B_fp16.safetensors",
            "low_noise": "wan2.2_t2v_low_noise_14B_fp16.safetensors",
            "vae": "wan_2.1_vae.safetensors",
        }
        assert isinstance(chosen.tokenizer, Part)

    def test_loras_and_strangers_beside_do_not_matter(self, comfy: Path) -> None:
        pair = {
            f"diffusion_model.blocks.0.ffn.0.lora_{ab}.weight": torch.zeros(2, 2) for ab in "AB"
        }
        save_safetensors(comfy / "loras/wan2.2_t2v_high_noise_lora.safetensors", pair)
        save_safetensors(comfy / "checkpoints/sdxl.safetensors", {"model.x": torch.zeros(2)})
        (comfy / "vae/broken.safetensors").write_bytes(b"<html>")
        (comfy / "notes.txt").write_text("mine")
        assert choose(comfy, TINY_T2V).networks.keys() == {"umt5", "high_noise", "low_noise", "vae"}

    def test_one_folder_will_do(self, comfy: Path, tmp_path: Path) -> None:
        flat = tmp_path / "flat"
        flat.mkdir()
        for file in comfy.rglob("*.safetensors"):
            file.rename(flat / file.name)
        assert open_model(flat, TINY_T2V).entries("low_noise")

    def test_parts_of_different_formats(self, comfy: Path, tmp_path: Path) -> None:
        """A GGUF expert, an fp8 one, an official VAE, and ComfyUI's text encoder and tokenizer."""
        write_gguf(tmp_path / "gguf", WIDE_T2V, umt5=False)
        write_kijai(tmp_path / "kijai", WIDE_T2V)
        write_official(tmp_path / "official", WIDE_T2V)
        write_comfy(tmp_path / "wide", WIDE_T2V)
        chosen = choose(
            one(tmp_path / "gguf", "*HighNoise*.gguf"),
            WIDE_T2V,
            low=one(tmp_path / "kijai", "*LOW*"),
            vae=tmp_path / "official/Wan2.1_VAE.pth",
            text_encoder=one(tmp_path / "wide", "umt5*"),
        )
        storages = {network: part.storage for network, part in chosen.networks.items()}
        assert storages == {
            "umt5": "fp16", "high_noise": "Q8_0 + fp16", "low_noise": "fp8 scaled + bf16",
            "vae": "fp32",
        }  # fmt: skip
        assert not chosen.is_plain
        files = open_parts(chosen)
        assert files.entries("high_noise")["blocks.0.ffn.up.weight"].dtype == "Q8_0"
        assert files.tokenizer().encode("a red star").ids[-1] == 1

    def test_an_option_stands_for_what_the_directory_has(self, comfy: Path, tmp_path: Path) -> None:
        write_official(tmp_path / "official", TINY_T2V)
        vae = tmp_path / "official/Wan2.1_VAE.pth"
        assert choose(comfy, TINY_T2V, vae=vae).networks["vae"].path == vae
        folder = tmp_path / "official/low_noise_model"
        assert choose(comfy, TINY_T2V, low=folder).networks["low_noise"].storage == "fp32"

    def test_several_candidates_are_listed_with_the_option(self, comfy: Path) -> None:
        high = one(comfy, "*high*")
        shutil.copy(high, high.with_name("wan_high_noise_other.safetensors"))
        with pytest.raises(WeightsMismatch, match="2 files for the high-noise expert") as raised:
            choose(comfy, TINY_T2V)
        assert "--high" in raised.value.hint
        assert "wan_high_noise_other" in raised.value.message
        assert choose(comfy, TINY_T2V, high=high).networks["high_noise"].path == high

    def test_links_to_one_file_are_one_candidate(self, comfy: Path) -> None:
        """As the hub's cache has them, or a volume that is mounted twice."""
        (comfy / "unet").mkdir()
        high = one(comfy, "*high*")
        (comfy / "unet" / high.name).symlink_to(high)
        assert choose(comfy, TINY_T2V).networks["high_noise"].expert == "high_noise"

    def test_an_expert_without_a_name_asks_for_the_option(self, comfy: Path) -> None:
        one(comfy, "*low*").rename(comfy / "diffusion_models/wan_other.safetensors")
        with pytest.raises(WeightsMissing, match=r"wan_other\.safetensors") as raised:
            choose(comfy, TINY_T2V)
        assert "--low" in raised.value.hint
        assert opened(comfy, low=comfy / "diffusion_models/wan_other.safetensors")

    def test_swapped_experts_are_told_by_their_names(self, comfy: Path) -> None:
        high, low = one(comfy, "*high*"), one(comfy, "*low*")
        with pytest.raises(WeightsMismatch, match="its name says that it is the low-noise expert"):
            choose(comfy, TINY_T2V, high=low, low=high)

    @pytest.mark.parametrize("how", ["link", "copy", "the same file twice"])
    def test_one_file_is_not_both_experts(self, how: str, comfy: Path) -> None:
        high, low = one(comfy, "*high*"), one(comfy, "*low*")
        low.unlink()
        given = {}
        if how == "link":
            low.symlink_to(high)
        elif how == "copy":
            shutil.copy(high, low)
        else:
            plain_name = high.rename(high.with_name("wan.safetensors"))
            given = {"high": plain_name, "low": plain_name}
        with pytest.raises(WeightsMismatch, match="Both experts come from the same weights"):
            opened(comfy, **given)

    def test_a_missing_network_is_named_with_the_option(self, comfy: Path) -> None:
        one(comfy, "wan_2.1_vae*").unlink()
        with pytest.raises(WeightsMissing, match="has no VAE of tiny-t2v") as raised:
            choose(comfy, TINY_T2V)
        assert "--vae" in raised.value.hint

    def test_a_broken_file_in_the_place_of_a_network_is_the_reason(self, comfy: Path) -> None:
        vae = one(comfy, "wan_2.1_vae*")
        os.truncate(vae, vae.stat().st_size - 1)
        with pytest.raises(WeightsBroken, match=r"wan_2\.1_vae.* is truncated"):
            choose(comfy, TINY_T2V)

    def test_a_dense_model_takes_no_second_expert(self, tmp_path: Path) -> None:
        write_comfy(tmp_path, TINY_TI2V)
        with pytest.raises(BadOption, match="--low was given, and tiny-ti2v has one transformer"):
            choose(tmp_path, TINY_TI2V, low=one(tmp_path, "*5B*"))

    def test_a_lora_is_no_expert(self, comfy: Path) -> None:
        lora = comfy / "loras/wan_high.safetensors"
        save_safetensors(lora, {
            f"blocks.0.ffn.0.lora_{ab}.weight": torch.zeros(2, 2) for ab in "AB"
        })  # fmt: skip
        with pytest.raises(WeightsMismatch, match="high-noise expert"):
            choose(comfy, TINY_T2V, high=lora)

    def test_an_absent_path_is_missing(self, tmp_path: Path) -> None:
        for path in (tmp_path / "nowhere", tmp_path / "nowhere.gguf"):
            with pytest.raises(WeightsMissing, match="nowhere"):
                choose(path, TINY_T2V)

    def test_an_empty_directory_has_nothing(self, tmp_path: Path) -> None:
        for spec in (None, TINY_T2V):
            with pytest.raises(WeightsMissing, match=str(tmp_path)):
                choose(tmp_path, spec)


class TestTheModel:
    """Which one it is, and that it is the one that was asked for. At full size, as holes."""

    def test_another_model_is_named_with_the_one_that_was_asked_for(self, tmp_path: Path) -> None:
        write_comfy(tmp_path, I2V_A14B, weights=meta_weights(I2V_A14B))
        with pytest.raises(WeightsMismatch) as raised:
            choose(tmp_path, T2V_A14B)
        assert "i2v-a14b's high-noise expert, and t2v-a14b was asked for" in raised.value.message

    def test_an_expert_of_another_model_is_named(self, tmp_path: Path) -> None:
        write_official(tmp_path / "t2v", T2V_A14B, weights=meta_weights(T2V_A14B))
        write_comfy(tmp_path / "i2v", I2V_A14B, weights=meta_weights(I2V_A14B))
        with pytest.raises(WeightsMismatch, match="i2v-a14b's low-noise expert, and t2v-a14b"):
            choose(tmp_path / "t2v", T2V_A14B, low=one(tmp_path / "i2v", "*low*"))

    def test_a_vae_of_another_model_is_named(self, tmp_path: Path) -> None:
        write_official(tmp_path / "t2v", T2V_A14B, weights=meta_weights(T2V_A14B))
        write_official(tmp_path / "ti2v", TI2V_5B, weights=meta_weights(TI2V_5B))
        with pytest.raises(WeightsMismatch, match="ti2v-5b's VAE, and t2v-a14b was asked for"):
            choose(tmp_path / "t2v", T2V_A14B, vae=tmp_path / "ti2v/Wan2.2_VAE.pth")

    def test_two_models_in_one_place_need_a_name(self, tmp_path: Path) -> None:
        for spec in (T2V_A14B, I2V_A14B):
            write_comfy(tmp_path, spec, weights=meta_weights(spec))
        with pytest.raises(WeightsMismatch, match="transformers of t2v-a14b, i2v-a14b") as raised:
            choose(tmp_path)
        assert "--model" in raised.value.hint
        assert choose(tmp_path, I2V_A14B).networks["high_noise"].models == (I2V_A14B,)

    def test_an_official_config_of_another_model_is_refused(self, tmp_path: Path) -> None:
        write_official(tmp_path, TINY_T2V)
        config = tmp_path / "low_noise_model/config.json"
        config.write_text(json.dumps({"_class_name": "WanModel", "model_type": "i2v"}))
        with pytest.raises(WeightsMismatch, match="model_type i2v, and tiny-t2v has t2v"):
            choose(tmp_path, TINY_T2V)


class TestTheTokenizer:
    def test_a_file_beside_the_weights_goes_before_one_within(self, comfy: Path) -> None:
        write_json(comfy / "tokenizer/tokenizer.json", tiny_tokenizer())
        assert choose(comfy, TINY_T2V).tokenizer == comfy / "tokenizer/tokenizer.json"

    @pytest.mark.parametrize(
        "place", ["tokenizer", "google/umt5-xxl", ".", "text_encoders", "text_encoders/tokenizer"]
    )
    @pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
    def test_it_is_found_where_people_have_it(self, place: str, name: str, comfy: Path) -> None:
        edited(one(comfy, "umt5*"), lambda tensors: tensors.pop("spiece_model"))
        folder = comfy / place
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(tiny_tokenizer()).encode()
        (folder / name).write_bytes(tiny_spiece() if name == "spiece.model" else content)
        files = opened(comfy)
        assert files.tokenizer().encode("a red star").ids[-1] == 1
        assert json.loads(files.tokenizer_json())["model"]["vocab"]

    def test_one_that_was_given_goes_first(self, comfy: Path, tmp_path: Path) -> None:
        write_json(comfy / "tokenizer/tokenizer.json", tiny_tokenizer())
        (tmp_path / "mine.model").write_bytes(tiny_spiece())
        files = opened(comfy, tokenizer=tmp_path / "mine.model")
        expected = opened_vocabulary(comfy)
        assert files.tokenizer().encode("a red circles").ids == expected
        with pytest.raises(WeightsMissing, match="nothing"):
            opened(comfy, tokenizer=tmp_path / "nothing")

    def test_without_any_there_is_an_error(self, comfy: Path) -> None:
        edited(one(comfy, "umt5*"), lambda tensors: tensors.pop("spiece_model"))
        with pytest.raises(WeightsMissing, match="carries no vocabulary") as raised:
            choose(comfy, TINY_T2V)
        assert "--tokenizer" in raised.value.hint


class TestOpening:
    """Every tensor is held against the network."""

    def test_a_missing_tensor_is_named(self, comfy: Path) -> None:
        edited(one(comfy, "*high*"), lambda tensors: tensors.pop("blocks.1.norm3.bias"))
        with pytest.raises(WeightsMissing, match=r"high_noise.* lacks blocks\.1\.norm3\.bias"):
            opened(comfy)

    @pytest.mark.parametrize(
        ("pattern", "extra"),
        [
            ("*high*", "blocks.0.self_attn.norm_x.weight"),
            ("*high*", "blocks.3.norm3.weight"),
            ("umt5*", "encoder.block.0.layer.2.layer_norm.weight"),
            ("wan_2.1_vae*", "decoder.extra.weight"),
        ],
    )
    def test_a_tensor_of_no_network_is_named(self, pattern: str, extra: str, comfy: Path) -> None:
        """Never ignored. A fourth block makes a transformer of another model of it."""
        edited(one(comfy, pattern), lambda tensors: tensors.update({extra: torch.zeros(2)}))
        with pytest.raises(WeightsError) as raised:
            opened(comfy)
        assert extra in str(raised.value) or "4 blocks" in str(raised.value)

    def test_the_other_naming_is_not_mixed_in(self, comfy: Path) -> None:
        def change(tensors: Files) -> None:
            tensors["blocks.0.attn1.to_q.weight"] = tensors.pop("blocks.0.self_attn.q.weight")

        edited(one(comfy, "*high*"), change)
        with pytest.raises(WeightsMissing, match=r"lacks blocks\.0\.self_attn\.q\.weight"):
            opened(comfy)

    def test_another_shape_is_named_with_both(self, comfy: Path) -> None:
        def change(tensors: Files) -> None:
            tensors["blocks.0.self_attn.q.weight"] = torch.zeros(32, 31)

        edited(one(comfy, "*high*"), change)
        with pytest.raises(WeightsMismatch, match=r"shape \[32, 31\].* needs \[32, 32\]"):
            opened(comfy)

    def test_a_transposed_weight_is_another_shape(self, comfy: Path) -> None:
        """Though it has as many values; only GGUF loses shapes."""

        def change(tensors: Files) -> None:
            tensors["blocks.0.ffn.0.weight"] = tensors["blocks.0.ffn.0.weight"].T.contiguous()

        edited(one(comfy, "*high*"), change)
        with pytest.raises(WeightsMismatch, match=r"shape \[32, 40\].* needs \[40, 32\]"):
            opened(comfy)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8])
    def test_a_dtype_of_no_weight_is_named(self, dtype: torch.dtype, comfy: Path) -> None:
        """int8 has no meaning without a scale."""

        def change(tensors: Files) -> None:
            tensors["head.head.bias"] = tensors["head.head.bias"].to(dtype)

        edited(one(comfy, "*high*"), change)
        with pytest.raises(WeightsBroken, match=r"head\.head\.bias as (I64|I8|U8)"):
            opened(comfy)

    def test_gguf_may_have_lost_sides_of_one(self, tmp_path: Path) -> None:
        """The patch embedding as a matrix, and the modulation without its first side."""
        weights = random_weights(WIDE_T2V)
        write_gguf(tmp_path, WIDE_T2V, weights=weights)
        file = one(tmp_path, "*HighNoise*.gguf")
        kind = gguf.GGMLQuantizationType.Q8_0
        tensors, held = gguf_named(WIDE_T2V, "high_noise", weights, kind)
        for name in tensors:
            data, stored, shape = tensors[name]
            if name == "patch_embedding.weight":
                tensors[name] = (data, stored, (shape[0] * shape[1], *shape[2:]))
            elif "modulation" in name:
                tensors[name] = (data, stored, shape[1:])
        save_gguf(file, tensors, "wan")
        entries = open_model(tmp_path, WIDE_T2V).entries("high_noise")
        assert {name: entry.shape for name, entry in entries.items()} == {
            name: tuple(value.shape) for name, value in held.items()
        }

    def test_a_missing_shard_is_named(self, tmp_path: Path) -> None:
        write_official(tmp_path, TINY_T2V, num_shards=3)
        one(tmp_path / "low_noise_model", "*-00003-*").unlink()
        with pytest.raises(WeightsMissing, match=r"00003-of-00003\.safetensors is not there, 1 of"):
            choose(tmp_path, TINY_T2V)

    def test_a_missing_block_file_is_named(self, tmp_path: Path) -> None:
        write_lightx2v(tmp_path, TINY_T2V, by_block=True)
        (tmp_path / "high_noise_model/block_1.safetensors").unlink()
        with pytest.raises(WeightsMissing, match=r"block_1\.safetensors is not there, 1 of 4"):
            choose(tmp_path, TINY_T2V)

    def test_shards_without_their_index_are_told(self, tmp_path: Path) -> None:
        write_official(tmp_path, TINY_T2V, num_shards=3)
        one(tmp_path / "high_noise_model", "*.index.json").unlink()
        with pytest.raises(WeightsError, match="is one of 3 shards, and no index lists it"):
            open_model(tmp_path, TINY_T2V)

    def test_every_error_is_one_line(self, tmp_path: Path) -> None:
        """However many names there are to list."""
        weights: Weights = random_weights(TINY_T2V)
        write_comfy(tmp_path, TINY_T2V, weights=weights)
        tensors, _ = named(TINY_T2V, "high_noise", weights, "official", FP16)
        extra: dict[str, Tensor] = {f"extra.{i}.weight": torch.zeros(1) for i in range(100)}
        save_safetensors(one(tmp_path, "*high*"), tensors | extra)
        with pytest.raises(WeightsBroken, match=r"extra\.0\.weight.* and 97 more") as raised:
            open_model(tmp_path, TINY_T2V)
        assert "\n" not in str(raised.value)


def test_an_all_in_one_file_is_chosen_by_its_path(tmp_path: Path) -> None:
    write_all_in_one(tmp_path / "all.safetensors", TINY_TI2V)
    chosen: Chosen = choose(tmp_path / "all.safetensors", TINY_TI2V)
    assert {part.path.name for part in chosen.networks.values()} == {"all.safetensors"}
    assert open_parts(chosen).tokenizer().encode("a red star").ids[-1] == 1


def test_diffusers_folders_may_be_replaced_in_part(tmp_path: Path) -> None:
    write_diffusers(tmp_path / "diffusers", TINY_I2V)
    write_comfy(tmp_path / "comfy", TINY_I2V)
    high = one(tmp_path / "comfy", "*high*")
    chosen = choose(tmp_path / "diffusers", TINY_I2V, high=high)
    namings = {network: part.naming for network, part in chosen.networks.items()}
    assert namings == {
        "umt5": "diffusers", "high_noise": "official", "low_noise": "diffusers", "vae": "diffusers",
    }  # fmt: skip
    assert open_parts(chosen).entries("high_noise")["head.linear.bias"].file == high


def test_other_models_do_not_hide_ours(tmp_path: Path) -> None:
    """A big directory with models of everybody."""
    write_comfy(tmp_path / "ComfyUI/models", TINY_T2V)
    other = replace(TINY_T2V, name="other", dit=replace(TINY_T2V.dit, num_blocks=2))
    write_comfy(tmp_path / "other", other)
    for folder in ("vae", "text_encoders"):
        shutil.rmtree(tmp_path / "other" / folder)
    chosen = choose(tmp_path, TINY_T2V)
    assert all("ComfyUI" in str(part.path) for part in chosen.networks.values())


def opened_vocabulary(comfy: Path) -> tuple[int, ...]:
    """The ids of "a red circles" by the vocabulary in ComfyUI's text encoder."""
    shutil.rmtree(comfy / "tokenizer")
    return opened(comfy).tokenizer().encode("a red circles").ids
