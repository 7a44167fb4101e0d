"""Settings of the environment, and `wanfit keys`."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from wanfit.cli import run
from wanfit.errors import BadOption, BadSetting
from wanfit.serve.keys import KeyFile, Keyring
from wanfit.settings import PREFIX, VARIABLES, Limits, Settings, read_settings


class TestEnvironment:
    def test_without_variables_it_is_safe(self) -> None:
        settings = read_settings({})
        assert settings.is_loopback
        assert settings.cors_origins == settings.allowed_targets == ()
        assert settings.log_prompts is False
        assert settings == dataclasses.replace(Settings(), data=settings.data)

    def test_every_variable_sets_a_field_and_every_field_has_one(self) -> None:
        """An example for each, so none is read and then forgotten."""
        examples = {
            "HOST": "0.0.0.0", "PORT": "9", "DATA": "/d", "DATABASE": "x.db", "OUTPUTS": "s3://b/p",
            "S3_ENDPOINT": "http://minio:9000", "KEEP_DAYS": "2", "KEEP_BYTES": "5GB",
            "MIN_FREE": "2GiB", "API_KEY": "k", "REQUESTS_PER_SECOND": "2", "JOBS_PER_MINUTE": "3",
            "QUEUED_PER_KEY": "4", "MAX_WORK": "5", "MAX_QUEUED": "6", "MAX_BODY": "1MB",
            "BODY_SECONDS": "7", "PUBLIC_URL": "https://v.example/", "ALLOWED_HOSTS": "a, b",
            "CORS_ORIGINS": "https://a", "ALLOWED_TARGETS": "minio.lan:9000", "URL_SECONDS": "8",
            "MODEL": "ti2v-5b", "DEVICE": "cpu", "PRECISION": "fp32", "VRAM": "8GiB", "RAM": "9GB",
            "JOB_SECONDS": "10", "GRACE_SECONDS": "11", "CACHE": "1", "WEBHOOK_SECRET": "whsec_x",
            "LOG_PROMPTS": "true",
        }  # fmt: skip
        assert set(examples) == {variable.name for variable in VARIABLES}
        settings = read_settings({PREFIX + name: text for name, text in examples.items()})
        default = Settings()
        unset = [
            field.name for field in dataclasses.fields(Settings)
            if getattr(settings, field.name) == getattr(default, field.name)
        ]  # fmt: skip
        assert unset == []
        unset = [
            field.name for field in dataclasses.fields(Limits)
            if getattr(settings.limits, field.name) == getattr(default.limits, field.name)
        ]  # fmt: skip
        assert unset == []
        assert settings.keep_s == 2 * 86_400
        assert settings.allowed_hosts == ("a", "b")
        assert settings.public_url == "https://v.example"
        assert not settings.is_loopback

    @pytest.mark.parametrize(
        ("name", "text"),
        [("PORT", "x"), ("PORT", "70000"), ("PORT", "-1"), ("VRAM", "much"), ("CACHE", "maybe"),
         ("BODY_SECONDS", "nan"), ("KEEP_DAYS", "-1"), ("PUBLIC_URL", "v.example"),
         ("MAX_QUEUED", "0"), ("GRACE_SECONDS", "inf")],
    )  # fmt: skip
    def test_what_is_illegal_names_its_variable(self, name: str, text: str) -> None:
        with pytest.raises(BadSetting, match=f"WANFIT_{name}"):
            read_settings({PREFIX + name: text})

    def test_no_secret_is_in_a_repr(self) -> None:
        given = {"WANFIT_API_KEY": "k" * 30, "WANFIT_WEBHOOK_SECRET": "whsec_hush"}
        shown = repr(read_settings(given))
        assert "k" * 30 not in shown
        assert "hush" not in shown

    @pytest.mark.parametrize(
        ("host", "is_loopback"),
        [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
         ("0.0.0.0", False), ("::", False), ("192.168.1.4", False), ("my.host", False)],
    )  # fmt: skip
    def test_who_can_reach_it(self, host: str, is_loopback: bool) -> None:
        assert Settings(host=host).is_loopback is is_loopback

    def test_a_key_that_could_be_guessed_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BadSetting, match="under 22") as refused:
            Keyring(KeyFile(tmp_path / "keys.json"), "hunter2", Limits())
        assert "hunter2" not in str(refused.value)


class TestCommand:
    def test_add_list_revoke(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The key is on stdout, once; the list has no key and no hash."""
        data = ["--data", str(tmp_path)]
        assert run(["keys", "add", "alice", "--max-work", "1000", *data]) == 0
        text = capsys.readouterr().out.strip()
        assert re.fullmatch(r"wf_[\w-]{43}", text)
        assert run(["keys", "add", "bob", "--json", *data]) == 0
        bob = json.loads(capsys.readouterr().out)
        assert bob["key"].startswith("wf_")
        ring = Keyring(KeyFile(tmp_path / "keys.json"), None, Limits())
        found = ring.find(text)
        assert found is not None
        assert (found.name, found.limits.max_work) == ("alice", 1000)

        assert run(["keys", "list", *data]) == 0
        listed = capsys.readouterr().out
        assert "alice" in listed
        assert text not in listed
        assert found.sha256 not in listed
        assert run(["keys", "revoke", "alice", *data]) == 0
        assert ring.find(text) is None
        capsys.readouterr()
        assert run(["keys", "list", "--json", *data]) == 0
        keys = {key["name"]: key for key in json.loads(capsys.readouterr().out)["keys"]}
        assert keys["alice"]["revoked_s"] is not None
        assert keys["bob"]["revoked_s"] is None

    def test_what_is_wrong_is_one_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = ["--data", str(tmp_path)]
        assert run(["keys", "revoke", "nobody", *data]) == 2
        assert run(["keys", "add", "", *data]) == 2
        assert run(["keys", "add", "twice", *data]) == 0
        assert run(["keys", "add", "twice", *data]) == 2
        assert run(["keys", "add", "x", "--max-work", "0", *data]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert sum(line.startswith("error: ") for line in errors) == 4

    def test_the_secret_of_webhooks_is_drawn_once(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shown = []
        for _ in range(2):
            assert run(["keys", "webhooks", "--data", str(tmp_path)]) == 0
            shown.append(capsys.readouterr().out)
        assert shown[0] == shown[1]
        assert shown[0].startswith("whsec_")
        assert (tmp_path / "webhook-secret").stat().st_mode & 0o077 == 0

    def test_keys_added_at_the_same_time_are_all_kept(self, tmp_path: Path) -> None:
        """Each under the file's lock."""
        import threading

        file = KeyFile(tmp_path / "keys.json")
        threads = [
            threading.Thread(target=lambda i=i: file.add(f"key {i}", Limits())) for i in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({key.sha256 for key in file.read()}) == 20

    def test_a_name_is_taken_until_its_key_is_revoked(self, tmp_path: Path) -> None:
        file = KeyFile(tmp_path / "keys.json")
        _, key = file.add("a", Limits())
        with pytest.raises(BadOption, match="already"):
            file.add("a", Limits())
        file.revoke(key.id)
        file.add("a", Limits())
