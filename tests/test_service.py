"""Real clips from a tiny model: what is written, reported, refused, and cleaned up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

import wanfit
from tests.engine.tiny_models import TINY_I2V, TINY_TI2V
from wanfit.engine.weights.convert import convert_model
from wanfit.engine.weights.depot import Depot
from wanfit.engine.weights.open import open_model
from wanfit.errors import (
    BadFrameCount,
    BadImage,
    BadOption,
    BadOutput,
    DoesNotFit,
    OutOfMemory,
    UnknownModel,
    WanfitError,
    WeightsBroken,
    WeightsMismatch,
    WeightsMissing,
)
from wanfit.events import Event, FramesReady, Notice, Stage, StageBegan, StepDone
from wanfit.media.sheet import SHEET_GAP_PX as GAP
from wanfit.report import Report
from wanfit.request import VideoRequest, resolve
from wanfit.service import default_output, generate

Generate = Callable[..., Report]
PROMPT = "a red circle moves left"


@pytest.fixture
def tiny(tiny_model_dir: Path) -> Generate:
    """`generate` for the tiny model, with a small clip as the default; all can be overridden."""

    def call(prompt: str | VideoRequest = PROMPT, **options: Any) -> Report:
        if isinstance(prompt, str):
            options = {"size": "64x32", "frames": 5, "steps": 2, "seed": 7} | options
        where: dict[str, Any] = {"spec": TINY_TI2V, "weights": tiny_model_dir, "device": "cpu"}
        return generate(prompt, **where | options)

    return call


def nothing_in(directory: Path) -> bool:
    return not list(directory.iterdir())


class TestClips:
    def test_an_mp4_holds_the_clip_and_its_settings(self, tiny: Generate, tmp_path: Path) -> None:
        report = tiny(output=tmp_path / "clip.mp4", guidance=4.5, solver="euler")
        with av.open(str(tmp_path / "clip.mp4")) as container:
            frames = list(container.decode(video=0))
            comment = json.loads(container.metadata["comment"])
        assert (len(frames), frames[0].width, frames[0].height) == (5, 64, 32)
        assert comment | report.settings == comment, "the file carries every setting"
        assert comment["prompt"] == PROMPT
        assert (comment["seed"], comment["model"]) == (7, "tiny-ti2v")
        assert (comment["guidance_high"], comment["guidance_low"]) == (4.5, 4.5)
        assert comment["precision"] == "fp32"

    def test_every_format_holds_the_same_frames(self, tiny: Generate, tmp_path: Path) -> None:
        tiny(output=tmp_path / "clip.npy")
        tiny(output=tmp_path / "frames")
        clip = np.load(tmp_path / "clip.npy")
        assert clip.shape == (5, 32, 64, 3)
        for k, path in enumerate(sorted((tmp_path / "frames").iterdir())):
            np.testing.assert_array_equal(np.asarray(Image.open(path)), clip[k])

    def test_a_seed_means_one_clip(self, tiny: Generate, tmp_path: Path) -> None:
        clips = []
        for seed in (1, 1, 2):
            tiny(output=tmp_path / "clip.npy", seed=seed)
            clips.append(np.load(tmp_path / "clip.npy"))
        np.testing.assert_array_equal(clips[0], clips[1])
        assert not np.array_equal(clips[0], clips[2])

    def test_an_image_sets_the_shape_and_adds_a_stage(self, tiny: Generate, tmp_path: Path) -> None:
        Image.new("RGB", (200, 50), "teal").save(tmp_path / "start.png")
        spec = replace(TINY_TI2V, sampling=replace(TINY_TI2V.sampling, width=64, height=64))
        report = tiny(
            output=tmp_path / "clip.npy", image=tmp_path / "start.png", size=None, spec=spec
        )
        assert np.load(tmp_path / "clip.npy").shape == (5, 32, 128, 3)
        assert [use.stage for use in report.stages] == ["text", "image", "denoise", "decode"]

    @pytest.mark.parametrize("where", [True, "elsewhere/sheet.png"])
    def test_a_contact_sheet_goes_beside_or_where_told(
        self, tiny: Generate, tmp_path: Path, where: bool | str
    ) -> None:
        expected = tmp_path / ("clip.png" if where is True else str(where))
        report = tiny(
            output=tmp_path / "clip.gif", contact_sheet=where if where is True else expected
        )
        assert report.contact_sheet == expected
        with Image.open(expected) as sheet:
            assert sheet.size == (
                4 * (64 + GAP) + GAP,
                2 * (32 + GAP) + GAP,
            )  # five frames: four, and one below

    def test_bf16_is_another_rounding_of_the_same_clip(
        self, tiny: Generate, tmp_path: Path
    ) -> None:
        clips = {}
        for precision in ("fp32", "bf16"):
            report = tiny(output=tmp_path / "clip.npy", precision=precision)
            assert report.precision == precision
            clips[precision] = np.load(tmp_path / "clip.npy").astype(float)
        difference = np.abs(clips["fp32"] - clips["bf16"]).mean()
        assert 0 < difference < 12

    def test_a_whole_request_stands_for_its_fields(self, tiny: Generate, tmp_path: Path) -> None:
        request = VideoRequest.parse({"prompt": PROMPT, "size": "64x32", "frames": 1, "steps": 1})
        report = tiny(request, output=tmp_path / "clip.npy")
        assert report.num_frames == 1
        with pytest.raises(BadOption, match="seed"):
            tiny(request, output=tmp_path / "clip.npy", seed=4)


class TestReport:
    def test_says_what_was_done_and_what_it_cost(self, tiny: Generate, tmp_path: Path) -> None:
        report = tiny("a red dragon", output=tmp_path / "clip.mp4")
        assert report.output_bytes == (tmp_path / "clip.mp4").stat().st_size
        assert report.num_frames == 5
        assert report.device == "cpu"
        assert [use.stage for use in report.stages] == ["text", "denoise", "decode"]
        assert report.first_step_s is not None
        assert 0 < report.first_step_s < report.total_s
        assert sum(use.elapsed_s for use in report.stages) <= report.total_s
        assert 0 < report.write_s < report.stages[-1].elapsed_s
        assert all(use.host_resident_bytes > 50 * 2**20 for use in report.stages)
        assert len(report.notices) == 1
        assert "dragon" in report.notices[0]
        assert report.versions["torch"] == torch.__version__

    def test_is_plain_json_that_names_its_units(self, tiny: Generate, tmp_path: Path) -> None:
        report = tiny(output=tmp_path / "frames", contact_sheet=True)
        fields = json.loads(json.dumps(report.to_json()))
        assert fields["output"] == str(tmp_path / "frames")
        assert fields["contact_sheet"] == str(tmp_path / "frames.png")
        files = (tmp_path / "frames").iterdir()
        assert fields["output_bytes"] == sum(file.stat().st_size for file in files)
        assert VideoRequest.parse(
            {key: value for key, value in fields["settings"].items() if key != "fps"}
        ), "the settings of a report can be asked for again"
        for stage in fields["stages"]:
            assert {key.rsplit("_", 1)[-1] for key in stage} == {"stage", "s", "bytes"}


class TestEvents:
    def test_come_in_the_documented_order(self, tiny: Generate, tmp_path: Path) -> None:
        events: list[Event] = []
        tiny("a red dragon", output=tmp_path / "clip.npy", on_event=events.append)
        began = [event for event in events if isinstance(event, StageBegan)]
        assert [event.stage for event in began] == ["text", "denoise", "decode"]
        for stage in began:
            steps = [e.step for e in events if isinstance(e, StepDone) and e.stage == stage.stage]
            assert steps == list(range(1, (stage.steps or 0) + 1))
        decode = events.index(began[-1])
        chunks = [k for k, event in enumerate(events) if isinstance(event, FramesReady)]
        assert min(chunks) > decode
        assert any(isinstance(event, Notice) for event in events)

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("moment", [StageBegan, StepDone, FramesReady])
    def test_an_exception_from_the_caller_ends_it_and_leaves_nothing(
        self,
        tiny: Generate,
        tmp_path: Path,
        moment: type[Event],
        error: type[BaseException],
    ) -> None:
        seen_part = False

        def stop(event: Event) -> None:
            nonlocal seen_part
            if isinstance(event, moment):
                seen_part = not nothing_in(tmp_path)
                raise error

        with pytest.raises(error):
            tiny(output=tmp_path / "new" / "clip.mp4", contact_sheet=True, on_event=stop)
        assert seen_part == (moment is FramesReady), "the file is begun when frames come"
        assert nothing_in(tmp_path)


class TestRefusals:
    def test_come_in_the_order_that_costs_least(self, tmp_path: Path) -> None:
        """Each call has all the mistakes of the calls after it, and one more."""
        call = partial(generate, PROMPT, weights=tmp_path / "no_weights")
        refusals: list[tuple[type[WanfitError], dict[str, Any]]] = [
            (BadOption, {"stepz": 3}),
            (UnknownModel, {"model": "wan-9"}),
            (BadImage, {"image": tmp_path / "none.png"}),
            (BadFrameCount, {"frames": 6}),
            (BadOutput, {"output": tmp_path / "clip.avi"}),
            (BadOption, {"device": "tpu"}),
            (WeightsMissing, {}),
        ]
        for k, (error, _) in enumerate(refusals):
            wrong: dict[str, Any] = {"output": tmp_path / "clip.mp4"}
            for _, options in refusals[k:]:
                wrong |= options
            with pytest.raises(error):
                call(**wrong)
        assert nothing_in(tmp_path)

    def test_come_before_torch(self, tmp_path: Path) -> None:
        """In a fresh process: the last refusal that needs no weights leaves torch unimported."""
        script = (
            "import sys\n"
            "from wanfit import WeightsError, generate\n"
            "try:\n"
            "    generate('x', output='clip.mp4', weights='none', image=sys.argv[1])\n"
            "except WeightsError:\n"
            "    sys.exit('torch' in sys.modules)\n"
        )
        Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
        command = [sys.executable, "-c", script, str(tmp_path / "image.png")]
        assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0

    def test_an_image_that_is_needed_or_not_wanted(self, tiny: Generate, tmp_path: Path) -> None:
        with pytest.raises(BadImage, match="needs an image"):
            tiny(output=tmp_path / "clip.mp4", spec=TINY_I2V)
        with pytest.raises(BadImage, match="takes no image"):
            generate(
                "x", model="t2v-a14b", output=tmp_path / "a.mp4", image=Image.new("RGB", (8, 8))
            )

    def test_weights_that_are_not_named_not_there_or_of_another_model(
        self, tiny: Generate, tmp_path: Path, tiny_model_dir: Path
    ) -> None:
        (tmp_path / "empty").mkdir()
        for weights, hint in ((None, "are not here"), (tmp_path / "empty", "has no transformer")):
            with pytest.raises(WeightsMissing, match=hint) as raised:
                tiny(output=tmp_path / "clip.mp4", weights=weights)
            assert "wanfit pull" in raised.value.hint
        with pytest.raises(WeightsMismatch):
            generate("x", output=tmp_path / "clip.mp4", weights=tiny_model_dir, model="demo")
        assert [path.name for path in tmp_path.iterdir()] == ["empty"]

    @pytest.mark.parametrize("option", ["device", "precision"])
    def test_an_unknown_device_or_precision(
        self, tiny: Generate, tmp_path: Path, option: str
    ) -> None:
        with pytest.raises(BadOption, match=f"{option} is 'abacus'"):
            tiny(output=tmp_path / "clip.mp4", **{option: "abacus"})

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
    def test_cuda_where_there_is_none(self, tiny: Generate, tmp_path: Path) -> None:
        with pytest.raises(BadOption, match="no GPU that its driver shows"):
            tiny(output=tmp_path / "clip.mp4", device="cuda")
        assert nothing_in(tmp_path)


class KernelRanOut(torch.AcceleratorError):
    """What a kernel raises when it, and not the allocator, runs out of memory."""

    error_code = 2


class TestMemory:
    """Memory that runs out in spite of the plan, forced from where events are told."""

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError, KernelRanOut])
    @pytest.mark.parametrize("stage", ["denoise", "decode"])
    def test_running_out_once_is_tried_again_with_a_tighter_plan(
        self, tiny: Generate, tmp_path: Path, stage: Stage, error: type[Exception]
    ) -> None:
        """The second attempt gives the same clip as one that went well, and the report says so."""
        expected = tmp_path / "expected.npy"
        tiny(output=expected)
        told: list[Event] = []

        def run_out_once(event: Event) -> None:
            told.append(event)
            first = StepDone(stage, 1, 2)
            if event == first and told.count(first) == 1:
                raise error("no memory")

        report = tiny(output=tmp_path / "clip.npy", on_event=run_out_once)
        assert report.retried
        assert np.array_equal(np.load(expected), np.load(tmp_path / "clip.npy"))
        said = [event.message for event in told if isinstance(event, Notice)]
        assert sum("Memory ran out" in message for message in said) == 1

    def test_running_out_twice_is_an_error_that_says_what_was_held(
        self, tiny: Generate, tmp_path: Path
    ) -> None:
        """Nothing is left behind: neither a file nor a thread; and the next job runs."""
        threads = threading.active_count()

        def run_out(event: Event) -> None:
            if isinstance(event, StepDone):
                raise torch.OutOfMemoryError("no memory")

        with pytest.raises(OutOfMemory, match=r"registered, ring \d+ bytes"):
            tiny(output=tmp_path / "clip.mp4", on_event=run_out)
        assert nothing_in(tmp_path)
        assert threading.active_count() == threads
        assert not tiny(output=tmp_path / "clip.mp4").retried

    @pytest.mark.gpu
    @pytest.mark.parametrize("let_go", [True, False])
    def test_a_gpu_that_somebody_else_fills(
        self, random_demo_dir: Path, tmp_path: Path, let_go: bool
    ) -> None:
        """All that the budget leaves is taken as denoising begins, so torch really runs out.

        Given back meanwhile, the second attempt makes the clip; else the error says what was held.
        Either way the budget was kept, and the next job runs.
        """
        ballast: list[torch.Tensor] = []

        def fill(event: Event) -> None:
            if isinstance(event, Notice) and "ran out" in event.message and let_go:
                ballast.clear()
            if isinstance(event, StageBegan) and event.stage == "denoise" and not told:
                told.append(event)
                size = 1 << 30
                while size >= 1 << 16:
                    try:
                        ballast.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
                    except torch.OutOfMemoryError:
                        size //= 2

        def clip(name: str, on_event: Callable[[Event], None] | None = None) -> Report:
            return generate(
                PROMPT, weights=random_demo_dir, device="cuda", vram="3GiB", steps=2, seed=7,
                output=tmp_path / name, on_event=on_event,
            )  # fmt: skip

        told: list[Event] = []
        if let_go:
            assert clip("clip.npy", fill).retried
        else:
            with pytest.raises(OutOfMemory, match="held then: tensors"):
                clip("clip.npy", fill)
            assert nothing_in(tmp_path)
        ballast.clear()
        assert not clip("next.npy").retried
        total = torch.cuda.get_device_properties(0).total_memory
        assert torch.cuda.get_per_process_memory_fraction() * total < 3 * 2**30

    def test_a_budget_that_nothing_fits_is_refused_before_torch_works(
        self, tiny: Generate, tmp_path: Path
    ) -> None:
        with pytest.raises(DoesNotFit, match="of RAM"):
            tiny(output=tmp_path / "clip.mp4", ram="1MiB")
        assert nothing_in(tmp_path)

    def test_a_depot_that_is_kept_serves_the_next_clip(
        self, tiny: Generate, tmp_path: Path
    ) -> None:
        """The caller's depot is not released; it holds the files of one model at a time."""
        depot = Depot(torch.device("cpu"))
        first = tiny(output=tmp_path / "1.npy", depot=depot)
        assert depot.num_files > 0
        again = tiny(output=tmp_path / "2.npy", depot=depot)
        assert np.array_equal(np.load(first.output), np.load(again.output))
        depot.release()
        assert depot.num_files == depot.registered_bytes == depot.ring_bytes == 0

    def test_a_store_is_checked_between_jobs(self, tmp_path: Path, tiny_model_dir: Path) -> None:
        """A flipped byte is found while nothing runs, and told before a later clip begins."""
        store = tmp_path / "store"
        convert_model(open_model(tiny_model_dir, TINY_TI2V), store, "bf16")
        depot = Depot(torch.device("cpu"), check_idle=True)

        def call(name: str) -> Report:
            return generate(
                PROMPT, spec=TINY_TI2V, weights=store, device="cpu", depot=depot, size="64x32",
                frames=5, steps=1, seed=7, output=tmp_path / name,
            )  # fmt: skip

        def call_for_a_while() -> None:
            for _ in range(60):
                call("clip.npy")
                time.sleep(1)  # idle

        file = store / "high_noise.safetensors"
        with file.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            last = stream.read(1)
            stream.seek(-1, os.SEEK_END)
            stream.write(bytes([last[0] ^ 1]))
        call("clip.npy")  # opening a store reads no tensor
        with pytest.raises(WeightsBroken, match=r"high_noise\.safetensors"):
            call_for_a_while()
        depot.release()


class TestDefaultOutput:
    def test_names_model_prompt_and_seed(self, tmp_path: Path) -> None:
        request = resolve(VideoRequest(prompt="A small RED circle, spinning! " * 3, seed=5))
        path = default_output(request, tmp_path)
        assert path.name == "demo-a-small-red-circle-spinning-a-small-red-circle-s-5.mp4"

    @pytest.mark.parametrize("prompt", ["", "...", "/../../etc/passwd", "圆" * 100, "\n\0"])
    def test_any_prompt_gives_a_plain_file_name(self, tmp_path: Path, prompt: str) -> None:
        path = default_output(resolve(VideoRequest(prompt=prompt)), tmp_path)
        assert path.parent == tmp_path
        path.write_text("")

    def test_never_names_a_file_that_exists(self, tmp_path: Path) -> None:
        request = resolve(VideoRequest(prompt="a star", seed=5))
        names = []
        for _ in range(3):
            path = default_output(request, tmp_path)
            path.write_text("")
            names.append(path.name)
        assert names == ["demo-a-star-5.mp4", "demo-a-star-5-2.mp4", "demo-a-star-5-3.mp4"]

    def test_is_used_when_no_output_is_given(
        self, tiny: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        report = tiny()
        assert report.output == Path("outputs/tiny-ti2v-a-red-circle-moves-left-7.mp4")
        assert report.output.is_file()


class TestPublicNames:
    def test_every_public_name_can_be_imported(self) -> None:
        assert wanfit.generate is generate
        assert {name for name in wanfit.__all__ if hasattr(wanfit, name)} == set(wanfit.__all__)
        assert set(wanfit.__all__) <= set(dir(wanfit))

    def test_other_names_are_not_there(self) -> None:
        with pytest.raises(AttributeError, match="no attribute 'plan_b'"):
            wanfit.plan_b  # noqa: B018
