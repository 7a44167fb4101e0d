"""Which file each network of a model comes from, in any layout people have; and opening them.

    official      high_noise_model/ low_noise_model/ (TI2V-5B: shards at the root), *.pth, google/
    diffusers     model_index.json, transformer/ transformer_2/ vae/ text_encoder/ tokenizer/
    ComfyUI       diffusion_models/ text_encoders/ vae/, or a folder of single files; GGUF
    mixed         any file for any network, named one by one

`choose` reads headers alone and imports no torch. `open_parts` holds every name and shape against
the networks: each tensor of a file is taken, and none is made up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wanfit.engine.weights import configs
from wanfit.engine.weights.configs import FOLDERS
from wanfit.engine.weights.container import open_container, storage_of, weights_of
from wanfit.engine.weights.headers import (
    BLOCKS,
    PLAIN_DTYPES,
    TensorEntry,
    component_file,
    read_json,
)
from wanfit.engine.weights.keys import (
    DIT,
    UMT5_SHARED_NAME,
    UMT5_TIED_NAME,
    file_shape,
    listed,
    network_names,
    rows_of,
    their_name,
)
from wanfit.engine.weights.parts import Part, read_parts
from wanfit.engine.weights.places import TOKENIZER_FILES
from wanfit.engine.weights.recognise import MODEL_INDEX, check_configs, recognise
from wanfit.engine.weights.scales import read_bytes
from wanfit.engine.weights.shelf import (
    Shelf,
    another_model,
    family_of,
    network_title,
    option_for,
)
from wanfit.errors import BadOption, WeightsBroken, WeightsMismatch, WeightsMissing
from wanfit.plan.plan import NetworkName
from wanfit.specs import MODELS, ModelSpec

if TYPE_CHECKING:
    from wanfit.engine.weights.files import ModelFiles

TOKENIZER_PLACES = ("tokenizer", "google/umt5-xxl", ".")  # below a model's directory
_TOKENIZER_NAMES = sorted(TOKENIZER_FILES, reverse=True)  # tokenizer.json before spiece.model
_QUANTISED = ("F8_E4M3", "F8_E5M2", *BLOCKS)  # I8 too, where it has a scale
_SAMPLE_BYTES = 4096  # ours: of a weight, to tell whether two experts are the same one


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which file each network of a model comes from."""

    spec: ModelSpec
    networks: Mapping[NetworkName, Part]
    tokenizer: Path | Part  # a tokenizer file, or the part that carries a vocabulary
    path: Path  # that a person knows the model by

    @property
    def is_plain(self) -> bool:
        """Whether the engine runs it as it lies in its files: nothing is quantised."""
        return all(part.is_plain for part in self.networks.values())


def choose(
    path: Path,
    spec: ModelSpec | None = None,
    *,
    high: Path | None = None,
    low: Path | None = None,
    text_encoder: Path | None = None,
    vae: Path | None = None,
    tokenizer: Path | None = None,
) -> Chosen:
    """The files of a model at `path`.

    path: a directory of any layout, or a weight file, whose directory then gives the rest.
    spec: which model; None: what the transformers say.
    high, low, text_encoder, vae, tokenizer: files that stand for what `path` has.

    Raises WeightsMissing for what is not there, WeightsBroken for files that are damaged,
    WeightsMismatch for those of another model, and where two files could be the same network;
    BadOption for an option that the model has no use for. Every message names the files.
    """
    if not path.exists():
        wanted = f"{spec.name} has to be there" if spec else "Give the directory of a model"
        raise WeightsMissing(f"There is no model directory at {path}", hint=wanted)
    files: dict[NetworkName, Path | None] = {
        "high_noise": high, "low_noise": low, "umt5": text_encoder, "vae": vae,
    }  # fmt: skip
    given = {network: file for network, file in files.items() if file is not None}
    models = MODELS if spec is None else (spec, *(other for other in MODELS if other != spec))
    if (path / MODEL_INDEX).is_file():
        spec = spec or recognise(path)
        check_configs(path, spec)
        parts = {
            network: _component(path, spec, network)
            for network in _people_order(spec)
            if network not in given
        }
    else:
        shelf = Shelf(path, models)
        spec = spec or _model_of(shelf, given, models)
        parts = {
            network: shelf.pick(spec, network, given.keys())
            for network in _people_order(spec)
            if network not in given
        }
    parts |= {network: _given_part(file, spec, network, models) for network, file in given.items()}
    ordered = {network: parts[network] for network in _people_order(spec)}
    if spec.boundary is not None:
        _check_experts_differ(ordered["high_noise"], ordered["low_noise"])
    for expert in spec.experts:
        config = ordered[expert].path.parent / "config.json"
        if ordered[expert].naming == "official" and config.is_file():
            configs.check_official_config(read_json(config), spec, config)
    return Chosen(spec, ordered, _tokenizer(path, tokenizer, ordered["umt5"]), path)


def _people_order(spec: ModelSpec) -> tuple[NetworkName, ...]:
    """The networks, transformers first: what people look for first is missed first."""
    return (*spec.experts, "umt5", "vae")


def open_parts(chosen: Chosen) -> ModelFiles:
    """Holds every tensor of the files against the networks, by headers. Imports torch.

    Raises WeightsMissing for tensors that are not there, WeightsBroken for those that no network
    takes and for dtypes that no weight has, WeightsMismatch for those of another shape.
    """
    from wanfit.engine.weights.files import ModelFiles

    entries = {
        network: _checked_entries(part, chosen.spec, network)
        for network, part in chosen.networks.items()
    }
    return ModelFiles(chosen.path, chosen.spec, entries, vocabulary=chosen.tokenizer)


def _component(path: Path, spec: ModelSpec, network: NetworkName) -> Part:
    """What lies where model_index.json says: folders tell what is what."""
    folder = FOLDERS[network]
    file = component_file(path / folder, configs.file_stem(folder))
    container = open_container(file)
    return Part(
        path=file,
        family=family_of(network),
        naming="diffusers",
        models=(spec,),
        expert=network if network in ("high_noise", "low_noise") else None,
        storage=storage_of(weights_of(container)),
        num_bytes=container.num_bytes,
        container=container,
    )


def _model_of(
    shelf: Shelf, given: Mapping[NetworkName, Path], models: Sequence[ModelSpec]
) -> ModelSpec:
    """The model that the transformers are of: those that were given, or those on the shelf."""
    files = [file for network, file in given.items() if family_of(network) == "dit"]
    parts = [part for file in files for part in read_parts(file, models) if part.family == "dit"]
    parts = parts or shelf.transformers()
    found = [spec for spec in models if any(spec in part.models for part in parts)]
    if len(found) == 1:
        return found[0]
    if found:
        raise WeightsMismatch(
            f"{shelf.path} has transformers of {', '.join(spec.name for spec in found)}",
            hint="Say which with --model",
        )
    if shelf.errors:
        raise shelf.errors[0]
    raise WeightsMissing(
        f"{shelf.path} has no transformer of Wan 2.2",
        hint="Give the directory of a model; wanfit models shows what is on this machine",
    )


def _given_part(
    file: Path, spec: ModelSpec, network: NetworkName, models: Sequence[ModelSpec]
) -> Part:
    """The part in a file, or a directory, that was given for `network`."""
    option = option_for(network)
    if network not in network_names(spec):
        raise BadOption(f"{option} was given, and {spec.name} has one transformer")
    if file.is_dir():
        return Shelf(file, models).pick(spec, network)
    title = network_title(spec, network)
    parts = [part for part in read_parts(file, models) if part.family == family_of(network)]
    if not parts:
        raise WeightsMismatch(f"{file} was given for the {title} ({option}), and holds none")
    part = parts[0]
    if spec not in part.models:
        raise another_model(part, spec)
    if spec.boundary is not None and part.expert not in (None, network):
        assert part.expert is not None
        raise WeightsMismatch(
            f"{file} was given for the {title} ({option}), and its name says that it is the"
            f" {network_title(spec, part.expert)}",
            hint="Give --high and --low the right way round, or rename the file",
        )
    return part


def _check_experts_differ(high: Part, low: Part) -> None:
    """Raises WeightsMismatch when both experts are one file, or copies of one."""
    # Not the paths: two indexes may well be equal, and one file of the hub's cache.
    shared = {_inode(file) for file in high.container.files}.intersection(
        _inode(file) for file in low.container.files
    )
    sample = _sample(high)
    if shared or (sample is not None and sample == _sample(low)):
        raise WeightsMismatch(
            f"Both experts come from the same weights: {high.path} and {low.path}",
            hint="A model has a high-noise and a low-noise expert; give one of each",
        )


def _inode(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_dev, stat.st_ino


def _sample(dit: Part) -> bytes | None:
    """The first bytes of a weight that differs between experts; None where all are zero."""
    entry = dit.weights.get(their_name("head.linear.weight", DIT, dit.naming))
    if entry is None:
        return None
    few = replace(entry, dtype="U8", shape=(min(entry.num_bytes, _SAMPLE_BYTES),), scale=None)
    content = read_bytes(few)
    return content if any(content) else None


def _tokenizer(path: Path, given: Path | None, umt5: Part) -> Path | Part:
    """A tokenizer file that was given, lies in `path` or beside the text encoder, or is in it."""
    if given is not None and given.is_file():
        return given
    near = (path if path.is_dir() else path.parent, umt5.path.parent, umt5.path.parent.parent)
    for home in near if given is None else (given,):
        for place in TOKENIZER_PLACES:
            for name in _TOKENIZER_NAMES:
                if (home / place / name).is_file():
                    return home / place / name
    if given is not None:
        raise WeightsMissing(f"There is no tokenizer at {given}")
    if umt5.has_vocabulary:
        return umt5
    wanted = path / TOKENIZER_PLACES[0] / _TOKENIZER_NAMES[0]
    raise WeightsMissing(
        f"{wanted} is not there, and {umt5.path} carries no vocabulary",
        hint="Give google/umt5-xxl's tokenizer.json or spiece.model with --tokenizer FILE",
    )


def _checked_entries(part: Part, spec: ModelSpec, network: NetworkName) -> dict[str, TensorEntry]:
    """Our parameter name -> where its tensor lies, with the shape that the network gives it."""
    from wanfit.engine.weights.networks import on_meta, shapes_of

    found = dict(part.weights)
    _untie(found, part, network)
    shapes = shapes_of(on_meta(spec, network))
    rows = rows_of(spec, network)
    theirs = {name: their_name(name, rows, part.naming) for name in shapes}
    where = part.path.parent if part.path.name.endswith(".index.json") else part.path
    missing = [name for name in theirs.values() if name not in found]
    if missing:
        raise WeightsMissing(f"{where} lacks {listed(missing)}", hint="Download it again")
    wanted = set(theirs.values())
    unknown = [name for name in found if name not in wanted]
    if unknown:
        raise WeightsBroken(
            f"{where} holds {listed(unknown)}, which the network does not have",
            hint=f"It may be a derivative of {spec.name}, or an adapter",
        )
    return {
        name: _checked(found[theirs[name]], name, shape, spec, part)
        for name, shape in shapes.items()
    }


def _untie(found: dict[str, TensorEntry], part: Part, network: NetworkName) -> None:
    """Leaves one of the two names that transformers gives UMT5's embedding."""
    if network == "umt5" and part.naming == "diffusers":
        tied = found.pop(UMT5_TIED_NAME, None)
        if tied is not None:
            found.setdefault(UMT5_SHARED_NAME, tied)


def _checked(
    entry: TensorEntry, name: str, shape: tuple[int, ...], spec: ModelSpec, part: Part
) -> TensorEntry:
    """The entry as the network has it. GGUF loses sides of 1, and keeps the order of values."""
    in_file = file_shape(name, entry.name, shape)
    same_values = part.container.kind == "gguf" and math.prod(entry.shape) == math.prod(shape)
    if entry.shape != in_file and not same_values:
        raise WeightsMismatch(
            f"{entry.file} has {entry.name} of shape {list(entry.shape)}, and"
            f" {spec.name} needs {list(in_file)}"
        )
    is_scaled_int8 = entry.dtype == "I8" and entry.scale is not None
    if entry.dtype not in (*PLAIN_DTYPES, *_QUANTISED) and not is_scaled_int8:
        raise WeightsBroken(
            f"{entry.file} holds {entry.name} as {entry.dtype}, which is not read here",
            hint="Weights come in F32, F16, BF16, fp8, int8 with scales, or GGUF's blocks",
        )
    return replace(entry, shape=shape)
