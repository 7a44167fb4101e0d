"""What `train_experts` keeps becomes models that run, whole or sharing files in the package.

Weights are drawn at random: whether a trained model shows what it should is for `test_demo` and
`benchmarks.demo_quality`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from training import checkpoint, shapes
from training.export import export, share
from wanfit import generate
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.vae import Vae
from wanfit.engine.weights import package
from wanfit.engine.weights.configs import FOLDERS
from wanfit.engine.weights.directory import file_tensors
from wanfit.engine.weights.locate import locate
from wanfit.engine.weights.package import DEMO_DIRECTORY, borrowed
from wanfit.engine.weights.search import search
from wanfit.plan.plan import NetworkName
from wanfit.specs import DEMO, DEMO_I2V, DEMO_T2V, MODELS, ModelSpec

TWO_EXPERTS = (DEMO_T2V, DEMO_I2V)
MOST_BYTES = 90_000_000  # of all demo models together, in the package
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a sitting."""
    path = tmp_path_factory.mktemp("kept")
    torch.manual_seed(0)
    networks: dict[str, torch.nn.Module] = {"vae": Vae(DEMO_T2V.vae)}
    for spec in TWO_EXPERTS:
        for noise in ("high", "low"):
            networks[f"{spec.task}-{noise}"] = Dit(spec.dit)
    for name, network in networks.items():
        weights = dict(network.named_parameters())
        checkpoint.save_bf16(path, weights, prefix=name, note={"steps": 0})
    return path


@pytest.fixture(scope="module")
def shipped(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package directory with all three demo models."""
    path = tmp_path_factory.mktemp("package")
    (path / DEMO.name).symlink_to(DEMO_DIRECTORY)
    for spec in TWO_EXPERTS:
        export(kept, spec, path / spec.name)
        share(path / spec.name, spec)
    return path


def test_all_demo_models_together_are_small_enough_to_ship(shipped: Path) -> None:
    files = [f for spec in (DEMO, *TWO_EXPERTS) for f in (shipped / spec.name).rglob("*")]
    total = sum(file.stat().st_size for file in files if file.is_file())
    assert 0.9 * MOST_BYTES < total <= MOST_BYTES


@pytest.mark.parametrize("spec", TWO_EXPERTS, ids=lambda spec: spec.name)
def test_a_shipped_model_has_the_rest_from_another(
    spec: ModelSpec, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "PACKAGE", shipped)
    files = locate(spec, None, "auto").open()
    networks: tuple[NetworkName, ...] = (*spec.experts, "umt5", "vae")
    for network in networks:
        lender = borrowed(spec).get(network, spec)
        folders = {
            entry.file.relative_to(shipped).parts[0] for entry in files.entries(network).values()
        }
        assert folders == {lender.name}
    assert files.tokenizer().vocab_size <= spec.umt5.vocab_size
    high, low = (
        files.load_dit(expert, CPU, torch.float32).head.linear.weight for expert in spec.experts
    )
    assert not torch.equal(high, low)


def test_the_list_of_models_finds_what_ships(
    shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "PACKAGE", shipped)
    monkeypatch.setenv("HF_HUB_CACHE", str(shipped / "nothing"))
    findings = search(models=(DEMO, *TWO_EXPERTS))
    for spec in (DEMO, *TWO_EXPERTS):
        found = findings.best(spec, "auto")
        assert found is not None
        assert found.is_complete, found.missing


def test_only_what_ships_can_be_asked_for_by_name() -> None:
    """A name that `wanfit models` lists has its weights, and weights that ship have a name."""
    for spec in (DEMO, *TWO_EXPERTS):
        assert (spec in MODELS) == (package.packaged(spec) is not None), spec.name


@pytest.mark.parametrize("spec", TWO_EXPERTS, ids=lambda spec: spec.name)
def test_a_clip_goes_through_both_experts(spec: ModelSpec, kept: Path, tmp_path: Path) -> None:
    """The whole pipeline, and a whole directory. Another expert of either kind: another clip."""
    export(kept, spec, tmp_path / "model")
    rows = shapes.sample_attributes(1, torch.Generator().manual_seed(1))
    still = ((shapes.render(rows, 1, 64, 64)[0, :, 0] + 1) * 127.5).byte().permute(1, 2, 0)

    def clip() -> npt.NDArray[np.uint8]:
        generate(
            "a red circle on blue",
            output=tmp_path / "clip.npy",
            image=Image.fromarray(still.numpy()) if spec.takes_image else None,
            spec=spec,
            weights=tmp_path / "model",
            device="cpu",
            seed=1,
            size="64x64",
            num_frames=5,
            num_inference_steps=2,
            guidance=1.0,
        )
        frames: npt.NDArray[np.uint8] = np.load(tmp_path / "clip.npy")
        return frames

    whole = clip()
    assert whole.shape == (5, 64, 64, 3)
    for expert in spec.experts:
        file = tmp_path / "model" / FOLDERS[expert] / "diffusion_pytorch_model.safetensors"
        content = file.read_bytes()
        save_file(file_tensors(Dit(spec.dit), torch.bfloat16), file)
        assert not np.array_equal(clip(), whole), expert
        file.write_bytes(content)
