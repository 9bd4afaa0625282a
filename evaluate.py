"""Metrics (paper, section 4), the paper's tables over finished runs, and the memories alone.

    python evaluate.py runs/*              # tables: mean and standard deviation over the seeds
    python evaluate.py probe runs/X        # what memories recall as they fill up, and from noisy keys
    python evaluate.py bench               # time, bytes and recall error of memories with T modulations
"""
import ast
import math
import statistics
import time
from pathlib import Path

import torch

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
NOISE = (0, 0.1, 0.3, 1, 3, 10, 30)             # of keys, in multiples of their root mean square


def make_memory(text, dim):
    """An empty memory from NAME[:OPTION=VALUE,..], as --memory takes it. ValueError for what is unknown."""
    name, _, options = text.partition(":")
    if name not in MEMORIES:
        raise ValueError(f"there is no memory '{name}': choose one of {', '.join(MEMORIES)}")
    pairs = dict(option.partition("=")[::2] for option in options.split(",") if option)
    try:
        values = {option: x if x[:1].islower() and x not in ("true", "false") else ast.literal_eval(x)
                  for option, x in pairs.items()}
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
    path = run.folder / f"{setting}-{run.memory_name}{variant}.json"
    data.save(path, content)
    names = ("gt", "recalled", "linear", "none") if setting == "til" else ("gt", "local", "strict", "task")
    plot(path.with_suffix(".svg"), "Test images of each task", "task", "accuracy in %",
         {name: tasks[name] for name in names}, range(1, len(run.tasks) + 1))
    return content


# ---- tables --------------------------------------------------------------------------------------
CONTROLS = ("linear", "mean", "wrong", "none")
COLUMNS = {
    "til": {"faa_gt": "FAA_GT", "faa": "FAA(M)", "drop": "D(M)", "recall_error": "error"},
    "mts": {"task_accuracy": "Task Acc", "faa_gt": "FAA_GT", "faa_local": "local", "drop": "D(M)",
            "faa_strict": "strict"}}
PAPER = data.read(Path(__file__).parent / "results/paper.json")      # Tables 1 and A1, as our first columns
LEGEND = """
In percent. FAA_GT: final average accuracy over the tasks, with the modulations as trained; FAA(M): as the
memory M recalls them; D(M) = FAA_GT - FAA(M). error: |theta_hat - theta| / |theta| without the key. Controls:
a head trained alone on the bare substrate (linear); the task's head with the mean of all modulations, with
the wrong one (of the task before), with none. Task Acc: images whose task is predicted right; local: FAA if
the label within the task is right (so, it seems, in the paper); strict: if the task is right, too. For mts,
D(M) = FAA_GT - local, controls are local. Default: vit_ti_16, 224 px; DINOv2 112 px; glyphs vit_micro, 32 px.
"""


def label(result):
    """The name of a row: the memory, then the options that differ from the usual ones."""
    glyphs = result["dataset"] == "glyphs"
    usual = {"backbone": "vit_micro" if glyphs else "vit_ti_16", "rank": 8, "alpha": 8, "epochs": 3,
             "image_size": 32 if glyphs else substrate.CONFIGS[result["backbone"]].image_size,
             "batch_size": 6 if glyphs else 64, "predictor": "tasks", "label_smoothing": 0}
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
    """Markdown: a table for each experiment, a row for each command; paper: also those that only it has."""
    tables, order = {command: {} for command in PAPER} if paper else {}, ("dataset", "splits", "seed")
    for result in sorted(results, key=lambda result: (result["setting"] != "til", *map(result.get, order))):
        command = "{setting}.py --dataset {dataset} --splits {splits}".format(**result)
        tables.setdefault(command, {}).setdefault(label(result), []).append(result)
    lines = []
    for command, rows in tables.items():
        columns, theirs = COLUMNS[command[:3]] | dict(zip(CONTROLS, CONTROLS)), dict(PAPER.get(command, {}))
        lines += [f"\n`python {command} --memory M`\n", f"| M | seeds | {' | '.join(columns.values())} |",
                  "|---" * (2 + len(columns)) + "|"]
        for name, runs in sorted(rows.items()):
            seeds = " ".join(str(run["seed"]) for run in runs)
            if len(runs) > len({run["seed"] for run in runs}):
                raise ValueError(f"two results for {command} --memory {name}, seeds {seeds}: show one")
            lines.append(f"| `{name}` | {seeds} | {' | '.join(cell(runs, x) for x in columns)} |")
            if name in theirs:
                lines.append(f"| paper | 3 seeds | {theirs.pop(name)} |")
        lines += [f"| paper, `{name}` | 3 seeds | {figures} |" for name, figures in theirs.items() if paper]
    return "\n".join(lines) + "\n" + LEGEND


def plot(path, title, x_label, y_label, lines, ticks):
    """Draws lines {name: [y, ..]} as SVG. ticks: the names of x = 0, 1, .."""
    values = [y for line in lines.values() for y in line]
    step = 10 ** math.floor(math.log10(max(values) - min(values) or 1))
    low, high = math.floor(min(values) / step), math.floor(max(values) / step) + 1      # in steps

    def place(x, y):                                            # in pixels
        return 70 + 440 * x / max(len(ticks) - 1, 1), 270 - 210 * (y / step - low) / (high - low)
    words = [(70, 22, title), (70, 44, y_label), (220, 318, x_label)]
    words += [(place(i, 0)[0] - 6, 290, ticks[i]) for i in range(0, len(ticks), len(ticks) // 10 or 1)]
    words += [(25, place(0, step * y)[1] + 4, f"{step * y:.6g}") for y in range(low, high + 1)]
    shapes = [f'<text x="{x:.0f}" y="{y:.0f}">{text}</text>' for x, y, text in words]
    shapes += [f'<path d="M70 {place(0, step * y)[1]:.0f}H510" stroke="#ccc"/>' for y in range(low, high + 1)]
    for i, (name, line) in enumerate(lines.items()):
        colour = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#000000")[i % 6]
        points = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in enumerate(line))
        shapes += [f'<polyline points="{points}" stroke="{colour}" stroke-width="{4 - i % 4}" fill="none"/>',
                   f'<text x="520" y="{60 + 20 * i}" fill="{colour}">{name}</text>']
    path.write_text('<svg xmlns="http://www.w3.org/2000/svg" width="740" height="330" font-size="13" '
                    'font-family="sans-serif">\n<rect width="100%" height="100%" fill="white"/>\n'
                    + "\n".join(shapes) + "\n</svg>\n", "utf-8")


# ---- the memories alone --------------------------------------------------------------------------
def bench(args):
    """Time, size, recall error, last descents of memories with T made-up modulations: OUT.json, OUT.svg."""
    torch.set_num_threads(1)
    rows, energies = [], {}
    for name, T in ((name, T) for name in args.memory for T in args.tasks):
        # As in a ViT-S: A is drawn as in lora.py, and B is as wide as after training on TinyImageNet.
        A, B = torch.rand(2, T, args.dim, generator=data.generator(T)) * 2 - 1
        thetas = torch.where(torch.arange(args.dim) // (8 * 384) % 2 == 0, A / math.sqrt(384), 0.05 * B)
        pairs, memory = [lora.split_key(theta) for theta in thetas], make_memory(name, args.dim)
        start = time.perf_counter()
        for key, value in data.progress(pairs, f"{name}: writing"):
            memory.write(key, value)
        written, energies[f"{name}: write"] = time.perf_counter(), getattr(memory, "trace", None)
        recalled = [memory.read(key) for key, _ in pairs]
        read, energies[f"{name}: read"] = time.perf_counter(), getattr(memory, "trace", None)
        rows.append({"memory": name, "T": T, "write_ms": 1e3 * (written - start) / T,
                     "read_ms": 1e3 * (read - written) / T, "MB": memory.nbytes / 1e6,
                     "error": statistics.mean(map(recall_error, recalled, thetas))})
        print("{memory:20} T {T:3}  write {write_ms:6.1f} ms  read {read_ms:6.1f} ms  {MB:6.1f} MB  "
              "error {error:.4f}".format(**rows[-1]), flush=True)
    data.save(args.out, {"dim": args.dim, "rows": rows})
    lines = {k: (E[:, 0] - E.min() + 0.01).log10().tolist() for k, E in energies.items() if E is not None}
    if lines:
        plot(args.out.with_suffix(".svg"), "The last descents of BayesPCN", "step", "log10(E - min E + 0.01)",
             lines, range(max(map(len, lines.values()))))


def probe(args, run):
    """Recall error and FAA of a run, as memories fill up, then with noisy keys: RUN/probe.json, RUN/*.svg."""
    config, rows = data.read(run / "config.json"), []
    vit = substrate.load(config["backbone"], args.weights, config["image_size"])
    made_with = vit.digest, data.digest(substrate), data.digest(lora)
    if made_with != tuple(config.get(x) for x in ("weights", "code of vit.py", "code of lora.py")):
        raise ValueError(f"{run} was made with other weights (see --weights), vit.py or lora.py")
    vit.to(args.device, torch.float32 if config["plain"] else torch.bfloat16)
    lora.add(vit, config["rank"], config["alpha"])
    train, test = data.load(config["dataset"], args.data_dir)
    test = data.hold_out(train)[1] if config["validate"] else test
    tests = [data.task(test, classes) for classes in config["class_order"]]
    adapters = [data.read(run / f"adapters/{t}.pt") for t in range(1, config["splits"] + 1)]
    pairs, quarter = [lora.split_key(adapter["theta"]) for adapter in adapters], math.ceil(len(tests) / 4)
    head = substrate.Head(vit.config.width, len(config["class_order"][0]), device=args.device)

    def measure(name, memory, noise, keys):
        errors, accuracies = [], []
        draws = torch.randn(len(keys), len(keys[0]), generator=data.generator(0))
        for key, draw, adapter, (images, labels) in zip(keys, draws, adapters, tests):
            lora.set(vit, memory.read(key + noise * key.square().mean().sqrt() * draw))
            errors.append(recall_error(lora.get(vit).cpu(), adapter["theta"]))
            head.load_state_dict(adapter["head"])
            logits = head(substrate.features(vit, images))
            accuracies.append(100 * (logits.argmax(1).cpu() == labels).double().mean().item())
        rows.append({"memory": name, "stored": len(keys), "noise": noise, "error": statistics.mean(errors),
                     "faa": faa(accuracies)})
        print("{memory:20} T {stored:3}  noise {noise:4}  error {error:.4f} FAA {faa:.2f}".format(**rows[-1]))

    for name in args.memory:
        memory = make_memory(name, len(adapters[0]["theta"]))
        for n, pair in enumerate(pairs, 1):
            memory.write(*pair)
            if n == len(pairs) or n % quarter == 0:
                for noise in NOISE if n == len(pairs) else [0]:
                    measure(name, memory, noise, [key for key, _ in pairs[:n]])
    data.save(run / "probe.json", {"rows": rows})
    for figure, y_label in (("error", "recall error"), ("faa", "FAA in %")):
        full = {m: [row[figure] for row in rows if row["memory"] == m][-len(NOISE):] for m in args.memory}
        plot(run / f"probe-{figure}.svg", "Noisy keys", "noise / rms of a key", y_label, full, NOISE)


def main():
    """`probe RUN`, `bench`, or else the tables of runs."""
    parser = data.parser(__doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="run folders with results; or: probe RUN; or: bench")
    add("--paper", action="store_true", help="tables: also the paper's figures that we have no result for")
    add("--memory", nargs="+", default=[*MEMORIES], help="probe, bench: as for til.py (default: all)")
    add("--data-dir", type=Path, default="data", help="probe: folder of the data sets (default: %(default)s)")
    add("--weights", type=Path, help="probe: weights file of the backbone (default: shipped or downloaded)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="for probe; default: a GPU")
    add("--tasks", type=int, nargs="+", default=[20, 100], help="bench: T (default: 20 100)")
    add("--dim", type=int, default=147_456, help="bench: P (default: %(default)s)")
    add("--out", type=Path, default="runs/bench.json", help="bench (default: %(default)s)")
    args = parser.parse_args()
    if args.runs == [Path("bench")]:
        return bench(args)
    if args.runs[:-1] == [Path("probe")]:
        return probe(args, args.runs[1])
    files = [path for run in args.runs for path in sorted([*run.glob("til-*.json"), *run.glob("mts-*.json")])]
    if not files:
        raise ValueError(f"there are no results in {', '.join(map(str, args.runs))}")
    print(report([data.read(path) for path in files], args.paper))


if __name__ == "__main__":
    with data.one_line_errors():
        main()
