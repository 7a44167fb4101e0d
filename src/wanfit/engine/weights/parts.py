"""One network, or an adapter, in a weight file: which, of which models, in which encoding.

Told from names and shapes, never from the file's own name; but for the two experts of an A14B
model, which only the name of file or folder tells apart. A few telling shapes decide here, without
torch: that every tensor is there with its shape is checked when a part is opened
(`weights.checkpoint`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wanfit.engine.weights.container import (
    Container,
    open_container,
    storage_of,
    weights_of,
)
from wanfit.engine.weights.headers import TensorEntry
from wanfit.engine.weights.keys import (
    UMT5_SHARED_NAME,
    Naming,
    rows_of,
    their_name,
)
from wanfit.engine.weights.naming import (
    Family,
    Group,
    expert_word,
    family_of,
    groups_of,
    num_blocks,
    other_model,
    vocabulary_entry,
    weights_below,
)
from wanfit.engine.weights.scales import read_bytes
from wanfit.errors import WeightsBroken, WeightsMismatch
from wanfit.plan.plan import NetworkName
from wanfit.specs import MODELS, Expert, ModelSpec

Shape = tuple[int, ...]
NetworkFamily = Literal["dit", "umt5", "vae"]
_FAMILY_NETWORK: Mapping[Family, NetworkName] = {
    "dit": "high_noise",
    "umt5": "umt5",
    "vae": "vae",
}
_FAMILY_WORDS: Mapping[Family, str] = {
    "dit": "transformer",
    "umt5": "text encoder",
    "vae": "VAE",
    "lora": "adapter",
}
_EXPERT_FOLDERS: Mapping[str, Expert] = {
    "transformer": "high_noise",
    "transformer_2": "low_noise",
}
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.|-)")
MAX_VOCABULARY_BYTES = 64 << 20  # ours; google/umt5-xxl's spiece.model has 4,548,313
_VOCABULARY_KEY = "tokenizer.ggml.tokens"  # of GGUF's metadata


@dataclass(frozen=True, slots=True)
class Part:
    """The weights of one network (or an adapter), found by content."""

    path: Path  # the file, or the index of its shards
    family: Family
    naming: Naming  # of an adapter: "official", whatever its own
    models: tuple[ModelSpec, ...]  # whose network has these shapes (T2V's VAE is also I2V's)
    expert: Expert | None  # None: cannot be told, or the model has one
    storage: str  # `container.storage_of`
    num_bytes: int  # on disk
    container: Container
    prefix: str = ""  # of its names in the file

    @property
    def weights(self) -> dict[str, TensorEntry]:
        """Its tensors by their names without the prefix, each with its scale."""
        return weights_below(weights_of(self.container), self.prefix)

    @property
    def has_vocabulary(self) -> bool:
        """Whether a tokenizer can be made from this file (`weights.vocabulary`)."""
        in_metadata = _VOCABULARY_KEY in self.container.metadata
        return in_metadata or vocabulary_entry(self.container.entries) is not None

    def sentencepiece(self) -> bytes | None:
        """The serialized sentencepiece model that ComfyUI's text encoders carry; None: no such.

        Raises WeightsBroken.
        """
        entry = vocabulary_entry(self.container.entries)
        if entry is None:
            return None
        if entry.dtype != "U8" or entry.num_bytes > MAX_VOCABULARY_BYTES:
            raise WeightsBroken(
                f"{self.path} has {entry.name} as {entry.dtype} {list(entry.shape)}, and a"
                f" vocabulary in at most {MAX_VOCABULARY_BYTES} bytes is wanted"
            )
        return read_bytes(entry)

    @property
    def is_plain(self) -> bool:
        """Whether it runs as it lies there: nothing is quantised."""
        return all(entry.is_plain for entry in self.weights.values())

    @property
    def word(self) -> str:
        """What it is, for people: "text encoder", "high-noise expert"."""
        if self.expert is not None:
            return f"{self.expert.removesuffix('_noise')}-noise expert"
        return _FAMILY_WORDS[self.family]


def read_part(path: Path, models: Sequence[ModelSpec] = MODELS) -> Part:
    """The one network or adapter at `path`: a weight file, or the index of its shards.

    Raises WeightsMissing for what is not there, WeightsBroken for a file that cannot be read,
    WeightsMismatch for one of no model in `models` (by its name where it is known), and for a file
    with several networks, which is for `read_parts`.
    """
    parts = read_parts(path, models)
    if len(parts) > 1:
        words = ", ".join(part.word for part in parts)
        raise WeightsMismatch(f"{path} holds several networks: {words}")
    return parts[0]


def read_parts(path: Path, models: Sequence[ModelSpec] = MODELS) -> tuple[Part, ...]:
    """All networks at `path`; more than one for an all-in-one file. Raises as `read_part`."""
    container = open_container(path)
    groups = groups_of(weights_of(container))
    return tuple(_part(container, group, models, alone=len(groups) == 1) for group in groups)


def expert_named(path: Path) -> Expert | None:
    """Which expert a file is by its name, or else by its folder's; None: neither tells, or both.

    Beside `expert_word`: diffusers' transformer/ and transformer_2/.
    """
    return expert_word(path) or _EXPERT_FOLDERS.get(path.parent.name)


def _part(container: Container, group: Group, models: Sequence[ModelSpec], *, alone: bool) -> Part:
    path, names = container.path, group.weights
    found = family_of(names)
    if found is None:
        raise _unknown(container, group, alone=alone)
    family, naming = found
    if container.kind == "gguf" and family == "dit" and naming == "official":
        naming = "gguf"
    fitting: tuple[ModelSpec, ...] = ()
    if family != "lora":
        fitting = _fitting(container, group, family, naming, models)
    two = any(spec.boundary is not None for spec in fitting)
    return Part(
        path=path,
        family=family,
        naming=naming,
        models=fitting,
        expert=expert_named(path) if family == "lora" or (family == "dit" and two) else None,
        storage=storage_of(names),
        num_bytes=(
            container.num_bytes if alone else sum(entry.num_bytes for entry in names.values())
        ),
        container=container,
        prefix=group.prefix,
    )


def _fitting(
    container: Container,
    group: Group,
    family: Family,
    naming: Naming,
    models: Sequence[ModelSpec],
) -> tuple[ModelSpec, ...]:
    """The models whose network has the telling shapes. Raises WeightsMismatch when there is none"""
    other = other_model(group.weights) if family == "dit" else None
    if other is not None:
        raise _refused(container.path, other)
    if family == "dit":
        _check_patch_embedding(container, group, naming)
    found = [spec for spec in models if _fits(group, spec, family, naming)]
    if found:
        return tuple(found)
    known = [spec.name for spec in MODELS if _fits(group, spec, family, naming)]
    if known:
        wanted = ", ".join(spec.name for spec in models)
        raise WeightsMismatch(
            f"{container.path} is the {_FAMILY_WORDS[family]} of {' or '.join(known)}, and"
            f" {wanted} was asked for"
        )
    raise _lost_shard(container.path) or _refused(container.path, _described(group, family, naming))


def _fits(group: Group, spec: ModelSpec, family: Family, naming: Naming) -> bool:
    """Whether the telling shapes are those of `spec`. What is missing is not for here to say."""
    blocks = num_blocks(group.weights, naming, family)
    rows = rows_of(spec, _FAMILY_NETWORK[family])

    def has(ours: str, shape: Shape) -> bool:
        entry = group.weights.get(their_name(ours, rows, naming))
        return entry is None or math.prod(entry.shape) == math.prod(shape)

    match family:
        case "dit":
            dit = spec.dit
            patch = math.prod(dit.patch)
            return (
                blocks == dit.num_blocks
                and has("patch_embed.weight", (dit.width, dit.in_channels, patch))
                and has("patch_embed.bias", (dit.width,))
                and has("head.linear.bias", (patch * dit.out_channels,))
                and has("blocks.0.ffn.up.bias", (dit.ffn_width,))
                and has("text_embed.up.weight", (dit.width, dit.text_width))
            )
        case "umt5":
            umt5 = spec.umt5
            return (
                blocks == umt5.num_blocks
                and has("token_embed.weight", (umt5.vocab_size, umt5.width))
                and has("norm_out.weight", (umt5.width,))
            )
        case "vae":
            vae = spec.vae
            decoder_width = vae.decoder_width * vae.width_multipliers[-1]
            return (
                _is_staged(group, naming) == (vae.generation == "2.2")
                and has("decoder.conv_in.weight", (decoder_width, vae.latent_channels, 27))
                and has("encoder.conv_in.weight", (vae.encoder_width, 3 * vae.pixel_patch**2, 27))
            )
        case "lora":
            return True


def _is_staged(group: Group, naming: Naming) -> bool:
    """Whether the VAE's encoder has a list of layers for each stage, as 2.2 has."""
    begin = "encoder.down_blocks.0.resnets." if naming == "diffusers" else (
        "encoder.downsamples.0.downsamples."
    )  # fmt: skip
    return any(name.startswith(begin) for name in group.weights)


def _check_patch_embedding(container: Container, group: Group, naming: Naming) -> None:
    """Raises WeightsBroken for a GGUF file that lost it: llama.cpp's quantiser takes 4 sides."""
    if container.kind == "gguf" and "patch_embedding.weight" not in group.weights:
        raise WeightsBroken(
            f"{container.path} lacks patch_embedding.weight, which the quantiser drops and which"
            " was not put back",
            hint="Get another file, or mend it with city96's fix_5d_tensors.py",
        )


def _described(group: Group, family: Family, naming: Naming) -> str:
    """A network of no model of ours, by its shapes."""
    shapes = {name: entry.shape for name, entry in group.weights.items()}
    match family:
        case "dit":
            width = next(iter(shapes.get("patch_embedding.bias", ())), 0)
            patch = math.prod(shapes.get("patch_embedding.weight", ()))
            channels = patch // (4 * width) if width else 0
            if (width, channels) == (1536, 16):
                return "Wan 2.1 T2V-1.3B"
            blocks = num_blocks(shapes, naming, family)
            return (
                f"a Wan transformer with {blocks} blocks of width {width} and {channels} input"
                " channels (a derivative, such as control or inpainting)"
            )
        case "umt5":
            names = ("token_embedding.weight", "token_embd.weight", UMT5_SHARED_NAME)
            table = next((shapes[name] for name in names if name in shapes), ())
            return f"a text encoder with a table of {list(table)}, not UMT5-XXL"
        case _:
            begins = ("decoder.conv1.weight", "decoder.conv_in.weight")
            first = next((shapes[name] for name in begins if name in shapes), ())
            return f"a VAE whose decoder begins with {list(first)}, not Wan's 2.1 or 2.2"


def _refused(path: Path, what: str) -> WeightsMismatch:
    names = ", ".join(spec.name for spec in MODELS if spec.name != "demo")
    return WeightsMismatch(f"{path} is {what}, which wanfit does not run", hint=f"It runs {names}")


def _unknown(container: Container, group: Group, *, alone: bool) -> WeightsMismatch | WeightsBroken:
    """The error for names that tell of no network of ours."""
    path, names = container.path, list(group.weights)
    lost = _lost_shard(path)
    if lost:
        return lost
    listed = ", ".join(names[:3]) or "no tensors"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    if not alone:
        return WeightsBroken(f"{path} holds {listed}{more}, which no network of ours has")
    return WeightsMismatch(f"{path} is not of Wan 2.2: it holds {listed}{more}")


def _lost_shard(path: Path) -> WeightsBroken | None:
    """The error for one of several shards, which its name tells, read alone."""
    shard = _SHARD.search(path.name)
    if shard is None or int(shard[2]) == 1:
        return None
    return WeightsBroken(
        f"{path} is one of {int(shard[2])} shards, and no index lists it",
        hint="Download the rest of them, and their .index.json",
    )
