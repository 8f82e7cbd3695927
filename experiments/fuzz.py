"""Damaged and hostile files for our readers, beside the reference libraries.

    python experiments/fuzz.py                                     # all of it, about 4 minutes
    python experiments/fuzz.py config tokenizer --cases 200 --seed 1 --tokenizers neox.json

The tensors of safetensors files; the logits of small Pythia, Gemma 2 and Gemma 3 models by their
config.json; the ids by tokenizer.json. What ours refuses must end in UserError, one line; what both
accept must mean the same; exit status 1 where that is not so. Files that fail are kept.
"""

import argparse
import copy
import json
import logging
import operator
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import model_loaders
import saeft
from model_loaders import DTYPES, GPT2_BYTES, UserError

SECONDS = 20  # that a reader may take for a file
FAILURES = {"exception", "wrong"}  # outcomes that must not occur
JUNK = [None, True, False, 0, 1, -1, 2, 0.5, float("nan"), float("inf"), 10**9, 2**31, 2**63]
JUNK += [2**70, "", "x", "16", " ", "▁", "\ud800", "NFC", "F32", "BF16", "gelu", "relu", "linear"]
JUNK += ["yarn", "full_attention", [], {}, [[]], [1], ["x"], {"x": 1}, [0, 0], [4, 2]]


# ---- What a file leads to ------------------------------------------------------------------------
def attempt(call):
    """What a call returns, or the exception that it ends in."""
    signal.alarm(SECONDS)
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the panics of Rust libraries are no Exception
        return error
    finally:
        signal.alarm(0)


def too_long(number, frame):
    raise SystemExit(f"more than {SECONDS} s")  # an Exception would become a UserError


def outcome(ours, theirs, same) -> str:
    """Of one file, which both read; theirs: None where the reference is not asked."""
    reference = attempt(theirs) if theirs else None
    mine = attempt(ours)
    refused = isinstance(mine, UserError) and "\n" not in str(mine) and len(str(mine)) < 600
    if isinstance(mine, BaseException) and not refused:
        print(f"  {mine!r:.300}")
        return "exception"
    if theirs is None:
        return "refused" if refused else "too large to run"
    if isinstance(reference, BaseException):
        return "refused by both" if refused else "accepted by ours alone"
    if refused:
        return "refused by ours alone"
    return "equal" if same(mine, reference) else "wrong"


def fuzz(part: str, make_cases, n_cases: int, seed: int) -> Counter:
    """The outcomes of the first files that a part makes."""
    counts = Counter()
    with tempfile.TemporaryDirectory() as folder:
        cases = make_cases(random.Random(seed), Path(folder))
        for number, case in enumerate(islice(cases, n_cases)):
            result = outcome(*case)
            counts[result] += 1
            if result in FAILURES:
                kept = Path(tempfile.gettempdir(), f"fuzz-{part}-{seed}-{number}")
                shutil.copytree(folder, kept, dirs_exist_ok=True)
                print(f"  {result}: {kept}", flush=True)
    return counts


# ---- Mutations -----------------------------------------------------------------------------------
def places(value) -> list[tuple]:
    """Every (container, key) in a JSON value."""
    keys = range(len(value)) if isinstance(value, list) else value
    own = [(value, key) for key in keys] if isinstance(value, (dict, list)) else []
    return own + [place for _, key in own for place in places(value[key])]


def mutate_json(root, rng: random.Random):
    """Drop, double, exchange or change something anywhere in a JSON value, in place."""
    container, key = rng.choice(places(root))
    other, other_key = rng.choice(places(root))
    value, kind = container[key], rng.randrange(6)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, list):
        container.insert(rng.randrange(len(container) + 1), value)
    elif kind < 4 and isinstance(value, (int, float)):
        near = [value + 1, value - 1, value * 2, value / 2, -value, float(value), str(value)]
        container[key] = rng.choice(near)
    elif kind < 5 and not places(value) and not places(other[other_key]):
        container[key], other[other_key] = other[other_key], value
    else:
        container[key] = copy.deepcopy(rng.choice(JUNK))


def mutate_bytes(data: bytes, rng: random.Random, upto: int) -> bytes:
    """Change, drop or insert bytes, in the first `upto` most of the time; or cut or lengthen it."""
    at = rng.choice([*rng.choices(range(upto), k=4), rng.randrange(len(data)), len(data)])
    n = rng.randint(1, 9)
    dropped, added = rng.choice([(1, 1), (n, 0), (0, n), (len(data), 0)])
    return data[:at] + rng.randbytes(added) + data[at + dropped :]


# ---- safetensors ---------------------------------------------------------------------------------
def safetensors_cases(rng: random.Random, folder: Path):
    path = folder / "x.safetensors"
    ours = partial(content, model_loaders.read_safetensors, path)
    theirs = partial(content, load_file, path)
    while True:
        path.write_bytes(mutated_safetensors(rng))
        yield ours, theirs, operator.eq


def content(read, path: Path) -> dict:
    """What a reader finds in a file, bit by bit."""
    found = {}
    for name, tensor in read(path).items():
        data = tensor.reshape(-1).view(torch.uint8)
        data = data > 0 if tensor.dtype == torch.bool else data
        found[name] = tensor.dtype, tensor.shape, data.tolist()
    return found


def mutated_safetensors(rng: random.Random) -> bytes:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name in "abcd"[: rng.randint(1, 4)]:
        dtype = rng.choice([*DTYPES])
        shape = rng.choices(range(4), k=rng.randint(0, 3))
        start = len(data)
        data += rng.randbytes(torch.Size(shape).numel() * DTYPES[dtype].itemsize)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, len(data)]}
    as_json = rng.random() < 0.6
    for _ in range(rng.randint(0, 2) if as_json else 0):
        mutate_json(header, rng)
    text = json.dumps(header).encode()
    if rng.random() < 0.05:
        text = text[:-1] + b"," + text[1:]  # each key twice
    if rng.random() < 0.2:
        text = rng.choice([b" ", b"\n", b""]) + text + rng.choice([b"   ", b"\0", b"x", b"\n"])
    whole = len(text).to_bytes(8, "little") + text + data
    return whole if as_json else mutate_bytes(whole, rng, 8 + len(text))


# ---- config.json ---------------------------------------------------------------------------------
LARGEST = 300_000  # parameters of a model that is run; of deep ones float32 is too coarse
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
PYTHIA = SIZES | {
    "model_type": "gpt_neox", "num_hidden_layers": 2, "max_position_embeddings": 64,
    "hidden_act": "gelu", "use_parallel_residual": True, "layer_norm_eps": 1e-5,
}  # fmt: skip
GEMMA = SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA_2 = GEMMA | CAPS | {"model_type": "gemma2", "sliding_window": 8}
GEMMA_3 = GEMMA | {"model_type": "gemma3_text", "sliding_window": 8}
TWO_TYPES = {"layer_types": ["sliding_attention", "full_attention"]}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 8.0}
ROPES = {"sliding_attention": PLAIN, "full_attention": {"rope_theta": 1e6, **LINEAR}}
CONFIGS = [  # each family in both spellings
    PYTHIA | {"rotary_pct": 0.25, "rotary_emb_base": 10000, "tie_word_embeddings": False},
    PYTHIA | {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
    GEMMA_2 | {"query_pre_attn_scalar": 24, "rope_theta": 1e4, "rms_norm_eps": 1e-6,
               "hidden_activation": "gelu_pytorch_tanh"},
    GEMMA_2 | TWO_TYPES | {"rope_parameters": PLAIN},
    GEMMA_3 | {"num_hidden_layers": 7, "query_pre_attn_scalar": 168, "sliding_window_pattern": 6,
               "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR},
    GEMMA_3 | TWO_TYPES | {"rope_parameters": ROPES, "use_bidirectional_attention": False,
                           "tie_word_embeddings": True},
]  # fmt: skip


def config_cases(rng: random.Random, folder: Path):
    logging.disable()
    transformers.logging.disable_progress_bar()
    for base in CONFIGS:
        assert outcome(*config_case(base, folder)) == "equal", base
    while True:
        config = copy.deepcopy(rng.choice(CONFIGS))
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            mutate_json(config, rng)
        if rng.random() < 0.2:  # a setting of another family or spelling beside its own
            key, value = rng.choice([*rng.choice(CONFIGS).items()])
            config[key] = value
        yield config_case(config, folder)


def config_case(config: dict, folder: Path) -> tuple:
    (folder / "config.json").write_text(json.dumps(config))
    lm = attempt(partial(our_model, folder))
    if isinstance(lm, BaseException) or sum(p.numel() for p in lm.parameters()) > LARGEST:
        return partial(our_model, folder), None, None  # the reference might fill the memory
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, p in lm.named_parameters():
        weights[name] = torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5
    save_file(weights, folder / "model.safetensors")
    return partial(our_logits, folder), partial(their_logits, folder), equal_logits


def our_model(folder: Path) -> saeft.LanguageModel:
    return saeft.build_lm(model_loaders.load_config(str(folder)))


def our_logits(folder: Path) -> torch.Tensor:
    lm = saeft.load_lm(str(folder))
    logits = lm(torch.arange(20)[None] % len(lm.W_U))
    assert logits.isfinite().all()
    return logits


@torch.no_grad()
def their_logits(folder: Path) -> torch.Tensor | None:
    """None where the weights are not just what the model wants."""
    options = {"attn_implementation": "eager", "output_loading_info": True}
    model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    logits = model(torch.arange(20)[None] % len(model.get_output_embeddings().weight)).logits
    return None if any(found.values()) else logits


def equal_logits(mine: torch.Tensor, theirs: torch.Tensor | None) -> bool:
    if theirs is None or mine.shape != theirs.shape:
        return False
    return torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


# ---- tokenizer.json ------------------------------------------------------------------------------
REFERENCE = f"""
import json, signal, sys, tokenizers
for line in sys.stdin:
    path, texts = json.loads(line)
    signal.alarm({SECONDS // 2})  # ends the process
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
        found = tokenizer.encode_batch(texts, add_special_tokens=False)
        print(json.dumps([encoding.ids for encoding in found]), flush=True)
    except BaseException as error:
        print(json.dumps(repr(error)), flush=True)
    signal.alarm(0)
"""


class Reference:
    """The reference library in a process of its own, since some files end the process."""

    process = None

    def encode(self, path: Path, texts: list[str]) -> list[list[int]]:
        if self.process is None or self.process.poll() is not None:
            command = [sys.executable, "-c", REFERENCE]
            self.process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True)
        self.process.stdin.write(json.dumps([str(path), texts]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
        answer = json.loads(line)
        if isinstance(answer, str):
            raise ValueError(answer)
        return answer


def our_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    return list(map(model_loaders.load_tokenizer(str(folder)).encode, texts))


def tokenizer_cases(rng: random.Random, folder: Path, paths: list):
    """Mutations of the embedded model's file and of `paths`, which are made smaller first."""
    paths = [Path(model_loaders.MODELS["tiny"], "tokenizer.json"), *paths]
    bases = [smaller(json.loads(Path(path).read_text("utf-8"))) for path in paths]
    reference = Reference()

    def case(data: bytes, texts: list[str]) -> tuple:
        path = folder / "tokenizer.json"
        path.write_bytes(data)
        return partial(our_ids, folder, texts), partial(reference.encode, path, texts), operator.eq

    for base, path in zip(bases, paths):
        unchanged = case(json.dumps(base).encode(), texts_for(base, [], rng))
        assert outcome(*unchanged) == "equal", path
    while True:
        yield case(*mutated_tokenizer(rng.choice(bases), rng))


def smaller(spec: dict) -> dict:
    """The same tokenizer with its first merged tokens only, and ids without a gap."""
    model, added = spec["model"], spec["added_tokens"][:60]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    letters = {*[token for token in model["vocab"] if len(token) == 1][:600]}
    made = dict.fromkeys(map("".join, merges))
    made = [token for token in made if letters >= {*token}]
    kept = {*letters, *made[:1000], *(token["content"] for token in added)}
    tokens = [token for token in model["vocab"] if token in kept or token.startswith("<0x")]
    vocab = {token: i for i, token in enumerate(tokens)}
    ids = dict(vocab)
    added = [token | {"id": ids.setdefault(token["content"], len(ids))} for token in added]
    merges = [pair for pair in merges if vocab.keys() >= {*pair, "".join(pair)}]
    return spec | {"added_tokens": added, "model": model | {"vocab": vocab, "merges": merges}}


def mutated_tokenizer(base: dict, rng: random.Random) -> tuple[bytes, list[str]]:
    """A changed file, and texts in which the change shows."""
    spec = copy.deepcopy(base)
    change = rng.choice([mutate_merges, mutate_ids, mutate_added, mutate_rest, mutate_rest])
    texts = texts_for(base, change(spec, rng), rng)
    data = json.dumps(spec).encode()
    return (mutate_bytes(data, rng, len(data)) if rng.random() < 0.1 else data), texts


def texts_for(base: dict, tokens: list[str], rng: random.Random) -> list[str]:
    """Texts that hold the given tokens, some others, and what is special to some reader."""
    tokens = tokens + rng.choices([*base["model"]["vocab"]], k=40)
    tokens += [token["content"] for token in base["added_tokens"][-9:]]
    texts = [*tokens, *map(readable, tokens)]
    texts += [f" {text}" for text in texts]
    for length in [*range(2, 10)] * 8:
        texts.append("".join(rng.choices(texts, k=length)))
    texts += [char * n for char in "\n\t e=" for n in (1, 2, 3, 5, 33)]
    return [*texts, "é e\u0301 日本 \u0001 <0x41>"]


def readable(token: str) -> str:
    if not GPT2_BYTES.keys() >= {*token}:
        return token.replace("▁", " ")
    return b"".join(map(GPT2_BYTES.get, token)).decode(errors="ignore")


def mutate_merges(spec: dict, rng: random.Random) -> list[str]:
    """Changes a specification, as all that follow do; returns tokens that this may concern."""
    merges = spec["model"]["merges"]
    at, other = rng.sample(range(len(merges)), 2)
    near = ["".join(pair) for pair in merges[max(0, at - 3) : at + 4]]
    pair, whole = merges[at], "".join(merges[at])
    cut = rng.randrange(1, len(whole))
    odd = rng.choice([pair * 2, pair[:1], "a b c", " ".join(pair), *JUNK])
    changed = [pair, pair[::-1], [whole[:cut], whole[cut:]], merges[other], odd]
    merges[at : at + 1] = rng.choice([[], [rng.choice(changed)]])
    if rng.random() < 0.5:  # the pair moves, or is there twice
        merges.insert(other, pair)
    return near


def mutate_ids(spec: dict, rng: random.Random) -> list[str]:
    vocab = spec["model"]["vocab"]
    one, other = rng.sample([*vocab], 2)
    longer = one + rng.choice(["x", " ", "▁", other])
    n, own = len(vocab), vocab.pop(one)
    wrong = rng.choice([vocab[other], n, n + 7, *JUNK])
    changes = [{}, {one: wrong}, {longer: own}, {one: own, longer: n}]
    vocab.update(rng.choice([*changes, {one: vocab[other], other: own}]))
    return [one, other, longer]


def mutate_added(spec: dict, rng: random.Random) -> list[str]:
    added, vocab = spec["added_tokens"], spec["model"]["vocab"]
    at = rng.randrange(len(added))
    one = added[at]
    flag = rng.choice(["single_word", "lstrip", "rstrip", "normalized", "special"])
    values = {
        "id": [one["id"] + 1, len(vocab), *JUNK],
        "content": ["", "x", " ", "▁▁", "é", "<td>", *rng.sample([*vocab], 20)],
        flag: [True, True, False, *JUNK],
    }
    key = rng.choice([*values])
    changed = one | {key: rng.choice(values[key])}
    added[at : at + rng.randint(0, 1)] = rng.choice([[], [one], [changed], [changed]])
    if rng.random() < 0.2:
        rng.shuffle(added)
    return [token["content"] for token in [one, changed, *added[:5]]]


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPACE = {"pattern": {"String": " "}}
PAD = {"direction": "Right", "strategy": {"Fixed": 99}, "pad_to_multiple_of": None}
SETTINGS = [
    ("truncation", {"max_length": 3, "strategy": "LongestFirst", "stride": 0}),
    ("padding", PAD | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}),
    ("normalizer", SPACE | {"type": "Replace", "content": "▁"}),
    ("pre_tokenizer", BYTES | {"use_regex": False}),
    ("pre_tokenizer", BYTES | {"add_prefix_space": True}),
    ("pre_tokenizer", SPACE | {"type": "Split", "behavior": "Isolated", "invert": True}),
]
SETTINGS += [("normalizer", {"type": name}) for name in ("NFC", "NFD", "Lowercase")]
SETTINGS += [(key, None) for key in ("normalizer", "pre_tokenizer", "decoder", "post_processor")]


def mutate_rest(spec: dict, rng: random.Random) -> list[str]:
    """Another setting, or a change anywhere; of the two long lists only as a whole."""
    model = spec["model"]
    long = {key: model.pop(key) for key in ("vocab", "merges")}
    if rng.random() < 0.4:
        spec.update([rng.choice(SETTINGS)])
    else:
        mutate_json(spec, rng)
    model.update(long)
    if rng.random() < 0.1:
        model[rng.choice([*long])] = rng.choice(JUNK)
    return []


# ---- All of it -----------------------------------------------------------------------------------
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("parts", nargs="*", help="default: safetensors config tokenizer")
    parser.add_argument("--cases", type=int, help="files of each (default: 5000, 3000, 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizers", nargs="+", default=[], help="more tokenizer.json files")
    args = parser.parse_args()
    parts = {
        "safetensors": (safetensors_cases, 5000),
        "config": (config_cases, 3000),
        "tokenizer": (partial(tokenizer_cases, paths=args.tokenizers), 2000),
    }
    if not parts.keys() >= {*args.parts}:
        parser.error(f"the parts are {', '.join(parts)}")
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, too_long)
    total = Counter()
    for part in args.parts or parts:
        make_cases, n_cases = parts[part]
        counts = fuzz(part, make_cases, args.cases or n_cases, args.seed)
        listed = ", ".join(f"{number:,} {result}" for result, number in counts.most_common())
        print(f"{part}: {counts.total():,} files: {listed}", flush=True)
        total += counts
    return 1 if FAILURES & total.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
