"""Which files of a repository a model needs: of the official layout, or of diffusers'.

An index.json says which shards there are; so a README's pictures, the same weights in other formats
and whatever else a repository holds stay where they are.

Sources: Wan-Video/Wan2.2 at 42bf4cf (wan/configs) for the official names; diffusers 0.42 for its.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from wanfit.engine.weights.configs import components_of
from wanfit.engine.weights.headers import read_weight_map
from wanfit.engine.weights.recognise import MODEL_INDEX
from wanfit.errors import BadOption, NotOnHub
from wanfit.pull.hub import RemoteFile
from wanfit.specs import I2V_A14B, T2V_A14B, TI2V_5B, ModelSpec

REPOSITORIES: Mapping[str, str] = {
    T2V_A14B.name: "Wan-AI/Wan2.2-T2V-A14B",
    I2V_A14B.name: "Wan-AI/Wan2.2-I2V-A14B",
    TI2V_5B.name: "Wan-AI/Wan2.2-TI2V-5B",
}
WEIGHT_SUFFIXES = (".safetensors", ".pth")
_INDEX_SUFFIX = ".safetensors.index.json"
_UMT5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
_TOKENIZER_FOLDER = "google/umt5-xxl/"
_EXPERT_FOLDERS = ("high_noise_model/", "low_noise_model/")

Listing = Mapping[str, RemoteFile]
Bring = Callable[[RemoteFile], Path]  # a small file of the repository, as a file on this disk


def repository_of(spec: ModelSpec) -> str:
    """Its authors' repository. Raises BadOption for a model that is in none."""
    if spec.name not in REPOSITORIES:
        raise BadOption(
            f"{spec.name} is in no repository that wanfit knows",
            hint=f"Known: {', '.join(REPOSITORIES)}; or name a repository (--repo OWNER/NAME)",
        )
    return REPOSITORIES[spec.name]


def needed_files(spec: ModelSpec, repository: str, listing: Listing, bring: Bring) -> list[str]:
    """The names of the files that `spec` needs, small ones first.

    `bring` is called for index files. Raises NotOnHub for a repository that lacks one of them,
    WeightsBroken for a malformed index.
    """
    find = _Finder(repository, listing, bring)
    if MODEL_INDEX in listing:
        names = [MODEL_INDEX, *find.all_below("tokenizer/")]
        names += [name for name in listing if name.startswith("scheduler/")]  # for other programs
        for component in components_of(spec):
            names += find.weights_in(f"{component}/")
    else:
        folders = ("",) if len(spec.experts) == 1 else _EXPERT_FOLDERS
        names = [*find.all_below(_TOKENIZER_FOLDER)]
        names += [find.one(_UMT5_FILE), find.one(f"Wan{spec.vae.generation}_VAE.pth")]
        for folder in folders:
            names += find.weights_in(folder)
    return sorted(names, key=lambda name: name.endswith(WEIGHT_SUFFIXES))


class _Finder:
    """Looks for files in a listing."""

    def __init__(self, repository: str, listing: Listing, bring: Bring) -> None:
        self._repository = repository
        self._listing = listing
        self._bring = bring

    def one(self, name: str) -> str:
        if name not in self._listing:
            raise self._missing(name)
        return name

    def all_below(self, folder: str) -> list[str]:
        found = [name for name in self._listing if name.startswith(folder)]
        if not found:
            raise self._missing(folder)
        return found

    def weights_in(self, folder: str) -> list[str]:
        """config.json, and one safetensors file or an index with its shards, directly in it."""
        here = [name for name in self._listing if name.rpartition("/")[0] == folder.rstrip("/")]
        config = [name for name in here if name == f"{folder}config.json"]
        indexes = [name for name in here if name.endswith(_INDEX_SUFFIX)]
        single = [name for name in here if name.endswith(".safetensors")]
        if len(indexes) == 1:
            shards = set(read_weight_map(self._bring(self._listing[indexes[0]])).values())
            return [*config, *indexes, *(self.one(f"{folder}{shard}") for shard in sorted(shards))]
        if not indexes and len(single) == 1:
            return [*config, *single]
        if not indexes and not single:
            raise self._missing(f"{folder}*.safetensors")
        raise NotOnHub(
            f"{self._repository} has {len(indexes)} index files and {len(single)} safetensors"
            f" files in {folder or 'its root'}, and nothing says which are meant",
            hint="Choose another --repo or --revision",
        )

    def _missing(self, name: str) -> NotOnHub:
        return NotOnHub(
            f"{self._repository} has no {name}, so it has neither the official layout nor"
            " diffusers'",
            hint="Choose another --repo, or fetch the files by hand and run wanfit convert",
        )
