"""What of a stack, besides weights, a training needs in order to go on with the same numbers."""

from __future__ import annotations

import hashlib
import logging
from typing import Protocol

import torch
from torch import nn

from ..config import MeftConfig
from ..errors import PatchError
from ..ops.coupling.api import MAX_FRACTION_BITS
from .arithmetic import Arithmetic

logger = logging.getLogger(__name__)

_NOT_CALIBRATED = -1
EXTRA_STATE = "_extra_state"
"""torch's own name, in ``state_dict()``, of what a module adds besides parameters and buffers."""


class _Stack(Protocol):
    """What is needed of a :class:`~meft_kernels.engine.stack.ReversibleStack`."""

    name: str
    config: MeftConfig
    arithmetic: Arithmetic | None

    def set_fraction_bits(self, fraction_bits: int) -> int: ...


class StackState(nn.Module):
    """Puts the stack's ``fraction_bits`` into ``state_dict()``, int64 ``[settings, fraction_bits]``.

    Without it a training that is resumed would calibrate anew, on another batch than the first time. ``settings`` is a
    digest of those that decide what the streams compute: weights fit in any case, and would give other numbers.
    """

    def __init__(self, stack: _Stack) -> None:
        super().__init__()
        self._stack = stack

    def get_extra_state(self) -> torch.Tensor:
        arithmetic = self._stack.arithmetic
        bits = _NOT_CALIBRATED if arithmetic is None or arithmetic.fraction_bits is None else arithmetic.fraction_bits
        return torch.tensor([_digest(self._stack.config), bits], dtype=torch.int64)

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
                self._stack.name,
                bits,
                taken,
            )

    def check(self, state: torch.Tensor) -> int | None:
        """The ``fraction_bits`` in a saved state, None where there are none.

        Raises:
            PatchError: as :meth:`set_extra_state`.
        """
        name, config = self._stack.name, self._stack.config
        if not isinstance(state, torch.Tensor) or state.dtype != torch.int64 or state.shape != (2,):
            raise PatchError(f"the saved state of {name} is damaged: two int64 numbers were expected")
        digest, bits = state.tolist()
        if digest != _digest(config):
            raise PatchError(
                f"the saved state of {name} comes from a model patched with other settings (variant, arithmetic, "
                f"coupling, readout, lam or beta): this one has {_settings(config)}. Patch with the settings that it "
                "was saved with"
            )
        if bits == _NOT_CALIBRATED or config.arithmetic == "float":
            return None
        if not 0 <= bits <= MAX_FRACTION_BITS:
            raise PatchError(f"the saved state of {name} is damaged: fraction_bits is {bits}")
        if config.fraction_bits is not None and config.fraction_bits > bits:  # fewer is the way out of an overflow
            raise PatchError(
                f"the saved state of {name} has fraction_bits={bits}, and this model was patched with "
                f"{config.fraction_bits}: patch with {bits}, or with fewer if its streams overflow"
            )
        return int(bits)


def _settings(config: MeftConfig) -> str:
    lam, beta = map(float, config.coefficients)
    return (
        f"variant={config.variant}, arithmetic={config.arithmetic}, coupling={config.coupling}, "
        f"readout={config.readout}, lam={lam!r}, beta={beta!r}"
    )


def _digest(config: MeftConfig) -> int:
    return int.from_bytes(hashlib.sha256(_settings(config).encode()).digest()[:8], "big") >> 1
