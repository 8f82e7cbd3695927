"""Time and memory of each stage beside its floor, with random weights; nothing is downloaded.

    python experiments/bench.py                                 # Pythia-160M: `make bench`
    python experiments/bench.py --model gemma-2-2b              # on a GPU where there is one
    python experiments/bench.py --only sae --batch 8192 --k 20 80 320
    python experiments/bench.py --only sae kl --plain           # without each fast path in turn
    python experiments/bench.py --only sae kl --peers           # beside the public libraries
    python experiments/bench.py --only memory                   # peaks of the KL step, any V

Other flags are saeft.py's; on a CPU, sequences are 2 x 512. All rows of a stage take turns. Columns:
median seconds; tokens/s; times the floor, which is the stage's unavoidable products alone; times
the first row; peak memory above what is held before a step (models, Adam's moments, buffer).

Peers, each optional: pip install sae-lens "transformers>=5" einops nnsight simple-parsing natsort
schedulefree wandb; pip install --no-deps dictionary-learning eai-sparsify
"""

import argparse
import ctypes
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import model_loaders
import saeft

STAGES = ["collect", "buffer", "sae", "kl", "evaluate", "tokenise", "checkpoint"]
SIZES = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
PYTHIA = {"model_type": "gpt_neox", "vocab_size": 50304, **dict(zip(SIZES, [768, 12, 12, 3072]))}
GEMMA = {"model_type": "gemma2", "vocab_size": 256000, **dict(zip(SIZES, [2304, 26, 8, 9216]))}
GEMMA.update(num_key_value_heads=4, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
SHAPES = {"pythia-160m": PYTHIA, "gemma-2-2b": GEMMA}  # of others: config.json


# ---- What others do, and steps without fast paths ----------------------------------------------
def library_step(name: str, x, d_sae: int, k: int):
    """A training step of a TopK SAE as users of that library take it."""
    d_model, device = x.shape[1], str(x.device)
    before = after = lambda: None
    if name == "dictionary_learning":
        from dictionary_learning.trainers.top_k import TopKTrainer

        trainer = TopKTrainer(10**6, d_model, d_sae, k, 0, "", device=device, lr=1e-9)
        return lambda: trainer.update(1, x.clone())  # it writes on its input
    if name == "sparsify":
        os.environ["SPARSIFY_DISABLE_TRITON"] = str(int(x.is_cpu))
        from sparsify import SparseCoder, SparseCoderConfig

        sae = SparseCoder(d_model, SparseCoderConfig(num_latents=d_sae, k=k), device=device)
        loss = lambda: sae(x).fvu
        before = sae.remove_gradient_parallel_to_decoder_directions
        after = sae.set_decoder_norm_to_unit_norm
    else:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.saes.sae import TrainStepInput

        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_model, d_sae=d_sae, k=k, device=device))
        dead = torch.zeros(d_sae, dtype=torch.bool, device=device)
        batch = TrainStepInput(x, {}, dead, n_training_steps=1, is_logging_step=False)
        loss = lambda: sae.training_forward_pass(batch).loss
    adam = torch.optim.Adam(sae.parameters(), lr=0.0)

    def step():
        loss().backward()
        before()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        after()

    return step


def direct_step(name: str, tokens, t: saeft.Trainee, layer: int, shape: dict):
    """The fine-tune step done plainly, on our model or transformers': the whole model twice, full
    logits, a dense SAE in a hook after `layer`, all of it left to autograd; <bos> counts."""
    logits, block, seen = t.lm, t.lm.blocks[layer], {}
    if name == "transformers":
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**shape, attn_implementation="eager")
        lm = AutoModelForCausalLM.from_config(config).to(tokens.device, t.lm.W_U.dtype)
        lm.eval().requires_grad_(False)
        logits, block = lambda ids: lm(ids).logits, lm.base_model.layers[layer]

    def insert(module, inputs, resid):
        x = resid.float().flatten(0, 1)
        x_hat, _ = t.sae(x)
        seen["mse"] = F.mse_loss(x_hat, x)
        return x_hat.view_as(resid).to(resid.dtype)

    def step():
        with torch.no_grad():
            p = logits(tokens).float().softmax(-1).flatten(0, 1)
        handle = block.register_forward_hook(insert)
        log_q = logits(tokens).float().log_softmax(-1).flatten(0, 1)
        handle.remove()
        kl, mse = F.kl_div(log_q, p, reduction="batchmean"), seen["mse"]
        (((mse / (kl + 1e-8)).detach() * kl + mse) / 2).backward()
        saeft.update(t, 0.0)

    return patch.object(saeft, "FAST", False)(step)


def peer_steps(make, names: list[str], dtype: str, *case) -> dict:
    """{"peer NAME": its step}; one that is not installed, or does not run here, is named."""
    steps = {}
    for name in names:
        cast = torch.autocast(case[0].device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        try:
            step = cast(make(name, *case))
            step()
            steps[f"peer {name}"] = step
        except (ImportError, RuntimeError) as error:
            print(f"{name} {dtype}: {error!r:.100}", file=sys.stderr)
    return steps


def plain_steps(t: saeft.Trainee, step) -> dict:
    """{what is left out: the step without it}; prints what that does to the gradients."""

    def gradients(step):
        t.optimizer.state.clear()
        step()  # its first moments are a tenth of the clipped gradients
        return torch.cat([state["exp_avg"].flatten() for state in t.optimizer.state.values()])

    plain, ours, steps = patch.object(saeft, "FAST", False), gradients(step), {}
    for name, changes in {
        "all plain": {"FAST": False},
        "no oneDNN": {"ONEDNN": False},
        "no sparse autograd": {"sparse_autoencode": plain(saeft.autoencode)},
    }.items():
        steps[name] = patch.multiple(saeft, **changes)(lambda: step())
        difference = (gradients(steps[name]) - ours).norm() / ours.norm()
        print(f"{name}: gradients differ by {difference:.1e} of their norm", flush=True)
    return steps


# ---- The stages --------------------------------------------------------------------------------
class Stages:
    """The stages in one dtype; each yields cases (label, tokens in a step, {name: step})."""

    def __init__(self, args, dtype: str):
        self.args, self.config, self.dtype = args, args.config, dtype
        self.lm = self.build(args.shape)
        self.no_limit = torch.tensor(torch.inf, device=args.device)

    def build(self, shape: dict) -> saeft.LanguageModel:
        """A frozen language model with random weights."""
        lm = saeft.build_lm(shape).to_empty(device=self.args.device)
        for p in lm.parameters():
            p.data.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.02)
        return lm.to(getattr(torch, self.dtype)).eval().requires_grad_(False)

    def trainee(self, x, k: int, d_sae: int, lm=None) -> saeft.Trainee:
        """A new SAE for activations like x [N, D]."""
        sae = saeft.SAE(x.shape[1], d_sae, k).to(x.device)
        sae.bfloat16 = self.dtype == "bfloat16"
        sae.start_from(x.float())
        return saeft.Trainee(sae.train(), lm)

    def phase(self, t: saeft.Trainee, buffer=None) -> saeft.Phase:
        """At its second step, since the first one looks for dead latents."""
        return saeft.Phase("bench", [t], 2, self.no_limit, buffer=buffer, step=1)

    def collect(self):  # on the CPU its speed does not depend on the buffer's size
        yield self.buffer_case("collect", self.lm, 8 if self.lm.W_U.is_cpu else self.config.buffer)

    def buffer(self):  # behind a prefix that costs nothing
        W_U, t = self.lm.W_U, self.config.context
        prefix = lambda ids, layer: W_U[:1, None].expand(*ids.shape, -1)
        free = SimpleNamespace(W_U=W_U, n_skip=0, prefix=prefix)
        yield self.buffer_case("buffer", free, 256_000 // t)

    def buffer_case(self, name: str, lm, n_sequences: int):
        """Serves half of a buffer and refills it; floor: `collect` alone."""
        config = replace(self.config, buffer=n_sequences)
        ids = torch.randint(1000, (2 * n_sequences + 2 * config.batch, config.context))
        stream = SimpleNamespace(train=lambda start, n: ids[:n])
        buffer = saeft.ActivationBuffer(lm, stream, 10**9, self.no_limit, config)
        buffer.refill()

        def step():
            while 2 * buffer.used < len(buffer.rows):
                buffer.next_batch(config.batch)
            buffer.refill()

        tokens = ids[: buffer.size // 2 // buffer.per_sequence].to(self.args.device)
        steps = {name: step, "floor": lambda: saeft.collect(lm, tokens, config.layer)}
        return f"{buffer.size:,} rows", tokens.numel(), steps

    def encoder_product(self, sae: saeft.SAE, n: int):
        W_enc = sae.W_enc.detach().to(self.lm.W_U.dtype)
        x = torch.randn(n, W_enc.shape[1]).to(W_enc)
        return lambda: saeft.linear(x, W_enc)

    def sae(self):
        n, d_model, d_sae = self.config.batch, self.lm.W_U.shape[1], self.config.d_sae
        x = (torch.randn(n, d_model) @ torch.randn(d_model, d_model)).to(self.args.device)
        buffer = SimpleNamespace(next_batch=lambda n: x)
        for k in self.config.k:
            t = self.trainee(x, k, d_sae)
            step = lambda t=t: saeft.train_mse(self.phase(t, buffer), self.config, lambda *_: None)
            steps = {"sae": step, "floor": self.encoder_product(t.sae, n)}
            if self.args.plain:
                steps.update(plain_steps(t, step))
            if self.args.peers:
                names = ["dictionary_learning", "sparsify", "SAELens"]
                steps.update(peer_steps(library_step, names, self.dtype, x, d_sae, k))
            yield f"N {n} K {k}", n, steps

    def spliced(self, lm, shape: tuple[int, int], config: saeft.Config):
        """Tokens [B, T], an SAE after block `layer`, and a fine-tune step."""
        tokens = torch.randint(len(lm.W_U), shape, device=self.args.device)
        x = lm.prefix(tokens[:, :512], config.layer)[:, lm.n_skip :].flatten(0, 1)
        t = self.trainee(x, config.k[0], config.d_sae, lm)
        stream = SimpleNamespace(train=lambda start, n: tokens)
        return tokens, t, lambda: saeft.finetune(self.phase(t), lm, stream, config, lambda *_: None)

    def kl(self):
        """Floor: prefix, two suffixes, one's backward, three products with W_U, the encoder's."""
        config, lm = self.config, self.lm
        tokens, t, step = self.spliced(lm, (config.kl_batch, config.context), config)
        encode = self.encoder_product(t.sae, tokens.numel())

        @torch.no_grad()
        def floor():
            resid = lm.prefix(tokens, config.layer)
            last_p = lm.suffix(resid, config.layer).flatten(0, 1)
            with torch.enable_grad():
                last_q = lm.suffix(resid.requires_grad_(), config.layer).flatten(0, 1)
            last_q.backward(last_p)  # any gradient of that shape
            for rows in saeft.slices(len(last_p), lm.W_U):
                saeft.linear(last_p[rows], lm.W_U)
                saeft.linear(saeft.linear(last_q.detach()[rows], lm.W_U), lm.W_U.T)
            encode()

        steps = {"kl": step, "floor": floor}
        if self.args.plain:
            steps.update(plain_steps(t, step))
        if self.args.peers:
            names, case = ["our model, plainly", "transformers"], (config.layer, self.args.shape)
            steps.update(peer_steps(direct_step, names, self.dtype, tokens, t, *case))
        yield f"{config.kl_batch} x {config.context}", tokens.numel(), steps

    def memory(self):
        """The KL step on two layers of D 256, at two vocabularies and batches."""
        config = replace(self.config, layer=0, k=[32], d_sae=2048)
        for b, t, vocab in [(b, t, v) for v in (50304, 256000) for b, t in ((2, 512), (8, 1024))]:
            small = {**PYTHIA, **dict(zip(SIZES, [256, 2, 4, 1024])), "vocab_size": vocab}
            _, _, step = self.spliced(self.build(small), (b, t), config)
            yield f"V {vocab}, N x V {b * t * vocab / 2**18:,.0f} MiB", b * t, {"memory": step}

    def evaluate(self):
        """Floor: the original model, the model with 0, and the model with the SAE."""
        config, lm = self.config, self.lm
        tokens, t, _ = self.spliced(lm, (config.kl_batch, config.context), config)
        encode = self.encoder_product(t.sae, tokens.numel())

        @torch.no_grad()
        def floor():
            resid = lm.prefix(tokens, config.layer)
            for _ in range(3):
                last = lm.suffix(resid, config.layer).flatten(0, 1)
                for rows in saeft.slices(len(last), lm.W_U):
                    saeft.linear(last[rows], lm.W_U)
            encode()

        steps = {"evaluate": lambda: saeft.evaluate(lm, tokens, [t], config), "floor": floor}
        yield f"{config.kl_batch} x {config.context}", tokens.numel(), steps

    def tokenise(self):
        texts, tokenizer = model_loaders.documents("tiny"), model_loaders.load_tokenizer("tiny")
        texts = [text for text, _ in zip(texts, range(500))]
        n_tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts, 1))
        yield "one core", n_tokens, {"tokenise": lambda: tokenizer.encode_batch(texts, 1)}

    def checkpoint(self):
        rows = torch.randn(256_000, self.lm.W_U.shape[1]).to(self.lm.W_U)
        t = self.trainee(rows[:512], self.config.k[0], self.config.d_sae)
        buffer = SimpleNamespace(next_batch=lambda n: rows[:n].float(), state_dict=lambda: rows)
        saeft.train_mse(self.phase(t, buffer), self.config, lambda *_: None)  # for Adam's moments
        state, name = self.phase(t, buffer).state_dict(), "checkpoint.pt"
        with tempfile.TemporaryDirectory() as path:
            folder = model_loaders.RunFolder(Path(path), [])
            folder.begin({})
            folder.save_state(state)
            size = f"{Path(path, name).stat().st_size / 2**20:,.0f} MiB"
            steps = {f"checkpoint of {size}": lambda: folder.save_state(state)}
            steps["restore"] = lambda: folder.load_state(self.args.device)
            yield "", len(rows), steps


# ---- Measuring ---------------------------------------------------------------------------------
def peak_memory(step, device: torch.device) -> float:
    """MiB that a step takes at its peak above those held before it, on CUDA and Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def measure(stage: str, label: str, n_tokens: int, steps: dict, args) -> dict[str, float]:
    """Prints a row for each step {"name dtype": step}; returns their seconds per token."""
    for step in steps.values():
        step()  # makes Adam's moments
    peaks = {name: peak_memory(step, args.device) for name, step in steps.items()}
    times = {name: [] for name in steps}
    for name in list(steps) * args.repeats:  # in turns: what else the machine does hits all alike
        start = time.perf_counter()
        steps[name]()
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(times[name]) for name in steps}
    for name, s in seconds.items():
        floor = s / seconds.get(f"floor {name.split()[-1]}", torch.nan)
        row = f"{name}, {label}".ljust(44) + f"{s:9.4f} s {n_tokens / s:12,.0f} /s{floor:7.2f} x"
        print(f"{row}{s / next(iter(seconds.values())):7.2f} x{peaks[name]:7,.0f} MiB", flush=True)
    peers = {s: name for name, s in seconds.items() if name[:4] == "peer" and "our" not in name}
    if peers:
        ratio = min(peers) / min(seconds[f"{stage} {dtype}"] for dtype in args.dtypes)
        print(f"the best, {peers[min(peers)]}: {ratio:.2f} times ours in our best precision")
    return {name: s / n_tokens for name, s in seconds.items()}


def project(cost: dict[str, float], dtype: str) -> None:
    """Prints what 500M tokens would take at `cost` seconds per token, one stage after another."""
    collect, buffer, sae, kl, evaluate, tokenise = (cost[f"{name} {dtype}"] for name in STAGES[:6])
    mse, kl, evaluate = 475e6 * (collect + sae), 25e6 * kl, 2e6 * evaluate
    print(f"\nThe whole recipe would take {(mse + kl + evaluate) / 3600:.2f} hours in {dtype}:")
    print(f"  {mse / 3600:.2f} for 475M tokens MSE, the buffer {buffer / (collect + sae):.1%};")
    print(f"  {kl / 3600:.2f} for 25M KL+MSE; {evaluate / 3600:.2f} for two evaluations on 1M.")
    print(f"  Tokenising 500M takes one core {500e6 * tokenise / 3600:.2f} hours beside it.")


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*STAGES, "memory"], default=STAGES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--plain", action="store_true", help="also without each fast path")
    parser.add_argument("--peers", action="store_true", help="beside sae and kl, other libraries")
    parser.add_argument("--repeats", type=int, default=5)
    args, flags = parser.parse_known_args()
    sizes = "" if torch.cuda.is_available() else "--context 512 --kl-batch 2"
    rates = "--lr 0 --kl-lr 0 --sink-norm 0"  # every step repeats the same values
    args.config = config = saeft.parse(f"--model pythia-160m {rates} {sizes}".split() + flags)
    args.shape = SHAPES.get(config.model) or model_loaders.load_config(config.model)
    config.layer = args.shape["num_hidden_layers"] // 2 if config.layer is None else config.layer
    args.device = saeft.join_processes(config.device)
    return args


def main() -> int:
    try:
        args = settings()
    except model_loaders.UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    print(f"{args.config.model} on {card}, {torch.get_num_threads()} threads, {torch.__version__}")
    print(f"{'step':44}{'median':>11}{'tokens':>15}{'/ floor':>9}{'/ first':>9}{'peak':>11}")
    torch.set_float32_matmul_precision("high")  # as in a run
    stages, costs = [Stages(args, dtype) for dtype in args.dtypes], {}
    for stage in args.only:
        for cases in zip(*(getattr(s, stage)() for s in stages)):
            steps = {}
            for dtype, (label, n_tokens, of_dtype) in zip(args.dtypes, cases):
                steps.update({f"{name} {dtype}": step for name, step in of_dtype.items()})
            costs = {**measure(stage, label, n_tokens, steps, args), **costs}
    for dtype in args.dtypes if {*args.only} >= {*STAGES} else []:
        project(costs, dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
