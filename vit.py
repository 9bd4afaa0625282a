"""A Vision Transformer (Dosovitskiy et al., arXiv 2010.11929): the frozen substrate W.

Query, key and value have separate projections, so that lora.py can wrap exactly query and value.

    vit = load("vit_ti_16")                 # frozen, with published weights
    tokens = features(vit, images)          # uint8 (n, 3, h, w) -> class tokens (n, d)
"""
import pickle
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---- the network -------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention: softmax(Q K^T / sqrt(d / h)) V, then a projection."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):                   # (B, N, d) -> (B, N, d)
        B, N, d = x.shape
        h = self.heads
        q = self.query(x).view(B, N, h, d // h).transpose(1, 2)     # (B, h, N, d / h)
        k = self.key(x).view(B, N, h, d // h).transpose(1, 2)       # (B, h, N, d / h)
        v = self.value(x).view(B, N, h, d // h).transpose(1, 2)     # (B, h, N, d / h)
        y = F.scaled_dot_product_attention(q, k, v)                 # (B, h, N, d / h)
        y = y.transpose(1, 2).reshape(B, N, d)                      # heads side by side
        return self.proj(y)


class Block(nn.Module):
    """A pre-norm transformer block: x + attention, then x + MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):                   # (B, N, d) -> (B, N, d)
        x = x + self.attn(self.norm1(x))
        hidden = F.gelu(self.fc1(self.norm2(x)))                    # (B, N, 4 d)
        return x + self.fc2(hidden)


class ViT(nn.Module):
    """Prepared images (B, 3, s, s), s = image_size -> class tokens (B, d) after the last norm."""

    def __init__(self, config, image_size=None):
        super().__init__()
        size = image_size or config.image_size
        if size % config.patch:
            raise ValueError(f"image size {size} is not a multiple of the patch, {config.patch}")
        width = config.width
        n_patches = (size // config.patch) ** 2
        self.config = config
        self.image_size = size
        self.patch_embed = nn.Conv2d(3, width, config.patch, stride=config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + n_patches, width))
        blocks = [Block(width, config.heads) for _ in range(config.depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        # Mean and std of the pixels. Not persistent, because published files do not hold them.
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)

    def forward(self, images):
        x = self.patch_embed(images)                                # (B, d, s / patch, s / patch)
        x = x.flatten(2).transpose(1, 2)                            # (B, N, d)
        cls_token = self.cls_token.expand(len(x), -1, -1)           # (B, 1, d)
        x = torch.cat([cls_token, x], dim=1)                        # (B, 1 + N, d)
        x = self.blocks(x + self.pos_embed)                         # (B, 1 + N, d)
        return self.norm(x[:, 0])                                   # (B, d)


# ---- from pixels to class tokens ---------------------------------------------------------------
def prepare(images, vit, flip=None, crop=None):
    """uint8 images (B, 3, h, w) -> the input of the ViT (B, 3, s, s).

    flip: bool (B,), the images to mirror. crop: (B, 3), rows (side, x, y), a square window of each
    image, which spans [-1, 1] x [-1, 1]: (x, y) is the window's centre, and side its share of the
    image's side. Images that are no squares are squashed.
    """
    x = images.float() / 255
    if flip is not None:
        x = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)
    if crop is None:
        x = resize(x, vit.image_size)
    else:
        x = cut_out(x, crop, vit.image_size)
    # Each substrate was trained on pixels that were normalised in its own way.
    x = (x - vit.mean) / vit.std
    return x.to(vit.cls_token.dtype)


def resize(x, size):
    """x (B, 3, h, w) with values in [0, 1] -> (B, 3, size, size)."""
    x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
    return x.clamp(0, 1)                    # a bicubic curve overshoots


def cut_out(x, crop, size):
    """The squares `crop` (B, 3) of x (B, 3, h, w), as (B, 3, size, size)."""
    # grid_sample has no antialias: a larger image is reduced before it is sampled.
    if x.shape[-1] > size:
        x = resize(x, size)
    # Each window is an affine map [side I | centre]: a point p of it shows x at side p + centre.
    side, centre = crop[:, :1, None], crop[:, 1:, None]             # (B, 1, 1), (B, 2, 1)
    scale = side * torch.eye(2, device=x.device)                    # (B, 2, 2)
    window = torch.cat([scale, centre], dim=2)                      # (B, 2, 3)
    grid = F.affine_grid(window, (len(x), 3, size, size), align_corners=False)
    x = F.grid_sample(x, grid, "bicubic", "reflection", align_corners=False)
    return x.clamp(0, 1)


@torch.no_grad()
def features(vit, images):
    """uint8 images (n, 3, h, w) -> class tokens (n, d), float32, on the device of the ViT."""
    device = vit.cls_token.device
    batch_size = 250 if device.type == "cpu" else 1000              # small ones leave a GPU idle
    tokens = [vit(prepare(batch.to(device), vit)) for batch in images.split(batch_size)]
    return torch.cat(tokens).float()


# ---- the substrates and their published weights ------------------------------------------------
class Config(NamedTuple):
    """Architecture and published weights of a substrate."""
    image_size: int                         # side of the input in pixels
    patch: int                              # side of a patch
    width: int                              # d
    depth: int                              # blocks
    heads: int                              # h
    mean: tuple = (0.485, 0.456, 0.406)     # of pixels in [0, 1]; ImageNet's
    std: tuple = (0.229, 0.224, 0.225)
    url: str = None                         # of the weights; None: they are in weights/
    names: tuple = ()                       # patterns: the names in that file -> ours


TIMM = (
    (r"^patch_embed\.proj", "patch_embed"),
    (r"\.mlp\.", "."),
)
DINOV2 = (
    *TIMM,
    (r"\.ls1\.gamma", ".attn.proj.gamma"),
    (r"\.ls2\.gamma", ".fc2.gamma"),
)
TORCHVISION = (
    (r"^class_token", "cls_token"),
    (r"^encoder\.pos_embedding", "pos_embed"),
    (r"^conv_proj", "patch_embed"),
    (r"^encoder\.layers\.encoder_layer_", "blocks."),
    (r"^encoder\.ln", "norm"),
    (r"\.ln_", ".norm"),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj", ".attn.proj"),
    (r"\.mlp\.(0|linear_1)", ".fc1"),
    (r"\.mlp\.(3|linear_2)", ".fc2"),
)
CONFIGS = {
    "vit_micro": Config(                    # ours: weights/pretrain.py
        image_size=64, patch=8, width=192, depth=6, heads=3),
    "vit_ti_16": Config(                    # Steiner et al., arXiv 2106.10270
        image_size=224, patch=16, width=192, depth=12, heads=3,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), names=TIMM,
        url="https://huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
            "/resolve/main/pytorch_model.bin"),
    "dinov2_vits14": Config(                # Oquab et al., arXiv 2304.07193; there 518 pixels
        image_size=112, patch=14, width=384, depth=12, heads=6, names=DINOV2,
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"),
    "vit_b_16": Config(                     # torchvision's ViT_B_16_Weights.IMAGENET1K_V1
        image_size=224, patch=16, width=768, depth=12, heads=12, names=TORCHVISION,
        url="https://download.pytorch.org/models/vit_b_16-c867db91.pth"),
}


def load(name, weights=None, image_size=None):
    """The substrate `name` of CONFIGS: pretrained, frozen, float32, in eval mode.

    weights: a file in the published layout, in place of the published or shipped one. ValueError
    for a size or a file that does not fit.
    """
    config = CONFIGS[name]
    vit = ViT(config, image_size)
    source = weights or config.url or Path(__file__).with_name("weights") / f"{name}.pt"
    try:
        state = rename(read_weights(name, source), config.names)
        n = vit.image_size // config.patch
        state["pos_embed"] = resize_positions(state["pos_embed"], n)
        vit.load_state_dict(state)
    except Exception as error:
        # Many kinds: no network, no such file, no weights in it, or those of another network.
        if source == config.url:
            # If it was cut short, or is a page of HTML, it must not be found again.
            Path(torch.hub.get_dir(), "checkpoints", f"{name}.pth").unlink(missing_ok=True)
        reason = textwrap.shorten(str(error), 400)
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is damaged, or holds other things than tensors"
        raise ValueError(f"{source} does not give the weights of {name} ({reason}): "
                         "try --weights, or --backbone vit_micro") from error
    return vit.requires_grad_(False).eval()


def read_weights(name, source):
    """{name: tensor}, from a file or, downloaded once and kept, from the URL of a substrate."""
    if source == CONFIGS[name].url:
        return torch.hub.load_state_dict_from_url(
            source, map_location="cpu", file_name=f"{name}.pth", weights_only=True)
    if str(source).endswith(".safetensors"):
        raise ValueError("a safetensors file: take the pytorch_model.bin beside it")
    return torch.load(source, map_location="cpu", weights_only=True)


def rename(state, rules):
    """Published weights by name -> ours, without those that we do not need."""
    # A training program may have saved them beside an optimizer. (DataParallel adds "module.".)
    for wrapper in ("model", "state_dict"):
        state = state.get(wrapper, state)
    renamed = {}
    for name, weight in state.items():
        name = name.removeprefix("module.")
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:                 # three layers in one: (3 d, ..)
            for part, rows in zip(("query", "key", "value"), weight.chunk(3)):
                renamed[name.replace("qkv", part)] = rows
        elif not re.match(r"mask_token|heads?\.", name):
            renamed[name] = weight
    return absorb_layer_scale(renamed)


def absorb_layer_scale(state):
    """Multiplies DINOv2's LayerScale (arXiv 2103.17239) into the layer before it.

    gamma (W x + b) = (gamma W) x + gamma b, so the blocks need not know of it.
    """
    for name in [name for name in state if name.endswith(".gamma")]:
        gamma = state.pop(name)
        layer = name.removesuffix(".gamma")
        state[f"{layer}.weight"] = gamma[:, None] * state[f"{layer}.weight"]
        state[f"{layer}.bias"] = gamma * state[f"{layer}.bias"]
    return state


def resize_positions(pos_embed, n):
    """Position embeddings (1, 1 + m^2, d) -> (1, 1 + n^2, d) for n x n patches, DINOv2's way."""
    # The class token has no place in the grid: its embedding stays as it is.
    of_token, of_patches = pos_embed.float().split([1, pos_embed.shape[1] - 1], dim=1)
    m = round(of_patches.shape[1] ** 0.5)
    if n == m:
        return pos_embed
    planes = of_patches.unflatten(1, (m, m)).permute(0, 3, 1, 2)    # (1, d, m, m)
    # With n / m, rounding may give n - 1 patches: so DINOv2 adds 0.1.
    planes = F.interpolate(planes, scale_factor=(n + 0.1) / m, mode="bicubic")
    of_patches = planes.flatten(2).transpose(1, 2)                  # (1, n^2, d)
    return torch.cat([of_token, of_patches], dim=1)
