"""Task-incremental learning (TIL): Algorithms 1 and 2 of the paper (A.1). The task is known.

    python til.py                                                   # drawn glyphs: 40 s on a CPU
    python til.py --dataset cifar100 --splits 20 --memory hopfield  # the paper's C100-20S
    python til.py --predict results/glyphs-sample.png --task 11     # Algorithm 2 on one picture
    torchrun --nproc-per-node 3 til.py --seeds 0 1 2                # three seeds, one on each GPU
    python evaluate.py runs                                         # all results so far, in tables

Read this file from top to bottom: the two algorithms, how a modulation is trained, and then
`experiment`, which is everything that happens with one seed, from the images to the numbers of a
row in the table. You can skip what follows the heading `files` at first. All you need to know of it
is that `main`, at the very end, calls `experiment` for each seed.

What is trained is kept in a folder of runs/. With another memory, nothing is trained again. If you
start a stopped command once more, it goes on after the last task that was finished. README.md says
which changes of yours begin a new folder.
"""
import math
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Callable, NamedTuple
from urllib.parse import quote

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import evaluate
import lora
import vit

LR = (0.005, 0.0001)                            # at the start, at the end (paper, A.2)
WEIGHT_DECAY = 0.1                              # paper, A.2


class Modulation(NamedTuple):
    """What is trained for a task. (The paper calls theta alone the modulation.)"""
    theta: torch.Tensor                         # (P,), float32, on the CPU
    head: nn.Linear                             # class tokens (n, d) -> logits (n, outputs)


# ---- the two algorithms ------------------------------------------------------------------------
# The numbers in the comments are the lines of the paper's listings.
def til_training(tasks, train, memory, learn):
    """Algorithm 1: fills the empty memory, and returns the task keys K_T and the modulations.

    tasks has the class numbers of each task, train is the training part of the data set, and
    `learn` does lines 5 and 6: see make_learn, below. The paper returns the memory and the keys.
    Here, the memory is filled in place. We also return a Modulation for each task: Algorithm 2
    needs its head, and `experiment` compares its theta with what is recalled. (In line 9, A.1
    writes the key and all of theta_t. Section 3.1 writes the key and the rest of theta_t, as we
    do.) A memory is given copies of the keys, so it may change them: to length 1, for example.
    """
    keys = []                                                   # 2
    modulations = []
    for t, classes in enumerate(data.progress(tasks, "task")):  # 3
        images, labels = data.task(train, classes)              # 4: D_t
        modulation = learn(t, images, labels)                   # 5, 6
        key, value = lora.split_key(modulation.theta)           # 7: k_t (A.1 writes v_t for it)
        keys.append(key)                                        # 8
        memory.write(key.clone(), value)                        # 9
        modulations.append(modulation)
    return keys, modulations                                    # 11


def til_inference(net, head, images, key, memory):
    """Algorithm 2: logits (n, classes of the task) for uint8 images (n, 3, h, w) of one task.

    As the task is known, so are its key and its head.
    """
    theta_hat = memory.read(key.clone())                        # 3
    return classify(net, head, images, theta_hat)               # 5


@torch.no_grad()
def classify(net, head, images, theta):
    """C(x; W, theta): logits (n, outputs of the head), on the CPU, for uint8 images (n, 3, h, w).

    All tasks share the network `net`. So each call first copies theta (P,) into `net`. Raises
    Mistake if theta has another shape, or is not finite.
    """
    net.theta.copy_(evaluate.checked(theta, len(net.theta)))
    head.eval()                                 # for layers such as dropout, if you add one
    return head(vit.features(net, images)).cpu()


# ---- how a modulation is trained: lines 5 and 6 of Algorithm 1 ---------------------------------
def flips(n, generator):
    """Which of n images ViT.prepare mirrors: each with a probability of 1/2."""
    return {"flip": torch.rand(n, generator=generator) < 0.5}


class Recipe(NamedTuple):
    """The hyperparameters of one training."""
    epochs: int
    batch_size: int
    lr: tuple                                   # the learning rate at the start, and at the end
    augment: Callable = flips                   # (n, generator) -> arguments of ViT.prepare
    label_smoothing: float = 0.0


def fit(net, head, images, labels, recipe, generator):
    """Trains net.theta and the head to predict the labels (n,) of uint8 images (n, 3, h, w).

    Returns the accuracy on these images during the last epoch, in percent.
    """
    net.train()                                 # for layers such as dropout, if you add one
    head.train()
    device = net.theta.device
    # All images at once: as uint8, they need little of a GPU's memory.
    images, labels = images.to(device), labels.to(device)
    n = len(labels)
    trained = [net.theta, *head.parameters()]
    optimizer = torch.optim.AdamW(trained, recipe.lr[0], weight_decay=WEIGHT_DECAY, fused=True)
    # The paper says that the learning rate decays, but not how. Ours follows a cosine.
    steps = recipe.epochs * math.ceil(n / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=recipe.lr[1])
    for epoch in range(recipe.epochs):
        order = torch.randperm(n, generator=generator).to(device)
        # How the images are changed in this epoch, with a row for each image.
        changes = recipe.augment(n, generator)
        changes = {name: rows.to(device) for name, rows in changes.items()}
        hits = 0
        caption = f"epoch {epoch + 1} of {recipe.epochs}, step"
        for batch in data.progress(order.split(recipe.batch_size), caption):
            y = labels[batch]                                       # (B,)
            changes_of_batch = {name: rows[batch] for name, rows in changes.items()}
            x = net.prepare(images[batch], **changes_of_batch)      # (B, 3, s, s)
            tokens = net.graphed(x) if x.is_cuda else net(x)        # (B, d); graphed is faster
            logits = head(tokens.float())                           # (B, outputs)
            loss = F.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            hits += (logits.argmax(1) == y).sum()
    return 100 * hits.item() / n


def new_head(net, n_outputs, generator):
    """A linear layer on the class token. Its weights are small: all outputs begin about equal."""
    head = nn.Linear(net.vit.config.width, n_outputs, device=net.theta.device)
    with torch.no_grad():
        head.weight.copy_(0.02 * torch.randn(head.weight.shape, generator=generator))
        head.bias.zero_()
    return head


def find_or_train(path, net, images, labels, n_outputs, recipe, generator):
    """A Modulation from the file `path`. If there is none, it is trained, and kept there."""
    # Our random numbers come from `generator`. If you change new_head, your head may draw from
    # PyTorch's own generator, as nn.Linear and dropout do. So we seed that one, too.
    torch.manual_seed(generator.initial_seed())
    net.reset(generator)                                            # line 5
    head = new_head(net, n_outputs, generator)
    if path.exists():
        # The numbers from the file replace the random ones. Then net and head are as if they had
        # just been trained.
        content = data.read(path)
        net.theta.data.copy_(content["theta"])
        head.load_state_dict(content["head"])
        return Modulation(content["theta"], head)
    start = time.perf_counter()
    accuracy = fit(net, head, images, labels, recipe, generator)    # line 6
    theta = net.theta.detach().cpu().clone()
    if not theta.isfinite().all():
        raise data.Mistake(f"{path.stem}: the training diverged. Was the learning rate changed, or "
                           "is the file of weights damaged?")
    data.save(path, {"theta": theta, "head": head.state_dict()})
    speed = recipe.epochs * len(labels) / (time.perf_counter() - start)
    print(f"{path.stem}: training accuracy {accuracy:.2f} %, {speed:,.0f} images/s", flush=True)
    return Modulation(theta, head)


def make_learn(args, seed, net, folder, tasks):
    """Makes the function `learn` of Algorithm 1: (t, images, labels) -> Modulation.

    `learn` remembers what else it needs: the network, the recipe, the seed, and where the files
    are. So Algorithm 1 can be written as in the paper.
    """
    recipe = Recipe(args.epochs, args.batch_size, LR)
    paths = [folder / f"task{t + 1:03}.pt" for t in range(len(tasks))]
    missing = [t for t, path in enumerate(paths) if not path.exists()]
    if missing:
        print(f"trains {len(missing)} of {len(tasks)} tasks, kept in {folder}", flush=True)
    else:
        print(f"{len(tasks)} tasks found in {folder}, not trained again", flush=True)

    def learn(t, images, labels):
        start = time.perf_counter()
        # Each task has random numbers of its own. So theta_t is the same, whether the tasks before
        # were trained now or found. (The numbers of (seed, 0) are for the task predictor, theta_0.)
        generator = data.generator(seed, t + 1)
        modulation = find_or_train(
            paths[t], net, images, labels, len(tasks[t]), recipe, generator)
        if len(missing) > 1 and t == missing[0]:
            print_time_left(len(missing) - 1, time.perf_counter() - start)
        return modulation
    return learn


def print_time_left(n_tasks, seconds):
    """Says how long n_tasks will take, if each of them takes this many seconds."""
    minutes = n_tasks * seconds / 60
    print(f"the other tasks will take about {minutes:.1f} minutes", flush=True)
    if minutes > 30:
        print("a GPU is much faster, and so is --image-size 128 with vit_ti_16 (see README.md)",
              flush=True)


# ---- the experiment ----------------------------------------------------------------------------
def experiment(args, seed, train, test):
    """Algorithms 1 and 2, and the controls. The "figures" of its result are a row in the table."""
    tasks = data.split(len(train.classes), args.splits, seed)
    net = make_network(args)                    # also puts hashes of W into args, for folder_of_run
    folder = folder_of_run(args, seed, train, test)             # for what is trained
    memory = evaluate.make_memory(args.memory, len(net.theta))
    learn = make_learn(args, seed, net, folder, tasks)
    keys, modulations = til_training(tasks, train, memory, learn)
    if args.predict:
        return predict(args, train, tasks, net, keys, modulations, memory)

    # How much does recall cost? And how good are the controls, which have another theta or head?
    thetas = [theta for theta, _ in modulations]
    mean = torch.stack(thetas).mean(0)
    none = torch.zeros_like(mean)                               # with it, the ViT is as it was
    wrong = thetas[-1:] + thetas[:-1]                           # each is that of the task before
    linear_heads = evaluate.linear_heads(net, train, tasks)
    per_task = {}                               # {way to classify: [accuracy of each task]}
    errors = []
    for t, classes in enumerate(data.progress(tasks, "testing task")):
        images, labels = data.task(test, classes)
        head = modulations[t].head
        logits = {
            "gt": classify(net, head, images, thetas[t]),       # "ground truth": theta as trained
            "recalled": til_inference(net, head, images, keys[t], memory),
            "linear": classify(net, linear_heads[t], images, none),
            "mean": classify(net, head, images, mean),
            "wrong": classify(net, head, images, wrong[t]),
            "none": classify(net, head, images, none)}
        for way, z in logits.items():
            per_task.setdefault(way, []).append(evaluate.percent(z.argmax(1) == labels))
        # Algorithm 2 returns only logits. So recall theta once more, to compare it with thetas[t].
        errors.append(evaluate.recall_error(memory.read(keys[t]), thetas[t]))

    faa = {way: evaluate.faa(accuracies) for way, accuracies in per_task.items()}
    figures = {
        "FAA_GT": faa["gt"], "FAA(M)": faa["recalled"], "D(M)": faa["gt"] - faa["recalled"],
        "error": statistics.fmean(errors), "linear": faa["linear"], "mean": faa["mean"],
        "wrong": faa["wrong"], "none": faa["none"]}
    return save_result("til", args, seed, folder, figures, per_task)


def make_network(args):
    """The network that all tasks share."""
    backbone = vit.load(args.backbone, args.weights, args.image_size)
    # What the figures depend on, besides the options and the code. It is part of each result, so
    # that a table does not average over different weights, for example. (folder_of_run adds a hash
    # of the images. The position embeddings have a hash of their own, because they are resized for
    # the image size.)
    weights = backbone.state_dict()
    positions = weights.pop("pos_embed")
    args.content = {
        "PyTorch": f"{torch.__version__} on {args.device}, W in {args.dtype}",
        args.backbone: data.digest(*weights.values()),
        f"{args.backbone}, {args.image_size} pixels": data.digest(positions)}
    # W is never trained, so bfloat16 is precise enough for it. (See set_up_torch: on a CPU, it is
    # float32.) Theta and the heads are made later, and stay float32: bfloat16 would round AdamW's
    # small steps away.
    for weight in backbone.parameters():
        weight.data = weight.data.to(getattr(torch, args.dtype))
    return lora.ModulatedViT(backbone.to(args.device), args.rank, args.alpha)


def predict(args, train, tasks, net, keys, modulations, memory):
    """Algorithm 2 on the picture --predict, as an image of the task --task."""
    t = args.task - 1
    image = data.picture(args.predict, train.images.shape[-1])  # the size of the training images
    logits = til_inference(net, modulations[t].head, image[None], keys[t], memory)
    print_classes(logits, [train.classes[c] for c in tasks[t]])


def print_classes(logits, names):
    """Prints the names of a task's classes with their probabilities; logits (1, classes)."""
    for p, name in sorted(zip(logits.softmax(1)[0].tolist(), names), reverse=True):
        print(f"{100 * p:6.2f} %  {name}")


# ---- files -------------------------------------------------------------------------------------
# The code that trains theta_1 .. theta_T. (Path(__file__).name is til.py, or the name of your copy
# of it.)
CODE = {name: data.digest_of_code(name)
        for name in ("vit.py", "lora.py", "data.py", Path(__file__).name)}
# These options say where files are, which seeds to run, and which picture to classify.
WHERE_AND_WHICH = {"weights", "data_dir", "out", "seeds", "predict", "task"}
# folder_of_run does not hash these. Most of them do not change theta_1 .. theta_T. The others are
# known in another way: the seed is in the name of the folder, and args.content has hashes of the
# images and of W. (What changes theta_0 must be in the name of its file: see `experiment` in
# mts.py. `defaults` is not an option: see `parse`.)
NOT_FOR_THETA = WHERE_AND_WHICH | {"memory", "predictor", "label_smoothing", "defaults"}
# These are not added to the name of a row: the memory is its first word, and the data set and the
# splits stand above the table. The device is in args.content, too (see make_network).
NOT_IN_ROW = WHERE_AND_WHICH | {"memory", "dataset", "splits", "device"}


def folder_of_run(args, seed, train, test):
    """The folder for what is trained. Its name ends with a hash of what the training depends on.

    This is: the options (also those that you add), the code, the images, W, and PyTorch. (The last
    two are already in args.content. make_network has put them there.)
    """
    args.content["images"] = data.digest(train.images, train.labels, test.images, test.labels)
    options = {name: value for name, value in vars(args).items() if name not in NOT_FOR_THETA}
    digest = data.digest(options, CODE)
    run = f"{args.dataset}-{args.splits}s-{args.backbone}-r{args.rank}-seed{seed}-{digest}"
    folder = args.out / run
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise data.Mistake(f"cannot make {folder} ({error}): use another --out") from error
    return folder


def save_result(setting, args, seed, folder, figures, per_task, variant=""):
    """Writes the result of a run to <setting>-<memory><variant>.json, and returns it."""
    memory, _, _ = args.memory.partition(":")
    code = {name: data.digest_of_code(name)
            for name in (f"{memory}.py", "evaluate.py", f"{setting}.py")}
    device = f"CPU, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
    _, digest = folder.name.rsplit("-", 1)      # the hash at its end
    options = {name: value for name, value in vars(args).items()
               if name not in WHERE_AND_WHICH | {"defaults"}}
    result = options | {
        "setting": setting, "row": name_of_row(args), "seed": seed, "device": device,
        "torch": torch.__version__,
        "digest": f"{digest}-{data.digest(code)}", "code": CODE | code,
        # If you add a figure, it may be a tensor, and JSON has no tensors.
        "figures": {name: float(figure) for name, figure in figures.items()},
        "per_task": per_task}
    # Some characters are not allowed in a file's name: `quote` writes them as numbers, such as %2F.
    # (The ":" before a memory's options is frequent. It becomes a "-", which looks better.)
    name = f"{setting}-{args.memory}{variant}".replace(":", "-", 1)
    path = folder / f"{quote(name, safe='=,')}.json"
    data.save(path, result)
    print(f"wrote {path}", flush=True)
    return result


# ---- the command line --------------------------------------------------------------------------
def make_parser(description):
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
    add("--backbone", choices=vit.CONFIGS,
        help="the ViT (default: vit_ti_16, and vit_micro for glyphs)")
    add("--weights", type=Path, help="a file with weights for it, in place of the published ones")
    add("--image-size", type=positive,
        help="side of its input (default: as in vit.CONFIGS, and 32 for vit_micro with glyphs)")
    add("--rank", type=positive, default=8, help="r of LoRA (default: 8, paper, A.2)")
    add("--alpha", type=positive, default=8, help="LoRA's scale is alpha / r (default: 8)")
    add("--epochs", type=positive, default=3, help="epochs of a task (default: 3, paper, A.2)")
    add("--batch-size", type=positive, help="default: 64, and 6 for glyphs")
    add("--data-dir", type=Path, default="data", help="where the data sets are (default: data)")
    add("--out", type=Path, default="runs", help="where the results go (default: runs)")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU, if there is one",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--predict", type=Path, metavar="PICTURE", help="classify a picture, not the test images")
    return parser


def parse(parser):
    """The options of the command line. Raises Mistake if they contradict each other."""
    # Some defaults depend on other options. So we parse, set these defaults, and parse again.
    args = parser.parse_args()
    glyphs = args.dataset == "glyphs"
    default = "vit_micro" if glyphs else "vit_ti_16"
    backbone = args.backbone or default
    size = vit.CONFIGS[backbone].image_size
    if glyphs and backbone == "vit_micro":
        size = 32                               # in place of 64: it is enough, and quicker
    parser.set_defaults(backbone=default, image_size=size, batch_size=6 if glyphs else 64)
    args = parser.parse_args()
    if args.predict:
        data.picture(args.predict, args.image_size)     # raises Mistake if it cannot be read
        if "task" in args and args.task not in range(1, args.splits + 1):
            raise data.Mistake(f"--predict needs --task, from 1 to {args.splits}")
    evaluate.find_memory(args.memory)           # raises Mistake if there is none
    args.defaults = {name: parser.get_default(name) for name in vars(args)}     # for name_of_row
    return args


def name_of_row(args):
    """The name of a row in the tables: the memory, and all options that are not the default."""
    words = [args.memory]
    for name, default in args.defaults.items():
        value = getattr(args, name)
        if name not in NOT_IN_ROW and value != default:
            words.append("--" + name.replace("_", "-"))
            if value is not True:
                words.append(str(value))
    return " ".join(words)


def set_up_torch(args):
    """Makes PyTorch deterministic, and fast on the device.

    Returns the dtype of W, as text. (make_network finds it in args.dtype.)
    """
    dtype = "float32"
    if args.device == "cuda":
        if not torch.cuda.is_available():
            raise data.Mistake("PyTorch finds no GPU here: use --device cpu")
        # torchrun numbers its processes on this machine. If there are fewer GPUs, they share them.
        number = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(number % torch.cuda.device_count())
        # Some GPUs, such as a T4, can only emulate bfloat16, which is slow.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            dtype = "bfloat16"
    if args.device == "cuda" or args.backbone == "vit_micro":
        # The CPU has only small computations to do. With more threads, it would spend most of its
        # time on waiting until the slowest of them is done.
        torch.set_num_threads(1)
    # From here on, PyTorch is deterministic: the same command on the same GPU gives the same bits.
    # CUDA needs this variable for it.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    # Otherwise, PyTorch would now fill each new, empty tensor with NaN, which costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    # Lets a GPU compute float32 products with TF32, which is faster, and precise enough.
    torch.set_float32_matmul_precision("high")
    # PyTorch warns when it records a CUDA graph (lora.py), but what it warns of does no harm here.
    warnings.filterwarnings("ignore", module="torch.autograd")
    return dtype


def load_images(args):
    """(train, test), as the options say."""
    train, test = data.load(args.dataset, args.data_dir)
    if args.validate:
        train, test = data.hold_out(train)
    return train, test


def main(parser, run_one_seed):
    """Prints a table of what run_one_seed(args, seed, train, test) returns for each seed."""
    args = parse(parser)
    args.dtype = set_up_torch(args)
    train, test = load_images(args)
    # torchrun starts several processes, and numbers them. Each takes its share of the seeds.
    process, n_processes = 0, 1
    if torch.distributed.is_torchelastic_launched():        # is this one of them?
        process = int(os.environ["RANK"])
        n_processes = int(os.environ["WORLD_SIZE"])
    seeds = sorted({*args.seeds})               # a seed that was given twice runs once
    results = [run_one_seed(args, seed, train, test) for seed in seeds[process::n_processes]]
    if not args.predict:
        print(evaluate.tables(results))


if __name__ == "__main__":
    with data.one_line_errors():
        parser = make_parser(__doc__)
        parser.add_argument("--task", type=int, help="the task of the picture, from 1 to T")
        main(parser, experiment)
