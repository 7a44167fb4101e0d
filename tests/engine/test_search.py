"""What a search finds: real checkpoints of every format, on places as people have them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoints import (
    WIDE_T2V,
    meta_weights,
    write_comfy,
    write_diffusers,
    write_gguf,
    write_kijai,
    write_official,
)
from tests.engine.tiny_models import TINY_I2V, TINY_T2V, write_tiny
from wanfit.engine.weights import places
from wanfit.engine.weights.convert import convert_model
from wanfit.engine.weights.open import open_model
from wanfit.engine.weights.places import Place, Walked, hub_cache, pull_directory, search_path, walk
from wanfit.engine.weights.search import Findings, Found, search
from wanfit.plan.plan import Precision
from wanfit.specs import T2V_A14B, ModelSpec

MODELS = (TINY_T2V, TINY_I2V)


def look(*paths: Path, models: tuple[ModelSpec, ...] = MODELS) -> Findings:
    return search([Place(path, "test") for path in paths], models)


def only(found: tuple[Found, ...]) -> Found:
    (one,) = found
    return one


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Precision], Path]:
    """Puts a store of the tiny T2V somewhere."""
    source = write_tiny(tmp_path_factory.mktemp("source") / "t2v", TINY_T2V).path
    made: dict[Precision, Path] = {}

    def put(path: Path, precision: Precision = "bf16") -> Path:
        if precision not in made:
            made[precision] = tmp_path_factory.mktemp("made") / precision
            convert_model(open_model(source, TINY_T2V), made[precision], precision)
        return Path(shutil.copytree(made[precision], path))

    return put


FORMATS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "official": (lambda path: write_official(path, TINY_T2V), "official", "fp32"),
    "diffusers": (lambda path: write_diffusers(path, TINY_T2V), "diffusers", "fp32"),
    "comfy fp16": (lambda path: write_comfy(path, TINY_T2V), "single files", "fp16"),
    "comfy fp8": (
        lambda path: write_comfy(path, TINY_T2V, storage="fp8_scaled"),
        "single files",
        "fp8 scaled",
    ),
    "kijai": (lambda path: write_kijai(path, TINY_T2V), "single files", "fp8 scaled"),
}


class TestFormats:
    @pytest.mark.parametrize("name", FORMATS)
    def test_a_complete_directory_of_every_format(self, name: str, tmp_path: Path) -> None:
        write, layout, storage = FORMATS[name]
        write(tmp_path / "model")
        findings = look(tmp_path)
        found = only(findings.of(TINY_T2V))
        assert (found.kind, found.path, found.format) == ("directory", tmp_path / "model", layout)
        assert storage in found.storage
        assert found.is_complete
        assert found.runs_as_it_is == ("fp8" not in name and name != "kijai")
        assert findings.broken == ()
        weights = [f for f in tmp_path.rglob("*") if f.suffix in (".safetensors", ".pth")]
        assert found.num_bytes == sum(file.stat().st_size for file in weights)

    def test_gguf_with_its_own_text_encoder(self, tmp_path: Path) -> None:
        write_gguf(tmp_path / "gguf", WIDE_T2V)
        found = only(look(tmp_path, models=(WIDE_T2V,)).of(WIDE_T2V))
        assert (found.kind, found.path, found.is_complete) == ("directory", tmp_path / "gguf", True)
        assert "GGUF" in found.format
        assert "Q8_0" in found.storage
        assert not found.runs_as_it_is

    def test_what_is_shared_counts_for_both_models(self, tmp_path: Path) -> None:
        """T2V's text encoder and VAE are I2V's too; its experts are not."""
        write_official(tmp_path / "t2v", TINY_T2V)
        found = only(look(tmp_path).of(TINY_I2V))
        assert found.kind == "mix"
        assert found.missing == ("high-noise expert", "low-noise expert")
        assert set(found.parts or ()) == {"umt5", "vae"}

    def test_parts_of_different_formats_are_a_mix(self, tmp_path: Path) -> None:
        write_official(tmp_path / "elsewhere/official", WIDE_T2V)
        shutil.rmtree(tmp_path / "elsewhere/official/high_noise_model")
        shutil.rmtree(tmp_path / "elsewhere/official/low_noise_model")
        write_gguf(tmp_path / "gguf", WIDE_T2V, umt5=False)
        found = only(look(tmp_path, models=(WIDE_T2V,)).of(WIDE_T2V))
        assert (found.kind, found.is_complete) == ("mix", True)
        assert found.format == "GGUF + official"
        assert found.tokenizer is not None
        where = {name: part.path.parent.name for name, part in (found.parts or {}).items()}
        assert (where["high_noise"], where["low_noise"]) == ("HighNoise", "LowNoise")
        assert where["umt5"] == "official"


class TestStores:
    def test_stores_come_before_originals_and_bf16_before_fp8(
        self, store: Callable[..., Path], tmp_path: Path
    ) -> None:
        write_official(tmp_path / "a-official", TINY_T2V)
        fp8, bf16 = store(tmp_path / "b", "fp8"), store(tmp_path / "c", "bf16")
        findings = look(tmp_path)
        paths = [found.path for found in findings.of(TINY_T2V)]
        assert paths == [bf16, fp8, tmp_path / "a-official"]
        for precision, expected in (("auto", bf16), ("bf16", bf16), ("fp32", bf16), ("fp8", fp8)):
            best = findings.best(TINY_T2V, precision)  # type: ignore[arg-type]
            assert best is not None
            assert best.path == expected, precision

    def test_alone_an_fp8_store_is_the_best(
        self, store: Callable[..., Path], tmp_path: Path
    ) -> None:
        path = store(tmp_path / "fp8", "fp8")
        best = look(tmp_path).best(TINY_T2V, "auto")
        assert best is not None
        assert (best.path, best.precision) == (path, "fp8")

    def test_a_cut_store_is_listed_with_what_it_lacks(
        self, store: Callable[..., Path], tmp_path: Path
    ) -> None:
        """And a complete directory is then the better one."""
        path = store(tmp_path / "store")
        size = (path / "low_noise.safetensors").stat().st_size
        os.truncate(path / "low_noise.safetensors", size - 1)
        (path / "vae.safetensors").unlink()
        write_official(tmp_path / "official", TINY_T2V)
        best, cut = look(tmp_path).of(TINY_T2V)
        assert best.path == tmp_path / "official"
        assert set(cut.missing) == {
            f"low_noise.safetensors ({size - 1} bytes instead of {size})",
            "vae.safetensors",
        }

    @pytest.mark.parametrize(
        "text", ["{", "[]", '{"model": "tiny-t2v"}', '{"model": "tiny-t2v", "precision": "fp4"}']
    )
    def test_a_store_without_a_readable_index_is_broken(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "store").mkdir()
        (tmp_path / "store/wanfit.json").write_text(text)
        (broken,) = look(tmp_path).broken
        assert "wanfit.json" in broken.reason

    def test_a_store_of_a_model_that_is_not_known_is_another(self, tmp_path: Path) -> None:
        (tmp_path / "store").mkdir()
        (tmp_path / "store/wanfit.json").write_text('{"model": "wan-3"}')
        findings = look(tmp_path)
        assert (findings.found, findings.broken) == ((), ())
        assert [other.path for other in findings.others] == [tmp_path / "store"]


class TestTrouble:
    def test_broken_files_are_listed_and_stop_nothing(self, tmp_path: Path) -> None:
        write_official(tmp_path / "official", TINY_T2V)
        bad = tmp_path / "bad"
        bad.mkdir()
        (bad / "empty.safetensors").touch()
        (bad / "page.safetensors").write_text("<!DOCTYPE html><html>")
        (bad / "short.gguf").write_bytes(b"GGUF\x03")
        (bad / "old.pth").write_bytes(b"\x80\x02}q\x00.")
        (bad / "x.safetensors.index.json").write_text('{"weight_map": {"a": "../../up.bin"}}')
        (bad / "gone.safetensors").symlink_to("nowhere")
        findings = look(tmp_path)
        assert only(findings.of(TINY_T2V)).is_complete
        broken = {one.path.name for one in findings.broken}
        assert broken == {path.name for path in bad.iterdir()}
        assert all("\n" not in one.reason for one in findings.broken)

    def test_a_missing_shard_makes_the_expert_missing(self, tmp_path: Path) -> None:
        write_official(tmp_path, TINY_T2V)
        (shard, *_) = sorted((tmp_path / "low_noise_model").glob("*-00002-*"))
        shard.unlink()
        findings = look(tmp_path)
        assert only(findings.of(TINY_T2V)).missing == ("low-noise expert",)
        (broken,) = findings.broken
        assert "1 of 2 shards missing" in broken.reason

    def test_nothing_is_here(self, tmp_path: Path) -> None:
        findings = look(tmp_path, tmp_path / "nowhere")
        assert findings.found == ()
        assert [one.exists for one in findings.places] == [True, False]
        assert findings.best(TINY_T2V, "auto") is None


class TestExperts:
    def test_experts_of_different_makes_are_paired_by_name(self, tmp_path: Path) -> None:
        """Two pairs lie in one folder: each high-noise file goes with its own low-noise one."""
        folder = tmp_path / "diffusion_models"
        for seed, make in enumerate(("plain", "distilled")):
            write_comfy(tmp_path / make, TINY_T2V, storage="bf16" if seed else "fp16")
            for file in (tmp_path / make / "diffusion_models").iterdir():
                folder.mkdir(exist_ok=True)
                file.rename(folder / f"{make}-{file.name}")
        found = only(look(tmp_path).of(TINY_T2V))
        names = {name: part.path.name for name, part in (found.parts or {}).items()}
        assert names["high_noise"].replace("high", "low") == names["low_noise"]

    def test_no_pair_is_made_by_guess(self, tmp_path: Path) -> None:
        """Two high-noise files and one low-noise file, none of which is the twin of another."""
        write_comfy(tmp_path, TINY_T2V)
        folder = tmp_path / "diffusion_models"
        (high,) = folder.glob("*high*")
        (low,) = folder.glob("*low*")
        high.rename(folder / "wan-HIGH-a.safetensors")
        shutil.copy(folder / "wan-HIGH-a.safetensors", folder / "wan-HIGH-b.safetensors")
        low.rename(folder / "other-LOW.safetensors")
        found = only(look(tmp_path).of(TINY_T2V))
        assert not found.is_complete
        assert "which of 2 high-noise and 1 low-noise files belong together" in found.missing

    def test_a_file_that_does_not_say_its_expert_is_named(self, tmp_path: Path) -> None:
        write_comfy(tmp_path, TINY_T2V)
        (low,) = (tmp_path / "diffusion_models").glob("*low*")
        low.rename(low.with_name("finetune.safetensors"))
        missing = only(look(tmp_path).of(TINY_T2V)).missing
        assert missing[0] == "low-noise expert"
        assert "finetune.safetensors" in missing[1]


class TestPlaces:
    def test_the_order_of_the_search(self, tmp_path: Path) -> None:
        environment = {
            "WANFIT_MODELS": f"{tmp_path}/b:{tmp_path}/a::{tmp_path}/b",
            "HF_HOME": str(tmp_path / "hf"),
            "XDG_DATA_HOME": str(tmp_path / "data"),
        }
        assert [str(place.path) for place in search_path(environment)] == [
            f"{tmp_path}/b", f"{tmp_path}/a", "/runpod-volume/models", "/runpod-volume",
            "/workspace/models", f"{tmp_path}/hf/hub", f"{tmp_path}/data/wanfit/models",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({"HF_HUB_CACHE": "/x/cache", "HF_HOME": "/y"}, "/x/cache"),
            ({"HF_HOME": "/y"}, "/y/hub"),
            ({"XDG_CACHE_HOME": "/z"}, "/z/huggingface/hub"),
        ],
    )
    def test_the_hub_cache_is_where_the_hub_has_it(
        self, environment: dict[str, str], expected: str
    ) -> None:
        """The same as huggingface_hub's own constants, in a process with that environment."""
        assert hub_cache(environment) == Path(expected)
        script = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        clean.pop("XDG_CACHE_HOME", None)
        ended = subprocess.run(
            [sys.executable, "-c", script], env=clean | environment, text=True,
            capture_output=True, check=True,
        )  # fmt: skip
        assert ended.stdout.strip() == expected

    def test_a_pull_goes_where_a_search_looks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        named = {"WANFIT_MODELS": f"{tmp_path}/mine:{tmp_path}/other"}
        data = {"XDG_DATA_HOME": str(tmp_path / "data")}
        assert pull_directory(named) == tmp_path / "mine"
        monkeypatch.setattr(places, "VOLUMES", (tmp_path / "volume/models", tmp_path / "volume"))
        assert pull_directory(data) == tmp_path / "data/wanfit/models"
        (tmp_path / "volume").mkdir()
        assert pull_directory(data) == tmp_path / "volume/models"
        for environment in (named, data):
            looked = [place.path for place in search_path(environment)]
            assert pull_directory(environment) in looked

    def test_the_newest_snapshot_of_a_cached_repository_comes_first(self, tmp_path: Path) -> None:
        """Files there are links into blobs/, which is not walked itself."""
        repository = tmp_path / "hub/models--Wan-AI--Tiny"
        write_official(tmp_path / "files", TINY_T2V)
        for age_s, revision in ((100, "aaa"), (0, "bbb")):
            snapshot = repository / "snapshots" / revision
            for number, file in enumerate(sorted((tmp_path / "files").rglob("*"))):
                if file.is_dir():
                    continue
                blob = repository / "blobs" / f"{number}"
                blob.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, blob)
                link = snapshot / file.relative_to(tmp_path / "files")
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(blob)
            os.utime(snapshot, (1e9 - age_s, 1e9 - age_s))
        walked = walk(Place(tmp_path / "hub", "test"), set())
        assert walked.indexes[0].is_relative_to(repository / "snapshots/bbb")
        assert not any("blobs" in file.parts for file in walked.weights)
        found = only(look(tmp_path / "hub").of(TINY_T2V))
        assert (found.path.name, found.is_complete) == ("bbb", True)

    def test_a_walk_has_bounds_and_says_where_it_stopped(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(20):
            (tmp_path / "wide").mkdir(exist_ok=True)
            (tmp_path / "wide" / f"{number:02}.safetensors").touch()
        (tmp_path / "a/b/c").mkdir(parents=True)
        (tmp_path / "a/b/c/deep.safetensors").touch()

        def walked() -> Walked:
            return walk(Place(tmp_path, "test"), set())

        assert len(walked().weights) == 21
        assert walked().notes == []
        monkeypatch.setattr(places, "MAX_ENTRIES_OF_ONE", 8)
        assert len(walked().weights) == 9
        (note,) = walked().notes
        assert note.endswith("wide: stopped after 8 entries")
        monkeypatch.setattr(places, "MAX_DEPTH", 1)
        assert "deep.safetensors" not in [file.name for file in walked().weights]
        assert any("deeper directories" in note for note in walked().notes)
        monkeypatch.setattr(places, "MAX_ENTRIES", 5)
        assert any(note.endswith("stopped after 5 entries") for note in walked().notes)

    def test_circles_hidden_and_unreadable_directories(self, tmp_path: Path) -> None:
        (tmp_path / "models/.git").mkdir(parents=True)
        (tmp_path / "models/.git/x.safetensors").touch()
        (tmp_path / "models/site-packages").mkdir()
        (tmp_path / "models/site-packages/x.safetensors").touch()
        (tmp_path / "models/seen.safetensors").touch()
        (tmp_path / "models/up").symlink_to(tmp_path / "models")
        (tmp_path / "models/self").symlink_to("self")
        walked = walk(Place(tmp_path, "test"), set())
        assert [file.name for file in walked.weights] == ["seen.safetensors"]

    def test_a_place_within_another_is_searched_once(self, tmp_path: Path) -> None:
        write_official(tmp_path / "volume/models/t2v", TINY_T2V)
        findings = look(tmp_path / "volume/models", tmp_path / "volume")
        only(findings.of(TINY_T2V))


def test_a_search_imports_no_torch(tmp_path: Path) -> None:
    """Every container is met on the way, at its true size: shards, pth, safetensors, GGUF."""
    weights = meta_weights(T2V_A14B)
    write_official(tmp_path / "official", T2V_A14B, weights=weights)
    write_gguf(tmp_path / "gguf", T2V_A14B, weights=weights)
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from wanfit.engine.weights.places import Place\n"
        "from wanfit.engine.weights.search import search\n"
        f"found = search([Place(Path({str(tmp_path)!r}), 'test')])\n"
        "assert [one.is_complete for one in found.found].count(True) == 2, found\n"
        "assert not found.broken, found\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_sharded_files_are_read_once(tmp_path: Path) -> None:
    """A shard is no file of its own."""
    write_official(tmp_path, TINY_T2V, num_shards=3, dtype=torch.bfloat16)
    findings = look(tmp_path)
    assert findings.others == findings.broken == ()
    assert only(findings.of(TINY_T2V)).storage == "bf16"
