"""The CUDA branch on any machine: tensors that say they are on cuda:0 and compute on the CPU."""

import functools
import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

import model_loaders
import saeft
from saeft import SAE, Config, Phase, Trainee

torch.set_num_threads(1)
SOURCE = Path(saeft.__file__).read_text("utf-8")
SHAPE = {"vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPE.update(intermediate_size=64, num_key_value_heads=2, head_dim=16, sliding_window=8)


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
            current_mode().waits.append("cpu")
        return self.detach().values_on_cpu.clone()

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):  # torch.save, in checkpoints
        return self.cpu().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return self.detach().clone().requires_grad_(self.requires_grad)


NO_KERNELS = "detach", "empty", "new_empty", "_unsafe_view", "_record_function"


class Operators(TorchDispatchMode):
    """Counts operators that would be kernels, and the waits of the host for the device."""

    def __init__(self):
        super().__init__()
        self.kernels, self.waits = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def count(self, func, args, kwargs):
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(NO_KERNELS):
            self.kernels[name] += 1
        moved = name in ("_to_copy", "copy_") and not kwargs.get("non_blocking")
        devices = [t.device for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices += [torch.device(kwargs["device"])] if kwargs.get("device") else []
        if name in ("_local_scalar_dense", "nonzero") or (moved and len({*devices}) > 1):
            self.waits.append(name)


class PretendedCuda(Operators):
    """Runs operators of OnCuda on the CPU. RuntimeError where an operator mixes devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        self.count(func, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        here = any(isinstance(t, OnCuda) for t in tensors)
        copies = func.overloadpacket.__name__ in ("_to_copy", "copy_")
        if here and not copies and any(t.dim() and not isinstance(t, OnCuda) for t in tensors):
            raise RuntimeError(f"{func}: some tensors are on cuda:0 and some on the CPU")
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            here, kwargs["device"] = True, torch.device("cpu")
        out = func(*tree_map(values_of, args), **tree_map(values_of, kwargs))
        if func.overloadpacket.__name__ == "copy_":
            return args[0]
        if not here:
            return out
        out = tree_map(lambda t: OnCuda(t) if isinstance(t, torch.Tensor) else t, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if tensors else out


def values_of(x):
    return x.values_on_cpu if isinstance(x, OnCuda) else x


def current_mode():
    return torch.utils._python_dispatch._get_current_dispatch_mode()


@pytest.fixture
def cuda(monkeypatch):
    """The mode that counts, with a real GPU or without."""
    mode = Operators() if torch.cuda.is_available() else PretendedCuda()
    if not torch.cuda.is_available():
        autocast, future = torch.autocast, torch.__future__
        monkeypatch.setattr(torch, "autocast", lambda _, *a, **k: autocast("cpu", *a, **k))
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
        monkeypatch.setattr(future, "_overwrite_module_params_on_conversion", True)
    with mode:
        yield mode


# ---- Whole runs --------------------------------------------------------------------------------
def model_folder(folder: Path, family: str) -> str:
    """A model with random weights, as on the Hub."""
    tiny = Path(model_loaders.MODELS["tiny"])
    config = {**SHAPE, "model_type": family}
    config["vocab_size"] = json.loads((tiny / "config.json").read_text())["vocab_size"]
    if family == "gemma2":
        config.update(attn_logit_softcapping=5.0, final_logit_softcapping=3.0)
    lm = saeft.build_lm(config)
    weights = {name: torch.randn(p.shape) / p.shape[-1] ** 0.5 for name, p in lm.named_parameters()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(tiny / "tokenizer.json", folder)
    model_loaders.write_safetensors(folder / "model.safetensors", weights, {"format": "pt"})
    documents = [{"text": SOURCE[i : i + 500]} for i in range(0, 50_000, 500)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, documents)))
    return str(folder)


def run(folder: Path, *flags: str) -> dict:
    """A whole run on the device; its report."""
    sizes = "--device cuda --context 32 --tokens 6k --kl-tokens 2k --eval-tokens 500 --batch 256"
    sizes += " --d-sae 64 --kl-batch 4 --buffer 32 --log-every 2 --lr 1e-3 --dead-after 512"
    argv = [*sizes.split(), "--data", str(folder / "text.jsonl"), "--out", str(folder / "runs")]
    config = saeft.parse([*argv, *flags])
    return saeft.Run(config).run()[0]


@pytest.mark.parametrize(
    ("kind", "family", "dtype"),
    [
        ("topk", "gpt_neox", "float32"),
        ("relu", "gemma2", "bfloat16"),
        ("batchtopk", "gemma3_text", "float32"),
        ("batchtopk", "gpt_neox", "bfloat16"),
    ],
)
def test_whole_run_on_cuda(cuda, tmp_path, kind, family, dtype):
    model = model_folder(tmp_path / "lm", family)
    flags = "--model", model, "--sae", kind, "--k", "4", "--dtype", dtype
    report = run(tmp_path / "lm", *flags, "--method", "kl", "mse")
    on_cpu = run(
        tmp_path / "lm", *flags, "--method", "kl", "mse", "--device", "cpu", "--name", "cpu"
    )
    exact = 1e-3 if dtype == "float32" else 3e-2
    for name in ("ce_original", "ce_mse", "ce_final", "fvu_final"):
        assert report[name] == pytest.approx(on_cpu[name], rel=exact), name


def test_fine_tune_from_a_loaded_sae_on_cuda(cuda, tmp_path):
    model = model_folder(tmp_path / "lm", "gpt_neox")
    flags = "--model", model, "--k", "4"
    before = run(tmp_path / "lm", *flags, "--name", "before", "--method", "mse", "--kl-lr", "0")
    start = str(tmp_path / "lm" / "runs" / "before")
    loaded = run(tmp_path / "lm", *flags, "--name", "after", "--start", start)
    assert loaded["ce_mse"] == pytest.approx(before["ce_final"], rel=1e-4)
    assert loaded["ce_final"] != loaded["ce_mse"]


# ---- Steps: host waits, kernels, faults put in on purpose --------------------------------------
def model_on_cuda(family="gpt_neox"):
    lm = saeft.build_lm({**SHAPE, "model_type": family}).to_empty(device="cpu")
    for p in lm.parameters():
        p.data.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5)
    return lm.to("cuda:0").eval().requires_grad_(False)


def count_step(cuda, kind="topk", loss="mse", family="gpt_neox", n_steps=3) -> tuple[list, Counter]:
    """What made the host wait, and operators, in the last of `n_steps` steps of a phase."""
    lm = model_on_cuda(family)
    sae = SAE(32, 64, 4, kind).to("cuda:0")
    t = Trainee(sae.train(), lm, loss)
    config = Config(layer=1, batch=64, kl_batch=2, context=16, lr=1e-3, kl_lr=1e-3)
    x, tokens = torch.randn(64, 32).to("cuda:0"), torch.randint(4096, (2, 16))
    no_limit = torch.full((), torch.inf, device="cuda:0")
    phase = Phase("test", [t], n_steps + 1, no_limit, step=1)  # the first looks for dead latents
    phase.buffer = SimpleNamespace(next_batch=lambda n: x)

    def after_step(phase, figures):
        if phase.step == n_steps:
            cuda.waits.clear()
            cuda.kernels.clear()

    if loss == "mse":
        saeft.train_mse(phase, config, after_step)
    else:
        stream = SimpleNamespace(train=lambda start, n: tokens)
        saeft.finetune(phase, lm, stream, config, after_step)
    return list(cuda.waits), Counter(cuda.kernels)


@pytest.mark.parametrize("kind", ["topk", "relu", "batchtopk"])
@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "gemma3_text"])
def test_host_waits_for_the_tokens_alone(cuda, kind, family):
    if family == "gpt_neox":
        assert count_step(cuda, kind)[0] == []
    assert count_step(cuda, kind, "kl", family)[0] == ["_to_copy"]  # of the tokens


def test_steps_take_few_kernels(cuda):
    _, sae_step = count_step(cuda)
    _, kl_step = count_step(cuda, loss="kl")
    print(f"SAE step {sae_step.total()}, KL step of 3 blocks {kl_step.total()} operators")
    assert sae_step.total() <= 120, sae_step
    assert kl_step.total() <= 300, kl_step


def test_a_missing_device_is_found(cuda, monkeypatch):
    tables = saeft.Rope.tables
    monkeypatch.setattr(
        saeft.Rope, "tables", lambda self, length, device: tables(self, length, None)
    )
    with pytest.raises(RuntimeError, match="cuda:0"):
        count_step(cuda, loss="kl")


def test_a_counter_left_on_the_cpu_is_found(cuda, monkeypatch):
    def left_on_the_cpu(t):
        prepare(t)
        t.idle = torch.zeros(64, dtype=torch.long)

    prepare = Trainee.__post_init__
    monkeypatch.setattr(Trainee, "__post_init__", left_on_the_cpu)
    with pytest.raises(RuntimeError, match="cuda:0"):
        count_step(cuda)


def test_a_python_if_on_a_value_of_the_device_is_found(cuda, monkeypatch):
    def update_if_finite(t, lr):
        if t.parameters[0].grad.isfinite().all():
            update(t, lr)

    update = saeft.update
    monkeypatch.setattr(saeft, "update", update_if_finite)
    waits, _ = count_step(cuda)
    assert waits == ["_local_scalar_dense"]  # so the test of waits fails


# ---- Memory, and --compile ---------------------------------------------------------------------
class LiveBytes(TorchDispatchMode):
    """The peak of the bytes in tensors, of whatever device."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.note(t.untyped_storage())
        return out

    def note(self, storage):
        if storage._cdata not in self.alive or self.alive[storage._cdata][0].expired():
            self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self.alive = {key: row for key, row in self.alive.items() if not row[0].expired()}
            self.now = sum(size for _, size in self.alive.values())
            self.peak = max(self.peak, self.now)


def test_kl_step_at_the_shape_of_gemma_2_2b_fits_16_gib(monkeypatch):
    shape = {"model_type": "gemma2", "vocab_size": 256_000, "hidden_size": 2304}
    shape.update(num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4)
    shape.update(intermediate_size=9216, final_logit_softcapping=30.0, attn_logit_softcapping=50.0)
    config = Config(layer=12, kl_batch=2, context=1024, kl_lr=1e-4)
    monkeypatch.setattr(
        saeft, "slices", lambda n, W_U: [slice(i, i + 512) for i in range(0, n, 512)]
    )
    monkeypatch.setattr(saeft, "FAST", False)  # the device's path
    lm = saeft.build_lm(shape)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as memory:
        weights = {
            name: torch.empty(p.shape, dtype=torch.bfloat16) for name, p in lm.named_parameters()
        }
        lm.load_state_dict(weights, assign=True)
        lm.requires_grad_(False)
        sae = SAE(2304, 2**14, 80)
        sae.bfloat16 = True
        t = Trainee(sae.train(), lm)
        stream = SimpleNamespace(train=lambda start, n: torch.zeros(2, 1024, dtype=torch.long))
        phase = Phase("kl", [t], 2, torch.tensor(torch.inf))
        saeft.finetune(phase, lm, stream, config, lambda *_: None)
    print(f"peak of the KL step at Gemma-2-2B's shape: {memory.peak / 2**30:.2f} GiB")
    assert 5 * 2**30 < memory.peak < 16 * 2**30


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_parts_give_the_same(monkeypatch):
    lm = saeft.build_lm({**SHAPE, "model_type": "gemma2", "num_hidden_layers": 2})
    lm = lm.to_empty(device="cpu").requires_grad_(False)
    lm.logit_cap = 3.0
    for p in lm.parameters():
        p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5)
    resid, weight = torch.randn(2, 16, 32), torch.full((32,), 1 / 32)

    def values():
        x = resid.clone().requires_grad_()
        lasts = (lm.suffix(y, 0).flatten(0, 1) for y in (resid.roll(1), x))
        kl = saeft.SlicedKL.apply(lm, weight, *lasts)
        return kl.detach(), *torch.autograd.grad(kl.sum(), x)

    plain = values()
    compile_ = torch.compile  # the blocks without generating code: that takes a minute
    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend="aot_eager"))
    lm.compile_parts()
    lm.kl_and_gradient = compile_(saeft.kl_and_gradient)
    torch.testing.assert_close(values(), plain)
