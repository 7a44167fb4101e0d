"""Trains the four experts of `demo-t2v` and `demo-i2v`, from one dense network.

    python -m training.train_experts --run RUN --keep KEEP --minutes 7 [--stages dense=9 t2v-high=1]

One network with I2V's 36 input channels goes through all stages, so one compiled step serves all:
`dense` learns all noise levels, from text and for a part of the clips from an image; then each
expert goes on from it on its own side of the boundary, T2V's without images, I2V's with one always.
Without an image the 20 extra channels are zero, and what their weights are makes no difference:
T2V's experts are written without them. The text encoder is the demo's and stays as it is.

Reads RUN/vae (waits for it, if another process is training it) and what KEEP has of the stages;
writes KEEP/STAGE.safetensors, averaged weights in bf16, about every minute and after each stage.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training import checkpoint, command
from training.evaluate import FROM_IMAGE, FROM_TEXT, Networks, evaluate
from training.noise import noise_of
from training.pool import Pool, View
from training.train_dit import TINY_VIEWS, Lesson, Timing, Trainer, train
from training.train_vae import lay_out
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.engine.weights.open import open_model
from wanfit.engine.weights.package import DEMO_DIRECTORY
from wanfit.specs import DEMO, DEMO_I2V, DEMO_T2V, Expert, ModelSpec

VIEWS = (  # about 40,000 tokens a batch; a clip of 17 frames of 128x128 has 320
    View(17, 128, 128, 6_144, 128, 0.76),
    View(17, 96, 160, 1_024, 160, 0.07),
    View(17, 160, 96, 1_024, 160, 0.07),
    View(33, 128, 128, 512, 64, 0.04),
    View(9, 128, 128, 512, 192, 0.03),
    View(5, 128, 128, 512, 256, 0.03),
)
DENSE_IMAGES = 0.35  # share of clips that come with their first frame
EXPERT_LR = 6e-4
EXPERT_WARMUP_STEPS = 50
FRESH_EVERY = 24
INPUT_WEIGHT = "patch_embed.weight"  # the only one whose shape differs from T2V to I2V


@dataclass(frozen=True, slots=True)
class Stage:
    """One of the networks, what it is a part of, and what it starts from."""

    name: str
    spec: ModelSpec
    expert: Expert | None  # None: all noise levels
    image_share: float
    parent: str | None

    @property
    def lesson(self) -> Lesson:
        noise = noise_of(self.spec, self.expert)
        if self.expert is None:
            return Lesson(noise, self.image_share, fresh_every=FRESH_EVERY)
        return Lesson(
            noise, self.image_share, EXPERT_LR, EXPERT_WARMUP_STEPS, fresh_every=FRESH_EVERY
        )


STAGES = (
    Stage("dense", DEMO_I2V, None, DENSE_IMAGES, None),
    Stage("t2v-high", DEMO_T2V, "high_noise", 0.0, "dense"),
    Stage("t2v-low", DEMO_T2V, "low_noise", 0.0, "dense"),
    Stage("i2v-high", DEMO_I2V, "high_noise", 1.0, "dense"),
    Stage("i2v-low", DEMO_I2V, "low_noise", 1.0, "dense"),
)
DEFAULT_STAGES = "dense=9 t2v-high=1 t2v-low=1 i2v-high=1 i2v-low=1"


def with_channels(weights: Mapping[str, Tensor], channels: int) -> dict[str, Tensor]:
    """The same network for so many input channels: the last ones left out, or zeros added.

    Both compute the same as long as those channels are zero.
    """
    weight = weights[INPUT_WEIGHT]
    fitted = weight.new_zeros(weight.shape[0], channels, *weight.shape[2:])
    kept = min(channels, weight.shape[1])
    fitted[:, :kept] = weight[:, :kept]
    return {**weights, INPUT_WEIGHT: fitted}


def main() -> None:
    args = parse_arguments()
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    views = VIEWS if on_gpu else TINY_VIEWS
    umt5 = open_model(DEMO_DIRECTORY, DEMO).load_umt5(device, torch.float32)
    trainer = Trainer(DEMO_I2V, device, views, compiled=on_gpu and not args.eager, text=umt5)
    for view in views:
        trainer.capture(view)
        print(f"{view} ready after {time.perf_counter() - began:.0f} s", flush=True)
    fresh = {name: p.detach().clone() for name, p in trainer.dit.named_parameters()}

    while not checkpoint.exists(args.run, "vae"):
        if args.until is not None and time.time() > args.until:
            raise SystemExit("no autoencoder came in time")
        time.sleep(0.1)
    vae = lay_out(Vae(DEMO_I2V.vae).to(device).requires_grad_(False))
    vae.load_state_dict(checkpoint.load(args.run, "vae", device)[0])
    # Other clips than in the sittings before.
    done_s = sum(trained_s(args.keep, stage.name) for stage in STAGES)
    generator = torch.Generator(device).manual_seed(args.seed + 1 + int(done_s))
    pools = {view: Pool(DEMO_I2V, view, vae, generator) for view in views}
    print(f"pools ready after {time.perf_counter() - began:.0f} s", flush=True)

    sitting_s = command.sitting_s(args) - args.evaluate_s
    whole = sum(args.stages.values())
    for stage in STAGES:
        seconds = sitting_s * args.stages.get(stage.name, 0.0) / whole
        if seconds > 1:  # else its file stays as it is
            run_stage(trainer, pools, stage, seconds, fresh, args)
    if args.evaluate:
        report(args, umt5, vae)


def parse_arguments() -> argparse.Namespace:
    options = command.parser(__doc__)
    command.add_sittings(options)
    options.add_argument("--keep", type=Path, required=True, help="directory of the stages' files")
    options.add_argument(
        "--stages",
        nargs="+",
        default=DEFAULT_STAGES.split(),
        metavar="NAME=SHARE",
        help=f"which networks, and their shares of the time; default: {DEFAULT_STAGES}",
    )
    options.add_argument("--evaluate", type=int, default=48, help="clips per line at the end")
    options.add_argument("--evaluate-s", type=float, default=0.0, help="of the time, kept for that")
    args = options.parse_args()
    shares = dict(part.split("=") for part in args.stages)
    known = {stage.name for stage in STAGES}
    if not shares.keys() <= known:
        options.error(f"--stages knows {', '.join(sorted(known))}")
    args.stages = {name: float(share) for name, share in shares.items()}
    return args


def run_stage(
    trainer: Trainer,
    pools: Mapping[View, Pool],
    stage: Stage,
    seconds: float,
    fresh: Mapping[str, Tensor],
    args: argparse.Namespace,
) -> None:
    """Trains one network from its own file, else its parent's, else from nothing, and keeps it."""
    names = [name for name in (stage.name, stage.parent) if name]
    found = next((name for name in names if checkpoint.exists(args.keep, name)), None)
    done_s, weights = trained_s(args.keep, stage.name), dict(fresh)
    if found is not None:
        weights, _ = checkpoint.load(args.keep, found, trainer.device)
    origin = f"from {found or 'nothing'}, {done_s:.0f} s done"
    print(f"{stage.name}: {seconds:.0f} s, {origin}", flush=True)
    trainer.begin_with(with_channels(weights, DEMO_I2V.dit.in_channels))

    def keep(elapsed_s: float) -> None:
        note = {"steps": int(trainer.optimizer.steps), "trained_s": done_s + elapsed_s}
        averaged = with_channels(trainer.averaged("dit"), stage.spec.dit.in_channels)
        checkpoint.save_bf16(args.keep, averaged, prefix=stage.name, note=note)

    # A sitting that goes on begins at its own rate again: `--of-minutes` cannot span stages.
    taught_s = train(trainer, pools, stage.lesson, args.seed, Timing(seconds, 0.0, seconds), keep)
    keep(taught_s)
    print(f"{stage.name}: kept after {int(trainer.optimizer.steps)} steps", flush=True)


def trained_s(directory: Path, name: str) -> float:
    """Seconds that a kept network was trained itself; 0 where there is none."""
    if not checkpoint.exists(directory, name):
        return 0.0
    note = checkpoint.load(directory, name, torch.device("cpu"))[1]
    assert isinstance(note, dict)
    return float(note["trained_s"])


def report(args: argparse.Namespace, umt5: Umt5, vae: Vae) -> None:
    """Lines about what each model shows, as far as its networks are there and time is left."""
    device = torch.device(args.device)
    for spec, trials in ((DEMO_T2V, FROM_TEXT), (DEMO_I2V, FROM_IMAGE)):
        dits: dict[Expert, Dit] = {}
        for stage in STAGES:
            if stage.spec == spec and stage.expert and checkpoint.exists(args.keep, stage.name):
                dits[stage.expert] = load_dit(args.keep, stage.name, spec, device)
        if not dits and checkpoint.exists(args.keep, "dense"):
            dense = load_dit(args.keep, "dense", spec, device)
            dits = {"high_noise": dense, "low_noise": dense}
        if len(dits) < 2:
            continue
        for trial in trials:
            if args.until is not None and time.time() > args.until:
                return
            line = evaluate(Networks(spec, dits, umt5, vae), trial, args.evaluate)
            print(f"{spec.name}, {line}", flush=True)


def load_dit(directory: Path, name: str, spec: ModelSpec, device: torch.device) -> Dit:
    """A kept network, with the input channels of `spec`."""
    weights, _ = checkpoint.load(directory, name, device)
    dit = Dit(spec.dit).to(device).requires_grad_(False)
    dit.load_state_dict(with_channels(weights, spec.dit.in_channels))
    return dit


if __name__ == "__main__":
    main()
