"""What single families do differently: 16-bit clamps, convolutions, routers, heads that train with the adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import meft_kernels
from meft_kernels.architectures import registry
from meft_kernels.patching.state import require_state

from ..models import StreamWitness, worst_error
from .exactness import CASES, FP32_BOUND, assert_exact, loss_of, patched, step
from .written import spec_of
from .zoo import batch_for, heads, tiny

# What float16 asks of a family, it asks under every variant: one will do.
IN_16_BITS = [(*case, "bfloat16") for case in CASES]
IN_16_BITS += [(*case, "float16") for case in CASES if case[1] == "meft2"]


@pytest.mark.parametrize(("name", "variant", "precision"), IN_16_BITS)
def test_exact_in_16_bits(name: str, variant: str, precision: str) -> None:
    dtype = getattr(torch, precision)
    model = patched(tiny(name, dropout=0.1).to(dtype), variant=variant).train()
    witnesses = StreamWitness.on_every_stack(model)
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch_for(model).items()}
    torch.manual_seed(2)
    loss_of(model(**batch)).backward()
    assert_exact(witnesses)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("variant", ["meft2", "meft3"])
@pytest.mark.parametrize(
    ("name", "weight"), [("t5", "block.2.layer.1.DenseReluDense.wo"), ("bart", "layers.2.final_layer_norm")]
)
def test_float16_infinities_are_clamped_as_the_layer_does(name: str, weight: str, variant: str) -> None:
    """T5 and BART turn what overflows float16 into large numbers, and go on."""
    lam = 0.125 if variant == "meft3" else None
    model = patched(tiny(name).half(), variant=variant, fraction_bits=10, lam=lam, beta=0.125)
    encoder = model.get_encoder()
    with torch.no_grad():
        encoder.get_submodule(weight).weight.fill_(60000.0)
    witnesses = StreamWitness.on_every_stack(model.train())[:1]
    outputs: list[torch.Tensor] = []
    encoder.get_submodule(weight).register_forward_hook(lambda module, args, output: outputs.append(output))
    batch = batch_for(model)
    hidden_states = encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    hidden_states.float().square().mean().backward()
    assert outputs[0].isinf().any()
    assert torch.isfinite(hidden_states).all()
    assert_exact(witnesses)


@pytest.mark.parametrize("frozen", [0, 1])
def test_deberta_with_a_convolution(frozen: int) -> None:
    """It comes between the first layer and the second: a stack for each run of layers."""
    results = []
    for engine in ("reversible", "autograd"):
        model = tiny("deberta-v2", dropout=0.1, conv_kernel_size=3, conv_act="gelu")
        model = patched(model, frozen_layers=frozen, engine=engine).train()
        results.append(step(model, batch_for(model)))
    assert len(require_state(model).stacks) == 2 - frozen
    assert results[0][0] == results[1][0]
    assert worst_error(results[0][1], results[1][1]) <= FP32_BOUND


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_router_logits_are_refused_in_training_and_given_without_gradients(name: str) -> None:
    model = patched(tiny(name))
    batch = batch_for(model)
    with torch.no_grad():
        output = model(**batch, output_router_logits=True)
    assert len(output.router_logits) == 3
    with pytest.raises(meft_kernels.ReversibleUsageError, match="output_router_logits=False"):
        model.train()(**batch, output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(meft_kernels.ReversibleUsageError, match="output_router_logits"):
        model(**batch)


def test_soft_capping_is_the_attentions_own() -> None:
    """Gemma 2 caps scores where attention is eager; the layer is called, not copied, so it is the one that ran."""
    capped = patched(tiny("gemma2", attn_implementation="eager", attn_logit_softcapping=0.5), fraction_bits=16)
    free = patched(tiny("gemma2", attn_implementation="eager", attn_logit_softcapping=None), fraction_bits=16)
    batch = batch_for(capped)
    assert (capped(**batch).logits - free(**batch).logits).abs().max() > 1e-3
    for variant in ("meft2", "meft3"):
        results = []
        for engine in ("reversible", "autograd"):
            model = tiny("gemma2", attn_implementation="eager", attn_logit_softcapping=0.5)
            results.append(step(patched(model, variant=variant, engine=engine).train(), batch))
        assert worst_error(results[0][1], results[1][1]) <= FP32_BOUND


def test_a_language_model_head_tied_to_the_embeddings(tmp_path: Path) -> None:
    """Trained as a module to save, it takes the embeddings along: one weight, its gradient the sum of both uses."""
    results = []
    for engine in ("reversible", "autograd"):
        model = patched(tiny("gemma3_text"), engine=engine, modules_to_save=("lm_head",)).train()
        assert model.lm_head.weight is model.get_input_embeddings().weight
        batch = batch_for(model)
        results.append(step(model, batch))
    assert results[0][0] == results[1][0]
    assert worst_error(results[0][1], results[1][1]) <= FP32_BOUND
    assert "model.embed_tokens.weight" in results[0][1]
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
        expected = model.eval()(**batch).logits
        meft_kernels.save_adapter(model, tmp_path)
        found = meft_kernels.load_adapter(tiny("gemma3_text"), tmp_path)(**batch).logits
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["bart", "t5", "bert-decoder"])
def test_eval_with_gradients_and_without_a_cache_is_reversible(name: str) -> None:
    """BART's encoder layers are told use_cache=True whatever the caller says, and have no cache."""
    model = patched(tiny(name), fraction_bits=16).eval()
    witnesses = StreamWitness.on_every_stack(model)
    loss_of(model(**batch_for(model), use_cache=False)).backward()
    assert_exact(witnesses)
    assert all(len(witness.equal) == 3 for witness in witnesses)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert-decoder", "gpt2", "opt"])
def test_a_bare_cache_is_filled(name: str) -> None:
    """An empty DynamicCache is falsy, and still what the caller wants filled."""
    model = patched(tiny(name), fraction_bits=16)
    ids = torch.arange(3, 9)[None]
    cache = transformers.DynamicCache()
    model(input_ids=ids[:, :5], past_key_values=cache, use_cache=True)  # in eval mode, with gradients on
    assert cache.get_seq_length() == 5
    with torch.no_grad():
        step = model(input_ids=ids[:, 5:], past_key_values=cache, use_cache=True).logits[:, -1]
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
    assert (step - whole).norm() < 1e-3 * whole.norm()


@pytest.mark.parametrize("name", ["bart", "bert", "t5", "llama"])
def test_a_failure_inside_the_ffn_leaves_nothing_behind(name: str) -> None:
    """What the adapter's tap had read would keep its graph until somebody runs that layer again."""
    model = patched(tiny(name), fraction_bits=16).train()
    stack = require_state(model).stacks[-1]
    layer = stack.layers[1]

    def fail(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise torch.OutOfMemoryError("for the test")

    model(**batch_for(model))
    handle = layer.spec.ffn_writes(layer.module).register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model(**batch_for(model))
    handle.remove()
    assert layer.tap._pending.hidden_states is None
    loss_of(model(**batch_for(model))).backward()


def test_verify_counts_each_stack_by_its_own_elements() -> None:
    model = patched(tiny("t5")).train()
    batch = {**batch_for(model), "labels": torch.randint(3, 90, (2, 40))}
    report = meft_kernels.verify(model, batch)
    assert report.layers == 6
    assert report.other_layers == 0
    # a byte, and two checksums of 8 bytes a layer
    elements = (7 + 40) * 2 * 32 / 2
    assert report.saved_bytes_per_element == pytest.approx(1 + 16 / elements)


def test_taps_that_do_not_belong_together_are_refused() -> None:
    """An adapter's output must not be broadcast over an FFN's that was computed in chunks."""
    spec = spec_of("distilbert")
    wrong = dataclasses.replace(spec.layers[0], ffn_reads=lambda layer: layer.ffn)
    model = tiny("distilbert-chunked")
    try:
        meft_kernels.register_architecture(dataclasses.replace(spec, layers=(wrong,)))
        patched(model)
        with pytest.raises(meft_kernels.ReversibleUsageError, match=r"\(2, 7, 32\) and gave \(2, 1, 32\)"):
            model(**batch_for(model))
    finally:
        registry._SPECS.pop("distilbert", None)


# What trains besides the adapters: heads that pretraining did not make.
TRAINED_HEADS: dict[str, set[str]] = {
    "BartForSequenceClassification": {"classification_head"},
    "BartForConditionalGeneration": set(),
    "DebertaV2ForSequenceClassification": {"pooler", "classifier"},
    "DeiTForImageClassification": {"classifier"},
    "DeiTForImageClassificationWithTeacher": {"cls_classifier", "distillation_classifier"},
    "DistilBertForSequenceClassification": {"pre_classifier", "classifier"},
    "ElectraForSequenceClassification": {"classifier"},
    "GPT2DoubleHeadsModel": {"multiple_choice_head"},
    "GPT2ForSequenceClassification": {"score"},
    "GPT2LMHeadModel": set(),
    "ModernBertForMaskedLM": set(),
    "ModernBertForSequenceClassification": {"head", "classifier"},
    "RobertaForMultipleChoice": {"roberta.pooler", "classifier"},
    "RobertaForSequenceClassification": {"classifier"},
    "T5EncoderModel": set(),
    "T5ForConditionalGeneration": set(),
    "T5ForQuestionAnswering": {"qa_outputs"},
    "T5ForSequenceClassification": {"classification_head"},
    "T5ForTokenClassification": {"classifier"},
    "ViTForImageClassification": {"classifier"},
    "ViTModel": set(),
}


@pytest.mark.parametrize("kind", TRAINED_HEADS)
def test_new_heads_train_and_pretrained_ones_do_not(kind: str) -> None:
    head: type[nn.Module] = getattr(transformers, kind)
    name = next(name for name, _ in CASES if head in heads_of(name))
    model = meft_kernels.patch(tiny(name, head))
    trained = {key for key, p in model.named_parameters() if p.requires_grad and ".meft." not in key}
    expected = TRAINED_HEADS[kind]
    assert all(any(key.startswith(f"{module}.") for key in trained) for module in expected)
    assert all(any(key.startswith(f"{module}.") for module in expected) for key in trained)


def heads_of(name: str) -> list[Any]:
    try:
        return heads(name)
    except KeyError:  # a variation of a family
        return []
