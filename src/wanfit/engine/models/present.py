"""How a network asks for the weights of the part that it is about to run.

A network runs each of its larger parts inside `with self.present(part):`. A network that lies on
the device as a whole has nothing to do there; for a streamed one, `weights.stream` puts the part's
weights in place before the body and takes them back after it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import nn

Present = Callable[[nn.Module], AbstractContextManager[None]]


def always_present(part: nn.Module) -> AbstractContextManager[None]:
    """For a network whose weights are all where they are used."""
    return nullcontext()
