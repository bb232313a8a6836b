"""What lies between a layer's forward and its recompute: modes, weights, buffers, backward passes of other kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import meft_kernels
from meft_kernels import ReversibleUsageError

from .architectures import zoo
from .models import TRAINABLE_START, pair, relative_error, tiny_batch, tiny_llama, train_step, worst_error

BOUND = 1e-5  # fp32: measured 1e-7 to 4e-7, the bound is the one that README promises


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def calibrated(**settings: Any) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = meft_kernels.patch(tiny_llama(), **{**TRAINABLE_START, **settings}).train()
    batch = tiny_batch(model)
    model(**batch)
    return model, batch


@pytest.mark.parametrize("kind", ["leaves", "parameters", "copies", "scaled"])
def test_functional_call_trains_what_it_was_given(kind: str) -> None:
    make = {
        "leaves": lambda p: p.detach().clone().requires_grad_(),
        "parameters": lambda p: nn.Parameter(p.detach().clone()),
        "copies": lambda p: p.clone(),
        "scaled": lambda p: p * 1.01,
    }[kind]
    found = []
    for model in pair("llama"):
        batch = tiny_batch(model)
        model(**batch)
        given = {name: make(p) for name, p in model.named_parameters() if p.requires_grad}
        for tensor in given.values():
            tensor.register_hook(lambda gradient: gradient * 0.5)
        torch.func.functional_call(model, given, (), batch).loss.backward()
        assert all(not hasattr(p, "grad_fn") or p.grad_fn is None for p in model.parameters())
        leaves = given if kind in ("leaves", "parameters") else dict(model.named_parameters())
        found.append({name: leaves[name].grad for name in given})
    assert worst_error(*found) <= BOUND


@pytest.mark.parametrize("what", ["model.layers.1.meft.ffn.down.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_changed_in_place_are_told_of_where_the_output_shows_nothing(what: str) -> None:
    """With ``up`` at zero, nothing below it changes what the layer gives."""
    model, batch = calibrated(up_init_std=0.0)
    loss = model(**batch).loss
    with torch.no_grad():
        model.get_parameter(what).neg_()
    name = what.removeprefix("model.layers.1.")
    with pytest.raises(ReversibleUsageError, match=f"{name} of model.layers.1 was changed in place"):
        loss.backward()


def test_arguments_changed_in_place_are_told_of() -> None:
    model, batch = calibrated(up_init_std=0.0)
    mask = torch.zeros(2, 1, 7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), torch.finfo(torch.float32).min)
    loss = model(input_ids=batch["input_ids"], labels=batch["labels"], attention_mask=mask).loss
    mask.zero_()
    with pytest.raises(ReversibleUsageError, match=r"an argument of shape \(2, 1, 7, 7\) .* was changed in place"):
        loss.backward()


def test_merging_before_backward_is_told_of_where_the_output_shows_nothing() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    meft_kernels.patch(model, adapters="none", fraction_bits=16).train()
    loss = model(**tiny_batch(tiny_llama())).loss
    model.merge_adapter()  # B is zero: weights and outputs stay as they are
    with pytest.raises(ReversibleUsageError, match=r"lora_B.* of model\.layers\.2 took part in forward and not"):
        loss.backward()
    model.unmerge_adapter()
    model.zero_grad()
    train_step(model, tiny_batch(tiny_llama()))


def test_a_parameter_replaced_after_forward_gets_its_gradient() -> None:
    found = []
    for model in pair("llama"):
        batch = tiny_batch(model)
        model(**batch)
        loss = model(**batch).loss
        up = model.model.layers[1].meft["ffn"].up
        before, up.weight = up.weight, nn.Parameter(torch.zeros_like(up.weight))
        replacement = up.weight
        loss.backward()
        assert up.weight is replacement
        assert replacement.grad is None
        found.append({**gradients(model), "before": before.grad})
    assert worst_error(*found) <= BOUND


def test_modes_and_flags_are_those_of_the_forward() -> None:
    """Dropout in front of an ``up`` that is zero; a frozen weight that is to be trained from the next step on."""
    found = []
    for model in pair("llama", dropout=0.5, up_init_std=0.0):
        batch = tiny_batch(model)
        model(**batch)
        torch.manual_seed(3)
        loss = model(**batch).loss
        model.eval()
        model.model.layers[1].mlp.up_proj.weight.requires_grad_()
        loss.backward()
        assert not any(module.training for module in model.modules())
        found.append({name: gradient for name, gradient in gradients(model).items() if ".up." in name})
    assert worst_error(*found) <= BOUND


class Normed(nn.Module):
    """A linear with a norm of batches after it, as in convolutional layers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.norm = nn.BatchNorm1d(inner.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.inner(x).transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("calibrates", [True, False])
def test_running_statistics_move_once_a_step(calibrates: bool) -> None:
    found, buffers = [], []
    for model in pair("llama", fraction_bits=None if calibrates else 16):
        mlp = model.model.layers[1].mlp
        mlp.down_proj = Normed(mlp.down_proj)
        batch = tiny_batch(model)
        losses = [model(**batch).loss, model(**tiny_batch(model, seed=2)).loss]
        losses[0].backward()
        losses[1].backward()
        found.append(gradients(model))
        buffers.append(mlp.down_proj.norm)
    assert worst_error(*found) <= BOUND
    assert buffers[0].num_batches_tracked == buffers[1].num_batches_tracked == 2
    assert torch.equal(buffers[0].running_mean, buffers[1].running_mean)
    assert torch.equal(buffers[0].running_var, buffers[1].running_var)


def test_a_buffer_that_forward_reads_and_writes() -> None:
    """Spectral norm moves its vector in every forward in train mode, and divides by what it gives."""
    found, vectors = [], []
    for model in pair("llama"):
        model(**tiny_batch(model))
        linear = model.model.layers[1].mlp.down_proj
        torch.manual_seed(0)
        torch.nn.utils.parametrizations.spectral_norm(linear)
        found.append(train_step(model, tiny_batch(model)))
        vectors.append(linear.parametrizations.weight[0]._u.clone())
    assert found[0][0] == found[1][0]
    assert worst_error(found[0][1], found[1][1]) <= BOUND
    assert torch.equal(*vectors)


def test_a_large_buffer_that_forward_writes_to_is_refused() -> None:
    class Remembering(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.register_buffer("memory", torch.zeros(300, 300))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.memory.add_(1)
            return self.inner(x)

    model, batch = calibrated()
    model.model.layers[1].mlp = Remembering(model.model.layers[1].mlp)
    with pytest.raises(ReversibleUsageError, match=r"model\.layers\.1 writes to its buffer memory"):
        model(**batch)
    model.model.layers[1].mlp.eval()
    train_step(model, batch)


def test_a_layer_in_eval_mode_below_others() -> None:
    found = []
    for model in pair("llama"):
        model.model.layers[1].eval()
        found.append(train_step(model, tiny_batch(model)))
    assert found[0][0] == found[1][0]
    assert worst_error(found[0][1], found[1][1]) <= BOUND


@pytest.mark.parametrize("variant", ["meft1", "meft3"])
def test_a_loss_on_a_layer_in_the_middle(variant: str) -> None:
    """Alone it leaves the streams above as they are; with the output beside it, times zero, it is right."""
    found = []
    for model in pair("llama", variant=variant):
        states: list[torch.Tensor] = []
        model.model.layers[1].register_forward_hook(lambda module, args, output, states=states: states.append(output))
        batch = tiny_batch(model)
        model(**batch)
        states.clear()
        output = model(**batch)
        if not found:
            with pytest.raises(ReversibleUsageError, match=r"backward begins at model\.layers\.1, above which"):
                states[-1].square().sum().backward(retain_graph=True)
            assert not gradients(model)
        (states[-1].square().sum() + 0 * output.logits.sum()).backward()
        found.append({name: gradient for name, gradient in gradients(model).items() if "layers.2" not in name})
    assert relative_error(*found) <= BOUND


def test_second_derivatives_want_the_other_engine() -> None:
    """A gradient penalty: exact in ``engine="autograd"``, with its norms in tiles as without."""
    embeds = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1))
    found = []
    for settings in ({"engine": "autograd"}, {"engine": "autograd", "lean_norms": False}, {}):
        torch.manual_seed(5)
        model = tiny_llama(attn_implementation="eager")
        meft_kernels.patch(model, fraction_bits=20, tile=16, **TRAINABLE_START, **settings).train()
        given = embeds.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model.model(inputs_embeds=given)[0].sin().sum(), given, create_graph=True)
        if not settings:
            with pytest.raises(ReversibleUsageError, match=r"first derivatives only.*engine='autograd'"):
                gradient.square().sum().backward()
        else:
            gradient.square().sum().backward()
            found.append(gradients(model))
    assert worst_error(*found) <= 1e-4


def test_transforms_are_refused() -> None:
    model, batch = calibrated()
    given = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def loss(given: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, given, (), batch).loss

    with pytest.raises(ReversibleUsageError, match=r"torch.func's transforms.*engine='autograd'"):
        torch.func.grad(loss)(given)
    with pytest.raises(ReversibleUsageError, match=r"forward-mode"), torch.autograd.forward_ad.dual_level():
        model(**batch)
    train_step(model, batch)


@pytest.mark.parametrize("bits", [None, 22])
def test_prefix_tuning_by_the_other_engine(bits: int | None) -> None:
    peft = pytest.importorskip("peft")
    found = []
    for patched in (True, False):
        torch.manual_seed(0)
        config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        model = peft.get_peft_model(tiny_llama(), config).train()
        if patched:
            meft_kernels.patch(model, adapters="none", engine="autograd", fraction_bits=bits)
        found.append(train_step(model, tiny_batch(tiny_llama())))
    assert abs(found[0][0] - found[1][0]) < 1e-3  # the streams leak a 256th
    assert worst_error(found[0][1], found[1][1]) < 0.01


def test_losses_on_what_layers_give_beside_a_soft_prompt() -> None:
    peft = pytest.importorskip("peft")
    found = []
    for engine in ("reversible", "autograd"):
        torch.manual_seed(0)
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        model = peft.get_peft_model(zoo.tiny("mixtral"), config)
        meft_kernels.patch(model, adapters="none", engine=engine).train()
        nn.init.normal_(model.prompt_encoder.default.embedding.weight, std=0.02)
        batch = tiny_batch(tiny_llama(), rows=1)
        if engine == "reversible":
            for name in ("output_router_logits", "output_attentions"):
                with pytest.raises(ReversibleUsageError, match=f"{name} is not available"):
                    model(**batch, **{name: True})
        found.append(train_step(model, batch))
    assert worst_error(found[0][1], found[1][1]) <= BOUND
