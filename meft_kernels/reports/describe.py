"""What a patched model is made of, for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..engine.stack import ReversibleStack
from ..fixed_point import reciprocal
from ..ops.coupling.packing import remainder_bits
from ..patching.state import count_parameters, require_state, unwrap

if TYPE_CHECKING:
    from ..planning import Plan


@dataclass(frozen=True)
class StackDescription:
    """One list of layers."""

    name: str
    """Qualified name of the list in the model; of one of several runs through it, with its layers, as a slice."""
    layers: int
    """Frozen ones, and calls of patched ones in a pass: as many as there are, where none is called several times."""
    frozen_layers: int
    reversible_layers: int
    fraction_bits: int | None
    """None for float streams, and before the first batch has calibrated it."""
    bits_per_element: int
    """Bits that each reversible layer keeps of each element of the hidden states (packed remainders)."""
    bytes_per_token_and_layer: float
    bytes_per_token: float
    """All reversible layers' remainders and the two streams; not the activations of the other layers."""

    shared: int | None = None
    """How many patched layers there are, where a pass calls them several times."""

    @property
    def shared_by(self) -> str:
        """Who the layers are, where one is called several times."""
        return "" if self.shared is None else f" (calls of {self.shared} shared)"

    @property
    def plain_layers(self) -> int:
        """Patched layers that keep their activations."""
        return self.layers - self.frozen_layers - self.reversible_layers


@dataclass(frozen=True)
class Description:
    """What :func:`describe` returns; ``str()`` gives a table."""

    model: str
    variant: str
    arithmetic: str
    coupling: str
    engine: str
    lam: float
    beta: float
    rank: int | None
    """Of the active adapter; None where there is none."""
    adapters: tuple[str, ...]
    """Names, the active one first."""
    trainable_parameters: int
    all_parameters: int
    stacks: tuple[StackDescription, ...]
    plan: Plan | None = None
    """How the settings were chosen, where :func:`~meft_kernels.patch` was given a budget."""

    def __str__(self) -> str:
        active, *others = self.adapters or ("none",)
        rows = [
            ("model", self.model),
            ("variant", f"{self.variant}, lam {self.lam:g}, beta {self.beta:g}"),
            ("arithmetic", f"{self.arithmetic}, {self.coupling} coupling"),
            ("engine", self.engine),
            ("adapters", "none" if self.rank is None else ", ".join([f"{active} (rank {self.rank})", *others])),
            ("trainable", f"{self.trainable_parameters:,} of {self.all_parameters:,} parameters"),
        ]
        if self.plan is not None:
            rows.append(("budget", self.plan.line()))
        for stack in self.stacks:
            fixed = (
                ""
                if self.arithmetic == "float"
                else f", fraction_bits {'not calibrated yet' if stack.fraction_bits is None else stack.fraction_bits}"
            )
            rows += [
                (
                    stack.name,
                    f"{stack.layers} layers{stack.shared_by}: {stack.frozen_layers} frozen, "
                    f"{stack.reversible_layers} reversible{fixed}",
                ),
                (
                    "  kept per layer",
                    f"{stack.bytes_per_token_and_layer:,.0f} bytes per token, {stack.bits_per_element} bits an element",
                ),
                (
                    "  kept in all",
                    f"{stack.bytes_per_token:,.0f} bytes per token, the two streams included"
                    + (f", and all activations of {stack.plain_layers} layers" if stack.plain_layers else ""),
                ),
            ]
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {text}" for label, text in rows)


def describe(model: nn.Module) -> Description:
    """What :func:`~meft_kernels.patch` made of the model, and what it keeps between forward and backward.

    Raises:
        PatchError: the model is not patched.
    """
    state = require_state(model)
    config = state.config
    base = unwrap(model)
    trainable, total = count_parameters(model)
    lam, beta = config.coefficients
    return Description(
        model=type(base).__name__,
        variant=config.variant,
        arithmetic=config.arithmetic,
        coupling=config.coupling,
        engine=config.engine,
        lam=lam,
        beta=beta,
        rank=config.rank if config.adapters == "all" else None,
        adapters=state.adapter_names if config.adapters == "all" else (),
        trainable_parameters=trainable,
        all_parameters=total,
        stacks=tuple(_describe_stack(stack, base.dtype.itemsize) for stack in state.stacks),
        plan=state.plan,
    )


def _describe_stack(stack: ReversibleStack, itemsize: int) -> StackDescription:
    exact = stack.config.arithmetic == "exact"
    bits = 0
    if exact:
        bits = sum(remainder_bits(reciprocal(lane.coefficient)[0]) for lane in (stack.plan.first, stack.plan.second))
    reversible = stack.reversible_end - stack.first
    per_layer = -(-stack.hidden_size // 8) * bits
    streams = 2 * stack.hidden_size * (4 if exact else itemsize)
    return StackDescription(
        name=stack.label,
        layers=stack.frozen + len(stack.order),
        frozen_layers=stack.frozen,
        reversible_layers=reversible,
        fraction_bits=stack.arithmetic.fraction_bits if stack.arithmetic is not None else None,
        bits_per_element=bits,
        bytes_per_token_and_layer=per_layer,
        bytes_per_token=per_layer * reversible + streams,
        shared=len(stack.layers) if len(stack.layers) < len(stack.order) else None,
    )


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the number of trainable parameters, in the words that PEFT's users know."""
    trainable, total = count_parameters(model)  # a wrapper's own among them, such as a soft prompt
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")
