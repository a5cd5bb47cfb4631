"""F84: which tokenizer a folder gets, and that it encodes and decodes as its own library does."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortexstream.errors import InvalidRequestError, ModelLoadError
from cortexstream.text.tokenizer import Tokenizer
from tests.conftest import require
from tests.text.conftest import CORPUS, write_byte_level, write_config, write_sentencepiece

TEXTS = [
    "",
    " ",
    "Hello",
    "  two  spaces ",
    "a\nb\tc\n",
    "naïve café",
    "👩‍👩‍👧 🎉",
    "東京 is 都",
    "Ω≈ç√ 한국어",
    *CORPUS[:5],
]
SENTENCEPIECE = ("sp_bpe", "sp_unigram")
JSON = ("tiny_json", "byte_level", "llama_json")


def sentencepiece_judge(folder: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def transformers_judge(folder: Path) -> Any:
    return require("transformers").PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("kind", SENTENCEPIECE)
@settings(max_examples=60, deadline=None)
@given(text=st.text() | st.sampled_from(TEXTS), data=st.data())
def test_f84_sentencepiece_encodes_and_decodes_as_its_library(
    folders: dict[str, Path], kind: str, text: str, data: st.DataObject
) -> None:
    tokenizer, judge = Tokenizer.from_folder(folders[kind]), sentencepiece_judge(folders[kind])
    assert tokenizer.encode(text, add_special_tokens=False) == judge.encode(text)
    assert tokenizer.encode(text) == [judge.bos_id(), *judge.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == judge.decode(judge.encode(text))
    ids = data.draw(st.lists(st.integers(0, judge.get_piece_size() - 1).filter(lambda i: i != judge.unk_id())))
    assert tokenizer.decode(ids) == judge.decode(ids)


@pytest.mark.parametrize("kind", JSON)
def test_f84_tokenizer_json_encodes_and_decodes_as_transformers(folders: dict[str, Path], kind: str) -> None:
    tokenizer, judge = Tokenizer.from_folder(folders[kind]), transformers_judge(folders[kind])

    @settings(max_examples=100, deadline=None)
    @given(text=st.text() | st.sampled_from(TEXTS))
    def check(text: str) -> None:
        ids = judge.encode(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode(text, add_special_tokens=False) == judge.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == judge.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special_tokens=False) == judge.decode(ids)

    check()
    assert tokenizer.vocab_size == len(judge)
    assert tokenizer.bos_token_id == judge.bos_token_id is not None
    assert tokenizer.eos_token_id == judge.eos_token_id is not None
    assert tokenizer.pad_token_id == judge.pad_token_id


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 419)))
def test_byte_level_decodes_any_ids_as_transformers(folders: dict[str, Path], ids: list[int]) -> None:
    tokenizer, judge = Tokenizer.from_folder(folders["byte_level"]), transformers_judge(folders["byte_level"])
    assert tokenizer.decode(ids) == judge.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["tiny_json", "tiny_model", "byte_level", "llama_json", "sp_bpe"])
@settings(max_examples=60, deadline=None)
@given(text=st.text() | st.sampled_from(TEXTS))
def test_f84_round_trip(folders: dict[str, Path], kind: str, text: str) -> None:
    tokenizer = Tokenizer.from_folder(folders[kind])
    expected = text.replace("▁", " ") if kind != "byte_level" else text  # these write a space as U+2581
    assert tokenizer.decode(tokenizer.encode(text)) == expected


@settings(max_examples=150, deadline=None)
@given(
    text=st.lists(st.sampled_from(["<|user|>", "<|end|>", "<s>", " hi", "é", "\n"]) | st.text(max_size=4)).map("".join),
    ids=st.lists(st.integers(0, 420)),
    skip=st.booleans(),
)
def test_the_embedded_twins_agree_on_every_text_and_every_id(
    folders: dict[str, Path], text: str, ids: list[int], skip: bool
) -> None:
    """tokenizer.json and tokenizer.model of one folder: special tokens, bytes that are no characters, foreign ids."""
    fast, slow = Tokenizer.from_folder(folders["tiny_json"]), Tokenizer.from_folder(folders["tiny_model"])
    assert fast.encode(text) == slow.encode(text)
    ids = [i for i in ids if i != 0]  # sentencepiece writes <unk> as a mark of its own
    assert fast.decode(ids, skip) == slow.decode(ids, skip)
    for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(fast, name) == getattr(slow, name)


def test_f84_order_of_resolution(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["byte_level"], tmp_path, dirs_exist_ok=True)
    shutil.copy(folders["sp_bpe"] / "tokenizer.model", tmp_path)
    ids = Tokenizer.from_folder(tmp_path).encode(CORPUS[0])
    assert ids == Tokenizer.from_folder(folders["byte_level"]).encode(CORPUS[0])
    (tmp_path / "tokenizer.json").unlink()
    ids = Tokenizer.from_folder(str(tmp_path)).encode(CORPUS[0], add_special_tokens=False)
    assert ids == Tokenizer.from_folder(folders["sp_bpe"]).encode(CORPUS[0], add_special_tokens=False)


def test_f84_transformers_reads_what_is_left(folders: dict[str, Path], tmp_path: Path) -> None:
    require("transformers")
    model = json.loads((folders["byte_level"] / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    roles = {"bos_token": "<|begin|>", "eos_token": "<|eot|>", "unk_token": "<|eot|>"}
    write_config(tmp_path, tokenizer_class="GPT2Tokenizer", **roles)
    tokenizer, twin = Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(folders["byte_level"])
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == twin.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (twin.bos_token_id, twin.eos_token_id)


def test_f84_transformers_tokenizer_without_a_fast_twin(tmp_path: Path) -> None:
    judge = require("transformers").ByT5Tokenizer()
    judge.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("naïve 🎉") == judge.encode("naïve 🎉")
    assert tokenizer.decode(tokenizer.encode("naïve 🎉")) == "naïve 🎉"
    assert tokenizer.decode(tokenizer.encode("a"), skip_special_tokens=False) == "a</s>"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (1, 0, None)


def test_f84_without_transformers_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    write_config(tmp_path, tokenizer_class="GPT2Tokenizer")
    with pytest.raises(ModelLoadError, match=r"install transformers .* skip_tokenizer_init=True") as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_f84_transformers_failure_names_the_folder(tmp_path: Path) -> None:
    require("transformers")
    write_config(tmp_path, tokenizer_class="NoSuchTokenizer", auto_map={"AutoTokenizer": ["own.Own", None]})
    (tmp_path / "own.py").write_text("raise SystemExit('code from the folder was run')")
    with pytest.raises(ModelLoadError, match="transformers cannot make a tokenizer") as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_f84_a_config_without_a_vocabulary_is_no_tokenizer(tmp_path: Path) -> None:
    """transformers alone would make one that turns every text into nothing."""
    require("transformers")
    write_config(tmp_path, tokenizer_class="GPT2Tokenizer")
    with pytest.raises(ModelLoadError, match=r"has no vocabulary: tokenizer.json, tokenizer.model .*GPT2Tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_f84_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError) as caught:
        Tokenizer.from_folder(tmp_path)
    for word in (
        str(tmp_path),
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "skip_tokenizer_init=True",
    ):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer.model", "not a protobuf"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("special_tokens_map.json", '"</s>"'),
        ("added_tokens.json", "\x00"),
    ],
)
def test_f84_a_broken_file_is_named(folders: dict[str, Path], tmp_path: Path, name: str, content: str) -> None:
    if name != "tokenizer.model":
        shutil.copy(folders["byte_level"] / "tokenizer.json", tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelLoadError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_f84_special_ids_come_from_the_files(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(folders["byte_level"] / "tokenizer.json", tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, None, None)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|pad|>", "pad_token": {"content": "<|pad|>"}}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 2, 2)
    write_config(tmp_path, bos_token="", eos_token="<|eot|>", pad_token="<not in the vocabulary>")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (None, 1, None)


def test_f84_sentencepiece_roles_of_the_model_itself(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path, model_type="bpe", bos_id=5, eos_id=4, pad_id=3, unk_id=2)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (5, 4, 3)
    assert tokenizer.encode("a")[0] == 5
    write_sentencepiece(tmp_path, model_type="bpe", bos_id=-1)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (None, None)
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special_tokens=False)
    write_config(tmp_path, add_bos_token=True)
    with pytest.raises(ModelLoadError, match="sets add_bos_token, but the vocabulary has no bos_token"):
        Tokenizer.from_folder(tmp_path)


def test_f84_add_bos_and_eos_switches_of_sentencepiece(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(folders["sp_bpe"] / "tokenizer.model", tmp_path)
    plain = Tokenizer.from_folder(tmp_path).encode("the dog", add_special_tokens=False)
    assert Tokenizer.from_folder(tmp_path).encode("the dog") == [1, *plain]
    write_config(tmp_path, add_bos_token=False, add_eos_token=True)
    assert Tokenizer.from_folder(tmp_path).encode("the dog") == [*plain, 2]


def test_special_tokens_in_text_with_sentencepiece(folders: dict[str, Path], tmp_path: Path) -> None:
    """Chat templates spell special tokens out; sentencepiece alone would read `</s>` as three characters and more."""
    shutil.copy(folders["sp_bpe"] / "tokenizer.model", tmp_path)
    judge = sentencepiece_judge(tmp_path)
    size = judge.get_piece_size()
    added = {str(size): {"content": "<|im|>", "special": True, "rstrip": True}, str(size + 1): {"content": "<|im|>x"}}
    write_config(tmp_path, added_tokens_decoder=added)
    tokenizer = Tokenizer.from_folder(tmp_path)
    end = judge.piece_to_id("<|end|>")
    ids = tokenizer.encode("the dog<|end|>fox</s><|im|> \n dog<|im|>x", add_special_tokens=False)
    assert ids == [*judge.encode("the dog"), end, *judge.encode("fox"), 2, size, *judge.encode("dog"), size + 1]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the dog<|end|>fox</s><|im|>dog<|im|>x"
    assert tokenizer.decode(ids) == "the dog fox dog<|im|>x"
    assert tokenizer.vocab_size == size + 2


def test_added_tokens_json_of_older_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(folders["sp_bpe"] / "tokenizer.model", tmp_path)
    size = sentencepiece_judge(tmp_path).get_piece_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<call>": size, "[PAD]": size + 1}))
    write_config(tmp_path, pad_token="[PAD]")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.pad_token_id == size + 1
    assert tokenizer.encode("<call>[PAD]", add_special_tokens=False) == [size, size + 1]
    assert tokenizer.decode([size, size + 1]) == "<call>"


def test_legacy_false_sets_the_dummy_prefix_once(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(folders["sp_bpe"] / "tokenizer.model", tmp_path)
    write_config(tmp_path, legacy=False)
    tokenizer, judge = Tokenizer.from_folder(tmp_path), sentencepiece_judge(tmp_path)
    pieces = [judge.id_to_piece(i) for i in tokenizer.encode("the dog</s>the dog", add_special_tokens=False)]
    before, after = pieces[: pieces.index("</s>")], pieces[pieces.index("</s>") + 1 :]
    assert "".join(before) == "▁the▁dog" and "".join(after) == "the▁dog"
    ids = tokenizer.encode("the dog</s> the</s>dog", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the dog</s> the</s>dog"


@pytest.mark.parametrize("kind", ["tiny_json", "sp_bpe"])
def test_text_that_is_not_unicode_is_refused(folders: dict[str, Path], kind: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"prompt: .*U\+D83D at character 2") as caught:
        Tokenizer.from_folder(folders[kind]).encode("ab\ud83d")
    assert caught.value.field == "prompt"
    not_text: Any = b"bytes"
    with pytest.raises(InvalidRequestError, match="prompt: is of type bytes"):
        Tokenizer.from_folder(folders[kind]).encode(not_text)


@pytest.mark.parametrize("kind", ["tiny_json", "sp_bpe"])
def test_ids_outside_the_vocabulary(folders: dict[str, Path], kind: str) -> None:
    tokenizer = Tokenizer.from_folder(folders[kind])
    ids = tokenizer.encode("dog")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, 10**12]) == "dog"
    with pytest.raises(InvalidRequestError, match="has -1; token ids are at least 0"):
        tokenizer.decode([*ids, -1])


def test_truncation_and_padding_in_the_file_do_not_cut_prompts(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library

    write_byte_level(tmp_path)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=16)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]
    assert len(tokenizer.encode("a")) == 2


@pytest.mark.parametrize("kind", ["tiny_json", "tiny_model", "llama_json", "sp_bpe"])
def test_a_byte_that_is_no_character_leaves_its_neighbours_alone(folders: dict[str, Path], kind: str) -> None:
    tokenizer = Tokenizer.from_folder(folders[kind])
    invalid = tokenizer._codec.token_id("<0xFF>")
    emoji = tokenizer.encode("🎉", add_special_tokens=False)
    assert invalid is not None
    assert tokenizer.decode([*emoji, invalid, *emoji[-4:], *emoji[-4:-1]]) == "🎉\ufffd🎉\ufffd\ufffd\ufffd"


def test_a_named_special_token_is_one_even_if_the_file_forgot_to_say_so(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    contents = json.loads((folders["byte_level"] / "tokenizer.json").read_text())
    contents["added_tokens"] = [token for token in contents["added_tokens"] if token["content"] != "<|eot|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    write_config(tmp_path, eos_token="<|eot|>")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a<|eot|>", add_special_tokens=False)[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.decode(tokenizer.encode("a<|eot|>")) == "a"
