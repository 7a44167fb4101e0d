"""What a clip leaves behind in RAM: anonymous memory per call of each of its parts, repeated.

    python -m benchmarks.growth [--calls 20] [--stores DIR]

Written to find 3 MB per clip that a process on an H100 keeps (benchmarks/RESULTS.md, 2026-11-25);
on the CPU nothing grows. The first calls of each part are left out: they load libraries. On a
machine without a GPU, parts that need one are left out.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.children import PROMPT
from benchmarks.clips import memory
from benchmarks.figures import Figure, say
from benchmarks.stores import Stores
from wanfit.engine.device import empty_cache, torch_device
from wanfit.engine.pipeline import VAE_DTYPE
from wanfit.engine.weights.depot import Depot
from wanfit.engine.weights.open import open_model
from wanfit.engine.weights.units import loaded_vae, streamed_network
from wanfit.plan.machine import read_machine
from wanfit.plan.plan import Ring
from wanfit.service import generate
from wanfit.specs import T2V_A14B

WARM_CALLS = 3
TENSOR_BYTES, REGISTERED_BYTES = 1 << 30, 4 << 30
SIZE, FRAMES = (320, 192), 5


def parts(
    store: Path, device: torch.device, scratch: Path
) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of each part, the smallest first."""
    files = open_model(store, T2V_A14B)

    def tensor() -> None:
        torch.empty(TENSOR_BYTES, dtype=torch.uint8, device=device)
        empty_cache(device)

    def networks() -> None:
        depot = Depot(device)
        for name in ("umt5", "high_noise", "low_noise"):
            streamed_network(files, name, "fp8", depot)
        depot.release()

    def registered() -> None:
        depot = Depot(device)
        file = files.entries("high_noise")["patch_embed.weight"].file
        depot.register(file, 0, min(REGISTERED_BYTES, file.stat().st_size))
        depot.release()

    def ring() -> None:
        depot = Depot(device)
        depot.ring(Ring(8, 16 << 20, 4, direct=False))
        depot.release()

    def vae() -> None:
        depot = Depot(device)
        network = loaded_vae(files, depot, VAE_DTYPE)
        latents = torch.zeros(1, T2V_A14B.vae.latent_channels, 2, 24, 40, device=device)
        with torch.inference_mode():
            for frames in network.decode(latents):
                frames.cpu()
        depot.release()
        empty_cache(device)

    def clip() -> None:
        generate(
            PROMPT, model=T2V_A14B.name, weights=store, precision="fp8", num_frames=FRAMES,
            width=SIZE[0], height=SIZE[1], num_inference_steps=2, seed=1, vram="6GB", ram="8GB",
            output=scratch / "clip.npy",
        )  # fmt: skip

    yield "read_machine", lambda: read_machine(weights=store)
    yield "tokenizer", files.tokenizer
    yield "networks", networks
    if device.type == "cuda":
        yield "tensor and empty_cache", tensor
        yield "stream and event", lambda: torch.cuda.Stream(device).record_event().synchronize()
        yield "register and release", registered
        yield "ring", ring
        yield "vae", vae
        yield "clip", clip


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--stores", type=Path, default=Path("/tmp/wanfit-stores"))
    options = parser.parse_args()
    device = torch_device("cuda" if torch.cuda.is_available() else "cpu")
    store = Stores(options.stores).get(T2V_A14B, "fp8", "hollow")
    with tempfile.TemporaryDirectory() as scratch:
        for name, call in parts(store, device, Path(scratch)):
            for _ in range(WARM_CALLS):
                call()
            before = _settled()
            for _ in range(options.calls):
                call()
            after = _settled()
            each = (after - before) / options.calls / 1e6
            say(Figure("growth", f"{name}, anonymous memory per call", each, "MB"))


def _settled() -> int:
    gc.collect()
    empty_cache(torch.device("cpu"))
    return memory()["RssAnon"]


if __name__ == "__main__":
    main()
