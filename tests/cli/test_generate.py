"""`cortexstream generate` in a process of its own: what it writes, and how it ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cortexstream import LLM, SamplingParams
from tests.cli.command_line import command, cortexstream, environment, is_one_sentence, lines_of
from tests.repo.tree import ROOT

PROMPTS = ("12+30=", "copy: tide", "sort: 3 1 2")


@pytest.fixture(scope="module")
def texts(model: Path) -> list[str]:
    """What the library answers to PROMPTS, 8 tokens each."""
    with LLM(model, backend="reference") as llm:
        outputs = llm.generate(list(PROMPTS), SamplingParams(temperature=0, max_tokens=8))
    return [output.outputs[0].text for output in outputs]


def generate(model: Path, *arguments: str, given: str | bytes = "") -> subprocess.CompletedProcess[str]:
    return cortexstream("generate", "--model", str(model), "--max-tokens", "8", *arguments, given=given)


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_one_prompt_and_its_completion_are_one_text(model: Path, texts: list[str], stream: list[str]) -> None:
    done = generate(model, PROMPTS[0], *stream)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{PROMPTS[0]}{texts[0]}\n", "")


def test_several_prompts_are_blocks_under_headers(model: Path, texts: list[str]) -> None:
    done = generate(model, *PROMPTS)
    blocks = [f"==> {i + 1} of 3 <==\n{PROMPTS[i]}{texts[i]}\n" for i in range(3)]
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n".join(blocks), "")


def test_a_dash_reads_a_prompt_per_line(model: Path, texts: list[str]) -> None:
    """Empty lines are skipped; arguments keep their place before and after."""
    found = lines_of(generate(model, PROMPTS[0], "-", "--json", given=f"\n{PROMPTS[1]}\n   \n\n{PROMPTS[2]}"))
    assert [(line["prompt"], line["text"]) for line in found] == list(zip(PROMPTS, texts, strict=True))


def test_json_lines_say_everything(model: Path, texts: list[str]) -> None:
    (found,) = lines_of(generate(model, PROMPTS[0], "--json"))
    assert found == {
        "prompt_index": 0, "index": 0, "prompt": PROMPTS[0], "text": texts[0], "finish_reason": "length",
        "stop_reason": None, "prompt_tokens": 1 + len(PROMPTS[0]), "completion_tokens": 8,
    }  # fmt: skip


def test_streaming_several_writes_each_once_as_it_ends(model: Path) -> None:
    arguments = ["--n", "2", "--temperature", "1", "--seed", "5", "--json"]
    at_end = lines_of(generate(model, *PROMPTS, *arguments))
    streamed = lines_of(generate(model, *PROMPTS, *arguments, "--stream"))
    assert len(at_end) == 6
    assert sorted(map(json.dumps, streamed)) == sorted(map(json.dumps, at_end))
    assert [(line["prompt_index"], line["index"]) for line in at_end] == [(p, i) for p in range(3) for i in range(2)]
    assert at_end[0]["text"] != at_end[1]["text"], "two draws of one prompt must differ"


def test_n_completions_are_told_apart(model: Path) -> None:
    done = generate(model, PROMPTS[0], "--n", "2")
    headers = [line for line in done.stdout.splitlines() if line.startswith("==>")]
    assert headers == ["==> 1 of 1, completion 1 of 2 <==", "==> 1 of 1, completion 2 of 2 <=="]


def test_a_stop_string_ends_the_text(model: Path, texts: list[str]) -> None:
    stop = texts[0][3:5]
    (found,) = lines_of(generate(model, PROMPTS[0], "--stop", stop, "--stop", "never", "--json"))
    assert found["text"] == texts[0][: texts[0].index(stop)]
    assert (found["finish_reason"], found["stop_reason"]) == ("stop", stop)


def test_chat_uses_the_template_and_a_new_line(model: Path) -> None:
    with LLM(model, backend="reference") as llm:
        (output,) = llm.chat([{"role": "user", "content": "hello"}], SamplingParams(temperature=0, max_tokens=8))
    done = generate(model, "hello", "--chat")
    assert done.stdout == f"hello\n{output.outputs[0].text}\n"


def test_stats_go_to_standard_error(model: Path) -> None:
    done = generate(model, *PROMPTS, "--stats")
    assert "24 generated" in done.stderr and "steps, 0 preemptions" in done.stderr
    assert "generated" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--temperature", "-1"], 2, ["temperature", "-1", "0.001 to 1000"]),
        (["--max-tokens", "0"], 2, ["max_tokens"]),
        (["--kv-cache-memory", "lots"], 2, ["kv_cache_memory", "lots", "4GiB"]),
        (["--max-model-len", "3"], 2, ["prompt", "max_model_len is 3"]),
        (["--stop", ""], 2, ["stop", "empty"]),
        (["--kv-cache-memory", "1"], 3, ["KV budget of 1 bytes"]),
        (["--model", "no/such/folder"], 3, ["no/such/folder"]),
        (["--backend", "abacus"], 3, ["abacus", "reference"]),
    ],
)
def test_a_refusal_is_one_sentence(model: Path, arguments: list[str], code: int, words: list[str]) -> None:
    """Exit code 2 for what was asked, 3 for a model or backend that cannot be had."""
    backend = None if "--backend" in arguments else "reference"
    is_one_sentence(
        cortexstream("generate", "hi there", "--model", str(model), *arguments, backend=backend), code, *words
    )


def test_a_backend_that_cannot_run_is_one_sentence() -> None:
    """CORTEXSTREAM_BACKEND counts like --backend."""
    done = cortexstream("generate", "hi", backend=None, env={"CORTEXSTREAM_BACKEND": "abacus"})
    is_one_sentence(done, 3, "CORTEXSTREAM_BACKEND", "abacus")


@pytest.mark.parametrize("given", ["", "\n \n"])
def test_no_prompt_on_standard_input(model: Path, given: str) -> None:
    is_one_sentence(generate(model, "-", given=given), 2, "standard input")


def test_standard_input_that_is_no_text(model: Path) -> None:
    is_one_sentence(generate(model, "-", given=b"caf\xe9\n"), 2, "prompt")


@pytest.mark.parametrize("arguments", [["generate", "--colour", "red"], ["generate"], ["sing"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    done = cortexstream(*arguments, backend=None)
    assert done.returncode == 2
    assert "Usage: cortexstream" in done.stderr and "Traceback" not in done.stderr


def test_an_interrupt_ends_with_130_and_no_traceback(model: Path) -> None:
    process = subprocess.Popen(
        command("generate", "abc", "--stream", "--max-tokens", "4000", "--backend", "reference", "--model", str(model)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.read(8).startswith(b"abc"), "it streams while it runs"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"")


def test_help_and_version_load_nothing_heavy() -> None:
    """Typing --help must not wait for an array library."""
    for option in ("--help", "--version"):
        code = (
            f"import sys; sys.argv = ['cortexstream', '{option}']\nfrom cortexstream.cli import main\n"
            "try: main()\nexcept SystemExit as end: assert not end.code\n"
            "print({name.split('.')[0] for name in sys.modules} & {'mlx', 'torch', 'tokenizers', 'numpy', 'jinja2'})"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.stdout.endswith("set()\n"), done.stdout + done.stderr


def test_p14_the_form_of_the_output(tmp_path: Path) -> None:
    """Of the embedded model, as it reads and writes text."""
    schema, grammar = tmp_path / "schema.json", tmp_path / "sum.lark"
    schema.write_text(
        '{"type": "object", "properties": {"ok": {"enum": [1]}}, "required": ["ok"], "additionalProperties": false}'
    )
    grammar.write_text("start: /[0-9]{2}/")
    for given, expected in (
        (["--json-schema", str(schema)], r'\{"ok": ?1\}'), (["--json-schema", "-"], r"\{(.|\n)*"),
        (["--regex", "[a-c]{3}"], "[a-c]{3}"), (["--grammar", str(grammar)], "[0-9]{2}"),
        (["--choice", "yes", "--choice", "no"], "yes|no"),
    ):  # fmt: skip
        (found,) = lines_of(cortexstream("generate", "json: ", "--json", "--max-tokens", "20", *given))
        assert re.fullmatch(expected, str(found["text"])), (given, found)


@pytest.mark.parametrize(
    "given, message",
    [
        (["--regex", "a", "--choice", "b"], "regex"),
        (["--regex", "[a-"], "regex: cannot be compiled"),
        (["--json-schema", "nowhere.json"], "--json-schema: nowhere.json cannot be read"),
        (["--draft-model", "x"], "speculative_config: lacks num_speculative_tokens"),
        (["--speculative-tokens", "99"], "speculative_config: has num_speculative_tokens 99"),
    ],
)
def test_bad_form_or_guesses_are_one_sentence(given: list[str], message: str) -> None:
    done = cortexstream("generate", "12+30=", *given)
    is_one_sentence(done, 2, message)


def test_p13_guesses_change_nothing_and_are_told_of() -> None:
    prompt = "copy: " + "theanswerisinthequestion" * 2
    plain = cortexstream("generate", prompt, "--max-tokens", "60")
    done = cortexstream("generate", prompt, "--max-tokens", "60", "--speculative-tokens", "4", "--stats")
    assert done.returncode == 0 and done.stdout == plain.stdout
    assert re.search(r"; \d+% of \d+ guesses right, \d\.\d\d tokens per row with guesses", done.stderr)
