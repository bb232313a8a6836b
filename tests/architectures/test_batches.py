"""Batches of every shape that users bring: padded, packed, prefixed, embedded, encoder-decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..models import VARIANTS, relative_error, worst_error
from .exactness import FP32_BOUND, both_engines, patched, step
from .zoo import VOCABULARY, batch_for, tiny


def assert_engines_agree(name: str, batch: dict[str, Any], variant: str, **settings: Any) -> None:
    def make(engine: str) -> Any:
        return patched(tiny(name, dropout=0.1), variant=variant, engine=engine, **settings).train()

    assert worst_error(*both_engines(make, lambda model: step(model, batch))) <= FP32_BOUND


def packed_batch() -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Two texts of 5 and 3 tokens in one row, told apart by their positions; and the texts themselves."""
    ids = torch.randint(3, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    batch = {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
    return batch, [ids[:, :5], ids[:, 5:]]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "phi3", "mixtral"])
def test_packed_sequences(name: str, variant: str) -> None:
    """A packed row is its texts apart, and trains exactly."""
    batch, texts = packed_batch()
    model = patched(tiny(name), variant=variant, fraction_bits=16)
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits
        apart = torch.cat([model(input_ids=text, use_cache=False).logits for text in texts], dim=1)
    # Products of other shapes: sums in another order, and streams rounded to 2^-16, both amplified by the layers.
    assert relative_error({"logits": packed}, {"logits": apart}) < 1e-3
    assert relative_error({"logits": packed.flip(1)}, {"logits": apart}) > 0.1
    assert_engines_agree(name, batch, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "opt", "phi3"])
def test_arguments_for_attention_arrive(name: str, variant: str) -> None:
    """What flash attention reads of a packed batch, and what nobody knows, reaches it in forward and in recompute."""
    model = patched(tiny(name), variant=variant, fraction_bits=16).train()
    seen: list[dict[str, Any]] = []
    model.base_model.get_submodule(
        "layers.1.self_attn" if name != "opt" else "decoder.layers.1.self_attn"
    ).register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    lengths = torch.tensor([0, 5, 8], dtype=torch.int32)
    batch = packed_batch()[0]
    foreign = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 5, "max_length_k": 5}
    model(**batch, **foreign).loss.backward()
    assert len(seen) == 2
    for kwargs in seen:
        assert kwargs["cu_seq_lens_q"] is lengths
        assert kwargs["max_length_k"] == 5
        assert torch.equal(kwargs["position_ids"], batch["position_ids"])


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "bart", "gpt2"])
def test_left_and_right_padding(name: str) -> None:
    batch = batch_for(tiny(name), rows=3)
    for key in ("input_ids", "attention_mask"):
        batch[key][1] = batch[key][-1].flip(0)
    assert_engines_agree(name, batch, "meft3")


def test_a_prefix_mask() -> None:
    """The first tokens see one another, the rest is causal: a mask of one's own, by token and by head."""
    mask = torch.full((7, 7), float("-inf")).triu(1)
    mask[:3, :3] = 0
    batch = batch_for(tiny("llama"))
    causal = dict(batch)
    batch["attention_mask"] = mask.expand(2, 1, 7, 7)
    for variant in VARIANTS:
        assert_engines_agree("llama", batch, variant)
    model = patched(tiny("llama"))
    assert not torch.equal(model(**batch).logits, model(**causal).logits)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "opt-post-norm", "gemma3_text"])
def test_gradients_of_embeddings_given(name: str) -> None:
    """As soft prompts need them."""
    found = []
    for engine in ("reversible", "autograd"):
        model = patched(tiny(name), engine=engine).train()
        batch = batch_for(model)
        embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
        model(**batch, inputs_embeds=embeds).loss.backward()
        found.append({"embeds": embeds.grad})
    assert relative_error(*found) <= FP32_BOUND


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_outputs_given(name: str, variant: str) -> None:
    """The decoder's stack alone, its gradient handed to the encoder outputs."""
    found = []
    for engine in ("reversible", "autograd"):
        model = patched(tiny(name), engine=engine, variant=variant).train()
        batch = batch_for(model)
        memory = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(4)).requires_grad_()
        del batch["input_ids"]
        model(**batch, encoder_outputs=(memory,)).loss.backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        assert not any(key.startswith(("encoder", "model.encoder")) for key in gradients)
        found.append({**gradients, "memory": memory.grad})
    assert worst_error(*found) <= FP32_BOUND


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "vit", "mixtral"])
def test_a_single_token_and_a_single_row(name: str) -> None:
    batch = batch_for(tiny(name), rows=1, tokens=3)
    assert_engines_agree(name, batch, "meft2", fraction_bits=18)


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2", "opt", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_generate_with_cache_equals_without(name: str, variant: str) -> None:
    model = patched(tiny(name), variant=variant)
    batch = batch_for(model, rows=1, labels=False)
    batch.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**batch, **options, use_cache=True)
    uncached = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(cached, uncached)
