"""saeft against references that nobody here wrote: transformers, tokenizers, sentencepiece,
safetensors, the real Hub client on a loopback server, torch's autograd in float64 and its Adam.

Whole runs come first and can be read as a tutorial; then the method and the models, the CUDA branch
on simulated tensors, and last what touches disk and network. Two variables add tests on real
files: SAEFT_GEMMA3, a folder of Gemma 3 270M, and SAEFT_VOCABULARIES, one with
gemma2/tokenizer.json and gemma3/tokenizer.json. experiments/test_experiments.py tests the rest.
"""

import copy
import functools
import gzip
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from dataclasses import fields, make_dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, ByteLevelBPETokenizer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

import model_loaders
import saeft
from model_loaders import TokenStream, UserError, flag, held_out
from saeft import SAE, BatchTopK, Config, Phase, ReLU, SlicedLoss, SparseRows, TopK, Trainee

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)


# ---- Whole runs, from the command line -----------------------------------------------------------
HERE = Path(saeft.__file__).parent
HOMES = ["HOME", "XDG_CACHE_HOME", "HF_HOME", "HYPOTHESIS_STORAGE_DIRECTORY"]
SMALL = (
    "--tokens 12k --kl-tokens 5k --eval-tokens 2k --context 64 --d-sae 64 --k 4 --batch 256"
    " --kl-batch 2 --buffer 40 --warmup 5 --log-every 5"
)


@pytest.fixture(autouse=True, scope="session")
def no_home(tmp_path_factory):
    """Caches and the home are temporary folders, for the processes that tests start too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in HOMES:
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        yield


@pytest.fixture(autouse=True)
def as_it_was():
    """A run gives back the handlers of signals."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    assert all(signal.getsignal(number) == handler for number, handler in handlers.items())


def documents(data):
    return [text for text, *_ in model_loaders.pieces(data)]


def command(line, out, settings=Config, sizes=SMALL):
    """saeft.py's exit status for a command line, with runs in `out`."""
    return saeft.main([*sizes.split(), *line.split(), "--out", str(out)], settings)


@pytest.fixture
def refused(tmp_path, capsys):
    """A call with a command line, which gets status 2 and one line that has the words."""

    def call(line, *words, out=tmp_path, sizes=SMALL):
        capsys.readouterr()
        assert command(line, out, sizes=sizes) == 2
        printed, error = capsys.readouterr()
        assert error.count("\n") == 1 and error.startswith("saeft: ")
        assert all(word in error for word in words), error
        return printed, error

    return call


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def weights_of(folder):
    return (folder / "sae_weights.safetensors").read_bytes()


MAY_DIFFER = rb'"(seconds|resume|out|name|checkpoint_minutes)": ("[^"]*"|{[^}]*}|[^,}\n]*)'


def snapshot(folder):
    """What stands in a folder, by path: content of files, None for all else."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def content_of(folder):
    """All files of a run's folder, by path, without the JSON that may differ."""
    files = [(str(path.relative_to(folder)), found) for path, found in snapshot(folder).items()]
    return {name: re.sub(MAY_DIFFER, b"", found) for name, found in files if found is not None}


def differences(a, b):
    """Names of what differs between two runs' folders."""
    one, other = content_of(a), content_of(b)
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


def in_a_process(target, *args):
    """A call in a process of its own, forked from one that has imported all this."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_saeft"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def test_what_a_run_leaves(tmp_path, capsys):
    assert command("--name a --method kl mse", tmp_path) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "a"

    # config.json: every setting, defaults and presets included.
    settings = json.loads((folder / "config.json").read_text())
    assert settings["k"] == [4] and settings["layer"] == 2 and settings["kl_tokens"] == 5_000

    # metrics.jsonl: a line every --log-every steps, and at the end of each phase.
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name, steps, tokens in ("MSE", 27, 256), ("kl", 39, 128), ("mse", 39, 128):
        of_phase = [line for line in lines if line["phase"] == name]
        assert [line["step"] for line in of_phase] == [*range(5, steps, 5), steps]
        assert of_phase[-1]["tokens"] == steps * tokens
    for line in lines:
        assert 0 < line["fvu"] < 2 and line["l0"] == pytest.approx(4, abs=0.01)
        if line["phase"] == "kl":
            assert line["beta"] * line["kl"] == pytest.approx(line["mse"], rel=1e-4)

    # report.json: the settings again, and what each phase came to.
    report = report_of(folder)
    results, before = report["results"], report["results"]["MSE"]
    assert (report["layer"], report["seed"], {*report["seconds"]}) == (2, 0, {"MSE", "kl", "mse"})
    assert report["ce_original"] < report["ce"] < before["ce"] < report["ce_zero"]
    assert before["gap"] == pytest.approx(before["ce"] - report["ce_original"])
    assert report["gap_closed"] == pytest.approx(1 - report["gap"] / before["gap"])
    assert results["kl"]["ce"] == report["ce"] and results["mse"]["fvu"] < before["fvu"]

    # The closing table shows them, and nothing went to stderr.
    rows = out.splitlines()[-5:]
    names = ["original model", "x replaced by 0", "after MSE", "after KL+MSE"]
    names.append("after MSE alone, same tokens")
    assert [row.split("  ")[0] for row in rows] == names and err == ""
    assert f"{report['ce']:.4f}" in rows[3] and f"{report['gap_closed']:.1%}" in rows[3]

    # Three SAEs for raw activations: after KL+MSE, of phase one, the control.
    tokens = torch.randint(200, (4, 64), generator=torch.Generator().manual_seed(0))
    x = saeft.load_lm("tiny").prefix(tokens, 2).flatten(0, 1)
    left = {".saeft", "config.json", "metrics.jsonl", "report.json"}
    for part in ("", "before/", "mse/"):
        left |= {f"{part}cfg.json", f"{part}sae_weights.safetensors"}
        cfg = json.loads((folder / part / "cfg.json").read_text())
        assert cfg["d_sae"] == 64 and cfg["metadata"]["hook_name"] == "blocks.2.hook_resid_post"
        x_hat, f = SAE.load(folder / part)(x)
        assert f.counts().sum() == 4 * len(x) and (x - x_hat).pow(2).sum() < 0.9 * x.pow(2).sum()
    assert {*content_of(folder)} == left


def test_the_same_seed_gives_the_same_run_whatever_is_logged_or_trained_beside_it(tmp_path):
    dead = "--dead-after 1k"  # AuxK takes part
    for name, line in {
        "a": "--method kl",
        "b": "--method mse kl --log-every 1 --checkpoint-minutes 0.001",
        "k": "--method kl mse --k 8 4 --log-every 1000",
        "other": "--method kl --seed 1",
    }.items():
        assert command(f"--name {name} {dead} {line}", tmp_path) == 0
    a, b, k = tmp_path / "a", tmp_path / "b", tmp_path / "k"
    assert weights_of(a / "before") == weights_of(b / "before") == weights_of(k / "k4" / "before")
    assert weights_of(a) == weights_of(b / "kl") == weights_of(k / "k4")  # `b` and `k/k4` hold ...
    assert weights_of(b) == weights_of(k / "k4" / "mse")  # ... the first of --method
    results = [report_of(folder)["results"]["kl"] for folder in (a, b, k / "k4")]
    assert results[0] == results[1] == results[2]
    assert report_of(k / "k8")["l0"] > 4 == report_of(a)["l0"]
    assert weights_of(tmp_path / "other") != weights_of(a)


@pytest.mark.parametrize("kind", ["topk", "relu", "batchtopk"])
def test_kinds_of_sae_ways_to_train_and_start(tmp_path, capsys, kind):
    assert command(f"--sae {kind} --name both", tmp_path) == 0
    assert command(f"--sae {kind} --tokens 7k --kl-tokens 0 --name alone", tmp_path) == 0
    assert command(f"--sae {kind} --kl-tokens 12k --name end", tmp_path) == 0
    both, alone, end = (report_of(tmp_path / name) for name in ("both", "alone", "end"))
    before = both["results"]["MSE"]["ce"]
    assert both["ce"] != before == alone["ce"] and alone["gap_closed"] is None
    assert weights_of(tmp_path / "alone") == weights_of(tmp_path / "both" / "before")
    # End to end there is no phase one, and no gap to close a share of.
    assert end["gap_closed"] is None and end["ce"] < end["results"]["MSE"]["ce"]
    assert "at the random start" in capsys.readouterr().out
    assert not (tmp_path / "end" / "before" / "cfg.json").exists()

    # --start on a run's own before/ goes on as that run did: model, layer, data, K from the SAE.
    small = "--kl-tokens 5k --eval-tokens 2k --kl-batch 2 --log-every 5 --method kl"
    line = f"--start {tmp_path / 'both' / 'before'} --name again"
    assert command(line, tmp_path, sizes=small) == 0
    again = report_of(tmp_path / "again")
    for part in ("MSE", "kl"):  # the gap and shares of it are as exact as the CEs they come from
        one, other = (report["results"][part] for report in (both, again))
        for name in one.keys() - {"gap", "gap_closed", "loss_recovered"}:
            assert other[name] == pytest.approx(one[name], rel=2e-4), name
    assert "as loaded" in capsys.readouterr().out
    a, b = (SAE.load(tmp_path / name).state_dict() for name in ("both", "again"))
    torch.testing.assert_close(dict(b), dict(a), rtol=1e-3, atol=1e-4)


def test_an_sae_tells_all_data_that_it_has_seen(tmp_path, capsys, monkeypatch):
    """A start on other data forgets nothing, and the SAE that it started from stays what it was."""
    other = put(tmp_path, {"other.jsonl": jsonl(texts(3000, 100))}) / "other.jsonl"
    small = "--kl-tokens 1k --eval-tokens 640 --kl-batch 2 --method kl"
    assert command("--kl-tokens 0 --name x", tmp_path) == 0
    assert command(f"--start {tmp_path / 'x'} --data {other} --name y", tmp_path, sizes=small) == 0
    assert capsys.readouterr().out.count("note: the data, ") == 1
    paths = tmp_path / "x", tmp_path / "y" / "before", tmp_path / "y"
    first, before, both = (model_loaders.sae_cfg(path)["seen"] for path in paths)
    assert before == first and both.items() > first.items()
    assert [*first.values()] == [[187, 64]] and [*both.values()] == [[187, 64], [15, 64]]
    asked = []
    train = TokenStream.train
    monkeypatch.setattr(TokenStream, "train", lambda s, *at: asked.append(at) or train(s, *at))
    same = f"--start {paths[2]} --data tiny --name z"
    assert command(f"{same} --overwrite", tmp_path, sizes=small.replace("1k", "0")) == 0
    assert model_loaders.sae_cfg(tmp_path / "z")["seen"] == both  # that was evaluated alone
    assert command(f"{same} --overwrite", tmp_path, sizes=small) == 0
    assert "note: the data" not in capsys.readouterr().out and asked[-1] == (187 + 12, 2)


TOLD = {"model_name": "tiny", "hook_name": "blocks.2.hook_resid_post", "dataset_path": "tiny"}
TOLD.update(context_size=64, prepend_bos=False)


def test_start_takes_lambda_and_says_what_it_cannot_mean(tmp_path, capsys, monkeypatch, refused):
    """Lambda is raw, end to end too, where there is no L0 to go back to; --l1 that of x / scale."""
    run = a_run(tmp_path, "--sae relu --kl-tokens 12k --l1 0.3 --name own")
    run.run()
    scale, own = float(run.done.scale), f"--start {tmp_path / 'own'} --kl-tokens 5k"
    assert scale > 1 and float(SAE.load(tmp_path / "own").l1) == pytest.approx(0.3 * scale)
    first = []
    with monkeypatch.context() as patch:
        patch.setattr(saeft, "finetune", lambda phase, *_: first.append(phase.trainees[0].sae.l1))
        for flags, l1 in ("", 0.3), ("--l1 0.2", 0.2):
            line = f"{own} --eval-tokens 2k --name y --overwrite {flags}"
            assert command(line, tmp_path, sizes="") == 0
            assert float(first.pop()) == pytest.approx(l1 * scale, rel=0.02)

    before = weights_of(tmp_path / "own")
    TopK(64, 96, k=4).save(tmp_path / "narrow", TOLD)
    off = saeft.ReLU(128, 96)
    off.b_enc.data -= 1e4
    off.save(tmp_path / "off", TOLD)
    for flags, words in {
        "--name x --tokens 1M": "--tokens: with --start",
        "--name x --context 1": "--context 1 is not from 3",
        "--name x --k 4": "--k [4]: the SAE of --start has [0]",
        f"--name x --start {tmp_path / 'narrow'}": "--start: width 64; tiny has 128",
        "--name own --overwrite": "lies in this run's own folder",  # which would clear it
        f"--name own --overwrite --start {tmp_path / 'own/mse'}": "lies in this run's own",
        f"--name no-latent --start {tmp_path / 'off'} --eval-tokens 1k": "no latent of the SAE fires",
    }.items():
        refused(f"{own} {flags}", words, sizes="")
    assert weights_of(tmp_path / "own") == before and not (tmp_path / "x").exists()
    config = saeft.parse(own.split())
    assert (config.l1, config.sae, config.tokens) == (None, "relu", 5000)
    saeft.check(saeft.parse(["--sae", "relu", "--d-sae", "8"]))  # K, 16, is of no use
    assert saeft.parse([*own.split(), "--kl-tokens", "0"]).tokens == 1

    def told(line):
        capsys.readouterr()
        saeft.parse(line.split())
        return capsys.readouterr().out

    for flags, words in ("relu --k 4", "--k"), ("topk --l1 4", "--l1"):
        note = f"note: a {flags[:4]} SAE trained so has no use of {words}\n"
        assert told(f"--sae {flags}") == note
    assert told("--sae batchtopk --k 4") == ""
    note = "note: a topk SAE trained so has no use of --batch\n"
    assert told("--sae topk --batch 9 --lr 1 --tokens 8k --kl-tokens 8k") == note
    note = "note: a relu SAE trained so has no use of --batch, --lr"
    assert note in told(f"{own} --batch 9 --lr 1")
    published = saeft.JumpReLU(128, 96)
    for last, notes in (0.5, 1), (0.6, 0):
        published.threshold.copy_(torch.tensor([0.5] * 95 + [last]))
        published.save(tmp_path / f"{last}", TOLD)
        note = "has one threshold for all latents"
        assert told(f"--start {tmp_path / f'{last}'}").count(note) == notes


def test_batchtopk_of_200_steps_is_evaluated_at_its_k(tmp_path):
    line = (
        "--sae batchtopk --k 4 16 --layer 5 --tokens 153600 --kl-tokens 102400 --eval-tokens 30k"
        " --kl-batch 8 --method kl"
    )
    assert command(f"{line} --name x", tmp_path) == 0
    for k in (4, 16):
        results = report_of(tmp_path / "x" / f"k{k}")["results"]
        # Held-out text is other text than that of the last steps: 0.5 to 5.5% off.
        assert [row["l0"] for row in results.values()] == pytest.approx([k, k], rel=0.07)
    assert command("--sae batchtopk --lr 1 --name y", tmp_path) in (0, 2)  # no latent fires


def test_a_fork_whose_training_cannot_be_is_told(tmp_path, monkeypatch, refused):
    """A kind without b_enc is as good as any. A loss may be finite and its gradient not."""
    monkeypatch.setitem(saeft.KINDS, "bare", None)

    class Bare(SAE, kind="bare"):
        numbers, scaled = (), ("b_dec",)

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            del self.b_enc

        def encode(self, x, keep=None):
            f = ((x - self.b_dec) @ self.W_enc.T).relu()
            return f if keep is None else f * keep[:, None]

    assert command("--sae bare --name x", tmp_path) == 0
    line = f"--start {tmp_path / 'x'} --kl-tokens 0 --eval-tokens 2k --name again"
    assert command(line, tmp_path, sizes="") == 0
    assert report_of(tmp_path / "again")["ce"] == pytest.approx(report_of(tmp_path / "x")["ce"])
    monkeypatch.setitem(saeft.METHODS, "below", lambda lm, sae, config: Trainee(sae, lm, below))
    refused("--sae bare --method below --name y", "a divergence is below 0 on average")
    Bare.penalty = lambda self, x, x_hat, f, weight, done: (f * (f > 0.1)).sqrt().sum()
    refused("--sae bare --name z", "loss or gradient is not finite")


def below(log_p, log_q, next_token):
    return -saeft.kl_divergence(log_p, log_q, next_token)


def test_a_fork_adds_its_own_by_name(tmp_path, capsys, monkeypatch, refused):
    """A kind, a method, a place and a family of somebody else's, each by a name of its own."""
    for names in (saeft.KINDS, saeft.METHODS, saeft.PLACES, saeft.FAMILIES):
        monkeypatch.setitem(names, "mine", None)

    class Gated(TopK, kind="mine"):
        """TopK with a gate, a parameter of its own."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.gate = torch.nn.Parameter(torch.tensor(1.0))

        def encode(self, x, keep=None):
            return super().encode(x, keep) * self.gate.expand(len(self.b_enc))

    def mlp_out(lm, tokens, layer):
        resid, before = lm.prefix(tokens, layer), lm.prefix(tokens, layer - 1)
        return resid, lm.blocks[layer].mlp(lm.blocks[layer].post_attention_layernorm(before))

    saeft.METHODS["mine"] = lambda lm, sae, config: Trainee(sae, lm, reverse_kl)
    saeft.PLACES["mine"] = mlp_out
    saeft.FAMILIES["mine"] = type("Mine", (saeft.Pythia,), {})
    model = model_folder(tmp_path / "model", model_type="mine")
    line = f"--model {model} --layer 2 --data tiny --sae mine --method mine --place mine --name x"
    assert command(line, tmp_path) == 0
    report, sae = report_of(tmp_path / "x"), SAE.load(tmp_path / "x")
    before = report["results"]["MSE"]
    assert report["kl"] < before["kl"] and before["ce"] < report["ce_zero"]
    assert type(sae) is Gated and sae.gate not in (0, 1) and Gated.architecture == "mine"
    cfg = json.loads((tmp_path / "x" / "cfg.json").read_text())
    assert cfg["metadata"]["hook_name"] == "blocks.2.hook_mine"
    for name in ("before", "MSE", "..", "report.json"):  # which are others', or no folder's
        with monkeypatch.context() as patch:
            patch.setitem(saeft.METHODS, name, saeft.METHODS["mse"])
            assert command("--name y", tmp_path) == 2
    assert saeft.parse(["--start", str(tmp_path / "x")]).place == "mine"
    # --help and refusals list what there is.
    with pytest.raises(SystemExit):
        saeft.main(["--help"])
    words = capsys.readouterr().out
    for name, names in [("sae", "KINDS"), ("method", "METHODS"), ("place", "PLACES")]:
        known = getattr(saeft, names)
        assert f"{{{','.join(known)}}}" in words and "mine" in known
        refused(f"--{name} x", "mine")
    fails(["mine"], saeft.build_lm, {"model_type": "x"})
    # A parameter of one's own is saved, and asked for where the fork is not imported.
    sae.gate.data.fill_(3.0)
    sae.save(tmp_path / "own", TOLD)
    assert SAE.load(tmp_path / "own").gate == 3.0
    Gated.architecture = "topk"  # whose f it has, but it trains otherwise
    sae.save(tmp_path / "other", TOLD)
    cfg = json.loads((tmp_path / "other" / "cfg.json").read_text())
    for kind, told in ("mine", 0), ("theirs", 1), ("topk", 0):
        cfg["metadata"]["saeft"]["kind"] = kind
        (tmp_path / "other" / "cfg.json").write_text(json.dumps(cfg))
        saeft.parse(["--start", str(tmp_path / "other")])
        assert capsys.readouterr().out.count("is of a fork's kind, 'theirs'") == told
    del saeft.KINDS["mine"]
    refused(f"--start {tmp_path / 'own'} --name y", "architecture 'mine'", sizes="")
    assert not (tmp_path / "y").exists()


# ---- The README ---------------------------------------------------------------------------------
README = (HERE / "README.md").read_text(encoding="utf-8")


def test_every_block_of_python_in_the_readme_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        env = {**os.environ, "PYTHONPATH": str(HERE)}
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=env, timeout=120)
        assert done.returncode == 0, block


def test_every_command_in_the_readme_is_one():
    text = README.replace("\\\n", " ")
    commands = re.findall(r"^(?:python|torchrun[^\n]*?) ([\w/]+\.py)([^\n#]*)", text, re.M)
    commands += re.findall(r"`(?:python |torchrun [^`]*?)?([\w/]+\.py)([^`]*)`", text)
    assert len(commands) > 8
    flags = {f"--{f.name.replace('_', '-')}" for f in fields(Config)}
    for script, rest in commands:
        path = next((p for p in (HERE / script, HERE / "experiments" / script) if p.exists()), None)
        assert path or (HERE / "experiments/forks" / script).exists(), script
        source = path.read_text(encoding="utf-8") if path else ""
        for name in re.findall(r"--[a-z][a-z0-9-]*", rest):
            assert name in flags or f'"{name}"' in source, (script, name)
    listed = re.findall(r"^(--[a-z0-9-]+) ", README, re.M)
    assert sorted(listed) == sorted(flags)  # the table has every flag, and no other
    targets = {name for name in re.findall(r"`?make (\w+)", README)}
    makefile = (HERE / "Makefile").read_text()
    assert targets and all(f"\n{name}:" in makefile for name in targets), targets


# ---- Mistakes: one line, status 2, and nothing is left behind ------------------------------------
MISTAKES = {
    "k above F": ("--k 65", "--k [65]"),
    "several K for none": ("--sae relu --k 4 8", "--k [4, 8]: relu SAEs have no K"),
    "layer too high": ("--layer 6", "--layer 6: tiny has layers 0 to 5"),
    "kl-tokens above tokens": ("--kl-tokens 50k", "--kl-tokens 50000"),
    "kl-tokens below a step": ("--kl-tokens 100", "--kl-tokens 100"),
    "batch above the tokens": ("--batch 50k", "--batch 50000"),
    "no number": ("--tokens 5x", "5x"),
    "half a token": ("--tokens 1.5", "1.5"),
    "no tokens": ("--tokens 0", "--tokens 0"),
    "unknown kind": ("--sae cubic", "cubic"),
    "a kind that does not train": ("--sae jumprelu", "--sae jumprelu is for --start"),
    "unknown flag": ("--colour red", "--colour"),
    "shortened flag": ("--overw", "--overw"),
    "no such card": ("--device cuda:99", "--device cuda:99"),
    "a device that holds no numbers": ("--device meta", "--device meta"),
    "a place called otherwise": ("--place out", "--place out: SAEs call it (2, 'resid_post')"),
    "no model": ("--model pythia-161m", "pythia-161m"),
    "no data": ("--data /nowhere/at/all", "/nowhere/at/all"),
    "empty data": ("--data=", "--data is empty"),
    "two ways to go on": ("--resume --overwrite", "give one"),
    "more than there is": ("--tokens 90M", "90,000,000"),
    "context beyond the model": ("--context 4k", "--context 4000 is above the model's 512"),
    "lr nan": ("--lr nan", "--lr nan"),
    "seed 1e30": ("--seed 1e30", "--seed"),
    "d-sae 1e15": ("--d-sae 1e15", "--d-sae"),
    "one activation in a step": ("--batch 1", "--batch 1 "),
    "everything a sink": ("--sink-norm 0.001", "--sink-norm"),
    "everything a sink, end to end": ("--sink-norm 0.001 --kl-tokens 12k", "--sink-norm"),
    "minutes negative": ("--checkpoint-minutes=-1", "--checkpoint-minutes"),
    "rate too high": ("--lr 1e18", "not finite"),
    "no SAE": ("--start /nowhere", "/nowhere"),
    "no SAE of nobody": ("--start ~nobody/x", "'~nobody/x' has no cfg.json"),
    "a rate that is not used": ("--kl-lr 1 --tokens 5k --kl-tokens 5k", "the rate is --lr"),
    "no token with a next one": ("--context 2 --bos yes", "--context 2 is not from 3"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("line, words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_line_and_status_2(tmp_path, refused, monkeypatch, line, words):
    monkeypatch.setitem(saeft.PLACES, "out", saeft.resid_post)
    _, error = refused(f"{line} --name x", words, out=tmp_path / "runs")
    assert len(error) < 600
    assert not list(tmp_path.rglob("*x*"))


NO_RUNS = [("runs", name, f"--name {name}") for name in ("..", ".", "", "/tmp/x", "a/b")]
NO_RUNS += [(out, "x", "cannot write") for out in ("file", "file/no", "dangling", "/proc/nothing")]
NO_RUNS += [("runs", "n" * 300, "cannot write")]
NO_RUNS += [("", name, "no run's folder") for name in ("model", "project", "link")]


@pytest.mark.parametrize("out, name, words", NO_RUNS)
def test_what_is_no_runs_folder_is_left_alone_and_no_model_loaded(
    tmp_path, refused, out, name, words
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "x")
    model_folder(tmp_path / "model")  # has a config.json, as a run has
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "runs").mkdir()
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "report.json").write_text("{}")
    before = snapshot(tmp_path)
    for flags in ("", "--overwrite", "--resume"):
        printed, _ = refused(f"--name={name} {flags}", words, out=tmp_path / out)
        assert "loading the model" not in printed
        assert snapshot(tmp_path) == before


def test_a_tilde_in_out_is_the_home():
    assert a_run("~/runs", "--name x").folder.path == Path(os.environ["HOME"]) / "runs" / "x"


def model_folder(folder, tensors=dict, **changes):
    """A copy of the embedded model, with other tensors, and other settings in its config.json."""
    shutil.copytree(model_loaders.TINY, folder, ignore=shutil.ignore_patterns("text*"))
    edit(folder, tensors, **changes)
    return folder


def test_models_that_cannot_be_are_told_before_training(tmp_path, refused):
    def fewer_rows(tensors):
        return {name: t[:1000].clone() if len(t) == 2048 else t for name, t in tensors.items()}

    # Documents with other ids are left out, and of this text that is all.
    few = model_folder(tmp_path / "few", fewer_rows, vocab_size=1000)
    beside = model_folder(tmp_path / "beside")
    (beside / "adapter_config.json").write_text("{}")
    for model, words in {
        few: ["0 validation tokens", "give more text"],
        beside: ["has an adapter beside the model"],
    }.items():
        refused(f"--model {model} --data tiny --layer 2 --name x", *words, out=tmp_path / "runs")
        assert not (tmp_path / "runs" / "x").exists()


# ---- No file and no work lost --------------------------------------------------------------------
def test_overwrite_replaces_a_run_and_keeps_what_a_run_did_not_write(tmp_path, refused):
    assert command("--k 4 8 --name x --method kl mse", tmp_path) == 0
    folder = tmp_path / "x"
    mine = ["notes.txt", "before/model.bin", "k8/plot.png", "k16/thesis.tex", "data/metrics.jsonl"]
    mine = [folder / name for name in (*mine, ".hidden")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = snapshot(folder)
    # Without the flag, or if model or data are not there or too small, the old run stays as it was.
    refused("--k 4 8 --name x", "--overwrite")
    late = ["--sink-norm 0.001", "--eval-tokens 9M"]  # told when all is loaded
    for line in ("--context 100k", "--data /nowhere", "--model /nowhere", *late):
        refused(f"--k 4 8 --name x --overwrite {line}")
        assert snapshot(folder) == before, line
    # One that succeeds takes its place: nothing of the old run is left, all of the user's is.
    assert command("--name x --overwrite --seed 1", tmp_path) == 0
    assert [path.read_text() for path in mine] == ["mine"] * len(mine)
    left = [path for path in snapshot(folder) if path not in mine]
    assert not [path for path in left if path.parent.name in ("k4", "k8")]
    assert report_of(folder)["seed"] == 1


def test_what_was_finished_is_kept_when_a_later_phase_fails(tmp_path, monkeypatch, refused):
    line = "--method kl mse --name"
    assert command(f"{line} whole", tmp_path) == 0
    refused("--name x --kl-lr 1e18", "kl, step ", "loss or gradient is not finite")
    before = weights_of(tmp_path / "whole" / "before")
    assert weights_of(tmp_path / "x" / "before") == before
    assert not (tmp_path / "x" / "cfg.json").exists()  # no SAE that was not finished

    # The disk is full in the second method: the SAEs of phase one and of the first stay.
    with monkeypatch.context() as patch:
        full = Mock(side_effect=UserError("No space left on device"))
        patch.setitem(saeft.METHODS, "mse", lambda lm, sae, config: Trainee(sae, lm, full))
        refused(f"{line} y", "No space left")
    assert weights_of(tmp_path / "y" / "before") == before
    assert weights_of(tmp_path / "y") == weights_of(tmp_path / "whole")
    refused(f"{line} y", "--resume")  # and says how to go on
    assert command(f"{line} y --resume", tmp_path) == 0
    assert differences(tmp_path / "whole", tmp_path / "y") == []


def test_a_figure_that_is_not_finite_is_no_result(tmp_path, refused):
    """The last step's rate was too high; a model overflows behind the SAE's layer."""
    refused(
        "--name x --kl-tokens 128 --kl-lr 1e18", "CE nan: it is damaged, or its rate was too high"
    )
    name = "gpt_neox.layers.4.mlp.dense_4h_to_h.weight"
    model = model_folder(tmp_path / "model", lambda t: t | {name: t[name].float() * 1e38})
    line = f"--model {model} --layer 2 --data tiny --kl-tokens 0 --name y"
    refused(line, "own CE is not finite: a damaged model")
    assert not list(tmp_path.rglob("report.json"))


def test_a_resumed_run_must_be_the_same_run(tmp_path, capsys, monkeypatch, refused):
    # Stopped by a signal in phase one, at step 7 ...
    after_step = saeft.Run.after_step

    def stop(self, phase, figures):
        if phase.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(self, phase, figures)

    line = "--k 4 8 --method kl --name"
    with monkeypatch.context() as patch:
        patch.setattr(saeft.Run, "after_step", stop)
        assert command(f"{line} x", tmp_path) == 143
    out, err = capsys.readouterr()
    assert err == "saeft: interrupted\n" and "note: no checkpoint" not in out
    assert "a checkpoint is saved: --resume goes on from step 7 of MSE" in out
    before = snapshot(tmp_path / "x")
    # ... the same command says that it is there, another one that it is another, and a file that
    # is damaged that it is.
    refused(f"{line} x", "unfinished run")
    refused(f"{line} x --resume --kl-lr 1e-3", "--kl-lr was None")
    assert snapshot(tmp_path / "x") == before
    (checkpoint,) = (tmp_path / "x").glob("checkpoint-*.pt")
    checkpoint.write_bytes(before[checkpoint][:5000])
    refused(f"{line} x --resume", "cannot read a checkpoint")
    for other in ([1], {}, {"config": 7}):
        torch.save(other, checkpoint)
        refused(f"{line} x --resume", "--overwrite")
    checkpoint.write_bytes(before[checkpoint])
    (tmp_path / "x" / ".checkpoint-0-9-0.pt.part").write_text("half, by a kill")
    # Killed after the first SAE's report, it goes on with the second's.
    report = saeft.Run.report

    def killed(self, i):
        report(self, i)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saeft.Run, "report", killed)
        assert command(f"{line} x --resume", tmp_path) == 130
    assert not (tmp_path / "x" / "k8" / "report.json").exists()
    assert command(f"{line} x --resume", tmp_path) == 0
    assert command(f"{line} y --resume", tmp_path) == 0  # there is nothing to resume
    assert "note: no checkpoint in" in capsys.readouterr().out
    assert differences(tmp_path / "x", tmp_path / "y") == []


def test_what_ends_a_run_is_a_line_or_a_traceback(tmp_path, monkeypatch, refused):
    """Too little memory is the user's to mend; so are torchrun's variables without torchrun."""
    with monkeypatch.context() as patch:
        for error in (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: allocate 2 GiB"),
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        ):
            patch.setattr(saeft.Run, "run", Mock(side_effect=error))
            refused("--name x", "out of memory: lower --batch")
        patch.setattr(saeft.Run, "run", Mock(side_effect=MemoryError))  # which says nothing
        refused("--name x", "out of memory: lower --batch")
        patch.setattr(saeft.Run, "run", lambda self: torch.zeros(2) @ torch.zeros(3))
        with pytest.raises(RuntimeError, match="size"):
            command("--name x", tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("RANK", raising=False)
    refused("--name x", "LOCAL_RANK is set")


# ---- Signals and streams, in processes of their own ----------------------------------------------
def spawn(line, cwd, launcher="", **options):
    """saeft.py in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    words = [*launcher.split(), str(HERE / "saeft.py"), *SMALL.split(), *line.split()]
    return subprocess.Popen([sys.executable, *words], cwd=cwd, env=env, **pipes)


def wait_for(path, process, text):
    """Until a file has a text; the process goes on."""
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None, process
        time.sleep(0.02)


LONG_RUN = "--kl-tokens 4k --tokens 1.6M --log-every 1"  # longer than any test waits


def test_ctrl_c_and_sigterm_end_in_a_checkpoint_and_one_line(tmp_path):
    """And meanwhile the folder is that process's; and a closed stdout ends nothing."""
    for number, status in [(signal.SIGINT, 130), (signal.SIGTERM, 143)]:
        name = f"x{status}"
        process = spawn(f"{LONG_RUN} --name {name} --out {tmp_path}", tmp_path)
        process.stdout.close()
        wait_for(tmp_path / name / "metrics.jsonl", process, '"step": 3,')
        if number == signal.SIGINT:
            with pytest.raises(UserError, match="in use"):
                model_loaders.RunFolder(tmp_path / name, []).take(False, True)
        process.send_signal(number)
        err = process.stderr.read().decode()
        assert process.wait(60) == status
        assert err == "saeft: interrupted\n"
        assert (tmp_path / name / "checkpoint").exists()


def test_an_ascii_locale_shows_other_names_escaped(tmp_path):
    env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    process = spawn("--name größe-κ --out .", tmp_path, env=env)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, b"")
    env["PYTHONOPTIMIZE"] = "2"  # no docstrings; nor a stdout
    line = f"{SMALL} --name größe-κ --overwrite --out ."
    words = ["bash", "-c", f"exec {sys.executable} {HERE / 'saeft.py'} {line} >&-"]
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, **env}, capture_output=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", b"")
    assert rb"gr\udc" in out and (tmp_path / "größe-κ" / "report.json").exists()
    assert b"\r" not in out and b"\033" not in out  # through a pipe: plain lines
    assert max(map(len, out.decode().splitlines())) <= 100


def test_on_a_terminal_of_80_columns_a_line_gives_way_to_the_next(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    model_loaders.progress("x" * 200)
    model_loaders.say("done")
    assert capsys.readouterr().out == "\r\033[K" + "x" * 79 + "\r\033[Kdone\n"


def test_no_network_and_nothing_cached_ends_in_one_helpful_line(tmp_path):
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    process = spawn("--model pythia-160m --d-sae 128", tmp_path, env=env)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2 and out == b"" and err.count(b"\n") == 1
    assert b"EleutherAI/pythia-160m" in err and b"--model tiny" in err


def test_a_cause_is_told_in_its_own_words():
    """torch says something else of a full disk, and some libraries no name of what they lack."""
    with pytest.raises(UserError, match="No space left"), model_loaders.user_errors("cannot write"):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64")
    for error, words in (ImportError("needs x"), "needs x"), (ImportError(name="y"), "install y"):
        with pytest.raises(UserError, match=words), model_loaders.user_errors("cannot"):
            raise error


def test_torchrun_runs_two_processes_and_resumes_after_a_kill(tmp_path):
    launcher = (
        "-m torch.distributed.run --nproc-per-node 2 --master-addr 127.0.0.1 --master-port 0"
        " --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 --"
    )

    options = {"stderr": subprocess.STDOUT, "start_new_session": True, "launcher": launcher}
    line = f"--method kl --out {tmp_path} --checkpoint-minutes 0 --name"
    process = spawn(f"{line} killed", tmp_path, **options)
    wait_for(tmp_path / "killed" / "metrics.jsonl", process, '"phase": "kl"')
    os.killpg(process.pid, signal.SIGKILL)
    subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)])  # in sessions of their own
    process.communicate()
    for name in ("killed --resume", "whole"):
        process = spawn(f"{line} {name}", tmp_path, **options)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out.decode()
        assert out.decode().count("original model") == 1  # one process speaks
    assert differences(tmp_path / "whole", tmp_path / "killed") == []
    report = report_of(tmp_path / "whole")
    assert report["gap"] < report["results"]["MSE"]["gap"]


# ---- An example to check by hand -----------------------------------------------------------------
# 2 latents, 3 tokens, D = 2: encoder and decoder are the identity, biases 0, and K = 1.


def hand_sae():
    sae = TopK(2, 2, k=1)
    sae.load_state_dict({"W_enc": torch.eye(2), "W_dec": torch.eye(2)}, strict=False)
    return sae


HAND_X = torch.tensor([[3.0, 1.0], [1.0, 2.0], [-1.0, -1.0]])


def test_by_hand_the_sae(fast):
    x_hat, f = hand_sae()(HAND_X)
    # Each token keeps its largest positive latent; the third has none.
    assert x_hat.tolist() == f.to_dense().tolist() == [[3, 0], [0, 2], [0, 0]]
    assert saeft.counts(f).tolist() == [1, 1] and f.sum() == 5
    # Squared errors are 1, 1 and 2. The mean of x is (1, 2/3), the squares around it sum to 38/3.
    assert (HAND_X - x_hat).pow(2).sum(-1).tolist() == [1, 1, 2]
    # Sequences of tokens are to be flattened first.
    fails(["shape [2, 3, 2]: give [N, D]"], hand_sae(), torch.stack([HAND_X, HAND_X]))


def test_by_hand_beta_and_kl():
    # p = (1/2, 1/2), q = (3/4, 1/4): KL = log(1/2) - (log(3/4) + log(1/4)) / 2 = log(4/3) / 2.
    identity = SimpleNamespace(W_U=torch.eye(2), unembed=lambda x: x)
    p, q = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]], requires_grad=True)
    (kl,) = SlicedLoss.apply(identity, [saeft.kl_divergence], torch.ones(1), torch.zeros(1), p, q)
    assert kl.item() == pytest.approx(math.log(4 / 3) / 2)
    (gradient,) = torch.autograd.grad(kl, q)
    assert gradient.tolist() == [pytest.approx([0.25, -0.25])]  # q - p


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_by_hand_a_step_of_phase_one(scale):
    # One step on the three tokens, rate 0.1. The loss is (1 + 1 + 2) / 3. Of W_dec[0] the gradient
    # is -2/3 f e = -2/3 * 3 * (0, 1) = (0, -2); nothing of it lies along (1, 0). All gradients
    # together have a norm above 1; Adam's first step is the rate times the sign.
    trainee, seen = Trainee(hand_sae(), divergence=None, decay=0.0), []
    buffer = SimpleNamespace(next_batch=lambda n: scale * HAND_X)
    phase = Phase("MSE", [trainee], 1, torch.tensor(9.0), scale, buffer=buffer)
    config = Config(lr=0.1, warmup=0, batch=3)
    saeft.train_mse(phase, config, lambda phase, figures: seen.extend(figures))
    expected = {"loss": 4 / 3, "l0": 2 / 3, "fvu": 4 / (38 / 3)}
    assert seen[0].pop("grad_norm") > 1
    assert {name: value.item() for name, value in seen[0].items()} == pytest.approx(expected)
    expected = F.normalize(torch.tensor([[1.0, 0.1], [0.1, 1.0]]), dim=-1)
    assert torch.allclose(trainee.sae.W_dec.data, expected, atol=1e-6)


# ---- Language models -----------------------------------------------------------------------------
SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_attention_heads=4)
NEOX = {**SIZES, "num_hidden_layers": 3}
GEMMA = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
GEMMA_2 = {**GEMMA, **CAPS, "num_hidden_layers": 4, "query_pre_attn_scalar": 24}
GEMMA_3 = {**GEMMA, "num_hidden_layers": 7, "query_pre_attn_scalar": 168}
FAMILIES = {
    "pythia": ("GPTNeoX", "GPTNeoXConfig", NEOX),
    "gemma2": ("Gemma2", "Gemma2Config", GEMMA_2),
    "gemma3": ("Gemma3", "Gemma3TextConfig", GEMMA_3),
}
TOKENS = torch.randint(96, (3, 20), generator=torch.Generator().manual_seed(0))


def reference(family, **changes):
    """A model of transformers, every parameter random: no bias is 0, no norm's weight 1."""
    name, config, settings = FAMILIES[family]
    config = getattr(transformers, config)(**{**settings, **changes}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    randomise(model, 3 if family == "gemma2" else 1)  # so that it reaches the soft caps
    return model


def randomise(model, gain=1):
    for p in model.parameters():
        if p.dim() > 1:
            p.data = gain * p.shape[-1] ** -0.5 * torch.randn_like(p)
        else:
            p.data += 0.3 * torch.randn_like(p)


def random_lm(config):
    """A frozen model of ours, with random weights."""
    lm = saeft.build_lm(config).to_empty(device="cpu").requires_grad_(False)
    for p in lm.parameters():
        p.normal_(std=p.shape[-1] ** -0.5)
    return lm.eval()


def edit(folder, tensors=dict, drop=(), **changes):
    """Rewrites what save_pretrained wrote: a function of the tensors; keys of config.json."""
    path, weights = folder / "config.json", folder / "model.safetensors"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps({**config, **changes}))
    safetensors.save_file(tensors(safetensors.load_file(weights)), weights, {"format": "pt"})


@pytest.fixture(autouse=True)
def seed():
    torch.set_grad_enabled(True)  # SAEBench leaves it off
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(params=FAMILIES)
def lm(request, tmp_path):
    reference(request.param).save_pretrained(tmp_path)
    return saeft.load_lm(str(tmp_path))


def assert_close(ours, theirs, tolerance=1e-5):
    """max|a - b| / max|b| is below the tolerance."""
    assert ours.shape == theirs.shape
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error < tolerance, f"relative error {error}"


def as_read(folder):
    """The model that transformers reads in a folder."""
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@torch.no_grad()
def compare(model, folder, tokens=TOKENS, tolerance=1e-5, **load):
    """Logits and each block's resid_post equal transformers'; prefix and suffix make the whole."""
    ours, theirs = saeft.load_lm(str(folder), **load), model(tokens, output_hidden_states=True)
    logits = ours(tokens)
    assert_close(logits, theirs.logits, tolerance)
    hidden = theirs.hidden_states[1:-1]
    assert len(hidden) == len(ours.blocks) - 1
    for layer in (-2, len(ours.blocks)):
        fails([f"there is no block {layer}"], ours.prefix, tokens, layer)
        fails([f"there is no block {layer}"], ours.suffix, logits, layer)
    for layer, block in enumerate([*hidden, None]):
        resid = ours.prefix(tokens, layer)
        assert torch.equal(ours.unembed(ours.suffix(resid, layer)), logits)
        if block is not None:  # transformers gives the last one after the final norm
            assert_close(resid, block, tolerance)


def rope(theta, **more):
    return {"rope_type": "default", "rope_theta": theta, **more}


FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}
PYTHIA_160M = dict(vocab_size=50304, hidden_size=768, intermediate_size=3072)
PYTHIA_160M.update(num_hidden_layers=12, num_attention_heads=12)
VARIANTS = {
    "pythia": ("pythia", {}),
    "pythia-sequential": ("pythia", {"use_parallel_residual": False}),
    "pythia-gelu-fast": ("pythia", {"hidden_act": "gelu_fast"}),  # GPT-NeoX 20B
    "pythia-tied": ("pythia", {"tie_word_embeddings": True}),
    "pythia-rotary-half": ("pythia", {"rope_parameters": rope(1e4, partial_rotary_factor=0.5)}),
    "pythia-rotary-all": ("pythia", {"rope_parameters": rope(100.0, partial_rotary_factor=1.0)}),
    "pythia-linear": ("pythia", {"rope_parameters": {**LINEAR, "partial_rotary_factor": 1.0}}),
    "pythia-160m": ("pythia", PYTHIA_160M),
    "gemma2": ("gemma2", {}),
    "gemma2-one-key-head": ("gemma2", {"num_key_value_heads": 1, "rope_parameters": rope(100.0)}),
    "gemma2-no-caps": ("gemma2", dict.fromkeys(CAPS)),
    "gemma2-usual-caps": ("gemma2", dict(zip(CAPS, (50.0, 30.0)))),
    "gemma2-all-full": ("gemma2", {"layer_types": ["full_attention"] * 4}),
    "gemma2-untied": ("gemma2", {"tie_word_embeddings": False}),
    "gemma2-linear": ("gemma2", {"rope_parameters": LINEAR}),
    "gemma3": ("gemma3", {}),
    "gemma3-one-key-head": ("gemma3", {"num_key_value_heads": 1, "sliding_window": 4}),
    "gemma3-alternating": ("gemma3", {"num_hidden_layers": 2, "layer_types": [FULL, SLIDING]}),
    "gemma3-bases": ("gemma3", {"rope_parameters": {FULL: rope(500.0), SLIDING: rope(50.0)}}),
    "gemma3-linear": ("gemma3", {"rope_parameters": {FULL: LINEAR, SLIDING: rope(1e4)}}),
}


OLD = ["rope_parameters", "layer_types", "_sliding_window_pattern", *CAPS]
SCALING = {"rope_type": "linear", "factor": 8.0}
OLD_SPELLINGS = {  # of the settings of VARIANTS: what older config.json files say instead of OLD
    "pythia": {"rotary_pct": 0.25, "rotary_emb_base": 10000},
    "pythia-rotary-half": {"rotary_pct": 0.5, "rotary_emb_base": 10000},
    "pythia-rotary-all": {"rotary_pct": 1.0, "rotary_emb_base": 100},
    "gemma2": {"rope_theta": 10000.0, "sliding_window_pattern": 3, **CAPS},
    "gemma2-one-key-head": {"rope_theta": 100.0, **CAPS},
    "gemma2-usual-caps": {"rope_theta": 10000.0},
    "gemma2-linear": {"rope_theta": 1e4, "rope_scaling": SCALING, **CAPS},
    "gemma3": {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
    "gemma3-bases": {"rope_theta": 500.0, "rope_local_base_freq": 50, "rope_scaling": None},
    "gemma3-linear": {"rope_theta": 1e4, "rope_local_base_freq": 1e4, "rope_scaling": SCALING},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_hidden_states(name, tmp_path):
    """In the spelling of today's transformers and, where there is one, in the older."""
    family, changes = VARIANTS[name]
    model = reference(family, **changes)
    model.save_pretrained(tmp_path)
    compare(model, tmp_path)
    if name in OLD_SPELLINGS:
        edit(tmp_path, drop=OLD, **OLD_SPELLINGS[name])
        compare(model, tmp_path)
        compare(as_read(tmp_path), tmp_path)


@pytest.mark.parametrize("published", [False, True])
def test_gemma_3_with_vision(published, tmp_path):
    """The text part stands under text_config and a prefix; what sees is left alone. As published,
    text_config says little, and what stands beside it is not about the text."""
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 7, "sliding_window": 8}
    text.update(model_type="gemma3_text", rope_scaling=SCALING)
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads"), 8)
    sees = {**sizes, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=dict(text), vision_config=sees)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    randomise(model)
    model.save_pretrained(tmp_path)  # as language_model.model. and vision_tower.
    if published:
        said = {"model_type": "gemma3", "text_config": text, "rms_norm_eps": 0.5}
        said.update(rope_theta=7.0, sliding_window_pattern=2)
        (tmp_path / "config.json").write_text(json.dumps(said))
        edit(tmp_path, lambda t: {f"model.{k.replace('.model', '')}": t[k] for k in t})
    compare(model, tmp_path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_in_the_file_is_used_as_transformers_uses_it(family, tied, tmp_path):
    """A head that differs from the embedding: without tying it unembeds; with tying it does not."""
    reference(family, tie_word_embeddings=False).save_pretrained(tmp_path)
    edit(tmp_path, tie_word_embeddings=tied)
    compare(as_read(tmp_path), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_logits_from_files_of_each_dtype(family, sharded, tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model, folder = reference(family), tmp_path / str(dtype)
        for p in model.parameters():
            p.data = p.data.to(dtype).float()
        size = "20KB" if sharded else "1GB"
        copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size=size)
        assert (folder / "model.safetensors.index.json").exists() == sharded
        compare(model, folder)
        if dtype == torch.bfloat16:  # computing in it, too
            compare(model, folder, dtype=dtype, tolerance=0.3)


NORM = "gpt_neox.final_layer_norm.bias"
OLD_BUFFERS = ("bias", "masked_bias", "rotary_emb.inv_freq")
OLD_BUFFERS = {f"gpt_neox.layers.1.attention.{name}": torch.ones(1) for name in OLD_BUFFERS}
WRONG_TENSORS = [  # what is said; what becomes of the norm; the dtype in which it is loaded
    ("Missing", lambda norm: {}, torch.float32),
    ("Unexpected", lambda norm: {NORM: norm, f"{NORM}es": torch.ones(2)}, torch.float32),
    ("size mismatch", lambda norm: {NORM: torch.ones(33)}, torch.float32),
    ("not finite", lambda norm: {NORM: F.pad(norm[1:], (1, 0), value=math.inf)}, torch.float32),
    ("not finite", lambda norm: {NORM: F.pad(norm[1:], (1, 0), value=math.nan)}, torch.float32),
    ("not finite", lambda norm: {NORM: norm * 1e6}, torch.float16),
]


@pytest.mark.parametrize("words, change, dtype", WRONG_TENSORS)
def test_wrong_tensors_are_named_and_old_buffers_ignored(words, change, dtype, tmp_path):
    model = reference("pythia")
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors | OLD_BUFFERS)
    compare(model, tmp_path)
    edit(tmp_path, lambda tensors: change(tensors.pop(NORM)) | tensors)
    fails([NORM, words], saeft.load_lm, str(tmp_path), "cpu", dtype)


GEMMA_3_FOLDER = os.environ.get("SAEFT_GEMMA3", "/nowhere")


@pytest.mark.skipif(not os.path.isdir(GEMMA_3_FOLDER), reason="SAEFT_GEMMA3 names no folder")
def test_gemma_3_270m_itself():
    tokenizer = transformers.AutoTokenizer.from_pretrained(GEMMA_3_FOLDER)
    tokens = torch.tensor(tokenizer(README)["input_ids"][:1024])[None]
    assert tokens.shape == (1, 1024) and tokens[0, 0] == 2
    compare(as_read(GEMMA_3_FOLDER), GEMMA_3_FOLDER, tokens)


BAD_CONFIGS = [  # (family, key, values): UserError, which names the key and shows the value
    ("pythia", "model_type", ["llama", "gpt2", None, 5, ["gpt_neox"]]),
    ("pythia", "hidden_size", [None, "32", -32, 0, 2**40, [32], True]),
    ("pythia", "num_hidden_layers", [0, -1, "3", 10**9, 2**70, None]),
    ("pythia", "num_attention_heads", [0, -4, "4"]),
    ("pythia", "rotary_pct", [-0.25, "0.25", float("inf")]),
    ("pythia", "hidden_act", ["relu", None, 3, "gelu_new"]),
    ("pythia", "head_dim", [24]),
    ("pythia", "use_parallel_residual", ["yes", 2, ["x"]]),
    ("pythia", "tie_word_embeddings", ["no", 7]),
    ("gemma2", "attn_logit_softcapping", ["50", 0, -5, [50]]),
    ("gemma2", "sliding_window", [0, -8, "8", None]),
    ("gemma2", "hidden_activation", ["gelu", "silu", None]),
    ("gemma3", "attn_logit_softcapping", [50.0]),
    ("gemma3", "use_bidirectional_attention", [True, "x"]),
    ("gemma3", "sliding_window_pattern", [0, -6, "6"]),
    *((family, "is_causal", [False, None]) for family in ("pythia", "gemma2", "gemma3")),
]
BAD_TOGETHER = [  # each value could be right, not beside the others: UserError, one line
    ("pythia", "num_attention_heads", [3]),
    ("pythia", "rotary_pct", [7]),
    ("pythia", "rope_scaling", [{"type": "linear"}]),
    ("pythia", "rope_parameters", [{"rope_type": "yarn"}, {FULL: rope(1e4)}]),
    ("gemma2", "num_key_value_heads", [3]),
    ("gemma2", "layer_types", [[FULL], ["x"] * 4]),
    ("gemma2", "sliding_window", [2.5]),
    ("gemma2", "rope_parameters", [rope(1e4, partial_rotary_factor=0.5)]),
    ("gemma3", "rope_parameters", [rope(1e4), {FULL: rope(1e4)}, {FULL: "x"}]),
]


@pytest.fixture(scope="module")
def configs():
    """A config.json of each family, in the older spelling, as Python reads it."""
    found = {}
    for family, (_, config, settings) in FAMILIES.items():
        text = getattr(transformers, config)(**settings).to_json_string(use_diff=False)
        config = {k: v for k, v in json.loads(text).items() if k not in OLD}
        found[family] = {**config, **OLD_SPELLINGS[family]}
        saeft.build_lm(found[family])
    return found


@pytest.mark.timeout(20)
@pytest.mark.parametrize("family, key, values", BAD_CONFIGS)
def test_a_bad_setting_is_named(configs, family, key, values):
    for value in values:
        shown = str(value[0] if isinstance(value, list) else value)
        fails([key, shown], saeft.build_lm, {**configs[family], key: value})


@pytest.mark.parametrize("family, key, values", BAD_TOGETHER)
def test_settings_that_do_not_fit_each_other_are_refused(configs, family, key, values):
    for value in values:
        fails(["config.json"], saeft.build_lm, {**configs[family], key: value})
    scaled = {"rope_parameters": rope(1e4), "rope_scaling": SCALING}
    fails(["another rope_scaling"], saeft.build_lm, {**configs["pythia"], **scaled})
    (block, *_) = saeft.build_lm({**configs["pythia"], **scaled, "rope_parameters": {}}).blocks
    assert block.rope[-1] == SCALING["factor"]  # as transformers takes it
    old = {"type": "linear", "factor": 8.0}
    fails(["rotary positions"], saeft.build_lm, {**configs["gemma3"], "rope_scaling": old})


def test_missing_settings_are_named(configs):
    for key in "hidden_size num_hidden_layers num_attention_heads vocab_size model_type".split():
        fails([key], saeft.build_lm, {k: v for k, v in configs["gemma2"].items() if k != key})
    for text in (None, [], "x", {**configs["gemma3"], "hidden_size": "x"}):
        fails(["hidden_size"], saeft.build_lm, {"model_type": "gemma3", "text_config": text})


# ---- The SAE: plain, fast, and by its equations --------------------------------------------------
LINE = torch.linspace(0, 1, 20, dtype=torch.double)
SELECT = {  # what `encode` is told to keep, and the same by the equations
    "topk": (lambda pre: 5, {"kind": "topk"}),
    "relu": (lambda pre: 0.0, {"kind": "relu"}),
    "threshold": (lambda pre: 0.7, {"kind": "relu", "threshold": 0.7}),
    "thresholds": (lambda pre: LINE, {"kind": "relu", "threshold": LINE}),
    "batchtopk": (BatchTopK(2, 3, k=3).select, {"kind": "batchtopk", "k": 3}),
}


def largest(pre, k):
    """ReLU of the K largest of each row, all others 0."""
    return pre.relu() * torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1.0)


def dense_sae(x, W_enc, b_enc, W_dec, b_dec, kind="topk", k=5, threshold=0.0):
    """x_hat [N, D] and f [N, F] by the equations of each kind, f dense."""
    pre = (x - b_dec) @ W_enc.T + b_enc
    if kind == "topk":
        f = largest(pre, k)
    elif kind == "batchtopk":
        f = largest(pre.reshape(1, -1), round(k * len(pre))).view_as(pre)
    else:
        f = pre.relu() * (pre >= threshold)
    return f @ W_dec + b_dec, f


def sae_inputs():
    """x and weights in float64; some tokens have few positive latents or none, some latents none."""
    shapes = (24, 8), (20, 8), (20,), (20, 8), (8,)
    x, *others = (torch.randn(shape, dtype=torch.double) for shape in shapes)
    others[1][:] = -2
    others[1][:2] = -100
    x[:3] = others[3] + 0.05 * x[:3]
    return [t.requires_grad_() for t in (x, *others)]


@pytest.fixture(params=[True, False], ids=["fast", "plain"])
def fast(request, monkeypatch):
    """Both ways to compute: the plain version that a reader reads, and the fast one of the CPU."""
    monkeypatch.setattr(saeft, "FAST", request.param)
    return request.param


WITH_F = {  # what an SAE does with f [N, F], weights [F] and a table [F, D]
    "@": lambda f, weights, table: f @ table,
    "*": lambda f, weights, table: (f * weights).to_dense(),
    "* and sum": lambda f, weights, table: (f * weights).sum(),
    "* one and sum": lambda f, weights, table: (f * weights[0]).sum(),
    "* and @": lambda f, weights, table: (f * weights) @ table,
    "to_dense": lambda f, weights, table: f.to_dense(),
}


@pytest.mark.parametrize("keep", [None, torch.arange(24) % 5 > 0], ids=["all", "keep"])
@pytest.mark.parametrize("select, how", SELECT.values(), ids=SELECT)
def test_f_what_is_done_with_it_and_gradients_equal_dense_autograd(select, how, keep, fast):
    x, W_enc, b_enc, W_dec, b_dec = inputs = sae_inputs()
    kept = slice(None) if keep is None else keep
    dense = torch.zeros(24, 20, dtype=torch.double)
    dense[kept] = dense_sae(x[kept], W_enc, b_enc, W_dec, b_dec, **how)[1]
    fired = dense > 0
    assert fired.sum(1)[:3].max() == 0 < fired.sum(1).max() and fired.sum(0)[:2].max() == 0

    f = saeft.encode(x, b_dec, W_enc, b_enc, select, keep)
    if fast:  # a weight of each token is not one of each latent; no second derivatives
        with pytest.raises(RuntimeError, match="expand"):
            f * torch.ones(24, 1)
        fails(["a table of 21 for 20 latents"], f.__matmul__, torch.ones(21, 8))
        x_hat = f @ W_dec
        (slope,) = torch.autograd.grad(x_hat.pow(2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            slope.sum().backward()
    with torch.no_grad():  # an encoder that does not train
        given = saeft.encode(x, b_dec, W_enc, b_enc, select, keep)
    by_W_dec = [torch.autograd.grad((g @ W_dec).pow(2).sum(), W_dec)[0] for g in (given, dense)]
    assert_close(*by_W_dec, 1e-12)
    assert isinstance(f, SparseRows) == fast and torch.equal(saeft.counts(f), fired.sum(0))
    leaves = [*inputs, torch.randn(20, dtype=torch.double, requires_grad=True)]
    for name, call in WITH_F.items():
        ours, theirs = (call(f, leaves[-1], W_dec) for f in (f, dense))
        assert_close(ours, theirs, 1e-12)
        g = torch.randn_like(theirs)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        ours = torch.autograd.grad(ours, leaves, g, **options)
        theirs = torch.autograd.grad(theirs, leaves, g, **options)
        for a, b in zip(ours, theirs):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("kind", ["topk", "relu", "batchtopk", "jumprelu"])
def test_what_is_no_number_stays_none(kind, fast):
    sae, x = small_sae(kind), torch.full((40, 32), torch.nan)
    assert sae(x)[0].isnan().any()


@pytest.mark.parametrize("n, k", [(24, 1), (64, 4), (1024, 3), (1000, 8), (4096, 40), (96, 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_are_those_of_topk(n, k, dtype):
    pre = torch.randn(50, n).mul(4).round().to(dtype)  # many are equal
    pre[::7] = -torch.inf
    values, columns = saeft.largest(pre, k)
    assert torch.equal(values.sort().values, pre.topk(k).values.flip(1))
    assert torch.equal(pre.gather(1, columns), values)
    assert all(len(row.unique()) == k for row in columns)


SCALE = 17.0  # of the activations 3 * randn(32)


@torch.no_grad()
def small_sae(kind="topk", k=6, d_model=32):
    """An SAE whose biases, scale and norms are not trivial, and of whose latents 3 never fire."""
    torch.manual_seed(1)
    sae = saeft.KINDS[kind](d_model, 64, k=k)
    sae.b_dec.normal_(std=1 / SCALE)
    sae.b_enc.normal_(std=0.1)[:3] = -100
    if kind in ("relu", "jumprelu"):
        sae.W_dec.mul_(1 + torch.rand(64, 1))
    if kind == "relu":
        sae.l1.fill_(0.3)
    if kind == "batchtopk":
        sae.threshold.fill_(0.2)
    if kind == "jumprelu":
        sae.threshold.uniform_(0, 0.4)
    sae.rescale(SCALE)
    return sae.eval()


def parameters(sae):
    return [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]


def leaves(sae):
    """Copies of the parameters in float64."""
    return [p.detach().double().requires_grad_() for p in parameters(sae)]


@pytest.mark.parametrize("n_dead", [9, 40])  # fewer than D/2, and more
def test_auxk_equals_direct_computation(n_dead, fast):
    sae, x, dead = small_sae(), torch.randn(50, 32) * 3, torch.arange(10, 10 + n_dead)
    x_hat, f = sae(x)
    assert sae.penalty(x, x_hat, f, torch.ones(50), 1.0) == 0.0
    sae.dead = dead
    loss = sae.penalty(x, x_hat, f, torch.ones(50), 1.0)
    W_enc, b_enc, W_dec, b_dec = weights = leaves(sae)
    e = (x - x_hat).detach().double()
    f = largest((x - b_dec) @ W_enc[dead].T + b_enc[dead], min(16, n_dead))
    expected = ((e - f @ W_dec[dead]) ** 2).sum() / ((e - e.mean(0)) ** 2).sum() / 32
    assert_close(loss, expected)
    theirs = torch.autograd.grad(expected, weights)
    for a, b in zip(torch.autograd.grad(loss, parameters(sae)), theirs):
        assert_close(a, b)


def test_an_sae_starts_at_the_mean_of_scaled_activations(tmp_path):
    run = saeft.Run(saeft.parse([*SMALL.split(), "--out", str(tmp_path)]))
    tokens = torch.randint(1000, (8, 64))
    run.lm, run.stream, run.n_mse = saeft.load_lm("tiny"), Stream(tokens), 8
    (sae,), done = run.first_saes(), run.done
    x = run.lm.prefix(tokens, run.config.layer).flatten(0, 1)
    norm = x.norm(dim=1)
    assert_close(done.limit, 4 * norm.median())
    x = x[norm <= done.limit]
    assert_close(done.scale, (x**2).sum(1).mean().sqrt())
    assert_close(sae.b_dec.data * done.scale, x.mean(0))
    assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))
    assert torch.equal(sae.W_enc, sae.W_dec) and not sae.b_enc.any()
    assert torch.equal(sae.W_dec, ReLU(128, 64, seed=0).W_dec)  # of the seed alone
    assert not torch.equal(sae.W_dec, TopK(128, 64, k=4, seed=1).W_dec)


def test_a_published_relu_sae_gets_the_lambda_at_which_it_rests():
    """Where scaling all f changes its loss by nothing; above 0, also where f should be smaller."""
    x, config = 3 * torch.randn(500, 32), Config(start="published")
    sae = small_sae("relu")
    sae.W_dec.data.mul_(0.1)
    sae.l1.zero_()  # which an SAE may say, too
    sae.start(x, config)
    assert sae.l1 == 0
    sae.l1.fill_(torch.nan)
    sae.start(x, config)
    x_hat, f = dense_sae(x.double(), *leaves(sae), kind="relu")
    size = torch.ones((), dtype=torch.double, requires_grad=True)
    b_dec, norms = sae.b_dec.double(), sae.W_dec.double().norm(dim=-1)
    loss = (x - (b_dec + size * (x_hat - b_dec))).pow(2).sum() + sae.l1 * size * (f * norms).sum()
    (slope,) = torch.autograd.grad(loss, size)
    assert sae.l1 > 0.01 and abs(slope) < 1e-5 * loss
    sae.W_dec.data.mul_(1000)
    sae.l1.fill_(torch.nan)
    sae.start(x, config)
    assert_close(sae.l1, 1e-4 * x.pow(2).sum(1).mean().sqrt())


@pytest.mark.parametrize("kind, size", [("topk", 1e2), ("topk", 1e-2), ("relu", 1e2)])
def test_update_equals_projection_clipping_adamw_and_unit_norm(kind, size, fast):
    sae = small_sae(kind)
    theirs, trainee = copy.deepcopy(sae), Trainee(sae, divergence=None)
    plain = torch.optim.AdamW(theirs.parameters(), weight_decay=0.01, fused=False, foreach=False)
    for step in range(4):
        lr = plain.param_groups[0]["lr"] = 1e-2 / (step + 1)
        x = torch.randn(64, 32) * 3
        (size * F.mse_loss(sae(x)[0], x)).backward()
        saeft.update(trainee, lr)
        (size * F.mse_loss(theirs(x)[0], x)).backward()
        if kind == "topk":
            unit = theirs.W_dec.data
            theirs.W_dec.grad -= (theirs.W_dec.grad * unit).sum(1, keepdim=True) * unit
        assert (torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0) > 1) == (size > 1)
        plain.step()
        plain.zero_grad()
        if kind == "topk":
            theirs.W_dec.data = F.normalize(theirs.W_dec.data, dim=-1)
            assert_close(sae.W_dec.norm(dim=-1), torch.ones(64), 1e-6)
        for a, b in zip(parameters(sae), parameters(theirs)):
            assert_close(a, b, 1e-4)
    state = [t for p in parameters(sae) for t in trainee.optimizer.state[p].values()]
    before, state_before = copy.deepcopy((parameters(sae), state))
    for bad in (torch.nan, torch.inf):  # a gradient that is not finite changes nothing
        (bad * F.mse_loss(sae(x)[0], x)).backward()
        assert not saeft.update(trainee, 1e-2).isfinite()
        assert all(map(torch.equal, state, state_before))
        for a, b in zip(parameters(sae), before):  # W_dec is normalised once more
            assert_close(a, b, 2e-7)


KINDS = ["topk", "relu", "batchtopk", "jumprelu"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_sae_works_by_saelens_equations_and_load_is_the_inverse(kind, tmp_path):
    sae, x = small_sae(kind), torch.randn(100, 32) * 3
    sae.save(tmp_path / "a", {"hook_name": "blocks.1.hook_resid_post"})
    cfg = json.loads((tmp_path / "a" / "cfg.json").read_text())
    tensors = safetensors.load_file(tmp_path / "a" / "sae_weights.safetensors")
    architecture = {"relu": "standard", "batchtopk": "jumprelu"}.get(kind, kind)
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"]) == (architecture, 32, 64)
    assert cfg["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    pre = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    f = pre.relu() * (pre > tensors.get("threshold", torch.zeros(64)))
    f = largest(pre, cfg["k"]) if kind == "topk" else f
    x_hat, ours = sae(x)
    assert_close(f @ tensors["W_dec"] + tensors["b_dec"], x_hat)
    assert_close(ours.to_dense(), f)
    assert 1 < ours.counts().sum() / 100 == (f > 0).sum(1).float().mean()

    loaded = SAE.load(tmp_path / "a")
    assert type(loaded) is type(sae) and loaded.unit_norm == (kind in ("topk", "batchtopk"))
    assert all(getattr(loaded, name) == getattr(sae, name) for name in sae.numbers)
    assert same(loaded.state_dict(), sae.state_dict())
    assert torch.equal(loaded(x)[0], x_hat) and not loaded.training
    loaded.save(tmp_path / "b", {"hook_name": "blocks.1.hook_resid_post"})
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_rescaling_is_a_change_of_units(kind):
    """x_hat of x times a scale is x_hat times it, and so the loss times its square."""
    sae, x, weight = small_sae(kind), torch.randn(100, 32) * 3, torch.full((100,), 0.01)

    def loss(x):
        x_hat, f = sae(x)
        return x_hat, (x - x_hat).pow(2).sum(-1).mean() + sae.penalty(x, x_hat, f, weight, 1.0)

    x_hat, value = loss(x)
    sae.rescale(7.0)
    scaled, larger = loss(7 * x)
    assert_close(scaled, 7 * x_hat, 1e-6)
    assert_close(larger, 49 * value, 1e-6)


def test_batchtopk_keeps_k_per_token_on_average_and_learns_its_threshold(fast):
    sae, x = BatchTopK(32, 64, k=6).train(), torch.randn(200, 32)
    _, f = sae(x)
    assert saeft.counts(f).sum() == 1200
    per_token = (f.to_dense() > 0).sum(1)
    assert per_token.max() > 6 > per_token.min()
    for k in (-3, 65):
        fails([f"K = {k} of 64 latents"], BatchTopK, 32, 64, k=k)
    for target in (6, 4.5):  # K, or the L0 to go back to
        sae.l0_target = target
        assert saeft.counts(sae(x)[1]).sum() == 200 * target
        _, f = sae(x, torch.arange(200) < 50)
        assert saeft.counts(f).sum() == 50 * target  # of the tokens that count
    sae.l0_target, least = None, []
    sae.after_step(sae(x)[1], None, step=0)
    assert saeft.counts(sae.eval()(x)[1]).sum() == 1199  # those strictly above the least one kept
    sae.train()
    for step in range(120):
        f = sae(torch.randn(200, 32))[1]
        sae.after_step(f, None, step)
        least.append(f.to_dense()[f.to_dense() > 0].min())
        if step < 50:  # the mean of the least values kept, each on its own float32
            assert_close(sae.threshold, torch.stack(least).mean().expand(64), 1e-5)
    assert_close(sae.threshold, torch.stack(least[-50:]).mean().expand(64), 0.02)


# ---- Divergences, and the fine-tune's loss -------------------------------------------------------
def whole_kl(log_p, log_q, weight):
    return (weight * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)).sum()


@pytest.fixture
def slices_of_7(monkeypatch):
    def few(n_tokens, W_U):
        return [slice(i, i + 7) for i in range(0, n_tokens, 7)]

    monkeypatch.setattr(saeft, "slices", few)


def reverse_kl(log_p, log_q, next_token):
    return saeft.kl_divergence(log_q, log_p, next_token)


def cross_entropy(log_p, log_q, next_token):
    return F.nll_loss(log_q, next_token, reduction="none")


def resids(n, d_model, dtype=torch.double):
    """For p and for two q's."""
    p, *noise = torch.randn(3, n, d_model, dtype=dtype, generator=torch.manual_seed(2))
    return p, [(p + size * e).requires_grad_() for size, e in zip((0.3, 0.1), noise)]


DIVERGENCES = {  # ours, and the library's sum of whole log-probabilities [N, V]
    "kl": (saeft.kl_divergence, lambda p, q, target, weight: whole_kl(p, q, weight)),
    "reverse kl": (reverse_kl, lambda p, q, target, weight: whole_kl(q, p, weight)),
    "ce": (cross_entropy, lambda p, q, target, weight: -(weight @ (q * one_hot(target)).sum(1))),
}


def one_hot(target):
    return torch.arange(96) == target[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ours, theirs", DIVERGENCES.values(), ids=DIVERGENCES)
def test_sliced_losses_of_several_q_equal_whole_logits(lm, ours, theirs, dtype, slices_of_7):
    p, qs = resids(50, 32, dtype)
    weight, next_token = torch.rand(50, dtype=dtype), torch.randint(96, (50,))
    weight[3:5] = 0  # tokens that do not count
    next_token[[9, 49]] = -100  # ends of sequences
    both = [ours, saeft.kl_divergence]  # each q has its own
    sums = SlicedLoss.apply(lm.to(dtype), both, weight, next_token, p, *qs)
    grads = torch.autograd.grad(3 * sums[0] + sums[1], qs)
    lm.double()
    log_p, *logs = [lm.unembed(resid.double()).log_softmax(-1) for resid in (p, *qs)]
    both = zip((theirs, DIVERGENCES["kl"][1]), logs)
    expected = [call(log_p, log_q, next_token, weight.double()) for call, log_q in both]
    expected_grads = torch.autograd.grad(3 * expected[0] + expected[1], qs)
    tolerance = 5e-5 if dtype == torch.float32 else 1e-12
    for a, b in zip([*sums, *grads], [*expected, *expected_grads]):
        assert_close(a, b, tolerance)


class LiveBytes(TorchDispatchMode):
    """The peak of the bytes in tensors, of whatever device, and the bytes of the largest one."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.largest = WeakIdKeyDictionary(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.alive.update({storage: storage.nbytes() for storage in found})
        self.peak = max(self.peak, sum(self.alive.values()))
        self.largest = max([self.largest, *self.alive.values()])
        return out


def test_no_tensor_of_tokens_times_vocabulary_exists(configs):
    config = {**configs["pythia"], "vocab_size": 50304, "hidden_size": 8}
    lm, p, q = random_lm(config), torch.randn(400, 8), torch.randn(400, 8, requires_grad=True)
    next_token = torch.arange(400)
    with LiveBytes() as memory:
        (kl,) = SlicedLoss.apply(lm, [saeft.kl_divergence], torch.ones(400) / 400, next_token, p, q)
        kl.backward()
        saeft.ce_and_kl(lm, [p, q.detach()], next_token)
    assert 4 * 50304 * 8 < memory.largest <= 4 * 2**23 < 4 * 400 * 50304 / 2
    for vocabulary in (300, 50304, 256_000):
        W_U = torch.empty(vocabulary, 1)
        served = [torch.arange(4000)[rows] for rows in saeft.slices(4000, W_U)]
        assert torch.equal(torch.cat(served), torch.arange(4000))


class Stream:
    """Sequences as a TokenStream gives them; remembers which ones were asked for."""

    def __init__(self, tokens):
        self.tokens, self.asked = tokens, []

    def train(self, start, count):
        self.asked += range(start, start + count)
        return self.tokens[start : start + count]


LOOP = Config(layer=1, context=20, tokens=1200, kl_tokens=400, batch=50, kl_batch=3, buffer=10)
LOOP = replace(LOOP, warmup=4, lr=1e-2, kl_lr=1e-3, dead_after=100, d_sae=64, data="x")


def nothing(phase, figures):
    """An after_step that does nothing."""


def dense_splice(lm, sae, weights, tokens, keep, layer=1):
    """x, x_hat [n, D], f [n, F] of the n tokens to keep, and log-probabilities [B, T, V] without and
    with the SAE, in float64."""
    resid = lm.prefix(tokens, layer).double()
    how = {"kind": sae.kind, "k": sae.l0_target or sae.k}
    if sae.kind == "jumprelu" or sae.kind == "batchtopk" and not sae.training:
        how["kind"] = "jumprelu"
        how["threshold"] = torch.nextafter(sae.threshold, sae.threshold + 1).double()
    x = resid[keep]
    x_hat, f = dense_sae(x, *weights, **how)
    spliced = resid.clone()
    spliced[keep] = x_hat
    lm = copy.deepcopy(lm).double()
    logits = [lm.unembed(lm.suffix(r, layer)) for r in (resid, spliced)]
    return x, x_hat, f, *(z.log_softmax(-1) for z in logits)


def sinks(lm, tokens, n_skip):
    """A limit of the norm which 5 tokens of the rest exceed, and what is left, [B, T]."""
    lm.n_skip = n_skip
    norms = lm.prefix(tokens, 1).norm(dim=-1)
    limit = norms[:, n_skip:].flatten().sort().values[-6:-4].mean()
    keep = norms <= limit
    keep[:, :n_skip] = False
    assert (~keep).sum() == 5 + n_skip * len(tokens)
    return limit, keep


@pytest.mark.parametrize("methods", [("kl", "kl"), ("mse", "mse"), ("reverse", "ce")])
@pytest.mark.parametrize("kind", KINDS)
def test_the_finetunes_losses_and_gradients_end_to_end(lm, kind, methods, slices_of_7, monkeypatch):
    """Against autograd in float64 through the whole model, without <bos> and without sinks."""
    limit, keep = sinks(lm, TOKENS, n_skip=1)
    saes = [small_sae(kind).train(), small_sae(kind, k=3).train()]
    saes[1].W_enc.data *= 1.1
    for sae in saes if kind in ("relu", "batchtopk") else ():
        sae.l0_target = 2.5
    weights = [leaves(sae) for sae in saes]
    own = {"reverse": reverse_kl, "ce": cross_entropy}
    trainees = []
    for sae, method in zip(saes, methods):
        if method in own:
            trainees.append(Trainee(sae, lm, own[method]))
        else:
            trainees.append(saeft.METHODS[method](lm, sae, LOOP))
    ours, seen = [], []
    monkeypatch.setattr(
        saeft, "update", lambda t, lr: ours.append([p.grad for p in parameters(t.sae)])
    )
    phase = Phase("x", trainees, 1, limit)
    saeft.finetune(phase, lm, Stream(TOKENS), LOOP, lambda phase, figures: seen.extend(figures))
    next_token = F.pad(TOKENS[:, 1:], (0, 1), value=-100)[keep]
    for method, sae, w, gradients, row in zip(methods, saes, weights, ours, seen):
        x, x_hat, f, log_p, log_q = dense_splice(lm, sae, w, TOKENS, keep)
        log_p, log_q, each = log_p[keep], log_q[keep], 1 / keep.sum()
        mse = (x - x_hat).square().mean()
        figures = {"mse": mse, "l0": (f > 0).sum(1).double().mean()}
        figures["fvu"] = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
        divergence = {
            "kl": whole_kl(log_p, log_q, each),
            "reverse": whole_kl(log_q, log_p, each),
            "ce": F.cross_entropy(log_q, next_token, reduction="sum") * each,
        }
        expected = mse
        if method != "mse":
            kl = divergence[method]
            beta = (mse / kl).detach()
            figures.update(kl=kl, beta=beta)
            expected = (beta * kl + mse) / 2
        if kind == "relu":
            # In phase one's units, x / scale, the loss is D / scale^2 times that of x, and lambda
            # 0.3 weighs f / scale; it is raw here, which is another factor of all alone.
            penalty = 0.3 * (f / SCALE @ w[2].norm(dim=1)).mean()
            expected = expected + penalty * SCALE**2 / 32
            assert float(sae.l1) == pytest.approx(0.3 * SCALE * 1.001)
        figures["loss"] = expected
        for name, value in figures.items():
            assert row[name].item() == pytest.approx(value.item(), rel=5e-5), name
        theirs = torch.autograd.grad(expected, w)
        for a, b in zip(gradients, theirs):
            assert_close(a, b, 5e-5)


def test_lambda_rises_in_phase_one_and_follows_the_l0_in_phase_two():
    sae, x, weight = small_sae("relu"), torch.randn(50, 32), torch.full((50,), 0.02)
    x_hat, f = sae(x)
    fails(["lambda = -1"], ReLU, 2, 2, l1=-1.0)
    fails(["metadata cannot say l1"], sae.save, "never", {"l1": 0.02})
    fails(["says ['device'] twice"], sae.save, "never", {"device": "cuda"})
    half, whole = (sae.penalty(x, x_hat, f, weight, done) for done in (0.025, 0.05))
    assert_close(half, whole / 2)
    for target, l0, factor in [(None, 9.0, 1.0), (5.0, 9.0, 1.001), (5.0, 4.0, 1.001 * 0.999)]:
        sae.l0_target = target
        sae.after_step(f, torch.tensor(l0), 0)
        assert float(sae.l1) == pytest.approx(0.3 * SCALE * factor)
    assert_close(sae.penalty(x, x_hat, f, weight, 0.0), whole * factor)


def test_splice_changes_the_stream_by_x_hat_minus_x():
    sae, (resid, x) = small_sae(), 3 * torch.randn(2, 4, 20, 32)
    keep = torch.rand(4, 20) < 0.7
    own_x, x_hat, f, spliced = Trainee(sae).splice(None, resid, x, keep, LOOP)
    assert torch.equal(own_x, x.flatten(0, 1)) and not saeft.counts(f)[:3].any()
    expected = torch.where(keep[..., None], resid + sae(x.flatten(0, 1))[0].view_as(x) - x, resid)
    assert_close(spliced, expected, 1e-6)
    assert torch.equal(spliced[~keep], resid[~keep]) and len(x_hat) == 80


# ---- The buffer, the loops, the evaluation, several processes ------------------------------------
def buffer_of(n_sequences, n_skip):
    """A buffer of activations that tell their sequence, position and layer; every 7th is a sink."""

    def prefix(tokens, layer):
        x = torch.stack([tokens // 10, tokens % 10, torch.full_like(tokens, layer)], -1).float()
        return torch.where(tokens[..., None] % 7 == 0, 1e6, x)

    lm = SimpleNamespace(n_skip=n_skip, W_U=torch.zeros(1, 3), prefix=prefix)
    stream = Stream(torch.arange(1000).view(100, 10))
    config = replace(LOOP, context=10, batch=8, buffer=20, layer=4)
    return saeft.ActivationBuffer(lm, stream, n_sequences, torch.tensor(1e3), config)


@pytest.mark.parametrize("n_skip", [0, 1])
@pytest.mark.parametrize("n_sequences", [3, 57])  # fewer and more than the buffer holds
def test_buffer_serves_each_activation_once_and_mixes(n_skip, n_sequences):
    buffer = buffer_of(n_sequences, n_skip)
    left = [i for i in range(10 * n_sequences) if i % 7 and i % 10 >= n_skip]
    batches = [buffer.next_batch(8) for _ in range(len(left) // 8)]
    assert buffer.stream.asked == list(range(n_sequences))
    served = torch.cat(batches)
    sequence, position, layer = served.unbind(-1)
    assert set((10 * sequence + position).tolist()) <= set(left) and (layer == 4).all()
    assert len(served.unique(dim=0)) == len(served) > len(left) - 8
    mixed = sum(len(batch[:, 0].unique()) for batch in batches) / len(batches)
    assert mixed > (5 if n_sequences == 57 else 2)


def saved(state):
    """As a checkpoint keeps it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def a_phase(lm, name, kind, steps):
    """A phase of two SAEs with AuxK, threshold and lambda at work, and a call that runs its loop."""
    saes = [small_sae(kind, k).train() for k in (4, 8)]  # which set the seed of the tokens, too
    stream = Stream(torch.randint(96, (60, 20)))
    limit, _ = sinks(lm, stream.tokens, n_skip=1)
    if name == "MSE":
        for sae in saes:
            sae.rescale(1 / SCALE)
        trainees = [Trainee(sae, lm, divergence=None, decay=0.0) for sae in saes]
        phase = Phase(name, trainees, steps, limit, SCALE)
        phase.buffer = saeft.ActivationBuffer(lm, stream, 60, limit, LOOP)
        return phase, lambda after: saeft.train_mse(phase, LOOP, after)
    for sae in saes:
        sae.l0_target = 6.0
    trainees = [saeft.METHODS[name](lm, sae, LOOP) for sae in saes]
    phase = Phase(name, trainees, steps, limit, first=10)
    return phase, lambda after: saeft.finetune(phase, lm, stream, LOOP, after)


@pytest.mark.parametrize("kind", ["topk", "relu", "batchtopk"])
@pytest.mark.parametrize("name, steps", [("MSE", 24), ("kl", 6)])
def test_a_phase_learns_and_goes_on_bit_equal_from_its_state(lm, name, steps, kind):
    whole, run = a_phase(lm, name, kind, steps)
    fvus, states = [], []

    def note(phase, figures):
        fvus.append([row["fvu"].item() for row in figures])
        states.append(saved(phase.state_dict()))

    run(note)
    second, run = a_phase(lm, name, kind, steps)
    second.load_state_dict(states[2])
    assert second.step == 3
    run(nothing)
    for a, b, of_sae in zip(whole.trainees, second.trainees, zip(*fvus)):
        assert all(torch.equal(v, b.sae.state_dict()[k]) for k, v in a.sae.state_dict().items())
        assert torch.equal(torch.as_tensor(a.sae.idle), torch.as_tensor(b.sae.idle))
        if name == "MSE":
            assert sum(of_sae[-5:]) < 0.8 * sum(of_sae[:5])
        if name == "MSE" and kind == "topk":  # latents that never fire are dead after 100 tokens
            assert {0, 1, 2} <= set(a.sae.dead.tolist()) and (a.sae.idle[:3] == 24 * 50).all()


def test_finetune_takes_its_sequences_in_order_and_its_rate_falls(lm, monkeypatch):
    seen, falling = [], torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2])
    monkeypatch.setattr(saeft, "update", lambda t, lr: seen.append(lr))
    for own, changes, rates in [
        (None, {}, 1e-3 * falling),  # --kl-lr
        (0.0, {}, 0 * falling),  # the trainee's own
        (None, {"kl_lr": None}, 0.36 / (32 * 64) ** 0.5 * falling),  # what suits the SAE
        (None, {"kl_tokens": 1200}, torch.full((5,), 0.01)),  # all tokens: phase one's schedule
    ]:
        seen.clear()
        stream, trainee = Stream(TOKENS[:1].repeat(60, 1)), Trainee(small_sae(), lm, lr=own)
        phase, config = phase_of(trainee, steps=5, first=40), replace(LOOP, kl_batch=4, **changes)
        saeft.finetune(phase, lm, stream, config, nothing)
        assert stream.asked == list(range(40, 60)) and seen == pytest.approx(rates.tolist())


@pytest.mark.parametrize("kind", ["topk", "relu", "batchtopk"])
def test_activations_in_half_precision_do_not_overflow(kind):
    x = (1000 * torch.randn(50, 32)).half()  # norms near 6,000: their squares are none of float16
    figures = []
    for given in (x, x.float()):
        sae = saeft.KINDS[kind](32, 64, k=4)
        sae.start(given, Config())
        t = Trainee(sae, divergence=None)
        row = saeft.mse_step(t, given, 1e-3, 5, 9, Config())
        figures.append([value.item() for value in row.values()])
    assert figures[0] == pytest.approx(figures[1], rel=1e-3)


def test_the_time_left_is_at_the_pace_of_steps_and_of_refills():
    phase = Phase("MSE", [], 100, torch.tensor(1.0), step=40, began=1000.0)
    assert phase.time_left(1020.0) == "30 s left"
    assert phase.time_left(1080.0) == "2.0 minutes left"
    phase.buffer = SimpleNamespace(seconds=60.0, n_sequences=100, next_sequence=50)
    assert phase.time_left(1080.0) == "1.5 minutes left"  # 60 s of refills, 30 s of steps
    phase.step, phase.buffer.next_sequence = 99, 1  # sinks left too few: from the first one again
    assert phase.time_left(1080.0) == "1 s left"


def share_recovered(model, row):
    """From the CEs that are reported: as a ratio of small differences it is as exact as they are
    and no more, so they are what is compared with other means."""
    return (model["ce_zero"] - row["ce"]) / (model["ce_zero"] - model["ce_original"])


class Adapted(Trainee):
    """Reads an x of its own, as LoRA on blocks before the SAE does."""

    def splice(self, tokens, resid, x, keep, config):
        return super().splice(tokens, 3 * resid + 1, 3 * x + 1, keep, config)


@torch.no_grad()
def test_evaluate_equals_direct_computation(lm):
    tokens, lm = torch.randint(96, (11, 20)), lm.double()
    limit, keep = sinks(lm, tokens, n_skip=1)
    saes = [small_sae(), small_sae("relu"), small_sae(k=1), small_sae("batchtopk")]
    trainees = [Trainee(sae.double(), lm) for sae in saes]
    model, figures = saeft.evaluate(lm, tokens, trainees, limit, LOOP)
    scored = keep[:, :-1]
    targets = tokens[:, 1:][scored]
    zero = [torch.zeros_like(p) for p in leaves(saes[0])]
    for sae, weights, ours in [(saes[0], zero, model), *zip(saes, map(leaves, saes), figures)]:
        x, x_hat, f, log_p, log_q = dense_splice(lm, sae, weights, tokens, keep)
        log_p, log_q = log_p[:, :-1][scored], log_q[:, :-1][scored]
        original, ce = F.nll_loss(log_p, targets).item(), F.nll_loss(log_q, targets).item()
        if ours is model:
            left_out = (~keep).double().mean().item()
            expected = {"ce_original": original, "ce_zero": ce, "left_out": left_out}
        else:
            error = (x - x_hat).square().sum()
            expected = {"ce": ce, "gap": ours["ce"] - model["ce_original"]}
            expected["loss_recovered"] = share_recovered(model, ours)
            expected["kl"] = whole_kl(log_p, log_q, 1 / len(targets)).item()
            expected["fvu"] = (error / (x - x.mean(0)).square().sum()).item()
            expected["l0"] = (f > 0).sum(1).double().mean().item()
            expected["dead"] = (f == 0).all(0).sum().item()
            assert expected["dead"] >= 3
        assert ours == pytest.approx(expected, rel=1e-6)
        assert ours.get("ce", ce) == pytest.approx(ce, rel=1e-9)
    # A method that reads another x is measured by that one's variance.
    adapted = Adapted(saes[0], lm, divergence=None)
    _, (row,) = saeft.evaluate(lm, tokens, [adapted], limit, LOOP)
    x = 3 * lm.prefix(tokens, LOOP.layer)[keep] + 1
    own = (x - saes[0](x)[0]).square().sum() / (x - x.mean(0)).square().sum()
    assert row["fvu"] == pytest.approx(own.item())
    # Without the limit all but <bos> count.
    model, _ = saeft.evaluate(lm, tokens, trainees[:1], torch.tensor(torch.inf), LOOP)
    assert model["left_out"] == pytest.approx(1 / 20)
    # A step says the same of its own x.
    steps, adapted = [], Adapted(small_sae(), lm.float(), divergence=None)
    phase, stream = replace(phase_of(adapted, steps=1), limit=limit.float()), Stream(tokens)
    with torch.enable_grad():
        saeft.finetune(phase, lm, stream, LOOP, lambda phase, figures: steps.extend(figures))
    x = 3 * lm.prefix(tokens[:3], LOOP.layer)[keep[:3]] + 1
    ratio = steps[0]["mse"] * x.shape[1] / (x - x.mean(0)).square().sum(-1).mean()
    assert steps[0]["fvu"].item() == pytest.approx(ratio.item(), rel=1e-4)


def steps_of_a_process(rank, world, kind, method, folder, file):
    """Thirty steps of phase one, or ten of the fine-tune, of one process of `world`; its SAE is
    written to a file. All worlds see the same rows and sequences."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    lm, sae, rows = saeft.load_lm(folder), small_sae(kind, k=2).train(), []
    config = replace(LOOP, kl_batch=4 // world, dead_after=90)
    if method == "MSE":
        t, mix = Trainee(sae, divergence=None, decay=0.0), SCALE * torch.randn(32, 32)
        for step in range(30):
            x = (torch.randn(96, 32) @ mix)[rank::world]
            rows.append(saeft.mse_step(t, x, 1e-2, step, 30, config))
        assert kind != "topk" or len(sae.dead) > 3, sae.dead
    else:
        sae.l0_target, tokens = 6.0, torch.randint(96, (40, 20))
        limit, _ = sinks(lm, tokens, n_skip=1)
        phase = Phase(method, [saeft.METHODS[method](lm, sae, config)], 10, limit)
        saeft.finetune(phase, lm, Stream(tokens), config, lambda phase, row: rows.extend(row))
    fvu = saeft.mean_over_ranks(torch.stack([row["fvu"] for row in rows]))
    if rank == 0:
        safetensors.save_file({**sae.state_dict(), "fvu": fvu}, f"{file}.safetensors")
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("method", ["MSE", "kl"])
@pytest.mark.parametrize("kind", ["topk", "relu"])
def test_two_processes_equal_one_with_twice_the_batch(kind, method, tmp_path):
    reference("pythia").save_pretrained(tmp_path / "lm")
    processes = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        args = rank, world, kind, method, str(tmp_path / "lm"), str(tmp_path / f"world{world}")
        processes.append(in_a_process(steps_of_a_process, *args))
    for process in processes:
        process.join(120)
        assert process.exitcode == 0, (process.kill(), process.exitcode)
    one, two = (safetensors.load_file(tmp_path / f"world{world}.safetensors") for world in (1, 2))
    start = small_sae(kind)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        first = 3 if name == "b_enc" else 0  # the others never fire
        a, b, before = (t[name][first:] for t in (one, two, start.state_dict()))
        assert_close(a, b)
        assert (before - b).abs().max() > 1e-5 * b.abs().max(), name
    assert_close(two["fvu"], one["fvu"], 1e-4)


# ---- Settings ------------------------------------------------------------------------------------
def test_a_flag_s_type_may_be_text_or_a_type():
    """As of a fork that has no `from __future__ import annotations`."""
    of = [int, "int", float | None, "float | None", list[float], "list[str]", bool, "bool"]
    given = [flag(None, "", nargs="+") if "list" in str(t) else flag(None, "") for t in of]
    names = [(f"f{i}", t, f) for i, (t, f) in enumerate(zip(of, given))]
    line = "--f0 4k --f1 4k --f2 .5 --f3 .5 --f4 1 2 --f5 1 2 --f6 --f7"
    parsed = model_loaders.flags_of(make_dataclass("Own", names)).parse_args(line.split())
    expected = [4000, 4000, 0.5, 0.5, [1.0, 2.0], ["1", "2"], True, True]
    assert [*vars(parsed).values()] == expected
    for wrong in (("own", Path, flag(None, "")), ("own", int, 3)):
        fails(
            ["own: a setting is made by `flag`"],
            model_loaders.flags_of,
            make_dataclass("X", [wrong]),
        )


def test_a_trainee_trains_what_it_can_save_all_of_it_at_one_rate_and_fused():
    sae, x = small_sae(), torch.randn(9, 32)
    fails(["needs a `save`"], Trainee, sae, insert=torch.nn.Sequential(sae))
    t = Trainee(sae, divergence=None)
    sae.W_enc.grad = torch.ones_like(sae.W_enc)
    fails(["without a gradient"], saeft.update, t, 1e-3)
    frozen = small_sae()
    frozen.W_dec.requires_grad_(False)
    before = frozen.W_dec.clone()
    saeft.mse_step(Trainee(frozen, divergence=None), x, 1e-3, 0, 9, Config())
    assert torch.equal(frozen.W_dec, before)
    step = functools.partial(saeft.mse_step, t, x, 1e-3, 0, 9, Config())
    groups = [{"params": t.parameters[:1], "lr": 99.0}, {"params": t.parameters[1:]}]
    t.optimizer = torch.optim.AdamW(groups, fused=True)
    fails(["have one rate"], step)
    t.optimizer = torch.optim.AdamW([{**group, "lr": 99.0} for group in groups], fused=True)
    step()
    assert [group["lr"] for group in t.optimizer.param_groups] == [1e-3, 1e-3]
    t.optimizer = torch.optim.AdamW(groups)
    fails(["a fused one"], step)


def test_lr_warms_up_stays_and_falls_to_0():
    factors = [saeft.lr_factor(step, 100, 10, 0.2) for step in range(101)]
    rise, fall = [i / 10 for i in range(1, 11)], [1 - i / 20 for i in range(1, 21)]
    assert factors == pytest.approx(rise + [1.0] * 71 + fall)
    assert [saeft.lr_factor(step, 4, 0, 1.0) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    with torch.device("meta"):
        paper = TopK(768, 2**14, k=80)
    steps = 25_000_000 // (8 * 1024)
    assert saeft.finetune_lr(paper, steps) == pytest.approx(5e-5, rel=0.01)  # as published


@pytest.mark.parametrize("unit, size", [("", 1), ("k", 10**3), ("M", 10**6), ("b", 10**9)])
def test_count_is_exact(unit, size):
    tenths = range(0, 2000, 10 if size == 1 else 1)
    counted = [model_loaders.count(f"{i / 10}{unit}") for i in tenths]
    assert counted == [i * size // 10 for i in tenths]
    assert model_loaders.count(f"25{unit}") == 25 * size and model_loaders.count("1e6") == 10**6


def test_flags_override_presets_which_follow_what_the_model_is(tmp_path, configs, capsys):
    assert saeft.parse([]).k == [16] and saeft.parse([]).data is None
    tiny = model_loaders.load_config("tiny")
    named = str(put(tmp_path / "EleutherAI" / "pythia-160m", {"config.json": tiny}))
    assert saeft.parse(["--model", named]) == replace(saeft.parse([]), model=named)
    pythia = {**configs["pythia"], **PYTHIA_160M}
    model = put(tmp_path / "tiny", {"config.json": pythia})  # as a name does not tell
    given = f"--model {model} --k 20 40 --tokens 1e6 --overwrite".split()
    config = saeft.parse(given)
    assert (config.layer, config.k, config.tokens, config.overwrite) == (8, [20, 40], 10**6, True)
    assert saeft.parse([*given, "--layer", "3"]).layer == 3
    shallow = {**pythia, "num_hidden_layers": 11}
    other = str(put(tmp_path / "x", {"config.json": shallow}))
    assert saeft.parse(["--model", other]) == Config(model=other)
    for family in ("gemma2", "gemma3"):
        folder = put(tmp_path / family, {"config.json": configs[family]})
        config = saeft.parse(["--model", str(folder)])
        assert (config.dtype, config.kl_batch, config.layer) == ("bfloat16", 2, None)


# ---- The pretended device ----------------------------------------------------------------------
class OnCuda(torch.Tensor):
    """A tensor of cuda:0, as far as Python can see; its values are in a CPU tensor."""

    device, is_cuda, is_cpu = torch.device("cuda:0"), True, False

    @staticmethod
    def __new__(cls, values):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        self = cls._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, **layout)
        self.values_on_cpu = values
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} after the end of the pretence")

    def to(self, *args, non_blocking=False, **kwargs):
        """C++ believes that it is on the CPU already, and would return it as it is."""
        for device in [*args, *kwargs.values()]:
            if isinstance(device, (str, torch.device)) and torch.device(device).type == "cpu":
                return self.cpu(non_blocking).to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def cpu(self, non_blocking=False):
        if not non_blocking:
            torch.utils._python_dispatch._get_current_dispatch_mode().waits.append("cpu")
        return self.detach().values_on_cpu.clone()

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec):
        return format(self.cpu(), spec)

    def __reduce_ex__(self, protocol):  # torch.save, in checkpoints
        return self.cpu().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return self.detach().clone().requires_grad_(self.requires_grad)


class CudaMode(TorchDispatchMode):
    """Notes the operators that make the host wait for the device. Without a GPU it runs operators of
    OnCuda on the CPU, with a RuntimeError where one mixes devices."""

    def __init__(self):
        super().__init__()
        self.waits, self.pretended = [], not torch.cuda.is_available()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        device, copies = kwargs.get("device"), name in ("_to_copy", "copy_")
        devices = {t.device for t in tensors} | ({torch.device(device)} if device else set())
        moved = copies and not kwargs.get("non_blocking") and len(devices) > 1
        if moved or name in ("_local_scalar_dense", "nonzero"):
            self.waits.append(name)
        if not self.pretended:
            return func(*args, **kwargs)

        here = any(isinstance(t, OnCuda) for t in tensors)
        if here and not copies and any(t.dim() and not isinstance(t, OnCuda) for t in tensors):
            raise RuntimeError(f"{func}: some tensors are on cuda:0 and some on the CPU")
        if torch.device(device or "cpu").type == "cuda":
            here, kwargs["device"] = True, torch.device("cpu")
        if name == "zeros" and torch._C._current_graph_task_id() >= 0:
            here = True  # autograd's own, for topk in torch 2.6, on the device that C++ sees
        plain = tree_map(lambda x: getattr(x, "values_on_cpu", x), (args, kwargs))
        out = func(*plain[0], **plain[1])
        if name == "copy_":
            return args[0]
        if not here:
            return out
        out = tree_map(lambda t: OnCuda(t) if isinstance(t, torch.Tensor) else t, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if tensors else out


@pytest.fixture
def cuda(monkeypatch):
    """The mode that counts, with a real GPU or without."""
    mode = CudaMode()
    if mode.pretended:
        autocast, future = torch.autocast, torch.__future__
        monkeypatch.setattr(torch, "autocast", lambda _, *a, **k: autocast("cpu", *a, **k))
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
        monkeypatch.setattr(future, "_overwrite_module_params_on_conversion", True)
    with mode:
        yield mode


# ---- The device's branch: whole runs, what the host waits for, memory --------------------------
RUNS = [("topk", "pythia", "float32"), ("relu", "gemma2", "bfloat16")]
RUNS += [("batchtopk", "gemma3", "float32"), ("batchtopk", "pythia", "bfloat16")]


@pytest.mark.parametrize("kind, family, dtype", RUNS)
def test_whole_run_on_cuda(cuda, tmp_path, kind, family, dtype):
    """It comes to what one on the CPU does, and --start goes on from its SAE."""
    reference(family, vocab_size=2048).save_pretrained(tmp_path / "lm")
    shutil.copy(model_loaders.TINY / "tokenizer.json", tmp_path / "lm")
    sizes = f"--data tiny --context 32 --kl-tokens 2k --eval-tokens 500 --dtype {dtype}"
    sizes += " --batch 256 --kl-batch 4 --buffer 32 --log-every 2 --lr 1e-3 --dead-after 512"
    new = f"--model {tmp_path / 'lm'} --sae {kind} --k 4 --d-sae 64 --tokens 6k --method kl mse"
    start, results = f"--device cuda --start {tmp_path / 'cuda' / 'before'}", []
    for name, line in {"cuda": new + " --device cuda", "cpu": new, "again": start}.items():
        line = f"{line} {sizes} --out {tmp_path} --name {name}"
        assert saeft.main(line.split()) == 0
        results.append(report_of(tmp_path / name))
    report, on_cpu, loaded = results
    exact = 1e-3 if dtype == "float32" else 3e-2
    for name in ("ce_original", "ce", "fvu"):
        assert report[name] == pytest.approx(on_cpu[name], rel=exact), name
    before, other, again = (row["results"]["MSE"]["ce"] for row in results)
    assert before == pytest.approx(other, rel=exact)
    assert again == pytest.approx(before, rel=1e-4) and loaded["ce"] != again


@pytest.mark.parametrize("kind", ["topk", "relu", "batchtopk"])
def test_host_waits_for_the_tokens_alone(lm, cuda, kind):
    """In the last of some steps of each phase; the first one looks for dead latents."""
    t = Trainee(small_sae(kind).to("cuda:0").train(), lm.to("cuda:0"))
    x, no_limit = (y.to("cuda:0") for y in (torch.randn(50, 32), torch.tensor(torch.inf)))
    stream, waits = Stream(TOKENS[:1].repeat(12, 1)), []

    def after_step(phase, figures):
        waits[:] = cuda.waits
        cuda.waits.clear()

    phase = Phase("MSE", [t], 4, no_limit, step=1)
    phase.buffer = SimpleNamespace(next_batch=lambda n: x)
    saeft.train_mse(phase, LOOP, after_step)
    assert waits == []
    saeft.finetune(Phase("kl", [t], 4, no_limit), t.lm, stream, LOOP, after_step)
    assert waits == ["_to_copy"]  # of the tokens


def test_kl_step_at_the_shape_of_gemma_2_2b_fits_16_gib(monkeypatch):
    config = Config(layer=12, kl_batch=2, dtype="bfloat16")
    slices = [slice(i, i + 512) for i in range(0, 2048, 512)]
    monkeypatch.setattr(saeft, "slices", lambda n, W_U: slices)
    monkeypatch.setattr(saeft, "FAST", False)  # the device's path
    lm = saeft.build_lm(transformers.Gemma2Config().to_dict())  # that of the 2B
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as memory:
        empty = functools.partial(torch.empty, dtype=torch.bfloat16)
        lm.load_state_dict({k: empty(p.shape) for k, p in lm.named_parameters()}, assign=True)
        lm.requires_grad_(False)
        t = Trainee(TopK(2304, 2**14, k=80).train(), lm)
        stream = Stream(torch.zeros(4, 1024, dtype=torch.long))
        saeft.finetune(phase_of(t, steps=2), lm, stream, config, nothing)
    assert 5 * 2**30 < memory.peak < 16 * 2**30


# ---- Safetensors, SAE files --------------------------------------------------------------------
def child(code, *args, **env):
    """What a fresh Python printed as JSON, and nothing else; the code finds the loaders as L."""
    start = f"import json, os, sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code = f"{start}import model_loaders as L, torch\n{code}"
    command = [sys.executable, "-c", code, *map(str, args)]
    out = subprocess.run(command, env={**os.environ, **env}, capture_output=True, timeout=120)
    assert out.returncode == 0 and not out.stderr, out.stderr
    return json.loads(out.stdout)


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].equal(b[k]) for k in a)


def fails(words, call, *args, **more):
    with pytest.raises(model_loaders.UserError) as error:
        call(*args, **more)
    line = str(error.value)
    assert all(word in line for word in words) and "\n" not in line, line
    return line


def test_safetensors_round_trips_with_the_library(tmp_path):
    tensors, path = {"empty": torch.empty(0, 7), "scalar": torch.tensor(3.5)}, tmp_path / "a"
    tensors |= {"bool": torch.arange(5) > 2, "odd": torch.arange(5, dtype=torch.uint8)}
    tensors |= {"t": torch.randn(40, 30).T, "long": torch.randn(2**22 + 9).half()}  # two chunks
    for kind in "float64 bfloat16 int64 int32 int16 int8".split():
        tensors[kind] = (30 * torch.randn(3, 11, 5)).to(getattr(torch, kind))
    model_loaders.write_safetensors(path, tensors, {"k": "ä"})
    assert same(safetensors.load_file(path), tensors)
    assert safetensors.safe_open(path, "pt").metadata() == {"k": "ä"}
    safetensors.save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"format": "pt"})
    assert same(model_loaders.read_safetensors(path, "cpu"), tensors)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}
    assert same(model_loaders.read_safetensors(path, "cpu", torch.bfloat16), half)


def one(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}, **more}


def raw(header, size=8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(size)


SHAPES = [[3], [-2], [-1, -2], [2.0], [True, 2], ["2"], [2**31] * 3, [2**59 + 2, 32], {"2": 1}]
EMPTY_SHAPES = [None, 2, "", {}, [0, 2**62, 2**62], [0, 2**70]]
SPANS = [[False, 8], [0.0, 8.0], [8, 0], [-8, 0], [4, 8], [0, 8, 8], [8], [], "08", 8, None]
HOSTILE = {
    "a header longer than the file": ("header of 3 bytes", raw(b"", 2, 3)),
    "a header over 100 MB": ("header of 100,000,001 bytes", raw(b"", 100_000_001, 100_000_001)),
    "a list": ("", raw([1], 0)),
    "no JSON": ("Expecting", raw(b"{'a': 1}", 0)),
    "deeply nested": ("recursion", raw(b'{"a":' + b"[" * 200_000)),
    "bytes at its end": ("data of 9 bytes", raw(one(), 9)),
    **{
        f"dtype {x}": (f"{x!r}: quantised", raw(one(x))) for x in ("F8_E4M3", "F8_E5M2", "F4", None)
    },
    "an empty entry": ("data_offsets", raw({"a": {}}, 0)),
    **{f"shape {x}": ("'a' cannot be", raw(one(shape=x))) for x in SHAPES},
    **{f"shape {x} of nothing": ("", raw(one(shape=x, offsets=[0, 0]), 0)) for x in EMPTY_SHAPES},
    **{f"offsets {x}": ("", raw(one(offsets=x))) for x in SPANS},
    "overlap": ("'b' cannot be", raw(one(b=one(offsets=[4, 12])["a"]), 12)),
    "a hole": ("'b' cannot be", raw(one(b=one(offsets=[12, 20])["a"]), 20)),
    "more than there is": ("data of", raw(one(shape=[2**50], offsets=[0, 2**52]))),
    "an LFS pointer": ("git lfs pull", b"version https://git-lfs.github.com/spec/v1\noid 4d"),
}


@pytest.mark.parametrize("word, content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_safetensors_are_refused(tmp_path, word, content):
    path = tmp_path / "bad"
    path.write_bytes(content)
    fails(["cannot read", str(path), word], model_loaders.read_safetensors, path)
    path.write_bytes(raw(one(b=one(offsets=[8, 16])["a"], __metadata__={}), 16))  # a sound one
    assert model_loaders.read_safetensors(path).keys() == {"a", "b"}


PEAK = """
def peak(): return [int(l.split()[1]) for l in open("/proc/self/status") if "VmHWM" in l][0] * 1024
torch.ones(1000).bfloat16(); before = peak()
tensors = L.read_safetensors(L.Path(sys.argv[1]), "cpu", torch.bfloat16)
print((peak() - before) / sum(t.nbytes for t in tensors.values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_while_loading(tmp_path):
    model_loaders.write_safetensors(tmp_path / "big", {"a": torch.zeros(5 * 10**7)}, {})
    assert 0.9 < child(PEAK, tmp_path / "big") < 1.3  # of the model's size in bfloat16


def test_folders(tmp_path):
    load = functools.partial(model_loaders.load_config, str(tmp_path))
    weights = functools.partial(model_loaders.load_weights, str(tmp_path), "cpu", torch.float32)
    config, index = tmp_path / "config.json", tmp_path / "model.safetensors.index.json"
    fails(["has no config.json"], load)
    os.mkfifo(config)
    fails(["config.json", "not a regular file"], load)
    config.unlink()
    for content, reason in ((b"[]", "'list'"), (b"{", "Expecting"), (b"\xff{}", "utf-8")):
        config.write_bytes(content)
        fails(["config.json", reason], load)
    model_loaders.write_text(config, '{"d": 1}')
    assert load() == {"d": 1}
    model_loaders.write_text(tmp_path / "deep" / "er" / "cfg.json", "{}")
    assert model_loaders.fetch(str(tmp_path), "deep/er/cfg.json").read_text() == "{}"
    fails(["has no model.safetensors", "safetensors files only"], weights)
    x, y = {"a": torch.ones(2, 3), "b": torch.zeros(1)}, {"c": torch.ones(4)}
    model_loaders.write_safetensors(tmp_path / "x.safetensors", x, {})
    model_loaders.write_safetensors(tmp_path / "y.safetensors", y, {})
    where = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}
    bad = ["../x.safetensors", "/x.safetensors", "z/x.safetensors", "a.bin", "..", ["x"], 3, None]
    bad += ["\0.safetensors", "\ud800.safetensors", "x\n.safetensors"]
    for content in [3, {}, *({"weight_map": {**where, "a": file}} for file in bad)]:
        index.write_text(json.dumps(content))
        fails([index.name], weights)
    index.write_text(json.dumps({"weight_map": where}))
    assert same(weights(), x | y)
    model_loaders.write_safetensors(tmp_path / "y.safetensors", y | {"a": torch.ones(2)}, {})
    fails(["has a twice"], weights)


@pytest.mark.parametrize(
    "name", ["", "pythia-161m", "./no", "~/no one", "a/b/c", "x\ny", "\0", "a@b"]
)
def test_unknown_models(name):
    fails(["has no config.json", "tiny or owner/name"], model_loaders.load_config, name)


SAE_SHAPES = {"W_enc": (6, 20), "b_enc": (20,), "W_dec": (20, 6), "b_dec": (6,)}


def sae_folder(path, tensors=(), **cfg):
    """An SAE in SAELens's layout, with `tensors` and `cfg` changed."""
    tensors = {k: torch.randn(shape) for k, shape in SAE_SHAPES.items()} | dict(tensors)
    cfg = {"architecture": "topk", "d_in": 6, "d_sae": 20, "k": 3, "metadata": {"x": "ü"}} | cfg
    model_loaders.write_safetensors(path / "sae_weights.safetensors", tensors, {})
    model_loaders.write_text(path / "cfg.json", json.dumps(cfg))
    return tensors, cfg


def test_an_interrupted_save_changes_nothing(tmp_path, monkeypatch):
    tensors = {"W_enc": torch.randn(20, 6), "W_dec": torch.randn(20, 6)}
    model_loaders.write_sae(sae := tmp_path / "deep" / "sae", tensors, {"k": 3})
    before = snapshot(sae)
    names = ["cfg.json", "sae_weights.safetensors"]
    for part in names:  # as a save that was killed leaves them
        (sae / f".{part}.part").write_text("half")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(os, "fsync", lambda file: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
        model_loaders.write_sae(sae, {**tensors, "b_dec": torch.ones(6)}, {"k": 4})
    assert sorted(os.listdir(sae)) == names and snapshot(sae) == before
    words = ["cannot write", "cfg.json"]
    fails(words, model_loaders.write_sae, sae / "cfg.json" / "x", tensors, {})
    model_loaders.write_text(sae / "text", "ü")
    assert (sae / "text").read_bytes() == "ü".encode()
    fails(["cannot write"], model_loaders.write_text, sae, "x")


def test_saes_are_read_as_they_were_written(tmp_path):
    """Every tensor, of whatever name and kind, and every key."""
    shapes = SAE_SHAPES | {"W_enc": (20, 6), "log_t": (20,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {"scalar": torch.tensor(3.0), "groups": torch.tensor([5, 15])}
    cfg = {"architecture": "new", "k": 3, "own": [1], "metadata": {"x": "ü", "saeft": {"l": 1}}}
    model_loaders.write_sae(tmp_path, tensors, cfg)
    read, told = model_loaders.read_sae(tmp_path)
    cfg["metadata"]["sae_lens_version"] = "6.54.0"
    assert same(read, tensors) and told == {**told, **cfg, **cfg["metadata"]}
    fixed = {"d_in": 6, "d_sae": 20, "apply_b_dec_to_input": True, "dtype": "float32"}
    assert told == told | fixed | {"normalize_activations": "none", "reshape_activations": "none"}
    sae_folder(tmp_path, {"b_dec": torch.ones(6).half()}, metadata=7)
    read, told = model_loaders.read_sae(str(tmp_path))
    assert read["b_dec"].dtype == torch.float32 and told["saeft"] == {}


ORIGIN = {"model_name": "o/m", "dataset_path": "c4", "context_size": 64, "prepend_bos": False}
ORIGIN |= {"seen": {"2": [9, 64]}, "sink_norm": 1.5, "hook_name": "blocks.3.hook_mlp_out"}


def settings_of(path, metadata, **cfg):
    sae_folder(path, metadata=metadata, **cfg)
    return model_loaders.sae_settings(model_loaders.read_sae(path)[1])


def test_an_sae_tells_its_settings_and_no_others(tmp_path, capsys):
    told = {"layer": 3, "place": "mlp_out", "model": "o/m", "data": "c4", "bos": "no"}
    told |= {"context": 64, "sink_norm": 1.5, "k": [3], "d_sae": 20}
    assert settings_of(tmp_path, ORIGIN) == told
    assert settings_of(tmp_path, {}, k=None) == {"d_sae": 20}
    assert repr(settings_of(tmp_path, {}, k=8.0)["k"]) == "[8]"  # as folders are called
    flat = ORIGIN | {"hook_point": ORIGIN["hook_name"], "hook_name": None}  # before SAELens 6
    assert settings_of(tmp_path, 7, **flat, hook_layer=3) == told
    fails(["blocks.3.hook_mlp_out", "layer 4"], settings_of, tmp_path, ORIGIN, hook_layer=4)
    fails(["['hook_name'] twice"], settings_of, tmp_path, ORIGIN, hook_name="blocks.4.hook_out")
    for given, model in (({"revision": "step8"}, "o/m@step8"), ({"checkpoint_index": 8}, None)):
        seen = settings_of(tmp_path, ORIGIN | {"model_from_pretrained_kwargs": given})
        assert seen.get("model") == model
    identity = {"model": "1", "data": "2", "start": "3"}
    back = model_loaders.sae_metadata(told, False, ORIGIN["seen"], identity)
    assert back["identity"] == {"model": "1", "data": "2"} and back["seen"] == ORIGIN["seen"]
    assert settings_of(tmp_path, back) == told
    odd = {"model_name": [7], "context_size": ["long", 8.0, 0], "dataset_path": [["x"]]}
    odd |= {"prepend_bos": [[1]], "hook_name": [5], "sink_norm": ["4", True]}
    for n in (4, 0):  # JSON of other programs has no 4.0
        assert settings_of(tmp_path, ORIGIN | {"sink_norm": n}) == told | {"sink_norm": n}
    capsys.readouterr()
    for positions, notes in ([0, 8], 1), ([None], 0), (None, 0):
        assert settings_of(tmp_path, ORIGIN | {"seqpos_slice": positions}) == told
        assert capsys.readouterr().out.count("note: the SAE was trained with seqpos") == notes
    assert settings_of(tmp_path, ORIGIN | {"exclude_special_tokens": True}) == told
    assert "note: the SAE was trained with exclude_special" in capsys.readouterr().out
    fails(["['k'] twice"], settings_of, tmp_path, ORIGIN | {"saeft": {"k": 2}})
    for key, value in ((key, value) for key, values in odd.items() for value in values):
        fails([repr(value)], settings_of, tmp_path, ORIGIN | {key: value})
    for k in (-1, "many", [3], True):
        fails(["k = ", repr(k)], settings_of, tmp_path, ORIGIN, k=k)


CENTRED = {"model_from_pretrained_kwargs": {"x": 1, "center_writing_weights": True}}
UNREAD = [  # ends in a blank: convert.py is named
    ({}, {"metadata": CENTRED}, "center_writing_weights True "),
    ({}, CENTRED, "center_writing_weights True "),
    ({}, {"hook_head_index": 3}, "hook_head_index 3 "),
    ({}, {"hook_point_head_index": 1}, "hook_point_head_index 1 "),
    ({}, {"activation_fn": "topk"}, "activation_fn 'topk' "),
    ({}, {"activation_fn_kwargs": {"k": 2}}, "activation_fn_kwargs {'k': 2} "),
    ({}, {"hook_name_out": "blocks.4.hook_mlp_out"}, "hook_name_out 'blocks.4.hook_mlp_out' "),
    ({}, {"apply_b_dec_to_input": False}, "apply_b_dec_to_input False "),
    ({}, {"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm True "),
    ({}, {"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm' "),
    ({}, {"reshape_activations": "hook_z"}, "reshape_activations 'hook_z' "),
    ({}, {"activation_fn_str": "topk"}, "activation_fn_str 'topk' "),
    ({}, {"d_sae": 21}, "[6, 21]"),
    ({}, {"d_in": None}, "None"),
    ({"b_enc": torch.ones(19)}, {}, "[19]"),
    ({"b_dec": torch.ones(33)}, {}, "'b_dec': [33]"),
    ({"gate": torch.ones(20)}, {}, "gate"),
    ({}, {"architecture": "jumprelu"}, "threshold"),
    ({"threshold": torch.tensor(1.0)}, {"architecture": "jumprelu"}, "threshold"),
    ({}, {"architecture": "gated"}, "'gated'"),
    ({}, {"architecture": None}, "cfg.json has k = 3, but no architecture"),
    ({}, {"architecture": "standard"}, "cfg.json has k = 3, but no architecture with one"),
    ({}, {"k": "6"}, "for abs(): 'str'"),
    ({}, {"k": -1}, "'k': -1"),
    ({"extra": torch.tensor(torch.inf)}, {}, "extra is not of finite numbers"),
    ({"W_dec": torch.full((20, 6), torch.nan)}, {}, "W_dec is not of finite numbers"),
    ({"b_dec": torch.ones(6, dtype=torch.int8)}, {}, "b_dec is not of finite numbers"),
]


@pytest.mark.parametrize("tensors, cfg, word", UNREAD)
def test_saes_that_cannot_be_read_as_they_are(tmp_path, tensors, cfg, word):
    sae_folder(tmp_path, tensors, **cfg)
    advice = f"python experiments/convert.py {tmp_path} FOLDER" if word.endswith(" ") else ""
    assert fails([word, advice], SAE.load, tmp_path).startswith(str(tmp_path))


# ---- Tokenizers -------------------------------------------------------------------------------

NEOX_FILE = Path(__file__).parent.parent / "shared/tokenizers/neox.json"
WORLD = "été naïve Straße 日本語 пример 한국어 👩‍👩‍👧 e\u0301 ἀρχή שלום नमस्ते ทดสอบ "
WORDS = WORLD.split() + "the self def return x 's 'll 'LL it's 12345 007 <0x0A>".split()
CONTROL = "<|endoftext|> <|padding|> <pad> <eos> <bos> <unk>".split()
SYMBOLS = "<mask> [@BOS@] <unused0> <unused01> <start_of_turn> <table> <td> </td>".split()
RUNS = [c * n for c, first in (("\n", 1), ("▁", 2), ("\t", 2)) for n in range(first, 32)]
SPACES = [" ", "\n", "\t", "\r\n", "\r", "▁", "  ", "\n\n", "\u3000", "\xa0", "\u2028", "\x1f"]
MARKS = [chr(c) for c in range(0x110000) if unicodedata.combining(chr(c))]
BLOCKS = "0-7f 20-7f a0-600 900-e00 1100-1200 1e00-2100 2000-2070 4e00-a000 ac00-d7a4 f900-10000"
BLOCKS += " 11000-12000 1d100-1d200 1f300-1fa00 0-d800 e000-110000"
BLOCKS = [[int(end, 16) for end in block.split("-")] for block in BLOCKS.split()]
LONG = [char * 1_000_000 for char in ("a", " ", "\n", "▁")]
LIBRARY = sorted(Path(random.__file__).parent.glob("*.py"))
LIBRARY = "".join(path.read_text("utf-8", errors="replace") for path in LIBRARY)


def put(folder, files):
    """Write {name: text, bytes or what JSON can say} into a folder, which is returned."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, (bytes, np.ndarray)):
            path.write_bytes(bytes(content))
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def library(start: int, n_chars: int) -> list[str]:
    return [LIBRARY[i : i + 20_000] for i in range(start, start + n_chars, 20_000)]


def random_texts(n_chars: int, seed: int, nfc: bool = False) -> list[str]:
    """`nfc`: without characters younger than Unicode 3.2: the reference's NFC is Unicode 9's,
    Python's is newer."""
    rng, pieces, some = random.Random(seed), [], lambda get, n: "".join(get() for _ in range(n))
    char = lambda: chr(rng.randrange(*rng.choice(BLOCKS)))  # noqa: E731
    while n_chars > 0:
        n = rng.randint(1, 70)
        pieces.append(rng.choice([
            lambda: some(char, n // 4),
            lambda: char() + some(lambda: rng.choice(MARKS), n // 16),  # NFC: marks in any order
            lambda: rng.choice(" \n\t▁ab-=*#.é") * n,
            lambda: some(lambda: rng.choice(SPACES), n // 5),
            lambda: rng.choice(CONTROL + SYMBOLS)[: rng.choice([2, 99, 99])],
            lambda: rng.choice(["", " ", "  ", "▁"]) + rng.choice(WORDS),
        ])())  # fmt: skip
        n_chars -= len(pieces[-1])
    texts = ["", *CONTROL, *("".join(pieces[i : i + 30]) for i in range(0, len(pieces), 30))]
    if nfc:
        age = unicodedata.ucd_3_2_0.category
        texts = ["".join(char for char in text if age(char) != "Cn") for text in texts]
    return texts


def assert_same(spec: dict, texts: list[str]) -> model_loaders.Tokenizer:
    """Every id of every text equal, and the text of those; byte-level, of random ids too."""
    ours, reference = model_loaders.Tokenizer(spec), tokenizers.Tokenizer.from_str(json.dumps(spec))
    expected = [e.ids for e in reference.encode_batch_fast(texts, add_special_tokens=False)]
    for got, ids in zip(map(ours.encode, texts), expected, strict=True):
        same = len(os.path.commonprefix([got, ids]))
        assert got[same:][:5] == ids[same:][:5], reference.decode(ids[:same])[-40:]
    rng = random.Random(0)
    samples = [ids for ids in expected[-20:] if len(ids) < 10_000]
    if not spec["model"].get("byte_fallback"):  # the last 5 are no token's
        samples += [rng.choices(range(ours.n_vocab + 5), k=rng.randint(0, 9)) for _ in range(300)]
    for ids in samples:
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=False), ids
    return ours


def train_byte_level(vocab_size: int, texts: list[str], normalizer=None, added=()) -> dict:
    tokenizer = ByteLevelBPETokenizer(unicode_normalizer=normalizer)
    tokenizer.train_from_iterator(texts, vocab_size, 2, False, ["<|endoftext|>"])
    tokenizer.add_tokens([AddedToken(text, normalized=normalized) for text, normalized in added])
    return json.loads(tokenizer.to_str())


def train_sentencepiece(vocab_size: int, texts: list[str], symbols: list[str]):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines()),
        model_writer=model, model_type="bpe", vocab_size=vocab_size, user_defined_symbols=symbols,
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>",
        bos_piece="<bos>", unk_piece="<unk>", minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def puts_first(token, vocab, more=()):
    """A post_processor in the form of `tokenizers`."""
    single = [{"SpecialToken": {"id": name, "type_id": 0}} for name in (token, *more)]
    ids = {name: {"id": name, "ids": [vocab[name]], "tokens": [name]} for name in (token, *more)}
    single += [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": ids}


def gemma_spec(sp, symbols: list[str], by_score: bool) -> dict:
    """`tokenizer.json` as transformers' GemmaConverter makes it: each split of a piece into two
    pieces is a merge, in the order of scores (user-defined symbols first) or of ids."""
    pieces = [sp.id_to_piece(i) for i in range(sp.get_piece_size())]
    pieces = ["\t" if p == "<0x09>" and "\t" not in pieces else p for p in pieces]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    pairs = [(p[:k], p[k:]) for p in vocab for k in range(1, len(p))]
    merges = [pair for pair in pairs if vocab.keys() >= {*pair}]
    sign, rank = (-1, lambda i: -sp.get_score(i)) if by_score else (1, lambda i: i)
    merges.sort(key=lambda lr: (rank(vocab[lr[0] + lr[1]]), sign * len(lr[0]), sign * len(lr[1])))
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized", "special"], False)
    added = pieces[:4] + [piece for piece in pieces[4:] if piece in symbols]
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    steps = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]
    bpe = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    merges = merges if by_score else [" ".join(pair) for pair in merges]
    return {
        "post_processor": puts_first("<bos>", vocab),
        "added_tokens": [{"id": vocab[p], "content": p} | flags for p in added],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": split | {"invert": False} if by_score else None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": bpe | {"vocab": vocab, "merges": merges},
    }


BYTE = train_byte_level(400, library(0, 20_000))
SMALL_SPM = train_sentencepiece(800, [WORLD * 3, *library(0, 20_000)], SYMBOLS)
GEMMA_LIKE = gemma_spec(SMALL_SPM, SYMBOLS, by_score=True)


# With test_byte_level_ids, 5.2 million characters are compared, not counting the long runs.
@pytest.mark.parametrize("symbols", [SYMBOLS + RUNS, SYMBOLS + RUNS[1:40:2]])
def test_gemma_ids(symbols):
    all_runs = len(symbols) > 60
    sp = train_sentencepiece(3000, library(0, 300_000) + [WORLD] * 200, symbols)
    texts = library(1_000_000, 850_000) + random_texts(850_000, 2)
    ours = assert_same(gemma_spec(sp, symbols, by_score=all_runs), texts + LONG * all_runs)
    assert (ours.n_vocab, ours.eos_id, ours.bos_id) == (3000, 1, 2)
    # SentencePiece itself finds no control tokens in a text, and takes a written ▁ for a space.
    plain = [text for text in texts if not any(word in text for word in ["▁", *CONTROL])]
    if all_runs:
        assert sum(map(len, plain)) > 700_000
        assert all(ours.encode(text) == sp.encode(text) for text in plain)


NEOX_ADDED = [*((" " * n, True) for n in range(2, 25)), ("<td>", True), ("<é>", True)]
OVERLAPPING = [("    ", False), ("<|padding|>", False), ("<|pad", True), ("\n", True)]


@pytest.mark.parametrize(
    "normalizer, added", [(None, []), ("nfc", NEOX_ADDED), (None, OVERLAPPING)]
)
def test_byte_level_ids(normalizer, added):
    spec = train_byte_level(2000, library(0, 200_000), normalizer, added)
    long = [] if added is OVERLAPPING else [run + end for run in LONG[:3] for end in ("", "x")]
    drawn = random_texts(300_000, 3, nfc=normalizer == "nfc")
    assert_same(spec, library(2_000_000, 300_000) + drawn + long)


def test_what_changes_no_id(tmp_path):
    """A lone surrogate is U+FFFD; transformers writes the truncation and padding of its last call."""
    ours = model_loaders.Tokenizer(BYTE)
    other = model_loaders.Tokenizer(BYTE | {"normalizer": {"type": "NFC"}})
    assert ours.encode("a\ud800b\udc00\ud83d\ude00") == ours.encode("a\ufffdb\ufffd\U0001f600")
    assert ours.fingerprint == model_loaders.Tokenizer(json.loads(json.dumps(BYTE))).fingerprint
    assert ours.fingerprint != other.fingerprint
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    own = tokenizers.Tokenizer.from_str(json.dumps(BYTE))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=own, **names)
    theirs(["a long text of many words", "x"], truncation=True, max_length=5, padding="max_length")
    theirs.save_pretrained(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    assert spec["truncation"] and spec["padding"]
    again = model_loaders.load_tokenizer(str(tmp_path))
    assert all(again.encode(text) == ours.encode(text) for text in library(0, 20_000))


EXTRA = {"id": 2048, "content": "</s>", "special": True, "normalized": False}
EXTRA |= dict.fromkeys(["single_word", "lstrip", "rstrip"], False)


@pytest.mark.parametrize("normalized", [False, True])
def test_an_added_token_s_flags_are_those_beside_it(tmp_path, normalized):
    token = {**EXTRA, "id": len(BYTE["model"]["vocab"]), "content": "café", "special": False}
    spec = BYTE | {"normalizer": {"type": "NFC"}}
    spec["added_tokens"] = [*BYTE["added_tokens"], token | {"normalized": not normalized}]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    config["added_tokens_decoder"] = {str(token["id"]): token | {"normalized": normalized}}
    put(tmp_path, {"tokenizer.json": spec, "tokenizer_config.json": config})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = model_loaders.load_tokenizer(str(tmp_path)).encode("cafe\u0301 x")
    assert ids == theirs.encode("cafe\u0301 x", add_special_tokens=False)
    assert (token["id"] in ids) == normalized


MERGES = BYTE["model"]["merges"]
GEMMA_MERGES = GEMMA_LIKE["model"]["merges"]
JOINED = ["".join(pair) for pair in GEMMA_MERGES]
UNMERGED = BYTE | {"added_tokens": [], "model": BYTE["model"] | {"merges": []}}
WITHOUT_A = {t: i for i, t in enumerate(t for t in BYTE["model"]["vocab"] if t != "a")}
TWINS = [*GEMMA_LIKE["added_tokens"]]
for text in (" qzq", "▁qzq"):  # raw, and one that the normaliser makes the same
    last = max(len(GEMMA_LIKE["model"]["vocab"]) - 1, *(token["id"] for token in TWINS))
    token = {"content": text, "normalized": text[0] == "▁", "id": last + 1}
    TWINS.append(GEMMA_LIKE["added_tokens"][0] | token)
TWO_WAYS = max(i for i in range(1, len(JOINED)) if JOINED[i] == JOINED[i - 1]) - 1  # to one token


@pytest.mark.parametrize("base, path, value, says", [
    (BYTE, "model type", "WordPiece", "WordPiece"),
    (BYTE, "model dropout", 0.1, "dropout"),
    (BYTE, "model end_of_word_suffix", "</w>", "end_of_word_suffix"),
    (BYTE, "normalizer", {"type": "Lowercase"}, "Lowercase"),
    (BYTE, "pre_tokenizer", {"type": "Split", "pattern": {"Regex": "\\d"}}, "Split"),
    (BYTE, "pre_tokenizer add_prefix_space", True, "add_prefix_space"),
    (BYTE, "pre_tokenizer use_regex", False, "use_regex"),
    (BYTE, "added_tokens", [BYTE["added_tokens"][0] | {"lstrip": True}], "lstrip"),
    (BYTE, "added_tokens", BYTE["added_tokens"] * 2, "one twice"),
    (BYTE, "added_tokens", [BYTE["added_tokens"][0] | {"id": 1}], "do not follow"),
    (BYTE, "model vocab", {"<|endoftext|>": 0, "a": 1}, "vocabulary"),
    (BYTE, "model vocab", {"<|endoftext|>": 0, "a": 2}, "0, 1, 2"),
    (BYTE, "model vocab", {"<|endoftext|>": 0, "a": float("nan")}, "0, 1, 2"),
    (BYTE, "model vocab", {"<|endoftext|>": 0, "\ud800": 1}, "cannot read"),
    (BYTE, "model merges", ["a b c"], "cannot read"),
    (BYTE, "model merges", MERGES[1:], "order of training"),
    (BYTE, "model merges", MERGES + MERGES[:1], "stand apart"),
    (GEMMA_LIKE, "normalizer content", "_", "'_'"),
    (GEMMA_LIKE, "model vocab", {"<eos>": 0, "日": 1}, "do not follow"),
    (GEMMA_LIKE, "model merges", GEMMA_MERGES[:TWO_WAYS] + GEMMA_MERGES[TWO_WAYS + 1 :], "order of training"),
    (UNMERGED, "model vocab", WITHOUT_A, "no token for some byte"),
    (GEMMA_LIKE, "added_tokens", TWINS, "the same text"),
])  # fmt: skip
def test_unreadable(tmp_path, base, path, value, says):
    spec = part = json.loads(json.dumps(base))
    *parents, key = path.split()
    for parent in parents:
        part = part[parent]
    part[key] = value
    put(tmp_path, {"tokenizer.json": spec})
    fails([says], model_loaders.load_tokenizer, tmp_path)
    put(tmp_path, {"tokenizer.json": json.dumps(BYTE)[:-5]})  # a damaged file
    fails(["cannot read"], model_loaders.load_tokenizer, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    fails(["has no tokenizer.json"], model_loaders.load_tokenizer, tmp_path)


SPEC = json.loads((model_loaders.TINY / "tokenizer.json").read_text())
SPEC["added_tokens"].append(EXTRA)
VOCAB = SPEC["model"]["vocab"]
END, DEF = VOCAB["<|endoftext|>"], VOCAB["def"]
FIRST = puts_first("def", VOCAB)
AFTER_BYTES = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, FIRST]}
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
OTHERWISE = "files beside it say otherwise of"
BESIDE = [  # a file, what it says; the end of text, what is put first, and with --bos yes; or words
    (CONFIG, {}, (END, None, END)),
    (CONFIG, {"eos_token": None}, (END, None, END)),
    (CONFIG, {"eos_token": "</s>"}, (2048, None, 2048)),
    (CONFIG, {"eos_token": {"content": "</s>"}}, (2048, None, 2048)),
    (CONFIG, {"bos_token": "</s>"}, (END, None, 2048)),
    ("tokenizer.json", {"post_processor": None}, (END, None, END)),
    ("tokenizer.json", {"post_processor": {"type": "ByteLevel"}}, (END, None, END)),
    ("tokenizer.json", {"post_processor": FIRST}, (END, DEF, DEF)),
    ("tokenizer.json", {"post_processor": AFTER_BYTES}, (END, DEF, DEF)),
    ("tokenizer.json", {"post_processor": puts_first("def", VOCAB, ["self"])}, "post_processor"),
    ("tokenizer.json", {"post_processor": puts_first("def", {"def": -1})}, "post_processor"),
    ("tokenizer.json", {"post_processor": {"type": "RobertaProcessing"}}, "post_processor"),
    (CONFIG, {"eos_token": "<none>"}, "cannot read"),
    (CONFIG, {"eos_token": {"no": "content"}}, "cannot read"),
    (CONFIG, {"eos_token": ["x"]}, "cannot read"),
    (CONFIG, '{"eos_token": ', CONFIG),
    (CONFIG, {"added_tokens_decoder": {"2049": {"content": "<new>"}}}, OTHERWISE),
    (CONFIG, {"added_tokens_decoder": {"7": {"content": "def"}}}, OTHERWISE),
    (CONFIG, {"added_tokens_decoder": {str(DEF): {"content": "def"}}}, OTHERWISE),  # is cut out
    (CONFIG, {"added_tokens_decoder": {"2048": EXTRA | {"rstrip": True}}}, OTHERWISE),
    (CONFIG, {"extra_special_tokens": {"image": "<new>"}}, OTHERWISE),
    (CONFIG, {"model_specific_special_tokens": {"image": "def"}}, OTHERWISE),
    (CONFIG, {"add_prefix_space": True}, OTHERWISE),
    (CONFIG, {"split_special_tokens": True}, OTHERWISE),
    (CONFIG, {"pad_token": "<pad>"}, OTHERWISE),
    (CONFIG, {"image_token": "<new>"}, OTHERWISE),  # whatever it is called
    (CONFIG, {"mask_token": "def"}, OTHERWISE),  # of the vocabulary: not cut out of a text
    (MAP, {"bos_token": {"content": "<s>"}}, OTHERWISE),
    (MAP, {"additional_special_tokens": ["<new>"]}, OTHERWISE),
    (ADDED, {"<new>": 2049}, OTHERWISE),
]


@pytest.mark.parametrize("name, says, expected", BESIDE)
def test_a_tokenizer_is_read_with_what_stands_beside_it(tmp_path, name, says, expected):
    """As transformers reads it: the end of text, what is put first, tokens that it lacks, damage."""
    put(tmp_path, {"tokenizer.json": SPEC})
    put(tmp_path, {name: SPEC | says if name == "tokenizer.json" else says})
    load = functools.partial(model_loaders.load_tokenizer, tmp_path)
    if isinstance(expected, str):
        fails([expected], load)
        return
    auto, always = load(), load("yes")
    assert (auto.eos_id, auto.bos_id, always.bos_id) == expected
    assert auto.n_vocab == 2049
    assert load("no").bos_id is None
    if says == {"eos_token": None}:
        put(tmp_path, {MAP: {"eos_token": "</s>"}})  # what is null says nothing
        assert load().eos_id == 2048
    if expected[0] == 2048:
        put(tmp_path, {MAP: {"eos_token": "def"}})  # of these transformers' versions take either
        fails(["several ends of text", "def"], load)
    (tmp_path / ADDED).symlink_to(tmp_path / "nowhere")
    fails(["cannot read", ADDED], load)


REAL = Path(os.environ.get("SAEFT_VOCABULARIES", "/none"))
REAL = {  # the number of ids, the end of text, <bos>
    NEOX_FILE: (50277, 0, None),
    REAL / "gemma2" / "tokenizer.json": (256_000, 1, 2),
    REAL / "gemma3" / "tokenizer.json": (262_145, 1, 2),
}


@pytest.mark.parametrize("path, about", REAL.items(), ids=["neox", "gemma2", "gemma3"])
def test_real_vocabularies(path, about):
    """Set SAEFT_VOCABULARIES to a folder with gemma2/tokenizer.json and gemma3/tokenizer.json."""
    if not path.exists():
        pytest.skip(f"{path} is not here")
    spec = json.loads(path.read_text("utf-8"))
    tokens = [token.replace("▁", " ") for token in spec["model"]["vocab"]]
    texts = library(0, 300_000) + random_texts(300_000, 4, nfc=path == NEOX_FILE)
    texts += [f"<p>{word}</p> </td> > </b>  <i> x> y" for word in WORDS]
    texts += [" YYYY-MM-DD", " ======", "   the", " diffformul"] + tokens[::40]
    texts += [" " + token for token in tokens[::40]] + ["> " * 20_000]
    ours = assert_same(spec, texts + LONG + ["\n \r" * 300_000 + "x", "é" * 1_000_000 + " "])
    assert (ours.n_vocab, ours.eos_id, ours.bos_id) == about


def test_a_token_that_its_own_characters_do_not_make():
    """As Gemma 3's " YYYY": in its vocabulary, but the text becomes " Y", "YY", "Y"."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *model_loaders.SPM_BYTES, *"▁Ya"]
    made = ["YY", "▁Y", "▁YY", "▁YYY", "▁YYYY"]
    vocab = {token: i for i, token in enumerate(names + made)}
    splits = [(t[:n], t[n:]) for t in made for n in range(1, len(t))]
    merges = [pair for pair in splits if vocab.keys() >= {*pair}]
    model = GEMMA_LIKE["model"] | {"vocab": vocab, "merges": merges}
    added = [t for t in GEMMA_LIKE["added_tokens"] if t["id"] < 4]
    spec = GEMMA_LIKE | {"model": model, "added_tokens": added}
    assert_same(spec, [" " + "Y" * n + end for n in range(9) for end in ("", "a", " ")])


# ---- Token streams ----------------------------------------------------------------------------


class Bytes:
    """A tokenizer: one id for each byte, 0 ends a document."""

    eos_id, bos_id, n_vocab, fingerprint, calls, fail = 0, None, 256, "bytes", 0, None

    def __init__(self, **changes):
        vars(self).update(changes)

    def encode(self, text):
        self.calls += 1
        if self.fail:
            raise self.fail
        return list(text.encode())


def texts(count=400, size=40, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh \n", k=size)).strip() + "x" for _ in range(count)]


def jsonl(lines):
    return "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()


def joined(lines, held):
    return b"".join(line.encode() + b"\0" for line in lines if held_out(line) == held)


def ids(sequences):
    return bytes(sequences.flatten().tolist())


@pytest.fixture
def stream(tmp_path, monkeypatch):
    """Make token streams with a cache of this test's own, and close them after it. Their sequences
    come in order, unless the test says that more of them mix."""
    made = []

    def make(
        data, tokenizer=None, context=16, train=1600, val=160, cache=tmp_path, mix=1, **options
    ):
        tokenizer = tokenizer or Bytes()
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setattr(model_loaders, "MIX", mix)
        monkeypatch.setattr(model_loaders, "SPREAD", mix)
        made.append(TokenStream(str(data), tokenizer, context, train, val, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def lines_file(tmp_path):
    return put(tmp_path, {"a.jsonl": jsonl(texts())}) / "a.jsonl"


@pytest.mark.parametrize("bos, marks", [(None, ""), (7, ""), (7, "\7 \7"), (0, "")])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.gz", "a.bin"])
def test_streams_are_the_documents_end_to_end(tmp_path, stream, name, bos, marks):
    """<bos> opens each sequence, and none stands in the middle, but where it is the end of text."""
    lines = [text + marks for text in texts()]
    train, val = (joined(lines, held) for held in (False, True))
    of_ids = np.frombuffer(train, np.uint8).astype(np.uint16)
    content = of_ids if name == "a.bin" else jsonl(lines)
    packed = gzip.compress(content) if name.endswith("gz") else content
    s = stream(put(tmp_path, {name: packed}) / name, Bytes(bos_id=bos))
    rows, first = s.train(0, 100), int(bos is not None)
    own = 16 - first  # ids of the text in a sequence
    assert rows.dtype == torch.int64 and rows.shape == (100, 16) and s.n_train == 100
    assert ids(rows[:, first:]) == train.replace(b"\7", b"")[: 100 * own]
    assert not first or (rows[:, 0] == bos).all()
    assert torch.equal(s.train(7, 3), rows[7:10])
    if name != "a.bin":
        held = s.validation()
        assert ids(held[:, first:]) == val.replace(b"\7", b"")[: 10 * own]


PARAGRAPH = "word " * 400 + "\n\n"
ONE_LINE = "".join(f"{i} of one line, " for i in range(200_000))
ANY_FORM = [ONE_LINE, ONE_LINE.replace(", ", "\r\n"), ONE_LINE.replace(" ", "x"), PARAGRAPH * 1000]


@pytest.mark.parametrize("content", ANY_FORM, ids=["one line", "CRLF", "one word", "paragraphs"])
@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_a_text_of_any_form_is_cut_into_pieces(tmp_path, form, content):
    text = json.dumps({"text": content}) if form == "jsonl" else content
    put(tmp_path, {f"a.{form}": text.encode()})
    found = documents(str(tmp_path))
    assert "".join(found) == content and len(found) > 30
    assert max(map(len, found)) <= (1 << 16 if form == "jsonl" else 1 << 13)


def test_marks_in_a_txt_separate_documents_that_stay_whole(tmp_path, monkeypatch):
    whole = [f"{i} " + "word " * n for i, n in enumerate([3, 30_000, 5, 40_000, 900_000, 2])]
    ends = ["<|endoftext|>\n", "<|endoftext|>\r\n", "<|endoftext|>"]
    pack = pytest.importorskip("zstandard").compress
    for n, is_late in (900_000, True), (700_000, False):  # in the first block, packed or not
        text = "word " * n + ends[0] + "word"
        packed = pack(text.encode())
        for name, content in {"late.txt": text, "late.txt.zst": packed}.items():
            late = model_loaders.pieces(str(put(tmp_path / "late", {name: content}) / name))
            if is_late:
                fails(["the first <|endoftext|> is late"], list, late)
            else:
                assert "".join(piece for piece, *_ in late) == text.replace(ends[0], "")
    text = "".join(text + end for text, end in zip(whole, [*ends, *ends[:2], ""]))
    (tmp_path / "a.txt").write_text(text, newline="")
    found = list(model_loaders.pieces(str(tmp_path / "a.txt")))
    for document in whole:  # each piece is on the document's side, and the last one ends it
        own = []
        while "".join(text for text, *_ in own) != document:
            own.append(found.pop(0))
        assert {held for _, held, _ in own} == {held_out(document)}
        assert [ends for *_, ends in own] == [False] * (len(own) - 1) + [True]
    assert not found
    (tmp_path / "b.txt").write_text("word " * 30_000 + ends[-1])  # one alone, at the end
    alone = documents(str(tmp_path / "b.txt"))
    assert "".join(alone) == "word " * 30_000 and len(alone) == 3
    for end in ends:  # and wherever a block ends, the newline is of the mark
        for block in range(3, 40):
            monkeypatch.setattr(model_loaders, "BLOCK", block)
            (tmp_path / "a.txt").write_text(f"one{end}two{end} three{end}", newline="")
            assert documents(str(tmp_path / "a.txt"))[:3] == ["one", "two", " three"]


def test_forms_of_text(tmp_path):
    """A .txt is cut where a line ends; hidden files, of runs, or of other kinds are left out."""
    put(tmp_path, {"a.txt": b"\xef\xbb\xbfx\0 = 1\r\n\n", "d.parquet": b"PAR1"})
    put(tmp_path, {"b.TXT.GZ": gzip.compress((PARAGRAPH * 12).encode())})
    read = model_loaders.source_files(str(tmp_path))
    put(tmp_path, {".hidden.txt": "no", ".git/e.txt": "no"})
    run = put(tmp_path / "x", {".saeft": "", "metrics.jsonl": "", "k4/metrics.jsonl": ""})
    os.mkfifo(tmp_path / "f.txt")
    assert len(read) == 2
    assert model_loaders.source_files(str(tmp_path)) == read
    fails(["no text in"], model_loaders.source_files, str(run))
    cut = documents(str(tmp_path / "b.TXT.GZ"))
    assert "".join(cut) == PARAGRAPH * 12 and all(piece.endswith("\n") for piece in cut)
    assert documents(str(tmp_path / "a.txt")) == ["x\0 = 1\r\n\n"]


def test_links(tmp_path, monkeypatch):
    """One to the folder or to a file is followed, one to a folder in it, or to nothing, refused."""
    real = put(tmp_path / "real", {"a.txt": "text"})
    (tmp_path / "data").symlink_to(real)
    (tmp_path / "b.txt").symlink_to(real / "a.txt")
    for name in ("data", "b.txt"):
        assert documents(str(tmp_path / name)) == ["text"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents("~/real") == ["text"]
    for target in (real, "nothing.txt"):
        (real / "train").symlink_to(target)
        fails(["train is a link, but to no file"], documents, str(real))
        (real / ".venv").mkdir(exist_ok=True)
        (real / "train").rename(real / ".venv" / "lib64")  # which is not read
        assert documents(str(real)) == ["text"]
        (real / ".venv" / "lib64").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != ".venv")
    assert documents(str(real)) == ["text"]
    (real / ".venv").rename(real / "closed")
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "closed")
    fails(["closed is closed to you"], documents, str(real))
    fails(["cannot read", "File name too long"], documents, str(tmp_path / ("n" * 300)))


def test_memory_stays_bounded_and_nothing_hangs(tmp_path):
    """200 MB of blank lines; a packed file of 200 MB of one letter."""
    with gzip.open(tmp_path / "blank.txt.gz", "wb", 1) as file:
        for _ in range(50):
            file.write(b"\n" * 4_000_000)
    code = """
def peak(): return [int(l.split()[1]) for l in open("/proc/self/status") if "VmHWM" in l][0] // 1024
before = peak(); start = time.monotonic()
found = sum(len(text) for text, *_ in L.pieces(sys.argv[1]))
print(json.dumps([found, peak() - before, time.monotonic() - start]))
"""
    found, megabytes, seconds = child(code, tmp_path / "blank.txt.gz")
    assert found == 0 and megabytes < 100 and seconds < 60
    packer = pytest.importorskip("zstandard").ZstdCompressor().compressobj()
    packed = b"".join(packer.compress(b"x" * 2**20) for _ in range(200)) + packer.flush()
    found, megabytes, seconds = child(code, put(tmp_path, {"x.txt.zst": packed}) / "x.txt.zst")
    assert found == 200 * 2**20 and megabytes < 500 and seconds < 60


def test_zstd_of_several_frames(tmp_path, monkeypatch):
    zstandard = pytest.importorskip("zstandard")
    frames = b"".join(zstandard.compress(jsonl([text])) for text in ("one", "two"))
    path = str(put(tmp_path, {"a.jsonl.zst": frames}) / "a.jsonl.zst")
    assert documents(path) == ["one", "two"]
    if sys.version_info < (3, 14):
        monkeypatch.setitem(sys.modules, "zstandard", None)
        fails(["pip install zstandard"], documents, path)


@pytest.mark.parametrize("packed", ["zst", "gz"])
@pytest.mark.parametrize("kept", [0.5, 0.9, 0.999])
def test_a_truncated_file_is_no_end_of_the_data(tmp_path, packed, kept):
    library = pytest.importorskip("zstandard") if packed == "zst" else gzip
    data = library.compress(jsonl([os.urandom(200).hex() for _ in range(300)]))
    put(tmp_path, {f"a.jsonl.{packed}": data[: int(len(data) * kept)]})
    with pytest.raises(UserError, match="cannot read .*(ends in the middle|ended before)"):
        documents(str(tmp_path))


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"text": "x"}\n\n{"text": 3}\n', "line 3: no JSON object"),
    ("a.jsonl", b'["text"]\n', "line 1"),
    ("a.jsonl.gz", b"not gzip", "Not a gzipped file"),
    ("a.txt", "é".encode("latin-1") * 99, "can't decode .* invalid"),
    ("a.txt", "text".encode("utf-16"), "utf-8"),
    ("a.txt", "text\n".encode("utf-16-le") * 99, "UTF-16: convert it to UTF-8"),
    ("a.txt", b'{"id": 1, "text": "x"}\n' * 9, "holds JSON Lines: call it .jsonl"),
    ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ("a.parquet", b"PAR1", "no text in"),
    ("a.bin", b"123" * 9, "give uint16 ids of this tokenizer, under 256"),
    ("a.bin", np.array([50, 300] * 5000, np.uint16), "a.bin: as uint16 it holds 300: give uint16 ids of this tokenizer, under 256, or text"),
    ("a.bin", np.arange(1, 90, dtype=np.uint32).repeat(200), "every second id is 0, so they are wider"),
    ("none.txt", None, "no text in"),
    ("c5", None, "owner/name on the Hub, c4, pile"),
    ("", None, "no text in ''"),
    ("~nosuchuser/x/y", None, "no text in '~nosuchuser"),
    ("nul\0/x", None, "no text in"),
])  # fmt: skip
def test_bad_sources_are_user_errors(tmp_path, stream, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    put(tmp_path, {} if content is None else {name: content})
    data = str(tmp_path / name) if content is not None or "none" in name else name
    with pytest.raises(UserError, match=message) as error:
        stream(data).train(0, 1)
    assert "\n" not in str(error.value) and repr(data)[1:-1] in str(error.value)


def test_a_cache_is_filled_once_and_grows_without_regard_to_budgets(lines_file, stream):
    lines_file.write_bytes(jsonl(lines := texts(3000, 500)))
    tokenizers = [Bytes() for _ in range(4)]
    for s in [stream(lines_file, t, train=16_000, val=40_000) for t in tokenizers]:
        assert ids(s.train(0, 1000)) == joined(lines, False)[:16_000]
        assert ids(s.validation()) == joined(lines, True)[:40_000]  # of more documents than train
        s.close()
    assert sum(tokenizer.calls > 0 for tokenizer in tokenizers) == 1
    big = stream(lines_file, train=1_200_000, val=56_000)
    assert ids(big.train(0, big.n_train)) == joined(lines, False)[:1_200_000]
    assert ids(big.validation()) == joined(lines, True)[:56_000]


META = [None, b"", b"[1, 2, [3", b"{}", b"text", b"[1, 2]", b"[[0, 0], [0, 0], 0]", b"\xff"]
META += [b"[[0, 0], [-2, -2]]", b'[[0, 0], ["a", "b"]]', b"[[0, 0], []]", b"[[0, 0], null]"]
META += [b"[[9e9, 0], [0, 0]]", b"[[-1, 0], [0, 0]]", b"[[9000000, 0], [1, 1]]", b'[["1", 0], [0]]']


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("meta", META, ids=[str(meta)[:20] for meta in META])
def test_interrupted_or_damaged_cache(lines_file, stream, monkeypatch, tmp_path, meta, side):
    """A kill in one of the sides; what is written, but not yet, or wrongly, in meta.json."""
    monkeypatch.setattr(model_loaders, "BATCH", 20)
    append, left = TokenStream._append, iter(range(11 - 9 * side, -1, -1))

    def dies(self, *args):
        append(self, *args)
        if next(left) == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TokenStream, "_append", dies)
        killed = stream(lines_file, train=9600)
        killed.train(0, 600)
    assert [path.exists() for path in killed.files] == [side == 0, True]
    for path in filter(Path.exists, killed.files):
        with open(path, "ab") as file:
            file.write(b"half a block!")
    if meta is not None:
        (killed.folder / "meta.json").write_bytes(meta)
    resumed = stream(lines_file, whole := Bytes(), train=12_800, val=320)
    assert ids(resumed.train(0, 800)) == joined(texts(), False)[:12_800]
    assert ids(resumed.validation()) == joined(texts(), True)[:320]
    anew = stream(lines_file, fresh := Bytes(), train=12_800, val=320, cache=tmp_path / "other")
    anew.train(0, 800)
    resumed.close()
    assert (whole.calls < fresh.calls) == (meta is None)  # what was done is not done again


def test_a_cache_that_grows_inside_a_document_is_as_a_fresh_one(tmp_path, stream, monkeypatch):
    """One end of text follows a document of which something was kept, however it was continued."""
    monkeypatch.setattr(model_loaders, "LONGEST", 8)
    monkeypatch.setattr(model_loaders, "BATCH", 1)
    kept = next(text for i in range(99) if not held_out(text := f"{i:02} abcd\n" * 4 + "~"))
    path = put(tmp_path, {"a.jsonl": jsonl([kept, *texts()])}) / "a.jsonl"
    for train in (16, 32, 1600):
        s = stream(path, n_rows=126, train=train)
        s.train(0, s.n_train)
        s.close()
    anew = stream(path, n_rows=126, cache=tmp_path / "new").train(0, 100)
    assert torch.equal(s.train(0, 100), anew) and anew.flatten()[32] == 0


def test_what_is_cached_is_there_while_another_process_fills_more(lines_file, stream, tmp_path):
    """And what that one has filled is taken before it is done."""
    done = stream(lines_file, train=9600)
    done.thread.join()
    waiting = stream(lines_file, cache=tmp_path / "new", val=0)
    waiting.close()
    with model_loaders.hf.utils.WeakFileLock(waiting.folder / "lock"):
        (waiting.folder / "meta.json").write_text("[[0, 0], [0, 0]]")
        waiting = stream(lines_file, cache=tmp_path / "new")
        time.sleep(0.3)
        for name in ("train.bin", "val.bin", "meta.json"):
            shutil.copy(done.folder / name, waiting.folder)
        assert torch.equal(waiting.train(0, 100), done.train(0, 100))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        loads = json.loads
        patch.setattr(json, "loads", lambda text: seen.append([*done.tokens]) or loads(text))
        done.load_meta()
    assert seen == [done.tokens] and min(done.tokens) > 0  # never less meanwhile


@pytest.mark.parametrize("damage", ["gone", "cut"])
@pytest.mark.parametrize("meanwhile", [True, False])
def test_a_cache_that_goes_away_is_one_line(lines_file, stream, monkeypatch, damage, meanwhile):
    monkeypatch.setattr(model_loaders, "BATCH", 1)
    lines_file.write_bytes(jsonl(texts(20_000, 300)))
    s = stream(lines_file, train=5_000_000 if meanwhile else 4000)
    s.train(0, 5), meanwhile or s.validation()
    for path in s.files[:1] if damage == "cut" else s.folder.glob("[!.]*"):
        os.truncate(path, 5) if damage == "cut" else path.unlink()
    with pytest.raises(UserError, match="cannot (write|read) ") as error:
        s.train(s.n_train - 1, 1)
    assert str(s.folder) in str(error.value)


def test_short_data(tmp_path, lines_file, stream):
    have = len(joined(texts(), False))
    s = stream(lines_file, train=2_000_000)
    with pytest.raises(UserError) as error:
        s.train(s.n_train - 1, 1)
    counts = f"{have:,} training tokens, of 2,000,000 needed"
    advice = "lower --tokens (with --start, --kl-tokens)"
    assert str(error.value) == f"{lines_file} has {counts}: {advice}"
    words = ["validation tokens, of 9,000,000 needed", "--eval-tokens"]
    s = stream(lines_file, val=9_000_000)
    fails(words, s.train, 0, 1)  # before any training
    for start, count in ((-1, 1), (0, -1), (99, 2), (100, 1), (101, 0)):
        fails([f"{start}..{start + count} are not of 100"], stream(lines_file).train, start, count)
    short = stream(lines_file, train=2_000_000, short_ok=True)
    assert short.n_train == have // 16 == len(short.train(0, short.n_train))
    one = put(tmp_path, {"one.txt": "x = 1"}) / "one.txt"
    fails(["0 validation tokens, of 160 needed: give more text"], stream(one).train, 0, 1)
    few = jsonl([*filter(held_out, texts()), "x = 1"])
    one = put(tmp_path, {"few.jsonl": few}) / "few.jsonl"
    fails(["6 training tokens, of 1,600 needed: give more text"], stream(one, val=16).train, 0, 1)


@pytest.mark.parametrize("n_vocab, dtype", [(256, "<u2"), (1 << 16, "<u2"), (70_000, "<u4")])
@pytest.mark.parametrize("name, have, held", [("IDS.BIN", 9500, 9701), ("{}-of-3.bin", 7500, 8001)])
def test_files_of_ids(tmp_path, stream, monkeypatch, name, have, held, n_vocab, dtype):
    """Two bytes each where the tokenizer's fit in, else four, as in the cache. The last file is held
    out, of one file its last documents, but not one that has begun before. A copy goes on in the
    middle of it."""
    monkeypatch.setattr(model_loaders, "BLOCK", 1000)
    stored = np.random.default_rng(0).integers(1, n_vocab, 10_000).astype(dtype)
    stored[[5000, 8000, 9400, 9700, 9900]] = 0  # documents that are cut end at 8,000, at 9,700
    parts = [stored] if name == "IDS.BIN" else np.split(stored, 4)
    files = {name.format(i): part for i, part in enumerate(parts)}
    folder = put(tmp_path / "my-pythia-preshuffled", {**files, "README.md": "ids"})
    make = functools.partial(stream, folder, Bytes(n_vocab=n_vocab))
    for train in (1600, 4000, 6400):
        s = make(train=train)
        assert s.train(0, s.n_train).flatten().tolist() == stored[:train].tolist()
        assert s.validation().flatten().tolist() == stored[held : held + 160].tolist()
        s.close()
    stored_ids = s.folder / "train.bin"
    stored_ids.write_bytes(b"\xff" * stored_ids.stat().st_size)  # by no program of ours
    if n_vocab != 1 << 16:  # in which all numbers are ids
        fails(["train.bin is damaged: remove it"], make().train, 0, 1)
    shutil.rmtree(s.folder)
    long = make(train=10_000)
    fails([f"has {have:,} training tokens, of 10,000 needed"], long.train, long.n_train - 1, 1)
    short = make(train=10_000, short_ok=True)
    assert short.train(0, short.n_train).flatten().tolist() == stored[: have // 16 * 16].tolist()
    put(folder, {"a.jsonl": jsonl(texts())})
    fails([f"has text and ids, ['{name.format(0)}']: name one"], make)
    rows = stream(folder / "a.jsonl", Bytes(n_vocab=n_vocab)).train(0, 100)
    assert ids(rows) == joined(texts(), False)[:1600]


def test_a_failure_in_the_thread_reaches_the_caller(tmp_path, lines_file, stream):
    class Panic(BaseException):
        """As tiktoken's, which is no Exception."""

    for error in (ZeroDivisionError, Panic):
        for options in ({}, {"short_ok": True}):
            with pytest.raises(error):
                stream(lines_file, Bytes(fail=error()), **options).train(0, 1)
    s = stream(lines_file, cache=lines_file)
    fails(["cannot write ", "XDG_CACHE_HOME"], s.train, 0, 1)


def test_a_wait_reports_what_is_going_on_and_can_be_interrupted(lines_file, stream, monkeypatch):
    def endless(*source):
        while True:
            time.sleep(0.001)
            yield texts(1)[0], False, True

    told = []
    monkeypatch.setattr(model_loaders, "pieces", endless)
    monkeypatch.setattr(model_loaders, "progress", told.append)
    s = stream(lines_file, train=2 * 10**6)
    signal.signal(signal.SIGALRM, lambda *args: 1 / 0)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    with pytest.raises(ZeroDivisionError):
        s.train(0, s.n_train)
    assert re.fullmatch(r"tokenising into .*: 0\.\dM of 2\.0M tokens", told[0])
    start = time.monotonic()
    s.close()
    assert time.monotonic() - start < 2 and not s.thread.is_alive()


# ---- Nothing guessed ---------------------------------------------------------------------------
def test_on_a_pipe_a_long_phase_speaks_every_half_minute(monkeypatch, capsys):
    now = float(round(time.monotonic()))  # so that sums of seconds are exact
    monkeypatch.setattr(time, "monotonic", lambda: now)
    model_loaders.say("begin")
    for second in range(100):
        now += 1
        model_loaders.progress(f"{second + 1}")
    model_loaders.progress("at once", now=True)
    now += 29
    model_loaders.progress("too early")
    model_loaders.say("between")
    now += 29
    model_loaders.progress("too early again")
    assert capsys.readouterr().out.split("\n") == "begin,30,60,90,at once,between,".split(",")


HOOKS = {
    "blocks.3.hook_resid_post": (3, "resid_post"),
    "blocks.3.hook_resid_pre": (2, "resid_post"),
    "blocks.3.hook_in": (2, "resid_post"),
    "blocks.12.hook_out": (12, "resid_post"),
    "blocks.3.hook_mlp_out": (3, "mlp_out"),
    "blocks.3.hook_attn_out": (3, "attn_out"),
    "blocks.3.attn.hook_z": (3, "attn.hook_z"),
    "blocks.3.hook_resid_mid": (3, "resid_mid"),
    "blocks.3.mlp.hook_pre": (3, "mlp.hook_pre"),
}
NO_HOOKS = ["blocks.0.hook_resid_pre", "hook_embed", "blocks.x.hook_out", "blocks.3.", "", 5, None]


def test_one_function_reads_every_spelling_of_a_hook():
    for name, expected in HOOKS.items():
        assert model_loaders.read_hook(name) == expected, name
        written = model_loaders.hook_name(*expected)
        assert model_loaders.read_hook(written) == expected
    for name in NO_HOOKS:
        fails(["it reads", str(name)], model_loaders.read_hook, name)


def test_usual_data_follow_the_vocabulary_and_no_name(tmp_path):
    def usual(folder, spec):
        put(tmp_path / folder, {"tokenizer.json": spec})
        tokenizer = model_loaders.load_tokenizer(str(tmp_path / folder))
        return model_loaders.OWN_DATA.get(tokenizer.vocabulary)

    assert usual("home/pythia/gemma-2-2b", GEMMA_LIKE) is None
    assert usual("pythia-deduped", BYTE) is None
    assert model_loaders.OWN_DATA[model_loaders.load_tokenizer("tiny").vocabulary] == "tiny"
    if NEOX_FILE.exists():
        spec = json.loads(NEOX_FILE.read_text("utf-8"))
        assert usual("gemma-3-nano", spec) == "pythia"
        other = {"id": 50277, "content": "|||NAME|||"}  # as OLMo's, which is NeoX's with more
        added = [*spec["added_tokens"], spec["added_tokens"][0] | other]
        assert usual("pythia-160m", spec | {"added_tokens": added}) is None


SPLITS = [  # files that are read, and those that are left out
    ("corpus.jsonl constraints.txt", ""),
    ("trains-and-railways.jsonl latest.txt", ""),
    ("corpus.jsonl LICENSE.txt", "a.parquet"),
    ("train-0.jsonl train-1.jsonl", "test-0.jsonl"),
    ("data/train/0.txt", "data/valid/0.txt"),
    ("a.jsonl", "a_validation.jsonl dev.txt eval/b.txt x.val.txt.gz"),
    ("en/c4-train.00000.json.gz", "en/c4-validation.00000.json.gz"),
    ("TRAIN.TXT", "Test.txt"),
    ("valid.txt test.txt", ""),
    ("devices.txt evaluation.txt values.txt contest.txt", ""),
]


OTHERS = ["data.parquet", "data.ndjson", "TEXTS.ZIP", "a/b.csv.gz", "AA/wiki_00", "b.jsonl.lz4"]


@pytest.mark.parametrize("other", OTHERS)
def test_a_licence_is_not_the_data_that_are_not_read(tmp_path, other):
    put(tmp_path, {other: "text" * 9, "LICENSE.txt": "text"})
    fails([other, "is not read"], model_loaders.source_files, str(tmp_path))
    assert len(model_loaders.source_files(str(tmp_path / "LICENSE.txt"))) == 1
    held_out = (tmp_path / "LICENSE.txt").rename(tmp_path / "validation.jsonl")
    fails([other, "is not read"], model_loaders.source_files, str(tmp_path))
    held_out.rename(put(tmp_path, {"book.txt": "text" * 9}) / "LICENSE.txt")
    assert len(model_loaders.source_files(str(tmp_path))) == 2  # less is not read than is
    path = tmp_path / other
    if other not in OTHERS[-2:]:  # of which nobody knows what they are
        path.rename(path.with_name("train." + path.name))  # but it is what training is on
        fails(["is not read"], model_loaders.source_files, str(tmp_path))


@pytest.mark.parametrize("taken, left", SPLITS)
def test_the_training_split_is_whole_words(tmp_path, capsys, monkeypatch, taken, left):
    """One rule: a local clone is read as the dataset on the Hub."""
    taken, names = taken.split(), [*taken.split(), *left.split()]
    folder = put(tmp_path / "test", dict.fromkeys(names, "text"))
    found = [os.path.relpath(path, folder) for path, _ in model_loaders.source_files(str(folder))]
    assert sorted(found) == sorted(taken)
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and f"reading {len(taken)} of {len(names)} files: " in told
    assert sum(name in told for name in taken) == min(3, len(taken))

    def find(self, path, detail):
        sizes = dict.fromkeys(names, 9) | {"load.py": 1, "README.md": 1}
        return {f"{path}/{name}": {"size": size} for name, size in sizes.items()}

    monkeypatch.setattr(model_loaders.hf.HfFileSystem, "find", find)
    for data, folder in (("o/n@c", ""), ("allenai/c4@c", "en/")):  # its others are other data
        found = [path for path, _ in model_loaders.source_files(f"hf://datasets/{data}")]
        assert found == sorted(f"hf://datasets/{data}/{folder}{name}" for name in taken)


def test_a_short_name_and_a_folder_of_that_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model_loaders.say_once.cache_clear()
    put(tmp_path, {"tiny/config.json": {}, "pythia-70m/config.json": {"mine": 1}})
    put(tmp_path, {"EleutherAI/pythia-14m/x": "", "pile/a.txt": "mine"})
    assert model_loaders.load_config("tiny")["hidden_size"] == 128
    told = capsys.readouterr().out
    assert told.startswith("tiny is ") and told.endswith("would be ./tiny\n")
    assert model_loaders.load_config("./tiny") == {}
    assert model_loaders.load_config("./pythia-70m") == {"mine": 1}
    fails(["is a folder here: ./Eleu"], model_loaders.load_config, "pythia-14m")
    assert model_loaders.load_config(str(tmp_path / "pythia-70m")) == {"mine": 1}
    assert documents("./pile") == ["mine"] and capsys.readouterr().out == ""
    assert model_loaders._place("pile") == "hf://datasets/monology/pile-uncopyrighted"
    assert "./pile" in capsys.readouterr().out


def test_what_ids_depend_on_is_in_the_key(tmp_path, lines_file, stream, monkeypatch):
    def key(data=lines_file, n_rows=None, **changes):
        return stream(data, Bytes(**changes), n_rows=n_rows).key

    changed = [dict(bos_id=0), dict(bos_id=7), dict(eos_id=1), dict(n_vocab=300), dict(n_rows=200)]
    keys = {key(), *(key(**change) for change in changed), key(fingerprint="x")}
    assert len(keys) == 7
    assert key(n_rows=256) == key(n_rows=999) == key() in keys
    assert stream(lines_file, mix=2).key not in keys
    names = ("o/a.b", "o/a-b", "o/a-b@c", f"o/{'x' * 60}a", f"o/{'y' * 60}a")
    with monkeypatch.context() as patch:
        patch.setattr(model_loaders, "RULES", 99)
        assert key() not in keys
        about = SimpleNamespace(sha="c")  # nor do datasets share what is remembered of each
        patch.setattr(model_loaders.hf.HfApi, "dataset_info", lambda *_, **__: about)
        assert len({model_loaders.source_now(name)[2] for name in names}) == 5
    first = stream(lines_file)
    first.train(0, 9)
    assert first.folder.name == first.key
    (copied := tmp_path / "copy").mkdir()
    shutil.copy(lines_file, copied)
    assert key(copied / "a.jsonl") == first.key
    lines_file.write_bytes(lines_file.read_bytes()[:-4] + b'y"}\n')
    os.utime(lines_file, (1, 1))  # of the same size and time
    assert key() not in keys
    assert key() == key()
    assert first.folder.exists()
    of_folder = key(copied)
    assert key(put(copied, {"b.txt": "more"})) != of_folder
    monkeypatch.setattr(model_loaders, "LARGE", 9)
    large = key(copied)
    shutil.copystat(copied / "a.jsonl", copied / "a.jsonl")
    assert key(copied) != large  # when it was last touched


@pytest.fixture
def counted(tmp_path, stream):
    """Streams of 1, 2, 3, .., of which 9,500 are for training; 40 sequences mix."""
    put(tmp_path, {"ids.bin": np.arange(1, 10_001).astype("<u4")})
    return functools.partial(stream, tmp_path / "ids.bin", Bytes(n_vocab=70_000), mix=40)


@pytest.mark.parametrize("context", [16, 25])
def test_sequences_mix_in_blocks_and_come_once(tmp_path, counted, context):
    n = 9500 // context
    rows = counted(mix=1, context=context, train=9500).train(0, n)
    whole = counted(context=context, train=9500).train(0, n)
    assert rows.flatten().tolist() == [*range(1, n * context + 1)]
    for part, mixed in zip(rows.split(40), whole.split(40)):
        assert not torch.equal(part, mixed) and torch.equal(part, mixed[mixed[:, 0].argsort()])
    few = counted(context=context, train=context * 9, cache=tmp_path / "new")
    assert torch.equal(few.train(0, 9), whole[:9])  # whatever is asked for
    assert few.tokens[0] == 40 * context
    places = [(0, 0), (40, 0), (7, 1), (3, 5), (39, 2), (40, 40), (n - 3, 3), (5, n - 5)]
    for start, count in places:
        asked = counted(context=context, train=9500).train(start, count)
        assert torch.equal(asked, whole[start : start + count])


def test_few_sequences_of_validation_are_drawn_from_more(tmp_path, counted):
    for spread, among in ((20, 20), (40, 31)):  # there are no more than 31
        drawn = [counted(mix=spread, cache=tmp_path / str(spread)).validation() for _ in range(2)]
        assert torch.equal(*drawn)
        first = (drawn[0][:, 0] - 9501) // 16
        assert torch.equal(drawn[0], 9501 + 16 * first[:, None] + torch.arange(16))
        assert len({*first.tolist()}) == 10 and 10 < first.max() < among


@pytest.mark.parametrize("first, then", [(16, 16), (16, 25), (25, 16), (16, 40)])
def test_what_an_sae_has_seen_is_not_given_again(counted, first, then):
    for seen in (9, 40, 100):
        s = counted(context=first, train=seen * first)
        before = s.train(0, seen).flatten().tolist()
        sae = {"seen": s.seen_after(seen)}
        s = counted(context=then, train=3 * then, sae=sae)
        after = s.train(s.n_train - 3, 3).flatten().tolist()
        assert len({*before, *after}) == seen * first + 3 * then
        assert first != then or s.n_train == seen + 3
        assert s.seen_after(0) == sae["seen"]
        sae["seen"]["other"] = [5, 8]  # data that it has seen before them are not forgotten
        s = counted(context=then, train=then, sae=sae)
        assert s.seen_after(999) == {"other": [5, 8], s.key: [999, then]}


def test_what_an_sae_has_seen_is_told_by_the_ids(tmp_path, lines_file, stream):
    """Nothing of it is given again, wherever the file lies and however long sequences are."""
    (other := tmp_path / "moved").mkdir()
    shutil.copy(lines_file, other)
    for bos, context in ((None, 16), (1, 16), (None, 24), (1, 7)):
        tokenizer = Bytes(bos_id=bos)
        key = stream(lines_file, tokenizer).key
        sae = {"seen": {key: [9, 16]}}
        in_each = context - (bos is not None)
        seen = math.ceil(9 * (16 - (bos is not None)) / in_each)
        s = stream(other, tokenizer, context, train=2 * context, sae=sae)
        assert s.key == key and s.n_train == seen + 2 and len(s.train(seen, 2)) == 2
    assert stream(other, Bytes(), train=0, sae={"seen": {"x": [9, 16]}}).n_train == 1
    for odd in (None, 9, [9], [9, 0], [-1, 16], [None, 16], [9.5, 16], [10**400, 16]):
        fails(["how much it has seen"], stream, other, tokenizer, sae={"seen": {key: odd}})
    fails(["how much it has seen"], stream, other, tokenizer, sae={"seen": [1]})
    short = stream(other, tokenizer, sae={"seen": {key: [10**6, 16]}})
    fails([" needed: give more text"], short.train, 10**6, 1)


def test_the_key_of_a_model_or_an_sae_is_of_its_files(tmp_path):
    folder = put(tmp_path / "model", {"tokenizer.json": BYTE, "config.json": {"hidden_size": 8}})
    for name in ("model-1.safetensors", "model-2.safetensors"):
        model_loaders.write_safetensors(folder / name, {"a": torch.ones(3)}, {})
    put(folder, {"pytorch_model.bin": b"12"})
    keys = [model_loaders.model_key(str(folder))]
    assert model_loaders.model_key(str(put(folder, {"README.md": "not of the model"}))) == keys[0]
    for name in ("model-2.safetensors", "config.json", "tokenizer.json", "pytorch_model.bin"):
        put(folder, {name: (folder / name).read_bytes()[:-1] + b" "})  # of the same size
        os.utime(folder / name, (1, 1))  # and time
        keys.append(model_loaders.model_key(str(folder)))
    assert len({*keys}) == 5
    shutil.copytree(folder, tmp_path / "copy")
    assert model_loaders.model_key(str(tmp_path / "copy")) == keys[-1]
    fails(["has no config.json"], model_loaders.model_key, str(tmp_path))
    for i in (1.0, 2.0):
        sae_folder(tmp_path, {"b_dec": torch.full((6,), i)})
        keys.append(model_loaders.sae_key(str(tmp_path)))
    assert len({*keys}) == 7


def test_a_run_goes_on_with_the_same_settings_model_and_data_alone(tmp_path):
    settings = vars(Config(model="./m", data="./d", k=[3]))
    identity, metrics = {"model": "1", "data": "2"}, tmp_path / "metrics.jsonl"
    folder = model_loaders.RunFolder(tmp_path, [])
    folder.begin(settings)
    folder.log(["1"])
    folder.save_state({"config": settings, "identity": identity, "world": 1}, "0-0")
    folder.log(["2"])  # after it
    saved = folder.load_state("cpu")
    for part in identity:
        words = [f"{part} {settings[part]} is not what it was, {identity[part]}: "]
        fails(words, folder.go_on, saved, settings, identity | {part: "x"}, 1)
    may = {"resume", "overwrite", "out", "name", "checkpoint_minutes", "log_every"}
    for name in settings.keys() - may:
        words = [f"--{name.replace('_', '-')} was {settings[name]}, is other"]
        fails(words, folder.go_on, saved, settings | {name: "other"}, {}, 1)
    fails(["it was 1 processes"], folder.go_on, saved, settings, identity, 2)
    fails(["--k was [3], is 4"], folder.go_on, saved, settings | {"k": 4}, {"data": "x"}, 1)
    assert metrics.read_text() == "1\n2\n"
    folder.go_on(saved, settings | dict.fromkeys(may) | {"data": "/abs/d"}, identity, 1)
    assert metrics.read_text() == "1\n"
    folder.go_on(saved | {"logged": 9}, settings, identity, 1)  # nothing is filled up with zeros
    assert metrics.read_text() == "1\n"
    metrics.unlink()
    folder.go_on(saved, settings, identity, 1)
    assert metrics.read_text() == ""
    folder.save_state({"config": settings, "identity": identity, "world": 2}, "1-0")
    other = model_loaders.RunFolder(tmp_path, [], rank=1)
    fails(["cannot read a checkpoint", "checkpoint-1-0-1.pt"], other.load_state, "cpu")


def test_what_is_cleared_is_a_runs_own(tmp_path):
    run = tmp_path / "run"  # the last is of a method of another program
    put(run, {f"{name}/cfg.json": "{}" for name in ("k4", "k4-best", "kl-only")})
    put(run, {"config.json": {"method": ["kl-only", "../x", ".."]}, "../cfg.json": "mine"})
    model_loaders.RunFolder(run, []).clear()
    assert [path.name for path in run.glob("*")] == ["k4-best"]
    assert (tmp_path / "cfg.json").read_text() == "mine"
    outer = put(tmp_path / "outer", {".saeft": ""})
    settings = {"name": "n", "start": None, "model": "./m", "out": str(outer)}
    fails(["outer is a run's own folder"], model_loaders.run_path, settings)


@pytest.mark.parametrize("metadata, told", [
    (None, ""),
    ({}, ""),
    ({"identity": "x"}, ""),
    ({"identity": {"model": "1", "data": "2"}}, ""),
    ({"identity": {"model": "0", "data": "2"}}, "the model, ./m, is not what"),
    ({"identity": {"data": "0"}}, "the data, ./d, or its <bos> is not what"),
    ({"identity": {"data": "0"}, "seen": {"0": [9, 8], "2": [9, 8]}}, ""),
])  # fmt: skip
def test_what_changed_since_a_run_is_told(tmp_path, capsys, metadata, told):
    sae = model_loaders.sae_cfg(put(tmp_path, {"cfg.json": {"metadata": metadata}}))
    settings, now = {"model": "./m", "data": "./d"}, {"model": "1", "data": "2"}
    model_loaders.note_changes(sae, str(tmp_path), settings, now)
    out = capsys.readouterr().out
    assert told in out and out.count("\n") == bool(told)


def test_a_source_that_changes_is_refused(tmp_path, lines_file, stream, monkeypatch):
    """And what was read before stays: the file as it was gives the same ids as ever."""
    monkeypatch.setattr(model_loaders, "BLOCK", 1 << 12)
    lines_file.write_bytes(content := jsonl(lines := texts(3000)))

    class Slow(Bytes):
        def encode(self, text):
            if text == lines[1500]:
                lines_file.with_name("new").write_bytes(jsonl(texts(3000, seed=1)))
                lines_file.with_name("new").replace(lines_file)
            return super().encode(text)

    changing = stream(lines_file, Slow(), train=100_000)
    fails(["changed meanwhile: start again"], changing.train, 6000, 1)
    lines_file.write_bytes(content)
    files_key = model_loaders.files_key

    def touched_after(paths):
        key = files_key(paths)
        os.utime(lines_file, (0, 0))
        return key

    with monkeypatch.context() as patch:  # also between the key and the first byte that is read
        patch.setattr(model_loaders, "files_key", touched_after)
        changing = stream(lines_file, train=100_000, cache=tmp_path / "new")
    fails(["changed meanwhile: start again"], changing.train, 0, 1)
    whole = stream(lines_file, train=100_000)
    assert ids(whole.train(0, 6250)) == joined(lines, False)[:100_000]


@pytest.mark.parametrize("form", ["jsonl", "txt"])
def test_a_long_document_is_on_one_side_whole(tmp_path, form, stream):
    """A document: an object of a .jsonl, or one of a hundred .txt. One end of text is after it."""
    rng = random.Random(1)
    made = [f"{i} " + "".join(rng.choices("abc \n", k=90_000)) + f" {i}\n" for i in range(100)]
    files = {f"{i}.txt": text for i, text in enumerate(made)}
    put(tmp_path, files if form == "txt" else {"a.jsonl": jsonl(made)})
    for held in (False, True):
        found = [text for text, side, _ in model_loaders.pieces(str(tmp_path)) if side == held]
        assert found and max(map(len, found)) <= 1 << 16
        wanted = {text for text in made if held_out(text) == held}
        assert {"".join(pair) for pair in zip(found[::2], found[1::2])} == wanted
    if form == "jsonl":
        s = stream(tmp_path / "a.jsonl", train=10**7, short_ok=True)
        assert ids(s.train(0, s.n_train)) == joined(made, False)[: s.n_train * 16]


def test_a_text_with_an_id_that_has_no_row_is_left_out(tmp_path, stream, capsys):
    model_loaders.say_once.cache_clear()
    marked = [line + "~" if i % 10 == 0 else line for i, line in enumerate(texts(400))]
    path = put(tmp_path, {"a.jsonl": jsonl(marked)}) / "a.jsonl"
    kept = [line for line in marked if "~" not in line]
    s = stream(path, n_rows=126, train=10**6, short_ok=True)
    assert ids(s.train(0, s.n_train)) == joined(kept, False)[: s.n_train * 16]
    assert capsys.readouterr().out.count("leaving out pieces of text that hold ids from 126") == 1
    first = "a" * (1 << 16)  # a piece that is kept, of a document whose second one is not
    assert not held_out(first + "~")
    long = put(tmp_path, {"b.jsonl": jsonl([first + "~", *kept])}) / "b.jsonl"
    s = stream(long, n_rows=126, train=10**6, short_ok=True)
    expected = first.encode() + b"\0" + joined(kept, False)
    assert ids(s.train(0, s.n_train)) == expected[: s.n_train * 16]
    capsys.readouterr()
    assert ids(stream(path, n_rows=127).train(0, 100)) == joined(marked, False)[:1600]
    assert "leaving" not in capsys.readouterr().out
    beyond = functools.partial(stream, path, Bytes(bos_id=7), n_rows=7)
    fails(["has no row in the embedding: 7"], beyond)
    put(tmp_path, {"a.bin": np.array([50, 126] * 5000, np.uint16)})
    s = stream(tmp_path / "a.bin", n_rows=126, train=9000)
    fails(["a.bin: as uint16 it holds 126"], s.train, 0, 500)


def test_quantised_tensors_say_what_they_are(tmp_path):
    def load():
        return model_loaders.load_weights(str(tmp_path), "cpu", torch.float32)

    path = tmp_path / "model.safetensors"
    cases = [("a", torch.float8_e4m3fn, "F8_E4M3"), ("a", torch.float8_e5m2, "F8_E5M2")]
    cases += [("a.qweight", dtype, str(dtype)) for dtype in (torch.int8, torch.uint8)]
    for name, dtype, shown in cases:
        save_file({name: torch.ones(2).to(dtype)}, path)
        fails([name, shown, "quantised"], load)
    save_file({"a": torch.ones(2), "x.attention.bias": torch.ones(2, dtype=torch.uint8)}, path)
    index = {"weight_map": {"x": "old-00001-of-00001.safetensors"}}  # one file before shards
    put(tmp_path, {"model.safetensors.index.json": index})
    assert load().keys() == {"a"}


def test_runs_are_called_after_their_model(tmp_path):
    settings = {"name": None, "start": None, "sae": "topk", "k": [3], "seed": 0, "layer": 2}
    names = {"pythia-160m": "pythia-160m", "owner/name@refs/pr/3": "name-refs-pr-3"}
    names |= {"pythia-160m@step8": "pythia-160m-step8", str(tmp_path): tmp_path.name}
    for model, expected in names.items():
        path = model_loaders.run_path(settings | {"model": model, "out": "runs"})
        assert str(path) == f"runs/{expected}-layer2-topk-k3-seed0"


# ---- A loopback Hub ---------------------------------------------------------------------------

GOOD, OTHER = "hf_good", "hf_other"  # a token that may read gated repos, and one that may not
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """A loopback Hub, enough for the real huggingface_hub client: `with Hub(...) as hub`.

    gated: repo ids that want the token GOOD: none -> 401 GatedRepo, OTHER -> 403 GatedRepo, else 401.
    cut {file: (n, k)}: its first k GETs end after n bytes. fail {file: status}: the answer, e.g. 503.
    instead {file: bytes}: what comes of any range of it. commit: of main. All can change while it
    runs. sent: body bytes by file. n_requests: so far."""

    daemon_threads, block_on_close = True, False

    def __init__(self, models=None, datasets=None, gated=(), cut=None, fail=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = {"models": models or {}, "datasets": datasets or {}}
        self.gated, self.commit = gated, COMMIT
        self.cut, self.fail, self.instead = cut or {}, fail or {}, {}
        self.sent, self.n_requests = Counter(), 0
        self.lock = threading.Lock()

    def env(self, home, **more):
        """Environment of a client process: this endpoint, caches below `home`, no proxy."""
        url = f"http://127.0.0.1:{self.server_address[1]}"
        env = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": "", "NO_PROXY": "*"}
        env |= {f"HF_HUB_DISABLE_{x}": "1" for x in ("PROGRESS_BARS", "TELEMETRY")}
        return env | {"XDG_CACHE_HOME": str(home)} | more

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, *args):
        pass  # a client that hangs up is part of the tests


# /api/<kind>/<owner/name>[/<what>/<revision>[/<path>]], or without /api and models/ for the files
URL = r"(?:/api)?/(?:(models|datasets)/)?([^/]+/[^/]+)(?:/([^/]+)/[^/]+(?:/(.+))?)?"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.form = parse_qs(self.rfile.read(int(self.headers["Content-Length"] or 0)).decode())
        url = re.fullmatch(URL, unquote(urlsplit(self.path).path))
        kind, repo, what, path = url.groups() if url else ("models", "", "", "")
        files = self.server.repos[kind or "models"].get(repo)
        if what == "resolve":
            self.resolve(files, repo, path)
        elif files is None:
            self.reply(404, {"X-Error-Code": "RepoNotFound"})
        else:
            self.reply(200, {}, json.dumps(self.api(files, repo, what, path or "")).encode())

    do_HEAD = do_POST = do_GET

    def log_message(self, *args):
        pass

    def reply(self, status, headers, body=b"", file=None):
        hub, cut = self.server, None
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, value)
        self.end_headers()
        with hub.lock:  # counted before the last byte leaves: a client that has it all may look
            hub.n_requests += 1
            if file and self.command == "GET":
                after, times = hub.cut.get(file, (0, 0))
                if times:
                    hub.cut[file], cut = (after, times - 1), after
                hub.sent[file] += len(body[:cut])
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        self.close_connection |= cut is not None

    def api(self, files, repo, what, folder):
        if what in (None, "revision"):
            about = {"id": repo, "sha": self.server.commit, "private": False}
            return about | {"downloads": 0, "likes": 0, "tags": []}
        listed = self.form.get("paths") if what == "paths-info" else sorted(files)
        found = [file for file in listed if file in files and file.startswith(folder)]
        keys = {"type": "file", "oid": COMMIT}
        return [{"path": file, "size": len(files[file]), **keys} for file in found]

    def resolve(self, files, repo, file):
        hub, asked = self.server, self.headers["Range"]
        revision = re.search("/resolve/([^/]+)/", unquote(self.path))[1]
        own = revision if len(revision) == 40 else revision[::-1].zfill(40)
        commit = hub.commit if revision == "main" else own
        if f"{revision}/{file}" in (files or ()):
            file = f"{revision}/{file}"
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        for wrong, status, code in (
            (token not in ("", GOOD, OTHER), 401, "Invalid credentials in Authorization header"),
            (repo in hub.gated and token != GOOD, 403 if token else 401, "GatedRepo"),
            (files is None, 404, "RepoNotFound"),
            (file in hub.fail, hub.fail.get(file), "Failure"),
            (file not in (files or ()), 404, "EntryNotFound"),
        ):
            if wrong:
                headers = {"X-Error-Code": code, "X-Error-Message": code}
                return self.reply(status, {**headers, "X-Repo-Commit": commit})
        body, headers = files[file], {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        start, stop = re.match(r"bytes=(\d+)-(\d*)", asked or "bytes=0-").groups()
        part = body[int(start) : int(stop or len(body)) + 1]
        if asked and file in hub.instead:
            return self.reply(200, headers, hub.instead[file], file)
        if asked:
            headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(body)}"
        self.reply((206 if part else 416) if asked else 200, headers, part, file)


ASK = r"""
def fetch(name, file, token=""):
    os.environ["HF_TOKEN"] = token
    return L.fetch(name, file).read_text()

def weights(name):
    return sorted(L.load_weights(name, "cpu", torch.float32))

def part(path):
    with L.open_file(f"hf://datasets/{path}") as file:
        return [file.seek(50_000), len(file.read(1000))]

def ids(data, train, val=640, n_vocab=256, mix=1):
    L.MIX, L.SPREAD = mix, 1  # 1: sequences in order
    stream = L.TokenStream(data, Bytes(n_vocab=n_vocab), 64, train, val)
    sides = stream.train(0, stream.n_train), stream.validation()
    return [rows.flatten().tolist() for rows in sides]

def answer(question):
    try:
        return eval(question)
    except L.UserError as error:
        return str(error)

said, L.progress = [], str
L.say_once = said.append
if sys.argv[2] == "False":
    time.sleep = lambda seconds: None
print(json.dumps([*map(answer, json.loads(sys.argv[1]))]))
"""


def answers(*questions, nap=False, **env):
    """What each expression is in a fresh Python, or why not. No `nap`: no pauses before retries."""
    return child(inspect.getsource(Bytes) + ASK, json.dumps(questions), nap, **env)


def test_hub_through_the_real_client(tmp_path):
    x, y = safetensors.save({"a": torch.ones(2)}), safetensors.save({"b": torch.zeros(3)})
    index = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}).encode()
    models = {"o/two": {"1.safetensors": x, "2.safetensors": y}, "o/old": {"weights.bin": b"x"}}
    models["o/two"]["model.safetensors.index.json"] = index
    models |= {"o/one": {"model.safetensors": x}, "google/gemma-2-2b": {"config.json": b"{}"}}
    models["o/sick"] = {"fail.json": b"f", "cut.json": b"c" * 999}
    sae_folder(tmp_path / "sae")
    sae = {f"a/{path.name}": path.read_bytes() for path in (tmp_path / "sae").iterdir()}
    models["o/sae"] = sae | {"x/a/cfg.json": b"3"}
    models["o/adapted"] = {"config.json": b"{}", "adapter_config.json": b"{}"}
    models["EleutherAI/pythia-14m"] = {"config.json": b'{"a": 1}', "step8/config.json": b'{"a": 2}'}
    data = {"o/data": {"d/x.bin": bytes(100_000)}, "o/gated": {"x.bin": bytes(60_000)}}

    def check(cases, **how):
        """{expression: value}; words of an error are a str, split at |."""
        for (question, expected), answer in zip(cases.items(), answers(*cases, **how), strict=True):
            if isinstance(expected, str):
                assert all(word in answer for word in expected.split("|")), (question, answer)
                assert "\n" not in answer
            else:
                assert answer == expected, question

    loads = {'weights("o/one")': ["a"], 'weights("o/two")': ["a", "b"]}
    terms = "its licence at https://huggingface.co/"
    refused = f"{terms}google/gemma-2-2b|set HF_TOKEN|"
    cases = {
        'weights("o/old")': "'o/old' has no model.safetensors|only",
        'L.load_config("o/adapted")': "o/adapted has an adapter beside the model",
        'fetch("o/none", "config.json")': "'o/none' has no config.json: give a folder",
        'fetch("o--o/x", "config.json")': "'o--o/x' has no config.json",
        'fetch("gemma-2-2b", "config.json")': f"{refused}401",
        'fetch("gemma-2-2b", "config.json", "hf_other")': f"{refused}403",
        'fetch("gemma-2-2b", "config.json", "hf_")': f"{refused}401",
        '[fetch("gemma-2-2b", "config.json", "hf_good")]': ["{}"],
        'fetch("o/sick", "fail.json")': "cannot fetch o/sick|503|--model tiny",
        '[fetch("pythia-14m", "config.json")]': ['{"a": 1}'],
        '[fetch("pythia-14m@step8", "config.json")]': ['{"a": 2}'],
        '[fetch("EleutherAI/pythia-14m@step8", "config.json")]': ['{"a": 2}'],
        'fetch("EleutherAI/pythia-14m@step8", "no.json")': "has no no.json|revision",
        'sorted(L.read_sae("o/sae:a")[0])': sorted(SAE_SHAPES),
        'L.read_sae("o/sae@x:a")': "cfg.json|'int'",
        'L.read_sae("o/sae:b")': "'o/sae' has no b/cfg.json",
        'fetch("o/sick", "cut.json")': "cannot fetch o/sick|100 |--model tiny",
        'part("o/data/d/x.bin")': [50_000, 1000],
        'part("o/data/d/y.bin")': "'datasets/o/data' has no d/y.bin",
        'part("o/none/x.bin")': "'datasets/o/none' has no x.bin",
        'part("o/gated/x.bin")': f"{terms}datasets/o/gated|401",
    }
    with Hub(models, data, {"google/gemma-2-2b", "o/gated"}, fail={"fail.json": 503}) as hub:
        hub.cut = {"cut.json": (100, 99)}
        env = hub.env(tmp_path / "home")
        check(loads | cases, **env)
        assert 1000 <= hub.sent["d/x.bin"] <= 4000  # of 100,000: a byte range
    for word, more in (("refused", {}), ("HF_HUB_OFFLINE", {"HF_HUB_OFFLINE": "1"})):
        gone = {'fetch("pythia-70m", "config.json")': f"cannot fetch EleutherAI/|{word}"}
        gone['part("o/data/d/x.bin")'] = f"cannot fetch datasets/o/data|{word}|--data tiny"
        start = time.monotonic()
        check(loads | gone, nap=True, **env, **more)
        assert time.monotonic() - start < 20  # the client alone would try for half a minute


def test_a_file_out_of_reach_is_not_one_that_is_not_there(tmp_path):
    """tokenizer_config.json names the end of text: a busy Hub is no answer, and without a network
    it is what the cache holds, or a line says that the cache does not know."""
    files = {"tokenizer.json": json.dumps(SPEC), "tokenizer_config.json": '{"eos_token": "</s>"}'}
    files = {name: text.encode() for name, text in files.items()}
    ask = functools.partial(answers, 'L.load_tokenizer("o/m").eos_id', "said")
    with Hub({"o/m": files}) as hub:
        env, partial = hub.env(tmp_path / "home"), hub.env(tmp_path / "partial")
        refusals = {503: "cannot fetch o/m (error: 503)", 404: "'o/m' has no tokenizer_config.json"}
        for status, words in refusals.items():  # that 404 is no Hub's, which says what it lacks
            hub.fail = {"tokenizer_config.json": status}
            eos, said = ask(**env)
            assert said == [] and words in str(eos)
        hub.fail = {}
        assert ask(**env) == [2048, []]
        answers('fetch("o/m", "tokenizer.json")', **partial)
    offline = {"HF_HUB_OFFLINE": "1"}
    assert ask(**env, **offline) == [2048, []]  # that others are not there is known, too
    eos, said = ask(**partial, **offline)
    note = "note: tokenizer_config.json of o/m is out of reach, and taken as not there"
    assert eos == 0 and said[1] == note


def test_a_model_on_the_hub_is_of_one_commit_the_newest(tmp_path):
    """Whatever is in the cache; but one for all files. Out of reach it is as it was last."""
    x, y = safetensors.save({"a": torch.ones(2)}), safetensors.save({"b": torch.zeros(3)})
    files = {"config.json": b'{"v": 1}', "model.safetensors": x}
    asked = 'L.model_key("o/m")', 'L.load_config("o/m")', 'weights("o/m")', "said"
    ask = functools.partial(answers, *asked)
    with Hub({"o/m": files}) as hub:
        env = hub.env(tmp_path / "home")
        assert answers('L.find("o/m", "cfg.json")', 'fetch("o/m", "config.json")', **env)[0] is None
        hub.commit = "f" * 40
        files[f"{COMMIT}/model.safetensors"] = x
        files |= {"config.json": b'{"v": 2}', "model.safetensors": y, "cfg.json": b"new"}
        assert answers('fetch("o/m", "cfg.json")', **env) == ["new"]
        newest = [f"o/m@{hub.commit}", {"v": 2}, ["b"]]
        assert ask(**env) == [*newest, []]
        begun = f'L.commits.update({{"o/m": "{COMMIT}"}})'  # before it changed
        assert answers(begun, 'weights("o/m")', **env) == [None, ["a"]]
        hub.fail = {"config.json": 503}
        assert ask(**env)[-1] == ["note: o/m is out of reach, and read as it was last"]
    assert ask(**env)[-1] == ["note: o/m is out of reach, and read as it was last"]
    assert ask(**env, HF_HUB_OFFLINE="1") == [*newest, []]


def test_a_dataset_on_the_hub_that_changes(tmp_path):
    """More tokens of the new version come from the new version alone; offline it is the last."""
    first, second = texts(700, 100, 1), texts(700, 100, 2)
    files = {"train.jsonl": jsonl(first), "test.jsonl": jsonl(["no"]), "LICENSE.md": b"x"}
    with Hub(datasets={"o/d": files, "o/whole": files}) as hub:
        env = hub.env(tmp_path)
        ((small, _),) = answers('ids("o/d", 16_000)', **env)
        assert bytes(small) == joined(first, False)[:16_000]
        files["train.jsonl"], hub.commit = jsonl(second), "f" * 40
        named = [f'ids("o/d{at}", 32_000)' for at in ("", "@main", f"@{'f' * 40}")]
        all_mix = 'ids("o/whole", 32_000, mix=10**6)'  # read to its end
        more, *others, mixed = answers(*named, all_mix, **env)
        assert others == [more, more] and mixed[1] == more[1]
        expected = [joined(second, False)[:32_000], joined(second, True)[:640]]
        assert [*map(bytes, more)] == expected
    gone = ['ids("o/d", 32_000)', all_mix, 'ids("o/d", 48_000)', 'ids("o/new", 640)']
    offline, still, *errors, said = answers(*gone, "said", **env)
    assert [offline, still] == [more, mixed]
    assert "cannot fetch datasets/o/d" in errors[0]
    assert "note: o/d is out of reach, and read as it was last: ffffffffffff" in said
    assert "cannot fetch datasets/o/new" in errors[1]


def test_an_answer_that_is_not_the_range_asked_for_is_no_part_of_a_file(tmp_path):
    """An empty one is not the end of the file, nor is a login page its text, and neither is kept."""
    made = texts(700, 100, 1)
    plain = "<|endoftext|>".join(made).encode()
    numbers = np.arange(1, 20_001, dtype=np.uint16) % 250 + 1
    sets = {"o/t": {"a.txt": plain}, "o/j": {"a.jsonl": jsonl(made)}}
    sets |= {"o/z": {"a.jsonl.gz": gzip.compress(jsonl(made))}, "o/i": {"a.bin": numbers.tobytes()}}
    ask = functools.partial(answers, *(f'ids("{name}", 6400)' for name in sets))
    with Hub(datasets=sets) as hub:
        env = hub.env(tmp_path)
        for body in (b"", b"<html>log in</html>", plain + plain):
            hub.instead = {name: body for files in sets.values() for name in files}
            assert all("bytes came of" in error for error in ask(**env))
        hub.instead = {}
        *of_text, of_ids = ask(**env)
    for sides in of_text:
        assert [*map(bytes, sides)] == [joined(made, False)[:6400], joined(made, True)[:640]]
    assert of_ids[0] == numbers[:6400].tolist()


def test_text_and_ids_from_the_hub(tmp_path):
    shards = [texts(700, 500, seed) for seed in range(3)]
    names = [f"en/c4-train.{i:05d}-of-00003.json.gz" for i in range(3)]
    c4 = {n: gzip.compress(jsonl(s)) for n, s in zip(names, shards, strict=True)}
    c4 |= {"en/c4-validation.00000.json.gz": gzip.compress(jsonl(["no"])), "README.md": b"#"}
    data = gzip.compress(jsonl(texts()))
    sets = {"allenai/c4": c4, "o/cut": {"train.jsonl.gz": data}, "o/other": {"a.parquet": b"PAR1"}}
    sets["o/gated"] = {"a.jsonl.gz": data, "_gated.py": b"x", "README.md": b"# x"}
    stored = np.random.default_rng(0).integers(1, 50_000, (3, 100_000)).astype("<u2")
    stored[2, 50] = 0
    bins = {f"document-{i:05d}-of-00002.bin": part.tobytes() for i, part in enumerate(stored)}
    sets["EleutherAI/pile-standard-pythia-preshuffled"] = bins
    refused = {"o/gated": "HF_TOKEN", "o/other": "no text", "o/none": "", "o/cut": ""}
    cut = {names[0]: (50_000, 1), "train.jsonl.gz": (300, 99)}
    with Hub(datasets=sets, gated={"o/gated"}, cut=cut) as hub:
        env, big = hub.env(tmp_path), 'ids("c4", 384_000)'
        *errors, rows = answers(*(f'ids("{name}", 6400)' for name in refused), big, **env)
        for error, (name, words) in zip(errors, refused.items(), strict=True):
            assert name in error and words in error and "\n" not in error
        if isinstance(rows, str):  # older clients do not ask again after a cut: the next run does
            assert "allenai/c4" in rows
            (rows,) = answers(big, **env)
        for side, n in enumerate((384_000, 640)):
            assert bytes(rows[side]) == joined(sum(shards, []), side)[:n]
        assert hub.sent[names[2]] == 0  # shard after shard, as needed
        asked = hub.n_requests
        assert answers(big, **env) == [rows]
        assert hub.n_requests == asked + 1  # whether it is still that commit

        of_pythia = [f'ids("pythia", {n}, 640, 50_277)' for n in (6400, 32_000, 640_000)]
        opened, small = answers('ids("o/gated", 6400)', of_pythia[0], **env | {"HF_TOKEN": GOOD})
        assert bytes(opened[0]) == joined(texts(), False)[:6400]
        assert [hub.sent[name] for name in bins] == [12_800, 0, 200_000 + 1280]
        more, short, other = answers(*of_pythia[1:], 'ids("pythia", 6400)', **env)
    assert small == [stored[0, :6400].tolist(), stored[2, 51:691].tolist()]
    assert more == [stored[0, :32_000].tolist(), small[1]]
    assert "has 200,000 training tokens, of 640,000 needed" in short
    assert "give uint16 ids of this tokenizer, under 256" in other


# ---- What a run gives to its parts, and what its processes share ----------------------------------
# Each of these fails where one line of saeft.py or model_loaders.py is another, and no other test.
def a_run(tmp_path, line=""):
    return saeft.Run(saeft.parse([*SMALL.split(), *line.split(), "--out", str(tmp_path)]))


def phase_of(*trainees, steps=9, **more):
    return Phase("kl", [*trainees], steps, torch.tensor(torch.inf), **more)


def two_processes(monkeypatch, rank=0, total=lambda x: 2 * x):
    monkeypatch.setattr(saeft, "world_size", lambda: 2)
    monkeypatch.setattr(saeft, "rank", lambda: rank)
    monkeypatch.setattr(saeft, "sum_over_ranks", total)


@pytest.mark.parametrize("world", [1, 2])
def test_what_each_phase_is_given(world, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(saeft, "world_size", lambda: world)
    monkeypatch.setattr(saeft, "sum_over_ranks", lambda x: world * x)
    for loop in ("train_mse", "finetune"):  # which train nothing here
        monkeypatch.setattr(saeft, loop, lambda phase, *_: seen.update({phase.name: phase}))
    assert command("--method kl --bos yes --name x", tmp_path) == 0
    decay = {name: p.trainees[0].optimizer.defaults["weight_decay"] for name, p in seen.items()}
    assert decay == {"MSE": 0.0, "kl": 0.01}
    assert seen["kl"].first == 109 == seen["MSE"].buffer.n_sequences  # the last 78 of 187
    assert (seen["MSE"].steps, seen["kl"].steps) == (109 * 63 // (256 * world), 78 // (2 * world))


def test_the_fine_tune_has_no_auxk_and_a_checkpoint_has_the_dead(tmp_path):
    run, sae = a_run(tmp_path), TopK(128, 64, k=4)
    run.n_mse, run.done.results, sae.dead = 5, {"MSE": [{"l0": 4.0}]}, torch.arange(9)
    t = run.trainee("kl", 0, sae)
    assert len(t.sae.dead) == 0 and len(sae.dead) == 9
    other = Trainee(TopK(128, 64, k=4), divergence=None)
    other.load_state_dict(saved(Trainee(sae, divergence=None).state_dict()))
    assert torch.equal(other.sae.dead, sae.dead)


def test_defaults_follow_what_they_say(tmp_path, monkeypatch):
    assert Config(d_sae=2**14).peak_lr == 2e-4 and Config(d_sae=2**16).peak_lr == 1e-4
    config = Config(model="tiny", tokens=10**6, kl_tokens=0, context=64, d_sae=64, k=[4])
    saeft.check(config)
    assert config.layer == 3  # of 0 to 5
    x = torch.tensor([100.0, 100.0, 1.0, 2.0, 3.0])[None, :, None]
    monkeypatch.setitem(saeft.PLACES, "resid_post", lambda *_: (x, x))
    source = SimpleNamespace(n_skip=1, W_U=x), Stream(torch.zeros(1, 5))
    for sink_norm, limit in ((4.0, 8.0), (0.0, torch.inf)):  # the median of 100, 1, 2, 3 is 2
        some = saeft.first_activations(*source, 1, replace(config, sink_norm=sink_norm))
        assert some[1] == limit and len(some[0]) == (3 if sink_norm else 4)
    config, t = replace(LOOP, kl_tokens=1200, warmup=10), Trainee(small_sae())  # end to end
    assert [t.rate(step, 200, config) for step in (0, 4, 50)] == pytest.approx([1e-3, 5e-3, 1e-2])
    for size in (1.0, 1.003, 1.01):  # a loaded SAE keeps other norms; bfloat16 stores 1 as 1.003
        sae = small_sae()
        sae.W_dec.data.mul_(size)
        sae.save(tmp_path, {})
        assert SAE.load(tmp_path).unit_norm == (size < 1.01)


def test_what_a_step_of_the_fine_tune_is_given(lm, monkeypatch):
    """The next tokens, the share of the steps that are done, draws of the seed and the step alone."""

    def run(first=0, seed=0):
        next_tokens, done, draws = [], [], []

        def divergence(log_p, log_q, next_token):
            next_tokens.append(next_token)
            return saeft.kl_divergence(log_p, log_q, next_token)

        monkeypatch.setattr(ReLU, "penalty", lambda *args: done.append(args[-1]) or 0.0)
        monkeypatch.setattr(saeft, "update", lambda t, lr: draws.append(float(torch.rand(()))))
        sae, stream = small_sae("relu"), Stream(TOKENS.repeat(4, 1))
        sae.l0_target, before = 2.5, float(sae.l1)
        phase = phase_of(Trainee(sae, lm, divergence), steps=4, step=first)
        torch.rand(first)  # whatever was drawn before
        saeft.finetune(phase, lm, stream, replace(LOOP, seed=seed), nothing)
        assert float(sae.l1) == before  # in the mode of evaluation nothing moves
        next_token = torch.cat(next_tokens).view(-1, 3, 20)
        assert (next_token[..., :-1] == TOKENS[:, 1:]).all()
        assert (next_token[..., -1] == -100).all()
        return done, draws

    done, draws = run()
    assert done == [0, 0.25, 0.5, 0.75]
    assert len({*draws}) == 4
    assert run(first=2)[1] == draws[2:]
    assert run(seed=1)[1] != draws


def dtypes_given(monkeypatch, name):
    """The dtypes of the tensors that a method of theirs is called on from here on."""
    seen, method = [], getattr(torch.Tensor, name)

    def noted(x, dim):
        seen.append(x.dtype)
        return method(x, dim)

    monkeypatch.setattr(torch.Tensor, name, noted)
    return seen


def test_logits_are_compared_in_float32(monkeypatch):
    seen = dtypes_given(monkeypatch, "log_softmax")
    half = torch.zeros(3, 4, dtype=torch.bfloat16)
    model, q = SimpleNamespace(W_U=half, unembed=lambda x: x), half.clone().requires_grad_()
    SlicedLoss.apply(model, [saeft.kl_divergence], torch.ones(3), torch.zeros(3), half, q)
    saeft.ce_and_kl(model, [half, half], torch.zeros(3, dtype=torch.long))
    assert {*seen} == {torch.float32} and len(seen) == 4


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_bfloat16_is_rounded_where_transformers_rounds(family, tmp_path, monkeypatch):
    model = reference(family).bfloat16()
    model.save_pretrained(tmp_path)
    ours = saeft.load_lm(str(tmp_path), dtype=torch.bfloat16)
    theirs = model(TOKENS, output_hidden_states=True).hidden_states
    assert torch.equal(ours.embed(TOKENS), theirs[0])
    norm = model.model.layers[1].input_layernorm
    assert torch.equal(ours.blocks[1].input_layernorm(theirs[1]), norm(theirs[1]))
    seen = dtypes_given(monkeypatch, "softmax")
    ours(TOKENS)
    assert {*seen} == {torch.float32}


def test_batchtopk_where_nothing_fires_and_at_the_random_start(tmp_path):
    sae = BatchTopK(32, 64, k=6).train()
    sae.threshold.fill_(0.3)
    sae.after_step(torch.zeros(9, 64), None, 0)
    assert torch.equal(sae.threshold, torch.full((64,), 0.3))
    assert command("--sae batchtopk --kl-tokens 12k --name end", tmp_path) == 0
    assert report_of(tmp_path / "end")["results"]["MSE"]["l0"] == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("gap, closed", [(0.4, 0.5), (0.0, None), (-0.1, None)])
def test_there_is_no_share_of_no_gap(gap, closed, tmp_path, monkeypatch):
    run = a_run(tmp_path)
    run.n, run.n_mse, run.identity = 187, 109, {"model": "1", "data": "2"}
    run.done.results = {"MSE": [{"gap": gap}]}
    run.stream = SimpleNamespace(validation=lambda: None, seen_after=lambda n: {})
    monkeypatch.setattr(saeft, "evaluate", lambda *args: ({}, [{"gap": 0.2}]))
    run.finish(phase_of())
    assert run.done.results["kl"][0]["gap_closed"] == closed


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_share_the_sequences_of_phase_one(rank, monkeypatch):
    two_processes(monkeypatch, rank)
    buffer = buffer_of(57, 0)
    served = torch.cat([buffer.next_batch(8) for _ in range(29)])
    assert buffer.stream.asked == [*range(56)] and (served[:, 0] % 2 == rank).all()
    assert len(served.unique(dim=0)) == len(served)


@torch.no_grad()
def test_two_processes_evaluate_what_one_does(lm, monkeypatch):
    tokens, limit = torch.randint(96, (22, 20)), torch.tensor(torch.inf)
    call = functools.partial(saeft.evaluate, lm, tokens, [Trainee(small_sae(), lm)], limit, LOOP)
    (model, (row,)), parts = call(), []
    for rank, total in ((1, lambda x: parts.append(x) or x), (0, lambda x: x + parts.pop(0))):
        two_processes(monkeypatch, rank, total)
        both, (ours,) = call()
    assert both == pytest.approx(model, rel=1e-5) and ours["dead"] == row["dead"]
    assert ours["fvu"] == pytest.approx(row["fvu"], rel=1e-4)


def test_figures_thresholds_and_the_end_are_of_all_processes(tmp_path, monkeypatch):
    run, lines = a_run(tmp_path), []
    run.folder.log, run.done.seconds = lines.extend, {"kl": 1.0}
    two_processes(monkeypatch, total=lambda x: x + 3)  # the other's loss is 3
    run.log(phase_of(step=5), [dict.fromkeys(["loss", "grad_norm"], torch.tensor(1.0))])
    row = json.loads(lines[0])
    assert (row["loss"], row["tokens"]) == (2.0, 5 * 2 * 64 * 2)
    sae = BatchTopK(32, 64, k=6).train()
    f = sae(torch.randn(200, 32))[1]
    sae.after_step(f, None, 0)
    assert_close(sae.threshold, ((f.values.min() + 3) / 2).expand(64))
    run.log = run.checkpoint = lambda *args: None
    two_processes(monkeypatch, total=lambda x: x + torch.tensor([1.0, 0.0]))  # it is told to stop
    with pytest.raises(KeyboardInterrupt):
        run.after_step(phase_of(step=5), [{"fvu": 0.1, "l0": 4.0}])


@pytest.mark.parametrize("minutes, due", [(1, True), (3, False)])
def test_checkpoints_are_minutes_apart_and_a_second_signal_ends(minutes, due, tmp_path):
    run, kept = a_run(tmp_path, f"--checkpoint-minutes {minutes}"), []
    run.checkpoint, run.log = kept.append, lambda *args: None
    run.saved = time.monotonic() - 120
    run.after_step(phase_of(step=5), [{"fvu": 0.1, "l0": 4.0}])
    assert bool(kept) == due
    run.in_loop = True
    run.on_signal(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        run.on_signal(signal.SIGINT, None)


def test_flags_beside_start_are_those_of_the_sae(tmp_path):
    TopK(128, 96, k=4).save(tmp_path, TOLD)
    for flags in ("--d-sae 64", "--layer 3", "--k 5", "--sae relu"):
        line = ["--start", str(tmp_path), *flags.split()]
        fails([f"{flags.split()[0]} ", "the SAE of --start has"], saeft.parse, line)


def test_text_of_a_folder_is_mixed_and_a_piece_of_just_the_longest_ends(tmp_path):
    assert 0.03 < np.mean([held_out(line) for line in [*texts(4000), "\ud800 alone"]]) < 0.07
    put(tmp_path, {f"{i:02}.txt": str(i) for i in range(20)})
    found = documents(str(tmp_path))
    assert found != sorted(found, key=int) == [str(i) for i in range(20)]
    longest = put(tmp_path, {"a.jsonl": jsonl(["x" * model_loaders.LONGEST])}) / "a.jsonl"
    ((_, _, ends),) = model_loaders.pieces(str(longest))
    assert ends
