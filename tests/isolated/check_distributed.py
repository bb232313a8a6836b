"""One rank of a training step on half of a batch; rank 0 holds the gradients to those of the whole batch.

Started by tests/test_distributed.py through torchrun: ``check_distributed.py FAMILY ENGINE...``, one engine after the
other, each with models of its own.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import meft_kernels
from meft_kernels.patching.state import require_state
from tests.architectures.zoo import batch_for, tiny
from tests.models import TRAINABLE_START, minilm, minilm_batch, relative_error, worst_error

WRAPPERS: dict[str, Any] = {
    "ddp": DistributedDataParallel,
    "ddp_find_unused": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "ddp_static_graph": lambda model: DistributedDataParallel(model, static_graph=True),
    "ddp_no_sync": DistributedDataParallel,
    "ddp_other_bits": DistributedDataParallel,
}


def fsdp2(model: Any) -> Any:
    for stack in require_state(model).stacks:
        for layer in stack.layers:
            fully_shard(layer.module)
    return fully_shard(model)


def make(family: str, fraction_bits: int = 22) -> Any:
    """Without dropout, which the two halves of a batch would draw otherwise than the whole."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = minilm(**dropout) if family == "minilm" else tiny(family)
    torch.manual_seed(5)
    lean = {"tile": 3, "attention": "pieces", "remainders": "host"} if family == "bert" else {}
    # As calibration would choose, and the same everywhere: rounding to coarser steps would show beside 1e-6.
    return meft_kernels.patch(model, fraction_bits=fraction_bits, **TRAINABLE_START, **lean).train()


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(family: str, engine: str) -> None:
    rank = dist.get_rank()
    whole = make(family)
    batch = minilm_batch(4) if family == "minilm" else batch_for(whole, rows=4, tokens=8)
    batch["attention_mask"].fill_(1)
    if batch["labels"].dim() == 2:  # as many labels in each half, so that the mean of the halves is that of the whole
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] < 0, 3)
    whole(**batch).loss.backward()
    expected = gradients_of(whole)
    half = {name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}

    # Each rank calibrates on its own first batch, so that they may choose differently.
    coarse = 18
    model = make(family, coarse if engine == "ddp_other_bits" and rank == 1 else 22)
    fired: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda _, name=name: fired.__setitem__(name, fired.get(name, 0) + 1)
            )
    wrapped = fsdp2(model) if engine == "fsdp2" else WRAPPERS[engine](model)
    for _ in range(2):  # the second step meets what the first may have left behind
        model.zero_grad()
        fired.clear()
        if engine == "ddp_no_sync":
            with wrapped.no_sync():
                for row in range(2):
                    part = {name: value[row : row + 1] for name, value in half.items()}
                    if row == 0:
                        (wrapped(**part).loss / 2).backward()
            (wrapped(**part).loss / 2).backward()
        else:
            wrapped(**half).loss.backward()
    found = gradients_of(model)
    if engine == "fsdp2":
        found = {name: gradient.full_tensor() for name, gradient in found.items()}
    if engine == "ddp_other_bits":
        here = torch.cat([gradient.flatten() for gradient in found.values()])
        there = here.clone()
        dist.broadcast(there, src=0)
        assert torch.equal(here, there)  # the ranks' weights stay the same
    if rank == 0:
        # In MiniLM the halves' gradients of some biases cancel but for a tenth, and with them go digits, patched or not
        # (1e-5 of the bias itself): there, the error of all parameters together.
        error = (relative_error if family == "minilm" else worst_error)(found, expected)
        times = 2 if engine == "ddp_no_sync" else 1
        bound = 1e-6 * (10 if engine == "ddp_no_sync" else 1)
        if engine == "ddp_other_bits":  # no worse than if all had the coarser
            rough = make(family, coarse)
            rough(**batch).loss.backward()
            bound = worst_error(gradients_of(rough), expected)
            assert bound > 1e-6  # or there would be nothing to see
        assert error <= bound, (error, bound)
        if engine != "fsdp2":  # which registers its own parameters in the place of those watched here
            assert set(fired.values()) == {times}, fired
            assert fired.keys() == expected.keys()
        print(f"{engine} agrees to {error:.1e}", flush=True)
    dist.barrier()


def main(family: str, *engines: str) -> None:
    dist.init_process_group("gloo")
    for engine in engines:
        check(family, engine)
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo's now and then keeps the interpreter from ending


if __name__ == "__main__":
    main(*sys.argv[1:])
