"""LoRA adapters, merged into weights while they are converted.

    W' = W + strength * (alpha / r) * B A      A [r, in] "down", B [out, r] "up"

`.diff`, `.diff_b` and `.diff_m` are added to weight, bias and modulation, times the strength alone
(LightX2V's lora_loader.py, ComfyUI's comfy/lora.py). Sums are fp32, on some rows of a weight at a
time, so they do not depend on how the weight is stored before or after. Only the matrices of the
last two weights are in memory.

Adapters that were distilled to few steps need other settings than the model's own; nothing in their
files says so. From lightx2v/Wan2.2-Lightning (generate.py, its configs), LightX2V
(configs/distill/wan22) and Kijai's copies of both:

    files                                                   steps  solver  shift  guidance
    lightx2v/Wan2.2-Lightning: T2V-A14B Seko-V1, -V1.1,         4  euler     5.0       1.0
      250928; I2V-A14B Seko-V1
    lightx2v/Wan2.2-Distill-Loras: I2V 1022, T2V 1217           4  euler     5.0       1.0
    Kijai/WanVideo_comfy: Wan22-Lightning, Wan22_Lightx2v       4  euler     5.0       1.0

Each has one file per expert. Timesteps are then 1000, 937.5, 833.3 and 625, so the experts change
after two steps at the models' own boundaries (0.875, 0.900) too. TI2V-5B has no such file there.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanfit.engine.weights.headers import TensorEntry
from wanfit.engine.weights.keys import listed
from wanfit.engine.weights.lora_file import Lora, read_lora
from wanfit.engine.weights.lora_fit import Change, Difference, LowRank, changes_of
from wanfit.engine.weights.naming import expert_word
from wanfit.errors import BadOption, WeightsBroken, WeightsMismatch, WeightsMissing
from wanfit.plan.plan import NetworkName
from wanfit.specs import MODELS, Expert, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Adapters", "Lora", "Merge", "merge_for", "read_lora"]

MAX_HELD = 2  # weights whose matrices are in memory at a time

_Parameter = tuple[NetworkName, str]
_Matrices = tuple["Tensor", "Tensor"]  # A [r, in], B [out, r]
# LoRA files, or folders with one (or with one per expert), each with its strength.
Adapters = Sequence[tuple[Path, float]]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA file that is added to one expert."""

    expert: Expert
    path: Path
    strength: float
    changes: Mapping[str, Sequence[Change]]  # by our names of the parameters


class Merge:
    """What adapters add to the weights of a model. Made by `merge_for`.

    Imports no torch until `apply` is called, which several threads may do at once.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.adapters = tuple(adapters)
        self._changes: dict[_Parameter, list[tuple[Change, float]]] = {}
        for adapter in adapters:
            if adapter.strength == 0:
                continue
            for name, changes in adapter.changes.items():
                added = self._changes.setdefault((adapter.expert, name), [])
                added += [(change, adapter.strength) for change in changes]
        self._held: OrderedDict[_Parameter, list[_Matrices | None]] = OrderedDict()
        self._lock = threading.Lock()  # of what is held

    def touches(self, network: NetworkName, name: str) -> bool:
        """Whether `apply` changes our parameter `name` of `network`."""
        return (network, name) in self._changes

    def apply(self, network: NetworkName, name: str, first_row: int, rows: Tensor) -> Tensor:
        """Rows of parameter `name` from `first_row` on, with the adapters added in their order.

        rows: fp32 [n, ...], whole rows: shaped as the parameter is but for the first side. It is
        not changed. Returns fp32 of the same shape. Raises WeightsBroken when an adapter's file
        cannot be read any more.
        """
        import torch

        changes = self._changes.get((network, name))
        if changes is None:
            return rows
        last_row = first_row + len(rows)
        for (change, strength), held in zip(changes, self._matrices((network, name)), strict=True):
            scale = strength * change.factor
            if isinstance(change, Difference):
                values = read_rows(change.entry, first_row, len(rows))
                rows = rows.add(values.view(rows.shape), alpha=scale)
            else:
                assert held is not None
                down, up = held
                flat = torch.addmm(rows.flatten(1), up[first_row:last_row], down, alpha=scale)
                rows = flat.view(rows.shape)
        return rows

    def fingerprint(self) -> list[Any]:
        """For JSON: changes when an adapter does: its file, its expert, its strength, its scale.

        Raises WeightsBroken when a file is not there any more.
        """
        lines: list[Any] = []
        for adapter in self.adapters:
            try:
                stat = adapter.path.stat()
            except OSError as error:
                raise WeightsBroken(f"{adapter.path} cannot be read: {error.strerror}") from None
            factors = {change.factor for changes in adapter.changes.values() for change in changes}
            file = [str(adapter.path.resolve()), stat.st_size, stat.st_mtime_ns]
            lines.append([adapter.expert, file, adapter.strength, sorted(factors)])
        return lines

    def to_json(self) -> list[dict[str, Any]]:
        """What was merged, for people: expert, name of the file, strength."""
        return [
            {"expert": adapter.expert, "file": adapter.path.name, "strength": adapter.strength}
            for adapter in self.adapters
        ]

    def _matrices(self, parameter: _Parameter) -> list[_Matrices | None]:
        """A and B of its changes, in fp32, None for a difference; those of the last two are held.

        Convert goes from weight to weight, and its threads may be at two of them.
        """
        changes = [change for change, _ in self._changes[parameter]]
        if not any(isinstance(change, LowRank) for change in changes):
            return [None] * len(changes)
        with self._lock:
            if parameter not in self._held:
                if len(self._held) == MAX_HELD:
                    self._held.popitem(last=False)
                self._held[parameter] = [
                    _read_matrices(change) if isinstance(change, LowRank) else None
                    for change in changes
                ]
            self._held.move_to_end(parameter)
            return self._held[parameter]


def merge_for(
    spec: ModelSpec,
    high: Adapters = (),
    low: Adapters = (),
    *,
    both: Adapters = (),
    models: Sequence[ModelSpec] = MODELS,
) -> Merge:
    """What these adapters add to `spec`, by their headers; `both` come before `high` and `low`.

    high, low: each for the expert that it is given for, whatever its name says; of a file whose
    keys name both transformers, that expert's part. both: for all experts; a file or folder whose
    name tells its expert goes there alone, and the other expert must then have one too. models:
    those that a file may be of instead, for messages.

    Raises WeightsError for a file that is not whole, not understood or of another model; BadOption
    for a strength that is not a number, `high` or `low` for a model with one transformer, and an
    adapter of one expert where both were asked for.
    """
    for path, strength in (*both, *high, *low):
        if not math.isfinite(strength):
            raise BadOption(f"The strength of {path} is {strength}, which is no number to scale by")
    if spec.boundary is None and (high or low):
        raise BadOption(f"{spec.name} has one transformer, not two experts", hint="Use --lora")
    chosen = list(_for_both(spec, both))
    options: tuple[tuple[Expert, Adapters], ...] = (("high_noise", high), ("low_noise", low))
    for expert, given in options:
        chosen += [
            (expert, read_lora(_file_for(path, expert)), strength) for path, strength in given
        ]
    adapters = []
    for expert, lora, strength in chosen:
        _check_experts(lora, spec)
        changes = changes_of(lora, spec, expert, models)
        adapters.append(Adapter(expert, lora.path, strength, changes))
    return Merge(adapters)


def _read_matrices(change: LowRank) -> _Matrices:
    down, up = (read_rows(entry, 0, entry.shape[0]) for entry in (change.down, change.up))
    return down.flatten(1), up.flatten(1)


def read_rows(entry: TensorEntry, first_row: int, num_rows: int) -> Tensor:
    """Rows of a tensor in F64, F32, F16 or BF16 as fp32 [num_rows, ...]. Raises WeightsBroken."""
    import torch

    from wanfit.engine.weights.layout import TORCH_DTYPES

    row_bytes = entry.num_bytes // entry.shape[0]
    buffer = torch.empty(num_rows * row_bytes, dtype=torch.uint8)
    view = buffer.numpy().data
    try:
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.offset + first_row * row_bytes)
            done = 0
            while done < len(view):
                count = stream.readinto(view[done:])
                if not count:
                    raise WeightsBroken(
                        f"{entry.file} ends in {entry.name}, which lies up to"
                        f" {entry.offset + entry.num_bytes}"
                    )
                done += count
    except OSError as error:
        raise WeightsBroken(f"{entry.file} cannot be read: {error.strerror}") from None
    values = buffer.view(TORCH_DTYPES[entry.dtype]).float()
    return values.view(num_rows, *entry.shape[1:])


def _for_both(spec: ModelSpec, both: Adapters) -> Iterator[tuple[Expert, Lora, float]]:
    """Where adapters go that are given for the whole model."""
    loras = [(read_lora(path), strength) for at, strength in both for path in _files_at(at)]
    if spec.boundary is None:
        yield from ((spec.experts[0], lora, strength) for lora, strength in loras)
        return
    made_for = {lora.expert: lora.path for lora, _ in loras if lora.expert}
    if len(made_for) == 1:
        ((expert, path),) = made_for.items()
        option = "--lora-high" if expert == "high_noise" else "--lora-low"
        raise BadOption(
            f"{path} is for the {expert} expert by its name or keys, and nothing was given for the"
            " other one",
            hint=f"Give the other one's adapter too, or say {option} to change this expert alone"
            " (--lora-high and --lora-low with the same file change both)",
        )
    for lora, strength in loras:
        experts = spec.experts if lora.expert is None else (lora.expert,)
        yield from ((expert, lora, strength) for expert in experts)


def _files_at(path: Path) -> list[Path]:
    """The file, or those of a folder: one, or one for each expert."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.safetensors"))
    experts = {expert_word(file) for file in files}
    if len(files) == 1 or (len(files) == 2 and experts == {"high_noise", "low_noise"}):
        return files
    if not files:
        raise WeightsMissing(f"{path} has no .safetensors file", hint="Give a LoRA file")
    raise WeightsMismatch(
        f"{path} has {len(files)} files: {listed([file.name for file in files])}",
        hint="Name the one to merge",
    )


def _file_for(path: Path, expert: Expert) -> Path:
    """The file, or that of a folder which is for this expert."""
    files = _files_at(path)
    return next(file for file in files if len(files) == 1 or expert_word(file) == expert)


def _check_experts(lora: Lora, spec: ModelSpec) -> None:
    if spec.boundary is None and any(module.stack == "transformer_2" for module in lora.modules):
        raise WeightsMismatch(
            f"{lora.path} has parts for two transformers, and {spec.name} has one",
            hint=f"Get the adapter that was made for {spec.name}",
        )
