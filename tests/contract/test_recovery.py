"""What goes wrong stays with the request it belongs to, on every backend that computes."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortexstream import (
    LLM,
    AsyncLLM,
    EngineError,
    InvalidRequestError,
    ModelLoadError,
    OutOfMemoryBudgetError,
    SamplingParams,
    StreamChunk,
)
from cortexstream.config import parse_bytes
from cortexstream.models import tiny_folder
from tests.conftest import require

GREEDY = SamplingParams(temperature=0, max_tokens=30)


@pytest.fixture(params=["reference", "mlx", "cuda"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    if request.param == "mlx":
        require("mlx")
        require("mlx_lm")
    if request.param == "cuda":
        require("torch")
        require("transformers")
    with LLM(backend=request.param, num_kv_blocks=64, block_tokens=16, max_num_seqs=4) as model:
        yield model
        model.check()
        assert model.stats().arena.used_blocks == 0


def answer(llm: LLM, prompt: str = "copy: tide") -> str:
    return llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].text


@pytest.mark.parametrize("call", ["submit", "collect"])
def test_f78_a_failed_step_is_followed_by_right_answers(llm: LLM, call: str) -> None:
    """The step before is in flight when the third call raises; what runs ends with an error, what follows is served."""
    expected = answer(llm)

    def plant(core: Any) -> None:
        right, calls = getattr(core.backend, call), iter(range(100))

        def wrong(argument: Any) -> Any:
            if next(calls) == 2:
                raise RuntimeError("the device fell over")
            return right(argument)

        setattr(core.backend, call, wrong)

    llm._engine.call(plant)
    (failed,) = llm.generate("copy: tide", GREEDY)
    assert failed.outputs[0].finish_reason == "error"
    assert failed.outputs[0].error == "the step failed: the device fell over"
    assert [answer(llm) for _ in range(3)] == [expected] * 3


def test_f78_a_computation_that_fails_late_is_forgotten() -> None:
    """On MLX an operation can fail when it is evaluated, after every pool was told to depend on it."""
    mx = require("mlx")
    require("mlx_lm")
    with LLM(backend="mlx", num_kv_blocks=64) as llm:

        def poison(core: Any) -> None:
            keys = core.backend.pool.keys[0].arrays
            half = mx.zeros((32, 32), mx.bfloat16)
            bad = mx.block_masked_mm(half, half, 32, mx.zeros((1, 1), mx.bool_))  # not for bfloat16 on a CPU
            keys[0] = keys[0] + bad[0, 0].astype(keys[0].dtype)

        if mx.metal.is_available():
            pytest.skip("Metal can compute what fails here on a CPU")
        llm._engine.call(poison)
        assert llm.generate("copy: tide", GREEDY)[0].outputs[0].finish_reason == "error"
        assert answer(llm) == "\ntide"


def test_f78_who_waits_is_served_after_a_failed_step() -> None:
    with LLM(backend="reference", num_kv_blocks=64, max_num_seqs=1) as llm:

        def plant(core: Any) -> None:
            right, calls = core.backend.submit, iter(range(1000))

            def wrong(plan: Any) -> Any:
                if next(calls) == 1:
                    raise RuntimeError("once")
                return right(plan)

            core.backend.submit = wrong

        llm._engine.call(plant)
        outputs = llm.generate(["copy: tide"] * 3, GREEDY)
        assert [o.outputs[0].finish_reason for o in outputs] == ["error", "stop", "stop"]


def test_result_comes_after_the_listener_had_the_end(llm: LLM) -> None:
    seen: list[str | None] = []

    def listener(chunk: StreamChunk) -> None:
        time.sleep(0.05 if chunk.finish_reason else 0)
        seen.append(chunk.finish_reason)

    llm.submit("12+30=", GREEDY, listener=listener).result(timeout_s=30)
    assert seen[-1] == "stop"


def test_a_budget_beyond_the_machine_is_refused(llm: LLM) -> None:
    for blocks in (10**8, 2 * 10**9):
        with pytest.raises(OutOfMemoryBudgetError, match=r"KV blocks of \d+ tokens take"):
            LLM(backend=llm.info.name, num_kv_blocks=blocks)


def test_a_listener_that_wants_to_exit_ends_its_own_request_only(llm: LLM) -> None:
    def listener(chunk: StreamChunk) -> None:
        raise SystemExit(3)

    bad = llm.submit("copy: tide", GREEDY, listener=listener)
    assert answer(llm) == "\ntide"
    assert bad.result(timeout_s=30).outputs[0].finish_reason == "error"


def test_a_listener_cannot_wait_for_its_own_thread(llm: LLM) -> None:
    caught: list[Exception] = []

    def listener(chunk: StreamChunk) -> None:
        try:
            llm.generate("12+30=", GREEDY)
        except EngineError as error:
            caught.append(error)

    llm.submit("copy: a", GREEDY, listener=listener).result(timeout_s=60)
    assert caught and "would wait for itself" in str(caught[0])


def test_a_generation_is_iterated_once(llm: LLM) -> None:
    generation = llm.submit("copy: tide", GREEDY)
    assert "".join(chunk.text for chunk in generation) == "\ntide"
    with pytest.raises(EngineError, match="iterated once"):
        iter(generation)
    listened = llm.submit("copy: tide", GREEDY, listener=lambda chunk: None)
    with pytest.raises(EngineError, match="listener"):
        iter(listened)
    listened.result(timeout_s=30)


def test_an_interrupted_generate_leaves_nothing_running(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(generation: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(llm, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["copy: " + "a" * 30], SamplingParams(max_tokens=500, ignore_eos=True))
    for _ in range(2000):
        if llm.stats().num_running == 0:
            break
    assert llm.stats().num_running == 0


def test_min_tokens_hold_stop_strings_back(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, stop=["b"], min_tokens=6)
    (output,) = llm.generate("copy: abcdebf", params)
    assert output.outputs[0].text == "\nabcde" and output.outputs[0].stop_reason == "b"
    with pytest.raises(InvalidRequestError, match=r"min_tokens: is 1020; .* at most 10\d\d fit"):
        llm.generate("copy: abcde", SamplingParams(min_tokens=1020, max_tokens=2000))


def test_text_held_for_a_stop_string_comes_when_cancelled(llm: LLM) -> None:
    """The answer's last letters could begin the stop string, so they are held back until the end is known."""
    expected = answer(llm, "copy: abcdefgh")
    params = SamplingParams(temperature=0, max_tokens=8, stop=["fghz"])
    assert llm.generate("copy: abcdefgh", params)[0].outputs[0].text == expected[:8] == "\nabcdefg"


def test_async_shows_the_end_once_to_a_slow_reader(llm: LLM) -> None:
    async def read() -> list[bool]:
        engine = AsyncLLM.from_llm(llm)
        seen = []
        async for output in engine.generate("copy: abcdefghijklmnop", GREEDY):
            seen.append(output.finished)
            await asyncio.sleep(0.02)
        return seen

    seen = asyncio.run(read())
    assert seen.count(True) == 1 and seen[-1]


def test_many_threads_share_one_llm(llm: LLM) -> None:
    answers: dict[int, str] = {}

    def work(number: int) -> None:
        answers[number] = answer(llm, f"copy: tide{number}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert answers == {n: f"\ntide{n}" for n in range(8)}


@pytest.mark.parametrize("backend", ["reference", "mlx"])
@pytest.mark.parametrize(("block_tokens", "blocks"), [(1, 1), (1, 5), (1, 64), (2, 1), (2, 40), (3, 30), (64, 1)])
def test_blocks_of_any_size(backend: str, block_tokens: int, blocks: int) -> None:
    if backend == "mlx":
        require("mlx")
        require("mlx_lm")
    with LLM(backend=backend, block_tokens=block_tokens, num_kv_blocks=blocks, max_num_seqs=3) as llm:
        prompt = [1, 280, 281][: min(3, llm.limits.max_tokens - 1)]
        outputs = llm.generate([prompt] * 4, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        assert len({output.outputs[0].token_ids for output in outputs}) == 1
        assert len(outputs[0].outputs[0].token_ids) == min(20, llm.limits.max_tokens - len(prompt))
        llm.check()


@pytest.mark.parametrize("backend", ["reference", "mlx"])
def test_an_eos_id_outside_the_vocabulary_is_refused(backend: str, tmp_path: Path) -> None:
    if backend == "mlx":
        require("mlx")
        require("mlx_lm")
    folder = Path(shutil.copytree(tiny_folder(), tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5000]}))
    with pytest.raises(ModelLoadError, match="eos_token_id 5000 is outside the vocabulary, 0 to 383"):
        LLM(folder, backend=backend)


def test_odd_values_are_refused_by_field() -> None:
    with LLM(backend="reference", num_kv_blocks=8) as llm:
        with pytest.raises(InvalidRequestError, match="prompt: is empty; it needs at least one character"):
            llm.generate("")
        with pytest.raises(InvalidRequestError, match="messages: is empty"):
            llm.chat([])
        with pytest.raises(InvalidRequestError, match="sampling_params: is list"):
            llm.submit("a", [])  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="prompt: is 5 beside prompt_token_ids"):
            llm.generate({"prompt": 5, "prompt_token_ids": [1]})
        with pytest.raises(InvalidRequestError, match="prompt_token_ids: has 'ndarray'"):
            llm.generate({"prompt_token_ids": np.zeros((2, 2), int)})
        for array, count in ((np.array([1, 280, 281]), 1), (np.array([[1, 280], [1, 281]]), 2)):
            assert len(llm.generate(array, GREEDY)) == count  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="prompt_tokens: is '5'; must be a whole number"):
            llm.warmup("5")  # type: ignore[arg-type]
    for option, message in (
        ({"seed": "x"}, "seed: is 'x'"), ({"seed": -1}, "seed: is -1"), ({"max_num_seqs": 10**9}, "max_num_seqs: is"),
    ):  # fmt: skip
        with pytest.raises(InvalidRequestError, match=message):
            LLM(backend="reference", **option)
    with pytest.raises(ModelLoadError, match="model: is 5"):
        LLM(5, backend="reference")  # type: ignore[arg-type]
    with LLM(backend="reference", num_kv_blocks=8, seed=None) as llm:
        assert llm.generate("12+30=", SamplingParams(max_tokens=3))[0].finished


def test_unknown_backend_option_is_refused_on_mlx() -> None:
    require("mlx")
    require("mlx_lm")
    with pytest.raises(InvalidRequestError, match="backend_options: has 'grup_attention'"):
        LLM(backend="mlx", backend_options={"grup_attention": True})


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 4 << 30), ("512MiB", 512 << 20), ("2k", 2000), ("1.5G", 1500 * 10**6), (77, 77)]
)
def test_sizes_as_people_write_them(text: Any, size: int) -> None:
    assert parse_bytes("kv_cache_memory", text) == size
