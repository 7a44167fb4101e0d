"""The OpenAI face, by the official client, unmodified: helpers, pager, errors, lost replies."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import httpx2
import openai
import pytest
from PIL import Image

from tests.serve.harness import TINY, Running, wait_until

# OpenAI ends its own service; the shape lives on in other people's servers.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
KEY = "wf_test_key_of_the_environment_0123456789"
EXTRA = {"num_frames": 5, "num_inference_steps": 2}


@pytest.fixture
def server(locked_server: Running) -> Running:
    return locked_server


@pytest.fixture
def api(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=2) as api:
        yield api


def create(api: openai.OpenAI, **options: Any) -> openai.types.Video:
    return api.videos.create(
        prompt="a blue star",
        model="demo",
        size="64x64",  # type: ignore[arg-type]
        extra_body={**EXTRA, **options.pop("extra_body", {})},
        **options,
    )


def png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(data, format="PNG")
    return data.getvalue()


@contextmanager
def worker(server: Running, act: Callable[[], object]) -> Iterator[None]:
    """Does something as soon as a job waits."""

    def work() -> None:
        wait_until(lambda: server.store.counts()["queued"] > 0)
        act()

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


class TestClient:
    def test_create_and_poll_ends_with_a_video_to_download(
        self, server: Running, api: openai.OpenAI, tmp_path: Any
    ) -> None:
        """The client's own helper waits as we tell it, and its download gives the bytes."""
        with worker(server, server.finish):
            video = api.videos.create_and_poll(
                prompt="a blue star", model="demo", size="64x64",  # type: ignore[arg-type]
                extra_body=EXTRA,
            )  # fmt: skip
        assert video.status == "completed"
        assert (video.progress, video.size, video.seconds) == (100, "64x64", "0.312")
        assert video.completed_at is not None
        clip = api.videos.download_content(video.id)
        assert clip.read()[4:8] == b"ftyp"
        thumbnail = api.videos.download_content(video.id, variant="thumbnail").read()
        assert Image.open(io.BytesIO(thumbnail)).format == "WEBP"
        sheet = api.videos.download_content(video.id, variant="spritesheet")
        sheet.write_to_file(tmp_path / "sheet.jpg")
        assert (tmp_path / "sheet.jpg").read_bytes().startswith(b"\xff\xd8\xff")

    def test_progress_is_real(self, server: Running, api: openai.OpenAI) -> None:
        video = create(api)
        assert (video.status, video.progress) == ("queued", 0)
        claim = server.begin(percent=40)
        found = api.videos.retrieve(video.id)
        assert (found.status, found.progress) == ("in_progress", 40)
        server.finish(claim)

    def test_a_failed_and_a_cancelled_video_are_failed_with_a_code(
        self, server: Running, api: openai.OpenAI
    ) -> None:
        """The client's helper takes any word that it does not know for the end."""
        with worker(server, server.fail):
            video = api.videos.create_and_poll(prompt="x", model="demo", extra_body=EXTRA)
        assert video.status == "failed"
        assert video.error is not None
        assert (video.error.code, video.error.message) == (
            "worker_crashed", "It broke. Try less",
        )  # fmt: skip

        def cancel() -> None:
            server.store.cancel(server.store.page().jobs[0].id)

        with worker(server, cancel):
            video = api.videos.create_and_poll(prompt="x", model="demo", extra_body=EXTRA)
        assert video.status == "failed"
        assert video.error is not None
        assert video.error.code == "cancelled"

    def test_the_pager_sees_every_video_once_while_others_come(
        self, server: Running, api: openai.OpenAI
    ) -> None:
        made = [create(api).id for _ in range(5)]
        seen = []
        for count, video in enumerate(api.videos.list(limit=2)):
            if count == 1:
                create(api)
            seen.append(video.id)
        assert seen[:5] == made[::-1]
        assert len(seen) == len(set(seen))
        oldest = api.videos.list(limit=3, order="asc")
        assert oldest.has_more
        assert oldest.last_id == oldest.data[-1].id
        for _ in range(6):
            server.finish()

    def test_delete_forgets_it(self, server: Running, api: openai.OpenAI) -> None:
        video = create(api)
        server.finish()
        assert api.videos.delete(video.id).deleted is True
        for call in (api.videos.retrieve, api.videos.delete, api.videos.download_content):
            with pytest.raises(openai.NotFoundError):
                call(video.id)

    def test_remix_changes_the_prompt_alone(self, server: Running, api: openai.OpenAI) -> None:
        video = create(api, input_reference=("x.png", png()))
        with pytest.raises(openai.BadRequestError, match="not completed"):
            api.videos.remix(video.id, prompt="a red ring")
        source = server.finish()
        remix = api.videos.remix(video.id, prompt="a red ring")
        assert (remix.prompt, remix.remixed_from_video_id) == ("a red ring", video.id)
        job = server.finish()
        assert {**job.request, "prompt": None} == {**source.request, "prompt": None}
        assert server.store.image(remix.id) == server.store.image(video.id)

    def test_models_are_those_that_are_here(self, api: openai.OpenAI) -> None:
        assert [model.id for model in api.models.list()] == ["demo"]
        assert api.models.retrieve("demo").object == "model"
        with pytest.raises(openai.NotFoundError):
            api.models.retrieve("sora-2")

    def test_how_long_to_wait_comes_from_the_plan(
        self, api: openai.OpenAI, server: Running
    ) -> None:
        raw = api.videos.with_raw_response.create(prompt="x", model="demo", extra_body=EXTRA)
        short = int(raw.headers["openai-poll-after-ms"])
        for _ in range(3):
            create(api, extra_body={"num_frames": 121, "num_inference_steps": 400})
        raw = api.videos.with_raw_response.create(prompt="x", model="demo", extra_body=EXTRA)
        assert 250 <= short < int(raw.headers["openai-poll-after-ms"]) <= 10_000
        for _ in range(5):
            server.fail()


class TestErrors:
    def test_every_status_is_the_client_s_own_error(
        self, server: Running, api: openai.OpenAI
    ) -> None:
        with pytest.raises(openai.BadRequestError) as bad:
            create(api, extra_body={"colour": "red"})
        assert bad.value.param == "colour"
        assert bad.value.code == "unknown_parameter"
        assert bad.value.type == "invalid_request_error"
        assert bad.value.request_id
        with pytest.raises(openai.NotFoundError) as missing:
            api.videos.retrieve("video_none")
        assert missing.value.code == "no_such_job"
        stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wf_wrong", max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError) as refused:
            stranger.models.list()
        assert refused.value.code == "invalid_api_key"
        with pytest.raises(openai.NotFoundError, match="weights"):
            api.videos.create(prompt="x", model="t2v-a14b", extra_body={"size": "832x480"})

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({}, "prompt"),
            ({"prompt": "x", "num_frames": 6}, "num_frames"),
            ({"prompt": "x", "num_frames": "many"}, "num_frames"),
            ({"prompt": "x", "size": "65x64"}, "size"),
            ({"prompt": "x", "size": "big"}, "size"),
            ({"prompt": "x", "seconds": "-1"}, "seconds"),
            ({"prompt": "x", "seconds": "nan"}, "seconds"),
            ({"prompt": "x", "fps": 30}, "fps"),
            ({"prompt": "x", "boundary_ratio": 0.5}, "boundary"),
            ({"prompt": "x", "model": "sora-2"}, "model"),
            ({"prompt": "x", "input_reference": "!!"}, "input_reference"),
            ({"prompt": "x", "input_reference": {"file_id": "file_1"}}, "input_reference"),
            ({"prompt": "x", "input_reference": {"image_url": "ftp://a/b"}}, "input_reference"),
            ({"prompt": "x", "extra_body": "{"}, "extra_body"),
            ({"prompt": "x", "extra_body": {"prompt": "y"}}, "prompt"),
            ({"prompt": "x", "loras": []}, "loras"),
        ],
    )
    def test_what_is_wrong_is_named(
        self, server: Running, fields: dict[str, Any], param: str
    ) -> None:
        with server.client(KEY) as client:
            reply = client.post("/v1/videos", json=fields)
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["param"] == param

    def test_too_large_for_this_machine_says_what_would_fit(self, tmp_path: Any) -> None:
        """422 with numbers and fields, and nothing in the queue."""
        from tests.serve.harness import running

        with running(tmp_path, ram_bytes=1 << 30) as small:
            api = openai.OpenAI(base_url=f"{small.url}/v1", api_key="x", max_retries=0)
            with api, pytest.raises(openai.UnprocessableEntityError) as refused:
                api.videos.create(
                    prompt="x", size="1280x1280",  # type: ignore[arg-type]
                    extra_body={"num_frames": 121},
                )  # fmt: skip
            error = refused.value.body
            assert isinstance(error, dict)
            assert error["code"] == "does_not_fit"
            shortage = error["shortage"]
            assert shortage["needed_bytes"] > shortage["budget_bytes"]
            change = next(advice["change"] for advice in shortage["advice"] if advice["change"])
            fitting = {"width": 1280, "height": 1280, "num_frames": 121, **change}
            with small.client() as client:
                reply = client.post("/v1/plan", json=fitting)
                assert reply.status_code == 200
                assert client.get("/health").json()["jobs"]["inQueue"] == 0


class TestWays:
    """The same request in every encoding that a client may choose."""

    WANTED: ClassVar[dict[str, Any]] = {
        "num_frames": 9, "num_inference_steps": 3, "guidance_high": 4.0, "guidance_low": 3.0,
        "shift": 5.0, "seed": 11, "negative_prompt": "blurry",
    }  # fmt: skip
    FIELDS: ClassVar[dict[str, Any]] = {
        "num_frames": 9, "fps": 16, "num_inference_steps": 3, "guidance_scale": 4.0,
        "guidance_scale_2": 3.0, "flow_shift": 5.0, "seed": 11, "negative_prompt": "blurry",
    }  # fmt: skip

    def check(self, server: Running, reply: httpx2.Response) -> None:
        assert reply.status_code == 200, reply.text
        request = server.store.get(reply.json()["id"]).request
        assert {name: request[name] for name in self.WANTED} == self.WANTED
        server.finish()

    def test_the_official_client_s_form(self, server: Running, api: openai.OpenAI) -> None:
        raw = api.videos.with_raw_response.create(prompt="x", extra_body=self.FIELDS)
        self.check(server, raw.http_response)

    @pytest.mark.parametrize(
        "body",
        [
            FIELDS,
            {"extra_body": FIELDS},
            {"extra_body": json.dumps(FIELDS)},
            {name: str(value) for name, value in FIELDS.items()},
        ],
    )
    def test_json(self, server: Running, body: dict[str, Any]) -> None:
        with server.client(KEY) as client:
            self.check(server, client.post("/v1/videos", json={"prompt": "x", **body}))

    @pytest.mark.parametrize("as_file", [True, False])
    @pytest.mark.parametrize(
        "fields",
        [
            {name: str(value) for name, value in FIELDS.items()},
            {"extra_body": json.dumps(FIELDS)},
            {f"extra_body[{name}]": str(value) for name, value in FIELDS.items()},
        ],
    )
    def test_forms(self, server: Running, fields: dict[str, str], as_file: bool) -> None:
        """Multipart, with a picture or without, and URL-encoded."""
        files = {"input_reference": ("../../etc/passwd", png(), "image/png")} if as_file else None
        with server.client(KEY) as client:
            reply = client.post("/v1/videos", data={"prompt": "x", **fields}, files=files)
            self.check(server, reply)
        image = server.store.image(reply.json()["id"])
        assert (image is not None) is as_file

    def test_seconds_are_frames_of_the_model(self, server: Running, api: openai.OpenAI) -> None:
        """The nearest legal number; the reply repeats what was asked."""
        video = api.videos.create(prompt="x", seconds="4", extra_body={"num_inference_steps": 1})
        assert video.seconds == "4"
        assert server.finish().request["num_frames"] == 65

    @pytest.mark.parametrize("key", ["input_reference", "image"])
    def test_a_picture_as_a_data_url(self, server: Running, key: str) -> None:
        url = "data:image/png;base64," + base64.b64encode(png()).decode()
        with server.client(KEY) as client:
            for given in (url, {"image_url": url}):
                reply = client.post("/v1/videos", json={"prompt": "x", key: given, **TINY})
                assert reply.status_code == 200, reply.text
                assert server.finish().has_image


class TestOnce:
    """A reply that was lost must not make a second video."""

    def test_the_client_sends_again_and_gets_the_first_video(self, server: Running) -> None:
        """Accepted, reply lost, 503, reply: three identical POSTs by the client, and one job."""
        lost = _Losing(server)
        before = sum(server.store.counts().values())
        http = openai.DefaultHttpx2Client(transport=lost)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, http_client=http) as api:
            video = create(api, input_reference=("x.png", png()))
        assert lost.retries == ["0", "1", "2"]
        assert sum(server.store.counts().values()) == before + 1
        assert server.finish().id == video.id

    def test_two_equal_requests_that_are_no_retries_are_two_videos(
        self, server: Running, api: openai.OpenAI
    ) -> None:
        assert create(api).id != create(api).id
        server.finish()
        server.finish()

    def test_an_idempotency_key_leads(self, server: Running, api: openai.OpenAI) -> None:
        headers = {"Idempotency-Key": "order-1"}
        first = create(api, extra_headers=headers)
        assert create(api, extra_headers=headers).id == first.id
        with pytest.raises(openai.UnprocessableEntityError) as refused:
            create(api, extra_headers=headers, extra_body={"seed": 5})
        assert refused.value.code == "key_reused"
        server.finish()


class _Losing(httpx2.BaseTransport):
    """Hands requests on, and loses the first two replies as networks do."""

    def __init__(self, server: Running) -> None:
        self._inner = httpx2.HTTPTransport()
        self.retries: list[str] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.retries.append(request.headers["x-stainless-retry-count"])
        reply = self._inner.handle_request(request)
        if len(self.retries) == 1:
            reply.read()
            raise httpx2.ReadError("the connection broke")
        if len(self.retries) == 2:
            reply.read()
            return httpx2.Response(503, headers={"retry-after-ms": "10"})
        return reply

    def close(self) -> None:
        self._inner.close()
