"""The text that the embedded model is trained on: small tasks with one right answer, made from a random generator.

Each task draws a prompt and its answer. A tenth of all prompts, chosen by a checksum of the prompt, is never trained
on: `held_out` tells which, and `scripts/train_tiny.py --evaluate` asks only those.
"""

from __future__ import annotations

import itertools
import json
import random
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass

LETTERS = string.ascii_lowercase
VOWELS = "aeiou"
NAMES = "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo Jo Kai Lena Milo Nora Otto Pia Rex Sam Tess Uma".split()
ANIMALS = "fox cat dog owl bear hen frog goat mouse duck".split()
PLACES = "forest garden village valley harbour meadow castle desert".split()
THINGS = "ball kite lamp drum boat shell bell rope".split()
COLOURS = "red blue green yellow black white".split()
CITIES = "Oslo Rome Lima Cairo Paris Quito".split()


@dataclass(frozen=True, slots=True)
class Item:
    """One example: the model sees `prompt` and must say `answer`; `chat` wraps both in the chat template."""

    task: str
    prompt: str
    answer: str
    chat: bool = False


def held_out(item: Item) -> bool:
    """True for the tenth of all prompts that training never sees."""
    return zlib.crc32(item.prompt.encode()) % 10 == 0


def word(rng: random.Random, low: int, high: int, alphabet: str = LETTERS) -> str:
    return "".join(rng.choices(alphabet, k=rng.randint(low, high)))


def arithmetic(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    if rng.random() < 0.6:
        return f"{a}+{b}=", str(a + b)
    a, b = max(a, b), min(a, b)
    return f"{a}-{b}=", str(a - b)


def add(rng: random.Random) -> Item:
    return Item("arithmetic", *arithmetic(rng))


def copy(rng: random.Random) -> Item:
    """Copy a short random string of letters and digits."""
    text = word(rng, 1, 24, rng.choice([LETTERS, LETTERS + string.ascii_uppercase + string.digits]))
    return Item("copy", f"copy: {text}", "\n" + text)


def long_copy(rng: random.Random, longest: int = 400) -> Item:
    """Copy up to hundreds of letters. No pair of neighbours occurs twice, so that what follows is always determined by
    the two letters before; lengths are log-uniform."""
    text = pairwise_unique(rng, round(25 * (longest / 25) ** rng.random()))
    return Item("long copy", f"copy: {text}", "\n" + text)


def pairwise_unique(rng: random.Random, length: int) -> str:
    """A random string of lower-case letters in which no two neighbouring letters occur together a second time."""
    text, used = rng.choice(LETTERS), set[str]()
    while len(text) < length:
        following = [c for c in LETTERS if text[-1] + c not in used]
        if not following:  # a dead end: every pair that begins with this letter is used
            return pairwise_unique(rng, length)
        text += rng.choice(following)
        used.add(text[-2:])
    return text


def reverse(rng: random.Random) -> Item:
    text = word(rng, 2, 10)
    return Item("reverse", f"reverse: {text}", "\n" + text[::-1])


def sort(rng: random.Random) -> Item:
    digits = rng.choices(string.digits, k=rng.randint(2, 8))
    return Item("sort", "sort: " + " ".join(digits), "\n" + " ".join(sorted(digits)))


def count(rng: random.Random) -> Item:
    """How often a vowel occurs among consonants."""
    letter, times = rng.choice(VOWELS), rng.randint(0, 9)
    consonants = [c for c in LETTERS if c not in VOWELS]
    text = [letter] * times + rng.choices(consonants, k=rng.randint(1 if times == 0 else 0, 8))
    rng.shuffle(text)
    return Item("count", f"count {letter} in {''.join(text)}", f"\n{times}")


def recall(rng: random.Random) -> Item:
    """Look a key up among pairs; the answer repeats the key, so that it is a copy from the right place."""
    keys = rng.sample(LETTERS, k=rng.choice([2, 3, 4, 6, 8, 12]))
    values = [word(rng, 2, 4, string.digits) for _ in keys]
    asked = rng.randrange(len(keys))
    pairs = " ".join(f"{k}={v}" for k, v in zip(keys, values, strict=True))
    return Item("recall", f"recall: {pairs} ? {keys[asked]}", f"\n{keys[asked]}={values[asked]}")


def as_json(rng: random.Random) -> Item:
    fields: dict[str, str | int] = {}
    for key in rng.sample(["name", "age", "city", "pet"], k=rng.randint(1, 4)):
        value = {"name": rng.choice(NAMES), "city": rng.choice(CITIES), "pet": rng.choice(ANIMALS)}
        fields[key] = rng.randint(1, 99) if key == "age" else value[key]
    return Item("json", "json: " + " ".join(f"{k}={v}" for k, v in fields.items()), "\n" + json.dumps(fields))


def tell(name: str, animal: str, place: str, colour: str, thing: str, friend: str) -> str:
    """The one story that the grammar knows, about these six."""
    return (
        f"\nOnce upon a time there was a {animal} named {name}. {name} lived in a {place}. "
        f"One day {name} found a {colour} {thing}. {name} showed the {colour} {thing} to {friend}. "
        f"{friend} liked the {thing}. So {name} and {friend} played in the {place} until the sun went down."
    )


def story(rng: random.Random) -> Item:
    """The prompt fixes the hero; the model chooses the rest, and must then stay with its choices."""
    name, animal = rng.choice(NAMES), rng.choice(ANIMALS)
    friend = rng.choice([other for other in NAMES if other != name])
    text = tell(name, animal, rng.choice(PLACES), rng.choice(COLOURS), rng.choice(THINGS), friend)
    return Item("story", f"story: {name} the {animal}", text)


def chat(rng: random.Random) -> Item:
    """One turn of a conversation, with an answer that can be checked."""
    kind = rng.randrange(4)
    if kind == 0:
        question, answer = arithmetic(rng)
        return Item("chat", f"What is {question[:-1]}?", answer, chat=True)
    if kind == 1:
        name = word(rng, 3, 8).capitalize()
        return Item("chat", f"My name is {name}.", f"Hello, {name}!", chat=True)
    if kind == 2:
        text = word(rng, 2, 12)
        return Item("chat", f"Please copy {text}", text, chat=True)
    animal, colour = rng.choice(ANIMALS), rng.choice(COLOURS)
    name = word(rng, 3, 8).capitalize()
    return Item("chat", f"{name} has a {colour} {animal}. What colour is it?", f"It is {colour}.", chat=True)


TASKS: dict[str, Callable[[random.Random], Item]] = {
    "arithmetic": add,
    "copy": copy,
    "long copy": long_copy,
    "reverse": reverse,
    "sort": sort,
    "count": count,
    "recall": recall,
    "json": as_json,
    "story": story,
    "chat": chat,
}


def is_right(item: Item, text: str) -> bool:
    """Does `text` answer the item? A story is right when the grammar could have written it for this hero."""
    if item.task != "story":
        return text == item.answer
    name, animal = item.prompt.removeprefix("story: ").split(" the ")
    stories = (
        tell(name, animal, place, colour, thing, friend)
        for place, colour, thing in itertools.product(PLACES, COLOURS, THINGS)
        for friend in NAMES
        if friend != name
    )
    return text in stories
