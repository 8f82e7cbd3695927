"""Damaged and hostile files against the reference readers: what they refuse must end in UserError,
what is accepted must mean the same. Seeds are fixed; the counts are printed.

    python experiments/fuzz.py                    all of it, about 10 minutes
    python experiments/fuzz.py tokenizers 200     one part, with another number of files
    python experiments/fuzz.py tokenizers 2000 ../shared/tokenizers/neox.json gemma/tokenizer.json
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import model_loaders
from model_loaders import UserError

WRONG = ("exception", "wrong")  # outcomes that must not occur
JUNK = [None, True, False, 0, 1, -1, 2.5, float("nan"), 2**31, 2**63, 2**70, "", "x", "\ud800"]
JUNK += [[], {}, [[]], ["x"], {"x": 1}, "NFC", "F32", "BF16", [0, 0], [4, 2], "▁", " "]


def places(value, found=None):
    """Every (container, key) in a JSON value."""
    found = [] if found is None else found
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            places(value[key], found)
    return found


def mutate_json(value, rng: random.Random):
    """Change, drop, double or exchange something anywhere in a JSON value, in place."""
    container, key = rng.choice(places(value))
    kind = rng.randrange(4)
    if kind == 0:
        container[key] = rng.choice(JUNK)
    elif kind == 1:
        del container[key]
    elif kind == 2 and isinstance(container, list):
        container.insert(rng.randrange(len(container) + 1), container[key])
    else:
        other, other_key = rng.choice(places(value))
        if not places(other[other_key]) and not places(container[key]):
            container[key], other[other_key] = other[other_key], container[key]


def mutate_bytes(data: bytes, rng: random.Random, upto: int) -> bytes:
    """Change, drop or insert bytes, in the first `upto` most of the time; or cut or lengthen it."""
    data, kind = bytearray(data), rng.randrange(5)
    at = rng.randrange(max(1, min(upto, len(data)) if rng.random() < 0.8 else len(data)))
    if kind == 0:
        data[at] = rng.randrange(256)
    elif kind == 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del data[at : at + rng.randint(1, 9)]
    elif kind == 3:
        data[at:at] = rng.randbytes(rng.randint(1, 9))
    else:
        data = data[:at] if rng.random() < 0.5 else data + rng.randbytes(rng.randint(1, 9))
    return bytes(data)


def outcome(ours, reference, same) -> str:
    """What a file led to: `ours` and `reference` read it, `same` compares what they read."""
    try:
        mine = ours()
    except UserError as error:
        mine = error
    except BaseException as error:
        print(f"  {error!r:.200}")
        return "exception"
    try:
        theirs = reference()
    except BaseException:  # its panics are no Exception
        return "both refuse" if isinstance(mine, UserError) else "ours alone accepts"
    if isinstance(mine, UserError):
        return "ours alone refuses"
    return "both accept, equal" if same(mine, theirs) else "wrong"


# ---- safetensors -------------------------------------------------------------------------------


def fuzz_safetensors(n_files: int, seed: int = 0) -> Counter:
    import safetensors.torch

    rng, counts = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        for _ in range(n_files):
            path.write_bytes(mutated_safetensors(rng))
            counts[
                outcome(
                    lambda: model_loaders.read_safetensors(path),
                    lambda: safetensors.torch.load_file(path),
                    equal_tensors,
                )
            ] += 1
    return counts


def mutated_safetensors(rng: random.Random) -> bytes:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    codes = list(model_loaders.DTYPES)
    for name in "abcd"[: rng.randint(1, 4)]:
        dtype = rng.choice(codes)
        shape = [rng.randint(0, 3) for _ in range(rng.randint(0, 3))]
        tensor = torch.ones(shape, dtype=model_loaders.DTYPES[dtype])
        span = [len(data), len(data) + tensor.nbytes]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": span}
        data += tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    as_json, twice = rng.random() < 0.6, rng.random() < 0.05
    for _ in range(rng.randint(1, 2) if as_json else 0):
        mutate_json(header, rng)
    text = json.dumps(header).encode()
    if twice:  # a key that appears twice
        text = text[:-1] + b"," + text[1:]
    if rng.random() < 0.2:
        text = rng.choice([b" ", b"\n", b""]) + text + rng.choice([b"   ", b"\0", b"x", b"\n"])
    whole = len(text).to_bytes(8, "little") + text + data
    return whole if as_json else mutate_bytes(whole, rng, 8 + len(text))


def equal_tensors(mine: dict, theirs: dict) -> bool:
    return mine.keys() == theirs.keys() and all(
        mine[name].dtype == theirs[name].dtype
        and torch.equal(mine[name].view(torch.uint8), theirs[name].view(torch.uint8))
        if mine[name].dim()
        else torch.equal(mine[name], theirs[name])
        for name in mine
    )


# ---- tokenizer.json ----------------------------------------------------------------------------


REFERENCE = """
import json, sys, tokenizers
for line in sys.stdin:
    path, texts = json.loads(line)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(path)
        found = tokenizer.encode_batch(texts, add_special_tokens=False)
        print(json.dumps([encoding.ids for encoding in found]), flush=True)
    except BaseException as error:
        print(json.dumps(f"{error!r:.200}"), flush=True)
"""


class Reference:
    """The reference library in a process of its own, since some files end the process."""

    process = None

    def encode(self, path: Path, texts: list[str]) -> list[list[int]]:
        if self.process is None or self.process.poll() is not None:
            pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
            command = [sys.executable, "-c", REFERENCE]
            self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True, **pipes)
        self.process.stdin.write(json.dumps([str(path), texts]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '"the process has ended"')
        if isinstance(answer, str):
            if "ended" in answer:
                self.process.wait()
            raise ValueError(answer)
        return answer


def fuzz_tokenizers(n_files: int, seed: int = 0, paths: list = ()) -> Counter:
    """Mutations of the embedded model's file and of `paths`, which are made smaller first."""
    rng, counts, reference = random.Random(seed), Counter(), Reference()
    embedded = Path(model_loaders.MODELS["tiny"], "tokenizer.json")
    bases = [smaller(json.loads(Path(path).read_text("utf-8"))) for path in (embedded, *paths)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokenizer.json")
        for _ in range(n_files):
            base = rng.choice(bases)
            data, texts = mutated_tokenizer(base, rng)
            path.write_bytes(data)

            def ours():
                tokenizer = model_loaders.load_tokenizer(folder)
                return [tokenizer.encode(text) for text in texts]

            result = outcome(ours, partial(reference.encode, path, texts), list.__eq__)
            counts[result] += 1
            if result in WRONG:
                kept = Path(tempfile.gettempdir(), f"fuzz-{os.getpid()}-{sum(counts.values())}")
                kept.write_bytes(data)
                print(f"  {result}: {kept}")
    return counts


def smaller(spec: dict, n_tokens: int = 1000, n_added: int = 60) -> dict:
    """The same tokenizer with its first merged tokens only, and ids without a gap."""
    model, merges = (
        spec["model"],
        [
            tuple(merge.split(" ") if isinstance(merge, str) else merge)
            for merge in spec["model"]["merges"]
        ],
    )
    made = list(dict.fromkeys(left + right for left, right in merges))
    added = spec["added_tokens"][:n_added]
    short = [token for token in model["vocab"] if len(token) == 1][:600]
    named = [token for token in model["vocab"] if token.startswith("<0x")]
    letters = {*"".join(short)}
    kept = {*[t for t in made if letters >= {*t}][:n_tokens], *short, *named}
    kept |= {token["content"] for token in added} & model["vocab"].keys()
    vocab = {token: i for i, token in enumerate(t for t in model["vocab"] if t in kept)}
    ids = dict(vocab)
    added = [t | {"id": ids.setdefault(t["content"], len(ids))} for t in added]
    merges = [list(pair) for pair in merges if vocab.keys() >= {*pair, pair[0] + pair[1]}]
    return spec | {"added_tokens": added, "model": model | {"vocab": vocab, "merges": merges}}


def mutated_tokenizer(base: dict, rng: random.Random) -> tuple[bytes, list[str]]:
    """A changed file, and texts in which the change shows."""
    spec = json.loads(json.dumps(base))
    model = spec["model"]
    at = rng.randrange(len(model["merges"]))
    near = model["merges"][max(0, at - 3) : at + 4]
    change = rng.choice([mutate_merges, mutate_ids, mutate_added, mutate_settings, mutate_top])
    near = near + (change(spec, at, rng) or [])
    tokens = ["".join(pair) for pair in near] + rng.choices(list(base["model"]["vocab"]), k=40)
    tokens += [token["content"] for token in base["added_tokens"][-9:]]
    texts = [readable(token) for token in tokens]
    texts += [f" {text}" for text in texts]
    texts += ["".join(rng.choices(texts, k=rng.randint(2, 9))) for _ in range(60)]
    texts += [c * n for c in "\n\t e=" for n in (1, 2, 3, 5, 33)] + ["é e\u0301 日本 \u0001 <0x41>"]
    data = json.dumps(spec).encode()
    return (mutate_bytes(data, rng, len(data)) if rng.random() < 0.1 else data), texts


def readable(token: str) -> str:
    if {*token} <= model_loaders.GPT2_BYTES.keys():
        raw = b"".join(model_loaders.GPT2_BYTES[char] for char in token)
        return raw.decode(errors="ignore")
    return token.replace("▁", " ")


def mutate_merges(spec: dict, at: int, rng: random.Random):
    merges = spec["model"]["merges"]
    kind = rng.randrange(7)
    pair = merges[at]
    whole = "".join(pair)
    if kind == 0:
        del merges[at : at + rng.choice([1, 1, 1, 5])]
    elif kind == 1:
        merges.insert(rng.randrange(len(merges)), merges.pop(at))
    elif kind == 2:
        merges.insert(rng.randrange(len(merges)), pair)
    elif kind == 3:
        other = rng.randrange(len(merges))
        merges[at], merges[other] = merges[other], merges[at]
    elif kind == 4:
        cut = rng.randrange(1, len(whole))
        merges[at] = [whole[:cut], whole[cut:]]
    elif kind == 5:
        merges[at] = [pair[1], pair[0]]
    else:
        merges[at] = rng.choice([pair * 2, pair[:1], "a b c", " ".join(pair), *JUNK])


def mutate_ids(spec: dict, at: int, rng: random.Random):
    vocab = spec["model"]["vocab"]
    one, other = rng.sample(list(vocab), 2)
    kind = rng.randrange(5)
    if kind == 0:
        vocab[one], vocab[other] = vocab[other], vocab[one]
    elif kind == 1:
        vocab[one] = rng.choice([vocab[other], len(vocab), len(vocab) + 7, *JUNK])
    elif kind == 2:
        del vocab[one]
    elif kind == 3:
        vocab[one + rng.choice(["x", " ", "▁"])] = vocab.pop(one)
    else:
        vocab[one + other] = len(vocab)
    return [[one], [other], [one, other]]


def mutate_added(spec: dict, at: int, rng: random.Random):
    added = spec["added_tokens"]
    one = rng.choice(added)
    kind = rng.randrange(6)
    if kind == 0:
        one["id"] = rng.choice([one["id"] + 1, len(spec["model"]["vocab"]), *JUNK])
    elif kind == 1:
        added.append(dict(one, **rng.choice([{}, {"id": one["id"] + 1}, {"normalized": True}])))
    elif kind == 2:
        key = rng.choice(["single_word", "lstrip", "rstrip", "normalized", "special"])
        one[key] = rng.choice([True, True, False, *JUNK])
    elif kind == 3:
        one["content"] = rng.choice(["", "x", " ", "▁▁", "é", "<td>", *spec["model"]["vocab"]])
    elif kind == 4:
        added.remove(one)
    else:
        rng.shuffle(added)
    return [[token["content"]] for token in added[:5]] + [[str(one["content"])]]


def mutate_settings(spec: dict, at: int, rng: random.Random):
    nfc, replace = {"type": "NFC"}, {"type": "Replace", "pattern": {"String": " "}}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    sequence = {"type": "Sequence", "normalizers": []}
    key, value = rng.choice(
        [
            ("truncation", {"max_length": 3, "strategy": "LongestFirst", "stride": 0}),
            ("truncation", {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}),
            ("padding", {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None,
                         "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}),
            ("normalizer", None),
            ("normalizer", nfc),
            ("normalizer", sequence),
            ("normalizer", sequence | {"normalizers": [nfc]}),
            *(("normalizer", {"type": name}) for name in ("NFD", "NFKC", "Lowercase", "Nmt")),
            ("normalizer", replace | {"content": "▁"}),
            ("normalizer", replace | {"content": "_"}),
            ("normalizer", {"type": "Prepend", "prepend": "▁"}),
            ("pre_tokenizer", None),
            ("pre_tokenizer", level),
            ("pre_tokenizer", level | {"use_regex": False}),
            ("pre_tokenizer", level | {"add_prefix_space": True}),
            ("pre_tokenizer", {"type": "Whitespace"}),
            ("pre_tokenizer", {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": True}),
            ("pre_tokenizer", {"type": "Digits", "individual_digits": True}),
            ("decoder", None),
            ("post_processor", None),
        ]
    )  # fmt: skip
    if rng.random() < 0.4:
        key = rng.choice(["dropout", "unk_token", "continuing_subword_prefix", "fuse_unk"])
        key = rng.choice([key, "end_of_word_suffix", "byte_fallback", "ignore_merges", "type"])
        spec["model"][key] = rng.choice([0.5, "##", True, False, "WordPiece", *JUNK])
    else:
        spec[key] = value


def mutate_top(spec: dict, at: int, rng: random.Random):
    """Junk anywhere but in the two long lists."""
    vocab, merges = spec["model"].pop("vocab"), spec["model"].pop("merges")
    model = spec["model"]
    mutate_json(spec, rng)
    model.update(rng.choice([{"vocab": vocab}] * 9 + [{"vocab": rng.choice(JUNK)}]))
    model.update(rng.choice([{"merges": merges}] * 9 + [{"merges": rng.choice(JUNK)}]))


# ---- config.json: the language models -----------------------------------------------------------


# ---- All of it ----------------------------------------------------------------------------------

PARTS = {"safetensors": (fuzz_safetensors, 5000), "tokenizers": (fuzz_tokenizers, 2000)}


def main(argv: list[str]) -> int:
    failed = 0
    for name in argv[:1] or PARTS:
        fuzz, n_files = PARTS[name]
        n_files = int(argv[1]) if argv[1:] else n_files
        counts = fuzz(n_files, 0, argv[2:]) if argv[2:] else fuzz(n_files)
        listed = ", ".join(f"{number:,} {what}" for what, number in sorted(counts.items()))
        print(f"{name}: {n_files:,} files: {listed}")
        failed += sum(counts[what] for what in WRONG)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
