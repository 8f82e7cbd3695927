"""Time and memory of each stage, of three beside its floor; no weights are downloaded.

    python experiments/bench.py                                 # Pythia-160M: `make bench`
    python experiments/bench.py --model gemma-2-2b --k 20 80    # on a GPU where there is one
    python experiments/bench.py --only sae kl --plain --peers   # no fast paths; other libraries

Weights are random. Other flags are saeft.py's; on a CPU, sequences are 2 x 512. Floor: a stage's
unavoidable products. Rows take turns, so that other work hits all alike. Peak: memory above what a
step starts with.

Peers, each optional: pip install sae-lens "transformers>=5" einops nnsight simple-parsing natsort
schedulefree wandb; pip install --no-deps dictionary-learning eai-sparsify
"""

import ctypes
import os
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import model_loaders
import saeft

STAGES = ["collect", "buffer", "sae", "kl", "evaluate", "tokenise", "checkpoint"]
SIZES = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size".split()
PYTHIA = {"model_type": "gpt_neox", **dict(zip(SIZES, [50304, 768, 12, 12, 3072]))}
GEMMA = {"model_type": "gemma2", **dict(zip(SIZES, [256000, 2304, 26, 8, 9216]))}
GEMMA["num_key_value_heads"] = 4
SHAPES = {"pythia-160m": PYTHIA, "gemma-2-2b": GEMMA}  # others' config.json is fetched
LIBRARIES = ["dictionary_learning", "sparsify", "SAELens"]
PLAIN = {"all plain": patch.object(saeft, "FAST", False)}  # rows of --plain: fast paths off


def library_step(name: str, x, d_sae: int, k: int):
    """A training step of a TopK SAE as users of that library take it."""
    d_model, device = x.shape[1], str(x.device)
    if name == "dictionary_learning":
        from dictionary_learning.trainers.top_k import TopKTrainer

        trainer = TopKTrainer(10**6, d_model, d_sae, k, 0, "", device=device, lr=1e-9)
        return lambda: trainer.update(1, x.clone())  # it writes on its input
    if name == "sparsify":
        os.environ["SPARSIFY_DISABLE_TRITON"] = str(int(x.is_cpu))
        from sparsify import SparseCoder, SparseCoderConfig

        sae = SparseCoder(d_model, SparseCoderConfig(num_latents=d_sae, k=k), device=device)
        calls = [lambda: sae(x).fvu.backward(), sae.remove_gradient_parallel_to_decoder_directions]
        calls.append(sae.set_decoder_norm_to_unit_norm)
    else:
        from sae_lens.saes import topk_sae

        config = topk_sae.TopKTrainingSAEConfig(d_in=d_model, d_sae=d_sae, k=k, device=device)
        sae = topk_sae.TopKTrainingSAE(config)
        batch = topk_sae.TrainStepInput(x, {}, None, n_training_steps=1, is_logging_step=False)
        calls = [lambda: sae.training_forward_pass(batch).loss.backward()]
        calls.append(lambda: torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0))
    adam = torch.optim.Adam(sae.parameters(), lr=0.0)
    calls += [adam.step, adam.zero_grad]
    return lambda: [call() for call in calls]


def direct_step(name: str, tokens, t: saeft.Trainee, layer: int, shape: dict):
    """The fine-tune step done plainly, on our model or transformers': the whole model twice, full
    logits, a dense SAE in a hook after `layer`, all of it left to autograd; <bos> counts."""
    lm, block, seen = t.lm, t.lm.blocks[layer], {}
    if name == "transformers":
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**shape, attn_implementation="eager")
        lm = AutoModelForCausalLM.from_config(config).to(tokens.device, t.lm.W_U.dtype)
        block = lm.eval().requires_grad_(False).base_model.layers[layer]
        lm.register_forward_hook(lambda module, inputs, output: output.logits)

    def insert(module, inputs, resid):
        x = resid.float().flatten(0, 1)
        x_hat, _ = t.sae(x)
        seen["mse"] = F.mse_loss(x_hat, x)
        return x_hat.view_as(resid).to(resid.dtype)

    @PLAIN["all plain"]
    def step():
        with torch.no_grad():
            p = lm(tokens).float().softmax(-1).flatten(0, 1)
        with block.register_forward_hook(insert):
            log_q = lm(tokens).float().log_softmax(-1).flatten(0, 1)
        kl, mse = F.kl_div(log_q, p, reduction="batchmean"), seen["mse"]
        beta = (mse / (kl + 1e-8)).detach()
        ((beta * kl + mse) / 2).backward()
        saeft.update(t, 0.0)

    return step


class Stages:
    """The stages in one dtype; each yields cases (tokens in a step, {name: step})."""

    def __init__(self, args, config: saeft.Config):
        self.args, self.config, self.device = args, config, args.device
        lm = saeft.build_lm(args.shape).to_empty(device=args.device)
        for p in lm.parameters():
            p.data.normal_(mean=float(p.ndim == 1), std=0.02)  # norms' weights are near 1
        self.lm = lm.to(getattr(torch, config.dtype)).eval().requires_grad_(False)
        self.W_enc = torch.randn(config.d_sae, lm.W_U.shape[1]).to(lm.W_U)

    def training(self, k: int, loop, *args, buffer=None):
        """A new SAE's Trainee, and a step of `loop`, which is that of a phase."""
        sae = saeft.TopK(self.W_enc.shape[1], self.config.d_sae, k).to(self.device)
        t = saeft.Trainee(sae, self.lm)

        def step():  # the second one, since the first looks for dead latents
            phase = saeft.Phase("bench", [t], 2, torch.inf, buffer=buffer, step=1)
            loop(phase, *args, self.config, lambda *_: None)

        return t, step

    def compared(self, step, make_peer, names: list[str], *case) -> dict:
        """Steps that --plain and --peers add; a peer that does not run is named with the reason."""
        steps = {name: without(step) for name, without in self.args.plain.items()}
        cast = self.config.autocast(self.device)
        for name in names if self.args.peers else ():
            try:
                peer = cast(make_peer(name, *case))
                peer()
                steps[f"peer {name}"] = peer
            except (ImportError, RuntimeError) as error:
                print(f"{name}: {error!r:.100}", file=sys.stderr)
        return steps

    def collect(self):
        tokens = torch.randint(1000, (8, self.config.context), device=self.device)
        step = partial(saeft.collect, self.lm, tokens, self.config)
        yield tokens.numel(), {"collect": step}

    def buffer(self):
        """Half of a buffer is served and refilled, behind the embedding alone."""
        config = replace(self.config, buffer=256_000 // self.config.context, layer=-1)
        stream = SimpleNamespace(train=lambda start, n: torch.zeros(n, config.context).long())
        buffer = saeft.ActivationBuffer(self.lm, stream, 10**9, torch.inf, config)

        half = (config.context * config.buffer + 2 * config.batch) // 2

        def step():
            for _ in range(0, half, config.batch):
                buffer.next_batch(config.batch)

        yield half, {"buffer": step}

    def sae(self):
        x = torch.randn(self.config.batch, self.W_enc.shape[1], device=self.device)
        buffer = SimpleNamespace(next_batch=lambda n: x)
        floor = partial(F.linear, x.to(self.W_enc), self.W_enc)
        for k in self.config.k:
            _, step = self.training(k, saeft.train_mse, buffer=buffer)
            compared = self.compared(step, library_step, LIBRARIES, x, self.config.d_sae, k)
            yield len(x), {"sae": step, "floor": floor, **compared}

    def spliced(self):
        """Tokens [B, T], a Trainee, and its fine-tune step on them."""
        shape = self.config.kl_batch, self.config.context
        tokens = torch.randint(len(self.lm.W_U), shape, device=self.device)
        stream = SimpleNamespace(train=lambda start, n: tokens)
        return tokens, *self.training(self.config.k[0], saeft.finetune, self.lm, stream)

    @torch.no_grad()
    def products(self, tokens, *passes: bool) -> None:
        """A floor: blocks 0..L and the encoder once; in each pass later blocks and W_U, and the way
        back through them where it trains."""
        lm, layer = self.lm, self.config.layer
        resid = lm.prefix(tokens, layer)
        F.linear(resid.flatten(0, 1), self.W_enc)
        for trains in passes:
            with torch.set_grad_enabled(trains):
                last = lm.suffix(resid.requires_grad_(trains), layer).flatten(0, 1)
            for rows in saeft.slices(len(last), lm.W_U):
                logits = F.linear(last[rows], lm.W_U)
                if trains:
                    logits @ lm.W_U
            if trains:
                last.backward(last.detach())  # any gradient of that shape

    def kl(self):
        tokens, t, step = self.spliced()
        case = tokens, t, self.config.layer, self.args.shape
        compared = self.compared(step, direct_step, ["our model, plainly", "transformers"], *case)
        floor = partial(self.products, tokens, False, True)
        yield tokens.numel(), {"kl": step, "floor": floor, **compared}

    def evaluate(self):
        tokens, t, _ = self.spliced()
        step = partial(saeft.evaluate, self.lm, tokens, [t], torch.inf, self.config)
        floor = partial(self.products, tokens, False, False, False)  # the model's own, 0, the SAE
        yield tokens.numel(), {"evaluate": step, "floor": floor}

    def tokenise(self):
        tokenizer = model_loaders.load_tokenizer("tiny")
        texts = [text for text, *_ in model_loaders.pieces("tiny")]

        def step():
            return sum(len(tokenizer.encode(text)) for text in texts)

        yield step(), {"tokenise on one core": step}

    def checkpoint(self):
        sae = self.W_enc.float().repeat(6, 1)  # W_enc and W_dec, two moments of each
        state = {"buffer": self.W_enc[:1].repeat(256_000, 1), "sae": sae}
        with tempfile.TemporaryDirectory() as path:
            folder = model_loaders.RunFolder(Path(path), [])
            folder.begin({})
            save = partial(folder.save_state, state, "0")
            restore = partial(folder.load_state, self.device)
            yield 256_000, {"checkpoint": save, "restore": restore}


def peak_memory(device: torch.device, reset: bool = False) -> float:
    """The most MiB held since the last reset, on CUDA and Linux."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    if reset and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(steps: dict, n_tokens: int, args) -> dict[str, float]:
    """Prints a row for each step {"name dtype": step}; returns their seconds per token."""
    peaks, times = {}, {name: [] for name in steps}
    for name, step in steps.items():
        step()  # makes Adam's moments
        held = peak_memory(args.device, reset=True)
        step()
        peaks[name] = peak_memory(args.device) - held
    for name in list(steps) * args.repeats:
        start = time.perf_counter()
        steps[name]()
        torch.get_device_module(args.device).synchronize()
        times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(times[name]) for name in steps}
    first = next(iter(seconds.values()))
    for name, s in seconds.items():
        floor = seconds.get(f"floor {name.split()[-1]}", torch.nan)
        figures = f"{n_tokens:9,}{s:10.4f}{n_tokens / s:12,.0f}{s / floor:9.2f}{s / first:9.2f}"
        print(f"{name:36}{figures}{peaks[name]:11,.0f}", flush=True)
    libraries = [name for name in seconds if name[:4] == "peer" and "our" not in name]
    if libraries:
        best = min(libraries, key=seconds.get)
        ours = min(s for name, s in seconds.items() if name.split()[0] in ("sae", "kl"))
        print(f"the best {best} takes {seconds[best] / ours:.2f} times our best", flush=True)
    return {name: s / n_tokens for name, s in seconds.items()}


def main() -> None:
    parser = model_loaders.Parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    dtypes = ["float32", "bfloat16"]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--plain", action="store_const", const=PLAIN, default={})
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    args, flags = parser.parse_known_args()
    sizes = "" if torch.cuda.is_available() else "--context 512 --kl-batch 2"
    rates = "--lr 0 --kl-lr 0 --sink-norm 0"  # every step repeats the same values
    fetched = model_loaders.load_config
    with patch.object(model_loaders, "load_config", lambda n: SHAPES.get(n) or fetched(n)):
        config = saeft.parse(f"--model pythia-160m {rates} {sizes}".split() + flags)
        args.shape = model_loaders.load_config(config.model)
    model_loaders.check_ranges(config)
    model_loaders.refuse(args.repeats < 1, f"--repeats {args.repeats}: give 1 or more")
    config.layer = args.shape["num_hidden_layers"] // 2 if config.layer is None else config.layer
    args.device = saeft.join_processes(config.device)
    torch.set_float32_matmul_precision("high")  # as in a run
    card = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    print(f"{config.model} on {card}, {torch.get_num_threads()} threads, {torch.__version__}")
    print("step".ljust(36) + "   tokens   seconds    tokens/s  / floor  / first  peak, MiB")
    stages = [Stages(args, replace(config, dtype=dtype)) for dtype in args.dtypes]
    costs = {}
    for stage in args.only:
        for cases in zip(*(getattr(s, stage)() for s in stages)):
            steps = {}
            for dtype, (n_tokens, own) in zip(args.dtypes, cases):
                steps.update({f"{name} {dtype}": step for name, step in own.items()})
            costs = {**measure(steps, n_tokens, args), **costs}
    for dtype in args.dtypes if args.only == STAGES else ():
        parts = {"collect": 475, "sae": 475, "kl": 25, "evaluate": 2}  # millions of tokens
        hours = sum(costs[f"{name} {dtype}"] * n / 3600e-6 for name, n in parts.items())
        print(f"475M tokens by MSE, 25M by KL+MSE, in {dtype}: {hours:.2f} hours")


if __name__ == "__main__":
    sys.exit(saeft.exit_status("bench", main))
