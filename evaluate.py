"""Metrics (paper, section 4), the paper's tables over finished runs, and the memories alone.

    python evaluate.py runs/*              # tables: mean and standard deviation over the seeds
    python evaluate.py probe runs/X        # what memories recall as they fill up, and from noisy keys
    python evaluate.py bench               # time, bytes and recall error of memories with T modulations
"""
import ast
import math
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import lora
import vit as substrate
from bayespcn import BayesPCN
from hopfield import Hopfield

# --memory NAME: makes an empty memory for vectors of dim elements. Add a line for a memory of your own.
MEMORIES = {
    "hopfield": lambda dim, **options: Hopfield(**options),
    "bayespcn": BayesPCN,
}


def make_memory(text, dim):
    """An empty memory from NAME[:OPTION=VALUE,..], as --memory takes it. ValueError for what is unknown."""
    name, _, options = text.partition(":")
    if name not in MEMORIES:
        raise ValueError(f"there is no memory '{name}': choose one of {', '.join(MEMORIES)}")
    pairs = dict(option.partition("=")[::2] for option in options.split(",") if option)
    try:
        values = {option: x if x.isalpha() else ast.literal_eval(x) for option, x in pairs.items()}
        return MEMORIES[name](dim, **values)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"--memory {text}: {error}") from error


# ---- metrics -------------------------------------------------------------------------------------

def faa(accuracies):
    """FAA = (1 / T) sum_t A_(T, t) (section 4): every task counts the same."""
    return sum(accuracies) / len(accuracies)


def per_task(hits, task_ids):
    """The share of hits (n,), bool, among the images of each task, in percent; task_ids (n,), from 0."""
    return [100 * hits[task_ids == t].double().mean().item() for t in range(task_ids.max() + 1)]


def recall_error(theta_hat, theta):
    """|theta_hat - theta| / |theta|, both without the key."""
    (_, recalled), (_, value) = lora.split_key(theta_hat), lora.split_key(theta)
    return ((recalled - value).norm() / value.norm()).item()


def write_result(run, setting, hits, task_ids, errors, start, variant="", **more):
    """Writes <setting>-<memory>.json and returns its content: the run's options, and the figures in percent.
    hits: bool (n,) for the test images, with theta as trained (gt), as recalled, with each control, .."""
    tasks = {name: per_task(hit, task_ids) for name, hit in hits.items()}
    means = {name: faa(accuracies) for name, accuracies in tasks.items()}
    gpu = run.args.device != "cpu"
    content = {
        "setting": setting, "memory": run.args.memory, **run.config, "faa_gt": means["gt"],
        "faa": means["recalled"], "drop": means["gt"] - means["recalled"],
        "controls": {name: means[name] for name in CONTROLS},
        "recall_error": {"mean": statistics.mean(errors), "max": max(errors)},
        "per_task": tasks | {"recall_error": errors},
        "wall_seconds": time.perf_counter() - start, **more,
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"}
    data.save(run.folder / f"{setting}-{run.memory_name}{variant}.json", content)
    return content


# ---- tables --------------------------------------------------------------------------------------

CONTROLS = ("linear", "mean", "wrong", "none")
COLUMNS = {
    "til": {"faa_gt": "FAA_GT", "faa": "FAA(M)", "drop": "D(M)", "recall_error": "error"},
    "mts": {"task_accuracy": "Task Acc", "faa_gt": "FAA_GT", "faa_local": "local", "drop": "D(M)",
            "faa_strict": "strict"}}
LEGEND = """
FAA, the final average accuracy over the tasks, in percent: FAA_GT with the modulations as trained, FAA(M)
with those that the memory M recalls. D(M) = FAA_GT - FAA(M), in points. error: |theta_hat - theta| / |theta|
without the key. The last columns are controls: the FAA of a head trained alone on the bare substrate
(linear), and of the task's head with the mean of all modulations, with the wrong one (of the task before),
and with none. For mts, Task Acc: images whose task is predicted right. local: FAA where the label within the
task is right, as the paper counts; strict: where the task is right, too. D(M) = FAA_GT - local, and the
controls are local.
"""
PAPER = {}                                      # Tables 1 and A1: the first columns of COLUMNS
for line in """
    til cifar100      20  hopfield            97.29 ± 0.30 | 97.12 ± 0.44 | 0.0026 ± 0.01
    til cifar100      20  bayespcn            97.29 ± 0.30 | 96.50 ± 0.64 | 0.32 ± 0.12
    til cifar100      20  hopfield --rank 4   | 96.60 ± 0.37 | 0.0 ± 0.05
    til cifar100      20  hopfield --rank 32  | 96.99 ± 0.01 | 0 ± 0.01
    til cifar100      50  hopfield            97.79 ± 0.20 | 97.76 ± 0.47 | 0.04 ± 0.07
    til cifar100      50  bayespcn            97.79 ± 0.20 | 97.24 ± 0.73 | 0.62 ± 0.32
    til cifar100      50  hopfield --rank 4   | 97.70 ± 0.51 | -0.03 ± 0.0
    til cifar100      50  hopfield --rank 32  | 97.62 ± 0.44 | 0.20 ± 0.02
    til tinyimagenet  50  hopfield            91.56 ± 0.48 | 91.82 ± 0.28 | -0.21 ± 0.10
    til tinyimagenet  50  bayespcn            91.56 ± 0.48 | 90.46 ± 0.35 | 1.16 ± 0.57
    til tinyimagenet  50  hopfield --rank 4   | 91.39 ± 0.42 | -0.1 ± 0.24
    til tinyimagenet  50  hopfield --rank 32  | 91.64 ± 0.44 | -0.04 ± 0.34
    til tinyimagenet 100  hopfield            95.09 ± 0.40 | 94.77 ± 0.48 | -0.30 ± 0.19
    til tinyimagenet 100  bayespcn            95.09 ± 0.40 | 93.28 ± 0.35 | 1.71 ± 0.20
    til tinyimagenet 100  hopfield --rank 4   | 94.94 ± 0.59 | 0.09 ± 0.31
    til tinyimagenet 100  hopfield --rank 32  | 95.09 ± 0.47 | 0.13 ± 0.47
    mts cifar100      20  hopfield            91.47 ± 0.21 | 97.29 ± 0.30 | 91.34 ± 0.52 | 5.95 ± 0.022
    mts cifar100      50  hopfield            91.42 ± 0.28 | 97.79 ± 0.20 | 94.28 ± 0.15 | 3.50 ± 3.50
    mts tinyimagenet  50  hopfield            84.42 ± 0.49 | 91.56 ± 0.48 | 83.14 ± 0.16 | 8.35 ± 0.53
    mts tinyimagenet 100  hopfield            83.27 ± 0.18 | 95.09 ± 0.40 | 88.69 ± 0.57 | 6.47 ± 0.73
""".strip().splitlines():
    setting, dataset, splits, name, figures = re.match(r" *(\w+) +(\w+) +(\d+)  (.{18})  (.*)", line).groups()
    PAPER.setdefault((setting, dataset, int(splits)), {})[name.strip()] = figures


def label(result):
    """The name of a row: the memory, then the options that differ from the usual ones."""
    glyphs = result["dataset"] == "glyphs"
    usual = {"backbone": "vit_micro" if glyphs else "vit_ti_16", "rank": 8, "alpha": 8, "epochs": 3,
             "image_size": 32 if glyphs else substrate.CONFIGS[result["backbone"]].image_size,
             "batch_size": 6 if glyphs else 64, "predictor": "tasks"}
    words = [f"--{name.replace('_', '-')} {result[name]}" for name, value in usual.items()
             if result.get(name, value) != value]
    words += ["--plain"] * (result.get("plain", False) and "CPU" not in result["device"])
    return " ".join([result["memory"], *words, *["--validate"] * result["validate"]])


def cell(runs, column):
    """mean ± standard deviation over the seeds."""
    values = [run["controls"][column] if column in CONTROLS else run[column] for run in runs]
    values, digits = ([x["mean"] for x in values], 4) if column == "recall_error" else (values, 2)
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def report(results, paper=False):
    """Markdown: a table for each experiment, a row for each command over its seeds, the paper's below it;
    with `paper`, also the paper's rows for which there is no result."""
    tables = {experiment: {} for experiment in PAPER} if paper else {}
    for result in sorted(results, key=lambda result: (label(result), result["seed"])):
        experiment = tuple(result[name] for name in ("setting", "dataset", "splits"))
        tables.setdefault(experiment, {}).setdefault(label(result), []).append(result)
    lines = []
    for experiment in sorted(tables, key=lambda experiment: (experiment[0] != "til", experiment)):
        (setting, dataset, splits), rows = experiment, tables[experiment]
        theirs, columns = dict(PAPER.get(experiment, {})), [*COLUMNS[setting], *CONTROLS]
        lines += [f"\n`python {setting}.py --dataset {dataset} --splits {splits} --memory M`\n",
                  "| M | seeds | " + " | ".join([*COLUMNS[setting].values(), *CONTROLS]) + " |",
                  "|---" * (2 + len(columns)) + "|"]
        for name, runs in rows.items():
            seeds = " ".join(str(run["seed"]) for run in runs)
            lines.append(f"| `{name}` | {seeds} | " + " | ".join(cell(runs, x) for x in columns) + " |")
            if name in theirs:
                lines.append(f"| paper | 3 seeds | {theirs.pop(name)} |")
        lines += [f"| paper, `{name}` | 3 seeds | {figures} |" for name, figures in theirs.items() if paper]
    return "\n".join(lines) + "\n" + LEGEND


# ---- the memories alone --------------------------------------------------------------------------

def bench(args):
    """Time, size and recall error of memories with T made-up modulations; writes args.out."""
    torch.set_num_threads(1)
    rows = []
    for name, T in ((name, T) for name in args.memory for T in args.tasks):
        # As in a ViT-S: A is drawn as in lora.py, and B is as wide as after training on TinyImageNet.
        A, B = torch.rand(2, T, args.dim, generator=data.generator(T)) * 2 - 1
        thetas = torch.where(torch.arange(args.dim) // (8 * 384) % 2 == 0, A / math.sqrt(384), 0.05 * B)
        pairs, memory = [lora.split_key(theta) for theta in thetas], make_memory(name, args.dim)
        start = time.perf_counter()
        for key, value in data.progress(pairs, f"{name}: writing"):
            memory.write(key, value)
        written = time.perf_counter()
        recalled = [memory.read(key) for key, _ in pairs]
        read = time.perf_counter()
        rows.append({"memory": name, "T": T, "write_ms": 1e3 * (written - start) / T,
                     "read_ms": 1e3 * (read - written) / T, "MB": memory.nbytes / 1e6,
                     "error": statistics.mean(map(recall_error, recalled, thetas))})
        print("{memory:20} T {T:3}  write {write_ms:6.1f} ms  read {read_ms:6.1f} ms  {MB:6.1f} MB  "
              "error {error:.4f}".format(**rows[-1]), flush=True)
    data.save(args.out, {"dim": args.dim, "rows": rows})


def probe(args):
    """Recall error and FAA of a run, as memories fill up and from noisy keys; writes RUN/probe.json."""
    config = data.read(args.run / "config.json")
    vit = substrate.load(config["backbone"], args.weights, config["image_size"]).to(args.device)
    lora.add(vit, config["rank"], config["alpha"])
    train, test = data.load(config["dataset"], args.data_dir)
    test = data.hold_out(train)[1] if config["validate"] else test
    tests = [data.task(test, classes) for classes in config["class_order"]]
    adapters = [data.read(args.run / f"adapters/{t}.pt") for t in range(1, config["splits"] + 1)]
    pairs, rows = [lora.split_key(adapter["theta"]) for adapter in adapters], []

    def measure(name, memory, noise, keys):
        errors, accuracies = [], []
        for key, adapter, (images, labels) in zip(keys, adapters, tests):
            lora.set(vit, memory.read(key))
            errors.append(recall_error(lora.get(vit).cpu(), adapter["theta"]))
            logits = F.linear(substrate.features(vit, images).cpu(), **adapter["head"])
            accuracies.append(100 * (logits.argmax(1) == labels).double().mean().item())
        rows.append({"memory": name, "stored": len(keys), "noise": noise, "error": statistics.mean(errors),
                     "faa": faa(accuracies)})
        print("{memory:20} stored {stored:3}  noise {noise:4}  error {error:.4f}  FAA {faa:.2f}".format(
            **rows[-1]), flush=True)

    for name in args.memory:
        memory, keys = make_memory(name, len(adapters[0]["theta"])), []
        for key, value in pairs:
            memory.write(key, value)
            keys.append(key)
            if len(keys) % math.ceil(len(pairs) / 4) == 0 or len(keys) == len(pairs):
                measure(name, memory, 0, keys)
        for noise in (0.1, 0.3, 1, 3, 10, 30):                  # in multiples of the key's rms
            draws = torch.randn(len(keys), len(keys[0]), generator=data.generator(0))
            noisy = [key + noise * key.square().mean().sqrt() * draw for key, draw in zip(keys, draws)]
            measure(name, memory, noise, noisy)
    data.save(args.run / "probe.json", {"rows": rows})


def main():
    """The command that the first word names: probe, bench, or else the tables."""
    parser, command = data.parser(__doc__), "".join(sys.argv[1:2])
    add = parser.add_argument
    if command not in ("probe", "bench"):
        add("runs", type=Path, nargs="+", help="run folders with results; or `probe`, or `bench`")
        add("--paper", action="store_true", help="also the paper's figures for which there is no result")
        args = parser.parse_args()
        patterns = [(run, setting) for run in args.runs for setting in ("til-*.json", "mts-*.json")]
        files = [path for run, pattern in patterns for path in sorted(run.glob(pattern))]
        return print(report([data.read(path) for path in files], args.paper))
    add("command", choices=[command])
    add("--memory", nargs="+", default=[*MEMORIES], help="as for til.py (default: all)")
    if command == "probe":
        add("run", type=Path, help="folder of a finished run")
        add("--data-dir", type=Path, default="data", help="folder of the data sets (default: %(default)s)")
        add("--weights", type=Path, help="weights file of the backbone (default: shipped or downloaded)")
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU, if any")
        return probe(parser.parse_args())
    add("--tasks", type=int, nargs="+", default=[20, 100], help="T (default: 20 100)")
    add("--dim", type=int, default=147_456, help="P (default: %(default)s)")
    add("--out", type=Path, default="runs/bench.json", help="default: %(default)s")
    return bench(parser.parse_args())


if __name__ == "__main__":
    with data.one_line_errors():
        main()
