"""Multi-task switching (MTS): Algorithms 3 and 4 of the paper (A.1). The task is not known.

    python mts.py                                       # trains what til.py has not trained yet
    python mts.py --predictor classes                   # our variant finds the task more often
    python mts.py --predict results/glyphs-sample.png   # Algorithm 4 on one picture

A task predictor finds out to which task an image belongs. It is another LoRA modulation, theta_0,
with a head of its own. After that, everything is as in til.py: the modulation of the task is
recalled, and the image is classified with it. theta_0 itself is never written to the memory.
"""
from pathlib import Path

import torch

import data
import evaluate
import til

LR = (0.002, 0.0001)                            # at the start, at the end (paper, A.2)
CODE_HASH = data.digest_of_code(Path(__file__).name)    # of this file: see `experiment`


# ---- the two algorithms ------------------------------------------------------------------------
# The numbers in the comments are the lines of the paper's listings.
def mts_training(tasks, train, memory, learn, learn_predictor):
    """Algorithm 3: returns the task predictor, and what Algorithm 1 returns."""
    predictor = learn_predictor(train, tasks)                               # 3, 4: on all D_t
    keys, modulations = til.til_training(tasks, train, memory, learn)       # 5 to 11: Algorithm 1
    return predictor, keys, modulations                                     # 12


def mts_inference(net, predictor, heads, images, keys, memory):
    """Algorithm 4: the predicted tasks t_hat (n,), and logits (n, classes of a task).

    The paper's algorithm is for one image, and this function is for n images. Those with the same
    predicted task go through Algorithm 2 together.
    """
    t_hat = predict_task(net, predictor, images, len(keys))     # 3

    def infer(t, images_of_t):                                  # 5, 7: Algorithm 2
        return til.til_inference(net, heads[t], images_of_t, keys[t], memory)
    return t_hat, by_task(infer, t_hat, images)                 # 8


def by_task(infer, task_ids, images, label="testing task"):
    """Logits (n, classes of a task), in the order of the images.

    It calls infer(t, images_of_t) once for each task t in task_ids, with the images of this task.
    """
    logits = [None] * len(images)
    for t in data.progress(task_ids.unique().tolist(), label):
        places = (task_ids == t).nonzero().flatten()
        for place, z in zip(places.tolist(), infer(t, images[places])):
            logits[place] = z
    return torch.stack(logits)


def classify_each(net, heads, images, task_ids, thetas):
    """Logits (n, classes of a task): image i is classified with theta and head of task_ids[i]."""
    def infer(t, images_of_t):
        return til.classify(net, heads[t], images_of_t, thetas[t])
    return by_task(infer, task_ids, images, "to compare: testing task")


# ---- the task predictor ------------------------------------------------------------------------
def predict_task(net, predictor, images, n_tasks):
    """t_hat (n,): the most probable task of each image. predictor is a Modulation.

    The paper's predictor has an output for each task. With --predictor classes, it has an output
    for each class, in the order of the tasks. Then the probability of a task is the sum over its
    classes. (If there is an output for each task, the sum has only one term.)
    """
    theta_0, head_0 = predictor
    # A thousand images at a time, so that the progress can be shown.
    logits = [til.classify(net, head_0, some, theta_0)
              for some in data.progress(images.split(1000), "predicting tasks, part")]
    p = torch.cat(logits).softmax(1)                            # (n, T) or (n, all classes)
    p = p.unflatten(1, (n_tasks, -1)).sum(2)                    # (n, T)
    return p.argmax(1)


def predictor_targets(train, tasks, kind):
    """What the predictor should answer for each image (N,), and its number of outputs.

    kind "tasks": the number of the task, as in the paper.
    kind "classes": the number of the class, counted task by task. A task is a random set of
        classes, and an image shows its task only by its class. So this predictor learns classes.
    """
    task_ids, labels = data.task_labels(train, tasks)
    if kind == "tasks":
        return task_ids, len(tasks)
    classes_of_a_task = len(tasks[0])
    return classes_of_a_task * task_ids + labels, len(train.classes)


def flips_and_crops(n, generator):
    """Changes for n images: those of til.flips, and a random square is cut out of each image.

    The square has 35 to 100 % of the image's area. With flips alone, the predictor would see only
    the same two pictures of an image in all epochs.
    """
    area = 0.35 + 0.65 * torch.rand(n, 1, generator=generator)
    side = area.sqrt()
    # The image spans [-1, 1]. The square reaches from its centre by `side` in each direction. So it
    # lies inside if no coordinate of its centre is further than 1 - side from 0.
    centre = (1 - side) * (2 * torch.rand(n, 2, generator=generator) - 1)
    crop = torch.cat([side, centre], dim=1)                     # (n, 3), see ViT.prepare
    return {"crop": crop} | til.flips(n, generator)


def make_learn_predictor(args, seed, net, path):
    """Makes the function `learn_predictor` of Algorithm 3: (train, tasks) -> Modulation."""
    epochs = 10                                 # paper, A.2
    batch_size = 128
    if args.dataset == "glyphs":
        epochs = 5
        batch_size = 16                         # there are only 2,200 images
    recipe = til.Recipe(epochs, batch_size, LR, flips_and_crops, args.label_smoothing)
    if path.exists():
        print(f"{path.name} found, not trained again", flush=True)
    else:
        print(f"trains the task predictor, kept as {path.name}", flush=True)
        if args.device == "cpu" and args.backbone != "vit_micro":
            print("without a GPU, this can take hours: see README.md", flush=True)

    def learn_predictor(train, tasks):
        targets, n_targets = predictor_targets(train, tasks, args.predictor)
        generator = data.generator(seed, 0)
        return til.find_or_train(path, net, train.images, targets, n_targets, recipe, generator)
    return learn_predictor


# ---- the experiment ----------------------------------------------------------------------------
def experiment(args, seed, train, test):
    """Runs Algorithm 3, and then Algorithm 4 and the controls on all test images.

    Returns a dictionary, whose "figures" are the numbers of a row in the table.
    """
    tasks = data.split(len(train.classes), args.splits, seed)
    net = til.make_network(args)                # also puts hashes of W into args, for folder_of_run
    folder = til.folder_of_run(args, seed, train, test)
    memory = evaluate.make_memory(args.memory, len(net.theta))
    # The hash is of what matters for theta_0 alone. (What matters for all thetas is in the name of
    # the folder.)
    variant = f"-{args.predictor}-{data.digest(args.label_smoothing, CODE_HASH)}"
    learn_predictor = make_learn_predictor(args, seed, net, folder / f"predictor{variant}.pt")
    learn = til.make_learn(args, seed, net, folder, tasks)
    predictor, keys, modulations = mts_training(tasks, train, memory, learn, learn_predictor)
    heads = [head for _, head in modulations]
    if args.predict:
        return predict(args, train, tasks, net, predictor, heads, keys, memory)

    # Only `gt` knows the true task. The controls have the same names as in til.py, but here, they
    # use the head of the predicted task (and `wrong`, the theta of the task before the predicted
    # one). So compare them with `local`.
    images = test.images
    t_hat, local = mts_inference(net, predictor, heads, images, keys, memory)
    task_ids, labels = data.task_labels(test, tasks)
    thetas = [theta for theta, _ in modulations]
    mean = [torch.stack(thetas).mean(0)] * len(tasks)
    none = [torch.zeros_like(thetas[0])] * len(tasks)
    wrong = thetas[-1:] + thetas[:-1]                           # wrong[t] is thetas[t - 1]
    linear_heads = evaluate.linear_heads(net, train, tasks)
    logits = {
        "gt": classify_each(net, heads, images, task_ids, thetas),
        "local": local,                                         # see `score`
        "linear": classify_each(net, linear_heads, images, t_hat, none),
        "mean": classify_each(net, heads, images, t_hat, mean),
        "wrong": classify_each(net, heads, images, t_hat, wrong),
        "none": classify_each(net, heads, images, t_hat, none)}
    figures, per_task = score(logits, t_hat, task_ids, labels)
    return til.save_result("mts", args, seed, folder, figures, per_task, variant)


def score(logits, t_hat, task_ids, labels):
    """Returns the figures, and {way to classify: [accuracy of each task]}.

    logits: {way to classify: (n, classes of a task)}. t_hat, task_ids, labels (n,): the predicted
    task of each image, its true task, and the number of its class within the task.
    """
    hits = {way: z.argmax(1) == labels for way, z in logits.items()}
    # Example: the truth is class 2 of task 7. The predictor says task 3, and head 3 says class 2.
    # `local` compares the numbers of the classes, so it counts that as right, and so do the
    # controls. `strict` also compares the tasks. The paper seems to count like `local`: README.md
    # says why.
    hits["task"] = t_hat == task_ids
    hits["strict"] = hits["local"] & hits["task"]
    n_tasks = task_ids.max().item() + 1
    per_task = {way: [evaluate.percent(hit[task_ids == t]) for t in range(n_tasks)]
                for way, hit in hits.items()}
    faa = {way: evaluate.faa(accuracies) for way, accuracies in per_task.items()}
    figures = {
        "Task Acc": faa["task"], "FAA_GT": faa["gt"], "local": faa["local"],
        "D(M)": faa["gt"] - faa["local"], "strict": faa["strict"], "linear": faa["linear"],
        "mean": faa["mean"], "wrong": faa["wrong"], "none": faa["none"]}
    return figures, per_task


def predict(args, train, tasks, net, predictor, heads, keys, memory):
    """Algorithm 4 on the picture --predict."""
    image = data.picture(args.predict, train.images.shape[-1])  # the size of the training images
    t_hat, logits = mts_inference(net, predictor, heads, image[None], keys, memory)
    t = t_hat.item()
    print(f"task {t + 1} of {len(tasks)}")
    til.print_classes(logits, [train.classes[c] for c in tasks[t]])


# ---- the command line --------------------------------------------------------------------------
def make_parser(description):
    """A parser with the options of mts.py."""
    parser = til.make_parser(description)
    parser.add_argument("--predictor", choices=("tasks", "classes"), default="tasks",
                        help="what it learns: the tasks, as in the paper, or all classes "
                             "(default: tasks)")
    parser.add_argument("--label-smoothing", type=data.share, default=0.0,
                        help="of the predictor, from 0 to 1 (default: 0)")
    return parser


if __name__ == "__main__":
    with data.one_line_errors():
        til.main(make_parser(__doc__), experiment)
