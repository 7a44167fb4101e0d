"""The demo models that ship in the package, and what each has from another.

A model has a directory of its name. One text encoder serves all of them, and the models with two
experts have one autoencoder, as the official ones do; the files are there once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from wanfit.engine.weights.checkpoint import Chosen, choose
from wanfit.engine.weights.configs import FOLDERS
from wanfit.plan.plan import NetworkName
from wanfit.specs import DEMO, DEMO_I2V, DEMO_T2V, ModelSpec

PACKAGE = Path(__file__).parents[2]
DEMO_DIRECTORY = PACKAGE / DEMO.name

_LENDERS: Mapping[ModelSpec, Mapping[NetworkName, ModelSpec]] = {
    DEMO: {},
    DEMO_T2V: {"umt5": DEMO},
    DEMO_I2V: {"umt5": DEMO, "vae": DEMO_T2V},
}


def borrowed(spec: ModelSpec) -> Mapping[NetworkName, ModelSpec]:
    """The networks that a packaged model has from another, and from which."""
    return _LENDERS[spec]


def packaged(spec: ModelSpec) -> Path | None:
    """The directory of a model that ships; None for all others."""
    path = PACKAGE / spec.name
    return path if spec in _LENDERS and path.is_dir() else None


def packaged_directories() -> tuple[Path, ...]:
    """Those of all models that ship."""
    return tuple(path for spec in _LENDERS if (path := packaged(spec)) is not None)


def choose_packaged(spec: ModelSpec) -> Chosen:
    """The files of a model that ships. Raises WeightsError, as `checkpoint.choose`."""
    path = packaged(spec)
    assert path is not None, spec.name
    lent = {
        network: PACKAGE / lender.name / FOLDERS[network]
        for network, lender in borrowed(spec).items()
    }
    return choose(path, spec, text_encoder=lent.get("umt5"), vae=lent.get("vae"))
