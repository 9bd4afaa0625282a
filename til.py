"""Task-incremental learning (TIL): Algorithms 1 and 2 of the paper (A.1). The task is known.

    python til.py                                                   # drawn glyphs: 40 s on a CPU
    python til.py --dataset cifar100 --splits 20 --memory hopfield  # the paper's C100-20S
    python til.py --predict picture.png --task 3                    # Algorithm 2 on one picture
    torchrun --nproc-per-node 3 til.py --seeds 0 1 2                # a seed on each GPU

Read this file from top to bottom: the two algorithms, how a modulation is trained, and then
`experiment`, which is everything that happens with one seed, from the images to the figures.

What is trained is kept in a folder of runs/. So another memory needs no training, and a command
that was stopped goes on. The folder is named after all that the modulations depend on: the options,
the images, the weights of the ViT, and the code of vit.py, lora.py, data.py and this file. If you
change one of them, even if it is only the evaluation below, a new folder begins.
"""
import math
import os
import re
import statistics
import time
import warnings
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import evaluate
import lora
import vit as substrate

LR = (0.005, 0.0001)                            # at the start, at the end (paper, A.2)
WEIGHT_DECAY = 0.1                              # paper, A.2


class Modulation(NamedTuple):
    """What is learned in a task."""
    theta: torch.Tensor                         # (P,), float32, on the CPU
    head: nn.Module                             # tokens (n, d) -> logits (n, classes of the task)
    rate: float                                 # of its training, in images per second


# ---- the two algorithms ------------------------------------------------------------------------
def til_training(tasks, train, memory, learn):
    """Algorithm 1, with its line numbers: fills the memory, and returns the task keys K_T.

    It also returns the modulations. Algorithm 2 needs only their heads, which are kept beside the
    memory. Their thetas are what the memory should recall, so we compare with them.
    """
    keys = []                                                   # 2
    modulations = []
    for t, classes in enumerate(tasks):                         # 3
        images, labels = data.task(train, classes)              # 4: D_t, and nothing of other tasks
        modulation = learn(t, images, labels)                   # 5, 6: see `learner`, below
        key, value = lora.split_key(modulation.theta)           # 7: k_t, which A.1 calls v_t
        keys.append(key)                                        # 8
        memory.write(key.clone(), value)                        # 9: a copy, if it wants to alter it
        modulations.append(modulation)
    return keys, modulations                                    # 11


def til_inference(net, head, images, key, memory):
    """Algorithm 2: logits (n, classes of the task) for uint8 images (n, 3, h, w) of one task."""
    theta_hat = memory.read(key.clone())                        # 3
    return classify(net, head, images, theta_hat)               # 5


@torch.no_grad()
def classify(net, head, images, theta):
    """C(x; W, theta): logits (n, outputs of the head), on the CPU, for uint8 images (n, 3, h, w).

    All tasks share the network `net`, so every call first modulates it with its own theta (P,).
    Raises Mistake if theta has another shape, or is not finite.
    """
    P = len(net.theta)
    # The argmax of NaN is 0. So with a broken theta, we would silently answer the first class.
    if theta.shape != (P,) or not theta.isfinite().all():
        raise data.Mistake(f"a theta should be {P} finite numbers, but it is {theta}, of the shape "
                           f"{(*theta.shape,)}. If a memory recalled it: a read returns the key, "
                           "and then the value")
    net.theta.copy_(theta)
    return head(substrate.features(net, images)).cpu()


# ---- how a modulation is trained: lines 5 and 6 of Algorithm 1 ---------------------------------
def flips(n, generator):
    """Each of n images is mirrored with a probability of 1/2 (see ViT.prepare)."""
    return {"flip": torch.rand(n, generator=generator) < 0.5}


class Recipe(NamedTuple):
    """How to train: for tasks, see `learner`; for the task predictor, see mts.py."""
    epochs: int
    batch_size: int
    lr: tuple                                   # the learning rate at the start, and at the end
    augment: Callable = flips                   # draws how n images are changed in an epoch
    label_smoothing: float = 0.0


def fit(net, head, images, labels, recipe, generator):
    """Trains net.theta and the head to predict the labels (n,) of uint8 images (n, 3, h, w).

    Returns the accuracy in the last epoch, in percent.
    """
    device = net.theta.device
    images, labels = images.to(device), labels.to(device)           # a task fits on a GPU as uint8
    n = len(labels)
    weights = [net.theta, *head.parameters()]
    optimizer = torch.optim.AdamW(weights, recipe.lr[0], weight_decay=WEIGHT_DECAY, fused=True)
    # The paper says that the learning rate decays, but not how.
    steps = recipe.epochs * math.ceil(n / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=recipe.lr[1])
    for epoch in range(recipe.epochs):
        order = torch.randperm(n, generator=generator).to(device)
        changes = {name: x.to(device) for name, x in recipe.augment(n, generator).items()}
        hits = 0
        label = f"epoch {epoch + 1} of {recipe.epochs}, step"
        for start in data.progress(range(0, n, recipe.batch_size), label):
            batch = slice(start, start + recipe.batch_size)
            y = labels[order[batch]]                                # (B,)
            change = {name: x[batch] for name, x in changes.items()}
            x = net.prepare(images[order[batch]], **change)         # (B, 3, s, s)
            tokens = net.graphed(x) if x.is_cuda else net(x)        # (B, d)
            logits = head(tokens.float())                           # (B, outputs)
            loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            hits += (logits.argmax(1) == y).sum()
    return 100 * hits.item() / n


def new_head(net, n_outputs, generator):
    """A linear layer on the class token. Its small weights make all outputs about as likely."""
    head = nn.Linear(net.vit.config.width, n_outputs, device=net.theta.device)
    with torch.no_grad():
        head.weight.copy_(0.02 * torch.randn(head.weight.shape, generator=generator))
        head.bias.zero_()
    return head


def find_or_train(path, net, images, labels, n_outputs, recipe, generator):
    """A Modulation from the file `path`. If there is none, it is trained, and kept there."""
    if path.exists():
        content = data.read(path)
        head = new_head(net, n_outputs, generator)
        head.load_state_dict(content["head"])
        return Modulation(content["theta"], head, content["rate"])
    start = time.perf_counter()
    net.reset(generator)                                                    # 5: a random theta
    head = new_head(net, n_outputs, generator)
    accuracy = fit(net, head, images, labels, recipe, generator)            # 6
    theta = net.theta.detach().cpu().clone()
    if not theta.isfinite().all():
        raise data.Mistake(f"{path.stem}: the training diverged. Are the weights of the ViT whole?")
    rate = recipe.epochs * len(labels) / (time.perf_counter() - start)
    data.save(path, {"theta": theta, "head": head.state_dict(), "rate": rate})
    print(f"{path.stem}: {accuracy:.2f} % of the training images are right, {rate:,.0f} images/s",
          flush=True)
    return Modulation(theta, head, rate)


def learner(args, seed, net, folder, tasks):
    """The function `learn` of Algorithm 1: (t, images, labels) -> Modulation."""
    recipe = Recipe(args.epochs, args.batch_size, LR)
    paths = [folder / f"task{t + 1:03}.pt" for t in range(len(tasks))]
    missing = [t for t, path in enumerate(paths) if not path.exists()]
    if missing:
        print(f"trains {len(missing)} of {len(tasks)} tasks, kept in {folder}", flush=True)
    else:
        print(f"{len(tasks)} tasks found in {folder}, not trained again")

    def learn(t, images, labels):
        # A generator of its own: so theta_t depends on the seed and on t alone, and not on what
        # was trained before. (seed, 0) is for theta_0, the task predictor.
        generator = data.generator(seed, t + 1)
        modulation = find_or_train(
            paths[t], net, images, labels, len(tasks[t]), recipe, generator)
        if missing and t == missing[0]:
            seconds = (len(missing) - 1) * recipe.epochs * len(labels) / modulation.rate
            print(f"the other tasks will take about {seconds:.0f} s", flush=True)
        return modulation
    return learn


# ---- the experiment ----------------------------------------------------------------------------
def experiment(args, seed, train, test):
    """Algorithm 1; then Algorithm 2 and other ways to classify, on all test images: the figures."""
    start = time.perf_counter()
    tasks = data.split(len(train.classes), args.splits, seed)
    net, folder = make_network(args, seed, train, test)
    memory = evaluate.make_memory(args.memory, len(net.theta))
    learn = learner(args, seed, net, folder, tasks)
    keys, modulations = til_training(tasks, train, memory, learn)
    if args.predict:
        return predict(args, train.classes, tasks, net, keys, modulations, memory)

    # Is a recalled modulation as good as the one that was trained? And what are others worth?
    thetas = [modulation.theta for modulation in modulations]
    mean = torch.stack(thetas).mean(0)
    none = torch.zeros_like(mean)
    linear_heads = evaluate.linear_heads(net, train, tasks)
    per_task = {}                                               # {way: [accuracy of each task]}
    for t, classes in enumerate(data.progress(tasks, "testing task")):
        images, labels = data.task(test, classes)
        head = modulations[t].head
        logits = {
            "gt": classify(net, head, images, thetas[t]),       # "ground truth": as it was trained
            "recalled": til_inference(net, head, images, keys[t], memory),
            "linear": classify(net, linear_heads[t], images, none),         # a head made for it
            "mean": classify(net, head, images, mean),          # of all modulations
            "wrong": classify(net, head, images, thetas[t - 1]),            # of the task before
            "none": classify(net, head, images, none)}          # the ViT as it is
        for way, z in logits.items():
            accuracy = evaluate.percent(z.argmax(1) == labels)
            per_task.setdefault(way, []).append(accuracy)
    errors = [evaluate.recall_error(memory.read(key.clone()), theta)
              for key, theta in zip(data.progress(keys, "recalling theta"), thetas)]

    faa = {way: evaluate.faa(accuracies) for way, accuracies in per_task.items()}
    figures = {
        "FAA_GT": faa["gt"], "FAA(M)": faa["recalled"], "D(M)": faa["gt"] - faa["recalled"],
        "error": statistics.mean(errors), "linear": faa["linear"], "mean": faa["mean"],
        "wrong": faa["wrong"], "none": faa["none"]}
    return save_result("til", args, seed, folder, start, modulations, figures, per_task)


def make_network(args, seed, train, test):
    """The network that all tasks share, and the folder for what is trained with it."""
    vit = substrate.load(args.backbone, args.weights, args.image_size)
    options = {name: value for name, value in vars(args).items() if name not in NOT_IN_THETA}
    images = train.images, train.labels, test.images, test.labels
    digest = data.digest(options, CODE, *images, *vit.parameters())
    run = f"{args.dataset}-{args.splits}s-{args.backbone}-r{args.rank}-seed{seed}-{digest}"
    # Only W may be bfloat16: it is too coarse for the small steps of AdamW in theta and the head.
    for weight in vit.parameters():
        weight.data = weight.data.to(getattr(torch, args.dtype))
    return lora.ModulatedViT(vit.to(args.device), args.rank, args.alpha), args.out / run


# The options on which theta does not depend, and those that the name of a row in a table leaves
# out. All others count, and so does an option that you add.
ELSEWHERE = {"memory", "seeds", "weights", "data_dir", "out", "predict", "task"}
NOT_IN_THETA = ELSEWHERE | {"predictor", "label_smoothing", "row"}
NOT_IN_ROW = ELSEWHERE | {"dataset", "splits", "device", "dtype"}
# Read when the program starts, because somebody may edit a file while it runs.
CODE = {name: data.digest_of_code(name) for name in ("vit.py", "lora.py", "data.py", "til.py")}


def predict(args, names, tasks, net, keys, modulations, memory):
    """Algorithm 2 on the picture --predict, as one of the task --task."""
    t = args.task - 1
    image = data.picture(args.predict, args.image_size)
    logits = til_inference(net, modulations[t].head, image[None], keys[t], memory)
    print_classes(logits, [names[c] for c in tasks[t]])


def print_classes(logits, names):
    """The classes of a task and their probabilities; logits (1, classes of the task)."""
    for p, name in sorted(zip(logits.softmax(1)[0].tolist(), names), reverse=True):
        print(f"{100 * p:6.2f} %  {name}")


def save_result(setting, args, seed, folder, start, modulations, figures, per_task, variant=""):
    """Writes what a run has found to <setting>-<memory><variant>.json, and returns it."""
    memory, _, _ = args.memory.partition(":")
    code = {name: data.digest_of_code(name)
            for name in (f"{memory}.py", "evaluate.py", f"{setting}.py")}
    options = {name: value for name, value in vars(args).items() if name not in ELSEWHERE}
    device = f"CPU, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    result = options | {
        "setting": setting, "memory": args.memory, "seed": seed, "device": device,
        "digest": f"{folder.name[-8:]}-{data.digest(code)}", "code": CODE | code,
        "seconds": time.perf_counter() - start,
        "images_per_second": statistics.harmonic_mean(m.rate for m in modulations),
        "figures": figures, "per_task": per_task}
    # A memory's name may have characters that are not allowed in the name of a file, such as ":".
    name = re.sub(r"[^\w.,=+-]", "-", f"{setting}-{args.memory}{variant}")
    path = folder / f"{name}.json"
    data.save(path, result)
    print(f"wrote {path}", flush=True)
    return result


# ---- the command line --------------------------------------------------------------------------
def options(description):
    """A parser with the options that til.py and mts.py share."""
    parser = data.parser(description)
    add = parser.add_argument
    positive = data.whole_number(1)
    add("--dataset", choices=data.LOADERS, default="glyphs", help="default: glyphs")
    add("--splits", type=positive, default=20, help="the number of tasks T (default: 20)")
    add("--memory", default="hopfield", metavar="NAME[:OPTION=VALUE,..]",
        help="the class NAME of NAME.py: hopfield[:beta=25], or bayespcn[:read=joint,hidden=256,..]"
             ", or your own (default: hopfield)")
    add("--seeds", type=data.whole_number(0), nargs="+", default=[0], help="one run for each")
    add("--validate", action="store_true", help="test on every tenth training image of a class")
    add("--backbone", choices=substrate.CONFIGS, default="vit_ti_16",
        help="default: vit_ti_16, and vit_micro for glyphs")
    add("--weights", type=Path, help="a file with weights for it, in place of the published ones")
    add("--image-size", type=positive, help="side of its input (default: that of its pretraining)")
    add("--rank", type=positive, default=8, help="r of LoRA (default: 8, paper, A.2)")
    add("--alpha", type=positive, default=8, help="LoRA's scale is alpha / r (default: 8)")
    add("--epochs", type=positive, default=3, help="epochs of a task (default: 3, paper, A.2)")
    add("--batch-size", type=positive, default=64, help="default: 64, and 6 for glyphs")
    add("--data-dir", type=Path, default="data", help="where the data sets are (default: data)")
    add("--out", type=Path, default="runs", help="where the results go (default: runs)")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU, if there is one",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--predict", type=Path, metavar="PICTURE", help="classify a picture, not the test images")
    return parser


def parse(parser):
    """The options of the command line. Raises Mistake if they contradict each other."""
    # Glyphs are small and few: they need a small backbone, small inputs and small batches.
    args = parser.parse_args()
    if args.dataset == "glyphs":
        parser.set_defaults(backbone="vit_micro", batch_size=6)
        args = parser.parse_args()
    size = substrate.CONFIGS[args.backbone].image_size
    if (args.dataset, args.backbone) == ("glyphs", "vit_micro"):
        size = 32
    parser.set_defaults(image_size=size)
    args = parser.parse_args()
    if len({*args.seeds}) < len(args.seeds):
        raise data.Mistake("--seeds: one of them is given twice")
    if args.predict:
        data.picture(args.predict, args.image_size)     # so that a mistake is found at once
        if "task" in args and args.task not in range(1, args.splits + 1):
            raise data.Mistake(f"--predict needs --task, from 1 to {args.splits}")
    # The name of a row in the tables: the memory, and all options that are not the default.
    row = [args.memory]
    for name, value in vars(args).items():
        if name not in NOT_IN_ROW and value != parser.get_default(name):
            row += ["--" + name.replace("_", "-")] + [str(value)] * (value is not True)
    args.row = " ".join(row)
    return args


def set_up_torch(args):
    """Makes PyTorch deterministic, and fast on the device. Sets args.dtype."""
    args.dtype = "float32"
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise data.Mistake("PyTorch finds no GPU here: use --device cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        # Some GPUs, such as a T4, have no bfloat16 of their own.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            args.dtype = "bfloat16"
    elif args.backbone == "vit_micro":
        torch.set_num_threads(1)                # its matrices are so small that more do not help
    # The same command on the same GPU gives the same bits. PyTorch needs this variable for it.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False     # slow, and nobody reads it
    # Float32 products may round their factors to 11 bits (TF32).
    torch.set_float32_matmul_precision("high")
    warnings.filterwarnings("ignore", module="torch.autograd")      # while a graph is recorded


def main(parser, experiment):
    """experiment(args, seed, train, test) for each seed, and a table of the figures."""
    args = parse(parser)
    set_up_torch(args)
    train, test = data.load(args.dataset, args.data_dir)
    if args.validate:
        train, test = data.hold_out(train)
    # torchrun starts several processes, and numbers them. Each takes its share of the seeds.
    process = int(os.environ.get("RANK", 0))
    n_processes = int(os.environ.get("WORLD_SIZE", 1))
    results = [experiment(args, seed, train, test) for seed in args.seeds[process::n_processes]]
    if not args.predict:
        print(evaluate.tables(results))


if __name__ == "__main__":
    with data.one_line_errors():
        parser = options(__doc__)
        parser.add_argument("--task", type=int, help="the task of the picture, from 1 to T")
        main(parser, experiment)
