"""The loss in chunks in several processes: the whole batch's gradients, and no wrapper that computes the logits.

Started by tests/test_loss_distributed.py through torchrun: ``check_loss.py ENGINE``.
"""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from meft_kernels import ReversibleUsageError
from meft_kernels.loss import bind_loss
from meft_kernels.loss.lazy import LazyLogits
from tests.language_models import labelled, language_model
from tests.models import relative_error


def wrapped(model: Any, engine: str) -> Any:
    if not engine.startswith("fsdp2"):
        flags = {"unused": {"find_unused_parameters": True}, "static": {"static_graph": True}, "ddp": {}}
        return DistributedDataParallel(model, **flags[engine])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    # as accelerate does it: the weights are taken apart after forward
    return fully_shard(model, mesh=mesh, reshard_after_forward=True if engine == "fsdp2_resharded" else None)


def gradients(model: Any) -> dict[str, Any]:
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def main(engine: str) -> None:
    dist.init_process_group("gloo")
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    reference, model = language_model("llama"), language_model("llama")
    batch = labelled(model, rows=4)
    batch["labels"] = batch["input_ids"]  # as many in each half
    mine = {name: tensor[half] for name, tensor in batch.items()}
    bind_loss(model, rows=10)
    model = wrapped(model, engine)
    reference(**batch).loss.backward()
    for _ in range(2):  # the second step meets what the first may have left behind
        model.zero_grad()
        with mock.patch.object(LazyLogits, "read", side_effect=AssertionError("logits were computed")):
            output = model(**mine)
            output.loss.backward()
        assert isinstance(output.logits, LazyLogits)
        error = relative_error(gradients(model), gradients(reference))
        assert error <= 1e-5, error
    # Logits alone, their gradient through whatever the wrapper has put behind them.
    if engine != "fsdp2_resharded":
        reference.zero_grad()
        model.zero_grad()
        reference(**batch).logits.square().mean().backward()
        model(**mine).logits.square().mean().backward()
        assert relative_error(gradients(model), gradients(reference)) <= 1e-5
    else:
        with pytest.raises(ReversibleUsageError, match="taken the head's weights apart"):
            model(**mine).logits.sum()
        with torch.no_grad():  # an evaluation reads them
            assert torch.allclose(model(**mine).logits, reference(**mine).logits, atol=1e-5)
    print(f"agrees to {error:.1e}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo's now and then keeps the interpreter from ending


if __name__ == "__main__":
    main(sys.argv[1])
