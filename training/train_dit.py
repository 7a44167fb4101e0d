"""Trains the demo's transformer and text encoder together, on latents of its autoencoder.

    python -m training.train_dit --run RUN --minutes 9 [--of-minutes 18] [--seed 0]

Reads RUN/vae-*.safetensors, writes RUN/dit-* and RUN/umt5-* (averaged weights) and RUN/state2-*,
from which the same command goes on. A pool of clips is encoded once and a part of it replaced all
the time; captions are worded anew at each visit. The text encoder learns at a quarter of the
transformer's rate: at the full one, the two colours of a caption are exchanged in half of the
clips (found by the first probe).

Dims: B clips, C channels, T latent frames, H W latent sides, S text tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training import checkpoint, command, shapes
from training.evaluate import embed_text, evaluate
from training.optim import Average, Optimizer, captured, learning_rate
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.geometry import geometry_of
from wanfit.specs import DEMO

PEAK_LR = 1.5e-3
TEXT_LR = 0.25  # of the transformer's
WARMUP_STEPS = 200
AVERAGE_DECAY = 0.9995
EMPTY_CAPTIONS = 0.1  # share of captions dropped, for classifier-free guidance
FROM_IMAGE = 0.3  # share of clips whose first latent frame is given, clean and at time 0
TRAIN_SHIFT = 3.0  # moves the training times towards noise, as sampling does


@dataclass(frozen=True, slots=True)
class View:
    """One kind of clip in the pool."""

    frames: int
    height: int  # px
    width: int  # px
    clips: int  # in the pool
    batch: int
    share: float  # of the steps

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return geometry_of(DEMO, self.width, self.height, self.frames).latent_shape


VIEWS = (
    View(17, 128, 128, 32_768, 384, 0.80),
    View(17, 96, 160, 6_144, 384, 0.07),
    View(17, 160, 96, 6_144, 384, 0.07),
    View(33, 128, 128, 4_096, 192, 0.06),
)
TINY_VIEWS = (View(5, 64, 64, 8, 4, 1.0),)
FRESH_CLIPS = 64  # drawn anew and encoded ...
FRESH_EVERY = 8  # ... every so many steps


class Pool:
    """Latents and attributes of one view's clips, a part of them always being replaced."""

    def __init__(self, view: View, vae: Vae, generator: torch.Generator) -> None:
        self.view, self.vae, self.generator = view, vae, generator
        device = generator.device
        self.latents = torch.empty(
            view.clips, *view.latent_shape, device=device, dtype=torch.bfloat16
        )
        self.rows = torch.empty(view.clips, len(shapes.COLUMNS), device=device, dtype=torch.int16)
        self.next = 0
        for _ in range(0, view.clips, FRESH_CLIPS):
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Replaces the oldest clips of the pool."""
        count = min(FRESH_CLIPS, self.view.clips - self.next)
        rows = shapes.sample_attributes(count, self.generator)
        frames = shapes.render(rows, self.view.frames, self.view.height, self.view.width)
        with torch.autocast(frames.device.type, dtype=torch.bfloat16):
            mean = self.vae.mean(frames, None, first=True)
        self.latents[self.next : self.next + count] = mean
        self.rows[self.next : self.next + count] = rows
        self.next = (self.next + count) % self.view.clips

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """A batch: latents [B, C, T, H, W], ids [B, S], mask [B, S], some captions empty."""
        device, batch = self.latents.device, self.view.batch
        pick = torch.randint(self.view.clips, (batch,), generator=self.generator, device=device)
        rows = self.rows[pick]
        ids, mask = shapes.tokenise_batch(rows, shapes.sample_wording(rows, self.generator))
        empty = torch.rand(batch, 1, generator=self.generator, device=device) < EMPTY_CAPTIONS
        return self.latents[pick], *emptied(ids, mask, empty)


@dataclass(frozen=True, slots=True)
class Batch:
    """The fixed tensors that a captured step reads."""

    latents: Tensor
    noise: Tensor
    ids: Tensor
    mask: Tensor
    sigma: Tensor  # [B]
    from_image: Tensor  # bool [B]


class Trainer:
    """Transformer, text encoder, their averages, and one captured CUDA graph for each view."""

    def __init__(self, device: torch.device, views: Sequence[View], compiled: bool) -> None:
        self.device = device
        self.dit = Dit(DEMO.dit).to(device)
        self.umt5 = Umt5(DEMO.umt5).to(device)
        initialise(self.dit, self.umt5)
        self.modules: dict[str, nn.Module] = {"dit": self.dit, "umt5": self.umt5}
        self.optimizer = Optimizer(
            [(self.dit.named_parameters(), 1.0), (self.umt5.named_parameters(), TEXT_LR)]
        )
        self.average = Average(
            [
                (f"{prefix}.{name}", p)
                for prefix, module in self.modules.items()
                for name, p in module.named_parameters()
            ],
            AVERAGE_DECAY,
        )
        self.lr = torch.zeros((), device=device)
        if compiled:
            for block in self.dit.blocks:
                block.compile(dynamic=False)
        self.batches: dict[View, Batch] = {}
        self.outputs: dict[View, Tensor] = {}
        self.graphs: dict[View, torch.cuda.CUDAGraph] = {}
        for view in views:
            self.batches[view] = self._allocate(view)

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of the velocity, over all latent frames that are not given."""
        clean = batch.latents
        noisy, sigma = noised(clean, batch.noise, batch.sigma, batch.from_image)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            text, bias = embed_text(self.umt5, batch.ids, batch.mask)
            velocity = self.dit(noisy, 1000 * sigma, text, bias).float()
        counted = (sigma > 0).float()[:, None, :, None, None].expand_as(clean)
        error = (velocity - (batch.noise - clean)).square() * counted
        loss: Tensor = error.sum() / counted.sum()
        return loss

    def update(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        torch.autograd.backward(loss)
        self.optimizer.step(self.lr)
        self.average.update(self.optimizer.steps)
        return loss.detach()

    def capture(self, view: View) -> None:
        """Records a step of this view as one CUDA graph."""
        batch = self.batches[view]
        if self.device.type != "cuda":
            return
        self.lr.fill_(0)
        self.graphs[view], self.outputs[view] = captured(lambda: self.update(batch))

    def step(self, view: View, drawn: tuple[Tensor, Tensor, Tensor], lr: float) -> Tensor:
        """One update on a drawn batch; noise, times and image conditioning are drawn here."""
        batch = self.batches[view]
        for fixed, fresh in zip((batch.latents, batch.ids, batch.mask), drawn, strict=True):
            fixed.copy_(fresh)
        batch.noise.normal_()
        batch.sigma.copy_(training_sigma(torch.randn_like(batch.sigma)))
        batch.from_image.copy_(torch.rand_like(batch.sigma) < FROM_IMAGE)
        self.lr.fill_(lr)
        if view not in self.graphs:
            return self.update(batch)
        self.graphs[view].replay()
        return self.outputs[view]

    def state(self) -> dict[str, Tensor]:
        return checkpoint.training_state(self.modules, self.average.tensors, self.optimizer)

    def averaged(self) -> tuple[Dit, Umt5]:
        """Copies of the networks with the averaged weights."""
        dit, umt5 = Dit(DEMO.dit).to(self.device), Umt5(DEMO.umt5).to(self.device)
        for prefix, module in (("dit.", dit), ("umt5.", umt5)):
            module.load_state_dict(
                {
                    n.removeprefix(prefix): t
                    for n, t in self.average.tensors.items()
                    if n.startswith(prefix)
                }
            )
            module.requires_grad_(False)
        return dit, umt5

    def _allocate(self, view: View) -> Batch:
        tokens, device = shapes.caption_tokens(), self.device
        latents = torch.randn(view.batch, *view.latent_shape, device=device)
        return Batch(
            latents=latents,
            noise=torch.randn_like(latents),
            ids=torch.ones(view.batch, tokens, dtype=torch.long, device=device),
            mask=torch.ones(view.batch, tokens, dtype=torch.bool, device=device),
            sigma=torch.full((view.batch,), 0.5, device=device),
            from_image=torch.zeros(view.batch, dtype=torch.bool, device=device),
        )


def emptied(ids: Tensor, mask: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """ids and mask [B, S] with the empty caption where `empty`, bool [B, 1]."""
    no_ids, no_mask = shapes.empty_captions(len(ids), ids.device)
    return torch.where(empty, no_ids, ids), torch.where(empty, no_mask, mask)


def training_sigma(normal: Tensor) -> Tensor:
    """Noise levels in (0, 1) from normal draws: logit-normal (Esser et al. 2024), then shifted."""
    u = normal.sigmoid()
    return TRAIN_SHIFT * u / (1 + (TRAIN_SHIFT - 1) * u)


def noised(
    clean: Tensor, noise: Tensor, sigma: Tensor, from_image: Tensor
) -> tuple[Tensor, Tensor]:
    """Noisy latents [B, C, T, H, W] and the sigma of each latent frame [B, T].

    sigma: [B]. from_image: bool [B], where the first latent frame is given and stays clean.
    """
    levels = sigma[:, None].expand(-1, clean.shape[2]).clone()
    levels[:, 0] = levels[:, 0] * ~from_image
    s = levels[:, None, :, None, None]
    return (1 - s) * clean + s * noise, levels


@torch.no_grad()
def initialise(dit: Dit, umt5: Umt5) -> None:
    """The transformer as official (model.py, init_weights), the encoder as T5 (its width rules)."""
    for name, p in dit.named_parameters():
        if name.endswith("modulation"):
            p.normal_(std=DEMO.dit.width**-0.5)
        elif name.startswith("head.linear"):
            p.zero_()
        elif p.ndim >= 2:
            nn.init.xavier_uniform_(p.view(p.shape[0], -1))
        elif name.endswith("bias"):
            p.zero_()
    spec = DEMO.umt5
    for name, p in umt5.named_parameters():
        if "token_embed" in name:
            p.normal_(std=1.0)
        elif "attn.q" in name:
            p.normal_(std=(spec.width * spec.head_dim) ** -0.5)
        elif p.ndim == 2:
            p.normal_(std=p.shape[1] ** -0.5)


def main() -> None:
    options = command.parser(__doc__)
    command.add_sittings(options)
    options.add_argument("--evaluate", type=int, default=128, help="clips per line at the end")
    args = options.parse_args()

    began = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.device(args.device)
    views = VIEWS if device.type == "cuda" else TINY_VIEWS
    vae = Vae(DEMO.vae).to(device).requires_grad_(False)
    vae.load_state_dict(checkpoint.load(args.run, "vae", device)[0])

    trainer = Trainer(device, views, compiled=device.type == "cuda" and not args.eager)
    for view in views:
        trainer.capture(view)
        print(f"{view} ready after {time.perf_counter() - began:.0f} s", flush=True)
    trainer.optimizer.reset()
    done_s = resume(trainer, args.run)
    generator = torch.Generator(device).manual_seed(args.seed + 1 + int(done_s))
    pools = {view: Pool(view, vae, generator) for view in views}
    print(f"pools ready after {time.perf_counter() - began:.0f} s", flush=True)

    train(trainer, pools, done_s, args)
    dit, umt5 = trainer.averaged()
    if args.evaluate:
        for line in evaluate(dit, umt5, vae, device, args.evaluate):
            print(line, flush=True)


def resume(trainer: Trainer, run: Path) -> float:
    """Restores a whole state, or the averaged weights alone; returns the seconds trained so far."""
    if (run / "state2.json").exists():
        state, note = checkpoint.load(run, "state2", trainer.device)
        checkpoint.restore(trainer.state(), state)
        assert isinstance(note, dict)
        return float(note["trained_s"])
    if not (run / "dit.json").exists():
        return 0.0
    done_s = 0.0
    for name, module in trainer.modules.items():
        weights, note = checkpoint.load(run, name, trainer.device)
        checkpoint.restore(dict(module.named_parameters()), weights)
        checkpoint.restore(
            {n: t for n, t in trainer.average.tensors.items() if n.startswith(name)},
            {f"{name}.{n}": t for n, t in weights.items()},
        )
        assert isinstance(note, dict)
        done_s = note["trained_s"]
    return done_s


def train(
    trainer: Trainer, pools: dict[View, Pool], done_s: float, args: argparse.Namespace
) -> None:
    """The loop: a cosine from the peak to nothing over `--of-minutes`, then save."""
    views, device = list(pools), trainer.device
    choices = torch.Generator().manual_seed(args.seed + 2 + int(done_s))
    shares = torch.tensor([view.share for view in views])
    total_s = 60 * (args.of_minutes or args.minutes)
    started, said, step = time.perf_counter(), 0.0, 0
    while (elapsed := time.perf_counter() - started) < 60 * args.minutes:
        lr = learning_rate(PEAK_LR, step, WARMUP_STEPS, (done_s + elapsed) / total_s)
        view = views[int(torch.multinomial(shares, 1, generator=choices))]
        loss = trainer.step(view, pools[view].draw(), max(lr, 1e-5))
        if step % FRESH_EVERY == 0:
            pools[view].refresh()
        step += 1
        if step % 16 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # so that the clock tells the truth
        if elapsed - said > 20:
            said = elapsed
            print(f"dit step {step} {elapsed:.0f} s lr {lr:.1e} loss {loss.item():.4f}", flush=True)

    trained_s = done_s + time.perf_counter() - started
    note = {"steps": int(trainer.optimizer.steps), "trained_s": trained_s}
    checkpoint.save(args.run, trainer.state(), prefix="state2", note=note)
    for name, module in zip(("dit", "umt5"), trainer.averaged(), strict=True):
        checkpoint.save(args.run, dict(module.named_parameters()), prefix=name, note=note)
    print(f"saved {note}", flush=True)


if __name__ == "__main__":
    main()
