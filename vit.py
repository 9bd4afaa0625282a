"""A Vision Transformer (Dosovitskiy et al., arXiv 2010.11929): the backbone, which stays frozen.

The paper calls it the substrate model, and its pretrained weights W.

    vit = load("vit_ti_16")                 # with published weights
    tokens = features(vit, images)          # uint8 (n, 3, h, w) -> class tokens (n, d)

In many programs, such as timm, query, key and value are one layer. Here they are three, so that
lora.py can modulate query and value alone. The network comes first. If you read this file beside
the paper, you can stop at "published weights".
"""
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import Mistake


# ---- the network -------------------------------------------------------------------------------
class Attention(nn.Module):
    """Multi-head self-attention on N tokens: softmax(Q K^T / sqrt(d / h)) V, then a projection."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, n=None):           # (B, N, d) -> (B, n, d)
        # n: how many tokens are needed. The last block of a ViT needs only the first one, the class
        # token. All other blocks need all (n is None).
        h = self.heads
        q = self.query(x[:, :n]).unflatten(2, (h, -1)).transpose(1, 2)      # (B, h, n, d / h)
        k = self.key(x).unflatten(2, (h, -1)).transpose(1, 2)               # (B, h, N, d / h)
        v = self.value(x).unflatten(2, (h, -1)).transpose(1, 2)             # (B, h, N, d / h)
        y = F.scaled_dot_product_attention(q, k, v)                         # (B, h, n, d / h)
        return self.proj(y.transpose(1, 2).flatten(2))                      # all heads side by side


class Block(nn.Module):
    """A pre-norm transformer block: x + attention, then x + MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x, n=None):           # (B, N, d) -> (B, n, d); n: see Attention
        x = x[:, :n] + self.attn(self.norm1(x), n)
        hidden = F.gelu(self.fc1(self.norm2(x)))                    # (B, n, 4 d)
        return x + self.fc2(hidden)


class ViT(nn.Module):
    """From prepared images (B, 3, s, s) to their class tokens (B, d).

    An image is cut into m rows of m patches, and each patch becomes a token. The class token is put
    before them. After the last block, it represents the whole image.
    """

    def __init__(self, config, image_size=None):
        super().__init__()
        size = image_size or config.image_size
        if size % config.patch:
            raise Mistake(f"an image of {size} pixels cannot be cut into patches of "
                          f"{config.patch}: --image-size must be a multiple of {config.patch}")
        width = config.width
        self.config = config
        self.image_size = size                                      # s
        self.m = size // config.patch                               # patches in a row
        self.patch_embed = nn.Linear(3 * config.patch ** 2, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + self.m ** 2, width))
        blocks = [Block(width, config.heads) for _ in range(config.depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        # The mean and std of the pixels are not weights: they stay out of the state dict.
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)

    def forward(self, x):                   # (B, 3, s, s) -> (B, d)
        m = self.m
        x = x.unflatten(3, (m, -1)).unflatten(2, (m, -1))           # (B, 3, m, patch, m, patch)
        x = x.permute(0, 2, 4, 1, 3, 5)                             # (B, m, m, 3, patch, patch)
        x = x.flatten(3).flatten(1, 2)                              # (B, m^2, 3 patch^2)
        x = self.patch_embed(x)                                     # (B, m^2, d)
        cls_token = self.cls_token.expand(len(x), -1, -1)           # (B, 1, d)
        x = torch.cat([cls_token, x], dim=1)                        # (B, 1 + m^2, d)
        x = self.blocks[:-1](x + self.pos_embed)                    # (B, 1 + m^2, d)
        # Only the class token is used after the last block, so this block computes no other.
        x = self.blocks[-1](x, n=1)                                 # (B, 1, d)
        return self.norm(x[:, 0])                                   # (B, d)

    def prepare(self, images, flip=None, crop=None):
        """From uint8 images (B, 3, h, w) to the input of `forward` (B, 3, s, s).

        flip: bool (B,), which images to mirror.
        crop: float (B, 3), a square window (side, x, y) for each image. side is the side of the
            window, divided by that of the image. (x, y) is the centre of the window, where the
            image spans [-1, 1].
        """
        x = images.float() / 255
        if flip is not None:
            x = torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)
        if crop is None:
            x = resize(x, self.image_size)
        else:
            x = cut_out(x, crop, self.image_size)
        return ((x - self.mean) / self.std).to(self.cls_token.dtype)    # the dtype of W


def resize(x, size):
    """Resizes x (B, 3, h, w), with values in [0, 1], to (B, 3, size, size)."""
    x = F.interpolate(x, (size, size), mode="bicubic", antialias=True)
    return x.clamp(0, 1)                    # bicubic values may lie outside


def cut_out(x, crop, size):
    """Cuts the windows `crop` (B, 3) out of x (B, 3, h, w), and makes them (B, 3, size, size)."""
    # grid_sample has no antialiasing, so it should not make images smaller. So a larger image is
    # resized first, with antialiasing, and the window is cut out of that.
    if x.shape[-1] > size:
        x = resize(x, size)
    # The centres of the pixels (size, size, 2), as points (x, y) of [-1, 1] x [-1, 1].
    axis = (2 * torch.arange(size, device=x.device) + 1) / size - 1
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=2)
    # The output at a point p is the image at side * p + centre.
    side, centre = crop[:, :1], crop[:, 1:]                         # (B, 1), (B, 2)
    grid = side[:, None, None] * points + centre[:, None, None]     # (B, size, size, 2)
    x = F.grid_sample(x, grid, "bicubic", "reflection", align_corners=False)
    return x.clamp(0, 1)


@torch.no_grad()
def features(net, images):
    """The class tokens (n, d), float32, of uint8 images (n, 3, h, w), by a ViT or a ModulatedViT.

    The tokens are on the device of the network.
    """
    net.eval()                              # for layers such as dropout, if you add one
    device = next(net.parameters()).device
    batch_size = 250 if device.type == "cpu" else 1000      # a GPU needs large ones to be busy
    tokens = [net(net.prepare(batch.to(device))) for batch in images.split(batch_size)]
    return torch.cat(tokens).float()


# ---- the architectures -------------------------------------------------------------------------
class Config(NamedTuple):
    """The architecture of a ViT, and where its weights come from."""
    image_size: int                         # side of the input in pixels
    patch: int                              # side of a patch in pixels
    width: int                              # d
    depth: int                              # number of blocks
    heads: int                              # h
    mean: tuple = (0.485, 0.456, 0.406)     # of pixels in [0, 1]; these are ImageNet's
    std: tuple = (0.229, 0.224, 0.225)
    url: str = None                         # None: the weights are in the folder weights/


CONFIGS = {
    "vit_micro": Config(                    # pretrained on TinyImageNet by weights/pretrain.py
        image_size=64, patch=8, width=192, depth=6, heads=3),
    "vit_ti_16": Config(                    # Steiner et al., arXiv 2106.10270
        image_size=224, patch=16, width=192, depth=12, heads=3,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        url="https://huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
            "/resolve/main/pytorch_model.bin"),
    "dinov2_vits14": Config(                # Oquab et al., arXiv 2304.07193. Trained at 518 pixels
        image_size=112, patch=14, width=384, depth=12, heads=6,
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"),
    "vit_b_16": Config(                     # torchvision's ViT_B_16_Weights.IMAGENET1K_V1
        image_size=224, patch=16, width=768, depth=12, heads=12,
        url="https://download.pytorch.org/models/vit_b_16-c867db91.pth"),
}


# ---- published weights -------------------------------------------------------------------------
# The network ends above. What follows only loads weights, and gives them our names and shapes.
def load(name, weights=None, image_size=None):
    """The ViT `name` of CONFIGS with its pretrained weights, float32.

    weights: a file to take in place of the published weights.
    Raises Mistake if the weights cannot be had, or do not fit the network.
    """
    vit = ViT(CONFIGS[name], image_size)
    path = weights or find_weights(name)
    published = read_weights(path)
    try:
        state = rename(published)
        if "pos_embed" in state:
            state["pos_embed"] = resize_positions(state["pos_embed"], vit.m)
        vit.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        # A weight is missing, unknown or of another shape.
        raise Mistake(f"{path} does not fit {name}, or names its weights in another way than timm, "
                      f"DINOv2 and torchvision (its first are {list(published)[:3]}): "
                      f"{str(error)[:400]}") from error
    return vit


def find_weights(name):
    """The file of the published weights. It is downloaded once, to the folder of torch.hub."""
    url = CONFIGS[name].url
    if url is None:
        return Path(__file__).parent / "weights" / f"{name}.pt"
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.pth"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, path)
        except Exception as error:          # of many kinds: a network can fail in many ways
            raise Mistake(f"cannot download {url} ({error}): give a file with --weights, or use "
                          "--backbone vit_micro, whose weights are here") from error
    return path


def read_weights(path):
    """{name: tensor} from a file that torch.save has written."""
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a check sum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        # A training program may have saved its network together with other things.
        for part in ("model", "state_dict", "model_state_dict"):
            state = state.get(part, state)
        return {name: weight.float() for name, weight in state.items()}
    except FileNotFoundError as error:
        raise Mistake(f"there is no file {path} with weights") from error
    except Exception as error:              # of many kinds: it depends on what the file is
        raise Mistake(f"{path} holds no weights, or is damaged ({error}): expected a dictionary of "
                      "tensors, written by torch.save (and not .safetensors). If it is a download "
                      "that was cut short, remove it") from error


# Names in published files, and ours, in the order in which they are replaced. timm and DINOv2 name
# nearly all layers as we do, and torchvision (from class_token on) names them differently.
OUR_NAMES = {
    r"^module\.": "",                                   # a network that was trained on several GPUs
    r"^patch_embed\.proj": "patch_embed",
    r"\.mlp\.fc": ".fc",
    r"^class_token": "cls_token",
    r"^encoder\.pos_embedding": "pos_embed",
    r"^conv_proj": "patch_embed",
    r"^encoder\.layers\.encoder_layer_": "blocks.",
    r"^encoder\.ln": "norm",
    r"\.ln_": ".norm",
    r"\.self_attention\.in_proj_": ".attn.qkv.",
    r"\.self_attention\.out_proj": ".attn.proj",
    r"\.mlp\.(0|linear_1)": ".fc1",
    r"\.mlp\.(3|linear_2)": ".fc2",
}
# mask_token is for DINOv2's pretraining, and head or heads is a classifier for ImageNet's classes.
NOT_NEEDED = r"(mask_token|heads?\.)"


def rename(state):
    """Published weights -> the same weights under our names, and in our shapes."""
    ours = {}
    for name, weight in state.items():
        for theirs, our in OUR_NAMES.items():
            name = re.sub(theirs, our, name)
        if ".qkv." in name:                 # one layer (3 d, ..) for query, key and value
            for part, rows in zip(("query", "key", "value"), weight.chunk(3)):
                ours[name.replace("qkv", part)] = rows
        elif name == "patch_embed.weight":  # a convolution (d, 3, patch, patch), for us a matrix
            ours[name] = weight.flatten(1)
        elif not re.match(NOT_NEEDED, name):
            ours[name] = weight
    return absorb_layer_scale(ours)


def absorb_layer_scale(state):
    """Multiplies DINOv2's LayerScale (arXiv 2103.17239) into the layer before it.

    DINOv2 multiplies the output of two layers of each block by a vector gamma. As
    gamma (W x + b) = (gamma W) x + gamma b, we can do that once, with their weights.
    """
    for gamma_name in [name for name in state if name.endswith(".gamma")]:
        gamma = state.pop(gamma_name)
        layer = gamma_name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "fc2")
        state[f"{layer}.weight"] = gamma[:, None] * state[f"{layer}.weight"]
        state[f"{layer}.bias"] = gamma * state[f"{layer}.bias"]
    return state


def resize_positions(pos_embed, m):
    """Position embeddings (1, 1 + k^2, d) of k x k patches -> (1, 1 + m^2, d) of m x m patches."""
    # The class token has no place in the grid of patches, so its embedding stays as it is.
    of_token, of_patches = pos_embed.split([1, pos_embed.shape[1] - 1], dim=1)
    k = round(of_patches.shape[1] ** 0.5)
    # Nothing to resize. Or no square: then the weights do not fit, and `load` will say so.
    if k == m or k ** 2 != of_patches.shape[1]:
        return pos_embed
    grid = of_patches.unflatten(1, (k, k)).permute(0, 3, 1, 2)      # (1, d, k, k)
    # We do what DINOv2's own code does. Without the 0.1, rounding may give m - 1 patches.
    grid = F.interpolate(grid, scale_factor=(m + 0.1) / k, mode="bicubic")
    of_patches = grid.flatten(2).transpose(1, 2)                    # (1, m^2, d)
    return torch.cat([of_token, of_patches], dim=1)
