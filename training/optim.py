"""Muon for weight matrices and AdamW for the rest, as one optimizer that a CUDA graph can hold.

Muon replaces the gradient of a matrix by the nearest orthogonal one (momentum first, then five
Newton-Schulz steps), which makes small networks learn in about half the steps. Coefficients: Jordan
et al. 2024, "Muon"; the scale 0.2 sqrt(max side), which gives updates the size of AdamW's, and the
decoupled decay: Liu et al. 2025, "Muon is scalable for LLM training".
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
UPDATE_RMS = 0.2
TENTH = 10.0


class Optimizer:
    """`step(lr)` with a device scalar, so that the learning rate can change under a CUDA graph.

    `groups` are (parameters, relative learning rate). Matrices and convolution kernels of width 16
    or more on both sides go to Muon; embeddings, norms, biases and tables go to AdamW.
    """

    def __init__(
        self,
        groups: Iterable[tuple[Iterable[tuple[str, nn.Parameter]], float]],
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.matrices: dict[tuple[float, torch.Size], list[nn.Parameter]] = defaultdict(list)
        self.others: dict[float, list[nn.Parameter]] = defaultdict(list)
        for parameters, scale in groups:
            for name, p in parameters:
                is_matrix = p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= 16
                table = any(part in name for part in ("token_embed", "modulation", "position_bias"))
                if is_matrix and not table:
                    self.matrices[scale, p.shape].append(p)
                else:
                    self.others[scale].append(p)
        everything = [p for ps in (*self.matrices.values(), *self.others.values()) for p in ps]
        self.parameters = everything
        self.first = {p: torch.zeros_like(p) for p in everything}
        self.second = {p: torch.zeros_like(p) for ps in self.others.values() for p in ps}
        self.steps = torch.zeros((), device=everything[0].device)

    @torch.no_grad()
    def step(self, lr: Tensor) -> None:
        """One update from the gradients, which are left as they are."""
        self.steps += 1
        for (scale, shape), parameters in self.matrices.items():
            self._muon(parameters, shape, lr * scale)
        for scale, parameters in self.others.items():
            self._adamw(parameters, lr * scale)

    def _muon(self, parameters: list[nn.Parameter], shape: torch.Size, lr: Tensor) -> None:
        gradients = [_gradient(p) for p in parameters]
        momenta = [self.first[p] for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        nesterov = torch._foreach_lerp(gradients, momenta, self.momentum)
        matrices = torch.stack([g.reshape(shape[0], -1) for g in nesterov])
        size = UPDATE_RMS * max(matrices.shape[1:]) ** 0.5
        for p, update in zip(parameters, orthogonal(matrices), strict=True):
            p.mul_(1 - lr * self.weight_decay)
            p.sub_(lr * size * update.view(shape))

    def _adamw(self, parameters: list[nn.Parameter], lr: Tensor) -> None:
        beta1, beta2, eps = 0.9, 0.98, 1e-8
        gradients = [_gradient(p) for p in parameters]
        first = [self.first[p] for p in parameters]
        second = [self.second[p] for p in parameters]
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        for p, m, v in zip(parameters, first, second, strict=True):
            unbiased = m / (1 - beta1**self.steps)
            p.sub_(lr * unbiased / ((v / (1 - beta2**self.steps)).sqrt() + eps))

    def reset(self) -> None:
        """Forgets what it has seen, as after the warm-up of a captured step."""
        for tensor in (*self.first.values(), *self.second.values(), self.steps):
            tensor.zero_()

    def zero_grad(self) -> None:
        for p in self.parameters:
            if p.grad is not None:
                p.grad.zero_()


class Average:
    """A running mean of parameters: of about the last tenth of the steps, 1 / (1 - decay) at most.

    A share of the steps and not a number, so that a short run's average is not that of its start.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        parameters = dict(named)
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()}
        self._parameters: list[Tensor] = list(parameters.values())
        self._decay = decay

    @torch.no_grad()
    def update(self, steps: Tensor) -> None:
        """After an update of the parameters; `steps` [] counts those done."""
        keep = torch.clamp(1 - TENTH / (steps + TENTH), max=self._decay)
        means = list(self.tensors.values())
        torch._foreach_sub_(means, self._parameters)
        torch._foreach_mul_(means, keep)
        torch._foreach_add_(means, self._parameters)


def learning_rate(peak: float, step: int, warmup_steps: int, progress: float) -> float:
    """A linear rise over the first steps of a sitting, times a cosine over the whole run."""
    rise = min(1.0, (step + 1) / warmup_steps)
    return peak * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def captured(
    update: Callable[[], Tensor], beside: torch.cuda.CUDAGraph | None = None
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """`update` as one CUDA graph, and the tensor that each replay fills with its result.

    beside: a graph whose memory this one may use too; the two never run at the same time.

    Small networks are bound by launches; a replay is one. `update` runs three times first, on a
    stream of its own, as capturing asks for: with a learning rate of 0 only momenta are moved.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            update()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=beside.pool() if beside else None):
        result = update()
    return graph, result


def orthogonal(matrices: Tensor) -> Tensor:
    """About the orthogonal factor of each of [n, rows, columns], by Newton-Schulz in bf16."""
    a, b, c = NEWTON_SCHULZ
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = (x if wide else x.mT).float()
    return out


def _gradient(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad
