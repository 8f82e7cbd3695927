import contextlib
import difflib
import json
import math
import mmap
import os
import re
from pathlib import Path

import torch
from huggingface_hub import errors as hub
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import logging as hub_logging
from torch import Tensor


class UserError(Exception):
    """What the user asked for cannot be done: one line that names the value and says what to do."""


# --- The Hub, and folders laid out like it -------------------------------------------------------

PYTHIA = [f"pythia-{n}" for n in "14m 31m 70m 160m 410m 1b 1.4b 2.8b 6.9b 12b".split()]
MODELS = {"tiny": str(Path(__file__).parent / "assets" / "tiny")}  # short name -> folder or repo
MODELS |= {name: f"EleutherAI/{name}" for size in PYTHIA for name in (size, f"{size}-deduped")}
MODELS |= {name: f"google/{name}" for name in ("gemma-2-2b", "gemma-2-9b")}

# What the client lets out: its own errors, the disk's, its HTTP library's (requests in versions
# 0.x, httpx later), and the RuntimeErrors of the Rust library that fetches big files.
CLIENT_ERRORS = (OSError, RuntimeError, hub.EntryNotFoundError, hub.HFValidationError)
CLIENT_ERRORS += hub.HfHubHTTPError.__bases__
if "HF_HUB_VERBOSITY" not in os.environ:
    hub_logging.set_verbosity_error()  # the warnings of its retries would bury our one line


@contextlib.contextmanager
def hub_errors(repo: str, filename: str = "such file"):
    """Turn the Hub client's exceptions into UserError; `repo`: owner/name, datasets/owner/name."""
    try:
        yield
    except CLIENT_ERRORS as error:
        raise UserError(_hub_message(repo, filename, error)) from error


def _hub_message(repo: str, filename: str, error: BaseException) -> str:
    if isinstance(error, FileNotFoundError) and error.__cause__:
        error = error.__cause__  # "not in the cache either", "no such path": the cause says why
    status = getattr(getattr(error, "response", None), "status_code", None)
    unknown = isinstance(error, (hub.RepositoryNotFoundError, hub.HFValidationError))
    if unknown and not isinstance(error, hub.GatedRepoError):
        return (
            f"no folder and no Hub repository {repo!r}: check the name (if private: set HF_TOKEN)"
        )
    if status in (401, 403):
        licence = f"accept the licence at https://huggingface.co/{repo} and set HF_TOKEN"
        return f"the Hub refuses access to {repo} (HTTP {status}): {licence}"
    if isinstance(error, (hub.EntryNotFoundError, hub.RevisionNotFoundError, FileNotFoundError)):
        weights = "safetensors" in filename
        hint = "only safetensors checkpoints are read" if weights else "check the name"
        return f"{repo} has no {filename}: {hint}"
    reason = f"HTTP {status}" if status else " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, hub.OfflineModeIsEnabled):
        reason = "not in the cache, and HF_HUB_OFFLINE is set"
    local = "--data stdlib" if repo.startswith("datasets/") else "--model tiny"
    advice = f"check the connection and run again, give a local folder, or try {local}"
    return f"cannot fetch {repo} ({reason:.160}): {advice}"


def fetch(name: str, filename: str) -> Path:
    """One file of a model: a short name of MODELS, a folder like a Hub snapshot, or owner/name."""
    source = MODELS.get(name, name)
    folder = os.path.expanduser(source)
    local = os.path.isdir(folder)
    if not local and not re.fullmatch(r"[A-Za-z0-9_-][\w.-]*/[\w.-]+", source):
        near = difflib.get_close_matches(name, MODELS, 3) or ["tiny", "pythia-160m", "gemma-2-2b"]
        hint = f"try {', '.join(near)}, an owner/name from the Hub, or a folder"
        raise UserError(f"no model and no folder {name!r}: {hint}")
    with hub_errors(source, filename):
        path = Path(folder, filename) if local else Path(hf_hub_download(source, filename))
        path.stat()  # FileNotFoundError when the folder lacks it
    return path


def load_config(name: str) -> dict:
    """The model's config.json. Raises UserError, also when it is not a JSON object."""
    return read_json(fetch(name, "config.json"))


def load_weights(name: str, device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors by name, from model.safetensors or else the shards of its index. Raises UserError."""
    weights = {}
    for path, listed in _weight_files(name).items():
        tensors = read_safetensors(path, device, dtype)
        if absent := set(listed) - tensors.keys():
            raise UserError(f"{path} lacks {min(absent)!r:.100}, which the model's index promises")
        weights |= {key: tensors[key] for key in listed or tensors}
    return weights


def _weight_files(name: str) -> dict[Path, list[str]]:
    """The files that hold the weights, each with the tensors to take from it (none: all)."""
    try:
        return {fetch(name, "model.safetensors"): []}
    except UserError as no_single:  # also offline: a sharded model's cache never held that file
        try:
            index = fetch(name, "model.safetensors.index.json")
        except UserError:
            raise no_single from None
    weight_map = read_json(index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if not all(re.fullmatch(r"[\w.-]+\.safetensors", str(file)) for file in files):
        raise UserError(f"{index}: weight_map must be an object of plain *.safetensors file names")
    shards = {file: [key for key in weight_map if weight_map[key] == file] for file in set(files)}
    return {fetch(name, file): shards[file] for file in sorted(shards)}


# --- Files: JSON, safetensors, SAEs --------------------------------------------------------------


@contextlib.contextmanager
def reading(path: Path):
    """Turn what goes wrong while a file is read (absent, damaged, hostile) into UserError."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error!s:.200}") from error


@contextlib.contextmanager
def replacing(path: Path):
    """A binary file to write, which takes the place of `path` only once it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_json(path: Path) -> dict:
    """One JSON object from a file. Raises UserError."""
    with reading(path):
        return _parse_json(path.read_bytes())


def _parse_json(text: bytes) -> dict:
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice in a JSON object")
        return dict(pairs)

    value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is needed, not a {type(value).__name__}")
    return value


# The dtypes in use, of https://huggingface.co/docs/safetensors
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
CHUNK = 2**22  # elements mapped at once: what is mapped counts as resident memory


def read_safetensors(path: Path, device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Tensors by name, in file order; floating ones in `dtype` when it is given.

    The whole header is checked before any tensor is made. Beside the result, resident memory grows
    by one mapped chunk only. Raises UserError when the file is damaged, cut short or hostile.
    """
    with reading(path), open(path, "rb") as file:
        layout = _check_header(file)
        return {name: _read_tensor(file, *where, device, dtype) for name, *where in layout}


def _check_header(file) -> list[tuple[str, torch.dtype, list[int], int]]:
    """(name, dtype, shape, first byte in the file) of each tensor, by position."""
    size, length = os.fstat(file.fileno()).st_size - 8, int.from_bytes(file.read(8), "little")
    if length > min(size, 100_000_000):
        raise ValueError(f"a header of {length:,} bytes does not fit the file, or 100 MB")
    header = _parse_json(file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ must map strings to strings")
    layout, end = [], 0
    for begin, stop, name, dtype, shape in sorted(_check_entry(*item) for item in header.items()):
        if begin != end:
            raise ValueError(f"overlap or hole in the data before tensor {name!r:.60}")
        layout.append((name, dtype, shape, 8 + length + begin))
        end = stop
    if length + end != size:
        raise ValueError(f"the tensors end {size - length - end:,} bytes before the file's end")
    return layout


def _check_entry(name: str, entry: object) -> tuple[int, int, str, torch.dtype, list[int]]:
    """(begin, end, name, dtype, shape) of one tensor, in bytes after the header."""
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if str(dtype) not in DTYPES:
        raise ValueError(f"tensor {name!r:.60} has the unknown dtype {dtype!r:.60}")
    for numbers in (shape, offsets):  # type(), as True is no number here
        known = isinstance(numbers, list) and len(numbers) <= 32
        if not known or not all(type(n) is int and 0 <= n < 2**60 for n in numbers):
            raise ValueError(f"tensor {name!r:.60} has impossible numbers: {numbers!r:.60}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    huge = math.prod(max(n, 1) for n in shape) >= 2**60  # also [0, 2**59, 2**59]
    if huge or len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise ValueError(f"tensor {name!r:.60}: {shape!r:.60} does not fit bytes {offsets!r:.60}")
    return *offsets, name, DTYPES[dtype], shape


def _read_tensor(file, stored: torch.dtype, shape, offset: int, device, dtype) -> Tensor:
    dtype = dtype if dtype and stored.is_floating_point else stored
    out = torch.empty(shape, dtype=dtype, device=device)
    for chunk in out.view(-1).split(CHUNK) if out.numel() else ():
        page = offset - offset % mmap.ALLOCATIONGRANULARITY  # where a map may start
        skip, count = offset - page, chunk.numel()
        offset += count * stored.itemsize
        with mmap.mmap(file.fileno(), offset - page, access=mmap.ACCESS_COPY, offset=page) as view:
            chunk.copy_(torch.frombuffer(view, dtype=stored, count=count, offset=skip))
    return out


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]):
    """Write `tensors`; `path` is replaced only once all is written. Raises UserError."""
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))  # all aligned
    header, end, dtypes = {"__metadata__": metadata}, 0, {v: k for k, v in DTYPES.items()}
    for name, t in tensors.items():
        offsets = [end, end := end + t.nbytes]
        header[name] = {"dtype": dtypes[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors.values():
            file.write(t.detach().cpu().reshape(-1).view(torch.uint8).numpy())


def save_sae(folder: Path | str, tensors: dict[str, Tensor], cfg: dict):
    """SAELens 6's layout: W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D]. Raises UserError."""
    write_safetensors(Path(folder, "sae_weights.safetensors"), tensors, {"format": "pt"})
    with replacing(Path(folder, "cfg.json")) as file:
        file.write(json.dumps(cfg, indent=2).encode())


def load_sae(folder: Path | str) -> tuple[dict[str, Tensor], dict]:
    """What save_sae wrote: (tensors on the CPU, cfg). Raises UserError."""
    cfg = read_json(Path(folder, "cfg.json"))
    tensors = read_safetensors(Path(folder, "sae_weights.safetensors"), "cpu")
    D, F = cfg.get("d_in"), cfg.get("d_sae")
    for name, shape in {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}.items():
        if name not in tensors or tensors[name].shape != shape:
            raise UserError(f"{folder}: cfg.json promises a {name} of shape {shape}")
    return tensors, cfg


"""Tokenizers: `tokenizer.json` (Hugging Face `tokenizers`, format 1.0) encoded with tiktoken."""

import hashlib
import json
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from math import inf
from pathlib import Path

import numpy as np
import tiktoken


class UserError(Exception):
    """A mistake of the user's: one line that names the value and says what to do."""


# --- Tokenizers -----------------------------------------------------------------------------------

# Normalizer, pre-tokenizer and decoder of the two kinds that are read; options must be these.
BYTE_LEVEL = '(null|"NFC"); "ByteLevel"; "ByteLevel"'
SENTENCEPIECE = '"Replace" " " "▁"; (null|"Split" " "); "Replace" "▁" " " "ByteFallback" "Fuse"'
OPTIONS = dict(dropout=0, continuing_subword_prefix=0, end_of_word_suffix=0, ignore_merges=0)
OPTIONS |= dict(add_prefix_space=0, use_regex=1, lstrip=0, rstrip=0, single_word=0)

# GPT-2 writes a byte as a character: the same where printable, else the next one from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
BYTE_OF_CHAR = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}
UTF8_BYTES = [*range(0xC0), *range(0xC2, 0xF5)]  # the other 13 never occur

# GPT-2's split is WORDS|\s+(?!\S)|\s+; without the blocks of 500, which change no match, a long run
# of white space would overflow the regex engine's stack. In NeoX's, runs of 2 to M spaces are cut
# out first, as tokens, and white space (V: all but a space) ends where two spaces follow.
WORDS = r"'(?:[stmd]|ll|re|ve)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
GPT2_SPLIT = WORDS + r"|(?:\s{500})*\s+(?!\S)|\s"
NEOX_SPLIT = r" {2,M}|" + WORDS + r"|(?:(?>(?: ?V){500}))*(?: (?! )|V)+(?!\S)|\s"

# The reference's NFC is Unicode 9's: it leaves these characters, all younger, as they are.
_OLDER = re.compile(
    "[^\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1af0\u1df6-\u1dfa"
    "\ua82c\U000105c9-\U000105e4\U00010d24-\U00010d6d\U00010eab-\U00010f85\U00011070\U0001133b"
    "\U00011382-\U000113e2\U0001145e\U00011839\U0001183a\U00011930-\U00011a99\U00011d42-\U00011f42"
    "\U0001611e-\U0001612f\U00016d63-\U00016d6a\U00016ff0\U00016ff1\U0001e08f-\U0001e6f5]+"
)


def _nfc(text: str) -> str:
    if unicodedata.is_normalized("NFC", text):
        return text
    return _OLDER.sub(lambda run: unicodedata.normalize("NFC", run[0]), text)


def _spaces(text: str) -> str:
    return text.replace("▁", " ")


def _gpt2_bytes(token: str) -> bytes:
    known = all(c in BYTE_OF_CHAR for c in token)
    return bytes(BYTE_OF_CHAR[c] for c in token) if known else token.encode()


def _is_sentencepiece(spec: dict) -> bool:
    """Which of the two kinds it is; UserError if anything in the file could mean other ids."""
    model, keys = spec["model"], ("normalizer", "pre_tokenizer", "decoder")
    word = re.compile(r'"(?:type|String|Regex|content)": (?!"Sequence")(".*?")')
    parts = [word.findall(json.dumps(spec.get(key), ensure_ascii=False)) for key in keys]
    found = "; ".join(" ".join(part) or "null" for part in parts)
    options = [model, spec.get("pre_tokenizer") or {}, *spec["added_tokens"]]
    odd = [f"{k} {v}" for o in options for k, v in o.items() if bool(v) != OPTIONS.get(k, bool(v))]
    fallback = bool(model.get("byte_fallback"))
    kind = SENTENCEPIECE if fallback else BYTE_LEVEL
    if model["type"] != "BPE" or odd or not re.fullmatch(kind, found):
        found = "; ".join([model["type"], found, f"byte_fallback {fallback}", *odd[:1]])
        raise UserError(
            f"tokenizer is {found}: only GPT-NeoX's and Gemma's kinds of BPE can be read"
        )
    return fallback


def _made_by_merges(merges: list[tuple[str, str]]) -> list[str]:
    """The tokens that merging makes, in the order of the merges that complete them.

    The reference merges the pairs listed, tiktoken any neighbours whose concatenation has a rank.
    What happens between two token boundaries never depends on what lies outside, so both agree if a
    token's rank is that of the merge completing it when it is encoded alone, and if a token that is
    not reached so has no rank.
    """
    order = {pair: rank for rank, pair in enumerate(merges)}
    made = {}
    for token in {left + right for left, right in merges}:
        parts, rank = list(token), 0
        while len(parts) > 1 and rank < inf:
            ranks = [order.get(pair, inf) for pair in zip(parts, parts[1:])]
            i = ranks.index(rank := min(ranks))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if rank < inf:
            made[token] = rank
    return sorted(made, key=made.get)


def _longest_run(char: str, added: dict[str, int]) -> int:
    """M if runs of 2 (or 1) to M of `char` are all the added tokens that it is in; else 0."""
    runs = {text for text in added if char in text}
    longest = max(map(len, runs), default=0)
    return longest if runs | {char} == {char * n for n in range(1, longest + 1)} else 0


def _byte_level(vocab: dict[str, int], added: dict[str, int], made: list[str]):
    """GPT-NeoX's kind, where a character of a token is a byte. As `_sentencepiece`, returns
    {bytes: ids} in the order of merging, the split, and the added tokens that the split cuts out.
    """
    entries = {bytes([b]): [vocab[c]] if c in vocab else [] for c, b in BYTE_OF_CHAR.items()}
    entries |= {_gpt2_bytes(token): [vocab[token]] for token in made}
    longest = _longest_run(" ", added)
    if longest < 2 or " " in added:
        return entries, GPT2_SPLIT, []
    split = NEOX_SPLIT.replace("M", str(longest)).replace("V", r"[^\S ]")
    return entries, split, [" " * n for n in range(2, longest + 1)]


def _sentencepiece(vocab: dict[str, int], added: dict[str, int], made: list[str]):
    """Gemma's kind, where a token is characters, ▁ a space (for us a space: one byte, not three).

    tiktoken starts from bytes. To make it start from characters, the leading bytes of each one in
    the vocabulary rank lowest; what is left of any other falls back to bytes. The split cuts only
    where no token can lie across: before spaces, and around line ends and tabs.
    """
    made = [token for token in made if " " not in token]  # a normalized text has no space
    if wrong := [token for token in made if "▁" in token.lstrip("▁")]:
        raise UserError(f"tokenizer has {wrong[0]!r}, with ▁ after another character: unsupported")
    fallback = [vocab.get(f"<0x{b:02X}>") for b in range(256)]
    entries = {bytes([b]): [] if i is None else [i] for b, i in enumerate(fallback)}
    chars = {_spaces(c).encode(): [i] for c, i in vocab.items() if len(c) == 1 and c != " "}
    for char in chars:
        entries |= {char[:n]: [fallback[b] for b in char[:n]] for n in range(2, len(char))}
    entries |= chars | {_spaces(token).encode(): [vocab[token]] for token in made}
    mixed = {c for token in made for c in token if set(token) != {c}}
    runs = {c: _longest_run(c, added) for c in {"\n", "\t"} - mixed if _longest_run(c, added)}
    split = "".join(f"{c}{{1,{longest}}}|" for c, longest in runs.items())
    split += f" *[^ {''.join(runs)}]+| +"
    return entries, split, [text for text in added if text[0] in runs]


def _any_of(texts) -> re.Pattern:
    """Matches any of the texts, the longest possible; of none, nothing, and that fast."""
    words = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    return re.compile("(" + (words or r"\ud800(?!)") + ")")


class Tokenizer:
    """A parsed `tokenizer.json`; ids are always those of the reference library, `tokenizers`.

    It must be byte-level BPE (GPT-NeoX), or BPE over characters with byte fallback (Gemma: what
    transformers makes of a SentencePiece model). Raises UserError, saying what it is, for another.

    n_vocab: the largest id + 1. eos_id: the token between documents. bos_id: None without a <bos>.
    fingerprint: another whenever an id could be another.
    """

    def __init__(self, spec: dict):
        gemma = _is_sentencepiece(spec)
        rules = [spec.get(key) for key in ("model", "added_tokens", "normalizer")]
        self.fingerprint = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:16]
        self._normalize = _spaces if gemma else _nfc if spec.get("normalizer") else str
        self._added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        vocab = spec["model"]["vocab"] | self._added
        self.n_vocab = max(vocab.values()) + 1
        self.bos_id, self.eos_id = (
            vocab.get("<bos>"),
            vocab.get("<|endoftext|>", vocab.get("<eos>")),
        )
        if self.eos_id is None:
            raise UserError("tokenizer lacks a token between documents, <|endoftext|> or <eos>")
        self._bytes = {
            i: _spaces(t).encode() if gemma else _gpt2_bytes(t) for t, i in vocab.items()
        }
        names = {f"<0x{b:02X}>": b for b in range(256)} if gemma else {}
        self._fallback = {vocab[name]: bytes([b]) for name, b in names.items() if name in vocab}
        self._build_encoder(spec, _sentencepiece if gemma else _byte_level)

    def _build_encoder(self, spec: dict, kind) -> None:
        merges = [m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"]]
        made = _made_by_merges([(left, right) for left, right in merges])
        entries, split, in_split = kind(spec["model"]["vocab"], self._added, made)
        entries |= {text.encode(): [self._added[text]] for text in in_split}
        if lacking := [b for b in UTF8_BYTES if not entries[bytes([b])]]:
            raise UserError(f"tokenizer lacks a token for byte {lacking[0]:#04x}: unsupported")
        ranks = {token: rank for rank, token in enumerate(entries)}
        self._bpe = tiktoken.Encoding("", pat_str=split, mergeable_ranks=ranks, special_tokens={})
        width = max(map(len, entries.values()))  # 3 where a rank can be 3 bytes of a character
        self._ids = np.array(
            [ids + [-1] * (width - len(ids)) for ids in entries.values()], np.int32
        )
        cut = [token for token in spec["added_tokens"] if token["content"] not in in_split]
        late = {self._normalize(t["content"]): t["id"] for t in cut if t.get("normalized")}
        self._cut = _any_of(t["content"] for t in cut if not t.get("normalized"))
        self._cut_late, self._added = _any_of(late), self._added | late

    def _encode(self, text: str) -> np.ndarray:
        parts = []  # text, added token, text, .., text
        for i, part in enumerate(self._cut.split(text)):
            parts += [part] if i % 2 else self._cut_late.split(self._normalize(part))
        try:
            parts[::2] = [self._encode_plain(part) for part in parts[::2]]
        except UnicodeEncodeError:  # a lone surrogate, for which the reference has no ids: U+FFFD
            return self._encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        parts[1::2] = [[self._added[part]] for part in parts[1::2]]
        return np.concatenate(parts, dtype=np.int32)

    def _encode_plain(self, text: str) -> np.ndarray:
        ids = self._ids[self._bpe.encode_to_numpy(text, disallowed_special=())]
        return ids[ids >= 0]

    def encode(self, text: str) -> list[int]:
        """The ids of a text: no <bos>, no end of text, but the added tokens written in it."""
        return self._encode(text).tolist()

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """The ids of each text, int32. tiktoken works outside the GIL."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode, texts))

    def decode(self, ids) -> str:
        """The text of ids, added tokens included; numbers that are no token's are left out."""
        text, known = "", (i for i in map(int, ids) if i in self._bytes)
        for fallback, run in groupby(known, self._fallback.__contains__):
            data = b"".join((self._fallback if fallback else self._bytes)[i] for i in run)
            try:
                text += data.decode()
            except UnicodeDecodeError:  # as the reference: byte fallback fails byte by byte
                text += "\ufffd" * len(data) if fallback else data.decode(errors="replace")
        return text


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder that holds `tokenizer.json`; UserError if it cannot be used."""
    path = Path(folder) / "tokenizer.json"
    try:
        return Tokenizer(json.loads(path.read_text("utf-8")))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): fetch it again") from None


import gzip
import hashlib
import io
import json
import os
import random
import re
import sysconfig
import threading
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfFileSystem
from huggingface_hub.utils import WeakFileLock
from torch import Tensor



# --- Text ------------------------------------------------------------------------------------

DATASETS = {  # short name -> Hub dataset; beside them "stdlib", the running Python's own library
    "c4": "allenai/c4",
    "pile": "monology/pile-uncopyrighted",
    "pythia": "EleutherAI/pile-standard-pythia-preshuffled",
    "pythia-deduped": "EleutherAI/pile-deduped-pythia-preshuffled",
}
HUB_FOLDERS = {"allenai/c4": "/en", "monology/pile-uncopyrighted": "/train"}  # listing all is slow
TEXT_FILE = re.compile(r"\.(jsonl|json|txt|md|py)(\.gz|\.zst)?$")
HUB_TEXT = re.compile(r"(?<!info)(?<!infos)\.(jsonl?|txt)(\.gz|\.zst)?$")  # not README.md and such
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def held_out(text: str) -> bool:
    """Whether a document is for validation (1 in 20): the same text is always on the same side."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % 20 == 0


def documents(data: str) -> Iterator[str]:
    """The documents of a text source, always in the same order.

    `data`: "stdlib", a short name of DATASETS, owner/name on the Hub, or a file or folder of .txt,
    .md, .py, .jsonl or .json (one {"text": ...} a line), each also .gz or .zst.
    Raises UserError where it cannot be read.
    """
    data = DATASETS.get(data, data)
    for path in local_files(data) or [path for path, _ in hub_files(data, HUB_TEXT)]:
        hub = hub_errors(f"datasets/{data}", path) if path.startswith("hf:") else nullcontext()
        try:
            with hub, _open_text(path) as file:
                yield from filter(str.strip, _cut(file, path))
        except UserError:
            raise
        except Exception as error:  # the disk's, or a damaged file's: each decompressor has its own
            advice = "pip install zstandard" if isinstance(error, ImportError) else "is it damaged?"
            raise UserError(f"cannot read {path} ({error}): {advice}") from error


def local_files(data: str) -> list[str]:
    """Files of a local source, mixed by a fixed seed; none when `data` can only be on the Hub."""
    root = Path(sysconfig.get_path("stdlib") if data == "stdlib" else data).expanduser().absolute()
    skip, ending = (NOT_LIBRARY, ".py") if data == "stdlib" else (set(), "")
    found = [str(root)] if root.is_file() and TEXT_FILE.search(data) else []
    for folder, below, names in os.walk(root):
        below[:] = sorted(set(below) - skip)
        paths = [os.path.join(folder, name) for name in sorted(names) if name.endswith(ending)]
        found += [path for path in paths if TEXT_FILE.search(path) and os.path.isfile(path)]
    if not found and (
        root.exists() or TEXT_FILE.search(data) or not re.fullmatch(r"[\w-]+/[\w.-]+", data)
    ):
        forms = "files of .txt, .jsonl, .py (.gz), a .bin, owner/name on the Hub, stdlib"
        raise UserError(f"no text in {data!r}: give {forms}, {', '.join(DATASETS)}")
    random.Random(0).shuffle(found)
    return found


def hub_files(repo: str, wanted: re.Pattern) -> list[tuple[str, int]]:
    """(path, bytes) of a Hub dataset's files, in order: those for training where names tell."""
    with hub_errors(f"datasets/{repo}"):
        listing = HfFileSystem().find(f"datasets/{repo}{HUB_FOLDERS.get(repo, '')}", detail=True)
    found = sorted((f"hf://{n}", info["size"]) for n, info in listing.items() if wanted.search(n))
    if not found:
        raise UserError(f"{repo} has no file that is read: .jsonl, .json or .txt (.gz, .zst)")
    return [file for file in found if "train" in file[0].split(repo, 1)[1]] or found


def _open_text(path: str) -> io.TextIOBase:
    if path.startswith("hf:"):  # by ranges of 4 MiB, so that a cut never passes for the end
        file = io.BufferedReader(HfFileSystem().open(path, "rb", cache_type="none"), 1 << 22)
    else:
        file = open(path, "rb")
    if path.endswith(".gz"):
        file = gzip.open(file)
    if path.endswith(".zst"):
        try:
            from compression.zstd import ZstdFile  # Python 3.14
        except ImportError:
            from zstandard import ZstdDecompressor

            file = ZstdDecompressor().stream_reader(file, read_across_frames=True)
        else:
            file = ZstdFile(file)
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="\n")


def _cut(file: io.TextIOBase, path: str) -> Iterator[str]:
    """Documents of a file. One .txt: at `<|endoftext|>`, or else blank lines after 8,192 chars."""
    form, lines, size, marked = TEXT_FILE.search(path)[1], [], 0, False
    for number, line in enumerate(file, 1):
        if form.startswith("json"):
            yield _json_text(number, line, path) if line.strip() else ""
            continue
        mark, size = form == "txt" and line.strip() == "<|endoftext|>", size + len(line)
        lines += [] if mark else [line]
        marked |= mark
        long = form == "txt" and size >= 8192 and (line.isspace() or size >= 1 << 16)
        if mark or long and not marked:
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines)


def _json_text(number: int, line: str, path: str) -> str:
    try:
        return json.loads(line)["text"] + ""
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f'{path}, line {number}: no JSON object with a string as "text"') from None


# --- Token ids -------------------------------------------------------------------------------

PYTHIA_IDS = (DATASETS["pythia"], DATASETS["pythia-deduped"])  # uint16, sequences of 2,049 ids
SIDES = {"train": ("training", "--tokens"), "val": ("validation", "--eval-tokens")}
BLOCK = 1 << 18  # characters tokenised at a time


class TokenStream:
    """Token ids of one source: tokenised ahead of training by a thread, kept on disk, used again.

    `data` is a text source (see `documents`) or token ids: Pythia's own training data, or a local
    .bin (flat, little-endian uint16, uint32 above 65,536 ids). Documents, each followed by the
    end-of-text id, lie end to end and are cut into sequences of `context` ids, of which the first
    is the tokenizer's bos where it has one. What the cache holds does not depend on the budgets.
    With `allow_short` n_train is what the source has, where that is less. Raises UserError for an
    unknown source at once, for a failing or short one when what it lacks is asked for.
    """

    def __init__(
        self, data, tokenizer, context, train_tokens, eval_tokens, cache=None, allow_short=False
    ):
        self.data, self.tokenizer, self.context = DATASETS.get(data, data), tokenizer, context
        self.stride = context - (tokenizer.bos_id is not None)  # ids of the stream in a sequence
        self.asked = {"train": train_tokens, "val": eval_tokens}
        self.need = {side: asked // context * self.stride for side, asked in self.asked.items()}
        self.dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
        self.changed = threading.Condition()  # notified when tokens were added or the thread ends
        self.running, self.stopped, self.error = False, False, None
        if self.data.endswith(".bin"):
            self._open_ids(Path(data).expanduser())
        else:
            self._open_cache(cache)
        if allow_short:
            self._use_what_there_is()
        self.n_train = self.need["train"] // self.stride

    def train(self, start: int, count: int) -> Tensor:
        """Sequences start..start+count, int64 [count, context]; waits for them or a UserError."""
        return self._read("train", start, count)

    def validation(self) -> Tensor:
        """All validation sequences, int64 [n, context], of documents never trained on; waits."""
        return self._read("val", 0, self.need["val"] // self.stride)

    def close(self) -> None:
        """Stop the thread; what it has written is there for the next run."""
        self.stopped = True
        if self.running:
            self.thread.join(timeout=5)

    def _read(self, side: str, start: int, count: int) -> Tensor:
        stop = (start + count) * self.stride
        with self.changed:
            self.changed.wait_for(lambda: self.tokens[side] >= stop or not self.running)
        if self.tokens[side] < (self.need[side] if self.ended[side] else stop):
            raise self.error or self._too_short(side)
        path, first = self.files[side]
        offset = (first + start * self.stride) * self.dtype.itemsize
        ids = np.fromfile(path, self.dtype, count * self.stride, offset=offset).astype(np.int64)
        if ids.max(initial=0) >= self.tokenizer.n_vocab:
            has = f"the tokenizer has {self.tokenizer.n_vocab:,} ids"
            raise UserError(f"{path} holds id {ids.max():,}, {has}: tokenise it for this model")
        ids, bos = torch.from_numpy(ids).view(count, self.stride), (self.context - self.stride, 0)
        return torch.nn.functional.pad(ids, bos, value=self.tokenizer.bos_id)

    def _done(self, side: str) -> bool:
        return self.ended[side] or self.tokens[side] >= self.need[side]

    def _too_short(self, side: str) -> UserError:
        kind, flag = SIDES[side]
        has = f"{self.data} has {self.tokens[side]:,} {kind} tokens"
        advice = f"lower {flag}, or pass --allow-short to train on what there is"
        if self.tokens[side] < self.stride:
            advice = "give more text"
        return UserError(f"{has}, {self.asked[side]:,} were asked for: {advice}")

    def _use_what_there_is(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not self.running)
        for side, need in self.need.items():
            self.need[side] = min(need, self.tokens[side] // self.stride * self.stride)
            if not self.ended[side] and self.error or need and not self.need[side]:
                raise self.error or self._too_short(side)

    def _open_ids(self, path: Path) -> None:
        """A .bin as it lies there: validation at its end, from after an end-of-text id on."""
        try:
            ids = np.memmap(path, self.dtype, "r")
        except (OSError, ValueError) as error:
            name = f"{path} as {self.dtype.name} token ids"
            raise UserError(f"cannot read {name}: {error}") from error
        spare = max(len(ids) - self.need["train"], len(ids) // 20)
        start = len(ids) - min(self.need["val"], spare)
        near = max(start - (1 << 20), 0)
        ends = np.flatnonzero(ids[near:start] == self.tokenizer.eos_id)
        start = near + int(ends[-1]) + 1 if len(ends) else start
        self.files = {"train": (path, 0), "val": (path, start)}
        self.tokens = {"train": start, "val": len(ids) - start}
        self.ended = {"train": True, "val": True}

    def _open_cache(self, root: Path | None) -> None:
        """A folder for this source: train.bin, val.bin, and meta.json, which says what is there."""
        if self.data in PYTHIA_IDS and not 50254 <= self.tokenizer.n_vocab <= 50304:
            raise UserError(f"{self.data} holds Pythia's own ids: take another --data, such as c4")
        files = [(p, os.path.getsize(p), os.path.getmtime(p)) for p in local_files(self.data)]
        key = json.dumps([files or self.data, self.tokenizer.fingerprint, self.dtype.str]).encode()
        name = re.sub(r"[^\w.-]", "-", self.data)[-40:] + "-" + hashlib.sha256(key).hexdigest()[:16]
        root = root or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "saeft")
        self.folder = Path(root, name)
        self.files = {side: (self.folder / f"{side}.bin", 0) for side in self.need}
        self._load_meta()
        self.running = not all(map(self._done, self.need))
        if self.running:
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()

    def _load_meta(self) -> None:
        """Per side: tokens on disk, documents passed, and whether the source ended there."""
        try:
            meta = json.loads((self.folder / "meta.json").read_text())
            for side, (path, _) in self.files.items():
                if not 0 <= meta["tokens"][side] * self.dtype.itemsize <= path.stat().st_size:
                    raise ValueError("the files are shorter")
                meta["passed"][side], meta["ended"][side]
        except (OSError, ValueError, KeyError, TypeError):  # damaged, or not there yet: start over
            meta = {key: dict.fromkeys(self.need, 0) for key in ("tokens", "passed", "ended")}
        self.tokens, self.passed, self.ended = meta["tokens"], meta["passed"], meta["ended"]

    def _run(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(self.folder / "lock"):  # one process writes, the others wait here
                self._load_meta()
                for side, (path, _) in self.files.items():  # drop what an interruption left
                    with open(path, "ab") as file:
                        file.truncate(self.tokens[side] * self.dtype.itemsize)
                self._fetch_ids() if self.data in PYTHIA_IDS else self._tokenise()
        except OSError as error:
            self.error = UserError(f"cannot write {self.folder} ({error}): set XDG_CACHE_HOME")
        except Exception as error:  # for whoever asks for the ids that did not come
            self.error = error
        with self.changed:
            self.running = False
            self.changed.notify_all()

    def _tokenise(self) -> None:
        """A side that is full lets documents pass; they are read again when more is asked for."""
        block, size, number = {"train": [], "val": []}, 0, 0
        for number, text in enumerate(documents(self.data), 1):
            if self.stopped or all(map(self._done, self.need)):
                return
            side = "val" if held_out(text) else "train"
            if number > self.passed[side] and not self._done(side):
                block[side].append(text)
                size += len(text)
            if size >= BLOCK:
                self._encode(block, number, ended=False)
                block, size = {"train": [], "val": []}, 0
        self._encode(block, number, ended=True)

    def _encode(self, block: dict[str, list[str]], number: int, ended: bool) -> None:
        eos = np.array([self.tokenizer.eos_id], self.dtype)
        for side in [side for side in block if not self._done(side)]:
            ids = [eos[:0]]
            for document in self.tokenizer.encode_batch(
                block[side], (os.cpu_count() or 1) // 2 or 1
            ):
                ids += [np.asarray(document, self.dtype), eos]
            self._append(side, np.concatenate(ids), max(number, self.passed[side]), ended)

    def _fetch_ids(self) -> None:
        """Pythia's files laid end to end: training from their start, validation in the last one."""
        *first, last = hub_files(self.data, re.compile(r"\.bin$"))
        align = -sum(size for _, size in first) % 4098  # bytes to the next of its sequences
        for side, parts, skip in (("val", [last], align), ("train", first, 0)):
            total = (sum(size for _, size in parts) - skip) // 2
            while not (self._done(side) or self.stopped):
                at = skip + self.tokens[side] * 2
                wanted = min(self.need[side], total) * 2 + skip - at
                for path, size in parts:
                    if at < size:
                        break
                    at -= size
                with hub_errors(f"datasets/{self.data}", path):
                    with HfFileSystem().open(path, "rb", cache_type="none") as file:
                        file.seek(at)
                        ids = np.frombuffer(file.read(min(wanted, 1 << 23)), self.dtype)
                self._append(side, ids, 0, ended=self.tokens[side] + len(ids) == total)

    def _append(self, side: str, ids: np.ndarray, passed: int, ended: bool) -> None:
        """Ids first, then meta.json in one step: an interruption in between leaves no trace."""
        with open(self.files[side][0], "ab") as file:
            file.write(ids.tobytes())
        with self.changed:
            self.tokens[side] += len(ids)
            self.passed[side], self.ended[side] = passed, ended
            meta = {"tokens": self.tokens, "passed": self.passed, "ended": self.ended}
            (self.folder / "meta.tmp").write_text(json.dumps(meta))
            os.replace(self.folder / "meta.tmp", self.folder / "meta.json")
            self.changed.notify_all()
