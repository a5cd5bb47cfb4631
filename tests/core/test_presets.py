"""Sampling parameters by name: every value of every preset (F04)."""

from __future__ import annotations

import pytest

from cortexstream.errors import InvalidRequestError
from cortexstream.presets import PRESETS
from cortexstream.request import SamplingParams

VALUES: dict[str, tuple[float, int, float, float, int | None]] = {
    # temperature, top_k (0: all), top_p, repetition_penalty, seed
    "greedy": (0.0, 0, 1.0, 1.0, None),
    "deterministic": (0.2, 1, 1.0, 1.0, 42),
    "precise": (0.3, 20, 0.9, 1.0, None),
    "qa": (0.1, 3, 0.8, 1.3, None),
    "code": (0.2, 5, 0.95, 1.15, None),
    "translation": (0.5, 20, 0.9, 1.2, None),
    "balanced": (0.7, 40, 0.95, 1.0, None),
    "chat": (0.7, 40, 0.9, 1.1, None),
    "creative": (0.9, 50, 0.95, 1.0, None),
    "diversity": (1.3, 100, 1.0, 1.0, None),
}


def test_f04_presets_are_these_in_this_order() -> None:
    assert list(PRESETS) == list(VALUES)


@pytest.mark.parametrize("name", VALUES)
def test_f04_the_values_of_a_preset(name: str) -> None:
    """What is not in the table is as nobody asked for it. Those that the first documents gave are as they gave them."""
    temperature, top_k, top_p, repetition, seed = VALUES[name]
    assert SamplingParams.preset(name) == SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition, seed=seed
    )


@pytest.mark.parametrize("name", PRESETS)
def test_f04_a_preset_can_be_changed(name: str) -> None:
    """Each is valid, and differs from the default and from the others."""
    made = SamplingParams.preset(name)
    assert made != SamplingParams() and [other for other in PRESETS if SamplingParams.preset(other) == made] == [name]
    changed = SamplingParams.preset(name, max_tokens=7, temperature=0.9)
    assert (changed.max_tokens, changed.temperature, changed.top_k) == (7, 0.9, made.top_k)


def test_f04_an_unknown_preset_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="preset: is 'wild'; must be one of greedy, deterministic, precise"):
        SamplingParams.preset("wild")
    with pytest.raises(InvalidRequestError, match="temperature: is -1"):
        SamplingParams.preset("chat", temperature=-1)
    with pytest.raises(InvalidRequestError, match="warmth: unknown sampling parameter; known are allowed_token_ids"):
        SamplingParams.preset("chat", warmth=1)
