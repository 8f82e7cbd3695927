"""Mutated config.json files of small Pythia, Gemma 2 and Gemma 3 models: whatever is wrong must end in
UserError, and what transformers accepts too must give the same logits. Prints the counts.

    python experiments/fuzz_config.py            # 3,000 files with a fixed seed, some minutes
"""

import json
import logging
import random
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import safetensors.torch
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import saeft
from model_loaders import UserError

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
GEMMA = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
GEMMA_2 = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "num_hidden_layers": 2}
SLIDING = {"sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}}
ROPES = {**SLIDING, "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}}
PYTHIA = {"model_type": "gpt_neox", **SIZES, "num_hidden_layers": 2, "layer_norm_eps": 1e-5}
PYTHIA.update(hidden_act="gelu", use_parallel_residual=True, max_position_embeddings=64)
CONFIGS = [  # both spellings of each family
    {**PYTHIA, "rotary_pct": 0.25, "rotary_emb_base": 10000, "tie_word_embeddings": False},
    {
        **PYTHIA,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
        },
    },
    {
        "model_type": "gemma2",
        **GEMMA,
        **GEMMA_2,
        "query_pre_attn_scalar": 24,
        "rope_theta": 10000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
    },
    {
        "model_type": "gemma2",
        **GEMMA,
        **GEMMA_2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    {
        "model_type": "gemma3_text",
        **GEMMA,
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 168,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    {
        "model_type": "gemma3_text",
        **GEMMA,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": ROPES,
        "use_bidirectional_attention": False,
        "tie_word_embeddings": True,
    },
]
JUNK = [None, True, False, 0, 1, -1, 2, 2.5, 1e-9, float("nan"), float("inf"), 10**9, 2**31, 2**70]
JUNK += [
    "",
    "x",
    "16",
    "gelu",
    "relu",
    "linear",
    "yarn",
    "full_attention",
    [],
    {},
    [1],
    ["x"],
    {"x": 1},
]
SECONDS = 20  # that one file may take
LARGEST = 2_000_000  # parameters of a model that is run


def places(value) -> list[tuple]:
    """Every (container, key) in a JSON value."""
    keys = (
        range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
    )
    return [(value, key) for key in keys] + [p for key in keys for p in places(value[key])]


def mutated(config: dict, rng: random.Random) -> dict:
    """A copy with one to three values changed, dropped, or taken from somewhere else."""
    config = json.loads(json.dumps(config))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        container, key = rng.choice(places(config))
        value = container[key]
        kind = rng.randrange(4)
        if kind == 0 or not isinstance(value, (int, float)) and kind < 3:
            container[key] = rng.choice(JUNK)
        elif kind == 1:
            container[key] = rng.choice(
                [
                    value * 2,
                    value + 1,
                    value - 1,
                    -value,
                    value / 2,
                    float(value),
                    str(value),
                    value * 7,
                ]
            )
        elif kind == 2:
            other = rng.choice(
                rng.choice(CONFIGS + [GEMMA_2 | ROPES]).copy().popitem()[:1] + tuple(GEMMA)
            )
            container[key] = GEMMA.get(other, value)
        else:
            del container[key]
    if rng.random() < 0.2:  # settings of another family or spelling beside its own
        other = rng.choice(CONFIGS)
        key = rng.choice(list(other))
        config[key] = other[key]
    return config


def theirs(config: dict, folder: Path):
    """transformers' model of a config.json, with random weights, which are written beside it."""
    parsed = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(
        parsed, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model.float()


@torch.no_grad()
def outcome(config: dict, folder: Path) -> str:
    """What a config.json leads to."""
    text = json.dumps(config)
    (folder / "config.json").write_text(text)
    try:
        lm = saeft.build_lm(saeft.model_loaders.load_config(str(folder)))
    except UserError as error:
        return "refused" if "\n" not in str(error) and len(str(error)) < 600 else "exception"
    if sum(p.numel() for p in lm.parameters()) > LARGEST:
        return "accepted, too large to run"
    tokens = torch.arange(20)[None] % len(lm.W_U)
    try:
        model = theirs(config, folder)
        logits = model(tokens).logits
    except Exception as error:
        lm.to_empty(device="cpu")
        for p in lm.parameters():
            p.uniform_(-0.1, 0.1)
        finite = lm(tokens).isfinite().all()
        return f"accepted by ours alone ({type(error).__name__})" if finite else "not finite"
    try:
        ours = saeft.load_lm(str(folder))(tokens)
    except UserError as error:
        return "refused" if "\n" not in str(error) else "exception"
    same = torch.allclose(ours, logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())
    return "same logits" if same else "wrong logits"


def too_long(number, frame):
    raise TimeoutError


def fuzz_configs(count: int = 3000, seed: int = 0) -> Counter:
    """Outcomes of so many mutations; those that must not occur are printed."""
    rng, outcomes = random.Random(seed), Counter()
    warnings.simplefilter("ignore")
    logging.disable()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as folder:
        for base in CONFIGS:
            assert outcome(base, Path(folder)) == "same logits", base
        for number in range(count):
            base = CONFIGS[number % len(CONFIGS)]
            config = mutated(base, rng)
            signal.alarm(SECONDS)
            try:
                result = outcome(config, Path(folder))
            except TimeoutError:
                result = "hang"
            except Exception as error:
                result = f"exception {type(error).__name__}"
            signal.alarm(0)
            outcomes[result] += 1
            if result.startswith(("exception", "hang", "wrong", "not finite")):
                keys = {*config, *base}
                changed = {
                    key: config.get(key, "dropped")
                    for key in keys
                    if config.get(key, "dropped") != base.get(key, "dropped")
                }
                print(f"{result}: {base['model_type']} with {changed}", flush=True)
    return outcomes


if __name__ == "__main__":
    counts = fuzz_configs(int(sys.argv[1]) if len(sys.argv) > 1 else 3000)
    for name, number in counts.most_common():
        print(f"{number:6} {name}")
