"""Real tokenizers of every kind in use, made once per run from the text below."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_tiny.py"
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Das Wetter ist schön; über den Dächern fliegen Möwen. L'été était très chaud à Genève.",
    "def add(a, b):\n    return a + b\n\n    # two   spaces and a\ttab",
    "東京は日本の首都です。 中文的句子没有空格。 한국어 문장도 있습니다.",
    "Прекрасная погода сегодня, не правда ли? 12345 + 67890 = 80235",
] * 8
KINDS = ("tiny_json", "tiny_model", "sp_bpe", "sp_unigram", "byte_level", "llama_json")


def write_sentencepiece(folder: Path, **options: Any) -> None:
    """A Llama-2 style model: pieces of several characters, a dummy prefix, byte fallback."""
    import sentencepiece

    trained = io.BytesIO()
    settings = {
        "vocab_size": 420, "byte_fallback": True, "add_dummy_prefix": True, "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity", "character_coverage": 0.98, "hard_vocab_limit": False,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=trained, minloglevel=2, **{**settings, **options}
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())


def write_byte_level(folder: Path) -> None:
    """A GPT-2 / Llama-3 style tokenizer.json: tokens are runs of bytes, characters may be spread over several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|begin|>", "<|eot|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|eot|>"},
        "pad_token": "<|pad|>",
    }
    write_config(folder, tokenizer_class="PreTrainedTokenizerFast", **config)


def write_llama_json(folder: Path) -> None:
    """A Llama-2 style tokenizer.json: byte fallback, and a decoder that strips the dummy prefix."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=60, show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([line.replace(" ", "▁") for line in CORPUS], trainer)
    contents = json.loads(tokenizer.to_str())
    contents["added_tokens"] = [token for token in contents["added_tokens"] if token["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(contents))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_config(
        folder, tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_config(folder: Path, **values: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def write_tiny(folder: Path) -> None:
    """The embedded model's tokenizer, by the script that makes it."""
    spec = importlib.util.spec_from_file_location("train_tiny", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_tokenizer(folder)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of tokenizer files per kind; not to be written to."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    write_tiny(made["tiny_json"])
    shutil.copytree(made["tiny_json"], made["tiny_model"], dirs_exist_ok=True)
    (made["tiny_model"] / "tokenizer.json").unlink()
    write_sentencepiece(made["sp_bpe"], model_type="bpe", control_symbols=["<|end|>"])
    write_sentencepiece(made["sp_unigram"], model_type="unigram", remove_extra_whitespaces=True)
    write_byte_level(made["byte_level"])
    write_llama_json(made["llama_json"])
    return made
