"""The host's part of a training step: microseconds and Python calls a layer, forward and backward.

    python -m benchmarks.host
    python -m benchmarks.host --models roberta --rounds 60 --kernels off --json benchmarks/results/host/cpu.json

A GPU waits for whoever launches its kernels. What that takes does not depend on the size of tensors, so it shows where
they are tiny and computing takes nothing. What a layer adds is the difference of two depths. All rivals take turns
within a round; times are processor time of the one thread that there is, medians over rounds, and ratios medians of
ratios within a round. Calls are all that Python makes, of functions of its own and in C, and do not depend on the
machine.

With kernels, ours goes as on a GPU: everything up to Triton's launch runs, the kernels are compiled, and the launch
itself does nothing. What such a step computes is meaningless, and what it costs is what the host's part costs there,
but for what torch does on CUDA alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, RobertaConfig

from meft_kernels import MeftConfig, ops
from meft_kernels.comparison.records import Record
from meft_kernels.comparison.rivals import RIVALS, Budget
from meft_kernels.comparison.timing import Times
from meft_kernels.programs.commands.shared import settings_of

DEPTHS = (2, 8)
VOCABULARY, WIDTH = 128, 64
BACKBONE = "backbone"
"""The frozen model by itself, its gradients going down to the embeddings."""
OURS = "meft"
DEFAULT = (OURS, "meft_lora", "lora_checkpointing", "lora", BACKBONE)
PLAIN_TORCH = "torch"
KERNELS = "kernels"


class Cost(NamedTuple):
    """Of one pass: seconds, and calls that Python made."""

    seconds: float
    calls: float


def roberta(layers: int) -> nn.Module:
    """RoBERTa's layers with their dropout, narrow."""
    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=64, num_labels=2, pad_token_id=1,
    )  # fmt: skip
    made: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return made


def llama(layers: int) -> nn.Module:
    """Llama's layers, narrow."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    made: nn.Module = AutoModelForCausalLM.from_config(config)
    return made


MODELS: dict[str, Callable[[int], nn.Module]] = {"roberta": roberta, "llama": llama}


def batch_for(model: nn.Module) -> dict[str, torch.Tensor]:
    """Two short texts."""
    ids = torch.randint(2, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    labels = ids if "CausalLM" in type(model).__name__ else torch.tensor([0, 1])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _backbone(model: Any) -> nn.Module:
    model.requires_grad_(False)
    model.enable_input_require_grads()
    made: nn.Module = model
    return made


def prepared(rival: str, base: nn.Module, config: MeftConfig) -> nn.Module:
    """A copy of the model as the rival trains it, with the settings behind its name."""
    name, _, settings = rival.partition(":")
    if name == BACKBONE:
        return _backbone(copy.deepcopy(base)).train()
    if name not in RIVALS:
        raise SystemExit(f"{name} is none of the rivals {', '.join(RIVALS)}, {BACKBONE}")
    config = config.changed(**settings_of(settings.split(",") if settings else None))
    budget = Budget.of(base, dataclasses.replace(config, impl="torch"))
    return RIVALS[name].prepare(copy.deepcopy(base), dataclasses.replace(budget, config=config)).train()


class Step:
    """A training step of one model, without an optimiser, forward and backward apart."""

    def __init__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
        self.model, self.batch = model, batch

    def run(self, watch: Callable[[Callable[[], Any]], Cost]) -> tuple[Cost, Cost]:
        """Costs of forward and backward."""
        found: list[torch.Tensor] = []
        forward = watch(lambda: found.append(self.model(**self.batch).loss))
        backward = watch(lambda: found[0].backward())
        self.model.zero_grad(set_to_none=True)
        return forward, backward


def timed(call: Callable[[], Any]) -> Cost:
    """Its seconds, of this thread: on the CPU backward runs in the thread that asks for it."""
    start = time.thread_time()
    call()
    return Cost(time.thread_time() - start, 0)


def counted(call: Callable[[], Any]) -> Cost:
    """The calls in it, of Python's functions and of those in C."""
    calls = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Cost(0, calls)


@contextlib.contextmanager
def launches_stubbed() -> Iterator[None]:
    """Triton's kernels are compiled for an H100 that is not there; a launch goes as far as the driver, and no further.

    Raises:
        SystemExit: Triton is not there, or was told to interpret.
    """
    try:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        from meft_kernels.ops.coupling import triton as kernels
    except ImportError as error:
        raise SystemExit(f"kernels need Triton ({error}): --kernels off") from error
    if kernels.INTERPRETED:
        raise SystemExit("kernels are interpreted (TRITON_INTERPRET), and are to be compiled here: unset it")

    class Utils:
        def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
            return 1, 2, 32, 0, 1024  # module, function, registers, spills, threads

        def unload_module(self, module: Any) -> None: ...

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None: ...

        def __call__(self, *_: Any) -> None: ...

    class Driver:
        utils, launcher_cls = Utils(), Launcher

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_device_interface(self) -> Any:
            return torch.cuda

    def no_checksum(stream: torch.Tensor, first_row: int = 0) -> torch.Tensor:
        return torch.zeros((), dtype=torch.int64)  # as of all streams that no kernel has summed up

    with (
        mock.patch.object(driver, "_active", Driver()),
        mock.patch.object(kernels, "INTERPRETED", True),
        mock.patch.object(ops, "checksum", no_checksum),
    ):
        yield


class Layer(NamedTuple):
    """What one layer costs a rival: microseconds and calls, forward and backward."""

    forward_us: float
    backward_us: float
    forward_calls: float
    backward_calls: float

    @property
    def us(self) -> float:
        return self.forward_us + self.backward_us

    @property
    def calls(self) -> float:
        return self.forward_calls + self.backward_calls


def _layer(costs: dict[int, tuple[Cost, Cost]]) -> Layer:
    """What a layer adds, from the costs at both depths."""
    (few, first), (many, second) = sorted(costs.items())
    layers = many - few
    forward, backward = (
        tuple((b - a) / layers for a, b in zip(x, y, strict=True)) for x, y in zip(first, second, strict=True)
    )
    return Layer(1e6 * forward[0], 1e6 * backward[0], forward[1], backward[1])


def measure(
    model: str, rivals: list[str], config: MeftConfig, rounds: int
) -> tuple[dict[str, Layer], dict[str, float]]:
    """Every rival's costs a layer, and the median over rounds of its time over that of LoRA + checkpointing."""
    steps: dict[str, dict[int, Step]] = {rival: {} for rival in rivals}
    for depth in DEPTHS:
        torch.manual_seed(0)
        base = MODELS[model](depth)
        for rival in rivals:
            steps[rival][depth] = Step(prepared(rival, base, config), batch_for(base))
    for each in steps.values():
        for step in each.values():
            for _ in range(3):  # calibration, compilation, what is found once
                step.run(timed)
    calls = {rival: _layer({depth: step.run(counted) for depth, step in each.items()}) for rival, each in steps.items()}
    found: dict[str, list[Layer]] = {rival: [] for rival in rivals}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for rival, each in steps.items():
                found[rival].append(_layer({depth: step.run(timed) for depth, step in each.items()}))
            gc.collect()
    finally:
        gc.enable()
    made = {
        rival: Layer(
            statistics.median(layer.forward_us for layer in layers),
            statistics.median(layer.backward_us for layer in layers),
            calls[rival].forward_calls,
            calls[rival].backward_calls,
        )
        for rival, layers in found.items()
    }
    times = Times({rival: [layer.us for layer in layers] for rival, layers in found.items()})
    return made, times.ratios("lora_checkpointing" if "lora_checkpointing" in found else rivals[0])


def run(models: list[str], rivals: list[str], kinds: list[str], rounds: int, rank: int) -> dict[str, Any]:
    """Print a table of each model, with kernels and without, and return their figures."""
    figures: dict[str, Any] = {}
    for kind in kinds:
        config = MeftConfig(rank=rank, impl="triton" if kind == KERNELS else "torch")
        with launches_stubbed() if kind == KERNELS else contextlib.nullcontext():
            for model in models:
                layers, ratios = measure(model, rivals, config, rounds)
                figures[f"{model}, {kind}"] = {
                    rival: {**layer._asdict(), "us": layer.us, "calls": layer.calls, "over": ratios[rival]}
                    for rival, layer in layers.items()
                }
                print(f"{model}, {kind}: a layer{'':<14} us (forward + backward)      calls   / checkpointing")
                for rival, layer in layers.items():
                    print(
                        f"  {rival:<28} {layer.us:8.0f} ({layer.forward_us:5.0f} + {layer.backward_us:5.0f}) "
                        f"{layer.calls:8.0f} ({layer.forward_calls:5.0f} + {layer.backward_calls:5.0f}) "
                        f"{ratios[rival]:6.2f}",
                        flush=True,
                    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rivals", nargs="+", default=list(DEFAULT), metavar="RIVAL")
    parser.add_argument("--kernels", choices=["on", "off", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {"on": [KERNELS], "off": [PLAIN_TORCH], "both": [KERNELS, PLAIN_TORCH]}[options.kernels]
    figures = run(options.models, options.rivals, kinds, options.rounds, options.rank)
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        Record.now("host", settings, figures, torch.device("cpu")).write(options.json)


if __name__ == "__main__":
    main()
