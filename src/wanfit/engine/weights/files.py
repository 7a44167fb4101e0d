"""An opened model on disk, whatever its layout: where every tensor lies, and whole networks.

Networks are built on the meta device and take their tensors straight from the mapped files, so a
network in the dtype of its file costs no second copy. The files must not be changed in place
meanwhile; what is written here is always written beside and renamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.engine.tokenizer import TOKENIZER_FILE, TextTokenizer
from wanfit.engine.weights.headers import TensorEntry
from wanfit.engine.weights.layout import TORCH_DTYPES, UnitLayout, stays_fp32
from wanfit.engine.weights.networks import on_meta
from wanfit.engine.weights.parts import Part
from wanfit.engine.weights.vocabulary import from_gguf, from_sentencepiece
from wanfit.errors import WeightsBroken, WeightsMismatch
from wanfit.plan.plan import NetworkName, Precision
from wanfit.specs import Expert, ModelSpec

Network = TypeVar("Network", Dit, Vae, Umt5)
Entries = Mapping[str, TensorEntry]


@dataclass(frozen=True, slots=True)
class StoredUnit:
    """One unit of a store: a run of bytes in a file, and what they add up to."""

    file: Path
    network: NetworkName
    name: str
    layout: UnitLayout  # offsets count from the unit's begin
    offset: int  # bytes from the file's begin
    num_bytes: int  # with the padding to the next unit
    checksum: str  # of these bytes; `store.checksum_text`


class ModelFiles:
    """The files of one model, which are whole and of `spec`. Made by `open_model`.

    precision: in which a store holds the weights of the blocks; None for a directory in diffusers
    layout, whose tensors have the dtypes that they have.
    units: of a store, file by file in the order of their bytes; a directory has none.
    vocabulary: a tokenizer file, or the part that carries a vocabulary; None: tokenizer/.
    """

    def __init__(
        self,
        path: Path,
        spec: ModelSpec,
        entries: Mapping[NetworkName, Entries],
        *,
        precision: Precision | None = None,
        units: tuple[StoredUnit, ...] = (),
        vocabulary: Path | Part | None = None,
    ) -> None:
        self.path = path
        self.spec = spec
        self.precision = precision
        self.units = units
        self._entries = entries
        self._vocabulary = vocabulary or path / "tokenizer"

    def entries(self, network: NetworkName) -> Entries:
        """Our parameter name -> where its tensor lies, with the shape that the network gives it.

        In an fp8 store a weight in fp8 has its scale beside it: "....scale", fp32 [O, 1].
        """
        return self._entries[network]

    def tokenizer(self) -> TextTokenizer:
        """The tokenizer. Raises WeightsBroken, or WeightsMismatch when it does not fit UMT5."""
        source = self._vocabulary
        if isinstance(source, Path):
            where, tokenizer = source, TextTokenizer(source)
        else:
            where, tokenizer = source.path, _carried(source)
        rows = self.spec.umt5.vocab_size
        if tokenizer.vocab_size > rows:
            raise WeightsMismatch(
                f"{where} knows {tokenizer.vocab_size} tokens, and the text encoder of"
                f" {self.spec.name} has {rows}"
            )
        return tokenizer

    def tokenizer_json(self) -> str:
        """What tokenizer.json holds, or would hold: for a store. Raises WeightsError."""
        source = self._vocabulary
        file = source / TOKENIZER_FILE if isinstance(source, Path) and source.is_dir() else source
        if isinstance(file, Path) and file.suffix == ".json" and file.is_file():
            try:
                return file.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise WeightsBroken(f"{file} cannot be read: {error}") from None
        return self.tokenizer().json()

    def load_umt5(self, device: torch.device, dtype: torch.dtype) -> Umt5:
        """The text encoder, on `device` in `dtype`."""
        umt5 = on_meta(self.spec, "umt5")
        assert isinstance(umt5, Umt5)
        return self._filled(umt5, "umt5", device, dtype)

    def load_dit(self, expert: Expert, device: torch.device, dtype: torch.dtype) -> Dit:
        """One transformer, in `dtype` but for the parts that `Dit.FP32_PARAMETERS` names.

        From an fp8 store, weights in fp8 stay so; their layers have a `scale`.
        """
        dit = on_meta(self.spec, expert)
        assert isinstance(dit, Dit)
        return self._filled(dit, expert, device, dtype)

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> Vae:
        """The autoencoder, on `device` in `dtype`."""
        vae = on_meta(self.spec, "vae")
        assert isinstance(vae, Vae)
        return self._filled(vae, "vae", device, dtype)

    def _filled(
        self, network: Network, name: NetworkName, device: torch.device, dtype: torch.dtype
    ) -> Network:
        """`network` with its tensors from the files, in eval mode and without gradients."""
        network.requires_grad_(False)
        entries = self._entries[name]
        tensors: dict[str, Tensor] = {}
        for parameter, tensor in _read_tensors(entries):
            owner, _, leaf = parameter.rpartition(".")
            if leaf == "scale":
                scale = nn.Parameter(tensor.to(device), requires_grad=False)
                network.get_submodule(owner).register_parameter(leaf, scale)
            if leaf == "scale" or stays_fp32(network, parameter):
                tensors[parameter] = tensor.to(device, torch.float32)
            elif tensor.dtype == torch.float8_e4m3fn:
                tensors[parameter] = tensor.to(device)
            else:
                tensors[parameter] = tensor.to(device, dtype)
        network.load_state_dict(tensors, assign=True)
        assert not any(buffer.is_meta for buffer in network.buffers()), "a buffer was not filled"
        return network.eval()


def _carried(part: Part) -> TextTokenizer:
    """The tokenizer of a vocabulary within a weight file."""
    name, proto = str(part.path), part.sentencepiece()
    if proto is not None:
        return TextTokenizer.of(from_sentencepiece(proto, name=name), name=name)
    return TextTokenizer.of(from_gguf(part.container.metadata, name=name), name=name)


def _read_tensors(entries: Entries) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor on the CPU) for each entry; tensors lie in mapped files."""
    mappings: dict[Path, Tensor] = {}
    for name, entry in entries.items():
        if entry.file not in mappings:
            mappings[entry.file] = map_file(entry.file)
        yield name, tensor_at(mappings[entry.file], entry)


def map_file(file: Path) -> Tensor:
    """The bytes of a file as a private mapping: uint8 [length]. Raises WeightsBroken."""
    try:
        return torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise WeightsBroken(f"{file} cannot be read: {str(error).splitlines()[0]}") from None


def tensor_at(mapping: Tensor, entry: TensorEntry) -> Tensor:
    """One tensor of a mapped file, in place; copied only where it lies at an odd address."""
    flat = mapping[entry.offset : entry.offset + entry.num_bytes]
    dtype = TORCH_DTYPES[entry.dtype]
    if entry.offset % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(entry.shape)
