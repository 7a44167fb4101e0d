"""The options that every training command takes."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


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
