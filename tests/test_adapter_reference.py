"""The adapter ops in plain torch, their argument checks and the dropout mask."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from meft_kernels.engine.adapters import Adapter
from meft_kernels.ops.adapter import api, reference
from meft_kernels.ops.adapter.dropout import drop_threshold, keep_mask, random_bits
from meft_kernels.ops.adapter.types import ACTIVATIONS, AdapterWeights
from meft_kernels.ops.coupling.api import couple, uncouple

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
KINDS = ["gelu", "gelu_pytorch_tanh", "relu", "silu"]


def _weights(width: int, rank: int, dtype: torch.dtype = FP64) -> AdapterWeights:
    torch.manual_seed(width + rank)
    shapes = [(rank, width), (rank,), (width, rank), (width,)]
    return AdapterWeights(*(torch.randn(shape, dtype=FP64).mul(0.5).to(dtype) for shape in shapes))


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(activation: str, dropout: float) -> None:
    x, residual = torch.randn(2, 3, 5, dtype=FP64), torch.randn(2, 3, 5, dtype=FP64)
    leaves = [tensor.requires_grad_() for tensor in (x, residual, *_weights(5, 3))]
    drop = {"dropout": dropout, "seed": 3}

    def specification(*tensors: torch.Tensor) -> torch.Tensor:
        weights = AdapterWeights(*tensors[2:])
        return reference.adapter(tensors[0], weights, ACTIVATIONS[activation], dropout, 3, tensors[1])

    def parallel(*tensors: torch.Tensor) -> torch.Tensor:
        return api.parallel_adapter(*tensors[:2], AdapterWeights(*tensors[2:]), activation, **drop)

    def alone(*tensors: torch.Tensor) -> torch.Tensor:
        return api.adapter_forward(tensors[0], AdapterWeights(*tensors[1:]), activation, **drop)

    assert torch.autograd.gradcheck(specification, leaves)
    assert torch.autograd.gradcheck(parallel, leaves)
    assert torch.autograd.gradcheck(alone, [leaves[0], *leaves[2:]])


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(FP32, FP32), (BF16, FP32), (BF16, BF16)])
def test_equals_the_module(activation: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Adapter(48, 8, activation, 0.0, down_init_std=0.3, up_init_std=0.3, dtype=weight_dtype)
    weights = AdapterWeights(module.down.weight, module.down.bias, module.up.weight, module.up.bias)
    x = torch.randn(3, 7, 48).to(dtype)
    assert torch.equal(module(x), api.adapter_forward(x, weights, activation, impl="torch"))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS.keys() - {"gelu_tanh"}))  # that one is our own
def test_every_name_is_what_transformers_means(name: str) -> None:
    from transformers.activations import ACT2FN

    pre = torch.linspace(-9, 9, 1001)
    torch.testing.assert_close(reference.activate(pre, ACTIVATIONS[name]), ACT2FN[name](pre), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", KINDS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_backward_equals_autograd(activation: str, residual: bool, dropout: float) -> None:
    x, dy, weights = torch.randn(4, 9, 6, dtype=FP64), torch.randn(4, 9, 6, dtype=FP64), _weights(6, 4)
    leaves = [tensor.requires_grad_() for tensor in (x, *weights)]
    out = reference.adapter(leaves[0], AdapterWeights(*leaves[1:]), ACTIVATIONS[activation], dropout, 9, None)
    out = out + leaves[0] if residual else out
    expected = torch.autograd.grad(out, leaves, dy)
    options = {"dropout": dropout, "seed": 9, "residual": residual}
    into = torch.randn(4, 9, 6, dtype=FP64)
    held, before = into.clone(), dy.clone()
    for dx_into in (None, into):
        dx, gradients = api.adapter_backward(dy, x, weights, activation, dx_into=dx_into, **options)
        wanted = expected[0] if dx_into is None else expected[0] + held
        for each, other in zip((wanted, *expected[1:]), (dx, *gradients), strict=True):
            torch.testing.assert_close(other, each, rtol=1e-12, atol=1e-12)
    assert dx is into and torch.equal(dy, before)


def test_frozen_weights_and_inputs_get_no_gradient() -> None:
    x, residual, weights = torch.randn(3, 6), torch.randn(3, 6, requires_grad=True), _weights(6, 2, FP32)
    out = api.parallel_adapter(x, residual, weights, "gelu")
    out.sum().backward()
    assert torch.equal(residual.grad, torch.ones(3, 6)) and x.grad is None
    trained = weights._replace(up_bias=weights.up_bias.clone().requires_grad_())
    api.adapter_forward(x, trained, "gelu").sum().backward()
    assert torch.equal(trained.up_bias.grad, torch.full((6,), 3.0))
    twice = api.adapter_forward(x.requires_grad_(), weights, "gelu")
    (gradient,) = torch.autograd.grad(twice.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_seed_is_drawn_from_the_global_generator() -> None:
    x, weights = torch.randn(8, 6), _weights(6, 4, FP32)
    torch.manual_seed(1)
    first, second = (api.adapter_forward(x, weights, "gelu", dropout=0.5) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, api.adapter_forward(x, weights, "gelu", dropout=0.5))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("coefficient", [1.0, -0.125, 0.1])
def test_steps_are_couple_of_the_adapter(residual: bool, centred: bool, coefficient: float) -> None:
    torch.manual_seed(0)
    x, dy, weights = torch.randn(2, 7, 20).to(BF16), torch.randn(2, 7, 20).to(BF16), _weights(20, 4, FP32)
    drop = {"dropout": 0.2, "seed": 4}
    branch = api.adapter_forward(x, weights, "relu", **drop)
    branch = branch + x if residual else branch
    for exact in (True, False):
        a, center = (
            torch.randint(-(2**28), 2**28, x.shape, dtype=torch.int32) if exact else torch.randn(x.shape)
            for _ in range(2)
        )
        same = {"center": center if centred else None, "fraction_bits": 14 if exact else None, "value_dtype": BF16}
        lane = {**same, **drop, "residual": residual}
        expected = couple(a, branch, coefficient, **same)
        got = api.adapter_couple(a, x, weights, "relu", coefficient, **lane)
        for each, other in zip(expected, got, strict=True):
            assert (each is None and other is None) or torch.equal(each, other)
        undone = uncouple(got.y, branch, coefficient, got.remainder, **same)
        again = api.adapter_uncouple(got.y, x, weights, "relu", coefficient, got.remainder, **lane)
        fused = api.adapter_uncouple_backward(
            got.y, dy, x, weights, "relu", coefficient, got.remainder, through_center=centred, **lane
        )
        for result in (again, fused):
            assert torch.equal(result.a, undone.a) and torch.equal(result.value, undone.value)
            assert torch.equal(result.checksum, undone.checksum)
        assert not exact or torch.equal(undone.a, a)
        dx, gradients = api.adapter_backward(dy, x, weights, "relu", residual=residual, **drop)
        assert all(map(torch.equal, gradients, fused.gradients))
        expected_dx = dx.float() - coefficient * dy.float() * centred
        # dx and the sum are each rounded to bfloat16.
        torch.testing.assert_close(fused.dx.float(), expected_dx, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
def test_keep_rate(probability: float) -> None:
    keep = keep_mask((1000, 100), probability, 2**45 + 1, torch.device("cpu"))
    n = keep.numel()
    five_sigma = 5 * math.sqrt(probability * (1 - probability) / n)
    assert abs(keep.double().mean().item() - (1 - probability)) <= five_sigma
    rows = keep.double().mean(1)  # no row or column is special
    assert (rows - (1 - probability)).abs().max() <= 6 * math.sqrt(probability * (1 - probability) / 100) + 1e-12


def test_philox_known_answers() -> None:
    # Random123's kat_vectors, philox4x32 10: first word for counter and key of zeros, and of ones.
    zero = torch.zeros(1, dtype=torch.int64)
    assert random_bits(0, zero).item() == 0x6627E8D5
    other = random_bits(1, zero).item(), random_bits(2**32, zero).item(), random_bits(0, zero + 2**32).item()
    assert len({0x6627E8D5, *other}) == 4
    assert all(0 <= bits < 2**32 for bits in other)
    assert drop_threshold(0.25) == 2**30


def test_masks_of_seeds_are_unlike() -> None:
    masks = [keep_mask((64, 64), 0.5, seed, torch.device("cpu")) for seed in (0, 1, 2**32, -1)]
    for first, second in itertools.combinations(masks, 2):
        assert abs((first == second).double().mean().item() - 0.5) < 5 * 0.5 / 64


def _call(**changes: object) -> object:
    weights = _weights(8, 2, FP32)
    arguments = {
        "a": torch.zeros(3, 8, dtype=torch.int32), "x": torch.zeros(3, 8), "weights": weights, "activation": "gelu",
        "coefficient": 0.5, "fraction_bits": 3,
    }  # fmt: skip
    return api.adapter_couple(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"activation": "mish"}, ValueError, "known: gelu"),
        ({"dropout": 1.0, "seed": 1}, ValueError, "dropout must be"),
        ({"dropout": 0.5}, ValueError, "needs a seed"),
        ({"x": torch.zeros(3, 9)}, ValueError, "last dimension"),
        ({"x": torch.zeros(4, 8)}, ValueError, "the stream"),
        ({"x": torch.zeros(3, 8, dtype=torch.int32)}, TypeError, "floating point"),
        ({"x": torch.zeros(3, 8, dtype=FP64)}, TypeError, "float64 like x"),
        ({"weights": _weights(8, 2, BF16)}, TypeError, "float32 like x"),
        ({"weights": _weights(8, 2, FP32)._replace(up=torch.zeros(2, 8))}, ValueError, "up must be"),
        ({"center": torch.zeros(3, 8)}, TypeError, "center is"),
        ({"coefficient": 0.7}, ValueError, "nearest"),
        ({"fraction_bits": None}, ValueError, "fraction_bits"),
        ({"impl": "cuda"}, ValueError, "impl"),
    ],
)
def test_refused(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _call(**changes)


def test_refused_in_backward() -> None:
    x, dy, weights = torch.zeros(3, 8), torch.zeros(3, 8), _weights(8, 2, FP32)
    for alias, name in ((dy, "dy"), (x, "x")):
        with pytest.raises(ValueError, match=f"must not be {name}'s memory"):
            api.adapter_backward(dy, x, weights, "gelu", dx_into=alias)
    with pytest.raises(ValueError, match="dy is"):
        api.adapter_backward(dy[:2], x, weights, "gelu")
    y = torch.zeros(3, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match="needs remainders"):
        api.adapter_uncouple(y, x, weights, "gelu", 0.5, fraction_bits=3)
    with pytest.raises(ValueError, match="through_center"):
        api.adapter_uncouple_backward(y, dy, x, weights, "gelu", 1.0, fraction_bits=3, through_center=True)


def test_relu_hides_no_infinity() -> None:
    weights = _weights(8, 2, FP32)
    weights.down_bias[0] = -float("inf")
    assert torch.isfinite(F.relu(weights.down_bias[0]))
    assert _call(weights=weights, activation="relu").status.item() == 3
