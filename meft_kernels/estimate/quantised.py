"""Quantised linear layers for a simulation: their bytes, and those of the matrix that is multiplied, in 16 bits."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..architectures.layer_lists import find_layers
from ..config import MeftConfig
from ..patching.targets import find_spec

Weights = Literal["4bit", "8bit"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)

BLOCK, BLOCK_OF_SCALES = 64, 256
"""bitsandbytes' NF4 with double quantisation: weights that share a scale, and scales that share one."""

CODES = 4 * (16 + 256 + 1)
"""Bytes of its tables of 16 and 256 values and its scales' mean, in float32, which every layer has."""


class QuantisedLinear(nn.Linear):
    """A frozen linear layer as it lies in memory, quantised, without values.

    ``4bit``: bitsandbytes' NF4 with double quantisation, 4.127 bits a weight. ``8bit``: int8 with a scale a row, as
    torchao's weight-only int8. The matrix in the input's dtype exists while it is multiplied, in forward and again in
    backward, as in both.
    """

    def __init__(self, plain: nn.Linear | Conv1D, weights: Weights) -> None:
        nn.Module.__init__(self)
        rows, columns = plain.weight.shape if isinstance(plain, nn.Linear) else reversed(plain.weight.shape)
        self.in_features, self.out_features, self.weights = columns, rows, weights
        count = rows * columns
        if weights == "4bit":
            packed, scales = -(-count // 2), -(-count // BLOCK)
            scales += 4 * -(-scales // BLOCK_OF_SCALES) + CODES
        else:
            packed, scales = count, 4 * rows
        device = plain.weight.device
        self.weight = nn.Parameter(torch.empty(packed, 1, dtype=torch.uint8, device=device), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(scales, dtype=torch.uint8, device=device), requires_grad=False)
        self.bias = plain.bias

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """What a kernel gives, and the scales in float32 that bitsandbytes makes for it."""
        shape = self.out_features, self.in_features
        scales = None
        if self.weights == "4bit":
            scales = self.weight.new_empty(-(-shape[0] * shape[1] // BLOCK), dtype=torch.float32)
        made = self.weight.new_empty(shape, dtype=dtype)
        del scales
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Product.apply(input, self)
        return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, linear: QuantisedLinear) -> torch.Tensor:
        ctx.linear = linear
        return F.linear(input, linear.dequantise(input.dtype), linear.bias)

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor) -> tuple[torch.Tensor, None]:
        return d_out @ ctx.linear.dequantise(d_out.dtype), None


def quantise(model: Any, weights: Weights) -> None:
    """Exchange the linear modules of the layers; embeddings, head and norms stay as they are."""
    for found in find_layers(model, find_spec(model, MeftConfig())):
        for layer in found.layers:
            for parent in list(layer.modules()):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear | Conv1D):
                        setattr(parent, name, QuantisedLinear(child, weights))
