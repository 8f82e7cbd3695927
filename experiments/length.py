"""How short can the fine-tune be, and at which rate? The share of the gap that each closes.

    python experiments/length.py                  # embedded model, three seeds
    python experiments/length.py --start runs/a runs/b --lengths 6.4k 25.6k --rates 1e-4 3e-4 ...

Other flags are saeft.py's. Phase one runs once for each seed, or --start names SAEs. From each of
them every length is a fine-tune of its own, whose rate falls to 0 over it. The rates of a length
train side by side on the same batches, and so does the control, MSE alone, at each of them.
Figures are means over five parts of the held-out text, which give the standard error. Rows go to
OUT/length.json as they come, the SAEs to folders beside it: the same command goes on where it was
cut. OUT/length.png, of several kinds of SAE one each, needs matplotlib.
"""

import contextlib
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from compare import run as finished

import saeft
from model_loaders import (
    Parser,
    count,
    expanded,
    flags_of,
    progress,
    read_json,
    refuse,
    sae_cfg,
    sae_key,
    sae_metadata,
    say,
    write_text,
)

PARTS = 5  # of the held-out text
LENGTHS = ["10k", "20k", "50k", "100k", "200k", "400k"]
SAE = ("sae", "k", "layer", "d_sae", "context", "sink_norm")  # the same where rows are averaged
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]


def held_out(run: saeft.Run) -> list[tuple[torch.Tensor, float]]:
    """Parts of the held-out text, and the variance of x in each relative to that in the whole."""
    lm, tokens, limit = run.lm, run.stream.validation(), run.done.limit
    refuse(len(tokens) < PARTS, f"--eval-tokens: {len(tokens)} sequences, for {PARTS} parts")
    parts, sums = tokens.tensor_split(PARTS), []
    for part in parts:
        x = saeft.collect(lm, part.to(limit.device), run.config)
        x = x[saeft.content(x, lm.n_skip, limit)].double()
        sums.append((len(x), x.sum(0), x.pow(2).sum()))
    whole = variance(*(sum(column) for column in zip(*sums)))
    return [(part, variance(*some) / whole) for part, some in zip(parts, sums)]


def variance(n: int, total, squares) -> float:
    """mean ||x - mean x||^2 of n x, of which `total` is the sum, `squares` that of ||x||^2."""
    return ((squares - total.pow(2).sum() / n) / n).item()


def evaluate(run: saeft.Run, trainees: list, parts: list) -> list[list[dict]]:
    """Figures of each trainee on each of the `held_out` parts, which are all but equally long."""
    figures = []
    for i, (tokens, share) in enumerate(parts):
        label = f"evaluating, part {i + 1} of {len(parts)}"
        _, rows = saeft.evaluate(run.lm, tokens, trainees, run.done.limit, run.config, label)
        figures.append([{**row, "fvu": row["fvu"] * share} for row in rows])
    return [list(rows) for rows in zip(*figures)]


def mean(rows: list[dict]) -> dict:
    return {name: average(rows, name) for name in ("ce", "gap", "fvu", "l0")}


def closed(before: list[dict], after: list[dict]) -> tuple[float, float]:
    """The share of the gap that is closed, and its standard error, by the jackknife over parts."""

    def share(parts):
        return 1 - sum(after[i]["gap"] for i in parts) / sum(before[i]["gap"] for i in parts)

    n = len(before)
    without = [share([j for j in range(n) if j != i]) for i in range(n)]
    return share(range(n)), ((n - 1) * statistics.pvariance(without)) ** 0.5 if n > 1 else 0.0


def train(run: saeft.Run, sae: saeft.SAE, method: str, n_tokens: int, rates: list) -> list:
    """The trainees of one method and length, one for each rate, trained side by side."""
    config, trainees = run.config, []
    for rate in rates:
        trainees.append(run.trainee(method, 0, sae))
        trainees[-1].lr = rate
        trainees[-1].trained.train()
    steps = n_tokens // (config.kl_batch * config.context)
    phase = saeft.Phase(method, trainees, steps, run.done.limit, first=run.n_mse)

    def after_step(phase, figures):
        left = phase.time_left(time.monotonic())
        shown = f"{method}, {n_tokens:,} tokens: {phase.step / steps:.0%}, {left}"
        progress(shown, now=phase.step == 1)

    saeft.finetune(phase, run.lm, run.stream, config, after_step)
    for t in trainees:
        t.trained.eval()
    return trainees


def fine_tunes(run: saeft.Run, todo: dict[int, list[float]], rows: list[dict], out: Path):
    """Adds to `rows`, and yields after each length, the fine-tunes `todo` {tokens: rates} of the
    SAE of the run's --start, and the control at the same rates; saves them in folders of `out`."""
    config = run.config
    with contextlib.ExitStack() as closing:
        (run.prepare if todo else run.open_stream)(closing)
        now = {part: run.identity[part] for part in ("model", "data")}
        mixed = any(row[part] != key for row in rows for part, key in now.items())
        refuse(mixed, f"{out} has rows of another model or other data: give another --out")
        if not todo:
            return
        (sae,) = run.first_saes()
        parts = held_out(run)
        (before,) = evaluate(run, [saeft.Trainee(sae, run.lm)], parts)
        gap = mean(before)["gap"]
        refuse(gap <= 0, f"{config.start} has a gap of {gap:.4f}: there is none to close")
        run.done.results["MSE"] = [mean(before)]
        base = {
            **now,
            "start": config.start,
            "key": run.identity["start"],
            "sae": (sae_cfg(config.start).get("saeft") or {}).get("kind", config.sae),
            "k": sae.k,
            "layer": config.layer,
            "d_sae": config.d_sae,
            "context": config.context,
            "sink_norm": config.sink_norm,
        }
        base.update({f"{name}_before": value for name, value in mean(before).items()})
        for n, rates in todo.items():
            cells = [(method, lr) for method in ("kl", "mse") for lr in rates]
            trainees = train(run, sae, "kl", n, rates) + train(run, sae, "mse", n, rates)
            seen = run.stream.seen_after(run.n_mse + n // config.context)
            metadata = sae_metadata(asdict(config), run.lm.n_skip > 0, seen, now)
            for (method, lr), t, after in zip(cells, trainees, evaluate(run, trainees, parts)):
                t.save(out / f"{base['key']}-{method}-{n}-{lr:g}", metadata)
                share, error = closed(before, after)
                row = {**base, "method": method, "tokens": n, "lr": lr, **mean(after)}
                rows.append({**row, "closed": share, "error": error})
                say(f"{method}, {n:,} tokens at {lr:g}: {share:.1%} closed, ± {error:.1%}")
            yield


def print_table(rows: list[dict]) -> None:
    """A line for each kind of SAE and length: the share closed at each rate; control and FVU at the
    rate that closes most."""
    lrs = sorted({row["lr"] for row in rows})
    rates = " | ".join(f"{lr:g}" for lr in lrs)
    say("\n±: standard deviation over SAEs; of one alone, standard error over parts of the text")
    say(f"\n| SAE, K, layer, F, context, sinks, FVU | SAEs | tokens | {rates} | control | FVU |")
    say("| --- " * (len(lrs) + 5) + "|")
    for (*what, tokens), group in grouped(rows, *SAE, "tokens").items():
        by_lr = grouped([row for row in group if row["method"] == "kl"], "lr")
        cells = [spread(by_lr.get((lr,), [])) for lr in lrs]
        best, control = at_best_rate(group)
        sae = "{} {:g}, {}, {}, {}, {:g}, ".format(*what) + f"{average(group, 'fvu_before'):.3f}"
        cells += [spread(control), f"{average(best, 'fvu'):.3f}"]
        n_saes = len({row["key"] for row in group})
        say(f"| {sae} | {n_saes} | {tokens:,} | {' | '.join(cells)} |")


def at_best_rate(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Of one length's rows those of the rate that closes most, and of the control at that rate."""
    groups = grouped(rows, "method", "lr")
    means = {lr: average(group, "closed") for (name, lr), group in groups.items() if name == "kl"}
    best = max(means, key=means.get)
    return groups["kl", best], groups["mse", best]


def shared(rows: list[dict]) -> list[dict]:
    """Rows of the lengths and rates that all SAEs have which are averaged: else a mean of one would
    stand beside one of several."""
    keys = {what: {row["key"] for row in group} for what, group in grouped(rows, *SAE).items()}
    cells = grouped(rows, *SAE, "tokens", "lr").items()
    whole = [cell for what, cell in cells if {row["key"] for row in cell} == keys[what[: len(SAE)]]]
    return [row for cell in whole for row in cell]


def average(rows: list[dict], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def spread(rows: list[dict]) -> str:
    if not rows:
        return ""
    shares = [row["closed"] for row in rows]
    error = statistics.stdev(shares) if len(shares) > 1 else rows[0]["error"]
    return f"{statistics.mean(shares):.1%} ± {100 * error:.1f}"


def grouped(rows: list[dict], *names: str) -> dict:
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return dict(sorted(groups.items()))


def draw(rows: list[dict], path: Path) -> None:
    """Share closed and FVU against tokens, a line for each rate, the control dotted."""
    try:
        import matplotlib
    except ImportError:
        say("length: for a picture: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    lrs = sorted({row["lr"] for row in rows})
    for lr in lrs:
        colour = plt.cm.viridis(lrs.index(lr) / max(1, len(lrs)))
        group = grouped([r for r in rows if (r["lr"], r["method"]) == (lr, "kl")], "tokens")
        tokens = [n for (n,) in group]
        for axis, name in zip(axes, ("closed", "fvu")):
            means = [average(rows, name) for rows in group.values()]
            axis.plot(tokens, means, ".-", color=colour, label=f"{lr:g}")
    control = {n: at_best_rate(group)[1] for (n,), group in grouped(rows, "tokens").items()}
    for axis, name in zip(axes, ("closed", "fvu")):
        means = [average(rows, name) for rows in control.values()]
        axis.plot([*control], means, ".:", color="black", label="control")
        axis.set_xscale("log")
        axis.set_xticks([*control], [f"{n / 1000:.3g}k" for n in control])
        axis.minorticks_off()
        axis.set_xlabel("tokens of fine-tune")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of the CE gap closed")
    axes[0].set_ylim(min(-0.1, 1.05 * min(row["closed"] for row in rows)), None)
    axes[1].set_ylabel("FVU after")
    before = average(rows, "fvu_before")
    axes[1].axhline(before, color="grey", linewidth=0.8)
    axes[1].set_ylim(0.8 * before, max(1.4 * before, 1.05 * max(row["fvu"] for row in rows)))
    drawn = axes[0].get_legend_handles_labels()
    figure.legend(*drawn, frameon=False, title="first rate", loc="outside right upper")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def step_of(config: saeft.Config, lengths: list[int]) -> int:
    """The tokens of a step, which no length may fall below."""
    step = config.kl_batch * config.context
    refuse(min(lengths) < step, f"--lengths {min(lengths)}: a step has {step} tokens")
    return step


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--start", nargs="+")
    parser.add_argument("--lengths", type=count, nargs="+", default=[*map(count, LENGTHS)])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", help="of phase one (default: as in a run of saeft.py)")
    parser.add_argument("--out", type=expanded, default=Path("runs/length"))
    args, flags = parser.parse_known_args()
    starts = args.start or []
    usable = args.seeds > 0 and all(0 < rate < 1e18 for rate in args.rates)
    refuse(not usable, "--seeds and --rates are numbers above 0")
    refuse(args.start and args.tokens, "--tokens is of a phase one, which --start has behind it")
    given = vars(flags_of(saeft.Config).parse_args(flags))
    refuse(given.keys() & {"resume", "overwrite"}, "--resume, --overwrite: what is done is kept")
    own = given.keys() & {"name", "method", "kl_tokens", "kl_lr", "seed"}
    refuse(own, f"{', '.join(sorted(own))}: --lengths, --rates and --seeds say that here")
    for seed in range(0 if args.start else args.seeds):
        usual = saeft.parse(flags)
        refuse(len(usual.k) > 1, f"--k {usual.k}: give one")
        step_of(usual, args.lengths)
        tokens = args.tokens or str(usual.tokens - usual.kl_tokens)
        once = ["--tokens", tokens, "--kl-tokens", "0", "--seed", str(seed)]
        finished(args.out, f"seed{seed}", [*flags, *once])
        starts.append(str(args.out / f"seed{seed}"))
    table = args.out / "length.json"
    kept = read_json(table) if table.exists() else {"flags": given}
    refuse(kept["flags"] != given, f"{table} is of flags {kept['flags']}: give another --out")
    rows = kept.setdefault("rows", [])
    old = any("sink_norm" not in row for row in rows)
    refuse(old, f"{table} is of another version of this script: give another --out")
    keys = {start: sae_key(start) for start in starts}
    for start, key in keys.items():
        longest = str(max(args.lengths))
        config = saeft.parse([*flags, "--start", start, "--kl-tokens", longest])
        step, todo = step_of(config, args.lengths), {}
        for n in sorted({n // step * step for n in args.lengths}):
            cells = {(row["key"], row["tokens"], row["lr"]) for row in rows}
            todo[n] = [lr for lr in dict.fromkeys(args.rates) if (key, n, lr) not in cells]
        todo = {n: rates for n, rates in todo.items() if rates}
        for _ in fine_tunes(saeft.Run(config), todo, rows, args.out):
            write_text(table, json.dumps(kept, indent=1))
    rows = shared([row for row in rows if row["key"] in keys.values()])
    refuse(not rows, f"{table} has no length and rate that all of these SAEs were trained at")
    print_table(rows)
    groups = grouped(rows, *SAE)
    for what, group in groups.items():
        name = "-".join(map(str, ["length", *what])) if len(groups) > 1 else "length"
        draw(group, args.out / f"{name}.png")


if __name__ == "__main__":
    sys.exit(saeft.exit_status("length", main))
