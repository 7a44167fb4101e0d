"""docs/checkpoints.md keeps its word: sizes are those of the networks, commands are real."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from tests.checkpoints import Weights, meta_weights, write_comfy, write_gguf, write_kijai
from tests.checkpoints import write_official as official
from wanfit import cli
from wanfit.engine.weights import places
from wanfit.engine.weights.headers import BLOCKS
from wanfit.engine.weights.keys import rows_of, their_name
from wanfit.plan.weights import dit_units, umt5_units, vae_bytes
from wanfit.specs import T2V_A14B, TI2V_5B, VAE_21, VAE_22, ModelSpec

TEXT = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
GB = 10**9
COMMANDS = re.findall(r"^wanfit .*$", TEXT, re.MULTILINE)
Write = Callable[[Path, ModelSpec, Weights], object]

# Files of full size that hold nothing: they cost no disk.
WRITERS: dict[str, Write] = {
    "official, fp32": lambda path, spec, weights: official(path, spec, weights=weights),
    "ComfyUI fp16": lambda path, spec, weights: write_comfy(path, spec, weights=weights),
    "ComfyUI fp8 scaled": lambda path, spec, weights: write_comfy(
        path, spec, weights=weights, storage="fp8_scaled"
    ),
    "Kijai fp8 scaled": lambda path, spec, weights: write_kijai(path, spec, weights=weights),
    "GGUF Q8_0": lambda path, spec, weights: write_gguf(path, spec, weights=weights),
    "GGUF Q6_K": lambda path, spec, weights: write_gguf(path, spec, weights=weights, qtype="Q6_K"),
}


def cells(begin: str) -> list[str]:
    (line,) = re.findall(rf"^\| {re.escape(begin)} \|.*$", TEXT, re.MULTILINE)
    return [cell.strip() for cell in line.strip("| ").split("|")]


def size(text: str) -> float:
    """The first number of a cell, in GB."""
    return float(re.findall(r"[\d.]+", text)[0])


@pytest.fixture(scope="module")
def full() -> dict[str, Weights]:
    """Names and shapes of the true models."""
    return {spec.name: meta_weights(spec) for spec in (T2V_A14B, TI2V_5B)}


def file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", WRITERS)
def test_the_table_of_formats(name: str, full: dict[str, Weights], tmp_path: Path) -> None:
    """Of files with the true names, dtypes and shapes; headers are within the rounding."""
    _, expert, small, text, vae, whole, _ = cells(name)
    for spec, transformer in ((T2V_A14B, expert), (TI2V_5B, small)):
        folder = tmp_path / spec.name
        WRITERS[name](folder, spec, full[spec.name])
        others_bytes = 0
        for file in folder.rglob("*"):
            if re.search("t5", file.name) and file.suffix in (".pth", ".gguf", ".safetensors"):
                assert file.stat().st_size / GB == pytest.approx(size(text), abs=0.006)
                others_bytes += file.stat().st_size
            elif "vae" in file.name.lower() and file.is_file():
                said = vae.split(",")[0 if spec is T2V_A14B else 1]
                assert file.stat().st_size / GB == pytest.approx(size(said), abs=0.006)
                others_bytes += file.stat().st_size
            elif file.is_file() and file.suffix == ".json":
                others_bytes += file.stat().st_size
        each = (file_bytes(folder) - others_bytes) / len(spec.experts)
        assert each / GB == pytest.approx(size(transformer), abs=0.0061)
        if spec is T2V_A14B:
            assert file_bytes(folder) / GB == pytest.approx(size(whole), abs=0.06)


@pytest.mark.parametrize(("name", "base"), [("GGUF Q4_K_M", "Q4_K"), ("GGUF Q5_K_M", "Q5_K")])
def test_the_rows_of_mixed_quants(
    name: str, base: str, full: dict[str, Weights], tmp_path: Path
) -> None:
    """city96/ComfyUI-GGUF, tools/lcpp.patch: .v.weight and .ffn.2.weight are Q6_K in them."""
    for spec, said in zip((T2V_A14B, TI2V_5B), cells(name)[1:3], strict=True):
        folder = tmp_path / spec.name
        write_gguf(folder, spec, weights=full[spec.name], qtype=base, umt5=False)
        plain_bytes = max(file.stat().st_size for file in folder.rglob("*.gguf"))
        per_value = [BLOCKS[kind][1] / BLOCKS[kind][0] for kind in (base, "Q6_K")]
        rows = rows_of(spec, "high_noise")
        moved = sum(
            value.numel()
            for ours, value in full[spec.name]["high_noise"].items()
            if ours.startswith("blocks.")
            and re.search(r"\.v\.weight$|ffn\.2\.weight$", their_name(ours, rows, "gguf"))
        )
        mixed = plain_bytes + moved * (per_value[1] - per_value[0])
        assert mixed / GB == pytest.approx(size(said), abs=0.0051)


def test_the_rows_of_bf16_lora_and_stores(full: dict[str, Weights]) -> None:
    specs = (T2V_A14B, TI2V_5B)
    for spec, column in zip(specs, (1, 2), strict=True):
        values = full[spec.name]["high_noise"]
        in_bf16 = 2 * sum(value.numel() for value in values.values())
        row = cells("diffusers, transformers in bf16")
        assert in_bf16 / GB == pytest.approx(size(row[column]), abs=0.0051)
        pairs = [
            value.shape
            for name, value in values.items()
            if name.startswith("blocks.") and value.ndim == 2
        ]
        lora = sum(64 * 4 * sum(shape) for shape in pairs)
        assert lora / GB == pytest.approx(size(cells("LoRA of rank 64, fp32")[column]), abs=0.0051)
    umt5 = sum(umt5_units(T2V_A14B.umt5, "bf16").values())
    vae = vae_bytes(VAE_21)
    diffusers = 2 * 2 * sum(v.numel() for v in full["t2v-a14b"]["high_noise"].values())
    assert f"{(diffusers + umt5 + vae) / GB:.1f} GB" == cells("diffusers, transformers in bf16")[5]
    for precision in ("bf16", "fp8"):
        row = cells(f"store, {precision}")
        for spec, column in zip(specs, (1, 2), strict=True):
            assert f"{sum(dit_units(spec.dit, precision).values()) / GB:.2f} GB" == row[column]
        assert f"{umt5 / GB:.2f} GB" == row[3]
        whole = 2 * sum(dit_units(T2V_A14B.dit, precision).values()) + umt5 + vae
        assert f"{whole / GB:.1f} GB" == row[5]
    assert f"{vae / GB:.2f}, {vae_bytes(VAE_22) / GB:.2f} GB" == cells("official, fp32")[4]


def test_the_table_of_memory() -> None:
    blocks = [dit_units(T2V_A14B.dit, precision)["blocks.0"] / GB for precision in ("bf16", "fp8")]
    assert cells("one block of an A14B expert")[1:] == [f"{block:.3f} GB" for block in blocks]
    slots = cells("two slots, the least that a GPU holds of the transformers")
    assert slots[1:] == [f"{2 * block:.2f} GB" for block in blocks]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line: str) -> None:
    """The real parser of the command line accepts it; nothing is run."""
    _, name, *arguments = shlex.split(line)
    group = typer.main.get_command(cli.app)
    command = group.commands[name]  # type: ignore[attr-defined]
    assert command.make_context(name, arguments).command.name == name


def test_the_search_path_and_its_bounds() -> None:
    for volume in places.VOLUMES:
        assert f"`{volume}`" in TEXT
    assert f"{places.MAX_DEPTH} levels, {places.MAX_ENTRIES:,} entries of one place" in TEXT
    assert f"{places.MAX_ENTRIES_OF_ONE:,} of one directory" in TEXT
