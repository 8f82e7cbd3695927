"""The method against references that nobody here wrote: torch's autograd in float64 and its AdamW,
the equations written out, and transformers' language models."""

import copy
import io
import json
import math
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import saeft
from experiments import baselines
from model_loaders import UserError
from saeft import SAE, Config, Phase, SlicedKL, Trainee

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

# ---- An example to check by hand -----------------------------------------------------------------
# 2 latents, 3 tokens, D = 2: encoder and decoder are the identity, biases 0, and K = 1.


def hand_sae(**changes):
    sae = SAE(2, 2, 1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
    return sae


HAND_X = torch.tensor([[3.0, 1.0], [1.0, 2.0], [-1.0, -1.0]])


def test_by_hand_the_sae():
    x_hat, active = hand_sae()(HAND_X)
    # Each token keeps its largest positive latent; the third has none.
    assert x_hat.tolist() == [[3, 0], [0, 2], [0, 0]]
    assert hand_sae().encode(HAND_X).tolist() == [[3, 0], [0, 2], [0, 0]]
    assert active.counts.tolist() == [1, 1] and active.sums.tolist() == [3, 2] and active.smallest == 2
    # Squared errors are 1, 1 and 2. The mean of x is (1, 2/3), the squares around it sum to 38/3.
    assert (HAND_X - x_hat).pow(2).sum(-1).tolist() == [1, 1, 2]


def test_by_hand_beta_and_kl():
    # p = (1/2, 1/2), q = (3/4, 1/4): KL = log(1/2) - (log(3/4) + log(1/4)) / 2 = log(4/3) / 2.
    identity = SimpleNamespace(W_U=torch.eye(2), logit_cap=None, kl_and_gradient=saeft.kl_and_gradient)
    identity.final_norm = identity.unembed = lambda x: x
    p, q = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]], requires_grad=True)
    (kl,) = SlicedKL.apply(identity, torch.ones(1), p, q)
    assert kl.item() == pytest.approx(math.log(4 / 3) / 2)
    (gradient,) = torch.autograd.grad(kl, q)
    assert gradient.tolist() == [pytest.approx([0.25, -0.25])]  # q - p


def test_by_hand_a_step_of_phase_one():
    # One step on the three tokens, rate 0.1. The loss is (1 + 1 + 2) / 3. Of W_dec[0] the gradient
    # is -2/3 f e = -2/3 * 3 * (0, 1) = (0, -2); nothing of it lies along (1, 0). All gradients
    # together have a norm above 1; Adam's first step is the rate times the sign.
    sae = hand_sae()
    buffer = SimpleNamespace(next_batch=lambda n: HAND_X, state_dict=dict)
    phase = Phase("MSE", [Trainee(sae, None, "mse", decay=0.0)], 1, torch.tensor(9.0), buffer=buffer)
    seen = []
    config = Config(lr=0.1, warmup=0, batch=3)
    saeft.train_mse(phase, config, lambda phase, figures: seen.extend(figures))
    assert seen[0]["loss"].item() == pytest.approx(4 / 3) and seen[0]["l0"].item() == pytest.approx(2 / 3)
    assert seen[0]["fvu"].item() == pytest.approx(4 / (38 / 3))
    expected = torch.tensor([[1.0, 0.1], [0.1, 1.0]])
    assert torch.allclose(sae.W_dec.data, F.normalize(expected, dim=-1), atol=1e-6)


# ---- Language models -----------------------------------------------------------------------------
SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_attention_heads=4)
NEOX = {**SIZES, "num_hidden_layers": 3}
GEMMA = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
GEMMA_2 = {**GEMMA, "num_hidden_layers": 4, "query_pre_attn_scalar": 24}
GEMMA_2.update(attn_logit_softcapping=5.0, final_logit_softcapping=3.0)
GEMMA_3 = {**GEMMA, "num_hidden_layers": 7, "query_pre_attn_scalar": 168}
FAMILIES = {
    "pythia": ("GPTNeoX", "GPTNeoXConfig", NEOX),
    "gemma2": ("Gemma2", "Gemma2Config", GEMMA_2),
    "gemma3": ("Gemma3", "Gemma3TextConfig", GEMMA_3),
}
TOKENS = torch.randint(96, (3, 20), generator=torch.Generator().manual_seed(0))


def reference(family, **changes):
    """A model of transformers, every parameter random: no bias is 0, no norm's weight 1."""
    name, config, settings = FAMILIES[family]
    config = getattr(transformers, config)(**{**settings, **changes}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    randomise(model, 3 if family == "gemma2" else 1)  # so that it reaches the soft caps
    return model


def randomise(model, gain=1):
    for p in model.parameters():
        if p.dim() > 1:
            p.data = gain * p.shape[-1] ** -0.5 * torch.randn_like(p)
        else:
            p.data += 0.3 * torch.randn_like(p)


def edit(folder, tensors=lambda t: t, drop=(), **changes):
    """Rewrites what save_pretrained wrote: a function of the tensors; keys of config.json."""
    path, weights = folder / "config.json", folder / "model.safetensors"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps({**config, **changes}))
    safetensors.save_file(tensors(safetensors.load_file(weights)), weights, {"format": "pt"})


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(params=FAMILIES)
def lm(request, tmp_path):
    reference(request.param).save_pretrained(tmp_path)
    return saeft.load_lm(str(tmp_path))


def assert_close(ours, theirs, tolerance=1e-5):
    """max|a - b| / max|b| is below the tolerance."""
    assert ours.shape == theirs.shape
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error < tolerance, f"relative error {error}"


@torch.no_grad()
def compare(model, folder, tokens=TOKENS, tolerance=1e-5, **load):
    """Logits and each block's resid_post equal transformers'; prefix and suffix make the whole."""
    ours, theirs = saeft.load_lm(str(folder), **load), model(tokens, output_hidden_states=True)
    logits = ours(tokens)
    assert_close(logits, theirs.logits, tolerance)
    hidden = theirs.hidden_states[1:-1]
    assert len(hidden) == len(ours.blocks) - 1
    for layer, block in enumerate([*hidden, None]):
        resid = ours.prefix(tokens, layer)
        assert torch.equal(ours.unembed(ours.suffix(resid, layer)), logits)
        if block is not None:  # transformers gives the last one after the final norm
            assert_close(resid, block, tolerance)


def rope(theta, **more):
    return {"rope_type": "default", "rope_theta": theta, **more}


LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}
PYTHIA_160M = dict(vocab_size=50304, hidden_size=768, intermediate_size=3072)
PYTHIA_160M.update(num_hidden_layers=12, num_attention_heads=12)
VARIANTS = {
    "pythia": ("pythia", {}),
    "pythia-sequential": ("pythia", {"use_parallel_residual": False}),
    "pythia-tied": ("pythia", {"tie_word_embeddings": True}),
    "pythia-rotary-half": ("pythia", {"rope_parameters": rope(1e4, partial_rotary_factor=0.5)}),
    "pythia-rotary-all": ("pythia", {"rope_parameters": rope(100.0, partial_rotary_factor=1.0)}),
    "pythia-linear": ("pythia", {"rope_parameters": {**LINEAR, "partial_rotary_factor": 1.0}}),
    "pythia-160m": ("pythia", PYTHIA_160M),
    "gemma2": ("gemma2", {}),
    "gemma2-one-key-head": ("gemma2", {"num_key_value_heads": 1, "rope_parameters": rope(100.0)}),
    "gemma2-no-caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma2-all-full": ("gemma2", {"layer_types": ["full_attention"] * 4}),
    "gemma2-untied": ("gemma2", {"tie_word_embeddings": False}),
    "gemma2-linear": ("gemma2", {"rope_parameters": LINEAR}),
    "gemma3": ("gemma3", {}),
    "gemma3-one-key-head": ("gemma3", {"num_key_value_heads": 1, "sliding_window": 4}),
    "gemma3-alternating": ("gemma3", {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}),
    "gemma3-bases": ("gemma3", {"rope_parameters": {"full_attention": rope(500.0), "sliding_attention": rope(50.0)}}),
    "gemma3-linear": ("gemma3", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": rope(1e4)}}),
}


@pytest.mark.parametrize("family, changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_hidden_states(family, changes, tmp_path):
    model = reference(family, **changes)
    model.save_pretrained(tmp_path)
    compare(model, tmp_path)


OLD_SPELLINGS = {  # of the settings of VARIANTS: what older config.json files say instead
    "pythia-rotary-half": {"rotary_pct": 0.5, "rotary_emb_base": 10000},
    "pythia-rotary-all": {"rotary_pct": 1.0, "rotary_emb_base": 100},
    "gemma2": {"rope_theta": 10000.0},
    "gemma2-one-key-head": {"rope_theta": 100.0},
    "gemma3": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
    "gemma3-bases": {"rope_theta": 500.0, "rope_local_base_freq": 50, "rope_scaling": None},
    "gemma3-linear": {"rope_theta": 1e4, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
}


@pytest.mark.parametrize("name", OLD_SPELLINGS)
def test_older_spellings_of_rotary_settings_and_layer_types(name, tmp_path):
    family, changes = VARIANTS[name]
    model = reference(family, **changes)
    model.save_pretrained(tmp_path)
    drop = ["rope_parameters", "layer_types", "_sliding_window_pattern"]
    edit(tmp_path, drop=drop, **OLD_SPELLINGS[name])
    compare(model, tmp_path)


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_gemma_3_with_vision(prefix, tmp_path):
    """The text part stands under text_config and a prefix; what sees is left alone."""
    model = reference("gemma3")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    seen = "model." if prefix.startswith("model") else ""

    def nested(tensors):
        names = {name: prefix + name.removeprefix(seen) for name in tensors}
        tensors = {names[name]: tensor for name, tensor in tensors.items()}
        tensors[f"{seen}vision_tower.vision_model.embeddings.patch_embedding.weight"] = torch.ones(3, 3)
        tensors[f"{seen}multi_modal_projector.mm_soft_emb_norm.weight"] = torch.ones(5)
        return tensors

    drop = [key for key in config if key not in ("architectures", "dtype", "transformers_version")]
    edit(tmp_path, nested, drop, model_type="gemma3", text_config=config, vision_config={"hidden_size": 8})
    compare(model, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_in_the_file_is_used_as_transformers_uses_it(family, tied, tmp_path):
    """A head that differs from the embedding: without tying it unembeds; with tying it does not."""
    reference(family, tie_word_embeddings=False).save_pretrained(tmp_path)
    edit(tmp_path, tie_word_embeddings=tied)
    name = FAMILIES[family][0]
    loader = getattr(transformers, f"{name}ForCausalLM")
    compare(loader.from_pretrained(tmp_path, attn_implementation="eager"), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_logits_from_files_of_each_dtype(family, sharded, tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model, folder = reference(family), tmp_path / str(dtype)
        for p in model.parameters():
            p.data = p.data.to(dtype).float()
        size = "20KB" if sharded else "1GB"
        copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size=size)
        assert (folder / "model.safetensors.index.json").exists() == sharded
        compare(model, folder)
        if dtype == torch.bfloat16:  # computing in it, too
            compare(model, folder, dtype=dtype, tolerance=0.3)


NORM = "gpt_neox.final_layer_norm.bias"
OLD_BUFFERS = {
    "gpt_neox.layers.1.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
    "gpt_neox.layers.1.attention.masked_bias": torch.tensor(-1e9),
    "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(1),
}
WRONG_TENSORS = {
    "Missing": lambda tensors: {k: v for k, v in tensors.items() if k != NORM},
    "Unexpected": lambda tensors: {**tensors, f"{NORM}es": torch.ones(2)},
    "size mismatch": lambda tensors: {**tensors, NORM: torch.ones(33)},
    "not finite": lambda tensors: {**tensors, NORM: tensors[NORM] / 0},
    "not  finite": lambda tensors: {**tensors, NORM: tensors[NORM] * torch.nan},
}


@pytest.mark.parametrize("problem", WRONG_TENSORS)
def test_wrong_tensors_are_named_and_old_buffers_ignored(problem, tmp_path):
    reference("pythia").save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: {**tensors, **OLD_BUFFERS})
    compare(reference("pythia"), tmp_path)
    edit(tmp_path, WRONG_TENSORS[problem])
    with pytest.raises(UserError, match=NORM) as error:
        saeft.load_lm(str(tmp_path))
    message = str(error.value)
    assert " ".join(problem.split()) in message and len(message) < 500 and "\n" not in message


def test_weights_too_large_for_the_dtype_are_named(tmp_path):
    reference("pythia").save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: {**tensors, NORM: tensors[NORM] * 1e6})
    saeft.load_lm(str(tmp_path))
    with pytest.raises(UserError, match=NORM):
        saeft.load_lm(str(tmp_path), dtype=torch.float16)


GEMMA_3_FOLDER = os.environ.get("SAEFT_GEMMA3", "/nowhere")


@pytest.mark.skipif(not os.path.isdir(GEMMA_3_FOLDER), reason="SAEFT_GEMMA3 names no folder")
def test_gemma_3_270m_itself():
    text = Path(saeft.__file__).with_name("README.md").read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(GEMMA_3_FOLDER)
    tokens = torch.tensor(tokenizer(text)["input_ids"][:1024])[None]
    assert tokens.shape == (1, 1024) and tokens[0, 0] == 2
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(GEMMA_3_FOLDER, **options)
    compare(model, Path(GEMMA_3_FOLDER), tokens)


BAD_CONFIGS = [  # (family, key, values): UserError, which names the key and shows the value
    ("pythia", "model_type", ["llama", "gpt2", None, 5, ["gpt_neox"]]),
    ("pythia", "hidden_size", [None, "32", -32, 0, 32.5, 2**40, [32], True]),
    ("pythia", "num_hidden_layers", [0, -1, 2.5, "3", 10**9, 2**70, None]),
    ("pythia", "num_attention_heads", [0, -4, "4"]),
    ("pythia", "vocab_size", [0, -5, "96", 1.5]),
    ("pythia", "intermediate_size", [0, -1, {"x": 1}]),
    ("pythia", "rotary_pct", [-0.25, "0.25", float("inf")]),
    ("pythia", "rotary_emb_base", ["16", -1, 0]),
    ("pythia", "layer_norm_eps", ["1e-5", -1, True]),
    ("pythia", "hidden_act", ["relu", None, 3]),
    ("pythia", "use_parallel_residual", ["yes", 2, ["x"]]),
    ("pythia", "tie_word_embeddings", ["no", 7]),
    ("pythia", "rope_parameters", ["x", 5, [1]]),
    ("pythia", "rope_scaling", ["x", 5]),
    ("pythia", "max_position_embeddings", [0, "2048", -1]),
    ("gemma2", "head_dim", [0, "16"]),
    ("gemma2", "num_key_value_heads", [0, None, "2"]),
    ("gemma2", "attn_logit_softcapping", ["50", 0, -5, [50]]),
    ("gemma2", "final_logit_softcapping", ["30", 0, -5, {"x": 1}]),
    ("gemma2", "query_pre_attn_scalar", [0, -24, "24"]),
    ("gemma2", "sliding_window", [0, -8, "8", 2.5]),
    ("gemma2", "layer_types", [["x"] * 4, "full_attention", 5]),
    ("gemma2", "hidden_activation", ["gelu", "silu", None]),
    ("gemma2", "rms_norm_eps", ["x", -1]),
    ("gemma3", "use_bidirectional_attention", [True, "x"]),
    ("gemma3", "sliding_window_pattern", [0, -6, "6"]),
    ("gemma3", "rope_local_base_freq", [0, "x"]),
]
BAD_TOGETHER = [  # each value could be right, not beside the others: UserError, one line
    ("pythia", {"num_attention_heads": 3}),
    ("pythia", {"num_attention_heads": 64}),
    ("pythia", {"rotary_pct": 7}),
    ("pythia", {"rope_parameters": {"rope_type": "yarn"}}),
    ("pythia", {"rope_parameters": {"rope_theta": "x"}}),
    ("pythia", {"rope_scaling": {"type": "dynamic", "factor": 2}}),
    ("pythia", {"rope_scaling": {"type": "linear"}}),
    ("pythia", {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": rope(1e4)}),
    ("gemma2", {"head_dim": 7}),
    ("gemma2", {"num_key_value_heads": 3}),
    ("gemma2", {"num_key_value_heads": 8}),
    ("gemma2", {"layer_types": ["full_attention"]}),
    ("gemma3", {"rope_parameters": {"full_attention": "x"}}),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}),
]
AS_OLD_FILES_SAY = {
    "pythia": {"rotary_pct": 0.25, "rotary_emb_base": 10000},
    "gemma2": {"rope_theta": 1e4},
    "gemma3": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
}


@pytest.fixture(scope="module")
def configs():
    """A config.json of each family, in the older spelling, as Python reads it."""
    found = {}
    for family in FAMILIES:
        _, config, settings = FAMILIES[family]
        config = json.loads(getattr(transformers, config)(**settings).to_json_string(use_diff=False))
        for key in ("rope_parameters", "layer_types"):
            config.pop(key, None)
        found[family] = {**config, **AS_OLD_FILES_SAY[family]}
        saeft.build_lm(found[family])
    return found


def refusal(config):
    """The one line with which a config.json is refused."""
    with pytest.raises(UserError) as error:
        saeft.build_lm(config)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.timeout(20)
@pytest.mark.parametrize("family, key, values", BAD_CONFIGS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_bad_setting_is_named(configs, family, key, values):
    for value in values:
        message = refusal({**configs[family], key: value})
        shown = str(value[0] if isinstance(value, list) else value)
        assert key in message and (shown in message or isinstance(value, dict)), message


@pytest.mark.parametrize("family, changes", BAD_TOGETHER, ids=lambda x: x if isinstance(x, str) else str(x)[:60])
def test_settings_that_do_not_fit_each_other_are_refused(configs, family, changes):
    assert "config.json" in refusal({**configs[family], **changes})


def test_missing_settings_are_named(configs):
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "model_type"):
        config = {k: v for k, v in configs["gemma2"].items() if k != key}
        with pytest.raises(UserError, match=key):
            saeft.build_lm(config)
    vision = {"model_type": "gemma3", "text_config": {**configs["gemma3"], "hidden_size": "x"}}
    with pytest.raises(UserError, match="hidden_size"):
        saeft.build_lm(vision)
    for text_config in (None, [], "x"):
        with pytest.raises(UserError):
            saeft.build_lm({"model_type": "gemma3", "text_config": text_config})


# ---- The SAE: plain, fast, and by its equations --------------------------------------------------
SELECT = {  # what `autoencode` is told to keep
    "topk": lambda pre, n: (5, None),
    "relu": lambda pre, n: (None, 0.0),
    "threshold": lambda pre, n: (None, 0.7),
    "thresholds": lambda pre, n: (None, torch.linspace(0, 1, pre.shape[1], dtype=pre.dtype)),
    "batchtopk": lambda pre, n: SAE(2, 2, 3, "batchtopk").train().select(pre, n),
}


def largest(pre, k):
    """ReLU of the K largest of each row, all others 0."""
    return pre.relu() * torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1.0)


def dense_f(pre, kind, k=5, threshold=0.0):
    """f [N, F] of pre [N, F], by the equations of each kind."""
    if kind == "topk":
        return largest(pre, k)
    if kind == "batchtopk":
        flat = pre.relu().flatten()
        top = flat.topk(round(k * len(pre)))
        return torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(pre)
    return pre.relu() * (pre >= threshold)


def dense_sae(x, W_enc, b_enc, W_dec, b_dec, kind="topk", **more):
    """x_hat [N, D] and f [N, F] by the equations, f dense."""
    f = dense_f((x - b_dec) @ W_enc.T + b_enc, kind, **more)
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


@pytest.fixture(params=[True, False], ids=["fast", "plain"])
def fast(request, monkeypatch):
    """Both ways to compute: the plain version that a reader reads, and the fast one of the CPU."""
    monkeypatch.setattr(saeft, "FAST", request.param)
    return request.param


@pytest.mark.parametrize("with_keep", [False, True], ids=["all", "keep"])
@pytest.mark.parametrize("kind", SELECT)
def test_autoencode_and_its_gradients_equal_dense_autograd(kind, with_keep, fast):
    inputs = sae_inputs()
    keep = torch.arange(24) % 5 > 0 if with_keep else torch.ones(24, dtype=torch.bool)
    threshold = {"threshold": 0.7, "thresholds": torch.linspace(0, 1, 20, dtype=torch.double)}.get(kind, 0.0)
    how = {"kind": kind, "k": 3 if kind == "batchtopk" else 5, "threshold": threshold}
    x, W_enc, b_enc, W_dec, b_dec = inputs
    f = torch.zeros(24, 20, dtype=torch.double)
    f[keep] = dense_sae(x[keep], W_enc, b_enc, W_dec, b_dec, **how)[1]
    expected = f @ W_dec + b_dec
    assert (f > 0).sum(1)[:3].max() == 0 < (f > 0).sum(1).max() and (f > 0).sum(0)[:2].max() == 0

    x_hat, active = saeft.autoencode(*inputs, SELECT[kind], keep if with_keep else None)
    assert_close(x_hat, expected, 1e-12)
    assert torch.equal(active.counts, (f > 0).sum(0))
    assert_close(active.smallest, f[f > 0].min(), 1e-12)
    assert_close(active.sums, f.sum(0), 1e-12)
    weight, norms = torch.randn_like(x_hat), W_dec.detach().norm(dim=-1)
    ours = torch.autograd.grad((x_hat * weight).sum() + active.sums @ norms, inputs)
    theirs = torch.autograd.grad((expected * weight).sum() + (f * norms).sum(), inputs)
    for a, b in zip(ours, theirs):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("kind", ["topk", "relu", "threshold"])
def test_autoencode_passes_gradcheck(kind):
    def x_hat_and_sums(*inputs):
        x_hat, active = saeft.autoencode(*inputs, SELECT[kind])
        return x_hat, active.sums

    assert torch.autograd.gradcheck(x_hat_and_sums, sae_inputs(6, 4, 9))


@pytest.mark.parametrize("d_sae, k", [(4096, 8), (5120, 80), (16384, 80), (16384, 1000), (99, 99)])
def test_top_k_finds_the_k_largest(d_sae, k):
    pre = torch.randn(20, d_sae).round(decimals=2)  # with ties
    values, tokens, latents = saeft.top_k(pre, k)
    assert torch.equal(values, pre.gather(1, latents.view(20, k)).relu().flatten())
    expected = pre.topk(k).values.relu()
    assert torch.equal(values.view(20, k).sort(descending=True).values, expected)
    assert all(len(row.unique()) == k for row in latents.view(20, k))
    assert torch.equal(tokens, torch.arange(20).repeat_interleave(k))


def test_the_fast_product_equals_the_plain_one(fast):
    x, weight, bias = torch.randn(30, 40), torch.randn(50, 40), torch.randn(50)
    assert_close(saeft.linear(x, weight, bias), x.double() @ weight.double().T + bias.double(), 1e-6)
    x.requires_grad_()  # it has no derivative: not where one is recorded
    (gradient,) = torch.autograd.grad(saeft.linear(x, weight).sum(), x)
    assert_close(gradient, weight.sum(0).expand(30, 40))


def small_sae(kind="topk", k=6, d_model=32):
    """An SAE whose biases, scale and norms are not trivial, and of whose latents 3 never fire."""
    torch.manual_seed(1)
    sae = SAE(d_model, 64, k, kind)
    sae.start_from(3 * torch.randn(500, d_model) + torch.randn(d_model))
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)[:3] = -100
        if kind in ("relu", "jumprelu"):
            sae.W_dec.mul_(1 + torch.rand(64, 1))
        if kind == "batchtopk":
            sae.threshold.fill_(0.2)
        if kind == "jumprelu":
            sae.threshold.uniform_(0, 0.4)
    sae.median_norm.fill_(5.0)
    return sae.eval()


def parameters(sae):
    return [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]


def leaves(sae):
    """Copies of the parameters in float64."""
    return [p.detach().double().requires_grad_() for p in parameters(sae)]


@pytest.mark.parametrize("n_dead", [9, 40])  # fewer than D/2, and more
def test_auxk_equals_direct_computation(n_dead, fast):
    sae, x, dead = small_sae(), torch.randn(50, 32) * 3, torch.arange(10, 10 + n_dead)
    error = (x - sae(x)[0]) / sae.scale
    loss = saeft.auxk_loss(sae, x, error, dead)
    W_enc, b_enc, W_dec, b_dec = weights = leaves(sae)
    e = error.detach().double()
    f = largest((x / sae.scale - b_dec) @ W_enc[dead].T + b_enc[dead], min(16, n_dead))
    expected = ((e - f @ W_dec[dead]) ** 2).sum() / ((e - e.mean(0)) ** 2).sum()
    assert_close(loss, expected)
    theirs = torch.autograd.grad(expected, weights)
    for a, b in zip(torch.autograd.grad(loss, parameters(sae)), theirs):
        assert_close(a, b)


def test_an_sae_starts_at_the_mean_of_scaled_activations():
    sae, x = SAE(4, 64, 2), torch.randn(300, 4) + 5
    sae.start_from(x)
    assert_close(sae.b_dec.data * sae.scale, x.mean(0))
    assert_close(sae.scale, (x**2).sum(1).mean().sqrt())
    assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))
    assert torch.equal(sae.W_enc, sae.W_dec) and not sae.b_enc.any()
    assert torch.equal(sae.W_dec, SAE(4, 64, 9, "relu", seed=0).W_dec)  # of the seed alone
    assert not torch.equal(sae.W_dec, SAE(4, 64, 2, seed=1).W_dec)


@pytest.mark.parametrize("kind, size", [("topk", 1e2), ("topk", 1e-2), ("relu", 1e2)])
def test_update_equals_projection_clipping_adamw_and_unit_norm(kind, size, fast):
    sae = small_sae(kind)
    theirs, trainee = copy.deepcopy(sae), Trainee(sae, None, "mse")
    plain = torch.optim.AdamW(theirs.parameters(), weight_decay=0.01, fused=False, foreach=False)
    for step in range(4):
        lr = plain.param_groups[0]["lr"] = 1e-2 / (step + 1)
        x = torch.randn(64, 32) * 3
        (size * F.mse_loss(sae(x)[0], x)).backward()
        saeft.update(trainee, lr)
        (size * F.mse_loss(theirs(x)[0], x)).backward()
        if kind == "topk":
            unit = theirs.W_dec.data
            theirs.W_dec.grad -= (theirs.W_dec.grad * unit).sum(1, keepdim=True) * unit
        assert (torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0) > 1) == (size > 1)
        plain.step()
        plain.zero_grad()
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
def test_a_gradient_that_is_not_finite_changes_nothing(bad, fast):
    sae, x = small_sae(), torch.randn(64, 32)
    trainee = Trainee(sae, None, "mse")

    def step(factor):
        (factor * F.mse_loss(sae(x)[0], x)).backward()
        saeft.update(trainee, 1e-2)
        state = [t for p in parameters(sae) for t in trainee.optimizer.state[p].values()]
        return [t.detach().clone() for t in parameters(sae)], [t.clone() for t in state]

    (first, _), (before, state), (after, state_after) = step(1.0), step(1.0), step(bad)
    assert not any(map(torch.equal, first, before))
    assert all(map(torch.equal, state, state_after))
    for a, b in zip(after, before):  # W_dec is normalised once more
        assert_close(a, b, 2e-7)


KINDS = ["topk", "relu", "batchtopk", "jumprelu"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_sae_works_on_raw_activations_by_saelens_equations(kind, tmp_path):
    sae, x = small_sae(kind), torch.randn(100, 32) * 3
    sae.save(tmp_path, {"hook_name": "blocks.1.hook_resid_post"})
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    tensors = safetensors.load_file(tmp_path / "sae_weights.safetensors")
    architecture = {"relu": "standard", "batchtopk": "jumprelu"}.get(kind, kind)
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"]) == (architecture, 32, 64)
    assert cfg["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    pre = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    f = pre.relu() * (pre > tensors.get("threshold", torch.zeros(64)))
    f = largest(pre, cfg["k"]) if kind == "topk" else f
    x_hat, active = sae(x)
    assert_close(f @ tensors["W_dec"] + tensors["b_dec"], x_hat)
    assert_close(sae.encode(x), f)
    assert 1 < active.counts.sum() / 100 == (f > 0).sum(1).float().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_load_is_the_inverse_of_save(kind, tmp_path):
    sae, x = small_sae(kind), torch.randn(100, 32) * 3
    sae.save(tmp_path, {})
    for source in (tmp_path, str(tmp_path)):
        loaded = SAE.load(source)
        assert (loaded.kind, loaded.k, loaded.unit_norm) == (kind, sae.k, kind in ("topk", "batchtopk"))
        assert loaded.median_norm == sae.median_norm
        assert_close(loaded(x)[0], sae(x)[0], 2e-6)
        assert_close(loaded.encode(x), sae.encode(x), 2e-6)
    loaded.save(tmp_path / "again", {})
    first, second = (safetensors.load_file(folder / "sae_weights.safetensors") for folder in (tmp_path, tmp_path / "again"))
    for name in first:
        assert_close(second[name], first[name], 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_saelens_reads_what_we_save(tmp_path, kind):
    sae_lens = pytest.importorskip("sae_lens")
    sae, x = small_sae(kind), 3 * torch.randn(200, 32) + 1
    sae.save(tmp_path, {"hook_name": "blocks.2.hook_resid_post", "context_size": 64})
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    with torch.no_grad():
        assert_close(theirs(x), sae(x)[0])
        assert_close(theirs.encode(x), sae.encode(x))


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_leaves_the_function_as_it_is(kind):
    sae, x = small_sae(kind), torch.randn(100, 32) * 3
    before = sae(x)[0]
    sae.rescale(1.0)
    assert sae.scale == 1
    assert_close(sae(x)[0], before, 1e-6)


def test_batchtopk_keeps_k_per_token_on_average_and_learns_its_threshold(fast):
    sae, x = SAE(32, 64, 6, "batchtopk").train(), torch.randn(200, 32)
    _, active = sae(x)
    assert active.counts.sum() == 1200
    per_token = (sae.encode(x) > 0).sum(1)
    assert per_token.max() > 6 > per_token.min()
    assert sae(x, torch.arange(200) < 50)[1].counts.sum() == 300  # K N of the tokens that count
    saeft.follow_threshold(sae, active, step=0, steps=200)
    assert sae.threshold == active.smallest > 0
    assert sae.eval()(x)[1].counts.sum() / 200 == pytest.approx(6, abs=0.01)


# ---- KL, and the fine-tune's loss ----------------------------------------------------------------
def whole_kl(log_p, log_q, weight):
    return (weight * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)).sum()


@pytest.fixture
def slices_of_7(monkeypatch):
    def few(n_tokens, W_U):
        return [slice(i, i + 7) for i in range(0, n_tokens, 7)]

    monkeypatch.setattr(saeft, "slices", few)


def resids(n, d_model, dtype=torch.double):
    """For p and for two q's."""
    p, *noise = torch.randn(3, n, d_model, dtype=dtype, generator=torch.manual_seed(2))
    return p, [(p + size * e).requires_grad_() for size, e in zip((0.3, 0.1), noise)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sliced_kl_of_several_q_equals_whole_logits(lm, dtype, slices_of_7):
    p, qs = resids(50, 32, dtype)
    weight = torch.rand(50, dtype=dtype)
    weight[3:5] = 0  # tokens that do not count
    kls = SlicedKL.apply(lm.to(dtype), weight, p, *qs)
    grads = torch.autograd.grad(3 * kls[0] + kls[1], qs)
    lm.double()
    logs = [lm.unembed(resid.double()).log_softmax(-1) for resid in (p, *qs)]
    expected = [whole_kl(logs[0], log_q, weight.double()) for log_q in logs[1:]]
    theirs = torch.autograd.grad(3 * expected[0] + expected[1], qs)
    tolerance = 5e-5 if dtype == torch.float32 else 1e-12
    for a, b in zip([*kls, *grads], [*expected, *theirs]):
        assert_close(a, b, tolerance)


def test_sliced_kl_passes_gradcheck(lm, slices_of_7):
    p, qs = resids(9, 32)
    weight = torch.rand(9, dtype=torch.double)
    lm.double()
    assert torch.autograd.gradcheck(lambda *qs: SlicedKL.apply(lm, weight, p, *qs), qs, fast_mode=True)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in tensors)])
        return out


def test_no_tensor_of_tokens_times_vocabulary_exists(configs):
    config = {**configs["pythia"], "vocab_size": 50304, "hidden_size": 8}
    lm = saeft.build_lm(config).to_empty(device="cpu").requires_grad_(False)
    for p in lm.parameters():
        p.uniform_(-1, 1)
    p, (q, _) = resids(400, 8, torch.float32)
    with Largest() as seen:
        (kl,) = SlicedKL.apply(lm, torch.ones(400) / 400, p, q)
        kl.backward()
        saeft.ce_and_kl(lm, [p, q.detach()], torch.arange(400))
    assert 50304 * 8 < seen.numel <= 2**23 < 400 * 50304 / 2
    for vocabulary in (300, 50304, 256_000):
        W_U = torch.empty(vocabulary, 1)
        served = [torch.arange(4000)[rows] for rows in saeft.slices(4000, W_U)]
        assert torch.equal(torch.cat(served), torch.arange(4000))


class Stream:
    """Sequences as a TokenStream gives them; remembers which ones were asked for."""

    def __init__(self, tokens):
        self.tokens, self.asked = tokens, []

    def train(self, start, count):
        self.asked += range(start, start + count)
        return self.tokens[start : start + count]


LOOP = Config(
    layer=1, context=20, tokens=1200, kl_tokens=400, batch=50, kl_batch=3, buffer=10, warmup=4,
    lr=1e-2, kl_lr=1e-3, dead_after=100, rank=4, d_sae=64, sae="topk", data="x",
)


def nothing(phase, figures):
    """An after_step that does nothing."""


def dense_splice(lm, sae, weights, tokens, keep, layer=1):
    """x, x_hat [n, D], f [n, F] of the n tokens to keep, and log-probabilities [B, T, V] without and
    with the SAE, in float64."""
    resid = lm.prefix(tokens, layer).double()
    threshold = torch.nextafter(sae.threshold, sae.threshold + 1).double()
    how = {"kind": sae.kind, "k": sae.k, "threshold": threshold}
    if sae.kind == "batchtopk" and not sae.training:
        how["kind"] = "jumprelu"
    if sae.kind == "relu":
        how["threshold"] = 0.0
    x = resid[keep]
    x_hat, f = dense_sae(x / sae.scale.double(), *weights, **how)
    x_hat = x_hat * sae.scale.double()
    spliced = resid.clone()
    spliced[keep] = x_hat
    lm = copy.deepcopy(lm).double()
    logits = [lm.unembed(lm.suffix(r, layer)) for r in (resid, spliced)]
    return x, x_hat, f, *(z.log_softmax(-1) for z in logits)


def sinks(lm, tokens, n_skip):
    """A limit of the norm which 5 tokens of the rest exceed, and what is left, [B, T]."""
    lm.n_skip = n_skip
    norms = lm.prefix(tokens, 1).norm(dim=-1)
    limit = norms[:, n_skip:].flatten().sort().values[-6:-4].mean()
    keep = norms <= limit
    keep[:, :n_skip] = False
    assert (~keep).sum() == 5 + n_skip * len(tokens)
    return limit, keep


@pytest.mark.parametrize("loss", ["kl", "kl-only", "mse"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_finetunes_losses_and_gradients_end_to_end(lm, kind, loss, slices_of_7, monkeypatch):
    """Against autograd in float64 through the whole model, without <bos> and without sinks."""
    limit, keep = sinks(lm, TOKENS, n_skip=1)
    saes = [small_sae(kind).train(), small_sae(kind, k=3).train()]
    saes[1].W_enc.data *= 1.1
    weights = [leaves(sae) for sae in saes]
    trainees = [Trainee(sae, lm, loss, l1=0.3, l0_target=1.0) for sae in saes]
    ours, seen = [], []
    monkeypatch.setattr(saeft, "update", lambda t, lr: ours.append([p.grad for p in parameters(t.sae)]))
    phase = Phase("x", trainees, 1, limit)
    saeft.finetune(phase, lm, Stream(TOKENS), LOOP, lambda phase, figures: seen.extend(figures))
    for sae, w, t, gradients, row in zip(saes, weights, trainees, ours, seen):
        x, x_hat, f, log_p, log_q = dense_splice(lm, sae, w, TOKENS, keep)
        mse = (x - x_hat).square().mean()
        kl = whole_kl(log_p[keep], log_q[keep], 1 / keep.sum())
        expected = {"kl": ((mse / kl).detach() * kl + mse) / 2, "kl-only": kl, "mse": mse}[loss]
        assert row["mse"].item() == pytest.approx(mse.item(), rel=1e-5)
        assert row["fvu"].item() == pytest.approx(((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-5)
        assert row["l0"].item() == pytest.approx((f > 0).sum(1).double().mean().item())
        if loss != "mse":
            assert row["kl"].item() == pytest.approx(kl.item(), rel=1e-4)
            assert (row["beta"] * row["kl"]).item() == pytest.approx(row["mse"].item(), rel=1e-5)
        if kind == "relu":
            scale = sae.scale.double()
            expected = expected * 32 / scale**2 + 0.3 * (f @ w[2].norm(dim=1)).mean()
            assert float(t.l1) == pytest.approx(0.3 * 1.001)
        assert row["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
        theirs = torch.autograd.grad(expected, w)
        for a, b in zip(gradients, theirs):
            assert_close(a, b, 1e-4)


def test_lambda_follows_the_l0_that_relu_saes_had(lm):
    for target, factor in [(1.0, 1.001), (60.0, 0.999)]:
        trainee = Trainee(small_sae("relu"), lm, "mse", l1=0.3, l0_target=target)
        saeft.finetune(Phase("x", [trainee], 2, torch.tensor(torch.inf)), lm, Stream(TOKENS.repeat(2, 1)), LOOP, nothing)
        assert float(trainee.l1) == pytest.approx(0.3 * factor**2)


# ---- The buffer, the loops, the evaluation -------------------------------------------------------
def buffer_of(n_sequences, n_skip, **changes):
    """A buffer of activations that tell their sequence, position and layer; every 7th is a sink."""

    def prefix(tokens, layer):
        x = torch.stack([tokens // 10, tokens % 10, torch.full_like(tokens, layer)], -1).float()
        return torch.where(tokens[..., None] % 7 == 0, 1e6, x)

    lm = SimpleNamespace(n_skip=n_skip, W_U=torch.zeros(1, 3), prefix=prefix)
    stream = Stream(torch.arange(1000).view(100, 10))
    config = replace(LOOP, context=10, batch=8, buffer=20, layer=4, **changes)
    return saeft.ActivationBuffer(lm, stream, n_sequences, torch.tensor(1e3), config)


@pytest.mark.parametrize("n_skip", [0, 1])
@pytest.mark.parametrize("n_sequences", [3, 57])  # fewer and more than the buffer holds
def test_buffer_serves_each_activation_once_and_mixes(n_skip, n_sequences):
    buffer = buffer_of(n_sequences, n_skip)
    left = [i for i in range(10 * n_sequences) if i % 7 and i % 10 >= n_skip]
    batches = [buffer.next_batch(8) for _ in range(len(left) // 8)]
    assert buffer.stream.asked == list(range(n_sequences))
    served = torch.cat(batches)
    sequence, position, layer = served.unbind(-1)
    assert set((10 * sequence + position).tolist()) <= set(left) and (layer == 4).all()
    assert len(served.unique(dim=0)) == len(served) > len(left) - 8
    mixed = sum(len(batch[:, 0].unique()) for batch in batches) / len(batches)
    assert mixed > (5 if n_sequences == 57 else 2)


def saved(state):
    """As a checkpoint keeps it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_buffer_goes_on_as_it_was():
    one, two = buffer_of(57, 1), buffer_of(57, 1)
    for _ in range(20):
        one.next_batch(8)
    vars(two).update(saved(one.state_dict()))
    assert all(torch.equal(one.next_batch(8), two.next_batch(8)) for _ in range(30))


def a_phase(lm, name, kind, seed=0, steps=6, **changes):
    """A phase of two SAEs with AuxK, threshold and lambda at work, and a call that runs its loop."""
    config = replace(LOOP, sae=kind, seed=seed, **changes)
    stream = Stream(torch.randint(96, (60, 20), generator=torch.Generator().manual_seed(seed)))
    saes = [small_sae(kind, k).train() for k in (4, 8)]
    limit, _ = sinks(lm, stream.tokens, n_skip=1)
    if name == "MSE":
        phase = Phase(name, [Trainee(sae, lm, "mse", decay=0.0) for sae in saes], steps, limit)
        phase.buffer = saeft.ActivationBuffer(lm, stream, 60, limit, config)
        return phase, lambda after: saeft.train_mse(phase, config, after)
    trainees = [Trainee(sae, lm, name, l1=0.3, l0_target=6.0) for sae in saes]
    phase = Phase(name, trainees, steps, limit, first=10)
    return phase, lambda after: saeft.finetune(phase, lm, stream, config, after)


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["topk", "relu", "batchtopk"])
@pytest.mark.parametrize("name", ["MSE", "kl"])
def test_a_phase_goes_on_bit_equal_from_its_state(lm, name, kind):
    whole, run = a_phase(lm, name, kind)
    run(nothing)
    first, run = a_phase(lm, name, kind)
    states = []

    def stop(phase, figures):
        if phase.step == 3:
            states.append(saved(phase.state_dict()))
            raise Stop

    with pytest.raises(Stop):
        run(stop)
    second, run = a_phase(lm, name, kind)
    second.load_state_dict(states[0])
    assert second.step == 3
    run(nothing)
    for a, b in zip(whole.trainees, second.trainees):
        assert all(torch.equal(v, b.sae.state_dict()[k]) for k, v in a.sae.state_dict().items())
        assert torch.equal(a.idle, b.idle) and a.l1 == b.l1


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu"])
def test_mse_phase_learns_and_keeps_out_dead_latents(lm, kind):
    phase, run = a_phase(lm, "MSE", kind, steps=24)
    seen = []
    run(lambda phase, figures: seen.append([row["fvu"].item() for row in figures]))
    for fvus in zip(*seen):
        assert sum(fvus[-5:]) < 0.8 * sum(fvus[:5])
    if kind == "topk":  # the latents that never fired are dead after 100 tokens
        for t in phase.trainees:
            assert {0, 1, 2} <= set(t.dead.tolist()) and (t.idle[:3] == 24 * 50).all()


@pytest.mark.parametrize("kl_tokens, rates", [(400, [1e-3, 8e-4, 6e-4, 4e-4, 2e-4]), (1200, [0.01] * 5)])
def test_finetune_takes_its_sequences_in_order_and_its_rate_falls(kl_tokens, rates, lm, monkeypatch):
    seen, stream = [], Stream(TOKENS[:1].repeat(60, 1))
    monkeypatch.setattr(saeft, "update", lambda t, lr: seen.append(lr))
    config = replace(LOOP, kl_tokens=kl_tokens, kl_batch=4)  # all tokens: phase one's schedule
    phase = Phase("kl", [Trainee(small_sae(), lm)], 5, torch.tensor(torch.inf), first=40)
    saeft.finetune(phase, lm, stream, config, nothing)
    assert stream.asked == list(range(40, 60)) and seen == pytest.approx(rates)


def test_the_finetune_of_saes_with_unit_norm_is_in_raw_units(monkeypatch):
    for kind, scale in [("topk", 1.0), ("batchtopk", 1.0), ("relu", small_sae("relu").scale)]:
        run = SimpleNamespace(lm=None, config=LOOP, methods=saeft.METHODS)
        run.state = {"results": {"MSE": [{"l0": 4.5}]}, "l1": LOOP.l1}
        sae = small_sae(kind)
        trainee = saeft.Run.trainee(run, "kl", 0, sae)
        assert trainee.sae.scale == scale and trainee.sae is not sae and sae.scale != 1
        x = torch.randn(30, 32)
        assert_close(trainee.sae(x)[0], sae(x)[0], 2e-6)


METHODS = [name for name in baselines.METHODS if name not in ("kl-only", "mse")]


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_start_at_the_sae_leave_the_model_alone_and_can_be_read_back(lm, method, kind, tmp_path):
    limit, keep = sinks(lm, TOKENS, n_skip=1)
    sae, logits, state = small_sae(kind), lm(TOKENS), copy.deepcopy(lm.state_dict())
    t = baselines.METHODS[method](lm, copy.deepcopy(sae), LOOP)
    t.l1, t.l0_target = 0.1, 6.0
    x, x_hat, active, _ = t.splice(TOKENS, lm.prefix(TOKENS, 1), keep, 1)
    kept = keep.flatten()
    assert_close(x_hat[kept], sae(x, kept)[0][kept])

    trained = {name: p for name, p in t.trained.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    frozen = [p for m in (t.insert, t.lm) for p in m.parameters() if not p.requires_grad]
    assert {*lm.parameters()} <= {*frozen} and len(trained) > 1
    t.trained.train()
    stream = Stream(torch.randint(96, (60, 20)))
    saeft.finetune(Phase(method, [t], 3, limit), lm, stream, replace(LOOP, kl_lr=1e-2), nothing)
    assert not any(torch.equal(before[name], p) for name, p in trained.items())
    assert torch.equal(lm(TOKENS), logits)
    assert all(torch.equal(state[name], value) for name, value in lm.state_dict().items())

    # What it saves gives the same figures, through `baselines.load`.
    t.trained.eval()
    t.save(tmp_path / "saved", {})
    loaded = baselines.load(tmp_path / "saved", lm, 1)
    tokens = torch.randint(96, (8, 20))
    _, ours = saeft.evaluate(lm, tokens, [t], LOOP)
    _, again = saeft.evaluate(lm, tokens, [loaded], LOOP)
    assert again[0] == pytest.approx(ours[0], rel=1e-4)


def test_every_method_takes_two_steps_at_pythia_160m_shape():
    lm = saeft.build_lm({**PYTHIA_160M, "model_type": "gpt_neox", "layer_norm_eps": 1e-5})
    lm.to_empty(device="cpu").requires_grad_(False)
    for p in lm.parameters():
        p.uniform_(-0.03, 0.03)
    sae, tokens = SAE(768, 256, 80), torch.randint(50304, (2, 8))
    config = replace(LOOP, layer=8, context=8, kl_batch=1, kl_tokens=16, d_sae=256)
    sae.start_from(lm.prefix(tokens, 8).flatten(0, 1))
    logits = lm(tokens[:1])
    assert len(baselines.METHODS) == 8
    for name, method in baselines.METHODS.items():
        t, seen = method(lm, copy.deepcopy(sae), config), []
        phase = Phase(name, [t], 2, torch.tensor(torch.inf))
        saeft.finetune(phase, lm, Stream(tokens), config, lambda phase, rows: seen.extend(rows))
        assert len(seen) == 2 and all(row["loss"].isfinite() for row in seen)
    assert torch.equal(lm(tokens[:1]), logits)


@torch.no_grad()
def test_evaluate_equals_direct_computation(lm):
    tokens, lm = torch.randint(96, (11, 20)), lm.double()
    limit, keep = sinks(lm, tokens, n_skip=1)
    saes = [small_sae().double(), small_sae("relu").double(), small_sae(k=1).double(), small_sae("batchtopk").double()]
    for sae in saes:
        sae.median_norm.fill_(limit / 4)
    model, figures = saeft.evaluate(lm, tokens, [Trainee(sae, lm) for sae in saes], replace(LOOP, sink_norm=4.0))
    scored = keep[:, :-1]
    targets = tokens[:, 1:][scored]
    zero = [torch.zeros_like(p) for p in leaves(saes[0])]
    for sae, weights, ours in [(saes[0], zero, model), *zip(saes, map(leaves, saes), figures)]:
        x, x_hat, f, log_p, log_q = dense_splice(lm, sae, weights, tokens, keep)
        log_p, log_q = log_p[:, :-1][scored], log_q[:, :-1][scored]
        original, ce = F.nll_loss(log_p, targets).item(), F.nll_loss(log_q, targets).item()
        if ours is model:
            ce_zero = ce
            left_out = (~keep).double().mean().item()
            expected = {"ce_original": original, "ce_zero": ce, "left_out": left_out}
        else:
            gap, error = ce - original, (x - x_hat).square().sum()
            expected = {"ce": ce, "gap": gap, "loss_recovered": 1 - gap / (ce_zero - original)}
            expected["kl"] = whole_kl(log_p, log_q, 1 / len(targets)).item()
            expected["fvu"] = (error / (x - x.mean(0)).square().sum()).item()
            expected["l0"] = (f > 0).sum(1).double().mean().item()
            expected["dead"] = (f == 0).all(0).sum().item()
            assert expected["dead"] >= 3
        assert ours == pytest.approx(expected, rel=1e-6)
    # Without the limit all but <bos> count.
    model, _ = saeft.evaluate(lm, tokens, [Trainee(saes[0], lm)], replace(LOOP, sink_norm=0.0))
    assert model["left_out"] == pytest.approx(1 / 20)


# ---- Several processes ---------------------------------------------------------------------------
def steps_of_a_process(rank, world, kind, method, folder, file):
    """Thirty steps of phase one, or ten of the fine-tune, of one process of `world`; its SAE is
    written to a file. All worlds see the same rows and sequences."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    lm = saeft.load_lm(folder)
    generator = torch.Generator().manual_seed(5)
    sae, batch = small_sae(kind, k=2).train(), 96 // world
    if method == "MSE":
        rows = iter(torch.randn(30, 96, 32, generator=generator) @ torch.randn(32, 32, generator=generator))
        buffer = SimpleNamespace(next_batch=lambda n: next(rows)[rank::world], state_dict=dict)
        config = replace(LOOP, batch=batch, dead_after=200, sae=kind)
        phase = Phase("MSE", [Trainee(sae, lm, "mse", decay=0.0)], 30, torch.tensor(torch.inf), buffer=buffer)
        saeft.train_mse(phase, config, nothing)
        assert kind != "topk" or len(phase.trainees[0].dead) > 3, phase.trainees[0].dead
    else:
        tokens = torch.randint(96, (40, 20), generator=generator)
        limit, _ = sinks(lm, tokens, n_skip=1)
        config = replace(LOOP, kl_batch=4 // world, sae=kind)
        trainee = Trainee(sae, lm, method, l1=0.1, l0_target=6.0)
        saeft.finetune(Phase(method, [trainee], 10, limit), lm, Stream(tokens), config, nothing)
    if rank == 0:
        safetensors.save_file(dict(sae.state_dict()), f"{file}.safetensors")
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("method, tolerance", [("MSE", 1e-5), ("kl", 1e-5)])
@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_two_processes_equal_one_with_twice_the_batch(kind, method, tolerance, tmp_path):
    reference("pythia").save_pretrained(tmp_path / "lm")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["core_part"])
    processes = []
    for world in (1, 2):
        for rank in range(world):
            args = (rank, world, kind, method, str(tmp_path / "lm"), str(tmp_path / f"world{world}"))
            processes.append(context.Process(target=steps_of_a_process, args=args))
            processes[-1].start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0, (process.kill(), process.exitcode)
    one, two = (safetensors.load_file(tmp_path / f"world{world}.safetensors") for world in (1, 2))
    start = small_sae(kind).state_dict()
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        a, b, moved = (t[name][3:] if name == "b_enc" else t[name] for t in (one, two, start))
        difference, moved = ((a - b).abs().max() / b.abs().max()).item(), ((moved - b).abs().max() / b.abs().max()).item()
        print(f"{kind} {method} {name}: {difference:.1e}, the steps themselves {moved:.1e}")
        assert difference < tolerance < moved


# ---- Settings ------------------------------------------------------------------------------------
def test_lr_warms_up_stays_and_falls_to_0():
    factors = [saeft.lr_factor(step, 100, 10, 0.2) for step in range(101)]
    rise, fall = [i / 10 for i in range(1, 11)], [1 - i / 20 for i in range(1, 21)]
    assert factors == pytest.approx(rise + [1.0] * 71 + fall)
    assert [saeft.lr_factor(step, 4, 0, 1.0) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("unit, size", [("", 1), ("k", 10**3), ("M", 10**6), ("b", 10**9)])
def test_count_is_exact(unit, size):
    tenths = range(0, 2000, 10 if size == 1 else 1)
    assert [saeft.count(f"{i / 10}{unit}") for i in tenths] == [i * size // 10 for i in tenths]
    assert saeft.count(f"25{unit}") == 25 * size and saeft.count("1e6") == 10**6


def test_flags_override_presets_override_defaults():
    assert saeft.parse([]).k == [16] and saeft.parse([]).data == "tiny"
    given = ["--model", "pythia-160m-deduped", "--k", "20", "40", "--tokens", "1e6", "--overwrite"]
    config = saeft.parse(given)
    assert (config.layer, config.k, config.tokens, config.overwrite) == (8, [20, 40], 10**6, True)
    assert saeft.parse([*given, "--layer", "3"]).layer == 3
    assert saeft.parse(["--model", "pythia-160m@step1000"]).layer == 8
    for model in ("google/gemma-2-2b", "gemma-3-270m", "gemma-3-4b"):
        assert saeft.parse(["--model", model]).dtype == "bfloat16"
    assert saeft.parse(["--model", "somebody/else"]) == Config(model="somebody/else")
