"""Anything trainable inside a layer trains with plain autograd's gradients: PEFT's methods, norms, biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import meft_kernels
from meft_kernels.patching.state import require_state

from ..models import VARIANTS, StreamWitness, relative_error, worst_error
from .exactness import FP32_BOUND, assert_exact, patched, skip_reason, step
from .zoo import ZOO, batch_for, tiny

peft = pytest.importorskip("peft")

# One of each kind: gated decoder, post-norm encoder, encoder-decoder, Conv1D, fused projections, images, experts.
FAMILIES = ("llama", "bert", "t5", "gpt2", "phi3", "vit", "mixtral")


def wrapped(name: str) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    if name == "mixtral":  # experts' weights are bare parameters, on which PEFT takes no dropout
        config.target_modules = ["q_proj", "v_proj"]
    model = peft.get_peft_model(tiny(name, dropout=0.1), config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:  # which starts at zero
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    return model


@pytest.mark.parametrize("adapters", ["none", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_inside(name: str, adapters: str) -> None:
    """A LoRA; PEFT's other methods: tests/scenarios/test_peft_adapters.py."""
    results = []
    for engine in ("reversible", "autograd"):
        model = wrapped(name)
        of_peft = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        patched(model, adapters=adapters, engine=engine).train()
        witnesses = StreamWitness.on_every_stack(model)
        results.append(step(model, batch_for(model.get_base_model())))
        if engine == "reversible":
            assert_exact(witnesses)
    (loss, gradients), (expected_loss, expected) = results
    assert loss == expected_loss
    assert {key for key in gradients if ".meft." not in key} == of_peft
    assert any(".meft." in key for key in gradients) == (adapters == "all")
    assert worst_error(gradients, expected) <= FP32_BOUND


def test_peft_without_our_adapters_computes_what_peft_does_up_to_the_leak() -> None:
    model = wrapped("llama").eval()
    batch = batch_for(model.get_base_model())
    with torch.no_grad():
        expected = model(**batch).logits
        found = meft_kernels.patch(model, adapters="none", beta=-1 / 64)(**batch).logits
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("adapters", ["none", "all"])
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_prefix_tuning_is_refused(name: str, calibrated: bool, adapters: str) -> None:
    """Its prefix is a filled cache, to which a recompute sends no gradient."""
    task = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}[name]
    model = peft.get_peft_model(tiny(name), peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3))
    try:
        model(**batch_for(model.get_base_model()))
    except ValueError as error:  # PEFT 0.21 looks for past_key_values in BERT's forward, where 5.24 says cache
        pytest.skip(
            f"PEFT {peft.__version__} cannot run it unpatched on transformers {transformers.__version__}: {error}"
        )
    meft_kernels.patch(model, adapters=adapters, fraction_bits=16 if calibrated else None).train()
    with pytest.raises(meft_kernels.ReversibleUsageError, match="Prefix tuning works this way"):
        model(**batch_for(model.get_base_model()))
    with torch.no_grad():
        model(**batch_for(model.get_base_model()))  # without gradients it is but a cache


def test_a_soft_prompt_counts_as_trainable(capsys: pytest.CaptureFixture[str]) -> None:
    """It is a parameter of PEFT's wrapper and not of the model inside."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = meft_kernels.patch(peft.get_peft_model(tiny("llama"), config), adapters="none")
    meft_kernels.print_trainable_parameters(model)
    assert "trainable params: 128 " in capsys.readouterr().out
    assert meft_kernels.describe(model).trainable_parameters == 128


def test_what_peft_does_not_save_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = meft_kernels.patch(wrapped("llama"))
    assert "holds PEFT's weights and not the adapters inserted now" in caplog.text
    meft_kernels.save_adapter(model, tmp_path)
    assert "Save them with PEFT's own save_pretrained, into another folder" in caplog.text
    caplog.clear()
    meft_kernels.patch(wrapped("llama"), adapters="none")
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("name", ["llama", "bert", "bart", "distilbert", "deberta-v2", "gpt2", "opt", "t5"])
def test_our_adapters_outlive_a_merge(name: str) -> None:
    """PEFT puts other modules in the place of those that the adapter beside the FFN taps."""
    torch.manual_seed(0)
    model = patched(peft.get_peft_model(tiny(name), peft.LoraConfig(r=4, target_modules="all-linear"))).eval()
    batch = batch_for(model.get_base_model())
    with torch.no_grad():
        expected = model(**batch).logits
        merged = model.merge_and_unload()
        found = merged(**batch).logits
    # A fresh LoRA adds nothing; streams round to 2^-20 or so.
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    results = []
    for engine in ("reversible", "autograd"):
        for stack in require_state(merged).stacks:
            stack.engine = engine
        results.append(step(merged.train(), batch)[1])
    assert sum(".meft.ffn." in key for key in results[0]) == sum(
        ".meft.ffn." in key for key, _ in merged.named_parameters()
    )
    assert worst_error(*results, floor=1e-2) <= FP32_BOUND
    meft_kernels.unpatch(merged)
    assert not any(module._forward_pre_hooks for key, module in merged.named_modules() if "layers." in key)


@pytest.mark.parametrize("adapters", ["none", "all"])
@pytest.mark.parametrize("name", ZOO)
def test_norms_biases_and_position_biases(name: str, adapters: str) -> None:
    """Unfrozen after patching; T5's relative attention bias lies in one layer and acts in all of them."""
    for variant in VARIANTS[1:] if skip_reason(name, "meft3") is None else VARIANTS[1:2]:
        results = []
        for engine in ("reversible", "autograd"):
            model = tiny(name, dropout=0.1)
            model.requires_grad_(False)
            patched(model, adapters=adapters, engine=engine, variant=variant)
            unfrozen = {
                key
                for key, parameter in model.named_parameters()
                if ".meft." not in key and (parameter.dim() == 1 or "relative_attention_bias" in key)
            }
            for key in unfrozen:
                model.get_parameter(key).requires_grad_(True)
            results.append(step(model.train(), batch_for(model)))
        (loss, gradients), (expected_loss, expected) = results
        assert loss == expected_loss
        assert gradients.keys() == expected.keys()
        assert unfrozen & gradients.keys()
        if name == "t5":
            assert sum("relative_attention_bias" in key for key in gradients) == 2
        # 1e-2 of the whole: what is held to 1e-5 of it is held to fp32's own rounding of the whole, 1e-7.
        assert worst_error(gradients, expected, floor=1e-2) <= FP32_BOUND


def test_gradient_of_a_position_bias_comes_from_every_layer() -> None:
    """Against plain transformers: were it lost on the way, both engines could agree and be wrong."""
    gradients = []
    for variant in (None, "meft2", "meft3"):
        model = tiny("t5").requires_grad_(False)
        if variant is not None:
            # At 1/2^12 the coupling is, but for a thousandth, the pretrained model.
            coefficients = {"beta": 2.0**-12} | ({"lam": 2.0**-12} if variant == "meft3" else {})
            meft_kernels.patch(model, variant=variant, adapters="none", fraction_bits=20, **coefficients)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("relative_attention_bias" in key)
        gradients.append(step(model.train(), batch_for(model))[1])
    plain, *ours = gradients
    assert len(plain) == 2
    for found in ours:
        assert relative_error(found, plain) < 0.01


def test_a_routers_noise_repeats() -> None:
    """Mixtral's jitter multiplies the MLP's input in place, by random numbers."""
    results = []
    for engine in ("reversible", "autograd"):
        model = patched(tiny("mixtral", router_jitter_noise=0.2), engine=engine).train()
        results.append(step(model, batch_for(model)))
    assert results[0][0] == results[1][0]
    assert worst_error(results[0][1], results[1][1]) <= FP32_BOUND
    assert step(model, batch_for(model), seed=9)[0] != results[1][0]  # it was live
