"""What kind of network the tensors of a file make up, told by a few of their names.

First a prefix that all names share is taken off; one file may also hold several networks, each
under a prefix of its own. Then a handful of telling names gives the family and the naming, or
another model that has more than ours, which is refused by its name. Shapes are for `weights.parts`.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from wanfit.engine.weights.headers import TensorEntry
from wanfit.engine.weights.keys import UMT5_SHARED_NAME, UMT5_TIED_NAME, Naming
from wanfit.engine.weights.lora_keys import split_key
from wanfit.specs import Expert

Family = Literal["dit", "umt5", "vae", "lora"]

# Where ComfyUI's "Save Checkpoint" puts the networks of one file (comfy/sd.py, save_checkpoint).
BUNDLE_PREFIXES = ("model.diffusion_model.", "vae.", "text_encoders.umt5xxl.transformer.")
# What programs put before every name. ComfyUI's state dicts, diffusion-pipe, Kijai's VAEs.
PREFIXES = (*BUNDLE_PREFIXES, "diffusion_model.", "model.", "net.")
# Beside them there, and no weight of ours: a scale that ComfyUI gives every text encoder.
_BUNDLE_UNUSED = ("text_encoders.umt5xxl.logit_scale",)
SPIECE = "spiece_model"  # ComfyUI: the vocabulary in the text encoder's file, as bytes


class Telling(NamedTuple):
    """A file with one of `names` is of this family, with this naming."""

    family: Family
    naming: Naming
    names: tuple[str, ...]


TELLING: tuple[Telling, ...] = (
    Telling(
        "dit",
        "official",
        ("head.modulation", "blocks.0.self_attn.norm_q.weight", "text_embedding.2.weight"),
    ),
    Telling(
        "dit",
        "diffusers",
        ("condition_embedder.time_proj.weight", "condition_embedder.text_embedder.linear_1.weight"),
    ),
    Telling(
        "umt5", "official", ("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight")
    ),
    Telling("umt5", "gguf", ("token_embd.weight", "enc.blk.0.attn_rel_b.weight")),
    Telling(
        "umt5",
        "diffusers",
        (UMT5_SHARED_NAME, UMT5_TIED_NAME, "encoder.block.0.layer.0.SelfAttention.q.weight"),
    ),
    Telling(
        "vae",
        "official",
        ("decoder.middle.0.residual.0.gamma", "encoder.middle.0.residual.0.gamma"),
    ),
    Telling(
        "vae",
        "diffusers",
        ("decoder.mid_block.resnets.0.norm1.gamma", "encoder.mid_block.resnets.0.norm1.gamma"),
    ),
)

# Begins of names that only other models of the family have, the most special first.
# ComfyUI, comfy/model_detection.py; diffusers, single_file_utils.py.
OTHER_MODELS: tuple[tuple[str, str], ...] = (
    ("vace_", "VACE"),
    ("motion_encoder.", "Wan 2.2 Animate"),
    ("pose_patch_embedding.", "Wan 2.2 Animate"),
    ("face_adapter.", "Wan 2.2 Animate"),
    ("casual_audio_encoder.", "Wan 2.2 S2V"),
    ("audio_injector.", "Wan 2.2 S2V"),
    ("audio_proj.", "HuMo"),
    ("control_adapter.", "Fun Camera, with camera control"),
    ("ref_conv.", "Fun Control, with a reference image"),
    ("img_emb.emb_pos", "Wan 2.1 FLF2V"),
    ("img_emb.", "Wan 2.1 I2V"),
    ("blocks.0.cross_attn.k_img.", "Wan 2.1 I2V"),
    ("condition_embedder.image_embedder.pos_embed", "Wan 2.1 FLF2V"),
    ("condition_embedder.image_embedder.", "Wan 2.1 I2V"),
    ("blocks.0.attn2.add_k_proj.", "Wan 2.1 I2V"),
)


# "high" or "low" as a word, or before "noise": not in "slow", "workflow" or "lowvram".
_EXPERT_WORD = re.compile(r"(?<![a-z])(high|low)(?=[\W_\d]?noise|[^a-z]|$)")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def expert_word(path: Path) -> Expert | None:
    """Which expert the name of the file says, or else that of its folder; None: neither, or both.

    "wan2.2_t2v_high_noise_14B_fp16", "Wan2_2-I2V-A14B-LOW_fp8", "HighNoise/".
    """
    for name in (path.name, path.parent.name):
        words = set(_EXPERT_WORD.findall(_CAMEL.sub("_", name).lower()))
        if words:
            word = words.pop()
            return None if words else ("high_noise" if word == "high" else "low_noise")
    return None


@dataclass(frozen=True, slots=True)
class Group:
    """The weights of one network in a file, without the prefix that they share there."""

    prefix: str
    weights: Mapping[str, TensorEntry]


def groups_of(weights: Mapping[str, TensorEntry]) -> list[Group]:
    """The networks of a file, whose tensors are as `container.weights_of` gives them.

    A name that belongs to no network of a file with several stays in a group of its own.
    """
    names = weights_below(weights, "")
    bundled = [p for p in BUNDLE_PREFIXES if any(name.startswith(p) for name in names)]
    if len(bundled) < 2:
        prefix = next((p for p in PREFIXES if names and all(n.startswith(p) for n in names)), "")
        return [Group(prefix, weights_below(names, prefix))]
    groups = [Group(prefix, weights_below(names, prefix)) for prefix in bundled]
    rest = [name for name in names if not name.startswith((*bundled, *_BUNDLE_UNUSED))]
    return [*groups, Group("", {name: names[name] for name in rest})] if rest else groups


def weights_below(weights: Mapping[str, TensorEntry], prefix: str) -> dict[str, TensorEntry]:
    """Those under a prefix, by the rest of their names; a vocabulary is no weight."""
    return {
        name[len(prefix) :]: entry
        for name, entry in weights.items()
        if name.startswith(prefix) and not _is_vocabulary(name)
    }


def vocabulary_entry(entries: Mapping[str, TensorEntry]) -> TensorEntry | None:
    """The sentencepiece model in a file: U8 [bytes]."""
    return next((entry for name, entry in entries.items() if _is_vocabulary(name)), None)


def family_of(names: Collection[str]) -> tuple[Family, Naming] | None:
    """(family, naming) of a group's names; None when they are none of ours.

    Adapters come first: some carry a patch embedding or a head.
    """
    if is_lora(names):
        return "lora", "official"
    for telling in TELLING:
        if any(name in names for name in telling.names):
            return telling.family, telling.naming
    return None


def is_lora(names: Iterable[str]) -> bool:
    """Whether a name is one of an adapter: `weights.lora_keys` has their endings."""
    keys = (split_key(name) for name in names)
    return any(key is not None and key.kind != "alpha" for key in keys)


def other_model(names: Iterable[str]) -> str | None:
    """The model that has such a name and is not one of ours."""
    found = [i for name in names for i, (begin, _) in enumerate(OTHER_MODELS) if begin in name[:60]]
    return OTHER_MODELS[min(found)][1] if found else None


def num_blocks(names: Iterable[str], naming: Naming, family: Family) -> int:
    """How many blocks there are, by the numbers in the names."""
    begin = {"diffusers": "encoder.block.", "gguf": "enc.blk."}.get(naming, "blocks.")
    if family == "dit":
        begin = "blocks."
    numbers = {name[len(begin) :].partition(".")[0] for name in names if name.startswith(begin)}
    return len(numbers)


def _is_vocabulary(name: str) -> bool:
    return name.rpartition(".")[2] == SPIECE
