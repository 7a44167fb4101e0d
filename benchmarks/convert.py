"""How fast wanfit convert is, for each format, against what the disk gives.

    python -m benchmarks.convert [CASE ...] [--blocks N] [--runs N] [--scratch DIR] [--out FILE]

Cases:
    fp32          an official repository's sharded fp32 transformer, to bf16
    fp32:fp8      the same, to fp8
    bf16          a transformer in bf16, to bf16
    fp8           ComfyUI's fp8 scaled, to bf16
    fp8:fp8       the same, to fp8
    int8          LightX2V's int8 with a scale for each row, to bf16
    Q8_0 Q4_K     GGUF, to bf16
    Q4_K:fp8      the same, to fp8
    pth           the text encoder in a file of torch.save, to bf16

The transformer has the sizes of T2V-A14B and N of its 40 blocks; the text encoder of `pth` has N
of its 24. Files have their true headers, and are full of numbers, not holes.

The bar: 70 % of what the disk gives. The disk's time is the longer of two: reading the source's
bytes and writing the store's, each alone, in this run, with nothing of it in the page cache and
with fsync. The two may overlap, and on one disk they share it: `both` is how long it takes to do
both at once without converting anything, which is noted beside it. Each convert is a process of its
own, whose peak of resident memory is reported.

Some disks take new blocks at another rate than blocks that were freed a moment ago (a virtual disk
mounted with `discard`: 0.4 GB/s against 2 to 3.7), so each write begins some seconds after the last
removal. On a tmpfs (--scratch /dev/shm) the figures are those of the processor alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, figure_line, machine_line, note, read_figures, say, table

BAR = 0.7
MAX_RSS_GB = 2.0
PIECE_BYTES = 8 << 20
SETTLE_S = 10.0  # ext4 commits each 5 s, and then discards
SYNC_BYTES = 256 << 20  # as the converter waits for the disk
GB = 1e9


@dataclass(frozen=True, slots=True)
class Case:
    """One convert."""

    name: str
    kind: str  # of the source
    precision: str  # of the store


CASES = (
    Case("fp32", "fp32", "bf16"),
    Case("fp32:fp8", "fp32", "fp8"),
    Case("bf16", "bf16", "bf16"),
    Case("fp8", "fp8", "bf16"),
    Case("fp8:fp8", "fp8", "fp8"),
    Case("int8", "int8", "bf16"),
    Case("Q8_0", "Q8_0", "bf16"),
    Case("Q4_K", "Q4_K", "bf16"),
    Case("Q4_K:fp8", "Q4_K", "fp8"),
    Case("pth", "pth", "bf16"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.convert", description=(__doc__ or "").split("\n")[0]
    )
    names = [case.name for case in CASES]
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(names))
    parser.add_argument("--blocks", type=int, default=8, metavar="N")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="medians of so many")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="on the disk to be measured")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the lines there too")
    parser.add_argument("--inside", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        folder, kind, target, precision = options.inside
        return _convert_inside(Path(folder), kind, Path(target), precision, options.blocks)
    unknown = [name for name in options.cases if name not in names]
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(names)}")
    chosen = [case for case in CASES if case.name in (options.cases or names)]
    command = shlex.join(["python", "-m", "benchmarks.convert", *sys.argv[1:]])
    lines = [json.dumps({"run": machine_line(), "command": command})]
    print(lines[0], flush=True)
    for case in chosen:
        with tempfile.TemporaryDirectory(prefix="wanfit-convert-", dir=options.scratch) as scratch:
            for figure in _measure(case, Path(scratch), options.blocks, options.runs):
                say(figure)
                lines.append(figure_line(figure))
    print(table(read_figures(lines)), flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def _measure(case: Case, scratch: Path, num_blocks: int, num_runs: int) -> list[Figure]:
    """Writes the source, then converts it and measures the disk with its bytes, by turns."""
    source = _source(scratch / "source", case.kind, num_blocks)
    _fill(source.values())
    files = sorted({entry.file for entry in source.values()})
    source_bytes = sum(entry.num_bytes for entry in source.values())
    runs: list[dict[str, float]] = []
    for _ in range(num_runs):
        _settle(files)
        ended = _run_convert(case, scratch, num_blocks)
        shutil.rmtree(scratch / "store")
        store_bytes = ended["store_bytes"]
        runs.append({**_disk(files, scratch, int(store_bytes)), **ended})
        note("convert", case=case.name, **runs[-1])
    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    # Either alone cannot be slower than both at once: where it is, the disk was busy with others.
    read_s, write_s = (min(median[key], median["both_s"]) for key in ("read_s", "write_s"))
    disk_s = max(read_s, write_s)
    detail = {
        **median, "source_gb": source_bytes / GB, "store_gb": store_bytes / GB, "runs": num_runs,
        "read_mb_per_s": source_bytes / read_s / 1e6,
        "write_mb_per_s": store_bytes / write_s / 1e6,
        "slower": "read" if read_s > write_s else "write",
    }  # fmt: skip
    convert_s, peak_bytes = median["convert_s"], max(run["rss_peak_bytes"] for run in runs)
    return [
        Figure(
            case.name, "of the disk's rate", disk_s / convert_s, "x", at_least=BAR, detail=detail
        ),
        Figure(case.name, "of reading and writing at once", median["both_s"] / convert_s, "x"),
        Figure(case.name, "source read", source_bytes / convert_s / 1e6, "MB/s"),
        Figure(case.name, "store written", store_bytes / convert_s / 1e6, "MB/s"),
        Figure(case.name, "peak RSS", peak_bytes / GB, "GB", at_most=MAX_RSS_GB),
    ]


def _run_convert(case: Case, scratch: Path, num_blocks: int) -> dict[str, float]:
    child = [
        sys.executable, "-m", "benchmarks.convert", "--blocks", str(num_blocks), "--inside",
        str(scratch / "source"), case.kind, str(scratch / "store"), case.precision,
    ]  # fmt: skip
    ran = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def _convert_inside(folder: Path, kind: str, target: Path, precision: str, num_blocks: int) -> int:
    """One convert, in this process."""
    from wanfit.engine.weights.convert import convert_model
    from wanfit.engine.weights.files import ModelFiles
    from wanfit.engine.weights.recognise import store_precision

    spec = _spec(kind, num_blocks)
    rest = _tiny(folder, spec)
    network = _network(kind)
    files = ModelFiles(folder, spec, {**rest, network: _entries(folder, kind, num_blocks)})
    before_bytes = _peak_bytes()
    report = convert_model(files, target, store_precision(precision))
    ended = {
        "convert_s": report.total_s,
        "store_bytes": report.files[f"{network}.safetensors"],
        "rss_before_bytes": before_bytes,
        "rss_peak_bytes": _peak_bytes(),
    }
    print(json.dumps(ended))
    return 0


def _peak_bytes() -> int:
    """Of this program; what getrusage says would begin with its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# --- the disk -------------------------------------------------------------------------------------


def _disk(files: Sequence[Path], scratch: Path, store_bytes: int) -> dict[str, float]:
    """Seconds to read the source, to write as many bytes as the store has, and to do both."""
    _settle(files)
    read_s = _seconds(partial(_read, files))
    written = scratch / "written"
    write_s = _seconds(partial(_write, written, store_bytes))
    written.unlink()
    _settle(files)
    with ThreadPoolExecutor(2) as pool:
        began_s = time.perf_counter()
        both = [pool.submit(_read, files), pool.submit(_write, written, store_bytes)]
        for one in both:
            one.result()
        both_s = time.perf_counter() - began_s
    written.unlink()
    return {"read_s": read_s, "write_s": write_s, "both_s": both_s}


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def _read(files: Sequence[Path]) -> None:
    buffer = bytearray(PIECE_BYTES)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def _write(file: Path, num_bytes: int) -> None:
    """In order, with waits for the disk as a store has them."""
    piece = os.urandom(PIECE_BYTES)
    unsynced = 0
    with file.open("wb", buffering=0) as stream, ThreadPoolExecutor(1) as waiting:
        syncing = None
        for begin in range(0, num_bytes, PIECE_BYTES):
            unsynced += stream.write(memoryview(piece)[: num_bytes - begin])
            if unsynced >= SYNC_BYTES:
                unsynced = 0
                if syncing:
                    syncing.result()
                syncing = waiting.submit(os.fdatasync, stream.fileno())
        if syncing:
            syncing.result()
        os.fsync(stream.fileno())


def _settle(files: Sequence[Path]) -> None:
    """Nothing waits to be written or discarded, and nothing of the source is in the page cache."""
    os.sync()
    time.sleep(SETTLE_S)
    _forget(files)


def _forget(files: Sequence[Path]) -> None:
    """Out of the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


# --- the source -----------------------------------------------------------------------------------


def _network(kind: str) -> Any:
    return "umt5" if kind == "pth" else "high_noise"


def _spec(kind: str, num_blocks: int) -> Any:
    """One network of true sizes, with some of its blocks; the others are tiny."""
    from tests.engine.tiny_models import TINY_T2V
    from wanfit.specs import T2V_A14B

    tiny = replace(TINY_T2V, name="benchmark", boundary=None)
    if kind == "pth":
        return replace(tiny, umt5=replace(T2V_A14B.umt5, num_blocks=min(num_blocks, 24)))
    return replace(tiny, dit=replace(T2V_A14B.dit, num_blocks=num_blocks))


def _source(folder: Path, kind: str, num_blocks: int) -> dict[str, Any]:
    """Writes the files of the one network as holes with true headers. Our name -> its place."""
    import gguf
    import torch

    from tests import checkpoints as as_people_have
    from tests import weight_encodings
    from tests.engine.tiny_models import write_tiny

    spec = _spec(kind, num_blocks)
    folder.mkdir()
    tiny = _all_tiny(spec)
    write_tiny(folder / "tiny", tiny, dtype=torch.bfloat16)
    shutil.copytree(folder / "tiny/tokenizer", folder / "tokenizer")
    network = _network(kind)
    weights = as_people_have.meta_weights(spec)
    plain = {"fp32": torch.float32, "bf16": torch.bfloat16, "pth": torch.bfloat16}
    file, is_gguf = _file(folder, kind), kind.startswith("Q")
    if is_gguf:
        tensors, _ = as_people_have.gguf_named(
            spec, network, weights, gguf.GGMLQuantizationType[kind]
        )
        as_people_have.save_gguf(file, tensors, "wan")
        return dict(_entries(folder, kind, num_blocks))
    store = {"fp8": weight_encodings.comfy_fp8, "int8": weight_encodings.lightx2v(torch.int8)}.get(
        kind
    ) or weight_encodings.plain(plain[kind])
    stored, _ = as_people_have.named(spec, network, weights, "official", store)
    match kind:
        case "fp32":
            as_people_have.save_sharded(folder, "diffusion_pytorch_model", stored, 3)
        case "pth":
            as_people_have.save_pth(file, stored)
        case _:
            as_people_have.save_safetensors(file, stored)
    return dict(_entries(folder, kind, num_blocks))


def _file(folder: Path, kind: str) -> Path:
    if kind == "fp32":
        return folder / "diffusion_pytorch_model.safetensors.index.json"
    return folder / ("model.gguf" if kind.startswith("Q") else f"model.{kind}")


def _entries(folder: Path, kind: str, num_blocks: int) -> dict[str, Any]:
    """Our name -> where the file has it."""
    from wanfit.engine.weights.container import open_container, weights_of
    from wanfit.engine.weights.keys import Naming, rows_of, their_name
    from wanfit.engine.weights.networks import on_meta, shapes_of

    spec, network = _spec(kind, num_blocks), _network(kind)
    found = weights_of(open_container(_file(folder, kind)))
    naming: Naming = "gguf" if kind.startswith("Q") else "official"
    rows = rows_of(spec, network)
    return {
        name: replace(found[their_name(name, rows, naming)], shape=shape)
        for name, shape in shapes_of(on_meta(spec, network)).items()
    }


def _all_tiny(spec: Any) -> Any:
    from tests.engine.tiny_models import TINY_T2V

    return replace(TINY_T2V, name=spec.name, boundary=None)


def _tiny(folder: Path, spec: Any) -> dict[Any, Any]:
    """The networks that are not measured."""
    from wanfit.engine.weights.open import open_model

    files = open_model(folder / "tiny", _all_tiny(spec))
    return {network: files.entries(network) for network in ("umt5", "high_noise", "vae")}


def _fill(entries: Any) -> None:
    """Numbers instead of holes: small ones, of which no encoding makes an infinity."""
    import torch

    from wanfit.engine.weights.layout import TORCH_DTYPES

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 21, generator=generator).mul_(0.02)
    for entry in entries:
        for part in (entry, entry.scale):
            if part is None:
                continue
            if part.dtype in ("F32", "F16", "BF16"):
                content = noise.to(TORCH_DTYPES[part.dtype]).view(torch.uint8)
            else:  # below an infinity in fp8, and in the fp16 scales of GGUF
                content = torch.randint(0, 60, (PIECE_BYTES,), generator=generator).byte()
            _write_at(part, content.numpy().data)
    for file in {entry.file for entry in entries}:
        handle = os.open(file, os.O_RDWR)
        os.fsync(handle)
        os.close(handle)


def _write_at(entry: Any, content: memoryview) -> None:
    with entry.file.open("r+b", buffering=0) as stream:
        stream.seek(entry.offset)
        left = entry.num_bytes
        while left:
            left -= stream.write(content[:left])


if __name__ == "__main__":
    sys.exit(main())
