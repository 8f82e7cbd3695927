"""Other divergences between the model's predictions p and those with the SAE, q: --method

    kl-t2         KL(p || q) of both at temperature 2, times 2^2 (arXiv 1503.02531)
    reverse-kl    KL(q || p)
    ce            the cross entropy of q on the next token itself

    python experiments/forks/losses.py --method kl kl-t2 reverse-kl ce

Each is an expression of log p, log q [n, V] and the next tokens [n], and takes the place of KL in
(beta KL + MSE) / 2; gradients are autograd's.
"""

import sys
from pathlib import Path

import torch.nn.functional as F

sys.path.insert(0, str([*Path(__file__).parents][:3][-1]))
import saeft


def kl_at_2(log_p, log_q, next_token):
    log_p, log_q = (log_p / 2).log_softmax(-1), (log_q / 2).log_softmax(-1)
    return 4 * saeft.kl_divergence(log_p, log_q, next_token)


def reverse_kl(log_p, log_q, next_token):
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def next_token_ce(log_p, log_q, next_token):
    return F.nll_loss(log_q, next_token, reduction="none")  # 0 where there is none


saeft.METHODS["kl-t2"] = lambda lm, sae, config: saeft.Trainee(sae, lm, kl_at_2)
saeft.METHODS["reverse-kl"] = lambda lm, sae, config: saeft.Trainee(sae, lm, reverse_kl)
saeft.METHODS["ce"] = lambda lm, sae, config: saeft.Trainee(sae, lm, next_token_ce)

if __name__ == "__main__":
    sys.exit(saeft.main())
