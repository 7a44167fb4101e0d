"""LoRA merges: every key style gives the same sum, of full size too, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.tiny_models import (
    TINY_I2V,
    TINY_T2V,
    TINY_TI2V,
    randomise,
    reference_class,
    reference_dit,
)
from tests.lora_files import (
    STYLES,
    WITH_DIFFS,
    Adapters,
    Pair,
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
from wanfit.engine.models.dit import Dit
from wanfit.engine.weights.directory import file_tensors
from wanfit.engine.weights.lora import merge_for, read_lora
from wanfit.engine.weights.lora_fit import models_of
from wanfit.engine.weights.lora_keys import dit_shapes, parameters_named
from wanfit.engine.weights.networks import on_meta, shapes_of
from wanfit.errors import WeightsBroken
from wanfit.specs import I2V_A14B, MODELS, T2V_A14B, ModelSpec

TINY = (TINY_T2V, TINY_I2V, TINY_TI2V)
SHAPES = shapes_of(on_meta(TINY_TI2V, "high_noise"))
MODULE = "blocks.1.ffn.down"
WEIGHT = f"{MODULE}.weight"
# One of each kind: a bias, norms, both modulations, the head, the patch embedding.
DIFFS = (
    "blocks.0.self_attn.q.bias", "blocks.0.self_attn.norm_q.weight", "blocks.2.cross_norm.weight",
    "blocks.2.cross_norm.bias", "blocks.1.modulation", "head.modulation", "head.linear.weight",
    "head.linear.bias", "patch_embed.weight", "patch_embed.bias", "time_project.bias",
)  # fmt: skip


class TestStyles:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("style", STYLES)
    def test_a_merge_is_the_sum_of_the_formula(
        self, style: Style, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        adapters = random_adapters(TINY_TI2V, dtype=dtype)
        file = write_lora(tmp_path / "lora.safetensors", adapters, style)
        found = merged(merge_for(TINY_TI2V, both=[(file, 0.7)]))
        assert_merged(
            found,
            {
                name: weight.double() + 0.7 * added(adapters, name)
                for name, weight in tiny_weights().items()
            },
        )
        assert not torch.equal(found[WEIGHT], tiny_weights()[WEIGHT])

    def test_all_styles_give_the_same_bits(self, tmp_path: Path) -> None:
        adapters = random_adapters(TINY_TI2V)
        first: dict[str, Tensor] | None = None
        for style in STYLES:
            folder = tmp_path / style
            folder.mkdir()
            file = write_lora(folder / "lora.safetensors", adapters, style)
            found = merged(merge_for(TINY_TI2V, both=[(file, 1.0)]))
            first = first or found
            assert all(torch.equal(found[name], first[name]) for name in first), style

    @pytest.mark.parametrize("style", WITH_DIFFS)
    def test_differences_are_added_to_what_they_name(self, style: Style, tmp_path: Path) -> None:
        adapters = random_adapters(TINY_TI2V, modules=["blocks.0.self_attn.q"], diffs=DIFFS)
        file = write_lora(tmp_path / "lora.safetensors", adapters, style)
        merge = merge_for(TINY_TI2V, both=[(file, -0.5)])
        assert_merged(
            merged(merge),
            {
                name: weight.double() - 0.5 * added(adapters, name)
                for name, weight in tiny_weights().items()
            },
        )
        touched = {name for name in SHAPES if merge.touches("high_noise", name)}
        assert touched == {"blocks.0.self_attn.q.weight", *DIFFS}

    def test_a_modulation_may_be_written_as_comfyui_reads_it(self, tmp_path: Path) -> None:
        adapters = random_adapters(TINY_TI2V, modules=(), diffs=["blocks.1.modulation"])
        tensor = adapters.diffs["blocks.1.modulation"]
        file = tmp_path / "lora.safetensors"
        save_file({"diffusion_model.blocks.1.modulation.diff": tensor}, file)
        found = merged(merge_for(TINY_TI2V, both=[(file, 1.0)]))["blocks.1.modulation"]
        assert torch.equal(found, tiny_weights()["blocks.1.modulation"] + tensor)

    @pytest.mark.parametrize("in_a_row", [False, True])
    def test_a_convolution_takes_its_kernel_in_a_row_or_as_it_is(
        self, in_a_row: bool, tmp_path: Path
    ) -> None:
        adapters = random_adapters(
            TINY_TI2V, modules=["patch_embed", "time_project", "head.linear"]
        )
        written = adapters
        if in_a_row:
            pair = adapters.pairs["patch_embed"]
            flat = Pair(pair.down.flatten(1), pair.up.flatten(1), pair.alpha)
            written = Adapters({**adapters.pairs, "patch_embed": flat})
        file = write_lora(tmp_path / "lora.safetensors", written)
        assert_merged(
            merged(merge_for(TINY_TI2V, both=[(file, 1.0)])),
            {
                name: weight.double() + added(adapters, name)
                for name, weight in tiny_weights().items()
            },
        )

    @pytest.mark.parametrize(
        "alpha",
        [
            torch.tensor(8),
            torch.tensor([8], dtype=torch.int32),
            torch.tensor(8, dtype=torch.uint8),
            torch.tensor(8.0),
            torch.tensor([8.0], dtype=torch.bfloat16),
            torch.tensor(8.0, dtype=torch.float16),
            torch.tensor([[8.0]], dtype=torch.float64),
        ],
        ids=lambda alpha: f"{alpha.dtype}{list(alpha.shape)}",
    )
    def test_alpha_8_at_rank_64_is_an_eighth_whatever_its_dtype(
        self, alpha: Tensor, tmp_path: Path
    ) -> None:
        """Lightning's files have INT64 scalars; without alpha they would be 8 times as strong."""
        adapters = random_adapters(TINY_TI2V, rank=64, alpha=8.0)
        file = write_lora(tmp_path / "lora.safetensors", adapters, alpha=alpha)
        merge = merge_for(TINY_TI2V, both=[(file, 1.0)])
        (change,) = merge.adapters[0].changes[WEIGHT]
        assert change.factor == 0.125
        assert_merged(
            merged(merge),
            {
                name: weight.double() + added(adapters, name)
                for name, weight in tiny_weights().items()
            },
        )

    def test_peft_scales_the_bias_of_b_too(self, tmp_path: Path) -> None:
        """tuners/lora/layer.py: base_layer.bias += lora_B.bias * scaling."""
        adapters = random_adapters(TINY_TI2V, alpha=3.0, modules=[MODULE])
        tensors = lora_tensors(adapters, "raw-peft")
        bias = torch.arange(32.0)
        tensors["base_model.model.blocks.1.ffn.2.lora_B.bias"] = bias
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        write_adapter_config(tmp_path, adapters, use_rslora=True)
        found = merged(merge_for(TINY_TI2V, both=[(tmp_path / "adapter_model.safetensors", 1.0)]))
        name = f"{MODULE}.bias"
        assert torch.equal(found[name], tiny_weights()[name] + bias * (3.0 / 4**0.5))

    def test_names_of_modules_are_unique_in_every_writing(self) -> None:
        """With underscores too: no two modules of a transformer could be mixed up."""
        for spec in MODELS:
            for naming in ("official", "diffusers"):
                for underscored in (False, True):
                    table = parameters_named(spec.dit, naming, underscored=underscored)
                    num_modulations = spec.dit.num_blocks + 1  # these have two entries
                    assert len(table) == len(dit_shapes(spec.dit)) + num_modulations
                    assert set(table.values()) == set(dit_shapes(spec.dit))

    @pytest.mark.parametrize("spec", [*MODELS, *TINY], ids=lambda spec: spec.name)
    def test_shapes_are_those_of_the_network(self, spec: ModelSpec) -> None:
        assert dict(dit_shapes(spec.dit)) == shapes_of(on_meta(spec, "high_noise"))


class TestSum:
    def files(self, folder: Path) -> list[tuple[Path, Adapters, float]]:
        result = []
        for seed, (rank, strength) in enumerate([(3, 0.8), (8, -0.4), (1, 1.3)]):
            adapters = random_adapters(TINY_TI2V, rank=rank, seed=seed, diffs=DIFFS[:4])
            file = write_lora(folder / f"{seed}.safetensors", adapters)
            result.append((file, adapters, strength))
        return result

    def test_several_adapters_add_up(self, tmp_path: Path) -> None:
        given = self.files(tmp_path)
        merge = merge_for(TINY_TI2V, both=[(file, strength) for file, _, strength in given])
        wanted = {
            name: weight.double() + sum(strength * added(lora, name) for _, lora, strength in given)
            for name, weight in tiny_weights().items()
        }
        assert_merged(merged(merge), wanted)
        assert merge.to_json()[1] == {
            "expert": "high_noise", "file": "1.safetensors", "strength": -0.4,
        }  # fmt: skip

    def test_strength_0_changes_nothing(self, tmp_path: Path) -> None:
        merge = merge_for(TINY_TI2V, both=[(file, 0.0) for file, _, _ in self.files(tmp_path)])
        assert not any(merge.touches("high_noise", name) for name in SHAPES)
        before = tiny_weights()
        assert all(torch.equal(tensor, before[name]) for name, tensor in merged(merge).items())

    def test_other_networks_are_left_alone(self, tmp_path: Path) -> None:
        merge = merge_for(TINY_TI2V, both=[(self.files(tmp_path)[0][0], 1.0)])
        for network in ("umt5", "vae", "low_noise"):
            assert not merge.touches(network, WEIGHT)

    def test_rows_that_come_in_are_not_changed(self, tmp_path: Path) -> None:
        merge = merge_for(TINY_TI2V, both=[(self.files(tmp_path)[0][0], 1.0)])
        for name in (WEIGHT, DIFFS[0]):
            rows = tiny_weights()[name]
            merge.apply("high_noise", name, 0, rows)
            assert torch.equal(rows, tiny_weights()[name])

    @given(st.data())
    @settings(max_examples=40, deadline=None)
    def test_any_cut_into_rows_in_any_order_gives_the_same(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        """Rows of two weights by turns, as no convert asks for them: what is held does not show."""
        folder = tmp_path_factory.mktemp("loras")
        merge = merge_for(TINY_TI2V, both=[(file, s) for file, _, s in self.files(folder)])
        names = ["blocks.0.ffn.up.weight", "blocks.0.self_attn.q.bias", WEIGHT]
        pieces: list[tuple[str, int, int]] = []
        for name in names:
            rows = SHAPES[name][0]
            cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1)), label=name))
            pieces += [
                (name, begin, end) for begin, end in zip([0, *cuts], [*cuts, rows], strict=True)
            ]
        before, whole = tiny_weights(), merged(merge)
        found = {name: torch.full_like(before[name], torch.nan) for name in names}
        for name, begin, end in data.draw(st.permutations(pieces), label="order"):
            found[name][begin:end] = merge.apply("high_noise", name, begin, before[name][begin:end])
        assert_merged(found, {name: whole[name].double() for name in names})

    def test_threads_may_ask_at_once(self, tmp_path: Path) -> None:
        """As convert's do: each at its own rows, of weights whose matrices push each other out."""
        merge = merge_for(TINY_TI2V, both=[(file, s) for file, _, s in self.files(tmp_path)])
        before, whole = tiny_weights(), merged(merge)
        names = [name for name in before if merge.touches("high_noise", name)]

        def rows_of(place: int) -> tuple[str, Tensor]:
            name = names[place % len(names)]
            return name, merge.apply("high_noise", name, 0, before[name])

        with ThreadPoolExecutor(4) as pool:
            for name, found in pool.map(rows_of, range(400)):
                assert torch.equal(found, whole[name])
        assert len(merge._held) == 2

    def test_the_fingerprint_changes_with_what_is_merged(self, tmp_path: Path) -> None:
        files = [file for file, _, _ in self.files(tmp_path)]
        prints = [
            merge_for(TINY_T2V, both=[(files[0], 1.0)]).fingerprint(),
            merge_for(TINY_T2V, both=[(files[0], 0.5)]).fingerprint(),
            merge_for(TINY_T2V, both=[(files[1], 1.0)]).fingerprint(),
            merge_for(TINY_T2V, high=[(files[0], 1.0)]).fingerprint(),
            merge_for(TINY_T2V).fingerprint(),
        ]
        assert len({json.dumps(one) for one in prints}) == len(prints)
        merge = merge_for(TINY_T2V, both=[(files[0], 1.0)])
        assert merge.fingerprint() == prints[0]
        files[0].unlink()
        with pytest.raises(WeightsBroken, match=r"0\.safetensors cannot be read: No such file"):
            merge.fingerprint()


class TestReference:
    """diffusers' own converter and its transformer, where it drops nothing."""

    @pytest.mark.parametrize("style", ["native", "native-ab", "musubi"])
    def test_diffusers_converter_gives_the_same_transformer(
        self, style: Style, tmp_path: Path
    ) -> None:
        diffs = () if style == "musubi" else ("blocks.0.self_attn.q.bias", "blocks.2.ffn.up.bias")
        adapters = random_adapters(TINY_TI2V, rank=8, alpha=1.0, diffs=diffs)
        file = write_lora(tmp_path / "lora.safetensors", adapters, style)
        dit = randomise(Dit(TINY_TI2V.dit), 9)
        state = {name: value.double() for name, value in reference_dit(dit).state_dict().items()}
        converted = _converter(style)(load_file(file))
        for key, value in converted.items():
            module, kind = key.removeprefix("transformer.").rsplit(".lora_", 1)
            if kind == "A.weight":
                up = converted[key.replace("lora_A", "lora_B")]
                state[f"{module}.weight"] += up.double() @ value.double()
            elif kind == "B.bias":
                state[f"{module}.bias"] += value.double()
        dit.load_state_dict(merged(merge_for(TINY_TI2V, both=[(file, 1.0)])))
        assert_merged(file_tensors(dit, torch.float32), state)

    def test_what_diffusers_writes_of_another_style_merges_the_same(self, tmp_path: Path) -> None:
        """Its keys, balanced powers of two and all, are read back to the same sum."""
        adapters = random_adapters(TINY_TI2V, rank=8, alpha=1.0)
        native_file = write_lora(tmp_path / "native.safetensors", adapters)
        converted = _converter("native")(load_file(native_file))
        theirs = tmp_path / "pytorch_lora_weights.safetensors"
        save_file({key: value.contiguous() for key, value in converted.items()}, theirs)
        ours = merged(merge_for(TINY_TI2V, both=[(native_file, 1.0)]))
        found = merged(merge_for(TINY_TI2V, both=[(theirs, 1.0)]))
        assert_merged(found, {name: tensor.double() for name, tensor in ours.items()})


class TestFullSize:
    @pytest.mark.parametrize("alpha", ["I64", "F32", None])
    def test_every_key_of_a_rank_64_adapter_is_used(
        self, alpha: str | None, tmp_path: Path
    ) -> None:
        """T2V-A14B: 400 modules; the file would be 1.2 GB, and is a hole here."""
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
        for i in range(40):
            sides = {
                f"{part}_attn.{name}": (5120, 5120) for part in ("self", "cross") for name in "qkvo"
            }
            sides |= {"ffn.0": (13824, 5120), "ffn.2": (5120, 13824)}
            for module, (out, inner) in sides.items():
                stem = f"diffusion_model.blocks.{i}.{module}"
                tensors[f"{stem}.lora_down.weight"] = ("F32", (64, inner))
                tensors[f"{stem}.lora_up.weight"] = ("F32", (out, 64))
                if alpha:
                    tensors[f"{stem}.alpha"] = (alpha, ())
        file = write_sparse(tmp_path / "lora.safetensors", tensors)
        assert 1_226_833_920 < file.stat().st_size < 1_227_000_000  # 306,708,480 values in fp32
        lora = read_lora(file)
        assert sum(len(module.tensors) for module in lora.modules) == len(tensors)
        assert models_of(lora) == (T2V_A14B, I2V_A14B)
        changes = merge_for(T2V_A14B, high=[(file, 1.0)]).adapters[0].changes
        assert len(changes) == 400
        assert {change.factor for (change,) in changes.values()} == {0.0 if alpha else 1.0}

    def test_lightx2vs_differences(self, tmp_path: Path) -> None:
        """Every bias, norm, the head and the patch embedding beside the 400 modules."""
        tensors = attention_keys(5120, 40)
        for i in range(40):
            stem = f"diffusion_model.blocks.{i}"
            for part in ("self", "cross"):
                tensors |= {f"{stem}.{part}_attn.{x}.diff_b": ("BF16", (5120,)) for x in "qkvo"}
                for norm in ("norm_q", "norm_k"):
                    tensors[f"{stem}.{part}_attn.{norm}.diff"] = ("BF16", (5120,))
            tensors[f"{stem}.ffn.0.diff_b"] = ("BF16", (13824,))
            tensors[f"{stem}.ffn.2.diff_b"] = ("BF16", (5120,))
            tensors[f"{stem}.norm3.diff"] = tensors[f"{stem}.norm3.diff_b"] = ("BF16", (5120,))
            tensors[f"{stem}.diff_m"] = ("BF16", (1, 6, 5120))
        for module, shape in {
            "head.head": (64, 5120), "time_projection.1": (30720, 5120),
            "time_embedding.0": (5120, 256), "time_embedding.2": (5120, 5120),
            "text_embedding.0": (5120, 4096), "text_embedding.2": (5120, 5120),
            "patch_embedding": (5120, 36, 1, 2, 2),
        }.items():  # fmt: skip
            tensors[f"diffusion_model.{module}.diff"] = ("BF16", shape)
            tensors[f"diffusion_model.{module}.diff_b"] = ("BF16", shape[:1])
        tensors["diffusion_model.head.diff_m"] = ("BF16", (1, 2, 5120))
        file = write_sparse(tmp_path / "lora.safetensors", tensors)
        changes = merge_for(I2V_A14B, high=[(file, 1.0)]).adapters[0].changes
        untouched = set(dit_shapes(I2V_A14B.dit)) - set(changes)
        assert not {name for name in untouched if ".ffn." not in name or "bias" in name}

    def test_little_memory_is_held(self, tmp_path: Path) -> None:
        """Rows of 80 full-size weights at rank 256: never the matrices of more than two."""
        file = write_sparse(tmp_path / "lora.safetensors", attention_keys(5120, 40, rank=256))
        script = f"""
            import resource, torch
            from pathlib import Path
            from wanfit.engine.weights.lora import merge_for
            from wanfit.specs import T2V_A14B
            torch.set_num_threads(1)
            merge = merge_for(T2V_A14B, high=[(Path({str(file)!r}), 1.0)])
            rows = torch.ones(51, 5120)
            merge.apply("high_noise", "blocks.0.self_attn.q.weight", 0, rows)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for block in range(10):
                for part in ("self_attn", "cross_attn"):
                    for name in "qkvo":
                        for row in (0, 5069):
                            name_of = f"blocks.{{block}}.{{part}}.{{name}}.weight"
                            assert torch.equal(rows, merge.apply("high_noise", name_of, row, rows))
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
            """
        grown_kb = int(_child(script))
        assert grown_kb < 100_000  # A and B of two weights are 21 MB; of the 80 they are 840 MB


def test_opening_needs_no_torch(tmp_path: Path) -> None:
    file = write_lora(tmp_path / "lora.safetensors", random_adapters(TINY_TI2V))
    script = f"""
        import sys
        from pathlib import Path
        from wanfit.engine.weights.lora import read_lora
        from wanfit.engine.weights.lora_fit import models_of
        print(len(read_lora(Path({str(file)!r})).modules), "torch" in sys.modules)
        """
    assert _child(script).split() == ["30", "False"]


def _converter(style: Style) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    name = "musubi_wan" if style == "musubi" else "non_diffusers_wan"
    module = "diffusers.loaders.lora_conversion_utils"
    converter: Callable[[dict[str, Tensor]], dict[str, Tensor]] = reference_class(
        module, f"_convert_{name}_lora_to_diffusers"
    )
    return converter


def _child(script: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
