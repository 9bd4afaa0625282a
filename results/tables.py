"""Prints the tables of results/README.md, a section for each question.

    python -m results.tables

The results are those in this folder. Where it says "third edition", they are those of the edition
before, in third-edition/.
"""
from pathlib import Path

import evaluate

HERE = Path(__file__).parent
BEST = "--backbone dinov2_vits14 --image-size 224 --rank 32 --predictor classes --label-smoothing 0.1"


def options(result):
    """The options in the name of the row, without the memory."""
    _, _, words = result["row"].partition(" ")
    return words


def til(result):
    return result["setting"] == "til" and not result["validate"]


def mts(result):
    return result["setting"] == "mts" and not result["validate"]


# (title, what the tables show, results of the third edition?, which results)
QUESTIONS = [
    ("What does recall cost?",
     "Look at `D(M)` and `error`. With Hopfield, nothing is lost. BayesPCN with the paper's read, "
     "`read=joint`, loses a little, and with ours almost nothing.",
     False, lambda r: til(r) and not options(r)),
    ("Can the task be found?",
     "Look at `Task Acc`. A predictor that learns the classes finds more tasks than one that "
     "learns the tasks, as in the paper. Both find fewer than the paper's.",
     False, lambda r: mts(r) and options(r) in ("", "--predictor classes")),
    ("What do smaller images cost?",
     "The modulations help more where the frozen ViT alone, `linear`, does worse.",
     False, lambda r: til(r) and r["memory"] == "hopfield" and r["dataset"] == "cifar100"
     and r["splits"] == 20 and options(r).partition(" ")[0] in ("", "--image-size")),
    ("What if the ViT knows less of the classes? (third edition)",
     "With this ViT-S/14, the modulations matter: compare `none` and `wrong` with `FAA_GT`. Then "
     "BayesPCN with `read=joint` loses more.",
     True, lambda r: til(r) and options(r) == "--backbone dinov2_vits14"),
    ("Does the rank of LoRA matter? (third edition)",
     "Hardly. Rank 8 is the default, so its rows are those without `--rank`.",
     True, lambda r: til(r) and ":" not in r["memory"]),
    ("How good can a task predictor be? (third edition)",
     "This is the best predictor that we found.",
     True, lambda r: mts(r) and options(r) == BEST),
    ("How was this predictor chosen? (third edition)",
     "All of these are tested on held-out training images, and not on test images.",
     True, lambda r: r["validate"]),
]


def main():
    """Prints all sections, and what the columns mean."""
    present = evaluate.find_results(sorted(HERE.glob("*s.json")))
    third = evaluate.find_results(sorted((HERE / "third-edition").glob("*s.json"))
                                  + [HERE / "third-edition/validate.json"])
    print("## What the columns mean\n")
    print(evaluate.legend(present))
    for title, what, old, chosen in QUESTIONS:
        results = [result for result in (third if old else present) if chosen(result)]
        print(f"\n## {title}\n\n{what}\n{evaluate.tables_only(results)}")


if __name__ == "__main__":
    main()
