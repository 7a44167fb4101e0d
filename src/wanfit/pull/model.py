"""`wanfit pull`: a model from the hub, made into a store.

    list the repository -> headers of all its weight files -> every check that can be made -> free
    disk -> download -> convert -> remove what was downloaded

A lean pull does the last three shard by shard. Killed at any time, the same call continues: whole
files lie in the hub's cache, an unfinished one continues at its length, and the store in the making
has its journal. Nothing has its final name before it is whole and its checksum is right.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from wanfit.engine.weights.partial import (
    allocated_bytes,
    check_target,
    partial_folder,
    write_errors,
)
from wanfit.engine.weights.recognise import STORE_PRECISIONS, is_store
from wanfit.errors import BadOption, DiskFull, WanfitError, WeightsError
from wanfit.plan.plan import Precision
from wanfit.pull.cache import HubCache
from wanfit.pull.disk import Need, has_room, lacking
from wanfit.pull.hub import RemoteFile, Repository
from wanfit.pull.layout import WEIGHT_SUFFIXES, needed_files, repository_of
from wanfit.pull.survey import lay_out, put_in_place
from wanfit.pull.transfer import OnBytes, list_files
from wanfit.specs import ModelSpec

if TYPE_CHECKING:
    from wanfit.engine.weights.files import ModelFiles

STEP_EVERY_S = 0.1  # ours: a bar needs no more

Phase = Literal["download", "convert", "pull", "check"]


@dataclass(frozen=True, slots=True)
class PullStep:
    """How far a pull is. Each phase counts its own bytes, those of earlier runs included.

    First "download", bytes of the repository, then "convert", bytes of the store. Lean: "pull",
    bytes of both together, then "check", bytes of the store.
    """

    phase: Phase
    what: str  # a file of the repository, or a network or file of the store
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class PullReport:
    """What was brought and written."""

    output: Path
    model: str
    precision: Precision
    repository: str
    commit: str  # empty where the store was there already
    original_bytes: int  # of the repository's files that the model needs
    downloaded_bytes: int  # by this run
    store_bytes: int
    originals: Path | None  # where the repository's files are kept; None: what we brought is gone
    already_there: bool  # the store; nothing was brought
    total_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; every measured key ends in its unit."""
        return {
            "output": str(self.output),
            "model": self.model,
            "precision": self.precision,
            "repository": self.repository,
            "commit": self.commit,
            "original_bytes": self.original_bytes,
            "downloaded_bytes": self.downloaded_bytes,
            "store_bytes": self.store_bytes,
            "originals": str(self.originals) if self.originals else None,
            "already_there": self.already_there,
            "total_s": round(self.total_s, 3),
        }


OnStep = Callable[[PullStep], None]


def pull_model(
    spec: ModelSpec,
    target: Path,
    precision: Precision = "bf16",
    *,
    repository: str | None = None,
    revision: str | None = None,
    lean: bool = False,
    keep_original: bool = False,
    on_step: OnStep | None = None,
) -> PullReport:
    """Brings `spec` from the hub and writes its store at `target`.

    target: a new path, or a store, which is replaced when the new one is whole; a whole store of
    this model and precision stays, and nothing is done.
    repository: OWNER/NAME in the official or in diffusers' layout; None: its authors'. revision: a
    branch, tag or commit; None: main.
    lean: one shard of the original lies on the disk at a time, and no more than that.
    keep_original: what was downloaded stays in the hub's cache. What was there before stays anyway.
    on_step: called now and then, from any thread but never from two at once; what it raises stops
    the pull, to be continued later.

    Environment: HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE (the cache has to hold
    the files then), HF_HUB_DOWNLOAD_TIMEOUT (seconds without a byte that count as a failure).

    Raises DownloadFailed, WeightsError for a repository that does not hold the model, BadRequest
    for options and places, DiskFull before the first byte of a weight, or when a disk fills later.
    """
    began_s = time.perf_counter()
    assert precision in STORE_PRECISIONS, precision
    if lean and keep_original:
        raise BadOption("--lean keeps no file of the original, and --keep-original all of them")
    target = target.resolve()
    remote = Repository(repository or repository_of(spec), revision)
    cache = HubCache(remote, target.with_name(f".{target.name}.pull.json"))
    job = _Job(spec, target, precision, remote, cache, lean, on_step)
    there = _is_there(target, spec, precision)
    files = {} if there else _make_store(job)
    kept = cache.snapshot if keep_original and files else None
    with write_errors(cache.folder):
        if keep_original:
            cache.keep_all()
        else:
            cache.remove_all()
    return PullReport(
        output=target,
        model=spec.name,
        precision=precision,
        repository=remote.name,
        commit=remote.commit,
        original_bytes=sum(file.num_bytes for file in files.values()),
        downloaded_bytes=cache.downloaded_bytes,
        store_bytes=sum(file.stat().st_size for file in target.rglob("*") if file.is_file()),
        originals=kept,
        already_there=there,
        total_s=time.perf_counter() - began_s,
    )


Files = Mapping[str, RemoteFile]  # all that are needed, by name


@dataclass(frozen=True, slots=True)
class _Job:
    """What is to be made of what."""

    spec: ModelSpec
    target: Path
    precision: Precision
    remote: Repository
    cache: HubCache
    lean: bool
    on_step: OnStep | None


def _is_there(target: Path, spec: ModelSpec, precision: Precision) -> bool:
    """Whether a whole store of the model in this precision is at `target`."""
    if not is_store(target):
        return False
    from wanfit.engine.weights.store import open_store

    try:
        return open_store(target, spec).precision == precision
    except WeightsError:
        return False  # to be replaced


@contextmanager
def _tidy_if_useless(cache: HubCache) -> Iterator[None]:
    """After an error the weights that came are kept for the next run; small files alone are not."""
    try:
        yield
    except WanfitError:
        if not any(name.endswith(WEIGHT_SUFFIXES) for name in cache.brought):
            with suppress(OSError):  # what is wrong is said already
                cache.remove_all()
        raise


def _make_store(job: _Job) -> Files:
    """Everything between the list of files and the store."""
    remote, cache = job.remote, job.cache
    check_target(cache.folder, job.target)
    listing = cache.list_files() if remote.offline else list_files(remote)
    with _tidy_if_useless(cache), tempfile.TemporaryDirectory(prefix="wanfit-") as scratch:
        tree = Path(scratch, *remote.name.split("/"))
        with write_errors(job.target):
            cache.open_record()
        with write_errors(cache.folder):
            names = needed_files(job.spec, remote.name, listing, cache.bring)
            files = {name: listing[name] for name in names}
            with _named(tree, remote):
                lay_out(remote, cache, files, tree)
        with _named(tree, remote):
            source = _opened(tree, job.spec)
            check_disk(job, files, source)
            if job.lean:
                _convert_lean(job, files, source)
            else:
                _convert_whole(job, files, source)
    return files


def _weights(files: Files) -> list[RemoteFile]:
    """Those of the files that are large."""
    return [file for name, file in files.items() if name.endswith(WEIGHT_SUFFIXES)]


def _opened(tree: Path, spec: ModelSpec) -> ModelFiles:
    from wanfit.engine.weights.checkpoint import choose, open_parts

    return open_parts(choose(tree, spec))


@contextmanager
def _named(tree: Path, remote: Repository) -> Iterator[None]:
    """Errors name files as the repository has them, not as they lie in `tree`."""
    try:
        yield
    except WeightsError as error:
        message, hint = (
            text.replace(str(tree), remote.name) for text in (error.message, error.hint)
        )
        raise type(error)(message, hint=hint) from None


def check_disk(job: _Job, files: Files, source: ModelFiles) -> None:
    """Raises DiskFull unless what is still to be written has room, on one disk or on two."""
    from wanfit.engine.weights.lean import store_bytes

    missing = [job.cache.missing_bytes(file) for file in _weights(files)]
    largest_bytes = max(missing, default=0)
    here = Need(job.cache.root, "download", largest_bytes if job.lean else sum(missing))
    there = Need(
        job.target.parent,
        "store",
        store_bytes(source, job.precision) - allocated_bytes(partial_folder(job.target) / "store"),
    )
    hint = "Make room, or choose a larger disk for --output and for HF_HOME"
    if not job.lean and has_room(replace(here, num_bytes=largest_bytes), there):
        hint = (
            f"--lean needs {(largest_bytes + there.num_bytes) / 1e9:.2f} GB, with one shard of the"
            " original on the disk at a time"
        )
    elif job.precision == "bf16":
        hint += ", or use --precision fp8"
    problem = lacking(here, there)
    if problem:
        raise DiskFull(problem, hint=hint)


def _convert_whole(job: _Job, files: Files, source: ModelFiles) -> None:
    """Brings all files, then converts them."""
    from wanfit.engine.weights.convert import ConvertStep, convert_model

    steps = _Steps(job, files, "download")
    for file in _weights(files):
        _bring(job, source.path, file, steps)

    def on_step(step: ConvertStep) -> None:
        if job.on_step:
            job.on_step(PullStep("convert", step.network, step.done_bytes, step.total_bytes))

    convert_model(source, job.target, job.precision, on_step)


def _convert_lean(job: _Job, files: Files, source: ModelFiles) -> None:
    """Brings, converts and removes one file after the other."""
    from wanfit.engine.weights.lean import LeanStep, convert_lean, store_bytes

    store = store_bytes(source, job.precision)
    # Which contents these are, whatever the revision is called.
    origin = json.dumps({name: file.etag for name, file in files.items()}, sort_keys=True)
    steps = _Steps(job, files, "pull", store)

    @contextmanager
    def bring(path: Path) -> Iterator[None]:
        file = files[path.relative_to(source.path).as_posix()]
        _bring(job, source.path, file, steps)
        yield
        with write_errors(job.cache.folder):
            job.cache.remove(file)

    def on_step(step: LeanStep) -> None:
        if step.phase == "write":
            steps.wrote(files[step.what], step.done_bytes, last=step.done_bytes == store)
        elif job.on_step:
            job.on_step(PullStep("check", step.what, step.done_bytes, step.total_bytes))

    convert_lean(source, job.target, job.precision, origin=origin, bring=bring, on_step=on_step)


def _bring(job: _Job, tree: Path, file: RemoteFile, steps: _Steps) -> None:
    """Downloads a file unless it is here, and puts it into the tree."""
    with write_errors(job.cache.folder):
        whole = job.cache.bring(file, steps.counting(file))
    steps.has(file)
    put_in_place(tree / file.name, whole)


class _Steps:
    """Counts the bytes that came, and those of the store that a lean pull wrote, for `on_step`."""

    def __init__(self, job: _Job, files: Files, phase: Phase, store_bytes: int = 0) -> None:
        self._phase = phase
        self._on_step = job.on_step
        self._here = {
            name: file.num_bytes - job.cache.missing_bytes(file) for name, file in files.items()
        }
        self._written_bytes = 0
        self._total_bytes = sum(file.num_bytes for file in files.values()) + store_bytes
        self._lock = threading.Lock()
        self._said_s = 0.0

    def counting(self, file: RemoteFile) -> OnBytes:
        """What to tell of every run of bytes of `file`."""

        def on_bytes(num_bytes: int) -> None:
            with self._lock:
                self._here[file.name] += num_bytes
                self._say(file.name)

        return on_bytes

    def has(self, file: RemoteFile) -> None:
        """The file is whole."""
        with self._lock:
            self._here[file.name] = file.num_bytes
            self._say(file.name, at_once=True)

    def wrote(self, file: RemoteFile, done_bytes: int, *, last: bool) -> None:
        """So much of the store is written, and `file` was here for it."""
        with self._lock:
            self._here[file.name] = file.num_bytes
            self._written_bytes = done_bytes
            self._say(file.name, at_once=last)

    def _say(self, what: str, *, at_once: bool = False) -> None:
        now_s = time.monotonic()
        if self._on_step and (at_once or now_s - self._said_s >= STEP_EVERY_S):
            self._said_s = now_s
            done_bytes = sum(self._here.values()) + self._written_bytes
            self._on_step(PullStep(self._phase, what, done_bytes, self._total_bytes))
