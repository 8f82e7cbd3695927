"""Tests of experiments/features.py and saebench.py, to be spliced into test_saeft.py."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model_loaders
import saeft
from experiments import features
from saeft import SAE

HOSTILE = "</script><script>alert(1)</script><b>&amp; \"q\" 's'\t\x01\x7f\u202e 😀 é\n    end"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.fixture
def run(tmp_path, request):
    """A run's folder, of an SAE nobody trained, on text that is hard to show."""
    kind = getattr(request, "param", "topk")
    data = tmp_path / "text.jsonl"
    texts = [f"{i} {HOSTILE} def f{i % 7}(self): return {i}\n" * 4 for i in range(400)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    metadata = {"sae_lens_version": "6.54.0", "model_name": "tiny", "context_size": 64}
    metadata.update(hook_name="blocks.2.hook_resid_post", prepend_bos=False)
    metadata["dataset_path"] = str(data)
    folder = tmp_path / "a <b> & run"
    for seed, path in ((0, folder / "before"), (1, folder)):
        sae = SAE(128, 512, 6, kind, seed=0)
        sae.W_dec.data = saeft.F.normalize(
            sae.W_dec.data + 0.05 * seed * torch.randn(512, 128), dim=-1
        )
        sae.b_enc.data = torch.randn(512) - (2 if kind in ("relu", "jumprelu") else 0)
        sae.threshold += 1.0
        sae.median_norm += 12.0
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
    told = model_loaders.sae_settings(str(folder))
    source = told["data"], model_loaders.load_tokenizer("tiny"), 64, 64, 3000
    stream = model_loaders.TokenStream(*source, allow_short=True)
    tokens = stream.validation()
    stream.close()
    return sae, lm, tokens, lm.prefix(tokens, 2)


def test_the_page_tells_what_direct_computation_gives(run):
    page, data = page_of(run)
    sae, lm, tokens, resid = direct(run)
    x = resid.flatten(0, 1)
    keep = x.norm(dim=-1) <= 4 * sae.median_norm
    f = sae.encode(x) * keep[:, None]
    rate = (f > 0).sum(0) / keep.sum()
    before = SAE.load(str(run / "before"))
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


def test_no_text_of_the_page_is_markup(run):
    page, data = page_of(run)
    assert len(page.encode()) < 2_000_000
    assert page.count("<script") == page.count("</script>") == 2
    assert "<" not in re.search(r'id="data">(.*?)</script>', page, re.S)[1]
    assert f"<title>{html.escape('Latents of a <b> & run')}</title>" in page
    assert not re.search(r"(src|href)=|url\(|https?:|@import", page)
    contexts = [c for latent in data["latents"] for c in latent["contexts"]]
    texts = "".join("".join(t for t, _ in c["text"]) for c in contexts)
    assert "script>" in texts and "😀" in texts


@pytest.mark.parametrize("run", ["batchtopk", "relu", "jumprelu"], indirect=True)
def test_every_kind_of_sae_has_a_page_with_and_without_before(run):
    _, data = page_of(run)
    assert data["compared"] and data["latents"]
    shutil.rmtree(run / "before")
    _, data = page_of(run)
    assert not data["compared"] and "cosine" not in data["latents"][0]
    assert {latent["why"] for latent in data["latents"]} == {"sample"}


def test_tokens_that_share_a_character_are_one_piece():
    tokenizer = type(
        "Bytes", (), {"_bytes": {1: b"a\xf0\x9f", 2: b"\x98\x80", 3: b"\xff", 4: b"<"}}
    )
    made = features.pieces(tokenizer, [4, 1, 2, 3, 1], [0.0, 1.0, 2.0, 3.0, 4.0])
    assert made == [("<", 0.0), ("a😀", 2.0), ("\\xff", 3.0), ("a\\xf0\\x9f", 4.0)]


def test_a_user_s_mistake_with_features_is_one_line(run, capsys):
    assert features.main([str(run), "--model", "nowhere"]) == 2
    assert features.main([str(run / "missing")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_search_and_order_work_in_a_browser(run, tmp_path):
    page, data = page_of(run)
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
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
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
    texts = {
        f"#{latent['id']}": ["".join(t for t, _ in c["text"]) for c in latent["contexts"]]
        for latent in latents
    }
    assert {*seen["text"]} == {n for n, t in texts.items() if any("def f3(self" in c for c in t)}
    assert f"#{latents[3]['id']}" in seen["asked"] and seen["none"] == []
    assert len(seen["turned"]) == 5 and seen["open"] == 1 and seen["scripts"] == 3


@pytest.fixture
def texts(tmp_path):
    """Labelled text: a folder, a .jsonl and a .txt, one class each."""
    folder = tmp_path / "texts"
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


def test_labelled_text_has_two_sides_of_equal_classes(texts, tmp_path):
    pytest.importorskip("sae_bench")
    from experiments import saebench_texts

    data = saebench_texts.read_classes(texts)
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
    (texts / "few.txt").write_text("few")
    with pytest.raises(saeft.UserError, match="'few': 1"):
        saebench_texts.read_classes(texts)


def test_saebench_says_what_to_install(tmp_path):
    (tmp_path / "sae_bench.py").write_text("raise ImportError('none here')")
    script = Path(saeft.__file__).parent / "experiments" / "saebench.py"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, script, "x"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "pip install sae-bench" in done.stderr


def test_saebench_runs_offline_before_and_after(run, texts, tmp_path, capsys):
    pytest.importorskip("sae_bench")
    from experiments import saebench

    assert saebench.main([]) == saebench.main(["x", "--data", str(texts), "--evals", "ravel"]) == 2
    flags = ["--data", str(texts), "--batches", "1", "--out", str(tmp_path / "out")]
    assert saebench.main([str(run), *flags]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "out" / "table.txt").read_text().strip()
    cells = {line[:38].strip(): line[38:].split() for line in printed.splitlines()[1:]}
    assert len(cells) == 17 and all(len(row) >= 2 for row in cells.values())
    ce = [float(value) for value in cells["core            CE with the SAE"]]
    assert 1 < ce[0] < min(ce[1:]) and ce[1] != ce[2]
    assert cells["core            L0"] == ["6.0000", "6.0000"]
    assert min(map(float, cells["sparse probing  accuracy, all latents"])) > 0.8


def test_ravel_sees_blocks_of_transformers_as_it_expects(run):
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
