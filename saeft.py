"""saeft: train a sparse autoencoder by MSE, then close part of its cross-entropy gap by KL+MSE.

    python saeft.py                                  # embedded model, two minutes, no network
    python saeft.py --model pythia-160m --k 80       # the paper's setting: 475M + 25M tokens
    python saeft.py --model gemma-2-2b --k 40 80     # two SAEs on one activation stream

The method is "Revisiting End-To-End Sparse Autoencoder Training: A Short Finetune Is All You Need"
(Karvonen 2025, arXiv 2503.17272).
Shapes: N tokens, B sequences, T context, D d_model, F d_sae, V vocabulary, K active latents.
"""

from __future__ import annotations

import argparse, copy, json, math, os, shutil, sys, time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages: new gradients cost far less
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

import model_loaders
from model_loaders import TokenStream, UserError, load_tokenizer


# ---- Settings --------------------------------------------------------------------------------
def count(text: str) -> int:
    """A whole number, also written 500M, 25M, 4k or 1e6."""
    unit = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    number = round(float(text[:-1] if unit > 1 else text) * unit, 4)  # 4.1M is not quite 4.1e6
    if not number.is_integer() or number < 0:
        raise ValueError(text)
    return int(number)


def flag(default, help: str, **options):
    """A field of Config that is also a flag of the command line."""
    return field(default_factory=lambda: default, metadata={"help": help, **options})


@dataclass
class Config:
    """Every setting of a run. PRESETS replace these defaults per model; flags replace both."""

    model: str = flag("tiny", "short name (pythia-160m, gemma-2-2b, ...), Hub owner/name or folder")
    layer: int | None = flag(None, "block whose output the SAE reads (default: the middle one)")
    data: str | None = flag(None, "c4, pile, pythia, stdlib, a Hub dataset, or local files")
    sae: str = flag("topk", "activation of the SAE", choices=["topk", "batchtopk", "relu"])
    k: list[int] = flag([80], "active latents K; for several, an SAE each", nargs="+")
    d_sae: int = flag(2**14, "number of latents F")
    tokens: int = flag(500_000_000, "training tokens in all")
    kl_tokens: int = flag(25_000_000, "how many of them, the last ones, are the fine-tune's")
    method: list[str] = flag(["kl"], "fine-tune methods, each from the MSE SAE", nargs="+")
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
    dtype: str = flag("float32", "of the model", choices=["float32", "bfloat16", "float16"])
    float32: bool = flag(False, "on CUDA: no TF32, and no bfloat16 autocast in the SAE")
    name: str | None = flag(None, "folder under --out (default: model, layer, k and seed)")
    out: str = flag("runs", "where run folders go")
    overwrite: bool = flag(False, "replace a run of the same name")
    allow_short: bool = flag(False, "train on what there is when the data ends before the budget")
    log_every: int = flag(50, "steps between lines of metrics.jsonl")
    log_ce: bool = flag(False, "measure CE on 32 held-out sequences for each of these lines")


TINY = dict(layer=2, k=[16], d_sae=1024, data="stdlib", context=128, method=["kl", "mse"])
TINY |= dict(tokens=1_600_000, kl_tokens=400_000, batch=1024, buffer=2000, lr=1e-3, kl_lr=1.5e-3)
TINY |= dict(warmup=50, dead_after=200_000, eval_tokens=100_000, log_every=20)
GEMMA = dict(dtype="bfloat16", kl_batch=2)
PRESETS = {"tiny": TINY, "pythia-160m": {"layer": 8}, "gemma-2-9b": GEMMA}
PRESETS["gemma-2-2b"] = GEMMA | {"layer": 12}


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


def single(x: Tensor) -> Tensor:
    """x in float32, where its own precision is less."""
    return x.float() if x.element_size() < 4 else x


ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight' + bias. Fast path for float32 on the CPU: oneDNN's product, up to 1.5 times as fast
    as that of the BLAS behind F.linear; it has no derivative, so only where none is recorded."""
    recorded = any(t is not None and t.requires_grad for t in (x, weight, bias))
    fast = ONEDNN and x.is_cpu and x.dtype == torch.float32
    if fast and not (recorded and torch.is_grad_enabled()):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linears(bias: bool, **shapes: tuple[int, int]) -> nn.ModuleDict:
    """Linear layers by their names in the checkpoint, each from (inputs, outputs)."""
    return nn.ModuleDict({name: Linear(*shape, bias=bias) for name, shape in shapes.items()})


class LanguageModel(nn.Module):
    """Runs to block L, goes on from block L + 1, unembeds. Parameters are named as in checkpoints;
    `embedding`, `blocks` and `final_norm` say where. W_U is the embedding's without `embed_out`."""

    n_skip = 0  # leading positions without content, left out of everything (Gemma's <bos>)
    logit_cap: float | None = None
    W_U = property(lambda self: getattr(self, "embed_out", self.embedding).weight)  # [V, D]

    def set_rotary(self, config: dict, head_dim: int, share: float) -> None:
        """Takes either spelling of the settings: `rope_parameters`, or keys of the config."""
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"config.json has rope_type = {kind!r}; supported: 'default'")
        base = config.get("rope_theta", config.get("rotary_emb_base", 10000))
        share = rope.get("partial_rotary_factor", config.get("rotary_pct", share))
        self.rope_dim, self.rope_base = int(head_dim * share), rope.get("rope_theta", base)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens)

    def prefix(self, tokens: Tensor, layer: int) -> Tensor:
        """resid_post [B, T, D] of block `layer` for tokens [B, T]; later blocks never run."""
        return self.suffix(self.embed(tokens), -1, layer + 1)

    def suffix(self, resid: Tensor, layer: int, stop: int | None = None) -> Tensor:
        """resid_post [B, T, D] of the last block (or that before `stop`), from that of `layer`."""
        rope = rotary_tables(resid.shape[1], self.rope_dim, self.rope_base, resid.device)
        for block in self.blocks[layer + 1 : stop]:
            resid = block(resid, *rope)
        return resid

    def unembed(self, resid: Tensor) -> Tensor:
        """Logits [..., V] of the last block's resid_post [..., D]."""
        return soft_cap(linear(self.final_norm(resid), self.W_U), self.logit_cap)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of tokens [B, T]."""
        return self.unembed(self.suffix(self.embed(tokens), -1))


# ---- Pythia (GPT-NeoX, arXiv 2304.01373) -----------------------------------------------------
class PythiaBlock(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        d_model, d_mlp = config["hidden_size"], config["intermediate_size"]
        self.n_heads = config["num_attention_heads"]
        self.parallel = config.get("use_parallel_residual", True)
        self.input_layernorm = nn.LayerNorm(d_model, config["layer_norm_eps"])
        self.post_attention_layernorm = nn.LayerNorm(d_model, config["layer_norm_eps"])
        qkv, up, down = (d_model, 3 * d_model), (d_model, d_mlp), (d_mlp, d_model)
        self.attention = linears(True, query_key_value=qkv, dense=(d_model, d_model))
        self.mlp = linears(True, dense_h_to_4h=up, dense_4h_to_h=down)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # The weight's rows go head by head, the q, k and v of a head side by side.
        qkv = self.attention.query_key_value(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)  # each [B, H, T, head_dim]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attention.dense(out.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = x + self.attend(self.input_layernorm(x), cos, sin)
        h = self.post_attention_layernorm(x if self.parallel else y)
        return y + self.mlp.dense_4h_to_h(F.gelu(self.mlp.dense_h_to_4h(h)))


class Pythia(LanguageModel):
    """LayerNorm with bias, rotary on a part of each head, attention and MLP side by side."""

    activation = ("hidden_act", "gelu")
    embedding = property(lambda self: self.gpt_neox.embed_in)
    blocks = property(lambda self: self.gpt_neox.layers)
    final_norm = property(lambda self: self.gpt_neox.final_layer_norm)

    def __init__(self, config: dict):
        super().__init__()
        vocab, d_model = config["vocab_size"], config["hidden_size"]
        self.set_rotary(config, d_model // config["num_attention_heads"], share=0.25)
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
        weight = 1 + single(self.weight)
        return F.rms_norm(single(x), weight.shape, weight, self.eps).to(x.dtype)


class GemmaBlock(nn.Module):
    """Grouped-query attention with soft-capped scores; sees all before it, or `window` tokens."""

    def __init__(self, config: dict, window: int | None):
        super().__init__()
        d_model, d_mlp = config["hidden_size"], config["intermediate_size"]
        self.head_dim, self.n_kv = config["head_dim"], config["num_key_value_heads"]
        self.scale = config["query_pre_attn_scalar"] ** -0.5
        self.score_cap, self.window = config["attn_logit_softcapping"], window
        d_q, d_kv = config["num_attention_heads"] * self.head_dim, self.n_kv * self.head_dim
        q, kv, o = (d_model, d_q), (d_model, d_kv), (d_q, d_model)
        self.self_attn = linears(False, q_proj=q, k_proj=kv, v_proj=kv, o_proj=o)
        up, down = (d_model, d_mlp), (d_mlp, d_model)
        self.mlp = linears(False, gate_proj=up, up_proj=up, down_proj=down)
        norm = lambda: RMSNorm(d_model, config["rms_norm_eps"])
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        projections = (self.self_attn[name] for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Each key-value head serves a group of query heads: [B, n_kv, group, T, head_dim].
        q, k, v = q.unflatten(1, (self.n_kv, -1)), k.unsqueeze(2), v.unsqueeze(2)
        scores = soft_cap(q @ k.mT * self.scale, self.score_cap)
        hidden = torch.ones_like(scores[0, 0, 0], dtype=torch.bool).triu(1)
        if self.window is not None:
            hidden |= torch.ones_like(hidden).tril(-self.window)
        weights = single(scores).masked_fill(hidden, -torch.inf).softmax(-1).to(x.dtype)
        return self.self_attn.o_proj((weights @ v).flatten(1, 2).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.post_attention_layernorm(self.attend(self.input_layernorm(x), cos, sin))
        h = self.pre_feedforward_layernorm(x)
        h = F.gelu(self.mlp.gate_proj(h), approximate="tanh") * self.mlp.up_proj(h)
        return x + self.post_feedforward_layernorm(self.mlp.down_proj(h))


class Gemma2(LanguageModel):
    """RMSNorm before and after each half of a block, tied embeddings, soft-capped logits."""

    n_skip = 1
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    embedding = property(lambda self: self.model.embed_tokens)
    blocks = property(lambda self: self.model.layers)
    final_norm = property(lambda self: self.model.norm)

    def __init__(self, config: dict):
        super().__init__()
        d_model, n_layers = config["hidden_size"], config["num_hidden_layers"]
        self.set_rotary(config, config["head_dim"], share=1.0)
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
FAMILIES = {"gpt_neox": Pythia, "gemma2": Gemma2}  # model_type -> class
# Buffers of old GPT-NeoX checkpoints: not parameters.
IGNORED = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")


def build_lm(config: dict) -> LanguageModel:
    """The model that a parsed config.json describes; UserError for settings it cannot follow."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"model_type {kind!r} is not supported; supported: {', '.join(FAMILIES)}")
    key, activation = FAMILIES[kind].activation
    if config.get(key) not in (None, activation):
        raise UserError(f"config.json has {key} = {config[key]!r}; supported: {activation!r}")
    try:
        return FAMILIES[kind](config)
    except KeyError as missing:
        raise UserError(f"config.json has no {missing}, which a {kind} model needs") from None


def load_lm(name_or_folder: str, device="cpu", dtype=torch.float32) -> LanguageModel:
    """A frozen language model, `lm(tokens [B, T]) -> logits [B, T, V]`, from a short name, a Hub
    owner/name or a folder like a Hub snapshot. UserError where its tensors do not match by name."""
    with torch.device("meta"):
        lm = build_lm(model_loaders.load_config(name_or_folder))
    weights = model_loaders.load_weights(name_or_folder, device, dtype)
    tied = () if hasattr(lm, "embed_out") else ("embed_out.weight", "lm_head.weight")
    weights = {k: w for k, w in weights.items() if not k.endswith(IGNORED + tied)}
    try:
        lm.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise UserError(f"{name_or_folder}: weights do not fit config.json: {details}") from None
    return lm.eval().requires_grad_(False)


# ---- The sparse autoencoder (Gao et al. 2024, arXiv 2406.04093) ------------------------------
class Acts(NamedTuple):
    """The active latents of N tokens: an [N, F] matrix f as a flat list of P entries, by row."""

    values: Tensor  # [P], above 0; or 0 where a token has fewer than K positive latents
    latents: Tensor  # [P], the column
    offsets: Tensor  # [N], where each token's entries begin

    @property
    def tokens(self) -> Tensor:  # [P], the row of each entry
        entries = torch.arange(len(self.latents), device=self.offsets.device)
        return torch.bucketize(entries, self.offsets, right=True) - 1

    @property
    def l0(self) -> Tensor:  # active latents per token
        return (self.values > 0).sum() / len(self.offsets)


def top_k(pre: Tensor, k: int) -> Acts:
    """The K largest of each row of pre [N, F], after ReLU. Plainly: pre.topk(k). Fast path, exact:
    they lie in the K groups (g, g + G, g + 2G, ...) with the largest maxima: search only there."""
    n, d_sae = pre.shape
    size = 1 << (d_sae // max(1024, 4 * k)).bit_length() >> 1  # of a group
    if size < 4 or d_sae % size:
        values, latents = pre.topk(k, sorted=False)
    else:
        grouped = pre.view(n, size, -1)
        best = grouped.amax(1).topk(k, sorted=False).indices  # [N, K]
        inside = grouped.gather(2, best[:, None].expand(n, size, k)).flatten(1)  # [N, size K]
        values, place = inside.topk(k, sorted=False)
        latents = place // k * (d_sae // size) + best.gather(1, place % k)
    offsets = torch.arange(0, n * k, k, device=pre.device)
    return Acts(values.relu().flatten(), latents.flatten(), offsets)


def above(pre: Tensor, threshold: Tensor | float) -> Acts:
    """Every entry of pre [N, F] above a threshold >= 0."""
    active = pre > threshold
    tokens, latents = active.nonzero(as_tuple=True)
    per_token = active.sum(-1)
    return Acts(pre[tokens, latents], latents, per_token.cumsum(0) - per_token)


SPARSE_DEVICES = ("cpu",)  # elsewhere a dense bfloat16 product beats a sparse sum


def times(f: Acts, table: Tensor) -> Tensor:
    """The product f @ table [N, D] of a sparse f [N, F] and a dense table [F, D]."""
    if table.device.type in SPARSE_DEVICES:
        values = f.values.to(table.dtype)
        return F.embedding_bag(f.latents, table, f.offsets, mode="sum", per_sample_weights=values)
    dense = f.values.new_zeros(len(f.offsets), len(table))
    return dense.index_put((f.tokens, f.latents), f.values) @ table


class SparseAutoencode(torch.autograd.Function):
    """x_hat = f W_dec + b_dec with f = select((x - b_dec) W_enc' + b_enc), and its gradients.
    With g [N, D] = d loss / d x_hat and h [N, F] = g W_dec' where f > 0, else 0: dW_dec = f' g,
    dW_enc = h' (x - b_dec), db_enc = sum_n h, dx = h W_enc, db_dec = sum_n (g - dx).
    Fast path: only the encoder product is dense. f' and h' are lists of a few entries, sorted by
    latent once; h falls out of f' g, since d <f' g, W_dec> / d f[n, i] = <g[n], W_dec[i]>."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, W_dec, b_dec, select):
        ctx.autocast = torch.is_autocast_enabled(x.device.type)
        centred = x - b_dec
        acts = select(linear(centred, W_enc, b_enc))
        ctx.save_for_backward(centred, W_enc, W_dec, *acts)
        ctx.mark_non_differentiable(acts.latents, acts.offsets)
        return times(acts, W_dec) + b_dec, *acts

    @staticmethod
    def backward(ctx, g, g_values, *_):
        centred, W_enc, W_dec, *acts = ctx.saved_tensors
        acts, d_sae = Acts(*acts), len(W_enc)
        with torch.autocast(g.device.type, torch.bfloat16, enabled=ctx.autocast):
            # A stable sort of int32 is a radix sort on the CPU, many times faster than the others.
            order = acts.latents.int().sort(stable=True).indices
            latents, values = acts.latents[order], acts.values[order].requires_grad_()
            offsets = torch.searchsorted(latents, torch.arange(d_sae, device=g.device))
            f_T = Acts(values, acts.tokens[order], offsets)
            with torch.enable_grad():
                dW_dec = times(f_T, g)
            (h,) = torch.autograd.grad(dW_dec, values, W_dec)
            h = (h + g_values[order]) * (values > 0)
            dW_enc = times(f_T._replace(values=h), centred)
            db_enc = W_enc.new_zeros(d_sae).index_add_(0, latents, h.to(W_enc.dtype))
            dx = None
            if ctx.needs_input_grad[0]:
                by_token = acts._replace(values=torch.empty_like(h).index_copy_(0, order, h))
                dx = times(by_token, W_enc)
        return dx, dW_enc, db_enc, dW_dec.detach(), g.sum(0) - db_enc @ W_enc, None


class SAE(nn.Module):
    """x_hat = W_dec f + b_dec, f = activation(W_enc (x - b_dec) + b_enc), on x / scale.
    W_enc and W_dec are both [F, D], a row for each latent; `scale` makes the mean squared norm of
    activations 1. `kind` is the activation: "topk", the K largest of each token; "batchtopk", the
    K N largest of N tokens in training and later those above `threshold`, the running mean of the
    smallest one kept (arXiv 2412.06410); "relu", all that are positive."""

    def __init__(self, d_model: int, d_sae: int, k: int, kind="topk", autocast: bool = True):
        super().__init__()
        self.k, self.kind = k, kind
        self.autocast = autocast  # bfloat16 products on CUDA; the parameters stay float32
        directions = F.normalize(torch.randn(d_sae, d_model), dim=-1)
        self.W_enc, self.W_dec = nn.Parameter(directions.clone()), nn.Parameter(directions)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("threshold", torch.zeros(()))
        self.unit_norm = kind != "relu"  # its penalty weighs the directions' norms instead

    @torch.no_grad()
    def start_from(self, x: Tensor) -> None:
        """Sets scale, and b_dec to the geometric median, from first activations x [N, D]."""
        self.scale.copy_(x.float().pow(2).sum(-1).mean().sqrt())
        x = x[:8192].float() / self.scale
        median = x.mean(0)
        for _ in range(30):  # Weiszfeld's iteration to the least summed distance to all rows
            weights = 1 / (x - median).norm(dim=-1, keepdim=True).clamp_min(1e-6)
            median = (weights * x).sum(0) / weights.sum()
        self.b_dec.copy_(median)

    def forward(self, x: Tensor) -> tuple[Tensor, Acts]:
        """Reconstructions [N, D] of x [N, D], and the active latents (in units of x / scale)."""
        weights = self.W_enc, self.b_enc, self.W_dec, self.b_dec
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast and x.is_cuda):
            x_hat, *acts = SparseAutoencode.apply(single(x) / self.scale, *weights, self.select)
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
        self.threshold.lerp_(smallest.detach(), 0.001 if self.threshold > 0 else 1.0)
        return above(pre, torch.nextafter(smallest, smallest - 1).clamp_min(0))

    def sparsity(self, acts: Acts) -> Tensor:
        """mean_n sum_i f_i ||W_dec[i]||."""
        return (acts.values * self.W_dec.norm(dim=-1)[acts.latents]).sum() / len(acts.offsets)

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Removes from each W_dec.grad[i] the part along W_dec[i], which has norm 1."""
        for w, g in zip(self.W_dec.split(1024), self.W_dec.grad.split(1024)):  # fits the cache
            g.addcmul_(torch.linalg.vecdot(g, w)[:, None], w, value=-1)

    def folded(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors and settings in SAELens's layout, for raw activations: scale goes to biases."""
        tensors = {"W_enc": self.W_enc.T, "W_dec": self.W_dec}
        tensors |= {"b_enc": self.b_enc * self.scale, "b_dec": self.b_dec * self.scale}
        architecture = {"topk": "topk", "relu": "standard", "batchtopk": "jumprelu"}[self.kind]
        cfg = {"architecture": architecture, "d_in": len(self.b_dec), "d_sae": len(self.b_enc)}
        cfg |= {"dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True}
        cfg |= {"normalize_activations": "none", "reshape_activations": "none"}
        if self.kind == "topk":
            cfg |= {"k": self.k, "rescale_acts_by_decoder_norm": False}
        if self.kind == "batchtopk":
            tensors["threshold"] = torch.ones_like(self.b_enc) * self.threshold * self.scale
        return tensors, cfg


# ---- KL without the logits of a whole batch --------------------------------------------------
def slices(n_tokens: int, vocab: int) -> list[slice]:
    """Slices of the tokens with about 8M logits each."""
    size = max(1, 2**23 // vocab)
    return [slice(i, i + size) for i in range(0, n_tokens, size)]


class SlicedKL(torch.autograd.Function):
    """KL(p || q), mean over N tokens, of p, q = softmax(lm.unembed(resid_p, resid_q [N, D])).
    d KL / d logits_q = (q - p) / N is taken back through soft cap, unembedding and final norm slice
    by slice in the forward pass: three products with W_U per token, and never a tensor [N, V]."""

    @staticmethod
    def forward(ctx, resid_p: Tensor, resid_q: Tensor, lm: LanguageModel) -> Tensor:
        kl, grad = single(resid_q.new_zeros(())), torch.empty_like(resid_q)
        for rows in slices(len(resid_q), len(lm.W_U)):
            log_p = single(lm.unembed(resid_p[rows])).log_softmax(-1)
            with torch.enable_grad():
                resid = resid_q[rows].detach().requires_grad_()
                normed = lm.final_norm(resid)
            logits = single(soft_cap(linear(normed.detach(), lm.W_U), lm.logit_cap))
            log_q = logits.log_softmax(-1)
            p = log_p.exp()
            kl += (p * (log_p - log_q)).sum() / len(resid_q)
            g = log_q.exp() - p
            if lm.logit_cap is not None:  # the derivative of c tanh(z / c) is 1 - tanh(z / c)^2
                g *= 1 - (logits / lm.logit_cap) ** 2
            g = linear(g.to(normed.dtype), lm.W_U.T) / len(resid_q)
            (grad[rows],) = torch.autograd.grad(normed, resid, g)
        ctx.save_for_backward(grad)
        return kl

    @staticmethod
    def backward(ctx, g):
        return None, g * ctx.saved_tensors[0], None


# ---- Phase one: MSE on shuffled activations --------------------------------------------------
class ActivationBuffer:
    """Mixes the hook layer's activations of many sequences; each activation is served once.
    Batches follow a random permutation of the rows [size, D]; when half of them are used, new
    activations take their places and a new permutation is drawn."""

    def __init__(self, lm: LanguageModel, stream: TokenStream, n_sequences: int, config: Config):
        self.lm, self.stream, self.layer = lm, stream, config.layer
        self.chunk = max(1, 8192 // config.context)  # sequences in one forward
        self.next_sequence, self.n_sequences = 0, n_sequences
        self.per_sequence = config.context - lm.n_skip
        size = max(config.buffer, 1 + 2 * config.batch // self.per_sequence)
        n_rows = min(size, n_sequences) * self.per_sequence
        self.rows = lm.W_U.new_empty(n_rows, lm.W_U.shape[1])
        # Rows in the order in which they are served; those before `used` may be written over.
        self.order, self.used = torch.arange(n_rows, device=self.rows.device), n_rows
        self.refill()

    @torch.no_grad()
    def refill(self) -> None:
        n = min(self.used // self.per_sequence, self.n_sequences - self.next_sequence)
        new, rest = self.order[: self.used].tensor_split([n * self.per_sequence])
        tokens = self.stream.train(self.next_sequence, n).to(new.device)
        places = new.view(n, self.per_sequence)
        for chunk, rows in zip(tokens.split(self.chunk), places.split(self.chunk)):
            self.rows[rows] = self.lm.prefix(chunk, self.layer)[:, self.lm.n_skip :]
        self.next_sequence += n
        live = torch.cat([self.order[self.used :], new])
        shuffled = live[torch.randperm(len(live), device=live.device)]
        self.order, self.used = torch.cat([rest, shuffled]), len(rest)

    def next_batch(self, n: int) -> Tensor:
        """[n, D] activations in float32."""
        if self.used >= len(self.rows) // 2 and self.next_sequence < self.n_sequences:
            self.refill()
        rows = self.order[self.used : self.used + n]
        self.used += len(rows)
        return self.rows[rows].float()


def auxk_loss(sae: SAE, x: Tensor, x_hat: Tensor, dead: Tensor) -> Tensor:
    """AuxK: sum_n ||e - e_hat||^2 / sum_n ||e - mean(e)||^2 of the error e = (x - x_hat) / scale
    and its reconstruction e_hat, without bias, by the D/2 most active `dead` latents."""
    e = ((x - x_hat) / sae.scale).detach()
    k = min(x.shape[1] // 2, len(dead))
    weights = sae.W_enc[dead], sae.b_enc[dead], sae.W_dec[dead], torch.zeros_like(sae.b_dec)
    centred = x / sae.scale - sae.b_dec
    e_hat, *_ = SparseAutoencode.apply(centred, *weights, lambda pre: top_k(pre, k))
    return (e - e_hat).pow(2).sum() / (e - e.mean(0)).pow(2).sum()


def lr_factor(step: int, steps: int, warmup: int, decay: float) -> float:
    """Rises over `warmup` steps or a tenth, falls linearly to 0 over the last share `decay`."""
    rise = (step + 1) / max(1, min(warmup, steps // 10))
    return min(1.0, rise, (steps - step) / max(1.0, decay * steps))


def update(loss: Tensor, module: nn.Module, optimizer: AdamW, lr: float) -> None:
    """Backward, gradient off the decoder's directions, norm clipped to 1, Adam, unit norm again.
    Fast path: the fused kernel itself divides by `grad_scale`, and does nothing where `found_inf`
    is 1: clipping takes no pass of its own, and a step that is not finite changes nothing."""
    loss.backward()
    constrained = getattr(module, "unit_norm", False)
    if constrained:
        module.project_gradient()
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    optimizer.grad_scale, optimizer.found_inf = norm.clamp_min(1.0), (~norm.isfinite()).float()
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    if constrained:
        F.normalize(module.W_dec.data, dim=-1, out=module.W_dec.data)


def train_mse(lm, stream: TokenStream, saes: list[SAE], n_sequences: int, config: Config):
    """Phase one on the first n_sequences (0: only the start); all SAEs see the same batches.
    Yields (step, steps, each SAE's figures) of each step.
    loss = mean_n ||x - x_hat||^2 + AuxK / 32, or + lambda * sparsity for ReLU; on x / scale."""
    buffer = ActivationBuffer(lm, stream, n_sequences or min(32, stream.n_train), config)
    for sae in saes:
        sae.train().start_from(buffer.rows[:32768])
    optimizers = [AdamW(sae.parameters(), weight_decay=0.0, fused=True) for sae in saes]
    idle = [torch.zeros_like(sae.b_enc, dtype=torch.long) for sae in saes]  # tokens since it fired
    dead = [torch.empty(0, dtype=torch.long) for _ in saes]
    steps = n_sequences * buffer.per_sequence // config.batch
    for step in range(steps):
        x = buffer.next_batch(config.batch)
        lr = config.lr * lr_factor(step, steps, config.warmup, decay=0.2)
        rows = []
        for i, (sae, optimizer) in enumerate(zip(saes, optimizers)):
            x_hat, acts = sae(x)
            loss = mse = ((x - x_hat) / sae.scale).pow(2).sum(-1).mean()
            if sae.kind == "relu":
                loss = mse + config.l1 * min(1.0, 20 * step / steps) * sae.sparsity(acts)
            elif len(dead[i]):
                loss = mse + auxk_loss(sae, x, x_hat, dead[i]) / 32
            update(loss, sae, optimizer, lr)
            fires = torch.zeros_like(idle[i]).index_add_(0, acts.latents, (acts.values > 0).long())
            idle[i] = (idle[i] + len(x)) * (fires == 0)
            if step % config.log_every == 0:  # not at each step: it waits for the device
                dead[i] = (idle[i] > config.dead_after).nonzero()[:, 0]
            rows.append({"loss": loss.detach(), "mse": mse.detach(), "l0": acts.l0})
        yield step, steps, rows


# ---- Phase two: KL+MSE on whole sequences ----------------------------------------------------
@dataclass
class Splice:
    """What a fine-tune method trains: `insert` in place of resid_post after block L of `lm`.
    `insert` maps x [N, D] to (x_hat [N, D], Acts). Trained are the parameters of `insert` and `lm`
    that require a gradient; `loss` is "kl" (KL+MSE), "kl-only" or "mse"."""

    insert: nn.Module
    lm: LanguageModel
    loss: str = "kl"
    own_prefix: bool = False  # whether lm differs from the original in blocks 0..L
    l1: float = 0.0  # lambda of a ReLU SAE, and the L0 at which it is held
    l0_target: float = 0.0

    @property
    def trained(self) -> nn.Module:
        return self.lm if any(p.requires_grad for p in self.lm.parameters()) else self.insert

    def run(self, tokens: Tensor, resid: Tensor, layer: int):
        """For tokens [B, T], with the original model's resid_post [B, T, D] of block `layer`:
        resid_post of the last block with x_hat inserted, x, x_hat [B (T - n_skip), D], and Acts."""
        resid, skip = self.lm.prefix(tokens, layer) if self.own_prefix else resid, self.lm.n_skip
        x = resid[:, skip:].flatten(0, 1)
        x_hat, acts = self.insert(x)
        if self.loss == "mse" and self.insert.training:
            return x, x, x_hat, acts  # nothing after block L is needed
        inserted = x_hat.to(resid.dtype).view_as(resid[:, skip:])
        last = self.lm.suffix(torch.cat([resid[:, :skip], inserted], dim=1), layer)
        return last[:, skip:].flatten(0, 1), x, x_hat, acts


def finetune_loss(s: Splice, last_p: Tensor, last_q: Tensor, x: Tensor, x_hat: Tensor, acts: Acts):
    """(beta KL + MSE) / 2, and what to log; last_p, last_q: last resid_post [N, D] of the original
    model and with x_hat [N, D]. beta = MSE / KL, new for every batch: both halves weigh alike."""
    mse = F.mse_loss(x_hat, single(x))
    loss, figures = mse, {"mse": mse.detach(), "l0": acts.l0}
    if s.loss != "mse":
        kl = loss = SlicedKL.apply(last_p, last_q, s.lm)
        figures |= {"kl": kl.detach(), "beta": (mse / (kl + 1e-8)).detach()}
    if s.loss == "kl":
        loss = (figures["beta"] * kl + mse) / 2
    if getattr(s.insert, "kind", None) == "relu":
        # lambda was set beside the squared norm on x / scale, which is D / scale^2 times this MSE.
        loss = loss * x.shape[1] / s.insert.scale**2 + s.l1 * s.insert.sparsity(acts)
        s.l1 *= 1.001 if acts.l0 > s.l0_target else 0.999
    return loss, figures


def finetune(lm, stream: TokenStream, splices: list[Splice], start: int, stop: int, config):
    """Phase two: sequences start..stop in order; all splices see the same ones, and share blocks
    0..L with the original. The rate falls linearly to 0; where this phase is the whole training
    (end to end), rate and schedule are those of phase one. Yields as `train_mse` does."""
    steps, layer = max(1, (stop - start) // config.kl_batch), config.layer
    whole = config.kl_tokens == config.tokens
    peak, *schedule = (config.lr, config.warmup, 0.2) if whole else (config.kl_lr, 0, 1.0)
    trained = [s.trained.train().parameters() for s in splices]
    optimizers = [AdamW(parameters, weight_decay=0.01, fused=True) for parameters in trained]
    for step in range(steps):
        first = start + step * config.kl_batch
        tokens = stream.train(first, min(config.kl_batch, stop - first)).to(lm.W_U.device)
        with torch.no_grad():
            resid = last_p = lm.prefix(tokens, layer)
            if any(s.loss != "mse" for s in splices):
                last_p = lm.suffix(resid, layer)[:, lm.n_skip :].flatten(0, 1)
        rows = []
        for s, optimizer in zip(splices, optimizers):
            loss, figures = finetune_loss(s, last_p, *s.run(tokens, resid, layer))
            update(loss, s.trained, optimizer, peak * lr_factor(step, steps, *schedule))
            rows.append({"loss": loss.detach()} | figures)
        yield step, steps, rows
    for s in splices:
        s.insert.eval(), s.lm.eval()


# name -> (lm, a copy of the MSE SAE, config) -> what to train. experiments/baselines.py adds more.
METHODS = {  # "mse" is the control
    loss: lambda lm, sae, config, loss=loss: Splice(sae, lm, loss)
    for loss in ("kl", "kl-only", "mse")
}


# ---- Evaluation ------------------------------------------------------------------------------
def ce_and_kl(lm, lasts: list[Tensor], targets: Tensor) -> Tensor:
    """[2, m], summed over N tokens: CE on targets [N] of each of m resid_posts [N, D] of the last
    block, and KL from the first one's distribution to each. A slice of tokens at a time."""
    out = torch.zeros(2, len(lasts), dtype=torch.double, device=targets.device)
    for rows in slices(len(targets), len(lm.W_U)):
        log_p = single(lm.unembed(lasts[0][rows])).log_softmax(-1)
        for i, last in enumerate(lasts):
            log_q = single(lm.unembed(last[rows])).log_softmax(-1) if i else log_p
            out[0, i] += F.nll_loss(log_q, targets[rows], reduction="sum")
            out[1, i] += F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return out


@torch.no_grad()
def evaluate(lm, layer: int, tokens: Tensor, splices: list[Splice]) -> tuple[dict, list[dict]]:
    """On held-out tokens [n, T]: the model's own CE and zero ablation's, and a dict per splice.
    ce, kl: nats per token. fvu: share of the variance of x left unexplained. l0: active latents per
    token. dead: latents that never fired. The first n_skip positions do not count."""
    skip, device, insert = lm.n_skip, lm.W_U.device, splices[0].insert
    d_sae = len(getattr(insert, "sae", insert).b_enc)
    none = Acts(*torch.zeros(3, 0, dtype=torch.long, device=device))
    identity, zero = lambda x: (x, none), lambda x: (torch.zeros_like(x), none)
    splices, x_sum = [Splice(identity, lm), Splice(zero, lm), *splices], 0
    ce_kl, error_l0 = torch.zeros(2, 2, len(splices), dtype=torch.double, device=device)
    fired = torch.zeros(len(splices), d_sae, dtype=torch.bool, device=device)
    for batch in tokens.to(device).split(8):
        resid, lasts = lm.prefix(batch, layer), []
        x_sum = x_sum + resid[:, skip:].flatten(0, 1).double().sum(0)
        for i, s in enumerate(splices):
            last, x, x_hat, acts = s.run(batch, resid, layer)
            lasts.append(last.unflatten(0, (len(batch), -1))[:, :-1].flatten(0, 1))
            error_l0[0, i] += (x - x_hat).double().pow(2).sum()
            error_l0[1, i] += (acts.values > 0).sum()
            fired[i, acts.latents[acts.values > 0]] = True
        ce_kl += ce_and_kl(lm, lasts, batch[:, skip + 1 :].flatten())
    n = tokens[:, skip:].numel()
    (ce, kl), (error, l0) = ce_kl / (n - len(tokens)), error_l0 / n
    gap, variance = ce - ce[0], error[1] - (x_sum / n).pow(2).sum()  # error[1] is that of zero
    columns = {"ce": ce, "kl": kl, "fvu": error / variance, "l0": l0, "dead": (~fired).sum(1)}
    columns |= {"gap": gap, "loss_recovered": 1 - gap / gap[1]}
    rows = [dict(zip(columns, row)) for row in zip(*(c.tolist() for c in columns.values()))]
    return {"ce_original": rows[0]["ce"], "ce_zero": rows[1]["ce"]}, rows[2:]


# ---- A run, from the command line to its report ----------------------------------------------
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
    for stage in "+".join(config.method).split("+"):
        if stage not in METHODS:
            raise UserError(f"--method {stage} is unknown; there are: {', '.join(METHODS)}")
    n_layers = model_loaders.load_config(config.model).get("num_hidden_layers", 0)
    config.layer = n_layers // 2 if config.layer is None else config.layer
    if not 0 <= config.layer < n_layers:
        raise UserError(f"--layer {config.layer}: {config.model} has layers 0 to {n_layers - 1}")
    config.lr = 2e-4 / math.sqrt(config.d_sae / 2**14) if config.lr is None else config.lr
    if config.data is None:
        name = Path(config.model).name  # Pythia's own data, or c4
        config.data = "pythia" + name[-8:] * name.endswith("-deduped") if "pythia" in name else "c4"


def find_device(name: str) -> torch.device:
    """The device that --device names, cpu or cuda; UserError where it is not there."""
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ["cpu", "cuda", *(f"cuda:{i}" for i in range(n))] if n else ["cpu"]
    if name not in ("auto", *names):
        raise UserError(f"--device {name}: there are auto, {', '.join(names)}")
    return torch.device(names[n > 0] if name == "auto" else name)


def save(insert: nn.Module, folder: Path, config: Config) -> None:
    """A method's SAE in SAELens's layout: W_enc [D, F], W_dec [F, D]. Raises UserError."""
    sae = insert.merged() if hasattr(insert, "merged") else getattr(insert, "sae", insert)
    tensors, cfg = sae.folded()
    hook, model = f"blocks.{config.layer}.hook_resid_post", Path(config.model).name
    metadata = {"model_name": model, "hook_name": hook, "context_size": config.context}
    metadata |= {"dataset_path": config.data, "prepend_bos": "gemma" in model}
    cfg["metadata"] = metadata | {"model_from_pretrained_kwargs": {"center_writing_weights": False}}
    path = folder / "sae_weights.safetensors"
    model_loaders.write_safetensors(path, tensors, {"format": "pt"}, cfg)


class Run:
    """What a command line asks for: settings, model, tokens, and a folder for each K (or `folder`,
    whatever it holds). UserError for what cannot be or is not there, before anything is written."""

    def __init__(self, config: Config, folder: Path | None = None):
        check(config)
        self.config, self.device = config, find_device(config.device)
        name = config.name or f"{Path(config.model).name}-{config.sae}-k{{k}}-seed{config.seed}"
        name += "-k{k}" if len(config.k) > 1 and "{k}" not in name else ""
        self.folders = [folder or Path(config.out, name.replace("{k}", str(k))) for k in config.k]
        for path in self.folders if folder is None else []:
            replaced = config.overwrite and (path / "config.json").exists()
            if path.exists() and not replaced and (path.is_file() or any(path.iterdir())):
                raise UserError(f"{path} holds another run: choose a --name, or pass --overwrite")
        torch.set_float32_matmul_precision("highest" if config.float32 else "high")  # high: TF32
        source = config.data, load_tokenizer(config.model), config.context
        budget = config.tokens, config.eval_tokens
        self.stream = TokenStream(*source, *budget, allow_short=config.allow_short)
        self.n = n = self.stream.n_train  # sequences, the first n_mse for phase one
        if config.allow_short:
            total = n * config.context
            config.tokens, config.kl_tokens = total, config.kl_tokens * total // config.tokens
        self.n_mse = n - n * config.kl_tokens // config.tokens
        self.lm = load_lm(config.model, self.device, getattr(torch, config.dtype))

    def new_saes(self) -> list[SAE]:
        """An SAE for each K, from the seed."""
        torch.manual_seed((config := self.config).seed)
        shape, kind = (self.lm.W_U.shape[1], config.d_sae), (config.sae, not config.float32)
        return [SAE(*shape, k, *kind).to(self.device) for k in config.k]

    def follow(self, phase: str, splices: list[Splice], training) -> None:
        """Runs a phase: `training` yields (step, steps, figures of each splice), which go to its
        folder's metrics.jsonl and to a progress line. UserError where a loss is not finite; the
        SAEs are then saved as they were at the last line."""
        config, start, shown, losses = self.config, time.perf_counter(), 0, []
        good = [copy.deepcopy(s.insert) for s in splices]
        size = config.batch if phase == "MSE" else config.kl_batch * config.context
        for step, steps, rows in training:
            losses.append(torch.stack([row["loss"] for row in rows]))
            if (step + 1) % config.log_every and step + 1 < steps:
                continue  # no wait for the device in between
            since, losses = torch.stack(losses), []  # [steps since the last line, splices]
            for at, i in (~since.isfinite()).nonzero()[:1].tolist():
                for insert, folder in zip(good, self.folders):
                    save(insert, folder, config)
                text = f"phase {phase} is {since[at, i]} at step {step + 1 - len(since) + at}"
                kept = f"The last good SAE is in {self.folders[i]}"
                raise UserError(f"the loss of {text}: lower its rate. {kept}")
            if all(p.isfinite().all() for s in splices for p in s.insert.parameters()):
                good = [copy.deepcopy(s.insert) for s in splices]
            tokens, seconds = (step + 1) * size, time.perf_counter() - start
            line = {"phase": phase, "step": step + 1, "tokens": tokens, "seconds": seconds}
            rows = [row | {"loss": loss} for row, loss in zip(rows, since.mean(0))]
            if config.log_ce:
                some = self.stream.validation()[:32]
                for s, row in zip(splices, rows):
                    s.trained.eval()
                    model, (held_out,) = evaluate(self.lm, config.layer, some, [s])
                    row |= {"ce": held_out["ce"], "ce_original": model["ce_original"]}
                    s.trained.train()
            rows = [{name: float(value) for name, value in row.items()} for row in rows]
            for row, folder in zip(rows, self.folders):
                with open(folder / "metrics.jsonl", "a") as file:
                    print(json.dumps(line | row), file=file)
            live, tenth = sys.stdout.isatty(), 10 * (step + 1) // steps
            if live or tenth > shown:
                shown, minutes = tenth, seconds / 60 * (steps / (step + 1) - 1)
                text = f"{phase}: {tokens / 1e6:.2f}M of {steps * size / 1e6:.2f}M tokens"
                text += f", {tokens / seconds:,.0f}/s, {minutes:.1f} minutes left"
                text += "".join(f", {name} {value:.4g}" for name, value in rows[0].items())
                end = "" if live and step + 1 < steps else "\n"
                print(f"\r{text}\033[K" if live else text, end=end, flush=True)

    def finetune(self, method: str, saes: list[SAE], before: list[dict], first: int):
        """A splice for each SAE after one method on the sequences from `first` on; stages joined by
        + share them and follow on. `before`: what `evaluate` said of the SAEs."""
        stages, n, config = method.split("+"), self.n - first, self.config
        bounds = [first + n * i // len(stages) for i in range(len(stages) + 1)]
        for stage, *span in zip(stages, bounds, bounds[1:]):
            splices = [METHODS[stage](self.lm, copy.deepcopy(sae), config) for sae in saes]
            for s, row in zip(splices, before):
                s.l1, s.l0_target = config.l1, row["l0"]
            self.follow(stage, splices, finetune(self.lm, self.stream, splices, *span, config))
            saes = [s.insert for s in splices]
        return splices

    def train(self) -> list[dict]:
        """Phase one, each method from its SAEs, the evaluations; a report for each SAE."""
        config, clock, n_mse = self.config, time.perf_counter, self.n_mse
        saes, start = self.new_saes(), clock()
        splices = [Splice(sae, self.lm) for sae in saes]
        self.follow("MSE", splices, train_mse(self.lm, self.stream, saes, n_mse, config))
        seconds, held_out = {"MSE": clock() - start}, self.stream.validation()
        methods = config.method if n_mse < self.n else []
        for sae, folder in zip(saes, self.folders):
            save(sae.eval(), folder / "before" if methods else folder, config)
        model, before = evaluate(self.lm, config.layer, held_out, splices)
        results = [{"MSE": row} if n_mse else {} for row in before]  # end to end, it is untrained
        for method in methods:
            start = clock()
            splices = self.finetune(method, saes, before, n_mse)
            seconds[method] = clock() - start
            _, after = evaluate(self.lm, config.layer, held_out, splices)
            for s, row, rows, folder in zip(splices, after, results, self.folders):
                row["gap_closed"] = 1 - row["gap"] / rows["MSE"]["gap"] if n_mse else None
                rows[method] = row
                save(s.insert, folder if method == methods[0] else folder / method, config)
        return [self.report(model, *one, seconds) for one in zip(self.folders, config.k, results)]

    def report(self, model: dict, folder: Path, k: int, results: dict, seconds: dict) -> dict:
        """Writes report.json and prints the closing table; returns the report."""
        before = results.get("MSE", {})
        final = results.get(self.config.method[0], before | {"gap_closed": 0.0})
        out = asdict(self.config) | {"k": k} | model
        for name in ("ce", "gap", "fvu", "kl"):
            out |= {f"{name}_mse": before.get(name), f"{name}_final": final[name]}
        out |= {name: final[name] for name in ("gap_closed", "loss_recovered", "l0", "dead")}
        out |= {"seconds": seconds, "results": results}
        (folder / "report.json").write_text(json.dumps(out, indent=2) + "\n")
        rows = {"original": {"ce": model["ce_original"]}, "zero ablation": {"ce": model["ce_zero"]}}
        names = "ce gap gap_closed kl fvu l0 dead".split()
        print(f"\n{folder}\n{'':16}" + "".join(f"{name:>12}" for name in names))
        for label, row in (rows | results).items():
            cells = (" " * 12 if row.get(name) is None else f"{row[name]:12.4f}" for name in names)
            print(f"{label:16}" + "".join(cells))
        return out

    def make_folders(self) -> None:
        """Empty but for config.json."""
        for folder, k in zip(self.folders, self.config.k):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            settings = json.dumps(asdict(self.config) | {"k": k}, indent=2)
            (folder / "config.json").write_text(settings + "\n")

    def run(self) -> list[dict]:
        """The whole run; a report for each K, as in its report.json. UserError where it fails."""
        self.make_folders()
        try:
            return self.train()
        except UserError:
            for folder in self.folders:
                if not (folder / "cfg.json").exists():
                    shutil.rmtree(folder)
            raise
        finally:
            self.stream.close()


def fail(message: str) -> None:
    raise UserError(f"{message} (--help lists the flags)")


def parse(argv: list[str] | None = None) -> Config:
    """Settings from the command line: Config's defaults, the model's preset, then the flags."""
    parser = argparse.ArgumentParser(description=__doc__[:82], argument_default=argparse.SUPPRESS)
    parser.error = fail
    for f in fields(Config):
        options, default = dict(f.metadata), f.default_factory()
        options["help"] += "" if default is None else f" (default: {default})"
        if "bool" in f.type:
            options["action"] = "store_true"
        else:
            options["type"] = count if "int" in f.type else float if "float" in f.type else str
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    given = vars(parser.parse_args(argv))
    short = Path(given.get("model", Config().model)).name.removesuffix("-deduped")
    return Config(**PRESETS.get(short, {}) | given)


def main(argv: list[str] | None = None) -> int:
    try:
        Run(parse(argv)).run()
    except UserError as error:
        print(f"saeft: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
