"""A hub on loopback that this process talks to, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from tests.hub_server import HubServer, hub_server
from wanfit.pull import transfer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server without repositories. The hub's cache is tmp_path/cache; waits are short.

    huggingface_hub reads its environment at import, so a running process is pointed elsewhere by
    its constants; children get the variables themselves (`tests.pull.children`).
    """
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(transfer, "SEGMENT_BYTES", 1 << 16)
        monkeypatch.setattr(transfer, "PROGRESS_BYTES", 8000)
        monkeypatch.setattr(transfer, "FIRST_WAIT_S", 0.01)
        monkeypatch.setattr(transfer, "MOST_WAIT_S", 0.02)
        yield server
        close_session()  # its connections go to a server that is no more
