"""What each rival needs for one model, and the longest context that fits."""

from __future__ import annotations

import dataclasses
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

from ..comparison.rivals import Budget, Rival, UnavailableRivalError
from ..comparison.rivals.lora import lora_rank
from ..config import MeftConfig
from .depth import Parts, depth_of, extrapolate
from .quantised import WEIGHTS, Weights
from .shapes import longest_input, with_positions
from .step import StepBytes, measure_step, text_batch
from .twin import build, simulation, twin

SIMULATED_BITS = 20
"""Any number does: streams are int32."""

MULTIPLE = 64
"""Contexts are given in multiples of so many tokens, where they are longer."""

LONGEST = 2**23
"""Tokens of the longest text that is looked at where the model's positions set no limit."""

DEFAULT_RIVALS = (
    "full", "lora", "lora_checkpointing", "lora_chunked", "lora_chunked_tiled", "lora_chunked_host",
    "lora_chunked_tiled_host", "bottleneck", "meft", "meft_pieces", "meft_host", "meft_pieces_host", "meft1", "meft3",
    "meft_lora",
)  # fmt: skip


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
        weights: ``"4bit"`` or ``"8bit"`` where the linear modules of the layers are quantised; None: in ``dtype``.
        any_length: whether texts may be longer than the model's positions, as people extend them.
        model_class: of the model; None: that of the task which its config's is most often fine-tuned for.
    """

    config: Any
    dtype: torch.dtype
    rows: int
    meft: MeftConfig = field(default_factory=MeftConfig)
    loss: bool = True
    gpu: bool = True
    weights: Weights | None = None
    any_length: bool = False
    model_class: Any = None
    _known: dict[tuple[str, int], StepBytes] = field(default_factory=dict)
    _simulated: dict[tuple[str, int, Parts], StepBytes] = field(default_factory=dict)
    _budgets: dict[tuple[Parts, bool], Budget] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weights not in (None, *WEIGHTS):
            raise ValueError(f"weights are {' or '.join(WEIGHTS)}, or None for the model's own, not {self.weights!r}")
        if self.meft.arithmetic == "exact" and self.meft.fraction_bits is None:
            settings = self.meft.to_dict() | {"fraction_bits": SIMULATED_BITS}
            self.meft = MeftConfig.from_dict(settings)

    def step(self, rival: Rival, tokens: int) -> StepBytes:
        """Bytes of one step of the whole model.

        Raises:
            UnavailableRivalError: the rival cannot take this model.
            UnavailableRivalError: the rival trains what is quantised.
            ValueError: the model does not run on tensors without data, or takes fewer tokens.
        """
        if rival.whole and self.weights is not None:
            raise UnavailableRivalError("weights in 4 or 8 bits cannot be trained")
        key = rival.name, tokens
        if key not in self._known:
            limit = self.limit
            if limit is not None and tokens > limit:
                raise ValueError(
                    f"the model takes {limit} tokens at most (its config's positions), not {tokens}: "
                    "any_length (--any-length) is for models that are extended"
                )
            config = with_positions(self.config, tokens)
            self._known[key] = extrapolate(
                config, lambda config, parts: self._simulate_parts(config, rival, tokens, parts), self.parts
            )
        return self._known[key]

    @property
    def parts(self) -> Parts:
        """Frozen layers, those that drop their activations, those that keep them; all where they are alike."""
        depth, frozen, count = depth_of(self.config), self.meft.frozen_layers, self.meft.reversible_layers
        if self.config.is_encoder_decoder or (not frozen and count in (None, depth)):
            return (depth,)
        reversible = depth - frozen if count is None else count
        return frozen, reversible, depth - frozen - reversible

    def with_reversible(self, layers: int) -> Estimator:
        """The same for a model of which so many layers drop their activations, with what is known already."""
        return dataclasses.replace(self, meft=self.meft.changed(reversible_layers=layers), _known={})

    def _simulate_parts(self, config: Any, rival: Rival, tokens: int, parts: Parts) -> StepBytes:
        key = rival.name, tokens, parts
        if key not in self._simulated:
            self._simulated[key] = self.simulate(config, rival, tokens, parts)
        return self._simulated[key]

    @property
    def limit(self) -> int | None:
        """Tokens of a text at most; None where nothing limits them."""
        return None if self.any_length else longest_input(self.config)

    def simulate(self, config: Any, rival: Rival, tokens: int, parts: Parts | None = None) -> StepBytes:
        """The same of a config as it is, every layer of it."""
        try:
            with simulation(gpu=self.gpu):
                budget = self._budget(config, rival, parts or (depth_of(config),))
                model = twin(config, self.dtype, rival, budget, self.weights, self.model_class)
                batch = text_batch(model, self.rows, tokens, torch.device("cpu"))
                return measure_step(model, batch, loss=self.loss, foreach=self.gpu)
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
            raise ValueError(_NOT_SIMULATED.format(config.model_type, error)) from error
        except RuntimeError as error:
            if "grouped_mm" in traceback.format_exc():  # experts; its fake form takes bfloat16 alone
                raise ValueError(_NOT_SIMULATED.format(config.model_type, error)) from error
            raise

    def _budget(self, config: Any, rival: Rival, parts: Parts) -> Budget:
        """As much as the whole model's, for each layer: LoRA's rank must not change with the depth by rounding."""
        key = parts, "lora" in rival.name
        if key not in self._budgets:
            meft = self._settings(parts)
            self._budgets[key] = self._lora_budget(config, meft) if key[1] else Budget.of(self._build(config), meft)
        return self._budgets[key]

    def _settings(self, parts: Parts) -> MeftConfig:
        """MEFT's for a model of so many layers."""
        if len(parts) == 1:
            return self.meft
        return self.meft.changed(frozen_layers=parts[0], reversible_layers=parts[1])

    def _build(self, config: Any) -> Any:
        return build(config, self.dtype, self.model_class)

    def _lora_budget(self, config: Any, meft: MeftConfig) -> Budget:
        whole, model = self._build(self.config), self._build(config)
        rank = lora_rank(whole, Budget.of(whole, self.meft))
        here = Budget.of(model, meft)
        far = 10**15
        per_rank = far / lora_rank(model, Budget(meft, far))
        return Budget(meft, round(here.trainable + (rank - lora_rank(model, here)) * per_rank))

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
        return longest_that_fits(lambda tokens: self.step(rival, tokens).total, capacity, start, self.limit or LONGEST)


def longest_that_fits(total: Callable[[int], int], capacity: int, start: int, limit: int) -> int:
    """The largest argument, to 1 %, for which ``total``, which never falls and bends upwards, stays in ``capacity``."""
    if total(1) > capacity:
        return 0
    fits, beyond = 1, limit + 1
    known = {1: total(1)}

    def tolerance() -> int:
        return max(1, fits // 100)

    guess, just_above, turns = min(start, limit), False, 0
    while beyond - fits > tolerance():
        turns += 1
        guess = min(max(guess, fits + 1), beyond - 1)
        known[guess] = total(guess)
        if known[guess] <= capacity:
            fits, just_above = guess, not just_above and turns > 1
        else:
            beyond, just_above = guess, False
        if just_above:  # the line's guess fitted: is it the longest?
            guess = fits + tolerance()
        elif turns % 4 == 0:
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
