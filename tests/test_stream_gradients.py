"""Gradients of the streams are accumulated into where nobody else holds them, and copied wherever somebody does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import meft_kernels
from meft_kernels.engine import gradients as engine_gradients

from .models import TRAINABLE_START, VARIANTS, tiny_batch, tiny_llama, train_step
from .test_coupling_triton import ROOT, run_checks


def inplace_and_copied(variant: str, **settings: Any) -> list[Any]:
    models = []
    for inplace in (True, False):
        torch.manual_seed(5)
        model = meft_kernels.patch(
            tiny_llama(4), variant=variant, inplace_gradients=inplace, fraction_bits=18, **TRAINABLE_START, **settings
        )
        models.append(model.train())
    return models


@pytest.mark.parametrize("settings", [{}, {"tile": 3}], ids=["whole", "tiles"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_in_place_and_copied_are_bit_for_bit_the_same(variant: str, settings: dict[str, Any]) -> None:
    inplace, copied = inplace_and_copied(variant, **settings)
    batch = tiny_batch(inplace)
    (loss, found), (expected_loss, expected) = train_step(inplace, batch), train_step(copied, batch)
    assert loss == expected_loss
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_nothing_is_copied_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Where counts were measured under something that holds tensors as well, they do not match, and copies are made."""
    run_checks(ROOT / "tests" / "isolated" / "check_owned.py", tmp_path / "report.xml", interpret=False, least=2)


class _Hook:
    """Holds on to what it is shown."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.copies: list[torch.Tensor] = []

    def __call__(self, gradient: torch.Tensor) -> None:
        self.seen.append(gradient)
        self.copies.append(gradient.clone())

    def check(self) -> None:
        assert self.seen
        assert all(torch.equal(a, b) for a, b in zip(self.seen, self.copies, strict=True))


class _ViewHook(_Hook):
    def __call__(self, gradient: torch.Tensor) -> None:
        super().__call__(gradient[..., :3])


@pytest.mark.parametrize("hook_class", [_Hook, _ViewHook])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hook_that_keeps_a_gradient_keeps_what_it_saw(variant: str, hook_class: type[_Hook]) -> None:
    inplace, copied = inplace_and_copied(variant)
    hook = hook_class()
    batch = tiny_batch(inplace)

    def listen(module: Any, args: Any, output: Any) -> None:
        output.register_hook(hook)

    for layer in inplace.model.layers:
        layer.register_forward_hook(listen)
    found, expected = train_step(inplace, batch)[1], train_step(copied, batch)[1]
    hook.check()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def _nodes(root: Any, name: str) -> list[Any]:
    """The graph's nodes of this name."""
    found, seen, waiting = [], set(), [root]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [node] if node.name().startswith(name) else []
        waiting += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hook_on_a_layers_node_keeps_what_it_saw(variant: str) -> None:
    """Hidden states that are looked at are read out for it; a node of the graph is not."""
    inplace, copied = inplace_and_copied(variant)
    hook = _Hook()
    batch = tiny_batch(inplace)
    loss = inplace(**batch).loss
    nodes = _nodes(loss.grad_fn, "Reversible")
    assert len(nodes) == 4

    def listen(gradients: tuple[torch.Tensor | None, ...]) -> None:
        for gradient in gradients:
            if gradient is not None:
                hook(gradient)

    for node in nodes:
        node.register_prehook(listen)
    loss.backward()
    hook.check()
    expected = train_step(copied, batch)[1]
    found = dict(inplace.named_parameters())
    assert all(torch.equal(found[name].grad, expected[name]) for name in expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_that_is_asked_for_is_whole(variant: str) -> None:
    """``torch.autograd.grad`` with respect to hidden states between two layers, and parameters below them."""
    results = []
    for model in inplace_and_copied(variant):
        between: list[torch.Tensor] = []

        def keep(module: Any, args: Any, output: Any, between: list[torch.Tensor] = between) -> None:
            between.append(output)

        model.model.layers[1].register_forward_hook(keep)
        batch = tiny_batch(model)
        loss = model(**batch).loss
        below = model.model.layers[0].meft.stream.down.weight
        results.append(torch.autograd.grad(loss, [between[0], below]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_retain_grad(variant: str) -> None:
    results = []
    for model in inplace_and_copied(variant):
        between: list[torch.Tensor] = []

        def keep(module: Any, args: Any, output: Any, between: list[torch.Tensor] = between) -> None:
            output.retain_grad()
            between.append(output)

        model.model.layers[2].register_forward_hook(keep)
        train_step(model, tiny_batch(model))
        results.append(between[0].grad)
    assert results[0] is not None
    assert torch.equal(results[0], results[1])


def test_without_counts_everything_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python or torch that does not tell who holds a tensor: right, with the copies."""
    inplace, copied = inplace_and_copied("meft2")
    monkeypatch.setattr(engine_gradients, "_alone", lambda: None)
    batch = tiny_batch(inplace)
    found, expected = train_step(inplace, batch)[1], train_step(copied, batch)[1]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
