"""Train the embedded model, or measure how exact it is.

    python scripts/train_tiny.py --minutes 60        needs torch and transformers; two CPU cores are enough
    python scripts/train_tiny.py --evaluate          needs only cortexstream

The folder that it writes (cortexstream/models/tiny) holds standard Hugging Face files: a Llama-architecture
checkpoint in bfloat16 and a sentencepiece tokenizer with its tokenizer.json twin. One character is one token, so that
every task is about positions and not about spelling; a character outside ASCII becomes its UTF-8 bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import string
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from tiny_tasks import TASKS, Item, held_out, is_right, long_copy

TINY = Path(__file__).parent.parent / "cortexstream" / "models" / "tiny"
BOS, EOS = 1, 2
SPECIAL = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 576,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
WEIGHTS = {
    "arithmetic": 14, "copy": 2, "long copy": 5, "reverse": 3, "sort": 3,
    "count": 6, "recall": 3, "json": 1.5, "story": 2, "chat": 8,
}  # fmt: skip
STORY_LOSS = 0.5  # most of a story's letters are a free choice, whose loss cannot fall


def write_tokenizer(folder: Path) -> None:
    """A sentencepiece model of single characters with byte fallback, and the same thing as a tokenizer.json."""
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    alphabet = "".join(c for c in string.printable if c.isprintable() and c != " ")
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([alphabet + " "] * 10), model_writer=trained, model_type="char", vocab_size=1000,
        hard_vocab_limit=False, character_coverage=1.0, required_chars=alphabet, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        control_symbols=SPECIAL, user_defined_symbols=["\n"], minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(trained.getvalue())

    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    vocab = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    twin = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    twin.normalizer = normalizers.Replace(" ", "▁")
    twin.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    twin.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    twin.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ["<unk>", "<s>", "</s>", *SPECIAL]])
    twin.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "</s>", "add_bos_token": True, "model_max_length": SHAPE["max_position_embeddings"],
        "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


class Encoder:
    """Items -> token ids and the weight of each in the loss (0 for what the user says)."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.vocab_size: int = self.tokenizer.get_vocab_size()
        vocab: dict[str, int] = self.tokenizer.get_vocab()
        self.system, self.user, self.assistant, self.end = (vocab[token] for token in SPECIAL)

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def example(self, item: Item, earlier: list[Item] | None = None) -> tuple[list[int], list[float]]:
        """`earlier` are the chat turns that came before this one."""
        prompt, answer = self.ids(item.prompt), self.ids(item.answer)
        if item.chat:
            prompt, answer = [self.user, *prompt, self.end, self.assistant], [*answer, self.end]
            for turn in reversed(earlier or []):
                before = [self.user, *self.ids(turn.prompt), self.end, self.assistant, *self.ids(turn.answer), self.end]
                prompt = before + prompt
        else:
            answer = [*answer, EOS]
        weight = STORY_LOSS if item.task == "story" else 1.0
        return [BOS, *prompt, *answer], [0.0] * (1 + len(prompt)) + [weight] * len(answer)

    def pack(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        """One training row of `length + 1` tokens, filled with examples; only long rows hold long copies."""
        ids: list[int] = []
        weights: list[float] = []
        kinds = list(WEIGHTS)
        while len(ids) <= length:
            kind = rng.choices(kinds, [WEIGHTS[k] for k in kinds])[0]
            item = long_copy(rng, 400 if length > 512 else 100) if kind == "long copy" else TASKS[kind](rng)
            if not held_out(item):
                turns = [TASKS["chat"](rng) for _ in range(rng.choice([0, 0, 1, 2, 3]))] if item.chat else []
                i, w = self.example(item, turns)
                ids, weights = ids + i, weights + w
        return ids[: length + 1], weights[1 : length + 1]


def train(folder: Path, minutes: float, seed: int, resume: bool, peak_lr: float) -> None:
    import torch
    from torch.nn import functional as F
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    encoder = Encoder(folder)
    eos = [EOS, encoder.end]
    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = LlamaConfig(vocab_size=-(-encoder.vocab_size // 64) * 64, bos_token_id=BOS, eos_token_id=eos, **SHAPE)
    if resume:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=eos)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {config.vocab_size}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.05)
    started = last = time.monotonic()
    step = tokens = 0
    while (done := (time.monotonic() - started) / (60 * minutes)) < 1:
        length, rows = (1024, 6) if step % 2 else (256, 24)
        rate = peak_lr * min(1, (step + 1) / 200) * (0.525 + 0.475 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = [encoder.pack(rng, length) for _ in range(rows)]
        ids = torch.tensor([i for i, _ in batch])
        weights = torch.tensor([w for _, w in batch])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, tokens = step + 1, tokens + ids.numel()
        if time.monotonic() - last > 120:
            last = time.monotonic()
            spent = last - started
            rates = teacher_forced(model, encoder)
            print(f"{spent / 60:5.1f} min  step {step}  {tokens / 1e6:.1f} M tokens  {tokens / spent:.0f}/s  "
                  f"loss {loss.item():.4f}  {rates}", flush=True)  # fmt: skip
            save(model, folder)
    save(model, folder)
    print(f"{tokens / 1e6:.1f} M tokens in {step} steps; now run with --evaluate")


def save(model: Any, folder: Path) -> None:
    """bfloat16 weights, config.json and generation_config.json as transformers writes them."""
    import copy as copies

    import torch

    copies.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)


def teacher_forced(model: Any, encoder: Encoder, tries: int = 20) -> dict[str, float]:
    """Share of held-out items whose every answer token is the likeliest one: a quick look while training."""
    import torch

    rates = {}
    for task in TASKS:
        right = 0
        for item in sample(task, tries, seed=1):
            ids, weights = encoder.example(item)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                guess = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0].argmax(-1).tolist()
            right += all(g == t for g, t, w in zip(guess, ids[1:], weights[1:], strict=True) if w)
        rates[task] = right / tries
    return rates


def sample(task: str, tries: int, seed: int) -> list[Item]:
    """Held-out items of one task; `seed` makes the draw repeatable."""
    rng = random.Random(f"{task} {seed}")
    found: list[Item] = []
    while len(found) < tries:
        item = TASKS[task](rng)
        if held_out(item):
            found.append(item)
    return found


def evaluate(model: str, backend: str, tries: int, kv_dtype: str) -> None:
    """Greedy answers of the runtime itself to held-out prompts, and the share that is exactly right."""
    from cortexstream import LLM, SamplingParams

    with LLM(model, backend=backend, kv_dtype=kv_dtype) as llm:
        params = SamplingParams(temperature=0, max_tokens=450)
        total = right = 0
        for task in TASKS:
            items = sample(task, tries, seed=2)
            prompts = [llm.render_chat([{"role": "user", "content": i.prompt}]) if i.chat else i.prompt for i in items]
            answers = [out.outputs[0].text for out in llm.generate(prompts, params, use_tqdm=False)]
            exact = sum(is_right(i, a) for i, a in zip(items, answers, strict=True))
            print(f"{task:12} {exact:4} of {tries} exact  {exact / tries:7.2%}", flush=True)
            total, right = total + tries, right + exact
        print(f"{'all':12} {right:4} of {total} exact  {right / total:7.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="how long to train")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the text")
    parser.add_argument("--resume", action="store_true", help="go on from the weights in --out; give another --seed")
    parser.add_argument("--peak-lr", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=TINY, help="folder to write (or, with --evaluate, to read)")
    parser.add_argument("--evaluate", action="store_true", help="do not train: measure exactness on held-out prompts")
    parser.add_argument("--tries", type=int, default=100, help="held-out prompts per task, with --evaluate")
    parser.add_argument("--backend", default="auto", help="with --evaluate")
    parser.add_argument("--kv-dtype", default="auto", help="auto, int8 or int4, with --evaluate")
    args = parser.parse_args()
    if args.evaluate:
        evaluate(str(args.out), args.backend, args.tries, args.kv_dtype)
    else:
        train(args.out, args.minutes, args.seed, args.resume, args.peak_lr)


if __name__ == "__main__":
    main()
