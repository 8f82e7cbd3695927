"""For bench.py: each stage's step and its floor.

A stage is a function of the settings that yields cases: (label, tokens in a step, {name: step}).
The step named "floor" is the stage's unavoidable products alone.
"""

import copy
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import bench_peers as peers
import torch
from bench_tools import build, direct_step, kl_step, unembed

import saeft
from model_loaders import load_tokenizer
from saeft import METHODS, SAE, ActivationBuffer, AdamW, update


def buffer_step(args, lm, size: int):
    """A buffer of `size` sequences, a step that serves and refills half of it, and its tokens."""
    ids = torch.randint(args.config["vocab_size"], (max(1, 8192 // args.t), args.t))
    stream = SimpleNamespace(train=lambda start, n: ids[torch.arange(n) % len(ids)])
    config = saeft.Config(layer=args.layer, context=args.t, batch=args.n[0], buffer=size)
    buffer = ActivationBuffer(lm, stream, 10**9, config)

    def step():
        while buffer.used < len(buffer.rows) // 2:
            buffer.next_batch(config.batch)
        buffer.refill()

    start = buffer.next_sequence
    step()
    return buffer, step, (buffer.next_sequence - start) * args.t


def collect(args):
    lm, _ = build(args, args.config, 1, 1)
    # The CPU's prefix is slow, and its speed does not depend on the buffer's size.
    size = 256_000 // args.t if lm.W_U.is_cuda else 1 + 2 * args.n[0] // args.t
    buffer, step, n_tokens = buffer_step(args, lm, size)
    tokens = torch.randint(len(lm.W_U), (n_tokens // args.t, args.t), device=args.device)

    @torch.no_grad()
    def floor():
        for chunk in tokens.split(buffer.chunk):
            lm.prefix(chunk, args.layer)

    yield "", n_tokens, {"collect": step, "floor": floor}


def buffer(args):
    d_model, dtype = args.config["hidden_size"], getattr(torch, args.dtype)
    resid = torch.randn(max(1, 8192 // args.t), args.t, d_model, device=args.device, dtype=dtype)
    n_skip = saeft.FAMILIES[args.config["model_type"]].n_skip
    lm = SimpleNamespace(W_U=resid[0], n_skip=n_skip, prefix=lambda ids, layer: resid[: len(ids)])
    _, step, n_tokens = buffer_step(args, lm, 256_000 // args.t)
    yield "", n_tokens, {"buffer": step}


def encoder_product(sae: SAE, n: int):
    """A step: the product of n activations with W_enc, in the precision in which SAEs run."""
    W_enc = sae.W_enc.detach().to(torch.bfloat16 if sae.W_enc.is_cuda else torch.float32)
    x = torch.randn(n, W_enc.shape[1], device=W_enc.device, dtype=W_enc.dtype)
    return torch.no_grad()(lambda: saeft.linear(x, W_enc))


def sae(args):
    d_model = args.config["hidden_size"]
    sae = SAE(d_model, args.d_sae, args.k[0]).to(args.device)
    optimizer = AdamW(sae.parameters(), weight_decay=0.0, fused=True)
    mix = torch.randn(d_model, d_model, device=args.device) / d_model**0.5

    def step():
        x_hat, _ = sae(x)
        update(((x - x_hat) / sae.scale).pow(2).sum(-1).mean(), sae, optimizer, 2e-4)

    for n in args.n:
        x = torch.randn(n, d_model, device=args.device) @ mix
        sae.start_from(x)
        for k in args.k:
            sae.k = k
            steps = {"sae": step, "floor": encoder_product(sae, n)}
            W_enc = sae.W_enc.detach()
            steps["x @ W_enc.T"] = lambda: x @ W_enc.T
            yield (
                f"N {n} K {k}",
                n,
                steps | (peers.sae_steps(x, args.d_sae, k) if args.peers else {}),
            )


def spliced(args):
    """A model, an SAE for its activations, and tokens [B, T]."""
    lm, sae = build(args, args.config, args.d_sae, args.k[0])
    tokens = torch.randint(len(lm.W_U), (args.b, args.t), device=args.device)
    with torch.no_grad():
        sae.start_from(lm.prefix(tokens, args.layer)[:, lm.n_skip :].flatten(0, 1))
    return lm, sae, tokens


def kl(args):
    lm, sae, tokens = spliced(args)
    encode, step = encoder_product(sae, tokens.numel()), kl_step(lm, sae, args.layer)

    def floor():
        with torch.no_grad():
            resid = lm.prefix(tokens, args.layer)
            last_p = lm.suffix(resid, args.layer)
        last_q = lm.suffix(resid.requires_grad_(), args.layer)
        last_q.backward(last_p)  # any gradient of that shape
        unembed(lm, [last_p, last_q.detach()], backward=True)
        encode()

    steps = {"kl": lambda: step(tokens), "floor": floor}
    if args.direct:
        steps["direct"] = direct_step(lm, copy.deepcopy(sae), tokens, args.layer)
    if args.peers:
        case = copy.deepcopy(sae), tokens, args.layer, lm.W_U.dtype
        steps["transformers"] = peers.transformers_step(args.config, *case)
    yield f"{args.b} x {args.t}", tokens.numel(), steps


def evaluate(args):
    lm, sae, tokens = spliced(args)
    encode, splices = encoder_product(sae, tokens.numel()), [METHODS["kl"](lm, sae.eval(), None)]

    @torch.no_grad()
    def floor():
        resid = lm.prefix(tokens, args.layer)
        unembed(lm, [lm.suffix(resid, args.layer) for _ in range(3)])  # original, zero, SAE
        encode()

    step = lambda: saeft.evaluate(lm, args.layer, tokens, splices)
    yield f"{args.b} x {args.t}", tokens.numel(), {"evaluate": step, "floor": floor}


def tokenise(args):
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts, tokenizer = [path.read_text("utf-8") for path in files], load_tokenizer(args.tokenizer)
    n_tokens = sum(map(len, tokenizer.encode_batch(texts, 1)))
    yield "", n_tokens, {"tokenise": lambda: tokenizer.encode_batch(texts, 1)}
