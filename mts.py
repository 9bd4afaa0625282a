"""Multi-task switching (MTS), Algorithms 3 and 4 of the paper (A.1): the task is not known at inference.

A task predictor, LoRA weights theta_0 with a head of its own, finds it out. Then the modulation of that task
is recalled and classifies, as in TIL. theta_0 is never written to the memory.

    python mts.py                                                     # on top of what til.py has trained
    python mts.py --dataset tinyimagenet --splits 50 --predictor classes
    python mts.py --predict picture.png                               # Algorithm 4 on one picture
"""
import sys
import time

import torch

import data
import evaluate
import lora
import til
import vit as substrate

LR = 0.002                                                      # of the task predictor; paper, A.2


# ---- the two algorithms --------------------------------------------------------------------------
def mts_training(run):
    """Algorithm 3: the task predictor (theta_0 and its head), the memory M_T, and the task keys K_T."""
    images, task_labels = run.train.images, data.task_labels(run.train, run.tasks)      # 3: all D_t
    predictor = learn_predictor(run, images, *task_labels)      # 4
    memory, keys = run.remember()                               # 5 to 11: Algorithm 1
    return predictor, memory, keys                              # 12


@torch.no_grad()
def mts_inference(vit, predictor, heads, images, keys, memory):
    """Algorithm 4 for uint8 images (n, 3, h, w): the predicted tasks t_hat (n,), counted from 0, and the
    logits (n, classes of a task). predictor: theta_0 (P,) and its head; heads, keys: one for each task."""
    theta_0, head_0 = predictor
    lora.set(vit, theta_0)
    p = head_0(substrate.features(vit, images)).softmax(1)      # outputs: tasks, or classes task by task
    p = p.unflatten(1, (len(keys), -1)).sum(2)                  # p(t | x), the sum over the outputs of t
    t_hat = p.argmax(1).cpu()                                   # 3: t_hat = C(x; W, theta_0)
    logits = torch.empty(len(images), heads[0].out_features)
    for t in t_hat.unique().tolist():                           # images of one predicted task together
        theta_hat = memory.read(keys[t])                        # 5
        lora.set(vit, theta_hat)
        y_hat = heads[t](substrate.features(vit, images[t_hat == t]))   # 7: y_hat = C(x; W, theta_hat)
        logits[t_hat == t] = y_hat.cpu()
    return t_hat, logits                                        # 8


# ---- the task predictor --------------------------------------------------------------------------
def flips_and_crops(n, generator, smallest=0.35):
    """How n images are seen in an epoch: flip (n,), as in til.flips, and crop (n, 3), as in vit.prepare.

    The area of a crop is uniform in [smallest, 1]. With flips alone, ten epochs overfit.
    """
    side = (smallest + (1 - smallest) * torch.rand(n, 1, generator=generator)).sqrt()
    centre = (1 - side) * (2 * torch.rand(n, 2, generator=generator) - 1)
    return *til.flips(n, generator), torch.cat([side, centre], dim=1)


def learn_predictor(run, images, task_ids, labels):
    """theta_0 (P,) and its head: found in the run's folder, or trained. They depend on the seed alone.

    The head has an output for each task (--predictor tasks), or for each class, task by task (classes).
    """
    args, T, n = run.args, len(run.tasks), len(run.tasks[0])
    targets, n_outputs = (task_ids, T) if args.predictor == "tasks" else (n * task_ids + labels, n * T)
    epochs, batch_size = (5, 16) if args.dataset == "glyphs" else (10, 128)             # 10: paper, A.2
    made_with = {"predictor": args.predictor, "label_smoothing": args.label_smoothing,
                 "code of mts.py": data.digest(sys.modules[learn_predictor.__module__])}
    classifier = til.Classifier(run.vit, n_outputs, args.plain)
    found = run.find(f"predictor{variant(args)}.pt", **made_with)
    if found is None:
        start, generator = time.perf_counter(), data.generator(run.seed, 0)
        lora.init(run.vit, generator)
        classifier.head.init(generator)

        def report(epoch, loss, accuracy):
            seconds = time.perf_counter() - start
            print(f"predictor, epoch {epoch:2}/{epochs}  loss {loss:.4f}  train accuracy {accuracy:6.2f} %  "
                  f"{epoch * len(targets) / seconds:,.0f} images/s  "
                  f"{(epochs - epoch) * seconds / epoch:.0f} s left", flush=True)
        til.fit(classifier.logits, [*lora.parameters(run.vit), *classifier.head.parameters()],
                images.to(args.device), targets.to(args.device), epochs, batch_size, generator, LR,
                flips_and_crops, args.label_smoothing, report)
        found = {"theta": lora.get(run.vit).cpu(), "head": classifier.head.state_dict(),
                 "images_per_second": epochs * len(targets) / (time.perf_counter() - start)}
        run.save(f"predictor{variant(args)}.pt", found, **made_with)
    classifier.head.load_state_dict(found["head"])
    return found["theta"], classifier.head


def variant(args):
    """In the names of files: what the predictor learns, if it is not the task."""
    return "" if args.predictor == "tasks" else f"-{args.predictor}"


# ---- evaluation ----------------------------------------------------------------------------------
def results(run):
    """Algorithm 3, then Algorithm 4 on all test images; writes mts-<memory>.json and returns its content."""
    start = time.perf_counter()
    predictor, memory, keys = mts_training(run)
    heads = [run.trained(t)[1] for t in range(1, len(run.tasks) + 1)]
    task_ids, labels = data.task_labels(run.test, run.tasks)
    t_hat, logits = mts_inference(run.vit, predictor, heads, run.test.images, keys, memory)
    told, errors = til.assess(run, memory, keys, task_ids)
    controls, _ = til.assess(run, memory, keys, t_hat)
    answers = controls | {"gt": told["gt"], "recalled": told["recalled"], "local": logits.argmax(1)}
    hits = {name: answer == labels for name, answer in answers.items()}
    hits |= {"strict": hits["local"] & (t_hat == task_ids), "task": t_hat == task_ids}
    faa = {name: evaluate.faa(evaluate.per_task(hits[name], task_ids)) for name in ("gt", "local", "strict")}
    return evaluate.write_result(
        run, "mts", hits, task_ids, errors, start, variant(run.args), predictor=run.args.predictor,
        label_smoothing=run.args.label_smoothing, task_accuracy=100 * hits["task"].double().mean().item(),
        faa_local=faa["local"], faa_strict=faa["strict"], drop=faa["gt"] - faa["local"],
        images_per_second=data.read(run.folder / f"predictor{variant(run.args)}.pt")["images_per_second"])


def predict(run):
    """Algorithm 4 on a picture file."""
    image = data.picture(run.args.predict, run.vit.image_size)[None]
    predictor, memory, keys = mts_training(run)
    heads = [run.trained(t)[1] for t in range(1, len(run.tasks) + 1)]
    t_hat, logits = mts_inference(run.vit, predictor, heads, image, keys, memory)
    print(f"task {t_hat.item() + 1} of {len(run.tasks)}")
    til.print_classes(run, t_hat.item() + 1, logits)


if __name__ == "__main__":
    with data.one_line_errors():
        parser = til.options(__doc__)
        parser.add_argument("--predictor", choices=("tasks", "classes"), default="tasks",
                            help="what it learns: the task, as in the paper, or the class (default: tasks)")
        parser.add_argument("--label-smoothing", type=float, default=0, help="of the predictor (default: 0)")
        til.main(parser.parse_args(), results, predict)
