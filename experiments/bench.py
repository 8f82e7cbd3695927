"""Time and memory of each stage beside its floor, with random weights; nothing is downloaded.

    python experiments/bench.py                                 # Pythia-160M: `make bench`
    python experiments/bench.py --model gemma-2-2b              # on a GPU where there is one
    python experiments/bench.py --only sae --batch 8192 --k 20 80 320
    python experiments/bench.py --only sae kl --plain           # without each fast path in turn
    python experiments/bench.py --only sae kl --peers           # beside the public libraries
    python experiments/bench.py --only memory                   # peaks of the KL step, any V

Other flags are saeft.py's; on a CPU, sequences are 2 x 512. All rows of a stage take turns, so that
whatever else the machine does hits all alike. Columns: median seconds; tokens per second; times
the floor, which is the matrix products alone that the stage cannot do without; times the first row;
peak memory above what is held before a step (models, Adam's moments, buffer), on CUDA and Linux.

Peers, each optional: pip install sae-lens "transformers>=5" einops nnsight simple-parsing natsort
schedulefree wandb; pip install --no-deps dictionary-learning eai-sparsify
"""

import argparse
import ctypes
import math
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import model_loaders
import saeft

STAGES = ["collect", "buffer", "sae", "kl", "evaluate", "tokenise", "checkpoint"]


def shape(vocab: int, d_model: int, layers: int, heads: int, d_mlp: int, **others) -> dict:
    """A model's config.json."""
    return {
        "vocab_size": vocab,
        "hidden_size": d_model,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": d_mlp,
        **others,
    }


SHAPES = {  # others' config.json is fetched
    "pythia-160m": shape(50304, 768, 12, 12, 3072, model_type="gpt_neox"),
    "gemma-2-2b": shape(
        *(256000, 2304, 26, 8, 9216),
        model_type="gemma2",
        num_key_value_heads=4,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
}
without_fast_paths = patch.object(saeft, "FAST", False)
PLAIN = {  # what --plain replaces
    "all plain": {"FAST": False},
    "no sparse autograd": {"sparse_autoencode": without_fast_paths(saeft.autoencode)},
}


# ---- Peers: a training step of a TopK SAE as users of a library take it -------------------------
def dictionary_learning(x, d_sae: int, k: int):
    from dictionary_learning.trainers.top_k import TopKTrainer

    sizes = x.shape[1], d_sae, k
    trainer = TopKTrainer(10**6, *sizes, layer=0, lm_name="", device=str(x.device), lr=1e-9)
    return lambda: trainer.update(1, x.clone())  # it writes on its input


def sparsify(x, d_sae: int, k: int):
    os.environ["SPARSIFY_DISABLE_TRITON"] = str(int(x.is_cpu))
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=d_sae, k=k)
    sae = SparseCoder(x.shape[1], config, device=str(x.device))

    def loss():
        sae.set_decoder_norm_to_unit_norm()
        return sae(x).fvu

    return adam_step(sae, loss, sae.remove_gradient_parallel_to_decoder_directions)


def sae_lens(x, d_sae: int, k: int):
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    config = TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=d_sae, k=k, device=str(x.device))
    sae = TopKTrainingSAE(config)
    dead = torch.zeros(d_sae, dtype=torch.bool, device=x.device)
    batch = TrainStepInput(x, {}, dead, n_training_steps=1, is_logging_step=False)
    return adam_step(sae, lambda: sae.training_forward_pass(batch).loss)


def adam_step(sae, loss, after_backward=lambda: None):
    adam = torch.optim.Adam(sae.parameters(), lr=0.0)

    def step():
        loss().backward()
        after_backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return step


# ---- Peers: the fine-tune step on our model or transformers' ------------------------------------
def our_model(tokens, t: saeft.Trainee, layer: int, shape: dict):
    return direct_step(tokens, t, t.lm, t.lm.blocks[layer])


def transformers_model(tokens, t: saeft.Trainee, layer: int, shape: dict):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape, attn_implementation="eager")
    lm = AutoModelForCausalLM.from_config(config).to(tokens.device, t.lm.W_U.dtype)
    lm.eval().requires_grad_(False)
    return direct_step(tokens, t, lambda ids: lm(ids).logits, lm.base_model.layers[layer])


def direct_step(tokens, t: saeft.Trainee, logits, block):
    """The whole model twice, full logits, a dense SAE in a hook after `block`, all of it left to
    autograd; <bos> counts."""
    seen = {}

    def insert(module, inputs, resid):
        x = resid.float().flatten(0, 1)
        x_hat, _ = t.sae(x)
        seen["mse"] = F.mse_loss(x_hat, x)
        return x_hat.view_as(resid).to(resid.dtype)

    @without_fast_paths
    def step():
        with torch.no_grad():
            p = logits(tokens).float().softmax(-1).flatten(0, 1)
        with block.register_forward_hook(insert):
            log_q = logits(tokens).float().log_softmax(-1).flatten(0, 1)
        kl, mse = F.kl_div(log_q, p, reduction="batchmean"), seen["mse"]
        beta = (mse / (kl + 1e-8)).detach()
        ((beta * kl + mse) / 2).backward()
        saeft.update(t, 0.0)

    return step


SAE_PEERS = {"dictionary_learning": dictionary_learning, "sparsify": sparsify, "SAELens": sae_lens}
MODEL_PEERS = {"our model, plainly": our_model, "transformers": transformers_model}


# ---- The stages --------------------------------------------------------------------------------
class Stages:
    """The stages in one dtype; each yields cases (label, tokens in a step, {name: step})."""

    def __init__(self, args, dtype: str):
        self.args, self.config, self.device = args, args.config, args.device
        self.dtype = dtype
        self.no_limit = torch.tensor(torch.inf, device=self.device)
        self.lm = self.build(args.shape)

    def build(self, shape: dict) -> saeft.LanguageModel:
        """A frozen language model with random weights."""
        lm = saeft.build_lm(shape).to_empty(device=self.device)
        for p in lm.parameters():
            p.data.normal_(mean=1.0 if p.ndim == 1 else 0.0, std=0.02)
        return lm.to(getattr(torch, self.dtype)).eval().requires_grad_(False)

    def trainee(self, x, lm, config: saeft.Config) -> saeft.Trainee:
        """A new SAE for activations like x [N, D]."""
        sae = saeft.SAE(x.shape[1], config.d_sae, config.k[0]).to(self.device)
        sae.bfloat16 = self.dtype == "bfloat16"
        sae.start_from(x.float())
        return saeft.Trainee(sae.train(), lm)

    def train(self, loop, t: saeft.Trainee, *args, buffer=None) -> saeft.Phase:
        """A phase's second step, since the first one looks for dead latents."""
        phase = saeft.Phase("bench", [t], 2, self.no_limit, buffer=buffer, step=1)
        loop(phase, *args, lambda *_: None)
        return phase

    def compared(self, step, peers: dict, *case) -> dict:
        """Rows that --plain and --peers add. A peer that is not installed, or does not run here,
        is named with the reason."""
        steps = {}
        for name, changes in PLAIN.items() if self.args.plain else ():
            steps[name] = patch.multiple(saeft, **changes)(step)
        cast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")
        for name, make in peers.items() if self.args.peers else ():
            try:
                peer = cast(make(*case))
                peer()
                steps[f"peer {name}"] = peer
            except (ImportError, RuntimeError) as error:
                print(f"{name} {self.dtype}: {error!r:.100}", file=sys.stderr)
        return steps

    # ---- Activations
    def collect(self):
        # On a CPU the speed does not depend on the buffer's size.
        yield self.refilled("collect", buffer=8 if self.lm.W_U.is_cpu else self.config.buffer)

    def buffer(self):
        """Behind a model without blocks, the embedding alone."""
        yield self.refilled("buffer", buffer=256_000 // self.config.context, layer=-1)

    def refilled(self, name: str, **changes):
        """Refills half of a buffer and serves it in batches; floor: the model's part."""
        config = replace(self.config, **changes)
        sequence = torch.randint(1000, (1, config.context), device=self.device)
        stream = SimpleNamespace(train=lambda start, n: sequence.expand(n, -1))
        buffer = saeft.ActivationBuffer(self.lm, stream, 10**9, self.no_limit, config)

        def step():
            for _ in range(math.ceil(buffer.size / 2 / config.batch)):
                buffer.next_batch(config.batch)

        tokens = stream.train(0, buffer.size // 2 // buffer.per_sequence)
        floor = partial(saeft.collect, self.lm, tokens, config.layer)
        return f"{buffer.size:,} rows", tokens.numel(), {name: step, "floor": floor}

    # ---- Training and evaluation
    def sae(self):
        """Floor: the encoder's product."""
        config, d_model = self.config, self.lm.W_U.shape[1]
        x = torch.randn(config.batch, d_model) @ torch.randn(d_model, d_model)
        x = x.to(self.device)
        buffer = SimpleNamespace(next_batch=lambda n: x)
        for k in config.k:
            t = self.trainee(x, None, replace(config, k=[k]))
            step = partial(self.train, saeft.train_mse, t, config, buffer=buffer)
            floor = partial(F.linear, x.to(self.lm.W_U), self.encoder(t))
            compared = self.compared(step, SAE_PEERS, x, config.d_sae, k)
            yield f"N {len(x)} K {k}", len(x), {"sae": step, "floor": floor, **compared}

    def encoder(self, t: saeft.Trainee):
        return t.sae.W_enc.detach().to(self.lm.W_U)

    def spliced(self, lm, config: saeft.Config):
        """Tokens [B, T], an SAE in the model, and a fine-tune step of it."""
        tokens = torch.randint(len(lm.W_U), (config.kl_batch, config.context), device=self.device)
        x = lm.prefix(tokens[:, :512], config.layer)[:, lm.n_skip :].flatten(0, 1)
        t = self.trainee(x, lm, config)
        stream = SimpleNamespace(train=lambda start, n: tokens)
        return tokens, t, partial(self.train, saeft.finetune, t, lm, stream, config)

    @torch.no_grad()
    def products(self, tokens, W_enc, passes: list[str]) -> None:
        """The floor: blocks 0..L once, the encoder; for each pass the later blocks and W_U, also
        backwards if it is "trained"."""
        lm, layer = self.lm, self.config.layer
        resid = lm.prefix(tokens, layer)
        F.linear(resid.flatten(0, 1), W_enc)
        for kind in passes:
            trained = kind == "trained"
            with torch.set_grad_enabled(trained):
                last = lm.suffix(resid.requires_grad_(trained), layer).flatten(0, 1)
            for rows in saeft.slices(len(last), lm.W_U):
                logits = F.linear(last[rows], lm.W_U)
                if trained:
                    logits @ lm.W_U
                del logits  # before the next slice's are made
            if trained:
                last.backward(last.detach())  # any gradient of that shape

    def kl(self):
        config = self.config
        tokens, t, step = self.spliced(self.lm, config)
        floor = partial(self.products, tokens, self.encoder(t), ["p", "trained"])
        compared = self.compared(step, MODEL_PEERS, tokens, t, config.layer, self.args.shape)
        steps = {"kl": step, "floor": floor, **compared}
        yield f"{config.kl_batch} x {config.context}", tokens.numel(), steps

    def memory(self):
        """The KL step on two layers of D 256, at two vocabularies and batches."""
        for vocab in (50304, 256000):
            lm = self.build(shape(vocab, 256, 2, 4, 1024, model_type="gpt_neox"))
            for b, t in ((2, 512), (8, 1024)):
                sizes = {"layer": 0, "k": [32], "d_sae": 2048, "kl_batch": b, "context": t}
                tokens, _, step = self.spliced(lm, replace(self.config, **sizes))
                full = f"{b * t * vocab / 2**18:,.0f} MiB"  # of logits in float32
                yield f"V {vocab}, N x V {full}", tokens.numel(), {"memory": step}

    def evaluate(self):
        config = self.config
        tokens, t, _ = self.spliced(self.lm, config)
        step = partial(saeft.evaluate, self.lm, tokens, [t], config)
        floor = partial(self.products, tokens, self.encoder(t), ["model", "zero", "sae"])
        steps = {"evaluate": step, "floor": floor}
        yield f"{config.kl_batch} x {config.context}", tokens.numel(), steps

    # ---- The disk
    def tokenise(self):
        tokenizer = model_loaders.load_tokenizer("tiny")
        texts = list(islice(model_loaders.documents("tiny"), 500))
        step = partial(tokenizer.encode_batch, texts, 1)
        yield "one core", sum(map(len, step())), {"tokenise": step}

    def checkpoint(self):
        rows = torch.randn(256_000, self.lm.W_U.shape[1]).to(self.lm.W_U)
        buffer = SimpleNamespace(next_batch=lambda n: rows[:n].float(), state_dict=lambda: rows)
        t = self.trainee(rows[:512], None, self.config)
        phase = self.train(saeft.train_mse, t, self.config, buffer=buffer)  # makes Adam's moments
        with tempfile.TemporaryDirectory() as path:
            folder = model_loaders.RunFolder(Path(path), [])
            folder.begin({})
            save, load = partial(folder.save_state, phase.state_dict()), folder.load_state
            save()
            label = f"{Path(path, 'checkpoint.pt').stat().st_size / 2**20:,.0f} MiB"
            yield label, len(rows), {"checkpoint": save, "restore": partial(load, self.device)}


# ---- Measuring ---------------------------------------------------------------------------------
def peak_memory(device: torch.device, reset: bool = False) -> float:
    """The most MiB held since the last reset."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    if reset and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(steps: dict, n_tokens: int, args) -> None:
    """Prints a row for each step {(name, "dtype, label"): step}."""
    peaks, times = {}, {row: [] for row in steps}
    for step in steps.values():
        step()  # makes Adam's moments
    for row, step in steps.items():
        held = peak_memory(args.device, reset=True)
        step()
        peaks[row] = peak_memory(args.device) - held
    for row in list(steps) * args.repeats:
        start = time.perf_counter()
        steps[row]()
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        times[row].append(time.perf_counter() - start)
    seconds = {row: statistics.median(times[row]) for row in steps}
    first = next(iter(seconds.values()))
    for (name, label), s in seconds.items():
        floor = seconds.get(("floor", label), math.nan)
        speed = f"{s:9.4f} s{n_tokens / s:13,.0f} /s{s / floor:7.2f} x{s / first:7.2f} x"
        print(f"{name + ' ' + label:44}{speed}{peaks[name, label]:7,.0f} MiB", flush=True)


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


def main() -> None:
    args = settings()
    torch.set_float32_matmul_precision("high")  # as in a run
    card = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    print(f"{args.config.model} on {card}, {torch.get_num_threads()} threads, {torch.__version__}")
    print(f"{'step':44}{'median':>11}{'tokens':>16}{'/ floor':>9}{'/ first':>9}{'peak':>11}")
    stages = [Stages(args, dtype) for dtype in args.dtypes]
    for stage in args.only:
        for cases in zip(*(getattr(s, stage)() for s in stages)):
            steps = {}
            for s, (label, n_tokens, own) in zip(stages, cases):
                steps.update({(name, f"{s.dtype}, {label}"): own[name] for name in own})
            measure(steps, n_tokens, args)


if __name__ == "__main__":
    try:
        main()
    except model_loaders.UserError as error:
        sys.exit(f"bench: {error}")
