"""What attention sinks do to the figures, and what leaving them out mends: a table.

    python experiments/sinks.py                          # embedded model, without and with sinks
    python experiments/sinks.py --model gemma-3-270m ... # a model that has sinks of its own

The embedded model has none. They are made as real ones look: one token in about a thousand gets a
vector of 30 median norms, always the same, after block L, and block L + 1 takes it away again, so
that the model's own CE stays as it is. Each row is a run with --sink-norm 4 or 0; flags are
saeft.py's. Runs that are finished are read, not run again.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import saeft

OUT = Path("runs/sinks")
RARE = 37  # the rest by 1000 of a hash of a token and the one before it that makes a sink


class WithSinks(nn.Module):
    """A language model whose block `layer` gives a few tokens a huge norm, which no later block
    sees; everything else is the model's own."""

    def __init__(self, lm: saeft.LanguageModel, layer: int, norm: float):
        super().__init__()
        self.lm, self.layer = lm, layer
        direction = torch.randn(lm.W_U.shape[1], generator=torch.Generator().manual_seed(1))
        self.vector = norm * direction / direction.norm()

    def __getattr__(self, name: str):
        if name in ("lm", "layer", "vector"):
            return super().__getattr__(name)
        return getattr(self.lm, name)

    def prefix(self, tokens, layer):
        resid = self.lm.prefix(tokens, layer)
        before = tokens.roll(1, dims=1)
        sink = (tokens * 31 + before * 17) % 1000 == RARE  # about one in a thousand
        sink[:, 0] = False
        return resid + sink[..., None] * self.vector

    def suffix(self, resid, layer):
        huge = resid @ self.vector > self.vector.norm() ** 2 / 2
        return self.lm.suffix(resid - huge[..., None] * self.vector, layer)


class SinkRun(saeft.Run):
    """A run on a model with sinks made."""

    def prepare(self, closing) -> None:
        super().prepare(closing)
        tokens = self.stream.train(0, 8).to(self.device)
        median = self.lm.prefix(tokens, self.config.layer).norm(dim=-1).median()
        self.lm = WithSinks(self.lm, self.config.layer, 30 * median.item())


def report(name: str, flags: list[str], kind: type[saeft.Run]) -> dict:
    path = OUT / name / "report.json"
    if not path.exists():
        argv = [*flags, "--out", str(OUT), "--name", name, "--resume"]
        kind(saeft.parse(argv)).run()
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    flags = sys.argv[1:]
    model = saeft.parse(flags).model
    cases = [(model, saeft.Run)]
    if model == "tiny":
        cases.append(("tiny, sinks made", SinkRun))
    print("| model | --sink-norm | left out | FVU | CE gap after MSE | after KL+MSE | closed |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for label, kind in cases:
        for limit in ("4", "0"):
            name = f"{Path(label).name.replace(', ', '-').replace(' ', '-')}-{limit}"
            row = report(name, [*flags, "--sink-norm", limit, "--method", "kl"], kind)
            figures = f"{row['fvu_mse']:.4f} | {row['gap_mse']:.3f} | {row['gap_final']:.3f}"
            share = f"{row['left_out']:.2%} | {figures} | {row['gap_closed']:.1%}"
            print(f"| {Path(label).name} | {limit} | {share} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except saeft.UserError as error:
        sys.exit(f"sinks: {error}")
