"""For bench.py: models of known shapes, time and memory of a step, the KL step done plainly."""

import contextlib
import ctypes
import gc
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import model_loaders
import saeft
from saeft import METHODS, SAE, AdamW, UserError, single, update

# D, layers, heads, V
SHAPES = """pythia-14m 128 6 4 50304, pythia-31m 256 6 8 50304, pythia-70m 512 6 8 50304,
pythia-160m 768 12 12 50304, pythia-410m 1024 24 16 50304, pythia-1b 2048 16 8 50304,
pythia-1.4b 2048 24 16 50304, pythia-2.8b 2560 32 32 50304, pythia-6.9b 4096 32 32 50432,
pythia-12b 5120 36 40 50688, gemma-2-2b 2304 26 8 256000, gemma-2-9b 3584 42 16 256000"""


def lm_config(family: str, d_model: int, layers: int, heads: int, vocab: int) -> dict:
    """What build_lm reads of a config.json; each family ignores the other's keys."""
    config = dict(model_type=family, hidden_size=d_model, num_hidden_layers=layers)
    config |= dict(num_attention_heads=heads, intermediate_size=4 * d_model, vocab_size=vocab)
    config |= dict(layer_norm_eps=1e-5, rms_norm_eps=1e-6, num_key_value_heads=heads // 2)
    config |= dict(query_pre_attn_scalar=256, attn_logit_softcapping=50.0, head_dim=256)
    return config | dict(final_logit_softcapping=30.0, sliding_window=4096)


def find_config(model: str) -> dict:
    """The shape of a short name, or the config.json of a folder. Raises UserError."""
    known = {name: map(int, shape) for name, *shape in map(str.split, SHAPES.split(","))}
    if model in known:
        family = "gemma2" if model.startswith("gemma") else "gpt_neox"
        return lm_config(family, *known[model])
    if model != "tiny" and not Path(model).is_dir():
        raise UserError(f"--model {model}: give tiny, {', '.join(known)}, or a folder")
    return model_loaders.load_config(model)


def build(args, config: dict, d_sae: int, k: int):
    """A frozen language model and an SAE with random weights, on args.device."""
    torch.set_default_dtype(getattr(torch, args.dtype))
    with torch.device(args.device):
        lm = saeft.build_lm(config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        return lm, SAE(config["hidden_size"], d_sae, k)


def peak_memory(step, device: torch.device) -> int:
    """Bytes that a step takes at its peak above those held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):  # only Linux can lower a process's peak
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return rise if sys.platform == "darwin" else rise * 1024


def median_seconds(steps: dict, repeats: int, device: torch.device) -> dict[str, float]:
    """Of each step; they take turns, so that whatever else the machine does hits all alike."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = {name: [] for name in steps}
    for name in list(steps) * repeats:
        sync()
        start = time.perf_counter()
        steps[name]()
        sync()
        seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def unembed(lm, lasts: list[torch.Tensor], backward: bool = False) -> None:
    """The products of each of lasts [B, T, D] with W_U; `backward`: and of a gradient with it."""
    lasts = [last.flatten(0, 1) for last in lasts]
    for rows in saeft.slices(len(lasts[0]), len(lm.W_U)):
        for last in lasts:
            logits = last[rows] @ lm.W_U.T
        if backward:
            logits @ lm.W_U


def kl_step(lm, sae: SAE, layer: int):
    """A step of saeft.finetune on tokens [B, T]; returns the loss."""
    s, optimizer = (
        METHODS["kl"](lm, sae, None),
        AdamW(sae.parameters(), weight_decay=0.01, fused=True),
    )

    def step(tokens):
        with torch.no_grad():
            resid = lm.prefix(tokens, layer)
            last_p = lm.suffix(resid, layer)[:, lm.n_skip :].flatten(0, 1)
        loss, _ = saeft.finetune_loss(s, last_p, *s.run(tokens, resid, layer))
        update(loss, sae, optimizer, 5e-5)
        return loss.detach()

    return step


def dense_reconstruct(sae: SAE, x: torch.Tensor) -> torch.Tensor:
    """The TopK SAE's x_hat of x [..., D], both products dense and left to autograd."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        pre = F.relu((x / sae.scale - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
        top = pre.topk(sae.k, sorted=False)
        f = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
        return ((f @ sae.W_dec + sae.b_dec) * sae.scale).float()


def direct_step(lm, sae: SAE, tokens: torch.Tensor, layer: int):
    """A fine-tune step without any fast path: the whole model twice on tokens [B, T], full logits,
    autograd, a dense SAE. Precisions are those of saeft. The step returns the loss."""
    optimizer, skip = AdamW(sae.parameters(), weight_decay=0.01, fused=True), lm.n_skip

    def step():
        with torch.no_grad():
            p = single(lm(tokens)[:, skip:]).softmax(-1).flatten(0, 1)
        resid = lm.prefix(tokens, layer)
        x = single(resid[:, skip:])
        x_hat = dense_reconstruct(sae, x)
        inserted = torch.cat([resid[:, :skip], x_hat.to(resid.dtype)], dim=1)
        logits = single(lm.unembed(lm.suffix(inserted, layer))[:, skip:])
        kl = F.kl_div(logits.log_softmax(-1).flatten(0, 1), p, reduction="batchmean")
        mse = F.mse_loss(x_hat, x)
        loss = ((mse / (kl + 1e-8)).detach() * kl + mse) / 2
        update(loss, sae, optimizer, 5e-5)
        return loss.detach()

    return step
