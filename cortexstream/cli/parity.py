"""`cortexstream parity`: hold this machine to what another one computed."""

from __future__ import annotations

import json
import platform as host
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cortexstream import __version__
from cortexstream.cli import options
from cortexstream.cli.machine import installed_versions
from cortexstream.errors import InvalidRequestError

if TYPE_CHECKING:
    from cortexstream.llm import LLM
    from cortexstream.parity import Comparison, Difference, Fingerprint, Origin, Record, TrialComparison

HEADINGS = ("prompt", "tokens", "draw", "max error", "mean error", "max KL", "differ", "first difference")


def parity(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            show_default="the embedded model",
            help="A model's folder, or a Hugging Face id such as owner/name.",
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="FILE", show_default=False, help="Write what this machine computes."),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option("--check", metavar="FILE", show_default=False, help="Compute it here, and compare."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="Record this too, beside the built-in ones; may be repeated."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", show_default="64", help="Tokens to record for every prompt."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write one JSON object, with the errors of every step.")
    ] = False,
    backend: options.Backend = "auto",
    dtype: options.DType = "auto",
    kv_cache_memory: options.KVCacheMemory = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
) -> None:
    """Record tokens and logprobs on one machine with --record, and hold another one to them with --check.

    Greedy and seeded tokens are recorded for random token ids of several lengths, and for texts if the model has a
    tokenizer. A check computes every step after the recorded tokens. An error is the difference of a token's logprob
    (natural log), KL the divergence at a step in nats; both count the 20 likeliest tokens of each side.

    Bounds on the largest error, the mean error, the largest KL: float32 0.0001, 3e-05, 1e-05; 4-bit and 8-bit models
    in float32 0.0005, 0.0001, 2e-05; float16 0.2, 0.0125, 0.002; bfloat16 1.6, 0.1, 0.1. The coarser machine counts. A
    token may differ only by a tie: both candidates' scores lie within 0.0002, 0.001, 0.125 or 1 of each other.

    Exit code 0 is parity, 1 is none, 2 a record that is damaged or of another model.
    """
    if (record is None) == (check is None):
        raise InvalidRequestError("record", "and --check: give one of them, with a file")
    if check is not None and (prompt or steps is not None):
        raise InvalidRequestError(
            "prompt" if prompt else "steps", "goes with --record; a check repeats what was recorded"
        )
    from cortexstream import parity as work
    from cortexstream.files import check_path
    from cortexstream.models import resolve_model

    recorded = None if check is None else work.load(check)
    if record is not None:
        check_path("record", record)
    fingerprint = work.Fingerprint.of_folder(resolve_model(model))
    if recorded is not None:
        refuse_another_model(recorded.fingerprint, fingerprint)
    with options.load_llm(model, backend, dtype, kv_cache_memory, max_model_len, max_num_seqs) as llm:
        origin = origin_of(llm)
        if recorded is None:
            num_steps = work.STEPS if steps is None else steps
            prompts = work.choose_prompts(llm.limits, llm.tokenizer, prompt or (), num_steps)
            trials = work.measure(llm, prompts, num_steps)
            made = work.Record(origin, fingerprint, llm.limits.vocab_size, trials)
        else:
            comparison = compare_here(llm, recorded, origin)
    if record is not None:
        tell_record(record, work.save(record, made), made, as_json)
    elif recorded is not None:
        other_weights = recorded.fingerprint.samples != fingerprint.samples
        if as_json:
            print(json.dumps(report(recorded.origin, origin, comparison, other_weights)))
        else:
            print("\n".join(as_lines(recorded.origin, origin, comparison, other_weights)))
        if not comparison.ok:
            raise typer.Exit(1)


def refuse_another_model(recorded: Fingerprint, here: Fingerprint) -> None:
    """Raise InvalidRequestError unless both are of one model."""
    found = recorded.differences(here)
    if found:
        raise InvalidRequestError(
            "model",
            f"is not the recorded one: they differ in {', '.join(found)}; give the recorded model, or record anew",
        )


def origin_of(llm: LLM) -> Origin:
    """Where the loaded model computes. Raises InvalidRequestError for a backend without numbers."""
    from cortexstream.parity import BOUNDS, Origin

    info = llm.info
    if info.dtype not in BOUNDS:
        raise InvalidRequestError("backend", f"is {info.name}, which computes in {info.dtype}: nothing to compare")
    versions = {"cortexstream": __version__, "python": host.python_version()}
    versions |= {name: version for name, version in installed_versions().items() if version is not None}
    return Origin(info.name, info.device, info.dtype, versions, llm.notes)


def compare_here(llm: LLM, recorded: Record, here: Origin) -> Comparison:
    """Follow the record on the loaded model. Raises InvalidRequestError if it has another vocabulary."""
    from cortexstream import parity as work

    vocab_size = llm.limits.vocab_size
    if vocab_size != recorded.vocab_size:
        raise InvalidRequestError(
            "model", f"has a vocabulary of {vocab_size} tokens here; the recorded one had {recorded.vocab_size}"
        )
    bound = work.bound_of(recorded.origin.dtype, here.dtype, quantized=recorded.fingerprint.quantized)
    return work.compare(recorded.trials, work.follow(llm, recorded.trials), vocab_size, bound)


def tell_record(path: Path, num_bytes: int, made: Record, as_json: bool) -> None:
    """What was written, for people or as JSON."""
    steps = len(made.trials[0].steps)
    origin = made.origin
    if as_json:
        values = {"record": str(path), "bytes": num_bytes, "trials": len(made.trials), "steps": steps}
        print(json.dumps({**values, **origin.as_json()}))
    else:
        print(f"recorded: {place(origin)}; {len(made.trials)} trials of {steps} tokens, {num_bytes} bytes, {path}")


def report(recorded: Origin, here: Origin, comparison: Comparison, other_weights: bool) -> dict[str, Any]:
    """The comparison as plain values."""
    return {
        "parity": comparison.ok, "reasons": comparison.reasons, "recorded": recorded.as_json(), "here": here.as_json(),
        "weights_differ": other_weights, "bound": comparison.bound._asdict(), "steps": comparison.num_steps,
        "max_error": comparison.max_error, "mean_error": comparison.mean_error, "max_kl": comparison.max_kl,
        "differences": len(comparison.differences),
        "ties": sum(difference.tie for _, difference in comparison.differences),
        "trials": [
            {
                "prompt": one.trial.prompt, "prompt_tokens": len(one.trial.token_ids),
                "temperature": one.trial.temperature, "seed": one.trial.seed, "max_errors": one.max_errors,
                "mean_errors": one.mean_errors, "kls": one.kls,
                "differences": [difference._asdict() for difference in one.differences],
            }
            for one in comparison.trials
        ],
    }  # fmt: skip


def as_lines(recorded: Origin, here: Origin, comparison: Comparison, other_weights: bool) -> list[str]:
    """The comparison for people: a row per trial, the bounds, the verdict."""
    bound = comparison.bound
    total = [comparison.max_error, comparison.mean_error, comparison.max_kl]
    num_differ = len(comparison.differences)
    rows = [
        HEADINGS,
        *(_row(one) for one in comparison.trials),
        ("all", "", "", *map(_number, total), str(num_differ), ""),
        ("bound", "", "", *map(_number, bound[:3]), "", f"ties only: within {_number(bound.tie)}"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    table = ["  ".join(_padded(row, widths)).rstrip() for row in rows]
    if comparison.ok:
        same = f"all {comparison.num_steps} tokens are the same"
        ties = f"{num_differ} of {comparison.num_steps} tokens differ, each by a tie"
        verdict = [f"PASS: within the bounds; {ties if num_differ else same}"]
    else:
        verdict = [f"FAIL: {'; '.join(comparison.reasons)}"]
        if other_weights:
            verdict.append("The weight files differ from the recorded ones: that may be why.")
    return [f"recorded: {place(recorded)}", f"here:     {place(here)}", "", *table, "", *verdict]


def place(origin: Origin) -> str:
    """An origin in words."""
    return (
        f"{origin.backend} on {origin.device}, {origin.dtype}, CortexStream {origin.versions.get('cortexstream', '?')}"
    )


def _row(one: TrialComparison) -> tuple[str, ...]:
    trial = one.trial
    draw = f"at {trial.temperature:g}" if trial.temperature else "greedy"
    mean = sum(one.mean_errors) / len(one.mean_errors)
    first = _in_words(one.differences[0]) if one.differences else "none"
    numbers = [_number(value) for value in (max(one.max_errors), mean, max(one.kls))]
    return trial.prompt, str(len(trial.token_ids)), draw, *numbers, str(len(one.differences)), first


def _in_words(difference: Difference) -> str:
    kind = "a tie" if difference.tie else "a fault"
    tokens = f"{difference.recorded} recorded, {difference.drawn} here"
    return f"step {difference.step}: {tokens}, {difference.margin:.2g} apart, {kind}"


def _number(value: float) -> str:
    return f"{value:.1e}"


def _padded(row: tuple[str, ...], widths: list[int]) -> list[str]:
    """Text to the left, numbers to the right."""
    text = ("prompt", "draw", "first difference")
    return [
        cell.ljust(width) if name in text else cell.rjust(width)
        for name, cell, width in zip(HEADINGS, row, widths, strict=True)
    ]
