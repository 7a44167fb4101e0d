"""Writes a random model of true size as a wanfit store, in the time that the disk takes.

    python -m benchmarks.true_size DIR --model t2v-a14b --precision bf16 [--real umt5=0]

Shapes, dtypes and layout are those of the real model; the values are drawn so that every part
matters and nothing overflows. One run of normals is drawn, and each tensor is a part of it that
begins elsewhere, scaled by 1 / sqrt(inputs): no two blocks hold the same bytes.

Where the disk is too small, `--real NETWORK=N` writes only the first N blocks of a network, and the
rest are holes in the file; with N = 0 all but its unit "rest" is. A hole reads as zeros: it takes
its true size in the page cache and on the link, and neither disk space nor time to read. So figures
of memory stand, and those of the disk, of seconds (products of zeros are faster) and of values do
not. What is a hole is printed, and kept in DIR/true_size.json.
Left out: the real tokenizer and vocabulary; a few words are known.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from wanfit.engine.ops.linear import FP8_MAX
from wanfit.engine.tokenizer import TOKENIZER_FILE
from wanfit.engine.weights.configs import Json
from wanfit.engine.weights.keys import network_names
from wanfit.engine.weights.layout import UnitLayout, join_name, network_layouts, views
from wanfit.engine.weights.networks import on_meta
from wanfit.engine.weights.recognise import STORE_FILE, STORE_PRECISIONS
from wanfit.engine.weights.store import (
    NO_CHECKSUM,
    StoreIndex,
    checksum_text,
    header_checksum,
    store_file,
    store_json,
)
from wanfit.plan.plan import NetworkName, Precision
from wanfit.plan.weights import REST
from wanfit.specs import ModelSpec, spec_named

NUM_NORMALS = (1 << 24) + 43  # a prime: rows of a matrix never line up with its repeats
MODULATION_SCALE = 0.1
BIAS_SCALE = 0.02
WRITE_BYTES = 64 << 20
NOTE_FILE = "true_size.json"
# Ids 0 to 3 are T5's special tokens, in T5's order.
NUM_SPECIAL_WORDS = 4
WORDS = ("<pad>", "</s>", "<s>", "<unk>", "a", "red", "circle", "moves", "left", "over", "blue")


@dataclass(frozen=True, slots=True)
class Written:
    """What was written."""

    model: str
    precision: Precision
    num_bytes: int  # as the files' lengths say
    disk_bytes: int  # as they take on the disk, holes left out
    holes: Mapping[str, int]  # network -> how many of its units are holes
    elapsed_s: float


class Normals:
    """Tensors of any shape and dtype cut from one run of normals."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._wide = torch.randn(NUM_NORMALS, generator=generator)
        most = float(self._wide.abs().max())
        self._fp8_scale = most / FP8_MAX
        self._fp8 = (self._wide / self._fp8_scale).to(torch.float8_e4m3fn).view(torch.uint8)

    def fill(self, flat: Tensor, unit: str, layout: UnitLayout, phase: int) -> None:
        """Fills a unit (uint8 [num_bytes]); another `phase`, other values."""
        tensors = views(flat, layout)
        for inner, tensor in tensors.items():
            phase = (phase * 48_271 + 11) % NUM_NORMALS  # ours: any walk over the run will do
            if tensor.dtype == torch.float8_e4m3fn:
                self._copy(self._fp8, tensor.view(torch.uint8), phase)
                row_scale = tensors[f"{inner.removesuffix('weight')}scale"]
                row_scale.fill_(self._fp8_scale / math.sqrt(tensor[0].numel()))
            elif not inner.endswith(".scale"):
                self._copy(self._wide, tensor, phase)
                _rescale(join_name(unit, inner), tensor)

    def _copy(self, source: Tensor, target: Tensor, phase: int) -> None:
        """target = source[phase:], begun anew at its end as often as it takes."""
        flat, done = target.view(-1), 0
        while done < flat.numel():
            part = source[phase : phase + flat.numel() - done]
            flat[done : done + part.numel()] = part
            done, phase = done + part.numel(), 0


def _rescale(name: str, tensor: Tensor) -> None:
    """Brings normals to the scale that a parameter of this name has at the start of training."""
    if "modulation" in name:
        tensor.mul_(MODULATION_SCALE)
    elif "norm" in name and name.endswith("weight"):
        tensor.fill_(1)
    elif tensor.ndim == 1:
        tensor.mul_(BIAS_SCALE)
    elif not name.startswith("token_embed"):
        tensor.mul_(1 / math.sqrt(tensor[0].numel()))


def write_true_size(
    path: Path,
    spec: ModelSpec,
    precision: Precision,
    *,
    real_blocks: Mapping[NetworkName, int] | None = None,
    seed: int = 0,
    num_threads: int | None = None,
) -> Written:
    """A store of `spec` at `path`, written over what is there. The VAE is in fp32.

    real_blocks: of these networks only the first blocks have bytes on disk (see the module).
    """
    began_s = time.perf_counter()
    path.mkdir(parents=True, exist_ok=True)
    (path / STORE_FILE).unlink(missing_ok=True)  # half a store is none
    normals = Normals(seed)
    headers: dict[NetworkName, Json] = {}
    holes: dict[str, int] = {}
    with ThreadPoolExecutor(num_threads or min(8, os.cpu_count() or 1)) as pool:
        for network in network_names(spec):
            layouts = _layouts(spec, network, precision)
            unknown = dict.fromkeys(layouts, NO_CHECKSUM)
            index = StoreIndex(spec.name, network, precision, layouts, unknown)
            hollow = _hollow(layouts, (real_blocks or {}).get(network))
            if hollow:
                holes[network] = len(hollow)
            file = path / store_file(network)
            headers[network] = _write_network(file, index, hollow, normals, pool)
    (path / "tokenizer").mkdir(exist_ok=True)
    _write_json(path / "tokenizer" / TOKENIZER_FILE, small_tokenizer())
    _write_json(path / NOTE_FILE, {"holes": holes, "seed": seed})
    _write_json(path / STORE_FILE, store_json(spec, precision, headers))
    stats = [(path / store_file(network)).stat() for network in network_names(spec)]
    return Written(
        spec.name,
        precision,
        num_bytes=sum(stat.st_size for stat in stats),
        disk_bytes=sum(stat.st_blocks * 512 for stat in stats),  # stat(2): of 512 bytes
        holes=holes,
        elapsed_s=time.perf_counter() - began_s,
    )


def holes_of(path: Path) -> dict[str, int]:
    """Network -> how many of its units are holes, of a store that was written here."""
    holes: dict[str, int] = json.loads((path / NOTE_FILE).read_text(encoding="utf-8"))["holes"]
    return holes


def store_bytes(spec: ModelSpec, precision: Precision) -> dict[NetworkName, int]:
    """Bytes of each network's file, headers left out."""
    return {
        network: sum(unit.num_bytes for unit in _layouts(spec, network, precision).values())
        for network in network_names(spec)
    }


def _layouts(spec: ModelSpec, network: NetworkName, precision: Precision) -> dict[str, UnitLayout]:
    return network_layouts(on_meta(spec, network), "fp32" if network == "vae" else precision)


def _hollow(layouts: Mapping[str, UnitLayout], real: int | None) -> set[str]:
    """The units that are to be holes."""
    if real is None:
        return set()
    if real == 0:
        return set(layouts) - {REST}
    return set([unit for unit in layouts if unit.startswith("blocks.")][real:])


def _write_network(
    path: Path,
    index: StoreIndex,
    hollow: set[str],
    normals: Normals,
    pool: ThreadPoolExecutor,
) -> Json:
    """One file of a store, by several threads. What wanfit.json says of it."""
    lengths = {unit: end - begin for unit, (begin, end) in index.runs().items()}
    header_bytes = len(index.header())  # as many whatever the checksums
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    buffers = _Buffers()

    def write(unit: str) -> str:
        """Draws and writes one unit. Its checksum."""
        if unit in hollow:
            return _checksum_of_zeros(lengths[unit])
        flat = buffers.zeros(lengths[unit])
        raw = flat.numpy().data
        phase = zlib.crc32(f"{index.network}.{unit}".encode()) % NUM_NORMALS
        normals.fill(flat, unit, index.layouts[unit], phase)
        _write_all(descriptor, raw, header_bytes + index.runs()[unit][0])
        return checksum_text(zlib.crc32(raw))

    try:
        os.ftruncate(descriptor, header_bytes + sum(lengths.values()))
        checksums = dict(zip(lengths, pool.map(write, lengths), strict=True))
        header = replace(index, checksums=checksums).header()
        _write_all(descriptor, memoryview(header), 0)
    finally:
        os.close(descriptor)
    return {"bytes": path.stat().st_size, "header_crc32": header_checksum(header)}


class _Buffers(threading.local):
    """A buffer for each thread, kept: fresh pages cost more than what is done with them."""

    def __init__(self) -> None:
        self._flat = torch.empty(0, dtype=torch.uint8)

    def zeros(self, num_bytes: int) -> Tensor:
        if self._flat.numel() < num_bytes:
            self._flat = torch.empty(num_bytes, dtype=torch.uint8)
        return self._flat[:num_bytes].zero_()


@cache
def _checksum_of_zeros(num_bytes: int) -> str:
    zeros, crc32 = bytes(1 << 20), 0
    for begin in range(0, num_bytes, len(zeros)):
        crc32 = zlib.crc32(zeros[: num_bytes - begin], crc32)
    return checksum_text(crc32)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """pwrite(2) takes about 2 GiB at most, and may take less."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + WRITE_BYTES], offset + done)


def _write_json(file: Path, content: Json) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def small_tokenizer() -> Json:
    """A tokenizer.json of a few whole words, split at spaces."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": word, "special": True, **special}
            for i, word in enumerate(WORDS[:NUM_SPECIAL_WORDS])
        ],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "</s>", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(WORDS)},
            "unk_token": "<unk>",
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.true_size", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--model", type=spec_named, required=True, metavar="NAME")
    parser.add_argument("--precision", choices=STORE_PRECISIONS, default="bf16")
    parser.add_argument(
        "--real", type=_network_count, action="append", default=[], metavar="NETWORK=N"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    written = write_true_size(
        options.path,
        options.model,
        options.precision,
        real_blocks=dict(options.real),
        seed=options.seed,
    )
    print(json.dumps(asdict(written)))
    return 0


def _network_count(text: str) -> tuple[str, int]:
    network, _, count = text.partition("=")
    if network not in get_args(NetworkName) or not count.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not NETWORK=N, as in umt5=0")
    return network, int(count)


if __name__ == "__main__":
    sys.exit(main())
