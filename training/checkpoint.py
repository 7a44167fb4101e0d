"""Tensors to safetensors files and back, and the whole state of a run.

A run on a lent machine brings back a few files of bounded size: `save` cuts fp32 tensors into
shards, `save_bf16` writes a network as one file of half the bytes. `load` reads either.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.optim import Optimizer

SHARD_BYTES = 15 * 2**20  # the machines that we train on return files of 16 MiB at most


def save(
    directory: Path, tensors: Mapping[str, Tensor], *, prefix: str, note: object = None
) -> None:
    """Writes `prefix-0.safetensors`, `prefix-1...` and then `prefix.json`, which names them."""
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        if filled + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    names = [f"{prefix}-{i}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, directory / f".{name}.part")
        os.replace(directory / f".{name}.part", directory / name)
    (directory / f"{prefix}.json").write_text(json.dumps({"files": names, "note": note}))


def save_bf16(directory: Path, tensors: Mapping[str, Tensor], *, prefix: str, note: object) -> None:
    """Writes `prefix.safetensors`: the averaged weights of a network, rounded as they ship."""
    directory.mkdir(parents=True, exist_ok=True)
    rounded = {n: t.detach().to(torch.bfloat16).contiguous().cpu() for n, t in tensors.items()}
    part = directory / f".{prefix}.part"
    save_file(rounded, part, metadata={"note": json.dumps(note)})
    os.replace(part, directory / f"{prefix}.safetensors")


def exists(directory: Path, prefix: str) -> bool:
    """Whether `load` finds something."""
    return any((directory / f"{prefix}{suffix}").is_file() for suffix in (".json", ".safetensors"))


def load(directory: Path, prefix: str, device: torch.device) -> tuple[dict[str, Tensor], object]:
    """The tensors, in fp32, and the note that `save` or `save_bf16` wrote."""
    single = directory / f"{prefix}.safetensors"
    if not (directory / f"{prefix}.json").is_file() and single.is_file():
        with safe_open(single, framework="pt") as file:
            note = json.loads(file.metadata()["note"])
        return {n: t.float() for n, t in load_file(single, device=str(device)).items()}, note
    index = json.loads((directory / f"{prefix}.json").read_text())
    tensors: dict[str, Tensor] = {}
    for name in index["files"]:
        tensors.update(load_file(directory / name, device=str(device)))
    return tensors, index["note"]


def training_state(
    modules: dict[str, nn.Module], averages: dict[str, Tensor], optimizer: Optimizer
) -> dict[str, Tensor]:
    """Everything that a run needs to go on: weights, their average, and the optimizer's state.

    Weights that the optimizer does not change have no state in it.
    """
    parameters = {
        f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()
    }
    state = {f"weights.{name}": p.detach() for name, p in parameters.items()}
    state |= {f"average.{name}": tensor for name, tensor in averages.items()}
    state |= {
        f"first.{name}": optimizer.first[p]
        for name, p in parameters.items()
        if p in optimizer.first
    }
    state |= {
        f"second.{name}": optimizer.second[p]
        for name, p in parameters.items()
        if p in optimizer.second
    }
    state["steps"] = optimizer.steps
    return state


@torch.no_grad()
def restore(current: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Copies `saved` into `current`, name by name."""
    assert current.keys() == saved.keys(), set(current) ^ set(saved)
    for name, tensor in current.items():
        tensor.copy_(saved[name])
