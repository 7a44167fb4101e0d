"""Common cards: their memory, speed and link, so that one can plan for a machine one has not.

Sources:
- TFLOP/s are dense, with fp32 accumulation, from NVIDIA's architecture papers (Ampere GA102, Ada,
  RTX Blackwell, RTX PRO Blackwell) and data sheets (L4, L40, L40S, A10, A40, A100, H100, H200,
  B200). Sheets of the later ones give figures with sparsity; these are half of them.
- Memory is what CUDA reports as total, which is less than the name says. Of the RTX 4090, RTX 5090,
  L40, L40S, RTX 6000 Ada (with ECC) and RTX PRO 6000: the lowest figure in torch's out-of-memory
  messages in public issues, rounded down. Of the others: ours, what such cards usually lose, on the
  low side. Drivers differ by about 0.2 GiB.
- RAM is what a home machine with such a card, or a rented one per GPU, usually has. Ours, rough.
- RunPod's ids: its documentation, references/gpu-types.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from wanfit.errors import BadOption

_GIB = 1 << 30
_GB = 10**9
_TERA = 10**12
# Bytes per second and lane, of PCIe 3, 4 and 5 after their 128b/130b coding.
_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
# Measured on one H200: 53 GB/s of the 63 that PCIe 5 x16 has, from pinned memory.
LINK_SHARE = 0.84


@dataclass(frozen=True, slots=True)
class Card:
    """One kind of GPU."""

    name: str
    capability: tuple[int, int]
    vram_bytes: int  # that CUDA reports as total
    bf16_flops: float
    fp8_flops: float | None  # None: no fp8 units
    memory_bytes_per_s: float
    pcie: tuple[int, int]  # generation, lanes
    usual_ram_bytes: int
    runpod_id: str | None  # RunPod's GPU type

    @property
    def link_bytes_per_s(self) -> float:
        """From pinned host memory."""
        return pcie_bytes_per_s(*self.pcie) * LINK_SHARE


def pcie_bytes_per_s(generation: int, lanes: int) -> float:
    """What the wire carries, before the protocol takes its share."""
    newest = max(_LANE_BYTES_PER_S)
    return _LANE_BYTES_PER_S[min(max(generation, 1), newest)] * lanes


def _card(  # noqa: PLR0913  a row of the table below, in its order
    name: str,
    capability: tuple[int, int],
    vram_gib: float,
    bf16_tflops: float,
    fp8_tflops: float | None,
    memory_gb_per_s: float,
    pcie: tuple[int, int],
    ram_gb: int,
    runpod_id: str | None = None,
) -> Card:
    return Card(
        name=name,
        capability=capability,
        vram_bytes=int(vram_gib * _GIB),
        bf16_flops=bf16_tflops * _TERA,
        fp8_flops=None if fp8_tflops is None else fp8_tflops * _TERA,
        memory_bytes_per_s=memory_gb_per_s * _GB,
        pcie=pcie,
        usual_ram_bytes=ram_gb * _GB,
        runpod_id=runpod_id,
    )


# name, capability, VRAM GiB, bf16 and fp8 TFLOP/s, memory GB/s, PCIe, RAM GB, RunPod's id
CARDS: tuple[Card, ...] = (
    _card("RTX 3060", (8, 6), 11.75, 25.5, None, 360, (4, 16), 32),
    _card("RTX 3090", (8, 6), 23.5, 71.2, None, 936, (4, 16), 64, "NVIDIA GeForce RTX 3090"),
    _card("RTX 4060 Ti 16GB", (8, 9), 15.5, 44.1, 88.2, 288, (4, 8), 32),
    _card("RTX 4070 Ti SUPER", (8, 9), 15.5, 88.2, 176.4, 672, (4, 16), 32),
    _card("RTX 4080", (8, 9), 15.5, 97.5, 194.9, 717, (4, 16), 64, "NVIDIA GeForce RTX 4080"),
    _card("RTX 4090", (8, 9), 23.5, 165.2, 330.3, 1008, (4, 16), 64, "NVIDIA GeForce RTX 4090"),
    _card("RTX 5060 Ti 16GB", (12, 0), 15.4, 47.4, 94.9, 448, (5, 8), 32),
    _card("RTX 5070 Ti", (12, 0), 15.4, 87.9, 175.8, 896, (5, 16), 64),
    _card("RTX 5080", (12, 0), 15.4, 112.6, 225.1, 960, (5, 16), 64, "NVIDIA GeForce RTX 5080"),
    _card("RTX 5090", (12, 0), 31.36, 209.5, 419.0, 1792, (5, 16), 117, "NVIDIA GeForce RTX 5090"),
    _card("L4", (8, 9), 21.95, 121.0, 242.5, 300, (4, 16), 50, "NVIDIA L4"),
    _card("L40", (8, 9), 44.3, 181.0, 362.0, 864, (4, 16), 94, "NVIDIA L40"),
    _card("L40S", (8, 9), 44.3, 362.0, 733.0, 864, (4, 16), 94, "NVIDIA L40S"),
    _card("A10", (8, 6), 21.9, 125.0, None, 600, (4, 16), 64),
    _card("A40", (8, 6), 44.3, 149.7, None, 696, (4, 16), 50, "NVIDIA A40"),
    _card("A100 40GB", (8, 0), 39.3, 312.0, None, 1555, (4, 16), 85),
    _card("A100 80GB", (8, 0), 79.1, 312.0, None, 1935, (4, 16), 117, "NVIDIA A100 80GB PCIe"),
    _card("RTX A6000", (8, 6), 44.3, 154.8, None, 768, (4, 16), 50, "NVIDIA RTX A6000"),
    _card(
        "RTX 6000 Ada", (8, 9), 44.4, 364.2, 728.5, 960, (4, 16), 62,
        "NVIDIA RTX 6000 Ada Generation",
    ),
    _card(
        "RTX PRO 6000", (12, 0), 94.9, 503.8, 1007.6, 1792, (5, 16), 180,
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
    ),
    _card("H100 PCIe", (9, 0), 79.0, 756.0, 1513.0, 2000, (5, 16), 176, "NVIDIA H100 PCIe"),
    _card("H100 SXM", (9, 0), 79.0, 989.4, 1978.9, 3350, (5, 16), 125, "NVIDIA H100 80GB HBM3"),
    _card("H100 NVL", (9, 0), 93.0, 835.0, 1671.0, 3900, (5, 16), 94, "NVIDIA H100 NVL"),
    _card("H200", (9, 0), 139.7, 989.4, 1978.9, 4800, (5, 16), 251, "NVIDIA H200"),
    _card("B200", (10, 0), 178.3, 2250.0, 4500.0, 7700, (5, 16), 180, "NVIDIA B200"),
)  # fmt: skip

_NOISE = re.compile(r"nvidia|geforce|tesla|generation|graphics|laptop|gpu|[^a-z0-9]")


def card_named(name: str) -> Card:
    """The card of that name, however spelled: "rtx5090", "NVIDIA GeForce RTX 5090", "5090".

    Raises BadOption naming the closest.
    """
    card = card_like(name)
    if card is None:
        shown = name if len(name) <= 40 else f"{name[:40]}..."
        (close,) = difflib.get_close_matches(_key(shown), _ALIASES, n=1, cutoff=0.0)
        raise BadOption(
            f"There is no card {shown!r} in the catalogue",
            hint=f"Did you mean {_ALIASES[close].name!r}?"
            f" Known: {', '.join(card.name for card in CARDS)}",
        )
    return card


def card_like(name: str) -> Card | None:
    """The same, or None."""
    key = _key(name)
    if not key:
        return None
    for card in CARDS:
        if key in (_key(card.name), _key(card.runpod_id or card.name)):
            return card
    return _ALIASES.get(key) or _ALIASES.get(f"rtx{key}")


def _key(name: str) -> str:
    return _NOISE.sub("", name.lower())


def _aliases() -> dict[str, Card]:
    """Other spellings, from drivers' names and from habit."""
    by_name = {card.name: card for card in CARDS}
    aliases = {_key(card.name): card for card in CARDS}
    for name, others in {
        "RTX 3060": ("3060", "rtx3060", "rtx306012gb"),
        "RTX 4060 Ti 16GB": ("rtx4060ti",),
        "RTX 4070 Ti SUPER": ("rtx4070tis",),
        "RTX 5060 Ti 16GB": ("rtx5060ti",),
        "A100 40GB": ("a100sxm440gb", "a100pcie40gb"),
        "A100 80GB": ("a100", "a100sxm480gb", "a10080gbpcie", "a100sxm", "a100pcie"),
        "RTX A6000": ("a6000",),
        "RTX 6000 Ada": ("6000ada", "rtx6000ada"),
        "RTX PRO 6000": (
            "pro6000", "rtxpro6000blackwell", "rtxpro6000blackwellworkstationedition",
            "rtxpro6000blackwellserveredition", "rtxpro6000blackwellmaxqworkstationedition",
        ),
        "H100 SXM": ("h100", "h10080gbhbm3", "h100sxm5"),
        "H200": ("h200sxm", "h200nvl"),
    }.items():  # fmt: skip
        aliases.update(dict.fromkeys(others, by_name[name]))
    return aliases


_ALIASES = _aliases()
