"""LoRA (Hu et al., arXiv 2106.09685): a Vision Transformer that is modulated by a vector theta.

LoRA does not touch a trained matrix W. It learns a small correction of W, as the product of two
thin matrices:

    W x    becomes    W x + (alpha / r) B (A x)        with A (r, d), B (d, r), and a rank r like 8

The paper corrects the query and the value projection of every block. The A and B of all of them,
joined to one long vector, are the modulation theta of a task (section 3.1, where (+) joins two
vectors):

    theta = w_q(1) (+) w_v(1) (+) w_q(2) (+) .. (+) w_v(L)          where w is an A, then its B

How it is used:

    net = ModulatedViT(vit, rank=8)
    net.theta                           # (P,), a parameter: the only one that is trained
    net.theta.copy_(theta_hat)          # under torch.no_grad(): now theta_hat modulates the ViT
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(nn.Module):
    """A frozen linear layer `base`, W x + b, whose W (d, d) is corrected by `delta`."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.delta = None                       # (d, d), (alpha / r) B A; ModulatedViT sets it

    def forward(self, x):                       # (.., d) -> (.., d)
        # W x + delta x is (W + delta) x. Adding the matrices first saves us a second product.
        return F.linear(x, self.base.weight + self.delta, self.base.bias)


class ModulatedViT(nn.Module):
    """A frozen ViT whose query and value projections are modulated by `theta` (P,).

    With a head on top, it is the paper's C(x; W, theta): W are the weights of the ViT. theta has
    P = L * 2 * 2 * r * d elements: L blocks, query and value, A and B. It is float32, even if W is
    bfloat16.
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
        P = len(self.layers) * 2 * rank * vit.config.width
        self.theta = nn.Parameter(torch.zeros(P, device=vit.cls_token.device))
        self.graphs = {}                        # batch size -> CUDA graph, see `graphed`

    def factors(self):
        """A (2 L, r, d) and B (2 L, d, r) of all layers. They are views of theta, not copies."""
        d = self.vit.config.width
        pairs = self.theta.view(len(self.layers), 2, self.rank * d)
        A, B = pairs.unbind(1)                                      # (2 L, r d) each
        return A.view(-1, self.rank, d), B.view(-1, d, self.rank)

    def forward(self, x):                       # prepared images (B, 3, s, s) -> tokens (B, d)
        A, B = self.factors()
        deltas = self.scale * B @ A             # (2 L, d, d): one product serves all layers
        deltas = deltas.to(self.vit.cls_token.dtype)
        for layer, delta in zip(self.layers, deltas):
            layer.delta = delta
        return self.vit(x)

    def prepare(self, images, **changes):
        """ViT.prepare."""
        return self.vit.prepare(images, **changes)

    @torch.no_grad()
    def reset(self, generator):
        """Begins a new, random theta (Algorithm 1, line 5).

        A is drawn as nn.Linear draws its weights, and B is zero. So B A is zero, too, and training
        begins at the unmodulated ViT.
        """
        A, B = self.factors()
        bound = A.shape[2] ** -0.5                                  # 1 / sqrt(d)
        # Drawn on the CPU, so that every device begins with the same numbers.
        A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=generator))
        B.zero_()

    def graphed(self, x):
        """Speed: the same as self(x), for training on a GPU.

        The kernels of a training step are so short that the GPU waits for Python to start each of
        them. A CUDA graph records them once for a batch size, and then starts all of them at once.
        On an H100, a step of a ViT-Ti/16 is nine times as fast. A graph records addresses, too. So
        theta always stays where it is: we copy new values into it.
        """
        B = len(x)
        if B not in self.graphs:
            # make_graphed_callables changes the module that it is given. So we give it a shell.
            shell = nn.Sequential(self)
            self.graphs[B] = torch.cuda.make_graphed_callables(shell, (x.clone(),))
        return self.graphs[B](x)


def split_key(theta):
    """theta (P,) -> the key k_t, which is its first tenth, and the value, theta without the key.

    The paper writes the value theta_t / k_t (section 3.1). Why can a piece of theta be a key? More
    than half of it are elements of an A, and every task begins with another random A. So the keys
    of two tasks are nearly orthogonal, and a memory can tell them apart.
    """
    n = len(theta) // 10
    return theta[:n].clone(), theta[n:].clone()
