"""Averages of state dicts, all entries alike: moving averages, federated learning, SWA. What is left computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import meft_kernels
from meft_kernels import PatchError
from meft_kernels.engine import stack_state
from meft_kernels.patching.state import fraction_bits_of, require_state

from ..models import TRAINABLE_START, tiny_batch, tiny_bert, tiny_llama

State = dict[str, torch.Tensor]
KEY = "bert.encoder.layer.0.meft.state._extra_state"


def patched(build: Callable[[], Any] = tiny_bert, **settings: Any) -> Any:
    return meft_kernels.patch(build(), **{**TRAINABLE_START, "dropout": 0.0, **settings})


def trained(model: Any, seed: int) -> Any:
    """One step on a batch of its own."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()(**tiny_batch(model, seed=seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def bits(model: Any) -> int | None:
    (found,) = fraction_bits_of(require_state(model))
    return found


def mean(states: list[State], cast: Callable[[torch.Tensor], torch.Tensor]) -> State:
    return {key: sum(cast(state[key]) for state in states) / len(states) for key in states[0]}  # type: ignore[misc]


def assert_weights(model: Any, expected: State) -> None:
    state = model.state_dict()
    assert all(torch.equal(state[key], value.to(state[key].dtype)) for key, value in expected.items() if key != KEY)


CASTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "as they are": lambda tensor: tensor,
    "float64": lambda tensor: tensor.double(),
    "bfloat16": lambda tensor: tensor.bfloat16(),
    "float16": lambda tensor: tensor.half(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_federated(cast: Callable[[torch.Tensor], torch.Tensor]) -> None:
    server = patched()
    server(**tiny_batch(server))
    clients = [trained(copy.deepcopy(server), seed) for seed in (1, 2, 3)]
    average = mean([client.state_dict() for client in clients], cast)
    server.load_state_dict(average)
    assert_weights(server, average)
    assert bits(server) == bits(clients[0]) is not None


def test_clients_that_calibrated_apart() -> None:
    """What was calibrated for the largest states has room for all."""
    clients = [patched(fraction_bits=number) for number in (20, 14, 17)]
    average = mean([client.state_dict() for client in clients], lambda tensor: tensor)
    server = patched()
    server.load_state_dict(average)
    assert bits(server) == 14


@pytest.mark.parametrize("decay", [0.9, 0.9999])
@pytest.mark.parametrize("cast_back", [True, False])
def test_moving_average(decay: float, cast_back: bool) -> None:
    model = patched()
    shadow = copy.deepcopy(model)  # before the first batch, as is the custom: not calibrated
    average = shadow.state_dict()
    for seed in range(3):
        trained(model, seed)
        state = model.state_dict()
        average = {key: decay * value + (1 - decay) * state[key] for key, value in average.items()}
        if cast_back:
            average = {key: value.to(state[key].dtype) for key, value in average.items()}
    shadow.load_state_dict(average)
    assert_weights(shadow, average)
    assert bits(shadow) in (bits(model), None)
    assert torch.isfinite(shadow(**tiny_batch(shadow)).logits).all()  # with gradients, which calibrates
    assert bits(shadow) == bits(model)


def test_a_long_moving_average_forgets_nothing_of_what_is_equal() -> None:
    state = patched(fraction_bits=19).state_dict()[KEY]
    average = state.clone()
    for _ in range(20_000):
        average.copy_(0.9999 * average + (1 - 0.9999) * state)
    other = patched()
    other.load_state_dict({**other.state_dict(), KEY: average})
    assert bits(other) == 19


@pytest.mark.parametrize("average", ["mean", "ema"])
def test_swa(average: str) -> None:
    """torch's own averages, of a model that is copied: the averaged model computes what its weights say."""
    model = patched(tiny_llama)
    model(**tiny_batch(model))
    ema = get_ema_multi_avg_fn(0.5) if average == "ema" else None
    averaged = AveragedModel(model, multi_avg_fn=ema)
    states = []
    for seed in (1, 2):
        averaged.update_parameters(trained(model, seed))
        states.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    again = patched(tiny_llama)
    again.load_state_dict({k.removeprefix("module."): v for k, v in averaged.state_dict().items() if "module." in k})
    batch = tiny_batch(model)
    with torch.no_grad():
        assert torch.equal(averaged.eval()(**batch).logits, again(**batch).logits)
    for name, parameter in again.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter, (states[0][name] + states[1][name]) / 2)
    averaged.load_state_dict(averaged.state_dict())


REFUSED: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "another's settings": (lambda _: patched(variant="meft1").state_dict()[KEY], "other settings"),
    "an average over settings": (
        lambda state: (state + patched(variant="meft1").state_dict()[KEY]) / 2,
        "or is an average over several",
    ),
    "a sum": (lambda state: 2 * state, "weights do not add up to one"),
    "damage": (lambda state: state[:3], "93 numbers were expected"),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_load_changes_nothing(kind: str, wrapped: bool) -> None:
    spoil, message = REFUSED[kind]
    model = patched(fraction_bits=16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = {key: value + 1 if value.is_floating_point() and key != KEY else value for key, value in before.items()}
    other[KEY] = spoil(before[KEY])
    target: Any = model
    if wrapped:
        target = AveragedModel(model)
        before = {key: value.clone() for key, value in target.state_dict().items()}
        other = {"n_averaged": before["n_averaged"], **{f"module.{key}": value for key, value in other.items()}}
    with pytest.raises(PatchError, match=message):
        target.load_state_dict(other)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize("number", [18, -1])
def test_states_of_earlier_versions(number: int) -> None:
    model = patched()
    digest = stack_state._digest(require_state(model).config)
    model.load_state_dict({**model.state_dict(), KEY: torch.tensor([digest, number])})
    assert bits(model) == (None if number == -1 else number)
    with pytest.raises(PatchError, match="other settings"):
        model.load_state_dict({**model.state_dict(), KEY: torch.tensor([digest ^ 1, number])})
    with pytest.raises(PatchError, match="fraction_bits is 99"):
        model.load_state_dict({**model.state_dict(), KEY: torch.tensor([digest, 99])})
