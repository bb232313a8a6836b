"""How many fraction bits the streams of a model can afford."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from ..errors import ReversibleUsageError
from ..ops import INT_LIMIT, Coupled
from .arithmetic import Arithmetic

logger = logging.getLogger(__name__)

MAX_CALIBRATED_BITS = 22
"""Finer than this gains nothing: streams of magnitude 1 then resolve float32's own rounding."""

HEADROOM_BITS = 2
"""log2 of how much the streams may grow, in training or on other batches, before they overflow."""

_COARSE = 2.0**-9
"""Rounding noise relative to a layer input's RMS beyond which it would show beside bfloat16's own (2^-9)."""


@dataclass(frozen=True)
class Probe(Arithmetic):
    """Float32 streams that note how large they become. One pass of it decides ``fraction_bits``."""

    fraction_bits: int | None = None
    largest: list[torch.Tensor] = field(default_factory=list)
    rms: list[torch.Tensor] = field(default_factory=list)
    """Of every stream, the smallest of any token: one large token would hide all others in the RMS of them together."""
    fuses: ClassVar[bool] = False

    def enter(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        stream, status = super().enter(hidden_states.float())
        self._note(stream)
        return stream, status

    def couple(
        self,
        a: torch.Tensor,
        branch: torch.Tensor,
        coefficient: float,
        center: torch.Tensor | None,
        value_dtype: torch.dtype | None,
        inplace: bool,
        first_row: int = 0,
    ) -> Coupled:
        coupled = super().couple(a, branch, coefficient, center, value_dtype, inplace, first_row)
        self._note(coupled.y)
        return coupled

    def _note(self, stream: torch.Tensor) -> None:
        if stream.numel():
            self.largest.append(stream.abs().amax())
            rms = stream.square().mean(-1).sqrt()
            self.rms.append(torch.where(rms > 0, rms, math.inf).amin())  # embeddings of padding are often zero

    def fraction_bits_for(self, at_most: int, name: str) -> int:
        """The most fraction bits that leave the streams room to grow by ``2^HEADROOM_BITS`` beyond what was met."""
        if not self.largest:
            raise ReversibleUsageError(f"calibration of {name} got an empty batch: call the model on real inputs first")
        largest = float(torch.stack(self.largest).max())
        integer_bits = math.ceil(math.log2(max(largest, 2.0**-20)))
        bits = int(math.log2(INT_LIMIT)) - HEADROOM_BITS - integer_bits
        bits = max(0, min(at_most, bits))
        rms = float(torch.stack(self.rms).min())
        noise = 2.0**-bits / math.sqrt(12)
        if noise > _COARSE * rms:
            logger.warning(
                "meft_kernels: streams of %s range from a token with an RMS of %.3g to a largest value of %.3g; "
                "fraction_bits=%d resolves that token to %.1e of its RMS only. Fine-tuning still works, the start loss "
                "may move; verify(model, batch) shows by how much.",
                name,
                rms,
                largest,
                bits,
                noise / rms,
            )
        else:
            logger.debug(
                "meft_kernels: %s: fraction_bits=%d, largest %.4g, smallest rms %.3g", name, bits, largest, rms
            )
        return bits
