"""Saved prefixes on the null backend: what a file holds, and what is refused (the format and both private steps)."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from cortexstream import LLM, SamplingParams, prefix_file
from cortexstream.backend import LayerState, PackedKV
from cortexstream.errors import ArenaFullError, EngineError, InvalidRequestError, ModelLoadError
from cortexstream.prefix_file import FORMAT, Origin, Prefix, checkpoint_id, load, save

GREEDY = SamplingParams(temperature=0, max_tokens=6)
PROMPT = [7 * i % 90 for i in range(1, 51)]


def null(**options: Any) -> LLM:
    extra = options.pop("extra", {})
    return LLM(
        backend="null", backend_options=extra, **{"num_kv_blocks": 64, "block_tokens": 4, "max_num_seqs": 3, **options}
    )


def answer(llm: LLM, prompt: list[int]) -> tuple[tuple[int, ...], int]:
    output = llm.generate([prompt], GREEDY, use_tqdm=False)[0]
    assert output.outputs[0].error is None
    return output.outputs[0].token_ids, output.num_cached_tokens


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("layout", ["run", "paged"])
def test_a_saved_prefix_is_found_by_another_engine(tmp_path: Path, layout: Any, window: int | None) -> None:
    extra = {} if window is None else {"window": window}
    if window is not None and layout == "paged":
        with null(kv_layout=layout, extra=extra) as llm, pytest.raises(InvalidRequestError, match="not reused here"):
            llm.save_prefix({"prompt_token_ids": PROMPT}, tmp_path / "p")
        return
    path = tmp_path / "prompt.safetensors"
    with null(kv_layout=layout, extra=extra, max_num_batched_tokens=16) as llm:
        expected, _ = answer(llm, [*PROMPT, 3, 4])
        assert llm.save_prefix({"prompt_token_ids": PROMPT}, path) == 50
        llm.check()
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["format"] == FORMAT
        assert file.get_tensor("tokens").tolist() == PROMPT
        assert file.get_tensor("layers.0.keys").shape == (50, 1, 2)
        if window is not None:
            assert file.get_tensor("layers.1.values").shape == (window, 1, 2)
    with null(kv_layout=layout, extra=extra) as llm:
        found = llm.load_prefix(path)
        assert found == (50 if layout == "run" else 48)
        assert answer(llm, [*PROMPT, 3, 4]) == (expected, found)
        assert llm.stats().prompt_tokens == 52 - found
        llm.check()


def test_saving_computes_only_what_is_not_known_and_disturbs_nobody(tmp_path: Path) -> None:
    with null() as llm:
        alone, _ = answer(llm, PROMPT)
        steps = llm.stats().steps
        running = llm.submit(PROMPT[::-1], SamplingParams(temperature=0, max_tokens=60))
        assert llm.save_prefix({"prompt_token_ids": PROMPT}, tmp_path / "p") == 50
        assert llm.stats().steps >= steps
        assert len(running.result().outputs[0].token_ids) == 60
        assert answer(llm, PROMPT) == (alone, 49)
        llm.check()
    with null(enable_prefix_caching=False) as llm:
        assert (
            running.result().outputs[0].token_ids
            == llm.generate([PROMPT[::-1]], SamplingParams(temperature=0, max_tokens=60), use_tqdm=False)[0]
            .outputs[0]
            .token_ids
        )


def test_refused_prefixes_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with null() as llm:
        for tokens, words in (
            ([], "0 tokens"),
            ([0] * 300, "300 tokens"),
            ([97], "token id 97"),
            ([-1], "token id -1"),
        ):
            with pytest.raises(InvalidRequestError, match=words):
                llm.save_prefix({"prompt_token_ids": tokens}, path)
        assert not path.exists()
        with pytest.raises(InvalidRequestError, match="nowhere does not exist; make it"):
            llm.save_prefix({"prompt_token_ids": PROMPT}, tmp_path / "nowhere" / "p")
        assert llm.save_prefix({"prompt_token_ids": PROMPT}, path) == 50
        data = path.read_bytes()
        origin = llm._origin()
        ones = np.ones((50, 1, 2), np.float32)
        for layers, words in (
            ([], "has 0 layers; the model has 1"),
            (
                [LayerState(ones[:9], ones)],
                r"keys in layer 0 that are float32 \(9, 1, 2\); float32 \(50, 1, 2\) is needed",
            ),
            ([LayerState(ones, ones.astype(np.float64))], r"values in layer 0 that are float64"),
        ):
            save(tmp_path / "misfit", origin, Prefix(tuple(PROMPT), layers))
            with pytest.raises(InvalidRequestError, match=words):
                llm.load_prefix(tmp_path / "misfit")
        for name, layer in (("infinite", LayerState(ones * np.inf, ones)), ("nan", LayerState(ones, ones * np.nan))):
            save(tmp_path / name, origin, Prefix(tuple(PROMPT), [layer]))
            with pytest.raises(ModelLoadError, match="not finite"):
                llm.load_prefix(tmp_path / name)
        with pytest.raises(ModelLoadError, match="cannot be read"):
            llm.load_prefix(tmp_path / "missing")
        for content, words in ((data[:100], "cannot be read"), (b"", "cannot be read"), (data[:-4], "cannot be read")):
            (tmp_path / "cut").write_bytes(content)
            with pytest.raises(ModelLoadError, match=words):
                llm.load_prefix(tmp_path / "cut")
        save_file({"tokens": np.array(PROMPT, np.int32)}, tmp_path / "other", {"format": "x"})
        with pytest.raises(ModelLoadError, match="no saved prefix"):
            llm.load_prefix(tmp_path / "other")
        llm.check()
        assert llm.load_prefix(path) == 50
    with null(enable_prefix_caching=False) as llm, pytest.raises(InvalidRequestError, match="not reused here"):
        llm.load_prefix(path)


def test_a_full_arena_and_taken_slots_are_said(tmp_path: Path) -> None:
    with null(max_num_seqs=1, max_model_len=250) as llm:
        slot = llm._engine.call(lambda core: core.scheduler.borrow_slot())
        with pytest.raises(EngineError, match="all 1 sequences are in use"):
            llm.save_prefix({"prompt_token_ids": PROMPT}, tmp_path / "p")
        llm._engine.call(lambda core: core.scheduler.return_slot(slot))
    with null(max_model_len=250) as llm:
        llm.save_prefix({"prompt_token_ids": PROMPT}, tmp_path / "p")
        running = llm.submit([1] * 240, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
        refused = 0
        while not running.done:
            try:
                llm.load_prefix(tmp_path / "p")
            except ArenaFullError as error:
                refused += "blocks" in str(error)
        assert running.result().outputs[0].error is None
        llm.check()


def test_another_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"w": np.zeros(200_000, np.float32)}, folder / "model.safetensors")
    before = checkpoint_id(folder)
    assert before == checkpoint_id(folder) != checkpoint_id(None)
    state = LayerState(np.ones((2, 1, 1), np.float32), np.ones((2, 1, 1), np.float32))
    save(tmp_path / "p", Origin(before, "float32"), Prefix((1, 2), [state]))
    assert load(tmp_path / "p", Origin(before, "float32")).tokens == (1, 2)
    with pytest.raises(ModelLoadError, match="kind 'float32', and this engine's are 'bfloat16': use the same dtype"):
        load(tmp_path / "p", Origin(before, "bfloat16"))
    values = np.zeros(200_000, np.float32)
    values[100_000] = 1.0  # in the middle of the file
    save_file({"w": values}, folder / "model.safetensors")
    assert checkpoint_id(folder) != before
    with pytest.raises(ModelLoadError, match="another checkpoint"):
        load(tmp_path / "p", Origin(checkpoint_id(folder), "float32"))
    save_file({"w": np.zeros(200_000, np.float32), "x": np.zeros(3, np.float32)}, folder / "model.safetensors")
    assert checkpoint_id(folder) != before
    (folder / "config.json").write_text('{"rope_theta": 1.0}')
    assert checkpoint_id(folder) != checkpoint_id(None)
    changed = checkpoint_id(folder)
    (folder / "config.json").write_text('{"rope_theta": 2.0}')
    assert checkpoint_id(folder) != changed


@pytest.mark.parametrize("place", [0, 17, 50_000, 99_999])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_every_tensor_of_a_large_checkpoint_counts(
    name: str, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start, the middle and the end of each are looked at, wherever it lies in the file."""
    monkeypatch.setattr(prefix_file, "WHOLE_BYTES", 1000)
    tensors = {key: np.full(100_000, number, np.float32) for number, key in enumerate("abc")}
    ids = []
    for _ in range(2):
        (tmp_path / "config.json").write_text("{}")
        save_file(tensors, tmp_path / "model.safetensors")
        ids.append(checkpoint_id(tmp_path))
        tensors[name][place] = 9.0
    assert ids[0] != ids[1]


def test_numbers_that_are_not_finite_are_refused_packed_or_not(tmp_path: Path) -> None:
    ones = np.ones((2, 1, 1), np.float32)
    packed = PackedKV(np.zeros((2, 1, 1), np.uint32), ones, ones)
    origin = Origin("none", "int8 in groups of 64, of float32")
    for bad in (packed._replace(scales=ones * np.nan), packed._replace(biases=ones * np.inf)):
        save(tmp_path / "p", origin, Prefix((1, 2), [LayerState(packed, bad)]))
        with pytest.raises(ModelLoadError, match="not finite"):
            load(tmp_path / "p", origin)


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    """A bit of the numbers, of the tokens, of the metadata; tensors of other names, types and shapes."""
    rng = np.random.default_rng(0)
    state = LayerState(*(rng.standard_normal((3, 2, 4)).astype(np.float32) for _ in range(2)))
    packed = PackedKV(rng.integers(0, 2**32, (3, 2, 1), np.uint32), *(np.ones((3, 2, 1), np.float32) for _ in range(2)))
    origin, path = Origin("none", "float32"), tmp_path / "p"
    save(path, origin, Prefix((5, 6, 7), [state, LayerState(packed, packed)]))
    whole = path.read_bytes()
    found = load(path, origin)
    assert found.tokens == (5, 6, 7) and isinstance(found.layers[1].values, PackedKV)
    assert np.array_equal(found.layers[0].keys, state.keys)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ModelLoadError):
            load(path, origin)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": np.array([[1, 2]], np.int32)}, "no list of int32 tokens"),
        ({"tokens": np.array([1.5, 2], np.float32)}, "no list of int32 tokens"),
        ({"tokens": None}, "no list of int32 tokens"),
        ({"layers.0.keys": None}, "has no layers.0.keys"),
        ({"layers.0.keys": None, "layers.0.keys.packed": np.ones(3, np.uint32)}, "only parts of it"),
        ({"layers.2.keys": np.ones(3, np.float32)}, "has no layers.1.keys"),
        ({"mask": np.ones(3, np.float32)}, "has mask, which has no place"),
    ],
)
def test_a_file_of_other_tensors_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Made with a digest that fits: what a program with an error of its own would write."""
    ones = np.ones((2, 1, 1), np.float32)
    tensors = {"tokens": np.array([1, 2], np.int32), "layers.0.keys": ones, "layers.0.values": ones, **change}
    tensors = {name: array for name, array in tensors.items() if array is not None}
    metadata = {"format": FORMAT, "checkpoint": "none", "numbers": "float32"}
    save_file(tensors, tmp_path / "p", {**metadata, "digest": prefix_file._digest(metadata, tensors)})
    with pytest.raises(ModelLoadError, match=words):
        load(tmp_path / "p", Origin("none", "float32"))


@pytest.mark.parametrize(
    "path", ["", ".", "..", "/", "a\0b", "nowhere/p", "a" * 300, "\ud800", "/dev/null", None, 3, b"x", [], True]
)
def test_a_path_that_cannot_be_a_file_is_refused_before_anything_is_computed(path: Any, tmp_path: Path) -> None:
    with null() as llm:
        with pytest.raises(InvalidRequestError, match="path"):
            llm.save_prefix({"prompt_token_ids": PROMPT}, path)
        with pytest.raises(InvalidRequestError, match="is a folder"):
            llm.save_prefix({"prompt_token_ids": PROMPT}, tmp_path)
        assert llm.stats().prompt_tokens == 0
        if not isinstance(path, str):
            for call in (llm.load_prefix, llm.arena_svg if path is not None else llm.load_prefix):
                with pytest.raises(InvalidRequestError, match=r"path: is .*; it must be a str or a Path"):
                    call(path)
    assert Path("/dev/null").is_char_device()


def test_a_link_is_followed_and_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, link, ring = tmp_path / "real", tmp_path / "link", tmp_path / "ring"
    ring.symlink_to(ring)
    real.write_text("old")
    link.symlink_to(real)
    with null() as llm:
        llm.save_prefix({"prompt_token_ids": PROMPT}, link)
        assert link.is_symlink() and llm.load_prefix(real) == 50

        with pytest.raises(InvalidRequestError, match="path"):
            llm.save_prefix({"prompt_token_ids": PROMPT}, ring)
        ring.unlink()

        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "replace", refuse)
        with pytest.raises(InvalidRequestError, match="cannot be written: Permission denied"):
            llm.save_prefix({"prompt_token_ids": PROMPT}, tmp_path / "new")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_saving_gives_its_slot_back(tmp_path: Path) -> None:
    """More often than there are slots, and after a refusal."""
    with null(max_num_seqs=2) as llm:
        for number in range(5):
            llm.save_prefix({"prompt_token_ids": PROMPT[number:]}, tmp_path / "p")
            with pytest.raises(InvalidRequestError):
                llm.save_prefix({"prompt_token_ids": [0] * 300}, tmp_path / "p")
        assert answer(llm, PROMPT)[0]


@pytest.mark.parametrize("layers", ["fresh", "turned", "loaded"])
@pytest.mark.parametrize(("window", "block_tokens"), [(8, 4), (6, 4), (9, 4), (12, 1)])
def test_f39_what_is_saved_of_a_ring_is_the_window(layers: str, window: int, block_tokens: int, tmp_path: Path) -> None:
    """Whatever the ring held before: a prompt that others went on from, one that is the beginning of a loaded file."""
    options: dict[str, Any] = {"extra": {"window": window}, "block_tokens": block_tokens, "kv_layout": "run"}
    longer, path = [*PROMPT, 9], tmp_path / "p"
    with null(**options) as llm:
        expected = {n: answer(llm, PROMPT[:n])[0] for n in (49, 50)}
    for length in (49, 50):
        with null(**options) as llm:
            if layers == "turned":
                for tokens in (1, 2, 3):
                    llm.generate([PROMPT[:length]], SamplingParams(temperature=0, max_tokens=tokens), use_tqdm=False)
            if layers == "loaded":
                with null(**options) as other:  # whose memory holds more than the file
                    other.save_prefix({"prompt_token_ids": longer}, tmp_path / "longer")
                llm.load_prefix(tmp_path / "longer")
            assert llm.save_prefix({"prompt_token_ids": PROMPT[:length]}, path) == length
            llm.check()
        with null(**options) as llm:
            assert llm.load_prefix(path) == length
            assert answer(llm, PROMPT[:length]) == (expected[length], length - 1)


def test_many_threads_save_and_load_one_path(tmp_path: Path) -> None:
    """Whoever reads finds a whole file, somebody's; nothing is left beside it."""
    path, errors = tmp_path / "p.safetensors", []
    with null() as llm:
        llm.save_prefix({"prompt_token_ids": PROMPT}, path)

        def work(number: int) -> None:
            try:
                for _ in range(10):
                    origin = llm._origin()
                    saved = Prefix((number, 2), [LayerState(*(np.full((2, 1, 2), number, np.float32),) * 2)])
                    save(path, origin, saved)
                    read = load(path, origin)
                    assert np.all(read.layers[0].keys == read.tokens[0])
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not errors and [found.name for found in tmp_path.iterdir()] == [path.name]
