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
import sys
import threading
import time
import unicodedata
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import field, fields
from functools import cache, partial
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
        package = error.name and "." not in error.name
        advice = f"pip install {error.name}" if package else str(error)
        raise UserError(f"{what}: {advice}") from error
    except Exception as error:  # the disk's or the content's: each decompressor has its own
        if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
            error = error.__context__
        why = re.sub(r"(\\n|\\t|\s)+", " ", f"{type(error).__name__}: {error}")
        raise UserError(f"{what} ({why:.300})") from error


class Parser(argparse.ArgumentParser):
    """Flags of a program with this docstring, none abbreviated; errors are UserErrors."""

    def __init__(self, doc: str | None, **options):
        options.update(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        super().__init__(description=doc, **options)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def count(text: str) -> int:
    """A whole number, also written 500M, 25M, 4k or 1e6."""
    unit = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    value = round(float(text[:-1] if unit > 1 else text) * unit, 4)  # 4.1M is not quite 4.1e6
    if not value.is_integer():
        raise ValueError(text)
    return int(value)


def expanded(text) -> Path:
    """A path that a user gave: where ~ begins it, that is the home, if there is one."""
    return Path(os.path.expanduser(text))


def flag(default, help: str, low: float = -math.inf, high: float = 10**18, **options):
    """A dataclass's field that is also a flag of the command line; numbers are from low to high.
    `choices` may be a dict that grows later: it is looked at when the command line is."""
    metadata = {"help": help, "range": (low, high), "options": options}
    return field(default_factory=lambda: copy.copy(default), metadata=metadata)


def flags_of(settings: type, doc: str | None = None) -> Parser:
    """A parser of the flags that the fields of a dataclass are; it leaves out what is not given."""
    parser = Parser(doc, argument_default=argparse.SUPPRESS)
    kinds = {"int": {"type": count}, "float": {"type": float}, "str": {"type": str}}
    kinds["bool"] = {"action": "store_true"}
    for f in fields(settings):
        kind = next((kinds[name] for name in kinds if name in str(f.type)), None)  # text or a type
        unknown = "help" not in f.metadata or kind is None
        refuse(unknown, f"{f.name}: a setting is made by `flag`, of int, float, str or bool")
        default = f.default_factory()
        shown = "" if default is None else f" (default: {default})"
        options = {"help": f.metadata["help"] + shown, **kind, **f.metadata["options"]}
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    return parser


def check_ranges(settings):
    """UserError where a number is out of its field's range, or a text is empty."""
    for f in fields(settings):
        value, (low, high) = getattr(settings, f.name), f.metadata["range"]
        name = "--" + f.name.replace("_", "-")
        for one in value if isinstance(value, list) else [value]:
            off = isinstance(one, (int, float)) and not low <= one <= high
            refuse(off, f"{name} {one} is not from {low:g} to {high:g}")
            refuse(one == "", f"{name} is empty")


_last_line = time.monotonic()  # when the reader last heard something


def say(text: str, end: str = "\n"):
    """A line for the reader. The first process speaks for all; a closed stdout ends nothing."""
    global _last_line
    if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    _last_line = time.monotonic()
    try:
        print(f"\r\033[K{text}" if sys.stdout.isatty() else text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


say_once = cache(say)  # for what is said once, however often it is true


def progress(text: str, now: bool = False):
    """Call it often. On a terminal the line, cut to its width, gives way to the next; on a pipe it
    is printed if it must be seen `now`, or after 30 seconds without a line."""
    if sys.stdout.isatty():
        say(text[: shutil.get_terminal_size().columns - 1], end="")
    elif now or time.monotonic() - _last_line >= 30:
        say(text)


# ---- Models on the Hub or in a folder ---------------------------------------------------------
TINY = Path(__file__).parent / "assets" / "tiny"  # the embedded model and its text
if not TINY.is_dir():  # installed from a wheel
    TINY = Path(__file__).parent / "saeft_assets" / "tiny"
SIZES = "14m 31m 70m 160m 410m 1b 1.4b 2.8b 6.9b 12b".split()
PYTHIA = [f"pythia-{size}{kind}" for size in SIZES for kind in ("", "-deduped")]
MODELS = {"tiny": str(TINY), **{name: f"EleutherAI/{name}" for name in PYTHIA}}
MODELS |= {name: f"google/{name}" for name in ("gemma-2-2b", "gemma-2-9b", "gemma-3-270m")}
MODELS |= {f"gemma-3-{size}": f"google/gemma-3-{size}-pt" for size in ("1b", "4b", "12b", "27b")}
# Buffers of old GPT-NeoX checkpoints, and the part of Gemma 3 that sees: no parameters of ours.
IGNORED = r"attention\.(bias|masked_bias|rotary_emb\.inv_freq)$|vision_tower\.|multi_modal_proj"
BLOCK = 1 << 22  # bytes, or numbers, at a time
LARGE = 1 << 30  # bytes that take a second to read
commits = {}  # long name -> commit: all files of it that a process reads are of one
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
        if status in (401, 403):  # also where there is no such repository
            message = f"no access to {repo} ({status}): check the name; accept its licence at "
            message += f"https://huggingface.co/{repo.partition('@')[0]}, set HF_TOKEN (no old one)"
        elif status == 404 or isinstance(error, (FileNotFoundError, hub.HFValidationError)):
            advice = "give a folder, a short name such as tiny or owner/name@revision on the Hub"
            advice += " (models: safetensors files only; SAEs: as experiments/convert.py writes)"
            message = f"{repo!r} has no {filename.removesuffix('.index.json')}: {advice}"
        else:
            advice = "try again, or a folder, --model tiny, --data tiny"
            message = f"cannot fetch {repo} (error: {status or repr(error)[:300]}): {advice}"
        raise UserError(message) from error


def long_name(name: str, short_names: dict) -> str:
    """What a short name, perhaps with @revision, stands for; any other name is itself. A file or
    folder of a short name is ./name; where both are there, a line says which was taken."""
    short, at, revision = name.partition("@")
    if short not in short_names:
        return name
    full = short_names[short]
    if os.path.exists(name):
        say_once(f"{name} is {full}; the file or folder here would be ./{name}")
    hidden = full.count("/") == 1 and os.path.exists(full)
    refuse(hidden, f"{name} is {full} on the Hub, which is a folder here: ./{full}, or move it")
    return full + at + revision


def fetch(name, filename: str) -> Path:
    """One file of a model or an SAE, perhaps in a subfolder. `name`: a short name of MODELS, a
    folder like a Hub snapshot, or on the Hub owner/name[@revision][:folder]. Raises UserError."""
    place = long_name(str(name), MODELS)
    if not os.path.isdir(os.path.expanduser(place)):
        place, _, inside = place.partition(":")
        filename = os.path.join(inside, filename)
    folder, (repo, _, revision) = os.path.expanduser(place), place.partition("@")
    with hub_errors(repo, filename):
        if os.path.isdir(folder):
            os.lstat(os.path.join(folder, filename))  # a link to nothing is told where it is read
            return Path(folder, filename)
        if "/" not in repo:
            raise hub.HFValidationError  # a bare name, none of ours
        wanted = commits.get(place, revision or None)
        file = {"repo_id": repo, "filename": filename, "revision": wanted}
        path = hf.try_to_load_from_cache(**file)  # an object where it is known that there is none
        if path is None or not re.fullmatch("[0-9a-f]{40}", wanted or ""):  # a branch moves
            path = _newest(file, path)
        if not isinstance(path, str):
            raise FileNotFoundError
        snapshot = Path(path).parents[len(Path(filename).parts) - 1]  # a commit's folder
        commits.setdefault(place, snapshot.name)
        return Path(path)


def _newest(file: dict, cached) -> str:
    """The file as the Hub has it now; as it is `cached` where the Hub does not say."""
    try:
        with suppress(hub.EntryNotFoundError):  # without a network this fails at once
            hf.get_hf_file_metadata(hf.hf_hub_url(**file))
        return hf.hf_hub_download(**file)  # keeps in mind that there is none
    except Exception as error:
        absent = isinstance(error, hub.EntryNotFoundError)
        if cached is None or absent and not isinstance(error, FileNotFoundError):
            raise
        if not isinstance(error, hub.OfflineModeIsEnabled):
            say_once(f"note: {file['repo_id']} is out of reach, and read as it was last")
        return cached


def find(name, filename: str) -> Path | None:
    """`fetch`, but None where there is no such file; with HF_HUB_OFFLINE=1, none that is known."""
    try:
        return fetch(name, filename)
    except UserError as error:
        if isinstance(error.__cause__, hub.OfflineModeIsEnabled):
            say_once(f"note: {filename} of {name} is out of reach, and taken as not there")
        elif not isinstance(error.__cause__, (FileNotFoundError, hub.EntryNotFoundError)):
            raise
        return None


def model_key(name: str) -> str:
    """The identity of a model and its weights: its commit on the Hub, or `files_key`."""
    folder = fetch(name, "config.json").parent
    place = long_name(name, MODELS)
    if place in commits:
        return f"{place.partition('@')[0]}@{commits[place]}"
    weights = chain(*map(folder.glob, ("*.json", "*.safetensors", "*.bin")))  # the last of forks
    return files_key(weights)


def files_key(paths) -> str:
    """The identity of files: their names below the folder that holds all, and contents; of more
    than LARGE bytes in all sizes and times in place of contents: a copy has another."""
    paths = sorted(map(str, paths))
    top = os.path.commonpath(map(os.path.dirname, paths)) or "."
    seen = list(map(_stat, paths))
    if sum(size for size, *_ in seen) <= LARGE:
        seen = []
        for path in paths:
            with open_file(path) as file:
                seen.append(hashlib.blake2b(file.read()).hexdigest())
    return _key([(os.path.relpath(path, top), what) for path, what in zip(paths, seen)])


def _stat(path) -> tuple:
    about = os.stat(path)
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns


def note_changes(sae: dict, source, settings: dict, identity: dict):
    """Says which of model and data, with <bos>, are not those that the `sae_cfg` of source says."""
    for part, was in _dict(sae, "identity").items():
        now = identity.get(part, was)
        if now != was and now not in _dict(sae, "seen"):
            bos = " or its <bos>" if part == "data" else ""
            say(f"note: the {part}, {settings[part]},{bos} is not what {source} was made with")


def _key(content) -> str:
    """A short name for whatever JSON can express."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def load_config(name: str) -> dict:
    """The model's config.json. Raises UserError, also when it is not a JSON object."""
    path = fetch(name, "config.json")
    adapter = find(name, "adapter_config.json")
    refuse(adapter, f"{name} has an adapter beside the model: merge it, or move it away")
    return read_json(path)


def load_weights(name: str, device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A language model's tensors by name; of a model that also sees, named as where it does not.
    Raises UserError, also where they are quantised or not finite."""
    files, weights = ["model.safetensors"], {}
    if not find(name, files[0]):  # but shards, which an index lists
        index = fetch(name, "model.safetensors.index.json")
        with user_errors(f"cannot read {index}"):
            files = sorted({*read_json(index)["weight_map"].values()})
            if not all(re.fullmatch(r"[\w.-]+\.safetensors", file) for file in files):
                raise ValueError("weight_map must name plain *.safetensors files")
    for file in files:
        for key, tensor in read_safetensors(fetch(name, file), device, dtype).items():
            if not re.search(IGNORED, key):
                sound = tensor.is_floating_point() and tensor.isfinite().all()
                what = f"{name}: {key}, of {tensor.dtype}, is not finite in {dtype}"
                refuse(not sound, f"{what}: damaged, too large, or else {UNQUANTISED}")
                key = key.replace("language_model.model.", "model.").replace("language_model.", "")
                refuse(key in weights, f"{name} has {key} twice")
                weights[key] = tensor
    return weights


# ---- Files: JSON, safetensors, SAEs ------------------------------------------------------------
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
UNQUANTISED = "quantised weights are not read, give the unquantised ones"
# What cfg.json may say of an SAE that our equations express; the first is what silence means.
SAE_SETTINGS = {
    "apply_b_dec_to_input": [True],
    "rescale_acts_by_decoder_norm": [False],
    "normalize_activations": ["none", None],
    "reshape_activations": ["none", None],
    "hook_head_index": [None],
    "hook_point_head_index": [None],  # before SAELens 3
    "hook_name_out": [None, ""],  # of transcoders
    "activation_fn": ["relu"],
    "activation_fn_str": ["relu"],  # before SAELens 6
    "activation_fn_kwargs": [{}, None],
    "center_writing_weights": [False, None],  # or, beside LayerNorm, it reads x less its mean
}


@contextmanager
def open_file(path):
    """The bytes of a regular file, or of one on the Hub (hf://..), which is read by ranges, each
    whole, or a cut passes for the end. UserError for whatever fails while it is open."""
    if str(path).startswith("hf://"):
        parts = path.split("/")
        with hub_errors("/".join(parts[2:5]), "/".join(parts[5:])):
            with hf.HfFileSystem().open(path, cache_type="none") as file:
                file.cache.fetcher = partial(_whole_range, file, file.cache.fetcher)
                yield file
        return
    with user_errors(f"cannot read {path}"):
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("not a regular file")
        with open(path, "rb") as file:
            if file.peek().startswith(b"version https://git-lfs"):
                raise ValueError("a Git LFS pointer in place of the file: git lfs pull")
            yield file


def _whole_range(file, fetcher, start: int, end: int) -> bytes:
    data, n = fetcher(start, end), min(end, file.size) - start
    refuse(len(data) != n, f"{file.path}: {len(data):,} bytes came of {n:,}: try again")
    return data


def read_json(path) -> dict:
    """The JSON object in a file. Raises UserError."""
    with open_file(path) as file:
        return {**json.loads(file.read().decode())}


def read_safetensors(path, device="cpu", dtype: torch.dtype | None = None) -> dict:
    """Tensors by name, floating ones in `dtype` if given. UserError if damaged or hostile."""
    tensors = {}
    with open_file(path) as file:
        for name, stored, shape in _read_header(file):
            kept = dtype if dtype and stored.is_floating_point else stored
            tensors[name] = torch.empty(shape, dtype=kept, device=device)
            for part in tensors[name].view(-1).split(BLOCK):  # all that is in memory twice
                data = torch.empty(len(part), dtype=stored)
                file.readinto(data.view(torch.uint8).numpy())
                part.copy_(data)
    return tensors


def _read_header(file) -> list[tuple]:
    """(name, dtype, shape) of the tensors in a safetensors file, in the order of their data, which
    they must fill without a hole."""
    length = int.from_bytes(file.read(8), "little")
    n_bytes = os.fstat(file.fileno()).st_size - 8 - length  # of the data
    if n_bytes < 0 or length > 100_000_000:
        raise ValueError(f"a header of {length:,} bytes does not fit the file, or 100 MB")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found, end = [], 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, span, code = entry["shape"], entry["data_offsets"], entry["dtype"]
        if code not in DTYPES:
            raise ValueError(f"tensor {name!r:.60} is of {code!r:.20}: {UNQUANTISED}")
        whole = all(type(n) is int and n >= 0 for n in (*shape, *span))
        if not whole or span != [end, end + math.prod(shape) * DTYPES[code].itemsize]:
            raise ValueError(f"tensor {name!r:.60} cannot be {entry!r:.200}")
        found.append((name, DTYPES[code], shape))
        end = span[1]
    if end != n_bytes:
        raise ValueError(f"data of {n_bytes:,} bytes for tensors of {end:,}")
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


def write_safetensors(path, tensors: dict, metadata: dict):
    """Write tensors: all or nothing. Raises UserError."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))  # all aligned
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        entry = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(Path(path)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def write_sae(folder, tensors: dict[str, torch.Tensor], cfg: dict):
    """Write an SAE for raw activations in SAELens's layout, which `read_sae` reads.
    tensors: W_enc, W_dec [F, D], b_enc [F], b_dec [D], and whatever else it has, under its names;
    cfg: architecture, k, ..., metadata. Raises UserError."""
    n_latents, width = tensors["W_dec"].shape
    fixed = {"d_in": width, "d_sae": n_latents, "dtype": "float32", "device": "cpu"}
    for key in ("apply_b_dec_to_input", "normalize_activations", "reshape_activations"):
        fixed[key] = SAE_SETTINGS[key][0]
    # Without a version SAELens takes the file for an old one, and drops the other metadata.
    fixed["metadata"] = {"sae_lens_version": "6.54.0", **cfg.get("metadata", {})}
    tensors = tensors | {"W_enc": tensors["W_enc"].T}
    folder, cfg = expanded(folder), cfg | fixed
    merged(cfg)  # or it could not be read again
    with replacing(folder / "cfg.json") as file:
        file.write(json.dumps(cfg, indent=2).encode())
        file.flush()  # a full disk shows before the weights are replaced
        write_safetensors(folder / "sae_weights.safetensors", tensors, {"format": "pt"})


def sae_key(source) -> str:
    """The identity of what `read_sae` reads."""
    return files_key(fetch(source, name) for name in ("cfg.json", "sae_weights.safetensors"))


def sae_cfg(source) -> dict:
    """The `merged` cfg.json of what `read_sae` reads."""
    return merged(read_json(fetch(source, "cfg.json")))


def read_sae(source) -> tuple[dict[str, torch.Tensor], dict]:
    """What `write_sae` was given, floating tensors in float32, and the `merged` cfg.json, in which
    `saeft` is a dict. UserError also for what our equations cannot express."""
    cfg = sae_cfg(source)
    cfg["saeft"] = _dict(cfg, "saeft")
    merged({**cfg, "metadata": cfg["saeft"]})  # of K, too
    says = _dict(cfg, "model_from_pretrained_kwargs") | cfg
    for key, accepted in SAE_SETTINGS.items():
        advice = f"is not read as it is; maybe by python experiments/convert.py {source} FOLDER"
        value = says.get(key, accepted[0])
        refuse(value not in accepted, f"{source}: {key} {value!r:.60} {advice}")
    path = fetch(source, "sae_weights.safetensors")
    tensors = read_safetensors(path, dtype=torch.float32)
    D, F = cfg.get("d_in"), cfg.get("d_sae")
    shapes = {"W_enc": [D, F], "b_enc": [F], "W_dec": [F, D], "b_dec": [D]}
    found = {name: list(tensors[name].shape) for name in shapes.keys() & tensors.keys()}
    fits = {"b_enc": [F], **found} == shapes  # a fork's kind may have none
    refuse(not fits, f"{path} holds {found!r:.300}, its cfg.json means {shapes!r:.300}")
    for name, tensor in tensors.items():
        numbers = tensor.is_floating_point() or name not in shapes
        sound = numbers and tensor.isfinite().all()
        refuse(not sound, f"{path}: {name} is not of finite numbers")
    return tensors | {"W_enc": tensors["W_enc"].T}, cfg


def merged(cfg: dict) -> dict:
    """A cfg.json, what is in its metadata beside the rest. UserError where they contradict."""
    metadata = _dict(cfg, "metadata")
    twice = sorted(key for key in metadata if cfg.get(key, metadata[key]) != metadata[key])
    refuse(twice, f"the SAE's cfg.json says {twice} twice, and not the same")
    return metadata | cfg


def _dict(parent: dict, key: str) -> dict:
    return parent[key] if isinstance(parent.get(key), dict) else {}


def read_hook(name: str, layer: int | None = None) -> tuple[int, str]:
    """(block, place) of what an SAE reads, in SAELens's words: blocks.3.hook_resid_post is
    (3, "resid_post"), and so is blocks.4.hook_resid_pre; blocks.3.hook_mlp_out is (3, "mlp_out").
    UserError for the embedding, what is not understood, and where `layer` is another block."""
    found = re.fullmatch(r"blocks\.([0-9]+)\.(?:hook_)?(\w[\w.]*)", str(name))
    known = "no hook of SAELens; of others' experiments/convert.py knows a block's output"
    refuse(not found, f"it reads {name!r:.80}, which is {known}")
    block, place = int(found[1]), {"out": "resid_post", "in": "resid_pre"}.get(found[2], found[2])
    refuse(layer not in (None, block), f"it says both {name!r:.80} and layer {layer!r:.60}")
    if place == "resid_pre":  # the output of the block before
        refuse(block == 0, f"it reads {name}, the embedding: no block's output")
        return block - 1, "resid_post"
    return block, place


def hook_name(layer: int, place: str) -> str:
    """SAELens's name of a place, as `read_hook` reads it."""
    return f"blocks.{layer}.{place if 'hook_' in place else 'hook_' + place}"


# What of an SAE's metadata matters: the setting that it tells, and its types.
ORIGIN = {"model_name": ("model", [str]), "dataset_path": ("data", [str])}
ORIGIN |= {"context_size": ("context", [int]), "prepend_bos": ("bos", [bool])}
ORIGIN |= {"sink_norm": ("sink_norm", [float, int])}


def sae_settings(cfg: dict) -> dict:
    """What the cfg of `read_sae` tells as settings, and nothing that it does not. UserError for a
    hook that is not understood, and for values of other types."""
    beside = f"what was trained is the {cfg.get('adapter')} beside this SAE"
    refuse("adapter" in cfg, f"{beside}: load() of experiments/baselines.py reads both")
    told = {"d_sae": cfg["d_sae"]}
    for key, (name, kinds) in ORIGIN.items():
        value = told[name] = cfg.get(key)
        fits = type(value) in kinds and (kinds != [int] or value > 0)
        refuse(value is not None and not fits, f"the SAE's cfg.json has {key} = {value!r:.60}")
    for key in ("seqpos_slice", "exclude_special_tokens"):
        if cfg.get(key) and cfg[key] != [None]:
            here = "here all tokens but <bos> and sinks count"
            say_once(f"note: the SAE was trained with {key} = {cfg[key]!r:.60}; {here}")
    told["bos"] = {True: "yes", False: "no"}.get(told["bos"])
    hook = cfg.get("hook_name") or cfg.get("hook_point")  # the second before SAELens 3
    if hook is not None:
        block = cfg.get("hook_layer", cfg.get("hook_point_layer"))
        told["layer"], told["place"] = read_hook(hook, block)
    model, how = told.pop("model"), _dict(cfg, "model_from_pretrained_kwargs")
    if model and not how.keys() & {"checkpoint_index", "checkpoint_value"}:  # these have no name
        told["model"] = f"{model}@{how['revision']}" if how.get("revision") else model
    k = cfg.get("k") or cfg["saeft"].get("k")
    refuse(k and (type(k) not in (int, float) or k < 0), f"the SAE's cfg.json has k = {k!r:.60}")
    told["k"] = [int(k) if k % 1 == 0 else k] if k else None
    return {name: value for name, value in told.items() if value not in (None, "")}


def sae_metadata(settings: dict, prepend_bos: bool, seen: dict, identity: dict) -> dict:
    """What cfg.json says about the origin of an SAE, for SAELens, `sae_settings`, `note_changes`:
    settings and identity of the run that saves it, and the data that it has `seen_after` it."""
    return {key: settings[name] for key, (name, _) in ORIGIN.items()} | {
        "model_name": {**MODELS, "tiny": "tiny"}.get(settings["model"], settings["model"]),
        "hook_name": hook_name(settings["layer"], settings["place"]),
        "prepend_bos": prepend_bos,
        "model_from_pretrained_kwargs": {"center_writing_weights": False},  # x as it is
        "seen": seen,
        "identity": {part: identity[part] for part in ("model", "data")},
    }


# ---- Tokenizers, on tiktoken ------------------------------------------------------------------
# What the two kinds of tokenizer.json say, beside what is null, false or "", and NEUTRAL.
NEUTRAL = {"vocab", "merges", "unk_token", "fuse_unk", "trim_offsets"}  # they change no id
NEOX = {
    "model": [{"type": "BPE"}],
    "normalizer": [{}, {"type": "NFC"}],
    "pre_tokenizer": [{"type": "ByteLevel"}, {"type": "ByteLevel", "use_regex": True}],
}
SPACE = {"pattern": {"String": " "}}
GEMMA = {  # transformers' form of a SentencePiece model; its split finds no space left to split at
    "model": [{"type": "BPE", "byte_fallback": True}],
    "normalizer": [SPACE | {"type": "Replace", "content": "▁"}],
    "pre_tokenizer": [{}, SPACE | {"type": "Split", "behavior": "MergedWithPrevious"}],
}

# GPT-2 writes a byte as a character: the same where printable, else the next one from U+0100 on.
_OTHERS = [b for b in range(256) if b == 0x20 or not chr(b).isprintable()]
GPT2_BYTES = {chr(256 + _OTHERS.index(b) if b in _OTHERS else b): bytes([b]) for b in range(256)}
SPM_BYTES = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}  # SentencePiece's names of bytes
UTF8_BYTES = {bytes([b]) for b in (*range(0xC0), *range(0xC2, 0xF5))}  # the others never occur

# GPT-2's split, but its end \s+(?!\S)|\s+ in blocks of 500, or a long run would exhaust the stack.
GPT2_SPLIT = r"'(?:[stmd]|ll|re|ve)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|(?:\s{500})*\s+(?!\S)|\s"


def _gpt2_bytes(token: str) -> bytes:
    known = GPT2_BYTES.keys() >= {*token}  # else it is an added token
    return b"".join(map(GPT2_BYTES.get, token)) if known else token.encode()


def _gemma_bytes(token: str) -> bytes:
    return SPM_BYTES.get(token) or token.replace("▁", " ").encode()


def _check_settings(spec: dict, kind: dict):
    """ValueError for any setting that could mean other ids; `truncation` and `padding` are what the
    last caller asked for, and mean none."""
    for part, accepted in kind.items():
        said = (spec.get(part) or {}).items()
        said = {k: v for k, v in said if k not in NEUTRAL and (v or k == "use_regex")}
        if said not in accepted:
            raise ValueError(f"{part} {said!r:.200}: only BPE like GPT-NeoX's or Gemma's")
    for token in spec["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"] or not token["content"]:
            raise ValueError(f"added token {token!r:.200}")


def _all_ids(spec: dict) -> dict[str, int]:
    """{token: id}, 0, 1, 2, .. without a gap; added tokens after those of the vocabulary, as the
    reference counts them whatever is written in the file. ValueError where that differs."""
    ids = dict(spec["model"]["vocab"])
    whole = {type(i) for i in ids.values()} == {int}
    if not whole or sorted(ids.values()) != list(range(len(ids))):
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


def _made_tokens(merges: list[tuple], vocab: dict[str, int]) -> list[str]:
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


def _gemma_chars(vocab: dict[str, int]) -> dict[bytes, list[int]]:
    """{bytes: ids} of what is there before any merge, after the bytes: leading bytes of characters,
    characters, so that tiktoken puts these together first. Others keep the ids of their bytes."""
    chars = {_gemma_bytes(c): [i] for c, i in vocab.items() if len(c) == 1 and c != " "}
    leads = {char[:n] for char in chars for n in range(2, len(char))}
    return {lead: [vocab[f"<0x{byte:02X}>"] for byte in lead] for lead in leads} | chars


def _first_token(post_processor: dict | None, ids: dict[str, int]) -> int | None:
    """The id that it puts before a text. ValueError for what is not understood."""
    post, first = post_processor or {"type": "Sequence", "processors": []}, []
    for part in post["processors"] if post["type"] == "Sequence" else [post]:
        if part["type"] == "TemplateProcessing":
            for item in takewhile(lambda item: "SpecialToken" in item, part["single"]):
                first += part["special_tokens"][item["SpecialToken"]["id"]]["ids"]
        elif part["type"] != "ByteLevel":
            raise ValueError(f"post_processor {part['type']!r:.60}")
    if len(first) > 1 or not {*first} <= {*ids.values()}:
        raise ValueError(f"post_processor: it puts {first!r:.60} before a text")
    return first[0] if first else None


def _any_of(texts) -> re.Pattern:
    """The longest of the texts, in a group."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(texts, reverse=True))) or '(?!)'})")


class Tokenizer:
    """A parsed `tokenizer.json`; ids are those of the reference library, `tokenizers`, but NFC is
    that of Python's Unicode. Byte-level BPE (GPT-NeoX), or BPE over characters with byte fallback
    (Gemma: ▁ is a space). n_vocab: largest id + 1. fingerprint: a key of the file. eos_id: what
    ends a document, bos_id: what it puts first, or None. An exception for what is not read so."""

    def __init__(self, spec: dict, eos: str | None = None):
        vocab, gemma = spec["model"]["vocab"], bool(spec["model"].get("byte_fallback"))
        _check_settings(spec, GEMMA if gemma else NEOX)
        ids = _all_ids(spec)
        self.fingerprint, self.n_vocab = _key(spec), len(ids)
        self.bos_id = _first_token(spec.get("post_processor"), ids)
        names = ("<|endoftext|>", "<eos>", "</s>") if eos is None else (eos,)
        self.eos_id = next((ids[name] for name in names if name in ids), None)
        if self.eos_id is None:
            raise ValueError(f"it has no end of text, {' or '.join(names)}")
        merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in spec["model"]["merges"]]
        made = _made_tokens(merges, vocab)
        letters = {*"".join(made)}
        byte_names, to_bytes = (SPM_BYTES, _gemma_bytes) if gemma else (GPT2_BYTES, _gpt2_bytes)
        units = {byte: [vocab[name]] for name, byte in byte_names.items() if name in vocab}
        if gemma:
            odd = {*letters, *made, *chain(*merges)} & {" ", *SPM_BYTES}
            units |= _gemma_chars(vocab)
            split, self._normalize = "(?s).+", partial(re.sub, "▁", " ")
        else:
            odd = letters - GPT2_BYTES.keys()
            nfc = partial(unicodedata.normalize, "NFC")
            split, self._normalize = GPT2_SPLIT, nfc if spec.get("normalizer") else str
        if odd:
            raise ValueError(f"merges of {odd!r:.60}, which stand for no byte")
        if not units.keys() >= UTF8_BYTES:
            raise ValueError("the vocabulary has no token for some byte")
        units |= {to_bytes(token): [vocab[token]] for token in made}
        ranks = {unit: rank for rank, unit in enumerate(units)}
        self._bpe = tiktoken.Encoding("", pat_str=split, mergeable_ranks=ranks, special_tokens={})
        self._ids_of_rank = list(units.values())
        self._bytes = {i: to_bytes(token) for token, i in ids.items()}
        raw = [token["content"] for token in spec["added_tokens"] if not token["normalized"]]
        late = [token["content"] for token in spec["added_tokens"] if token["normalized"]]
        self.added = {*raw, *late}  # tokens that are cut out of a text
        normal = {self._normalize(text): ids[text] for text in late}
        if len(normal) < len(late) or normal.keys() & {*raw}:
            raise ValueError("two of its added tokens are the same text to it")
        self._cut, self._cut_late, self.ids = _any_of(raw), _any_of(normal), ids | normal

    @property
    def vocabulary(self) -> str:
        """A key of the bytes of all tokens, in the order of their ids."""
        return _key([self._bytes[i].hex() for i in range(self.n_vocab)])

    def encode(self, text: str) -> list[int]:
        """The ids of a text: no <bos>, no end of text, but the added tokens written in it."""
        parts, ids = [], []  # parts: text, added token, text, ..
        for i, part in enumerate(self._cut.split(text)):
            parts += [part] if i % 2 else self._cut_late.split(self._normalize(part))
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.ids[part])
            else:
                for rank in self._bpe.encode_ordinary(part):
                    ids += self._ids_of_rank[rank]
        return ids

    def decode(self, ids) -> str:
        """The text of ids, added tokens included; numbers that are no token's are left out."""
        return b"".join(self._bytes.get(int(i), b"") for i in ids).decode(errors="replace")


def _text(token) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _check_beside(tokenizer: Tokenizer, config: dict, added: dict):
    """ValueError where tokenizer_config.json or added_tokens.json, which transformers reads after
    tokenizer.json, mean other ids, or cut other tokens out of a text than the added ones there."""
    decoder = config.get("added_tokens_decoder") or {}
    strips = ("lstrip", "rstrip", "single_word")
    other = [token for token in decoder.values() if any(map({**token}.get, strips))]
    added = added | {_text(token): int(i) for i, token in decoder.items()}
    other += [text for text, i in added.items() if tokenizer.ids.get(text) != i]
    named = [v for k, v in config.items() if k.endswith("_token") and isinstance(v, (str, dict))]
    for kind in ("additional", "extra", "model_specific"):
        more = config.get(f"{kind}_special_tokens") or []
        named += more.values() if isinstance(more, dict) else more
    other += {*added, *(_text(token) for token in named if token)} - tokenizer.added
    other += [key for key in ("add_prefix_space", "split_special_tokens") if config.get(key)]
    if other:
        raise ValueError(f"files beside it say otherwise of {other[:3]!r:.200}")


def load_tokenizer(name, bos: str = "auto") -> Tokenizer:
    """The tokenizer of a model. bos: "no" takes away what it puts first, "yes" puts its bos_token,
    or the end of text, where it puts nothing. Raises UserError."""
    path = fetch(name, "tokenizer.json")
    names = ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")
    beside = [find(name, filename) for filename in names]
    special, config, added = [read_json(file) if file else {} for file in beside]
    with user_errors(f"cannot read {path}"):
        ends = {_text(said["eos_token"]) for said in (special, config) if said.get("eos_token")}
        config = special | {k: v for k, v in config.items() if v is not None}
        if len(ends) > 1 and not config.get("added_tokens_decoder"):
            raise ValueError(f"files beside it name several ends of text, {ends!r:.200}")
        spec, decoder = read_json(path), config.get("added_tokens_decoder") or {}
        for token in spec["added_tokens"]:  # transformers goes by what stands beside it
            stated = decoder.get(str(token["id"]), token)
            token["normalized"] = stated.get("normalized", not stated.get("special"))
        tokenizer = Tokenizer(spec, _text(config.get("eos_token")))
        _check_beside(tokenizer, config, added)
        if bos == "yes" and tokenizer.bos_id is None:
            tokenizer.bos_id = tokenizer.ids.get(_text(config.get("bos_token")), tokenizer.eos_id)
    if bos == "no":
        tokenizer.bos_id = None
    return tokenizer


# ---- Documents and token streams --------------------------------------------------------------
DATASETS = {"c4": "allenai/c4", "pile": "monology/pile-uncopyrighted"}  # short name -> source
DATASETS["pythia"] = "EleutherAI/pile-standard-pythia-preshuffled"
DATASETS["pythia-deduped"] = "EleutherAI/pile-deduped-pythia-preshuffled"
DATASETS["tiny"] = str(TINY / "text.jsonl.gz")
# The source that belongs to a vocabulary, by Tokenizer.vocabulary: GPT-NeoX's and tiny's.
OWN_DATA = {"e56ffe519fcf54d3": "pythia", "45c3a5511fb22111": "tiny"}
IDS = re.compile(r"\.bin$", re.I)
OTHER = re.compile(r"\.(parquet|arrow|[ct]sv|(nd)?json|zip|7z|tar|tgz|xz|bz2)(\.gz|\.zst)?$", re.I)
TEXT = re.compile(r"\.(txt|jsonl|json(?=\.gz))(\.gz|\.zst)?$", re.I)
HELD_OUT = {"test", "valid", "validation", "val", "dev", "eval"}  # splits that are not trained on
LAST_MARK = re.compile(r"<\|endoftext\|>\r?\Z")
LONGEST = 1 << 16  # characters in a piece of a document
PIECE, WHOLE = 1 << 13, 1 << 24  # in a document of a .txt that is cut, and of one that is not
FEW = 100  # fewer .txt than these are cut into documents: hardly one in twenty of them is whole
BATCH = 64  # pieces tokenised at a time
RULES = 11  # the version of what makes ids of a source: splits, documents, pieces
MIX = 1 << 12  # sequences of training that come in random order
SPREAD = 1 << 9  # sequences of validation that fewer are drawn from
TRAIN, VAL = 0, 1  # the two sides, as `held_out` tells them
SIDES = [("training", "--tokens (with --start, --kl-tokens)"), ("validation", "--eval-tokens")]


def held_out(text: str) -> bool:
    """Whether a document is for validation (1 in 20): the same text is always on the same side."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % 20 == 0


def _place(data: str) -> str:
    """Where a source is: a path, or hf://datasets/owner/name[@revision]."""
    path = os.path.expanduser(long_name(data, DATASETS))
    name = path.removeprefix("datasets/")
    local = os.path.exists(path) or TEXT.search(name) or IDS.search(name)
    on_hub = re.fullmatch(r"[\w-]+/[\w.-]+(@[\w./-]+)?", name) and not local
    return f"hf://datasets/{name}" if on_hub else path


def source_files(data: str) -> list[tuple[str, tuple]]:
    """(path, `_stat`) of the files that a source is read from, all of text or all of ids; of
    several a line says which. Text on a disk is mixed by a fixed seed, other files are in order.

    They are the split `train` where there is one; else all that are of no held-out split; else
    all; never files of a run's folder. A split is a whole word in the name of a folder or file."""
    place = _place(data)
    found = _listed(place)
    runs = tuple(name[: -len(MARK)] for name in found if f"/{name}".endswith(f"/{MARK}"))
    shown = [n for n in found if not (re.search(r"(^|/)\.", n) or n.startswith(runs))]
    names = [name for name in shown if TEXT.search(name) or IDS.search(name)]
    forms = f".txt, .jsonl, .bin, owner/name on the Hub, {', '.join(DATASETS)}"
    refuse(not names, f"no text in {data!r}: give one of {forms}")
    of_ids = [name for name in names if IDS.search(name)]
    refuse(len(of_ids) not in (0, len(names)), f"{data!r} has text and ids, {of_ids[:1]}: name one")
    words = {name: {*re.split(r"[\W_]+", name.lower())} for name in shown}
    train = [name for name in names if "train" in words[name]]
    taken = train or [name for name in names if not words[name] & HELD_OUT] or names
    other = [n for n in shown if n not in names and not (train and words[n] & HELD_OUT)]
    other.sort(key=lambda n: (not OTHER.search(n), -found[n][1][0]))  # the first is told
    unread, read = (sum(found[name][1][0] for name in some) for some in (other, taken))
    of_train = any("train" in words[n] and OTHER.search(n) for n in other)
    lost = unread > read or of_train and not train
    refuse(lost, f"{data!r} has {other[:1]}, which is not read, and less that is: name the text")
    if len(shown) > 1:
        some = ", ".join(taken[:3]) + (", ..." if len(taken) > 3 else "")
        say_once(f"{data}: reading {len(taken)} of {len(shown)} files: {some}")
    if not of_ids and not place.startswith("hf://"):
        random.Random(0).shuffle(taken)
    return [found[name] for name in taken]


def _listed(place: str) -> dict:
    """{name in a place: (path, `_stat`, on the Hub the size alone)} of its regular files, or of the
    one file. UserError for a link to a folder, which would be left out, or to nothing."""
    if place.startswith("hf://"):
        repo = place.removeprefix("hf://")
        folder = "/en" if re.match("datasets/allenai/c4(@|$)", repo) else ""  # its others differ
        with hub_errors(repo):
            about = hf.HfFileSystem().find(repo + folder, detail=True)
            return {p.split("/", 3)[-1]: (f"hf://{p}", (about[p]["size"],)) for p in sorted(about)}
    top, below = os.path.dirname(place), [Path(place)]
    if os.path.isdir(place):
        top, below = place, sorted(Path(place).rglob("*"))
    files = {}
    for path in below:
        name = path.relative_to(top).as_posix()
        with user_errors(f"cannot read {path}"):
            if path.is_file():
                files[name] = str(path), _stat(path)
            elif not re.search(r"(^|/)\.", name):
                refuse(path.is_symlink(), f"{path} is a link, but to no file: remove it")
                closed = path.is_dir() and not os.access(path, os.R_OK | os.X_OK)
                refuse(closed, f"{path} is closed to you")
    return files


def pieces(data: str, files: list | None = None):
    """Yields (piece, whether its document is held out, whether that ends here) of a file or folder
    of .txt, .jsonl (.gz, .zst), or a Hub dataset, always in the same order; a piece has at most
    LONGEST characters. files: its `source_files`, as they must be still. Raises UserError."""
    files = files or source_files(data)
    longest = PIECE if len(files) < FEW else WHOLE
    for path, was in files:
        with open_file(path) as file:
            blocks = chain(_unpacked(io.BufferedReader(file, BLOCK), path.lower()), [b""])
            texts = codecs.iterdecode(map(partial(_unchanged, path, was), blocks), "utf-8-sig")
            plain = TEXT.search(path)[1].lower() == "txt"
            for text in _plain_texts(texts, path, longest) if plain else _json_texts(texts, path):
                held, n = held_out(text), len(text) if text.strip() else 0
                for start in range(0, n, LONGEST):
                    yield text[start : start + LONGEST], held, start + LONGEST >= n


def _unchanged(path: str, was: tuple, block: bytes) -> bytes:
    """A block that was read of a file, if that is as it was; on the Hub a commit's always are."""
    changed = not path.startswith("hf://") and _stat(path) != was
    refuse(changed, f"{path} changed meanwhile: start again")
    return block


def _unpacked(file, path: str):
    """Yields the bytes of a file, unpacked by its suffix. EOFError if it is truncated."""
    if not path.endswith(".zst"):
        file = gzip.open(file) if path.endswith(".gz") else file
        yield from iter(partial(file.read, BLOCK), b"")
        return
    import zstandard

    frame, unpacked = None, bytearray()
    for packed in iter(partial(file.read, 4096), b""):  # of which no more than 130 MB can come
        while packed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            unpacked += frame.decompress(packed)
            packed = frame.unused_data
            frame = None if frame.eof else frame
        while len(unpacked) >= BLOCK:  # as of other files: a text's first mark may be in the first
            yield bytes(unpacked[:BLOCK])
            del unpacked[:BLOCK]
    yield bytes(unpacked)
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


def _plain_texts(blocks, path: str, longest: int):
    """Yields what stands between marks <|endoftext|>; a text without them in documents of at most
    `longest` characters, which end with a line if they can."""
    rest, cut = "", False
    for number, block in enumerate(blocks):
        refuse(block.count("\0") > len(block) // 4, f"{path} is UTF-16: convert it to UTF-8")
        lines = not number and re.match(r'\s*\{.*"text"\s*:\s*".*\}\s*(\n|$)', block)
        refuse(lines, f"{path} holds JSON Lines: call it .jsonl")
        *whole, rest = re.split(r"<\|endoftext\|>(?:\r?\n|(?!\r?\Z))", rest + block)
        # A mark that ends a block waits for the next: a newline may follow.
        marked = whole or LAST_MARK.search(rest)
        refuse(marked and cut, f"{path}: the first <|endoftext|> is late: begin it with another")
        yield from whole
        longest = WHOLE if marked else longest
        start = 0
        while start + longest < len(rest):
            end = rest.rfind("\n", start, start + longest) + 1 or start + longest
            yield rest[start:end]
            start, cut = end, longest == PIECE
        rest = rest[start:]
    yield LAST_MARK.sub("", rest)


def source_now(data: str) -> tuple[str, str, Path, list | None]:
    """(place, version, folder, files) of a source: a path, or a Hub dataset at one commit, which
    offline is the last; that commit, or `files_key`; where the cache has all versions; of a path
    its `source_files`, as they were before the key was taken."""
    place = _place(data)
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    refuse(root[0] == "~", "no home folder to keep tokens in: set XDG_CACHE_HOME to a folder")
    folder = Path(root, "saeft", f"{re.sub(r'[^a-zA-Z0-9]+', '-', place)[-60:]}-{_key(place)}")
    if not place.startswith("hf://"):
        files = source_files(place)
        return place, files_key(path for path, _ in files), folder, files
    repo, _, revision = place.removeprefix("hf://datasets/").partition("@")
    try:
        with hub_errors(f"datasets/{repo}"):
            commit = hf.HfApi().dataset_info(repo, revision=revision or None, timeout=10).sha
        with suppress(UserError):  # a cache that cannot be written is told where it matters
            write_text(folder / "commit", commit)
    except UserError:
        if not (folder / "commit").is_file():
            raise
        commit = (folder / "commit").read_text()
        say_once(f"note: {repo} is out of reach, and read as it was last: {commit:.12}")
    return f"hf://datasets/{repo}@{commit}", commit, folder, None


class TokenStream:
    """Token ids of one source: tokenised ahead of training by a thread, kept on disk, used again.
    `data`: for `pieces`, or .bin files of ids: little-endian uint16, or uint32 where the
    tokenizer has more than 65,536 ids. Documents, end-of-text after each, are cut into sequences of
    `context` ids, the first being bos if there is one. train, val: tokens. n_rows: of the
    embedding; a piece with an id beyond is left out. sae: an `sae_cfg`; n_train counts what it has
    seen of the same ids, too. UserError for an unknown or short source.

    Training gets each MIX sequences in random order (the last of what there is), or a short
    fine-tune would see a page or two. So much is read ahead. Validation of less than SPREAD
    sequences is drawn from so many.

    In the folder of `key`, what the ids depend on, each side has a file of ids; meta.json says
    how many count, and how much of the source they took (-1: all): Ctrl-C leaves no trace."""

    def __init__(self, data, tokenizer, context, train, val, short_ok=False, n_rows=None, sae=None):
        self.data, self.tokenizer, self.context = data, tokenizer, context
        self.short_ok = short_ok
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        self.n_ids = min(tokenizer.n_vocab, n_rows or tokenizer.n_vocab)  # those that may occur
        beyond = f"the end of text, {eos}, or <bos>, {bos}, has no row in the embedding: {n_rows}"
        refuse(max(eos, bos or 0) >= self.n_ids, beyond)
        self.stride = context - (bos is not None)  # ids of the stream in a sequence
        self.dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
        self.advice = f"give {self.dtype.name} ids of this tokenizer, under {self.n_ids:,}, or text"
        self.place, version, folder, self.source_files = source_now(data)
        ids = tokenizer.fingerprint, bos, eos, tokenizer.n_vocab, self.n_ids
        self.key = _key([version, ids, BATCH, MIX, SPREAD, RULES])
        with user_errors("the SAE does not say how much it has seen of this data"):
            self.seen = {**(sae or {}).get("seen", {})}  # as `seen_after` has it
            n_seen, other = self.seen.get(self.key, (0, context))
            numbers = type(n_seen) is type(other) is int
            if not (numbers and 0 <= n_seen < 2**60 and 0 < other < 2**31):
                raise ValueError(n_seen, other)
            if other != context:  # blocks are whole, with what is not seen of the last one
                n_ids = math.ceil(n_seen / MIX) * MIX * (other - context + self.stride)
                n_seen = math.ceil(n_ids / self.stride / MIX) * MIX
        self.n_seen = [n_seen, 0]
        n_sequences = [max(train // context + n_seen, 1), max(val // context, 1)]
        n_mixed = [math.ceil(n_sequences[TRAIN] / MIX) * MIX, max(n_sequences[VAL], SPREAD)]
        self.need, self.want = ([n * self.stride for n in ns] for ns in (n_sequences, n_mixed))
        self.folder = folder / self.key
        self.files = [self.folder / "train.bin", self.folder / "val.bin"]
        self.stopped = False
        self.failure = None  # what ended the thread
        self.load_meta()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        if short_ok:
            self._wait(TRAIN, math.inf)
        self.n_train = self.need[TRAIN] // self.stride

    def close(self):
        """Stop the thread; what it has written is there for the next run."""
        self.stopped = True
        self.thread.join(5)

    def validation(self) -> torch.Tensor:
        """The validation sequences, int64 [n, context], of text that `train` never gives; waits."""
        self._wait(VAL, self.want[VAL])
        among = min(self.tokens[VAL], self.want[VAL]) // self.stride
        drawn = torch.randperm(among, generator=torch.Generator().manual_seed(0))
        return self._read(VAL, drawn[: self.need[VAL] // self.stride].sort().values)

    def seen_after(self, n: int) -> dict:
        """{key: [sequences, context]} of all data that an SAE has seen after the first n sequences,
        with what it had seen before."""
        return {**self.seen, self.key: [n, self.context]} if n else self.seen

    def train(self, start: int, count: int) -> torch.Tensor:
        """Sequences start..start+count, int64 [count, context]; waits for them or a UserError."""
        end, rows = start + count, []
        self._wait(VAL, self.want[VAL])  # too little of it is told before any training
        refuse(not 0 <= start <= end <= self.n_train, f"{start}..{end} are not of {self.n_train}")
        for first in range(start // MIX * MIX, max(end, start + 1), MIX):
            self._wait(TRAIN, (first + MIX) * self.stride)
            n = min(MIX, self.tokens[TRAIN] // self.stride - first)
            mixed = torch.randperm(n, generator=torch.Generator().manual_seed(first))
            rows.append(first + mixed[max(start - first, 0) : end - first])
        return self._read(TRAIN, torch.cat(rows))

    def _read(self, side: int, rows: torch.Tensor) -> torch.Tensor:
        """Sequences by their place in a side's file, int64 [n, context]."""
        shape = self.tokens[side] // self.stride, self.stride
        with user_errors(f"cannot read {self.files[side]}, start again"):
            ids = np.memmap(self.files[side], self.dtype, "r", shape=shape)[rows.numpy()]
            refuse((ids >= self.n_ids).any(), f"{self.files[side]} is damaged: remove it")
            ids = torch.from_numpy(ids.astype(np.int64))
        with_bos = (self.context - self.stride, 0)
        return torch.nn.functional.pad(ids, with_bos, value=self.tokenizer.bos_id)

    def _wait(self, side: int, enough: float):
        """Until a side has `enough` tokens, or all that it needs and the source has, or the thread
        has ended; raises what has ended it."""
        while self.tokens[side] < enough and self.thread.is_alive():
            if self.passed[side] < 0 and self.tokens[side] >= self.need[side]:
                break
            self.thread.join(0.1)  # in short steps: Ctrl-C gets through
            have, want = sum(map(min, self.tokens, self.want)), sum(self.want)
            done = f"{have / 1e6:.1f}M of {want / 1e6:.1f}M tokens"
            progress(f"tokenising into {self.folder}: {done}")
        if self.failure:
            raise self.failure

    def load_meta(self):
        """Each side's tokens on disk, and what of the source they took; zeros where damaged."""
        found = [0, 0], [0, 0]
        with suppress(Exception):
            tokens, passed = json.loads((self.folder / "meta.json").read_bytes())
            numbers = [*tokens, *passed]
            whole = [type(n) for n in numbers] == [int] * 4 and min(numbers) >= -1
            sizes = [path.stat().st_size if path.exists() else 0 for path in self.files]
            held = [size // self.dtype.itemsize for size in sizes]
            if whole and all(0 <= n <= most for n, most in zip(tokens, held, strict=True)):
                found = tokens, passed
        self.tokens, self.passed = found

    def lacks(self, side: int) -> bool:
        return not self.stopped and self.passed[side] >= 0 and self.tokens[side] < self.want[side]

    def _run(self):
        """The thread: until no side lacks tokens, or the source ends. Fails where that has less
        than is needed, unless less is allowed."""
        try:
            for side in (VAL, TRAIN):
                while self.lacks(VAL) or self.lacks(side):  # another process may empty the cache
                    self._fill(VAL if self.lacks(VAL) else side)
                kind, flag = SIDES[side]
                have = self.tokens[side] // self.stride  # sequences
                if self.short_ok and have > self.n_seen[side]:
                    self.need[side] = min(self.need[side], have * self.stride)
                advice = f"lower {flag}" if have > self.n_seen[side] else "give more text"
                short = self.tokens[side] < self.need[side] and not self.stopped
                counts = f"{self.tokens[side]:,} {kind} tokens, of {self.need[side]:,} needed"
                refuse(short, f"{self.data} has {counts}: {advice}")
        except OSError as error:
            self.failure = UserError(f"cannot write {self.folder} ({error}): set XDG_CACHE_HOME")
        except BaseException as error:  # tiktoken's panics are no Exception
            self.failure = error

    def _fill(self, side: int):
        """A side, one process at a time; of what another one fills it takes what it needs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as lock:
            try:
                lock.enter_context(hf.utils.WeakFileLock(self.folder / "lock", timeout=1))
            except TimeoutError:
                self.load_meta()
                return
            self.load_meta()
            if self.lacks(side):
                files = self.source_files or source_files(self.place)
                fill = self._copy if IDS.search(files[0][0]) else self._tokenise
                fill(side, files)
                if self.lacks(side):
                    self._append(side, np.zeros(0, self.dtype), -1)

    def _tokenise(self, side: int, files: list):
        """A side's ids of each batch of pieces; `passed` counts batches."""
        source, eos, begun = pieces(self.place, files), self.tokenizer.eos_id, False
        if self.tokens[side]:  # perhaps inside a document
            begun = np.memmap(self.files[side], self.dtype, "r", shape=self.tokens[side])[-1] != eos
        batches = iter(lambda: list(islice(source, BATCH)), [])
        for number, batch in islice(enumerate(batches, 1), self.passed[side], None):
            own = [(text, ends) for text, held, ends in batch if held == side]
            with ThreadPoolExecutor((os.cpu_count() or 1) // 2 or 1) as pool:
                encoded = pool.map(self.tokenizer.encode, [text for text, _ in own])
            ids = []
            for piece, (_, ends) in zip(encoded, own):
                kept = max(piece, default=0) < self.n_ids
                begun = begun or kept  # a document of which something is kept
                ids += piece if kept else []
                ids += [eos] if begun and ends else []
                begun = begun and not ends
                if not kept:
                    rows = f"ids from {self.n_ids:,} on, for which the model has no embedding"
                    say_once(f"{self.data}: leaving out pieces of text that hold {rows}")
            self._append(side, np.array(ids, dtype=self.dtype), number)
            if not self.lacks(side):
                break

    def _copy(self, side: int, files: list):
        """Validation: the last file, or of one its last 20th, without the document cut there.
        Training: all before. `passed` counts ids."""
        sizes = [size // self.dtype.itemsize for _, (size, *_) in files]
        before = sum(sizes[:-1])  # ids of all files but the last
        at, end = 0, before or sizes[0] * 19 // 20
        if side == VAL:
            at, end = end, sum(sizes)
            ends = self._ids_at(files[-1], at - before, BLOCK) == self.tokenizer.eos_id
            at += ends.argmax() + 1 if ends.any() else 0
        at += self.passed[side]
        for file, size in zip(files, sizes):  # at, end: from its beginning on
            while at < min(size, end) and self.lacks(side):
                missing = self.want[side] - self.tokens[side]
                ids = self._ids_at(file, at, min(missing, BLOCK, end - at))
                self._append(side, ids, self.passed[side] + len(ids))
                at += len(ids)
            at, end = at - size, end - size

    def _ids_at(self, file: tuple, start: int, count: int) -> np.ndarray:
        path, was = file
        uneven = was[0] % self.dtype.itemsize
        refuse(uneven, f"{path}: {was[0]:,} bytes are no whole {self.dtype.name}: {self.advice}")
        with open_file(path) as stored:
            stored.seek(start * self.dtype.itemsize)
            data = _unchanged(path, was, stored.read(count * self.dtype.itemsize))
        ids = np.frombuffer(data, self.dtype)
        largest, kind, advice = ids.max(initial=0), self.dtype.name, self.advice
        wider = len(ids) > 15 and ids.any() and not ids[1::2].any()
        refuse(wider, f"{path}: as {kind} every second id is 0, so they are wider: {advice}")
        refuse(largest >= self.n_ids, f"{path}: as {kind} it holds {largest:,}: {advice}")
        return ids

    def _append(self, side: int, ids: np.ndarray, passed: int):
        """Ids to a side's file, then meta.json. <bos> that stands in a text is dropped, but not
        where it is the end of text as well."""
        if self.tokenizer.bos_id != self.tokenizer.eos_id:
            ids = ids[ids != self.tokenizer.bos_id]
        with open(self.files[side], "ab") as file:
            end = self.tokens[side] * self.dtype.itemsize
            if file.tell() < end:
                raise OSError("cut off by another program")
            file.truncate(end)
            file.write(ids.tobytes())
        self.passed[side] = passed
        self.tokens[side] += len(ids)
        write_text(self.folder / "meta.json", json.dumps([self.tokens, self.passed]))


# ---- A run's folder ---------------------------------------------------------------------------
MARK = ".saeft"  # the file that says that a folder is a run's; its process holds it locked
WRITTEN = ["cfg.json", "sae_weights.safetensors", "adapter.safetensors", "config.json"]
WRITTEN += ["metrics.jsonl", "report.json", "features.html", "checkpoint", "checkpoint*.pt"]
WRITTEN += [".*.part"]
# Settings on which no figure of a run depends.
MAY_DIFFER = {"resume", "overwrite", "out", "name", "checkpoint_minutes", "log_every"}


def run_path(settings: dict) -> Path:
    """The folder of a run under --out. UserError where it lies elsewhere."""
    name, model = settings["name"], settings["model"]
    if name is None:
        folder = expanded(model)
        called = folder.resolve().name if folder.is_dir() else model.split("/", 1)[-1]
        called = re.sub(r"[^\w.-]", "-", called)
        kind = f"{settings['sae']}-k{'-'.join(map(str, settings['k']))}-seed{settings['seed']}"
        name = f"{called}-layer{settings['layer']}-{kind}"
    refuse(Path(name).name != name or name == "..", f"--name {name} is no plain folder name")
    path = expanded(settings["out"]) / name
    refuse((path.parent / MARK).exists(), f"--out {path.parent} is a run's own folder")
    return path


class RunFolder:
    """A folder that one process at a time writes a run into: config.json, metrics.jsonl,
    checkpoints; for each SAE, here or in k8, k16, ..., its files, report.json, SAEs in `parts`.
    Of several processes the one of rank 0 writes; others write checkpoints alone."""

    def __init__(self, path: Path, parts: list[str], rank: int = 0):
        self.path, self.parts, self.rank, self.lock = path, parts, rank, ExitStack()
        self.metrics = path / "metrics.jsonl"
        odd = [part for part in parts if not re.fullmatch(r"[\w-]+", part) or parts.count(part) > 1]
        refuse(odd, f"--method: {odd} cannot be a method's name, nor its folder's")

    def take(self, resume: bool, overwrite: bool, start: str | None = None):
        """Make it, for this process alone. UserError where something else is in it, or the SAE that
        the run starts from."""
        if self.rank > 0:
            return
        path = self.path
        inside = expanded(start or os.sep).resolve().is_relative_to(path.resolve())
        refuse(inside, f"--start {start} lies in this run's own folder: give a --name")
        with user_errors(f"cannot write {path}: choose another --out or --name"):
            path.mkdir(parents=True, exist_ok=True)
            foreign = not (path / MARK).exists() and any(path.iterdir())
            refuse(foreign, f"{path} is not empty and no run's folder: choose another --name")
            unfinished = (path / "checkpoint").exists() and not overwrite
            refuse(unfinished and not resume, f"{path} holds an unfinished run: pass --resume")
            kept = any(path.glob("**/report.json")) and not (overwrite or unfinished)
            refuse(kept, f"{path} holds a finished run: choose a --name, or pass --overwrite")
            try:
                self.lock.enter_context(hf.utils.WeakFileLock(path / MARK, timeout=0.1))
            except TimeoutError:
                raise UserError(f"{path} is in use by a run that is going on") from None

    def clear(self):
        """Remove what a run writes, that of methods of other programs too, and nothing else."""
        parts = {*self.parts}
        with suppress(UserError, KeyError, TypeError):
            was = read_json(self.path / "config.json")["method"]
            parts |= {name for name in was if Path(name).name == name != ".."}
        saes = [self.path, *(k for k in self.path.iterdir() if re.fullmatch(r"k\d+", k.name))]
        for folder in [sae / part for sae in saes for part in parts] + saes[::-1]:
            for file in chain(*map(folder.glob, WRITTEN)):
                file.unlink()
            if folder != self.path and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def begin(self, settings: dict):
        """All is loaded: an earlier run's files give way to this one's."""
        if self.rank == 0:
            with user_errors(f"cannot write {self.path}"):
                self.clear()
                write_text(self.path / "config.json", json.dumps(settings, indent=2) + "\n")
            self.log([])

    def log(self, lines: list[str]):
        """Add lines to metrics.jsonl."""
        if self.rank == 0:
            path = self.metrics
            with user_errors(f"cannot write {path}"), open(path, "a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)

    def save_state(self, state: dict, tag: str):
        """A checkpoint. Each process writes a file of its own; when all are whole, the first one
        writes their tag to the file `checkpoint`, and removes what came before."""
        _wait_for_all_processes()  # the first one may be removing an earlier run's
        if self.rank == 0:
            state = {**state, "logged": self.metrics.stat().st_size}
        with replacing(self.path / f"checkpoint-{tag}-{self.rank}.pt") as file:
            torch.save(state, file)
        _wait_for_all_processes()
        if self.rank == 0:
            write_text(self.path / "checkpoint", tag)
            for file in self.path.glob("checkpoint-*.pt"):
                if not file.name.startswith(f"checkpoint-{tag}-"):
                    file.unlink()

    def load_state(self, device) -> dict | None:
        """The last checkpoint, if there is one."""
        if not (self.path / "checkpoint").exists():
            return None
        with user_errors(f"cannot read a checkpoint in {self.path}: --overwrite starts anew"):
            tag = (self.path / "checkpoint").read_text()
            path = self.path / f"checkpoint-{tag}-{self.rank}.pt"
            return torch.load(path, map_location=device, weights_only=True)

    def go_on(self, saved: dict, settings: dict, identity: dict, n_processes: int):
        """Instead of `begin`: with the run of a checkpoint, metrics.jsonl as long as it was.
        UserError if it has other settings, or another identity of "model", "data" or "start"."""
        was = saved["config"]
        for name in sorted(settings.keys() - MAY_DIFFER - identity.keys()):
            differs = f"--{name.replace('_', '-')} was {was.get(name)}, is {settings[name]}"
            refuse(was.get(name) != settings[name], f"--resume: {differs}")
        for part, key in identity.items():
            then = saved.get("identity", {}).get(part)
            other = f"{part} {settings[part]} is not what it was, {then}"
            refuse(then != key, f"--resume: {other}: give that one, or --overwrite")
        refuse(saved["world"] != n_processes, f"--resume: it was {saved['world']} processes")
        if self.rank == 0:
            with user_errors(f"cannot write {self.metrics}"), open(self.metrics, "ab") as file:
                file.truncate(min(saved["logged"], file.tell()))

    def finish(self):
        """The run is whole: no checkpoint is needed any more."""
        left = ["checkpoint", "checkpoint-*.pt", ".checkpoint*.part"]  # the last by a kill
        for file in chain(*map(self.path.glob, left)) if self.rank == 0 else ():
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
        with user_errors("another process has ended"):
            torch.distributed.barrier()
