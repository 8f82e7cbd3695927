"""Trains the embedded language model in assets/tiny: a small Pythia on Python source code.

    python experiments/make_tiny.py                            # about an hour on one CPU core
    python experiments/make_tiny.py --steps 500 --out /tmp/tiny    # a rough one

Data: the running Python's standard library and the .py files of its installed packages, half of
each batch from either. Files of the held-out split (`model_loaders.held_out`) are never trained on;
`saeft.py` evaluates on some of the same ones, which are shipped as text.jsonl.gz. Needs torch 2.9
(Muon) and the `tokenizers` package.
"""

import argparse
import gzip
import json
import random
import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from model_loaders import held_out, load_tokenizer, write_safetensors
from saeft import build_lm

STDLIB = sysconfig.get_paths()["stdlib"]
CONFIG = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "float16",
}


def source_files(folder: str) -> list[str]:
    """Texts of the Python files under a folder, each once, 40 million characters at most."""
    texts, size, paths = {}, 0, sorted(Path(folder).rglob("*.py"))
    random.Random(0).shuffle(paths)
    for path in paths:
        if folder == STDLIB and {"site-packages", "test", "tests", "idle_test"} & set(path.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if 200 < len(text) < 200_000 and size < 40_000_000:
            texts[text], size = None, size + len(text)
    return list(texts)


def write_text(path: Path, train: int = 1_700_000, held: int = 115_000) -> None:
    """The text that is shipped beside the model: modules of the standard library, as many as give
    so many tokens of either side (assets/tiny has those of Python 3.11.7)."""
    tokenizer, documents = load_tokenizer("tiny"), []
    left = {False: train, True: held}
    for text in source_files(STDLIB):
        side = held_out(text)
        if left[side] > 0:
            left[side] -= len(tokenizer.encode(text))
            documents.append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    with open(path, "wb") as raw, gzip.GzipFile("text.jsonl", "wb", 9, raw, mtime=0) as file:
        file.write("".join(documents).encode())


def train_tokenizer(texts: list[str], vocab: int):
    """A byte-level BPE in GPT-NeoX's form: NFC, the GPT-2 split pattern, <|endoftext|> = 0."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings = dict(vocab_size=vocab, special_tokens=["<|endoftext|>"])
    settings["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**settings))
    return tokenizer


def batch(sources: list[torch.Tensor], size: int, context: int) -> torch.Tensor:
    offsets = torch.arange(context + 1)
    picks = [
        s[torch.randint(len(s) - context, (size // len(sources), 1)) + offsets] for s in sources
    ]
    return torch.cat(picks).long()


def loss_of(lm, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(lm(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(lm, tokens: torch.Tensor, context: int) -> float:
    """Nats per token over the first 200 windows of held-out text."""
    windows = tokens[: 200 * (context + 1)].view(-1, context + 1).long()
    return sum(loss_of(lm, chunk).item() * len(chunk) for chunk in windows.split(20)) / len(windows)


def encode(tokenizer, texts: list[str]) -> torch.Tensor:
    """All documents as one row of ids, <|endoftext|> (0) after each."""
    ids = [i for encoding in tokenizer.encode_batch(texts) for i in (*encoding.ids, 0)]
    return torch.tensor(ids, dtype=torch.int16)


def initialise(lm, lr: float) -> list[torch.optim.Optimizer]:
    """GPT-2's initial weights; Muon for the matrices inside blocks, AdamW for the rest."""
    matrices, others = [], []
    for name, p in lm.named_parameters():
        if p.dim() == 2:
            last = name.endswith(("attention.dense.weight", "dense_4h_to_h.weight"))
            nn.init.normal_(p, std=0.02 / (2 * len(lm.blocks)) ** 0.5 if last else 0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        else:
            nn.init.ones_(p)
        (matrices if p.dim() == 2 and ".layers." in name else others).append(p)
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)]


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "assets/tiny")
    args = parser.parse_args()
    torch.manual_seed(0)
    sources = [source_files(folder) for folder in (STDLIB, sysconfig.get_paths()["purelib"])]
    train_texts = [[t for t in texts if not held_out(t)] for texts in sources]
    val_texts = [t for t in sources[0] if held_out(t)]
    tokenizer = train_tokenizer(sum(train_texts, [])[::3], CONFIG["vocab_size"])
    train, val = [encode(tokenizer, texts) for texts in train_texts], encode(tokenizer, val_texts)
    per_token = sum(len(t.encode()) for t in val_texts) / len(val)
    print(f"{sum(map(len, train)):,} training tokens, {per_token:.2f} bytes per token", flush=True)

    lm = build_lm(CONFIG).to_empty(device="cpu")
    optimizers = initialise(lm, args.lr)
    for step in range(args.steps):
        # Warm up over 100 steps, hold, then fall linearly to 0 over the last half.
        factor = min((step + 1) / 100, 1.0, (args.steps - step) / (0.5 * args.steps))
        loss = loss_of(lm, batch(train, args.batch, args.context))
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * factor
            optimizer.step()
            optimizer.zero_grad()
        if step % 250 == 249:
            held, cpu = evaluate(lm, val, args.context), time.process_time() / 60
            seen = (step + 1) * args.batch * args.context
            print(
                f"{cpu:.1f} CPU minutes, {seen / 1e6:.1f}M tokens: {loss:.3f}, {held:.4f}",
                flush=True,
            )
    held = evaluate(lm, val, args.context)
    print(f"held out: {held:.4f} nats per token, {held / per_token:.4f} per byte")
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(args.out / "tokenizer.json"))
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    weights = {name: p.detach().half() for name, p in lm.named_parameters()}
    write_safetensors(args.out / "model.safetensors", weights, {"format": "pt"})
    write_text(args.out / "text.jsonl.gz")


if __name__ == "__main__":
    main()
