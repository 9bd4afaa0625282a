"""Every hand-written part against an independent oracle; the algorithms on problems with known answers; errors.

    python -m pytest -q
"""
import argparse
import contextlib
import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torchvision.io import decode_image, write_jpeg, write_png
from torchvision.transforms import v2

import data
import evaluate
import hopfield
import lora
import mts
import til
import vit as substrate
from bayespcn import BayesPCN
from evaluate import literal_descent, literal_energy, start_of

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text()


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tiny():
    """The shipped substrate at 16 x 16 pixels: four patches, so that every test is quick."""
    return substrate.load("vit_tiny", image_size=16)


@pytest.fixture(scope="session")
def cifar(tmp_path_factory):
    return small_cifar(tmp_path_factory.mktemp("data"))


def small_cifar(data_dir):
    """A small CIFAR-100 in its own on-disk format: 100 classes of a colour each, 6 train and 2 test images a class."""
    folder = data_dir / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    colours = rng.integers(30, 226, (100, 3, 1))
    for half, n in (("train", 6), ("test", 2)):
        labels = np.arange(100).repeat(n)
        pixels = (colours[labels] + rng.integers(-25, 26, (len(labels), 3, 1024))).astype(np.uint8).reshape(-1, 3072)
        content = {"data": pixels, "fine_labels": labels.tolist(), "filenames": ["x"] * len(labels)}
        (folder / half).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"colour {i}" for i in range(100)]}, protocol=2))
    return folder.parent


def command(main, *words):
    """Calls a script's main with a command line: (exit code, standard output, standard error)."""
    argv, sys.argv, code, out, err = sys.argv, ["script.py", *map(str, words)], 0, io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            data.run_command(main)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


# ---- vit.py --------------------------------------------------------------------------------------------------------------

def test_vit_b_16_equals_torchvision(tmp_path):
    theirs = torchvision.models.vit_b_16(weights=None).eval()
    for i, weight in enumerate(theirs.parameters()):
        weight.data += 0.02 * randn(*weight.shape, seed=i)              # no bias at its zero, no class token either
    torch.save(theirs.state_dict(), tmp_path / "vit_b_16.pth")
    ours = substrate.load("vit_b_16", tmp_path / "vit_b_16.pth")
    theirs.heads = nn.Identity()
    images = randn(2, 3, 224, 224)
    with torch.no_grad():
        assert (ours(images) - theirs(images)).abs().max() <= 1e-5


def dinov2_state(width=384, depth=12):
    """Random weights in the layout of DINOv2's published file, LayerScale included."""
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1370, width), "mask_token": (1, width),
              "patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,),
              "norm.weight": (width,), "norm.bias": (width,)}
    for i in range(depth):
        block = {"norm1.weight": (width,), "norm1.bias": (width,), "norm2.weight": (width,), "norm2.bias": (width,),
                 "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width),
                 "attn.proj.bias": (width,), "ls1.gamma": (width,), "ls2.gamma": (width,), "mlp.fc1.weight": (4 * width, width),
                 "mlp.fc1.bias": (4 * width,), "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return {name: 0.05 * randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def test_dinov2_equals_the_written_out_forward(tmp_path):
    s = dinov2_state()
    torch.save(s, tmp_path / "dinov2.pth")
    ours = substrate.load("dinov2_vits14", tmp_path / "dinov2.pth", image_size=56)
    images = randn(2, 3, 56, 56)
    # From DINOv2's definition: fused qkv, six heads of 64, LayerScale, 37 x 37 positions resized to 4 x 4.
    grid = s["pos_embed"][:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=4.1 / 37, mode="bicubic", antialias=False).permute(0, 2, 3, 1).reshape(1, 16, 384)
    x = F.conv2d(images, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=14).reshape(2, 384, 16).mT
    x = torch.cat([(s["cls_token"] + s["pos_embed"][:, :1]).expand(2, 1, 384), x + grid], 1)

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]

    for i in range(12):
        p = {key.removeprefix(f"blocks.{i}."): value for key, value in s.items() if key.startswith(f"blocks.{i}.")}
        q, k, v = (norm(x, f"blocks.{i}.norm1") @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).reshape(2, 17, 3, 6, 64).permute(2, 0, 3, 1, 4)
        y = (torch.softmax(q @ k.mT / 8, -1) @ v).transpose(1, 2).reshape(2, 17, 384)
        x = x + p["ls1.gamma"] * (y @ p["attn.proj.weight"].T + p["attn.proj.bias"])
        y = norm(x, f"blocks.{i}.norm2") @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
        y = y * (1 + torch.erf(y / 2 ** 0.5)) / 2
        x = x + p["ls2.gamma"] * (y @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"])
    with torch.no_grad():
        assert torch.allclose(ours(images), norm(x, "norm")[:, 0], atol=1e-4)


def test_attention_is_softmax_qk_v():
    attention, x = substrate.Attention(12, 3), randn(2, 5, 12)
    q, k, v = (layer(x).reshape(2, 5, 3, 4).transpose(1, 2) for layer in (attention.query, attention.key, attention.value))
    y = torch.softmax(q @ k.mT / 4 ** 0.5, -1) @ v
    assert torch.allclose(attention(x), attention.proj(y.transpose(1, 2).reshape(2, 5, 12)), atol=1e-6)


def test_block_equals_pytorchs_encoder_layer():
    ours = substrate.Block(12, 3, layer_scale=False)
    theirs = nn.TransformerEncoderLayer(12, 3, 48, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True)
    a = ours.attn
    theirs.self_attn.load_state_dict({
        "in_proj_weight": torch.cat([a.query.weight, a.key.weight, a.value.weight]),
        "in_proj_bias": torch.cat([a.query.bias, a.key.bias, a.value.bias]),
        "out_proj.weight": a.proj.weight, "out_proj.bias": a.proj.bias})
    theirs.linear1, theirs.linear2, theirs.norm1, theirs.norm2 = ours.fc1, ours.fc2, ours.norm1, ours.norm2
    assert torch.allclose(ours(randn(2, 5, 12)), theirs(randn(2, 5, 12)), atol=1e-6)


def test_positions_of_the_native_grid_are_not_touched():
    positions = randn(1, 1 + 37 ** 2, 8)
    assert substrate.resize_positions(positions, 37) is positions
    assert torch.equal(substrate.resize_positions(positions, 16)[:, :1], positions[:, :1])


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, monkeypatch):
    state = torch.load(HERE / "weights" / "vit_tiny.pt", weights_only=True)
    path = tmp_path / "w.pt"
    for change, words in (({"norm.bias": None}, "norm.bias"), ({"extra": torch.ones(1)}, "extra"),
                          ({"norm.bias": torch.ones(7)}, "norm.bias"), ({"pos_embed": torch.ones(1, 5, 3)}, "pos_embed"),
                          ({"pos_embed": torch.ones(1, 5, 0)}, "does not fit"), ({"attn.qkv.bias": torch.tensor(1.0)}, "does not fit"),
                          ({1: torch.ones(1)}, "not a whole file")):
        torch.save({key: value for key, value in (state | change).items() if value is not None}, path)
        with pytest.raises(ValueError, match=words):
            substrate.load("vit_tiny", path)
    whole = (HERE / "weights" / "vit_tiny.pt").read_bytes()
    for content in (whole[:100_000], b"", b"text", pickle.dumps(os.system), pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a whole file"):
            substrate.load("vit_tiny", path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))         # where downloads, and files put there by hand, are kept
    downloaded = tmp_path / "checkpoints" / "dinov2_vits14_pretrain.pth"
    downloaded.parent.mkdir()
    downloaded.write_bytes(whole[:200_000] + b"x" + whole[200_001:])
    with pytest.raises(ValueError, match=f"{downloaded} is not a whole file"):
        substrate.load("dinov2_vits14")
    with pytest.raises(FileNotFoundError, match="--weights"):
        substrate.load("vit_tiny", tmp_path / "none.pt")
    with pytest.raises(ValueError, match="vit_b_16"):
        substrate.load("resnet50")
    with pytest.raises(ValueError, match="positive multiple of the patch"):
        substrate.load("vit_tiny", image_size=60)


def test_what_pretraining_writes_can_be_loaded(tmp_path, monkeypatch):
    """python vit.py with everything but the training itself: random weights on a few random pictures."""
    torch.manual_seed(0)
    vit = substrate.ViT(substrate.CONFIGS["vit_tiny"])
    images = data.Images(torch.zeros(4, 3, 64, 64, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), ["x"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load", lambda name, data_dir: (images, images))
    monkeypatch.setattr(substrate, "pretrain", lambda *args: (vit, nn.Linear(192, 200)))
    code, out, err = command(substrate.main, "--out", tmp_path / "new.pt", "--device", "cpu", "--batch-size", 4)
    assert code == 0 and "top-1" in out and json.loads((tmp_path / "new.json").read_text())["epochs"] == 300, err
    loaded = substrate.load("vit_tiny", tmp_path / "new.pt").state_dict()
    assert all(torch.equal(loaded[name], value.half().float()) for name, value in vit.state_dict().items())
    code, out, err = command(substrate.main, "--out", tmp_path / "new.pt", "--device", "cpu", "--batch-size", 4)
    assert code == 2 and "new.pt exists" in err
    (tmp_path / "mine.json").write_text("mine")
    for name, said in (("mine.pt", "mine.json exists"), ("new.json", "must end in .pt")):
        code, out, err = command(substrate.main, "--out", tmp_path / name)
        assert code == 2 and said in err and (tmp_path / "mine.json").read_text() == "mine"
    for option, value in (("--epochs", 0), ("--batch-size", 0), ("--batch-size", 200_000), ("--lr", -1), ("--device", "tpu")):
        code, out, err = command(substrate.main, "--out", tmp_path / "other.pt", option, value)
        assert code == 2 and option in err and err.count("\n") == 1 and not (tmp_path / "other.pt").exists()


# ---- lora.py -------------------------------------------------------------------------------------------------------------

def random_theta(vit, seed=0):
    return 0.1 * randn(len(lora.get(vit)), seed=seed)


def test_lora_with_B_zero_changes_nothing(tiny):
    images = randn(3, 3, 16, 16)
    before = tiny(images)
    lora.add(tiny, generator=data.generator(0, 1))
    assert torch.equal(tiny(images), before)
    assert lora.get(tiny).any()


def test_theta_is_A_then_B_of_query_then_value_block_by_block(tiny):
    lora.add(tiny, rank=2, alpha=6)
    lora.set(tiny, torch.arange(6 * 2 * 2 * 2 * 192).float())           # L * 2 * 2 * r * d
    block, x = tiny.blocks[1].attn, randn(1, 192)
    start = 1 * 2 * 2 * 2 * 192                                          # block 2 begins here
    for layer, at in ((block.query, start), (block.value, start + 2 * 2 * 192)):
        A = torch.arange(at, at + 2 * 192).float().reshape(2, 192)
        B = torch.arange(at + 2 * 192, at + 4 * 192).float().reshape(192, 2)
        assert torch.allclose(layer(x), layer.base(x) + 6 / 2 * x @ A.T @ B.T)
    assert isinstance(block.key, nn.Linear) and isinstance(block.proj, nn.Linear)


def test_theta_goes_in_and_out_exactly_and_the_substrate_stays(tiny):
    before = {key: value.clone() for key, value in tiny.state_dict().items()}
    lora.add(tiny)
    for i in range(1000):
        lora.set(tiny, random_theta(tiny, i) if i % 100 == 0 else torch.full((36_864,), float(i)))
    theta = random_theta(tiny, 7)
    lora.set(tiny, theta)
    assert torch.equal(lora.get(tiny), theta)
    lora.remove(tiny)
    assert all(torch.equal(before[key], value) for key, value in tiny.state_dict().items())
    assert list(before) == list(tiny.state_dict())


@pytest.mark.parametrize("alpha", [4, 8, 24])
def test_merged_equals_adapter(tiny, alpha):
    lora.add(tiny, rank=8, alpha=alpha)
    lora.set(tiny, random_theta(tiny))
    images = randn(3, 3, 16, 16)
    with torch.no_grad():
        adapted, key_weight = tiny(images), tiny.blocks[0].attn.key.weight.clone()
        lora.merge(tiny)
        assert not any(isinstance(module, lora.LoRALinear) for module in tiny.modules())
        assert torch.allclose(tiny(images), adapted, atol=1e-4)
        assert torch.equal(tiny.blocks[0].attn.key.weight, key_weight)


def test_only_lora_and_head_get_gradients(tiny):
    lora.add(tiny, generator=data.generator(0, 1))
    head = nn.Linear(192, 5)
    head(tiny(randn(2, 3, 16, 16))).sum().backward()
    trained = {id(weight) for weight in (*lora.parameters(tiny), *head.parameters())}
    for weight in (*tiny.parameters(), *head.parameters()):
        assert (weight.grad is not None) == (id(weight) in trained)


def test_lora_says_what_is_wrong(tiny):
    with pytest.raises(ValueError, match="call lora.add"):
        lora.get(tiny)
    with pytest.raises(ValueError, match="rank 0"):
        lora.add(tiny, rank=0)
    lora.add(tiny)
    with pytest.raises(ValueError, match="already"):
        lora.add(tiny)
    with pytest.raises(ValueError, match="36864"):
        lora.set(tiny, torch.zeros(5))


# ---- hopfield.py -----------------------------------------------------------------------------------------------------------

def filled(memory, n=6, n_key=30, n_value=50):
    keys, values = randn(n, n_key), randn(n, n_value, seed=1)
    for key, value in zip(keys, values):
        memory.write(key, value)
    return keys, values


def test_hopfield_equals_scaled_dot_product_attention():
    memory = hopfield.Hopfield(beta=0.05)
    keys, values = filled(memory)
    cues = keys + 0.1 * randn(*keys.shape, seed=2)
    expected = F.scaled_dot_product_attention(cues[None], keys[None], values[None], scale=0.05)[0]
    assert torch.allclose(memory.read(cues)[:, 30:], expected, atol=1e-5)
    assert torch.equal(memory.read(cues)[:, :30], cues)
    assert torch.equal(memory.read(cues[2]), memory.read(cues)[2])
    assert memory.attention(cues).shape == (6, 6) and memory.attention(cues[0]).shape == (6,)


def test_hopfield_between_the_mean_and_the_item():
    memory = hopfield.Hopfield(beta=0.0)
    keys, values = filled(memory)
    assert torch.allclose(memory.read(keys[3])[30:], values.mean(0), atol=1e-6)
    memory.beta = 25.0
    assert torch.equal(memory.read(keys[3]), torch.cat([keys[3], values[3]]))
    assert torch.equal(memory.read(keys), torch.cat([keys, values], 1))


def test_hopfield_state_bytes_and_errors(tmp_path):
    memory, again = hopfield.Hopfield(beta=0.3), hopfield.Hopfield()
    with pytest.raises(ValueError, match="empty"):
        memory.read(torch.ones(30))
    keys, values = filled(memory)
    assert memory.nbytes == 4 * 6 * 80
    data.save_tensors(tmp_path / "m.pt", memory.state_dict())
    again.load_state_dict(data.load_tensors(tmp_path / "m.pt"))
    assert torch.equal(again.K, memory.K) and torch.equal(again.V, memory.V) and again.beta == 25      # of the reader, not of the file
    for key, value, words in ((torch.ones(29), values[0], "key has 29"), (keys[0], torch.ones(51), "value has 51"),
                              (keys[0] * torch.nan, values[0], "finite"), (keys[0], values[0].long(), "floating")):
        with pytest.raises(ValueError, match=words):
            memory.write(key, value)
    with pytest.raises(ValueError, match="key has 7"):
        memory.read(torch.ones(7))
    for key in (keys[0] * torch.nan, keys[0].long()):
        with pytest.raises(ValueError, match="finite floating point"):
            memory.read(key)
    for state in ({"K": keys.T, "V": None}, {"K": keys.T, "V": values}):
        with pytest.raises(ValueError, match="K and V"):
            again.load_state_dict(state)
    with pytest.raises(ValueError, match="beta"):
        hopfield.Hopfield(beta=float("nan"))
    assert memory.K.shape == (30, 6) and memory.V.shape == (50, 6)


# ---- bayespcn.py -----------------------------------------------------------------------------------------------------------

def vectors(n, dim, seed=0):
    return 0.1 * randn(n, dim, seed=seed).double()


def stored(n=6, dim=60, n_key=20, **options):
    """A BayesPCN with n vectors written, and the vectors (n, dim)."""
    memory, thetas = BayesPCN(dim, **{"hidden": 32, "seed": 1, **options}), vectors(n, dim)
    for theta in thetas:
        memory.write(theta[:n_key], theta[n_key:])
    return memory, thetas


def activations(n, dim, hidden, layers):
    return [10 * vectors(n, width, seed=5 + l) for l, width in enumerate([dim] + [hidden] * (layers - 1))]


def state_of(memory):
    """All tensors of a memory's state in one list."""
    return [*memory.R, *memory.U, memory.r, torch.tensor(memory.u)]


def equal(a, b):
    return all(map(torch.equal, a, b))


def test_bayespcn_equals_yoo_and_woods_figures():
    """results/bayespcn_reference.npz: figures of their own implementation, in float64."""
    reference = {name: torch.from_numpy(x) for name, x in np.load(HERE / "results" / "bayespcn_reference.npz").items()}
    dim, hidden, layers = reference["meta"].tolist()[1:4]

    def assert_posterior(stage):
        names = [f"{stage}_{x}{l}" for x in "RU" for l in range(layers - 1)]
        for ours, name in zip([*memory.R, *memory.U, memory.r], [*names, f"{stage}_R{layers - 1}"]):
            torch.testing.assert_close(ours, reference[name], rtol=1e-9, atol=1e-11)
        assert memory.u == pytest.approx(reference[f"{stage}_U{layers - 1}"][0, 0].item(), rel=1e-9)

    memory = BayesPCN(dim, hidden, layers)
    memory.R = [reference[f"prior_R{l}"] for l in range(layers - 1)]
    memory.U = [reference[f"prior_U{l}"] for l in range(layers - 1)]
    memory.r, memory.u = reference[f"prior_R{layers - 1}"], reference[f"prior_U{layers - 1}"][0, 0].item()
    rows = [reference[f"act{l}"] for l in range(layers)]
    torch.testing.assert_close(memory.log_joint(rows), reference["logp_prior"], rtol=1e-9, atol=0)
    memory.condition(rows)
    assert_posterior("post")
    torch.testing.assert_close(memory.log_joint(rows), reference["logp_post"], rtol=1e-9, atol=0)
    memory.forget(0.3)
    assert_posterior("forget")


@pytest.mark.parametrize("layers", [2, 4])
def test_writing_is_batch_bayesian_regression_in_any_order(layers):
    memory, reverse, rows = BayesPCN(40, 16, layers), BayesPCN(40, 16, layers), activations(7, 40, 16, layers)
    prior = [R.numpy().copy() for R in memory.R] + [memory.r.numpy()]
    memory.condition(rows)
    for l in range(layers - 1):
        Z, Y = F.gelu(rows[l + 1]).numpy(), rows[l].numpy()
        U = np.linalg.inv(np.eye(16) + Z.T @ Z / 1e-4)
        R = U @ (prior[l] + Z.T @ Y / 1e-4)
        assert np.abs(memory.U[l].numpy() - U).max() < 1e-9
        assert np.abs(memory.R[l].numpy() - R).max() < 1e-9 * np.abs(R).max()
    u = 1 / (1 + 7 / 1e-4)
    assert memory.u == pytest.approx(u, rel=1e-9)
    assert np.abs(memory.r.numpy() - u * (prior[-1] + rows[-1].numpy().sum(0) / 1e-4)).max() < 1e-9
    reverse.condition([x.flip(0) for x in rows])
    for a, b in zip(state_of(memory), state_of(reverse)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_forgetting_nothing_and_everything():
    memory = BayesPCN(40, 16)
    prior = [x.clone() for x in state_of(memory)]
    memory.condition(activations(3, 40, 16, 4))
    posterior = [x.clone() for x in state_of(memory)]
    memory.forget(0)
    assert equal(state_of(memory), posterior) and not equal(posterior, prior)
    memory.forget(1)
    assert equal(state_of(memory), prior)


@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("width, m", [(60, 60), (20, 20), (20, 60)], ids=["write", "marginal", "joint"])
def test_gram_space_energy_and_gradient_are_the_literal_ones(layers, width, m):
    memory, thetas = stored(layers=layers)
    xs = [0.1 * x for x in activations(2, 60, 32, layers)[1:]]
    E, gradient = map(torch.from_numpy, memory._energy(torch.stack(xs).numpy(), *memory._bottom(thetas[:2, :width], m)))
    for i in range(2):
        x, x0 = [x[i].clone().requires_grad_() for x in xs], thetas[i, :width]
        if (width, m) == (20, 60):               # joint: the missing values sit on their prediction
            x0 = torch.cat([x0, F.gelu(x[0]) @ memory.R[0][:, 20:]])
        literal = literal_energy(memory, x0, x, m)
        literal.backward()
        assert E[i].item() == pytest.approx(literal.item(), rel=1e-8)
        for l in range(layers - 1):
            assert (gradient[l, i] - x[l].grad).norm() < 1e-8 * x[l].grad.norm()


@pytest.mark.parametrize("read, m", [("marginal", 20), ("joint", 60)])
def test_fast_write_and_read_are_the_literal_descent(read, m):
    (memory, thetas), (twin, _) = stored(5, read=read), stored(5, read=read)
    memory.steps = 60                            # enough to leave the start; rounding grows with the steps
    key, new = thetas[2, :20], vectors(1, 60, seed=9)[0]
    x = literal_descent(memory, lambda x: literal_energy(memory, key, x, m), start_of(memory, 4))
    literal = (F.gelu(x[0]) @ memory.R[0])[20:]
    assert (memory.read(key)[20:] - literal).norm() < 1e-6 * literal.norm()
    x = literal_descent(memory, lambda x: literal_energy(memory, new, x, 60), start_of(memory, 4 + 1 + 5))
    twin.condition([y[None] for y in (new, *x)])
    memory.write(new[:20], new[20:])
    for a, b in zip([*memory.R, *memory.U], [*twin.R, *twin.U]):
        assert (a - b).norm() < 1e-6 * b.norm()


def test_a_descent_on_tensors_is_the_one_on_arrays():
    """Tensors are what a GPU works on; numpy's arrays, what a CPU does."""
    memory, thetas = stored()
    bottom = memory._bottom(thetas[:3], 60)
    x, ones = randn(3, 3, 32).double() / 6, torch.ones(3).double()
    tensors = [torch.tensor(1.0).double(), x, 0 * x, 0 * x, ones * math.inf, ones]
    arrays, tensor_bottom = [np.float64(1), *(x.numpy() for x in tensors[1:])], [torch.as_tensor(x) for x in bottom]
    for _ in range(60):
        arrays, tensors = memory._adam(*arrays, *bottom), memory._adam(*tensors, *tensor_bottom)
    for array, tensor in zip(arrays, tensors):
        assert torch.is_tensor(tensor) and np.allclose(array, tensor.numpy(), rtol=1e-6, atol=1e-9)
    assert arrays[0] == 61 and not np.allclose(arrays[1], x, atol=0.01)


@on_a_gpu
def test_a_gpu_recalls_what_a_cpu_does():
    """Up to the memory's own error: where a descent stops depends on rounding."""
    thetas, memories = randn(8, 3000).mul(0.05), [BayesPCN(3000, 64, device=device) for device in ("cpu", "cuda")]
    recalled = []
    for memory in memories:
        for theta in thetas:
            memory.write(theta[:300], theta[300:])
        recalled.append(memory.read(thetas[:, :300]))
    assert (recalled[0] - recalled[1]).norm() < 0.03 * thetas.norm() and memories[1].R[0].is_cuda
    assert (recalled[1] - thetas).norm() < 1.1 * (recalled[0] - thetas).norm() < 0.1 * thetas.norm()
    memories[0].load_state_dict(memories[1].state_dict())
    assert (memories[0].read(thetas[:, :300]) - recalled[1]).norm() < 0.03 * thetas.norm()


def test_joint_is_where_moving_the_missing_values_leads():
    """Yoo & Wood let Adam move the missing values too; eliminating them is the end of that road."""
    memory, thetas = stored(5, read="joint")
    key = thetas[2, :20]
    *_, missing = literal_descent(memory, lambda x: literal_energy(memory, torch.cat([key, x[-1]]), x[:-1], 60),
                                  [*start_of(memory, 4), torch.zeros(40, dtype=torch.float64)])
    assert (missing - memory.read(key)[20:]).norm() < 0.1 * missing.norm()


def test_bayespcn_recalls_and_joint_recalls_too_faintly():
    memory, thetas = stored(12, 400, 40, hidden=64)
    keys, values = thetas[:, :40], thetas[:, 40:]
    before = [x.clone() for x in state_of(memory)]
    together = memory.read(keys)
    assert torch.equal(together[:, :40], keys) and memory.read(keys.float()).dtype == torch.float32
    assert ((together[:, 40:] - values).norm(dim=1) / values.norm(dim=1)).max() < 0.17
    for theta_hat, key in zip(together, keys):
        assert (memory.read(key) - theta_hat).norm() < 1e-5 * theta_hat.norm()
    memory.read_mode = "joint"
    faint = memory.read(keys)[:, 40:]
    assert torch.cosine_similarity(faint, values).min() > 0.95
    assert (faint.norm(dim=1) < 0.97 * values.norm(dim=1)).all()
    assert equal(state_of(memory), before)


def test_bayespcn_state_round_trip_and_reproducibility(tmp_path):
    (memory, thetas), again = stored(), BayesPCN(60, hidden=32, seed=1)
    data.save_tensors(tmp_path / "m.pt", memory.state_dict())
    again.load_state_dict(data.load_tensors(tmp_path / "m.pt"))
    for m in (memory, again):                    # and both go on alike
        m.write(thetas[0, :20] + 0.1, thetas[0, 20:])
        m.forget(0.2)
    assert equal(state_of(memory), state_of(again)) and torch.equal(memory.read(thetas[:, :20]), again.read(thetas[:, :20]))
    assert equal(state_of(stored()[0]), state_of(stored()[0])) and not equal(state_of(stored()[0]), state_of(stored(seed=2)[0]))
    with pytest.raises(ValueError, match="seed"):
        BayesPCN(60, hidden=32, seed=2).load_state_dict(memory.state_dict())


def test_bayespcn_says_what_is_wrong_and_stays_as_it_is():
    memory, thetas = stored(2)
    key, value, before = thetas[0, :20], thetas[0, 20:], [x.clone() for x in state_of(memory)]
    for call, words in (
            (lambda: memory.write(key, value[:-1]), "value"), (lambda: memory.write(key, value * torch.nan), "NaN"),
            (lambda: memory.write(key / 0, value), "NaN"), (lambda: memory.write(key, value.long()), "int64"),
            (lambda: memory.read(torch.zeros(61)), "61"), (lambda: memory.read(key * torch.inf), "NaN"),
            (lambda: memory.read(torch.zeros(0)), "0 elements"), (lambda: memory.forget(1.1), "strength"),
            (lambda: memory.forget(float("nan")), "strength"), (lambda: BayesPCN(60).read(key), "empty"),
            (lambda: memory.condition(activations(2, 60, 31, 4)), "x1"), (lambda: BayesPCN(60, layers=1), "layers"),
            (lambda: BayesPCN(60, read="both"), "both"), (lambda: BayesPCN(60, sigma_obs=-1.0), "sigma_obs")):
        with pytest.raises(ValueError, match=words):
            call()
        assert equal(state_of(memory), before)


# ---- data.py ---------------------------------------------------------------------------------------------------------------

def test_split_is_a_shuffled_partition():
    for seed in (0, 1):
        tasks = data.split(100, 20, seed)
        assert [len(task) for task in tasks] == [5] * 20 and sorted(sum(tasks, [])) == list(range(100))
        assert sum(tasks, []) != list(range(100))
    assert data.split(100, 20, 0) != data.split(100, 20, 1)
    for splits in (0, 3, -5, 101):
        with pytest.raises(ValueError, match="do not divide"):
            data.split(100, splits, 0)


def test_task_relabels_within_its_classes():
    half = data.Images(torch.arange(8, dtype=torch.uint8).reshape(8, 1, 1, 1), torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]), list("abcd"))
    images, labels = data.task(half, [3, 1])
    assert images.flatten().tolist() == [1, 3, 4, 6] and labels.tolist() == [1, 0, 0, 1]


def test_prepare_equals_torchvision_transforms(tiny):
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Resize((16, 16), v2.InterpolationMode.BICUBIC, antialias=True),
                            v2.Lambda(lambda x: x.clamp(0, 1)), v2.Normalize(tiny.config.mean, tiny.config.std)])
    expected = torch.stack([reference(images[0]), reference(images[1].flip(-1))])
    assert torch.allclose(data.prepare(images, tiny, torch.tensor([False, True])), expected, atol=1e-5)


def test_a_crop_is_a_part_of_the_enlarged_picture(tiny):
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crop = torch.tensor([[0.5, 0, 0], [0.5, 0.25, -0.25]])                   # side, centre x, y: pixels 4 to 12, and 6 to 14, 2 to 10
    twice = F.interpolate(images / 255, 32, mode="bicubic", align_corners=False).clamp(0, 1)
    expected = torch.stack([twice[0, :, 8:24, 8:24], twice[1, :, 4:20, 12:28]])
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (tiny.config.mean, tiny.config.std))
    assert torch.allclose(data.prepare(images, tiny, None, crop) * std + mean, expected, atol=1e-5)
    large = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = torch.tensor([[1.0, 0, 0]]).expand(2, 3)                         # as smooth as what is tested
    assert torch.allclose(data.prepare(large, tiny, None, whole), data.prepare(large, tiny), atol=1e-5)
    flip, crop = data.flips_and_crops(1000, data.generator(0))
    side, reach = crop[:, 0], crop[:, 1:].abs().amax(1)
    assert 400 < flip.sum() < 600 and 0.35 <= side.min() ** 2 < 0.37 and 0.97 < side.max() <= 1 and (side + reach).max() <= 1


def test_a_class_with_one_image_cannot_be_held_out():
    train = data.Images(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 0, 1]), ["many", "one"])
    with pytest.raises(ValueError, match="'one' has no train image"):
        data.hold_out(train)


def test_held_out_images_are_a_tenth_of_every_class():
    images = torch.arange(60, dtype=torch.uint8).reshape(60, 1, 1, 1)
    train, test = data.hold_out(data.Images(images, torch.arange(60) % 3, list("abc")))
    assert test.labels.bincount().tolist() == [2, 2, 2] and train.labels.bincount().tolist() == [18, 18, 18]
    assert sorted([*train.images.flatten().tolist(), *test.images.flatten().tolist()]) == list(range(60))
    assert torch.equal(test.images.flatten() % 3, test.labels)


def test_glyphs_are_reproducible_and_the_halves_differ():
    a, b, test = data.draw_class(7, 0, 3), data.draw_class(7, 0, 3), data.draw_class(7, 1, 3)
    assert a.shape == (3, 3, 64, 64) and a.dtype == np.uint8
    assert (a == b).all() and (a != test).any() and (a[0] != a[1]).any()


def test_coverage_is_the_distance_to_a_segment():
    x, y = np.array([[0.0, 1.0, 2.5, 0.5]]), np.array([[0.0, 0.3, 0.0, -0.2]])       # segment (0, 0) - (2, 0)
    segment = np.array([[[0.0, 0.0], [2.0, 0.0]]])
    distance = np.array([0.0, 0.3, 0.5, 0.2])
    assert np.allclose(data.coverage(x, y, [segment], np.array([[0.2]])), ((0.2 - distance) / 0.03 + 0.5).clip(0, 1), atol=1e-6)


def test_cifar100_in_its_own_format(cifar):
    train, test = data.load("cifar100", cifar)
    raw = pickle.loads((cifar / "cifar-100-python" / "train").read_bytes())
    assert train.images.shape == (600, 3, 32, 32) and train.images.dtype == torch.uint8 and len(test.labels) == 200
    assert (train.images[17].numpy() == raw["data"][17].reshape(3, 32, 32)).all()
    assert train.labels.tolist() == raw["fine_labels"] and train.classes[5] == "colour 5"


class Hostile:
    """Whoever unpickles it makes the folder `executed`."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "executed"),)


def test_cifar100_runs_no_code_and_names_a_broken_file(cifar, tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes((cifar / "cifar-100-python" / name).read_bytes())

    whole = (folder / "train").read_bytes()
    for content in (pickle.dumps(Hostile(tmp_path)), whole[:5000], b"", pickle.dumps({"data": np.zeros((2, 5)), "fine_labels": [0, 1]})):
        (folder / "train").write_bytes(content)
        with pytest.raises(ValueError, match="train"):
            data.load("cifar100", tmp_path)
    assert not (tmp_path / "executed").exists()
    (folder / "train").unlink()
    with pytest.raises(FileNotFoundError, match="train is missing"):
        data.load("cifar100", tmp_path)


def pack(path, members):
    """A tar.gz or zip file of these members: (name, None) for a small file, (name, target) for a symbolic link. Returns its md5."""
    with tarfile.open(path, "w:gz") if path.suffix == ".gz" else zipfile.ZipFile(path, "w") as archive:
        for name, target in members:
            if path.suffix == ".gz":
                member = tarfile.TarInfo(name)
                member.type, member.linkname, member.size = (tarfile.SYMTYPE, target, 0) if target else (tarfile.REGTYPE, "", 4)
                archive.addfile(member, io.BytesIO(b"text"))
            else:
                member = zipfile.ZipInfo(name)
                member.external_attr = (0o120777 if target else 0o100644) << 16
                archive.writestr(member, target or "text")
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ("tar.gz", "zip"))
def test_an_archive_writes_nothing_outside_its_folder(tmp_path, kind):
    outside, data_dir = tmp_path / "outside", tmp_path / "data"
    outside.mkdir()
    data_dir.mkdir()
    path, url = data_dir / f"set.{kind}", (tmp_path / "nowhere" / f"set.{kind}").as_uri()
    for members in ([("../../outside/evil", None)], [(f"{outside}/evil", None)], [("../evil", None)],
                    [("set/link", str(outside)), ("set/link/evil", None)], [("set/up", "../../../outside"), ("set/up/evil", None)]):
        md5 = pack(path, [("set/good", None), *members])
        with pytest.raises(FileNotFoundError, match="cannot fetch"):                     # another archive than the published one
            data.fetch(url, "0" * 32, data_dir / "set")
        assert [*data_dir.iterdir()] == [path]
        with contextlib.suppress(FileNotFoundError):                                     # as if md5 had been forged
            data.fetch(url, md5, data_dir / "set")
        assert [*outside.iterdir()] == [] and not (data_dir / "evil").exists() and {*data_dir.iterdir()} <= {path, data_dir / "set"}
        shutil.rmtree(data_dir / "set", ignore_errors=True)
    data.fetch(url, pack(path, [("set/good", None)]), data_dir / "set")
    assert (data_dir / "set" / "good").read_text() == "text"


def test_a_data_set_is_fetched_once_for_all_who_want_it(tmp_path, monkeypatch):
    """Threads stand for processes: each opens the lock for itself."""
    calls = []

    def slow(*args):
        calls.append(args)
        time.sleep(0.1)
        small_cifar(tmp_path)

    monkeypatch.setattr(data, "fetch", slow)
    (tmp_path / ".killed.part").touch()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: data.load("cifar100", tmp_path), range(4)))
    assert len(calls) == 1 and not (tmp_path / ".killed.part").exists()


@pytest.fixture
def tiny_imagenet(tmp_path):
    return small_tiny_imagenet(tmp_path)


def small_tiny_imagenet(data_dir):
    """Three classes in the official layout, 4 train and 2 val pictures each; one train picture is grey."""
    folder = data_dir / "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]
    for c, wnid in enumerate(wnids):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for i in range(4):
            channels = 1 if (c, i) == (1, 2) else 3
            write_jpeg(torch.full((channels, 64, 64), 60 * c + i, dtype=torch.uint8), str(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"))
    (folder / "val" / "images").mkdir(parents=True)
    rows = []
    for i, c in enumerate([2, 0, 1, 1, 2, 0]):
        write_jpeg(torch.full((3, 64, 64), 60 * c + 9, dtype=torch.uint8), str(folder / "val" / "images" / f"val_{i}.JPEG"))
        rows.append(f"val_{i}.JPEG\t{wnids[c]}\t0\t0\t9\t9")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(rows))
    (folder / "wnids.txt").write_text("\n".join(wnids))
    (folder / "words.txt").write_text("n01\tcat, felis\nn02\tdog\nn03\tfish\n")
    return folder


def test_tinyimagenet_reads_the_official_layout(tiny_imagenet):
    content = data.decode_tiny_imagenet(tiny_imagenet, 3, 4, 2)
    assert content["classes"] == ["fish", "cat", "dog"]
    assert content["train_images"].shape == (12, 3, 64, 64) and content["train_labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for half in ("train", "val"):                                        # every picture's shade tells its class
        shades = content[f"{half}_images"].float().mean((1, 2, 3)) / 60
        assert shades.floor().tolist() == content[f"{half}_labels"].tolist()


def test_tinyimagenet_names_what_is_broken(tiny_imagenet):
    with pytest.raises(ValueError, match="expected 500 images in each of 200"):
        data.decode_tiny_imagenet(tiny_imagenet)
    broken = tiny_imagenet / "train" / "n01" / "images" / "n01_1.JPEG"
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(ValueError, match="n01_1.JPEG"):
        data.decode_tiny_imagenet(tiny_imagenet, 3, 4, 2)
    annotations = tiny_imagenet / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text().replace("val_1.", "val_0."))          # one bit; the counts are still right
    with pytest.raises(ValueError, match="do not fit together"):
        data.decode_tiny_imagenet(tiny_imagenet, 3, 4, 2)
    annotations.unlink()
    with pytest.raises(FileNotFoundError, match="val_annotations.txt is missing"):
        data.decode_tiny_imagenet(tiny_imagenet, 3, 4, 2)
    data.save_tensors(tiny_imagenet.parent / "tiny-imagenet-200.pt", {"theta": torch.zeros(3)})
    with pytest.raises(ValueError, match="tiny-imagenet-200.pt does not hold TinyImageNet"):
        data.load("tinyimagenet", tiny_imagenet.parent)


def test_a_folder_of_ones_own(tmp_path):
    for half, n in (("train", 10), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / half / name).mkdir(parents=True)
            for i in range(n):
                write_png(torch.full((3, 20 + i, 30), 100 * label + i, dtype=torch.uint8), str(tmp_path / half / name / f"{i}.png"))
    train, test = data.load("folder", tmp_path)
    assert train.images.shape == (20, 3, 224, 224) and train.classes == ["cat", "dog"] and test.labels.tolist() == [0, 0, 1, 1]
    assert train.images[:, 0, 5, 5].tolist() == [100 * label + i for label in range(2) for i in range(10)]
    (tmp_path / "test" / "cow").mkdir()
    with pytest.raises(ValueError, match="cow"):
        data.load("folder", tmp_path)
    shutil.rmtree(tmp_path / "test")
    train, test = data.load("folder", tmp_path)                          # pictures 0 and 5 of each class
    assert test.images[:, 0, 5, 5].tolist() == [0, 5, 100, 105] and len(train.labels) == 16
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="'empty' has no train image"):
        data.load("folder", tmp_path)
    with pytest.raises(FileNotFoundError, match="train/<class>/<picture>"):
        data.load("folder", tmp_path / "train")


def test_pictures_of_any_size_and_mode(tmp_path):
    picture = torch.randint(0, 256, (3, 30, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "p.png"
    for channels in (picture, picture[:1]):
        write_png(channels, str(path))
        assert data.read_picture(path).shape == (3, 30, 50) and data.square(data.read_picture(path)).shape == (3, 30, 30)
    write_png(picture, str(path))
    assert torch.equal(data.read_picture(path), picture)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="it is no file"):
        data.read_picture(tmp_path / "pipe.png")
    for content in (b"", b"no picture", path.read_bytes()[:60]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="p.png cannot be read"):
            data.read_picture(path)
    deep = bytearray(png(4, 2, bytes(20)))
    deep[24] = 16                                # bits a channel
    path.write_bytes(deep)
    with pytest.raises(ValueError, match="16 bits a channel"):
        data.read_picture(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_torchvision_turns_them(tmp_path, orientation):
    path = tmp_path / "p.jpg"
    write_jpeg(torch.arange(8 * 16 * 3, dtype=torch.uint8).view(3, 8, 16), str(path))
    exif = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + content[2:])
    theirs = decode_image(str(path), apply_exif_orientation=True)
    assert theirs.shape == ((3, 16, 8) if orientation > 4 else (3, 8, 16)) and torch.equal(data.read_picture(path), theirs)


def test_a_file_whose_content_was_changed_is_refused(tmp_path):
    content, path = {"a": randn(3), "b": [1, "x", {"c": torch.tensor(True)}], "n": 2.5}, tmp_path / "a.pt"
    data.save_tensors(path, content)
    assert torch.equal(data.load_tensors(path)["a"], content["a"]) and data.load_tensors(path)["b"] == content["b"]
    stored = torch.load(path, weights_only=True)
    for change in ({"a": -randn(3)}, {"n": 2.6}, {"b": [1, "y", {"c": torch.tensor(True)}]}, {"more": 1}, {"checksum": "0"}):
        torch.save(stored | change, path)
        with pytest.raises(ValueError, match="a.pt is damaged"):
            data.load_tensors(path)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate")])
def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch, error):
    """Or its owner would remove it."""
    def fails(*args, **options):
        raise error
    data.save_tensors(tmp_path / "a.pt", {"a": randn(3)})
    monkeypatch.setattr(torch, "load", fails)
    for read in (data.load_tensors, lambda path: substrate.load("vit_tiny", path)):
        code, out, err = command(lambda: read(tmp_path / "a.pt"))
        assert code == 2 and err.count("\n") == 1 and "remove" not in err and ("out of memory" in err) == (not isinstance(error, OSError))


def test_tensor_files_run_no_code(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"cls_token": Hostile(tmp_path)}, path)
    for read in (data.load_tensors, lambda path: data.load_tensors(path, mmap=True), lambda path: substrate.load("vit_tiny", path)):
        with pytest.raises(ValueError, match="a.pt"):
            read(path)
    assert not (tmp_path / "executed").exists()
    torch.load(path, weights_only=False)                                 # which does run it
    assert (tmp_path / "executed").exists()


def test_files_appear_whole_or_not_at_all(tmp_path):
    def dies(scratch):
        scratch.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        data.atomically(tmp_path / "file", dies)
    assert list(tmp_path.iterdir()) == []

    def meets_another(scratch):
        scratch.write_text("ours")
        data.atomically(tmp_path / "file", lambda theirs: theirs.write_text("theirs"))
    data.atomically(tmp_path / "file", meets_another)                    # each wrote a scratch file of its own; the last one stays
    assert (tmp_path / "file").read_text() == "ours"
    data.save_json(tmp_path / "a.json", {"x": [1, 2], "y": None})
    assert data.load_json(tmp_path / "a.json") == {"x": [1, 2], "y": None}
    (tmp_path / "a.json").write_text('{"x": ')
    with pytest.raises(ValueError, match="a.json is damaged"):
        data.load_json(tmp_path / "a.json")


# ---- til.py ----------------------------------------------------------------------------------------------------------------

def test_algorithm_1_stores_what_was_learned_from_each_task_alone():
    images = torch.arange(12, dtype=torch.uint8).reshape(12, 1, 1, 1)
    train = data.Images(images, torch.arange(12) % 6, list("abcdef"))
    seen, thetas = [], randn(3, 40)

    def learn(t, images, labels):
        seen.append((t, images.flatten().tolist(), labels.tolist()))
        return thetas[t - 1]

    memory, keys = til.til_training([[0, 1], [5, 2], [4, 3]], train, hopfield.Hopfield(), learn)
    assert seen == [(1, [0, 1, 6, 7], [0, 1, 0, 1]), (2, [2, 5, 8, 11], [1, 0, 1, 0]), (3, [3, 4, 9, 10], [1, 0, 1, 0])]
    assert torch.equal(torch.stack(keys), thetas[:, :4]) and torch.equal(memory.K.T, thetas[:, :4])
    assert torch.equal(memory.V.T, thetas[:, 4:])


def test_algorithm_2_classifies_with_the_recalled_theta(tiny):
    lora.add(tiny)
    memory, theta, head = til.Disk(), random_theta(tiny), nn.Linear(192, 4)
    key, value = lora.split_key(theta)
    assert len(key) == int(0.1 * 36_864)
    memory.write(key, value)
    images = torch.randint(0, 256, (70, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = til.til_inference(tiny, head, images, key, memory)
        lora.merge(tiny)                                                 # the recalled adapter, folded into the weights
        assert torch.allclose(logits, head(tiny(data.prepare(images, tiny))), atol=1e-4)


def test_an_answer_does_not_depend_on_its_companions(tiny):
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    together, alone, shuffled = til.features(tiny, images), til.features(tiny, images, 1), til.features(tiny, images[order], 64)
    assert torch.allclose(together, alone, atol=1e-5) and torch.allclose(together[order], shuffled, atol=1e-5)


def test_fit_is_adamw_with_cosine_decay():
    x, y = randn(20, 3), torch.randint(0, 2, (20,), generator=torch.Generator().manual_seed(0))
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    trainer = til.Trainer([*ours.parameters()], lambda x, flip: ours(x), data.flips)
    *_, (loss, accuracy) = trainer.fit(x, y, 4, 8, data.generator(3))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.005, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12, eta_min=0.0001)
    generator = data.generator(3)
    for epoch in range(4):
        order, losses, hits = torch.randperm(20, generator=generator), [], 0
        torch.rand(20, generator=generator)                              # the flips
        for batch in order.split(8):
            logits = theirs(x[batch])
            losses.append(F.cross_entropy(logits, y[batch], reduction="sum").item())
            hits += (logits.argmax(1) == y[batch]).sum().item()
            F.cross_entropy(logits, y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)
    assert loss == pytest.approx(sum(losses) / 20, abs=1e-5) and accuracy == pytest.approx(100 * hits / 20)


@on_a_gpu
def test_the_fast_step_of_a_gpu_gives_the_losses_of_the_plain_one():
    """50 steps, captured and in bfloat16, beside the same 50 in float32, launched one by one."""
    train, _ = data.glyphs(None)
    images, labels = (x.cuda() for x in data.task(train, range(5)))
    losses = {}
    for plain in (True, False):
        vit = substrate.load("vit_tiny").to("cuda", torch.float32 if plain else torch.bfloat16)
        lora.add(vit, 8)
        classifier = til.Classifier(vit, 5, plain=plain)
        classifier.init(data.generator(0))
        losses[plain] = [loss for loss, _ in classifier.trainer.fit(images, labels, 50, len(labels), data.generator(1), lr=0.002)]
    print("largest difference", max(abs(a - b) for a, b in zip(losses[True], losses[False])), "losses", losses[True][::10], losses[False][::10])
    assert losses[True][-1] < losses[True][0] / 5 and losses[True] == pytest.approx(losses[False], abs=0.05)


def test_operations_are_counted(tiny):
    """Linear layers need 2 d d_out operations for each token, and as much again for the gradient that goes on downwards."""
    lora.add(tiny, 1)
    forward = []
    for layer in tiny.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda layer, x, y: forward.append(2 * x[0].numel() * layer.out_features))
    flops = til.Classifier(tiny, 5).flops(torch.zeros(3, 16, 16, dtype=torch.uint8))
    assert 1.9 * sum(forward) < flops < 2.1 * sum(forward)
    assert til.mfu(989e12 / 4, "NVIDIA H100 80GB HBM3") == 0.25 and til.mfu(1e12, "2 CPU threads") is None


def test_two_processes_give_what_one_gives(cifar, tmp_path):
    """torchrun: adapters bit for bit, the task predictor, whose batches are shared, up to rounding; and the same figures."""
    words, predictor = (*CIFAR, "--data-dir", cifar, "--epochs", 1), ("--predictor-epochs", 1, "--predictor-batch-size", 32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                     # as torchrun does: sums are taken in another order with more
    a, b = (tmp_path / name / "cifar100-20s-vit_tiny-16px-r8-seed0" for name in ("one", "two"))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    for script, more in ((mts, predictor), (til, ())):
        assert command(script.main, *words, *more, "--out", a.parent)[0] == 0
        line = [sys.executable, *torchrun, script.__file__, *words, *more, "--out", b.parent]
        done = subprocess.run([*map(str, line)], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count("FAA_GT |") == 1, done.stderr
    for t in range(1, 21):
        ours, theirs = (data.load_tensors(run / "adapters" / f"{t}.pt") for run in (a, b))
        assert torch.equal(ours["theta"], theirs["theta"]) and torch.equal(ours["head"]["weight"], theirs["head"]["weight"])
    ours, theirs = (data.load_tensors(run / "predictor.pt") for run in (a, b))
    assert torch.allclose(ours["theta"], theirs["theta"], atol=1e-4) and (ours["processes"], theirs["processes"]) == (1, 2)
    assert (ours["loss"], ours["accuracy"]) == pytest.approx((theirs["loss"], theirs["accuracy"]), rel=1e-3)
    ours, theirs = (json.loads((run / "til-hopfield.json").read_text()) for run in (a, b))
    assert ours["per_task"] == theirs["per_task"] and theirs["processes"] == 2
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [*til.MEMORIES, "nearest"])
def test_every_memory_keeps_the_contract(name, tmp_path):
    """`nearest` is the example of the README."""
    example = {"torch": torch, "F": F}
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], example)
    new = til.MEMORIES.get(name, lambda dim, args: example["Nearest"]())
    args = argparse.Namespace(bpcn_read="marginal", device="cpu")
    memory, again, thetas = new(500, args), new(500, args), randn(4, 500)
    for theta in thetas:
        memory.write(*lora.split_key(theta))
    data.save_tensors(tmp_path / "m.pt", {"memory": memory.state_dict()})
    again.load_state_dict(data.load_tensors(tmp_path / "m.pt")["memory"])
    for theta in thetas:
        key, _ = lora.split_key(theta)
        assert (memory.read(key) - theta).norm() < 0.5 * theta.norm() and torch.equal(memory.read(key), again.read(key))
    assert memory.read(key).shape == (500,) and memory.nbytes == again.nbytes > 0


CIFAR = ("--dataset", "cifar100", "--splits", 20, "--backbone", "vit_tiny", "--image-size", 16, "--device", "cpu")


def test_the_main_job_on_a_small_cifar100(cifar, tmp_path):
    """Training, memory, evaluation, tables; then the same command continues instead of training again."""
    words = (*CIFAR, "--data-dir", cifar, "--out", tmp_path, "--seeds", 0, 1)
    code, out, err = command(til.main, *words, "--memory", "hopfield")
    assert code == 0 and "FAA_GT" in out and "97.12 ± 0.44" in out, err
    folder = tmp_path / "cifar100-20s-vit_tiny-16px-r8-seed0"
    result = json.loads((folder / "til-hopfield.json").read_text())
    assert result["drop"] == 0 and result["recall_error"] == {"mean": 0, "max": 0} and result["smallest_weight"] > 0.999
    assert set(result["controls"]) == {"none", "wrong", "mean", "linear"} and len(result["per_task"]["gt"]) == 20
    assert {"faa_gt", "faa", "images_per_second", "peak_memory_bytes", "wall_seconds", "device", "class_order"} <= set(result)
    assert (folder / "hopfield.pt").stat().st_size < 1.25 * result["memory_bytes"]                      # the memory, and the keys once more
    before = {path: path.stat().st_mtime_ns for path in folder.glob("adapters/*.pt")}
    code, out, err = command(til.main, *words, "--memory", "disk")
    assert code == 0 and "task " not in out
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("adapters/*.pt")} and len(before) == 20
    assert json.loads((folder / "til-disk.json").read_text())["faa"] == result["faa_gt"]
    assert command(til.main, *words[:-3], "--memory", "bayespcn")[0] == 0
    bayespcn = json.loads((folder / "til-bayespcn.json").read_text())
    assert 0 < bayespcn["recall_error"]["max"] < 0.3 and bayespcn["faa_gt"] == result["faa_gt"]
    code, out, err = command(evaluate.main, *tmp_path.iterdir())
    assert code == 0 and "| `disk --" in out and "| `bayespcn --" in out and out.count(" 0 1 |") == 2
    code, out, err = command(til.main, *words, "--rank", 8, "--epochs", 2)
    assert code == 2 and "epochs 3" in err and "epochs 2" in err
    picture = tmp_path / "p.png"
    write_png(data.load("cifar100", cifar)[1].images[0], str(picture))
    words = words[:-3]                                                   # one seed
    code, out, err = command(til.main, *words, "--predict", picture, "--task", 20)
    assert code == 0 and out.count("colour") == 5 and sum(float(line.split()[0]) for line in out.splitlines()) == pytest.approx(100, abs=0.05)
    for bad, said in (((picture, 21), "--task takes 1 to 20"), ((tmp_path / "none.png", 1), "none.png")):
        code, out, err = command(til.main, *words, "--predict", bad[0], "--task", bad[1])
        assert code == 2 and said in err and err.count("\n") == 1


def test_theta_depends_only_on_seed_and_t(cifar, tmp_path):
    """Bit for bit: a run that is cut after some tasks and continued, with another memory, equals an undisturbed one."""
    words = (*CIFAR, "--data-dir", cifar, "--epochs", 1)
    assert command(til.main, *words, "--out", tmp_path / "a")[0] == 0
    a, b = (tmp_path / name / "cifar100-20s-vit_tiny-16px-r8-seed0" for name in "ab")
    (b / "adapters").mkdir(parents=True)
    (b / "config.json").write_bytes((a / "config.json").read_bytes())
    for t in (2, 3, 9):                                                  # as if these alone had been finished
        (b / "adapters" / f"{t}.pt").write_bytes((a / "adapters" / f"{t}.pt").read_bytes())
    torch.rand(5)                                                        # the global generator must not matter
    assert command(til.main, *words, "--memory", "disk", "--out", tmp_path / "b")[0] == 0
    thetas = [[data.load_tensors(run / "adapters" / f"{t}.pt")["theta"] for t in range(1, 21)] for run in (a, b)]
    assert torch.equal(torch.stack(thetas[0]), torch.stack(thetas[1]))
    assert not torch.equal(thetas[0][0], thetas[0][1])


def test_damaged_and_swapped_files_of_a_run_are_named(cifar, tmp_path):
    words = (*CIFAR, "--data-dir", cifar, "--epochs", 1, "--out", tmp_path)
    assert command(til.main, *words)[0] == 0
    folder = tmp_path / "cifar100-20s-vit_tiny-16px-r8-seed0"
    adapter, state = (data.load_tensors(folder / name) for name in ("adapters/4.pt", "hopfield.pt"))
    for name, content in (("adapters/4.pt", adapter | {"theta": torch.ones(36_864)}), ("adapters/4.pt", adapter | {"theta": torch.ones(5)}),
                          ("adapters/4.pt", {"head": adapter["head"]}), ("adapters/4.pt", torch.ones(3)), ("adapters/4.pt", b"x" * 999),
                          ("hopfield.pt", {"keys": state["keys"]}), ("hopfield.pt", [1, 2]), ("config.json", b"[1]"), ("config.json", b"{")):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(content) if isinstance(content, bytes) else torch.save(content, folder / name)
        code, out, err = command(til.main, *words)
        assert code == 2 and name in err and err.count("\n") == 1, (name, err)
        (folder / name).write_bytes(whole)
    (folder / "adapters" / "4.pt").unlink()                              # trained again, to the same bits
    assert command(til.main, *words)[0] == 0
    assert torch.equal(data.load_tensors(folder / "adapters" / "4.pt")["theta"], adapter["theta"])
    state = torch.load(HERE / "weights" / "vit_tiny.pt", weights_only=True)
    torch.save(state | {"pos_embed": state["pos_embed"].flip(1)}, tmp_path / "w.pt")
    code, out, err = command(til.main, *words, "--weights", tmp_path / "w.pt")
    assert code == 2 and "was made with positions" in err
    adapters = folder / "adapters"                                       # exchanged
    (adapters / "1.pt").rename(adapters / "x.pt"), (adapters / "2.pt").rename(adapters / "1.pt"), (adapters / "x.pt").rename(adapters / "2.pt")
    for main, line in ((til.main, words), (evaluate.main, ("probe", folder))):
        code, out, err = command(main, *line)
        assert code == 2 and "adapters/1.pt" in err
    (folder / "hopfield.pt").unlink(), (folder / "til-hopfield.json").unlink()
    adapters.rename(tmp_path / "elsewhere"), adapters.symlink_to(tmp_path / "elsewhere")          # on a larger disk, say
    code, out, err = command(til.main, *words, "--batch-size", 3)
    assert code == 2 and "was made with batch_size" in err
    (folder / "config.json").unlink()
    code, out, err = command(til.main, *words)
    assert code == 2 and "config.json is missing" in err


def test_a_loss_that_is_not_finite_is_named(tiny):
    lora.add(tiny)
    tiny.norm.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="loss is nan in epoch 1, learning rate"):
        til.train_adapter(til.Classifier(tiny, 2), torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64),
                          1, 2, data.generator(0))


@pytest.mark.parametrize("words, said", [
    (("--splits", 7), "do not divide"), (("--splits", 100), "two and more"), (("--splits", 0), "at least 1"), (("--splits", "x"), "invalid int"),
    (("--dataset", "mnist"), "mnist"), (("--memory", "brain"), "brain"), (("--backbone", "resnet"), "resnet"),
    (("--weights", "no/such.pt"), "no/such.pt"), (("--image-size", 17), "positive multiple of the patch"), (("--image-size", -8), "image size -8"),
    (("--image-size", 8 * 10 ** 20), "below 100,000"), (("--alpha", 10 ** 400), "at most a million"), (("--rank", 0), "--rank"),
    (("--alpha", 0), "--alpha"), (("--seeds", -1), "--seeds"), (("--seeds", 1, 1), "--seeds"), (("--epochs", 0), "--epochs"),
    (("--batch-size", -1), "--batch-size"), (("--nonsense",), "nonsense"),
    (("--device", "tpu"), "--device"), (("--predict", "none.png"), "none.png"), (("--task", 1), "--predict"),
    (("--predict", HERE / "README.md"), "--task"), (("--predict", HERE / "README.md", "--task", 1), "without --predict first")])
def test_mistakes_on_the_command_line(cifar, tmp_path, words, said):
    code, out, err = command(til.main, *CIFAR, "--data-dir", cifar, "--out", tmp_path, *words)
    assert code == 2 and said in err and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu():
    for main, words in ((til.main, ()), (evaluate.main, ("bench",))):
        code, out, err = command(main, *words, "--device", "cuda")
        assert code == 2 and "no CUDA GPU" in err


def test_without_network_and_data_one_line_says_what_to_do(tmp_path):
    """The real command in a process of its own; a proxy that refuses stands for a machine without network. RANK and WORLD_SIZE
    count only if torchrun has set them."""
    environment = os.environ | {"RANK": "1", "WORLD_SIZE": "x"}
    environment |= {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "all_proxy": ""}
    command = [sys.executable, HERE / "til.py", "--dataset", "cifar100", "--splits", "20", "--memory", "hopfield"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for word in ("cifar-100-python.tar.gz", "https://www.cs.toronto.edu", "eb9058c3a382ffc7106e4002c42a8d85", "data/cifar-100-python"):
        assert word in line


# ---- mts.py ----------------------------------------------------------------------------------------------------------------

def test_labels_as_tasks_and_places_within_them():
    half = data.Images(None, torch.tensor([5, 0, 1, 2, 3, 4]), [*"abcdef"])
    task_ids, places = data.locate(half, [[4, 0], [1, 5], [3, 2]])
    assert task_ids.tolist() == [1, 0, 1, 2, 2, 0] and places.tolist() == [1, 1, 0, 1, 0, 0]
    assert data.locate(half, [[4, 0]]).tolist() == [[-1, 0, -1, -1, -1, 0], [-1, 1, -1, -1, -1, 0]]


class Fixed(nn.Module):
    """A head (width -> n) that gives the row of `table` that the picture's first pixel names, whatever the class token is."""

    def __init__(self, table):
        super().__init__()
        self.table, self.out_features = table, table.shape[1]

    def forward(self, features):
        return self.table[features[:, 0].long()]


@pytest.fixture
def switching(tiny, monkeypatch):
    """Six pictures of three tasks with two classes; where the predictor errs and the heads err is known."""
    lora.add(tiny)
    monkeypatch.setattr(til, "class_token", lambda vit, images: images[:, :1, 0, 0].float())
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 3, 16, 16)
    task_ids, places = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 0, 1, 0, 1])
    t_hat = torch.tensor([0, 0, 1, 2, 2, 0])                             # two of six tasks wrong
    answers = torch.tensor([[0, 0, 0, 0, 0, 1], [1, 1, 0, 1, 1, 1], [0, 0, 0, 1, 0, 1]])     # of each head, picture by picture
    memory, keys = til.Disk(), []
    for t in range(3):
        key, value = lora.split_key(random_theta(tiny, t))
        keys.append(key)
        memory.write(key, value)
    predictor = {"theta": random_theta(tiny, 9), "head": Fixed(torch.eye(3)[t_hat])}
    heads = [Fixed(torch.eye(2)[answer]) for answer in answers]
    return tiny, predictor, heads, images, keys, memory, task_ids, places, t_hat


def test_task_local_and_strict_accuracy_by_hand(switching):
    """Pictures 0, 1, 4 and 5 are told the classes 0, 0, 0, 1 by their predicted task's head, 2 and 3 the classes 0 and 1."""
    *inputs, task_ids, places, t_hat = switching
    found, logits = mts.mts_inference(*inputs)
    assert found.tolist() == t_hat.tolist() and logits.argmax(1).tolist() == [0, 0, 0, 1, 0, 1]
    assert evaluate.switching_hits(found, logits, task_ids, places) == {
        "task": [100, 50, 50], "local": [50, 100, 100], "strict": [50, 50, 50]}


def test_a_perfect_predictor_gives_what_til_gives(switching):
    vit, _, heads, images, keys, memory, task_ids, places, _ = switching
    _, logits = mts.mts_inference(vit, None, heads, images, keys, memory, task_ids)
    told = torch.cat([til.til_inference(vit, heads[t], images[task_ids == t], keys[t], memory) for t in range(3)])
    assert torch.equal(logits, told)


def test_algorithm_4_recalls_each_task_once_and_never_touches_theta_0(tiny):
    lora.add(tiny)
    theta_0, reads, thetas = random_theta(tiny, 9), [], [random_theta(tiny, t) for t in range(4)]
    images = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    class Memory(til.Disk):
        def read(self, key):
            reads.append(key)
            return super().read(key)

    memory, keys, heads = Memory(), [], [nn.Linear(192, 5) for _ in range(4)]
    for theta in thetas:
        keys.append(lora.split_key(theta)[0])
        memory.write(*lora.split_key(theta))
    inputs = tiny, {"theta": theta_0, "head": nn.Linear(192, 4)}, heads
    with torch.no_grad():
        t_hat, together = mts.mts_inference(*inputs, images, keys, memory)
        assert len(reads) == len(t_hat.unique()) > 1
        alone = [mts.mts_inference(*inputs, image[None], keys, memory) for image in images]
    assert torch.equal(torch.cat([t for t, _ in alone]), t_hat)
    assert torch.allclose(torch.cat([logits for _, logits in alone]), together, atol=1e-5)
    assert torch.equal(theta_0, random_theta(tiny, 9)) and len(memory.items) == 4


def test_mts_on_a_small_cifar100(cifar, tmp_path, monkeypatch):
    """On top of a finished til.py; then a predictor training that is cut after an epoch goes on to the same bits."""
    words = (*CIFAR, "--data-dir", cifar, "--out", tmp_path, "--epochs", 1)
    assert command(til.main, *words)[0] == 0
    folder = tmp_path / "cifar100-20s-vit_tiny-16px-r8-seed0"
    stored = (folder / "hopfield.pt").read_bytes()
    words += "--predictor-epochs", 3, "--predictor-batch-size", 32
    code, out, err = command(mts.main, *words)
    assert code == 0 and " Task Acc |" in out and "91.47 ± 0.21" in out and "task   1/20" not in out, err
    result = json.loads((folder / "mts-hopfield.json").read_text())
    assert result["faa_gt"] == result["faa"] == json.loads((folder / "til-hopfield.json").read_text())["faa_gt"]
    assert result["drop"] == pytest.approx(result["drop_ids"]) and result["drop_recall"] == 0
    assert result["faa_strict"] <= min(result["task_accuracy"], result["faa_local"]) and len(result["per_task"]["linear"]) == 20
    assert (folder / "hopfield.pt").read_bytes() == stored and decode_image(str(folder / "mts-confusion.png")).shape[0] == 3
    whole, saved = data.load_tensors(folder / "predictor.pt"), []

    def cut(path, content):
        saved.append(path.name)
        save(path, content)
        if len(saved) == 1:
            raise KeyboardInterrupt

    save = data.save_tensors
    (folder / "predictor.pt").unlink()
    monkeypatch.setattr(data, "save_tensors", cut)
    assert command(mts.main, *words)[0] == 130
    monkeypatch.setattr(data, "save_tensors", save)
    code, out, err = command(mts.main, *words)
    assert code == 0 and "epoch  1/3" not in out and "epoch  2/3" in out
    assert torch.equal(data.load_tensors(folder / "predictor.pt")["theta"], whole["theta"])
    code, out, err = command(mts.main, *words[:-2])
    assert code == 2 and "predictor.pt was trained with" in err and err.count("\n") == 1
    picture = tmp_path / "p.png"
    write_png(data.load("cifar100", cifar)[1].images[0], str(picture))
    code, out, err = command(mts.main, *words, "--predict", picture)
    assert code == 0 and out.startswith("task ") and out.count("colour") == 5, err
    whole = data.load_tensors(folder / "predictor.pt")
    for content, said in ((whole | {"epoch": 1}, "missing or unfinished"), (whole | {"config": {}}, "other settings")):
        data.save_tensors(folder / "predictor.pt", content)
        code, out, err = command(mts.main, *words, "--predict", picture)
        assert code == 2 and "predictor.pt" in err and said in err
    whole["theta"][5000] = torch.nan
    torch.save(whole | {"checksum": "0"}, folder / "predictor.pt")
    code, out, err = command(mts.main, *words)
    assert code == 2 and "predictor.pt is damaged" in err


# ---- evaluate.py -------------------------------------------------------------------------------------------------------------

def test_metrics_by_hand():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 6.0]])
    assert evaluate.accuracy(logits, torch.tensor([1, 0, 0, 1])) == 75
    assert evaluate.faa([50.0, 100.0, 75.0]) == 75
    theta, theta_hat = torch.tensor([9.0, 3.0, 4.0]), torch.tensor([0.0, 3.0, 3.0])
    assert evaluate.recall_error(theta_hat, theta, 1) == pytest.approx(0.2)
    assert evaluate.number([1.0, 3.0]) == "2.00 ± 1.41" and evaluate.number([1.5]) == "1.50"


class Quick(BayesPCN):
    """A small BayesPCN with few steps."""

    def __init__(self, dim, hidden=32, **options):
        super().__init__(dim, hidden, steps=100, **options)


def test_bench_measures_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "BayesPCN", Quick)
    words = ("bench", "--sizes", 480, "--counts", 5, 3, "--hidden", 8, "--out", tmp_path / "b.json")
    code, out, err = command(evaluate.main, *words)
    content = json.loads((tmp_path / "b.json").read_text())
    assert code == 0 and "P = 480" in out and out.count(" x literal ") == 4, err
    assert {"device", "threads", "seconds", "peak_memory_bytes", "versions", "rows", "checksum"} == set(content)
    rows, P, T, n_key = {}, 480, 5, 48
    for row in content["rows"]:
        rows[row["memory"], row["T"]], errors = row, row["errors"]
        assert len(errors) == row["T"] and (row["first"], row["last"], row["max"]) == (errors[0], errors[-1], max(errors))
        assert row["mean"] == pytest.approx(sum(errors) / row["T"])
        assert min(row["write_ms"], row["read_ms"], row["alone_ms"]) > 0
    assert set(rows) == {(name, T) for name in ("disk", "hopfield", "bayespcn", "bayespcn-joint") for T in (3, 5)}
    thetas = torch.stack([evaluate.lora_like(P, t) for t in range(T)])
    assert rows["disk", T]["max"] == 0 and rows["disk", T]["bytes"] > T * P * 4
    assert rows["hopfield", T]["bytes"] == T * P * 4
    blend = F.scaled_dot_product_attention(thetas[:, :n_key].double(), thetas[:, :n_key].double(), thetas.double(), scale=25)
    expected = (blend - thetas)[:, n_key:].square().sum(1) / thetas[:, n_key:].square().sum(1)
    assert rows["hopfield", T]["errors"] == pytest.approx(expected.tolist(), rel=1e-3)
    assert rows["bayespcn", T]["bytes"] == 8 * (8 * P + 2 * 8 * 8 + 3 * 8 * 8 + 8)          # R, U, r in float64
    row = rows["bayespcn", 3]                    # at the first T the mean write is that of all writes
    literal, ours = row["literal_write_ms"] / row["same_write_ms"] * row["write_ms"] + row["literal_read_ms"], row["write_ms"] + row["read_ms"]
    assert row["speedup"] == pytest.approx(literal / ours)
    ours = Quick(P, 8)
    for theta in thetas:
        ours.write(theta[:n_key], theta[n_key:])
    ours.read_mode = "joint"
    for i, error in enumerate(rows["bayespcn-joint", T]["errors"]):
        assert error == pytest.approx(evaluate.recall_error(ours.read(thetas[i, :n_key]), thetas[i], n_key) ** 2, rel=0.01)


def test_speed_measures_a_training(tmp_path, monkeypatch):
    monkeypatch.setitem(evaluate.STEPS, "cpu", [("vit_tiny", 16, 4, 6, True)])
    code, out, err = command(evaluate.main, "speed", "--device", "cpu", "--out", tmp_path / "s.json")
    (row,) = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert code == 0 and "vit_tiny" in out and row["min"] <= row["images_per_second"] <= row["max"] and row["mfu"] is None, err
    assert row["P"] == 6 * 2 * 2 * 4 * 192 and row["evaluation"] > 0


def test_the_literal_write_and_read_are_the_fast_ones():
    (memory, thetas), (twin, _) = stored(5), stored(5)
    for m in (memory, twin):
        m.steps = 100
    new = vectors(1, 60, seed=9)[0]
    memory.write(new[:20], new[20:])
    evaluate.literal_write(twin, new[:20], new[20:])
    for a, b in zip(state_of(memory), state_of(twin)):
        assert (a - b).norm() <= 1e-6 * b.norm()
    for mode, tolerance in (("marginal", 1e-5), ("joint", 0.5)):             # joint moves the missing values: 100 steps are few
        memory.read_mode = twin.read_mode = mode
        ours, literal = memory.read(thetas[2, :20]), evaluate.literal_read(twin, thetas[2, :20])
        assert torch.equal(ours[:20], literal[:20]) and (ours - literal).norm() < tolerance * literal.norm()


def run_folder(folder, thetas):
    """The parts of a finished run that `probe` reads."""
    config = {"dataset": "made up", "splits": len(thetas), "rank": 8, "alpha": 8, "seed": 3}
    for t, theta in enumerate(thetas, 1):
        data.save_tensors(folder / "adapters" / f"{t}.pt", {"theta": theta, "head": {}, "t": t, "config": config})
    data.save_json(folder / "config.json", config)


def test_probe_tells_exact_recall_from_the_mean(tmp_path, monkeypatch):
    T, P, n_key = 6, 400, 40
    thetas = 0.5 * randn(T, P)                   # K^T k is about 10 on the diagonal and 1.6 beside it
    monkeypatch.setattr(evaluate, "BayesPCN", Quick)
    run_folder(tmp_path / "run", thetas)
    code, out, err = command(evaluate.main, "probe", tmp_path / "run", "--out", tmp_path / "out")
    assert code == 0 and "cue share 0.001" in out, err
    content = json.loads((tmp_path / "out" / "probe.json").read_text())
    rows = {(row["probe"], row["level"]): row for row in content["rows"]}
    assert content["config"]["dataset"] == "made up" and content["versions"]["torch"] == torch.__version__
    assert rows["noise", 0]["hopfield"] == 0 and rows["noise", 0]["smallest_weight"] == 1
    assert rows["noise", 100]["hopfield"] > 0.5 > 0.2 > rows["noise", 0]["bayespcn"]
    blend = torch.softmax(0.01 * thetas[:, :n_key] @ thetas[:, :n_key].T, 1) @ thetas
    by_hand = [evaluate.recall_error(blend[t], thetas[t], n_key) for t in range(T)]
    assert rows["beta", 0.01]["per_task"]["hopfield"] == pytest.approx(by_hand, rel=1e-4)
    mean = [evaluate.recall_error(thetas.mean(0), thetas[t], n_key) for t in range(T)]
    assert rows["beta", 0.01]["per_task"]["hopfield"] == pytest.approx(mean, rel=0.1)
    assert rows["cue share", 0.1]["per_task"] == rows["noise", 0]["per_task"] == rows["stored tasks", T]["per_task"]
    forgotten = [rows["forget", strength]["bayespcn"] for strength in evaluate.FORGET]
    assert forgotten == sorted(forgotten) and forgotten[0] == pytest.approx(rows["noise", 0]["bayespcn"], rel=1e-3)
    width, cell = 1000 // T * T, 1000 // (4 * T)
    for name, size in (("noise", (3, 2 * 30 * len(evaluate.NOISE) + 18, width + 12)), ("softmax", (3, T * cell + 12, 4 * T * cell + 30))):
        assert data.read_picture(tmp_path / "out" / f"probe-{name}.png").shape == size
    assert not (tmp_path / "run" / "probe.json").exists()


@pytest.mark.parametrize("words, said", [
    (("bench", "--sizes", 9), "--sizes 9"), (("bench", "--counts", 3, 0), "--counts 3 0"), (("bench", "--hidden", -1), "--hidden -1"),
    (("bench", "--sizes", 10 ** 20), "at most a billion"),
    (("bench", "--device", "tpu"), "--device"), (("probe", "no/such"), "no/such/config.json"), (("probe",), "run"), ((), "runs"),
    (("probe", "{empty}"), "does not hold config and all adapters")])
def test_mistakes_in_evaluate(tmp_path, words, said):
    run_folder(tmp_path, [randn(40)])
    (tmp_path / "adapters" / "1.pt").unlink()
    words = [str(word).format(empty=tmp_path) for word in words]
    code, out, err = command(evaluate.main, *words)
    assert code == 2 and said in err and err.count("\n") == 1 and "Traceback" not in err


def test_a_result_that_is_broken_is_named(tmp_path):
    result = data.load_json(next((HERE / "results").glob("glyphs*/til-hopfield.json")))
    for broken in ({key: value for key, value in result.items() if key != "faa"}, result | {"controls": 3}, result | {"faa": "x"}):
        data.save_json(tmp_path / "til-hopfield.json", broken)
        code, out, err = command(evaluate.main, tmp_path)
        assert code == 2 and "til-hopfield.json is not a result" in err and err.count("\n") == 1
    (tmp_path / "til-hopfield.json").write_text(json.dumps(result | {"faa": 99.9}))
    code, out, err = command(evaluate.main, tmp_path)
    assert code == 2 and "til-hopfield.json is damaged" in err           # whoever edits a figure does not write the checksum
    with pytest.raises(ValueError, match="two results of seed 0"):
        evaluate.report([result, result])
    for other in ({"epochs": 9}, {"weights": "00000000"}, {"rank": 4}, {"validate": True}):          # not averaged
        assert evaluate.report([result, result | other | {"seed": 1}]).count(f"{result['faa_gt']:.2f} ") > 1
        assert "±" not in evaluate.report([result, result | other | {"seed": 1}])
    on_gpu = evaluate.report([result | {"peak_memory_bytes": 2e9, "peak_host_bytes": 3.1e9}])
    assert "s and 2.0 GB of the GPU, 3.1 GB of the machine; weights" in on_gpu and "of the GPU" not in evaluate.report([result])
    rank_4 = result | {"dataset": "tinyimagenet", "splits": 50, "rank": 4, "backbone": "dinov2_vits14", "image_size": 112, "batch_size": 64}
    ours, paper = evaluate.report([rank_4]).splitlines()[4:6]
    assert "`hopfield --rank 4`" in ours and paper.startswith("| paper  ") and "91.39 ± 0.42" in paper
    lines = evaluate.report([result | {"memory": "other"}, result | {"rank": 4}, result]).splitlines()
    assert [line.split("`")[1] for line in lines if line.startswith("| `")] == ["hopfield", "other", "hopfield --rank 4"]


@pytest.mark.parametrize("path", sorted((HERE / "results").rglob("*s-*/*.json")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_row_of_the_tables_names_the_command_that_gave_it(path, monkeypatch):
    result = data.load_json(path)
    words = ["--dataset", result["dataset"], "--splits", result["splits"], "--memory", *evaluate.options(result).split()]
    monkeypatch.setattr(sys, "argv", [f"{result['setting']}.py", *map(str, words)])
    parsed = []
    monkeypatch.setattr(til, "launch", lambda args, *_: parsed.append(args))
    (til if result["setting"] == "til" else mts).main()
    args, predictor = parsed[0], result.get("predictor", {})
    for name in ("dataset", "splits", "backbone", "rank", "epochs", "batch_size", "shared_init", "validate"):
        assert getattr(args, name) == result[name]
    assert (args.alpha, args.plain) == (result.get("alpha", lora.ALPHA), result.get("plain", False))
    assert args.image_size in (None, result["image_size"]) and (args.image_size or substrate.CONFIGS[args.backbone].image_size) == result["image_size"]
    assert args.memory == result["memory"].split("-")[0] and (args.bpcn_read == "joint") == result["memory"].endswith("-joint")
    assert all(getattr(args, f"predictor_{name}") == predictor[name] for name in ("epochs", "batch_size") if predictor)


def test_the_tables_of_the_readme_are_the_results():
    tables = evaluate.report(evaluate.read_runs(sorted((HERE / "results").iterdir())), whole=True)
    assert tables.split("FAA  ")[0].strip() in README
    for setting in ("til", "mts"):                                       # what the first two commands print
        table = evaluate.report([data.load_json(HERE / "results/glyphs-20s-vit_tiny-r8-seed0" / f"{setting}-hopfield.json")])
        assert table[table.index("| M"):table.index("\n- ")].strip() in README
    bench, gpu, probe, speed = (data.load_json(HERE / "results" / name)["rows"] for name in (
        "bench-cpu.json", "bench-cuda.json", "probe/probe.json", "speed-cuda.json"))
    bench, gpu = (evaluate.bench_table([row for row in rows if row["P"] == 147_456]) for rows in (bench, gpu))
    for table in (bench, gpu.split("\n\n")[0], evaluate.probe_table(probe), evaluate.speed_table(speed)):
        assert table.strip() in README


class Understood(Exception):
    """A script has read its command line and goes to work."""


@pytest.mark.parametrize("line", [line for line in README.splitlines() if re.match(r" {4}(python|torchrun)", line) and "-m venv" not in line])
def test_the_commands_of_the_readme_are_understood(line, tmp_path, monkeypatch):
    def work(*_):
        raise Understood

    monkeypatch.chdir(tmp_path)
    (tmp_path / "picture.png").touch()
    for module, name in ((data, "load"), (evaluate, "read_runs"), (evaluate, "load_run"), (evaluate, "bench_memory"), (evaluate, "speed_row")):
        monkeypatch.setattr(module, name, work)
    script, *words = line.split("#")[0].replace("torchrun --nproc_per_node 2", "python").split()[1:]
    with pytest.raises(Understood):
        command({"til.py": til, "mts.py": mts, "evaluate.py": evaluate, "data.py": data, "vit.py": substrate}[script].main, *words)


def test_what_the_readme_names_is_there():
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (HERE / link).exists(), link
    modules = {"til": til, "mts": mts, "lora": lora, "data": data, "evaluate": evaluate, "Hopfield": hopfield.Hopfield, "BayesPCN": BayesPCN}
    names = re.findall(r"`(\w+)\.(\w+)`", README)
    for module, name in names:
        assert name in ("py", "json", "pt", "png") or hasattr(modules[module], name), (module, name)
    assert len(names) > 30
    for path in re.findall(r"`(results/[^`]+)`", README):
        assert (HERE / path).exists(), path


# ---- faults ------------------------------------------------------------------------------------------------------------------

INVALID = {                                      # for each option: values that must be refused
    "--dataset": ("mnist", ""), "--splits": (0, -1, 7, 101, 1.5, "x"), "--memory": ("ram", ""), "--bpcn-read": ("exact", "joint"),
    "--backbone": ("resnet",), "--weights": ("none.pt", "."), "--image-size": (0, -8, 60, "x"), "--rank": (0, -1, 193, "x"),
    "--epochs": (0, -3, "x"), "--batch-size": (0, -1, "x"), "--seeds": (-1, "x", ""), "--device": ("gpu", "cuda:x", "cuda:-1"),
    "--predict": ("none.png", "."), "--task": (0, 21, 1, "x"), "--nonsense": (1,)}
VALID = {"--splits": (10, 20), "--rank": (1, 8), "--epochs": (1, 3), "--batch-size": (1, 64), "--image-size": (8, 64), "--seeds": (0, 5)}


def test_invalid_options_are_refused_before_any_work(monkeypatch):
    """Command lines of random valid options and one invalid value: one line, exit code 2, no data set read, no folder made."""
    def work(*_):
        raise AssertionError("work was started")

    monkeypatch.setattr(data, "load", work)
    rng = np.random.default_rng(0)
    for _ in range(200):
        bad = str(rng.choice([*INVALID]))
        value = INVALID[bad][rng.integers(len(INVALID[bad]))]
        words = [word for option in rng.permutation([*VALID])[:3] if option != bad for word in (option, rng.choice(VALID[option]))]
        code, out, err = command(til.main, "--device", "cpu", *words, bad, value)
        assert code == 2 and out == "" and err.count("\n") == 1, (words, bad, value, err)


def test_a_second_process_on_a_run_folder_is_refused(cifar, tmp_path):
    words = (*CIFAR, "--data-dir", cifar, "--epochs", 1, "--out", tmp_path)
    folder = tmp_path / "cifar100-20s-vit_tiny-16px-r8-seed0"
    with data.lock(folder):
        code, out, err = command(til.main, *words)
        assert code == 2 and "another process is at work" in err and err.count("\n") == 1
        assert [path.name for path in folder.iterdir()] == [".lock"]
    (folder / ".3.pt.123.part").write_bytes(b"half of it")
    with data.lock(folder):
        assert not (folder / ".3.pt.123.part").exists()
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(tmp_path / "mine")                         # by whoever made the folder
    (tmp_path / "mine").write_text("mine")
    with data.lock(folder):
        assert (tmp_path / "mine").read_text() == "mine"
    first = data.lock(folder, 0, 2)                                          # of two processes of torchrun
    with data.lock(folder, 1, 2):
        first.close()                                                        # killed
        for rank, world in ((0, 1), (0, 2)):
            with pytest.raises(ValueError, match="another process is at work"):
                data.lock(folder, rank, world)
    data.lock(folder).close()


def limited(limit, value):
    """For subprocess: applies a resource limit in the child."""
    return lambda: resource.setrlimit(limit, (value, value))


def test_a_full_disk_keeps_what_was_finished(cifar, tmp_path):
    """A limit on the size of a file: the adapters (38 kB) can be written, the memory cannot."""
    words = [*map(str, (sys.executable, HERE / "til.py", *CIFAR, "--rank", 2, "--data-dir", cifar, "--epochs", 1, "--out", tmp_path))]
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=limited(resource.RLIMIT_FSIZE, 200_000))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "cannot write" in done.stderr and "hopfield.pt" in done.stderr
    folder = tmp_path / "cifar100-20s-vit_tiny-16px-r2-seed0"
    assert len([*folder.glob("adapters/*.pt")]) == 20 and not [*folder.rglob("*.part")] and not (folder / "hopfield.pt").exists()
    code, out, err = command(til.main, *words[2:])
    assert code == 0 and "task " not in out


def test_a_full_disk_leaves_no_half_of_a_picture(tmp_path):
    (tmp_path / "train" / "noise").mkdir(parents=True)
    for i in range(2):
        noise = torch.randint(0, 256, (3, 200, 200), dtype=torch.uint8, generator=data.generator(i))
        write_png(noise, str(tmp_path / "train" / "noise" / f"{i}.png"))
    words = [sys.executable, HERE / "data.py", "--dataset", "folder", "--data-dir", tmp_path, "--out", tmp_path / os.fsdecode(b"p\xff.png")]
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=limited(resource.RLIMIT_FSIZE, 8000))
    assert done.returncode == 2 and "cannot write" in done.stderr and [path.name for path in tmp_path.iterdir()] == ["train"]


def test_streams_that_are_closed(monkeypatch):
    """Both from the start, as Python has it then; and standard output by a reader that has gone: that is no success."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    data.run_command(lambda: print("to", sys.stdout, file=sys.stderr))
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(SystemExit) as stop:
            data.run_command(lambda: print("to nobody"))
    assert stop.value.code == 141


def test_a_run_folder_that_cannot_be_written_is_named_and_kept(cifar, tmp_path, monkeypatch):
    """Permissions do not hold root back, so the calls that would fail are made to."""
    folder, save, saved = tmp_path / "cifar100-20s-vit_tiny-16px-r8-seed0", torch.save, []

    def turns_read_only(content, path):
        if len(saved) == 3:
            raise OSError(errno.EROFS, "Read-only file system")
        save(content, path)
        saved.append(path)

    def files():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def refused(out):
        code, _, err = command(til.main, *CIFAR, "--data-dir", cifar, "--epochs", 1, "--out", out)
        assert code == 2 and err.count("\n") == 1
        return err

    monkeypatch.setattr(torch, "save", turns_read_only)                      # after three tasks
    err = refused(tmp_path)
    assert "cannot write" in err and "adapters/4.pt" in err and "Read-only" in err
    before = files()
    assert sorted(path.name for path in before) == [".lock", "1.pt", "2.pt", "3.pt", "config.json"]

    def only_reads(path, mode):
        if mode == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open(path, mode)

    monkeypatch.setattr(data, "open", only_reads, raising=False)             # from the start
    assert f"cannot write into {folder}" in refused(tmp_path) and files() == before
    monkeypatch.undo()
    (tmp_path / "file").touch()
    assert f"cannot write into {tmp_path}/file/runs" in refused(tmp_path / "file" / "runs")


def test_a_cache_that_cannot_be_written_does_not_stop_a_run(tiny_imagenet, monkeypatch, capsys):
    decode = data.decode_tiny_imagenet
    monkeypatch.setattr(data, "decode_tiny_imagenet", lambda folder: decode(folder, 3, 4, 2))
    (tiny_imagenet.parent / ".tiny-imagenet-200.pt.00000000.part").mkdir()
    monkeypatch.setattr(os, "urandom", bytes)            # so that the scratch file cannot be opened
    train, test = data.tiny_imagenet(tiny_imagenet.parent)
    assert len(train.labels) == 12 and "cannot write" in capsys.readouterr().err


def test_too_little_memory_is_said_in_one_line_and_its_remedy_works(cifar, tmp_path, monkeypatch):
    """Settings that trained nothing do not bind those who come after; settings that did, do."""
    def step(self, x, *more):
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB." + 99 * " And so on." + "\nMore.")
        take_step(self, x, *more)

    take_step, words = til.Trainer.step, (*CIFAR, "--data-dir", cifar, "--epochs", 1, "--out", tmp_path)
    monkeypatch.setattr(til.Trainer, "step", step)
    code, out, err = command(til.main, *words, "--batch-size", 5)
    assert code == 2 and "--batch-size" in err and "2.00 GiB" in err and err.count("\n") == 1 and len(err) < 450
    assert command(til.main, *words, "--batch-size", 4)[0] == 0
    code, out, err = command(til.main, *words, "--batch-size", 3)
    assert code == 2 and "batch_size 4" in err


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("Unable to allocate 4 GiB"), RuntimeError("CUDA error: out of memory\nSearch for"),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"), RuntimeError("DefaultCPUAllocator: not enough")])
def test_lack_of_memory_has_many_names(error):
    def main():
        raise error
    code, out, err = command(main)
    assert code == 2 and f"out of memory ({str(error)[:10] or 'MemoryError'}" in err and err.count("\n") == 1


def test_the_end_of_another_process_is_one_line():
    def main():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:29849.\nMore.")
    code, out, err = command(main)
    assert code == 2 and "torchrun" in err and err.count("\n") == 1


def test_other_errors_of_pytorch_are_shown_whole():
    def main():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        command(main)


@on_a_gpu
def test_a_gpu_gives_the_same_bits_twice(tmp_path):
    """Also where attention goes over more than 128 tokens, whose gradients PyTorch adds up in any order by default."""
    words, thetas = ("--splits", "2", "--epochs", "1", "--batch-size", "64", "--image-size", "128", "--rank", "4"), []
    for name in "ab":
        subprocess.run([sys.executable, "til.py", *words, "--out", tmp_path / name], cwd=HERE, check=True)
        thetas.append(data.load_tensors(tmp_path / name / "glyphs-2s-vit_tiny-128px-r4-seed0" / "adapters" / "1.pt")["theta"])
    assert torch.equal(*thetas)


@on_a_gpu
@pytest.mark.parametrize("megabytes", [5, 300, 600, 700, 1000, 1500])
def test_a_gpu_with_too_little_memory_is_said_in_one_line(megabytes, tmp_path):
    """Others leave so much of it that CUDA does not start, that its libraries don't, that the batch does not fit."""
    others = torch.empty(torch.cuda.mem_get_info()[0] - megabytes * 10 ** 6, dtype=torch.uint8, device="cuda")
    done = subprocess.run([sys.executable, "til.py", "--splits", "2", "--batch-size", "1200", "--out", tmp_path], cwd=HERE, capture_output=True, text=True)
    del others
    torch.cuda.empty_cache()
    print(megabytes, done.stderr)
    assert done.returncode == 2 and "out of memory" in done.stderr and "--batch-size" in done.stderr and done.stderr.count("\n") == 1


def png(width, height, rows):
    """A grey PNG file that claims to have this size, with these raw bytes."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_a_picture_that_claims_to_be_huge_is_refused(tmp_path):
    (tmp_path / "p.png").write_bytes(png(50_000, 50_000, bytes(1000)))
    with pytest.raises(ValueError, match="p.png cannot be read.*2500000000 pixels"):
        data.read_picture(tmp_path / "p.png")
    (tmp_path / "p.png").write_bytes(png(4, 2, bytes(10)))
    assert data.read_picture(tmp_path / "p.png").shape == (3, 2, 4)


def test_U_stays_symmetric_positive_definite_over_a_thousand_writes():
    memory = BayesPCN(40, 24)
    memory.condition(activations(1000, 40, 24, 4))
    for U in memory.U:
        assert torch.allclose(U, U.T, atol=1e-12) and torch.linalg.eigvalsh(U).min() > 0


def mutate(path, others, rng):
    """Damages a file in one of six ways; returns which."""
    content, kind = bytearray(path.read_bytes()), str(rng.choice(["cut", "flip", "flips", "zeros", "random", "swap"]))
    place = int(rng.integers(len(content)))
    if kind == "cut":
        content = content[:place]
    elif kind in ("flip", "flips"):
        for i in rng.integers(len(content), size=1 if kind == "flip" else 20):
            content[i] ^= 1 << rng.integers(8)
    elif kind == "swap":
        content = others[rng.integers(len(others))].read_bytes()
    else:
        n = min(64, len(content) - place)
        content[place:place + n] = bytes(n) if kind == "zeros" else rng.bytes(n)
    path.write_bytes(content)
    return kind


ODD = (None, "text", 3, -1.5, [], {}, torch.zeros(3), torch.full((7,), torch.nan), torch.zeros(2, 2, dtype=torch.int64))


def retype(path, rng):
    """Puts a value of another type somewhere into a file of tensors and writes it with a right checksum; returns where."""
    content = data.load_tensors(path)
    inner, name = content, str(rng.choice([*content]))
    while isinstance(inner[name], dict) and inner[name] and rng.random() < 0.7:
        inner = inner[name]
        name = [*inner][rng.integers(len(inner))]
    inner[name] = ODD[rng.integers(len(ODD))]
    data.save_tensors(path, content)
    return f"retyped {name}"


class Faults:
    """A small finished run of both settings on a small CIFAR-100, and a small TinyImageNet, whose files can be damaged one at a time."""

    def __init__(self, folder):
        self.folder, self.data_dir = folder, small_cifar(folder)
        self.weights = folder / "weights.pt"
        shutil.copy(HERE / "weights" / "vit_tiny.pt", self.weights)
        self.picture = folder / "picture.png"
        write_png(data.load("cifar100", self.data_dir)[1].images[0], str(self.picture))
        self.words = (*CIFAR, "--rank", 2, "--data-dir", self.data_dir, "--epochs", 1, "--weights", self.weights, "--out", folder / "runs",
                      "--predictor-epochs", 1, "--predictor-batch-size", 32)
        for memory in ("hopfield", "bayespcn"):
            assert command(mts.main, *self.words, "--memory", memory)[0] == 0
        self.run = folder / "runs" / "cifar100-20s-vit_tiny-16px-r2-seed0"
        self.tiny_imagenet = small_tiny_imagenet(folder)
        cache, self.names = folder / "tiny-imagenet-200.pt", self.tiny_imagenet / "words.txt"
        data.save_tensors(cache, data.decode_tiny_imagenet(self.tiny_imagenet, 3, 4, 2))
        self.tiny_files = [cache, self.names, self.tiny_imagenet / "wnids.txt", self.tiny_imagenet / "val" / "val_annotations.txt"]
        self.files = [*self.run.glob("*.pt"), *self.run.glob("*.json"), *self.run.glob("adapters/1*.pt"), self.weights, self.picture,
                      *(self.data_dir / "cifar-100-python").iterdir(), *self.tiny_files]
        self.expected = {reader: self.answers(reader) for reader in ("hopfield", "bayespcn", "tinyimagenet")}

    def answers(self, reader):
        """What the commands say that read the files of a memory, or TinyImageNet's: (exit code, standard output, standard error) of each."""
        if reader == "tinyimagenet":
            return [command(self.read_tiny_imagenet)]
        return [command(mts.main, *self.words, "--memory", reader, "--predict", self.picture), command(evaluate.main, self.run)]

    def read_tiny_imagenet(self):
        """Prints what the official files come to, and what their cache."""
        decoded, cached = data.decode_tiny_imagenet(self.tiny_imagenet, 3, 4, 2), data.load("tinyimagenet", self.data_dir)
        print(data.checksum(decoded), data.checksum(cached))

    def damage(self, rng):
        """Damages one file and puts it back: (file and kind of damage, 'right', 'refused' or what went wrong)."""
        path, memory = self.files[rng.integers(len(self.files))], str(rng.choice(["hopfield", "bayespcn"]))
        reader, content = "tinyimagenet" if path in self.tiny_files else memory, path.read_bytes()
        kind = retype(path, rng) if path.suffix == ".pt" and path != self.weights and rng.random() < 0.4 else mutate(path, self.files, rng)
        try:
            outcome = "right"
            for (code, out, err), (_, right, _) in zip(self.answers(reader), self.expected[reader]):
                if code == 2 and err.count("\n") == 1 and out == "":
                    outcome = "refused"
                elif code != 0 or out != right and path not in (self.picture, self.names):   # nobody knows what they said
                    return f"{path.name} {kind}", f"code {code}: {out} {err}"
            return f"{path.name} {kind}", outcome
        except Exception as error:
            return f"{path.name} {kind}", f"{type(error).__name__}: {error}"
        finally:
            path.write_bytes(content)


def test_damaged_files_are_refused_or_do_no_harm(tmp_path):
    """The quick part of `python test_modmem.py`."""
    faults, rng = Faults(tmp_path), np.random.default_rng(1)
    for _ in range(25):
        where, outcome = faults.damage(rng)
        assert outcome in ("right", "refused"), (where, outcome)


# ---- python test_modmem.py: the long part --------------------------------------------------------------------------------------

def run_script(words, out, threads=1):
    """Runs a script in a process of its own and checks that it succeeds."""
    done = subprocess.run([*map(str, words), "--out", str(out)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    assert done.returncode == 0, done.stderr


def outcome_of(out):
    """What a run came to: the figures of its JSON file, and theta_0 .. theta_T."""
    (run,) = out.iterdir()
    files = [run / "predictor.pt", *(run / "adapters" / f"{t}.pt" for t in range(1, 21))]
    return json.loads((run / "mts-hopfield.json").read_text())["per_task"], torch.stack([data.load_tensors(file)["theta"] for file in files])


def kills(words, folder, n, rng):
    """SIGKILL at n random moments of mts.py; then the same command. Returns what a killed run had finished, as counts."""
    start = time.perf_counter()
    run_script(words, folder / "whole")
    seconds, (figures, thetas) = time.perf_counter() - start, outcome_of(folder / "whole")
    rows = []
    for i in data.progress(range(n), n, "killing"):
        out = folder / f"killed{i}"
        process = subprocess.Popen([*map(str, words), "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        time.sleep(rng.uniform(0.3, 1) * seconds)
        process.kill()
        process.wait()
        finished = {path: path.stat().st_mtime_ns for path in out.rglob("adapters/*.pt")}
        rows.append(len(finished))
        run_script(words, out)
        again, same = outcome_of(out)
        assert again == figures and torch.equal(same, thetas), f"kill {i}: another outcome"
        assert all(path.stat().st_mtime_ns == before for path, before in finished.items()), f"kill {i}: a finished task was trained again"
        assert not [*out.rglob("*.part")], f"kill {i}: a file was left half written"
    return {"kills": n, "seconds_of_a_run": seconds, "adapters_finished_when_killed": rows}


def cache_kills(folder, n, rng):
    """SIGKILL while a large file is written again and again: it is always whole."""
    code = f"import data, pathlib, torch\nwhile True: data.save_tensors(pathlib.Path({str(folder / 'cache.pt')!r}), {{'x': torch.rand(5_000_000)}})"
    for _ in data.progress(range(n), n, "killing"):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE)
        while not (folder / "cache.pt").exists():
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.wait()
        data.load_tensors(folder / "cache.pt").clear()
        (folder / "cache.pt").unlink()
    return n


def memory_growth():
    """Resident memory in bytes after 50 and after 200 tasks."""
    vit, resident = substrate.load("vit_tiny", image_size=16), {}
    lora.add(vit, 2)
    classifier, images = til.Classifier(vit, 2), torch.randint(256, (120, 3, 32, 32), dtype=torch.uint8)
    for t in range(1, 201):
        til.train_adapter(classifier, images, torch.arange(120) % 2, 1, 6, data.generator(0, t))
        if t in (50, 200):
            resident[t] = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])
    return resident


def smallest_eigenvalue(writes=1000):
    """The smallest eigenvalue of any U after that many writes, as many as four times what the memory can hold."""
    memory = BayesPCN(1000)
    memory.condition(activations(writes, 1000, 256, 4))
    return min(torch.linalg.eigvalsh(U).min().item() for U in memory.U)


def main():
    """Kills, damages and repeats small runs for twenty minutes; writes results/faults.json."""
    parser = data.Parser("python test_modmem.py", main.__doc__)
    parser.add_argument("--kills", type=int, default=40, help="default: 40")
    parser.add_argument("--mutations", type=int, default=900, help="default: 900")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "faults.json", help="default: results/faults.json")
    args, start, rng = parser.parse_args(), time.perf_counter(), np.random.default_rng(0)
    content = {"versions": evaluate.VERSIONS, "threads": torch.get_num_threads(), "resident_bytes": memory_growth(), "smallest_eigenvalue_of_U": smallest_eigenvalue()}
    with tempfile.TemporaryDirectory() as folder:
        folder, outcomes, kinds = Path(folder), [], {}
        faults = Faults(folder)
        for _ in data.progress(range(args.mutations), args.mutations, "damaging"):
            where, outcome = faults.damage(rng)
            name, kind = where.split()[0], where.split()[1]
            outcomes.append(outcome)
            kinds.setdefault(f"{name} {kind}", []).append(outcome)
            if outcome not in ("right", "refused"):
                print(where, outcome, flush=True)
        wrong = [f"{where}: {outcome}" for where, found in kinds.items() for outcome in found if outcome not in ("right", "refused")]
        content |= {"mutations": args.mutations, "refused": outcomes.count("refused"), "right": outcomes.count("right"), "wrong": wrong}
        words = (sys.executable, HERE / "mts.py", *CIFAR, "--data-dir", faults.data_dir, "--epochs", 1, "--predictor-epochs", 2,
                 "--predictor-batch-size", 32)
        content |= kills(words, folder, args.kills, rng) | {"kills_while_a_file_is_written": cache_kills(folder, args.kills, rng)}
        run_script(words, folder / "again")
        run_script(words, folder / "two", threads=2)
        (one, ones), (again, agains), (two, twos) = (outcome_of(folder / name) for name in ("whole", "again", "two"))
        content |= {"same_again": one == again and torch.equal(ones, agains),
                    "two_threads_differ_by": ((twos - ones).norm() / ones.norm()).item()}
    content["seconds"] = time.perf_counter() - start
    data.save_json(args.out, content)
    print(f"{args.out}: {content['refused']} damaged files refused, {content['right']} without effect, {len(wrong)} wrong; {args.kills} kills survived")


if __name__ == "__main__":
    data.run_command(main)
