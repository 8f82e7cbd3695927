"""Every fine-tune from the same MSE SAEs, and end to end from scratch, over several seeds.

    python experiments/compare.py                               # embedded model: `make compare`
    python experiments/compare.py --model pythia-160m --ks 20 40 80 160     # the paper's setting

Flags of saeft.py work too. At each of --ks: MSE, KL+MSE and end to end; at --k also the control and
every baseline, and a ReLU SAE. One row for each method, K and seed goes to OUT/compare.json as soon
as it is known; a run that was interrupted goes on where it stopped.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import baselines  # noqa: F401  (adds its methods to saeft.METHODS)

import saeft
from saeft import SAE, Run, Splice, evaluate

# method, rank. Ranks of a model of 128 dimensions; the paper has 2 to 64 at D = 768 and 2304.
AT_K = [("mse", 0), ("kl-only", 0), ("lora-sae", 2), ("lora-lm", 16)]
AT_K += [("lora-lm-after", 16), ("linear-adapter", 16), ("mlp-adapter", 16)]
AT_K += [("kl+linear-adapter", 16)]


class Comparison:
    """The rows so far, and the run whose model and tokens all cells share."""

    def __init__(self, base: Run, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.base, self.folder, self.file = base, folder, folder / "compare.json"
        asked = dataclasses.asdict(base.config)
        known = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.all = known if known.get("config") == asked else {"config": asked, "rows": []}

    def cell(self, **changes) -> Run:
        """The run with other settings."""
        cell = copy.copy(self.base)
        cell.config = dataclasses.replace(cell.config, **changes)
        return cell

    def key(self, name: str, config) -> dict:
        return {"method": name, "sae": config.sae, "k": config.k[0], "seed": config.seed}

    def known(self, name: str, config) -> dict | None:
        key = self.key(name, config).items()
        return next((row for row in self.all["rows"] if key <= row.items()), None)

    def row(self, name: str, cell: Run, splice: Splice, seconds: float, before: dict | None):
        held_out = cell.stream.validation()
        model, (figures,) = evaluate(cell.lm, cell.config.layer, held_out, [splice])
        trained = sum(p.numel() for p in splice.trained.parameters() if p.requires_grad)
        row = self.key(name, cell.config) | model | figures
        row |= {"seconds": seconds, "trained": trained}
        if before:
            row["gap_closed"] = 1 - row["gap"] / before["gap"]
            row["cost"] = seconds / before["seconds"]
        self.all["rows"].append(row)
        (new := self.file.with_suffix(".tmp")).write_text(json.dumps(self.all, indent=1))
        new.replace(self.file)
        print(f"-- {' '.join(map(str, self.key(name, cell.config).values()))}: {row['gap']:.4f}")
        return row

    def mse(self, cell: Run) -> tuple[SAE, dict]:
        (sae,), config, start = cell.new_saes(), cell.config, time.perf_counter()
        path = self.folder / f"{config.sae}-k{config.k[0]}-seed{config.seed}.pt"
        if (row := self.known("MSE", config)) and path.exists():
            sae.load_state_dict(torch.load(path, weights_only=True))
            return sae.eval(), row
        splice = Splice(sae, cell.lm)
        phase = saeft.train_mse(cell.lm, cell.stream, [sae], cell.n_mse, config)
        cell.follow("MSE", [splice], phase)
        seconds = time.perf_counter() - start
        torch.save(sae.eval().state_dict(), path)
        return sae, self.row("MSE", cell, splice, seconds, None)

    def finetune(self, name: str, method: str, cell: Run, sae: SAE, before: dict) -> None:
        if self.known(name, cell.config):
            return
        torch.manual_seed(cell.config.seed)
        start = time.perf_counter()
        (splice,) = cell.finetune(method, [sae], [before], cell.n_mse)
        self.row(name, cell, splice, time.perf_counter() - start, before)

    def end_to_end(self, cell: Run, before: dict) -> None:
        if not self.known("end to end", cell.config):
            (sae,), cell.n_mse = cell.new_saes(), 0
            list(saeft.train_mse(cell.lm, cell.stream, [sae], 0, cell.config))  # the start alone
            self.finetune("end to end", "kl", cell, sae, before)

    def run(self, ks: list[int], seed: int) -> None:
        at_k = self.base.config.k[:1]
        for k in ks:
            cell, whole = self.cell(k=[k], seed=seed), self.base.config.tokens
            sae, before = self.mse(cell)
            self.finetune("kl", "kl", cell, sae, before)
            self.end_to_end(self.cell(k=[k], seed=seed, kl_tokens=whole), before)
            for method, rank in AT_K if [k] == at_k else []:
                ranked = self.cell(k=[k], seed=seed, rank=rank or 1)
                self.finetune(f"{method} r {rank}" if rank else method, method, ranked, sae, before)
        relu = self.cell(k=at_k, seed=seed, sae="relu")
        self.finetune("kl", "kl", relu, *self.mse(relu))


def print_table(rows: list[dict]) -> None:
    """Mean over seeds; the share of the gap closed with its standard deviation."""
    heads = ("CE", "gap", "closed", "+-", "FVU", "L0", "trained", "seconds", "cost")
    print(f"\n{'':34}" + "".join(f"{head:>10}" for head in heads))
    groups = {}
    for row in rows:
        groups.setdefault((row["sae"], row["k"], row["method"]), []).append(row)
    for (sae, k, method), group in sorted(groups.items(), key=lambda g: (g[0][0], g[0][1])):
        mean = lambda key: statistics.mean(r.get(key, float("nan")) for r in group)  # noqa: B023, E731
        closed = [r["gap_closed"] for r in group if "gap_closed" in r]
        spread = statistics.stdev(closed) if len(closed) > 1 else float("nan")
        label = f"{sae} {method}" if sae == "relu" else f"{sae} K {k} {method}"
        figures = f"{mean('ce'):10.4f}{mean('gap'):10.4f}{mean('gap_closed'):10.3f}{spread:10.3f}"
        figures += f"{mean('fvu'):10.4f}{mean('l0'):10.2f}{mean('trained'):10,.0f}"
        print(f"{label:34}{figures}{mean('seconds'):10.1f}{mean('cost'):10.2f}")


def main() -> str | None:  # the error, for sys.exit
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"))
    args, rest = parser.parse_known_args()
    try:
        comparison = Comparison(Run(saeft.parse(rest), args.folder), args.folder)
        for seed in range(args.seeds):
            comparison.run(args.ks, seed)
    except saeft.UserError as error:
        return f"compare: {error}"
    print_table(comparison.all["rows"])


if __name__ == "__main__":
    sys.exit(main())
