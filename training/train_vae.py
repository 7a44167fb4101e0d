"""Trains a demo's autoencoder on whole clips and on crops around the objects.

    python -m training.train_vae --run RUN --minutes 9 [--model demo-t2v] [--seed 0]

Writes RUN/vae-*.safetensors (the averaged weights, ready for `train_dit` and `export`) and
RUN/state-*.safetensors, from which the same command goes on where it stopped. While the compiler
works, for minutes, an eager process may train and hand its state over (`run_two_experts`). With
--decoder-only the encoder stays, and so do all latents: a transformer trained on them still fits.
What was learned from the first attempts: causal convolutions need no chunk loop in training, so a
clip goes through in one pass; small crops show more edges per second than whole clips; both
together are best.

Dims: B clips, C channels, F frames, T latent frames, H W pixels.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from training import checkpoint, command, shapes
from training.optim import Average, Optimizer, captured, learning_rate
from wanfit.engine.models.vae import Vae
from wanfit.geometry import geometry_of
from wanfit.specs import DEMO, DEMO_T2V, ModelSpec

PEAK_LR = 2e-3
LATENT_NOISE = 0.1  # added to the latents: what the decoder must stand from the transformer
LATENT_DECAY = 1e-3  # keeps the latents near that noise's scale
AVERAGE_DECAY = 0.998
WARMUP_STEPS = 50


@dataclass(frozen=True, slots=True)
class View:
    """One kind of training batch."""

    batch: int
    frames: int
    side_px: int
    share: float  # of the steps


VIEWS = {  # without folded pixels a clip has four times the voxels at the widest stage
    DEMO: (View(160, 9, 64, 0.7), View(24, 17, 128, 0.3)),
    DEMO_T2V: (View(80, 9, 64, 0.7), View(12, 17, 128, 0.3)),
}
TINY_VIEWS = (View(2, 5, 64, 1.0),)
TRAINED = ("encoder", "to_moments", "from_latents", "decoder")
TRAINED_ALONE = ("decoder",)  # with --decoder-only
KEEP_EVERY_S = 90.0
READY = "vae-compiled"  # in RUN while a process that has compiled waits to take over


class Trainer:
    """The network, its running average, and one captured CUDA graph for each view."""

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        views: tuple[View, ...],
        compiled: bool,
        parts: tuple[str, ...] = TRAINED,
    ) -> None:
        self.spec, self.device = spec, device
        self.vae = Vae(spec.vae).to(device)
        initialise(self.vae)
        for name, p in self.vae.named_parameters():
            p.requires_grad_(name.startswith(parts))
        trained = [(n, p) for n, p in self.vae.named_parameters() if p.requires_grad]
        self.optimizer = Optimizer([(trained, 1.0)])
        self.average = Average(self.vae.named_parameters(), AVERAGE_DECAY)
        self.lr = torch.zeros((), device=device)
        self.forward = torch.compile(self.losses, dynamic=False) if compiled else self.losses
        self.views = views
        self.inputs: dict[View, tuple[Tensor, Tensor]] = {}
        self.outputs: dict[View, Tensor] = {}
        self.graphs: dict[View, torch.cuda.CUDAGraph] = {}
        self.drawing = torch.cuda.Stream() if device.type == "cuda" else None

    def losses(self, frames: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The training loss and the mean squared error, of frames [B, 3, F, H, W]."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            mean = self.vae.mean(frames, None, first=True)
            out = self.vae.pixels(mean + LATENT_NOISE * noise, None, first=True)
        out, mean = out.float(), mean.float()
        squared = F.mse_loss(out, frames)
        loss = F.l1_loss(out, frames) + squared + LATENT_DECAY * mean.square().mean()
        return loss, squared

    def update(self, frames: Tensor, noise: Tensor) -> Tensor:
        """One step; returns the mean squared error."""
        self.optimizer.zero_grad()
        loss, squared = self.forward(frames, noise)
        loss.backward()
        self.optimizer.step(self.lr)
        self.average.update(self.optimizer.steps)
        return squared.detach()

    def capture(self, view: View) -> None:
        """Makes the tensors that a step of this view reads, and on a GPU records the step."""
        frames = torch.rand(
            view.batch, 3, view.frames, view.side_px, view.side_px, device=self.device
        ).contiguous(memory_format=torch.channels_last_3d)
        geometry = geometry_of(self.spec, view.side_px, view.side_px, view.frames)
        noise = torch.randn(view.batch, *geometry.latent_shape, device=self.device)
        self.inputs[view] = frames, noise
        if self.device.type != "cuda":
            return
        self.lr.fill_(0)
        beside = next(iter(self.graphs.values()), None)
        self.graphs[view], self.outputs[view] = captured(lambda: self.update(frames, noise), beside)

    def step(self, view: View, clips: Tensor, lr: float) -> Tensor:
        """One update on a fresh batch."""
        frames, noise = self.inputs[view]
        frames.copy_(clips)
        noise.normal_()
        self.lr.fill_(lr)
        if view not in self.graphs:
            return self.update(frames, noise)
        assert self.drawing is not None
        self.drawing.wait_stream(torch.cuda.current_stream())  # from here on `next_batch` may draw
        self.graphs[view].replay()
        return self.outputs[view]

    def next_batch(self, view: View, generator: torch.Generator) -> Tensor:
        """Clips for `step`, drawn while the step before runs: drawing waits for the host a lot."""
        if self.drawing is None:
            return draw(view, generator)
        with torch.cuda.stream(self.drawing):
            clips = draw(view, generator)
        torch.cuda.current_stream().wait_stream(self.drawing)
        return clips

    def state(self) -> dict[str, Tensor]:
        averages = {f"vae.{name}": tensor for name, tensor in self.average.tensors.items()}
        return checkpoint.training_state({"vae": self.vae}, averages, self.optimizer)


def initialise(vae: Vae) -> None:
    """Small last convolutions in the residual blocks, and channels last."""
    lay_out(vae)
    for name, p in vae.named_parameters():
        if name.endswith("conv2.weight"):
            p.data.mul_(0.2)


def lay_out(vae: Vae) -> Vae:
    """The same network, its weights channels last in memory, which cuDNN likes."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for p in vae.parameters():
        if p.ndim in layouts:
            p.data = p.data.to(memory_format=layouts[p.ndim])
    return vae


def draw(view: View, generator: torch.Generator) -> Tensor:
    """Clips for a view: whole ones, or crops that see an object, [B, 3, F, H, W]."""
    rows = shapes.sample_attributes(view.batch, generator)
    clips = shapes.render(rows)
    if view.side_px == clips.shape[-1]:
        return clips
    return crop(clips, view, generator)


def crop(clips: Tensor, view: View, generator: torch.Generator) -> Tensor:
    """A random span of frames and a square about a random pixel that is not background."""
    count, _, frames, height, _ = clips.shape
    device = clips.device
    start = torch.randint(frames - view.frames + 1, (count,), generator=generator, device=device)
    middle = start + view.frames // 2
    index = torch.arange(count, device=device)
    still = clips[index, :, middle]  # [B, 3, H, W]
    drawn = (still - still[:, :, :1, :1]).abs().sum(1).flatten(1) > 0.1
    chosen = torch.multinomial(drawn.float() + 1e-3, 1, generator=generator)[:, 0]
    half = view.side_px // 2
    top = (chosen // height - half).clamp(0, height - view.side_px)
    left = (chosen % height - half).clamp(0, height - view.side_px)
    t = start[:, None] + torch.arange(view.frames, device=device)
    y = top[:, None] + torch.arange(view.side_px, device=device)
    x = left[:, None] + torch.arange(view.side_px, device=device)
    return clips[
        index[:, None, None, None], :, t[:, :, None, None], y[:, None, :, None], x[:, None, None, :]
    ].permute(0, 4, 1, 2, 3)


@torch.no_grad()
def held_out_psnr(vae: Vae, device: torch.device, count: int = 64) -> float:
    """PSNR (dB, range 2) of whole held-out clips, through the network in fp32."""
    rows = shapes.sample_attributes(count, torch.Generator(device).manual_seed(77), "held_out")
    errors = []
    for part in rows.split(16):
        clips = shapes.render(part)
        mean = vae.mean(clips, None, first=True)
        out = vae.pixels(mean, None, first=True).clamp(-1, 1)
        errors.append(F.mse_loss(out, clips))
    return 10 * math.log10(4 / torch.stack(errors).mean().item())


@torch.no_grad()
def fold_statistics(vae: Vae, device: torch.device, count: int = 256) -> None:
    """Moves the latents to mean 0 and deviation 1 by changing the two 1x1x1 convolutions."""
    rows = shapes.sample_attributes(count, torch.Generator(device).manual_seed(78))
    latents = torch.cat(
        [vae.mean(shapes.render(part), None, first=True) for part in rows.split(16)]
    )
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    channels = len(mean)
    vae.to_moments.weight[:channels] /= std.view(-1, 1, 1, 1, 1)
    bias = vae.to_moments.bias
    assert bias is not None
    bias[:channels] = (bias[:channels] - mean) / std
    weight, out_bias = vae.from_latents.weight, vae.from_latents.bias
    assert out_bias is not None
    out_bias += weight[:, :, 0, 0, 0] @ mean
    weight *= std.view(1, -1, 1, 1, 1)


def averaged(trainer: Trainer) -> Vae:
    """A copy of the network with the averaged weights."""
    vae = Vae(trainer.spec.vae).to(trainer.device)
    vae.load_state_dict(trainer.average.tensors)
    vae.requires_grad_(False)
    return lay_out(vae)


def main() -> None:
    args = parse_arguments()
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    device = torch.device(args.device)
    views = VIEWS[args.model] if device.type == "cuda" else TINY_VIEWS
    parts = TRAINED_ALONE if args.decoder_only else TRAINED
    compiled = device.type == "cuda" and not args.eager
    trainer = Trainer(args.model, device, views, compiled, parts)
    for view in views:
        trainer.capture(view)
        print(f"{view} ready after {time.perf_counter() - began:.0f} s", flush=True)
    trainer.optimizer.reset()
    if args.take_over:
        args.run.mkdir(parents=True, exist_ok=True)
        (args.run / READY).touch()
        while (args.run / READY).exists():
            time.sleep(0.05)
    train(trainer, resume(trainer, args), args)


def parse_arguments() -> argparse.Namespace:
    options = command.parser(__doc__)
    command.add_model(options, DEMO, DEMO_T2V)
    command.add_sittings(options)
    options.add_argument("--decoder-only", action="store_true", help="latents stay as they are")
    options.add_argument("--keep", type=Path, help="directory for vae.safetensors, every minute")
    options.add_argument(
        "--hand-over", action="store_true", help="stop as soon as another process takes over"
    )
    options.add_argument(
        "--take-over", action="store_true", help="compile, then go on from one with --hand-over"
    )
    return options.parse_args()


def state_prefix(args: argparse.Namespace) -> str:
    """A decoder trained alone begins with normalised latents, which a whole state has not."""
    return "state-decoder" if args.decoder_only else "state"


def resume(trainer: Trainer, args: argparse.Namespace) -> float:
    """Restores a whole state, or averaged weights alone; returns the seconds trained so far."""
    prefix = state_prefix(args)
    if checkpoint.exists(args.run, prefix):
        state, note = checkpoint.load(args.run, prefix, trainer.device)
        checkpoint.restore(trainer.state(), state)
        assert isinstance(note, dict)
        return float(note["trained_s"])
    for directory in (args.run, args.keep):
        if directory and checkpoint.exists(directory, "vae"):  # without its momenta
            weights, _ = checkpoint.load(directory, "vae", trainer.device)
            checkpoint.restore(dict(trainer.vae.named_parameters()), weights)
            checkpoint.restore(trainer.average.tensors, weights)
            print(f"from {directory}/vae", flush=True)
            break
    return 0.0


def train(trainer: Trainer, done_s: float, args: argparse.Namespace) -> None:
    """The loop: a cosine from the peak to nothing over `--of-minutes`, then save."""
    device, prefix = trainer.device, state_prefix(args)
    generator = torch.Generator(device).manual_seed(args.seed + 1 + int(done_s))
    choices = torch.Generator().manual_seed(args.seed + 2 + int(done_s))
    sitting_s = command.sitting_s(args)
    total_s = 60 * args.of_minutes if args.of_minutes else done_s + sitting_s
    started, said, kept, step = time.perf_counter(), 0.0, 0.0, 0
    shares = torch.tensor([view.share for view in trainer.views])
    error = torch.zeros(())
    while (elapsed := time.perf_counter() - started) < sitting_s:
        lr = learning_rate(PEAK_LR, step, WARMUP_STEPS, (done_s + elapsed) / total_s)
        view = trainer.views[int(torch.multinomial(shares, 1, generator=choices))]
        error = trainer.step(view, trainer.next_batch(view, generator), max(lr, 1e-5))
        step += 1
        if elapsed - said > 15:
            said = elapsed
            torch.cuda.synchronize() if device.type == "cuda" else None
            psnr = 10 * math.log10(4 / error.item())
            print(
                f"vae step {step} {elapsed:.0f} s lr {lr:.1e} {view.side_px} px {psnr:.2f} dB",
                flush=True,
            )
        if args.keep and elapsed - kept > KEEP_EVERY_S:
            kept = elapsed
            note = {"steps": int(trainer.optimizer.steps), "trained_s": done_s + elapsed}
            keep(finished(trainer, args.decoder_only)[0], args.keep, note)
        if args.hand_over and (args.run / READY).exists():
            trained_s = done_s + time.perf_counter() - started
            checkpoint.save(args.run, trainer.state(), prefix=prefix, note={"trained_s": trained_s})
            (args.run / READY).unlink()
            print(f"handed over after {step} steps, {trained_s:.0f} s", flush=True)
            return

    trained_s = done_s + time.perf_counter() - started
    checkpoint.save(args.run, trainer.state(), prefix=prefix, note={"trained_s": trained_s})
    vae, before, after = finished(trainer, args.decoder_only)
    note = {"steps": int(trainer.optimizer.steps), "trained_s": trained_s, "psnr_db": after}
    checkpoint.save(args.run, dict(vae.named_parameters()), prefix="vae", note=note)
    if args.keep:
        keep(vae, args.keep, note)
    print(f"held-out PSNR {before:.2f} dB, folded {after:.2f} dB; {note}", flush=True)


def finished(trainer: Trainer, decoder_only: bool) -> tuple[Vae, float, float]:
    """The averaged network, its latents normalised, and its PSNR before and after that."""
    vae = averaged(trainer)
    searching = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False  # longer than the few passes of these shapes take
    before = after = held_out_psnr(vae, trainer.device)
    if not decoder_only:
        fold_statistics(vae, trainer.device)
        after = held_out_psnr(vae, trainer.device)
    torch.backends.cudnn.benchmark = searching
    return vae, before, after


def keep(vae: Vae, directory: Path, note: object) -> None:
    checkpoint.save_bf16(directory, dict(vae.named_parameters()), prefix="vae", note=note)


if __name__ == "__main__":
    main()
