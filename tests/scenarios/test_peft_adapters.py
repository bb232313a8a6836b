"""Every method of PEFT inside of reversible layers: exact, and out again saved, loaded and merged by PEFT."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import meft_kernels
from meft_kernels import NotRepeatableError, UnsupportedModelError
from meft_kernels.patching.state import find_state

from ..architectures.zoo import batch_for, tiny
from ..models import StreamWitness, tiny_batch, tiny_llama, train_step, worst_error

peft = pytest.importorskip("peft")

from ..peft_methods import CONFIGS, base, wrapped  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

REFUSED = {"MonteCLoRA", "Shadow"}
CANNOT_MERGE = {
    "LoRA with biases": "no bias",
    "Lily": "not supported",
    "BEFT": "no bias",
    "Poly": "",
    "LLaMA-adapter": "",
}
"""By PEFT itself: some write biases, where this model has none."""
FP32_BOUND = 1e-5


def batch_of(method: str) -> dict[str, torch.Tensor]:
    batch = tiny_batch(base())
    return {**batch, "task_ids": torch.tensor([0, 1])} if method == "Poly" else batch


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model.eval()(**batch).logits
    return made


def step(model: Any, batch: dict[str, torch.Tensor], lr: float = 0.1) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def trained_alike(make: Callable[[], Any], batch: dict[str, torch.Tensor], layers: int = 2) -> Any:
    """Hold a step to plain autograd's; the reversible model, as it was."""
    found, made = [], []
    for engine in ("reversible", "autograd"):
        model = make()
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        meft_kernels.reversible(model, engine=engine).train()
        model(**batch)  # calibrates
        witness = StreamWitness(model)
        found.append(train_step(model, batch))
        assert found[-1][1].keys() == trained
        if engine == "reversible":
            witness.assert_exact(layers)
        made.append(model)
    assert found[0][0] == found[1][0]
    assert worst_error(found[0][1], found[1][1], floor=1e-3) <= FP32_BOUND
    return made[0]


@pytest.mark.parametrize("method", [name for name in CONFIGS if name not in REFUSED])
def test_in_and_out(method: str, tmp_path: Path) -> None:
    """Exact, with plain autograd's gradients; out again it is PEFT's model: saved, loaded, merged."""
    batch = batch_of(method)
    model = trained_alike(lambda: wrapped(method), batch)
    step(model, batch)
    assert meft_kernels.unpatch(model) is model
    assert not [name for name in model.state_dict() if ".meft." in name]
    expected = logits(model, batch)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base(), tmp_path), batch), expected)
    if method in CANNOT_MERGE:
        return
    merged = model.merge_and_unload()
    assert type(merged) is type(base())
    # A product more or less in each linear layer, in float32.
    assert (logits(merged, batch) - expected).norm() <= FP32_BOUND * expected.norm()


def test_on_bare_parameters() -> None:
    """Experts' weights are no modules, and PEFT hands the layer others in their place for the length of a call."""
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_parameters=names, target_modules=["q_proj"], init_lora_weights=False)
    batch = batch_for(tiny("mixtral"))

    def build() -> Any:
        torch.manual_seed(3)
        return peft.get_peft_model(tiny("mixtral"), config)

    trained_alike(build, batch, layers=3)


def test_what_does_not_repeat_is_refused_in_the_first_step() -> None:
    """It takes its random numbers from a store of its own, another at every call."""
    model = meft_kernels.reversible(wrapped("MonteCLoRA")).train()
    with pytest.raises(NotRepeatableError, match=r"model\.layers\.1.*keeps state between calls"):
        step(model, batch_of(""))


@pytest.mark.parametrize("kind", ["Shadow", "modules_to_save"])
def test_what_works_between_layers_is_refused(kind: str) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["layers.1"])
    model = wrapped("Shadow") if kind == "Shadow" else peft.get_peft_model(base(), config)
    with pytest.raises(UnsupportedModelError, match=r"PEFT has put \w+ around whole layers of model\.layers"):
        meft_kernels.reversible(model)
    assert find_state(model) is None


# DoRA on 8 bits does not train on a CPU with PEFT 0.21 and bitsandbytes 0.50 alone.
@pytest.mark.parametrize(("method", "bits"), [("LoRA", 4), ("LoRA", 8), ("DoRA", 4)])
def test_on_a_quantised_base(method: str, bits: int, tmp_path: Path) -> None:
    """QLoRA: the same, and it is merged as PEFT merges it, to the quantisation's rounding."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    tiny_llama(2, 64).save_pretrained(tmp_path / "base")
    kind = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True}

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=BitsAndBytesConfig(**kind), device_map="cpu", dtype=torch.float32
        )

    batch = batch_of(method)
    prepare = peft.prepare_model_for_kbit_training
    model = trained_alike(lambda: wrapped(method, prepare(load(), use_gradient_checkpointing=False)), batch)
    step(model, batch)
    meft_kernels.unpatch(model)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(), tmp_path / "adapter"), batch), expected)
    merged = logits(model.merge_and_unload(), batch)
    assert (merged - expected).norm() < 0.3 * expected.norm()
