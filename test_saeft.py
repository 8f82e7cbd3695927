"""saeft.py against references: transformers, autograd on dense float64 tensors, torch's own Adam."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import saeft
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
    "missing": lambda tensors: {k: v for k, v in tensors.items() if k != NORM},
    "unexpected": lambda tensors: tensors | {NORM + "es": torch.ones(2)},
    "shape": lambda tensors: tensors | {NORM: torch.ones(33)},
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
    median = saeft.geometric_median(x)  # where the directions of all points balance
    assert F.normalize(x - median, dim=-1).mean(0).norm() < 1e-3 < (x.mean(0) - median).norm()
    sae.start_from(x)
    assert_close(sae.scale, (x**2).sum(1).mean().sqrt())
    assert_close(sae.b_dec, median / sae.scale, 1e-3)
    assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))


@pytest.mark.parametrize("kind, size", [("topk", 1e2), ("topk", 1e-2), ("relu", 1e2)])
def test_update_equals_projection_clipping_adamw_and_unit_norm(kind, size):
    sae = small_sae(kind)
    ours, theirs = saeft.adam(sae, 0.01), copy.deepcopy(sae)
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
    optimizer = saeft.adam(sae, 0.01)

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


def quiet(*args, **metrics):
    pass


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
        log = lambda i, step, steps, loss, mse, **metrics: seen.append(mse.item())
        saeft.train_mse(lm, stream, saes, 60, Config(**LOOP), log)
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
    saeft.finetune(lm, stream, [Splice(small_sae(), lm)], 40, 60, config, quiet)
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
    saeft.finetune(lm, stream, [s], 0, 20, Config(**LOOP), quiet)
    assert not any(torch.equal(before[name], p) for name, p in trained.items())
    assert not s.insert.training and not s.lm.training
    assert torch.equal(lm(TOKENS), logits)
    assert all(torch.equal(state[name], value) for name, value in lm.state_dict().items())
    if method == "lora-sae":
        x = x.detach()
        assert_close(s.insert.merged()(x)[0], s.insert(x)[0])


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
    assert saeft.parse([]).k == [8] and saeft.parse([]).data == "stdlib"
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
    text = "".join(f"def f{i}(x):\n    return x * {i * i} + {i}\n\n" for i in range(20_000))
    (tmp_path / "data.txt").write_text(text)
    line = f"--data {tmp_path / 'data.txt'} --tokens 90M --kl-tokens 30M --eval-tokens 1k"
    assert command(f"{line} --name x", tmp_path, SMALL) == 2
    assert command(f"{line} --allow-short --name x", tmp_path, SMALL) == 0
    report = read_report(tmp_path / "x")
    assert 100_000 < report["tokens"] < 1_000_000
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
