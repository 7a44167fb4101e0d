"""Writes the trained networks of a run as a model directory, whole or as it ships.

    python -m training.export --run RUN [--output src/wanfit/demo]
    python -m training.export --run RUN/kept --model demo-t2v --output DIR [--shared]

A directory is whole, and `--weights DIR` runs it, unless --shared says otherwise: the package has
one text encoder for all demo models and one autoencoder for the two with two experts
(`wanfit.engine.weights.package`), so --shared leaves out what the model has from another.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from training import checkpoint, command, shapes
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.engine.weights.configs import FOLDERS
from wanfit.engine.weights.directory import write_directory
from wanfit.engine.weights.open import open_model
from wanfit.engine.weights.package import DEMO_DIRECTORY, borrowed
from wanfit.engine.weights.recognise import MODEL_INDEX
from wanfit.specs import DEMO, DEMO_I2V, DEMO_T2V, Expert, ModelSpec

CPU = torch.device("cpu")


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--run", type=Path, required=True)
    command.add_model(arguments, DEMO, DEMO_T2V, DEMO_I2V)
    arguments.add_argument("--output", type=Path, help="default: src/wanfit/demo for demo")
    arguments.add_argument("--shared", action="store_true", help="as it ships")
    args = arguments.parse_args()
    if args.output is None:
        if args.model != DEMO:
            arguments.error("--output is needed")
        args.output = Path("src/wanfit/demo")

    export(args.run, args.model, args.output)
    if args.shared:
        share(args.output, args.model)
    written = sum(f.stat().st_size for f in args.output.rglob("*") if f.is_file())
    print(f"{args.output}: {written} bytes")


def export(run: Path, spec: ModelSpec, output: Path) -> None:
    """The networks in `run` as a whole model directory."""
    vae = Vae(spec.vae)
    _fill(vae, run, "vae")
    dits: dict[Expert, Dit] = {}
    for expert in spec.experts:
        dits[expert] = Dit(spec.dit)
        _fill(dits[expert], run, _file_of(spec, expert))
    if spec == DEMO:
        umt5 = Umt5(spec.umt5)
        _fill(umt5, run, "umt5")
    else:
        umt5 = open_model(DEMO_DIRECTORY, DEMO).load_umt5(CPU, torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer_json = Path(scratch) / "tokenizer.json"
        shapes.write_tokenizer(tokenizer_json)
        write_directory(output, spec, umt5=umt5, dits=dits, vae=vae, tokenizer_json=tokenizer_json)


def share(directory: Path, spec: ModelSpec) -> None:
    """Takes away what the packaged model has from another."""
    for network in borrowed(spec):
        shutil.rmtree(directory / FOLDERS[network])
        if network == "umt5":
            shutil.rmtree(directory / "tokenizer")
    # Both tell diffusers of a whole pipeline, which this is not.
    (directory / MODEL_INDEX).unlink()
    shutil.rmtree(directory / "scheduler")


def _file_of(spec: ModelSpec, expert: Expert) -> str:
    """What `train_dit` and `train_experts` call it."""
    return "dit" if spec.boundary is None else f"{spec.task}-{expert.removesuffix('_noise')}"


def _fill(network: Dit | Umt5 | Vae, run: Path, prefix: str) -> None:
    tensors, note = checkpoint.load(run, prefix, CPU)
    network.load_state_dict(tensors)
    print(f"{prefix}: {note}")


if __name__ == "__main__":
    main()
