"""Train a sparse autoencoder (SAE) by MSE, then close part of its cross-entropy gap by KL+MSE.

    python saeft.py                                     # embedded model, two minutes, no network
    python saeft.py --model pythia-160m --k 80          # the paper's setting: 475M + 25M tokens
    python saeft.py --start owner/name:folder           # fine-tune an SAE that somebody published
    torchrun --nproc-per-node 8 saeft.py --k 40 80      # two SAEs on one activation stream, 8 GPUs

"Revisiting End-To-End Sparse Autoencoder Training: A Short Finetune Is All You Need" (Karvonen
2025, arXiv 2503.17272); TopK and AuxK: Gao et al. 2024, arXiv 2406.04093. The whole method:

    phase one, on shuffled tokens:                           # the first 475M of 500M
        x     = output of block L, the residual stream       # later blocks never run
        f     = TopK(ReLU(W_enc (x - b_dec) + b_enc))        # the latents
        x_hat = W_dec f + b_dec                              # the reconstruction
        step(||x - x_hat||^2 + AuxK / 32)                    # x scaled; AuxK revives dead latents
    phase two, on whole sequences:                           # the last 25M tokens, x as it is
        p     = softmax(logits of the model)
        q     = softmax(logits with x_hat in place of x)
        MSE   = ||x - x_hat||^2 / D
        beta  = MSE / KL(p || q)                             # a constant, new for every batch
        step((beta KL(p || q) + MSE) / 2)                    # both halves weigh alike
    step(loss): the SAE alone trains; gradients along decoder directions are removed, the norm is
        clipped to 1, Adam steps, and decoder directions get back their unit norm (ReLU SAEs: free)

Shapes: N tokens, B sequences, T context, D d_model, F d_sae (number of latents), V vocabulary,
K active latents, L the layer. Units: CE and KL in nats per token; FVU is a share of variance.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while torch is imported ends quietly, too
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: new gradients cost far less

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

import model_loaders
from model_loaders import TokenStream, UserError, flag, progress, refuse, say, user_errors

FAST = True  # False: nothing of the section "Fast paths" is used; to compare


# ---- Settings ----------------------------------------------------------------------------------
@dataclass
class Config:
    """Every setting of a run: default, help, and the range of a number. PRESETS replace these
    defaults per model; flags replace both."""

    # What is trained on what
    model: str = flag("tiny", "short name (pythia-160m), Hub owner/name[@revision] or folder")
    layer: int | None = flag(None, "block whose output the SAE reads (default: the middle one)", 0)
    data: str | None = flag(None, "c4, pile, pythia, tiny, a Hub dataset, or local files")
    bos: str = flag("auto", "start sequences with <bos>", choices=["auto", "yes", "no"])
    start: str | None = flag(None, "fine-tune this SAE: a folder, or owner/name:path on the Hub")
    # The SAE
    sae: str = flag("topk", "activation function", choices=["topk", "batchtopk", "relu"])
    k: list[int] = flag([80], "active latents K; for several, an SAE each", 1, nargs="+")
    d_sae: int = flag(2**14, "number of latents F", 1)
    # Tokens
    tokens: int = flag(500_000_000, "training tokens in all", 1)
    kl_tokens: int = flag(25_000_000, "how many of them, the last ones, are the fine-tune's", 0)
    context: int = flag(1024, "tokens in a sequence", 2)
    batch: int = flag(2048, "activations in a step of phase one, for each GPU", 1)
    kl_batch: int = flag(8, "sequences in a step of the fine-tune, for each GPU", 1)
    buffer: int = flag(250, "sequences whose activations are mixed, for each GPU", 1)
    sink_norm: float = flag(4.0, "leave out tokens above this many median norms; 0: none", 0)
    # Optimisation
    method: list[str] = flag(["kl"], "fine-tunes, each from the MSE SAE", nargs="+")
    lr: float | None = flag(None, "peak rate of phase one (default: 2e-4 / sqrt(F / 2^14))", 0)
    kl_lr: float = flag(5e-5, "first rate of the fine-tune, falling linearly to 0", 0)
    warmup: int = flag(1000, "steps of linear warm-up in phase one", 0)
    l1: float = flag(0.1, "sparsity penalty lambda of ReLU SAEs", 0)
    dead_after: int = flag(10_000_000, "tokens without firing after which a latent is dead", 0)
    rank: int = flag(16, "rank of LoRA and adapters (experiments/baselines.py)", 1)
    seed: int = flag(0, "seed of everything random", 0, 4 * 10**9)
    # Running
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto takes cuda where there is one")
    dtype: str = flag("float32", "of the model and of products", choices=["float32", "bfloat16"])
    compile: bool = flag(False, "torch.compile the blocks and the KL")
    eval_tokens: int = flag(1_000_000, "held-out tokens of the evaluation", 1)
    out: str = flag("runs", "where run folders go")
    name: str | None = flag(None, "folder under --out (default: model, layer, kind, K, seed)")
    overwrite: bool = flag(False, "replace an earlier run of the same name")
    resume: bool = flag(False, "go on with an interrupted run of the same settings")
    checkpoint_minutes: float = flag(10.0, "minutes between checkpoints", 0)
    log_every: int = flag(50, "steps between lines of metrics.jsonl", 1)


GEMMA = "--dtype bfloat16 --kl-batch 2"
PRESETS = {  # flags that a model starts with, by the last part of its name
    **{name: GEMMA for name in model_loaders.MODELS if name.startswith("gemma")},
    "gemma-2-2b": f"{GEMMA} --layer 12",
    "pythia-160m": "--layer 8",
    "tiny": "--layer 2 --data tiny --k 16 --d-sae 1024 --tokens 1.6M --kl-tokens 400k --context 128"
    " --batch 1024 --buffer 2000 --method kl mse --lr 1e-3 --kl-lr 1.5e-3 --warmup 50"
    " --dead-after 200k --eval-tokens 100k --log-every 20",
}


# ---- The sparse autoencoder --------------------------------------------------------------------
class Activity(NamedTuple):
    """What N tokens activated."""

    counts: Tensor  # [F], the tokens on which each latent is active
    sums: Tensor  # [F], each latent's activations, summed over tokens
    floor: Tensor | float | None  # what pre-activations had to reach; None for the K largest


def activate(pre, k, floor):
    """f [N, F] of pre-activations [N, F]: ReLU of the K largest of each token or, without K, of
    those that are at least `floor`, one number or one for each latent; all others 0."""
    if k is None:
        return pre.relu() * (pre >= floor)
    top = pre.relu().topk(k, sorted=False)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values)


def autoencode(x, W_enc, b_enc, W_dec, b_dec, select, keep=None):
    """x_hat [N, D] of x [N, D], and what was active: nothing where keep [N] is False.
    select(pre, number kept) says which pre-activations stay, as K and floor of `activate`."""
    if FAST and x.is_cpu:
        return sparse_autoencode(x, W_enc, b_enc, W_dec, b_dec, select, keep)
    pre = F.linear(x - b_dec, W_enc, b_enc)  # [N, F]
    if keep is None:
        keep = torch.ones(len(x), dtype=torch.bool, device=x.device)
    pre = pre.masked_fill(~keep[:, None], -torch.inf)
    k, floor = select(pre.detach(), keep.sum())
    f = activate(pre, k, floor)
    active = Activity((f > 0).sum(0), f.sum(0), floor)
    return f @ W_dec + b_dec, active


class SAE(nn.Module):
    """x_hat = f W_dec + b_dec, f = activation((x - b_dec) W_enc' + b_enc), on x / scale.

    W_enc and W_dec are both [F, D], a row for each latent. Kinds of activation:
    topk       the K largest of each token
    batchtopk  the K N largest of N tokens in training, later those above `threshold`, which
               leaves K a token on average (arXiv 2412.06410)
    relu       all that are positive
    jumprelu   those above a threshold of the latent's own [F], which does not train (2407.14435)"""

    def __init__(self, d_model: int, d_sae: int, k: float, kind: str = "topk", seed: int = 0):
        super().__init__()
        self.k, self.kind = k, kind
        self.bfloat16 = False  # whether products run in bfloat16; parameters stay float32
        self.unit_norm = kind != "relu"  # its penalty weighs the directions' norms instead
        generator = torch.Generator().manual_seed(seed)
        directions = F.normalize(torch.randn(d_sae, d_model, generator=generator), dim=-1)
        self.W_enc = nn.Parameter(directions.clone())
        self.W_dec = nn.Parameter(directions)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("threshold", torch.zeros(d_sae if kind == "jumprelu" else ()))
        self.register_buffer("scale", torch.ones(()))  # sqrt(mean ||x||^2), or 1: raw units
        self.register_buffer("median_norm", torch.zeros(()))  # of ||x||; 0: not yet measured

    def forward(self, x, keep=None):
        """x_hat [N, D] of x [N, D]; and what was active, in units of x / scale."""
        weights = self.W_enc, self.b_enc, self.W_dec, self.b_dec
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            x_hat, active = autoencode(single(x) / self.scale, *weights, self.select, keep)
        return x_hat * self.scale, active

    def select(self, pre, n):
        """Which pre-activations [N, F] of n kept tokens stay: K, or a floor."""
        if self.kind == "topk":
            return self.k, None
        if self.kind == "relu":
            return None, 0.0
        if self.kind == "batchtopk" and self.training:
            largest = pre.flatten().topk(math.ceil(self.k * len(pre))).values
            last = (self.k * n).round().long().clamp_min(1) - 1
            return None, largest.gather(0, last[None])[0]  # indexing would wait for the device
        return None, torch.nextafter(self.threshold, self.threshold + 1)  # strictly above

    @torch.no_grad()
    def encode(self, x):
        """f [N, F] of x [N, D], in units of x: x_hat = f W_dec + scale * b_dec."""
        pre = F.linear(single(x) / self.scale - self.b_dec, self.W_enc, self.b_enc)
        k, floor = self.select(pre, torch.tensor(len(x), device=x.device))
        return activate(pre, k, floor) * self.scale

    @torch.no_grad()
    def rescale(self, scale: float | Tensor):
        """Sets `scale`, and leaves the function of x as it is; with 1, units are raw."""
        for values in (self.b_enc, self.b_dec, self.threshold):
            values.mul_(self.scale / scale)
        self.scale.copy_(torch.as_tensor(scale))

    @torch.no_grad()
    def stationary_l1(self, x) -> float:
        """The lambda at which a ReLU SAE is at rest on x [N, D]: scaling all f leaves its loss the
        same. 2 mean <x - x_hat, x_hat - b_dec> / mean sum_i f_i ||W_dec[i]||."""
        x_hat, active = self(x)
        error = (x - x_hat) / self.scale
        decoded = x_hat / self.scale - self.b_dec
        return (2 * (error * decoded).sum() / self.penalty(active)).item()

    def penalty(self, active: Activity):
        """sum_n sum_i f[n, i] ||W_dec[i]||, which lambda weighs in ReLU SAEs."""
        return (active.sums * self.W_dec.norm(dim=-1)).sum()

    @torch.no_grad()
    def project_gradient(self):
        """Removes from each W_dec.grad[i] the part along W_dec[i], of norm 1."""
        along = torch.linalg.vecdot(self.W_dec.grad, self.W_dec)  # [F]
        self.W_dec.grad.addcmul_(along[:, None], self.W_dec, value=-1)

    @torch.no_grad()
    def save(self, folder: str | Path, metadata: dict):
        """Writes the SAE in SAELens's layout, for raw activations: scale goes into the biases.
        metadata: model_name, hook_name, ... UserError where the folder cannot be written."""
        raw = copy.deepcopy(self)
        raw.rescale(1.0)
        own = {
            "kind": self.kind,
            "k": self.k,
            "scale": self.scale.item(),
            "median_norm": self.median_norm.item(),
        }
        t = raw.state_dict()
        names = ["W_enc", "b_enc", "W_dec", "b_dec"]
        tensors = {name: t[name] for name in names}
        if self.kind in ("batchtopk", "jumprelu"):
            tensors["threshold"] = t["threshold"].expand(len(t["b_enc"]))
        arch = {"relu": "standard", "batchtopk": "jumprelu"}.get(self.kind, self.kind)
        cfg = {"architecture": arch}
        if self.kind == "topk":
            cfg.update(k=self.k, rescale_acts_by_decoder_norm=False)
        own = {**metadata.get("saeft", {}), **own}
        cfg["metadata"] = {**metadata, "saeft": own}
        model_loaders.write_sae(folder, tensors, cfg)

    @classmethod
    @torch.no_grad()
    def load(cls, source: str | Path) -> SAE:
        """The SAE that `save` or SAELens wrote, in a folder or at owner/name:path on the Hub, in
        raw units. UserError where there is none, or one that cannot be followed exactly."""
        tensors, cfg = model_loaders.read_sae(source)
        own = cfg["metadata"]["saeft"]
        arch = cfg.get("architecture", "standard")
        kind = {"standard": "relu"}.get(arch, arch)
        refuse(kind not in ("relu", "topk", "jumprelu"), f"{source}: architecture {arch!r}")
        if kind == "jumprelu" and own.get("kind") == "batchtopk":
            kind, tensors["threshold"] = "batchtopk", tensors["threshold"][0]
        names = {"W_enc", "b_enc", "W_dec", "b_dec"} | ({"threshold"} if "threshold" in tensors else set())
        refuse(tensors.keys() != names, f"{source}: {sorted(tensors)}")
        k = cfg.get("k") or own.get("k") or 0
        scale, median = own.get("scale") or 1.0, own.get("median_norm") or 0.0
        told = {"kind": kind, "k": k, "scale": scale, "median_norm": median, **{n: cfg[n] for n in ("d_in", "d_sae")}}
        sae = cls(told["d_in"], told["d_sae"], told["k"], told["kind"])
        sae.load_state_dict(tensors, strict=False)
        sae.median_norm.fill_(told["median_norm"])
        norms = sae.W_dec.norm(dim=-1)
        sae.unit_norm = sae.kind != "relu" and bool((norms - 1).abs().max() < 1e-3)
        if sae.kind == "relu":  # its lambda stands beside scaled activations
            sae.rescale(told["scale"])
        return sae.eval()


# ---- The losses --------------------------------------------------------------------------------
def single(x):
    """x in float32, where its own precision is less."""
    return x.float() if x.element_size() < 4 else x


def auxk_loss(sae: SAE, x, error, dead):
    """AuxK: sum_n ||e - e_hat||^2 / sum_n ||e - mean(e)||^2 of the error e = (x - x_hat) / scale
    [N, D] and its reconstruction e_hat, without bias, by the D/2 most active `dead` latents."""
    e = error.detach()
    k = min(x.shape[1] // 2, len(dead))
    centred = x / sae.scale - sae.b_dec
    no_bias = torch.zeros_like(sae.b_dec)
    weights = sae.W_enc[dead], sae.b_enc[dead], sae.W_dec[dead], no_bias
    with torch.autocast(x.device.type, torch.bfloat16, enabled=sae.bfloat16):
        e_hat, _ = autoencode(centred, *weights, lambda pre, n: (k, None))
    variance = (e - mean_over_ranks(e.mean(0))).pow(2).sum()
    return (e - e_hat).pow(2).sum() / mean_over_ranks(variance)


def soft_cap(x, cap: float | None):
    """cap * tanh(x / cap), or x itself where there is no cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


def kl_and_gradient(p, p_log_p, z_q, cap: float | None):
    """KL(p || q) [n] = sum p log p - sum p log q, of p [n, V], its sum p log p [n], and q's logits
    before the soft cap, z_q [n, V]; and d KL / d z_q [n, V] = (q - p) (1 - tanh(z_q / cap)^2)."""
    logits = soft_cap(single(z_q), cap)
    log_q = logits.log_softmax(-1)
    kl = p_log_p - torch.linalg.vecdot(p, log_q)
    gradient = log_q.exp_().sub_(p)  # in place: [n, V] is large
    if cap is not None:
        gradient = gradient * (1 - (logits / cap) ** 2)
    return kl, gradient.to(z_q.dtype)


def slices(n_tokens: int, W_U) -> list[slice]:
    """Slices of about 8M logits each, but not so small that reading W_U costs the most."""
    rows = max(2**23 // len(W_U), 128 if W_U.is_cpu else 512)
    return [slice(i, i + rows) for i in range(0, n_tokens, rows)]


class SlicedKL(torch.autograd.Function):
    """sum_n weight_n KL(p_n || q_n) [m], of m models q at once; tensors [N, V] never exist.

    Takes lm, weight [N], and the last block's output [N, D] for p and for each q. The gradient goes
    back through soft cap, unembedding and final norm slice by slice, in the forward pass: for each
    token one product with W_U for p, and two for each q."""

    @staticmethod
    def forward(ctx, lm: LanguageModel, weight, last_p, *lasts_q):
        kl = weight.new_zeros(len(lasts_q))
        grads = [torch.empty_like(last_q) for last_q in lasts_q]
        for rows in slices(len(weight), lm.W_U):
            log_p = single(lm.unembed(last_p[rows])).log_softmax(-1)  # [n, V]
            p = log_p.exp()
            p_log_p = torch.linalg.vecdot(p, log_p)
            for i, last_q in enumerate(lasts_q):
                with torch.enable_grad():
                    last = last_q[rows].detach().requires_grad_()
                    normed = lm.final_norm(last)
                z_q = linear(normed.detach(), lm.W_U)
                kl_q, g = lm.kl_and_gradient(p, p_log_p, z_q, lm.logit_cap)
                kl[i] += (weight[rows] * kl_q).sum()
                g = linear(g, lm.W_U.T) * weight[rows, None]  # [n, D]
                grads[i][rows] = torch.autograd.grad(normed, last, g.to(normed.dtype))[0]
        ctx.save_for_backward(*grads)
        return kl

    @staticmethod
    def backward(ctx, g):
        grads = [g[i] * grad for i, grad in enumerate(ctx.saved_tensors)]
        return None, None, None, *grads


# ---- Which tokens count, and the buffer of activations -----------------------------------------
ALL_SINKS = "--sink-norm leaves no token to train on: give a larger one"


def content(resid, n_skip: int, limit):
    """[B, T]: which positions of resid [B, T, D] count. Not the first n_skip (<bos>), and not the
    attention sinks, a few tokens whose norm is many times the median's and tells nothing."""
    keep = single(resid).norm(dim=-1) <= limit
    keep[:, :n_skip] = False
    return keep


def sink_limit(sae: SAE, config: Config):
    """The norm above which a token is an attention sink; infinite with --sink-norm 0."""
    limit = config.sink_norm * sae.median_norm
    return torch.where(limit > 0, limit, torch.inf)


def own_sequences(stream: TokenStream, start: int, count: int, device):
    """This process's `count` sequences [count, T] of those from `start` on, dealt out in turn."""
    sequences = stream.train(start, count * world_size())
    return sequences[rank() :: world_size()].to(device)


@torch.no_grad()
def collect(lm: LanguageModel, tokens, layer: int):
    """Block `layer`'s output [n, T, D] for tokens [n, T], about 8192 tokens at a time."""
    chunks = tokens.split(max(1, 8192 // tokens.shape[1]))
    return torch.cat([lm.prefix(chunk, layer) for chunk in chunks])


class ActivationBuffer:
    """Serves activations of many sequences in random order. When half of its rows [size, D] are
    used, those of new sequences join the rest, and all are shuffled."""

    def __init__(self, lm, stream: TokenStream, n_sequences: int, limit, config: Config):
        self.lm = lm
        self.stream = stream
        self.n_sequences = n_sequences
        self.limit = limit
        self.config = config
        self.per_sequence = config.context - lm.n_skip
        self.size = self.per_sequence * config.buffer + 2 * config.batch
        self.rows = lm.W_U.new_empty(0, lm.W_U.shape[1])
        self.used = self.next_sequence = self.refills = 0

    def refill(self):
        left = self.rows[self.used :]
        n = (self.size - len(left)) // self.per_sequence
        n = min(n, (self.n_sequences - self.next_sequence) // world_size())
        tokens = own_sequences(self.stream, self.next_sequence, n, self.lm.W_U.device)
        resid = collect(self.lm, tokens, self.config.layer)
        rows = torch.cat([left, resid[content(resid, self.lm.n_skip, self.limit)]])
        self.next_sequence += n * world_size()
        self.refills += 1
        seed = (self.config.seed * 1009 + rank()) * 1_000_003 + self.refills
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        self.rows, self.used = rows[order.to(rows.device)], 0

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

    def state_dict(self) -> dict:
        names = ("rows", "used", "next_sequence", "refills")
        return {name: getattr(self, name) for name in names}


# ---- What both phases share --------------------------------------------------------------------
@dataclass
class Trainee:
    """What a method trains, and what it carries from step to step.

    `insert` maps x [N, D] and keep [N] to x_hat [N, D] and Activity, in place of the output of
    block L of `lm`: the SAE itself, or an SAE with an adapter. Parameters of `trained` that require
    a gradient train, on `loss`: "kl" (KL+MSE), "kl-only" or "mse"."""

    sae: SAE
    lm: LanguageModel
    loss: str = "kl"
    insert: nn.Module | None = None  # default: the SAE
    trained: nn.Module | None = None  # default: what is inserted
    own_prefix: bool = False  # whether lm differs from the original in blocks 0..L
    l1: float | Tensor = 0.0  # lambda of a ReLU SAE
    l0_target: float | None = None  # the L0 that the fine-tune moves lambda for
    decay: float = 0.01  # AdamW's weight decay, as published for the fine-tune

    def __post_init__(self):
        self.insert = self.insert or self.sae
        self.trained = self.trained or self.insert
        self.idle = torch.zeros_like(self.sae.b_enc, dtype=torch.long)  # tokens since it fired
        self.dead = self.idle[:0]  # latents idle for --dead-after tokens
        self.parameters = [p for p in self.trained.parameters() if p.requires_grad]
        refuse(not self.parameters, "--method: nothing to train; are there blocks after --layer?")
        self.optimizer = AdamW(self.parameters, weight_decay=self.decay, fused=True)

    def splice(self, tokens, resid, keep, layer: int):
        """x, x_hat [B T, D], Activity, and resid [B, T, D] with x_hat where keep [B, T] is True."""
        if self.own_prefix:
            resid = self.lm.prefix(tokens, layer)
        x = resid.flatten(0, 1)
        x_hat, active = self.insert(x, keep.flatten())
        replacement = x_hat.view_as(resid).to(resid.dtype)
        return x, x_hat, active, torch.where(keep[..., None], replacement, resid)

    def save(self, folder: Path, metadata: dict):
        """Writes what was trained, so that it gives the same figures; methods may add to it."""
        self.sae.save(folder, metadata)

    def state_dict(self) -> dict:
        frozen = {name for name, p in self.trained.named_parameters() if not p.requires_grad}
        return {
            "trained": {k: v for k, v in self.trained.state_dict().items() if k not in frozen},
            "optimizer": self.optimizer.state_dict(),
            "l1": self.l1,
            "idle": self.idle,
            "dead": self.dead,
        }

    def load_state_dict(self, state: dict):
        self.trained.load_state_dict(state["trained"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.l1 = state["l1"]
        self.idle = state["idle"]
        self.dead = state["dead"]


@dataclass
class Phase:
    """Training of some SAEs on the same tokens, and its state between steps."""

    name: str
    trainees: list[Trainee]
    steps: int
    limit: Tensor  # the norm above which a token is a sink
    first: int = 0  # phase two: its first sequence
    buffer: ActivationBuffer | None = None  # phase one
    step: int = 0

    def state_dict(self) -> dict:
        return {
            "name": self.name,
            "step": self.step,
            "trainees": [t.state_dict() for t in self.trainees],
            "buffer": self.buffer.state_dict() if self.buffer else {},
        }

    def load_state_dict(self, state: dict):
        self.step = state["step"]
        for t, saved in zip(self.trainees, state["trainees"]):
            t.load_state_dict(saved)
        if self.buffer:
            vars(self.buffer).update(state["buffer"])


@torch.no_grad()
def move_threshold(sae: SAE, active: Activity, step: int):
    """BatchTopK's threshold: the mean of the least activations kept in the last 50 steps or so.
    (The published mean of the last 1000 lags behind in short runs.)"""
    sae.threshold.lerp_(active.floor.to(sae.threshold.dtype), max(1 / (step + 1), 0.02))


def lr_factor(step: int, steps: int, warmup: int, decay: float) -> float:
    """Rises for `warmup` steps, at most a tenth of all; falls to 0 over the last share `decay`."""
    rise = (step + 1) / max(1, min(warmup, steps // 10))
    return min(1.0, rise, (steps - step) / max(1.0, decay * steps))


def update(t: Trainee, lr: float):
    """The step after `backward`: mean over GPUs, no gradient along the decoder's directions, norm
    clipped to 1, Adam, unit norm again. A gradient that is not finite changes nothing."""
    unit_norm = t.trained is t.sae and t.sae.unit_norm
    for p in t.parameters:
        p.grad = mean_over_ranks(p.grad)
    if unit_norm:
        t.sae.project_gradient()
    norm = torch.nn.utils.get_total_norm([p.grad for p in t.parameters])
    t.optimizer.grad_scale = norm.clamp_min(1.0)  # the fused kernel divides by it,
    t.optimizer.found_inf = (~norm.isfinite()).float()  # and does nothing where this is 1
    t.optimizer.param_groups[0]["lr"] = lr
    t.optimizer.step()
    t.optimizer.zero_grad()
    if unit_norm:
        F.normalize(t.sae.W_dec.data, dim=-1, out=t.sae.W_dec.data)


# ---- Phase one: MSE on shuffled activations ----------------------------------------------------
def train_mse(phase: Phase, config: Config, after_step):
    """Phase one. loss = mean_n ||x - x_hat||^2 + AuxK / 32, on x / scale; ReLU SAEs have lambda
    sum_i f_i ||W_dec[i]|| in place of AuxK; lambda rises over the first 20th of the steps."""
    for step in range(phase.step, phase.steps):
        x = phase.buffer.next_batch(config.batch)  # [N, D]
        n = len(x) * world_size()
        variance = (x - x.mean(0)).pow(2).sum(-1).mean()
        lr = config.lr * lr_factor(step, phase.steps, config.warmup, decay=0.2)
        figures = []
        for t in phase.trainees:
            sae = t.sae
            x_hat, active = sae(x)
            error = (x - x_hat) / sae.scale
            mse = error.pow(2).sum(-1).mean()
            loss = mse
            if sae.kind == "relu":
                t.l1 = config.l1 * min(1.0, 20 * step / phase.steps)
                loss = mse + t.l1 * sae.penalty(active) / len(x)
            elif len(t.dead):
                loss = mse + auxk_loss(sae, x, error, t.dead) / 32
            loss.backward()
            update(t, lr)

            if sae.kind == "batchtopk":
                move_threshold(sae, active, step)
            counts = sum_over_ranks(active.counts)  # [F]
            t.idle = torch.where(counts > 0, 0, t.idle + n)
            if step % 20 == 0:  # not at every step, since `nonzero` waits for the device
                t.dead = (t.idle > config.dead_after).nonzero()[:, 0]
            fvu = (mse * sae.scale**2 / variance).detach()
            figures.append({"loss": loss.detach(), "fvu": fvu, "l0": counts.sum() / n})
        phase.step = step + 1
        after_step(phase, figures)


# ---- Phase two: KL+MSE on whole sequences ------------------------------------------------------
def finetune(phase: Phase, lm: LanguageModel, stream: TokenStream, config: Config, after_step):
    """Phase two, on sequences from phase.first on, in order. Blocks 0..L run once for p and all q.
    The rate falls linearly to 0; if this is all of the training (end to end), it is phase one's."""
    d_model = lm.W_U.shape[1]
    peak, warmup, decay = config.kl_lr, 0, 1.0
    if config.kl_tokens == config.tokens and not config.start:
        peak, warmup, decay = config.lr, config.warmup, 0.2
    kind = phase.trainees[0].loss  # of one method: the same for all
    for step in range(phase.step, phase.steps):
        first = phase.first + step * config.kl_batch * world_size()
        tokens = own_sequences(stream, first, config.kl_batch, lm.W_U.device)  # [B, T]
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout, where a method has it
        with torch.no_grad():
            resid = lm.prefix(tokens, config.layer)  # [B, T, D]
            keep = content(resid, lm.n_skip, phase.limit)  # [B, T]
            n = mean_over_ranks(keep.sum().float()).clamp_min(1)  # tokens, in a mean process
            weight = keep.flatten() / n  # [N]; the mean of y is mean_over_ranks(weight @ y)
            original = single(resid).flatten(0, 1)  # [N, D]
            variance = weight @ (original - weight @ original).pow(2).sum(-1)
            last_p = None if kind == "mse" else lm.suffix(resid, config.layer).flatten(0, 1)

        passes = [t.splice(tokens, resid, keep, config.layer) for t in phase.trainees]
        if kind == "mse":  # no later block runs
            kls = [torch.zeros_like(n) for _ in passes]
        else:
            lasts_q = []
            for t, (*_, spliced) in zip(phase.trainees, passes):
                lasts_q.append(t.lm.suffix(spliced, config.layer).flatten(0, 1))
            kls = SlicedKL.apply(lm, weight, last_p, *lasts_q)

        losses, figures = [], []
        for t, (x, x_hat, active, _), kl in zip(phase.trainees, passes, kls):
            mse = weight @ (single(x) - x_hat).pow(2).mean(-1)
            beta = mean_over_ranks(mse.detach()) / (mean_over_ranks(kl.detach()) + 1e-8)
            loss = {"kl": (beta * kl + mse) / 2, "kl-only": kl, "mse": mse}[kind]
            l0 = sum_over_ranks(active.counts).sum() / (n * world_size())
            if t.sae.kind == "relu":
                if kind == "kl-only":
                    loss = beta * kl  # as large as the MSE, beside which lambda stands
                # Phase one's MSE, of x / scale and summed over D, is D / scale^2 times this one.
                loss = loss * d_model / t.sae.scale**2 + t.l1 * t.sae.penalty(active) / n
                if t.l0_target is not None:
                    t.l1 = t.l1 * torch.where(l0 > t.l0_target, 1.001, 0.999)
            if t.sae.kind == "batchtopk" and t.sae.training:
                move_threshold(t.sae, active, step)
            losses.append(loss)
            row = {"loss": loss, "mse": mse, "fvu": mse * d_model / variance, "l0": l0}
            if kind != "mse":
                row.update(kl=kl, beta=beta)
            figures.append({name: value.detach() for name, value in row.items()})
        sum(losses).backward()  # each loss reaches its own SAE alone

        lr = peak * lr_factor(step, phase.steps, warmup, decay)
        for t in phase.trainees:
            update(t, lr)
        phase.step = step + 1
        after_step(phase, figures)


METHODS = {  # name -> (lm, a copy of the MSE SAE, config) -> what to train
    "kl": lambda lm, sae, config: Trainee(sae, lm, "kl"),
    "kl-only": lambda lm, sae, config: Trainee(sae, lm, "kl-only"),
    "mse": lambda lm, sae, config: Trainee(sae, lm, "mse"),  # the control
}


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
def evaluate(lm, tokens, trainees: list[Trainee], config: Config) -> tuple[dict, list]:
    """On held-out tokens [n, T]: figures of the model, and of each trainee.

    ce, kl: nats per token. gap: CE above the model's own. fvu: share of the variance of x left
    unexplained. l0: active latents per token. dead: latents that never fired. Positions without
    content (`content`) do not count; their share is `left_out`."""
    limit = sink_limit(trainees[0].sae, config)
    sums = collections.defaultdict(float)  # over all batches
    for batch in tokens[rank() :: world_size()].to(lm.W_U.device).split(8):
        resid = lm.prefix(batch, config.layer)  # [B, T, D]
        keep = content(resid, lm.n_skip, limit)  # [B, T]
        zero = torch.where(keep[..., None], 0, resid)
        passes = [(lm, resid), (lm, zero)]  # the model's own, and ablated
        for i, t in enumerate(trainees):
            x, x_hat, active, spliced = t.splice(batch, resid, keep, config.layer)
            passes.append((t.lm, spliced))
            sums["error", i] += (x - x_hat)[keep.flatten()].double().pow(2).sum()
            sums["fired", i] += active.counts.double()
        scored = keep[:, :-1]  # a token's next one is its target
        lasts = [m.suffix(s, config.layer)[:, :-1][scored] for m, s in passes]
        sums["ce, kl"] += ce_and_kl(lm, lasts, batch[:, 1:][scored])
        x = resid[keep].double()
        sums["x"] += x.sum(0)
        sums["x^2"] += x.pow(2).sum()
        sums["kept"] += keep.sum().double()
        sums["scored"] += scored.sum().double()
    sums = {name: sum_over_ranks(value) for name, value in sums.items()}

    kept = sums["kept"].item()
    variance = (sums["x^2"] - sums["x"].pow(2).sum() / kept).item()
    (ce_original, _), (ce_zero, _), *rows = (sums["ce, kl"] / sums["scored"]).tolist()
    model = {"ce_original": ce_original, "ce_zero": ce_zero, "left_out": 1 - kept / tokens.numel()}
    figures = []
    for i, (ce, kl) in enumerate(rows):
        fired = sums["fired", i]
        row = {"ce": ce, "gap": ce - ce_original, "kl": kl}
        row["fvu"] = sums["error", i].item() / variance
        row["l0"] = fired.sum().item() / kept
        row["dead"] = int((fired == 0).sum())
        lost = ce_zero - ce_original
        row["loss_recovered"] = (ce_zero - ce) / lost if lost else None
        figures.append(row)
    return model, figures


# ---- Fast paths: on the CPU, the same values in less time --------------------------------------
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x, weight, bias=None):
    """x weight' + bias. In float32 on the CPU oneDNN's product is up to 1.5 times as fast as that
    of the BLAS behind F.linear; it has no derivative, so only where none is recorded."""
    recorded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    fast = FAST and ONEDNN and x.is_cpu and x.dtype == weight.dtype == torch.float32
    if not fast or recorded or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Entries(NamedTuple):
    """The P entries of a sparse f [N, F] token by token, or of f' [F, N] latent by latent."""

    values: Tensor  # [P], above 0; or 0 where a token has fewer than K positive latents
    rows: Tensor  # [P], ascending
    columns: Tensor  # [P]


def active_entries(pre, k, floor) -> Entries:
    """What `activate` leaves of pre [N, F]; K entries of each token, or all that reach `floor`."""
    if k is None:
        tokens, latents = ((pre > 0) & (pre >= floor)).nonzero(as_tuple=True)
        return Entries(pre[tokens, latents], tokens, latents)
    values, latents = pre.topk(k, sorted=False)
    tokens = torch.arange(len(pre)).repeat_interleave(k)
    return Entries(values.relu().flatten(), tokens, latents.flatten())


def times(f: Entries, table, n: int):
    """The product f @ table [n, D] of a sparse f of n rows."""
    offsets = torch.searchsorted(f.rows, torch.arange(n))
    return F.embedding_bag(f.columns, table, offsets, mode="sum", per_sample_weights=f.values)


class SparseAutoencode(torch.autograd.Function):
    """`autoencode` and its gradients with one dense product, the encoder's.

    With g = d loss / d x_hat, s [F] = d loss / d sums, and h = g W_dec' + s where f > 0, else 0:
    dW_dec = f' g, dW_enc = h' (x - b_dec), db_enc = sum_n h, dx = h W_enc, db_dec = sum_n (g - dx).
    h is wanted at the entries of f alone. There g W_dec' is the derivative of <f' g, W_dec> by f,
    which torch has for `times`: the gradient of f' g, with W_dec coming in."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, select, keep):
        centred = x - b_dec
        pre = linear(centred, W_enc, b_enc)  # [N, F], in bfloat16 under autocast
        n = torch.tensor(len(x))
        if keep is not None:
            pre.masked_fill_(~keep[:, None], -torch.inf)
            n = keep.sum()
        k, floor = select(pre, n)
        entries = active_entries(pre, k, floor)
        entries = entries._replace(values=single(entries.values))
        ctx.save_for_backward(centred, W_enc, W_dec, *entries)
        floors = [floor] if isinstance(floor, Tensor) else []
        ctx.mark_non_differentiable(entries.rows, entries.columns, *floors)
        return times(entries, W_dec, len(x)) + b_dec, floor, *entries

    @staticmethod
    def backward(ctx, g, _, g_values, *__):
        centred, W_enc, W_dec, *entries = ctx.saved_tensors
        entries = Entries(*entries)
        # A stable sort of int32 is a radix sort on the CPU, many times faster than the others.
        order = entries.columns.int().sort(stable=True).indices
        latents, values = entries.columns[order], entries.values[order].requires_grad_()
        f_T = Entries(values, latents, entries.rows[order])
        with torch.enable_grad():
            dW_dec = times(f_T, g, len(W_enc))
        (h,) = torch.autograd.grad(dW_dec, values, W_dec)  # g_values: s, for each entry
        h = (h + g_values[order]) * (values > 0)
        dW_enc = times(f_T._replace(values=h), centred, len(W_enc))
        db_enc = torch.zeros_like(W_enc[:, 0]).index_add_(0, latents, h.to(W_enc.dtype))
        dx = None
        if ctx.needs_input_grad[0]:
            by_token = entries._replace(values=torch.empty_like(h).index_copy_(0, order, h))
            dx = times(by_token, W_enc, len(g))
        return dx, dW_enc, db_enc, dW_dec.detach(), g.sum(0) - db_enc @ W_enc, None, None


def sparse_autoencode(x, W_enc, b_enc, W_dec, b_dec, select, keep):
    """`autoencode`, for the CPU."""
    out = SparseAutoencode.apply(x, W_enc, b_enc, W_dec, b_dec, select, keep)
    x_hat, floor, values, _, latents = out
    zeros = values.new_zeros(len(W_enc))
    counts = zeros.long().index_add_(0, latents, (values > 0).long())
    return x_hat, Activity(counts, zeros.index_add(0, latents, values), floor)


# ---- Language models: what the families share --------------------------------------------------
class Rope(NamedTuple):
    """Rotary positions (RoFormer, arXiv 2104.09864), half-split, on `dim` dimensions of a head."""

    dim: int
    base: float
    factor: float = 1.0  # positions are divided by it

    def tables(self, resid):
        """cos and sin [T, dim] for resid [B, T, D], in its dtype."""
        even = torch.arange(0, self.dim, 2, device=resid.device)
        inv_freq = 1 / self.base ** (even / self.dim)
        positions = torch.arange(resid.shape[1], device=resid.device).float() / self.factor
        angles = torch.outer(positions, inv_freq).repeat(1, 2)
        return angles.cos().to(resid.dtype), angles.sin().to(resid.dtype)


def rotate(x, cos, sin):
    """Turns the first dimensions, as many as cos has, of every head; x is [B, H, T, head_dim]."""
    dim = cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class LanguageModel(nn.Module):
    """Runs to block L, goes on from block L + 1, unembeds. Parameters are named as in checkpoints:
    a body of embedding, blocks and final norm, and maybe a head; else the embedding unembeds."""

    block_kind = norm_kind = nn.Identity  # classes
    body = embedding = layers = norm = head = ""  # names of the parts in checkpoints
    n_skip = 0  # leading positions without content (<bos>)
    kl_and_gradient = staticmethod(kl_and_gradient)  # until compile_parts

    def __init__(self, arch: model_loaders.Architecture, has_head: bool):
        super().__init__()
        self.max_context = arch.max_context
        self.logit_cap = arch.logit_cap
        body = nn.ModuleDict()
        body[self.embedding] = nn.Embedding(arch.n_vocab, arch.d_model)
        body[self.layers] = nn.ModuleList(self.block_kind(arch, i) for i in range(arch.n_layers))
        body[self.norm] = self.norm_kind(arch.d_model, arch.eps)
        self.add_module(self.body, body)
        if has_head:
            self.add_module(self.head, nn.Linear(arch.d_model, arch.n_vocab, bias=False))

    def part(self, name: str) -> nn.Module:
        return self.get_submodule(f"{self.body}.{name}")

    @property
    def blocks(self) -> nn.ModuleList:
        return self.part(self.layers)

    @property
    def W_U(self):  # [V, D]
        return getattr(self, self.head, self.part(self.embedding)).weight

    def embed(self, tokens):
        return self.part(self.embedding)(tokens)

    def prefix(self, tokens, layer: int):
        """Output [B, T, D] of block `layer` for tokens [B, T]; later blocks never run."""
        return self.suffix(self.embed(tokens), -1, layer + 1)

    def suffix(self, resid, layer: int, stop: int | None = None):
        """Output [B, T, D] of the last block (or that before `stop`), from that of `layer`."""
        tables = {}
        for block in self.blocks[layer + 1 : stop]:
            if block.rope not in tables:
                tables[block.rope] = block.rope.tables(resid)
            resid = block(resid, *tables[block.rope])
        return resid

    def final_norm(self, resid):
        return self.part(self.norm)(resid)

    def unembed(self, resid):
        """Logits [..., V] of the last block's output [..., D]."""
        return soft_cap(linear(self.final_norm(resid), self.W_U), self.logit_cap)

    def forward(self, tokens):
        """Logits [B, T, V] of tokens [B, T]."""
        return self.unembed(self.suffix(self.embed(tokens), -1))

    def compile_parts(self):
        """torch.compile for the blocks and the KL, which are bound by elementwise traffic."""
        for block in self.blocks:
            block.compile(fullgraph=True)
        self.kl_and_gradient = torch.compile(kl_and_gradient)


# ---- Pythia (GPT-NeoX, arXiv 2304.01373) -------------------------------------------------------
class PythiaBlock(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), or one after the other; rotary on a part of a head."""

    def __init__(self, arch: model_loaders.Architecture, i: int):
        super().__init__()
        self.rope = Rope(**arch.ropes[i])
        self.n_heads = arch.n_heads
        self.parallel = arch.parallel
        self.input_layernorm = nn.LayerNorm(arch.d_model, arch.eps)
        self.post_attention_layernorm = nn.LayerNorm(arch.d_model, arch.eps)
        self.attention = nn.ModuleDict()
        self.attention["query_key_value"] = Linear(arch.d_model, 3 * arch.d_model)
        self.attention["dense"] = Linear(arch.d_model, arch.d_model)
        self.mlp = nn.ModuleDict()
        self.mlp["dense_h_to_4h"] = Linear(arch.d_model, arch.d_mlp)
        self.mlp["dense_4h_to_h"] = Linear(arch.d_mlp, arch.d_model)

    def attend(self, x, cos, sin):
        # The weight's rows go head by head, the q, k and v of a head side by side.
        qkv = self.attention.query_key_value(x).unflatten(-1, (self.n_heads, -1))
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=-1)  # each [B, H, T, head_dim]
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attention.dense(out.transpose(1, 2).flatten(2))

    def forward(self, x, cos, sin):
        y = x + self.attend(self.input_layernorm(x), cos, sin)
        h = self.post_attention_layernorm(x if self.parallel else y)
        h = F.gelu(self.mlp.dense_h_to_4h(h))
        return y + self.mlp.dense_4h_to_h(h)


class Pythia(LanguageModel):
    block_kind = PythiaBlock
    norm_kind = nn.LayerNorm
    body = "gpt_neox"
    embedding = "embed_in"
    layers = "layers"
    norm = "final_layer_norm"
    head = "embed_out"


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


class GemmaBlock(nn.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))). Grouped-query attention to all
    before it, or to a window. Gemma 2 soft-caps the scores; Gemma 3 norms q and k instead."""

    def __init__(self, arch: model_loaders.Architecture, i: int):
        super().__init__()
        self.rope = Rope(**arch.ropes[i])
        self.window = arch.windows[i]
        self.n_kv = arch.n_kv
        self.head_dim = arch.head_dim
        self.score_scale = arch.score_scale
        self.score_cap = arch.score_cap
        d_model, d_q, d_kv = arch.d_model, arch.n_heads * arch.head_dim, arch.n_kv * arch.head_dim
        self.self_attn = nn.ModuleDict()
        self.self_attn["q_proj"] = Linear(d_model, d_q, bias=False)
        self.self_attn["k_proj"] = Linear(d_model, d_kv, bias=False)
        self.self_attn["v_proj"] = Linear(d_model, d_kv, bias=False)
        self.self_attn["o_proj"] = Linear(d_q, d_model, bias=False)
        gemma_3 = arch.model_type == "gemma3_text"
        for name in ("q_norm", "k_norm"):
            self.self_attn[name] = RMSNorm(arch.head_dim, arch.eps) if gemma_3 else nn.Identity()
        self.mlp = nn.ModuleDict()
        self.mlp["gate_proj"] = Linear(d_model, arch.d_mlp, bias=False)
        self.mlp["up_proj"] = Linear(d_model, arch.d_mlp, bias=False)
        self.mlp["down_proj"] = Linear(arch.d_mlp, d_model, bias=False)
        self.input_layernorm = RMSNorm(d_model, arch.eps)
        self.post_attention_layernorm = RMSNorm(d_model, arch.eps)
        self.pre_feedforward_layernorm = RMSNorm(d_model, arch.eps)
        self.post_feedforward_layernorm = RMSNorm(d_model, arch.eps)

    def attend(self, x, cos, sin):
        parts = self.self_attn
        q = parts.q_norm(self.heads(parts.q_proj(x)))  # [B, H, T, head_dim]
        k = parts.k_norm(self.heads(parts.k_proj(x)))  # [B, n_kv, T, head_dim]
        v = self.heads(parts.v_proj(x))
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        # Each key-value head serves a group of query heads: [B, n_kv, group, T, head_dim].
        q, k, v = q.unflatten(1, (self.n_kv, -1)), k.unsqueeze(2), v.unsqueeze(2)
        scores = single(soft_cap(q @ k.mT * self.score_scale, self.score_cap))
        hidden = torch.ones_like(scores[0, 0, 0], dtype=torch.bool).triu(1)
        if self.window is not None:
            hidden = hidden | torch.ones_like(hidden).tril(-self.window)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).to(x.dtype)
        return parts.o_proj((weights @ v).flatten(1, 2).transpose(1, 2).flatten(2))

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x, cos, sin):
        x = x + self.post_attention_layernorm(self.attend(self.input_layernorm(x), cos, sin))
        h = self.pre_feedforward_layernorm(x)
        h = F.gelu(self.mlp.gate_proj(h), approximate="tanh") * self.mlp.up_proj(h)
        return x + self.post_feedforward_layernorm(self.mlp.down_proj(h))


class Gemma(LanguageModel):
    block_kind = GemmaBlock
    norm_kind = RMSNorm
    body = "model"
    embedding = "embed_tokens"
    layers = "layers"
    norm = "norm"
    head = "lm_head"
    n_skip = 1

    def embed(self, tokens):
        x = super().embed(tokens)
        # The factor is rounded to the model's dtype, as the published weights expect.
        return x * torch.tensor(x.shape[-1] ** 0.5, dtype=x.dtype)


# ---- From a checkpoint to a model --------------------------------------------------------------
def build_lm(config: dict, has_head: bool = False) -> LanguageModel:
    """The model that a parsed config.json describes, on the meta device; has_head: whether there is
    an unembedding of its own, whatever config.json says. UserError for what is not ours."""
    with user_errors("config.json describes no model that runs"), torch.device("meta"):
        arch = model_loaders.describe_model(config)
        family = Pythia if arch.model_type == "gpt_neox" else Gemma
        lm = family(arch, has_head or not arch.tied)
        lm(torch.zeros(1, 2, dtype=torch.long))  # sizes may not fit each other
    return lm


def load_lm(name: str, device="cpu", dtype=torch.float32) -> LanguageModel:
    """A frozen language model, `lm(tokens [B, T]) -> logits [B, T, V]`, from a short name, a Hub
    owner/name[@revision] or a folder. UserError where its tensors do not fit or are not finite."""
    config = model_loaders.load_config(name)
    weights = model_loaders.load_weights(name, device, dtype)
    has_head = bool(weights.keys() & {"embed_out.weight", "lm_head.weight"})
    lm = build_lm(config, has_head)
    with user_errors(f"{name}: weights do not fit config.json"):
        lm.load_state_dict(weights, assign=True)
    return lm.eval().requires_grad_(False)


# ---- Processes: one, or several GPUs under torchrun --------------------------------------------
def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(x):
    """The sum over all processes; x itself where there is one."""
    if world_size() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
    return x


def mean_over_ranks(x):
    """The mean over all processes; x itself where there is one."""
    return sum_over_ranks(x) / world_size() if world_size() > 1 else x


def join_processes(name: str) -> torch.device:
    """The device that --device names, for each process of torchrun its own; joins the processes."""
    local = os.environ.get("LOCAL_RANK")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{local or 0}" if name == "cuda" else name
    with user_errors(f"--device {name} is not there"):
        device = torch.zeros((), device=name).device
    if local is not None and not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # tokenising may take hours
    return device


# ---- A run, from its settings to its report ----------------------------------------------------
class Interrupted(BaseException):
    """Ctrl-C or SIGTERM; args[0] is the signal's number."""


def check(config: Config, methods: dict) -> LanguageModel:
    """Fills in what depends on the model; returns the model, without weights. UserError for
    settings that cannot be, with the value, before anything is loaded or written."""
    model_loaders.check_ranges(config)
    lm = build_lm(model_loaders.load_config(config.model))
    last = len(lm.blocks) - 1
    if config.layer is None:
        config.layer = (last + 1) // 2
    if config.lr is None:
        config.lr = 2e-4 / math.sqrt(config.d_sae / 2**14)
    if config.data is None:
        config.data = model_loaders.usual_data(model_loaders.load_tokenizer(config.model))
    config.k = [*dict.fromkeys(config.k)]
    config.method = [*dict.fromkeys(config.method)]

    unknown = [name for name in config.method if name not in methods]
    refuse(bool(unknown), f"--method {unknown}: there are {', '.join(methods)}")
    layer, k, context = config.layer, max(config.k), config.context
    refuse(layer > last, f"--layer {layer}: {config.model} has layers 0 to {last}")
    refuse(k > config.d_sae, f"--k {k} is above d_sae = {config.d_sae}")
    refuse(context > lm.max_context, f"--context {context} is above the model's {lm.max_context}")
    several = config.sae == "batchtopk" and world_size() > 1
    refuse(several, "--sae batchtopk picks K N latents of the batch of one GPU: run it on one")

    tokens, kl_tokens, batch = config.tokens, config.kl_tokens, config.batch
    refuse(kl_tokens > tokens, f"--kl-tokens {kl_tokens} is above --tokens {tokens}")
    mse_tokens = (tokens // context - kl_tokens // context) * (context - 1)  # one may be <bos>
    by_mse = kl_tokens < tokens and not config.start
    few = by_mse and mse_tokens < batch * world_size()
    refuse(few, f"{tokens - kl_tokens} tokens by MSE are below a step (--batch {batch})")
    step = config.kl_batch * context * world_size()
    few = 0 < kl_tokens < step
    refuse(few, f"--kl-tokens {kl_tokens} is below a step of {step} (--kl-batch x --context)")
    return lm


def guess_seconds(config: Config, lm: LanguageModel, device: torch.device) -> dict:
    """Seconds that each part of a run may take, roughly: a multiplication for each token and
    parameter that meet, at half the speed of products of 1024 x 1024."""
    x = torch.rand(1024, 1024, device=device, dtype=getattr(torch, config.dtype))
    (x @ x).sum().item()
    start = time.perf_counter()
    (x @ x @ x @ x).sum().item()
    each = 2 * (time.perf_counter() - start) / (3 * 1024**3)

    n_saes = len(config.k)
    whole = sum(p.numel() for p in lm.parameters())
    block = sum(p.numel() for p in lm.blocks[0].parameters())
    prefix = (config.layer + 1) * block + 3 * n_saes * config.d_sae * lm.W_U.shape[1]
    mse_tokens = 0 if config.start else config.tokens - config.kl_tokens
    parts = {"MSE": mse_tokens * prefix * each}
    for method in config.method:
        later = 0 if method == "mse" else (1 + 3 * n_saes) * whole
        parts[method] = config.kl_tokens * (prefix + later) * each
    evaluations = config.eval_tokens * (1 + len(config.method))
    parts["evaluation"] = evaluations * (2 + n_saes) * whole * each
    return parts


LABELS = {"MSE": "after MSE", "kl": "after KL+MSE", "kl-only": "after KL alone"}
LABELS["mse"] = "after MSE alone, same tokens"


class Run:
    """What a command line asks for, and what has been done of it. UserError for what cannot be.

    In its folder stand the SAE after the first method, that of phase one in `before`, those of
    other methods in folders of their own; of several K each has all of that in k8, k16, ..."""

    def __init__(self, config: Config, methods: dict = METHODS):
        self.config = config
        self.methods = methods
        self.device = join_processes(config.device)
        self.lm = check(config, methods)  # without weights until `prepare`
        path = model_loaders.run_path(asdict(config))
        self.folder = model_loaders.RunFolder(path, ["before", *methods], rank())
        self.sae_folders = [path / f"k{k}" if len(config.k) > 1 else path for k in config.k]
        self.results = {}  # for MSE and each method: of every SAE the figures of `evaluate`
        self.model_figures = {}
        self.seconds = {}  # for MSE and each method
        self.mse_saes = []  # the state of each SAE after phase one
        self.l1 = config.l1
        self.losses = []  # since the last line of metrics.jsonl
        self.saved_phase = {}
        self.published = False  # whether others trained the SAE of --start
        self.saved = self.phase_began = time.monotonic()
        self.signal = None
        self.in_loop = False
        self.closing = contextlib.ExitStack()

    def run(self) -> list:
        """The whole run; a report for each K, as in its report.json."""
        with self.closing:
            self.folder.take(self.config.resume, self.config.overwrite)
            self.closing.callback(self.folder.leave)
            self.prepare()
            if not self.restore() and not self.config.overwrite:  # what that replaces stays a while
                self.folder.begin(asdict(self.config))
            reports = self.train()
            self.folder.finish()
            return reports

    def prepare(self):
        """Loads the model, and starts the stream of tokens."""
        config = self.config
        torch.set_float32_matmul_precision("high")  # TF32 on CUDA
        ks = f", K {', '.join(map(str, config.k))}" if "topk" in config.sae else ""
        what = f"{config.sae} SAE of {config.d_sae:,} latents{ks}"
        say(f"saeft: {what}, block {config.layer} of {config.model}, on {self.device}")
        budget = f"{config.tokens / 1e6:.2f}M tokens, {config.kl_tokens / 1e6:.2f}M of them for"
        self.guess = guess_seconds(config, self.lm, self.device)
        minutes = sum(self.guess.values()) / 60
        say(f"{budget} {', '.join(config.method)}; roughly {minutes:.0f} minutes")
        tokenizer = model_loaders.load_tokenizer(config.model, config.bos)
        progress("loading the model")
        self.lm = load_lm(config.model, self.device, getattr(torch, config.dtype))
        self.lm.n_skip = int(tokenizer.bos_id is not None)
        if config.compile:
            self.lm.compile_parts()
        source = config.data, tokenizer, config.context, config.tokens, config.eval_tokens
        self.stream = TokenStream(*source, report=progress, n_rows=len(self.lm.W_U))
        self.closing.callback(self.stream.close)
        self.n = self.stream.n_train  # sequences, the first n_mse of them for phase one
        self.n_mse = self.n - config.kl_tokens // config.context

    def train(self) -> list:
        """Phase one, each method from its SAEs, the evaluations; a report for each SAE."""
        config, lm = self.config, self.lm
        saes = self.first_saes()
        limit = sink_limit(saes[0], config)
        if "MSE" not in self.results:
            n_tokens = 0 if config.start else self.n_mse * (config.context - lm.n_skip)
            trainees = [Trainee(sae, lm, "mse", decay=0.0) for sae in saes]
            phase = Phase("MSE", trainees, n_tokens // (config.batch * world_size()), limit)
            phase.buffer = ActivationBuffer(lm, self.stream, self.n_mse, limit, config)
            self.run_phase(phase, train_mse, config)
        steps = (self.n - self.n_mse) // (config.kl_batch * world_size())
        for method in config.method if steps else []:
            if method not in self.results:
                trainees = [self.trainee(method, i, sae) for i, sae in enumerate(saes)]
                phase = Phase(method, trainees, steps, limit, first=self.n_mse)
                self.run_phase(phase, finetune, lm, self.stream, config)
        return [self.report(i) for i in range(len(saes))]

    def first_saes(self) -> list[SAE]:
        """The SAEs with which phase one begins, or with which it ended."""
        config = self.config
        if config.start:
            saes = [SAE.load(config.start)]
            self.published = saes[0].median_norm.item() == 0
        else:
            d_model = self.lm.W_U.shape[1]
            with user_errors(f"--d-sae {config.d_sae}"):
                saes = [SAE(d_model, config.d_sae, k, config.sae, config.seed) for k in config.k]
        for sae in saes:
            sae.to(self.device).bfloat16 = config.dtype == "bfloat16"
        for sae, saved in zip(saes, self.mse_saes):
            sae.load_state_dict(saved)
        if not self.mse_saes:
            self.measure(saes)
        return saes

    @torch.no_grad()
    def measure(self, saes: list[SAE]):
        """From the first activations: the median norm where an SAE has none yet, scale and b_dec of
        new SAEs. All processes take what the first one measured."""
        n = min(self.n_mse or self.n, 32_768 // self.config.context + 1)
        tokens = self.stream.train(0, n).to(self.device)
        resid = collect(self.lm, tokens, self.config.layer)  # [B, T, D]
        median = single(resid[:, self.lm.n_skip :]).norm(dim=-1).median()
        for sae in saes:
            if sae.median_norm <= 0:
                sae.median_norm.copy_(median)
            x = single(resid[content(resid, self.lm.n_skip, sink_limit(sae, self.config))])
            refuse(len(x) == 0, ALL_SINKS)
            scale = x.pow(2).sum(-1).mean().sqrt()
            if not self.config.start:
                sae.rescale(scale)
                sae.b_dec.copy_(x.mean(0) / scale)
            elif sae.kind == "relu" and self.published:
                sae.rescale(scale)
                self.l1 = max(1e-4, sae.stationary_l1(x[:4096]))
            for values in sae.state_dict().values() if world_size() > 1 else []:
                dist.broadcast(values, 0)

    def trainee(self, method: str, i: int, sae: SAE) -> Trainee:
        """What a method trains, from a copy of SAE i of phase one."""
        l0 = self.results["MSE"][i]["l0"]
        sae = copy.deepcopy(sae).eval()
        if sae.kind == "batchtopk" and self.published:
            sae.k = l0  # its threshold may leave another L0 on this text: train at that
        if sae.kind != "relu":
            sae.rescale(1.0)  # raw units, as published; lambda stands beside scaled activations
        torch.manual_seed(self.config.seed * 1009 + i)  # what a method draws is its own
        trainee = self.methods[method](self.lm, sae, self.config)
        trainee.l1 = self.l1
        if self.n_mse or self.config.start:  # else, end to end, there is no L0 to keep
            trainee.l0_target = l0
        return trainee

    def run_phase(self, phase: Phase, loop, *args):
        """A phase's loop, from where a checkpoint left it; saves and evaluates what it trained."""
        for t in phase.trainees:
            t.trained.train()
        if self.saved_phase.get("name") == phase.name:
            phase.load_state_dict(self.saved_phase)
            self.saved_phase = {}
        self.phase_began = time.monotonic() - self.seconds.get(phase.name, 0.0)
        self.in_loop = True
        loop(phase, *args, self.after_step)
        self.in_loop = False
        self.checkpoint(phase)
        self.finish(phase)
        self.checkpoint()

    def finish(self, phase: Phase):
        """Saves what a phase trained, and evaluates it."""
        name = phase.name
        trained = self.n_mse or self.config.start  # whether there is an SAE before the fine-tune
        for t in phase.trainees:  # a random BatchTopK SAE has no threshold yet
            t.trained.train(name == "MSE" and not trained)
        if trained or name != "MSE":
            parts = {"MSE": "before", self.config.method[0]: "."}
            self.save(phase, "." if self.n_mse == self.n else parts.get(name, name))
        progress(f"evaluating {LABELS.get(name, name)}")
        held_out = self.stream.validation()
        self.model_figures, rows = evaluate(self.lm, held_out, phase.trainees, self.config)
        for row, before in zip(rows, self.results.get("MSE", [])):
            known = trained and before["gap"]
            row["gap_closed"] = 1 - row["gap"] / before["gap"] if known else None
        self.results[name] = rows
        if name == "MSE":
            self.mse_saes = [t.sae.state_dict() for t in phase.trainees]

    def save(self, phase: Phase, part: str):
        """Writes what a phase trains into a part of each SAE's folder."""
        settings = {**asdict(self.config), "place": "resid_post"}
        seen = self.n_mse if phase.name == "MSE" else self.n
        metadata = model_loaders.sae_metadata(settings, self.lm.n_skip > 0, seen)
        metadata["saeft"] = {"l1": self.l1}
        self.folder.begin(asdict(self.config))
        for t, folder in zip(phase.trainees, self.sae_folders):
            if rank() == 0:
                t.save(folder / part, metadata)

    def report(self, i: int) -> dict:
        """Writes report.json and prints the closing table of SAE i; returns the report."""
        config, folder = self.config, self.sae_folders[i]
        results = {name: rows[i] for name, rows in self.results.items()}
        before = results["MSE"]
        final = results.get(config.method[0], {**before, "gap_closed": 0.0})
        out = {**asdict(config), "k": config.k[i], **self.model_figures, **final}
        for name in ("ce", "gap", "fvu", "kl"):
            out[f"{name}_mse"] = before[name]
            out[f"{name}_final"] = final[name]
        out.update(seconds=self.seconds, results=results)
        if rank() == 0:
            model_loaders.write_text(folder / "report.json", json.dumps(out, indent=2) + "\n")
        say(f"\n{folder}")
        say(f"{'':29}{'CE':>8}{'gap':>8}{'closed':>8}{'KL':>8}{'FVU':>7}{'L0':>7}")
        say(f"{'original model':29}{out['ce_original']:8.4f}")
        say(f"{'x replaced by 0':29}{out['ce_zero']:8.4f}")
        for name, row in results.items():
            label = LABELS.get(name, f"after {name}")
            if name == "MSE" and (config.start or not self.n_mse):
                label = "as loaded" if config.start else "at the random start"
            closed = row.get("gap_closed")
            closed = "" if closed is None else f"{closed:.1%}"
            figures = f"{row['ce']:8.4f}{row['gap']:8.4f}{closed:>8}{row['kl']:8.4f}"
            say(f"{label:29}{figures}{row['fvu']:7.4f}{row['l0']:7.2f}")
        return out

    def after_step(self, phase: Phase, figures: list[dict]):
        """Figures to metrics.jsonl and the progress line, every log_every steps; a checkpoint when
        it is time for one, or when a signal asks for the end."""
        self.losses.append(torch.stack([row["loss"] for row in figures]))
        if phase.step % self.config.log_every == 0 or phase.step == phase.steps:
            self.log(phase, figures)
        due = time.monotonic() - self.saved > 60 * self.config.checkpoint_minutes
        wishes = torch.tensor([self.signal or 0, int(due)])
        if world_size() > 1:
            dist.all_reduce(wishes, dist.ReduceOp.MAX)  # all processes stop at the same step
        stop, due = wishes.tolist()
        if stop or due:
            self.checkpoint(phase)
        if stop:
            raise Interrupted(stop)

    def log(self, phase: Phase, figures: list[dict]):
        """A line of metrics.jsonl for each SAE. UserError where a loss was not finite."""
        config = self.config
        losses = mean_over_ranks(torch.stack(self.losses))  # [steps since the last line, SAEs]
        when = f"in the {len(losses)} steps to {phase.step} of {phase.steps}"
        finite = bool(losses.isfinite().all())
        refuse(not finite, f"a loss of {phase.name} {when} is not finite: lower its rate")
        self.losses = []
        self.seconds[phase.name] = spent = time.monotonic() - self.phase_began
        per_step = config.batch if phase.buffer else config.kl_batch * config.context
        tokens = phase.step * per_step * world_size()
        line = {"phase": phase.name, "step": phase.step, "tokens": tokens, "seconds": spent}
        lines = []
        for k, row, loss in zip(config.k, figures, losses.mean(0)):
            row = {name: float(value) for name, value in row.items()}
            lines.append(json.dumps({**line, "k": k, **row, "loss": float(loss)}))
        self.folder.log(lines)
        share = phase.step / phase.steps
        done = share * self.guess[phase.name]
        done += sum(self.guess[name] for name in self.results)
        minutes = sum(self.seconds.values()) * (sum(self.guess.values()) / done - 1) / 60
        text = f"{phase.name} {share:4.0%}, {minutes:.1f} minutes left, {tokens / spent:,.0f}"
        next_tenth = phase.step * 10 % phase.steps < 10 * config.log_every
        if sys.stdout.isatty() or next_tenth:
            progress(f"{text} tokens/s, FVU {row['fvu']:.3f}, L0 {row['l0']:.1f}")

    def checkpoint(self, phase: Phase | None = None):
        """Saves all that `restore` needs, of several processes each its own."""
        tag = f"-{len(self.results)}-{phase.step if phase else 0}"
        kept = ("results", "model_figures", "seconds", "mse_saes", "l1", "losses")
        state = {
            "config": asdict(self.config),
            "world": world_size(),
            "identity": {"model": model_loaders.model_key(self.config.model)},
            "run": {name: getattr(self, name) for name in kept},
            "phase": phase.state_dict() if phase else {},
        }
        self.folder.begin(asdict(self.config))
        self.folder.save_state(state, tag)
        self.saved = time.monotonic()

    def restore(self) -> bool:
        """Goes back to the last checkpoint, if there is one. UserError if its settings differ."""
        saved = self.folder.load_state(self.device) if self.config.resume else None
        if saved is None:
            return False
        identity = {"model": model_loaders.model_key(self.config.model)}
        self.folder.go_on(saved, asdict(self.config), identity, world_size())
        vars(self).update(saved["run"])
        self.saved_phase = saved["phase"]
        return True

    def on_signal(self, number: int, frame):
        """In a loop the step is finished and saved; anywhere else, and the second time, it ends."""
        if not self.in_loop or self.signal is not None:
            raise Interrupted(number)
        self.signal = number


# ---- The command line --------------------------------------------------------------------------
def parse(argv: list[str] | None = None) -> Config:
    """Settings from the command line: Config's defaults, the model's preset, what the SAE of
    --start tells, then the flags. UserError also where the last two contradict each other."""
    parser = model_loaders.flags_of(Config, __doc__.splitlines()[0])
    given = vars(parser.parse_args(argv))
    told = {}
    if "start" in given:
        cfg = model_loaders.read_sae(given["start"])[1]
        told = model_loaders.sae_settings(cfg)
        own = cfg["metadata"]["saeft"]
        told["tokens"] = told.get("tokens", 0)
        place = told.pop("place", "resid_post")
        refuse(place != "resid_post", f"--start reads {place}")
        kind = own.get("kind") or {"standard": "relu"}.get(cfg["architecture"], cfg["architecture"])
        told["sae"] = kind
        if kind == "relu" and own.get("l1"):
            told["l1"] = own["l1"]
        for name in {"layer", "k", "sae", "d_sae"} & given.keys() & told.keys():
            refuse(given[name] != told[name], f"--{name} {given[name]}: that SAE has {told[name]}")
        for name in ("model", "layer"):
            refuse(name not in {**told, **given}, f"--{name}: the SAE of --start does not say it")
    model = Path(given.get("model", told.get("model", Config().model)))
    short = model.name.split("@")[0].removesuffix("-deduped").removesuffix("-pt")
    preset = PRESETS.get(short, "")
    config = Config(**{**vars(parser.parse_args(preset.split())), **told, **given})
    if config.start:
        refuse("tokens" in given, "--tokens: with --start it is --kl-tokens alone that counts")
        seen = told["tokens"] if config.data in (None, told.get("data")) else 0
        config.tokens = seen + config.kl_tokens
    return config


def main(argv: list[str] | None = None, methods: dict = METHODS) -> int:
    """The command line. Exit status: 0; 2 for a user's mistake; 130 or 143 after a signal; 1 where
    another process of torchrun has ended."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # names that a locale cannot show
    try:
        run = Run(parse(argv), methods)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, run.on_signal)
        run.run()
    except UserError as error:
        print(f"saeft: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        print(f"saeft: another process ended ({str(error):.100})", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        saved = (run.folder.path / "checkpoint.pt").exists()
        advice = "the same command with --resume goes on" if saved else "nothing was done yet"
        print(f"saeft: {signal.Signals(interrupted.args[0]).name}: {advice}", file=sys.stderr)
        return 128 + interrupted.args[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
