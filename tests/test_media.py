"""Files are read back with the real decoders; interruptions and full disks are real ones."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from av.video.reformatter import ColorRange, Colorspace
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wanfit.errors import BadImage, BadOutput
from wanfit.media import (
    MAX_IMAGE_BYTES,
    UPLOAD_LIMITS,
    ContactSheet,
    VideoWriter,
    check_output,
    check_sheet,
    image_kind,
    read_image,
    read_upload,
)
from wanfit.media.sheet import SHEET_GAP_PX as GAP

Frames = npt.NDArray[np.uint8]
METADATA = {"prompt": 'a "red" circle → 圆', "model": "demo", "seed": 2**62, "shift": 3.0}
ENDINGS = ("clip.mp4", "clip.gif", "clip.npy", "frames")


def moving_disc(num_frames: int = 9, height: int = 64, width: int = 96) -> Frames:
    """A soft disc that moves over a gradient: smooth, as decoded clips are. [F, H, W, 3]"""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    clip = np.empty((num_frames, height, width, 3))
    for k in range(num_frames):
        distance = np.hypot(rows - height / 2, columns - width * (k + 1) / (num_frames + 1))
        disc = 1 / (1 + np.exp((distance - height / 5) / 2))
        ground = np.stack([rows / height * 80, columns / width * 120, 60 + rows * 0], axis=-1)
        clip[k] = ground + disc[..., None] * (np.array([230, 200, 90]) - ground)
    return clip.round().astype(np.uint8)


def write(path: Path | str, clip: Frames, *, fps: int = 16, chunk: int = 4) -> None:
    """As the service does: first frame alone, then four by four."""
    with VideoWriter(check_output(path), fps=fps, metadata=METADATA) as writer:
        writer.write(clip[:1])
        for start in range(1, len(clip), chunk):
            writer.write(clip[start : start + chunk])


def write_then_raise(path: Path, error: type[BaseException]) -> None:
    with VideoWriter(check_output(path), fps=16, metadata=METADATA) as writer:
        writer.write(moving_disc())
        raise error


def read_mp4(path: Path) -> Frames:
    with av.open(str(path)) as container:
        frames = [
            frame.reformat(
                format="rgb24",
                src_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
            ).to_ndarray()
            for frame in container.decode(video=0)
        ]
    return np.stack(frames)


def read_gif(path: Path) -> tuple[Frames, list[int]]:
    """Frames and the duration of each, in ms."""
    frames, durations_ms = [], []
    with Image.open(path) as gif:
        for k in range(getattr(gif, "n_frames", 1)):
            gif.seek(k)
            frames.append(np.asarray(gif.convert("RGB")))
            durations_ms.append(gif.info["duration"])
    return np.stack(frames), durations_ms


def psnr_db(ours: Frames, truth: Frames) -> float:
    assert ours.shape == truth.shape, (ours.shape, truth.shape)
    error = float(np.mean((ours.astype(np.float64) - truth) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class TestMp4:
    def test_frames_come_back_near_and_in_order(self, tmp_path: Path) -> None:
        clip = moving_disc()
        write(tmp_path / "clip.mp4", clip)
        assert psnr_db(read_mp4(tmp_path / "clip.mp4"), clip) > 40
        assert names_in(tmp_path) == ["clip.mp4"]

    def test_flat_colours_come_back_within_two_levels(self, tmp_path: Path) -> None:
        """The matrix and the range that are written are those that the tags say."""
        for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)):
            clip = np.full((3, 32, 32, 3), colour, dtype=np.uint8)
            write(tmp_path / "flat.mp4", clip)
            back = read_mp4(tmp_path / "flat.mp4").astype(int)
            assert np.abs(back - clip).max() <= 2, colour

    def test_the_stream_is_what_browsers_play(self, tmp_path: Path) -> None:
        write(tmp_path / "clip.mp4", moving_disc(), fps=24)
        with av.open(str(tmp_path / "clip.mp4")) as container:
            stream = container.streams.video[0]
            codec = stream.codec_context
            assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
            assert (codec.width, codec.height) == (96, 64)
            assert stream.average_rate == 24
            assert stream.frames == 9
            bt709, limited = 1, 1  # ITU-T H.273
            assert (codec.color_primaries, codec.color_trc, codec.colorspace) == (bt709,) * 3
            assert codec.color_range == limited

    def test_the_index_comes_before_the_data(self, tmp_path: Path) -> None:
        """Faststart: a browser starts before the whole file is there."""
        write(tmp_path / "clip.mp4", moving_disc())
        atoms = []
        data = (tmp_path / "clip.mp4").read_bytes()
        at = 0
        while at < len(data):
            size, kind = struct.unpack(">I4s", data[at : at + 8])
            atoms.append(kind.decode())
            at += size
        assert atoms.index("moov") < atoms.index("mdat")

    def test_prompt_and_settings_are_in_the_file(self, tmp_path: Path) -> None:
        write(tmp_path / "clip.mp4", moving_disc())
        with av.open(str(tmp_path / "clip.mp4")) as container:
            assert container.metadata["title"] == METADATA["prompt"]
            assert json.loads(container.metadata["comment"]) == METADATA

    def test_one_frame_is_a_clip(self, tmp_path: Path) -> None:
        clip = moving_disc(1)
        write(tmp_path / "clip.mp4", clip)
        assert len(read_mp4(tmp_path / "clip.mp4")) == 1

    @pytest.mark.parametrize("name", ["http:x.mp4", "50%d 'x'.mp4", "圆.MP4", "x" * 251 + ".mp4"])
    def test_odd_names_are_only_names(self, tmp_path: Path, name: str) -> None:
        write(tmp_path / name, moving_disc(1))
        assert names_in(tmp_path) == [name]

    def test_frames_go_to_a_hidden_file_as_they_come(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (30, 128, 128, 3), dtype=np.uint8)
        with VideoWriter(check_output(tmp_path / "clip.mp4"), fps=16, metadata={}) as writer:
            assert names_in(tmp_path) == []
            for _ in range(4):  # more than the encoder looks ahead, and than the muxer buffers
                writer.write(noise)
            (part,) = tmp_path.iterdir()
            assert part.name.startswith(".clip.mp4.")
            assert part.stat().st_size > 100_000
        assert names_in(tmp_path) == ["clip.mp4"]


class TestGif:
    def test_frames_come_back_near(self, tmp_path: Path) -> None:
        clip = moving_disc()
        write(tmp_path / "clip.gif", clip)
        frames, _ = read_gif(tmp_path / "clip.gif")
        assert psnr_db(frames, clip) > 34

    def test_few_colours_are_exact(self, tmp_path: Path) -> None:
        clip = moving_disc() // 64 * 64
        assert len(np.unique(clip.reshape(-1, 3), axis=0)) <= 256
        write(tmp_path / "clip.gif", clip)
        np.testing.assert_array_equal(read_gif(tmp_path / "clip.gif")[0], clip)

    @pytest.mark.parametrize(("fps", "total_ms"), [(16, 1060), (24, 710), (25, 680)])
    def test_lasts_as_long_as_the_clip(self, tmp_path: Path, fps: int, total_ms: int) -> None:
        """17 frames, in the hundredths of a second that a gif counts."""
        write(tmp_path / "clip.gif", moving_disc(17), fps=fps)
        frames, durations_ms = read_gif(tmp_path / "clip.gif")
        assert len(frames) == 17
        assert sum(durations_ms) == total_ms
        assert max(durations_ms) - min(durations_ms) <= 10

    def test_settings_are_in_the_comment_and_it_loops(self, tmp_path: Path) -> None:
        write(tmp_path / "clip.gif", moving_disc())
        with Image.open(tmp_path / "clip.gif") as gif:
            assert json.loads(gif.info["comment"]) == METADATA
            assert gif.info["loop"] == 0


class TestLossless:
    @pytest.mark.parametrize("num_frames", [1, 9, 121])
    def test_npy_is_exact(self, tmp_path: Path, num_frames: int) -> None:
        clip = np.random.default_rng(0).integers(0, 256, (num_frames, 6, 10, 3), dtype=np.uint8)
        write(tmp_path / "clip.npy", clip)
        back = np.load(tmp_path / "clip.npy", allow_pickle=False)
        assert back.dtype == np.uint8
        np.testing.assert_array_equal(back, clip)

    @pytest.mark.parametrize("ending", ["frames", "frames/", "frames.v2/"])
    def test_png_frames_are_exact_and_carry_the_settings(self, tmp_path: Path, ending: str) -> None:
        clip = moving_disc()
        write(f"{tmp_path}/{ending}", clip)
        (directory,) = tmp_path.iterdir()
        assert names_in(directory) == [f"frame_{k:05d}.png" for k in range(9)]
        for k, path in enumerate(sorted(directory.iterdir())):
            with Image.open(path) as image:
                np.testing.assert_array_equal(np.asarray(image), clip[k])
                assert json.loads(image.info["Comment"]) == METADATA

    def test_frames_replace_the_frames_of_a_longer_clip(self, tmp_path: Path) -> None:
        write(tmp_path / "frames", moving_disc(9))
        write(tmp_path / "frames", moving_disc(5))
        assert names_in(tmp_path) == ["frames"]
        assert len(names_in(tmp_path / "frames")) == 5


class TestAtomicity:
    @pytest.mark.parametrize("ending", ENDINGS)
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
    def test_an_exception_leaves_nothing(
        self, tmp_path: Path, ending: str, error: type[BaseException]
    ) -> None:
        target = tmp_path / "new" / "deep" / ending
        with pytest.raises(error):
            write_then_raise(target, error)
        assert names_in(tmp_path) == []

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_an_exception_leaves_the_old_clip(self, tmp_path: Path, ending: str) -> None:
        write(tmp_path / ending, moving_disc(5))
        before = snapshot(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            write_then_raise(tmp_path / ending, KeyboardInterrupt)
        assert snapshot(tmp_path) == before

    @pytest.mark.parametrize("ending", ["clip.mp4", "clip.gif", "clip.npy"])
    def test_a_file_that_exists_is_replaced(self, tmp_path: Path, ending: str) -> None:
        (tmp_path / ending).write_text("old")
        write(tmp_path / ending, moving_disc())
        assert names_in(tmp_path) == [ending]
        assert (tmp_path / ending).stat().st_size > 1000

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_a_kill_in_the_middle_shows_nothing_under_the_final_name(
        self, tmp_path: Path, ending: str
    ) -> None:
        script = (
            "import os, signal, sys, numpy as np\n"
            "from wanfit.media import VideoWriter, check_output\n"
            "with VideoWriter(check_output(sys.argv[1]), fps=16, metadata={}) as writer:\n"
            "    writer.write(np.zeros((5, 32, 32, 3), np.uint8))\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / ending)], check=False)
        assert ended.returncode == -signal.SIGKILL
        assert all(name.startswith(".") for name in names_in(tmp_path))

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_a_full_disk_is_one_error_and_leaves_nothing(self, tmp_path: Path, ending: str) -> None:
        """The limit on a file's size stands for a full disk: the kernel refuses the same write."""
        script = (
            "import sys, numpy as np\n"
            "from wanfit.errors import BadOutput\n"
            "from wanfit.media import VideoWriter, check_output\n"
            "noise = np.random.default_rng(0).integers(0, 256, (40, 96, 96, 3), dtype=np.uint8)\n"
            "try:\n"
            "    with VideoWriter(check_output(sys.argv[1]), fps=16, metadata={}) as writer:\n"
            "        writer.write(noise)\n"
            "except BadOutput as error:\n"
            "    sys.exit(f'refused: {error}')\n"
        )

        def limit_file_bytes() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

        ended = subprocess.run(
            [sys.executable, "-B", "-c", script, str(tmp_path / ending)],
            check=False,
            capture_output=True,
            text=True,
            preexec_fn=limit_file_bytes,
        )
        assert ended.stderr.startswith("refused: Cannot write"), ended.stderr
        assert "File too large" in ended.stderr
        assert names_in(tmp_path) == []


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


class TestCheckOutput:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [("a.mp4", "mp4"), ("a.GIF", "gif"), ("a.npy", "npy"), ("a", "png"), ("a.b/", "png")],
    )
    def test_the_suffix_chooses_the_format(self, tmp_path: Path, name: str, kind: str) -> None:
        assert check_output(f"{tmp_path}/{name}").format == kind

    def test_parents_need_not_exist_and_are_not_made_yet(self, tmp_path: Path) -> None:
        check_output(tmp_path / "not" / "yet" / "clip.mp4")
        assert names_in(tmp_path) == []

    def test_relative_paths_are_written_from_here(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write("clip.npy", moving_disc(1))
        assert names_in(tmp_path) == ["clip.npy"]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("clip.avi", "suffix '.avi'"),
            ("a_directory.mp4", "is a directory"),
            ("a_file", "is not a directory"),
            ("a_file/clip.mp4", "Not a directory"),
            ("full", "other things"),
            ("..", "names no new directory"),
            ("x" * 300 + ".mp4", "File name too long"),
            ("nul\0.mp4", "is not a path"),
            ("stray\udcff.mp4", "UTF-8"),
        ],
    )
    def test_what_cannot_be_written_is_refused(
        self, tmp_path: Path, name: str, message: str
    ) -> None:
        (tmp_path / "a_directory.mp4").mkdir()
        (tmp_path / "a_file").write_text("x")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.txt").write_text("x")
        with pytest.raises(BadOutput, match=message):
            check_output(f"{tmp_path}/{name}")

    @pytest.mark.parametrize("directory", ["/proc", "/proc/new"])
    def test_a_directory_that_takes_no_files_is_refused(self, directory: str) -> None:
        """Permission bits say nothing to root; only trying does."""
        with pytest.raises(BadOutput, match="Cannot write"):
            check_output(f"{directory}/clip.mp4")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_read_only_directory_is_refused(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o555)
        with pytest.raises(BadOutput, match="Permission denied"):
            check_output(tmp_path / "clip.mp4")

    def test_a_mount_point_is_refused_for_frames(self) -> None:
        with pytest.raises(BadOutput, match="mount point"):
            check_output("/proc/")

    def test_a_sheet_is_a_png(self, tmp_path: Path) -> None:
        assert check_sheet(tmp_path / "sheet.png") == tmp_path / "sheet.png"
        with pytest.raises(BadOutput, match=r"does not end in \.png"):
            check_sheet(tmp_path / "sheet.jpg")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that states a size and has next to no data: what a decompression bomb looks like."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


PHOTO = Image.fromarray(moving_disc(1)[0])
KINDS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


class TestReadImage:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_format_reads_from_path_and_bytes(self, tmp_path: Path, kind: str) -> None:
        data = encoded(PHOTO, kind)
        (tmp_path / "image").write_bytes(data)
        for source in (data, tmp_path / "image", str(tmp_path / "image")):
            image = read_image(source)
            assert (image.mode, image.size) == ("RGB", (96, 64))
            assert psnr_db(np.asarray(image), np.asarray(PHOTO)) > 28

    def test_exif_turns_the_picture_upright(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees to the right
        image = read_image(encoded(PHOTO, "PNG", exif=exif))
        assert image.size == (64, 96)
        upright = PHOTO.transpose(Image.Transpose.ROTATE_270)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(upright))

    def test_alpha_is_dropped_as_official(self) -> None:
        clear = PHOTO.copy()
        clear.putalpha(0)
        for source in (encoded(clear, "PNG"), clear):
            np.testing.assert_array_equal(np.asarray(read_image(source)), np.asarray(PHOTO))

    def test_sixteen_bit_grey_keeps_its_levels(self) -> None:
        grey = Image.fromarray(np.array([[0, 30_000, 65_535]], dtype=np.uint16))
        image = read_image(encoded(grey, "PNG"))
        assert [image.getpixel((x, 0)) for x in range(3)] == [(v, v, v) for v in (0, 117, 255)]

    def test_the_first_picture_of_an_animation_is_read(self) -> None:
        second = Image.new("RGB", PHOTO.size, "red")
        data = encoded(PHOTO.quantize(256), "GIF", save_all=True, append_images=[second])
        assert psnr_db(np.asarray(read_image(data)), np.asarray(PHOTO)) > 30

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
    def test_a_truncated_file_is_refused(self, kind: str, part: float) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        data = encoded(Image.fromarray(noise), kind)
        with pytest.raises(BadImage, match="cannot be read as a picture"):
            read_image(data[: int(part * len(data))])

    @pytest.mark.parametrize(
        "data", [b"", b"hello", b"<svg/>", b"%PDF-1.7", b"\0" * 100, png_header(0, 5)]
    )
    def test_what_is_no_picture_is_refused(self, data: bytes) -> None:
        with pytest.raises(BadImage, match="cannot be read"):
            read_image(data)

    @pytest.mark.parametrize("side", [8001, 10_000, 100_000])
    def test_an_enormous_picture_is_refused_by_its_header(self, side: int) -> None:
        """Three ranges: only ours, Pillow's warning, Pillow's error."""
        with pytest.raises(BadImage, match=r"pixels.* limit of 64000000"):
            read_image(png_header(side, side))

    def test_a_picture_at_the_limit_passes_the_check(self) -> None:
        """8000 x 8000 is allowed, so what is refused here is the missing data."""
        with pytest.raises(BadImage, match="cannot be read"):
            read_image(png_header(8000, 8000))

    def test_an_enormous_file_is_refused_unread(self, tmp_path: Path) -> None:
        with (tmp_path / "huge.png").open("wb") as file:
            file.truncate(MAX_IMAGE_BYTES + 1)  # sparse
        with pytest.raises(BadImage, match=f"{MAX_IMAGE_BYTES + 1} bytes"):
            read_image(tmp_path / "huge.png")
        with pytest.raises(BadImage, match=f"{MAX_IMAGE_BYTES + 1} bytes"):
            read_image(bytes(MAX_IMAGE_BYTES + 1))

    def test_what_is_not_a_file_is_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path, message in (
            (tmp_path / "none.png", "does not exist"),
            (tmp_path, "is a directory"),
            (tmp_path / "pipe", "not a regular file"),
            (Path("/dev/zero"), "not a regular file"),
            (Path("nul\0.png"), "cannot be opened"),
            (Path("x" * 300), "cannot be opened"),
        ):
            with pytest.raises(BadImage, match=message) as raised:
                read_image(path)
            assert "\n" not in str(raised.value)

    def test_a_line_break_in_a_name_stays_out_of_the_message(self, tmp_path: Path) -> None:
        with pytest.raises(BadImage) as raised:
            read_image(tmp_path / "two\nlines.png")
        assert "\n" not in str(raised.value)

    def test_a_png_cannot_unpack_its_notes_without_end(self) -> None:
        """A compressed text chunk of 20 kB that would become 20 MB: Pillow stops at 1 MB."""
        text = b"note\0\0" + zlib.compress(b"\0" * 20_000_000)
        whole = encoded(PHOTO, "PNG")
        chunk = struct.pack(">I", len(text)) + b"zTXt" + text
        chunk += struct.pack(">I", zlib.crc32(b"zTXt" + text))
        tracemalloc.start()
        with suppress(BadImage):
            read_upload(whole[:33] + chunk + whole[33:])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8_000_000

    @settings(max_examples=200, deadline=None)
    @given(st.sampled_from(KINDS), st.data())
    def test_damaged_bytes_give_a_picture_or_bad_image(
        self, kind: str, data: st.DataObject
    ) -> None:
        small = bytearray(encoded(PHOTO.resize((12, 8)), kind))
        for _ in range(data.draw(st.integers(1, 6))):
            small[data.draw(st.integers(0, len(small) - 1))] = data.draw(st.integers(0, 255))
        with suppress(BadImage):
            assert read_image(bytes(small)).mode == "RGB"


class TestReadUpload:
    """What strangers send has narrower limits than a file of one's own."""

    @pytest.mark.parametrize("kind", UPLOAD_LIMITS.formats)
    def test_what_browsers_send_is_read_and_known_by_its_first_bytes(self, kind: str) -> None:
        data = encoded(PHOTO, kind)
        assert image_kind(data[:12]) == kind
        assert read_upload(data).size == PHOTO.size

    @pytest.mark.parametrize("kind", sorted({*KINDS} - {*UPLOAD_LIMITS.formats}))
    def test_other_decoders_never_see_the_bytes(self, kind: str) -> None:
        data = encoded(PHOTO, kind)
        assert image_kind(data[:12]) is None
        with pytest.raises(BadImage, match="PNG, JPEG, WEBP"):
            read_upload(data)

    def test_too_many_pixels_or_bytes_are_refused_undecoded(self) -> None:
        with pytest.raises(BadImage, match=r"7000x7000 pixels, over the limit of 40000000"):
            read_upload(png_header(7000, 7000))
        with pytest.raises(BadImage, match="over the limit of 20971520"):
            read_upload(bytes(UPLOAD_LIMITS.max_bytes + 1))

    @pytest.mark.parametrize("kind", UPLOAD_LIMITS.formats)
    def test_truncated_ones_are_refused(self, kind: str) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        data = encoded(Image.fromarray(noise), kind)
        with pytest.raises(BadImage, match="cannot be read"):
            read_upload(data[: len(data) * 3 // 4])

    def test_upright_and_the_first_of_an_animation(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        assert read_upload(encoded(PHOTO, "JPEG", exif=exif)).size == PHOTO.size[::-1]
        second = Image.new("RGB", PHOTO.size, "red")
        moving = encoded(PHOTO, "WEBP", save_all=True, append_images=[second], lossless=True)
        assert psnr_db(np.asarray(read_upload(moving)), np.asarray(PHOTO)) > 30

    def test_threads_that_send_at_once_leave_the_warnings_as_they_were(self) -> None:
        before = list(warnings.filters)
        with ThreadPoolExecutor(8) as pool:
            sizes = set(pool.map(lambda _: read_upload(encoded(PHOTO, "PNG")).size, range(64)))
        assert sizes == {PHOTO.size}
        assert list(warnings.filters) == before


class TestContactSheet:
    def test_shows_first_to_last_in_reading_order(self, tmp_path: Path) -> None:
        clip = np.zeros((17, 10, 20, 3), dtype=np.uint8)
        clip[:] = (np.arange(17) * 15)[:, None, None, None]
        sheet = ContactSheet(17)
        for start in range(0, 17, 4):
            sheet.add(clip[start : start + 4])
        sheet.write(tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as image:
            assert image.size == (4 * (20 + GAP) + GAP, 2 * (10 + GAP) + GAP)
            pixels = np.asarray(image)[..., 0]
        levels = pixels[GAP + 5 :: 10 + GAP, GAP + 10 :: 20 + GAP].ravel() // 15
        assert levels.tolist() == [0, 2, 5, 7, 9, 11, 14, 16]
        assert (pixels[:GAP] == 255).all()
        assert names_in(tmp_path) == ["sheet.png"]

    @pytest.mark.parametrize(("num_frames", "tiles"), [(1, (1, 1)), (5, (4, 2)), (9, (4, 2))])
    def test_short_clips_have_smaller_sheets(
        self, tmp_path: Path, num_frames: int, tiles: tuple[int, int]
    ) -> None:
        sheet = ContactSheet(num_frames)
        sheet.add(moving_disc(num_frames))
        sheet.write(tmp_path / "new" / "sheet.png")
        with Image.open(tmp_path / "new" / "sheet.png") as image:
            assert image.size == (tiles[0] * (96 + GAP) + GAP, tiles[1] * (64 + GAP) + GAP)

    def test_large_frames_are_shrunk(self, tmp_path: Path) -> None:
        sheet = ContactSheet(1)
        sheet.add(np.zeros((1, 704, 1280, 3), dtype=np.uint8))
        sheet.write(tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as image:
            assert image.size == (480 + 2 * GAP, 264 + 2 * GAP)
