"""What `cortexstream doctor --arena` shows: the KV arena while a small mixed workload runs on the loaded model."""

from __future__ import annotations

import threading
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cortexstream.generation import Generation
    from cortexstream.kv import ArenaStats
    from cortexstream.llm import LLM

ATTEMPTS = 3  # to look while a sequence runs: one that can have few tokens may end first
ALIKE = 3  # so many equal lines of the block map are shown; more are counted


def show_arena(llm: LLM, text: bool, svg: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the workload and look at the arena in the middle of it; returns a part of doctor's report, and a check.

    Four prompts, three of which begin alike, are answered; a fifth is cancelled after its first token; a sixth runs
    while the text is read and the picture is written to `svg`.
    """
    longest = max(1, llm.limits.max_tokens // 4)
    prefix = _tokens(llm, 0, min(2 * llm.info.block_tokens + 3, longest))
    tails = [_tokens(llm, number, min(number, longest - 1)) for number in range(1, 6)]
    prompts: list[Any] = [{"prompt_token_ids": prefix + tail} for tail in tails]
    prompts[2] = {"prompt_token_ids": _tokens(llm, 77, len(prefix))}
    answered = llm.generate(prompts[:3] + prompts[:1], _sampling(min(8, longest)), use_tqdm=False)
    cancelled = _start(llm, prompts[3])
    cancelled.cancel()
    outputs = [*answered, cancelled.result()]
    for _ in range(ATTEMPTS):
        last = _start(llm, prompts[4])
        shown = _look(llm, text, svg)
        running = not last.done
        last.cancel()
        outputs.append(last.result())
        if running:
            break
    errors = [completion.error for output in outputs for completion in output.outputs if completion.error is not None]
    ends = [completion.finish_reason for output in outputs[: len(answered) + 1] for completion in output.outputs]
    detail = (
        f"{len(ends) - ends.count('abort')} requests finished, {ends.count('abort')} cancelled, {int(running)} running"
    )
    return shown, {"name": "the arena takes a mixed workload", "ok": not errors, "detail": (errors or [detail])[0]}


def _look(llm: LLM, text: bool, svg: Path | None) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    if text:
        shown["text"] = fold(llm.describe_arena().splitlines()) + statistics(llm.stats().arena)
    if svg is not None:
        llm.arena_svg(svg)
        shown["svg"] = str(svg)
    return shown


def fold(lines: list[str]) -> list[str]:
    """The lines, with a count in place of the last of more than ALIKE equal ones: a map may have thousands."""
    folded = []
    for line, same in groupby(lines):
        count = sum(1 for _ in same)
        folded += [line] * min(count, ALIKE)
        if count > ALIKE:
            folded.append(f"({count - ALIKE} more lines like this one)")
    return folded


def statistics(stats: ArenaStats) -> list[str]:
    """What the block map does not show."""
    return [
        f"held: {stats.used_tokens} tokens; kept for reuse: {stats.cached_blocks} blocks; largest empty run: "
        f"{stats.largest_free_run} blocks",
        f"since the start: {stats.reused_tokens} tokens reused, {stats.copied_tokens} copied, {stats.moved_tokens} "
        f"moved; {stats.relocations} relocations, {stats.compactions} compactions",
    ]


def _tokens(llm: LLM, first: int, count: int) -> list[int]:
    """Ids of so many tokens that the model has; another `first` gives other ones."""
    return [(first + 5 * index) % llm.model.vocab_size for index in range(count)]


def _sampling(max_tokens: int) -> Any:
    from cortexstream.request import SamplingParams

    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def _start(llm: LLM, prompt: dict[str, list[int]]) -> Generation:
    """A request that goes on as long as it may, and has its first token, or has ended."""
    begun = threading.Event()
    generation = llm.submit(prompt, _sampling(llm.limits.max_tokens), listener=lambda chunk: begun.set())
    begun.wait()
    return generation
