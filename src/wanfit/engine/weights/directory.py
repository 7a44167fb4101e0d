"""Writes a model directory in diffusers layout, which `checkpoint.choose` and diffusers read.

    model_index.json
    transformer/    the high-noise expert, or the only one      transformer_2/  the low-noise expert
    vae/            text_encoder/            tokenizer/tokenizer.json            scheduler/

Left out: shards, since one file of any size serves both readers.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
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
from wanfit.engine.weights.keys import DIT, UMT5, Row, file_shape, to_diffusers, vae_rows
from wanfit.engine.weights.layout import stays_fp32
from wanfit.engine.weights.networks import AnyNetwork
from wanfit.engine.weights.recognise import MODEL_INDEX
from wanfit.errors import BadOutput
from wanfit.specs import Expert, ModelSpec


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
    """Writes a directory that `choose` and diffusers' `from_pretrained` read.

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
        shape = file_shape(name, theirs, tuple(tensor.shape))
        tensors[theirs] = tensor.detach().to("cpu", stored).reshape(shape).contiguous()
    return tensors


def _write_component(
    folder: Path, spec: ModelSpec, component: Component, network: AnyNetwork, dtype: torch.dtype
) -> None:
    folder.mkdir(parents=True)
    tensors = file_tensors(network, dtype)
    # The metadata is what diffusers and transformers look for before they read a file.
    file = folder / f"{configs.file_stem(component)}.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    config = configs.component_config(spec, component)
    if component == "text_encoder":
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)


def _write_json(file: Path, content: Json) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _rows(network: AnyNetwork) -> Sequence[Row]:
    match network:
        case Umt5():
            return UMT5
        case Vae():
            return vae_rows(network.spec)
        case Dit():
            return DIT
