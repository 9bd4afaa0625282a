"""Prints the tables of results/README.md, a section for each question.

    python -m results.tables

The results are those in this folder. Those of the section "(with an older version)" are in
third-edition/.
"""
from pathlib import Path

import data
import evaluate

HERE = Path(__file__).parent
THIS_EDITION = ("cifar100-20s.json", "cifar100-50s.json", "tinyimagenet-50s.json",
                "tinyimagenet-100s.json", "glyphs-20s.json")
RANKS = "", "--rank 4", "--rank 32"
BEST = ("--backbone dinov2_vits14 --image-size 224 --rank 32 --predictor classes "
        "--label-smoothing 0.1")


def options(result):
    """The options in the name of the row, without the memory."""
    _, _, words = result["row"].partition(" ")
    return words


def is_til(result):
    return result["setting"] == "til"


def is_mts(result):
    return result["setting"] == "mts"


# (title, what the tables show, files, which of the results)
QUESTIONS = [
    ("What does recall cost?",
     "Look at `D(M)` and `error`. With Hopfield, nothing is lost. BayesPCN with `read=joint`, "
     "which has the same objective as Yoo & Wood's read, loses 0.1 to 0.4 points, and 1.96 on "
     "glyphs. With our own read, it loses almost nothing.",
     THIS_EDITION, lambda r: is_til(r) and not options(r) and "sigma_obs" not in r["memory"]),
    ("Can the task be found?",
     "Look at `Task Acc`. On CIFAR-100 and TinyImageNet, we find the task less often than the "
     "paper does. (With BayesPCN, only seed 0 was measured there.)",
     THIS_EDITION, lambda r: is_mts(r) and not options(r)),
    ("What if the predictor learns the classes?",
     "It finds more tasks than our predictor that learns the tasks, but fewer than the paper "
     "reports.",
     THIS_EDITION,
     lambda r: is_mts(r) and r["row"] in ("hopfield", "hopfield --predictor classes")),
    ("How much does BayesPCN depend on the noise that it assumes?",
     "`sigma_obs` is this noise. Of the values that we tried, the smaller ones gave smaller "
     "errors. With 0.03, the error of `read=joint` is about 0.85. It is then only 0.3 points "
     "better than no modulation on C100-20S, and 3.0 on glyphs. (The default is 0.01. Other values "
     "were only measured with seed 0, except on glyphs, and 0.03 only on C100-20S and glyphs.)",
     THIS_EDITION, lambda r: is_til(r) and not options(r) and "bayespcn" in r["memory"]),
    ("What do smaller images cost?",
     "The smaller the image, the less the frozen ViT alone can do (`linear`), and the more the "
     "modulations help. (Seed 0.)",
     THIS_EDITION, lambda r: is_til(r) and r["seed"] == 0
     and r["row"] in ("hopfield", *(f"hopfield --image-size {n}" for n in (64, 96, 128)))
     and (r["dataset"], r["splits"]) == ("cifar100", 20)),
    ("What about another ViT, and images of 112 pixels?",
     "With this ViT-S/14, a head loses 17 to 34 points without its modulation (`none`, `wrong`). "
     "BayesPCN with `read=joint` loses 3.58 to 4.65 points, more than with the ViT-Ti/16. New "
     "heads (`linear`) are 0.23 to 2.95 points worse.",
     THIS_EDITION, lambda r: is_til(r) and options(r) == "--backbone dinov2_vits14"),
    ("Does the rank of LoRA matter?",
     "Not for what recall costs. (The `error` of BayesPCN falls a little as the rank grows.) With "
     "the ViT-Ti/16, FAA_GT changes by at most 0.2 points from rank 4 to 32. With the ViT-S/14, "
     "it grows by up to 1.0. (Rank 8 is the default: its rows are those without `--rank`. "
     "`read=joint` was not measured.)",
     THIS_EDITION, lambda r: is_til(r) and r["dataset"] != "glyphs" and ":" not in r["memory"]
     and options(r).removeprefix("--backbone dinov2_vits14").strip() in RANKS),
    ("How good can a task predictor be?",
     "This is the best predictor that we found. On TINet-100S, it finds as many tasks as the "
     "paper's, and elsewhere 0.8 to 1.6 points fewer.",
     THIS_EDITION, lambda r: is_mts(r) and options(r) == BEST),
    ("How was this predictor chosen? (with an older version)",
     "All of these were tested on held-out training images, and not on test images.",
     ["third-edition/validate.json"], lambda r: True),
    ("How good are glyphs on held-out images?",
     "We chose the number of training images by these columns: `none` should be about 15 points "
     "below FAA_GT, and `wrong` about 10.",
     ["glyphs-20s.json"], lambda r: r["validate"]),
]


def main():
    """Prints what the columns mean, and all sections."""
    data.parser(__doc__).parse_args()           # there are no options, except --help
    print("## What the columns mean\n")
    print(evaluate.legend(evaluate.find_results([HERE / name for name in THIS_EDITION])))
    for title, what, files, chosen in QUESTIONS:
        results = evaluate.find_results([HERE / name for name in files])
        tables = evaluate.tables_only([result for result in results if chosen(result)])
        print(f"\n## {title}\n\n{what}\n{tables}")


if __name__ == "__main__":
    with data.one_line_errors():
        main()
