"""Autocast, gradient scaling, half-precision models: the numbers of plain autograd, and inputs rebuilt bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import meft_kernels
from meft_kernels.memory import LiveTensorMeter

from .architectures.exactness import FP32_BOUND, both_engines
from .architectures.zoo import batch_for, tiny
from .models import TRAINABLE_START, VARIANTS, relative_error, tiny_bert, worst_error

FAMILIES = ["llama", "bert", "t5"]


def patched(name: str, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """In train mode, with dropout live in model and adapters."""
    model = tiny(name).to(dtype)
    torch.manual_seed(5)
    return meft_kernels.patch(model, **{**TRAINABLE_START, "dropout": 0.1, "fraction_bits": 16, **settings}).train()


def step(model: Any, autocast: torch.dtype | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients; backward runs outside of autocast, as users have it."""
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        loss = model(**batch_for(model)).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), gradients


def assert_engines_agree(name: str, *, autocast: torch.dtype | None = None, **settings: Any) -> None:
    """Both engines run the same layers on the same inputs, so that their gradients differ by the order of a few sums.

    Under autocast those sums are in float32, and only the rounding of their results to 16 bits can differ, here and
    there: less than eps of the whole gradient. Where one differs, so do roundings further down, so that a tensor is
    held to what rounding itself has done by then: half of plain autograd's distance from the gradient in float32. In
    half precision a gradient that two branches add up to is rounded once more or once less: a few times eps of the
    dtype that gradients have.
    """
    found, expected = both_engines(
        lambda engine: patched(name, engine=engine, **settings), lambda model: step(model, autocast)
    )
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    dtype = settings.get("dtype", torch.float32)
    if dtype != torch.float32 or autocast is None:
        bound = FP32_BOUND if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
        assert worst_error(found, expected, floor=1e-3) <= bound
        return
    eps = torch.finfo(autocast).eps
    assert relative_error(found, expected) <= eps
    _, truth = step(patched(name, engine="autograd", **settings))
    least = 1e-3 * eps * sum(float(gradient.double().square().sum()) for gradient in truth.values()) ** 0.5
    for key, plain in expected.items():
        off = float((plain.double() - truth[key].double()).norm())
        assert float((found[key].double() - plain.double()).norm()) <= max(off, least) / 2, key


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_autocast(name: str, variant: str, autocast: torch.dtype) -> None:
    assert_engines_agree(name, autocast=autocast, variant=variant)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", ["float32", "model"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_half_precision_models(name: str, adapter_dtype: str, dtype: torch.dtype) -> None:
    assert_engines_agree(name, dtype=dtype, adapter_dtype=adapter_dtype)
    model = patched(name, dtype=dtype, adapter_dtype=adapter_dtype)
    expected = torch.float32 if adapter_dtype == "float32" else dtype
    assert {p.dtype for key, p in model.named_parameters() if ".meft." in key} == {expected}


def test_autocast_of_a_bfloat16_model_and_autocast_inside_autocast() -> None:
    assert_engines_agree("llama", autocast=torch.bfloat16, dtype=torch.bfloat16)
    for engine in ("reversible", "autograd"):
        model = patched("llama", engine=engine)
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
            inside = model(**batch_for(model)).loss
        inside.backward()
        assert inside.item() == step(patched("llama", engine=engine))[0]


def test_autocast_keeps_nothing_of_a_layer() -> None:
    """It keeps what it casts leaves to until its block ends: in BERT three projections read a layer's bare input."""
    ids = torch.randint(1, 97, (4, 64))
    kept = []
    for layers in (2, 6):
        model = meft_kernels.patch(tiny_bert(layers=layers), fraction_bits=16, **TRAINABLE_START).train()
        with LiveTensorMeter() as meter, torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids[:, 0] % 3).loss
            kept.append(meter.live_bytes)
        assert loss.requires_grad
    cast_weights = 2 * sum(p.numel() for p in model.bert.encoder.layer[0].meft.parameters())
    a_layer = (kept[1] - kept[0]) / 4 - cast_weights
    elements = ids.numel() * model.config.hidden_size
    assert a_layer < 1.1 * elements  # a byte of remainder an element; the cast of an input would be two more


def test_modules_that_switch_autocast_off_run_without_in_recompute() -> None:
    """As float32 islands inside a layer do."""
    seen: list[tuple[bool, torch.dtype]] = []

    def with_island(engine: str) -> Any:
        model = patched("llama", engine=engine)
        mlp = model.model.layers[1].mlp
        own = mlp.forward

        def island(x: torch.Tensor) -> torch.Tensor:
            outside = torch.is_autocast_enabled("cpu")
            with torch.autocast("cpu", enabled=False):
                y = own(x.float())
            seen.append((outside, y.dtype))
            return y

        mlp.forward = island
        return model

    found, expected = both_engines(with_island, lambda model: step(model, torch.bfloat16))
    assert worst_error(found, expected, floor=1e-3) <= torch.finfo(torch.bfloat16).eps
    assert seen == [(True, torch.float32)] * 3  # forward, recompute, and the other engine's forward


def test_eval_under_autocast_is_what_training_computes() -> None:
    model = patched("llama", dropout=0.0, inference="exact").eval()
    batch = batch_for(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recorded = model(**batch).loss
        with torch.no_grad():
            assert model(**batch).loss.item() == recorded.item()
        with torch.inference_mode():
            assert model(**batch).loss.item() == recorded.item()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gradient_scaling(device: str) -> None:
    """float16 autocast with a scaler: steps whose gradients overflow are skipped, others are plain autograd's."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    ends = []
    for engine in ("reversible", "autograd"):
        model = patched("llama", engine=engine).to(device)
        batch = {name: value.to(device) for name, value in batch_for(model).items()}
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**26, growth_interval=2)
        torch.manual_seed(2)
        steps = []
        for _ in range(16):
            before = [p.detach().clone() for p in parameters]
            with torch.autocast(device, dtype=torch.float16):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            steps.append(any(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True)))
        ends.append((steps, scaler.get_scale(), [p.detach() for p in parameters]))
    (steps, scale, found), (expected_steps, expected_scale, expected) = ends
    assert steps == expected_steps
    assert True in steps and False in steps
    assert scale == expected_scale
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=16 * torch.finfo(torch.float16).eps, atol=1e-4)
