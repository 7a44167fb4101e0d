"""diffusers' transformer at true size with its own offloading, beside ours.

Two of its ways are run: model offload (the whole transformer comes to the GPU, and goes back when
another component is due), and group offload by block with streams.

Its parameters are the tensors of our store, in place in the mapped files, so that nothing has to be
drawn or copied. For group offload the mapping is registered with CUDA first, and diffusers takes
the memory for pinned: its own set-up copies every tensor into pinned memory (38 s for one A14B
expert on an H100, shared/probes), which is left out here. So its set-up is flattered, and its
forward is its own. What moves back to the host is dropped where diffusers drops it.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from benchmarks.figures import GIB, Figure, note, say
from wanfit.engine.weights import configs
from wanfit.engine.weights.depot import Depot
from wanfit.engine.weights.files import tensor_at
from wanfit.engine.weights.keys import DIT, to_diffusers
from wanfit.engine.weights.open import open_model
from wanfit.geometry import geometry_of
from wanfit.specs import TEXT_TOKENS, ModelSpec

EXPERT: Literal["high_noise"] = "high_noise"
TIMESTEP = 700.0


@dataclass(frozen=True, slots=True)
class PeerCase:
    """One size of a model."""

    name: str  # as the case of benchmarks.fit_forward that it is compared with
    width: int
    height: int
    num_frames: int
    timed: int = 2


PEERS = (PeerCase("A14B 480p81", 832, 480, 81), PeerCase("A14B 720p81", 1280, 720, 81, timed=1))


def run_peers(
    spec: ModelSpec, store: Path, cases: tuple[PeerCase, ...], *, vram_bytes: int
) -> None:
    """Model offload, then group offload, each at every size, within `vram_bytes`."""
    device = torch.device("cuda", torch.cuda.current_device())
    depot = Depot(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(vram_bytes / total, device)
    try:
        model = _transformer(spec, store, depot)
        _model_offload(model, spec, cases, device)
        del model
        _clean()
        file = open_model(store, spec).entries(EXPERT)["patch_embed.weight"].file
        began_s = time.perf_counter()
        registered = depot.register(file, 0, file.stat().st_size)
        note("peers", registered=registered, register_s=time.perf_counter() - began_s)
        model = _transformer(spec, store, depot)
        _group_offload(model, spec, cases, device)
        del model
        _clean()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        depot.release()


def _transformer(spec: ModelSpec, store: Path, depot: Depot) -> Any:
    """WanTransformer3DModel whose parameters lie in the mapped file."""
    transformer_class: Any = importlib.import_module("diffusers").WanTransformer3DModel
    with torch.device("meta"):
        model = transformer_class.from_config(configs.dit_config(spec.dit))
    entries = open_model(store, spec).entries(EXPERT)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    state = {}
    for name, entry in entries.items():
        theirs = to_diffusers(name, DIT)
        state[theirs] = tensor_at(depot.file(entry.file).bytes, entry).view(shapes[theirs])
    model.load_state_dict(state, assign=True)
    _materialise_rope(model, spec)
    return model.requires_grad_(False).eval()


def _materialise_rope(model: Any, spec: ModelSpec) -> None:
    """The rotary table is no parameter: it is computed when its module is made."""
    made = type(model.rope)(spec.dit.head_dim, spec.dit.patch, model.config.rope_max_seq_len)
    model.rope = made


def _model_offload(
    model: Any, spec: ModelSpec, cases: tuple[PeerCase, ...], device: torch.device
) -> None:
    """What `enable_model_cpu_offload` does to a transformer: to the GPU, forwards, and back."""
    began_s = time.perf_counter()
    try:
        model.to(device)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError as error:
        say(Figure("peers", "model offload, to the GPU", None, "s", detail={"error": str(error)}))
        return
    say(Figure("peers", "model offload, to the GPU", time.perf_counter() - began_s, "s"))
    for case in cases:
        _time_forwards(model, spec, case, "model offload", device)
    began_s = time.perf_counter()
    model.to("cpu")
    torch.cuda.synchronize()
    say(Figure("peers", "model offload, back to the host", time.perf_counter() - began_s, "s"))


def _group_offload(
    model: Any, spec: ModelSpec, cases: tuple[PeerCase, ...], device: torch.device
) -> None:
    apply_group_offloading: Any = importlib.import_module("diffusers.hooks").apply_group_offloading
    began_s = time.perf_counter()
    apply_group_offloading(
        model, onload_device=device, offload_device=torch.device("cpu"),
        offload_type="block_level", num_blocks_per_group=1, use_stream=True, record_stream=True,
    )  # fmt: skip
    say(Figure("peers", "group offload, set-up", time.perf_counter() - began_s, "s"))
    for case in cases:
        _time_forwards(model, spec, case, "group offload with streams", device)


def _time_forwards(
    model: Any, spec: ModelSpec, case: PeerCase, way: str, device: torch.device
) -> None:
    """The median of some forwards after one that is left out; group offload learns its order."""
    geometry = geometry_of(spec, case.width, case.height, case.num_frames)
    arguments = {
        "hidden_states": torch.randn(
            1, spec.dit.in_channels, *geometry.latent_shape[1:], device=device, dtype=torch.bfloat16
        ),
        "timestep": torch.full((1,), TIMESTEP, device=device),
        "encoder_hidden_states": torch.randn(
            1, TEXT_TOKENS, spec.dit.text_width, device=device, dtype=torch.bfloat16
        ),
        "return_dict": False,
    }
    what = f"{case.name}, diffusers {way}"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.inference_mode():
            times = _timed(lambda: model(**arguments), 1 + case.timed)[1:]
    except torch.OutOfMemoryError as error:
        say(Figure("peers", f"{what}: forward", None, "ms", detail={"error": str(error)}))
        return
    reserved = torch.cuda.max_memory_reserved(device) / GIB
    say(Figure("peers", f"{what}: forward", median(times), "ms", detail={"forward_ms": times}))
    say(Figure("peers", f"{what}: reserved", reserved, "GiB"))


def _timed(run: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each run, by the GPU's clock."""
    times = []
    for _ in range(count):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
    return times


def _clean() -> None:
    gc.collect()
    with suppress(RuntimeError):
        torch.cuda.synchronize()
    torch.cuda.empty_cache()
