"""``meft-kernels train`` on tiny models: runs, their figures, going on after signals and kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import meft_kernels
from meft_kernels.programs.cli import app
from meft_kernels.programs.training.interruption import SaveAndStop
from meft_kernels.programs.training.progress import WriteHistory

from .training_files import WORDS, save_models, write_rows

for package in ("accelerate", "datasets", "yaml"):
    pytest.importorskip(package)

TASKS = ("classification", "causal-lm")
AUTO_CLASSES = {"classification": "AutoMeftModelForSequenceClassification", "causal-lm": "AutoMeftModelForCausalLM"}
SMALL = ["--batch-size", "4", "--max-length", "12", "--held-out", "8", "--rank", "4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``bert`` and ``llama`` with tiny models, and rows for each task."""
    folder = tmp_path_factory.mktemp("train")
    save_models(folder)
    lines = [
        {"text": " ".join(WORDS[(row + k) % 9] for k in range(2 + row % 7)), "label": row % 2} for row in range(63)
    ]
    write_rows(
        folder / "labelled.jsonl", [{**line, "text": f"{line['text']} w{row}"} for row, line in enumerate(lines)]
    )
    pairs = [{"prompt": f"{line['text']} w{row}", "completion": WORDS[row % 5]} for row, line in enumerate(lines)]
    write_rows(folder / "pairs.jsonl", pairs)
    (folder / "often.yaml").write_text("training: {save_steps: 2, save_total_limit: 20}\n")
    return folder


def options(home: Path, task: str) -> list[str]:
    names = {"classification": ("bert", "labelled.jsonl"), "causal-lm": ("llama", "pairs.jsonl")}[task]
    return ["--model", str(home / names[0]), "--data", str(home / names[1]), *SMALL]


def run(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def history(out: Path) -> list[dict[str, float]]:
    """What was logged, without what differs between two runs alike: times, and counts of one process."""
    volatile = ("runtime", "per_second", "preparation_time", "meft_checked_passes", "train_loss", "total_flos")
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in entry.items() if not any(word in k for word in volatile)} for entry in entries]
    return [entry for entry in kept if "loss" in entry or "eval_loss" in entry]


@pytest.fixture(scope="module")
def whole(home: Path) -> dict[str, Path]:
    """A run of each task that nothing interrupts: 2 epochs of 14 steps."""
    made = {}
    for task in TASKS:
        made[task] = home / f"whole-{task}"
        said = run(*options(home, task), "--config", home / "often.yaml", "--out", made[task])
        assert f"use it: meft_kernels.{AUTO_CLASSES[task]}.from_pretrained(" in said
    return made


def assert_same(out: Path, whole: Path) -> None:
    assert history(out) == history(whole)
    ours, expected = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (out, whole))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())
    assert json.loads((out / "metrics.json").read_text()) == json.loads((whole / "metrics.json").read_text())


@pytest.mark.parametrize("task", TASKS)
def test_a_run_leaves_what_it_says(task: str, home: Path, whole: dict[str, Path]) -> None:
    out = whole[task]
    steps = [entry["step"] for entry in history(out) if "loss" in entry]
    assert steps == list(range(1, 29))
    assert len({entry["loss"] for entry in history(out) if "loss" in entry}) > 20
    assert [entry["step"] for entry in history(out) if "eval_loss" in entry] == [14, 28]
    figures = json.loads((out / "metrics.json").read_text())
    assert figures["steps"] == 28
    assert ("eval_accuracy" in figures) == (task == "classification")
    assert ("eval_perplexity" in figures) == (task == "causal-lm")
    rerun = home / f"again-{task}"
    run("--config", out / "settings.yaml", "--out", rerun)  # the file says all that there is to say
    assert_same(rerun, out)
    assert (rerun / "settings.yaml").read_text() == (out / "settings.yaml").read_text()


def test_the_accuracy_is_that_of_the_saved_adapter(home: Path, whole: dict[str, Path]) -> None:
    from meft_kernels.programs.training.data import load_rows
    from meft_kernels.programs.training.settings import DataSettings

    base = AutoModelForSequenceClassification.from_pretrained(home / "bert", num_labels=2, ignore_mismatched_sizes=True)
    model = meft_kernels.load_adapter(base, whole["classification"] / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(whole["classification"] / "adapter")
    rows = load_rows(DataSettings(source=str(home / "labelled.jsonl"), held_out=8), None)
    right = 0
    for text, label in rows.held_out:
        with torch.no_grad():
            logits = model(**tokenizer(text, truncation=True, max_length=12, return_tensors="pt")).logits
        right += int(logits.argmax(-1).item() == label)
    figures = json.loads((whole["classification"] / "metrics.json").read_text())
    assert figures["eval_accuracy"] == right / 8


def test_the_loss_is_the_mean_of_the_completions_tokens(home: Path, whole: dict[str, Path]) -> None:
    from meft_kernels.programs.training.data import load_rows
    from meft_kernels.programs.training.settings import DataSettings

    model = AutoModelForCausalLM.from_pretrained(home / "llama")
    model = meft_kernels.load_adapter(model, whole["causal-lm"] / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "llama")
    rows = load_rows(DataSettings(source=str(home / "pairs.jsonl"), held_out=8), None)
    total, tokens = 0.0, 0
    for prompt, completion in rows.held_out:
        before = tokenizer(prompt).input_ids
        ids = (before + tokenizer(completion).input_ids + [tokenizer.eos_token_id])[:12]
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(len(before), len(ids)):
            total -= scores[position - 1, ids[position]].item()
            tokens += 1
    figures = json.loads((whole["causal-lm"] / "metrics.json").read_text())
    # Sums of some ten float32 numbers, in batches here and one by one there.
    assert figures["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert figures["eval_perplexity"] == pytest.approx(2.718281828459045 ** (total / tokens), rel=1e-4)


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int, when: Callable[[str, Any], bool]) -> None:
    """This process gets a signal at the end of a log (``"log"``), or in the middle of an evaluation (``"predict"``)."""
    logged = WriteHistory.on_log

    def on_log(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        logged(self, args, state, control, **rest)
        if when("log", state):
            os.kill(os.getpid(), number)

    def on_prediction_step(self: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if when("predict", state):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(WriteHistory, "on_log", on_log)
    monkeypatch.setattr(WriteHistory, "on_prediction_step", on_prediction_step)


@pytest.mark.parametrize(
    ("task", "number", "event", "step", "stops_at"),
    [
        ("classification", signal.SIGINT, "log", 4, 5),  # noticed at the end of the next step
        ("causal-lm", signal.SIGTERM, "log", 18, 19),
        ("classification", signal.SIGINT, "log", 13, 14),  # the last step of an epoch: evaluated, then saved
        ("causal-lm", signal.SIGINT, "predict", 14, 14),
        ("classification", signal.SIGTERM, "log", 27, 28),  # all steps done
    ],
)
def test_signals_save_and_the_run_goes_on_exactly(
    task: str,
    number: int,
    event: str,
    step: int,
    stops_at: int,
    home: Path,
    whole: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs behind it with none
    with monkeypatch.context() as patched:
        kill_at(patched, number, lambda what, state: (what, state.global_step) == (event, step))
        said = run(*options(home, task), "--config", home / "often.yaml", "--out", out, code=130)
    assert f"stopped at step {stops_at}, checkpoint saved. Go on: meft-kernels train --resume --out {out}" in said
    assert (out / f"checkpoint-{stops_at}").is_dir()
    assert not (out / "adapter").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    said = run("--resume", "--out", out)
    assert f"going on from checkpoint-{stops_at}" in said
    assert_same(out, whole[task])


@pytest.mark.parametrize(
    ("task", "at"), [("classification", 2), ("classification", 20), ("causal-lm", 14), ("causal-lm", 18)]
)
def test_any_checkpoint_leads_to_the_same_end(
    task: str, at: int, home: Path, whole: dict[str, Path], tmp_path: Path
) -> None:
    """As if killed after it; the next one was half written. Epochs end with steps 14 and 28."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("settings.yaml", "run.json", "log.jsonl", f"checkpoint-{at}"):
        source = whole[task] / name
        shutil.copytree(source, out / name) if source.is_dir() else shutil.copy(source, out / name)
    half = out / f"checkpoint-{at + 2}"
    shutil.copytree(whole[task] / half.name, half)
    (half / "trainer_state.json").unlink()
    said = run("--resume", "--out", out)
    assert f"checkpoint-{at + 2} is not whole (it has no trainer_state.json): skipped" in said
    assert f"going on from checkpoint-{at}" in said
    assert_same(out, whole[task])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("trainer_state.json", cut, "trainer_state.json is damaged"),
        ("optimizer.pt", cut, "optimizer.pt is damaged"),
        ("rng_state.pth", Path.unlink, "rng_state.pth is missing"),
        ("scheduler.pt", cut, "scheduler.pt is damaged"),
        ("model.safetensors", Path.unlink, "model.safetensors is missing"),
        ("adapter_model.safetensors", cut, "adapter_model.safetensors is damaged"),
        ("adapter_config.json", Path.unlink, "has no adapter_config.json"),
    ],
)
def test_half_written_checkpoints_are_known(
    name: str, spoil: Callable[[Path], None], reason: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    from meft_kernels.programs.training.checkpoints import what_is_missing
    from meft_kernels.programs.training.methods import Meft

    copy = tmp_path / "checkpoint-14"
    shutil.copytree(whole["causal-lm"] / "checkpoint-14", copy)
    assert what_is_missing(copy, Meft.checkpoint_files) is None
    spoil(copy / name)
    assert reason in str(what_is_missing(copy, Meft.checkpoint_files))


def test_a_used_folder_is_refused(home: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole["classification"], out)
    given = [*options(home, "classification"), "--steps", 2, "--out", out]
    before = sorted(path.name for path in out.rglob("*"))
    said = run(*given, code=2)
    assert "holds an earlier run" in said and "--resume" in said and "--overwrite" in said
    assert "give one of them" in run(*given, "--resume", "--overwrite", code=2)
    assert "no setting 'tset'" in run(
        *given, "--overwrite", "--config", write_rows(tmp_path / "s.yaml", [{"tset": 1}]), code=2
    )
    assert sorted(path.name for path in out.rglob("*")) == before
    run(*given, "--overwrite")
    assert json.loads((out / "metrics.json").read_text())["steps"] == 2
    assert not (out / "checkpoint-28").exists()
    (tmp_path / "file").write_text("")
    assert "is a file" in run(*options(home, "classification"), "--out", tmp_path / "file", code=2)


def test_only_the_same_run_goes_on(home: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole["classification"], out)
    shutil.rmtree(out / "checkpoint-28")
    (out / "adapter" / "adapter_model.safetensors").unlink()
    said = run("--resume", "--out", out, "--lr", "0.5", "--rank", "8", "--seed", "0", code=2)
    assert "training.learning_rate: 0.001 -> 0.5" in said and "meft.rank: 4 -> 8" in said and "seed" not in said
    assert "model:" in run("--resume", "--out", out, "--model", home / "llama", code=2)
    harmless = tmp_path / "harmless.yaml"
    harmless.write_text("training: {save_steps: 50, per_device_eval_batch_size: 3}\nmeft: {engine: autograd}\n")
    other = tmp_path / "other.jsonl"
    rows = (home / "labelled.jsonl").read_text().splitlines()
    other.write_text("\n".join(rows[1:]) + "\n")
    moved = (out / "settings.yaml").read_text()
    (out / "settings.yaml").write_text(moved.replace(str(home / "labelled.jsonl"), str(other)))
    assert "is not what it was" in run("--resume", "--out", out, code=2)
    (out / "settings.yaml").write_text(moved)
    run("--resume", "--out", out, "--config", harmless)
    assert [entry["step"] for entry in history(out) if "loss" in entry] == list(range(1, 29))
    assert "holds no run to go on with" in run("--resume", "--out", tmp_path / "nothing", code=2)


def test_a_finished_run_has_nothing_left(home: Path, tmp_path: Path, whole: dict[str, Path]) -> None:
    """Its last step may be in the middle of an epoch, where a Trainer would do one more."""
    out = tmp_path / "out"
    run(*options(home, "causal-lm"), "--steps", 5, "--out", out)
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    logged = history(out)
    shutil.rmtree(out / "adapter")
    assert "nothing is left to train" in run("--resume", "--out", out)
    assert history(out) == logged and logged[-2]["step"] == 5
    again = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, adapter[name]) for name, tensor in again.items())


def test_before_the_first_checkpoint_resuming_begins(home: Path, tmp_path: Path, whole: dict[str, Path]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(whole["causal-lm"] / "settings.yaml", out)
    assert "has no checkpoint yet" in run("--resume", "--out", out)
    assert_same(out, whole["causal-lm"])


def test_packed_rows_train_as_padded_ones_do(home: Path, tmp_path: Path) -> None:
    save_models(tmp_path, attention_dropout=0.0)
    (tmp_path / "packed.yaml").write_text("data: {packing: true}\nmeft: {dropout: 0.0}\n")
    (tmp_path / "padded.yaml").write_text("meft: {dropout: 0.0}\n")
    for name in ("packed", "padded"):
        config, out = tmp_path / f"{name}.yaml", tmp_path / name
        run(*options(home, "causal-lm"), "--model", tmp_path / "llama", "--steps", 4, "--config", config, "--out", out)
    for packed, padded in zip(history(tmp_path / "packed"), history(tmp_path / "padded"), strict=True):
        (figure,) = {"loss", "eval_loss"} & packed.keys()
        # The same tokens, summed in another order; four steps of float32.
        assert packed[figure] == pytest.approx(padded[figure], rel=1e-4)


def test_a_second_signal_ends_the_process(tmp_path: Path) -> None:
    code = (
        "import os, signal, time\n"
        "from meft_kernels.programs.training.interruption import SaveAndStop\n"
        "stop = SaveAndStop()\n"
        "with stop.listening():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert stop.requested\n"
        "    print('once', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert done.returncode == -signal.SIGTERM
    assert done.stdout.strip() == "once" and "with a checkpoint" in done.stderr


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with SaveAndStop().listening():
        assert signal.getsignal(signal.SIGINT) not in before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_killed_process_goes_on_exactly(task: str, home: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    """SIGKILL, at whatever it is doing; then Ctrl-C as a terminal sends it; then to the end."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "meft_kernels.programs.cli", "train", "--out", str(out)]
    begin = [*options(home, task), "--config", str(home / "often.yaml")]
    for arguments, number, step in ((begin, signal.SIGKILL, 7), (["--resume"], signal.SIGINT, 17)):
        process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        deadline = time.monotonic() + 120
        log = out / "log.jsonl"
        while not (log.is_file() and f'"step": {step},' in log.read_text()) and time.monotonic() < deadline:
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.002)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == (-9 if number == signal.SIGKILL else 130), said
        assert not (out / "metrics.json").exists()
    run("--resume", "--out", out)
    assert_same(out, whole[task])
