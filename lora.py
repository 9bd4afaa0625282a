"""LoRA (Hu et al., arXiv 2106.09685): the modulation theta_t of one task, and how it is trained.

A frozen projection W x becomes (W + (alpha / r) B A) x, with A (r, d) and B (d, r). theta joins all
of them to one vector, w_q(1) (+) w_v(1) (+) .. (+) w_q(L) (+) w_v(L), where w is A, then B (paper,
section 3.1; (+) joins two vectors).

    lora.add(vit, rank=8); theta = lora.get(vit); lora.set(vit, theta_hat)
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from vit import prepare

WEIGHT_DECAY = 0.1                                              # paper, A.2


class LoRALinear(nn.Module):
    """A frozen linear layer `base` (d -> d_out), of any dtype, and its modulation in float32."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        device = base.weight.device
        self.base = base
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.zeros(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def modulated_weight(self):
        """W + (alpha / r) B A (d_out, d), in the dtype of W."""
        W = self.base.weight
        # W + B A is summed first: one product with x is quicker than W x, A x and B (A x), by 4 %
        # of a step. As measured, it is as accurate, though on a GPU the sum is rounded to bfloat16.
        return (W + self.scale * self.B @ self.A).to(W.dtype)

    def forward(self, x):                                       # (.., d) -> (.., d_out)
        return F.linear(x, self.modulated_weight(), self.base.bias)


def targets(vit):
    """The layers that are modulated, in theta's order, as pairs (module, name of its layer)."""
    return [(block.attn, name) for block in vit.blocks for name in ("query", "value")]


def adapters(vit):
    """The LoRALinear layers, in theta's order."""
    return [getattr(module, name) for module, name in targets(vit)]


def parameters(vit):
    """A and B of every adapter, in theta's order."""
    return [weight for layer in adapters(vit) for weight in (layer.A, layer.B)]


def add(vit, rank=8, alpha=8, generator=None):
    """Wraps query and value of every block, with a random theta (see `init`).

    Keep alpha when you change the rank, as Hu et al. do: the factor 1 / r makes up for the growth
    of B A with r.
    """
    for module, name in targets(vit):
        base = getattr(module, name)
        setattr(module, name, LoRALinear(base, rank, alpha))
    init(vit, generator)


@torch.no_grad()
def init(vit, generator=None):
    """Algorithm 1, line 5: a random theta. A is Kaiming-uniform, and B is zero."""
    for layer in adapters(vit):
        # Drawn on the CPU, so that every device begins with the same theta. sqrt(5) is what
        # nn.Linear and the code of Hu et al. use (their paper says Gaussian). With B = 0, training
        # begins at the bare substrate.
        A = torch.empty(layer.A.shape)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        layer.A.copy_(A)
        layer.B.zero_()


@torch.no_grad()
def get(vit):
    """theta: a copy of all adapter weights as one vector (P,), float32, P = L * 2 * 2 * r * d."""
    return nn.utils.parameters_to_vector(parameters(vit))


@torch.no_grad()
def set(vit, theta):
    """Copies theta (P,) into the adapters. ValueError if it has another shape or is not finite."""
    weights = parameters(vit)
    sizes = [weight.numel() for weight in weights]
    P = sum(sizes)
    # The argmax of NaN is 0: a broken theta would silently answer the first class.
    if theta.shape != (P,) or not theta.isfinite().all():
        raise ValueError(f"theta must be {P} finite numbers, but it is {theta}, of shape "
                         f"{tuple(theta.shape)}: did a memory recall it?")
    # Not PyTorch's vector_to_parameters: it would make the weights views of theta, but a CUDA graph
    # has recorded the addresses that they had when it was made.
    parts = theta.split(sizes)
    for weight, part in zip(weights, parts):
        weight.copy_(part.view_as(weight))


def split_key(theta):
    """theta (P,) -> k_t, its first 10 %, and the rest, which the paper writes theta_t / k_t (3.1).

    More than half of k_t is A, which starts at random: so keys of two tasks are nearly orthogonal.
    What a memory recalls begins with the key. To take other elements of theta as the key, permute
    theta in `get`, and back in `set`.
    """
    n = math.floor(0.1 * len(theta))
    # A slice keeps all of a tensor in memory: hence `clone`.
    return theta[:n].clone(), theta[n:].clone()


@torch.no_grad()
def merge(vit):
    """Adds (alpha / r) B A to each W and removes the adapters: a plain ViT, the same function.

    For the tests, and for you: til.py and mts.py do not merge.
    """
    for layer in adapters(vit):
        layer.base.weight.copy_(layer.modulated_weight())
    remove(vit)


def remove(vit):
    """Takes the adapters off: query and value are the layers `base` again."""
    for module, name in targets(vit):
        layer = getattr(module, name)
        setattr(module, name, layer.base)


# ---- training a modulation ---------------------------------------------------------------------
class Head(nn.Linear):
    """The classifier on the class token, in float32: (n, d) -> logits (n, classes)."""

    def forward(self, tokens):
        return super().forward(tokens.float())

    @torch.no_grad()
    def init(self, generator):
        """Small random weights, drawn on the CPU, and zero biases."""
        # Near zero, so that all classes are about as likely when the training begins.
        weight = torch.empty(self.weight.shape)
        nn.init.normal_(weight, std=0.02, generator=generator)
        self.weight.copy_(weight)
        self.bias.zero_()


class Classifier(nn.Module):
    """A ViT with LoRA, and a head; W stays frozen. plain: without CUDA graphs."""

    def __init__(self, vit, n_classes, plain):
        super().__init__()
        self.vit = vit
        self.head = Head(vit.config.width, n_classes, device=vit.cls_token.device)
        self.plain = plain
        self.graphs = {}                    # batch size -> the network as a CUDA graph

    def forward(self, images, flip=None, crop=None):
        """Logits (B, n_classes) for uint8 images (B, 3, h, w); flip and crop as in vit.prepare."""
        x = prepare(images, self.vit, flip, crop)
        if self.plain:
            return self.head(self.vit(x))
        # The kernels are so small that to start them one by one takes longer than to run them. A
        # CUDA graph starts all at once. One for each batch size serves every task, since `set` and
        # `init` write the weights of all tasks to the same place. (It reads its input from one
        # place, too, that of its example: hence `clone`.)
        if len(x) not in self.graphs:
            network = nn.Sequential(self.vit, self.head)
            self.graphs[len(x)] = torch.cuda.make_graphed_callables(network, (x.clone(),))
        return self.graphs[len(x)](x)

    def init(self, generator):
        """A random theta and a random head."""
        init(self.vit, generator)
        self.head.init(generator)


def flips(n, generator):
    """{"flip": which of n images are mirrored in an epoch, bool (n,)}."""
    return {"flip": torch.rand(n, generator=generator) < 0.5}


def flips_and_crops(n, generator, smallest=0.35):
    """Also "crop" (n, 3), as in vit.prepare: squares whose areas are uniform in [smallest, 1]."""
    area = smallest + (1 - smallest) * torch.rand(n, 1, generator=generator)
    side = area.sqrt()
    # The centre may be anywhere where the square stays inside the image.
    centre = (1 - side) * (2 * torch.rand(n, 2, generator=generator) - 1)
    crop = torch.cat([side, centre], dim=1)
    return {"crop": crop} | flips(n, generator)


def fit(classifier, images, labels, epochs, batch_size, lr, generator, augment=flips,
        label_smoothing=0.0, report=None):
    """Trains theta and the head, not W, to predict the labels (n,) of uint8 images (n, 3, h, w).

    lr: the learning rate at the start and at the end. augment(n, generator) -> {"flip": .., ..} is
    called before each epoch, report(epoch, loss, accuracy) after it, with epoch from 1 on. Returns
    the last loss and accuracy, in percent. ValueError for a loss like NaN.
    """
    n = len(labels)
    weights = [weight for weight in classifier.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr[0], weight_decay=WEIGHT_DECAY, fused=True)
    steps = epochs * math.ceil(n / batch_size)
    # The paper decays the rate, and does not say how.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=lr[1])
    for epoch in range(epochs):
        order = torch.randperm(n, generator=generator).to(labels.device)
        drawn = {name: x.to(labels.device) for name, x in augment(n, generator).items()}
        losses = []
        hits = []
        for start in range(0, n, batch_size):
            batch = slice(start, start + batch_size)
            y = labels[order[batch]]
            augmentation = {name: x[batch] for name, x in drawn.items()}    # row i is for order[i]
            logits = classifier(images[order[batch]], **augmentation)           # (B, n_classes)
            loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            # Not fetched until the epoch is over: at each number that is fetched, a GPU waits.
            losses.append(len(y) * loss.detach())
            hits.append(logits.argmax(1) == y)
        mean_loss = torch.stack(losses).sum().item() / n
        accuracy = 100 * torch.cat(hits).float().mean().item()
        # Fail now, rather than report an accuracy of chance at the end.
        if not math.isfinite(mean_loss):
            raise ValueError(f"the loss is {mean_loss}: look at the pictures and the weights")
        if report:
            report(epoch + 1, mean_loss, accuracy)
    return mean_loss, accuracy
