"""One of two ranks has a layer that does not repeat: it raises, and the other one sees NaN in what was averaged.

Started by tests/test_distributed.py through torchrun.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from meft_kernels import NotRepeatableError
from tests.architectures.zoo import batch_for
from tests.isolated.check_distributed import WRAPPERS, fsdp2, gradients_of, make


class Late(torch.nn.Module):
    """Gives something else in the recompute of one step."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.calls, self.wrong = inner, 0, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x) * (1.001 if self.wrong and self.calls > 1 else 1)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check(name: str) -> None:
    rank = dist.get_rank()
    model: Any = make("llama")
    batch = batch_for(model, rows=4, tokens=8)
    half = {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}
    layer = model.model.layers[1]
    layer.mlp.down_proj = late = Late(layer.mlp.down_proj)
    wrapped = fsdp2(model) if name == "fsdp2" else WRAPPERS[name](model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        late.calls = 0
        wrapped(**half).loss.backward()
        return {key: local(gradient).clone() for key, gradient in gradients_of(model).items()}

    good = step()
    late.wrong = rank == 1
    told = ""
    try:
        step()
    except NotRepeatableError as error:
        told = str(error)
    found = {key: local(gradient).clone() for key, gradient in gradients_of(model).items()}
    assert ("model.layers.1 did not compute the same bits" in told) is (rank == 1), told
    bad = {key for key, gradient in found.items() if not torch.isfinite(gradient).all()}
    # Sharded, a bias of eight lies whole on one rank or half on each: the ranks' findings together.
    everywhere: list[set[str]] = [set(), set()]
    dist.all_gather_object(everywhere, bad)
    bad = everywhere[0] | everywhere[1]
    assert any(".layers.1." in key for key in bad) and any(".layers.0." in key for key in bad), bad
    assert not any(".layers.2." in key for key in bad), bad
    with pytest.raises(RuntimeError, match="non-finite"):
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)

    late.wrong = False
    again = step()  # who drops the step everywhere goes on
    assert all(torch.equal(gradient, again[key]) for key, gradient in good.items())
    dist.barrier()
    if rank == 0:
        print(f"{name}: nobody stepped unnoticed", flush=True)


def main() -> None:
    dist.init_process_group("gloo")
    for name in ("ddp", "ddp_static_graph", "fsdp2"):
        check(name)
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo's now and then keeps the interpreter from ending


if __name__ == "__main__":
    main()
