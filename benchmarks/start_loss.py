"""What patching alone does to a model's loss, before any training: our defaults beside the paper's settings.

python -m benchmarks.start_loss --model smollm2 --rows 8 --tokens 256 --draws 8

Draws are batches of other reviews: the mean of the change over them, and its range, say more than any one.
"""

from __future__ import annotations

import argparse
import statistics

import torch

import meft_kernels
from benchmarks.rivals import real_batch, real_model
from meft_kernels import MeftConfig

SETTINGS = {
    "default": MeftConfig(),
    "beta -1/16": MeftConfig(beta=-1 / 16),
    "meft1": MeftConfig(variant="meft1"),
    "meft3": MeftConfig(variant="meft3"),
    "meft1, lam +1/8": MeftConfig(variant="meft1", lam=0.125),
    "paper meft1": MeftConfig.paper("meft1"),
    "paper meft2": MeftConfig.paper("meft2"),
    "paper meft3": MeftConfig.paper("meft3"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a causal model: its loss needs no new head")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    options = parser.parse_args()
    model = real_model(options.model, torch.float32).eval()
    batches = [real_batch(options.model, options.rows, options.tokens, seed) for seed in range(options.draws)]

    def losses() -> list[float]:
        with torch.no_grad():
            return [float(model(**batch, use_cache=False).loss) for batch in batches]

    pretrained = losses()
    print(f"{'nats':<16} {'first draw':>10} {'change':>8}   {'mean change':>11} (range over {options.draws} draws)")
    print(f"{'pretrained':<16} {pretrained[0]:10.4f}")
    for name in options.settings:
        torch.manual_seed(0)
        meft_kernels.patch(model, SETTINGS[name])
        patched = losses()
        meft_kernels.unpatch(model)
        moved = [ours - theirs for ours, theirs in zip(patched, pretrained, strict=True)]
        print(
            f"{name:<16} {patched[0]:10.4f} {moved[0]:+8.4f}   {statistics.mean(moved):+11.4f} "
            f"({min(moved):+.4f} to {max(moved):+.4f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
