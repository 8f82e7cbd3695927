"""The five forks: each trains from the command line, is saved, and read again with equal figures.

python -m pytest -q experiments/test_forks.py
"""

import functools
import json
import signal
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import model_loaders
import saeft
from experiments import convert
from saeft import KINDS, METHODS, PLACES, Config

transformers = pytest.importorskip("transformers")
SMALL = "--tokens 20k --kl-tokens 6k --eval-tokens 4k --context 64 --d-sae 128 --batch 256"
SMALL += " --kl-batch 4 --buffer 60 --warmup 5 --dead-after 2k --k 8"


@pytest.fixture(autouse=True)
def registries():
    """What a fork adds or replaces is gone after the test."""
    saved = [(registry, dict(registry)) for registry in (KINDS, METHODS, PLACES, saeft.FAMILIES)]
    yield
    for registry, content in saved:
        registry.clear()
        registry.update(content)


def imported(name):
    """A fork, imported anew."""
    sys.modules.pop(f"experiments.forks.{name}", None)
    return __import__(f"experiments.forks.{name}", fromlist=[name])


def run(folder, flags, name="run"):
    """A run's report."""
    line = f"{SMALL} {flags} --out {folder} --name {name}"
    assert saeft.main(line.split()) == 0
    return json.loads((folder / name / "report.json").read_text())


def same_figures(folder, report, flags="", name="again"):
    """--start from the SAE that a run left gives that run's figures."""
    start = f"--start {folder / 'run'} --kl-tokens 4k --eval-tokens 4k --kl-batch 4"
    assert saeft.main(f"{start} --out {folder} --name {name} {flags}".split()) == 0
    loaded = json.loads((folder / name / "report.json").read_text())["results"]["MSE"]
    for key in ("ce", "kl", "fvu", "l0"):
        assert loaded[key] == pytest.approx(report[key], rel=1e-4), key


@pytest.mark.parametrize("kind", ["matryoshka", "matryoshka-batchtopk"])
def test_matryoshka(tmp_path, kind):
    fork = imported("matryoshka")
    report = run(tmp_path, f"--sae {kind} --method kl")
    assert report["gap"] < report["results"]["MSE"]["gap"]
    same_figures(tmp_path, report)
    sae = saeft.SAE.load(tmp_path / "run")
    assert isinstance(sae, fork.Nested) and sae.kind == kind
    # By hand: what the prefixes add.
    x, weight = torch.randn(30, 128), torch.full((30,), 1 / 30)
    x_hat, f = sae(x)
    expected = 0.0
    for m in (8, 16, 32, 64):
        x_hat_m = f.to_dense()[:, :m] @ sae.W_dec[:m] + sae.b_dec
        expected += (x - x_hat_m).pow(2).sum(-1).mean()
    torch.testing.assert_close(sae.penalty(x, x_hat, f, weight, 0.5), expected)
    # Stock saeft takes it for what SAELens would.
    del KINDS[kind]
    stock = saeft.SAE.load(tmp_path / "run")
    assert stock.kind == {"matryoshka": "topk"}.get(kind, "jumprelu")
    torch.testing.assert_close(stock(x)[0], x_hat)


def test_the_first_latents_of_a_matryoshka_sae_reconstruct_more(tmp_path):
    imported("matryoshka")
    shares = {}
    for kind in ("topk", "matryoshka"):
        run(tmp_path, f"--sae {kind} --tokens 60k --lr 3e-3", name=kind)
        sae = saeft.SAE.load(tmp_path / kind)
        lm, tokens = saeft.load_lm("tiny"), torch.randint(2048, (20, 64))
        x = lm.prefix(tokens, 2).flatten(0, 1)
        first = sae.encode(x).to_dense()[:, :32] @ sae.W_dec[:32] + sae.b_dec
        shares[kind] = ((x - first).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item()
    assert shares["matryoshka"] < 0.9 * shares["topk"]


def test_jumprelu_and_its_gradients(tmp_path):
    fork = imported("jumprelu")
    report = run(tmp_path, "--sae jumprelu --tokens 60k --lr 3e-3 --method kl")
    assert report["gap"] < report["results"]["MSE"]["gap"]
    same_figures(tmp_path, report)
    sae = saeft.SAE.load(tmp_path / "run")
    assert isinstance(sae, fork.JumpReLU) and sae.threshold.std() > 0
    imported_x = torch.randn(30, 128)
    x_hat = sae(imported_x)[0]
    # The paper's pseudo-derivatives, element by element.
    z, theta = torch.rand(40, 6).double() * 0.3, torch.rand(6).double() * 0.3
    z.requires_grad_()
    theta.requires_grad_()
    g = torch.randn(40, 6).double()
    eps = torch.tensor(0.1).double()
    near = ((z - theta).abs() < 0.05).double() / 0.1
    for count, by_z, by_theta in [
        (False, g * (z > theta), -(g * theta * near).sum(0)),
        (True, torch.zeros_like(z), -(g * near).sum(0)),
    ]:
        out = fork.Jump.apply(z, theta, eps, count)
        ours = torch.autograd.grad(out, (z, theta), g, allow_unused=True)
        torch.testing.assert_close(torch.zeros_like(z) if count else ours[0], by_z)
        torch.testing.assert_close(ours[1], by_theta)
    # Stock saeft, where thresholds are frozen, and SAELens.
    KINDS["jumprelu"] = saeft.JumpReLU
    torch.testing.assert_close(saeft.SAE.load(tmp_path / "run")(imported_x)[0], x_hat)
    cfg = json.loads((tmp_path / "run" / "cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu"
    # What convert.py wrote of it, and of any JumpReLU SAE, the fork starts from as well.
    assert convert.main([str(tmp_path / "run"), str(tmp_path / "converted")]) == 0
    KINDS["jumprelu"] = fork.JumpReLU
    torch.testing.assert_close(saeft.SAE.load(tmp_path / "converted")(imported_x)[0], x_hat)
    line = f"--start {tmp_path / 'converted'} --out {tmp_path} --name from-converted"
    line += " --kl-tokens 4k --eval-tokens 4k --kl-batch 4"
    assert saeft.main(line.split()) == 0
    assert json.loads((tmp_path / "from-converted" / "report.json").read_text())["k"] == 0
    assert saeft.main(f"{line} --overwrite --k 3".split()) == 2  # it keeps its L0
    if lens := pytest.importorskip("sae_lens", reason="SAELens is not installed"):
        theirs = lens.SAE.load_from_disk(tmp_path / "run")(imported_x)
        torch.testing.assert_close(theirs, x_hat, rtol=1e-4, atol=1e-4)


def test_losses(tmp_path):
    fork = imported("losses")
    report = run(tmp_path, "--method kl kl-t2 reverse-kl ce")
    gaps = {name: row["gap"] for name, row in report["results"].items()}
    assert all(gaps[name] < gaps["MSE"] for name in ("kl", "kl-t2", "reverse-kl", "ce"))
    assert len({round(gap, 7) for gap in gaps.values()}) == 5
    # Each against its definition on whole distributions.
    log_p, log_q = torch.randn(2, 7, 11).double().log_softmax(-1)
    target = torch.tensor([3, 0, 10, 1, 1, -100, 5])
    cold = [(z / 2).softmax(-1) for z in (log_p, log_q)]
    expected = {
        fork.kl_at_2: 4 * (cold[0] * (cold[0] / cold[1]).log()).sum(-1),
        fork.reverse_kl: (log_q.exp() * (log_q - log_p)).sum(-1),
        fork.next_token_ce: torch.stack(
            [-q[t] if t >= 0 else q[0] * 0 for q, t in zip(log_q, target)]
        ),
    }
    for divergence, value in expected.items():
        torch.testing.assert_close(divergence(log_p, log_q, target), value)


@pytest.mark.parametrize("name", ["mlp_out", "attn_out"])
def test_places(tmp_path, name, capsys):
    imported("place")
    lm, tokens = saeft.load_lm("tiny"), torch.randint(2048, (2, 20))
    resid, x = PLACES[name](lm, tokens, 2)
    assert torch.equal(resid, lm.prefix(tokens, 2))
    block = lm.blocks[2]
    module = {"mlp_out": block.mlp, "attn_out": block.attention}[name]
    changed = torch.randn_like(x)
    with module.register_forward_hook(lambda module, args, out: changed):
        expected = lm(tokens)
    torch.testing.assert_close(lm.unembed(lm.suffix(resid + changed - x, 2)), expected)

    report = run(tmp_path, f"--place {name} --method kl")
    cfg = json.loads((tmp_path / "run" / "cfg.json").read_text())
    assert cfg["metadata"]["hook_name"] == f"blocks.2.hook_{name}"
    same_figures(tmp_path, report)
    del PLACES[name]
    capsys.readouterr()
    assert saeft.main(f"--start {tmp_path / 'run'} --out {tmp_path}".split()) == 2
    assert name in capsys.readouterr().err


def test_the_page_of_features_imports_a_fork(tmp_path):
    from experiments import features

    imported("place")
    run(tmp_path, "--place mlp_out")
    del PLACES["mlp_out"], PLACES["attn_out"]
    flags = [str(tmp_path / "run"), "--tokens", "4k", "--latents", "8"]
    assert features.main(flags) == 2
    assert features.main([*flags, "--fork", str(Path(__file__).parent / "forks/place.py")]) == 0


SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3)
SIZES.update(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
DECODERS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {},
    # Fewer positions than the test has rows, which `unembed` gets without their sequences.
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 16},
    "olmo2": {},
    "gpt_neox": {},
    "gemma3_text": {"head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    # Whose blocks put out tuples.
    "gpt_neo": {
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local", "local"], 1]],
    },
    "falcon": {"num_kv_heads": 4, "alibi": False},
    "bloom": {"n_layer": 3, "n_head": 4},
}


@pytest.mark.parametrize("family", DECODERS)
def test_any_model_is_the_library_s_to_the_last_bit(family):
    fork = imported("any_model")
    torch.manual_seed(0)
    sizes = {"vocab_size": 96} if family == "gpt2" else SIZES
    lm = fork.AnyModel({"model_type": family, **sizes, **DECODERS[family]}).eval()
    lm.requires_grad_(False)
    tokens, ran = torch.randint(96, (2, 12)), []
    for i, block in enumerate(lm.blocks):
        block.register_forward_hook(lambda module, args, out, i=i: ran.append(i))
    x = lm.prefix(tokens, 1)
    assert ran == [0, 1]
    own = lm.model(tokens).logits
    assert torch.equal(lm.unembed(lm.suffix(x, 1)), own)
    rows = lm.suffix(x, 1).flatten(0, 1)
    torch.testing.assert_close(lm.unembed(rows), own.flatten(0, 1))
    changed = torch.randn_like(x).requires_grad_()

    def change(module, args, out):
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    with lm.blocks[1].register_forward_hook(change):
        expected = lm.model(tokens).logits
    spliced = lm.unembed(lm.suffix(changed, 1))
    assert torch.equal(spliced, expected)
    g = torch.randn_like(spliced)
    ours, theirs = (torch.autograd.grad(z, changed, g)[0] for z in (spliced, expected))
    torch.testing.assert_close(ours, theirs)  # summed in another order on some processors


def test_any_model_runs_with_its_own_tokenizer(tmp_path):
    imported("any_model")
    folder = tmp_path / "llama"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(model_loaders.TINY / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": 2048}, eos_token_id=0)
    model = transformers.LlamaForCausalLM(config)
    for p in model.parameters():
        p.data.normal_(std=0.2)
    model.save_pretrained(folder)
    report = run(tmp_path, f"--model {folder} --data tiny --method kl mse")
    assert report["kl"] < report["results"]["MSE"]["kl"] and report["ce_original"] > 1
    same_figures(tmp_path, report, flags=f"--model {folder}")


def test_the_ids_of_a_tokenizer_may_have_gaps(tmp_path):
    words = tokenizers.models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 5}, unk_token="a")
    theirs = tokenizers.Tokenizer(words)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs, eos_token="<|endoftext|>")
    fast.save_pretrained(tmp_path)
    tokenizer = imported("any_model").Tokenizer(str(tmp_path))
    assert len(fast) == 3 and tokenizer.n_vocab == 6 and tokenizer.encode("b") == [5]


def without_a_block(tensors):
    return {name: t for name, t in tensors.items() if ".layers.1." not in name}


def with_nan(tensors):
    return {**tensors, "model.layers.1.mlp.up_proj.weight": torch.full((64, 32), torch.nan)}


def two_equal_rows(tensors):
    rows = tensors["model.embed_tokens.weight"]
    rows[5] = rows[4]
    return tensors


OLD_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}


@pytest.mark.parametrize(
    "family, change, sizes",
    [
        ("bert", dict, {}),  # it looks ahead
        ("llama", two_equal_rows, {"is_causal": False}),
        ("openai-gpt", dict, OLD_GPT),  # its blocks put out a list
        ("opt", dict, {"word_embed_proj_dim": 16, "ffn_dim": 64}),
        ("llama", without_a_block, {}),
        ("llama", with_nan, {}),
    ],
)
def test_what_is_no_whole_causal_decoder_of_blocks_is_refused(tmp_path, family, change, sizes):
    fork, sizes = imported("any_model"), {**SIZES, "vocab_size": 64, **sizes}
    config = transformers.AutoConfig.for_model(family, **sizes, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        p.data.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    tensors = change(load_file(tmp_path / "model.safetensors"))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    lm = fork.AnyModel(model_loaders.load_config(str(tmp_path)))
    with pytest.raises(model_loaders.UserError) as error:
        lm.load(str(tmp_path), "cpu", torch.float32)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_any_model_s_tokenizer(tmp_path):
    """Like Llama's, which writes no space that a text begins with."""
    fork = imported("any_model")
    own = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    replaced = tokenizers.normalizers.Replace(" ", "▁")
    own.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), replaced]
    )
    of_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "</s>", *of_bytes]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=special)
    own.train_from_iterator(["the cat sat on the mat, the cat sat on the hat"] * 9, trainer)
    spaces = tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback()
    ends = tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)
    own.decoder = tokenizers.decoders.Sequence([*spaces, *ends])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>")
    theirs.save_pretrained(tmp_path)
    ours = fork.Tokenizer(str(tmp_path))
    ids = ours.encode("the cat sat")
    parts = [ours.decode([i]) for i in ids]
    assert "".join(parts) == ours.decode(ids) == " the cat sat"
    assert ours.encode("\ud800 cat") == ours.encode("\ufffd cat")  # half a character
    assert (ours.bos_id, fork.Tokenizer(str(tmp_path), "yes").bos_id) == (None, ours.eos_id)
    template = functools.partial(
        tokenizers.processors.TemplateProcessing, special_tokens=[("<unk>", 0), ("</s>", 1)]
    )
    for single, firsts in {"<unk> $A </s>": (0, 0, None), "$A </s>": (None, 1, None)}.items():
        own.post_processor = template(single=single)
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>")
        theirs.save_pretrained(tmp_path)
        ours = [fork.Tokenizer(str(tmp_path), bos) for bos in ("auto", "yes", "no")]
        assert tuple(t.bos_id for t in ours) == firsts
    own.post_processor = template(single="<unk> </s> $A")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(model_loaders.UserError, match=r"puts \[0, 1\] first"):
        fork.Tokenizer(str(tmp_path))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, eos_token="</s>", split_special_tokens=True
    )
    theirs.save_pretrained(tmp_path / "split")
    keys = {fork.Tokenizer(str(tmp_path / part), "no").fingerprint for part in ("", "split")}
    assert len(keys) == 2
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    with pytest.raises(model_loaders.UserError, match="no tokenizer for"):
        fork.Tokenizer(str(tmp_path / "slow"))


def test_any_model_gives_saeft_s_own_figures(tmp_path):
    """On a family that saeft has itself."""
    fork = imported("any_model")
    flags = "--layer 2 --data tiny --method kl"
    ours = run(tmp_path, flags)
    saeft.FAMILIES["gpt_neox"] = fork.AnyModel
    theirs = run(tmp_path, flags, name="theirs")
    assert theirs["ce_original"] == pytest.approx(ours["ce_original"], abs=1e-5)
    assert theirs["results"]["MSE"]["ce"] == pytest.approx(ours["results"]["MSE"]["ce"], abs=2e-3)


def own_kind():
    """A kind that draws when it is made and at each step, and has numbers of its own: one found at
    the start, one that moves, one negative, one whole."""

    class Noisy(saeft.TopK, kind="noisy"):
        numbers = ("k", "floor", "steps", "groups")

        def __init__(self, *args, floor: float = 0.0, steps=0, groups: int = 4, **kwargs):
            super().__init__(*args, **kwargs)
            self.floor, self.steps, self.groups = floor, steps, groups
            self.gate = torch.nn.Parameter(1 + 0.1 * torch.randn(groups))
            self.frozen = torch.nn.Parameter(torch.ones(()), requires_grad=False)

        def start(self, x, config):
            super().start(x, config)
            self.floor = -x.std().item()
            self.frozen.fill_(0.5)

        def encode(self, x, keep=None):
            if self.training:
                x = x + 0.01 * self.floor * torch.randn_like(x)
            return super().encode(x, keep) * (self.gate.mean() + self.frozen + 1e-5 * self.steps)

        def after_step(self, f, l0, step):
            self.steps += 1

    return Noisy


def test_a_kind_of_ones_own_numbers(tmp_path):
    """They are written and read as they are; one that an older file lacks is the constructor's."""
    own_kind()
    report = run(tmp_path, "--sae noisy --method kl")
    same_figures(tmp_path, report)
    sae, cfg = saeft.SAE.load(tmp_path / "run"), tmp_path / "run" / "cfg.json"
    assert sae.floor < 0 and type(sae.groups) is int and sae.steps == 54 + 23
    told = json.loads(cfg.read_text())
    del told["metadata"]["saeft"]["groups"]
    cfg.write_text(json.dumps(told))
    assert saeft.SAE.load(tmp_path / "run").groups == 4


@pytest.mark.parametrize("fork", ["matryoshka", "jumprelu"])
def test_a_fork_s_penalty_in_bfloat16_as_on_a_gpu(tmp_path, monkeypatch, fork):
    imported(fork)
    exact = run(tmp_path, f"--sae {fork} --method kl", "exact")
    monkeypatch.setattr(saeft, "FAST", False)
    report = run(tmp_path, f"--sae {fork} --method kl --dtype bfloat16")
    for name in ("ce", "fvu"):
        assert report[name] == pytest.approx(exact[name], rel=0.05)


@pytest.mark.parametrize(
    "fork, flags, in_phase",
    [
        (own_kind, "--sae noisy --method kl", "MSE"),
        (own_kind, "--sae noisy --method kl", "kl"),
        ("matryoshka", "--sae matryoshka-batchtopk --method kl", "MSE"),
        ("jumprelu", "--sae jumprelu --method kl", "MSE"),
        ("losses", "--method reverse-kl", "reverse-kl"),
        ("place", "--place mlp_out --method kl", "kl"),
    ],
)
def test_a_fork_s_run_that_is_interrupted_ends_the_same(
    tmp_path, monkeypatch, fork, flags, in_phase
):
    fork() if callable(fork) else imported(fork)
    run(tmp_path, flags, name="straight")
    after_step = saeft.Run.after_step

    def interrupted(self, phase, figures):
        if (phase.name, phase.step) == (in_phase, 10):
            self.stopping = signal.SIGINT
        after_step(self, phase, figures)

    line = f"{SMALL} {flags} --out {tmp_path} --name run".split()
    with monkeypatch.context() as patched:
        patched.setattr(saeft.Run, "after_step", interrupted)
        assert saeft.main(line) == 130
    assert not (tmp_path / "run" / "report.json").exists()
    assert saeft.main([*line, "--resume"]) == 0
    for file in ("sae_weights.safetensors", "before/sae_weights.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()


def test_what_any_model_cannot_do_is_refused(tmp_path, capsys):
    imported("place")
    saeft.FAMILIES["gpt_neox"] = imported("any_model").AnyModel
    line = f"{SMALL} --place mlp_out --layer 2 --data tiny --out {tmp_path}"
    assert saeft.main(line.split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # transformers' progress stands before it
    assert error == "saeft: --place mlp_out: the blocks of that model do not tell theirs"


def test_any_model_of_a_revision(monkeypatch, tmp_path):
    fork = imported("any_model")
    place = {"pretrained_model_name_or_path": "owner/name", "revision": "step1000"}
    assert fork.named("owner/name@step1000") == place
    assert fork.named("pythia-160m")["pretrained_model_name_or_path"] == "EleutherAI/pythia-160m"
    (tmp_path / "a@b").mkdir()
    assert fork.named(f"{tmp_path}/a@b")["pretrained_model_name_or_path"] == f"{tmp_path}/a@b"


def test_a_settings_class_of_one_s_own():
    """A fork's own flags: a subclass of Config."""
    from dataclasses import dataclass

    @dataclass
    class Settings(Config):
        temperature: float = model_loaders.flag(1.0, "of a fork", 0)

    config = saeft.parse("--temperature 2 --k 3".split(), Settings)
    assert config.temperature == 2 and config.k == [3] and config.context == 128
