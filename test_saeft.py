"""saeft against references that nobody here wrote: transformers, tokenizers, sentencepiece,
safetensors, the real Hub client on a loopback server, torch's autograd in float64 and its Adam."""

import copy
import gzip
import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, ByteLevelBPETokenizer
from torch.utils._python_dispatch import TorchDispatchMode

import model_loaders
import saeft
from experiments import baselines  # adds its methods to saeft.METHODS
from model_loaders import TokenStream, documents, held_out
from saeft import SAE, Acts, Config, SlicedKL, SparseAutoencode, Splice, UserError

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

# ---- Language models -------------------------------------------------------------------------

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_attention_heads=4)
NEOX = SIZES | dict(num_hidden_layers=3, rotary_pct=0.25, rotary_emb_base=10000)
GEMMA = SIZES | dict(num_hidden_layers=4, num_key_value_heads=2, head_dim=16, sliding_window=8)
GEMMA |= dict(query_pre_attn_scalar=24, attn_logit_softcapping=5.0, final_logit_softcapping=3.0)
FAMILIES = {"pythia": ("GPTNeoX", NEOX), "gemma": ("Gemma2", GEMMA)}
TOKENS = torch.randint(96, (3, 20), generator=torch.Generator().manual_seed(0))


def reference(family, **changes):
    """A model of transformers, every parameter random: no bias is 0, no norm's weight 1."""
    kind, settings = FAMILIES[family]
    config = getattr(transformers, kind + "Config")(
        **settings | changes, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind + "ForCausalLM")(config).eval()
    for p in model.parameters():  # Gemma's are large, so that scores and logits reach the soft caps
        gain = (3 if family == "gemma" else 1) * p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3
        p.data = p.data * (p.dim() == 1) + gain * torch.randn_like(p)
    return model


def edit(folder, tensors=lambda t: t, drop=(), **changes):
    """Rewrites what save_pretrained wrote: a function of the tensors; keys of config.json."""
    path, weights = folder / "config.json", folder / "model.safetensors"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop} | changes
    path.write_text(json.dumps(config))
    safetensors.save_file(tensors(safetensors.load_file(weights)), weights, {"format": "pt"})


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES)
def lm(request, tmp_path):
    reference(request.param).save_pretrained(tmp_path)
    model = saeft.load_lm(str(tmp_path))
    assert model.n_skip == (request.param == "gemma")  # its <bos> counts nowhere
    return model


def assert_close(ours, theirs, tolerance=1e-5):
    """max|a - b| / max|b| is below the tolerance."""
    assert ours.shape == theirs.shape
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error < tolerance, f"relative error {error}"


@torch.no_grad()
def compare(model, folder, tokens=TOKENS, tolerance=1e-5, **load):
    """Logits and each block's resid_post equal transformers'; prefix and suffix make the whole."""
    ours, theirs = saeft.load_lm(str(folder), **load), model(tokens, output_hidden_states=True)
    assert_close(logits := ours(tokens), theirs.logits, tolerance)
    hidden = theirs.hidden_states[1:-1]
    assert len(hidden) == len(ours.blocks) - 1
    for layer, block in enumerate([*hidden, None]):
        resid = ours.prefix(tokens, layer)
        assert torch.equal(ours.unembed(ours.suffix(resid, layer)), logits)
        if block is not None:  # transformers gives the last one after the final norm
            assert_close(resid, block, tolerance)


PYTHIA_160M = dict(vocab_size=50304, hidden_size=768, intermediate_size=3072)
PYTHIA_160M |= dict(num_hidden_layers=12, num_attention_heads=12)
VARIANTS = [("pythia", {"use_parallel_residual": False}), ("pythia", {"tie_word_embeddings": True})]
VARIANTS += [("pythia", {"rotary_pct": share}) for share in (0.25, 0.5, 1.0)]
VARIANTS += [("pythia", {"rotary_pct": 1.0, "rotary_emb_base": 100}), ("pythia", PYTHIA_160M)]
VARIANTS += [("gemma", {}), ("gemma", {"num_key_value_heads": 1, "rope_theta": 100.0})]
VARIANTS += [("gemma", {"attn_logit_softcapping": None, "final_logit_softcapping": None})]


@pytest.mark.parametrize("family, changes", VARIANTS)
def test_logits(family, changes, tmp_path):
    model = reference(family, **changes)
    model.save_pretrained(tmp_path)
    compare(model, tmp_path)
    if "rotary_pct" in changes:  # both spellings, whatever this version of transformers writes
        old = {key: (NEOX | changes)[key] for key in ("rotary_pct", "rotary_emb_base")}
        rope = dict(zip(("partial_rotary_factor", "rope_theta"), old.values()))
        edit(tmp_path, drop=["rope_parameters"], **old)
        compare(model, tmp_path)
        edit(tmp_path, drop=old, rope_parameters=rope | {"rope_type": "default"})
        compare(model, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sharded", [False, True])
def test_logits_from_files(family, dtype, sharded, tmp_path):
    model = reference(family)
    for p in model.parameters():
        p.data = p.data.to(dtype).float()
    size = "20KB" if sharded else "1GB"
    copy.deepcopy(model).to(dtype).save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    compare(model, tmp_path)
    if dtype == torch.bfloat16:  # computing in it, too
        compare(model, tmp_path, dtype=dtype, tolerance=0.3)


NORM, OLD = "gpt_neox.final_layer_norm.bias", "gpt_neox.layers.1.attention."
BUFFERS = {OLD + "bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
BUFFERS |= {OLD + "masked_bias": torch.tensor(-1e9), OLD + "rotary_emb.inv_freq": torch.ones(1)}
WRONG_TENSORS = {
    "Missing": lambda tensors: {k: v for k, v in tensors.items() if k != NORM},
    "Unexpected": lambda tensors: tensors | {NORM + "es": torch.ones(2)},
    "size mismatch": lambda tensors: tensors | {NORM: torch.ones(33)},
}


@pytest.mark.parametrize("problem", WRONG_TENSORS)
def test_wrong_tensors_are_named_and_old_buffers_ignored(problem, tmp_path):
    reference("pythia").save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors | BUFFERS)
    compare(reference("pythia"), tmp_path)
    edit(tmp_path, WRONG_TENSORS[problem])
    with pytest.raises(UserError, match=rf"{problem}[^\]]*{NORM}"):
        saeft.load_lm(str(tmp_path))


WRONG_CONFIGS = {"llama": {"model_type": "llama"}, "hidden_act.*relu": {"hidden_act": "relu"}}
WRONG_CONFIGS["yarn"] = {"rope_parameters": {"rope_type": "yarn"}}
WRONG_CONFIGS["linear"] = {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2}}


def test_unknown_settings_are_named():
    config = reference("pythia").config.to_dict()
    saeft.build_lm(config)
    for message, changes in WRONG_CONFIGS.items():
        with pytest.raises(UserError, match=message):
            saeft.build_lm(config | changes)
    with pytest.raises(UserError, match="hidden_size"):
        saeft.build_lm({k: v for k, v in config.items() if k != "hidden_size"})


# ---- The SAE ---------------------------------------------------------------------------------

SELECT = {"topk": lambda pre: saeft.top_k(pre, 5), "relu": lambda pre: saeft.above(pre, 0.0)}
SELECT["threshold"] = lambda pre: saeft.above(pre, 0.7)


def largest(pre, k):
    """ReLU of the K largest of each row, all others 0."""
    return pre.relu() * torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1.0)


def dense_sae(x, W_enc, b_enc, W_dec, b_dec, kind="topk", k=5):
    """x_hat [N, D] and f [N, F] by the equations, f dense."""
    pre = (x - b_dec) @ W_enc.T + b_enc
    f = largest(pre, k) if kind == "topk" else pre.relu() * (pre > 0.7 * (kind == "threshold"))
    return f @ W_dec + b_dec, f


def sae_inputs(n=24, d_model=8, d_sae=20):
    """x and weights in float64; some tokens have few positive latents or none, some latents none."""
    torch.manual_seed(0)
    shapes = (n, d_model), (d_sae, d_model), (d_sae,), (d_sae, d_model), (d_model,)
    x, *others = (torch.randn(shape, dtype=torch.double) for shape in shapes)
    others[1][:] = -2
    others[1][:2] = -100
    x[:3] = others[3] + 0.05 * x[:3]
    return [t.requires_grad_() for t in (x, *others)]


@pytest.fixture(params=["sparse", "dense"])
def path(request, monkeypatch):
    """Both ways to multiply: as on the CPU, and as on other devices."""
    if request.param == "dense":
        monkeypatch.setattr(saeft, "SPARSE_DEVICES", ())


@pytest.mark.parametrize("kind", SELECT)
def test_sae_and_its_gradients_equal_dense_autograd(kind, path):
    expected, f = dense_sae(*(inputs := sae_inputs()), kind)
    per_token, per_latent = (f > 0).sum(1), (f > 0).sum(0)
    assert per_token[:3].max() == 0 < per_token[3:].min() < 5 <= per_token.max()
    assert per_latent[:2].max() == 0
    x_hat, *acts = SparseAutoencode.apply(*inputs, SELECT[kind])
    assert_close(x_hat, expected, 1e-12)
    acts, norms = Acts(*acts), inputs[3].detach().norm(dim=-1)
    assert acts.l0.item() == pytest.approx(per_token.double().mean().item())
    weight, penalty = torch.randn_like(x_hat), acts.values**2 @ norms[acts.latents]  # on values
    ours = torch.autograd.grad((x_hat * weight).sum() + penalty, inputs)
    theirs = torch.autograd.grad((expected * weight).sum() + (f**2 * norms).sum(), inputs)
    for a, b in zip(ours, theirs):
        assert_close(a, b, 1e-12)
    values_and_x_hat = lambda *inputs: SparseAutoencode.apply(*inputs, SELECT[kind])[:2]
    assert torch.autograd.gradcheck(values_and_x_hat, sae_inputs(6, 4, 9))


@pytest.mark.parametrize("d_sae, k", [(4096, 8), (5120, 80), (16384, 80), (16384, 1000), (99, 99)])
def test_top_k_finds_the_k_largest(d_sae, k):
    pre = torch.randn(20, d_sae).round(decimals=2)  # with ties
    values, latents, offsets = saeft.top_k(pre, k)
    assert torch.equal(values, pre.gather(1, latents.view(20, k)).relu().flatten())
    expected = pre.topk(k).values.relu()
    assert torch.equal(values.view(20, k).sort(descending=True).values, expected)
    assert all(len(row.unique()) == k for row in latents.view(20, k))
    assert offsets.tolist() == list(range(0, 20 * k, k))


def small_sae(kind="topk", k=6):
    """An SAE whose biases, scale and norms are not trivial, and of whose latents 3 never fire."""
    torch.manual_seed(1)
    sae = SAE(32, 64, k, kind)
    sae.start_from(3 * torch.randn(500, 32) + torch.randn(32))
    sae.b_enc.data.normal_(std=0.1)[:3] = -100
    sae.W_dec.data *= 1 + torch.rand(64, 1) * (kind == "relu")
    sae.threshold.fill_(0.2 if kind == "batchtopk" else 0)
    return sae.eval()


def parameters(sae):
    return [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]


def leaves(sae):
    """Copies of the parameters in float64."""
    return [p.detach().double().requires_grad_() for p in parameters(sae)]


@pytest.mark.parametrize("n_dead", [9, 40])  # fewer than D/2, and more
def test_auxk_equals_direct_computation(n_dead):
    sae, x, dead = small_sae(), torch.randn(50, 32) * 3, torch.arange(10, 10 + n_dead)
    x_hat, _ = sae(x)
    loss = saeft.auxk_loss(sae, x, x_hat, dead)
    W_enc, b_enc, W_dec, b_dec = weights = leaves(sae)
    e = ((x - x_hat) / sae.scale).detach().double()
    f = largest((x / sae.scale - b_dec) @ W_enc[dead].T + b_enc[dead], min(16, n_dead))
    expected = ((e - f @ W_dec[dead]) ** 2).sum() / ((e - e.mean(0)) ** 2).sum()
    assert_close(loss, expected)
    theirs = torch.autograd.grad(expected, weights)
    for a, b in zip(torch.autograd.grad(loss, parameters(sae)), theirs):
        assert_close(a, b)


def test_sae_starts_at_the_geometric_median_of_scaled_activations():
    sae, x = SAE(4, 64, 2), torch.randn(300, 4) + 5
    x[0] = 1e4
    sae.start_from(x)
    median = (sae.b_dec * sae.scale).detach()  # where the directions of all points balance
    assert F.normalize(x - median, dim=-1).mean(0).norm() < 1e-3 < (x.mean(0) - median).norm()
    assert_close(sae.scale, (x**2).sum(1).mean().sqrt())
    assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))


@pytest.mark.parametrize("kind, size", [("topk", 1e2), ("topk", 1e-2), ("relu", 1e2)])
def test_update_equals_projection_clipping_adamw_and_unit_norm(kind, size):
    sae = small_sae(kind)
    ours, theirs = saeft.AdamW(sae.parameters(), weight_decay=0.01, fused=True), copy.deepcopy(sae)
    plain = torch.optim.AdamW(theirs.parameters(), weight_decay=0.01, fused=False, foreach=False)
    for step in range(4):
        plain.param_groups[0]["lr"] = lr = 1e-2 / (step + 1)
        x = torch.randn(64, 32) * 3
        saeft.update(size * F.mse_loss(sae(x)[0], x), sae, ours, lr)
        (size * F.mse_loss(theirs(x)[0], x)).backward()
        if kind == "topk":
            unit = theirs.W_dec.data
            theirs.W_dec.grad -= (theirs.W_dec.grad * unit).sum(1, keepdim=True) * unit
        assert (torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0) > 1) == (size > 1)
        plain.step(), plain.zero_grad()
        if kind == "topk":
            theirs.W_dec.data = F.normalize(theirs.W_dec.data, dim=-1)
            assert_close(sae.W_dec.norm(dim=-1), torch.ones(64), 1e-6)
        for a, b in zip(parameters(sae), parameters(theirs)):
            assert_close(a, b, 1e-4)


def test_project_gradient_leaves_nothing_along_the_decoder():
    sae, x = small_sae(), torch.randn(64, 32)
    sae(x)[0].square().mean().backward()
    assert (sae.W_dec.grad * sae.W_dec).sum(-1).abs().max() > 0.1
    sae.project_gradient()
    assert (sae.W_dec.grad * sae.W_dec).sum(-1).abs().max() < 1e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_update_with_a_loss_that_is_not_finite_changes_nothing(bad):
    sae, x = small_sae(), torch.randn(64, 32)
    optimizer = saeft.AdamW(sae.parameters(), weight_decay=0.01, fused=True)

    def step(factor):
        saeft.update(factor * F.mse_loss(sae(x)[0], x), sae, optimizer, 1e-2)
        state = [t for p in parameters(sae) for t in optimizer.state[p].values()]
        return [t.detach().clone() for t in parameters(sae)], [t.clone() for t in state]

    (first, _), (before, state), (after, state_after) = step(1.0), step(1.0), step(bad)
    assert not any(map(torch.equal, first, before))
    assert all(map(torch.equal, state, state_after))
    for a, b in zip(after, before):  # W_dec is normalised once more
        assert_close(a, b, 2e-7)


@pytest.mark.parametrize("kind", ["topk", "relu", "batchtopk"])
def test_folded_sae_works_on_raw_activations_by_saelens_equations(kind):
    sae, x = small_sae(kind), torch.randn(100, 32) * 3
    tensors, cfg = sae.folded()
    architecture = {"topk": "topk", "relu": "standard", "batchtopk": "jumprelu"}[kind]
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"]) == (architecture, 32, 64)
    pre = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    f = pre.relu() * (pre > tensors.get("threshold", torch.zeros(64)))
    f = largest(pre, cfg["k"]) if kind == "topk" else f
    x_hat, acts = sae(x)
    assert_close(f @ tensors["W_dec"] + tensors["b_dec"], x_hat)
    assert 1 < acts.l0 == (f > 0).sum(1).float().mean()


def test_batchtopk_keeps_k_per_token_on_average_and_learns_its_threshold():
    sae, x = SAE(32, 64, 6, "batchtopk").train(), torch.randn(200, 32)
    _, acts = sae(x)
    assert len(acts.values) == 1200 and 0 < acts.values.min() == sae.threshold
    assert acts.offsets.diff().max() > 6 > acts.offsets.diff().min()
    assert sae.eval()(x)[1].l0 == pytest.approx(6, abs=0.01)


# ---- KL, and the fine-tune's loss ------------------------------------------------------------


def whole_kl(log_p, log_q):
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


@pytest.fixture
def slices_of_7(monkeypatch):
    few = lambda n, vocab: [slice(i, i + 7) for i in range(0, n, 7)]
    monkeypatch.setattr(saeft, "slices", few)


def resids(n, d_model, dtype=torch.double):
    p, noise = torch.randn(2, n, d_model, dtype=dtype, generator=torch.manual_seed(2))
    return p, (p + 0.3 * noise).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sliced_kl_equals_whole_logits(lm, dtype, slices_of_7):
    p, q = resids(50, 32, dtype)
    kl = SlicedKL.apply(p, q, lm.to(dtype))
    (grad,) = torch.autograd.grad(3 * kl, q)
    logits = [lm.double().unembed(resid.double()) for resid in (p, q)]
    expected = whole_kl(*(z.log_softmax(-1) for z in logits))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert_close(kl, expected, tolerance)
    assert_close(grad, 3 * torch.autograd.grad(expected, q)[0], tolerance)
    p, q = resids(9, 32)
    assert torch.autograd.gradcheck(lambda q: SlicedKL.apply(p, q, lm), q)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in tensors)])
        return out


def test_no_tensor_of_tokens_times_vocabulary_exists():
    config = reference("pythia").config.to_dict() | {"vocab_size": 50304, "hidden_size": 8}
    lm, (p, q) = saeft.build_lm(config).requires_grad_(False), resids(400, 8, torch.float32)
    with Largest() as seen:
        SlicedKL.apply(p, q, lm).backward()
        saeft.ce_and_kl(lm, [p, q.detach()], torch.arange(400))
    assert 50304 * 8 < seen.numel <= 2**23 < 400 * 50304 / 2
    served = [torch.arange(400)[rows] for rows in saeft.slices(400, 50304)]
    assert torch.equal(torch.cat(served), torch.arange(400))


def dense_splice(lm, sae, weights, tokens, layer=1):
    """x, x_hat [N, D], f [N, F] and log-probabilities [B, T - n_skip, V] without and with the SAE."""
    resid = lm.prefix(tokens, layer)
    x = resid[:, lm.n_skip :].flatten(0, 1)
    x_hat, f = dense_sae(x / sae.scale, *weights, sae.kind, sae.k)
    spliced = (x_hat * sae.scale).view(len(tokens), -1, 32)
    resids = resid, torch.cat([resid[:, : lm.n_skip], spliced], 1)
    logits = [lm.unembed(lm.suffix(r, layer))[:, lm.n_skip :] for r in resids]
    return x, x_hat * sae.scale, f, *(z.log_softmax(-1) for z in logits)


def finetune_loss(s, lm, layer=1):
    resid = lm.prefix(TOKENS, layer)
    last_p = lm.suffix(resid, layer)[:, lm.n_skip :].flatten(0, 1)
    return saeft.finetune_loss(s, last_p, *s.run(TOKENS, resid, layer))


@pytest.mark.parametrize("kind", ["topk", "relu"])
@pytest.mark.parametrize("loss", ["kl", "kl-only", "mse"])
def test_finetune_loss_and_gradients_end_to_end(lm, kind, loss, slices_of_7):
    lm, sae, weights = lm.double(), small_sae(kind).train().double(), leaves(small_sae(kind))
    s = Splice(sae, lm, loss, l1=0.3, l0_target=1.0)
    ours, seen = finetune_loss(s, lm)
    x, x_hat, f, log_p, log_q = dense_splice(lm, sae, weights, TOKENS)
    mse, kl = F.mse_loss(x_hat, x), whole_kl(log_p.flatten(0, 1), log_q.flatten(0, 1))
    expected = {"kl": ((mse / kl).detach() * kl + mse) / 2, "kl-only": kl, "mse": mse}[loss]
    if loss != "mse":
        assert_close(seen["kl"], kl, 1e-9)
        assert_close(seen["beta"] * seen["kl"], seen["mse"], 1e-6)
    if kind == "relu":
        expected = expected * 32 / sae.scale**2 + 0.3 * (f @ weights[2].norm(dim=1)).mean()
        assert s.l1 == pytest.approx(0.3 * 1.001)
    assert_close(ours, expected, 1e-6)
    theirs = torch.autograd.grad(expected, weights)
    for a, b in zip(torch.autograd.grad(ours, parameters(sae)), theirs):
        assert_close(a, b, 1e-6)


# ---- The buffer, the loops, the evaluation ---------------------------------------------------


class Stream:
    """Sequences as a TokenStream gives them; remembers which ones were asked for."""

    def __init__(self, tokens):
        self.tokens, self.asked = tokens, []

    def train(self, start, count):
        self.asked += range(start, start + count)
        return self.tokens[start : start + count]


@pytest.mark.parametrize("n_skip", [0, 1])
@pytest.mark.parametrize("n_sequences", [3, 57])  # fewer and more than the buffer holds
def test_buffer_serves_each_activation_once_and_mixes(n_skip, n_sequences):
    def prefix(tokens, layer):  # resid_post tells its sequence, position and layer
        return torch.stack([tokens // 10, tokens % 10, torch.full_like(tokens, layer)], -1).float()

    lm, size = SimpleNamespace(n_skip=n_skip, W_U=torch.zeros(1, 3), prefix=prefix), 10 - n_skip
    stream = Stream(torch.arange(1000).view(100, 10))
    config = Config(context=10, batch=8, buffer=20, layer=4)
    buffer = saeft.ActivationBuffer(lm, stream, n_sequences, config)
    start, total = buffer.rows.data_ptr(), n_sequences * size
    batches = [buffer.next_batch(8) for _ in range(total // 8)]
    assert buffer.rows.data_ptr() == start and len(buffer.rows) == min(20, n_sequences) * size
    assert stream.asked == list(range(n_sequences))
    sequence, position, layer = (served := torch.cat(batches)).unbind(-1)
    assert position.min() == n_skip and sequence.max() == n_sequences - 1 and (layer == 4).all()
    assert len(served.unique(dim=0)) == len(served) == total - total % 8
    mixed = sum(len(batch[:, 0].unique()) for batch in batches) / len(batches)
    assert mixed > (5 if n_sequences == 57 else 2)


LOOP = dict(layer=1, context=20, tokens=1200, kl_tokens=400, batch=50, kl_batch=4, buffer=10)
LOOP |= dict(warmup=4, lr=1e-2, kl_lr=1e-3, dead_after=100, rank=4)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu"])
def test_mse_phase_learns_and_saes_trained_together_equal_each_alone(lm, kind):
    def train(*ks):
        torch.manual_seed(3)
        saes, seen = [SAE(32, 64, k, kind) for k in (4, 8)], []
        stream, saes = Stream(torch.randint(96, (60, 20))), [sae for sae in saes if sae.k in ks]
        for _, _, rows in saeft.train_mse(lm, stream, saes, 60, Config(**LOOP)):
            seen += [row["mse"].item() for row in rows]
        assert sum(seen[-5:]) < 0.8 * sum(seen[:5])
        return [sae.state_dict() for sae in saes]

    for together, alone in zip(train(4, 8), train(4) + train(8)):
        assert all(torch.equal(together[name], alone[name]) for name in alone)


@pytest.mark.parametrize(
    "kl_tokens, rates", [(400, [1e-3, 8e-4, 6e-4, 4e-4, 2e-4]), (1200, [0.01] * 5)]
)
def test_finetune_takes_its_sequences_in_order_and_its_rate_falls(
    kl_tokens, rates, lm, monkeypatch
):
    seen, stream = [], Stream(TOKENS[:1].repeat(60, 1))
    monkeypatch.setattr(saeft, "update", lambda loss, module, optimizer, lr: seen.append(lr))
    config = Config(**LOOP | {"kl_tokens": kl_tokens})  # all tokens: phase one's rate and schedule
    assert len(list(saeft.finetune(lm, stream, [Splice(small_sae(), lm)], 40, 60, config))) == 5
    assert stream.asked == list(range(40, 60)) and seen == pytest.approx(rates)


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
@pytest.mark.parametrize("method", saeft.METHODS)
def test_methods_start_at_the_sae_and_leave_the_language_model_alone(lm, method, kind):
    sae, logits, state = small_sae(kind), lm(TOKENS), copy.deepcopy(lm.state_dict())
    s = saeft.METHODS[method](lm, copy.deepcopy(sae), Config(**LOOP))
    _, x, x_hat, _ = s.run(TOKENS, lm.prefix(TOKENS, 1), 1)
    assert_close(x_hat, sae(x)[0])
    s.trained.train()
    finetune_loss(s, lm)[0].backward()
    trained = {name: p for name, p in s.trained.named_parameters() if p.requires_grad}
    frozen = [p for m in (s.insert, s.lm) for p in m.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen) and {*lm.parameters()} <= {*frozen}
    assert all(p.grad is not None for p in trained.values()) and len(trained) > 1
    before = copy.deepcopy(trained)
    stream = Stream(torch.randint(96, (20, 20)))
    list(saeft.finetune(lm, stream, [s], 0, 20, Config(**LOOP)))
    assert not any(torch.equal(before[name], p) for name, p in trained.items())
    assert not s.insert.training and not s.lm.training
    assert torch.equal(lm(TOKENS), logits)
    assert all(torch.equal(state[name], value) for name, value in lm.state_dict().items())
    if method == "lora-sae":
        x = x.detach()
        assert_close(s.insert.merged()(x)[0], s.insert(x)[0])


def test_every_method_takes_two_steps_at_pythia_160m_shape():
    lm = saeft.build_lm(PYTHIA_160M | dict(model_type="gpt_neox", layer_norm_eps=1e-5))
    sae, tokens = SAE(768, 256, 80), torch.randint(50304, (2, 16))
    config = Config(layer=8, context=16, kl_batch=1, kl_tokens=32, d_sae=256)
    with torch.no_grad():
        logits = lm.requires_grad_(False)(tokens)
        sae.start_from(lm.prefix(tokens, 8).flatten(0, 1))
    assert {"kl", "mse", "kl-only"} < {*saeft.METHODS} and baselines.Adapter
    for method in saeft.METHODS:
        s = saeft.METHODS[method](lm, copy.deepcopy(sae), config)
        steps = list(saeft.finetune(lm, Stream(tokens), [s], 0, 2, config))
        assert len(steps) == 2 and all(row["loss"].isfinite() for *_, (row,) in steps)
        assert torch.equal(lm(tokens), logits)


@torch.no_grad()
def test_evaluate_equals_direct_computation(lm):
    tokens, skip, lm = torch.randint(96, (11, 20)), lm.n_skip, lm.double()
    saes = [small_sae().double(), small_sae("relu").double(), small_sae(k=1).double()]
    model, figures = saeft.evaluate(lm, 1, tokens, [Splice(sae, lm) for sae in saes])
    targets = tokens[:, skip + 1 :].flatten()
    zero = [torch.zeros_like(p) for p in parameters(saes[0])]
    for sae, weights, ours in [(saes[0], zero, model), *zip(saes, map(leaves, saes), figures)]:
        x, x_hat, f, *logs = dense_splice(lm, sae, weights, tokens)
        log_p, log_q = (log[:, :-1].flatten(0, 1) for log in logs)
        original, ce = F.nll_loss(log_p, targets).item(), F.nll_loss(log_q, targets).item()
        if ours is model:
            ce_zero, expected = ce, {"ce_original": original, "ce_zero": ce}
        else:
            gap, error = ce - original, (x - x_hat).square().sum()
            expected = {"ce": ce, "gap": gap, "loss_recovered": 1 - gap / (ce_zero - original)}
            expected["kl"] = whole_kl(log_p, log_q).item()
            expected["fvu"] = (error / (x - x.mean(0)).square().sum()).item()
            expected |= {"l0": (f > 0).sum(1).double().mean().item()}
            expected |= {"dead": (f == 0).all(0).sum().item()}
            assert expected["dead"] >= 3
        assert ours == pytest.approx(expected, rel=1e-6)


# ---- Settings --------------------------------------------------------------------------------


def test_lr_warms_up_stays_and_falls_to_0():
    factors = [saeft.lr_factor(step, 100, 10, 0.2) for step in range(101)]
    rise, fall = [i / 10 for i in range(1, 11)], [1 - i / 20 for i in range(1, 21)]
    assert factors == pytest.approx(rise + [1.0] * 71 + fall)


@pytest.mark.parametrize("unit, size", [("", 1), ("k", 10**3), ("M", 10**6), ("b", 10**9)])
def test_count_is_exact(unit, size):
    tenths = range(0, 2000, 10 if size == 1 else 1)
    assert [saeft.count(f"{i / 10}{unit}") for i in tenths] == [i * size // 10 for i in tenths]
    assert saeft.count(f"25{unit}") == 25 * size and saeft.count("1e6") == 10**6


def test_flags_override_presets_override_defaults():
    assert saeft.parse([]).k == [16] and saeft.parse([]).data == "stdlib"
    given = ["--model", "pythia-160m-deduped", "--k", "20", "40", "--tokens", "1e6", "--overwrite"]
    config = saeft.parse(given)
    assert (config.layer, config.k, config.tokens, config.overwrite) == (8, [20, 40], 10**6, True)
    assert saeft.parse([*given, "--layer", "3"]).layer == 3
    assert saeft.parse(["--model", "google/gemma-2-2b"]).dtype == "bfloat16"
    assert saeft.parse(["--model", "somebody/else"]) == Config(model="somebody/else")


BAD_FLAGS = ["--tokens many", "--tokens 1.5", "--tokens -1", "--tokens inf", "--tokens nan"]
BAD_FLAGS += ["--tokens M", "--k", "--k x", "--sae cubic", "--dtype int8", "--colour red", "--lr x"]


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_line_and_status_2(flags, capsys):
    assert saeft.main(flags.split()) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and all(word in err for word in flags.split())


# ---- A loopback Hub ---------------------------------------------------------------------------

GOOD, OTHER = "hf_good", "hf_other"  # a token that may read gated repos, and one that may not
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """A loopback Hub, enough for the real huggingface_hub client.

        with Hub(models={"o/m": {"config.json": b"{}"}}, datasets={"o/d": {"a.gz": b"..."}}) as hub:
            subprocess.run([...], env={**os.environ, **hub.env(tmp_path)})
            hub.sent["a.gz"], hub.requests  # body bytes by file, [(method, path, status), ...]

    gated: repo ids that want the token GOOD: none -> 401 GatedRepo, OTHER -> 403 GatedRepo, else 401.
    cut {file: (n, k)}: its first k GETs end after n bytes. fail {file: status}: the answer, e.g. 503.
    stall {file: seconds}: every request of the file waits first. All can change while it runs.
    """

    daemon_threads, block_on_close = True, False

    def __init__(self, models=None, datasets=None, gated=(), cut=None, fail=None, stall=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = {"models": models or {}, "datasets": datasets or {}}
        self.gated, self.cut = set(gated), dict(cut or {})
        self.fail, self.stall = dict(fail or {}), dict(stall or {})
        self.requests, self.sent, self.lock = [], Counter(), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def env(self, home, **more):
        """Environment of a client process: this endpoint, an empty HF_HOME below `home`, no proxy."""
        env = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": "", "NO_PROXY": "*"}
        return env | {f"HF_HUB_DISABLE_{x}": "1" for x in ("PROGRESS_BARS", "TELEMETRY")} | more

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, *args):
        pass  # a client that hangs up is part of the tests


# /api/<kind>/<owner/name>[/<what>/<revision>[/<path>]], or without /api and models/ for the files
URL = r"(?:/api)?/(?:(models|datasets)/)?([^/]+/[^/]+)(?:/([^/]+)/[^/]+(?:/(.+))?)?"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.form = parse_qs(self.rfile.read(int(self.headers["Content-Length"] or 0)).decode())
        url = re.fullmatch(URL, unquote(urlsplit(self.path).path))
        kind, repo, what, path = url.groups() if url else ("models", "", "", "")
        files = self.server.repos[kind or "models"].get(repo)
        if what == "resolve":
            self.resolve(files, repo, path)
        elif files is None:
            self.reply(404, {"X-Error-Code": "RepoNotFound"})
        else:
            self.reply(200, {}, json.dumps(self.api(files, repo, what, path or "")).encode())

    do_HEAD = do_POST = do_GET

    def log_message(self, *args):
        pass

    def reply(self, status, headers, body=b"", file=None):
        hub, cut = self.server, None
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, value)
        self.end_headers()
        with hub.lock:  # counted before the last byte leaves: a client that has it all may look
            hub.requests.append((self.command, urlsplit(self.path).path, status))
            if file and self.command == "GET":
                after, times = hub.cut.get(file, (0, 0))
                if times:
                    hub.cut[file], cut = (after, times - 1), after
                hub.sent[file] += len(body[:cut])
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        self.close_connection |= cut is not None

    def api(self, files, repo, what, folder):
        if what in (None, "revision"):
            return dict(id=repo, sha=COMMIT, private=False, downloads=0, likes=0, tags=[])
        listed = self.form.get("paths") if what == "paths-info" else sorted(files)
        found = [file for file in listed if file in files and file.startswith(folder)]
        keys = {"type": "file", "oid": COMMIT}
        return [{"path": file, "size": len(files[file]), **keys} for file in found]

    def resolve(self, files, repo, file):
        hub, asked = self.server, self.headers["Range"]
        time.sleep(hub.stall.get(file, 0))
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        for wrong, status, code in (
            (token not in ("", GOOD, OTHER), 401, "Invalid credentials in Authorization header"),
            (repo in hub.gated and token != GOOD, 403 if token else 401, "GatedRepo"),
            (files is None, 404, "RepoNotFound"),
            (file in hub.fail, hub.fail.get(file), "Failure"),
            (file not in (files or ()), 404, "EntryNotFound"),
        ):
            if wrong:
                return self.reply(status, {"X-Error-Code": code, "X-Error-Message": code})
        body, headers = files[file], {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        start, stop = re.match(r"bytes=(\d+)-(\d*)", asked or "bytes=0-").groups()
        part = body[int(start) : int(stop or len(body)) + 1]
        if asked:
            headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(body)}"
        self.reply((206 if part else 416) if asked else 200, headers, part, file)


# ---- Hub, safetensors, SAE files --------------------------------------------------------------


def child(code, *args, **env):
    """What a fresh Python printed as JSON, and nothing else; the code finds the loaders as L."""
    start = f"import json, os, sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    command = [
        sys.executable,
        "-c",
        f"{start}import model_loaders as L, torch\n{code}",
        *map(str, args),
    ]
    out = subprocess.run(command, env={**os.environ, **env}, capture_output=True, timeout=120)
    assert out.returncode == 0 and not out.stderr, out.stderr
    return json.loads(out.stdout)


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].equal(b[k]) for k in a)


def fails(words, call, *args):
    with pytest.raises(model_loaders.UserError) as error:
        call(*args)
    line = str(error.value)
    assert all(word in line for word in words) and "\n" not in line, line


def test_safetensors_round_trips_with_the_library(tmp_path):
    tensors, path = {"empty": torch.empty(0, 7), "scalar": torch.tensor(3.5)}, tmp_path / "a"
    tensors |= {"bool": torch.arange(5) > 2, "odd": torch.arange(5, dtype=torch.uint8)}
    tensors |= {"t": torch.randn(40, 30).T, "long": torch.randn(2**22 + 9).half()}  # two chunks
    for kind in "float64 bfloat16 int64 int32 int16 int8".split():
        tensors[kind] = (30 * torch.randn(3, 11, 5)).to(getattr(torch, kind))
    model_loaders.write_safetensors(path, tensors, {"k": "ä"})
    assert same(safetensors.load_file(path), tensors)
    assert safetensors.safe_open(path, "pt").metadata() == {"k": "ä"}
    safetensors.save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt"})
    assert same(model_loaders.read_safetensors(path, "cpu"), tensors)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}
    assert same(model_loaders.read_safetensors(path, "cpu", torch.bfloat16), half)


def one(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}, **more}


def raw(header, size=8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(size)


def test_hostile_safetensors_are_refused(tmp_path):
    path, no = tmp_path / "bad", "'a' cannot be"
    sound = raw(one(b=one(offsets=[8, 16])["a"], __metadata__={}), 16)
    assert path.write_bytes(sound) and model_loaders.read_safetensors(path, "cpu").keys() == {
        "a",
        "b",
    }
    cases = [("header of 0 bytes", bytes(size)) for size in (0, 7)]
    sizes = [(2, 3), (100_000_001, 100_000_001), (8, 2**64 - 1)]
    cases += [(f"header of {n:,} bytes", raw(b"", size, n)) for size, n in sizes]
    cases += [("not a mapping", raw([1], 0)), ("Expecting", raw(b"{'a': 1}", 0))]
    cases += [("utf-8", raw(x, 0)) for x in (b'{"\xff": 1}', '{"a": 1}'.encode("utf-16"))]
    cases += [("recursion", raw(b'{"a":' + b"[" * 200_000)), ("1 bytes at its end", raw(one(), 9))]
    cases += [(f"{x}", raw(one(x))) for x in ("F31", None)] + [("unhashable", raw(one(["F32"])))]
    cases += [("subscriptable", raw({"a": 3}, 0)), ("data_offsets", raw({"a": {}}, 0))]
    shapes = [[3], [-2], [-1, -2], [2.0], [True, 2], ["2"], [2**31] * 3, [2**59 + 2, 32], {"2": 1}]
    cases += [(no, raw(one(shape=x))) for x in shapes]
    shapes = [None, 2, "", {}, [0, 2**62, 2**62], [0, 2**70]]
    cases += [("cannot read", raw(one(shape=x, offsets=[0, 0]), 0)) for x in shapes]
    spans = [[False, 8], [0.0, 8.0], [8, 0], [-8, 0], [4, 8], [0, 8, 8]]
    cases += [(no, raw(one(offsets=x))) for x in spans]
    cases += [("cannot read", raw(one(offsets=x))) for x in ([8], [], "08", 8, None)]
    spans = [([4, 12], 12), ([0, 8], 8), ([12, 20], 20)]  # overlaps and a hole
    cases += [("'b' cannot be", raw(one(b=one(offsets=x)["a"]), size)) for x, size in spans]
    cases += [(no, raw(one(shape=[2**50], offsets=[0, 2**52])))]
    cases += [(no, raw(one(offsets=[4, 12]), 12)), (no, raw(one(), 7))]
    cases += [("cannot read", raw(one(__metadata__=x))) for x in ("x", ["x"], {"a": 1}, {"": None})]
    for word, content in cases:
        path.write_bytes(content)
        fails([str(path), word], model_loaders.read_safetensors, path, "cpu")


PEAK = """
def peak(): return [int(l.split()[1]) for l in open("/proc/self/status") if "VmHWM" in l][0] * 1024
torch.ones(1000).bfloat16(); before = peak()
tensors = L.read_safetensors(L.Path(sys.argv[1]), "cpu", torch.bfloat16)
print((peak() - before) / sum(t.nbytes for t in tensors.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_while_loading(tmp_path):
    model_loaders.write_safetensors(tmp_path / "big", {"a": torch.zeros(5 * 10**7)}, {})
    assert 0.9 < child(PEAK, tmp_path / "big") < 1.3  # of the model's size in bfloat16


def test_folders(tmp_path):
    def load(call=model_loaders.load_config, *args):
        return call(str(tmp_path), *args)

    config, index = tmp_path / "config.json", tmp_path / "model.safetensors.index.json"
    weights = (model_loaders.load_weights, "cpu", torch.float32)
    fails(["has no config.json"], load)
    for content, reason in ((b"[]", "'list'"), (b"{", "Expecting"), (b"\xff{}", "utf-8")):
        config.write_bytes(content)
        fails(["config.json", reason], load)
    config.write_bytes(b'{"d": 1}')
    assert load() == {"d": 1}
    fails(["has no model.safetensors", "safetensors files only"], load, *weights)
    x, y = {"a": torch.ones(2, 3), "b": torch.zeros(1)}, {"c": torch.ones(4)}
    model_loaders.write_safetensors(tmp_path / "x.safetensors", x, {})
    model_loaders.write_safetensors(tmp_path / "y.safetensors", y, {})
    where = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}
    bad = ["../x.safetensors", "/x.safetensors", "z/x.safetensors", "a.bin", "..", ["x"], 3, None]
    bad = [{**where, "a": file} for file in bad] + [["x.safetensors"], None]
    cases = [({"weight_map": value}, "must name plain") for value in bad] + [(3, "'int'")]
    for content, reason in [*cases, ({"weight_map": {**where, "e": "y.safetensors"}}, "lists 'e'")]:
        index.write_text(json.dumps(content))
        fails([index.name, reason], load, *weights)
    index.write_text(json.dumps({"weight_map": where}))
    assert same(load(*weights), x | y)
    for name in ("", "pythia-161m", "./no", "/no/folder", "~/no one", "a/b/c", "x\ny", "\0"):
        fails(["no folder and no Hub", "pythia-160m or tiny"], model_loaders.load_config, name)
    models = model_loaders.MODELS
    assert len(models) == 23 and models["pythia-1b-deduped"] == "EleutherAI/pythia-1b-deduped"


def test_sae_files(tmp_path, monkeypatch):
    shapes = {"W_enc": (6, 20), "b_enc": (20,), "W_dec": (20, 6), "b_dec": (6,)}
    tensors, sae = {k: torch.randn(shape) for k, shape in shapes.items()}, tmp_path / "deep" / "sae"
    cfg = {"d_in": 6, "d_sae": 20, "k": 3, "metadata": {"model_name": "ü"}}
    write, path = model_loaders.write_safetensors, sae / "sae_weights.safetensors"
    write(path, tensors, {}, cfg)
    assert same(safetensors.load_file(sae / "sae_weights.safetensors"), tensors)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="ZeroDivision"):
        patch.setattr(Path, "write_text", lambda *args: 1 / 0)  # interrupted, the weights written
        write(path, {k: t + 1 for k, t in tensors.items()}, {}, {**cfg, "k": 4})
    assert sorted(os.listdir(sae)) == ["cfg.json", "sae_weights.safetensors"]
    assert same(safetensors.load_file(sae / "sae_weights.safetensors"), tensors)
    assert json.loads((sae / "cfg.json").read_text("utf-8")) == cfg
    fails(["cannot write", "cfg.json"], write, sae / "cfg.json" / "x", tensors, {}, cfg)


ASK = """
if sys.argv[2] == "False": time.sleep = lambda seconds: None
def ask(call, name, what, token):
    os.environ["HF_TOKEN"] = token
    if call == "fetch": return [L.fetch(name, what).read_text()]
    if call == "weights": return sorted(L.load_weights(name, "cpu", torch.float32))
    with L.hub_errors(name := f"datasets/{name}", what):
        with L.hf.HfFileSystem().open(f"{name}/{what}", block_size=1000) as file:
            return [file.seek(50_000), len(file.read(1000))]
answers = []
for case in json.load(open(sys.argv[1])):
    try: answers.append(ask(*case))
    except L.UserError as error: answers.append(str(error))
print(json.dumps(answers))
"""


def test_hub_through_the_real_client(tmp_path):
    x, y = safetensors.save({"a": torch.ones(2)}), safetensors.save({"b": torch.zeros(3)})
    index = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}).encode()
    models = {"o/two": {"1.safetensors": x, "2.safetensors": y}, "o/old": {"weights.bin": b"x"}}
    models["o/two"]["model.safetensors.index.json"] = index
    models |= {"o/one": {"model.safetensors": x}, "google/gemma-2-2b": {"config.json": b"{}"}}
    models["o/sick"] = {f"{fault}.json": b"m" * 999 for fault in ("fail", "slow", "cut", "mend")}
    data = {"o/data": {"d/x.bin": bytes(100_000)}, "o/gated": {"x.bin": bytes(60_000)}}

    def check(cases, nap, **env):
        """An expected str: words of the error, split at |. No `nap`: no pauses before retries."""
        (tmp_path / "ask").write_text(json.dumps([case[:-1] for case in cases]))
        for case, answer in zip(cases, child(ASK, tmp_path / "ask", nap, **env), strict=True):
            words = case[-1].split("|") if isinstance(case[-1], str) else []
            assert all(word in answer for word in words) and "\n" not in answer, (case, answer)
            assert words or answer == case[-1], (case, answer)

    loads = [("weights", "o/one", "", "", ["a"]), ("weights", "o/two", "", "", ["a", "b"])]
    gemma, terms = ("fetch", "gemma-2-2b", "config.json"), "its licence at https://huggingface.co/"
    refused = f"{terms}google/gemma-2-2b|set HF_TOKEN|"
    cases = [
        ("weights", "o/old", "", "", "o/old has no model.safetensors"),
        ("fetch", "o/none", "config.json", "", "no Hub repository 'o/none'"),
        ("fetch", "o--o/x", "config.json", "", "no Hub repository 'o--o/x'"),
        ("fetch", "o/old", "none.json", "", "o/old has no none.json"),
        *[(*gemma, token, f"{refused}{n}") for token, n in (("", 401), (OTHER, 403), ("hf_", 401))],
        (*gemma, GOOD, ["{}"]),
        ("fetch", "o/sick", "fail.json", "", "cannot fetch o/sick|503|--model tiny"),
        ("fetch", "o/sick", "slow.json", "", "cannot fetch o/sick|imed out|--model tiny"),
        ("fetch", "o/sick", "cut.json", "", "cannot fetch o/sick|100 |--model tiny"),
        ("dataset", "o/data", "d/x.bin", "", [50_000, 1000]),
        ("dataset", "o/data", "d/y.bin", "", "datasets/o/data has no d/y.bin"),
        ("dataset", "o/none", "x.bin", "", "no Hub repository 'datasets/o/none'"),
        ("dataset", "o/gated", "x.bin", "", f"{terms}datasets/o/gated|401"),
    ]
    if int(huggingface_hub.__version__[0]) >= 2:  # which tries a cut download again
        cases.append(("fetch", "o/sick", "mend.json", "", ["m" * 999]))
    with Hub(models, data, {"google/gemma-2-2b", "o/gated"}, fail={"fail.json": 503}) as hub:
        hub.cut, hub.stall = {"cut.json": (100, 99), "mend.json": (100, 1)}, {"slow.json": 12}
        env = hub.env(tmp_path / "home", HF_HUB_ETAG_TIMEOUT="1")
        check(loads + cases, nap=False, **env)
        assert 1000 <= hub.sent["d/x.bin"] <= 4000  # of 100,000: a byte range
    for word, more in (("refused", {}), ("HF_HUB_OFFLINE", {"HF_HUB_OFFLINE": "1"})):
        gone = [("fetch", "pythia-70m", "config.json", "", f"cannot fetch EleutherAI/|{word}")]
        words = f"cannot fetch datasets/o/data|{word}|--data stdlib"
        gone += [("dataset", "o/data", "d/x.bin", "", words)]
        start = time.monotonic()
        check(loads + gone, nap=True, **env, **more)
        assert time.monotonic() - start < 20  # the client alone would try for half a minute


# ---- Tokenizers -------------------------------------------------------------------------------

NEOX_FILE = Path(__file__).parent.parent / "shared/tokenizers/neox.json"
WORLD = "été naïve Straße 日本語 пример 한국어 👩‍👩‍👧 e\u0301 ἀρχή שלום नमस्ते ทดสอบ "
WORDS = WORLD.split() + "the self def return x 's 'll 'LL it's 12345 007 <0x0A>".split()
CONTROL = "<|endoftext|> <|padding|> <pad> <eos> <bos> <unk>".split()
SYMBOLS = "<mask> [@BOS@] <unused0> <unused01> <start_of_turn> <table> <td> </td>".split()
RUNS = [c * n for c, first in (("\n", 1), ("▁", 2), ("\t", 2)) for n in range(first, 32)]
SPACES = [" ", "\n", "\t", "\r\n", "\r", "▁", "  ", "\n\n", "\u3000", "\xa0", "\u2028", "\x1f"]
MARKS = [chr(c) for c in range(0x110000) if unicodedata.combining(chr(c))]
BLOCKS = "0-7f 20-7f a0-600 900-e00 1100-1200 1e00-2100 2000-2070 4e00-a000 ac00-d7a4 f900-10000"
BLOCKS += " 11000-12000 1d100-1d200 1f300-1fa00 0-d800 e000-110000"
BLOCKS = [[int(end, 16) for end in block.split("-")] for block in BLOCKS.split()]
LONG = [char * 1_000_000 for char in ("a", " ", "\n", "▁")]
LIBRARY = sorted(Path(random.__file__).parent.glob("*.py"))
LIBRARY = "".join(path.read_text("utf-8", errors="replace") for path in LIBRARY)


def library(start: int, n_chars: int) -> list[str]:
    return [LIBRARY[i : i + 20_000] for i in range(start, start + n_chars, 20_000)]


def random_texts(n_chars: int, seed: int) -> list[str]:
    rng, pieces, some = random.Random(seed), [], lambda get, n: "".join(get() for _ in range(n))
    char = lambda: chr(rng.randrange(*rng.choice(BLOCKS)))  # noqa: E731
    while n_chars > 0:
        n = rng.randint(1, 70)
        pieces.append(rng.choice([
            lambda: some(char, n // 4),
            lambda: char() + some(lambda: rng.choice(MARKS), n // 16),  # NFC: marks in any order
            lambda: rng.choice(" \n\t▁ab-=*#.é") * n,
            lambda: some(lambda: rng.choice(SPACES), n // 5),
            lambda: rng.choice(CONTROL + SYMBOLS)[: rng.choice([2, 99, 99])],
            lambda: rng.choice(["", " ", "  ", "▁"]) + rng.choice(WORDS),
        ])())  # fmt: skip
        n_chars -= len(pieces[-1])
    return ["", *CONTROL, *("".join(pieces[i : i + 30]) for i in range(0, len(pieces), 30))]


def assert_same(spec: dict, texts: list[str]) -> model_loaders.Tokenizer:
    """Every id of every text equal, and the text of those; byte-level, of random ids too."""
    ours, reference = model_loaders.Tokenizer(spec), tokenizers.Tokenizer.from_str(json.dumps(spec))
    expected = [e.ids for e in reference.encode_batch_fast(texts, add_special_tokens=False)]
    for got, ids in zip(ours.encode_batch(texts, 2), expected, strict=True):
        if (got := got.tolist()) != ids:
            i = len(os.path.commonprefix([got, ids]))
            pytest.fail(
                f"{got[i:][:5]}, not {ids[i:][:5]}, after {reference.decode(ids[:i])[-40:]!r}"
            )
    rng = random.Random(0)
    samples = [ids for ids in expected[-20:] if len(ids) < 10_000]
    if not spec["model"].get("byte_fallback"):  # the last 5 are no token's
        samples += [rng.choices(range(ours.n_vocab + 5), k=rng.randint(0, 9)) for _ in range(300)]
    for ids in samples:
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=False), ids
    return ours


def train_byte_level(vocab_size: int, texts: list[str], normalizer=None, added=()) -> dict:
    tokenizer = ByteLevelBPETokenizer(unicode_normalizer=normalizer)
    tokenizer.train_from_iterator(texts, vocab_size, 2, False, ["<|endoftext|>"])
    tokenizer.add_tokens([AddedToken(text, normalized=normalized) for text, normalized in added])
    return json.loads(tokenizer.to_str())


def train_sentencepiece(vocab_size: int, texts: list[str], symbols: list[str]):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines()),
        model_writer=model, model_type="bpe", vocab_size=vocab_size, user_defined_symbols=symbols,
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", unk_piece="<unk>", minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def gemma_spec(sp, symbols: list[str], by_score: bool) -> dict:
    """`tokenizer.json` as transformers' GemmaConverter makes it: each split of a piece into two
    pieces is a merge, in the order of scores (user-defined symbols first) or of ids."""
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    pieces = ["\t" if p == "<0x09>" and "\t" not in pieces else p for p in pieces]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    pairs = [(p[:k], p[k:]) for p in vocab for k in range(1, len(p))]
    merges = [pair for pair in pairs if vocab.keys() >= {*pair}]
    sign, rank = (-1, lambda i: -sp.get_score(i)) if by_score else (1, lambda i: i)
    merges.sort(key=lambda lr: (rank(vocab[lr[0] + lr[1]]), sign * len(lr[0]), sign * len(lr[1])))
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized", "special"], False)
    added = pieces[:4] + [piece for piece in pieces[4:] if piece in symbols]
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    steps = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]
    bpe = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    merges = merges if by_score else [" ".join(pair) for pair in merges]
    return {
        "added_tokens": [{"id": vocab[p], "content": p} | flags for p in added],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": split | {"invert": False} if by_score else None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": bpe | {"vocab": vocab, "merges": merges},
    }


BYTE = train_byte_level(300, ["some words"])
SMALL_SPM = train_sentencepiece(800, [WORLD * 3, *library(0, 20_000)], SYMBOLS)
GEMMA_LIKE = gemma_spec(SMALL_SPM, SYMBOLS, by_score=True)


def test_neox_ids():
    if not NEOX_FILE.exists():
        pytest.skip(f"{NEOX_FILE} is not here")
    texts = library(0, 800_000) + random_texts(800_000, 1)
    texts += LONG + ["\n \r" * 300_000 + "x", "é" * 1_000_000 + " "]
    ours = assert_same(json.loads(NEOX_FILE.read_text("utf-8")), texts)
    assert (ours.n_vocab, ours.eos_id, ours.bos_id) == (50277, 0, None)


# With test_byte_level_ids, 5.2 million characters are compared, not counting the long runs.
@pytest.mark.parametrize("symbols", [SYMBOLS + RUNS, SYMBOLS + RUNS[1:40:2]])
def test_gemma_ids(symbols):
    all_runs = len(symbols) > 60
    sp = train_sentencepiece(3000, library(0, 300_000) + [WORLD] * 200, symbols)
    texts = library(1_000_000, 850_000) + random_texts(850_000, 2)
    ours = assert_same(gemma_spec(sp, symbols, by_score=all_runs), texts + LONG * all_runs)
    assert (ours.n_vocab, ours.eos_id, ours.bos_id) == (3000, 1, 2)
    # SentencePiece itself finds no control tokens in a text, and takes a written ▁ for a space.
    plain = [text for text in texts if not any(word in text for word in ["▁", *CONTROL])]
    if all_runs:
        assert sum(map(len, plain)) > 700_000
        assert all(ours.encode(text) == sp.encode(text) for text in plain)


NEOX_ADDED = [*((" " * n, True) for n in range(2, 25)), ("<td>", True), ("<é>", True)]
OVERLAPPING = [("    ", False), ("<|padding|>", False), ("<|pad", True), ("\n", True)]


@pytest.mark.parametrize(
    "normalizer, added", [(None, []), ("nfc", NEOX_ADDED), (None, OVERLAPPING)]
)
def test_byte_level_ids(normalizer, added):
    spec = train_byte_level(2000, library(0, 200_000), normalizer, added)
    long = [] if added is OVERLAPPING else [run + end for run in LONG[:3] for end in ("", "x")]
    assert_same(spec, library(2_000_000, 300_000) + random_texts(300_000, 3) + long)


def test_lone_surrogates_and_fingerprint():
    ours, other = (
        model_loaders.Tokenizer(BYTE),
        model_loaders.Tokenizer(BYTE | {"normalizer": {"type": "NFC"}}),
    )
    assert ours.encode("a\ud800b\udc00\ud83d\ude00") == ours.encode("a\ufffdb\ufffd\U0001f600")
    assert ours.fingerprint == model_loaders.Tokenizer(json.loads(json.dumps(BYTE))).fingerprint
    assert ours.fingerprint != other.fingerprint


@pytest.mark.parametrize("base, path, value, says", [
    (BYTE, "model type", "WordPiece", '"WordPiece"'),
    (BYTE, "model dropout", 0.1, "dropout 0.1"),
    (BYTE, "normalizer", {"type": "Lowercase"}, "Lowercase"),
    (BYTE, "pre_tokenizer", {"type": "Split", "pattern": {"Regex": "\\d"}}, '"Split" Regex "'),
    (BYTE, "pre_tokenizer add_prefix_space", True, "add_prefix_space"),
    (BYTE, "pre_tokenizer use_regex", False, "use_regex false"),
    (BYTE, "decoder", None, 'is "BPE" "ByteLevel":'),
    (BYTE, "added_tokens", [BYTE["added_tokens"][0] | {"lstrip": True}], "lstrip"),
    (BYTE, "model vocab", {"<|endoftext|>": 0, "a": 1}, r"lacks a byte: b'\x00'"),
    (BYTE, "model merges", ["a b c"], "cannot be read"),
    (GEMMA_LIKE, "normalizer content", "_", '"_"'),
    (GEMMA_LIKE, "model byte_fallback", False, 'is "BPE" "Replace"'),
    (GEMMA_LIKE, "model vocab", {"<eos>": 0, "日": 1}, "<0xE6>"),
    (BYTE | {"added_tokens": []}, "model vocab", {"a": 1}, "<eos>"),
    (GEMMA_LIKE, "model merges", [["e", "▁"]], "'e▁'"),
])  # fmt: skip
def test_unreadable(tmp_path, base, path, value, says):
    spec = part = json.loads(json.dumps(base))
    *parents, key = path.split()
    for parent in parents:
        part = part[parent]
    part[key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(model_loaders.UserError) as error:
        model_loaders.load_tokenizer(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", json.dumps(BYTE)[:-5]])
def test_damaged_file(tmp_path, text):
    if text:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(model_loaders.UserError, match="cannot read|has no tokenizer.json"):
        model_loaders.load_tokenizer(tmp_path)


# ---- Token streams ----------------------------------------------------------------------------


class Bytes:
    """A tokenizer: one id for each byte, 0 ends a document."""

    eos_id, bos_id, n_vocab, fingerprint, calls, fail = 0, None, 256, "bytes", 0, None

    def __init__(self, **changes):
        vars(self).update(changes)

    def encode_batch(self, texts, threads):
        self.calls += 1
        if self.fail:
            raise self.fail
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]


def texts(count=400, size=40, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh \n", k=size)).strip() + "x" for _ in range(count)]


def jsonl(lines):
    return "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()


def joined(lines, held):
    return b"".join(line.encode() + b"\0" for line in lines if held_out(line) == held)


def ids(sequences):
    return bytes(sequences.flatten().tolist())


@pytest.fixture
def stream(tmp_path):
    """Make token streams with a cache of this test's own, and close them after it."""
    made = []

    def make(data, tokenizer=None, context=16, train=1600, val=160, cache=tmp_path, **options):
        tokenizer = tokenizer or Bytes()
        made.append(TokenStream(str(data), tokenizer, context, train, val, cache, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def lines_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts()))
    return tmp_path / "a.jsonl"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.gz"])
def test_streams_are_the_documents_end_to_end(tmp_path, stream, name):
    data = jsonl(texts())
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    s = stream(tmp_path / name)
    rows = s.train(0, 100)
    assert rows.dtype == torch.int64 and rows.shape == (100, 16) and s.n_train == 100
    assert ids(rows) == joined(texts(), False)[:1600] and torch.equal(s.train(7, 3), rows[7:10])
    assert ids(s.validation()) == joined(texts(), True)[:160]


def test_bos_opens_each_sequence_and_is_not_stored(lines_file, stream):
    s, wide = stream(lines_file, Bytes(bos_id=7)), stream(lines_file, Bytes(n_vocab=70_000))
    rows = s.train(0, 100)
    assert (rows[:, 0] == 7).all() and ids(rows[:, 1:]) == joined(texts(), False)[:1500]
    assert ids(wide.train(0, 100)) == joined(texts(), False)[:1600] and wide.folder != s.folder
    with pytest.raises(UserError, match="holds id 120, the model's tokenizer has 100 ids"):
        stream(lines_file, Bytes(n_vocab=100)).train(0, 9)


def test_forms_of_text(tmp_path):
    paragraph = "word " * 400 + "\n\n"
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n" + paragraph * 9)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress((paragraph * 12).encode()))
    (tmp_path / "c.py").write_bytes(b"\xef\xbb\xbfx = '\xff'\r\n\n\n")
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    assert list(documents(str(tmp_path / "a.txt"))) == ["one\n", "two\n" + paragraph * 9]
    cut = list(documents(str(tmp_path / "b.txt.gz")))
    assert "".join(cut) == paragraph * 12 and [len(c) // len(paragraph) for c in cut] == [5, 5, 2]
    assert list(documents(str(tmp_path / "c.py"))) == ["x = '\ufffd'\r\n\n\n"]
    assert len(list(documents(str(tmp_path)))) == 6
    (tmp_path / "long.txt").write_text("no blank line\n" * 10_000)
    assert max(map(len, documents(str(tmp_path / "long.txt")))) < 66_000


def test_zstd_of_several_frames(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(jsonl([text])) for text in ("one", "two")))
    assert list(documents(str(path))) == ["one", "two"]
    if sys.version_info < (3, 14):
        monkeypatch.setitem(sys.modules, "zstandard", None)
        with pytest.raises(UserError, match="pip install zstandard"):
            list(documents(str(path)))


def test_standard_library_without_tests_or_packages_and_the_split():
    files = [path for path, _ in model_loaders.source_files("stdlib")]
    assert len(files) > 200 and files != sorted(files) and any("argparse" in f for f in files)
    assert not any({"test", "tests", "site-packages"} & set(Path(f).parts[4:]) for f in files)
    assert 0.03 < np.mean([held_out(line) for line in [*texts(4000), "\ud800 alone"]]) < 0.07


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 3}\n', "line 3: no JSON object"),
        ("a.jsonl", b'["text"]\n', "line 1"),
        ("a.jsonl.gz", gzip.compress(jsonl([os.urandom(999).hex()]))[:-20], "cannot read"),
        ("a.jsonl.gz", b"not gzip", "Not a gzipped file"),
        ("a.parquet", b"PAR1", "no text in"),
        ("a.bin", b"123" * 9, "must be a multiple of element size"),
        ("none.txt", None, "no text in"),
        ("c5", None, "owner/name on the Hub, stdlib, c4, pile"),
    ],
)
def test_bad_sources_are_user_errors(tmp_path, stream, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    data = name if name == "c5" else str(tmp_path / name)
    with pytest.raises(UserError, match=message) as error:
        stream(data).train(0, 1)
    assert "\n" not in str(error.value) and data in str(error.value)


def test_cache_is_used_again_and_grows_without_regard_to_budgets(lines_file, stream, monkeypatch):
    lines = texts(3000, 500)
    lines_file.write_bytes(jsonl(lines))
    small = stream(lines_file, train=16_000, val=40_000)  # val needs more documents than train
    small.train(0, 1000), small.validation()
    same = stream(lines_file, again := Bytes(), train=16_000, val=40_000)
    assert torch.equal(same.train(0, 9), small.train(0, 9)) and again.calls == 0
    big = stream(lines_file, train=1_200_000, val=56_000)
    assert ids(big.train(0, big.n_train)) == joined(lines, False)[:1_200_000]
    assert ids(big.validation()) == joined(lines, True)[:56_000]
    assert stream(lines_file, Bytes(fingerprint="other")).folder != big.folder
    os.utime(lines_file, (1, 1))
    assert stream(lines_file).folder != big.folder


@pytest.mark.parametrize("meta", [None, b"[[1, 2], [3", b"[]", b"[[9e9, 0], [0, 0]]"])
def test_interrupted_or_damaged_cache(lines_file, stream, monkeypatch, tmp_path, meta):
    monkeypatch.setattr(model_loaders, "BATCH", 20)
    s = stream(lines_file, train=4000)
    s.train(0, 250), s.close()
    for path in s.files:  # written, but not yet in meta.json
        path.write_bytes(path.read_bytes() + b"half a block")
    if meta is not None:
        (s.folder / "meta.json").write_bytes(meta)
    resumed = stream(lines_file, whole := Bytes(), train=12_800)
    assert ids(resumed.train(0, 800)) == joined(texts(), False)[:12_800]
    assert ids(resumed.validation()) == joined(texts(), True)[:160]
    stream(lines_file, fresh := Bytes(), train=12_800, cache=tmp_path / "other").train(0, 800)
    resumed.close()
    assert (whole.calls < fresh.calls) == (meta is None)  # what was done is not done again


def test_several_streams_on_one_cache(lines_file, stream):
    lines_file.write_bytes(jsonl(texts(2000, 300)))
    tokenizers = [Bytes() for _ in range(4)]
    streams = [stream(lines_file, t, train=320_000) for t in tokenizers]
    for s in streams:
        assert ids(s.train(0, 20_000)) == joined(texts(2000, 300), False)[:320_000]
        s.validation(), s.close()
    assert sum(t.calls > 0 for t in tokenizers) == 1


def test_short_data(tmp_path, lines_file, stream):
    have = len(joined(texts(), False))
    s = stream(lines_file, train=2_000_000)
    with pytest.raises(UserError) as error:
        s.train(s.n_train - 1, 1)
    advice = "lower --tokens, or pass --allow-short to train on what there is"
    counts = f"{have:,} training tokens, 2,000,000 were asked for"
    assert str(error.value) == f"{lines_file} has {counts}: {advice}"
    with pytest.raises(UserError, match="validation tokens, 9,000,000 .*--eval-tokens"):
        stream(lines_file, val=9_000_000).validation()
    short = stream(lines_file, train=2_000_000, allow_short=True)
    assert short.n_train == have // 16 and len(short.train(0, short.n_train)) == have // 16
    (tmp_path / "one.py").write_text("x = 1")
    with pytest.raises(UserError, match="were asked for: give more text"):
        stream(tmp_path / "one.py", allow_short=True)


def test_ids_in_a_bin(tmp_path, stream):
    stored = np.random.default_rng(0).integers(1, 256, 10_000, np.uint16)
    stored[[5000, 9400, 9700, 9900]] = 0  # validation starts after the last before 9,500
    stored.tofile(path := tmp_path / "ids.bin")
    s = stream(path, train=8000)
    assert s.train(0, 500).flatten().tolist() == stored[:8000].tolist()
    assert s.validation().flatten().tolist() == stored[9401:9561].tolist()
    with pytest.raises(UserError, match="has 9,401 training tokens, 10,000 were"):
        (long := stream(path, train=10_000)).train(long.n_train - 1, 1)
    short = stream(path, train=10_000, allow_short=True)
    assert ids(short.train(0, short.n_train)) == bytes(stored[: 9401 // 16 * 16].tolist())
    with pytest.raises(UserError, match="holds id 255, the model's tokenizer has 100 ids"):
        stream(path, Bytes(n_vocab=100)).train(0, 9)
    stored.astype(np.uint32).tofile(tmp_path / "wide.bin")
    wide = stream(tmp_path / "wide.bin", Bytes(n_vocab=70_000))
    assert torch.equal(wide.train(0, 9), s.train(0, 9))


def test_a_failure_in_the_thread_reaches_the_caller(tmp_path, lines_file, stream):
    with pytest.raises(ZeroDivisionError):
        stream(lines_file, Bytes(fail=ZeroDivisionError())).train(0, 1)
    with pytest.raises(ZeroDivisionError):
        stream(lines_file, Bytes(fail=ZeroDivisionError()), allow_short=True)
    with pytest.raises(UserError, match="cannot write .*XDG_CACHE_HOME"):
        stream(lines_file, cache=lines_file).train(0, 1)


def test_close_stops_an_endless_source(lines_file, stream, monkeypatch):
    monkeypatch.setattr(model_loaders, "documents", lambda data: iter(lambda: texts(1)[0], None))
    s = stream(lines_file, train=10**12)
    s.train(0, 10)
    start = time.monotonic()
    s.close()
    assert time.monotonic() - start < 2 and not s.thread.is_alive() and s.thread.daemon


# --- Against a loopback Hub, with the real client ------------------------------------------------

CLIENT = """
import json, sys, time
time.sleep = lambda seconds: None  # the client's waits between its tries
from test_saeft import Bytes
from model_loaders import TokenStream, UserError
for data, train, val, vocab in json.loads(sys.argv[1]):
    try:
        s = TokenStream(data, Bytes(n_vocab=vocab), 64, train, val, sys.argv[2])
        both = s.train(0, s.n_train), s.validation()
        print(json.dumps([rows.flatten().tolist() for rows in both]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def client(hub, tmp_path, *cases, **env):
    """For each (data, train, val, vocab): [train ids, val ids] or the error, from one process."""
    paths = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent)]
    env = {**os.environ, **hub.env(tmp_path / "hf", **env), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", CLIENT, json.dumps(cases), str(tmp_path / "cache")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_text_from_the_hub(tmp_path):
    shards = [texts(700, 500, seed) for seed in range(3)]
    names = [f"en/c4-train.{i:05d}-of-00003.json.gz" for i in range(3)]
    c4 = {n: gzip.compress(jsonl(s)) for n, s in zip(names, shards, strict=True)}
    c4 |= {
        "en/c4-validation.00000-of-00001.json.gz": gzip.compress(jsonl(["no"])),
        "README.md": b"#",
    }
    data = gzip.compress(jsonl(texts()))
    sets = {"allenai/c4": c4, "o/cut": {"train.jsonl.gz": data}, "o/other": {"a.parquet": b"PAR1"}}
    sets["o/gated"] = {"a.jsonl.gz": data, "_gated.py": b"x", "README.md": b"# x"}
    cases = [(name, 6400, 640, 256) for name in ("o/gated", "o/other", "o/none", "o/cut")]
    big = ("c4", 384_000, 640, 256)
    cut = {names[0]: (50_000, 1), "train.jsonl.gz": (300, 99)}
    with Hub(datasets=sets, gated={"o/gated"}, cut=cut) as hub:
        *errors, rows = client(hub, tmp_path, *cases, big)
        for error, (name, *_), said in zip(
            errors, cases, ["HF_TOKEN", "no text", "", ""], strict=True
        ):
            assert name in error and said in error and "\n" not in error
        if isinstance(
            rows, str
        ):  # older clients do not ask again after a cut: the next run goes on
            assert "allenai/c4" in rows
            rows = client(hub, tmp_path, big)[0]
        for side in (False, True):
            assert bytes(rows[side]) == joined(sum(shards, []), side)[: big[1 + side]]
        assert hub.sent[names[2]] == 0  # shard after shard, as needed
        asked = len(hub.requests)
        assert client(hub, tmp_path, big) == [rows] and len(hub.requests) == asked
        open_to_it = client(hub, tmp_path, cases[0], HF_TOKEN="hf_good")[0]
        assert bytes(open_to_it[0]) == joined(texts(), False)[:6400]


def test_pythia_ids_by_byte_range(tmp_path):
    stored = np.random.default_rng(0).integers(1, 50_000, (3, 100_000)).astype("<u2")
    names = [f"document-{i:05d}-of-00002.bin" for i in range(3)]
    files = {name: part.tobytes() for name, part in zip(names, stored, strict=True)}
    cases = [("pythia", tokens, 640, 50_277) for tokens in (6400, 32_000, 640_000)]
    with Hub(datasets={"EleutherAI/pile-standard-pythia-preshuffled": files}) as hub:
        small = client(hub, tmp_path, cases[0])[0]
        assert [hub.sent[name] for name in names] == [12_800, 0, 1280]  # not a byte more
        more, short, other = client(hub, tmp_path, *cases[1:], ("pythia", 6400, 640, 256))
        assert small == [stored[0, :6400].tolist(), stored[2, :640].tolist()]
        assert more == [stored[0, :32_000].tolist(), small[1]]
        assert "has 100,000 training tokens, 640,000 were asked for" in short
        assert "the model's tokenizer has 256 ids" in other


# ---- Whole runs, from the command line -------------------------------------------------------

SMALL = "--tokens 40k --kl-tokens 16k --eval-tokens 4k --d-sae 64 --k 4 --batch 512 --log-every 5"


def command(line, out, extra=SMALL):
    """saeft.py's exit status for a command line, with runs in `out`."""
    return saeft.main(f"--data stdlib {extra} {line} --out {out}".split())


def read_report(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_run_leaves_settings_metrics_report_and_sae(tmp_path, capsys):
    assert command("--name a --method kl mse", tmp_path) == 0
    table = capsys.readouterr().out.splitlines()[-6:]
    folder = tmp_path / "a"
    report, settings = read_report(folder), json.loads((folder / "config.json").read_text())
    assert settings["k"] == 4 and settings["seed"] == 0 and settings["kl_tokens"] == 16_000
    assert report["gap_mse"] == pytest.approx(report["ce_mse"] - report["ce_original"])
    assert report["gap_closed"] == pytest.approx(1 - report["gap_final"] / report["gap_mse"])
    assert f"{report['ce_final']:.4f}" in table[-2] and report["l0"] <= 4
    for name in "model layer k d_sae seed tokens kl_tokens ce_zero fvu_mse fvu_final dead".split():
        assert name in report
    assert set(report["seconds"]) == {"MSE", "kl", "mse"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["phase"] for line in lines} == {"MSE", "kl", "mse"}
    kl = [line for line in lines if line["phase"] == "kl"]
    assert all(m["beta"] * m["kl"] == pytest.approx(m["mse"], rel=1e-3) for m in kl)
    for saved in (folder, folder / "before", folder / "mse"):
        tensors = safetensors.load_file(saved / "sae_weights.safetensors")
        cfg = json.loads((saved / "cfg.json").read_text())
        assert tensors["W_enc"].shape == (128, 64) and cfg["architecture"] == "topk"
    assert command("--name b --method kl mse", tmp_path) == 0  # the same seed, the same figures
    assert read_report(tmp_path / "b")["ce_final"] == report["ce_final"]
    assert command("--name c --method mse kl --seed 1", tmp_path) == 0
    assert read_report(tmp_path / "c")["ce_final"] != report["ce_final"]


def test_several_k_share_a_run_and_each_gets_its_own_folder(tmp_path):
    assert command("--name alone", tmp_path) == 0
    assert command("--k 4 8 --name both", tmp_path) == 0
    assert read_report(tmp_path / "both-k8")["l0"] > 4 >= read_report(tmp_path / "both-k4")["l0"]


@pytest.mark.parametrize("kind", ["relu", "batchtopk"])
def test_other_saes_and_end_to_end(tmp_path, kind):
    assert command(f"--sae {kind} --name mixed", tmp_path) == 0
    assert command(f"--sae {kind} --kl-tokens 40k --name end", tmp_path) == 0
    end = read_report(tmp_path / "end")
    assert end["ce_mse"] is None and end["gap_closed"] is None and end["fvu_final"] < 1


@pytest.mark.parametrize(
    "line, words",
    [
        ("--k 0", "--k 0 is not between 1 and"),
        ("--k 65", "--k 65 is not between 1 and d_sae = 64"),
        ("--layer 6", "--layer 6: tiny has layers 0 to 5"),
        ("--layer -1", "--layer: invalid count value: '-1'"),
        ("--kl-tokens 50k", "--kl-tokens 50000 is above --tokens 40000"),
        ("--tokens 5x", "5x"),
        ("--sae nonsense", "nonsense"),
        ("--method kl+nonsense", "nonsense"),
        ("--device cuda:99", "--device cuda:99"),
        ("--device nonsense", "--device nonsense"),
        ("--model pythia-161m", "pythia-161m"),
        ("--tokens 90M", "training tokens, 90,000,000 were asked for"),
        ("--data /nowhere/at/all", "/nowhere/at/all"),
        ("--lr nan", "the loss of phase MSE is nan at step 1"),
        ("--batch 0", "--batch 0"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(tmp_path, capsys, line, words):
    assert command(line, tmp_path, f"{SMALL} --name x") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and error.startswith("saeft: ")
    left = [path.name for path in (tmp_path / "x").glob("*")]
    assert left == [] or "nan" in line and "sae_weights.safetensors" in left


def test_a_loss_that_is_not_finite_keeps_the_last_good_sae(tmp_path, capsys):
    assert command("--kl-lr nan --name x", tmp_path) == 2
    assert "phase kl is nan at step 1" in capsys.readouterr().err
    before, kept = [
        safetensors.load_file(folder / "sae_weights.safetensors")
        for folder in (tmp_path / "x" / "before", tmp_path / "x")
    ]
    assert all(kept[name].isfinite().all() for name in kept) and kept.keys() == before.keys()


def test_a_folder_with_another_run_is_left_alone(tmp_path, capsys):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.txt").write_text("mine")
    for flags in ("", "--overwrite"):  # not a run of ours: not even then
        assert command(f"--name x {flags}", tmp_path) == 2
        assert "holds another run" in capsys.readouterr().err
    assert command("--name y", tmp_path) == 0 and command("--name y", tmp_path) == 2
    assert command("--name y --overwrite", tmp_path) == 0
    assert (tmp_path / "x" / "thesis.txt").read_text() == "mine"


def test_allow_short_trains_on_what_there_is(tmp_path):
    text = "".join(f"def f{i}(x):\n    return x * {i * i} + {i}\n\n" for i in range(6_000))
    (tmp_path / "data.txt").write_text(text)
    line = f"--data {tmp_path / 'data.txt'} --tokens 90M --kl-tokens 30M --eval-tokens 1k"
    assert command(f"{line} --name x", tmp_path, SMALL) == 2
    assert command(f"{line} --allow-short --name x", tmp_path, SMALL) == 0
    report = read_report(tmp_path / "x")
    assert 30_000 < report["tokens"] < 1_000_000
    assert report["kl_tokens"] == pytest.approx(report["tokens"] / 3, rel=0.05)


def test_no_network_and_nothing_cached_ends_in_one_helpful_line(tmp_path):
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    here = Path(saeft.__file__).parent
    line = [sys.executable, "saeft.py", "--model", "pythia-160m", "--k", "80"]
    run = subprocess.run(line, env=env, cwd=here, capture_output=True, text=True, timeout=100)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert "EleutherAI/pythia-160m" in run.stderr and "--model tiny" in run.stderr


@pytest.mark.parametrize("kind", ["topk", "relu", "batchtopk"])
def test_saelens_reads_what_we_save(tmp_path, kind):
    sae_lens = pytest.importorskip("sae_lens")
    sae = SAE(32, 128, 5, kind)
    x = 3 * torch.randn(200, 32) + 1
    sae.start_from(x)
    sae.b_enc.data = 0.1 * torch.randn(128)
    sae.train()(x)  # sets BatchTopK's threshold
    saeft.save(sae.eval(), tmp_path, Config(layer=2, context=64))
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    with torch.no_grad():
        assert torch.allclose(theirs(x), sae(x)[0], rtol=1e-5, atol=1e-5)
