"""The planner's weight bytes are those of the real networks, for every model and precision."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.engine.weights.layout import network_layouts
from wanfit.plan import weights
from wanfit.plan.plan import Precision
from wanfit.plan.weights import ALIGN_BYTES
from wanfit.specs import MODELS, ModelSpec

PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def real_units(network: nn.Module, precision: Precision) -> dict[str, int]:
    layouts = network_layouts(network, precision)
    return {unit: layout.num_bytes for unit, layout in layouts.items()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("spec", MODELS, ids=lambda spec: spec.name)
def test_units_have_the_bytes_of_the_real_networks(spec: ModelSpec, precision: Precision) -> None:
    """Networks of true size on the meta device, unit by unit, to the byte."""
    with torch.device("meta"):
        dit, umt5, vae = Dit(spec.dit), Umt5(spec.umt5), Vae(spec.vae)
    assert weights.dit_units(spec.dit, precision) == real_units(dit, precision)
    assert weights.umt5_units(spec.umt5, precision) == real_units(umt5, precision)
    assert {weights.REST: weights.vae_bytes(spec.vae, precision)} == real_units(vae, precision)


def test_every_tensor_of_a_layout_is_aligned() -> None:
    """At multiples of 256 bytes, the alignment that both sums count with."""
    assert ALIGN_BYTES == 256
    with torch.device("meta"):
        layouts = network_layouts(Dit(MODELS[0].dit), "fp8").values()
    assert all(place.offset % 256 == 0 for layout in layouts for place in layout.places)
    assert all(layout.num_bytes % 256 == 0 for layout in layouts)
