"""On which tokens the SAE costs most, and on which the fine-tune repairs it: a table.

    python experiments/repaired.py runs/my-run                 # an SAE with its `before/`

Each token of held-out text is of one or more kinds, by what the model has to predict. `share`: of
all tokens; `gap`: what the SAE adds to the CE on them, in nats per token, before and after;
`closed`: the share of that gap which is closed; `of all`: the kind's share of all that is closed.
"""

import contextlib
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import features

import saeft
from model_loaders import progress, refuse, say

SEEN = 1_000_000  # training tokens that tell how frequent each is
FREQUENT = 100  # the most frequent tokens
RARE = 1e-5  # of all tokens: what is seldomer is rare


@torch.no_grad()
def losses(lm, tokens: Tensor, trainees: list, limit, args) -> tuple[Tensor, Tensor]:
    """[1 + m, B, T - 1]: the CE of tokens 1.. of tokens [B, T], of the model's own and with each
    SAE; [B, T - 1]: which of them count, those whose predecessor has content (`limit`)."""
    out, scored = [], []
    for i, batch in enumerate(tokens.split(8)):
        progress(f"{8 * i} of {len(tokens)} sequences")
        resid, x = saeft.PLACES[args.place](lm, batch, args.layer)
        keep = saeft.content(x, lm.n_skip, limit)
        streams = [t.splice(batch, resid, x, keep, saeft.Config())[-1] for t in trainees]
        rows = []
        for stream in [resid, *streams]:
            last, target = lm.suffix(stream, args.layer)[:, :-1].flatten(0, 1), batch[:, 1:]
            parts = saeft.slices(len(last), lm.W_U)
            ce = [cross_entropy(lm, last[part], target.flatten()[part]) for part in parts]
            rows.append(torch.cat(ce).view(target.shape))
        out.append(torch.stack(rows))
        scored.append(keep[:, :-1])
    return torch.cat(out, 1), torch.cat(scored)


def cross_entropy(lm, last: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(saeft.single(lm.unembed(last)), target, reduction="none")


def kinds(tokens: Tensor, seen: Tensor, tokenizer) -> dict[str, Tensor]:
    """name -> [B, T - 1], which of tokens 1.. of tokens [B, T] are of that kind. seen [n]: tokens
    of the same text that tell how frequent each is."""
    texts = {i: tokenizer.decode([i]) for i in tokens.unique().tolist()}
    counts = seen.bincount(minlength=int(tokens.max()) + 1)
    frequent = set(counts.argsort(descending=True)[:FREQUENT].tolist())
    of = {}
    for row in tokens.tolist():
        triples = set()
        for two, one, i in zip([None, *row], row, row[1:]):
            text = texts[i]
            starts = re.match(r"\s*[^\W\d]", text)
            inside = starts and not text[0].isspace() and re.search(r"\w$", texts[one])
            found = {
                "100 most frequent": i in frequent,
                "below 1 in 100,000": counts[i] < RARE * len(seen),
                "first in a word": starts and not inside,
                "later in a word": inside,
                "digits": re.fullmatch(r"\s*\d+", text),
                "punctuation": re.fullmatch(r"\s*[^\w\s]+\s*", text),
                "space alone": not text.strip(),
                "third of a triple seen before": (two, one, i) in triples,
                "of one not seen before": (two, one, i) not in triples,
            }
            for name, value in found.items():
                of.setdefault(name, []).append(bool(value))
            triples.add((two, one, i))
    shape = len(tokens), tokens.shape[1] - 1
    return {name: torch.tensor(values).view(shape) for name, values in of.items()}


def main(argv: list[str] | None = None) -> None:
    args = features.parse(argv, __doc__, page=False)
    lm, tokenizer, sae, before, stream, limit = features.load(args, n_train=SEEN)
    with contextlib.closing(stream):
        tokens, seen = stream.validation(), stream.train(0, stream.n_train).flatten()
    refuse(before is None, f"{args.run} has no before/: give a run of saeft.py")
    trainees = [saeft.Trainee(s, lm) for s in (before, sae)]
    ce, scored = losses(lm, tokens.to(lm.W_U.device), trainees, limit, args)
    (original, was, now), scored = ce.cpu(), scored.cpu()
    rows = {"all": torch.ones_like(scored), **kinds(tokens, seen, tokenizer)}
    if RARE * len(seen) < 10:  # too few to tell that a token is rare
        del rows["below 1 in 100,000"]
    repaired = (was - now)[scored].sum()
    same = not repaired  # also where no token is left
    refuse(same, f"before/ gives the same loss as {args.run} on {scored.sum():,} tokens")
    say(f"{scored.sum():,} held-out tokens; {len(seen):,} others tell how frequent each is")
    say(f"\n{'':32}{'share':>7}{'CE':>8}{'gap':>8}{'after':>8}{'closed':>8}{'of all':>8}")
    for name, some in rows.items():
        some = some & scored
        if some.any():
            a, b, c = (values[some].mean().item() for values in (original, was, now))
            share = some.sum() / scored.sum()
            closed = f"{(b - c) / (b - a):.1%}" if b > a else ""  # else there is none to close
            of_all = (was - now)[some].sum() / repaired
            figures = f"{share:7.1%}{a:8.3f}{b - a:8.3f}{c - a:8.3f}{closed:>8}{of_all:8.1%}"
            say(f"{name:32}{figures}")


if __name__ == "__main__":
    sys.exit(saeft.exit_status("repaired", main))
