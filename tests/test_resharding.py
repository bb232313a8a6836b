"""Training that is stopped in one number of processes and goes on in another; accelerate's and Trainer's loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .isolated import check_trainer
from .launch import ACCELERATE, launch
from .models import worst_error

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed"),
]


def test_checkpoints_fit_any_world_size(tmp_path: Path) -> None:
    """save_adapter, and torch.distributed.checkpoint's full and sharded state, of DDP and of FSDP2: 2 -> 1 -> 2."""
    script = "tests/isolated/check_resharding.py"
    launch(2, script, "-", tmp_path / "two")
    printed = launch(1, script, tmp_path / "two", tmp_path / "one")
    printed += launch(2, script, tmp_path / "one", "-")
    assert printed.count("agrees to") == 2 * 2 * 3


def test_trainer_goes_on_in_another_world_size(tmp_path: Path) -> None:
    script = "tests/isolated/check_trainer.py"
    whole = check_trainer.train(str(tmp_path / "whole"), 4)
    expected = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(set(expected)) == 4

    launch(2, script, tmp_path / "two", 2)
    resumed = check_trainer.train(str(tmp_path / "two_one"), 4, str(tmp_path / "two" / "checkpoint-2"))
    launch(2, script, tmp_path / "one_two", 4, tmp_path / "whole" / "checkpoint-2")
    after = torch.load(tmp_path / "one_two" / "result.pt")

    assert [e["loss"] for e in resumed.state.log_history if "loss" in e] == pytest.approx(expected, abs=1e-5)
    assert after["losses"] == pytest.approx(expected, abs=1e-5)
    trained = {name: p.detach() for name, p in whole.model.named_parameters() if p.requires_grad}
    # Adam divides by the gradients' own size: rounding in the smallest of them shows
    assert worst_error(after["weights"], trained) <= 1e-3


def test_accelerate(tmp_path: Path) -> None:
    """prepare, accumulate and clip_grad_norm_, started with `accelerate launch`: one process's weights."""
    script = "tests/isolated/check_accelerate.py"
    found = []
    for processes, engine in ((1, "ddp"), (2, "ddp"), (2, "fsdp2")):
        folder = tmp_path / f"{engine}-{processes}"
        assert f"{processes} processes" in launch(processes, script, folder, engine, launcher=ACCELERATE)
        found.append({**load_file(folder / "adapter_model.safetensors")})
    states = [{key: weights.pop(key) for key in list(weights) if "_extra_state" in key} for weights in found]
    for weights, state in zip(found[1:], states[1:], strict=True):
        assert all(torch.equal(value, state[key]) for key, value in states[0].items())
        assert worst_error(weights, found[0]) <= 1e-5
