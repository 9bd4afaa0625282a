"""Multi-task switching (MTS), Algorithms 3 and 4 of the paper (A.1): the task is not known.

A task predictor, LoRA weights theta_0 with a head of their own, finds it out. Then the modulation
of that task is recalled, as in TIL. theta_0 itself is never written to the memory.

    python mts.py                                           # trains what til.py has not
    python mts.py --dataset tinyimagenet --splits 50 --predictor classes
    python mts.py --predict picture.png                     # Algorithm 4 on one picture
"""
import argparse
import time

import torch

import data
import evaluate
import lora
import til

LR = (0.002, 0.0001)                            # of the task predictor (paper, A.2)


# ---- the two algorithms ------------------------------------------------------------------------
def mts_training(run):
    """Algorithm 3: the task predictor (theta_0 and its head), the memory M_T, the task keys K_T."""
    predictor = learn_predictor(run)                            # 3, 4: on all D_t at once
    memory, keys = run.fill_memory()                            # 5 to 11: Algorithm 1
    return predictor, memory, keys                              # 12


def mts_inference(vit, predictor, heads, images, keys, memory):
    """Algorithm 4: the predicted tasks t_hat (n,), from 0, and logits (n, classes of a task).

    images: uint8 (n, 3, h, w); predictor: theta_0 (P,) and its head; heads, keys: one a task. (The
    paper's input is one key, v_t; but as the task is not known, it must be all.)
    """
    t_hat = predict_task(vit, predictor, images, len(keys))     # 3: t_hat = C(x; W, theta_0)
    logits = torch.empty(len(images), heads[0].out_features)
    for t in t_hat.unique().tolist():                           # images of one task together
        of_task_t = t_hat == t
        theta_hat = memory.read(keys[t])                        # 5
        logits[of_task_t] = til.classify(vit, heads[t], images[of_task_t], theta_hat)   # 7
    return t_hat, logits                                        # 8


# ---- the task predictor ------------------------------------------------------------------------
def predict_task(vit, predictor, images, n_tasks):
    """t_hat (n,), from 0.

    The head has an output for each task, or one for each class, task by task. Then p(t | x) is the
    sum of p(c | x) over the classes c of t.
    """
    theta_0, head_0 = predictor
    p = til.classify(vit, head_0, images, theta_0).softmax(1)   # (n, T or all classes)
    p = p.unflatten(1, (n_tasks, -1)).sum(2)                    # (n, T); if T outputs, as before
    return p.argmax(1)


def predictor_targets(run):
    """The predictor's target for each image (n,), from 0, and the number of different targets."""
    task_ids, labels = data.task_labels(run.train, run.tasks)
    if run.args.predictor == "tasks":                           # the paper's
        return task_ids, len(run.tasks)
    # Ours: to tell all classes apart teaches more than to tell the tasks apart, which are random
    # sets of classes. Numbered task by task, as predict_task expects.
    return len(run.tasks[0]) * task_ids + labels, len(run.train.classes)


def train_predictor(run, classifier, targets):
    """Line 4 of Algorithm 3, with flips and crops: with flips alone, ten epochs overfit."""
    args = run.args
    start = time.perf_counter()
    generator = data.generator(run.seed, 0)
    epochs = 10                                                 # paper, A.2
    batch_size = 128
    if args.dataset == "glyphs":                                # ours, for few images
        epochs = 5
        batch_size = 16

    def report(epoch, loss, accuracy):
        seconds = (time.perf_counter() - start) / epoch         # an epoch, on average
        til.print_training("predictor, epoch", epoch, epochs, loss, accuracy, len(targets), seconds)

    classifier.init(generator)
    images = run.train.images.to(args.device)
    lora.fit(classifier, images, targets.to(args.device), epochs, batch_size, LR, generator,
             lora.flips_and_crops, args.label_smoothing, report)
    seconds = time.perf_counter() - start
    return {
        "theta": lora.get(run.vit).cpu(),
        "head": classifier.head.state_dict(),
        "images_per_second": epochs * len(targets) / seconds}


CODE = data.code_digest(predictor_targets, train_predictor)     # as in til.py


def learn_predictor(run):
    """theta_0 (P,) and its head: found in the run's folder, or trained and kept there."""
    targets, n_outputs = predictor_targets(run)
    # Its ViT and adapters are those of run.classifier: `init` begins anew, `classify` sets theta.
    classifier = lora.Classifier(run.vit, n_outputs, run.args.plain)
    path = predictor_path(run)
    if not path.exists():
        data.save(path, train_predictor(run, classifier, targets))
    found = data.read(path)
    # From the file even if it is new, like the modulations.
    classifier.head.load_state_dict(found["head"])
    return found["theta"], classifier.head


def predictor_path(run):
    """Its file, which is named, like the run's folder, after all that the predictor depends on."""
    args = run.args
    # The folder stands for the rest: images, weights, vit.py, lora.py.
    digest = data.digest(args.predictor, args.label_smoothing, LR, CODE)
    return run.folder / f"predictor-{args.predictor}-{digest}.pt"


def share(text):
    """A type for argparse: numbers in [0, 1)."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return float(text)


# ---- evaluation --------------------------------------------------------------------------------
def test(run):
    """Algorithm 3, then 4 on all test images; writes its figures to a JSON file, returns them."""
    start = time.perf_counter()
    predictor, memory, keys = mts_training(run)
    images = run.test.images
    t_hat, logits = mts_inference(run.vit, predictor, run.heads(), images, keys, memory)
    task_ids, labels = data.task_labels(run.test, run.tasks)
    task_hit = t_hat == task_ids
    # If the task is wrong, the number of the class within it can still be right. `local` counts it
    # as right, as the paper seems to do (its FAA can exceed its Task Acc); `strict` does not.
    local = logits.argmax(1) == labels
    hits = {"task": task_hit, "local": local, "strict": local & task_hit}
    ways = til.ways_to_classify(run, memory, keys)
    for name, way in data.progress(ways.items(), "testing"):
        # gt and recalled get the true task: so faa_gt and faa are those of TIL. The controls get
        # the predicted one. The paper's FAA_MTS(M) is faa_local.
        used = task_ids if name in ("gt", "recalled") else t_hat
        hits[name] = til.answers(images, used, way) == labels
    result = evaluate.figures(hits, task_ids, til.recall_errors(run, memory, keys))
    faa_local = evaluate.faa(result["per_task"]["local"])
    path = predictor_path(run)                                  # its name ends in the variant
    return run.save_result("mts", path.stem.removeprefix("predictor"), result | {
        "predictor": run.args.predictor,
        "label_smoothing": run.args.label_smoothing,
        "task_accuracy": evaluate.percent(task_hit),
        "faa_local": faa_local,
        "faa_strict": evaluate.faa(result["per_task"]["strict"]),
        "drop": result["faa_gt"] - faa_local,
        "images_per_second": data.read(path)["images_per_second"],
        "wall_seconds": time.perf_counter() - start})


def predict(run):
    """Algorithm 4 on a picture file."""
    image = data.picture(run.args.predict, run.vit.image_size)[None]
    predictor, memory, keys = mts_training(run)
    t_hat, logits = mts_inference(run.vit, predictor, run.heads(), image, keys, memory)
    t = t_hat.item()
    print(f"task {t + 1} of {len(run.tasks)}")
    til.print_classes(run, t, logits)


if __name__ == "__main__":
    with data.one_line_errors():
        parser = til.options(__doc__)
        parser.add_argument("--predictor", choices=("tasks", "classes"),
                            help="learns the task, as in the paper, or the class (default: tasks)")
        parser.add_argument("--label-smoothing", type=share, help="of the predictor (default: 0)")
        args = parser.parse_args()
        til.main(args, predict if args.predict else test)
