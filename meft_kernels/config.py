"""What can be chosen: one frozen dataclass, and the paper's settings as presets."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from .fixed_point import MAX_FRACTION_BITS, Impl, reciprocal

Variant = Literal["meft1", "meft2", "meft3"]
Arithmetic = Literal["exact", "float"]
Coupling = Literal["centered", "paper"]
Engine = Literal["reversible", "autograd"]
Readout = Literal["state", "mean"]
Adapters = Literal["all", "none"]
Loss = Literal["auto", "chunked", "full"]
Inference = Literal["float", "exact"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "variant": ("meft1", "meft2", "meft3"),
    "arithmetic": ("exact", "float"),
    "coupling": ("centered", "paper"),
    "engine": ("reversible", "autograd"),
    "readout": ("state", "mean"),
    "adapters": ("all", "none"),
    "loss": ("auto", "chunked", "full"),
    "inference": ("float", "exact"),
    "adapter_dtype": ("float32", "model"),
    "impl": ("auto", "torch", "triton"),
    "attention": ("auto", "whole", "pieces"),
    "remainders": ("device", "host"),
    "check": ("end", "layer"),
}

# (lam, beta) of the paper, section 3.3.
_PAPER_COEFFICIENTS = {"meft1": (0.1, 1.0), "meft2": (1.0, 0.1), "meft3": (0.1, 0.1)}

# Ours: a bare adapter's lane stays at 1, where nothing is lost and no remainder is stored; that of a whole layer has
# -1/256, so that its remainder is a byte. The error of the start is proportional to it: at -1/8 (3 bits) patching moved
# the loss of Gemma-3-270M by 0.18 nats, and MiniLM's last hidden states by 25 %; benchmarks/results/start_loss.md has
# the figures. meft3 leaks in both lanes, half a layer's update in each: -1/64 (6 bits) gives it a like start.
_CENTERED_COEFFICIENTS = {"meft1": (-1 / 256, 1.0), "meft2": (1.0, -1 / 256), "meft3": (-1 / 64, -1 / 64)}
# Float streams keep no remainder, and their inverse amplifies rounding by 1/coefficient in each layer.
_CENTERED_FLOAT_COEFFICIENTS = {"meft1": (-1 / 8, 1.0), "meft2": (1.0, -1 / 8), "meft3": (-1 / 8, -1 / 8)}


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold; JSON has integers without end, NaN and Infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def option(default: Any, text: str) -> Any:
    """A dataclass field with a default and a help text."""
    return field(default=default, metadata={"help": text})


# What people who come from PEFT try first; by their letters they are like other settings, or none.
_OF_A_LORA = {
    "r": "the width of the adapters is rank",
    "lora_r": "the width of the adapters is rank",
    "lora_alpha": "these adapters have a rank and no scale",
    "lora_dropout": "that of the adapters is dropout",
    "target_modules": "every patched layer gets adapters; stacks says which lists of layers are patched",
}


def no_setting(name: Any, known: Iterable[str]) -> str:
    """What to tell of a name that is no setting: the nearest that is, and all of them."""
    known = sorted(known)
    if "rank" in known and "adapters" in known and name in _OF_A_LORA:
        return (
            f"there is no setting {name!r}: {_OF_A_LORA[name]}. To train a LoRA, put it into the model with PEFT and "
            "call reversible(model)"
        )
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f": did you mean {near[0]}?" if near else "."
    return f"there is no setting {name!r}{hint} Known are {', '.join(known)}"


@dataclass(frozen=True, kw_only=True)
class MeftConfig:
    """Settings of :func:`meft_kernels.patch`.

    The defaults are exact, centered, and start from the pretrained model's outputs. The paper's own settings are
    :meth:`paper`. ``None`` means "decided from the variant or from the model".

    Raises:
        ValueError: a setting out of range, or one that exact arithmetic cannot hold (the message names the nearest).
    """

    # meft2 because its bare adapter moves the state itself; meft1's moves the other stream, of which only the leak
    # reaches the state (78.8 against 81.2 % on MiniLM and Rotten Tomatoes after 150 steps, at 1/8).
    variant: Variant = option("meft2", "which of the paper's three couplings (section 3.3)")
    rank: int = option(64, "bottleneck width of every adapter")
    lam: float | None = option(None, "coefficient of the first lane; +-1/q, q integer, in exact arithmetic")
    beta: float | None = option(None, "coefficient of the second lane")
    arithmetic: Arithmetic = option("exact", "'exact': int32 streams, rebuilt bit for bit; 'float': the paper's")
    coupling: Coupling = option("centered", "'centered': y1 = F(x2) + lam*(x1-x2); 'paper': y1 = F(x2) + lam*x1")
    engine: Engine = option("reversible", "'autograd' keeps all activations: for debugging, and as the oracle")
    readout: Readout = option("state", "'state': the stream with the model's state; 'mean': (x1+x2)/2")
    fraction_bits: int | None = option(None, "k of the fixed point; None: calibrated on the first batch")
    adapters: Adapters = option("all", "'none': insert none, train what already is trainable (a PEFT LoRA, say)")
    activation: str | None = option(None, "activation of the adapters; None: the backbone's")
    dropout: float | None = option(None, "dropout of the adapters; None: the backbone's")
    down_init_std: float = option(0.02, "std of the normal initialisation of the down-projections")
    up_init_std: float = option(0.0, "the same for the up-projections; 0 keeps the pretrained model's start")
    adapter_dtype: Literal["float32", "model"] = option(
        "float32", "dtype of the adapter weights, or 'model'; the arithmetic is done in the model's dtype either way"
    )
    modules_to_save: tuple[str, ...] | None = option(
        None, "modules trained and saved whole beside the adapters; None: the task head, if it is a new one"
    )
    stacks: tuple[str, ...] | None = option(
        None,
        "which lists of layers are patched: their names, names of modules around them, or patterns (vision towers, "
        "only the encoder); None: the language model's, of a model that is all of a kind all",
    )
    frozen_layers: int = option(0, "layers at the bottom left untouched")
    reversible_layers: int | None = option(
        None, "how many of the patched layers drop their activations, from the bottom; the rest keep them"
    )
    tile: int | Literal["auto", "off"] = option(
        "auto",
        "rows of hidden states for which a layer's position-wise parts are computed at a time; 'auto': as few "
        "as keep matrix products efficient on the device; 'off': all",
    )
    attention: Literal["auto", "whole", "pieces"] = option(
        "auto",
        "'pieces': projections by tiles, attention by groups of heads, the projections computed once more in "
        "backward; 'auto': whole",
    )
    lean_norms: bool = option(True, "norms written in plain torch keep their input and not float32 copies of it")
    inplace_gradients: bool = option(True, "gradients of the streams are accumulated into, not copied, layer by layer")
    remainders: Literal["device", "host"] = option(
        "device", "where what the inverse needs waits between forward and backward; 'host': in pinned host memory"
    )
    check: Literal["end", "layer"] = option(
        "end",
        "when rebuilt streams are compared with the forward's: 'end' of backward, at one transfer from the device; "
        "'layer': before a layer's gradients are handed on, at one a layer (for optimizers that step inside backward)",
    )
    compile_layers: bool = option(False, "run the pretrained layers under torch.compile, in forward as in backward")
    loss: Loss = option(
        "auto",
        "'chunked': a language model's loss without whole logits; 'full': with; 'auto': chunked where there is a head",
    )
    loss_rows: int | None = option(None, "rows whose logits exist at one time; None: chosen from the shape")
    inference: Inference = option(
        "float",
        "eval mode without gradients: 'float': the same two streams in floating point, which nobody undoes; 'exact': "
        "the very bits of training",
    )
    impl: Impl = option(
        "auto", "implementation of the coupling and adapter ops; 'auto': Triton on CUDA, torch elsewhere"
    )

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {getattr(self, name)!r}")
        self._check_names("modules_to_save")
        self._check_names("stacks")
        if self.stacks == ():
            raise ValueError("stacks names what is to be patched: () would be nothing")
        if not isinstance(self.activation, str | None):
            raise ValueError(f"activation is the name of one, not {self.activation!r}")
        self._check_integer("rank", 1)
        self._check_integer("frozen_layers", 0)
        if self.reversible_layers is not None:
            self._check_integer("reversible_layers", 0)
        if self.loss_rows is not None:
            self._check_integer("loss_rows", 1)
            if self.loss == "full":
                raise ValueError("loss_rows belongs to loss='auto' or 'chunked': with loss='full' all logits exist")
        if self.fraction_bits is not None:
            self._check_integer("fraction_bits", 0)
            if self.fraction_bits > MAX_FRACTION_BITS:
                raise ValueError(f"fraction_bits must be in [0, {MAX_FRACTION_BITS}], got {self.fraction_bits}")
            if self.arithmetic == "float":
                raise ValueError("fraction_bits belongs to arithmetic='exact'")
        if self.check == "layer" and self.arithmetic == "float":
            raise ValueError("check='layer' belongs to arithmetic='exact': float streams only come close")
        if self.dropout is not None and not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        for name in ("down_init_std", "up_init_std"):
            if not (_is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)!r}")
        for name in ("compile_layers", "lean_norms", "inplace_gradients"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.tile not in ("auto", "off"):
            if isinstance(self.tile, str):
                raise ValueError(f"tile is a number of rows, 'auto' or 'off', not {self.tile!r}")
            self._check_integer("tile", 1)
        for name, coefficient in zip(("lam", "beta"), self.coefficients, strict=True):
            if not _is_number(coefficient) or coefficient == 0:
                raise ValueError(f"{name} must be a finite number other than 0, got {coefficient!r}")
            if self.arithmetic == "exact":
                try:
                    reciprocal(coefficient)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None

    def _check_names(self, setting: str) -> None:
        value = getattr(self, setting)
        if isinstance(value, str):
            raise ValueError(f"{setting} is a tuple of names; for one write ({value!r},)")
        if isinstance(value, list):  # from JSON
            object.__setattr__(self, setting, value := tuple(value))
        names = () if value is None else value
        if not isinstance(names, tuple) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"{setting} is a tuple of modules' names, not {value!r}")

    def _check_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")

    @property
    def coefficients(self) -> tuple[float, float]:
        """(lambda, beta), the variant's own where none was given."""
        table = _PAPER_COEFFICIENTS
        if self.coupling == "centered":
            table = _CENTERED_COEFFICIENTS if self.arithmetic == "exact" else _CENTERED_FLOAT_COEFFICIENTS
        lam, beta = table[self.variant]
        return (lam if self.lam is None else self.lam, beta if self.beta is None else self.beta)

    @classmethod
    def paper(cls, variant: Variant = "meft1", **overrides: Any) -> MeftConfig:
        """The paper's settings (sections 3.3, 4.1): float streams, lambda or beta 0.1, mean read-out, N(0, 0.02^2)."""
        settings: dict[str, Any] = {
            "variant": variant,
            "arithmetic": "float",
            "coupling": "paper",
            "readout": "mean",
            "rank": 8,
            "down_init_std": 0.02,
            "up_init_std": 0.02,
        }
        return cls(**settings).changed(**overrides)

    def changed(self, **settings: Any) -> MeftConfig:
        """A copy with these settings.

        Raises:
            TypeError: a name is no setting.
            ValueError: a value is not valid.
        """
        known = [f.name for f in dataclasses.fields(self)]
        for name in settings:
            if name not in known:
                raise TypeError(no_setting(name, known))
        return dataclasses.replace(self, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> MeftConfig:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: a name that is no setting, or a value that is not valid.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**settings)
