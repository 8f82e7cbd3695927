"""The other fine-tunes that the paper compares KL+MSE with. Each is what it trains and inserts.

    python experiments/baselines.py --method kl lora-sae lora-lm --rank 16   # flags as saeft.py's

kl-only            KL on the SAE, and its kind's penalty over beta, without the MSE
lora-sae           LoRA on the SAE's encoder and decoder, the SAE frozen
lora-lm            LoRA on the language model's matrices, the SAE frozen, KL to the original model
lora-lm-after      the same on the blocks after L alone
linear-adapter     x_hat + U V x_hat after the frozen SAE
mlp-adapter        x_hat + U ReLU(V x_hat + a) + c
All start as the identity; the language model's own weights never change. What a run saves:
lora-sae as an ordinary SAE; of the others adapter.safetensors beside the SAE (`load` reads both).
"""

import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import saeft
from model_loaders import expanded, flag, read_safetensors, refuse, write_safetensors
from saeft import PLACES, SAE, LanguageModel, Trainee, activate, single


@dataclass
class Settings(saeft.Config):
    rank: int = flag(16, "rank of LoRA and adapters", 1)


class LoRA(nn.Module):
    """alpha / r B A dropout(x) (arXiv 2106.09685), plus layer(x) where it stands beside a layer."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float, layer: nn.Module = None):
        super().__init__()
        self.A = nn.Linear(d_in, rank, bias=False)
        self.B = nn.Linear(rank, d_out, bias=False)
        nn.init.zeros_(self.B.weight)
        self.layer, self.factor, self.dropout = layer, alpha / rank, nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.B(self.A(self.dropout(single(x)))) * self.factor
        return y if self.layer is None else self.layer(x) + y.to(x.dtype)

    def matrix(self) -> Tensor:
        return self.factor * self.B.weight @ self.A.weight


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
        d_sae, d_model = sae.W_enc.shape
        other = type(sae).encode is not SAE.encode
        refuse(other, f"--method lora-sae: a {sae.kind} SAE encodes in a way of its own")
        self.sae = sae.requires_grad_(False)
        self.encoder = LoRA(d_model, d_sae, rank, 32)
        self.decoder = LoRA(d_sae, d_model, rank, 32)
        self.to(sae.W_enc.device)

    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        sae = self.sae
        centred = single(x) - sae.b_dec
        pre = F.linear(centred, sae.W_enc, sae.b_enc) + self.encoder(centred)  # [N, F]
        pre = pre.masked_fill(~keep[:, None], -torch.inf)
        f = activate(pre, sae.select(pre.detach()))
        return f @ sae.W_dec + self.decoder(f) + sae.b_dec, f

    @torch.no_grad()
    def merged(self) -> SAE:
        """An ordinary SAE with the same reconstructions."""
        sae = copy.deepcopy(self.sae)
        sae.W_enc += self.encoder.matrix()
        sae.W_dec += self.decoder.matrix().T
        return sae


class Adapter(nn.Module):
    """x_hat + U act(V x_hat + a) + c after a frozen SAE; U and c are 0 at the start."""

    def __init__(self, sae: SAE, rank: int, mlp: bool):
        super().__init__()
        d_model = len(sae.b_dec)
        self.sae = sae.requires_grad_(False)
        self.V = nn.Linear(d_model, rank, bias=mlp)
        self.U = nn.Linear(rank, d_model, bias=mlp)
        self.act = nn.ReLU() if mlp else nn.Identity()
        for p in self.U.parameters():
            nn.init.zeros_(p)
        self.to(sae.W_enc.device)

    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        x_hat, f = self.sae.eval()(x, keep)
        return x_hat + self.U(self.act(self.V(x_hat))), f


class KLOnly(Trainee):
    def loss(self, kl, mse, beta, penalty):
        # The penalty stands beside an MSE, and beta KL is as large.
        return kl + penalty / beta.clamp_min(1e-8)


@dataclass
class Baseline(Trainee):
    """A trainee that is saved as what it is: merged, or as an SAE and an adapter beside it."""

    method: str = ""
    rank: int = 0

    def save(self, folder: Path, metadata: dict) -> None:
        if self.method == "lora-sae":
            self.trained.merged().save(folder, metadata)
            return
        self.sae.save(folder, {**metadata, "adapter": self.method})
        state = self.state_dict()["trained"]
        state = {k: v for k, v in state.items() if not k.startswith("sae.")}
        told = {"method": self.method, "rank": str(self.rank)}
        write_safetensors(folder / "adapter.safetensors", state, told)


class AdaptedModel(Baseline):
    """LoRA on the language model, on KL alone; its own blocks 0..L may differ, too."""

    def loss(self, kl, mse, beta, penalty):
        return kl

    def splice(self, tokens, resid, x, keep, config):
        if self.method == "lora-lm":
            resid, x = PLACES[config.place](self.lm, tokens, config.layer)
        return super().splice(tokens, resid, x, keep, config)


def build(method: str, lm: LanguageModel, sae: SAE, layer: int, rank: int) -> Trainee:
    """What a method trains, from an SAE."""
    named = {"method": method, "rank": rank}
    if method == "lora-sae":
        return Baseline(sae, lm, insert=LoRASAE(sae, rank), **named)
    if method in ("linear-adapter", "mlp-adapter"):
        return Baseline(sae, lm, insert=Adapter(sae, rank, method == "mlp-adapter"), **named)
    first = 0 if method == "lora-lm" else layer + 1
    adapted = lora_lm(lm, rank, first)
    sae.requires_grad_(False)
    return AdaptedModel(sae, adapted, trained=adapted, **named)


def load(folder: str | Path, lm: LanguageModel, layer: int) -> Trainee:
    """What a run of a baseline saved: it gives the figures that the run reported."""
    path, sae = expanded(folder) / "adapter.safetensors", SAE.load(folder)
    if not path.exists():
        return Trainee(sae, lm)
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    trainee = build(header["method"], lm, sae, layer, int(header["rank"]))
    trainee.trained.load_state_dict(read_safetensors(path), strict=False)
    trainee.trained.eval()
    return trainee


def method(name: str):
    return lambda lm, sae, config: build(name, lm, sae, config.layer, config.rank)


NAMES = ("lora-sae", "lora-lm", "lora-lm-after", "linear-adapter", "mlp-adapter")
saeft.METHODS.update({name: method(name) for name in NAMES})
saeft.METHODS["kl-only"] = lambda lm, sae, config: KLOnly(sae, lm)

if __name__ == "__main__":
    sys.exit(saeft.main(settings=Settings))
