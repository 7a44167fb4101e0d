"""Teaches the text encoder more ways to say the same, without training the transformer again.

    python -m training.train_text --run RUN --minutes 22 [--seed 0]

The transformer is frozen. The encoder as it was, reading the plainest phrasing, is the teacher: the
same noisy clip with the same facts worded otherwise shall give the same velocity. That target has
no noise of its own, so a few thousand small batches do, even on a CPU. Why it is needed: after
`train_dit` with a dozen phrasings, a phrasing that began in a new way ("over blue, a ...") lost
the shape in two clips of three, while colours and motion were right.

Reads RUN/vae-*, dit-* and umt5-*; writes RUN/umt5-* anew and keeps the old as RUN/teacher-*.
Dims: as in `train_dit`.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from training import checkpoint, command, shapes
from training.evaluate import embed_text
from training.noise import noise_of, noised
from training.optim import Average, Optimizer, learning_rate
from training.pool import Pool, View, emptied
from training.train_dit import FROM_IMAGE
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.specs import DEMO

VIEW = View(17, 128, 128, clips=384, batch=16, share=1.0)
PEAK_LR = 4e-4
WARMUP_STEPS = 20
AVERAGE_DECAY = 0.99
EMPTY_SHARE = 1 / 16  # rows that keep the empty caption, which guidance leans on
PLAINEST = (0, len(shapes.ONE_OBJECT))  # the phrasing that the teacher reads, of one and two


def plainest(rows: Tensor, wording: Tensor) -> Tensor:
    """The same facts in the plainest phrasing; what `wording` leaves unsaid stays unsaid."""
    plain = wording.clone()
    two = shapes.column(rows, "count") == 2
    plain[:, 0] = torch.where(two, PLAINEST[1], PLAINEST[0]).to(plain.dtype)
    named = shapes.sizes_named(wording)
    for k in (1, 2):
        place = shapes.WORDING_COLUMNS.index(f"size_{k}")
        plain[:, place] *= named[:, k - 1]
    return plain


Tokens = tuple[Tensor, Tensor]  # ids and mask, [B, S] each


def draw(pool: Pool, generator: torch.Generator) -> tuple[Tensor, Tokens, Tokens]:
    """Latents [B, C, T, H, W], and their captions as the student and as the teacher reads them."""
    device, batch = generator.device, pool.view.batch
    pick = torch.randint(len(pool.rows), (batch,), generator=generator, device=device)
    rows = pool.rows[pick]
    wording = shapes.sample_wording(rows, generator)
    empty = torch.rand(batch, 1, generator=generator, device=device) < EMPTY_SHARE

    def tokens(words: Tensor) -> Tokens:
        return emptied(*shapes.tokenise_batch(rows, words), empty)

    return pool.latents[pick].float(), tokens(wording), tokens(plainest(rows, wording))


def matching_loss(
    dit: Dit,
    teacher: tuple[Umt5, Tokens],
    student: tuple[Umt5, Tokens],
    clean: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared difference of the two velocities, each encoder reading its own tokens."""
    device, batch = generator.device, len(clean)
    sigma = noise_of(DEMO).draw(batch, device, generator)
    given = torch.rand(batch, generator=generator, device=device) < FROM_IMAGE
    noise = torch.randn(clean.shape, generator=generator, device=device)
    noisy, levels = noised(clean, noise, sigma, given)
    with torch.no_grad():
        target = dit(noisy, 1000 * levels, *embed_text(teacher[0], *teacher[1]))
    velocity = dit(noisy, 1000 * levels, *embed_text(student[0], *student[1]))
    loss: Tensor = (velocity - target).square().mean()
    return loss


def main() -> None:
    args = command.parser(__doc__).parse_args()

    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    vae, dit = Vae(DEMO.vae).to(device), Dit(DEMO.dit).to(device)
    teacher, student = Umt5(DEMO.umt5).to(device), Umt5(DEMO.umt5).to(device)
    if not (args.run / "teacher.json").exists():
        checkpoint.save(args.run, checkpoint.load(args.run, "umt5", device)[0], prefix="teacher")
    for prefix, network in (("vae", vae), ("dit", dit), ("teacher", teacher), ("umt5", student)):
        network.load_state_dict(checkpoint.load(args.run, prefix, device)[0])
        network.requires_grad_(network is student)

    generator = torch.Generator(device).manual_seed(args.seed + 1)
    began = time.perf_counter()
    pool = Pool(DEMO, VIEW, vae, generator)
    print(f"pool ready after {time.perf_counter() - began:.0f} s", flush=True)

    optimizer = Optimizer([(student.named_parameters(), 1.0)])
    average = Average(student.named_parameters(), AVERAGE_DECAY)
    started, said, step, running = time.perf_counter(), 0.0, 0, 0.0
    while (elapsed := time.perf_counter() - started) < 60 * args.minutes:
        lr = learning_rate(PEAK_LR, step, WARMUP_STEPS, elapsed / (60 * args.minutes))
        optimizer.zero_grad()
        clean, told, plain = draw(pool, generator)
        loss = matching_loss(dit, (teacher, plain), (student, told), clean, generator)
        torch.autograd.backward(loss)
        optimizer.step(torch.tensor(lr, device=device))
        average.update(optimizer.steps)
        step += 1
        running += (loss.item() - running) / min(step, 50)
        if elapsed - said > 20:
            said = elapsed
            print(f"text step {step} {elapsed:.0f} s lr {lr:.1e} loss {running:.5f}", flush=True)

    note = {"steps": step, "trained_s": time.perf_counter() - started, "loss": running}
    checkpoint.save(args.run, average.tensors, prefix="umt5", note=note)
    print(f"saved {note}", flush=True)


if __name__ == "__main__":
    main()
