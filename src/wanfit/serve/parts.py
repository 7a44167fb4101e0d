"""What a server and a worker are both made of, from the same settings."""

from __future__ import annotations

from pathlib import Path

from wanfit.errors import BadSetting
from wanfit.fetch import Guard, parse_allowed
from wanfit.jobs.wire import Engine
from wanfit.outputs import OutputStore, Retention, open_store
from wanfit.settings import Settings


def make_private(directory: Path) -> None:
    """Prompts, clips and hashes of keys are for nobody else on this machine. Raises BadSetting."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise BadSetting(f"{str(directory)!r} cannot be made: {error.strerror}") from error


def open_outputs(settings: Settings) -> OutputStore:
    """Where clips are kept. Raises BadSetting, StoreRefused."""
    return open_store(
        settings.outputs_place,
        spool=settings.data / "spool",
        retention=Retention(
            max_age_s=settings.keep_s,
            max_bytes=settings.keep_bytes,
            min_free_bytes=settings.min_free_bytes,
        ),
        s3_endpoint=settings.s3_endpoint,
    )


def engine_of(settings: Settings) -> Engine:
    """How the GPU process makes clips."""
    return Engine(settings.device, settings.precision, settings.vram_bytes, settings.ram_bytes)


def guard_of(settings: Settings) -> Guard:
    """What may be asked of other machines."""
    return Guard(parse_allowed(",".join(settings.allowed_targets)))
