"""What settings cost in time, from a model's shapes: arithmetic, bytes over the bus, products that are too small.

Nothing is measured here: the figures justify the order of the candidates, and are printed beside them. Llama-3.1-8B,
bfloat16, meft2, as shares of a step of which every layer is reversible (forward, recompute and backward, each of them
forward's products, weights being frozen):

* A layer that keeps its activations is not computed again: of 32 such layers each saves 1 % of the step.
* A coefficient of -1/8 costs nothing, but changes what is computed.
* Attention in pieces computes queries, keys and values once more: 3.8 % at 512 tokens, 2.0 % at 32,768, where
  attention's own products outweigh them.
* Remainders in host memory are a byte an element and layer, there and back: 0.33 us a token and layer at 25 GB/s, and
  6.3 us of arithmetic at 32,768 tokens and 400 TFLOP/s. The bus is busy for 5 % of the step (10 % at 512 tokens); only
  where that comes to more than 100 %, as it may in narrow models, is it waited for.
* Tiles of 512 rows leave 3 % of a large GPU idle with 4096 columns, 52 % with 2048.

Pieces come before the host: they take nothing but the device, while a host's memory and bus are shared with the loading
of data and with other GPUs. Smaller tiles come last: of all settings their cost depends most on the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import MeftConfig
from ..engine.tiles import AUTO_ROWS, AUTO_ROWS_ELSEWHERE
from ..estimate.depth import depth_of
from ..fixed_point import reciprocal
from ..ops.coupling.packing import remainder_bits

BUS = 25e9
"""Bytes a second in one direction, of PCIe 4 x16; PCIe 5 has twice as much."""

ARITHMETIC = 400e12
"""Operations a second that matrix products reach on a large GPU: 40 % of what an H100 has in 16 bits."""

MULTIPROCESSORS, BLOCK = 132, 128
"""Of an H100; rows and columns of a matrix product that one of them computes at a time."""


@dataclass(frozen=True)
class Costs:
    """Operations of one layer for a token, forward, and its bytes.

    Attributes:
        products: with the layer's weights.
        projections: of these, queries, keys and values.
        attention: scores and what they weigh, half of them masked.
        width: of the hidden states.
    """

    products: float
    projections: float
    attention: float
    width: int

    @classmethod
    def of(cls, config: Any, tokens: int) -> Costs:
        """From a config; feed-forward parts are taken for gated where the family's are (as all with SiLU are)."""
        text = config.get_text_config()
        width, heads = text.hidden_size, text.num_attention_heads
        head = getattr(text, "head_dim", None) or width // heads
        keys = getattr(text, "num_key_value_heads", None) or heads
        inner = next(
            (
                value
                for name in ("intermediate_size", "ffn_dim", "hidden_dim", "n_inner", "encoder_ffn_dim", "d_ff")
                if isinstance(value := getattr(text, name, None), int)
            ),
            4 * width,
        )
        gated = "silu" in str(getattr(text, "hidden_act", "")) or text.model_type.startswith("gemma")
        projections = 2 * width * head * (heads + 2 * keys)
        products = projections + 2 * width * head * heads + (3 if gated else 2) * 2 * width * inner
        causal = 0.5 if any("CausalLM" in name for name in config.architectures or []) else 1.0
        return cls(products, projections, causal * 4 * tokens * head * heads, width)

    @property
    def reversible(self) -> float:
        """Forward, recompute, backward without gradients of weights; attention's backward is five products, not two."""
        return 3 * self.products + 4.5 * self.attention

    def kept(self, plain: int, layers: int) -> float:
        """Share of a step that is saved where so many layers keep their activations."""
        return plain / layers * (self.products + self.attention) / self.reversible

    def pieces(self) -> float:
        """Share of a step that projections are, once more."""
        return self.projections / self.reversible

    def bus(self, meft: MeftConfig) -> float:
        """Share of a step for which the bus is busy with remainders."""
        bits = sum(remainder_bits(reciprocal(each)[0]) for each in meft.coefficients)
        return 2 * self.width * bits / 8 / BUS * ARITHMETIC / self.reversible

    def idle(self, rows: int) -> float:
        """Share of a large GPU that waits in the last round of a product of so many rows by the model's width."""
        blocks = -(-rows // BLOCK) * -(-self.width // BLOCK)
        return 1 - blocks / (-(-blocks // MULTIPROCESSORS) * MULTIPROCESSORS)


def default_tile(*, gpu: bool) -> int:
    """Rows of a tile where they are chosen by the device."""
    return AUTO_ROWS_ELSEWHERE if gpu else AUTO_ROWS["cpu"]


def patched_layers(config: Any, meft: MeftConfig) -> int:
    """Those above the frozen ones."""
    return depth_of(config) - meft.frozen_layers
