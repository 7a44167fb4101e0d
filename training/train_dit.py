"""Trains the demo's transformer and text encoder together, on latents of its autoencoder.

    python -m training.train_dit --run RUN --minutes 9 [--of-minutes 18] [--seed 0]

Reads RUN/vae-*.safetensors, writes RUN/dit-* and RUN/umt5-* (averaged weights) and RUN/state2-*,
from which the same command goes on. The text encoder learns at a quarter of the transformer's
rate: at the full one, the two colours of a caption are exchanged in half of the clips (found by
the first probe). `train_experts` uses the same trainer with a text encoder that is ready.

Dims: B clips, C channels, T latent frames, H W latent sides, S text tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training import checkpoint, command, shapes
from training.evaluate import ALL_TRIALS, Networks, embed_text, evaluate
from training.noise import NoiseRange, noise_of, noised
from training.optim import Average, Optimizer, captured, learning_rate
from training.pool import Drawn, Pool, View
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.specs import DEMO, ModelSpec

PEAK_LR = 1.5e-3
TEXT_LR = 0.25  # of the transformer's
WARMUP_STEPS = 200
AVERAGE_DECAY = 0.9995
FROM_IMAGE = 0.3  # share of clips whose first latent frame is given, clean and at time 0

VIEWS = (
    View(17, 128, 128, 32_768, 384, 0.80),
    View(17, 96, 160, 6_144, 384, 0.07),
    View(17, 160, 96, 6_144, 384, 0.07),
    View(33, 128, 128, 4_096, 192, 0.06),
)
TINY_VIEWS = (View(5, 64, 64, 8, 4, 1.0),)
SAY_EVERY_S = 20.0
KEEP_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a run of the training loop teaches, and how fast."""

    noise: NoiseRange
    image_share: float  # of the clips
    peak_lr: float = PEAK_LR
    warmup_steps: int = WARMUP_STEPS
    fresh_every: int = 8  # steps; FRESH_CLIPS are drawn anew and encoded


@dataclass(frozen=True, slots=True)
class Batch:
    """The fixed tensors that a captured step reads."""

    latents: Tensor
    noise: Tensor
    ids: Tensor
    mask: Tensor
    sigma: Tensor  # [B]
    from_image: Tensor  # bool [B]: TI2V's first latent frame is given
    channels: Tensor | None  # I2V's, [B, 4 + C, T, H, W]


class Trainer:
    """Transformer, text encoder, their averages, and one captured CUDA graph for each view.

    text: a text encoder that is ready and stays as it is; None: a new one learns too.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: torch.device,
        views: Sequence[View],
        *,
        compiled: bool,
        text: Umt5 | None = None,
    ) -> None:
        self.spec, self.device = spec, device
        self.dit = Dit(spec.dit).to(device)
        initialise_dit(self.dit)
        self.modules: dict[str, nn.Module] = {"dit": self.dit}
        groups = [(self.dit.named_parameters(), 1.0)]
        if text is None:
            self.umt5 = Umt5(spec.umt5).to(device)
            initialise_umt5(self.umt5)
            self.modules["umt5"] = self.umt5
            groups.append((self.umt5.named_parameters(), TEXT_LR))
        else:
            self.umt5 = text
        self.optimizer = Optimizer(groups)
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
        # Only TI2V's latent frames differ in time.
        times = 1000 * (sigma if self.spec.task == "ti2v" else batch.sigma)
        given = noisy if batch.channels is None else torch.cat([noisy, batch.channels], dim=1)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            text, bias = embed_text(self.umt5, batch.ids, batch.mask)
            velocity = self.dit(given, times, text, bias).float()
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
        beside = next(iter(self.graphs.values()), None)
        self.graphs[view], self.outputs[view] = captured(lambda: self.update(batch), beside)

    def step(self, view: View, drawn: Drawn, lesson: Lesson, lr: float) -> Tensor:
        """One update on a drawn batch; noise, times and given first frames are drawn here."""
        batch = self.batches[view]
        batch.latents.copy_(drawn.latents)
        batch.ids.copy_(drawn.ids)
        batch.mask.copy_(drawn.mask)
        batch.noise.normal_()
        batch.sigma.copy_(lesson.noise.draw(view.batch, self.device))
        if batch.channels is not None:
            assert drawn.channels is not None
            batch.channels.copy_(drawn.channels)
        elif self.spec.takes_image:
            batch.from_image.copy_(torch.rand_like(batch.sigma) < lesson.image_share)
        self.lr.fill_(lr)
        if view not in self.graphs:
            return self.update(batch)
        self.graphs[view].replay()
        return self.outputs[view]

    def state(self) -> dict[str, Tensor]:
        return checkpoint.training_state(self.modules, self.average.tensors, self.optimizer)

    def averaged(self, prefix: str) -> dict[str, Tensor]:
        """The averaged weights of "dit" or "umt5", under their names in the network."""
        start = f"{prefix}."
        tensors = self.average.tensors
        return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}

    def begin_with(self, weights: dict[str, Tensor]) -> None:
        """A transformer's weights, from which training starts anew."""
        checkpoint.restore(dict(self.dit.named_parameters()), weights)
        checkpoint.restore(self.averaged("dit"), weights)
        self.optimizer.reset()

    def _allocate(self, view: View) -> Batch:
        tokens, device = shapes.caption_tokens(), self.device
        channels, *grid = view.latent_shape(self.spec)
        latents = torch.randn(view.batch, channels, *grid, device=device)
        extra = self.spec.dit.in_channels - channels
        return Batch(
            latents=latents,
            noise=torch.randn_like(latents),
            ids=torch.ones(view.batch, tokens, dtype=torch.long, device=device),
            mask=torch.ones(view.batch, tokens, dtype=torch.bool, device=device),
            sigma=torch.full((view.batch,), 0.5, device=device),
            from_image=torch.zeros(view.batch, dtype=torch.bool, device=device),
            channels=torch.zeros(view.batch, extra, *grid, device=device) if extra else None,
        )


@torch.no_grad()
def initialise_dit(dit: Dit) -> None:
    """As official (model.py, init_weights)."""
    for name, p in dit.named_parameters():
        if name.endswith("modulation"):
            p.normal_(std=dit.spec.width**-0.5)
        elif name.startswith("head.linear"):
            p.zero_()
        elif p.ndim >= 2:
            nn.init.xavier_uniform_(p.view(p.shape[0], -1))
        elif name.endswith("bias"):
            p.zero_()


@torch.no_grad()
def initialise_umt5(umt5: Umt5) -> None:
    """As T5 (its width rules)."""
    spec = umt5.spec
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

    compiled = device.type == "cuda" and not args.eager
    trainer = Trainer(DEMO, device, views, compiled=compiled)
    for view in views:
        trainer.capture(view)
        print(f"{view} ready after {time.perf_counter() - began:.0f} s", flush=True)
    trainer.optimizer.reset()
    done_s = resume(trainer, args.run)
    generator = torch.Generator(device).manual_seed(args.seed + 1 + int(done_s))
    pools = {view: Pool(DEMO, view, vae, generator) for view in views}
    print(f"pools ready after {time.perf_counter() - began:.0f} s", flush=True)

    sitting_s = command.sitting_s(args)
    total_s = 60 * args.of_minutes if args.of_minutes else done_s + sitting_s
    trained_s = train(
        trainer, pools, Lesson(noise_of(DEMO), FROM_IMAGE), args.seed,
        Timing(sitting_s, done_s, total_s),
    )  # fmt: skip
    note = {"steps": int(trainer.optimizer.steps), "trained_s": done_s + trained_s}
    checkpoint.save(args.run, trainer.state(), prefix="state2", note=note)
    for name in trainer.modules:
        checkpoint.save(args.run, trainer.averaged(name), prefix=name, note=note)
    print(f"saved {note}", flush=True)
    if args.evaluate:
        dit, umt5 = Dit(DEMO.dit).to(device), Umt5(DEMO.umt5).to(device)
        dit.load_state_dict(trainer.averaged("dit"))
        umt5.load_state_dict(trainer.averaged("umt5"))
        networks = Networks(DEMO, {"high_noise": dit}, umt5, vae)
        for trial in ALL_TRIALS:
            print(evaluate(networks, trial, args.evaluate), flush=True)


def resume(trainer: Trainer, run: Path) -> float:
    """Restores a whole state, or the averaged weights alone; returns the seconds trained so far."""
    if checkpoint.exists(run, "state2"):
        state, note = checkpoint.load(run, "state2", trainer.device)
        checkpoint.restore(trainer.state(), state)
        assert isinstance(note, dict)
        return float(note["trained_s"])
    if not checkpoint.exists(run, "dit"):
        return 0.0
    done_s = 0.0
    for name, module in trainer.modules.items():
        weights, note = checkpoint.load(run, name, trainer.device)
        checkpoint.restore(dict(module.named_parameters()), weights)
        checkpoint.restore(trainer.averaged(name), weights)
        assert isinstance(note, dict)
        done_s = note["trained_s"]
    return done_s


@dataclass(frozen=True, slots=True)
class Timing:
    """How long the loop trains, and where in its schedule that is."""

    sitting_s: float
    done_s: float  # in earlier sittings
    total_s: float  # of the whole schedule

    def progress(self, elapsed_s: float) -> float:
        return (self.done_s + elapsed_s) / max(self.total_s, 1e-9)


def train(
    trainer: Trainer,
    pools: Mapping[View, Pool],
    lesson: Lesson,
    seed: int,
    timing: Timing,
    keep: Callable[[float], None] | None = None,
) -> float:
    """The loop: a cosine from the peak to nothing over the schedule. Returns its seconds.

    keep: called with the seconds of this sitting, about once a minute.
    """
    views, device = list(pools), trainer.device
    choices = torch.Generator().manual_seed(seed + 2 + int(timing.done_s))
    shares = torch.tensor([view.share for view in views])
    started, said, kept, step = time.perf_counter(), 0.0, 0.0, 0
    while (elapsed := time.perf_counter() - started) < timing.sitting_s:
        lr = learning_rate(lesson.peak_lr, step, lesson.warmup_steps, timing.progress(elapsed))
        view = views[int(torch.multinomial(shares, 1, generator=choices))]
        drawn = pools[view].draw(lesson.image_share)
        loss = trainer.step(view, drawn, lesson, max(lr, 1e-5))
        if step % lesson.fresh_every == 0:
            pools[view].refresh()
        step += 1
        if step % 16 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # so that the clock tells the truth
        if elapsed - said > SAY_EVERY_S:
            said = elapsed
            print(f"dit step {step} {elapsed:.0f} s lr {lr:.1e} loss {loss.item():.4f}", flush=True)
        if keep is not None and elapsed - kept > KEEP_EVERY_S:
            kept = elapsed
            keep(elapsed)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
