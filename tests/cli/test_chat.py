"""`cortexstream chat` through a pipe, and what it keeps of a conversation."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cortexstream import LLM, SamplingParams
from cortexstream.cli.conversation import Conversation, Message
from tests.cli.command_line import command, cortexstream, environment
from tests.repo.tree import ROOT


def chat(model: Path, given: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return cortexstream("chat", "--model", str(model), *arguments, given=given)


def test_answers_are_the_library_s_and_history_is_kept(model: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=6)
    messages = [{"role": "system", "content": "be brief"}]
    answers = []
    with LLM(model, backend="reference") as llm:
        for text in ("hello", "and now?"):
            messages.append({"role": "user", "content": text})
            answers.append(llm.chat(messages, params)[0].outputs[0].text)
            messages.append({"role": "assistant", "content": answers[-1]})
    done = chat(model, "hello\n\nand now?\n", "--system", "be brief", "--max-tokens", "6")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)
    assert done.stderr == "cut off after 6 tokens\n" * 2


def test_commands(model: Path) -> None:
    """/clear forgets, so the same message gets the same answer; /bye ends before the last line."""
    done = chat(
        model, "/system\n/system be kind\n/system\nhi\n/clear\nhi\n/stats\n/help\n/bye\nhi\n", "--max-tokens", "4"
    )
    assert done.returncode == 0, done.stderr
    unset, system, first, second, stats, *rest = done.stdout.splitlines()
    assert (unset, system) == ("there is no system prompt", "be kind")
    assert first == second
    markers = 6  # begin of text, a role and an end for either message, the role of the answer
    assert "last answer: 4 tokens" in stats
    assert f"context: {markers + len('be kind') + len('hi') + 4} of 4096" in stats
    assert rest[0].startswith("/help") and len(rest) == 6


def test_an_unknown_command_fails_the_pipe_but_not_the_talk(model: Path) -> None:
    done = chat(model, "/sing\n /sing\n", "--max-tokens", "3")
    assert done.returncode == 1
    assert "error: /sing is no command" in done.stderr
    assert len(done.stdout) > 1, "a space makes it a message"


def test_overflow_drops_the_oldest_turns_and_says_so(model: Path) -> None:
    lines = "\n".join([*["x" * 20] * 4, "y" * 200, "short"])
    done = chat(model, lines, "--max-model-len", "100", "--max-tokens", "10")
    notices = [line for line in done.stderr.splitlines() if "dropped" in line]
    assert notices and all("of 100 fit" in line or "only 100 fit" in line for line in notices)
    assert "error: prompt: has 204 tokens" in done.stderr
    assert done.returncode == 1, "one message was not answered"
    assert len(done.stdout.splitlines()) >= 5


def test_an_interrupt_stops_the_answer_and_keeps_the_talk(model: Path) -> None:
    process = subprocess.Popen(
        command("chat", "--model", str(model), "--backend", "reference", "--max-tokens", "4000"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"tell me everything\n")
    process.stdin.flush()
    assert process.stdout.read(4), "it streams"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(b"/stats\n", timeout=60)
    assert (process.returncode, errors) == (0, b"stopped\n")
    assert b"last answer: " in output


def lengths(messages: Sequence[Message]) -> list[int]:
    """An encoding in which a message takes as many tokens as it has characters."""
    return [0] * sum(len(message["content"]) for message in messages)


def test_fit_drops_no_more_than_it_must() -> None:
    talk = Conversation(lengths, limit_tokens=20, system="s")
    talk.turns = [("aaaa", "aa"), ("bb", "b"), ("c", "c")]
    assert talk.fit("dd", 6) == ([0] * 14, 0, 14)
    assert talk.fit("dd", 7) == ([0] * 8, 1, 14)
    assert talk.fit("dd", 13) == ([0] * 5, 2, 14)
    assert talk.fit("d" * 30, 1).num_dropped == 3
    assert len(talk.turns) == 3, "asking changes nothing"
    assert talk.messages("dd", 2)[0] == {"role": "system", "content": "s"}
