"""The documents tell the truth: their commands exist and run, their links and file names lead somewhere."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.repo.tree import ROOT, sources

PAGES = sorted(path for path in sources() if path.suffix == ".md")
RUN = ("./scripts/run", "scripts/run", "cortexstream")
CHEAP = {"doctor", "generate", "models", "--help", "--version"}
HUB_ID = re.compile(r"""(?<![\w./~-])[A-Za-z0-9][\w.-]*/[\w-]+[\w.-]*(?![\w./])""")


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fenced(path: Path, *languages: str) -> list[str]:
    """The texts of a page's fenced blocks in one of these languages ("" is none)."""
    blocks = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in blocks if language in languages]


def commands(path: Path) -> Iterator[list[str]]:
    """Every command of a page that starts with scripts/run, cortexstream or python, as words, without comments."""
    for block in fenced(path, "bash", "sh", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and (words[0] in RUN or words[0].startswith("python")):
                yield words


COMMANDS = [(shown(page), words) for page in PAGES for words in commands(page)]
OURS = [pytest.param(words, id=f"{page}: {shlex.join(words)}") for page, words in COMMANDS if words[0] in RUN]
PYTHON = [pytest.param(words, id=f"{page}: {shlex.join(words)}") for page, words in COMMANDS if words[0] not in RUN]


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run this Python on this checkout's package, with no network and nothing to read from."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CORTEXSTREAM_", "FORCE_COLOR"))}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, timeout=240, check=False, stdin=subprocess.DEVNULL, env=env
    )


def cortexstream(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What scripts/run does once .venv is ready."""
    return python("-m", "cortexstream", *arguments, cwd=cwd)


@functools.cache
def help_text(subcommand: str) -> str:
    done = cortexstream(*([] if subcommand.startswith("-") else [subcommand]), "--help")
    assert done.returncode == 0, f"cortexstream {subcommand} --help: {done.stderr or done.stdout}"
    return done.stdout


def until_pipe(words: list[str]) -> list[str]:
    """The first program of a pipeline, without redirections."""
    ends = [i for i, word in enumerate(words) if word in ("|", ">", ">>", "<", "&", "&&", ";", "||")]
    return words[: ends[0]] if ends else words


def test_readme_shows_how_to_run() -> None:
    assert any(page == "README.md" and words[0] == "./scripts/run" for page, words in COMMANDS)


@pytest.mark.parametrize("words", OURS)
def test_command_and_its_options_exist(words: list[str]) -> None:
    words = until_pipe(words)
    assert len(words) > 1, "a command without a subcommand"
    text = help_text(words[1])
    for word in words[1:]:
        option = word.split("=")[0]
        if re.fullmatch(r"--?[a-zA-Z][\w-]*", option):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), f"{option} is not in its --help"


@pytest.mark.parametrize("words", OURS)
def test_cheap_command_runs(words: list[str], tmp_path: Path) -> None:
    arguments = until_pipe(words)[1:]
    if arguments[0] not in CHEAP:
        pytest.skip(f"{arguments[0]} serves, waits for a person, or takes long; its options are checked above")
    if any(HUB_ID.fullmatch(word) for word in arguments):
        pytest.skip("needs a download; its options are checked above")
    done = cortexstream(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr or done.stdout
    assert done.stdout.strip()


@pytest.mark.parametrize("words", PYTHON)
def test_python_command_names_a_script_and_its_options(words: list[str]) -> None:
    if words[1:2] in (["-m"], ["-c"]):
        return
    script = ROOT / words[1]
    assert script.is_file(), f"{words[1]} does not exist"
    for word in until_pipe(words)[2:]:
        if word.startswith("--"):
            assert f'"{word.split("=")[0]}"' in script.read_text(), f"{words[1]} has no option {word}"


def test_python_of_the_readme_runs(tmp_path: Path) -> None:
    """All ```python blocks of README.md, in order, as one program; a block that downloads a model is only compiled."""
    blocks = fenced(ROOT / "README.md", "python")
    assert blocks, "README.md shows no Python"
    for block in blocks:
        compile(block, "README.md", "exec")
    program = "\n".join(block for block in blocks if not re.search(r"""["'][A-Za-z0-9][\w.-]*/[\w.-]+["']""", block))
    done = python("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def broken_links(page: Path) -> list[str]:
    """Link targets of a page that lead nowhere; web addresses are not followed."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One `two`\n[a](#one-two) [b](page.md#nope) [c](gone.md) [d](https://example.org/x) `[e](f)`\n")
    assert broken_links(page) == ["page.md#nope", "gone.md"]


def test_files_in_the_architecture_tree_exist() -> None:
    files = [shown(path) for path in sources()]
    known = {f"/{name}" for name in files} | {
        f"/{parent.as_posix()}/" for name in files for parent in Path(name).parents
    }
    trees = "\n".join(fenced(ROOT / "docs" / "architecture.md", "", "text"))
    named = re.findall(r"(?<![\w./-])[\w.-][\w./-]*(?:\.(?:py|md|toml|json|metal)\b|/(?![\w]))", trees)
    assert len(named) > 20, "docs/architecture.md has no tree of the files"
    assert [name for name in named if not any(path.endswith(f"/{name}") for path in known)] == []


def test_every_module_is_in_the_architecture_tree() -> None:
    trees = "\n".join(fenced(ROOT / "docs" / "architecture.md", "", "text"))
    core = [path.name for path in (ROOT / "cortexstream").glob("[a-z]*.py")]
    core += [f"{path.parent.name}/" for path in (ROOT / "cortexstream").glob("*/__init__.py")]
    core += [f"{path.parent.name}/" for top in ("backends", "kernels") for path in (ROOT / top).glob("*/__init__.py")]
    assert [name for name in sorted(core) if not re.search(rf"(?<![\w.]){re.escape(name)}", trees)] == []
