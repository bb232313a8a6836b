"""Cross-entropy from hidden states, chunk of rows by chunk of rows, with its gradients made in forward.

A loop around the head's own forward, and not ``F.linear_cross_entropy`` (torch 2.13), which takes plain weights alone
and knows no soft cap: 2,048 x 576 rows, 49,152 words, two CPU cores, in chunks of 512 rows, it took 0.82 times whole
logits' time in float32 and this 0.71, in bfloat16 2.3 and 1.1, with a loss that is off by 4e-3 and here by 7e-6
(``python -m benchmarks.loss``). One float32 buffer holds a chunk's logits, then their exponentials, then their
gradient.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import get_gradient_edge

from ..engine.graph import gradients_of
from ..memory import shortened
from .head_call import HeadCall, refuse_second_order

Reduction = Literal["mean", "sum", "none"]

_SCALED_AT_ONCE = 1 << 22
"""Elements of a 16-bit gradient that are in float32 at one time."""


LEAST_ROWS = 128
"""Below it a CPU is busy with reading the weights again: 1.06 times whole logits' time with 128 rows in float32,
1.7 with 64, 2.2 with 32 (``benchmarks.loss``). No device is asked for less."""


def smallest_chunk(device: torch.device, vocabulary: int, *, gpu: bool | None = None) -> int:
    """Rows of a chunk below which time is lost.

    A product reads all weights for each chunk: a fast GPU's takes 170 operations a byte read, and so many rows in 16
    bits; small vocabularies must make up for the launches, some twenty a chunk, with 2^24 logits.
    """
    if gpu or (gpu is None and device.type != "cpu"):
        return max(2 * LEAST_ROWS, (1 << 24) // vocabulary)
    return max(LEAST_ROWS, (1 << 20) // vocabulary)


def chunk_rows(rows: int, width: int, vocabulary: int, device: torch.device, *, trained: bool) -> int:
    """How many rows of logits may exist at a time.

    The bound: what a chunk has alive is 8 bytes a logit at most (float32 beside a 16-bit gradient), so that with
    ``rows * width / (4 * vocabulary)`` rows it is no more than the hidden states take in 16 bits. Not less than
    ``smallest_chunk``; and where the head's weights have gradients, of ``vocabulary * width`` elements, so many rows
    that a chunk's logits are a quarter of that, since each chunk adds to all of them.
    """
    wanted = max(rows * width // (4 * vocabulary), smallest_chunk(device, vocabulary), width // 4 if trained else 0)
    return -(-wanted // 16) * 16


def check_labels(labels: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    """One question to the device for a whole batch.

    Raises:
        IndexError: as torch does it on a CPU; a GPU's kernel would end the process' context, or count on.
    """
    inside = (labels == ignore_index) | ((labels >= 0) & (labels < vocabulary))
    if not inside.all():
        wrong = labels[~inside]
        raise IndexError(
            f"label {int(wrong[0])} is outside of the vocabulary of {vocabulary} ({len(wrong)} such labels): they are "
            f"0 to {vocabulary - 1}, or {ignore_index} for positions without loss"
        )


def _leaves_output_alone(call: HeadCall) -> bool:
    """Whether nobody needs the logits any more once they are there, so that they may be written over.

    A plain linear map keeps its input and not its output; of the operations tanh keeps its own.
    """
    if call.operations:
        return not getattr(call.operations[-1], "keeps_output", False)
    return type(call.head.module) is torch.nn.Linear


def _chunk(
    call: HeadCall,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    counted: torch.Tensor,
    smoothing: float,
    needed: tuple[bool, ...],
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Losses [n] of rows [n, H] with labels [n], and the gradients of their sum: hidden's, then the parameters'.

    Rows that are not ``counted`` [n] have loss and gradient 0, whatever their label.
    """
    recorded = any(needed)
    with torch.set_grad_enabled(recorded):
        leaf = hidden.detach().requires_grad_(needed[0])
        logits = call.compute(leaf)
    wide = torch.promote_types(logits.dtype, torch.float32)
    values = logits.detach().to(wide)
    if recorded and wide == logits.dtype and not _leaves_output_alone(call):
        values = values.clone()
    narrow, edge = logits.dtype, get_gradient_edge(logits) if recorded else None
    del logits
    picked = labels[:, None]
    values.sub_(values.amax(-1, keepdim=True))
    likely = values.gather(1, picked)
    if smoothing:
        likely = (1 - smoothing) * likely + smoothing * values.mean(-1, keepdim=True)
    total = values.exp_().sum(-1, keepdim=True)
    uncounted, share = ~counted[:, None], counted[:, None].to(wide)
    losses = (total.log() - likely).masked_fill_(uncounted, 0).squeeze(1)
    if edge is None:
        return losses, ()
    values.div_(total.masked_fill_(uncounted, math.inf))
    if smoothing:
        values.sub_(share * (smoothing / values.shape[-1]))
    values.scatter_(1, picked, values.gather(1, picked).sub_(share * (1 - smoothing)))
    inputs = [tensor for tensor, need in zip((leaf, *call.head.parameters), needed, strict=True) if need]
    found = iter(gradients_of([edge], inputs, [values.to(narrow)]))
    return losses, tuple(next(found) if need else None for need in needed)


def _scaled(gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``gradient * scale``, rounded once.

    torch would round ``scale`` to 16 bits first, and 1 / 100,000 tokens is nothing in float16.
    """
    if gradient.dtype == scale.dtype:
        return gradient * scale
    result = torch.empty_like(gradient)
    rows = max(1, _SCALED_AT_ONCE // max(1, gradient[:1].numel()))
    for start in shortened(range(0, len(gradient), rows)):
        part = slice(start, start + rows)
        result[part] = gradient[part].to(scale.dtype) * (scale if scale.ndim == 0 else scale[part])
    return result


_FEW = 7 / 8
"""Where no more of the rows than this have a label (a masked model's, an answer's), the others are left out."""


class ChunkedCrossEntropy(torch.autograd.Function):
    """``F.cross_entropy(call's logits, labels)``: its value in float32, rounded to ``dtype``.

    Kept for backward are the gradients of the losses' *sum*, in the inputs' dtypes (of parameters in float32): what
    backward brings, one over the number of tokens and a GradScaler's factor, is multiplied in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: HeadCall,
        labels: torch.Tensor,
        ignore_index: int,
        reduction: Reduction,
        smoothing: float,
        rows: int,
        dtype: torch.dtype,
        recorded: bool,
        hidden: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        """Args: hidden [N, H]; labels [N], int64; rows of a chunk. Returns a scalar, or [N] for ``"none"``."""
        needed = tuple(recorded and need for need in ctx.needs_input_grad[8:])
        wide = torch.promote_types(dtype, torch.float32)
        counted = labels != ignore_index
        chosen: torch.Tensor | None = None
        if not isinstance(labels, FakeTensor):  # whose labels nobody knows
            check_labels(labels, call.sample.shape[-1], ignore_index)
            chosen = counted.nonzero().squeeze(1)
            if len(chosen) > _FEW * len(labels):
                chosen = None
        safe = labels.masked_fill(~counted, 0)
        losses = torch.zeros(len(labels), dtype=wide, device=hidden.device)
        found: list[torch.Tensor | None] = [None] * len(needed)
        if needed[0]:
            found[0] = torch.empty_like(hidden) if chosen is None else torch.zeros_like(hidden)
        todo = len(labels) if chosen is None else len(chosen)
        if not todo:
            found[1:] = [torch.zeros_like(p) if need else None for p, need in zip(parameters, needed[1:], strict=True)]
        for start in shortened(range(0, todo, rows)):
            part: Any = slice(start, start + rows)
            if chosen is not None:
                part = chosen[part]
            losses[part], gradients = _chunk(call, hidden[part], safe[part], counted[part], smoothing, needed)
            for index, gradient in enumerate(gradients):
                if gradient is None:
                    continue
                if index == 0:
                    found[0][part] = gradient  # type: ignore[index]
                elif found[index] is None:
                    found[index] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                else:
                    found[index].add_(gradient)  # type: ignore[union-attr]
        count = counted.sum()
        ctx.mean = reduction == "mean"
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        ctx.save_for_backward(count, *found)
        if reduction == "none":
            return losses.to(dtype)
        total = losses.sum()
        return (total / count if ctx.mean else total).to(dtype)

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[Any, ...]:
        """The stored gradients times that of the loss; they stay as they are, for a backward that keeps the graph."""
        refuse_second_order()
        count, gradient, *others = ctx.saved_tensors
        scale = d_loss.to(torch.promote_types(d_loss.dtype, torch.float32))
        if ctx.mean:
            scale = scale / count.clamp(min=1)  # without any label the loss is NaN, and its gradient zero: as torch's
        d_hidden = None
        if gradient is not None:
            d_hidden = _scaled(gradient, scale[:, None] if scale.ndim else scale)
        d_parameters = [
            None if other is None else _scaled(other, scale).to(dtype)
            for other, dtype in zip(others, ctx.dtypes, strict=True)
        ]
        return (*[None] * 8, d_hidden, *d_parameters)
