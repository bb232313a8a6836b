"""A model of any size that takes no memory, ready to train: real shapes, no data.

Fake tensors say of themselves to be on the CPU, so that what each of torch's kernels allocates there is counted. Of our
own kernels, of attention and of dropout it can be what they allocate on a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils
from transformers.initialization import no_init_weights

from .. import ops
from ..comparison.rivals import Budget, Rival
from ..engine import tiles as engine_tiles
from ..engine.adapters import Adapter
from ..loss import chunks
from ..memory import shortening
from ..ops.adapter import api as adapter_api
from ..ops.coupling import api as coupling
from .quantised import Weights, quantise


class _OneFakeMode(FakeTensorMode):
    """PEFT copies task heads; a copied tensor would bring a copy of its mode, and two modes' tensors do not mix."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _OneFakeMode:
        return self


class _HealthyValues(TorchDispatchMode):
    """Answers what a program asks of values that are not there: as a step in which nothing goes wrong would.

    A truth is True (all tokens are real, which spares padded batches' dense mask; every stream came back equal), an
    integer 0 (no overflow flag; a seed), a float 1 (AdamW's count of steps).
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0
        return func(*args, **(kwargs or {}))


def _rand(*size: Any, **settings: Any) -> Any:
    """LayerDrop draws a number for each layer in training, and leaves out those below the config's share: none."""
    return 1.0 if size in ((), ([],), ((),)) and "size" not in settings else _plain_rand(*size, **settings)


def _set_data(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """In the place of ``swap_tensors``, by which ``module.to`` changes fake parameters, and which refuses most."""
    tensor.data = other


def _no_launch(kernel: Any, grid: Any) -> Any:
    return lambda *args, **kwargs: None


def _fused_input(adapter: Adapter, hidden_states: torch.Tensor) -> torch.Tensor | None:
    reason = ops.why_not_fused(hidden_states, adapter.weights, adapter.activation_name)
    return None if adapter.impl == "torch" or reason else hidden_states


def _use_triton(impl: str, *tensors: torch.Tensor | None, obstacle: str | None = None, what: str = "") -> bool:
    return impl != "torch" and obstacle is None and coupling.why_not_triton(*tensors) is None


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Flash attention drops out in its kernel; on a CPU torch would write all scores down instead."""
    return _plain_attention(query, key, value, attn_mask, 0.0, *args, **kwargs)


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """CUDA keeps a mask of a byte an element, a CPU one in the hidden states' dtype."""
    if inplace or not training or not p:
        return _plain_dropout(input, p, training, inplace)
    dropped: torch.Tensor = torch.native_dropout(input, p, training)[0]
    return dropped


_plain_attention, _plain_dropout, _plain_rand = F.scaled_dot_product_attention, F.dropout, torch.rand


@contextlib.contextmanager
def _kernels_of_a_gpu() -> Iterator[None]:
    """Torch's ops and ours allocate as on a GPU: our kernels' host code runs, and launches nothing."""
    from triton.runtime.jit import KernelInterface

    from ..ops.coupling import triton as kernels

    with contextlib.ExitStack() as stack:
        for place, name, value in (
            (F, "scaled_dot_product_attention", _attention),
            (F, "dropout", _dropout),
            (KernelInterface, "__getitem__", _no_launch),
            (kernels, "INTERPRETED", True),  # whose kernels take tensors that are not on a GPU
            (coupling, "use_triton", _use_triton),
            (Adapter, "fused_input", _fused_input),
            (chunks, "smallest_chunk", functools.partial(chunks.smallest_chunk, gpu=True)),
            (engine_tiles, "AUTO_ROWS", {}),  # of a CPU
            (adapter_api, "check_gradient", lambda *tensors: None),  # all fake tensors have the same address
        ):
            stack.enter_context(mock.patch.object(place, name, value))
        yield


@contextlib.contextmanager
def simulation(*, gpu: bool) -> Iterator[None]:
    """Inside, tensors are fake, and a training step runs on them as on real ones. Use from one thread at a time."""
    true_tracing = masking_utils.is_tracing

    def is_tracing(tensor: Any = None) -> bool:
        return bool(true_tracing())

    logger = logging.getLogger("meft_kernels")
    with contextlib.ExitStack() as stack:
        # Float streams' drift, say: nothing of it is news about memory.
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        # transformers makes dense masks when tensors are fake, because it dares not look at their values: here it may.
        stack.enter_context(mock.patch.object(masking_utils, "is_tracing", is_tracing))
        stack.enter_context(mock.patch.object(torch, "rand", _rand))
        stack.enter_context(mock.patch.object(torch.utils, "swap_tensors", _set_data))
        stack.enter_context(shortening())
        if gpu:
            stack.enter_context(_kernels_of_a_gpu())
        stack.enter_context(_OneFakeMode())
        stack.enter_context(_HealthyValues())
        yield


def auto_class(config: Any) -> Any:
    """The task that a config's model is most often fine-tuned for."""
    names = config.architectures or []
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    if any("CausalLM" in name or "LMHead" in name for name in names):
        return transformers.AutoModelForCausalLM
    if type(config) in transformers.AutoModelForSequenceClassification._model_mapping:
        return transformers.AutoModelForSequenceClassification
    raise ValueError(f"only models of texts are estimated, not {config.model_type}")


def build(config: Any, dtype: torch.dtype, model_class: Any = None) -> Any:
    """The model in train mode, on the device of the context; of a class of its own, or of the task's."""
    config = copy.deepcopy(config)
    config.use_cache = False
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)  # no layer is left out: the most that a step takes
    if model_class is not None:
        return model_class._from_config(config, dtype=dtype).train()
    return auto_class(config).from_config(config, dtype=dtype).train()


def twin(
    config: Any,
    dtype: torch.dtype,
    rival: Rival,
    budget: Budget,
    weights: Weights | None = None,
    model_class: Any = None,
) -> Any:
    """The model prepared by ``rival``; call inside of :func:`simulation`.

    Args:
        weights: how those of the layers' linear modules are stored; None: in ``dtype`` as the others.
        model_class: see :func:`build`.
    """
    return rival.prepare(bare_twin(config, dtype, weights, model_class), budget).train()


def bare_twin(config: Any, dtype: torch.dtype, weights: Weights | None = None, model_class: Any = None) -> Any:
    """The pretrained model alone."""
    with no_init_weights():
        model = build(config, dtype, model_class)
    model.tie_weights()  # which no_init_weights leaves out
    if weights is not None:
        quantise(model, weights)
    return model
