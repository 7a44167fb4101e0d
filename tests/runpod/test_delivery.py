"""What happens to a clip that an answer cannot hold."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.serve.harness import write_clip
from wanfit.outputs import LocalOutputs, Retention
from wanfit.serve.problems import Problem
from wanfit.worker import delivery


def test_a_clip_goes_in_the_answer_or_is_an_error_that_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit it is in the answer, a byte above it is refused, never cut off."""
    outputs = LocalOutputs(tmp_path / "outputs", Retention(min_free_bytes=0))
    draft = outputs.draft("job", "lease")
    write_clip(draft)
    data = draft.read_bytes()
    kept = outputs.keep(draft, job_id="job", attempt=1, lease="lease", metadata={})
    job: Any = SimpleNamespace(id="job", result=kept)

    monkeypatch.setattr(delivery, "MAX_BASE64_BYTES", len(data))
    video = delivery.deliver(job, outputs, 60.0, None, has_bucket=False)
    assert base64.b64decode(video["video_base64"]) == data

    monkeypatch.setattr(delivery, "MAX_BASE64_BYTES", len(data) - 1)
    with pytest.raises(Problem) as raised:
        delivery.deliver(job, outputs, 60.0, None, has_bucket=False)
    assert raised.value.code == "output_too_large"
    assert str(len(data)) in raised.value.message
    assert "BUCKET_ENDPOINT_URL" in raised.value.hint
