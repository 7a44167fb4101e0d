"""LoRA files: for which expert they are, how they are scaled, and which of them are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.engine.tiny_models import (
    TINY_I2V,
    TINY_T2V,
    TINY_TI2V,
)
from tests.lora_files import (
    Style,
    added,
    assert_merged,
    attention_keys,
    lora_tensors,
    merged,
    random_adapters,
    tiny_weights,
    write_adapter_config,
    write_lora,
    write_sparse,
)
from wanfit.engine.weights.lora import Merge, merge_for, read_lora
from wanfit.engine.weights.lora_file import distilled_hint
from wanfit.engine.weights.lora_fit import models_of
from wanfit.engine.weights.naming import expert_word
from wanfit.errors import BadOption, WeightsBroken, WeightsError, WeightsMismatch, WeightsMissing
from wanfit.specs import I2V_A14B, T2V_A14B, TI2V_5B, ModelSpec

TINY = (TINY_T2V, TINY_I2V, TINY_TI2V)
WIDE = replace(TINY_T2V, name="tiny-wide", dit=replace(TINY_T2V.dit, num_heads=3))
MODULE = "blocks.1.ffn.down"
WEIGHT = f"{MODULE}.weight"


class TestScaleOfPeft:
    """tuners/lora/layer.py: lora_alpha / r, or lora_alpha / sqrt(r) when rank-stabilised."""

    def factors(self, file: Path) -> dict[str, float]:
        merge = merge_for(TINY_TI2V, both=[(file, 1.0)])
        changes = merge.adapters[0].changes
        return {name: change.factor for name, (change,) in changes.items()}

    def test_adapter_config_says_it(self, tmp_path: Path) -> None:
        adapters = random_adapters(TINY_TI2V, rank=16)
        file = write_lora(tmp_path / "adapter_model.safetensors", adapters, "raw-peft")
        write_adapter_config(tmp_path, adapters, lora_alpha=32)
        assert set(self.factors(file).values()) == {2.0}
        write_adapter_config(tmp_path, adapters, lora_alpha=32, use_rslora=True)
        assert set(self.factors(file).values()) == {8.0}

    def test_alpha_patterns_name_ends_of_modules(self, tmp_path: Path) -> None:
        adapters = random_adapters(TINY_TI2V, rank=4)
        file = write_lora(tmp_path / "adapter_model.safetensors", adapters, "raw-peft")
        write_adapter_config(tmp_path, adapters, lora_alpha=4, alpha_pattern={"ffn.2": 12})
        factors = self.factors(file)
        assert factors.pop("blocks.0.ffn.down.weight") == factors.pop(WEIGHT) == 3.0
        del factors["blocks.2.ffn.down.weight"]
        assert set(factors.values()) == {1.0}

    def test_without_it_nothing_is_guessed(self, tmp_path: Path) -> None:
        file = tmp_path / "adapter_model.safetensors"
        save_file(lora_tensors(random_adapters(TINY_TI2V, rank=16), "raw-peft"), file)
        with pytest.raises(
            WeightsMissing, match=r"adapter_config\.json, which says its scale"
        ) as e:
            read_lora(file)
        assert '{"lora_alpha": 16, "use_rslora": false} is 1 at this rank of 16' in e.value.hint

    def test_alphas_in_the_file_come_first(self, tmp_path: Path) -> None:
        adapters = random_adapters(TINY_TI2V, rank=4, alpha=1.0)
        file = write_lora(tmp_path / "lora.safetensors", adapters, prefix="base_model.model.")
        assert set(self.factors(file).values()) == {0.25}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"lora_alpha": None}, "has None as lora_alpha of all modules"),
            ({"lora_alpha": True}, "has True as lora_alpha"),
            (
                {"alpha_pattern": {"blocks.0.ffn.2": "x"}},
                r"has 'x' as lora_alpha of blocks\.0\.ffn\.2",
            ),
            ({"alpha_pattern": {"(a+)+": 1}}, "which is not understood"),
            ({"alpha_pattern": [1]}, "alpha_pattern that is not an object"),
            ({"peft_type": "LOKR"}, "peft_type 'LOKR'"),
        ],
    )
    def test_settings_that_mean_nothing(
        self, changes: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        adapters = random_adapters(TINY_TI2V)
        file = write_lora(tmp_path / "adapter_model.safetensors", adapters, "raw-peft")
        write_adapter_config(tmp_path, adapters, **changes)
        with pytest.raises(WeightsBroken, match=message):
            read_lora(file)

    def test_metadata_that_is_no_json(self, tmp_path: Path) -> None:
        file = tmp_path / "lora.safetensors"
        tensors = lora_tensors(random_adapters(TINY_TI2V), "diffusers")
        save_file(tensors, file, {"lora_adapter_metadata": "[1"})
        with pytest.raises(WeightsBroken, match="lora_adapter_metadata that is not a JSON object"):
            read_lora(file)


class TestExperts:
    @pytest.mark.parametrize(
        ("path", "expert"),
        [
            ("wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217.sft", "high_noise"),
            ("wan2.2_i2v_A14b_low_noise_lora_rank64_lightx2v_4step_1022.sft", "low_noise"),
            ("Wan22_A14B_T2V_HIGH_Lightning_4steps_lora_250928_rank128_fp16.sft", "high_noise"),
            ("Wan22_A14B_T2V_LOW_Lightning_4steps_lora_250928_rank64_fp16.sft", "low_noise"),
            ("Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/low_noise_model.sft", "low_noise"),
            ("HighNoise/style.safetensors", "high_noise"),
            ("loras/myLowNoise.safetensors", "low_noise"),
            ("high_noise/my_low_noise_lora.safetensors", "low_noise"),  # the file's name first
            ("high_low/style.safetensors", None),
            ("loras/slow_motion_highway.safetensors", None),
            ("style.safetensors", None),
        ],
    )  # fmt: skip
    def test_names(self, path: str, expert: str | None) -> None:
        assert expert_word(Path(path)) == expert

    def changed(self, merge: Merge) -> set[str]:
        return {e for e in ("high_noise", "low_noise") if merge.touches(e, WEIGHT)}

    def test_one_file_goes_to_both_or_where_it_is_told(self, tmp_path: Path) -> None:
        file = write_lora(tmp_path / "style.safetensors", random_adapters(TINY_T2V))
        given = [(file, 1.0)]
        assert self.changed(merge_for(TINY_T2V, both=given)) == {"high_noise", "low_noise"}
        assert self.changed(merge_for(TINY_T2V, high=given)) == {"high_noise"}
        assert self.changed(merge_for(TINY_T2V, low=given)) == {"low_noise"}

    def test_names_tell_two_files_apart(self, tmp_path: Path) -> None:
        high, low = random_adapters(TINY_T2V, seed=1), random_adapters(TINY_T2V, seed=2)
        high_file = write_lora(tmp_path / "high_noise_model.safetensors", high)
        low_file = write_lora(tmp_path / "low_noise_model.safetensors", low)
        for both in ([(high_file, 1.0), (low_file, 1.0)], [(tmp_path, 1.0)]):
            merge = merge_for(TINY_T2V, both=both)
            for expert, adapters in (("high_noise", high), ("low_noise", low)):
                wanted = tiny_weights(TINY_T2V)[WEIGHT].double() + added(adapters, WEIGHT)
                found = merge.apply(expert, WEIGHT, 0, tiny_weights(TINY_T2V)[WEIGHT])  # type: ignore[arg-type]
                assert_merged({WEIGHT: found}, {WEIGHT: wanted})

    def test_one_experts_file_for_both_must_be_said(self, tmp_path: Path) -> None:
        file = write_lora(tmp_path / "style_HIGH.safetensors", random_adapters(TINY_T2V))
        given = [(file, 1.0)]
        with pytest.raises(
            BadOption, match=r"for the high_noise expert by its name .* --lora-high"
        ):
            merge_for(TINY_T2V, both=given)
        merge = merge_for(TINY_T2V, high=given, low=given)
        assert self.changed(merge) == {"high_noise", "low_noise"}

    def test_keys_of_both_transformers_go_to_each(self, tmp_path: Path) -> None:
        """diffusers: transformer is the high-noise expert, transformer_2 the low-noise one."""
        high, low = random_adapters(TINY_T2V, seed=1), random_adapters(TINY_T2V, seed=2)
        tensors = lora_tensors(high, "diffusers")
        tensors |= lora_tensors(low, "diffusers", prefix="transformer_2.")
        file = tmp_path / "lora.safetensors"
        save_file(tensors, file)
        merge = merge_for(TINY_T2V, both=[(file, 1.0)], low=[(file, 0.0)])
        weight = tiny_weights(TINY_T2V)[WEIGHT]
        for expert, adapters in (("high_noise", high), ("low_noise", low)):
            found = merge.apply(expert, WEIGHT, 0, weight)  # type: ignore[arg-type]
            assert_merged({WEIGHT: found}, {WEIGHT: weight.double() + added(adapters, WEIGHT)})
        with pytest.raises(WeightsMismatch, match="parts for two transformers, and tiny-ti2v has"):
            merge_for(TINY_TI2V, both=[(file, 1.0)])

    def test_transformer_2_alone_is_the_low_noise_expert(self, tmp_path: Path) -> None:
        tensors = lora_tensors(random_adapters(TINY_T2V), "diffusers", prefix="transformer_2.")
        file = tmp_path / "lora.safetensors"
        save_file(tensors, file)
        with pytest.raises(BadOption, match="for the low_noise expert by its name or keys"):
            merge_for(TINY_T2V, both=[(file, 1.0)])

    def test_one_transformer_takes_lora_alone(self, tmp_path: Path) -> None:
        file = write_lora(tmp_path / "high_noise.safetensors", random_adapters(TINY_TI2V))
        assert merge_for(TINY_TI2V, both=[(file, 1.0)]).touches("high_noise", WEIGHT)
        with pytest.raises(BadOption, match=r"tiny-ti2v has one transformer.*Use --lora"):
            merge_for(TINY_TI2V, high=[(file, 1.0)])

    def test_folders(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsMissing, match=r"has no \.safetensors file"):
            merge_for(TINY_T2V, both=[(tmp_path, 1.0)])
        for name in ("a_high", "b_low"):
            write_lora(tmp_path / f"{name}.safetensors", random_adapters(TINY_T2V))
        assert self.changed(merge_for(TINY_T2V, low=[(tmp_path, 1.0)])) == {"low_noise"}
        write_lora(tmp_path / "c.safetensors", random_adapters(TINY_T2V))
        with pytest.raises(WeightsMismatch, match=r"has 3 files: a_high\.safetensors, b_low"):
            merge_for(TINY_T2V, both=[(tmp_path, 1.0)])


def native(**changes: Tensor | None) -> dict[str, Tensor]:
    """A file of one module, with some tensors changed or (None) left out."""
    tensors = lora_tensors(random_adapters(TINY_TI2V, modules=[MODULE]))
    stem = "diffusion_model.blocks.1.ffn.2"
    for ending, tensor in changes.items():
        name = f"{stem}.{ending.replace('__', '.')}"
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    return tensors


class TestRefusals:
    @pytest.mark.parametrize(
        ("tensors", "message"),
        [
            (native(lora_up__weight=None), r"ffn\.2\.alpha without its other half"),
            (native(lora_down__weight=None), r"ffn\.2\.alpha without its other half"),
            (native(lora_down__weight=None, alpha=None), "lora_up.weight without its other half"),
            (
                native(lora_up__weight=None, lora_down__weight=None),
                r"ffn\.2\.alpha without its pair of matrices",
            ),
            (native(lora_up__weight=torch.ones(32, 5)), "their ranks differ"),
            (native(alpha=torch.ones(4)), r"alpha as F32 \[4\], not a number"),
            (native(alpha=torch.tensor(torch.nan)), "alpha as nan"),
            (native(alpha=torch.tensor([True])), r"alpha as BOOL \[1\], not a number"),
            (native(lora_A__weight=torch.ones(4, 40)), r"lora_A\.weight again as .*lora_down"),
            (
                native(lora_up__weight=torch.ones(32, 4).to(torch.float8_e4m3fn)),
                "lora_up.weight as F8_E4M3, which is not read here",
            ),
            (native(dora_scale=torch.ones(32, 1)), "adapter of another kind, DoRA: .*dora_scale"),
            (native(lokr_w1=torch.ones(2, 2)), "LoKr"),
            (native(hada_w1_a=torch.ones(2, 2)), "LoHa"),
            (native(oft_blocks=torch.ones(2, 2)), "OFT"),
            (native(lora_mid__weight=torch.ones(4, 4)), "LoCon"),
            (native(set_weight=torch.ones(2, 2)), "replacement of weights"),
            (native(mystery=torch.ones(2)), r"keys that no LoRA has: diffusion_model\..*\.mystery"),
            ({"blocks.0.self_attn.q.weight": torch.ones(2, 2)}, "keys that no LoRA has"),
            ({}, "holds no tensor"),
        ],
    )  # fmt: skip
    def test_what_is_not_whole_or_not_understood(
        self, tensors: dict[str, Tensor], message: str, tmp_path: Path
    ) -> None:
        file = tmp_path / "lora.safetensors"
        save_file(tensors, file)
        with pytest.raises(WeightsBroken, match=message):
            merge_for(TINY_TI2V, both=[(file, 1.0)])

    @pytest.mark.parametrize(
        ("key", "style"),
        [
            ("blocks.9.self_attn.q", "native"),
            ("blocks.0.self_attn.x", "native"),
            ("blocks.0.attn1.to_q", "native"),  # the other naming, in one file with this one
            ("blocks_0_self.attn.q", "musubi"),
            ("blocks_00_self_attn_q", "musubi"),
            ("te_text_model_encoder", "musubi"),
        ],
    )
    def test_modules_that_are_not_there_are_named(
        self, key: str, style: Style, tmp_path: Path
    ) -> None:
        """Also when all other keys fit: nothing is left out silently."""
        tensors = lora_tensors(random_adapters(TINY_TI2V), style)
        stem = f"{'lora_unet_' if style == 'musubi' else 'diffusion_model.'}{key}"
        tensors[f"{stem}.lora_down.weight"] = torch.ones(4, 32)
        tensors[f"{stem}.lora_up.weight"] = torch.ones(32, 4)
        file = tmp_path / "lora.safetensors"
        save_file(tensors, file)
        with pytest.raises(WeightsBroken, match="no module of tiny-ti2v has: ") as caught:
            merge_for(TINY_TI2V, both=[(file, 1.0)], models=TINY)
        assert stem in caught.value.message

    @pytest.mark.parametrize(
        "module",
        ["blocks.0.cross_attn.k_img", "blocks.0.cross_attn.v_img", "img_emb.proj.1",
         "blocks.0.attn2.add_k_proj", "condition_embedder.image_embedder.ff.net.2"],
    )  # fmt: skip
    @pytest.mark.parametrize("underscored", [False, True])
    def test_wan_21_image_to_video(self, module: str, underscored: bool, tmp_path: Path) -> None:
        stem = (
            f"lora_unet_{module.replace('.', '_')}" if underscored else f"diffusion_model.{module}"
        )
        tensors = native()
        tensors[f"{stem}.lora_down.weight"] = torch.ones(4, 32)
        tensors[f"{stem}.lora_up.weight"] = torch.ones(32, 4)
        file = tmp_path / "lora.safetensors"
        save_file(tensors, file)
        with pytest.raises(WeightsMismatch, match=r"made for Wan 2\.1 image-to-video"):
            read_lora(file)

    def test_another_models_shapes_are_refused_by_name(self, tmp_path: Path) -> None:
        file = write_lora(tmp_path / "lora.safetensors", random_adapters(WIDE))
        models = (WIDE, *TINY)
        message = (
            r"was made for tiny-wide, and tiny-ti2v was asked for: .* \[48, 48\], not \[32, 32\]"
        )
        with pytest.raises(WeightsMismatch, match=message):
            merge_for(TINY_TI2V, both=[(file, 1.0)], models=models)
        assert models_of(read_lora(file), models) == (WIDE,)
        with pytest.raises(WeightsMismatch, match="was made for another model, and tiny-ti2v was"):
            merge_for(TINY_TI2V, both=[(file, 1.0)], models=TINY)

    @pytest.mark.parametrize(
        ("width", "blocks", "asked", "made_for"),
        [
            (3072, 30, T2V_A14B, "ti2v-5b"),
            (5120, 40, TI2V_5B, "t2v-a14b or i2v-a14b"),
            (1536, 30, T2V_A14B, r"Wan 2\.1 T2V-1\.3B"),
        ],
    )  # fmt: skip
    def test_full_size_models(
        self, width: int, blocks: int, asked: ModelSpec, made_for: str, tmp_path: Path
    ) -> None:
        file = write_sparse(tmp_path / "lora.safetensors", attention_keys(width, blocks))
        with pytest.raises(WeightsMismatch, match=f"was made for {made_for}, and {asked.name} was"):
            merge_for(asked, both=[(file, 1.0)])

    def test_patch_embeddings_tell_text_from_image(self, tmp_path: Path) -> None:
        file = tmp_path / "lora.safetensors"
        write_sparse(file, {"diffusion_model.patch_embedding.diff": ("BF16", (5120, 36, 1, 2, 2))})
        assert models_of(read_lora(file)) == (I2V_A14B,)
        with pytest.raises(WeightsMismatch, match="was made for i2v-a14b, and t2v-a14b was asked"):
            merge_for(T2V_A14B, both=[(file, 1.0)])

    def test_two_writings_of_one_module(self, tmp_path: Path) -> None:
        tensors = native() | lora_tensors(random_adapters(TINY_TI2V, modules=[MODULE]), "musubi")
        file = tmp_path / "lora.safetensors"
        save_file(tensors, file)
        with pytest.raises(WeightsBroken, match=r"changes lora_unet_blocks_1_ffn_2\S+ twice"):
            merge_for(TINY_TI2V, both=[(file, 1.0)])

    @pytest.mark.parametrize("strength", [float("nan"), float("inf")])
    def test_a_strength_is_a_number(self, strength: float, tmp_path: Path) -> None:
        with pytest.raises(BadOption, match="no number to scale by"):
            merge_for(TINY_TI2V, both=[(tmp_path, strength)])

    def test_a_file_that_is_cut_is_told_before_and_after(self, tmp_path: Path) -> None:
        file = write_lora(
            tmp_path / "lora.safetensors", random_adapters(TINY_TI2V, modules=[MODULE])
        )
        merge = merge_for(TINY_TI2V, both=[(file, 1.0)])
        whole = file.read_bytes()
        file.write_bytes(whole[:-8])
        with pytest.raises(WeightsBroken, match="ends in diffusion_model"):
            merged(merge)
        with pytest.raises(WeightsError, match="truncated"):
            read_lora(file)


@pytest.mark.parametrize(
    ("name", "distilled"),
    [
        ("wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors", True),
        ("Wan22_A14B_T2V_HIGH_Lightning_4steps_lora_250928_rank128_fp16.safetensors", True),
        ("Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1/low_noise_model.safetensors", True),
        ("lora_24steps.safetensors", False),
        ("my_style.safetensors", False),
    ],
)
def test_distilled_adapters_are_known_by_name(name: str, distilled: bool, tmp_path: Path) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    hint = distilled_hint(read_lora(write_lora(file, random_adapters(TINY_TI2V))))
    assert (hint is not None) == distilled
