"""Metrics (paper, section 4), and the paper's tables over finished runs.

    python evaluate.py runs/*            # our mean +- standard deviation (number of seeds), the paper's figures beside them
"""
import statistics
from pathlib import Path

import data

# Table 1 of the paper: mean and standard deviation over three seeds, in percent.
PAPER = {
    ("cifar100", 20): {"faa_gt": "97.29 ± 0.30", "bayespcn": {"faa": "96.50 ± 0.64", "drop": "0.32 ± 0.12"},
                       "hopfield": {"faa": "97.12 ± 0.44", "drop": "0.0026 ± 0.01"}},
    ("cifar100", 50): {"faa_gt": "97.79 ± 0.20", "bayespcn": {"faa": "97.24 ± 0.73", "drop": "0.62 ± 0.32"},
                       "hopfield": {"faa": "97.76 ± 0.47", "drop": "0.04 ± 0.07"}},
    ("tinyimagenet", 50): {"faa_gt": "91.56 ± 0.48", "bayespcn": {"faa": "90.46 ± 0.35", "drop": "1.16 ± 0.57"},
                           "hopfield": {"faa": "91.82 ± 0.28", "drop": "−0.21 ± 0.10"}},
    ("tinyimagenet", 100): {"faa_gt": "95.09 ± 0.40", "bayespcn": {"faa": "93.28 ± 0.35", "drop": "1.71 ± 0.20"},
                            "hopfield": {"faa": "94.77 ± 0.48", "drop": "−0.30 ± 0.19"}},
}

MEMORIES = ("hopfield", "bayespcn", "bayespcn-joint", "disk")               # the order of the columns
ROWS = {
    "faa_gt": "FAA_GT", "faa": "FAA_TIL(M)", "drop": "D_TIL(M)", "none": "control: no adapter", "wrong": "control: wrong adapter",
    "mean": "control: mean adapter", "linear": "control: linear head", "recall_error": "recall error",
}

DEFINITIONS = """\
FAA          final average accuracy: the mean over tasks of the accuracy on the task's test images, percent
FAA_GT       with the adapters theta_t as trained (from disk); FAA_TIL(M) with those recalled by the memory M
D_TIL(M)     FAA_GT - FAA_TIL(M): what recall costs, in points
controls     the task's head with no adapter, with the previous task's, with the mean of all; and a head trained alone,
             without adapter, on the frozen features
recall error |theta_hat - theta| / |theta| on the part that was not in the key, mean over tasks"""


def accuracy(logits, labels):
    """Share of rows whose largest logit is at the label, in percent. logits (n, classes), labels (n,)."""
    return 100 * (logits.argmax(1).cpu() == labels.cpu()).double().mean().item()


def faa(per_task):
    """FAA = (1/T) sum_t A_{T,t} (section 4): every task weighs the same."""
    return sum(per_task) / len(per_task)


def recall_error(theta_hat, theta, n_key):
    """|theta_hat - theta| / |theta| over the elements after the key's n_key."""
    return ((theta_hat - theta)[n_key:].norm() / theta[n_key:].norm()).item()


def smallest_weight(memory, keys):
    """The smallest softmax weight that a Hopfield memory gives the right item: 1 means exact recall. Else None."""
    if not hasattr(memory, "attention"):
        return None
    return min(memory.attention(key)[t].item() for t, key in enumerate(keys))


# ---- tables ------------------------------------------------------------------------------------------------------------------

def number(values, digits=2):
    """'mean +- standard deviation (n)' of a list of numbers; a single one has no deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread} ({len(values)})"


def paper_number(result, row):
    """The paper's cell for this run's data set, splits, rank and memory, or '-'."""
    paper = PAPER.get((result["dataset"], result["splits"]), {}) if result["rank"] == 8 else {}
    return paper.get(row) or paper.get(result["memory"].split("-")[0], {}).get(row, "–")


def cell(result, row):
    """One figure of a run's JSON."""
    return result["controls"][row] if row in result["controls"] else result[row]["mean"] if row == "recall_error" else result[row]


def provenance(name, runs):
    """One line on where the figures of a memory come from; times and memory are means over the seeds."""
    def mean(key):
        return statistics.mean(run[key] for run in runs)
    seeds = ", ".join(str(run["seed"]) for run in runs)
    return (f"{name}: seed {seeds}; {runs[0]['device']}; training {mean('train_seconds'):.0f} s "
            f"({mean('images_per_second'):,.0f} images/s), run with this memory {mean('wall_seconds'):.0f} s, "
            f"peak memory {mean('peak_memory_bytes') / 1e9:.1f} GB; weights {runs[0]['weights']}")


def report(results):
    """Markdown tables of til-*.json contents: one for each setting, seeds averaged, memories and the paper side by side."""
    groups = {}
    for result in results:
        key = tuple(result[name] for name in ("dataset", "splits", "backbone", "image_size", "rank"))
        groups.setdefault(key, {}).setdefault(result["memory"], []).append(result)
    lines = []
    for (dataset, splits, backbone, size, rank), memories in sorted(groups.items()):
        memories = {name: memories[name] for name in MEMORIES if name in memories}
        lines += [f"{dataset}, {splits} splits, {backbone}, {size} px, rank {rank}", ""]
        lines += ["| | " + " | ".join(f"M = {name} | paper" for name in memories) + " |", "|---" * (1 + 2 * len(memories)) + "|"]
        for row, label in ROWS.items():
            cells = [f"{number([cell(r, row) for r in runs], 4 if row == 'recall_error' else 2)} | {paper_number(runs[0], row)}"
                     for runs in memories.values()]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines += ["", *(provenance(name, runs) for name, runs in memories.items()), ""]
    return "\n".join([*lines, DEFINITIONS])


def read_runs(folders):
    """The contents of all til-*.json in these run folders. Raises ValueError if there is none."""
    results = [data.load_json(path) for folder in dict.fromkeys(map(Path.resolve, folders)) for path in sorted(folder.glob("til-*.json"))]
    if not results:
        raise ValueError("no til-*.json in these folders: run til.py first")
    return results


def main():
    """Prints the tables of finished runs."""
    parser = data.Parser(description="The paper's tables over finished runs.", epilog="example: python evaluate.py runs/*")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    print(report(read_runs(parser.parse_args().runs)))


if __name__ == "__main__":
    data.run_command(main)
