"""A training loop as accelerate's documentation has it; what it arrives at is saved, and compared by the test.

Started by tests/test_resharding.py, in one process and through ``accelerate launch``: ``check_accelerate.py FOLDER``. A
second argument ``fsdp2`` has accelerate shard the model; its own switch for that is not heeded on CPUs.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.tensor import DTensor

import meft_kernels
from tests.models import TRAINABLE_START, tiny_llama


def sharded(accelerator: Accelerator, model: Any) -> Any:
    """As ``accelerator.prepare`` does with ``fsdp_version=2`` on GPUs."""
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    return fsdp2_prepare_model(accelerator, model)


def main(folder: str, engine: str = "ddp") -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_llama()
    torch.manual_seed(5)
    meft_kernels.patch(model, fraction_bits=22, **TRAINABLE_START)
    ids = torch.randint(1, 97, (16, 8), generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(list(ids), batch_size=4 // accelerator.num_processes)
    model.train()
    if engine == "fsdp2":
        model = sharded(accelerator, model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    # SGD: Adam divides by the gradients' own size, and rounding in the smallest would be all there is to see
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    optimizer, loader = accelerator.prepare(optimizer, loader)
    if engine == "ddp":
        model = accelerator.prepare(model)
    norms = []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=batch, labels=batch).loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
                optimizer.step()
                optimizer.zero_grad()
    assert len(norms) == 4
    assert max(norms) > 0.5  # clipped
    meft_kernels.save_adapter(accelerator.unwrap_model(model), folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"{accelerator.num_processes} processes, norms {norms}", flush=True)
    accelerator.end_training()
    os._exit(0)  # a thread of gloo's now and then keeps the interpreter from ending


if __name__ == "__main__":
    main(*sys.argv[1:])
