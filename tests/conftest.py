"""Models that several tests share: real directories on disk, with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A deadline per example fails on a busy machine, and says nothing about the code.
settings.register_profile("wanfit", deadline=None)
settings.load_profile("wanfit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a CUDA device, tests marked `gpu` are reported as skipped."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of `tiny_models.TINY_TI2V`: a few channels wide, so a clip takes milliseconds."""
    from tests.engine.tiny_models import TINY_TI2V, write_tiny

    return write_tiny(tmp_path_factory.mktemp("models") / "tiny-ti2v", TINY_TI2V).path


@pytest.fixture(scope="session")
def random_demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the demo model's shape, for the command line, which knows no tiny models."""
    from tests.engine.tiny_models import write_tiny
    from wanfit.specs import DEMO

    path = tmp_path_factory.mktemp("models") / "demo"
    return write_tiny(path, DEMO, dtype=torch.bfloat16).path
