"""Data sets, their split into tasks, pictures, and how files are written and read.

CIFAR-100 and TinyImageNet are the paper's (section 4). `glyphs` is drawn here, from a seed, so that
there is something to train on without a download. `folder` reads pictures of your own.
"""
import argparse
import ast
import contextlib
import hashlib
import inspect
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps             # Pillow comes with torchvision


class Images(NamedTuple):
    """A part of a data set, for training or for testing."""
    images: torch.Tensor                    # uint8 (N, 3, h, w), RGB
    labels: torch.Tensor                    # int64 (N,), index into classes
    classes: list                           # names


def load(name, data_dir):
    """(train, test) of a data set, both Images. ValueError or OSError if something is broken."""
    try:
        return LOADERS[name](Path(data_dir))
    except (OSError, RuntimeError) as error:
        # torchvision's, for a download that was cut short: it must not stay.
        if isinstance(error, RuntimeError):
            for archive in ("cifar-100-python.tar.gz", "tiny-imagenet-200.zip"):
                Path(data_dir, archive).unlink(missing_ok=True)
        raise OSError(f"cannot load {name}: {error}. Is it in {data_dir}? "
                      "What is downloaded needs a network, once") from error


# ---- the paper's data sets ---------------------------------------------------------------------
def cifar100(data_dir):
    """CIFAR-100 (Krizhevsky, 2009): 100 classes, 32 x 32 pixels, 500 + 100 images each."""
    # Imported here, because it takes two seconds that the other data sets can do without.
    from torchvision.datasets import CIFAR100
    halves = []
    for train in (True, False):
        half = CIFAR100(data_dir, train=train, download=True)       # compares md5 sums
        images = torch.from_numpy(half.data).permute(0, 3, 1, 2)    # (N, 3, 32, 32)
        labels = torch.tensor(half.targets)
        halves.append(Images(images.contiguous(), labels, half.classes))
    return halves


def tinyimagenet(data_dir):
    """TinyImageNet (Le & Yang, 2015): 200 classes, 64 x 64 pixels, 500 + 50 images each.

    We test on its val half. The first call decodes all files, in about a minute, and keeps them.
    """
    from torchvision.datasets.utils import download_and_extract_archive
    folder = data_dir / "tiny-imagenet-200"
    cache = data_dir / "tiny-imagenet-200.pt"
    if not cache.exists():
        if not folder.exists():
            download_and_extract_archive(
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip", data_dir,
                md5="90528d7ca1a48142e341f4ef8d21d0de")
        save(cache, decode_tinyimagenet(folder))
    content = read(cache)
    return [Images(**content["train"]), Images(**content["val"])]


def decode_tinyimagenet(folder, n_train=500, n_val=50):
    """The official folder, which must hold that many images of each class, as two dictionaries."""
    wnids = (folder / "wnids.txt").read_text().split()
    words = (folder / "words.txt").read_text().splitlines()
    names = dict(line.split("\t") for line in words)
    halves = list_tinyimagenet(folder, wnids)
    for half, each in (("train", n_train), ("val", n_val)):         # before a minute of decoding
        found = [wnid for path, wnid in halves[half] if path.exists()]
        if sorted(found) != sorted(each * wnids):
            raise ValueError(f"{folder / half} does not hold {each} images of each class: remove "
                             f"{folder}, and unpack the official archive again")
    content = {}
    for half, files in halves.items():
        content[half] = {
            "images": decode([path for path, _ in files], 64, f"decoding {half} images"),
            "labels": torch.tensor([wnids.index(wnid) for _, wnid in files]),
            "classes": [names[wnid].split(",")[0] for wnid in wnids]}
    return content


def list_tinyimagenet(folder, wnids):
    """{"train": .., "val": ..}: lists of (path, wnid of its class)."""
    # Sorted: the order in which a file system lists them differs between machines.
    train = [(path, wnid) for wnid in wnids
             for path in sorted((folder / "train" / wnid).rglob("[!.]*.JPEG"))]
    # All val images lie in one folder: only the annotations tell their classes.
    lines = (folder / "val/val_annotations.txt").read_text().splitlines()
    val = [(folder / "val/images" / name, wnid)
           for name, wnid, *_ in map(str.split, sorted(lines))]
    return {"train": train, "val": val}


# ---- pictures of one's own ---------------------------------------------------------------------
def folder(data_dir):
    """Your own pictures in data_dir/train/<class>/ and test/<class>/, as 224 x 224 squares.

    val/ is taken if there is no test/. The pictures are decoded once and kept, and decoded again if
    a file was added, removed or changed.
    """
    train = data_dir / "train"
    test = data_dir / "test"
    val = data_dir / "val"
    if val.exists() and not test.exists():
        test = val
    for half, other in ((train, test), (test, train)):
        missing = {*class_names(other)} - {*class_names(half)}
        if missing:
            raise ValueError(f"{half} has no folders {sorted(missing)}, but {other} has")
    files = [list_pictures(half) for half in (train, test)]
    version = digest([(str(path), path.stat().st_mtime_ns) for path in sum(files, [])])
    cache = data_dir / "pictures.pt"
    content = read(cache) if cache.exists() else {}
    if content.get("version") != version:
        images = [decode(paths, 224, "decoding pictures") for paths in files]
        content = {"version": version, "images": images}
        with contextlib.suppress(OSError):      # we may not be allowed to write there
            save(cache, content)
    classes = class_names(train)
    parts = []
    for images, paths in zip(content["images"], files):
        labels = [classes.index(path.parent.name) for path in paths]
        parts.append(Images(images, torch.tensor(labels), classes))
    return parts


def class_names(folder):
    """The names of the folders in it, one for each class."""
    names = [path.name for path in sorted(folder.iterdir()) if is_visible(path) and path.is_dir()]
    if not names:
        raise ValueError(f"{folder} holds no folders, one for each class")
    return names


def list_pictures(folder):
    """The picture files of all classes. It says how many other files there are."""
    suffixes = Image.registered_extensions()
    found = [path for name in class_names(folder) for path in sorted((folder / name).iterdir())]
    files = [path for path in found if is_visible(path) and path.suffix.lower() in suffixes]
    empty = {*class_names(folder)} - {path.parent.name for path in files}
    if empty:
        raise ValueError(f"{folder}: there are no pictures of {sorted(empty)}")
    print(f"{folder}: {len(files)} pictures, {len(found) - len(files)} other files left out")
    return files


def is_visible(path):
    """Not one of the hidden files and folders that systems and editors leave behind."""
    return not path.name.startswith((".", "@", "__"))


def decode(files, size, label):
    """Picture files as uint8 (N, 3, size, size)."""
    return torch.stack([picture(path, size) for path in progress(files, label)])


def picture(path, size):
    """The central square of a picture file, upright, as uint8 (3, size, size), RGB."""
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        square = ImageOps.fit(to_rgb(image), (size, size))          # bicubic
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # SyntaxError: a broken PNG.
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def to_rgb(image):
    """Any picture as RGB with 8 bits a channel, transparent parts on white."""
    if image.mode[0] in "IF":
        # More than 8 bits: `convert` would cut off what is over 255, and make nearly all white.
        pixels = np.nan_to_num(np.asarray(image, np.float64), posinf=0)
        # The file does not say which number is white. We take the first that no pixel exceeds.
        limits = (1, 255, 65535) if image.mode == "F" else (65535,)
        full = next((limit for limit in limits if pixels.max() <= limit), pixels.max())
        image = Image.fromarray((255 * pixels / full).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


# ---- glyphs ------------------------------------------------------------------------------------
def glyphs(data_dir, n_train=22, n_test=8):
    """100 classes of 64 x 64 pictures: each is a figure of two strokes and their mirror images.

    Mirrored, so that a flip, with which the modulations are trained, does not change the class.
    n_train was chosen on --validate: on average, none and wrong are 15 and 10 points or more below
    FAA.
    """
    classes = [f"glyph {label:02d}" for label in range(100)]
    halves = []
    for half, n in enumerate((n_train, n_test)):
        images = [draw_class(label, half, n) for label in range(100)]
        labels = torch.arange(100).repeat_interleave(n)
        halves.append(Images(torch.cat(images), labels, classes))
    return halves


def draw_class(label, half, n):
    """n samples of a class, each distorted, uint8 (n, 3, 64, 64); half: 0 to train, 1 to test."""
    strokes = random_strokes(np.random.default_rng([0, label]), 2)          # (2, 2, 2)
    mirrored = strokes * np.float32((-1, 1))
    figure = np.concatenate([strokes, mirrored])[:, None]                   # (4, 1, 2, 2)
    rng = np.random.default_rng([1 + half, label])

    # The inverse of the distortion takes each pixel to a place in the undistorted figure.
    angle, scale, shear, dx, dy = 0.05 * rng.uniform(-1, 1, (n, 5)).T[..., None]        # (n, 1)
    cos, sin = np.cos(2 * angle), np.sin(2 * angle)                         # up to 0.1 rad
    y, x = np.mgrid[-1:1:64j, -1:1:64j].reshape(2, 1, -1).astype(np.float32)            # (1, 4096)
    u = (1.05 + scale) * (cos * x - sin * y) + dx                           # (n, 4096)
    v = (1.05 + scale) * (sin * x + cos * y) + dy + shear * u
    ink = coverage(u, v, figure, rng.uniform(0.08, 0.13, (n, 1)))           # (n, 4096)

    # Thin strokes here and there, which mean nothing.
    clutter = [1.3 * random_strokes(rng, n) for _ in range(5)]              # 5 for each image
    dirt = 0.6 * coverage(x, y, clutter, rng.uniform(0.02, 0.05, (n, 1)))   # (n, 4096)
    background, dirt_colour, ink_colour = rng.random((3, n, 3, 1))
    background = 0.4 * background                                           # dark
    ink_colour = 0.6 + 0.4 * ink_colour                                     # light
    image = background + dirt[:, None] * (dirt_colour - background)         # (n, 3, 4096)
    image += ink[:, None] * (ink_colour - image)
    image += 0.05 * rng.standard_normal(image.shape, np.float32)            # a camera's noise
    pixels = (255 * image.clip(0, 1)).astype(np.uint8)
    return torch.from_numpy(pixels.reshape(n, 3, 64, 64))


def random_strokes(rng, n):
    """n segments (n, 2, 2), [segment, end, xy], between points of a 4 x 4 grid."""
    ends = np.array([rng.choice(16, 2, replace=False) for _ in range(n)])   # (n, 2)
    places = np.stack([ends % 4, ends // 4], axis=-1)                       # (n, 2, 2)
    return (0.5 * places - 0.75).astype(np.float32)


def coverage(x, y, strokes, thickness):
    """How much the nearest of strokes, (1 or n, 2, 2) each, covers points (n, p), in [0, 1]."""
    nearest = np.inf                                                        # distance, squared
    for stroke in strokes:
        # The two ends, each [xy, sample, 1], of shape (2, 1 or n, 1).
        a, b = stroke.transpose(1, 2, 0)[..., None]
        dx, dy = b - a
        px, py = x - a[0], y - a[1]
        along = (px * dx + py * dy) / (dx ** 2 + dy ** 2)
        along = along.clip(0, 1)                                            # 0 at a, 1 at b
        squared = (px - along * dx) ** 2 + (py - along * dy) ** 2
        nearest = np.minimum(nearest, squared)
    blurred = (thickness - np.sqrt(nearest)) / 0.03 + 0.5
    return blurred.clip(0, 1).astype(np.float32)


LOADERS = {
    "glyphs": glyphs,
    "cifar100": cifar100,
    "tinyimagenet": tinyimagenet,
    "folder": folder,
}


# ---- tasks -------------------------------------------------------------------------------------
def split(n_classes, splits, seed):
    """The classes of each task: `splits` lists of indices, in an order drawn from the seed."""
    # With one class in a task, there would be nothing to learn.
    choices = [n for n in range(1, n_classes // 2 + 1) if n_classes % n == 0]
    if splits not in choices:
        prime = f", as {n_classes} is prime" if choices == [1] else ""
        raise ValueError(f"{n_classes} classes do not make {splits} tasks of two classes or more, "
                         f"of equal size{prime}: choose one of {choices}, add or omit classes")
    order = np.random.default_rng(seed).permutation(n_classes)
    return order.reshape(splits, -1).tolist()


def task_labels(part, tasks):
    """Each image's task (N,) and label within it (N,), from 0; -1 if it is in none of the tasks."""
    task_of = torch.full((len(part.classes),), -1)
    label_of = torch.full((len(part.classes),), -1)
    for t, classes in enumerate(tasks):
        task_of[classes] = t
        label_of[classes] = torch.arange(len(classes))
    return task_of[part.labels], label_of[part.labels]


def task(part, classes):
    """D_t: the images of these classes (n, 3, h, w) and labels (n,), positions in `classes`."""
    _, labels = task_labels(part, [classes])                    # -1: of another task
    inside = labels >= 0
    return part.images[inside], labels[inside]


def hold_out(train):
    """(train, test) from training images alone: of each class, every tenth image is for testing."""
    # To choose epochs or learning rates on the test images would flatter the result.
    held = torch.zeros(len(train.labels), dtype=torch.bool)
    for label in train.labels.unique():
        places = (train.labels == label).nonzero()
        if len(places) < 2:
            raise ValueError("--validate needs two training images of a class, or more: of "
                             f"{train.classes[label]}, there is one")
        held[places[::10]] = True
    return [train._replace(images=train.images[part], labels=train.labels[part])
            for part in (~held, held)]


def generator(*seed):
    """A torch generator that depends on these numbers alone, and differs for neighbouring ones."""
    # torch's seeds are single numbers. Sums like seed + t would give two tasks the same numbers.
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


# ---- files and the terminal --------------------------------------------------------------------
def save(path, content):
    """Writes a dictionary as JSON or, for other suffixes, by torch.save."""
    # Beside `path`, then renamed, so that nobody ever finds half a file. With the process in its
    # name, as two commands may write the same file.
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.suffix == ".json":
            # NaN is no JSON, and where a figure should be, a mistake.
            scratch.write_text(json.dumps(content, allow_nan=False))
        else:
            torch.save(content, scratch)
        scratch.replace(path)
    except (OSError, RuntimeError) as error:    # RuntimeError: torch.save's, on a full disk
        raise OSError(f"cannot write {path}, is there space left? {error}") from error
    finally:
        scratch.unlink(missing_ok=True)


def read(path):
    """The content of such a file, on the CPU, without executing pickles. ValueError if damaged."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text("utf-8"))
        # What torch.save writes is a zip, but torch.load does not compare its check sums.
        damaged = zipfile.ZipFile(path).testzip()
        if damaged:
            raise ValueError(f"the check sum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:               # missing, not damaged
        raise
    except Exception as error:
        # Of many kinds: it depends on where the damage is.
        raise ValueError(f"{path} is damaged, remove it: {error}") from error


def digest(*parts):
    """A hash, of eight hex digits, of CPU tensors and of values that JSON can write."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            sha.update(part.contiguous().numpy())
        else:
            sha.update(json.dumps(part).encode())
    return sha.hexdigest()[:8]


def code_digest(*things):
    """Changes with the code of modules and functions, not with docstrings, comments and layout."""
    texts = []
    for thing in things:
        tree = ast.parse(inspect.getsource(thing))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                if ast.get_docstring(node):
                    del node.body[0]
        texts.append(ast.unparse(tree))
    return digest(texts)


def at_least(low):
    """A type for argparse: whole numbers from `low` on."""
    def whole_number(text):
        if not text.isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {low} on")
        return int(text)
    return whole_number


positive = at_least(1)


def parser(description):
    """An argument parser whose help begins with the description, and whose errors take one line."""
    return argparse.ArgumentParser(
        description=description, usage=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)


def progress(items, label):
    """Yields the items of a list, and counts them on the terminal."""
    for i, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            end = "\n" if i == len(items) else ""
            print(f"\r{label} {i}/{len(items)}", end=end, file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_line_errors():
    """Turns a mistake of the user (ValueError or OSError) and Ctrl-C into one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: what is finished is kept; the same command goes on", file=sys.stderr)
        sys.exit(130)
