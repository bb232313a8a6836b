"""Adapters of PEFT that come and go in a patched model."""

import pytest
import torch

import meft_kernels
from meft_kernels.errors import PatchError
from tests.models import tiny_batch, tiny_llama

peft = pytest.importorskip("peft")


def test_a_model_whose_last_adapter_was_deleted_is_still_found():
    plain = tiny_llama()
    batch = tiny_batch(plain)
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    meft_kernels.patch(model, adapters="none")
    model.delete_adapter("default")
    base = model.base_model.model
    meft_kernels.unpatch(model)
    with torch.no_grad():
        assert torch.equal(base(**batch).logits, plain(**batch).logits)
    with pytest.raises(PatchError, match="not patched"):
        meft_kernels.unpatch(model)
