"""Which model lies in a directory, from its JSON files alone. Imports no torch: answers at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wanfit.engine.weights import configs
from wanfit.engine.weights.headers import read_json
from wanfit.errors import BadOption, WeightsBroken, WeightsMismatch, WeightsMissing
from wanfit.plan.plan import Precision
from wanfit.specs import MODELS, ModelSpec, spec_named

MODEL_INDEX = "model_index.json"  # of a directory in diffusers layout
STORE_FILE = "wanfit.json"  # of a store
STORE_PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")  # that a store can have


def is_store(path: Path) -> bool:
    return (path / STORE_FILE).is_file()


def store_precision(name: str) -> Precision:
    """The precision of that name. Raises BadOption."""
    for precision in STORE_PRECISIONS:
        if precision == name:
            return precision
    raise BadOption(f"precision is {name!r}, not one of {', '.join(STORE_PRECISIONS)}")


def recognise(path: Path, models: Sequence[ModelSpec] = MODELS) -> ModelSpec:
    """The model of a store, or of a directory in diffusers layout, by its first transformer.

    Whether the rest belongs to it is for `open_model` to check. Raises WeightsMissing or
    WeightsBroken for the files that it reads, WeightsMismatch when they are of none of `models`.
    """
    if is_store(path):
        name = read_json(path / STORE_FILE).get("model")
        if not isinstance(name, str):
            raise WeightsBroken(f"{path / STORE_FILE} does not name its model")
        return next((spec for spec in models if spec.name == name), None) or spec_named(name)
    _check_directory(path)
    index = read_json(path / MODEL_INDEX)
    config = read_json(path / "transformer" / "config.json")
    for spec in models:
        try:
            configs.check_model_index(index, spec)
            configs.check_config(config, spec, "transformer")
        except WeightsMismatch:
            continue
        return spec
    raise WeightsMismatch(
        f"{path} holds none of {', '.join(spec.name for spec in models)}",
        hint="Name the model that it should be, to hear what differs",
    )


def check_configs(path: Path, spec: ModelSpec) -> None:
    """Raises WeightsError when the JSON files of a directory are not those of `spec`."""
    _check_directory(path, spec)
    configs.check_model_index(read_json(path / MODEL_INDEX), spec)
    for component in configs.components_of(spec):
        configs.check_config(read_json(path / component / "config.json"), spec, component)


def _check_directory(path: Path, spec: ModelSpec | None = None) -> None:
    if not path.is_dir():
        wanted = f"{spec.name} has to be there" if spec else "Give the directory of a model"
        raise WeightsMissing(f"There is no model directory at {path}", hint=wanted)
    if not (path / MODEL_INDEX).is_file():
        raise WeightsMissing(f"{path / MODEL_INDEX} is not there")
