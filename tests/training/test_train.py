"""The training code's own claims: shortcuts that change nothing, and state that comes back."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from training import checkpoint, shapes, train_text
from training.evaluate import embed_text
from training.optim import Average, Optimizer, orthogonal
from training.pool import Pool
from training.pool import View as PoolView
from training.train_vae import View, crop, fold_statistics
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.specs import DEMO, TEXT_TOKENS

CPU = torch.device("cpu")
SMALL_DIT = dataclasses.replace(DEMO.dit, num_heads=2, head_dim=24, num_blocks=2, ffn_width=64)
SMALL_VAE = dataclasses.replace(DEMO.vae, encoder_width=8, decoder_width=8)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_one_biased_row_stands_for_all_the_padding() -> None:
    """Training with short texts computes what the model computes with 512 rows."""
    torch.manual_seed(0)
    umt5, dit = Umt5(DEMO.umt5), Dit(SMALL_DIT)
    rows = shapes.sample_attributes(3, torch.Generator().manual_seed(1))
    ids, mask = shapes.tokenise_batch(
        rows, shapes.sample_wording(rows, torch.Generator().manual_seed(2))
    )
    latents, times = torch.randn(3, 48, 2, 4, 4), torch.tensor([900.0, 500.0, 10.0])
    with torch.no_grad():
        short, bias = embed_text(umt5, ids, mask)
        full = torch.zeros(3, TEXT_TOKENS, short.shape[2])
        full[:, : ids.shape[1]] = short[:, :-1]
        assert relative_error(dit(latents, times, short, bias), dit(latents, times, full)) < 1e-5
        # Without the bias the padding weighs too little, so the test can fail.
        assert relative_error(dit(latents, times, short), dit(latents, times, full)) > 1e-4


def test_folding_the_statistics_changes_the_latents_and_not_the_picture() -> None:
    torch.manual_seed(0)
    vae = Vae(DEMO.vae).requires_grad_(False)
    vae.to_moments.weight.mul_(3)
    clip = shapes.render(shapes.sample_attributes(1, torch.Generator().manual_seed(3)), 5, 64, 64)
    before = vae.mean(clip, None, first=True)
    picture = vae.pixels(before, None, first=True)
    fold_statistics(vae, CPU, count=2)
    after = vae.mean(clip, None, first=True)
    assert relative_error(vae.pixels(after, None, first=True), picture) < 1e-4
    assert abs(after.std().item() - 1) < 0.5
    assert relative_error(after, before) > 0.1


def test_newton_schulz_brings_singular_values_near_one() -> None:
    """Muon's constants aim at values between 0.7 and 1.2, whatever the matrix's scale and shape."""
    torch.manual_seed(0)
    for shape in ((2, 32, 96), (1, 96, 32)):
        values = torch.linalg.svdvals(orthogonal(1e-3 * torch.randn(shape)))
        assert values.min() > 0.4
        assert values.max() < 1.3


def test_a_short_runs_average_is_that_of_its_end() -> None:
    """A weight that counts its steps: 200 steps average to the last tenth, not to the middle."""
    weight = torch.nn.Parameter(torch.zeros(1))
    average = Average([("w", weight)], decay=0.9995)
    for step in range(1, 201):
        weight.data.fill_(step)
        average.update(torch.tensor(float(step)))
    assert 175 < average.tensors["w"].item() < 190


@pytest.mark.parametrize("steps", [0, 3])
def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path: Path, steps: int) -> None:
    """Weights, averages and momenta saved and restored: the next step is bit for bit the same."""

    def run(layer: torch.nn.Module, optimizer: Optimizer, count: int) -> None:
        for i in range(count):
            optimizer.zero_grad()
            layer(torch.ones(2, 32) * (i + 1)).square().mean().backward()
            optimizer.step(torch.tensor(1e-2))

    torch.manual_seed(0)
    first = torch.nn.Linear(32, 16)
    optimizer = Optimizer([(first.named_parameters(), 1.0)])
    run(first, optimizer, steps)
    state = checkpoint.training_state({"layer": first}, {}, optimizer)
    checkpoint.save(tmp_path, state, prefix="state", note={"trained_s": 1.5})

    second = torch.nn.Linear(32, 16)
    resumed = Optimizer([(second.named_parameters(), 1.0)])
    saved, note = checkpoint.load(tmp_path, "state", CPU)
    checkpoint.restore(checkpoint.training_state({"layer": second}, {}, resumed), saved)
    run(first, optimizer, 2)
    run(second, resumed, 2)
    assert note == {"trained_s": 1.5}
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


def test_checkpoint_files_stay_under_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 1000)
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(7)}
    checkpoint.save(tmp_path, tensors, prefix="x")
    loaded, _ = checkpoint.load(tmp_path, "x", CPU)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert len(list(tmp_path.glob("x-*.safetensors"))) == 4


def test_crops_show_the_object() -> None:
    """Each crop has pixels that are not background, and is a part of its own clip."""
    generator = torch.Generator().manual_seed(5)
    rows = shapes.sample_attributes(16, generator)
    clips = shapes.render(rows, 17, 128, 128)
    crops = crop(clips, View(16, 9, 64, 1.0), generator)
    assert crops.shape == (16, 3, 9, 64, 64)
    for whole, part, row in zip(clips, crops, rows, strict=True):
        ground = shapes.palette()[int(shapes.column(row[None], "background"))]
        assert (part - ground[:, None, None, None]).abs().amax() > 0.1
        assert set(part.flatten(1).unique(dim=1)[:, :1].T.flatten().tolist()) <= set(
            whole.flatten().tolist()
        )


def test_the_teacher_reads_the_same_facts_in_the_plainest_phrasing() -> None:
    """Same objects, colours and verbs; a size that the student is not told the teacher is not."""
    generator = torch.Generator().manual_seed(6)
    rows = shapes.sample_attributes(200, generator)
    wording = shapes.sample_wording(rows, generator)
    plain = train_text.plainest(rows, wording)
    told, meant = shapes.sizes_named(wording), shapes.sizes_named(plain)
    assert torch.equal(told, meant)
    for row, taught in zip(rows, plain, strict=True):
        text = shapes.caption(row, taught)
        assert text.startswith(("a ", "an "))
        assert text.endswith(" background")
        for name in ("color_1", "shape_1"):
            words = shapes.COLORS if "color" in name else shapes.SHAPES
            assert words[int(shapes.column(row[None], name))] in text.split()


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    """The same encoder and words: rounding alone. Another encoder, or other words: a loss."""
    torch.manual_seed(0)
    view = PoolView(5, 64, 64, clips=4, batch=4, share=1.0)
    vae = Vae(DEMO.vae).requires_grad_(False)
    pool = Pool(DEMO, view, vae, torch.Generator().manual_seed(1))
    clean, told, plain = train_text.draw(pool, torch.Generator().manual_seed(2))
    dit = Dit(DEMO.dit)
    teacher, other = Umt5(DEMO.umt5), Umt5(DEMO.umt5)

    def loss(student: tuple[Umt5, train_text.Tokens]) -> float:
        draws = torch.Generator().manual_seed(3)
        return train_text.matching_loss(dit, (teacher, plain), student, clean, draws).item()

    rounding = loss((teacher, plain))
    assert loss((teacher, told)) > 1000 * rounding
    assert loss((other, plain)) > 1000 * rounding
