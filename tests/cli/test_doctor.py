"""`cortexstream doctor` and `warmup`, and the scripts beside them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from cortexstream import LLM
from cortexstream.cli.arena import fold, show_arena
from cortexstream.cli.doctor import check_pools
from cortexstream.models import tiny_folder
from tests.cli.command_line import EMBEDDED, cortexstream, environment, is_one_sentence
from tests.conftest import require
from tests.core.drawing import amounts, pieces, texts
from tests.repo.tree import ROOT


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"scripts/{name}", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=240,
        check=False, env=environment(),
    )  # fmt: skip


def test_doctor_tells_what_runs_and_why(model: Path) -> None:
    done = cortexstream("doctor", "--model", str(model), "--max-num-seqs", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "chosen: reference, asked for with --backend" in done.stdout
    assert f"numpy {metadata.version('numpy')}" in done.stdout
    assert "longest sequence: 4096 tokens (the model's context is 4096 tokens)" in done.stdout
    assert "1024 blocks of 16 tokens" in done.stdout, "4 sequences of 4096 tokens"
    assert "fallbacks: none" in done.stdout
    assert done.stdout.count("\nok ") == 3 and "FAILED" not in done.stdout


def test_doctor_json_is_one_object(model: Path) -> None:
    done = cortexstream("doctor", "--model", str(model), "--json", "--kv-cache-memory", "1MiB")
    report = json.loads(done.stdout)
    memory = report["memory"]
    assert memory["asked_bytes"] == 2**20 and memory["kv_bytes"] <= 2**20
    assert memory["blocks"] * memory["block_tokens"] * memory["kv_bytes_per_token"] == memory["kv_bytes"]
    assert memory["longest_tokens"] == memory["blocks"] * 16 + 1 and "kv_cache_memory" in memory["longest_reason"]
    assert report["packages"]["numpy"] == metadata.version("numpy")
    assert report["backends"]["probed"].keys() == {"mlx", "cuda", "reference"}
    assert [check["ok"] for check in report["checks"]] == [True] * 3
    assert "arena" not in report


def test_doctor_without_a_model_tells_the_rest() -> None:
    done = cortexstream("doctor", "--model", "no/such/folder")
    assert done.returncode == 1
    assert "FAILED  the model loads: " in done.stdout and "no/such/folder" in done.stdout
    assert "chosen: reference" in done.stdout and done.stderr == ""


def test_doctor_on_the_embedded_model_adds() -> None:
    if not EMBEDDED:
        pytest.skip(f"the embedded model is missing: {tiny_folder()}")
    done = cortexstream("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12+30=42" in done.stdout


def test_f24_doctor_shows_the_arena_at_work(tmp_path: Path) -> None:
    if not EMBEDDED:
        pytest.skip(f"the embedded model is missing: {tiny_folder()}")
    picture = tmp_path / "arena.svg"
    done = cortexstream("doctor", "--arena", "--arena-svg", str(picture), "--max-num-seqs", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    start = lines.index("configuration: 512 blocks of 16 tokens, placement paged")
    assert re.fullmatch(r"state: [1-9]\d* used, \d+ free, fragmentation 0\.\d\d", lines[start + 1])
    assert lines[start + 2] == "sequences: 1" and re.fullmatch(
        r"  \d+/\d+ tokens, blocks \[\d+, .*\]", lines[start + 3]
    )
    assert re.fullmatch(r"X[X.o]*X[X.o]*o[X.o]*", lines[start + 5]), "one sequence runs, others were kept"
    assert lines[start + 6 : start + 10] == ["." * 64] * 3 + ["(4 more lines like this one)"]
    assert re.fullmatch(r"held: \d+ tokens; kept for reuse: [1-9]\d* blocks; largest empty .*", lines[start + 10])
    assert re.match(r"since the start: [1-9]\d* tokens reused, ", lines[start + 11])
    assert lines[start + 12] == f"picture: {picture}"
    assert "ok      the arena takes a mixed workload: 4 requests finished, 1 cancelled, 1 running" in lines
    (drawn,) = pieces(picture.read_text("utf-8"))
    total = amounts(drawn)
    assert sum(total.values()) == pytest.approx(512) and total["filled"] > 2 and total["kept"] >= 1


def test_f24_doctor_arena_is_in_the_json(model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "arena.svg"
    asked = ["doctor", "--model", str(model), "--json", "--max-num-seqs", "1", "--arena", "--arena-svg", str(picture)]
    report = json.loads(cortexstream(*asked).stdout)
    assert report["arena"].keys() == {"text", "svg"} and report["arena"]["svg"] == str(picture)
    assert report["arena"]["text"][0] == "configuration: 256 blocks of 16 tokens, placement paged"
    assert texts(picture.read_text("utf-8"))[0] == "KV arena: 256 blocks of 16 tokens, placement paged"
    assert [check["ok"] for check in report["checks"]] == [True] * 4


def test_f24_doctor_refuses_a_picture_that_has_no_place(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "arena.svg"
    is_one_sentence(cortexstream("doctor", "--arena-svg", str(missing)), 2, str(missing), "does not exist", "make it")
    is_one_sentence(cortexstream("doctor", "--arena-svg", str(tmp_path)), 2, str(tmp_path), "is a folder")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("tokens", [2, 3, 5, 40])
def test_f24_the_workload_fits_any_limits(tokens: int, tmp_path: Path) -> None:
    with LLM(backend="null", max_num_seqs=1, max_model_len=tokens, num_kv_blocks=40, block_tokens=4) as llm:
        shown, check = show_arena(llm, True, tmp_path / "a.svg")
        llm.check()
        assert llm.stats().num_running == llm.stats().num_waiting == llm.stats().requests_failed == 0
    found = re.fullmatch(r"(\d) requests finished, (\d) cancelled, [01] running", check["detail"])
    assert check["ok"] and found and int(found[1]) + int(found[2]) == 5, check
    assert shown["text"][0].startswith("configuration: 40 blocks of 4 tokens") and (tmp_path / "a.svg").is_file()


def test_f24_a_workload_that_fails_is_a_failed_check() -> None:
    def plant(core: Any) -> None:
        def wrong(plan: Any) -> Any:
            raise RuntimeError("the device fell over")

        core.backend.submit = wrong

    with LLM(backend="null", num_kv_blocks=40, block_tokens=4) as llm:
        llm._engine.call(plant)
        shown, check = show_arena(llm, True, None)
    assert not check["ok"] and check["detail"] == "the step failed: the device fell over"
    assert shown.keys() == {"text"}


def test_f24_equal_lines_are_counted() -> None:
    assert fold(["a", "b", "b", "b", "c"]) == ["a", "b", "b", "b", "c"]
    assert fold([*"abbbbbb"]) == ["a", "b", "b", "b", "(3 more lines like this one)"]


def test_doctor_proves_that_mlx_copies_no_pool(model: Path) -> None:
    """P9: the KV pools keep their addresses while sequences join and leave."""
    require("mlx_lm")
    done = cortexstream("doctor", "--model", str(model), "--steps", "60", "--json", backend="mlx")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    verdict = checks["the KV pools stay in place"]
    assert verdict["ok"] and verdict["detail"].startswith("4 pools over "), verdict
    assert done.returncode == 0, done.stderr


def test_doctor_sees_a_copied_pool(model: Path) -> None:
    """P9, the control: MLX copies a pool that a view refers to, and the check says so."""
    mx = require("mlx")
    require("mlx_lm")
    held = []

    def hold(core: Any) -> None:
        held.append(core.backend.pool.keys[0].arrays[0].reshape(-1))
        mx.eval(held)

    with LLM(model, backend="mlx", max_num_seqs=4) as llm:
        assert check_pools(llm, 20)["ok"]
        llm._engine.call(hold)
        verdict = check_pools(llm, 20)
        held.clear()
    assert not verdict["ok"] and verdict["detail"].startswith("1 of 4 pools"), verdict


@pytest.mark.parametrize("name", ["abacus", ""])
def test_an_unknown_backend_is_one_sentence(name: str) -> None:
    is_one_sentence(cortexstream("doctor", backend=name), 3, "backend", repr(name))


def test_warmup_tells_what_it_did(model: Path) -> None:
    """F63."""
    arguments = ["--model", str(model), "--prompt-tokens", "20", "--batch", "2"]
    done = cortexstream("warmup", *arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("load on reference") and lines[-1].startswith("in all")
    assert any("20 tokens" in line for line in lines) and any("2 rows" in line for line in lines)
    thin = script("warmup.py", *arguments, "--backend", "reference")
    assert thin.returncode == 0, thin.stderr
    assert "20 tokens" in thin.stdout and "2 rows" in thin.stdout


def test_warmup_refuses_more_rows_than_slots(model: Path) -> None:
    done = cortexstream("warmup", "--model", str(model), "--batch", "9", "--max-num-seqs", "8")
    is_one_sentence(done, 2, "batch", "9", "1 to 8")


def test_bench_host_counts_every_row(tmp_path: Path) -> None:
    """P11: the script that measures it; its times are for people."""
    record = tmp_path / "host.json"
    done = script("bench_host.py", "--rows", "2", "64", "--contexts", "32", "--steps", "5", "--json", str(record))
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    shapes = [(r["layout"], r["context_tokens"], r["rows"]) for r in found["results"]]
    assert shapes == [(layout, 32, rows) for layout in ("run", "paged") for rows in (2, 64)]
    assert all(r["median_us_per_step"] > 0 for r in found["results"])
    assert {"commit", "versions", "system", "python"} <= found.keys()


def test_bench_engine_compares_equal_tokens(model: Path, tmp_path: Path) -> None:
    """P10's trace: both sides finish all requests, with the same greedy tokens."""
    require("mlx_lm")
    record = tmp_path / "engine.json"
    small = ["--requests", "3", "--longest-prompt", "40", "--longest-output", "20", "--repetitions", "1"]
    done = script("bench_engine.py", "--model", str(model), *small, "--json", str(record))
    assert done.returncode == 0, done.stderr
    found = json.loads(record.read_text())
    assert found["agreement"] == {"requests": 3, "with_equal_tokens": 3}
    assert [run["side"] for run in found["runs"]] == ["cortexstream", "mlx-lm"]
    assert all(run["settings"]["dtype"] == found["runs"][0]["settings"]["dtype"] for run in found["runs"])
