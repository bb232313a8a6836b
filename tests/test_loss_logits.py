"""``output.logits`` of a loss in chunks: real for whoever reads them, and no memory for whoever does not."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from meft_kernels import ReversibleUsageError
from meft_kernels.loss import bind_loss
from meft_kernels.loss.lazy import LazyLogits

from .language_models import labelled, language_model
from .models import VOCABULARY, relative_error
from .test_loss import ROUNDING, Head, linear, rows

READ: dict[str, Any] = {
    "argmax": lambda z: z.argmax(-1),
    "softmax": lambda z: z.float().softmax(-1),
    "last position": lambda z: z[:, -1],
    "last position, cast": lambda z: z[:, -1, :].to(copy=True, dtype=torch.float32),
    "shifted": lambda z: z[..., :-1, :].contiguous().view(-1, VOCABULARY),
    "by mask": lambda z: z[torch.arange(63).view(3, 21) % 2 == 0],
    "by index": lambda z: z[torch.arange(3), torch.tensor([4, 0, 20])],
    "one word": lambda z: z[..., 5],
    "words": lambda z: z[:, :, 3:9],
    "new dimension": lambda z: z[:, None] + 0,
    "numbers": lambda z: (2 * z + 1 - z / 3) * 0.5,
    "capped": lambda z: 5 * torch.tanh(z / 5),
    "capped in place": lambda z: z.clone().div_(5).tanh_() * 5,
    "bias": lambda z: z + torch.linspace(0, 1, VOCABULARY),
    "bias of three dimensions": lambda z: z + torch.linspace(0, 1, VOCABULARY)[None, None],
    "not one bias": lambda z: z + torch.linspace(0, 1, 21)[:, None],
    "flat": lambda z: z.flatten(0, 1),
    "all flat": lambda z: z.flatten(),
    "reshaped": lambda z: z.reshape(7, 9, -1),
    "transposed": lambda z: z.transpose(0, 1),
    "stacked": lambda z: torch.cat([z, z], 1),
    "log likelihood": lambda z: torch.gather(z.log_softmax(-1), 2, torch.zeros(3, 21, 1, dtype=torch.long)),
    "half": lambda z: z.half().double(),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy()),
    "clone": lambda z: z.clone(),
    "pickled": lambda z: pickle.loads(pickle.dumps(z.detach())),
    "copied": lambda z: copy.deepcopy(z.detach()),
    "below autograd": lambda z: torch.ops.aten.mul.Tensor(z, torch.tensor(2.0)),
    "list": lambda z: torch.tensor(z.tolist()),
}


@pytest.fixture
def model() -> Any:
    return language_model("llama")


def lazy_logits(model: Any, **overrides: Any) -> LazyLogits:
    logits = model(**{**labelled(model), **overrides}).logits
    assert isinstance(logits, LazyLogits)
    return logits


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", READ)
def test_reading(name: str, model: Any) -> None:
    """The very bits of whole logits; gradients, too, where rows were not chosen before the head."""
    whole = model(**labelled(model)).logits
    bind_loss(model, rows=10)
    expected, found = READ[name](whole), READ[name](lazy_logits(model))
    torch.testing.assert_close(found + 0, expected, rtol=ROUNDING, atol=ROUNDING)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert found.requires_grad == expected.requires_grad
    if expected.requires_grad:
        scale = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
        of_whole = gradients(model, (expected.float() * scale).sum())
        assert relative_error(gradients(model, (found.float() * scale).sum()), of_whole) <= ROUNDING


def test_nothing_is_computed_for_who_does_not_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bind_loss(model, rows=10)
    monkeypatch.setattr(LazyLogits, "read", lambda self: pytest.fail("logits were computed"))
    output = model(**labelled(model))
    logits = output.logits
    assert (logits.shape, logits.dtype, logits.device.type) == ((3, 21, VOCABULARY), torch.float32, "cpu")
    assert logits.requires_grad and logits.grad_fn is not None and not logits.is_leaf
    assert logits.size(-1) == VOCABULARY and len(logits) == 3 and logits.numel() == 63 * VOCABULARY
    logits.register_hook(lambda gradient: None)
    output.loss.backward()
    assert not logits.detach().requires_grad
    assert isinstance(logits.float()[:, :-1].view(-1, VOCABULARY), LazyLogits)


@pytest.mark.parametrize("when", ["before backward", "after backward", "together"])
def test_loss_and_logits_together(when: str, model: Any) -> None:
    """A second loss of the logits adds its own gradient."""
    batch = labelled(model)
    output = model(**batch)
    expected = gradients(model, output.loss + output.logits.square().mean())
    bind_loss(model, rows=10)
    output = model(**batch)
    model.zero_grad()
    if when == "together":
        (output.loss + output.logits.square().mean()).backward()
    elif when == "before backward":
        second = output.logits.square().mean()
        output.loss.backward(retain_graph=True)
        second.backward()
    else:
        output.loss.backward(retain_graph=True)
        output.logits.square().mean().backward()
    assert relative_error({name: p.grad for name, p in model.named_parameters()}, expected) <= ROUNDING


def test_read_without_gradients_and_then_with(model: Any) -> None:
    expected = gradients(model, model(**labelled(model)).logits.square().mean())
    bind_loss(model, rows=10)
    logits = lazy_logits(model)
    with torch.no_grad():
        assert not logits.float().softmax(-1).requires_grad
        accuracy = logits.argmax(-1)
    assert accuracy.shape == (3, 21)
    assert relative_error(gradients(model, logits.square().mean()), expected) <= ROUNDING


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any, model: Any) -> None:
    batch = labelled(model)
    with mode():
        whole = model(**batch)
        bind_loss(model, rows=10)
        output = model(**batch)
    assert isinstance(output.logits, LazyLogits) and not output.logits.requires_grad
    torch.testing.assert_close(output.loss, whole.loss, rtol=ROUNDING, atol=0)
    assert torch.equal(output.logits + 0, whole.logits)


def test_changed_in_place(model: Any) -> None:
    """As a tensor would be: views see it, and so does the loss that is made of it later."""
    labels = labelled(model)["labels"].view(-1)

    def run(logits: torch.Tensor) -> torch.Tensor:
        view = logits.view(-1, VOCABULARY)
        logits[..., :3] = -5
        logits /= 2
        return F.cross_entropy(view, labels)

    whole = run(model(**labelled(model)).logits)
    expected = gradients(model, whole)
    bind_loss(model, rows=10)
    loss = run(lazy_logits(model))
    torch.testing.assert_close(loss, whole, rtol=ROUNDING, atol=0)
    assert relative_error(gradients(model, loss), expected) <= ROUNDING


def test_changed_in_place_after_a_view_was_read(model: Any) -> None:
    bind_loss(model, rows=10)
    logits = lazy_logits(model)
    assert logits[0].sum().isfinite()
    with pytest.raises(ReversibleUsageError, match="clone"):
        logits[..., 0] = 0
    logits = lazy_logits(model)
    view = logits[0]
    assert view.sum().isfinite()
    with pytest.raises(ReversibleUsageError, match="clone"):
        view.mul_(2)


def test_a_hook_gets_the_gradient_of_the_logits() -> None:
    hidden, labels = rows()
    seen = []

    class Hooked(Head):
        def forward(self, hidden: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            logits = self.head(hidden)
            logits.register_hook(seen.append)
            return F.cross_entropy(logits, labels)

    model = Hooked(linear().head)
    model(hidden.requires_grad_(), labels).backward()
    bind_loss(model, rows=10)
    model(hidden, labels).backward()
    assert torch.equal(seen[0], seen[1])


def test_weights_that_moved_before_logits_were_read(model: Any) -> None:
    bind_loss(model, rows=10)
    output = model(**labelled(model))
    output.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(ReversibleUsageError, match="before the optimizer's step"):
        output.logits.argmax(-1)


def test_few_rows_are_whole(model: Any) -> None:
    """Generating asks for a row a text: the tensor that there always was."""
    bind_loss(model)
    ids = labelled(model)["input_ids"]
    assert type(model(input_ids=ids).logits) is torch.Tensor  # 63 rows of 97 words are less than a chunk
    model.eval()
    bound = model.generate(ids[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.lm_head.forward.rows = 2
    assert torch.equal(model.generate(ids[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0), bound)


def test_tuples(model: Any) -> None:
    bind_loss(model, rows=10)
    loss, logits, *_ = model(**labelled(model), return_dict=False)
    assert isinstance(logits, LazyLogits) and loss.requires_grad


def test_other_modes_get_whole_logits(model: Any) -> None:
    model.requires_grad_(False).eval()
    ids = labelled(model)["input_ids"]
    expected = model(input_ids=ids).logits
    bind_loss(model, rows=10)
    hidden = torch.randn(63, 32)
    mapped = torch.func.vmap(model.lm_head)(hidden)
    torch.testing.assert_close(mapped, hidden @ model.lm_head.weight.T)
    seen = []

    def backend(graph: Any, inputs: Any) -> Any:
        return graph

    torch._dynamo.reset()
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    compiled = torch.compile(model, backend=backend)(input_ids=ids).logits
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, expected)
    assert LazyLogits not in seen


def test_nothing_outlives_the_output(model: Any) -> None:
    """No cycle through the graph, which Python's collector could not see."""
    import gc
    import weakref

    bind_loss(model, rows=10)
    gc.collect()
    gc.disable()
    try:
        output = model(**labelled(model))
        output.logits.square().mean().backward(retain_graph=True)
        found = weakref.ref(output.logits.read().untyped_storage())
        del output
        assert found() is None
    finally:
        gc.enable()
