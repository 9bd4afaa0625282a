"""Metrics (paper, section 4), the paper's tables over finished runs, and the memories alone.

    python evaluate.py runs/*              # tables: mean and standard deviation over the seeds
    python evaluate.py bench               # time, bytes and recall error of memories
"""
import ast
import importlib
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import lora
import vit as substrate

# What each shows is in LEGEND; how each classifies, in til.ways_to_classify.
CONTROLS = ("linear", "mean", "wrong", "none")


# ---- memories ----------------------------------------------------------------------------------
def make_memory(text, dim):
    """An empty memory from NAME[:OPTION=VALUE,..]: the class NAME, in any letter case, of NAME.py.

    dim: the length of theta. ValueError for a name, an option or a value that does not fit.
    """
    name, _, options = text.partition(":")
    # There is no list of memories to keep: a file beside this one is enough.
    if not Path(__file__).with_name(f"{name}.py").exists():
        raise ValueError(f"there is no memory '{name}': no file {name}.py")
    module = importlib.import_module(name)
    things = {word.lower(): thing for word, thing in vars(module).items()}
    memory = things.get(name.lower())
    if not hasattr(memory, "write"):
        raise ValueError(f"there is no memory '{name}': {name}.py has no class {name} with `write`")
    try:
        return memory(dim, **parse_options(options))
    except (TypeError, ValueError) as error:
        # An option that it does not have, or a value out of range.
        raise ValueError(f"--memory {text}: {error}") from error


def parse_options(text):
    """For "beta=25,read=joint": {"beta": 25, "read": "joint"}."""
    options = {}
    for pair in filter(None, text.split(",")):
        name, _, value = pair.partition("=")
        if not value:
            raise ValueError(f"'{pair}' is not OPTION=VALUE")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value           # a word, which is no value in Python
    return options


# ---- metrics -----------------------------------------------------------------------------------
def faa(accuracies):
    """FAA = (1 / T) sum_t A_(T, t) (section 4): every task counts the same."""
    return statistics.fmean(accuracies)


def percent(hits):
    """The share of True in hits (n,), in percent."""
    return 100 * hits.double().mean().item()


def per_task(hits, task_ids):
    """A_(T, t) for each t, in percent: hits (n,) among the images of task_ids (n,), from 0."""
    return [percent(hits[task_ids == t]) for t in range(task_ids.max() + 1)]


def recall_error(theta_hat, theta):
    """|theta_hat - theta| / |theta|, both without the key."""
    # With it, the error would look smaller: a read returns the key as it came.
    _, recalled = lora.split_key(theta_hat)
    _, value = lora.split_key(theta)
    return ((recalled - value).norm() / value.norm()).item()


def figures(hits, task_ids, errors):
    """The figures that til.py and mts.py have in common; accuracies in percent.

    hits: {way: bool (n,)}, which test images were classified right with theta as trained (gt), as
    recalled, with each control, and in other ways of mts.py; errors: of recall, one for each task.
    """
    accuracies = {way: per_task(hit, task_ids) for way, hit in hits.items()}
    return {
        "faa_gt": faa(accuracies["gt"]),
        "faa": faa(accuracies["recalled"]),
        "controls": {control: faa(accuracies[control]) for control in CONTROLS},
        "recall_error": {"mean": statistics.fmean(errors), "max": max(errors)},
        "per_task": accuracies | {"recall_error": errors}}


def logistic_regression(x, y, n_classes, penalty=0.03):
    """Weights (n_classes, d) and bias (n_classes,) that predict y (n,) from x (n, d), converged.

    They minimise the mean cross-entropy + penalty / 2 |W|^2 on x, standardised. The penalty was
    chosen on images that --validate holds out.
    """
    # Standardised, so that the penalty treats all features alike, and few steps are needed.
    mean = x.mean(0)
    std = x.std(0) + 1e-6
    z = (x - mean) / std
    W = torch.zeros(n_classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    b = torch.zeros(n_classes, dtype=x.dtype, requires_grad=True)
    # The loss is convex, and LBFGS finds its minimum. A rate and a number of epochs would have to
    # be chosen, and the choice could favour the modulations.
    lbfgs = torch.optim.LBFGS([W, b], max_iter=1000, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        loss = F.cross_entropy(z @ W.T + b, y) + penalty / 2 * W.square().sum()
        loss.backward()
        return loss
    lbfgs.step(closure)
    # W z + b = (W / std) x + b - (W / std) mean: a head for features as they are.
    W = W.detach() / std
    return W, b.detach() - W @ mean


# ---- tables ------------------------------------------------------------------------------------
# The paper's Tables 1 and A1: {command: {row: cells}}.
PAPER = data.read(Path(__file__).parent / "results/paper.json")
# The key of a figure in the JSON files, and its heading in a table.
COLUMNS = {
    "til": {"faa_gt": "FAA_GT", "faa": "FAA(M)", "drop": "D(M)", "recall_error": "error"},
    "mts": {"task_accuracy": "Task Acc", "faa_gt": "FAA_GT", "faa_local": "local",
            "drop": "D(M)", "faa_strict": "strict"}}
LEGEND = {
    "til": """\
Accuracies are in percent. FAA_GT: final average accuracy over the tasks, with the modulations as
trained; FAA(M): as the memory M recalls them; D(M) = FAA_GT - FAA(M). error: |theta_hat - theta| /
|theta|, without the key.
""",
    "mts": """\
Accuracies are in percent. Task Acc: images whose task is predicted right. FAA_GT: final average
accuracy over the tasks, with the task known and the modulations as trained. local: with the task
predicted and its modulation as the memory M recalls it, where a label counts as right if it is
right within the task (so, it seems, in the paper); strict: only if the task is right, too. D(M) =
FAA_GT - local. The controls are local.
""",
    "both": """\
Controls: logistic regression on the bare substrate (linear); the task's head with the mean of all
modulations, with the wrong one (of the task before), with none. A row names the options that are
not usual. Usual are vit_ti_16, 224 px (DINOv2: 112 px), and for glyphs vit_micro, 32 px.
"""}


def usual(dataset, backbone=None):
    """The default options of til.py and mts.py, which the name of a row leaves out."""
    default = "vit_micro" if dataset == "glyphs" else "vit_ti_16"
    backbone = backbone or default
    # On glyphs, half of vit_micro's 64 pixels are enough, and quicker.
    half = dataset == "glyphs" and backbone == "vit_micro"
    return {
        "backbone": default,                    # not the one given: `label` compares the two
        "rank": 8,                              # paper, A.2
        "alpha": 8,                             # ours
        "epochs": 3,                            # A.2
        "image_size": 32 if half else substrate.CONFIGS[backbone].image_size,
        "batch_size": 6 if dataset == "glyphs" else 64,             # ours
        "predictor": "tasks",                   # Algorithm 3
        "label_smoothing": 0.0}


def label(result):
    """The name of a row: the memory, then the options that differ from the usual ones.

    Typed after `--memory`, it is the command that gave the row, but for data, weights and seeds.
    """
    parts = [result["memory"]]
    for name, value in usual(result["dataset"], result["backbone"]).items():
        if result.get(name, value) != value:
            option = name.replace("_", "-")
            parts += [f"--{option}", str(result[name])]
    # On a CPU, --plain is always on.
    if result["plain"] and "CPU" not in result["device"]:
        parts.append("--plain")
    if result["validate"]:
        parts.append("--validate")
    return " ".join(parts)


def report(results):
    """Markdown: a table for each experiment, and a legend."""
    experiments = {}
    # TIL before MTS, otherwise as they came.
    results = sorted(results, key=lambda result: result["setting"] == "mts")
    for result in results:
        command = "{setting}.py --dataset {dataset} --splits {splits}".format(**result)
        experiments.setdefault(command, []).append(result)
    tables = [table(command, runs) for command, runs in experiments.items()]
    settings = dict.fromkeys(result["setting"] for result in results)
    legends = [LEGEND[setting] for setting in (*settings, "both")]
    return "\n".join([*tables, "", *legends])


def table(command, results):
    """The table of one experiment: a row for all runs that differ in the seed alone."""
    rows = {}                               # {(name, digest): {seed: result}}
    for result in sorted(results, key=lambda result: result["seed"]):
        # The digest tells apart what other data, other weights or other code gave: to average those
        # as if they were seeds would be wrong.
        row = rows.setdefault((label(result), result["digest"]), {})
        row[result["seed"]] = result
    names = [name for name, _ in rows]
    columns = COLUMNS[results[0]["setting"]] | dict(zip(CONTROLS, CONTROLS))
    paper = dict(PAPER.get(command, {}))
    lines = [f"\n`python {command} --memory M`\n",
             f"| M | seeds | {' | '.join(columns.values())} |",
             "|---" * (2 + len(columns)) + "|"]
    for (name, digest), runs in sorted(rows.items()):               # runs: {seed: result}
        # A digest says nothing to a reader: it is shown only where two rows have one name.
        shown = f"{name} ({digest})" if names.count(name) > 1 else name
        seeds = " ".join(map(str, runs))
        cells = " | ".join(cell(runs.values(), column) for column in columns)
        lines.append(f"| `{shown}` | {seeds} | {cells} |")
        # The paper's figures once, below the first row of the same name.
        if name in paper:
            lines.append(f"| paper | 3 seeds | {paper.pop(name)} |")
    return "\n".join(lines)


def cell(runs, column):
    """mean ± standard deviation over the seeds."""
    values = []
    for run in runs:
        flat = run | run["controls"] | {"recall_error": run["recall_error"]["mean"]}
        # A control may be newer than the result.
        values.append(flat.get(column, float("nan")))
    # Accuracies are given as in the paper. An error may be small.
    digits = 4 if column == "recall_error" else 2
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


# ---- pictures ----------------------------------------------------------------------------------
# Told apart by the colour-blind, too (Okabe & Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#000000")
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="-70 -50 740 330" font-size="20"
  font-family="sans-serif">
<rect x="-70" y="-50" width="740" height="330" fill="white"/>
<rect width="440" height="210" fill="none" stroke="#ccc"/>
{}
</svg>
"""


def plot(path, x_axis, y_axis, lines, ticks):
    """Draws lines {name: [y, ..]} as SVG, in a frame of 440 x 210. ticks: names of x = 0, 1, .."""
    # SVG is text, so that no library is needed.
    values = sum(lines.values(), [])
    low = min(values)
    high = max(values)
    x_step = 440 / max(len(ticks) - 1, 1)
    y_step = 210 / (high - low or 1)
    svg = [
        words(0, -20, y_axis), words(0, 265, x_axis),
        words(-60, 5, f"{high:.4g}"), words(-60, 210, f"{low:.4g}")]
    every = len(ticks) // 10 or 1               # all names would overlap
    svg += [words(i * x_step, 235, ticks[i]) for i in range(0, len(ticks), every)]
    for i, (name, line) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = [f"{x * x_step:.1f},{(high - y) * y_step:.1f}" for x, y in enumerate(line)]
        # The first are wider, so that they can be seen behind later ones that are equal.
        svg.append(f'<polyline points="{" ".join(points)}" stroke="{colour}" fill="none"'
                   f' stroke-width="{2 * (len(lines) - i)}"/>')
        svg.append(words(450, 25 * i + 5, name, colour))
    path.write_text(SVG.format("\n".join(svg)), "utf-8")


def words(x, y, text, colour="black"):
    """A piece of SVG."""
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{colour}">{text}</text>'


# ---- the memories alone ------------------------------------------------------------------------
def bench(args):
    """Writes to --out the time, the size and the recall error with T made-up modulations."""
    torch.set_num_threads(1)                    # times of different machines compare better
    rows = []
    for name in args.memory:
        for T in args.tasks:
            # With the standard deviation of a trained modulation of a ViT-S, about.
            thetas = 0.03 * torch.randn(T, args.dim, generator=data.generator(T))
            row = {"memory": name, "T": T} | bench_memory(make_memory(name, args.dim), thetas)
            rows.append(row)
            print("{memory:20} T {T:3}  write {write_ms:6.1f} ms  read {read_ms:6.1f} ms  "
                  "{MB:6.1f} MB  error {error:.4f}".format(**row))
    data.save(args.out, {"dim": args.dim, "rows": rows})


def bench_memory(memory, thetas):
    """The figures of an empty memory that stores thetas (T, P), then recalls them."""
    T = len(thetas)
    pairs = [lora.split_key(theta) for theta in thetas]
    # All are written before the first is read: so the memory has to tell T of them apart.
    start = time.perf_counter()
    for key, value in data.progress(pairs, "writing"):
        memory.write(key, value)
    written = time.perf_counter()
    recalled = [memory.read(key) for key, _ in pairs]
    read = time.perf_counter()
    return {
        "write_ms": 1000 * (written - start) / T,
        "read_ms": 1000 * (read - written) / T,
        "MB": memory.nbytes / 1e6,
        "error": statistics.mean(map(recall_error, recalled, thetas))}


def main():
    """`bench`, or else the tables of runs."""
    parser = data.parser(__doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", help="folders with results in them or below; or: bench")
    add("--memory", nargs="+", default=["hopfield", "bayespcn"],
        help="bench: as for til.py (default: both)")
    add("--tasks", type=data.positive, nargs="+", default=[20, 100],
        help="bench: T (default: 20 100)")
    add("--dim", type=data.positive, default=147_456, help="bench: P (default: %(default)s)")
    add("--out", type=Path, default="runs/bench.json", help="bench (default: %(default)s)")
    args = parser.parse_args()
    if args.runs == [Path("bench")]:
        return bench(args)
    # A set: a folder and one above it may both be given.
    names = ("til-*.json", "mts-*.json")
    files = {path for run in args.runs for name in names for path in run.rglob(name)}
    if not files:
        raise ValueError(f"there are no results in {', '.join(map(str, args.runs))}")
    print(report([data.read(path) for path in sorted(files)]))


if __name__ == "__main__":
    with data.one_line_errors():
        main()
