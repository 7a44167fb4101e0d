"""docs/serving.md keeps its word: its examples run, and its tables are those of the code."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from tests.serve.harness import Running, running
from wanfit import cli
from wanfit.serve.describe import IMAGE_FIELDS
from wanfit.serve.problems import internal_problem
from wanfit.settings import PREFIX, VARIABLES, Settings

DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


CURLS = [block for block in blocks("sh") if "curl" in block]


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose jobs are made as they come, of a clip that is at hand."""
    with running(tmp_path_factory.mktemp("maker")) as server:
        ended = threading.Event()

        def work() -> None:
            while not ended.wait(0.05):
                if server.store.counts()["queued"]:
                    server.finish()

        thread = threading.Thread(target=work)
        thread.start()
        yield server
        ended.set()
        thread.join()


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
@pytest.mark.parametrize("example", blocks("python"))
def test_every_python_example_runs(
    maker: Running, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ADDRESS in example
    names: dict[str, object] = {}
    exec(compile(example.replace(ADDRESS, maker.url), "serving.md", "exec"), names)
    if "write_to_file" in example:
        assert (tmp_path / "star.mp4").read_bytes()[4:8] == b"ftyp"
    if "httpx2.get(told" in example:
        assert isinstance(names["clip"], bytes)
        assert names["clip"][4:8] == b"ftyp"


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
@pytest.mark.parametrize("example", CURLS)
def test_every_curl_example_is_answered(maker: Running, example: str) -> None:
    """With -f, by which an error of the server is one of the command; /readyz has no GPU here."""
    example = example.replace("curl -s ", "curl -sf ").replace(ADDRESS, maker.url)
    lines = [line for line in example.replace("\\\n", " ").splitlines() if "/readyz" not in line]
    for line in lines:
        result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, (line, result.stdout, result.stderr)
        assert result.stdout


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if "wanfit " in line]
)
def test_every_command_parses(line: str) -> None:
    """The real parser of the command line accepts it; nothing is run."""
    _, *words = shlex.split(line)
    command = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    assert command.make_context("wanfit", words).command is command


def test_the_table_of_variables_is_that_of_the_code() -> None:
    rows = re.findall(r"^\| `(WANFIT_\w+)` \| (.*?) \| (.*) \|$", DOCUMENT, re.MULTILINE)
    assert [(name, meaning) for name, _, meaning in rows] == [
        (PREFIX + variable.name, variable.meaning) for variable in VARIABLES
    ]
    defaults = {name: text for name, text, _ in rows}
    settings = Settings()
    for variable in VARIABLES:
        value: object = settings
        for part in variable.path:
            value = getattr(value, part)
        shown = defaults[PREFIX + variable.name]
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = float(re.sub(r"[^\d.]", "", shown))
            assert number in (value, value / (1 << 20), value / (1 << 30)), variable.name
        if isinstance(value, str):
            assert shown == f"`{value}`"


def test_every_name_of_a_picture_is_told() -> None:
    for name in IMAGE_FIELDS:
        assert f"`{name}`" in DOCUMENT


def test_every_code_that_is_told_is_one_of_the_code() -> None:
    source = "".join(path.read_text() for path in (Path(cli.__file__).parent).rglob("*.py"))
    table = DOCUMENT.partition("## When it says no")[2].partition("## Webhooks")[0]
    codes = {code for row in re.findall(r"^\| \d.*? \| (.*?) \|", table, re.MULTILINE)
             for code in re.findall(r"`(\w+)`", row)}  # fmt: skip
    assert len(codes) > 15
    missing = {code for code in codes if f'"{code}"' not in source}
    assert not missing
    assert internal_problem().code not in codes
