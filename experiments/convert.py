"""Turns a published SAE into the layout that saeft.py and SAELens read, exactly, in float32.

    python experiments/convert.py SOURCE FOLDER [--model NAME] [--layer L] [--context T] [--kind K]
    python saeft.py --start FOLDER

SOURCE is a folder, a file, or owner/name[@revision]:path on the Hub, in one of these formats:

    SAELens, any version     sae_weights.safetensors, cfg.json
    dictionary_learning      ae.pt, config.json; checkpoints/ae_500.pt, ../config.json
    Gemma Scope              params.npz
    Gemma Scope 2            params.safetensors, config.json
    sparsify                 sae.safetensors, cfg.json

The flags say what the source does not: the paper's own fine-tunes come without a config.json, and
TopK and BatchTopK have the same tensors (--kind). A layer or model that only the path tells, by the
publishers' layout, is noted. All these SAEs are x_hat = f W_dec + b_dec, with f an
activation (TopK, BatchTopK, ReLU, JumpReLU) of z = (x - b_dec) W_enc + b_enc. What some compute
besides is folded into the weights; what cannot be (gated, groupmax, transcoders, ...) is refused.
"""

import os
import pickle
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import model_loaders
import saeft
from model_loaders import MODELS, Parser, UserError, expanded, merged, refuse, say


# ---- The files ---------------------------------------------------------------------------------
class Source:
    """An SAE's files: in a folder below `root`, which is "/", or owner/name on the Hub."""

    def __init__(self, source: str):
        path = expanded(source).absolute()
        if path.is_dir():
            below = [file for file in path.rglob("*") if file.name in FORMATS]
            found = [file for file in below if file.parent == path] or below
            refuse(len(found) != 1, f"{len(found)} of {', '.join(FORMATS)} in it: name one")
            path = found[0]
        hub = re.fullmatch(r"([\w.-]+/[\w.-]+(?:@[^:]+)?)(?::(.*))?", source)
        refuse(not path.exists() and not hub, "no such file (on the Hub: owner/name:path)")
        self.root, inside = ("/", str(path)[1:]) if path.exists() else (hub[1], hub[2] or "")
        is_file = path.is_file() or re.search(r"\.(pt|npz|safetensors)$", inside)
        names = [os.path.basename(inside)] if is_file else []
        self.folder = os.path.dirname(inside) if is_file else inside.strip("/")
        self.words = Path(self.root, self.folder).parts  # tell model and layer
        self.kind = None  # what --kind says
        found = [path for path in map(self.find, names or FORMATS) if path]
        refuse(len(found) != 1, f"{len(found)} of {', '.join(names or FORMATS)} there: name one")
        (self.weights,) = found

    def find(self, name: str) -> Path | None:
        """A file of the folder; None where there is no such file."""
        path = os.path.normpath(os.path.join(self.folder, name))
        if path.startswith(".."):  # above a repository
            return None
        return model_loaders.find(self.root, path)

    def json(self, name: str, needed: bool = False) -> dict:
        path = self.find(name)
        refuse(needed and not path, f"{name} is missing")
        return model_loaders.read_json(path) if path else {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, in float32. No pickle is opened that holds anything else."""
    with model_loaders.open_file(path) as file:
        if path.suffix == ".safetensors":
            stored = model_loaders.read_safetensors(path)
        elif path.suffix == ".npz":
            stored = dict(np.load(file, allow_pickle=False))
        else:
            try:
                stored = torch.load(file, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                raise UserError(f"{path}: a pickle of more than tensors, not opened") from None
        names = {name: re.sub(r"^(_orig_mod\.|module\.)+", "", name) for name in stored}
        refuse(len({*names.values()}) < len(names), f"{path} has a tensor twice: {[*names]}")
        tensors = {names[name]: torch.as_tensor(stored[name]) for name in stored}
        for name, tensor in tensors.items():
            numbers = tensor.is_floating_point() or tensor.dim() < 2
            refuse(not numbers, f"{path}: {name} is of {tensor.dtype}: {model_loaders.UNQUANTISED}")
        return {name: tensor.float() for name, tensor in tensors.items()}


# ---- What each format means, in the words of SAELens's cfg.json --------------------------------
ARCHITECTURES = ["standard", "topk", "batchtopk", "jumprelu"]
UNPROCESSED = {"model_from_pretrained_kwargs": {"center_writing_weights": False}}


def the_one(what: str, *values):
    """What the values say that say something; None where none does, UserError for two."""
    said = [value for value in values if value not in (None, "")]
    refuse(any(value != said[0] for value in said), f"its {what} is {said!r:.80}")
    return said[0] if said else None


def saelens(tensors: dict, source: Source) -> dict:
    """Flat before version 6, and with the name of an activation function."""
    cfg = merged(source.json("cfg.json", needed=True))
    cfg["hook_name"] = cfg.get("hook_name") or cfg.get("hook_point")
    cfg["layer"] = cfg.get("hook_layer", cfg.get("hook_point_layer"))
    architecture = str(cfg.get("architecture", "standard")).removeprefix("matryoshka_")
    names = cfg.get("activation_fn_str"), cfg.get("activation_fn")
    function = the_one("activation function", *names) or "relu"
    architecture = architecture if function == "relu" else function
    more = {**(cfg.get("activation_fn_kwargs") or {})}
    k = the_one("K", cfg.get("k"), more.pop("k", None))
    refuse(any(more.values()), f"its activation_fn_kwargs are {more!r:.60}")
    refuse(architecture == "standard" and k, f"its k is {k!r:.60}, but it is no TopK SAE")
    elsewhere = ("reshape_activations", "hook_head_index", "hook_point_head_index", "adapter")
    for key in (*elsewhere, "hook_name_out"):
        same = cfg.get(key) in (None, "none") or cfg[key] == cfg["hook_name"]
        refuse(not same, f"its {key} is {cfg.get(key)!r:.60}")
    centred = (cfg.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights")
    refuse(centred, "center_writing_weights: beside LayerNorm it reads x less its mean")
    if "log_threshold" in tensors:  # of older checkpoints
        refuse("threshold" in tensors, "it has a threshold and a log_threshold")
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if architecture in ARCHITECTURES:
        fold_factors(tensors, cfg, source)
    trained = cfg.get("training_architecture_details") or cfg.get("saeft") or {}
    name = cfg.get("training_architecture") or trained.get("kind") or ""
    if architecture == "jumprelu" and name.endswith("batchtopk") and trained.get("k"):
        if tensors["threshold"].allclose(tensors["threshold"].mean(), atol=0):
            architecture, k = "batchtopk", trained["k"]
    elif "topk" not in architecture:
        cfg["rescale_acts_by_decoder_norm"] = False
    return {**cfg, "architecture": architecture, "k": k}


def fold_factors(tensors: dict, cfg: dict, source: Source) -> None:
    """That of f, before version 6, and that of x, which is folded when training ends."""
    factor, used = tensors.pop("scaling_factor", torch.ones(1)), "finetuning_scaling_factor"
    refuse((factor != 1).any() and not cfg.get(used), f"a scaling_factor, but {used} is not true")
    tensors["W_dec"] *= factor[:, None]
    how = cfg.get("normalize_activations") or "none"
    refuse(how not in ("none", "expected_average_only_in", True), f"its x is by {how!r:.60}")
    factor = 1.0 if how == "none" else factor_of_x(source)
    refuse(not factor, f"its x is by {how!r:.60}, but no file beside it has the factor")
    tensors["W_enc"] *= factor
    tensors["W_dec"] /= factor
    tensors["b_dec"] /= factor
    if "topk_threshold" in tensors:  # of BatchTopK before inference
        rescaled = cfg.get("rescale_acts_by_decoder_norm", False)
        tensors["threshold"] = tensors.pop("topk_threshold") / (factor if rescaled else 1)


def factor_of_x(source: Source) -> float | None:
    """By what SAELens multiplies x in training, as a checkpoint of any version says it."""
    scaler = source.json("activation_scaler.json")
    state = source.find("activations_store_state.safetensors")
    stored = read_tensors(state).get("estimated_norm_scaling_factor") if state else None
    factor = scaler.get("scaling_factor") or (stored if stored is None else stored.item())
    usable = factor is None or (isinstance(factor, (int, float)) and 0 < factor < float("inf"))
    refuse(not usable, f"its factor of x is {factor!r:.60}")
    return factor


CLASSES = {"AutoEncoder": "standard", "AutoEncoderNew": "standard", "AutoEncoderTopK": "topk"}
CLASSES.update(BatchTopKSAE="batchtopk", MatryoshkaBatchTopKSAE="batchtopk")
CLASSES.update(JumpReluAutoEncoder="jumprelu", ReluSAE="standard")


def dictionary_learning(tensors: dict, source: Source) -> dict:
    config = source.json("config.json")
    refuse(config and not config.get("trainer"), "its config.json is none of dictionary_learning")
    if not config and Path(source.folder).name == "checkpoints":
        config = source.json("../config.json")
    trainer, buffer = config.get("trainer") or {}, config.get("buffer") or {}
    name = trainer.get("dict_class") or by_tensors(tensors, source.kind)
    k = [float(k) for k in (trainer.get("k"), tensors.pop("k", None)) if k is not None]
    refuse(any(n % 1 for n in k), f"its k is {k}")
    refuse(len(set(k)) > 1, f"k is {k[:1]} in config.json, {k[1:]} in {source.weights.name}")
    of_other = "bias" if name == "AutoEncoderNew" else "decoder.bias"
    refuse(of_other in tensors, f"it is called {name}, which has no {of_other}")
    unused = {"AutoEncoderTopK": "threshold", "MatryoshkaBatchTopKSAE": "group_sizes"}
    tensors.pop(unused.get(name), None)  # in place of k, if asked for; of the loss
    cfg = {"architecture": CLASSES.get(name, name), "k": int(k[0]) if k else None}
    cfg["apply_b_dec_to_input"] = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    cfg["rescale_acts_by_decoder_norm"] = name == "AutoEncoder"  # by its loader
    io = buffer.get("io", "no output" if buffer else "out")  # of the module
    cfg["hook_name"] = trainer.get("submodule_name") if io == "out" else io
    cfg.update(layer=trainer.get("layer"), context_size=buffer.get("ctx_len"))
    cfg.update(d_in=trainer.get("activation_dim"), d_sae=trainer.get("dict_size"))
    return {**cfg, "model_name": trainer.get("lm_name"), **UNPROCESSED}


def by_tensors(tensors: dict, kind: str | None) -> str:
    """The class that tensors tell where no config.json does; where several have such tensors,
    which is of this library or SAEBench's own, --kind is asked for."""
    clues = {"bias": "AutoEncoder", "gate_bias": "GatedAutoEncoder"}
    clues["group_sizes"] = "MatryoshkaBatchTopKSAE"
    name = next((clues[known] for known in clues if known in tensors), None)
    if not name and "W_enc" in tensors and "k" not in tensors:
        thresholds = tensors.get("threshold", torch.zeros(())).dim()
        name = "JumpReluAutoEncoder" if thresholds else None
    asked = {"topk": "AutoEncoderTopK", "batchtopk": "BatchTopKSAE", "relu": "ReluSAE"}
    if "decoder.bias" in tensors:
        asked = {"relu": "AutoEncoderNew"}
    name = name or asked.get(kind)
    silent = "no config.json beside it names a dict_class"
    refuse(not name, f"{silent}, and its tensors do not tell: --kind {' or '.join(asked)}")
    say(f"note: {silent}: it is taken for {name}")
    return name


def gemma_scope(tensors: dict, source: Source) -> dict:
    """Both; the second has a config.json."""
    config = source.json("config.json")
    refuse(
        config and not config.get("hf_hook_point_in"), "its config.json is none of Gemma Scope 2"
    )
    refuse(config.get("affine_connection"), "it has an affine connection")
    model = (config.get("model_name") or "").split("/")[-1].replace("-v3-", "-3-")
    name = re.search(r"gemma-scope-(2-)?(\d+[bm]-(?:pt|it))(-\w+)?", "/".join(source.words))
    if name:
        refuse(not name[1] and name[3] not in (None, "-res"), f"{name[0]}: not of the residual")
        if not model:
            model = f"gemma-{3 if name[1] else 2}-{name[2]}"
            say(f"note: of {model}, as its path says")
    if "gemma-2" in model or "270m" in model:
        model = model.removesuffix("-pt")  # its name on the Hub
    architecture = config.get("architecture", "jump_relu").replace("_", "")
    into, what = config.get("hf_hook_point_in"), config.get("type", "sae")
    out = config.get("hf_hook_point_out") or into
    if what != "sae" or out != into:
        architecture = f"{what} to {out}"
    cfg = {"architecture": architecture, "apply_b_dec_to_input": False, "prepend_bos": True}
    cfg.update(hook_name=into, usual_context=1024, d_sae=config.get("width"))
    return {**cfg, "model_name": f"google/{model}" if model else None, **UNPROCESSED}


SPARSIFY = ("activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "d_in")
SPARSIFY += ("multi_topk", "lookup_max_order")  # of the loss, and of gram_lookup


def sparsify(tensors: dict, source: Source) -> dict:
    cfg, words, above = source.json("cfg.json", needed=True), [*source.words], "../"
    if re.fullmatch(r"seed\d+", words[-1]):  # of a run with several of them
        above += "../"
        words.pop()
    folder = words[-1]
    run = source.json(f"{above}config.json") if source.folder else {}  # of all layers
    refused = [key for key, value in cfg.items() if value and key not in SPARSIFY]
    refused += ["transcode"] if run.get("transcode") else []
    architecture = refused[0] if refused else cfg.get("activation", "topk")
    hook = folder if re.match(r"([a-z_]\w*\.)*(layers|h|blocks)\.\d+", folder) else None
    if re.fullmatch(r"layer_\d+", folder):  # its first versions counted the embedding
        hook = f"blocks.{folder[6:]}.hook_resid_pre"
    others = run.get("hookpoints") or [hook]
    refuse(hook not in others, f"its folder is {folder}, but its run read {others}")
    if hook:
        say(f"note: it reads {hook}, as its folder is called")
    d_in, d_sae = cfg.get("d_in"), cfg.get("num_latents")
    if d_in and not d_sae and "expansion_factor" in cfg:
        d_sae = d_in * cfg["expansion_factor"]
    cfg = {"architecture": architecture, "k": cfg.get("k"), "hook_name": hook, **UNPROCESSED}
    cfg.update(d_in=d_in, d_sae=d_sae)
    cfg.update(model_name=run.get("model"), context_size=run.get("ctx_len"))
    if run.get("model") and run.get("revision"):
        cfg["model_name"] += f"@{run['revision']}"
    return {**cfg, "dataset_path": run.get("dataset")}


FORMATS = {"sae_weights.safetensors": saelens, "ae.pt": dictionary_learning}
FORMATS.update({"params.npz": gemma_scope, "params.safetensors": gemma_scope})
FORMATS.update({"sae.safetensors": sparsify})
SUFFIXES = {".pt": dictionary_learning, ".npz": gemma_scope}  # of files with other names

# ---- What it is in SAELens's present layout ----------------------------------------------------
NAMES = {"encoder.weight": "W_enc", "w_enc": "W_enc", "encoder.bias": "b_enc"}
NAMES |= {"decoder.weight": "W_dec", "w_dec": "W_dec", "decoder.bias": "b_dec", "bias": "b_dec"}
KEPT = ["model_name", "context_size", "prepend_bos", "dataset_path", "identity", "sink_norm"]
KEPT += ["seen", "model_from_pretrained_kwargs", "exclude_special_tokens", "seqpos_slice"]
# Words of a path for something else than the residual stream.
OTHER = {"mlp", "mlps", "att", "attn", "attention", "mid", "z", "embed", "embedding", "clt"}
OTHER |= {"transcoder", "transcoders", "crosscoder", "crosscoders", "pre", "input", "ln1", "ln2"}


# What an SAE reads, in other words than SAELens's: a block's own name, as in transformers and
# sparsify, for its output; dictionary_learning's.
HOOKS = [
    r"(?:(?:gpt_neox|transformer|language_model|model)\.)*"
    r"(?:layers|h|blocks)\.(?P<block>[0-9]+)(?P<place>\.output)?",
    r"(?:(?P<place>resid_(?:post|out|pre)|(?:mlp|attn|attention)_out)_)?layer_?(?P<block>[0-9]+)",
]
SAME_PLACE = {".output": "resid_post", "resid_out": "resid_post", "attention_out": "attn_out"}


def saelens_hook(name) -> str:
    """A hook in SAELens's words; what is in none of these stays as it is."""
    found = next(filter(None, (re.fullmatch(hook, str(name)) for hook in HOOKS)), None)
    if not found:
        return str(name)
    place = found["place"] or "resid_post"
    return f"blocks.{found['block']}.hook_{SAME_PLACE.get(place, place)}"


def block(cfg: dict, source: Source, layer: int | None) -> int | None:
    """L, where the SAE reads the output of block L. UserError where it reads something else."""
    hook, known = cfg.get("hook_name"), cfg.get("layer")
    refuse(known is not None and not (type(known) is int and known >= 0), f"layer {known!r:.60}")
    if not hook and layer is None:
        hook = hook_of_path(source.words)
    if hook:
        known, place = model_loaders.read_hook(saelens_hook(hook), known)
        refuse(place != "resid_post", f"it reads {hook!r:.80}, not the output of a block")
        if str(known) not in re.findall(r"\d+", hook):
            say(f"note: it reads {hook}, which is the output of block {known}")
    elif known is not None:
        say(f"note: it is taken to read the output of block {known}: no file says what")
    refuse(None not in (layer, known) and layer != known, f"--layer {layer}: it says {known}")
    return known if layer is None else layer


def hook_of_path(words: tuple) -> str | None:
    """What the SAE reads, where no file says it: a folder that is called as a hook is, or as in
    Gemma Scope, layer_12/width_16k, and Gemma Scope 2, resid_post/layer_12_width_16k_l0_medium.
    UserError where another folder's name means another place."""
    hooks, others = [], []
    for above, word, below in zip(("", *words), words, (*words[1:], "")):
        hook, width = re.fullmatch(r"(.*?)(_width_\w+)?", word).groups()
        scope = below.startswith("width_") if not width else above.startswith("resid_post")
        bare = re.fullmatch(r"layer_?\d+", hook)  # says no place, unless it is theirs
        if saelens_hook(hook).startswith("blocks.") and (scope or not bare):
            hooks.append(hook)
        elif {*re.split(r"[\W_]+", word.lower())} & OTHER:
            others.append(word)
    refuse(others, f"its folder is {others}: --layer L if it reads the output of a block")
    refuse(len({*hooks}) > 1, f"its path says {' and '.join(hooks)}: --layer L")
    if hooks:
        say(f"note: it reads {hooks[0]}, as its path says")
    return hooks[0] if hooks else None


def build(stored: dict[str, Tensor], cfg: dict) -> dict[str, Tensor]:
    """The layout's tensors: x is centred, and norms of W_dec weigh nothing."""
    architecture, k, t = cfg["architecture"], cfg["k"], {}
    refuse(architecture not in ARCHITECTURES, f"its architecture is {architecture!r:.60}")
    for name, tensor in stored.items():  # an nn.Linear's weight is [outputs, inputs]
        refuse(NAMES.get(name, name) in t, f"it has {name} twice, as {', '.join(stored)}")
        t[NAMES.get(name, name)] = tensor.mT if name.endswith("coder.weight") else tensor
    names = ["W_enc", "b_enc", "W_dec", "b_dec"]
    names += ["threshold"] if architecture in ("jumprelu", "batchtopk") else []
    refuse(t.keys() != set(names), f"it has {', '.join(stored)} in place of {', '.join(names)}")
    D, F = t["W_enc"].shape
    said = [cfg.get(key) or size for key, size in (("d_in", D), ("d_sae", F))]
    refuse(said != [D, F], f"its W_enc is {[D, F]}, its configuration says {said}")
    for name, shape in {"b_enc": [F], "W_dec": [F, D], "b_dec": [D]}.items():
        found = list(t[name].shape)
        refuse(found != shape, f"its {name} is {found}, its W_enc {[D, F]}")
    if "topk" in architecture:
        number = type(k) is int or (
            type(k) is float and (k % 1 == 0 or architecture == "batchtopk")
        )
        refuse(not number or not 0 < k <= F, f"its K is {k!r:.60}, its latents {F}")
    for key in ("rescale_acts_by_decoder_norm", "apply_b_dec_to_input"):
        refuse(cfg.get(key) not in (None, True, False), f"its {key} is {cfg.get(key)!r:.60}")
    if cfg.get("rescale_acts_by_decoder_norm"):  # norms weigh z, and divide f again
        norms = t["W_dec"].norm(dim=1).clamp_min(1e-8)
        t["W_enc"] = t["W_enc"] * norms
        t["b_enc"] = t["b_enc"] * norms
        t["W_dec"] = t["W_dec"] / norms[:, None]
    if not cfg.get("apply_b_dec_to_input", True):  # the same z from x - b_dec
        t["b_enc"] = (t["b_enc"] + t["b_dec"].double() @ t["W_enc"].double()).float()
    if "threshold" in t:
        t["threshold"] = t["threshold"].expand(F)
    for name, tensor in t.items():
        refuse(not tensor.isfinite().all(), f"its {name} holds NaN or infinity")
    return t


def convert(
    source: str, folder: str, layer: int | None = None, kind: str | None = None, **told
) -> str:
    """Writes the folder, whole or not at all; returns a line about it. Raises UserError.
    told: context_size, where the source does not say it; model_name, also in place of its own."""
    target = expanded(folder).absolute()
    taken = target.exists() and (target.is_file() or any(target.iterdir()))
    refuse(taken, f"{folder} is there already: name a new folder, or an empty one")
    told = {name: value for name, value in told.items() if value is not None}
    least = (layer or 0) >= 0 and told.get("context_size", 2) >= 2
    refuse(not least, "--layer is 0 or more, --context 2 or more")
    files = Source(source)
    files.kind = kind
    name, suffix = files.weights.name, files.weights.suffix
    describe = FORMATS.get(name, SUFFIXES.get(suffix))
    refuse(not describe, f"{name} is none of {', '.join(FORMATS)}")
    with model_loaders.user_errors("it cannot be converted"):
        tensors = read_tensors(files.weights)
        cfg = {"k": None, **describe(tensors, files)}
        context = cfg.get("context_size")
        other = told.get("context_size", context) != context and context is not None
        refuse(other, f"--context {told.get('context_size')}: it says {context}")
        model = cfg.get("model_name")
        given = told.get("model_name", model)
        if model and MODELS.get(given, given) != MODELS.get(model, model):
            say(f"note: --model {given}, where it says {model}")
        if "model_name" in told:  # in place of another revision, too
            gone = ("revision", "checkpoint_index", "checkpoint_value")
            how = cfg.get("model_from_pretrained_kwargs") or {}
            how = {key: value for key, value in how.items() if key not in gone}
            cfg["model_from_pretrained_kwargs"] = how
        cfg.update(told)
        cfg["context_size"] = cfg.get("context_size") or cfg.get("usual_context")
        tensors, L = build(tensors, cfg), block(cfg, files, layer)
    found = {"standard": "relu"}.get(cfg["architecture"], cfg["architecture"])
    refuse(kind not in (None, found), f"--kind {kind}: it is {found}")
    said = {**(cfg.get("saeft") or {}), "k": cfg["k"]}  # the first of an SAE of ours
    numbers = {n: said[n] for n in saeft.KINDS[found].numbers if said.get(n) is not None}
    sae = saeft.KINDS[found](*tensors["W_dec"].T.shape, **numbers)
    sae.load_state_dict({**sae.state_dict(), **tensors, "W_enc": tensors["W_enc"].T})
    metadata = {key: cfg[key] for key in KEPT if cfg.get(key) is not None}
    metadata["hook_name"] = None if L is None else model_loaders.hook_name(L, "resid_post")
    model_loaders.sae_settings({**metadata, "d_sae": len(sae.b_enc), "saeft": {}})  # by --start
    with model_loaders.user_errors(f"cannot write {folder}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=".") as new:
            sae.save(Path(new, "sae"), metadata)
            os.replace(Path(new, "sae"), target)
    hook = metadata["hook_name"] or "an unknown hook (--layer)"
    model = metadata.get("model_name", "an unknown model (--model)")
    return f"{folder}: {cfg['architecture']}, {len(sae.b_enc):,} latents, {hook} of {model}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("source", help="folder, file, or owner/name[@revision]:path on the Hub")
    parser.add_argument("folder", help="what to write; new, or empty")
    parser.add_argument("--layer", type=int, help="block whose output the SAE reads")
    parser.add_argument("--model", dest="model_name", help="the language model")
    kinds = ["topk", "batchtopk", "relu", "jumprelu"]
    parser.add_argument("--kind", choices=kinds, help="what it is, where no file says it")
    parser.add_argument("--context", dest="context_size", type=int, help="tokens in a sequence")
    return saeft.exit_status("convert", lambda: say(convert(**vars(parser.parse_args(argv)))))


if __name__ == "__main__":
    sys.exit(main())
