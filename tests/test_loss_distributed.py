"""The loss in chunks under DistributedDataParallel and FSDP2, in two processes on the CPU."""

from __future__ import annotations

import pytest

from .launch import launch


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "unused", "static", "fsdp2", "fsdp2_resharded"])
def test_two_processes(engine: str) -> None:
    assert "agrees to" in launch(2, "tests/isolated/check_loss.py", engine)
