"""The spec of a model that nobody wrote a family file for, found in its structure and proven on the model itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from ...errors import UnsupportedModelError
from ...modules import owner_of
from ..selection import choose, is_meant, unmet
from ..spec import ArchitectureSpec
from .alike import Unproven, kinds_of
from .batch import made_up
from .blocks import Kind, kind_of
from .chains import Chain, NoChain, find_chains, layer_lists
from .config import HEADS, activation_of, dropout_of, layerdrop_of
from .layers import Constant, FoundLayers
from .proof import Gradients, gradients_at, prove, prove_cut
from .saved import Differs, taken_up
from .taps import Tap, ends_in_norm, find_tap, leading_to
from .trace import Call, Trace, trace
from .untouched import untouched

if TYPE_CHECKING:
    from ...config import MeftConfig


@dataclass(frozen=True, kw_only=True)
class FoundArchitecture(ArchitectureSpec):
    """All that was found of one model."""

    refused: Mapping[str, str] = field(default_factory=dict)
    """Lists of layers that stay as they are, and why."""
    line: str = ""
    """What was found, in one line."""


@dataclass(frozen=True)
class _Objection:
    """What of the settings the layers found cannot serve."""

    layers: tuple[FoundLayers, ...]

    def __call__(self, config: Any, settings: MeftConfig) -> str | None:
        whole = [layers.list_name for layers in self.layers if not layers.apart]
        if settings.variant == "meft3" and whole:
            return (
                f"meft3 couples the MLP block after the attention block, and layers of {whole[0]} could not be taken "
                "apart: pass variant='meft1' or 'meft2'"
            )
        untapped = [layers.list_name for layers in self.layers if not layers.tapped]
        if settings.adapters == "all" and untapped:
            return (
                f"no FFN was found in {untapped[0]} for the adapter beside it: pass adapters='none', with a LoRA inside"
            )
        return None


def find(
    model: Any,
    *,
    frozen_layers: int = 0,
    batch: Mapping[str, Any] | None = None,
    wanted: tuple[str, ...] | None = None,
    saved: Sequence[FoundLayers] = (),
) -> FoundArchitecture:
    """Look for a model's layers, and hold what is found to one forward and backward of a few tokens.

    The model is afterwards as it was before.

    Args:
        model: a transformers model.
        frozen_layers: layers at the bottom of every list of which nothing is asked.
        batch: keyword arguments of its forward to look at it with; made up by default.
        wanted: names of lists, or of modules around them, or patterns; by default those of the language model.
        saved: what was found when an adapter was saved; the model is held to it, and no other list is taken.

    Raises:
        UnsupportedModelError: nothing was found that holds, or not what was saved; says why, and where.
        ValueError: there is no list of a name that is wanted; names those there are.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    refuse_unreadable(model, kind)
    candidates = layer_lists(model)
    if not candidates:
        raise unsupported(
            kind, ["it holds no nn.ModuleList: layers in a dict or in attributes of their own are not found"]
        )
    if saved:
        wanted = tuple(each.list_name for each in saved)
    with torch.inference_mode(False), torch.enable_grad(), untouched(model):
        model.eval()
        found: dict[str, FoundLayers] = {}
        names: list[str] = []
        reasons: dict[str, str] = {}
        for lists in candidates:
            try:
                seen = _seen(model, kind, lists, batch)
            except UnsupportedModelError:
                if saved and batch is None:
                    break  # nothing is seen of it
                raise
            chains, refused = find_chains(lists, seen, frozen_layers)
            chosen = _language_model(model, chains, refused) if wanted is None else _named(chains, wanted)
            if batch is None and not saved:
                _refuse_unseen(model, kind, chosen)
            found |= _all_proven(model, chosen, seen, frozen_layers, refused)
            names += [chain.name for chain in chains]
            reasons |= refused
            if chosen and (wanted is None or not unmet(names, wanted)):
                reasons = refused
                break
    refused = {name: reason for name, reason in reasons.items() if name not in found}
    if saved:
        layers = _as_saved(model, kind, saved, found, refused, frozen_layers)
    else:
        layers = tuple(found.values())
        if wanted is not None and unmet(found, wanted):
            _refuse_unnamed(kind, [*names, *refused], refused, wanted, made_up=batch is None)
    if not layers:
        raise unsupported(kind, [f"{name}: {reason}" for name, reason in refused.items()])
    return _architecture(model, kind, layers, refused)


def _all_proven(
    model: Any, chains: list[Chain], seen: Trace, first: int, refused: dict[str, str]
) -> dict[str, FoundLayers]:
    """The lists of which all holds; of the others ``refused`` says why."""
    found: dict[str, FoundLayers] = {}
    kinds: dict[str, list[list[Call]]] = {}
    for chain in chains:
        try:
            kinds[chain.name] = _kinds(chain, seen, first)
        except (Unproven, NoChain) as reason:
            refused[chain.name] = str(reason)
    gradients = gradients_at([alike[-1] for of_list in kinds.values() for alike in of_list], seen.output)
    for chain in chains:
        if chain.name not in kinds:
            continue
        try:
            found[chain.name] = _proven(model, chain, seen, kinds[chain.name], gradients)
        except (Unproven, NoChain) as reason:
            refused[chain.name] = str(reason)
    return found


def _named(chains: list[Chain], wanted: tuple[str, ...]) -> list[Chain]:
    return [chain for chain in chains if any(is_meant(chain.name, each) for each in wanted)]


def _refuse_unnamed(
    kind: str, names: list[str], refused: dict[str, str], wanted: tuple[str, ...], *, made_up: bool
) -> None:
    """Lists that are wanted and do not serve, or are not there."""
    meant = choose(list(dict.fromkeys(names)), wanted)
    uncalled = made_up and any("not called" in refused.get(name, "") for name in meant)
    hint = " by made-up texts: pass probe=batch, one that goes through them" if uncalled else ""
    raise unsupported(kind, [f"{name}: {refused[name]}{hint}" for name in meant if name in refused])


def _as_saved(
    model: nn.Module,
    kind: str,
    saved: Sequence[FoundLayers],
    found: dict[str, FoundLayers],
    refused: dict[str, str],
    first: int,
) -> tuple[FoundLayers, ...]:
    try:
        for name in [each.list_name for each in saved if each.list_name in refused]:
            if "not called" not in refused[name]:
                raise Differs(f"{name}: {refused[name]}")
        return tuple(taken_up(model, each, found.get(each.list_name), first) for each in saved)
    except Differs as reason:
        raise UnsupportedModelError(
            f"{type(model).__name__} ({kind}) is not the model that was looked at when the adapter was saved: {reason}"
        ) from None


def _language_model(model: Any, chains: list[Chain], refused: dict[str, str]) -> list[Chain]:
    """Of a model of several towers, the language model's stacks; of one that is all of a kind, all.

    None where the language model's own do not serve.
    """
    try:
        text = model.config.get_text_config()
    except (AttributeError, ValueError):  # several texts: an encoder and a decoder
        return chains

    def is_text(name: str) -> bool:
        return getattr(owner_of(model, name), "config", None) is text

    inside = [chain for chain in chains if is_text(chain.name)]
    return inside if inside or any(map(is_text, refused)) else chains


def _refuse_unseen(model: nn.Module, kind: str, chains: list[Chain]) -> None:
    """What made-up texts do not show: states that go in between layers where there are images."""
    for chain in chains:
        arguments = inspect.signature(type(owner_of(model, chain.name)).forward).parameters
        if (name := next((name for name in arguments if "deepstack" in name), None)) is not None:
            raise unsupported(
                kind,
                [
                    f"{chain.name}: with images, states are injected between layers ({name}); which, is seen with "
                    "probe=batch, one with images"
                ],
            )


def unsupported(kind: str, reasons: Iterable[str]) -> UnsupportedModelError:
    """The error for a model of which too little could be proven."""
    reasons = list(reasons)
    more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
    return UnsupportedModelError(
        f"model type {kind!r} has no family file, and its structure does not serve: {'; '.join(reasons[:3])}{more}. A "
        "family of your own is made known with meft_kernels.register_architecture; README.md beside "
        "meft_kernels/architectures says how"
    )


def refuse_unreadable(model: nn.Module, kind: str) -> None:
    """A model that cannot be run to look at it."""
    for name, parameter in model.named_parameters():
        what = "without data" if parameter.is_meta or isinstance(parameter, FakeTensor) else None
        what = "distributed (DTensor)" if isinstance(parameter, DTensor) else what
        what = "partitioned by DeepSpeed ZeRO-3" if hasattr(parameter, "ds_id") else what
        if what is not None:
            raise unsupported(kind, [f"it must be run to be looked at, and its weight {name} is {what}"])


def _seen(model: Any, kind: str, lists: dict[str, nn.ModuleList], batch: Mapping[str, Any] | None) -> Trace:
    """A forward of the first batch that the model takes."""
    if batch is not None:
        cached = "use_cache" in inspect.signature(model.forward).parameters
        return trace(model, {**batch, **({"use_cache": False} if cached else {})}, lists)
    errors = []
    for inputs in made_up(model):
        try:
            return trace(model, inputs, lists)
        except Exception as error:  # whatever a model's own code says to inputs that it does not take
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0][:200])
    what = f" ({errors[0]})" if errors else ""
    raise unsupported(
        kind, [f"it could not be called on made-up inputs{what}: pass probe=batch, arguments of its forward"]
    )


def _kinds(chain: Chain, seen: Trace, first: int) -> list[list[Call]]:
    """One list's layers, from the first that is to be patched on, by kind."""
    if len(chain.layers) <= first:
        raise NoChain(f"frozen_layers={first} leaves none of its {len(chain.layers)} layers")
    chain.read_between |= chain.caller in seen.asked
    return kinds_of(chain.calls[first:], seen)


def _proven(model: nn.Module, chain: Chain, seen: Trace, kinds: list[list[Call]], gradients: Gradients) -> FoundLayers:
    """The spec of one list's layers, one of each kind held to what it seems to be."""
    if all(gradients.get(id(call.entered)) is None for call in (alike[-1] for alike in kinds)):
        raise Unproven("no gradient goes from the model's outputs to its layers (they run under no_grad?)")
    taps: dict[Kind, Tap] = {}
    attention: dict[Kind, Any] = {}
    mlp: dict[Kind, Any] = {}
    apart = True
    post_norm = ends_in_norm(chain.calls[-1], _once(seen, chain.calls[-1]))
    for call in (alike[-1] for alike in kinds):
        prove(call, gradients)
        parts = sorted(_once(seen, call), key=lambda part: part.start)
        tap = find_tap(leading_to(call, parts), chain.width) or Tap("", "")
        cut = prove_cut(call, parts, tap, post_norm=post_norm) if apart else None
        kind = kind_of(call.module)
        if taps.setdefault(kind, tap) != tap:
            raise NoChain(f"layers of {chain.name} have the same parts, and their FFNs are not in the same place")
        if cut is None:
            apart = False
        else:  # where layers of a kind differ, no cut is that of the kind
            apart = attention.setdefault(kind, cut[0]) == cut[0] and mlp.setdefault(kind, cut[1]) == cut[1]
    config = getattr(owner_of(model, chain.name), "config", None)
    return FoundLayers.of(
        taps,
        attention,
        mlp,
        apart=apart,
        constants={
            "post_norm": post_norm,
            "layerdrop": layerdrop_of(config, chain.name),
            "activation": activation_of(config),
            "dropout": dropout_of(config),
            "hidden_size": chain.width,
            "begins": chain.begins,
        },
        layer_class=tuple({type(layer).__name__: None for layer in chain.layers}),
        read_between=chain.read_between,
        boxes=chain.boxes,
        list_name=chain.name,
        order=chain.order,
        owner_name=next(name for name, module in model.named_modules() if id(module) == chain.caller),
    )


def _once(seen: Trace, call: Any) -> list[Any]:
    return [part for part in seen.parts[id(call.module)] if call.contains(part)]


def _architecture(model: Any, kind: str, layers: tuple[FoundLayers, ...], refused: dict[str, str]) -> FoundArchitecture:
    base = getattr(model, "base_model", model)
    lines = "; ".join(map(_line, layers))
    aside = "".join(
        f"; {name} stays as it is: {reason}" for name, reason in refused.items() if "not called" not in reason
    )
    return FoundArchitecture(
        model_types=(kind,),
        layers=layers,
        activation=layers[0].activation or Constant("gelu"),
        dropout=layers[0].dropout or Constant(0.0),
        hidden_size=layers[0].hidden_size,
        head_modules=("pooler",) if isinstance(getattr(base, "pooler", None), nn.Module) else (),
        extra_heads=tuple(name for name in HEADS if name in model._modules),
        objection=_Objection(layers),
        refused=refused,
        line=f"found in {type(model).__name__} ({kind}), no family file: {lines}{aside}",
    )


def _line(found: FoundLayers) -> str:
    taps: list[Tap] = list(dict.fromkeys(found.ffn_reads.taps.values.values()))  # type: ignore[attr-defined]
    ends = [tap.reads if tap.reads == tap.writes else f"{tap.reads} to {tap.writes}" for tap in taps if tap.writes]
    count, begins = max(found.order) + 1, found.begins(None)
    runs = f" in {len(begins) + 1} runs" if begins else ""
    runs = f" in {len(found.order)} calls" if len(found.order) > count else runs
    return (
        f"{found.list_name}, {count} {' and '.join(found.class_names)}{runs}, H = {found.hidden_size(None)}, "
        f"FFN {' or '.join(ends) or 'not found'}, {'in two blocks' if found.apart else 'whole'}"
        + (", read between layers" if found.read_between else "")
    )
