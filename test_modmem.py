"""Hand-written parts against independent oracles; algorithms where the answer is known; the commands."""
import argparse
import contextlib
import io
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import equal
from torch.testing import assert_close
from torchvision.transforms import v2

import data
import evaluate
import lora
import mts
import til
import vit as substrate
from bayespcn import BayesPCN
from hopfield import Hopfield

HERE = Path(__file__).parent
README, WEIGHTS = (HERE / "README.md").read_text("utf-8"), HERE / "weights/vit_micro.pt"
torch.set_num_threads(1)

def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

def pixels(n, size):
    return (randn(n, 3, size, size) * 60 + 128).clamp(0, 255).byte()

@pytest.fixture
def tiny():
    """The shipped substrate at 16 x 16 pixels, which are four patches: every test is quick."""
    return substrate.load("vit_micro", image_size=16)

THETAS = 0.1 * randn(10, 6 * 2 * 2 * 8 * 192)                   # for it, at rank 8: L * 2 * 2 * r * d

def command(script, *words, codes=(0,)):
    """What a script prints with this command line; if it exits with 2, its one line of error."""
    out, err = io.StringIO(), io.StringIO()
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop):
        patch.setattr(sys, "argv", [script, *map(str, words)])
        runpy.run_path(str(HERE / script), run_name="__main__")
        sys.exit(0)
    code, err = stop.value.code or 0, err.getvalue()
    assert code in codes and (code == 0 or err.count("\n") == 1), err
    return err if code else out.getvalue()

def refused(script, *words):
    return command(script, *words, codes=(2,))

# ---- vit.py and lora.py --------------------------------------------------------------------------
def test_vit_b_16_is_torchvisions(tmp_path):
    with torch.device("meta"):                   # without its own slow initialisation
        theirs = torchvision.models.vit_b_16().eval().to_empty(device="cpu")
    for i, weight in enumerate(theirs.parameters()):
        weight.data = 0.03 * randn(*weight.shape, seed=i)
    data.save(tmp_path / "w", theirs.state_dict())
    ours, x, theirs.heads = substrate.load("vit_b_16", tmp_path / "w"), randn(1, 3, 224, 224), nn.Identity()
    assert_close(ours(x), theirs(x).detach(), rtol=0, atol=1e-5)

def published_state(d, patch, n, layer_scale):
    """Random weights in the layout of timm's and DINOv2's files: width d, n x n positions, 12 blocks."""
    shapes = {"cls_token": (1, 1, d), "pos_embed": (1, 1 + n ** 2, d), "mask_token": (1, d)}
    layers = {"patch_embed.proj": (d, 3, patch, patch), "norm": (d,), "head": (10, d)}
    for b in (f"blocks.{i}." for i in range(12)):
        layers |= {b + "norm1": (d,), b + "attn.qkv": (3 * d, d), b + "attn.proj": (d, d),
                   b + "norm2": (d,), b + "mlp.fc1": (4 * d, d), b + "mlp.fc2": (d, 4 * d)}
        shapes |= {b + "ls1.gamma": (d,), b + "ls2.gamma": (d,)} if layer_scale else {}
    for name, shape in layers.items():
        shapes |= {name + ".weight": shape, name + ".bias": shape[:1]}
    return {name: 0.05 * randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}

def written_out(s, images, heads):
    """The class tokens of a ViT with the published weights s, as the papers define it."""
    def linear(x, name):
        return F.linear(x, s[name + ".weight"], s[name + ".bias"])

    def norm(x, name):
        return F.layer_norm(x, (d,), s[name + ".weight"], s[name + ".bias"], eps=1e-6)
    d, patch = s["patch_embed.proj.weight"].shape[::3]
    x = F.conv2d(images, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=patch)
    (B, _, n, _), n0 = x.shape, int(s["pos_embed"].shape[1] ** 0.5)
    grid = s["pos_embed"][:, 1:].reshape(1, n0, n0, d).permute(0, 3, 1, 2)
    if n != n0:
        grid = F.interpolate(grid, scale_factor=(n + 0.1) / n0, mode="bicubic", antialias=False)
    first = (s["cls_token"] + s["pos_embed"][:, :1]).expand(B, 1, d)
    x = torch.cat([first, (x + grid).flatten(2).mT], 1)
    for b in (f"blocks.{i}." for i in range(12)):
        qkv = linear(norm(x, b + "norm1"), b + "attn.qkv").reshape(B, -1, 3, heads, d // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = torch.softmax(q @ k.mT / (d // heads) ** 0.5, -1) @ v
        y = linear(y.transpose(1, 2).reshape(B, -1, d), b + "attn.proj")
        x = x + s.get(b + "ls1.gamma", 1) * y
        y = linear(F.gelu(linear(norm(x, b + "norm2"), b + "mlp.fc1")), b + "mlp.fc2")
        x = x + s.get(b + "ls2.gamma", 1) * y
    return norm(x, "norm")[:, 0]

@pytest.mark.parametrize("name, size, heads, state", [
    ("vit_ti_16", 224, 3, (192, 16, 14, False)), ("dinov2_vits14", 56, 6, (384, 14, 37, True))])
def test_published_weights_compute_the_written_out_vit(name, size, heads, state, tmp_path):
    s, images = published_state(*state), randn(2, 3, size, size)
    data.save(tmp_path / "w.pth", s)
    vit = substrate.load(name, tmp_path / "w.pth", image_size=size)
    assert_close(vit(images), written_out(s, images, heads), rtol=0, atol=1e-4)

def test_attention_and_a_block_are_pytorchs_encoder_layer():
    ours, x = substrate.Block(12, 3), randn(2, 5, 12)
    theirs = nn.TransformerEncoderLayer(12, 3, 48, 0, "gelu", 1e-6, batch_first=True, norm_first=True)
    qkv = ours.attn.query, ours.attn.key, ours.attn.value
    theirs.self_attn.in_proj_weight.data = torch.cat([layer.weight for layer in qkv])
    theirs.self_attn.in_proj_bias.data = torch.cat([layer.bias for layer in qkv])
    theirs.self_attn.out_proj, theirs.linear1, theirs.linear2 = ours.attn.proj, ours.fc1, ours.fc2
    assert_close(ours(x), theirs(x))
    assert_close(ours(x, n=1), theirs(x)[:, :1])

@pytest.mark.parametrize("name", substrate.CONFIGS)
def test_prepare_is_torchvisions_transforms(name):
    theirs = torchvision.models.ViT_B_16_Weights.DEFAULT.transforms()           # ImageNet's moments
    moments = ([0.5] * 3, [0.5] * 3) if name == "vit_ti_16" else (theirs.mean, theirs.std)
    vit, images = substrate.ViT(substrate.CONFIGS[name]._replace(depth=1), 112), pixels(2, 150)
    resize = v2.Resize([112, 112], v2.InterpolationMode.BICUBIC)
    expected = resize(torch.stack([images[0], images[1].flip(-1)]) / 255).clamp(0, 1)
    x = substrate.prepare(images, vit, flip=torch.tensor([False, True]))
    assert_close(x, v2.functional.normalize(expected, *moments), rtol=0, atol=1e-5)

def test_a_crop_is_a_part_of_the_enlarged_picture(tiny):
    images = pixels(2, 16)
    crop = torch.tensor([[0.5, 0, 0], [0.5, 0.25, -0.25]])      # pixels 4 to 12; 6 to 14, 2 to 10
    twice = F.interpolate(images / 255, 32, mode="bicubic", align_corners=False).clamp(0, 1)
    expected = torch.stack([twice[0, :, 8:24, 8:24], twice[1, :, 4:20, 12:28]])
    expected = v2.functional.normalize(expected, tiny.config.mean, tiny.config.std)
    assert_close(substrate.prepare(images, tiny, None, crop), expected, rtol=0, atol=1e-5)

def test_lora_with_B_zero_changes_nothing_and_only_lora_and_head_get_gradients(tiny):
    images, head = randn(3, 3, 16, 16), nn.Linear(192, 5)
    with torch.no_grad():                        # with gradients, attention may take another kernel
        before, _ = tiny(images), lora.add(tiny, generator=data.generator(0, 1))
        assert_close(tiny(images), before, rtol=0, atol=0)
        assert lora.get(tiny).any()
    head(tiny(images)).sum().backward()
    trained = {*map(id, lora.parameters(tiny)), *map(id, head.parameters())}
    for weight in (*tiny.parameters(), *head.parameters()):
        assert (weight.grad is not None) == (id(weight) in trained)

def test_lora_adds_B_A_x_and_theta_is_A_then_B_of_query_then_value_block_by_block(tiny):
    lora.add(tiny, rank=2, alpha=6)
    lora.set(tiny, torch.arange(6 * 2 * 2 * 2 * 192).float())
    attn, x, start = tiny.blocks[1].attn, randn(1, 192), 2 * 2 * 2 * 192
    for layer, at in ((attn.query, start), (attn.value, start + 2 * 2 * 192)):
        A = torch.arange(at, at + 2 * 192).float().reshape(2, 192)
        B = torch.arange(at + 2 * 192, at + 4 * 192).float().reshape(192, 2)
        assert_close(layer(x), layer.base(x) + 6 / 2 * x @ A.T @ B.T)
    assert type(attn.key) is type(attn.proj) is nn.Linear

def test_theta_goes_in_and_out_exactly_and_the_substrate_stays(tiny):
    before = {name: weight.clone() for name, weight in tiny.state_dict().items()}
    lora.add(tiny)
    for i in range(1000):
        lora.set(tiny, THETAS[i % 3])
    assert_close(lora.get(tiny), THETAS[999 % 3], rtol=0, atol=0)
    lora.remove(tiny)
    after = tiny.state_dict()
    assert [*before] == [*after] and all(equal(before[name], after[name]) for name in before)

def test_pretraining_writes_weights_that_load(tmp_path, monkeypatch):
    halves = [data.Images(pixels(n, 64), torch.arange(n) % 200, []) for n in (256, 8)]
    monkeypatch.setitem(data.LOADERS, "tinyimagenet", lambda data_dir: halves)
    assert "epoch 1/1" in command("vit.py", "--epochs", 1, "--out", tmp_path / "new.pt")
    new, old = substrate.load("vit_micro", tmp_path / "new.pt"), substrate.load("vit_micro")
    assert new(randn(1, 3, 64, 64)).isfinite().all() and new.digest != old.digest
    assert data.read(tmp_path / "new.json")["epochs"] == 1

# ---- the memories --------------------------------------------------------------------------------
def test_hopfield_read_is_pytorchs_from_the_mean_to_the_item():
    memory, keys, values = Hopfield(beta=0.05), randn(6, 30), randn(6, 50, seed=1)
    for key, value in zip(keys, values):
        memory.write(key, value)
    cues = keys + 0.1 * randn(6, 30, seed=2)
    theirs = F.scaled_dot_product_attention(cues[None], keys[None], values[None], scale=0.05)[0]
    assert_close(memory.read(cues), torch.cat([cues, theirs], 1))
    assert_close(memory.attention(cues[2]).float(), torch.softmax(0.05 * cues[2] @ keys.T, 0))
    memory.beta = 0.0
    assert_close(memory.read(keys[3])[30:], values.mean(0))
    memory.beta = Hopfield().beta
    assert memory.beta == 25
    assert_close(memory.read(keys), torch.cat([keys, values], 1), rtol=0, atol=0)

def memory_of_the_readme(dim):
    names, blocks = {"torch": torch, "F": F}, re.findall(r"```python\n(.*?)```", README, re.S)
    exec(next(block for block in blocks if "def write(" in block), names)
    return next(x for x in names.values() if isinstance(x, type) and hasattr(x, "write"))(dim)

@pytest.mark.parametrize("new", [lambda dim: Hopfield(), lambda dim: BayesPCN(dim, 64), memory_of_the_readme])
def test_a_memory_recalls_and_goes_on_from_a_file(new, tmp_path):
    memory, again, thetas = new(500), new(500), THETAS[:4, :500]
    for theta in thetas[:3]:
        memory.write(*lora.split_key(theta))
    data.save(tmp_path / "m.pt", {"memory": memory.state_dict()})
    again.load_state_dict(data.read(tmp_path / "m.pt")["memory"])
    for m in (memory, again):
        m.write(*lora.split_key(thetas[3]))
    for theta, theta_hat in zip(thetas, map(memory.read, thetas[:, :50])):
        assert (theta_hat - theta).norm() < theta.norm() / 2 and equal(theta_hat, again.read(theta[:50]))
    assert memory.nbytes == again.nbytes > 0

def stored(n=6, dim=60, n_key=20, **options):
    """A BayesPCN with n vectors written, and the vectors (n, dim)."""
    memory, thetas = BayesPCN(dim, **{"hidden": 32} | options), THETAS[:n, :dim].double()
    for theta in thetas:
        memory.write(theta[:n_key], theta[n_key:])
    return memory, thetas

def posterior(memory):
    return torch.cat([*map(torch.flatten, (*memory.R, *memory.U, memory.r)), torch.tensor([memory.u])])

def test_bayespcn_gives_yoo_and_woods_figures():
    """results/bayespcn_reference.npz: figures of their own implementation, in float64."""
    def theirs(stage):
        *R, r = (reference[f"{stage}_R{l}"] for l in range(layers))
        *U, u = (reference[f"{stage}_U{l}"] for l in range(layers))
        return R, U, r, u[0, 0].item()
    reference = np.load(HERE / "results/bayespcn_reference.npz")
    reference = {name: torch.from_numpy(x) for name, x in reference.items()}
    (dim, hidden, layers), tolerance = reference["meta"].tolist()[1:4], {"rtol": 1e-9, "atol": 1e-11}
    memory, rows = BayesPCN(dim, hidden, layers), [reference[f"act{l}"] for l in range(layers)]
    memory.R, memory.U, memory.r, memory.u = theirs("prior")
    assert_close(memory.log_joint(rows), reference["logp_prior"], **tolerance)
    memory.condition(rows)
    assert_close((memory.R, memory.U, memory.r, memory.u), theirs("post"), **tolerance)
    assert_close(memory.log_joint(rows), reference["logp_post"], **tolerance)
    memory.forget(0.3)
    assert_close((memory.R, memory.U, memory.r, memory.u), theirs("forget"), **tolerance)

@pytest.mark.parametrize("layers", [2, 4])
def test_condition_is_batch_bayesian_regression_in_any_order_and_is_forgotten(layers):
    memory, reverse = BayesPCN(40, 16, layers), BayesPCN(40, 16, layers)
    rows = [randn(7, width, seed=width).double() for width in (40, 16, 16, 16)[:layers]]
    before, (*R0, r0) = posterior(memory), (R.numpy().copy() for R in (*memory.R, memory.r))
    memory.condition(rows)
    for l in range(layers - 1):
        Z, Y = F.gelu(rows[l + 1]).numpy(), rows[l].numpy()
        U = np.linalg.inv(np.eye(16) + Z.T @ Z / 1e-4)
        R = U @ (R0[l] + Z.T @ Y / 1e-4)
        for ours, theirs in ((memory.U[l], U), (memory.R[l], R)):
            assert_close(ours, torch.from_numpy(theirs), rtol=1e-9, atol=1e-9)
    u = 1 / (1 + 7 / 1e-4)
    assert memory.u == pytest.approx(u, rel=1e-9)
    assert memory.r.numpy() == pytest.approx(u * (r0 + rows[-1].numpy().sum(0) / 1e-4), abs=1e-9)
    reverse.condition([x.flip(0) for x in rows])
    after = posterior(reverse)
    assert_close(posterior(memory), after, rtol=1e-9, atol=1e-9)
    memory.forget(1)
    reverse.forget(0)
    assert equal(posterior(memory), before) and equal(posterior(reverse), after)

def literal_energy(memory, x0, xs, d_0):
    """E of x0 (|x0|,), the first columns of x^0, and xs = x1 (H,), .., layer by layer."""
    R, targets, E, H = [memory.R[0][:, :len(x0)], *memory.R[1:]], [x0, *xs], 0, memory.hidden
    for l, above in enumerate(xs):
        z = F.gelu(above)
        v = memory.s2 + z @ memory.U[l] @ z
        residual = (targets[l] - z @ R[l]).square().sum()
        E = E + (residual / v + (H if l else d_0) * torch.log(2 * np.pi * v)) / 2
    v = memory.s2 + memory.u
    return E + ((xs[-1] - memory.r).square().sum() / v + H * np.log(2 * np.pi * v)) / 2

def literal_descent(memory, x0, d_0, stream):
    """The hidden activations (L-1, H) after torch's Adam on the literal energy; E at each step."""
    x, energies = memory.noise(stream, memory.layers - 1, memory.hidden).requires_grad_(), []
    adam = torch.optim.Adam([x], lr=memory.lr)
    for i in range(memory.steps):
        adam.param_groups[0]["lr"] = memory.lr * min(1, (1 - i / memory.steps) / 0.7)
        E = literal_energy(memory, x0, x, d_0)
        energies.append(E.item())
        if i and abs(energies[-1] - energies[-2]) < 1e-3:
            break
        adam.zero_grad()
        E.backward()
        adam.step()
    return x.detach(), energies

@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("width, d_0", [(60, 60), (20, 20), (20, 60)], ids=["write", "marginal", "joint"])
def test_energy_and_its_gradient_are_the_literal_ones(layers, width, d_0):
    (memory, thetas), x = stored(layers=layers), 0.1 * randn(layers - 1, 2, 32).double()
    E = memory.energy(x.requires_grad_(), memory.observe(thetas[:2, :width], d_0))
    gradient, = torch.autograd.grad(E.sum(), x)
    for i in range(2):
        xs, x0 = x[:, i].detach().clone().requires_grad_(), thetas[i, :width]
        if width < d_0:                          # joint: the missing values sit on their prediction
            x0 = torch.cat([x0, F.gelu(xs[0]) @ memory.R[0][:, width:]])
        literal = literal_energy(memory, x0, xs, d_0)
        literal.backward()
        assert_close(E[i], literal, rtol=1e-8, atol=0)
        assert (gradient[:, i] - xs.grad).norm() < 1e-8 * xs.grad.norm()

@pytest.mark.parametrize("read, d_0", [("marginal", 20), ("joint", 60)])
def test_write_and_read_are_the_literal_descent_and_trace_is_its_energy(read, d_0):
    """60 steps are enough to leave the start; rounding grows with the steps."""
    (memory, thetas), (twin, _) = stored(5, read=read), stored(5, read=read)
    memory.steps, key, new = 60, thetas[2, :20], THETAS[9, :60].double()
    x, energies = literal_descent(memory, key, d_0, stream=4)
    literal = F.gelu(x[0]) @ memory.R[0][:, 20:]
    assert (memory.read(key)[20:] - literal).norm() < 1e-6 * literal.norm()
    assert memory.trace[:, 0].tolist() == pytest.approx(energies, rel=1e-6)
    x, energies = literal_descent(memory, new, 60, stream=4 + 1 + 5)
    twin.condition([new[None], *x[:, None]])
    memory.write(new[:20], new[20:])
    assert (posterior(memory) - posterior(twin)).norm() < 1e-6 * posterior(twin).norm()
    assert memory.trace[:, 0].tolist() == pytest.approx(energies, rel=1e-6) and energies[-1] < energies[0]

def test_bayespcn_recalls_whatever_the_batch_and_joint_recalls_too_faintly():
    memory, thetas = stored(10, 400, 40, hidden=64)
    keys, values = thetas[:, :40], thetas[:, 40:]
    together = memory.read(keys)
    assert ((together[:, 40:] - values).norm(dim=1) / values.norm(dim=1)).max() < 0.17
    for theta_hat, key in zip(together, keys):
        assert (memory.read(key) - theta_hat).norm() < 1e-5 * theta_hat.norm()
    memory.read_mode = "joint"
    faint = memory.read(keys)[:, 40:]
    assert torch.cosine_similarity(faint, values).min() > 0.95
    assert (faint.norm(dim=1) < 0.97 * values.norm(dim=1)).all()

# ---- data.py -------------------------------------------------------------------------------------
def test_split_is_a_shuffled_partition_and_a_tenth_is_held_out():
    tasks, (images, labels) = data.split(100, 20, 0), (torch.arange(60).byte(), torch.arange(60) % 6)
    assert sorted(sum(tasks, [])) == [*range(100)] != sum(tasks, []) and {*map(len, tasks)} == {5}
    assert tasks == data.split(100, 20, 0) != data.split(100, 20, 1)
    half = data.Images(images, labels, [*"abcdef"])
    task_ids, places = data.task_labels(half, [[4, 0], [1, 5]])[:, :6].tolist()
    assert task_ids == [0, 1, -1, -1, 0, 1] and places == [1, 0, -1, -1, 0, 1]
    assert [x.tolist()[:4] for x in data.task(half, [3, 1])] == [[1, 3, 7, 9], [1, 0, 1, 0]]
    train, test = data.hold_out(half)
    assert test.labels.bincount().tolist() == [1] * 6 and equal(test.images % 6, test.labels)
    assert equal(torch.cat([train.images, test.images]).sort()[0], images)

def test_glyphs_are_reproducible_and_strokes_cover_what_is_near():
    (train, test), (again, _) = data.glyphs(None, 2, 1), data.glyphs(None, 2, 1)
    assert train.images.shape == (200, 3, 64, 64) and equal(train.images, again.images)
    assert len({image.numpy().tobytes() for image in (*train.images, *test.images)}) == 300
    points, stroke = np.array([[[0, 1, 2.5, 0.5]], [[0, 0.3, 0, -0.2]]]), np.array([[[0.0, 0], [2, 0]]])
    distance, ink = np.array([[0, 0.3, 0.5, 0.2]]), data.coverage(*points, [stroke], np.array([[0.2]]))
    assert ink == pytest.approx(((0.2 - distance) / 0.03 + 0.5).clip(0, 1), abs=1e-6)

def test_cifar100_in_its_own_format(tmp_path, monkeypatch):
    """Eight random pictures. torchvision would compare the files' md5 with the official one."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    half = {"data": pixels(8, 32).flatten(1).numpy(), "fine_labels": (fine := [5, 1, 4, 1, 2, 0, 3, 5])}
    (tmp_path / "cifar-100-python").mkdir()
    for name, content in (("train", half), ("test", half), ("meta", {"fine_label_names": [*"abcdef"]})):
        (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps(content, protocol=2))
    for images, labels, classes in data.load("cifar100", tmp_path):
        assert equal(images, pixels(8, 32)) and classes == [*"abcdef"] and labels.tolist() == fine

def test_tinyimagenet_in_its_official_layout(tmp_path, monkeypatch):
    """Four training and two val pictures a class; the shade tells the class; some are grey."""
    folder, rows, wnids = tmp_path / "tiny-imagenet-200", [], ("n03", "n01", "n02")
    for c, wnid in enumerate(wnids):
        names = [f"train/{wnid}/images/{i}.JPEG" for i in range(4)]
        for i, name in enumerate([*names, f"val/images/{c}", f"val/images/{5 - c}"]):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (64, 64), 60 * c + i).convert("L" if i == 2 else "RGB").save(folder / name, "JPEG")
        rows += [f"{i}\t{wnid}\t0\t0\t9\t9\n" for i in (c, 5 - c)]
    (folder / "val/val_annotations.txt").write_text("".join(rows))
    (folder / "wnids.txt").write_text("\n".join(wnids))
    (folder / "words.txt").write_text("n01\tcat, felis\nn02\tdog\nn03\tfish\n")
    with pytest.raises(ValueError, match="train does not hold 500 images of each class"):
        data.load("tinyimagenet", tmp_path)
    monkeypatch.setattr(data.decode_tinyimagenet, "__defaults__", (4, 2))
    for _ in range(2):                           # the second time, from the cache
        for (images, labels, classes), n in zip(data.load("tinyimagenet", tmp_path), (4, 2)):
            assert classes == ["fish", "cat", "dog"] and images.shape == (3 * n, 3, 64, 64)
            assert (images / 60).mean((1, 2, 3)).int().tolist() == labels.tolist()
        shutil.rmtree(folder, ignore_errors=True)

@pytest.fixture(scope="session")
def pets(tmp_path_factory):
    """A data set of one's own: 25 x 20 pictures of eight colours, three to train and two to test."""
    folder, rng = tmp_path_factory.mktemp("pets"), np.random.default_rng(0)
    for c, colour in enumerate(rng.integers(60, 196, (8, 1, 1, 3))):
        for half, i in zip(["train"] * 3 + ["test"] * 2, range(5)):
            image = (colour + rng.integers(-60, 60, (4, 5, 3))).repeat(5, 0).repeat(5, 1)
            (folder / f"{half}/pet{c}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(folder / f"{half}/pet{c}/{i}.png")
    return folder

def test_a_folder_of_ones_own_can_be_read_and_looked_at(pets, tmp_path, monkeypatch):
    train, test = data.load("folder", pets)
    assert train.images.shape == (24, 3, 224, 224) and train.labels.tolist() == sorted(3 * [*range(8)])
    middle = np.asarray(ImageOps.fit(Image.open(pets / "test/pet1/3.png"), (224, 224)), float)
    assert test.labels[2] == 1 and test.classes == [f"pet{c}" for c in range(8)]
    assert np.abs(test.images[2].permute(1, 2, 0).numpy() - middle).mean() < 6
    monkeypatch.chdir(tmp_path)
    assert "pet0" in command("data.py", "--dataset", "folder", "--data-dir", pets)
    assert equal(data.picture("folder-sample.png", 224), test.images[0])
    assert data.picture("folder.png", 99).float().std() > 9
    shutil.copytree(pets / "train", "train")
    shutil.copytree(pets / "test/pet1", "test/pet1")
    with pytest.raises(ValueError, match="different classes"):
        data.load("folder", tmp_path)

@pytest.mark.filterwarnings("ignore:The image decoding")
def test_pictures_are_upright_and_rgb_and_broken_ones_are_named(tmp_path, monkeypatch):
    jpg, png, image = tmp_path / "p.jpg", tmp_path / "p.png", pixels(1, 16)[0, :, :8].permute(1, 2, 0).numpy()
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(image).save(jpg, exif=exif)
        theirs = torchvision.io.decode_image(str(jpg), apply_exif_orientation=True)
        assert theirs.shape[1] == (16 if orientation > 4 else 8)
        assert equal(data.picture(jpg, 8), torchvision.transforms.functional.center_crop(theirs, 8))
    Image.fromarray(image[:, :, 0]).save(png)
    assert (data.picture(png, 8).numpy() == image[:, 4:12, 0]).all()
    for whole in (jpg.read_bytes(), png.read_bytes()):
        for content in (b"", b"no picture", whole[:40], whole[:-50]):
            jpg.write_bytes(content)
            with pytest.raises(ValueError, match="p.jpg cannot be read"):
                data.picture(jpg, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)          # Pillow refuses twice as many
    with pytest.raises(ValueError, match="p.png cannot be read"):
        data.picture(png, 8)

def test_a_file_is_whole_or_not_there_and_damage_is_named(tmp_path, monkeypatch):
    content, path = {"a": randn(1000), "b": [1, {"c": torch.tensor(True)}]}, tmp_path / "new/a.pt"
    data.save(path, content)
    whole = path.read_bytes()
    assert str(data.read(path)) == str(content) and [*path.parent.iterdir()] == [path]
    for broken in (whole[:-9], whole[:2000] + b"x" + whole[2001:], b"", b"u", b"text", pickle.dumps([1], 2)):
        (tmp_path / "b.pt").write_bytes(broken)
        with pytest.raises(ValueError, match="b.pt is damaged"):
            data.read(tmp_path / "b.pt")
    monkeypatch.setattr(torch, "save", lambda content, path: path.write_text("half") / 0)
    with pytest.raises(ZeroDivisionError):
        data.save(path, content)
    assert path.read_bytes() == whole

# ---- training and the algorithms -----------------------------------------------------------------
def test_fit_is_adamw_with_cosine_decay():
    x, y, ours, theirs = randn(20, 3), torch.arange(20) % 2, nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    loss, _ = til.fit(lambda x, _: ours(x), ours.parameters(), x, y, 4, 8, data.generator(3), smoothing=0.2)
    generator, adamw = data.generator(3), torch.optim.AdamW(theirs.parameters(), 0.005, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, 12, eta_min=0.0001)
    for epoch in range(4):
        order, losses = torch.randperm(20, generator=generator), []
        torch.rand(20, generator=generator)      # the flips
        for batch in order.split(8):
            each = -((0.8 * F.one_hot(y[batch], 2) + 0.1) * theirs(x[batch]).log_softmax(1)).sum(1)
            losses += each.tolist()
            adamw.zero_grad()
            each.mean().backward()
            adamw.step()
            schedule.step()
    assert_close(ours.weight, theirs.weight)
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)

def test_algorithm_1_stores_what_was_learned_from_each_task_alone():
    def learn(t, images, labels):
        seen.append([t, images.tolist(), labels.tolist()])
        return thetas[t - 1]
    seen, thetas, train = [], THETAS[:2, :39], data.Images(torch.arange(12), torch.arange(12) % 6, "abcdef")
    memory, keys = til.til_training([[0, 1, 3], [5, 2, 4]], train, Hopfield(), learn)
    assert seen == [[1, [0, 1, 3, 6, 7, 9], [0, 1, 2] * 2], [2, [2, 4, 5, 8, 10, 11], [1, 2, 0] * 2]]
    assert_close(torch.stack(keys), thetas[:, :3], rtol=0, atol=0)
    assert_close(torch.cat([memory.K, memory.V]).T, thetas, rtol=0, atol=0)

@pytest.fixture
def recalling(tiny):
    """The substrate with LoRA, the keys of THETAS, and a Hopfield memory of them."""
    memory = Hopfield()
    for theta in THETAS:
        memory.write(*lora.split_key(theta))
    lora.add(tiny, alpha=12)
    return tiny, [*memory.K.T], memory

def test_algorithm_2_equals_merged_weights(recalling):
    (vit, keys, memory), head, images = recalling, nn.Linear(192, 4), pixels(10, 20)
    logits = til.til_inference(vit, head, images, keys[1], memory)
    lora.set(vit, THETAS[1])
    lora.merge(vit)
    assert not any(isinstance(module, lora.LoRALinear) for module in vit.modules())
    assert_close(logits, head(vit(substrate.prepare(images, vit))).detach(), rtol=0, atol=1e-4)

# Of six pictures: p(c | x) for the six classes of three tasks.
P = torch.tensor([[3, 2, 0, 4, 1, 0], [2, 2, 3, 0, 3, 0], [0, 2, 3, 3, 2, 0],
                  [1, 0, 4, 0, 2, 3], [2, 0, 3, 0, 3, 2], [3, 3, 0, 4, 0, 0]]) / 10

@pytest.mark.parametrize("p", [P.view(6, 3, 2).sum(2), P], ids=["tasks", "classes"])
def test_algorithm_4_where_the_answer_is_known(recalling, monkeypatch, p):
    """Which task it finds, and with which modulation and head it then classifies each picture."""
    def features(vit, images):
        used.append((lora.get(vit), images.flatten().tolist()))
        return F.one_hot(images.flatten().long(), 6).float()
    def head(logits):                            # (6, n): of each picture
        linear = nn.Linear(6, logits.shape[1], bias=False)
        linear.weight.data = logits.T
        return linear
    monkeypatch.setattr(substrate, "features", features)
    (vit, keys, memory), images, answers, used = recalling, torch.arange(6).byte(), randn(3, 6, 2), []
    inputs = vit, (THETAS[9], head(p.log().clamp(-99))), [*map(head, answers)], images, keys[:3], memory
    t_hat, logits = mts.mts_inference(*inputs)
    assert t_hat.tolist() == [0, 0, 1, 2, 2, 0]
    assert_close(logits, answers[t_hat, torch.arange(6)], rtol=0, atol=0)
    assert equal(used[0][0], THETAS[9]) and used[0][1] == [*range(6)]
    for theta, pictures in used[1:]:
        recalled = {t for t in range(3) if equal(theta, THETAS[t])}
        assert recalled == {*t_hat[pictures].tolist()}          # the tasks that were found

def test_an_answer_does_not_depend_on_the_batch(recalling):
    (vit, keys, memory), images, heads = recalling, pixels(32, 16), [nn.Linear(192, 5) for _ in range(5)]
    lora.set(vit, THETAS[9])                     # with this bias, the predictor finds several tasks
    heads[0].bias.data = -heads[0](substrate.features(vit, images)).detach().mean(0)
    inputs = vit, (THETAS[9], heads[0]), heads
    t_hat, together = mts.mts_inference(*inputs, images, keys[:5], memory)
    alone = (mts.mts_inference(*inputs, image[None], keys[:5], memory) for image in images)
    tasks, logits = map(torch.cat, zip(*alone))
    assert equal(tasks, t_hat) and len(t_hat.unique()) > 1
    assert_close(logits, together, rtol=0, atol=1e-5)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_bits_twice_and_the_losses_of_the_plain_loop(tmp_path, monkeypatch):
    """Also with more than 128 tokens, where PyTorch adds up gradients in any order by default."""
    monkeypatch.setattr(data.glyphs, "__defaults__", (8, 1))
    words = "--splits 4 --batch-size 60 --image-size 128 --epochs 8 --out".split()
    texts = [command("til.py", *words, tmp_path / out, *more) for out, *more in ("a", "b", ("c", "--plain"))]
    losses = [[float(loss) for loss in re.findall(r"task .* loss (\S+)", out)] for out in texts]
    thetas = [data.read(path)["theta"] for path in tmp_path.glob("[ab]/*/adapters/4.pt")]
    assert equal(*thetas) and losses[2] == pytest.approx(losses[0], abs=0.1)

# ---- the commands --------------------------------------------------------------------------------
PETS = ("--dataset folder --splits 4 --backbone vit_micro --image-size 16 --rank 2 --epochs 10 "
        "--device cpu --data-dir").split()
RUN, VARIANT = "folder-4s-vit_micro-r2-seed0", "bayespcn:read=joint,hidden=32,steps=60"
KEYS = {*"faa_gt faa drop controls recall_error per_task images_per_second wall_seconds device".split()}
CONTROLS = {"none", "wrong", "mean", "linear"}

def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("adapters/*.pt")}

def test_the_main_job_on_small_glyphs(tmp_path, monkeypatch):
    """Training, memory, evaluation, table; then the same again, and another memory."""
    monkeypatch.setattr(data.glyphs, "__defaults__", (2, 1))
    words = *"--splits 10 --epochs 1 --image-size 16 --device cpu --out".split(), tmp_path
    out, run = command("til.py", *words, "--seeds", 0, 1), tmp_path / "glyphs-10s-vit_micro-r8-seed0"
    result, before = data.read(run / "til-hopfield.json"), times(tmp_path)
    assert KEYS <= {*result} and {*result["controls"]} == CONTROLS and len(before) == 20
    assert result["drop"] == 0 and result["recall_error"] == {"mean": 0, "max": 0}
    assert "0 of 10 tasks found" in out and "task  10/10" in out and "| 0 1 |" in out
    out, again = command("til.py", *words, "--seeds", 0, 1), data.read(run / "til-hopfield.json")
    assert out.count("10 of 10 tasks found in") == 2 == out.count("not trained again")
    assert "task  10/10" not in out and again | {"wall_seconds": 0} == result | {"wall_seconds": 0}
    out, name = command("til.py", *words, "--memory", VARIANT), f"til-{VARIANT.replace(':', '-')}.json"
    assert f"| `{VARIANT} --" in out and data.read(run / name)["faa_gt"] == result["faa_gt"]
    assert data.read(run / name)["recall_error"]["mean"] > 0 and data.read(run / "til-hopfield.json") == again
    out = command("evaluate.py", *tmp_path.iterdir())
    assert "| `hopfield --" in out and f"| `{VARIANT} --" in out and times(tmp_path) == before

@pytest.fixture(scope="session")
def finished(pets, tmp_path_factory):
    """The folder of a run that til.py and mts.py have finished. To be read only."""
    words = *PETS, pets, "--out", tmp_path_factory.mktemp("finished")
    for script, *more in (("mts.py",), ("mts.py", "--predictor", "classes"), ("til.py",)):
        assert "FAA_GT" in command(script, *words, *more)
    return words[-1] / RUN

@pytest.fixture
def words(finished, pets, tmp_path):
    """The command line of a finished run, whose folder is copied to tmp_path / RUN."""
    shutil.copytree(finished, tmp_path / RUN)
    return *PETS, pets, "--out", tmp_path

def by_hand(made, images):
    """C(x; W, theta) with theta merged into the weights; made: the content of an adapter's file."""
    vit = substrate.load("vit_micro", image_size=16)
    lora.add(vit, 2, 8)
    lora.set(vit, made["theta"])
    lora.merge(vit)
    return F.linear(vit(substrate.prepare(images, vit)), **made["head"])

@pytest.mark.parametrize("variant", ["", "-classes"])
def test_the_figures_follow_from_the_files(finished, pets, variant):
    (_, test), tasks, hits = data.load("folder", pets), data.split(8, 4, 0), []
    til_result = data.read(finished / "til-hopfield.json")
    mts_result = data.read(finished / f"mts-hopfield{variant}.json")
    p = by_hand(data.read(finished / f"predictor{variant}.pt"), test.images).softmax(1)
    adapters = [data.read(finished / f"adapters/{t}.pt") for t in range(1, 5)]
    thetas = torch.stack([adapter["theta"] for adapter in adapters])
    gt, wrong, none = ([by_hand(a | {"theta": x}, test.images).argmax(1) for a, x in zip(adapters, used)]
                       for used in (thetas, thetas.roll(1, 0), 0 * thetas))
    for i, found in enumerate(p.view(16, 4, -1).sum(2).argmax(1)):
        t = next(t for t, classes in enumerate(tasks) if test.labels[i] in classes)
        answer, told = gt[found][i], [tasks[t][x[t][i]] for x in (gt, wrong, none)]
        labels = tasks[t][answer], tasks[found][answer], *told
        hits.append([found == t, *(label == test.labels[i] for label in labels)])
    figures = [mts_result[name] for name in ("task_accuracy", "faa_local", "faa_strict", "faa_gt")]
    figures += [til_result["controls"][name] for name in ("wrong", "none")]
    assert figures == pytest.approx(100 * np.mean(hits, 0))     # every task has as many pictures
    assert mts_result["drop"] == pytest.approx(til_result["faa_gt"] - mts_result["faa_local"])
    assert KEYS <= {*mts_result} and {*mts_result["controls"]} == CONTROLS

def test_a_picture_is_classified(finished, words, pets):
    picture, tasks = pets / "test/pet0/3.png", data.split(8, 4, 0)
    p = by_hand(data.read(finished / "adapters/2.pt"), data.picture(picture, 16)[None]).softmax(1)[0]
    ranking = sorted(zip(p.tolist(), tasks[1]), reverse=True)
    out = command("til.py", *words, "--predict", picture, "--task", 2)
    assert re.findall(r"(\S+) % +pet(\d)", out) == [(f"{100 * q:.2f}", str(c)) for q, c in ranking]
    for predictor in ("tasks", "classes"):
        out = command("mts.py", *words, "--predictor", predictor, "--predict", picture)
        t = int(re.search(r"^task (\d) of 4$", out, re.M)[1])
        assert {*re.findall(r"% +pet(\d)", out)} == {*map(str, tasks[t - 1])}

def assert_same(a, b):
    """Two run folders hold the same weights, bit for bit, and the same figures."""
    for path in (*times(a), *a.glob("predictor.pt")):
        ours, theirs = data.read(path), data.read(b / path.relative_to(a))
        assert equal(ours["theta"], theirs["theta"]) and equal(ours["head"]["bias"], theirs["head"]["bias"])
    for path in (*a.glob("til-*.json"), *a.glob("mts-*.json")):
        assert data.read(path)["per_task"] == data.read(b / path.name)["per_task"]
    assert len(times(a)) == 4

def test_what_is_missing_is_made_again_with_the_same_bits(finished, words, tmp_path):
    for name in ("adapters/2.pt", "adapters/3.pt", "predictor.pt"):
        (tmp_path / RUN / name).unlink()
    kept, out = times(tmp_path), command("mts.py", *words)
    assert "2 of 4 tasks found" in out and "task   2/4" in out and "task   1/4" not in out
    assert kept.items() <= times(tmp_path).items()
    assert_same(tmp_path / RUN, finished)

def test_a_run_with_other_options_weights_or_images_is_refused(words, pets, tmp_path):
    before, weights, mine = times(tmp_path), shutil.copy(WEIGHTS, tmp_path / WEIGHTS.name), tmp_path / "pets"
    assert "4 of 4 tasks found" in command("til.py", *words, "--weights", weights)
    state = torch.load(WEIGHTS, weights_only=True)
    data.save(weights, state | {"norm.bias": state["norm.bias"] + 1})
    shutil.copytree(pets, mine)
    shutil.copy(mine / "train/pet1/0.png", mine / "train/pet0/0.png")
    for option, *value in (("epochs", 2), ("image_size", 24), ("weights", weights), ("validate",),
                           ("data_dir", mine), ("label_smoothing", 0.1)):
        line = refused("mts.py", *words, "--" + option.replace("_", "-"), *value)
        assert {"data_dir": "images"}.get(option, option) in line and RUN in line and "--out" in line
    line = refused("evaluate.py", "probe", tmp_path / RUN, *PETS[-3:], pets, "--weights", weights)
    assert "other weights" in line
    assert "0 of 4 tasks found" in command("til.py", *words, "--seeds", 1)
    assert before.items() <= times(tmp_path).items()

def test_a_run_of_other_code_is_refused_and_comments_do_not_count(words, tmp_path, monkeypatch):
    def edit(name, old, new):                    # the next command runs the new code
        for module in modules:
            monkeypatch.delitem(sys.modules, module, raising=False)
        text = (tree / name).read_text()
        assert old in text, (name, old)
        (tree / name).write_text(text.replace(old, new))
    tree, modules = tmp_path / "tree", "vit lora hopfield bayespcn data evaluate til mts".split()
    before, files = times(tmp_path), {"weights", WEIGHTS.name, "results", "paper.json"}
    files |= {f"{module}.py" for module in modules}
    shutil.copytree(HERE, tree, ignore=lambda folder, names: {*names} - files)
    monkeypatch.syspath_prepend(str(tree))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    edit("lora.py", "def get(vit):", "# mine\ndef get(  vit  ):")
    assert "memory found" in command(tree / "til.py", *words)
    for name, old, new in (("lora.py", "def get(  vit", "def get(vit, mine=0"), ("vit.py", "1e-6", "1e-5"),
                           ("data.py", "def task(half", "def task(half, *"), ("til.py", "AdamW(", "SGD("),
                           ("mts.py", "def flips_and_crops(n", "def flips_and_crops(mine, n")):
        edit(name, old, new)
        line = refused(tree / "mts.py", *words)
        assert f"code of {name}" in line and RUN in line and "--out" in line
        edit(name, new, old)
    edit("hopfield.py", "value = self.attention(key)", "value = 0 * self.attention(key)")
    assert "hopfield.pt was made by other code: it is written" in command(tree / "til.py", *words)
    result = data.read(tmp_path / RUN / "til-hopfield.json")
    assert result["recall_error"]["mean"] == 1 and times(tmp_path) == before

class Hostile(type(HERE)):
    """Whoever unpickles this path makes a folder there."""
    def __reduce__(self):
        return Path.mkdir, (Path(self),)

def test_swapped_damaged_foreign_and_hostile_files_are_named(words, tmp_path):
    command("til.py", *words, "--seeds", 1)
    run, other, hostile = tmp_path / RUN, tmp_path / (RUN[:-1] + "1"), Hostile(tmp_path / "executed")
    data.save(tmp_path / "w.pt", {"cls_token": hostile})
    (tmp_path / "b.pt").write_bytes(pickle.dumps(hostile, 2))
    for name, source in (
            ("adapters/1.pt", run / "adapters/2.pt"), ("adapters/4.pt", other / "adapters/4.pt"),
            ("adapters/2.pt", tmp_path / "w.pt"), ("hopfield.pt", tmp_path / "b.pt"),
            ("adapters/3.pt", WEIGHTS), ("hopfield.pt", HERE / "til.py"), ("config.json", HERE / "til.py"),
            ("predictor.pt", run / "predictor-classes.pt"), ("hopfield.pt", other / "hopfield.pt")):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(source.read_bytes())
        assert str(run / name) in refused("mts.py", *words)
        (run / name).write_bytes(whole)
    assert "w.pt is damaged" in refused("til.py", *words, "--weights", tmp_path / "w.pt")
    assert not hostile.exists()
    assert torch.load(tmp_path / "w.pt", weights_only=False) and hostile.exists()       # executes it

def test_damaged_bytes_are_refused_or_do_no_harm(words, tmp_path, finished):
    rng, run, refusals = np.random.default_rng(0), tmp_path / RUN, 0
    files = [run / "config.json", run / "hopfield.pt", run / "predictor.pt", *sorted(times(run))]
    for path in (files[i] for i in rng.integers(len(files), size=20)):
        whole = path.read_bytes()
        at = rng.integers(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ rng.integers(1, 256)]) + whole[at + 1:])
        out = command("mts.py", *words, codes=(0, 2))
        assert "FAA_GT" in out or str(path) in out
        refusals += "FAA_GT" not in out
        path.write_bytes(whole)
        assert_same(run, finished)
    assert refusals > 10

def start(script, *words, by=""):
    line = map(str, [sys.executable, *by.split(), HERE / script, *words])
    return subprocess.Popen([*line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def test_a_killed_command_goes_on_to_the_same_bits(finished, words, tmp_path):
    """SIGKILL at a random moment of the training, which takes about a second."""
    words = *words, "--out", tmp_path / "new"
    with start("mts.py", *words) as process:
        assert any("task   1/4" in line for line in process.stdout)
        time.sleep(np.random.default_rng().uniform(0, 1))
        process.kill()
    kept = times(words[-1])
    command("mts.py", *words)
    assert kept and kept.items() <= times(words[-1]).items()
    assert_same(words[-1] / RUN, finished)

@pytest.mark.parametrize("n, by", [(2, ""), (1, "-m torch.distributed.run --standalone --nproc_per_node 2")])
def test_two_processes_give_what_one_gives(finished, words, tmp_path, n, by):
    words = *words, "--out", tmp_path / "new"
    for process in [start("til.py", *words, by=by) for _ in range(n)]:
        out, err = process.communicate()
        assert process.returncode == 0 and out.count("| FAA_GT |") == 1, err
    assert_same(words[-1] / RUN, finished)

@pytest.mark.parametrize("name, weight, said", [
    ("norm.bias", None, "not fit .*norm.bias"), ("norm.bias", torch.ones(7), "not fit .*norm.bias"),
    ("mine", torch.ones(1), "not fit .*mine"), ("norm.weight", torch.ones(192) / 0 * 0, "loss is nan")])
def test_weights_that_do_not_fit_or_give_no_finite_loss_are_one_line(words, tmp_path, name, weight, said):
    state = torch.load(WEIGHTS, weights_only=True) | {name: weight}
    data.save(tmp_path / "w.pt", {key: value for key, value in state.items() if value is not None})
    words = *words, "--weights", tmp_path / "w.pt", "--out", tmp_path / "new"
    assert re.search(said, refused("til.py", *words)) and not times(words[-1])

@pytest.mark.parametrize("line, said", [
    ("til.py --dataset mnist", "mnist"), ("til.py --memory brain", "brain"), ("til.py --splits 3", "choose"),
    ("til.py --memory hopfield:mine=1", "mine"), ("til.py --memory bayespcn:read=both", "both"),
    ("til.py --weights no.pt", "no.pt"), ("til.py --weights README.md", "README.md is damaged"),
    ("til.py --image-size 17", "multiple of the patch"), ("til.py --backbone resnet", "resnet"),
    ("til.py --data-dir no/such", "no/such"), ("til.py --predict no.png --task 1", "no.png"),
    ("til.py --predict README.md --task 1", "README.md cannot be read"), ("til.py --predict PET", "--task"),
    ("til.py --predict PET --task 0", "--task"), ("til.py --predict PET --task 5", "--task"),
    ("til.py --memory hopfield:beta=x", "beta=x"), ("til.py --epochs 0", "1 or more"),
    ("til.py --rank 0", "1 or more"), ("til.py --batch-size -1", "1 or more"),
    ("til.py --image-size -8", "1 or more"), ("evaluate.py nothing", "no results in nothing"),
    ("til.py --device cuda", "no GPU"), ("mts.py --predictor mine", "mine"), ("mts.py --task 1", "--task"),
    ("evaluate.py probe no/such", "no/such"), ("evaluate.py bench --memory bayespcn:lr=false", "malf")])
def test_mistakes_on_a_command_line_are_one_line(words, pets, monkeypatch, line, said):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script, *more = line.replace("PET", f"{pets}/test/pet0/3.png").split()
    assert said in refused(script, *(words if script in ("til.py", "mts.py") else ()), *more)

def test_without_network_one_line_says_what_to_do(words, tmp_path, monkeypatch):
    """A proxy that refuses stands for a machine without network."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request._opener", None)         # it keeps the proxies of its first use
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    line = refused("til.py", "--dataset", "cifar100", "--data-dir", tmp_path)
    assert "cannot load cifar100" in line and f"in {tmp_path}" in line
    line = refused("til.py", *words, "--backbone", "vit_ti_16")
    assert "cannot download https://" in line and "--weights" in line and "vit_micro" in line

# ---- evaluate.py, README.md and results/ ---------------------------------------------------------
RESULT = {"setting": "til", "dataset": "cifar100", "splits": 20, "memory": "hopfield", "seed": 0, "epochs": 3,
          "backbone": "vit_ti_16", "image_size": 224, "rank": 8, "alpha": 8, "batch_size": 64, "faa_gt": 98.0,
          "validate": False, "plain": False, "faa": 97.0, "drop": 1.0, "recall_error": {"mean": 0.25},
          "controls": dict.fromkeys(CONTROLS, 9.0), "device": "H100"}

def test_metrics_by_hand_and_tables_with_deviations_and_the_papers_rows():
    def rows(*results):
        lines = [line for line in evaluate.report(results).splitlines() if line.startswith("| ")]
        return [re.split(r" *\| *", line)[1:-1] for line in lines[1:]]
    hits, task_ids = torch.tensor([True, False, True, True]), torch.tensor([0, 0, 1, 1])
    assert evaluate.per_task(hits, task_ids) == [50, 100] and evaluate.faa([50.0, 100.0]) == 75
    theta, theta_hat = torch.tensor([9.0, 3, 4, *[0] * 7]), torch.tensor([0.0, 0, 4, *[0] * 7])
    assert evaluate.recall_error(theta_hat, theta) == pytest.approx(3 / 5)      # 9 is the key
    other = RESULT | {"seed": 1, "faa": 95.0, "drop": 3.0}
    ours, paper = rows(other, RESULT)
    assert ours[:4] == ["`hopfield`", "0 1", "98.00 ± 0.00", f"96.00 ± {2 ** 0.5:.2f}"] and len(ours) == 10
    assert paper[:5] == ["paper", "3 seeds", "97.29 ± 0.30", "97.12 ± 0.44", "0.0026 ± 0.01"]
    for change in ({"rank": 4}, {"epochs": 9}, {"validate": True}, {"memory": "other"}, {"image_size": 32}):
        rows_of_both = [row[3] for row in rows(RESULT, other | change) if row[0] != "paper"]
        assert sorted(rows_of_both) == ["95.00", "97.00"]       # not averaged
    with pytest.raises(ValueError, match="two results"):
        rows(RESULT, RESULT | {"faa": 1.0})
    tables = evaluate.report([RESULT | {"rank": 4}], paper=True)
    assert all(x in tables for x in ("96.60 ± 0.37", "1.71 ± 0.20", "3.50 ± 3.50", "83.27 ± 0.18"))

def understood(script, words):
    """The arguments that a command line comes to; no work is done."""
    def stop(parser, *args):
        found.append(parse(parser, *args))
        sys.exit()
    found, parse = [], argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        command(script, *words)
    return found[0]

def test_a_row_of_a_table_names_the_command_that_gave_it(finished):
    files = [path for folder in (finished, HERE / "results") for path in folder.rglob("[tm]*s*-*.json")]
    changes = {"memory": VARIANT}, {"rank": 4, "alpha": 2, "plain": True}, {"validate": True}
    for result in [*map(data.read, files), *(RESULT | change for change in changes)]:
        words = ["--dataset", result["dataset"], "--splits", result["splits"], "--memory"]
        args = understood(f"{result['setting']}.py", words + evaluate.label(result).split())
        for name in ("memory", "rank", "alpha", "epochs", "validate", "predictor", "label_smoothing"):
            assert (getattr(args, name, 0) or 0) == (result.get(name) or 0), (name, result)
        for name in ("backbone", "image_size", "batch_size"):   # None: what is usual for the data set
            assert getattr(args, name) in (None, result[name]), (name, result)
        assert args.plain == result["plain"] or "CPU" in result["device"]       # where it changes nothing

def test_probe_and_bench_measure_the_memories_alone(words, pets, tmp_path):
    names, run = "hopfield hopfield:beta=0 bayespcn:hidden=32,steps=50".split(), tmp_path / RUN
    command("evaluate.py", "probe", run, *PETS[-3:], pets, "--memory", *names)
    rows = data.read(run / "probe.json")["rows"]
    errors = {(row["memory"], row["stored"], row["noise"]): row["error"] for row in rows}
    thetas = [data.read(run / f"adapters/{t}.pt")["theta"] for t in range(1, 5)]
    for n in (2, 4):                             # at beta 0 it recalls the mean of what is stored
        mean = [evaluate.recall_error(sum(thetas[:n]) / n, theta) for theta in thetas[:n]]
        assert errors[names[1], n, 0] == pytest.approx(np.mean(mean), rel=1e-5)
    assert errors[names[0], 4, 0] < 1e-6 < errors[names[2], 4, 0] < 0.5 < errors[names[2], 4, 30]
    command("evaluate.py", *"bench --tasks 5 --dim 4800 --out".split(), run / "b.json", "--memory", *names)
    hopfield, blend, bayespcn = data.read(run / "b.json")["rows"]
    assert hopfield["MB"] == pytest.approx(4 * 5 * 4800 / 1e6)
    assert bayespcn["MB"] == pytest.approx(8 * (32 * 4800 + 5 * 32 * 32 + 32) / 1e6)            # R, U, r
    assert hopfield["error"] < bayespcn["error"] < blend["error"]

def test_the_commands_of_the_readme_are_understood():
    pattern = r"^(?: {4}|\$ )?(?:python|torchrun .*) ((?:til|mts|evaluate|data|vit)\.py\b[^#\n]*)"
    commands = re.findall(pattern, README.replace("\\\n", " "), re.M)
    assert any(line.startswith("til.py") for line in commands)
    for script, *words in map(str.split, commands):
        args = understood(script, words)
        for text in np.atleast_1d(getattr(args, "memory", [])):
            evaluate.make_memory(str(text), 40)
        assert "task" not in args or not args.predict or 1 <= args.task <= args.splits, words

def test_what_the_readme_names_is_there():
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", README) if "://" not in link]
    for path in [*links, *re.findall(r"\bresults/[\w./=-]*\w", README)]:
        assert (HERE / path).exists(), path
    for word in re.findall(r"pytest -q -k (\w+)", README):
        assert any(word in name for name in globals() if name.startswith("test_")), word

@pytest.mark.parametrize("line, figure, column, place", [
    ("til.py --memory hopfield", "FAA(M)", "faa", 1), ("til.py --memory bayespcn", "FAA(M)", "faa", 1),
    ("til.py --memory bayespcn:read=joint", "D(M)", "drop", 2), ("mts.py", "Task Acc", "task_accuracy", 0),
    ("til.py --memory bayespcn", "D(M)", "drop", 2), ("mts.py --predictor classes", "local", "faa_local", 2),
    ("mts.py --predictor classes", "Task Acc", "task_accuracy", 0)])
def test_the_table_of_the_readme_is_that_of_the_files(line, figure, column, place):
    ours, papers, setting = [], [], line[:3]
    label = line[16:] if setting == "til" else "hopfield" + line[6:]
    for name, splits in (("cifar100", 20), ("cifar100", 50), ("tinyimagenet", 50), ("tinyimagenet", 100)):
        files = (HERE / "results").glob(f"{name}-{splits}s-*/{setting}-*.json")
        values = [result[column] for result in map(data.read, files) if evaluate.label(result) == label]
        spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        ours.append(f"{np.mean(values):.2f}{spread}")
        row = evaluate.PAPER[f"{setting}.py --dataset {name} --splits {splits}"]
        papers.append(row[re.split("[: ]", label)[0]].split(" | ")[place])
    assert f"| `{line}` | {figure} | {' | '.join(ours)} |" in README
    assert f"| paper | {figure} | {' | '.join(papers)} |" in README

def test_the_tables_in_results_are_those_of_the_files_and_the_readme_quotes_them():
    tables = command("evaluate.py", "--paper", *(HERE / "results").iterdir())
    assert (HERE / "results/README.md").read_text("utf-8").strip() == tables.strip()
    quoted = re.findall(r"^\| `hopfield` \| 0 \|.*|[\d.−]+ ± [\d.]+\d|(?<=FAA\(M\) )\d\S+", README, re.M)
    assert len(quoted) > 40 and all(text.replace("−", "-") in tables for text in quoted)

def test_the_figures_of_the_exercises_are_those_of_the_changed_programs():
    for n in range(1, 13):                       # figures of single tasks do not count: they are many
        exercise = re.search(rf"^{n}\. \*\*.*(\n   .*)*", README, re.M)[0]
        paths = *HERE.glob(f"results/exercises/{n}-*.json"), *HERE.glob("results/glyphs-*/*.json")
        text = re.sub('"per_task": {.*?}', "", " ".join(path.read_text("utf-8") for path in paths))
        found = [float(x) for x in re.findall(r"\d+\.\d+(?:e-\d+)?", text)]
        for figure in re.findall(r"\b\d\d?\.\d\d+\b", exercise):
            assert any(f"{x:.{len(figure.split('.')[1])}f}" == figure for x in found), (n, figure)
