"""What touches disk or network: the Hub, safetensors, SAE files, tokenizers, token streams.

Whatever a user can mend ends in a UserError, one line; damaged or hostile files do, too."""

import codecs
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import stat
import threading
import time
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import chain, groupby, islice, takewhile
from pathlib import Path

import huggingface_hub as hf
import numpy as np
import tiktoken
import torch
from huggingface_hub import errors as hub
from huggingface_hub.utils import logging as hub_logging


class UserError(Exception):
    """What the user asked for cannot be done: one line that names the value and says what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


# ---- Models on the Hub or in a folder ---------------------------------------------------------

TINY = Path(__file__).parent / "assets" / "tiny"  # the embedded model and its text
if not TINY.is_dir():  # installed from a wheel
    TINY = Path(__file__).parent / "saeft_assets" / "tiny"

MODELS = {"tiny": str(TINY), "gemma-2-2b": "google/gemma-2-2b", "gemma-2-9b": "google/gemma-2-9b"}
for size in ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b"):
    MODELS[f"pythia-{size}"] = f"EleutherAI/pythia-{size}"
    MODELS[f"pythia-{size}-deduped"] = f"EleutherAI/pythia-{size}-deduped"
for size in ("1b", "4b", "12b", "27b"):
    MODELS[f"gemma-3-{size}"] = f"google/gemma-3-{size}-pt"
MODELS["gemma-3-270m"] = "google/gemma-3-270m"

STALL = 120  # seconds in which a block must arrive from the Hub
hf.constants.DOWNLOAD_CHUNK_SIZE = 1 << 20  # bytes that the client holds back before it writes
hub_logging.set_verbosity_error()  # warnings of its retries would bury our one line


@contextmanager
def hub_errors(repo: str, filename: str = "such file"):
    """Turn the Hub client's exceptions into UserError; `repo`: owner/name, datasets/owner/name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # its own, those of its HTTP library, or of a malformed answer
        raise UserError(_hub_message(error, repo, filename)) from error


def _hub_message(error: Exception, repo: str, filename: str) -> str:
    if isinstance(error, FileNotFoundError):
        error = error.__cause__ or error  # "not in the cache either": the cause says why
    status = getattr(getattr(error, "response", None), "status_code", None)
    terms = f"accept its licence at https://huggingface.co/{repo}, set HF_TOKEN"
    if isinstance(error, hub.GatedRepoError):
        return f"no access to {repo} ({status}): {terms}"
    if isinstance(error, (hub.RepositoryNotFoundError, hub.HFValidationError)):
        advice = "try pythia-160m or tiny (private: set HF_TOKEN)"
        return f"no folder and no Hub repository {repo!r}: {advice}"
    if isinstance(error, (hub.EntryNotFoundError, hub.RevisionNotFoundError, FileNotFoundError)):
        read = "models are read from safetensors files only, SAEs from SAELens's layout"
        return f"{repo} has no {filename}: check the name and @revision ({read})"
    if status in (401, 403):
        return f"no access to {repo} ({status}): {terms}"
    why = status or f"{error!r:.300}"
    return f"cannot fetch {repo} (error: {why}): try again, or a folder, --model tiny, --data tiny"


def fetch(name: str, filename: str) -> Path:
    """One file of a model, which may lie in a subfolder. `name`: a short name of MODELS, a folder
    like a Hub snapshot, or owner/name; on the Hub, name@revision, too. Raises UserError."""
    short, _, revision = name.partition("@")
    repo = MODELS.get(short, short)
    folder = os.path.expanduser(MODELS.get(name, name))
    with hub_errors(name if os.path.isdir(folder) else repo, filename):
        if os.path.isdir(folder):
            if not os.path.exists(os.path.join(folder, filename)):
                raise FileNotFoundError
            return Path(folder, filename)
        if "/" not in repo:
            raise hub.HFValidationError  # a bare name, none of ours
        thread = Background(partial(_download, repo, filename, revision or None))
        for _ in waiting(thread, partial(_arrived, repo)):
            pass
        return Path(thread.outcome())


def _download(repo: str, filename: str, revision: str | None) -> str:
    if not isinstance(hf.try_to_load_from_cache(repo, filename, revision=revision), str):
        # Without a network this fails at once, where the call below would try for minutes.
        hf.get_hf_file_metadata(hf.hf_hub_url(repo, filename, revision=revision))
    return hf.hf_hub_download(repo, filename, revision=revision)


def _arrived(repo: str) -> list:
    """Size and time of each of a model's files in the Hub client's cache, whole or not."""
    blobs = Path(hf.constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "blobs")
    try:
        return [(path.stat().st_size, path.stat().st_mtime_ns) for path in blobs.glob("*")]
    except FileNotFoundError:  # renamed at this moment
        return []


class Background(threading.Thread):
    """A call in a thread that does not keep the process alive."""

    def __init__(self, call):
        super().__init__(daemon=True)
        self.call = call
        self.result = self.error = None
        self.start()

    def run(self):
        try:
            self.result = self.call()
        except BaseException as error:  # tiktoken's panics are no Exception
            self.error = error

    def outcome(self):
        """What the call returned; raises what ended it."""
        if self.error:
            raise self.error
        return self.result


def waiting(thread: threading.Thread, progress):
    """Yields ten times a second while a thread runs, so that signals get through. TimeoutError
    when what `progress()` returns has not changed for STALL seconds."""
    seen = progress()
    quiet = 0.0  # counted, not read off a clock: the process may have been stopped meanwhile
    while thread.is_alive():
        yield
        thread.join(0.1)
        quiet += 0.1
        now = progress()
        if now != seen:
            quiet = 0.0
        if quiet > STALL:
            raise TimeoutError(f"next to nothing has arrived in {STALL} seconds")
        seen = now


# ---- Files: JSON, safetensors, SAEs ------------------------------------------------------------

LFS_POINTER = b"version https://git-lfs"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# What an SAELens cfg.json must say for our equations to be the SAE's; absent, it says the first.
SAE_SETTINGS = {
    "architecture": ("standard", "topk", "jumprelu"),
    "apply_b_dec_to_input": (True,),
    "rescale_acts_by_decoder_norm": (False,),
    "normalize_activations": ("none", None),
    "reshape_activations": ("none", None),
    "activation_fn_str": ("relu",),  # before SAELens 6
    "finetuning_scaling_factor": (False,),
}


@contextmanager
def file_errors(what: str):
    """Turn whatever goes wrong with a file or its content into UserError: `what`, and why."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        advice = "convert it to UTF-8, say with iconv"
        raise UserError(f"{what} (not {error.encoding}: {error.reason}): {advice}") from error
    except ImportError as error:
        raise UserError(f"{what}: pip install {error.name}") from error
    except Exception as error:  # the disk's or the content's: each decompressor has its own
        raise UserError(f"{what} ({error!r:.300})") from error


@contextmanager
def open_file(path):
    """The bytes of a regular file; UserError for whatever goes wrong while it is open."""
    with file_errors(f"cannot read {path}"):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            if file.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
                raise ValueError("a Git LFS pointer in place of the file: git lfs pull")
            yield file


def read_json(path) -> dict:
    """The JSON object in a file. Raises UserError."""
    with open_file(path) as file:
        return _json_object(file.read())


def _json_object(text: bytes) -> dict:
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    value = json.loads(text.decode(), parse_constant=refuse)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    return value


def load_config(name: str) -> dict:
    """The model's config.json. Raises UserError, also when it is not a JSON object."""
    return read_json(fetch(name, "config.json"))


def load_weights(name: str, device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors by name, of the shards an index lists or of model.safetensors. Raises UserError."""
    try:
        index = fetch(name, "model.safetensors.index.json")
    except UserError:  # none, or out of reach: then the next line says why
        return read_safetensors(fetch(name, "model.safetensors"), device, dtype)
    where = read_json(index).get("weight_map")
    files = {str(file) for file in where.values()} if isinstance(where, dict) else {""}
    for file in files:  # no path out of the folder, no NUL
        if Path(file).name != file or not file.isprintable() or not file.endswith(".safetensors"):
            raise UserError(f"{index}: weight_map must name plain *.safetensors files")
    weights = {}
    for path in [fetch(name, file) for file in sorted(files)]:
        weights.update(read_safetensors(path, device, dtype))
    absent = sorted(where.keys() - weights.keys())
    if absent:
        raise UserError(f"{index} lists {absent[0]!r:.100}, which none of its files has")
    return weights


def read_safetensors(path, device="cpu", dtype: torch.dtype | None = None) -> dict:
    """Tensors by name, floating ones in `dtype` if given. UserError if damaged or hostile."""
    tensors = {}
    with open_file(path) as file:
        for name, stored, shape in _read_header(file):
            kept = dtype if dtype and stored.is_floating_point else stored
            tensors[name] = torch.empty(shape, dtype=kept, device=device)
            chunk = torch.empty(2**22, dtype=stored)  # all that is in memory beside the result
            for part in tensors[name].view(-1).split(len(chunk)):
                data = chunk[: len(part)]
                if file.readinto(data.view(torch.uint8).numpy()) < data.nbytes:
                    raise EOFError("the file has shrunk")
                part.copy_(data)
    return tensors


def _read_header(file) -> list[tuple]:
    """(name, dtype, shape) of each tensor in the order of the data, which they fill exactly."""
    length = int.from_bytes(file.read(8), "little")
    size = os.fstat(file.fileno()).st_size - 8 - length  # of the data
    if size < 0 or not 0 < length <= 100_000_000:
        raise ValueError(f"a header of {length:,} bytes does not fit the file, or 100 MB")
    header = _json_object(file.read(length))
    json.dumps(header, ensure_ascii=False).encode()  # ValueError: a name has half a character
    if not all(isinstance(text, str) for text in header.pop("__metadata__", {}).values()):
        raise ValueError("__metadata__ must map strings to strings")
    end, found = 0, []
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, span, dtype = entry["shape"], entry["data_offsets"], DTYPES[entry["dtype"]]
        natural = all(type(n) is int and n >= 0 for n in (*shape, *span))
        if not natural or span != [end, end + math.prod(shape) * dtype.itemsize] or span[1] > size:
            raise ValueError(f"tensor {name!r:.60} cannot be {entry!r:.200}")
        end = span[1]
        found.append((name, dtype, shape))
    if end != size:
        raise ValueError(f"{size - end:,} bytes at its end belong to no tensor")
    return found


@contextmanager
def replacing(path: Path):
    """A file to write that takes the place of `path` when it is whole and on the disk; what an
    interrupted save has left is written over. UserError for whatever goes wrong meanwhile."""
    part = path.with_name(f".{path.name}.part")
    with file_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def write_text(path, text: str):
    """Write a text as UTF-8: all or nothing. Raises UserError."""
    with replacing(Path(path)) as file:
        file.write(text.encode())


def write_safetensors(path, tensors: dict, metadata: dict, cfg: dict | None = None):
    """Write `tensors`, with `cfg` to cfg.json beside them: all or nothing. Raises UserError."""
    path = Path(path)
    codes = {dtype: code for code, dtype in DTYPES.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))  # all aligned
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        span = [end, end + tensor.nbytes]
        header[name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": span,
        }
        end = span[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # The last to be opened is the first to be put in its place: cfg.json comes after the weights.
    with replacing(path.with_name("cfg.json")) if cfg else nullcontext() as cfg_file:
        with replacing(path) as file:
            if cfg:
                cfg_file.write(json.dumps(cfg, indent=2).encode())
                cfg_file.flush()  # a full disk shows before the weights are replaced
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())


def read_sae(source: str) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors in float32, cfg) of an SAE in SAELens's layout: W_enc [D, F], b_enc [F], W_dec
    [F, D], b_dec [D], for jumprelu threshold [F]. `source`: a folder, or owner/name:path on the
    Hub (owner/name@revision:path). UserError for what our equations cannot express, too."""
    name, _, inside = source.partition(":")
    if os.path.isdir(os.path.expanduser(source)):
        name, inside = source, ""
    cfg = read_json(fetch(name, os.path.join(inside, "cfg.json")))
    for key, accepted in SAE_SETTINGS.items():
        value = cfg.get(key, accepted[0])
        if value not in accepted:
            advice = f"python experiments/convert.py {source} FOLDER"
            raise UserError(f"{source}: {key} {value!r:.60} cannot be read as it is: {advice}")
    D, F = cfg.get("d_in"), cfg.get("d_sae")
    shapes = {"W_enc": [D, F], "b_enc": [F], "W_dec": [F, D], "b_dec": [D]}
    if cfg.get("architecture") == "jumprelu":
        shapes["threshold"] = [F]
    k = cfg.get("k")
    if cfg.get("architecture") == "topk" and not (type(k) is int and 1 <= k <= F):
        raise UserError(f"{source}: k is {k!r:.60}, not between 1 and d_sae = {F!r:.60}")
    tensors = read_safetensors(fetch(name, os.path.join(inside, "sae_weights.safetensors")))
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        raise UserError(f"{source}: tensors {found!s:.300} do not match cfg.json: {shapes!s:.300}")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {name} holds inf or NaN: take another SAE")
    return tensors, cfg


# ---- Tokenizers, on tiktoken ------------------------------------------------------------------

# What a tokenizer.json may say, besides its vocabulary, for the ids to be those computed here.
EITHER_KIND = {
    "truncation": (None,),
    "padding": (None,),
    "model.type": ("BPE",),
    "model.dropout": (None,),
    "model.continuing_subword_prefix": (None, ""),
    "model.end_of_word_suffix": (None, ""),
    "model.ignore_merges": (None, False),
}
BYTE_LEVEL = {  # GPT-NeoX
    "normalizer": (None, {"type": "NFC"}),
    "pre_tokenizer.type": ("ByteLevel",),
    "pre_tokenizer.add_prefix_space": (False,),
    "pre_tokenizer.use_regex": (None, True),
    "decoder.type": ("ByteLevel",),
}
TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
FROM_MARK = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
NO_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
GEMMA = {  # transformers' form of a SentencePiece model
    "normalizer": (TO_MARK,),
    "pre_tokenizer": (None, NO_SPLIT | {"invert": False}),  # there is no space left to split at
    "decoder.decoders": ([FROM_MARK, {"type": "ByteFallback"}, {"type": "Fuse"}],),
}

# GPT-2 writes a byte as a character: the same where printable, else the next one from U+0100 on.
_OTHERS = [b for b in range(256) if b == 0x20 or not chr(b).isprintable()]
GPT2_BYTES = {chr(256 + _OTHERS.index(b) if b in _OTHERS else b): bytes([b]) for b in range(256)}
SPM_BYTES = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}  # SentencePiece's names of bytes
UTF8_BYTES = {bytes([b]) for b in (*range(0xC0), *range(0xC2, 0xF5))}  # the others never occur

# GPT-2's split ends in \s+(?!\S)|\s+; blocks of 500 change no match, but without them a long run
# would overflow the regex engine's stack.
WORDS = r"'(?:[stmd]|ll|re|ve)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
GPT2_SPLIT = WORDS + r"|(?:\s{500})*\s+(?!\S)|\s"

# The reference's NFC is Unicode 9's: it leaves the characters listed (of 10 to 17) as they are.
OLDER_TEXT = (
    "[^\u07fd\u0897-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1af0\u1df6-\u1dfa\ua82c"
    "\U000105c9-\U000105e4\U00010d24-\U00010f85\U00011070\U0001133b\U00011382-\U000113d0\U0001145e"
    "\U00011839-\U00011a99\U00011d42-\U0001612f\U00016d63-\U00016ff1\U0001e08f-\U0001e6f5]+"
)


def _nfc(text: str) -> str:
    return re.sub(OLDER_TEXT, lambda older: unicodedata.normalize("NFC", older[0]), text)


def _gpt2_bytes(token: str) -> bytes:
    plain = not set(token) <= GPT2_BYTES.keys()  # then it is an added token
    return token.encode() if plain else b"".join(GPT2_BYTES[char] for char in token)


def _gemma_bytes(token: str) -> bytes:
    return SPM_BYTES.get(token) or token.replace("▁", " ").encode()


def _is_gemma(spec: dict) -> bool:
    """Which of the two kinds it is; ValueError if any setting could mean other ids."""
    gemma = spec["model"].get("byte_fallback", False)
    for setting, accepted in {**EITHER_KIND, **(GEMMA if gemma else BYTE_LEVEL)}.items():
        value = spec
        for key in setting.split("."):
            value = (value or {}).get(key)
        if value not in accepted:
            raise ValueError(f"{setting} is {value!r:.80}: only BPE like GPT-NeoX's or Gemma's")
    for token in spec["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise ValueError(f"lstrip, rstrip or single_word of {token['content']!r:.60}")
    return gemma


def _all_ids(spec: dict) -> dict[str, int]:
    """{token: id}, those of added_tokens too. ValueError unless ids are 0, 1, 2, .. in the order
    in which the reference gives them, whatever is written beside an added token."""
    ids = dict(spec["model"]["vocab"])
    if sorted(ids.values()) != list(range(len(ids))) or {type(i) for i in ids.values()} != {int}:
        raise ValueError("ids of the vocabulary are not 0, 1, 2, ..")
    contents = [token["content"] for token in spec["added_tokens"]]
    for token in spec["added_tokens"]:
        if token["id"] != ids.setdefault(token["content"], len(ids)):
            raise ValueError(f"the id of {token['content']!r:.60} is not {token['id']!r:.60}")
    if "" in contents or len({*contents}) < len(contents):
        raise ValueError("added_tokens has an empty one, or one twice")
    return ids


def _bpe(parts: list[str], ranks: dict[str, int], below: float = math.inf) -> list[str]:
    """Merge neighbours into the token of the lowest rank under `below`, the first such pair, until
    there is none."""
    while len(parts) > 1:
        joined = [ranks.get(left + right, below) for left, right in zip(parts, parts[1:])]
        lowest = min(joined)
        if lowest >= below:
            break
        at = joined.index(lowest)
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]
    return parts


def _made_tokens(merges: list[tuple[str, str]], vocab: dict[str, int]) -> list[str]:
    """The tokens that merges make, in the order of their ranks.

    The reference merges the pair that stands first in the list; tiktoken any two neighbours that
    make the token of the lowest rank. Both do the same where (1) the merges of a token stand
    together, and (2) its own characters, merged by what stands before, end in one of its pairs;
    or else all its pairs are listed. ValueError where not; a published file meets this, being in
    the order of training. Gemma 3's runs of one character come first, longest first: as good."""
    runs = list(takewhile(lambda pair: len({*pair[0], *pair[1]}) == 1, merges))
    if runs != sorted(runs, key=lambda pair: (-len(pair[0]), -len(pair[1]))):
        runs = []
    made = [left + right for left, right in merges]
    tokens = list(dict.fromkeys(made[: len(runs)]))
    tokens += [token for token, _ in groupby(made[len(runs) :])]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    if len(ranks) < len(tokens) or not vocab.keys() >= {*ranks, *chain(*merges)}:
        raise ValueError("merges are not in the order of training, or make no token")
    listed = set(merges)
    for token in tokens:
        parts = _bpe(list(token), ranks, ranks[token])
        if tuple(parts) not in listed:
            pairs = {(token[:n], token[n:]) for n in range(1, len(token))}
            if any(vocab.keys() >= {*pair} for pair in pairs - listed):
                raise ValueError(f"merges of {token!r:.60} are not in the order of training")
            if _bpe(parts, ranks) != [token]:  # no text is ever merged into it
                del ranks[token]
    return list(ranks)


def _gemma_units(vocab: dict[str, int]) -> dict[bytes, list[int]]:
    """{bytes: ids} of bytes, then of characters after their leading bytes, so that tiktoken starts
    from characters; what is left of any other has the ids of byte fallback."""
    units = {byte: [vocab[name]] for name, byte in SPM_BYTES.items() if name in vocab}
    chars = {_gemma_bytes(char): [i] for char, i in vocab.items() if len(char) == 1}
    for some in sorted({char[:n] for char in chars for n in range(2, len(char))}):
        units[some] = [vocab[f"<0x{byte:02X}>"] for byte in some]
    return units | chars


def _gemma_split(tokens: list[str]) -> str:
    """The pattern of the pieces that BPE takes one by one, for speed: words with the spaces before
    them, but together where a token goes on from one into the other."""
    across = []
    for token in tokens:
        for space in re.finditer("(?<=[^▁])▁", token):
            before, after = token[: space.start()], token[space.start() :]
            across.append(f"(?<={_literal(before)})(?={_literal(after)})")
    return f" *[^ ]+(?:(?:{'|'.join(across)}) +[^ ]*)*| +" if across else " *[^ ]+| +"


def _literal(token: str) -> str:
    return "".join(f"\\x{{{ord(char):x}}}" for char in token.replace("▁", " "))


def _longest_of(texts: list[str]) -> str:
    """A pattern for the longest of the texts, which branches character by character: where 6,000
    begin with "<unused", a "<" costs one step."""
    rests = {}
    for text in texts:
        rests.setdefault(text[:1], []).append(text[1:])
    shorter = rests.pop("", None)
    branches = [re.escape(char) + _longest_of(rest) for char, rest in rests.items()]
    if not branches:
        return "" if shorter else "(?!)"
    return f"(?:{'|'.join(branches)}){'?' if shorter else ''}"


class Tokenizer:
    """A parsed `tokenizer.json`; ids are those of the reference library, `tokenizers`.
    Byte-level BPE (GPT-NeoX), or BPE over characters with byte fallback (Gemma: transformers' form
    of a SentencePiece model, ▁ is a space); an exception for any other. n_vocab: largest id + 1.
    eos_id: the token between documents. bos_id: None without a <bos>. fingerprint: of the file."""

    def __init__(self, spec: dict, eos: str | int | None = None):
        gemma, ids, vocab = _is_gemma(spec), _all_ids(spec), spec["model"]["vocab"]
        text = json.dumps(spec, ensure_ascii=False)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.n_vocab = len(ids)
        self.bos_id = ids.get("<bos>")
        usual = [token for token in ("<|endoftext|>", "<eos>", "</s>") if token in ids]
        self.eos_id = eos if isinstance(eos, int) else ids[eos or usual[0]]
        if not 0 <= self.eos_id < self.n_vocab:
            raise ValueError(f"the end of text, id {eos}, is none of its {self.n_vocab} ids")

        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in spec["model"]["merges"]]
        made = _made_tokens(merges, vocab)
        letters = {*"".join(made)}
        if gemma:
            odd = SPM_BYTES.keys() & {*chain(*merges), *made} or letters & {" "}
            normalize, to_bytes, split = partial(re.sub, "▁", " "), _gemma_bytes, _gemma_split(made)
            units = _gemma_units(vocab)
        else:
            odd = letters - GPT2_BYTES.keys()
            normalize, to_bytes, split = _nfc, _gpt2_bytes, GPT2_SPLIT
            units = {byte: [vocab[char]] for char, byte in GPT2_BYTES.items() if char in vocab}
        if odd or not units.keys() >= UTF8_BYTES:
            raise ValueError(f"merges of {sorted(odd)[:1]}, or no token for some byte")
        units |= {to_bytes(token): [vocab[token]] for token in made}
        ranks = {unit: rank for rank, unit in enumerate(units)}
        self._bpe = tiktoken.Encoding("", pat_str=split, mergeable_ranks=ranks, special_tokens={})
        self._ids = list(units.values())  # of each rank
        self._bytes = {i: to_bytes(token) for token, i in ids.items()}
        self._normalize = normalize if spec["normalizer"] else str

        # Added tokens are cut out of the text, some before and some after it is normalised.
        texts = {True: [], False: []}
        for token in spec["added_tokens"]:
            texts[token["normalized"]].append(token["content"])
        late = {self._normalize(text): ids[text] for text in texts[True]}
        self._added = ids | late
        self._cut = re.compile(f"({_longest_of(texts[False])})")
        self._cut_late = re.compile(f"({_longest_of([*late])})")

    def encode(self, text: str) -> list[int]:
        """The ids of a text: no <bos>, no end of text, but the added tokens written in it."""
        ids = []
        for i, part in enumerate(self._cut.split(text)):
            if i % 2:
                ids.append(self._added[part])
                continue
            for j, piece in enumerate(self._cut_late.split(self._normalize(part))):
                if j % 2:
                    ids.append(self._added[piece])
                else:
                    ranks = self._bpe.encode_ordinary(piece)
                    ids += chain.from_iterable(map(self._ids.__getitem__, ranks))
        return ids

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """The ids of each text, int32. tiktoken works outside the GIL."""
        with ThreadPoolExecutor(threads) as pool:
            return [np.array(ids, np.int32) for ids in pool.map(self.encode, texts)]

    def decode(self, ids) -> str:
        """The text of ids, added tokens included; numbers that are no token's are left out."""
        return b"".join(self._bytes.get(int(i), b"") for i in ids).decode(errors="replace")


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model: a short name, a Hub owner/name or a folder. Raises UserError."""
    path = fetch(str(name), "tokenizer.json")
    spec, eos = read_json(path), _stated_eos(str(name))
    with file_errors(f"cannot read {path}"):
        return Tokenizer(spec, eos)


def _stated_eos(name: str) -> str | int | None:
    """The end of text, by its text or id, where tokenizer_config.json or config.json says it."""
    for filename, key in (("tokenizer_config.json", "eos_token"), ("config.json", "eos_token_id")):
        try:
            eos = read_json(fetch(name, filename)).get(key)
        except UserError:  # there is no such file
            continue
        if isinstance(eos, dict):
            eos = eos.get("content")
        if isinstance(eos, list):  # of a chat model; the first is the end of text
            eos = eos[0]
        if eos is not None:
            return eos
    return None


# ---- Documents and token streams --------------------------------------------------------------

DATASETS = {  # short name -> a file or a Hub dataset
    "tiny": str(TINY / "text.jsonl.gz"),
    "c4": "allenai/c4",
    "pile": "monology/pile-uncopyrighted",
    "pythia": "EleutherAI/pile-standard-pythia-preshuffled",
    "pythia-deduped": "EleutherAI/pile-deduped-pythia-preshuffled",
}
HUB_FOLDERS = {"allenai/c4": "/en", "monology/pile-uncopyrighted": "/train"}  # listing all is slow
IDS = r"(\.bin|-pythia-preshuffled)$"  # a source of token ids, not of text, ends so
TEXT = r"\.(txt|py|jsonl|json(?=\.gz))(\.gz|\.zst)?$"
BLOCK = 1 << 22  # bytes of a file at a time
PIECE, LONGEST = 1 << 13, 1 << 16  # characters: a .txt without marks is cut here, any text there
TRAIN, VAL = 0, 1  # the two sides, as `held_out` tells them
BATCH = 64  # documents tokenised at a time


def held_out(text: str) -> bool:
    """Whether a document is for validation (1 in 20): the same text is always on the same side."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % 20 == 0


def source_files(data: str) -> list[tuple[str, int]]:
    """(path, bytes) of a source's files: local ones mixed by a fixed seed, the Hub's in order."""
    data = _source(data)
    wanted = re.compile(r"\.bin$" if re.search(IDS, data, re.I) else TEXT, re.I)
    if _is_on_hub(data):
        found = _hub_files(data, wanted)
    else:
        found = [(p, os.path.getsize(p)) for p in _local_files(data) if wanted.search(p)]
        random.Random(0).shuffle(found)
    if not found:
        forms = f".txt, .jsonl, .py, .bin, owner/name on the Hub, {', '.join(DATASETS)}"
        raise UserError(f"no text in {data!r}: give one of {forms}")
    return found


def _source(data: str) -> str:
    """A path, or owner/name of a Hub dataset."""
    data = os.path.expanduser(DATASETS.get(data, data))
    return data if os.path.exists(data) else data.removeprefix("datasets/")


def _is_on_hub(data: str) -> bool:
    return not os.path.exists(data) and bool(
        re.fullmatch(r"[\w-]+/(?!.*\.(txt|jsonl|bin))[\w.-]+", data)
    )


def _hub_files(data: str, wanted: re.Pattern) -> list[tuple[str, int]]:
    with hub_errors(f"datasets/{data}"):
        folder = f"datasets/{data}{HUB_FOLDERS.get(data, '')}"
        listing = hf.HfFileSystem().find(folder, detail=True)
        found = sorted((f"hf://{name}", entry["size"]) for name, entry in listing.items())
    found = [file for file in found if wanted.search(file[0]) and ".py" not in file[0]]
    return [file for file in found if "train" in file[0].split(data)[1]] or found


def _local_files(data: str) -> list[str]:
    """A file, or the regular files in a folder; links are followed, each folder is read once."""
    if os.path.isfile(data):
        return [data]
    found, seen = [], set()
    for folder, subfolders, names in os.walk(data, followlinks=True):
        real = os.path.realpath(folder)
        subfolders[:] = [] if real in seen else sorted(n for n in subfolders if n[0] != ".")
        if real not in seen:
            found += [os.path.join(folder, name) for name in sorted(names) if name[0] != "."]
        seen.add(real)
    return [path for path in found if os.path.isfile(path)]


@contextmanager
def opened(path: str):
    """The bytes of a file on the disk or the Hub; whatever fails meanwhile is a UserError."""
    if not path.startswith("hf://"):
        with open_file(path) as file:
            yield file
        return
    with hub_errors("/".join(path.split("/")[2:5])):
        with hf.HfFileSystem().open(path, cache_type="none") as file:
            yield file  # by ranges of what is asked for: a cut never passes for the end


def documents(data: str):
    """Yields the documents of a file or folder of .txt, .py, .jsonl (.gz, .zst), or a Hub dataset,
    always in the same order, none longer than LONGEST characters. Raises UserError."""
    for path, _ in source_files(data):
        with opened(path) as file:
            blocks = _decoded(_unpacked(io.BufferedReader(file, BLOCK), path.lower()))
            in_json = re.search(TEXT, path, re.I)[1].lower().startswith("json")
            for text in _json_texts(blocks, path) if in_json else _plain_texts(blocks):
                for start in range(0, len(text), LONGEST):
                    part = text[start : start + LONGEST]
                    if part.strip():
                        yield part


def _unpacked(file, path: str):
    """Yields the bytes of a file, unpacked by its suffix. EOFError if it is truncated."""
    if path.endswith(".gz"):
        file = gzip.open(file)
    if not path.endswith(".zst"):
        yield from iter(partial(file.read, BLOCK), b"")
        return
    import zstandard

    frame = None
    for packed in iter(partial(file.read, 4096), b""):  # of which nothing unpacks to over 130 MB
        while packed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(packed)
            packed = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise EOFError("it ends in the middle of a frame")


def _decoded(blocks):
    """Yields the text of bytes in UTF-8, or UTF-16 with its mark; each end of a line is \\n."""
    first = next(blocks, b"")
    utf16 = first[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    for text in codecs.iterdecode(chain([first], blocks), "utf-16" if utf16 else "utf-8-sig"):
        if "\0" in text:
            raise ValueError("NUL characters, as in UTF-16 without a mark: convert it to UTF-8")
        yield newlines.decode(text)
    yield newlines.decode("", final=True)


def _json_texts(blocks, path: str):
    """Yields the "text" of each line's JSON object."""
    number, rest = 0, ""
    for block in chain(blocks, ["\n"]):
        *lines, rest = (rest + block).split("\n")
        for number, line in enumerate(lines, number + 1):
            try:
                record = json.loads(line or "null")
                text = "" if record is None else record["text"] + ""
            except (ValueError, LookupError, TypeError, RecursionError):
                advice = 'no JSON object with a string as "text"'
                raise UserError(f"{path}, line {number}: {advice}") from None
            yield text


def _plain_texts(blocks):
    """Yields what stands between lines `<|endoftext|>`; in a text without them, pieces that end at
    a blank line, or else at a line or a word."""
    rest, longest = "", PIECE
    for block in blocks:
        *whole, rest = (rest + block).split("<|endoftext|>\n")
        longest = LONGEST if whole else longest
        yield from whole
        while len(rest) > longest:
            found = [rest.rfind(mark, 1, longest) + len(mark) for mark in ("\n\n", "\n", " ")]
            end = next((end for end, shortest in zip(found, (2, 1, 1)) if end > shortest), longest)
            yield rest[:end]
            rest = rest[end:]
    yield rest


class TokenStream:
    """Token ids of one source: tokenised ahead of training by a thread, kept on disk, used again.
    `data`: for `documents`, or ids: Pythia's training data, or a .bin (flat, of 2, 4 or 8 bytes).
    Documents, end-of-text after each, are cut into sequences of `context` ids, the first being bos
    if there is one. train, val: tokens. report: called with a line now and then while a caller
    waits. UserError for an unknown, short or failing source."""

    def __init__(
        self,
        data: str,
        tokenizer: Tokenizer,
        context: int,
        train: int,
        val: int,
        cache=None,
        allow_short: bool = False,
        report=None,
    ):
        self.data, self.tokenizer, self.context = _source(data), tokenizer, context
        self.stride = context - (tokenizer.bos_id is not None)  # ids of the stream in a sequence
        self.asked, self.allow_short = (train, val), allow_short  # tokens
        self.need = [max(asked // context, 1) * self.stride for asked in self.asked]
        self.dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
        self.report = report or (lambda text: None)
        self.on_hub = _is_on_hub(self.data)
        self.folder = self._cache_folder(cache)
        self.files = [self.folder / "train.bin", self.folder / "val.bin"]
        self.stopped = self.locked_out = False
        self.steps = 0
        self._load_meta()
        self._report_older()
        self.thread = Background(self._run)
        if allow_short:
            self._wait(lambda: False)
        self.n_train = self.need[TRAIN] // self.stride

    def close(self):
        """Stop the thread; what it has written is there for the next run."""
        self.stopped = True
        self.thread.join(timeout=5)

    def train(self, start: int, count: int) -> torch.Tensor:
        """Sequences start..start+count, int64 [count, context]; waits for them or a UserError."""
        return self._sequences(TRAIN, start, count)

    def validation(self) -> torch.Tensor:
        """All validation sequences, int64 [n, context], of documents never trained on; waits."""
        return self._sequences(VAL, 0, self.need[VAL] // self.stride)

    def _sequences(self, side: int, start: int, count: int) -> torch.Tensor:
        self._wait(lambda: self.tokens[side] >= (start + count) * self.stride)
        offset = start * self.stride * self.dtype.itemsize
        with file_errors(f"cannot read {self.files[side]}"):
            ids = np.fromfile(self.files[side], self.dtype, count * self.stride, offset=offset)
            ids = torch.from_numpy(ids.astype(np.int64)).view(count, self.stride)
        top = int(ids.max()) if count else 0
        if top >= self.tokenizer.n_vocab:
            has = f"holds id {top:,}, the model's tokenizer has {self.tokenizer.n_vocab:,} ids"
            raise UserError(f"{self.data} {has}: give --data that is tokenised for it, or text")
        with_bos = (self.context - self.stride, 0)
        return torch.nn.functional.pad(ids, with_bos, value=self.tokenizer.bos_id)

    def _wait(self, enough):
        """Until `enough()` or the thread has ended; raises what ended it."""
        for tick, _ in enumerate(waiting(self.thread, self._progress)):
            if enough():
                break
            if tick % 10 == 9:
                self.report(self._status())
        self.thread.outcome()

    def _progress(self):
        """What must change while the thread is at work; always does where it may take its time."""
        return self.steps if self.on_hub and not self.locked_out else time.monotonic()

    def _status(self) -> str:
        if self.locked_out:
            return f"waiting for another process that tokenises into {self.folder}"
        have = sum(map(min, self.tokens, self.need))
        return f"tokenising: {have / 1e6:.1f}M of {sum(self.need) / 1e6:.1f}M tokens"

    def _lacks(self, *sides: int) -> bool:
        return not self.stopped and any(self.tokens[side] < self.need[side] for side in sides)

    def _cache_folder(self, cache) -> Path:
        """Named after all that the ids depend on. On the Hub, the name stands for the files."""
        files = self.data
        if not self.on_hub:
            stats = [(path, os.stat(path)) for path, _ in source_files(self.data)]
            files = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
        tokenizer = (self.tokenizer.fingerprint, self.tokenizer.eos_id, self.tokenizer.bos_id)
        key = json.dumps([files, tokenizer, self.dtype.str, BATCH])
        root = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        if root.startswith("~") and not cache:
            raise UserError("no home folder to keep tokens in: set XDG_CACHE_HOME")
        return Path(cache or root + "/saeft", hashlib.sha256(key.encode()).hexdigest()[:16])

    def _report_older(self):
        """Name the folders of other versions of this source: nothing is removed unasked."""
        older = []
        for meta in [] if self.folder.exists() else self.folder.parent.glob("*/meta.json"):
            with suppress(UserError, OSError):
                if read_json(meta).get("data") == self.data:
                    older.append(meta.parent)
        size = sum(file.stat().st_size for folder in older for file in folder.iterdir())
        if older:
            folders = " ".join(map(str, older))
            self.report(f"{size / 1e6:,.1f} MB of older tokens of {self.data}: rm -r {folders}")

    def _load_meta(self):
        """Each side's tokens on disk, and how much of the source they took; 0 if damaged."""
        self.tokens, self.passed = [0, 0], [0, 0]
        with suppress(UserError, OSError, LookupError, TypeError, ValueError):
            meta = read_json(self.folder / "meta.json")
            tokens, passed = meta["tokens"], meta["passed"]
            held = [path.stat().st_size // self.dtype.itemsize for path in self.files]
            natural = all(type(n) is int and n >= 0 for n in (*tokens, *passed))
            fits = all(n <= most for n, most in zip(tokens, held, strict=True))
            if natural and fits and len(passed) == 2:
                self.tokens, self.passed = tokens, passed

    def _run(self):
        """The thread."""
        try:
            if self._lacks(TRAIN, VAL):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.locked_out = True
                with hf.utils.WeakFileLock(self.folder / "lock"):  # one process at a time
                    self.locked_out = False
                    self._load_meta()
                    self._copy_ids() if re.search(IDS, self.data, re.I) else self._tokenise()
        except OSError as error:
            raise UserError(f"cannot write {self.folder} ({error}): set XDG_CACHE_HOME") from error
        self._settle(TRAIN, "training", "--tokens")
        self._settle(VAL, "validation", "--eval-tokens")

    def _settle(self, side: int, kind: str, flag: str):
        """The source has ended, or the budget: make do with less where that is allowed."""
        have = self.tokens[side] // self.stride * self.stride
        if self.allow_short and have:
            self.need[side] = min(self.need[side], have)
        if self._lacks(side):
            advice = f"lower {flag}, or pass --allow-short to train on what there is"
            short = f"{self.tokens[side]:,} {kind} tokens, {self.asked[side]:,} were asked for"
            raise UserError(f"{self.data} has {short}: {advice if have else 'give more text'}")

    def _tokenise(self):
        """Both sides grow by the same documents, of which `passed` counts the batches."""
        source, threads = documents(self.data), (os.cpu_count() or 1) // 2 or 1
        batches = iter(lambda: list(islice(source, BATCH)), [])
        for number, texts in enumerate(batches, 1):
            self.steps += 1
            if number > self.passed[TRAIN]:
                ids = self.tokenizer.encode_batch(texts, threads)
                for side in (TRAIN, VAL):
                    own = [x for x, text in zip(ids, texts) if held_out(text) == (side == VAL)]
                    ends = [np.append(each, self.tokenizer.eos_id) for each in own]
                    self._append(side, np.concatenate([[], *ends]))
                self._keep([number, number])
            if not self._lacks(TRAIN, VAL):
                break

    def _copy_ids(self):
        """Training: the first file. Validation: the last; of one file, the documents at its end.
        `passed` counts bytes."""
        files = source_files(self.data)
        (first, size), (last, end), start = files[0], files[-1], 0
        stored = self._stored_type(first, size)
        if len(files) == 1:
            start = size = self._last_documents(first, size, stored)
        for side, path, begin, stop in ((VAL, last, start, end), (TRAIN, first, 0, size)):
            at = begin + self.passed[side]
            while at < stop and self._lacks(side):
                missing = (self.need[side] - self.tokens[side]) * stored.itemsize
                ids = _ids_at(path, at, min(stop, at + BLOCK, at + missing), stored)
                at += ids.nbytes
                self._append(side, ids)
                self.passed[side] = at - begin
                self._keep(self.passed)

    def _stored_type(self, path: str, size: int) -> np.dtype:
        """The widest integers as which the first ids of a file are ids of the tokenizer."""
        for stored in map(np.dtype, ("<i8", "<u4", "<u2")):
            if size % stored.itemsize == 0:
                ids = _ids_at(path, 0, min(size, 4096), stored)
                if ((ids >= 0) & (ids < self.tokenizer.n_vocab)).all():
                    return stored
        has = f"no ids under {self.tokenizer.n_vocab:,} in 2, 4 or 8 bytes each"
        raise UserError(f"{path} holds {has}: give ids of the model's tokenizer, or text")

    def _last_documents(self, path: str, size: int, stored: np.dtype) -> int:
        """Where the documents in the last 20th of a file of ids begin."""
        cut = size // 20 * 19 // stored.itemsize * stored.itemsize
        skip = max(cut - BLOCK, 0)
        ends = np.flatnonzero(_ids_at(path, skip, cut, stored) == self.tokenizer.eos_id)
        return skip + (int(ends[-1]) + 1) * stored.itemsize if len(ends) else cut

    def _append(self, side: int, ids: np.ndarray):
        """Ids to a side's file, a written <bos> left out. What meta.json does not count, of an
        interrupted run, is written over."""
        ids = ids[ids != self.tokenizer.bos_id]
        top, n_vocab = int(ids.max(initial=0)), self.tokenizer.n_vocab
        if top >= n_vocab:
            has = f"holds id {top:,}, the model's tokenizer has {n_vocab:,} ids"
            raise UserError(f"{self.data} {has}: give --data that is tokenised for it, or text")
        with open(self.files[side], "ab") as file:
            end = self.tokens[side] * self.dtype.itemsize
            if file.tell() < end:
                raise UserError(f"{self.files[side]} was cut off meanwhile: start again")
            file.truncate(end)
            file.write(ids.astype(self.dtype).tobytes())
        self.tokens[side] += len(ids)

    def _keep(self, passed: list[int]):
        """Let the next run go on from here."""
        self.passed = passed
        self.steps += 1
        meta = {"data": self.data, "tokens": self.tokens, "passed": passed}
        write_text(self.folder / "meta.json", json.dumps(meta))


def _ids_at(path: str, start: int, stop: int, stored: np.dtype) -> np.ndarray:
    with opened(path) as file:
        file.seek(start)
        return np.frombuffer(file.read(stop - start), stored)
