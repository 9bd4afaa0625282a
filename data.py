"""The data sets, and how they are split into tasks.

CIFAR-100 and TinyImageNet are those of the paper (section 4). `glyphs` is drawn by this file, so
that you can try everything without a download. `folder` reads pictures of your own.

    train, test = load("cifar100", "data")
    tasks = split(100, 20, seed=0)                      # 20 lists of 5 class numbers
    images, labels = task(train, tasks[0])              # D_t, the images of the first task

What you need for the paper comes first: how a data set is split into tasks. Then the data sets are
read and drawn. From `files` on, there are the functions that read and write files, and that talk to
the terminal. They are in this file because nearly all other files import it.
"""
import argparse
import ast
import contextlib
import hashlib
import io
import json
import secrets
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps             # Pillow comes with torchvision


class Images(NamedTuple):
    """A part of a data set: the images to train on, or those to test on."""
    images: torch.Tensor                    # uint8 (N, 3, h, w), RGB
    labels: torch.Tensor                    # int64 (N,), index into classes, each of which occurs
    classes: list                           # their names, the same for training and for testing


class Mistake(Exception):
    """A mistake of the user, such as a wrong option. The program ends with it, in one line."""


def load(name, data_dir):
    """The two parts (train, test) of the data set `name`. Raises Mistake if it cannot be loaded."""
    train, test = LOADERS[name](Path(data_dir))
    for part in (train, test):
        images, labels, classes = part
        # This is for loaders that you add.
        fits = (images.dtype == torch.uint8 and images.shape[:2] == (len(labels), 3)
                and labels.dtype == torch.int64
                and labels.unique().tolist() == list(range(len(classes)))
                and list(classes) == list(train.classes))
        if not fits:
            raise Mistake(f"{name}: the images or labels are not as `Images` in data.py says")
    return train, test


# ---- tasks -------------------------------------------------------------------------------------
def split(n_classes, n_tasks, seed):
    """The classes of each task: n_tasks lists of equal length, in an order drawn from the seed."""
    # With one task, there is nothing to tell apart, and in a task of one class, nothing to learn.
    possible = [n for n in range(2, n_classes // 2 + 1) if n_classes % n == 0]
    if n_tasks not in possible:
        numbers = ", ".join(map(str, possible)) or "nothing"
        raise Mistake(f"--splits {n_tasks} is not possible with {n_classes} classes. There must be "
                      "two or more tasks, of equal size, with two or more classes in each. (So you "
                      "need at least four classes, and their number must not be prime.) Possible "
                      f"here: {numbers}")
    order = np.random.default_rng(seed).permutation(n_classes)
    return order.reshape(n_tasks, -1).tolist()


def task(part, classes):
    """D_t: the images of these classes (n, 3, h, w), and their labels (n,) within the task."""
    inside = torch.isin(part.labels, torch.tensor(classes))
    labels = [classes.index(label) for label in part.labels[inside].tolist()]
    return part.images[inside], torch.tensor(labels)


def task_labels(part, tasks):
    """For each image, its task (N,) and its label within the task (N,), both counted from 0."""
    task_of = torch.full((len(part.classes),), -1)      # of each class; -1: it is in no task
    label_of = torch.full_like(task_of, -1)
    for t, classes in enumerate(tasks):
        task_of[classes] = t
        label_of[classes] = torch.arange(len(classes))
    return task_of[part.labels], label_of[part.labels]


def hold_out(train):
    """(train, test) from training images alone: every tenth image of a class is for testing.

    Choose learning rates and other settings on these held-out images. If you choose settings on the
    test images, the results look better than they are.
    """
    held = torch.zeros(len(train.labels), dtype=torch.bool)
    for label, name in enumerate(train.classes):
        places = (train.labels == label).nonzero().flatten()
        if len(places) < 2:
            raise Mistake(f"--validate needs two or more training images of {name}")
        held[places[::10]] = True
    return [train._replace(images=train.images[chosen], labels=train.labels[chosen])
            for chosen in (~held, held)]


def generator(*numbers):
    """A generator of random numbers, made from one or more numbers, such as (seed, task).

    Different numbers give different generators: (0, 2) does not draw the same as (1, 1).
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


# ---- the paper's data sets ---------------------------------------------------------------------
def cifar100(data_dir):
    """CIFAR-100 (Krizhevsky, 2009): 100 classes of 500 + 100 images, 32 x 32 pixels."""
    from torchvision.datasets import CIFAR100           # here, because this import takes 2 seconds
    # CIFAR100 checks the md5 sums of the files. It would replace a file that somebody has changed,
    # so it may only download them if there is nothing yet.
    missing = not (data_dir / "cifar-100-python").exists()
    parts = []
    for train in (True, False):
        with downloading(data_dir / "cifar-100-python"):
            part = CIFAR100(data_dir, train=train, download=missing)
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2)    # (N, 3, 32, 32)
        parts.append(Images(images.contiguous(), torch.tensor(part.targets), part.classes))
    return parts


def tinyimagenet(data_dir):
    """TinyImageNet (Le & Yang, 2015): 200 classes of 500 + 50 images, 64 x 64 pixels.

    The labels of its test images were never published, so we test on its val images. To decode
    110,000 files takes a minute, so the result is kept in a file. Its name has a hash of the code
    of data.py: if you change this code, the pictures are decoded anew. (If you change the pictures
    themselves, remove this file.)
    """
    from torchvision.datasets.utils import download_and_extract_archive
    code = digest_of_code("data.py")
    cache = data_dir / f"tiny-imagenet-200-{code}.pt"
    if not cache.exists():
        root = data_dir / "tiny-imagenet-200"
        lists = ("wnids.txt", "words.txt", "val/val_annotations.txt")
        if not all((root / name).exists() for name in lists):
            with downloading(root):
                download_and_extract_archive(
                    "http://cs231n.stanford.edu/tiny-imagenet-200.zip", data_dir,
                    md5="90528d7ca1a48142e341f4ef8d21d0de")
        save(cache, decode_tinyimagenet(root))
    print(f"takes the decoded pictures from {cache}")
    content = read(cache)
    return [Images(**content["train"]), Images(**content["val"])]


def decode_tinyimagenet(root, n_train=500, n_val=50):
    """{"train": .., "val": ..} from the official folder.

    n_train and n_val are the numbers of images of each class.
    """
    wnids = (root / "wnids.txt").read_text().split()                # WordNet's names of the classes
    words = (root / "words.txt").read_text().splitlines()
    english = dict(line.split("\t") for line in words)
    parts = list_tinyimagenet(root, wnids)
    for name, n in (("train", n_train), ("val", n_val)):
        # Each class should be found n times.
        found = [wnid for path, wnid in parts[name] if path.exists()]
        if sorted(found) != sorted(n * wnids):
            raise Mistake(f"{root / name} should hold {n} images of each of {len(wnids)} classes, "
                          f"but holds {len(found)} images as the official zip file has them: "
                          f"rename {root}, and it is unpacked anew")
    content = {}
    for name, files in parts.items():
        images = [picture(path, 64) for path, _ in progress(files, f"decoding {name} image")]
        content[name] = {
            "images": torch.stack(images),
            "labels": torch.tensor([wnids.index(wnid) for _, wnid in files]),
            "classes": [english[wnid].split(",")[0] for wnid in wnids]}
    return content


def list_tinyimagenet(root, wnids):
    """The files of both parts, as lists of pairs (path, wnid of the class)."""
    # Sorted, because the order in which a disk lists its files differs between computers. A Mac may
    # leave behind files like ._x.JPEG: [!.] leaves them out.
    train = [(path, wnid) for wnid in wnids
             for path in sorted(root.glob(f"train/{wnid}/**/[!.]*.JPEG"))]
    # All val images lie in one folder. This file lists their names, classes and bounding boxes.
    annotations = (root / "val/val_annotations.txt").read_text().splitlines()
    rows = [line.split() for line in sorted(annotations)]
    val = [(root / "val/images" / name, wnid) for name, wnid, *_ in rows]
    return {"train": train, "val": val}


@contextlib.contextmanager
def downloading(folder):
    """Turns whatever goes wrong when torchvision downloads or reads this folder into a Mistake."""
    try:
        yield
    except Exception as error:              # of many kinds: a network can fail in many ways
        raise Mistake(f"the folder {folder} is missing and cannot be downloaded, or its files are "
                      f"not as they were published ({error}). A download needs a network, but only "
                      "once. If another command downloads at this moment, wait for it. If the "
                      "folder is there, rename or remove it, and it is downloaded anew") from error


# ---- pictures of your own ----------------------------------------------------------------------
def folder(data_dir):
    """Your own pictures: data_dir/train/<class>/<picture>, and the same in test/ or in val/.

    Their central squares are used, with 224 x 224 pixels.
    """
    train = data_dir / "train"
    test = data_dir / "test"
    val = data_dir / "val"
    if val.is_dir() and not test.is_dir():
        test = val
    classes = class_names(train)
    if class_names(test) != classes:
        different = ", ".join(sorted({*classes} ^ {*class_names(test)}))
        raise Mistake(f"{train} and {test} should have the same classes, but only one of them has "
                      f"{different}")
    parts = []
    for root in (train, test):
        files = [list_pictures(root / name) for name in classes]
        images = []
        labels = []
        for label, of_class in enumerate(progress(files, f"decoding {root}, class")):
            images += [picture(path, 224) for path in of_class]
            labels += [label] * len(of_class)
        parts.append(Images(torch.stack(images), torch.tensor(labels), classes))
    return parts


def class_names(root):
    """The names of the folders in `root`, one for each class."""
    if not root.is_dir():
        raise Mistake(f"there is no folder {root}: in the folder that you name with --data-dir, "
                      "expected train/<class>/<picture>, and the same in test/ or in val/")
    return [path.name for path in choose(root, Path.is_dir, "folder of a class")]


def list_pictures(of_class):
    """The picture files in the folder of a class."""
    readable = {suffix for suffix, kind in Image.registered_extensions().items()
                if kind in Image.OPEN}
    return choose(of_class, lambda path: path.suffix.lower() in readable, "picture")


def choose(root, wanted, what):
    """The paths in the folder `root` that are wanted. It prints which others it leaves out."""
    chosen = []
    others = []
    for path in sorted(root.iterdir()):
        # Systems and editors leave such things behind: .ipynb_checkpoints, @eaDir, __MACOSX.
        hidden = path.name.startswith((".", "@", "__"))
        if wanted(path) and not hidden:
            chosen.append(path)
        else:
            others.append(path.name)
    if others:
        print(f"{root}: left out, as it is hidden or no {what}:", ", ".join(others))
    if not chosen:
        raise Mistake(f"there is no {what} in {root}")
    return chosen


def picture(path, size):
    """The central square of a picture file, as uint8 (3, size, size), RGB.

    It is turned upright, as its EXIF data says, and transparent parts become white. Raises Mistake
    if the file cannot be read, or is grey with more than 8 bits. (Of colours with more bits, Pillow
    takes the upper 8.)
    """
    try:
        image = ImageOps.exif_transpose(Image.open(path))
    except Exception as error:              # of many kinds: it depends on the format
        raise Mistake(f"cannot read {path} as a picture ({error}): replace or remove it") from error
    if image.mode.startswith(("I", "F")):           # integers or floats: I, I;16, F
        raise Mistake(f"{path} has more than 8 bits for a grey value: save it with 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    square = ImageOps.fit(image.convert("RGB"), (size, size))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


# ---- glyphs: you can skip how they are drawn ---------------------------------------------------
def glyphs(data_dir, n_train=22, n_test=8):
    """100 classes of 64 x 64 pictures. A glyph is a drawing of two strokes and their mirror images.

    The mirror images are there because training mirrors pictures, which must not change the class.

    If the controls were as good as the modulations, glyphs would teach us nothing. So the look of
    the glyphs was tuned on their test images. Then n_train was chosen on --validate: there, `none`
    is about 15 points below FAA_GT, and `wrong` about 10.
    """
    classes = [f"glyph {label:02d}" for label in range(100)]
    # Drawing i is made from the seed i. These four seeds would repeat an earlier drawing.
    drawings = [i for i in range(104) if i not in (51, 66, 72, 90)]
    parts = []
    for part, n in enumerate((n_train, n_test)):
        images = [draw_class(i, part, n) for i in drawings]
        labels = torch.arange(100).repeat_interleave(n)
        parts.append(Images(torch.cat(images), labels, classes))
    return parts


def draw_class(i, part, n):
    """n samples of drawing i, each distorted, uint8 (n, 3, 64, 64); part: 0 to train, 1 to test."""
    strokes = random_strokes(np.random.default_rng([0, i]), 2)              # (2, 2, 2)
    mirrored = strokes * np.float32((-1, 1))
    glyph = np.concatenate([strokes, mirrored])[:, None]                    # (4, 1, 2, 2)
    rng = np.random.default_rng([1 + part, i])

    # For each pixel (x, y), (u, v) is the matching place in the drawing before it was distorted.
    angle, scale, shear, dx, dy = 0.05 * rng.uniform(-1, 1, (n, 5)).T[..., None]        # (n, 1)
    cos, sin = np.cos(2 * angle), np.sin(2 * angle)                         # up to 0.1 rad
    y, x = np.mgrid[-1:1:64j, -1:1:64j].reshape(2, 1, -1).astype(np.float32)            # (1, 4096)
    u = (1.05 + scale) * (cos * x - sin * y) + dx                           # (n, 4096)
    v = (1.05 + scale) * (sin * x + cos * y) + dy + shear * u
    ink = coverage(u, v, glyph, rng.uniform(0.08, 0.13, (n, 1)))            # (n, 4096)

    # Clutter: five thin random strokes in each image.
    strokes = [1.3 * random_strokes(rng, n) for _ in range(5)]
    clutter = 0.6 * coverage(x, y, strokes, rng.uniform(0.02, 0.05, (n, 1)))            # (n, 4096)
    background, clutter_colour, ink_colour = rng.random((3, n, 3, 1))
    background = 0.4 * background                                           # dark
    ink_colour = 0.6 + 0.4 * ink_colour                                     # light
    image = background + clutter[:, None] * (clutter_colour - background)   # (n, 3, 4096)
    image += ink[:, None] * (ink_colour - image)
    image += 0.05 * rng.standard_normal(image.shape, np.float32)            # a camera's noise
    pixels = (255 * image.clip(0, 1)).astype(np.uint8)
    return torch.from_numpy(pixels.reshape(n, 3, 64, 64))


def random_strokes(rng, n):
    """n strokes (n, 2, 2), [stroke, end, xy], between points of a 4 x 4 grid in [-0.75, 0.75]."""
    ends = np.array([rng.choice(16, 2, replace=False) for _ in range(n)])   # (n, 2)
    places = np.stack([ends % 4, ends // 4], axis=-1)                       # (n, 2, 2)
    return (0.5 * places - 0.75).astype(np.float32)


def coverage(x, y, strokes, thickness):
    """How much the nearest of the strokes covers points (x, y), (n, p), as numbers in [0, 1].

    Each of the strokes is (1 or n, 2, 2), [sample, end, xy]; thickness is (n, 1).
    """
    nearest = np.inf                                                        # distance, squared
    for stroke in strokes:
        a, b = stroke.transpose(1, 2, 0)[..., None]                         # ends, (2, 1 or n, 1)
        dx, dy = b - a
        px, py = x - a[0], y - a[1]
        along = (px * dx + py * dy) / (dx ** 2 + dy ** 2)
        along = along.clip(0, 1)                                            # 0 at a, 1 at b
        squared = (px - along * dx) ** 2 + (py - along * dy) ** 2
        nearest = np.minimum(nearest, squared)
    soft_edge = (thickness - np.sqrt(nearest)) / 0.03 + 0.5
    return soft_edge.clip(0, 1).astype(np.float32)


LOADERS = {
    "glyphs": glyphs,
    "cifar100": cifar100,
    "tinyimagenet": tinyimagenet,
    "folder": folder,
}


# ---- files -------------------------------------------------------------------------------------
def save(path, content):
    """Writes JSON if the path ends in .json, and otherwise what torch.save writes.

    The file is first written beside `path`, and then renamed. So nobody ever finds half a file.
    """
    if path.suffix == ".json":
        content = json.dumps(content, default=str).encode()             # paths become text
    else:
        # First to memory: on a full disk, torch.save would end in a traceback.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getbuffer()
    # The random number is there because another command may write the same file at this moment.
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        if path.exists() and path.read_bytes() == content:
            return                              # nothing to do, and the disk may be read-only
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        raise Mistake(f"cannot write {path} ({error}): use another folder, with --out or "
                      "--data-dir. If you copy into it what is here, nothing is made again"
                      ) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()                    # if the disk is full, or after Ctrl-C


def read(path):
    """The content of a file that `save` has written. Raises Mistake if this cannot be read."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text("utf-8"))
        # torch.save writes a zip file, which has check sums, but torch.load does not compare them.
        damaged = zipfile.ZipFile(path).testzip()
        if damaged:
            raise ValueError(f"the check sum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Mistake(f"cannot read {path}: {error}") from error
    except Exception as error:              # of many kinds: it depends on where the damage is
        raise Mistake(f"{path} is damaged ({error}): remove it, and run what made it") from error


def digest(*parts):
    """A short hash, eight hex digits, of tensors and of values that can be written as JSON."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            sha.update(part.detach().contiguous().numpy())
        else:
            sha.update(json.dumps(part, default=str).encode())
    return sha.hexdigest()[:8]


# The code of this program, as it is when it starts. So you can edit the files during a run.
SOURCES = {path.name: path.read_bytes() for path in Path(__file__).parent.glob("[!.]*.py")
           if path.is_file()}


def digest_of_code(name):
    """A short hash of the code of a file beside this one, without comments and docstrings."""
    tree = ast.parse(SOURCES[name])
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node):
                del node.body[0]
    return digest(ast.unparse(tree))


# ---- the terminal ------------------------------------------------------------------------------
def parser(description):
    """An argument parser whose help begins with the description, and whose errors take one line."""
    return argparse.ArgumentParser(
        description=description,
        usage=argparse.SUPPRESS,                # otherwise, it is printed before each error
        formatter_class=argparse.RawDescriptionHelpFormatter)


def whole_number(low):
    """A type for argparse: whole numbers from `low` on."""
    def convert(text):
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {low} on")
        return int(text)
    return convert


def share(text):
    """A type for argparse: numbers from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return float(text)


def progress(items, label):
    """Yields the items, and counts them: on a terminal always, and elsewhere once a minute."""
    on_terminal = sys.stderr.isatty()
    count = ""
    for i, item in enumerate(items, 1):
        count = f"{label} {i} of {len(items)}"
        if on_terminal:
            print(f"{count} ", end="\r", file=sys.stderr, flush=True)
        elif time.monotonic() - progress.shown > 60:
            print(count, file=sys.stderr, flush=True)
            progress.shown = time.monotonic()
        yield item
    if on_terminal:
        print(" " * len(count), end="\r", file=sys.stderr)      # wipe the line


progress.shown = time.monotonic()           # when a count was last printed, by any loop


@contextlib.contextmanager
def one_line_errors():
    """Ends the program with one line after a Mistake, a file that cannot be opened, or Ctrl-C.

    All other errors are tracebacks.
    """
    # What a terminal cannot show, such as the name of a class, becomes a question mark.
    if isinstance(sys.stdout, io.TextIOWrapper):        # and not a notebook's
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    except (Mistake, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped. What is finished is kept, and til.py and mts.py go on after it",
              file=sys.stderr)
        sys.exit(130)
