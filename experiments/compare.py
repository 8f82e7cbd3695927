"""Every fine-tune from the same MSE SAEs, and end to end from scratch, over several seeds.

    python experiments/compare.py           # embedded model; `make compare` takes fewer tokens
    python experiments/compare.py --ks 20 40 80 160 --model pythia-160m --tokens 500M ...

Other flags are saeft.py's. At each of --ks: MSE, KL+MSE and end to end, without AuxK as in phase
two; at the middle one also the control and every baseline; and a ReLU SAE. Each cell is a run under
OUT: a comparison that was interrupted goes on where it stopped. The rows go to OUT/compare.json.
"""

import contextlib
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import baselines

import saeft
from model_loaders import MAY_DIFFER, Parser, expanded, flags_of, read_json, refuse, say, write_text

END = "end to end"


def run(out: Path, name: str, flags: list[str]) -> dict:
    """A run's report; of one that is finished, as it is, if its settings are these, and its model,
    data and --start what they were."""
    done, line = out / name / "report.json", [*flags, "--out", str(out), "--name", name]
    given = vars(flags_of(baselines.Settings).parse_args(flags))
    refuse(given.keys() & {"resume", "overwrite"}, "--resume, --overwrite: what is done is kept")
    if not done.exists():
        status = saeft.main([*line, "--resume"], baselines.Settings)
        if status:
            sys.exit(status)
        return read_json(done)
    report, this = read_json(done), saeft.Run(saeft.parse(line, baselines.Settings))
    with contextlib.ExitStack() as closing:
        this.open_stream(closing)
    settings, now = {**asdict(this.config), "k": this.config.k[0]}, this.identity
    same = sorted((settings.keys() & report.keys()) - MAY_DIFFER)
    other = {key: report[key] for key in same if report[key] != settings[key]}
    refuse(other, f"{done.parent} was made with {other}: give another --out")
    changed = [part for part in now if report["identity"].get(part) != now[part]]
    refuse(changed, f"{' and '.join(changed)} of {done.parent} changed since: give another --out")
    return report


def rows_of(report: dict, methods: dict, base: dict | None = None) -> list[dict]:
    """A row for each of `methods` {name in the report: label}; gaps closed are of `base`'s gap."""
    base = base or report
    before, seconds = base["results"]["MSE"], base["seconds"]["MSE"]
    rows = []
    for name, label in methods.items():
        row = {"sae": report["sae"], "k": report["k"], "seed": report["seed"], "method": label}
        row.update(report["results"][name], ce_original=report["ce_original"])
        row["data"] = report["identity"]["data"]
        row["seconds"] = report["seconds"].get(name, 0.0)
        phase_one = 0.0 if label in ("MSE", END) else seconds
        row["cost"] = (phase_one + row["seconds"]) / seconds
        known = name != "MSE" and before["gap"] > 0
        row["gap_closed"] = 1 - row["gap"] / before["gap"] if known else None
        rows.append(row)
    return rows


def compare(out: Path, ks: list[int], tokens: list, rate: list, rest: list[str]) -> list[dict]:
    """All rows of one seed. tokens: --tokens, which --start tells itself; rate: --kl-lr, which end
    to end has no use of; rest: all other flags."""
    flags, rows = [*rest, *rate, *tokens], []
    usual = saeft.parse(flags)
    kl_tokens, seed = usual.kl_tokens, usual.seed
    step = usual.kl_batch * usual.context
    few = f"--kl-tokens {kl_tokens}: one row is of half of it, below a step of {step}"
    refuse(kl_tokens // 2 < step, few)
    none = "k" not in saeft.KINDS[usual.sae].numbers
    refuse(usual.end_to_end, f"--kl-tokens {kl_tokens}: no token is left for MSE")
    refuse(none, f"--sae {usual.sae}: it has no K, which --ks are of; it is compared beside them")
    for k in ks:
        name, cell = f"k{k}-seed{seed}", [*flags, "--k", str(k)]
        full = k == ks[len(ks) // 2]
        adapted = ["lora-lm", "lora-lm-after", "linear-adapter", "mlp-adapter"] if full else []
        methods = ["kl", "mse", "kl-only", *adapted] if full else ["kl"]
        base = run(out, name, [*cell, "--method", *methods, "--rank", "16"])
        labels = {name: name for name in ["MSE", *methods]}
        labels.update({name: f"{name} r 16" for name in adapted})
        rows += rows_of(base, labels)
        end = [*rest, *tokens, "--k", str(k), "--kl-tokens", str(usual.tokens), "--method", "kl"]
        whole = run(out, f"{name}-end", end)
        rows += rows_of(whole, {"kl": END}, base)
        if full:
            start = [*rest, *rate, "--start", str(out / name / "before")]
            start += ["--kl-tokens", str(kl_tokens)]
            lora = run(out, f"{name}-lora", [*start, "--method", "lora-sae", "--rank", "2"])
            rows += rows_of(lora, {"lora-sae": "lora-sae r 2"}, base)
            half = ["--kl-tokens", str(kl_tokens // 2)]
            first = run(out, f"{name}-half", [*start, *half, "--method", "kl"])
            start = [*rest, *rate, "--start", str(out / f"{name}-half"), *half]
            then = run(out, f"{name}-then", [*start, "--method", "linear-adapter", "--rank", "16"])
            then["seconds"]["linear-adapter"] += first["seconds"]["kl"]
            rows += rows_of(then, {"linear-adapter": "kl, then linear-adapter r 16"}, base)
    relu = run(out, f"relu-seed{seed}", [*flags, "--sae", "relu", "--method", "kl"])
    return rows + rows_of(relu, {"MSE": "MSE", "kl": "kl"})


MEANS = ("ce", "gap", "fvu", "l0")


def print_table(rows: list[dict]) -> None:
    """Means over seeds, as a Markdown table, the share closed with its standard deviation; of
    seconds and cost (of all that leads there, in seconds of MSE) the median, which other work on
    the machine moves less."""
    say("\n| SAE, K | method | CE | gap | closed | ± | FVU | L0 | seconds | cost |")
    say("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    groups = {}
    for row in rows:
        kind = "relu" if row["sae"] == "relu" else f"{row['sae']} {row['k']}"
        groups.setdefault((kind, row["method"]), []).append(row)
    for (kind, method), group in groups.items():
        mean = {key: statistics.mean(row[key] for row in group) for key in MEANS}
        seconds = statistics.median(row["seconds"] for row in group)
        cost = statistics.median(row["cost"] for row in group)
        closed = [row["gap_closed"] for row in group if row.get("gap_closed") is not None]
        spread = f"{statistics.stdev(closed):.3f}" if len(closed) > 1 else ""
        share = f"{statistics.mean(closed):.1%}" if closed else ""
        figures = f"{mean['ce']:.3f} | {mean['gap']:.3f} | {share} | {spread} | {mean['fvu']:.3f}"
        say(f"| {kind} | {method} | {figures} | {mean['l0']:.1f} | {seconds:.1f} | {cost:.2f} |")


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--ks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", help="as of saeft.py")
    parser.add_argument("--kl-lr", help="as of saeft.py")
    parser.add_argument("--out", type=expanded, default=Path("runs/compare"))
    args, rest = parser.parse_known_args()
    refuse(args.seeds < 1, f"--seeds {args.seeds}: give 1 or more")
    own = {"seed", "k", "method", "rank", "start", "name"}
    own &= vars(flags_of(baselines.Settings).parse_args(rest)).keys()
    refuse(own, f"{', '.join(sorted(own))}: --ks, --seeds and --out say that here")
    tokens = ["--tokens", args.tokens] if args.tokens else []
    rate = ["--kl-lr", args.kl_lr] if args.kl_lr else []
    rows = []
    for seed in range(args.seeds):
        ks = [*dict.fromkeys(args.ks)]
        rows += compare(args.out, ks, tokens, rate, [*rest, "--seed", str(seed)])
        mixed = len({row["data"] for row in rows}) > 1
        refuse(mixed, f"{args.out} has runs of other data, too: give another --out")
        write_text(args.out / "compare.json", json.dumps({"rows": rows}, indent=1))
    print_table(rows)


if __name__ == "__main__":
    sys.exit(saeft.exit_status("compare", main))
