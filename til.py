"""Task-incremental learning (TIL), Algorithms 1 and 2 of the paper (A.1): the task is known.

    python til.py                                                   # glyphs: 40 s on a CPU
    python til.py --dataset cifar100 --splits 20 --memory hopfield  # the paper's C100-20S
    python til.py --predict picture.png --task 3                    # Algorithm 2 on one picture
    torchrun --nproc-per-node 2 til.py --dataset cifar100           # the tasks on two GPUs

What is trained is kept in a folder of runs/: a command that was stopped goes on after the last task
that it finished.
"""
import copy
import math
import os
import re
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

import data
import evaluate
import lora
import vit as substrate

LR = (0.005, 0.0001)                            # at the start, at the end (paper, A.2)
PICTURED = ("gt", "recalled", "local", "strict", "none")
NOISE = (0.1, 0.3, 1, 3, 10, 30)                # of keys, in multiples of their root mean square


# ---- the two algorithms ------------------------------------------------------------------------
def til_training(tasks, train, memory, learn):
    """Algorithm 1, with its line numbers: returns M_T and K_T.

    tasks: the classes of each task; memory: an empty one; learn(t, images, labels) -> theta_t (P,),
    t from 0.
    """
    keys = []                                                   # 2: K_0 is empty; a list, in order
    for t, classes in enumerate(tasks):                         # 3
        images, labels = data.task(train, classes)              # 4: D_t, and nothing of other tasks
        theta = learn(t, images, labels)                        # 5, 6: random, then trained
        key, value = lora.split_key(theta)                      # 7: k_t (A.1: v_t), and the rest
        keys.append(key)                                        # 8
        memory.write(key, value)                                # 9, without k_t twice, as in 3.1
    return memory, keys                                         # 11


def til_inference(vit, head, images, key, memory):
    """Algorithm 2: logits (n, classes of a task) for uint8 images (n, 3, h, w) of a task."""
    theta_hat = memory.read(key)                                # 3
    return classify(vit, head, images, theta_hat)               # 5: C(x; W, theta_hat), as logits


@torch.no_grad()
def classify(vit, head, images, theta):
    """C(x; W, theta) for uint8 images (n, 3, h, w): logits (n, outputs of the head), on the CPU."""
    # Whoever classifies brings the theta: it does not matter which one was in the ViT before.
    lora.set(vit, theta)
    return head(substrate.features(vit, images)).cpu()


# ---- one seed: its tasks, its network, its folder ----------------------------------------------
def train_modulation(run, t, images, labels):
    """Lines 5 and 6 of Algorithm 1: theta_t and its head, by draws that seed and t determine."""
    args = run.args
    start = time.perf_counter()
    # Draws of its own: if a task is read from the folder, the next one still draws the same.
    generator = data.generator(run.seed, t + 1)                 # (seed, 0) is for theta_0
    run.classifier.init(generator)                              # 5
    # A task is small enough to lie on the GPU as a whole, as uint8.
    loss, accuracy = lora.fit(                                  # 6
        run.classifier, images.to(args.device), labels.to(args.device), args.epochs,
        args.batch_size, LR, generator)
    return {
        "theta": lora.get(run.vit).cpu(),
        "head": run.classifier.head.state_dict(),
        "loss": loss,
        "accuracy": accuracy,
        "seconds": time.perf_counter() - start}


# The digest of the code that makes a modulation. A new function that training calls must be listed
# here, or old modulations are found. (Not covered: how `Run` builds the network, and set_up_torch.)
# Evaluation, memories and terminal are left out: when they change, nothing is trained again. Taken
# at import, as a file may be edited while the program runs.
CODE = data.code_digest(substrate, lora, train_modulation,
                        data.split, data.task, data.task_labels, data.generator)


def describe(args, train, vit):
    """All that a run's modulations depend on, but the seed, the machine and PyTorch's version."""
    options = ("dataset splits backbone image_size rank alpha epochs batch_size validate "
               "plain device dtype")
    return {option: getattr(args, option) for option in options.split()} | {
        "lr": LR,
        "weight_decay": lora.WEIGHT_DECAY,
        "images": data.digest(train.images, train.labels),
        "weights": data.digest(*vit.parameters()),
        "code": CODE}


class Run:
    """One seed. Its folder keeps every modulation, and is named after all that they depend on.

    So a file that is found in it was made with these options, images, weights and code.
    """

    def __init__(self, args, seed, train, test):
        self.args = args
        self.seed = seed
        self.train = train
        self.test = test
        self.tasks = data.split(len(train.classes), args.splits, seed)
        self.vit = substrate.load(args.backbone, args.weights, args.image_size)
        self.config = describe(args, train, self.vit)           # of W as it is in the file
        self.digest = data.digest(self.config)
        self.vit.to(args.device)
        # Before `add`, so that only W is cast: bfloat16 is too coarse for AdamW's small steps in
        # adapters and heads. Mean and std are no parameters, and stay float32.
        for weight in self.vit.parameters():
            weight.data = weight.data.to(getattr(torch, args.dtype))
        lora.add(self.vit, args.rank, args.alpha)
        self.classifier = lora.Classifier(self.vit, len(self.tasks[0]), args.plain)
        self.P = len(lora.get(self.vit))
        experiment = f"{args.dataset}-{args.splits}s-{args.backbone}-r{args.rank}"
        self.folder = args.out / f"{experiment}-seed{seed}-{self.digest}"
        data.save(self.folder / "config.json", self.config)
        found = sum(self.path(t).exists() for t in range(args.splits))
        again = ", not trained again" if found else ""
        print(f"P = {self.P}; {found} of {args.splits} tasks found in {self.folder}{again}")

    def path(self, t):
        """The file of theta_t and its head; 0.pt is that of task 1."""
        return self.folder / f"adapters/{t}.pt"

    def learn(self, t, images, labels):
        """theta_t (P,) for Algorithm 1: found in the folder, or trained and kept there."""
        if not self.path(t).exists():
            made = train_modulation(self, t, images, labels)
            data.save(self.path(t), made)
            print_training("task", t + 1, len(self.tasks), made["loss"], made["accuracy"],
                           self.args.epochs * len(labels), made["seconds"])
        # Read back even if it is new: so a command and its repetition do the same.
        return self.modulation(t)["theta"]

    def modulation(self, t):
        """What train_modulation returned, read from the folder."""
        return data.read(self.path(t))

    def heads(self):
        """The head of each task. It is kept beside the memory, which stores theta alone."""
        heads = []
        for t in range(len(self.tasks)):
            # A copy: the classifier's own head is that of the task which was trained last.
            head = copy.deepcopy(self.classifier.head)
            head.load_state_dict(self.modulation(t)["head"])
            heads.append(head)
        return heads

    def fill_memory(self):
        """Algorithm 1. The memory is written anew by each command: no file of it can be stale."""
        memory = evaluate.make_memory(self.args.memory, self.P)
        return til_training(self.tasks, self.train, memory, self.learn)

    def save_result(self, setting, variant, result):
        """Writes figures, and what they are about, as <setting>-<memory><variant>.json and .svg.

        variant: "" for TIL, "-<predictor>-<digest>" for MTS.
        """
        device = f"CPU, {torch.get_num_threads()} threads"
        if self.args.device == "cuda":
            device = torch.cuda.get_device_name()
        about = {"setting": setting, "memory": self.args.memory, "seed": self.seed,
                 "digest": self.digest + variant, "device": device}
        result = self.config | about | result
        # Without what a file system may dislike.
        name = re.sub(r"[^\w.,=+-]", "-", f"{setting}-{self.args.memory}{variant}")
        data.save(self.folder / f"{name}.json", result)
        shown = {way: line for way, line in result["per_task"].items() if way in PICTURED}
        tasks = range(1, len(self.tasks) + 1)
        evaluate.plot(self.folder / f"{name}.svg", "task", "accuracy in %", shown, tasks)
        return result


def print_training(what, done, total, loss, accuracy, images_seen, seconds):
    """A line for a task, or an epoch of the predictor, which took so many seconds."""
    print(f"{what} {done:3}/{total}  loss {loss:.4f}  train accuracy {accuracy:6.2f} %  "
          f"{images_seen / seconds:,.0f} images/s  {(total - done) * seconds:.0f} s left",
          flush=True)


# ---- evaluation --------------------------------------------------------------------------------
def ways_to_classify(run, memory, keys):
    """{name: function (t, images) -> logits}, which treats the images as belonging to task t.

    With theta as trained (gt), as recalled; and evaluate.CONTROLS, which show what theta is worth.
    (Another control is a line here, its name there, and its description in evaluate.LEGEND.)
    """
    vit = run.vit
    heads = run.heads()
    linear_heads = fit_linear_heads(run)
    thetas = [run.modulation(t)["theta"] for t in range(len(keys))]
    mean_theta = torch.stack(thetas).mean(0)                    # (P,)
    zero = torch.zeros(run.P)
    return {
        "gt": lambda t, x: classify(vit, heads[t], x, thetas[t]),   # ground truth, in the paper
        "recalled": lambda t, x: til_inference(vit, heads[t], x, keys[t], memory),
        "mean": lambda t, x: classify(vit, heads[t], x, mean_theta),
        # Of the task before; before the first comes the last, which is thetas[-1].
        "wrong": lambda t, x: classify(vit, heads[t], x, thetas[t - 1]),
        "none": lambda t, x: classify(vit, heads[t], x, zero),
        # Its head never saw a modulation.
        "linear": lambda t, x: classify(vit, linear_heads[t], x, zero)}


def fit_linear_heads(run):
    """For each task, a head on the class tokens of the bare substrate."""
    lora.set(run.vit, torch.zeros(run.P))
    heads = []
    for classes in run.tasks:
        images, labels = data.task(run.train, classes)
        # Computed once, as W is frozen. A CPU is quicker than a GPU with matrices this small.
        tokens = substrate.features(run.vit, images).cpu().double()
        weight, bias = evaluate.logistic_regression(tokens, labels, len(classes))
        head = torch.nn.Linear(*weight.T.shape, device=run.args.device)
        head.load_state_dict({"weight": weight, "bias": bias})
        heads.append(head)
    return heads


def answers(images, task_ids, way):
    """Predicted labels (n,), from 0 within the task that task_ids (n,) gives an image."""
    labels = torch.empty_like(task_ids)
    # The images of a task together, so that its modulation is recalled and loaded once.
    for t in task_ids.unique().tolist():
        of_task_t = task_ids == t
        labels[of_task_t] = way(t, images[of_task_t]).argmax(1)
    return labels


def recall_errors(run, memory, keys):
    """|theta_hat - theta| / |theta| of each task, without the key."""
    return [evaluate.recall_error(memory.read(key), run.modulation(t)["theta"])
            for t, key in enumerate(data.progress(keys, "recalling"))]


def test(run):
    """Algorithm 1, then 2 on all test images; writes til-<memory>.json and returns its content."""
    start = time.perf_counter()
    memory, keys = run.fill_memory()
    task_ids, labels = data.task_labels(run.test, run.tasks)
    hits = {}
    for name, way in data.progress(ways_to_classify(run, memory, keys).items(), "testing"):
        hits[name] = answers(run.test.images, task_ids, way) == labels
    result = evaluate.figures(hits, task_ids, recall_errors(run, memory, keys))
    # The time of the training, even if an earlier command spent it.
    seconds = sum(run.modulation(t)["seconds"] for t in range(len(keys)))
    return run.save_result("til", "", result | {
        "drop": result["faa_gt"] - result["faa"],
        "images_per_second": run.args.epochs * len(run.train.labels) / seconds,
        "wall_seconds": time.perf_counter() - start})


def predict(run):
    """Algorithm 2 on a picture file."""
    if run.args.task not in range(1, len(run.tasks) + 1):
        raise ValueError(f"--predict needs --task, from 1 to {len(run.tasks)}")
    t = run.args.task - 1
    image = data.picture(run.args.predict, run.vit.image_size)[None]
    memory, keys = run.fill_memory()
    print_classes(run, t, til_inference(run.vit, run.heads()[t], image, keys[t], memory))


def print_classes(run, t, logits):
    """The classes of task t by name, with their probabilities; logits (1, classes of the task)."""
    probabilities = logits.softmax(1)[0].tolist()
    for p, label in sorted(zip(probabilities, run.tasks[t]), reverse=True):
        print(f"{100 * p:6.2f} %  {run.train.classes[label]}")


def probe(run):
    """What memories recall as they fill up, then from noisy keys: probe.json and probe.svg."""
    # Before anything is trained: a name may be wrong.
    memories = {name: evaluate.make_memory(name, run.P) for name in run.args.probe}
    _, keys = run.fill_memory()
    T = len(keys)
    rows = []
    lines = {}
    for name, memory in memories.items():
        for n in range(1, T + 1):
            theta = run.modulation(n - 1)["theta"]
            memory.write(*lora.split_key(theta))
            if n % math.ceil(T / 4) == 0 and n < T:             # at every quarter
                rows.append(recall_with_noise(run, name, memory, keys[:n], 0))
        full = [recall_with_noise(run, name, memory, keys, noise) for noise in (0, *NOISE)]
        rows += full
        lines[name] = [row["faa"] for row in full]
    data.save(run.folder / "probe.json", {"rows": rows})
    evaluate.plot(run.folder / "probe.svg", "noise of a key / its root mean square", "FAA in %",
                  lines, (0, *NOISE))


def recall_with_noise(run, name, memory, keys, noise):
    """A row of `probe`: mean recall error and FAA of the tasks with these keys, made noisy."""
    # The same draws for every memory and level: what differs between rows is not luck.
    draws = torch.randn(len(keys), len(keys[0]), generator=data.generator(0))
    errors = []
    accuracies = []
    for t, (key, head) in enumerate(zip(keys, run.heads())):
        rms = key.square().mean().sqrt()
        theta_hat = memory.read(key + noise * rms * draws[t])
        images, labels = data.task(run.test, run.tasks[t])
        logits = classify(run.vit, head, images, theta_hat)
        errors.append(evaluate.recall_error(theta_hat, run.modulation(t)["theta"]))
        accuracies.append(evaluate.percent(logits.argmax(1) == labels))
    row = {"memory": name, "stored": len(keys), "noise": noise,
           "error": statistics.fmean(errors), "faa": evaluate.faa(accuracies)}
    print("{memory:20} T {stored:3}  noise {noise:4}  error {error:.4f}  FAA {faa:.2f}"
          .format(**row))
    return row


# ---- command line ------------------------------------------------------------------------------
def options(description):
    """A parser with the options that til.py and mts.py share."""
    parser = data.parser(description)
    add = parser.add_argument
    usual = evaluate.usual("cifar100")
    glyphs = evaluate.usual("glyphs")
    add("--dataset", choices=data.LOADERS, default="glyphs", help="default: %(default)s")
    add("--splits", type=int, default=20, help="number of tasks T (default: %(default)s)")
    add("--memory", default="hopfield", metavar="NAME[:OPTION=VALUE,..]",
        help="the class NAME of NAME.py, and its options (default: %(default)s)")
    add("--seeds", type=data.at_least(0), nargs="+", default=[0],
        help="one run each (default: 0)")
    add("--validate", action="store_true", help="test on every tenth training image of a class")
    add("--backbone", choices=substrate.CONFIGS,
        help=f"default: {usual['backbone']}, for glyphs {glyphs['backbone']}")
    add("--weights", type=Path, help="weights of the backbone (default: shipped or downloaded)")
    add("--image-size", type=data.positive,
        help=f"side of the input (default: the backbone's, for glyphs {glyphs['image_size']})")
    add("--rank", type=data.positive, help=f"rank r of LoRA (default: {usual['rank']})")
    add("--alpha", type=data.positive,
        help=f"LoRA's scale is alpha / r (default: {usual['alpha']})")
    add("--epochs", type=data.positive, help=f"epochs a task (default: {usual['epochs']})")
    add("--batch-size", type=data.positive,
        help=f"default: {usual['batch_size']}, for glyphs {glyphs['batch_size']}")
    add("--data-dir", type=Path, default="data", help="of the data sets (default: %(default)s)")
    add("--out", type=Path, default="runs", help="of the run folders (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: a GPU, if there is one")
    add("--plain", action="store_true", help="on a GPU: float32, no TF32, no CUDA graph; slow")
    add("--predict", type=Path, metavar="PICTURE", help="classify a picture, not the test images")
    return parser


def main(args, action):
    """action(run) for each seed; then a table of the results, which `test` alone returns."""
    # What is usual depends on the data set, so argparse cannot fill it in.
    for option, value in evaluate.usual(args.dataset, args.backbone).items():
        if option in args and getattr(args, option) is None:    # til.py has not the predictor's
            setattr(args, option, value)
    print(f"{args.dataset} in {args.splits} tasks; {args.backbone} at {args.image_size} px, LoRA "
          f"of rank {args.rank}; memory {args.memory}; on {args.device}", flush=True)
    set_up_torch(args)
    # Mistakes that are found before anything is decoded, or trained. (10: any length will do.)
    evaluate.make_memory(args.memory, 10)
    if len({*args.seeds}) < len(args.seeds):
        raise ValueError("--seeds: one of them is given twice")
    if args.dataset == "folder":
        data.split(len(data.class_names(args.data_dir / "train")), args.splits, 0)
    train, test = data.load(args.dataset, args.data_dir)
    if args.validate:
        train, test = data.hold_out(train)
    # Set by torchrun.
    if "LOCAL_RANK" in os.environ:
        train_share(args, train, test)
    results = [action(Run(args, seed, train, test)) for seed in args.seeds]
    if None not in results:
        print(evaluate.report(results))


def train_share(args, train, test):
    """Under torchrun, each process trains some of the tasks. Then the first one alone goes on."""
    torch.distributed.init_process_group("gloo")                # only to wait for each other
    process = torch.distributed.get_rank()
    for run in (Run(args, seed, train, test) for seed in args.seeds):
        for t in range(process, len(run.tasks), torch.distributed.get_world_size()):
            run.learn(t, *data.task(train, run.tasks[t]))
    torch.distributed.barrier()
    if process > 0:
        sys.exit()


def set_up_torch(args):
    """Makes PyTorch deterministic, and fast on the device. Sets args.plain and args.dtype."""
    if args.device == "cpu":
        args.plain = True
        # vit_micro gains little from more threads, and loses much if others use the cores.
        if args.backbone == "vit_micro":
            torch.set_num_threads(1)
    elif torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        raise ValueError("PyTorch finds no GPU here: use --device cpu")
    # A GPU without a bfloat16 of its own, such as a T4, emulates it, slowly.
    args.dtype = "float32"
    if not args.plain and torch.cuda.is_bf16_supported(including_emulation=False):
        args.dtype = "bfloat16"
    # TF32, which --plain does without, rounds the factors of float32 products to 11 bits.
    torch.set_float32_matmul_precision("highest" if args.plain else "high")
    torch.backends.cudnn.allow_tf32 = not args.plain
    # So the same GPU gives the same bits, which costs 6 % of the time.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False     # slow, and nobody reads it
    warnings.filterwarnings("ignore", module="torch.autograd")  # about streams, as a graph is made


if __name__ == "__main__":
    with data.one_line_errors():
        parser = options(__doc__)
        parser.add_argument("--task", type=int,
                            help="the task (1 to T) of the picture; --predict names its classes")
        parser.add_argument("--probe", nargs="+", metavar="MEMORY",
                            help="recall as these memories fill up, and with noisy keys")
        args = parser.parse_args()
        action = test
        if args.predict:
            action = predict
        elif args.probe:
            action = probe
        main(args, action)
