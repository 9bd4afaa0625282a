"""Multi-task switching (MTS): Algorithms 3 and 4 of the paper (appendix A.1).

Which task a picture belongs to is not told at inference. A task predictor, LoRA weights theta_0 and a T-way head trained on
all tasks at once, finds it out; then that task's modulation is recalled and classifies, as in TIL. Adapters and memories are
those of til.py, in the same run folder; theta_0 is never written to a memory.

    python mts.py                                                         # glyphs, 20 tasks, on a CPU in minutes
    python mts.py --dataset tinyimagenet --splits 50 --memory bayespcn    # on top of what til.py has trained
    python mts.py --predict cat.png                                       # Algorithm 4 on a picture of one's own
"""
import time
from types import SimpleNamespace

import torch

import data
import evaluate
import lora
import til
from til import features

LR = 0.002                                                                   # of the task predictor; paper, A.2


# ---- the two algorithms --------------------------------------------------------------------------------------------------

def mts_training(run):
    """Algorithm 3: the task predictor (theta_0 and its head), the memory M_T, and the task keys K_T of a til.Run."""
    task_ids, _ = data.locate(run.train, run.tasks)                          # 3: all D_t at once
    predictor = learn_predictor(run, run.train.images, task_ids)             # 4
    memory, keys = run.til_training()                                        # 5 to 11: as Algorithm 1
    return predictor, memory, keys                                           # 12


@torch.no_grad()
def mts_inference(vit, predictor, heads, images, keys, memory, t_hat=None):
    """Algorithm 4: the task predicted for each of the uint8 images (n, 3, h, w), t_hat (n,), counted from 0, and the logits
    (n, classes of a task) of that task's classes.

    predictor: theta (P,) and head; heads, keys: one for each task. t_hat is predicted unless it is given: the true tasks,
    say, show what recall alone costs. Images of one predicted task go together, so that it is recalled once.
    """
    if t_hat is None:
        lora.set(vit, predictor["theta"])
        t_hat = predictor["head"](features(vit, images)).argmax(1).cpu()     # 3: t_hat = C(x; W, theta_0)
    logits = torch.empty(len(images), heads[0].out_features)
    for t in t_hat.unique().tolist():
        theta_hat = memory.read(keys[t])                                     # 5
        lora.set(vit, theta_hat)
        group = t_hat == t
        logits[group] = heads[t](features(vit, images[group])).cpu()         # 7: y_hat = C(x; W, theta_hat)
    return t_hat, logits                                                     # 8


# ---- the task predictor ----------------------------------------------------------------------------------------------------

def learn_predictor(run, images, task_ids):
    """theta_0 (P,) and its head: from the folder if they are there, else trained, and kept after every epoch.

    They depend on nothing but the seed: their random numbers are those of t = 0. Unlike a task's, its pictures are cropped at
    random too: ten epochs with flips alone overfit. Raises ValueError for a file that was made otherwise.
    """
    path, generator = run.folder / "predictor.pt", data.generator(run.seed, 0)
    epochs, batch_size = run.args.predictor_epochs, run.args.predictor_batch_size
    settings = {"epochs": epochs, "batch_size": batch_size, "lr": [LR, til.LR_END]}
    classifier = til.Classifier(run.vit, len(run.tasks), data.flips_and_crops, plain=run.args.plain, shared=True)
    classifier.init(generator)
    state = load_predictor(run, path, settings, classifier, generator) if path.exists() else {"epoch": 0, "seconds": 0}
    if run.args.predict and state["epoch"] < epochs:
        raise FileNotFoundError(f"{path} is missing or unfinished: run the same command without --predict first")
    if state["epoch"] < epochs:
        images, task_ids = images.to(run.args.device), task_ids.to(run.args.device)
        start, before, trainer = time.perf_counter(), state["seconds"], classifier.trainer
        losses = trainer.fit(images, task_ids, epochs, batch_size, generator, LR, state["epoch"])
        for epoch, (loss, accuracy) in enumerate(losses, state["epoch"] + 1):
            seconds = before + time.perf_counter() - start
            state = {"settings": settings, "epoch": epoch, "theta": lora.get(run.vit).cpu(), "head": til.on_cpu(classifier.head),
                     "loss": loss, "accuracy": accuracy, "seconds": seconds, "images": epoch * len(task_ids),
                     "device": til.device_name(run.args.device), "processes": til.WORLD,
                     "optimizer": trainer.state_dict(), "generator": generator.get_state()}
            if til.RANK == 0:
                run.save(path, state)
                print(f"task predictor, epoch {epoch:2}/{epochs}  loss {loss:.4f}  train accuracy {accuracy:6.2f} %  "
                      + til.pace(state["images"], seconds, (epochs - epoch) / epoch), flush=True)
        run.seconds["task predictor"] = time.perf_counter() - start
    return state | {"head": classifier.head}


def load_predictor(run, path, settings, classifier, generator):
    """What learn_predictor saved, put back into classifier and generator. Raises ValueError if the file holds something else."""
    state = run.load(path)
    try:
        if state["settings"] == settings:
            if [type(state[name]) for name in ("epoch", "images", "seconds", "device", "processes")] != [int, int, float, str, int]:
                raise TypeError
            lora.set(classifier.vit, state["theta"])
            classifier.head.load_state_dict(state["head"])
            classifier.trainer.load_state_dict(state["optimizer"])
            generator.set_state(state["generator"])
            return state
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError):
        raise ValueError(f"{path} does not hold a task predictor of this run: remove it to train it again") from None
    raise ValueError(f"{path} was trained with {state['settings']}, this command has {settings}: repeat the earlier setting "
                     "or name another folder with --out")


# ---- evaluation --------------------------------------------------------------------------------------------------------------

def always(theta):
    """A memory that recalls the same theta (P,) whatever it is asked: for the controls."""
    return SimpleNamespace(read=lambda key: theta)


def assess(run, predictor, memory, keys):
    """Shares of right answers in percent, a dictionary of lists with one number a task, and t_hat of the test images (n,).

    task: the task is right; local: the class is, counted within the task; strict: both. gt and recalled: local, told the
    true tasks, with the adapters as trained and as recalled. The controls are local, with the predicted tasks.
    """
    images, (task_ids, places) = run.test.images, data.locate(run.test, run.tasks)
    adapters = [run.adapter(t) for t in range(1, len(run.tasks) + 1)]
    heads, thetas = [a["head"] for a in adapters], torch.stack([a["theta"] for a in adapters])
    disk = til.Disk()
    for theta in thetas:
        disk.write(*lora.split_key(theta))
    t_hat, logits = mts_inference(run.vit, predictor, heads, images, keys, memory)
    lists = evaluate.switching_hits(t_hat, logits, task_ids, places)

    def local(heads, keys, memory, tasks):
        """Accuracy within the task if the pictures are given to these tasks."""
        _, logits = mts_inference(run.vit, predictor, heads, images, keys, memory, tasks)
        return evaluate.switching_hits(tasks, logits, task_ids, places)["local"]

    none, mean = always(torch.zeros_like(thetas[0])), always(thetas.mean(0))
    linear = [*til.linear_heads(run, range(len(keys)))]
    lists |= {"gt": local(heads, keys, disk, task_ids), "recalled": local(heads, keys, memory, task_ids),
              "none": local(heads, keys, none, t_hat), "wrong": local(heads, keys[-1:] + keys[:-1], disk, t_hat),
              "mean": local(heads, keys, mean, t_hat), "linear": local(linear, keys, none, t_hat)}
    return lists, t_hat


def results(run):
    """Runs Algorithm 3, then Algorithm 4 on all test images; writes mts-<memory>.json and .png and returns the former."""
    start = time.perf_counter()
    predictor, memory, keys = mts_training(run)
    written = time.perf_counter()
    lists, t_hat = assess(run, predictor, memory, keys)
    faa = {key: evaluate.faa(values) for key, values in lists.items()}
    task_ids, _ = data.locate(run.test, run.tasks)
    content = {
        "setting": "mts", "memory": run.memory_name, **run.config, "memory_bytes": memory.nbytes,
        "predictor": predictor["settings"] | {key: predictor[key] for key in ("loss", "accuracy", "seconds")},
        "task_accuracy": 100 * (t_hat == task_ids).double().mean().item(),
        "faa_gt": faa["gt"], "faa": faa["recalled"], "faa_local": faa["local"], "faa_strict": faa["strict"],
        "drop": faa["gt"] - faa["local"], "drop_ids": faa["recalled"] - faa["local"], "drop_recall": faa["gt"] - faa["recalled"],
        "controls": {key: faa[key] for key in ("none", "wrong", "mean", "linear")}, "per_task": lists,
        **til.cost(run, [predictor], start, written)}
    if til.RANK == 0:
        data.save_json(run.folder / f"mts-{run.memory_name}.json", content)
        evaluate.draw(run.folder / "mts-confusion.png", [evaluate.confusion(task_ids, t_hat, len(run.tasks))], 1)
    return content


def predict(run):
    """Algorithm 4 on a picture file: prints the predicted task and its classes by name with their probabilities."""
    image = data.square(data.read_picture(run.args.predict))[None]
    predictor, memory, keys = mts_training(run)
    heads = [run.adapter(t)["head"] for t in range(1, len(run.tasks) + 1)]
    t_hat, logits = mts_inference(run.vit, predictor, heads, image, keys, memory)
    print(f"task {t_hat.item() + 1} of {len(run.tasks)}")
    til.print_classes(run, t_hat.item() + 1, logits)


# ---- command line ------------------------------------------------------------------------------------------------------------

def main():
    """Trains, stores, recalls and evaluates, one run per seed; or classifies one picture."""
    parser = data.Parser("python mts.py --dataset tinyimagenet --splits 50 --memory bayespcn", "Multi-task switching (Algorithms 3 and 4).")
    parser.add_argument("--predictor-epochs", type=int, help="epochs of the task predictor (default: 5 for glyphs, else 10)")
    parser.add_argument("--predictor-batch-size", type=int, help="default: 16 for glyphs, else 128")
    til.launch(til.parse(parser), results, predict)


if __name__ == "__main__":
    data.run_command(main)
