"""Every family with its position-wise parts in tiles that do not divide the rows, and its attention in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from meft_kernels.engine import pieces
from meft_kernels.engine.arguments import without_cache
from meft_kernels.patching.state import require_state

from ..models import worst_error
from .exactness import CASES, FP32_BOUND, both_engines, patched, step
from .written import spec_of
from .zoo import ZOO, batch_for, skip_reason, tiny

TILE = 3
"""Rows; batches have texts of odd length, so that the last tile of each is smaller."""

every_case = pytest.mark.parametrize(("name", "variant"), CASES, ids=[f"{name}-{variant}" for name, variant in CASES])

# A family's tiles are the same under every variant, and a variant's the same for every family.
AGAINST_THE_WHOLE = [
    (name, variant) for name, variant in CASES if variant == "meft2" or name in ("llama", "bert", "t5")
]

IN_PIECES = [
    (name, variant)
    for name, variant in CASES
    if any(layer.attention_pieces for layer in spec_of(ZOO[name].model_type).layers)
]


@pytest.fixture
def _many_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many groups of heads as there can be, where so few tokens would have one."""
    monkeypatch.setattr(pieces, "LEAST_ROWS_OF_HEADS", 1)


@every_case
def test_exact_in_tiles(name: str, variant: str) -> None:
    """With dropout live: rebuilt inputs bit for bit, the loss of plain autograd to the last bit, its gradients."""
    batch = batch_for(tiny(name))

    def make(engine: str) -> Any:
        return patched(tiny(name, dropout=0.1), variant=variant, engine=engine, tile=TILE).train()

    found, expected = both_engines(make, lambda model: step(model, batch))
    assert found
    assert worst_error(found, expected) <= FP32_BOUND


@pytest.mark.parametrize(("name", "variant"), AGAINST_THE_WHOLE)
def test_tiles_compute_what_the_whole_does(name: str, variant: str) -> None:
    """Against the untiled engine: other products of the same numbers, so equal but for float32's rounding."""
    batch = batch_for(tiny(name))
    results = []
    for tile in (TILE, "off"):
        results.append(step(patched(tiny(name), variant=variant, tile=tile).train(), batch))
    (loss, gradients), (expected_loss, expected) = results
    # a mean over some ten values near 4 of sums over 32 to 64 products: tens of eps (1.2e-7) at the most
    assert abs(loss - expected_loss) <= 32 * torch.finfo(torch.float32).eps * max(1.0, abs(expected_loss))
    assert worst_error(gradients, expected, floor=1e-3) <= 10 * FP32_BOUND


@pytest.mark.usefixtures("_many_groups")
@pytest.mark.parametrize(("name", "variant"), IN_PIECES, ids=[f"{name}-{variant}" for name, variant in IN_PIECES])
def test_exact_in_pieces(name: str, variant: str) -> None:
    batch = batch_for(tiny(name))
    groups: list[int] = []
    whole = pieces.AttentionInPieces.groups_of

    def counted(self: Any, qkv: list[torch.Tensor]) -> int:
        groups.append(whole(self, qkv))
        return groups[-1]

    def make(engine: str) -> Any:
        model = tiny(name, dropout=0.1)
        return patched(model, variant=variant, engine=engine, tile=TILE, attention="pieces").train()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces.AttentionInPieces, "groups_of", counted)
        found, expected = both_engines(make, lambda model: step(model, batch))
    assert max(groups) > 1, "nothing ran by groups of heads"
    assert worst_error(found, expected) <= FP32_BOUND


@pytest.mark.parametrize("name", sorted({name for name, _ in IN_PIECES}))
def test_pieces_are_the_attention_block(name: str) -> None:
    """All heads and rows at once, the three functions give the bits of the family's attention block."""
    variant = "meft1"
    assert skip_reason(name, variant) is None
    model = patched(tiny(name), variant=variant, adapters="none", modules_to_save=())
    compared: list[bool] = []

    def compare(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        layer = layers[module]
        family = layer.spec.attention_pieces
        call = without_cache({**dict(zip(layer._parameters, args, strict=False)), **kwargs})
        hidden_states = call.pop(layer._parameters[0])
        expected, _ = layer.mix(hidden_states, call)
        heads = family.project(module, hidden_states, **call)
        found = family.output(module, hidden_states, family.attend(module, *heads, **call), **call)
        compared.append(torch.equal(found, expected))

    layers = {layer.module: layer for stack in require_state(model).stacks for layer in stack.layers}
    for module in layers:
        module.register_forward_hook(compare, with_kwargs=True)
    with torch.no_grad():
        model.eval()(**batch_for(model))
    assert compared
    assert all(compared)


def test_one_token_and_one_text() -> None:
    """A batch of one token has one tile; two tokens in tiles of one row have two."""
    for rows, tokens, tile in ((1, 1, 1), (1, 2, 1), (3, 1, 2), (2, 5, 10**6)):
        ids = torch.randint(1, 90, (rows, tokens), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "labels": ids}

        def make(engine: str, tile: int = tile) -> Any:
            return patched(tiny("opt"), engine=engine, tile=tile, attention="pieces").train()

        if tokens == 1:
            batch.pop("labels")  # no token has a next one

        found, expected = both_engines(make, lambda model, batch=batch: step(model, batch))
        assert found.keys() == expected.keys()
        assert worst_error(found, expected, floor=1e-3) <= FP32_BOUND


def test_attention_that_nobody_took_to_pieces_is_told(caplog: pytest.LogCaptureFixture) -> None:
    patched(tiny("gpt2"), attention="pieces")
    assert "attention='pieces' changes nothing for transformer.h:" in caplog.text
    caplog.clear()
    patched(tiny("llama"), attention="pieces")
    patched(tiny("gpt2"), attention="whole")
    assert "pieces" not in caplog.text
