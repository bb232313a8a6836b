"""The Triton adapter kernels against the torch reference. Run by ``test_adapter_triton``, see ``check_coupling``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from meft_kernels.fixed_point import reciprocal
from meft_kernels.ops.adapter import api, triton_parts
from meft_kernels.ops.adapter import triton_backward as backward
from meft_kernels.ops.adapter import triton_forward as kernels
from meft_kernels.ops.adapter.dropout import drop_threshold, keep_mask, random_bits
from meft_kernels.ops.adapter.types import AdapterWeights
from meft_kernels.ops.coupling.checksum import checksum
from meft_kernels.ops.coupling.packing import pack
from meft_kernels.ops.coupling.types import NON_FINITE, OVERFLOW, Coupled

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
DTYPES = [FP32, FP16, BF16]
SHAPES = [(63, 100, 3), (63, 384, 8), (5, 128, 17), (63, 100, 64), (1, 7, 1), (35, 64, 256)]
ACTIVATIONS = ["gelu", "gelu_new", "relu", "silu"]


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN or the largest integer
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def _weights(width: int, rank: int, dtype: torch.dtype) -> AdapterWeights:
    """Both products keep the scale of their input, so that no term hides behind another."""
    shapes = [(rank, width), (rank,), (width, rank), (width,)]
    scales = [width**-0.5, 0.5, rank**-0.5, 0.5]
    return AdapterWeights(
        *((torch.randn(shape) * scale).to(dtype).to(DEVICE) for shape, scale in zip(shapes, scales, strict=True))
    )


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def _stream(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(-(2**26), 2**26, shape, dtype=torch.int32).to(DEVICE)


def _close(name: str, truth: torch.Tensor, reference: torch.Tensor, actual: torch.Tensor, unit: torch.dtype) -> None:
    """``actual`` errs (RMS) no more than torch in the same dtype, plus four roundings of it.

    u is the unit roundoff of the dtype of x, eps / 2. Torch and kernel round the output (u relative) and z (u, carried
    over by the second product); those errors may differ in sign, which RMS does not see, but they are drawn anew: 2 u.
    Another 2 u are for fp32, where the hardware's exponential and division err by up to 2 ulp. The order of sums adds
    about sqrt(K) 2^-24 to both. A wrong element, mask or scale is hundreds of u.
    """
    assert actual.shape == truth.shape, name
    assert torch.isfinite(actual).all(), f"{name}: not all written"

    def rms(tensor: torch.Tensor) -> float:
        return tensor.double().cpu().square().mean().sqrt().item()

    truth = truth.cpu()
    allowed = rms(reference.cpu().double() - truth) + 4 * torch.finfo(unit).eps / 2 * rms(truth)
    error = rms(actual.cpu().double() - truth)
    assert error <= allowed, f"{name}: {error} > {allowed}"


def _in_double(x: torch.Tensor) -> torch.Tensor:
    return x.detach().double().cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "rank"), SHAPES)
def test_outputs_and_gradients(rows: int, width: int, rank: int, dtype: torch.dtype) -> None:
    place = SHAPES.index((rows, width, rank)) + DTYPES.index(dtype)
    activation, dropout = ACTIVATIONS[place % 4], (0.0, 0.25)[place // 4 % 2 ^ place % 2]
    drop = {"dropout": dropout, "seed": 2**40 + 17}
    x, dy, into = (_random((rows, width), dtype) for _ in range(3))
    weights = _weights(width, rank, dtype)
    wide = AdapterWeights(*map(_in_double, weights))
    host = AdapterWeights(*(weight.cpu() for weight in weights))
    before = [tensor.clone() for tensor in (x, dy, *weights)]

    truth = api.adapter_forward(_in_double(x), wide, activation, **drop)
    plain = api.adapter_forward(x.cpu(), host, activation, **drop)
    actual = api.adapter_forward(x, weights, activation, impl="triton", **drop)
    assert actual.dtype == dtype
    _close("adapter", truth, plain, actual, dtype)

    truth, true_gradients = api.adapter_backward(_in_double(dy), _in_double(x), wide, activation, **drop)
    plain, gradients = api.adapter_backward(dy.cpu(), x.cpu(), host, activation, **drop)
    dx, found = api.adapter_backward(dy, x, weights, activation, impl="triton", **drop)
    assert dx.dtype == dtype
    _close("dx", truth, plain, dx, dtype)
    for name, *three in zip(AdapterWeights._fields, true_gradients, gradients, found, strict=True):
        assert three[2].dtype == dtype
        _close(name, *three, dtype)
    added = into.clone()
    same, again = api.adapter_backward(dy, x, weights, activation, dx_into=added, residual=True, impl="triton", **drop)
    assert same is added
    truth, plain = truth + _in_double(dy) + _in_double(into), plain + dy.cpu() + into.cpu()
    _close("dx_into", truth, plain, added, dtype)
    assert all(map(torch.equal, found, again)), "gradients must repeat"
    assert all(map(torch.equal, before, (x, dy, *weights))), "an input was written"


def _branch(x: torch.Tensor, weights: AdapterWeights, activation: str, k: int, **options: object) -> torch.Tensor:
    """The branch's integers: what is left of a step when the stream is 0 and q = 1."""
    nothing = torch.zeros(x.shape, dtype=torch.int32, device=DEVICE)
    return api.adapter_couple(nothing, x, weights, activation, 1.0, fraction_bits=k, impl="triton", **options).y


def _check_integers(
    branch: torch.Tensor, a: torch.Tensor, center: torch.Tensor | None, coefficient: float, got: Coupled
) -> None:
    q, sign = reciprocal(coefficient)
    d = a - center if center is not None else a
    t = torch.div(d, q, rounding_mode="floor")
    assert torch.equal(got.y, branch + sign * t)
    assert got.checksum.item() == checksum(got.y.cpu()).item()
    assert got.status.item() == 0
    if q > 1:
        assert torch.equal(got.remainder.cpu(), pack((d - q * t).cpu(), q))
    else:
        assert got.remainder is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "rank"), [(35, 100, 3), (9, 384, 8), (5, 64, 64), (17, 13, 17)])
def test_integers(rows: int, width: int, rank: int, dtype: torch.dtype) -> None:
    x, dy, weights = _random((rows, width), dtype), _random((rows, width), dtype), _weights(width, rank, dtype)
    k = 16
    for (coefficient, centred, inplace), activation in zip(
        [(1.0, False, True), (-1 / 8, True, True), (0.1, True, False), (-1 / 257, False, False)],
        ACTIVATIONS,
        strict=True,
    ):
        options = {"residual": centred, "dropout": 0.1 if inplace else 0.0, "seed": -7}
        branch = _branch(x, weights, activation, k, **options)
        host = AdapterWeights(*(weight.cpu() for weight in weights))
        plain = api.adapter_forward(x.cpu(), host, activation, dropout=options["dropout"], seed=-7) + x.cpu() * centred
        wanted = torch.round(plain.double() * 2**k)
        # One for the rounding to integers; the branch is below 16, and off by a few roundings of that.
        assert (wanted - branch.cpu()).abs().max() <= 1 + 2**k * 64 * torch.finfo(dtype).eps
        a, center = _stream(x.shape), _stream(x.shape) if centred else None
        options |= {"center": center, "fraction_bits": k, "value_dtype": dtype, "inplace": inplace, "impl": "triton"}
        got = api.adapter_couple(a.clone(), x, weights, activation, coefficient, **options)
        _check_integers(branch, a, center, coefficient, got)
        assert torch.equal(got.value, (got.y.to(FP32) * 2.0**-k).to(dtype))

        undone = api.adapter_uncouple(got.y.clone(), x, weights, activation, coefficient, got.remainder, **options)
        assert torch.equal(undone.a, a)
        assert undone.checksum.item() == checksum(a.cpu()).item()
        assert torch.equal(undone.value, (a.to(FP32) * 2.0**-k).to(dtype))

        y, into = got.y.clone(), _random(x.shape, dtype)
        skip = {"residual": options["residual"], "dropout": options["dropout"], "seed": -7, "impl": "triton"}
        dx, gradients = api.adapter_backward(dy, x, weights, activation, dx_into=into.clone(), **skip)
        fused = api.adapter_uncouple_backward(
            y, dy, x, weights, activation, coefficient, got.remainder, dx_into=into, **options
        )
        assert (fused.a is y) is inplace and fused.dx is into
        assert torch.equal(fused.a, a) and torch.equal(fused.value, undone.value)
        assert fused.checksum.item() == undone.checksum.item()
        assert torch.equal(fused.dx, dx)
        assert all(map(torch.equal, fused.gradients, gradients))
        if inplace and center is not None:
            fused = api.adapter_uncouple_backward(
                got.y.clone(), dy, x, weights, activation, coefficient, got.remainder, through_center=True, **options
            )
            alone, _ = api.adapter_backward(dy, x, weights, activation, **skip)
            unit = torch.finfo(dtype).eps
            expected = alone.float() - coefficient * dy.float()
            assert ((fused.dx.float() - expected).abs() <= 2 * unit * (alone.float().abs() + dy.float().abs())).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stream_dtype", DTYPES)
def test_float_streams(dtype: torch.dtype, stream_dtype: torch.dtype) -> None:
    x, weights = _random((2, 9, 72), dtype), _weights(72, 8, dtype)
    branch = api.adapter_forward(x, weights, "silu", impl="triton")
    for coefficient, centred in [(0.1, False), (-0.5, True)]:
        a, center = _random(x.shape, stream_dtype), _random(x.shape, stream_dtype) if centred else None
        options = {"center": center, "value_dtype": FP16, "impl": "triton"}
        got = api.adapter_couple(a, x, weights, "silu", coefficient, **options)
        wide = a.float() - center.float() if centred else a.float()
        expected = (branch.float() + wide * torch.tensor(coefficient, dtype=FP32)).to(stream_dtype)
        assert torch.equal(got.y, expected)
        assert torch.equal(got.value, expected.to(FP16))
        assert got.status.item() == 0 and got.checksum.item() == 0 and got.remainder is None
        undone = api.adapter_uncouple(got.y, x, weights, "silu", coefficient, **options)
        fused = api.adapter_uncouple_backward(got.y, x, x, weights, "silu", coefficient, **options)
        assert torch.equal(undone.a, fused.a)
        # y was rounded once, u * |y|, which the division by the coefficient makes larger; a is rounded once more.
        unit = torch.finfo(stream_dtype).eps
        bound = unit * ((got.y.float().abs() + branch.float().abs()) / abs(coefficient) + a.float().abs() + 4)
        assert ((undone.a.float() - a.float()).abs() <= bound).all()


def _strided(kind: str, make: object, width: int) -> torch.Tensor:
    if kind == "half":
        return make((2, 5, 2 * width))[..., width:]
    if kind == "shifted":
        return make((2, 5, width + 5))[..., 3:-2]
    if kind == "transposed":
        return make((2, width, 5)).transpose(1, 2)
    return make((2, 9, width))[:, 1:-3]  # no 2-D view exists


@pytest.mark.parametrize("kind", ["half", "shifted", "transposed", "rows"])
@pytest.mark.parametrize("width", [64, 19])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_strides(kind: str, width: int, dtype: torch.dtype) -> None:
    x, dy, into, residual = (_strided(kind, lambda shape: _random(shape, dtype), width) for _ in range(4))
    a, center = (_strided(kind, _stream, width) for _ in range(2))
    weights = _weights(width, 8, dtype)
    weights = weights._replace(up=weights.up.mT.contiguous().mT)
    options = {"fraction_bits": 14, "value_dtype": dtype, "impl": "triton"}
    dense = [tensor.contiguous() for tensor in (a, x, center, dy, residual)]
    expected = api.adapter_couple(dense[0].clone(), dense[1], weights, "gelu", 0.1, center=dense[2], **options)
    version = a._version
    got = api.adapter_couple(a, x, weights, "gelu", 0.1, center=center, inplace=True, **options)
    assert got.y is a and a._version > version
    assert all(map(torch.equal, expected, got))
    sums = [into.clone(memory_format=torch.contiguous_format), into]
    plain = api.adapter_uncouple_backward(
        expected.y, dense[3], dense[1], weights, "gelu", 0.1, expected.remainder, center=dense[2], dx_into=sums[0],
        **options,
    )  # fmt: skip
    got = api.adapter_uncouple_backward(
        a, dy, x, weights, "gelu", 0.1, got.remainder, center=center, dx_into=into, inplace=True, **options
    )
    assert torch.equal(got.a, dense[0]) and torch.equal(into, sums[0]) and got.dx is into
    assert all(map(torch.equal, plain.gradients, got.gradients))
    out = api.parallel_adapter(x, residual, weights, "gelu", impl="triton")
    assert torch.equal(out, api.parallel_adapter(dense[1], dense[4], weights, "gelu", impl="triton"))


def test_autograd() -> None:
    x, residual, weights = _random((7, 48), FP32), _random((7, 48), FP32), _weights(48, 8, FP32)
    results = []
    for impl, dtype in (("torch", FP64), ("torch", FP32), ("triton", FP32)):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (x, residual, *weights)]
        out = api.parallel_adapter(*leaves[:2], AdapterWeights(*leaves[2:]), "gelu", dropout=0.3, seed=5, impl=impl)
        saved = {id(leaf) for leaf in leaves} - {id(leaves[1])}
        assert {id(tensor) for tensor in out.grad_fn.saved_tensors} == saved
        out.square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
        with pytest.raises(RuntimeError, match="second time"):
            out.sum().backward()
    for name, *three in zip(("out", "dx", "residual", *weights._fields), *results, strict=True):
        _close(name, *(tensor.detach() for tensor in three), FP32)
    frozen = x.clone().requires_grad_()
    api.adapter_forward(frozen, weights, "gelu", impl="triton").sum().backward()
    assert frozen.grad is not None


def test_weights_in_fp32_beside_narrow_hidden_states() -> None:
    for dtype in (FP16, BF16):
        x, dy, weights = _random((40, 72), dtype), _random((40, 72), dtype), _weights(72, 9, FP32)
        narrow = AdapterWeights(*(weight.to(dtype) for weight in weights))
        out = [api.adapter_forward(x, each, "gelu", impl="triton") for each in (weights, narrow)]
        assert torch.equal(*out)
        dx, gradients = api.adapter_backward(dy, x, weights, "gelu", impl="triton")
        dx_narrow, rounded = api.adapter_backward(dy, x, narrow, "gelu", impl="triton")
        assert torch.equal(dx, dx_narrow)
        assert all(gradient.dtype == FP32 for gradient in gradients)
        assert all(map(torch.equal, (gradient.to(dtype) for gradient in gradients), rounded))


@triton.jit
def _random_kernel(seed: tl.int64, counter, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, tl.randint(seed, tl.load(counter + index)).to(tl.int64))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**33 + 5, 2**62 + 1, -5, -(2**63)])
def test_random_bits(seed: int) -> None:
    counter = torch.arange(64, dtype=torch.int64) * 1234567890123  # past 2^32
    out = torch.empty(64, dtype=torch.int64, device=DEVICE)
    _random_kernel[(1,)](seed, counter.to(DEVICE), out, SIZE=64)
    assert torch.equal(out.cpu(), random_bits(seed, counter))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [16, 19])
def test_the_mask(dtype: torch.dtype, rank: int) -> None:
    # A bottleneck of ones that the second product hands on as it is: the output is the mask.
    ones, zeros, identity = torch.ones(rank), torch.zeros(rank), torch.eye(rank)
    weights = AdapterWeights(*(each.to(dtype).to(DEVICE) for each in (identity * 0, ones, identity, zeros)))
    x = _random((70, rank), dtype)
    for dropout, seed in [(0.5, 3), (0.75, 2**64 - 9)]:
        out = api.adapter_forward(x, weights, "relu", dropout=dropout, seed=seed, impl="triton")
        keep = keep_mask(x.shape, dropout, seed, torch.device("cpu"))
        assert torch.equal(out.cpu().float(), keep / (1 - dropout))
        # Backward: with a gradient of ones, d down_bias sums the same mask over the rows.
        _, gradients = api.adapter_backward(
            torch.ones_like(x), x, weights, "relu", dropout=dropout, seed=seed, impl="triton"
        )
        assert torch.equal(gradients.down_bias.cpu().float(), (keep / (1 - dropout)).sum(0))
    assert torch.equal(api.adapter_forward(x, weights, "relu", impl="triton"), torch.ones_like(x))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_twenty_runs_are_the_same_bits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(backward, "MIN_ROWS", 16)  # several splits
    x, dy, weights, y = _random((36, 24), dtype), _random((36, 24), dtype), _weights(24, 5, dtype), _stream((36, 24))
    runs = []
    for _ in range(20):
        dx, gradients = api.adapter_backward(dy, x, weights, "gelu", dropout=0.1, seed=1, impl="triton")
        done = api.adapter_uncouple_backward(y, dy, x, weights, "gelu", 1.0, fraction_bits=14, impl="triton")
        runs.append([dx, *gradients, done.a, done.dx, *done.gradients, done.checksum])
    assert all(torch.equal(first, other) for run in runs[1:] for first, other in zip(runs[0], run, strict=True))


def test_splits_come_from_the_shape() -> None:
    tile = backward.WEIGHT_TILES[64]
    for rows, width in itertools.product([1, 63, 1000, 2**20], [7, 768, 16384]):
        splits, split_rows = backward.row_splits(rows, width, tile)
        assert split_rows % tile.block_m == 0 and (splits - 1) * split_rows < rows <= splits * split_rows


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_tiles(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Given the branch, integers do not depend on tiles. (Another BLOCK_K sums in another order: floats may differ.)"""
    x, a, weights = _random((37, 128), dtype), _stream((37, 128)), _weights(128, 16, dtype)
    for block_m, block_k, block_h in [(16, 16, 16), (64, 32, 64), (32, 64, 16), (16, 64, 32)]:
        tile = triton_parts.Tile(block_m, block_k, block_h, 4, 1)
        for table in ("TILES", "TILES_FP32"):
            monkeypatch.setattr(triton_parts, table, {16: tile})
        branch = _branch(x, weights, "gelu", 16)
        got = api.adapter_couple(a, x, weights, "gelu", 0.1, fraction_bits=16, impl="triton")
        _check_integers(branch, a, None, 0.1, got)
        undone = api.adapter_uncouple(got.y, x, weights, "gelu", 0.1, got.remainder, fraction_bits=16, impl="triton")
        assert torch.equal(undone.a, a)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 7)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_empty(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weights = _random(shape, dtype), _weights(shape[-1], 3, dtype)
    a = torch.empty(shape, dtype=torch.int32, device=DEVICE)
    for inplace in (False, True):
        options = {"fraction_bits": 3, "value_dtype": dtype, "inplace": inplace, "impl": "triton"}
        got = api.adapter_couple(a, x, weights, "relu", 0.1, **options)
        assert got.checksum.item() == got.status.item() == 0 and got.y.shape == got.value.shape == shape
        done = api.adapter_uncouple_backward(a, x, x, weights, "relu", 0.1, got.remainder, **options)
        assert done.dx.shape == shape and not any(gradient.any() for gradient in done.gradients)
    assert api.parallel_adapter(x, x, weights, "relu", impl="triton").shape == shape


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("exact", [True, False])
def test_what_is_not_finite_is_flagged(activation: str, bad: float, exact: bool) -> None:
    flags = NON_FINITE | OVERFLOW if exact else NON_FINITE
    for place in [(0, 0), (36, 99), None]:
        x, weights = _random((37, 100), BF16), _weights(100, 3, BF16)
        if place is None:  # in the bottleneck only; relu makes 0 of -inf
            weights.down_bias[2] = bad
        else:
            x[place] = bad
        a = _stream(x.shape) if exact else _random(x.shape, FP32)
        for impl in ("torch", "triton"):
            got = api.adapter_couple(a, x, weights, activation, 0.5, fraction_bits=10 if exact else None, impl=impl)
            assert got.status.item() == flags, (impl, place)


def test_overflow_is_flagged() -> None:
    x, weights = _random((37, 100), FP32), _weights(100, 3, FP32)
    a = torch.zeros(x.shape, dtype=torch.int32, device=DEVICE)
    for value, k, flags in [(1024.0, 20, OVERFLOW), (1e38, 20, OVERFLOW | NON_FINITE), (1.0, 20, 0)]:
        weights.up_bias[99] = value
        assert api.adapter_couple(a, x, weights, "gelu", 1.0, fraction_bits=k, impl="triton").status.item() == flags
    a[36, 98] = 2**30 - 1
    weights.up_bias[98] = 100.0
    assert api.adapter_couple(a, x, weights, "gelu", 1.0, fraction_bits=9, impl="triton").status.item() == OVERFLOW


def test_refused() -> None:
    x = torch.zeros(3, 8, dtype=FP64, device=DEVICE)
    with pytest.raises(RuntimeError, match="float64"):
        api.adapter_forward(x, _weights(8, 2, FP64), "gelu", impl="triton")
    with pytest.raises(RuntimeError, match="rank 257"):
        api.adapter_forward(x.float(), _weights(8, 257, FP32), "gelu", impl="triton")


def test_extreme_values_do_not_make_nan() -> None:
    pre = torch.tensor([1e30, -1e30, 3e38, -3e38, 1e19, -1e19, 90.0, -90.0, 0.0, -0.0, 1e-40])
    n = len(pre)
    eye = torch.eye(n)
    weights = AdapterWeights(*(each.to(DEVICE) for each in (eye * 0, pre, eye, torch.zeros(n))))
    x = torch.zeros(1, n, device=DEVICE)
    for activation in ACTIVATIONS:
        out = api.adapter_forward(x, weights, activation, impl="triton")
        assert torch.equal(torch.isnan(out), torch.zeros_like(out, dtype=torch.bool))
        torch.testing.assert_close(out[0].cpu(), pre.clamp(min=0) * (pre.abs() > 50), rtol=1e-6, atol=1e-30)
        dx, gradients = api.adapter_backward(torch.ones_like(x), x, weights, activation, impl="triton")
        assert torch.isfinite(gradients.down_bias).all() and torch.isfinite(dx).all()
    assert drop_threshold(0.5) == 2**31
