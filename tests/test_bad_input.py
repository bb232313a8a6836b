"""Every wrong use gets a clear error, before anything is changed."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import meft_kernels
from meft_kernels import (
    MeftConfig,
    NonFiniteError,
    NotRepeatableError,
    PatchError,
    ReversibleUsageError,
    StreamOverflowError,
    UnsupportedModelError,
)
from meft_kernels.patching import find_state, require_state

from .models import TRAINABLE_START, tiny_batch, tiny_bert, tiny_llama, train_step, worst_error


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Everything that a refused call must leave alone."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
        [(name, sorted(vars(module))) for name, module in model.named_modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    )


def assert_unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    after = fingerprint(model)
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][name], before[0][name]) for name in before[0])
    assert after[1:] == before[1:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": 0.3}, "lam: .*nearest is 0.333"),
        ({"beta": 0.7}, "beta: .*nearest is 0.5"),
        ({"lam": 2.0}, "lam: .*nearest is 1.0"),
        ({"lam": 0.0}, "lam must be a finite number other than 0"),
        ({"lam": float("nan"), "arithmetic": "float"}, "lam"),
        ({"rank": 0}, "rank must be an integer >= 1"),
        ({"rank": 2.5}, "rank must be an integer >= 1"),
        ({"fraction_bits": 29}, r"fraction_bits must be in \[0, 28\]"),
        ({"fraction_bits": -1}, "fraction_bits"),
        ({"fraction_bits": 14, "arithmetic": "float"}, "belongs to arithmetic='exact'"),
        ({"variant": "meft4"}, "variant must be one of meft1, meft2, meft3"),
        ({"dropout": 1.0}, "dropout"),
        ({"up_init_std": -1.0}, "up_init_std"),
        ({"frozen_layers": 3}, "leaves none of the 3 layers"),
        ({"frozen_layers": 1, "reversible_layers": 3}, "reversible_layers=3"),
        ({"modules_to_save": ("nothing",)}, "no module nothing"),
        ({"modules_to_save": "lm_head"}, "for one write"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        meft_kernels.patch(model, **settings)
    assert_unchanged(model, before)


def test_unknown_setting_names_itself() -> None:
    with pytest.raises(TypeError, match="rnak"):
        meft_kernels.patch(tiny_llama(), rnak=8)
    with pytest.raises(ValueError, match="unknown settings rnak"):
        MeftConfig.from_dict({"rnak": 8})


def test_config_round_trip() -> None:
    config = MeftConfig.paper("meft2", modules_to_save=("classifier",))
    assert MeftConfig.from_dict(config.to_dict()) == config
    for option in dataclasses.fields(MeftConfig):
        assert option.metadata["help"]


def test_unsupported_model_lists_what_is() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50))
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=r"'gpt2' is not supported; supported are: bert, llama"):
        meft_kernels.patch(model)
    with pytest.raises(UnsupportedModelError, match="Linear, which has no config"):
        meft_kernels.patch(nn.Linear(2, 2))
    assert_unchanged(model, before)


def test_patched_twice() -> None:
    model = tiny_llama()
    assert meft_kernels.patch(model, rank=4) is model
    adapters = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert meft_kernels.patch(model, rank=4) is model
    with pytest.raises(PatchError, match=r"rank=4 \(asked for 8\).*unpatch"):
        meft_kernels.patch(model, rank=8)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in adapters.items())


def test_not_patched() -> None:
    for call in (meft_kernels.unpatch, meft_kernels.describe):
        with pytest.raises(PatchError, match="not patched"):
            call(tiny_llama())
    with pytest.raises(PatchError, match="not patched"):
        meft_kernels.verify(tiny_llama(), {})


def test_part_of_a_patched_model_is_not_patched_again() -> None:
    model = meft_kernels.patch(tiny_llama())
    with pytest.raises(PatchError, match="already patched as part of another model"):
        meft_kernels.patch(model.model)


def test_gradient_checkpointing_before_and_after() -> None:
    model = tiny_llama()
    model.gradient_checkpointing_enable()
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match="gradient_checkpointing_disable"):
        meft_kernels.patch(model)
    assert_unchanged(model, before)
    model.gradient_checkpointing_disable()
    meft_kernels.patch(model).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ReversibleUsageError, match=r"gradient checkpointing is on for model.layers.0"):
        model(**tiny_batch(model))


def test_meta_device_and_untrainable_quantisation() -> None:
    with torch.device("meta"):
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM(tiny_llama().config)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        meft_kernels.patch(model)

    class InferenceOnlyQuantizer:
        is_trainable = False

    model = tiny_llama()
    model.hf_quantizer = InferenceOnlyQuantizer()
    with pytest.raises(UnsupportedModelError, match="InferenceOnlyQuantizer"):
        meft_kernels.patch(model)
    assert find_state(model) is None


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_captured_outputs(name: str) -> None:
    # eager: sdpa gives no attention weights
    model = meft_kernels.patch(tiny_llama(attn_implementation="eager"), **TRAINABLE_START).train()
    batch = tiny_batch(model)
    with pytest.raises(ReversibleUsageError, match=f"{name} is not available"):
        model(**batch, **{name: True})
    with torch.no_grad():
        captured = model(**batch, **{name: True})[name.removeprefix("output_")]
    assert len(captured) == 3 + (name == "output_hidden_states")
    setattr(model.config, name, True)
    with pytest.raises(ReversibleUsageError, match=f"{name} is not available"):
        model(**batch)


def test_second_backward() -> None:
    model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START).train()
    loss = model(**tiny_batch(model)).loss
    loss.backward(retain_graph=True)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with pytest.raises(ReversibleUsageError, match="an earlier backward through the same forward"):
        loss.backward()
    assert all(torch.equal(dict(model.named_parameters())[name].grad, g) for name, g in gradients.items())


def test_layers_out_of_order() -> None:
    model = meft_kernels.patch(tiny_llama(), fraction_bits=16)
    model.config.num_hidden_layers = 2
    with pytest.raises(ReversibleUsageError, match=r"returned before model.layers.2"):
        model(**tiny_batch(model))
    hidden = torch.randn(1, 3, 64)
    with pytest.raises(ReversibleUsageError, match=r"model.layers.1 was called where the first layer was due"):
        model.model.layers[1](hidden)


def test_uncalibrated_layer_called_alone() -> None:
    model = meft_kernels.patch(tiny_llama())
    with pytest.raises(ReversibleUsageError, match="could not be calibrated"):
        model.model.layers[0](torch.randn(1, 3, 64))


def test_hidden_states_changed_between_layers() -> None:
    model = meft_kernels.patch(tiny_llama(), fraction_bits=16)
    batch = tiny_batch(model)
    handle = model.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(ReversibleUsageError, match=r"model.layers.2 got are not those"):
        model(**batch)
    handle.remove()

    def change_in_place(module: nn.Module, args: object, output: torch.Tensor) -> None:
        output.mul_(2)

    handle = model.model.layers[1].register_forward_hook(change_in_place)
    with torch.no_grad(), pytest.raises(ReversibleUsageError, match=r"model.layers.2 got are not those"):
        model(**batch)
    handle.remove()
    model(**batch)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{"fraction_bits": 16}, {"arithmetic": "float"}, {}])
def test_non_finite_names_the_layer(settings: dict[str, Any], value: float) -> None:
    model = meft_kernels.patch(tiny_llama(), **settings).train()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    with pytest.raises(NonFiniteError, match=r"G \(layer\) of model.layers.1"):
        model(**tiny_batch(model))
    embeds = torch.full((1, 2, 64), value)
    with pytest.raises(NonFiniteError, match="the hidden states that enter"):
        model(inputs_embeds=embeds)


def test_overflow_names_the_layer_and_loses_nothing() -> None:
    model = meft_kernels.patch(tiny_llama(), fraction_bits=28, **TRAINABLE_START).train()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StreamOverflowError, match=r"G \(layer\) of model.layers.1.*smaller fraction_bits than 28"):
        model(**tiny_batch(model))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_overflow_after_calibration_recalibrates() -> None:
    model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START).train()
    batch = tiny_batch(model)
    train_step(model, batch)
    stack = require_state(model).stacks[0]
    bits = stack.arithmetic.fraction_bits
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2e5)
    with pytest.raises(StreamOverflowError, match="calibrated anew"):
        model(**batch)
    train_step(model, batch)
    assert stack.arithmetic.fraction_bits < bits


class Forgetful(nn.Module):
    """Gives something else whenever it is called again."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x) * (1 + 1e-3 * self.calls)


def test_layer_that_does_not_repeat() -> None:
    model = meft_kernels.patch(tiny_llama(), fraction_bits=16, **TRAINABLE_START).train()
    model.model.layers[1].mlp.down_proj = Forgetful(model.model.layers[1].mlp.down_proj)
    loss = model(**tiny_batch(model)).loss
    with pytest.raises(
        NotRepeatableError, match=r"G \(layer\) of model.layers.1 did not compute the same bits.*causes"
    ):
        loss.backward()
    report = meft_kernels.verify(model, tiny_batch(model))
    assert not report.bit_exact
    assert report.first_mismatch == "model.layers.1"


def test_weights_changed_between_forward_and_backward() -> None:
    model = meft_kernels.patch(tiny_bert(), **TRAINABLE_START).train()
    loss = model(**tiny_batch(model)).loss
    with torch.no_grad():
        model.bert.encoder.layer[2].meft["stream"].up.bias.add_(0.1)
    with pytest.raises(NotRepeatableError, match=r"F \(adapter\) of bert.encoder.layer.2"):
        loss.backward()


def test_wrong_dtype_of_hidden_states() -> None:
    model = meft_kernels.patch(tiny_llama(), fraction_bits=16)
    with pytest.raises(ReversibleUsageError, match="hidden states must be"):
        model.model.layers[0](torch.ones(1, 2, 64, dtype=torch.int64))


def test_error_in_a_layer_leaves_the_model_usable() -> None:
    model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START).train()
    batch = tiny_batch(model)
    expected = train_step(model, batch)[1]
    mlp = model.model.layers[1].mlp
    forward, mlp.forward = mlp.forward, None
    with pytest.raises(TypeError):
        model(**batch)
    mlp.forward = forward
    again = train_step(model, batch)[1]
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_copy_of_a_patched_model_is_independent() -> None:
    model = meft_kernels.patch(tiny_bert(), **TRAINABLE_START)
    batch = tiny_batch(model)
    logits = model(**batch).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).logits, logits)
    with torch.no_grad():
        for layer in require_state(twin).stacks[0].layers:
            layer.adapter.up.weight.zero_()
            layer.tap.adapter.up.weight.zero_()
    assert not torch.equal(twin(**batch).logits, logits)
    assert torch.equal(model(**batch).logits, logits)


def test_filled_cache_in_training() -> None:
    from transformers import DynamicCache

    model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=cache, use_cache=True)
    model.train()
    with pytest.raises(ReversibleUsageError, match="past_key_values holds earlier tokens"):
        model(input_ids=torch.tensor([[4]]), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("arithmetic", ["exact", "float"])
def test_dropout_live_in_a_part_of_the_model(arithmetic: str) -> None:
    """The first layer in eval mode, or only the dropout modules in train mode, must replay all the same."""
    for choose in ("first layer", "dropout alone"):
        results = []
        for engine in ("reversible", "autograd"):
            torch.manual_seed(5)
            model = meft_kernels.patch(tiny_bert(), arithmetic=arithmetic, engine=engine, beta=0.5, **TRAINABLE_START)
            if choose == "first layer":
                model.train()
                model.bert.encoder.layer[0].eval()
            else:
                for module in model.modules():
                    module.training = isinstance(module, nn.Dropout)
            results.append(train_step(model, tiny_batch(model)))
        assert results[0][0] == results[1][0]
        # Three layers at 1/0.5 amplify float's rounding (1.2e-7) to 1e-6; another mask gave 5e-2.
        assert worst_error(results[0][1], results[1][1]) < 1e-3


def test_parameters_gone_between_forward_and_backward() -> None:
    model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START).train()
    loss = model(**tiny_batch(model)).loss
    meft_kernels.unpatch(model)
    with pytest.raises(ReversibleUsageError, match="replaced or frozen between forward and backward"):
        loss.backward()
    meft_kernels.patch(model, **TRAINABLE_START)
    loss = model(**tiny_batch(model)).loss
    model.model.layers[1].meft.requires_grad_(False)
    with pytest.raises(ReversibleUsageError, match="replaced or frozen between forward and backward"):
        loss.backward()


def test_partial_backward_is_checked() -> None:
    model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START).train()
    loss = model(**tiny_batch(model)).loss
    top = model.model.layers[2].meft["ffn"].up.weight
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.add_(0.01)
    with pytest.raises(NotRepeatableError, match=r"model.layers.2"):
        torch.autograd.grad(loss, [top])


def test_recalibration_goes_down_and_stays_down() -> None:
    model = meft_kernels.patch(tiny_llama(), **TRAINABLE_START).train()
    batch = tiny_batch(model)
    train_step(model, batch)
    stack = require_state(model).stacks[0]
    large = {"inputs_embeds": torch.full((1, 3, 64), 2.0**12)}
    bits = []
    for _ in range(6):
        try:
            model(**large)
        except StreamOverflowError:
            train_step(model, batch)
        bits.append(stack.arithmetic.fraction_bits)
    assert bits[0] < 22
    assert bits == sorted(bits, reverse=True)
    assert bits[-1] == bits[-2] <= 17  # 2^12 fits from k = 17 on


def test_data_parallel_replica() -> None:
    model = meft_kernels.patch(tiny_llama(), fraction_bits=16)
    model.model._is_replica = True
    with pytest.raises(ReversibleUsageError, match="DataParallel is not supported"):
        model(**tiny_batch(model))


def test_wrapped_again_after_patch() -> None:
    model = meft_kernels.patch(tiny_llama(), fraction_bits=16)
    layer = model.model.layers[1]
    ours, layer.forward = layer.forward, lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(PatchError, match=r"forward of model.layers.1 was wrapped again"):
        meft_kernels.unpatch(model)
    layer.forward = ours
    meft_kernels.unpatch(model)
