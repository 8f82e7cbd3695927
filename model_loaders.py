"""What touches disk, network or terminal: the Hub, config.json, safetensors, SAE files, tokenizers,
token streams, the folder of a run.

Whatever a user can mend ends in UserError, one line; so do damaged and hostile files."""

import argparse
import codecs
import copy
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import stat
import sys
import threading
import unicodedata
import zlib
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import chain, groupby, islice, takewhile
from pathlib import Path

import huggingface_hub as hf
import numpy as np
import tiktoken
import torch
from huggingface_hub import errors as hub
from huggingface_hub.utils import logging as hub_logging

# ---- The command line and the terminal ---------------------------------------------------------


class UserError(Exception):
    """What the user asked for cannot be done: one line that names the value and says what to do."""


def refuse(wrong: bool, message: str):
    """UserError where something is wrong."""
    if wrong:
        raise UserError(message)


@contextmanager
def user_errors(what: str):
    """Turn whatever goes wrong inside into UserError: `what`, and why, in one line."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{what}: pip install {error.name}") from error
    except Exception as error:  # the disk's or the content's: each decompressor has its own
        why = str(error) if isinstance(error, UnicodeError) else repr(error)
        why = re.sub(r"(\\n|\\t|\s)+", " ", why)
        raise UserError(f"{what} ({why:.300})") from error


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors."""

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def count(text: str) -> int:
    """A whole number, also written 500M, 25M, 4k or 1e6."""
    unit = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    value = float(text[:-1] if unit > 1 else text) * unit
    value = round(value, 4)  # 4.1M is not quite 4.1e6
    if not value.is_integer():
        raise ValueError(text)
    return int(value)


def flag(default, help: str, low: float = -math.inf, high: float = 10**18, **options):
    """A dataclass's field that is also a flag of the command line; numbers are from low to high."""
    metadata = {"help": help, "range": (low, high), "options": options}
    return field(default_factory=lambda: copy.copy(default), metadata=metadata)


def flags_of(settings: type, description: str) -> Parser:
    """A parser of the flags that the fields of a dataclass are; it leaves out what is not given."""
    absent = argparse.SUPPRESS
    parser = Parser(description=description, argument_default=absent, allow_abbrev=False)
    kinds = {"int": count, "float": float, "str": str}
    for f in fields(settings):
        default = f.default_factory()
        shown = "" if default is None else f" (default: {default})"
        options = {"help": f.metadata["help"] + shown, **f.metadata["options"]}
        if f.type == "bool":
            options["action"] = "store_true"
        else:
            options["type"] = next(kinds[name] for name in kinds if name in f.type)
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    return parser


def check_ranges(settings):
    """UserError where a number is out of its field's range, or a text is empty."""
    for f in fields(settings):
        value, (low, high) = getattr(settings, f.name), f.metadata["range"]
        for one in value if isinstance(value, list) else [value]:
            fits = low <= one <= high if isinstance(one, (int, float)) else one != ""
            refuse(
                not fits, f"--{f.name.replace('_', '-')} {one!r} is not from {low:g} to {high:g}"
            )


def say(text: str, end: str = "\n"):
    """A line for the reader. The first process speaks for all; a closed stdout ends nothing."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    try:
        print(f"\r\033[K{text}" if sys.stdout.isatty() else text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def progress(text: str, now=False):
    """A line that, on a terminal, is cut to its width and gives way to the next."""
    if sys.stdout.isatty():
        say(text[: shutil.get_terminal_size().columns - 1], end="")
    else:
        say(text)


# ---- Models on the Hub or in a folder ---------------------------------------------------------

TINY = Path(__file__).parent / "assets" / "tiny"  # the embedded model and its text
if not TINY.is_dir():  # installed from a wheel
    TINY = Path(__file__).parent / "saeft_assets" / "tiny"
MODELS = {"tiny": str(TINY), "gemma-3-270m": "google/gemma-3-270m"}
for size in "14m 31m 70m 160m 410m 1b 1.4b 2.8b 6.9b 12b".split():
    for name in (f"pythia-{size}", f"pythia-{size}-deduped"):
        MODELS[name] = f"EleutherAI/{name}"
for name in ("gemma-2-2b", "gemma-2-9b"):
    MODELS[name] = f"google/{name}"
for name in ("gemma-3-1b", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b"):
    MODELS[name] = f"google/{name}-pt"
# Buffers of old GPT-NeoX checkpoints, and the part of Gemma 3 that sees: no parameters of ours.
IGNORED = r"attention\.(bias|masked_bias|rotary_emb\.inv_freq)$|vision_tower\.|multi_modal_proj"
PATIENCE = 60  # seconds for the Hub to answer, or to send BLOCK bytes
BLOCK = 1 << 22
hub_logging.set_verbosity_error()  # warnings of its retries would bury our one line


@contextmanager
def hub_errors(repo: str, filename: str = "such file"):
    """Turn the Hub client's exceptions into UserError; `repo`: owner/name, datasets/owner/name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # also of its HTTP library, or over a malformed answer
        if isinstance(error, FileNotFoundError):
            error = error.__cause__ or error  # "not in the cache either": the cause says why
        status = getattr(getattr(error, "response", None), "status_code", None)
        gated = isinstance(error, hub.GatedRepoError)
        if isinstance(error, (hub.RepositoryNotFoundError, hub.HFValidationError)) and not gated:
            advice = "try pythia-160m or tiny (private: set HF_TOKEN)"
            message = f"no folder and no Hub repository {repo!r}: {advice}"
        elif status in (401, 403):
            terms = f"accept its licence at https://huggingface.co/{repo}, set HF_TOKEN"
            message = f"no access to {repo} ({status}): {terms}"
        elif isinstance(error, (hub.EntryNotFoundError, FileNotFoundError)) or status == 404:
            read = "models are read from safetensors files only, SAEs from SAELens's layout"
            message = f"{repo} has no {filename}: check the name and revision ({read})"
        else:
            advice = "try again, or a folder, --model tiny, --data tiny"
            message = f"cannot fetch {repo} (error: {status or repr(error)[:300]}): {advice}"
        raise UserError(message) from error


def in_background(call, *args) -> Future:
    """A call in a thread that does not keep the process alive."""
    future = Future()

    def run():
        try:
            future.set_result(call(*args))
        except BaseException as error:  # tiktoken's panics are no Exception
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def in_time(call, *args):
    """What a call to the Hub returns, or an error where next to nothing comes."""
    return in_background(call, *args).result(PATIENCE)


def fetch(name: str, filename: str) -> Path:
    """One file of a model, perhaps in a subfolder. `name`: a short name of MODELS, a folder like
    a Hub snapshot, or owner/name; on the Hub also name@revision. Raises UserError."""
    short, _, revision = name.partition("@")
    repo, folder = MODELS.get(short, short), os.path.expanduser(MODELS.get(name, name))
    with hub_errors(repo, filename):
        if os.path.isdir(folder):
            os.stat(os.path.join(folder, filename))
            return Path(folder, filename)
        if "/" not in repo:
            raise hub.HFValidationError  # a bare name, none of ours
        file = {"repo_id": repo, "filename": filename, "revision": revision or None}
        path = hf.try_to_load_from_cache(**file)
        if not isinstance(path, str):  # without a network the first call fails at once
            about = in_time(hf.get_hf_file_metadata, hf.hf_hub_url(**file))
            seconds = PATIENCE * (1 + (about.size or 0) / BLOCK)
            path = in_background(partial(hf.hf_hub_download, **file)).result(seconds)
        return Path(path)


def load_config(name: str) -> dict:
    """The model's config.json. Raises UserError, also when it is not a JSON object."""
    return read_json(fetch(name, "config.json"))


def load_weights(name: str, device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A language model's tensors by name; of a model that also sees, named as where it does not.
    Raises UserError, also where they are not finite."""
    weights = {}
    for key, tensor in _all_weights(name, device, dtype).items():
        if not re.search(IGNORED, key):
            key = key.replace("language_model.model.", "model.").replace("language_model.", "")
            weights[key] = tensor
            if not tensor.isfinite().all():
                what = f"{name}: {key} is not finite in {dtype}"
                raise UserError(f"{what}: a damaged file, or too large")
    return weights


def _all_weights(name: str, device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of the shards that an index lists, or of model.safetensors."""
    try:
        index = fetch(name, "model.safetensors.index.json")
    except UserError:  # none, or out of reach: then the next line says why
        return read_safetensors(fetch(name, "model.safetensors"), device, dtype)
    where, weights = read_json(index).get("weight_map"), {}
    with user_errors(f"cannot read {index}"):
        files = sorted({*where.values()})
        if not all(re.fullmatch(r"[\w.-]+\.safetensors", file) for file in files):
            raise ValueError("weight_map must name plain *.safetensors files")
    for file in files:
        weights.update(read_safetensors(fetch(name, file), device, dtype))
    absent = sorted(where.keys() - weights.keys())
    if absent:
        raise UserError(f"{index} lists {absent[0]!r:.100}, which none of its files has")
    return weights


# ---- Files: JSON, safetensors, SAEs ------------------------------------------------------------

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES = FLOATS | INTEGERS | {"U8": torch.uint8, "BOOL": torch.bool}
# What cfg.json may say for an SAE that our equations express; it says the first where it is silent.
SAE_SETTINGS = {
    "architecture": ["standard", "topk", "jumprelu"],
    "apply_b_dec_to_input": [True],
    "rescale_acts_by_decoder_norm": [False],
    "normalize_activations": ["none", None],
    "reshape_activations": ["none", None],
    "activation_fn_str": ["relu"],  # before SAELens 6
}


@contextmanager
def open_file(path):
    """The bytes of a regular file; UserError for whatever goes wrong while it is open."""
    with user_errors(f"cannot read {path}"):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            if file.peek().startswith(b"version https://git-lfs"):
                raise ValueError("a Git LFS pointer in place of the file: git lfs pull")
            yield file


def read_json(path) -> dict:
    """The JSON object in a file. Raises UserError."""
    with open_file(path) as file:
        return _json_object(file.read())


def _json_object(text: bytes) -> dict:
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a JSON object with one key twice")
        return dict(pairs)

    # int("NaN"), which is no JSON, is a ValueError.
    return {**json.loads(text.decode(), object_pairs_hook=unique, parse_constant=int)}


def read_safetensors(path, device="cpu", dtype: torch.dtype | None = None) -> dict:
    """Tensors by name, floating ones in `dtype` if given. UserError if damaged or hostile."""
    tensors = {}
    with open_file(path) as file:
        for name, stored, shape in _read_header(file):
            kept = dtype if dtype and stored.is_floating_point else stored
            tensors[name] = torch.empty(shape, dtype=kept, device=device)
            chunk = torch.empty(BLOCK, dtype=stored)  # all that is in memory beside the result
            for part in tensors[name].view(-1).split(BLOCK):
                data = chunk[: len(part)]
                file.readinto(data.view(torch.uint8).numpy())
                part.copy_(data)
    return tensors


def _read_header(file) -> list[tuple]:
    """(name, dtype, shape) of the tensors in a safetensors file, whose data they must fill."""
    length = int.from_bytes(file.read(8), "little")
    size = os.fstat(file.fileno()).st_size - 8 - length  # of the data
    if size < 0 or not 0 < length <= 100_000_000:
        raise ValueError(f"a header of {length:,} bytes does not fit the file, or 100 MB")
    header = _json_object(file.read(length))
    json.dumps(header, ensure_ascii=False).encode()  # ValueError: half a surrogate pair
    if not all(type(text) is str for text in header.pop("__metadata__", {}).values()):
        raise ValueError("__metadata__ must map strings to strings")
    found, end = [], 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, span, dtype = entry["shape"], entry["data_offsets"], DTYPES[entry["dtype"]]
        natural = all(type(n) is int and n >= 0 for n in (*shape, *span))
        if not natural or span != [end, end + math.prod(shape) * dtype.itemsize]:
            raise ValueError(f"tensor {name!r:.60} cannot be {entry!r:.200}")
        found.append((name, dtype, shape))
        end = span[1]
    if end != size:
        raise ValueError(f"data of {size:,} bytes for tensors of {end:,}")
    return found


@contextmanager
def replacing(path: Path):
    """A file to write, which takes the place of `path` when it is whole and on the disk; what an
    interrupted save has left is written over. Whatever goes wrong meanwhile is a UserError."""
    part = path.with_name(f".{path.name}.part")
    with user_errors(f"cannot write {path}"):
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
    """Write a text in UTF-8: all or nothing. Raises UserError."""
    with replacing(Path(path)) as file:
        file.write(text.encode())


def write_safetensors(path, tensors: dict, metadata: dict, cfg: dict | None = None):
    """Write `tensors`, with `cfg` to cfg.json beside them: all or nothing. Raises UserError."""
    path, codes = Path(path), {dtype: code for code, dtype in DTYPES.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))  # all aligned
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        entry = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # What is opened last is renamed first: the weights, and then cfg.json.
    cfg_file = replacing(path.with_name("cfg.json")) if cfg else nullcontext(io.BytesIO())
    with cfg_file as beside, replacing(path) as file:
        beside.write(json.dumps(cfg, indent=2).encode())
        beside.flush()  # a full disk shows before the weights are replaced
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def write_sae(folder, tensors: dict, cfg: dict):
    D, F = len(tensors["b_dec"]), len(tensors["b_enc"])
    shape = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none"}
    metadata = {"sae_lens_version": "6.54.0", **cfg.get("metadata", {})}
    write_safetensors(Path(folder, "sae_weights.safetensors"), {**tensors, "W_enc": tensors["W_enc"].T}, {"format": "pt"}, {**shape, **cfg, "metadata": metadata})


def read_sae(source):
    source = str(source)
    name, _, inside = source.partition(":")
    if os.path.isdir(os.path.expanduser(source)):
        name, inside = source, ""
    cfg = read_json(fetch(name, os.path.join(inside, "cfg.json")))
    path = fetch(name, os.path.join(inside, "sae_weights.safetensors"))
    tensors = read_safetensors(path, dtype=torch.float32)
    tensors["W_enc"] = tensors["W_enc"].T
    cfg["metadata"] = cfg["metadata"] if isinstance(cfg.get("metadata"), dict) else {}
    cfg["metadata"].setdefault("saeft", {})
    return tensors, cfg


def sae_metadata(settings: dict, prepend_bos: bool, first_sequence: int) -> dict:
    model = settings["model"]
    return {
        "model_name": model if model == "tiny" else MODELS.get(model, model),
        "hook_name": f"blocks.{settings['layer']}.hook_{settings['place']}",
        "context_size": settings["context"],
        "prepend_bos": prepend_bos,
        "dataset_path": settings["data"],
        "model_from_pretrained_kwargs": {"center_writing_weights": False},  # x as it is
        "first_sequence": first_sequence,
    }


def sae_settings(cfg):
    m = cfg["metadata"]
    hook = re.fullmatch(r"blocks\.(\d+)\.hook_(.*)", m["hook_name"])
    told = {"layer": int(hook[1]), "place": hook[2], "model": m["model_name"], "data": m["dataset_path"],
        "bos": "yes" if m["prepend_bos"] else "no", "context": m["context_size"], "tokens": m["first_sequence"] * m["context_size"], "d_sae": cfg["d_sae"]}
    if cfg.get("k"):
        told["k"] = [cfg["k"]]
    return told


def model_key(name):
    return name


# ---- Tokenizers, on tiktoken ------------------------------------------------------------------

# What the two kinds of tokenizer.json say, beside what is null, false or "", and NEUTRAL.
NEUTRAL = {"vocab", "merges", "unk_token", "fuse_unk", "trim_offsets"}  # they change no id
NEOX = {
    "model": [{"type": "BPE"}],
    "normalizer": [None, {"type": "NFC"}],
    "pre_tokenizer": [{"type": "ByteLevel"}, {"type": "ByteLevel", "use_regex": True}],
}
WHOLE = {"Sequence": {"id": "A", "type_id": 0}}  # the text, where special tokens are set beside it
SPACE = {"pattern": {"String": " "}}
GEMMA = {  # transformers' form of a SentencePiece model; its split finds no space left to split at
    "model": [{"type": "BPE", "byte_fallback": True}],
    "normalizer": [SPACE | {"type": "Replace", "content": "▁"}],
    "pre_tokenizer": [None, SPACE | {"type": "Split", "behavior": "MergedWithPrevious"}],
}

# GPT-2 writes a byte as a character: the same where printable, else the next one from U+0100 on.
_OTHERS = [b for b in range(256) if b == 0x20 or not chr(b).isprintable()]
GPT2_BYTES = {chr(256 + _OTHERS.index(b) if b in _OTHERS else b): bytes([b]) for b in range(256)}
SPM_BYTES = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}  # SentencePiece's names of bytes
UTF8_BYTES = {bytes([b]) for b in (*range(0xC0), *range(0xC2, 0xF5))}  # the others never occur

# GPT-2's split, but its end \s+(?!\S)|\s+ in blocks of 500, or a long run would exhaust the stack.
GPT2_SPLIT = r"'(?:[stmd]|ll|re|ve)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|(?:\s{500})*\s+(?!\S)|\s"
# The reference's NFC is Unicode 9's: it leaves the characters listed (of 10 to 17) as they are.
OLDER_TEXT = (
    "[^\u07fd\u0897-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1af0\u1df6-\u1dfa\ua82c"
    "\U000105c9-\U000105e4\U00010d24-\U00010f85\U00011070\U0001133b\U00011382-\U000113d0\U0001145e"
    "\U00011839-\U00011a99\U00011d42-\U0001612f\U00016d63-\U00016ff1\U0001e08f-\U0001e6f5]+"
)


def _nfc(text: str) -> str:
    return re.sub(OLDER_TEXT, lambda older: unicodedata.normalize("NFC", older[0]), text)


def _gpt2_bytes(token: str) -> bytes:
    known = GPT2_BYTES.keys() >= {*token}  # else it is an added token
    return b"".join(map(GPT2_BYTES.get, token)) if known else token.encode()


def _gemma_bytes(token: str) -> bytes:
    return SPM_BYTES.get(token) or token.replace("▁", " ").encode()


def _check_settings(spec: dict, kind: dict):
    """ValueError for any setting that could mean other ids."""
    for part, accepted in (kind | {"truncation": [None], "padding": [None]}).items():
        said = spec.get(part)
        if said:
            said = {k: v for k, v in said.items() if k not in NEUTRAL and (v or k == "use_regex")}
        if said not in accepted:
            raise ValueError(f"{part} {said!r:.200}: only BPE like GPT-NeoX's or Gemma's")
    post = spec.get("post_processor") or {"type": "ByteLevel"}
    texts = [part for part in post.get("single", [WHOLE]) if "Sequence" in part]
    if post["type"] not in ("ByteLevel", "TemplateProcessing") or texts != [WHOLE]:
        raise ValueError(f"post_processor {post!r:.200}")
    for token in spec["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or not token["content"]:
            raise ValueError(f"added token {token!r:.200}")


def _all_ids(spec: dict) -> dict[str, int]:
    """{token: id}, 0, 1, 2, .. without a gap; added tokens after those of the vocabulary, as the
    reference counts them whatever is written in the file. ValueError where that differs."""
    ids = dict(spec["model"]["vocab"])
    natural = {type(i) for i in ids.values()} == {int}
    if not natural or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError("the ids of its vocabulary are not 0, 1, 2, ..")
    added = [token["content"] for token in spec["added_tokens"]]
    expected = [ids.setdefault(text, len(ids)) for text in added]
    if expected != [token["id"] for token in spec["added_tokens"]] or len({*added}) < len(added):
        raise ValueError("added tokens whose ids do not follow, or one twice")
    return ids


def _bpe(parts: list[str], ranks: dict[str, int], below: float = math.inf) -> list[str]:
    """Merge the neighbours that make the token of the lowest rank, while one is under `below`."""
    while len(parts) > 1:
        made = [ranks.get(left + right, math.inf) for left, right in zip(parts, parts[1:])]
        at = made.index(min(made))
        if made[at] >= below:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _made_tokens(merges: list[tuple[str, str]], vocab: dict[str, int]) -> list[str]:
    """The tokens that merges make, by rank.

    The reference merges the pair that stands first in the list, tiktoken the neighbours that make
    the token of the lowest rank. They agree if the merges of each token stand together, and its
    characters, by all merges before, become one of its pairs; or else if no pair of it is missing
    (SentencePiece). Published files are so, in the order of training; ValueError for others.
    Gemma 3 begins with all runs of a character, mixed, but the longest left part first: as good."""
    runs = list(takewhile(lambda pair: len({*pair[0], *pair[1]}) == 1, merges))
    if runs != sorted(runs, key=lambda pair: (-len(pair[0]), -len(pair[1]))):
        runs = []
    made = [left + right for left, right in merges]
    tokens = [*dict.fromkeys(made[: len(runs)]), *(t for t, _ in groupby(made[len(runs) :]))]
    ranks, listed = {token: rank for rank, token in enumerate(tokens)}, set(merges)
    if len(ranks) < len(tokens) or not vocab.keys() >= {*tokens, *chain(*merges)}:
        raise ValueError("merges of one token stand apart, or of none of the vocabulary")
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
    """{bytes: ids} of what is there before any merge, by rank: bytes, leading bytes of characters,
    characters, so that tiktoken puts these together first. Others keep the ids of their bytes."""
    chars = {char.replace("▁", " ").encode(): [i] for char, i in vocab.items() if len(char) == 1}
    units = {byte: [vocab[name]] for name, byte in SPM_BYTES.items() if name in vocab}
    for lead in {char[:n] for char in chars for n in range(2, len(char))}:
        units[lead] = [vocab[f"<0x{byte:02X}>"] for byte in lead]
    return units | chars


def _gemma_split(tokens: list[str]) -> str:
    """Pieces for speed: words with the spaces before them, together with the next word where they
    end in a character that some token has before a space."""
    before = {*re.findall("([^ ▁])▁", " ".join(tokens))}
    chars = "".join(f"\\x{{{ord(char):x}}}" for char in before)
    return (f" *(?:[^ ]*[{chars}] +)+[^ ]*|" if before else "") + " *[^ ]+| +"


def _any_of(texts: list[str]) -> re.Pattern:
    """The longest of the texts. In groups, or each "<" were tried against 6,000 of Gemma's."""
    groups = groupby(sorted(texts, reverse=True), lambda text: re.escape(text[:8]))
    options = [
        start + "(?:" + "|".join(re.escape(t[8:]) for t in rest) + ")" for start, rest in groups
    ]
    return re.compile(f"({'|'.join(options) or '(?!)'})")


class Tokenizer:
    """A parsed `tokenizer.json`; ids are those of the reference library, `tokenizers`.
    Byte-level BPE (GPT-NeoX), or BPE over characters with byte fallback (Gemma: ▁ is a space).
    n_vocab: largest id + 1. eos_id: the token between documents, by default <|endoftext|>, <eos>
    or </s>. bos_id: None without a <bos>. An exception for files that are not read exactly."""

    def __init__(self, spec: dict, eos: str | int | None = None):
        vocab, gemma = spec["model"]["vocab"], bool(spec["model"].get("byte_fallback"))
        _check_settings(spec, GEMMA if gemma else NEOX)
        ids = _all_ids(spec)
        text = json.dumps(spec, ensure_ascii=False)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.n_vocab, self.bos_id = len(ids), ids.get("<bos>")
        names = ("<|endoftext|>", "<eos>", "</s>") if eos is None else (eos,)
        known = [ids.get(name, name) for name in names if ids.get(name, name) in range(len(ids))]
        if not known:
            raise ValueError(f"it has no end of text, {' or '.join(map(str, names))}")
        self.eos_id = known[0]
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in spec["model"]["merges"]]
        made = _made_tokens(merges, vocab)
        letters = {*"".join(made)}
        if gemma and (" " in letters or SPM_BYTES.keys() & {*made, *chain(*merges)}):
            raise ValueError("merges of a space or of <0x..>")
        if not gemma and not GPT2_BYTES.keys() >= letters:
            raise ValueError("merges of a character that stands for no byte")
        if gemma:
            units, split = _gemma_units(vocab), _gemma_split(made)
            to_bytes, self._normalize = _gemma_bytes, partial(re.sub, "▁", " ")
        else:
            units = {byte: [vocab[char]] for char, byte in GPT2_BYTES.items() if char in vocab}
            split, to_bytes = GPT2_SPLIT, _gpt2_bytes
            self._normalize = _nfc if spec.get("normalizer") else str
        if not units.keys() >= UTF8_BYTES:
            raise ValueError("the vocabulary has no token for some byte")
        units |= {to_bytes(token): [vocab[token]] for token in made}
        ranks = {unit: rank for rank, unit in enumerate(units)}
        self._bpe = tiktoken.Encoding("", pat_str=split, mergeable_ranks=ranks, special_tokens={})
        self._ids_of_rank = list(units.values())
        self._bytes = {i: to_bytes(token) for token, i in ids.items()}
        raw = [token["content"] for token in spec["added_tokens"] if not token["normalized"]]
        late = [token["content"] for token in spec["added_tokens"] if token["normalized"]]
        late = {self._normalize(text): ids[text] for text in late}
        self._cut, self._cut_late, self._added = _any_of(raw), _any_of([*late]), ids | late

    def encode(self, text: str) -> list[int]:
        """The ids of a text: no <bos>, no end of text, but the added tokens written in it."""
        ids = []
        for i, part in enumerate(self._cut.split(text)):  # text, added token, text, ..
            pieces = ["", part] if i % 2 else self._cut_late.split(self._normalize(part))
            for j, piece in enumerate(pieces):
                if j % 2:
                    ids.append(self._added[piece])
                else:
                    ranks = self._bpe.encode_ordinary(piece)
                    ids += chain.from_iterable(map(self._ids_of_rank.__getitem__, ranks))
        return ids

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """The ids of each text, int32. tiktoken works outside the GIL."""
        with ThreadPoolExecutor(threads) as pool:
            return list(map(np.int32, pool.map(self.encode, texts)))

    def decode(self, ids) -> str:
        """The text of ids, added tokens included; numbers that are no token's are left out."""
        return b"".join(self._bytes.get(int(i), b"") for i in ids).decode(errors="replace")


def load_tokenizer(name: str, bos: str = "auto") -> Tokenizer:
    """The tokenizer of a model: a short name, a Hub owner/name or a folder. bos: "no" takes its
    <bos> away, "yes" lets the end of text serve where there is none. Raises UserError."""
    path, eos = fetch(str(name), "tokenizer.json"), None
    for filename, key in (("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        with suppress(UserError):  # there is no such file
            said = read_json(fetch(str(name), filename)).get(key)
            said = said.get("content") if isinstance(said, dict) else said
            eos = eos if said is None else said
    with user_errors(f"cannot read {path}"):
        tokenizer = Tokenizer(read_json(path), eos[0] if isinstance(eos, list) else eos)
    if bos == "yes" and tokenizer.bos_id is None:
        tokenizer.bos_id = tokenizer.eos_id  # as is usual for Pythia
    if bos == "no":
        tokenizer.bos_id = None
    return tokenizer


# ---- Documents and token streams --------------------------------------------------------------

DATASETS = {"c4": "allenai/c4", "pile": "monology/pile-uncopyrighted"}  # short name -> source
DATASETS["pythia"] = "EleutherAI/pile-standard-pythia-preshuffled"
DATASETS["pythia-deduped"] = "EleutherAI/pile-deduped-pythia-preshuffled"
DATASETS["tiny"] = str(TINY / "text.jsonl.gz")
HUB_FOLDERS = {"allenai/c4": "/en", "monology/pile-uncopyrighted": "/train"}  # listing all is slow
IDS = re.compile(r"\.bin$|-pythia-preshuffled$", re.I)  # so ends a source of ids, not of text
TEXT = re.compile(r"\.(txt|py|jsonl|json(?=\.gz))(\.gz|\.zst)?$", re.I)
LONGEST, PIECE = 1 << 16, 1 << 13  # characters in a document; in one of a .txt without marks
BATCH = 64  # documents tokenised at a time
OTHER_IDS = "give --data that is tokenised for the model, or text"
TRAIN, VAL = 0, 1  # the two sides, as `held_out` tells them


def usual_data(tokenizer, model="x") -> str:
    """The source of tokens where none is given: Pythia's own, or c4."""
    deduped = "-deduped" if "-deduped" in model else ""
    return f"pythia{deduped}" if "pythia" in model else "c4"


def held_out(text: str) -> bool:
    """Whether a document is for validation (1 in 20): the same text is always on the same side."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % 20 == 0


def _place(data: str) -> str:
    """Where a source is: a path, or hf://datasets/owner/name."""
    path = os.path.expanduser(DATASETS.get(data, data))
    name = path.removeprefix("datasets/")
    local = os.path.exists(path) or TEXT.search(name) or not re.fullmatch(r"[\w-]+/[\w.-]+", name)
    return path if local else f"hf://datasets/{name}"


def source_files(data: str) -> list[tuple[str, int]]:
    """(path, bytes) of a source's files: local ones mixed by a fixed seed, the Hub's in order."""
    place = _place(data)
    wanted = re.compile(r"\.bin$", re.I) if IDS.search(place) else TEXT
    if place.startswith("hf://"):
        repo = place.removeprefix("hf://")
        with hub_errors(repo):
            find = partial(hf.HfFileSystem().find, repo + HUB_FOLDERS.get(data, ""), detail=True)
            listing = in_time(find).items()
            found = sorted((f"hf://{path}", entry["size"]) for path, entry in listing)
        found = [f for f in found if wanted.search(f[0]) and not f[0].endswith(".py")]  # a loader
        found = [f for f in found if "train" in f[0].removeprefix(place)] or found
    else:
        found = [(path, os.path.getsize(path)) for path in _walk(place) if wanted.search(path)]
        random.Random(0).shuffle(found)
    if not found:
        forms = f".txt, .jsonl, .py, .bin, owner/name on the Hub, {', '.join(DATASETS)}"
        raise UserError(f"no text in {data!r}: give one of {forms}")
    return found


def _walk(root: str) -> list[str]:
    """The regular files in a folder, or the one file; links are followed, each folder read once,
    what is hidden left out."""
    paths, seen = [root], set()
    for folder, subfolders, names in os.walk(root, followlinks=True) if os.path.isdir(root) else ():
        if os.path.realpath(folder) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        paths += [os.path.join(folder, name) for name in sorted(names) if name[0] != "."]
    return [path for path in paths if os.path.isfile(path)]


@contextmanager
def opened(path: str):
    """The bytes of a file on the disk or the Hub; whatever fails meanwhile is a UserError."""
    if not path.startswith("hf://"):
        with open_file(path) as file:
            yield file
        return
    parts = path.split("/")
    with hub_errors("/".join(parts[2:5]), "/".join(parts[5:])):
        with hf.HfFileSystem().open(path, cache_type="none") as file:
            file.read = partial(in_time, file.read)  # by ranges, so that no cut passes for the end
            yield file


def documents(data: str):
    """Yields the documents of a file or folder of .txt, .py, .jsonl (.gz, .zst), or a Hub dataset,
    always in the same order, cut after LONGEST characters. Raises UserError."""
    for path, _ in source_files(data):
        with opened(path) as file:
            blocks = _unpacked(io.BufferedReader(file, BLOCK), path.lower())
            texts = codecs.iterdecode(blocks, "utf-8-sig")
            plain = TEXT.search(path)[1].lower() in ("txt", "py")
            for text in _plain_texts(texts) if plain else _json_texts(texts, path):
                for start in range(0, len(text), LONGEST):
                    if text[start : start + LONGEST].strip():
                        yield text[start : start + LONGEST]


def _unpacked(file, path: str):
    """Yields the bytes of a file, unpacked by its suffix. EOFError if it is truncated."""
    if not path.endswith(".zst"):
        file = gzip.open(file) if path.endswith(".gz") else file
        yield from iter(partial(file.read, BLOCK), b"")
        return
    import zstandard

    frame = None
    for packed in iter(partial(file.read, 4096), b""):  # of which no more than 130 MB can come
        while packed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(packed)
            packed = frame.unused_data
            frame = None if frame.eof else frame
    if frame:
        raise EOFError("the file ends in the middle of a frame")


def _json_texts(blocks, path: str):
    """Yields the "text" of each line's JSON object."""
    number, rest = 0, ""
    for block in chain(blocks, ["\n"]):
        *lines, rest = (rest + block).split("\n")
        for line in lines:
            number += 1
            if line.strip():
                with user_errors(f'{path}, line {number}: no JSON object with a string as "text"'):
                    text = json.loads(line)["text"] + ""
                yield text


def _plain_texts(blocks):
    """Yields what stands between lines `<|endoftext|>`; of a text without them pieces that end
    with a line, if they can. Lines may end as on any system."""
    newlines, rest, longest = io.IncrementalNewlineDecoder(None, translate=True), "", PIECE
    for block in blocks:
        if "\0" in block:
            raise ValueError("NUL characters, as in UTF-16: convert it to UTF-8")
        *whole, rest = (rest + newlines.decode(block)).split("<|endoftext|>\n")
        yield from whole
        longest = LONGEST if whole else longest
        start = 0
        while start + longest < len(rest):
            end = rest.rfind("\n", start, start + longest) + 1 or start + longest
            yield rest[start:end]
            start = end
        rest = rest[start:]
    yield rest + newlines.decode("", final=True)


class TokenStream:
    """Token ids of one source: tokenised ahead of training by a thread, kept on disk, used again.
    `data`: for `documents`, or ids: Pythia's training data, or a .bin of 2, 4 or 8 bytes each.
    Documents, end-of-text after each, are cut into sequences of `context` ids, the first being bos
    if there is one. train, val: tokens. `report` gets a line every second while a caller waits.
    UserError for an unknown, short or failing source."""

    def __init__(
        self, data, tokenizer, context, train, val, cache=None, allow_short=False, report=None, n_rows=None
    ):
        self.data, self.tokenizer, self.context = data, tokenizer, context
        self.stride = context - (tokenizer.bos_id is not None)  # ids of the stream in a sequence
        self.asked, self.allow_short = (train, val), allow_short  # tokens
        self.need = [max(asked // context, 1) * self.stride for asked in self.asked]
        self.dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
        self.report = report or (lambda line: None)
        self.folder = self._cache_folder(cache)
        self.files = [self.folder / "train.bin", self.folder / "val.bin"]
        self.key = self.folder.name
        self.stopped = self.locked_out = False
        self._load_meta()
        self.thread = in_background(self._run)
        if allow_short:
            self._wait(TRAIN, math.inf)
        self.n_train = self.need[TRAIN] // self.stride

    def close(self):
        """Stop the thread; what it has written is there for the next run."""
        self.stopped = True
        wait([self.thread], 5)

    def validation(self) -> torch.Tensor:
        """All validation sequences, int64 [n, context], of documents never trained on; waits."""
        return self.train(0, self.need[VAL] // self.stride, VAL)

    def train(self, start: int, count: int, side: int = TRAIN) -> torch.Tensor:
        """Sequences start..start+count, int64 [count, context]; waits for them or a UserError."""
        self._wait(side, (start + count) * self.stride)
        offset = start * self.stride * self.dtype.itemsize
        with user_errors(f"cannot read {self.files[side]}, start again"):
            ids = np.fromfile(self.files[side], self.dtype, count * self.stride, offset=offset)
            ids = torch.from_numpy(ids.astype(np.int64)).view(count, self.stride)
        with_bos = (self.context - self.stride, 0)
        return torch.nn.functional.pad(ids, with_bos, value=self.tokenizer.bos_id)

    def _wait(self, side: int, enough: float):
        """Until a side has `enough` tokens, or the thread has ended; raises what ended it."""
        waits = 0
        while self.tokens[side] < enough and not self.thread.done():
            wait([self.thread], 0.1)  # in short steps: Ctrl-C gets through
            waits += 1
            if waits % 10 == 0:
                have, need = sum(map(min, self.tokens, self.need)), sum(self.need)
                counts = f"tokenising: {have / 1e6:.1f}M of {need / 1e6:.1f}M tokens"
                other = f"waiting for another process that tokenises into {self.folder}"
                self.report(other if self.locked_out else counts)
        if self.thread.done():
            self.thread.result()

    def _lacks(self, *sides: int) -> bool:
        return not self.stopped and any(self.tokens[side] < self.need[side] for side in sides)

    def _cache_folder(self, cache) -> Path:
        """A folder of this source, and in it one named after all that the ids depend on."""
        place, files = _place(self.data), []
        if not place.startswith("hf://"):
            files = [(path, os.stat(path)) for path, _ in source_files(self.data)]
            files = [(path, seen.st_size, seen.st_mtime_ns) for path, seen in files]
        own = self.tokenizer.fingerprint, self.tokenizer.eos_id, self.tokenizer.n_vocab
        key = hashlib.sha256(json.dumps([place, files, own, BATCH]).encode()).hexdigest()[:16]
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        if root.startswith("~"):
            raise UserError("no home folder to keep tokens in: set XDG_CACHE_HOME to a folder")
        folder = Path(cache or f"{root}/saeft", re.sub(r"\W+", "-", place)[-60:])
        older = [path for path in folder.glob("*/*") if path.parent.name != key]
        if older and not (folder / key).exists():
            size = sum(path.stat().st_size for path in older) / 1e6
            self.report(f"older tokens of {self.data}, {size:,.1f} MB: rm -r {folder}")
        return folder / key

    def _load_meta(self):
        """Each side's tokens on disk, and how much of the source they took; else start again."""
        self.tokens, self.passed = [0, 0], [0, 0]
        with suppress(Exception):  # there is none, or it is damaged
            counts = json.loads((self.folder / "meta.json").read_bytes())
            held = [path.stat().st_size // self.dtype.itemsize for path in self.files]
            natural = [type(n) for n in counts] == [int] * 4 and min(counts) >= 0
            if natural and counts[TRAIN] <= held[TRAIN] and counts[VAL] <= held[VAL]:
                self.tokens, self.passed = counts[:2], counts[2:]

    def _run(self):
        """The thread."""
        try:
            if self._lacks(TRAIN, VAL):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.locked_out = True
                with hf.utils.WeakFileLock(self.folder / "lock"):  # one process at a time
                    self.locked_out = False
                    self._load_meta()
                    if IDS.search(_place(self.data)):
                        self._copy_ids()
                    else:
                        self._tokenise()
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
            advice = f"lower {flag}"
            short = f"{self.tokens[side]:,} {kind} tokens, {self.asked[side]:,} were asked for"
            raise UserError(f"{self.data} has {short}: {advice if have else 'give more text'}")

    def _tokenise(self):
        """Both sides grow by the same documents; `passed` counts batches of them."""
        source, threads = documents(self.data), (os.cpu_count() or 1) // 2 or 1
        batches = iter(lambda: list(islice(source, BATCH)), [])
        for number, texts in enumerate(batches, 1):
            if number > min(self.passed):
                ids = {False: [[]], True: [[]]}  # by held_out
                for text, own in zip(texts, self.tokenizer.encode_batch(texts, threads)):
                    ids[held_out(text)] += [own, [self.tokenizer.eos_id]]
                for side, own in ((TRAIN, ids[False]), (VAL, ids[True])):
                    if number > self.passed[side]:
                        self._append(side, np.concatenate(own), number)
            if not self._lacks(TRAIN, VAL):
                break

    def _copy_ids(self):
        """Training: the first file. Validation: the last; of one file its last 20th, without the
        document that is cut there. `passed` counts bytes."""
        files = source_files(self.data)
        (first, size), (last, end) = files[0], files[-1]
        stored, begin = self._stored_as(first, size), 0
        if len(files) == 1:
            begin = size = size * 19 // 20 // 8 * 8
            ends = _ids_at(last, begin, min(BLOCK, end - begin), stored) == self.tokenizer.eos_id
            begin += (ends.tolist().index(True) + 1 if ends.any() else 0) * stored.itemsize
        for side, path, at, stop in ((VAL, last, begin, end), (TRAIN, first, 0, size)):
            at += self.passed[side]
            while at < stop and self._lacks(side):
                missing = (self.need[side] - self.tokens[side]) * stored.itemsize
                ids = _ids_at(path, at, min(missing, BLOCK, stop - at), stored)
                at += ids.nbytes
                self._append(side, ids, self.passed[side] + ids.nbytes)

    def _stored_as(self, path: str, size: int) -> np.dtype:
        """The widest integers as which the first ids of a file are the tokenizer's."""
        first = _ids_at(path, 0, min(size, 4096) // 8 * 8, np.dtype("u1"))
        for stored in map(np.dtype, ("<i8", "<u4", "<u2")):
            ids = first.view(stored)
            low, high = ids.min(initial=0), ids.max(initial=0)
            if size % stored.itemsize == 0 and low >= 0 and high < self.tokenizer.n_vocab:
                return stored
        raise UserError(f"{path} is not of ids under {self.tokenizer.n_vocab:,}: {OTHER_IDS}")

    def _append(self, side: int, ids: np.ndarray, passed: int):
        """Ids without <bos> to a side's file, then meta.json: an interruption leaves no trace."""
        ids = ids[ids != self.tokenizer.bos_id]
        if ids.max(initial=0) >= self.tokenizer.n_vocab:
            raise UserError(f"{self.data} holds id {ids.max():,.0f}: {OTHER_IDS}")
        with open(self.files[side], "ab") as file:
            end = self.tokens[side] * self.dtype.itemsize
            if file.tell() < end:
                raise OSError("cut off by another program")
            file.truncate(end)
            file.write(ids.astype(self.dtype).tobytes())
        self.passed[side] = passed
        self.tokens[side] += len(ids)
        write_text(self.folder / "meta.json", json.dumps(self.tokens + self.passed))


def _ids_at(path: str, start: int, n_bytes: int, stored: np.dtype) -> np.ndarray:
    with opened(path) as file:
        file.seek(start)
        return np.frombuffer(file.read(n_bytes), stored)


# ---- A run's folder ---------------------------------------------------------------------------

MARK = ".saeft"  # the file that says that a folder is a run's; its process holds it locked
IN_SAE = ["cfg.json", "sae_weights.safetensors", "adapter.safetensors"]
IN_RUN = [*IN_SAE, "config.json", "metrics.jsonl", "report.json", "checkpoint*.pt", ".*.part"]


def run_path(settings: dict) -> Path:
    """The folder of a run under --out. UserError where it lies elsewhere, or around the SAE that
    the run starts from."""
    name, start = settings["name"], settings["start"]
    if name is None:
        kind = f"{settings['sae']}-k{'-'.join(map(str, settings['k']))}-seed{settings['seed']}"
        name = f"{Path(settings['model']).name}-layer{settings['layer']}-{kind}"
    refuse(Path(name).name != name or name == "..", f"--name {name} is no plain folder name")
    path = Path(settings["out"]).expanduser() / name
    source = Path(start or os.sep).expanduser().resolve()
    inside = path.resolve() in (source, *source.parents)
    refuse(inside, f"--start {start} lies in this run's own folder: give a --name")
    return path


class RunFolder:
    """A folder that one process at a time writes a run into: config.json, metrics.jsonl,
    checkpoints; for each SAE, here or in k8, k16, ..., its files, report.json, SAEs in `parts`.
    An earlier run's files stay until `begin`; lines of metrics.jsonl wait for it. Of several
    processes the one of rank 0 writes; others write checkpoints alone."""

    def __init__(self, path: Path, parts: list[str], rank: int = 0):
        self.path, self.parts, self.rank = path, parts, rank
        self.begun, self.waiting, self.lock = rank > 0, [], ExitStack()

    def take(self, resume: bool, overwrite: bool):
        """Make it, for this process alone. UserError where something else is in it."""
        if self.rank > 0:
            return
        path = self.path
        with user_errors(f"cannot write {path}: choose another --out or --name"):
            path.mkdir(parents=True, exist_ok=True)
            if not (path / MARK).exists() and any(path.iterdir()):
                raise UserError(f"{path} is not empty and no run's folder: choose another --name")
            try:
                self.lock.enter_context(hf.utils.WeakFileLock(path / MARK, timeout=0.1))
            except TimeoutError:
                raise UserError(f"{path} is in use by a run that is going on") from None
        unfinished = (path / "checkpoint.pt").exists()
        if unfinished and not (overwrite or resume):
            self.lock.close()
            raise UserError(f"{path} holds an unfinished run: pass --resume, or --overwrite")
        if not overwrite and any(path.glob("**/report.json")) and not (resume and unfinished):
            self.lock.close()
            raise UserError(f"{path} holds a finished run: choose a --name, or pass --overwrite")

    def clear(self):
        """Remove what a run writes, and nothing else."""
        saes = [self.path, *self.path.glob("k[0-9]*")]
        parts = [sae / part for sae in saes for part in self.parts]
        for folder in parts + saes[::-1]:
            for name in IN_SAE if folder in parts else IN_RUN:
                for file in folder.glob(name):
                    file.unlink()
            if folder != self.path and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def begin(self, settings: dict):
        """There is something to keep: an earlier run's files give way to it."""
        if not self.begun:
            with user_errors(f"cannot write {self.path}"):
                self.clear()
            write_text(self.path / "config.json", json.dumps(settings, indent=2) + "\n")
            self.begun = True
            self.log([])

    def log(self, lines: list[str]):
        """Add lines to metrics.jsonl."""
        if self.rank > 0:
            return
        self.waiting += lines
        if self.begun:
            path = self.path / "metrics.jsonl"
            with user_errors(f"cannot write {path}"), open(path, "a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in self.waiting)
            self.waiting.clear()

    def save_state(self, state: dict, tag: str = ""):
        """A checkpoint. Of several processes each writes its own, under a tag; the first one's,
        which says which of the others' are valid, comes last."""
        _wait_for_all_processes()  # the first one may be removing an earlier run's
        if self.rank > 0:
            self._write(f"checkpoint{self.rank}{tag}.pt", state)
        _wait_for_all_processes()
        if self.rank == 0:
            logged = (self.path / "metrics.jsonl").stat().st_size
            self._write("checkpoint.pt", {**state, "tag": tag, "logged": logged})
        _wait_for_all_processes()
        for file in self.path.glob(f"checkpoint{self.rank}-*.pt"):
            if tag not in file.name:
                file.unlink(missing_ok=True)

    def _write(self, name: str, state: dict):
        with replacing(self.path / name) as file:
            torch.save(state, file)

    def load_state(self, device) -> dict | None:
        """The last checkpoint, if there is one."""
        if not (self.path / "checkpoint.pt").exists():
            return None
        saved = self._read("checkpoint.pt", device)
        if 0 < self.rank < saved["world"]:
            saved = self._read(f"checkpoint{self.rank}{saved['tag']}.pt", device)
        return saved

    def _read(self, name: str, device) -> dict:
        with user_errors(f"cannot read {self.path / name}: --overwrite starts anew"):
            return torch.load(self.path / name, map_location=device, weights_only=True)

    def go_on(self, saved: dict, settings: dict, identity: dict, n_processes: int):
        """Instead of `begin`: with the run of a checkpoint, metrics.jsonl as long as it was.
        UserError if that run has other settings."""
        may_differ = {"resume", "overwrite", "out", "checkpoint_minutes"}
        for name, value in settings.items():
            was = saved["config"].get(name)
            differs = was != value and name not in may_differ
            refuse(differs, f"--resume: --{name.replace('_', '-')} was {was}, is {value}")
        refuse(saved["world"] != n_processes, f"--resume: it was {saved['world']} processes")
        if self.rank == 0:
            with user_errors(f"cannot write {self.path / 'metrics.jsonl'}"):
                os.truncate(self.path / "metrics.jsonl", saved["logged"])
        self.begun = True

    def finish(self):
        """The run is whole: no checkpoint is needed any more."""
        for file in self.path.glob("checkpoint*.pt") if self.rank == 0 else ():
            file.unlink(missing_ok=True)

    def leave(self):
        """Give it back; remove it where there is nothing to keep, and nothing else in it."""
        kept = [*self.path.glob("**/sae_weights.safetensors"), *self.path.glob("checkpoint*.pt")]
        if self.rank == 0 and self.path.is_dir() and not kept:
            self.clear()
            (self.path / MARK).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()
        self.lock.close()


def _wait_for_all_processes():
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
