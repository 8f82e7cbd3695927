"""Whole runs, from the command line: a tutorial of what saeft.py does, keeps and refuses."""

import fcntl
import json
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

import model_loaders
import saeft
from experiments import baselines, kills
from model_loaders import UserError
from saeft import SAE

safetensors = pytest.importorskip("safetensors.torch")
torch.set_num_threads(1)

# ---- Whole runs, from the command line -----------------------------------------------------------
HERE = Path(saeft.__file__).parent
SMALL = (
    "--tokens 12k --kl-tokens 5k --eval-tokens 2k --context 64 --d-sae 64 --k 4 --batch 256"
    " --kl-batch 2 --buffer 40 --warmup 5 --log-every 5"
)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """A run sets handlers of signals and the precision of products; the next test finds neither."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_float32_matmul_precision("highest")


def command(line, out, methods=saeft.METHODS):
    """saeft.py's exit status for a command line, with runs in `out`."""
    return saeft.main([*SMALL.split(), *line.split(), "--out", str(out)], methods)


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def weights_of(folder):
    return (folder / "sae_weights.safetensors").read_bytes()


def test_what_a_run_leaves(tmp_path, capsys):
    assert command("--name a --method kl mse", tmp_path) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "a"
    parts = [folder, folder / "before", folder / "mse"]  # after KL+MSE; of phase one; the control

    # config.json: every setting, defaults and presets included.
    settings = json.loads((folder / "config.json").read_text())
    assert settings["k"] == [4] and settings["layer"] == 2 and settings["kl_tokens"] == 5_000

    # metrics.jsonl: a line every --log-every steps, and at the end of each phase.
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = {name: [m["step"] for m in lines if m["phase"] == name] for name in ("MSE", "kl", "mse")}
    assert steps == {"MSE": [5, 10, 15, 20, 25, 27], **dict.fromkeys(("kl", "mse"), [*range(5, 39, 5), 39])}
    assert {line["phase"]: line["tokens"] for line in lines} == {"MSE": 27 * 256, "kl": 39 * 128, "mse": 39 * 128}
    for line in lines:
        assert 0 < line["fvu"] < 2 and line["l0"] == pytest.approx(4, abs=0.01)
        if line["phase"] == "kl":
            assert line["beta"] * line["kl"] == pytest.approx(line["mse"], rel=1e-4)

    # report.json: the settings again, and what each phase came to.
    report = report_of(folder)
    results = report["results"]
    assert report["layer"] == 2 and report["seed"] == 0 and set(report["seconds"]) == {"MSE", "kl", "mse"}
    assert report["ce_original"] < report["ce_final"] < report["ce_mse"] < report["ce_zero"]
    assert report["gap_mse"] == pytest.approx(report["ce_mse"] - report["ce_original"])
    assert report["gap_closed"] == pytest.approx(1 - report["gap_final"] / report["gap_mse"])
    assert results["kl"]["ce"] == report["ce_final"] and results["mse"]["fvu"] < results["MSE"]["fvu"]

    # The closing table shows them, and nothing went to stderr.
    table = out.splitlines()[-6:]
    assert [row.split("  ")[0] for row in table[1:]] == ["original model", "x replaced by 0", "after MSE", "after KL+MSE", "after MSE alone, same tokens"]
    assert f"{report['ce_final']:.4f}" in table[4] and f"{report['gap_closed']:.1%}" in table[4] and err == ""

    # Three SAEs, in SAELens's layout, for raw activations; SAE.load reads them.
    lm = saeft.load_lm("tiny")
    tokens = torch.randint(200, (4, 64), generator=torch.Generator().manual_seed(0))
    x = lm.prefix(tokens, 2).flatten(0, 1)
    for part in parts:
        tensors = safetensors.load_file(part / "sae_weights.safetensors")
        cfg = json.loads((part / "cfg.json").read_text())
        assert tensors["W_enc"].shape == (128, 64) and cfg["architecture"] == "topk"
        assert cfg["metadata"]["hook_name"] == "blocks.2.hook_resid_post"
        x_hat, active = SAE.load(part)(x)
        assert active.counts.sum() == 4 * len(x) and x_hat.shape == x.shape
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    saes = {f"{part}{file}" for part in ("", "before/", "mse/") for file in ("cfg.json", "sae_weights.safetensors")}
    assert left == saes | {".saeft", "config.json", "metrics.jsonl", "report.json"}


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
    assert report_of(a)["results"]["kl"] == report_of(b)["results"]["kl"] == report_of(k / "k4")["results"]["kl"]
    assert report_of(k / "k8")["l0"] > 4 == report_of(a)["l0"]
    assert weights_of(tmp_path / "other") != weights_of(a)


def test_a_method_does_not_depend_on_the_methods_before_it(tmp_path):
    names = "kl lora-sae linear-adapter lora-lm"
    assert command(f"--name all --rank 2 --method {names}", tmp_path, baselines.METHODS) == 0
    together = report_of(tmp_path / "all")["results"]
    for name in ("lora-sae", "lora-lm"):
        line = f"--name {name} --rank 2 --method {name}"
        assert command(line, tmp_path, baselines.METHODS) == 0
        assert report_of(tmp_path / name)["results"][name] == together[name]
        assert weights_of(tmp_path / name) == weights_of(tmp_path / "all" / name)
    for name in names.split():  # and what it saves gives the figures that it reported
        folder = tmp_path / "all" / ("" if name == "kl" else name)
        lm, config = saeft.load_lm("tiny"), saeft.parse([*SMALL.split(), "--layer", "2"])
        loaded = baselines.load(folder, lm, 2)
        stream = model_loaders.TokenStream("tiny", model_loaders.load_tokenizer("tiny"), 64, 100, 2000)
        _, (row,) = saeft.evaluate(lm, stream.validation(), [loaded], config)
        stream.close()
        expected = {key: together[name][key] for key in row}
        assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["topk", "relu", "batchtopk"])
def test_kinds_of_sae_ways_to_train_and_start(tmp_path, capsys, kind):
    assert command(f"--sae {kind} --name both", tmp_path) == 0
    assert command(f"--sae {kind} --tokens 7k --kl-tokens 0 --name alone", tmp_path) == 0
    assert command(f"--sae {kind} --kl-tokens 12k --name end", tmp_path) == 0
    both, alone, end = (report_of(tmp_path / name) for name in ("both", "alone", "end"))
    assert both["ce_final"] != both["ce_mse"] == alone["ce_mse"] and alone["gap_closed"] == 0
    assert weights_of(tmp_path / "alone") == weights_of(tmp_path / "both" / "before")
    # End to end there is no phase one, and no gap to close a share of.
    assert end["gap_closed"] is None and end["ce_final"] < end["results"]["MSE"]["ce"]
    assert "at the random start" in capsys.readouterr().out
    assert not (tmp_path / "end" / "before" / "cfg.json").exists()

    # --start on a run's own before/ goes on as that run did: model, layer, data, K from the SAE.
    before = tmp_path / "both" / "before"
    line = ["--start", str(before), "--out", str(tmp_path), "--name", "again", "--method", "kl"]
    small = "--kl-tokens 5k --eval-tokens 2k --kl-batch 2 --log-every 5"
    assert saeft.main([*line, *small.split()]) == 0
    again = report_of(tmp_path / "again")
    for part in ("MSE", "kl"):
        assert again["results"][part] == pytest.approx(both["results"][part], rel=2e-4)
    assert "as loaded" in capsys.readouterr().out
    a, b = SAE.load(tmp_path / "both"), SAE.load(tmp_path / "again")
    for name, value in a.state_dict().items():
        assert torch.allclose(value, b.state_dict()[name], rtol=1e-3, atol=1e-4), name


def test_batchtopk_of_200_steps_is_evaluated_at_its_k(tmp_path):
    line = "--sae batchtopk --k 4 16 --tokens 256k --kl-tokens 204800 --eval-tokens 25k --kl-batch 8 --method kl"
    assert command(f"{line} --name x", tmp_path) == 0
    for k in (4, 16):
        results = report_of(tmp_path / "x" / f"k{k}")["results"]
        assert {name: row["l0"] for name, row in results.items()} == pytest.approx(dict.fromkeys(results, k), rel=0.05)


# ---- Mistakes: one line, status 2, and nothing is left behind ------------------------------------
MISTAKES = {
    "k 0": ("--k 0", "--k 0"),
    "k above F": ("--k 65", "--k 65"),
    "layer too high": ("--layer 6", "--layer 6: tiny has layers 0 to 5"),
    "layer negative": ("--layer=-1", "--layer"),
    "kl-tokens above tokens": ("--kl-tokens 50k", "--kl-tokens 50000"),
    "kl-tokens below a step": ("--kl-tokens 100", "--kl-tokens 100"),
    "batch above the tokens": ("--batch 50k", "--batch 50000"),
    "kl-batch above the tokens": ("--kl-batch 100000", "--kl-tokens 5000"),
    "no number": ("--tokens 5x", "5x"),
    "half a token": ("--tokens 1.5", "1.5"),
    "no tokens": ("--tokens 0", "--tokens 0"),
    "infinite": ("--tokens inf", "inf"),
    "unknown kind": ("--sae cubic", "cubic"),
    "unknown method": ("--method kl+x", "kl+x"),
    "unknown flag": ("--colour red", "--colour"),
    "shortened flag": ("--overw", "--overw"),
    "unknown dtype": ("--dtype int8", "int8"),
    "no such card": ("--device cuda:99", "--device cuda:99"),
    "no device": ("--device nonsense", "--device nonsense"),
    "no model": ("--model pythia-161m", "pythia-161m"),
    "no data": ("--data /nowhere/at/all", "/nowhere/at/all"),
    "empty data": ("--data=", "--data"),
    "more than there is": ("--tokens 90M", "90,000,000"),
    "batch 0": ("--batch 0", "--batch 0"),
    "buffer 0": ("--buffer 0", "--buffer 0"),
    "context 1": ("--context 1", "--context 1"),
    "context beyond the model": ("--context 4k", "--context 4000"),
    "context 1e9": ("--context 1e9", "--context 1000000000"),
    "lr nan": ("--lr nan", "--lr nan"),
    "lr negative": ("--lr=-1", "--lr -1"),
    "kl-lr negative": ("--kl-lr=-1", "--kl-lr -1"),
    "l1 negative": ("--l1=-5", "--l1 -5"),
    "seed 1e30": ("--seed 1e30", "--seed"),
    "d-sae 1e15": ("--d-sae 1e15", "--d-sae"),
    "dead-after 1e30": ("--dead-after 1e30", "--dead-after"),
    "everything a sink": ("--sink-norm 0.001", "--sink-norm"),
    "minutes negative": ("--checkpoint-minutes=-1", "--checkpoint-minutes"),
    "rate too high": ("--lr 1e18", "not finite"),
    "no such user": ("--data=~nosuchuser/x", "nosuchuser"),
    "no SAE": ("--start /nowhere", "/nowhere"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("line, words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_line_and_status_2(tmp_path, capsys, line, words):
    assert command(f"{line} --name x", tmp_path / "runs") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("saeft: ") and len(error) < 600
    assert words in error
    assert not list(tmp_path.rglob("*x*"))


OUTS = {
    "parent of --out": "..",
    "--out itself": ".",
    "nothing": "",
    "absolute": "/tmp/x",
    "nested": "a/b",
    "name too long": "n" * 300,
}


@pytest.mark.parametrize("name", OUTS.values(), ids=OUTS)
def test_names_that_are_no_folder_of_out_are_refused(tmp_path, capsys, name):
    (tmp_path / "runs").mkdir()
    (tmp_path / "thesis.txt").write_text("mine")
    for flags in ([], ["--overwrite"]):
        line = [*SMALL.split(), "--out", str(tmp_path / "runs"), f"--name={name}", *flags]
        assert saeft.main(line) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and "loading the model" not in out
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "thesis.txt"]


@pytest.mark.parametrize("out", ["file", "file/below", "dangling", "/proc/nothing"])
def test_an_out_that_cannot_be_written_is_told_before_the_model_is_loaded(tmp_path, capsys, out):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "file" / "x")
    assert command("--name x", tmp_path / out) == 2
    printed, err = capsys.readouterr()
    assert err.count("\n") == 1 and "cannot write" in err and "loading the model" not in printed
    assert (tmp_path / "file").read_text() == "mine"


def test_a_tilde_in_out_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command("--name x", "~/my runs".replace(" ", "-")) == 0
    assert (tmp_path / "my-runs" / "x" / "report.json").exists()


def model_folder(folder, **changes):
    """A copy of the embedded model, with other settings in its config.json."""
    shutil.copytree(model_loaders.TINY, folder, ignore=shutil.ignore_patterns("text*"))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.load_file(path)
    change(tensors)
    safetensors.save_file(tensors, path, {"format": "pt"})


def test_models_that_cannot_be_are_told_before_training(tmp_path, capsys):
    small = model_folder(tmp_path / "fewer-rows", vocab_size=1000)

    def cut(tensors):
        for name in ("gpt_neox.embed_in.weight", "embed_out.weight"):
            if name in tensors:
                tensors[name] = tensors[name][:1000].clone()

    edit_weights(small, cut)
    short = model_folder(tmp_path / "short", max_position_embeddings=32)
    bad = {}
    for value in ("nan", "inf"):
        bad[value] = model_folder(tmp_path / value)
        name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
        edit_weights(bad[value], lambda tensors: tensors[name].view(-1)[7:8].fill_(float(value)))
    for folder, words in [(small, ["ids", "1000"]), (short, ["--context 64", "32"]), *((f, ["layers.1.mlp.dense_h_to_4h.weight", "not finite"]) for f in bad.values())]:
        line = f"--model {folder} --data tiny --layer 2 --method kl --name x"
        assert command(line, tmp_path / "runs") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and all(word in err for word in words), err
        assert not (tmp_path / "runs" / "x").exists()


# ---- No file lost --------------------------------------------------------------------------------
def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_is_no_run_is_left_alone(tmp_path, capsys):
    model_folder(tmp_path / "model")  # has a config.json, as a run has
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "report.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    before = snapshot(tmp_path)
    for name in ("model", "project", "link"):
        for flags in ("", "--overwrite", "--resume"):
            assert command(f"--name {name} {flags}", tmp_path) == 2
            assert "no run's folder" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_overwrite_replaces_a_run_and_keeps_what_a_run_did_not_write(tmp_path, capsys):
    assert command("--k 4 8 --name x --method kl mse", tmp_path) == 0
    folder = tmp_path / "x"
    mine = [folder / "notes.txt", folder / "before" / "model.bin", folder / "k8" / "plot.png"]
    mine += [folder / "k16" / "thesis.tex", folder / "data" / "metrics.jsonl", folder / ".hidden"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    before = snapshot(folder)
    assert command("--k 4 8 --name x", tmp_path) == 2
    assert "--overwrite" in capsys.readouterr().err and snapshot(folder) == before

    # A run that fails before it has something leaves the old one as it was.
    for line in ("--overwrite --tokens 90M", "--overwrite --data /nowhere", "--overwrite --lr 1e18"):
        assert command(f"--k 4 8 --name x {line}", tmp_path) == 2
        assert snapshot(folder) == before, line
    capsys.readouterr()

    # One that succeeds takes its place: nothing of the old run is left, all of the user's is.
    assert command("--name x --overwrite --seed 1", tmp_path) == 0
    assert [path.read_text() for path in mine] == ["mine"] * len(mine)
    left = {str(path.relative_to(folder)) for path in snapshot(folder)} - {str(m.relative_to(folder)) for m in mine}
    assert not [name for name in left if name.startswith(("k4", "k8"))] and report_of(folder)["seed"] == 1


def test_what_was_finished_is_kept_when_a_later_phase_fails(tmp_path, capsys, monkeypatch):
    assert command("--name whole --method kl mse", tmp_path) == 0
    assert command("--name x --kl-lr 1e18", tmp_path) == 2
    err = capsys.readouterr().err
    assert "loss of kl" in err and err.count("\n") == 1
    before = weights_of(tmp_path / "whole" / "before")
    assert weights_of(tmp_path / "x" / "before") == before
    assert not (tmp_path / "x" / "cfg.json").exists()  # no SAE that was not finished

    # The disk is full in the second method: the SAEs of phase one and of the first stay.
    log = model_loaders.RunFolder.log

    def full(self, lines):
        if any('"phase": "mse"' in line for line in lines):
            raise UserError("cannot write metrics.jsonl (No space left on device)")
        log(self, lines)

    monkeypatch.setattr(model_loaders.RunFolder, "log", full)
    assert command("--name y --method kl mse", tmp_path) == 2
    assert weights_of(tmp_path / "y" / "before") == before
    assert weights_of(tmp_path / "y") == weights_of(tmp_path / "whole")
    assert command("--name y --method kl mse", tmp_path) == 2
    assert "--resume" in capsys.readouterr().err  # and says how to go on
    monkeypatch.undo()
    assert command("--name y --method kl mse --resume", tmp_path) == 0
    assert kills.differences(tmp_path / "whole", tmp_path / "y") == []


def test_a_folder_deleted_under_a_run_is_one_line(tmp_path, capsys, monkeypatch):
    log = model_loaders.RunFolder.log

    def deleted(self, lines):
        shutil.rmtree(self.path, ignore_errors=True)
        log(self, lines)

    monkeypatch.setattr(model_loaders.RunFolder, "log", deleted)
    assert command("--name x", tmp_path) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- No work lost --------------------------------------------------------------------------------
def test_killed_runs_that_are_resumed_end_byte_equal(tmp_path):
    line, draw = "--k 4 8 --method kl mse", random.Random(0)
    seconds = kills.undisturbed(line, tmp_path / "whole")
    phases = []
    while len(phases) < 3:
        folder = tmp_path / f"killed{len(phases)}"
        phases += kills.trial(line, folder, seconds, 3, draw)
        assert kills.differences(tmp_path / "whole", folder) == []


def test_a_resumed_run_must_be_the_same_run(tmp_path, capsys, monkeypatch):
    # Stopped by a signal in phase one, at step 7 ...
    after_step = saeft.Run.after_step

    def stop(self, phase, figures):
        if phase.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(self, phase, figures)

    monkeypatch.setattr(saeft.Run, "after_step", stop)
    assert command("--name x", tmp_path) == 143
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "SIGTERM" in err and "--resume" in err
    monkeypatch.undo()
    before = snapshot(tmp_path / "x")
    # ... the same command says that it is there, another one that it is another, and a file that
    # is damaged that it is.
    for line, words in {
        "": "unfinished run",
        "--resume --kl-lr 1e-3": "--kl-lr was 0.0015",
        "--resume --seed 5": "--seed was 0",
    }.items():
        assert command(f"--name x {line}", tmp_path) == 2
        assert words in capsys.readouterr().err and snapshot(tmp_path / "x") == before
    checkpoint = tmp_path / "x" / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:5000])
    assert command("--name x --resume", tmp_path) == 2
    assert "checkpoint.pt" in capsys.readouterr().err
    checkpoint.write_bytes(whole)
    assert command("--name x --resume", tmp_path) == 0
    assert command("--name y", tmp_path) == 0
    assert kills.differences(tmp_path / "x", tmp_path / "y") == []


def test_a_kill_after_the_first_report_can_be_resumed(tmp_path, monkeypatch):
    def stop(self, i):
        report(self, i)
        raise KeyboardInterrupt  # as if killed

    report = saeft.Run.report
    monkeypatch.setattr(saeft.Run, "report", stop)
    with pytest.raises(KeyboardInterrupt):
        command("--name x --k 4 8 --method kl", tmp_path)
    monkeypatch.undo()
    assert command("--name x --k 4 8 --method kl --resume", tmp_path) == 0
    assert report_of(tmp_path / "x" / "k8")["l0"] > 4
    assert not (tmp_path / "x" / "checkpoint.pt").exists()


# ---- Signals and streams, in processes of their own ----------------------------------------------
def spawn(line, cwd, **options):
    """saeft.py in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    words = [sys.executable, str(HERE / "saeft.py"), *SMALL.split(), *line.split()]
    return subprocess.Popen(words, cwd=cwd, env=env, **pipes)


def wait_for(path, process, text=""):
    """Until a file has a text, or the process has ended."""
    while process.poll() is None and not (path.exists() and text in path.read_text()):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


LONG = "--kl-tokens 4k --tokens 1.6M --log-every 1"  # longer than any test waits


def test_ctrl_c_and_sigterm_end_in_a_checkpoint_and_one_line(tmp_path):
    """And meanwhile the folder is that process's; and a closed stdout ends nothing."""
    for number, status in [(signal.SIGINT, 130), (signal.SIGTERM, 143)]:
        name = f"x{status}"
        process = spawn(f"{LONG} --name {name} --out {tmp_path}", tmp_path)
        process.stdout.close()
        wait_for(tmp_path / name / "metrics.jsonl", process, '"step": 3,')
        if number == signal.SIGINT:
            with pytest.raises(UserError, match="in use"):
                model_loaders.RunFolder(tmp_path / name, []).take(False, True)
        process.send_signal(number)
        err = process.stderr.read().decode()
        assert process.wait(60) == status
        assert err.count("\n") == 1 and number.name in err and "--resume" in err
        assert (tmp_path / name / "checkpoint.pt").exists()


def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(tmp_path):
    process = spawn(f"{LONG} --out {tmp_path}", tmp_path)
    while not re.search(r"torch", Path(f"/proc/{process.pid}/maps").read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == b"" and not list(tmp_path.iterdir())


def test_an_ascii_locale_shows_other_names_escaped(tmp_path):
    env = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    process = spawn("--name größe-κ --out .", tmp_path, env=env)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, b"")
    assert rb"gr\udc" in out and (tmp_path / "größe-κ" / "report.json").exists()
    assert b"\r" not in out and b"\033" not in out  # through a pipe: plain lines
    assert max(map(len, out.decode().splitlines())) <= 100


def test_on_a_terminal_of_80_columns_no_line_is_wider(tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {"COLUMNS": "", "TERM": "xterm", "PYTHONIOENCODING": ""}
    process = spawn("--k 4 8", tmp_path, env=env, stdout=theirs, stderr=theirs)  # default name
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # so ends a terminal on Linux
            break
        shown += part
        if not part:
            break
    os.close(ours)
    assert process.wait(60) == 0
    text = re.sub(r"\033\[[0-9;]*[A-Za-z]", "", shown.decode())
    lines = re.split(r"[\r\n]+", text)
    assert [line for line in lines if len(line) > 80] == []
    progress = [line for line in lines if line.startswith(("MSE", "kl"))]
    assert len(progress) > 10 and all("left" in line for line in progress)
    assert next(filter(None, lines)).startswith("saeft: topk SAE of 64 latents, K 4, 8")


def test_no_network_and_nothing_cached_ends_in_one_helpful_line(tmp_path):
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    process = spawn("--model pythia-160m --d-sae 128", tmp_path, env=env)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2 and out == b"" and err.count(b"\n") == 1
    assert b"EleutherAI/pythia-160m" in err and b"--model tiny" in err


# ---- Several processes ---------------------------------------------------------------------------
def test_torchrun_runs_two_processes_and_resumes_after_a_kill(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr"]
    words += ["127.0.0.1", "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    words += [str(HERE / "saeft.py"), *SMALL.split(), "--out", str(tmp_path), "--checkpoint-minutes", "0"]

    def start(flags):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen([*words, *flags.split()], env=env, start_new_session=True, **pipes)

    process = start("--name killed --method kl")
    wait_for(tmp_path / "killed" / "metrics.jsonl", process, '"phase": "kl"')
    os.killpg(process.pid, signal.SIGKILL)
    subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)])  # in sessions of their own
    process.communicate()
    resumed = start("--name killed --method kl --resume")
    out, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, out.decode()
    assert out.decode().count("original model") == 1  # one process speaks
    whole = start("--name whole --method kl")
    out, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, out.decode()
    assert kills.differences(tmp_path / "whole", tmp_path / "killed") == []
    report = report_of(tmp_path / "whole")
    assert report["gap_final"] < report["gap_mse"]
