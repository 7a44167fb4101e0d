"""`wanfit models`, `convert` and `pull` as a person meets them: real processes, real files.

Files of the full-size models have their true names, dtypes and shapes, and are holes: what is
refused is refused by headers, so they need no content.
"""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import typer

from tests.checkpoints import (
    T5_PTH,
    Weights,
    meta_weights,
    save_safetensors,
    write_comfy,
    write_gguf,
    write_official,
)
from tests.engine.tiny_models import TINY_T2V
from tests.hub_server import HubServer, Repo, hub_server
from tests.lora_files import random_adapters, write_lora
from tests.test_cli import SMALL, here, nothing_in, only_error, wanfit
from wanfit import cli
from wanfit import generate as wanfit_generate
from wanfit.engine.weights.headers import file_entries
from wanfit.engine.weights.open import open_model
from wanfit.specs import DEMO, I2V_A14B, T2V_A14B

__all__ = ["here"]  # a fixture


@pytest.fixture
def alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of models that is on the search path of the commands; nothing else of ours is."""
    models = here.parent / "models"
    models.mkdir()
    monkeypatch.setenv("WANFIT_MODELS", str(models))
    for variable in ("HF_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(variable, str(here.parent / "nothing"))
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    return models


@pytest.fixture(scope="module")
def hollow() -> dict[str, Weights]:
    """Names and shapes of the full-size models."""
    return {spec.name: meta_weights(spec) for spec in (T2V_A14B, I2V_A14B)}


def listed(here: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    """What `wanfit models --json` says."""
    ended = wanfit(here, "models", "--json", *arguments)
    assert ended.returncode == code, ended
    about: dict[str, Any] = json.loads(ended.stdout)
    return about


def found_of(about: dict[str, Any], model: str, path: Path) -> dict[str, Any]:
    (found,) = [
        found
        for one in about["models"]
        if one["model"] == model
        for found in one["found"]
        if found["path"] == str(path)
    ]
    return dict(found)


class TestModels:
    def test_the_package_has_the_demo(self, here: Path, alone: Path) -> None:
        (demo,) = [one for one in listed(here)["models"] if one["model"] == "demo"]
        found = demo["found"][-1]
        assert demo["weights"] == found["path"]
        assert (found["format"], found["storage"], found["complete"]) == ("diffusers", "bf16", True)
        assert found["fits"]["fits"]

    def test_what_is_here_and_what_is_missing(
        self, here: Path, alone: Path, hollow: dict[str, Weights]
    ) -> None:
        weights = hollow["t2v-a14b"]
        write_official(alone / "official", T2V_A14B, weights=weights)
        write_comfy(alone / "comfy", T2V_A14B, weights=weights, storage="fp8_scaled")
        about = listed(here)
        official = found_of(about, "t2v-a14b", alone / "official")
        assert official["bytes"] / 1e9 == pytest.approx(126.2, abs=0.06)
        assert (official["format"], official["storage"]) == ("official", "fp32")
        assert official["runs_as_it_is"]
        comfy = found_of(about, "t2v-a14b", alone / "comfy")
        assert "fp8 scaled" in comfy["storage"]
        assert not comfy["runs_as_it_is"]
        assert comfy["convert"].startswith("wanfit convert ")
        (i2v,) = [one for one in about["models"] if one["model"] == "i2v-a14b"]
        assert i2v["weights"] is None
        assert i2v["found"][0]["missing"] == ["high-noise expert", "low-noise expert"]

    def test_the_table_reads_at_100_columns(
        self, here: Path, alone: Path, hollow: dict[str, Weights]
    ) -> None:
        write_gguf(alone / "a-rather-long-name-of-a-directory-of-files" / "gguf", T2V_A14B,
                   weights=hollow["t2v-a14b"], qtype="Q6_K", umt5=False)  # fmt: skip
        (alone / "broken.safetensors").write_text("no")
        shown = wanfit(here, "models").stdout
        table, _, below = shown.partition("unreadable: ")
        assert max(map(len, table.splitlines())) <= 100
        for words in ("mix: GGUF", "missing: text", "encoder, tokenizer", "high-noise expert:"):
            assert words in table, table
        assert "wanfit pull t2v-a14b" in table
        assert "broken.safetensors is not a weight file" in below
        assert "looked in: " in below
        assert str(alone) in below

    def test_verify_reads_stores_and_says_what_it_did_with_originals(
        self, here: Path, alone: Path, random_demo_dir: Path
    ) -> None:
        shutil.copytree(random_demo_dir, alone / "original")
        assert (
            wanfit(
                here, "convert", str(random_demo_dir), "--output", str(alone / "store")
            ).returncode
            == 0
        )
        about = listed(here, "--verify")
        store = found_of(about, "demo", alone / "store")
        assert store["verified"] == "verified: every checksum is right"
        original = found_of(about, "demo", alone / "original")
        assert "no checksums" in original["verified"]

        file = alone / "store/vae.safetensors"
        with file.open("r+b") as stream:
            stream.seek(-5000, os.SEEK_END)
            byte = stream.read(1)
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes([byte[0] ^ 1]))
        ended = wanfit(here, "models", "--verify", "--json")
        assert ended.returncode == 4
        assert "is damaged in" in ended.stderr.splitlines()[-1]
        assert wanfit(here, "models").returncode == 0, "lengths alone do not tell"


FORMATS: dict[str, Callable[[Path], object]] = {
    "official": lambda path: write_official(path, DEMO),
    "comfy fp16": lambda path: write_comfy(path, DEMO),
    "comfy fp8": lambda path: write_comfy(path, DEMO, storage="fp8_scaled"),
    "gguf": lambda path: write_gguf(path, DEMO),
}


class TestConvert:
    @pytest.mark.parametrize("name", FORMATS)
    def test_every_format_becomes_a_store_that_runs(
        self, name: str, here: Path, alone: Path
    ) -> None:
        FORMATS[name](alone / "source")
        ended = wanfit(here, "convert", str(alone / "source"), "--output", "store")
        assert ended.returncode == 0, ended
        assert "transformer: " in ended.stderr
        assert open_model(here / "store", DEMO).precision == "bf16"
        made = wanfit(here, "generate", "red", *SMALL, "--weights", "store", "--output", "x.npy")
        assert made.returncode == 0, made

    def test_parts_come_from_where_they_are_named(self, here: Path, alone: Path) -> None:
        write_comfy(alone / "comfy", DEMO)
        write_official(alone / "official", DEMO)
        vae = alone / "official/Wan2.2_VAE.pth"
        ended = wanfit(
            here, "convert", str(alone / "comfy"), "--output", "store", "--vae", str(vae)
        )
        assert ended.returncode == 0, ended
        assert f"VAE: fp32, {vae}" in ended.stderr
        dtypes = {entry.dtype for entry in open_model(here / "store", DEMO).entries("vae").values()}
        assert dtypes == {"F32"}

    def test_a_lora_is_merged(self, here: Path, alone: Path, random_demo_dir: Path) -> None:
        write_lora(alone / "style.safetensors", random_adapters(DEMO))
        ended = wanfit(
            here, "convert", str(random_demo_dir), "--output", "store", "--json",
            "--lora", f"{alone / 'style.safetensors'}:0.5",
        )  # fmt: skip
        assert ended.returncode == 0, ended
        assert json.loads(ended.stdout)["merged"] == [
            {"expert": "high_noise", "file": "style.safetensors", "strength": 0.5}
        ]
        about = json.loads((here / "store/wanfit.json").read_text())
        assert about["merged"][0]["strength"] == 0.5

    def test_parts_of_a_store_cannot_be_replaced(self, here: Path, alone: Path) -> None:
        (alone / "store").mkdir()
        (alone / "store/wanfit.json").write_text("{}")
        ended = wanfit(
            here, "convert", str(alone / "store"), "--output", "new", "--vae", "x.safetensors"
        )
        assert "is a store, and its parts cannot be taken" in only_error(ended, 2)


class TestGenerate:
    def test_it_takes_what_a_search_finds_and_says_so(
        self, here: Path, alone: Path, hollow: dict[str, Weights]
    ) -> None:
        """The hollow weights are those of the true model; the clip is refused for want of RAM."""
        write_official(alone / "official", T2V_A14B, weights=hollow["t2v-a14b"])
        ended = wanfit(here, "generate", "x", "--model", "t2v-a14b", "--ram", "1GiB")
        assert "too little" in only_error(ended, 3)

    def test_a_clip_is_made_from_what_is_found_and_the_report_says_which(
        self, here: Path, alone: Path
    ) -> None:
        write_official(alone / "official", TINY_T2V)
        made = wanfit_generate(
            "a red star", spec=TINY_T2V, device="cpu", size="32x32", frames=5, steps=2,
            output=here / "clip.npy",
        )  # fmt: skip
        assert made.weights == alone / "official"
        assert f"Weights: {alone / 'official'} (official, fp32)" in made.notices

    @pytest.mark.parametrize("named", [True, False], ids=["named", "found"])
    def test_what_is_quantised_names_the_command(
        self, named: bool, here: Path, alone: Path, hollow: dict[str, Weights]
    ) -> None:
        """Before anything is loaded; the command is one that the parser takes."""
        write_comfy(alone / "my comfy", T2V_A14B, weights=hollow["t2v-a14b"], storage="fp8_scaled")
        options = ["--weights", str(alone / "my comfy")] if named else []
        line = only_error(wanfit(here, "generate", "x", "--model", "t2v-a14b", *options), 4)
        assert "does not run as it is" in line
        _, convert, *arguments = shlex.split(line.partition("Make a store of it: ")[2])
        assert arguments[0] == str(alone / "my comfy")
        command = typer.main.get_command(cli.app).commands[convert]  # type: ignore[attr-defined]
        context = command.make_context(convert, arguments)
        assert context.params["precision"] == "fp8", "what was fp8 stays fp8"

    def test_what_is_missing_is_named(
        self, here: Path, alone: Path, hollow: dict[str, Weights]
    ) -> None:
        write_official(alone / "official", T2V_A14B, weights=hollow["t2v-a14b"])
        shutil.rmtree(alone / "official/low_noise_model")
        line = only_error(wanfit(here, "generate", "x", "--model", "t2v-a14b"), 4)
        assert "missing: low-noise expert" in line
        assert "wanfit pull t2v-a14b" in line


def truncated_shard(models: Path, weights: dict[str, Weights]) -> list[str]:
    write_official(models, T2V_A14B, weights=weights["t2v-a14b"])
    (shard, *_) = sorted((models / "high_noise_model").glob("*-00002-*"))
    os.truncate(shard, shard.stat().st_size - 1)
    return [shard.name, "is truncated"]


def missing_shard(models: Path, weights: dict[str, Weights]) -> list[str]:
    write_official(models, T2V_A14B, weights=weights["t2v-a14b"])
    (shard, *_) = sorted((models / "low_noise_model").glob("*-00001-*"))
    shard.unlink()
    return [shard.name, "is not there, 1 of 2 shards missing"]


def wrong_dtype(models: Path, weights: dict[str, Weights]) -> list[str]:
    write_comfy(models, T2V_A14B, weights=weights["t2v-a14b"])
    (file,) = (models / "diffusion_models").glob("*high*")
    entries = file_entries(file)
    tensors = {
        name: torch.empty(entry.shape, dtype=torch.float16, device="meta")
        for name, entry in entries.items()
    }
    tensors["head.head.bias"] = tensors["head.head.bias"].to(torch.int64)
    save_safetensors(file, tensors)
    return ["head.head.bias", "I64"]


def another_models_shape(models: Path, weights: dict[str, Weights]) -> list[str]:
    write_comfy(models, T2V_A14B, weights=weights["t2v-a14b"])
    write_comfy(models.parent / "i2v", I2V_A14B, weights=weights["i2v-a14b"])
    (ours,) = (models / "diffusion_models").glob("*high*")
    (theirs,) = (models.parent / "i2v/diffusion_models").glob("*high*")
    theirs.rename(ours)
    return ["i2v-a14b", "t2v-a14b"]


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def pickle_with_code(models: Path, weights: dict[str, Weights]) -> list[str]:
    write_official(models, T2V_A14B, weights=weights["t2v-a14b"])
    torch.save({"token_embedding.weight": _Code()}, models / T5_PTH)
    return [T5_PTH, "system"]


def zip_bomb(models: Path, weights: dict[str, Weights]) -> list[str]:
    write_official(models, T2V_A14B, weights=weights["t2v-a14b"])
    with zipfile.ZipFile(models / T5_PTH, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}) + bytes(200 << 20))
    return [T5_PTH]


def unknown_gguf_type(models: Path, weights: dict[str, Weights]) -> list[str]:
    write_gguf(models, T2V_A14B, weights=weights["t2v-a14b"])
    (file,) = (models / "HighNoise").glob("*.gguf")
    with file.open("rb") as stream:
        raw = stream.read(1 << 20)
    kind = int(gguf.GGMLQuantizationType.Q8_0).to_bytes(4, "little")
    name = b"blocks.0.self_attn.q.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8
    assert raw[at : at + 4] == kind
    with file.open("r+b") as stream:
        stream.seek(at)
        stream.write((999).to_bytes(4, "little"))
    return ["blocks.0.self_attn.q.weight", "999"]


def both_experts_are_one(models: Path, weights: dict[str, Weights]) -> list[str]:
    write_comfy(models, T2V_A14B, weights=weights["t2v-a14b"])
    (high,) = (models / "diffusion_models").glob("*high*")
    (low,) = (models / "diffusion_models").glob("*low*")
    low.unlink()
    low.symlink_to(high)
    return ["high"]


FAULTS = (
    truncated_shard, missing_shard, wrong_dtype, another_models_shape, pickle_with_code, zip_bomb,
    unknown_gguf_type, both_experts_are_one,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("command", ["convert", "generate"])
def test_a_bad_file_is_one_clear_line_and_nothing_is_written(
    command: str,
    fault: Callable[[Path, dict[str, Weights]], list[str]],
    here: Path,
    alone: Path,
    hollow: dict[str, Weights],
) -> None:
    expected = fault(alone, hollow)
    arguments = {
        "convert": ["convert", str(alone), "--model", "t2v-a14b", "--output", "store"],
        "generate": ["generate", "x", "--model", "t2v-a14b", "--weights", str(alone)],
    }[command]
    ended = wanfit(here, *arguments)
    line = only_error(ended, 4)
    assert ended.stdout == ""
    for words in expected:
        assert words in line, line
    assert nothing_in(here), "nothing was written, and no code ran"


class TestPull:
    @pytest.fixture
    def hub(self, alone: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        """A hub on loopback that has the demo's weights in the official layout."""
        write_official(alone.parent / "repo", DEMO)
        with hub_server() as server:
            server.repos["wan/demo"] = Repo(alone.parent / "repo")
            monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
            monkeypatch.setenv("HF_HOME", str(alone.parent / "hf"))
            yield server

    def test_a_model_comes_to_where_it_is_found(
        self, here: Path, alone: Path, hub: HubServer
    ) -> None:
        ended = wanfit(here, "pull", "demo", "--repo", "wan/demo", "--lean")
        assert ended.returncode == 0, ended
        assert ended.stdout == f"{alone / 'demo-bf16'}\n"
        assert found_of(listed(here), "demo", alone / "demo-bf16")["kind"] == "store"
        again = wanfit(here, "pull", "demo", "--repo", "wan/demo", "--json")
        assert json.loads(again.stdout)["already_there"]

    def test_a_refusal_is_one_line_and_exit_code_6(
        self, here: Path, alone: Path, hub: HubServer
    ) -> None:
        hub.repos["wan/secret"] = Repo(alone.parent / "repo", token="hf_right")
        ended = wanfit(here, "pull", "demo", "--repo", "wan/secret", "--output", "store")
        assert "HF_TOKEN" in only_error(ended, 6)
        assert nothing_in(here)
        (gone,) = wanfit(here, "pull", "demo", "--repo", "wan/none").stderr.splitlines()
        assert "wan/none" in gone

    def test_the_demo_needs_no_pull(self, here: Path, alone: Path) -> None:
        assert "part of wanfit already" in only_error(wanfit(here, "pull", "demo"), 2)

    def test_a_precision_that_no_store_has(self, here: Path, alone: Path) -> None:
        ended = wanfit(here, "pull", "t2v-a14b", "--precision", "int4")
        assert "not one of bf16, fp8" in only_error(ended, 2)
