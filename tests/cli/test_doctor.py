"""`cortexstream doctor` and `warmup`, and the scripts beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from cortexstream import LLM
from cortexstream.cli.doctor import check_pools
from cortexstream.models import tiny_folder
from tests.cli.command_line import EMBEDDED, cortexstream, environment, is_one_sentence
from tests.conftest import require
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
        held.append(core.backend.pool.keys[0].reshape(-1))
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
