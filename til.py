"""Task-incremental learning (TIL), Algorithms 1 and 2 of the paper (A.1): the task is known at inference.

    python til.py                                                     # glyphs: half a minute on a CPU
    python til.py --dataset cifar100 --splits 20 --memory hopfield    # the paper's C100-20S, on a GPU
    python til.py --predict picture.png --task 3                      # Algorithm 2 on one picture

The files of a run are in a folder of runs/. Repeat a command to resume it; torchrun divides the tasks.
"""
import copy
import math
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn as nn

import data
import evaluate
import lora
import vit as substrate

LR, LR_END, WEIGHT_DECAY = 0.005, 0.0001, 0.1                   # paper, A.2
RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))


# ---- the two algorithms --------------------------------------------------------------------------
def til_training(tasks, train, memory, learn):
    """Algorithm 1, with its line numbers: returns M_T and K_T. tasks: the classes of each task;
    learn(t, images, labels) -> theta_t (P,)."""
    keys = []                                                   # 2: K_0 is empty, and so is M_0
    for t, classes in enumerate(tasks, 1):                      # 3
        images, labels = data.task(train, classes)              # 4: D_t, and nothing of other tasks
        theta = learn(t, images, labels)                        # 5, 6: random, then trained by AdamW
        key, value = lora.split_key(theta)                      # 7: k_t, in A.1 v_t; and the rest
        keys.append(key)                                        # 8
        memory.write(key, value)                                # 9
    return memory, keys                                         # 11


@torch.no_grad()
def til_inference(vit, head, images, key, memory):
    """Algorithm 2: logits (n, classes of a task) for uint8 images (n, 3, h, w) of the task with this key."""
    theta_hat = memory.read(key)                                # 3
    lora.set(vit, theta_hat)
    return head(substrate.features(vit, images))                # 5: y_hat = C(x; W, theta_hat)


class Classifier(nn.Module):
    """C(x; W, theta): a ViT with LoRA, and a head on its class token."""

    def __init__(self, vit, n_classes, plain):
        super().__init__()
        self.vit, self.plain, self.graphs = vit, plain, {}
        self.head = substrate.Head(vit.config.width, n_classes, device=vit.cls_token.device)

    def forward(self, images, *view):
        """Logits (B, n_classes) for uint8 images (B, 3, h, w), seen as `view` says (see vit.prepare)."""
        return self.head(self.vit(substrate.prepare(images, self.vit, *view)).float())

    def logits(self, *inputs):
        """The same as forward; but unless plain, it replays a CUDA graph, which is faster."""
        if self.plain:
            return self(*inputs)
        size = len(inputs[0])                                   # of the batch; one graph for each
        if size not in self.graphs:
            wrapper = nn.ModuleList([self])                     # the graph replaces its forward, not ours
            wrapper.forward, sample = self.forward, tuple(x.clone() for x in inputs)
            self.graphs[size] = torch.cuda.make_graphed_callables(wrapper, sample)
        return self.graphs[size](*inputs)


def flips(n, generator):
    """How n images are seen in an epoch: (mirrored,), bool (n,)."""
    return (torch.rand(n, generator=generator) < 0.5,)


def fit(logits, parameters, x, y, epochs, batch_size, generator, lr=LR, views=flips, smoothing=0.0,
        report=lambda *_: None):
    """Trains the parameters so that logits(x, *view) predict the labels y (n,) of the items x (n, ..).

    AdamW with a cosine decay of its rate. views(n, generator) draws how the items are seen in an epoch;
    smoothing: of the labels. Calls report(epoch, loss, accuracy in percent) after each; returns the last two.
    """
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=WEIGHT_DECAY, fused=True)
    steps = epochs * math.ceil(len(y) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=LR_END)
    for epoch in range(1, epochs + 1):
        totals = torch.zeros(2, device=y.device)                # of the loss and of right answers
        order = torch.randperm(len(y), generator=generator).to(y.device)
        view = [part.to(y.device).split(batch_size) for part in views(len(y), generator)]
        for batch, *seen in zip(order.split(batch_size), *view):
            output = logits(x[batch], *seen)                    # (B, n_classes)
            loss = nn.functional.cross_entropy(output, y[batch], label_smoothing=smoothing)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            totals += torch.stack([loss.detach() * len(batch), (output.argmax(1) == y[batch]).sum()])
        loss, accuracy = (totals / len(y)).tolist()
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} in epoch {epoch}: look at pictures and weights, lower LR")
        report(epoch, loss, 100 * accuracy)
    return loss, 100 * accuracy


class Run:
    """The tasks, the network and the folder of one seed. What the folder holds is not made again."""

    def __init__(self, args, seed, train, test):
        self.args, self.seed, self.train, self.test = args, seed, train, test
        self.tasks = data.split(len(train.classes), args.splits, seed)
        self.vit = substrate.load(args.backbone, args.weights, args.image_size)
        self.vit.to(args.device, torch.float32 if args.plain else torch.bfloat16)
        lora.add(self.vit, args.rank, args.alpha)               # adapters and heads are always float32
        self.classifier = Classifier(self.vit, len(self.tasks[0]), args.plain)
        self.empty_memory = evaluate.make_memory(args.memory, len(lora.get(self.vit)))
        self.folder = args.out / f"{args.dataset}-{args.splits}s-{args.backbone}-r{args.rank}-seed{seed}"
        self.memory_name = args.memory.replace(":", "-")        # in the names of files
        options = "dataset splits backbone image_size rank alpha epochs batch_size validate plain".split()
        self.config = {option: getattr(args, option) for option in options} | {
            "seed": seed, "class_order": self.tasks, "lr": [LR, LR_END], "weight_decay": WEIGHT_DECAY,
            "weights": self.vit.digest, "images": data.digest(train.images),
            "code of til.py": data.digest(sys.modules[Run.__module__]),
            "code of data.py": data.digest(data.task, data.task_labels, data.generator)}
        self.config |= {f"code of {file.__name__}.py": data.digest(file) for file in (substrate, lora)}
        found = len([*self.folder.glob("adapters/*.pt")])
        if not found or self.find("config.json") is None:       # `find` refuses other options and other code
            data.save(self.folder / "config.json", self.config)
        print(f"P = {len(lora.get(self.vit))}; {found} of {args.splits} tasks found in {self.folder}"
              + ", not trained again" * (found > 0))

    def find(self, name, **more):
        """The content of a file of this run, or None. ValueError if other options or code made it."""
        path = self.folder / name
        if not path.exists():
            return None
        content = data.read(path)
        made_with = content.get("made_with", content)
        for option, value in (self.config | more).items():
            if made_with.get(option) != value:
                raise ValueError(f"{path} was made with {option} {made_with.get(option)}, this command has "
                                 f"{value}: change it back, name another --out, or remove {self.folder}")
        return content

    def save(self, name, content, **more):
        """Writes a file that `find` finds."""
        data.save(self.folder / name, content | {"made_with": self.config | more})

    def learn(self, t, images, labels):
        """theta_t (P,): found in the folder, or trained. It depends on the seed and t alone."""
        name, args, vit, head = f"adapters/{t}.pt", self.args, self.vit, self.classifier.head
        if found := self.find(name, t=t):
            return found["theta"]
        start, generator = time.perf_counter(), data.generator(self.seed, t)
        lora.init(vit, generator)                               # line 5 of Algorithm 1; `fit` is line 6
        head.init(generator)
        parameters = [*lora.parameters(vit), *head.parameters()]
        loss, accuracy = fit(self.classifier.logits, parameters, images.to(args.device),
                             labels.to(args.device), args.epochs, args.batch_size, generator)
        theta, seconds = lora.get(vit).cpu(), time.perf_counter() - start
        self.save(name, {"theta": theta, "head": head.state_dict(), "seconds": seconds}, t=t)
        print(f"task {t:3}/{args.splits}  loss {loss:.4f}  train accuracy {accuracy:6.2f} %  "
              f"{args.epochs * len(labels) / seconds:,.0f} images/s  "
              f"{(args.splits - t) * seconds / WORLD:.0f} s left", flush=True)
        return theta

    def trained(self, t):
        """What is kept of task t (1..T): theta_t (P,), its head, and the seconds that it took."""
        content, head = self.find(f"adapters/{t}.pt", t=t), copy.deepcopy(self.classifier.head)
        head.load_state_dict(content["head"])
        return content["theta"], head, content["seconds"]

    def remember(self):
        """The memory M_T and the keys K_T: found in the folder, or made by Algorithm 1."""
        memory, path = self.empty_memory, self.folder / f"{self.memory_name}.pt"
        code = data.digest(sys.modules[type(memory).__module__], til_training)
        made_by = {"memory": self.args.memory, "code": code}
        if path.exists() and data.read(path).get("made_with", {}).get("code") != code:
            print(f"{path} was made by other code: it is written again")
        elif len([*self.folder.glob("adapters/*.pt")]) == self.args.splits and path.exists():
            print(f"memory found in {path}, not written again")
            found = self.find(path.name, **made_by)
            memory.load_state_dict(found["memory"])
            return memory, found["keys"]
        memory, keys = til_training(self.tasks, self.train, memory, self.learn)
        self.save(path.name, {"memory": memory.state_dict(), "keys": keys}, **made_by)
        return memory, keys


# ---- evaluation ----------------------------------------------------------------------------------
def assess(run, memory, keys, given):
    """Classifies each test image as one of task given (n,), from 0. Returns the predicted labels (n,) with
    theta as trained (gt), as recalled, and with each control; and the recall errors, one a task."""
    thetas, heads, _ = zip(*(run.trained(t) for t in range(1, len(run.tasks) + 1)))
    mean, names = torch.stack(thetas).mean(0), ("gt", "recalled", *evaluate.CONTROLS)
    answers, errors = {name: torch.empty_like(given) for name in names}, []
    for t in data.progress(given.unique().tolist(), "evaluating"):
        images, others = run.test.images[given == t], {"gt": thetas[t], "mean": mean, "wrong": thetas[t - 1]}
        logits = {"recalled": til_inference(run.vit, heads[t], images, keys[t], memory)}
        errors.append(evaluate.recall_error(lora.get(run.vit).cpu(), thetas[t]))
        for name, theta in (others | {"none": 0 * mean}).items():
            lora.set(run.vit, theta)
            tokens = substrate.features(run.vit, images)
            logits[name] = heads[t](tokens)
        logits["linear"] = linear_head(run, t)(tokens)          # `none` came last: theta is 0
        for name, values in logits.items():
            answers[name][given == t] = values.argmax(1).cpu()
    return answers, errors


def linear_head(run, t):
    """The control `linear`: a head for task t (from 0), trained without flips on a ViT with theta = 0."""
    images, labels = data.task(run.train, run.tasks[t])
    x, generator = substrate.features(run.vit, images).cpu(), data.generator(run.seed, t + 1)
    head = copy.deepcopy(run.classifier.head).cpu()             # for so small products, a CPU is faster
    head.init(generator)
    fit(lambda x, _: head(x), head.parameters(), x, labels, run.args.epochs, run.args.batch_size, generator)
    return head.to(run.args.device)


def results(run):
    """Algorithm 1, then Algorithm 2 on all test images; writes til-<memory>.json and returns its content."""
    start = time.perf_counter()
    memory, keys = run.remember()
    task_ids, labels = data.task_labels(run.test, run.tasks)
    answers, errors = assess(run, memory, keys, task_ids)
    hits = {name: answer == labels for name, answer in answers.items()}
    seconds = sum(run.trained(t)[2] for t in range(1, run.args.splits + 1))
    rate = run.args.epochs * len(run.train.labels) / seconds
    return evaluate.write_result(run, "til", hits, task_ids, errors, start, images_per_second=rate)


def predict(run):
    """Algorithm 2 on a picture file."""
    image, t = data.picture(run.args.predict, run.vit.image_size)[None], run.args.task or 0
    if not 1 <= t <= len(run.tasks):
        raise ValueError(f"--predict needs --task, from 1 to {len(run.tasks)}")
    memory, keys = run.remember()
    print_classes(run, t, til_inference(run.vit, run.trained(t)[1], image, keys[t - 1], memory))


def print_classes(run, t, logits):
    """The classes of task t (1..T) by name, with their probabilities; logits (1, classes of the task)."""
    for probability, label in sorted(zip(logits.softmax(1)[0].tolist(), run.tasks[t - 1]), reverse=True):
        print(f"{100 * probability:6.2f} %  {run.train.classes[label]}")


def options(description):
    """A parser with the options that til.py and mts.py share."""
    parser = data.parser(description)
    add = parser.add_argument
    add("--dataset", choices=data.LOADERS, default="glyphs", help="default: %(default)s")
    add("--splits", type=int, default=20, help="number of tasks T (default: %(default)s)")
    add("--memory", default="hopfield", help="NAME[:OPTION=VALUE,..], a memory and options of its class")
    add("--seeds", type=int, nargs="+", default=[0], help="one run each (default: 0)")
    add("--validate", action="store_true", help="test on a tenth of the training images, held out")
    add("--backbone", choices=substrate.CONFIGS, help="default: vit_micro for glyphs, else vit_ti_16")
    add("--weights", type=Path, help="weights file of the backbone (default: shipped or downloaded)")
    add("--image-size", type=int, help="side of the input (default: 32 for glyphs, else the backbone's)")
    add("--rank", type=int, default=8, help="rank r of LoRA (default: %(default)s)")
    add("--alpha", type=int, default=8, help="LoRA's scale is alpha / r (default: %(default)s)")
    add("--epochs", type=int, default=3, help="epochs a task (default: %(default)s)")
    add("--batch-size", type=int, help="default: 6 for glyphs, else 64")
    add("--data-dir", type=Path, default="data", help="folder of the data sets (default: %(default)s)")
    add("--out", type=Path, default="runs", help="folder of the run folders (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU, if any")
    add("--plain", action="store_true", help="on a GPU: float32 and no CUDA graph, as on a CPU; slow")
    add("--predict", type=Path, metavar="PICTURE", help="classify this picture, not the test images")
    return parser


def main(args, results, predict):
    """results(run) for each seed, then a table of them; or predict(run)."""
    glyphs, gpu = args.dataset == "glyphs", args.device != "cpu"
    args.backbone = args.backbone or ("vit_micro" if glyphs else "vit_ti_16")
    args.image_size = args.image_size or (32 if glyphs else substrate.CONFIGS[args.backbone].image_size)
    args.batch_size, args.plain = args.batch_size or (6 if glyphs else 64), args.plain or not gpu
    print(f"{args.dataset} in {args.splits} tasks; {args.backbone} at {args.image_size} px, LoRA of rank "
          f"{args.rank}; memory {args.memory}; on {args.device}", flush=True)
    if min(args.image_size, args.rank, args.epochs, args.batch_size) < 1:
        raise ValueError("--image-size, --rank, --epochs and --batch-size must be 1 or more")
    if gpu and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: PyTorch finds no GPU here, use --device cpu")
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) if args.device == "cuda" else args.device)
    elif args.backbone == "vit_micro":
        torch.set_num_threads(1)        # it gains nothing from more, and loses much if others use the cores
    warnings.filterwarnings("ignore", module="torch.autograd")  # about streams, when a graph is made
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True)                    # the same GPU gives the same bits
    torch.utils.deterministic.fill_uninitialized_memory = False
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    train, test = data.load(args.dataset, args.data_dir)
    train, test = data.hold_out(train) if args.validate else (train, test)
    contents = []
    for run in (Run(args, seed, train, test) for seed in args.seeds):
        if WORLD > 1:                                           # torchrun: each process trains its share
            torch.distributed.is_initialized() or torch.distributed.init_process_group("gloo")
            for t in range(1 + RANK, args.splits + 1, WORLD):
                run.learn(t, *data.task(train, run.tasks[t - 1]))
            torch.distributed.barrier()
        if RANK == 0:
            contents.append((predict if args.predict else results)(run))
    if RANK == 0 and not args.predict:
        print(evaluate.report(contents))


if __name__ == "__main__":
    with data.one_line_errors():
        parser = options(__doc__)
        parser.add_argument("--task", type=int, help="the task (1 to T) of the picture")
        main(parser.parse_args(), results, predict)
