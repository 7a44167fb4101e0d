"""A model directory in diffusers layout: checked when opened, and written.

    model_index.json
    transformer/    the high-noise expert, or the only one      transformer_2/  the low-noise expert
    vae/            text_encoder/            tokenizer/tokenizer.json            scheduler/

Opening reads the JSON files and the headers of the weight files, and finds every file that is
missing, truncated or of another model before a byte of a tensor is read.

Left out: other layouts and quantised files; and sharded writing, since one file of any size serves
both readers.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.engine.tokenizer import TOKENIZER_FILE
from wanfit.engine.weights import configs
from wanfit.engine.weights.configs import FOLDERS, Component, Json
from wanfit.engine.weights.files import Entries, ModelFiles
from wanfit.engine.weights.headers import TensorEntry, component_entries
from wanfit.engine.weights.keys import DIT, UMT5, Row, to_diffusers, vae_rows
from wanfit.engine.weights.layout import stays_fp32
from wanfit.engine.weights.networks import AnyNetwork, listed, network_names, on_meta, shapes_of
from wanfit.engine.weights.recognise import MODEL_INDEX, check_configs
from wanfit.errors import BadOutput, WeightsBroken, WeightsMismatch, WeightsMissing
from wanfit.plan.plan import NetworkName
from wanfit.specs import Expert, ModelSpec

# The second name that transformers gives the embedding; one of the two is stored, or both.
UMT5_TIED_NAME = "encoder.embed_tokens.weight"


def open_directory(path: Path, spec: ModelSpec) -> ModelFiles:
    """Checks every file of the directory against `spec`, reading no tensor.

    Raises WeightsMissing for an absent file or tensor, WeightsBroken for a truncated or unreadable
    file and for tensors that no network takes, WeightsMismatch for the files of another model.
    """
    check_configs(path, spec)  # first: the cheapest answer
    if not (path / "tokenizer" / TOKENIZER_FILE).is_file():
        raise WeightsMissing(f"{path / 'tokenizer' / TOKENIZER_FILE} is not there")
    entries = {network: _checked_entries(path, spec, network) for network in network_names(spec)}
    return ModelFiles(path, spec, entries)


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
        networks |= {FOLDERS[expert]: dit for expert, dit in dits.items()}
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
        stored = torch.float32 if stays_fp32(network, name) else dtype
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


def _checked_entries(path: Path, spec: ModelSpec, network: NetworkName) -> Entries:
    """Our parameter name -> where its tensor lies; names and shapes are those of the network."""
    component = FOLDERS[network]
    folder = path / component
    found = component_entries(folder, _stem(component))
    if "shared.weight" in found:
        found.pop(UMT5_TIED_NAME, None)
    elif UMT5_TIED_NAME in found:
        found["shared.weight"] = found.pop(UMT5_TIED_NAME)
    meta = on_meta(spec, network)
    rows = _rows(meta)
    shapes = shapes_of(meta)
    theirs = {name: to_diffusers(name, rows) for name in shapes}
    missing = [name for name in theirs.values() if name not in found]
    if missing:
        raise WeightsMissing(f"{folder} lacks {listed(missing)}", hint="Download it again")
    wanted = set(theirs.values())
    unknown = [name for name in found if name not in wanted]
    if unknown:
        raise WeightsBroken(
            f"{folder} holds {listed(unknown)}, which the network does not have",
            hint=f"It may be a derivative of {spec.name}, or an adapter",
        )
    entries: dict[str, TensorEntry] = {}
    for name, shape in shapes.items():
        entry, in_file = found[theirs[name]], _file_shape(theirs[name], shape)
        if entry.shape != in_file:
            raise WeightsMismatch(
                f"{entry.file} has {entry.name} of shape {list(entry.shape)}, and"
                f" {spec.name} needs {list(in_file)}"
            )
        entries[name] = replace(entry, shape=shape)
    return entries


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


def _file_shape(theirs: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file: the VAE's norm weights carry the axes that they broadcast over."""
    if not theirs.endswith(".gamma"):
        return tuple(shape)
    return (*shape, 1, 1) if ".attentions." in theirs else (*shape, 1, 1, 1)
