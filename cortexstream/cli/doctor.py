"""`cortexstream doctor`: what runs here, why, with how much memory, and whether it works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cortexstream import __version__
from cortexstream.cli import options
from cortexstream.cli.arena import show_arena
from cortexstream.cli.machine import describe_backends, describe_machine, installed_versions
from cortexstream.errors import CortexStreamError, InvalidRequestError

if TYPE_CHECKING:
    from cortexstream.llm import LLM


def doctor(
    model: options.Model = None,
    backend: options.Backend = "auto",
    dtype: options.DType = "auto",
    kv_cache_memory: options.KVCacheMemory = None,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = None,
    steps: Annotated[
        int, typer.Option("--steps", metavar="N", min=1, help="Decode steps over which the KV pools are watched.")
    ] = 300,
    arena: Annotated[
        bool, typer.Option("--arena", help="Run a few requests and show which blocks of KV memory they hold.")
    ] = False,
    arena_svg: Annotated[
        Path | None,
        typer.Option("--arena-svg", metavar="FILE", show_default=False, help="The same as a picture: an SVG file."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object.")] = False,
) -> None:
    """Tell what runs here and check that it works; exit code 1 if a check fails.

    Without a model that loads it tells the reason and everything else.
    """
    if arena_svg is not None:
        from cortexstream.files import check_path

        check_path("path", arena_svg)
    report: dict[str, Any] = {
        "cortexstream": __version__, "machine": describe_machine(), "packages": installed_versions(),
        "backends": describe_backends(backend),
    }  # fmt: skip
    try:
        llm = options.load_llm(model, backend, dtype, kv_cache_memory, max_model_len, max_num_seqs)
    except InvalidRequestError:
        raise  # the command was wrong, not the machine
    except CortexStreamError as error:
        report["checks"] = [_check("the model loads", False, str(error))]
    else:
        with llm:
            report |= describe_llm(llm)
            report["checks"] = [
                _check("the model loads", True, f"{llm.model.architecture}, from {llm.folder or 'no folder'}")
            ]
            if arena or arena_svg is not None:
                report["arena"], check = show_arena(llm, arena, arena_svg)
                report["checks"].append(check)
            report["checks"] += run_checks(llm, steps, embedded=model is None and llm.tokenizer is not None)
    print(json.dumps(report, indent=2) if as_json else "\n".join(as_lines(report)))
    if not all(check["ok"] for check in report["checks"]):
        raise typer.Exit(1)


def describe_llm(llm: LLM) -> dict[str, Any]:
    """The loaded model, the memory budget and the fallbacks in force."""
    info, model, limits, arena = llm.info, llm.model, llm.limits, llm.stats().arena
    return {
        "device": {"backend": info.name, "name": info.device, "dtype": info.dtype, "kv_layout": info.kv_layout},
        "model": {
            "architecture": model.architecture, "folder": str(llm.folder), "layers": len(model.layers),
            "vocabulary": model.vocab_size, "context_tokens": model.max_context_tokens,
            "weight_bytes": model.weight_bytes,
        },
        "memory": {
            "free_bytes": info.memory_bytes,
            "share": info.memory_share,
            "asked_bytes": llm.config.kv_cache_memory,
            "kv_bytes_per_token": model.kv_bytes_per_token,
            "kv_bytes": llm.kv_bytes,
            "blocks": arena.num_blocks,
            "block_tokens": info.block_tokens,
            "sequences": llm.config.max_num_seqs,
            "longest_tokens": limits.max_tokens,
            "longest_reason": limits.reason,
        },
        "batch_invariance": {"on": info.batch_invariant, "why": info.invariance},
        "fallbacks": list(llm.notes),
    }  # fmt: skip


def run_checks(llm: LLM, steps: int, embedded: bool) -> list[dict[str, Any]]:
    """Generate, and see whether what came out and what was left behind is right."""
    checks = [check_answer(llm, embedded)]
    if llm.info.name == "mlx":
        checks.append(check_pools(llm, steps))
    try:
        llm.check()
        checks.append(_check("the arena is in order", True, "its invariants hold, and no block is left behind"))
    except CortexStreamError as error:
        checks.append(_check("the arena is in order", False, str(error)))
    return checks


def check_answer(llm: LLM, embedded: bool) -> dict[str, Any]:
    """The embedded model must add two numbers; of any other only tokens are asked for."""
    from cortexstream.request import SamplingParams

    name = "the model answers"
    prompt: Any = "12+30=" if embedded else {"prompt_token_ids": [0]}
    completion = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)[0].outputs[0]
    if completion.error is not None:
        return _check(name, False, completion.error)
    if not embedded:
        return _check(name, bool(completion.token_ids), f"{len(completion.token_ids)} tokens")
    return _check(
        name, completion.text == "42", f"12+30={completion.text}" + ("" if completion.text == "42" else ", not 42")
    )


def check_pools(llm: LLM, steps: int) -> dict[str, Any]:
    """MLX copies a whole KV pool, unseen, if anything else refers to it when it is written: its address then changes.

    One sequence runs for `steps` steps while others join and leave.
    """
    from cortexstream.request import SamplingParams

    def addresses() -> list[int]:
        return llm.memory_addresses()

    name = "the KV pools stay in place"
    steps = min(steps, llm.limits.max_tokens - 1)
    before, steps_before = addresses(), llm.stats().steps
    longest = llm.submit([0], SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True))
    few = max(1, steps // 8)
    brief = SamplingParams(temperature=0, max_tokens=few, ignore_eos=True)
    joining = [[0] * length for length in (1, 5, 17) if length + few <= llm.limits.max_tokens]
    while joining and not longest.done:
        llm.generate(joining, brief, use_tqdm=False)
    failed = longest.result().outputs[0].error
    if failed is not None:
        return _check(name, False, failed)
    moved = sum(a != b for a, b in zip(before, addresses(), strict=True))
    detail = f"{len(before)} pools over {llm.stats().steps - steps_before} steps with joins and leaves"
    return _check(name, not moved, detail if not moved else f"{moved} of {detail} were copied: every step pays for it")


def _check(name: str, ok: bool, detail: str) -> dict[str, Any]:
    return {"name": name, "ok": ok, "detail": detail}


def as_lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    machine, backends = report["machine"], report["backends"]
    versions = [f"{name} {version}" for name, version in report["packages"].items() if version is not None]
    missing = [name for name, version in report["packages"].items() if version is None]
    lines = [
        f"CortexStream {report['cortexstream']}, Python {machine['python']}, {machine['system']}",
        f"{machine['processor']}, {machine['cores']} cores, {size(machine['memory_bytes'])} of memory",
        f"installed: {', '.join(versions)}",
        f"not installed: {', '.join(missing) or 'nothing of interest'}",
        "",
        *(f"{name:10} {verdict}" for name, verdict in backends["probed"].items()),
        f"chosen: {backends['chosen']}, {backends['reason']}",
        "",
    ]
    if "model" in report:
        lines += [*_model_lines(report), ""]
    if "arena" in report:
        lines += [*report["arena"].get("text", ()), *_picture_lines(report["arena"]), ""]
    return lines + [f"{'ok    ' if c['ok'] else 'FAILED'}  {c['name']}: {c['detail']}" for c in report["checks"]]


def _model_lines(report: dict[str, Any]) -> list[str]:
    device, model, memory = report["device"], report["model"], report["memory"]
    allowed = f"{memory['share']:.0%} of it may hold keys and values"
    if memory["asked_bytes"] is not None:
        allowed = f"{size(memory['asked_bytes'])} were asked for"
    return [
        f"device: {device['name']}, {device['dtype']}, {device['kv_layout']} layout",
        f"model: {model['architecture']}, {model['layers']} layers, vocabulary {model['vocabulary']}, "
        f"weights {size(model['weight_bytes'])}",
        f"memory: {size(memory['free_bytes'])} free, {allowed}; allocated {size(memory['kv_bytes'])}: "
        f"{memory['blocks']} blocks of {memory['block_tokens']} tokens, {size(memory['kv_bytes_per_token'])} a token, "
        f"enough for {memory['blocks'] * memory['block_tokens']} tokens of up to {memory['sequences']} sequences",
        f"longest sequence: {memory['longest_tokens']} tokens ({memory['longest_reason']})",
        f"batch invariance: {_invariance(report['batch_invariance'])}",
        f"fallbacks: {'; '.join(report['fallbacks']) or 'none'}",
    ]


def _invariance(told: dict[str, Any]) -> str:
    """A sentence that does not hold begins with off, or with not here."""
    return f"on, {told['why']}" if told["on"] else str(told["why"])


def _picture_lines(arena: dict[str, Any]) -> list[str]:
    return [f"picture: {arena['svg']}"] if "svg" in arena else []


def size(num_bytes: int) -> str:
    """Bytes in words, such as "512.0 MiB"."""
    value, unit = float(num_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{num_bytes} bytes" if unit == "bytes" else f"{value:.1f} {unit}"
