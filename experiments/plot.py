"""A picture of a comparison: the CE gap at each K, after MSE, after the fine-tune, and end to end.

    python experiments/compare.py && python experiments/plot.py runs/compare

Writes compare.png beside compare.json; a dot for each seed, a line through their means. Needs
matplotlib.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import saeft
from model_loaders import Parser, expanded, read_json, refuse, user_errors

try:
    import matplotlib
except ImportError:
    sys.exit("plot: this needs matplotlib: pip install matplotlib")
matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = [  # in compare.json, in the legend, colour
    ("MSE", "MSE", "tab:grey"),
    ("kl", "MSE, then KL+MSE", "tab:blue"),
    ("end to end", "KL+MSE end to end", "tab:orange"),
]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=expanded, help="of compare.json")
    folder = parser.parse_args().folder
    with user_errors(f"{folder / 'compare.json'} is not compare.py's"):
        rows = read_json(folder / "compare.json")["rows"]
        rows = [row for row in rows if row["sae"] != "relu"]  # which has no K
        ks = sorted({row["k"] for row in rows})
    refuse(not rows, f"{folder / 'compare.json'} has no rows")
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for method, label, colour in METHODS:
        means = []
        for k in ks:
            gaps = [row["gap"] for row in rows if row["k"] == k and row["method"] == method]
            refuse(not gaps, f"{folder / 'compare.json'} has no {method} at K = {k}")
            axes.plot([k] * len(gaps), gaps, ".", color=colour)
            means.append(sum(gaps) / len(gaps))
        axes.plot(ks, means, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("K, active latents per token")
    axes.set_ylabel("CE gap, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "compare.png", dpi=150)
    print(folder / "compare.png")


if __name__ == "__main__":
    sys.exit(saeft.exit_status("plot", main))
