"""``benchmarks.gpu`` on a CPU and tiny shapes: it goes on where it was, keeps to its time, survives what rivals do."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from benchmarks import kernel_cases
from benchmarks.gpu import context, correctness, measure, models, report, schedule, training
from benchmarks.gpu.pieces import pieces
from benchmarks.gpu.progress import Piece, Progress
from meft_kernels import MeftConfig
from meft_kernels.comparison.records import Record, read_all
from meft_kernels.comparison.rivals import RIVALS, Budget, Rival
from meft_kernels.comparison.rivals.lora import lora

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
CPU = torch.device("cpu")
NAME = "step-bert-base-32x512"


def _piece(*rivals: str, name: str = NAME) -> Piece:
    return next(piece for piece in pieces(rivals, tiny=True) if piece.name == name)


def _items(folder: Path, name: str = NAME) -> dict[str, dict[str, Any]]:
    return Record.read(folder / f"{name}.json").figures["items"]


def _rival(monkeypatch: pytest.MonkeyPatch, name: str, prepare: Callable[..., nn.Module], *packages: str) -> None:
    monkeypatch.setitem(RIVALS, name, Rival(name, name, prepare, packages=packages))


def _raising(error: Exception) -> Callable[..., nn.Module]:
    def prepare(model: nn.Module, budget: Budget) -> nn.Module:
        raise error

    return prepare


def test_who_fails_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _rival(monkeypatch, "raises", _raising(RuntimeError("first line\nsecond line")))
    _rival(monkeypatch, "huge", _raising(torch.OutOfMemoryError("too much")))
    piece = _piece("full", "raises", "huge", "lora")
    training.run(Progress.load(piece, tmp_path, CPU), CPU)
    found = _items(tmp_path)
    assert found["raises"] == {"reason": "RuntimeError: first line"}
    assert found["huge"] == {"reason": "does not fit (OutOfMemoryError)"}
    for name in ("meft", "lora_checkpointing", "lora", "full"):
        assert len(found[name]["seconds"]) == 2 and found[name]["over"].keys() == {"meft", "lora_checkpointing"}, name
        assert found[name]["peak_bytes"] > found[name]["kept_bytes"] > 0
    assert found["meft"]["over"]["meft"] == 1.0
    assert found["full"]["how"].startswith("blocks A-B-A")
    assert found["full"]["trainable"] > 5 * found["lora"]["trainable"]
    assert found["lora"]["how"] == "2 interleaved rounds of 1 steps"
    assert report.draw({NAME: Record.read(tmp_path / f"{NAME}.json")}, tmp_path / "a.png") == "drawn: a.png"

    # Another rival later: it is compared with references of its own process, and the others stay as they were.
    more = _piece("full", "raises", "huge", "lora", "bottleneck")
    progress = Progress.load(more, tmp_path, CPU)
    assert progress.pending() == ["bottleneck"]
    training.run(progress, CPU)
    after = _items(tmp_path)
    assert after.pop("bottleneck")["over"].keys() == {"meft", "lora_checkpointing"}
    assert after == found
    other = dataclasses.replace(piece, settings={**piece.settings, "rows": 3})
    assert Progress.load(other, tmp_path).pending() == list(piece.items)
    assert Progress.load(piece, tmp_path, again=True).pending() == list(piece.items)


def test_without_time_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(measure.UNTIL, str(time.time() - 1))
    piece = _piece("lora", "full")
    training.run(Progress.load(piece, tmp_path, CPU), CPU)
    assert not any("seconds" in found for found in _items(tmp_path).values())
    assert Progress.load(piece, tmp_path).pending() == list(piece.items)


def test_what_changes_transformers_comes_last_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _rival(monkeypatch, "foreign", lora, "json")
    _rival(monkeypatch, "other", lora, "csv")
    piece = _piece("other", "foreign", "lora")
    with pytest.raises(SystemExit) as ended:
        training.run(Progress.load(piece, tmp_path, CPU), CPU)
    assert ended.value.code == measure.START_AGAIN
    progress = Progress.load(piece, tmp_path, CPU)
    assert progress.pending() == ["foreign"]
    training.run(progress, CPU)
    for name in ("foreign", "other"):
        assert _items(tmp_path)[name]["how"].startswith("blocks A-B of")


def test_a_broken_device_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("illegal memory access")

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(measure, "synchronize", broken)
    monkeypatch.setattr(measure.os, "_exit", leave)
    progress = Progress.load(_piece(), tmp_path, CPU)
    with pytest.raises(SystemExit) as ended:
        measure.attempt(progress, "meft", CPU, lambda: broken(CPU))
    assert ended.value.code == measure.START_AGAIN
    assert _items(tmp_path) == {"meft": {"reason": "RuntimeError: illegal memory access"}}


def test_rivals_share_frozen_weights_and_nothing_else() -> None:
    base = models.build("llama-3.2-1b", CPU, torch.bfloat16, tiny=True)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    budget = Budget.of(base, MeftConfig(rank=4, adapter_dtype="model"))
    batch = models.batch_of(base, 2, 8)
    addresses = {parameter.data_ptr() for parameter in base.parameters()}
    losses = {}
    for name in ("full", "lora", "meft", "ia3"):
        runner = measure.Runner.of(RIVALS[name], base, budget, batch)
        for parameter in runner.model.parameters():
            assert parameter.requires_grad == (parameter.data_ptr() not in addresses)
            assert parameter.dtype == torch.bfloat16
        losses[name] = float(runner.step())
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.named_parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in base.parameters())
    assert max(losses.values()) - min(losses.values()) < 0.05


def test_the_longest_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = measure.Runner.bytes

    def limited(self: measure.Runner) -> dict[str, int]:
        if self.batch["input_ids"].shape[1] > 40:
            raise torch.OutOfMemoryError
        return counted(self)

    monkeypatch.setattr(measure.Runner, "bytes", limited)
    piece = _piece(name="context-llama-3.2-1b")
    context.run(Progress.load(piece, tmp_path, CPU), CPU)
    for found in _items(tmp_path, piece.name).values():
        assert (found["longest"], found["stopped"]) == (40, "48 tokens do not fit")
        assert [step["tokens"] for step in found["steps"]] == [16, 32, 40]
    piece = dataclasses.replace(piece, settings={**piece.settings, "from": 64})
    context.run(Progress.load(piece, tmp_path, CPU), CPU)
    assert _items(tmp_path, piece.name)["meft"]["reason"] == measure.DOES_NOT_FIT


FAKE = """
import json, os, pathlib, signal, sys, time
path = pathlib.Path(os.environ["MEFT_BENCHMARK_OUT"]) / (sys.argv[sys.argv.index("--worker") + 1] + ".json")
record = json.loads((path if path.exists() else pathlib.Path(sys.argv[1])).read_text())
figures = record["figures"]
for name in ("lora_checkpointing", "meft", "lora", "full"):
    if name in figures["items"]:
        continue
    figures["running"] = name
    path.write_text(json.dumps(record))
    if name == "meft":
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "full":
        time.sleep(60)
    figures["items"][name] = {"reason": "fake"}
"""


def _main(out: Path, *arguments: str) -> int:
    return schedule.main(["--device", "cpu", "--tiny", "--out", str(out), *arguments])


def test_processes_that_die_and_that_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that dies is started again and leaves out the culprit; one that hangs is stopped."""
    empty = Record.now("gpu-step", _piece().settings, {"items": {}, "running": None, "notes": {}}, CPU)
    empty.write(tmp_path / "empty.json")
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(schedule, "WORKER", (sys.executable, str(tmp_path / "fake.py"), str(tmp_path / "empty.json")))
    monkeypatch.setitem(schedule.LEAST_SECONDS, "cpu", 0.5)
    began = time.monotonic()
    assert _main(tmp_path / "out", "--minutes", "0.04", "--only", NAME, "--rivals", "lora", "full") == 0
    assert time.monotonic() - began < 15
    [record] = read_all(tmp_path / "out")
    found = record.figures["items"]
    assert found["meft"] == {"reason": "its process ended with status -11; last words: last words"}
    assert found["lora"] == {"reason": "fake"}
    assert found["full"]["reason"].startswith("its process was stopped, over its time")
    assert record.environment == empty.environment


def test_the_budget_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schedule, "WORKER", (sys.executable, "-c", "raise SystemExit('started')"))
    assert _main(tmp_path, "--minutes", "0") == 0
    printed = capsys.readouterr().out
    for piece in pieces((), tiny=True):
        assert f"not run: {piece.name}: its share of the time" in printed
    assert not read_all(tmp_path)
    # With time, a worker that dies before it measures anything is not started for ever.
    assert _main(tmp_path, "--only", NAME) == 0
    assert "before anything was measured: the process ended with status 1: started" in capsys.readouterr().out


def test_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The real worker, once; then there is nothing left to start."""
    command = ("--only", NAME, "--rivals", "lora_offload")
    assert _main(tmp_path, *command) == 0
    [record] = read_all(tmp_path)
    assert record.command == f"python -m benchmarks.gpu --only {NAME} --device cpu --tiny --rivals lora_offload"
    assert len(record.figures["items"]["meft"]["seconds"]) == 2
    assert record.figures["items"]["lora_offload"] == {"reason": "it runs on CUDA alone"}
    assert "it runs on CUDA alone" in capfd.readouterr().out
    monkeypatch.setattr(schedule, "WORKER", ("no such program",))
    assert _main(tmp_path, *command) == 0
    assert f"{NAME}: there already" in capfd.readouterr().out


def test_correctness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    items = ("op couple", "op adapter_couple", "llama-3.2-1b bfloat16 meft3", "llama-3.2-1b float16 meft2")
    piece = dataclasses.replace(_piece(name="correctness"), items=items)
    monkeypatch.setattr(kernel_cases, "mismatch", lambda case, device: "off" if case.op == "adapter_couple" else None)
    correctness.run(Progress.load(piece, tmp_path, CPU), CPU)
    found = _items(tmp_path, "correctness")
    assert [name for name, outcome in found.items() if not outcome["ok"]] == ["op adapter_couple"]
    assert found[items[3]]["gradient_error"] < found[items[3]]["gradient_bound"] < 0.02
    assert report.summarise(tmp_path, [piece], {}) == 1
    assert "no figure above can be trusted: correctness: op adapter_couple" in capsys.readouterr().out


def test_cuda_is_asked_for_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = iter([100, 130])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 175)
    with measure.CudaMeter(torch.device("cuda")) as meter:
        assert (meter.live_bytes, meter.peak_bytes) == (30, 75)


def test_says_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        schedule.main(["--only", "nothing"])
    assert "the pieces are correctness, kernels, step-bert-base-32x512" in capsys.readouterr().err
    answers = iter([(1, "", "Traceback\nno driver\n"), (0, "NVIDIA H100 80GB HBM3\n", "")])

    def answer(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, *next(answers))

    monkeypatch.setattr(schedule.subprocess, "run", answer)
    assert schedule.main(["--out", str(tmp_path), "--minutes", "0"]) == 2
    printed = capsys.readouterr().out
    assert printed.startswith("no driver\n") and "no CUDA device" in printed
    assert schedule.main(["--out", str(tmp_path), "--minutes", "0"]) == 0
    assert f"results in {tmp_path.name}/nvidia-h100-80gb-hbm3" in capsys.readouterr().out


def test_configs_are_the_models_that_they_are_named_after() -> None:
    expected = {
        "bert-base": 109_483_778, "roberta-large": 355_361_794, "opt-1.3b": 1_315_758_080,
        "llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248,
    }  # fmt: skip
    for name, count in expected.items():
        model = models.build(name, torch.device("meta"), torch.bfloat16, tiny=False)
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        assert json.loads(json.dumps(model.config.to_dict()))["dtype"] == "bfloat16"
