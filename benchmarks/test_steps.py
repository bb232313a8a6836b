"""A whole training step of every rival: tokens per second, bytes kept after forward and at the peak.

Each rival is timed on its own, so that runs compare between commits (``--benchmark-compare``). For ratios between
rivals see ``meft-kernels bench``, where they take turns.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from benchmarks.gpu.measure import CudaMeter
from benchmarks.real import real_batch, real_model
from meft_kernels import MeftConfig
from meft_kernels.comparison.loop import footprint, repeated_step
from meft_kernels.comparison.rivals import RIVALS, Budget, UnavailableRivalError
from meft_kernels.patching.state import count_parameters

STEPS = [
    pytest.param("minilm", 4, 32, id="minilm-4x32", marks=pytest.mark.quick),
    pytest.param("minilm", 16, 128, id="minilm-16x128", marks=pytest.mark.full),
    pytest.param("smollm2", 4, 256, id="smollm2-4x256", marks=pytest.mark.full),
]


@functools.lru_cache(maxsize=1)
def budget(model: str) -> Budget:
    return Budget.of(real_model(model, torch.float32), MeftConfig())


@pytest.mark.parametrize(("model", "rows", "tokens"), STEPS)
@pytest.mark.parametrize("rival", RIVALS)
def test_step(
    rival: str, model: str, rows: int, tokens: int, timed: Any, device: torch.device, request: pytest.FixtureRequest
) -> None:
    chosen = RIVALS[rival]
    if reason := chosen.why_unavailable(device):
        pytest.skip(reason)
    if rival == "meft_compiled" and request.config.getoption("--quick"):
        pytest.skip("compiling takes a minute")
    batch = {name: value.to(device) for name, value in real_batch(model, rows, tokens).items()}
    torch.manual_seed(0)
    try:
        made = chosen.prepare(real_model(model, torch.float32).to(device), budget(model)).train()
    except UnavailableRivalError as error:
        pytest.skip(str(error))
    step = repeated_step(made, batch, 1.0)
    step()  # calibration, the optimizer's state
    size = footprint(made, batch)
    allocator = {}
    if device.type == "cuda":
        with CudaMeter(device) as meter:
            step()
        allocator["allocator_peak_bytes"] = meter.peak_bytes
    seconds = timed(
        step,
        group=f"{model}, {rows} x {tokens} tokens",
        rival=rival,
        trainable=count_parameters(made)[0],
        kept_bytes=size.kept,
        peak_bytes=size.peak,
        **allocator,
    )
    timed.extra_info["tokens_per_second"] = int(batch["attention_mask"].sum()) / seconds
