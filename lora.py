"""LoRA (Hu et al., arXiv 2106.09685): the modulation theta_t of one task, on the query and value of every block.

A frozen projection W x becomes W x + (alpha / r) B A x with A (r, d) and B (d, r). All A and B together, flattened, are
theta = w_q(1) + w_v(1) + ... + w_q(L) + w_v(L) (concatenated; paper, section 3.1), each w being A and then B.

    lora.add(vit, rank=8); theta = lora.get(vit); lora.set(vit, theta_hat)
"""
import math

import torch
import torch.nn as nn


KEY_SHARE = 0.1                                                              # |k_t| = floor(0.1 |theta_t|), section 3.1
ALPHA = 8                                                                    # scale 1 at the paper's rank 8


class LoRALinear(nn.Module):
    """A frozen linear layer `base` (d -> d_out), in any dtype, and its low-rank modulation, in float32."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        self.A = nn.Parameter(torch.zeros(rank, base.in_features, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x):                                                    # (..., d) -> (..., d_out)
        rows = x.flatten(0, -2)                                              # (n, d)
        low = rows @ self.A.T.to(x.dtype)                                    # (n, r)
        y = self.base(rows).addmm_(low, self.B.T.to(x.dtype), alpha=self.scale)      # + scale * low @ B^T, in one kernel
        return y.view(*x.shape[:-1], -1)


def adapters(vit):
    """The LoRALinear layers in theta's order: query, value of block 1, of block 2, ..."""
    layers = [layer for block in vit.blocks for layer in (block.attn.query, block.attn.value)]
    if not all(isinstance(layer, LoRALinear) for layer in layers):
        raise ValueError("this ViT has no LoRA adapters: call lora.add first")
    return layers


def parameters(vit):
    """A and B of every adapter, in theta's order: what an optimizer trains."""
    return [weight for layer in adapters(vit) for weight in (layer.A, layer.B)]


def add(vit, rank=8, alpha=ALPHA, generator=None):
    """Wraps query and value of every block. A is drawn as in `init`, B = 0.

    alpha stays when the rank changes, as Hu et al. have it. AdamW moves each element by about the learning rate, so the r terms of
    B A together move in proportion to r, and (alpha / r) B A in proportion to alpha, whatever the rank.
    Raises ValueError for a rank below 1 or a ViT that has adapters already.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} is not a positive number")
    for block in vit.blocks:
        if isinstance(block.attn.query, LoRALinear):
            raise ValueError("this ViT has LoRA adapters already: call lora.remove first")
        block.attn.query = LoRALinear(block.attn.query, rank, alpha)
        block.attn.value = LoRALinear(block.attn.value, rank, alpha)
    init(vit, generator)


@torch.no_grad()
def init(vit, generator=None):
    """Algorithm 1, line 5: a random theta. A is Kaiming-uniform as in LoRA's own code, U(-1/sqrt(d), 1/sqrt(d)); B is zero.

    Drawn on the CPU, so that the same generator (a CPU one) gives the same theta on every device.
    """
    for layer in adapters(vit):
        A = nn.init.kaiming_uniform_(torch.empty(layer.A.shape), a=math.sqrt(5), generator=generator)
        layer.A.copy_(A)
        layer.B.zero_()


@torch.no_grad()
def get(vit):
    """theta: a copy of all adapter weights as one vector (P,), P = L * 2 * 2 * r * d."""
    return torch.cat([weight.flatten() for weight in parameters(vit)])


@torch.no_grad()
def set(vit, theta):
    """Loads theta (P,) into the adapters, exactly; the substrate is not touched. Raises ValueError for another length."""
    weights = parameters(vit)
    sizes = [weight.numel() for weight in weights]
    if theta.shape != (sum(sizes),):
        raise ValueError(f"theta is {tuple(theta.shape)}, the adapters hold ({sum(sizes)},)")
    theta = theta.to(weights[0].device)                                      # at once, not part by part
    for weight, part in zip(weights, theta.split(sizes)):
        weight.copy_(part.view_as(weight))


def split_key(theta):
    """theta (..., P) -> the task identification vector k_t (..., floor(0.1 P)), its start, and the rest (section 3.1).

    Both are copies: with a view, torch.save would keep all of theta.
    """
    n = math.floor(KEY_SHARE * theta.shape[-1])
    return theta[..., :n].clone(), theta[..., n:].clone()


@torch.no_grad()
def merge(vit):
    """Adds (alpha / r) B A to each W and removes the adapters: the same function as one plain ViT. Changes the substrate."""
    for layer in adapters(vit):
        layer.base.weight += layer.scale * layer.B @ layer.A
    remove(vit)


def remove(vit):
    """Takes the adapters off again: the substrate as it was before `add`."""
    adapters(vit)                                                            # raises if there are none
    for block in vit.blocks:
        block.attn.query, block.attn.value = block.attn.query.base, block.attn.value.base
