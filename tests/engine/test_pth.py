"""Files of torch.save: read as torch reads them, and nothing in them is ever executed."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wanfit.engine.weights import pth
from wanfit.engine.weights.container import open_container
from wanfit.engine.weights.headers import TensorEntry
from wanfit.engine.weights.pickles import BadPickle, read_pickle
from wanfit.engine.weights.pth import read_pth
from wanfit.errors import WeightsBroken

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
WORDS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL")


def stored(entry: TensorEntry, dtype: torch.dtype) -> Tensor:
    """The tensor, from the bytes that the entry says."""
    content = entry.file.read_bytes()[entry.offset : entry.offset + entry.num_bytes]
    flat = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0)
    return flat.view(entry.shape)


def save(file: Path, thing: object, **options: Any) -> Path:
    torch.save(thing, file, **options)
    return file


def write_zip(file: Path, **members: bytes) -> Path:
    """A zip archive as torch's, with these members; "__" in a name stands for "/", "_" for "."."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name.replace('__', '/').replace('_', '.')}", content)
    return file


class TestWhatTorchWrites:
    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_every_dtype(self, protocol: int, tmp_path: Path) -> None:
        tensors = {
            word: (torch.arange(12) % 2).reshape(3, 4).to(dtype)
            for word, dtype in zip(WORDS, DTYPES, strict=True)
        }
        container = open_container(save(tmp_path / "x", tensors, pickle_protocol=protocol))
        assert container.kind == "pth"
        assert list(container.entries) == list(WORDS)
        for word, tensor in tensors.items():
            entry = container.entries[word]
            assert (entry.dtype, entry.shape) == (word, (3, 4))
            assert torch.equal(stored(entry, tensor.dtype).float(), tensor.float())

    def test_views_ties_parameters_and_odd_shapes(self, tmp_path: Path) -> None:
        base = torch.arange(24.0)
        tensors = {
            "base": base,
            "view": base[6:18].view(3, 4),
            "thin": base[2:6].view(4, 1, 1).transpose(1, 2),
            "tied": base,
            "parameter": nn.Parameter(torch.ones(2, 2)),
            "number": torch.tensor(3.0),
            "empty": torch.empty(0, 3),
        }
        entries = read_pth(save(tmp_path / "x", OrderedDict(tensors)))
        for name, tensor in tensors.items():
            assert torch.equal(stored(entries[name], torch.float32), tensor.detach()), name
        assert entries["tied"].offset == entries["base"].offset

    def test_a_modules_state_dict(self, tmp_path: Path) -> None:
        """torch hangs `_metadata` on it."""
        module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        entries = read_pth(save(tmp_path / "x", module.state_dict()))
        for name, tensor in module.state_dict().items():
            assert torch.equal(stored(entries[name], torch.float32), tensor)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: {"state_dict": state, "epoch": 3, "loss": 0.5, "none": None},
            lambda state: {"model_state": state, "name": "x", "flags": (True, False)},
            lambda state: {"trainer": {"module": state}, "steps": [1, 2]},
            lambda state: {"ema": {}, "model": OrderedDict(state)},
        ],
    )
    def test_wrappers_are_looked_into(self, wrap: Any, tmp_path: Path) -> None:
        assert list(read_pth(save(tmp_path / "x", wrap({"a": torch.ones(2)})))) == ["a"]

    def test_nothing_but_torchs_own_reading_agrees(self, tmp_path: Path) -> None:
        """Many tensors in one file, against torch.load."""
        generator = torch.Generator().manual_seed(1)
        state = {f"t{i}": torch.randn(i % 7, 1 + i % 5, generator=generator) for i in range(200)}
        file = save(tmp_path / "x", state)
        loaded = torch.load(file, weights_only=True)
        for name, entry in read_pth(file).items():
            assert torch.equal(stored(entry, torch.float32), loaded[name])


class TestRefused:
    @pytest.mark.parametrize(
        ("thing", "message"),
        [
            ({"w": torch.ones(4, 3).t()}, r"w \[3, 4\] as a view with strides \[1, 3\]"),
            ({"w": torch.ones(4)[::2]}, r"w \[2\] as a view with strides \[2\]"),
            ({"w": torch.ones(1).expand(4)}, r"strides \[0\]"),
            (
                {"model": {"a": torch.ones(1)}, "ema": {"a": torch.ones(1)}},
                "several dictionaries: model, ema",
            ),
            ({"w": torch.ones(1), "n": 3}, "holds n, which is no tensor but int"),
            ({"w": torch.ones(1), 3: torch.ones(1)}, "holds 3, which is no tensor"),
            ([torch.ones(1)], "holds list, and no dictionary of tensors"),
            (torch.ones(1), "holds Call, and no dictionary"),
            ({}, "no dictionary of tensors"),
            ({"a": 1}, "holds a, which is no tensor but int"),
            ({"w": torch.ones(2, dtype=torch.complex64)}, "w as torch.ComplexFloatStorage"),
            ({"w": torch.ones(2).to_sparse()}, "nothing of it was executed: .*torch"),
            (nn.Linear(2, 2), "is refused, and nothing of it was executed"),
        ],
    )
    def test_what_is_no_dictionary_of_tensors(
        self, thing: object, message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(WeightsBroken, match=message):
            read_pth(save(tmp_path / "x", thing))

    def test_the_bare_pickle_of_old_torch(self, tmp_path: Path) -> None:
        file = save(tmp_path / "x", {"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
        with pytest.raises(WeightsBroken, match=r"bare pickle, torch's format before 1\.6"):
            open_container(file)

    def test_a_file_cut_anywhere(self, tmp_path: Path) -> None:
        whole = save(tmp_path / "x", {"w": torch.ones(100)}).read_bytes()
        for length in (4, 30, 100, len(whole) // 2, len(whole) - 1):
            (tmp_path / "cut").write_bytes(whole[:length])
            with pytest.raises(WeightsBroken, match="truncated"):
                open_container(tmp_path / "cut")

    def test_big_endian(self, tmp_path: Path) -> None:
        file = write_zip(tmp_path / "x", data_pkl=pickle.dumps({}), byteorder=b"big")
        with pytest.raises(WeightsBroken, match="byte order b'big'"):
            read_pth(file)

    def test_no_pickle_or_two(self, tmp_path: Path) -> None:
        with pytest.raises(WeightsBroken, match=r"0 members called data\.pkl"):
            read_pth(write_zip(tmp_path / "x", version=b"3"))
        with pytest.raises(WeightsBroken, match=r"2 members called data\.pkl"):
            read_pth(write_zip(tmp_path / "x", data_pkl=b"", more__data_pkl=b""))


class Evil:
    """Pickles as a call of something."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self._call, self._arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call, self._arguments


class TestHostilePickles:
    @pytest.mark.parametrize("protocol", [0, 1, 2, 4])
    @pytest.mark.parametrize("where", ["inside", "around", "deep"])
    @pytest.mark.parametrize(
        ("call", "name"),
        [
            (os.mkdir, "posix.mkdir"),
            (eval, "eval"),
            (getattr, "getattr"),
            (torch.load, "torch.serialization.load"),
            (torch.hub.load, "torch.hub.load"),
            (Path.touch, "pathlib.Path.touch"),
        ],
    )
    def test_code_is_named_and_not_executed(
        self, call: Any, name: str, where: str, protocol: int, tmp_path: Path
    ) -> None:
        evil = Evil(call, str(tmp_path / "executed"))
        things = {"inside": {"w": evil}, "around": evil, "deep": {"a": {"b": [(evil,)]}}}
        content = pickle.dumps(things[where], protocol)
        found = "getattr" if name.startswith("pathlib") and protocol < 4 else re.escape(name)
        with pytest.raises(WeightsBroken, match=f"nothing of it was executed: .*{found}"):
            read_pth(write_zip(tmp_path / "x", data_pkl=content))
        assert not (tmp_path / "executed").exists()
        if call is os.mkdir:  # the danger is real: Python's own unpickler does it
            pickle.loads(content)
            assert (tmp_path / "executed").exists()

    def test_a_shell_is_not_started(self, tmp_path: Path) -> None:
        content = pickle.dumps({"w": Evil(os.system, f"touch {tmp_path / 'executed'}")})
        with pytest.raises(WeightsBroken, match=r"code in it, a call of posix\.system"):
            read_pth(write_zip(tmp_path / "x", data_pkl=content))
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize(
        "content",
        [
            b"(S'touch executed'\nios\nsystem\n.",  # INST
            b"(cos\nsystem\nS'touch executed'\no.",  # OBJ
            b"\x80\x02cos\nsystem\nU\x0etouch executed\x85\x81.",  # NEWOBJ
            b"\x80\x02cos\nsystem\nU\x0etouch executed\x85R.",  # REDUCE
            b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0etouch executed\x85R.",  # STACK_GLOBAL
            b"\x80\x02\x82\x01.",  # EXT1
            b"\x80\x02ccollections\nOrderedDict\n}b.",  # attributes of a class
            b"\x80\x02ccollections\nOrderedDict\n)R}U\x01aK\x01s\x86b(ios\nsystem\n.",
            b"\x80\x02U\x06system\x85R.",  # a call of a tuple
            b"\x80\x02K\x01K\x02R.",  # a call of a number
        ],
    )
    def test_instructions_that_could_call(
        self, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(WeightsBroken, match="is refused, and nothing of it was executed"):
            read_pth(write_zip(tmp_path / "x", data_pkl=content))
        assert not Path("executed").exists()

    def test_names_alone_import_nothing(self) -> None:
        """A GLOBAL is a record, even of a module that would do something when imported."""
        assert "antigravity" not in sys.modules
        found = read_pickle(b"\x80\x02cantigravity\nfly\n.", frozenset())
        assert found.name == "antigravity.fly"
        assert "antigravity" not in sys.modules

    @pytest.mark.parametrize(
        "content",
        [
            b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",  # lists in lists
            b"\x80\x02N" + b"\x85" * 300_000 + b".",  # tuples in tuples
            b"\x80\x02}N" + b"\x85" * 300_000 + b"Ns.",  # ... as a key
            b"\x80\x02N" + b"Q" * 300_000 + b".",  # persistent ids of persistent ids
            b"\x80\x02" + b"}U\x01a" * 300_000 + b"N" + b"s" * 300_000 + b".",  # dicts
            b"\x80\x02" + b"(" * 300_000 + b"t" * 300_000 + b".",
            b"\x80\x02]" + b"q\x00h\x00a" * 1000 + b".",  # a list that holds itself
            b"\x80\x02}q\x00U\x01ah\x00s.",  # a dict that holds itself
        ],
    )
    def test_deep_nesting_ends(self, content: bytes, tmp_path: Path) -> None:
        with pytest.raises(WeightsBroken):
            read_pth(write_zip(tmp_path / "x", data_pkl=content))

    @pytest.mark.parametrize(
        "content",
        [
            b"", b".", b"\x80\x02", b"\x80\x02R.", b"\x80\x02h\x05.", b"\x80\x02t.", b"\x80\x02s.",
            b"\x80\x02}K\x01s.", b"\x80\x02K\x01K\x02a.", b"\x80\x02(K\x01d.", b"\xff\xff",
            b"\x80\x02X\xff\xff\xff\x7f.", b"I" + b"9" * 5000 + b"\n.", b"\x80\x02X\x01\0\0\0\xff.",
            b"\x80\x02Q.", b"\x80\x02b.",
        ],
    )  # fmt: skip
    def test_malformed_pickles(self, content: bytes) -> None:
        with pytest.raises(BadPickle, match=r"malformed|has no end|attributes"):
            read_pickle(content, frozenset())


class TestTensorsThatLie:
    """Calls of _rebuild_tensor_v2 whose arguments are not what torch writes."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"size": (5,)}, "w up to 20 bytes of a storage of 16"),
            ({"offset": 1}, "w up to 20 bytes of a storage of 16"),
            ({"offset": -1}, "in a way that torch does not"),
            ({"size": (-4,)}, "in a way that torch does not"),
            ({"size": (4.0,)}, "in a way that torch does not"),
            ({"size": (1 << 70,)}, "in a way that torch does not"),
            ({"size": (1 << 62,)}, "bytes of a storage of 16"),
            ({"size": (2, 2)}, "in a way that torch does not"),
            ({"size": None}, "in a way that torch does not"),
            ({"number": "7"}, "in a way that torch does not"),
            ({"number": "../data.pkl"}, "in a way that torch does not"),
            ({"number": ((),)}, "in a way that torch does not"),
            ({"kind": int}, "stores w as"),
            ({"kind": "torch.FloatStorage"}, "stores w as str, which is not known"),
        ],
    )
    def test_they_are_refused(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        about: dict[str, Any] = {
            "kind": torch.FloatStorage, "number": "0", "offset": 0, "size": (4,), "stride": (1,),
        }  # fmt: skip
        content = _Pickler.dumps({"w": _Fake({**about, **change})})
        file = write_zip(tmp_path / "x", data_pkl=content, data__0=bytes(16))
        with pytest.raises(WeightsBroken, match=message):
            read_pth(file)

    def test_unchanged_it_is_read(self, tmp_path: Path) -> None:
        """So the test above tests what it says."""
        content = _Pickler.dumps({"w": _Fake(
            {"kind": torch.FloatStorage, "number": "0", "offset": 0, "size": (4,), "stride": (1,)}
        )})  # fmt: skip
        file = write_zip(tmp_path / "x", data_pkl=content, data__0=bytes(16))
        assert read_pth(file)["w"].num_bytes == 16


class TestHostileArchives:
    def test_a_zip_bomb(self, tmp_path: Path) -> None:
        """10 MB of zeros in 10 kB: refused by its directory, not unpacked."""
        with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}))
            archive.writestr("archive/data/0", bytes(10_000_000))
        with pytest.raises(WeightsBroken, match=r"compressed \(\d+ to \d+ bytes\)"):
            open_container(tmp_path / "x")

    def test_a_stored_member_that_claims_to_grow(self, tmp_path: Path) -> None:
        file = write_zip(tmp_path / "x", data_pkl=pickle.dumps({}))
        content = bytearray(file.read_bytes())
        at = content.rindex(b"PK\x01\x02")
        content[at + 24 : at + 28] = (1 << 30).to_bytes(4, "little")  # of the whole
        file.write_bytes(content)
        with pytest.raises(WeightsBroken, match="compressed"):
            open_container(file)

    def test_members_that_overlap(self, tmp_path: Path) -> None:
        """Two entries of the directory for the same bytes, as the zip bombs without recursion."""
        file = write_zip(tmp_path / "x", data_pkl=pickle.dumps({}), data__0=bytes(100), data__1=b"")
        content = bytearray(file.read_bytes())
        first = content.index(b"PK\x03\x04", 1)
        at = content.rindex(b"PK\x01\x02")
        content[at + 42 : at + 46] = first.to_bytes(4, "little")
        file.write_bytes(content)
        with pytest.raises(WeightsBroken, match="members that overlap"):
            open_container(file)

    def test_a_pickle_of_gigabytes(self, tmp_path: Path) -> None:
        writer: Any = torch._C.PyTorchFileWriter(str(tmp_path / "x"))
        writer.write_record_metadata("data.pkl", 5_000_000_000)
        writer.write_end_of_file()
        with pytest.raises(WeightsBroken, match="a pickle of 5000000000 bytes, and 16000000"):
            open_container(tmp_path / "x")

    def test_a_directory_of_gigabytes(self, tmp_path: Path) -> None:
        """zipfile would read all of it at once."""
        end = b"PK\x05\x06" + bytes(8) + (1 << 31).to_bytes(4, "little") + bytes(6)
        with (tmp_path / "x").open("wb") as stream:
            stream.write(b"PK\x03\x04")
            stream.truncate(1 << 31)
            stream.seek(0, 2)
            stream.write(end)
        with pytest.raises(WeightsBroken, match="its directory has over 16000000 bytes"):
            open_container(tmp_path / "x")

    def test_an_encrypted_member_and_two_of_one_name(self, tmp_path: Path) -> None:
        file = write_zip(tmp_path / "x", data_pkl=pickle.dumps({}))
        content = bytearray(file.read_bytes())
        content[content.rindex(b"PK\x01\x02") + 8] |= 1
        file.write_bytes(content)
        with pytest.raises(WeightsBroken, match="encrypted"):
            open_container(file)
        file = write_zip(tmp_path / "x", data_pkl=pickle.dumps({}), data_pkm=b"")
        file.write_bytes(file.read_bytes().replace(b"data.pkm", b"data.pkl"))
        with pytest.raises(WeightsBroken, match=r"two members called archive/data\.pkl"):
            open_container(file)

    def test_a_directory_that_points_elsewhere(self, tmp_path: Path) -> None:
        file = write_zip(tmp_path / "x", data_pkl=pickle.dumps({}))
        content = bytearray(file.read_bytes())
        at = content.rindex(b"PK\x01\x02")
        content[at + 42 : at + 46] = (7).to_bytes(4, "little")
        file.write_bytes(content)
        with pytest.raises(WeightsBroken, match="no member where its directory has"):
            open_container(file)

    def test_any_change_of_a_byte_is_read_or_refused(self, tmp_path: Path) -> None:
        """1500 files with a few bytes changed: never anything but WeightsBroken."""
        state = {"a": torch.ones(3, 2), "b": {"c": torch.ones(1)}["c"], "d": torch.ones(2).half()}
        whole = save(tmp_path / "x", state).read_bytes()
        chance, refused = random.Random(0), 0
        for _ in range(1500):
            content = bytearray(whole)
            for _ in range(chance.choice((1, 2, 8))):
                content[chance.randrange(len(content))] = chance.randrange(256)
            (tmp_path / "y").write_bytes(content)
            try:
                open_container(tmp_path / "y")
            except WeightsBroken:
                refused += 1
        assert refused > 300

    def test_the_list_of_calls_is_short(self) -> None:
        """Each of these makes a tensor from a storage, and none is made here."""
        assert all(re.fullmatch(r"torch\._utils\._rebuild_\w+", name) for name in pth._MAY_CALL)
        assert len(pth._MAY_CALL) == 4


class _Fake:
    def __init__(self, about: dict[str, Any]) -> None:
        self.about = about

    def __reduce__(self) -> tuple[Any, ...]:
        about = self.about
        storage = _Storage(about)
        return torch._utils._rebuild_tensor_v2, (
            storage, about["offset"], about["size"], about["stride"], False, OrderedDict(),
        )  # fmt: skip


class _Storage:
    def __init__(self, about: dict[str, Any]) -> None:
        self.id = ("storage", about["kind"], about["number"], "cpu", 4)


class _Pickler(pickle.Pickler):
    def persistent_id(self, thing: object) -> Any:
        return thing.id if isinstance(thing, _Storage) else None

    @classmethod
    def dumps(cls, thing: object) -> bytes:
        content = io.BytesIO()
        cls(content, protocol=2).dump(thing)
        return content.getvalue()
