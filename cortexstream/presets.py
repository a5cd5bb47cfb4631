"""Sampling parameters by name, for `SamplingParams.preset`."""

from __future__ import annotations

PRESETS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "deterministic": {"temperature": 0.2, "top_k": 1, "seed": 42},  # one token is left to draw; what is seeded stays so
    "precise": {"temperature": 0.3, "top_k": 20, "top_p": 0.9},
    "qa": {"temperature": 0.1, "top_k": 3, "top_p": 0.8, "repetition_penalty": 1.3},
    "code": {"temperature": 0.2, "top_k": 5, "top_p": 0.95, "repetition_penalty": 1.15},
    "translation": {"temperature": 0.5, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    "balanced": {"temperature": 0.7, "top_k": 40, "top_p": 0.95},
    "chat": {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1},
    "creative": {"temperature": 0.9, "top_k": 50, "top_p": 0.95},
    "diversity": {"temperature": 1.3, "top_k": 100},
}
"""From the most certain to the most varied."""
