"""The paper's own settings against its equations, transcribed here in plain torch and sharing no code with the package.

Sections 3.1 to 3.3 of arXiv 2306.00477. Two streams start from the embeddings, h = x1 = x2, and every layer computes

    y1 = lam * x1 + F(x2)
    y2 = beta * x2 + G(y1)

with F and G the pretrained layer and an adapter (MEFT1), the reverse (MEFT2), or attention and MLP (MEFT3). After each
layer of MEFT1 and MEFT2 the streams change places. The hidden states that leave are their mean (BERT), or the state's
stream plus a tenth of the other (OPT).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import meft_kernels

from ..models import VARIANTS, relative_error
from .zoo import VOCABULARY, tiny

COEFFICIENTS = {"meft1": (0.1, 1.0), "meft2": (1.0, 0.1), "meft3": (0.1, 0.1)}
LAYERS = 2


def linear(x: torch.Tensor, module: Any) -> torch.Tensor:
    return x @ module.weight.T + module.bias


def norm(x: torch.Tensor, module: Any) -> torch.Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, visible: torch.Tensor) -> torch.Tensor:
    """Scaled dot products, head by head; ``visible[row, query, key]``."""
    width = q.shape[-1] // heads
    parts = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        scores = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(width)
        parts.append(scores.masked_fill(~visible, -math.inf).softmax(-1) @ v[..., own])
    return torch.cat(parts, dim=-1)


def adapter(x: torch.Tensor, module: Any, activation: Any) -> torch.Tensor:
    return linear(activation(linear(x, module.down)), module.up)


class Bert:
    """Post-norm; gelu."""

    activation = staticmethod(F.gelu)

    def __init__(self, model: Any, mask: torch.Tensor) -> None:
        self.model, self.layers = model, model.encoder.layer
        self.visible = mask.bool()[:, None, :].expand(-1, mask.shape[1], -1)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        table = self.model.embeddings
        positions = table.position_embeddings.weight[: ids.shape[1]]
        words = table.word_embeddings.weight[ids] + table.token_type_embeddings.weight[0] + positions
        return norm(words, table.LayerNorm)

    def attention(self, layer: Any, h: torch.Tensor) -> torch.Tensor:
        own = layer.attention.self
        read = attend(linear(h, own.query), linear(h, own.key), linear(h, own.value), 4, self.visible)
        return norm(linear(read, layer.attention.output.dense) + h, layer.attention.output.LayerNorm)

    def mlp(self, layer: Any, h: torch.Tensor) -> torch.Tensor:
        written = linear(F.gelu(linear(h, layer.intermediate.dense)), layer.output.dense)
        written = written + adapter(h, layer.meft["ffn"], self.activation)
        return norm(written + h, layer.output.LayerNorm)

    def finish(self, h: torch.Tensor) -> torch.Tensor:
        return h


class Opt:
    """Pre-norm, causal; relu."""

    activation = staticmethod(F.relu)

    def __init__(self, model: Any, mask: torch.Tensor) -> None:
        self.decoder, self.layers = model.decoder, model.decoder.layers
        tokens = mask.shape[1]
        self.positions = (mask.cumsum(1) * mask - 1) + 2  # OPT's table begins with two unused rows
        self.visible = torch.ones(tokens, tokens, dtype=torch.bool).tril() & mask.bool()[:, None, :]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.decoder.embed_tokens.weight[ids] + self.decoder.embed_positions.weight[self.positions]

    def attention(self, layer: Any, h: torch.Tensor) -> torch.Tensor:
        own, x = layer.self_attn, norm(h, layer.self_attn_layer_norm)
        read = attend(linear(x, own.q_proj), linear(x, own.k_proj), linear(x, own.v_proj), 4, self.visible)
        return h + linear(read, own.out_proj)

    def mlp(self, layer: Any, h: torch.Tensor) -> torch.Tensor:
        x = norm(h, layer.final_layer_norm)
        return h + linear(F.relu(linear(x, layer.fc1)), layer.fc2) + adapter(x, layer.meft["ffn"], self.activation)

    def finish(self, h: torch.Tensor) -> torch.Tensor:
        return norm(h, self.decoder.final_layer_norm)


def transcription(family: Any, ids: torch.Tensor, variant: str, readout: tuple[float, float]) -> torch.Tensor:
    lam, beta = COEFFICIENTS[variant]
    x1 = x2 = family.embed(ids)
    for layer in family.layers:

        def side(x: torch.Tensor, layer: Any = layer) -> torch.Tensor:
            return adapter(x, layer.meft["stream"], family.activation)

        def whole(x: torch.Tensor, layer: Any = layer) -> torch.Tensor:
            return family.mlp(layer, family.attention(layer, x))

        if variant == "meft1":
            y1 = lam * x1 + whole(x2)
            y2 = beta * x2 + side(y1)
            x1, x2 = y2, y1
        elif variant == "meft2":
            y1 = lam * x1 + side(x2)
            y2 = beta * x2 + whole(y1)
            x1, x2 = y2, y1
        else:
            attended = family.attention(layer, x2)
            y1 = lam * x1 + attended + side(attended)
            x1, x2 = y1, beta * x2 + family.mlp(layer, y1)
    return family.finish(readout[0] * x1 + readout[1] * x2)


# BERT reads out the mean. OPT: a tenth of the other stream, the state's whole (MEFT3's streams stay where they are).
READOUTS = {
    "bert": dict.fromkeys(VARIANTS, ("mean", (0.5, 0.5))),
    "opt": {"meft1": ("state", (0.1, 1.0)), "meft2": ("state", (1.0, 0.1)), "meft3": ("mean", (0.5, 0.5))},
}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return ids, mask


def gradients_of(hidden_states: torch.Tensor, mask: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    weights = torch.randn(hidden_states.shape, generator=torch.Generator().manual_seed(3)).to(hidden_states.dtype)
    (hidden_states * weights * mask[..., None]).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("engine", ["autograd", "reversible"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["bert", "opt"])
def test_paper_preset_is_the_papers_method(name: str, variant: str, engine: str, dtype: torch.dtype) -> None:
    import transformers

    head = {"bert": transformers.BertModel, "opt": transformers.OPTModel}[name]
    keyword, readout = READOUTS[name][variant]
    model = tiny(name, head, num_hidden_layers=LAYERS).to(dtype)
    torch.manual_seed(5)
    config = meft_kernels.MeftConfig.paper(variant, readout=keyword, engine=engine)
    meft_kernels.patch(model, config).train()
    ids, mask = batch()
    family = {"bert": Bert, "opt": Opt}[name](model, mask)
    expected = transcription(family, ids, variant, readout)
    expected_gradients = gradients_of(expected, mask, model)
    found = model(input_ids=ids, attention_mask=mask).last_hidden_state
    gradients = gradients_of(found, mask, model)
    real = mask.bool()  # what a padded position attends to is nobody's business
    eps = torch.finfo(dtype).eps
    # A few hundred roundings on the way; measured 1 to 4 eps.
    assert (found - expected)[real].norm() <= 16 * eps * expected[real].norm()
    # The inverse divides by 0.1 in one lane of a layer, in both for MEFT3, and amplifies its rounding so each time.
    lanes = LAYERS * (2 if variant == "meft3" else 1)
    amplification = 10**lanes if engine == "reversible" else 1
    assert len(gradients) == 8 * LAYERS
    assert relative_error(gradients, expected_gradients) <= 16 * eps * amplification
