"""Convert with LoRA files, end to end: the store holds the merged weights, nothing else moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.engine.tiny_models import TINY_T2V, TinyModel, write_tiny
from tests.lora_files import Adapters, added, random_adapters, write_lora
from wanfit.engine.ops.linear import quantise
from wanfit.engine.weights import convert, writer
from wanfit.engine.weights.container import open_container
from wanfit.engine.weights.convert import ConvertStep, convert_model
from wanfit.engine.weights.files import ModelFiles, map_file, tensor_at
from wanfit.engine.weights.keys import network_names
from wanfit.engine.weights.layout import TORCH_DTYPES
from wanfit.engine.weights.lora import Merge, merge_for
from wanfit.engine.weights.open import open_model
from wanfit.engine.weights.verify import verify_units
from wanfit.errors import WeightsBroken
from wanfit.plan.plan import Precision
from wanfit.specs import Expert

DIFFS = ("blocks.0.self_attn.q.bias", "blocks.1.modulation", "patch_embed.weight")
BF16_STEP = 2**-7  # of a value, the distance to its neighbours at most


class Given(NamedTuple):
    model: TinyModel
    adapters: dict[Expert, Adapters]
    files: dict[Expert, Path]

    def merge(self, strength: float = 1.0) -> Merge:
        high, low = self.files["high_noise"], self.files["low_noise"]
        return merge_for(TINY_T2V, high=[(high, strength)], low=[(low, strength)])


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("models")
    model = write_tiny(folder / "t2v", TINY_T2V, seed=3)
    adapters: dict[Expert, Adapters] = {
        "high_noise": random_adapters(TINY_T2V, seed=1, diffs=DIFFS),
        "low_noise": random_adapters(TINY_T2V, seed=2, modules=["head.linear", "patch_embed"]),
    }
    files = {
        expert: write_lora(folder / f"{expert}_model.safetensors", lora)
        for expert, lora in adapters.items()
    }
    return Given(model, adapters, files)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "PIECE_ELEMENTS", 100)
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)


def converted(
    given: Given, target: Path, precision: Precision, merge: Merge | None
) -> dict[Expert, dict[str, Tensor]]:
    """The tensors of both experts in the store, by our names."""
    source = open_model(given.model.path, TINY_T2V)
    convert_model(source, target, precision, merge=merge)
    store = open_model(target, TINY_T2V)
    list(verify_units(store))
    return {
        expert: {
            name: tensor_at(map_file(entry.file), entry).clone()
            for name, entry in store.entries(expert).items()
        }
        for expert in TINY_T2V.experts
    }


def wanted(given: Given, expert: Expert, name: str, strength: float) -> Tensor:
    """W + strength * what the adapters add, in fp64."""
    weight: Tensor = given.model.dits[expert].state_dict()[name].double()
    return weight + strength * added(given.adapters[expert], name)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("strength", [1.0, -0.3])
def test_a_bf16_store_holds_the_merged_weights(
    strength: float, given: Given, tmp_path: Path
) -> None:
    found = converted(given, tmp_path / "store", "bf16", given.merge(strength))
    for expert in TINY_T2V.experts:
        assert set(found[expert]) == set(given.model.dits[expert].state_dict())
        for name, tensor in found[expert].items():
            exact = wanted(given, expert, name, strength)
            step = BF16_STEP if tensor.dtype == torch.bfloat16 else 2**-22
            bound = step / 2 * exact.abs() + 1e-5
            assert ((tensor.double() - exact).abs() <= bound).all(), (expert, name)


@pytest.mark.usefixtures("small_pieces")
def test_an_fp8_store_is_made_from_the_merged_weights(given: Given, tmp_path: Path) -> None:
    """Merged first and rounded once: as if the merged weights were quantised at once."""
    found = converted(given, tmp_path / "store", "fp8", given.merge())
    num_fp8 = 0
    for expert in TINY_T2V.experts:
        for name, tensor in found[expert].items():
            if tensor.dtype != TORCH_DTYPES["F8_E4M3"]:
                continue
            num_fp8 += 1
            exact = wanted(given, expert, name, 1.0)
            scale = found[expert][f"{name.removesuffix('weight')}scale"].double()
            weight, wanted_scale = quantise(exact.float())
            torch.testing.assert_close(scale, wanted_scale.double(), rtol=1e-5, atol=0)
            same = (tensor.float() == weight.float()).float().mean()
            assert same > 0.99  # but for values in the middle between two
            bound = (
                exact.abs() * 2**-4 + scale * 2**-9
            )  # half a step of E4M3, and of its subnormals
            assert ((tensor.double() * scale - exact).abs() <= 1.01 * bound).all(), name
    assert num_fp8 == 2 * 3 * 10


@pytest.mark.usefixtures("small_pieces")
def test_a_quantised_source_is_merged_into_its_values(given: Given, tmp_path: Path) -> None:
    """fp8 with a scale for each row, as LightX2V's: decoded, added to, rounded once."""
    name = "blocks.2.ffn.up.weight"
    weight, scale = quantise(given.model.dits["high_noise"].state_dict()[name])
    save_file({"w": weight, "s": scale}, tmp_path / "fp8.safetensors")
    stored = open_container(tmp_path / "fp8.safetensors").entries
    source = open_model(given.model.path, TINY_T2V)
    entries = {network: source.entries(network) for network in network_names(TINY_T2V)}
    entries["high_noise"] = {
        **entries["high_noise"],
        name: replace(stored["w"], scale=stored["s"]),
    }
    files = ModelFiles(source.path, TINY_T2V, entries)
    convert_model(files, tmp_path / "store", "bf16", merge=given.merge())
    entry = open_model(tmp_path / "store", TINY_T2V).entries("high_noise")[name]
    found = tensor_at(map_file(entry.file), entry).double()
    exact = weight.double() * scale.double() + added(given.adapters["high_noise"], name)
    assert ((found - exact).abs() <= BF16_STEP / 2 * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_what_no_adapter_touches_is_byte_for_byte_the_same(
    precision: Precision, given: Given, tmp_path: Path
) -> None:
    high = merge_for(TINY_T2V, high=[(given.files["high_noise"], 1.0)])
    merged = converted(given, tmp_path / "merged", precision, high)
    plain = converted(given, tmp_path / "plain", precision, None)
    for name in ("umt5", "vae", "low_noise"):
        files = [tmp_path / store / f"{name}.safetensors" for store in ("merged", "plain")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    for name, tensor in plain["high_noise"].items():
        module = name.removesuffix(".scale").removesuffix(".weight")
        touched = name in DIFFS or module in given.adapters["high_noise"].pairs
        same = torch.equal(tensor.view(torch.uint8), merged["high_noise"][name].view(torch.uint8))
        assert same != touched, name


def test_strength_0_is_no_merge(given: Given, tmp_path: Path) -> None:
    merged = converted(given, tmp_path / "merged", "bf16", given.merge(0.0))
    plain = converted(given, tmp_path / "plain", "bf16", None)
    for expert in TINY_T2V.experts:
        for name, tensor in plain[expert].items():
            assert torch.equal(tensor, merged[expert][name]), name


@pytest.mark.usefixtures("small_pieces")
def test_a_stopped_convert_goes_on_with_the_same_adapters_alone(
    given: Given, tmp_path: Path
) -> None:
    """A store must never be half of one merge and half of another."""
    source = open_model(given.model.path, TINY_T2V)

    class Stop(BaseException):
        pass

    def stop(step: ConvertStep) -> None:
        if step.network == "low_noise":
            raise Stop

    target = tmp_path / "store"
    for strength, resumes in ((1.0, True), (0.5, False)):
        with pytest.raises(Stop):
            convert_model(source, target, "bf16", stop, given.merge(1.0))
        report = convert_model(source, target, "bf16", merge=given.merge(strength))
        assert (report.resumed_bytes > 0) == resumes
        entry = open_model(target, TINY_T2V).entries("high_noise")["blocks.0.ffn.up.weight"]
        found = tensor_at(map_file(entry.file), entry).double()
        exact = wanted(given, "high_noise", "blocks.0.ffn.up.weight", strength)
        assert (found - exact).abs().max() < BF16_STEP * exact.abs().max()


@pytest.mark.usefixtures("small_pieces")
def test_an_adapter_that_changes_meanwhile_is_told(given: Given, tmp_path: Path) -> None:
    adapters = given.adapters["high_noise"]
    file = write_lora(tmp_path / "lora.safetensors", adapters)
    merge = merge_for(TINY_T2V, high=[(file, 1.0)])

    def change(step: ConvertStep) -> None:
        if step.network == "low_noise":
            write_lora(file, adapters)

    source = open_model(given.model.path, TINY_T2V)
    with pytest.raises(WeightsBroken, match="was changed while"):
        convert_model(source, tmp_path / "store", "bf16", change, merge)
    assert not (tmp_path / "store").exists()
