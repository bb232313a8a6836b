"""Ways of splitting a model that reversible layers cannot follow: each is refused, and the way out is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import meft_kernels
from meft_kernels import UnsupportedModelError
from meft_kernels.patching.state import find_state

from .models import tiny_batch, tiny_llama


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def partition(model: Any) -> Any:
    """What DeepSpeed ZeRO-3 leaves: every weight has an id, and (where it is not gathered) no elements."""
    for index, parameter in enumerate(model.parameters()):
        parameter.ds_id = index
        parameter.data = torch.empty(0)
    return model


def unchanged(model: Any) -> bool:
    return find_state(model) is None and all(p.requires_grad for p in model.parameters())


def test_zero3_before_patch() -> None:
    model = partition(tiny_llama())
    with pytest.raises(UnsupportedModelError, match=r"DeepSpeed ZeRO-3.*FSDP2"):
        meft_kernels.patch(model)
    assert unchanged(model)


@pytest.mark.parametrize("calibrated", [False, True])
def test_zero3_after_patch(calibrated: bool) -> None:
    """As `Trainer` does it, with deepspeed.initialize."""
    model = meft_kernels.patch(tiny_llama())
    batch = tiny_batch(model)
    if calibrated:
        model(**batch)
    partition(model)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers are partitioned by DeepSpeed ZeRO-3"):
        model(**batch)


def test_tensor_parallelism() -> None:
    model = tiny_llama()
    model._tp_size = 1  # as transformers leaves it on a model that was distributed in other ways
    meft_kernels.unpatch(meft_kernels.patch(model))
    model._tp_size = 2
    with pytest.raises(UnsupportedModelError, match="tensor parallelism"):
        meft_kernels.patch(model)
    assert unchanged(model)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("whole", [False, True])
def test_sharded_before_patch(whole: bool) -> None:
    model = tiny_llama()
    fully_shard(model if whole else model.model.layers[1])
    with pytest.raises(UnsupportedModelError, match="call patch first, and fully_shard after it"):
        meft_kernels.patch(model)
    assert unchanged(model)
