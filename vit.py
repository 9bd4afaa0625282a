"""A Vision Transformer (Dosovitskiy et al., arXiv 2010.11929): the frozen substrate W that LoRA modulates.

Query, key and value have separate projections, so that lora.py can wrap exactly the query and the value.

    vit = load("vit_ti_16")                         # frozen, with published weights
    tokens = features(vit, images)                  # uint8 (n, 3, h, w) -> class tokens (n, d)
    python vit.py --data-dir data --out new.pt      # pretrains vit_micro on TinyImageNet
"""
import re
import textwrap
from collections import namedtuple
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import v2

import data

# A substrate: side of the input and of a patch in pixels, width d, blocks, heads; mean and std of its pixels
# in [0, 1], by default ImageNet's; where its weights are, and how to rename them.
Config = namedtuple("Config", "image_size patch width depth heads mean std url rename", defaults=(
    (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), None, ()))

TIMM = ((r"^patch_embed\.proj", "patch_embed"), (r"\.mlp\.", "."))
TORCHVISION = (
    (r"^class_token", "cls_token"), (r"^encoder\.pos_embedding", "pos_embed"), (r"^conv_proj", "patch_embed"),
    (r"^encoder\.layers\.encoder_layer_", "blocks."), (r"^encoder\.ln", "norm"), (r"\.ln_", ".norm"),
    (r"\.self_attention\.in_proj_", ".attn.qkv."), (r"\.self_attention\.out_proj", ".attn.proj"),
    (r"\.mlp\.(0|linear_1)", ".fc1"), (r"\.mlp\.(3|linear_2)", ".fc2"))
CONFIGS = {
    "vit_micro": Config(64, 8, 192, 6, 3),          # its weights ship with this project
    "vit_ti_16": Config(                            # Steiner et al., arXiv 2106.10270
        224, 16, 192, 12, 3, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), rename=TIMM,
        url="https://huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
            "/resolve/main/pytorch_model.bin"),
    "dinov2_vits14": Config(                        # Oquab et al., arXiv 2304.07193
        112, 14, 384, 12, 6, rename=(*TIMM, (r"\.ls1\.", ".attn.proj."), (r"\.ls2\.", ".fc2.")),
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"),
    "vit_b_16": Config(                             # torchvision's ViT_B_16_Weights.IMAGENET1K_V1
        224, 16, 768, 12, 12, rename=TORCHVISION,
        url="https://download.pytorch.org/models/vit_b_16-c867db91.pth"),
}


class Attention(nn.Module):
    """Multi-head self-attention: softmax(Q K^T / sqrt(d / h)) V, then a projection."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, n=None):                   # (B, N, d) -> (B, n, d): the first n tokens, or all
        (B, N, d), h = x.shape, self.heads
        # Without `contiguous`, nn.Linear may take another path for n = 1, and round differently.
        q = self.query(x[:, :n].contiguous()).view(B, -1, h, d // h).transpose(1, 2)        # (B, h, n, d / h)
        k = self.key(x).view(B, N, h, d // h).transpose(1, 2)               # (B, h, N, d / h)
        v = self.value(x).view(B, N, h, d // h).transpose(1, 2)             # (B, h, N, d / h)
        y = F.scaled_dot_product_attention(q, k, v)                         # (B, h, n, d / h)
        return self.proj(y.transpose(1, 2).reshape(B, -1, d))               # (B, n, d)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, n=None):                   # (B, N, d) -> (B, n, d): the first n tokens, or all
        x = x[:, :n] + self.attn(self.norm1(x), n)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Prepared images (B, 3, s, s), s = image_size -> the normalised class token (B, d)."""

    def __init__(self, config, image_size=None):
        super().__init__()
        self.config, self.image_size = config, image_size or config.image_size
        if self.image_size % config.patch:
            raise ValueError(f"image size {self.image_size} is not a multiple of the patch, {config.patch}")
        n_patches = (self.image_size // config.patch) ** 2
        self.patch_embed = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + n_patches, config.width))
        blocks = [Block(config.width, config.heads) for _ in range(config.depth)]
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)             # (B, N, d)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)    # (B, 1 + N, d)
        x = x + self.pos_embed
        for block in self.blocks[:-1]:
            x = block(x)                                                    # (B, 1 + N, d)
        x = self.blocks[-1](x, n=1)                 # (B, 1, d): nothing reads the last block's other tokens
        return self.norm(x[:, 0])                                           # (B, d)


class Head(nn.Linear):
    """The classifier on the class token: (n, d) -> logits (n, classes). There is one for each task."""

    @torch.no_grad()
    def init(self, generator):
        """Small random weights, drawn on the CPU, and no bias."""
        self.weight.copy_(nn.init.normal_(torch.empty(self.weight.shape), std=0.02, generator=generator))
        self.bias.zero_()


def prepare(images, vit, flip=None, crop=None):
    """uint8 images (B, 3, h, w) -> the input of the ViT (B, 3, s, s). flip: bool (B,), the images to mirror.
    crop: (B, 3), a square of each image: its side, 1 for the whole image, and its centre x, y in [-1, 1]."""
    x, size = images.float() / 255, (vit.image_size, vit.image_size)
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    if x.shape[-2:] != size and (crop is None or x.shape[-1] > size[1]):    # no antialias in grid_sample
        x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
    if crop is not None:
        side, centre = crop[:, :1, None], crop[:, 1:, None]                 # (B, 1, 1), (B, 2, 1)
        window = torch.cat([side * torch.eye(2, device=x.device), centre], dim=2)       # (B, 2, 3)
        grid = F.affine_grid(window, (len(x), 3, *size), align_corners=False)
        x = F.grid_sample(x, grid, "bicubic", "reflection", align_corners=False).clamp(0, 1)
    channels = zip(x.unbind(1), vit.config.mean, vit.config.std)   # a CUDA graph takes no CPU tensors
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], 1).to(vit.cls_token.dtype)


@torch.no_grad()
def features(vit, images):
    """Class tokens (n, d), float32, on the ViT's device, of uint8 images (n, 3, h, w) on any device."""
    batches = images.split(250 if vit.norm.bias.is_cpu else 1000)           # what is fastest
    return torch.cat([vit(prepare(x.to(vit.norm.bias.device), vit)).float() for x in batches])


def load(name, weights=None, image_size=None):
    """The substrate `name` of CONFIGS: pretrained, frozen, float32, in eval mode. weights: a file in the
    published layout, if not the usual one. ValueError or OSError for a size or a file that does not fit."""
    vit, url = ViT(CONFIGS[name], image_size), CONFIGS[name].url
    shipped, fetched = Path(__file__).with_name("weights"), Path(torch.hub.get_dir(), "checkpoints")
    path = Path(weights or (fetched / f"{name}.pth" if url else shipped / f"{name}.pt"))
    if path.parent == fetched and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path)
        except OSError as error:
            raise OSError(f"cannot download {url} ({error}): use --weights or --backbone vit_micro") from None
    try:
        state = rename(data.read(path), vit.config.rename)
        if "pos_embed" in state:
            state["pos_embed"] = resize_positions(state["pos_embed"], vit.image_size // vit.config.patch)
        vit.load_state_dict(state)
    except (RuntimeError, KeyError) as error:       # it names the weights that do not fit
        raise ValueError(f"{path} does not fit {name}: {textwrap.shorten(str(error), 400)}") from None
    vit.digest = data.digest(torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8))
    return vit.requires_grad_(False).eval()


def rename(state, rules):
    """Published names -> ours, without the parts that we do not need; `qkv` (3 d, ..) is split in three."""
    renamed = {}
    for name, weight in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:
            for part, rows in zip(("query", "key", "value"), weight.chunk(3)):
                renamed[name.replace("qkv", part)] = rows
        elif not re.match(r"mask_token|heads?\.", name):
            renamed[name] = weight
    for name in [name for name in renamed if name.endswith(".gamma")]:
        # DINOv2 has LayerScale (arXiv 2103.17239) after layers: gamma (W x + b) = (gamma W) x + gamma b.
        gamma, W, b = renamed.pop(name), name.replace("gamma", "weight"), name.replace("gamma", "bias")
        renamed[W], renamed[b] = gamma[:, None] * renamed[W], gamma * renamed[b]
    return renamed


def resize_positions(pos_embed, n):
    """Position embeddings (1, 1 + m^2, d) -> (1, 1 + n^2, d) for n x n patches, as DINOv2 does it."""
    m = round((pos_embed.shape[1] - 1) ** 0.5)
    if n == m:
        return pos_embed
    planes = pos_embed[:, 1:].float().unflatten(1, (m, m)).permute(0, 3, 1, 2)          # (1, d, m, m)
    planes = F.interpolate(planes, scale_factor=(n + 0.1) / m, mode="bicubic")          # (1, d, n, n)
    return torch.cat([pos_embed[:, :1].float(), planes.flatten(2).transpose(1, 2)], dim=1)


def pretrain(model, train, epochs, device, batch_size=256):
    """Supervised training of model = (ViT, linear head) on uint8 images with labels of 200 classes."""
    augment = v2.Compose([v2.RandomResizedCrop(64, (0.35, 1)), v2.RandomHorizontalFlip(),
                          v2.TrivialAugmentWide()])
    mix = v2.RandomChoice([v2.MixUp(num_classes=200, alpha=0.8), v2.CutMix(num_classes=200), v2.Identity()])
    images, labels = train.images.to(device), F.one_hot(train.labels, 200).float().to(device)
    steps = len(images) // batch_size                                       # of an epoch
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.001, epochs * steps, pct_start=0.05)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(images), device=device)
        augmented = torch.cat([augment(images[part]) for part in order.split(128)])  # 128 share a draw: quick
        for batch in torch.randperm(len(images), device=device).split(batch_size)[:steps]:
            x, y = mix(prepare(augmented[batch], model[0]), labels[order[batch]])
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = F.cross_entropy(model(x), y, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}/{epochs}  loss {loss.item():.3f}", flush=True)


def main():
    """Pretrains vit_micro; writes its weights in float16 and, beside them, a JSON file with its accuracy."""
    parser = data.parser("Pretrain vit_micro on TinyImageNet.")
    for option, default in (("--data-dir", Path("data")), ("--epochs", 300), ("--out", Path("new.pt"))):
        parser.add_argument(option, type=type(default), default=default, help="default: %(default)s")
    args, device = parser.parse_args(), "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)                            # torchvision's random augmentations take no generator
    train, test = data.load("tinyimagenet", args.data_dir)
    vit, head = ViT(CONFIGS["vit_micro"]).to(device), nn.Linear(192, 200, device=device)
    pretrain(nn.Sequential(vit, head), train, args.epochs, device)
    top1 = 100 * (head(features(vit, test.images)).argmax(1).cpu() == test.labels).float().mean().item()
    data.save(args.out, {name: weight.half().cpu() for name, weight in vit.state_dict().items()})
    data.save(args.out.with_suffix(".json"), {"top1": top1, "epochs": args.epochs, "device": device})
    print(f"{args.out}: top-1 {top1:.2f} % on TinyImageNet val")


if __name__ == "__main__":
    with data.one_line_errors():
        main()
