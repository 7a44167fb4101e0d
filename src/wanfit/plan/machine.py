"""What is here: the GPU and its memory, the RAM that this process may use, and how fast bytes move.

Read without torch: the GPU through NVML, memory from /proc/meminfo and the control groups (v1 and
v2) of this process. Rates that the engine measured are remembered in a small file. A machine can
also come from JSON (`wanfit plan --machine FILE`) or from the catalogue in `cards`.
"""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from wanfit.errors import BadOption
from wanfit.plan.cards import LINK_SHARE, Card, card_like, pcie_bytes_per_s
from wanfit.plan.rates import known_disk, known_link

Source = Literal["measured", "catalogue", "assumed", "given"]

# Where nothing is known: the local disk of one rented H200's host, measured 1.6 to 1.7 GB/s.
ASSUMED_DISK_BYTES_PER_S = 1_600_000_000
ASSUMED_CORES = 8  # ours: of a machine that is only a name
ASSUMED_CARD_FLOPS = 50e12  # ours: of a card that is not in the catalogue; about an RTX 5060 Ti
ASSUMED_CARD_MEMORY_BYTES_PER_S = 450e9  # likewise
_NO_LIMIT_BYTES = 1 << 60  # cgroup v1 writes about 2^63 where there is no limit
_KIB = 1024  # the "kB" of /proc are KiB


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine with at most one GPU. Bytes are bytes, rates are bytes or FLOP per second.

    `*_source` says how a rate is known. A machine without a GPU has `gpu` None and no VRAM.
    """

    gpu: str | None
    gpu_uuid: str | None
    capability: tuple[int, int] | None  # compute capability, (8, 9) for an RTX 4090
    vram_total_bytes: int
    vram_free_bytes: int  # less what other processes hold
    bf16_flops: float  # dense, with fp32 accumulation; of the GPU
    memory_bytes_per_s: float  # of the GPU
    compute_source: Source
    link_bytes_per_s: float  # host to GPU, from pinned memory
    link_source: Source
    disk_bytes_per_s: float  # direct reads of the weights' place
    disk_source: Source
    ram_total_bytes: int
    ram_limit_bytes: int  # the least of the total and the limits of the control groups
    ram_available_bytes: int  # of the limit, less what cannot be reclaimed; page cache can
    locked_limit_bytes: int | None  # RLIMIT_MEMLOCK; None: none. CUDA's pinning is not bound by it
    pinned_limit_bytes: int | None  # the most that CUDA may register; None: RAM alone bounds it
    num_cores: int  # that this process may use
    process_bytes: int = 0  # RAM that the process which will run the clip holds already


def read_machine(*, root: Path = Path("/"), weights: Path | None = None) -> Machine:
    """This machine, as this process may use it. `weights` is the place whose disk matters.

    `root` stands for the file system's root, for tests. Takes milliseconds; raises nothing for
    what is missing: no driver means no GPU.
    """
    gpu = _read_gpu()
    total, limit, available = _read_ram(root)
    disk = known_disk(weights) if weights else None
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Machine(
        **gpu,
        disk_bytes_per_s=disk or ASSUMED_DISK_BYTES_PER_S,
        disk_source="measured" if disk else "assumed",
        ram_total_bytes=total,
        ram_limit_bytes=limit,
        ram_available_bytes=available,
        locked_limit_bytes=None if locked == resource.RLIM_INFINITY else locked,
        # Under WSL the driver pins at most half of the RAM (NVIDIA, CUDA on WSL user guide).
        pinned_limit_bytes=limit // 2 if _is_wsl(root) else None,
        num_cores=_read_cores(root),
    )


def own_bytes(*, root: Path = Path("/")) -> int:
    """RAM that this process holds; 0 where the kernel does not say.

    A process that has made clips holds more than a new one: what its libraries loaded for shapes
    that they had not seen before. A plan made in it counts that.
    """
    return _fields(root / "proc/self/status").get("VmRSS", 0) * _KIB


def catalogue_machine(card: Card, *, ram_bytes: int | None = None) -> Machine:
    """A machine that one does not have: a card alone in a host with its usual RAM."""
    ram = card.usual_ram_bytes if ram_bytes is None else ram_bytes
    return Machine(
        gpu=card.name,
        gpu_uuid=None,
        capability=card.capability,
        vram_total_bytes=card.vram_bytes,
        vram_free_bytes=card.vram_bytes,
        bf16_flops=card.bf16_flops,
        memory_bytes_per_s=card.memory_bytes_per_s,
        compute_source="catalogue",
        link_bytes_per_s=card.link_bytes_per_s,
        link_source="catalogue",
        disk_bytes_per_s=ASSUMED_DISK_BYTES_PER_S,
        disk_source="assumed",
        ram_total_bytes=ram,
        ram_limit_bytes=ram,
        ram_available_bytes=ram,
        locked_limit_bytes=None,
        pinned_limit_bytes=None,
        num_cores=ASSUMED_CORES,
    )


def machine_to_json(machine: Machine) -> dict[str, Any]:
    """Plain values; `machine_from_json` reads them back."""
    return json.loads(json.dumps(asdict(machine)))  # type: ignore[no-any-return]


def machine_from_json(fields: Mapping[str, Any]) -> Machine:
    """The machine of `machine_to_json`. Raises BadOption, naming the field."""
    from pydantic import TypeAdapter, ValidationError

    extra = sorted(set(fields) - {field.name for field in dataclass_fields(Machine)})
    if extra:
        raise BadOption(f"A machine has no field {extra[0]!r}")
    try:
        machine = TypeAdapter(Machine).validate_python(dict(fields))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise BadOption(f"The machine's {where}: {problem['msg']}") from None
    rates = [machine.link_bytes_per_s, machine.disk_bytes_per_s]
    if machine.gpu:
        rates += [machine.bf16_flops, machine.memory_bytes_per_s]
    if not all(0 < rate < math.inf for rate in rates):
        raise BadOption("A machine's rates are above 0 and finite, and one is not")
    amounts = (
        machine.vram_free_bytes,
        machine.ram_available_bytes,
        machine.process_bytes,
        machine.num_cores - 1,
    )
    if min(amounts) < 0:
        raise BadOption("A machine has a core at least and no fewer than 0 bytes free")
    return machine


def read_machine_file(path: Path) -> Machine:
    """The machine described by a JSON file. Raises BadOption for one that cannot be read."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadOption(f"The machine file {str(path)!r} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise BadOption(f"The machine file {str(path)!r} holds no JSON object")
    return machine_from_json(fields)


def _no_gpu() -> dict[str, Any]:
    return {
        "gpu": None,
        "gpu_uuid": None,
        "capability": None,
        "vram_total_bytes": 0,
        "vram_free_bytes": 0,
        "bf16_flops": 0.0,
        "memory_bytes_per_s": 0.0,
        "compute_source": "assumed",
        "link_bytes_per_s": pcie_bytes_per_s(4, 16) * LINK_SHARE,
        "link_source": "assumed",
    }


def _read_gpu() -> dict[str, Any]:
    """The fields of Machine that tell of the GPU that CUDA would take first."""
    import pynvml  # type: ignore[import-untyped]

    try:
        begin_nvml()
        handle = _first_visible(pynvml)
        return _no_gpu() if handle is None else _describe_gpu(pynvml, handle)
    except pynvml.NVMLError:
        return _no_gpu()


@cache
def begin_nvml() -> None:
    """Once per process, and never ended: a warm process reads its machine before every clip.

    Raises pynvml.NVMLError where there is no driver, and tries again when it is called again.
    """
    import pynvml

    pynvml.nvmlInit()


def _first_visible(nvml: Any) -> Any:
    """The handle of the first device in CUDA_VISIBLE_DEVICES, or of device 0; None for none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = "0" if visible is None else visible.split(",")[0].strip()
    if first.isdecimal():
        known = int(first) < nvml.nvmlDeviceGetCount()
        return nvml.nvmlDeviceGetHandleByIndex(int(first)) if known else None
    return nvml.nvmlDeviceGetHandleByUUID(first) if first.startswith(("GPU-", "MIG-")) else None


def _describe_gpu(nvml: Any, handle: Any) -> dict[str, Any]:
    name, uuid = (str(text) for text in (nvml.nvmlDeviceGetName(handle),
                                         nvml.nvmlDeviceGetUUID(handle)))  # fmt: skip
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    card = card_like(name)
    link = known_link(uuid)
    try:
        wire = pcie_bytes_per_s(
            nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle),
            nvml.nvmlDeviceGetMaxPcieLinkWidth(handle),
        )
    except nvml.NVMLError:  # a virtual GPU has no link of its own
        wire = pcie_bytes_per_s(4, 16)
    return {
        "gpu": name,
        "gpu_uuid": uuid,
        "capability": tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        "vram_total_bytes": int(memory.total),
        "vram_free_bytes": int(memory.free),
        "bf16_flops": card.bf16_flops if card else ASSUMED_CARD_FLOPS,
        "memory_bytes_per_s": (
            card.memory_bytes_per_s if card else ASSUMED_CARD_MEMORY_BYTES_PER_S
        ),
        "compute_source": "catalogue" if card else "assumed",
        "link_bytes_per_s": link or wire * LINK_SHARE,
        "link_source": "measured" if link else "assumed",
    }


def _read_ram(root: Path) -> tuple[int, int, int]:
    """(total, limit, available) bytes of RAM for this process."""
    info = _fields(root / "proc/meminfo")
    total = info.get("MemTotal", 0) * _KIB
    limit, available = total, info.get("MemAvailable", info.get("MemFree", 0)) * _KIB
    for group in _groups(root, "memory"):
        level = _group_memory(group)
        if level is not None:
            limit = min(limit, level[0])
            available = min(available, level[1])
    return total, limit, max(0, available)


def _group_memory(group: Path) -> tuple[int, int] | None:
    """(limit, available) bytes of one control group; None where it has no limit.

    Available is the limit less what the kernel cannot take back: the page cache and reclaimable
    slabs can be. Names of v2, then of v1: kernel.org, admin-guide/cgroup-v2 and cgroup-v1/memory.
    """
    for limit_name, usage_name, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        limit = _number(group / limit_name)
        if limit is None or limit >= _NO_LIMIT_BYTES:
            continue
        stat = _fields(group / "memory.stat")
        reclaimable = sum(
            stat.get(name, 0)
            for name in (f"{prefix}active_file", f"{prefix}inactive_file", "slab_reclaimable")
        )
        used = max(0, (_number(group / usage_name) or 0) - reclaimable)
        return limit, max(0, limit - used)
    return None


def _read_cores(root: Path) -> int:
    """Cores that the affinity mask and the control groups' quotas leave, at least 1."""
    cores = float(len(os.sched_getaffinity(0)))
    for group in _groups(root, "cpu"):
        words = (_text(group / "cpu.max") or "").split()
        if len(words) == 2 and words[0].isdecimal():
            cores = min(cores, int(words[0]) / int(words[1]))
        quota, period = (_number(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota is not None and quota > 0 and period:
            cores = min(cores, quota / period)
    return max(1, int(cores))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The directories of this process's control groups, from its own up to the root of each.

    Inside a container /proc may name a path of the host that is not mounted here: those levels are
    missing, and the ones that are there count.
    """
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            top = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            top = next(
                (
                    found
                    for name in (controllers, controller)
                    if (found := root / "sys/fs/cgroup" / name).is_dir()
                ),
                root / "sys/fs/cgroup" / controller,
            )
        else:
            continue
        own = top / path.strip("/")
        for level in (own, *own.parents):
            yield level
            if level == top:
                break


def _is_wsl(root: Path) -> bool:
    return "microsoft" in (_text(root / "proc/version") or "").lower()


def _fields(path: Path) -> dict[str, int]:
    """Name -> first number, of files whose lines are "name number" or "name: number kB"."""
    found = {}
    for line in (_text(path) or "").splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdecimal():
            found[words[0]] = int(words[1])
    return found


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no file, or a word such as "max"."""
    text = (_text(path) or "").strip()
    return int(text) if text.removeprefix("-").isdecimal() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
