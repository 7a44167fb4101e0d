"""What a machine has, read from real files in a directory that stands for the root."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from wanfit.errors import BadOption
from wanfit.plan import machine as machine_module
from wanfit.plan import rates
from wanfit.plan.cards import CARDS, card_named
from wanfit.plan.machine import (
    catalogue_machine,
    machine_from_json,
    machine_to_json,
    read_machine,
    read_machine_file,
)

GIB = 1 << 30
MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_gpu_and_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the GPU nor the remembered rates of the machine that tests run on count."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def root_with(path: Path, files: dict[str, str]) -> Path:
    """A root directory with a 64 GiB machine, and these files."""
    total_kib = 64 * GIB // 1024
    always = {
        "proc/meminfo": f"MemTotal: {total_kib} kB\nMemFree: 1 kB\nMemAvailable: {total_kib} kB\n",
        "proc/version": "Linux version 6.8.0",
    }
    for name, text in (always | files).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


class TestMemory:
    def test_without_control_groups_the_machine_is_what_counts(self, tmp_path: Path) -> None:
        machine = read_machine(root=root_with(tmp_path, {}))
        assert machine.ram_total_bytes == machine.ram_limit_bytes == 64 * GIB
        assert machine.ram_available_bytes == 64 * GIB

    def test_v2_limit_less_what_cannot_be_reclaimed(self, tmp_path: Path) -> None:
        """Page cache counts as use and is given back; anonymous memory is not."""
        group = "sys/fs/cgroup/app.slice"
        root = root_with(
            tmp_path,
            {
                "proc/self/cgroup": "0::/app.slice\n",
                f"{group}/memory.max": f"{16 * GIB}\n",
                f"{group}/memory.current": f"{12 * GIB}\n",
                f"{group}/memory.stat": (
                    f"anon {3 * GIB}\nfile {9 * GIB}\nactive_file {2 * GIB}\n"
                    f"inactive_file {6 * GIB}\nslab_reclaimable {GIB}\n"
                ),
            },
        )
        machine = read_machine(root=root)
        assert machine.ram_total_bytes == 64 * GIB
        assert machine.ram_limit_bytes == 16 * GIB
        assert machine.ram_available_bytes == 13 * GIB

    def test_v2_the_tightest_level_of_the_hierarchy_counts(self, tmp_path: Path) -> None:
        top = "sys/fs/cgroup"
        root = root_with(
            tmp_path,
            {
                "proc/self/cgroup": "0::/outer/inner\n",
                f"{top}/outer/memory.max": f"{8 * GIB}\n",
                f"{top}/outer/memory.current": f"{GIB}\n",
                f"{top}/outer/inner/memory.max": "max\n",
                f"{top}/outer/inner/memory.current": "0\n",
            },
        )
        machine = read_machine(root=root)
        assert machine.ram_limit_bytes == 8 * GIB
        assert machine.ram_available_bytes == 7 * GIB

    def test_inside_a_container_the_root_of_the_mount_is_the_group(self, tmp_path: Path) -> None:
        """/proc names a path of the host that is not mounted here."""
        root = root_with(
            tmp_path,
            {
                "proc/self/cgroup": "0::/docker/0123456789\n",
                "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/memory.current": "0\n",
            },
        )
        assert read_machine(root=root).ram_limit_bytes == 4 * GIB

    def test_v1_limit_with_totals_of_the_subtree(self, tmp_path: Path) -> None:
        group = "sys/fs/cgroup/memory/box"
        root = root_with(
            tmp_path,
            {
                "proc/self/cgroup": "9:name=systemd:/\n4:memory:/box\n2:cpu,cpuacct:/\n0::/\n",
                f"{group}/memory.limit_in_bytes": f"{10 * GIB}\n",
                f"{group}/memory.usage_in_bytes": f"{6 * GIB}\n",
                f"{group}/memory.stat": (
                    f"active_file 1\ntotal_active_file {GIB}\ntotal_inactive_file {2 * GIB}\n"
                ),
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
        )
        machine = read_machine(root=root)
        assert machine.ram_limit_bytes == 10 * GIB
        assert machine.ram_available_bytes == 7 * GIB

    def test_others_on_the_machine_count_too(self, tmp_path: Path) -> None:
        kib = GIB // 1024
        info = f"MemTotal: {64 * kib} kB\nMemAvailable: {5 * kib} kB\n"
        assert read_machine(
            root=root_with(tmp_path, {"proc/meminfo": info})
        ).ram_available_bytes == (5 * GIB)

    def test_wsl_pins_half(self, tmp_path: Path) -> None:
        root = root_with(tmp_path, {"proc/version": "Linux 5.15-microsoft-standard-WSL2"})
        assert read_machine(root=root).pinned_limit_bytes == 32 * GIB


class TestCores:
    def test_v2_quota(self, tmp_path: Path) -> None:
        files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}
        assert read_machine(root=root_with(tmp_path, files)).num_cores == 1

    def test_v1_quota(self, tmp_path: Path) -> None:
        top = "sys/fs/cgroup/cpu,cpuacct"
        files = {
            "proc/self/cgroup": "2:cpu,cpuacct:/\n",
            f"{top}/cpu.cfs_quota_us": "50000\n",
            f"{top}/cpu.cfs_period_us": "100000\n",
        }
        assert read_machine(root=root_with(tmp_path, files)).num_cores == 1

    @pytest.mark.parametrize("quota", ["max 100000", ""])
    def test_no_quota_leaves_the_affinity_mask(self, tmp_path: Path, quota: str) -> None:
        files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": quota}
        cores = read_machine(root=root_with(tmp_path, files)).num_cores
        assert cores == len(os.sched_getaffinity(0))


class TestJson:
    @pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
    def test_round_trip(self, card: object) -> None:
        from wanfit.plan.cards import Card

        assert isinstance(card, Card)
        machine = catalogue_machine(card, ram_bytes=100 * GIB)
        again = machine_from_json(json.loads(json.dumps(machine_to_json(machine))))
        assert again == machine

    def test_this_machine_survives_a_file(self, tmp_path: Path) -> None:
        machine = read_machine()
        path = tmp_path / "machine.json"
        path.write_text(json.dumps(machine_to_json(machine)))
        assert read_machine_file(path) == machine
        assert machine.gpu is None
        assert machine.vram_total_bytes == 0

    @pytest.mark.parametrize(
        "change",
        [
            {"num_cores": "many"},
            {"num_cores": 0},
            {"link_bytes_per_s": 0},
            {"disk_bytes_per_s": float("nan")},
            {"vram_free_bytes": -1},
            {"bf16_flops": 0},
            {"surprise": 1},
            {"link_source": "guessed"},
        ],
    )
    def test_a_wrong_field_is_refused(self, change: dict[str, object]) -> None:
        fields = machine_to_json(catalogue_machine(card_named("rtx 4090")))
        with pytest.raises(BadOption):
            machine_from_json(fields | change)

    def test_a_missing_field_is_named(self) -> None:
        fields = machine_to_json(catalogue_machine(card_named("rtx 4090")))
        del fields["num_cores"]
        with pytest.raises(BadOption, match="num_cores"):
            machine_from_json(fields)

    @pytest.mark.parametrize("text", ["", "[]", "{", "1"])
    def test_a_file_that_is_none(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "machine.json"
        path.write_text(text)
        with pytest.raises(BadOption, match=r"machine\.json"):
            read_machine_file(path)
        with pytest.raises(BadOption):
            read_machine_file(tmp_path / "none.json")


class FakeNvml:
    """NVML's answers on a machine with two cards: there is no GPU where the tests run."""

    class NVMLError(Exception):
        pass

    def __init__(self, names: tuple[str, ...], *, has_link: bool = True) -> None:
        self.names, self.has_link = names, has_link

    def nvmlDeviceGetCount(self) -> int:
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return int(uuid.removeprefix("GPU-"))

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.names[handle]

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=24 * GIB, free=20 * GIB)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> list[int]:
        return [8, 9]

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: int) -> int:
        if not self.has_link:
            raise self.NVMLError
        return 4

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: int) -> int:
        return 8


class TestGpu:
    @pytest.mark.parametrize(
        ("visible", "handle"),
        [(None, 0), ("0", 0), ("1,0", 1), ("GPU-1", 1), ("", None), ("-1", None), ("7", None)],
    )
    def test_the_first_visible_one_counts(
        self, monkeypatch: pytest.MonkeyPatch, visible: str | None, handle: int | None
    ) -> None:
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert machine_module._first_visible(FakeNvml(("NVIDIA L4", "NVIDIA L40"))) == handle

    def test_a_known_card_brings_its_speed_and_its_link(self) -> None:
        told = machine_module._describe_gpu(FakeNvml(("NVIDIA GeForce RTX 4090",)), 0)
        assert told["bf16_flops"] == card_named("rtx 4090").bf16_flops
        assert (told["vram_total_bytes"], told["vram_free_bytes"]) == (24 * GIB, 20 * GIB)
        assert told["capability"] == (8, 9)
        assert 12e9 < told["link_bytes_per_s"] < 14e9  # PCIe 4 x8
        assert told["link_source"] == "assumed"

    def test_a_measured_link_wins(self) -> None:
        rates.remember_rates(gpu_uuid="GPU-0", link_bytes_per_s=2.5e10)
        told = machine_module._describe_gpu(FakeNvml(("NVIDIA L4",)), 0)
        assert (told["link_bytes_per_s"], told["link_source"]) == (2.5e10, "measured")

    def test_an_unknown_card_without_a_link_gets_assumptions(self) -> None:
        told = machine_module._describe_gpu(FakeNvml(("Quadro X",), has_link=False), 0)
        assert told["compute_source"] == "assumed"
        assert told["bf16_flops"] > 0
        assert told["link_bytes_per_s"] > 0


class TestRates:
    def test_what_was_measured_is_remembered(self, tmp_path: Path) -> None:
        rates.remember_rates(gpu_uuid="GPU-1", link_bytes_per_s=5e10)
        rates.remember_rates(place=tmp_path, disk_bytes_per_s=2e9)
        assert rates.known_link("GPU-1") == 5e10
        assert rates.known_link("GPU-2") is None
        machine = read_machine(weights=tmp_path / "not" / "there" / "yet")
        assert (machine.disk_bytes_per_s, machine.disk_source) == (2e9, "measured")
        assert read_machine().disk_source == "assumed"

    @pytest.mark.parametrize("text", ["", "nonsense", "[1]", '{"link_bytes_per_s": 3}', "{}"])
    def test_a_broken_memory_is_an_empty_one(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "cache" / "wanfit" / "machine.json"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        assert rates.known_link("GPU-1") is None
        rates.remember_rates(gpu_uuid="GPU-1", link_bytes_per_s=1e10)
        assert rates.known_link("GPU-1") == 1e10

    def test_nowhere_to_remember_is_no_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        rates.remember_rates(gpu_uuid="GPU-1", link_bytes_per_s=1e10)
        assert rates.known_link("GPU-1") is None

    def test_a_disk_is_measured_by_reading_it(self, tmp_path: Path) -> None:
        """None is a legal answer: some file systems take no direct reads."""
        path = tmp_path / "weights"
        path.write_bytes(os.urandom(32 * MIB))
        rate = rates.measure_disk(path, max_s=0.5)
        assert rate is None or 1e6 < rate < 1e12
        assert rates.measure_disk(path, max_bytes=MIB) is None
        path.write_bytes(b"small")
        assert rates.measure_disk(path) is None
