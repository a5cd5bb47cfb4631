"""Whatever is wrong is refused at submission, by field, value and limit, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cortexstream import (
    LLM,
    BackendUnavailableError,
    InvalidRequestError,
    ModelLoadError,
    OutOfMemoryBudgetError,
    SamplingParams,
)
from cortexstream.models import tiny_folder
from tests.conftest import require

GREEDY = SamplingParams(temperature=0, max_tokens=3)


@pytest.fixture(scope="module", params=["reference", "mlx", "cuda", "null"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    if request.param == "mlx":
        require("mlx")
        require("mlx_lm")
    if request.param == "cuda":
        require("torch")
        require("transformers")
    options: dict[str, Any] = {"backend": request.param, "num_kv_blocks": 8, "block_tokens": 16}
    if request.param == "null":
        options |= {"skip_tokenizer_init": True, "backend_options": {"vocab_size": 384}}
    with LLM(**options) as model:
        yield model


BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "empty ids": ([[]], "prompt: is empty; it needs at least one token"),
    "no ids": ({"prompt_token_ids": []}, "prompt: is empty"),
    "negative id": ([1, -1], "prompt: has token id -1; the vocabulary has ids 0 to 383"),
    "id too large": ([1, 384, 2], "prompt: has token id 384; the vocabulary has ids 0 to 383"),
    "longer than the arena": ([5] * 129, "prompt: has 129 tokens; with one token of output at most 128 fit"),
    "not whole": ([1, 2.5], "prompt_token_ids: has 2.5; every token id must be a whole number"),
    "a truth value": ([True, False], "prompt_token_ids: has True"),
    "unknown key": ({"promt": "x"}, "prompt: has keys .'promt'.; known are prompt, prompt_token_ids"),
    "a number": (5, "prompt: is of type int|prompt_token_ids: is int"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompt(llm: LLM, case: str) -> None:
    prompt, message = BAD_PROMPTS[case]
    finished = llm.stats().requests_finished
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(prompt, GREEDY)
    with pytest.raises(InvalidRequestError, match=message):  # a bad one among good ones starts none of them
        llm.generate([[1, 2], prompt if case != "empty ids" else [], [3]], GREEDY)
    stats = llm.stats()
    assert stats.requests_finished == finished and stats.num_running == stats.num_waiting == 0
    assert stats.arena.used_blocks == 0
    llm.check()
    assert len(llm.generate([1, 2, 3], GREEDY)[0].outputs[0].token_ids) >= 1


def test_empty_text_without_bos_is_refused(llm: LLM) -> None:
    if llm.tokenizer is None:
        with pytest.raises(InvalidRequestError, match="prompt: is text, but no tokenizer is loaded"):
            llm.generate("hello", GREEDY)
        with pytest.raises(InvalidRequestError, match="stop: needs a tokenizer"):
            llm.generate([1], SamplingParams(stop=["x"]))
    else:
        with pytest.raises(InvalidRequestError, match="prompt: is empty"):
            llm.generate({"prompt_token_ids": llm.tokenizer.encode("", add_special_tokens=False)}, GREEDY)


def test_token_ids_in_parameters(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match=r"stop_token_ids: has token id 384; .* 0 to 383"):
        llm.generate([1], SamplingParams(stop_token_ids=[384]))
    with pytest.raises(InvalidRequestError, match=r"logit_bias: has token id -1; .* 0 to 383"):
        llm.generate([1], SamplingParams(logit_bias={-1: 1.0}))


def test_parameters_and_prompts_must_match(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="sampling_params: has 1 items for 2 prompts"):
        llm.generate([[1], [2]], [GREEDY])
    with pytest.raises(InvalidRequestError, match="sampling_params: is dict; must be SamplingParams"):
        llm.generate([[1]], [{"temperature": 0}])  # type: ignore[list-item]


BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "backend": ({"backend": "metal"}, InvalidRequestError, "backend: is 'metal'; must be one of auto, mlx, cuda"),
    "unknown": ({"max_length": 3}, TypeError, "unknown option 'max_length'; known are model, backend"),
    "slots": ({"max_num_seqs": 0}, InvalidRequestError, "max_num_seqs: is 0; must be a whole number of at least 1"),
    "share": ({"memory_utilization": 1.5}, InvalidRequestError, "memory_utilization: is 1.5; must be a number above 0"),
    "bytes": ({"kv_cache_memory": "4 elephants"}, InvalidRequestError, "kv_cache_memory: is '4 elephants'; must be"),
    "policy": ({"kv_policy": "best"}, InvalidRequestError, "kv_policy: is 'best'; must be 'first_fit' or 'buddy'"),
    "kv dtype": ({"kv_dtype": "int3"}, InvalidRequestError, "kv_dtype: is 'int3'; must be 'auto' or 'int8' or 'int4'"),
    "preemption": (
        {"preemption_mode": "kill"},
        InvalidRequestError,
        "preemption_mode: is 'kill'; must be 'auto' or 'recompute' or 'swap'",
    ),
    "caching": (
        {"enable_prefix_caching": 1},
        InvalidRequestError,
        "enable_prefix_caching: is 1; must be True or False",
    ),
    "swap": ({"swap_memory": "-1GiB"}, InvalidRequestError, "swap_memory: is '-1GiB'; must be a number of bytes"),
    "layout": ({"kv_layout": "heap"}, InvalidRequestError, "kv_layout: is 'heap'; must be 'run' or 'paged'"),
    "budget": ({"kv_cache_memory": 1000}, OutOfMemoryBudgetError, "budget of 1,000 bytes holds no block of 16 tokens"),
    "dtype": ({"dtype": "int3"}, Exception, "int3"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option(case: str) -> None:
    options, error, message = BAD_OPTIONS[case]
    with pytest.raises(error, match=message):
        LLM(**{"backend": "reference", **options})


def test_cuda_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = require("torch")
    require("transformers")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        (
            {"kv_layout": "run"},
            InvalidRequestError,
            "kv_layout: is 'run'; the cuda backend's attention reads block tables",
        ),
        ({"dtype": "int3"}, InvalidRequestError, "dtype: is 'int3'; must be auto, float32, bfloat16, float16"),
        ({"backend_options": {"graphs": 1}}, InvalidRequestError, "backend_options: has 'graphs'"),
        ({"backend_options": {"kernels": "cutlass"}}, InvalidRequestError, "has kernels 'cutlass'; it must be"),
        ({"backend_options": {"cuda_graphs": "yes"}}, InvalidRequestError, "has cuda_graphs 'yes'; it must be"),
        (
            {"backend_options": {"device": "cpu", "cuda_graphs": True}},
            InvalidRequestError,
            "has cuda_graphs True; graphs need a GPU and Triton's kernels",
        ),
        (
            {"backend_options": {"device": "cpu"}, "num_kv_blocks": 10**9},
            OutOfMemoryBudgetError,
            r"KV blocks of 64 tokens take \d+ bytes; CPU \(torch\) has \d+; ask for at most \d+ blocks",
        ),
        ({"backend_options": {"device": "tpu"}}, InvalidRequestError, "backend_options: has device 'tpu'"),
        ({"backend_options": {"device": 3.5}}, InvalidRequestError, "backend_options: has device 3.5"),
    ]
    if not torch.cuda.is_available():
        cases.append(({"backend_options": {"device": "cuda"}}, BackendUnavailableError, "sees no NVIDIA GPU"))
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            LLM(backend="cuda", **options)
    if "triton" not in sys.modules:  # or it would be asked whether it interprets
        monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BackendUnavailableError, match=r"kernels 'triton': .*(pip install triton|needs a GPU).*'torch'"):
        LLM(backend="cuda", backend_options={"device": "cpu", "kernels": "triton"})
    for package in ("transformers", "safetensors"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            BackendUnavailableError, match=rf"cuda cannot run here: .*{package}.*pip install 'cortexstream\[cuda\]'"
        ):
            LLM(backend="cuda")


def test_environment_names_a_bad_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEXSTREAM_BACKEND", "abacus")
    with pytest.raises(InvalidRequestError, match="CORTEXSTREAM_BACKEND: is 'abacus'; must be one of"):
        LLM()
    monkeypatch.setenv("CORTEXSTREAM_BACKEND", "reference")
    with LLM(num_kv_blocks=4) as llm:
        assert llm.info.name == "reference"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _write(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is no json": (_write("config.json", "{"), "config.json"),
    "config is a list": (_write("config.json", "[]"), "config.json"),
    "no model_type": (_config(model_type=None), "model_type"),
    "unknown model_type": (_config(model_type="abacus"), "abacus"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "weights cut off": (lambda f: _cut(f / "model.safetensors"), "model.safetensors"),
    "weights are text": (_write("model.safetensors", "hello, world"), "model.safetensors"),
    "index without shard": (
        _write("model.safetensors.index.json", '{"weight_map": {"a": "model-1-of-2.safetensors"}}'),
        "model-1-of-2.safetensors",
    ),
    "wrong width": (_config(hidden_size=192), "192|shape"),
    "missing layer": (_config(num_hidden_layers=5), "layers.4"),
    "broken generation_config": (_write("generation_config.json", "{"), "generation_config.json"),
    "broken tokenizer": (_write("tokenizer.json", "{}"), "tokenizer.json"),
}


@pytest.mark.parametrize("backend", ["reference", "mlx"])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_folder(case: str, backend: str, tmp_path: Path) -> None:
    """F61: every broken file by itself ends in one sentence that names it."""
    if backend == "mlx":
        require("mlx")
        require("mlx_lm")
    folder = Path(shutil.copytree(tiny_folder(), tmp_path / "model"))
    breaks, message = BROKEN[case]
    breaks(folder)
    with pytest.raises(ModelLoadError, match=message) as caught:
        LLM(folder, backend=backend)
    assert "\n" not in str(caught.value)


def _integers(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    torch = require("torch")
    save_file({name: x.to(torch.int32) for name, x in weights.items()}, folder / "model.safetensors", {"format": "pt"})


ODD = {"group_size": 64, "bits": 4, "mode": "affine"}
BROKEN_FOR_CUDA: dict[str, tuple[Callable[[Path], None], str]] = {
    "unknown": (_config(model_type="abacus"), "transformers .* has no architecture 'abacus'; update transformers, or"),
    "own code": (
        _config(model_type="abacus", auto_map={"AutoModelForCausalLM": "x.Y"}),
        "architecture whose code is in the folder, and it is not run here; use a model of",
    ),
    "no language model": (_config(model_type="vit"), "'vit' is no language model; use another folder"),
    "chunked": (_config(layer_types=["chunked_attention"]), "attends within chunks, .*; use another model"),
    "activation": (
        _config(hidden_act="foo"),
        "config.json: hidden_act is 'foo', which transformers .*; correct it",
    ),
    "rope": (
        _config(rope_parameters={"rope_type": "foo", "rope_theta": 1e4}, rope_scaling=None),
        "config.json: rope_parameters.rope_type is 'foo', which",
    ),
    "heads": (_config(num_attention_heads=0), "config.json: num_attention_heads is 0; it must be at least 1"),
    "a word": (_config(max_position_embeddings="big"), "check config.json: .*'max_position_embeddings' expected int"),
    "gptq": (_config(quantization_config={"quant_method": "gptq"}), "by 'gptq'; use the original weights, or what mlx"),
    "method": (_config(quantization_config="gptq"), "quantization_config is 'gptq'; it must be an object, and"),
    "methods": (_config(quantization_config=[1]), r"quantization_config is \[1\]; it must be an object"),
    "bits": (_config(quantization=ODD | {"bits": 7}), r"has bits 7 and group_size 64; bits may be \(2, .*; quantise"),
    "group": (_config(quantization=ODD | {"group_size": 48}), "has bits 4 and group_size 48"),
    "mode": (_config(quantization=ODD | {"mode": "mxfp4"}), "mode 'mxfp4' of the model cannot be read; only 'affine'"),
    "quantised": (_config(quantization="4"), "quantization is '4'; it must be an object with group_size and bits"),
    "integers": (_integers, "model.safetensors: tensor .* has dtype I32; readable are F16, .*: use the original"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"looked for .*model\*.safetensors; fetch one of",
    ),
}


@pytest.mark.parametrize("case", BROKEN_FOR_CUDA)
def test_f61_cuda_says_what_to_do_about_a_folder(case: str, tmp_path: Path) -> None:
    """In one sentence; and transformers' advice to run what a folder brings is not passed on."""
    require("torch")
    require("transformers")
    folder = Path(shutil.copytree(tiny_folder(), tmp_path / "model"))
    breaks, message = BROKEN_FOR_CUDA[case]
    breaks(folder)
    with pytest.raises(ModelLoadError, match=message) as caught:
        LLM(folder, backend="cuda", backend_options={"device": "cpu"})
    said = str(caught.value)
    assert "\n" not in said and ". " not in said and "trust_remote_code" not in said


def test_missing_folder() -> None:
    with pytest.raises(ModelLoadError, match="model: /no/such/folder is neither a folder nor a Hugging Face id"):
        LLM("/no/such/folder", backend="reference")


def test_no_tokenizer_files(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder(), tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelLoadError, match="skip_tokenizer_init"):
        LLM(folder, backend="reference")
    with LLM(folder, backend="reference", skip_tokenizer_init=True) as llm:
        (output,) = llm.generate({"prompt_token_ids": [1, 280]}, SamplingParams(max_tokens=3, ignore_eos=True))
        assert output.prompt is None and len(output.outputs[0].token_ids) == 3 and output.outputs[0].text == ""
