"""The story of one clip: text -> image -> denoise -> decode, as a plan says.

A generator of events. Progress, cancellation, metering and writing belong to the caller: it may
stop asking at any event, and everything is let go. What a stage needs on the device is there for
that stage only; the transformers and the text encoder are streamed, the autoencoder is loaded.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from wanfit.engine.condition import Condition, check_channels, condition_on, prepare_image
from wanfit.engine.decode import decode, decode_steps
from wanfit.engine.denoise import TextPair, denoise, draw_noise, phases, route
from wanfit.engine.encode import encode_texts
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.dit_rows import RowKernels, Workspace
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.preview import Colours, fit_colours, read_colours
from wanfit.engine.tokenizer import TokenizedText
from wanfit.engine.weights.depot import Depot
from wanfit.engine.weights.files import ModelFiles
from wanfit.engine.weights.layout import PRECISION_DTYPES, TORCH_DTYPES
from wanfit.engine.weights.stream import Streamer, Visit
from wanfit.engine.weights.units import Unit, loaded_vae, streamed_network
from wanfit.events import Event, Notice, Stage, StageBegan, WeightsMoved
from wanfit.geometry import Geometry, geometry_of
from wanfit.plan.plan import Plan
from wanfit.request import ResolvedRequest
from wanfit.specs import TEXT_TOKENS, Expert

# official: vae2_1.py and vae2_2.py run in fp32 beside a bf16 transformer; bf16 costs visible detail
VAE_DTYPE = torch.float32
# Ours: modulations and norms, which stay fp32 beside bf16, are a thousandth of the bytes.
CONVERTED_SHARE = 0.01


# Around a generator torch turns the mode on while it runs and off at every yield, so the caller
# is never in it.
@torch.inference_mode()
def generate_frames(
    plan: Plan,
    files: ModelFiles,
    image: Image.Image | None,
    depot: Depot,
    kernels: RowKernels | None = None,
    *,
    previews: bool = False,
) -> Generator[Event, None, None]:
    """Yields the events of one clip, its frames among them (see `wanfit.events`).

    `image` goes with the plan's request: `resolve` checked that the model takes or needs one. The
    depot's device is where all is computed. kernels: the transformer's row functions, compiled;
    None: as they are. previews: whether a Preview of every step is wanted. Raises WeightsError for
    files that break.
    """
    request = plan.request
    check_channels(request.spec)
    geometry = geometry_of(request.spec, request.width, request.height, request.num_frames)

    yield StageBegan("text", steps=None)
    texts = _tokenize(request, files)
    yield from _notices(texts)
    text = yield from _encode(texts, plan, files, depot)
    _return_memory(depot.device)

    condition = Condition()
    if image is not None:
        yield StageBegan("image", steps=None)
        condition = _condition(image, plan, geometry, files, depot)
        _return_memory(depot.device)

    yield StageBegan("denoise", steps=request.num_inference_steps)
    colours = _colours(files, depot) if previews else None
    latents = yield from _denoise(plan, geometry, text, condition, files, depot, kernels, colours)
    _return_memory(depot.device)

    tile_px = plan.cuts.vae_tile_px
    yield StageBegan("decode", steps=decode_steps(request.spec.vae, latents.shape, tile_px))
    yield from decode(loaded_vae(files, depot, VAE_DTYPE), latents, tile_px)
    _return_memory(depot.device)


def _tokenize(request: ResolvedRequest, files: ModelFiles) -> tuple[TokenizedText, ...]:
    """The prompt, and the negative prompt where it has a use."""
    tokenizer = files.tokenizer()
    guided = any(phase.passes > 1 for phase in phases(request))
    prompts = (request.prompt, request.negative_prompt) if guided else (request.prompt,)
    return tuple(tokenizer.encode(prompt) for prompt in prompts)


def _notices(texts: Sequence[TokenizedText]) -> Iterator[Notice]:
    words = tuple(dict.fromkeys(word for text in texts for word in text.unknown_words))
    if words:
        yield Notice(f"The model does not know: {', '.join(words)}")
    dropped = max(text.num_dropped for text in texts)
    if dropped:
        yield Notice(f"The model reads {TEXT_TOKENS} tokens; the last {dropped} are left out")


def _encode(
    texts: Sequence[TokenizedText], plan: Plan, files: ModelFiles, depot: Depot
) -> Generator[Event, None, TextPair]:
    umt5, units = streamed_network(files, "umt5", plan.precision, depot)
    assert isinstance(umt5, Umt5)
    way: list[Visit] = [("umt5", unit.name) for unit in units]
    with Streamer(depot, units, way, plan.text, plan.ring) as streamer:
        umt5.present = streamer.present
        cond, *uncond = encode_texts(umt5, texts, depot.device)
        yield _moved("text", 1, streamer, depot)
    return TextPair(cond, uncond[0] if uncond else None)


def _condition(
    image: Image.Image,
    plan: Plan,
    geometry: Geometry,
    files: ModelFiles,
    depot: Depot,
) -> Condition:
    request = plan.request
    pixels = prepare_image(image, request.spec.task, request.width, request.height)
    vae = loaded_vae(files, depot, VAE_DTYPE)
    return condition_on(pixels, request.spec.task, geometry, vae, plan.cuts.vae_tile_px)


def _colours(files: ModelFiles, depot: Depot) -> Colours:
    """How this autoencoder's latents look. Where no file says it, it is fitted, once per process.

    The pictures of the fit are small: less is held than when the clip is decoded.
    """
    file = next(iter(files.entries("vae").values())).file
    if file not in depot.colours:
        colours = read_colours(file.parent, depot.device)
        depot.colours[file] = colours or fit_colours(loaded_vae(files, depot, VAE_DTYPE))
        _return_memory(depot.device)
    return depot.colours[file]


def _denoise(
    plan: Plan,
    geometry: Geometry,
    text: TextPair,
    condition: Condition,
    files: ModelFiles,
    depot: Depot,
    kernels: RowKernels | None,
    colours: Colours | None,
) -> Generator[Event, None, Tensor]:
    request = plan.request
    dits: dict[Expert, Dit] = {}
    units: list[Unit] = []
    for phase in phases(request):
        dit, its_units = streamed_network(files, phase.expert, plan.precision, depot)
        assert isinstance(dit, Dit)
        dits[phase.expert] = dit
        units += its_units
    work = Workspace(
        request.spec.dit,
        geometry.num_tokens,
        dtype=TORCH_DTYPES[PRECISION_DTYPES[plan.precision]],
        device=depot.device,
        rows=plan.cuts.rows,
        heads=plan.cuts.heads,
        kernels=kernels,
    )
    yield from _conversions(units, plan)
    noise = draw_noise(geometry, request.seed).to(depot.device)
    with Streamer(depot, units, route(request), plan.denoise, plan.ring) as streamer:
        for dit in dits.values():
            dit.present = streamer.present
        latents = yield from denoise(request, noise, text, condition, dits, work, colours)
        forwards = sum(len(phase.timesteps) * phase.passes for phase in phases(request))
        yield _moved("denoise", forwards, streamer, depot)
    return latents


def _conversions(units: Sequence[Unit], plan: Plan) -> Iterator[Notice]:
    """Says so when streamed weights are converted on the way, at every forward again."""
    streamed = [
        piece
        for unit in units
        if unit.name.startswith("blocks.")  # the embedders come once
        and plan.denoise.placements[unit.network].of(unit.name) != "resident"
        for piece in unit.pieces
    ]
    converted = [piece for piece in streamed if not piece.is_raw]
    num_bytes = sum(piece.num_bytes for piece in converted)
    if num_bytes > CONVERTED_SHARE * sum(piece.num_bytes for piece in streamed):
        kinds = ", ".join(sorted({f"{piece.file_dtype} to {piece.dtype}" for piece in converted}))
        yield Notice(
            f"{num_bytes / 1e9:.1f} GB of weights are converted ({kinds}) each time they are used;"
            " wanfit convert does it once"
        )


def _moved(stage: Stage, forwards: int, streamer: Streamer, depot: Depot) -> WeightsMoved:
    use = streamer.use()
    return WeightsMoved(
        stage=stage,
        forwards=forwards,
        waited_s=use.waited_s,
        streamed_bytes=use.streamed_bytes,
        resident_bytes=use.resident_bytes,
        registered_bytes=depot.registered_bytes,
        first_ready_s=use.first_ready_s,
    )


def _return_memory(device: torch.device) -> None:
    """Gives a stage's memory back to the device: torch would keep it for itself."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
