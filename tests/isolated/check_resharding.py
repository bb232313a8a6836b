"""Checkpoints of one world size read in another, under DistributedDataParallel and FSDP2, in every format.

Started by tests/test_resharding.py through torchrun: ``check_resharding.py READ WRITE``, each a folder or ``-``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import meft_kernels
from meft_kernels.patching.state import fraction_bits_of, require_state
from tests.isolated.check_distributed import fsdp2
from tests.models import TRAINABLE_START, tiny_batch, tiny_llama, worst_error

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
SHARDED = StateDictOptions(ignore_frozen_params=True)
TAKE_FULL = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
TAKE_SHARDED = StateDictOptions(strict=False, ignore_frozen_params=True)
FORMATS = ("adapter", "full", "sharded")


def make(engine: str, seed: int) -> tuple[Any, Any, torch.optim.Optimizer]:
    """The model, the same wrapped, and its optimizer."""
    model = tiny_llama()
    torch.manual_seed(seed)
    meft_kernels.patch(model, **TRAINABLE_START).train()
    wrapped = fsdp2(model) if engine == "fsdp2" else DistributedDataParallel(model)
    return model, wrapped, torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def step(model: Any, wrapped: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What one step on a batch that all ranks have computes; a world of any size should compute the same."""
    output = wrapped(**tiny_batch(tiny_llama(), rows=4))
    output.loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: whole(p.grad) for name, p in trained.items()}
    optimizer.step()
    optimizer.zero_grad()
    return {
        "logits": output.logits.detach(),
        "gradients": gradients,
        "weights": {n: whole(p) for n, p in trained.items()},
    }


def write(engine: str, folder: Path) -> None:
    model, wrapped, optimizer = make(engine, seed=5)
    for _ in range(2):
        step(model, wrapped, optimizer)
    meft_kernels.save_adapter(wrapped, folder / "adapter")  # all ranks call it
    full = get_model_state_dict(wrapped, options=FULL)
    if dist.get_rank() == 0:
        torch.save(full, folder / "full.pt")
    weights, state = get_state_dict(wrapped, optimizer, options=SHARDED)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=str(folder / "sharded"))
    bits = fraction_bits_of(require_state(wrapped))
    expected = {**step(model, wrapped, optimizer), "bits": bits}
    if dist.get_rank() == 0:
        torch.save(expected, folder / "expected.pt")
    dist.barrier()


def read(engine: str, kind: str, folder: Path) -> None:
    model, wrapped, optimizer = make(engine, seed=99)
    if kind == "adapter":
        meft_kernels.load_adapter(wrapped, folder / "adapter")
    elif kind == "full":
        state = torch.load(folder / "full.pt") if dist.get_rank() == 0 else {}
        set_model_state_dict(wrapped, state, options=TAKE_FULL)
    else:
        weights, state = get_state_dict(wrapped, optimizer, options=SHARDED)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=str(folder / "sharded"))
        set_state_dict(wrapped, optimizer, model_state_dict=weights, optim_state_dict=state, options=TAKE_SHARDED)
    expected = torch.load(folder / "expected.pt")
    bits = fraction_bits_of(require_state(wrapped))
    assert bits == expected["bits"], (bits, expected["bits"])
    found = step(model, wrapped, optimizer)
    assert torch.equal(found["logits"], expected["logits"])
    error = worst_error(found["gradients"], expected["gradients"])
    if kind == "sharded":  # with the optimizer's state, so that the step is the same
        error = max(error, worst_error(found["weights"], expected["weights"]))
    assert error <= 1e-6, error
    if dist.get_rank() == 0:
        print(f"{engine} {kind}: agrees to {error:.1e}", flush=True)


def main(source: str, target: str) -> None:
    dist.init_process_group("gloo")
    for engine in ("ddp", "fsdp2"):
        if source != "-":
            for kind in FORMATS:
                read(engine, kind, Path(source, engine))
        if target != "-":
            Path(target, engine).mkdir(parents=True, exist_ok=True)
            write(engine, Path(target, engine))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo's now and then keeps the interpreter from ending


if __name__ == "__main__":
    main(*sys.argv[1:])
