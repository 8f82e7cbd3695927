"""Time and memory of each stage beside its floor, with random weights; nothing is downloaded.

    python experiments/bench.py                                 # Pythia-160M: `make bench`
    python experiments/bench.py --model gemma-2-2b              # on a GPU where there is one
    python experiments/bench.py --only sae --n 2048 8192 --k 20 80 320
    python experiments/bench.py --only sae kl --fast            # without each fast path in turn
    python experiments/bench.py --only sae kl --peers --direct  # beside the public libraries
    python experiments/bench.py --only memory                   # peaks of the KL step, any V

A floor is the time of the stage's unavoidable products alone; all rows of a stage take turns.
  collect     the buffer serves half of its rows and refills them; floor: the prefix, same chunks
  buffer      the same with 256,000 rows behind a prefix that costs nothing; no floor
  sae         a step of phase one without AuxK; floor: the encoder product
  kl          a step of phase two; floor: prefix, two suffixes, one's backward, three products with
              W_U and the encoder product
  evaluate    floor: prefix, three suffixes and products with W_U (original, zero, SAE), encoder's
  tokenise    the embedded text on one core; no floor
  checkpoint  an SAE, Adam's moments and 256,000 rows, to disk (`written`) and back (`read`)
Columns: median seconds; tokens/s; times the floor; times the first row; peak memory above what is
held before a step (models, Adam's moments, buffer), so gradients are in it.

Peers, each optional: pip install sae-lens transformers einops nnsight simple-parsing natsort
schedulefree wandb; pip install --no-deps dictionary-learning eai-sparsify
"""

import argparse
import contextlib
import ctypes
import gc
import itertools
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import model_loaders
import saeft

STAGES = ["collect", "buffer", "sae", "kl", "evaluate", "tokenise", "checkpoint"]
PEERS = ["dictionary_learning", "sparsify", "sae_lens", "transformers"]
SHAPES = {  # d_model, layers, heads, vocabulary
    "pythia-70m": (512, 6, 8, 50304),
    "pythia-160m": (768, 12, 12, 50304),
    "pythia-410m": (1024, 24, 16, 50304),
    "pythia-1.4b": (2048, 24, 16, 50304),
    "gemma-2-2b": (2304, 26, 8, 256000),
    "gemma-2-9b": (3584, 42, 16, 256000),
}


# ---- Models, and steps that can be repeated ----------------------------------------------------
def lm_config(family: str, d_model: int, layers: int, heads: int, vocab: int) -> dict:
    """A config.json as far as it matters here; each family ignores the other's keys."""
    config = {"model_type": family, "hidden_size": d_model, "num_hidden_layers": layers}
    config.update(num_attention_heads=heads, intermediate_size=4 * d_model, vocab_size=vocab)
    config.update(num_key_value_heads=heads // 2, query_pre_attn_scalar=256, head_dim=256)
    return {**config, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def find_config(model: str) -> dict:
    """The shape of a short name, or the config.json of a folder. Raises UserError."""
    if model in SHAPES:
        return lm_config("gemma2" if "gemma" in model else "gpt_neox", *SHAPES[model])
    if model != "tiny" and not Path(model).is_dir():
        known = ", ".join(SHAPES)
        raise model_loaders.UserError(f"--model {model}: give tiny, {known}, or a folder")
    return model_loaders.load_config(model)


def build(args, dtype: str, config: dict | None = None):
    """A frozen language model with random weights."""
    lm = saeft.build_lm(config or args.config).to_empty(device=args.device)
    for p in lm.parameters():
        p.data.zero_()  # Gemma's norms stay so
    for module in lm.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return lm.to(getattr(torch, dtype)).eval().requires_grad_(False)


def config_for(args, **changes) -> saeft.Config:
    """Rates of 0, so that every step repeats the same values."""
    sizes = {"context": args.t, "buffer": 256_000 // args.t, "batch": args.n[0]}
    return saeft.Config(layer=args.layer, lr=0.0, kl_lr=0.0, sink_norm=0.0, **{**sizes, **changes})


def trainee(args, x, d_sae: int, k: int, dtype: str, lm=None) -> saeft.Trainee:
    """A new SAE for activations like x [N, D]; with lm, it is trained by KL+MSE."""
    sae = saeft.SAE(x.shape[1], d_sae, k).to(args.device)
    sae.bfloat16 = dtype == "bfloat16"
    sae.start_from(x.float())
    return saeft.Trainee(sae.train(), lm, "kl" if lm else "mse")


def new_phase(args, trainees: list, **state) -> saeft.Phase:
    """At its second step, since the first one looks for dead latents."""
    no_limit = torch.tensor(torch.inf, device=args.device)
    return saeft.Phase("bench", trainees, 2, no_limit, step=1, **state)


def sae_step(args, x, t: saeft.Trainee):
    buffer, config = SimpleNamespace(next_batch=lambda n: x), config_for(args)
    return lambda: saeft.train_mse(new_phase(args, [t], buffer=buffer), config, lambda *_: None)


def kl_step(args, tokens, t: saeft.Trainee):
    source = SimpleNamespace(train=lambda start, n: tokens), config_for(args, kl_batch=len(tokens))
    return lambda: saeft.finetune(new_phase(args, [t]), t.lm, *source, lambda *_: None)


def direct_step(logits, block, tokens, t: saeft.Trainee, skip: int):
    """The fine-tune step done plainly, on our model or transformers': the whole model twice, full
    logits, a dense SAE in a hook on `block`, all of it left to autograd."""
    seen = {}

    def insert(module, inputs, output):
        if "p" not in seen:
            return output
        resid = output[0] if isinstance(output, tuple) else output
        x = resid.float()
        x_hat = t.sae(x.flatten(0, 1))[0].view_as(x)
        seen["mse"] = F.mse_loss(x_hat[:, skip:], x[:, skip:])
        x_hat = torch.cat([resid[:, :skip], x_hat[:, skip:].to(resid.dtype)], dim=1)
        return (x_hat, *output[1:]) if isinstance(output, tuple) else x_hat

    def step():
        handle = block.register_forward_hook(insert)
        with torch.no_grad():
            seen["p"] = logits(tokens)[:, skip:].float().softmax(-1).flatten(0, 1)
        log_q = logits(tokens)[:, skip:].float().log_softmax(-1).flatten(0, 1)
        kl = F.kl_div(log_q, seen.pop("p"), reduction="batchmean")
        mse = seen.pop("mse")
        (((mse / (kl + 1e-8)).detach() * kl + mse) / 2).backward()
        saeft.update(t, 0.0)
        handle.remove()

    return without(step, FAST=False)


# ---- Without fast paths, and the public libraries ----------------------------------------------
def without(step, **names):
    """The step with other values of some names in saeft."""

    def changed(*args):
        with mock.patch.multiple(saeft, **names):
            return step(*args)

    return changed


def plain_top_k(pre, k: int) -> saeft.Entries:
    values, latents = pre.topk(k, sorted=False)
    starts = torch.arange(0, len(pre) * k, k)
    return saeft.Entries(values.relu().flatten(), latents.flatten(), starts)


FAST_PATHS = {
    "all plain": {"FAST": False},
    "no groups in top_k": {"top_k": plain_top_k},
    "no sparse autograd": {"sparse_autoencode": without(saeft.autoencode, FAST=False)},
    "no clipping in Adam": {"update": without(saeft.update, FAST=False)},
    "no oneDNN": {"ONEDNN": False},
}


def gradients(t: saeft.Trainee, step) -> torch.Tensor:
    """Those that a step gives Adam, clipped: a tenth of them are its first moments."""
    t.optimizer.state.clear()
    step()
    return torch.cat([state["exp_avg"].flatten() for state in t.optimizer.state.values()])


def fast_paths(t: saeft.Trainee, step) -> dict:
    """{"what is left out (relative difference of the gradients)": step}"""
    rows, ours = {}, gradients(t, step)
    for name, names in FAST_PATHS.items():
        rows[name] = without(step, **names)
        difference = (gradients(t, rows[name]) - ours).norm() / ours.norm()
        print(f"{name}: gradients differ by {difference:.1e} of their norm", flush=True)
    return rows


def adam_step(sae: torch.nn.Module):
    """Clips the gradients of an SAE and takes a step of Adam as users of these libraries do."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4)

    def step():
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def dictionary_learning(x, d_sae: int, k: int):
    from dictionary_learning.trainers.top_k import TopKTrainer

    shape = {"activation_dim": x.shape[1], "dict_size": d_sae, "k": k, "device": str(x.device)}
    trainer = TopKTrainer(steps=10**6, layer=0, lm_name="", lr=2e-4, **shape)
    numbers = itertools.count()
    return lambda: trainer.update(next(numbers), x.clone())  # it writes on its input


def sparsify(x, d_sae: int, k: int):
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=d_sae, k=k), device=x.device)
    adam = adam_step(coder)

    def step():
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam()
        coder.set_decoder_norm_to_unit_norm()

    return step


def sae_lens(x, d_sae: int, k: int):
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=d_sae, k=k))
    sae.to(x.device)
    dead = torch.zeros(d_sae, dtype=torch.bool, device=x.device)
    batch = TrainStepInput(x, {}, dead, n_training_steps=1, is_logging_step=False)
    adam = adam_step(sae)

    def step():
        sae.training_forward_pass(batch).loss.backward()
        adam()

    return step


def transformers(args, dtype: str, tokens, t: saeft.Trainee):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**args.config)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    lm = lm.to(args.device, getattr(torch, dtype)).eval().requires_grad_(False)
    block = lm.base_model.layers[args.layer]
    return direct_step(lambda tokens: lm(tokens).logits, block, tokens, t, t.lm.n_skip)


def peer_steps(dtype: str, libraries: list, *args) -> dict:
    """{library: its step}; one that is not installed is named."""
    steps = {}
    for library in libraries:
        try:
            steps[library.__name__] = library(*args)
        except ImportError as error:
            print(f"{library.__name__}: {error}", file=sys.stderr)
    return steps


# ---- The stages: each yields cases (label, tokens in a step, {name: step}) ---------------------
def buffer_step(args, lm, n_sequences: int):
    """A step that serves and refills half of a buffer, and its tokens."""
    ids = torch.randint(args.config["vocab_size"], (max(1, 8192 // args.t), args.t))
    stream = SimpleNamespace(train=lambda start, n: ids[torch.arange(n) % len(ids)])
    config = config_for(args, buffer=n_sequences)
    buffer = saeft.ActivationBuffer(lm, stream, 10**9, torch.tensor(torch.inf), config)
    buffer.refill()

    def step():
        while 2 * buffer.used < len(buffer.rows):
            buffer.next_batch(config.batch)
        buffer.refill()

    step()
    return buffer, step


def collect(args, dtype: str):
    lm = build(args, dtype)
    # The CPU's prefix is slow, and its speed does not depend on the buffer's size.
    small = 1 + 2 * args.n[0] // args.t
    buffer, step = buffer_step(args, lm, small if lm.W_U.is_cpu else 256_000 // args.t)
    n = buffer.size // 2 // buffer.per_sequence
    tokens = torch.randint(len(lm.W_U), (n, args.t), device=args.device)
    floor = torch.no_grad()(lambda: saeft.collect(lm, tokens, args.layer))
    yield "", n * args.t, {"collect": step, "floor": floor}


def buffer(args, dtype: str):
    d_model = args.config["hidden_size"]
    resid = torch.randn(max(1, 8192 // args.t), args.t, d_model, device=args.device)
    resid = resid.to(getattr(torch, dtype))
    lm = SimpleNamespace(W_U=resid[0], n_skip=0, prefix=lambda ids, layer: resid[: len(ids)])
    buffer, step = buffer_step(args, lm, 256_000 // args.t)
    yield "", buffer.size // 2, {"buffer": step}


def encoder_product(sae: saeft.SAE, n: int):
    """A step: the product of n activations with W_enc, in the SAE's precision."""
    W_enc = sae.W_enc.detach().to(torch.bfloat16 if sae.bfloat16 else torch.float32)
    x = torch.randn(n, W_enc.shape[1], device=W_enc.device).to(W_enc.dtype)
    return torch.no_grad()(lambda: saeft.linear(x, W_enc))


def sae(args, dtype: str):
    d_model = args.config["hidden_size"]
    mix = torch.randn(d_model, d_model, device=args.device) / d_model**0.5
    for n, k in itertools.product(args.n, args.k):
        x = torch.randn(n, d_model, device=args.device) @ mix
        t = trainee(args, x, args.d_sae, k, dtype)
        steps = {"sae": sae_step(args, x, t), "floor": encoder_product(t.sae, n)}
        if args.fast:
            steps.update(fast_paths(t, steps["sae"]))
        if args.peers:
            libraries = [dictionary_learning, sparsify, sae_lens]
            steps.update(peer_steps(dtype, libraries, x, args.d_sae, k))
        yield f"N {n} K {k}", n, steps


def spliced(args, lm, b: int, t: int, d_sae: int, k: int, dtype: str):
    """Tokens [B, T], and what inserts an SAE on them."""
    tokens = torch.randint(len(lm.W_U), (b, t), device=args.device)
    with torch.no_grad():
        resid = lm.prefix(tokens[:, :512], args.layer)[:, lm.n_skip :]
    return tokens, trainee(args, resid.flatten(0, 1), d_sae, k, dtype, lm)


def unembed(lm, lasts: list[torch.Tensor], backward: bool = False) -> None:
    """The products of each of lasts [B, T, D] with W_U; `backward`: and of a gradient with it."""
    for rows in saeft.slices(lasts[0].shape[:2].numel(), lm.W_U):
        for last in lasts:
            logits = saeft.linear(last.flatten(0, 1)[rows], lm.W_U)
        if backward:
            saeft.linear(logits, lm.W_U.T)


def kl(args, dtype: str):
    lm = build(args, dtype)
    tokens, t = spliced(args, lm, args.b, args.t, args.d_sae, args.k[0], dtype)
    encode = encoder_product(t.sae, tokens.numel())

    def floor():
        with torch.no_grad():
            resid = lm.prefix(tokens, args.layer)
            last_p = lm.suffix(resid, args.layer)
        last_q = lm.suffix(resid.requires_grad_(), args.layer)
        last_q.backward(last_p)  # any gradient of that shape
        with torch.no_grad():
            unembed(lm, [last_p, last_q], backward=True)
        encode()

    steps = {"kl": kl_step(args, tokens, t), "floor": floor}
    if args.fast:
        steps.update(fast_paths(t, steps["kl"]))
    if args.direct:
        steps["direct"] = direct_step(lm, lm.blocks[args.layer], tokens, t, lm.n_skip)
    if args.peers:
        steps.update(peer_steps(dtype, [transformers], args, dtype, tokens, t))
    yield f"{args.b} x {args.t}", tokens.numel(), steps


def memory(args, dtype: str):
    """The KL step on two layers of D 256."""
    for vocab, (b, t) in itertools.product([50304, 256000], [(2, 512), (8, 1024)]):
        lm = build(args, dtype, lm_config("gpt_neox", 256, 2, 4, vocab))
        tokens, t = spliced(args, lm, b, t, 2048, 32, dtype)
        label = f"V {vocab}, logits {tokens.numel() * vocab / 2**18:,.0f} MiB"
        yield label, tokens.numel(), {"kl": kl_step(args, tokens, t)}


def evaluate(args, dtype: str):
    lm = build(args, dtype)
    tokens, t = spliced(args, lm, args.b, args.t, args.d_sae, args.k[0], dtype)
    encode = encoder_product(t.sae, tokens.numel())

    @torch.no_grad()
    def floor():
        resid = lm.prefix(tokens, args.layer)
        unembed(lm, [lm.suffix(resid, args.layer) for _ in range(3)])  # original, zero, SAE
        encode()

    step = lambda: saeft.evaluate(lm, tokens, [t], config_for(args))
    yield f"{args.b} x {args.t}", tokens.numel(), {"evaluate": step, "floor": floor}


def tokenise(args, dtype: str):
    texts = list(model_loaders.documents("tiny"))
    tokenizer = model_loaders.load_tokenizer("tiny")
    n_tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts, 1))
    yield "", n_tokens, {"tokenise": lambda: tokenizer.encode_batch(texts, 1)}


def checkpoint(args, dtype: str):
    rows = torch.randn(256_000, args.config["hidden_size"], device=args.device)
    t = trainee(args, rows[:512], args.d_sae, args.k[0], dtype)
    sae_step(args, rows[: args.n[0]], t)()  # makes Adam's moments
    buffer = SimpleNamespace(state_dict=lambda: {"rows": rows.to(getattr(torch, dtype))})
    state = new_phase(args, [t], buffer=buffer).state_dict()
    path = Path(tempfile.mkdtemp(), "checkpoint.pt")
    saeft.save_state(state, path)
    steps = {"written": lambda: saeft.save_state(state, path)}
    steps["read"] = lambda: saeft.load_state(path, args.device)
    yield f"{path.stat().st_size / 2**20:,.0f} MiB", len(rows), steps
    path.unlink()


# ---- Measuring ---------------------------------------------------------------------------------
def peak_memory(step, device: torch.device) -> int:
    """Bytes that a step takes at its peak above those held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):  # only Linux can lower a process's peak
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return rise if sys.platform == "darwin" else rise * 1024


def median_seconds(steps: dict, repeats: int, device: torch.device) -> dict:
    """Of each step; they take turns, so that whatever else the machine does hits all alike."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = {name: [] for name in steps}
    for name in list(steps) * repeats:
        wait()
        start = time.perf_counter()
        steps[name]()
        wait()
        seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def run_stage(stage: str, args) -> dict[str, float]:
    """Prints a row for each step, in a process of its own; returns the first case's seconds per
    token in each dtype."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # as in a run
    costs = {}
    for cases in zip(*(globals()[stage](args, dtype) for dtype in args.dtype)):
        label, n_tokens, _ = cases[0]
        steps = {(name, d): step for d, c in zip(args.dtype, cases) for name, step in c[2].items()}
        peaks = {}
        for name, step in steps.items():
            first = peak_memory(step, args.device)  # the first step makes Adam's moments
            peaks[name] = peak_memory(step, args.device) or first  # 0: peaks cannot be lowered
        seconds = median_seconds(steps, args.repeats, args.device)
        first, best = next(iter(seconds.values())), min(seconds[stage, d] for d in args.dtype)
        for (name, dtype), s in seconds.items():
            floor = s / seconds.get(("floor", dtype), torch.nan)
            row = f"{name} {dtype} {label}".ljust(40) + f"{s:9.4f} s {n_tokens / s:12,.0f} /s"
            row += f"{floor:7.2f} x{s / first:7.2f} x{peaks[name, dtype] / 2**20:8,.0f} MiB"
            print(row, flush=True)
        peers = {row: s for row, s in seconds.items() if row[0] in PEERS}
        if peers:
            row = min(peers, key=peers.get)
            print(f"best peer: {' '.join(row)}, {peers[row] / best:.2f} times our best")
        costs = costs or {d: seconds[stage, d] / n_tokens for d in args.dtype}
    return costs


def project(cost: dict[str, float], dtype: str) -> None:
    """Prints what 500M tokens would take at `cost` seconds per token, one stage after another."""
    per_token = cost["collect"] + cost["sae"]
    mse, kl, evaluation = 475e6 * per_token, 25e6 * cost["kl"], 2e6 * cost["evaluate"]
    print(f"\nThe whole recipe would take {(mse + kl + evaluation) / 3600:.2f} hours in {dtype}:")
    print(f"  {mse / 3600:.2f} for 475M tokens MSE, the buffer {cost['buffer'] / per_token:.1%};")
    print(f"  {kl / 3600:.2f} for 25M KL+MSE; {evaluation / 3600:.2f} for two evaluations on 1M.")
    print(
        f"  Tokenising 500M takes one core {500e6 * cost['tokenise'] / 3600:.2f} hours beside it."
    )


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pythia-160m", help="short name, tiny, or a folder")
    parser.add_argument("--only", nargs="+", choices=[*STAGES, "memory"], default=STAGES)
    parser.add_argument("--fast", action="store_true", help="also without each fast path in turn")
    parser.add_argument("--direct", action="store_true", help="beside kl, the step done plainly")
    parser.add_argument("--peers", action="store_true", help="beside sae and kl, other libraries")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--layer", type=int)
    parser.add_argument("--n", type=int, nargs="+", default=[2048], help="activations, SAE step")
    parser.add_argument("--k", type=int, nargs="+", default=[80])
    parser.add_argument("--d-sae", type=int, default=2**14)
    parser.add_argument("--b", type=int, help="sequences in kl and evaluate")
    parser.add_argument("--t", type=int, help="tokens in a sequence")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.config, args.device = find_config(args.model), saeft.find_device(args.device)
    preset, layers = saeft.PRESETS.get(args.model, {}), args.config["num_hidden_layers"]
    args.layer = preset.get("layer", layers // 2) if args.layer is None else args.layer
    on_gpu = args.device.type == "cuda"
    args.b, args.t = args.b or (8 if on_gpu else 2), args.t or (1024 if on_gpu else 512)
    return args


def main() -> int:
    try:
        args = settings()
    except model_loaders.UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    print(f"{args.model}, {card}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'step':40}{'median':>11}{'tokens':>15}{'/ floor':>9}{'/ first':>9}{'peak':>12}")
    costs = {}
    for stage in args.only:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            costs[stage] = pool.submit(run_stage, stage, args).result()
    for dtype in args.dtype if costs.keys() >= set(STAGES) else []:
        project({stage: cost[dtype] for stage, cost in costs.items()}, dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
