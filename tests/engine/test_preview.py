"""Previews show about what the clip becomes, and cost nothing when nobody asks for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.engine.plans import hand_made_plan
from training import fit_preview
from wanfit import generate
from wanfit.engine import preview as previews
from wanfit.engine.models.vae import Vae
from wanfit.engine.pipeline import generate_frames
from wanfit.engine.preview import average_colours, fit_colours, preview, read_colours
from wanfit.engine.weights.depot import Depot
from wanfit.engine.weights.open import open_model
from wanfit.engine.weights.units import loaded_vae
from wanfit.events import Event, Preview, StepDone
from wanfit.service import DEMO_DIRECTORY
from wanfit.specs import DEMO

CPU = torch.device("cpu")
PROMPT = "a large yellow star moves to the right on a blue background"


@pytest.fixture(scope="module")
def vae() -> Iterator[Vae]:
    depot = Depot(CPU)
    yield loaded_vae(open_model(DEMO_DIRECTORY, DEMO), depot, torch.float32)
    depot.release()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Event], npt.NDArray[np.uint8]]:
    """The events and the frames of one clip of the demo, with previews."""
    events: list[Event] = []
    path = tmp_path_factory.mktemp("clip") / "clip.npy"
    generate(
        PROMPT, output=path, size="128x128", frames=17, steps=8, seed=3, device="cpu",
        on_event=events.append, previews=True,
    )  # fmt: skip
    return events, np.load(path)


def psnr_db(seen: npt.NDArray[np.uint8], wanted: Tensor) -> float:
    error = torch.from_numpy(seen.astype(np.float32)) - wanted
    return float(-10 * torch.log10(error.square().mean() / 255**2))


def shown_by(frames: npt.NDArray[np.uint8], spec: Any = DEMO.vae) -> Tensor:
    """What a preview of the finished clip should be: its middle, averaged, fp32 [H, W, 3]."""
    clip = torch.from_numpy(frames).float().permute(3, 0, 1, 2)[None]
    averaged = average_colours(clip, spec)[0]
    return averaged[:, averaged.shape[1] // 2].permute(1, 2, 0)


def test_the_last_preview_is_near_the_clip_and_the_first_is_not(
    made: tuple[list[Event], npt.NDArray[np.uint8]],
) -> None:
    events, frames = made
    seen = [event for event in events if isinstance(event, Preview)]
    assert [event.step for event in seen] == list(range(1, 9))
    assert all(event.steps == 8 and event.frame.shape == (8, 8, 3) for event in seen)
    assert all(event.frame.dtype == np.uint8 for event in seen)
    wanted = shown_by(frames)
    near = psnr_db(seen[-1].frame, wanted)
    assert near > 16  # 19.0 on the machine that this was written on
    assert near > psnr_db(seen[0].frame, wanted) + 1
    correlation = np.corrcoef(seen[-1].frame.ravel(), wanted.ravel())[0, 1]
    assert correlation > 0.85


def test_each_comes_before_its_step_is_said_to_be_done(
    made: tuple[list[Event], npt.NDArray[np.uint8]],
) -> None:
    told = [
        (type(event).__name__, event.step)
        for event in made[0]
        if isinstance(event, Preview) or (isinstance(event, StepDone) and event.stage == "denoise")
    ]
    assert told == [(kind, step) for step in range(1, 9) for kind in ("Preview", "StepDone")]


def test_the_clip_is_the_same_without_and_nothing_is_computed(
    made: tuple[list[Event], npt.NDArray[np.uint8]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("nobody asked")

    for name in ("preview", "fit_colours", "read_colours"):
        monkeypatch.setattr(previews, name, fail)
        for module in ("wanfit.engine.denoise", "wanfit.engine.pipeline"):
            monkeypatch.setattr(f"{module}.{name}", fail, raising=False)
    events: list[Event] = []
    path = tmp_path / "clip.npy"
    generate(
        PROMPT, output=path, size="128x128", frames=17, steps=8, seed=3, device="cpu",
        on_event=events.append,
    )  # fmt: skip
    assert not any(isinstance(event, Preview) for event in events)
    np.testing.assert_array_equal(np.load(path), made[1])


def test_the_demos_map_suits_clips_that_it_was_not_fitted_to(vae: Vae) -> None:
    """Held-out combinations; the script that made the map says 20 dB."""
    colours = read_colours(DEMO_DIRECTORY / "vae", CPU)
    assert colours is not None
    with torch.inference_mode():
        assert fit_preview.psnr_db(vae, colours, fit_preview.batch(99, "held_out")[:4]) > 17


def test_a_map_fitted_to_plain_colours_tells_them_and_is_the_same_every_time(vae: Vae) -> None:
    """For autoencoders without a file: of six flat clips, each is nearest to its own colour."""
    named = torch.cat([torch.eye(3), -torch.eye(3)]) * 0.8
    with torch.inference_mode():
        colours, again = fit_colours(vae), fit_colours(vae)
        assert all(map(torch.equal, colours, again))
        for i, colour in enumerate(named):
            clip = colour.view(1, 3, 1, 1, 1).expand(1, 3, 9, 96, 96)
            seen = preview(vae.encode(clip), colours)
            middle = torch.from_numpy(seen[2:4, 2:4]).float().mean((0, 1)) / 127.5 - 1
            assert (named - middle).norm(dim=1).argmin() == i
            assert (colour - middle).abs().max() < 0.5  # of a range of 2


def test_a_process_fits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(previews, "REPEATS", 1)
    fitted = []

    def fit(vae: Vae) -> previews.Colours:
        fitted.append(vae)
        return fit_colours(vae)

    monkeypatch.setattr("wanfit.engine.pipeline.fit_colours", fit)
    monkeypatch.setattr("wanfit.engine.pipeline.read_colours", lambda *_: None)
    from wanfit.request import VideoRequest, resolve

    request = resolve(
        VideoRequest.parse(
            {"prompt": "a red circle", "size": "64x64", "frames": 5, "steps": 1, "seed": 1}
        )
    )
    depot = Depot(CPU)
    files = open_model(DEMO_DIRECTORY, DEMO)
    for _ in range(2):
        plan = hand_made_plan(request)
        events = list(generate_frames(plan, files, None, depot, previews=True))
        assert sum(isinstance(event, Preview) for event in events) == 1
    depot.release()
    assert len(fitted) == 1


def test_average_colours_are_those_of_each_cells_frames() -> None:
    frames = torch.rand(2, 3, 9, 32, 48)
    shown = average_colours(frames, DEMO.vae)
    assert shown.shape == (2, 3, 3, 2, 3)
    torch.testing.assert_close(shown[0, 1, 0, 0, 0], frames[0, 1, 0, :16, :16].mean())
    torch.testing.assert_close(shown[1, 2, 2, 1, 2], frames[1, 2, 5:9, 16:, 32:].mean())
