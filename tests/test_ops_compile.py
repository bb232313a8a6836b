"""The functional ops under ``torch.compile`` and as operators of ``torch.ops.meft_kernels``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import meft_kernels
from meft_kernels import ops

from .models import TRAINABLE_START, tiny_batch, tiny_llama, train_step

FP32, BF16 = torch.float32, torch.bfloat16


def _stream(shape: tuple[int, ...] = (5, 19)) -> torch.Tensor:
    return torch.randint(-(2**28), 2**28, shape, dtype=torch.int32)


@pytest.mark.parametrize("value_dtype", [None, BF16])
@pytest.mark.parametrize(("exact", "coefficient"), [(True, -0.125), (True, 1.0), (False, 0.1)])
@pytest.mark.parametrize("centred", [True, False])
def test_opcheck(exact: bool, coefficient: float, value_dtype: torch.dtype | None, centred: bool) -> None:
    a, center = (_stream(), _stream()) if exact else (torch.randn(5, 19), torch.randn(5, 19))
    branch, k = torch.randn(5, 19), 20 if exact else None
    library = torch.ops.meft_kernels
    arguments = (a, branch, center if centred else None, coefficient, k, value_dtype, 3, "torch")
    torch.library.opcheck(library.couple, arguments)
    torch.library.opcheck(library.couple_, arguments)
    coupled = ops.couple(a, branch, coefficient, center=center if centred else None, fraction_bits=k)
    arguments = (coupled.y, branch, coupled.remainder, *arguments[2:])
    torch.library.opcheck(library.uncouple, arguments)
    torch.library.opcheck(library.uncouple_, arguments)


@pytest.mark.parametrize("inplace", [True, False])
def test_traced_whole(inplace: bool) -> None:
    def there_and_back(a: torch.Tensor, branch: torch.Tensor, center: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        options = {"center": center, "fraction_bits": 20, "value_dtype": FP32, "inplace": inplace}
        coupled = ops.couple(a, branch * 2, -0.125, **options)
        undone = ops.uncouple(coupled.y, branch * 2, -0.125, coupled.remainder, **options)
        return *coupled[1:], *undone

    a, branch, center = _stream(), torch.randn(5, 19), _stream()
    expected = there_and_back(a.clone(), branch, center)
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    actual = compiled(a.clone(), branch, center)
    assert all(torch.equal(want, got) for want, got in zip(expected, actual, strict=True))
    assert torch.equal(actual[4], a)


def test_what_is_not_asked_for_is_none_when_traced() -> None:
    compiled = torch.compile(
        lambda a, branch: ops.couple(a, branch, 1.0, fraction_bits=20), backend="aot_eager", fullgraph=True
    )
    coupled = compiled(_stream(), torch.randn(5, 19))
    assert coupled.value is None
    assert coupled.remainder is None


def test_bad_arguments_are_refused_when_traced() -> None:
    compiled = torch.compile(lambda a, branch: ops.couple(a, branch, 1.0), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="fraction_bits in"):
        compiled(_stream(), torch.randn(5, 19))


def _adapter(width: int = 19, rank: int = 3) -> ops.AdapterWeights:
    shapes = ((rank, width), (rank,), (width, rank), (width,))
    return ops.AdapterWeights(*(torch.randn(shape).mul_(0.3).requires_grad_() for shape in shapes))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_opcheck_of_adapters(dropout: float) -> None:
    library = torch.ops.meft_kernels
    weights, x, dy = _adapter(), torch.randn(5, 19, requires_grad=True), torch.randn(5, 19)
    frozen = [weight.detach() for weight in weights]
    for residual in (None, torch.randn(5, 19, requires_grad=True)):
        torch.library.opcheck(library.parallel_adapter, (x, residual, *weights, "gelu", dropout, 7, "torch"))
    settings = ("gelu", dropout, 7, True, "torch")
    torch.library.opcheck(library.adapter_backward, (dy, x.detach(), *frozen, *settings))
    for coefficient, center, value_dtype in ((1.0, None, None), (-0.125, _stream(), BF16)):
        rest = ("gelu", coefficient, dropout, 7, False, 20, value_dtype)
        torch.library.opcheck(library.adapter_couple, (_stream(), x.detach(), *frozen, center, *rest, "torch"))
        remainder = ops.couple(_stream(), dy, coefficient, center=center, fraction_bits=20).remainder
        arguments = (_stream(), dy, x.detach(), *frozen, remainder, center, *rest, center is not None, "torch")
        torch.library.opcheck(library.adapter_uncouple_backward, arguments)


@pytest.mark.parametrize("with_residual", [True, False])
def test_adapter_trains_when_traced(with_residual: bool) -> None:
    weights, x, residual = _adapter(), torch.randn(5, 19, requires_grad=True), torch.randn(5, 19, requires_grad=True)
    inputs = [x, *weights, *([residual] if with_residual else [])]

    def loss(x: torch.Tensor, residual: torch.Tensor, weights: ops.AdapterWeights) -> torch.Tensor:
        settings = {"dropout": 0.25, "seed": 7}
        if with_residual:
            return ops.parallel_adapter(x, residual, weights, "silu", **settings).square().sum()
        return ops.adapter_forward(x, weights, "silu", **settings).square().sum()

    expected = torch.autograd.grad(loss(x, residual, weights), inputs)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(compiled(x, residual, weights), inputs)
    assert all(torch.equal(want, got) for want, got in zip(expected, actual, strict=True))


def test_dropout_without_a_seed_is_refused_when_traced() -> None:
    compiled = torch.compile(
        lambda x, weights: ops.adapter_forward(x, weights, "silu", dropout=0.5), backend="aot_eager", fullgraph=True
    )
    with pytest.raises(Exception, match="needs a seed"):
        compiled(torch.randn(5, 19), _adapter())


@pytest.mark.parametrize("inplace", [True, False])
def test_a_lane_with_an_adapter_traced_whole(inplace: bool) -> None:
    weights = ops.AdapterWeights(*(weight.detach() for weight in _adapter()))

    def there_and_back(
        a: torch.Tensor, x: torch.Tensor, center: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        settings = {"center": center, "fraction_bits": 20, "inplace": inplace, "value_dtype": FP32}
        coupled = ops.adapter_couple(a, x, weights, "silu", -0.125, **settings)
        undone = ops.adapter_uncouple_backward(
            coupled.y, dy, x, weights, "silu", -0.125, coupled.remainder, dx_into=dx, **settings
        )
        return *coupled[1:], *undone[:-1], *undone.gradients

    a, center, x, dy, dx = _stream(), _stream(), *torch.randn(3, 5, 19).unbind()
    expected = there_and_back(a.clone(), x, center, dy, dx.clone())
    compiled = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    actual = compiled(a.clone(), x, center, dy, dx.clone())
    assert all(torch.equal(want, got) for want, got in zip(expected, actual, strict=True))
    assert torch.equal(actual[4], a)


def test_layers_of_a_compiled_model_run_uncompiled() -> None:
    """Forward and recompute must be the same code: only what is around the layers reaches the compiler."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        seen.append(graph.code)
        return graph

    torch._dynamo.reset()
    model = meft_kernels.patch(tiny_llama(), fraction_bits=16, **TRAINABLE_START).train()
    batch = tiny_batch(model)
    loss, expected = train_step(model, batch)
    compiled = torch.compile(model, backend=backend)
    compiled_loss, gradients = train_step(compiled, batch)
    torch._dynamo.reset()
    assert seen
    assert not any("softmax" in code or "scaled_dot_product" in code or "down" in code for code in seen)
    assert compiled_loss == loss
    found = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
