"""How LoRA files name what they change, as tables that a person can read.

A key is a prefix, the name of a module, and the kind of tensor, as in
"diffusion_model." + "blocks.0.self_attn.q" + ".lora_down.weight". Modules have the official names
or those of diffusers (`weights.keys`). kohya's and musubi-tuner's files write them with underscores
in place of dots; those are never taken apart, but compared with the names of a transformer's own
modules written the same way. Imports no torch.

Sources: ComfyUI's comfy/lora.py and comfy/weight_adapter/lora.py, LightX2V's
lightx2v/utils/lora_loader.py, diffusers' loaders/lora_conversion_utils.py, musubi-tuner's
networks/lora_wan.py, peft's utils/save_and_load.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Literal, NamedTuple

from wanfit.engine.weights.keys import DIT, their_name
from wanfit.specs import DitSpec

Kind = Literal["down", "up", "up_bias", "alpha", "diff", "diff_b", "diff_m"]
Naming = Literal["official", "diffusers"]
Stack = Literal["transformer", "transformer_2"]  # diffusers' names of the two experts
Leaf = Literal["weight", "bias", "modulation"]


class Key(NamedTuple):
    """A key of a LoRA file, taken apart."""

    module: str  # without the prefix; "" for what lies at the top, as diffusers' scale_shift_table
    kind: Kind
    stack: Stack | None  # which transformer, where the prefix says so
    underscored: bool  # whether `module` has underscores in place of dots
    raw_peft: bool  # saved by peft itself, whose scale is in another file


class Prefix(NamedTuple):
    text: str
    stack: Stack | None = None
    underscored: bool = False
    raw_peft: bool = False


# Ends of keys, the longest first where one ends in another. W is [out, in], of rank r.
ENDINGS: tuple[tuple[str, Kind], ...] = (
    (".lora_down.weight", "down"),  # A [r, in]
    (".lora_up.weight", "up"),  # B [out, r]
    (".lora_A.weight", "down"),
    (".lora_B.weight", "up"),
    (".lora_A.default.weight", "down"),  # peft's name of an adapter without a name
    (".lora_B.default.weight", "up"),
    (".lora_B.bias", "up_bias"),  # peft's lora_bias=True: [out], scaled as B is
    (".lora_B.default.bias", "up_bias"),
    (".lora.down.weight", "down"),
    (".lora.up.weight", "up"),
    (".lora_linear_layer.down.weight", "down"),
    (".lora_linear_layer.up.weight", "up"),
    (".lora_A", "down"),
    (".lora_B", "up"),
    (".alpha", "alpha"),  # one number: B A is multiplied by alpha / r
    (".diff", "diff"),  # added to the weight, of its shape
    (".diff_b", "diff_b"),  # added to the bias
    (".diff_m", "diff_m"),  # added to the modulation of a block or of the head
)

# The first that fits is taken off.
PREFIXES: tuple[Prefix, ...] = (
    Prefix("model.diffusion_model."),
    Prefix("diffusion_model."),  # ComfyUI, LightX2V, Kijai, diffusion-pipe
    Prefix("transformer_2.", stack="transformer_2"),  # diffusers: the low-noise expert
    Prefix("transformer.", stack="transformer"),
    Prefix("base_model.model.", raw_peft=True),
    Prefix("lora_unet_", underscored=True),  # kohya, musubi-tuner
    Prefix("lora_transformer_", underscored=True),
)

# Parts of keys that belong to other kinds of adapters, which are sums of another form.
OTHER_KINDS: tuple[tuple[str, str], ...] = (
    ("dora_scale", "DoRA"),
    ("lora_magnitude_vector", "DoRA"),
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("oft_", "OFT"),
    ("boft_", "BOFT"),
    (".a1.weight", "GLoRA"),
    ("lora_mid", "LoCon with a middle matrix"),
    ("w_norm", "LyCORIS of norms"),
    ("b_norm", "LyCORIS of norms"),
    ("set_weight", "replacement of weights"),
    ("reshape_weight", "change of shapes"),
)

# Modules of Wan 2.1's image-to-video transformer, which 2.2 does not have, in either naming.
WAN_21_IMAGE = (
    "k_img", "v_img", "img_emb", "add_k_proj", "add_v_proj", "norm_added_k", "image_embedder",
)  # fmt: skip
# Widths of transformers that are not ours: all have their heads 128 wide.
OTHER_WIDTHS: Mapping[int, str] = {1536: "Wan 2.1 T2V-1.3B"}


def split_key(key: str) -> Key | None:
    """A key taken apart; None when it is of no kind that is known here."""
    found = next(((ending, kind) for ending, kind in ENDINGS if key.endswith(ending)), None)
    if found is None:
        return None
    ending, kind = found
    module = key.removesuffix(ending)
    # A tensor right below the prefix leaves nothing of the module but the prefix without its dot.
    for prefix in PREFIXES:
        if module.startswith(prefix.text) or f"{module}." == prefix.text:
            module = module[len(prefix.text) :]
            return Key(module, kind, prefix.stack, prefix.underscored, prefix.raw_peft)
    return Key(module, kind, None, underscored=False, raw_peft=False)


def other_kind(key: str) -> str | None:
    """What adapters with such a key are called, if that is known."""
    return next((name for part, name in OTHER_KINDS if part in key), None)


@cache
def parameters_named(
    spec: DitSpec, naming: Naming, *, underscored: bool
) -> Mapping[tuple[str, Leaf], str]:
    """(module as a file has it, which of its parameters) -> our name, for a whole transformer.

    A modulation is also there as a module with a weight: ComfyUI reads "blocks.0.modulation.diff".
    """
    table: dict[tuple[str, Leaf], str] = {}
    for ours in dit_shapes(spec):
        theirs = their_name(ours, DIT, naming)
        module, _, last = theirs.rpartition(".")
        entries: list[tuple[str, Leaf]]
        match last:
            case "weight":
                entries = [(module, "weight")]
            case "bias":
                entries = [(module, "bias")]
            case _:
                entries = [(module, "modulation"), (theirs, "weight")]
        for written, leaf in entries:
            name = written.replace(".", "_") if underscored else written
            assert (name, leaf) not in table, f"{name} is two modules"
            table[name, leaf] = ours
    return table


@cache
def dit_shapes(spec: DitSpec) -> Mapping[str, tuple[int, ...]]:
    """Our parameter name -> shape, for one transformer: as `Dit` has them, and without torch."""
    width, ffn = spec.width, spec.ffn_width
    out_width = math.prod(spec.patch) * spec.out_channels
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.weight": (width, spec.in_channels, *spec.patch),
        "patch_embed.bias": (width,),
        "head.modulation": (1, 2, width),
    }
    linears = {
        "text_embed.up": (width, spec.text_width),
        "text_embed.down": (width, width),
        "time_embed.up": (width, spec.sinusoid_width),
        "time_embed.down": (width, width),
        "time_project": (6 * width, width),
        "head.linear": (out_width, width),
    }
    for i in range(spec.num_blocks):
        block = f"blocks.{i}"
        shapes[f"{block}.modulation"] = (1, 6, width)
        shapes |= dict.fromkeys(
            (f"{block}.cross_norm.weight", f"{block}.cross_norm.bias"), (width,)
        )
        for attention in ("self_attn", "cross_attn"):
            linears |= {f"{block}.{attention}.{name}": (width, width) for name in "qkvo"}
            for norm in ("norm_q", "norm_k"):
                shapes[f"{block}.{attention}.{norm}.weight"] = (width,)
        linears[f"{block}.ffn.up"] = (ffn, width)
        linears[f"{block}.ffn.down"] = (width, ffn)
    for module, shape in linears.items():
        shapes[f"{module}.weight"], shapes[f"{module}.bias"] = shape, shape[:1]
    return shapes
