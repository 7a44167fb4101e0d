"""The tables of names, held against everybody else's: true names and shapes, none left over."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import gguf
import pytest
import torch
from torch import nn

from tests.engine.tiny_models import TINY_I2V, TINY_T2V, TINY_TI2V, reference_class
from tests.official_modules import OfficialDit, OfficialUmt5, OfficialVae
from wanfit.engine.weights import configs
from wanfit.engine.weights.keys import (
    DIT,
    UMT5,
    UMT5_TIED_NAME,
    Naming,
    file_shape,
    network_names,
    our_name,
    rows_of,
    their_name,
    to_diffusers,
)
from wanfit.engine.weights.networks import _SkipInit, on_meta, shapes_of
from wanfit.plan.plan import NetworkName
from wanfit.specs import MODELS, ModelSpec

Shapes = dict[str, tuple[int, ...]]
# The tiny ones number their layers otherwise: they have one residual block less in a stage.
SPECS = (*MODELS, TINY_T2V, TINY_I2V, TINY_TI2V)
NAMINGS: tuple[Naming, ...] = ("official", "diffusers", "gguf")


def in_file(spec: ModelSpec, network: NetworkName, naming: Naming) -> Shapes:
    """Every parameter of ours, by its name and shape in a file."""
    rows = rows_of(spec, network)
    shapes: Shapes = {}
    for name, shape in shapes_of(on_meta(spec, network)).items():
        theirs = their_name(name, rows, naming)
        assert theirs not in shapes, f"{theirs} is two parameters"
        shapes[theirs] = file_shape(name, theirs, shape)
    return shapes


def of_module(make: Callable[[], nn.Module]) -> Shapes:
    with torch.device("meta"), _SkipInit():
        module = make()
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def reference(spec: ModelSpec, network: NetworkName) -> Callable[[], nn.Module]:
    """How diffusers or transformers makes this network."""
    if network == "umt5":
        config = reference_class("transformers", "UMT5Config")(**configs.umt5_config(spec.umt5))
        return lambda: reference_class("transformers", "UMT5EncoderModel")(config)
    if network == "vae":
        return lambda: reference_class("diffusers", "AutoencoderKLWan").from_config(
            configs.vae_config(spec.vae)
        )
    return lambda: reference_class("diffusers", "WanTransformer3DModel").from_config(
        configs.dit_config(spec.dit)
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_official_names_and_shapes(spec: ModelSpec) -> None:
    """Every key of the official modules is one of ours, with its shape, and none is made up."""
    official: Mapping[NetworkName, Callable[[], nn.Module]] = {
        "umt5": lambda: OfficialUmt5(spec.umt5),
        "vae": lambda: OfficialVae(spec.vae),
        "high_noise": lambda: OfficialDit(spec.dit),
        "low_noise": lambda: OfficialDit(spec.dit),
    }
    for network in network_names(spec):
        assert in_file(spec, network, "official") == of_module(official[network])


@pytest.mark.filterwarnings("ignore")  # of diffusers and transformers about themselves
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_diffusers_names_and_shapes(spec: ModelSpec) -> None:
    for network in network_names(spec):
        theirs = of_module(reference(spec, network))
        theirs.pop(UMT5_TIED_NAME, None)
        assert in_file(spec, network, "diffusers") == theirs


@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.name)
def test_official_and_diffusers_names_of_a_transformer_are_the_same_parameter(
    spec: ModelSpec,
) -> None:
    """By diffusers' own converter; shapes alone would not tell q from k."""
    for name in shapes_of(on_meta(spec, "high_noise")):
        official = their_name(name, DIT, "official")
        assert their_name(name, DIT, "diffusers") == _converted("transformer", official)


def test_official_and_diffusers_names_of_vae_2_1_are_the_same_parameter() -> None:
    """As above. diffusers' converter numbers two residual blocks a stage, as the true VAE has."""
    (spec,) = (spec for spec in MODELS if spec.name == "t2v-a14b")
    rows = rows_of(spec, "vae")
    names = [their_name(name, rows, "official") for name in shapes_of(on_meta(spec, "vae"))]
    for name in names:
        ours = our_name(name, rows, "official")
        assert their_name(ours, rows, "diffusers") == _converted("vae", name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_official_and_diffusers_names_of_vae_2_2_are_the_same_parameter(part: str) -> None:
    """Both define their layers in the order of the forward pass, but for diffusers' middle."""
    (spec,) = (spec for spec in MODELS if spec.name == "ti2v-5b")
    rows = rows_of(spec, "vae")
    official = [n for n in of_module(lambda: OfficialVae(spec.vae)) if n.startswith(part)]
    theirs = [n for n in of_module(reference(spec, "vae")) if n.startswith(part)]
    found = [their_name(our_name(n, rows, "official"), rows, "diffusers") for n in official]
    assert len(found) > 80
    assert [n for n in found if "mid" not in n] == [n for n in theirs if "mid" not in n]
    middle = [(n.replace(f"{part}.", "", 1), f) for n, f in zip(official, found, strict=True)]
    for name, converted in middle:
        if name.startswith("middle."):
            assert converted == _converted("vae", f"{part}.{name}")  # the same in 2.1


@pytest.mark.parametrize("spec", [MODELS[-1], TINY_T2V], ids=lambda spec: spec.name)
def test_llama_cpp_names_of_the_text_encoder(spec: ModelSpec) -> None:
    """gguf-py's own map from transformers' names."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, spec.umt5.num_blocks)
    for name in shapes_of(on_meta(spec, "umt5")):
        theirs = table.get_name(to_diffusers(name, UMT5), try_suffixes=(".weight",))
        assert theirs == their_name(name, UMT5, "gguf")


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_both_directions(spec: ModelSpec, naming: Naming) -> None:
    for network in network_names(spec):
        rows = rows_of(spec, network)
        for name in shapes_of(on_meta(spec, network)):
            assert our_name(their_name(name, rows, naming), rows, naming) == name


@pytest.mark.parametrize(
    "name",
    ["blocks.0.self_attn.k_img.weight", "blocks.x.norm3.weight", "head.modulation.weight"],
)
def test_a_name_in_no_row_is_an_error(name: str) -> None:
    with pytest.raises(KeyError, match=re.escape(name)):
        our_name(name, DIT, "official")
    with pytest.raises(KeyError, match="nothing"):
        their_name("nothing.like.it", UMT5, "gguf")


def _converted(kind: str, name: str) -> str:
    """diffusers' name of an official one, by diffusers' loader of single files."""
    module: Any = __import__("diffusers.loaders.single_file_utils", fromlist=["x"])
    convert = getattr(module, f"convert_wan_{kind}_to_diffusers")
    (converted,) = convert({name: torch.zeros(2)})
    return str(converted)
