"""Data sets, their split into tasks, pictures, and how files are written and read.

CIFAR-100 and TinyImageNet are the paper's (section 4). `glyphs` is drawn here: nothing to download.

    python data.py --dataset glyphs      # a sheet of samples, and one picture to try --predict on
"""
import argparse
import ast
import contextlib
import hashlib
import inspect
import json
import os
import sys
import traceback
import zipfile
from pathlib import Path
from pickle import PickleError
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps                                 # Pillow comes with torchvision
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.datasets.folder import pil_loader
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import v2
from torchvision.utils import make_grid, save_image


class Images(NamedTuple):
    """One half of a data set, for training or for testing."""
    images: torch.Tensor        # uint8 (N, 3, h, w), RGB
    labels: torch.Tensor        # int64 (N,), index into classes
    classes: list               # names


def load(name, data_dir):
    """(train, test) of a data set of LOADERS, both Images. ValueError or OSError if it is broken."""
    try:
        return LOADERS[name](Path(data_dir))
    except OSError as error:
        raise OSError(f"cannot load {name}: {error}. Without network, unpack it in {data_dir}") from None


def cifar100(data_dir):
    """CIFAR-100 (Krizhevsky, 2009): 100 classes, 32 x 32 pixels, 500 training and 100 test images each."""
    halves = [CIFAR100(data_dir, train=train, download=True) for train in (True, False)]
    return [Images(torch.from_numpy(half.data).permute(0, 3, 1, 2).contiguous(),
                   torch.tensor(half.targets), half.classes) for half in halves]


def tinyimagenet(data_dir):
    """TinyImageNet (Le & Yang, 2015): 200 classes, 64 x 64 pixels, 500 training and 50 val images each, which
    we test on. The first call decodes all files, in about a minute, and keeps the result."""
    folder, cache = data_dir / "tiny-imagenet-200", data_dir / "tiny-imagenet-200.pt"
    if not cache.exists() and not folder.exists():
        url, md5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
        download_and_extract_archive(url, data_dir, md5=md5)
    if not cache.exists():
        save(cache, decode_tinyimagenet(folder))
    content = read(cache)
    return [Images(content[half], content[f"{half}_labels"], content["classes"]) for half in ("train", "val")]


def decode_tinyimagenet(folder, n_train=500, n_val=50):
    """The content of the official folder, which must hold that many images of each class."""
    wnids = (folder / "wnids.txt").read_text().split()
    names = dict(line.split("\t") for line in (folder / "words.txt").read_text().splitlines())
    train = [(path, wnid) for wnid in wnids for path in sorted((folder / "train" / wnid).rglob("*.JPEG"))]
    # All val images lie in one folder: only the annotations tell their classes.
    rows = [line.split("\t") for line in (folder / "val/val_annotations.txt").read_text().splitlines()]
    val = [(folder / "val/images" / name, wnid) for name, wnid, *_ in sorted(rows)]
    content = {"classes": [names[wnid].split(",")[0] for wnid in wnids]}
    for half, pairs, each in (("train", train, n_train), ("val", val, n_val)):
        labels = torch.tensor([wnids.index(wnid) for _, wnid in pairs])
        if labels.bincount(minlength=len(wnids)).tolist() != [each] * len(wnids):
            raise ValueError(f"{folder / half} does not hold {each} images of each class: unpack it again")
        images = [picture(path, 64) for path, _ in progress(pairs, f"decoding {half} images")]
        content |= {half: torch.stack(images), f"{half}_labels": labels}
    return content


def folder(data_dir):
    """Your own pictures in data_dir/train/<class>/ and data_dir/test/<class>/, as 224 x 224 squares."""
    halves = []
    for half in ("train", "test"):
        files = ImageFolder(data_dir / half)
        images = [picture(path, 224) for path, _ in progress(files.samples, f"decoding {half} images")]
        halves.append(Images(torch.stack(images), torch.tensor(files.targets), files.classes))
    if halves[0].classes != halves[1].classes:
        raise ValueError(f"{data_dir}: train/ and test/ hold different classes")
    return halves


def picture(path, size):
    """The central square of a picture file, upright, as uint8 (3, size, size), RGB."""
    try:
        image = v2.functional.pil_to_tensor(ImageOps.exif_transpose(pil_loader(path)))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:   # Syntax..: a broken PNG
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None
    square = v2.functional.center_crop(image, min(image.shape[1:]))
    return v2.functional.resize(square, [size, size], v2.InterpolationMode.BICUBIC)


def glyphs(data_dir, n_train=24, n_test=8):
    """100 classes of 64 x 64 pictures: each is a figure of two strokes and their mirror images."""
    names, counts = [f"glyph {i:02d}" for i in range(100)], enumerate((n_train, n_test))
    return [Images(torch.cat([draw_class(label, half, n) for label in range(100)]),
                   torch.arange(100).repeat_interleave(n), names) for half, n in counts]


def draw_class(label, half, n):
    """n samples of a class, each distorted, uint8 (n, 3, 64, 64); half: 0 for training, 1 for testing."""
    figure = random_strokes(np.random.default_rng([0, label]), 2)                   # (2, 2, 2)
    figure = np.concatenate([figure, figure * (-1, 1)]).astype(np.float32)          # (4, 2, 2)
    rng = np.random.default_rng([1 + half, label])
    low, high = (-0.1, 1.0, -0.05, -0.05, -0.05), (0.1, 1.1, 0.05, 0.05, 0.05)
    angle, scale, shear, dx, dy = rng.uniform(low, high, (n, 5)).T[..., None]       # (n, 1) each
    y, x = np.mgrid[-1:1:64j, -1:1:64j].reshape(2, 1, -1).astype(np.float32)        # (1, 4096) each
    u = scale * (np.cos(angle) * x - np.sin(angle) * y) + dx                        # (n, 4096)
    v = scale * (np.sin(angle) * x + np.cos(angle) * y) + dy + shear * u
    ink = coverage(u, v, figure[:, None], rng.uniform(0.08, 0.13, (n, 1)))          # (n, 4096)
    clutter = [1.3 * random_strokes(rng, n) for _ in range(5)]                      # 5 of (n, 2, 2)
    dirt = 0.6 * coverage(x, y, clutter, rng.uniform(0.02, 0.05, (n, 1)))           # (n, 4096)
    paper, other, pen = (rng.uniform(a, b, (n, 3, 1)) for a, b in ((0, 0.4), (0, 1), (0.6, 1)))
    image = paper + dirt[:, None] * (other - paper)                                 # (n, 3, 4096)
    image = image + ink[:, None] * (pen - image) + 0.05 * rng.standard_normal(image.shape, np.float32)
    return torch.from_numpy((image.clip(0, 1) * 255).astype(np.uint8).reshape(n, 3, 64, 64))


def random_strokes(rng, n):
    """n segments (n, 2, 2), [segment, end, xy], between two points of a 4 x 4 grid in [-0.75, 0.75]^2."""
    ends = np.array([rng.choice(16, 2, replace=False) for _ in range(n)])
    return (np.stack([ends % 4, ends // 4], -1) * 0.5 - 0.75).astype(np.float32)


def coverage(x, y, strokes, thickness):
    """How much the nearest of some strokes, (1 or n, 2, 2) each, covers the points (n, p), in [0, 1]."""
    nearest = np.inf                                                                # squared distance
    for stroke in strokes:
        (ax, ay), (bx, by) = stroke.transpose(1, 2, 0)[..., None]                   # (1 or n, 1) each
        dx, dy, px, py = bx - ax, by - ay, x - ax, y - ay
        along = ((px * dx + py * dy) / (dx * dx + dy * dy)).clip(0, 1)
        nearest = np.minimum(nearest, (px - along * dx) ** 2 + (py - along * dy) ** 2)
    return ((thickness - np.sqrt(nearest)) / 0.03 + 0.5).clip(0, 1).astype(np.float32)


LOADERS = {"glyphs": glyphs, "cifar100": cifar100, "tinyimagenet": tinyimagenet, "folder": folder}


def split(n_classes, splits, seed):
    """The classes of each task: `splits` lists of class indices, in an order drawn from the seed."""
    choices = [n for n in range(1, n_classes // 2 + 1) if n_classes % n == 0]       # two classes or more
    if splits not in choices:
        raise ValueError(f"{n_classes} classes cannot be split into {splits} tasks: choose one of {choices}")
    return np.random.default_rng(seed).permutation(n_classes).reshape(splits, -1).tolist()


def task_labels(half, tasks):
    """The task of each image (N,) and its label within the task (N,), from 0; -1 if it is in none of them."""
    table = torch.full((2, len(half.classes)), -1)
    for t, classes in enumerate(tasks):
        table[0, classes], table[1, classes] = t, torch.arange(len(classes))
    return table[:, half.labels]


def task(half, classes):
    """D_t: the images of these classes (n, 3, h, w) and their labels (n,), positions in `classes`."""
    _, labels = task_labels(half, [classes])
    return half.images[labels >= 0], labels[labels >= 0]


def hold_out(train):
    """(train, test) from training images alone: of each class, every tenth image is for testing."""
    held = torch.zeros(len(train.labels), dtype=torch.bool)
    for label in train.labels.unique():
        held[(train.labels == label).nonzero()[::10]] = True
    return [Images(train.images[part], train.labels[part], train.classes) for part in (~held, held)]


def generator(*seed):
    """A torch generator that depends on these numbers alone: (seed, t) for task t, (seed, 0) for theta_0."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, "u8")[0]))


# ---- files and the terminal ----------------------------------------------------------------------
def save(path, content):
    """Writes a dictionary as JSON or by torch.save, beside `path`, then renames it: it is always whole."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch.write_text(json.dumps(content)) if path.suffix == ".json" else torch.save(content, scratch)
    scratch.replace(path)


def read(path):
    """The dictionary in a file, on the CPU, without executing pickles. ValueError if it is damaged."""
    try:
        if path.suffix == ".json":
            return dict(json.loads(path.read_text("utf-8")))
        damaged = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()      # torch.load ignores CRCs
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, TypeError, EOFError, LookupError, PickleError, zipfile.error):
        damaged = True
    if damaged or not isinstance(content, dict):
        raise ValueError(f"{path} is damaged, missing, or not a file of this kind")
    return content


def digest(*objects):
    """Changes with the values of CPU tensors, and with the code and docstrings of modules and functions; not
    with comments and layout, nor with what stands below a line `# ---- evaluation`."""
    parts = [x.detach().numpy() if torch.is_tensor(x) else ast.unparse(ast.parse(
             inspect.getsource(x).partition("# ---- evaluation")[0])).encode() for x in objects]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:8]


def parser(description):
    """An argument parser whose help begins with the description, and whose errors take one line."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(usage=argparse.SUPPRESS, description=description, formatter_class=layout)


def progress(items, label):
    """Yields the items of a list, and counts them on the terminal."""
    for i, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            print(f"\r{label} {i}/{len(items)}", end="\n" * (i == len(items)), file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_errors():
    """Turns a ValueError or OSError into one line that says where it was raised, and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        message, place = " ".join(str(error).split()), traceback.extract_tb(error.__traceback__)[-1]
        print(f"error: {message} ({Path(place.filename).name}, line {place.lineno})", file=sys.stderr)
        sys.exit(2)


def main():
    """Draws <dataset>.png, 12 samples of 12 classes, and <dataset>-sample.png, one test image."""
    options = parser(main.__doc__)
    options.add_argument("--dataset", choices=LOADERS, default="glyphs", help="default: %(default)s")
    options.add_argument("--data-dir", default="data", help="folder of the data sets (default: data)")
    args = options.parse_args()
    name, (train, test) = args.dataset, load(args.dataset, args.data_dir)
    rows = [task(train, [label])[0][:12] for label in range(min(12, len(train.classes)))]
    save_image(make_grid(torch.cat(rows) / 255, nrow=12), f"{name}.png")
    save_image(test.images[0] / 255, f"{name}-sample.png")
    print(f"{name}.png; {name}-sample.png: a {test.classes[test.labels[0]]}")


if __name__ == "__main__":
    with one_line_errors():
        main()
