"""One layer made reversible: what its ``forward`` becomes, and its branches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from ..architectures import LayerSpec
from ..config import MeftConfig
from ..errors import UnsupportedModelError
from ..notices import warn_once
from .adapters import Adapter, FfnTap, FusedBranch
from .arguments import caches_in, without_cache
from .bound import BoundForward
from .boxes import Boxes, put_back
from .compiling import compiled_for, why_not_compiled
from .exporting import WHY_NOT_COMPILED, exporting, record
from .inventory import Inventories
from .pieces import AttentionInPieces, Seeds, why_whole
from .replay import seeded
from .surroundings import buffers_kept
from .tiles import WHOLE, Tile, auto_rows, cut
from .variants import Branch, Plan

logger = logging.getLogger(__name__)

_PACKAGE = __name__.split(".")[0] + "."

ADAPTERS = "meft"
"""Name of the submodule that holds a layer's adapters."""


class Stack(Protocol):
    """What a layer needs of the stack that it belongs to."""

    name: str
    spec: LayerSpec
    plan: Plan
    config: MeftConfig
    order: list[PatchedLayer]
    in_turn: bool

    @property
    def bypassed(self) -> bool:
        """Whether this thread calls the pretrained layers as they were."""

    def bypass(self, bypassed: bool = True) -> AbstractContextManager[None]:
        """Whether this thread does so, for a block."""

    def run(
        self, layer: PatchedLayer, hidden_states: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
        """The layer's part of a forward pass."""

    def abandon(self) -> None:
        """Forget the pass under way."""


class PatchedLayer(BoundForward):
    """Stands in for one layer's ``forward``."""

    def __init__(
        self,
        stack: Stack,
        module: nn.Module,
        index: int,
        adapter: Adapter | None,
        tap: FfnTap | None,
    ) -> None:
        super().__init__(module)
        self.stack = stack
        self.index = index
        self.name = f"{stack.name}.{index}"
        self.adapter = adapter
        self.tap = tap
        self._blocks_checked = False
        self._boxes = Boxes(stack.spec.boxes)
        self.inventories = Inventories()

    @property
    def spec(self) -> LayerSpec:
        return self.stack.spec

    @property
    def plan(self) -> Plan:
        return self.stack.plan

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters in this layer, by name: ``ffn`` and ``stream``, or none."""
        return {} if self.adapter is None or self.tap is None else {"ffn": self.tap.adapter, "stream": self.adapter}

    def hold(self, adapters: dict[str, Adapter]) -> None:
        """Put these in the place of those that the layer has."""
        assert self.tap is not None, "a layer patched without adapters has no place for one"
        getattr(self.module, ADAPTERS).update(adapters)
        self.adapter, self.tap.adapter = adapters["stream"], adapters["ffn"]

    @torch.compiler.disable(reason=WHY_NOT_COMPILED)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's call."""
        if self.stack.bypassed:
            return self.original(*args, **kwargs)
        if len(args) > len(self._parameters):
            raise TypeError(f"{self.name} got {len(args)} positional arguments, it takes {len(self._parameters)}")
        kwargs = self.by_name(args, kwargs)
        hidden_states = kwargs.pop(self._parameters[0])
        try:
            if self.tap is not None:
                self.tap.follow(self.spec.ffn_reads(self.module), self.spec.ffn_writes(self.module))
            boxes = self._boxes.open(kwargs)
            run = record if exporting() else self.stack.run
            hidden_states, extras = run(self, hidden_states, kwargs)
            extras = put_back(boxes, extras)
        except BaseException:
            self.stack.abandon()
            if self.tap is not None:
                self.tap.forget()
            raise
        return hidden_states if extras is None else (hidden_states, *extras)

    def check_blocks(self, hidden_states: torch.Tensor, kwargs: dict[str, Any], seed: int | None) -> None:
        """Before its blocks stand in for the layer for the first time, hold them against it, for all rows at once.

        Those of the families in this package are tested; a user's own are held to what they say.

        Raises:
            UnsupportedModelError: they are not the layer.
        """
        if self._blocks_checked:
            return
        blocks = self.spec.attention_block, self.spec.mlp_block
        if not all(block.__module__.startswith(_PACKAGE) for block in blocks):
            call = without_cache(kwargs)
            with torch.no_grad(), buffers_kept(self.module):
                with seeded(seed, hidden_states.device):
                    expected = self.original(hidden_states, **call)
                with seeded(seed, hidden_states.device):
                    same = self.blocks_give(expected, hidden_states, **call)
            if not same:
                raise UnsupportedModelError(
                    f"attention_block and mlp_block of {self.name}'s ArchitectureSpec, called one after the other, do "
                    "not compute what the layer does, so it cannot be run in tiles: mend them, say "
                    "in_turn=lambda config: False in its LayerSpec, or pass tile='off'"
                )
        self._blocks_checked = True

    def blocks_give(self, output: Any, *args: Any, **kwargs: Any) -> bool:
        """Whether the family's two blocks, called as the layer was, give the same bits and as many things as it did.

        True where they stand in for nothing, since the layer always runs whole.
        """
        if not self.stack.in_turn:
            return True
        call = without_cache(self.by_name(args, kwargs))
        attended, extras = _split(self.spec.attention_block(self.module, call.pop(self._parameters[0]), **call))
        rebuilt = self.spec.mlp_block(self.module, attended, **call)
        expected, expected_extras = _split(output)
        return torch.equal(rebuilt, expected) and len(extras or ()) == len(expected_extras or ())

    def has(self, branch: Branch) -> bool:
        return branch != "adapter" or self.adapter is not None

    def fused(self, branch: Branch, hidden_states: torch.Tensor) -> FusedBranch | None:
        """The branch for a kernel that couples as well; None where ``run`` must compute it."""
        if self.adapter is None or branch not in ("adapter", "residual_adapter"):
            return None
        return self.adapter.fused_branch(hidden_states, residual=branch == "residual_adapter")

    def tiles(self, branch: Branch, hidden_states: torch.Tensor) -> list[Tile]:
        """The rows at a time for which :meth:`rows` is to be called; one tile where :meth:`run` is."""
        rows = self.stack.config.tile
        if rows == "off":
            return WHOLE
        if branch == "layer" and not (self.stack.in_turn and self._instance_forward is None):
            return WHOLE  # its blocks are not all that it does
        if rows == "auto":
            return cut(hidden_states.shape, auto_rows(hidden_states.device))
        tiles = cut(hidden_states.shape, rows)
        if len(tiles) == 1 and rows > hidden_states.shape[:-1].numel():
            warn_once(logger, f"meft_kernels: tile={rows} has more rows than a batch, which is computed as one tile")
        return tiles

    def pieces(self, branch: Branch, kwargs: dict[str, Any], seeds: Seeds) -> AttentionInPieces | None:
        """The attention block in pieces, where that is wanted, and the layer's family says how and for this call."""
        family = self.spec.attention_pieces
        if self.stack.config.attention != "pieces" or family is None or not self.mixes(branch):
            return None
        if caches_in(kwargs) and not (self.module.training and torch.is_grad_enabled()):
            return None  # it is to be filled; in training nobody reads it
        call = without_cache(kwargs)
        if not family.applies(self.module, call):
            return None
        if (reason := why_whole(family, self.module, call)) is not None:
            warn_once(logger, f"meft_kernels: attention of {self.stack.name} runs whole: {reason}")
            return None
        return AttentionInPieces(family, self.module, call, seeds)

    def mixes(self, branch: Branch) -> bool:
        """Whether the branch begins with a part that no tile can compute for itself."""
        return branch in ("layer", "attention")

    def run(
        self, branch: Branch, hidden_states: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
        """Compute one branch; see :data:`meft_kernels.engine.variants.Branch`.

        Returns:
            Its hidden states, and what else the layer returns if this branch is what makes it (attention weights, T5's
            position biases): None where that is hidden states alone, and not a tuple with nothing else in it.
        """
        if branch == "layer":
            return self._mixed(self.original, hidden_states, kwargs)
        extras: tuple[Any, ...] | None = None
        if self.mixes(branch):
            hidden_states, extras = self.mix(hidden_states, kwargs)
        return self.rows(branch, hidden_states, kwargs), extras

    def mix(self, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
        """What the branch begins with: the layer's attention block; and what else the layer returns."""
        return self._mixed(self.spec.attention_block, hidden_states, kwargs)

    def _mixed(
        self, function: Callable[..., Any], hidden_states: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
        """What a function of the layer returns; what it wrote into boxes comes last."""
        if not self._boxes.names:
            return _split(self._call(function, hidden_states, kwargs))
        closed = self._boxes.closed(kwargs)
        hidden_states, extras = _split(self._call(function, hidden_states, closed))
        return hidden_states, (*(extras or ()), (extras is None, self._boxes.written(kwargs, closed)))

    def rows(self, branch: Branch, hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """The rest of the branch, which computes every row for itself."""
        if branch in ("layer", "mlp"):
            return self._call(self.spec.mlp_block, hidden_states, self._boxes.closed(kwargs))
        if self.adapter is None:
            return hidden_states if branch != "adapter" else torch.zeros_like(hidden_states)
        adapted = self.adapter(hidden_states)
        return adapted if branch == "adapter" else hidden_states + adapted

    def with_adapters(self) -> AbstractContextManager[None]:
        """For a block, what a recompute finds: a pass has its adapters, wherever its backward runs."""
        return self.stack.bypass(False) if self.stack.bypassed else nullcontext()

    def _call(self, function: Callable[..., Any], hidden_states: torch.Tensor, kwargs: dict[str, Any]) -> Any:
        """A piece of the pretrained layer, compiled if that was asked for.

        Only where gradients are recorded, on which forward and recompute agree, and without a KV cache, whose length
        changes with every token and would have it compiled again and again.
        """
        whole = function == self.original
        arguments = (hidden_states,) if whole else (self.module, hidden_states)
        if not self.stack.config.compile_layers or not torch.is_grad_enabled() or caches_in(kwargs):
            return function(*arguments, **kwargs)
        reason = why_not_compiled(self.module, replaced=whole and self._instance_forward is not None)
        if not whole and not self.spec.blocks_compile:
            reason = "its blocks are its layers with parts left out, as they were found"
        if reason is not None:
            warn_once(logger, f"meft_kernels: {self.stack.name} runs uncompiled: {reason}")
            return function(*arguments, **kwargs)
        plain = type(self.module).forward if whole else function
        return compiled_for(self.stack, plain)(self.module, hidden_states, **kwargs)


def _split(output: Any) -> tuple[torch.Tensor, tuple[Any, ...] | None]:
    return (output[0], tuple(output[1:])) if isinstance(output, tuple | list) else (output, None)
