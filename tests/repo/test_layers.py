"""Imports point one way: the rules of docs/architecture.md, checked on every import in every file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.repo.tree import imports, module_name, modules, python_files

LAYERS = """
    __main__
    cli
    parity
    __init__
    async_llm
    llm
    generation
    completion
    prompts progress prefix_file
    platform models
    text
    engine
    scheduler
    speculation
    sequence
    swap
    kv cache
    sampling
    backend
    plan
    outputs
    limits
    request config files
    presets
    constraint structured
    errors
"""
"""What is directly in cortexstream/, top to bottom. A line may import lower lines; a package also itself."""

RANK = {name: rank for rank, line in enumerate(reversed(LAYERS.split("\n"))) for name in line.split()}
DEVICE_LIBRARIES = {"mlx", "mlx_lm", "torch", "triton", "transformers"}
FOR_BACKENDS = {"backend", "plan", "outputs", "constraint", "sampling", "config", "errors"}
WORDS = re.compile(r"(?i)(?<![a-z])(request|sequence|scheduler)s?(?![a-z])")


def violations(module: str, source: str, known: frozenset[str]) -> Iterator[str]:
    """Every broken rule in one file of the package, as a sentence."""
    layer = module.split(".")[1] if "." in module else "__init__"
    tree = ast.parse(source)
    check = {"backends": in_backend, "kernels": in_kernel}.get(layer, in_core)
    for name, node in imports(tree, known):
        problem = check(module, layer, name.split("."))
        if problem and not (problem == LIBRARY and late_tokenizer(module, name, tree, node)):
            yield f"{module}:{node.lineno} imports {name}: {problem}"
    if layer == "kernels":
        yield from (f"{module} says {word}: a kernel knows arrays and integers" for word in WORDS.findall(source))
    elif layer not in ("backends", "platform"):
        yield from (f"{module}:{line} names a backend's module: only platform does" for line in backend_texts(tree))


LIBRARY = "the core imports no device library"


def in_core(module: str, layer: str, name: list[str]) -> str | None:
    if name[0] in DEVICE_LIBRARIES:
        return LIBRARY
    if name[0] != "cortexstream":
        return None
    if layer not in RANK:
        return "a new module needs a line in LAYERS"
    target = name[1] if len(name) > 1 else "__init__"
    if target in ("backends", "kernels"):
        return "the core knows no concrete backend or kernel"
    if target not in RANK:
        return f"{target} needs a line in LAYERS"
    same = target == layer and target != "__init__"
    return None if same or RANK[target] < RANK[layer] else "an upward or sideways arrow"


def in_backend(module: str, layer: str, name: list[str]) -> str | None:
    if name[0] != "cortexstream" or name[1:2] == ["kernels"]:
        return None
    if name[1:2] == ["backends"]:
        own = module.split(".")[2]
        return None if name[2:3] in ([own], ["common"]) else "a backend sees itself and backends.common"
    return None if len(name) > 1 and name[1] in FOR_BACKENDS else f"a backend sees {', '.join(sorted(FOR_BACKENDS))}"


def in_kernel(module: str, layer: str, name: list[str]) -> str | None:
    outside = name[0] == "cortexstream" and name[1:2] != ["kernels"]
    return "a kernel sees its array library only" if outside else None


def late_tokenizer(module: str, name: str, tree: ast.AST, node: ast.AST) -> bool:
    """The one exception: text/tokenizer.py may use transformers' tokenizers, inside a function."""
    if module != "cortexstream.text.tokenizer" or name.split(".")[0] != "transformers":
        return False
    functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)]
    return any(node is inner for function in functions for inner in ast.walk(function))


def backend_texts(tree: ast.AST) -> Iterator[int]:
    """Lines of string literals (docstrings apart) that name a module under cortexstream.backends."""
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            if "cortexstream.backends" in node.value:
                yield node.lineno


def test_every_import_points_down() -> None:
    known = modules()
    found = [v for module, path in known.items() for v in violations(module, path.read_text(), frozenset(known))]
    assert not found, "\n".join(found)


def test_every_layer_exists_once_and_every_module_has_one() -> None:
    names = LAYERS.split()
    assert len(names) == len(set(names))
    present = {name.split(".")[1] for name in modules() if "." in name} - {"backends", "kernels"} | {"__init__"}
    assert present - set(names) == set(), "these need a line in LAYERS"
    assert set(names) - present == set(), "these lines of LAYERS have no module"


def test_only_config_reads_the_environment() -> None:
    found = []
    for path in python_files("cortexstream", "backends", "kernels"):
        uses = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(ast.parse(path.read_text()))}
        if uses & {"environ", "getenv", "putenv"} and module_name(path) != "cortexstream.config":
            found.append(module_name(path))
    assert not found, f"{', '.join(found)}: environment variables belong in cortexstream.config"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cortexstream.kv.arena", "from cortexstream.scheduler import Scheduler"),
        ("cortexstream.kv.arena", "from cortexstream import scheduler"),
        ("cortexstream.kv.arena", "import cortexstream.engine"),
        ("cortexstream.request", "from cortexstream.config import EngineConfig"),
        ("cortexstream.engine.core", "import cortexstream"),
        ("cortexstream.brand_new", "from cortexstream.errors import CortexStreamError"),
        ("cortexstream.engine.core", "def f():\n    import mlx.core as mx"),
        ("cortexstream.engine.core", "import importlib\ndef f():\n    importlib.import_module('torch.cuda')"),
        ("cortexstream.text.tokenizer", "from transformers import AutoTokenizer"),
        ("cortexstream.text.chat", "def f():\n    from transformers import AutoTokenizer"),
        ("cortexstream.text.tokenizer", "def f():\n    import torch"),
        ("cortexstream.llm", "from cortexstream.backends.null import create"),
        ("cortexstream.platform", "from cortexstream.backends.null import create"),
        ("cortexstream.llm", "def f(n):\n    return g(f'cortexstream.backends.{n}')"),
        ("cortexstream.backends.null.backend", "from cortexstream.request import Request"),
        ("cortexstream.backends.null.backend", "from cortexstream import kv"),
        ("cortexstream.backends.null.backend", "import cortexstream"),
        ("cortexstream.backends.mlx.backend", "from cortexstream.backends.reference.model import Model"),
        ("cortexstream.kernels.reference.rope", "from cortexstream.plan import PlanRow"),
        ("cortexstream.kernels.reference.rope", "# one sequence at a time"),
        ("cortexstream.kernels.reference.rope", "def f(num_requests): ..."),
    ],
)
def test_the_rules_catch_a_fault(module: str, source: str) -> None:
    """The control: each of these files breaks exactly one rule."""
    known = frozenset({"cortexstream.scheduler", "cortexstream.kv"})
    assert len(list(violations(module, source, known))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cortexstream.kv.arena", "from cortexstream.kv.blocks import Run\nfrom cortexstream import errors"),
        ("cortexstream.text.tokenizer", "def f():\n    from transformers import AutoTokenizer"),
        ("cortexstream.platform", "def f(n):\n    return g(f'cortexstream.backends.{n}')"),
        ("cortexstream.backend", '"""What cortexstream.backends.null exports."""'),
        ("cortexstream.cli.serve", "from cortexstream import LLM\nfrom cortexstream.llm import LLM"),
        ("cortexstream.backends.mlx.pool", "import mlx.core\nfrom cortexstream.backends.common import memory"),
        ("cortexstream.backends.mlx.pool", "from cortexstream.kernels.reference import rope"),
        ("cortexstream.kernels.triton.rope", "import torch\nfrom cortexstream.kernels.reference import rope"),
    ],
)
def test_the_rules_allow_what_is_right(module: str, source: str) -> None:
    known = frozenset({"cortexstream.errors"})
    assert list(violations(module, source, known)) == []
