"""Turns a published SAE into the layout that saeft.py and SAELens read, exactly, in float32.

    python experiments/convert.py SOURCE FOLDER [--model NAME] [--layer L] [--context T]
    python saeft.py --start FOLDER

SOURCE is a folder, a file, or owner/name[@revision]:path on the Hub, in one of these formats:

    SAELens, any version     sae_weights.safetensors, cfg.json
    dictionary_learning      ae.pt, config.json (the paper's own fine-tunes come without one)
    Gemma Scope              params.npz
    Gemma Scope 2            params.safetensors, config.json
    sparsify                 sae.safetensors, cfg.json

The flags say what the source does not. All these SAEs are x_hat = f W_dec + b_dec, with f an
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
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from model_loaders import UserError, fetch, file_errors, open_file, read_json, read_safetensors
from saeft import SAE, Parser, refuse


# ---- The files ---------------------------------------------------------------------------------
class Source:
    """An SAE's files: in a folder below `root`, which is "/", or owner/name on the Hub."""

    def __init__(self, source: str):
        path = Path(source).expanduser().absolute()
        if path.is_dir():
            below = [file for file in path.rglob("*") if file.name in FORMATS]
            found = [file for file in below if file.parent == path] or below
            refuse(
                len(found) != 1, f"{len(found)} files there are of {', '.join(FORMATS)}: name one"
            )
            path = found[0]
        hub = re.fullmatch(r"([\w.-]+/[\w.-]+(?:@[^:]+)?)(?::(.*))?", source)
        refuse(not path.exists() and not hub, "no such file (on the Hub: owner/name:path)")
        self.root, inside = ("/", str(path)[1:]) if path.exists() else (hub[1], hub[2] or "")
        names = [os.path.basename(inside)] if re.search(r"\.(pt|npz|safetensors)$", inside) else []
        self.folder = os.path.dirname(inside) if names else inside.strip("/")
        self.words = "/".join(Path(self.root, self.folder).parts[-6:])  # tell model and layer
        found = filter(None, map(self.find, names or FORMATS))
        self.weights = next(found, None)
        refuse(not self.weights, f"none of {', '.join(names or FORMATS)} there")

    def find(self, name: str) -> Path | None:
        """A file of the folder; None where there is no such file."""
        try:
            return fetch(self.root, os.path.normpath(os.path.join(self.folder, name)))
        except UserError as error:
            if isinstance(error.__cause__, (FileNotFoundError, EntryNotFoundError)):
                return None
            raise

    def json(self, name: str) -> dict:
        path = self.find(name)
        return read_json(path) if path else {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, float32 at least. No pickle is opened that holds anything else."""
    with open_file(path) as file:
        if path.suffix == ".safetensors":
            stored = read_safetensors(path)
        elif path.suffix == ".npz":
            arrays = np.load(file, allow_pickle=False)
            stored = {name: torch.from_numpy(arrays[name]) for name in arrays}
        else:
            try:
                stored = torch.load(file, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                raise UserError(f"{path}: a pickle of more than tensors, not opened") from None
    tensors = {}
    for name, tensor in stored.items():
        tensor = torch.as_tensor(tensor)
        if tensor.is_floating_point():
            tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        tensors[re.sub(r"^(_orig_mod\.|module\.)+", "", name)] = tensor
    return tensors


# ---- What each format means, in the words of SAELens's cfg.json --------------------------------
UNPROCESSED = {"model_from_pretrained_kwargs": {"center_writing_weights": False}}


def saelens(tensors: dict, source: Source) -> dict:
    """Flat before version 6, and with the name of an activation function."""
    cfg = source.json("cfg.json")
    cfg = {"hook_name": cfg.get("hook_point"), **(cfg.get("metadata") or {}), **cfg}
    if cfg.get("activation_fn_str", cfg.get("activation_fn")) == "topk":
        cfg.update(architecture="topk", k=cfg.get("activation_fn_kwargs", {}).get("k"))
    trained = cfg.get("training_architecture_details") or cfg.get("saeft") or {}
    name = cfg.get("training_architecture", trained.get("kind", ""))
    if name.endswith("batchtopk") and cfg.get("architecture") == "jumprelu":
        cfg.update(architecture=name, k=trained.get("k"))
    if "topk" not in cfg.setdefault("architecture", "standard"):
        cfg["rescale_acts_by_decoder_norm"] = False
    if cfg.get("normalize_activations") in (True, "expected_average_only_in"):
        cfg["factor"] = source.json("activation_scaler.json").get("scaling_factor")
        if cfg["factor"] is None:  # folded when training ended
            print("note: normalize_activations without a factor: x is used as it is, as by SAELens")
    return cfg


CLASSES = {"AutoEncoder": "standard", "AutoEncoderNew": "standard", "AutoEncoderTopK": "topk"}
CLASSES.update(BatchTopKSAE="batchtopk", MatryoshkaBatchTopKSAE="batchtopk")
CLASSES.update(JumpReluAutoEncoder="jumprelu")


def dictionary_learning(tensors: dict, source: Source) -> dict:
    config = source.json("config.json")
    trainer, buffer = config.get("trainer") or {}, config.get("buffer") or {}
    name = trainer.get("dict_class") or dictionary_class(tensors, source)
    k = [int(k) for k in (trainer.get("k"), tensors.get("k")) if k is not None]
    refuse(len(set(k)) > 1, f"k is {k[:1]} in config.json, {k[1:]} in {source.weights.name}")
    cfg = {"architecture": CLASSES.get(name, name), "k": k[0] if k else None}
    cfg["apply_b_dec_to_input"] = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    cfg["rescale_acts_by_decoder_norm"] = name == "AutoEncoder"  # by its loader
    cfg.update(hook_name=trainer.get("submodule_name"), layer=trainer.get("layer"))
    cfg.update(model_name=trainer.get("lm_name"), context_size=buffer.get("ctx_len"))
    return {**cfg, "io": buffer.get("io", "out"), **UNPROCESSED}


def dictionary_class(tensors: dict, source: Source) -> str:
    """Where config.json is missing. TopK and BatchTopK differ in nothing but folders' names."""
    clues = {"gate_bias": "GatedAutoEncoder", "group_sizes": "MatryoshkaBatchTopKSAE"}
    clues |= {"bias": "AutoEncoder", "decoder.bias": "AutoEncoderNew"}
    found = [clues[name] for name in clues if name in tensors]
    jump = "threshold" in tensors and tensors["threshold"].ndim == 1
    batch = "batchtopk" in re.sub("[^a-z]", "", source.words.lower())
    found += ["JumpReluAutoEncoder"] * jump + ["BatchTopKSAE"] * batch + ["AutoEncoderTopK"]
    print(f"note: no config.json: taken for dictionary_learning's {found[0]}")
    return found[0]


def gemma_scope(tensors: dict, source: Source) -> dict:
    """Both; the second has a config.json."""
    config = source.json("config.json")
    model = config.get("model_name", "").split("/")[-1].replace("-v3-", "-3-")
    name = re.search(r"gemma-scope-(2-)?(\d+[bm]-(?:pt|it))(?:-(\w+))?", source.words)
    if name:
        refuse(not name[1] and name[3] not in (None, "res"), f"{name[0]}: not of the residual")
        model = model or f"gemma-{3 if name[1] else 2}-{name[2]}"
    if "gemma-2" in model or "270m" in model:
        model = model.removesuffix("-pt")  # its name on the Hub
    cfg = {"architecture": config.get("architecture", "jump_relu").replace("_", "")}
    cfg.update(apply_b_dec_to_input=False, hook_name=config.get("hf_hook_point_in"))
    cfg.update(hook_name_out=config.get("hf_hook_point_out"), prepend_bos=True, context_size=1024)
    return {**cfg, "model_name": f"google/{model}" if model else None, **UNPROCESSED}


def sparsify(tensors: dict, source: Source) -> dict:
    run = source.json("../config.json") if source.folder else {}  # of all layers
    folder = Path(source.folder).name
    hook = folder if re.match(r"([a-z_]\w*\.)*(layers|h|blocks)\.\d+", folder) else None
    cfg = {**source.json("cfg.json"), "architecture": "topk", "hook_name": hook}
    cfg.update(model_name=run.get("model"), context_size=run.get("ctx_len"))
    return {**cfg, "dataset_path": run.get("dataset"), **UNPROCESSED}


FORMATS = {"sae_weights.safetensors": saelens, "ae.pt": dictionary_learning}
FORMATS.update({"params.npz": gemma_scope, "params.safetensors": gemma_scope})
FORMATS.update({"sae.safetensors": sparsify})
SUFFIXES = {".pt": dictionary_learning, ".npz": gemma_scope}  # of files with other names
EXPRESSED = {  # what configs may say; the first is meant where they are silent
    "architecture": ["standard", "topk", "batchtopk", "matryoshka_batchtopk", "jumprelu"],
    "activation_fn_str": ["relu", "topk"],
    "activation_fn": ["relu", "topk"],
    "activation": ["topk"],
    "normalize_activations": ["none", None, False, True, "expected_average_only_in"],
    "reshape_activations": ["none", None],
    "hook_head_index": [None],
    "hook_name_out": [None],
    "transcode": [False],
    "skip_connection": [False],
    "signed": [False],
    "io": ["out"],
}
# The residual stream after or before a block, as TransformerLens, transformers and
# dictionary_learning call it; and what in a folder's name says that an SAE reads something else.
HOOK = r"blocks\.\d+\.hook_resid_(post|pre)|(\w+\.)*layers\.\d+(\.output)?"
HOOK += r"|(resid_(post|out|pre)_)?layer_?\d+"
OTHER = r"(?<![a-z])(mlp|att|attn|attention|resid_mid|(trans|cross)coders?|clt|embed\w*)(?![a-z])"


def block(cfg: dict, source: Source, layer: int | None) -> int | None:
    """L, where the SAE reads the output of block L. UserError where it reads something else."""
    hook, known = cfg.get("hook_name"), cfg.get("layer")
    if hook:
        refuse(not re.fullmatch(HOOK, hook), f"it reads {hook!r:.80}, not the output of a block")
        known = int(re.search(r"\d+", hook)[0]) - ("resid_pre" in hook)
        refuse(known < 0, f"it reads {hook}, the embedding")
    elif layer is None:
        other = re.search(OTHER, source.words)
        refuse(other, f"{other and other[0]!r} in its name: --layer L if it reads a block's output")
        numbers = re.findall(r"(?<![a-z])(?:layers?|blocks)[._]?(\d+)", source.words)
        known = int(numbers[-1]) if numbers and known is None else known
    refuse(None not in (layer, known) and layer != known, f"--layer {layer}: it says {known}")
    return known if layer is None else layer


KEPT = ["sae_lens_version", "model_name", "hook_name", "context_size", "prepend_bos"]
KEPT += ["dataset_path", "neuronpedia_id", "exclude_special_tokens", "seqpos_slice"]
KEPT += ["model_from_pretrained_kwargs"]


# ---- What it is in our form --------------------------------------------------------------------
NAMES = {"encoder.weight": "W_enc", "w_enc": "W_enc", "encoder.bias": "b_enc"}
NAMES |= {"decoder.weight": "W_dec", "w_dec": "W_dec", "decoder.bias": "b_dec", "bias": "b_dec"}
NAMES |= {"topk_threshold": "threshold", "finetuning_scaling_factor": "scaling_factor"}


def build(stored: dict[str, Tensor], cfg: dict) -> SAE:
    """The SAE of these tensors, with what its format does besides folded into them."""
    tensors = {}
    for name, tensor in stored.items():  # an nn.Linear's weight is [outputs, inputs]
        tensors[NAMES.get(name, name)] = tensor.mT if name.endswith("coder.weight") else tensor
    W_enc, b_enc, W_dec, b_dec = (tensors.pop(n) for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    (D, F), shapes = W_enc.shape, [list(tensor.shape) for tensor in (b_enc, W_dec, b_dec)]
    refuse(shapes != [[F], [F, D], [D]], f"its b_enc, W_dec, b_dec are {shapes}, W_enc {[D, F]}")
    kind = {"standard": "relu"}.get(cfg["architecture"], cfg["architecture"].split("_")[-1])
    k, threshold = cfg.get("k"), tensors.pop("threshold", None)
    if "log_threshold" in tensors:  # of older checkpoints
        threshold = tensors.pop("log_threshold").exp()
    factor, used = tensors.pop("scaling_factor", torch.ones(1)), "finetuning_scaling_factor"
    refuse((factor != 1).any() and not cfg.get(used), f"a scaling_factor, but {used} is not true")
    W_dec = W_dec * factor[:, None]  # before version 6: the decoder meets factor f
    factor = cfg.get("factor") or 1.0  # the encoder meets factor x
    W_enc, W_dec, b_dec = W_enc * factor, W_dec / factor, b_dec / factor
    if cfg.get("rescale_acts_by_decoder_norm"):
        norms = W_dec.norm(dim=1).clamp_min(1e-8)  # weigh z, and divide f again
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
        threshold = None if threshold is None else threshold / factor  # of BatchTopK, weighed
    if not cfg.get("apply_b_dec_to_input", True):  # the same z from x - b_dec
        b_enc = b_enc + b_dec.double() @ W_enc.double()
    weights = {"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    if kind in ("jumprelu", "batchtopk"):
        uniform = threshold.unique().numel() == 1 and k is not None
        kind = "batchtopk" if kind == "batchtopk" and uniform else "jumprelu"
        threshold = threshold.expand(F)
        weights["threshold"] = threshold if kind == "jumprelu" else threshold[0]
    unused = set(tensors) - {"k", "group_sizes"}
    refuse(unused, f"its {', '.join(unused)} have no place in f W_dec + b_dec")
    if kind in ("topk", "batchtopk"):
        fits = type(k) in (int, float) and 0 < k <= F and (kind != "topk" or k == int(k))
        refuse(not fits, f"its K is {k!r:.60}, its latents {F}")
    sae = SAE(D, F, k or 0, kind)
    sae.load_state_dict(weights, strict=False)
    for name, tensor in weights.items():
        sound = tensor.is_floating_point() and getattr(sae, name).isfinite().all()
        refuse(not sound, f"{name}, {tensor.dtype}, is not of finite numbers")
    return sae.eval()


def convert(source: str, folder: str, layer: int | None = None, **told) -> str:
    """Writes the folder, whole or not at all; returns a line about it. Raises UserError.
    told: model_name, context_size, which the source does not say."""
    target = Path(folder).expanduser().absolute()
    taken = target.exists() and (target.is_file() or any(target.iterdir()))
    refuse(taken, f"{folder} is there already: name a new folder, or an empty one")
    files = Source(source)
    describe = FORMATS.get(files.weights.name, SUFFIXES.get(files.weights.suffix))
    refuse(not describe, f"{files.weights.name} is none of {', '.join(FORMATS)}")
    with file_errors("it cannot be converted"):
        tensors = read_tensors(files.weights)
        cfg = describe(tensors, files)
        for key, values in EXPRESSED.items():
            refuse(cfg.get(key, values[0]) not in values, f"its {key} is {cfg.get(key)!r:.60}")
        known = block(cfg, files, layer)
        sae = build(tensors, cfg)
    cfg["hook_name"] = None if known is None else f"blocks.{known}.hook_resid_post"
    cfg["sae_lens_version"] = "6.54.0"  # of the layout: without it SAELens drops the rest
    cfg.update({name: value for name, value in told.items() if value})
    metadata = {name: cfg[name] for name in KEPT if cfg.get(name) is not None}
    with file_errors(f"cannot write {folder}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=".") as new:
            sae.save(Path(new, "sae"), metadata)
            os.replace(Path(new, "sae"), target)
    what = f"{sae.kind}, {len(sae.b_enc):,} latents of {len(sae.b_dec):,} dimensions"
    hook = metadata.get("hook_name", "an unknown hook (--layer)")
    return f"{folder}: {what}, {hook} of {metadata.get('model_name', 'an unknown model (--model)')}"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("source", help="folder, file, or owner/name[@revision]:path on the Hub")
    parser.add_argument("folder", help="what to write; new, or empty")
    parser.add_argument("--layer", type=int, help="block whose output the SAE reads")
    parser.add_argument("--model", dest="model_name", help="the language model")
    parser.add_argument("--context", dest="context_size", type=int, help="tokens in a sequence")
    try:
        print(convert(**vars(parser.parse_args(argv))))
    except UserError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
