"""`import cortexstream` works without any array library but numpy, and loads nothing that is slow to load."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from tests.repo.tree import ROOT

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"mlx", "mlx_lm", "torch", "transformers", "triton"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""
HEAVY = {"llguidance", 
    "mlx", "mlx_lm", "torch", "transformers", "triton", "tokenizers", "sentencepiece", "jinja2", "huggingface_hub",
    "rich", "typer", "prompt_toolkit",
}  # fmt: skip


def python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter in the checkout, warnings being errors, and return what it printed."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(code: str) -> set[str]:
    return set(python(f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})").split())


def test_import_loads_nothing_heavy() -> None:
    assert loaded_by("import cortexstream") & HEAVY == set()


def test_parameters_and_errors_load_nothing_heavy() -> None:
    """What a client of a running engine needs to build its requests."""
    used = "from cortexstream import SamplingParams, EngineConfig, InvalidRequestError; SamplingParams(temperature=0)"
    assert loaded_by(used) & HEAVY == set()


def test_the_check_sees_a_heavy_module() -> None:
    assert "jinja2" in loaded_by("import cortexstream, jinja2") & HEAVY


def test_every_public_name_imports_without_device_libraries() -> None:
    printed = python(
        BLOCK
        + "import cortexstream\n"
        + "for name in cortexstream.__all__: getattr(cortexstream, name)\n"
        + "print('all', len(cortexstream.__all__))"
    )
    assert printed.startswith("all ") and int(printed.split()[1]) > 0


def test_the_block_blocks() -> None:
    code = BLOCK + "try:\n    import torch\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    assert python(code) == "torch\n"


def test_command_line_starts_without_device_libraries() -> None:
    code = (
        BLOCK
        + "import runpy\nsys.argv = ['cortexstream', '--help']\nrunpy.run_module('cortexstream', run_name='__main__')"
    )
    assert "generate" in python(code)


def test_embedded_model_runs_without_device_libraries() -> None:
    """A plain install is enough: the reference backend serves the embedded model."""
    code = (
        BLOCK
        + "from cortexstream import LLM, SamplingParams\n"
        + "with LLM() as llm:\n"
        + "    (output,) = llm.generate('2+3=', SamplingParams(temperature=0, max_tokens=4))\n"
        + "    print(llm.info.name, len(output.outputs[0].token_ids))"
    )
    name, tokens = python(code).split()
    assert name == "reference" and int(tokens) >= 1
