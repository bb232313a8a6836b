"""A training loop as accelerate's documentation has it; what it arrives at is saved, and compared by the test.

Started by tests/test_resharding.py, in one process and through ``accelerate launch``: ``check_accelerate.py FOLDER``.
"""

from __future__ import annotations

import os
import sys

import torch
from accelerate import Accelerator

import meft_kernels
from tests.models import TRAINABLE_START, tiny_llama


def main(folder: str) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = tiny_llama()
    torch.manual_seed(5)
    meft_kernels.patch(model, fraction_bits=22, **TRAINABLE_START)
    ids = torch.randint(1, 97, (16, 8), generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(list(ids), batch_size=4 // accelerator.num_processes)
    # SGD: Adam divides by the gradients' own size, and rounding in the smallest would be all there is to see
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
    norms = []
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=batch, labels=batch).loss)
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
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
    main(sys.argv[1])
