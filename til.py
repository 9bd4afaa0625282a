"""Task-incremental learning (TIL): Algorithms 1 and 2 of the paper (appendix A.1).

The task is known at inference. One LoRA modulation theta_t is trained per task; an associative memory keeps them all and
gives each back from a part of itself, the task's key k_t.

    python til.py                                                         # glyphs, 20 tasks, on a CPU in two minutes
    python til.py --dataset cifar100 --splits 20 --memory hopfield        # the paper's C100-20S
    python til.py --predict cat.png --task 3                              # Algorithm 2 on a picture of one's own
"""
import copy
import math
import os
import re
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import lora
import vit as substrate
from bayespcn import BayesPCN
from hopfield import Hopfield

LR, LR_END, WEIGHT_DECAY = 0.005, 0.0001, 0.1                                # paper, A.2
RANK, WORLD = (int(os.environ[x]) for x in ("RANK", "WORLD_SIZE")) if "TORCHELASTIC_RUN_ID" in os.environ else (0, 1)    # torchrun's


# ---- the two algorithms --------------------------------------------------------------------------------------------------

def til_training(tasks, train, memory, learn):
    """Algorithm 1. tasks: the classes of each task; train: data.Images; learn(t, images, labels) -> theta_t (P,).

    Returns the memory M_T and the task keys K_T, a list of T vectors (|k|,).
    """
    keys = []                                                                # 2: M_0 and K_0 are empty
    for t, classes in enumerate(tasks, 1):                                   # 3
        images, labels = data.task(train, classes)                           # 4: D_t, and nothing of other tasks
        theta = learn(t, images, labels)                                     # 5, 6: initialised at random, AdamW
        key, value = lora.split_key(theta)                                   # 7: k_t and theta_t / k_t
        keys.append(key)                                                     # 8
        memory.write(key, value)                                             # 9
    return memory, keys                                                      # 11


@torch.no_grad()
def til_inference(vit, head, images, key, memory):
    """Algorithm 2: logits (n, classes of the task) for uint8 images (n, 3, h, w) of the task with this key (|k|,)."""
    theta_hat = memory.read(key)                                             # 3
    lora.set(vit, theta_hat)
    return head(features(vit, images))                                       # 5: y_hat = C(x; W, theta_hat)


class Disk:
    """The ground truth to compare memories with: a dictionary, which must be asked with exactly the key."""

    def __init__(self):
        self.items = {}

    def write(self, key, value):
        """Stores key (|k|,) with value (P - |k|,)."""
        self.items[key.numpy().tobytes()] = key, value

    def read(self, key):
        """theta (P,) as written; KeyError for a key that is not stored."""
        return torch.cat(self.items[key.numpy().tobytes()])

    def state_dict(self):
        """Everything stored, in the order of writing."""
        return {"items": list(self.items.values())}

    def load_state_dict(self, state):
        """Takes over what state_dict gave."""
        for key, value in state["items"]:
            self.write(key, value)

    @property
    def nbytes(self):
        """Size of what is stored in bytes."""
        return sum(key.nbytes + value.nbytes for key, value in self.items.values())


MEMORIES = {                                     # name for --memory: an empty one for vectors theta of dim elements
    "hopfield": lambda dim, args: Hopfield(),
    "bayespcn": lambda dim, args: BayesPCN(dim, read=args.bpcn_read, device=args.device),
    "disk": lambda dim, args: Disk()}


# ---- training one task -----------------------------------------------------------------------------------------------------

class Trainer:
    """AdamW on `parameters` with a cosine decay of the learning rate; forward(x, *view) -> logits of the items x.

    views(n, generator) draws for every epoch how its n items are seen (data.flips): tensors with one row an item. One object
    serves all tasks: on a GPU its step is captured as a CUDA graph, and capturing takes longer than a small task. `plain`: no
    graph. `shared`: the processes of torchrun share every batch, instead of each training tasks of its own.
    """

    def __init__(self, parameters, forward, views, plain=False, shared=False):
        self.parameters, self.forward, self.views, self.shared = parameters, forward, views, shared and WORLD > 1
        device = parameters[0].device
        self.lr, self.totals = torch.zeros((), device=device), torch.zeros(3, device=device)     # of loss, hits, items
        self.optimizer = torch.optim.AdamW(parameters, self.lr, weight_decay=WEIGHT_DECAY, fused=True,
                                           capturable=device.type == "cuda")
        self.run_step = self.step if plain or device.type == "cpu" else substrate.Graphed(self.step)

    def step(self, x, y, *view):
        """One step on a batch x with labels y (B,), seen in this way."""
        logits = self.forward(x, *view)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        if self.shared:
            average([weight.grad for weight in self.parameters])
        self.optimizer.step()
        self.optimizer.zero_grad()
        hits, items = (logits.argmax(1) == y).sum(), torch.full_like(loss, len(y))
        self.totals.add_(torch.stack([loss.detach() * items, hits, items]))

    def fit(self, x, y, epochs, batch_size, generator, lr=LR, done=0):
        """Trains on items x with labels y (n,), lr -> LR_END; yields (loss, accuracy in percent) after every epoch.

        All randomness comes from `generator` (on the CPU). done: epochs that were done before an interruption, where
        optimizer and generator have been set back to. Raises FloatingPointError when the loss is not finite.
        """
        if done == 0:                                                        # AdamW forgets the task before; in place, since
            for state in self.optimizer.state.values():                      # the graph reads these very tensors
                for value in state.values():
                    value.zero_()
        step, steps = done * math.ceil(len(y) / batch_size), epochs * math.ceil(len(y) / batch_size)
        for epoch in range(done + 1, epochs + 1):
            self.totals.zero_()
            order = torch.randperm(len(y), generator=generator).to(y.device)
            views = [view.to(y.device).split(batch_size) for view in self.views(len(y), generator)]
            for batch, *view in zip(order.split(batch_size), *views):
                if self.shared and len(batch) % WORLD == 0:                  # an odd last batch is trained, and counted, by all alike
                    batch, *view = (part[RANK::WORLD] for part in (batch, *view))
                self.lr.fill_(LR_END + (lr - LR_END) / 2 * (1 + math.cos(math.pi * step / steps)))
                self.run_step(x[batch], y[batch], *view)
                step += 1
            if self.shared:
                dist.all_reduce(self.totals)
            loss, hits, items = self.totals.tolist()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} in epoch {epoch}, learning rate {self.lr.item():.2g}")
            yield loss / items, 100 * hits / items

    def state_dict(self):
        """What an interrupted fit needs to go on, beside the parameters and the generator."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        """Takes over what state_dict gave."""
        self.optimizer.load_state_dict(state)
        # The tensor that fit sets and the graph reads; and the file may come from a run on a CPU.
        self.optimizer.param_groups[0].update(lr=self.lr, capturable=self.lr.is_cuda)


class Classifier:
    """C(x; W, theta): a ViT with LoRA and a linear head on its class token, and the Trainer of both."""

    def __init__(self, vit, n_classes, views=data.flips, plain=False, shared=False):
        self.vit, self.head = vit, nn.Linear(vit.config.width, n_classes, device=vit.cls_token.device)
        self.trainer = Trainer([*lora.parameters(vit), *self.head.parameters()], self.logits, views, plain, shared)

    def logits(self, images, *view):
        """Logits (B, n_classes) for uint8 images (B, 3, h, w)."""
        return self.head(class_token(self.vit, images, *view))

    def init(self, generator):
        """Algorithm 1, line 5: random theta and head."""
        lora.init(self.vit, generator)
        init_head(self.head, generator)

    def flops(self, image):
        """Floating-point operations of a training step for an image (3, h, w), without AdamW's: counted on one."""
        with FlopCounterMode(display=False) as counter:
            self.logits(image[None]).sum().backward()
        self.trainer.optimizer.zero_grad()
        return counter.get_total_flops()


def init_head(head, generator):
    """Small random weights, drawn on the CPU, and zero bias."""
    with torch.no_grad():
        head.weight.copy_(nn.init.normal_(torch.empty(head.weight.shape), std=0.02, generator=generator))
        head.bias.zero_()


def train_adapter(classifier, images, labels, epochs, batch_size, generator, init=None):
    """Lines 5 and 6 of Algorithm 1: theta_t and the task's head, trained on D_t (uint8 images, labels 0..n_classes - 1).

    init: the generator that theta_t and the head start from, if it is not the same as for the rest.
    Returns a dictionary: theta (P,) and head (a state dict) on the CPU, loss and accuracy of the last epoch, the number of
    images trained on (each counts in every epoch), seconds, device.
    """
    start, device = time.perf_counter(), classifier.head.weight.device
    classifier.init(init or generator)
    for loss, accuracy in classifier.trainer.fit(images.to(device), labels.to(device), epochs, batch_size, generator):
        pass
    theta = lora.get(classifier.vit).cpu()
    if not theta.isfinite().all():
        raise FloatingPointError("theta is not finite after the last step")
    return {"theta": theta, "head": on_cpu(classifier.head), "loss": loss, "accuracy": accuracy,
            "images": epochs * len(labels), "seconds": time.perf_counter() - start, "device": device_name(device)}


def pace(images, seconds, to_come):
    """For the progress lines: images a second, and the time left if to_come times as much is still to come."""
    minutes, rest = divmod(round(seconds * to_come), 60)
    return f"{images / seconds:,.0f} images/s  {minutes}:{rest:02} left"


def on_cpu(module):
    """A copy of a module's state dict on the CPU."""
    return {name: value.cpu().clone() for name, value in module.state_dict().items()}


def class_token(vit, images, *view):
    """Normalised class tokens (B, width), float32, of uint8 images (B, 3, h, w) on the ViT's device."""
    return vit(data.prepare(images, vit, *view)).float()


@torch.no_grad()
def features(vit, images, batch_size=None):
    """class_token for any number of images on any device, each independent of its companions."""
    # Launches make small batches slow on a GPU, but large pictures take much memory.
    batch_size = batch_size or min(1000 if vit.cls_token.is_cuda else 250, max(1, 30_000_000 // vit.image_size ** 2))
    return torch.cat([class_token(vit, batch.to(vit.cls_token.device)) for batch in images.split(batch_size)])


def equip(vit, rank, device, plain=False, alpha=lora.ALPHA):
    """Adds adapters and moves the ViT to its device: on a GPU in bfloat16, unless plain. Adapters and heads are always float32."""
    vit.to(device, torch.bfloat16 if device.startswith("cuda") and not plain else torch.float32)
    lora.add(vit, rank, alpha, data.generator(0))                            # every training draws its own


def weights_checksum(vit):
    """Tells one weights file from another, but for the positions, which are resized, so that it is the same at every size."""
    return data.checksum(*(value for name, value in vit.state_dict().items() if name != "pos_embed"))


# ---- one run: one seed -----------------------------------------------------------------------------------------------------

class Run:
    """One seed's tasks, substrate and folder. Raises ValueError if the folder was made with other settings."""

    def __init__(self, args, seed, train, test):
        self.args, self.seed, self.train, self.test = args, seed, train, test
        self.tasks = data.split(len(train.classes), args.splits, seed)
        self.vit = substrate.load(args.backbone, args.weights, args.image_size)
        weights = weights_checksum(self.vit)
        equip(self.vit, args.rank, args.device, args.plain, args.alpha)
        self.classifier = Classifier(self.vit, len(self.tasks[0]), plain=args.plain)
        self.seconds = {"load": 0, "task predictor": 0, "training": 0}       # what this command has spent on what
        self.adapters = {}                                                   # those that were read, by t
        parts = [                                                            # of the folder's name, and whether it has them
            (args.dataset, True), ("validate", args.validate), (f"{args.splits}s-{args.backbone}", True),
            (f"{self.vit.image_size}px", self.vit.image_size != self.vit.config.image_size), (f"r{args.rank}", True),
            (f"alpha{args.alpha}", args.alpha != lora.ALPHA), ("shared-init", args.shared_init), (f"seed{seed}", True)]
        self.folder = args.out / "-".join(part for part, given in parts if given)
        self.memory_name = args.memory + ("-joint" if args.bpcn_read == "joint" else "")
        self.config = {
            "dataset": args.dataset, "validate": args.validate, "splits": args.splits, "backbone": args.backbone,
            "rank": args.rank, "alpha": args.alpha, "shared_init": args.shared_init, "seed": seed, "image_size": self.vit.image_size,
            "epochs": args.epochs, "batch_size": args.batch_size, "lr": [LR, LR_END], "weight_decay": WEIGHT_DECAY,
            "weights": weights, "positions": data.checksum(self.vit.published_positions),
            "train_images": len(train.labels), "train_data": data.checksum(*train),
            "test_images": len(test.labels), "test_data": data.checksum(*test), "class_order": self.tasks}
        if args.predict and not (self.folder / f"{args.memory}.pt").exists():
            raise FileNotFoundError(f"there is no {self.folder / args.memory}.pt: run the same command without --predict first")
        if RANK > 0:
            wait()                                                           # until the first process has made or found the folder
        self.lock = None if args.predict else data.lock(self.folder, RANK, WORLD)
        data.open_run(self.folder, self.config)
        if RANK == 0:
            wait()

    def adapter(self, t):
        """What train_adapter returned for task t (1..T). Raises ValueError if the file holds something else."""
        if t in self.adapters:
            return self.adapters[t]
        path, head = self.folder / "adapters" / f"{t}.pt", copy.deepcopy(self.classifier.head)
        adapter = self.load(path)
        try:
            lora.set(self.vit, adapter["theta"])                             # whether it fits; whoever classifies sets its own
            head.load_state_dict(adapter["head"])
            if adapter["t"] != t or [type(adapter[name]) for name in ("images", "seconds", "device")] != [int, float, str]:
                raise ValueError("another task")
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} does not hold the adapter of task {t} ({error}): remove it to train it again, or name "
                             "another folder with --out") from None
        self.adapters[t] = adapter | {"head": head}
        return self.adapters[t]

    def save(self, path, content):
        """Keeps tensors, numbers and strings in a file of this run."""
        data.save_tensors(path, content | {"config": self.config})

    def load(self, path):
        """What `save` kept. Raises ValueError if the file is damaged or of another run."""
        content = data.load_tensors(path)
        if data.checksum(content.get("config")) != data.checksum(self.config):
            raise ValueError(f"{path} comes from a run with other settings: remove it and run the command again")
        return content

    def learn(self, t, images, labels):
        """theta_t: from the folder if it is there, else trained and kept. Depends on nothing but the seed and t."""
        path = self.folder / "adapters" / f"{t}.pt"
        if not path.exists():
            if self.args.predict:
                raise FileNotFoundError(f"{path} is missing: run the same command without --predict first")
            try:
                init = data.generator(self.seed) if self.args.shared_init else None
                adapter = train_adapter(self.classifier, images, labels, self.args.epochs, self.args.batch_size,
                                        data.generator(self.seed, t), init)
            except FloatingPointError as error:
                raise FloatingPointError(f"task {t}: {error}") from None
            self.save(path, adapter | {"t": t})
            self.seconds["training"] += adapter["seconds"]
            print(f"task {t:3}/{len(self.tasks)}  loss {adapter['loss']:.4f}  train accuracy {adapter['accuracy']:6.2f} %  "
                  + pace(adapter["images"], adapter["seconds"], (len(self.tasks) - t) / WORLD), flush=True)
        return self.adapter(t)["theta"]

    def til_training(self):
        """Algorithm 1, going on from what is in the folder: the memory M_T and the keys K_T.

        Processes of torchrun first train every WORLD-th task each; then the first of them finds all in the folder and writes.
        """
        path = self.folder / f"{self.args.memory}.pt"
        memory = MEMORIES[self.args.memory](len(lora.get(self.vit)), self.args)
        if path.exists() or WORLD > 1:                                       # an adapter that was removed; or this process's share
            for t in range(1 + RANK, 1 + len(self.tasks), WORLD):
                if not (self.folder / "adapters" / f"{t}.pt").exists():
                    self.learn(t, *data.task(self.train, self.tasks[t - 1]))
        wait()
        if not path.exists() and RANK == 0:
            memory, keys = til_training(self.tasks, self.train, memory, self.learn)
            self.save(path, {"memory": memory.state_dict(), "keys": keys})
        wait()
        state = self.load(path)
        try:
            memory.load_state_dict(state["memory"])
            if [key.ndim for key in state["keys"]] != [1] * len(self.tasks):
                raise ValueError("other keys")
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} does not hold a {self.args.memory} memory of this run ({error}): remove it to write it "
                             "again") from None
        for t, key in enumerate(state["keys"], 1):
            if not torch.equal(lora.split_key(self.adapter(t)["theta"])[0], key):
                raise ValueError(f"{path} was not written from adapters/{t}.pt: remove it")
        return memory, state["keys"]


def assess(run, adapters, memory, keys):
    """Accuracy in percent on every task's test images: with theta_t as trained, as recalled, and under four controls.

    Returns a dictionary of lists with one number a task; `recall_error` is relative, on the value part.
    """
    thetas = [adapter["theta"] for adapter in adapters]
    zero, mean = torch.zeros_like(thetas[0]), torch.stack(thetas).mean(0)
    lists = {name: [] for name in ("gt", "recalled", "none", "wrong", "mean", "linear", "recall_error")}
    ours = range(RANK, len(run.tasks), WORLD)                                # each process of torchrun evaluates its share
    for t, linear in data.progress(zip(ours, linear_heads(run, ours)), len(ours), "evaluating"):
        images, labels = data.task(run.test, run.tasks[t])
        head = adapters[t]["head"]
        logits = til_inference(run.vit, head, images, keys[t], memory)
        lists["recalled"].append(evaluate.accuracy(logits, labels))
        lists["recall_error"].append(evaluate.recall_error(lora.get(run.vit).cpu(), thetas[t], len(keys[t])))
        for name, theta in (("gt", thetas[t]), ("wrong", thetas[t - 1]), ("mean", mean)):
            if not torch.equal(theta, lora.get(run.vit).cpu()):              # an exact recall need not be classified twice
                lora.set(run.vit, theta)
                logits = head(features(run.vit, images))
            lists[name].append(evaluate.accuracy(logits, labels))
        lora.set(run.vit, zero)
        frozen = features(run.vit, images)
        for name, classify in (("none", head), ("linear", linear)):
            lists[name].append(evaluate.accuracy(classify(frozen), labels))
    return gather(lists)


def linear_heads(run, ts):
    """The control `linear`: yields for each of these tasks, counted from 0, a head trained as in Algorithm 1, but alone, on the
    features of the bare substrate. It draws flips that features cannot show, so that its batches are those of theta_t."""
    zero, head = torch.zeros_like(lora.get(run.vit)), copy.deepcopy(run.classifier.head)
    trainer = Trainer([*head.parameters()], lambda features, *view: head(features), data.flips, run.args.plain)
    for t in ts:
        lora.set(run.vit, zero)
        images, labels = data.task(run.train, run.tasks[t])
        generator, frozen = data.generator(run.seed, t + 1), features(run.vit, images)
        init_head(head, generator)
        for _ in trainer.fit(frozen, labels.to(frozen.device), run.args.epochs, run.args.batch_size, generator):
            pass
        yield copy.deepcopy(head)


def results(run):
    """Runs Algorithm 1, then Algorithm 2 on all test images; writes and returns til-<memory>.json."""
    start = time.perf_counter()
    memory, keys = run.til_training()
    written = time.perf_counter()
    adapters = [run.adapter(t) for t in range(1, len(run.tasks) + 1)]
    lists = assess(run, adapters, memory, keys)
    faa = {key: evaluate.faa(values) for key, values in lists.items()}
    content = {
        "setting": "til", "memory": run.memory_name, **run.config, "memory_bytes": memory.nbytes,
        "faa_gt": faa["gt"], "faa": faa["recalled"], "drop": faa["gt"] - faa["recalled"],
        "controls": {key: faa[key] for key in ("none", "wrong", "mean", "linear")},
        "recall_error": {"mean": faa["recall_error"], "max": max(lists["recall_error"])},
        "smallest_weight": evaluate.smallest_weight(memory, keys), "per_task": lists,
        **cost(run, adapters, start, written)}
    if RANK == 0:
        data.save_json(run.folder / f"til-{run.memory_name}.json", content)
    return content


PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}      # dense bfloat16 operations a second; NVIDIA's data sheets


def cost(run, trainings, start, written):
    """Time, memory and speed for a run's JSON. trainings: what train_adapter returned, or like it; start, written: when
    Algorithm 1 or 3 was begun and done."""
    images, seconds = (sum(training[name] for training in trainings) for name in ("images", "seconds"))
    device, flops = trainings[0]["device"], run.classifier.flops(run.train.images[0].to(run.args.device))
    rate = images / seconds / trainings[0].get("processes", 1)               # of one device
    writing = written - start - run.seconds["task predictor"] - run.seconds["training"]
    stages = run.seconds | {"memory": writing, "evaluation": time.perf_counter() - written}
    peak = {"peak_memory_bytes": evaluate.peak_memory()}                     # of the device that computes
    if run.args.device.startswith("cuda"):
        peak = {"peak_memory_bytes": torch.cuda.max_memory_allocated(), "peak_host_bytes": evaluate.peak_memory()}
    return {
        "train_seconds": seconds, "train_device": device, "images_per_second": images / seconds, "flops_per_image": flops,
        "mfu": mfu(rate * flops, device),
        "wall_seconds": sum(stages.values()), "stage_seconds": stages, **peak, "processes": WORLD, "plain": run.args.plain,
        "device": device_name(run.args.device), "versions": evaluate.VERSIONS}


def mfu(flops, device):
    """Model FLOPs utilisation: the share of the GPU's peak that these operations a second are; None if the peak isn't known."""
    return next((flops / peak for name, peak in PEAK.items() if name in device), None)


def device_name(device):
    """The GPU's name, or the number of threads on the CPU."""
    return torch.cuda.get_device_name(device) if "cuda" in str(device) else f"{torch.get_num_threads()} CPU threads"


def predict(run):
    """Algorithm 2 on a picture file: prints the classes of the task by name with their probabilities."""
    t = run.args.task
    image = data.square(data.read_picture(run.args.predict))[None]
    memory, keys = run.til_training()
    print_classes(run, t, til_inference(run.vit, run.adapter(t)["head"], image, keys[t - 1], memory))


def print_classes(run, t, logits):
    """The classes of task t (1..T) by name with their probabilities; logits (1, classes of the task)."""
    if not logits.isfinite().all():
        raise ValueError(f"the answer is not a number: {run.args.memory}.pt or adapters/{t}.pt in {run.folder} is damaged, remove both")
    probabilities = logits.softmax(1)[0].tolist()
    for probability, label in sorted(zip(probabilities, run.tasks[t - 1]), reverse=True):
        print(f"{100 * probability:6.2f} %  {run.train.classes[label]}")


# ---- several processes, one a GPU: torchrun --nproc_per_node 2 til.py ... ------------------------------------------------------

def wait():
    """Until all processes have come here."""
    if WORLD > 1:
        dist.barrier()


def gather(lists):
    """A dictionary of lists with a number for every WORLD-th task, from each process -> the lists of all tasks."""
    parts = [lists] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, lists)
    n = sum(len(part["gt"]) for part in parts)
    return {name: [parts[t % WORLD][name][t // WORLD] for t in range(n)] for name in lists}


def average(gradients):
    """The mean over the processes of torchrun, in place; as one message, since fifty small ones would take longer."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / WORLD).split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


# ---- command line ------------------------------------------------------------------------------------------------------------

def parse(parser):
    """Adds the options that TIL and MTS share and returns the checked arguments."""
    group = parser.add_argument_group("the experiment")
    group.add_argument("--dataset", choices=data.LOADERS, default="glyphs", help="default: glyphs, drawn on the spot")
    group.add_argument("--splits", type=int, default=20, help="number of tasks T (default: 20)")
    group.add_argument("--memory", choices=MEMORIES, default="hopfield", help="default: hopfield")
    group.add_argument("--bpcn-read", choices=("marginal", "joint"), default="marginal", help="how BayesPCN reads (default: marginal)")
    group.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run each (default: 0)")
    group.add_argument("--validate", action="store_true", help="test on a tenth of the training images, held out: for choosing options")
    group = parser.add_argument_group("the network and its training")
    group.add_argument("--backbone", choices=substrate.CONFIGS, help="default: vit_tiny for glyphs, else dinov2_vits14")
    group.add_argument("--weights", type=Path, help="weights file of the backbone (default: shipped or downloaded)")
    group.add_argument("--image-size", type=int, help="side of the network's input in pixels (default: the backbone's)")
    group.add_argument("--rank", type=int, default=8, help="rank r of LoRA (default: 8)")
    group.add_argument("--alpha", type=int, default=lora.ALPHA, help="LoRA's scale is alpha / rank (default: 8)")
    group.add_argument("--epochs", type=int, default=3, help="epochs a task (default: 3)")
    group.add_argument("--batch-size", type=int, help="default: 6 for glyphs, else 64")
    group.add_argument("--shared-init", action="store_true", help="all tasks start from the same random theta and head (default: each from its own)")
    group = parser.add_argument_group("files and machine")
    group.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of the data sets (default: data)")
    group.add_argument("--out", type=Path, default=Path("runs"), help="folder of run folders (default: runs)")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one")
    group.add_argument("--plain", action="store_true", help="on a GPU: float32 and no CUDA graph; slower, but can be debugged")
    group = parser.add_argument_group("a picture of one's own")
    group.add_argument("--predict", type=Path, metavar="PICTURE", help="classify this picture with a finished run")
    args = parser.parse_args()
    for option, value in data.defaults(args.dataset).items():
        if getattr(args, option, value) is None:
            setattr(args, option, value)
    check_options(args)
    if args.device.startswith("cuda"):
        use_gpu(args)
    set_arithmetic()
    return args


def set_arithmetic():
    """How a GPU computes: fast, with TF32 (memories read in float64), and to the same bits every time. By default the gradients of
    attention over more than 128 tokens are added up in any order. PyTorch now refuses operations that it can't do otherwise."""
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False              # would take a kernel more for each tensor
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"                        # cuBLAS's own switch for the same


def check_options(args):
    """Raises ValueError or FileNotFoundError for what can be known to be wrong before any work is done."""
    for option in ("splits", "rank", "alpha", "epochs", "batch_size", "predictor_epochs", "predictor_batch_size"):
        if getattr(args, option, None) is not None and not 1 <= getattr(args, option) <= 10 ** 6:
            raise ValueError(f"--{option.replace('_', '-')} is {getattr(args, option)}: it must be at least 1, and at most a million")
    if args.dataset in data.N_CLASSES:
        data.split(data.N_CLASSES[args.dataset], args.splits, 0)             # raises if they cannot be shared out
    config = substrate.CONFIGS[args.backbone]
    substrate.grid(config, config.image_size if args.image_size is None else args.image_size)
    if args.rank > config.width:
        raise ValueError(f"--rank {args.rank} is more than the width of {args.backbone}, {config.width}")
    if args.bpcn_read != "marginal" and args.memory != "bayespcn":
        raise ValueError(f"--bpcn-read {args.bpcn_read} is for --memory bayespcn, not {args.memory}")
    for option, path in (("weights", args.weights), ("predict", args.predict)):
        if path and not path.is_file():
            raise FileNotFoundError(f"--{option} {path}: there is no such file")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file: it takes the folder for the run folders")
    if (args.out / "config.json").exists():
        raise ValueError(f"--out {args.out} is a run folder itself: name the one that it is in")
    if args.predict and (len(args.seeds) > 1 or WORLD > 1):
        raise ValueError(f"--predict takes one run and one process; --seeds names {len(args.seeds)}, torchrun has {WORLD}")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds {args.seeds}: they must be different numbers, none below 0")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise ValueError(f"--device {args.device}: choose cpu, cuda or cuda:N")
    evaluate.check_device(args.device)


def use_gpu(args):
    """Makes the GPU that --device names the current one; under torchrun, each process has its own."""
    index = int(os.environ["LOCAL_RANK"]) if WORLD > 1 else torch.device(args.device).index or 0
    if index >= torch.cuda.device_count():
        raise ValueError(f"there is no GPU {index}: this machine has {torch.cuda.device_count()}, counted from 0")
    torch.cuda.set_device(index)
    args.device = f"cuda:{index}"


def launch(args, results, predict):
    """results(run) for one run per seed, and their table; or predict(run) for a picture."""
    start = time.perf_counter()
    if WORLD > 1:
        torch.set_num_threads(max(1, os.cpu_count() // WORLD))               # torchrun allows one
        dist.init_process_group(timeout=timedelta(days=1))
    train, test = data.load(args.dataset, args.data_dir)
    if args.validate:
        train, test = data.hold_out(train)
    contents = []
    for seed in args.seeds:
        run = Run(args, seed, train, test)
        run.seconds["load"] = time.perf_counter() - start
        contents.append(predict(run) if args.predict else results(run))
        start = time.perf_counter()
    if not args.predict and RANK == 0:
        print(evaluate.report(contents))


def main():
    """Trains, stores, recalls and evaluates, one run per seed; or classifies one picture."""
    parser = data.Parser("python til.py --dataset cifar100 --splits 20 --memory hopfield", "Task-incremental learning (Algorithms 1 and 2).")
    parser.add_argument("--task", type=int, help="the task (1 to T) of the picture")
    args = parse(parser)
    if (args.predict is None) != (args.task is None):
        raise ValueError("--predict PICTURE and --task T go together")
    if args.task is not None and not 1 <= args.task <= args.splits:
        raise ValueError(f"there is no task {args.task}: --task takes 1 to {args.splits}")
    launch(args, results, predict)


if __name__ == "__main__":
    data.run_command(main)
