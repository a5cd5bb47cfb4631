"""Small files, a small embedded model, no shared mutable state by `global`, nothing left half done."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.repo.tree import ROOT, python_files, sources, walk

MAX_LINES = 400
MAX_MODEL_BYTES = 6_000_000
CODE = ("cortexstream", "backends", "kernels", "scripts", "tests")
HALF_DONE = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_file_is_long() -> None:
    lengths = {shown(path): len(path.read_text().splitlines()) for path in python_files(*CODE)}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_embedded_model_is_small() -> None:
    files = [path for path in walk(ROOT / "cortexstream" / "models" / "tiny")]
    assert any(path.suffix == ".safetensors" for path in files), "the weights are missing"
    assert sum(path.stat().st_size for path in files) <= MAX_MODEL_BYTES


def test_no_global_statement() -> None:
    found = [
        f"{shown(path)}:{node.lineno}"
        for path in python_files(*CODE)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Global)
    ]
    assert found == []


def test_nothing_is_left_half_done() -> None:
    texts = [path for path in sources() if path.suffix in (".py", ".md", ".toml", ".sh", ".metal", "")]
    assert len(texts) > 20
    marked = [shown(path) for path in texts if HALF_DONE.search(path.read_text(errors="replace"))]
    assert marked == []
