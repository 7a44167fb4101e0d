"""What a pull knows before it brings a weight: which files, and all their headers."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch

from tests.checkpoints import meta_weights, write_diffusers, write_official
from tests.engine.tiny_models import TINY_I2V, TINY_T2V, TINY_TI2V
from tests.hub_server import Fault, HubServer, Repo
from wanfit.engine.weights.container import open_container
from wanfit.errors import BadOption, NotOnHub, WeightsBroken
from wanfit.pull.cache import HubCache
from wanfit.pull.hub import Repository
from wanfit.pull.layout import WEIGHT_SUFFIXES, needed_files, repository_of
from wanfit.pull.survey import lay_out, put_in_place
from wanfit.pull.transfer import list_files
from wanfit.specs import DEMO, MODELS, T2V_A14B, TI2V_5B, ModelSpec

NAME = "wan/model"


class Pull:
    """The first steps of a pull of `spec` from `folder`."""

    def __init__(self, hub: HubServer, folder: Path, spec: ModelSpec) -> None:
        hub.repos.setdefault(NAME, Repo(folder))
        self.repository = Repository(NAME)
        self.cache = HubCache(self.repository, folder.parent / ".store.pull.json")
        listing = list_files(self.repository)
        self.names = needed_files(spec, NAME, listing, self.cache.bring)
        self.files = {name: listing[name] for name in self.names}

    def lay_out(self, tree: Path) -> None:
        lay_out(self.repository, self.cache, self.files, tree)


def litter(folder: Path) -> None:
    """What else is in such a repository, and no model needs."""
    for name in ("README.md", "assets/logo.png", "examples/i2v_input.JPG", "nohup.out"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not a weight")
    (folder / "extra").mkdir()
    (folder / "extra" / "other.safetensors").write_bytes(bytes(1000))


@pytest.mark.parametrize("spec", [TINY_T2V, TINY_I2V, TINY_TI2V], ids=lambda spec: spec.name)
def test_of_an_official_repository_the_model_alone_is_needed(
    hub: HubServer, tmp_path: Path, spec: ModelSpec
) -> None:
    write_official(tmp_path / "repo", spec)
    wanted = {
        path.relative_to(tmp_path / "repo").as_posix() for path in files_of(tmp_path / "repo")
    }
    litter(tmp_path / "repo")
    pull = Pull(hub, tmp_path / "repo", spec)
    assert set(pull.names) == wanted
    assert len(pull.names) == len(wanted)
    weights = [name.endswith(WEIGHT_SUFFIXES) for name in pull.names]
    assert weights == sorted(weights), "small files come first"


def test_of_a_diffusers_repository_the_model_alone_is_needed(
    hub: HubServer, tmp_path: Path
) -> None:
    write_diffusers(tmp_path / "repo", TINY_T2V)
    wanted = {
        path.relative_to(tmp_path / "repo").as_posix() for path in files_of(tmp_path / "repo")
    }
    litter(tmp_path / "repo")
    assert set(Pull(hub, tmp_path / "repo", TINY_T2V).names) == wanted


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "name",
    [
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "google/umt5-xxl/tokenizer.json",
        "high_noise_model/diffusion_pytorch_model-00002-of-00002.safetensors",
    ],
)
def test_a_file_that_the_repository_lacks_is_named(
    hub: HubServer, tmp_path: Path, name: str
) -> None:
    write_official(tmp_path / "repo", TINY_T2V)
    (tmp_path / "repo" / name).unlink()
    with pytest.raises(NotOnHub, match=name.replace("tokenizer.json", "")):
        Pull(hub, tmp_path / "repo", TINY_T2V)


def test_two_formats_in_one_folder_are_not_guessed_between(hub: HubServer, tmp_path: Path) -> None:
    write_official(tmp_path / "repo", TINY_TI2V)
    for file in (tmp_path / "repo").glob("*.index.json"):
        shutil.copy(file, file.with_name(f"bf16.{file.name}"))
    with pytest.raises(NotOnHub, match="2 index files"):
        Pull(hub, tmp_path / "repo", TINY_TI2V)


def test_an_index_that_names_a_file_elsewhere_is_refused(hub: HubServer, tmp_path: Path) -> None:
    write_official(tmp_path / "repo", TINY_TI2V)
    index = next((tmp_path / "repo").glob("*.index.json"))
    index.write_text(index.read_text().replace("diffusion_pytorch_model-", "../up-"))
    with pytest.raises(WeightsBroken, match="not a file name"):
        Pull(hub, tmp_path / "repo", TINY_TI2V)


def test_every_model_but_the_demo_has_a_repository() -> None:
    for spec in MODELS:
        if spec == DEMO:
            with pytest.raises(BadOption, match="in no repository"):
                repository_of(spec)
        else:
            assert repository_of(spec).lower() == f"wan-ai/wan2.2-{spec.name}"


@pytest.mark.parametrize("spec", [T2V_A14B, TI2V_5B], ids=lambda spec: spec.name)
def test_headers_of_a_model_of_true_size_come_without_its_bytes(
    hub: HubServer, tmp_path: Path, spec: ModelSpec
) -> None:
    """Of 126 GB (34 for TI2V-5B) a few MB come, and every tensor is known by name and place."""
    repo = tmp_path / "repo"
    write_official(repo, spec, weights=meta_weights(spec), num_shards=6)
    hub.repos[NAME] = Repo(repo)
    for path in files_of(repo):  # adding up the holes would take minutes
        name = path.relative_to(repo).as_posix()
        if name.endswith(WEIGHT_SUFFIXES):
            hub.repos[NAME].hashes[name] = hashlib.sha256(name.encode()).hexdigest()
    pull = Pull(hub, repo, spec)
    pull.lay_out(tmp_path / "tree")
    asked = sum(seen.range_bytes or 0 for seen in hub.seen if seen.where == "content")
    assert asked < 16e6 < 30e9 < sum(file.num_bytes for file in pull.files.values())
    weights = [name for name in pull.names if name.endswith(WEIGHT_SUFFIXES)]
    assert len(weights) == 6 * len(spec.experts) + 2
    for name in weights:
        there, here = (open_container(root / name) for root in (repo, tmp_path / "tree"))
        assert {key: entry.offset for key, entry in here.entries.items()} == {
            key: entry.offset for key, entry in there.entries.items()
        }
        assert here.num_bytes == there.num_bytes
        assert (tmp_path / "tree" / name).stat().st_blocks * 512 < 8e6, "it is a hole"


def test_what_is_laid_out_gives_way_to_the_file_itself(hub: HubServer, tmp_path: Path) -> None:
    write_official(tmp_path / "repo", TINY_TI2V)
    pull = Pull(hub, tmp_path / "repo", TINY_TI2V)
    tree = tmp_path / "tree"
    pull.lay_out(tree)
    name = next(name for name in pull.names if name.endswith(".safetensors"))
    assert (tree / name).stat().st_size == (tmp_path / "repo" / name).stat().st_size
    put_in_place(tree / name, pull.cache.bring(pull.files[name]))
    assert (tree / name).read_bytes() == (tmp_path / "repo" / name).read_bytes()


def test_a_large_header_comes_whole(hub: HubServer, tmp_path: Path) -> None:
    """Longer than what is asked for at first."""
    write_official(tmp_path / "repo", TINY_TI2V)
    file = next((tmp_path / "repo").glob("*-00001-of-*.safetensors"))
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].ljust(300_000)
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    pull = Pull(hub, tmp_path / "repo", TINY_TI2V)
    pull.lay_out(tmp_path / "tree")
    here = tmp_path / "tree" / file.name
    assert here.read_bytes()[: 8 + 300_000] == file.read_bytes()[: 8 + 300_000]


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100, b"PK\x03\x04" + bytes(100)])
def test_what_is_no_weight_file_is_said_before_it_is_downloaded(
    hub: HubServer, tmp_path: Path, content: bytes
) -> None:
    write_official(tmp_path / "repo", TINY_TI2V)
    (tmp_path / "repo" / "Wan2.2_VAE.pth").write_bytes(content)
    pull = Pull(hub, tmp_path / "repo", TINY_TI2V)
    with pytest.raises(WeightsBroken, match=r"Wan2\.2_VAE\.pth of wan/model"):
        pull.lay_out(tmp_path / "tree")


def test_headers_come_through_a_bad_connection(hub: HubServer, tmp_path: Path) -> None:
    write_official(tmp_path / "repo", TINY_TI2V, dtype=torch.bfloat16)
    pull = Pull(hub, tmp_path / "repo", TINY_TI2V)
    for name in pull.names:
        hub.fail(name, Fault("content", cut_after_bytes=100, times=2))
        hub.fail(name, Fault("content", status=503))
    pull.lay_out(tmp_path / "tree")
    for name in pull.names:
        if name.endswith(WEIGHT_SUFFIXES):
            here, there = open_container(tmp_path / "tree" / name), tmp_path / "repo" / name
            assert here.entries.keys() == open_container(there).entries.keys()
