"""A LoRA trained in reversible layers, taken out again: what is it worth in the plain model?

    python -m benchmarks.lora_evidence                       # every cell that is not there yet: hours on a CPU
    python -m benchmarks.lora_evidence --cases minilm:rotten_tomatoes --seeds 0
    python -m benchmarks.lora_evidence --stored              # measures nothing, prints the table
    python -m benchmarks.lora_evidence --quick --out lora-quick

The same PEFT LoRA (r = 16, all linear layers), the same seeds and batches, AdamW at the same rate; trained by PEFT
alone with gradient checkpointing, and reversibly at several coefficients. What was trained reversibly is scored as it
was trained, in the plain PEFT model after ``unpatch``, and merged by PEFT; and how far ``unpatch`` moves the logits,
before training and after. Dropout is off: no two ways of running a model draw alike.

``moved`` is a yardstick and no method: PEFT alone, LoRA's A moved by 1 % of itself at the start, about as much as the
default coefficient moves the hidden states of MiniLM. What differs by no more than that differs by chance.

One JSON file a cell, so that a sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import meft_kernels
from benchmarks.lora_tables import KIND, METHODS, table
from meft_kernels.comparison.cases import CASES, Case
from meft_kernels.comparison.labelled import Split
from meft_kernels.comparison.loop import train
from meft_kernels.comparison.recipes import Recipe
from meft_kernels.comparison.records import Record, read_all
from meft_kernels.comparison.rivals.lora import linear_layers
from meft_kernels.comparison.rivals.lora_checkpointing import checkpoint
from meft_kernels.comparison.runs import is_done
from meft_kernels.comparison.tasks import LanguageTask, Task
from meft_kernels.comparison.texts import batch_indices
from meft_kernels.packages import require

CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parent / "results" / "lora"
RANK = 16
MOVED_BY = 0.01
SAMPLE = {False: 64, True: 8}
"""Texts on which logits are compared, by whether every token of a text has some."""


def recipe_of(task: Task) -> Recipe:
    """Long enough that scores mean something, and short enough for a CPU."""
    sizes: dict[str, Any]
    if isinstance(task, LanguageTask):
        sizes = {"steps": 60, "batch_size": 4, "max_length": 64, "held_out": 64, "lora_lr": 5e-4}
    elif task.causal:
        sizes = {"steps": 50, "batch_size": 8, "max_length": 64, "held_out": 256, "lora_lr": 5e-4}
    else:
        sizes = {"steps": 200, "batch_size": 16, "max_length": 64, "held_out": 1024, "lora_lr": 1e-3}
    return Recipe(lr=0.0, rank=RANK, **sizes)


def settings_of(case: Case, recipe: Recipe, method: str, seed: int) -> dict[str, Any]:
    """Of one cell; they decide what is measured."""
    sizes = dataclasses.asdict(recipe)
    for unused in ("lr", "meft"):
        del sizes[unused]
    return {"case": str(case), **sizes, "method": method, "config": METHODS[method].config, "seed": seed}


def build(base: nn.Module, method: str, seed: int) -> Any:
    """A PEFT model around a copy of ``base``, with the seed's LoRA; reversible, or with checkpointing."""
    peft = require("peft")
    model: Any = copy.deepcopy(base)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM" if model.get_output_embeddings() is not None else "SEQ_CLS",
        target_modules=list(linear_layers(model)),
        r=RANK,
        lora_alpha=2 * RANK,
    )
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, config)
    if method == "moved":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.add_(torch.randn_like(parameter) * parameter.std() * MOVED_BY)
    settings = METHODS[method].config
    if settings is None:
        checkpoint(model)
        return model
    return meft_kernels.patch(model, adapters="none", **settings)


@functools.lru_cache(maxsize=1)
def base_of(task: Task, head: int | None) -> nn.Module:
    """The pretrained model without dropout, with the new head of a seed; None where there is no head to draw."""
    model = task.load(dtype=torch.float32, device=CPU, seed=head)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def scored(task: Task, model: nn.Module, split: Split) -> dict[str, Any]:
    """The score, its standard error from the number of texts, and what it is made of, text by text."""
    options: dict[str, Any] = {"batch_size": 16 if task.causal else 64, "device": CPU}
    if isinstance(task, LanguageTask):
        losses = task.losses(model, split, **options)
        total, tokens = losses.sum(0).tolist()
        error = float((losses[:, 0] - losses[:, 1] * total / tokens).square().sum().sqrt()) / tokens
        return {"score": total / tokens, "error": error, "texts": [[round(a, 5), int(b)] for a, b in losses.tolist()]}
    right = (task.predicted(model, split, **options) == torch.tensor(split.labels)).double()
    share = float(right.mean())
    error = 100 * (share * (1 - share) / len(right)) ** 0.5
    return {"score": 100 * share, "error": error, "texts": "".join(str(int(each)) for each in right)}


def logits_of(task: Task, model: nn.Module, split: Split) -> torch.Tensor:
    """``[rows, classes or words]`` of the first held-out texts, in eval mode: a row a text, or a token of one."""
    language = isinstance(task, LanguageTask)
    batch = task.batch(split, list(range(min(SAMPLE[language], len(split)))), CPU)
    training = model.training
    with torch.no_grad():
        logits = model.eval()(**batch).logits + 0
    model.train(training)
    if language:
        return logits[batch["attention_mask"].bool()].double()
    return (logits[:, -2] if task.causal else logits).double()


def distance(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """How far logits have moved: relative to their own size, as a divergence in nats, and by what is preferred."""
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return {
        "relative": float((after - before).norm() / before.norm()),
        "divergence": float((p.exp() * (p - q)).sum(-1).mean()),
        "agree": float((before.argmax(-1) == after.argmax(-1)).double().mean()),
    }


def measure(case: Case, task: Task, recipe: Recipe, method: str, seed: int) -> dict[str, Any]:
    """One cell: trained, scored, taken out, scored again."""
    texts = case.texts(recipe, None, seed)
    batches = batch_indices(texts.train.texts, batch_size=recipe.batch_size, steps=recipe.steps, seed=seed)
    base = base_of(task, None if task.causal else seed)
    model = build(base, method, seed)
    reversible = METHODS[method].config is not None
    figures: dict[str, Any] = {
        "higher_is_better": task.higher_is_better,
        "unit": "%" if task.higher_is_better else "nats",
    }
    if reversible:
        figures["moved_before"] = distance(
            logits_of(task, model, texts.held_out), logits_of(task, base, texts.held_out)
        )
    training = train(model, task, texts.train, batches, recipe=recipe, lr=recipe.lora_lr, device=CPU)
    figures |= {"losses": [round(loss, 5) for loss in training.losses], "seconds_per_step": training.seconds_per_step}
    if reversible:
        figures["patched"] = scored(task, model, texts.held_out)
        before = logits_of(task, model, texts.held_out)
        meft_kernels.unpatch(model)
        figures["moved_after"] = distance(before, logits_of(task, model, texts.held_out))
    figures["unpatched"] = scored(task, model, texts.held_out)
    figures["merged"] = scored(task, model.merge_and_unload(), texts.held_out)
    return figures


def quick(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, steps=2, batch_size=2, max_length=24, held_out=4)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = ["minilm:rotten_tomatoes", "minilm:imdb", "smollm2:rotten_tomatoes", "smollm2:imdb:next-token"]
    assert set(cases) == {str(case) for case in CASES}
    parser.add_argument("--cases", nargs="+", default=cases, metavar="CASE")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--stored", action="store_true", help="measure nothing, print what is there")
    parser.add_argument("--quick", action="store_true", help="tiny runs, to see that everything works")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.quick and options.out == RESULTS:
        parser.error("--quick measures nothing worth keeping: give it a folder of its own by --out")
    made = {text: Case.parse(text) for text in options.cases}
    tasks: dict[str, tuple[Task, Recipe]] = {}
    for seed, text, method in itertools.product(options.seeds, made, options.methods):
        if options.stored:
            break
        case = made[text]
        if text not in tasks:
            recipe = recipe_of(case.task())
            recipe = quick(recipe) if options.quick else recipe
            tasks[text] = case.task(recipe.max_length), recipe
        task, recipe = tasks[text]
        settings, path = settings_of(case, recipe, method, seed), options.out / case.folder / f"{method}-{seed}.json"
        if is_done(path, settings):
            continue
        began = time.perf_counter()
        record = Record.now(KIND, settings, measure(case, task, recipe, method, seed), CPU)
        record.write(path)
        score = record.figures["unpatched"]["score"]
        print(f"{text}, {method}, seed {seed}: {score:.4f}, {time.perf_counter() - began:.0f} s", flush=True)
    print(table(read_all(options.out) if options.out.is_dir() else []))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
