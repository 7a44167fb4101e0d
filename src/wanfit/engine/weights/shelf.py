"""All weight files of a place, and which of them is which network of a model. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import assert_never

from wanfit.engine.weights.headers import read_weight_map
from wanfit.engine.weights.keys import listed
from wanfit.engine.weights.parts import NetworkFamily, Part, read_parts
from wanfit.engine.weights.places import Place, walk
from wanfit.errors import WeightsError, WeightsMismatch, WeightsMissing
from wanfit.plan.plan import NetworkName
from wanfit.specs import ModelSpec


def family_of(network: NetworkName) -> NetworkFamily:
    """What kind of network it is: both experts are transformers."""
    match network:
        case "umt5" | "vae":
            return network
        case "high_noise" | "low_noise":
            return "dit"
        case _:
            assert_never(network)


def network_title(spec: ModelSpec, network: NetworkName) -> str:
    """A network as people call it."""
    match network:
        case "umt5":
            return "text encoder"
        case "vae":
            return "VAE"
        case "high_noise" | "low_noise":
            if spec.boundary is None:
                return "transformer"
            return f"{network.removesuffix('_noise')}-noise expert"
        case _:
            assert_never(network)


def option_for(network: NetworkName) -> str:
    """The option of `wanfit convert` that names a file for it."""
    match network:
        case "high_noise":
            return "--high"
        case "low_noise":
            return "--low"
        case "umt5":
            return "--text-encoder"
        case "vae":
            return "--vae"
        case _:
            assert_never(network)


def another_model(part: Part, spec: ModelSpec) -> WeightsMismatch:
    """That `part` is of a model, and not of `spec`."""
    owner = part.models[0]
    match part.family:
        case "umt5" | "vae":
            title = network_title(owner, part.family)
        case "lora":
            title = "LoRA"
        case "dit":
            title = network_title(owner, part.expert) if part.expert else "transformer"
    return WeightsMismatch(
        f"{part.path} is {owner.name}'s {title}, and {spec.name} was asked for",
        hint=f"Give the files of {spec.name}, or --model {owner.name}",
    )


class Shelf:
    """The parts that lie at a place, and why other files there are none."""

    def __init__(self, path: Path, models: Sequence[ModelSpec]) -> None:
        """path: a directory, or a weight file: then its directory, and the file first.

        Raises WeightsError for a named file that cannot be read; what else cannot be read matters
        only when a network is lacking.
        """
        self.path = path
        self.parts: list[Part] = []
        self.errors: list[WeightsError] = []
        self._models = models
        self._named = None if path.is_dir() else path
        found = walk(Place(path if path.is_dir() else path.parent, "named"), set())
        shards: set[Path] = set()
        for index in found.indexes:
            try:
                shards |= {index.parent / shard for shard in read_weight_map(index).values()}
            except WeightsError as error:
                self.errors.append(error)
            else:
                self._read(index)
        for file in found.weights:
            if file not in shards:
                self._read(file)
        if self._named and not any(part.path == self._named for part in self.parts):
            self.parts += read_parts(self._named, models)  # of a name that no walk looks at

    def _read(self, file: Path) -> None:
        try:
            self.parts += read_parts(file, self._models)
        except WeightsError as error:
            if file == self._named:
                raise
            self.errors.append(error)

    def transformers(self) -> list[Part]:
        """The file that was named, or all transformers that are here."""
        found = [part for part in self.parts if part.family == "dit"]
        return [part for part in found if part.path == self._named] or found

    def pick(
        self, spec: ModelSpec, network: NetworkName, others: Collection[NetworkName] = ()
    ) -> Part:
        """The one part that is `network`. `others`: networks whose files are given already.

        Raises WeightsMismatch where several could be, WeightsError where none is.
        """
        of_family = [part for part in self.parts if part.family == family_of(network)]
        fitting = [part for part in of_family if spec in part.models]
        if spec.boundary is not None and family_of(network) == "dit":
            sure = [part for part in fitting if part.expert == network]
            untold = [part for part in fitting if part.expert is None]
            fitting = sure or (untold if {"high_noise", "low_noise"} & set(others) else [])
        fitting = [part for part in fitting if part.path == self._named] or _once(fitting)
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise WeightsMismatch(
                f"{self.path} has {len(fitting)} files for the {network_title(spec, network)} of"
                f" {spec.name}: {listed([str(part.path) for part in fitting])}",
                hint=f"Say which with {option_for(network)} FILE (wanfit convert)",
            )
        raise self._lacking(spec, network, of_family)

    def _lacking(
        self, spec: ModelSpec, network: NetworkName, of_family: Sequence[Part]
    ) -> WeightsError:
        """Why there is no such part: the most telling reason."""
        if self.errors:
            return self.errors[0]
        strangers = [part for part in of_family if spec not in part.models]
        if strangers:
            return another_model(strangers[0], spec)
        title, option = network_title(spec, network), option_for(network)
        untold = [str(part.path) for part in of_family if part.expert is None]
        if untold and family_of(network) == "dit":
            return WeightsMissing(
                f"{self.path} has no file that is named as the {title} of {spec.name}, but"
                f" {listed(untold)}",
                hint=f"Only names tell the experts apart; say which with {option} FILE",
            )
        return WeightsMissing(
            f"{self.path} has no {title} of {spec.name}",
            hint=f"wanfit pull {spec.name} brings all, wanfit convert takes a file with {option}",
        )


def _once(parts: Iterable[Part]) -> list[Part]:
    """Without those that are the same file under another name."""
    return list({part.path.resolve(): part for part in parts}.values())
