"""F85: text token by token is the text of all tokens, and no character is shown in halves."""

from __future__ import annotations

from itertools import chain, takewhile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexstream.text.detokenizer import CONTEXT_TOKENS, Detokenizer
from cortexstream.text.tokenizer import Tokenizer
from tests.text.conftest import KINDS

UNICODE = st.text(st.characters(codec="utf-8")).filter(lambda text: "\ufffd" not in text)
PIECES = ["🎉", "👩‍👩‍👧", "日本語", "한", "é", " ", "  ", "\n", "the dog", "▁", "0", "<s>", "</s>", "𝔘", "\u0301"]
TEXT = UNICODE | st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


def stream(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    return [*(detokenizer.feed(token) for token in output), detokenizer.finish()]


def in_context(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool = True) -> str:
    """What the output adds to the text of the prompt."""
    before, after = tokenizer.decode(prompt, skip), tokenizer.decode(prompt + output, skip)
    return after[len(list(takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))) :]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(prompt=TEXT, text=TEXT, skip=st.booleans())
def test_f85_pieces_joined_are_the_whole_text(
    folders: dict[str, Path], kind: str, prompt: str, text: str, skip: bool
) -> None:
    tokenizer = Tokenizer.from_folder(folders[kind])
    before, output = tokenizer.encode(prompt), tokenizer.encode(text, add_special_tokens=False)
    pieces = stream(tokenizer, before, output, skip)
    assert "".join(pieces) == in_context(tokenizer, before, output, skip)
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_f85_any_ids_even_if_their_bytes_are_no_text(
    folders: dict[str, Path], kind: str, data: st.DataObject, skip: bool
) -> None:
    """A model may draw any id: half characters, special tokens, padding of the vocabulary, thirty blanks in a row."""
    tokenizer = Tokenizer.from_folder(folders[kind])
    blank, emoji = tokenizer.encode(" ", add_special_tokens=False), tokenizer.encode("🎉", add_special_tokens=False)
    token = st.integers(0, tokenizer.vocab_size + 2)
    run = st.lists(token, max_size=6) | st.sampled_from([blank * 30, emoji, emoji[:-1], emoji[1:], emoji[-2:-1] * 30])
    ids = st.lists(run, max_size=8).map(lambda runs: [*chain(*runs)])
    prompt, output = data.draw(ids), data.draw(ids)
    assert "".join(stream(tokenizer, prompt, output, skip)) == in_context(tokenizer, prompt, output, skip)


@pytest.mark.parametrize("kind", KINDS)
def test_f85_an_emoji_comes_whole_and_at_once(folders: dict[str, Path], kind: str) -> None:
    tokenizer = Tokenizer.from_folder(folders[kind])
    prompt = tokenizer.encode("the dog")
    output = tokenizer.encode("the dog🎉🎉")[len(prompt) :]
    assert [piece for piece in stream(tokenizer, prompt, output) if piece] == ["🎉", "🎉"]


@pytest.mark.parametrize("kind", KINDS)
def test_f85_a_cut_character_is_shown_at_the_end_only(folders: dict[str, Path], kind: str) -> None:
    tokenizer = Tokenizer.from_folder(folders[kind])
    prompt = tokenizer.encode("dog")
    output = tokenizer.encode("dog 🎉")[len(prompt) : -1]
    *pieces, last = stream(tokenizer, prompt, output)
    assert "".join(pieces) == " "
    assert last and set(last) == {"\ufffd"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_that_the_prompt_began_belongs_to_the_output(folders: dict[str, Path], kind: str) -> None:
    tokenizer = Tokenizer.from_folder(folders[kind])
    ids = tokenizer.encode("dog 🎉!")
    for cut in range(len(tokenizer.encode("dog ")) + 1, len(ids) - 1):
        assert "".join(stream(tokenizer, ids[:cut], ids[cut:])).endswith("🎉!")


@pytest.mark.parametrize("kind", KINDS)
def test_a_replacement_character_in_the_prompt_is_not_repeated(folders: dict[str, Path], kind: str) -> None:
    tokenizer = Tokenizer.from_folder(folders[kind])
    prompt = tokenizer.encode("what is \ufffd")
    output = tokenizer.encode("what is \ufffdx")[len(prompt) :]
    assert "".join(stream(tokenizer, prompt, output)) == "x"


@pytest.mark.parametrize("kind", ["sp_bpe", "llama_json", "sp_unigram"])
@pytest.mark.parametrize("blanks", [1, 100])
def test_the_space_before_a_word_survives_after_blanks_and_special_tokens(
    folders: dict[str, Path], kind: str, blanks: int
) -> None:
    """These decoders drop a space at the start of a text; the start of the window must not look like one."""
    tokenizer = Tokenizer.from_folder(folders[kind])
    blank = tokenizer._codec.token_id("▁")
    eos = tokenizer.eos_token_id
    assert blank is not None and eos is not None
    word = tokenizer.encode("dog", add_special_tokens=False)
    output = [*word, *[eos] * 50, *[blank] * blanks, *word]
    assert "".join(stream(tokenizer, [], output)) == "dog" + " " * blanks + " dog"
    prompt = [*word, *[eos] * 50, *[blank] * blanks]
    assert "".join(stream(tokenizer, prompt, word)) == " dog"


@pytest.mark.parametrize("kind", KINDS)
def test_f85_work_per_token_does_not_grow(folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.from_folder(folders[kind])
    work: list[int] = []
    decode = Tokenizer.decode

    def counted(self: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> str:
        work.append(len(ids))
        return decode(self, ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    texts = [tokenizer.encode(text) * 60 for text in ("the dog 日本 🎉 ", " ")]
    emoji = tokenizer.encode("🎉", add_special_tokens=False)
    for tokens in (*texts, emoji[-1:] * 500, emoji[:-1] * 150, [2, 1] * 300):
        detokenizer = Detokenizer(tokenizer, tokens)
        work.clear()
        for token in tokens:
            detokenizer.feed(token)
        assert sum(work) <= len(tokens) * 2 * (2 * CONTEXT_TOKENS + 1)
        assert max(work, default=0) <= 2 * CONTEXT_TOKENS + 1


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_tokens_do_not_push_the_context_away(folders: dict[str, Path], kind: str) -> None:
    tokenizer = Tokenizer.from_folder(folders[kind])
    eos = tokenizer.eos_token_id
    assert eos is not None
    ids = tokenizer.encode("dog 🎉!")
    for cut in range(len(ids)):
        assert "".join(stream(tokenizer, [*ids[:cut], *[eos] * 50], ids[cut:])) == in_context(
            tokenizer, ids[:cut], ids[cut:]
        )
        assert "".join(stream(tokenizer, [], [*ids[:cut], *[eos] * 50, *ids[cut:]])) == "dog 🎉!"


def test_blanks_after_bytes_that_show_nothing_by_themselves(folders: dict[str, Path]) -> None:
    """The emoji is spread over byte tokens, so no single token before the blanks has a visible character."""
    tokenizer = Tokenizer.from_folder(folders["sp_unigram"])
    blank = tokenizer._codec.token_id("▁")
    assert blank is not None
    emoji = tokenizer.encode("🎉", add_special_tokens=False)[-4:]
    assert "".join(stream(tokenizer, emoji, [blank] * 60)) == " " * 60


def test_finish_gives_the_rest_once(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_folder(folders["byte_level"])
    detokenizer = Detokenizer(tokenizer, [])
    first = tokenizer.encode("🎉", add_special_tokens=False)[0]
    assert (detokenizer.feed(first), detokenizer.finish(), detokenizer.finish()) == ("", "\ufffd", "")
