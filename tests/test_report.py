"""docs/RESULTS.md is what the JSON files give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("peft")

from benchmarks import report
from meft_kernels.comparison.records import Record


def test_the_document_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_what_is_not_measured_says_so(tmp_path: Path) -> None:
    text = report.document(tmp_path)
    for section in report.SECTIONS:
        assert f"## {section.title}\n\nNot measured yet: `{section.command}`." in text


def test_figures_come_from_the_records(tmp_path: Path) -> None:
    settings = {
        "case": "minilm:imdb", "rival": "lora", "seed": 0, "lr": 1e-3, "steps": 7, "batch_size": 2, "max_length": 9,
        "held_out": 5, "rank": 3, "dtype": "torch.float32",
    }  # fmt: skip
    figures = {
        "metric": "accuracy", "higher_is_better": True, "score": 61.25, "trainable": 12345, "adapter_bytes": 2**20,
        "kept_bytes": 3 * 2**20, "peak_bytes": 5 * 2**20, "train_seconds": 9.0,
        "seconds_per_step": 1.0, "losses": [1.0],
    }  # fmt: skip
    for seed, score in enumerate((61.0, 63.0)):
        made = Record.now("comparison", {**settings, "seed": seed}, {**figures, "score": score}, torch.device("cpu"))
        made.write(tmp_path / "comparison" / "minilm-imdb" / f"lora-{seed}.json")
    text = report.document(tmp_path)
    assert "| LoRA | 62.0 ± 1.4 | 2 | 12,345 | 1.0 | 3.0 | 5.0 | - | - | - | - |" in text
    assert "7 steps of 2 texts of at most 9 tokens, 5 held out, rank 3, float32" in text.lower()
    assert made.date in text and made.environment["torch"] in text
