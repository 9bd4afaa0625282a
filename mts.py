"""Multi-task switching (MTS): Algorithms 3 and 4 of the paper (A.1). The task is not known.

    python mts.py                                       # drawn glyphs: trains what til.py has not
    python mts.py --predictor classes                   # our variant, which finds more tasks
    python mts.py --predict picture.png                 # Algorithm 4 on one picture

A task predictor finds out to which task an image belongs. It is another LoRA modulation, theta_0,
with a head of its own. From there on, everything is as in til.py: the modulation of that task is
recalled, and the image is classified with it. theta_0 itself is never written to the memory.
"""
import argparse
import time

import torch

import data
import evaluate
import til

LR = (0.002, 0.0001)                            # at the start, at the end (paper, A.2)


# ---- the two algorithms ------------------------------------------------------------------------
def mts_training(tasks, train, memory, learn, learn_predictor):
    """Algorithm 3, with its line numbers: the task predictor, and what Algorithm 1 returns."""
    predictor = learn_predictor(train, tasks)                               # 3, 4: on all D_t
    keys, modulations = til.til_training(tasks, train, memory, learn)       # 5 to 11: Algorithm 1
    return predictor, keys, modulations                                     # 12


def mts_inference(net, predictor, heads, images, keys, memory):
    """Algorithm 4: the predicted tasks t_hat (n,), and logits (n, classes of a task).

    The paper's algorithm is for one image. Here are n of them: those with the same predicted task
    are classified together, so that its modulation is recalled once.
    """
    t_hat = predict_task(net, predictor, images, len(keys))                 # 3
    theta_hat = {t: memory.read(keys[t].clone()) for t in t_hat.unique().tolist()}      # 5
    logits = classify_each(net, heads, images, t_hat, theta_hat)            # 7
    return t_hat, logits                                                    # 8


def classify_each(net, heads, images, task_ids, thetas):
    """C(x; W, thetas[t]) with heads[t], where t is the task of each image, task_ids (n,)."""
    logits = torch.empty(len(images), heads[0].out_features)
    for t in task_ids.unique().tolist():
        of_task_t = task_ids == t
        logits[of_task_t] = til.classify(net, heads[t], images[of_task_t], thetas[t])
    return logits


# ---- the task predictor ------------------------------------------------------------------------
def predict_task(net, predictor, images, n_tasks):
    """t_hat (n,): the most probable task of each image.

    The paper's predictor has an output for each task. Ours can have an output for each class, in
    the order of the tasks. Then the probability of a task is the sum over its classes.
    """
    theta_0, head_0 = predictor[:2]
    p = til.classify(net, head_0, images, theta_0).softmax(1)   # (n, T) or (n, all classes)
    p = p.unflatten(1, (n_tasks, -1)).sum(2)                    # (n, T)
    return p.argmax(1)


def predictor_targets(train, tasks, predictor):
    """What the predictor should answer for each image (N,), and how many answers there are.

    tasks: the number of the task, as in the paper.
    classes: the number of the class, counted task by task. (Ours: a task is a random set of
        classes, so there is nothing by which it can be recognised but its classes.)
    """
    task_ids, labels = data.task_labels(train, tasks)
    if predictor == "tasks":
        return task_ids, len(tasks)
    return len(tasks[0]) * task_ids + labels, len(train.classes)


def flips_and_crops(n, generator):
    """As til.flips; and of each image, a random square with 35 to 100 % of its area is used.

    With flips alone, ten epochs overfit.
    """
    side = (0.35 + 0.65 * torch.rand(n, 1, generator=generator)).sqrt()
    # The centre may be anywhere where the square lies inside the image.
    centre = (1 - side) * (2 * torch.rand(n, 2, generator=generator) - 1)
    crop = torch.cat([side, centre], dim=1)                     # (n, 3), see ViT.prepare
    return {"crop": crop} | til.flips(n, generator)


def predictor_learner(args, seed, net, path):
    """The function `learn_predictor` of Algorithm 3: (train, tasks) -> theta_0 and its head."""
    recipe = til.Recipe(10, 128, LR, flips_and_crops, args.label_smoothing)     # 10: paper, A.2
    if args.dataset == "glyphs":                # there are few of them
        recipe = recipe._replace(epochs=5, batch_size=16)
    if path.exists():
        print(f"{path.name} found, not trained again")
    else:
        print(f"trains the task predictor, kept as {path.name}", flush=True)

    def learn_predictor(train, tasks):
        targets, n_targets = predictor_targets(train, tasks, args.predictor)
        generator = data.generator(seed, 0)
        return til.find_or_train(path, net, train.images, targets, n_targets, recipe, generator)
    return learn_predictor


# ---- the experiment ----------------------------------------------------------------------------
def experiment(args, seed, train, test):
    """Algorithm 3; then Algorithm 4 and other ways to classify, on all test images: the figures."""
    start = time.perf_counter()
    tasks = data.split(len(train.classes), args.splits, seed)
    net, folder = til.make_network(args, seed, train, test)
    memory = evaluate.make_memory(args.memory, len(net.theta))
    path = predictor_path(args, folder)
    learn = til.learner(args, seed, net, folder, tasks)
    learn_predictor = predictor_learner(args, seed, net, path)
    predictor, keys, modulations = mts_training(tasks, train, memory, learn, learn_predictor)
    heads = [modulation.head for modulation in modulations]
    if args.predict:
        return predict(args, train.classes, tasks, net, predictor, heads, keys, memory)

    # The controls are those of til.py, but with the predicted task. Only `gt` knows the true one.
    images = test.images
    t_hat, recalled = mts_inference(net, predictor, heads, images, keys, memory)
    task_ids, labels = data.task_labels(test, tasks)
    thetas = [modulation.theta for modulation in modulations]
    mean = [torch.stack(thetas).mean(0)] * len(tasks)
    none = [torch.zeros_like(thetas[0])] * len(tasks)
    wrong = thetas[-1:] + thetas[:-1]                           # of the task before
    linear_heads = evaluate.linear_heads(net, train, tasks)
    logits = {
        "gt": classify_each(net, heads, images, task_ids, thetas),
        "local": recalled,
        "linear": classify_each(net, linear_heads, images, t_hat, none),
        "mean": classify_each(net, heads, images, t_hat, mean),
        "wrong": classify_each(net, heads, images, t_hat, wrong),
        "none": classify_each(net, heads, images, t_hat, none)}

    figures, per_task = score(logits, t_hat, task_ids, labels)
    variant = path.stem.removeprefix("predictor")               # "-tasks-", then the digest
    return til.save_result(
        "mts", args, seed, folder, start, [predictor], figures, per_task, variant)


def score(logits, t_hat, task_ids, labels):
    """The figures by their names, and {way: [accuracy of each task]}.

    logits: {way to classify: (n, classes of a task)}; t_hat, task_ids, labels (n,): the predicted
    tasks, the true tasks, and the true classes, as numbers within their task.
    """
    # Say the truth is class 2 of task 7. The predictor says task 3, and head 3 says class 2. That
    # is right for `local`, which only compares the numbers of classes, and wrong for `strict`. The
    # paper seems to count like `local`: in two of its columns, FAA is higher than Task Acc.
    hits = {way: z.argmax(1) == labels for way, z in logits.items()}
    hits["task"] = t_hat == task_ids
    hits["strict"] = hits["local"] & hits["task"]
    tasks = range(task_ids.max() + 1)
    per_task = {way: [evaluate.percent(hit[task_ids == t]) for t in tasks]
                for way, hit in hits.items()}
    faa = {way: evaluate.faa(accuracies) for way, accuracies in per_task.items()}
    figures = {
        "Task Acc": evaluate.percent(hits["task"]), "FAA_GT": faa["gt"], "local": faa["local"],
        "D(M)": faa["gt"] - faa["local"], "strict": faa["strict"], "linear": faa["linear"],
        "mean": faa["mean"], "wrong": faa["wrong"], "none": faa["none"]}
    return figures, per_task


def predictor_path(args, folder):
    """The file of theta_0, named after what it depends on. (Its folder stands for the rest.)"""
    return folder / f"predictor-{args.predictor}-{data.digest(args.label_smoothing, CODE)}.pt"


CODE = data.digest_of_code("mts.py")            # as til.CODE


def predict(args, names, tasks, net, predictor, heads, keys, memory):
    """Algorithm 4 on the picture --predict."""
    image = data.picture(args.predict, args.image_size)
    t_hat, logits = mts_inference(net, predictor, heads, image[None], keys, memory)
    t = t_hat.item()
    print(f"task {t + 1} of {len(tasks)}")
    til.print_classes(logits, [names[c] for c in tasks[t]])


def options(description):
    """A parser with the options of mts.py."""
    parser = til.options(description)
    parser.add_argument("--predictor", choices=("tasks", "classes"), default="tasks",
                        help="what it learns: the tasks, as in the paper, or all classes "
                             "(default: tasks)")
    parser.add_argument("--label-smoothing", type=share, default=0.0,
                        help="of the predictor (default: 0)")
    return parser


def share(text):
    """A type for argparse: numbers in [0, 1)."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return float(text)


if __name__ == "__main__":
    with data.one_line_errors():
        til.main(options(__doc__), experiment)
