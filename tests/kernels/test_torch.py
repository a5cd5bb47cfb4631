"""What runs in torch against its numpy definition: the draw, attention, quantised keys and values (P5, F42, F50, F51,
F89)."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from cortexstream import sampling
from cortexstream.kernels.reference import attention as definition
from cortexstream.kernels.reference import kv_quantize
from cortexstream.plan import PENDING, SampleSpec
from tests.conftest import require
from tests.kernels.test_kv_quantize import KINDS, rows
from tests.kernels.test_mlx_sample import random_spec

torch: Any = require("torch")
require("transformers")
CPU = torch.device("cpu")


@pytest.mark.parametrize("vocab", [1, 2, 97, 384, 4099])
def test_noise_is_the_same(vocab: int) -> None:
    """Equal bits, and logarithms that differ by rounding only."""
    from cortexstream.backends.cuda.sample import noise

    specs = [SampleSpec(seed=s, sample_index=i) for s, i in ((0, 0), (1, 2), (2**64 - 1, 0), (2**40 + 7, 3))]
    positions = [0, 1, 2**31 + 5, 77]
    got = noise(specs, positions, vocab, CPU).numpy()
    for row, (spec, position) in enumerate(zip(specs, positions, strict=True)):
        expected = sampling.noise(spec.seed, position, spec.sample_index, vocab)
        np.testing.assert_allclose(got[row], expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("vocab", [97, 384, 5000])
def test_p5_draws_are_the_same(vocab: int) -> None:
    """Every parameter, mixed in one batch; PENDING stands for the last output token in some rows."""
    from cortexstream.backends.cuda.sample import draw

    rng, numbers = random.Random(vocab), np.random.default_rng(vocab)
    differ = total = 0
    for _ in range(40 if vocab < 1000 else 8):
        logits = (numbers.standard_normal((16, vocab)) * 3).astype(np.float32)
        specs = [random_spec(rng, vocab) for _ in range(16)]
        positions = [rng.randrange(10**6) for _ in range(16)]
        told, pending = [], []
        for spec in specs:
            late = bool(spec.output_tokens) and rng.random() < 0.5
            told.append(spec._replace(output_tokens=(*spec.output_tokens[:-1], PENDING)) if late else spec)
            pending.append(torch.tensor(spec.output_tokens[-1]) if late else None)
        given = torch.from_numpy(logits.copy())
        got = draw(given, told, positions, pending)[0].tolist()
        assert np.array_equal(given.numpy(), logits)  # what logprobs are made of is not changed
        for row, spec in enumerate(specs):
            total += 1
            differ += got[row] != sampling.draw(logits[row], spec, positions[row])
    assert differ <= total // 500, "a threshold may fall between two roundings once in a while, not more"


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    from cortexstream.backends.cuda.sample import draw

    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [7.0, 7.0, 7.0, 7.0]]).repeat(1, 500)
    assert draw(logits, [SampleSpec()] * 2, [0, 0], [None] * 2)[0].tolist() == [1, 0]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 1), (28, 4)])
@pytest.mark.parametrize(("start", "tokens", "dim", "value_dim"), [(0, 17, 16, 16), (31, 1, 80, 80), (9, 6, 24, 16)])
def test_f42_f50_f51_attention(
    start: int, tokens: int, dim: int, value_dim: int, heads: int, kv_heads: int, window: int | None, sinks: bool
) -> None:
    from cortexstream.kernels.torch.attention import attention

    rng = np.random.default_rng(start + tokens + heads)

    def numbers(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    q, k, v = (
        numbers(tokens, heads, dim),
        numbers(start + tokens, kv_heads, dim),
        numbers(start + tokens, kv_heads, value_dim),
    )
    extra = numbers(heads) if sinks else None
    expected = definition.attention(q, k, v, start, 0.3, window, extra)
    first = 0 if window is None else max(0, start + 1 - window)
    queries, keys, values = (torch.from_numpy(x) for x in (q, k[first:], v[first:]))
    sink = None if extra is None else torch.from_numpy(extra)
    got = attention(queries, keys, values, start, first, window, 0.3, None, sink)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_attention_caps_scores_and_refuses_what_does_not_fit() -> None:
    from cortexstream.kernels.torch.attention import attention

    q, k, v = torch.randn(1, 2, 8), torch.randn(5, 1, 8), torch.randn(5, 1, 8)
    scores = 3.0 * torch.tanh((q[0] @ k[:, 0].T) * 0.5 / 3.0)
    expected = torch.softmax(scores, -1) @ v[:, 0]
    torch.testing.assert_close(attention(q, k, v, 4, 0, None, 0.5, 3.0)[0], expected)
    for bad in ((q, k, v, 3), (q, k, v[:4], 4), (q, torch.randn(5, 3, 8), torch.randn(5, 3, 8), 4), (q, k, v, 4, 1)):
        with pytest.raises(ValueError, match="q "):
            attention(*bad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 32), (8, 64)])
def test_f89_quantised_bits_are_the_definitions(kind: str, bits: int, group: int) -> None:
    from cortexstream.backends.cuda.quantize import dequantize, quantize

    x = rows(kind)
    ours, theirs = quantize(torch.from_numpy(x), bits, group), kv_quantize.quantize(x, bits, group)
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(one.numpy().view(np.uint32), np.ascontiguousarray(other).view(np.uint32))
    dense = dequantize(ours, bits, group).numpy()
    assert np.array_equal(dense.view(np.uint32), kv_quantize.dequantize(theirs, bits, group).view(np.uint32))
