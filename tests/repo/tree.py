"""What the repo tests know about this checkout: its files, and what a Python file imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOTS = {"cortexstream": ROOT / "cortexstream", "backends": ROOT / "backends", "kernels": ROOT / "kernels"}
TOP = ("cortexstream", "backends", "kernels", "scripts", "tests", "docs", ".ci")
LINKS = ("backends", "kernels")  # inside cortexstream/, to the folder of that name beside it


def python_files(*folders: str) -> list[Path]:
    """Every .py file under these top-level folders, sorted; links are not followed."""
    found = [path for folder in folders for path in walk(ROOT / folder) if path.suffix == ".py"]
    if not found:
        raise FileNotFoundError(f"no Python file under {', '.join(folders)} in {ROOT}")
    return sorted(found)


def walk(folder: Path) -> Iterator[Path]:
    """Files under `folder`: links to folders are not followed; hidden folders, caches and build results left out."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield path
        elif path.is_dir() and not path.is_symlink() and not skipped(path.name):
            yield from walk(path)


def sources() -> list[Path]:
    """Every file of the project: those at the top and those in its folders, sorted. A user's own folders are not."""
    top = [path for path in sorted(ROOT.iterdir()) if path.is_file()]
    return top + [path for name in TOP for path in walk(ROOT / name)]


def skipped(name: str) -> bool:
    """Does a folder of this name hold something other than sources?"""
    return name.startswith(".") or name in ("__pycache__", "build", "dist") or name.endswith(".egg-info")


def module_name(path: Path) -> str:
    """The name that a file of the package is imported by, such as cortexstream.backends.null.backend."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in LINKS:
        parts.insert(0, "cortexstream")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """Every module of the package by name; a folder with Python files but no __init__.py is not one."""
    return {module_name(path): path for path in python_files(*ROOTS)}


def imports(tree: ast.AST, known: frozenset[str]) -> Iterator[tuple[str, ast.stmt | ast.expr]]:
    """(module, node) for every import anywhere in a file, also by a call with a literal name.

    `from a import b` counts as a.b if that is in `known`, else as a.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in known else node.module), node
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value, node
