"""The demos with two experts: what the cheap ways of training them must leave true.

Networks are those of `demo-t2v` and `demo-i2v` made smaller, with weights drawn at random.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training import checkpoint, shapes, train_vae
from training.evaluate import FROM_IMAGE, FROM_TEXT, Networks, Trial, evaluate
from training.noise import noise_of
from training.pool import Pool, View, image_latents
from training.train_dit import Trainer
from training.train_experts import STAGES, run_stage, with_channels
from wanfit.engine.condition import condition_on, image_channels
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.geometry import geometry_of
from wanfit.specs import DEMO, DEMO_I2V, DEMO_T2V, Expert, ModelSpec

CPU = torch.device("cpu")


def smaller(spec: ModelSpec) -> ModelSpec:
    return replace(
        spec,
        dit=replace(spec.dit, num_heads=1, num_blocks=2, ffn_width=64),
        vae=replace(spec.vae, encoder_width=8, decoder_width=8),
    )


T2V, I2V = smaller(DEMO_T2V), smaller(DEMO_I2V)
VIEW = View(5, 64, 64, clips=8, batch=4, share=1.0)


def random_dit(spec: ModelSpec) -> Dit:
    """Of weights that matter: a head of zeros would hide every mistake."""
    dit = Dit(spec.dit).requires_grad_(False)
    for p in dit.parameters():
        p.normal_(std=0.1)
    return dit


class TestNoise:
    def test_each_expert_draws_its_own_side_of_the_boundary_and_all_of_it(self) -> None:
        for spec in (DEMO_T2V, DEMO_I2V):
            assert spec.boundary is not None
            torch.manual_seed(0)
            high = noise_of(spec, "high_noise").draw(20_000, CPU)
            low = noise_of(spec, "low_noise").draw(20_000, CPU)
            assert spec.boundary <= high.min() < spec.boundary + 0.001
            assert spec.boundary - 0.001 < low.max() <= spec.boundary
            assert low.min() < 0.02
            # Sampling begins at pure noise, where a normal distribution alone has no draws.
            assert (high > 0.99).float().mean() > 0.05

    def test_the_dense_demo_draws_as_it_was_trained(self) -> None:
        """Logit-normal, then moved by the shift: its quantiles are those of the normal one."""
        torch.manual_seed(0)
        drawn = noise_of(DEMO).draw(50_000, CPU)
        u = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([0.1, 0.5, 0.9])).sigmoid()
        wanted = 3 * u / (1 + 2 * u)
        found = drawn.quantile(torch.tensor([0.1, 0.5, 0.9]))
        assert torch.allclose(found, wanted, atol=0.01)


class TestImages:
    def test_training_conditions_on_an_image_as_the_engine_does(self) -> None:
        torch.manual_seed(0)
        vae = Vae(I2V.vae).requires_grad_(False)
        rows = shapes.sample_attributes(2, torch.Generator().manual_seed(1))
        first = shapes.render(rows, 9, 64, 96)[:, :, :1]
        ours = image_channels(image_latents(vae, first, 9), I2V.vae.stride_frames)
        geometry = geometry_of(I2V, 96, 64, 9)
        for image, channels in zip(first, ours, strict=True):
            theirs = condition_on(image[:, 0], "i2v", geometry, vae).channels
            assert theirs is not None
            assert torch.allclose(channels, theirs[0], atol=1e-4)
        assert ours.shape[1] == I2V.dit.in_channels - I2V.vae.latent_channels

    def test_a_pool_gives_images_to_the_share_that_was_asked_for(self) -> None:
        """And each its own clip's: encoded again, the first frame is that of the latents."""
        torch.manual_seed(0)
        vae = Vae(I2V.vae).requires_grad_(False)
        view = replace(VIEW, batch=64)
        pool = Pool(I2V, view, vae, torch.Generator().manual_seed(2))
        given = pool.draw(0.5).channels
        assert given is not None
        assert 16 < given[:, 0, 0, 0, 0].sum() < 48
        without = pool.draw(0.0).channels
        assert without is not None
        assert without.abs().max() == 0
        every = pool.draw(1.0)
        assert every.channels is not None
        # A causal encoder's first latent frame sees the first frame alone.
        assert torch.allclose(every.channels[:, 4:, 0], every.latents[:, :, 0], atol=0.02)

    def test_channels_that_are_zero_may_be_left_out_and_added(self) -> None:
        torch.manual_seed(0)
        wide, narrow = random_dit(I2V), Dit(T2V.dit).requires_grad_(False)
        cut = with_channels(dict(wide.named_parameters()), 16)
        narrow.load_state_dict(cut)
        noisy, times, text = torch.randn(2, 16, 2, 8, 8), torch.tensor([900.0, 50.0]), None
        text = torch.randn(2, 5, DEMO.umt5.width)
        padded = torch.cat([noisy, torch.zeros(2, 20, 2, 8, 8)], 1)
        assert torch.allclose(narrow(noisy, times, text), wide(padded, times, text), atol=1e-5)

        wide.load_state_dict(with_channels(cut, 36))
        given = torch.cat([noisy, torch.randn(2, 20, 2, 8, 8)], 1)
        assert torch.allclose(narrow(noisy, times, text), wide(given, times, text), atol=1e-5)


def options(tmp_path: Path, **more: object) -> argparse.Namespace:
    given = {
        "run": tmp_path / "run", "keep": tmp_path / "kept", "seed": 0, "device": "cpu",
        "minutes": 0.02, "of_minutes": None, "until": None, "evaluate": 1,
        "decoder_only": False, "hand_over": False,
    }  # fmt: skip
    return argparse.Namespace(**(given | more))


class TestStages:
    def test_experts_start_from_the_dense_network_and_go_on_from_themselves(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        torch.manual_seed(0)
        args = options(tmp_path)
        umt5 = Umt5(DEMO.umt5).requires_grad_(False)
        trainer = Trainer(I2V, CPU, [VIEW], compiled=False, text=umt5)
        vae = Vae(I2V.vae).requires_grad_(False)
        pools = {VIEW: Pool(I2V, VIEW, vae, torch.Generator().manual_seed(3))}
        fresh = {name: p.detach().clone() for name, p in trainer.dit.named_parameters()}
        by_name = {stage.name: stage for stage in STAGES}
        words = umt5.state_dict()["token_embed.weight"].clone()

        def taught(name: str, seconds: float) -> tuple[dict[str, Tensor], dict[str, float]]:
            run_stage(trainer, pools, by_name[name], seconds, fresh, args)
            weights, note = checkpoint.load(args.keep, name, CPU)
            assert isinstance(note, dict)
            return weights, note

        def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
            return all(torch.equal(a[name], b[name]) for name in a)

        dense, note = taught("dense", 0.5)
        assert note["steps"] > 0
        untaught, _ = taught("t2v-high", 0.0)
        assert same(untaught, with_channels(dense, 16))
        assert same(taught("i2v-low", 0.0)[0], dense)
        low, first = taught("i2v-low", 0.5)
        assert not same(low, dense)
        again, second = taught("i2v-low", 0.0)
        assert same(again, low)
        assert second["trained_s"] == pytest.approx(first["trained_s"], abs=0.1)
        assert torch.equal(umt5.state_dict()["token_embed.weight"], words)
        said = capsys.readouterr().out
        assert said.count("i2v-low: 0 s, from dense") == 1
        assert said.count("from i2v-low") == 2

    @pytest.mark.parametrize(
        ("spec", "trial"), [(T2V, FROM_TEXT[1]), (I2V, FROM_IMAGE[0])], ids=["t2v", "i2v"]
    )
    def test_the_look_at_a_models_clips_asks_both_experts(
        self, spec: ModelSpec, trial: Trial
    ) -> None:
        torch.manual_seed(0)
        steps = 6
        spec = replace(
            spec, sampling=replace(spec.sampling, num_inference_steps=steps), presets=((64, 64),)
        )
        asked: list[Expert] = []
        dits = {expert: Dit(spec.dit).requires_grad_(False) for expert in spec.experts}
        for expert, dit in dits.items():
            dit.register_forward_pre_hook(lambda *_, expert=expert: asked.append(expert))
        networks = Networks(spec, dits, Umt5(DEMO.umt5), Vae(spec.vae).requires_grad_(False))
        line = evaluate(networks, trial, 1)
        assert line.startswith(f"{trial.title}: background ")
        # Cond and uncond of each step, high noise first.
        assert len(asked) == 2 * steps
        assert asked == sorted(asked)
        assert set(asked) == set(spec.experts)


class TestAutoencoder:
    def trainer(self, parts: tuple[str, ...] = train_vae.TRAINED) -> train_vae.Trainer:
        trainer = train_vae.Trainer(
            T2V, CPU, (train_vae.View(1, 5, 32, 1.0),), compiled=False, parts=parts
        )
        for view in trainer.views:
            trainer.capture(view)
        return trainer

    def test_the_one_who_takes_over_has_all_that_the_other_had(self, tmp_path: Path) -> None:
        args = options(tmp_path, hand_over=True, minutes=5.0)
        args.run.mkdir()
        ready = args.run / train_vae.READY
        ready.touch()
        torch.manual_seed(1)
        first = self.trainer()
        train_vae.train(first, 0.0, args)  # five minutes, were it not for `ready`
        assert not ready.exists()
        assert not checkpoint.exists(args.run, "vae")
        torch.manual_seed(2)
        second = self.trainer()
        assert train_vae.resume(second, args) > 0
        mine, theirs = second.state(), first.state()
        assert mine["steps"] == 1
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)

    def test_a_decoder_trained_alone_leaves_the_latents_as_they_are(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(train_vae, "held_out_psnr", lambda *given: 0.0)
        args = options(tmp_path, decoder_only=True, keep=None)
        torch.manual_seed(3)
        trainer = self.trainer(train_vae.TRAINED_ALONE)
        before = {n: p.detach().clone() for n, p in trainer.vae.named_parameters()}
        train_vae.train(trainer, 0.0, args)
        after, _ = checkpoint.load(args.run, "vae", CPU)
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        assert changed
        assert all(name.startswith("decoder.") for name in changed)
