"""Metrics (paper, section 4), the memories, the control `linear`, tables, and a benchmark.

    python evaluate.py runs                 # tables: mean and standard deviation over the seeds
    python evaluate.py bench                # time, size and recall error of the memories

From the tables on, you can skip this file at first.
"""
import ast
import glob
import importlib
import inspect
import json
import random
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import lora
import vit


# ---- metrics -----------------------------------------------------------------------------------
def faa(accuracies):
    """Final average accuracy (section 4): the mean of the accuracies on all T tasks."""
    return statistics.fmean(accuracies)


def percent(hits):
    """The share of True in hits (n,), in percent."""
    return 100 * hits.double().mean().item()


def recall_error(theta_hat, theta):
    """|theta_hat - theta| / |theta|, both without their key, which a read need not recall."""
    _, recalled = lora.split_key(theta_hat)
    _, value = lora.split_key(theta)
    return ((recalled - value).norm() / value.norm()).item()


# ---- memories ----------------------------------------------------------------------------------
def make_memory(text, dim):
    """An empty memory from NAME[:OPTION=VALUE,..]: the class NAME in NAME.py.

    "bayespcn:read=joint" is BayesPCN(dim=dim, read="joint") of bayespcn.py, where dim is the length
    of theta. Raises Mistake if there is no such memory or option.
    """
    name, _, options = text.partition(":")
    memory = find_memory(text)
    defaults = {option: parameter.default
                for option, parameter in inspect.signature(memory).parameters.items()
                if option != "dim" and parameter.default is not parameter.empty}
    given = {}
    for pair in filter(None, options.split(",")):
        option, _, value = map(str.strip, pair.partition("="))
        if option not in defaults:
            known = ", ".join(defaults) or "none"
            raise data.Mistake(
                f"--memory {text}: {name} has no option {option}. Its options are: {known}")
        given[option] = parse_option(pair, value, defaults[option])
    # If a memory of yours draws random numbers, it draws the same ones in every run.
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    return memory(dim=dim, **given)


def find_memory(text):
    """The class NAME in the file NAME.py, for the text NAME[:OPTION=VALUE,..].

    Upper and lower case do not matter in the class's name, and underscores do not, either. Raises
    Mistake if there is no such class.
    """
    name, _, _ = text.partition(":")
    if f"{name}.py" in data.SOURCES:
        module = importlib.import_module(name)
        # We look from the end. So if a file imports Hopfield, and then defines a class HopField of
        # its own, its own class is found.
        for word, thing in reversed(vars(module).items()):
            same_name = word.replace("_", "").lower() == name.replace("_", "").lower()
            if same_name and hasattr(thing, "write") and hasattr(thing, "read"):
                return thing
    raise data.Mistake(f"there is no memory {name}: expected a file {name}.py beside til.py, and "
                       f"in it a class {name} with `write` and `read`. (Give the name alone: "
                       "nearest, for the class Nearest in nearest.py)")


def parse_option(pair, text, default):
    """The value of an option, which must have the type of its default."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text                        # a word
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise data.Mistake(f"--memory: {pair} should be like {default}, its default")
    return value


def checked(theta, P):
    """Returns theta (P,). Raises Mistake if what a memory recalled is not P finite numbers."""
    shape = getattr(theta, "shape", None)
    if not torch.is_tensor(theta) or shape != (P,) or not theta.isfinite().all():
        raise data.Mistake(
            f"theta should be a tensor of {P} finite numbers, but it is {str(theta)[:80]}, and its "
            f"shape is {shape}. If a memory has recalled it: its read should return the key, and "
            "then the value")
    return theta


# ---- the control `linear`: what is possible without a modulation? ------------------------------
def linear_heads(net, train, tasks):
    """For each task, a head for the class tokens of the unmodulated ViT.

    It is trained by logistic regression, and shows what the frozen ViT can do already.
    """
    with torch.no_grad():
        net.theta.zero_()
    heads = []
    for classes in data.progress(tasks, "linear heads, task"):
        images, labels = data.task(train, classes)
        tokens = vit.features(net, images).cpu().double()
        weight, bias = logistic_regression(tokens, labels, len(classes))
        head = nn.Linear(tokens.shape[1], len(classes), device=net.theta.device)
        head.load_state_dict({"weight": weight, "bias": bias})
        heads.append(head)
    return heads


def logistic_regression(x, y, n_classes, penalty=0.03):
    """Weights (n_classes, d) and biases (n_classes,) that predict y (n,) from x (n, d).

    They minimise cross-entropy + penalty / 2 |W|^2, where W are the weights for the standardised x,
    so that the penalty treats all features alike. This penalty was chosen on --validate.
    """
    mean = x.mean(0)
    std = x.std(0) + 1e-6
    z = (x - mean) / std
    W = torch.zeros(n_classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    b = torch.zeros(n_classes, dtype=x.dtype, requires_grad=True)
    # The loss is convex, and LBFGS finds its minimum.
    lbfgs = torch.optim.LBFGS([W, b], max_iter=1000, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        loss = F.cross_entropy(z @ W.T + b, y) + penalty / 2 * W.square().sum()
        loss.backward()
        return loss
    lbfgs.step(closure)
    # W z + b is (W / std) x + b - (W / std) mean.
    W = W.detach() / std
    return W, b.detach() - W @ mean


# ---- tables ------------------------------------------------------------------------------------
# The paper's Tables 1 and A1: {command: {name of the row, such as "hopfield": {heading: cell}}}.
PAPER = json.loads((Path(__file__).parent / "results/paper.json").read_text("utf-8"))
# What the columns mean. The headings are the names of the "figures" in the results. (For a new
# column, add an entry to `figures` in til.py or mts.py, and explain it here. `cell` decides how
# many digits are shown.)
LEGEND = {
    "Task Acc": "images whose task is predicted right, in percent, averaged over the tasks",
    "FAA_GT": "accuracy in percent, averaged over the tasks, with the task known and the "
              "modulations as they were trained (ground truth)",
    "FAA(M)": "accuracy with the task known and the modulations that the memory M recalls",
    "local": "accuracy with the predicted task and the modulations that the memory M recalls. The "
             "number of the class within its task must be right. The task need not be right",
    "D(M)": "what recall costs: FAA_GT - FAA(M). In MTS, what recall and wrong tasks cost: FAA_GT "
            "- local",
    "strict": "as local, but the task must be right, too",
    "error": "recall error |theta_hat - theta| / |theta|, without the key",
    "linear": "control: no modulation, and a new head, trained by logistic regression for the ViT "
              "without a modulation",
    "mean": "control: the mean of all modulations, with the head of the task",
    "wrong": "control: the modulation of the task before, with the head of the task",
    "none": "control: no modulation, with the head of the task. (In MTS, all controls get the "
            "predicted task, and count like local.)",
}
ABOUT_HASHES = (
    "A row with a hash in parentheses was made with other code, images, weights or options than "
    "another row of its table, with another PyTorch, or on another kind of device, although their "
    "names may not show it. So do not compare them. The "
    "first half of the hash stands for the training, and the second for the code of the memory, of "
    "evaluate.py, and of til.py or mts.py.")


def tables(results):
    """Markdown: a table for each experiment, and a legend."""
    text = tables_only(results)
    if any(result["digest"] in text for result in results):         # is a hash shown?
        text = f"{text}\n\n{ABOUT_HASHES}"
    return f"{text}\n\n{legend(results)}"


def tables_only(results):
    """Markdown: a table for each experiment."""
    experiments = {}
    for result in results:
        command = "{setting}.py --dataset {dataset} --splits {splits}".format(**result)
        experiments.setdefault(command, []).append(result)
    commands = sorted(experiments, key=lambda command: command.startswith("mts"))   # TIL first
    lines = []
    for command in commands:
        lines += ["", f"`python {command} --memory M`", "", *table(command, experiments[command])]
    return "\n".join(lines)


def table(command, results):
    """The lines of one table. A row is the mean of all results that differ only in the seed."""
    rows = {}                               # {(name of the row, digest): [result of each seed]}
    for result in sorted(results, key=lambda result: result["seed"]):
        rows.setdefault((result["row"], result["digest"]), []).append(result)
    headings = list(dict.fromkeys(heading for result in results for heading in result["figures"]))
    lines = [line("M", "seeds", *headings), "|---" * (2 + len(headings)) + "|"]
    paper = dict(PAPER.get(command, {}))
    # First the rows in which only the memory was chosen, and then those with further options, such
    # as --rank 4. Apart from that, the rows are in the order in which the results were found.
    for name, digest in sorted(rows, key=lambda row: row[0].count(" --")):
        runs = rows[name, digest]
        # The digest is shown if there is another row with the same name, or one with which this row
        # should not be compared.
        shown = f"`{name}`"
        same_name = [row for row in rows if row[0] == name]
        if len(same_name) > 1 or any(clash(runs[0], result) for result in results):
            shown = f"`{name} ({digest})`"
        cells = [cell(heading, runs) for heading in headings]
        lines.append(line(shown, seeds_of(runs), *cells))
        # The paper's figures are printed once, below the first row of this name.
        figures = paper.pop(name, None)
        if figures:
            cells = [figures.get(heading, "") for heading in headings]
            lines.append(line("paper", "3 seeds", *cells))
    return lines


def line(*cells):
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def legend(results):
    """What the columns mean that these results have, as a list in Markdown."""
    headings = {heading for result in results for heading in result["figures"]}
    return "\n".join(f"- {name}: {text}" for name, text in LEGEND.items() if name in headings)


def seeds_of(runs):
    """The seeds of a row, as text. Raises Mistake if there are two results of one seed."""
    seeds = [run["seed"] for run in runs]
    if len({*seeds}) < len(seeds):
        paths = [str(run.get("path")) for run in runs if seeds.count(run["seed"]) > 1]
        raise data.Mistake("there are two results of one seed, so give only one of them: "
                           + " and ".join(paths))
    return " ".join(map(str, seeds))


def clash(a, b):
    """True if two results should not be compared, although the names of their rows do not show it.

    The code of a file differs, or the images, the weights of the ViT, PyTorch, or the device.
    """
    hashes_a = a["code"] | a["content"]
    hashes_b = b["code"] | b["content"]
    return any(hashes_a[name] != hashes_b[name] for name in hashes_a.keys() & hashes_b.keys())


def cell(heading, runs):
    """The mean over the seeds, and the sample standard deviation if there are several."""
    values = [run["figures"].get(heading) for run in runs]
    if None in values:
        return "–"                          # an old result, from before this column existed
    digits = 4 if heading == "error" else 2
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.{digits}f}"
    return text


def find_results(paths):
    """All results in these files, and in the files of these folders and below."""
    files = []
    for path in paths:
        if path.is_dir():
            # `glob` follows links, and passes over hidden files and folders.
            names = glob.glob("**/*.json", root_dir=path, recursive=True)
            files += [path / name for name in sorted(names)]
        elif path.exists():
            files.append(path)
        else:
            raise data.Mistake(
                f"there is no file or folder {path}: name those with results, such as runs")
    results = []
    others = []
    # A file can be found twice: with a folder and one above it, or through a link.
    for file in {file.resolve(): file for file in files}.values():
        found = results_in(file)
        results += found
        if not found:
            others.append(str(file))
    if others:
        print("no results can be read from", ", ".join(others))
    if not results:
        raise data.Mistake("there are no results in " + ", ".join(map(str, paths)))
    return results


def results_in(file):
    """The results in a file. It may hold one, a list of them, or something else."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):           # no JSON, or damaged
        return []
    entries = content if isinstance(content, list) else [content]
    return [entry | {"path": file} for entry in entries
            if isinstance(entry, dict) and {"setting", "row", "figures", "content"} <= entry.keys()]


# ---- a benchmark of the memories, on random numbers --------------------------------------------
def bench(args):
    """Prints the time, the size and the recall error of memories, and writes them to --out."""
    if args.out.suffix != ".json":
        raise data.Mistake("--out should be a file that ends in .json")
    for name in args.memory:
        make_memory(name, args.dim)         # raises Mistake now, and not after other memories
    torch.set_num_threads(1)                # times of different computers compare better
    rows = []
    for name in args.memory:
        for T in args.tasks:
            row = bench_memory(name, T, args.dim)
            rows.append(row)
            print("{memory:20} T {T:3}  write {write_ms:6.1f} ms  read {read_ms:6.1f} ms  "
                  "{MB:6.1f} MB  error {error:.4f}".format(**row), flush=True)
            # After each row, so that these rows are kept if you stop the benchmark.
            data.save(args.out, {"dim": args.dim, "rows": rows})
    print(f"wrote {args.out}")


def bench_memory(name, T, P):
    """How the memory `name` stores T random vectors (P,), and recalls them when all are stored."""
    memory = make_memory(name, P)
    # The elements are about as large as those of a trained modulation of a ViT-S.
    thetas = 0.03 * torch.randn(T, P, generator=data.generator(T))
    pairs = [lora.split_key(theta) for theta in thetas]
    start = time.perf_counter()
    for key, value in data.progress(pairs, "writing"):
        memory.write(key.clone(), value)
    written = time.perf_counter()
    # Copied, because a memory may use one tensor for all its answers.
    recalled = [checked(memory.read(key), P).clone() for key, _ in data.progress(pairs, "reading")]
    read = time.perf_counter()
    return {
        "memory": name, "T": T,
        "write_ms": 1000 * (written - start) / T,
        "read_ms": 1000 * (read - written) / T,
        "MB": memory.nbytes / 1e6,
        "error": statistics.fmean(map(recall_error, recalled, thetas))}


def main():
    """Tables of the results in files and folders; or `bench`."""
    parser = data.parser(__doc__)
    add = parser.add_argument
    positive = data.whole_number(1)
    add("paths", type=Path, nargs="*", help="files with results, and folders; or the word bench")
    add("--memory", nargs="+", default=["hopfield", "bayespcn"],
        help="for bench: memories, as for til.py (default: hopfield bayespcn)")
    add("--tasks", type=positive, nargs="+", default=[20, 100],
        help="for bench: how many modulations to store (default: 20 100)")
    add("--dim", type=data.whole_number(10), default=147_456,
        help="for bench: the length of theta (default: 147456, that of a ViT-S)")
    add("--out", type=Path, default=Path("runs/bench.json"),
        help="for bench: the file to write (default: runs/bench.json)")
    args = parser.parse_args()
    options = [name for name, value in vars(args).items()
               if name != "paths" and value != parser.get_default(name)]
    if args.paths == [Path("bench")]:
        bench(args)
    elif not args.paths or Path("bench") in args.paths or options:
        raise data.Mistake("say `bench` alone, and then its options. Or name files and folders for "
                           "the tables, which have no options")
    else:
        print(tables(find_results(args.paths)))


if __name__ == "__main__":
    with data.one_line_errors():
        main()
