"""JumpReLU with trained thresholds (arXiv 2407.14435), K latents a token on average.

    python experiments/forks/jumprelu.py --sae jumprelu --k 16

f = z where z > theta, else 0, of pre-activations z. Neither f nor the number of active latents has
a useful derivative by theta, so both take that of a rectangle of width eps around it:
    df / dtheta = -theta / eps,  dL0 / dtheta = -1 / eps    where |z - theta| < eps / 2
In place of lambda L0 the loss has (L0 / K - 1)^2 times mean ||x||^2, which holds the L0 of each
GPU at K, in a fine-tune at what it was before (the same paper's appendix on training to a target
sparsity). Files are those of any JumpReLU.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str([*Path(__file__).parents][:3][-1]))
import saeft


class Jump(torch.autograd.Function):
    """z [N, F] or, with `count`, 1, where z > theta [F]."""

    @staticmethod
    def forward(ctx, z, theta, eps, count: bool):
        ctx.save_for_backward(z, theta, eps)
        ctx.count = count
        return (z > theta) * (torch.ones_like(z) if count else z)

    @staticmethod
    def backward(ctx, g):
        z, theta, eps = ctx.saved_tensors
        near = ((z - theta).abs() < eps / 2) / eps
        by_theta = -(g * near).sum(0) * (1 if ctx.count else theta)
        return None if ctx.count else g * (z > theta), by_theta, None, None


class JumpReLU(saeft.JumpReLU, kind="jumprelu"):
    numbers = ("k", "eps")
    scaled = ("b_enc", "b_dec", "threshold", "eps")

    def __init__(self, *args, eps: float = 0.0, **kwargs):
        super().__init__(*args, **kwargs)
        del self.threshold
        self.threshold = nn.Parameter(torch.full_like(self.b_enc, 0.1))
        self.register_buffer("eps", torch.tensor(eps))

    def start(self, x, config):
        saeft.SAE.start(self, x, config)
        self.eps.copy_(0.05 * x.pow(2).sum(-1).mean().sqrt())

    def encode(self, x, keep=None):
        z = nn.functional.linear(x - self.b_dec, self.W_enc, self.b_enc).relu()  # [N, F]
        if keep is not None:
            z = z * keep[:, None]
        f = Jump.apply(z, self.threshold, self.eps, False)
        f.pre_activations = z  # for the penalty
        return f

    def penalty(self, x, x_hat, f, weight, done):
        theta = self.threshold.clamp_min(0)  # z is never below it
        on = Jump.apply(f.pre_activations, theta, self.eps, True)
        l0 = (weight * on.sum(-1)).sum()
        return (l0 / (self.l0_target or self.k) - 1) ** 2 * (weight @ x.pow(2).sum(-1))


if __name__ == "__main__":
    sys.exit(saeft.main())
