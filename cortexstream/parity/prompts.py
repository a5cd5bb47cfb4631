"""What is asked: token ids drawn from the vocabulary, and texts where there is a tokenizer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from cortexstream.errors import InvalidRequestError

if TYPE_CHECKING:
    from cortexstream.limits import Limits
    from cortexstream.text.tokenizer import Tokenizer

STEPS = 64  # tokens that continue each prompt
RANDOM_SEED = 6
RANDOM_TOKENS = (1, 2, 17, 65, 300)  # the shortest, and one more than blocks of 16 and 64 hold
LETTER = (
    "Dear friend, you asked what we did in the spring. In March we mended the roof; in April we planted beans, onions "
    "and two pear trees; in May it rained for a week and the children read aloud from the old books about ships and "
    "islands. Nobody went to the market, since the bridge was closed, and so we ate what there was. "
)
TEXTS = {
    "sum": "12+30=",
    "sentence": "The river rises in the hills, and by the time it comes to the town",
    "code": 'def greet(name: str) -> dict:\n    """Naïve café: 日本語, ½ ≠ 0.5."""\n    return {"text": f"Hello, {',
    "letter": LETTER + LETTER,
}


class NamedPrompt(NamedTuple):
    """Token ids, and a name for people."""

    name: str
    token_ids: tuple[int, ...]


def choose_prompts(
    limits: Limits, tokenizer: Tokenizer | None, texts: Sequence[str] = (), steps: int = STEPS
) -> list[NamedPrompt]:
    """Prompts that the loaded model can continue by `steps` tokens: random ids of RANDOM_TOKENS lengths as far as they
    fit, the beginnings of TEXTS that fit, and the caller's texts.

    Raises InvalidRequestError if nothing fits, or one of the caller's texts does not, or is given without a tokenizer.
    """
    longest = limits.max_tokens - steps
    if steps < 1 or longest < 1:
        raise InvalidRequestError(
            "steps", f"is {steps}; must be 1 to {limits.max_tokens - 1}, since {limits.reason} and a prompt needs one"
        )
    draw = random.Random(RANDOM_SEED)
    prompts = [
        NamedPrompt(f"random {length}", tuple(draw.randrange(limits.vocab_size) for _ in range(length)))
        for length in RANDOM_TOKENS
        if length <= longest
    ]
    if tokenizer is None and texts:
        raise InvalidRequestError("prompt", "needs a tokenizer; this model's folder has none")
    if tokenizer is not None:
        most = min(longest, max(RANDOM_TOKENS))
        prompts += [NamedPrompt(name, tuple(tokenizer.encode(text)[:most])) for name, text in TEXTS.items()]
        prompts += [_given(tokenizer, number, text, longest, limits) for number, text in enumerate(texts, 1)]
    return prompts


def _given(tokenizer: Tokenizer, number: int, text: str, longest: int, limits: Limits) -> NamedPrompt:
    token_ids = tuple(tokenizer.encode(text))
    if not 1 <= len(token_ids) <= longest:
        raise InvalidRequestError(
            "prompt", f"number {number} has {len(token_ids)} tokens; must have 1 to {longest} ({limits.reason})"
        )
    return NamedPrompt(f"given {number}", token_ids)
