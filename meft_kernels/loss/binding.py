"""The head's ``forward`` bound on the instance, so that any model's own loss is computed without logits."""

from __future__ import annotations

import copy
import logging
import weakref
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp import FSDPModule

from ..config import MeftConfig
from ..engine.bound import BoundForward
from ..errors import PatchError, UnsupportedModelError
from ..notices import warn_once
from ..patching.state import unwrap
from . import answers as _answers  # noqa: F401 - fills the table of lazy logits
from .chunks import LEAST_ROWS, chunk_rows
from .head_call import HeadCall
from .lazy import LazyLogits

logger = logging.getLogger(__name__)


class BoundHead(BoundForward):
    """Stands in for the ``forward`` of a language model's head.

    Nothing else of the model changes: its own forward gets lazy logits, does with them what it does, and hands them to
    its own loss.
    """

    def __init__(self, module: nn.Module, rows: int | None, model: nn.Module) -> None:
        super().__init__(module)
        self.rows = rows
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)

    @property
    def model(self) -> nn.Module | None:
        """The model around the head; None if it is gone, or unknown since this was pickled."""
        return None if self._model is None else self._model()

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundHead:
        """The model's copy is the copy's model. A head is copied alone, too, and must not take its model along."""
        copied = copy.copy(self)
        memo[id(self)] = copied
        copied.module = copy.deepcopy(self.module, memo)
        copied._instance_forward = copy.deepcopy(self._instance_forward, memo)
        if (model := self.model) is not None:
            copied._model = weakref.ref(memo.get(id(model), model))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Lazy logits [..., V] of hidden states [..., H]; real ones where a chunk would hold them all."""
        if len(args) != 1 or kwargs or not self._may_wait(args[0]):
            return self.original(*args, **kwargs)
        hidden = args[0]
        width = hidden.shape[-1]
        count = hidden.numel() // width
        if count <= (self.rows or LEAST_ROWS):
            return self.original(hidden)
        try:
            call = HeadCall.begin(self.module, self.original, hidden)
        except Exception as error:  # of any quantised head's kernels; what is wrong with the rows as well shows now
            warn_once(logger, f"meft_kernels: logits are made whole, since the head takes no rows of none: {error}")
            return self.original(hidden)
        rows = self.rows or chunk_rows(
            count, width, call.sample.shape[-1], hidden.device, trained=call.recorded and bool(call.head.parameters)
        )
        return self.original(hidden) if count <= rows else LazyLogits.of(call, self.rows)

    def _may_wait(self, hidden: Any) -> bool:
        """Whether the head can be called later as well as now."""
        compiled = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if compiled or torch._C._are_functorch_transforms_active():
            return False
        plain = type(hidden) is torch.Tensor or isinstance(hidden, FakeTensor)
        if not plain or hidden.ndim < 2 or not hidden.is_floating_point() or not hidden.numel():
            return False
        if isinstance(self.model, FSDPModule) and not torch.is_grad_enabled():
            return False  # accelerate takes the weights apart after forward, and evaluations read logits
        if isinstance(self.module, FSDPModule) or hasattr(self.module, "_hf_hook"):
            warn_once(
                logger,
                "meft_kernels: the head's weights are there only while it is called (fully_shard of the head alone, or "
                "accelerate's offloading), so that its logits are made whole: shard the head with the model around it",
            )
            return False
        return True


def find_head(model: Any) -> nn.Module | None:
    """The module that makes logits of hidden states; None where the model has no such head."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    return head if isinstance(head, nn.Module) else None


def require_head(model: Any) -> nn.Module:
    """The same, where there must be one.

    Raises:
        UnsupportedModelError: there is none.
    """
    head = find_head(model)
    if head is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no head over a vocabulary (get_output_embeddings() gives none): there are no "
            'logits to do without. Take loss="auto", which leaves such models alone'
        )
    return head


def is_bound(head: nn.Module) -> bool:
    """Whether the head's loss is computed in chunks already."""
    return isinstance(vars(head).get("forward"), BoundHead)


def head_for(model: Any, config: MeftConfig) -> nn.Module | None:
    """The head to bind with these settings, or None.

    Raises:
        UnsupportedModelError: the settings ask for one that is not there.
    """
    if config.loss == "full":
        return None
    head = require_head(model) if config.loss == "chunked" else find_head(model)
    return None if head is None or is_bound(head) else head


class LossBinding:
    """Binds it on a model's head. Made by :func:`bind_loss`."""

    def __init__(self, model: nn.Module, head: nn.Module, rows: int | None) -> None:
        self._bound = BoundHead(head, rows, model)
        self._bound.bind()

    def remove(self, model: nn.Module) -> None:
        """Give the head its own forward back, also where another adapter's head has taken its place."""
        for module in (self._bound.module, find_head(unwrap(model))):
            bound = None if module is None else vars(module).get("forward")
            if isinstance(bound, BoundHead):
                bound.unbind()


def bind_loss(model: nn.Module, *, rows: int | None = None) -> LossBinding:
    """Have a language model compute its loss without its logits ever being whole; nothing of how it is called changes.

    For any transformers model with a head over a vocabulary, causal, masked or encoder-decoder, patched or not: loss
    and gradients are the same up to rounding, and ``output.logits`` is computed when it is first read. :func:`patch`
    does this by itself.

    Args:
        model: the model, wrapped by PEFT or not. Wrap first: what PEFT puts around the head is then seen.
        rows: of hidden states whose logits exist at one time; None chooses (:func:`~.chunks.chunk_rows`).

    Returns:
        What was bound; ``remove(model)`` undoes it.

    Raises:
        UnsupportedModelError: the model has no such head.
        PatchError: it was done before.
        ValueError: ``rows`` is no positive integer.
    """
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
        raise ValueError(f"rows must be an integer >= 1, or None, got {rows!r}")
    base = unwrap(model)
    head = require_head(base)
    if is_bound(head):
        raise PatchError("the loss of this model is computed in chunks already: remove that binding first")
    return LossBinding(base, head, rows)
