"""The reference beside the model that trains: the pretrained model's bits, from the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import meft_kernels
from meft_kernels import PatchError

from .architectures.zoo import tiny
from .models import TRAINABLE_START, VARIANTS, tiny_batch, tiny_bert, tiny_llama, train_step


def patched(**settings: Any) -> Any:
    torch.manual_seed(5)
    return meft_kernels.patch(tiny_llama(attention_dropout=0.5), **TRAINABLE_START, dropout=0.1, **settings).train()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_the_pretrained_models_bits_and_the_models_own_gradients(variant: str, when: str) -> None:
    plain, model = tiny_llama(attention_dropout=0.5), patched(variant=variant)
    reference = meft_kernels.reference_model(model)
    batch = tiny_batch(model)
    expected = plain(**batch).logits
    _, gradients = train_step(model, batch)
    assert not torch.equal(model(**batch).logits, expected)
    modes = [module.training for module in model.modules()]
    torch.manual_seed(2)
    found = []
    if when == "before":
        found.append(reference(**batch).logits)
    loss = model(**batch).loss
    if when == "between":
        found.append(reference(**batch).logits)
    loss.backward()
    if when == "after":
        found.append(reference(**batch).logits)
    assert torch.equal(found[0], expected)
    assert not found[0].requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert gradients


def test_whatever_is_called_through_it() -> None:
    plain, model = tiny_llama(), patched()
    reference = meft_kernels.reference_model(model)
    batch = tiny_batch(model)
    ids = batch["input_ids"][:1]
    expected = plain.generate(input_ids=ids, max_new_tokens=8)
    assert torch.equal(reference.generate(input_ids=ids, max_new_tokens=8), expected)
    hidden = plain.model(input_ids=ids).last_hidden_state
    for base in (reference.base_model, reference.model):
        assert torch.equal(base(input_ids=ids).last_hidden_state, hidden)
    assert torch.equal(reference.forward(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert reference.config is model.config
    assert reference.device == model.device
    assert reference.get_output_embeddings() is model.lm_head
    assert reference.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = reference.nothing


def test_a_forward_that_somebody_binds_on_it() -> None:
    """TRL does, and takes the model's parts from the object that it is bound on."""
    plain, model = tiny_llama(), patched()
    reference = meft_kernels.reference_model(model)
    reference.forward = lambda **kwargs: reference.base_model(**kwargs).last_hidden_state
    ids = tiny_batch(model)["input_ids"]
    assert torch.equal(reference(input_ids=ids), plain.model(input_ids=ids).last_hidden_state)
    assert "forward" not in vars(model)


def test_it_is_nobodys_parent() -> None:
    model = patched()
    reference = meft_kernels.reference_model(model)
    assert list(reference.modules()) == [reference]
    assert not list(reference.parameters())
    reference.train().double().eval()
    assert model.training
    assert model.dtype == torch.float32
    for other in (copy.deepcopy(reference), torch.nn.ModuleList([reference])[0]):
        ids = tiny_batch(model)["input_ids"]
        assert torch.equal(other(input_ids=ids).logits, tiny_llama()(input_ids=ids).logits)
    trainable = torch.nn.ModuleList([model, reference])
    assert len(list(trainable.parameters())) == len(list(model.parameters()))


def test_encoder_decoder() -> None:
    plain, model = tiny("t5"), meft_kernels.patch(tiny("t5"), **TRAINABLE_START).train()
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[8, 9]])}
    with torch.no_grad():  # as the reference runs: T5's own last bits depend on it, unpatched
        expected = plain.eval()(**batch).logits
    assert torch.equal(meft_kernels.reference_model(model)(**batch).logits, expected)


def test_what_would_train_along_is_refused() -> None:
    with pytest.raises(PatchError, match="not patched"):
        meft_kernels.reference_model(tiny_llama())
    with pytest.raises(PatchError, match=r"classifier\.|bert\.pooler"):
        meft_kernels.reference_model(meft_kernels.patch(tiny_bert()))
    model = patched()
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(PatchError, match=r"1 trainable parameters .* model\.norm\.weight"):
        meft_kernels.reference_model(model)
    peft = pytest.importorskip("peft")
    wrapped = meft_kernels.patch(peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2)), adapters="none")
    with pytest.raises(PatchError, match="lora_"):
        meft_kernels.reference_model(wrapped)
