"""Metrics (paper, section 4), the paper's tables over finished runs, two experiments on the memories alone, and a stopwatch.

    python evaluate.py runs/*            # our mean +- standard deviation (number of seeds), the paper's figures beside them
    python evaluate.py bench             # time, bytes and recall error of the memories as T and P grow
    python evaluate.py probe runs/X      # what a run's memories recall from noisy, short and faded cues
    python evaluate.py speed             # images a second of the training step as rank and pictures grow
"""
import copy
import math
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torchvision.utils import make_grid

import data
import lora
from bayespcn import BayesPCN
from hopfield import Hopfield
from vit import CONFIGS

# Tables 1 and A1 of the paper: for each experiment and memory the first columns of COLUMNS, mean and standard deviation over
# three seeds, in percent.
PAPER = {
    ("til", "cifar100", 20): {
        "hopfield": ("97.29 ± 0.30", "97.12 ± 0.44", "0.0026 ± 0.01"), "bayespcn": ("97.29 ± 0.30", "96.50 ± 0.64", "0.32 ± 0.12"),
        "hopfield --rank 4": ("–", "96.60 ± 0.37", "0.0 ± 0.05"), "hopfield --rank 32": ("–", "96.99 ± 0.01", "0 ± 0.01")},
    ("til", "cifar100", 50): {
        "hopfield": ("97.79 ± 0.20", "97.76 ± 0.47", "0.04 ± 0.07"), "bayespcn": ("97.79 ± 0.20", "97.24 ± 0.73", "0.62 ± 0.32"),
        "hopfield --rank 4": ("–", "97.70 ± 0.51", "−0.03 ± 0.0"), "hopfield --rank 32": ("–", "97.62 ± 0.44", "0.20 ± 0.02")},
    ("til", "tinyimagenet", 50): {
        "hopfield": ("91.56 ± 0.48", "91.82 ± 0.28", "−0.21 ± 0.10"), "bayespcn": ("91.56 ± 0.48", "90.46 ± 0.35", "1.16 ± 0.57"),
        "hopfield --rank 4": ("–", "91.39 ± 0.42", "−0.1 ± 0.24"), "hopfield --rank 32": ("–", "91.64 ± 0.44", "−0.04 ± 0.34")},
    ("til", "tinyimagenet", 100): {
        "hopfield": ("95.09 ± 0.40", "94.77 ± 0.48", "−0.30 ± 0.19"), "bayespcn": ("95.09 ± 0.40", "93.28 ± 0.35", "1.71 ± 0.20"),
        "hopfield --rank 4": ("–", "94.94 ± 0.59", "0.09 ± 0.31"), "hopfield --rank 32": ("–", "95.09 ± 0.47", "0.13 ± 0.47")},
    ("mts", "cifar100", 20): {"hopfield": ("91.47 ± 0.21", "97.29 ± 0.30", "91.34 ± 0.52", "5.95 ± 0.022")},
    ("mts", "cifar100", 50): {"hopfield": ("91.42 ± 0.28", "97.79 ± 0.20", "94.28 ± 0.15", "3.50 ± 3.50")},
    ("mts", "tinyimagenet", 50): {"hopfield": ("84.42 ± 0.49", "91.56 ± 0.48", "83.14 ± 0.16", "8.35 ± 0.53")},
    ("mts", "tinyimagenet", 100): {"hopfield": ("83.27 ± 0.18", "95.09 ± 0.40", "88.69 ± 0.57", "6.47 ± 0.73")},
}

CONTROLS = {name: name for name in ("linear", "mean", "wrong", "none")}
COLUMNS = {
    "til": {"faa_gt": "FAA_GT", "faa": "FAA(M)", "drop": "D(M)", "recall_error": "error", **CONTROLS},
    "mts": {"task_accuracy": "Task Acc", "faa_gt": "FAA_GT", "faa_local": "local", "drop": "D(M)", "faa_strict": "strict",
            "drop_ids": "D, tasks", "drop_recall": "D, recall", **CONTROLS},
}
DEFINITIONS = {"til": """\
FAA      final average accuracy: the mean over tasks of the accuracy on the task's test images, percent; FAA_GT with the
         adapters theta_t as trained, FAA(M) with those that the memory M recalls
D(M)     FAA_GT - FAA(M): what recall costs, in points
error    |theta_hat - theta| / |theta| on the part that was not in the key, mean over tasks""", "mts": """\
Task Acc share of all test images whose task is predicted right, percent; FAA_GT as in TIL, told the right task
local    FAA(M), where an answer is right if the class has the right place within its task, whichever task was predicted
strict   FAA(M), where an answer is right if task and class are: class-incremental accuracy
D(M)     FAA_GT - local; of it D, tasks through wrong tasks and D, recall through recall, told the right tasks"""}
EVERYWHERE = """\
controls FAA of a head that was trained alone, on the frozen features (linear), and of the task's head with the mean of all
         adapters (mean), with the previous task's (wrong) and with no adapter (none); in MTS local, with the predicted tasks"""


def accuracy(logits, labels):
    """Share of rows whose largest logit is at the label, in percent. logits (n, classes), labels (n,)."""
    return 100 * (logits.argmax(1).cpu() == labels.cpu()).double().mean().item()


def faa(accuracies):
    """FAA = (1/T) sum_t A_{T,t} (section 4): every task weighs the same."""
    return sum(accuracies) / len(accuracies)


def per_task(hits, task_ids):
    """The share of hits, bool (n,), among the items of each task in percent; task_ids (n,) counts from 0."""
    return [100 * hits[task_ids == t].double().mean().item() for t in range(task_ids.max() + 1)]


def switching_hits(t_hat, logits, task_ids, places):
    """What Algorithm 4's answers t_hat (n,), logits (n, classes of a task) get right on each task, in percent: the task, the
    place of the class within its task (local), both (strict). task_ids, places (n,): the truth, counted from 0."""
    task, local = t_hat == task_ids, logits.argmax(1) == places
    return {name: per_task(hits, task_ids) for name, hits in (("task", task), ("local", local), ("strict", task & local))}


def recall_error(theta_hat, theta, n_key):
    """|theta_hat - theta| / |theta| over the elements after the key's n_key."""
    return ((theta_hat - theta)[n_key:].norm() / theta[n_key:].norm()).item()


def smallest_weight(memory, keys):
    """The smallest softmax weight that a Hopfield memory gives the right item: 1 means exact recall. Else None."""
    if not hasattr(memory, "attention"):
        return None
    return memory.attention(torch.stack([*keys])).diagonal().min().item()    # (T, T): row t is key t's


# ---- tables ------------------------------------------------------------------------------------------------------------------

def options(result):
    """What followed --memory on the command line of a result: the memory, and the options that are not the default."""
    usual = data.defaults(result["dataset"]) | {"rank": 8, "alpha": lora.ALPHA, "epochs": 3, "shared_init": False, "validate": False}
    usual |= {"image_size": CONFIGS[result["backbone"]].image_size, "plain": False}
    given = result | {f"predictor_{name}": value for name, value in result.get("predictor", {}).items()}
    words = ["bayespcn --bpcn-read joint" if result["memory"] == "bayespcn-joint" else result["memory"]]
    for name, value in usual.items():
        if given.get(name, value) != value:
            words.append(f"--{name.replace('_', '-')}" + (f" {given[name]}" if value is not False else ""))
    return " ".join(words)


def number(values, digits=2):
    """'mean +- standard deviation' of a list of numbers; a single one has no deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def cell(runs, column):
    """One figure of a table, over the seeds."""
    values = [run["controls"][column] if column in CONTROLS else run[column] for run in runs]
    return number([value["mean"] for value in values], 4) if column == "recall_error" else number(values)


def provenance(label, runs):
    """One line on what the figures of a row cost: means over the seeds."""
    def mean(key):
        return statistics.mean(run[key] for run in runs)
    trained = {"til": "adapters", "mts": "predictor"}[runs[0]["setting"]]
    devices = " and ".join(sorted({run["device"] for run in runs}))
    both = all("peak_host_bytes" in run for run in runs)                     # a GPU's memory and the machine's
    host = f" of the GPU, {mean('peak_host_bytes') / 1e9:.1f} GB of the machine" if both else ""
    return (f"- {label}: {devices}; {trained} trained in {mean('train_seconds'):.0f} s, {mean('images_per_second'):,.0f} images/s; "
            f"this command took {mean('wall_seconds'):.0f} s and {mean('peak_memory_bytes') / 1e9:.1f} GB{host}; weights {runs[0]['weights']}")


def place(row):
    """Where a row ((label, ...), runs) stands in its table: the defaults first, Hopfield before other memories."""
    (label, _), (run, *_) = row
    network = [run.get(name, 0) for name in ("backbone", "image_size", "shared_init", "rank", "alpha")]
    return label.replace(" --bpcn-read joint", "").count("--"), *network, run["memory"] != "hopfield", label


SAME = ("lr", "weight_decay", "weights", "train_data", "test_data")         # what the seeds of a row share, beside the options


def report(results, whole=False):
    """Markdown tables of til-*.json and mts-*.json contents, a table for each experiment, a row for each command, averaged over the
    seeds, with the paper's row below it; the paper's other rows follow. `whole`: with all experiments of the paper.

    Raises ValueError if one command comes twice with the same seed.
    """
    experiments = {experiment: {} for experiment in PAPER} if whole else {}
    for result in sorted(results, key=lambda result: result["seed"]):
        rows = experiments.setdefault(tuple(result[name] for name in ("setting", "dataset", "splits")), {})
        same = [*(result[name] for name in SAME), result.get("predictor", {}).get("lr")]
        runs = rows.setdefault((options(result), str(same)), [])
        if any(run["seed"] == result["seed"] for run in runs):
            raise ValueError(f"two results of seed {result['seed']} for {result['setting']}.py --dataset {result['dataset']} --splits "
                             f"{result['splits']} --memory {options(result)}: name one of the folders")
        runs.append(result)
    lines = []
    for experiment, rows in sorted(experiments.items(), key=lambda item: (item[0][0] == "mts", not item[1], item[0])):
        setting, dataset, splits = experiment
        paper, columns = dict(PAPER.get(experiment, {})), COLUMNS[setting]
        table, costs = [["M", "seeds", *columns.values()]], []
        for (label, _), runs in sorted(rows.items(), key=place):
            table.append([f"`{label}`", " ".join(str(run["seed"]) for run in runs), *(cell(runs, column) for column in columns)])
            costs.append(provenance(label, runs))
            if label in paper:
                table.append(["paper", "3 seeds", *paper.pop(label)])
        table += [[f"paper, `{label}`", "3 seeds", *figures] for label, figures in paper.items()]
        more = " --data-dir D" * (dataset == "folder")
        title = f"{setting.upper()}: `python {setting}.py --dataset {dataset}{more} --splits {splits} --memory M`"
        lines += [title + ": not measured" * (not rows), "", markdown(table), *costs, *[""] * bool(costs)]
    settings = {setting for setting, *_ in experiments}
    return "\n".join([*lines, *(text for setting, text in DEFINITIONS.items() if setting in settings), EVERYWHERE])


def markdown(rows):
    """Rows of cells as a Markdown table that is aligned as plain text, too; the first row is the head, missing cells are empty."""
    rows = [[*row, *[""] * (len(rows[0]) - len(row))] for row in rows]
    first, *widths = (max(3, *map(len, column)) for column in zip(*rows))
    rows.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in widths)])
    return "".join("| " + " | ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) + " |\n" for row in rows)


def read_runs(folders):
    """The contents of all til-*.json and mts-*.json in these run folders. Raises ValueError if there is none, or a broken one."""
    results = []
    for folder in dict.fromkeys(map(Path, map(os.path.realpath, folders))):
        if not folder.exists():
            raise ValueError(f"there is no {folder}: name finished run folders")
        paths = sorted([*folder.glob("til-*.json"), *folder.glob("mts-*.json")])
        if not paths and (folder / "config.json").exists():
            print(f"{folder} has no results yet: its run is not finished", file=sys.stderr)
        config = data.load_json(folder / "config.json") if (folder / "config.json").exists() else {}
        for path in paths:
            results.append(data.load_json(path))
            if any(results[-1].get(key) != value for key, value in config.items()):
                raise ValueError(f"{path} is of another run than config.json beside it: remove it and run the command again")
            try:
                report(results[-1:])                                         # only to see whether a table can be made of it
            except (KeyError, TypeError, AttributeError):
                raise ValueError(f"{path} is not a result of this version: remove it and run the command again") from None
    if not results:
        raise ValueError("no til-*.json or mts-*.json in these folders: name run folders (runs/*), or run til.py or mts.py first")
    return results


# ---- the literal BayesPCN ----------------------------------------------------------------------------------------------------
# The plain version: R_0 in its full width at every step, no Gram matrix, autograd and torch.optim.Adam. It is the oracle of the
# tests and the yardstick of `bench`.

def literal_energy(memory, x0, xs, m):
    """E of x0 (|x|,), the first columns of x^0, and xs = [x1 (H,), ..], layer by layer, with m log v_0."""
    R, targets, E = [memory.R[0][:, :len(x0)], *memory.R[1:]], [x0, *xs], 0
    for l, above in enumerate(xs):
        z = F.gelu(above)
        v = memory.s2 + z @ memory.U[l] @ z
        q = (targets[l] - z @ R[l]).square().sum()
        E = E + (q / v + (len(above) if l else m) * torch.log(2 * math.pi * v)) / 2
    v = memory.s2 + memory.u
    return E + ((xs[-1] - memory.r).square().sum() / v + len(xs[-1]) * math.log(2 * math.pi * v)) / 2


def literal_descent(memory, energy, start):
    """The tensors `start` after Adam on energy(tensors), with the memory's schedule and stop."""
    x, before = [s.clone().requires_grad_() for s in start], math.inf
    adam = torch.optim.Adam(x, lr=memory.lr)
    for i in range(memory.steps):
        adam.param_groups[0]["lr"] = memory.lr * min(1, (1 - i / memory.steps) / 0.7)
        E = energy(x)
        if abs(E.item() - before) < 1e-3:
            break
        before = E.item()
        adam.zero_grad()
        E.backward()
        adam.step()
    return [s.detach() for s in x]


def start_of(memory, stream):
    """The hidden activations [x1 (H,), ..] from which a descent starts. stream: L for reads, L + 1 + t for write t."""
    return [x.to(memory.r) for x in memory._normal(stream, memory.layers - 1, memory.hidden)]


def literal_write(memory, key, value):
    """What memory.write(key, value) does."""
    theta, start = torch.cat([key, value]).to(memory.r), start_of(memory, memory.layers + 1 + memory.count)
    x = literal_descent(memory, lambda x: literal_energy(memory, theta, x, memory.dim), start)
    memory.condition([row[None] for row in (theta, *x)])


def literal_read(memory, key):
    """What memory.read does with one key (|k|,); `joint` moves the missing values too, as Yoo & Wood's code does."""
    k, start = key.to(memory.r), start_of(memory, memory.layers)
    if memory.read_mode == "joint":
        start.append(k.new_zeros(memory.dim - len(k)))
        *_, value = literal_descent(memory, lambda x: literal_energy(memory, torch.cat([k, x[-1]]), x[:-1], memory.dim), start)
    else:
        x = literal_descent(memory, lambda x: literal_energy(memory, k, x, len(k)), start)
        value = F.gelu(x[0]) @ memory.R[0][:, len(k):]
    return torch.cat([key, value.to(key)])


# ---- bench: the memories as T and P grow -------------------------------------------------------------------------------------

READS = {"bayespcn": "marginal", "bayespcn-joint": "joint"}                  # two ways to read one memory
VERSIONS = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}


def recall_errors(theta_hat, thetas):
    """recall_error of each row of theta_hat (n, P), a list."""
    n_key = len(lora.split_key(thetas[0])[0])
    return [recall_error(*pair, n_key) for pair in zip(theta_hat, thetas)]


def confusion(true, predicted, n):
    """(n, n): the share of the items of each true class (row) that was predicted as each class (column)."""
    counts = torch.bincount(n * true + predicted, minlength=n * n).view(n, n).double()
    return counts / counts.sum(1, keepdim=True)


class Files:
    """The yardstick `disk`: one file for each theta, named after its key."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def write(self, key, value):
        """Stores key (|k|,) with value (P - |k|,)."""
        torch.save(torch.cat([key, value]), self.folder / data.checksum(key.cpu()))

    def read(self, keys):
        """thetas (n, P) of keys (n, |k|), one file after the other."""
        return torch.stack([torch.load(self.folder / data.checksum(key.cpu()), weights_only=True) for key in keys])

    @property
    def nbytes(self):
        """Size of the files in bytes."""
        return sum(path.stat().st_size for path in self.folder.iterdir())


def lora_like(dim, t, rank=8, width=384):
    """A made-up theta_t (dim,): A and B in turn, r d elements each, as in the adapters of a ViT-S; cut off at dim.

    A is drawn as in lora.py; B is as wide as training leaves it, 0.030 rms in 50 adapters of TinyImageNet (whose A has 0.040).
    """
    generator = data.generator(dim, t)
    A = (2 * torch.rand(dim, generator=generator) - 1) / math.sqrt(width)
    B = 0.03 * torch.randn(dim, generator=generator)
    return torch.where(torch.arange(dim) // (rank * width) % 2 == 0, A, B)


def peak_memory():
    """The most bytes of main memory that this process has used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check_device(device):
    """Raises ValueError for a GPU that is not there."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine has no CUDA GPU that PyTorch can use; try --device cpu")


def timed(function, *args):
    """function(*args) and its seconds; the clock is read when a GPU has done all that it was asked to."""
    def clock():
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()
    start = clock()
    result = function(*args)
    return result, clock() - start


def measure(memory, thetas):
    """Reads all thetas (T, P): milliseconds per item, bytes, relative squared errors of the values, in the order of writing."""
    keys, _ = lora.split_key(thetas)
    theta_hat, together = timed(memory.read, keys)
    few = keys[::math.ceil(len(keys) / 10)]                                  # at most 10: one by one is slow
    _, alone = timed(lambda: [memory.read(key[None]) for key in few])
    errors = [float(f"{error ** 2:.4g}") for error in recall_errors(theta_hat, thetas)]
    return {"read_ms": 1e3 * together / len(keys), "alone_ms": 1e3 * alone / len(few), "bytes": memory.nbytes,
            "mean": statistics.mean(errors), "first": errors[0], "last": errors[-1], "max": max(errors), "errors": errors}


def literal_ms(memory, theta):
    """Milliseconds that the literal descent takes to write theta (P,), ours for the same, and the literal read each way."""
    key, value = lora.split_key(theta)
    ours = timed(copy.deepcopy(memory).write, key, value)[1]
    twin = copy.deepcopy(memory)
    seconds = {"ours": ours, "write": timed(literal_write, twin, key, value)[1]}
    for name, mode in READS.items():
        twin.read_mode = mode
        seconds[name] = timed(literal_read, twin, key)[1]
    return {name: 1e3 * s for name, s in seconds.items()}


def bench_memory(memory, thetas, counts, label):
    """Writes thetas (T, P) one after the other and measures at every T in counts. Returns rows of the JSON file."""
    rows, ms, literal, T, P = [], [], {}, *thetas.shape
    for t, (key, value) in enumerate(data.progress(zip(*lora.split_key(thetas)), T, f"P {P}, {label}"), 1):
        ms.append(1e3 * timed(memory.write, key, value)[1])
        if t not in counts:
            continue
        before = rows[-1]["T"] if rows else 0
        for name, mode in READS.items() if isinstance(memory, BayesPCN) else [(label, None)]:
            if mode:                                                         # a BayesPCN
                memory.read_mode = mode
            rows.append({"P": P, "memory": name, "hidden": getattr(memory, "hidden", None), "T": t,
                         "write_ms": statistics.mean(ms[before:]), **measure(memory, thetas[:t])})
            if mode:
                literal = literal or literal_ms(memory, lora_like(P, T).to(thetas))
                # Writes take 60 to 500 steps, each theta its own number: only the same write can be compared.
                write_all = literal["write"] / literal["ours"] * sum(ms)
                ratio = (write_all + t * literal[name]) / (sum(ms) + t * rows[-1]["read_ms"])
                rows[-1] |= {"literal_write_ms": literal["write"], "same_write_ms": literal["ours"],
                             "literal_read_ms": literal[name], "speedup": ratio}
    return rows


LEGEND = """\
write     ms per item since the T above; read: all keys as one batch, ms per item; alone: at most 10 keys, one by one
error     |theta_hat - theta|^2 / |theta|^2 on the part that was not in the key; first and last in the order of writing
literal   the descent in full width, without Gram matrix, timed on one write (against ours of the same theta) and one read
          at the smallest T, scaled to all T; the factor is that over writing all T and reading them as one batch"""


def bench_table(rows):
    """The rows of one P as text."""
    table = [[f"P = {rows[0]['P']:,}", "T", "write ms", "read ms", "alone ms", "MB", "error², mean", "first", "last", "max"]]
    literal = []
    for row in rows:
        name = row["memory"] + (f", H = {row['hidden']}" if row["hidden"] else "")
        table.append([name, str(row["T"]), *(f"{row[key]:.1f}" for key in ("write_ms", "read_ms", "alone_ms")),
                      f"{row['bytes'] / 1e6:.1f}", *(f"{row[key]:.4f}" for key in ("mean", "first", "last", "max"))])
        if "speedup" in row:
            literal.append(f"- {name}, T = {row['T']}: {row['speedup']:.0f} x literal (write {row['literal_write_ms']:,.0f}, "
                           f"read {row['literal_read_ms']:,.0f} ms)\n")
    return "\n".join([markdown(table), "".join(literal)])


def bench(words):
    """Time, bytes and recall error of the memories on made-up thetas, as their number T and length P grow."""
    parser = data.Parser("python evaluate.py bench --sizes 18432 --counts 20 100", bench.__doc__, "evaluate.py bench")
    parser.add_argument("--sizes", type=int, nargs="+", default=[18432, 147456, 294912], help="P (default: %(default)s)")
    parser.add_argument("--counts", type=int, nargs="+", default=[20, 100, 200, 300], help="T (default: %(default)s)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256], help="H of BayesPCN (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the thetas and R_0 are (default: cpu)")
    parser.add_argument("--out", type=Path, help="JSON file (default: runs/bench-<device>.json)")
    args = parser.parse_args(words)
    for option, least in (("sizes", 10), ("counts", 1), ("hidden", 1)):      # of 10 elements, one is the key
        if not least <= min(getattr(args, option)) <= max(getattr(args, option)) <= 10 ** 9:
            values = " ".join(map(str, getattr(args, option)))
            raise ValueError(f"--{option} {values}: each must be at least {least}, and at most a billion")
    check_device(args.device)
    start, rows, counts = time.perf_counter(), [], sorted(set(args.counts))
    for P in args.sizes:
        new, thetas = [], torch.stack([lora_like(P, t) for t in range(counts[-1])]).to(args.device)
        with tempfile.TemporaryDirectory() as folder:
            new += bench_memory(Files(folder), thetas, counts, "disk")
        new += bench_memory(Hopfield(), thetas, counts, "hopfield")
        for hidden in args.hidden:
            new += bench_memory(BayesPCN(P, hidden, device=args.device), thetas, counts, "bayespcn")
        print(bench_table(new), flush=True)
        rows += new
    out = args.out or Path(f"runs/bench-{args.device}.json")
    data.save_json(out, {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU", "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start, "peak_memory_bytes": peak_memory(),
        "versions": VERSIONS, "rows": rows})
    print(LEGEND, out, sep="\n")


# ---- probe: the memories of a finished run under harder cues -----------------------------------------------------------------

NOISE, SHARES = (0, 0.1, 0.3, 1, 3, 10, 30, 100), (0.1, 0.05, 0.02, 0.01, 0.001)      # times the key's rms; of theta
BETAS, FORGET = (0.01, 0.1, 0.3, 1, 5, 25, 100), (0, 0.01, 0.1, 0.3, 0.5)
PANELS = (0.1, 0.3, 1, 25)                                                   # the betas of probe-softmax.png


def load_run(run):
    """config, thetas (T, P) and heads (state dicts) of a run folder. Raises ValueError if it is not a finished one."""
    try:
        config = data.load_json(run / "config.json")
        seed, _ = config["seed"], config["alpha"]                            # folders of earlier versions have no alpha
        data.generator(seed)
        adapters = [data.load_tensors(run / "adapters" / f"{t}.pt") for t in range(1, config["splits"] + 1)]
        for t, adapter in enumerate(adapters, 1):
            if adapter["t"] != t or data.checksum(adapter["config"]) != data.checksum(config):
                raise ValueError(f"{run}/adapters/{t}.pt is another task's, or of another run than config.json: remove it and run til.py "
                                 "again")
        return config, torch.stack([adapter["theta"] for adapter in adapters]), [adapter["head"] for adapter in adapters]
    except (FileNotFoundError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{run} does not hold config and all adapters of a run ({error}): finish it with til.py") from None


def classify_with(config, heads, args):
    """A function that gives FAA in percent over the first n tasks of a run, classified with theta_hat (n, P).

    Raises ValueError if the weights or the data set are others than the run's.
    """
    import til                                                               # which imports this file
    vit = til.substrate.load(config["backbone"], args.weights, config["image_size"])
    train, test = data.load(config["dataset"], args.data_dir)
    if config["validate"]:
        train, test = data.hold_out(train)
    here = {"weights": til.weights_checksum(vit), "positions": data.checksum(vit.published_positions), "test_data": data.checksum(*test)}
    for name, found in here.items():
        if found != config.get(name):
            raise ValueError(f"{name} {found} are not those of the run, {config.get(name)}: name them with --weights and --data-dir")
    til.equip(vit, config["rank"], args.device, alpha=config["alpha"])
    tasks = data.split(len(test.classes), config["splits"], config["seed"])
    tests, heads = [data.task(test, classes) for classes in tasks], [(head["weight"], head["bias"]) for head in heads]

    def classify(theta_hat):
        accuracies = []
        for theta, (images, labels), head in zip(theta_hat, tests, heads):
            lora.set(vit, theta)
            accuracies.append(accuracy(F.linear(til.features(vit, images).cpu(), *head), labels))
        return faa(accuracies)
    return classify


def probe_row(probe, level, thetas, cues, hopfield=None, bayespcn=None, classify=None):
    """Relative errors of thetas (n, P) recalled from cues (n, w), w <= |k|; Hopfield's smallest weight of the right item; and
    FAA, if there is a function to `classify` with.

    BayesPCN takes a cue of any width. Hopfield's is padded with zeros: what is unknown contributes nothing to K^T k.
    """
    recalled, weight = {}, None
    if hopfield:
        padded = F.pad(cues, (0, len(hopfield.K) - cues.shape[1]))
        recalled["hopfield"], weight = hopfield.read(padded), smallest_weight(hopfield, padded)
    for name, mode in READS.items() if bayespcn else ():
        bayespcn.read_mode = mode
        recalled[name] = bayespcn.read(cues)
    errors = {name: recall_errors(theta_hat, thetas) for name, theta_hat in recalled.items()}
    means = {name: statistics.mean(values) for name, values in errors.items()}
    accuracies = {f"{name}_faa": classify(theta_hat) for name, theta_hat in recalled.items()} if classify else {}
    return {"probe": probe, "level": level, "smallest_weight": weight, **means, **accuracies, "per_task": errors}


def probe_rows(thetas, generator, classify=None, device="cpu"):
    """Writes thetas (T, P) to both memories and probes them. Returns rows of the JSON file, and the Hopfield memory."""
    (T, P), (keys, values), rows = thetas.shape, lora.split_key(thetas), []
    hopfield, bayespcn = Hopfield(), BayesPCN(P, device=device)
    for n in data.progress(range(1, T + 1), T, "writing"):
        hopfield.write(keys[n - 1], values[n - 1])
        bayespcn.write(keys[n - 1], values[n - 1])
        if n in {math.ceil(T * fifth / 5) for fifth in range(1, 6)}:
            rows.append(probe_row("stored tasks", n, thetas[:n], keys[:n], hopfield, bayespcn, classify))
    noise = torch.randn(keys.shape, generator=generator) * keys.square().mean(1, keepdim=True).sqrt()
    cues = [("noise", level, keys + level * noise) for level in NOISE]
    cues += [("cue share", share, keys[:, :max(1, math.floor(share * P))]) for share in SHARES]
    for probe, level, cue in data.progress(cues, len(cues), "reading"):
        rows.append(probe_row(probe, level, thetas, cue, hopfield, bayespcn, classify))
    for strength in data.progress(FORGET, len(FORGET), "forgetting"):
        faded = copy.deepcopy(bayespcn)
        faded.forget(strength)
        rows.append(probe_row("forget", strength, thetas, keys, None, faded, classify))
    rows += [probe_row("beta", beta, thetas, keys, with_beta(hopfield, beta), None, classify) for beta in BETAS]
    return rows, hopfield


def probe_table(rows):
    """Mean recall errors, Hopfield's smallest weight and, where it was measured, FAA as text."""
    names = {"hopfield": 4, "smallest_weight": 4, **dict.fromkeys(READS, 4)}
    names |= {f"{name}_faa": 2 for name in ("hopfield", *READS) if f"{name}_faa" in rows[0]}
    table = [["recall error", *(name.replace("_faa", ", FAA").replace("_", " ") for name in names)]]
    for row in rows:
        cells = [f"{row[name]:.{digits}f}" if row.get(name) is not None else "–" for name, digits in names.items()]
        table.append([f"{row['probe']} {row['level']}", *cells])
    return markdown(table)


def with_beta(hopfield, beta):
    """The same memory, K and V shared, with another beta."""
    other = copy.copy(hopfield)
    other.beta = beta
    return other


def draw(path, panels, nrow, height=None):
    """PNG of panels (rows, columns) of numbers, nrow side by side: colours run with the square root from 0 to 1 and more."""
    anchors = torch.tensor([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37.0]])   # viridis
    x = torch.stack(panels).float().clamp(0, 1).sqrt() * (len(anchors) - 1)  # (n, rows, columns)
    below = x.long().clamp(max=len(anchors) - 2)
    rgb = torch.lerp(anchors[below], anchors[below + 1], (x - below)[..., None]).byte().permute(0, 3, 1, 2)
    width = max(1, 1000 // (nrow * x.shape[2]))                              # of a cell, in pixels, as is `height`
    rgb = rgb.repeat_interleave(height or width, 2).repeat_interleave(width, 3)
    if width >= 8:                                                           # room for a line between cells
        rgb[:, :, ::height or width], rgb[..., ::width] = 80, 80
    data.save_png(path, make_grid(rgb, nrow=nrow, padding=6, pad_value=255))


def probe(words):
    """What the memories of a finished run recall from noisy, short and faded cues, and with another beta."""
    parser = data.Parser("python evaluate.py probe runs/X", probe.__doc__, "evaluate.py probe")
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, help="folder for probe.json and two PNG files (default: the run's)")
    parser.add_argument("--faa", action="store_true", help="classify the run's test images, too, with what was recalled")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of the data sets, for --faa (default: data)")
    parser.add_argument("--weights", type=Path, help="weights file of the backbone, for --faa (default: shipped or downloaded)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one")
    args = parser.parse_args(words)
    check_device(args.device)
    config, thetas, heads = load_run(args.run)
    classify = classify_with(config, heads, args) if args.faa else None
    rows, hopfield = probe_rows(thetas, data.generator(config["seed"]), classify, args.device)
    out = args.out or args.run
    data.save_json(out / "probe.json", {"config": config, "P": thetas.shape[1], "versions": VERSIONS, "rows": rows})
    errors = [[row["per_task"][name] for row in rows if row["probe"] == "noise"] for name in ("hopfield", "bayespcn")]
    draw(out / "probe-noise.png", [torch.tensor(x) for x in errors], 1, 30)
    keys, _ = lora.split_key(thetas)
    draw(out / "probe-softmax.png", [with_beta(hopfield, beta).attention(keys) for beta in PANELS], len(PANELS))
    print(probe_table(rows))
    print(f"""{out}/probe.json
{out}/probe-noise.png    square root of the recall error, 0 dark, 1 and more bright; hopfield above, bayespcn below
                         a column for each task, a row for each noise {NOISE}
{out}/probe-softmax.png  square root of Hopfield's weights, 0 dark, 1 bright; a panel for each beta {PANELS}
                         a row for each cue, a column for each stored task""")


# ---- speed: the training step as rank and pictures grow ----------------------------------------------------------------------

STEPS = {                                                                    # backbone, image size, rank, batch size, plain
    "cpu": [("vit_tiny", 64, rank, 6, True) for rank in (4, 8, 32)],
    "cuda": [("vit_tiny", 64, 8, 64, False), *(("dinov2_vits14", 112, rank, 64, False) for rank in (4, 8, 32)),
             ("dinov2_vits14", 168, 8, 64, False), ("dinov2_vits14", 224, 8, 64, False), ("vit_b_16", 224, 8, 64, False),
             ("dinov2_vits14", 112, 8, 64, True), ("vit_b_16", 224, 8, 64, True)]}


def speed_row(backbone, image_size, rank, batch_size, plain, device, steps=30, repeats=7):
    """Trains on made-up images of 64 x 64 pixels, with random weights, on which speed does not depend. Returns a row of the
    JSON file; each repeat is an epoch of `steps` steps, everything that til.py does for it included."""
    import til                                                               # which imports this file
    vit = til.substrate.ViT(til.substrate.CONFIGS[backbone], image_size).requires_grad_(False).eval()
    til.equip(vit, rank, device, plain)
    classifier, n = til.Classifier(vit, 4, plain=plain), steps * batch_size
    images = torch.randint(256, (n, 3, 64, 64), dtype=torch.uint8, generator=data.generator(1)).to(device)
    labels, generator = (torch.arange(n) % 4).to(device), data.generator(2)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def train():
        for _ in classifier.trainer.fit(images, labels, 1, batch_size, generator):
            pass
    _, first = timed(train)                                                  # with what comes once: the capture of the graph
    rates = sorted(n / timed(train)[1] for _ in range(repeats))
    til.features(vit, images)
    evaluation = statistics.median(n / timed(til.features, vit, images)[1] for _ in range(repeats))
    flops, name = classifier.flops(images[0]), til.device_name(device)
    return {"backbone": backbone, "image_size": image_size, "rank": rank, "batch_size": batch_size, "plain": plain,
            "images_per_second": statistics.median(rates), "min": rates[0], "max": rates[-1], "P": len(lora.get(vit)),
            "first_seconds": first, "flops_per_image": flops, "mfu": til.mfu(flops * statistics.median(rates), name),
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None, "evaluation": evaluation}


def speed_table(rows):
    """The rows as text."""
    table = [[f"batches of {rows[0]['batch_size']}", "px", "rank", "images/s", "min", "max", "MFU %", "GB", "evaluation images/s"]]
    for row in rows:
        gpu = row["peak_memory_bytes"] is not None
        table.append([row["backbone"] + " --plain" * (row["plain"] and gpu), str(row["image_size"]), str(row["rank"]),
                      *(f"{row[name]:,.0f}" for name in ("images_per_second", "min", "max")), f"{100 * row['mfu']:.1f}" if row["mfu"] else "–",
                      f"{row['peak_memory_bytes'] / 1e9:.1f}" if gpu else "–", f"{row['evaluation']:,.0f}"])
    return markdown(table)


def speed(words):
    """Images per second of the training step, the median of seven repeats, as rank and pictures grow."""
    parser = data.Parser("python evaluate.py speed --device cpu", speed.__doc__, "evaluate.py speed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one")
    parser.add_argument("--out", type=Path, help="JSON file (default: runs/speed-<device>.json)")
    args = parser.parse_args(words)
    check_device(args.device)
    import til                                                               # which imports this file
    til.set_arithmetic()
    rows = [speed_row(*step, args.device) for step in data.progress(STEPS[args.device], len(STEPS[args.device]), "training")]
    out = args.out or Path(f"runs/speed-{args.device}.json")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    data.save_json(out, {"device": device, "threads": torch.get_num_threads(), "versions": VERSIONS, "rows": rows})
    print(speed_table(rows), out, sep="\n")


# ---- command line ------------------------------------------------------------------------------------------------------------

def tables(words):
    """The paper's tables over finished runs."""
    parser = data.Parser("python evaluate.py runs/*   More: bench -h, probe -h, speed -h", tables.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; or `bench`, `probe` or `speed`, other commands")
    parser.add_argument("--paper", action="store_true", help="also the experiments of the paper that are not among them")
    args = parser.parse_args(words)
    print(report(read_runs(args.runs), args.paper))


COMMANDS = {"bench": bench, "probe": probe, "speed": speed}


def main():
    """The command that the first word names, else the tables."""
    words = sys.argv[1:]
    COMMANDS[words[0]](words[1:]) if words and words[0] in COMMANDS else tables(words)


if __name__ == "__main__":
    data.run_command(main)
