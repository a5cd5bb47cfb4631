"""What the cuda backend's batch invariance does to a model's own functions, and what its trial at load finds out."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from pathlib import Path
from typing import Any

import pytest

from cortexstream import LLM, SamplingParams
from tests.conftest import require
from tests.parity import torch_models

torch: Any = require("torch")
require("transformers")

from torch.overrides import TorchFunctionMode  # noqa: E402

from cortexstream.backends.cuda import invariant  # noqa: E402
from cortexstream.backends.cuda.kernels import choose  # noqa: E402
from cortexstream.backends.cuda.models import LoadedModel, load  # noqa: E402

CPU = torch.device("cpu")
AFMOE: dict[str, Any] = {  # its attention is gated by torch.sigmoid of [tokens, 18 * 16]
    "num_attention_heads": 18, "num_key_value_heads": 1, "head_dim": 16, "num_hidden_layers": 2, "vocab_size": 333,
    "layer_types": ["full_attention"] * 2, "num_dense_layers": 2, "num_experts": 4, "moe_intermediate_size": 32,
    "num_experts_per_tok": 2, "sliding_window": None, "global_attn_every_n_layers": 1,
}  # fmt: skip


@pytest.fixture(params=[2, 3])  # one thread cuts nothing, and has no long step
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def opened(folder: Path, architecture: str, extra: dict[str, Any]) -> LoadedModel:
    path = torch_models.write_model(folder, architecture, extra)
    return load(path, "float32", CPU, choose({"kernels": "torch"}, CPU, 16).ops)


def promised(loaded: LoadedModel) -> invariant.Promise:
    return invariant.make_invariant(loaded.model, loaded.seat, loaded.layers, True, False, CPU)


def changed(loaded: LoadedModel) -> int:
    """Modules whose forward is not that of their class: rewrites at load leave some, too."""
    return sum("forward" in vars(module) for module in loaded.model.modules())


def test_p4_functions_that_a_model_calls_itself(threads: int, tmp_path: Path) -> None:
    """Alone a prompt's gates end within a vector; together they are cut between threads elsewhere."""
    folder = torch_models.write_model(tmp_path / "afmoe", "afmoe", AFMOE)
    generator = torch.Generator().manual_seed(0)
    lengths = (141, 143, 151, 171)
    prompts = [torch.randint(3, 333, (length,), generator=generator).tolist() for length in lengths]
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=3, prompt_logprobs=1, ignore_eos=True)
    with LLM(
        folder, backend="cuda", backend_options={"device": "cpu", "kernels": "torch"}, batch_invariant=True,
        num_kv_blocks=600, block_tokens=16, enable_prefix_caching=False, max_num_batched_tokens=512,
        skip_tokenizer_init=True,
    ) as llm:  # fmt: skip
        assert llm.info.batch_invariant, llm.info.invariance
        alone = [llm.generate([prompt], params, use_tqdm=False)[0] for prompt in prompts]
        together = llm.generate(prompts, params, use_tqdm=False)
    for one, other in zip(alone, together, strict=True):
        assert one.prompt_logprobs == other.prompt_logprobs is not None
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].logprobs == other.outputs[0].logprobs is not None


def test_f73_the_trial_is_long_enough_for_threads_to_show(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same model with nothing done about its functions: with so few rows as "a" has, all is well."""
    loaded = opened(tmp_path / "afmoe", "afmoe", {**AFMOE, "num_attention_heads": {2: 18, 3: 22}[threads]})
    before = changed(loaded)
    monkeypatch.setattr(invariant, "ELEMENTWISE", frozenset())
    promise = promised(loaded)
    assert not promise.holds and promise.sentence.startswith("not here: ") and changed(loaded) == before
    monkeypatch.setattr(invariant, "long_step", lambda *_: 0)
    assert promised(loaded).holds, "it must be the long step that found it out"


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_f73_what_differs_beside_others_alone_is_found_out(threads: int, tmp_path: Path) -> None:
    """Positions that do not ascend by one are those of several sequences."""
    loaded = opened(tmp_path / "llama", "llama", {"num_hidden_layers": 2})
    assert promised(loaded).holds

    def turn(_: Any, args: Any, named: dict[str, Any], found: Any) -> Any:
        positions = named["position_ids"] if "position_ids" in named else args[1]
        return tuple(x * 1.001 for x in found) if bool((positions[0].diff() != 1).any()) else found

    again = opened(tmp_path / "again", "llama", {"num_hidden_layers": 2})
    before = changed(again)
    again.model.model.rotary_emb.register_forward_hook(turn, with_kwargs=True)
    assert not promised(again).holds and changed(again) == before


def test_f73_what_differs_in_long_steps_alone_is_found_out(threads: int, tmp_path: Path) -> None:
    """As if a function that is not known here were cut between threads."""
    loaded = opened(tmp_path / "llama", "llama", {"num_hidden_layers": 2})

    def cut(_: Any, __: Any, found: Any) -> Any:
        scale = torch.ones(1, found.shape[1], 1)
        if found.numel() > invariant.CUT * threads:
            scale[:, found.shape[1] // threads] += 1e-5
        return found * scale

    before = changed(loaded)
    handle = loaded.model.get_input_embeddings().register_forward_hook(cut)
    assert not promised(loaded).holds and changed(loaded) == before
    handle.remove()
    assert promised(loaded).holds


class Rounding(TorchFunctionMode):
    """A BLAS in whose products with one shape of weights, of so many rows, the second row is rounded otherwise."""

    def __init__(self, weight: Any, rows: int) -> None:
        super().__init__()
        self._shape, self._rows = weight.shape, rows
        self.met = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and args[1].shape == self._shape and args[0].shape[-2] == self._rows:
            self.met += 1
            found[..., 1, :] *= 1 + 1e-5
        return found


@pytest.mark.parametrize("name", ["o_proj", "down_proj", "lm_head"])
def test_p4_layers_of_each_shape_have_heights_of_their_own(name: str, tmp_path: Path) -> None:
    """Of the others' heights one would not do for these."""
    loaded = opened(tmp_path / "llama", "llama", {"num_hidden_layers": 2})
    weight = next(module.weight for path, module in loaded.model.named_modules() if path.endswith(name))
    with Rounding(weight, 4) as mode:
        assert promised(loaded).holds and mode.met


def test_p4_models_that_call_none_do_not_pay(tmp_path: Path) -> None:
    llama = opened(tmp_path / "llama", "llama", {})
    afmoe = opened(tmp_path / "afmoe", "afmoe", AFMOE)
    assert promised(llama).holds and "forward" not in vars(llama.model)
    assert promised(afmoe).holds and "forward" in vars(afmoe.model)


def test_p4_steps_are_as_long_as_threads_need_and_loading_allows() -> None:
    assert invariant.long_step(64, 1000, 1) == 0
    for count in (2, 3, 4, 6, 16):
        tokens = invariant.long_step(4096, 1 << 24, count)
        assert tokens * 4096 > invariant.CUT * count
        assert all(gcd(tokens, number) == 1 for number in range(2, count + 1))
        assert tokens < 2 * count * invariant.CUT // 4096 + count
    assert invariant.LONGEST_STEP <= invariant.long_step(8, 1000, 16) < invariant.LONGEST_STEP + 64
    assert invariant.long_step(64, 1 << 34, 2) < 16


@pytest.mark.parametrize("width", [1, 7, 53])
def test_p4_functions_are_themselves_row_by_row(width: int, threads: int) -> None:
    """In place and with arguments, too; what is not of rows is left as it is."""
    functional = torch.nn.functional
    x = torch.randn(1500, width, generator=torch.Generator().manual_seed(0))
    calls: list[Any] = [
        torch.sigmoid, torch.Tensor.tanh, torch.Tensor.sigmoid_, functional.silu,
        lambda y: functional.silu(y, True), lambda y: functional.silu(input=y, inplace=True),
        lambda y: functional.gelu(y, approximate="tanh"), lambda y: functional.softplus(y, 2.0),
    ]  # fmt: skip
    for call in calls:
        plain, given = x.clone(), x.clone()
        wanted = call(plain)
        mode = invariant.RowByRow()
        with mode:
            got = call(given)
            one = call(x[7:8].clone())
        assert mode.met and torch.equal(got[7:8], one)
        assert torch.allclose(got, wanted, atol=1e-6) and torch.allclose(given, plain, atol=1e-6)
    mode = invariant.RowByRow()
    with mode:
        out = torch.empty(3)
        assert torch.sigmoid(x[0, :1].expand(3), out=out) is out and not mode.met
        assert torch.sigmoid(torch.tensor(0.0)).item() == 0.5 and not mode.met
