"""``MeftCallback``: what a ``transformers.Trainer`` logs of a patched model."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from ..errors import NotRepeatableError
from ..patching.state import require_state, unwrap
from .describe import describe
from .verify import verify

logger = logging.getLogger(__name__)


class MeftCallback(TrainerCallback):
    """Adds figures of this process to every log of the training loss.

    * ``meft_kept_bytes``: what the reversible layers kept between the last forward and its backward;
    * ``meft_tokens_per_second``: tokens of training batches, padding among them, since the log before;
    * ``meft_checked_passes``: backward passes in which every rebuilt stream was compared with the forward's (a
      difference raises :class:`~meft_kernels.NotRepeatableError`; float streams are not compared);
    * ``meft_peak_memory_bytes``: the allocator's peak, on CUDA.

    They are in ``trainer.state.log_history`` and in what is printed. Reporters (TensorBoard, W&B) come before the
    callbacks of a ``Trainer``'s argument; to have them report it, too:
    ``trainer.callback_handler.callbacks.insert(0, MeftCallback())``.

    Args:
        verify_batch: keyword arguments of the model's forward; :func:`~meft_kernels.verify` runs on them before the
            first step, and training does not begin if the model is not exact on them.
    """

    def __init__(self, verify_batch: Mapping[str, Any] | None = None) -> None:
        self._verify_batch = verify_batch
        self._since = 0.0
        self._tokens = 0
        self._bytes_per_token: list[float] = []  # of every stack

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Say what will be trained, and check it if there is a batch to check it on.

        Raises:
            PatchError: the model is not patched.
            NotRepeatableError: it is not exact on ``verify_batch``.
        """
        stacks = require_state(model).stacks
        description = describe(model)
        self._bytes_per_token = [stack.bytes_per_token for stack in description.stacks]
        logger.info("meft_kernels: training\n%s", description)
        if self._verify_batch is not None:
            device = next(unwrap(model).parameters()).device
            batch = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in self._verify_batch.items()
            }
            report = verify(model, batch)
            logger.info("meft_kernels: verified\n%s", report)
            if not report.bit_exact and stacks[0].config.arithmetic == "exact":
                raise NotRepeatableError(
                    f"the model is not exact on verify_batch, first at {report.first_mismatch}; training was not begun"
                )
        self._since, self._tokens = time.perf_counter(), sum(stack.counts.tokens for stack in stacks)

    def on_log(
        self, args: Any, state: Any, control: Any, model: Any = None, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Add our figures to a log of the training loss."""
        if logs is None or "loss" not in logs:
            return
        stacks = require_state(model).stacks
        now, tokens = time.perf_counter(), sum(stack.counts.tokens for stack in stacks)
        kept = zip(self._bytes_per_token, stacks, strict=True)
        values: dict[str, float] = {
            "meft_kept_bytes": round(sum(per_token * stack.counts.last_tokens for per_token, stack in kept)),
            "meft_tokens_per_second": round((tokens - self._tokens) / max(now - self._since, 1e-9), 1),
            "meft_checked_passes": sum(stack.counts.checked for stack in stacks),
        }
        if torch.cuda.is_available():
            values["meft_peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        self._since, self._tokens = now, tokens
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)
