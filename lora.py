"""LoRA (Hu et al., arXiv 2106.09685): the modulation theta_t of one task, on each block's query and value.

A frozen projection W x becomes W x + (alpha / r) B A x, with A (r, d) and B (d, r). Joined to one vector,
theta = w_q(1) (+) w_v(1) (+) .. (+) w_q(L) (+) w_v(L), where each w is A, then B (paper, section 3.1).

    lora.add(vit, rank=8); theta = lora.get(vit); lora.set(vit, theta_hat)
"""
import math

import torch
import torch.nn as nn


class LoRALinear(nn.Module):
    """A frozen linear layer `base` (d -> d_out), of any dtype, and its modulation in float32."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.A = nn.Parameter(torch.zeros(rank, base.in_features, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x):                                       # (.., d) -> (.., d_out)
        rows, A, B = x.flatten(0, -2), self.A.to(x.dtype), self.B.to(x.dtype)       # (n, d)
        # W x + (alpha / r) B A x. addmm_ adds within the product: training is 2 to 3 % faster on a GPU.
        y = self.base(rows).addmm_(rows @ A.T, B.T, alpha=self.scale)
        return y.view(*x.shape[:-1], -1)


def adapters(vit):
    """The LoRALinear layers in theta's order: query and value of block 1, of block 2, .."""
    return [layer for block in vit.blocks for layer in (block.attn.query, block.attn.value)]


def parameters(vit):
    """A and B of every adapter, in theta's order: what the optimizer trains."""
    return [weight for layer in adapters(vit) for weight in (layer.A, layer.B)]


def add(vit, rank=8, alpha=8, generator=None):
    """Wraps query and value of every block, with a random theta (see `init`). Keep alpha when you change the
    rank, as Hu et al. do: the factor 1 / r makes up for the growth of B A with r."""
    for block in vit.blocks:
        block.attn.query = LoRALinear(block.attn.query, rank, alpha)
        block.attn.value = LoRALinear(block.attn.value, rank, alpha)
    init(vit, generator)


@torch.no_grad()
def init(vit, generator=None):
    """Algorithm 1, line 5: a random theta, drawn on the CPU. A is Kaiming-uniform, and B is zero."""
    for layer in adapters(vit):
        A = nn.init.kaiming_uniform_(torch.empty(layer.A.shape), a=math.sqrt(5), generator=generator)
        layer.A.copy_(A)
        layer.B.zero_()


@torch.no_grad()
def get(vit):
    """theta: a copy of all adapter weights as one vector (P,), float32, P = L * 2 * 2 * r * d."""
    return torch.cat([weight.flatten() for weight in parameters(vit)])


@torch.no_grad()
def set(vit, theta):
    """Copies theta (P,) into the adapters. RuntimeError for another length."""
    weights = parameters(vit)
    for weight, part in zip(weights, theta.split([weight.numel() for weight in weights])):
        weight.copy_(part.view_as(weight))


def split_key(theta):
    """theta (P,) -> k_t, its first 10 %, and the rest, which the paper writes theta_t / k_t (section 3.1).
    A recalled theta begins with the key. So for another key, reorder theta in `get` and `set`."""
    n = math.floor(0.1 * len(theta))
    return theta[:n].clone(), theta[n:].clone()                 # copies: a view is saved with all of theta


@torch.no_grad()
def merge(vit):
    """Adds (alpha / r) B A to each W and removes the adapters: the same function, in one plain ViT."""
    for layer in adapters(vit):
        layer.base.weight += layer.scale * layer.B @ layer.A
    remove(vit)


def remove(vit):
    """Takes the adapters off: the substrate is what it was before `add`."""
    for block in vit.blocks:
        block.attn.query, block.attn.value = block.attn.query.base, block.attn.value.base
