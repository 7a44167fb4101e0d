"""Stores: their bytes, what opening refuses, and the checks that read every byte."""

from __future__ import annotations

import json
import os
import shutil
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.engine.tiny_models import TINY_I2V, TINY_T2V, TINY_TI2V, TinyModel, write_tiny
from wanfit.engine.ops.linear import Linear, quantise
from wanfit.engine.weights import verify
from wanfit.engine.weights.convert import convert_model
from wanfit.engine.weights.files import ModelFiles, map_file, tensor_at
from wanfit.engine.weights.keys import network_names
from wanfit.engine.weights.layout import join_name, network_layouts
from wanfit.engine.weights.networks import on_meta
from wanfit.engine.weights.open import open_model
from wanfit.engine.weights.store import StoreIndex, header_checksum, read_index
from wanfit.engine.weights.verify import IdleCheck, verify_units
from wanfit.errors import WeightsBroken, WeightsError, WeightsMismatch, WeightsMissing
from wanfit.plan.plan import NetworkName, Precision
from wanfit.plan.weights import ALIGN_BYTES
from wanfit.specs import Expert

CPU = torch.device("cpu")
EXPERTS: tuple[Expert, ...] = ("high_noise", "low_noise")
NETWORKS: tuple[NetworkName, ...] = ("umt5", "high_noise", "low_noise", "vae")
FILES = tuple(f"{network}.safetensors" for network in NETWORKS)
PATIENCE_S = 60


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_tiny(tmp_path_factory.mktemp("models") / "t2v", TINY_T2V, seed=3)


@pytest.fixture(scope="module")
def stores(source: TinyModel) -> dict[Precision, Path]:
    """In each precision. Tests that change files take `copy`."""
    paths: dict[Precision, Path] = {}
    for precision in ("bf16", "fp8"):
        paths[precision] = source.path.parent / precision
        convert_model(open_model(source.path, TINY_T2V), paths[precision], precision)
    return paths


@pytest.fixture
def copy(stores: dict[Precision, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(stores["bf16"], tmp_path / "copy"))


def test_a_bf16_store_loads_as_its_source_does(
    source: TinyModel, stores: dict[Precision, Path]
) -> None:
    """Bit by bit; the VAE keeps the fp32 of its source."""
    expected, opened = open_model(source.path, TINY_T2V), open_model(stores["bf16"], TINY_T2V)
    assert (expected.precision, opened.precision) == (None, "bf16")
    for expert in EXPERTS:
        _assert_same(
            opened.load_dit(expert, CPU, torch.bfloat16),
            expected.load_dit(expert, CPU, torch.bfloat16),
        )
    _assert_same(opened.load_umt5(CPU, torch.bfloat16), expected.load_umt5(CPU, torch.bfloat16))
    _assert_same(opened.load_vae(CPU, torch.float32), source.vae)
    assert opened.tokenizer().encode("a red star").ids == (4, 5, 8, 1)


def test_an_fp8_store_holds_the_blocks_weights_as_quantise_makes_them(
    source: TinyModel, stores: dict[Precision, Path]
) -> None:
    """And all the rest as in bf16."""
    opened = open_model(stores["fp8"], TINY_T2V)
    dit = opened.load_dit("low_noise", CPU, torch.bfloat16)
    plain = open_model(source.path, TINY_T2V).load_dit("low_noise", CPU, torch.bfloat16)
    original = dict(source.dits["low_noise"].named_parameters())
    num_fp8 = 0
    for name, parameter in plain.named_parameters():
        found = dit.get_parameter(name)
        if found.dtype != torch.float8_e4m3fn:
            assert torch.equal(found, parameter), name
            continue
        layer = dit.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, Linear)
        weight, scale = quantise(original[name])
        assert torch.equal(found.float(), weight.float()), name
        assert layer.scale is not None
        assert torch.equal(layer.scale, scale), name
        num_fp8 += 1
    assert num_fp8 == 10 * TINY_T2V.dit.num_blocks  # q, k, v, o twice; up, down
    _assert_same(opened.load_umt5(CPU, torch.bfloat16), deepcopy(source.umt5).bfloat16())
    _assert_same(opened.load_vae(CPU, torch.float32), source.vae)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_units_of_a_file(
    precision: Precision, network: NetworkName, stores: dict[Precision, Path]
) -> None:
    """safetensors reads them; they lie on pages, in the order of use, without holes."""
    file = stores[precision] / f"{network}.safetensors"
    units = [u for u in open_model(stores[precision], TINY_T2V).units if u.network == network]
    layouts = network_layouts(on_meta(TINY_T2V, network), precision)
    assert [unit.name for unit in units] == list(layouts)
    position = units[0].offset
    mapping = map_file(file)
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == set(layouts)
        for unit in units:
            assert unit.offset == position
            assert unit.offset % 4096 == unit.num_bytes % 4096 == 0
            if network != "vae":  # which may be in another dtype
                assert unit.layout == layouts[unit.name]
            assert 0 <= unit.num_bytes - unit.layout.num_bytes < 4096
            position += unit.num_bytes
            flat = mapping[unit.offset : unit.offset + unit.num_bytes]
            assert torch.equal(opened.get_tensor(unit.name), flat)
    assert position == file.stat().st_size


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_entries_point_into_the_units(precision: Precision, stores: dict[Precision, Path]) -> None:
    """A tensor read from its offset is the one that a loaded network has."""
    opened = open_model(stores[precision], TINY_T2V)
    dit = opened.load_dit("high_noise", CPU, torch.bfloat16)
    entries = opened.entries("high_noise")
    assert set(entries) == set(dit.state_dict())
    mapping = map_file(stores[precision] / "high_noise.safetensors")
    for name, entry in entries.items():
        assert entry.offset % ALIGN_BYTES == 0
        tensor = tensor_at(mapping, entry)
        assert entry.num_bytes == tensor.numel() * tensor.itemsize
        assert torch.equal(tensor.float(), dit.get_parameter(name).float()), name
    for unit in opened.units:
        if unit.network == "high_noise":
            for place in unit.layout.places:
                entry = entries[join_name(unit.name, place.name)]
                assert entry.offset == unit.offset + place.offset


def test_entries_of_a_directory_have_our_names_and_shapes(source: TinyModel) -> None:
    opened = open_model(source.path, TINY_T2V)
    assert opened.units == ()
    for network in network_names(TINY_T2V):
        entries, meta = opened.entries(network), on_meta(TINY_T2V, network)
        assert {name: entry.shape for name, entry in entries.items()} == {
            name: tuple(parameter.shape) for name, parameter in meta.named_parameters()
        }
    mapping = map_file(opened.entries("vae")["decoder.conv_in.weight"].file)
    for name, entry in opened.entries("vae").items():
        assert torch.equal(tensor_at(mapping, entry), source.vae.get_parameter(name)), name


def test_opening_reads_no_tensor(copy: Path) -> None:
    """With every byte after the headers gone (a hole of the same size) it opens as before."""
    for name in FILES:
        file = copy / name
        file_bytes, header_bytes = file.stat().st_size, len(read_index(file)[1])
        os.truncate(file, header_bytes)
        os.truncate(file, file_bytes)
    opened = open_model(copy, TINY_T2V)
    with pytest.raises(WeightsBroken, match=r"umt5\.safetensors is damaged in rest"):
        list(verify_units(opened))


@pytest.mark.parametrize("file", [*FILES, "tokenizer/tokenizer.json"])
def test_an_absent_file_is_missing_by_name(file: str, copy: Path) -> None:
    (copy / file).unlink()
    with pytest.raises(WeightsMissing, match=f"{file} is not there"):
        open_model(copy, TINY_T2V)


@settings(max_examples=40)
@given(part=st.floats(0, 1, exclude_max=True), file=st.sampled_from(FILES))
def test_a_cut_file_is_broken(part: float, file: str, stores: dict[Precision, Path]) -> None:
    path = stores["bf16"] / file
    whole = path.read_bytes()
    kept_bytes = int(len(whole) * part)
    try:
        os.truncate(path, kept_bytes)
        with pytest.raises(WeightsBroken, match=str(kept_bytes)):
            open_model(stores["bf16"], TINY_T2V)
    finally:
        path.write_bytes(whole)


def test_a_longer_file_is_broken(copy: Path) -> None:
    with (copy / "vae.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(WeightsBroken, match="and its header tells of only"):
        open_model(copy, TINY_T2V)


@pytest.mark.parametrize("mask", [0x01, 0x04, 0x20, 0x80, 0xFF])
@pytest.mark.parametrize("file", ["umt5.safetensors", "high_noise.safetensors"])
def test_no_byte_of_a_header_can_change(file: str, mask: int, copy: Path) -> None:
    """Every byte, one at a time: length, names, index, checksums, padding."""
    path = copy / file
    raw = read_index(path)[1]
    with path.open("r+b", buffering=0) as stream:
        for position, byte in enumerate(raw):
            os.pwrite(stream.fileno(), bytes([byte ^ mask]), position)
            with pytest.raises(WeightsError):
                read_index(path)
            os.pwrite(stream.fileno(), bytes([byte]), position)
    assert read_index(path)[1] == raw


@settings(max_examples=150)
@given(data=st.data())
def test_a_changed_wanfit_json_is_refused_or_changes_nothing(
    data: st.DataObject, stores: dict[Precision, Path]
) -> None:
    path = stores["fp8"] / "wanfit.json"
    whole = path.read_bytes()
    expected = open_model(stores["fp8"], TINY_T2V)
    position = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        opened = open_model(stores["fp8"], TINY_T2V)
    except WeightsError:
        return
    finally:
        path.write_bytes(whole)
    assert opened.precision == expected.precision
    assert opened.units == expected.units
    assert all(opened.entries(network) == expected.entries(network) for network in NETWORKS)


def test_another_model_s_store_is_told(stores: dict[Precision, Path]) -> None:
    """By its name; and by its configs, where the names agree."""
    with pytest.raises(WeightsMismatch, match=r"tiny-i2v was asked for, .* a store of tiny-t2v"):
        open_model(stores["bf16"], TINY_I2V)
    with pytest.raises(WeightsMismatch, match="in_channels 4 instead of 12"):
        open_model(stores["bf16"], replace(TINY_I2V, name="tiny-t2v"))


def test_a_store_of_a_later_format_asks_for_an_update(copy: Path) -> None:
    about = json.loads((copy / "wanfit.json").read_text(encoding="utf-8"))
    (copy / "wanfit.json").write_text(json.dumps(about | {"format": 2}), encoding="utf-8")
    with pytest.raises(WeightsMismatch, match=r"has format 2, .* reads format 1\. Update wanfit"):
        open_model(copy, TINY_T2V)


def test_files_of_two_stores_do_not_mix(
    copy: Path, stores: dict[Precision, Path], tmp_path: Path
) -> None:
    """Another precision, another expert, and the same file of another convert."""
    shutil.copy(stores["fp8"] / "high_noise.safetensors", copy)
    with pytest.raises(WeightsBroken, match=r"high_noise\.safetensors is not the file that"):
        open_model(copy, TINY_T2V)
    shutil.copy(copy / "low_noise.safetensors", copy / "high_noise.safetensors")
    with pytest.raises(WeightsBroken, match=r"high_noise\.safetensors is not the file that"):
        open_model(copy, TINY_T2V)
    other = write_tiny(tmp_path / "other", TINY_T2V, seed=9)
    convert_model(open_model(other.path, TINY_T2V), tmp_path / "second", "bf16")
    shutil.copy(tmp_path / "second" / "high_noise.safetensors", copy)
    with pytest.raises(WeightsBroken, match=r"high_noise\.safetensors is not the file that"):
        open_model(copy, TINY_T2V)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"drop": "blocks.1"}, WeightsMissing, r"lacks blocks\.1\.modulation.* and 24 more"),
        ({"rename": ("blocks.1", "blocks.9")}, WeightsMissing, r"lacks blocks\.1\."),
        ({"add": "blocks.9"}, WeightsBroken, r"holds blocks\.9\..*which the network does not have"),
        ({"network": "low_noise"}, WeightsBroken, "is not the file that"),
        ({"model": "tiny-ti2v"}, WeightsBroken, "of tiny-ti2v in bf16"),
    ],
)
def test_a_well_made_file_of_other_content_is_told(
    change: dict[str, Any], error: type[WeightsError], message: str, copy: Path
) -> None:
    """The checksums are right, as another program or version might write them."""
    path = copy / "high_noise.safetensors"
    index, _ = read_index(path)
    layouts = dict(index.layouts)
    if "drop" in change:
        del layouts[change["drop"]]
    if "rename" in change:
        old, new = change["rename"]
        layouts = {new if unit == old else unit: layout for unit, layout in layouts.items()}
    if "add" in change:
        layouts[change["add"]] = layouts["blocks.1"]
    changed = StoreIndex(
        model=change.get("model", index.model),
        network=change.get("network", index.network),
        precision=index.precision,
        layouts=layouts,
        checksums=dict.fromkeys(layouts, "00000000"),
    )
    raw = changed.header()
    path.write_bytes(raw + bytes(max(end for _, end in changed.runs().values())))
    about = json.loads((copy / "wanfit.json").read_text(encoding="utf-8"))
    about["files"][path.name] = {
        "bytes": path.stat().st_size,
        "header_crc32": header_checksum(raw),
    }
    (copy / "wanfit.json").write_text(json.dumps(about), encoding="utf-8")
    with pytest.raises(error, match=message):
        open_model(copy, TINY_T2V)


def test_every_byte_of_the_units_is_checked(copy: Path) -> None:
    """Whole, it passes unit by unit; one bit flipped anywhere, padding included, is found."""
    opened = open_model(copy, TINY_T2V)
    assert list(verify_units(opened)) == list(opened.units)
    generator = torch.Generator().manual_seed(0)
    for unit in opened.units:
        within = int(torch.randint(unit.num_bytes, (), generator=generator))
        _flip(unit.file, unit.offset + within)
        with pytest.raises(WeightsBroken, match=f"{unit.file.name} is damaged in {unit.name}:"):
            list(verify_units(opened))
        _flip(unit.file, unit.offset + within)
    assert list(verify_units(opened)) == list(opened.units)


def test_a_file_that_shrinks_or_goes_after_opening_is_broken(copy: Path) -> None:
    opened = open_model(copy, TINY_T2V)
    os.truncate(copy / "vae.safetensors", 100_000)
    with pytest.raises(WeightsBroken, match=r"vae\.safetensors ends in rest, after"):
        list(verify_units(opened))
    (copy / "umt5.safetensors").unlink()
    with pytest.raises(WeightsBroken, match=r"umt5\.safetensors cannot be read in rest"):
        list(verify_units(opened))


def test_an_idle_check_reads_only_while_nothing_runs(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paused at the begin and in the middle it stands still; it ends when all is checked."""
    monkeypatch.setattr(verify, "PIECE_BYTES", 16)  # so that it takes a while
    opened = open_model(copy, TINY_T2V)
    with IdleCheck(opened) as check:
        time.sleep(0.05)
        assert check.num_checked == 0
        check.resume()
        _wait_until(lambda: check.num_checked > 0)
        check.pause()
        time.sleep(0.05)
        num_checked = check.num_checked
        assert 0 < num_checked < len(opened.units)
        time.sleep(0.1)
        assert check.num_checked == num_checked
        assert not check.done
        check.resume()
        assert check.wait(PATIENCE_S)
    assert check.num_checked == len(opened.units)
    assert check.broken is None


@pytest.mark.parametrize("resumed", [True, False])
def test_an_idle_check_can_be_stopped_at_any_time(
    resumed: bool, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "PIECE_BYTES", 1)
    opened = open_model(copy, TINY_T2V)
    check = IdleCheck(opened)
    if resumed:
        check.resume()
    check.stop()
    assert check.done
    assert check.num_checked < len(opened.units)
    assert check.broken is None


def test_an_idle_check_reports_the_first_broken_unit(copy: Path) -> None:
    opened = open_model(copy, TINY_T2V)
    unit = opened.units[5]
    _flip(unit.file, unit.offset + 7)
    reported: list[WeightsBroken] = []
    with IdleCheck(opened, reported.append) as check:
        check.resume()
        assert check.wait(PATIENCE_S)
        assert check.num_checked == 5
        assert reported == [check.broken]
        assert f"{unit.file} is damaged in {unit.name}:" in reported[0].message


def test_a_dense_model_has_one_transformer(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "ti2v", TINY_TI2V)
    convert_model(open_model(model.path, TINY_TI2V), tmp_path / "store", "bf16")
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [
        "high_noise.safetensors", "tokenizer", "umt5.safetensors", "vae.safetensors", "wanfit.json",
    ]  # fmt: skip
    opened: ModelFiles = open_model(tmp_path / "store", TINY_TI2V)
    _assert_same(opened.load_vae(CPU, torch.float32), model.vae)


def _assert_same(ours: torch.nn.Module, expected: torch.nn.Module) -> None:
    found, wanted = ours.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        assert torch.equal(found[name], wanted[name]), name


def _flip(file: Path, position: int) -> None:
    with file.open("r+b", buffering=0) as stream:
        byte = os.pread(stream.fileno(), 1, position)[0]
        os.pwrite(stream.fileno(), bytes([byte ^ 0x10]), position)


def _wait_until(condition: Any) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
