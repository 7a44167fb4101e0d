"""The exact bytes that a piece of torch code keeps alive, without a GPU.

Code that runs on `meta` tensors computes nothing but allocates as it would on a device, so its
peak can be read off at full size on any machine:

    with torch.inference_mode(), LiveBytes("meta") as live:
        live.add(network, x)
        network(x)
    print(live.peak_bytes, live.table())

What is counted is what the code asks torch's CUDA caching allocator for: one entry for each
storage (views share it, work in place is free), rounded up to 512 bytes. Not counted is what
kernels take for themselves (cuDNN's and cuBLAS' workspaces), but for what is known:

- a convolution runs channels last if input or weight lies so, and copies what does not lie as it
  needs it;
- a convolution with few output channels takes cuDNN's workspace, see `wanfit.plan.vae`; that of
  convolutions that are not channels last is not counted;
- attention whose operands do not have unit stride in the last dimension runs without a fused
  kernel, and makes the matrix of scores twice. Otherwise only the output is new.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wanfit.plan.vae import FEW_OUTPUTS

ALIGNMENT_BYTES = 512  # c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize
N = TypeVar("N", bound=nn.Module)
aten = torch.ops.aten
# Composite operators that stay whole, since a device has one kernel for them.
FUSED = {aten.scaled_dot_product_attention.default}
CONVOLUTIONS = {aten.convolution.default, aten.convolution_overrideable.default}


def allocated_bytes(num_bytes: int) -> int:
    """What torch's CUDA allocator takes for `num_bytes`."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class Allocation:
    """One live storage: who made it, and as what."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int


class LiveBytes(TorchDispatchMode):
    """Counts the live storages of one device type ("meta", "cpu") while it is entered.

    Storages from before count only if they are given to `add`. A copy from meta to the CPU gives
    zeros, so that code which brings results to the host can be traced as well.
    """

    def __init__(self, device_type: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current_bytes = 0
        self.peak_bytes = 0
        self.peak_since_mark_bytes = 0
        self.at_peak: list[Allocation] = []  # what was alive at `peak_bytes`, largest first
        self._device_type = device_type
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], Allocation]] = {}

    def __enter__(self) -> LiveBytes:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def add(self, *holders: Tensor | nn.Module) -> None:
        """Counts tensors, or a module's parameters and buffers, that were made before."""
        for holder in holders:
            for tensor in _tensors(holder):
                self._count(tensor, "given")
        self._look(())

    def mark(self) -> None:
        """Starts `peak_since_mark_bytes` anew, from what lives now."""
        self.peak_since_mark_bytes = self.current_bytes

    def live(self) -> list[Allocation]:
        """What lives now, largest first."""
        found = [allocation for _, allocation in self._live.values()]
        return sorted(found, key=lambda one: -one.num_bytes)

    def table(self, rows: int = 20) -> str:
        """The largest storages alive at the peak, for people."""
        lines = [f"{self.peak_bytes / 2**30:9.3f} GiB at the peak"]
        for one in self.at_peak[:rows]:
            dtype = str(one.dtype).removeprefix("torch.")
            lines.append(f"{one.num_bytes / 2**20:9.1f} MiB  {dtype:9} {one.shape!s:32} {one.op}")
        return "\n".join(lines)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in FUSED and torch.is_inference_mode_enabled():
            # Outside of inference mode autograd has taken composite operators apart by now.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func is aten._to_copy.default and _leaves_meta(given[0], kwargs):
            out = torch.zeros(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
        elif func is aten.copy_.default and given[1].is_meta and not given[0].is_meta:
            out = given[0].zero_()
        else:
            out = func(*args, **kwargs)
        if func in CONVOLUTIONS and out.is_meta:
            # On meta the order of the output is lost.
            out = out.contiguous(memory_format=convolution_layout(*given[:2]))
        foreign = {_key(x.untyped_storage()) for x in given}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _key(tensor.untyped_storage()) not in foreign:
                self._count(tensor, str(func))
        here = bool(given) and given[0].device.type == self._device_type
        self._look(_hidden(func, given) if here else ())
        return out

    def _count(self, tensor: Tensor, op: str) -> None:
        storage = tensor.untyped_storage()
        key = _key(storage)
        if tensor.device.type != self._device_type or key in self._live:
            return
        num_bytes = allocated_bytes(storage.nbytes())
        self._live[key] = (
            weakref.ref(storage, lambda _: self._forget(key)),
            Allocation(op, tuple(tensor.shape), tensor.dtype, num_bytes),
        )
        self.current_bytes += num_bytes

    def _forget(self, key: int) -> None:
        _, allocation = self._live.pop(key)
        self.current_bytes -= allocation.num_bytes

    def _look(self, hidden: Sequence[Allocation]) -> None:
        """Updates the peaks. `hidden` lives only inside the operator that has just run."""
        now = self.current_bytes + sum(one.num_bytes for one in hidden)
        self.peak_since_mark_bytes = max(self.peak_since_mark_bytes, now)
        if now > self.peak_bytes:
            self.peak_bytes = now
            self.at_peak = sorted([*self.live(), *hidden], key=lambda one: -one.num_bytes)


def to_meta(network: N) -> N:
    """The network with its parameters on meta, frozen, ready for `LiveBytes("meta")`."""
    return network.to("meta").requires_grad_(False).eval()


def _tensors(holder: Tensor | nn.Module) -> Iterator[Tensor]:
    if isinstance(holder, Tensor):
        yield holder
    else:
        yield from holder.parameters()
        yield from holder.buffers()


def _key(storage: torch.UntypedStorage) -> int:
    return int(storage._cdata)


def _leaves_meta(tensor: Tensor, kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return tensor.is_meta and device is not None and torch.device(device).type != "meta"


def _hidden(func: Any, given: Sequence[Tensor]) -> list[Allocation]:
    """What a kernel allocates for the time that it runs, where that is known."""
    if func in CONVOLUTIONS:
        layout = convolution_layout(*given[:2])
        copied = [x for x in given[:2] if not x.is_contiguous(memory_format=layout)]
        hidden = [_hidden_one("copy inside convolution", tuple(x.shape), x.dtype) for x in copied]
        if given[1].shape[0] < FEW_OUTPUTS and layout != torch.contiguous_format:
            hidden.append(_hidden_one("workspace", tuple(given[0].shape), given[0].dtype))
        return hidden
    if func in FUSED:
        q, k = given[:2]
        if all(x.stride(-1) == 1 for x in given[:3]):
            return []
        return [_hidden_one("scores", (*q.shape[:-1], k.shape[-2]), q.dtype)] * 2
    return []


def convolution_layout(x: Tensor, weight: Tensor) -> torch.memory_format:
    """In which order a convolution runs (ATen/native/ConvUtils.h, cudnn_conv_suggest_...)."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    for tensor in (x, weight):
        if last and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous():
            return last
    return torch.contiguous_format


def _hidden_one(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> Allocation:
    return Allocation(op, shape, dtype, allocated_bytes(torch.Size(shape).numel() * dtype.itemsize))
