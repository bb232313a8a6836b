"""The loss in chunks against the loss of whole logits: values and gradients, for every kind of head and of labels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meft_kernels import ReversibleUsageError
from meft_kernels.loss import bind_loss
from meft_kernels.loss.lazy import LazyLogits

from .language_models import LANGUAGE_MODELS, labelled, language_model
from .models import VOCABULARY, relative_error

EPS = torch.finfo(torch.float32).eps
ROUNDING = 32 * EPS
"""Losses and gradients are the same sums over 97 words or 32 features, added up in another order: each such sum is off
by its partial sums' rounding, sqrt(97) * eps / 2 where errors are independent, and some six come one after another."""


class Head(nn.Module):
    """A head and nothing else: its loss takes any arguments of ``F.cross_entropy``."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        logits = self.head(hidden)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), **kwargs)


def linear(width: int = 100, vocabulary: int = VOCABULARY, *, bias: bool = False, trained: bool = False) -> Head:
    torch.manual_seed(0)
    return Head(nn.Linear(width, vocabulary, bias=bias).requires_grad_(trained))


def rows(count: int = 63, width: int = 100, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, VOCABULARY, (count,), generator=generator)
    labels[::5] = -100
    return torch.randn(count, width, generator=generator), labels


def step(model: Any, *args: Any, scale: float = 1.0, **batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, and gradients of all parameters and of the first argument."""
    model.zero_grad()
    inputs = [args[0].detach().clone().requires_grad_(), *args[1:]] if args else []
    output = model(*inputs, **batch)
    loss = output if isinstance(output, torch.Tensor) else output.loss
    (loss.sum() * scale).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if inputs:
        found["input"] = inputs[0].grad
    return loss.detach(), found


def both(model: Any, *args: Any, chunk: int = 10, **batch: Any) -> None:
    """Holds the chunked loss to the whole one's."""
    loss, gradients = step(model, *args, **batch)
    binding = bind_loss(model, rows=chunk)
    chunked, found = step(model, *args, **batch)
    binding.remove(model)
    assert chunked.dtype == loss.dtype
    torch.testing.assert_close(chunked, loss, rtol=ROUNDING, atol=0, equal_nan=True)
    assert found.keys() == gradients.keys()
    if any(gradient.any() for gradient in gradients.values()):
        assert relative_error(found, gradients) <= ROUNDING
    else:
        assert not any(gradient.any() for gradient in found.values())


def is_lazy(model: Any, batch: dict[str, Any]) -> bool:
    output = model(**batch)
    return any(isinstance(value, LazyLogits) for value in output.values())


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_kind_of_head(name: str) -> None:
    """Everything trains: the head's weights, embeddings tied to them, biases."""
    model = language_model(name)
    batch = labelled(model)
    both(model, **batch)
    both(model, **batch, chunk=16, scale=3.0)
    bind_loss(model, rows=10)
    assert is_lazy(model, batch)


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere", "gpt2", "opt", "modernbert"])
@pytest.mark.parametrize("items", [7, torch.tensor(7)], ids=["int", "tensor"])
def test_items_in_batch(name: str, items: Any) -> None:
    model = language_model(name)
    both(model, **labelled(model), num_items_in_batch=items)


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "bert", "t5"])
def test_a_frozen_head(name: str) -> None:
    model = language_model(name)
    model.get_output_embeddings().requires_grad_(False)
    both(model, **labelled(model))


def test_labels_shifted_by_the_caller() -> None:
    model = language_model("llama")
    batch = labelled(model)
    both(model, **batch, shift_labels=batch["labels"].roll(-1, 1))


def test_logits_to_keep() -> None:
    model = language_model("llama")
    batch = labelled(model)
    batch["labels"] = batch["labels"][:, -11:]
    both(model, **batch, logits_to_keep=11)


def test_accumulation_is_a_sum() -> None:
    """Two half batches with the whole's number of tokens give the whole's gradients."""
    model = language_model("llama")
    batch = labelled(model, rows=4)
    items = int((batch["labels"][:, 1:] != -100).sum())
    _, expected = step(model, **batch)
    bind_loss(model, rows=10)
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        half = {name: tensor[part] for name, tensor in batch.items()}
        model(**half, num_items_in_batch=items).loss.backward()
    assert relative_error({name: p.grad for name, p in model.named_parameters()}, expected) <= ROUNDING


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("count", [63, 17, 11])
def test_reductions(reduction: str, smoothing: float, trained: bool, count: int) -> None:
    settings = {"reduction": reduction, "label_smoothing": smoothing}
    both(linear(bias=True, trained=trained), *rows(count), **settings)


@pytest.mark.parametrize("every", [2, 30])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_many_labels_ignored_and_few(every: int, smoothing: float) -> None:
    """Rows without a label are left out where there are many, and count for nothing where there are few."""
    hidden, labels = rows()
    labels = labels.clamp(min=0)
    labels[::every] = -100
    both(linear(trained=True), hidden, labels, label_smoothing=smoothing)
    both(linear(), hidden, labels, reduction="none", label_smoothing=smoothing)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_labels_ignored(reduction: str) -> None:
    hidden, labels = rows()
    both(linear(trained=True), hidden, torch.full_like(labels, -100), reduction=reduction)


def test_another_label_is_ignored() -> None:
    hidden, labels = rows()
    both(linear(), hidden, labels.clamp(min=0), ignore_index=0)
    both(linear(), hidden, labels.masked_fill(labels == -100, 5000), ignore_index=5000)


@pytest.mark.parametrize("count", [0, 1])
def test_hardly_any_rows(count: int) -> None:
    hidden, labels = rows(count)
    both(linear(), hidden, labels.clamp(min=0), chunk=1, reduction="sum")
    model = language_model("llama")
    both(model, **labelled(model, rows=1, tokens=1), chunk=1)


@pytest.mark.parametrize("label", [VOCABULARY, -1, -101])
def test_a_label_outside_of_the_vocabulary(label: int) -> None:
    hidden, labels = rows()
    labels[3], model = label, linear()
    bind_loss(model, rows=10)
    with pytest.raises(IndexError, match=rf"label {label} is outside of the vocabulary of 97 \(1 such"):
        model(hidden, labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("upcast", [False, True])
def test_dtypes(dtype: torch.dtype, trained: bool, upcast: bool) -> None:
    """No further from the truth than whole logits, but for one more rounding of what backward scales (half an eps), and
    of the weights' gradients in each of the chunks."""
    hidden, labels = rows()
    model = linear(bias=True, trained=trained).to(dtype)
    hidden = hidden.to(dtype)

    class Upcast(Head):
        def forward(self, hidden: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return F.cross_entropy(self.head(hidden).float() if upcast else self.head(hidden), labels, **kwargs)

    model = Upcast(model.head)
    true_loss, truth = step(copy.deepcopy(model).double(), hidden.double(), labels)
    loss, gradients = step(model, hidden, labels)
    bind_loss(model, rows=10)
    chunked, found = step(model, hidden, labels)
    eps = torch.finfo(dtype).eps
    assert chunked.dtype == loss.dtype
    assert abs(float(chunked - true_loss)) <= abs(float(loss - true_loss)) + torch.finfo(loss.dtype).eps * float(loss)
    for name, expected in truth.items():
        error = relative_error({"": found[name]}, {"": expected})
        assert error <= relative_error({"": gradients[name]}, {"": expected}) + eps, name
        assert found[name].dtype == gradients[name].dtype


def test_float64() -> None:
    hidden, labels = rows()
    model = linear(bias=True, trained=True).double()
    _, expected = step(model, hidden.double(), labels)
    bind_loss(model, rows=10)
    _, found = step(model, hidden.double(), labels)
    assert relative_error(found, expected) <= 32 * torch.finfo(torch.float64).eps


def test_gradients_do_not_underflow_in_float16() -> None:
    """A millionth, rounded to float16, is 5 % off; the product with the gradient is none such small number."""
    hidden, labels = rows()
    model = linear()
    with torch.no_grad():
        model.head.weight.mul_(100)
    hidden = hidden / 100
    truth = step(copy.deepcopy(model).double(), hidden.double(), labels, reduction="sum", scale=3e-7)[1]["input"]
    model.half()
    bind_loss(model, rows=10)
    found = step(model, hidden.half(), labels, reduction="sum", scale=3e-7)[1]["input"]
    # float16's smallest step is 6e-8, this gradient's size 1e-6; weights, hidden states and sums are rounded as well
    torch.testing.assert_close(found.double(), truth, rtol=8 * torch.finfo(torch.float16).eps, atol=2**-24)
    assert found.abs().max() > 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_autocast(dtype: torch.dtype, trained: bool) -> None:
    """Backward runs outside of the block, and the loss is float32."""
    hidden, labels = rows()
    model = linear(bias=True, trained=trained)

    class Cast(Head):
        def forward(self, hidden: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            with torch.autocast("cpu", dtype=dtype):
                return super().forward(hidden * 1.0, labels, **kwargs)

    model = Cast(model.head)
    loss, gradients = step(model, hidden, labels)
    bind_loss(model, rows=10)
    chunked, found = step(model, hidden, labels)
    assert chunked.dtype == loss.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert abs(float(chunked - loss)) <= eps
    assert relative_error(found, gradients) <= 2 * eps


def test_backward_twice() -> None:
    """With the graph kept the second gives the same; without, torch says what is wrong; second derivatives: we do."""
    hidden, labels = rows()
    model = linear()
    bind_loss(model, rows=10)
    hidden.requires_grad_()
    loss = model(hidden, labels)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    second = torch.autograd.grad(2 * loss, hidden)[0]
    torch.testing.assert_close(second, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, hidden)
    with pytest.raises(ReversibleUsageError, match="first derivatives only"):
        torch.autograd.grad(model(hidden, labels), hidden, create_graph=True)


def test_class_weights_take_whole_logits() -> None:
    both(linear(trained=True), *rows(), weight=torch.linspace(0.5, 2, VOCABULARY))


def test_probabilities_as_labels() -> None:
    model, (hidden, _) = linear(trained=True), rows()
    target = torch.rand(63, VOCABULARY).softmax(-1)

    class Soft(Head):
        def forward(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.head(hidden), target)

    both(Soft(model.head), hidden, target)


class Low(nn.Module):
    """A head that is no plain linear map, as PEFT's are: with a part that is no child of its own."""

    def __init__(self, tied: nn.Parameter) -> None:
        super().__init__()
        self.base = nn.Linear(100, VOCABULARY).requires_grad_(False)
        self.down, self.up = nn.Linear(100, 4, bias=False), nn.Linear(4, VOCABULARY, bias=False)
        self.elsewhere = [tied]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.base(hidden) + self.up(self.down(hidden)) + self.elsewhere[0])


def test_what_trains_outside_of_the_head() -> None:
    torch.manual_seed(0)
    tied = nn.Parameter(torch.randn(VOCABULARY))
    model = Head(Low(tied))
    model.register_parameter("tied", tied)
    both(model, *rows())
    assert tied.grad is not None and tied.grad.any()


def test_dropout_in_the_head() -> None:
    """Gradients belong to the very loss: made from the same random numbers."""
    torch.manual_seed(0)
    model = Head(nn.Sequential(nn.Dropout(0.5), nn.Linear(100, VOCABULARY))).double().train()
    bind_loss(model, rows=10)
    hidden, labels = rows()
    direction = torch.randn_like(hidden).double()

    def loss(at: float) -> torch.Tensor:
        torch.manual_seed(4)
        return model((hidden.double() + at * direction).requires_grad_(), labels).detach()

    torch.manual_seed(4)
    found = step(model, hidden.double(), labels)[1]["input"]
    slope = float(loss(1e-6) - loss(-1e-6)) / 2e-6
    assert float((found * direction).sum()) == pytest.approx(slope, rel=1e-6)
