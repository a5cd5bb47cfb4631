"""`cortexstream parity`: a record made on one backend, and the others held to it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cortexstream import LLM, InvalidRequestError, SamplingParams
from cortexstream.models import tiny_folder
from cortexstream.parity import BOUNDS, QUANTIZED, STEPS, Fingerprint, Trial, follow, load
from cortexstream.parity.prompts import RANDOM_TOKENS, TEXTS
from cortexstream.parity.trial import TOP_TOKENS
from tests.cli.command_line import EMBEDDED, command, cortexstream, environment, is_one_sentence, write_random_llama
from tests.conftest import require
from tests.repo.tree import ROOT

pytestmark = pytest.mark.skipif(not EMBEDDED, reason=f"the embedded model is missing: {tiny_folder()}")
BRIEF = ("--steps", "5", "--max-model-len", "72")  # where what counts does not need more


def write_record(path: Path, *arguments: str) -> Path:
    done = cortexstream("parity", "--record", str(path), *arguments)
    assert done.returncode == 0, done.stderr
    return path


def check(path: Path, *arguments: str, backend: str = "reference", env: dict[str, str] | None = None) -> dict[str, Any]:
    """The report of a check that ran; its exit code must be its verdict."""
    done = cortexstream("parity", *arguments, "--check", str(path), "--json", backend=backend, env=env)
    assert done.returncode in (0, 1), done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["parity"] is (done.returncode == 0)
    return report


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_record(tmp_path_factory.mktemp("parity") / "full.json")


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps of prompts of up to 67 tokens."""
    return write_record(tmp_path_factory.mktemp("parity") / "brief.json", *BRIEF)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_a_fault(tmp_path_factory.mktemp("faulty"), "model.layers.2.input_layernorm.weight")


def with_a_fault(folder: Path, tensor: str) -> Path:
    """The embedded model, the first number of one tensor being four times as large, or a quarter."""
    shutil.copytree(tiny_folder(), folder, dirs_exist_ok=True)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(data[8 : 8 + length])[tensor]
    assert entry["dtype"] == "BF16"
    data[8 + length + entry["data_offsets"][0] + 1] ^= 1  # the upper byte of a little-endian bfloat16: exponent +- 2
    path.write_bytes(data)
    return folder


def rewrite(path: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a record with other contents and a right checksum."""
    content = json.loads(path.read_text())
    change(content["record"])
    text = json.dumps(content["record"], sort_keys=True, separators=(",", ":"))
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    target.write_text(json.dumps(content))
    return target


def test_p6_a_record_holds_tokens_and_logprobs_of_many_prompts(recorded: Path) -> None:
    assert recorded.stat().st_size < 500_000
    record = load(recorded)
    assert record.origin.backend == "reference" and record.origin.dtype == "float32" and record.vocab_size == 384
    assert record.origin.versions.keys() >= {"cortexstream", "python", "numpy"}
    names = [f"random {length}" for length in RANDOM_TOKENS] + list(TEXTS)
    assert [trial.prompt for trial in record.trials] == [name for name in names for _ in range(2)]
    assert {1, 300} <= {len(trial.token_ids) for trial in record.trials}
    for greedy, seeded in zip(record.trials[::2], record.trials[1::2], strict=True):
        assert greedy.temperature == 0 and seeded.temperature > 0 and greedy.token_ids == seeded.token_ids
        for step in (*greedy.steps, *seeded.steps):
            values = [value for _, value in step.top]
            assert len(values) == TOP_TOKENS and values == sorted(values, reverse=True)
        assert len(greedy.steps) == len(seeded.steps) == STEPS
        assert all(step.token == step.top[0][0] for step in greedy.steps)
    assert any(a.tokens != b.tokens for a, b in zip(record.trials[::2], record.trials[1::2], strict=True))


def test_p6_recorded_tokens_are_what_a_request_gets(recorded: Path) -> None:
    trials = load(recorded).trials[:8]
    assert len({trial.seed for trial in trials}) == 4, "each prompt has a seed of its own"

    def params(trial: Trial, seed: int) -> SamplingParams:
        return SamplingParams(temperature=trial.temperature, min_p=1e-6, seed=seed, max_tokens=64, ignore_eos=True)

    with LLM(backend="reference", num_kv_blocks=200) as llm:
        prompts = [{"prompt_token_ids": trial.token_ids} for trial in trials]
        right = llm.generate(prompts, [params(trial, trial.seed) for trial in trials], use_tqdm=False)
        wrong = llm.generate(prompts, [params(trial, trial.seed + 1) for trial in trials], use_tqdm=False)
    assert [output.outputs[0].token_ids for output in right] == [trial.tokens for trial in trials]
    changed = [output.outputs[0].token_ids != trial.tokens for output, trial in zip(wrong, trials, strict=True)]
    assert any(changed[1::2]) and not any(changed[::2]), "a seed matters to a draw, and only to a draw"


def test_p6_the_same_machine_is_in_parity_to_the_bit(brief: Path, tmp_path: Path) -> None:
    report = check(brief)
    assert report["parity"] and report["max_error"] < 1e-7 and report["differences"] == 0
    again = load(write_record(tmp_path / "again.json", *BRIEF))
    assert again == load(brief)


def test_p6_mlx_is_in_parity_with_the_reference(recorded: Path) -> None:
    """F60 at the size that it asks for: 64 greedy and 64 seeded tokens of every prompt."""
    require("mlx")
    require("mlx_lm")
    report = check(recorded, backend="mlx")
    assert report["parity"], report["reasons"]
    assert report["here"]["backend"] == "mlx" and report["recorded"]["backend"] == "reference"
    assert report["differences"] == report["ties"] and report["steps"] == 2 * 64 * (len(RANDOM_TOKENS) + len(TEXTS))
    assert 0 < report["mean_error"] < report["max_error"] <= 1e-4, "two libraries never agree to the bit"


def test_p6_torch_is_in_parity_with_the_reference(brief: Path) -> None:
    require("torch")
    require("transformers")
    report = check(brief, backend="cuda", env={"CUDA_VISIBLE_DEVICES": ""})
    assert report["parity"], report["reasons"]
    assert report["here"]["backend"] == "cuda" and report["here"]["device"].startswith("CPU")
    assert 0 < report["max_error"] <= 1e-4 and report["steps"] == 2 * 5 * (len(RANDOM_TOKENS) - 1 + len(TEXTS))


def test_p6_one_wrong_number_in_the_weights_fails(recorded: Path, faulty: Path) -> None:
    """The control: the same files but for one byte."""
    assert Fingerprint.of_folder(tiny_folder()).differences(Fingerprint.of_folder(faulty)) == []
    done = cortexstream("parity", str(faulty), "--check", str(recorded))
    assert done.returncode == 1 and done.stderr == ""
    *table, verdict, hint = done.stdout.splitlines()
    assert verdict.startswith("FAIL: the largest error of a logprob is ")
    assert verdict.endswith("tokens differ, and not by a tie")
    assert hint.startswith("The weight files differ from the recorded ones")
    (row,) = [line for line in table if line.startswith("letter") and " greedy " in line]
    assert "recorded, " in row and row.endswith("a fault")


def test_p6_weights_whose_samples_differ_are_told(brief: Path, tmp_path: Path) -> None:
    other = with_a_fault(tmp_path, "model.norm.weight")  # at the end of the file, which is read
    done = cortexstream("parity", str(other), "--check", str(brief))
    assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith("The weight files differ from the recorded")
    assert check(brief, str(other))["weights_differ"] and not check(brief)["weights_differ"]


def test_p6_steps_are_compared_after_the_recorded_tokens(recorded: Path, faulty: Path) -> None:
    """Also after the first other token: each is what a request gets whose prompt ends with the recorded ones."""
    trials = load(recorded).trials[-4:]
    with LLM(faulty, backend="reference", num_kv_blocks=600) as llm:
        followed = follow(llm, trials)
        parted = 0
        for trial, steps in zip(trials, followed, strict=True):
            others = [n for n, step in enumerate(steps) if step.token != trial.tokens[n]]
            parted += bool(others)
            assert len(steps) == len(trial.steps)
            for number in {0, *(n + more for n in others[:1] for more in (0, 1, 7)), 40, 63} & set(range(64)):
                params = SamplingParams(
                    temperature=trial.temperature, min_p=1e-6, seed=trial.seed, max_tokens=1, ignore_eos=True,
                    logprobs=20,
                )  # fmt: skip
                prompt = {"prompt_token_ids": trial.token_ids + trial.tokens[:number]}
                completion = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]
                assert completion.logprobs is not None
                assert steps[number].token == completion.token_ids[0]
                assert (
                    dict(steps[number].top).items()
                    <= {token: value.logprob for token, value in completion.logprobs[0].items()}.items()
                )
        assert parted, "nothing was forced"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda data: data.replace(b'"seed":1,', b'"seed":2,', 1), "its checksum is wrong"),
        (lambda data: data[: len(data) // 2], "is damaged, or is no parity record"),
        (lambda data: b"", "is damaged, or is no parity record"),
        (lambda data: b"\xff\xfe" + data, "is damaged, or is no parity record"),
        (lambda data: data.replace(b'"logprobs":[-', b'"logprobs":[-1e999,-', 1), "-1e999 is no number"),
        (lambda data: b"[" * 100_000, "is damaged, or is no parity record"),
        (lambda data: b"[]", "is no parity record"),
        (lambda data: data.replace(b"cortexstream-parity-2", b"cortexstream-parity-9"), "has the format"),
    ],
    ids=["edited", "cut", "empty", "bytes", "infinite", "deep", "other JSON", "newer"],
)
def test_p6_a_damaged_record_is_refused(
    brief: Path, tmp_path: Path, fault: Callable[[bytes], bytes], words: str
) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(fault(brief.read_bytes()))
    assert path.read_bytes() != brief.read_bytes()
    with pytest.raises(InvalidRequestError, match=words) as raised:
        load(path)
    assert raised.value.field == "check" and str(path) in str(raised.value) and "with --record" in str(raised.value)
    if words.startswith("its checksum"):
        is_one_sentence(cortexstream("parity", "--check", str(path)), 2, str(path), words)


def test_p6_a_record_that_is_not_there_is_refused(tmp_path: Path) -> None:
    is_one_sentence(cortexstream("parity", "--check", str(tmp_path / "no.json")), 2, "no.json", "No such file")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["trials"][0]["logprobs"].__setitem__(0, float("nan")),
        lambda record: record["trials"][0]["top_logprobs"][1].__setitem__(0, 0.5),
        lambda record: record["trials"][0]["top_logprobs"][1].__setitem__(0, -(10**400)),
        lambda record: record["trials"][0]["tokens"].pop(),
        lambda record: record["trials"][3]["tokens"].__setitem__(-1, 384),
        lambda record: record["trials"][0]["top_tokens"][1].__setitem__(0, record["trials"][0]["top_tokens"][1][1]),
        lambda record: record["trials"].clear(),
        lambda record: record["origin"].__setitem__("dtype", "int3"),
        lambda record: record["fingerprint"].pop("config"),
    ],
    ids=["NaN", "above 1", "too large", "a step less", "no such token", "twice", "no trials", "dtype", "fingerprint"],
)
def test_p6_a_record_with_a_right_checksum_and_wrong_contents_is_refused(
    brief: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    path = rewrite(brief, tmp_path / "record.json", change)
    with pytest.raises(InvalidRequestError, match=r"holds what no record can|is no number") as raised:
        load(path)
    assert raised.value.field == "check" and str(path) in str(raised.value)


def test_p6_another_model_is_refused(brief: Path, tmp_path: Path) -> None:
    other = write_random_llama(tmp_path)
    done = cortexstream("parity", str(other), "--check", str(brief))
    is_one_sentence(done, 2, "model: is not the recorded one", "config.json", "tensors (38 and 20)")


def test_p6_another_vocabulary_is_refused(brief: Path, tmp_path: Path) -> None:
    path = rewrite(brief, tmp_path / "record.json", lambda record: record.__setitem__("vocab_size", 385))
    is_one_sentence(cortexstream("parity", "--check", str(path)), 2, "vocabulary of 384 tokens here", "had 385")


def test_p6_what_a_fingerprint_sees(tmp_path: Path) -> None:
    """Config values, the tokenizer, names and shapes; not the layout of a JSON file, nor how tensors are spread."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    folder = write_random_llama(tmp_path)
    original = Fingerprint.of_folder(folder)
    config = json.loads((folder / "config.json").read_text())

    def found() -> list[str]:
        return original.differences(Fingerprint.of_folder(folder))

    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=3))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    for number, part in enumerate((names[:7], names[7:])):
        save_file({name: weights[name] * 2 for name in part}, folder / f"model-{number}.safetensors")
    assert found() == []
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    assert found() == ["config.json"]
    (folder / "config.json").write_text(json.dumps(config))
    with safe_open(folder / "model-0.safetensors", framework="numpy") as file:
        turned = {name: file.get_tensor(name).T.copy() for name in file.keys()}
    save_file(turned, folder / "model-0.safetensors")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    assert found() == ["the tokenizer's file", "names, types or shapes of tensors"]
    (folder / "model-0.safetensors").unlink()
    assert found()[1].startswith("the number of tensors (20 and ")


def test_p6_a_record_has_a_place_or_nothing_is_computed(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "record.json"
    is_one_sentence(cortexstream("parity", "--record", str(missing)), 2, str(missing), "does not exist", "make it")
    is_one_sentence(cortexstream("parity", "--record", str(tmp_path)), 2, str(tmp_path), "is a folder")
    assert not [*tmp_path.iterdir()]


def test_p6_a_record_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """The system stops the write in the middle: what was there before stays, and nothing else is left."""
    path = tmp_path / "record.json"
    path.write_text("before")
    limited = ["sh", "-c", 'ulimit -f 20 && exec "$@"', "sh"]  # 10 or 20 kB, depending on the shell
    done = subprocess.run(
        [*limited, *command("parity", "--record", str(path), "--backend", "reference", *BRIEF)], capture_output=True,
        text=True, cwd=ROOT, timeout=120, check=False, env=environment() | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    is_one_sentence(done, 2, "record: ", str(path), "cannot be written: File too large")
    assert [found.name for found in tmp_path.iterdir()] == ["record.json"] and path.read_text() == "before"


def test_p6_prompts_fit_the_context(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    short = ("--max-model-len", "40", "--steps", "8")
    done = cortexstream("parity", "--record", str(path), *short, "--prompt", "copy: tide", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    record = load(path)
    assert told["trials"] == len(record.trials) == 2 * (3 + len(TEXTS) + 1) and told["bytes"] == path.stat().st_size
    assert max(len(trial.token_ids) for trial in record.trials) == 32, "the long texts are cut"
    assert [trial.prompt for trial in record.trials][-1] == "given 1"
    refused = cortexstream("parity", "--check", str(path), "--max-model-len", "39")
    is_one_sentence(refused, 2, "a trial of 40 tokens", "at most 39 fit")
    long = cortexstream("parity", "--record", str(path), *short, "--prompt", "x" * 60)
    is_one_sentence(long, 2, "number 1 has", "1 to 32")
    is_one_sentence(
        cortexstream("parity", "--record", str(path), "--max-model-len", "40"), 2, "steps: is 64", "1 to 39"
    )


def test_p6_usage(brief: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "record.json")
    is_one_sentence(cortexstream("parity"), 2, "--check: give one of them")
    is_one_sentence(cortexstream("parity", "--record", file, "--check", file), 2, "--check: give one of them")
    is_one_sentence(cortexstream("parity", "--check", str(brief), "--steps", "3"), 2, "steps: goes with --record")
    is_one_sentence(cortexstream("parity", "--check", str(brief), "--prompt", "a"), 2, "prompt: goes with --record")
    is_one_sentence(cortexstream("parity", "--record", file, backend="null"), 3, "null", "nothing to compare")


def test_p6_help_tells_the_bounds() -> None:
    text = " ".join(cortexstream("parity", "--help", backend=None).stdout.split())
    for bound in (*BOUNDS.values(), QUANTIZED):
        assert ", ".join(str(number) for number in bound[:3]) in text
        assert f"{bound.tie:g}" in text
    assert f"(default: ({STEPS}))".replace("(default", "[default").replace("))", ")]") in text
