"""What our kernels allocate, by the estimate and by running them in Triton's interpreter. Run by ``test_estimate``."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from triton.runtime.jit import KernelInterface

from meft_kernels import MeftConfig
from meft_kernels.comparison.rivals import RIVALS, Budget
from meft_kernels.estimate.estimator import Estimator
from meft_kernels.estimate.step import measure_step, text_batch
from meft_kernels.estimate.twin import build

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, architectures=["LlamaForCausalLM"],
)  # fmt: skip


# In float32 the interpreter takes the weights themselves, by a way on which the meter sees them for the first time.
@pytest.mark.parametrize("rival", ["meft", "meft1", "meft3"])
def test_as_on_a_gpu(rival: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = KernelInterface.__getitem__

    def launch_and_collect(kernel: Any, grid: Any) -> Any:
        """The interpreter leaves its arguments in cycles."""
        launched = launch(kernel, grid)

        def call(*args: Any, **kwargs: Any) -> None:
            launched(*args, **kwargs)
            gc.collect()

        return call

    monkeypatch.setattr(KernelInterface, "__getitem__", launch_and_collect)
    estimator = Estimator(CONFIG, torch.bfloat16, 1, MeftConfig(rank=8), loss=False, gpu=True)
    step = estimator.simulate(CONFIG, RIVALS[rival], 64)
    settings = dataclasses.replace(estimator.meft, impl="triton")
    model: Any = RIVALS[rival].prepare(build(CONFIG, torch.bfloat16), Budget(settings, 0)).train()
    batch = text_batch(model, 1, 64, torch.device("cpu"))
    assert measure_step(model, batch, loss=False, foreach=True) == step
