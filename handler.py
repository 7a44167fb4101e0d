"""What RunPod looks for at a repository's root. The worker is `wanfit worker runpod`."""

from __future__ import annotations

import sys

from wanfit.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["worker", "runpod"]
    main()
