"""Whoever looks at hidden states from outside sees those of the model: features, probes, steering, Grad-CAM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

import meft_kernels
from meft_kernels import ReversibleUsageError

from ..models import TRAINABLE_START, VARIANTS, tiny_batch, tiny_llama, worst_error

LAYERS = 4
LEAK = 0.02
"""Of hidden states and gradients: a 256th of the streams' difference in every layer; meft3's is the largest."""

Hook = Callable[..., Any]
Gradients = dict[str, torch.Tensor]


def patched(engine: str = "reversible", **settings: Any) -> nn.Module:
    model = tiny_llama(LAYERS)
    torch.manual_seed(5)
    return meft_kernels.patch(model, engine=engine, **{**TRAINABLE_START, "fraction_bits": 22, **settings}).train()


def gradients_of(model: nn.Module, loss: torch.Tensor) -> Gradients:
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@contextmanager
def captured(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """What hooks before and behind every layer are given."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        handles += [
            layer.register_forward_pre_hook(lambda _, args, i=index: seen.__setitem__(f"before {i}", args[0])),
            layer.register_forward_hook(lambda _, args, output, i=index: seen.__setitem__(f"behind {i}", output)),
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_the_layers_own(variant: str) -> None:
    """Hooks on layers see what ``output_hidden_states`` gives, which is the pretrained model's but for the leak."""
    model = tiny_llama(LAYERS)
    ids = tiny_batch(model)["input_ids"]
    with torch.no_grad():
        with captured(model) as expected:
            model(input_ids=ids)
        meft_kernels.patch(model, variant=variant, fraction_bits=22)
        logits = model(input_ids=ids).logits
        with captured(model) as found:
            assert torch.equal(model(input_ids=ids).logits, logits)
        asked = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert found.keys() == expected.keys()
    assert all(error(found[place], expected[place]) <= LEAK for place in found)
    assert error(found["behind 0"], expected["behind 1"]) > 4 * LEAK  # or nothing would have been told apart
    assert all(torch.equal(found[f"before {index}"], asked[index]) for index in range(LAYERS))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loss_on_features_reaches_all_that_made_them(variant: str) -> None:
    results = []
    for engine in ("reversible", "autograd"):
        model = patched(engine, variant=variant)
        batch = tiny_batch(model)
        with captured(model) as seen:
            loss = model(**batch).loss
        extra = 30 * seen["behind 1"].square().mean() + 30 * seen["before 3"].sin().mean()
        results.append(gradients_of(model, loss + extra))
        alone = gradients_of(model, model(**batch).loss)
    assert worst_error(*results) <= 1e-5
    assert worst_error(results[1], alone, floor=1e-3) > 0.1  # it does matter


def test_features_alone() -> None:
    """A loss on one layer's features, the model's output left alone: its streams lie at the top, and are not undone."""
    model = patched("autograd")
    with captured(model) as seen:
        model(**tiny_batch(model))
    found = gradients_of(model, seen["behind 1"].square().mean())
    assert {name.split(".")[2] for name in found} == {"0", "1"}
    model = patched()
    with captured(model) as seen:
        model(**tiny_batch(model))
    with pytest.raises(ReversibleUsageError, match="autograd"):
        seen["behind 1"].square().mean().backward()


@pytest.mark.parametrize("settings", [{}, {"reversible_layers": 2}, {"engine": "autograd"}])
def test_looking_changes_no_bit(settings: dict[str, Any]) -> None:
    model = patched(**settings)
    batch = tiny_batch(model)
    expected = gradients_of(model, model(**batch).loss)
    with captured(model) as seen:
        loss = model(**batch).loss
    for hidden_states in seen.values():
        if hidden_states.requires_grad:  # frozen embeddings do not
            hidden_states.retain_grad()
    found = gradients_of(model, loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def gradients_seen(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of hidden states as tensors keep them, and as modules' own hooks are given them."""
    seen: dict[str, torch.Tensor] = {}

    def full(index: int, d_inputs: Any, d_outputs: Any) -> None:
        seen[f"module {index}"] = d_outputs[0].clone()
        if d_inputs[0] is not None:  # of the embeddings, which are frozen
            seen[f"module's input {index}"] = d_inputs[0].clone()

    handles = [
        layer.register_full_backward_hook(lambda _, d_in, d_out, i=index: full(i, d_in, d_out))
        for index, layer in enumerate(model.model.layers)
    ]
    with captured(model) as hidden_states:
        loss = model(**batch).loss
    kept = {place: tensor for place, tensor in hidden_states.items() if tensor.requires_grad}
    for tensor in kept.values():
        tensor.retain_grad()
    loss.backward()
    for handle in handles:
        handle.remove()
    return {**seen, **{place: tensor.grad for place, tensor in kept.items()}}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_gradients_of_hidden_states_are_the_models() -> None:
    """Grad-CAM, saliency: what hooks see is the gradient of a change of the hidden states."""
    unpatched = tiny_llama(LAYERS).requires_grad_(False).train()
    unpatched.model.layers[0].requires_grad_(True)
    expected = gradients_seen(unpatched, tiny_batch(unpatched))
    start = {"up_init_std": 0.0}
    found = gradients_seen(patched(**start), tiny_batch(unpatched))
    oracle = gradients_seen(patched("autograd", **start), tiny_batch(unpatched))
    assert found.keys() == expected.keys() == oracle.keys()
    assert all(error(found[place], expected[place]) <= LEAK for place in expected)
    assert all(error(found[place], oracle[place]) <= 1e-5 for place in expected)


def _on_output(change: Hook) -> Callable[[nn.Module], Any]:
    return lambda model: model.model.layers[1].register_forward_hook(lambda _, args, output: change(output))


def _on_gradient(change: Hook) -> Callable[[nn.Module], Any]:
    def register(output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(change)

    return _on_output(register)


def _write(method: Hook, value: float) -> None:
    """Write in place and hand nothing back."""
    method(value)


WRITERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "steering": (_on_output(lambda output: output + 1), "one that writes .steering. belongs"),
    "steering in place": (_on_output(lambda output: _write(output.add_, 1)), "one that writes"),
    "steering the input": (
        lambda model: model.model.layers[2].register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
        "one that writes",
    ),
    "detach": (_on_output(lambda output: output.detach()), r"detach\(\) stands in the graph.*model.layers.2.*frozen"),
    "a node": (_on_output(lambda output: _Reversal.apply(output)), "_ReversalBackward stands in the graph"),
    "scaling": (_on_gradient(lambda gradient: gradient * 0.5), "changed the gradient of.*model.layers.1"),
    "scaling in place": (_on_gradient(lambda gradient: _write(gradient.mul_, 0.5)), "changed the gradient of"),
    "module's hook": (
        lambda model: model.model.layers[2].register_full_backward_hook(lambda _, d_in, d_out: (d_in[0] * 0.5,)),
        "changed the gradient of.*model.layers.2",
    ),
    "module's pre-hook": (
        lambda model: model.model.layers[1].register_full_backward_pre_hook(lambda _, d_out: (d_out[0] * 0.5,)),
        "changed the gradient of",
    ),
}


class _Reversal(torch.autograd.Function):
    """Hands hidden states on as they are, and their gradient reversed, as domain-adversarial training does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


@pytest.mark.parametrize("engine", ["reversible", "autograd"])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_what_is_changed_between_layers_is_refused(writer: str, engine: str) -> None:
    register, message = WRITERS[writer]
    model = patched(engine)
    batch = tiny_batch(model)
    expected = gradients_of(model, model(**batch).loss)
    handle = register(model)
    with pytest.raises(ReversibleUsageError, match=message):
        model(**batch).loss.backward()
    handle.remove()
    model.zero_grad()
    found = gradients_of(model, model(**batch).loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_gradient_handed_back_equal_is_no_change() -> None:
    model = patched()
    batch = tiny_batch(model)
    expected = gradients_of(model, model(**batch).loss)
    _on_gradient(lambda gradient: gradient.clone())(model)
    found = gradients_of(model, model(**batch).loss)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("steer", [lambda output: output + 1, lambda output: _write(output.add_, 1)])
def test_steering_in_inference_mode_is_refused(steer: Hook) -> None:
    """Where writes in place are not counted."""
    model = patched().eval()
    _on_output(steer)(model)
    with torch.inference_mode(), pytest.raises(ReversibleUsageError, match="one that writes"):
        model(**tiny_batch(model))


def test_steering_around_the_layers_works() -> None:
    model = patched()
    batch = tiny_batch(model)
    logits = model(**batch).logits.detach()
    model.model.layers[0].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    model.model.layers[-1].register_forward_hook(lambda _, args, output: output + 1)
    steered = model(**batch).logits
    assert not torch.allclose(steered, logits)
    steered.sum().backward()


def encoder(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    return meft_kernels.patch(BertModel(BertConfig(vocab_size=97, **sizes)), rank=8, **settings)


def test_forward_called_directly() -> None:
    """As sentence-transformers does: calibrated, with the hidden states of a call, and refused as one."""
    ids = torch.arange(1, 9)[None]
    direct, called = encoder().eval(), encoder().eval()
    with torch.no_grad():
        expected = called(ids, output_hidden_states=True)
        found = direct.forward(ids, output_hidden_states=True)
        assert torch.equal(direct.forward(ids)[0], called(ids)[0])
    pairs = zip(found.hidden_states, expected.hidden_states, strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    with pytest.raises(ReversibleUsageError, match="output_hidden_states is not available"):
        direct.forward(ids, output_hidden_states=True)
    direct.encoder.layer, layers = direct.encoder.layer[:2], direct.encoder.layer
    with pytest.raises(ReversibleUsageError, match="the model returned before"):
        direct.forward(ids)
    direct.encoder.layer = layers
    meft_kernels.unpatch(direct)
    assert "forward" not in vars(direct)
