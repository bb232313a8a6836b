"""The bottleneck adapter, and the tap that puts one parallel to a layer's FFN."""

from __future__ import annotations

import logging
import threading
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import ACT2FN

from .. import ops
from ..errors import ReversibleUsageError
from ..fixed_point import Impl
from ..modules import Parts, has_hooks, hooked, modules_of
from ..notices import warn_once
from ..ops import AdapterWeights
from .exporting import exporting

logger = logging.getLogger(__name__)


class FusedBranch(NamedTuple):
    """An adapter's call that a fused kernel makes; arguments of ``ops.adapter_couple`` and its inverse."""

    x: torch.Tensor
    weights: AdapterWeights
    activation: str
    residual: bool
    dropout: float
    seed: int | None = None


class Projection(nn.Module):
    """A linear map whose weights may be wider than its input, to whose dtype they are cast at use.

    No ``nn.Linear``, on purpose: what goes through a model and puts something else in the place of every linear layer
    (quantisation, a LoRA on "all-linear") means the pretrained ones, and would stop these from training.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        linear = nn.Linear(in_features, out_features, device=device, dtype=dtype)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Adapter(nn.Module):
    """Projection(H, rank), activation, dropout, Projection(rank, H); no skip, no scale (the paper's section 3.1).

    The weights may be wider than the hidden states (float32 beside a bfloat16 model, so that small updates are not
    rounded away); the cast costs rank/rows of the product itself.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        activation: str,
        dropout: float,
        *,
        down_init_std: float,
        up_init_std: float,
        impl: Impl = "auto",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.impl = impl
        self._parts = Parts()
        self.activation_name = activation
        self.down = Projection(hidden_size, rank, device=device, dtype=dtype)
        self.activation = ACT2FN[activation]
        self.dropout = nn.Dropout(dropout)
        self.up = Projection(rank, hidden_size, device=device, dtype=dtype)
        # Both are made before either is drawn, so that a seed gives the adapters that it has given in every version.
        for projection, std in ((self.down, down_init_std), (self.up, up_init_std)):
            nn.init.normal_(projection.weight, std=std) if std else nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` to ``[..., H]``, in the input's dtype (autocast's, where it is on)."""
        x = self.fused_input(hidden_states)
        if x is not None:
            return ops.adapter_forward(x, self.weights, self.activation_name, dropout=self.live_dropout, impl=self.impl)
        bottleneck = self.activation(self.down(hidden_states))
        if self.dropout.training:  # where one token at a time is generated, calls that do nothing count
            bottleneck = self.dropout(bottleneck)
        made: torch.Tensor = self.up(bottleneck)
        return made

    def add_to(self, residual: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """``residual + self(hidden_states)``, in the dtype of ``residual``."""
        x = self.fused_input(hidden_states)
        if x is None or x.dtype != residual.dtype or x.shape != residual.shape:
            return residual + self(hidden_states).to(residual.dtype)
        return ops.parallel_adapter(
            x, residual, self.weights, self.activation_name, dropout=self.live_dropout, impl=self.impl
        )

    @property
    def weights(self) -> AdapterWeights:
        """The parameters as the functional ops take them."""
        down, up = self._modules["down"], self._modules["up"]
        assert down is not None and up is not None
        try:  # as a rule that is where they are, and ``__getattr__`` of a module takes its time
            held, others = down._parameters, up._parameters
            return AdapterWeights(held["weight"], held["bias"], others["weight"], others["bias"])  # type: ignore[arg-type]
        except KeyError:
            return AdapterWeights(down.weight, down.bias, up.weight, up.bias)  # type: ignore[arg-type]

    @property
    def live_dropout(self) -> float:
        """Probability of dropout now; 0 in eval mode."""
        dropout: Any = self._modules["dropout"]
        return dropout.p if dropout.training else 0.0

    def fused_input(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The hidden states in the dtype that this call computes in, for the fused kernels; None if torch is to run.

        ``impl="auto"`` on CUDA takes the kernels, or warns once why it does not.

        Raises:
            RuntimeError: ``impl="triton"``, and the kernels cannot serve this call.
        """
        if self.impl == "torch" or (self.impl == "auto" and hidden_states.device.type != "cuda") or exporting():
            return None
        x = hidden_states
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        reason = self._why_not_fused() or ops.why_not_fused(x, self.weights, self.activation_name)
        if reason is None:
            return x
        if self.impl == "triton":
            raise RuntimeError(f"impl='triton' cannot run an adapter: {reason}; use impl='auto' or impl='torch'")
        warn_once(logger, f"meft_kernels: adapters run in plain torch instead of Triton: {reason}")
        return None

    def fused_branch(self, hidden_states: torch.Tensor, *, residual: bool) -> FusedBranch | None:
        """This call as the branch of a coupling step, ``hidden_states + self(hidden_states)`` with ``residual``.

        None where torch is to run; see :meth:`fused_input`. The seed of dropout is left to the caller.
        """
        x = self.fused_input(hidden_states)
        if x is None or (residual and x.dtype != hidden_states.dtype):  # autocast adds in the wider dtype
            return None
        return FusedBranch(x.detach(), self.weights, self.activation_name, residual, self.live_dropout)

    def _why_not_fused(self) -> str | None:
        """What of this module the kernels would pass by."""
        tracing = torch.compiler.is_compiling()  # which takes neither what is kept nor loops in C
        if any(map(has_hooks, modules_of(self))) if tracing else hooked(self._parts.of(self)):
            name = next(name for name, part in self.named_modules() if has_hooks(part))
            return f"hooks are registered on {name or 'the adapter'}"
        weights = self.weights
        for name, weight in (("down", weights.down), ("up", weights.up)):
            part = self._modules[name]
            if type(part) is not Projection or type(weight) not in (nn.Parameter, torch.Tensor):
                kind = type(getattr(part, "weight", None)).__name__
                return f"{name} is {type(part).__name__} with a weight of type {kind}"
        return None


class Switch(Protocol):
    """Tells whether the adapters are in force; see ``ReversibleStack``."""

    @property
    def bypassed(self) -> bool:
        """Whether they are left out in this thread."""


_TAPPING = threading.Lock()


class _Read(threading.local):
    """What an FFN has read and not yet written to, by thread; ``torch.compile`` traces it."""

    hidden_states: torch.Tensor | None = None


class FfnTap:
    """Adds ``adapter(x)`` to what the FFN gives, x being what the FFN reads.

    Two forward hooks, because in post-norm layers the FFN's two linears sit in different modules. Bound methods of a
    plain object rather than closures, so that ``copy.deepcopy`` of a patched model taps the copy.
    """

    def __init__(self, adapter: Adapter, switch: Switch) -> None:
        self.adapter = adapter
        self._switch = switch
        self._pending = _Read()
        self._tapped: tuple[nn.Module, nn.Module] | None = None
        self._handles: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        # For copy.deepcopy and pickle, which threading.local does not take.
        return {name: value for name, value in self.__dict__.items() if name != "_pending"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _pending=_Read())

    def follow(self, reads: nn.Module, writes: nn.Module) -> None:
        """Tap these modules, if they are not those tapped already: PEFT puts others in their place when it merges."""
        if self._taps(reads, writes):
            return
        with _TAPPING:
            if self._taps(reads, writes):
                return  # another thread was first
            self.remove()
            self._handles = [
                reads.register_forward_pre_hook(self._read, with_kwargs=True),
                writes.register_forward_hook(self._write),
            ]
            self._tapped = reads, writes

    def _taps(self, reads: nn.Module, writes: nn.Module) -> bool:
        tapped = self._tapped
        return tapped is not None and tapped[0] is reads and tapped[1] is writes

    def remove(self) -> None:
        """Take both hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._tapped = [], None
        self.forget()

    def forget(self) -> None:
        """Drop what was read and not written, because a module in between failed."""
        self._pending.hidden_states = None

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._switch.bypassed:
            self._pending.hidden_states = args[0] if args else next(iter(kwargs.values()))

    def _write(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden_states = self._pending.hidden_states
        if hidden_states is None:
            return None
        self._pending.hidden_states = None
        written, *rest = output if isinstance(output, tuple) else (output,)  # a router's choice may come along
        if written.shape != hidden_states.shape:
            raise ReversibleUsageError(
                f"the FFN read hidden states of shape {tuple(hidden_states.shape)} and gave {tuple(written.shape)}: "
                "the family's ffn_reads and ffn_writes do not tap the same call"
            )
        written = self.adapter.add_to(written, hidden_states)
        return (written, *rest) if isinstance(output, tuple) else written
