"""generate on SmolLM2-135M with adapters that do something: with a KV cache as without one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import meft_kernels

from .models import TRAINABLE_START, VARIANTS

pytestmark = pytest.mark.slow

TOKENS = 64
FEWER = 20
"""Where 64 would show no more: without a cache the time of a text grows with the square of its length."""


@pytest.fixture(scope="module")
def smollm2(smollm2: Any) -> Any:
    return smollm2.eval()


def write(model: Any, **options: Any) -> Any:
    from benchmarks.real import real_batch

    ids = real_batch("smollm2", 1, 8)["input_ids"]
    settings = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{**settings, **options})


def noise(model: Any) -> float:
    """RMS of what a cache changes in the logits: one token at a time with it, all tokens at once without."""
    length = {"max_new_tokens": FEWER, "min_new_tokens": FEWER}
    out = write(model, return_dict_in_generate=True, output_logits=True, **length)
    with torch.no_grad():
        at_once = model(input_ids=out.sequences, use_cache=False).logits[0, -FEWER - 1 : -1]
    return float((torch.cat(out.logits).float() - at_once.float()).square().mean().sqrt())


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_is_uncached_in_fp32(smollm2: Any, variant: str) -> None:
    torch.manual_seed(5)
    meft_kernels.patch(smollm2, variant=variant, **TRAINABLE_START)
    try:
        fewer = {"max_new_tokens": FEWER, "min_new_tokens": FEWER}
        for mode in [{}, {"num_beams": 3, **fewer}] if variant == "meft2" else [fewer]:
            assert torch.equal(write(smollm2, **mode), write(smollm2, use_cache=False, **mode))
    finally:
        meft_kernels.unpatch(smollm2)


def test_a_cache_changes_bf16_logits_no_more_than_unpatched(smollm2: Any) -> None:
    """Products of other shapes round otherwise, and so exchange tokens whose logits are alike, patched or not.

    In float32 it is the fixed point that rounds: its step (2^-14 here, by calibration) is coarser than float32's own.
    """
    model = copy.deepcopy(smollm2).bfloat16()
    plain = noise(model)
    assert plain > 0
    for variant in VARIANTS:
        torch.manual_seed(5)
        meft_kernels.patch(model, variant=variant, **TRAINABLE_START)
        assert noise(model) <= 1.5 * plain  # measured 0.9 to 1.1
        meft_kernels.unpatch(model)
