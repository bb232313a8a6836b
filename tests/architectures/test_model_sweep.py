"""The sweep over all model types: what it found of a few of them is found again, and the pages say what it found."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from benchmarks.model_sweep.__main__ import COUNTED, PAGE, RESULTS
from benchmarks.model_sweep.check import check, look, passed
from benchmarks.model_sweep.models import make
from benchmarks.model_sweep.table import COUNT, count, page

RECORDED: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("model_type", ["esm", "lfm2_moe", "mobilenet_v1"])
def test_a_sample_is_found_again(model_type: str) -> None:
    found, recorded = look(model_type), RECORDED[model_type]
    assert found["outcome"] == recorded["outcome"]
    for key in ("class", "found", "reason"):
        assert found.get(key) == recorded.get(key)


def test_wrong_numbers_do_not_pass() -> None:
    model, batch = make("esm")
    good = check(model, batch, "meft2", None)
    assert passed(good)
    for wrong in (
        {"bit equal": False},
        {"worst gradient": 1e-4},
        {"missing": ["a weight"]},
        {"layers": 1},
        {"unpatch identical": False},
        {"start": 0.4, "start at a 16th": 0.4},
    ):
        assert not passed(good | wrong)


def test_the_pages_say_what_was_found() -> None:
    versions = {found["transformers"] for found in RECORDED.values()}
    if versions != {transformers.__version__}:
        pytest.skip(f"the page is of transformers {', '.join(versions)}, whose names it uses")
    assert PAGE.read_text(encoding="utf-8") == page(RECORDED), "python -m benchmarks.model_sweep --table"
    for place in COUNTED:
        assert COUNT.findall(place.read_text(encoding="utf-8")) == [count(RECORDED)]
    # Errors of a model's own code are told as failures, too; wrong numbers there are none.
    assert not [name for name, found in RECORDED.items() if found["outcome"] == "fails" and "checks" in found]
