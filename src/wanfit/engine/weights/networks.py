"""The networks of a model: their names, and their parameters without their storage."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.engine.weights.layout import UnitLayout, network_layouts
from wanfit.plan.plan import NetworkName, Precision
from wanfit.specs import ModelSpec

AnyNetwork = Dit | Vae | Umt5


def on_meta(spec: ModelSpec, network: NetworkName) -> AnyNetwork:
    """The network without storage: its names and shapes."""
    with torch.device("meta"), _SkipInit():
        match network:
            case "umt5":
                return Umt5(spec.umt5)
            case "vae":
                return Vae(spec.vae)
            case "high_noise" | "low_noise":
                return Dit(spec.dit)


def layouts_of(
    spec: ModelSpec, network: NetworkName, precision: Precision
) -> Mapping[str, UnitLayout]:
    """`network_layouts` of a network, made once per process: experts have the same."""
    return _layouts(spec, "high_noise" if network == "low_noise" else network, precision)


@cache
def _layouts(
    spec: ModelSpec, network: NetworkName, precision: Precision
) -> Mapping[str, UnitLayout]:
    return network_layouts(on_meta(spec, network), precision)


def shapes_of(network: AnyNetwork) -> dict[str, tuple[int, ...]]:
    """Our parameter name -> its shape."""
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


class _SkipInit(TorchFunctionMode):
    """Leaves out random initialisation, which on the meta device has nothing to do.

    There torch imports sympy and its compiler to do it: 2.8 s at the first nn.Embedding (2 CPU
    cores under load, 2026-11-23), and 1 ms with this.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]  # torch.nn.init passes it by name
        return func(*args, **kwargs)
