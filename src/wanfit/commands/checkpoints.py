"""`wanfit models`, `wanfit pull` and `wanfit convert`: which weights are here, and getting them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wanfit.commands import Interrupted, say_json
from wanfit.errors import BadOption, WeightsBroken, WeightsError

if TYPE_CHECKING:
    from wanfit.engine.weights.checkpoint import Chosen
    from wanfit.engine.weights.files import ModelFiles
    from wanfit.engine.weights.search import Findings, Found
    from wanfit.plan.plan import NetworkName
    from wanfit.specs import ModelSpec

_JSON = typer.Option("--json", help="Print the report as JSON.")
_ORIGINAL_CHECKED = "verified: names, shapes and lengths; an original has no checksums"


def models(
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read every store and compare it with its checksums."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """Show which models are on this machine, whether they are whole, and whether they fit."""
    from wanfit.commands.listing import listing_json, print_listing
    from wanfit.engine.weights.search import search

    findings = search()
    checked, broken = _verify(findings) if verify else ({}, [])
    if as_json:
        say_json(listing_json(findings, checked))
    else:
        print_listing(findings, checked)
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise WeightsBroken(f"{broken[0].message}{more}", hint=broken[0].hint)


def _verify(findings: Findings) -> tuple[dict[Path, str], list[WeightsError]]:
    """(path -> what was found, damage) of everything complete."""
    from wanfit.progress import byte_progress

    checked: dict[Path, str] = {}
    broken: list[WeightsError] = []
    whole = [found for found in findings.found if found.is_complete]
    total_bytes = sum(found.num_bytes for found in whole if found.kind == "store")
    done_bytes = 0
    with byte_progress() as progress:
        for found in whole:
            try:
                if found.kind == "store":
                    for num_bytes in _verified_units(found):
                        done_bytes += num_bytes
                        progress.show(found.path.name, done_bytes, total_bytes)
                    checked[found.path] = "verified: every checksum is right"
                else:
                    from wanfit.engine.weights.checkpoint import open_parts

                    open_parts(found.choose())
                    checked[found.path] = _ORIGINAL_CHECKED
            except WeightsError as error:
                checked[found.path] = f"damaged: {error.message}"
                broken.append(error)
    return checked, broken


def _verified_units(found: Found) -> Iterator[int]:
    """Bytes of each unit of a store, once they were found to be right. Raises WeightsError."""
    from wanfit.engine.weights.store import open_store
    from wanfit.engine.weights.verify import verify_units

    for unit in verify_units(open_store(found.path, found.spec)):
        yield unit.num_bytes


def pull(
    model: Annotated[str, typer.Argument(help="Which model; see wanfit models.")],
    precision: Annotated[str, typer.Option(help="Of the transformers: bf16 or fp8.")] = "bf16",
    output: Annotated[
        str | None,
        typer.Option(
            help="Where the store goes. Default: MODEL-PRECISION in the first directory of"
            " WANFIT_MODELS, on RunPod's volume, or in ~/.local/share/wanfit/models.",
            metavar="DIR",
        ),
    ] = None,
    lean: Annotated[
        bool,
        typer.Option("--lean", help="Keep one shard of the original on the disk at most."),
    ] = False,
    keep_original: Annotated[
        bool,
        typer.Option("--keep-original", help="Leave what was downloaded in the hub's cache."),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    repo: Annotated[
        str | None,
        typer.Option(help="Default: the authors'. Of either layout.", metavar="OWNER/NAME"),
    ] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Bring MODEL from the Hugging Face hub and make a store of it. Stopped, it continues."""
    from wanfit.engine.weights.places import pull_directory
    from wanfit.engine.weights.recognise import store_precision
    from wanfit.progress import byte_progress
    from wanfit.specs import DEMO, spec_named

    stored, spec = store_precision(precision), spec_named(model)
    if spec == DEMO and repo is None:
        raise BadOption("demo is part of wanfit already", hint="wanfit generate needs no more")
    target = Path(output) if output else pull_directory() / f"{spec.name}-{stored}"

    from wanfit.pull import pull_model

    with _kept("what was downloaded and converted"), byte_progress() as progress:
        report = pull_model(
            spec,
            target,
            stored,
            repository=repo,
            revision=revision,
            lean=lean,
            keep_original=keep_original,
            on_step=lambda step: progress.show(
                f"{step.phase} {Path(step.what).name}", step.done_bytes, step.total_bytes
            ),
        )
    if as_json:
        say_json(report.to_json())
        return
    done = "was there already" if report.already_there else f"in {report.total_s:.0f} s"
    typer.echo(f"{spec.name} in {stored}: {report.store_bytes / 1e9:.2f} GB, {done}", err=True)
    typer.echo(report.output)


def _part(what: str, *names: str) -> Any:
    return typer.Option(*names, help=f"Take the {what} from this file.", metavar="FILE")


def _adapter(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, metavar="FILE[:STRENGTH]")


def convert(  # noqa: PLR0913  one parameter per option is how typer reads a command line
    source: Annotated[
        str,
        typer.Argument(
            help="A model directory of any layout, a file in one, or a store in bf16.",
            metavar="SOURCE",
            show_default=False,
        ),
    ],
    output: Annotated[
        str, typer.Option(help="A new directory, or a store to replace.", metavar="DIR")
    ],
    model: Annotated[
        str | None, typer.Option(help="Which model it is. Default: what its files say.")
    ] = None,
    precision: Annotated[str, typer.Option(help="Of the transformers: bf16 or fp8.")] = "bf16",
    high: Annotated[str | None, _part("high-noise expert", "--high")] = None,
    low: Annotated[str | None, _part("low-noise expert", "--low")] = None,
    text_encoder: Annotated[str | None, _part("text encoder", "--text-encoder")] = None,
    vae: Annotated[str | None, _part("VAE", "--vae")] = None,
    tokenizer: Annotated[str | None, _part("tokenizer", "--tokenizer")] = None,
    lora: Annotated[
        list[str] | None, _adapter("Merge a LoRA; may be given several times.", "--lora")
    ] = None,
    lora_high: Annotated[
        list[str] | None, _adapter("The same for the high-noise expert alone.", "--lora-high")
    ] = None,
    lora_low: Annotated[
        list[str] | None, _adapter("The same for the low-noise expert alone.", "--lora-low")
    ] = None,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Write the model in SOURCE as a store, which streams best. Stopped, it continues."""
    from wanfit.engine.weights.lora import merge_for
    from wanfit.engine.weights.partial import check_target
    from wanfit.engine.weights.recognise import recognise, store_precision
    from wanfit.progress import byte_progress
    from wanfit.specs import spec_named

    stored = store_precision(precision)
    spec = None if model is None else spec_named(model)
    check_target(Path(source), Path(output))
    named = {"high": high, "low": low, "text_encoder": text_encoder, "vae": vae}
    parts = {
        name: Path(file)
        for name, file in {**named, "tokenizer": tokenizer}.items()
        if file is not None
    }
    both, for_high, for_low = (
        [_with_strength(text) for text in texts or ()] for texts in (lora, lora_high, lora_low)
    )
    chosen = _choose(Path(source), spec, parts)
    spec = chosen.spec if chosen else spec or recognise(Path(source))
    merge = merge_for(spec, for_high, for_low, both=both) if both or for_high or for_low else None

    from wanfit.engine.weights.convert import convert_model

    with _kept("what was converted"), byte_progress() as progress:
        report = convert_model(
            _opened(Path(source), spec, chosen),
            Path(output),
            stored,
            lambda step: progress.show(step.network, step.done_bytes, step.total_bytes),
            merge,
        )
    about = report.to_json()
    if as_json:
        say_json(about)
        return
    typer.echo(
        f"{spec.name} in {stored}: {about['store_bytes'] / 1e9:.2f} GB in {report.total_s:.1f} s,"
        f" {about['mb_per_s']:.0f} MB/s",
        err=True,
    )
    typer.echo(report.output)


def _choose(source: Path, spec: ModelSpec | None, parts: dict[str, Path]) -> Chosen | None:
    """Which file each network comes from; None for a store."""
    from wanfit.engine.weights.checkpoint import choose
    from wanfit.engine.weights.recognise import is_store

    if is_store(source):
        if parts:
            raise BadOption(
                f"{source} is a store, and its parts cannot be taken from elsewhere",
                hint="Give the files that it was made from",
            )
        return None
    return choose(source, spec, **parts)


def _opened(source: Path, spec: ModelSpec, chosen: Chosen | None) -> ModelFiles:
    """The source, checked; says on stderr what it is."""
    if chosen is None:
        from wanfit.engine.weights.store import open_store

        files = open_store(source, spec)
        typer.echo(f"store: {files.precision}, {source}", err=True)
        return files
    from wanfit.engine.weights.checkpoint import open_parts
    from wanfit.engine.weights.shelf import network_title

    files = open_parts(chosen)
    networks: tuple[NetworkName, ...] = (*spec.experts, "umt5", "vae")
    for network in networks:
        part = chosen.networks[network]
        typer.echo(f"{network_title(spec, network)}: {part.storage}, {part.path}", err=True)
    return files


def _with_strength(text: str) -> tuple[Path, float]:
    """(file, strength) of "FILE" or "FILE:STRENGTH"."""
    file, colon, number = text.rpartition(":")
    try:
        return (Path(file), float(number)) if colon else (Path(text), 1.0)
    except ValueError:
        return Path(text), 1.0


@contextmanager
def _kept(what: str) -> Iterator[None]:
    """After a signal, says what the next run finds."""
    try:
        yield
    except Interrupted:
        typer.echo(f"note: {what} is kept; the same command continues there", err=True)
        raise
