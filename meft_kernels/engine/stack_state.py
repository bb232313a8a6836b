"""What of a stack, besides weights, a training needs in order to go on with the same numbers."""

from __future__ import annotations

import hashlib
import logging
from typing import Protocol

import torch
from torch import nn

from ..config import MeftConfig
from ..errors import PatchError
from ..fixed_point import MAX_FRACTION_BITS
from .arithmetic import Arithmetic

logger = logging.getLogger(__name__)

_DIGEST_BITS = 63
_NOT_CALIBRATED = 0
"""Place, among the marks for ``fraction_bits``, of there being none."""
_MARKS = MAX_FRACTION_BITS + 2
_LEAST_WEIGHT = 0.01
"""What a mark must weigh in an average to count: less is what a moving average has forgotten."""
_WRITTEN_BEFORE = torch.int64
"""Dtype of ``[digest, fraction_bits or -1]``, which earlier versions saved."""
EXTRA_STATE = "_extra_state"
"""torch's own name, in ``state_dict()``, of what a module adds besides parameters and buffers."""


class _Stack(Protocol):
    """What is needed of a :class:`~meft_kernels.engine.stack.ReversibleStack`."""

    label: str
    config: MeftConfig
    arithmetic: Arithmetic | None

    def set_fraction_bits(self, fraction_bits: int) -> int: ...


class StackState(nn.Module):
    """Puts the stack's ``fraction_bits`` into ``state_dict()``: float32 ``[63 + 30]``, settings and calibration.

    Without it a training that is resumed would calibrate anew, on another batch than the first time. The settings are
    a digest of those that decide what the streams compute: weights fit in any case, and would give other numbers.

    People average state dicts, all entries alike (moving averages, federated learning, checkpoint soups), in whatever
    dtype they do that. So all is written in zeros and ones: the digest bit by bit, ``fraction_bits`` as a mark at its
    place among 30. An average of equal states is that state, one over different settings is none, and one over
    different calibrations shows each that went into it.
    """

    def __init__(self, stack: _Stack) -> None:
        super().__init__()
        self._stack = stack

    def get_extra_state(self) -> torch.Tensor:
        arithmetic = self._stack.arithmetic
        marks = torch.zeros(_MARKS)
        bits = None if arithmetic is None else arithmetic.fraction_bits
        marks[_NOT_CALIBRATED if bits is None else bits + 1] = 1
        digest = _digest(self._stack.config)
        return torch.cat([torch.tensor([float(digest >> place & 1) for place in range(_DIGEST_BITS)]), marks])

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take up the calibration, or keep to fewer bits where streams are known to need them.

        Raises:
            PatchError: the state was saved under other settings, or is none of ours. Nothing has been changed.
        """
        bits = self.check(state)
        if bits is None:
            return
        taken = self._stack.set_fraction_bits(bits)
        if taken != bits:
            logger.warning(
                "meft_kernels: streams of %s were saved with fraction_bits=%d and go on with %d: what is computed "
                "differs from before by their rounding",
                self._stack.label,
                bits,
                taken,
            )

    def check(self, state: torch.Tensor) -> int | None:
        """The ``fraction_bits`` in a saved state, None where there are none.

        Of an average over several calibrations it is the coarsest, which has room for what each of them was made for.

        Raises:
            PatchError: as :meth:`set_extra_state`.
        """
        name, config = self._stack.label, self._stack.config
        digest, bits = self._read(state)
        if digest != _digest(config):
            raise PatchError(
                f"the saved state of {name} comes from a model patched with other settings (variant, arithmetic, "
                f"coupling, readout, lam or beta), or is an average over several: this one has {_settings(config)}. "
                "Patch with the settings that it was saved with"
            )
        if bits is None or config.arithmetic == "float":
            return None
        if not 0 <= bits <= MAX_FRACTION_BITS:
            raise PatchError(f"the saved state of {name} is damaged: fraction_bits is {bits}")
        if config.fraction_bits is not None and config.fraction_bits > bits:  # fewer is the way out of an overflow
            raise PatchError(
                f"the saved state of {name} has fraction_bits={bits}, and this model was patched with "
                f"{config.fraction_bits}: patch with {bits}, or with fewer if its streams overflow"
            )
        return bits

    def _read(self, state: torch.Tensor) -> tuple[int, int | None]:
        """Digest and ``fraction_bits`` as they stand there."""
        damaged = f"the saved state of {self._stack.label} is damaged"
        if not isinstance(state, torch.Tensor):
            raise PatchError(f"{damaged}: it is no tensor")
        if state.dtype == _WRITTEN_BEFORE and state.shape == (2,):
            digest, bits = state.tolist()
            return digest, None if bits == -1 else bits
        if state.shape != (_DIGEST_BITS + _MARKS,):
            raise PatchError(f"{damaged}: {_DIGEST_BITS + _MARKS} numbers were expected, not {tuple(state.shape)}")
        values = state.detach().double().cpu()
        marks = values[_DIGEST_BITS:]
        found = (marks > _LEAST_WEIGHT).nonzero().flatten().tolist()
        if not values.isfinite().all() or not found or abs(float(marks.sum()) - 1) > 0.25:
            raise PatchError(f"{damaged}, or a sum over state dicts whose weights do not add up to one")
        digest = sum(1 << place for place, value in enumerate(values[:_DIGEST_BITS].tolist()) if value > 0.5)
        unequal = (values[:_DIGEST_BITS] - values[:_DIGEST_BITS].round()).abs().max() > 0.25
        return -1 if unequal else digest, min((place - 1 for place in found if place != _NOT_CALIBRATED), default=None)


def _settings(config: MeftConfig) -> str:
    lam, beta = map(float, config.coefficients)
    return (
        f"variant={config.variant}, arithmetic={config.arithmetic}, coupling={config.coupling}, "
        f"readout={config.readout}, lam={lam!r}, beta={beta!r}"
    )


def _digest(config: MeftConfig) -> int:
    return int.from_bytes(hashlib.sha256(_settings(config).encode()).digest()[:8], "big") >> 1
