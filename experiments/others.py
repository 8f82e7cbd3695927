"""What the fine-tune does to SAEs of other libraries, which each train one and save it.

    pip install sae-lens transformers datasets nnsight simple-parsing natsort schedulefree wandb
    pip install --no-deps dictionary-learning eai-sparsify
    python experiments/others.py --model gemma-3-270m --data docs.jsonl.gz --layer 9 --k 40 ...

Flags are saeft.py's: the last --kl-tokens of --tokens are the fine-tune's, each library trains on
those before. Those that are installed take part. Each library's file goes through convert.py, the
fine-tune, its control, and back: what saeft writes is SAELens's layout. Gap and FVU are saeft's;
beside them those of the library's own module in the same place, before the fine-tune that which
trained the SAE, after it SAELens's. Then the gap with sinks, which SAELens does not leave out, and
that of its own CE evaluation, on transformers' model. OUT keeps what is done: the same command goes
on.
"""

import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
import convert
from compare import run as finished

import model_loaders
import saeft
from model_loaders import refuse, say, write_text


def activations(run: saeft.Run):
    """Yields [batch, D] without end: content of the training text, shuffled."""
    buffer = saeft.ActivationBuffer(run.lm, run.stream, run.n_mse, run.done.limit, run.config)
    while True:
        yield buffer.next_batch(run.config.batch)


if not torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"


# ---- SAELens ------------------------------------------------------------------------------------
def train_saelens(run: saeft.Run, folder: Path) -> None:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    c = run.config
    sizes = {"d_in": run.lm.W_U.shape[1], "d_sae": c.d_sae, "k": c.k[0]}
    cfg = TopKTrainingSAEConfig(**sizes, normalize_activations="expected_average_only_in")
    cfg.metadata.model_name = c.model
    cfg.metadata.hook_name = f"blocks.{c.layer}.hook_resid_post"
    trainer = SAETrainerConfig(run.n_mse * c.context, c.batch, lr_end=3e-5)  # unused: constant
    trainer.n_batches_for_norm_estimate = 20
    sae = SAETrainer(trainer, TopKTrainingSAE(cfg), activations(run)).fit()
    sae.save_inference_model(folder)


def own_saelens(folder: Path):
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)

    def forward(x):
        f = sae.encode(x)
        return sae.decode(f), f.to_dense() if f.is_sparse else f

    return forward


# ---- dictionary_learning ------------------------------------------------------------------------
def train_dictionary_learning(run: saeft.Run, folder: Path) -> None:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.training import trainSAE

    c = run.config
    steps = run.n_mse * c.context // c.batch
    trainer = {"trainer": BatchTopKTrainer, "steps": steps, "activation_dim": run.lm.W_U.shape[1]}
    trainer.update(dict_size=c.d_sae, k=c.k[0], layer=c.layer, lm_name=c.model, device="cpu")
    # Its own warm-up of 1000 steps and threshold from step 1000 on are for longer runs.
    trainer.update(warmup_steps=steps // 20, threshold_start_step=steps // 10, seed=c.seed)
    trainer.update(threshold_beta=0.99, submodule_name=f"resid_post_layer_{c.layer}")
    data = activations(run)
    trainSAE(data, [trainer], steps, save_dir=str(folder), normalize_activations=True, device="cpu")


def own_dictionary_learning(folder: Path):
    from dictionary_learning.utils import load_dictionary

    sae, _ = load_dictionary(str(folder / "trainer_0"), "cpu")
    return lambda x: sae(x, output_features=True)


# ---- sparsify -----------------------------------------------------------------------------------
def train_sparsify(run: saeft.Run, folder: Path) -> None:
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from transformers import AutoModelForCausalLM

    c = run.config
    place = model_loaders.long_name(c.model, model_loaders.MODELS)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    tokens = run.stream.train(0, run.n_mse)
    data = Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")
    sae = SparseCoderConfig(num_latents=c.d_sae, k=c.k[0])
    settings = {"batch_size": max(1, c.batch // c.context), "save_dir": str(folder.parent)}
    settings.update(log_to_wandb=False, run_name=folder.name, layers=[c.layer])
    settings["init_seeds"] = [c.seed]
    settings["exclude_tokens"] = [int(tokens[0, 0])] if run.lm.n_skip else []
    Trainer(TrainConfig(sae, **settings), data, model).fit()


def own_sparsify(folder: Path):
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(next(folder.glob("layers.*")))

    def forward(x):
        top = sae.encode(x)
        f = torch.zeros(len(x), sae.num_latents).scatter(-1, top.top_indices, top.top_acts)
        return sae.decode(top.top_acts, top.top_indices), f

    return forward


# ---- From theirs to ours, and back --------------------------------------------------------------
# Trains an SAE on a run's activations and saves it in a folder; reads it from there, as a function
# from x [N, D] to x_hat [N, D] and f [N, F]; the folder that convert.py is given.
LIBRARIES = {
    "SAELens": (train_saelens, own_saelens, ""),
    "dictionary_learning": (train_dictionary_learning, own_dictionary_learning, "trainer_0"),
    "sparsify": (train_sparsify, own_sparsify, "layers.*"),
}


def gaps_by_saelens(folders: list[Path], run: saeft.Run) -> list[float]:
    """What SAELens's own evaluation says of SAEs in its layout, on the run's held-out text: CE with
    each less CE without, over all tokens but <bos>."""
    from sae_lens import SAE
    from sae_lens.evals import get_recons_loss
    from sae_lens.load_model import load_model
    from sae_lens.training.activation_scaler import ActivationScaler

    place = model_loaders.long_name(run.config.model, model_loaders.MODELS)
    body, _, blocks, *_ = run.lm.names
    hook = f"{body}.{blocks}.{run.config.layer}"
    options = {"dtype": torch.float32}
    model = load_model("AutoModelForCausalLM", place, "cpu", options, hook_names=[hook])
    tokens, means = run.stream.validation(), []
    bos = [int(tokens[0, 0])] if run.lm.n_skip else None
    settings = {"compute_kl": False, "compute_ce_loss": True, "ignore_tokens": bos}
    settings.update(activation_scaler=ActivationScaler(), hook_name=hook)
    for sae in map(SAE.load_from_disk, folders):
        gaps = []
        for batch in tokens.split(8):
            with torch.no_grad():
                ce = get_recons_loss(sae, model, batch_tokens=batch, **settings)
            gap = ce["ce_loss_with_sae"] - ce["ce_loss_without_sae"]  # [B, T - 1]
            gaps.append(gap[:, run.lm.n_skip :].double())
        means.append(torch.cat(gaps).mean().item())
    return means


class Own(nn.Module):
    """A library's own function in the place of an SAE."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, keep):
        x_hat, f = self.function(saeft.single(x))
        return x_hat, f * keep[:, None]


def row_of(name: str, run: saeft.Run, out: Path, flags: list[str]) -> dict:
    """A library's SAE before and after the fine-tune, by saeft and by the library's own module."""
    train, own, path = LIBRARIES[name]
    theirs, ours, tuned = out / name / "theirs", out / name / "sae", out / name / "tuned"
    if not (ours / "cfg.json").exists():
        say(f"{name} trains")
        train(run, theirs)
        model = ["--model", run.config.model, "--layer", str(run.config.layer)]
        file = next(theirs.glob(path)) if path else theirs
        refuse(convert.main([str(file), str(ours), *model]) != 0, name)
        seen = run.stream.seen_after(run.n_mse)
        origin = asdict(run.config), run.lm.n_skip > 0, seen, run.identity
        saeft.SAE.load(ours).save(ours, model_loaders.sae_metadata(*origin))
    fine_tune = [*flags, "--start", str(ours), "--method", "kl", "mse"]
    report = finished(tuned.parent, tuned.name, fine_tune)
    trainees = []
    for sae, function in ((ours, own(theirs)), (tuned, own_saelens(tuned))):
        sae = saeft.SAE.load(sae)
        trainees.append(saeft.Trainee(sae, run.lm))
        trainees.append(saeft.Trainee(sae, run.lm, insert=Own(function), trained=sae))
    tokens, limit = run.stream.validation(), run.done.limit
    _, rows = saeft.evaluate(run.lm, tokens, trainees, limit, run.config, f"{name} evaluates")
    row = dict(zip(("before", "before_own", "after", "after_own"), rows))
    _, rows = saeft.evaluate(run.lm, tokens, trainees[::2], torch.inf, run.config, "with sinks")
    by_saelens = gaps_by_saelens([ours, tuned], run)
    for when, with_sinks, gap in zip(("before", "after"), rows, by_saelens):
        row[when]["gap_with_sinks"] = with_sinks["gap"]
        row[f"{when}_own"]["gap_with_sinks"] = gap
    closed = {method: report["results"][method]["gap_closed"] for method in ("kl", "mse")}
    return {"library": name, "kind": report["sae"], **row, **closed}


def print_table(rows: list[dict]) -> None:
    heads = "| gap | its own | FVU | its own | gap with sinks | SAELens's | L0 | closed | control |"
    say(f"\n| library, kind | {heads}")
    say("| --- " * 11 + "|")
    names = ("gap", "fvu", "gap_with_sinks")
    for row in rows:
        for when, closed in (("before", ""), ("after", f"{row['kl']:.1%} | {row['mse']:.1%}")):
            ours, own = row[when], row[f"{when}_own"]
            figures = [f"{r[name]:.4f}" for name in names for r in (ours, own)]
            head = f"| {row['library']}, {row['kind']} | {when} | {' | '.join(figures)}"
            say(f"{head} | {ours['l0']:.1f} | {closed or '|'} |")


def main(argv: list[str] | None = None) -> None:
    parser = model_loaders.Parser(__doc__)
    parser.add_argument("--tokens", default="700k", help="of a library and the fine-tune")
    parser.add_argument("--out", type=model_loaders.expanded, default=Path("runs/others"))
    args, flags = parser.parse_known_args(argv)
    run = saeft.Run(saeft.parse([*flags, "--tokens", args.tokens, "--out", str(args.out)]))
    own = run.config.sae != "topk" or len(run.config.k) > 1
    refuse(own, "each library trains a kind of its own, at one K: no --sae, one --k")
    path = args.out / "others.json"
    with contextlib.ExitStack() as closing:
        run.prepare(closing)
        run.first_saes()  # which finds what is a sink
        made = {"tokens": args.tokens, "flags": flags, **run.identity}
        kept = model_loaders.read_json(path) if path.exists() else {"made": made, "rows": []}
        refuse(kept["made"] != made, f"{path} was made with {kept['made']}: give another --out")
        write_text(path, json.dumps(kept, indent=1))
        for name in LIBRARIES:
            try:
                row = row_of(name, run, args.out, flags)
                kept["rows"] = [r for r in kept["rows"] if r["library"] != name] + [row]
            except ImportError as error:
                say(f"{name}: {error}")
            write_text(path, json.dumps(kept, indent=1))
    print_table(kept["rows"])


if __name__ == "__main__":
    sys.exit(saeft.exit_status("others", main))
