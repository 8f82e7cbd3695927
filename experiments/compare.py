"""Every fine-tune from the same MSE SAEs, and end to end from scratch, over several seeds.

    python experiments/compare.py                               # embedded model: `make compare`
    python experiments/compare.py --model pythia-160m --ks 20 40 80 160     # the paper's setting

Flags of saeft.py work too. At each of --ks: MSE, KL+MSE and end to end; at --k also the control and
every baseline, and a ReLU SAE. One row for each method, K and seed goes to OUT/compare.json as soon
as it is known; a run that was interrupted goes on where it stopped.
"""

import argparse
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
from saeft import SAE, Log, Splice, evaluate

# method, rank. Ranks of a model of 128 dimensions; the paper has 2 to 64 at D = 768 and 2304.
AT_K = [("mse", 0), ("kl-only", 0), ("lora-sae", 2), ("lora-lm", 16)]
AT_K += [("lora-lm-after", 16), ("linear-adapter", 16), ("mlp-adapter", 16)]
AT_K += [("kl+linear-adapter", 16)]


class Comparison:
    """The rows so far, and what every cell of the table needs."""

    def __init__(self, folder: Path, config: saeft.Config):
        self.config, self.folder = config, folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "compare.json"
        asked = dataclasses.asdict(config)
        known = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.all = known if known.get("config") == asked else {"config": asked, "rows": []}
        self.device = saeft.find_device(config.device)
        self.lm = saeft.load_lm(config.model, self.device, getattr(torch, config.dtype))
        tokenizer, sizes = saeft.load_tokenizer(config.model), (config.tokens, config.eval_tokens)
        self.stream = saeft.TokenStream(config.data, tokenizer, config.context, *sizes)
        self.n = n = self.stream.n_train
        self.n_mse = n - n * config.kl_tokens // config.tokens

    def new_sae(self, config) -> SAE:
        torch.manual_seed(config.seed)
        d_model = self.lm.W_U.shape[1]
        return SAE(d_model, config.d_sae, config.k[0], config.sae).to(self.device)

    def row(self, name: str, config, splice: Splice, seconds: float, before: dict | None) -> dict:
        model, (figures,) = evaluate(self.lm, config.layer, self.stream.validation(), [splice])
        trained = sum(p.numel() for p in splice.trained.parameters() if p.requires_grad)
        row = {"method": name, "sae": config.sae, "k": config.k[0], "seed": config.seed}
        row |= model | figures | {"seconds": seconds, "trained": trained}
        if before:
            row["gap_closed"] = 1 - row["gap"] / before["gap"]
            row["cost"] = seconds / before["seconds"]
        self.all["rows"].append(row)
        (new := self.file.with_suffix(".tmp")).write_text(json.dumps(self.all, indent=1))
        new.replace(self.file)
        print(f"-- {name} {config.sae} K {config.k[0]} seed {config.seed}: gap {row['gap']:.4f}")
        return row

    def known(self, name: str, config) -> dict | None:
        key = {"method": name, "sae": config.sae, "k": config.k[0], "seed": config.seed}
        return next((row for row in self.all["rows"] if key.items() <= row.items()), None)

    def mse(self, config) -> tuple[SAE, dict]:
        sae, start = self.new_sae(config), time.perf_counter()
        path = self.folder / f"{config.sae}-k{config.k[0]}-seed{config.seed}.pt"
        if (row := self.known("MSE", config)) and path.exists():
            sae.load_state_dict(torch.load(path, weights_only=True))
            return sae.eval(), row
        splice = Splice(sae, self.lm)
        log = Log("MSE", [splice], [self.folder], config, self.lm, self.stream)
        saeft.train_mse(self.lm, self.stream, [sae], self.n_mse, config, log)
        seconds = time.perf_counter() - start
        torch.save(sae.eval().state_dict(), path)
        return sae, self.row("MSE", config, splice, seconds, None)

    def finetune(self, name: str, method: str, config, sae: SAE, before: dict, first: int) -> None:
        if self.known(name, config):
            return
        torch.manual_seed(config.seed)
        start, span = time.perf_counter(), (first, self.n, [before], config, [self.folder])
        (splice,) = saeft.finetune_by(method, self.lm, self.stream, [sae], *span)
        self.row(name, config, splice, time.perf_counter() - start, before)

    def end_to_end(self, config, before: dict) -> None:
        config = dataclasses.replace(config, kl_tokens=config.tokens)
        sae = self.new_sae(config)
        saeft.train_mse(self.lm, self.stream, [sae], 0, config, log=None)  # the start alone
        self.finetune("end to end", "kl", config, sae, before, first=0)

    def run(self, ks: list[int], seed: int) -> None:
        for k in ks:
            config = dataclasses.replace(self.config, k=[k], seed=seed)
            sae, before = self.mse(config)
            self.finetune("kl", "kl", config, sae, before, self.n_mse)
            self.end_to_end(config, before)
            for method, rank in AT_K if k == self.config.k[0] else []:
                name = f"{method} r {rank}" if rank else method
                ranked = dataclasses.replace(config, rank=rank or config.rank)
                self.finetune(name, method, ranked, sae, before, self.n_mse)
        config = dataclasses.replace(self.config, k=self.config.k[:1], seed=seed, sae="relu")
        sae, before = self.mse(config)
        self.finetune("kl", "kl", config, sae, before, self.n_mse)


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
        saeft.check(config := saeft.parse(rest))
        comparison = Comparison(args.folder, config)
        for seed in range(args.seeds):
            comparison.run(args.ks, seed)
    except saeft.UserError as error:
        return f"compare: {error}"
    print_table(comparison.all["rows"])


if __name__ == "__main__":
    sys.exit(main())
