"""saeft: train a sparse autoencoder by MSE, then close part of its cross-entropy gap by KL+MSE.

    python saeft.py                                  # embedded model, two minutes, no network
    python saeft.py --model pythia-160m --k 80       # the paper's setting: 475M + 25M tokens
    python saeft.py --model gemma-2-2b --k 40 80     # two SAEs on one activation stream

The method is "Revisiting End-To-End Sparse Autoencoder Training: A Short Finetune Is All You Need"
(Karvonen 2025, arXiv 2503.17272). In the order of this file: settings, the language models, the
SAE, the KL loss, the activation buffer, phase one (MSE), phase two (KL+MSE), evaluation, command.
Shapes: N tokens, B sequences, T context, D d_model, F d_sae, V vocabulary, K active latents.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_loaders import (
    TokenStream,
    UserError,
    load_config,
    load_tokenizer,
    load_weights,
    save_sae,
)

# ---- Settings --------------------------------------------------------------------------------


def count(text: str) -> int:
    """A whole number, also written 500M, 25M, 4k or 1e6."""
    unit = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    number = float(text[:-1] if unit > 1 else text) * unit
    if not number.is_integer() or number < 0:
        raise ValueError(text)
    return int(number)


def flag(default, help: str, **kwargs):
    """A field of Config that is also a flag of the command line."""
    factory = {"default_factory": default} if callable(default) else {"default": default}
    return field(**factory, metadata={"help": help, **kwargs})


@dataclass
class Config:
    """Every setting of a run. PRESETS replace these defaults per model; flags replace both."""

    model: str = flag("tiny", "short name (pythia-160m, gemma-2-2b, ...), Hub owner/name or folder")
    layer: int | None = flag(
        None, "block whose output the SAE reads, 0-based (default: the middle)"
    )
    data: str | None = flag(None, "c4, pile, pythia, stdlib, a Hub dataset, or local files")
    sae: str = flag("topk", "activation of the SAE", choices=["topk", "batchtopk", "relu"])
    k: list[int] = flag(
        lambda: [80], "active latents a token; several train one SAE each", nargs="+"
    )
    d_sae: int = flag(2**14, "number of latents F")
    tokens: int = flag(500_000_000, "training tokens in all")
    kl_tokens: int = flag(25_000_000, "how many of them, the last ones, are the fine-tune's")
    method: list[str] = flag(lambda: ["kl"], "fine-tune methods, each from the MSE SAE", nargs="+")
    rank: int = flag(16, "rank of LoRA and of adapters")
    context: int = flag(1024, "tokens in a sequence")
    batch: int = flag(2048, "activations in an MSE step")
    kl_batch: int = flag(8, "sequences in a fine-tune step")
    buffer: int = flag(250, "sequences whose activations are mixed")
    lr: float | None = flag(None, "peak rate of the MSE phase (default: 2e-4 / sqrt(F / 2^14))")
    kl_lr: float = flag(5e-5, "first rate of the fine-tune, falling linearly to 0")
    l1: float = flag(0.1, "sparsity penalty lambda of --sae relu")
    warmup: int = flag(1000, "steps of linear warm-up in the MSE phase")
    dead_after: int = flag(10_000_000, "tokens without firing after which a latent counts as dead")
    eval_tokens: int = flag(1_000_000, "held-out tokens of the evaluation")
    seed: int = flag(0, "seed of everything random")
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto takes cuda where there is one")
    dtype: str = flag(
        "float32", "of the language model", choices=["float32", "bfloat16", "float16"]
    )
    name: str | None = flag(None, "folder under --out (default: model, layer, k and seed)")
    out: str = flag("runs", "where run folders go")
    overwrite: bool = flag(False, "replace a run of the same name")
    allow_short: bool = flag(False, "train on what there is when the data ends before the budget")
    log_every: int = flag(50, "steps between lines of metrics.jsonl")


PRESETS = {
    "tiny": dict(
        layer=3, k=[8], d_sae=1024, tokens=1_500_000, kl_tokens=300_000, context=128, method=["kl", "mse"],
        batch=4096, buffer=2000, kl_lr=2e-4, warmup=30, dead_after=100_000, eval_tokens=100_000, log_every=10,
    ),
    "pythia-160m": dict(layer=8),
    "gemma-2-2b": dict(layer=12, dtype="bfloat16", kl_batch=2),
    "gemma-2-9b": dict(dtype="bfloat16", kl_batch=2),
}  # fmt: skip

# ---- Language models: what both families share -----------------------------------------------


def rotary_tables(length: int, dim: int, base: float, device) -> tuple[Tensor, Tensor]:
    """cos and sin [T, dim] of rotary positions (RoFormer, arXiv 2104.09864), half-split layout."""
    inv_freq = base ** -(torch.arange(0, dim, 2, device=device).float() / dim)
    angles = torch.outer(torch.arange(length, device=device).float(), inv_freq).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the first cos.shape[-1] dimensions of every head; x is [B, H, T, head_dim]."""
    turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)
    return torch.cat((turned, rest), dim=-1)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(x / cap), or x itself where there is no cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


class LanguageModel(nn.Module):
    """Runs to block L, goes on from block L + 1, unembeds. Parameters are named as in checkpoints.

    A family makes a trunk of three parts in this order, embedding, blocks and final norm, its
    first child; the embedding is also the unembedding unless there is an `embed_out`.
    """

    n_skip = 0  # leading positions without content, left out of everything (Gemma's <bos>)
    logit_cap: float | None = None

    embedding = property(lambda self: self.parts[0])
    blocks = property(lambda self: self.parts[1])
    final_norm = property(lambda self: self.parts[2])
    W_U = property(lambda self: getattr(self, "embed_out", self.embedding).weight)  # [V, D]

    @property
    def parts(self) -> list[nn.Module]:
        return list(next(self.children()).values())

    def set_rotary(self, config: dict, dim: int, share: float, base: float) -> None:
        """Takes either spelling of the settings: `rope_parameters`, or keys of the config."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"config.json has rope_type = {kind!r}; supported: 'default'")
        self.rope_dim = int(dim * rope.get("partial_rotary_factor", share))
        self.rope_base = rope.get("rope_theta", base)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)

    def prefix(self, tokens: Tensor, layer: int) -> Tensor:
        """resid_post [B, T, D] of block `layer` for tokens [B, T]; later blocks never run."""
        return self.run_blocks(self.embed(tokens), 0, layer + 1)

    def suffix(self, resid: Tensor, layer: int) -> Tensor:
        """resid_post [B, T, D] of the last block, from that of block `layer`."""
        return self.run_blocks(resid, layer + 1, len(self.blocks))

    def run_blocks(self, resid: Tensor, start: int, stop: int) -> Tensor:
        rope = rotary_tables(resid.shape[1], self.rope_dim, self.rope_base, resid.device)
        for block in self.blocks[start:stop]:
            resid = block(resid, *rope)
        return resid

    def unembed(self, resid: Tensor) -> Tensor:
        """Logits [..., V] of the last block's resid_post [..., D]."""
        return soft_cap(F.linear(self.final_norm(resid), self.W_U), self.logit_cap)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]."""
        return self.unembed(self.suffix(self.embed(tokens), -1))


# ---- Pythia (GPT-NeoX, arXiv 2304.01373) -----------------------------------------------------


class PythiaAttention(nn.Module):
    def __init__(self, d_model: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.query_key_value = nn.Linear(d_model, 3 * d_model)
        self.dense = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # The weight's rows go head by head, the q, k and v of a head side by side.
        qkv = self.query_key_value(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)  # each [B, H, T, head_dim]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dense(out.transpose(1, 2).flatten(2))


class PythiaBlock(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        d_model, d_mlp = config["hidden_size"], config["intermediate_size"]
        self.parallel = config.get("use_parallel_residual", True)
        self.input_layernorm = nn.LayerNorm(d_model, config["layer_norm_eps"])
        self.post_attention_layernorm = nn.LayerNorm(d_model, config["layer_norm_eps"])
        self.attention = PythiaAttention(d_model, config["num_attention_heads"])
        self.mlp = nn.ModuleDict()
        self.mlp["dense_h_to_4h"] = nn.Linear(d_model, d_mlp)
        self.mlp["dense_4h_to_h"] = nn.Linear(d_mlp, d_model)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = x + self.attention(self.input_layernorm(x), cos, sin)
        h = self.post_attention_layernorm(x if self.parallel else y)
        return y + self.mlp.dense_4h_to_h(F.gelu(self.mlp.dense_h_to_4h(h)))


class Pythia(LanguageModel):
    """LayerNorm with bias, rotary on a part of each head, attention and MLP side by side."""

    def __init__(self, config: dict):
        super().__init__()
        vocab, d_model = config["vocab_size"], config["hidden_size"]
        head_dim, share = d_model // config["num_attention_heads"], config.get("rotary_pct", 0.25)
        self.set_rotary(config, head_dim, share, config.get("rotary_emb_base", 10000))
        self.gpt_neox = nn.ModuleDict()
        self.gpt_neox["embed_in"] = nn.Embedding(vocab, d_model)
        blocks = (PythiaBlock(config) for _ in range(config["num_hidden_layers"]))
        self.gpt_neox["layers"] = nn.ModuleList(blocks)
        self.gpt_neox["final_layer_norm"] = nn.LayerNorm(d_model, config["layer_norm_eps"])
        if not config.get("tie_word_embeddings", False):
            self.embed_out = nn.Linear(d_model, vocab, bias=False)


# ---- Gemma 2 (arXiv 2408.00118) --------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), in float32 whatever the model's dtype."""

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1 + self.weight.float())).to(x.dtype)


class GemmaAttention(nn.Module):
    """Grouped-query attention with soft-capped scores; sees all before it, or `window` tokens."""

    def __init__(self, config: dict, window: int | None):
        super().__init__()
        d_model, self.head_dim, self.window = config["hidden_size"], config["head_dim"], window
        self.scale = config["query_pre_attn_scalar"] ** -0.5
        self.score_cap = config["attn_logit_softcapping"]
        self.n_kv = config["num_key_value_heads"]
        d_q, d_kv = config["num_attention_heads"] * self.head_dim, self.n_kv * self.head_dim
        self.q_proj = nn.Linear(d_model, d_q, bias=False)
        self.k_proj = nn.Linear(d_model, d_kv, bias=False)
        self.v_proj = nn.Linear(d_model, d_kv, bias=False)
        self.o_proj = nn.Linear(d_q, d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Each key-value head serves a group of query heads: [B, n_kv, group, T, head_dim].
        q, k, v = q.unflatten(1, (self.n_kv, -1)), k.unsqueeze(2), v.unsqueeze(2)
        scores = soft_cap(q @ k.mT * self.scale, self.score_cap)
        hidden = torch.ones_like(scores[0, 0, 0], dtype=torch.bool).triu(1)
        if self.window is not None:
            hidden |= torch.ones_like(hidden).tril(-self.window)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, torch.float32).to(x.dtype)
        return self.o_proj((weights @ v).flatten(1, 2).transpose(1, 2).flatten(2))


class GemmaBlock(nn.Module):
    def __init__(self, config: dict, window: int | None):
        super().__init__()
        d_model, d_mlp = config["hidden_size"], config["intermediate_size"]
        self.self_attn = GemmaAttention(config, window)
        self.mlp = nn.ModuleDict()
        self.mlp["gate_proj"] = nn.Linear(d_model, d_mlp, bias=False)
        self.mlp["up_proj"] = nn.Linear(d_model, d_mlp, bias=False)
        self.mlp["down_proj"] = nn.Linear(d_mlp, d_model, bias=False)
        self.input_layernorm = RMSNorm(d_model, config["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(d_model, config["rms_norm_eps"])
        self.pre_feedforward_layernorm = RMSNorm(d_model, config["rms_norm_eps"])
        self.post_feedforward_layernorm = RMSNorm(d_model, config["rms_norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + self.post_attention_layernorm(attended)
        h = self.pre_feedforward_layernorm(x)
        h = F.gelu(self.mlp.gate_proj(h), approximate="tanh") * self.mlp.up_proj(h)
        return x + self.post_feedforward_layernorm(self.mlp.down_proj(h))


class Gemma2(LanguageModel):
    """RMSNorm before and after each half of a block, tied embeddings, soft-capped logits."""

    n_skip = 1

    def __init__(self, config: dict):
        super().__init__()
        d_model, n_layers = config["hidden_size"], config["num_hidden_layers"]
        self.set_rotary(config, config["head_dim"], 1.0, config.get("rope_theta", 10000))
        self.logit_cap = config["final_logit_softcapping"]
        kinds = config.get("layer_types") or ["sliding_attention", "full_attention"] * n_layers
        windows = [config["sliding_window"] if k[0] == "s" else None for k in kinds[:n_layers]]
        self.model = nn.ModuleDict()
        self.model["embed_tokens"] = nn.Embedding(config["vocab_size"], d_model)
        self.model["layers"] = nn.ModuleList(GemmaBlock(config, window) for window in windows)
        self.model["norm"] = RMSNorm(d_model, config["rms_norm_eps"])

    def embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        # The factor is rounded to the model's dtype, as the published weights expect.
        return x * torch.tensor(x.shape[-1] ** 0.5, dtype=x.dtype, device=x.device)


# ---- From a checkpoint to a model ------------------------------------------------------------

FAMILIES = {"gpt_neox": Pythia, "gemma2": Gemma2}
ACTIVATIONS = {
    "gpt_neox": ("hidden_act", "gelu"),
    "gemma2": ("hidden_activation", "gelu_pytorch_tanh"),
}
# Buffers of old GPT-NeoX checkpoints: not parameters.
IGNORED = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def build_lm(config: dict) -> LanguageModel:
    """The model that a parsed config.json describes; UserError for settings it cannot follow."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    key, activation = ACTIVATIONS[kind]
    if config.get(key) not in (None, activation):
        raise UserError(f"config.json has {key} = {config[key]!r}; supported: {activation!r}")
    try:
        return FAMILIES[kind](config)
    except KeyError as missing:
        raise UserError(f"config.json has no {missing}, which a {kind} model needs") from None


def load_lm(name_or_folder: str, device="cpu", dtype=torch.float32) -> LanguageModel:
    """A frozen language model: `lm(tokens [B, T]) -> logits [B, T, V]`.

    `name_or_folder` is a short name, a Hub `owner/name` or a folder laid out like a Hub snapshot.
    Raises UserError where the model cannot be had or its tensors do not match name for name.
    """
    with torch.device("meta"):
        lm = build_lm(load_config(name_or_folder))
    weights = load_weights(name_or_folder, device, dtype)
    tied = () if hasattr(lm, "embed_out") else ("embed_out.weight", "lm_head.weight")
    weights = {k: w for k, w in weights.items() if not k.endswith(IGNORED + tied)}
    expected = {name: tuple(p.shape) for name, p in lm.named_parameters()}
    found = {name: tuple(w.shape) for name, w in weights.items()}
    if expected != found:
        missing, unexpected = sorted(expected - found.keys()), sorted(found - expected.keys())
        wrong = {n: found[n] for n in expected if found.get(n, expected[n]) != expected[n]}
        raise UserError(
            f"{name_or_folder}: the tensors do not fit config.json: missing {missing}, "
            f"unexpected {unexpected}, of another shape {wrong}"
        )
    lm.load_state_dict(weights, assign=True)
    return lm.eval().requires_grad_(False)


# ---- The sparse autoencoder (Gao et al. 2024, arXiv 2406.04093) ------------------------------


class Acts(NamedTuple):
    """The active latents of N tokens, as one flat list of P (token, latent) pairs."""

    values: Tensor  # [P], above 0; or 0 where a token has fewer than K positive latents
    latents: Tensor  # [P], which latent
    offsets: Tensor  # [N], where each token's pairs begin

    @property
    def l0(self) -> Tensor:
        """Active latents per token."""
        return (self.values > 0).sum() / len(self.offsets)


def top_k(pre: Tensor, k: int) -> Acts:
    """The K largest of each row of pre [N, F], after ReLU."""
    values, latents = pre.topk(k, dim=-1, sorted=False)
    return Acts(
        values.relu().flatten(),
        latents.flatten(),
        torch.arange(0, latents.numel(), k, device=pre.device),
    )


def above(pre: Tensor, threshold: Tensor | float) -> Acts:
    """Every entry of pre [N, F] above a threshold >= 0."""
    active = pre > threshold
    tokens, latents = active.nonzero(as_tuple=True)
    per_token = active.sum(-1)
    return Acts(pre[tokens, latents], latents, per_token.cumsum(0) - per_token)


def weighted_sums(table: Tensor, acts: Acts) -> Tensor:
    """f @ table for the sparse f that `acts` lists: a weighted sum of few rows per token."""
    values, latents, offsets = acts
    return F.embedding_bag(latents, table, offsets, mode="sum", per_sample_weights=values)


class SparseAutoencode(torch.autograd.Function):
    """x_hat = W_dec f + b_dec with f = select(W_enc (x - b_dec) + b_enc), and the gradients.

    With g [N, D] = d loss / d x_hat and h [N, F] = g W_dec where f > 0, else 0: dW_dec = f' g,
    dW_enc = h' (x - b_dec), db_enc = sum_n h, dx = h W_enc, db_dec = sum_n (g - dx).
    Fast path: only the encoder product is dense. f and h have few entries, so that decoding and
    the weight gradients are sums over the active pairs, sorted by latent once for both gradients.
    """

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, select):
        centred = x - b_dec
        acts = select(torch.addmm(b_enc, centred, W_enc.T))
        ctx.save_for_backward(centred, W_enc, W_dec, *acts)
        ctx.mark_non_differentiable(acts.latents, acts.offsets)
        return weighted_sums(W_dec, acts) + b_dec, *acts

    @staticmethod
    def backward(ctx, g, g_values, *_):
        centred, W_enc, W_dec, *acts = ctx.saved_tensors
        acts = Acts(*acts)
        with torch.enable_grad():  # d/d values alone: <g[token], W_dec[latent]> for each pair
            values = acts.values.detach().requires_grad_()
            x_hat = weighted_sums(W_dec, acts._replace(values=values))
        h = torch.autograd.grad(x_hat, values, g)[0].add_(g_values).mul_(acts.values > 0)
        dx = weighted_sums(W_enc, acts._replace(values=h)) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None, None, None
        latents, order = acts.latents.sort()
        tokens = torch.bucketize(order, acts.offsets, right=True) - 1
        per_latent = torch.bincount(latents, minlength=len(W_enc))
        offsets = per_latent.cumsum(0) - per_latent
        dW_dec = weighted_sums(g, Acts(acts.values[order], tokens, offsets))
        dW_enc = weighted_sums(centred, Acts(h[order], tokens, offsets))
        db_enc = torch.zeros_like(W_enc[:, 0]).index_add_(0, acts.latents, h)
        return dx, dW_enc, db_enc, dW_dec, g.sum(0) - db_enc @ W_enc, None


class SAE(nn.Module):
    """x_hat = W_dec f + b_dec, f = activation(W_enc (x - b_dec) + b_enc), on x / scale.

    W_enc and W_dec are both [F, D], a row for each latent; `scale` makes the mean squared norm of
    activations 1. `kind` is the activation: "topk", the K largest of each token; "batchtopk", the
    K N largest of N tokens in training and later those above `threshold`, the running mean of the
    smallest one kept (arXiv 2412.06410); "relu", all that are positive.
    """

    def __init__(self, d_model: int, d_sae: int, k: int, kind: str = "topk"):
        super().__init__()
        self.k, self.kind = k, kind
        directions = F.normalize(torch.randn(d_sae, d_model), dim=-1)
        self.W_enc, self.W_dec = nn.Parameter(directions.clone()), nn.Parameter(directions)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("threshold", torch.zeros(()))
        # Directions keep norm 1, except beside a penalty that weighs their norms.
        self.unit_norm = kind != "relu"

    @torch.no_grad()
    def start_from(self, x: Tensor) -> None:
        """Sets scale and b_dec from a first sample x [N, D] of activations."""
        self.scale.copy_(x.float().pow(2).sum(-1).mean().sqrt())
        self.b_dec.copy_(geometric_median(x[:8192].float() / self.scale))

    def forward(self, x: Tensor) -> tuple[Tensor, Acts]:
        """Reconstructions [N, D] of x [N, D], and the active latents (in units of x / scale)."""
        weights = self.W_enc, self.b_enc, self.W_dec, self.b_dec
        x_hat, *acts = SparseAutoencode.apply(x.float() / self.scale, *weights, self.select)
        return x_hat * self.scale, Acts(*acts)

    def select(self, pre: Tensor) -> Acts:
        """The latents that stay active, of pre-activations [N, F]."""
        if self.kind == "topk":
            return top_k(pre, self.k)
        if self.kind == "relu":
            return above(pre, 0.0)
        if not self.training:
            return above(pre, self.threshold)
        smallest = pre.flatten().topk(self.k * len(pre), sorted=False).values.min().clamp_min(0)
        self.threshold.lerp_(smallest, 0.001 if self.threshold > 0 else 1.0)
        return above(pre, torch.nextafter(smallest, smallest - 1).clamp_min(0))

    def sparsity(self, acts: Acts) -> Tensor:
        """mean_n sum_i f_i ||W_dec[i]||."""
        return (acts.values * self.W_dec.norm(dim=-1)[acts.latents]).sum() / len(acts.offsets)

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Removes from each W_dec.grad[i] the part along W_dec[i], which has norm 1."""
        along = (self.W_dec.grad * self.W_dec).sum(-1, keepdim=True)
        self.W_dec.grad.addcmul_(along, self.W_dec, value=-1)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True)

    def folded(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors and settings in SAELens's layout, for raw activations: scale goes to biases."""
        tensors = {"W_enc": self.W_enc.T, "W_dec": self.W_dec}
        tensors |= {"b_enc": self.b_enc * self.scale, "b_dec": self.b_dec * self.scale}
        architecture = {"topk": "topk", "relu": "standard", "batchtopk": "jumprelu"}[self.kind]
        cfg = {"architecture": architecture, "d_in": len(self.b_dec), "d_sae": len(self.b_enc)}
        if self.kind == "topk":
            cfg |= {"k": self.k, "rescale_acts_by_decoder_norm": False}
        if self.kind == "batchtopk":
            tensors["threshold"] = torch.ones_like(self.b_enc) * self.threshold * self.scale
        return tensors, cfg


def geometric_median(x: Tensor) -> Tensor:
    """The point [D] at the least mean distance from the rows of x [N, D] (Weiszfeld's iteration)."""
    point = x.mean(0)
    for _ in range(30):
        weights = 1 / (x - point).norm(dim=-1, keepdim=True).clamp_min(1e-6)
        point = (weights * x).sum(0) / weights.sum()
    return point


# ---- KL without the logits of a whole batch --------------------------------------------------


def slices(n_tokens: int, vocab: int) -> list[slice]:
    """Slices of the tokens with about 8M logits each."""
    size = max(1, 2**23 // vocab)
    return [slice(i, i + size) for i in range(0, n_tokens, size)]


class SlicedKL(torch.autograd.Function):
    """KL(p || q), mean over N tokens, of p, q = softmax(lm.unembed(resid_p, resid_q [N, D])).

    d KL / d logits_q = (q - p) / N is taken back through soft cap, unembedding and final norm slice
    by slice in the forward pass: three products with W_U per token, and never a tensor [N, V].
    """

    @staticmethod
    def forward(ctx, resid_p: Tensor, resid_q: Tensor, lm: LanguageModel) -> Tensor:
        kl, grad = resid_q.new_zeros((), dtype=torch.float), torch.empty_like(resid_q)
        for rows in slices(len(resid_q), len(lm.W_U)):
            log_p = lm.unembed(resid_p[rows]).float().log_softmax(-1)
            with torch.enable_grad():
                resid = resid_q[rows].detach().requires_grad_()
                normed = lm.final_norm(resid)
            logits = soft_cap(normed.detach() @ lm.W_U.T, lm.logit_cap).float()
            log_q = logits.log_softmax(-1)
            p = log_p.exp()
            kl += (p * (log_p - log_q)).sum() / len(resid_q)
            g = (log_q.exp() - p) / len(resid_q)
            if lm.logit_cap is not None:  # the derivative of c tanh(z / c) is 1 - tanh(z / c)^2
                g *= 1 - (logits / lm.logit_cap) ** 2
            (grad[rows],) = torch.autograd.grad(normed, resid, g.to(normed.dtype) @ lm.W_U)
        ctx.save_for_backward(grad)
        return kl

    @staticmethod
    def backward(ctx, g):
        return None, g * ctx.saved_tensors[0], None


# ---- Phase one: MSE on shuffled activations --------------------------------------------------


class ActivationBuffer:
    """Mixes the hook layer's activations of many sequences; each activation is served once.

    Rows [size, D] are allocated once. Batches follow a random permutation of the rows; when half of
    them are used, new activations take their places and a new permutation is drawn.
    """

    def __init__(self, lm: LanguageModel, stream: TokenStream, n_sequences: int, config: Config):
        self.lm, self.stream, self.layer = lm, stream, config.layer
        self.chunk = max(1, 8192 // config.context)  # sequences in one forward
        self.next_sequence, self.n_sequences = 0, n_sequences
        self.per_sequence = config.context - lm.n_skip
        size = max(config.buffer, 1 + 2 * config.batch // self.per_sequence)
        n_rows, like = min(size, n_sequences) * self.per_sequence, lm.W_U
        self.rows = torch.empty(n_rows, like.shape[1], dtype=like.dtype, device=like.device)
        self.free = torch.arange(n_rows, device=like.device)  # rows that may be written over
        self.order = self.free[:0]  # live rows, in the order in which they are served
        self.refill()

    @torch.no_grad()
    def refill(self) -> None:
        n = min(len(self.free) // self.per_sequence, self.n_sequences - self.next_sequence)
        new, self.free = self.free.tensor_split([n * self.per_sequence])
        for places in new.split(self.chunk * self.per_sequence):
            chunk = len(places) // self.per_sequence
            tokens = self.stream.train(self.next_sequence, chunk).to(new.device)
            resid = self.lm.prefix(tokens, self.layer)[:, self.lm.n_skip :]
            self.rows[places] = resid.flatten(0, 1)
            self.next_sequence += chunk
        live = torch.cat([self.order, new])
        self.order = live[torch.randperm(len(live), device=live.device)]

    def next_batch(self, n: int) -> Tensor:
        """[n, D] activations in float32."""
        if len(self.free) >= len(self.rows) // 2 and self.next_sequence < self.n_sequences:
            self.refill()
        rows, self.order = self.order.tensor_split([n])
        self.free = torch.cat([self.free, rows])
        return self.rows[rows].float()


def auxk_loss(sae: SAE, x: Tensor, x_hat: Tensor, dead: Tensor) -> Tensor:
    """AuxK: how well the D/2 most active `dead` latents explain e = (x - x_hat) / scale.

    sum_n ||e - e_hat||^2 / sum_n ||e - mean(e)||^2, where e_hat has no bias.
    """
    e = ((x - x_hat) / sae.scale).detach()
    k = min(x.shape[1] // 2, len(dead))
    weights = sae.W_enc[dead], sae.b_enc[dead], sae.W_dec[dead], torch.zeros_like(sae.b_dec)
    centred = x / sae.scale - sae.b_dec
    e_hat, *_ = SparseAutoencode.apply(centred, *weights, lambda pre: top_k(pre, k))
    return (e - e_hat).pow(2).sum() / (e - e.mean(0)).pow(2).sum()


def lr_factor(step: int, steps: int, warmup: int, decay: float) -> float:
    """Rises over the first `warmup` steps, falls linearly to 0 over the last share `decay`."""
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1.0, decay * steps))


def adam(module: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, weight_decay=weight_decay, fused=True)


def update(loss: Tensor, module: nn.Module, optimizer: torch.optim.AdamW, lr: float) -> None:
    """Backward, gradient off the decoder's directions, norm clipped to 1, Adam, unit norm again.

    Fast path: the fused kernel itself divides by `grad_scale`, and does nothing where `found_inf`
    is 1: clipping takes no pass of its own, and a step that is not finite changes nothing.
    """
    loss.backward()
    constrained = isinstance(module, SAE) and module.unit_norm
    if constrained:
        module.project_gradient()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    optimizer.grad_scale, optimizer.found_inf = norm.clamp_min(1.0), (~norm.isfinite()).float()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    if constrained:
        module.normalize_decoder()


def train_mse(lm, stream: TokenStream, saes: list[SAE], n_sequences: int, config: Config, log):
    """Phase one on the first n_sequences of the stream; all SAEs see the same batches.

    loss = mean_n ||x - x_hat||^2 + AuxK / 32, or + lambda * sparsity for ReLU; on x / scale.
    """
    buffer = ActivationBuffer(lm, stream, n_sequences, config)
    for sae in saes:
        sae.train().start_from(buffer.rows[:32768])
    optimizers = [adam(sae, weight_decay=0.0) for sae in saes]
    idle = [torch.zeros_like(sae.b_enc, dtype=torch.long) for sae in saes]  # tokens since it fired
    steps = n_sequences * buffer.per_sequence // config.batch
    warmup = min(config.warmup, steps // 10)
    for step in range(steps):
        x, lr = buffer.next_batch(config.batch), config.lr * lr_factor(step, steps, warmup, 0.2)
        for i, (sae, optimizer) in enumerate(zip(saes, optimizers)):
            x_hat, acts = sae(x)
            loss = mse = ((x - x_hat) / sae.scale).pow(2).sum(-1).mean()
            if sae.kind == "relu":
                loss = mse + config.l1 * min(1.0, 20 * step / steps) * sae.sparsity(acts)
            elif len(dead := (idle[i] > config.dead_after).nonzero()[:, 0]):
                loss = mse + auxk_loss(sae, x, x_hat, dead) / 32
            update(loss, sae, optimizer, lr)
            idle[i] += len(x)
            idle[i][acts.latents[acts.values > 0]] = 0
            log(i, step, steps, loss=loss, mse=mse.detach(), l0=acts.l0)


# ---- Phase two: KL+MSE on whole sequences ----------------------------------------------------


@dataclass
class Splice:
    """What a fine-tune method trains: `insert` in place of resid_post after block L of `lm`.

    `insert` maps x [N, D] to (x_hat [N, D], Acts). Trained are the parameters of `insert` and `lm`
    that require a gradient; `loss` is "kl" (KL+MSE), "kl-only" or "mse".
    """

    insert: nn.Module
    lm: LanguageModel
    loss: str = "kl"
    own_prefix: bool = False  # whether lm differs from the original in blocks 0..L
    l1: float = 0.0  # lambda of a ReLU SAE, and the L0 at which it is held
    l0_target: float = 0.0

    @property
    def trained(self) -> nn.Module:
        return self.lm if any(p.requires_grad for p in self.lm.parameters()) else self.insert

    def resid_post(self, tokens: Tensor, resid: Tensor, layer: int) -> Tensor:
        """The original model's resid_post [B, T, D] of block `layer`, or this model's own."""
        return self.lm.prefix(tokens, layer) if self.own_prefix else resid

    def splice(self, resid: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor, Acts]:
        """From resid_post [B, T, D] of block `layer`: that of the last block with x_hat inserted,
        x and x_hat, all [B (T - n_skip), D], and the activations."""
        skip = self.lm.n_skip
        x = resid[:, skip:].flatten(0, 1)
        x_hat, acts = self.insert(x)
        if self.loss == "mse" and self.insert.training:
            return x, x, x_hat, acts  # nothing after block L is needed
        inserted = x_hat.to(resid.dtype).view_as(resid[:, skip:])
        last = self.lm.suffix(torch.cat([resid[:, :skip], inserted], dim=1), layer)
        return last[:, skip:].flatten(0, 1), x, x_hat, acts


def finetune_loss(s: Splice, last_p: Tensor, last_q: Tensor, x: Tensor, x_hat: Tensor, acts: Acts):
    """(beta KL + MSE) / 2, and what to log. last_p, last_q: last resid_post [N, D] without and
    with x_hat [N, D]. beta = MSE / KL makes both halves weigh alike, on every batch anew."""
    mse = F.mse_loss(x_hat, x.float())
    seen = {"mse": mse.detach(), "l0": acts.l0}
    if s.loss == "mse":
        loss = mse
    else:
        kl = SlicedKL.apply(last_p, last_q, s.lm)
        seen["kl"] = kl.detach()
        beta = seen["beta"] = (mse / (kl + 1e-8)).detach()
        loss = (beta * kl + mse) / 2 if s.loss == "kl" else kl
    if isinstance(s.insert, SAE) and s.insert.kind == "relu":
        # lambda was set beside the squared norm on x / scale, which is D / scale^2 times this MSE.
        loss = loss * x.shape[1] / s.insert.scale**2 + s.l1 * s.insert.sparsity(acts)
        s.l1 *= 1.001 if acts.l0 > s.l0_target else 0.999
    return loss, seen


def finetune(lm, stream: TokenStream, splices: list[Splice], start: int, stop: int, config, log):
    """Phase two: sequences start..stop in order; all splices see the same ones.

    Blocks 0..L run once for the original and every splice. The rate falls linearly to 0; where this
    phase is the whole training (end to end), rate and schedule are those of phase one.
    """
    layer, kl_batch = config.layer, config.kl_batch
    steps = max(1, (stop - start) // kl_batch)
    optimizers = [adam(s.trained.train(), weight_decay=0.01) for s in splices]
    peak, warmup, decay = config.kl_lr, 0, 1.0
    if config.kl_tokens == config.tokens:
        peak, warmup, decay = config.lr, min(config.warmup, steps // 10), 0.2
    for step in range(steps):
        lr = peak * lr_factor(step, steps, warmup, decay)
        first = start + step * kl_batch
        tokens = stream.train(first, min(kl_batch, stop - first)).to(lm.W_U.device)
        with torch.no_grad():
            resid = last_p = lm.prefix(tokens, layer)
            if any(s.loss != "mse" for s in splices):
                last_p = lm.suffix(resid, layer)[:, lm.n_skip :].flatten(0, 1)
        for i, (s, optimizer) in enumerate(zip(splices, optimizers)):
            spliced = s.splice(s.resid_post(tokens, resid, layer), layer)
            loss, seen = finetune_loss(s, last_p, *spliced)
            update(loss, s.trained, optimizer, lr)
            log(i, step, steps, loss=loss, **seen)
    for s in splices:
        s.insert.eval(), s.lm.eval()


# ---- Fine-tune methods: the difference of each -----------------------------------------------


class LoRA(nn.Module):
    """alpha / r B A dropout(x) (arXiv 2106.09685), plus layer(x) if it stands beside a layer."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float, layer: nn.Module = None):
        super().__init__()
        self.A, self.B = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)
        nn.init.zeros_(self.B.weight)
        self.layer, self.factor, self.dropout = layer, alpha / rank, nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.B(self.A(self.dropout(x.float()))) * self.factor
        return y if self.layer is None else self.layer(x) + y.to(x.dtype)


def lora_lm(lm: LanguageModel, rank: int, first_block: int) -> LanguageModel:
    """LoRA (alpha = r) on every matrix from a block on; shares lm's weights, leaves lm alone."""
    adapted = copy.deepcopy(lm, {id(p): p for p in lm.parameters()})
    for block in adapted.blocks[first_block:]:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                lora = LoRA(layer.in_features, layer.out_features, rank, rank, layer)
                parent, _, child = name.rpartition(".")
                block.get_submodule(parent).add_module(child, lora.to(layer.weight.device))
    return adapted


class LoRASAE(nn.Module):
    """LoRA (alpha = 32) on the encoder and the decoder of a frozen SAE."""

    def __init__(self, sae: SAE, rank: int):
        super().__init__()
        (d_sae, d_model), self.sae = sae.W_enc.shape, sae
        self.encoder, self.decoder = LoRA(d_model, d_sae, rank, 32), LoRA(d_sae, d_model, rank, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Acts]:
        sae, lora = self.sae, self.decoder
        centred = x.float() / sae.scale - sae.b_dec
        acts = sae.select(F.linear(centred, sae.W_enc, sae.b_enc) + self.encoder(centred))
        dropped = acts._replace(values=lora.dropout(acts.values))
        low_rank = lora.B(weighted_sums(lora.A.weight.T.contiguous(), dropped)) * lora.factor
        return (weighted_sums(sae.W_dec, acts) + low_rank + sae.b_dec) * sae.scale, acts

    def merged(self) -> SAE:
        """An ordinary SAE with the same reconstructions."""
        sae, low_rank = copy.deepcopy(self.sae), lambda m: m.factor * m.B.weight @ m.A.weight
        sae.W_enc.data += low_rank(self.encoder)
        sae.W_dec.data += low_rank(self.decoder).T
        return sae


class Adapter(nn.Module):
    """x_hat + U V x_hat after a frozen SAE, or x_hat + U ReLU(V x_hat + a) + c; U, c = 0 at first."""

    def __init__(self, sae: SAE, rank: int, mlp: bool):
        super().__init__()
        self.sae, self.act, d_model = sae, nn.ReLU() if mlp else nn.Identity(), len(sae.b_dec)
        self.V, self.U = nn.Linear(d_model, rank, bias=mlp), nn.Linear(rank, d_model, bias=mlp)
        for p in self.U.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> tuple[Tensor, Acts]:
        x_hat, acts = self.sae.eval()(x)
        return x_hat + self.U(self.act(self.V(x_hat))), acts


METHODS = "kl mse kl-only lora-sae lora-lm lora-lm-after linear-adapter mlp-adapter".split()


def start_method(method: str, lm: LanguageModel, sae: SAE, layer: int, rank: int) -> Splice:
    """A method before its first step: the model and the reconstructions are still the same."""
    sae, device = copy.deepcopy(sae), sae.b_dec.device
    if method in ("kl", "mse", "kl-only"):
        return Splice(sae, lm, method)
    sae.requires_grad_(False)
    if method == "lora-lm":
        return Splice(sae, lora_lm(lm, rank, 0), "kl-only", own_prefix=True)
    if method == "lora-lm-after":
        return Splice(sae, lora_lm(lm, rank, layer + 1), "kl-only")
    if method == "lora-sae":
        return Splice(LoRASAE(sae, rank).to(device), lm)
    return Splice(Adapter(sae, rank, mlp=method == "mlp-adapter").to(device), lm)


# ---- Evaluation ------------------------------------------------------------------------------


def ce_and_kl(lm, lasts: list[Tensor], targets: Tensor) -> Tensor:
    """[2, m], summed over N tokens: CE on targets [N] of each of m resid_posts [N, D] of the last
    block, and KL from the first one's distribution to each. A slice of tokens at a time."""
    out = torch.zeros(2, len(lasts), dtype=torch.double, device=targets.device)
    for rows in slices(len(targets), len(lm.W_U)):
        logs = (lm.unembed(last[rows]).float().log_softmax(-1) for last in lasts)
        log_p = None
        for i, log_q in enumerate(logs):
            log_p = log_q if i == 0 else log_p
            out[0, i] += F.nll_loss(log_q, targets[rows], reduction="sum")
            out[1, i] += F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return out


@torch.no_grad()
def evaluate(lm, layer: int, tokens: Tensor, splices: list[Splice], chunk: int = 8):
    """On held-out tokens [n, T]: the model's own CE and zero ablation's, and a dict per splice.

    ce, kl: nats per token. fvu: share of the variance of x left unexplained. l0: active latents per
    token. dead: latents that never fired. The first n_skip positions do not count.
    """
    skip, saes = lm.n_skip, [getattr(s.insert, "sae", s.insert) for s in splices]
    zero = Splice(lambda x: (torch.zeros_like(x), None), lm)
    fired = [torch.zeros_like(sae.b_enc, dtype=torch.bool) for sae in saes]
    error, active = torch.zeros(2, len(splices), dtype=torch.double, device=lm.W_U.device)
    ce_kl = n_x = n = x_sum = x_square = 0
    for batch in tokens.split(chunk):
        batch = batch.to(lm.W_U.device)
        resid = lm.prefix(batch, layer)
        x = resid[:, skip:].flatten(0, 1).double()
        n_x, x_sum, x_square = n_x + len(x), x_sum + x.sum(0), x_square + x.pow(2).sum()
        lasts = [lm.suffix(resid, layer)[:, skip:].flatten(0, 1), zero.splice(resid, layer)[0]]
        for i, s in enumerate(splices):
            last, x, x_hat, acts = s.splice(s.resid_post(batch, resid, layer), layer)
            lasts.append(last)
            error[i] += (x - x_hat).double().pow(2).sum()
            active[i] += (acts.values > 0).sum()
            fired[i][acts.latents[acts.values > 0]] = True
        lasts = [y.unflatten(0, (len(batch), -1))[:, :-1].flatten(0, 1) for y in lasts]
        ce_kl, n = ce_kl + ce_and_kl(lm, lasts, batch[:, skip + 1 :].flatten()), n + len(lasts[0])
    ce, kl = (ce_kl / n).tolist()
    fvu, l0 = error / (x_square - x_sum.pow(2).sum() / n_x), active / n_x
    figures = [
        {
            "ce": ce[i + 2],
            "gap": ce[i + 2] - ce[0],
            "kl": kl[i + 2],
            "loss_recovered": 1 - (ce[i + 2] - ce[0]) / (ce[1] - ce[0]),
            "fvu": fvu[i].item(),
            "l0": l0[i].item(),
            "dead": (~fired[i]).sum().item(),
        }
        for i in range(len(splices))
    ]
    return {"ce_original": ce[0], "ce_zero": ce[1]}, figures


# ---- A run, from the command line to its report ----------------------------------------------


class NotFinite(UserError):
    """A loss that is not a number; the parameters are those from before it."""


class Log:
    """A phase's progress line, and its lines in the metrics.jsonl of each SAE's folder."""

    def __init__(self, phase: str, folders: list[Path], tokens_per_step: int, every: int):
        self.phase, self.folders, self.every = phase, folders, every
        self.tokens_per_step, self.start, self.shown = tokens_per_step, time.perf_counter(), 0
        self.losses: list[list[Tensor]] = [[] for _ in folders]

    def __call__(self, i: int, step: int, steps: int, loss: Tensor, **metrics) -> None:
        """Takes the figures of SAE i; UserError where a loss since the last line is not finite."""
        self.losses[i].append(loss.detach())
        if (step + 1) % self.every and step + 1 < steps:
            return
        losses, self.losses[i] = torch.stack(self.losses[i]).tolist(), []
        for j, value in enumerate(losses, start=step + 1 - len(losses)):
            if not math.isfinite(value):
                raise NotFinite(f"the loss of {self.phase} is {value} at step {j}: lower its rate")
        tokens, total = (step + 1) * self.tokens_per_step, steps * self.tokens_per_step
        seconds = time.perf_counter() - self.start
        line = {"phase": self.phase, "step": step + 1, "tokens": tokens, "seconds": seconds}
        line |= {"loss": sum(losses) / len(losses)} | {k: float(v) for k, v in metrics.items()}
        with open(self.folders[i] / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        live = sys.stdout.isatty()
        if i == 0 and (live or tokens == total or tokens - self.shown >= total / 10):
            self.shown = tokens
            left = time.strftime("%H:%M:%S", time.gmtime(seconds * (total / tokens - 1)))
            text = f"{self.phase}: {tokens:,} of {total:,} tokens, {tokens / seconds:,.0f}/s, {left} left"
            text += "".join(f", {name} {float(value):.4g}" for name, value in metrics.items())
            end = "" if live and tokens < total else "\n"
            print(f"\r{text}\033[K" if live else text, end=end, flush=True)


def check(config: Config) -> None:
    """Fills in what depends on the model; UserError for settings that cannot be, with the value."""
    for name in "tokens d_sae context batch kl_batch buffer log_every rank".split():
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)} is below 1")
    for k in config.k:
        if not 1 <= k <= config.d_sae:
            raise UserError(f"--k {k} is not between 1 and d_sae = {config.d_sae}")
    if config.kl_tokens > config.tokens:
        raise UserError(f"--kl-tokens {config.kl_tokens} is above --tokens {config.tokens}")
    for method in config.method:
        *first, last = method.split("+")
        if last not in METHODS or not set(first) <= {"kl", "mse", "kl-only"}:
            raise UserError(f"--method {method} is unknown; there are: {', '.join(METHODS)}")
    n_layers = load_config(config.model).get("num_hidden_layers", 0)
    config.layer = n_layers // 2 if config.layer is None else config.layer
    if not 0 <= config.layer < n_layers:
        raise UserError(f"--layer {config.layer}: {config.model} has layers 0 to {n_layers - 1}")
    config.lr = 2e-4 / math.sqrt(config.d_sae / 2**14) if config.lr is None else config.lr
    if config.data is None:
        short = Path(config.model).name
        pythia = "pythia-deduped" if short.endswith("-deduped") else "pythia"
        config.data = pythia if short.startswith("pythia") else "c4"


def find_device(name: str) -> torch.device:
    """The device that --device names; UserError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported: use cpu or cuda")
    return device


def run_folders(config: Config) -> list[Path]:
    """A folder for each K; UserError where another run has it."""
    name = config.name or f"{Path(config.model).name}-{config.sae}-k{{k}}-seed{config.seed}"
    name += "-k{k}" if len(config.k) > 1 and "{k}" not in name else ""
    folders = [Path(config.out) / name.replace("{k}", str(k)) for k in config.k]
    for folder in folders:
        replace = config.overwrite and (folder / "config.json").exists()
        if folder.exists() and not replace and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} holds another run: choose a --name, or pass --overwrite")
    return folders


def save(insert: nn.Module, folder: Path, config: Config) -> None:
    """The SAE of a method, in SAELens's layout; LoRA on the SAE is merged into it."""
    sae = insert.merged() if isinstance(insert, LoRASAE) else getattr(insert, "sae", insert)
    tensors, cfg = sae.folded()
    cfg["metadata"] = {
        "model_name": Path(config.model).name,
        "hook_name": f"blocks.{config.layer}.hook_resid_post",
        "context_size": config.context,
        "dataset_path": config.data,
    }
    save_sae(folder, tensors, cfg)


@contextmanager
def keeping(inserts: list[nn.Module], folders: list[Path], config: Config):
    """Saves what was trained in the block, also when it ends at a loss that is not finite."""
    try:
        yield
    except NotFinite as error:
        raise UserError(f"{error}; the last good SAE is in {folders[0]}") from None
    finally:
        if (folders[0] / "metrics.jsonl").exists():
            for insert, folder in zip(inserts, folders):
                save(insert, folder, config)


def fine_tune_by(method: str, lm, stream, saes, start, stop, before, config, folders):
    """Runs one method from each SAE; stages joined by + share the sequences and follow on."""
    stages = method.split("+")
    bounds = [start + (stop - start) * i // len(stages) for i in range(len(stages) + 1)]
    for stage, first, last in zip(stages, bounds, bounds[1:]):
        splices = [start_method(stage, lm, sae, config.layer, config.rank) for sae in saes]
        for s, figures in zip(splices, before):
            s.l1, s.l0_target = config.l1, figures["l0"]
        log = Log(stage, folders, config.kl_batch * config.context, config.log_every)
        finetune(lm, stream, splices, first, last, config, log)
        saes = [s.insert for s in splices]
    return splices


def train(config: Config, lm, stream, saes: list[SAE], folders: list[Path]) -> list[dict]:
    """Phase one, each method from its SAEs, the evaluations; a report for each SAE."""
    clock, total = time.perf_counter, stream.n_train
    n_mse = total - total * config.kl_tokens // config.tokens
    start = clock()
    if n_mse:
        log = Log("MSE", folders, config.batch, config.log_every)
        train_mse(lm, stream, saes, n_mse, config, log)
    else:
        x = lm.prefix(stream.train(0, min(32, total)).to(lm.W_U.device), config.layer)
        for sae in saes:
            sae.start_from(x[:, lm.n_skip :].flatten(0, 1))
    seconds, held_out = {"mse": clock() - start}, stream.validation()
    model, before = evaluate(lm, config.layer, held_out, [Splice(sae.eval(), lm) for sae in saes])
    results = [{"MSE SAE": figures} for figures in before]
    for method in config.method if n_mse < total else []:
        start = clock()
        splices = fine_tune_by(method, lm, stream, saes, n_mse, total, before, config, folders)
        seconds[method] = clock() - start
        _, after = evaluate(lm, config.layer, held_out, splices)
        for s, figures, rows, folder in zip(splices, after, results, folders):
            figures["gap_closed"] = 1 - figures["gap"] / rows["MSE SAE"]["gap"]
            rows[method] = figures
            save(s.insert, folder if len(rows) == 2 else folder / method, config)
    return [report(config, model, *one, seconds) for one in zip(folders, config.k, results)]


def report(config: Config, model: dict, folder: Path, k: int, results: dict, seconds: dict) -> dict:
    """Writes report.json and prints the closing table; returns the report."""
    before = results["MSE SAE"]
    final = results.get(config.method[0], before | {"gap_closed": 0.0})
    out = {
        name: getattr(config, name)
        for name in "model layer sae d_sae seed tokens kl_tokens".split()
    }
    out |= {"k": k} | model
    for name in ("ce", "gap", "fvu", "kl"):
        out |= {f"{name}_mse": before[name], f"{name}_final": final[name]}
    out |= {name: final[name] for name in ("gap_closed", "loss_recovered", "l0", "dead")}
    out |= {"seconds": seconds, "results": results}
    (folder / "report.json").write_text(json.dumps(out, indent=2) + "\n")
    names = list(final)
    print(f"\n{folder}\n{'':16s}" + "".join(f"{name:>15s}" for name in names))
    rows = {
        "original model": {"ce": model["ce_original"]},
        "zero ablation": {"ce": model["ce_zero"]},
    }
    for label, row in (rows | results).items():
        cells = (f"{row[name]:15.4f}" if name in row else f"{'':15s}" for name in names)
        print(f"{label:16s}" + "".join(cells))
    return out


def run(config: Config) -> list[dict]:
    """A whole run; a report for each K, as in its report.json. Raises UserError."""
    check(config)
    folders, device = run_folders(config), find_device(config.device)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it
    tokenizer, sizes = (
        load_tokenizer(config.model),
        (config.context, config.tokens, config.eval_tokens),
    )
    stream = TokenStream(config.data, tokenizer, *sizes, allow_short=config.allow_short)
    lm = load_lm(config.model, device, getattr(torch, config.dtype))
    saes = [SAE(lm.W_U.shape[1], config.d_sae, k, config.sae).to(device) for k in config.k]
    for folder, k in zip(folders, config.k):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        settings = json.dumps(dataclasses.asdict(config) | {"k": k}, indent=2)
        (folder / "config.json").write_text(settings + "\n")
    try:
        return train(config, lm, stream, saes, folders)
    except UserError:
        for folder in folders:
            if not (folder / "cfg.json").exists():
                shutil.rmtree(folder)
        raise
    finally:
        stream.close()


def parse(argv: list[str] | None = None) -> Config:
    """Settings from the command line: Config's defaults, the model's preset, then the flags."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(f"{message} (--help lists the flags)")

    parser = Parser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        options = dict(f.metadata)
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        options["help"] += "" if default is None else f" (default: {default})"
        if "bool" in f.type:
            options["action"] = "store_true"
        else:
            options["type"] = count if "int" in f.type else float if "float" in f.type else str
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    given = vars(parser.parse_args(argv))
    short = Path(given.get("model", Config.model)).name.removesuffix("-deduped")
    return Config(**PRESETS.get(short, {}) | given)


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse(argv))
    except UserError as error:
        print(f"saeft: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
