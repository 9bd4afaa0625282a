"""Task-incremental learning (TIL): Algorithms 1 and 2 of the paper (appendix A.1).

The task is known at inference. One LoRA modulation theta_t is trained per task; an associative memory keeps them all and
gives each back from a part of itself, the task's key k_t.

    python til.py                                                         # glyphs, 20 tasks, on a CPU in two minutes
    python til.py --dataset cifar100 --splits 20 --memory hopfield        # the paper's C100-20S
    python til.py --predict cat.png --task 3                              # Algorithm 2 on a picture of one's own
"""
import math
import platform
import re
import resource
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import data
import evaluate
import lora
import vit as substrate
from bayespcn import BayesPCN
from hopfield import Hopfield

LR, LR_END, WEIGHT_DECAY = 0.005, 0.0001, 0.1                                # paper, A.2
KEY_SHARE = 0.1                                                              # |k_t| = floor(0.1 |theta_t|), section 3.1


# ---- the two algorithms --------------------------------------------------------------------------------------------------

def til_training(tasks, train, memory, learn):
    """Algorithm 1. tasks: the classes of each task; train: data.Images; learn(t, images, labels) -> theta_t (P,).

    Returns the memory M_T and the task keys K_T, a list of T vectors (|k|,).
    """
    keys = []                                                                # 2: M_0 and K_0 are empty
    for t, classes in enumerate(tasks, 1):                                   # 3
        images, labels = data.task(train, classes)                           # 4: D_t, and nothing of other tasks
        theta = learn(t, images, labels)                                     # 5, 6: initialised at random, AdamW
        key, value = split_key(theta)                                        # 7: k_t and theta_t / k_t
        keys.append(key)                                                     # 8
        memory.write(key, value)                                             # 9
    return memory, keys                                                      # 11


def til_inference(vit, head, images, key, memory):
    """Algorithm 2: logits (n, classes of the task) for uint8 images (n, 3, h, w) of the task with this key (|k|,)."""
    theta_hat = memory.read(key)                                             # 3
    lora.set(vit, theta_hat)
    return head(features(vit, images))                                       # 5: y_hat = C(x; W, theta_hat)


def split_key(theta):
    """theta (P,) -> the task identification vector k_t (floor(0.1 P),) and the rest."""
    n = math.floor(KEY_SHARE * len(theta))
    return theta[:n], theta[n:]


class Disk:
    """The ground truth to compare memories with: a dictionary, which must be asked with exactly the key."""

    def __init__(self):
        self.items = {}

    def write(self, key, value):
        """Stores key (|k|,) with value (P - |k|,)."""
        self.items[key.numpy().tobytes()] = torch.cat([key, value])

    def read(self, key):
        """theta (P,) as written; KeyError for a key that is not stored."""
        return self.items[key.numpy().tobytes()]

    def state_dict(self):
        """Everything stored, in the order of writing."""
        return {"thetas": list(self.items.values()), "n_key": len(next(iter(self.items))) // 4}

    def load_state_dict(self, state):
        """Takes over what state_dict gave."""
        for theta in state["thetas"]:
            self.write(theta[:state["n_key"]], theta[state["n_key"]:])

    @property
    def nbytes(self):
        """Size of what is stored in bytes."""
        return sum(theta.nbytes for theta in self.items.values())


MEMORIES = ("hopfield", "bayespcn", "disk")


def new_memory(name, dim, bpcn_read="marginal"):
    """An empty memory for vectors theta of `dim` elements."""
    return Hopfield() if name == "hopfield" else BayesPCN(dim, read=bpcn_read) if name == "bayespcn" else Disk()


# ---- training one task -----------------------------------------------------------------------------------------------------

def fit(parameters, forward, n, epochs, batch_size, generator, lr=LR):
    """AdamW with cosine decay lr -> LR_END over n items an epoch; forward(indices, flip) -> logits and labels of a batch.

    All randomness comes from `generator` (on the CPU). Returns (loss, accuracy in percent) over the last epoch.
    Raises FloatingPointError when the loss is not finite.
    """
    cuda, lr_now = parameters[0].is_cuda, torch.tensor(lr, device=parameters[0].device)
    optimizer = torch.optim.AdamW(parameters, lr_now, weight_decay=WEIGHT_DECAY, fused=True, capturable=cuda)
    loss_sum, hits = torch.zeros_like(lr_now), torch.zeros_like(lr_now)

    def step(batch, flip):
        logits, labels = forward(batch, flip)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_sum.add_(loss.detach(), alpha=len(labels))
        hits.add_((logits.argmax(1) == labels).sum())

    step = substrate.Graphed(step) if cuda else step
    done, steps = 0, epochs * math.ceil(n / batch_size)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(n, generator=generator).to(lr_now.device)
        flip = (torch.rand(n, generator=generator) < 0.5).to(lr_now.device)
        for batch in zip(order.split(batch_size), flip.split(batch_size)):
            lr_now.fill_(LR_END + (lr - LR_END) / 2 * (1 + math.cos(math.pi * done / steps)))
            step(*batch)
            done += 1
        loss, accuracy = loss_sum.item() / n, 100 * hits.item() / n
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in epoch {epoch}, learning rate {lr_now.item():.2g}")
        loss_sum.zero_(), hits.zero_()
    return loss, accuracy


def new_head(vit, n_classes, generator):
    """A linear classifier (width -> n_classes) over the class token: small random weights, zero bias."""
    head = nn.Linear(vit.config.width, n_classes, device="meta").to_empty(device="cpu")
    nn.init.normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    return head.to(vit.cls_token.device)


def train_adapter(vit, images, labels, n_classes, epochs, batch_size, generator):
    """Lines 5 and 6 of Algorithm 1: theta_t and the task's head, trained on D_t (uint8 images, labels 0..n_classes - 1).

    Returns a dictionary: theta (P,) and head (a state dict) on the CPU, loss and accuracy of the last epoch, seconds.
    """
    start = time.perf_counter()
    images, labels = images.to(vit.cls_token.device), labels.to(vit.cls_token.device)
    lora.init(vit, generator)
    head = new_head(vit, n_classes, generator)

    def forward(batch, flip):
        return head(vit(data.prepare(images[batch], vit, flip))), labels[batch]

    loss, accuracy = fit([*lora.parameters(vit), *head.parameters()], forward, len(labels), epochs, batch_size, generator)
    return {"theta": lora.get(vit).cpu(), "head": head.cpu().state_dict(), "loss": loss, "accuracy": accuracy,
            "images": epochs * len(labels), "seconds": time.perf_counter() - start}


@torch.no_grad()
def features(vit, images, batch_size=250):
    """Normalised class tokens (n, width) of uint8 images (n, 3, h, w), each independent of its companions."""
    device = vit.cls_token.device
    return torch.cat([vit(data.prepare(batch.to(device), vit)) for batch in images.split(batch_size)])


# ---- one run: one seed -----------------------------------------------------------------------------------------------------

class Run:
    """One seed's tasks, substrate and folder. Raises ValueError if the folder was made with other settings."""

    def __init__(self, args, seed, train, test):
        self.args, self.seed, self.train, self.test = args, seed, train, test
        self.tasks = data.split(len(train.classes), args.splits, seed)
        self.vit = substrate.load(args.backbone, args.weights, args.image_size)
        weights = data.checksum(*self.vit.state_dict().values())
        lora.add(self.vit.to(args.device), args.rank)
        self.folder = args.out / f"{args.dataset}-{args.splits}s-{args.backbone}-r{args.rank}-seed{seed}"
        self.config = {
            "dataset": args.dataset, "splits": args.splits, "backbone": args.backbone, "rank": args.rank, "seed": seed,
            "image_size": self.vit.image_size, "epochs": args.epochs, "batch_size": args.batch_size, "lr": [LR, LR_END],
            "weight_decay": WEIGHT_DECAY, "weights": weights,
            "train_images": len(train.labels), "train_data": data.checksum(train.labels, train.images[::97]),
            "test_images": len(test.labels), "test_data": data.checksum(test.labels, test.images[::97])}
        if args.predict and not (self.folder / f"{args.memory}.pt").exists():
            raise FileNotFoundError(f"no finished run in {self.folder}: run the same command without --predict first")
        data.open_run(self.folder, self.config)

    def adapter(self, t):
        """What train_adapter returned for task t (1..T). Raises ValueError if the file holds something else."""
        path, head = self.folder / "adapters" / f"{t}.pt", new_head(self.vit, len(self.tasks[0]), None)
        adapter = data.load_tensors(path)
        try:
            lora.set(self.vit, adapter["theta"])
            head.load_state_dict(adapter["head"])
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError):
            raise ValueError(f"{path} does not hold an adapter of this run: remove it to train task {t} again") from None
        return adapter | {"head": head}

    def learn(self, t, images, labels):
        """theta_t: from the folder if it is there, else trained and kept. Depends on nothing but the seed and t."""
        path = self.folder / "adapters" / f"{t}.pt"
        if not path.exists():
            try:
                adapter = train_adapter(self.vit, images, labels, len(self.tasks[0]), self.args.epochs,
                                        self.args.batch_size, data.generator(self.seed, t))
            except FloatingPointError as error:
                raise FloatingPointError(f"task {t}: {error}") from None
            data.save_tensors(path, adapter)
            left = adapter["seconds"] * (len(self.tasks) - t)
            print(f"task {t:3}/{len(self.tasks)}  loss {adapter['loss']:.4f}  train accuracy {adapter['accuracy']:6.2f} %  "
                  f"{adapter['images'] / adapter['seconds']:,.0f} images/s  {left // 60:.0f}:{left % 60:02.0f} left", flush=True)
        return self.adapter(t)["theta"]

    def memory(self, name):
        """The memory M_T and the keys K_T: from the folder if they are there, else by Algorithm 1."""
        path, memory = self.folder / f"{name}.pt", new_memory(name, len(lora.get(self.vit)), self.args.bpcn_read)
        if not path.exists():
            memory, keys = til_training(self.tasks, self.train, memory, self.learn)
            data.save_tensors(path, {"memory": memory.state_dict(), "keys": keys})
        for t, classes in enumerate(self.tasks, 1):                          # an adapter that was removed is trained again
            if not (self.folder / "adapters" / f"{t}.pt").exists():
                self.learn(t, *data.task(self.train, classes))
        state = data.load_tensors(path)
        try:
            memory.load_state_dict(state["memory"])
            if len(state["keys"]) != len(self.tasks):
                raise ValueError
            return memory, state["keys"]
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"{path} does not hold a {name} memory of this run: remove it to write it again") from None


def assess(run, memory, keys):
    """Accuracy in percent on every task's test images: with theta_t as trained, as recalled, and under four controls.

    Returns a dictionary of lists with one number a task; `recall_error` is relative, on the value part.
    """
    thetas = [run.adapter(t)["theta"] for t in range(1, len(run.tasks) + 1)]
    zero, mean = torch.zeros_like(thetas[0]), torch.stack(thetas).mean(0)
    lists = {name: [] for name in ("gt", "recalled", "none", "wrong", "mean", "linear", "recall_error")}
    for t, classes in enumerate(data.progress(run.tasks, len(run.tasks), "evaluating")):
        if not torch.equal(split_key(thetas[t])[0], keys[t]):
            raise ValueError(f"the memory file in {run.folder} was not written from adapters/{t + 1}.pt: remove it")
        images, labels = data.task(run.test, classes)
        head = run.adapter(t + 1)["head"]
        logits = til_inference(run.vit, head, images, keys[t], memory)
        lists["recalled"].append(evaluate.accuracy(logits, labels))
        lists["recall_error"].append(evaluate.recall_error(lora.get(run.vit).cpu(), thetas[t], len(keys[t])))
        for name, theta in (("gt", thetas[t]), ("wrong", thetas[t - 1]), ("mean", mean), ("none", zero)):
            if not torch.equal(theta, lora.get(run.vit).cpu()):              # an exact recall need not be classified twice
                lora.set(run.vit, theta)
                frozen = features(run.vit, images)                           # that of the last, `none`, has no adapter
                logits = head(frozen)
            lists[name].append(evaluate.accuracy(logits, labels))
        lists["linear"].append(evaluate.accuracy(linear_head(run, t + 1)(frozen), labels))
    return lists


def linear_head(run, t):
    """The control `linear`: a head trained as in Algorithm 1, but alone, on the features of the bare substrate."""
    images, labels = data.task(run.train, run.tasks[t - 1])
    labels, generator = labels.to(run.vit.cls_token.device), data.generator(run.seed, t)
    frozen, head = features(run.vit, images), new_head(run.vit, len(run.tasks[0]), generator)
    fit([*head.parameters()], lambda batch, flip: (head(frozen[batch]), labels[batch]), len(labels),
        run.args.epochs, run.args.batch_size, generator)
    return head


def results(run, name):
    """Runs Algorithm 1, then Algorithm 2 on all test images; writes and returns til-<memory>.json."""
    start = time.perf_counter()
    memory, keys = run.memory(name)
    lists = assess(run, memory, keys)
    adapters = [run.adapter(t) for t in range(1, len(run.tasks) + 1)]
    faa = {key: evaluate.faa(values) for key, values in lists.items()}
    cuda = run.args.device.startswith("cuda")
    name += "-joint" if (name, run.args.bpcn_read) == ("bayespcn", "joint") else ""
    content = {
        "setting": "til", "memory": name, **run.config, "class_order": run.tasks, "memory_bytes": memory.nbytes,
        "faa_gt": faa["gt"], "faa": faa["recalled"], "drop": faa["gt"] - faa["recalled"],
        "controls": {key: faa[key] for key in ("none", "wrong", "mean", "linear")},
        "recall_error": {"mean": faa["recall_error"], "max": max(lists["recall_error"])},
        "smallest_weight": evaluate.smallest_weight(memory, keys), "per_task": lists,
        "images_per_second": sum(a["images"] for a in adapters) / sum(a["seconds"] for a in adapters),
        "train_seconds": sum(a["seconds"] for a in adapters), "wall_seconds": time.perf_counter() - start,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}}
    data.save_json(run.folder / f"til-{name}.json", content)
    return content


def predict(run, name, picture, t):
    """Algorithm 2 on a picture file: prints the classes of task t by name with their probabilities."""
    if not 1 <= t <= len(run.tasks):
        raise ValueError(f"there is no task {t}: --task takes 1 to {len(run.tasks)}")
    image = data.square(data.read_picture(picture))[None]
    memory, keys = run.memory(name)
    logits = til_inference(run.vit, run.adapter(t)["head"], image, keys[t - 1], memory)
    if not logits.isfinite().all():
        raise ValueError(f"the answer is not a number: {name}.pt or adapters/{t}.pt in {run.folder} is damaged, remove both")
    probabilities = logits.softmax(1)[0].tolist()
    for probability, label in sorted(zip(probabilities, run.tasks[t - 1]), reverse=True):
        print(f"{100 * probability:6.2f} %  {run.train.classes[label]}")


# ---- command line ------------------------------------------------------------------------------------------------------------

def parse(parser):
    """Adds the options that TIL and MTS share and returns the checked arguments."""
    parser.add_argument("--dataset", choices=data.LOADERS, default="glyphs", help="default: glyphs, drawn on the spot")
    parser.add_argument("--splits", type=int, default=20, help="number of tasks T (default: 20)")
    parser.add_argument("--memory", choices=MEMORIES, default="hopfield", help="default: hopfield")
    parser.add_argument("--bpcn-read", choices=("marginal", "joint"), default="marginal", help="how BayesPCN reads (default: marginal)")
    parser.add_argument("--backbone", choices=substrate.CONFIGS, help="default: vit_tiny for glyphs, else dinov2_vits14")
    parser.add_argument("--weights", type=Path, help="weights file of the backbone (default: shipped or downloaded)")
    parser.add_argument("--image-size", type=int, help="side of the network's input in pixels")
    parser.add_argument("--rank", type=int, default=8, help="rank r of LoRA (default: 8)")
    parser.add_argument("--epochs", type=int, default=3, help="epochs a task (default: 3)")
    parser.add_argument("--batch-size", type=int, help="default: 4 for glyphs, else 64")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each (default: 0)")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of the data sets (default: data)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of run folders (default: runs)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one")
    parser.add_argument("--predict", type=Path, metavar="PICTURE", help="classify this picture with a finished run")
    args = parser.parse_args()
    small = args.dataset == "glyphs"
    args.backbone = args.backbone or ("vit_tiny" if small else "dinov2_vits14")
    args.batch_size = (4 if small else 64) if args.batch_size is None else args.batch_size
    for option in ("splits", "rank", "epochs", "batch_size"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} is {getattr(args, option)}: it must be at least 1")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds {args.seeds}: they must be different numbers, none below 0")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise ValueError(f"--device {args.device}: choose cpu, cuda or cuda:N")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: this machine has no CUDA GPU that PyTorch can use; try --device cpu")
    torch.set_float32_matmul_precision("high")                               # TF32 on GPUs; memories read in float64
    return args


def main():
    """Trains, stores, recalls and evaluates, one run per seed; or classifies one picture."""
    parser = data.Parser(description="Task-incremental learning (Algorithms 1 and 2).",
                         epilog="example: python til.py --dataset cifar100 --splits 20 --memory hopfield")
    parser.add_argument("--task", type=int, help="the task (1 to T) of the picture")
    args = parse(parser)
    if (args.predict is None) != (args.task is None):
        raise ValueError("--predict PICTURE and --task T go together")
    if args.predict and len(args.seeds) > 1:
        raise ValueError(f"--predict takes one run, --seeds names {len(args.seeds)}")
    train, test = data.load(args.dataset, args.data_dir)
    if args.predict:
        return predict(Run(args, args.seeds[0], train, test), args.memory, args.predict, args.task)
    print(evaluate.report([results(Run(args, seed, train, test), args.memory) for seed in args.seeds]))


if __name__ == "__main__":
    data.run_command(main)
