"""The other fine-tunes that the paper compares KL+MSE with. Each is what it trains and inserts.

    python experiments/baselines.py --method kl lora-sae lora-lm   # flags as for saeft.py

lora-sae             LoRA on the SAE's encoder and decoder, the SAE frozen
lora-lm              LoRA on the language model's matrices, the SAE frozen, KL to the original model
lora-lm-after        the same on the blocks after L alone
linear-adapter       x_hat + U V x_hat after the frozen SAE
mlp-adapter          x_hat + U ReLU(V x_hat + a) + c
kl+linear-adapter    + runs one method on the first half of the tokens, another on the rest
All start as the identity. The rank is --rank. The language model's own weights never change.
"""

import copy
import sys
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import saeft
from saeft import SAE, Acts, LanguageModel, Splice, times


class LoRA(nn.Module):
    """alpha / r B A dropout(x) (arXiv 2106.09685), plus layer(x) where it stands beside a layer."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float, layer: nn.Module = None):
        super().__init__()
        self.A, self.B = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)
        nn.init.zeros_(self.B.weight)
        self.layer, self.factor, self.dropout = layer, alpha / rank, nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.B(self.A(self.dropout(x.float()))) * self.factor
        return y if self.layer is None else self.layer(x) + y.to(x.dtype)


def lora_lm(lm: LanguageModel, rank: int, first_block: int) -> LanguageModel:
    """LoRA (alpha = r) on every matrix from a block on; shares lm's weights and leaves lm alone."""
    adapted = copy.deepcopy(lm, {id(p): p for p in lm.parameters()})
    for block in adapted.blocks[first_block:]:
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear):
                lora = LoRA(layer.in_features, layer.out_features, rank, rank, layer)
                parent, _, child = name.rpartition(".")
                block.get_submodule(parent).add_module(child, lora.to(layer.weight.device))
    return adapted


class LoRASAE(nn.Module):
    """LoRA (alpha = 32) on the encoder and the decoder of a frozen SAE."""

    def __init__(self, sae: SAE, rank: int):
        super().__init__()
        (d_sae, d_model), self.sae = sae.W_enc.shape, sae.requires_grad_(False)
        self.encoder, self.decoder = LoRA(d_model, d_sae, rank, 32), LoRA(d_sae, d_model, rank, 32)
        self.to(sae.W_enc.device)

    def forward(self, x: Tensor) -> tuple[Tensor, Acts]:
        sae, lora = self.sae, self.decoder
        centred = x.float() / sae.scale - sae.b_dec
        acts = sae.select(F.linear(centred, sae.W_enc, sae.b_enc) + self.encoder(centred))
        dropped = acts._replace(values=lora.dropout(acts.values))
        low_rank = lora.B(times(dropped, lora.A.weight.T.contiguous())) * lora.factor
        return (times(acts, sae.W_dec) + low_rank + sae.b_dec) * sae.scale, acts

    def merged(self) -> SAE:
        """An ordinary SAE with the same reconstructions."""
        sae, low_rank = copy.deepcopy(self.sae), lambda m: m.factor * m.B.weight @ m.A.weight
        sae.W_enc.data += low_rank(self.encoder)
        sae.W_dec.data += low_rank(self.decoder).T
        return sae


class Adapter(nn.Module):
    """x_hat + U act(V x_hat + a) + c after a frozen SAE; U and c are 0 at the start."""

    def __init__(self, sae: SAE, rank: int, mlp: bool):
        super().__init__()
        d_model, self.sae = len(sae.b_dec), sae.requires_grad_(False)
        self.V, self.U = nn.Linear(d_model, rank, bias=mlp), nn.Linear(rank, d_model, bias=mlp)
        self.act = nn.ReLU() if mlp else nn.Identity()
        for p in self.U.parameters():
            nn.init.zeros_(p)
        self.to(sae.W_enc.device)

    def forward(self, x: Tensor) -> tuple[Tensor, Acts]:
        x_hat, acts = self.sae.eval()(x)
        return x_hat + self.U(self.act(self.V(x_hat))), acts


def splice_lora_lm(lm, sae: SAE, config, first_block: int) -> Splice:
    adapted, own_prefix = lora_lm(lm, config.rank, first_block), first_block <= config.layer
    return Splice(sae.requires_grad_(False), adapted, "kl-only", own_prefix)


saeft.METHODS |= {
    "lora-sae": lambda lm, sae, config: Splice(LoRASAE(sae, config.rank), lm),
    "lora-lm": lambda lm, sae, config: splice_lora_lm(lm, sae, config, 0),
    "lora-lm-after": lambda lm, sae, config: splice_lora_lm(lm, sae, config, config.layer + 1),
    "linear-adapter": lambda lm, sae, config: Splice(Adapter(sae, config.rank, False), lm),
    "mlp-adapter": lambda lm, sae, config: Splice(Adapter(sae, config.rank, True), lm),
}

if __name__ == "__main__":
    sys.exit(saeft.main())
