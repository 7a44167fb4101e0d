"""What torch says of itself, asked in a process of its own: nothing of it stays in memory here.

python -m wanfit.doctor.torch_build      prints one JSON object
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

ASK_S = 120.0  # ours: a cold disk takes half a minute to give torch


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """A build of torch, and whether it can use the card that is here."""

    version: str = ""
    cuda: tuple[int, int] | None = None  # that it is built for; None: a build without CUDA
    architectures: tuple[str, ...] = ()  # sm_90 (code), compute_90 (for later cards)
    sees_cuda: bool = False
    cuda_error: str = ""
    error: str = ""  # it cannot be imported

    @property
    def line(self) -> str:
        cuda = "" if self.cuda is None else f" for CUDA {self.cuda[0]}.{self.cuda[1]}"
        return f"torch {self.version}{cuda}"

    def has_code_for(self, capability: tuple[int, int]) -> bool:
        """Code runs on its own and later minor versions; compute_* is compiled for all later."""
        for name in self.architectures:
            kind, _, number = name.partition("_")
            digits = "".join(character for character in number if character.isdigit())
            if not digits:
                continue
            major, minor = int(digits[:-1] or 0), int(digits[-1])
            if kind == "sm" and number.isdigit():
                if major == capability[0] and minor <= capability[1]:
                    return True
            elif kind == "sm":  # sm_90a: this one card alone
                if (major, minor) == capability:
                    return True
            elif (major, minor) <= capability:
                return True
        return False


def ask_torch() -> TorchBuild:
    """Takes as long as an import of torch. Raises nothing."""
    try:
        answer = subprocess.run(
            [sys.executable, "-m", "wanfit.doctor.torch_build"],
            capture_output=True, text=True, timeout=ASK_S, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return TorchBuild(error=f"torch could not be asked ({type(error).__name__})")
    if answer.returncode != 0:
        lines = answer.stderr.strip().splitlines()
        last = lines[-1][:300] if lines else f"exit code {answer.returncode}"
        return TorchBuild(error=f"torch cannot be imported: {last}")
    fields: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    cuda, names = fields.pop("cuda"), fields.pop("architectures")
    return TorchBuild(**fields, cuda=None if cuda is None else tuple(cuda), architectures=(*names,))


def _describe() -> dict[str, Any]:
    import torch

    built = torch.version.cuda
    sees, wrong = False, ""
    if built is not None:
        try:
            sees = bool(torch.cuda.is_available() and torch.zeros(1, device="cuda").item() == 0.0)
        except Exception as error:  # noqa: BLE001  whatever CUDA says is the answer
            wrong = str(error).splitlines()[0][:200]
    return {
        "version": str(torch.__version__),
        "cuda": None if built is None else [int(part) for part in built.split(".")[:2]],
        "architectures": torch.cuda.get_arch_list() if sees else _flags(torch),
        "sees_cuda": sees,
        "cuda_error": wrong or ("" if sees else "torch sees no CUDA device"),
    }


def _flags(torch: Any) -> list[str]:
    """As get_arch_list, which says nothing where there is no card that works."""
    ask = getattr(torch._C, "_cuda_getArchFlags", None)
    return str(ask() or "").split() if ask is not None else []


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_describe()) + "\n")
