"""`scripts/bench_kv.py` runs and writes what it promises; its times are for people."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cortexstream.models import tiny_folder
from cortexstream.plan import Move, StepPlan, SwapDrop
from tests.cli.command_line import EMBEDDED, environment
from tests.conftest import require
from tests.repo.tree import ROOT

HEADS, DIM = 2, 4
TOKEN_BYTES = 2 * HEADS * DIM * 4  # K and V in float32


def bench(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the script; `path` comes first on Python's path."""
    env = environment()
    if path is not None:
        env["PYTHONPATH"] = f"{path}:{env['PYTHONPATH']}"
    return subprocess.run(
        [sys.executable, "scripts/bench_kv.py", "--quick", *arguments], capture_output=True, text=True, cwd=ROOT,
        timeout=240, check=False, env=env,
    )  # fmt: skip


def record_of(folder: Path, *arguments: str, path: Path | None = None) -> tuple[dict[str, Any], str]:
    """What a run that must go well wrote, and printed."""
    file = folder / "kv.json"
    done = bench(*arguments, "--json", str(file), path=path)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    assert {"commit", "versions", "system", "python", "date", "device", "load_average", "method"} <= found.keys()
    return found, done.stdout


@pytest.fixture
def without_mlx(tmp_path: Path) -> Path:
    """A folder for Python's path that makes every import of mlx fail as if it were not installed."""
    folder = tmp_path / "without"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['mlx'] = None\n")
    return folder


def test_f14_every_size_is_timed_alike(tmp_path: Path) -> None:
    found, shown = record_of(tmp_path, "--only", "alloc")
    rows = found["alloc"]
    kinds = [("allocator", "first_fit"), ("allocator", "buddy"), ("arena", "run"), ("arena", "paged")]
    assert [(r["level"], r["policy"], r["num_blocks"]) for r in rows] == [(*k, n) for k in kinds for n in (1000, 4000)]
    for row in rows:
        parts = {"allocate", "free"} if row["level"] == "allocator" else {"admit", "publish", "grow", "release"}
        assert row["median_us"].keys() == row["mean_us"].keys() == parts
        assert row["cycle_us"] == pytest.approx(sum(row["median_us"].values())) and min(row["median_us"].values()) > 0
        assert row["cut_short"] == (row["operations_done"] < row["repeats"] * row["operations"]) and "warm" in row
        first = next(r for r in rows if (r["level"], r["policy"]) == (row["level"], row["policy"]))
        assert row["growth"] == pytest.approx(row["cycle_us"] / first["cycle_us"])
    assert "the aim is below 3" in shown


def test_p8_placements_share_one_trace(tmp_path: Path) -> None:
    found, _ = record_of(tmp_path, "--only", "fit")
    rows = {(r["layout"], r["policy"]): r for r in found["fit"]}
    layouts = ("run, reserved", "run, no compaction", "run", "paged")
    assert list(rows) == [(layout, policy) for layout in layouts for policy in ("first_fit", "buddy")]
    assert all(0 < r["live_share"] <= 1 and r["running"] > 1 and r["finished"] for r in rows.values())
    for policy in ("first_fit", "buddy"):
        reserved, holes, run, paged = (rows[layout, policy] for layout in layouts)
        assert reserved["preemptions"] == 0, "nothing grows"
        assert holes["compactions"] == 0 and holes["stalled_steps"] > 0
        assert run["compactions"] > 0 and run["stalled_steps"] == 0
        assert paged["moved_tokens"] == 0
        assert reserved["running"] < run["running"] <= paged["running"] and holes["running"] < run["running"]


def test_p10_both_sides_copy_and_all_draw_the_same_tokens(tmp_path: Path) -> None:
    require("mlx_lm")
    if not EMBEDDED:
        pytest.skip(f"the embedded model is missing: {tiny_folder()}")
    found, shown = record_of(tmp_path, "--only", "copies,prefix")
    table = found["copies"]
    assert table["with_equal_tokens"] == table["trace"]["requests"] == 4
    ours, theirs = table["sides"]["cortexstream"], table["sides"]["mlx-lm"]
    assert 0 <= ours["bytes"] == ours["live_bytes"] and 0 < theirs["live_bytes"] < theirs["bytes"]
    assert all(sum(side["parts"].values()) == side["bytes"] for side in (ours, theirs))
    assert {"join", "leave"} <= theirs["parts"].keys() and not table["settings"]["prefix_caching"]
    assert table["ratio"] == pytest.approx(ours["bytes"] / theirs["bytes"])
    assert found["skipped"] == {} and "the aim is 5%" in shown
    on_mlx = [row for row in found["prefix"] if row["backend"] == "mlx"]
    assert [row["reuse"] for row in on_mlx] == [False, True] and all(row["equal_outputs"] for row in on_mlx)


def test_p10_copies_of_mlx_lm_are_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    mx = require("mlx")
    require("mlx_lm")
    from mlx_lm.models.cache import BatchKVCache, KVCache

    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    copies = import_module("bench_kv_copies")

    def tokens(rows: int, count: int) -> Any:
        return mx.zeros((rows, HEADS, count, DIM))

    plain = {
        name: BatchKVCache.__dict__[name] for name in ("update_and_fetch", "extend", "filter", "finalize", "merge")
    }
    counter = copies.CopyCounter()
    with copies.counting(counter):
        two, one, long, short = BatchKVCache([0, 0]), BatchKVCache([0]), KVCache(), KVCache()
        two.update_and_fetch(tokens(2, 3), tokens(2, 3))
        one.update_and_fetch(tokens(1, 5), tokens(1, 5))
        long.update_and_fetch(tokens(1, 7), tokens(1, 7))
        two.finalize()
        assert counter.copied()["bytes"] == 0, "new tokens are no copies, and without padding nothing is rolled"
        two.extend(one)  # rows of 3, 3 and 5 tokens, in arrays of 256
        two.filter([0, 2])
        two.update_and_fetch(tokens(2, 252), tokens(2, 252))  # 5 + 252 do not fit 256
        two.prepare(right_padding=[0, 4])
        two.finalize()
        two.trim(2)
        KVCache.merge([short, short])  # of empty ones: nothing to copy
        short.update_and_fetch(tokens(1, 2), tokens(1, 2))
        KVCache.merge([long, short])
    found = counter.copied()
    whole = {"join": 3 * 256, "leave": 2 * 256, "grow": 2 * 5, "roll": 2 * (5 + 256), "merge": 2 * 7}
    live = {"join": 3 + 3 + 5, "leave": 3 + 5, "grow": 3 + 5, "roll": (3 + 252) + (5 + 252 - 4), "merge": 7 + 2}
    assert found["parts"] == {name: count * TOKEN_BYTES for name, count in whole.items()}
    assert found["live_parts"] == {name: count * TOKEN_BYTES for name, count in live.items()}
    assert found["bytes"] == sum(found["parts"].values()) and found["live_bytes"] == sum(found["live_parts"].values())
    assert {name: BatchKVCache.__dict__[name] for name in plain} == plain, "nothing stays wrapped"


def test_p10_moves_are_counted_by_what_they_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    watched = import_module("bench_kv_copies").Watched(import_module("bench_host").InstantBackend("run", 2048))
    moves = (Move(4, 2, 4, 3, 32), Move(4, 3, 9, 4, 48), Move(9, 4, 7, 4, 50), Move(7, 4, 0, 4, 3), SwapDrop(1))
    assert watched.collect(watched.submit(StepPlan(1, (), moves))).step == 1
    assert watched.tokens == {"grown in place": 32, "relocated": 48, "slid": 53}


def test_f83_reuse_computes_less_and_answers_the_same(tmp_path: Path, without_mlx: Path) -> None:
    if not EMBEDDED:
        pytest.skip(f"the embedded model is missing: {tiny_folder()}")
    found, shown = record_of(tmp_path, "--only", "prefix", path=without_mlx)
    rows = found["prefix"]
    assert [(r["backend"], r["layout"], r["reuse"]) for r in rows] == [
        ("reference", layout, reuse) for layout in ("run", "paged") for reuse in (False, True)
    ]
    for off, on in zip(rows[::2], rows[1::2], strict=True):
        assert off["prompt_tokens_reused"] == 0 < on["prompt_tokens_reused"]
        assert on["prompt_tokens_computed"] + on["prompt_tokens_reused"] == off["prompt_tokens_computed"]
        assert off["answers"] == on["answers"] == 4, "two users, two turns"
        assert off["equal_outputs"] and on["equal_outputs"] and off["output_tokens"] == on["output_tokens"] > 0
        assert all(row[name] > 0 for row in (off, on) for name in ("first_token_s", "later_first_token_s", "total_s"))
    assert list(found["skipped"]) == ["prefix on mlx"] and "left out: prefix on mlx: " in shown


def test_different_tokens_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    agrees = import_module("bench_kv").agrees
    assert agrees("copies", {"with_equal_tokens": 4, "trace": {"requests": 4}})
    assert not agrees("copies", {"with_equal_tokens": 3, "trace": {"requests": 4}})
    assert agrees("prefix", [{"equal_outputs": True}] * 2) and agrees("fit", [{"running": 1.0}])
    assert not agrees("prefix", [{"equal_outputs": True}, {"equal_outputs": False}])


def test_tables_without_mlx_still_run(tmp_path: Path, without_mlx: Path) -> None:
    found, shown = record_of(tmp_path, "--only", "fit,copies", path=without_mlx)
    assert "fit" in found and "copies" not in found
    assert "pip install" in found["skipped"]["copies"] and "left out: copies: " in shown


def test_the_table_that_needs_mlx_says_so(without_mlx: Path) -> None:
    done = bench("--only", "copies", path=without_mlx)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "pip install" in done.stderr


def test_an_unknown_table_is_refused() -> None:
    done = bench("--only", "alloc,speed")
    assert done.returncode == 2 and "'speed' is no table; choose from alloc,copies,prefix,fit" in done.stderr
