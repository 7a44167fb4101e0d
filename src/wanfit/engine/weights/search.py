"""Which models are on this machine, in which format, and what is missing of them.

Headers alone are read, one small read for each weight file, and nothing imports torch. The answer
for a model is a list, best first: complete stores, complete directories, and where there is
neither one mix of parts from anywhere. A file that cannot be read is listed with the reason, and
never ends the search.

Parts of a mix are put together only where that is sure: the two experts of a model look alike by
their headers, so two are taken for a pair when there is only one of each, or when their paths
differ in "high" and "low" alone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from wanfit.engine.weights.checkpoint import TOKENIZER_PLACES, Chosen, choose
from wanfit.engine.weights.headers import read_json, read_weight_map
from wanfit.engine.weights.package import packaged_directories
from wanfit.engine.weights.parts import Part, read_parts
from wanfit.engine.weights.places import Place, Walked, search_path, walk
from wanfit.engine.weights.recognise import MODEL_INDEX, STORE_FILE, STORE_PRECISIONS
from wanfit.engine.weights.shelf import network_title
from wanfit.errors import WanfitError, WeightsBroken, WeightsMismatch
from wanfit.plan.plan import NetworkName, Precision
from wanfit.specs import MODELS, Expert, ModelSpec

# Folders within the directory of one model. official: wan/configs; diffusers: save_pretrained;
# ComfyUI: folder_paths.py; QuantStack's GGUF repositories: HighNoise, LowNoise, VAE.
_INNER = frozenset({
    "transformer", "transformer_2", "vae", "text_encoder", "tokenizer",
    "high_noise_model", "low_noise_model",
    "diffusion_models", "unet", "text_encoders", "clip", "loras",
    "highnoise", "lownoise",
})  # fmt: skip
_EXPERT_WORD = re.compile(r"high|low", re.IGNORECASE)

_KEYWORDS: Mapping[NetworkName, str] = {
    "high_noise": "high", "low_noise": "low", "umt5": "text_encoder", "vae": "vae",
}  # fmt: skip

Kind = Literal["store", "directory", "mix"]


@dataclass(frozen=True)
class Found:
    """A model that is here, in whole or in part."""

    spec: ModelSpec
    kind: Kind
    path: Path  # a store, the directory of all parts, or that of a mix's first part
    format: str  # for people: "store", "diffusers", "official", "GGUF + single files"
    storage: str  # for people: "fp8", "bf16", "Q4_K + Q6_K"
    num_bytes: int  # on disk
    missing: tuple[str, ...]  # what it lacks, for people; empty: complete
    precision: Precision | None = None  # of a store
    parts: Mapping[NetworkName, Part] | None = None  # None: a store
    tokenizer: Path | Part | None = None
    was_choice: bool = False  # whether `path` has other files for one of the networks too

    @property
    def is_complete(self) -> bool:
        return not self.missing

    @cached_property
    def runs_as_it_is(self) -> bool:
        """Whether the engine takes it without `wanfit convert`: nothing is quantised."""
        return not any(is_quantised(part) for part in (self.parts or {}).values())

    def named_files(self) -> dict[str, Path]:
        """What has to be said beside `path`, as `choose` has it; nothing if `path` says it all."""
        if self.parts is None or not (self.kind == "mix" or self.was_choice):
            return {}
        files = {_KEYWORDS[network]: part.path for network, part in self.parts.items()}
        return files | ({"tokenizer": self.tokenizer} if isinstance(self.tokenizer, Path) else {})

    def choose(self) -> Chosen:
        """For `open_parts`, of what is no store. Raises WeightsError, as `checkpoint.choose`."""
        assert self.parts is not None, self.path
        return choose(self.path, self.spec, **self.named_files())


@dataclass(frozen=True, slots=True)
class Unread:
    """A file that may hold weights and was not understood."""

    path: Path
    reason: str  # one line


@dataclass(frozen=True, slots=True)
class Findings:
    """What a search came upon."""

    places: tuple[Walked, ...]
    found: tuple[Found, ...]  # by model in the order of the models, best first
    adapters: tuple[Part, ...]
    broken: tuple[Unread, ...]
    others: tuple[Unread, ...]  # whole files of other models

    def of(self, spec: ModelSpec) -> tuple[Found, ...]:
        """What is here of `spec`, best first."""
        return tuple(found for found in self.found if found.spec == spec)

    def best(self, spec: ModelSpec, precision: Precision | Literal["auto"]) -> Found | None:
        """What a clip in `precision` is best made from; incomplete or quantised if need be.

        fp8 is read from stores in fp8 alone. Of what is left the first comes first: a store in
        bf16 before one in fp8, which is for those who ask for it or have nothing else.
        """
        here = self.of(spec)
        if precision != "auto":
            here = tuple(f for f in here if (f.precision == "fp8") == (precision == "fp8")) or here
        ready = [found for found in here if found.is_complete and found.runs_as_it_is]
        whole = [found for found in here if found.is_complete]
        return next(iter((*ready, *whole, *here)), None)


def search(places: Sequence[Place] | None = None, models: Sequence[ModelSpec] = MODELS) -> Findings:
    """Looks through `places` (None: `search_path` and the package) for `models`. Raises nothing."""
    if places is None:
        shipped = (Place(path, "package") for path in packaged_directories())
        places = (*shipped, *search_path())
    seen: set[tuple[int, int]] = set()
    walked = tuple(walk(place, seen) for place in places)
    reader = _Reader(models)
    stores = [reader.store(path) for one in walked for path in one.stores]
    parts = [part for one in walked for part in reader.parts(one)]
    tokenizers = [file for one in walked for file in one.tokenizers]
    networks = _once(part for part in parts if part.family != "lora")
    found: list[Found] = []
    for spec in models:
        whole = [store for store in stores if store is not None and store.spec == spec]
        whole.sort(key=_store_rank)
        directories = list(_directories(spec, networks, tokenizers))
        if not any(one.is_complete for one in (*whole, *directories)):
            directories = list(_mix(spec, networks, tokenizers))
        found += sorted([*whole, *directories], key=_found_rank)
    return Findings(
        places=walked,
        found=tuple(found),
        adapters=_once(part for part in parts if part.family == "lora"),
        broken=tuple(reader.broken),
        others=tuple(reader.others),
    )


def is_quantised(part: Part) -> bool:
    """Whether a matrix of it has to be decoded. A vector in an odd dtype is a fault, not this."""
    matrices = (entry for entry in part.weights.values() if len(entry.shape) > 1)
    return not all(entry.is_plain for entry in matrices)


class _Reader:
    """Reads headers, and keeps what went wrong."""

    def __init__(self, models: Sequence[ModelSpec]) -> None:
        self.broken: list[Unread] = []
        self.others: list[Unread] = []
        self._models = models

    def store(self, path: Path) -> Found | None:
        try:
            return _read_store(path, self._models)
        except WeightsMismatch as error:
            self.others.append(Unread(path, str(error)))
        except WanfitError as error:
            self.broken.append(Unread(path, str(error)))
        return None

    def parts(self, walked: Walked) -> Iterator[Part]:
        """What the indexes and the single files of one place hold."""
        shards: set[Path] = set()
        for index in walked.indexes:
            try:
                names = read_weight_map(index).values()
            except WanfitError as error:
                self.broken.append(Unread(index, str(error)))
                continue
            shards |= {index.parent / name for name in names}
            yield from self._part(index)
        for file in walked.weights:
            if file not in shards:
                yield from self._part(file)

    def _part(self, path: Path) -> Iterator[Part]:
        try:
            yield from read_parts(path, self._models)
        except WeightsMismatch as error:
            self.others.append(Unread(path, str(error)))
        except WanfitError as error:
            self.broken.append(Unread(path, str(error)))


def _read_store(path: Path, models: Sequence[ModelSpec]) -> Found:
    """A store by its wanfit.json and the lengths of its files."""
    about = read_json(path / STORE_FILE)
    spec = next((spec for spec in models if spec.name == about.get("model")), None)
    if spec is None:
        raise WeightsMismatch(f"{path} is a store of {about.get('model')}")
    files = about.get("files")
    known = [name for name in STORE_PRECISIONS if name == about.get("precision")]
    if not known or not isinstance(files, dict) or not files:
        raise WeightsBroken(f"{path / STORE_FILE} lacks its precision or its list of files")
    missing: list[str] = []
    num_bytes = 0
    for name, fields in files.items():
        wanted = fields.get("bytes") if isinstance(fields, dict) else None
        file = path / Path(str(name)).name
        if not file.is_file():
            missing.append(file.name)
            continue
        file_bytes = file.stat().st_size
        num_bytes += file_bytes
        if file_bytes != wanted:
            missing.append(f"{file.name} ({file_bytes} bytes instead of {wanted})")
    if not (path / "tokenizer" / "tokenizer.json").is_file():
        missing.append("tokenizer")
    return Found(spec, "store", path, "store", known[0], num_bytes, tuple(missing), known[0])


def _store_rank(store: Found) -> int:
    assert store.precision is not None
    return STORE_PRECISIONS.index(store.precision)


def _found_rank(found: Found) -> tuple[bool, bool, bool]:
    """Complete first, then stores, then what runs as it is."""
    return bool(found.missing), found.kind != "store", not found.runs_as_it_is


def _once(parts: Iterable[Part]) -> tuple[Part, ...]:
    """The parts without those that are listed already, under another name of their file."""
    by_file: dict[tuple[Path, str], Part] = {}
    for part in parts:
        by_file.setdefault((part.path.resolve(), part.family), part)
    return tuple(by_file.values())


def _directories(
    spec: ModelSpec, parts: Sequence[Part], tokenizers: Sequence[Path]
) -> Iterator[Found]:
    """Every directory that holds the whole of `spec`, the innermost ones."""
    by_home: dict[Path, list[Part]] = {}
    for part in parts:
        if spec in part.models:
            for home in _homes(part.path):
                by_home.setdefault(home, []).append(part)
    whole: list[Path] = []
    for home in sorted(by_home, key=lambda path: -len(path.parts)):
        if any(home in inner.parents for inner in whole):
            continue
        found = _assembled(spec, "directory", home, by_home[home], tokenizers)
        if found.is_complete:
            whole.append(home)
            yield found


def _homes(path: Path) -> Iterator[Path]:
    """The directories that this file may be a part of a model in: its own, and those above a
    folder that has the name of a part.
    """
    yield path.parent
    for folder in path.parents:
        if folder.name.lower() in _INNER:
            yield folder.parent


def _mix(spec: ModelSpec, parts: Sequence[Part], tokenizers: Sequence[Path]) -> Iterator[Found]:
    """The best that all parts together give, if that is anything."""
    ours = [part for part in parts if spec in part.models]
    if ours:
        yield _assembled(spec, "mix", None, ours, tokenizers)


def _assembled(
    spec: ModelSpec,
    kind: Kind,
    home: Path | None,
    parts: Sequence[Part],
    tokenizers: Sequence[Path],
) -> Found:
    """A model of these parts: the best of each, and what is missing."""
    dits = [part for part in parts if part.family == "dit"]
    picked: dict[NetworkName, Part] = {}
    missing: list[str] = []
    for network in ("umt5", "vae"):
        of_it = sorted((part for part in parts if part.family == network), key=_rank)
        if of_it:
            picked[network] = of_it[0]
    experts, doubt = _experts(spec, dits)
    picked.update(experts.items())
    names: tuple[NetworkName, ...] = (*spec.experts, "umt5", "vae")
    missing += [network_title(spec, name) for name in names if name not in picked]
    missing += doubt
    text_encoders = [part for part in parts if part.family == "umt5"]
    tokenizer = _tokenizer(picked.get("umt5"), text_encoders, tokenizers)
    if tokenizer is None:
        missing.append("tokenizer")
    first = next(picked[name] for name in names if name in picked) if picked else parts[0]
    ordered = {name: picked[name] for name in names if name in picked}
    return Found(
        spec=spec,
        kind=kind,
        path=home or first.path.parent,
        format=_format(home, ordered.values()),
        storage=" + ".join(dict.fromkeys(ordered[n].storage for n in spec.experts if n in ordered))
        or first.storage,
        num_bytes=sum({part.path: part.num_bytes for part in ordered.values()}.values()),
        missing=tuple(missing),
        parts=ordered,
        tokenizer=tokenizer,
        was_choice=len(parts) > len(ordered),
    )


def _experts(spec: ModelSpec, dits: Sequence[Part]) -> tuple[dict[Expert, Part], list[str]]:
    """The transformers, and what is not sure about them, for people."""
    if spec.boundary is None:
        return ({spec.experts[0]: min(dits, key=_rank)} if dits else {}), []
    by_expert = {
        expert: sorted((part for part in dits if part.expert == expert), key=_rank)
        for expert in spec.experts
    }
    high, low = by_expert["high_noise"], by_expert["low_noise"]
    untold = [part.path.name for part in dits if part.expert is None]
    doubt = [f"which expert {name} is (--high, --low)" for name in untold[:1]]
    if len(high) == len(low) == 1:
        return {"high_noise": high[0], "low_noise": low[0]}, []
    for part in high:
        twin = next((other for other in low if _same_but_expert(part, other)), None)
        if twin is not None:
            return {"high_noise": part, "low_noise": twin}, []
    if high and low:
        return {}, [
            f"which of {len(high)} high-noise and {len(low)} low-noise files belong together"
        ]
    one = {expert: ranked[0] for expert, ranked in by_expert.items() if ranked}
    return one, doubt


def _same_but_expert(high: Part, low: Part) -> bool:
    """Whether two paths differ only in which expert they name."""
    plain = [_EXPERT_WORD.sub("", str(part.path)) for part in (high, low)]
    diffusers = [str(part.path).replace("transformer_2", "transformer") for part in (high, low)]
    return plain[0] == plain[1] or diffusers[0] == diffusers[1]


def _rank(part: Part) -> tuple[bool, int, str]:
    """Plain before quantised, then the larger: it has lost less."""
    return is_quantised(part), -part.num_bytes, str(part.path)


def _tokenizer(
    umt5: Part | None, text_encoders: Sequence[Part], tokenizers: Sequence[Path]
) -> Path | Part | None:
    """In the text encoder's own file, or beside one that `umt5` could stand for."""
    if umt5 is None or umt5.has_vocabulary:
        return umt5
    for part in (umt5, *text_encoders):
        wanted = [home / name for home in _homes(part.path) for name in TOKENIZER_PLACES]
        for folder in wanted:
            for file in tokenizers:
                if file.parent == folder:
                    return file
    return None


def _format(home: Path | None, parts: Iterable[Part]) -> str:
    if home is not None and (home / MODEL_INDEX).is_file():
        return "diffusers"
    labels = {_label(part) for part in parts}
    return " + ".join(sorted(labels, key=("GGUF", "official", "diffusers", "single files").index))


def _label(part: Part) -> str:
    if part.container.kind == "gguf":
        return "GGUF"
    several = len(part.container.files) > 1 or part.path.suffix == ".json"
    if part.naming == "official" and (several or part.container.kind == "pth"):
        return "official"
    return "diffusers" if part.naming == "diffusers" and several else "single files"


def command_for(found: Found, wanted: Precision | Literal["auto"] = "auto") -> str:
    """The `wanfit convert` that makes a store of it, for clips in `wanted`."""
    return convert_command(found.path, found.spec, found.storage, found.named_files(), wanted)


def convert_command(
    path: Path,
    spec: ModelSpec,
    storage: str,
    named_files: Mapping[str, Path],
    wanted: Precision | Literal["auto"] = "auto",
) -> str:
    """`wanfit convert` for what is at `path`; what is stored in fp8 stays in fp8.

    storage: of the transformers. named_files: as the keywords of `choose`.
    """
    words = ["wanfit", "convert", str(path), "--model", spec.name]
    for keyword, file in named_files.items():
        words += [f"--{keyword.replace('_', '-')}", str(file)]
    precision = "fp8" if wanted == "fp8" or storage.startswith("fp8") else "bf16"
    target = f"{spec.name}-{precision}"
    return shlex.join([*words, "--output", target, "--precision", precision])
