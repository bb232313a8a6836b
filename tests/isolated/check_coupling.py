"""The Triton coupling kernels against the torch reference.

Not collected by a plain pytest run: Triton reads TRITON_INTERPRET when it decorates a kernel. ``test_coupling_triton``
runs this file in processes of its own, under the interpreter on CPU tensors and, where there is a GPU, natively on it.
The reference always runs on the CPU: there its float division is IEEE division.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from meft_kernels.ops.coupling import api
from meft_kernels.ops.coupling import triton as kernels
from meft_kernels.ops.coupling.types import INT_LIMIT, NON_FINITE, OVERFLOW

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [(63, 100), (5, 7), (7,), (2, 3, 16), (3, 1), (2, 5, 11), (1, 13)]
QS = [1, 2, 3, 5, 7, 8, 10, 16, 100, 128, 256, 257, 65537, 2**24, 2**31 - 1]


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN or the largest integer
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def _stream(shape: tuple[int, ...], limit: int = 2**28) -> torch.Tensor:
    return torch.randint(-limit, limit, shape, dtype=torch.int32)


def _same(expected: torch.Tensor | None, actual: torch.Tensor | None, name: str) -> None:
    if expected is None or actual is None:
        assert expected is actual, name
        return
    actual = actual.cpu()
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
    if expected.is_floating_point():  # as bits, so that -0.0 is not 0.0; one NaN is as good as another
        assert torch.equal(torch.isnan(expected), torch.isnan(actual)), f"{name}: NaNs differ"
        expected, actual = (each.masked_fill(torch.isnan(each), 0.0) for each in (expected, actual))
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
        expected, actual = expected.contiguous().view(bits), actual.contiguous().view(bits)
    wrong = (expected != actual).nonzero()
    assert not len(wrong), f"{name}: {len(wrong)} of {expected.numel()} differ, first at {wrong[0].tolist()}"


def _on_device(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy with the same strides on the tested device, so that what is not ours to write can be compared."""
    if tensor is None:
        return None
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = torch.as_strided(tensor, (size,), (1,), 0).clone().to(DEVICE)
    return torch.as_strided(whole, tensor.shape, tensor.stride(), tensor.storage_offset())


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def _check(
    stream: torch.Tensor,
    branch: torch.Tensor,
    coefficient: float,
    center: torch.Tensor | None = None,
    k: int | None = 20,
    value_dtype: torch.dtype | None = None,
    inplace: bool = False,
    *,
    exact_round_trip: bool = True,
) -> None:
    """Forward, then inverse of what the forward gave, each against the reference; and nothing else was written."""
    options = {"fraction_bits": k, "value_dtype": value_dtype, "first_row": 1000003}
    expected = api.couple(stream.clone(), branch, coefficient, center=center, impl="torch", **options)
    there, branch_there, center_there = (_on_device(each) for each in (stream, branch, center))
    before = _memory(there).clone()
    version = there._version
    result = api.couple(
        there, branch_there, coefficient, center=center_there, inplace=inplace, impl="triton", **options
    )
    for name, want, got in zip(expected._fields, expected, result, strict=True):
        _same(want, got, f"couple {name}")
    assert (result.y is there) is inplace
    assert not inplace or stream.numel() == 0 or there._version > version, "autograd must learn of in-place writes"
    assert result.value is None or result.value.is_contiguous()
    if inplace:  # around a strided stream everything stays
        torch.as_strided(before, there.shape, there.stride(), there.storage_offset()).copy_(expected.y)
    _same(before.cpu(), _memory(there), "memory of the stream")

    y = (
        expected.y
        if not inplace
        else torch.as_strided(before.cpu(), there.shape, there.stride(), there.storage_offset())
    )
    expected_inverse = api.uncouple(
        y.clone(), branch, coefficient, expected.remainder, center=center, impl="torch", **options
    )
    inverse = api.uncouple(
        result.y, branch_there, coefficient, result.remainder, center=center_there, inplace=inplace, impl="triton",
        **options,
    )  # fmt: skip
    for name, want, got in zip(expected_inverse._fields, expected_inverse, inverse, strict=True):
        _same(want, got, f"uncouple {name}")
    assert (inverse.a is there) is inplace
    if stream.dtype == torch.int32 and exact_round_trip:
        assert torch.equal(inverse.a.cpu(), stream)
    if inplace and exact_round_trip and stream.dtype == torch.int32:
        _same(_memory(stream), _memory(there), "memory of the stream")
    _same(_memory(branch), _memory(branch_there), "branch")
    if center is not None:
        _same(_memory(center), _memory(center_there), "center")


@pytest.mark.parametrize("q", QS)
def test_every_q(q: int) -> None:
    dtypes = itertools.cycle([FP32, BF16, FP16])
    for sign, centred in itertools.product((1, -1), (True, False)):
        a, branch = _stream((5, 19)), torch.randn(5, 19).to(next(dtypes))
        center = _stream((5, 19)) if centred else None
        _check(a, branch, sign / q, center, value_dtype=branch.dtype, inplace=sign > 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("q", [1, 8, 10])
def test_every_shape(shape: tuple[int, ...], q: int) -> None:
    _check(_stream(shape), torch.randn(shape).to(BF16), 1 / q, _stream(shape), value_dtype=FP16)


@pytest.mark.parametrize("branch_dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("value_dtype", [None, FP32, FP16, BF16, torch.float64])
def test_every_dtype(branch_dtype: torch.dtype, value_dtype: torch.dtype | None) -> None:
    # Streams past 2^24 make the int32 -> fp32 conversion of the value copy round.
    _check(_stream((4, 24), 2**29), torch.randn(4, 24).to(branch_dtype), 0.1, k=12, value_dtype=value_dtype)


@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("q", [1, 10])
def test_block_sizes_and_many_programs(monkeypatch: pytest.MonkeyPatch, block: int, q: int) -> None:
    monkeypatch.setattr(kernels, "BLOCKS", ((0, block),))
    shape = (3, block * 8 + 40)
    _check(_stream(shape), torch.randn(shape).to(BF16), 1 / q, _stream(shape), value_dtype=BF16)
    _check(_stream(shape)[:, 3:-3], torch.randn(shape)[:, 3:-3], 1 / q, None, inplace=True)


@pytest.mark.parametrize("q", [1, 2, 3, 10, 2**30, 2**31 - 1])
def test_extremes_of_int32(q: int) -> None:
    edge = INT_LIMIT - 1
    points = torch.tensor([-edge, -edge + 1, -q, -q - 1, -2, -1, 0, 1, 2, q - 1, q, edge - 1, edge]).clamp(-edge, edge)
    a, center = (each.flatten().int() for each in torch.meshgrid(points, points, indexing="ij"))
    for sign in (1, -1):
        # q = 1 drives some sums out of range on purpose: the flag is compared, and even those wrap back.
        _check(a, torch.zeros(a.shape), sign / q, center)


def test_rounding_of_the_branch() -> None:
    ties = torch.arange(-9, 10) / 2
    near = torch.tensor([2.0**22 + 0.5, 2.0**22 + 1.5, 2.0**23 - 0.5, 2.0**23, 2.0**23 + 1, 2.0**24 + 2, 2.0**30 - 64])
    branch = torch.cat([ties, near, -near, torch.tensor([0.49999997, -0.49999997, 1e-30, -1e-30, 1e-42, -0.0])])
    for k in (0, 1, 28):
        _check(_stream(branch.shape, 2**20), branch * 2.0**-k, 1.0, k=k)


@pytest.mark.parametrize(
    ("bad", "flags"),
    [
        (float("nan"), NON_FINITE | OVERFLOW),
        (float("inf"), NON_FINITE | OVERFLOW),
        (-float("inf"), NON_FINITE | OVERFLOW),
        (3e38, NON_FINITE | OVERFLOW),  # finite, but not once it is scaled
        (1024.0, OVERFLOW),
        (-1024.0, OVERFLOW),
        (1023.9999, 0),
        (-1023.9999, 0),
    ],
)
@pytest.mark.parametrize("where", [0, 1999])
def test_status_of_the_branch(bad: float, flags: int, where: int) -> None:
    branch = torch.zeros(20, 100)
    branch.view(-1)[where] = bad
    a = torch.zeros(20, 100, dtype=torch.int32)
    for impl in ("torch", "triton"):
        device = DEVICE if impl == "triton" else "cpu"
        result = api.couple(a.to(device), branch.to(device), 0.5, fraction_bits=20, impl=impl)
        assert result.status.item() == flags, impl
        assert result.status.dtype == torch.int32


def test_status_of_the_sum_and_of_several_programs() -> None:
    edge = INT_LIMIT - 1
    a = torch.zeros(20, 100, dtype=torch.int32)
    for value, step, flags in [(edge, 1.0, OVERFLOW), (-edge, -1.0, OVERFLOW), (edge, 0.0, 0), (-edge, 0.0, 0)]:
        a[19, 99] = value
        branch = torch.full(a.shape, step)
        assert api.couple(a, branch, 1.0, fraction_bits=0, impl="torch").status.item() == flags
        result = api.couple(a.to(DEVICE), branch.to(DEVICE), 1.0, fraction_bits=0, impl="triton")
        assert result.status.item() == flags
    # The largest sum that int32 sees wraps around, and is caught all the same.
    a = torch.full((9,), edge, dtype=torch.int32)
    result = api.couple(
        a.to(DEVICE), torch.full((9,), 2.0**30 - 64, device=DEVICE), 1.0, center=-a.to(DEVICE), fraction_bits=0,
        impl="triton",
    )  # fmt: skip
    assert result.status.item() == OVERFLOW
    branch = torch.zeros(20, 100)
    branch[0, 0], branch[19, 99] = 2.0**40, float("nan")
    result = api.couple(_stream((20, 100)).to(DEVICE), branch.to(DEVICE), 0.5, fraction_bits=0, impl="triton")
    assert result.status.item() == NON_FINITE | OVERFLOW


def _strided(kind: str, make: object, shape: tuple[int, int]) -> torch.Tensor:
    rows, columns = shape
    if kind == "half":  # one of two streams that lie side by side
        return make((2, rows, 2 * columns))[..., columns:]
    if kind == "shifted":  # a pointer that is not a multiple of 16 bytes
        return make((2, rows, columns + 5))[..., 3:-2]
    if kind == "transposed":
        return make((2, columns, rows)).transpose(1, 2)
    if kind == "every second":
        return make((2, rows, 2 * columns))[..., ::2]
    return make((2, rows + 4, columns))[:, 1:-3]  # "rows": no 2-D view exists


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("columns", [16, 19])
@pytest.mark.parametrize("kind", ["half", "shifted", "transposed", "every second", "rows"])
def test_strides(kind: str, columns: int, inplace: bool) -> None:
    shape = (5, columns)
    a, center = _strided(kind, _stream, shape), _strided("half", _stream, shape)
    branch = _strided("transposed" if kind == "half" else kind, torch.randn, shape)
    for q in (1, 10):
        _check(a, branch, -1 / q, center, value_dtype=BF16, inplace=inplace)
        _check(a.contiguous(), branch, 1 / q, None, inplace=inplace)
    _check(_strided(kind, torch.randn, shape).to(FP32), branch.to(BF16), 0.5, None, None, FP16, inplace)


def test_expanded_inputs_and_strided_remainders() -> None:
    a = _stream((5, 19))
    branch = torch.randn(1, 19).expand(5, 19)
    _check(a, branch, 0.1, _stream((5, 1)).expand(5, 19))
    expected = api.couple(a, branch, 0.1, fraction_bits=20, impl="torch")
    remainder = expected.remainder.mT.contiguous().mT.to(DEVICE)
    result = api.uncouple(expected.y.to(DEVICE), branch.to(DEVICE), 0.1, remainder, fraction_bits=20, impl="triton")
    assert torch.equal(result.a.cpu(), a)
    with pytest.raises(RuntimeError):  # elements that share memory cannot be written, as in torch
        api.couple(_stream((1, 19)).expand(5, 19).to(DEVICE) if DEVICE == "cpu" else
                   _stream((1, 19)).to(DEVICE).expand(5, 19),
                   torch.zeros(5, 19, device=DEVICE), 1.0, fraction_bits=20, inplace=True, impl="triton")  # fmt: skip


@pytest.mark.parametrize("shape", [(0,), (0, 7), (3, 0), (2, 0, 5)])
@pytest.mark.parametrize("q", [1, 10])
@pytest.mark.parametrize("inplace", [False, True])
def test_empty(shape: tuple[int, ...], q: int, inplace: bool) -> None:
    empty = torch.empty(shape)
    _check(empty.int(), empty, 1 / q, empty.int(), value_dtype=BF16, inplace=inplace)
    _check(empty, empty, 0.5, empty, None, BF16, inplace)


SPECIAL = [0.0, -0.0, 1e-42, -1e-42, 6e-8, 65504.0, 65520.0, -65536.0, 3.38e38, 3.4e38, float("inf"), float("nan")]


@pytest.mark.parametrize("stream_dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("branch_dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("coefficient", [0.1, -0.5, 1 / 3, 2.5])
def test_float_streams(stream_dtype: torch.dtype, branch_dtype: torch.dtype, coefficient: float) -> None:
    values = itertools.cycle([None, FP32, FP16, BF16, torch.float64])
    for shape, inplace in zip([(5, 7), (3, 64), (2, 3, 11)], [False, True, False], strict=True):
        a, center = torch.randn(shape).to(stream_dtype), torch.randn(shape).to(stream_dtype)
        branch = torch.randn(shape).to(branch_dtype)
        _check(a, branch, coefficient, center, None, next(values), inplace)
        _check(a, branch, coefficient, None, None, next(values), inplace)
    special = torch.tensor(SPECIAL)
    a, branch = (each.flatten() for each in torch.meshgrid(special, special, indexing="ij"))
    _check(a.to(stream_dtype), branch.to(branch_dtype), coefficient, None, None, next(values))


@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_rounding_of_float_streams_on_random_bits(dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int32)
    bits[:1024] = (bits[:1024] & -0x10000) | 0x8000  # ties of the bf16 rounding
    bits[1024:1536] |= 0x7F800000  # NaNs, of every payload
    branch = bits.view(FP32)
    zeros = torch.zeros(4096, dtype=dtype)
    result = api.couple(zeros.to(DEVICE), branch.to(DEVICE), 0.5, value_dtype=dtype, impl="triton")
    _same((branch + 0.0).to(dtype), result.y, "stream")
    _same((branch + 0.0).to(dtype), result.value, "value")


def test_status_of_float_streams() -> None:
    for bad, flags in [(float("nan"), NON_FINITE), (float("inf"), NON_FINITE), (65519.0, 0), (65520.0, NON_FINITE)]:
        branch = torch.zeros(5, 7)
        branch[4, 6] = bad  # 65520 is the smallest that rounds to infinity in fp16
        result = api.couple(torch.zeros(5, 7, dtype=FP16, device=DEVICE), branch.to(DEVICE), 0.5, impl="triton")
        assert result.status.item() == flags
        assert result.checksum.item() == 0


def test_refused() -> None:
    double = torch.zeros(4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match="float64"):
        api.couple(double, double, 0.5, impl="triton")


def test_tensors_that_require_grad() -> None:
    branch = torch.randn(5, 7, device=DEVICE).to(BF16).requires_grad_()
    result = api.couple(_stream((5, 7)).to(DEVICE), branch, 0.5, fraction_bits=20, value_dtype=FP32, impl="triton")
    assert not result.value.requires_grad
