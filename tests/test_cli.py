"""The command line as a person meets it: real processes, real signals, real files.

A refused command ends with one line on stderr, the right exit code, and an empty directory.
"""

from __future__ import annotations

import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests import cpu_time
from tests.test_media import png_header
from wanfit import cli, errors, service
from wanfit.errors import (
    BadRequest,
    DownloadFailed,
    JobsError,
    NoRoom,
    StoreFailed,
    WanfitError,
    WeightsError,
)
from wanfit.media.sheet import SHEET_GAP_PX as GAP
from wanfit.specs import MODELS

WANFIT = (sys.executable, "-c", "from wanfit.cli import main; main()")
SMALL = ("--size", "64x32", "--frames", "5", "--steps", "2", "--seed", "7", "--device", "cpu")
PATIENCE_S = 120  # for one process on a busy machine


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The empty directory that commands run in."""
    path = tmp_path / "here"
    path.mkdir()
    return path


def wanfit(here: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*WANFIT, *arguments],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        **options,
    )


def only_error(ended: subprocess.CompletedProcess[str], exit_code: int) -> str:
    """The one line of a refusal."""
    assert ended.returncode == exit_code, ended
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def nothing_in(directory: Path) -> bool:
    return not list(directory.iterdir())


class TestStart:
    def test_help_answers_in_under_half_a_second(self, here: Path) -> None:
        """The best of a few fresh processes, each of one thread: CPU time is what it takes."""

        def ask() -> None:
            ended = wanfit(here, "--help")
            assert ended.returncode == 0
            assert "generate" in ended.stdout

        times_s = [cpu_time.of_children_s(ask) for _ in range(5)]
        assert min(times_s) < 0.5, times_s

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--help"],
            ["--version"],
            ["generate", "--help"],
            ["convert", "--help"],
            ["pull", "--help"],
            ["pull", "demo"],
            ["models"],
            ["models", "--json"],
            ["generate", "x", "--frames", "6"],
            ["generate", "x", "--image", "none.png"],
            ["generate", "x", "--weights", "none"],
        ],
    )
    def test_what_needs_no_network_imports_no_torch(self, here: Path, arguments: list[str]) -> None:
        script = (
            "import sys\n"
            "from wanfit.cli import run\n"
            "run(sys.argv[1:])\n"
            "sys.exit('torch' in sys.modules)\n"
        )
        command = [sys.executable, "-c", script, *arguments]
        assert subprocess.run(command, cwd=here, check=False, capture_output=True).returncode == 0

    def test_version_and_help_say_what_is_there(self, here: Path) -> None:
        assert wanfit(here, "--version").stdout == f"wanfit {service.version()}\n"
        shown = wanfit(here, "generate", "--help").stdout
        for option in ("--guidance-high", "--negative-prompt", "--contact-sheet", "--weights"):
            assert option in shown

    def test_no_arguments_show_the_help(self, here: Path) -> None:
        alone, asked = wanfit(here), wanfit(here, "--help")
        assert (alone.returncode, alone.stdout) == (0, asked.stdout)

    def test_models_lists_every_model(self, here: Path) -> None:
        table = wanfit(here, "models").stdout
        listed = json.loads(wanfit(here, "models", "--json").stdout)["models"]
        assert [about["model"] for about in listed] == [spec.name for spec in MODELS]
        for spec in MODELS:
            assert spec.name in table
        a14b = next(about for about in listed if about["model"] == "t2v-a14b")
        assert a14b["guidance"] == {"high_noise": 4.0, "low_noise": 3.0}
        assert "832x480" in a14b["sizes"]


class TestGenerate:
    def test_prints_the_path_and_says_the_rest_on_stderr(
        self, here: Path, random_demo_dir: Path
    ) -> None:
        ended = wanfit(
            here, "generate", "a red dragon", *SMALL, "--weights", str(random_demo_dir),
            "--contact-sheet",
        )  # fmt: skip
        assert ended.returncode == 0, ended
        assert ended.stdout == "outputs/demo-a-red-dragon-7.mp4\n"
        with av.open(str(here / ended.stdout.strip())) as container:
            assert container.metadata["title"] == "a red dragon"
            assert len(list(container.decode(video=0))) == 5
        with Image.open(here / "outputs/demo-a-red-dragon-7.png") as sheet:
            assert sheet.size == (4 * (64 + GAP) + GAP, 2 * (32 + GAP) + GAP)
        lines = ended.stderr.splitlines()
        assert any(line.startswith("note: ") and "dragon" in line for line in lines)
        assert "denoise: 2 steps" in lines
        assert lines[-1].startswith("5 frames of 64x32 px at 16 fps, seed 7, ")

    def test_json_is_the_report_and_nothing_else(self, here: Path, random_demo_dir: Path) -> None:
        Image.new("RGB", (64, 32), "teal").save(here / "start.png")
        ended = wanfit(
            here, "generate", "a red circle", *SMALL, "--weights", str(random_demo_dir), "--json",
            "--image", "start.png", "--guidance", "2", "--guidance-low", "1.5", "--shift", "4",
            "--solver", "euler", "--negative-prompt", "blue", "--precision", "bf16",
            "--output", "new/clip.npy",
        )  # fmt: skip
        assert ended.returncode == 0, ended
        report = json.loads(ended.stdout)
        assert np.load(here / "new/clip.npy").shape == (5, 32, 64, 3)
        assert report["output"] == "new/clip.npy"
        assert report["precision"] == "bf16"
        assert [stage["stage"] for stage in report["stages"]] == [
            "text", "image", "denoise", "decode",
        ]  # fmt: skip
        assert report["settings"] == {
            "model": "demo", "prompt": "a red circle", "negative_prompt": "blue",
            "width": 64, "height": 32, "num_frames": 5, "fps": 16, "num_inference_steps": 2,
            "shift": 4.0, "guidance_high": 2.0, "guidance_low": 1.5, "solver": "euler", "seed": 7,
        }  # fmt: skip

    def test_a_terminal_shows_a_bar(self, here: Path, random_demo_dir: Path) -> None:
        leader, follower = pty.openpty()
        with subprocess.Popen(
            [*WANFIT, "generate", "a red dragon", *SMALL, "--weights", str(random_demo_dir)],
            cwd=here,
            stdout=subprocess.PIPE,
            stderr=follower,
            env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"},
        ) as process:
            os.close(follower)
            shown = b"".join(read_terminal(leader)).decode()
        os.close(leader)
        assert process.returncode == 0
        for text in ("denoise", "decode", "2/2", "left", "note: ", "5 frames of 64x32 px"):
            assert text in shown, shown
        assert "denoise: 2 steps" not in shown, "lines are for where there is no terminal"


def read_terminal(leader: int) -> Iterator[bytes]:
    """What is written to the terminal, until its last writer closes it."""
    while True:
        try:
            yield os.read(leader, 65536)
        except OSError:  # EIO: Linux says so that nobody holds the other end
            return


def png(here: Path, name: str = "image.png") -> None:
    Image.new("RGB", (64, 64), "teal").save(here.parent / name)


def bomb(here: Path) -> None:
    (here.parent / "bomb.png").write_bytes(png_header(100_000, 100_000))


def text_file(here: Path) -> None:
    (here.parent / "notes.txt").write_text("not an image")


BAD_INPUT: dict[str, tuple[list[str], str]] = {
    "frames not 4n+1": (["--frames", "18"], "17 and 21"),
    "size off the grid": (["--size", "100x128"], "96 and 128"),
    "size that is none": (["--size", "big"], "WIDTHxHEIGHT"),
    "no image for i2v": (["--model", "i2v-a14b"], "needs an image"),
    "image for t2v": (["--model", "t2v-a14b", "--image", "../image.png"], "takes no image"),
    "image missing": (["--image", "none.png"], "does not exist"),
    "image is text": (["--image", "../notes.txt"], "cannot be read"),
    "image is a bomb": (["--image", "../bomb.png"], "limit of 64000000"),
    "unknown model": (["--model", "ti2v-5"], "Did you mean 'ti2v-5b'"),
    "unknown solver": (["--solver", "magic"], "unipc, dpm++, euler"),
    "no steps": (["--steps", "0"], "greater than or equal to 1"),
    "guidance out of range": (["--guidance", "1e9"], "less than or equal to 100"),
    "shift that is none": (["--shift", "nan"], "finite number"),
    "unknown precision": (["--precision", "fp4"], "auto, fp32, bf16"),
    "unknown device": (["--device", "tpu"], "auto, cpu, cuda"),
    "unknown suffix": (["--output", "clip.avi"], ".mp4, .gif or .npy"),
    "unwritable directory": (["--output", "/proc/clip.mp4"], "Cannot write"),
    "parent is a file": (["--output", "../notes.txt/clip.mp4"], "Cannot write"),
    "not a number": (["--frames", "many"], "--frames"),
    "unknown option": (["--sharpness", "3"], "--sharpness"),
}


class TestBadInput:
    @pytest.mark.parametrize("case", BAD_INPUT)
    def test_is_refused_with_one_line_and_exit_code_2(self, here: Path, case: str) -> None:
        for prepare in (png, bomb, text_file):
            prepare(here)
        options, expected = BAD_INPUT[case]
        ended = wanfit(here, "generate", "a red circle", *options)
        assert expected in only_error(ended, 2)
        assert ended.stdout == ""
        assert nothing_in(here)

    @pytest.mark.parametrize("arguments", [["generate"], ["paint"], ["generate", "a", "b"]])
    def test_a_command_that_is_none(self, here: Path, arguments: list[str]) -> None:
        only_error(wanfit(here, *arguments), 2)

    @pytest.mark.parametrize(
        ("arguments", "exit_code", "code"),
        [
            (["--frames", "18"], 2, "bad_frame_count"),
            (["--frames", "many"], 2, "bad_option"),
            (["--weights", "none"], 4, "weights_missing"),
        ],
    )
    def test_json_has_the_error_too(
        self, here: Path, arguments: list[str], exit_code: int, code: str
    ) -> None:
        ended = wanfit(here, "generate", "a red circle", "--json", *arguments)
        line = only_error(ended, exit_code)
        error = json.loads(ended.stdout)["error"]
        assert set(error) == {"code", "message", "hint"}
        assert error["code"] == code
        assert error["message"] in line


def without_vae(directory: Path) -> None:
    shutil.rmtree(directory / "vae")


def truncated_vae(directory: Path) -> None:
    (file,) = (directory / "vae").glob("*.safetensors")
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


class TestBadWeights:
    @pytest.mark.parametrize(
        ("harm", "code"), [(without_vae, "weights_missing"), (truncated_vae, "weights_broken")]
    )
    def test_damaged_files_are_refused_with_exit_code_4(
        self, here: Path, random_demo_dir: Path, harm: Callable[[Path], None], code: str
    ) -> None:
        weights = here.parent / "weights"
        shutil.copytree(random_demo_dir, weights)
        harm(weights)
        ended = wanfit(here, "generate", "a red circle", "--weights", str(weights), "--json")
        only_error(ended, 4)
        assert json.loads(ended.stdout)["error"]["code"] == code
        assert nothing_in(here)

    def test_a_model_whose_weights_are_not_here(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for variable in ("HF_HOME", "XDG_DATA_HOME"):
            monkeypatch.setenv(variable, str(here))
        for variable in ("WANFIT_MODELS", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            monkeypatch.delenv(variable, raising=False)
        line = only_error(wanfit(here, "generate", "a cat", "--model", "t2v-a14b"), 4)
        assert "The weights of t2v-a14b are not here" in line
        assert "wanfit pull t2v-a14b" in line
        assert "--weights PATH" in line
        assert nothing_in(here)


def wait_until(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """Waits until `ready`, and fails when the process ends before."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


class TestInterruption:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_while_denoising_exits_5_and_leaves_nothing(
        self, here: Path, random_demo_dir: Path, number: signal.Signals
    ) -> None:
        """The second signal, as of an impatient finger, changes nothing."""
        command = [*WANFIT, "generate", "a red circle", "--weights", str(random_demo_dir)]
        with self.start(here, [*command, *SMALL, "--steps", "300", "--json"]) as process:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            assert any(line.startswith("denoise: step") for line in lines)
            process.send_signal(number)
            time.sleep(0.02)
            process.send_signal(number)
            stdout, stderr = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 5
        assert stderr.splitlines()[-1].startswith("error: Interrupted")
        assert "Traceback" not in stderr
        assert json.loads(stdout)["error"]["code"] == "interrupted"
        assert nothing_in(here)

    def test_while_writing_exits_5_and_leaves_nothing(
        self, here: Path, random_demo_dir: Path
    ) -> None:
        """The hidden file and the directory made for it are seen first, and are gone after."""
        command = [*WANFIT, "generate", "a red circle", "--weights", str(random_demo_dir)]
        small = [*SMALL, "--frames", "801", "--size", "32x32", "--steps", "1", "--guidance", "1"]
        with self.start(here, [*command, *small, "--output", "new/clip.mp4"]) as process:
            wait_until(process, lambda: bool(list(here.glob("new/.clip.mp4.*.part"))))
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 5, stderr
        assert nothing_in(here)

    def start(self, here: Path, command: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )


class TestTrouble:
    def test_a_full_disk_is_one_line_and_leaves_nothing(
        self, here: Path, random_demo_dir: Path
    ) -> None:
        """The limit on a file's size stands for a full disk: the kernel refuses the same write."""

        def limit_file_bytes() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

        ended = wanfit(
            here, "generate", "a red circle", *SMALL, "--weights", str(random_demo_dir),
            "--output", "clip.npy",
            preexec_fn=limit_file_bytes,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        assert ended.returncode == 2
        assert ended.stderr.splitlines()[-1].startswith("error: Cannot write 'clip.npy': ")
        assert "Traceback" not in ended.stderr
        assert nothing_in(here)

    def test_a_reader_that_leaves_early_gets_no_traceback(self, here: Path) -> None:
        with subprocess.Popen(
            [*WANFIT, "models"], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.close()
            assert process.stderr is not None
            assert b"Traceback" not in process.stderr.read()

    def test_our_own_fault_is_one_line_that_says_how_to_see_more(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """No fault is known that could be run here, so one is put in."""

        def fail(*arguments: object, **options: object) -> None:
            raise ZeroDivisionError("two\nlines")

        monkeypatch.chdir(here)
        monkeypatch.setattr(service, "generate", fail)
        monkeypatch.delenv(cli.TRACEBACK_VARIABLE, raising=False)
        assert cli.run(["generate", "x", "--json"]) == 1
        shown = capsys.readouterr()
        (line,) = shown.err.splitlines()
        assert line.startswith("error: ZeroDivisionError: two lines. ")
        assert "WANFIT_TRACEBACK=1" in line
        assert json.loads(shown.out)["error"]["code"] == "internal_error"

        monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
        with pytest.raises(ZeroDivisionError):
            cli.run(["generate", "x"])


def leaves(base: type[WanfitError]) -> list[type[WanfitError]]:
    """The classes that have no subclasses."""
    below = base.__subclasses__()
    return [leaf for child in below for leaf in leaves(child)] if below else [base]


class TestExitCodes:
    def test_every_leaf_of_the_error_tree_is_mapped(self) -> None:
        assert errors.BadSize in leaves(WanfitError)
        for leaf in leaves(WanfitError):
            codes = {BadRequest: 2, NoRoom: 3, WeightsError: 4, DownloadFailed: 6}
            codes |= {StoreFailed: 7, JobsError: 1}
            (branch,) = set(codes) & set(leaf.__mro__)
            code = codes[branch]
            assert cli.exit_code(leaf("message")) == code
