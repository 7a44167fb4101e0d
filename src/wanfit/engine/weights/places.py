"""Where weights are looked for on a machine, and which files there may hold some.

The places, in order: `WANFIT_MODELS`, RunPod's network volume and workspace, the Hugging Face
cache, wanfit's own directory. A place is walked once, nearest directories first, within bounds: a
volume may be slow and hold a million files that are not ours. Only names are read here, no file.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wanfit.engine.weights.recognise import STORE_FILE

MODELS_VARIABLE = "WANFIT_MODELS"  # directories, separated as in PATH
# RunPod mounts a network volume here for serverless workers, and at /workspace for pods. Its
# cached models lie in huggingface-cache/hub below the volume, in the layout of the Hub's cache.
VOLUMES = (Path("/runpod-volume/models"), Path("/runpod-volume"), Path("/workspace/models"))

# Ours. Deepest: /runpod-volume/huggingface-cache/hub/models--X--Y/snapshots/REV/text_encoder.
MAX_DEPTH = 8
MAX_ENTRIES = 50_000  # of one place; a local disk lists as many in well under a second
MAX_ENTRIES_OF_ONE = 4_096  # of one directory: more is a data set, not a model

WEIGHT_SUFFIXES = frozenset({".safetensors", ".sft", ".gguf", ".pth", ".pt"})
INDEX_SUFFIX = ".safetensors.index.json"
TOKENIZER_FILES = frozenset({"tokenizer.json", "spiece.model"})
# Directories that may be huge and never hold a model of ours. Hidden ones are passed over too.
_NEVER = frozenset({"__pycache__", "node_modules", "site-packages", "dist-packages", "blobs"})


@dataclass(frozen=True, slots=True)
class Place:
    """One directory of the search path."""

    path: Path
    source: str  # what put it on the path, for people


@dataclass(slots=True)
class Walked:
    """What a walk through one place came upon."""

    place: Place
    stores: list[Path] = field(default_factory=list)  # directories with a wanfit.json
    indexes: list[Path] = field(default_factory=list)  # of shards
    weights: list[Path] = field(default_factory=list)  # files that may hold weights
    tokenizers: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # one line for each thing that was not read
    exists: bool = True


def search_path(environment: Mapping[str, str] = os.environ) -> tuple[Place, ...]:
    """Where to look, in order. No place is listed twice; whether it exists is seen by the walk."""
    places = [
        *_named(environment),
        *(Place(path, "RunPod") for path in VOLUMES),
        Place(hub_cache(environment), "Hugging Face cache"),
        Place(own_directory(environment), "wanfit's own"),
    ]
    once: dict[Path, Place] = {}
    for place in places:
        once.setdefault(place.path.absolute(), place)
    return tuple(once.values())


def hub_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub keeps repositories (its constants.py: HF_HUB_CACHE, HF_HOME)."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(name):
            return _expanded(environment[name])
    home = environment.get("HF_HOME")
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return (_expanded(home) if home else _expanded(cache) / "huggingface") / "hub"


def own_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where pulled models go on a machine without a volume (XDG base directory specification)."""
    base = environment.get("XDG_DATA_HOME") or "~/.local/share"
    return _expanded(base) / "wanfit" / "models"


def pull_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where a pulled model goes when nobody says; a directory that is searched.

    The first of `WANFIT_MODELS`, `models` on RunPod's volume or workspace, wanfit's own directory.
    """
    for place in _named(environment):
        return place.path
    for volume in VOLUMES:
        if volume.name == "models" and _is_place(volume.parent):
            return volume
    return own_directory(environment)


def walk(place: Place, seen: set[tuple[int, int]]) -> Walked:
    """Every name below `place` that matters. `seen`: (device, inode) of directories walked before.

    Links are followed, but no directory is entered twice. What cannot be read, or is more than
    the bounds, becomes a note. Raises nothing.
    """
    found = Walked(place)
    if not _is_place(place.path):
        found.exists = False
        return found
    queue = deque([(place.path, 0)])
    num_entries = 0
    while queue:
        folder, depth = queue.popleft()
        if not _enter(folder, seen):
            continue
        entries = _entries(folder, found)
        num_entries += len(entries)
        if num_entries > MAX_ENTRIES:
            found.notes.append(f"{place.path}: stopped after {MAX_ENTRIES} entries")
            break
        if STORE_FILE in entries:
            found.stores.append(folder)
            continue
        below = _sort_out(folder, entries, found)
        if depth < MAX_DEPTH:
            queue.extend((path, depth + 1) for path in below)
        elif below:
            found.notes.append(f"{folder}: deeper directories were left out")
    return found


def _named(environment: Mapping[str, str]) -> Iterator[Place]:
    for text in environment.get(MODELS_VARIABLE, "").split(os.pathsep):
        if text:
            yield Place(_expanded(text), MODELS_VARIABLE)


def _expanded(text: str | Path) -> Path:
    return Path(os.path.expanduser(text))


def _is_place(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # not ours to look at
        return False


def _enter(folder: Path, seen: set[tuple[int, int]]) -> bool:
    try:
        stat = folder.stat()
    except OSError:
        return False
    new = (stat.st_dev, stat.st_ino) not in seen
    seen.add((stat.st_dev, stat.st_ino))
    return new


def _entries(folder: Path, found: Walked) -> dict[str, bool]:
    """Name -> whether it is a directory, links followed."""
    entries: dict[str, bool] = {}
    try:
        with os.scandir(folder) as listed:
            for entry in listed:
                if len(entries) == MAX_ENTRIES_OF_ONE:
                    found.notes.append(f"{folder}: stopped after {MAX_ENTRIES_OF_ONE} entries")
                    break
                entries[entry.name] = _is_directory(entry)
    except OSError as error:
        found.notes.append(f"{folder}: {error.strerror}")
    return dict(sorted(entries.items()))


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _sort_out(folder: Path, entries: Mapping[str, bool], found: Walked) -> list[Path]:
    """Files into `found`; returns the directories to enter, the newest snapshot first."""
    below = []
    for name, is_directory in entries.items():
        path = folder / name
        if name.startswith("."):
            continue
        if is_directory:
            if name not in _NEVER:
                below.append(path)
        elif name.endswith(INDEX_SUFFIX):
            found.indexes.append(path)
        elif path.suffix.lower() in WEIGHT_SUFFIXES:
            found.weights.append(path)
        elif name in TOKENIZER_FILES:
            found.tokenizers.append(path)
    return list(_newest_first(below)) if folder.name == "snapshots" else below


def _newest_first(folders: list[Path]) -> Iterator[Path]:
    def changed_s(folder: Path) -> float:
        try:
            return folder.stat().st_mtime
        except OSError:
            return 0.0

    return iter(sorted(folders, key=changed_s, reverse=True))
