"""`scripts/gpu_check.py` runs all of its parts without a GPU, tiny, and then claims to have measured nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command_line import environment
from tests.conftest import require
from tests.repo.tree import ROOT

COUNTED = {  # units of figures that are counted or judged, not timed: a run on a CPU may state them
    "of the norm", "runs", "MB", "kB", "GB", "tokens", "tokens compared", "lengths",
}  # fmt: skip


@pytest.fixture(scope="module")
def needed() -> None:
    for name in ("torch", "triton", "transformers"):
        require(name)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def gpu_check(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/gpu_check.py", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=400,
        check=False, env=environment() | (env or {}),
    )  # fmt: skip


@pytest.mark.timeout(500)
def test_f58_every_part_runs_on_a_cpu_and_measures_nothing(needed: None, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    done = gpu_check("--smoke", "--json", str(file), "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    assert {"date", "device", "versions", "system", "python"} <= found.keys() and found["smoke"]
    assert found["commit"] == "abc" and found["command"][1:] == ["--smoke", "--json", str(file), "--commit", "abc"]
    parts = found["parts"]
    assert sorted({part["part"] for part in parts.values()}) == list("abcde") and len(parts) == 12
    for part in parts.values():
        assert part["ended"] == "finished" and part["rows"]
        for row in part["rows"]:
            assert row["ok"] is not False and "why" not in row, row
            for figure in row["figures"].values():
                assert figure["unit"]
                if figure["value"] is None:
                    assert "no GPU" in figure["note"]
                else:
                    assert figure["unit"] in COUNTED or figure["unit"].startswith("of "), (row, figure)
    assert {goal["verdict"] for goal in found["goals"]} == {"not measured"}
    checks = {name: sum(row["ok"] is True for row in part["rows"]) for name, part in parts.items()}
    assert checks["writes"] >= 10 and checks["products"] == 3 and checks["decode"] == checks["prefill"] == 4
    assert checks["tokens"] == 3 and checks["steps"] == 13
    assert "met" not in done.stdout.split("goals")[1]


def test_without_a_gpu_it_says_so(needed: None) -> None:
    done = gpu_check(env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "--smoke" in done.stderr


def test_without_torch_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    done = gpu_check("--smoke", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "torch" in done.stderr


def test_an_unknown_part_is_refused() -> None:
    done = gpu_check("--only", "a,f")
    assert done.returncode == 2 and "'f' is no part; choose from a,b,c,d,e" in done.stderr


def test_a_part_that_crashes_or_hangs_leaves_what_it_found(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = import_module("gpu_check")
    (tmp_path / "some_part.py").write_text(
        "import os, time\n"
        "from gpu_check_record import Figure\n"
        "def crash(report, smoke):\n    report.add('x', 'first', n=Figure(1.0, 'of 1'))\n    os.abort()\n"
        "def hang(report, smoke):\n    report.add('x', 'first', n=Figure(1.0, 'of 1'))\n    time.sleep(600)\n"
    )
    (tmp_path / "run.py").write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT / 'scripts')!r}, {str(tmp_path)!r}]\nimport gpu_check\n"
        "gpu_check.STAGES.update({name: gpu_check.Stage('a', 'some_part', name, 9, 0) for name in ('crash', 'hang')})\n"
        "sys.exit(gpu_check.main())\n"
    )
    stages = {name: check.Stage("a", "some_part", name, 5.0, 0) for name in ("crash", "hang")}
    monkeypatch.setattr(check, "STAGES", stages)
    monkeypatch.setattr(check, "__file__", str(tmp_path / "run.py"))
    parts = check.run_all(["crash", "hang"], False)
    assert [row["name"] for part in parts.values() for row in part["rows"]] == ["first", "first"]
    assert "-6" in parts["crash"]["ended"] and parts["hang"]["ended"] == "stopped after 5 s"
    assert not import_module("gpu_check_goals").sound(parts)


def parts_with(**figures: float) -> dict[str, Any]:
    """A run that measured the decode steps of these names, as times their floor."""
    rows = [
        {"group": "step", "name": name, "ok": None, "figures": {"above": {"value": value, "unit": "x the floor"}}}
        for name, value in figures.items()
    ]
    return {"model bf16": {"part": "d", "ended": "stopped after 90 s", "rows": rows}}


def test_goals_are_met_missed_or_not_measured(scripts: None) -> None:
    goals = import_module("gpu_check_goals")
    found = {goal.name: goal for goal in goals.goals(parts_with(**{"bf16, batch 1": 1.2, "bf16, batch 16": 1.3}))}
    verdicts = {name.split(": ")[0][-14:]: goal.verdict() for name, goal in found.items() if "decode step" in name}
    assert verdicts == {
        " bf16, batch 1": "met", "bf16, batch 16": "missed", "4-bit, batch 1": "not measured",
        "-bit, batch 16": "not measured",
    }  # fmt: skip
    late = next(goal for goal in found.values() if "4-bit, batch 1:" in goal.name)
    assert "stopped after 90 s" in late.found.note


def test_f49_decode_attention_is_judged_by_the_bytes_it_must_move(scripts: None, needed: None) -> None:
    """67 MB of keys and values take 15.6 us at 4.3 TB/s: a time below that is a share above 100 %, and no claim."""
    speed, timing = import_module("gpu_check_speed"), import_module("gpu_check_timing")
    shape = speed.SHAPES[0]
    assert shape.named() == import_module("gpu_check_goals").REFERENCE and shape.kv_bytes() == 67_108_864
    assert [s.kv_bytes() for s in speed.SHAPES[1:5]] == [33_554_432, 35_651_584, 16_777_216, 8_388_608]
    Figure = import_module("gpu_check_record").Figure
    read = Figure(4.3, "TB/s")
    found = timing.against(shape.kv_bytes(), Figure(15.607, "us"), read)
    assert found["bytes"].value == pytest.approx(67.108864) and found["rate"].value == pytest.approx(4.3, rel=1e-3)
    assert found["share"].value == pytest.approx(100.0, rel=1e-3)
    assert timing.against(shape.kv_bytes(), Figure(9.0, "us"), read)["share"].value > 150.0
    assert timing.against(shape.kv_bytes(), Figure(None, "us", "no GPU"), read)["share"].value is None


def test_a_wrong_kernel_is_noticed(scripts: None, needed: None, tmp_path: Path) -> None:
    """Numbers that are off, bits that change, bits that another way does not have."""
    torch: Any = require("torch")
    case, record = import_module("gpu_check_case"), import_module("gpu_check_record")
    report = record.Report(tmp_path / "rows.json", True)
    one, draws = torch.ones(2, 3), iter(range(100))
    wanted = one.double().numpy()
    judge = lambda found: case.relative(found[0], wanted)  # noqa: E731
    other = lambda: iter([("alone", [one + 1], [one])])  # noqa: E731
    for made in (
        case.Case("right", torch.float32, lambda: [one], judge),
        case.Case("off", torch.float32, lambda: [one * torch.tensor([[1.0], [1.001]])], judge),
        case.Case("NaN", torch.float32, lambda: [one * float("nan")], judge),
        case.Case("changing", torch.float32, lambda: [one, torch.tensor([next(draws)])], judge),
        case.Case("another way", torch.float32, lambda: [one], judge, other),
    ):
        case.check(report, made, 3)
    assert [row["ok"] for row in report.rows] == [True, False, False, False, False]
    assert "2 of 2 repeats" in report.rows[3]["why"] and "alone" in report.rows[4]["why"]


def test_f47_steps_are_submitted_while_waiting_is_an_error(
    scripts: None, needed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mode is torch's, noted here in place of a GPU: an error within `submit`, and not after it."""
    from cortexstream.backend import BackendOptions
    from cortexstream.backends.null import create
    from cortexstream.plan import SampleSpec

    torch: Any = require("torch")
    drive, modes = import_module("gpu_check_drive"), ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    backend: Any = create(BackendOptions(None, max_num_seqs=2, block_tokens=16, extra={"vocab_size": 384}))
    backend.allocate_kv(4)
    submit, seen = backend.submit, []

    def watched(plan: Any) -> Any:
        seen.append(modes[-1])
        return submit(plan)

    monkeypatch.setattr(backend, "submit", watched)
    driven = drive.Drive(backend, [SampleSpec()] * 2, 32)
    driven.prefill(drive.random_prompts(2, 5, 384), 64)
    driven.decode(driven.rows, 3, drive.forbid_waiting)
    assert seen == ["default"] + ["error"] * 3 and modes == ["default", *["error", "default"] * 3]
    with pytest.raises(RuntimeError), drive.forbid_waiting():
        raise RuntimeError
    assert modes[-2:] == ["error", "default"]


def faulty(folder: Path, change: Callable[[Any], Any]) -> Any:
    """The CUDA backend on a CPU; `change` is done to what it collects."""
    from cortexstream.backend import BackendOptions
    from cortexstream.backends.cuda import create

    backend: Any = create(BackendOptions(str(folder), "float32", max_num_seqs=4, extra={"device": "cpu"}))
    backend.allocate_kv(4 * 2048 // backend.info.block_tokens)
    collect = backend.collect
    backend.collect = lambda ticket: change(collect(ticket))
    return backend


def test_p11_steps_are_judged_by_what_their_draws_tell(
    scripts: None, needed: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Masks, metadata, scores and draws behind guesses: a backend that leaves one of them out is wrong in those kinds,
    and in no other."""
    steps, record = import_module("gpu_check_steps"), import_module("gpu_check_record")
    folder = import_module("gpu_check_folders").write_small(tmp_path / "llama", "llama", True)

    def wrong(change: Callable[[Any], Any]) -> list[str]:
        report = record.Report(tmp_path / "rows.json", True)
        steps.waits(report, "CPU", faulty(folder, change), True)
        assert len(report.rows) == 7
        return [row["name"].removeprefix("CPU: no wait, ") for row in report.rows if not row["ok"]]

    def each(**changed: Any) -> Callable[[Any], Any]:
        return lambda found: found._replace(rows=tuple(row._replace(**changed) for row in found.rows))

    mask, told = "seeded, mask, top logprobs", "seeded, penalties, metadata, processed logprobs"
    monkeypatch.setattr(steps, "KINDS", {kind: steps.KINDS[kind] for kind in ("greedy", mask, told)})
    masked = [mask, f"{mask}, guesses"]
    assert wrong(each(token=5, metadata=None)) == [*masked, told, f"{told}, guesses"]
    assert wrong(lambda found: found._replace(rows=found.rows[:4], scores=())) == [
        "scored prompts", "greedy, guesses", f"{mask}, guesses", f"{told}, guesses",
    ]  # fmt: skip
    asked = steps.Asked.__call__
    monkeypatch.setattr(steps.Asked, "__call__", lambda self: (asked(self), asked(self))[0])
    assert wrong(lambda found: found) == masked


def test_p13_answers_are_judged_by_tokens_and_numbers(scripts: None, needed: None, tmp_path: Path) -> None:
    tokens, record = import_module("gpu_check_tokens"), import_module("gpu_check_record")
    report = record.Report(tmp_path / "rows.json", True)
    wanted = [tokens.Answer((1, 2), (-0.5, -1.0)), tokens.Answer((3,), ())]
    for numbers, last in (((-0.5, -1.001), 3), ((-0.5, -1.02), 3), ((-0.5, float("nan")), 3), ((-0.5, -1.0), 4)):
        tokens.compare(report, "x", [tokens.Answer((1, 2), numbers), tokens.Answer((last,), ())], wanted)
    assert [row["ok"] for row in report.rows] == [True, False, False, False]
    assert "0.02 nats off" in report.rows[1]["why"]
    assert report.rows[3]["why"] == "prompt 1 differs from token 0 on: 4, not 3"
    assert report.rows[3]["figures"]["furthest"]["value"] is None


def test_p1_the_floor_of_a_step_has_weights_and_keys_and_values(scripts: None, needed: None, tmp_path: Path) -> None:
    """Of the tiny shape in float32, by hand: 2 layers of 1 key head of 32 numbers, read at each position."""
    torch: Any = require("torch")
    model, folders = import_module("gpu_check_model"), import_module("gpu_check_folders")
    report = import_module("gpu_check_record").Report(tmp_path / "rows.json", True)
    sizes, shape = model.Sizes(True), folders.large_shape(True)
    folder = folders.write_config(tmp_path, shape, sizes.dtype)
    with folders.random_weights(shape, sizes.dtype, torch.device("cpu")):
        backend = model.create(model.backend_options(folder, sizes))
    model.steps(report, model.PLAIN, backend, True)
    backend.close()
    found = {row["name"]: row["figures"] for row in report.rows if row["group"] == "step"}
    layer = 64 * (2 + 1 + 1) * 32 + 2 * 32 * 64 + 3 * 64 * 64  # q, k, v; o; gate, up, down
    weights = 4 * (2 * layer + 320 * 64)
    for batch in (1, 2):
        figures = found[f"bf16, batch {batch}"]
        keys_and_values = batch * figures["context"]["value"] * 2 * 2 * 32 * 4
        assert figures["bytes"]["value"] == pytest.approx((weights + keys_and_values) / 1e9, rel=1e-6)


@pytest.mark.parametrize("mebibytes", [1, 8, 50, 67, 1000])
def test_f49_buffers_are_rotated_past_the_l2(
    scripts: None, needed: None, monkeypatch: pytest.MonkeyPatch, mebibytes: int
) -> None:
    """On a GPU with an L2 of 50 MiB: eight times as much between two uses of a buffer, of which there are 2 to 64."""
    torch: Any = require("torch")
    properties = type("Properties", (), {"L2_cache_size": 50 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    timing = import_module("gpu_check_timing")
    sets = timing.Clock(False).sets(mebibytes << 20)
    assert 2 <= sets <= 64 and (sets == 64 or sets * mebibytes >= 8 * 50)
    assert sets == 2 or (sets - 1) * mebibytes < 8 * 50
    assert timing.Clock(True).sets(1) == 1
