"""The public names: what `__all__` promises, what can be imported, and what a reader finds in `help`."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType

import pytest

import cortexstream
from tests.repo.tree import ROOT, modules


def typed_names() -> set[str]:
    """Public names that a type checker sees: what __init__.py imports under TYPE_CHECKING."""
    tree = ast.parse((ROOT / "cortexstream" / "__init__.py").read_text())
    guarded = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    nodes = [n for block in guarded for n in ast.walk(block) if isinstance(n, ast.ImportFrom)]
    return {alias.asname or alias.name for node in nodes for alias in node.names}


def test_all_is_what_can_be_imported_and_what_checkers_see() -> None:
    names = set(cortexstream.__all__)
    assert len(names) == len(cortexstream.__all__)
    assert names == typed_names()
    assert names == set(cortexstream._HOME)
    for name in names:
        value = getattr(cortexstream, name)
        assert value.__name__ == name and value.__module__.startswith("cortexstream.")


def test_nothing_else_is_public() -> None:
    allowed = {"annotations", "import_module", "TYPE_CHECKING", "Any"}
    public = {
        name
        for name, value in vars(cortexstream).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public - set(cortexstream.__all__) <= allowed


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'NoSuchName'"):
        _ = cortexstream.NoSuchName


def test_star_import_gives_all() -> None:
    space: dict[str, object] = {}
    exec("from cortexstream import *", space)
    assert set(cortexstream.__all__) <= set(space)


@pytest.mark.parametrize("name", sorted(cortexstream.__all__))
def test_public_names_and_their_methods_are_documented(name: str) -> None:
    value = getattr(cortexstream, name)
    assert (value.__doc__ or "").strip(), name
    for method, function in inspect.getmembers(value, inspect.isroutine):
        own = method in vars(value) and not method.startswith("_")
        assert not own or (inspect.getdoc(function) or "").strip(), f"{name}.{method} has no docstring"


@pytest.mark.parametrize("module", sorted(modules()))
def test_modules_have_a_docstring(module: str) -> None:
    assert (ast.get_docstring(ast.parse(modules()[module].read_text())) or "").strip(), module


@pytest.mark.parametrize("module", sorted(m for m in modules() if m.count(".") == 2 and ".backends." in m))
def test_backends_export_the_contract(module: str) -> None:
    """`cortexstream.backend.BackendModule`, by name: platform calls exactly these."""
    if module == "cortexstream.backends.common":
        pytest.skip("common is shared by the backends and is none itself")
    tree = ast.parse(modules()[module].read_text())
    bound = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    bound |= {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    from cortexstream.backend import BackendModule

    assert {name for name in vars(BackendModule) if not name.startswith("_")} <= bound
