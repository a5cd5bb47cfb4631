"""How the decoder of a tokenizer.json turns the name of a token into bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

SPACE = "▁"  # stands for a space in the vocabularies of sentencepiece and its kin
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def byte_reader(decoder: Any) -> Callable[[str], bytes] | None:
    """From a token's name to the bytes that it adds to a text that has begun.

    None if a token's text depends on its neighbours: WordPiece, CTC, no decoder at all, or a kind not known here.
    """
    if decoder is None:
        return None
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _from_alphabet
    changes: list[tuple[str, str]] = []
    fused = bytes_too = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if not fused:
                changes.append((old, new))
            case {"type": "Metaspace", "replacement": mark} if not fused:  # of the first token it drops a space, too
                changes.append((mark, " "))
            case {"type": "ByteFallback"} if not fused:
                bytes_too = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "start": _, "stop": 0} if fused:
                pass  # only the start of the whole text
            case _:
                return None

    def read(name: str) -> bytes:
        byte = BYTE.fullmatch(name) if bytes_too else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        for old, new in changes:
            name = name.replace(old, new)
        return name.encode()

    return read


def _alphabet() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves, the rest follow from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in plain]
    return {chr(value): value for value in plain} | {chr(0x100 + i): value for i, value in enumerate(others)}


_BYTE_OF = _alphabet()


def _from_alphabet(name: str) -> bytes:
    """Added tokens may be spelt in other letters; the library takes such a token as it is spelt."""
    if all(letter in _BYTE_OF for letter in name):
        return bytes(_BYTE_OF[letter] for letter in name)
    return name.encode()
