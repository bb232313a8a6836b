"""What each rival needs for one model, and the longest context that fits."""

from __future__ import annotations

import itertools
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

from ..comparison.rivals import Budget, Rival
from ..comparison.rivals.lora import lora_rank
from ..config import MeftConfig
from .depth import extrapolate
from .shapes import longest_input
from .step import StepBytes, measure_step, text_batch
from .twin import build, simulation, twin

SIMULATED_BITS = 20
"""Any number does: streams are int32."""

MULTIPLE = 64
"""Contexts are given in multiples of so many tokens, where they are longer."""

DEFAULT_RIVALS = ("full", "lora", "lora_checkpointing", "bottleneck", "meft", "meft1", "meft3", "meft_lora")


def why_not_estimated(rival: Rival) -> str | None:
    """Why a rival cannot run on fake tensors, or None."""
    if rival.gpu or "compiled" in rival.name:
        return "it allocates where no tensor shows: in kernels of its own, a compiled graph or the host's memory"
    return rival.why_unavailable(torch.device("cpu"))


@dataclass
class Estimator:
    """Training steps of one model on fake tensors.

    Attributes:
        config: the model's.
        rows: texts in a batch.
        meft: MEFT's settings; every rival trains as many parameters as MEFT with them.
        loss: whether head and loss are part of the step.
        gpu: whether our ops and AdamW allocate as on CUDA, or as on a CPU.
    """

    config: Any
    dtype: torch.dtype
    rows: int
    meft: MeftConfig = field(default_factory=MeftConfig)
    loss: bool = True
    gpu: bool = True
    _known: dict[tuple[str, int], StepBytes] = field(default_factory=dict)
    _rank: int | None = None

    def __post_init__(self) -> None:
        if self.meft.arithmetic == "exact" and self.meft.fraction_bits is None:
            settings = self.meft.to_dict() | {"fraction_bits": SIMULATED_BITS}
            self.meft = MeftConfig.from_dict(settings)

    def step(self, rival: Rival, tokens: int) -> StepBytes:
        """Bytes of one step of the whole model.

        Raises:
            UnavailableRivalError: the rival cannot take this model.
            ValueError: the model does not run on tensors without data, or takes fewer tokens.
        """
        key = rival.name, tokens
        if key not in self._known:
            limit = longest_input(self.config)
            if limit is not None and tokens > limit:
                raise ValueError(f"the model takes {limit} tokens at most (its config's positions), not {tokens}")
            self._known[key] = extrapolate(self.config, lambda config: self.simulate(config, rival, tokens))
        return self._known[key]

    def simulate(self, config: Any, rival: Rival, tokens: int) -> StepBytes:
        """The same of a config as it is, every layer of it."""
        try:
            with simulation(gpu=self.gpu):
                model = twin(config, self.dtype, rival, self._budget(config, rival))
                batch = text_batch(model, self.rows, tokens, torch.device("cpu"))
                return measure_step(model, batch, loss=self.loss, foreach=self.gpu)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
            raise ValueError(_NOT_SIMULATED.format(config.model_type, error)) from error
        except RuntimeError as error:
            if "grouped_mm" in traceback.format_exc():  # experts; its fake form takes bfloat16 alone
                raise ValueError(_NOT_SIMULATED.format(config.model_type, error)) from error
            raise

    def _budget(self, config: Any, rival: Rival) -> Budget:
        """As much as the whole model's, for each layer: LoRA's rank must not change with the depth by rounding."""
        model = build(config, self.dtype)
        here = Budget.of(model, self.meft)
        if "lora" not in rival.name:
            return here
        rank = lora_rank(model, here)
        if self._rank is None:
            whole = build(self.config, self.dtype)
            self._rank = lora_rank(whole, Budget.of(whole, self.meft))
        if rank == self._rank:
            return here
        far = 10**15
        per_rank = far / lora_rank(model, Budget(self.meft, far))
        return Budget(self.meft, round(here.trainable + (self._rank - rank) * per_rank))

    def notes(self) -> list[str]:
        """What of a real run is known to differ."""
        text = self.config.get_text_config()
        keys = getattr(text, "num_key_value_heads", None)
        if self.gpu and self.dtype == torch.float32 and keys not in (None, text.num_attention_heads):
            return [
                "float32 with grouped queries: torch's flash attention on CUDA takes 16 bits only, so that a real run "
                "may hold tokens x tokens scores on top of this."
            ]
        return []

    def longest(self, rival: Rival, capacity: int, start: int) -> int:
        """Tokens per text that fit into ``capacity`` bytes: simulated at that length, and within 1 % of the longest.

        0 where not even one token does.
        """
        return longest_that_fits(
            lambda tokens: self.step(rival, tokens).total, capacity, start, longest_input(self.config) or 2**22
        )


def longest_that_fits(total: Callable[[int], int], capacity: int, start: int, limit: int) -> int:
    """The largest argument, to 1 %, for which ``total``, which never falls and bends upwards, stays in ``capacity``."""
    if total(1) > capacity:
        return 0
    fits, beyond = 1, limit + 1
    known = {1: total(1)}

    def tolerance() -> int:
        return max(1, fits // 100)

    ways = itertools.cycle(("chord", "just above", "half"))
    guess = min(start, limit)
    while beyond - fits > tolerance():
        guess = min(max(guess, fits + 1), beyond - 1)
        known[guess] = total(guess)
        if known[guess] <= capacity:
            fits = guess
        else:
            beyond = guess
        way = next(ways)
        if way == "just above":
            guess = fits + tolerance()
        elif way == "half":
            guess = math.isqrt(fits * beyond)  # in ratio
        else:  # the straight line between the lengths on either side, or through the last two where all fitted so far
            low, high = (fits, beyond) if beyond in known else (1, fits)
            slope = (known[high] - known[low]) / (high - low)
            guess = int(low + (capacity - known[low]) / slope) if slope > 0 else limit
            if guess > 8 * MULTIPLE:
                guess -= guess % MULTIPLE
    return fits


_NOT_SIMULATED = (
    "{} cannot be estimated: what it allocates depends on values (a router's choice, say) or on kernels that tensors "
    "without data do not have (experts do in bfloat16) ({})"
)
