"""What ``generate`` costs with adapters in the model: time over that of the bare model, prefill and decode.

    python -m benchmarks.generate
    python -m benchmarks.generate --rows 1 8 --new 64 --rounds 5 --json benchmarks/results/generate/cpu.json

The bare model, MEFT's adapters (patched, with the default inference path and with ``inference='exact'``), and PEFT
LoRA of as many parameters, unmerged, write the same number of tokens from the same prompt, greedily, with a static
cache, in turns. Prefill is what one new token takes, decode what each further one does. Adapters have random weights,
so that they do something. Texts of both ways to run a patched model are compared, and their logits along the text.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from pathlib import Path
from typing import Any

import torch

import meft_kernels
from benchmarks.real import real_batch, real_model
from meft_kernels import MeftConfig
from meft_kernels.comparison.records import Record
from meft_kernels.comparison.rivals import RIVALS, Budget
from meft_kernels.comparison.timing import Times, interleaved

BARE, OURS, EXACT, LORA = "bare", "meft", "meft exact", "lora"
STD = 0.01
"""Of the weights that would start at zero."""


def prepared(base: Any, names: list[str], seed: int = 0) -> dict[str, Any]:
    """The models, in eval mode; both of ours have the same weights."""
    budget = Budget.of(base, MeftConfig())
    models: dict[str, Any] = {}
    for name in names:
        model = copy.deepcopy(base)
        torch.manual_seed(seed)
        if name in (OURS, EXACT):
            model = meft_kernels.patch(model, inference="exact" if name == EXACT else "float", up_init_std=STD)
        elif name == LORA:
            model = RIVALS["lora"].prepare(model, budget)
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    torch.nn.init.normal_(parameter, std=STD)
        models[name] = model.eval()
    return models


def write(model: Any, ids: torch.Tensor, tokens: int, **options: Any) -> Any:
    """Exactly so many new tokens."""
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
        min_new_tokens=tokens, pad_token_id=0, cache_implementation="static", **options,
    )  # fmt: skip


def agreement(models: dict[str, Any], ids: torch.Tensor, tokens: int) -> dict[str, Any]:
    """The text and the logits of the default path beside those of the exact one."""
    options = {"return_dict_in_generate": True, "output_logits": True}
    outs = {name: write(models[name], ids, tokens, **options) for name in (OURS, EXACT)}
    ours, exact = (torch.stack(outs[name].logits).double() for name in (OURS, EXACT))
    return {
        "same_text": torch.equal(outs[OURS].sequences, outs[EXACT].sequences),
        "logits_off": float((ours - exact).norm() / exact.norm()),
    }


def run(models: dict[str, Any], ids: torch.Tensor, new: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Interleaved times of one batch."""
    steps = {
        f"{name} {tokens}": functools.partial(write, model, ids, tokens)
        for name, model in models.items()
        for tokens in (1, new)
    }
    seconds = interleaved(steps, rounds=rounds, device=device).seconds
    rows = ids.shape[0]
    figures: dict[str, Any] = {}
    for name in models:
        whole, first = seconds[f"{name} {new}"], seconds[f"{name} 1"]
        decode = [(a - b) / (new - 1) for a, b in zip(whole, first, strict=True)]
        figures[name] = {"seconds": whole, "prefill": first, "decode": decode}
    for what in ("seconds", "prefill", "decode"):
        for name, ratio in Times({name: mine[what] for name, mine in figures.items()}).ratios(BARE).items():
            figures[name][f"{what}_over"] = ratio
    for name, mine in figures.items():
        mine["prefill_tokens_per_second"] = ids.numel() / statistics.median(mine["prefill"])
        mine["decode_tokens_per_second"] = rows / statistics.median(mine["decode"])
        print(
            f"{rows} x {ids.shape[1]} + {new} {name:<12} {statistics.median(mine['seconds']):7.3f} s, "
            f"{mine['seconds_over']:.3f} times the bare model's; prefill {mine['prefill_over']:.3f} "
            f"({mine['prefill_tokens_per_second']:.0f} tokens/s), decode {mine['decode_over']:.3f} "
            f"({mine['decode_tokens_per_second']:.1f} tokens/s)",
            flush=True,
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, or a hub id or path of a causal language model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rivals", nargs="+", default=[OURS, EXACT, LORA], choices=[OURS, EXACT, LORA])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base: Any = real_model(options.model, getattr(torch, options.dtype)).to(device)
    models = prepared(base, [BARE, *options.rivals])
    figures: dict[str, Any] = {}
    for rows in options.rows:
        ids = real_batch(options.model, rows, options.prompt)["input_ids"].to(device)
        figures[str(rows)] = run(models, ids, options.new, options.rounds, device)
        if {OURS, EXACT} <= models.keys():
            found = agreement(models, ids, options.new)
            figures[str(rows)] |= {"agreement": found}
            print(f"same text as the exact path: {found['same_text']}; logits off by {found['logits_off']:.1e}")
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key != "json"}
        Record.now("generate", settings, figures, device).write(options.json)


if __name__ == "__main__":
    main()
