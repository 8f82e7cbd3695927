"""Time and memory of each stage beside its floor, with random weights; nothing is downloaded.

    python experiments/bench.py                                      # Pythia-160M: `make bench`
    python experiments/bench.py --model gemma-2-2b --t 1024          # on a GPU where there is one
    python experiments/bench.py --only sae --n 2048 8192 --k 20 80 320
    python experiments/bench.py --only kl --direct                   # beside the step done plainly
    python experiments/bench.py --only sae kl --peers                # and the public libraries
    python experiments/bench.py --only memory                        # peaks of the KL step, any V

A floor is the time of the stage's unavoidable products alone; the two take turns in one process.
  collect   the buffer serves half of its rows and refills them; floor: the prefix, same chunks
  buffer    the same with 256,000 rows behind a prefix that costs nothing; no floor
  sae       forward, backward, clipping, Adam, unit norm, no AuxK; floor: the encoder product
  kl        a fine-tune step; floor: prefix, two suffixes, one's backward, three products with W_U
            and the encoder product
  evaluate  floor: prefix, three suffixes and products with W_U (original, zero, SAE), the encoder's
  tokenise  the standard library's text on one core; no floor
Columns: median seconds; tokens/s; times the floor; the floor's operations per second of the stage,
in percent of what one big square product reaches (bfloat16 on CUDA, else float32); peak memory
above what is held before a step (models, Adam's moments, buffer), so gradients are in it.
"""

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import bench_steps
import torch
from bench_tools import build, find_config, kl_step, lm_config, median_seconds, peak_memory
from torch.utils.flop_counter import FlopCounterMode

import saeft
from model_loaders import MODELS, UserError

STAGES = "collect buffer sae kl evaluate tokenise".split()


def measure(args, label: str, n_tokens: int, steps: dict) -> float:
    """Prints a row for each step; returns the first one's seconds per token."""
    peaks = {}
    for name in [name for name in steps if name != "floor"]:
        first = peak_memory(steps[name], args.device)  # the first step makes Adam's moments
        peaks[name] = peak_memory(steps[name], args.device) or first  # 0: peaks cannot be lowered
    onednn, saeft.ONEDNN = saeft.ONEDNN, False  # the counter does not know its product
    with FlopCounterMode(display=False) as counter:
        steps.get("floor", bool)()
    saeft.ONEDNN = onednn
    side, dtype = (8192, torch.bfloat16) if args.device.type == "cuda" else (1536, torch.float32)
    square = torch.rand(side, side, device=args.device, dtype=dtype)
    turns = steps | {"square": lambda: square @ square}
    seconds = median_seconds(turns, args.repeats, args.device)
    rate = 2 * side**3 / seconds["square"]
    for name in steps:
        row = f"{name} {label if name != 'floor' else ''}".ljust(22)
        row += f"{seconds[name]:9.4f} s {n_tokens / seconds[name]:13,.0f} /s"
        if "floor" in steps:
            share = counter.get_total_flops() / seconds[name] / rate
            row += f"{seconds[name] / seconds['floor']:8.2f} x{share:7.0%}"
        peak = f"{peaks[name] / 2**20:,.0f} MiB" if name in peaks else ""
        print(f"{row:64}{peak:>12}", flush=True)
    return next(iter(seconds.values())) / n_tokens


def memory(args) -> None:
    """Prints the KL step's peak for two vocabularies and batches, on two layers of D 256, beside
    the size of one tensor of N x V float32 logits."""
    for vocab in (50304, 256000):
        lm, sae = build(args, lm_config("gpt_neox", 256, 2, 4, vocab), 2048, 32)
        step = kl_step(lm, sae, layer=0)
        step(torch.zeros(1, 16, dtype=torch.long, device=args.device))  # makes Adam's moments
        for b, t in ((2, 512), (8, 1024)):
            tokens = torch.randint(vocab, (b, t), device=args.device)
            peak = peak_memory(lambda: step(tokens), args.device) / 2**20
            logits = f"N x V logits are {b * t * vocab / 2**18:,.0f} MiB"
            print(f"kl {b} x {t}, V {vocab}: peak {peak:,.0f} MiB; {logits}", flush=True)


def run_stage(stage: str, args) -> float | None:
    """Runs in a process of its own; returns the first case's seconds per token."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    if stage == "memory":
        return memory(args)
    return [measure(args, *case) for case in getattr(bench_steps, stage)(args)][0]


def project(cost: dict[str, float]) -> None:
    """Prints what 500M tokens would take at `cost` seconds per token, one stage after another."""
    mse, kl = 475e6 * (cost["collect"] + cost["sae"]), 25e6 * cost["kl"]
    evaluation, tokenise = 2e6 * cost["evaluate"], 500e6 * cost["tokenise"]
    share = cost["buffer"] / (cost["collect"] + cost["sae"])
    print(f"\nThe whole recipe would take {(mse + kl + evaluation) / 3600:.2f} hours:")
    print(f"  {mse / 3600:.2f} for 475M tokens MSE, of which the buffer has {share:.1%};")
    print(f"  {kl / 3600:.2f} for 25M KL+MSE; {evaluation / 3600:.2f} for two evaluations on 1M.")
    print(f"  Tokenising 500M takes one core {tokenise / 3600:.2f} hours beside it.")


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pythia-160m", help="short name, tiny, or a folder")
    parser.add_argument("--only", nargs="+", choices=[*STAGES, "memory"], default=STAGES)
    parser.add_argument("--direct", action="store_true", help="beside kl, the step done plainly")
    parser.add_argument("--peers", action="store_true", help="beside sae and kl, other libraries")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the language model")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--n", type=int, nargs="+", default=[2048], help="activations, SAE step")
    parser.add_argument("--k", type=int, nargs="+", default=[80])
    parser.add_argument("--d-sae", type=int, default=2**14)
    parser.add_argument("--b", type=int, default=2, help="sequences in kl and evaluate")
    parser.add_argument("--t", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.config, args.device = find_config(args.model), saeft.find_device(args.device)
    preset, layers = saeft.PRESETS.get(args.model, {}), args.config["num_hidden_layers"]
    args.dtype = args.dtype or preset.get("dtype", "float32")
    args.layer = preset.get("layer", layers // 2) if args.layer is None else args.layer
    args.tokenizer = args.model if Path(args.model).is_dir() else MODELS["tiny"]
    limits = {"layer": (0, layers - 1), "k": (1, args.d_sae), "t": (2, 10**6), "b": (1, 10**6)}
    for name, (low, high) in limits.items():
        for value in [getattr(args, name)] if name != "k" else args.k:
            if not low <= value <= high:
                raise UserError(f"--{name} {value} is not between {low} and {high}")
    return args


def main() -> int:
    try:
        args, costs = settings(), {}
        print(f"{args.model}, {args.dtype}, {args.device}, torch {torch.__version__}", end=", ")
        print(f"{torch.get_num_threads()} threads; layer {args.layer}, F {args.d_sae}")
        print("step".ljust(25) + "median       tokens   floors  of rate        peak")
        for stage in args.only:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                costs[stage] = pool.submit(run_stage, stage, args).result()
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if costs.keys() >= set(STAGES):
        project(costs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
