"""A roofline of what ``benchmarks.kernels`` measured."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any


def draw(device: str, bandwidth: float, results: list[dict[str, Any]], path: Path) -> None:
    """Flops against flops per byte for ops with products, and each op's share of the copy bandwidth by rows x width."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (roof, share) = pyplot.subplots(1, 2, figsize=(13, 5))
    by_op: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        by_op[result["op"]].append(result)
    intensities = [result["flops"] / result["least_bytes"] for result in results if result["flops"]]
    for op, mine in by_op.items():
        seconds = [result["milliseconds"]["fused"]["median"] * 1e-3 for result in mine]
        if mine[0]["flops"]:
            x = [result["flops"] / result["least_bytes"] for result in mine]
            y = [result["flops"] / second / 1e12 for result, second in zip(mine, seconds, strict=True)]
            roof.scatter(x, y, label=op, s=12)
        elements = [result["rows"] * result["width"] for result in mine]
        share.scatter(elements, [100 * result["of_copy_bandwidth"] for result in mine], label=op, s=12)
    if intensities:
        ends = [min(intensities), max(intensities)]
        roof.plot(ends, [bandwidth * end / 1e12 for end in ends], color="black", label="copy bandwidth")
    roof.set(xscale="log", yscale="log", xlabel="flops per byte that must move", ylabel="TFLOP/s", title=device)
    share.set(xscale="log", xlabel="elements", ylabel="% of copy bandwidth", ylim=(0, 120))
    share.axhline(100, color="black", linewidth=0.8)
    for axes in (roof, share):
        axes.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
