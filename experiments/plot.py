"""Pictures of a comparison.

    python experiments/compare.py && python experiments/plot.py runs/compare

compare.png: the CE gap at each K, after MSE, after the fine-tune, and end to end; all seeds.
cost.png: the CE gap over training seconds. Needs matplotlib.
"""

import json
import sys
from pathlib import Path

try:
    import matplotlib
except ImportError:
    sys.exit("plot: this needs matplotlib: pip install matplotlib")
matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"MSE": "MSE", "kl": "MSE, then KL+MSE", "end to end": "KL+MSE end to end"}
COLOURS = {"MSE": "tab:grey", "kl": "tab:blue", "end to end": "tab:orange", "mse": "tab:green"}


def finish(axes, path: Path, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.figure.tight_layout()
    axes.figure.savefig(path, dpi=150)
    plt.close(axes.figure)
    print(path)


def mean(rows: list[dict], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def plot_compare(folder: Path, rows: list[dict]) -> None:
    rows = [row for row in rows if row["sae"] == "topk"]
    ks = sorted({row["k"] for row in rows})
    _, axes = plt.subplots(figsize=(6.4, 3.6))
    for method, name in NAMES.items():
        cells = [[r for r in rows if r["k"] == k and r["method"] == method] for k in ks]
        axes.plot(ks, [mean(cell, "gap") for cell in cells], color=COLOURS[method], label=name)
        for k, cell in zip(ks, cells):
            axes.plot([k] * len(cell), [r["gap"] for r in cell], ".", color=COLOURS[method])
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_ylim(bottom=0)
    finish(axes, folder / "compare.png", "K, active latents per token", "CE gap, nats per token")


def plot_cost(folder: Path, rows: list[dict]) -> None:
    """Each method where most were run; a fine-tune's seconds include those of its MSE SAE."""
    counts = {row["k"]: sum(r["k"] == row["k"] for r in rows) for row in rows}
    rows = [r for r in rows if r["k"] == max(counts, key=counts.get) and r["sae"] == "topk"]
    base = mean([r for r in rows if r["method"] == "MSE"], "seconds")
    _, axes = plt.subplots(figsize=(6.4, 4.2))
    by_method = {r["method"]: [q for q in rows if q["method"] == r["method"]] for r in rows}
    label_at = 0.0
    for method, cell in sorted(by_method.items(), key=lambda item: mean(item[1], "gap")):
        seconds = mean(cell, "seconds") + (0 if method in ("MSE", "end to end") else base)
        gap, main = mean(cell, "gap"), method in NAMES
        axes.plot(seconds, gap, "o" if main else ".", color=COLOURS.get(method, "k"))
        label_at = max(gap, label_at + 0.03 * mean(by_method["MSE"], "gap"))  # none on another
        axes.annotate(NAMES.get(method, method), (seconds, label_at), fontsize=7, va="center",
                      xytext=(6, 0), textcoords="offset points")  # fmt: skip
    axes.set_xlim(0, 1.35 * max(mean([r], "seconds") for r in rows) + base)
    axes.set_ylim(0, 1.15 * mean(by_method["MSE"], "gap"))
    axes.plot([], [], "k.", label=f"K = {rows[0]['k']}, mean over seeds")
    finish(axes, folder / "cost.png", "training seconds", "CE gap, nats per token")


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1], "compare.json").exists():
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    rows = json.loads((folder / "compare.json").read_text())["rows"]
    plot_compare(folder, rows)
    plot_cost(folder, rows)


if __name__ == "__main__":
    main()
