"""Trains `demo-t2v` and `demo-i2v` on one lent GPU in one sitting, and keeps what there is.

    python -m training.run_two_experts --run RUN --minutes 12.5 [--vae-share 0.4]

Three processes, so that compiling, which takes minutes, costs none of training: the autoencoder
trains eagerly until another process has compiled its step and takes over; `train_experts` compiles
beside both and waits for the autoencoder. RUN/kept holds what is worth bringing home: at most six
files of about 9 MB in bf16 (vae, dense, t2v-high, t2v-low, i2v-high, i2v-low), each whole at any
time. RUN/log.txt is the log of all. A sitting with such files goes on from them: copy them into
RUN/kept first. An autoencoder that is there is not trained again, unless --vae-share says so, with
--decoder-only if the transformers are to keep their latents.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from training.train_experts import DEFAULT_STAGES
from training.train_vae import READY

EVALUATE_S = 25.0


class Crew:
    """The processes of a sitting, all writing one log."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.run: Path = args.run
        self.kept = args.run / "kept"
        self.kept.mkdir(parents=True, exist_ok=True)
        self.until = time.time() + 60 * args.minutes
        self.common = [f"--run={args.run}", f"--seed={args.seed}", f"--device={args.device}"]
        self.log = (args.run / "log.txt").open("a")
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, module: str, until: float, *options: str) -> subprocess.Popen[bytes]:
        minutes = f"--minutes={max(0.0, until - time.time()) / 60}"
        command = [sys.executable, "-u", "-m", f"training.{module}", *self.common, minutes]
        command += [f"--until={until}", f"--keep={self.kept}", *options]
        self.say(" ".join(command[2:]))
        process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT)
        self.processes.append(process)
        return process

    def say(self, text: str) -> None:
        left_s = self.until - time.time()
        print(f"[{left_s:.0f} s left] {text}", file=self.log, flush=True)

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        self.log.close()


def train_vae(crew: Crew, until: float, *, compile_beside: bool, decoder_only: bool) -> None:
    """Trains the autoencoder until then, the first part of the time without the compiler."""
    base = ["--model=demo-t2v"] + ["--decoder-only"] * decoder_only
    taker = crew.start("train_vae", until, *base, "--take-over") if compile_beside else None
    eager = crew.start("train_vae", until, *base, "--eager", "--hand-over")
    code = eager.wait()
    handed_over = code == 0 and not (crew.run / "vae.json").exists()
    if taker is None or (code == 0 and not handed_over):
        if taker is not None:
            taker.kill()
        return
    if code:  # the compiled one starts from nothing
        crew.say(f"the eager process ended with {code}")
        while taker.poll() is None and not (crew.run / READY).exists():
            time.sleep(0.5)
        (crew.run / READY).unlink(missing_ok=True)
    if taker.wait():
        crew.say(f"the compiled process ended with {taker.returncode}; eager again")
        crew.start("train_vae", until, *base, "--eager").wait()


def main() -> None:
    args = parse_arguments()
    crew = Crew(args)
    try:
        # Where an autoencoder came along, RUN/vae is that one and nobody waits for it.
        kept_vae = crew.kept / "vae.safetensors"
        share = args.vae_share
        if share is None:
            share = 0.0 if kept_vae.is_file() else 0.4
        if kept_vae.is_file() and share == 0:
            (args.run / "vae.safetensors").write_bytes(kept_vae.read_bytes())
        options = [f"--evaluate-s={EVALUATE_S if args.evaluate else 0}"]
        options += [f"--evaluate={args.evaluate}", "--stages", *args.stages]
        experts = crew.start("train_experts", crew.until, *options)
        if share > 0:
            until = time.time() + share * (crew.until - time.time())
            beside = args.device != "cpu"
            train_vae(crew, until, compile_beside=beside, decoder_only=args.decoder_only)
            crew.say("the autoencoder is done")
        if experts.wait():
            crew.say(f"train_experts ended with {experts.returncode}; once more without compiling")
            crew.start("train_experts", crew.until, "--eager", *options).wait()
        crew.say("done")
    finally:
        crew.end()


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--run", type=Path, required=True)
    options.add_argument("--minutes", type=float, required=True, help="all in all")
    options.add_argument("--vae-share", type=float, help="of the time; default 0.4, or 0 if kept")
    options.add_argument(
        "--decoder-only", action="store_true", help="of a kept autoencoder: the latents stay"
    )
    options.add_argument("--stages", nargs="+", default=DEFAULT_STAGES.split())
    options.add_argument("--evaluate", type=int, default=48, help="clips per line at the end")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="cuda")
    return options.parse_args(given)


if __name__ == "__main__":
    main()
