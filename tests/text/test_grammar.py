"""P14: under a constraint, random logits give only text that the schema, expression, list or grammar accepts."""

from __future__ import annotations

import json
import random
import re
import shutil
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cortexstream.constraint import Constraint
from cortexstream.errors import ConstraintError, InvalidRequestError
from cortexstream.text.detokenizer import Detokenizer
from cortexstream.text.grammar import Grammars
from cortexstream.text.grammar_tokens import GrammarTokens
from tests.text.conftest import KINDS, write_config
from tests.text.schemas import PADDING, Kit, allowed, judge, random_schema, schema_source, source_of

NUM_SCHEMAS = 500
LARK = """
start: "go" (" " step)+ "."
step: NAME [" " NUMBER] | "(" step ")"
NAME: /[a-z]{2,4}/
NUMBER: /[1-9][0-9]?/
"""
SENTENCES = re.compile(r"go( \(*[a-z]{2,4}( [1-9][0-9]?)?\)*)+\.")


@pytest.fixture(scope="module")
def kits(folders: dict[str, Path]) -> dict[str, Kit]:
    return {kind: Kit(folders[kind]) for kind in KINDS}


@pytest.fixture(scope="module")
def tiny(kits: dict[str, Kit]) -> Kit:
    return kits["tiny_json"]


def forced(constraint: Constraint) -> list[int]:
    """The tokens of the one text that a constraint allows, in the one spelling that it offers."""
    state, drawn = constraint.start(), []
    while not state.is_over:
        (token,) = allowed(state.masks()[0])
        drawn.append(token)
        state.advance(token)
    return drawn


@pytest.mark.parametrize("kind", ["tiny_json", "tiny_model", "sp_bpe", "byte_level", "llama_json"])
def test_p14_500_random_schemas_validate(kits: dict[str, Kit], kind: str) -> None:
    """A hundred for each kind of tokenizer; most completions end by themselves, all are brought to an end."""
    kit, unfinished = kits[kind], 0
    first = ["tiny_json", "tiny_model", "sp_bpe", "byte_level", "llama_json"].index(kind) * NUM_SCHEMAS // 5
    for seed in range(first, first + NUM_SCHEMAS // 5):
        schema = random_schema(random.Random(seed))
        constraint = kit.grammars.compile(schema_source(schema))
        tokens = kit.walker.complete(constraint, np.random.default_rng(seed), soft=60, hard=1500)
        if tokens is None:
            unfinished += 1
            continue
        text = kit.walker.text(tokens)
        judge(schema, text)
        assert text.encode() == b"".join(kit.walker.bytes[token] for token in tokens)
    assert unfinished <= 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("given", "right"),
    [
        ({"regex": r"(ab|[c-e]+ )*x{2,4}"}, re.compile(r"(ab|[c-e]+ )*x{2,4}")),
        ({"regex": r"^ ?\d{2}/\d{2} (é|日本)\n$"}, re.compile(r" ?\d{2}/\d{2} (é|日本)\n")),
        ({"regex": r" dogs?| cat"}, re.compile(r" dogs?| cat")),
        ({"grammar": LARK}, SENTENCES),
        ({"response_format": {"type": "json_object"}}, re.compile(r"\{.*\}", re.DOTALL)),
    ],
)
def test_p14_the_text_is_what_was_asked_for(
    kits: dict[str, Kit], kind: str, given: dict[str, Any], right: re.Pattern[str]
) -> None:
    kit = kits[kind]
    constraint = kit.compile(**given)
    for seed in range(8):
        tokens = kit.walker.complete(constraint, np.random.default_rng(seed), soft=40, hard=400)
        if tokens is not None or "grammar" not in given:
            assert tokens is not None and right.fullmatch(kit.walker.text(tokens)), tokens
    assert kit.walker.complete(constraint, np.random.default_rng(0), soft=40, hard=400) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_p14_every_choice_and_nothing_else(kits: dict[str, Kit], kind: str) -> None:
    kit = kits[kind]
    choices = ["no", "no way", " yes", "a.b*[c](d){e}^$|\\/", "#x&y~z-<b>", "line\nfeed\r\t", "q\"u'o", "größe 日本🎉"]
    constraint = kit.compile(choice=choices)
    assert [text for text in choices if not kit.accepts(constraint, text)] == []
    for wrong in ("", "n", "no ", "no way ", "yes", "a.b", "aXb*[c](d){e}^$|\\/", "no wayno way"):
        assert not kit.accepts(constraint, wrong), wrong
    drawn = [kit.walker.complete(constraint, np.random.default_rng(seed), 40, 400) for seed in range(30)]
    texts = {kit.walker.text(tokens) for tokens in drawn if tokens is not None}
    assert texts <= set(choices) and len(texts) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_p14_the_bytes_of_tokens_are_what_decoding_shows(kits: dict[str, Kit], kind: str) -> None:
    """Of each token by itself, and of runs of tokens, which may share characters."""
    kit, rng = kits[kind], np.random.default_rng(5)
    usable = [token for token, piece in enumerate(kit.tokenizer.token_bytes() or []) if piece is not None]
    assert len(usable) > 300
    runs = [[token] for token in usable] + [rng.choice(usable, 6).tolist() for _ in range(300)]
    before = kit.tokenizer.encode("dog")
    for run in runs:
        data = b"".join(kit.walker.bytes[token] for token in run)
        pieces = Detokenizer(kit.tokenizer, before)
        text = "".join(map(pieces.feed, run)) + pieces.finish()
        try:
            assert text == data.decode()
        except UnicodeDecodeError:
            assert "\ufffd" in text


@pytest.mark.parametrize("kind", KINDS)
def test_p14_the_space_before_a_text_is_no_part_of_what_is_forced(kits: dict[str, Kit], kind: str) -> None:
    """These tokenizers put a space before every text. A completion goes on in the middle of one."""
    kit = kits[kind]
    tokens = GrammarTokens(kit.tokenizer, kit.tokenizer.token_bytes() or [], kit.vocab_size, kit.eos)
    for text in ("dog house", " dog", '{"name":"', "é日🎉", "<s>", "a  b", "\u0301x", "\x02"):
        assert b"".join(tokens.tokens[token] for token in tokens(text)) == text.encode()
    state = kit.compile(regex="(the dog does not mind)").start()
    drawn = []
    while not state.is_over:
        ids = allowed(state.masks()[0])
        assert len(ids) == 1  # the model's own spelling
        drawn += ids
        state.advance(ids[0])
    assert kit.walker.text(drawn) == "the dog does not mind"
    in_context = kit.tokenizer.encode("Now,the dog does not mind", add_special_tokens=False)
    assert in_context[-3:] == drawn[-3:]


@pytest.mark.parametrize("mark", string.punctuation)
def test_p14_a_choice_means_every_character_literally(tiny: Kit, mark: str) -> None:
    """Alone, doubled, between letters, and where a regular expression would have a range or a count."""
    for text in (mark, mark * 2, f"a{mark}b", f"ab{mark}1,2{mark}c", f"{mark}x]y", f"x{mark}1}}y"):
        assert tiny.walker.text(forced(tiny.compile(choice=[text]))) == text


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        (r"\w+", ["aZ_09", "x"], ["é", "aé", "日", "-"]),
        (r"[\w-]+", ["a-b"], ["a-é"]),
        (r"\W", ["é", "-"], ["a", "_"]),
        (r"\d+", ["07"], ["٣", "1٣", "a"]),
        (r"[\d.]+", ["1.5"], ["1.٣"]),
        (r"\D", ["٣", "a"], ["7"]),
    ],
)
def test_p14_letters_and_digits_are_ascii(tiny: Kit, pattern: str, right: list[str], wrong: list[str]) -> None:
    """In a regular expression and in a schema: what reads the output may know an older Unicode, or none."""
    schema = tiny.grammars.compile(schema_source({"type": "string", "pattern": f"^{pattern}$"}))
    constraint = tiny.compile(regex=pattern)
    for text in right:
        assert tiny.accepts(constraint, text) and tiny.accepts(schema, f'"{text}"'), text
    for text in wrong:
        assert not tiny.accepts(constraint, text) and not tiny.accepts(schema, f'"{text}"'), text


def write_by_hand(folder: Path) -> None:
    """A tokenizer that writes a space before every text: " abc" is " a" "bc", "abc" behind other text "a" "bc"."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc", "bc", "ab", "▁a"]
    merges = [("b", "c"), ("a", "b"), ("▁", "a")]
    vocab = {name: token for token, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(folder, tokenizer_class="PreTrainedTokenizerFast", eos_token="</s>", unk_token="<unk>")


def test_p14_forced_text_is_spelt_as_the_model_spells_it(tmp_path: Path) -> None:
    """From its first token on: a spelling that the model never saw behind other text would mislead it."""
    write_by_hand(tmp_path)
    kit = Kit(tmp_path)
    assert bytes_of(kit, kit.tokenizer.encode("abc")) == [b" a", b"bc"]
    assert bytes_of(kit, forced(kit.compile(choice=["abc"]))) == [b"a", b"bc"]  # the longest first are "ab" "c"
    assert bytes_of(kit, forced(kit.compile(choice=[" abcabc"]))) == [b" a", b"bc", b"a", b"bc"]


@pytest.mark.parametrize("kind", KINDS)
def test_p14_forced_text_that_the_tokenizer_cannot_spell_takes_the_longest_tokens(
    kits: dict[str, Kit], kind: str
) -> None:
    """The name of a special token, as text. Byte by byte it would take many more steps."""
    kit, plain = kits[kind], "and the lazy dog"
    text = plain + {"byte_level": "<|pad|>"}.get(kind, "<s>")
    drawn, longest = forced(kit.compile(choice=[text])), kit.walker.spelt(plain)
    assert bytes_of(kit, drawn[: len(longest)]) == bytes_of(kit, longest) and kit.walker.text(drawn) == text
    assert len(longest) < len(plain) or kind.startswith("tiny")  # which has tokens of one byte alone


def bytes_of(kit: Kit, tokens: list[int]) -> list[bytes]:
    return [kit.walker.bytes[token] for token in tokens]


def test_p14_a_special_token_is_asked_for_by_its_name_and_ordinary_ones_are_not(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """The library marks special tokens with the byte 0xFF, which ordinary ones may hold, too."""
    shutil.copytree(folders["byte_level"], tmp_path, dirs_exist_ok=True)
    contents = json.loads((tmp_path / "tokenizer.json").read_text())
    contents["added_tokens"] = [token for token in contents["added_tokens"] if token["special"]]
    ordinary = contents["model"]["vocab"]["ÿ<|mark|>"] = len(contents["model"]["vocab"])  # ÿ stands for 0xFF
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    kit = Kit(tmp_path)
    assert kit.walker.bytes[ordinary] == b"\xff<|mark|>"
    pad = kit.tokenizer.encode("<|pad|>", add_special_tokens=False)
    assert forced(kit.compile(grammar='start: "x" <|pad|> "y"'))[1:2] == pad and len(pad) == 1
    assert pad[0] not in forced(kit.compile(choice=["x<|pad|>y"]))
    with pytest.raises(InvalidRequestError, match=r"unknown special token: \"<\|mark\|>\""):
        kit.compile(grammar='start: "x" <|mark|> "y"')


def test_masks_cover_the_models_vocabulary_and_never_its_padding(kits: dict[str, Kit]) -> None:
    for kit in kits.values():
        size = kit.tokenizer.vocab_size
        usable = {token for token, piece in enumerate(kit.tokenizer.token_bytes() or []) if piece is not None}
        for vocab_size in (size + PADDING, size + 1, size, size - 9, 300):
            grammars = Grammars(kit.tokenizer, vocab_size, frozenset({2, vocab_size + 5}))
            mask = grammars.compile(source_of(regex="(.|\n)*")).start().masks()[0]
            assert mask.dtype == np.uint32 and mask.shape == (-(-vocab_size // 32),)
            ids = set(allowed(mask))
            assert 2 in ids and ids - {2} <= {token for token in usable if token < vocab_size}
            assert len(ids) > 250 - 128  # all but the bytes that cannot start a character


def test_the_end_is_allowed_where_the_text_may_end(tiny: Kit) -> None:
    state = tiny.compile(regex="(ab)*").start()
    for letter in "ababab":
        mask = set(allowed(state.masks()[0]))
        assert (tiny.eos <= mask) is (letter == "a") and (tiny.eos & mask == set()) is (letter == "b")
        assert not state.is_over
        if letter == "b":
            with pytest.raises(ConstraintError, match="does not allow token 1 yet"):
                tiny.compile(regex="a").start().advance(1)
        state.advance(tiny.walker.spelt(letter)[0])
    state.advance(max(tiny.eos))
    assert state.is_over
    with pytest.raises(ConstraintError, match="has ended"):
        state.masks()
    with pytest.raises(ConstraintError, match="after the end"):
        state.advance(min(tiny.eos))


def test_a_text_that_cannot_go_on_is_over_before_its_end_is_drawn(tiny: Kit) -> None:
    state = tiny.compile(choice=["no", "not"]).start()
    state.advance(tiny.walker.spelt("n")[0])
    state.advance(tiny.walker.spelt("o")[0])
    assert not state.is_over
    state.advance(tiny.walker.spelt("t")[0])
    assert state.is_over
    assert set(allowed(state.masks()[0])) == tiny.eos


def test_an_ordinary_token_that_ends_the_text_is_no_text(tiny: Kit) -> None:
    """Text with a line feed must be spelt with the other token for it, forced or not."""
    newline = tiny.walker.bytes.index(b"\n")
    grammars = Grammars(tiny.tokenizer, tiny.vocab_size, frozenset({newline}))
    state = grammars.compile(source_of(choice=["a\nb"])).start()
    spelling = []
    while not state.is_over:
        (token,) = allowed(state.masks()[0])
        spelling.append(token)
        state.advance(token)
    assert newline not in spelling and tiny.walker.text(spelling) == "a\nb"
    assert allowed(state.masks()[0]) == [newline]


@pytest.mark.parametrize("kind", ["sp_bpe", "byte_level"])
def test_p14_masks_of_drafts_are_those_after_really_advancing(kits: dict[str, Kit], kind: str) -> None:
    kit = kits[kind]
    for seed in range(25):
        rng = np.random.default_rng(seed)
        constraint = kit.grammars.compile(schema_source(random_schema(random.Random(seed))))
        tokens = kit.walker.complete(constraint, rng, soft=20, hard=400)
        assert tokens is not None
        plain, drafting = constraint.start(), constraint.start()
        masks = []
        for token in tokens:
            masks += plain.masks()
            plain.advance(token)
        masks.append(plain.masks()[0])
        place = 0
        while place < len(tokens):
            draft = tuple(tokens[place : place + int(rng.integers(0, 6))])
            wrong = int(rng.integers(0, kit.vocab_size))
            found = drafting.masks((*draft, wrong))
            assert all(np.array_equal(a, b) for a, b in zip(found[:-1], masks[place:], strict=False))
            if wrong not in allowed(found[-2]) or wrong in kit.eos:
                assert not found[-1].any()
            assert np.array_equal(drafting.masks()[0], masks[place])  # nothing was advanced
            accepted = tokens[place : place + max(1, len(draft) - 1)]
            for token in accepted:
                drafting.advance(token)
            place += len(accepted)
        assert drafting.is_over == plain.is_over


def test_nothing_may_follow_a_draft_that_is_not_allowed_or_ends_the_text(tiny: Kit) -> None:
    constraint = tiny.compile(regex="a*")
    (a, b), eos = tiny.walker.spelt("ab"), min(tiny.eos)
    for draft in ((b, a, a), (eos, a, a), (tiny.vocab_size - 1, a, a), (tiny.vocab_size + 99, a, a), (-1, a, a)):
        now, *later = constraint.start().masks(draft)
        assert now.any() and len(later) == 3 and not any(mask.any() for mask in later)


def test_completions_of_one_request_do_not_touch_each_other(tiny: Kit) -> None:
    constraint = tiny.compile(regex="(ab|cd|ef)*")
    one, two = constraint.start(), constraint.start()
    one.advance(tiny.walker.spelt("a")[0])
    with pytest.raises(ConstraintError, match="cannot go on"):
        two.advance(tiny.walker.spelt("b")[0])
    assert b"b" in [tiny.walker.bytes[token] for token in allowed(one.masks()[0])]
    assert b"c" in [tiny.walker.bytes[token] for token in allowed(constraint.start().masks()[0])]


def test_p14_json_has_at_most_one_space_between_two_parts(tiny: Kit) -> None:
    constraint = tiny.grammars.compile(schema_source({"type": "object", "additionalProperties": {"type": "array"}}))
    for right in ('{"a":[1,2],"b":[]}', '{"a": [1, 2], "b": []}'):
        assert tiny.accepts(constraint, right), right
    for wrong in (' {"a":[]}', '{ "a":[]}', '{"a":  []}', '{"a" :[]}', '{"a":[1,\n2]}', '{"a":[1 ]}', '{"a":[]}\n'):
        assert not tiny.accepts(constraint, wrong), wrong


def test_a_listed_name_cannot_be_spelt_another_way(tiny: Kit) -> None:
    """An escaped name would be taken for another property, with another schema, and mean the listed one."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    constraint = tiny.grammars.compile(schema_source(schema))
    assert tiny.accepts(constraint, '{"a":1,"b":"\\n"}')
    assert not tiny.accepts(constraint, '{"a":1,"\\u0061":"x"}')
