"""FSDP2 gathers and frees a patched layer's weights when it does a plain one's: that is the memory it is for.

One process is enough to see it; that two agree is in tests/test_distributed.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import meft_kernels

from ..models import TRAINABLE_START, VARIANTS, relative_error, tiny_batch, tiny_llama, train_step

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")

LAYERS = 4


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def gathered_when(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Which layers have their weights (U), and which have given them back (s), as backward comes to and leaves each."""
    layers = list(model.model.layers)
    groups = [layer._get_fsdp_state()._fsdp_param_group for layer in layers]
    seen: list[str] = []

    def note(group: Any, method: str, index: int) -> None:
        original = getattr(group, method)

        def noting(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            seen.append(f"{method} {index}: " + "".join("U" if each.is_unsharded else "s" for each in groups))
            return result

        setattr(group, method, noting)

    for index, group in enumerate(groups):
        note(group, "pre_backward", index)
        note(group, "post_backward", index)
    model(**batch).loss.backward()
    return seen, {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{}, {"reversible_layers": 2}, {"engine": "autograd"}])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_come_and_go_as_in_a_plain_model(variant: str, settings: dict[str, Any]) -> None:
    plain = tiny_llama(LAYERS).train()
    batch = tiny_batch(plain)
    plain.model.embed_tokens.requires_grad_(False)
    expected, _ = gathered_when(sharded(plain), batch)
    torch.manual_seed(5)
    model = meft_kernels.patch(tiny_llama(LAYERS), fraction_bits=20, variant=variant, **TRAINABLE_START, **settings)
    _, gradients = train_step(model.train(), batch)
    sharded(model)
    found, sharded_gradients = gathered_when(model, batch)
    assert found == expected
    assert "post_backward 2: ssss" in found
    assert relative_error(sharded_gradients, gradients) <= 1e-6


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_beside_those_of_fully_shard() -> None:
    """Somebody's hook on a sharded layer: the read-out goes through both."""
    torch.manual_seed(5)
    model = meft_kernels.patch(tiny_llama(LAYERS), fraction_bits=20, **TRAINABLE_START).train()
    batch = tiny_batch(model)
    _, gradients = train_step(model, batch)
    expected, _ = gathered_when(sharded(tiny_llama(LAYERS).train()), batch)
    sharded(model)
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_full_backward_hook(lambda _, d_in, d_out: seen.append(d_out[0]))
    found, sharded_gradients = gathered_when(model, batch)
    assert len(seen) == LAYERS
    assert found[:-1] == expected[:-1]
    assert relative_error(sharded_gradients, gradients) <= 1e-6
