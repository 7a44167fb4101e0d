"""The server's log: one line for each thing worth a look, on stderr. No prompts, no secrets.

Left out: a line for each request (`/metrics` counts them).
"""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def start_log() -> None:
    """For the whole process. Libraries are heard from warnings on."""
    logging.basicConfig(stream=sys.stderr, format=FORMAT, level=logging.WARNING)
    logging.getLogger("wanfit").setLevel(logging.INFO)
    # It warns of every byte that a stranger's form has in the wrong place.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
