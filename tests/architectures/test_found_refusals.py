"""What a model must be to be found, and what is refused by name, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import meft_kernels
from meft_kernels import UnsupportedModelError

from ..models import StreamWitness, worst_error
from .exactness import FP32_BOUND, assert_exact, everything_of, patched, step


class MadeUpConfig(PretrainedConfig):
    model_type = "made_up"


class Layer(nn.Module):
    """A layer that does what it should."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mix = nn.Linear(16, 16)
        self.rise, self.fall = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = x + self.mix(self.norm1(x)).cumsum(1)
        return x + self.fall(torch.tanh(self.rise(self.norm2(x))))


class InPlace(Layer):
    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x += self.mix(self.norm1(x))
        return x + self.fall(torch.tanh(self.rise(x)))


class KeepsState(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) * (1 + 0.1 * self.calls)


class OwnGenerator(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnGenerator:
        return OwnGenerator()

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=self.generator) if self.training else 0
        return super().forward(x) + noise


class Shares(Layer):
    """Layers of odd places read what the one before put into a box."""

    def forward(self, x: torch.Tensor, box: Any = None, **kwargs: Any) -> torch.Tensor:
        if "values" in box:
            return super().forward(x) + box["values"]
        box["values"] = self.mix(x)
        return super().forward(x)


class Behind(Layer):
    """The same behind everybody's back."""

    box: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor, first: bool = False, **kwargs: Any) -> torch.Tensor:
        if first:
            self.box["values"] = self.mix(x)
        return super().forward(x) + self.box["values"]


class Dead(Layer):
    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return super().forward(x).detach()


class WiderInTraining(Layer):
    """RF-DETR's decoder takes thirteen times as many queries in training, and counts on it."""

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.training:
            x.split(x.shape[1] // 13, dim=1)
        return super().forward(x)


Run = Callable[[Any, torch.Tensor], torch.Tensor]


class MadeUp(PreTrainedModel):
    config_class = MadeUpConfig
    _supports_attention_backend = True

    def __init__(self, config: MadeUpConfig, layer: type[Layer] = Layer, run: Run | None = None) -> None:
        super().__init__(config)
        self.words = nn.Embedding(30, 16)
        self.stack = nn.ModuleList([layer() for _ in range(3)])
        self.out = nn.Linear(16, 30)
        self.run = run or in_turn
        self.post_init()

    def forward(self, input_ids: torch.Tensor) -> Any:
        return BaseModelOutput(last_hidden_state=self.out(self.run(self, self.words(input_ids))))


def in_turn(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
    box: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(model.stack):
        x = layer(x, box=box, first=index == 0)
    return x


def backwards(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
    for layer in reversed(model.stack):
        x = layer(x)
    return x


def early_exit(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
    return model.stack[1](model.stack[0](x))


def without_gradient(model: MadeUp, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return in_turn(model, x)


BAD: dict[str, tuple[type[Layer], Run, str]] = {
    "in place": (InPlace, in_turn, r"stack\.0 writes into the hidden states that it is given"),
    "state": (KeepsState, in_turn, r"stack\.0 gives something else when it is called again with the same arguments"),
    "generator": (OwnGenerator, in_turn, r"stack\.0 in training gives something else each time"),
    "wider": (WiderInTraining, in_turn, r"stack\.0 in training does not take what a model in eval mode gives it: Runt"),
    "behind": (Behind, in_turn, r"gradients go another way through stack\.1 .*it reads what stack\.0 computed"),
    "dead": (Dead, in_turn, r"no gradient goes|nothing that the model returns depends on what stack"),
    "backwards": (Layer, backwards, r"stack\.2 was called where stack\.0 was due"),
    "early exit": (Layer, early_exit, r"stack\.2 was not called"),
    "no gradient": (Layer, without_gradient, r"no gradient goes from the model's outputs to its layers"),
}


def made_up(layer: type[Layer] = Layer, run: Run = in_turn) -> MadeUp:
    torch.manual_seed(0)
    return MadeUp(MadeUpConfig(vocab_size=30, hidden_size=16), layer, run).eval()


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_serve_is_refused(name: str) -> None:
    layer, run, message = BAD[name]
    model = made_up(layer, run).train()
    before = everything_of(model)
    with pytest.raises(UnsupportedModelError, match=f"'made_up' has no family file, and its structure.*{message}"):
        meft_kernels.patch(model)
    assert everything_of(model) == before


def test_what_serves_of_the_same_kind() -> None:
    model = meft_kernels.patch(made_up())
    assert "stack" in str(meft_kernels.describe(model))


def test_models_that_are_no_transformers() -> None:
    resnet = transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    )
    model = made_up()
    layers = model.stack
    del model.stack
    model.stack = nn.ModuleDict({str(i): layer for i, layer in enumerate(layers)})
    model.run = lambda model, x: model.stack["1"](model.stack["0"](x))
    recurrent = made_up()
    recurrent.stack = nn.LSTM(16, 16, num_layers=2, batch_first=True)
    recurrent.run = lambda model, x: model.stack(x)[0]
    for bad, message in ((resnet, "resnet"), (model, "layers in a dict"), (recurrent, "layers in a dict")):
        before = everything_of(bad)
        with pytest.raises(UnsupportedModelError, match=message):
            meft_kernels.patch(bad)
        assert everything_of(bad) == before


def test_a_model_that_takes_no_made_up_inputs() -> None:
    model = made_up()
    model.forward = lambda words: MadeUp.forward(model, words)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match="could not be called on made-up inputs: pass probe=batch"):
        meft_kernels.patch(model)
    meft_kernels.patch(model, probe={"words": torch.tensor([[3, 4, 5, 6]])})


@pytest.mark.parametrize("variant", ["meft1", "meft2"])
def test_tensors_that_layers_share_in_a_box(variant: str) -> None:
    """What a layer puts into a mapping is there for later ones, in the recompute as well, and has its gradient."""
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 3]])
    results = []
    for engine in ("reversible", "autograd"):
        model = patched(made_up(Shares), engine=engine, variant=variant).train()
        witnesses = StreamWitness.on_every_stack(model)
        results.append(step(model, {"input_ids": ids}))
        if engine == "reversible":
            assert_exact(witnesses)
    assert results[0][0] == results[1][0]
    assert worst_error(results[0][1], results[1][1]) <= FP32_BOUND
    with torch.no_grad():
        expected = made_up(Shares)(ids).last_hidden_state
        found = meft_kernels.patch(made_up(Shares))(ids).last_hidden_state
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_meta_weights_cannot_be_looked_at() -> None:
    with torch.device("meta"):
        model = MadeUp(MadeUpConfig(vocab_size=30, hidden_size=16))
    with pytest.raises(UnsupportedModelError, match=r"must be run to be looked at, and its weight .* is without data"):
        meft_kernels.patch(model)
