"""SAEBench's own evaluations of a run's SAE, before and after the fine-tune, in one table.

    pip install sae-bench
    python experiments/saebench.py runs/my-run                        # its data sets: needs the Hub
    python experiments/saebench.py --make-data texts                  # offline: labelled text, from
    python experiments/saebench.py runs/my-run --data texts           # the shipped Python sources

RUN is a run's folder (its `before/` is evaluated too) or any SAE in SAELens's layout; --evals picks
from core, sparse_probing, scr, tpp and ravel. --data: a folder with a subfolder or a file of text
(.txt, .jsonl, .gz) for each class; the first four then run on it, and no network is needed. The
language model is the SAE's: a short name, a Hub name, or a folder like one. All code that measures
is SAEBench's; replaced are its ways to load a model (`use_models`) and text (`use_texts`).
"""

import argparse
import contextlib
import json
import os
import random
import re
import sys
import tempfile
import unittest.mock
from pathlib import Path

os.environ["JAXTYPING_DISABLE"] = "1"  # or sparse probing stops in a check of types
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
import model_loaders
import saeft
from model_loaders import UserError

NAME = "bias_in_bios_local"  # of local text; SAEBench's SCR asks for the first three words
SIZES = {"train": 4000, "test": 1000}  # SAEBench's own, of each probe
PIECE = 500  # characters of a text that count as one example, about the 128 tokens SAEBench reads
TOPICS = ("tkinter", "codecs", "distutils", "email", "socket")  # classes of --make-data
EVALS = ("core", "sparse_probing", "scr", "tpp", "ravel")
ROWS = {  # eval -> {key of its results: words}
    "core": {
        "ce_loss_with_sae": "CE with the SAE",
        "ce_loss_score": "loss recovered",
        "kl_div_score": "KL score",
        "explained_variance": "explained variance",
        "l0": "L0",
    },
    "sparse_probing": {
        "sae_test_accuracy": "accuracy, all latents",
        "sae_top_1_test_accuracy": "accuracy, 1 latent",
        "sae_top_2_test_accuracy": "accuracy, 2 latents",
        "sae_top_5_test_accuracy": "accuracy, 5 latents",
    },
    "scr": {f"scr_metric_threshold_{n}": f"{n} latents" for n in (5, 10, 20, 50)},
    "tpp": {f"tpp_threshold_{n}_total_metric": f"{n} latents" for n in (5, 10, 20, 50)},
    "ravel": {
        "disentanglement_score": "disentanglement",
        "cause_score": "cause",
        "isolation_score": "isolation",
    },
}
OF_MODEL = {"ce_loss_with_sae": "ce_loss_without_sae"}  # the same figure without an SAE
OF_MODEL |= {key: key.replace("sae_", "llm_") for key in ROWS["sparse_probing"]}


# ---- Local text ---------------------------------------------------------------------------------
def make_data(folder: Path) -> None:
    """The shipped documents that import exactly one of TOPICS, a .jsonl for each of these."""
    imports = re.compile(rf"^\s*(?:from|import) ({'|'.join(TOPICS)})\b", re.M)
    lines = {topic: [] for topic in TOPICS}
    for text in model_loaders.documents("tiny"):
        topics = {*imports.findall(text)}
        if len(topics) == 1:
            lines[topics.pop()].append(json.dumps({"text": text}) + "\n")
    for topic, found in lines.items():
        model_loaders.write_text(folder / f"{topic}.jsonl", "".join(found))
        print(f"{folder / topic}.jsonl: {len(found)} documents")


def read_classes(folder: Path) -> dict[str, dict[str, list[str]]]:
    """class -> {"train", "test"} -> pieces of its texts; the last fifth of a class is its test, so
    that hardly a text is on both sides. All classes are as long as the shortest."""
    if not folder.is_dir():
        raise UserError(f"--data {folder} is no folder")
    pieces = {}
    for path in sorted(folder.iterdir()):
        texts = model_loaders.documents(str(path))
        pieces[path.name.split(".")[0]] = [
            text[i : i + PIECE]
            for text in texts
            for i in range(0, max(len(text) - PIECE // 2, 1), PIECE)
        ]
    n = min(map(len, pieces.values()), default=0)
    if len(pieces) < 3 or n < 50:
        sizes = {name: len(found) for name, found in pieces.items()}
        raise UserError(f"--data {folder}: at least 3 classes of 50 pieces, it has {sizes}")
    draw = random.Random(0)
    sides = {}
    for name, found in pieces.items():
        start = len(found) * 4 // 5
        train, test = found[:start], found[start:]
        sides[name] = {
            "train": draw.sample(train, n * 4 // 5),
            "test": draw.sample(test, n - n * 4 // 5),
        }
    return sides


def letters(text: str) -> float:
    return sum(map(str.isalpha, text)) / len(text)


def with_attribute(classes: dict, side: str) -> list[dict]:
    """Rows for SCR, which needs a second label beside the class: of each class the third with the
    most letters (`prose`) and the third with the fewest (`signs`)."""
    rows = []
    for name, sides in classes.items():
        texts = sorted(sides[side], key=letters)
        third = len(texts) // 3
        for label, some in (("signs", texts[:third]), ("prose", texts[-third:])):
            random.Random(0).shuffle(some)
            rows += [{"text": text, "class": name, "attribute": label} for text in some]
    return rows


def use_texts(classes: dict, out: Path) -> dict:
    """SAEBench reads these in place of its data sets; returns the settings that go with them."""
    from sae_bench.evals.scr_and_tpp import dataset_creation
    from sae_bench.evals.scr_and_tpp import main as scr_and_tpp
    from sae_bench.sae_bench_utils import dataset_info
    from sae_bench.sae_bench_utils import dataset_utils

    def multi_label(name, train_size, test_size, seed):
        sizes = {"train": train_size // 2, "test": test_size // 2}
        return tuple(
            {name: texts[side][:size] for name, texts in classes.items()}
            for side, size in sizes.items()
        )

    names, attributes = list(classes), ("prose", "signs")
    rows = {side: with_attribute(classes, side) for side in ("train", "test")}
    dataset_utils.get_multi_label_train_test_data = multi_label
    dataset_creation.load_dataset = lambda name: rows
    scr_and_tpp.COLUMN2_VALS_LOOKUP[NAME] = attributes
    dataset_info.chosen_classes_per_dataset[NAME] = names
    dataset_info.dataset_metadata[NAME] = {
        "text_column_name": "text",
        "column1_name": "class",
        "column2_name": "attribute",
        "column1_mapping": {name: name for name in names},
        "column2_mapping": {label: label for label in attributes},
    }
    folder = out / "texts"
    texts = [text for sides in classes.values() for text in sides["test"] + sides["train"]]
    random.Random(0).shuffle(texts)
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    model_loaders.write_text(folder / "train.jsonl", "".join(lines))
    n = {side: len(classes[names[0]][side]) for side in SIZES}  # of each class
    size = {side: min(2 * n[side], SIZES[side]) for side in SIZES}
    # SCR takes a label's texts of a class once mixed with others, and twice as many alone.
    scr_size = {side: min(4 * ((n[side] // 3 - 1) // 2), SIZES[side]) for side in SIZES}
    pairs = list(zip(names[::2], names[1::2]))
    probes = {f"probe_{side}_set_size": size[side] for side in SIZES}
    sets = [{f"{side}_set_size": sizes[side] for side in SIZES} for sizes in (scr_size, size)]
    scr, tpp = ({"dataset_names": [NAME], "column1_vals_lookup": {NAME: pairs}, **s} for s in sets)
    return {
        "dataset": str(folder),
        "sparse_probing": {"dataset_names": [NAME], **probes},
        "scr": {**scr, "perform_scr": True},
        "tpp": {**tpp, "perform_scr": False},
    }


# ---- Models -------------------------------------------------------------------------------------
@contextlib.contextmanager
def models_from(place: str):
    """Wherever SAEBench loads a language model, it gets that of a folder, or of a Hub name."""
    import transformers
    from sae_bench.evals.ravel import main as ravel
    from sae_bench.sae_bench_utils import activation_collection
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    from_hub, official = HookedTransformer.from_pretrained_no_processing, loading.get_official_model_name

    def load(name, dtype=None, **options):
        if not os.path.isdir(place):
            return from_hub(place, dtype=dtype, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, add_bos_token=True)
        if len(tokenizer) > model.config.vocab_size:  # a token for padding that no model knows
            eos = {"pad_token": tokenizer.eos_token}
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, add_bos_token=True, **eos)
        known = place if model.config.model_type == "gpt_neox" else f"google/{Path(place).name}"
        return from_hub(known, hf_model=model, tokenizer=tokenizer, dtype=dtype, **options)

    def get_module(model, layer):
        body = model.gpt_neox if hasattr(model, "gpt_neox") else model.model
        return TupleOutput(body.layers[layer])

    with contextlib.ExitStack() as patches:
        for owner, name, value in (
            (HookedTransformer, "from_pretrained_no_processing", load),
            (loading, "get_official_model_name", lambda n: n if n == place else official(n)),
            (activation_collection, "get_module", get_module),
            (ravel, "LLM_NAME_MAP", {Path(place).name: place}),
        ):
            patches.enter_context(unittest.mock.patch.object(owner, name, value))
        yield


class TupleOutput:
    """A block whose hooks see its output in a tuple, as before transformers 5 and as RAVEL asks."""

    def __init__(self, block):
        self.block = block

    def register_forward_hook(self, hook):
        def call(block, inputs, output):
            changed = hook(block, inputs, (output,))
            return changed[0] if isinstance(changed, tuple) else changed

        return self.block.register_forward_hook(call)


# ---- The evaluations, each as label -> {key of ROWS: value} -------------------------------------
def core(saes: list, args, options: dict, folder: Path) -> dict:
    from sae_bench.evals.core.main import multiple_evals

    results = multiple_evals(
        saes,
        n_eval_reconstruction_batches=args.batches,
        n_eval_sparsity_variance_batches=args.batches,
        eval_batch_size_prompts=16,
        exclude_special_tokens_from_reconstruction=True,
        compute_featurewise_density_statistics=True,  # without these two it saves nothing
        compute_featurewise_weight_based_metrics=True,
        output_folder=str(folder / "core"),
        dtype=args.dtype,
        device=args.device,
        force_rerun=True,
        **({"dataset": options["dataset"]} if args.data else {}),
    )
    return {row["sae_set"]: flat(row["metrics"]) for row in results}


def others(name: str, saes: list, args, options: dict, folder: Path) -> dict:
    """Sparse probing, SCR, TPP or RAVEL."""
    import importlib

    package = "scr_and_tpp" if name in ("scr", "tpp") else name
    module = importlib.import_module(f"sae_bench.evals.{package}.main")
    kind = {"scr_and_tpp": "ScrAndTppEvalConfig", "ravel": "RAVELEvalConfig"}
    config = getattr(module, kind.get(package, "SparseProbingEvalConfig"))(**options.get(name, {}))
    config.model_name, config.llm_dtype = options["model"], args.dtype
    config.llm_batch_size = args.batch
    where = {"artifacts_path": str(folder / "artifacts"), "force_rerun": True}
    if name == "ravel":
        config.artifact_dir = where["artifacts_path"]
    results = module.run_eval(config, saes, args.device, str(folder / name), **where)
    return {
        key.removesuffix("_custom_sae"): flat(row["eval_result_metrics"])
        for key, row in results.items()
    }


def flat(metrics: dict) -> dict:
    """{group: {key: value}} as {key: value}."""
    return {key: value for group in metrics.values() for key, value in group.items()}


def evaluate(run: Path, args, options: dict) -> dict[tuple, dict]:
    """(eval, SAE) -> its figures, of one run."""
    from sae_lens import SAE

    told = saeft.sae_settings(str(run))
    place = os.path.expanduser(model_loaders.MODELS.get(told["model"], told["model"]))
    options["model"] = Path(place).name
    folders = {f"{run.name} before": run / "before", f"{run.name} after": run}
    if not (run / "before" / "cfg.json").exists():
        folders = {run.name: run}
    figures = {}
    with tempfile.TemporaryDirectory() as scratch, models_from(place):
        for name in args.evals:
            print(f"{run}: {name}", file=sys.stderr, flush=True)
            saes = [(label, SAE.load_from_disk(path)) for label, path in folders.items()]
            with open(args.out / "log.txt", "a") as log, contextlib.ExitStack() as quiet:
                quiet.enter_context(contextlib.redirect_stdout(log))
                quiet.enter_context(contextlib.redirect_stderr(log))
                if name == "core":
                    results = core(saes, args, options, Path(scratch))
                else:
                    results = others(name, saes, args, options, Path(scratch))
            if results.keys() != folders.keys():  # core reports errors in its log alone
                raise UserError(f"{name} failed for {run}: {args.out / 'log.txt'} says why")
            figures.update({(name, label): row for label, row in results.items()})
    return figures


def table(figures: dict[tuple, dict]) -> str:
    """Rows of ROWS, a column for each SAE, before them that of the model without an SAE."""
    labels = list(dict.fromkeys(label for _, label in figures))
    widths = [max(len(label), 8) + 2 for label in labels]
    lines = [f"{'':38}{'no SAE':>8}" + "".join(f"{n:>{w}}" for n, w in zip(labels, widths))]
    for name in dict.fromkeys(name for name, _ in figures):
        for key, words in ROWS[name].items():
            rows = [figures.get((name, label), {}) for label in labels]
            model = next((r[OF_MODEL[key]] for r in rows if OF_MODEL.get(key) in r), None)
            cells = [(model, 8), *zip((row.get(key) for row in rows), widths)]
            line = f"{name.replace('_', ' '):16}{words:22}"
            lines.append(line + "".join(f"{'' if v is None else f'{v:.4f}':>{w}}" for v, w in cells))
    return "\n".join(lines)


# ---- The command line ---------------------------------------------------------------------------
def parse(argv: list[str] | None):
    parser = saeft.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs or of SAEs")
    parser.add_argument("--evals", nargs="+", choices=EVALS, help="default: all, or all but ravel")
    parser.add_argument("--data", type=Path, help="labelled text: a subfolder or file a class")
    parser.add_argument("--make-data", type=Path, help="write such text, from the shipped text")
    parser.add_argument("--batches", type=int, default=50, help="of core, 16 x 128 tokens each")
    parser.add_argument("--batch", type=int, default=32, help="sequences in a forward pass")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/saebench"), help="table and log")
    args = parser.parse_args(argv)
    if not (args.runs or args.make_data):
        raise UserError("give a run's folder, or --make-data FOLDER")
    args.evals = args.evals or [n for n in EVALS if n != "ravel" or not args.data]
    if args.data and "ravel" in args.evals:
        raise UserError("--evals ravel has its own text: leave out --data")
    args.device = str(saeft.find_device(args.device))
    return args


def main(argv: list[str] | None = None) -> int:
    try:
        args = parse(argv)
        if args.make_data:
            make_data(args.make_data)
        if not args.runs:
            return 0
        try:
            import sae_bench  # noqa: F401
        except ImportError as error:
            raise UserError(f"this needs SAEBench: pip install sae-bench ({error})") from None
        args.out.mkdir(parents=True, exist_ok=True)
        options = use_texts(read_classes(args.data), args.out) if args.data else {}
        figures = {}
        for run in args.runs:
            figures.update(evaluate(run, args, options))
        text = table(figures)
        model_loaders.write_text(args.out / "table.txt", text + "\n")
        print(text)
    except UserError as error:
        print(f"saebench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
