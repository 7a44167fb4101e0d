"""Writes the trained networks of a run as the model directory that ships with the package.

python -m training.export --run RUN [--output src/wanfit/demo]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from training import checkpoint, shapes
from wanfit.engine.models.dit import Dit
from wanfit.engine.models.umt5 import Umt5
from wanfit.engine.models.vae import Vae
from wanfit.engine.weights.directory import write_directory
from wanfit.specs import DEMO


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--run", type=Path, required=True)
    arguments.add_argument("--output", type=Path, default=Path("src/wanfit/demo"))
    args = arguments.parse_args()

    dit, umt5, vae = Dit(DEMO.dit), Umt5(DEMO.umt5), Vae(DEMO.vae)
    for prefix, network in (("dit", dit), ("umt5", umt5), ("vae", vae)):
        tensors, note = checkpoint.load(args.run, prefix, torch.device("cpu"))
        network.load_state_dict(tensors)
        print(f"{prefix}: {note}")
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer_json = Path(scratch) / "tokenizer.json"
        shapes.write_tokenizer(tokenizer_json)
        write_directory(
            args.output,
            DEMO,
            umt5=umt5,
            dits={"high_noise": dit},
            vae=vae,
            tokenizer_json=tokenizer_json,
        )
    written = sum(f.stat().st_size for f in args.output.rglob("*") if f.is_file())
    print(f"{args.output}: {written} bytes")


if __name__ == "__main__":
    main()
