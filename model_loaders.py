"""What touches disk or network: the Hub, safetensors, tokenizers, token streams."""

import gzip, hashlib, io, json, math, os, random, re
import sysconfig, tempfile, threading, unicodedata, zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path

import huggingface_hub as hf
import numpy as np
import tiktoken
import torch
from huggingface_hub import errors as hub
from huggingface_hub.utils import logging as hub_logging

# ---- Models on the Hub or in a folder ---------------------------------------------------------
SIZES = "14m 31m 70m 160m 410m 1b 1.4b 2.8b 6.9b 12b".split()
MODELS = {f"pythia-{n}{d}": f"EleutherAI/pythia-{n}{d}" for n in SIZES for d in ("", "-deduped")}
MODELS |= {"gemma-2-2b": "google/gemma-2-2b", "gemma-2-9b": "google/gemma-2-9b"}
MODELS["tiny"] = str(Path(__file__).parent / "assets" / "tiny")  # a folder, not a repo
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}
UNKNOWN = "no folder and no Hub repository {0!r}: try pythia-160m or tiny (private: set HF_TOKEN)"
REFUSED = "no access to {0} ({2}): accept its licence at https://huggingface.co/{0}, set HF_TOKEN"
ABSENT = "{0} has no {1}: check the name (models are read from safetensors files only)"
FAILED = "cannot fetch {0} (error: {2}): try again, or a folder, --model tiny, --data stdlib"
MESSAGES = {hub.RepositoryNotFoundError: UNKNOWN, hub.HFValidationError: UNKNOWN}
MESSAGES |= {hub.GatedRepoError: REFUSED, 401: REFUSED, 403: REFUSED}
MESSAGES |= {hub.EntryNotFoundError: ABSENT, FileNotFoundError: ABSENT}
hub_logging.set_verbosity_error()  # warnings of its retries would bury our one line


class UserError(Exception):
    """What the user asked for cannot be done: one line that names the value and says what to do."""


@contextmanager
def hub_errors(repo: str, filename: str = "such file"):
    """Turn the Hub client's exceptions into UserError; `repo`: owner/name, datasets/owner/name."""
    try:
        yield  # the bases: those of its HTTP library, requests or httpx
    except (OSError, RuntimeError, hub.HFValidationError, *hub.HfHubHTTPError.__bases__) as error:
        if isinstance(error, FileNotFoundError):
            error = error.__cause__ or error  # "not in the cache either": the cause says why
        status = getattr(getattr(error, "response", None), "status_code", None)
        kinds = (*type(error).__mro__, status)  # the narrowest class decides, then the status
        message = next((MESSAGES[kind] for kind in kinds if kind in MESSAGES), FAILED)
        raise UserError(message.format(repo, filename, status or repr(error)[-300:])) from error


@contextmanager
def file_errors(what: str):
    """Turn whatever goes wrong with a file or its content into UserError: `what`, and why."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the disk's or the content's: each decompressor has its own
        advice = ": pip install zstandard" if isinstance(error, ImportError) else ""
        raise UserError(f"{what} ({error!r:.300}){advice}") from error


def fetch(name: str, filename: str) -> Path:
    """One file of a model: a short name of MODELS, a folder like a Hub snapshot, or owner/name."""
    with hub_errors(source := MODELS.get(name, name), filename):
        if os.path.isdir(folder := os.path.expanduser(source)):
            return Path(folder, filename).resolve(strict=True)
        if "/" not in source:
            raise hub.HFValidationError  # a bare name, none of ours
        if not isinstance(hf.try_to_load_from_cache(source, filename), str):
            hf.get_hf_file_metadata(hf.hf_hub_url(source, filename))  # with no network, fails at
        return Path(hf.hf_hub_download(source, filename))  # once, while this tries for minutes


def load_config(name: str) -> dict:
    """The model's config.json. Raises UserError, also when it is not a JSON object."""
    return read_json(fetch(name, "config.json"))


def load_weights(name: str, device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors by name, of the shards an index lists or of model.safetensors. Raises UserError."""
    try:
        index = fetch(name, "model.safetensors.index.json")
    except UserError:  # none, or out of reach: then the next line says why
        return read_safetensors(fetch(name, "model.safetensors"), device, dtype)
    weights, where = {}, read_json(index).get("weight_map")
    files = set(map(str, where.values())) if isinstance(where, dict) else {""}
    if not all(Path(file).name == file and file.endswith(".safetensors") for file in files):
        raise UserError(f"{index}: weight_map must name plain *.safetensors files")
    for path in [fetch(name, file) for file in sorted(files)]:
        weights |= read_safetensors(path, device, dtype)
    if absent := where.keys() - weights.keys():
        raise UserError(f"{index} lists {min(absent)!r:.100}, which none of its files has")
    return weights


def read_json(path: Path, text: bytes | None = None) -> dict:
    """The JSON object in a file, or in `text` from it. Raises UserError."""
    with file_errors(f"cannot read {path}"):
        return {**json.loads((text or path.read_bytes()).decode())}


def read_safetensors(path: Path, device, dtype: torch.dtype | None = None) -> dict:
    """Tensors by name, floating ones in `dtype` if given. UserError if damaged or hostile."""
    with file_errors(f"cannot read {path}"), open(path, "rb") as file:
        length, tensors, end = int.from_bytes(file.read(8), "little"), {}, 0
        size = os.fstat(file.fileno()).st_size - 8 - length  # of the data
        if size < 0 or not 0 < length <= 100_000_000:
            raise ValueError(f"a header of {length:,} bytes does not fit the file, or 100 MB")
        header = read_json(path, file.read(length))
        if not all(type(text) is str for text in {**header.pop("__metadata__", {})}.values()):
            raise ValueError("__metadata__ must map strings to strings")
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            shape, span, stored = entry["shape"], entry["data_offsets"], DTYPES[entry["dtype"]]
            natural = all(type(n) is int and n >= 0 for n in (*shape, *span)) and span[1] <= size
            if not natural or span != [end, end := end + math.prod(shape) * stored.itemsize]:
                raise ValueError(f"tensor {name!r:.60} cannot be {entry!r:.200}")
            kept = dtype if dtype and stored.is_floating_point else stored
            tensors[name] = torch.empty(shape, dtype=kept, device=device)
            chunk = torch.empty(2**22, dtype=stored)  # all that is in memory beside the result
            for part in tensors[name].view(-1).split(len(chunk)):
                data = chunk[: len(part)]
                file.readinto(data.view(torch.uint8).numpy())
                part.copy_(data)
        if end != size:
            raise ValueError(f"{size - end:,} bytes at its end belong to no tensor")
    return tensors


def write_safetensors(path: Path, tensors: dict, metadata: dict, cfg: dict | None = None):
    """Write `tensors`, with `cfg` to cfg.json beside them: all or nothing. Raises UserError."""
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))  # all aligned
    header, end, codes = {"__metadata__": metadata}, 0, {v: k for k, v in DTYPES.items()}
    for name, t in tensors.items():
        offsets = [end, end := end + t.nbytes]
        header[name] = {"dtype": codes[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file_errors(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as new:
            with open(Path(new, path.name), "wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for t in tensors.values():
                    file.write(t.detach().cpu().reshape(-1).view(torch.uint8).numpy())
            if cfg is not None:
                Path(new, "cfg.json").write_text(json.dumps(cfg, indent=2), "utf-8")
            for name in os.listdir(new):
                os.replace(Path(new, name), path.parent / name)


# ---- Tokenizers, on tiktoken ------------------------------------------------------------------
# The two kinds that are read: every text and option that is on, but for those that change no id.
NEUTRAL = 'unk_token|fuse_unk|trim_offsets|behavior|use_regex": true|type": "(?:Seq|Fuse)'
SETTING = rf'"(?!{NEUTRAL})(\w+": (?!null|""|(?<!use_regex": )false)[^][{{}},]+)'
BYTE_LEVEL = '"BPE"( "NFC")?( "ByteLevel"){2}( add_prefix_space)?'
GEMMA = '"BPE" byte_fallback "Replace" " " "▁"( "Split" " ")? "Replace" "▁" " " "ByteFallback"'

# GPT-2 writes a byte as a character: the same where printable, else the next one from U+0100 on.
_OTHERS = [b for b in range(256) if b == 0x20 or not chr(b).isprintable()]
GPT2_BYTES = {chr(256 + _OTHERS.index(b) if b in _OTHERS else b): bytes([b]) for b in range(256)}
SPM_BYTES = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}  # SentencePiece's names of bytes
UTF8_BYTES = {bytes([b]) for b in (*range(0xC0), *range(0xC2, 0xF5))}  # the others never occur

# GPT-2's split ends in \s+(?!\S)|\s+; blocks of 500 change no match, but without them a long run
# would overflow the regex engine's stack. In NeoX's, runs of spaces are cut out first, as tokens.
NEOX_RUNS = {" " * n for n in range(2, 25)}
WORDS = r"'(?:[stmd]|ll|re|ve)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
GPT2_SPLIT = WORDS + r"|(?:\s{500})*\s+(?!\S)|\s"
NEOX_SPLIT = r" {2,24}|" + WORDS + r"|(?:(?>(?: ?[^\S ]){500}))*(?: (?! )|[^\S ])+(?!\S)|\s"

# The reference's NFC is Unicode 9's: it leaves the characters listed (of 10 to 17) as they are.
OLDER_TEXT = (
    "[^\u07fd\u0897-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1af0\u1df6-\u1dfa\ua82c"
    "\U000105c9-\U000105e4\U00010d24-\U00010f85\U00011070\U0001133b\U00011382-\U000113d0\U0001145e"
    "\U00011839-\U00011a99\U00011d42-\U0001612f\U00016d63-\U00016ff1\U0001e08f-\U0001e6f5]+"
)
_nfc = partial(re.sub, OLDER_TEXT, lambda older: unicodedata.normalize("NFC", older[0]))
_spaces = partial(re.sub, "▁", " ")


def _token_bytes(token: str, gemma: bool) -> bytes:
    if gemma:
        return SPM_BYTES.get(token) or _spaces(token).encode()
    known = set(token) <= GPT2_BYTES.keys()  # else it is an added token
    return b"".join(map(GPT2_BYTES.get, token)) if known else token.encode()


def _is_gemma(spec: dict) -> bool:
    """Which of the two kinds it is; UserError if anything in the file could mean other ids."""
    flags = [{k: t[k] for k in ("lstrip", "rstrip", "single_word")} for t in spec["added_tokens"]]
    parts = [spec.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
    parts = [spec["model"] | {"vocab": None, "merges": None}, *parts, flags]
    settings = re.findall(SETTING, json.dumps(parts, ensure_ascii=False))
    found = re.sub('(type|String|content)": |": true', "", " ".join(settings)).replace('":', "")
    if not re.fullmatch(f"{BYTE_LEVEL}|{GEMMA}", found):
        raise UserError(f"tokenizer is {found}: only BPE like GPT-NeoX's or Gemma's can be read")
    return "byte_fallback" in found


def _gemma_characters(vocab: dict[str, int]) -> dict[bytes, list[int]]:
    """{bytes: ids} of the characters in the vocabulary, after those of their leading bytes, so that
    tiktoken starts from characters. What is left of any other has the ids of byte fallback."""
    chars = {_spaces(c).encode(): [i] for c, i in vocab.items() if len(c) == 1 and c != " "}
    leading = {c[:n] for c in chars for n in range(2, len(c))}
    return {some: [vocab[f"<0x{b:02X}>"] for b in some] for some in leading} | chars


def _any_of(texts) -> re.Pattern:
    longest_first = sorted(map(re.escape, texts), reverse=True)
    return re.compile("(" + "|".join([*longest_first, r"\ud800(?!)"]) + ")")  # the last: never


class Tokenizer:
    """A parsed `tokenizer.json`; ids are those of the reference library, `tokenizers`.
    Byte-level BPE (GPT-NeoX), or BPE over characters with byte fallback (Gemma: transformers' form
    of a SentencePiece model, ▁ is a space); UserError for any other. n_vocab: largest id + 1.
    eos_id: the token between documents. bos_id: None without a <bos>. fingerprint: of the file."""

    def __init__(self, spec: dict):
        gemma, vocab = _is_gemma(spec), spec["model"]["vocab"]
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        ids = vocab | added
        self.fingerprint = hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:16]
        self.n_vocab, self.bos_id = max(ids.values()) + 1, ids.get("<bos>")
        self.eos_id = ids["<|endoftext|>" if "<|endoftext|>" in ids else "<eos>"]
        self._normalize = _spaces if gemma else _nfc if spec.get("normalizer") else str
        self._bytes = {i: _token_bytes(token, gemma) for token, i in ids.items()}
        # tiktoken merges any neighbours that make a token, the reference only pairs that it lists:
        # the same for merges in the order of training, as every published vocabulary has them.
        pairs = (m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"])
        made = [left + right for left, right in pairs if " " not in left + right]  # unreachable
        runs = NEOX_RUNS if {text for text in added if " " in text} == NEOX_RUNS else set()
        byte_names = SPM_BYTES if gemma else GPT2_BYTES
        entries = {byte: [vocab[name]] for name, byte in byte_names.items() if name in vocab}
        entries |= _gemma_characters(vocab) if gemma else {}
        wrong = [token for token in made if gemma and re.search("[^▁]▁", token)]
        if wrong := wrong + sorted(UTF8_BYTES - entries.keys()):
            raise UserError(f"tokenizer has ▁ inside a token, or lacks a byte: {wrong[0]!r}")
        entries |= {_token_bytes(token, gemma): [vocab[token]] for token in made}
        entries |= {text.encode(): [added[text]] for text in runs}
        split = r" *[^ ]+| +" if gemma else NEOX_SPLIT if runs else GPT2_SPLIT
        ranks = {token: rank for rank, token in enumerate(entries)}
        self._bpe = tiktoken.Encoding("", pat_str=split, mergeable_ranks=ranks, special_tokens={})
        cut = [token for token in spec["added_tokens"] if token["content"] not in runs]
        late = {self._normalize(t["content"]): t["id"] for t in cut if t["normalized"]}
        self._cut = _any_of(t["content"] for t in cut if not t["normalized"])
        self._cut_late, added = _any_of(late), added | late
        self._ids = {text: [i] for text, i in added.items()} | dict(enumerate(entries.values()))

    def encode(self, text: str) -> list[int]:
        """The ids of a text: no <bos>, no end of text, but the added tokens written in it."""
        parts, ranks = [], []  # parts: text, added token, text, .., text
        for i, part in enumerate(self._cut.split(text)):
            parts += [part] if i % 2 else self._cut_late.split(self._normalize(part))
        for i, part in enumerate(parts):  # an added token ranks as itself
            ranks += [part] if i % 2 else self._bpe.encode_ordinary(part)
        return [i for rank in ranks for i in self._ids[rank]]

    def encode_batch(self, texts: list[str], threads: int) -> list[np.ndarray]:
        """The ids of each text, int32. tiktoken works outside the GIL."""
        return list(map(np.int32, ThreadPoolExecutor(threads).map(self.encode, texts)))

    def decode(self, ids) -> str:
        """The text of ids, added tokens included; numbers that are no token's are left out."""
        return b"".join(self._bytes.get(int(i), b"") for i in ids).decode(errors="replace")


def load_tokenizer(name_or_folder: str) -> Tokenizer:
    """The tokenizer of a model: a short name, a Hub owner/name or a folder. Raises UserError."""
    path = fetch(str(name_or_folder), "tokenizer.json")
    try:
        return Tokenizer(read_json(path))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}): fetch it again") from None


# ---- Documents and token streams --------------------------------------------------------------
DATASETS = {"c4": "allenai/c4", "pile": "monology/pile-uncopyrighted"}  # short name -> Hub dataset
DATASETS["pythia"] = "EleutherAI/pile-standard-pythia-preshuffled"
DATASETS["pythia-deduped"] = "EleutherAI/pile-deduped-pythia-preshuffled"
HUB_FOLDERS = {"allenai/c4": "/en", "monology/pile-uncopyrighted": "/train"}  # listing all is slow
IDS = (".bin", "-pythia-preshuffled")  # a source of token ids, not of text, ends in one of these
TEXT = r"\.(txt|py|jsonl|json(?=\.gz))(\.gz|\.zst)?$"
LIBRARY = r"^(?!.*[/\\](site-packages|dist-packages|tests?|idle_test)[/\\]).*\.py$"


def held_out(text: str) -> bool:
    """Whether a document is for validation (1 in 20): the same text is always on the same side."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % 20 == 0


def documents(data: str):
    """Yields the documents of "stdlib" (the running Python's library), a file or folder of .txt,
    .py, .jsonl (.gz, .zst), or a Hub dataset, always in the same order. Raises UserError."""
    for path, _ in source_files(DATASETS.get(data, data)):
        with opened(path) as file:  # on the Hub by ranges of 4 MiB: a cut never passes for the end
            file = io.BufferedReader(file, 1 << 22)
            if path.endswith(".gz"):
                file = gzip.open(file)
            if path.endswith(".zst"):
                unpacker = import_module("zstandard").ZstdDecompressor()
                file = unpacker.stream_reader(file, read_across_frames=True)
            lines = io.TextIOWrapper(file, "utf-8-sig", errors="replace", newline="\n")
            yield from filter(str.strip, _cut(lines, path))


def source_files(data: str, on_hub: bool = True) -> list[tuple[str, int]]:
    """(path, bytes) of a source's files: local ones mixed by a fixed seed, the Hub's in order."""
    wanted = LIBRARY if data == "stdlib" else r"\.bin$" if data.endswith(IDS) else TEXT
    root = Path(sysconfig.get_path("stdlib") if data == "stdlib" else data).expanduser().absolute()
    if not root.exists() and re.fullmatch(r"[\w-]+/[\w.-]+", data) and not re.search(wanted, data):
        with hub_errors(f"datasets/{data}"):
            folder = f"datasets/{data}{HUB_FOLDERS.get(data, '')}"
            listing = hf.HfFileSystem().find(folder, detail=True) if on_hub else {}
        wanted = wanted.replace("|py", "")  # here a .py is the data set's loader
        found = sorted((f"hf://{n}", f["size"]) for n, f in listing.items() if re.search(wanted, n))
        found = [file for file in found if "train" in file[0].split(data)[1]] or found
    else:
        paths, skip = [str(p) for p in root.rglob("*")] or [str(root)], len(str(root.parent))
        paths = sorted(p for p in paths if re.search(wanted, p[skip:]) and os.path.isfile(p))
        found, on_hub = [(path, os.path.getsize(path)) for path in paths], True
        random.Random(0).shuffle(found)
    if on_hub and not found:
        forms = f".txt, .jsonl, .py, .bin, owner/name on the Hub, stdlib, {', '.join(DATASETS)}"
        raise UserError(f"no text in {data!r}: give one of {forms}")
    return found


@contextmanager
def opened(path: str):
    """The bytes of a file on the disk or the Hub; whatever fails meanwhile is a UserError."""
    on_hub, repo = path.startswith("hf://"), "/".join(path.split("/")[2:5])
    with file_errors(f"cannot read {path}"), hub_errors(repo) if on_hub else nullcontext():
        with (
            hf.HfFileSystem().open(path, cache_type="none") if on_hub else open(path, "rb") as file
        ):
            yield file


def _cut(lines, path: str):
    """Documents: JSON's "text"; a .txt's parts between `<|endoftext|>`, or else at blank lines."""
    form, text = re.search(TEXT, path)[1], ""
    whole = form != "txt"
    for number, line in enumerate(lines, 1):
        end = line.strip() == "<|endoftext|>"
        if "json" in form and line.strip():
            with file_errors(f'{path}, line {number}: no JSON object with a string as "text"'):
                text, line, end = json.loads(line)["text"] + "", "", True
        whole |= end
        text += "" if end else line
        if end or not whole and len(text) >= (8192 if line.isspace() else 1 << 16):
            yield text
            text = ""
    yield text


TRAIN, VAL = False, True  # the two sides, as `held_out` tells them; indices of the lists below
BATCH, BLOCK = 64, 1 << 22  # documents tokenised, and bytes of ids fetched, at a time


class TokenStream:
    """Token ids of one source: tokenised ahead of training by a thread, kept on disk, used again.
    `data`: for `documents`, or ids: Pythia's training data, or a .bin (flat uint16, uint32 above
    65,536 ids). Documents, end-of-text after each, are cut into sequences of `context` ids, the
    first being bos if there is one. UserError for an unknown, short or failing source."""

    def __init__(self, data, tokenizer, context, train, val, cache=None, allow_short=False):
        self.data, self.tokenizer, self.context = DATASETS.get(data, data), tokenizer, context
        self.stride = context - (tokenizer.bos_id is not None)  # ids of the stream in a sequence
        self.asked, self.allow_short = (train, val), allow_short  # tokens
        self.need = [max(asked // context, 1) * self.stride for asked in self.asked]
        self.dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
        files = [(*file, os.path.getmtime(file[0])) for file in source_files(self.data, False)]
        key = json.dumps([files or self.data, tokenizer.fingerprint, self.dtype.str, BATCH])
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "saeft")
        self.folder = Path(cache or root, hashlib.sha256(key.encode()).hexdigest()[:16])
        self.files = [self.folder / "train.bin", self.folder / "val.bin"]
        self.stopped, self.error = False, None
        self._load_meta()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        if allow_short:
            self.thread.join()
            self.train(0, 0)  # raises what went wrong
        self.n_train = self.need[TRAIN] // self.stride

    def close(self):
        """Stop the thread; what it has written is there for the next run."""
        self.stopped = True
        self.thread.join(timeout=5)

    def validation(self) -> torch.Tensor:
        """All validation sequences, int64 [n, context], of documents never trained on; waits."""
        return self.train(0, self.need[VAL] // self.stride, VAL)

    def train(self, start: int, count: int, side: bool = TRAIN) -> torch.Tensor:
        """Sequences start..start+count, int64 [count, context]; waits for them or a UserError."""
        while self.tokens[side] < (start + count) * self.stride and self.thread.is_alive():
            self.thread.join(0.01)
        if self.error:
            raise self.error
        offset = start * self.stride * self.dtype.itemsize
        ids = np.fromfile(self.files[side], self.dtype, count * self.stride, offset=offset)
        if (top := ids.max(initial=0)) >= self.tokenizer.n_vocab:
            has = f"holds id {top:,}, the model's tokenizer has {self.tokenizer.n_vocab:,} ids"
            raise UserError(f"{self.data} {has}: give --data that is tokenised for it, or text")
        ids = torch.from_numpy(ids.astype(np.int64)).view(count, self.stride)
        with_bos = (self.context - self.stride, 0)
        return torch.nn.functional.pad(ids, with_bos, value=self.tokenizer.bos_id)

    def _lacks(self, *sides: bool) -> bool:
        return not self.stopped and any(self.tokens[side] < self.need[side] for side in sides)

    def _load_meta(self):
        """Each side's tokens on disk and batches of documents passed; none if that is damaged."""
        try:
            tokens, passed = json.loads((self.folder / "meta.json").read_text())
            held = [path.stat().st_size // self.dtype.itemsize for path in self.files]
            intact = all(n <= most for n, most in zip(tokens, held, strict=True))
        except (OSError, ValueError, TypeError):
            intact = False
        self.tokens, self.passed = (tokens, passed) if intact else ([0, 0], [0, 0])

    def _run(self):
        """The thread; its error is for whoever asks for the ids that did not come."""
        try:
            if self._lacks(TRAIN, VAL):
                self.folder.mkdir(parents=True, exist_ok=True)
                with hf.utils.WeakFileLock(self.folder / "lock"):  # one process at a time
                    self._load_meta()
                    self._copy_ids() if self.data.endswith(IDS) else self._tokenise()
            self._settle(TRAIN, "training", "--tokens")
            self._settle(VAL, "validation", "--eval-tokens")
        except OSError as error:
            self.error = UserError(f"cannot write {self.folder} ({error}): set XDG_CACHE_HOME")
        except Exception as error:
            self.error = error

    def _settle(self, side: bool, kind: str, flag: str):
        """The source has ended, or the budget: make do with less where that is allowed."""
        have = self.tokens[side] // self.stride * self.stride
        if self.allow_short and have:
            self.need[side] = min(self.need[side], have)
        if self._lacks(side):
            advice = f"lower {flag}, or pass --allow-short to train on what there is"
            short = f"{self.tokens[side]:,} {kind} tokens, {self.asked[side]:,} were asked for"
            raise UserError(f"{self.data} has {short}: {advice if have else 'give more text'}")

    def _tokenise(self):
        """A side that is full lets documents pass; they are read again when it must grow."""
        source, threads, number = documents(self.data), (os.cpu_count() or 1) // 2 or 1, 0
        while self._lacks(TRAIN, VAL) and (batch := list(islice(source, BATCH))):
            number += 1
            for side in (TRAIN, VAL):
                if number > self.passed[side] and self._lacks(side):
                    texts = [text for text in batch if held_out(text) == side]
                    texts = self.tokenizer.encode_batch(texts, threads)
                    ids = [np.append(ids, self.tokenizer.eos_id) for ids in texts] or [[]]
                    self._append(side, np.concatenate(ids), number)

    def _copy_ids(self):
        """Training: the first file. Validation: the last; of one file, the documents at its end."""
        files, width = source_files(self.data), self.dtype.itemsize
        (first, size), (last, end), start = files[0], files[-1], 0
        if len(files) == 1:  # cut at 19/20, or rather at the document that goes on there
            start = end // 20 * 19 // width * width
            skip = max(start - BLOCK, 0)
            near = np.fromfile(last, self.dtype, (start - skip) // width, offset=skip)[::-1]
            start -= int(np.append(near == self.tokenizer.eos_id, False).argmax()) * width
            size = start
        for side, path, at, stop in ((VAL, last, start, end), (TRAIN, first, 0, size)):
            at += self.tokens[side] * width
            while at < stop and self._lacks(side):
                upto = min(stop, at + BLOCK, at + (self.need[side] - self.tokens[side]) * width)
                with opened(path) as file:
                    file.seek(at)
                    ids = np.frombuffer(file.read(upto - at), self.dtype)
                self._append(side, ids, 0)
                at = upto

    def _append(self, side: bool, ids: np.ndarray, passed: int):
        """Ids first, then meta.json in one step: an interruption in between leaves no trace."""
        with open(self.files[side], "ab") as file:
            file.truncate(self.tokens[side] * self.dtype.itemsize)
            file.write(ids.astype(self.dtype).tobytes())
        self.tokens[side] += len(ids)
        self.passed[side] = passed
        (self.folder / "meta.tmp").write_text(json.dumps([self.tokens, self.passed]))
        os.replace(self.folder / "meta.tmp", self.folder / "meta.json")
