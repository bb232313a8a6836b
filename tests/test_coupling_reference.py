"""The torch reference of the coupling against a slow transcription of its definition in Python's own numbers."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meft_kernels.fixed_point import MAX_FRACTION_BITS, reciprocal
from meft_kernels.ops.coupling.api import couple, uncouple, use_triton
from meft_kernels.ops.coupling.packing import pack, packed_shape, remainder_bits, unpack
from meft_kernels.ops.coupling.types import INT_LIMIT, NON_FINITE, OVERFLOW

from .test_checksum import naive_checksum

QS = [1, 2, 3, 5, 7, 8, 10, 16, 100, 256, 257, 65537]
SHAPES = [(63, 100), (5, 7), (13,), (2, 3, 16), (3, 1), (0,), (0, 7), (3, 0)]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _stream(shape: tuple[int, ...], limit: int = 2**28) -> torch.Tensor:
    return torch.randint(-limit, limit, shape, dtype=torch.int32)


def naive_couple(
    a: list[int], branch: list[float], q: int, sign: int, center: list[int], k: int
) -> tuple[list[int], list[int]]:
    """``y`` and the remainders, element by element; Python's ``round`` is to nearest even, its ``//`` floors."""
    lanes = [(x - c, round(Fraction(f) * 2**k)) for x, f, c in zip(a, branch, center, strict=True)]
    return [f + sign * (d // q) for d, f in lanes], [d % q for d, _ in lanes]


def naive_pack(remainders: list[int], rows: int, columns: int, q: int) -> list[list[list[int]]]:
    """Bytes ``[plane][row][group]``: per part of at most 8 bits, eight neighbours make one little-endian number."""
    bits = math.ceil(math.log2(q))
    planes = []
    for low in range(0, bits, 8):
        width = min(8, bits - low)
        words = []
        for row in range(rows):
            line = remainders[row * columns : (row + 1) * columns]
            parts = [value // 2**low % 2**width for value in line]
            groups = [parts[start : start + 8] for start in range(0, columns, 8)]
            words.append([sum(part << (width * lane) for lane, part in enumerate(group)) for group in groups])
        planes += [[[word // 256**byte % 256 for word in row] for row in words] for byte in range(width)]
    return planes


def _against_naive(
    a: torch.Tensor, branch: torch.Tensor, q: int, sign: int, center: torch.Tensor | None, k: int, inplace: bool = False
) -> None:
    zeros = [0] * a.numel()
    centers = zeros if center is None else center.flatten().tolist()
    y, remainders = naive_couple(a.flatten().tolist(), branch.double().flatten().tolist(), q, sign, centers, k)
    stream = a.clone()
    result = couple(stream, branch, sign / q, center=center, fraction_bits=k, inplace=inplace, impl="torch")
    assert (result.y is stream) is inplace
    assert inplace or torch.equal(stream, a)
    assert result.y.dtype == torch.int32
    assert result.y.shape == a.shape
    assert result.y.flatten().tolist() == y
    assert result.status.item() == 0
    assert result.checksum.item() == naive_checksum(result.y)
    assert result.checksum.dtype == torch.int64
    assert result.value is None
    if q == 1:
        assert result.remainder is None
    else:
        rows, columns = math.prod(a.shape[:-1]), a.shape[-1]
        assert result.remainder is not None
        assert result.remainder.dtype == torch.uint8
        assert result.remainder.nbytes == math.ceil(math.log2(q)) * rows * math.ceil(columns / 8)
        assert result.remainder.tolist() == naive_pack(remainders, rows, columns, q)
    inverse = uncouple(
        result.y, branch, sign / q, result.remainder, center=center, fraction_bits=k, inplace=inplace, impl="torch"
    )
    assert (inverse.a is result.y) is inplace
    assert inverse.a.dtype == torch.int32
    assert torch.equal(inverse.a, a)
    assert inverse.checksum.item() == naive_checksum(a)


@pytest.mark.parametrize("q", QS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("centred", [False, True])
def test_every_q(q: int, sign: int, centred: bool) -> None:
    branch = torch.randn(6, 21)
    _against_naive(_stream((6, 21)), branch, q, sign, _stream((6, 21)) if centred else None, 20)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("q", [1, 8, 10, 257])
@pytest.mark.parametrize("inplace", [False, True])
def test_every_shape(shape: tuple[int, ...], q: int, inplace: bool) -> None:
    _against_naive(_stream(shape), torch.randn(shape).bfloat16(), q, 1, _stream(shape), 20, inplace)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [0, 8, 20, MAX_FRACTION_BITS])
def test_every_branch_dtype_and_its_rounding(dtype: torch.dtype, k: int) -> None:
    ties = torch.arange(-41, 42, dtype=torch.float64) / 4 * 2.0**-k  # halves round to even, quarters to nearest
    branch = torch.cat([ties, torch.randn(45, dtype=torch.float64).clamp(-3, 3)]).to(dtype)
    _against_naive(_stream(branch.shape, 2**20), branch, 10, -1, None, k)


@pytest.mark.parametrize("q", [2, 3, 10, 2**30, 2**31 - 1])
def test_extremes(q: int) -> None:
    edge = INT_LIMIT - 1
    points = torch.tensor([-edge, 1 - edge, -q, -q - 1, -1, 0, 1, q - 1, q, edge - 1, edge]).clamp(-edge, edge).int()
    a, center = (each.flatten() for each in torch.meshgrid(points, points, indexing="ij"))
    _against_naive(a, torch.zeros(a.shape), q, 1, center, 20)


@pytest.mark.parametrize("inplace", [False, True])
def test_strided(inplace: bool) -> None:
    whole = _stream((4, 6, 40))
    before = whole.clone()
    a, center = whole[..., 20:], whole[..., :20]
    branch = torch.randn(4, 20, 6).transpose(1, 2)
    branch_before = branch.clone()
    options = {"center": center, "fraction_bits": 20, "inplace": inplace, "impl": "torch"}
    result = couple(a, branch, 0.1, value_dtype=torch.float16, **options)
    lists = [each.flatten().tolist() for each in (before[..., 20:], branch_before, before[..., :20])]
    y, _ = naive_couple(lists[0], lists[1], 10, 1, lists[2], 20)
    assert result.y.flatten().tolist() == y
    assert torch.equal(whole[..., :20], before[..., :20])
    assert torch.equal(a, result.y if inplace else before[..., 20:])
    assert result.value is not None
    assert result.value.is_contiguous()
    assert torch.equal(uncouple(result.y, branch, 0.1, result.remainder, **options).a, before[..., 20:])
    assert torch.equal(whole, before)
    assert torch.equal(branch, branch_before)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_round_trip_property(data: st.DataObject) -> None:
    q = data.draw(st.one_of(st.sampled_from(QS), st.integers(1, 2**31 - 1)))
    k = data.draw(st.integers(0, MAX_FRACTION_BITS))
    rows, columns = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 19))
    count = rows * columns
    # A quarter of the range each keeps every sum inside, whatever q is.
    numbers = st.lists(st.integers(-INT_LIMIT // 4, INT_LIMIT // 4), min_size=count, max_size=count)
    limit = 2.0 ** (28 - k)
    floats = st.lists(st.floats(-limit, limit, width=32), min_size=count, max_size=count)
    a = torch.tensor(data.draw(numbers), dtype=torch.int32).view(rows, columns)
    center = (
        torch.tensor(data.draw(numbers), dtype=torch.int32).view(rows, columns) if data.draw(st.booleans()) else None
    )
    branch = torch.tensor(data.draw(floats), dtype=torch.float32).view(rows, columns)
    _against_naive(a, branch, q, data.draw(st.sampled_from([1, -1])), center, k, data.draw(st.booleans()))


def test_layout_worked_by_hand() -> None:
    assert remainder_bits(1) == 0
    # 1 + (2 << 3) + (3 << 6) + (4 << 9) + (1 << 15) + (2 << 18) + (3 << 21) = 0x6888D1; the ninth opens a new group.
    packed = pack(torch.tensor([[1, 2, 3, 4, 0, 1, 2, 3, 4]], dtype=torch.int32), 5)
    assert packed.tolist() == [[[0xD1, 4]], [[0x88, 0]], [[0x68, 0]]]
    # Nine bits: the low bytes of the eight columns come first, then one byte of ninth bits.
    packed = pack(torch.tensor([[1, 256, 257, 0, 0, 0, 0, 300]], dtype=torch.int32), 301)
    assert packed.flatten().tolist() == [1, 0, 1, 0, 0, 0, 0, 300 - 256, 0b10000110]


@pytest.mark.parametrize("q", [*QS[1:], 4, 9, 128, 129, 2**16, 2**31 - 1])
def test_remainders_take_exactly_the_bits_they_need(q: int) -> None:
    bits = math.ceil(math.log2(q))
    assert remainder_bits(q) == bits
    assert packed_shape((3, 5, 17), q) == (bits, 15, 3)
    values = torch.randint(0, q, (3, 5, 17), dtype=torch.int64)
    values[0, 0, :2] = torch.tensor([0, q - 1])
    packed = pack(values.int(), q)
    assert packed.nbytes == bits * 15 * 3
    assert torch.equal(unpack(packed, q, (3, 5, 17)), values.int())


INFINITY = float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("bad", "flags"),
    [
        (float("nan"), NON_FINITE | OVERFLOW),
        (INFINITY, NON_FINITE | OVERFLOW),
        (-INFINITY, NON_FINITE | OVERFLOW),
        (1024.0, OVERFLOW),
        (-1024.0, OVERFLOW),
        (1020.0, 0),
        (-1020.0, 0),
    ],
)
def test_status_of_the_branch(dtype: torch.dtype, bad: float, flags: int) -> None:
    for where in (0, 17, 34):
        branch = torch.zeros(5, 7)
        branch.view(-1)[where] = bad
        result = couple(torch.zeros(5, 7, dtype=torch.int32), branch.to(dtype), 0.5, fraction_bits=20)
        assert result.status.item() == flags
        assert (result.status.dtype, result.status.shape) == (torch.int32, ())


def test_status_of_a_branch_that_overflows_when_scaled() -> None:
    a = torch.zeros(3, dtype=torch.int32)
    assert couple(a, torch.full((3,), 3e38), 1.0, fraction_bits=4).status.item() == NON_FINITE | OVERFLOW


@pytest.mark.parametrize("sign", [1, -1])
def test_status_of_the_sum(sign: int) -> None:
    edge = sign * (INT_LIMIT - 1)
    a = torch.tensor([0, 0, edge], dtype=torch.int32)
    assert couple(a, torch.zeros(3), 1.0, fraction_bits=0).status.item() == 0
    assert couple(a, torch.tensor([0.0, 0.0, sign]), 1.0, fraction_bits=0).status.item() == OVERFLOW
    # The farthest that int32 can be driven wraps to the other side of the limit, never back inside.
    farthest = torch.full((3,), sign * (2.0**30 - 64))
    assert couple(a, farthest, 1.0, center=-a, fraction_bits=0).status.item() == OVERFLOW


@pytest.mark.parametrize("value_dtype", FLOATS)
@pytest.mark.parametrize("inplace", [False, True])
def test_value_copies(value_dtype: torch.dtype, inplace: bool) -> None:
    a = _stream((5, 7), 2**29)  # past 2^24, so fp32 has to round
    result = couple(a.clone(), torch.randn(5, 7), 0.1, fraction_bits=12, value_dtype=value_dtype, inplace=inplace)
    wide = torch.float64 if value_dtype == torch.float64 else torch.float32
    assert result.value is not None
    assert torch.equal(result.value, (result.y.to(wide) * 2.0**-12).to(value_dtype))
    back = uncouple(result.y, torch.randn(5, 7), 1.0, fraction_bits=12, value_dtype=value_dtype, inplace=inplace)
    assert back.value is not None
    assert torch.equal(back.value, (back.a.to(wide) * 2.0**-12).to(value_dtype))
    for stream in (torch.randn(7, 5).t(), torch.randn(5, 7)):  # a copy even where the dtype stays
        lane = couple(stream.to(value_dtype), torch.zeros(5, 7), 1.0, value_dtype=value_dtype, inplace=inplace)
        assert lane.value is not None
        assert torch.equal(lane.value, lane.y)
        assert lane.value.is_contiguous()
        assert lane.value.data_ptr() != lane.y.data_ptr()


# Float streams: one unit roundoff u = eps / 2 for each operation in the working precision (fp32, or fp64 if a tensor
# is), and one of the stream's dtype for the result. Forward: difference, coefficient's conversion and product err by 3u
# of |coefficient * (a - c)|, the sum by u of itself; inverse: the same with division. 1.01 covers products of errors,
# `tiny` (half the smallest subnormal) results that underflow. The truth is exact: fractions.
def _bounds(stream: torch.dtype, branch: torch.dtype) -> tuple[float, float, float]:
    work = torch.float64 if torch.float64 in (stream, branch) else torch.float32
    info = torch.finfo(stream)
    return torch.finfo(work).eps / 2 * 1.01, info.eps / 2 * 1.01, info.smallest_normal * info.eps / 2


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("branch_dtype", FLOATS)
@pytest.mark.parametrize("coefficient", [0.1, -0.5, 1 / 3, 2.5])
@pytest.mark.parametrize("centred", [False, True])
def test_float_streams(dtype: torch.dtype, branch_dtype: torch.dtype, coefficient: float, centred: bool) -> None:
    a, branch = torch.randn(5, 19).to(dtype), torch.randn(5, 19).to(branch_dtype)
    center = torch.randn(5, 19).to(dtype) if centred else None
    lam = Fraction(coefficient)
    work, own, tiny = _bounds(dtype, branch_dtype)
    inplace = centred
    result = couple(a.clone(), branch, coefficient, center=center, inplace=inplace)
    assert (result.y.dtype, result.remainder, result.status.item(), result.checksum.item()) == (dtype, None, 0, 0)
    y = result.y.clone()
    inverse = uncouple(result.y, branch, coefficient, center=center, inplace=inplace)
    assert (inverse.a.dtype, inverse.checksum.item()) == (dtype, 0)
    centers = center.double().flatten().tolist() if center is not None else [0.0] * a.numel()
    columns = (each.double().flatten().tolist() for each in (a, branch, y, inverse.a))
    for old, f, new, back, c in zip(*columns, centers, strict=True):
        step = lam * (Fraction(old) - Fraction(c))
        truth = Fraction(f) + step
        error = float(3 * abs(step) + abs(truth)) * work + float(abs(truth)) * own + tiny
        assert abs(float(Fraction(new) - truth)) <= error
        step = (Fraction(new) - Fraction(f)) / lam
        truth = Fraction(c) + step
        inverse_error = float(3 * abs(step) + abs(truth)) * work + float(abs(truth)) * own + tiny
        assert abs(float(Fraction(back) - truth)) <= inverse_error
        # Hence the round trip: the forward's error comes back divided by the coefficient.
        assert abs(back - old) <= inverse_error + error / abs(coefficient)


def test_status_of_float_streams() -> None:
    zeros = torch.zeros(3, dtype=torch.float16)
    cases = [(65519.0, 0), (65520.0, NON_FINITE), (INFINITY, NON_FINITE), (float("nan"), NON_FINITE)]
    for value, flags in cases:  # 65520 is the smallest that rounds to infinity in fp16
        assert couple(zeros, torch.tensor([0.0, value, 0.0]), 0.5).status.item() == flags


@pytest.mark.parametrize("q", [*QS, 49, 1000003])
def test_reciprocal_takes_what_double_rounding_leaves(q: int) -> None:
    assert reciprocal(1 / q) == (q, 1)
    assert reciprocal(-1 / q) == (q, -1)


@pytest.mark.parametrize(
    ("coefficient", "nearest"),
    [(0.3, "0.333"), (0.29, "0.25"), (0.7, "0.5"), (-0.7, "-0.5"), (0.9, "1.0"), (1.5, "1.0"), (-2.0, "-1.0"),
     (0.1 + 1e-6, "0.1 "), (0.0, "no inverse")],
)  # fmt: skip
def test_other_coefficients_name_the_nearest(coefficient: float, nearest: str) -> None:
    with pytest.raises(ValueError, match="1/q") as raised:
        reciprocal(coefficient)
    assert nearest in str(raised.value)


@pytest.mark.parametrize("coefficient", [float("nan"), INFINITY, 1e-30])
def test_hopeless_coefficients(coefficient: float) -> None:
    with pytest.raises(ValueError, match="1/q"):
        reciprocal(coefficient)


A = torch.arange(12, dtype=torch.int32).view(3, 4)
F = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "1/q", {"coefficient": 0.3}),
        (ValueError, "branch is", {"branch": torch.ones(4, 3)}),
        (ValueError, "center is", {"center": A[:2]}),
        (TypeError, "branch must be floating", {"branch": A}),
        (TypeError, "center is torch.float32", {"center": F}),
        (ValueError, "fraction_bits in", {"fraction_bits": None}),
        (ValueError, "fraction_bits in", {"fraction_bits": -1}),
        (ValueError, "fraction_bits in", {"fraction_bits": MAX_FRACTION_BITS + 1}),
        (ValueError, "impl must be", {"impl": "cuda", "coefficient": 1.0}),
        (ValueError, "at least one dimension", {"stream": torch.tensor(1, dtype=torch.int32), "branch": F[0, 0]}),
        (TypeError, "int32", {"stream": A.long()}),
        (ValueError, "belongs to int32", {"stream": F}),
        (ValueError, "no inverse", {"stream": F, "coefficient": 0.0, "fraction_bits": None}),
    ],
)
def test_argument_errors_of_both(error: type[Exception], message: str, changes: dict[str, object]) -> None:
    arguments = {"stream": A, "branch": F, "coefficient": 0.5, "fraction_bits": 8, "impl": "auto"} | changes
    stream = arguments.pop("stream").clone()
    branch, coefficient = arguments.pop("branch"), arguments.pop("coefficient")
    before = stream.clone()
    for function in (couple, uncouple):
        with pytest.raises(error, match=message):
            function(stream, branch, coefficient, inplace=True, **arguments)
        assert torch.equal(stream, before)


@pytest.mark.parametrize(
    ("error", "coefficient", "remainder"),
    [
        (ValueError, 0.1, None),
        (ValueError, 0.1, torch.zeros(3, 3, 1, dtype=torch.uint8)),
        (ValueError, 0.1, torch.zeros(4, 3, 2, dtype=torch.uint8)),
        (ValueError, 1.0, torch.zeros(4, 3, 1, dtype=torch.uint8)),
        (TypeError, 0.1, torch.zeros(4, 3, 1, dtype=torch.int32)),
    ],
)
def test_wrong_remainders(error: type[Exception], coefficient: float, remainder: torch.Tensor | None) -> None:
    stream = A.clone()
    with pytest.raises(error, match="remainders"):
        uncouple(stream, F, coefficient, remainder, fraction_bits=8, inplace=True)
    assert torch.equal(stream, A)


def test_remainders_of_a_float_stream_are_refused() -> None:
    with pytest.raises(ValueError, match="remainders"):
        uncouple(F.clone(), F, 0.5, torch.zeros(1, 3, 1, dtype=torch.uint8))


def test_the_choice_of_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meft_kernels.ops.coupling.api._triton_installed", lambda: False)
    assert not any(use_triton(impl, A, F) for impl in ("auto", "torch"))
    with pytest.raises(RuntimeError, match="not installed"):
        use_triton("triton", A, F)


def test_no_gradient_is_recorded() -> None:
    branch = F.clone().requires_grad_()
    for stream, bits in ((A, 8), (F, None)):
        result = couple(stream, branch, 0.5, fraction_bits=bits, value_dtype=torch.float32)
        assert not any(each is not None and each.requires_grad for each in result)


def test_lanes_chain() -> None:
    """Many lanes, as a model runs them: two streams in turn, there and back, bit for bit."""
    x1, x2 = _stream((9, 20)), _stream((9, 20))
    saved = []
    one, two = x1.clone(), x2.clone()
    for q, sign in itertools.islice(itertools.cycle([(1, 1), (10, -1), (8, 1), (3, -1)]), 24):
        branch = torch.tanh(two.float() * 2.0**-20)
        y = couple(one, branch, sign / q, center=two, fraction_bits=20)
        assert y.status.item() == 0
        saved.append((q, sign, y.remainder))
        one, two = two, y.y
    for q, sign, remainder in reversed(saved):
        center, y_stream = one, two
        branch = torch.tanh(center.float() * 2.0**-20)
        one = uncouple(y_stream, branch, sign / q, remainder, center=center, fraction_bits=20).a
        two = center
    assert torch.equal(one, x1)
    assert torch.equal(two, x2)


@pytest.mark.parametrize("q", [1, 2, 8, 10, 256, 257])
@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 1, 0)])
def test_any_order_of_memory(order: tuple[int, ...], q: int) -> None:
    shape = (4, 6, 8)
    back = tuple(order.index(dim) for dim in range(3))
    a, center = (_stream(tuple(shape[dim] for dim in order)).permute(back) for _ in range(2))
    branch = torch.randn(tuple(shape[dim] for dim in order)).permute(back)
    assert a.shape == branch.shape == shape
    _against_naive(a, branch, q, -1, center, 20)
    stream = a.clone(memory_format=torch.preserve_format)
    done = couple(stream, branch, 1 / q, center=center, fraction_bits=20, inplace=True, impl="torch")
    assert torch.equal(
        uncouple(done.y, branch, 1 / q, done.remainder, center=center, fraction_bits=20, inplace=True, impl="torch").a,
        a,
    )
