"""Containers by content: safetensors and its shards, quantised layouts, and files that lie."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoints import DTYPES, save_safetensors, save_sharded
from wanfit.engine.weights.container import Container, open_container, storage_of, weights_of
from wanfit.engine.weights.decode import Sources, decoded_rows
from wanfit.engine.weights.headers import DTYPE_BYTES, read_safetensors
from wanfit.errors import WeightsBroken, WeightsMissing

COMFY_FP8 = {
    "l.weight": torch.ones(4, 8).to(torch.float8_e4m3fn),
    "l.bias": torch.ones(4, dtype=torch.float16),
}


def save_raw(file: Path, header: Mapping[str, Any] | str, data: bytes = b"") -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def entry(dtype: str, shape: list[Any], offsets: list[Any]) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def values(container: Container, name: str) -> Tensor:
    with Sources() as sources:
        weight = weights_of(container)[name]
        return torch.cat(list(decoded_rows(sources, weight, 100))).view(weight.shape)


class TestKinds:
    def test_every_dtype_of_safetensors(self, tmp_path: Path) -> None:
        """Written by safetensors itself; names, shapes and bytes are where the entries say."""
        tensors = {word: torch.arange(6).reshape(2, 3).to(dtype) for dtype, word in DTYPES.items()}
        tensors["BOOL"] = torch.ones(3, dtype=torch.bool)
        tensors["U16"] = torch.ones(3, dtype=torch.uint16)
        save_file(tensors, tmp_path / "no.suffix", {"made": "by hand"})
        container = open_container(tmp_path / "no.suffix")
        assert container.kind == "safetensors"
        assert container.metadata == {"made": "by hand"}
        assert container.files == (tmp_path / "no.suffix",)
        content = (tmp_path / "no.suffix").read_bytes()
        assert container.num_bytes == len(content)
        for word, tensor in tensors.items():
            found = container.entries[word]
            assert (found.name, found.dtype, found.shape) == (word, word, tuple(tensor.shape))
            stored = content[found.offset : found.offset + found.num_bytes]
            assert stored == tensor.view(torch.uint8).numpy().tobytes()

    def test_the_table_of_dtypes_is_torchs(self) -> None:
        sizes = {word: dtype.itemsize for dtype, word in DTYPES.items()}
        assert {word: DTYPE_BYTES[word] for word in sizes} == sizes

    def test_shards_by_their_index(self, tmp_path: Path) -> None:
        tensors = {f"t{i}": torch.full((4,), float(i)) for i in range(5)}
        save_sharded(tmp_path, "model", tensors, 3)
        container = open_container(tmp_path / "model.safetensors.index.json")
        assert container.kind == "safetensors"
        assert len(container.files) == 3
        assert list(container.entries) == list(tensors)
        assert all(torch.equal(values(container, name), tensors[name]) for name in tensors)

    def test_a_missing_shard_is_named(self, tmp_path: Path) -> None:
        save_sharded(tmp_path, "model", {f"t{i}": torch.ones(4) for i in range(5)}, 3)
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(WeightsMissing, match=r"00002-of-00003\S* is not there, 1 of 3 shards"):
            open_container(tmp_path / "model.safetensors.index.json")

    def test_a_tensor_in_two_shards_or_in_another_is_told(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            save_safetensors(tmp_path / name, {"t": torch.ones(2), name: torch.ones(2)})
        index = tmp_path / "index.json"
        index.write_text(json.dumps({"weight_map": {"t": "a", "a": "b", "b": "b"}}))
        with pytest.raises(WeightsBroken, match=r"t lies in both .*a and b"):
            open_container(index)
        save_safetensors(tmp_path / "b", {"b": torch.ones(2)})
        with pytest.raises(WeightsBroken, match=r"b lacks a, which index\.json places there"):
            open_container(index)

    @pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", "x\0y", 3])
    def test_an_index_reaches_no_other_folder(self, name: object, tmp_path: Path) -> None:
        save_safetensors(tmp_path / "x", {"t": torch.ones(2)})
        (tmp_path / "in").mkdir()
        index = tmp_path / "in/index.json"
        index.write_text(json.dumps({"weight_map": {"t": name}}))
        with pytest.raises(WeightsBroken, match="which is not a file name"):
            open_container(index)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "It is empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "pointer of Git LFS"),
            (b"\n<!DOCTYPE html><html>", "web page"),
            (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "bare pickle"),
            (b"hello world, this is a text", "Its first bytes"),
            (b'{"a":' * 100_000, "nested too deep"),
            (b"{}", "has no weight_map"),
            (b"{ broken", "is not JSON"),
        ],
    )
    def test_what_is_none_of_them_is_told(
        self, content: bytes, message: str, tmp_path: Path
    ) -> None:
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(WeightsBroken, match=message):
            open_container(tmp_path / "x.safetensors")

    def test_nothing_there_and_a_directory(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsMissing, match="is not there"):
            open_container(tmp_path / "nothing")
        with pytest.raises(WeightsBroken, match="cannot be read: Is a directory"):
            open_container(tmp_path)
        with pytest.raises(WeightsBroken, match="cannot be read: embedded null byte"):
            open_container(tmp_path / "a\0b")

    def test_headers_need_no_torch(self, tmp_path: Path) -> None:
        """Nor does anything of torch come with GGUF or .pth, or with quantised layouts."""
        from tests.checkpoints import save_gguf, save_pth

        save_safetensors(tmp_path / "s", {**COMFY_FP8, "l.scale_weight": torch.tensor(2.0)})
        save_pth(tmp_path / "p", {"t": torch.ones(2)})
        save_gguf(tmp_path / "g", {}, "wan")
        script = (
            "import sys\nfrom pathlib import Path\n"
            "from wanfit.engine.weights.container import open_container, weights_of, storage_of\n"
            "for path in sys.argv[1:]: print(storage_of(weights_of(open_container(Path(path)))))\n"
            "print('torch' in sys.modules)"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script, *(str(tmp_path / name) for name in "spg")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert ended.stdout.split("\n")[:4] == ["fp8 scaled + fp16", "fp32", "", "False"]


class TestLies:
    """Headers whose numbers do not hold."""

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ({"a": entry("F32", [2], [0, 8]), "b": entry("F32", [2], [4, 12])}, "overlap: a and b"),
            ({"a": entry("F32", [2], [0, 8]), "b": entry("F32", [2], [0, 8])}, "overlap"),
            ({"a": entry("F32", [3], [0, 12])}, "truncated: .* bytes instead of"),
            ({"a": entry("F32", [1], [0, 4])}, "its header tells of only"),
            ({"a": entry("F32", [2], [0, 4])}, "gives a 4 bytes, and its shape needs 8"),
            ({"a": entry("F32", [2], [8, 0])}, "gives a -8 bytes"),
            ({"a": entry("F32", [-1, -2], [0, 8])}, "malformed entry for a"),
            ({"a": entry("F32", [2], [-8, 0])}, "malformed entry for a"),
            ({"a": entry("F32", [2.0], [0, 8])}, "malformed entry for a"),
            ({"a": entry("F32", [True, 2], [0, 8])}, "malformed entry for a"),
            ({"a": entry("F32", ["2"], [0, 8])}, "malformed entry for a"),
            ({"a": entry("F32", [2], [0, 8, 9])}, "malformed entry for a"),
            ({"a": {"dtype": "F32", "shape": [2]}}, "malformed entry for a"),
            ({"a": 3}, "malformed entry for a"),
            ({"a": entry("F4", [4], [0, 8])}, "holds a as F4, which is not known"),
            ({"a": entry("F32", [10**30], [0, 4 * 10**30])}, "truncated"),
            ({"__metadata__": 3}, "__metadata__ is not an object"),
            ("[]", "is not a JSON object"),
            ("{", "not JSON"),
            ("[" * 100_000, "not JSON"),
            ('{"a": 1, "a": 2}', "names 'a' twice"),
            ('{"a": {"dtype": "F32", "dtype": "F16"}}', "names 'dtype' twice"),
            ('{"a": {"shape": [' + "9" * 5000 + "]}}", "not JSON"),
        ],
    )
    def test_a_header_is_not_believed(
        self, header: dict[str, Any] | str, message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(WeightsBroken, match=message):
            read_safetensors(save_raw(tmp_path / "x", header, bytes(8)))

    def test_a_header_that_is_longer_than_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes((10_000).to_bytes(8, "little") + b'{"a": ')
        with pytest.raises(WeightsBroken, match="truncated: 14 bytes instead of 10008"):
            open_container(tmp_path / "x")

    def test_a_header_of_terabytes_is_not_read(self, tmp_path: Path) -> None:
        with (tmp_path / "x").open("wb") as stream:
            stream.write((1 << 40).to_bytes(8, "little") + b"{")
            stream.truncate(1 << 41)
        with pytest.raises(WeightsBroken, match="is not a weight file"):
            open_container(tmp_path / "x")

    def test_a_truncated_file_names_both_lengths(self, tmp_path: Path) -> None:
        save_safetensors(tmp_path / "x", {"a": torch.ones(100)})
        size_bytes = (tmp_path / "x").stat().st_size
        with (tmp_path / "x").open("r+b") as stream:
            stream.truncate(size_bytes - 1)
        with pytest.raises(WeightsBroken, match=f"{size_bytes - 1} bytes instead of {size_bytes}"):
            open_container(tmp_path / "x")


class TestScales:
    """Every layout gives the same weights; what is no weight is gone."""

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4,), (4, 1)])
    @pytest.mark.parametrize("end", ["scale_weight", "weight_scale"])
    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
    def test_a_weight_is_multiplied(
        self, dtype: torch.dtype, end: str, shape: tuple[int, ...], tmp_path: Path
    ) -> None:
        weight = (torch.arange(32.0).view(4, 8) - 16).to(dtype)
        count = 1 if shape in ((), (1,), (1, 1)) else 4
        scale = (torch.arange(count) + 0.5).view(shape)
        tensors = {"p.l.weight": weight, f"p.l.{end}": scale, "p.l.bias": torch.ones(4)}
        save_safetensors(tmp_path / "x", tensors)
        container = open_container(tmp_path / "x")
        assert list(weights_of(container)) == ["p.l.weight", "p.l.bias"]
        expected = weight.float() * scale.view(-1, 1)
        assert torch.equal(values(container, "p.l.weight"), expected)
        assert len(container.entries) == 3

    def test_comfys_old_layout(self, tmp_path: Path) -> None:
        scale = {"l.scale_weight": torch.tensor(2.0), "l.scale_input": torch.tensor(9.0)}
        marker = {"model.diffusion_model.scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
        save_safetensors(tmp_path / "x", {**COMFY_FP8, **scale, **marker})
        weights = weights_of(open_container(tmp_path / "x"))
        assert list(weights) == ["l.weight", "l.bias"]
        assert storage_of(weights) == "fp8 scaled + fp16"

    @pytest.mark.parametrize("way", ["tensor", "metadata"])
    def test_comfys_new_layout(self, way: str, tmp_path: Path) -> None:
        about = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
        save_quantised(tmp_path / "x", way, about, {"l.weight_scale": torch.tensor(2.0)})
        container = open_container(tmp_path / "x")
        assert list(weights_of(container)) == ["l.weight", "l.bias"]
        assert torch.equal(values(container, "l.weight"), torch.full((4, 8), 2.0))

    @pytest.mark.parametrize("way", ["tensor", "metadata"])
    @pytest.mark.parametrize(
        ("about", "message"),
        [
            ({"format": "nvfp4"}, "stores l as nvfp4, which is not decoded"),
            ({"format": "mxfp8"}, "stores l as mxfp8, which is not decoded"),
            ({"format": "awq_w4a16"}, "stores l as awq_w4a16"),
            ({"format": "int8_tensorwise", "convrot": True}, "int8_tensorwise with convrot"),
            ({"format": "int8_tensorwise"}, "as int8_tensorwise and stores it as F8_E4M3"),
            ({"format": 3}, "without a format"),
            ([], "without a format"),
        ],
    )
    def test_other_formats_are_refused_by_name(
        self, way: str, about: object, message: str, tmp_path: Path
    ) -> None:
        save_quantised(tmp_path / "x", way, about, {"l.weight_scale": torch.tensor(2.0)})
        with pytest.raises(WeightsBroken, match=message):
            weights_of(open_container(tmp_path / "x"))

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ({"l.weight_scale_2": torch.ones(1)}, "nvfp4"),
            ({"l.weight_scale_inv": torch.ones(1)}, "scales by blocks"),
            ({"l.weight.absmax": torch.ones(1)}, "bitsandbytes"),
            ({"l.qweight": torch.ones(1)}, "AWQ or GPTQ"),
            (
                {"l.weight_scale": torch.ones(4, 2)},
                r"F32 \[4, 2\], and l.weight \[4, 8\] takes one",
            ),
            ({"l.weight_scale": torch.ones(8)}, "takes one number, or one for each row"),
            ({"l.weight_scale": torch.ones(1, dtype=torch.uint8)}, "weight_scale as U8"),
            ({"m.weight_scale": torch.ones(1)}, "scale m.weight_scale without a weight"),
            (
                {"l.weight_scale": torch.ones(1), "l.scale_weight": torch.ones(1)},
                "two scales for l.weight",
            ),
        ],
    )
    def test_a_scale_has_to_fit(
        self, extra: dict[str, Tensor], message: str, tmp_path: Path
    ) -> None:
        save_safetensors(tmp_path / "x", {**COMFY_FP8, **extra})
        with pytest.raises(WeightsBroken, match=message):
            weights_of(open_container(tmp_path / "x"))

    def test_a_described_layer_needs_its_scale(self, tmp_path: Path) -> None:
        save_quantised(tmp_path / "x", "tensor", {"format": "float8_e4m3fn"}, {})
        with pytest.raises(WeightsBroken, match="describes l as float8_e4m3fn, and has no scale"):
            weights_of(open_container(tmp_path / "x"))

    @pytest.mark.parametrize("text", ["{", '{"layers": 3}', "[]", "{}"])
    def test_malformed_metadata(self, text: str, tmp_path: Path) -> None:
        save_safetensors(tmp_path / "x", COMFY_FP8, {"_quantization_metadata": text})
        with pytest.raises(WeightsBroken, match="malformed _quantization_metadata"):
            weights_of(open_container(tmp_path / "x"))

    @pytest.mark.parametrize(
        ("marker", "message"),
        [
            (torch.zeros(5000, dtype=torch.uint8), "JSON in at most 4096 bytes"),
            (torch.zeros(5), "JSON in at most 4096 bytes"),
            (torch.zeros(5, dtype=torch.uint8), "which is not JSON"),
            (torch.full((4000,), ord("["), dtype=torch.uint8), "which is not JSON"),
        ],
    )
    def test_malformed_descriptions(self, marker: Tensor, message: str, tmp_path: Path) -> None:
        save_safetensors(tmp_path / "x", {**COMFY_FP8, "l.comfy_quant": marker})
        with pytest.raises(WeightsBroken, match=message):
            weights_of(open_container(tmp_path / "x"))

    def test_storages_in_words(self, tmp_path: Path) -> None:
        """The most values first; under 2 % of them is not worth a word."""
        tensors = {
            "a": torch.ones(100, 100).bfloat16(),
            "b": torch.ones(50, 100, dtype=torch.int8),
            "c": torch.ones(100),
        }
        save_safetensors(tmp_path / "x", tensors)
        assert storage_of(weights_of(open_container(tmp_path / "x"))) == "bf16 + int8"


def save_quantised(file: Path, way: str, about: object, scales: dict[str, Tensor]) -> None:
    """COMFY_FP8 with a description of its layer."""
    tensors, metadata = {**COMFY_FP8, **scales}, None
    if way == "tensor":
        text = json.dumps(about).encode()
        tensors["l.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    else:
        metadata = {"_quantization_metadata": json.dumps({"layers": {"l": about}})}
    save_safetensors(file, tensors, metadata)
