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
    PatchError,
    ReversibleUsageError,
    UnsupportedModelError,
)
from meft_kernels.patching.state import find_state, require_state

from .models import TRAINABLE_START, tiny_batch, tiny_bert, tiny_llama, train_step


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
        ({"modules_to_save": ("nothing",)}, "no module or parameter nothing"),
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
    with pytest.raises(TypeError, match=r"no setting 'rnak': did you mean rank\? Known are activation, .*variant"):
        meft_kernels.patch(tiny_llama(), rnak=8)
    with pytest.raises(ValueError, match="unknown settings rnak"):
        MeftConfig.from_dict({"rnak": 8})


def test_what_is_no_model_or_no_config() -> None:
    with pytest.raises(TypeError, match="as from_pretrained gives it, not a str"):
        meft_kernels.patch("distilbert-base-uncased")  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"given by name, as in patch\(model, rank=8\)"):
        meft_kernels.patch(tiny_llama(), {"rank": 8})  # type: ignore[arg-type]


def test_config_round_trip() -> None:
    config = MeftConfig.paper("meft2", modules_to_save=("classifier",))
    assert MeftConfig.from_dict(config.to_dict()) == config
    for option in dataclasses.fields(MeftConfig):
        assert option.metadata["help"]


def test_unsupported_model_lists_what_is() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=32, n_head=2, vocab_size=50))
    before = fingerprint(model)
    with pytest.raises(
        UnsupportedModelError, match=r"'bloom' is not supported; supported are: bart, bert, .*register_arch.*README"
    ):
        meft_kernels.patch(model, trust="written")
    with pytest.raises(ValueError, match="trust must be one of found, written; got 'all'"):
        meft_kernels.patch(model, trust="all")
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
    model.model.gradient_checkpointing_enable()  # not through the model that was patched
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
    with pytest.raises(UnsupportedModelError, match=r"InferenceOnlyQuantizer.*GgufConfig\(dequantize=True\)"):
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
    for others in ((0, 2, 1), (0, 0, 1)):  # whose hidden states are those of the layer before
        model = meft_kernels.patch(tiny_llama(), fraction_bits=16)
        layers = list(model.model.layers)
        for place, other in enumerate(others):
            model.model.layers[place] = layers[other]
        with pytest.raises(ReversibleUsageError, match=rf"layers.{others[1]} was called where model.layers.1 was due"):
            model(**tiny_batch(model))


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


def test_a_supported_part_of_a_composite_is_named() -> None:
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**small), BertConfig(**small))
    model = EncoderDecoderModel(config)
    with pytest.raises(UnsupportedModelError, match=r"Its part encoder \(bert\) is: patch\(model\.encoder\)"):
        meft_kernels.patch(model, trust="written")
    meft_kernels.patch(model.encoder)


def test_settings_that_only_the_model_can_refuse() -> None:
    model = tiny_llama()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"activation 'foo' is none of .*gelu"):
        meft_kernels.patch(model, activation="foo")
    assert_unchanged(model, before)
    with pytest.raises(TypeError, match="batch is a mapping of the model's keyword arguments, not Tensor"):
        meft_kernels.verify(meft_kernels.patch(model), torch.zeros(2))


def test_shared_layers_are_refused() -> None:
    model = tiny_llama()
    model.model.layers[2] = model.model.layers[0]
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers holds the same layer more than once"):
        meft_kernels.patch(model)
    assert_unchanged(model, before)


def test_a_pass_that_begins_anew_halfway() -> None:
    """A model that loops over its layers in an order of its own would get a stream where it expects hidden states."""
    model = meft_kernels.patch(tiny_llama(), fraction_bits=16)
    inner = model.model
    hidden_states = inner.embed_tokens(torch.tensor([[3, 4]]))
    call = {"position_embeddings": inner.rotary_emb(hidden_states, torch.tensor([[0, 1]])), "attention_mask": None}
    hidden_states = inner.layers[0](hidden_states, **call)
    with pytest.raises(ReversibleUsageError, match=r"layers\.0 was called where model\.layers\.1 was due"):
        inner.layers[0](hidden_states, **call)
    for layer in inner.layers:  # and the next pass is a new one
        hidden_states = layer(hidden_states, **call)
