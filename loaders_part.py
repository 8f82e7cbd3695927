"""The loaders' part of the tests: safetensors, SAE files, tokenizers, token streams, a loopback
Hub, each against references that nobody here wrote: safetensors, tokenizers, sentencepiece, and
the real Hub client."""

import gzip
import hashlib
import inspect
import io
import json
import os
import random
import re
import shutil
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

import huggingface_hub
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
    (GEMMA_LIKE, "model merges", GEMMA_MERGES[:185] + GEMMA_MERGES[186:], "order of training"),
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


# ---- Token streams ----------------------------------------------------------------------------


class Bytes:
    """A tokenizer: one id for each byte, 0 ends a document."""

    eos_id, bos_id, n_vocab, fingerprint, calls, fail = 0, None, 256, "bytes", 0, None

    def __init__(self, **changes):
        vars(self).update(changes)

    def encode_batch(self, texts, threads):
        self.calls += 1
        if self.fail:
            raise self.fail
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint32) for text in texts]


def texts(count=400, size=40, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh \n", k=size)).strip() + "x" for _ in range(count)]


def jsonl(lines):
    return "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()


def joined(lines, held):
    return b"".join(line.encode() + b"\0" for line in lines if held_out(line) == held)


def ids(sequences):
    return bytes(sequences.flatten().tolist())


@pytest.fixture
def stream(tmp_path):
    """Make token streams with a cache of this test's own, and close them after it."""
    made = []

    def make(data, tokenizer=None, context=16, train=1600, val=160, cache=tmp_path, **options):
        tokenizer = tokenizer or Bytes()
        made.append(TokenStream(str(data), tokenizer, context, train, val, cache, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def lines_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts()))
    return tmp_path / "a.jsonl"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.gz"])
def test_streams_are_the_documents_end_to_end(tmp_path, stream, name):
    data = jsonl(texts())
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    s = stream(tmp_path / name)
    rows = s.train(0, 100)
    assert rows.dtype == torch.int64 and rows.shape == (100, 16) and s.n_train == 100
    assert ids(rows) == joined(texts(), False)[:1600] and torch.equal(s.train(7, 3), rows[7:10])
    assert ids(s.validation()) == joined(texts(), True)[:160]


def test_bos_opens_each_sequence_and_none_stands_in_the_middle(tmp_path, lines_file, stream):
    rows = stream(lines_file, Bytes(bos_id=7)).train(0, 100)
    assert (rows[:, 0] == 7).all() and ids(rows[:, 1:]) == joined(texts(), False)[:1500]
    (tmp_path / "b.jsonl").write_bytes(jsonl([text + "\7 \7" for text in texts()]))
    rows = stream(tmp_path / "b.jsonl", Bytes(bos_id=7)).train(0, 100)
    assert (rows[:, 0] == 7).all() and not (rows[:, 1:] == 7).any()
    np.array([7, 1, 2, 3] * 2000, np.uint16).tofile(tmp_path / "c.bin")
    rows = stream(tmp_path / "c.bin", Bytes(bos_id=7), train=900).train(0, 50)
    assert (rows[:, 0] == 7).all() and not (rows[:, 1:] == 7).any()


def test_ids_that_the_tokenizer_lacks(lines_file, stream):
    wide = stream(lines_file, Bytes(n_vocab=70_000, fingerprint="wide"))
    assert ids(wide.train(0, 100)) == joined(texts(), False)[:1600]
    with pytest.raises(UserError, match="holds id 120: give --data that is tokenised"):
        stream(lines_file, Bytes(n_vocab=100)).train(0, 9)


PARAGRAPH = "word " * 400 + "\n\n"
ONE_LINE = "".join(f"{i} of one line, " for i in range(200_000))


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.txt", ONE_LINE),
        ("a.txt", ONE_LINE.replace(", ", "\r")),
        ("a.txt", ONE_LINE.replace(", ", "\r\n")),
        ("a.txt", ONE_LINE.replace(" ", "x")),
        ("a.txt", PARAGRAPH * 1000),
        ("a.txt", "<|endoftext|>\n".join([ONE_LINE] * 2)),
        ("a.jsonl", json.dumps({"text": ONE_LINE})),
    ],
    ids=["one line", "CR", "CRLF", "one word", "paragraphs", "marks", "json"],
)
def test_a_text_of_any_form_is_cut_into_documents(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    found = list(documents(str(tmp_path / name)))
    plain = content.replace("\r\n", "\n").replace("\r", "\n").replace("<|endoftext|>\n", "")
    assert "".join(found) == (ONE_LINE if "json" in name else plain)
    assert len(found) > 30 and max(map(len, found)) <= 1 << 16


def test_forms_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n" + PARAGRAPH * 9)
    (tmp_path / "b.TXT.GZ").write_bytes(gzip.compress((PARAGRAPH * 12).encode()))
    (tmp_path / "c.py").write_bytes(b"\xef\xbb\xbfx = 1\r\n\n\n")
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "e.txt").write_text("no")
    os.mkfifo(tmp_path / "f.txt")
    assert list(documents(str(tmp_path / "a.txt"))) == ["one\n", "two\n" + PARAGRAPH * 9]
    cut = list(documents(str(tmp_path / "b.TXT.GZ")))
    assert "".join(cut) == PARAGRAPH * 12 and all(piece.endswith("\n") for piece in cut)
    assert list(documents(str(tmp_path / "c.py"))) == ["x = 1\n\n\n"]
    assert len(list(documents(str(tmp_path)))) == 2 + len(cut) + 1


def test_links_are_followed_once(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("text")
    for name in ("round", "around"):
        (tmp_path / "real" / name).symlink_to(tmp_path / "real")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "real")
    assert list(documents(str(tmp_path / "data"))) == ["text"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(documents("~/real")) == ["text"]


def test_memory_stays_bounded_and_nothing_hangs(tmp_path):
    """200 MB of blank lines; a packed file of 200 MB of one letter."""
    with gzip.open(tmp_path / "blank.txt.gz", "wb", 1) as file:
        for _ in range(50):
            file.write(b"\n" * 4_000_000)
    code = """
def peak(): return [int(l.split()[1]) for l in open("/proc/self/status") if "VmHWM" in l][0] // 1024
before = peak(); start = time.monotonic()
found = sum(len(text) for text in L.documents(sys.argv[1]))
print(json.dumps([found, peak() - before, time.monotonic() - start]))
"""
    found, megabytes, seconds = child(code, tmp_path / "blank.txt.gz")
    assert found == 0 and megabytes < 100 and seconds < 60
    zstandard = pytest.importorskip("zstandard")
    packer = zstandard.ZstdCompressor().compressobj()
    packed = b"".join(packer.compress(b"x" * 2**20) for _ in range(200)) + packer.flush()
    (tmp_path / "x.txt.zst").write_bytes(packed)
    found, megabytes, seconds = child(code, tmp_path / "x.txt.zst")
    assert found == 200 * 2**20 and megabytes < 500 and seconds < 60


def test_zstd_of_several_frames(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(jsonl([text])) for text in ("one", "two")))
    assert list(documents(str(path))) == ["one", "two"]
    if sys.version_info < (3, 14):
        monkeypatch.setitem(sys.modules, "zstandard", None)
        with pytest.raises(UserError, match="pip install zstandard"):
            list(documents(str(path)))


@pytest.mark.parametrize("packed", ["zst", "gz"])
@pytest.mark.parametrize("kept", [0.5, 0.9, 0.999])
def test_a_truncated_file_is_no_end_of_the_data(tmp_path, packed, kept):
    data = jsonl([os.urandom(200).hex() for _ in range(300)])
    if packed == "zst":
        data = pytest.importorskip("zstandard").compress(data)
    else:
        data = gzip.compress(data)
    (tmp_path / f"a.jsonl.{packed}").write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError, match="cannot read .*(ends in the middle|ended before)"):
        list(documents(str(tmp_path)))


def test_the_split_is_a_twentieth_and_the_embedded_text_is_found(monkeypatch, tmp_path):
    assert 0.03 < np.mean([held_out(line) for line in [*texts(4000), "\ud800 alone"]]) < 0.07
    (path := tmp_path / "text.jsonl.gz").write_bytes(gzip.compress(jsonl(["embedded"])))
    monkeypatch.setitem(model_loaders.DATASETS, "tiny", str(path))
    assert list(documents("tiny")) == ["embedded"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": 3}\n', "line 3: no JSON object"),
        ("a.jsonl", b'["text"]\n', "line 1"),
        ("a.jsonl.gz", b"not gzip", "Not a gzipped file"),
        ("a.txt", "é".encode("latin-1") * 99, "can't decode .* invalid"),
        ("a.txt", "text".encode("utf-16"), "utf-8"),
        ("a.txt", "text".encode("utf-16-le"), "NUL characters, as in UTF-16"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.parquet", b"PAR1", "no text in"),
        ("a.bin", b"123" * 9, "is not of ids under 256"),
        ("a.bin", np.full(99, 300, np.uint16).tobytes(), "is not of ids under 256"),
        ("none.txt", None, "no text in"),
        ("c5", None, "owner/name on the Hub, c4, pile"),
        ("", None, "no text in ''"),
        ("~nosuchuser/x/y", None, "no text in '~nosuchuser"),
        ("nul\0/x", None, "no text in"),
    ],
)
def test_bad_sources_are_user_errors(tmp_path, stream, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    data = str(tmp_path / name) if content is not None or "none" in name else name
    with pytest.raises(UserError, match=message) as error:
        stream(data).train(0, 1)
    assert "\n" not in str(error.value) and repr(data)[1:-1] in str(error.value)


def test_a_fifo_is_no_data(tmp_path, stream):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match="no text in"):
        stream(tmp_path / "a.txt")


def test_cache_is_used_again_and_grows_without_regard_to_budgets(lines_file, stream, monkeypatch):
    lines = texts(3000, 500)
    lines_file.write_bytes(jsonl(lines))
    small = stream(lines_file, train=16_000, val=40_000)  # val needs more documents than train
    small.train(0, 1000), small.validation()
    same = stream(lines_file, again := Bytes(), train=16_000, val=40_000)
    assert torch.equal(same.train(0, 9), small.train(0, 9)) and again.calls == 0
    big = stream(lines_file, train=1_200_000, val=56_000)
    assert ids(big.train(0, big.n_train)) == joined(lines, False)[:1_200_000]
    assert ids(big.validation()) == joined(lines, True)[:56_000]
    assert stream(lines_file, Bytes(fingerprint="other")).folder != big.folder
    os.utime(lines_file, (1, 1))
    assert stream(lines_file).folder != big.folder


def test_a_new_version_of_the_data_is_noticed_and_the_old_one_told(lines_file, stream):
    old, told = stream(lines_file), []
    old.train(0, 9), old.close()
    lines_file.write_bytes(lines_file.read_bytes()[::-1].replace(b"x", b"y", 1)[::-1])
    os.utime(lines_file, ns=(0, os.stat(lines_file).st_mtime_ns + 1))  # of the same size
    new = stream(lines_file, report=told.append)
    assert new.folder != old.folder and old.folder.exists()
    assert told[0].startswith("older tokens of") and f"rm -r {old.folder.parent}" in told[0]
    new.close(), told.clear()
    stream(lines_file, report=told.append).close()
    assert told == []


META = [None, b"", b"[1, 2, [3", b"[]", b"{}", b"null", b"text", b"[9e9, 0, 0, 0]", b"[1, 2, 3]"]
META += [b"[-1, 0, 0, 0]", b"[9000000, 0, 1, 1]", b'["1", 0, 0, 0]', b"[" * 100_000, b"\xff"]


@pytest.mark.parametrize("meta", META, ids=[str(meta)[:20] for meta in META])
def test_interrupted_or_damaged_cache(lines_file, stream, monkeypatch, tmp_path, meta):
    monkeypatch.setattr(model_loaders, "BATCH", 20)
    s = stream(lines_file, train=4000)
    s.train(0, 250), s.close()
    for path in s.files:  # written, but not yet in meta.json
        path.write_bytes(path.read_bytes() + b"half a block")
    if meta is not None:
        (s.folder / "meta.json").write_bytes(meta)
    resumed = stream(lines_file, whole := Bytes(), train=12_800)
    assert ids(resumed.train(0, 800)) == joined(texts(), False)[:12_800]
    assert ids(resumed.validation()) == joined(texts(), True)[:160]
    stream(lines_file, fresh := Bytes(), train=12_800, cache=tmp_path / "other").train(0, 800)
    resumed.close()
    assert (whole.calls < fresh.calls) == (meta is None)  # what was done is not done again


@pytest.mark.parametrize("side", [0, 1])
def test_a_kill_between_the_two_sides_leaves_no_trace(lines_file, stream, monkeypatch, side):
    monkeypatch.setattr(model_loaders, "BATCH", 20)
    append, seen = TokenStream._append, []

    def dies(self, *args):
        append(self, *args)
        seen.append(args[0])
        if len(seen) == 3 + side:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TokenStream, "_append", dies)
        stream(lines_file, train=9600).train(0, 600)
    s = stream(lines_file, train=9600, val=320)
    assert ids(s.train(0, 600)) == joined(texts(), False)[:9600]
    assert ids(s.validation()) == joined(texts(), True)[:320]


@pytest.mark.parametrize("damage", ["folder", "file", "cut"])
def test_a_cache_that_goes_away_is_one_line(lines_file, stream, damage):
    s = stream(lines_file, train=4000)
    s.train(0, 250)
    s.validation()
    if damage == "folder":
        s.close()
        shutil.rmtree(s.folder)
    elif damage == "file":
        s.files[0].unlink()
    else:
        os.truncate(s.files[0], 5)
    fails(["cannot read", str(s.files[0])], s.train, 0, 250)


@pytest.mark.parametrize("damage", ["folder", "cut"])
def test_a_cache_that_goes_away_meanwhile_is_one_line(tmp_path, stream, monkeypatch, damage):
    monkeypatch.setattr(model_loaders, "BATCH", 1)
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts(20_000, 300)))
    s = stream(tmp_path / "a.jsonl", train=5_000_000)
    s.train(0, 5)
    for path in s.files[:1] if damage == "cut" else s.folder.glob("[!.]*"):
        os.truncate(path, 0) if damage == "cut" else path.unlink()
    with pytest.raises(UserError, match="cannot (write|read) ") as error:
        s.train(s.n_train - 1, 1)
    assert str(s.folder) in str(error.value)


def test_several_streams_on_one_cache(lines_file, stream):
    lines_file.write_bytes(jsonl(texts(2000, 300)))
    tokenizers = [Bytes() for _ in range(4)]
    streams = [stream(lines_file, t, train=320_000) for t in tokenizers]
    for s in streams:
        assert ids(s.train(0, 20_000)) == joined(texts(2000, 300), False)[:320_000]
        s.validation(), s.close()
    assert sum(t.calls > 0 for t in tokenizers) == 1


def test_short_data(tmp_path, lines_file, stream):
    have = len(joined(texts(), False))
    s = stream(lines_file, train=2_000_000)
    with pytest.raises(UserError) as error:
        s.train(s.n_train - 1, 1)
    advice = "lower --tokens, or pass --allow-short to train on what there is"
    counts = f"{have:,} training tokens, 2,000,000 were asked for"
    assert str(error.value) == f"{lines_file} has {counts}: {advice}"
    with pytest.raises(UserError, match="validation tokens, 9,000,000 .*--eval-tokens"):
        stream(lines_file, val=9_000_000).validation()
    short = stream(lines_file, train=2_000_000, allow_short=True)
    assert short.n_train == have // 16 and len(short.train(0, short.n_train)) == have // 16
    (tmp_path / "one.py").write_text("x = 1")
    with pytest.raises(UserError, match="were asked for: give more text"):
        stream(tmp_path / "one.py", allow_short=True)


def test_ids_in_a_bin(tmp_path, stream):
    stored = np.random.default_rng(0).integers(1, 256, 10_000, np.uint16)
    stored[[5000, 9400, 9700, 9900]] = 0  # the document that is cut at 9,500 ends at 9,700
    stored.tofile(path := tmp_path / "ids.bin")
    s = stream(path, train=8000)
    assert s.train(0, 500).flatten().tolist() == stored[:8000].tolist()
    assert s.validation().flatten().tolist() == stored[9701:9861].tolist()
    with pytest.raises(UserError, match="has 9,500 training tokens, 10,000 were"):
        (long := stream(path, train=10_000)).train(long.n_train - 1, 1)
    short = stream(path, train=10_000, allow_short=True)
    assert ids(short.train(0, short.n_train)) == bytes(stored[: 9500 // 16 * 16].tolist())


@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8"])
@pytest.mark.parametrize("n_vocab", [256, 70_000])
def test_the_width_of_ids_is_found_by_looking(tmp_path, stream, dtype, n_vocab):
    stored = np.random.default_rng(0).integers(1, n_vocab if dtype != "<u2" else 256, 10_000)
    stored.astype(dtype).tofile(tmp_path / "IDS.BIN")
    s = stream(tmp_path / "IDS.BIN", Bytes(n_vocab=n_vocab, fingerprint=str(n_vocab)))
    assert s.train(0, 100).flatten().tolist() == stored[:1600].tolist()


def test_a_failure_in_the_thread_reaches_the_caller(tmp_path, lines_file, stream):
    class Panic(BaseException):
        """As tiktoken's, which is no Exception."""

    for error in (ZeroDivisionError, Panic):
        with pytest.raises(error):
            stream(lines_file, Bytes(fail=error())).train(0, 1)
        with pytest.raises(error):
            stream(lines_file, Bytes(fail=error()), allow_short=True)
    with pytest.raises(UserError, match="cannot write .*XDG_CACHE_HOME"):
        stream(lines_file, cache=lines_file).train(0, 1)


class Endless(Bytes):
    """A tokenizer that takes its time."""

    def encode_batch(self, texts, threads):
        time.sleep(0.05)
        return super().encode_batch(texts, threads)


def test_a_wait_reports_what_is_going_on_and_can_be_interrupted(lines_file, stream, monkeypatch):
    monkeypatch.setattr(model_loaders, "documents", lambda data: iter(lambda: texts(1)[0], None))
    told = []
    s = stream(lines_file, Endless(), train=2 * 10**6, report=told.append)
    signal.signal(signal.SIGALRM, lambda *args: 1 / 0)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    with pytest.raises(ZeroDivisionError):
        s.train(0, s.n_train)
    assert re.fullmatch(r"tokenising: 0\.\dM of 2\.0M tokens", told[0])
    start = time.monotonic()
    s.close()
    assert time.monotonic() - start < 2 and s.thread.done()


def test_a_lock_that_another_process_holds_is_reported(tmp_path, lines_file, stream):
    s = stream(lines_file)
    s.validation(), s.close()
    (s.folder / "meta.json").unlink()
    code = """
with L.hf.utils.WeakFileLock(sys.argv[1]): print(0, flush=True); time.sleep(60)
"""
    start = f"import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    command = [sys.executable, "-c", f"{start}import model_loaders as L{code}", s.folder / "lock"]
    other, told = subprocess.Popen(command, stdout=subprocess.PIPE), []
    try:
        other.stdout.readline()
        other.send_signal(signal.SIGSTOP)
        threading.Timer(1.5, other.kill).start()
        s = stream(lines_file, report=told.append)
        assert ids(s.train(0, 100)) == joined(texts(), False)[:1600]
    finally:
        other.kill()
        other.wait()
    assert told == [f"waiting for another process that tokenises into {s.folder}"]


# ---- A loopback Hub ---------------------------------------------------------------------------

GOOD, OTHER = "hf_good", "hf_other"  # a token that may read gated repos, and one that may not
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """A loopback Hub, enough for the real huggingface_hub client.

        with Hub(models={"o/m": {"config.json": b"{}"}}, datasets={"o/d": {"a.gz": b"..."}}) as hub:
            subprocess.run([...], env={**os.environ, **hub.env(tmp_path)})
            hub.sent["a.gz"], hub.requests  # body bytes by file, [(method, path, status), ...]

    gated: repo ids that want the token GOOD: none -> 401 GatedRepo, OTHER -> 403 GatedRepo, else 401.
    cut {file: (n, k)}: its first k GETs end after n bytes. fail {file: status}: the answer, e.g. 503.
    stall {file: seconds}: every request of the file waits first. slow {file}: ten bytes a second.
    All can change while it runs.
    """

    daemon_threads, block_on_close = True, False

    def __init__(self, models=None, datasets=None, gated=(), cut=None, fail=None, stall=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = {"models": models or {}, "datasets": datasets or {}}
        self.gated, self.cut = set(gated), dict(cut or {})
        self.fail, self.stall, self.slow = dict(fail or {}), dict(stall or {}), set()
        self.listing = {}  # in place of the true one, by repo
        self.requests, self.sent, self.lock = [], Counter(), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def env(self, home, **more):
        """Environment of a client process: this endpoint, an empty HF_HOME below `home`, no proxy."""
        env = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": "", "NO_PROXY": "*"}
        return env | {f"HF_HUB_DISABLE_{x}": "1" for x in ("PROGRESS_BARS", "TELEMETRY")} | more

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, *args):
        pass  # a client that hangs up is part of the tests


# /api/<kind>/<owner/name>[/<what>/<revision>[/<path>]], or without /api and models/ for the files
URL = r"(?:/api)?/(?:(models|datasets)/)?([^/]+/[^/]+)(?:/([^/]+)/[^/]+(?:/(.+))?)?"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.form = parse_qs(self.rfile.read(int(self.headers["Content-Length"] or 0)).decode())
        url = re.fullmatch(URL, unquote(urlsplit(self.path).path))
        kind, repo, what, path = url.groups() if url else ("models", "", "", "")
        files = self.server.repos[kind or "models"].get(repo)
        if what == "resolve":
            self.resolve(files, repo, path)
        elif files is None:
            self.reply(404, {"X-Error-Code": "RepoNotFound"})
        else:
            self.reply(200, {}, json.dumps(self.api(files, repo, what, path or "")).encode())

    do_HEAD = do_POST = do_GET

    def log_message(self, *args):
        pass

    def reply(self, status, headers, body=b"", file=None):
        hub, cut = self.server, None
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, value)
        self.end_headers()
        with hub.lock:  # counted before the last byte leaves: a client that has it all may look
            hub.requests.append((self.command, urlsplit(self.path).path, status))
            if file and self.command == "GET":
                after, times = hub.cut.get(file, (0, 0))
                if times:
                    hub.cut[file], cut = (after, times - 1), after
                hub.sent[file] += len(body[:cut])
        if self.command != "HEAD" and file not in hub.slow:
            self.wfile.write(body[:cut])
        for byte in body if file in hub.slow and self.command != "HEAD" else b"":
            self.wfile.write(bytes([byte]))
            time.sleep(0.1)
        self.close_connection |= cut is not None

    def api(self, files, repo, what, folder):
        if repo in self.server.listing:
            return self.server.listing[repo]
        if what in (None, "revision"):
            return dict(id=repo, sha=COMMIT, private=False, downloads=0, likes=0, tags=[])
        listed = self.form.get("paths") if what == "paths-info" else sorted(files)
        found = [file for file in listed if file in files and file.startswith(folder)]
        keys = {"type": "file", "oid": COMMIT}
        return [{"path": file, "size": len(files[file]), **keys} for file in found]

    def resolve(self, files, repo, file):
        hub, asked = self.server, self.headers["Range"]
        revision = re.search("/resolve/([^/]+)/", unquote(self.path))[1]
        if f"{revision}/{file}" in (files or ()):
            file = f"{revision}/{file}"
        time.sleep(hub.stall.get(file, 0))
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        for wrong, status, code in (
            (token not in ("", GOOD, OTHER), 401, "Invalid credentials in Authorization header"),
            (repo in hub.gated and token != GOOD, 403 if token else 401, "GatedRepo"),
            (files is None, 404, "RepoNotFound"),
            (file in hub.fail, hub.fail.get(file), "Failure"),
            (file not in (files or ()), 404, "EntryNotFound"),
        ):
            if wrong:
                return self.reply(status, {"X-Error-Code": code, "X-Error-Message": code})
        commit = COMMIT if revision in ("main", COMMIT) else revision[::-1].zfill(40)
        body, headers = files[file], {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        start, stop = re.match(r"bytes=(\d+)-(\d*)", asked or "bytes=0-").groups()
        part = body[int(start) : int(stop or len(body)) + 1]
        if asked:
            headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(body)}"
        self.reply((206 if part else 416) if asked else 200, headers, part, file)


SAE_CFG = {"architecture": "topk", "d_in": 6, "d_sae": 20, "k": 3}
ASK = """
if sys.argv[2] == "False": time.sleep = lambda seconds: None
def ask(call, name, what, token):
    os.environ["HF_TOKEN"] = token
    if call == "fetch": return [L.fetch(name, what).read_text()]
    if call == "weights": return sorted(L.load_weights(name, "cpu", torch.float32))
    if call == "sae": return sorted(L.read_sae(name)[0])
    with L.opened(f"hf://datasets/{name}/{what}") as file:
        return [file.seek(50_000), len(file.read(1000))]
answers = []
for case in json.load(open(sys.argv[1])):
    L.PATIENCE = 2 if "drip" in f"{case}" else 60
    try: answers.append(ask(*case))
    except L.UserError as error: answers.append(str(error))
print(json.dumps(answers))
"""


def test_hub_through_the_real_client(tmp_path):
    x, y = safetensors.save({"a": torch.ones(2)}), safetensors.save({"b": torch.zeros(3)})
    index = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}).encode()
    models = {"o/two": {"1.safetensors": x, "2.safetensors": y}, "o/old": {"weights.bin": b"x"}}
    models["o/two"]["model.safetensors.index.json"] = index
    models |= {"o/one": {"model.safetensors": x}, "google/gemma-2-2b": {"config.json": b"{}"}}
    models["o/sick"] = {
        f"{fault}.json": fault[0].encode() * 999
        for fault in ("fail", "slow", "cut", "mend", "drip")
    }
    models["o/sae"] = {"a/cfg.json": json.dumps(SAE_CFG).encode(), "x/a/cfg.json": b"3"}
    tensors = {name: torch.ones(shape) for name, shape in SAE_SHAPES.items()}
    models["o/sae"]["a/sae_weights.safetensors"] = safetensors.save(tensors)
    models["EleutherAI/pythia-14m"] = {"config.json": b'{"a": 1}', "step8/config.json": b'{"a": 2}'}
    data = {"o/data": {"d/x.bin": bytes(100_000)}, "o/gated": {"x.bin": bytes(60_000)}}
    data |= {"o/drip": {"y.bin": bytes(60_000), "x.bin": bytes(51_234)}, "o/list": {"x.bin": b"x"}}

    def check(cases, nap, **env):
        """An expected str: words of the error, split at |. No `nap`: no pauses before retries."""
        (tmp_path / "ask").write_text(json.dumps([case[:-1] for case in cases]))
        answers = child(ASK, tmp_path / "ask", nap, **env)
        for case, answer in zip(cases, answers, strict=True):
            words = case[-1].split("|") if isinstance(case[-1], str) else []
            assert all(word in answer for word in words) and "\n" not in answer, (case, answer)
            assert words or answer == case[-1], (case, answer)

    loads = [("weights", "o/one", "", "", ["a"]), ("weights", "o/two", "", "", ["a", "b"])]
    gemma, terms = ("fetch", "gemma-2-2b", "config.json"), "its licence at https://huggingface.co/"
    refused = f"{terms}google/gemma-2-2b|set HF_TOKEN|"
    cases = [
        ("weights", "o/old", "", "", "o/old has no model.safetensors"),
        ("fetch", "o/none", "config.json", "", "no Hub repository 'o/none'"),
        ("fetch", "o--o/x", "config.json", "", "no Hub repository 'o--o/x'"),
        ("fetch", "o/old", "none.json", "", "o/old has no none.json"),
        *[(*gemma, token, f"{refused}{n}") for token, n in (("", 401), (OTHER, 403), ("hf_", 401))],
        (*gemma, GOOD, ["{}"]),
        ("fetch", "o/sick", "fail.json", "", "cannot fetch o/sick|503|--model tiny"),
        ("fetch", "o/sick", "slow.json", "", "cannot fetch o/sick|imed out|--model tiny"),
        ("fetch", "o/sick", "drip.json", "", "cannot fetch o/sick|Timeout|--model tiny"),
        ("fetch", "pythia-14m", "config.json", "", ['{"a": 1}']),
        ("fetch", "pythia-14m@step8", "config.json", "", ['{"a": 2}']),
        ("fetch", "EleutherAI/pythia-14m@step8", "config.json", "", ['{"a": 2}']),
        ("fetch", "EleutherAI/pythia-14m@step8", "no.json", "", "has no no.json|revision"),
        ("sae", "o/sae:a", "", "", sorted(SAE_SHAPES)),
        ("sae", "o/sae@x:a", "", "", "cfg.json|'int'"),
        ("sae", "o/sae:b", "", "", "o/sae has no b/cfg.json"),
        ("fetch", "o/sick", "cut.json", "", "cannot fetch o/sick|100 |--model tiny"),
        ("dataset", "o/data", "d/x.bin", "", [50_000, 1000]),
        ("dataset", "o/data", "d/y.bin", "", "datasets/o/data has no d/y.bin"),
        ("dataset", "o/none", "x.bin", "", "no Hub repository 'datasets/o/none'"),
        ("dataset", "o/drip", "x.bin", "", "cannot fetch datasets/o/drip|Timeout"),
        ("dataset", "o/list", "x.bin", "", "cannot fetch datasets/o/list|KeyError"),
        ("dataset", "o/gated", "x.bin", "", f"{terms}datasets/o/gated|401"),
    ]
    if int(huggingface_hub.__version__[0]) >= 2:  # which tries a cut download again
        cases.append(("fetch", "o/sick", "mend.json", "", ["m" * 999]))
    with Hub(models, data, {"google/gemma-2-2b", "o/gated"}, fail={"fail.json": 503}) as hub:
        hub.cut, hub.stall = {"cut.json": (100, 99), "mend.json": (100, 1)}, {"slow.json": 12}
        hub.slow, hub.listing = {"drip.json", "x.bin"}, {"o/list": {"sha": COMMIT}}
        env = hub.env(tmp_path / "home", HF_HUB_ETAG_TIMEOUT="1")
        check(loads + cases, nap=False, **env)
        assert 1000 <= hub.sent["d/x.bin"] <= 4000  # of 100,000: a byte range
    for word, more in (("refused", {}), ("HF_HUB_OFFLINE", {"HF_HUB_OFFLINE": "1"})):
        gone = [("fetch", "pythia-70m", "config.json", "", f"cannot fetch EleutherAI/|{word}")]
        words = f"cannot fetch datasets/o/data|{word}|--data tiny"
        gone += [("dataset", "o/data", "d/x.bin", "", words)]
        start = time.monotonic()
        check(loads + gone, nap=True, **env, **more)
        assert time.monotonic() - start < 20  # the client alone would try for half a minute


CLIENT = """
import json, sys, time
import numpy as np
time.sleep = lambda seconds: None  # the client's waits between its tries
from model_loaders import TokenStream, UserError
"""
RUN = """
for data, train, val, vocab in json.loads(sys.argv[1]):
    try:
        s = TokenStream(data, Bytes(n_vocab=vocab), 64, train, val, sys.argv[2])
        both = s.train(0, s.n_train), s.validation()
        print(json.dumps([rows.flatten().tolist() for rows in both]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def client(hub, tmp_path, *cases, **env):
    """For each (data, train, val, vocab): [train ids, val ids] or the error, from one process."""
    paths = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent)]
    env = {**os.environ, **hub.env(tmp_path / "hf", **env), "PYTHONPATH": os.pathsep.join(paths)}
    code = CLIENT + inspect.getsource(Bytes) + RUN
    command = [sys.executable, "-c", code, json.dumps(cases), str(tmp_path / "cache")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_text_from_the_hub(tmp_path):
    shards = [texts(700, 500, seed) for seed in range(3)]
    names = [f"en/c4-train.{i:05d}-of-00003.json.gz" for i in range(3)]
    c4 = {n: gzip.compress(jsonl(s)) for n, s in zip(names, shards, strict=True)}
    c4 |= {
        "en/c4-validation.00000-of-00001.json.gz": gzip.compress(jsonl(["no"])),
        "README.md": b"#",
    }
    data = gzip.compress(jsonl(texts()))
    sets = {"allenai/c4": c4, "o/cut": {"train.jsonl.gz": data}, "o/other": {"a.parquet": b"PAR1"}}
    sets["o/gated"] = {"a.jsonl.gz": data, "_gated.py": b"x", "README.md": b"# x"}
    cases = [(name, 6400, 640, 256) for name in ("o/gated", "o/other", "o/none", "o/cut")]
    big = ("c4", 384_000, 640, 256)
    cut = {names[0]: (50_000, 1), "train.jsonl.gz": (300, 99)}
    with Hub(datasets=sets, gated={"o/gated"}, cut=cut) as hub:
        *errors, rows = client(hub, tmp_path, *cases, big)
        for error, (name, *_), said in zip(
            errors, cases, ["HF_TOKEN", "no text", "", ""], strict=True
        ):
            assert name in error and said in error and "\n" not in error
        if isinstance(
            rows, str
        ):  # older clients do not ask again after a cut: the next run goes on
            assert "allenai/c4" in rows
            rows = client(hub, tmp_path, big)[0]
        for side in (False, True):
            assert bytes(rows[side]) == joined(sum(shards, []), side)[: big[1 + side]]
        assert hub.sent[names[2]] == 0  # shard after shard, as needed
        asked = len(hub.requests)
        assert client(hub, tmp_path, big) == [rows] and len(hub.requests) == asked
        open_to_it = client(hub, tmp_path, cases[0], HF_TOKEN="hf_good")[0]
        assert bytes(open_to_it[0]) == joined(texts(), False)[:6400]


def test_pythia_ids_by_byte_range(tmp_path):
    stored = np.random.default_rng(0).integers(1, 50_000, (3, 100_000)).astype("<u2")
    names = [f"document-{i:05d}-of-00002.bin" for i in range(3)]
    files = {name: part.tobytes() for name, part in zip(names, stored, strict=True)}
    cases = [("pythia", tokens, 640, 50_277) for tokens in (6400, 32_000, 640_000)]
    with Hub(datasets={"EleutherAI/pile-standard-pythia-preshuffled": files}) as hub:
        small = client(hub, tmp_path, cases[0])[0]
        first = 4096  # to find the width of the ids
        assert [hub.sent[name] for name in names] == [first + 12_800, 0, 1280]  # not a byte more
        more, short, other = client(hub, tmp_path, *cases[1:], ("pythia", 6400, 640, 256))
        assert small == [stored[0, :6400].tolist(), stored[2, :640].tolist()]
        assert more == [stored[0, :32_000].tolist(), small[1]]
        assert "has 100,000 training tokens, 640,000 were asked for" in short
        assert "is not of ids under 256" in other
