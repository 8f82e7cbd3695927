"""For bench.py --peers: the same steps in the public libraries, of which each is optional.

pip install sae-lens transformers einops nnsight simple-parsing natsort schedulefree wandb
pip install --no-deps dictionary-learning eai-sparsify

Each takes the same activations [N, D] or tokens [B, T], and does what saeft's step does: gradients,
clipping to norm 1, the decoder's projection and unit norm where the library has them, Adam.
"""

import itertools
import sys
import warnings

import torch
import torch.nn.functional as F
from bench_tools import dense_reconstruct
from torch import nn

import saeft

warnings.filterwarnings("ignore")


def adam_step(sae: nn.Module):
    """Clips the gradients of an SAE and takes a step of Adam as users of these libraries do."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-4)

    def step():
        nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def dictionary_learning(x, d_sae, k):
    from dictionary_learning.trainers.top_k import TopKTrainer

    numbers, device, shape = itertools.count(), str(x.device), (x.shape[1], d_sae, k)
    names = dict(layer=0, lm_name="", device=device, lr=2e-4)
    trainer = TopKTrainer(10**6, *shape, **names)
    return lambda: trainer.update(next(numbers), x.clone())  # it writes on its input


def sparsify(x, d_sae, k):
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=d_sae, k=k), device=x.device)
    adam = adam_step(coder)

    def step():
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam()
        coder.set_decoder_norm_to_unit_norm()

    return step


def sae_lens(x, d_sae, k):
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    config = TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=d_sae, k=k, device=str(x.device))
    sae, dead = TopKTrainingSAE(config), torch.zeros(d_sae, dtype=torch.bool, device=x.device)
    settings = dict(coefficients={}, dead_neuron_mask=dead, n_training_steps=1)
    batch, adam = TrainStepInput(x, **settings, is_logging_step=False), adam_step(sae)

    def step():
        sae.training_forward_pass(batch).loss.backward()
        adam()

    return step


def in_bfloat16(step):
    def cast_step():
        with torch.autocast("cuda", torch.bfloat16):
            step()

    return cast_step


def sae_steps(x, d_sae: int, k: int) -> dict:
    """{library: step} of those that are installed; on CUDA in bfloat16 too. Others are named."""
    steps = {}
    for library in (dictionary_learning, sparsify, sae_lens):
        try:
            steps[library.__name__] = step = library(x, d_sae, k)
        except ImportError as error:
            print(f"{library.__name__}: {error}", file=sys.stderr)
            continue
        if x.is_cuda:
            steps[f"{library.__name__} bf16"] = in_bfloat16(step)
    return steps


def transformers_step(config: dict, sae: saeft.SAE, tokens, layer: int, dtype):
    """Forward and backward of KL+MSE as with a hook on transformers: the whole model twice, full
    logits, eager attention, a dense SAE, autograd for all of it; no optimizer step."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    keys = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size".split()
    shape = GPTNeoXConfig(**{key: config[key] for key in keys}, rotary_pct=0.25)
    shape._attn_implementation = "eager"
    lm = GPTNeoXForCausalLM(shape).to(tokens.device, dtype).eval().requires_grad_(False)
    seen = {}

    def insert(module, inputs, output):
        resid = output[0] if isinstance(output, tuple) else output
        if "p" not in seen:
            return output
        x_hat = dense_reconstruct(sae, resid.float())
        seen["mse"] = F.mse_loss(x_hat, resid.float())
        x_hat = x_hat.to(resid.dtype)
        return (x_hat, *output[1:]) if isinstance(output, tuple) else x_hat

    lm.gpt_neox.layers[layer].register_forward_hook(insert)

    def step():
        with torch.no_grad():
            p = lm(tokens).logits.softmax(-1)
        seen["p"] = p
        log_q = lm(tokens).logits.log_softmax(-1)
        kl = F.kl_div(log_q.flatten(0, 1), p.flatten(0, 1), reduction="batchmean")
        (((seen["mse"] / (kl + 1e-8)).detach() * kl + seen["mse"]) / 2).backward()
        sae.zero_grad()
        seen.clear()

    return step
