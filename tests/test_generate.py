"""generate on a patched model: with a cache as without, and the pretrained model's text where adapters are disabled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import meft_kernels

from .architectures.zoo import tiny
from .models import TRAINABLE_START, VARIANTS

DECODERS = ["llama", "qwen3", "gemma3_text", "gpt2", "opt", "mixtral"]
SEQ2SEQ = ["t5", "bart"]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beam": {"do_sample": False, "num_beams": 3},
}


def prompts(model: Any) -> dict[str, torch.Tensor]:
    """Three prompts of 2 to 6 tokens, padded on the left (on the right for an encoder)."""
    generator = torch.Generator().manual_seed(5)
    ids, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    for row, length in enumerate((6, 2, 4)):
        place = slice(0, length) if model.config.is_encoder_decoder else slice(6 - length, 6)
        ids[row, place] = torch.randint(3, 90, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(3)
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "pad_token_id": 0, "eos_token_id": 1}
    return model.generate(**prompts(model), **{**settings, **options})


def patched(name: str, **settings: Any) -> Any:
    model = tiny(name)
    torch.manual_seed(5)
    return meft_kernels.patch(model, **{**TRAINABLE_START, **settings}).eval()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DECODERS + SEQ2SEQ)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_is_uncached(name: str, mode: str, variant: str) -> None:
    model = patched(name, variant=variant)
    before = model.config.to_dict(), model.generation_config.to_dict()
    uncached = generate(model, use_cache=False, **MODES[mode])
    assert torch.equal(generate(model, use_cache=True, **MODES[mode]), uncached)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before
    assert uncached.shape[1] >= 10


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("mode", ["greedy", "beam"])
def test_static_cache(name: str, mode: str) -> None:
    model = patched(name)
    expected = generate(model, use_cache=False, **MODES[mode])
    # disable_compile: this is about the cache and not about what generate compiles when it has one of this kind
    static = generate(model, cache_implementation="static", disable_compile=True, **MODES[mode])
    assert torch.equal(static, expected)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_float_streams(name: str) -> None:
    model = patched(name, arithmetic="float", reversible_layers=1)
    assert torch.equal(generate(model, use_cache=True), generate(model, use_cache=False))


@pytest.mark.parametrize("name", DECODERS + SEQ2SEQ)
def test_disabled_adapters_give_the_pretrained_models_text(name: str) -> None:
    plain = tiny(name).eval()
    model = patched(name, up_init_std=0.5)
    for mode in MODES.values():
        expected = generate(plain, **mode)
        with meft_kernels.disable_adapter(model):
            assert torch.equal(generate(model, **mode), expected)
    assert not torch.equal(generate(model), generate(plain))


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_straight_after_training(name: str) -> None:
    """And in the middle of it: in train mode, with gradients recorded around it, between two steps."""
    model = patched(name, dropout=0.0, fraction_bits=16)
    twin = patched(name, dropout=0.0, fraction_bits=16)
    for each, interrupts in ((model, True), (twin, False)):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        batch = {**prompts(each), "labels": prompts(each)["input_ids"]}
        for _ in range(3):
            torch.manual_seed(1)
            each.train()(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if interrupts:
                generate(each)  # in train mode
                with torch.enable_grad():
                    generate(each.eval())
        each.eval()
    assert torch.equal(generate(model, use_cache=True), generate(model, use_cache=False))
    assert torch.equal(generate(model), generate(twin))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_several_adapters() -> None:
    model = patched("llama", up_init_std=0.5)
    first = generate(model)
    torch.manual_seed(8)
    meft_kernels.add_adapter(model, "other", rank=3)
    meft_kernels.set_adapter(model, "other")
    second = generate(model)
    assert not torch.equal(first, second)
    assert torch.equal(second, generate(model, use_cache=False))
    meft_kernels.set_adapter(model, "default")
    assert torch.equal(generate(model), first)
