"""The options that every training command takes."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

from wanfit.specs import ModelSpec


def parser(description: str | None) -> argparse.ArgumentParser:
    """--run, --minutes, --seed and --device; a command adds what is its own."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--run", type=Path, required=True, help="directory of the run's files")
    options.add_argument("--minutes", type=float, required=True, help="of training, set-up apart")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return options


def add_sittings(options: argparse.ArgumentParser) -> None:
    """For the commands that may take several sittings of a lent GPU, and that compile."""
    options.add_argument("--of-minutes", type=float, help="the whole schedule, over all sittings")
    options.add_argument("--eager", action="store_true", help="do not compile")
    options.add_argument("--until", type=float, help="Unix time at which training ends at latest")


def add_model(options: argparse.ArgumentParser, *specs: ModelSpec) -> None:
    """--model, the first of `specs` where none is named; `args.model` is its spec."""

    def named(name: str) -> ModelSpec:
        for spec in specs:
            if spec.name == name:
                return spec
        raise argparse.ArgumentTypeError(f"one of {', '.join(spec.name for spec in specs)}")

    options.add_argument("--model", type=named, default=specs[0], metavar="NAME")


def sitting_s(args: argparse.Namespace) -> float:
    """Seconds that this sitting trains, from now: `--minutes`, and `--until` at latest."""
    left_s = math.inf if args.until is None else args.until - time.time()
    sitting: float = min(60 * args.minutes, left_s)
    return max(0.0, sitting)
