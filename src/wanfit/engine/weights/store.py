"""wanfit's own weight store: files that stream well, checked when opened.

    wanfit.json              format, model, precision, configs; each file's size and checksum
    high_noise.safetensors   low_noise.safetensors   umt5.safetensors   vae.safetensors
    tokenizer/tokenizer.json

Each file is valid safetensors. What it calls a tensor is one unit (`weights.layout`): a U8 run of
bytes that begins at a multiple of 4096, so that it can be read around the page cache and registered
with CUDA. Units lie in the order in which a forward pass uses them. The header's metadata holds the
index (the tensors of each unit and its checksum, as JSON), and a checksum of the whole header.

Checksums are CRC-32 (zlib, in the standard library): they find damage, not malice. Measured at 6.3
GB/s on one core of a 2-core EPYC, where SHA-256 has 1.9 and BLAKE2b 1.3; so a check runs at the
speed of the disk. Any change within 32 adjacent bits is found, any other but for one in 2^32.

Opening reads wanfit.json and the headers, no tensor. Writing is `weights.convert`'s.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wanfit.engine.tokenizer import TOKENIZER_FILE
from wanfit.engine.weights import configs
from wanfit.engine.weights.configs import Json
from wanfit.engine.weights.files import Entries, ModelFiles, StoredUnit
from wanfit.engine.weights.headers import (
    PLAIN_DTYPES,
    TensorEntry,
    check_length,
    parse_header,
    read_header,
    read_json,
)
from wanfit.engine.weights.keys import listed, network_names
from wanfit.engine.weights.layout import TORCH_DTYPES, UnitLayout, join_name, lay_out
from wanfit.engine.weights.networks import layouts_of
from wanfit.engine.weights.recognise import STORE_FILE, STORE_PRECISIONS
from wanfit.errors import WeightsBroken, WeightsMismatch, WeightsMissing
from wanfit.plan.plan import NetworkName, Precision
from wanfit.plan.weights import align
from wanfit.specs import ModelSpec

FORMAT = 1
UNIT_ALIGN_BYTES = 4096  # a page; what reads around the page cache and CUDA's registration ask for
NO_CHECKSUM = "00000000"  # stands for one that is not known yet, in as many characters

_CHECKSUM_FIELD = re.compile(rb'"wanfit_checksum":"([0-9a-f]{8})"')
_CONVERT_AGAIN = "Convert the model again, or copy the file again"


def checksum_text(crc32: int) -> str:
    """A CRC-32 as files hold it: 8 hexadecimal digits."""
    return f"{crc32:08x}"


@dataclass(frozen=True, slots=True)
class StoreIndex:
    """What one file of a store holds, and where."""

    model: str
    network: NetworkName
    precision: Precision
    layouts: Mapping[str, UnitLayout]  # unit -> its tensors, in the order of the file
    checksums: Mapping[str, str]  # unit -> of its bytes, padding included

    def runs(self) -> dict[str, tuple[int, int]]:
        """Unit -> (begin, end) in bytes from the end of the header."""
        runs, begin = {}, 0
        for unit, layout in self.layouts.items():
            end = begin + align(layout.num_bytes, UNIT_ALIGN_BYTES)
            runs[unit] = (begin, end)
            begin = end
        return runs

    def header(self) -> bytes:
        """The file's first bytes. As many whatever the checksums; a multiple of 4096."""
        index = {
            "format": FORMAT,
            "model": self.model,
            "network": self.network,
            "precision": self.precision,
            "units": {
                unit: {
                    "crc32": self.checksums[unit],
                    "tensors": [list(place) for place in layout.places],
                }
                for unit, layout in self.layouts.items()
            },
        }
        metadata = {"wanfit": _compact(index), "wanfit_checksum": NO_CHECKSUM}
        text = _compact({"__metadata__": metadata, **self.tensors()}).encode()
        header_bytes = align(8 + len(text), UNIT_ALIGN_BYTES)
        raw = (header_bytes - 8).to_bytes(8, "little") + text.ljust(header_bytes - 8)
        return _with_checksum(raw, checksum_text(zlib.crc32(raw)))

    def tensors(self) -> Json:
        """The units as safetensors' header lists them."""
        return {
            unit: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
            for unit, (begin, end) in self.runs().items()
        }


def header_checksum(raw: bytes) -> str:
    """The checksum that a header holds of itself. Raises ValueError when it has not just one."""
    (found,) = _CHECKSUM_FIELD.findall(raw)
    return str(found, "ascii")


def store_file(network: NetworkName) -> str:
    """The name of a network's file."""
    return f"{network}.safetensors"


def store_json(spec: ModelSpec, precision: Precision, headers: Mapping[NetworkName, Json]) -> Json:
    """What wanfit.json holds. `headers`: per network, {"bytes", "header_crc32"} of its file."""
    components = configs.components_of(spec)
    return {
        "format": FORMAT,
        "model": spec.name,
        "precision": precision,
        "files": {store_file(network): headers[network] for network in network_names(spec)},
        "configs": {part: configs.component_config(spec, part) for part in components},
    }


def open_store(path: Path, spec: ModelSpec) -> ModelFiles:
    """Checks a store against `spec` by its headers, in milliseconds, reading no tensor.

    Raises WeightsMissing for an absent file or tensor, WeightsBroken for a file that was cut or
    changed, WeightsMismatch for the store of another model or of a later format.
    """
    about = read_json(path / STORE_FILE)
    precision = _checked_about(path, about, spec)
    absent = [name for name in map(store_file, network_names(spec)) if not (path / name).is_file()]
    if absent:
        raise WeightsMissing(f"{path / absent[0]} is not there", hint=_CONVERT_AGAIN)
    if not (path / "tokenizer" / TOKENIZER_FILE).is_file():
        raise WeightsMissing(f"{path / 'tokenizer' / TOKENIZER_FILE} is not there")
    units: list[StoredUnit] = []
    entries: dict[NetworkName, Entries] = {}
    for network in network_names(spec):
        found = _read_units(path, about, network, precision)
        units += found
        entries[network] = _checked_entries(found, spec, network, precision)
    return ModelFiles(path, spec, entries, precision=precision, units=tuple(units))


def read_index(file: Path) -> tuple[StoreIndex, bytes]:
    """(index, header) of one file of a store, by its checksum as they were written.

    Raises WeightsBroken, or WeightsMismatch for a later format.
    """
    raw = read_header(file)
    try:
        stored = header_checksum(raw)
    except ValueError:
        raise WeightsBroken(f"{file} has no checksum in its header", hint=_CONVERT_AGAIN) from None
    computed = checksum_text(zlib.crc32(_with_checksum(raw, NO_CHECKSUM)))
    if computed != stored:
        raise WeightsBroken(
            f"{file} has a header that was changed: its checksum is {computed} instead of {stored}",
            hint=_CONVERT_AGAIN,
        )
    header = parse_header(file, raw)
    try:
        index = _parse_index(file, json.loads(header["__metadata__"]["wanfit"]))
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsBroken(f"{file} has a malformed index: {error!r}") from None
    if {name: fields for name, fields in header.items() if name != "__metadata__"} != (
        index.tensors()
    ):
        raise WeightsBroken(f"{file} has an index that disagrees with its header")
    return index, raw


def _parse_index(file: Path, fields: Mapping[str, Any]) -> StoreIndex:
    _check_format(file, fields["format"])
    layouts: dict[str, UnitLayout] = {}
    for unit, unit_fields in fields["units"].items():
        tensors = [(str(n), str(d), tuple(map(int, s))) for n, d, s, _ in unit_fields["tensors"]]
        unknown = [dtype for _, dtype, _ in tensors if dtype not in TORCH_DTYPES]
        if unknown:
            raise ValueError(f"no dtype {unknown[0]}")
        layouts[unit] = lay_out(tensors)
        if [place.offset for place in layouts[unit].places] != [
            t[3] for t in unit_fields["tensors"]
        ]:
            raise ValueError(f"the tensors of {unit} do not lie as format {FORMAT} has them")
    return StoreIndex(
        model=fields["model"],
        network=fields["network"],
        precision=fields["precision"],
        layouts=layouts,
        checksums={unit: fields["units"][unit]["crc32"] for unit in layouts},
    )


def _checked_about(path: Path, about: Json, spec: ModelSpec) -> Precision:
    """The store's precision, when wanfit.json is that of a store of `spec`."""
    file = path / STORE_FILE
    _check_format(file, about.get("format"))
    model, precision, files = about.get("model"), about.get("precision"), about.get("files")
    if model != spec.name:
        raise WeightsMismatch(
            f"{spec.name} was asked for, and {path} is a store of {model}",
            hint=f"Give the store of {spec.name}, or name the model that this one holds",
        )
    known = [known for known in STORE_PRECISIONS if known == precision]
    if not known or not isinstance(files, dict):
        raise WeightsBroken(f"{file} lacks its precision or its list of files", hint=_CONVERT_AGAIN)
    found_configs = about.get("configs")
    for component in configs.components_of(spec):
        config = found_configs.get(component) if isinstance(found_configs, dict) else None
        if not isinstance(config, dict):
            raise WeightsBroken(f"{file} lacks the config of {component}", hint=_CONVERT_AGAIN)
        configs.check_config(config, spec, component)
    return known[0]


def _check_format(file: Path, found: object) -> None:
    if not isinstance(found, int) or found < 1:
        raise WeightsBroken(f"{file} has the format {found!r}, which is not a number of a format")
    if found > FORMAT:
        raise WeightsMismatch(
            f"{file} has format {found}, and this version of wanfit reads format {FORMAT}",
            hint="Update wanfit, or convert the model again",
        )


def _read_units(
    path: Path, about: Json, network: NetworkName, precision: Precision
) -> list[StoredUnit]:
    """The units of one file, when the file is whole and belongs to this store."""
    file = path / store_file(network)
    index, raw = read_index(file)
    runs = index.runs()
    check_length(file, len(raw) + max((end for _, end in runs.values()), default=0))
    expected = about["files"].get(file.name)
    found = {"bytes": file.stat().st_size, "header_crc32": header_checksum(raw)}
    if found != expected or (index.model, index.network, index.precision) != (
        about["model"],
        network,
        precision,
    ):
        raise WeightsBroken(
            f"{file} is not the file that {path / STORE_FILE} was written with:"
            f" {found} of {index.model} in {index.precision} instead of {expected}",
            hint=_CONVERT_AGAIN,
        )
    return [
        StoredUnit(
            file=file,
            network=network,
            name=unit,
            layout=layout,
            offset=len(raw) + runs[unit][0],
            num_bytes=runs[unit][1] - runs[unit][0],
            checksum=index.checksums[unit],
        )
        for unit, layout in index.layouts.items()
    ]


def _checked_entries(
    units: list[StoredUnit], spec: ModelSpec, network: NetworkName, precision: Precision
) -> Entries:
    """Our parameter name -> where its tensor lies; names, shapes and dtypes are the network's."""
    entries = {
        join_name(unit.name, place.name): TensorEntry(
            unit.file,
            join_name(unit.name, place.name),
            place.dtype,
            place.shape,
            unit.offset + place.offset,
        )
        for unit in units
        for place in unit.layout.places
    }
    file = units[0].file
    wanted = {
        join_name(unit, place.name): place
        for unit, layout in layouts_of(spec, network, precision).items()
        for place in layout.places
    }
    missing = [name for name in wanted if name not in entries]
    if missing:
        raise WeightsMissing(f"{file} lacks {listed(missing)}", hint=_CONVERT_AGAIN)
    unknown = [name for name in entries if name not in wanted]
    if unknown:
        raise WeightsBroken(f"{file} holds {listed(unknown)}, which the network does not have")
    for name, place in wanted.items():
        entry = entries[name]
        dtypes = PLAIN_DTYPES if network == "vae" else (place.dtype,)
        if entry.shape != place.shape or entry.dtype not in dtypes:
            raise WeightsMismatch(
                f"{file} has {name} as {entry.dtype} {list(entry.shape)}, and {spec.name} needs"
                f" {' or '.join(dtypes)} {list(place.shape)}"
            )
    return entries


def _with_checksum(raw: bytes, checksum: str) -> bytes:
    return _CHECKSUM_FIELD.sub(b'"wanfit_checksum":"%b"' % checksum.encode(), raw)


def _compact(value: Json) -> str:
    return json.dumps(value, separators=(",", ":"))
