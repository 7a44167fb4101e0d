"""The README keeps its word: paths, commands, options, exit codes and links are real."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer

from wanfit import cli
from wanfit.request import VideoRequest
from wanfit.service import generate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")
)]  # fmt: skip
INDENT = 2  # spaces per level in the README's tree


def blocks(language: str) -> list[str]:
    """The fenced code blocks of a language; "" for those that name none."""
    every = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for name, text in every if name == language]


def shell_lines(command: str) -> list[str]:
    return [
        line for block in blocks("sh") for line in block.splitlines() if line.startswith(command)
    ]


def tree() -> dict[str, str]:
    """Path -> clause, from the README's tree."""
    entries: dict[str, str] = {}
    parents: list[str] = []
    for line in blocks("")[0].splitlines():
        match = re.fullmatch(r"( *)(\S+) {2,}(\S.*)", line)
        assert match, f"not 'path  clause': {line!r}"
        depth = len(match[1]) // INDENT
        parents = [*parents[:depth], match[2]]
        entries["".join(parents)] = match[3]
    return entries


def test_every_path_in_the_tree_exists() -> None:
    """A directory is written with a slash, a file without."""
    for path in tree():
        real = ROOT / path
        assert real.is_dir() if path.endswith("/") else real.is_file(), path


@pytest.mark.parametrize("package", ["src/wanfit", "src/wanfit/engine"])
def test_every_module_is_in_the_tree(package: str) -> None:
    described = set(tree())
    for path in (ROOT / package).iterdir():
        if path.name in ("__pycache__", "__init__.py"):
            continue
        name = f"{package}/{path.name}" + ("/" if path.is_dir() else "")
        assert name in described, f"{name} is not in the README's tree"


def test_every_make_command_is_a_target() -> None:
    """In code blocks and in running text alike, here and in CONTRIBUTING.md."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


@pytest.mark.parametrize("line", shell_lines("wanfit"))
def test_every_wanfit_command_parses(line: str) -> None:
    """The real parser of the command line accepts it; nothing is run."""
    _, name, *arguments = shlex.split(line)
    group = typer.main.get_command(cli.app)
    command = group.commands[name]  # type: ignore[attr-defined]
    context = command.make_context(name, arguments)
    assert context.command.name == name


def test_every_option_in_the_text_exists() -> None:
    commands = typer.main.get_command(cli.app).commands.values()  # type: ignore[attr-defined]
    parameters = [parameter for command in commands for parameter in command.params]
    options = {option for parameter in parameters for option in parameter.opts} | {"--help"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert named - options == set()


def test_the_python_example_calls_generate_rightly() -> None:
    """Each keyword is a parameter of `generate` or a legal option of a request."""
    (example,) = blocks("python")
    (call,) = [
        node
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "generate"
    ]
    given = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    own = inspect.signature(generate).parameters
    prompt = ast.literal_eval(call.args[0])
    options = {name: value for name, value in given.items() if name not in own}
    assert VideoRequest.parse({"prompt": prompt, **options}).prompt == prompt


def test_the_table_has_every_exit_code() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d) \|", README, re.MULTILINE)}
    used = {value for name, value in vars(cli).items() if name.startswith("EXIT_")}
    assert used
    assert used | {0} <= listed


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_to_a_file_leads_somewhere(document: str) -> None:
    """Relative links and pictures, seen from the document that has them."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not re.match(r"[a-z]+:", target):
            assert (ROOT / document).parent.joinpath(target).exists(), f"{document}: {target}"
