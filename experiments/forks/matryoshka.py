"""Matryoshka SAEs (arXiv 2503.17547): the first latents alone must reconstruct x, too.

    python experiments/forks/matryoshka.py --sae matryoshka --k 16
    python experiments/forks/matryoshka.py --sae matryoshka-batchtopk --k 16

To the loss ||x - x_hat||^2 of all F latents come those of nested prefixes of them, each from the
same activations: sum_m ||x - x_hat_m||^2, x_hat_m = f[:m] W_dec[:m] + b_dec. In the fine-tune they
stand, over D, beside (beta KL + MSE) / 2, most of the loss: weigh them in `penalty` as you like.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str([*Path(__file__).parents][:3][-1]))
import saeft


class Nested:
    """The difference, to be set before a kind of SAE."""

    prefixes = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # shares of the latents

    def penalty(self, x, x_hat, f, weight, done):
        total = super().penalty(x, x_hat, f, weight, done)  # AuxK
        latent = torch.arange(len(self.b_enc), device=x.device)
        for share in self.prefixes:
            x_hat_m = (f * (latent < share * len(latent))) @ self.W_dec + self.b_dec
            total = total + weight @ (x - x_hat_m).pow(2).sum(-1)
        return total


class Matryoshka(Nested, saeft.TopK, kind="matryoshka", architecture="topk"):
    pass


class MatryoshkaBatchTopK(
    Nested, saeft.BatchTopK, kind="matryoshka-batchtopk", architecture="jumprelu"
):
    pass


if __name__ == "__main__":
    sys.exit(saeft.main())
