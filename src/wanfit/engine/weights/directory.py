"""A model directory in diffusers layout: checked when opened, read network by network, written.

    model_index.json
    transformer/    the high-noise expert, or the only one      transformer_2/  the low-noise expert
    vae/            text_encoder/            tokenizer/tokenizer.json            scheduler/

Opening reads the JSON files and the headers of the weight files, and finds every file that is
missing, truncated or of another model before a byte of a tensor is read. Networks are built on
the meta device and take their tensors straight from the mapped files, so a network in the dtype
of its file costs no second copy. The files must not be changed in place meanwhile; what is written
here is always written beside and renamed.

Left out: other layouts and quantised files. The pipeline sees only the four methods of
`ModelDirectory` (`pipeline.Weights`), so that another source can take its place; and sharded
writing, since one file of any size serves both readers.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.engine.tokenizer import TOKENIZER_FILE, TextTokenizer
from wanfit.engine.weights import configs
from wanfit.engine.weights.configs import EXPERT_FOLDERS, Component, Json
from wanfit.engine.weights.headers import TensorEntry, component_entries, read_json
from wanfit.engine.weights.keys import DIT, UMT5, Row, from_diffusers, to_diffusers, vae_rows
from wanfit.errors import BadOutput, WeightsBroken, WeightsMismatch, WeightsMissing
from wanfit.specs import Expert, ModelSpec

MODEL_INDEX = "model_index.json"
# The second name that transformers gives the embedding; one of the two is stored, or both.
UMT5_TIED_NAME = "encoder.embed_tokens.weight"

Network = TypeVar("Network", Dit, Vae, Umt5)
AnyNetwork = Dit | Vae | Umt5
Entries = Mapping[str, TensorEntry]


class ModelDirectory:
    """An opened directory. Made by `open_directory`, so its files are whole and of `spec`."""

    def __init__(self, path: Path, spec: ModelSpec, entries: Mapping[Component, Entries]) -> None:
        self.path = path
        self.spec = spec
        self._entries = entries  # per component: our parameter name -> where its tensor lies

    def load_umt5(self, device: torch.device, dtype: torch.dtype) -> Umt5:
        """The text encoder, on `device` in `dtype`."""
        with torch.device("meta"), _SkipInit():
            umt5 = Umt5(self.spec.umt5)
        return self._filled(umt5, "text_encoder", device, dtype)

    def load_dit(self, expert: Expert, device: torch.device, dtype: torch.dtype) -> Dit:
        """One transformer, in `dtype` but for the parts that `Dit.FP32_PARAMETERS` names."""
        with torch.device("meta"), _SkipInit():
            dit = Dit(self.spec.dit)
        return self._filled(dit, EXPERT_FOLDERS[expert], device, dtype)

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> Vae:
        """The autoencoder, on `device` in `dtype`."""
        with torch.device("meta"), _SkipInit():
            vae = Vae(self.spec.vae)
        return self._filled(vae, "vae", device, dtype)

    def tokenizer(self) -> TextTokenizer:
        """The tokenizer. Raises WeightsBroken, or WeightsMismatch when it does not fit UMT5."""
        tokenizer = TextTokenizer(self.path / "tokenizer")
        rows = self.spec.umt5.vocab_size
        if tokenizer.vocab_size > rows:
            raise WeightsMismatch(
                f"{self.path / 'tokenizer'} knows {tokenizer.vocab_size} tokens, and the text"
                f" encoder of {self.spec.name} has {rows}"
            )
        return tokenizer

    def _filled(
        self, network: Network, component: Component, device: torch.device, dtype: torch.dtype
    ) -> Network:
        """`network` with its tensors from the files, in eval mode and without gradients."""
        shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        tensors = {
            name: tensor.reshape(shapes[name]).to(
                device, torch.float32 if _stays_fp32(network, name) else dtype
            )
            for name, tensor in _read_tensors(self._entries[component])
        }
        network.load_state_dict(tensors, assign=True)
        assert not any(buffer.is_meta for buffer in network.buffers()), "a buffer was not filled"
        return network.requires_grad_(False).eval()


def open_directory(path: Path, spec: ModelSpec) -> ModelDirectory:
    """Checks every file of the directory against `spec`, reading no tensor.

    Raises WeightsMissing for an absent file or tensor, WeightsBroken for a truncated or unreadable
    file and for tensors that no network takes, WeightsMismatch for the files of another model.
    """
    if not path.is_dir():
        raise WeightsMissing(
            f"There is no model directory at {path}", hint=f"{spec.name} has to be there"
        )
    if not (path / MODEL_INDEX).is_file():
        raise WeightsMissing(f"{path / MODEL_INDEX} is not there", hint=_layout_hint(path))
    configs.check_model_index(read_json(path / MODEL_INDEX), spec)
    for component in configs.components_of(spec):  # first all configs: the cheapest answer
        configs.check_config(read_json(path / component / "config.json"), spec, component)
    if not (path / "tokenizer" / TOKENIZER_FILE).is_file():
        raise WeightsMissing(f"{path / 'tokenizer' / TOKENIZER_FILE} is not there")
    return ModelDirectory(
        path,
        spec,
        {
            component: _checked_entries(path / component, spec, component)
            for component in configs.components_of(spec)
        },
    )


def write_directory(
    path: Path,
    spec: ModelSpec,
    *,
    umt5: Umt5,
    dits: Mapping[Expert, Dit],
    vae: Vae,
    tokenizer_json: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes a directory that `open_directory` and diffusers' `from_pretrained` read.

    Weights are stored in `dtype`, but for those that the network keeps in fp32. All is written
    under a temporary name beside `path` and renamed; a model directory that was at `path` is moved
    away first and removed last, so `path` never shows half a model.
    Raises BadOutput when something else is at `path`.
    """
    assert set(dits) == set(spec.experts), f"{spec.name} has {spec.experts}, got {tuple(dits)}"
    if path.exists() and not (path / MODEL_INDEX).is_file():
        raise BadOutput(f"{path} is there and is not a model directory", hint="Choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        new = Path(scratch) / "new"
        networks: dict[Component, AnyNetwork] = {"text_encoder": umt5, "vae": vae}
        networks |= {EXPERT_FOLDERS[expert]: dit for expert, dit in dits.items()}
        for component, network in networks.items():
            _write_component(new / component, spec, component, network, dtype)
        (new / "tokenizer").mkdir()
        shutil.copyfile(tokenizer_json, new / "tokenizer" / TOKENIZER_FILE)
        _write_json(new / "tokenizer" / "tokenizer_config.json", configs.tokenizer_config())
        (new / "scheduler").mkdir()
        _write_json(new / "scheduler" / "scheduler_config.json", configs.scheduler_config(spec))
        _write_json(new / MODEL_INDEX, configs.model_index(spec))
        if path.exists():
            os.rename(path, Path(scratch) / "old")
        os.rename(new, path)


def file_tensors(network: AnyNetwork, dtype: torch.dtype) -> dict[str, Tensor]:
    """The network's weights as a file has them: diffusers' names and shapes, on the CPU."""
    rows = _rows(network)
    tensors: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        stored = torch.float32 if _stays_fp32(network, name) else dtype
        theirs = to_diffusers(name, rows)
        shape = _file_shape(theirs, tensor.shape)
        tensors[theirs] = tensor.detach().to("cpu", stored).reshape(shape).contiguous()
    return tensors


def _write_component(
    folder: Path, spec: ModelSpec, component: Component, network: AnyNetwork, dtype: torch.dtype
) -> None:
    folder.mkdir(parents=True)
    tensors = file_tensors(network, dtype)
    # The metadata is what diffusers and transformers look for before they read a file.
    save_file(tensors, folder / f"{_stem(component)}.safetensors", metadata={"format": "pt"})
    config = configs.component_config(spec, component)
    if component == "text_encoder":
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)


def _write_json(file: Path, content: Json) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _checked_entries(folder: Path, spec: ModelSpec, component: Component) -> Entries:
    """Our parameter name -> where its tensor lies; names and shapes are those of the network."""
    found = component_entries(folder, _stem(component))
    if "shared.weight" in found:
        found.pop(UMT5_TIED_NAME, None)
    elif UMT5_TIED_NAME in found:
        found["shared.weight"] = found.pop(UMT5_TIED_NAME)
    network = _on_meta(spec, component)
    rows = _rows(network)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    wanted = {to_diffusers(name, rows): shape for name, shape in shapes.items()}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise WeightsMissing(f"{folder} lacks {_listed(missing)}", hint="Download it again")
    unknown = [name for name in found if name not in wanted]
    if unknown:
        raise WeightsBroken(
            f"{folder} holds {_listed(unknown)}, which the network does not have",
            hint=f"It may be a derivative of {spec.name}, or an adapter",
        )
    for name, shape in wanted.items():
        in_file = _file_shape(name, shape)
        if found[name].shape != in_file:
            raise WeightsMismatch(
                f"{found[name].file} has {name} of shape {list(found[name].shape)}, and"
                f" {spec.name} needs {list(in_file)}"
            )
    return {from_diffusers(name, rows): entry for name, entry in found.items()}


def _read_tensors(entries: Entries) -> Iterable[tuple[str, Tensor]]:
    """(our name, tensor on the CPU) for each entry, file by file; tensors lie in mapped files."""
    by_file: dict[Path, list[str]] = {}
    for name, entry in entries.items():
        by_file.setdefault(entry.file, []).append(name)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for name in names:
                    yield name, tensors.get_tensor(entries[name].name)
        except (SafetensorError, OSError) as error:
            raise WeightsBroken(f"{file} cannot be read: {error}") from None


def _rows(network: AnyNetwork) -> Sequence[Row]:
    match network:
        case Umt5():
            return UMT5
        case Vae():
            return vae_rows(network.spec)
        case Dit():
            return DIT


def _stem(component: Component) -> str:
    """The file name without suffix, as the library that owns the component has it."""
    return "model" if component == "text_encoder" else "diffusion_pytorch_model"


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


def _on_meta(spec: ModelSpec, component: Component) -> AnyNetwork:
    """The network without storage: its names and shapes."""
    with torch.device("meta"), _SkipInit():
        match component:
            case "text_encoder":
                return Umt5(spec.umt5)
            case "vae":
                return Vae(spec.vae)
            case "transformer" | "transformer_2":
                return Dit(spec.dit)


def _file_shape(theirs: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file: the VAE's norm weights carry the axes that they broadcast over."""
    if not theirs.endswith(".gamma"):
        return tuple(shape)
    return (*shape, 1, 1) if ".attentions." in theirs else (*shape, 1, 1, 1)


def _stays_fp32(network: AnyNetwork, name: str) -> bool:
    return any(part in name for part in network.FP32_PARAMETERS)


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _layout_hint(path: Path) -> str:
    if any(path.glob("*.pth")) or (path / "high_noise_model").is_dir():
        return "This is the official layout; get the repository whose name ends in -Diffusers"
    return "A model directory in diffusers layout is needed"
