"""LiveTensorMeter: every way in which a storage can be made, shared, resized and freed."""

import gc

import pytest
import torch
from torch._subclasses import FakeTensorMode

from meft_kernels.memory import LiveTensorMeter, host_allocation, shortened, shortening

KIB = 1024


def kib(count: int = 1, **options) -> torch.Tensor:
    return torch.ones(count * KIB, dtype=torch.uint8, **options)


def test_counts_what_lives_and_the_peak():
    with LiveTensorMeter() as meter:
        a = kib(4)
        b = kib(2)
        assert meter.live_bytes == 6 * KIB
        del a
        assert meter.live_bytes == 2 * KIB
        c = kib(3)
        assert (meter.live_bytes, meter.peak_bytes) == (5 * KIB, 6 * KIB)
        meter.reset_peak()
        assert meter.peak_bytes == 5 * KIB
    del b, c
    assert meter.live_bytes == 0  # freed after the block


def test_nothing_outside_the_block_is_counted():
    before = kib(8)
    with LiveTensorMeter() as meter:
        view = before[:10]
        before.add_(1)
        del before, view
        assert meter.live_bytes == meter.peak_bytes == 0
    after = kib(8)
    assert meter.live_bytes == 0 and after.numel()


def test_views_count_once_and_until_the_last_one_dies():
    with LiveTensorMeter() as meter:
        a = kib(4)
        view, row = a.view(4, KIB), a[:1]
        parts = a.split(KIB)
        assert meter.live_bytes == meter.peak_bytes == 4 * KIB
        del a, view, parts
        assert meter.live_bytes == 4 * KIB
        del row
        assert meter.live_bytes == 0


def test_a_storage_resized_in_place():
    with LiveTensorMeter() as meter:
        a = torch.empty(0, dtype=torch.uint8)
        torch.add(kib(4), 1, out=a)
        assert meter.live_bytes == 4 * KIB
        a.resize_(6 * KIB)
        assert meter.live_bytes == 6 * KIB
        a.untyped_storage().resize_(KIB)  # as FSDP does, outside the dispatcher: seen at the next op
        a[:KIB].add_(1)
        assert meter.live_bytes == KIB
    del a
    assert meter.live_bytes == 0


def test_only_the_growth_of_an_older_storage_counts():
    a = kib(4)
    with LiveTensorMeter() as meter:
        a.resize_(5 * KIB)
        assert meter.live_bytes == KIB
    del a
    assert meter.live_bytes == 0


def test_ids_that_are_used_again():
    with LiveTensorMeter() as meter:
        for _ in range(200):
            a = kib(1)
            b = a.view(-1) + 1
            del a, b
        assert meter.live_bytes == 0
        assert meter.peak_bytes == 2 * KIB


def test_tensors_from_python_values():
    with LiveTensorMeter() as meter:
        a = torch.tensor([1.0, 2.0])
        assert meter.live_bytes == a.nbytes


def test_storages_in_a_reference_cycle():
    with LiveTensorMeter() as meter:
        a = kib(4)
        cycle = [a]
        cycle.append(cycle)
        del a, cycle
        gc.collect()
        assert meter.live_bytes == 0


def test_the_backward_pass():
    width = 64
    layers = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(5)))
    x = torch.randn(32, width)
    activation = x.nbytes
    weights = sum(p.nbytes for p in layers.parameters())
    with LiveTensorMeter() as meter:
        y = layers(x)
        assert meter.live_bytes == 5 * activation
        loss = y.sum()
        del y
        loss.backward()
        assert meter.peak_bytes >= weights + activation  # in the last layer: every gradient, and its own input
        assert meter.live_bytes == weights + loss.nbytes  # the gradients, and nothing else
    layers.zero_grad(set_to_none=True)
    del loss
    assert meter.live_bytes == 0


def test_checkpointing_is_seen():
    from torch.utils.checkpoint import checkpoint

    block = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    x = torch.randn(32, 64, requires_grad=True)

    def after_forward(run):
        with LiveTensorMeter() as meter:
            y = run(x)
            kept = meter.live_bytes
            y.sum().backward()
        return kept, meter.peak_bytes

    plain, plain_peak = after_forward(block)
    kept, peak = after_forward(lambda v: checkpoint(block, v, use_reentrant=False))
    assert kept == x.nbytes < plain == 9 * x.nbytes
    assert abs(peak - plain_peak) <= 4 * x.nbytes  # one block: the recompute costs what the forward kept


@pytest.mark.parametrize("fake_outside", [True, False])
def test_fake_tensors(fake_outside):
    fake, meter = FakeTensorMode(), LiveTensorMeter()
    modes = (fake, meter) if fake_outside else (meter, fake)
    with modes[0], modes[1]:
        a = torch.empty(1 << 30, 64)
        b = a + 1
        del a
        assert meter.live_bytes == b.numel() * 4
        assert meter.peak_bytes == 2 * b.numel() * 4


def test_wrapper_subclasses():
    from torch.testing._internal.two_tensor import TwoTensor

    with LiveTensorMeter() as meter:
        pair = TwoTensor(kib(1), kib(1))
        double = pair + 1
        assert meter.live_bytes == 4 * KIB
        del pair, double
        assert meter.live_bytes == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_backward_runs_in_another_thread_and_is_seen():
    layer = torch.nn.Linear(64, 64, device="cuda")
    x = torch.randn(32, 64, device="cuda")
    with LiveTensorMeter() as meter:
        loss = layer(x).sum()
        loss.backward()
        assert meter.live_bytes == sum(p.nbytes for p in layer.parameters()) + loss.nbytes


def test_host_bytes_are_their_own():
    with LiveTensorMeter() as meter:
        kept = kib(1)
        with host_allocation():
            waiting = kib(4)
        back = waiting.clone()
        assert (meter.live_bytes, meter.host_bytes) == (5 * KIB, 4 * KIB)
        waiting.resize_(8 * KIB)  # what is the host's stays the host's, wherever it grows
        assert (meter.live_bytes, meter.host_bytes, meter.host_peak_bytes) == (5 * KIB, 8 * KIB, 8 * KIB)
        meter.reset_peak()
        del waiting
        assert (meter.host_bytes, meter.host_peak_bytes) == (0, 8 * KIB)
    assert (meter.live_bytes, meter.peak_bytes) == (5 * KIB, 5 * KIB)
    del kept, back


def test_what_lies_beside_the_device_is_the_hosts():
    """As a pinned tensor does in a step on a GPU; meta stands for the GPU."""
    with LiveTensorMeter("meta") as meter:
        here, beside = kib(1, device="meta"), kib(2)
        assert (meter.live_bytes, meter.host_bytes) == (KIB, 2 * KIB)
    del here, beside


def test_tiles_are_all_of_them_outside_of_a_simulation():
    pieces = range(0, 100, 10)
    assert shortened(pieces) is pieces
    with shortening():
        assert shortened(pieces) == [0, 10, 80, 90] and shortened(range(4)) == range(4)
    assert shortened(pieces) is pieces
