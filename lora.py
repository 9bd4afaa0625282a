"""LoRA (Hu et al., arXiv 2106.09685): a Vision Transformer that is modulated by a vector theta.

LoRA does not touch a trained matrix W. It learns a small correction of W, the product of two thin
matrices:

    W x    becomes    W x + (alpha / r) B (A x)        with A (r, d) and B (d, r)

Here d is the width of the ViT, and the rank r is a small number like 8. The paper corrects the
query and the value projection of every block. The A and B of all these layers, joined to one long
vector, are the modulation theta of a task (section 3.1, where (+) joins two vectors):

    theta = w_q(1) (+) w_v(1) (+) w_q(2) (+) .. (+) w_v(L)

w_q(1) are the elements of the A of the query in block 1, and then those of its B. (The paper does
not say whether A or B comes first.) L is the number of blocks. How it is used:

    net = ModulatedViT(vit, rank=8)
    net.theta                           # (P,): the only parameter of net that is trained
    with torch.no_grad():
        net.theta.copy_(theta_hat)      # from now on, theta_hat modulates the ViT
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Module):
    """A frozen linear layer `base`, W x + b, whose W (d, d) is corrected by `delta`."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.delta = None                       # (d, d); ModulatedViT.forward sets it in each call

    def forward(self, x):                       # (.., d) -> (.., d)
        # W x + delta x = (W + delta) x. So we compute W + delta first. Then one product with x is
        # enough, in place of three, with W, A and B.
        return F.linear(x, self.base.weight + self.delta, self.base.bias)


class ModulatedViT(nn.Module):
    """A frozen ViT whose query and value projections are modulated by `theta` (P,).

    It changes `vit` itself: these layers become LoRALinear. With a head on top (see til.py), it is
    the paper's C(x; W, theta). In C, W means all weights of the ViT, and not only one matrix.
    theta has P = L * 2 * 2 * r * d elements: L blocks, query and value, A and B. It is float32, and
    W can be bfloat16.
    """

    def __init__(self, vit, rank=8, alpha=8):
        super().__init__()
        self.vit = vit.requires_grad_(False)
        self.layers = []                        # the modulated layers, in the order of theta
        for block in vit.blocks:
            block.attn.query = LoRALinear(block.attn.query)
            block.attn.value = LoRALinear(block.attn.value)
            self.layers += [block.attn.query, block.attn.value]
        self.rank = rank
        self.scale = alpha / rank
        P = len(self.layers) * 2 * rank * vit.config.width          # 2: an A and a B
        self.theta = nn.Parameter(torch.zeros(P, device=vit.cls_token.device))
        self.graphs = {}                        # for `graphed`, below

    def factors(self):
        """A (2 L, r, d) and B (2 L, d, r) of all 2 L layers: query 1, value 1, query 2, ..

        They are views of theta, and not copies: what is written into A or B is written into theta.
        """
        d = self.vit.config.width
        pairs = self.theta.view(len(self.layers), 2, self.rank * d)
        A, B = pairs.unbind(1)                                      # (2 L, r d) each
        return A.view(-1, self.rank, d), B.view(-1, d, self.rank)

    def forward(self, x):               # prepared images (n, 3, s, s) -> class tokens (n, d)
        A, B = self.factors()
        deltas = self.scale * (B @ A)           # (2 L, d, d), for all layers at once
        # x has the dtype of W, which may be bfloat16. theta stays float32, so that the small steps
        # of its training are not rounded away.
        deltas = deltas.to(x.dtype)
        for layer, delta in zip(self.layers, deltas):
            layer.delta = delta
        return self.vit(x)

    def prepare(self, images, **changes):
        """Resizes and normalises images. changes are flip and crop: see ViT.prepare."""
        return self.vit.prepare(images, **changes)

    @torch.no_grad()
    def reset(self, generator):
        """Sets theta to random values, with which training begins (Algorithm 1, line 5).

        A is uniform in +-1 / sqrt(d), as in nn.Linear, and B is zero. So B A is zero, and training
        begins at the unmodulated ViT. (If A were zero as well, B would never get a gradient.)
        """
        A, B = self.factors()
        bound = A.shape[2] ** -0.5
        # Drawn on the CPU, so that every device begins with the same numbers.
        A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=generator))
        B.zero_()

    # ---- speed: you can skip this method -------------------------------------------------------
    def graphed(self, x):
        """The same as self(x), for training on a GPU. A step is several times as fast.

        The kernels of a training step are so short that the GPU waits for Python to start each of
        them. A CUDA graph is a recording of all of them, which are then started together. It refers
        to theta by its address. So we never replace theta, but copy values into it. Each size of a
        batch has a graph of its own, because the last batch of an epoch is often smaller.
        """
        batch_size = len(x)
        if batch_size not in self.graphs:
            # make_graphed_callables replaces the `forward` of the module that it is given. We still
            # need that of `self`, so we give it a wrapper.
            wrapper = nn.Sequential(self)
            # The graph keeps the copy of x, and overwrites it with each new batch.
            self.graphs[batch_size] = torch.cuda.make_graphed_callables(wrapper, (x.clone(),))
        return self.graphs[batch_size](x)


# ---- the key -----------------------------------------------------------------------------------
def split_key(theta):
    """theta (P,) -> the key k_t, its first floor(0.1 P) elements, and the value, all others.

    The paper (section 3.1) writes the value theta_t / k_t, which is not a division. (This key and
    this value belong to a memory. They are not those of attention.)

    Why can a piece of theta be a key? Every task begins with random matrices A of its own, and more
    than half of the elements of a key belong to an A. Training changes A, but the keys of two tasks
    still point in very different directions (see the numbers in hopfield.py). So a memory can tell
    them apart. (Why more than half? With 12 blocks, theta has 48 matrices: A, B, A, B, and so on. A
    tenth of them are A, B, A, B and 0.8 of an A. With the 6 blocks of vit_micro, they are A, B and
    0.4 of an A.)
    """
    n = len(theta) // 10
    return theta[:n].clone(), theta[n:].clone()
