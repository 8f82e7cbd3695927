"""A page on which the latents of an SAE can be seen: one HTML file, no network, no server.

    python experiments/features.py runs/my-run                        # features.html in that folder
    python experiments/features.py SAE --model pythia-160m --data pile    # any SAE that saeft reads

Shown are a random sample of the latents that fire and, where the folder has a `before/`, those
that the fine-tune changed most: firing rate, contexts, direct effect on the logits, cosine between
the decoder's directions before and after. Model, layer, data, context are the SAE's own, or flags.
"""

import contextlib
import html
import importlib.util
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import model_loaders
import saeft
from model_loaders import UserError, refuse, user_errors
from saeft import SAE

BEST, RANGE = 5, 3  # contexts of a latent: where it is strongest, and from the rest of its range
LEFT, RIGHT = 36, 28  # tokens around the strongest
N_TOKENS = 8  # promoted, and as many suppressed
LARGEST = 2_000_000  # bytes of a page
FIRST = 32_768  # training tokens that tell what a sink is, as many as in a run of saeft.py


# ---- What the page tells ------------------------------------------------------------------------
@torch.no_grad()
def encode(sae: SAE, x: Tensor, latents: Tensor | slice) -> Tensor:
    """Activations [N, n] of n latents on x [N, D], some tokens at a time."""
    return torch.cat([sae.encode(rows).to_dense()[:, latents] for rows in x.split(2048)])


@torch.no_grad()
def firing_rates(sae: SAE, x: Tensor) -> Tensor:
    """Share of the tokens x [N, D] on which each latent is active, [F]."""
    return sum(saeft.counts(sae.encode(rows)) for rows in x.split(2048)) / len(x)


@torch.no_grad()
def logit_effects(lm, directions: Tensor, n_vocab: int) -> Tensor:
    """[n, V]: what directions [n, D] add to the logits, but for the division by the residual's
    norm: through the final norm's scale and W_U, less the mean over the vocabulary."""
    norm = lm.part(3)
    if isinstance(norm, nn.LayerNorm):
        directions = (directions - directions.mean(-1, keepdim=True)) * norm.weight
    elif norm is not None:  # Gemma's RMSNorm; of other models it is not known
        directions = directions * (1 + norm.weight)
    effects = directions @ lm.W_U[:n_vocab].T
    return effects - effects.mean(-1, keepdim=True)


def choose(n: int, rate: Tensor, rate_before: Tensor, cosine: Tensor, seed: int) -> dict[int, str]:
    """n latents of those that fire, and why: a quarter of least cosine ("turned"), a quarter whose
    rate changed by the largest factor ("rate"), the rest at random ("sample"). [F] each."""
    alive = (rate > 0).nonzero()[:, 0].cpu()
    change = ((rate + 1e-4) / (rate_before + 1e-4)).log().abs().cpu()
    order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))
    quarter = n // 4 if (cosine < 1).any() else 0
    chosen = {}
    for why, latents, total in (
        ("turned", alive[cosine.cpu()[alive].argsort()], quarter),
        ("rate", alive[change[alive].argsort(descending=True)], 2 * quarter),
        ("sample", alive[order], n),
    ):
        for latent in latents.tolist():
            if len(chosen) < total:
                chosen.setdefault(latent, why)
    return chosen


def pieces(tokenizer, ids: list[int], values: list[float]) -> list[tuple[str, float]]:
    """(text, value) of tokens; those that share a character are one piece, with the largest."""
    out, held, largest = [], b"", 0.0
    for i, (token, value) in enumerate(zip(ids, values)):
        known = getattr(tokenizer, "_bytes", None)  # of saeft's own tokenizers
        held += known.get(token, b"") if known else tokenizer.decode([token]).encode()
        largest = max(largest, value)
        try:
            text = held.decode()
        except UnicodeDecodeError as error:
            if "end of data" in error.reason and i + 1 < len(ids):
                continue
            text = held.decode(errors="backslashreplace")
        out.append((text, rounded(largest)))
        held, largest = b"", 0.0
    return out


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def contexts(f: Tensor, tokens: Tensor, n_skip: int, tokenizer) -> list[dict]:
    """Where a latent's activations f [B, T] are strongest, in sequences of different text, and
    where they are in the middle of all sequences that have any. `peak`: which piece of `text`."""
    values, places = f.max(1)
    order = values.argsort(descending=True)[: int((values > 0).sum())].tolist()
    middle = [order[len(order) * i // (RANGE + 1)] for i in range(1, RANGE + 1)]
    picked = {}  # text near the strongest token -> sequence
    for rows, limit in ((order[: 20 * BEST], BEST), (middle, BEST + RANGE)):
        for row in rows:
            place = int(places[row])
            near = tuple(tokens[row, max(place - 8, 0) : place + 2].tolist())
            if len(picked) < limit:
                picked.setdefault(near, row)
    out = []
    for row in picked.values():
        place = int(places[row])
        spans = (max(place - LEFT, n_skip), place), (place, place + 1 + RIGHT)
        left, right = (
            pieces(tokenizer, tokens[row, a:b].tolist(), f[row, a:b].tolist()) for a, b in spans
        )
        out.append({"value": rounded(values[row]), "peak": len(left), "text": left + right})
    return out


def describe(lm, tokenizer, sae: SAE, before: SAE | None, tokens: Tensor, limit, args) -> dict:
    """All that the page shows, of tokens [B, T] whose norm is within limit. args: layer, place,
    latents, seed."""
    resid = saeft.collect(lm, tokens.to(lm.W_U.device), args)  # [B, T, D]
    keep = saeft.content(resid, lm.n_skip, limit)  # [B, T]
    rate = firing_rates(sae, resid[keep])
    rate_before = firing_rates(before, resid[keep]) if before else rate
    cosine = torch.cosine_similarity(sae.W_dec, before.W_dec) if before else torch.ones_like(rate)
    chosen = choose(args.latents, rate, rate_before, cosine, args.seed)
    latents = torch.tensor(list(chosen), dtype=torch.long, device=rate.device)
    f = encode(sae, resid.flatten(0, 1), latents).view(*keep.shape, -1) * keep[..., None]
    effects = logit_effects(lm, sae.W_dec[latents], tokenizer.n_vocab)
    rows = []
    for i, (latent, why) in enumerate(chosen.items()):
        row = {"id": latent, "why": why, "rate": rounded(rate[latent])}
        if before:
            row["rate_before"] = rounded(rate_before[latent])
            row["cosine"] = rounded(cosine[latent])
        row["max"] = rounded(f[..., i].max())
        for name, sign in (("promotes", 1), ("suppresses", -1)):
            top = (sign * effects[i]).topk(N_TOKENS)
            row[name] = [
                (pieces(tokenizer, [token], [0])[0][0], rounded(sign * value))
                for token, value in zip(top.indices.tolist(), top.values)
            ]
        row["contexts"] = contexts(f[..., i].cpu(), tokens, lm.n_skip, tokenizer)
        rows.append(row)
    place = "" if args.place == "resid_post" else f"{args.place}, "
    facts = f"{sae.kind} SAE of {len(rate):,} latents, {place}block {args.layer} of {args.model}; "
    facts += f"{int((rate > 0).sum()):,} fire on {int(keep.sum()):,} tokens of {args.data}."
    if before:
        facts += f" Median cosine between directions before and after: {cosine.median():.3f}."
    return {"facts": facts, "compared": bool(before), "latents": rows}


# ---- The page -----------------------------------------------------------------------------------
def write_page(data: dict, title: str, path: Path) -> int:
    """features.html with the data in it; returns bytes. No `<` of the data can end the script."""
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = page.replace("<!--title-->", html.escape(title)).replace("<!--data-->", text)
    size = len(page.encode())
    if size > LARGEST:
        raise UserError(f"the page would have {size / 1e6:.1f} MB: give fewer --latents")
    model_loaders.write_text(path, page)
    return size


def parse(argv: list[str] | None, doc: str = __doc__, page: bool = True):
    """The flags, of a page or of another script, with its docstring; model, layer, data, ... from
    the SAE's metadata unless given."""
    parser = model_loaders.Parser(doc)
    parser.add_argument("run", help="a run's folder, or an SAE in SAELens's layout")
    parser.add_argument("--model", help="short name, Hub name or folder")
    parser.add_argument("--layer", type=int, help="the block whose output the SAE reads")
    parser.add_argument("--data", help="as of saeft.py")
    parser.add_argument("--context", type=int, help="tokens in a sequence")
    parser.add_argument("--bos", choices=["auto", "yes", "no"])
    parser.add_argument(
        "--tokens", type=model_loaders.count, default=100_000, help="held-out tokens"
    )
    parser.add_argument("--sink-norm", type=float, help="as of saeft.py")
    if page:
        latents = {"type": model_loaders.count, "default": 120, "help": "how many are shown"}
        parser.add_argument("--latents", **latents)
        parser.add_argument("--seed", type=int, default=0, help="of the random sample")
        out = "the page (default: features.html in the run's folder)"
        parser.add_argument("--out", type=model_loaders.expanded, help=out)
    parser.add_argument("--device", default="auto")
    fork = "a file that adds kinds, places or models, to import first; may be given again"
    parser.add_argument("--fork", action="append", default=[], help=fork)
    args = parser.parse_args(argv)
    for fork in args.fork:
        with user_errors(f"--fork {fork}"):
            spec = importlib.util.spec_from_file_location("fork", fork)
            refuse(spec is None, f"--fork {fork} is no Python file")
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
    own = model_loaders.sae_settings(model_loaders.read_sae(args.run)[1])
    told = {"bos": "auto", "sink_norm": saeft.Config().sink_norm, **own}
    args.place = told.get("place", "resid_post")
    places = ", ".join(saeft.PLACES)
    refuse(args.place not in saeft.PLACES, f"{args.run} reads {args.place}: {places} is shown")
    given = args.layer if args.layer is not None else told.get("layer")
    refuse(given != told.get("layer", given), f"--layer {given}: that SAE has {told.get('layer')}")
    for name in ("model", "layer", "data", "context", "bos", "sink_norm"):
        if getattr(args, name) is None:
            setattr(args, name, told.get(name))
        if getattr(args, name) is None:
            raise UserError(f"{args.run} does not tell its {name}: give --{name}")
    return args


def load(args, n_train: int = FIRST) -> tuple:
    """Model, tokenizer, the SAE, the one in its `before/` or None, a stream of its data, with about
    n_train tokens for training, and the norm above which a token is a sink, as in training."""
    folder, device = model_loaders.expanded(args.run), saeft.join_processes(args.device)
    sae, before = SAE.load(args.run).to(device), None
    if (folder / "before" / "cfg.json").exists():
        before = SAE.load(folder / "before").to(device)
        cfgs = [model_loaders.sae_cfg(path) for path in (folder, folder / "before")]
        for key in ("hook_name", "d_in", "d_sae"):
            own, other = (cfg.get(key) for cfg in cfgs)
            refuse(own and own != other, f"{folder} has {key} {own}, its before/ {other}")
    lm = saeft.load_lm(args.model, device)
    tokenizer = lm.load_tokenizer(args.model, args.bos)
    lm.n_skip = int(tokenizer.bos_id is not None)
    widths = sae.W_dec.shape[1], lm.W_U.shape[1]
    refuse(widths[0] != widths[1], f"{args.run} has d_in {widths[0]}, {args.model} {widths[1]}")
    source = args.data, tokenizer, args.context, n_train + args.context, args.tokens
    limits = {"layer": (0, len(lm.blocks) - 1), "context": (2, lm.max_context)}
    limits.update(tokens=(1, 10**12), latents=(1, 10**6), sink_norm=(0, 1e9), seed=(0, 2**32 - 1))
    for name, (low, high) in limits.items():
        value, flag = getattr(args, name, low), name.replace("_", "-")
        refuse(not low <= value <= high, f"--{flag} {value} is not from {low} to {high}")
    stream = model_loaders.TokenStream(*source, short_ok=True, n_rows=len(lm.W_U))
    now = {"model": model_loaders.model_key(args.model), "data": stream.key}
    model_loaders.note_changes(model_loaders.sae_cfg(folder), folder, vars(args), now)
    limit = saeft.first_activations(lm, stream, stream.n_train, args)[1]
    return lm, tokenizer, sae, before, stream, limit


def make_page(args) -> str:
    """Writes the page; returns a line about it."""
    folder = model_loaders.expanded(args.run)
    lm, tokenizer, sae, before, stream, limit = load(args)
    with contextlib.closing(stream):
        data = describe(lm, tokenizer, sae, before, stream.validation(), limit, args)
    if not data["latents"]:
        why = "is --model the right one, --sink-norm too low?"
        raise UserError(f"no latent of {args.run} fires on {args.data}: {why}")
    report = folder / "report.json"
    report = model_loaders.read_json(report) if before and report.exists() else {}
    same = report.get("identity", {}).get("data") == stream.key
    if same and report.get("context") == args.context:  # of the same sequences
        for name, words in (("gap", "CE gap"), ("fvu", "FVU")):
            with user_errors(f"{folder / 'report.json'} is no report of saeft"):
                was, now = report["results"]["MSE"][name], report[name]
            data["facts"] += f" {words} {was:.4f} before the fine-tune, {now:.4f} after."
    out = args.out or folder / "features.html"
    size = write_page(data, f"Latents of {folder.resolve().name}", out)
    return f"{out}: {len(data['latents'])} latents, {size / 1e3:.0f} kB"


def main(argv: list[str] | None = None) -> int:
    return saeft.exit_status("features", lambda: model_loaders.say(make_page(parse(argv))))


if __name__ == "__main__":
    sys.exit(main())
