"""Ten steps of four tiny models, per variant: did a change move a number?

    python -m benchmarks.golden                    # this tree, twice: does it repeat?
    python -m benchmarks.golden --against HEAD~1   # bit for bit as in that commit, on this machine
    python -m benchmarks.golden --write            # tests/golden.json, after a change that is meant to be numerical

A change that is not meant to move numbers gives the same losses and gradient norms to the last bit as the commit before
it on the same machine: ``--against`` runs both. Bits are a machine's own (kernels are chosen by the CPU), so that the
committed file, which ``tests/test_golden.py`` holds every change to, has float64 streams' inputs: another order of sums
moves those by 1e-15, another function by far more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import meft_kernels

REPOSITORY = Path(__file__).parents[1]
FILE = REPOSITORY / "tests" / "golden.json"
STEPS = 10
VARIANTS = ("meft1", "meft2", "meft3")
MODELS = ("llama", "bert", "t5", "gpt2")
"""Decoder, encoder, both; and one that has no family file."""

Steps = list[tuple[float, float]]
"""Loss and gradient norm of each."""


def build(name: str, dtype: torch.dtype) -> tuple[Any, dict[str, torch.Tensor]]:
    """A tiny random model without dropout, and a batch."""
    import transformers as tf

    small: dict[str, Any] = {"vocab_size": 61}
    wide = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    model: Any
    if name == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**small, **wide, num_key_value_heads=2))
    elif name == "bert":
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = tf.BertForSequenceClassification(tf.BertConfig(**small, **wide, **off, max_position_embeddings=32))
    elif name == "t5":
        sizes = {"d_model": 24, "d_ff": 40, "d_kv": 6, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        model = tf.T5ForConditionalGeneration(tf.T5Config(**small, **sizes, decoder_start_token_id=0))
    else:
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = tf.GPT2LMHeadModel(tf.GPT2Config(**small, **off, n_embd=24, n_layer=3, n_head=4, n_positions=32))
    ids = torch.randint(1, 61, (3, 11), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 1]) if name == "bert" else ids.clone()
    return model.to(dtype), {"input_ids": ids, "labels": labels}


def steps(name: str, variant: Any, dtype: torch.dtype) -> Steps:
    """Train; adapters begin with random weights, so that all of them have a gradient from the first step on."""
    model, batch = build(name, dtype)
    torch.manual_seed(5)
    meft_kernels.patch(model, variant=variant, rank=5, up_init_std=0.05, tile=16, fraction_bits=18).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    made: Steps = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        # Summed exactly: a vectorised sum depends on where in memory a tensor begins.
        squares = ((p.grad.double() ** 2).flatten().tolist() for p in trained if p.grad is not None)
        norm = math.sqrt(math.fsum(itertools.chain.from_iterable(squares)))
        optimizer.step()
        optimizer.zero_grad()
        made.append((float(loss), norm))
    return made


def all_steps(dtype: torch.dtype) -> dict[str, Steps]:
    """By ``model variant``."""
    return {f"{name} {variant}": steps(name, variant, dtype) for name in MODELS for variant in VARIANTS}


def in_commit(revision: str, dtype: torch.dtype) -> dict[str, Steps]:
    """The same of another commit's library, in a process of its own, on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        tree = subprocess.Popen(["git", "archive", revision, "meft_kernels"], cwd=REPOSITORY, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", folder], stdin=tree.stdout, check=True)
        if tree.wait():
            raise SystemExit(f"git knows no revision {revision!r} here")
        (Path(folder) / "golden.py").write_bytes(Path(__file__).read_bytes())
        kind = str(dtype).removeprefix("torch.")
        code = f"import golden, json, torch; print(json.dumps(golden.all_steps(torch.{kind})))"
        variables = os.environ | {"PYTHONPATH": folder}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=variables, check=True, stdout=subprocess.PIPE, text=True
        )
    return {each: [(loss, norm) for loss, norm in made] for each, made in json.loads(done.stdout).items()}


def differences(one: dict[str, Steps], other: dict[str, Steps]) -> list[str]:
    """Where two differ, a line each: the first step that does."""
    said = []
    for each in one:
        pairs = enumerate(zip(one[each], other[each], strict=True), 1)
        first = next(((number, a, b) for number, (a, b) in pairs if a != b), None)
        if first is not None:
            number, (loss, norm), (loss_then, norm_then) = first
            said.append(f"{each}, step {number}: loss {loss_then!r} -> {loss!r}, norm {norm_then!r} -> {norm!r}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="a commit, with which every bit is compared")
    parser.add_argument("--write", action="store_true", help=f"write {FILE.relative_to(REPOSITORY)}")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.write:
        FILE.write_text(json.dumps(all_steps(torch.float64), indent=1) + "\n", encoding="utf-8")
        return
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        then = all_steps(dtype) if chosen.against is None else in_commit(chosen.against, dtype)
        moved += [f"{str(dtype).removeprefix('torch.')} {line}" for line in differences(all_steps(dtype), then)]
    print("\n".join(moved) or f"{2 * len(MODELS) * len(VARIANTS)} runs of {STEPS} steps, equal bit for bit")
    raise SystemExit(bool(moved))


if __name__ == "__main__":
    main()
