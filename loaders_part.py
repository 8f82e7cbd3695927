"""The loaders' part of the tests: safetensors, SAE files, tokenizers, token streams, a loopback
Hub, each against references that nobody here wrote: safetensors, tokenizers, sentencepiece, and
the real Hub client."""

import gzip
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import AddedToken, ByteLevelBPETokenizer

import model_loaders
from model_loaders import TokenStream, UserError, documents, held_out

safetensors = pytest.importorskip("safetensors.torch")
torch.set_num_threads(1)

# ---- Safetensors, SAE files --------------------------------------------------------------------


def child(code, *args, **env):
    """What a fresh Python printed as JSON, and nothing else; the code finds the loaders as L."""
    start = f"import json, os, sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    command = [
        sys.executable,
        "-c",
        f"{start}import model_loaders as L, torch\n{code}",
        *map(str, args),
    ]
    out = subprocess.run(command, env={**os.environ, **env}, capture_output=True, timeout=120)
    assert out.returncode == 0 and not out.stderr, out.stderr
    return json.loads(out.stdout)


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].equal(b[k]) for k in a)


def fails(words, call, *args):
    with pytest.raises(model_loaders.UserError) as error:
        call(*args)
    line = str(error.value)
    assert all(word in line for word in words) and "\n" not in line, line


def test_safetensors_round_trips_with_the_library(tmp_path):
    tensors, path = {"empty": torch.empty(0, 7), "scalar": torch.tensor(3.5)}, tmp_path / "a"
    tensors |= {"bool": torch.arange(5) > 2, "odd": torch.arange(5, dtype=torch.uint8)}
    tensors |= {"t": torch.randn(40, 30).T, "long": torch.randn(2**22 + 9).half()}  # two chunks
    for kind in "float64 bfloat16 int64 int32 int16 int8".split():
        tensors[kind] = (30 * torch.randn(3, 11, 5)).to(getattr(torch, kind))
    model_loaders.write_safetensors(path, tensors, {"k": "ä"})
    assert same(safetensors.load_file(path), tensors)
    assert safetensors.safe_open(path, "pt").metadata() == {"k": "ä"}
    safetensors.save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt"})
    assert same(model_loaders.read_safetensors(path, "cpu"), tensors)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}
    assert same(model_loaders.read_safetensors(path, "cpu", torch.bfloat16), half)


def one(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}, **more}


def raw(header, size=8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(size)


SHAPES = [[3], [-2], [-1, -2], [2.0], [True, 2], ["2"], [2**31] * 3, [2**59 + 2, 32], {"2": 1}]
EMPTY_SHAPES = [None, 2, "", {}, [0, 2**62, 2**62], [0, 2**70]]
SPANS = [[False, 8], [0.0, 8.0], [8, 0], [-8, 0], [4, 8], [0, 8, 8], [8], [], "08", 8, None]
HOSTILE = [
    ("no header", "header of 0 bytes", bytes(7)),
    ("a header longer than the file", "header of 3 bytes", raw(b"", 2, 3)),
    ("a header over 100 MB", "header of 100,000,001 bytes", raw(b"", 100_000_001, 100_000_001)),
    ("a header of 2**64 - 1", f"header of {2**64 - 1:,} bytes", raw(b"", 8, 2**64 - 1)),
    ("a list", "not a mapping", raw([1], 0)),
    ("no JSON", "Expecting", raw(b"{'a': 1}", 0)),
    ("NaN", "invalid literal", raw(one(more=float("nan")))),
    ("one name twice", "twice", raw(json.dumps(one())[:-1].encode() + b',"a":' + b"{}}")),
    (
        "half a character",
        "surrogates",
        raw(b'{"\\ud800": ' + json.dumps(one()["a"]).encode() + b"}"),
    ),
    ("Latin-1", "utf-8", raw(b'{"\xff": 1}', 0)),
    ("UTF-16", "utf-8", raw('{"a": 1}'.encode("utf-16"), 0)),
    ("deeply nested", "recursion", raw(b'{"a":' + b"[" * 200_000)),
    ("bytes at its end", "data of 9 bytes", raw(one(), 9)),
    ("too few bytes", "data of 7 bytes", raw(one(), 7)),
    ("an unknown dtype", "F31", raw(one("F31"))),
    ("no dtype", "None", raw(one(None))),
    ("a list of dtypes", "unhashable", raw(one(["F32"]))),
    ("no entry", "subscriptable", raw({"a": 3}, 0)),
    ("an empty entry", "data_offsets", raw({"a": {}}, 0)),
    *[(f"shape {x}", "'a' cannot be", raw(one(shape=x))) for x in SHAPES],
    *[(f"shape {x} of nothing", "", raw(one(shape=x, offsets=[0, 0]), 0)) for x in EMPTY_SHAPES],
    *[(f"offsets {x}", "", raw(one(offsets=x))) for x in SPANS],
    ("overlap", "'b' cannot be", raw(one(b=one(offsets=[4, 12])["a"]), 12)),
    ("the same place", "'b' cannot be", raw(one(b=one(offsets=[0, 8])["a"]), 8)),
    ("a hole", "'b' cannot be", raw(one(b=one(offsets=[12, 20])["a"]), 20)),
    ("a hole before", "'a' cannot be", raw(one(offsets=[4, 12]), 12)),
    ("more than there is", "data of", raw(one(shape=[2**50], offsets=[0, 2**52]))),
    *[(f"metadata {x}", "", raw(one(__metadata__=x))) for x in ("x", ["x"], {"a": 1}, {"": None})],
    (
        "an LFS pointer",
        "git lfs pull",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d",
    ),
]


@pytest.mark.parametrize(
    "word, content", [case[1:] for case in HOSTILE], ids=[c[0] for c in HOSTILE]
)
def test_hostile_safetensors_are_refused(tmp_path, word, content):
    path = tmp_path / "bad"
    path.write_bytes(content)
    fails(["cannot read", str(path), word], model_loaders.read_safetensors, path)


def test_sound_safetensors_of_the_same_kind_are_read(tmp_path):
    (tmp_path / "a").write_bytes(raw(one(b=one(offsets=[8, 16])["a"], __metadata__={}), 16))
    assert model_loaders.read_safetensors(tmp_path / "a").keys() == {"a", "b"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_only_regular_files_are_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    load = {
        "config.json": model_loaders.load_config,
        "model.safetensors": lambda folder: model_loaders.load_weights(folder, "cpu", None),
        "tokenizer.json": model_loaders.load_tokenizer,
    }
    fails([name, "not a regular file"], load[name], str(tmp_path))
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    fails([name, "not a regular file"], load[name], str(tmp_path))


PEAK = """
def peak(): return [int(l.split()[1]) for l in open("/proc/self/status") if "VmHWM" in l][0] * 1024
torch.ones(1000).bfloat16(); before = peak()
tensors = L.read_safetensors(L.Path(sys.argv[1]), "cpu", torch.bfloat16)
print((peak() - before) / sum(t.nbytes for t in tensors.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_while_loading(tmp_path):
    model_loaders.write_safetensors(tmp_path / "big", {"a": torch.zeros(5 * 10**7)}, {})
    assert 0.9 < child(PEAK, tmp_path / "big") < 1.3  # of the model's size in bfloat16


def test_folders(tmp_path):
    def load(call=model_loaders.load_config, *args):
        return call(str(tmp_path), *args)

    config, index = tmp_path / "config.json", tmp_path / "model.safetensors.index.json"
    weights = (model_loaders.load_weights, "cpu", torch.float32)
    fails(["has no config.json"], load)
    for content, reason in ((b"[]", "'list'"), (b"{", "Expecting"), (b"\xff{}", "utf-8")):
        config.write_bytes(content)
        fails(["config.json", reason], load)
    config.write_bytes(b'{"d": 1}')
    assert load() == {"d": 1}
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "cfg.json").write_text("{}")
    assert model_loaders.fetch(str(tmp_path), "deep/er/cfg.json").read_text() == "{}"
    fails(["has no model.safetensors", "safetensors files only"], load, *weights)
    x, y = {"a": torch.ones(2, 3), "b": torch.zeros(1)}, {"c": torch.ones(4)}
    model_loaders.write_safetensors(tmp_path / "x.safetensors", x, {})
    model_loaders.write_safetensors(tmp_path / "y.safetensors", y, {})
    where = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}
    bad = ["../x.safetensors", "/x.safetensors", "z/x.safetensors", "a.bin", "..", ["x"], 3, None]
    bad += ["\0.safetensors", "\ud800.safetensors", "x\n.safetensors"]
    for content in [3, {}, *({"weight_map": {**where, "a": file}} for file in bad)]:
        index.write_text(json.dumps(content))
        fails([index.name], load, *weights)
    index.write_text(json.dumps({"weight_map": {**where, "e": "y.safetensors"}}))
    fails(["lists 'e'"], load, *weights)
    index.write_text(json.dumps({"weight_map": where}))
    assert same(load(*weights), x | y)


NOWHERE = ["", "pythia-161m", "./no", "/no/folder", "~/no one", "a/b/c", "x\ny", "\0", "a@b"]


@pytest.mark.parametrize("name", NOWHERE)
def test_unknown_models(name):
    fails(["no folder and no Hub", "pythia-160m or tiny"], model_loaders.load_config, name)


def test_short_names():
    models = model_loaders.MODELS
    assert len(models) == 28 and models["pythia-1b-deduped"] == "EleutherAI/pythia-1b-deduped"
    assert models["gemma-2-9b"] == "google/gemma-2-9b"
    assert models["gemma-3-270m"] == "google/gemma-3-270m"
    assert models["gemma-3-12b"] == "google/gemma-3-12b-pt"


SAE_SHAPES = {"W_enc": (6, 20), "b_enc": (20,), "W_dec": (20, 6), "b_dec": (6,)}


def sae_folder(path, tensors=(), **cfg):
    """An SAE in SAELens's layout, with `tensors` and `cfg` changed."""
    torch.manual_seed(0)
    tensors = {k: torch.randn(shape) for k, shape in SAE_SHAPES.items()} | dict(tensors)
    cfg = {"architecture": "topk", "d_in": 6, "d_sae": 20, "k": 3, "metadata": {"x": "ü"}} | cfg
    model_loaders.write_safetensors(path / "sae_weights.safetensors", tensors, {}, cfg)
    return tensors, cfg


def test_an_interrupted_save_changes_nothing(tmp_path, monkeypatch):
    tensors, cfg = sae_folder(sae := tmp_path / "deep" / "sae")
    names = ["cfg.json", "sae_weights.safetensors"]
    for part in names:  # as a save that was killed leaves them
        (sae / f".{part}.part").write_text("half")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(os, "fsync", lambda file: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        sae_folder(sae, {"b_dec": torch.ones(6)}, k=4)
    assert sorted(os.listdir(sae)) == names
    assert same(safetensors.load_file(sae / names[1]), tensors)
    assert json.loads((sae / "cfg.json").read_text("utf-8")) == cfg
    fails(["cannot write", "cfg.json"], sae_folder, sae / "cfg.json" / "x")
    model_loaders.write_text(sae / "text", "ü")
    assert (sae / "text").read_bytes() == "ü".encode()
    fails(["cannot write"], model_loaders.write_text, sae, "x")


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu"])
def test_saes_are_read_as_they_were_written(tmp_path, architecture):
    threshold = {"threshold": torch.rand(20)} if architecture == "jumprelu" else {}
    tensors, cfg = sae_folder(tmp_path, threshold, architecture=architecture)
    read, read_cfg = model_loaders.read_sae(str(tmp_path))
    assert same(read, tensors) and read_cfg == cfg
    half, _ = sae_folder(tmp_path, {"b_dec": torch.ones(6).half()})
    assert model_loaders.read_sae(str(tmp_path))[0]["b_dec"].dtype == torch.float32


@pytest.mark.parametrize(
    "tensors, cfg, word",
    [
        ({}, {"architecture": "gated"}, "architecture 'gated' "),
        ({}, {"apply_b_dec_to_input": False}, "apply_b_dec_to_input False "),
        ({}, {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm True "),
        ({}, {"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm' "),
        ({}, {"reshape_activations": "hook_z"}, "reshape_activations 'hook_z' "),
        (
            {},
            {"activation_fn_str": "topk", "architecture": "standard"},
            "activation_fn_str 'topk' ",
        ),
        ({}, {"d_sae": 21}, "[6, 21]"),
        ({}, {"d_in": None}, "None"),
        ({}, {"architecture": "jumprelu"}, "'threshold': [20]"),
        ({"b_enc": torch.ones(19)}, {}, "[19]"),
        ({"extra": torch.ones(1)}, {}, "extra"),
        ({"W_dec": torch.full((20, 6), torch.nan)}, {}, "W_dec is not of finite numbers"),
        ({"b_dec": torch.ones(6, dtype=torch.int8)}, {}, "b_dec is not of finite numbers"),
    ],
)
def test_saes_that_cannot_be_read_as_they_are(tmp_path, tensors, cfg, word):
    sae_folder(tmp_path, tensors, **cfg)
    advice = f"python experiments/convert.py {tmp_path} FOLDER" if word.endswith(" ") else ""
    fails([str(tmp_path), word, advice], model_loaders.read_sae, str(tmp_path))


# ---- Tokenizers -------------------------------------------------------------------------------

NEOX_FILE = Path(__file__).parent.parent / "shared/tokenizers/neox.json"
WORLD = "été naïve Straße 日本語 пример 한국어 👩‍👩‍👧 e\u0301 ἀρχή שלום नमस्ते ทดสอบ "
WORDS = WORLD.split() + "the self def return x 's 'll 'LL it's 12345 007 <0x0A>".split()
CONTROL = "<|endoftext|> <|padding|> <pad> <eos> <bos> <unk>".split()
SYMBOLS = "<mask> [@BOS@] <unused0> <unused01> <start_of_turn> <table> <td> </td>".split()
RUNS = [c * n for c, first in (("\n", 1), ("▁", 2), ("\t", 2)) for n in range(first, 32)]
SPACES = [" ", "\n", "\t", "\r\n", "\r", "▁", "  ", "\n\n", "\u3000", "\xa0", "\u2028", "\x1f"]
MARKS = [chr(c) for c in range(0x110000) if unicodedata.combining(chr(c))]
BLOCKS = "0-7f 20-7f a0-600 900-e00 1100-1200 1e00-2100 2000-2070 4e00-a000 ac00-d7a4 f900-10000"
BLOCKS += " 11000-12000 1d100-1d200 1f300-1fa00 0-d800 e000-110000"
BLOCKS = [[int(end, 16) for end in block.split("-")] for block in BLOCKS.split()]
LONG = [char * 1_000_000 for char in ("a", " ", "\n", "▁")]
LIBRARY = sorted(Path(random.__file__).parent.glob("*.py"))
LIBRARY = "".join(path.read_text("utf-8", errors="replace") for path in LIBRARY)


def library(start: int, n_chars: int) -> list[str]:
    return [LIBRARY[i : i + 20_000] for i in range(start, start + n_chars, 20_000)]


def random_texts(n_chars: int, seed: int) -> list[str]:
    rng, pieces, some = random.Random(seed), [], lambda get, n: "".join(get() for _ in range(n))
    char = lambda: chr(rng.randrange(*rng.choice(BLOCKS)))  # noqa: E731
    while n_chars > 0:
        n = rng.randint(1, 70)
        pieces.append(rng.choice([
            lambda: some(char, n // 4),
            lambda: char() + some(lambda: rng.choice(MARKS), n // 16),  # NFC: marks in any order
            lambda: rng.choice(" \n\t▁ab-=*#.é") * n,
            lambda: some(lambda: rng.choice(SPACES), n // 5),
            lambda: rng.choice(CONTROL + SYMBOLS)[: rng.choice([2, 99, 99])],
            lambda: rng.choice(["", " ", "  ", "▁"]) + rng.choice(WORDS),
        ])())  # fmt: skip
        n_chars -= len(pieces[-1])
    return ["", *CONTROL, *("".join(pieces[i : i + 30]) for i in range(0, len(pieces), 30))]


def assert_same(spec: dict, texts: list[str]) -> model_loaders.Tokenizer:
    """Every id of every text equal, and the text of those; byte-level, of random ids too."""
    ours, reference = model_loaders.Tokenizer(spec), tokenizers.Tokenizer.from_str(json.dumps(spec))
    expected = [e.ids for e in reference.encode_batch_fast(texts, add_special_tokens=False)]
    for got, ids in zip(ours.encode_batch(texts, 2), expected, strict=True):
        if (got := got.tolist()) != ids:
            i = len(os.path.commonprefix([got, ids]))
            pytest.fail(
                f"{got[i:][:5]}, not {ids[i:][:5]}, after {reference.decode(ids[:i])[-40:]!r}"
            )
    rng = random.Random(0)
    samples = [ids for ids in expected[-20:] if len(ids) < 10_000]
    if not spec["model"].get("byte_fallback"):  # the last 5 are no token's
        samples += [rng.choices(range(ours.n_vocab + 5), k=rng.randint(0, 9)) for _ in range(300)]
    for ids in samples:
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=False), ids
    return ours


def train_byte_level(vocab_size: int, texts: list[str], normalizer=None, added=()) -> dict:
    tokenizer = ByteLevelBPETokenizer(unicode_normalizer=normalizer)
    tokenizer.train_from_iterator(texts, vocab_size, 2, False, ["<|endoftext|>"])
    tokenizer.add_tokens([AddedToken(text, normalized=normalized) for text, normalized in added])
    return json.loads(tokenizer.to_str())


def train_sentencepiece(vocab_size: int, texts: list[str], symbols: list[str]):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines()),
        model_writer=model, model_type="bpe", vocab_size=vocab_size, user_defined_symbols=symbols,
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", unk_piece="<unk>", minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def gemma_spec(sp, symbols: list[str], by_score: bool) -> dict:
    """`tokenizer.json` as transformers' GemmaConverter makes it: each split of a piece into two
    pieces is a merge, in the order of scores (user-defined symbols first) or of ids."""
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    pieces = ["\t" if p == "<0x09>" and "\t" not in pieces else p for p in pieces]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    pairs = [(p[:k], p[k:]) for p in vocab for k in range(1, len(p))]
    merges = [pair for pair in pairs if vocab.keys() >= {*pair}]
    sign, rank = (-1, lambda i: -sp.get_score(i)) if by_score else (1, lambda i: i)
    merges.sort(key=lambda lr: (rank(vocab[lr[0] + lr[1]]), sign * len(lr[0]), sign * len(lr[1])))
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized", "special"], False)
    added = pieces[:4] + [piece for piece in pieces[4:] if piece in symbols]
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    steps = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]
    bpe = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    merges = merges if by_score else [" ".join(pair) for pair in merges]
    return {
        "added_tokens": [{"id": vocab[p], "content": p} | flags for p in added],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": split | {"invert": False} if by_score else None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": bpe | {"vocab": vocab, "merges": merges},
    }


BYTE = train_byte_level(400, library(0, 20_000))
SMALL_SPM = train_sentencepiece(800, [WORLD * 3, *library(0, 20_000)], SYMBOLS)
GEMMA_LIKE = gemma_spec(SMALL_SPM, SYMBOLS, by_score=True)


# With test_byte_level_ids, 5.2 million characters are compared, not counting the long runs.
@pytest.mark.parametrize("symbols", [SYMBOLS + RUNS, SYMBOLS + RUNS[1:40:2]])
def test_gemma_ids(symbols):
    all_runs = len(symbols) > 60
    sp = train_sentencepiece(3000, library(0, 300_000) + [WORLD] * 200, symbols)
    texts = library(1_000_000, 850_000) + random_texts(850_000, 2)
    ours = assert_same(gemma_spec(sp, symbols, by_score=all_runs), texts + LONG * all_runs)
    assert (ours.n_vocab, ours.eos_id, ours.bos_id) == (3000, 1, 2)
    # SentencePiece itself finds no control tokens in a text, and takes a written ▁ for a space.
    plain = [text for text in texts if not any(word in text for word in ["▁", *CONTROL])]
    if all_runs:
        assert sum(map(len, plain)) > 700_000
        assert all(ours.encode(text) == sp.encode(text) for text in plain)


NEOX_ADDED = [*((" " * n, True) for n in range(2, 25)), ("<td>", True), ("<é>", True)]
OVERLAPPING = [("    ", False), ("<|padding|>", False), ("<|pad", True), ("\n", True)]


@pytest.mark.parametrize(
    "normalizer, added", [(None, []), ("nfc", NEOX_ADDED), (None, OVERLAPPING)]
)
def test_byte_level_ids(normalizer, added):
    spec = train_byte_level(2000, library(0, 200_000), normalizer, added)
    long = [] if added is OVERLAPPING else [run + end for run in LONG[:3] for end in ("", "x")]
    assert_same(spec, library(2_000_000, 300_000) + random_texts(300_000, 3) + long)


def test_lone_surrogates_and_fingerprint():
    ours, other = (
        model_loaders.Tokenizer(BYTE),
        model_loaders.Tokenizer(BYTE | {"normalizer": {"type": "NFC"}}),
    )
    assert ours.encode("a\ud800b\udc00\ud83d\ude00") == ours.encode("a\ufffdb\ufffd\U0001f600")
    assert ours.fingerprint == model_loaders.Tokenizer(json.loads(json.dumps(BYTE))).fingerprint
    assert ours.fingerprint != other.fingerprint


MERGES = BYTE["model"]["merges"]
GEMMA_MERGES = GEMMA_LIKE["model"]["merges"]
SEQUENCE = {"type": "Sequence", "normalizers": []}
LATE = len(GEMMA_MERGES) - 1
EXTRA = {"content": "<x>", "special": True} | dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
)


@pytest.mark.parametrize("base, path, value, says", [
    (BYTE, "model type", "WordPiece", "WordPiece"),
    (BYTE, "model dropout", 0.1, "dropout"),
    (BYTE, "model ignore_merges", True, "ignore_merges"),
    (BYTE, "model end_of_word_suffix", "</w>", "end_of_word_suffix"),
    (BYTE, "truncation", {"max_length": 5}, "truncation"),
    (BYTE, "padding", {"strategy": "BatchLongest"}, "padding"),
    (BYTE, "normalizer", {"type": "Lowercase"}, "Lowercase"),
    (BYTE, "normalizer", SEQUENCE, "Sequence"),
    (BYTE, "pre_tokenizer", {"type": "Split", "pattern": {"Regex": "\\d"}}, "Split"),
    (BYTE, "pre_tokenizer add_prefix_space", True, "add_prefix_space"),
    (BYTE, "pre_tokenizer use_regex", False, "use_regex"),
    (BYTE, "post_processor", {"type": "TemplateProcessing", "single": []}, "post_processor"),
    (BYTE, "added_tokens", [BYTE["added_tokens"][0] | {"lstrip": True}], "lstrip"),
    (BYTE, "added_tokens", BYTE["added_tokens"] * 2, "one twice"),
    (BYTE, "added_tokens", [BYTE["added_tokens"][0] | {"id": 1}], "do not follow"),
    (BYTE, "added_tokens", [*BYTE["added_tokens"], EXTRA | {"id": 401}], "do not follow"),
    (BYTE, "model vocab", {"<|endoftext|>": 0, "a": 1}, "vocabulary"),
    (BYTE, "model vocab", {"<|endoftext|>": 0, "a": 2}, "0, 1, 2"),
    (BYTE, "model vocab", {"<|endoftext|>": 0, "a": 1.0}, "0, 1, 2"),
    (BYTE, "model vocab", {"<|endoftext|>": 0, "a": float("nan")}, "invalid literal"),
    (BYTE, "model vocab", {"<|endoftext|>": 0, "\ud800": 1}, "cannot read"),
    (BYTE, "model merges", ["a b c"], "cannot read"),
    (BYTE, "model merges", MERGES[1:], "order of training"),
    (BYTE, "model merges", MERGES[20:] + MERGES[:20], "order of training"),
    (BYTE, "model merges", MERGES + MERGES[:1], "stand apart"),
    (GEMMA_LIKE, "normalizer content", "_", "'_'"),
    (GEMMA_LIKE, "model byte_fallback", False, "Replace"),
    (GEMMA_LIKE, "model vocab", {"<eos>": 0, "日": 1}, "do not follow"),
    (GEMMA_LIKE, "model merges", GEMMA_MERGES[:900] + GEMMA_MERGES[901:], "order of training"),
    (GEMMA_LIKE, "model merges", GEMMA_MERGES[::-1], "merges of"),
    (BYTE | {"added_tokens": []}, "model merges", [], "no token for some byte"),
])  # fmt: skip
def test_unreadable(tmp_path, base, path, value, says):
    spec = part = json.loads(json.dumps(base))
    *parents, key = path.split()
    for parent in parents:
        part = part[parent]
    part[key] = value
    if says.startswith("no token"):
        del spec["model"]["vocab"]["a"]
        spec["model"]["vocab"] = {t: i for i, t in enumerate(spec["model"]["vocab"])}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(model_loaders.UserError) as error:
        model_loaders.load_tokenizer(tmp_path)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", json.dumps(BYTE)[:-5]])
def test_damaged_file(tmp_path, text):
    if text:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(model_loaders.UserError, match="cannot read|has no tokenizer.json"):
        model_loaders.load_tokenizer(tmp_path)


STATED = [
    ({}, {}, "<|endoftext|>"),
    ({"eos_token": "</s>"}, {}, "</s>"),
    ({"eos_token": {"content": "</s>"}}, {"eos_token_id": 7}, "</s>"),
    ({}, {"eos_token_id": 7}, 7),
    ({"eos_token": None}, {"eos_token_id": [7, 8]}, 7),
    ({"eos_token": "<none>"}, {}, UserError),
    ({}, {"eos_token_id": 5000}, UserError),
]


@pytest.mark.parametrize("tokenizer_config, config, expected", STATED)
def test_the_end_of_text_is_what_the_folder_says(tmp_path, tokenizer_config, config, expected):
    spec = BYTE | {"added_tokens": [*BYTE["added_tokens"], EXTRA | {"id": 400, "content": "</s>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (tmp_path / "config.json").write_text(json.dumps(config))
    if expected is UserError:
        return fails(["end of text"], model_loaders.load_tokenizer, tmp_path)
    tokenizer = model_loaders.load_tokenizer(tmp_path)
    names = {"<|endoftext|>": 0, "</s>": 400}
    assert tokenizer.eos_id == names.get(expected, expected) and tokenizer.n_vocab == 401


def test_a_tokenizer_without_end_of_text():
    vocab = {("<end>" if t == "<|endoftext|>" else t): i for t, i in BYTE["model"]["vocab"].items()}
    spec = BYTE | {"model": BYTE["model"] | {"vocab": vocab}, "added_tokens": []}
    assert model_loaders.Tokenizer(spec, "<end>").eos_id == 0
    with pytest.raises(ValueError, match="end of text"):
        model_loaders.Tokenizer(spec)


REAL = [
    Path(os.environ.get("SAEFT_VOCABULARIES", "/none"), n, "tokenizer.json")
    for n in ("gemma2", "gemma3")
]


@pytest.mark.parametrize("path", [NEOX_FILE, *REAL], ids=["neox", "gemma2", "gemma3"])
def test_real_vocabularies(path):
    """Set SAEFT_VOCABULARIES to a folder with gemma2/tokenizer.json and gemma3/tokenizer.json."""
    if not path.exists():
        pytest.skip(f"{path} is not here")
    spec = json.loads(path.read_text("utf-8"))
    tokens = [token.replace("▁", " ") for token in spec["model"]["vocab"]]
    texts = library(0, 300_000) + random_texts(300_000, 4)
    texts += [f"<p>{word}</p> </td> > </b>  <i> x> y" for word in WORDS]
    texts += [" YYYY-MM-DD", " ======", "   the", " diffformul"] + tokens[::40]
    texts += [" " + token for token in tokens[::40]] + ["> " * 20_000]
    ours = assert_same(spec, texts + LONG + ["\n \r" * 300_000 + "x", "é" * 1_000_000 + " "])
    known = {"neox.json": (50277, 0, None), "gemma2": (256_000, 1, 2), "gemma3": (262_145, 1, 2)}
    found = (ours.n_vocab, ours.eos_id, ours.bos_id)
    assert found in known.values() and known.get(path.name, found) == found


def test_a_token_that_its_own_characters_do_not_make():
    """As Gemma 3's " YYYY": in its vocabulary, but the text becomes " Y", "YY", "Y"."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *model_loaders.SPM_BYTES, *"▁Ya"]
    made = ["YY", "▁Y", "▁YY", "▁YYY", "▁YYYY"]
    vocab = {token: i for i, token in enumerate(names + made)}
    splits = [(t[:n], t[n:]) for t in made for n in range(1, len(t))]
    merges = [pair for pair in splits if vocab.keys() >= {*pair}]
    model = GEMMA_LIKE["model"] | {"vocab": vocab, "merges": merges}
    added = [t for t in GEMMA_LIKE["added_tokens"] if t["id"] < 4]
    spec = GEMMA_LIKE | {"model": model, "added_tokens": added}
    assert_same(spec, [" " + "Y" * n + end for n in range(9) for end in ("", "a", " ")])
