"""SAEBench's own evaluations of a run's SAE, before and after the fine-tune, in one table.

    pip install sae-bench
    python experiments/saebench.py runs/my-run               # on its own data sets, from the Hub
    python experiments/saebench.py --make-data texts         # offline: labelled text, here of the
    python experiments/saebench.py runs/my-run --data texts  # shipped Python sources

RUN is a run's folder (its `before/` is evaluated too) or any SAE in SAELens's layout; its language
model may be a local folder. --data is a folder with a subfolder or a file of text for each class,
which all evaluations but ravel then read, and --cities 300 makes ravel's text: both run without a
network. All that measures is SAEBench's code; replaced are its ways to a model (`models_from`) and
to text (saebench_texts.py).
"""

import contextlib
import functools
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
try:
    import jaxtyping
    import transformers
    from sae_bench.evals.core.main import multiple_evals
    from sae_bench.evals.ravel import main as ravel
    from sae_bench.evals.scr_and_tpp import main as scr_and_tpp
    from sae_bench.evals.sparse_probing import main as sparse_probing
    from sae_bench.sae_bench_utils import activation_collection
    from sae_lens import SAE
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    from experiments import saebench_texts
except ImportError as error:
    sys.exit(f"saebench: this needs SAEBench: pip install sae-bench ({error})")

import model_loaders
import saeft
from model_loaders import UserError, expanded

jaxtyping.config.update("jaxtyping_disable", True)  # its checks would end sparse probing
EVALS = {
    "core": None,
    "sparse_probing": (sparse_probing.run_eval, sparse_probing.SparseProbingEvalConfig),
    "scr": (scr_and_tpp.run_eval, scr_and_tpp.ScrAndTppEvalConfig),
    "tpp": (scr_and_tpp.run_eval, scr_and_tpp.ScrAndTppEvalConfig),
    "ravel": (ravel.run_eval, ravel.RAVELEvalConfig),
}
ROWS = [  # eval, key in its results, words
    ("core", "ce_loss_with_sae", "CE with the SAE"),
    ("core", "ce_loss_score", "loss recovered"),
    ("core", "kl_div_score", "KL score"),
    ("core", "explained_variance", "explained variance"),
    ("core", "l0", "L0"),
    ("sparse_probing", "sae_test_accuracy", "accuracy, all latents"),
    *[("sparse_probing", f"sae_top_{n}_test_accuracy", f"accuracy, best {n}") for n in (1, 2, 5)],
    *[("scr", f"scr_metric_threshold_{n}", f"score, {n} latents") for n in (5, 10, 20, 50)],
    *[("tpp", f"tpp_threshold_{n}_total_metric", f"score, {n} latents") for n in (5, 10, 20, 50)],
    *[("ravel", f"{n}_score", n) for n in ("disentanglement", "cause", "isolation")],
]


# ---- Models -------------------------------------------------------------------------------------
class TupleOutput:
    """A block whose hooks see its output in a tuple, as RAVEL expects and transformers 4 had it."""

    def __init__(self, block):
        self.block = block

    def register_forward_hook(self, hook):
        def call(block, inputs, output):
            changed = hook(block, inputs, (output,))
            return changed[0] if isinstance(changed, tuple) else changed

        return self.block.register_forward_hook(call)


@contextlib.contextmanager
def models_from(place: str):
    """Wherever SAEBench loads a language model, it gets that of a folder, or of a Hub name."""
    from_hub = HookedTransformer.from_pretrained_no_processing
    official = loading.get_official_model_name

    def load(_, dtype=None, **options):
        if not os.path.isdir(place):
            return from_hub(place, dtype=dtype, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
        read = transformers.AutoTokenizer.from_pretrained
        tokenizer = read(place, add_bos_token=True)
        if len(tokenizer) > model.config.vocab_size:  # a token for padding that the model lacks
            tokenizer = read(place, add_bos_token=True, pad_token=tokenizer.eos_token)
        known = place if model.config.model_type == "gpt_neox" else f"google/{Path(place).name}"
        return from_hub(known, hf_model=model, tokenizer=tokenizer, dtype=dtype, **options)

    def named(auto):
        """RAVEL makes folders of a model's name: it gets the last part, and what `place` holds."""
        load = functools.partial(auto.from_pretrained, place)
        return SimpleNamespace(from_pretrained=lambda _, **options: load(**options))

    def get_module(model, layer):
        body = model.gpt_neox if hasattr(model, "gpt_neox") else model.model
        return TupleOutput(body.layers[layer])

    with (
        patch.object(HookedTransformer, "from_pretrained_no_processing", load),
        patch.object(
            loading, "get_official_model_name", lambda n: n if n == place else official(n)
        ),
        patch.object(activation_collection, "get_module", get_module),
        patch.object(ravel, "LLM_NAME_MAP", {Path(place).name: Path(place).name}),
        patch.object(ravel, "AutoModelForCausalLM", named(transformers.AutoModelForCausalLM)),
        patch.object(ravel, "AutoTokenizer", named(transformers.AutoTokenizer)),
    ):
        yield


# ---- The evaluations ----------------------------------------------------------------------------
def results_of(name: str, saes: list, model: str, settings: dict, args, folder: str) -> dict:
    """label -> group -> key -> value, of one of EVALS."""
    if name == "core":
        rows = multiple_evals(
            saes,
            n_eval_reconstruction_batches=args.batches,
            n_eval_sparsity_variance_batches=args.batches,
            eval_batch_size_prompts=4,  # logits of 256,000 tokens are large
            exclude_special_tokens_from_reconstruction=True,
            compute_featurewise_density_statistics=True,  # without these two it saves nothing
            compute_featurewise_weight_based_metrics=True,
            output_folder=folder,
            dtype=args.dtype,
            device=args.device,
            **settings,
        )
        return {row["sae_set"]: row["metrics"] for row in rows}
    run_eval, config = EVALS[name]
    settings = {**settings, "llm_dtype": args.dtype, "llm_batch_size": args.batch}
    config = config(**settings, model_name=model, random_seed=args.seed)
    rows = run_eval(config, saes, args.device, folder, artifacts_path=f"{folder}/artifacts")
    return {key.removesuffix("_custom_sae"): r["eval_result_metrics"] for key, r in rows.items()}


def evaluate(run: Path, args, settings: dict) -> dict[tuple[str, str], dict]:
    """(eval, label of an SAE) -> its figures, for one run."""
    model = model_loaders.sae_settings(model_loaders.read_sae(run)[1]).get("model", "")
    place = os.path.expanduser(model_loaders.MODELS.get(model, model))
    folders = {run.name: run}
    if (run / "before" / "cfg.json").exists():
        folders = {f"{run.name} before": run / "before", f"{run.name} after": run}
    figures = {}
    for name in args.evals:
        print(f"{run}: {name}", file=sys.stderr, flush=True)
        with (
            models_from(place),
            tempfile.TemporaryDirectory() as folder,
            open(args.out / "log.txt", "a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            saes = [(label, SAE.load_from_disk(path)) for label, path in folders.items()]
            own = settings.get(name, {})
            if name == "ravel" and args.cities:  # it keeps what a model knows by its last name
                shutil.copytree(args.out / "cities", Path(folder, "cities"))
                own = {**own, "artifact_dir": f"{folder}/cities"}
            results = results_of(name, saes, Path(place).name, own, args, folder)
        if results.keys() != folders.keys():  # core keeps its errors to itself
            raise UserError(f"{name} failed for {run}: {args.out / 'log.txt'} says why")
        for label, groups in results.items():
            row = figures[name, label] = {
                k: v for group in groups.values() for k, v in group.items()
            }
            if any(v != v for v in row.values()):
                more = "one of its parts has too few examples: more --cities, or text in --data"
                model_loaders.say(f"note: {name} of {label} is nan: {more}")
    return figures


def table(figures: dict[tuple[str, str], dict]) -> str:
    """ROWS of what was measured, a column for each SAE, before them that of the model alone."""
    labels = list(dict.fromkeys(label for _, label in figures))
    width = max(6, *map(len, labels)) + 2
    lines = [f"{'':38}{'no SAE':>8}" + "".join(f"{label:>{width}}" for label in labels)]
    for name, key, words in ROWS:
        rows = [figures[name, label] for label in labels if (name, label) in figures]
        if rows:
            alone = re.sub("^sae_", "llm_", key).replace("with_sae", "without_sae")
            model = f"{rows[0][alone]:.4f}" if alone != key else ""
            line = f"{name.replace('_', ' '):16}{words:22}{model:>8}"
            lines.append(line + "".join(f"{row[key]:>{width}.4f}" for row in rows))
    return "\n".join(lines)


# ---- The command line ---------------------------------------------------------------------------
def parse(argv: list[str] | None):
    parser = model_loaders.Parser(__doc__)
    parser.add_argument("runs", nargs="*", type=expanded, help="folders of runs or of SAEs")
    parser.add_argument("--evals", nargs="+", choices=EVALS, help="default: all that can run")
    parser.add_argument("--data", type=expanded, help="labelled text: a subfolder or file a class")
    parser.add_argument("--make-data", type=expanded, help="write such text, from the shipped text")
    parser.add_argument("--cities", type=int, help="RAVEL on so many cities, with own prompts")
    parser.add_argument("--pairs", type=int, default=5000, help="of each attribute, for ravel")
    parser.add_argument("--seed", type=int, default=42, help="of all evaluations but core")
    parser.add_argument("--batches", type=int, default=200, help="of 512 tokens, for core")
    parser.add_argument("--batch", type=int, default=32, help="sequences in a forward pass")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=expanded, default=Path("runs/saebench"), help="table and log")
    args = parser.parse_args(argv)
    for name, low in {"cities": 1, "pairs": 1, "seed": 0, "batches": 1, "batch": 1}.items():
        value = getattr(args, name)
        saeft.refuse(value is not None and value < low, f"--{name} {value} is below {low}")
    names = [run.name for run in args.runs]
    saeft.refuse(len({*names}) < len(names), f"runs of one name, {names}: give one at a time")
    own = args.data and not args.cities  # no network, it seems
    args.evals = args.evals or [name for name in EVALS if name != "ravel" or not own]
    saeft.refuse(not (args.runs or args.make_data), "give a run's folder, or --make-data FOLDER")
    saeft.refuse(own and "ravel" in args.evals, "ravel does not read --data: give --cities, too")
    args.device = str(saeft.join_processes(args.device))
    return args


def run(argv: list[str] | None) -> None:
    args = parse(argv)
    if args.make_data:
        saebench_texts.make(args.make_data)
    if not args.runs:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    settings = saebench_texts.use(args.data, args.out) if args.data else {}
    settings["ravel"] = {"num_pairs_per_attribute": args.pairs}
    if args.cities:
        saebench_texts.make_cities(args.cities, args.out / "cities")
        settings["ravel"]["entity_attribute_selection"] = {"city": [*saebench_texts.PROMPTS]}
    figures = {}
    for folder in args.runs:
        figures |= evaluate(folder, args, settings)
    text = table(figures)
    model_loaders.write_text(args.out / "table.txt", text + "\n")
    model_loaders.say(text)


def main(argv: list[str] | None = None) -> int:
    return saeft.exit_status("saebench", lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
