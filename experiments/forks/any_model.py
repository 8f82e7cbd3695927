"""Most decoders of the transformers library (Llama, Qwen, Mistral, GPT-2, ...), as they are.

    pip install "transformers>=5"
    python experiments/forks/any_model.py --model Qwen/Qwen3-0.6B --data c4 --d-sae 16384

The library's own forward pass runs, with its own masks and positions. Up to block L nothing is
changed, and it is left there. From block L + 1 on it starts with what block L is to have put out.
A model that looks ahead, or in which some block needs more of others than one tensor, is refused.
Its own tokenizer serves, too. Families that saeft has itself stay saeft's, which are faster.
"""

import hashlib
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

sys.path.insert(0, str([*Path(__file__).parents][:3][-1]))
import model_loaders
import saeft
from model_loaders import refuse

try:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError:
    sys.exit('any_model.py: pip install "transformers>=5"')


class Reached(Exception):
    """The end of what is to run; args[0] is what the block put out."""


def leave(block, args, output):
    raise Reached(output)


def named(name: str) -> dict:
    """What from_pretrained takes: a folder, or a name on the Hub and its revision."""
    place = os.path.expanduser(model_loaders.long_name(name, model_loaders.MODELS))
    name, _, revision = (place, "", "") if os.path.isdir(place) else place.partition("@")
    commit = model_loaders.commits.get(place, revision or "main")
    return {"pretrained_model_name_or_path": name, "revision": commit}


class Tokenizer:
    """A tokenizer of transformers, as saeft's streams use it."""

    def __init__(self, name: str, bos: str = "auto"):
        with model_loaders.user_errors(f"no tokenizer for {name}"):
            self.tokenizer = own = AutoTokenizer.from_pretrained(**named(name))
            text = f"{own.backend_tokenizer.to_str()}{own.split_special_tokens}"
            ids = own("a").input_ids
            put = ids[: ids.index(self.encode("a")[0])]  # before a text
        refuse(len(put) > 1 and bos != "no", f"the tokenizer of {name} puts {put} first: --bos no")
        self.fingerprint = self.vocabulary = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.n_vocab = max(own.get_vocab().values()) + 1  # there may be gaps
        self.eos_id = own.eos_token_id
        refuse(self.eos_id is None, f"the tokenizer of {name} has no end of text")
        first = {"auto": put, "yes": [*put, own.bos_token_id, self.eos_id], "no": []}[bos]
        self.bos_id = next((i for i in first if i is not None), None)

    def encode(self, text: str) -> list[int]:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids) -> str:
        # Behind another token, since some tokenizers drop the space that a text begins with.
        before = self.encode("a")
        return self.tokenizer.decode([*before, *ids])[len(self.tokenizer.decode(before)) :]


class AnyModel(saeft.LanguageModel):
    load_tokenizer = Tokenizer
    names = ("parts", 1, 2, 3, "head")  # the last is the library's to know
    width = 0  # of the tuple that a block puts out, the stream first; 0: the stream alone

    def __init__(self, config: dict):
        nn.Module.__init__(self)
        self.use(AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)))

    def use(self, model):
        self.model = model
        c, n_layers = model.config, model.config.num_hidden_layers
        self.max_context = getattr(c, "max_position_embeddings", getattr(c, "max_seq_len", 2**20))
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
        refuse(len(lists) != 1, f"{len(lists)} lists of {n_layers} blocks in it")
        # In a dict, so that nothing is a submodule twice; the final norm may be anywhere.
        self.parts = {1: model.get_output_embeddings(), 2: lists[0], 3: None}

    def load(self, name: str, device, dtype):
        with model_loaders.user_errors(f"cannot run {name} in parts"):
            options = {**named(name), "dtype": dtype, "output_loading_info": True}
            model, report = AutoModelForCausalLM.from_pretrained(**options)
            refuse(report["missing_keys"], f"{name} lacks {sorted(report['missing_keys'])[:3]}")
            self.use(model.to(device).eval().requires_grad_(False))
            tokens = resid = torch.tensor([[1, 2, 3, n] for n in range(4, 16)], device=device)
            for layer in range(len(self.blocks)):
                resid = self.prefix(resid, layer, layer)
            whole, parts = self(tokens), self.unembed(resid)
            off = max((whole - parts).abs().max(), (whole - whole[:1])[:, :-1].abs().max())
            limit = max(1e-4, 4 * torch.finfo(dtype).eps) * whole.abs().max()
            fits = resid.shape[-1] == self.W_U.shape[1] and off <= limit  # False for nan
            refuse(not fits, f"{name}: no decoder that runs in parts")
        return self

    def forward(self, tokens):
        # On the meta device masks cannot be made.
        return tokens if self.W_U.is_meta else self.model(tokens, use_cache=False).logits

    def suffix(self, resid, layer: int):
        return self.prefix(resid, -1, layer + 1)

    def unembed(self, resid):
        # Rows as sequences of one token: a slice of them may be longer than the model's context.
        x = resid if resid.dim() == 3 else resid[:, None]
        return self.prefix(x, None, len(self.blocks)).view(*resid.shape[:-1], -1)

    def prefix(self, given, layer: int | None, first: int = 0):
        """The output of block `layer`, or, for None, the logits. given: tokens, or the input of
        block `first`, with which it begins."""
        tokens = given if first == 0 else given.new_zeros(given.shape[:2], dtype=torch.long)
        whole = (given, *[None] * (self.width - 1)) if self.width else given
        with ExitStack() as stack:
            for block in self.blocks[:first]:
                stack.enter_context(patch.object(block, "forward", lambda *a, **b: whole))
            if layer is not None:
                stack.callback(self.blocks[layer].register_forward_hook(leave).remove)
            try:
                return self.model(tokens, use_cache=False).logits
            except Reached as reached:
                out = reached.args[0]
                self.width = len(out) if isinstance(out, tuple) else 0
                return out[0] if self.width else out


mine = dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AnyModel)
saeft.FAMILIES.update({**mine, **saeft.FAMILIES})

if __name__ == "__main__":
    sys.exit(saeft.main())
