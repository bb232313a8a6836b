"""Hooks: on parameters, on modules inside of layers, on several gradients at once; each as in plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import meft_kernels
from meft_kernels import ReversibleUsageError

from ..architectures import zoo
from ..models import TRAINABLE_START, pair, tiny_batch, tiny_llama, train_step, worst_error

BOUND = 1e-5  # fp32: measured 1e-7 to 4e-7, the bound is the one that README promises

Outcome = tuple[float, dict[str, torch.Tensor]]


def assert_same(act: Callable[[nn.Module], Outcome], **settings: Any) -> None:
    """What ``act`` gives is the same in both engines."""
    mine, theirs = (act(model) for model in pair("llama", **settings))
    assert mine[0] == theirs[0]
    assert worst_error(mine[1], theirs[1]) <= BOUND


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("settings", [{}, {"tile": 4}, {"tile": 4, "attention": "pieces"}, {"variant": "meft3"}])
def test_hooks_on_parameters_see_the_whole_gradient_once(settings: dict[str, Any]) -> None:
    seen: dict[int, list[torch.Tensor]] = {}

    def act(model: nn.Module) -> Outcome:
        parameters = trained(model)
        for parameter in parameters:
            parameter.register_hook(lambda gradient: seen.setdefault(id(model), []).append(gradient))
            parameter.register_hook(lambda gradient: gradient * 0.5)
        outcome = train_step(model, tiny_batch(model))
        assert len(seen[id(model)]) == len(parameters)
        return outcome

    assert_same(act, **settings)
    mine, theirs = seen.values()
    assert sum(map(torch.Tensor.norm, mine)) == pytest.approx(float(sum(map(torch.Tensor.norm, theirs))))


def test_a_hook_taken_off_is_gone() -> None:
    def act(model: nn.Module) -> Outcome:
        handles = [parameter.register_hook(lambda gradient: gradient * 0.5) for parameter in trained(model)]
        train_step(model, tiny_batch(model))
        for handle in handles:
            handle.remove()
        return train_step(model, tiny_batch(model))

    assert_same(act)


def test_hooks_on_many_gradients_and_after_accumulation_run_once() -> None:
    calls: dict[int, list[str]] = {}

    def act(model: nn.Module) -> Outcome:
        parameters, mine = trained(model), calls.setdefault(len(calls), [])
        torch.autograd.graph.register_multi_grad_hook(parameters, lambda gradients: mine.append("all"))
        nodes = [parameter.expand_as(parameter).grad_fn.next_functions[0][0] for parameter in parameters]
        for parameter, node in zip(parameters, nodes, strict=True):
            parameter.register_post_accumulate_grad_hook(lambda parameter: mine.append("accumulated"))
            node.register_hook(lambda *gradients: mine.append("node"))
        return train_step(model, tiny_batch(model))

    assert_same(act)
    assert sorted(calls[0]) == sorted(calls[1])
    assert calls[0].count("all") == 1


def test_a_shared_parameter_with_a_hook() -> None:
    def act(model: nn.Module) -> Outcome:
        layers = model.model.layers
        layers[0].meft["ffn"].up.weight = layers[2].meft["ffn"].up.weight
        layers[0].meft["ffn"].up.weight.register_hook(lambda gradient: gradient * 0.5)
        return train_step(model, tiny_batch(model))

    assert_same(act)


@pytest.mark.parametrize("what", ["loss", "logits"])
def test_hooks_on_a_head_and_on_norms(what: str) -> None:
    """The loss in chunks and norms in tiles differentiate by themselves what they compute."""
    found = []
    for settings in ({"tile": 4}, {"engine": "autograd", "loss": "full", "lean_norms": False}):
        torch.manual_seed(5)
        model = meft_kernels.patch(tiny_llama(), modules_to_save=("lm_head",), **TRAINABLE_START, **settings).train()
        calls = []
        for parameter in (model.lm_head.weight, model.model.norm.weight, model.model.layers[1].input_layernorm.weight):
            parameter.requires_grad_().register_hook(lambda gradient, calls=calls: calls.append(1) or gradient * 0.5)
        output = model(**tiny_batch(model))
        (output.loss if what == "loss" else output.logits.square().mean()).backward()
        assert len(calls) == 3
        found.append(gradients(model))
    assert worst_error(*found) <= BOUND


@pytest.mark.parametrize("when", ["kept", "taken off after forward", "put on after forward"])
def test_forward_hooks_are_those_of_the_forward(when: str) -> None:
    """PEFT takes its hooks off after forward, libraries for steering do."""

    def act(model: nn.Module) -> Outcome:
        batch = tiny_batch(model)
        model(**batch)

        def put_on() -> Any:
            return model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 1.5)

        handle = None if when.startswith("put") else put_on()
        loss = model(**batch).loss
        if when.startswith("put"):
            put_on()
        elif when.startswith("taken"):
            handle.remove()
        loss.backward()
        return loss.item(), gradients(model)

    assert_same(act)


def test_backward_hooks_inside_a_layer() -> None:
    """Scaled gradients, once by a module's hook and once by a tensor's."""
    calls = []

    def act(model: nn.Module) -> Outcome:
        def scale(module: nn.Module, gives: Any, takes: Any) -> Any:
            calls.append(module)
            return (gives[0] * 0.5,)

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if output[0].requires_grad:
                output[0].register_hook(lambda gradient: gradient * 0.25)

        model.model.layers[1].mlp.register_full_backward_hook(scale)
        model.model.layers[2].self_attn.register_forward_hook(hook)
        return train_step(model, tiny_batch(model))

    assert_same(act)
    assert len(calls) == 2


def test_checkpointing_inside_a_layer() -> None:
    from torch.utils.checkpoint import checkpoint

    def act(model: nn.Module) -> Outcome:
        mlp = model.model.layers[1].mlp
        forward = mlp.forward
        mlp.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
        return train_step(model, tiny_batch(model))

    assert_same(act)


PLACES = ["mlp", "self_attn.q_proj", "meft.ffn", "meft.stream"]


@pytest.mark.parametrize("settings", [{}, {"tile": 4}, {"tile": 4, "attention": "pieces"}, {"variant": "meft3"}])
def test_what_is_captured_inside_a_layer_cannot_be_part_of_the_loss(settings: dict[str, Any]) -> None:
    model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START, **settings).train()
    batch = tiny_batch(model)
    expected = train_step(model, batch)
    for place in PLACES:
        captured: list[torch.Tensor] = []

        def capture(module: nn.Module, args: Any, output: Any, captured: list[torch.Tensor] = captured) -> None:
            captured.append(output[0] if isinstance(output, tuple) else output)

        handle = model.get_submodule(f"model.layers.1.{place}").register_forward_hook(capture)
        again = train_step(model, batch)  # captured alone: a look at it does no harm
        assert again[0] == expected[0]
        assert worst_error(again[1], expected[1]) <= BOUND
        captured.clear()
        model(**batch)
        with pytest.raises(ReversibleUsageError, match=r"a tensor from inside of model\.layers\.1 is part of the loss"):
            captured[0].square().mean().backward()
        handle.remove()
        model.zero_grad()


def test_captured_beside_what_else_a_layer_returns() -> None:
    """T5's layers hand position biases from one to the next."""
    model = meft_kernels.patch(zoo.tiny("t5"), **TRAINABLE_START).train()
    captured: list[torch.Tensor] = []
    block = model.get_submodule("encoder.block.0.layer.0.SelfAttention")
    block.register_forward_hook(lambda module, args, output: captured.extend(output))
    batch = zoo.batch_for(model)
    zoo.loss_of(model(**batch)).backward()
    captured.clear()
    model(**batch)
    with pytest.raises(ReversibleUsageError, match=r"a tensor from inside of encoder\.block\.0 is part of the loss"):
        captured[0].square().mean().backward()


class Steer(nn.Module):
    """Adds a vector that lives elsewhere."""

    def __init__(self, vector: torch.Tensor) -> None:
        super().__init__()
        self.hold = [vector]

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + self.hold[0]


@pytest.mark.parametrize("settings", [{}, {"tile": 4}, {"variant": "meft3"}])
@pytest.mark.parametrize("kind", ["leaf", "computed", "another layer's parameter"])
def test_a_trained_tensor_that_only_a_hook_knows_is_refused(kind: str, settings: dict[str, Any]) -> None:
    model = meft_kernels.patch(tiny_llama(), fraction_bits=16, **TRAINABLE_START, **settings).train()
    batch = tiny_batch(model)
    vector = nn.Parameter(torch.full((64,), 0.1))
    if kind == "computed":
        vector = vector * 2
    elif kind != "leaf":
        vector = model.model.layers[0].meft["ffn"].up.bias
    handle = model.model.layers[1].mlp.register_forward_hook(Steer(vector))
    with pytest.raises(ReversibleUsageError, match=r"shape \(64,\).*takes part in model\.layers\.1"):
        model(**batch)
    assert not gradients(model)
    handle.remove()
    train_step(model, batch)


@pytest.mark.parametrize("settings", [{}, {"tile": 4}, {"tile": 4, "attention": "pieces"}])
def test_it_is_refused_where_nothing_else_trains_in_the_layer(settings: dict[str, Any]) -> None:
    """Such a layer is not recorded, and the head's gradient would hide that the vector has none."""
    model = tiny_llama().requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    meft_kernels.patch(model, adapters="none", fraction_bits=16, **settings).train()
    vector = nn.Parameter(torch.full((64,), 0.1))
    handle = model.model.layers[1].mlp.register_forward_hook(Steer(vector))
    with pytest.raises(ReversibleUsageError, match=r"needs a gradient takes part in model\.layers\.1"):
        model(**tiny_batch(model))
    with torch.no_grad():
        model(**tiny_batch(model))
    handle.remove()
    train_step(model, tiny_batch(model))


@pytest.mark.parametrize("kind", ["parameter", "buffer", "view of its own parameter"])
def test_a_trained_tensor_of_the_layer_may_be_used_by_a_hook(kind: str) -> None:
    def act(model: nn.Module) -> Outcome:
        layer, vector = model.model.layers[1], torch.full((64,), 0.1)
        if kind == "parameter":
            layer.steer = vector = nn.Parameter(vector)
        elif kind == "buffer":
            layer.register_buffer("steer", vector.requires_grad_())
        else:
            vector = layer.meft["ffn"].up.bias.view(-1)
        layer.mlp.register_forward_hook(Steer(vector))
        loss, found = train_step(model, tiny_batch(model))
        if kind == "buffer":
            found["steer"] = layer.steer.grad
        return loss, found

    assert_same(act)


def test_a_tensor_in_an_object_among_the_arguments_is_refused() -> None:
    class Holder:
        vector = torch.full((64,), 0.1, requires_grad=True)

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return (output[0] + kwargs["holder"].vector, *output[1:])

    model = meft_kernels.patch(tiny_llama(), fraction_bits=16, **TRAINABLE_START).train()
    model.model.layers[1].self_attn.register_forward_hook(hook, with_kwargs=True)
    with pytest.raises(ReversibleUsageError, match=r"takes part in model\.layers\.1"):
        model.model(input_ids=tiny_batch(model)["input_ids"], holder=Holder())


def test_alora_trains() -> None:
    """PEFT tells its layers by hooks where the adapter begins, and takes them off when forward is over."""
    peft = pytest.importorskip("peft")
    outcomes = []
    for engine in ("reversible", "autograd"):
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj"],
            alora_invocation_tokens=[5, 6],
            task_type="CAUSAL_LM",
            init_lora_weights="gaussian",
        )
        model = meft_kernels.patch(peft.get_peft_model(tiny_llama(), config), adapters="none", engine=engine).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
        ids = torch.arange(10, 20).repeat(2, 1)
        ids[:, 4:6] = torch.tensor([5, 6])
        outcomes.append(train_step(model, {"input_ids": ids, "labels": ids}))
    assert outcomes[0][0] == outcomes[1][0]
    assert worst_error(outcomes[0][1], outcomes[1][1]) <= BOUND
