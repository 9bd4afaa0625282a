"""Everything that touches the disk: data sets, their split into tasks, pictures to tensors, and run folders.

Data sets (section 4 of the paper): Split-CIFAR100 and Split-TinyImageNet, and `glyphs`, drawn here from a seed, so that
every command runs with nothing to download.

    python data.py --dataset glyphs      # a sheet of samples, one row a class: glyphs.png
"""
import argparse
import codecs
import contextlib
import fcntl
import json
import os
import pickle
import re
import shutil
import stat
import sys
import tarfile
import textwrap
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR100
from torchvision.datasets.folder import pil_loader
from torchvision.datasets.utils import check_integrity, download_and_extract_archive
from torchvision.io import encode_png
from torchvision.transforms import v2
from torchvision.utils import make_grid


class Images(NamedTuple):
    """One half (train or test) of a data set."""
    images: torch.Tensor         # uint8 (N, 3, h, w), RGB
    labels: torch.Tensor         # int64 (N,), index into classes
    classes: list                # names


# ---- data sets ---------------------------------------------------------------------------------------------------------

def load(name, data_dir):
    """(train, test) of the data set `name`, both Images; downloaded into data_dir where it is not there yet.

    Raises ValueError for an unknown name or a broken file, FileNotFoundError for what is missing and cannot be fetched.
    """
    if name not in LOADERS:
        raise ValueError(f"unknown dataset '{name}': choose one of {', '.join(LOADERS)}")
    return check_classes(*LOADERS[name](Path(data_dir)))


def check_classes(train, test):
    """(train, test); raises ValueError if a class has no image in one of them."""
    for half, content in (("train", train), ("test", test)):
        counts = content.labels.bincount(minlength=len(content.classes))
        if counts.min() == 0:
            raise ValueError(f"class '{content.classes[counts.argmin()]}' has no {half} image: add some, or remove the class")
    return train, test


def fetch(url, md5, folder):
    """Downloads an archive and unpacks it beside `folder`, which appears only when it is complete."""
    scratch = folder.parent / f".unpacking-{folder.name}"
    # In the tar, nothing may point out of the scratch folder; Python's default from 3.14 on.
    tarfile.TarFile.extraction_filter = staticmethod(getattr(tarfile, "data_filter", None))
    try:
        download_and_extract_archive(url, folder.parent, scratch, md5=md5)
        os.replace(scratch / folder.name, folder)
    except (OSError, RuntimeError, tarfile.TarError) as error:               # no network, a broken download, a full disk
        archive = folder.parent / Path(url).name
        what = f"remove {archive}, which is broken, and put a whole one" if archive.exists() and not check_integrity(archive, md5) else "put it"
        raise FileNotFoundError(f"cannot fetch {url} ({error}): {what} (md5 {md5}) into {folder.parent} by hand, or unpack it so that "
                                f"{folder} is there") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def cifar100(data_dir):
    """CIFAR-100 (Krizhevsky, 2009): 100 classes, 32 x 32 pixels, 500 train and 100 test images each."""
    folder = data_dir / CIFAR100.base_folder
    with turn(data_dir):
        if not folder.is_dir():
            fetch(CIFAR100.url, CIFAR100.tgz_md5, folder)
    (classes,) = read_arrays(folder / "meta", "fine_label_names")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{folder / 'meta'} holds no list of class names: fetch the data set again")
    return tuple(cifar100_half(folder / half, classes) for half in ("train", "test"))


def cifar100_half(path, classes):
    """Images of the file `train` or `test`; raises ValueError if it does not hold what it should."""
    pixels, labels = map(np.asarray, read_arrays(path, "data", "fine_labels"))
    if labels.ndim != 1 or labels.dtype.kind != "i" or pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3 * 32 * 32):
        raise ValueError(f"{path}: expected uint8 pixels (n, 3072) and whole labels (n,), found {pixels.dtype} {pixels.shape} and "
                         f"{labels.dtype} {labels.shape}: fetch the data set again")
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= len(classes):
        raise ValueError(f"{path}: labels reach from {labels.min()} to {labels.max()}, classes are 0 to {len(classes) - 1}")
    return Images(torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()), torch.from_numpy(labels.astype(np.int64)), classes)


class ArrayUnpickler(pickle.Unpickler):
    """CIFAR-100 comes as pickles. This reader admits numpy arrays in them and no other object, so no code can run."""
    ADMITTED = {"_reconstruct": np.empty(0).__reduce__()[0], "_frombuffer": np.empty(0).__reduce_ex__(5)[0],
                "ndarray": np.ndarray, "dtype": np.dtype, "encode": codecs.encode}

    def find_class(self, module, name):
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}")
        return self.ADMITTED[name]


def read_arrays(path, *names):
    """What goes by these names in the dictionary in one of CIFAR-100's files."""
    try:
        with open(path, "rb") as file:
            content = ArrayUnpickler(file, encoding="latin1").load()
            return [content[name] for name in names]
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: remove {path.parent} to fetch the data set again") from None
    except OSError:
        raise
    except Exception as error:                   # broken bytes make a pickle raise almost anything
        raise ValueError(f"{path} is not a whole CIFAR-100 file ({error}): fetch the data set again") from None


def tiny_imagenet(data_dir):
    """TinyImageNet-200 (Le & Yang, 2015): 64 x 64 pixels, 500 train images a class, 50 val images a class as test.

    The first call decodes 110,000 JPEG files and keeps them as one tensor file; later calls map that file into memory.
    """
    cache, content = data_dir / "tiny-imagenet-200.pt", None
    with turn(data_dir):
        if not cache.exists():
            content = decode_tiny_imagenet(data_dir / "tiny-imagenet-200")
            try:
                save_tensors(cache, content)
            except OSError as error:             # a folder that is shared and read-only, say
                print(f"{error}\nthe next start will have to decode again", file=sys.stderr)
    content = content or load_tensors(cache, mmap=True)
    train, val = (Images(content.get(f"{half}_images"), content.get(f"{half}_labels"), content.get("classes")) for half in ("train", "val"))
    if not (is_tiny_imagenet(train) and is_tiny_imagenet(val)):              # another of our files, say, which is whole
        raise ValueError(f"{cache} does not hold TinyImageNet: remove it and run the command again")
    return train, val


def is_tiny_imagenet(half):
    """Whether this is what decode_tiny_imagenet gives for one half, whatever the counts."""
    images, labels, classes = half
    return (isinstance(images, torch.Tensor) and images.dtype == torch.uint8 and images.shape[1:] == (3, 64, 64)
            and isinstance(labels, torch.Tensor) and labels.dtype == torch.int64 and labels.shape == images.shape[:1]
            and isinstance(classes, list) and all(isinstance(name, str) for name in classes)
            and {*labels.tolist()} <= {*range(len(classes))})


def decode_tiny_imagenet(folder, n_classes=200, n_train=500, n_val=50):
    """The content of the official folder as a dictionary of tensors; the counts are what it must hold."""
    if not folder.is_dir():
        fetch("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de", folder)
    try:
        wnids = read_lines(folder / "wnids.txt")
        names = dict(line.split("\t", 1) for line in read_lines(folder / "words.txt"))
        paths = [sorted((folder / "train" / wnid / "images").glob("*.JPEG")) for wnid in wnids]
        train = [(path, label) for label, class_paths in enumerate(paths) for path in class_paths]
        # The val pictures all lie in one folder: only the annotations say which class each belongs to.
        rows = [line.split("\t")[:2] for line in read_lines(folder / "val" / "val_annotations.txt")]
        val = sorted((folder / "val" / "images" / file, wnids.index(wnid)) for file, wnid in rows)
        if [path for path, _ in val] != sorted((folder / "val" / "images").glob("*.JPEG")):
            raise ValueError("a picture with two rows, or a row with no picture")
        content = {"classes": [names[wnid].split(",")[0] for wnid in wnids]}
    except (ValueError, KeyError):
        raise ValueError(f"{folder}: wnids.txt, words.txt, val/val_annotations.txt and val/images do not fit together: unpack "
                         "the archive again") from None
    for half, pairs, each in (("train", train, n_train), ("val", val, n_val)):
        labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
        counts = labels.bincount(minlength=n_classes).tolist()
        if counts != [each] * n_classes:
            odd = next((f", {n} in {wnid}" for wnid, n in zip(wnids, counts) if n != each), "")
            raise ValueError(f"{folder / half}: expected {each} images in each of {n_classes} classes, found {len(counts)} classes{odd}: "
                             "unpack the archive again")
        # Processes, since PIL decodes with Python's lock held: threads make it slower. They hand over 2.5 MB at a time, and end
        # when this process is killed.
        loader = DataLoader([path for path, _ in pairs], batch_size=200, num_workers=min(8, torch.get_num_threads()),
                            prefetch_factor=1, collate_fn=decode_64)
        images = []
        for batch in progress(loader, len(loader), f"decoding {half}"):
            if isinstance(batch, Exception):
                raise batch
            images.append(batch.clone())                                     # out of shared memory, of which there may be little
        content |= {f"{half}_images": torch.cat(images), f"{half}_labels": labels}
    return content


def decode_64(paths):
    """Pictures of the data set, uint8 (n, 3, 64, 64); or the error of the first that is broken: raised, it would come out of the
    DataLoader inside a traceback."""
    pictures = []
    for path in paths:
        try:
            pictures.append(read_picture(path))
        except OSError as error:
            return error
        except ValueError:
            return ValueError(f"{path} is not a whole picture: unpack the archive again")
        if pictures[-1].shape != (3, 64, 64):
            return ValueError(f"{path} has not 64 x 64 pixels: unpack the archive again")
    return torch.stack(pictures)


def read_lines(path):
    """The lines of a text file of the data set; raises FileNotFoundError saying what to do."""
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: unpack the archive again") from None


# ---- glyphs ------------------------------------------------------------------------------------------------------------

def glyphs(data_dir, n_train=24, n_test=8):
    """100 classes of 64 x 64 pictures drawn with numpy: a class is a fixed figure of two strokes and their mirror images
    (so that a flip keeps the class); every sample has its own affine jitter, thickness, colours, clutter and noise.
    data_dir is not used."""
    halves = []
    for half, n in enumerate((n_train, n_test)):
        images = torch.cat([torch.from_numpy(draw_class(label, half, n)) for label in range(100)])
        halves.append(Images(images, torch.arange(100).repeat_interleave(n), [f"glyph {i:02d}" for i in range(100)]))
    return tuple(halves)


def draw_class(label, half, n):
    """n samples of a class, uint8 (n, 3, 64, 64); half: 0 for training, 1 for test."""
    figure = random_strokes(np.random.default_rng([0, label]), 2)                                # (2, 2, 2)
    figure = np.concatenate([figure, figure * (-1, 1)]).astype(np.float32)                       # (4, 2, 2)
    rng = np.random.default_rng([1 + half, label])
    angle, scale, shear, dx, dy = rng.uniform((-0.1, 1.0, -0.05, -0.05, -0.05), (0.1, 1.1, 0.05, 0.05, 0.05), (n, 5)).T[..., None]
    y, x = np.mgrid[-1:1:64j, -1:1:64j].reshape(2, 1, -1).astype(np.float32)                     # (1, 4096) each
    u = scale * (np.cos(angle) * x - np.sin(angle) * y) + dx                                     # (n, 4096)
    v = scale * (np.sin(angle) * x + np.cos(angle) * y) + dy + shear * u
    ink = coverage(u, v, figure[:, None], rng.uniform(0.08, 0.13, (n, 1)))                       # (n, 4096)
    clutter = [1.3 * random_strokes(rng, n) for _ in range(5)]                                   # 5 of (n, 2, 2)
    dirt = 0.6 * coverage(x, y, clutter, rng.uniform(0.02, 0.05, (n, 1)))
    paper, other, pen = (rng.uniform(*interval, (n, 3, 1)) for interval in ((0, 0.4), (0, 1), (0.6, 1)))
    picture = paper + dirt[:, None] * (other - paper)                                            # (n, 3, 4096)
    picture += ink[:, None] * (pen - picture)
    picture += 0.05 * rng.standard_normal(picture.shape, np.float32)
    return (picture.clip(0, 1) * 255).astype(np.uint8).reshape(n, 3, 64, 64)


def random_strokes(rng, n):
    """n segments (n, 2, 2) between different points of a 4 x 4 grid in [-0.75, 0.75]^2."""
    ends = np.array([rng.choice(16, 2, replace=False) for _ in range(n)])
    return (np.stack([ends % 4, ends // 4], -1) * 0.5 - 0.75).astype(np.float32)


def coverage(x, y, strokes, thickness):
    """How much each point (n, p) is covered, in [0, 1], by the nearest of several strokes (1 or n, 2, 2) of a thickness (n, 1)."""
    nearest = np.inf                                                                             # squared distance
    for stroke in strokes:
        (ax, ay), (bx, by) = stroke.transpose(1, 2, 0)[..., None]                                # (1 or n, 1) each
        dx, dy, px, py = bx - ax, by - ay, x - ax, y - ay
        t = ((px * dx + py * dy) / (dx * dx + dy * dy)).clip(0, 1)                               # foot of the perpendicular
        nearest = np.minimum(nearest, (px - t * dx) ** 2 + (py - t * dy) ** 2)
    return ((thickness - np.sqrt(nearest)) / 0.03 + 0.5).clip(0, 1).astype(np.float32)


# ---- a folder of one's own -----------------------------------------------------------------------------------------------

def folder(data_dir, side=224):
    """Pictures of any size in data_dir/train/<class>/ and data_dir/test/<class>/: their central squares, side x side pixels.

    Without test/, every fifth picture of a class, in the order of the names, is for testing.
    """
    classes, in_test = ([path.name for path in visible(data_dir / half) if path.is_dir()] for half in ("train", "test"))
    if not classes:
        raise FileNotFoundError(f"there is no class folder in {data_dir / 'train'}: --data-dir takes a folder that holds "
                                "train/<class>/<picture> and, if you like, test/<class>/<picture>")
    pairs = {half: [(path, label) for label, name in enumerate(classes) for path in visible(data_dir / half / name)]
             for half in ("train", "test")}
    if not (data_dir / "test").exists():
        labels = torch.tensor([label for _, label in pairs["train"]])
        held = every_nth(labels, 5)
        pairs = {half: [pair for pair, test in zip(pairs["train"], held) if test == (half == "test")] for half in pairs}
    if other := sorted({*in_test} - {*classes}):
        raise ValueError(f"{data_dir / 'test'} has a class folder '{other[0]}' that train/ has not: add or remove it")
    halves = []
    for half, found in pairs.items():
        if not found:
            raise ValueError(f"there is no picture in {data_dir / half}/<class>/")
        squares = (square(read_picture(path)) for path, _ in progress(found, len(found), f"reading {half}"))
        images = [v2.functional.resize(picture, [side, side], v2.InterpolationMode.BICUBIC) for picture in squares]
        halves.append(Images(torch.stack(images), torch.tensor([label for _, label in found]), classes))
    return tuple(halves)


def visible(folder):
    """What is in a folder, in the order of the names, but for hidden files; nothing, if there is no folder. Raises PermissionError."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


LOADERS = {"glyphs": glyphs, "cifar100": cifar100, "tinyimagenet": tiny_imagenet, "folder": folder}
N_CLASSES = {"glyphs": 100, "cifar100": 100, "tinyimagenet": 200}


def defaults(name):
    """The options that til.py and mts.py set by the data set: glyphs are few and small."""
    if name == "glyphs":
        return {"backbone": "vit_tiny", "batch_size": 6, "predictor_epochs": 5, "predictor_batch_size": 16}
    return {"backbone": "dinov2_vits14", "batch_size": 64, "predictor_epochs": 10, "predictor_batch_size": 128}


# ---- tasks and pictures --------------------------------------------------------------------------------------------------

def split(n_classes, splits, seed):
    """The classes of each task: a list of `splits` lists of n_classes / splits indices, in an order drawn from the seed.

    Raises ValueError if that cannot be, or leaves one class a task, which any network would get right.
    """
    choices = [d for d in range(1, n_classes) if n_classes % d == 0]
    if splits not in choices:
        raise ValueError(f"{splits} splits do not divide {n_classes} classes into tasks of two and more: choose one of {choices}")
    order = np.random.default_rng(seed).permutation(n_classes)
    return order.reshape(splits, -1).tolist()


def task(half, classes):
    """D_t: the images of these classes (n, 3, h, w) and their labels (n,) as positions in `classes`."""
    _, places = locate(half, [classes])
    return half.images[places >= 0], places[places >= 0]


def locate(half, tasks):
    """The task of each image, task_ids (N,), and the place of its class in that task, (N,): from 0, or -1 if no task has it."""
    table = torch.full((2, len(half.classes)), -1)
    for t, classes in enumerate(tasks):
        table[0, classes], table[1, classes] = t, torch.arange(len(classes))
    return table[:, half.labels]


def hold_out(train):
    """Two halves from `train`: nine tenths of every class to train with, and every tenth image for testing."""
    held = every_nth(train.labels, 10)
    return check_classes(*(Images(train.images[part], train.labels[part], train.classes) for part in (~held, held)))


def every_nth(labels, n):
    """Of the images with these labels (N,), every n-th of each class, beginning with its first: bool (N,)."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        held[(labels == label).nonzero()[::n]] = True
    return held


def generator(*seed):
    """A torch generator on the CPU that depends on nothing but these numbers: generator(seed, t) is task t's own.

    Zeros at the end make no difference: generator(seed) gives the numbers of t = 0, the task predictor's.
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))


def flips(n, generator):
    """How an epoch's n images are seen in training: which are mirrored, bool (n,)."""
    return (torch.rand(n, generator=generator) < 0.5,)


def flips_and_crops(n, generator, smallest=0.35):
    """As flips, and which square of each image is seen, (n, 3): side and centre x, y, where the image is [-1, 1]^2.

    The area is uniform in [smallest, 1], the place in what the area leaves free.
    """
    side = (smallest + (1 - smallest) * torch.rand(n, 1, generator=generator)).sqrt()
    centre = (1 - side) * (2 * torch.rand(n, 2, generator=generator) - 1)
    return *flips(n, generator), torch.cat([side, centre], dim=1)


def prepare(images, vit, flip=None, crop=None):
    """uint8 images (B, 3, h, w) -> the input of `vit` (B, 3, s, s), in its dtype; mirrored where flip (B,) says so, cropped to
    crop (B, 3): side and centre, as flips_and_crops draws them."""
    x, size = images.float() / 255, (vit.image_size, vit.image_size)
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    if x.shape[-2:] != size and (crop is None or x.shape[-1] > size[1]):     # grid_sample below cannot shrink: it has no antialiasing
        x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
    if crop is not None:
        side, centre = crop[:, :1, None], crop[:, 1:, None]                  # (B, 1, 1), (B, 2, 1)
        window = torch.cat([side * torch.eye(2, device=x.device), centre], dim=2)                    # (B, 2, 3)
        grid = F.affine_grid(window, (len(x), 3, *size), align_corners=False)
        x = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False).clamp(0, 1)
    # The statistics are numbers, not tensors, which a CUDA graph could not copy from the CPU.
    channels = zip(x.unbind(1), vit.config.mean, vit.config.std)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1).to(vit.cls_token.dtype)


FORMATS = b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM"                    # how their files begin
UPRIGHT = {2: [-1], 3: [-1, -2], 4: [-2], 6: [-1], 7: [-1, -2], 8: [-2]}       # EXIF orientation: sides to mirror


def read_picture(path):
    """A JPEG, PNG, GIF, WebP or BMP file as uint8 (3, h, w): upright, RGB, the first frame of several.

    Raises ValueError, or PermissionError for a file that may not be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            head = file.read(32)
        if not head.startswith(FORMATS):
            raise ValueError("it is no JPEG, PNG, GIF, WebP or BMP file")
        if head.startswith(b"\x89PNG") and head[24] == 16:                   # would be clipped to 8 bits, not scaled
            raise ValueError("it has 16 bits a channel")
        picture = pil_loader(str(path))          # refuses pictures so large that they would exhaust the memory
        orientation, pixels = picture.getexif().get(0x0112, 1), v2.functional.pil_to_tensor(picture)
    except PermissionError:
        raise
    except Exception as error:                   # broken bytes make a decoder raise almost anything
        raise ValueError(f"{path} cannot be read as a picture ({str(error) or type(error).__name__}): remove it, or convert it to "
                         "JPEG or PNG with 8 bits a channel") from None
    return (pixels.mT if orientation in (5, 6, 7, 8) else pixels).flip(UPRIGHT.get(orientation, []))


def square(picture):
    """The central square (3, s, s) of a picture (3, h, w)."""
    return v2.functional.center_crop(picture, min(picture.shape[1:]))


# ---- files -------------------------------------------------------------------------------------------------------------

def atomically(path, write):
    """Calls write(scratch path), then renames: a file named `path` is either whole or not there. Raises OSError."""
    scratch = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")     # containers that share a disk share process ids
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(scratch)
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:     # a full disk: torch.save says so with a RuntimeError
        raise OSError(f"cannot write {path} ({error}): what was there before is kept; make room for it "
                      "there, or see who may write, and run the command again") from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def lock(folder, rank=0, world=1):
    """Keeps other processes out of a folder for as long as the file that it returns is open, even if this one is killed, and
    clears away what was half written when one was. The processes of torchrun share the lock, as soon as the first one had it alone:
    if only one of them is killed, the others still hold it. Raises ValueError if another process has the folder, OSError if it
    cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")
        if rank == 0:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for scratch in folder.rglob(".*.part"):
                scratch.unlink(missing_ok=True)
        if world > 1:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is at work in {folder}: wait for it, or name another folder with --out") from None
    except OSError as error:
        raise OSError(f"cannot write into {folder} ({error}): see who may write there, or name another folder with --out") from None
    return file


@contextlib.contextmanager
def turn(folder):
    """Lets in one process after the other to fetch or make what is missing in a folder of data sets, and clears away what was
    half written when one was killed. In a folder that cannot be written to there is nothing to wait for."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(folder / ".lock", os.O_RDONLY | os.O_CREAT, 0o666)    # another user's file will do
            stack.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process at work in {folder}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            for scratch in folder.glob(".*.part"):
                scratch.unlink(missing_ok=True)
        yield


def save_tensors(path, content):
    """A dictionary of tensors, numbers and strings, written atomically, with a checksum of all of it."""
    atomically(path, lambda scratch: torch.save(content | {"checksum": checksum(content)}, scratch))


def load_tensors(path, mmap=None):
    """What save_tensors wrote, on the CPU, without executing pickles. Raises ValueError for a damaged file.

    With mmap the file is read where it is used.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        whole = content.pop("checksum", None) == checksum(content)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(f"cannot read {path} ({error}): see to the disk, or who may read there") from None
    except Exception as error:                   # bytes that are no PyTorch file make torch.load raise almost anything
        if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error), re.IGNORECASE):
            raise MemoryError(f"for {path}: {error}") from None
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged: remove it and run the command again")
    return content


def save_json(path, content):
    """A dictionary as JSON, one line a key, written atomically, with a checksum."""
    content = content | {"checksum": checksum(json_lines(content))}
    atomically(path, lambda scratch: scratch.write_text(f"{{\n{json_lines(content)}\n}}\n"))


def save_png(path, picture):
    """A picture, uint8 (3, h, w), written atomically."""
    atomically(path, lambda scratch: scratch.write_bytes(encode_png(picture).numpy()))


def json_lines(content):
    """The lines between the braces of save_json's file."""
    return ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())


def load_json(path):
    """What save_json wrote. Raises ValueError for a file that was damaged or edited."""
    try:
        content = json.loads(path.read_text())
        whole = content.pop("checksum") == checksum(json_lines(content))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged: remove it and run the command again")
    return content


def checksum(*content):
    """CRC-32, as text, of tensors, numbers and strings, in dictionaries and lists: tells one data set or file from another."""
    return f"{crc32(content):08x}"


def crc32(content, crc=0):
    """The same as a number, continued from `crc`."""
    if isinstance(content, torch.Tensor):
        return zlib.crc32(content.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    if isinstance(content, (dict, list, tuple)):
        for item in content.items() if isinstance(content, dict) else content:
            crc = crc32(item, crc)
        return crc
    return zlib.crc32(repr(content).encode(), crc)


def open_run(folder, config):
    """Makes a run folder, or continues one that was made with the same config. Raises ValueError naming what differs."""
    path, adapters = folder / "config.json", folder / "adapters"
    if {file.name for file in folder.iterdir()} <= {".lock", path.name, adapters.name} and not (adapters.exists() and [*adapters.iterdir()]):
        save_json(path, config)                  # nothing is kept here yet, though a command with other settings may have failed here
    if not path.exists():
        raise ValueError(f"{path} is missing, so nobody knows what is kept beside it: restore it or name another folder with --out")
    found = load_json(path)
    for key in config:
        if found.get(key) != config[key]:
            earlier, now = (textwrap.shorten(str(value), 60) for value in (found.get(key), config[key]))
            raise ValueError(f"{folder} was made with {key} {earlier}, this command has {key} {now}: "
                             "repeat the earlier setting or name another folder with --out")


# ---- command line ------------------------------------------------------------------------------------------------------

def progress(items, total, label):
    """Passes items on and draws a bar on the terminal meanwhile."""
    for i, item in enumerate(items, 1):
        if sys.stderr.isatty() and (i == total or i % max(1, total // 50) == 0):
            print(f"\r{label} [{'#' * (40 * i // total):40}] {i}/{total}", end="\n" if i == total else "", file=sys.stderr)
        yield item


class Parser(argparse.ArgumentParser):
    """argparse, with an example first in the help, and errors in one line."""

    def __init__(self, example, description, prog=None):
        super().__init__(prog=prog, description=f"{description}\n\nexample: {example}", formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


NO_MEMORY = "alloc|out of memory|CUBLAS_STATUS_NOT_INITIALIZED"               # in the messages of PyTorch's many errors for this


def run_command(main):
    """Calls main(); an error of the user's ends in one line and exit code 2, Ctrl-C in one line and 130."""
    def stop(message, code):
        print(f"{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(code)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))      # one may be closed
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:                      # whoever read the output, `head` say, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)                            # as shells have it for a program that ended so
    except PermissionError as error:
        stop(f"error: {error}: see whose it is and who may read and write there", 2)
    except (ValueError, OSError, FloatingPointError) as error:
        stop(f"error: {error}", 2)
    except (MemoryError, RuntimeError) as error:
        if re.search("(closed|reset) by peer", str(error)):
            stop("error: another process of torchrun has ended, its message says why; what was finished is kept", 2)
        if isinstance(error, RuntimeError) and not re.search(NO_MEMORY, str(error), re.IGNORECASE):
            raise
        reason = textwrap.shorten((str(error) or "MemoryError").splitlines()[0], 200, placeholder=" ...")
        stop(f"error: out of memory ({reason}): choose a smaller --batch-size, --predictor-batch-size, --image-size, --rank or --sizes, or "
             "another --device if others fill this one; what was finished is kept", 2)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        stop("stopped; til.py and mts.py keep finished tasks and epochs, the same command goes on from there", 130)


def main():
    """Draws a sheet of samples of a data set."""
    parser = Parser("python data.py --dataset glyphs", "Draw a sheet of samples, one row a class.")
    parser.add_argument("--dataset", choices=LOADERS, default="glyphs", help="default: glyphs")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of the data sets (default: data)")
    parser.add_argument("--out", type=Path, help="PNG file (default: <dataset>.png)")
    args = parser.parse_args()
    if args.out and args.out.suffix != ".png":
        raise ValueError(f"--out {args.out}: the sheet is a PNG file, its name must end in .png")
    train, _ = load(args.dataset, args.data_dir)
    rows = [task(train, [label])[0][:12] for label in range(0, len(train.classes), max(1, len(train.classes) // 12))][:12]
    rows = [F.pad(row, (0, 0, 0, 0, 0, 0, 0, 12 - len(row)), value=255) for row in rows]
    out = args.out or Path(f"{args.dataset}.png")
    save_png(out, make_grid(torch.cat(rows), nrow=12))
    print(f"{out}: 12 samples of {len(rows)} of {len(train.classes)} classes")


if __name__ == "__main__":
    run_command(main)
