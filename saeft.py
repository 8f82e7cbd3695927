"""Train a sparse autoencoder (SAE) by MSE, then close part of its cross-entropy gap by KL+MSE.

    python saeft.py                                     # embedded model, its preset: 2 minutes
    python saeft.py --model pythia-160m --k 80          # the paper's sizes: 475M + 25M tokens
    python saeft.py --start owner/name:folder           # fine-tune an SAE in SAELens's layout
    torchrun --nproc-per-node 8 -- saeft.py --k 40 80   # two SAEs on one activation stream, 8 GPUs

"Revisiting End-To-End Sparse Autoencoder Training: A Short Finetune Is All You Need" (Karvonen
2025, arXiv 2503.17272); TopK and AuxK: Gao et al. 2024, arXiv 2406.04093. The whole method:

    phase one, on shuffled tokens:                           # the first 475M of 500M
        x     = output of block L, the residual stream       # later blocks never run
        f     = TopK(ReLU(W_enc (x - b_dec) + b_enc))        # the latents
        x_hat = W_dec f + b_dec                              # the reconstruction
        step(||x - x_hat||^2 + AuxK / 32)                    # AuxK revives dead latents
    phase two, on whole sequences:                           # the last 25M tokens
        p     = softmax(logits of the model)
        q     = softmax(logits with x_hat in place of x)
        MSE   = ||x - x_hat||^2 / D
        beta  = MSE / KL(p || q)                             # detached, new for every batch
        step((beta KL(p || q) + MSE) / 2)                    # both halves are equally large
    step(loss): the SAE alone trains; gradients along decoder directions are removed, the norm is
        clipped to 1, AdamW steps, and decoder directions get back their unit norm (but those of
        ReLU SAEs, and of SAEs that are loaded with other norms)

Shapes: N tokens, B sequences, T context, D d_model, F d_sae (number of latents), V vocabulary,
K active latents, L the layer. CE and KL are in nats per token; FVU is a share of variance.
Units: x, f, biases, thresholds and lambda are in units of the activations. Phase one is given
x / scale, scale = sqrt(mean ||x||^2), so that its settings carry over between models. When it ends
they are multiplied by scale (`SAE.rescale`), and from then on everything is raw.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: new gradients cost far less

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim import AdamW

import model_loaders
from model_loaders import TokenStream, UserError, flag, progress, refuse, say, user_errors

FAST = True  # False: nothing of the section "Fast paths" is used; to compare

# What there is by name. A fork adds its own in a file of its own: see experiments/forks.
KINDS: dict = {}  # --sae: a class of SAE
METHODS: dict = {}  # --method: (lm, a copy of the SAE of phase one, config) -> Trainee
PLACES: dict = {}  # --place: (lm, tokens, layer) -> residual stream, x
FAMILIES: dict = {}  # model_type in config.json: a class of LanguageModel


# ---- Settings ----------------------------------------------------------------------------------
@dataclass
class Config:
    """Every setting of a run: default, help, and the range of a number. A model's preset replaces
    these defaults; flags replace both."""

    # What is trained on what
    model: str = flag("tiny", "short name (pythia-160m), Hub owner/name[@revision] or folder")
    layer: int | None = flag(None, "block at which the SAE sits (default: the middle one)", 0)
    place: str = flag("resid_post", "what of that block the SAE reads", choices=PLACES)
    data: str | None = flag(None, "c4, pile, pythia, tiny, a Hub dataset, or local files")
    bos: str = flag("auto", "start sequences with <bos>", choices=["auto", "yes", "no"])
    start: str | None = flag(None, "fine-tune this SAE: a folder, or owner/name:path on the Hub")
    # The SAE
    sae: str = flag("topk", "kind of SAE", choices=KINDS)
    k: list[int] = flag([80], "active latents K; for several, an SAE each", 0, nargs="+")
    d_sae: int = flag(2**14, "number of latents F", 1, 2**31)
    # Tokens
    tokens: int = flag(500_000_000, "training tokens in all", 1)
    kl_tokens: int = flag(25_000_000, "how many of them, the last ones, are the fine-tune's", 0)
    context: int = flag(1024, "tokens in a sequence, one of which may be <bos>", 3)
    batch: int = flag(2048, "activations in a step of phase one, for each GPU", 2)
    kl_batch: int = flag(8, "sequences in a step of the fine-tune, for each GPU", 1)
    buffer: int = flag(250, "sequences whose activations are mixed, for each GPU", 1)
    sink_norm: float = flag(4.0, "leave out tokens above so many median norms; 0: keep all", 0)
    # Optimisation
    method: list[str] = flag(["kl"], "fine-tunes of the MSE SAE", nargs="+", choices=METHODS)
    lr: float | None = flag(None, "peak rate of phase one (default: 2e-4 / sqrt(F / 2^14))", 0)
    kl_lr: float | None = flag(None, "first rate of the fine-tune (default: finetune_lr)", 0)
    warmup: int = flag(1000, "steps of linear warm-up in phase one, at most a tenth of all", 0)
    l1: float | None = flag(None, "lambda of ReLU SAEs, on x / scale (0.1; --start: its own)", 0)
    dead_after: int = flag(10_000_000, "tokens without firing that make a latent dead to AuxK", 0)
    seed: int = flag(0, "of all that is random but the order of the text", 0, 4 * 10**9)
    # Running
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto takes cuda where there is one")
    dtype: str = flag("float32", "of the model and of products", choices=["float32", "bfloat16"])
    eval_tokens: int = flag(1_000_000, "held-out tokens of the evaluation", 1)
    out: str = flag("runs", "where run folders go")
    name: str | None = flag(None, "folder under --out (default: model, layer, kind, K, seed)")
    overwrite: bool = flag(False, "replace an earlier run of the same name")
    resume: bool = flag(False, "go on with an interrupted run of the same settings")
    checkpoint_minutes: float = flag(10.0, "minutes between checkpoints", 0)
    log_every: int = flag(50, "steps between lines of metrics.jsonl", 1)

    @property
    def peak_lr(self) -> float:
        return 2e-4 / math.sqrt(self.d_sae / 2**14) if self.lr is None else self.lr

    @property
    def end_to_end(self) -> bool:
        """Whether the fine-tune begins with a random SAE, and is all of the training."""
        return self.kl_tokens == self.tokens and not self.start

    def autocast(self, device: torch.device):
        """Products in --dtype; parameters stay float32."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")


PRESETS = {  # flags that a model starts with, by what it is: (V, D, number of blocks)
    (50304, 768, 12): "--layer 8",  # Pythia-160M
    (256000, 2304, 26): "--layer 12",  # Gemma 2 2B
    (2048, 128, 6): "--layer 2 --k 16 --d-sae 1024 --tokens 1.6M --kl-tokens 400k"
    " --context 128 --batch 1024 --buffer 2000 --method kl mse --lr 1e-3 --warmup 50"
    " --dead-after 200k --eval-tokens 100k --log-every 20",  # the embedded one
}


# ---- The sparse autoencoder --------------------------------------------------------------------
def single(x):
    """x in float32, where its own precision is less."""
    return x.float() if x.element_size() < 4 else x


def activate(pre, which):
    """f [N, F] of pre-activations [N, F]: ReLU of those that stay, all others 0. which: K, an int,
    for the K largest of each token; else a floor, one number or [F], for those that reach it."""
    if not isinstance(which, int):
        return pre.relu() * (pre >= which)
    top = pre.relu().topk(which, sorted=False)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values)


def encode(x, b_dec, W_enc, b_enc, select, keep=None):
    """f [N, F] of x [N, D]; 0 where keep [N] is False. select(pre) says which pre-activations stay
    (see `activate`). On the CPU f is a `SparseRows`, of the same values."""
    refuse(x.dim() != 2, f"x has the shape {[*x.shape]}: give [N, D], as x.flatten(0, -2) is")
    if FAST and x.is_cpu:
        return sparse_encode(x, b_dec, W_enc, b_enc, select, keep)
    pre = F.linear(x - b_dec, W_enc, b_enc)  # [N, F]
    if keep is not None:
        pre = pre.masked_fill(~keep[:, None], -torch.inf)
    return activate(pre, select(pre.detach()))


def plain_state(thing) -> dict:
    """An object's own numbers and tensors: what a checkpoint keeps of it, beside a `state_dict`."""
    return {name: x for name, x in vars(thing).items() if type(x) in (int, float, Tensor)}


def counts(f):
    """[F], the tokens on which each latent is active."""
    return f.counts() if isinstance(f, SparseRows) else (f > 0).sum(0)


class SAE(nn.Module):
    """x_hat = f W_dec + b_dec, f = activation((x - b_dec) W_enc' + b_enc) >= 0.

    W_enc and W_dec are both [F, D], a row for each latent. A kind of SAE is a subclass, known by
    `kind` to --sae, that states its difference: which pre-activations stay (`select`, or all of
    `encode`), what it adds to the loss (`penalty`), what moves after a step (`after_step`). Its
    parameters and buffers are saved in SAELens's layout, as the `architecture` there that gives the
    same f (default: its own name, which SAELens refuses); `numbers`, which its constructor takes,
    in cfg.json. Checkpoints have every saved buffer, parameter, plain number and tensor."""

    kind = architecture = ""
    numbers = ("k",)
    scaled = ("b_enc", "b_dec")  # what is in units of x
    unit_norm = True  # whether decoder directions keep norm 1
    idle = 0  # in phase one, [F]: for how many tokens a latent has not fired
    dead = ()  # those for which it is above --dead-after
    l0_target = None  # in phase two, the L0 of the evaluation before it

    def __init_subclass__(cls, kind: str, architecture: str | None = None):
        cls.kind, cls.architecture = kind, architecture or kind
        KINDS[kind] = cls

    def __init__(self, d_model: int, d_sae: int, k: float = 0, seed: int = 0):
        super().__init__()
        refuse(not 0 <= k <= d_sae, f"K = {k} of {d_sae} latents")
        self.k = k  # what it means is the kind's
        generator = torch.Generator().manual_seed(seed)
        directions = F.normalize(torch.randn(d_sae, d_model, generator=generator), dim=-1)
        self.W_enc = nn.Parameter(directions.clone())
        self.W_dec = nn.Parameter(directions)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_model))

    def forward(self, x, keep=None):
        """x_hat [N, D] and f [N, F] of x [N, D]; f is 0 where keep [N] is False."""
        f = self.encode(single(x), keep)
        return f @ self.W_dec + self.b_dec, f

    def encode(self, x, keep=None):
        """f [N, F], a tensor or, on the CPU, `SparseRows`; f.to_dense() is always the tensor."""
        return encode(x, self.b_dec, self.W_enc, self.b_enc, self.select, keep)

    def select(self, pre):
        """Which pre-activations [N, F] stay: K, an int, or a floor. Tokens not kept have -inf."""
        return 0.0

    @torch.no_grad()
    def start(self, x, config: Config):
        """Before the first step, at activations x [N, D]: b_dec of a new SAE is their mean."""
        if not config.start:
            self.b_dec.copy_(x.mean(0))

    def penalty(self, x, x_hat, f, weight, done: float):
        """What is added to mean_n ||x - x_hat||^2 (over D in phase two): AuxK. f: as of `encode`,
        so f.to_dense(); weight [N]: of each token in means; done: share of the phase's steps."""
        return auxk_loss(self, x, x - x_hat) / 32 if len(self.dead) else 0.0

    def after_step(self, f, l0, step: int):
        """What moves after a step (from 0) of training, at f [N, F] and its L0."""

    @torch.no_grad()
    def rescale(self, scale: float | Tensor):
        """From activations x / scale to activations x."""
        for name in self.scaled:
            getattr(self, name).mul_(scale)

    def cfg(self) -> dict:
        """What SAELens's cfg.json says of this kind."""
        return {"architecture": self.architecture}

    def save(self, folder: str | Path, metadata: dict):
        """Writes the SAE in SAELens's layout, or UserError. metadata: model_name, hook_name, ..."""
        numbers = {name: getattr(self, name) for name in self.numbers}
        numbers = {name: n if type(n) is int else float(n) for name, n in numbers.items()}
        refuse(metadata.keys() & numbers.keys(), f"metadata cannot say {', '.join(numbers)}")
        own = {"kind": self.kind, **{name: n for name, n in numbers.items() if n == n}}  # not NaN
        tensors = {k: v for k, v in self.state_dict().items() if k not in numbers}
        cfg = {**self.cfg(), "metadata": {**metadata, "saeft": own}}
        model_loaders.write_sae(folder, tensors, cfg)

    @staticmethod
    def load(source: str | Path) -> SAE:
        """The SAE that `save` or SAELens wrote, in a folder or at owner/name:path on the Hub.
        (A ReLU SAE of others has no lambda, and does not train, until `start`.) UserError where
        there is none, or one that cannot be followed exactly."""
        tensors, cfg = model_loaders.read_sae(source)
        kind, said = kind_of(cfg, source), {**cfg["saeft"], **cfg}
        advice = f"python experiments/convert.py {source} FOLDER"
        with user_errors(f"{source}: not an SAE of kind {kind.kind} as saved; try {advice}"):
            numbers = {name: said[name] for name in kind.numbers if said.get(name) is not None}
            fits = all(abs(n) < 2**31 for n in numbers.values()) and numbers.get("k", 0) >= 0
            refuse(not fits, f"{source} has {numbers!r:.80}")
            sae = kind(cfg["d_in"], cfg["d_sae"], **numbers)
            given = {k: v for k, v in sae.state_dict().items() if k in kind.numbers}
            sae.load_state_dict({**given, **tensors})
        off = (sae.W_dec.norm(dim=-1) - 1).abs().max()
        sae.unit_norm = kind.unit_norm and bool(off < 4e-3)  # as bfloat16 stores it
        return sae.eval()


class TopK(SAE, kind="topk", architecture="topk"):
    """The K largest of each token."""

    def __init__(self, d_model, d_sae, k, seed=0):
        refuse(not k or k % 1, f"K = {k} of {d_sae} latents")
        super().__init__(d_model, d_sae, k, seed)

    def select(self, pre):
        return int(self.k)

    def cfg(self):
        return {**super().cfg(), "k": int(self.k), "rescale_acts_by_decoder_norm": False}


class JumpReLU(SAE, kind="jumprelu", architecture="jumprelu"):
    """Those above a threshold of the latent's own [F] (arXiv 2407.14435). The thresholds of a
    published SAE stay as they are; experiments/forks/jumprelu.py trains them."""

    numbers = ()
    scaled = ("b_enc", "b_dec", "threshold")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("threshold", torch.zeros_like(self.b_enc))

    def select(self, pre):
        return torch.nextafter(self.threshold, self.threshold + 1)  # strictly above

    def start(self, x, config):
        new = self.kind == "jumprelu" and not config.start
        refuse(new, "--sae jumprelu is for --start: its thresholds do not train")
        super().start(x, config)


class BatchTopK(JumpReLU, kind="batchtopk", architecture="jumprelu"):
    """The K N largest of N tokens (of each GPU) in training, later those above a `threshold`, one
    for all latents, that leaves K a token on average (arXiv 2412.06410). In a fine-tune K is the L0
    evaluated before it; in bfloat16 several may be the last one."""

    numbers = ("k",)

    def select(self, pre):
        if not self.training:
            return super().select(pre)
        k = self.l0_target or self.k  # a published threshold may leave another L0 than K
        n = (pre[:, 0] != -torch.inf).sum()  # tokens kept
        largest = pre.flatten().topk(math.ceil(k * len(pre))).values
        last = (k * n).round().long().clamp_min(1) - 1
        return largest.gather(0, last[None])[0]  # indexing would wait for the device

    @torch.no_grad()
    def after_step(self, f, l0, step):
        """The threshold is a running mean, of weight 1/50, of the least activation kept. (That of
        dictionary_learning, 1/1000, lags behind in short runs.)"""
        values = F.pad(f.values, (0, 1)) if isinstance(f, SparseRows) else f  # of which one may be
        least = mean_over_ranks(values.masked_fill(values <= 0, torch.inf).amin())
        least = torch.where(least.isfinite(), least, self.threshold).to(self.threshold.dtype)
        self.threshold.lerp_(least, max(1 / (step + 1), 0.02))


class ReLU(SAE, kind="relu", architecture="standard"):
    """All that are positive; lambda sum_i f_i ||W_dec[i]|| takes the place of AuxK. In phase one
    lambda rises over the first 20th of the steps; in phase two it moves towards the L0 that phase
    one ended with, as evaluated."""

    numbers = ("l1",)
    scaled = ("b_enc", "b_dec", "l1")
    unit_norm = False  # the penalty weighs the directions' norms instead

    def __init__(self, *args, l1: float = math.nan, **kwargs):
        super().__init__(*args, **kwargs)
        refuse(l1 < 0, f"lambda = {l1}")
        self.register_buffer("l1", torch.tensor(float(l1)))  # lambda; NaN until `start` knows it

    @torch.no_grad()
    def start(self, x, config):
        """A published SAE does not say its lambda. It is the one at which the SAE is at rest, where
        scaling all f leaves its loss the same: 2 sum <x - x_hat, x_hat - b_dec> / sum_n sum_i f_i
        ||W_dec[i]||."""
        super().start(x, config)
        scale = single(x).pow(2).sum(-1).mean().sqrt()
        if config.l1 is not None or not config.start:
            self.l1.copy_(scale * (0.1 if config.l1 is None else config.l1))
        elif self.l1.isnan():
            x = x[:4096]
            x_hat, f = self(x)
            along = 2 * ((x - x_hat) * (x_hat - self.b_dec)).sum()
            self.l1.copy_((along / self.weighed(f)).clamp_min(1e-4 * scale))

    def weighed(self, f):
        return (f * self.W_dec.norm(dim=-1)).sum()

    def penalty(self, x, x_hat, f, weight, done):
        rise = 1.0 if self.l0_target else min(1.0, 20 * done)
        return rise * self.l1 * self.weighed(f) * weight.max()  # tokens of no weight have no f

    def after_step(self, f, l0, step):
        if self.l0_target:
            self.l1 *= torch.where(l0 > self.l0_target, 1.001, 0.999)


def kind_of(cfg: dict, source="") -> type[SAE]:
    """The class of a cfg of `read_sae`: what wrote it, where that is known here, else the first one
    of SAELens's architecture. UserError for others."""
    other = cfg.get("architecture") in (None, "standard") and cfg.get("k")
    refuse(other, f"{source}: cfg.json has k = {cfg.get('k')!r:.60}, but no architecture with one")
    architecture = str(cfg.get("architecture", "standard"))
    kinds = {name: kind for name, kind in KINDS.items() if kind.architecture == architecture}
    known = ", ".join(sorted({kind.architecture for kind in KINDS.values()}))
    known += " (experiments/convert.py reads more)"
    refuse(not kinds, f"{source}: architecture {architecture!r:.60}; there are {known}")
    return kinds.get(str(cfg["saeft"].get("kind")), next(iter(kinds.values())))


# ---- The losses --------------------------------------------------------------------------------
def auxk_loss(sae: SAE, x, error):
    """AuxK: sum_n ||e - e_hat||^2 / sum_n ||e - mean(e)||^2 of the error e = x - x_hat [N, D] and
    its reconstruction e_hat, without bias, by the D/2 most active dead latents."""
    e, dead = error.detach(), sae.dead
    k = min(x.shape[1] // 2, len(dead))
    f = encode(x, sae.b_dec, sae.W_enc[dead], sae.b_enc[dead], lambda pre: k)
    variance = (e - mean_over_ranks(e.mean(0))).pow(2).sum()
    return (e - f @ sae.W_dec[dead]).pow(2).sum() / mean_over_ranks(variance)


def kl_divergence(log_p, log_q, next_token):
    """KL(p || q) [n], of log-probabilities [n, V]; next_token [n] would serve a cross entropy."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def slices(n_tokens: int, W_U) -> list[slice]:
    """Slices of about 8M logits each, but not so small that reading W_U costs the most."""
    rows = max(2**23 // len(W_U), 128 if W_U.is_cpu else 512)
    return [slice(i, i + rows) for i in range(0, n_tokens, rows)]


class SlicedLoss(torch.autograd.Function):
    """sum_n weight_n d(log p_n, log q_n, next token n) [m], of m models q; logits [N, V] never
    exist at once.

    Takes lm, the divergence d of each q, weight [N], next tokens [N], and the last block's output
    [N, D] for p and for each q. Each slice's gradient is taken in the forward pass."""

    @staticmethod
    def forward(ctx, lm: LanguageModel, divergences: list, weight, next_token, last_p, *lasts_q):
        sums = weight.new_zeros(len(lasts_q))
        grads = [torch.empty_like(last_q) for last_q in lasts_q]
        for rows in slices(len(weight), lm.W_U):
            log_p = single(lm.unembed(last_p[rows])).log_softmax(-1)  # [n, V]
            for i, last_q in enumerate(lasts_q):
                with torch.enable_grad():
                    last = last_q[rows].detach().requires_grad_()
                    log_q = single(lm.unembed(last)).log_softmax(-1)
                    part = (weight[rows] * divergences[i](log_p, log_q, next_token[rows])).sum()
                grads[i][rows] = torch.autograd.grad(part, last)[0]
                sums[i] += part.detach()
        ctx.save_for_backward(*grads)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        grads = [g[i] * grad for i, grad in enumerate(ctx.saved_tensors)]
        return None, None, None, None, None, *grads


# ---- Which tokens count, and the buffer of activations -----------------------------------------
ALL_SINKS = "--sink-norm leaves no token to train on: give a larger one"


def resid_post(lm: LanguageModel, tokens, layer: int):
    """The residual stream [B, T, D] after block `layer`, and what the SAE reads of it: all of it.
    (At another place it reads less, and the stream changes by x_hat - x.)"""
    resid = lm.prefix(tokens, layer)
    return resid, resid


PLACES["resid_post"] = resid_post


def content(x, n_skip: int, limit):
    """[B, T]: which positions of x [B, T, D] count. Not the first n_skip (<bos>), and not the
    attention sinks, a few tokens whose norm is many times the median's and tells nothing."""
    keep = single(x).norm(dim=-1) <= limit
    keep[:, :n_skip] = False
    return keep


@torch.no_grad()
def collect(lm: LanguageModel, tokens, config: Config):
    """x [n, T, D] for tokens [n, T], about 8192 tokens at a time; later blocks never run."""
    parts, done = [], 0
    for chunk in tokens.split(max(1, 8192 // tokens.shape[1])):
        parts.append(PLACES[config.place](lm, chunk, config.layer)[1])
        done += chunk.numel()
        progress(f"activations: {done:,} of {tokens.numel():,} tokens")
    return torch.cat(parts)


def first_activations(lm: LanguageModel, stream: TokenStream, n: int, config: Config):
    """Content x [N, D] of the first sequences, at most n and about 32k tokens, and the norm above
    which a token is a sink."""
    n = min(n, 32_768 // config.context + 1)
    x = collect(lm, stream.train(0, n).to(lm.W_U.device), config)
    median = single(x[:, lm.n_skip :]).norm(dim=-1).median()
    limit = median * config.sink_norm if config.sink_norm else torch.full_like(median, torch.inf)
    x = single(x[content(x, lm.n_skip, limit)])
    refuse(len(x) == 0, ALL_SINKS)
    return x, limit


@dataclass
class ActivationBuffer:
    """Serves activations of many sequences in random order. When half of its rows [size, D] are
    used, those of new sequences join the rest, and all are shuffled."""

    lm: LanguageModel
    stream: TokenStream
    n_sequences: int
    limit: Tensor  # the norm above which a token is a sink
    config: Config
    used: int = 0
    next_sequence: int = 0
    refills: int = 0
    seconds: float = 0.0  # of all refills

    def __post_init__(self):
        self.rows = self.lm.W_U.new_empty(0, self.lm.W_U.shape[1])

    def refill(self):
        began, lm, config = time.monotonic(), self.lm, self.config
        per_sequence = config.context - lm.n_skip
        free = per_sequence * config.buffer + 2 * config.batch - (len(self.rows) - self.used)
        n = min(free // per_sequence, (self.n_sequences - self.next_sequence) // world_size())
        tokens = own_sequences(self.stream, self.next_sequence, n, lm.W_U.device)
        x = collect(lm, tokens, config)
        keep = content(x, lm.n_skip, self.limit)
        rows = torch.cat([self.rows[self.used :], x[keep]])
        self.next_sequence += n * world_size()
        self.refills += 1
        seed = (config.seed * 1009 + rank()) * 1_000_003 + self.refills
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        self.rows, self.used = rows[order.to(rows.device)], 0
        self.seconds += time.monotonic() - began

    def next_batch(self, n: int):
        """[n, D] activations in float32."""
        has_more = self.n_sequences - self.next_sequence >= world_size()
        if 2 * self.used >= len(self.rows) and has_more:
            self.refill()
        while self.used + n > len(self.rows):  # sinks left too few: again from the first sequence
            left = len(self.rows) - self.used
            self.next_sequence = 0
            self.refill()
            refuse(len(self.rows) == left, ALL_SINKS)
        self.used += n
        return self.rows[self.used - n : self.used].float()


# ---- What both phases share --------------------------------------------------------------------
@dataclass
class Trainee:
    """What a method trains. A method that differs in more than fields overrides what follows.

    `insert` maps x [N, D] and keep [N] to x_hat [N, D] and f [N, F]: the SAE itself, or an SAE with
    an adapter. Parameters of `trained` that require a gradient train. `divergence` is a function
    of log p, log q [n, V] and next tokens [n], its mean above 0; None: the MSE alone, later blocks
    do not run."""

    sae: SAE
    lm: LanguageModel | None = None
    divergence: Callable | None = kl_divergence
    insert: nn.Module | None = None  # default: the SAE
    trained: nn.Module | None = None  # default: what is inserted
    decay: float = 0.01  # AdamW's weight decay, as published for the fine-tune
    lr: float | None = None  # first rate of the fine-tune; default: --kl-lr, or `finetune_lr`

    def __post_init__(self):
        self.insert = self.insert or self.sae
        self.trained = self.trained or self.insert
        self.parameters = [p for p in self.trained.parameters() if p.requires_grad]
        refuse(not self.parameters, "--method: nothing to train; are there blocks after --layer?")
        lost = self.trained is not self.sae and type(self).save is Trainee.save
        refuse(lost, "--method: it trains more than the SAE, which its Trainee needs a `save` for")
        self.optimizer = AdamW(self.parameters, weight_decay=self.decay, fused=True)

    def rate(self, step: int, steps: int, config: Config) -> float:
        """The learning rate of a step of phase two: it falls linearly to 0, but that of end to end
        is phase one's."""
        given = config.peak_lr if config.end_to_end else config.kl_lr
        first = next(lr for lr in (self.lr, given, finetune_lr(self.sae, steps)) if lr is not None)
        warmup, decay = (config.warmup, 0.2) if config.end_to_end else (0, 1.0)
        return first * lr_factor(step, steps, warmup, decay)

    def loss(self, kl, mse, beta, penalty):
        """Of phase two, where there is a divergence (else mse + penalty); beta = MSE / KL, and the
        penalty is that of the kind, over D as the MSE."""
        return (beta * kl + mse) / 2 + penalty

    def splice(self, tokens, resid, x, keep, config: Config):
        """x, x_hat [B T, D], f, and the stream resid with x_hat for x where keep [B, T] is True."""
        with config.autocast(x.device):
            x_hat, f = self.insert(x.flatten(0, 1), keep.flatten())
        spliced = (resid + (x_hat.view_as(x) - x)).to(resid.dtype)
        return single(x).flatten(0, 1), x_hat, f, torch.where(keep[..., None], spliced, resid)

    def save(self, folder: Path, metadata: dict):
        """Writes what was trained, so that it gives the same figures: here, an SAE."""
        self.sae.save(folder, metadata)

    def state_dict(self) -> dict:
        """For checkpoints. A method whose Trainee has more that moves adds it here."""
        adapted = [] if self.trained is self.sae else self.trained.named_parameters()
        frozen = {name for name, p in adapted if not p.requires_grad}  # which are as they were
        trained = {k: v for k, v in self.trained.state_dict().items() if k not in frozen}
        optimizer, own = self.optimizer.state_dict(), plain_state(self.sae)
        return {"trained": trained, "optimizer": optimizer, "own": own}

    def load_state_dict(self, state: dict):
        self.trained.load_state_dict(state["trained"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        vars(self.sae).update(state["own"])


@dataclass
class Phase:
    """Training of some SAEs on the same tokens, and its state between steps."""

    name: str
    trainees: list[Trainee]
    steps: int
    limit: Tensor  # the norm above which a token is a sink
    scale: Tensor | float = 1.0  # phase one: of its x
    first: int = 0  # phase two: its first sequence
    buffer: ActivationBuffer | None = None  # phase one
    step: int = 0
    began: float = field(default_factory=time.monotonic)  # as if it had gone on since

    def time_left(self, now: float) -> str:
        """At the mean pace of steps and, by themselves, of the buffer's refills."""
        seconds, left = now - self.began, 0.0
        if self.buffer:
            seconds -= self.buffer.seconds
            read = self.buffer.next_sequence / self.buffer.n_sequences  # again from 0 at the end
            left = (1 / max(read, self.step / self.steps) - 1) * self.buffer.seconds
        left += seconds / self.step * (self.steps - self.step)
        return f"{left:.0f} s left" if left < 60 else f"{left / 60:.1f} minutes left"

    def state_dict(self) -> dict:
        trainees = [t.state_dict() for t in self.trainees]
        buffer = plain_state(self.buffer) if self.buffer else {}
        return {"name": self.name, "step": self.step, "trainees": trainees, "buffer": buffer}

    def load_state_dict(self, state: dict):
        self.step = state["step"]
        for t, saved in zip(self.trainees, state["trainees"]):
            t.load_state_dict(saved)
        if self.buffer:
            vars(self.buffer).update(state["buffer"])


def lr_factor(step: int, steps: int, warmup: int, decay: float) -> float:
    """Rises for `warmup` steps, at most a tenth of all; falls to 0 over the last share `decay`."""
    rise = (step + 1) / max(1, min(warmup, steps // 10))
    return min(1.0, rise, (steps - step) / max(1.0, decay * steps))


def finetune_lr(sae: SAE, steps: int) -> float:
    """The first rate of a fine-tune: 0.36 / sqrt(F D), near the best of 50k tokens by
    experiments/length.py; above 740 steps less by their root, and so for Pythia-160M and 25M tokens
    (on one GPU) the published 5e-5."""
    return 0.36 / math.sqrt(sae.W_enc.numel()) * min(1.0, math.sqrt(740 / steps))


def variance_of(x, weight):
    """sum_n weight_n ||x_n - mean||^2 of x [N, D] in a mean process, around the mean of all."""
    mean = mean_over_ranks(weight @ x)
    return mean_over_ranks(weight @ (x - mean).pow(2).sum(-1))


def update(t: Trainee, lr: float):
    """The step after `backward`: mean over GPUs, no gradient along the decoder's directions, norm
    clipped to 1, Adam, unit norm again. Returns the norm: where it is not finite, no parameter
    has changed."""
    unit_norm = t.trained is t.sae and t.sae.unit_norm and t.sae.W_dec.requires_grad
    for p in t.parameters:
        refuse(p.grad is None, f"what trains has a parameter {[*p.shape]} without a gradient")
        p.grad = mean_over_ranks(p.grad)
    if unit_norm:
        W_dec, grad = t.sae.W_dec.data, t.sae.W_dec.grad
        along = torch.linalg.vecdot(grad, W_dec)  # [F]
        grad.addcmul_(along[:, None], W_dec, value=-1)
    refuse(not t.optimizer.defaults.get("fused"), "the optimizer of a Trainee is a fused one")
    rates = {group["lr"] for group in t.optimizer.param_groups}
    refuse(len(rates) > 1, f"the groups of an optimizer have one rate, Trainee.rate; not {rates}")
    norm = torch.nn.utils.get_total_norm([p.grad for p in t.parameters])
    t.optimizer.grad_scale = norm.clamp_min(1.0)  # the fused kernel divides by it,
    t.optimizer.found_inf = (~norm.isfinite()).float()  # and does nothing where this is 1
    for group in t.optimizer.param_groups:
        group["lr"] = lr
    t.optimizer.step()
    t.optimizer.zero_grad()
    if unit_norm:
        F.normalize(W_dec, dim=-1, out=W_dec)
    return norm


# ---- Phase one: MSE on shuffled activations ----------------------------------------------------
def train_mse(phase: Phase, config: Config, after_step: Callable):
    """Phase one, on x / scale: batches of shuffled activations, each for all its SAEs."""
    for step in range(phase.step, phase.steps):
        torch.manual_seed(config.seed * 1_000_003 + step)  # of what a kind draws
        x = phase.buffer.next_batch(config.batch) / phase.scale  # [N, D]
        lr = config.peak_lr * lr_factor(step, phase.steps, config.warmup, decay=0.2)
        figures = [mse_step(t, x, lr, step, phase.steps, config) for t in phase.trainees]
        phase.step = step + 1
        after_step(phase, figures)


def mse_step(t: Trainee, x, lr: float, step: int, steps: int, config: Config) -> dict:
    """A step on x [N, D]: mean_n ||x - x_hat||^2 and the kind's penalty. Returns loss, FVU, L0 and
    the norm of the gradient."""
    x, n = single(x), len(x) * world_size()
    weight = x.new_full((len(x),), 1 / len(x))
    with config.autocast(x.device):
        x_hat, f = t.sae(x)
        penalty = t.sae.penalty(x, x_hat, f, weight, step / steps)
    error = (x - x_hat).pow(2).sum(-1).mean()
    loss = error + penalty
    loss.backward()
    norm = update(t, lr)

    fired = sum_over_ranks(counts(f))  # [F]
    l0 = fired.sum() / n
    t.sae.after_step(f, l0, step)
    t.sae.idle = torch.where(fired > 0, 0, t.sae.idle + n)
    if step % 20 == 0:  # not at every step, since `nonzero` waits for the device
        t.sae.dead = (t.sae.idle > config.dead_after).nonzero()[:, 0]
    fvu = error.detach() / variance_of(x, weight)
    return {"loss": loss.detach(), "fvu": fvu, "l0": l0, "grad_norm": norm}


# ---- Phase two: KL+MSE on whole sequences ------------------------------------------------------
def finetune(phase: Phase, lm, stream: TokenStream, config: Config, after_step: Callable):
    """Phase two, on sequences from phase.first on. Blocks 0..L run once for all."""
    d_model = lm.W_U.shape[1]
    divergences = [t.divergence for t in phase.trainees]
    by_mse = not any(divergences)  # no later block runs
    for step in range(phase.step, phase.steps):
        first = phase.first + step * config.kl_batch * world_size()
        tokens = own_sequences(stream, first, config.kl_batch, lm.W_U.device)  # [B, T]
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout, where a method has it
        with torch.no_grad():
            resid, x = PLACES[config.place](lm, tokens, config.layer)  # [B, T, D]
            keep = content(x, lm.n_skip, phase.limit)  # [B, T]
            n = mean_over_ranks(keep.sum().float()).clamp_min(1)  # tokens, in a mean process
            weight = keep.flatten() / n  # [N]; the mean of y is mean_over_ranks(weight @ y)
            last_p = None if by_mse else lm.suffix(resid, config.layer).flatten(0, 1)

        passes = [t.splice(tokens, resid, x, keep, config) for t in phase.trainees]
        kls = n.new_zeros(len(passes))
        if not by_mse:
            lasts_q = []
            for t, (*_, spliced) in zip(phase.trainees, passes):
                lasts_q.append(t.lm.suffix(spliced, config.layer).flatten(0, 1))
            next_token = F.pad(tokens[:, 1:], (0, 1), value=-100).flatten()  # -100: there is none
            kls = SlicedLoss.apply(lm, divergences, weight, next_token, last_p, *lasts_q)

        losses, figures = [], []
        for t, (x, x_hat, f, _), kl in zip(phase.trainees, passes, kls):
            mse = weight @ (x - x_hat).pow(2).mean(-1)
            beta = mean_over_ranks(mse.detach()) / (mean_over_ranks(kl.detach()) + 1e-8)
            with config.autocast(x.device):
                penalty = t.sae.penalty(x, x_hat, f, weight, step / phase.steps) / d_model
            loss = mse + penalty if by_mse else t.loss(kl, mse, beta, penalty)
            losses.append(loss)
            l0 = sum_over_ranks(counts(f)).sum() / (n * world_size())
            row = {"loss": loss, "mse": mse, "l0": l0}
            row["fvu"] = mse * d_model / variance_of(x.detach(), weight)
            if not by_mse:
                row.update(kl=kl, beta=beta)
            figures.append({name: value.detach() for name, value in row.items()})
        sum(losses).backward()  # each loss reaches its own SAE alone

        for t, (_, _, f, _), row in zip(phase.trainees, passes, figures):
            row["grad_norm"] = update(t, t.rate(step, phase.steps, config))
            if t.sae.training:
                t.sae.after_step(f, row["l0"], step)
        phase.step = step + 1
        after_step(phase, figures)


METHODS["kl"] = lambda lm, sae, config: Trainee(sae, lm)
METHODS["mse"] = lambda lm, sae, config: Trainee(sae, lm, divergence=None)  # the control


# ---- Evaluation --------------------------------------------------------------------------------
def ce_and_kl(lm: LanguageModel, lasts: list[Tensor], targets):
    """[m, 2], summed over N tokens: CE on targets [N] of each of m outputs [N, D] of the last
    block, and KL from the first one's distribution to it. A slice of tokens at a time."""
    sums = torch.zeros(len(lasts), 2, dtype=torch.double, device=targets.device)
    for rows in slices(len(targets), lm.W_U):
        log_p = single(lm.unembed(lasts[0][rows])).log_softmax(-1)  # [n, V]
        for i, last in enumerate(lasts):
            log_q = single(lm.unembed(last[rows])).log_softmax(-1) if i else log_p
            sums[i, 0] += F.nll_loss(log_q, targets[rows], reduction="sum")
            sums[i, 1] += F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return sums


@torch.no_grad()
def evaluate(lm, tokens, trainees: list[Trainee], limit, config: Config, label="evaluating"):
    """Figures, on held-out tokens [n, T], of the model, and of each trainee, in a list. `label`
    begins the line for the reader.

    ce, kl: nats per token. gap: CE above the model's own. fvu: share of the variance of x left
    unexplained. l0: active latents per token. dead: latents that never fire here. left_out: the
    share of positions without content (`content`, by `limit`), which do not count."""
    sums = collections.defaultdict(int)  # over all batches
    batches = tokens[rank() :: world_size()].to(lm.W_U.device).split(8)
    for number, batch in enumerate(batches):
        progress(f"{label}: {number / len(batches):.0%}", now=number == 0)
        resid, x = PLACES[config.place](lm, batch, config.layer)  # [B, T, D]
        keep = content(x, lm.n_skip, limit)  # [B, T]
        zero = torch.where(keep[..., None], resid - x, resid)
        passes = [(lm, resid), (lm, zero)]  # the model's own, and ablated
        for i, t in enumerate(trainees):
            own_x, x_hat, f, spliced = t.splice(batch, resid, x, keep, config)
            passes.append((t.lm, spliced))
            own_x, x_hat = (y[keep.flatten()].double() for y in (own_x, x_hat))
            sums["error", i] += (own_x - x_hat).pow(2).sum()
            sums["x", i] += own_x.sum(0)
            sums["x^2", i] += own_x.pow(2).sum()
            sums["fired", i] += counts(f)
        scored = keep[:, :-1]  # a token's next one is its target
        lasts = [m.suffix(s, config.layer)[:, :-1][scored] for m, s in passes]
        sums["ce, kl"] += ce_and_kl(lm, lasts, batch[:, 1:][scored])
        sums["kept"] += keep.sum()
        sums["scored"] += scored.sum()
    sums = {name: sum_over_ranks(value) for name, value in sums.items()}

    kept = sums["kept"].item()
    few = kept < 2 or not sums["scored"]
    refuse(few, "no token to evaluate: raise --context, --eval-tokens, --sink-norm")
    (ce_original, _), (ce_zero, _), *rows = (sums["ce, kl"] / sums["scored"]).tolist()
    damaged = not math.isfinite(ce_original + ce_zero)
    refuse(damaged, "the model's own CE is not finite: a damaged model, or another --dtype is due")
    model = {"ce_original": ce_original, "ce_zero": ce_zero, "left_out": 1 - kept / tokens.numel()}
    figures = []
    for i, (ce, kl) in enumerate(rows):
        fired = sums["fired", i]
        row = {"ce": ce, "gap": ce - ce_original, "kl": kl}
        variance = sums["x^2", i] - sums["x", i].pow(2).sum() / kept
        row["fvu"] = (sums["error", i] / variance).item()
        row["l0"] = fired.sum().item() / kept
        row["dead"] = int((fired == 0).sum())
        lost = ce_zero - ce_original
        row["loss_recovered"] = (ce_zero - ce) / lost if lost else None
        broken = not math.isfinite(ce + row["fvu"])
        refuse(broken, f"{label}: CE {ce}: it is damaged, or its rate was too high")
        figures.append(row)
    return model, figures


# ---- Fast paths: on the CPU, the same values in less time --------------------------------------
@dataclass
class SparseRows:
    """A sparse f [N, F], which stands for the tensor in what an SAE does with it: f @ W [F, D],
    f * weights [F], sum, counts, to_dense.

    Its P entries stand token by token; `order` sorts them by latent. Where a token has fewer than
    K positive latents the rest of its values are 0."""

    values: Tensor  # [P]
    rows: Tensor  # [P], ascending: which token
    columns: Tensor  # [P]: which latent
    shape: torch.Size  # N, F
    order: Tensor  # [P]

    def __matmul__(self, table):
        refuse(len(table) != self.shape[1], f"a table of {len(table)} for {self.shape[1]} latents")
        return SparseProduct.apply(self.values, self, table)

    def __mul__(self, weights):
        weights = torch.as_tensor(weights).expand(self.shape[1])
        return replace(self, values=self.values * weights[self.columns])

    def sum(self):
        return self.values.sum()

    def counts(self):
        fired = torch.zeros(self.shape[1], dtype=torch.long)
        return fired.index_add_(0, self.columns, (self.values > 0).long())

    def to_dense(self):
        return self.values.new_zeros(self.shape).index_put((self.rows, self.columns), self.values)

    def by_latent(self, values):
        """The entries of f' [F, N], with these values (in f's order), as `times` takes them."""
        return values[self.order], self.columns[self.order], self.rows[self.order]


def largest(pre, k: int):
    """The k largest of each row of pre [N, F], and their columns [N, k]; of many columns in half to
    two thirds of topk's time: they lie in the k groups of 8 columns whose maxima are largest."""
    n = pre.shape[1]
    if n % 8 or n < 16 * k:
        return pre.topk(k, sorted=False)
    maxima = pre.unflatten(1, (8, n // 8)).amax(1)  # of columns c, c + n / 8, c + 2 n / 8, ...
    first = largest(maxima, k)[1]
    columns = (first[:, None] + torch.arange(0, n, n // 8)[:, None]).flatten(1)  # [N, 8 k]
    values, best = pre.gather(1, columns).topk(k, sorted=False)
    return values, columns.gather(1, best)


def times(values, rows, columns, table, n: int):
    """The product [n, D] of a sparse matrix of n rows, its entries in their order, and a table."""
    offsets = torch.searchsorted(rows, torch.arange(n))
    return F.embedding_bag(columns, table, offsets, mode="sum", per_sample_weights=values)


class SparseProduct(torch.autograd.Function):
    """f @ W [N, D] and its gradients for g [N, D]: f' g, and g W' at the entries of f alone, which
    is the derivative of <f' g, W> by f; torch has it for `times`."""

    @staticmethod
    def forward(ctx, values, f: SparseRows, table):
        ctx.f = f
        ctx.save_for_backward(values, table)
        return times(values, f.rows, f.columns, table, f.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        values, table = ctx.saved_tensors
        values, latents, tokens = ctx.f.by_latent(values)
        with torch.enable_grad():
            values.requires_grad_()
            d_table = times(values, latents, tokens, g, len(table))
        (d_values,) = torch.autograd.grad(d_table, values, table)
        d_values = torch.empty_like(d_values).index_copy_(0, ctx.f.order, d_values)
        return d_values, None, d_table.detach()


class SparseEncoder(torch.autograd.Function):
    """The values of f, and their gradients. With h [N, F] = d loss / d f where f > 0, else 0:
    dW_enc = h' (x - b_dec), db_enc = sum_n h, dx = h W_enc, db_dec = -sum_n dx."""

    @staticmethod
    def forward(ctx, x, b_dec, W_enc, b_enc, centred, f: SparseRows):
        ctx.f = f
        ctx.save_for_backward(centred, W_enc, f.values)
        return f.values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        centred, W_enc, values = ctx.saved_tensors
        f, h = ctx.f, g * (values > 0)
        dW_enc = times(*f.by_latent(h), centred, len(W_enc))
        db_enc = torch.zeros_like(W_enc[:, 0]).index_add_(0, f.columns, h.to(W_enc.dtype))
        dx = times(h, f.rows, f.columns, W_enc, len(centred)) if ctx.needs_input_grad[0] else None
        return dx, -(db_enc @ W_enc), dW_enc, db_enc, None, None


def sparse_encode(x, b_dec, W_enc, b_enc, select, keep) -> SparseRows:
    """`encode`, for the CPU: the encoder's is the one dense product."""
    with torch.no_grad():
        centred = x - b_dec
        pre = F.linear(centred, W_enc, b_enc)  # [N, F], in bfloat16 under autocast
        if keep is not None:
            pre.masked_fill_(~keep[:, None], -torch.inf)
        which = select(pre)
        if isinstance(which, int):  # K entries of each token
            values, columns = largest(pre, which)
            values, columns = values.relu().flatten(), columns.flatten()
            rows = torch.arange(len(x)).repeat_interleave(which)
        else:  # all that reach a floor
            none = (pre <= 0).logical_or_(pre < which)  # which keeps NaN
            rows, columns = none.logical_not_().nonzero(as_tuple=True)
            values = pre[rows, columns]
        # A stable sort of int32 is a radix sort on the CPU, many times faster than the others.
        order = columns.int().sort(stable=True).indices
        f = SparseRows(single(values), rows, columns, pre.shape, order)
    if torch.is_grad_enabled():
        f = replace(f, values=SparseEncoder.apply(x, b_dec, W_enc, b_enc, centred, f))
    return f


# ---- Language models: what the families share --------------------------------------------------
ANY = "any number above 0"


def read_settings(config: dict, known: dict) -> SimpleNamespace:
    """A config.json's settings as attributes. UserError, with key and value, for others than those
    known: key -> a list of values, ANY among them for numbers, first what silence means; or the
    number that silence means, where it is any; or None, where there must be one."""
    read = dict(config)
    for key, values in known.items():
        listed = isinstance(values, list)
        value = read.setdefault(key, values[0] if listed else values)
        number = type(value) in (int, float) and 0 < value < 2**31
        fits = value in values or number and ANY in values if listed else number
        supported = values if listed else ANY
        refuse(not fits, f"config.json has {key} = {value!r:.80}; supported: {supported}")
    return SimpleNamespace(**read)


def rope_tables(resid, dim: int, base: float, factor: float):
    """cos and sin [T, dim] of rotary positions (RoFormer, arXiv 2104.09864), divided by factor, on
    `dim` dimensions of a head, half-split; for resid [B, T, D], in its dtype."""
    inv_freq = 1 / base ** (torch.arange(0, dim, 2, device=resid.device) / dim)
    positions = torch.arange(resid.shape[1], device=resid.device).float() / factor
    angles = torch.outer(positions, inv_freq).repeat(1, 2)
    return angles.cos().to(resid.dtype), angles.sin().to(resid.dtype)


def read_rope(config: dict, head_dim: int, base: float, share: float, layer_type="") -> tuple:
    """dim, base and factor of `rope_tables`, as either spelling has them: `rope_parameters`, of
    Gemma 3 for each layer type, or older keys (`base`, `share` of a head's dimensions), of which
    rope_scaling is in Gemma 3 about full attention alone. UserError for other kinds of scaling."""
    rope, old = config.get("rope_parameters"), config.get("rope_scaling")
    refuse(rope and old and rope != old, "config.json has rope_parameters and another rope_scaling")
    if not rope:
        rope = {} if layer_type == "sliding_attention" else old or {}
    elif layer_type:  # a flat one is not what it seems: transformers ignores it
        refuse(layer_type not in rope, f"config.json has rope_parameters without {layer_type}")
        rope = rope[layer_type]
    kind = rope.get("rope_type", rope.get("type", "default"))
    names = {"rope_type", "type", "rope_theta", "factor", "partial_rotary_factor"}
    if layer_type and "rope_type" not in rope:  # by transformers' version it counts or does not
        names.remove("type")
    other = kind not in ("default", "linear") or not rope.keys() <= names
    refuse(other, f"config.json has rotary positions {rope!r:.80}")
    known = {"rope_theta": base, "factor": None if kind == "linear" else [1.0]}
    # Gemma knows no other share than 1.
    known["partial_rotary_factor"] = [1.0, None] if share == 1 else [share, None, ANY]
    rope = read_settings(rope, known)
    dim = int(head_dim * (rope.partial_rotary_factor or share))
    return dim, rope.rope_theta, rope.factor


def rotate(x, cos, sin):
    """Turns the first dimensions, as many as cos has, of every head; x is [B, H, T, head_dim]."""
    dim = cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1)


def soft_cap(x, cap: float | None):
    """cap * tanh(x / cap), or x itself where there is no cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


class LanguageModel(nn.Module):
    """Runs to block L, goes on from block L + 1, unembeds. Parameters are named as in checkpoints:
    a body of embedding, blocks and final norm, and maybe a head; else the embedding unembeds.

    A family is a subclass, in FAMILIES by the model_type of its config.json: what that means
    (what `read_settings` takes), the blocks, the names of the parts."""

    block_kind = norm_kind = nn.Identity  # classes; a block is made of settings and its number
    names = ()  # of body, embedding, blocks, final norm and head
    eps = ""  # the setting of the norms
    known = dict.fromkeys(["vocab_size", "hidden_size", "intermediate_size"])  # there must be
    known.update(num_hidden_layers=None, num_attention_heads=None, max_position_embeddings=8192)
    known.update(is_causal=[True])
    n_skip = 0  # leading positions without content (<bos>)
    preset = ""  # flags that models of the family start with
    load_tokenizer = staticmethod(model_loaders.load_tokenizer)  # (name, bos) -> its tokenizer

    def __init__(self, config: dict):
        super().__init__()
        c = read_settings(config, self.known)
        n_layers = c.num_hidden_layers
        refuse(n_layers > 1000, f"config.json has num_hidden_layers = {n_layers}: above 1000")
        self.max_context = c.max_position_embeddings
        self.settings = c
        c.norm = functools.partial(self.norm_kind, eps=getattr(c, self.eps))
        body, embedding, blocks, final_norm, head = self.names
        parts = nn.ModuleDict()
        parts[embedding] = nn.Embedding(c.vocab_size, c.hidden_size)
        parts[blocks] = nn.ModuleList(self.block_kind(c, i) for i in range(n_layers))
        parts[final_norm] = c.norm(c.hidden_size)
        self.add_module(body, parts)
        if not c.tie_word_embeddings:
            self.add_module(head, nn.Linear(c.hidden_size, c.vocab_size, bias=False))

    def load(self, name: str, device, dtype: torch.dtype) -> LanguageModel:
        """Takes the weights of the model of that name, frozen. UserError where they do not fit."""
        weights, head = model_loaders.load_weights(name, device, dtype), self.names[-1]
        if f"{head}.weight" in weights:  # whatever config.json says
            self.add_module(head, nn.Linear(*self.W_U.T.shape, bias=False, device="meta"))
        with user_errors(f"{name}: weights do not fit config.json"):
            self.load_state_dict(weights, assign=True)
        return self.eval().requires_grad_(False)

    def part(self, i: int) -> nn.Module:
        """1: the embedding; 2: the blocks; 3: the final norm."""
        return getattr(self, self.names[0])[self.names[i]]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.part(2)

    @property
    def W_U(self):  # [V, D]
        return getattr(self, self.names[-1], self.part(1)).weight

    def embed(self, tokens):
        return self.part(1)(tokens)

    def prefix(self, tokens, layer: int):
        """Output [B, T, D] of block `layer` (-1: the embedding); later blocks never run."""
        refuse(layer not in range(-1, len(self.blocks)), f"there is no block {layer}")
        return self.run_blocks(self.embed(tokens), self.blocks[: layer + 1])

    def suffix(self, resid, layer: int):
        """Output [B, T, D] of the last block, from that of block `layer`."""
        refuse(layer not in range(-1, len(self.blocks)), f"there is no block {layer}")
        return self.run_blocks(resid, self.blocks[layer + 1 :])

    def run_blocks(self, resid, blocks):
        tables = {rope: rope_tables(resid, *rope) for rope in {block.rope for block in blocks}}
        for block in blocks:
            resid = block(resid, *tables[block.rope])
        return resid

    def unembed(self, resid):
        """Logits [..., V] of the last block's output [..., D]."""
        return F.linear(self.part(3)(resid), self.W_U)

    def forward(self, tokens):
        """Logits [B, T, V] of tokens [B, T]."""
        return self.unembed(self.suffix(self.embed(tokens), -1))


# ---- Pythia (GPT-NeoX, arXiv 2304.01373) -------------------------------------------------------
class PythiaAttention(nn.Module):
    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.n_heads = c.num_attention_heads
        self.query_key_value = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.dense = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x, cos, sin):
        # The weight's rows go head by head, the q, k and v of a head side by side.
        qkv = self.query_key_value(x).unflatten(-1, (self.n_heads, -1))
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=-1)  # each [B, H, T, head_dim]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dense(out.transpose(1, 2).flatten(2))


class PythiaMLP(nn.Module):
    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(c.hidden_size, c.intermediate_size)
        self.dense_4h_to_h = nn.Linear(c.intermediate_size, c.hidden_size)
        self.approximate = "tanh" if c.hidden_act == "gelu_fast" else "none"

    def forward(self, x):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate=self.approximate))


class PythiaBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), or one after the other; rotary on a part of a head."""

    attn_out, mlp_out = "attention", "mlp"  # modules whose outputs are added to the stream

    def __init__(self, c: SimpleNamespace, i: int):
        super().__init__()
        head_dim = c.hidden_size // c.num_attention_heads
        read_settings(vars(c), {"head_dim": [head_dim, None]})
        self.rope = read_rope(vars(c), head_dim, c.rotary_emb_base, c.rotary_pct)
        self.parallel = c.use_parallel_residual
        self.input_layernorm = c.norm(c.hidden_size)
        self.post_attention_layernorm = c.norm(c.hidden_size)
        self.attention = PythiaAttention(c)
        self.mlp = PythiaMLP(c)

    def forward(self, x, cos, sin):
        y = x + self.attention(self.input_layernorm(x), cos, sin)
        return y + self.mlp(self.post_attention_layernorm(x if self.parallel else y))


class Pythia(LanguageModel):
    block_kind = PythiaBlock
    norm_kind = nn.LayerNorm
    names = ("gpt_neox", "embed_in", "layers", "final_layer_norm", "embed_out")
    known = {**LanguageModel.known, "rotary_emb_base": 1e4, "rotary_pct": 0.25}
    known.update(layer_norm_eps=1e-5, hidden_act=["gelu", "gelu_fast"], attention_bias=[True])
    known.update(use_parallel_residual=[True, False], tie_word_embeddings=[False, True])
    eps = "layer_norm_eps"


# ---- Gemma 2 (arXiv 2408.00118) and Gemma 3 (arXiv 2503.19786) ---------------------------------
class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), in float32 whatever the model's dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        weight = 1 + single(self.weight)
        return F.rms_norm(single(x), weight.shape, weight, self.eps).to(x.dtype)


class GemmaAttention(nn.Module):
    """Grouped-query attention to the last `window` tokens. Gemma 2 soft-caps the scores; Gemma 3
    norms q and k instead."""

    def __init__(self, c: SimpleNamespace, window: int):
        super().__init__()
        self.n_kv = c.num_key_value_heads
        self.head_dim = c.head_dim
        self.window = window
        self.score_scale = c.query_pre_attn_scalar**-0.5
        self.score_cap = c.attn_logit_softcapping
        d_q, d_kv = c.num_attention_heads * c.head_dim, self.n_kv * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, d_q, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, d_kv, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, d_kv, bias=False)
        self.o_proj = nn.Linear(d_q, c.hidden_size, bias=False)
        self.q_norm = c.norm(c.head_dim) if c.gemma_3 else nn.Identity()
        self.k_norm = c.norm(c.head_dim) if c.gemma_3 else nn.Identity()

    def forward(self, x, cos, sin):
        q = self.q_norm(self.heads(self.q_proj(x)))  # [B, H, T, head_dim]
        k = self.k_norm(self.heads(self.k_proj(x)))  # [B, n_kv, T, head_dim]
        v = self.heads(self.v_proj(x))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Each key-value head serves a group of query heads: [B, n_kv, group, T, head_dim].
        q, k, v = q.unflatten(1, (self.n_kv, -1)), k.unsqueeze(2), v.unsqueeze(2)
        scores = single(soft_cap(q @ k.mT * self.score_scale, self.score_cap))
        pairs = torch.ones_like(scores[0, 0, 0], dtype=torch.bool)
        hidden = pairs.triu(1) | pairs.tril(-self.window)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(x.dtype)
        return self.o_proj((weights @ v).flatten(1, 2).transpose(1, 2).flatten(2))

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class GemmaMLP(nn.Module):
    def __init__(self, c: SimpleNamespace):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaBlock(nn.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    attn_out, mlp_out = "post_attention_layernorm", "post_feedforward_layernorm"

    def __init__(self, c: SimpleNamespace, i: int):
        super().__init__()
        every = c.sliding_window_pattern if c.gemma_3 else 2
        kind = "sliding_attention" if (i + 1) % every else "full_attention"
        kind = (getattr(c, "layer_types", None) or {i: kind})[i]
        sliding = kind == "sliding_attention"
        refuse(not sliding and kind != "full_attention", f"config.json has layer type {kind!r:.80}")
        base = c.rope_local_base_freq if c.gemma_3 and sliding else c.rope_theta
        self.rope = read_rope(vars(c), c.head_dim, base, 1.0, kind if c.gemma_3 else "")
        window = c.sliding_window if sliding else 2**31  # more than any sequence has
        self.self_attn = GemmaAttention(c, window)
        self.mlp = GemmaMLP(c)
        self.input_layernorm = c.norm(c.hidden_size)
        self.post_attention_layernorm = c.norm(c.hidden_size)
        self.pre_feedforward_layernorm = c.norm(c.hidden_size)
        self.post_feedforward_layernorm = c.norm(c.hidden_size)

    def forward(self, x, cos, sin):
        attended = self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma2(LanguageModel):
    block_kind = GemmaBlock
    norm_kind = RMSNorm
    names = ("model", "embed_tokens", "layers", "norm", "lm_head")
    known = {**LanguageModel.known, "num_key_value_heads": None, "head_dim": 256}
    known.update(query_pre_attn_scalar=256.0, rope_theta=1e4, rms_norm_eps=1e-6)
    known.update(sliding_window=4096, attn_logit_softcapping=[50.0, None, ANY])
    known.update(final_logit_softcapping=[30.0, None, ANY], tie_word_embeddings=[True, False])
    known.update(hidden_activation=["gelu_pytorch_tanh"], gemma_3=[False])
    known.update(use_bidirectional_attention=[False, None])
    eps = "rms_norm_eps"
    n_skip = 1
    preset = "--dtype bfloat16 --kl-batch 2"

    def embed(self, tokens):
        x = super().embed(tokens)
        # The factor is rounded to the model's dtype, as the published weights expect.
        return x * torch.tensor(x.shape[-1] ** 0.5, dtype=x.dtype)

    def unembed(self, resid):
        return soft_cap(super().unembed(resid), self.settings.final_logit_softcapping)


class Gemma3(Gemma2):
    known = {**Gemma2.known, "gemma_3": [True], "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    known.update(attn_logit_softcapping=[None], final_logit_softcapping=[None, ANY])
    known.update(vocab_size=262_208, max_position_embeddings=131_072, sliding_window_pattern=6)
    known.update(num_attention_heads=8, num_key_value_heads=4)

    def __init__(self, config: dict):
        text = config.get("text_config")
        if isinstance(text, dict):  # it also sees, and then says itself how it unembeds
            tied = config.get("tie_word_embeddings", True)
            config = {**text, "tie_word_embeddings": tied, "final_logit_softcapping": None}
        super().__init__(config)


FAMILIES.update(gpt_neox=Pythia, gemma2=Gemma2, gemma3_text=Gemma3, gemma3=Gemma3)


# ---- From a name to a model --------------------------------------------------------------------
def build_lm(config: dict) -> LanguageModel:
    """The model of a parsed config.json, on the meta device. UserError for one that is not ours."""
    kind = config.get("model_type")
    other = kind not in [*FAMILIES]  # it may be anything
    refuse(other, f"config.json has model_type = {kind!r:.80}; there are {', '.join(FAMILIES)}")
    with user_errors("config.json describes no model that runs"), torch.device("meta"):
        lm = FAMILIES[kind](config)
        lm(torch.zeros(1, 2, dtype=torch.long))  # sizes may not fit each other
    return lm


def load_lm(name: str, device="cpu", dtype=torch.float32) -> LanguageModel:
    """A frozen language model, `lm(tokens [B, T]) -> logits [B, T, V]`, from a short name, a Hub
    owner/name[@revision] or a folder. UserError where its tensors do not fit or are not finite."""
    return build_lm(model_loaders.load_config(name)).load(name, device, dtype)


# ---- Processes: one, or several GPUs under torchrun --------------------------------------------
def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(x):
    """The sum over all processes; x itself where there is one."""
    if world_size() > 1:
        x = x.detach().clone()
        with user_errors("another process has ended"):
            dist.all_reduce(x)
    return x


def mean_over_ranks(x):
    """The mean over all processes; x itself where there is one."""
    return sum_over_ranks(x) / world_size() if world_size() > 1 else x


def own_sequences(stream: TokenStream, start: int, count: int, device):
    """This process's `count` sequences [count, T] of those from `start` on, dealt out in turn."""
    return stream.train(start, count * world_size())[rank() :: world_size()].to(device)


def join_processes(name: str) -> torch.device:
    """The device that --device names, for each process of torchrun its own; joins the processes."""
    local = os.environ.get("LOCAL_RANK")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{local or 0}" if name == "cuda" else name
    with user_errors(f"--device {name} is not there"):
        zero = torch.zeros((), device=name)
        float(zero)  # the meta device holds no numbers
    if local is not None and not dist.is_initialized():
        backend = "gloo" if zero.is_cpu else "cpu:gloo,cuda:nccl"
        with user_errors("LOCAL_RANK is set, but what else torchrun sets is not right"):
            dist.init_process_group(backend, timeout=timedelta(days=1))  # tokenising may take hours
    return zero.device


# ---- A run, from its settings to its report ----------------------------------------------------
def check(config: Config) -> LanguageModel:
    """The model, without weights; config.layer where it is not given. UserError for settings that
    cannot be, with the value, before anything is loaded or written."""
    model_loaders.check_ranges(config)
    refuse(config.resume and config.overwrite, "--resume and --overwrite: give one")
    lm = build_lm(model_loaders.load_config(config.model))
    last = len(lm.blocks) - 1
    if config.layer is None:
        config.layer = (last + 1) // 2
    config.k = [*dict.fromkeys(config.k)]
    config.method = [*dict.fromkeys(config.method)]
    layer, k, context = config.layer, config.k, config.context
    refuse(layer > last, f"--layer {layer}: {config.model} has layers 0 to {last}")
    saved_as = model_loaders.read_hook(model_loaders.hook_name(layer, config.place))
    refuse(saved_as != (layer, config.place), f"--place {config.place}: SAEs call it {saved_as}")
    if "k" in KINDS[config.sae].numbers:
        few = min(k) < 1 and not config.start  # a published SAE may have no K
        refuse(few or max(k) > config.d_sae, f"--k {k} is not from 1 to d_sae = {config.d_sae}")
    else:
        refuse(len(k) > 1, f"--k {k}: {config.sae} SAEs have no K to differ by")
        config.k = [0]
    refuse(context > lm.max_context, f"--context {context} is above the model's {lm.max_context}")

    tokens, kl_tokens, batch = config.tokens, config.kl_tokens, config.batch
    refuse(kl_tokens > tokens, f"--kl-tokens {kl_tokens} is above --tokens {tokens}")
    mse_tokens = (tokens // context - kl_tokens // context) * (context - 1)  # one may be <bos>
    few = mse_tokens < batch * world_size() and kl_tokens < tokens and not config.start
    refuse(few, f"{tokens - kl_tokens} tokens by MSE are below a step (--batch {batch})")
    step = config.kl_batch * context * world_size()
    few = 0 < kl_tokens < step
    refuse(few, f"--kl-tokens {kl_tokens} is below a step of {step} (--kl-batch x --context)")
    return lm


@dataclass
class Done:
    """What has been done of a run: what a checkpoint keeps beside the phase in hand."""

    results: dict = field(default_factory=dict)  # of MSE and each method: `evaluate` of every SAE
    model_figures: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)  # of MSE and each method
    saes: list = field(default_factory=list)  # the state of each SAE after phase one
    scale: Tensor | None = None  # of phase one's activations
    limit: Tensor | None = None  # the norm above which a token is a sink


class Run:
    """What a command line asks for, in a RunFolder. UserError for what cannot be."""

    def __init__(self, config: Config):
        self.config = config
        self.device = join_processes(config.device)
        self.lm = check(config)  # without weights until `prepare`
        path = model_loaders.run_path(asdict(config))
        self.folder = model_loaders.RunFolder(path, ["before", "MSE", *METHODS], rank())
        self.sae_folders = [path / f"k{k}" if len(config.k) > 1 else path for k in config.k]
        self.done = Done()
        self.interrupted = {}  # the state of the phase that a checkpoint was saved in
        self.saved = self.shown = time.monotonic()
        self.in_loop, self.stopping = False, 0  # the number of a signal

    def run(self):
        with contextlib.ExitStack() as closing:
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, self.on_signal) or signal.SIG_DFL
                closing.callback(signal.signal, number, before)
            self.folder.take(self.config.resume, self.config.overwrite, self.config.start)
            closing.callback(self.folder.leave)
            self.prepare(closing)
            self.resume()
            self.train()
            for i in range(len(self.config.k)):
                self.report(i)
            self.folder.finish()

    def prepare(self, closing: contextlib.ExitStack):
        """Starts the stream of tokens, and loads the model."""
        config = self.config
        torch.set_float32_matmul_precision("high")  # TF32 on CUDA
        what = f"the SAE of {config.start}" if config.start else f"{config.sae} SAE"
        block = f"block {config.layer} of {config.model}"
        say(f"saeft: {what}, {config.d_sae:,} latents, {block}, on {self.device}")
        mse_tokens = 0 if config.start else config.tokens - config.kl_tokens
        say(f"{mse_tokens:,} tokens of MSE, {config.kl_tokens:,} of {', '.join(config.method)}")
        self.open_stream(closing)
        progress("loading the model")
        self.lm.load(config.model, self.device, getattr(torch, config.dtype))

    def open_stream(self, closing: contextlib.ExitStack):
        """Starts the stream of tokens; finds the identity of all that the run depends on."""
        config, lm = self.config, self.lm
        tokenizer = lm.load_tokenizer(config.model, config.bos)
        if config.data is None:
            config.data = model_loaders.OWN_DATA.get(tokenizer.vocabulary, "c4")
        lm.n_skip = int(tokenizer.bos_id is not None)
        source = config.data, tokenizer, config.context, config.tokens, config.eval_tokens
        sae = model_loaders.sae_cfg(config.start) if config.start else None
        self.stream = TokenStream(*source, n_rows=len(lm.W_U), sae=sae)
        closing.callback(self.stream.close)
        self.identity = {"model": model_loaders.model_key(config.model), "data": self.stream.key}
        if config.start:
            self.identity["start"] = model_loaders.sae_key(config.start)
            model_loaders.note_changes(sae, config.start, asdict(config), self.identity)
        self.n = self.stream.n_train  # sequences, the first n_mse of them for phase one
        self.n_mse = self.n - config.kl_tokens // config.context

    def resume(self):
        """On --resume, the run of the last checkpoint. UserError if it is another."""
        config = self.config
        saved = self.folder.load_state(self.device) if config.resume else None
        if saved is not None:
            with user_errors("--resume: the checkpoint is of another version: --overwrite"):
                self.folder.go_on(saved, asdict(config), self.identity, world_size())
                self.done, self.interrupted = Done(**saved["done"]), saved["phase"]
        elif config.resume:
            say(f"note: no checkpoint in {self.folder.path} to resume from, a new run begins")

    def train(self):
        """Phase one, then each method from its SAEs."""
        config, lm, done = self.config, self.lm, self.done
        saes = self.first_saes()
        if not done.results and not self.interrupted:
            for method in config.method if config.kl_tokens else []:  # what cannot be is told now
                METHODS[method](lm, copy.deepcopy(saes[0]), config)
            self.folder.begin(asdict(config))  # an earlier run's files are there till now
        if "MSE" not in done.results:
            n_tokens = 0 if config.start else self.n_mse * (config.context - lm.n_skip)
            steps = n_tokens // (config.batch * world_size())
            trainees = [Trainee(sae, lm, divergence=None, decay=0.0) for sae in saes]
            phase = Phase("MSE", trainees, steps, done.limit, done.scale)
            phase.buffer = ActivationBuffer(lm, self.stream, self.n_mse, done.limit, config)
            self.run_phase(phase, train_mse, config)
        steps = (self.n - self.n_mse) // (config.kl_batch * world_size())
        for method in config.method if steps else []:
            if method not in done.results:
                trainees = [self.trainee(method, i, sae) for i, sae in enumerate(saes)]
                phase = Phase(method, trainees, steps, done.limit, first=self.n_mse)
                self.run_phase(phase, finetune, lm, self.stream, config)

    @torch.no_grad()
    def first_saes(self) -> list[SAE]:
        """The SAEs with which phase one begins, or with which it ended."""
        config, done, d_model = self.config, self.done, self.lm.W_U.shape[1]
        if config.start:
            saes = [SAE.load(config.start)]
            width = len(saes[0].b_dec)
            refuse(width != d_model, f"--start: width {width}; {config.model} has {d_model}")
        else:
            saes = []
            for k in config.k:
                torch.manual_seed(config.seed)  # what a kind draws is the same in all processes
                saes.append(KINDS[config.sae](d_model, config.d_sae, k=k, seed=config.seed))
        saes = [sae.to(self.device) for sae in saes]
        for sae, (saved, own) in zip(saes, done.saes):
            sae.load_state_dict(saved)
            vars(sae).update(own)
        if done.limit is None:
            x, done.limit = first_activations(self.lm, self.stream, self.n_mse or self.n, config)
            scale = x.pow(2).sum(-1).mean().sqrt()
            done.scale = torch.ones_like(scale) if config.start else scale
            for sae in saes:
                sae.start(x / done.scale, config)
        return saes

    def trainee(self, method: str, i: int, sae: SAE) -> Trainee:
        """What a method trains, from a copy of SAE i of phase one."""
        sae = copy.deepcopy(sae).eval()
        sae.dead = ()
        if not self.config.end_to_end:  # which has no L0 to keep
            sae.l0_target = self.done.results["MSE"][i]["l0"]
            advice = "it is of another model, layer or scale, or --l1 is too high"
            refuse(not sae.l0_target, f"no latent of the SAE fires: {advice}")
        torch.manual_seed(self.config.seed * 1009 + i)  # what a method draws is its own
        return METHODS[method](self.lm, sae, self.config)

    def run_phase(self, phase: Phase, loop: Callable, *args):
        """A phase's loop, from where a checkpoint left it; saves and evaluates what it trained."""
        for t in phase.trainees:
            t.trained.train()
        if self.interrupted.get("name") == phase.name:
            with user_errors("--resume: the checkpoint is of another version: --overwrite"):
                phase.load_state_dict(self.interrupted)
            self.interrupted = {}
        phase.began = time.monotonic() - self.done.seconds.get(phase.name, 0.0)
        self.in_loop = True
        loop(phase, *args, self.after_step)
        self.in_loop = False
        self.checkpoint(phase)
        self.finish(phase)
        self.checkpoint()

    def finish(self, phase: Phase):
        """Saves what a phase trained, and evaluates it."""
        name, config, done = phase.name, self.config, self.done
        random = name == "MSE" and config.end_to_end
        for t in phase.trainees:
            if name == "MSE":
                t.sae.rescale(phase.scale)
            t.trained.train(random)  # a random BatchTopK has no threshold
        if not random:
            parts = {"MSE": "." if self.n_mse == self.n else "before", config.method[0]: "."}
            n = self.n_mse if name == "MSE" else self.n
            n = 0 if name == "MSE" and config.start else n  # as loaded, it has seen no more
            origin = asdict(config), self.lm.n_skip > 0, self.stream.seen_after(n), self.identity
            metadata = model_loaders.sae_metadata(*origin)
            for t, folder in zip(phase.trainees, self.sae_folders) if rank() == 0 else ():
                t.save(folder / parts.get(name, name), metadata)
        arguments = self.lm, self.stream.validation(), phase.trainees, done.limit, config
        done.model_figures, rows = evaluate(*arguments, f"evaluating the SAE {self.label(name)}")
        for row, before in zip(rows, done.results.get("MSE", [])):
            known = not config.end_to_end and before["gap"] > 0  # else there is none to close
            row["gap_closed"] = 1 - row["gap"] / before["gap"] if known else None
        done.results[name] = rows
        if name == "MSE":
            done.saes = [(t.sae.state_dict(), plain_state(t.sae)) for t in phase.trainees]

    def label(self, name: str) -> str:
        start = "at the random start" if self.config.end_to_end else "after MSE"
        labels = {"MSE": "as loaded" if self.config.start else start, "kl": "after KL+MSE"}
        labels["mse"] = "after MSE alone, same tokens"
        return labels.get(name, f"after {name}")

    def report(self, i: int):
        """Writes report.json and prints the closing table of SAE i."""
        config, folder, done = self.config, self.sae_folders[i], self.done
        results = {name: rows[i] for name, rows in done.results.items()}
        final = results.get(config.method[0], {**results["MSE"], "gap_closed": None})
        out = {**asdict(config), "k": config.k[i], **done.model_figures, **final}
        out.update(seconds=done.seconds, identity=self.identity, results=results)
        if rank() == 0:
            model_loaders.write_text(folder / "report.json", json.dumps(out, indent=2) + "\n")
        say(f"\n{folder}")
        say(f"{'':29}{'CE':>8}{'gap':>8}{'closed':>8}{'KL':>8}{'FVU':>7}{'L0':>7}")
        say(f"{'original model':29}{out['ce_original']:8.4f}")
        say(f"{'x replaced by 0':29}{out['ce_zero']:8.4f}")
        for name, row in results.items():
            closed = row.get("gap_closed")
            closed = "" if closed is None else f"{closed:.1%}"
            figures = f"{row['ce']:8.4f}{row['gap']:8.4f}{closed:>8}{row['kl']:8.4f}"
            say(f"{self.label(name):29}{figures}{row['fvu']: 7.4f}{row['l0']: 7.2f}")

    def after_step(self, phase: Phase, figures: list[dict]):
        """Metrics, a line for the reader, a checkpoint: each where it is time for it."""
        now, first_or_last = time.monotonic(), phase.step in (1, phase.steps)
        self.done.seconds[phase.name] = now - phase.began
        if phase.step % self.config.log_every == 0 or phase.step == phase.steps:
            self.log(phase, figures)
        if first_or_last or now - self.shown > (2 if sys.stdout.isatty() else 30):
            row, left = figures[-1], phase.time_left(now)
            names = self.config.method if self.config.kl_tokens else []
            rest = [name for name in names if name not in {phase.name, *self.done.results}]
            then = ", ".join(["evaluation", *rest])
            text = f"{phase.name} {phase.step / phase.steps:4.0%}, {left}, then {then}"
            progress(f"{text}; FVU {row['fvu']:.3f}, L0 {row['l0']:.1f}", now=True)
            self.shown = now
        due = now - self.saved > 60 * self.config.checkpoint_minutes
        wishes = torch.tensor([self.stopping > 0, due]).float()
        stop, due = sum_over_ranks(wishes).tolist()  # all processes at the same step
        if stop or due:
            self.checkpoint(phase)
        if stop:
            say(f"a checkpoint is saved: --resume goes on from step {phase.step} of {phase.name}")
            raise KeyboardInterrupt(self.stopping or signal.SIGTERM)

    def log(self, phase: Phase, figures: list[dict]):
        """Lines of metrics.jsonl, means over GPUs. UserError where a loss is not finite."""
        config, name, step = self.config, phase.name, phase.step
        per_step = config.batch if phase.buffer else config.kl_batch * config.context
        line = {"phase": name, "step": step, "tokens": step * per_step * world_size()}
        line["seconds"] = self.done.seconds[name]
        lines = []
        for k, row in zip(config.k, figures):
            row = {name: mean_over_ranks(value).item() for name, value in row.items()}
            finite = math.isfinite(row["loss"] + row["grad_norm"])
            what, advice = f"{name}, step {step}", "lower its rate, or mend a fork's loss"
            refuse(not finite, f"{what}: loss or gradient is not finite: {advice}")
            refuse(row.get("beta", 0) < 0, f"{what}: a divergence is below 0 on average")
            lines.append(json.dumps({**line, "k": k, **row}))
        self.folder.log(lines)

    def checkpoint(self, phase: Phase | None = None):
        """Saves all that `resume` needs, of several processes each its own."""
        state = {"config": asdict(self.config), "identity": self.identity, "world": world_size()}
        state.update(done=vars(self.done), phase=phase.state_dict() if phase else {})
        self.folder.save_state(state, f"{len(self.done.results)}-{phase.step if phase else 0}")
        self.saved = time.monotonic()

    def on_signal(self, number: int, frame):
        """In a loop the step is finished and saved; anywhere else, and the second time, it ends."""
        if not self.in_loop or self.stopping:
            raise KeyboardInterrupt(number)
        self.stopping = number


# ---- The command line --------------------------------------------------------------------------
def parse(argv: list[str] | None = None, settings: type = Config) -> Config:
    """Settings from the command line: Config's defaults, the model's preset, what the SAE of
    --start tells, then the flags. UserError also where the last two contradict each other."""
    parser = model_loaders.flags_of(settings, __doc__)
    given = vars(parser.parse_args(argv))
    told = told_by_sae(given["start"], given) if "start" in given else {}
    model = given.get("model", told.get("model", settings().model))
    lm = build_lm(model_loaders.load_config(model))
    shape = (*lm.W_U.shape, len(lm.blocks))
    preset = vars(parser.parse_args(f"{lm.preset} {PRESETS.get(shape, '')}".split()))
    config = settings(**{**preset, **told, **given})
    unused = {"k", "l1"} - {*KINDS[config.sae].numbers}
    if config.start or config.end_to_end:  # there is no phase one
        unused |= {"batch", "buffer", "dead_after"} | ({"lr", "warmup"} if config.start else set())
    unused &= given.keys()
    if unused:
        flags = ", --".join(sorted(unused)).replace("_", "-")
        say(f"note: a {config.sae} SAE trained so has no use of --{flags}")
    if config.start:
        refuse("tokens" in given, "--tokens: with --start it is --kl-tokens alone that counts")
        config.tokens = max(1, config.kl_tokens)
    elif config.end_to_end:
        refuse("kl_lr" in given, "--kl-lr: with no tokens for MSE before it, the rate is --lr")
    return config


def told_by_sae(source: str, given: dict) -> dict:
    """The settings that an SAE tells. UserError where `given` ones contradict it, or lack some."""
    tensors, cfg = model_loaders.read_sae(source)
    kind, own = kind_of(cfg, source), cfg["saeft"]
    told = {"k": [0], **model_loaders.sae_settings(cfg), "sae": kind.kind}
    if own.get("kind", kind.kind) != kind.kind or own.keys() - {"kind", *kind.numbers}:
        known = f"is of a fork's kind, {own.get('kind')!r:.60}; without it {kind.kind} trains"
        model_loaders.say_once(f"note: {source} {known}")
    threshold = tensors.get("threshold", torch.zeros(1))
    if told["sae"] == "jumprelu" and threshold.allclose(threshold.mean(), atol=0):
        one = "one threshold for all latents, which stays; convert.py knows BatchTopK's"
        model_loaders.say_once(f"note: {source} has {one}")
    for name in sorted(given.keys() & told.keys() & {"layer", "place", "k", "sae", "d_sae"}):
        flag_of = f"--{name.replace('_', '-')} {given[name]}"
        refuse(given[name] != told[name], f"{flag_of}: the SAE of --start has {told[name]}")
    for name in ("model", "layer"):
        refuse(name not in {**told, **given}, f"--{name}: the SAE of --start does not say it")
    silent = ("prepend_bos", "model_from_pretrained_kwargs")
    missing = [key for key in silent if cfg.get(key) in (None, {})]
    if missing:  # the second says whether x was centred, as it was in SAELens's first versions
        taken = "x is taken as the model has it, <bos> as it says or else the tokenizer does"
        model_loaders.say_once(f"note: {source} does not say {', '.join(missing)}: {taken}")
    place = told.get("place", "resid_post")
    others = f"{', '.join(PLACES)} (experiments/forks/place.py has more)"
    refuse(place not in PLACES, f"--start: that SAE reads {place}; there are {others}")
    return told


def exit_status(program: str, run: Callable, advice: str = "give it less at once") -> int:
    """Runs a program. 0; 2 after a user's mistake, or where memory is short (`advice`), which gets
    a line on stderr; 130 or 143 after a signal."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # where it was closed
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # names that a locale cannot show
    try:
        run()
        return 0
    except UserError as error:
        status, why = 2, error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in f"{error}".lower():
            raise
        status, why = 2, f"out of memory: {advice}"
    except KeyboardInterrupt as interrupt:
        status, why = 128 + (*interrupt.args, signal.SIGINT)[0], "interrupted"
    print(f"{program}: {why}", file=sys.stderr)
    return status


def main(argv: list[str] | None = None, settings: type = Config) -> int:
    """The command line; returns its `exit_status`."""
    advice = "lower --batch, --kl-batch, --buffer, --d-sae"
    return exit_status("saeft", lambda: Run(parse(argv, settings)).run(), advice)


if __name__ == "__main__":
    sys.exit(main())
