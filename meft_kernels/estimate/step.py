"""One training step and its bytes; the same code measures real tensors and tensors without data."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..memory import LiveTensorMeter
from ..patching.state import unwrap

Batch = dict[str, Any]


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one training step with AdamW, in tensors; an allocator's rounding and CUDA's context come on top.

    Attributes:
        weights: parameters and buffers.
        gradients: those of the trained parameters; they come up in backward, and are in its peak.
        optimizer: AdamW's two averages.
        kept: alive after forward for the sake of backward.
        forward: the most that forward, loss included, has alive beside weights and optimizer state.
        backward: the same of backward.
        update: the most that the optimizer's step has alive beside the weights.
        host: the most in host memory; no part of any other figure.
        peak: the greater of ``forward`` and ``backward``.
        total: the most at any time of a step.
    """

    weights: int
    gradients: int
    optimizer: int
    kept: int
    forward: int
    backward: int
    update: int
    host: int = 0

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)

    @property
    def total(self) -> int:
        return self.weights + max(self.optimizer + self.peak, self.update)


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes behind tensors, each storage once."""
    return sum({id(s): s.nbytes() for s in [tensor.untyped_storage() for tensor in tensors]}.values())


def text_batch(model: Any, rows: int, tokens: int, device: torch.device) -> Batch:
    """An unpadded batch for the model's task."""
    base = unwrap(model)
    ids = torch.randint(3, base.config.get_text_config().vocab_size, (rows, tokens), device=device)
    batch: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    takes = inspect.signature(type(base).forward).parameters
    if "labels" in takes:
        one = torch.zeros(rows, dtype=torch.int64, device=device)
        if type(base).__name__.endswith("ForTokenClassification"):
            batch["labels"] = torch.zeros_like(ids)
        else:
            batch["labels"] = ids if base.get_output_embeddings() is not None else one
    elif "start_positions" in takes:
        batch["start_positions"] = batch["end_positions"] = torch.zeros(rows, dtype=torch.int64, device=device)
    return batch


def _forward(model: Any, batch: Batch, *, loss: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What backward starts from, and its gradient. Without ``loss``, the hidden states that the head would read."""
    if loss:
        # The logits are no activations that backward needs: only the loss is held.
        return model(**batch).loss, None
    body = unwrap(model).base_model
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if body.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["input_ids"]
    hidden = body(**inputs)[0]
    return hidden, torch.ones_like(hidden)


def _give_head_gradients(base: Any) -> None:
    """What a fused loss would have left there by now."""
    in_body = {id(parameter) for parameter in base.base_model.parameters()}
    for parameter in base.parameters():
        if parameter.requires_grad and id(parameter) not in in_body:
            parameter.grad = torch.zeros_like(parameter)


def measure_step(model: Any, batch: Batch, *, loss: bool = True, foreach: bool = False) -> StepBytes:
    """Forward, backward and AdamW's update of one step.

    Args:
        loss: False leaves head and loss out, as a fused loss without logits would.
        foreach: AdamW over all parameters at once, its default on CUDA, which takes a copy of them.
    """
    base = unwrap(model)
    parameters = [parameter for parameter in base.parameters() if parameter.requires_grad]
    weights = tensor_bytes([*base.parameters(), *base.buffers()])
    optimizer = torch.optim.AdamW(parameters, foreach=foreach)
    device = batch["input_ids"].device
    with LiveTensorMeter(None if device.type == "cpu" else device) as meter:
        output, gradient = _forward(model, batch, loss=loss)
        kept = meter.live_bytes - (0 if gradient is None else gradient.nbytes)
        forward, host = meter.peak_bytes, meter.host_peak_bytes
        meter.reset_peak()
        if not loss:
            _give_head_gradients(base)
        output.backward(gradient)
        backward, host = meter.peak_bytes, max(host, meter.host_peak_bytes)
        del output, gradient
        gradients = tensor_bytes([p.grad for p in parameters if p.grad is not None])
        before = meter.live_bytes
        meter.reset_peak()
        optimizer.step()
        # What else is alive is not the update's: buffers that a first forward made.
        update = meter.peak_bytes - before + gradients
        made = meter.live_bytes - before
    optimizer.zero_grad(set_to_none=True)
    return StepBytes(weights, gradients, made, kept, forward, backward, update, host)
