"""Remainders that wait in host memory: the same bits, buffers used again, nothing lost when a pass has no backward."""

from __future__ import annotations

import copy
import gc
import logging
from typing import Any

import pytest
import torch

import meft_kernels
from meft_kernels.engine.remainders import HostMemory, Remainders
from meft_kernels.memory import LiveTensorMeter
from meft_kernels.patching.state import require_state

from .models import TRAINABLE_START, VARIANTS, StreamWitness, tiny_batch, tiny_llama, train_step


def _patched(**settings: Any) -> Any:
    torch.manual_seed(5)
    return meft_kernels.patch(tiny_llama(), fraction_bits=18, **{**TRAINABLE_START, **settings}).train()


def _free(model: Any) -> int:
    """Buffers that wait to be used again."""
    memory = require_state(model).stacks[0].host
    return sum(len(buffers) for buffers in memory._free.values())


@pytest.mark.parametrize("settings", [{}, {"tile": 3}, {"tile": 3, "attention": "pieces"}, {"lam": 1 / 3, "beta": 0.1}])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits(variant: str, settings: dict[str, Any]) -> None:
    host = _patched(variant=variant, remainders="host", **settings)
    device = _patched(variant=variant, **settings)
    batch = tiny_batch(host)
    witness = StreamWitness(host)
    loss, gradients = train_step(host, batch)
    witness.assert_exact(3)
    expected_loss, expected = train_step(device, batch)
    assert loss == expected_loss
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_buffers_are_used_again() -> None:
    model = _patched(remainders="host", tile=3)
    batch = tiny_batch(model)
    train_step(model, batch)
    after_one = _free(model)
    assert after_one == 3 * 6  # one for every tile of every layer's lane
    for _ in range(3):
        train_step(model, batch)
    assert _free(model) == after_one


def test_a_pass_without_a_backward_gives_its_buffers_back() -> None:
    model = _patched(remainders="host")
    batch = tiny_batch(model)
    output = model(**batch)
    assert _free(model) == 0
    del output
    gc.collect()
    assert _free(model) == 3


def test_two_passes_before_their_backwards() -> None:
    results = []
    for remainders in ("host", "device"):
        model = _patched(remainders=remainders, tile=3)
        first, second = tiny_batch(model, seed=1), tiny_batch(model, rows=3, seed=2)
        losses = [model(**batch).loss for batch in (first, second)]
        losses[0].backward()
        losses[1].backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_waits_on_the_host_is_not_on_the_device() -> None:
    """Kept after forward grows with depth by what autograd itself needs of a layer, a few hundred bytes."""
    kept = {}
    for layers in (2, 6):
        torch.manual_seed(0)
        model = meft_kernels.patch(tiny_llama(layers), fraction_bits=18, remainders="host", loss="full").train()
        batch = tiny_batch(model, rows=4, tokens=32)
        model(**batch).loss.backward()
        with LiveTensorMeter() as meter:
            loss = model(**batch).loss
            kept[layers] = meter.live_bytes
        assert meter.host_bytes == 0, "buffers of the step before were not used"
        del loss
    elements = 4 * 32 * 64
    assert kept[6] - kept[2] < 4 * 0.05 * elements  # a byte an element and layer on the device


def test_new_buffers_count_as_the_hosts() -> None:
    model = _patched(remainders="host", loss="full")
    with LiveTensorMeter() as meter:
        loss = model(**tiny_batch(model)).loss
    assert meter.host_bytes == 3 * 2 * 7 * 64  # a byte an element and layer
    del loss


def test_order_of_arrival() -> None:
    """Each can be taken once, and the next one, of this lane or the one below it, has set out by then."""
    memory = HostMemory()
    below = Remainders(memory)
    above = Remainders(memory, below)
    tensors = [torch.full((2, 3, 4), number, dtype=torch.uint8) for number in range(5)]
    for tensor in tensors[:2]:
        below.put(tensor)
    for tensor in tensors[2:]:
        above.put(tensor)
    assert above.nbytes == 3 * 24
    for number, tensor in enumerate(tensors[2:]):
        assert torch.equal(above.take(number), tensor)
    assert below.nbytes == 24  # the first is on its way
    assert torch.equal(below.take(0), tensors[0])
    assert torch.equal(below.take(1), tensors[1])
    with pytest.raises(AttributeError):
        below.take(0).shape  # noqa: B018 - it is gone


def test_memory_that_cannot_be_pinned(caplog: pytest.LogCaptureFixture) -> None:
    """WSL and containers cap it: pageable memory, and one warning."""

    class OnCuda:
        device = torch.device("cuda")

        @staticmethod
        def numel() -> int:
            return 24

    memory = HostMemory()
    real = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory (host)")
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, logger="meft_kernels"):
        patch.setattr(torch, "empty", empty)
        buffers = [memory._buffer(OnCuda()) for _ in range(2)]  # type: ignore[arg-type]
    assert all(buffer.numel() == 24 for buffer in buffers)
    assert [record.message for record in caplog.records if "pageable" in record.message]
    assert len(caplog.records) == 1


def test_copies_have_memory_of_their_own() -> None:
    model = _patched(remainders="host")
    batch = tiny_batch(model)
    train_step(model, batch)
    twin = copy.deepcopy(model)
    assert _free(twin) == 0
    found, expected = train_step(twin, batch), train_step(model, batch)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_from_a_gpu() -> None:
    results = []
    for remainders in ("host", "device"):
        model = _patched(remainders=remainders, tile=3).cuda()
        batch = {name: tensor.cuda() for name, tensor in tiny_batch(model).items()}
        for _ in range(3):
            results.append(train_step(model, batch))
    assert results[0][0] == results[3][0]
    assert all(torch.equal(results[2][1][name], results[5][1][name]) for name in results[2][1])
