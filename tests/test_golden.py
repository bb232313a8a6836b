"""No change moves a number without saying so: ten steps of four tiny models, as they were when the file was written."""

from __future__ import annotations

import json

import pytest
import torch

golden = pytest.importorskip("benchmarks.golden")

WRITTEN = json.loads(golden.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", golden.MODELS)
def test_ten_steps(name: str) -> None:
    """In float64, whose sums in another order differ by 1e-15 of themselves; ten steps and AdamW make 1e-12 of that.

    Streams are fixed point, and an input that rounds the other way moves them by 2^-19 at once: it would have to lie
    within 1e-15 of the middle between two integers.
    """
    for variant in golden.VARIANTS:
        expected = torch.tensor(WRITTEN[f"{name} {variant}"], dtype=torch.float64)
        found = torch.tensor(golden.steps(name, variant, torch.float64), dtype=torch.float64)
        assert found.shape == (golden.STEPS, 2)
        off = ((found - expected) / expected).abs().max()
        assert off <= 1e-9, f"{name}, {variant}: if that is meant to be, python -m benchmarks.golden --write"


def test_what_differs_is_told() -> None:
    one, other = {"a meft1": [(1.0, 2.0), (1.0, 3.0)]}, {"a meft1": [(1.0, 2.0), (1.0, 2.5)]}
    assert golden.differences(one, one) == []
    assert golden.differences(one, other) == ["a meft1, step 2: loss 1.0 -> 1.0, norm 2.5 -> 3.0"]
