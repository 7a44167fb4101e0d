"""A network whose weights come and go: its units, and the parts that stay.

The network is built on the meta device, without storage. Its small remainder is put on the device
for good; every other unit is bound to a buffer for the time of its use. UMT5's table of
embeddings (2.1 GB) never goes to the device: a prompt needs a few hundred of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.engine.weights.depot import Depot
from wanfit.engine.weights.files import ModelFiles, tensor_at
from wanfit.engine.weights.layout import PRECISION_DTYPES, TORCH_DTYPES, UnitLayout, views
from wanfit.engine.weights.networks import AnyNetwork, layouts_of, on_meta
from wanfit.engine.weights.pieces import Piece, pieces_of, read_unit
from wanfit.plan.plan import NetworkName, Precision
from wanfit.plan.weights import REST, TOKEN_EMBED


@dataclass(slots=True, eq=False)
class Unit:
    """A part of a network that moves as a whole, and where its bytes come from."""

    network: NetworkName
    name: str
    module: nn.Module  # its parameters lie on the meta device while it is not present
    layout: UnitLayout
    pieces: list[Piece]
    _absent: dict[str, nn.Parameter | None] = field(default_factory=dict)

    def bind(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Lets the module compute with these."""
        for name, parameter in parameters.items():
            owner, attribute = self._owner(name)
            self._absent.setdefault(name, owner._parameters[attribute])
            owner._parameters[attribute] = parameter

    def unbind(self) -> None:
        """Takes them away again."""
        for name, parameter in self._absent.items():
            owner, attribute = self._owner(name)
            owner._parameters[attribute] = parameter
        self._absent.clear()

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, attribute = name.rpartition(".")
        return self.module.get_submodule(path), attribute


class MappedEmbedding(nn.Module):
    """A table of embeddings in a mapped file: rows are gathered on the host and sent."""

    def __init__(self, table: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self._table, self._dtype = table, dtype

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [B, S] to [B, S, D] on the device of the ids."""
        rows = self._table[ids.cpu()]
        return rows.to(ids.device, self._dtype)


def streamed_network(
    files: ModelFiles, name: NetworkName, precision: Precision, depot: Depot
) -> tuple[AnyNetwork, list[Unit]]:
    """The network, and its units in the order of a forward pass, to be given to a `Streamer`.

    Raises WeightsMismatch when the files cannot serve the precision.
    """
    network = on_meta(files.spec, name).requires_grad_(False).eval()
    entries = files.entries(name)
    units = []
    for unit_name, layout in layouts_of(files.spec, name, precision).items():
        if unit_name == TOKEN_EMBED:
            assert isinstance(network, Umt5)
            entry = entries[f"{TOKEN_EMBED}.weight"]
            table = tensor_at(depot.file(entry.file).bytes, entry)
            dtype = TORCH_DTYPES[PRECISION_DTYPES[precision]]
            network.token_embed = MappedEmbedding(table, dtype)
            continue
        pieces = pieces_of(unit_name, layout, entries)
        if unit_name == REST:
            flat = read_unit(depot, layout, pieces).to(depot.device)
            Unit(name, REST, network, layout, pieces).bind(parameters_in(flat, layout))
        else:
            units.append(Unit(name, unit_name, network.get_submodule(unit_name), layout, pieces))
    return network, units


def loaded_vae(files: ModelFiles, depot: Depot, dtype: torch.dtype) -> Vae:
    """The autoencoder as a whole, on the depot's device, one tensor after the other.

    On a GPU the pages of a tensor are let go once it is there, so that the host does not hold the
    file too (2.8 GB for TI2V-5B). On the CPU a tensor of the same dtype stays in the mapping.
    """
    if depot.device.type == "cpu":
        return files.load_vae(depot.device, dtype)
    vae = on_meta(files.spec, "vae")
    assert isinstance(vae, Vae)
    tensors = {}
    for name, entry in files.entries("vae").items():
        file = depot.file(entry.file)
        tensors[name] = tensor_at(file.bytes, entry).to(depot.device, dtype)
        file.forget(entry.offset, entry.offset + entry.num_bytes)
    vae.requires_grad_(False).load_state_dict(tensors, assign=True)
    return vae.eval()


def parameters_in(flat: Tensor, layout: UnitLayout) -> dict[str, nn.Parameter]:
    """Name -> the parameter at its place in `flat`."""
    return {
        name: nn.Parameter(view, requires_grad=False) for name, view in views(flat, layout).items()
    }
