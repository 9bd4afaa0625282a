"""A Vision Transformer (Dosovitskiy et al., arXiv 2010.11929): the frozen substrate W that the modulations act on.

Query, key and value have separate projections, so that lora.py can wrap exactly the query and the value.
`load` builds one of three substrates from published weights: our own vit_tiny, DINOv2's ViT-S/14 (Oquab et al.,
arXiv 2304.07193) and torchvision's ViT-B/16.

    python vit.py --data-dir data --out new.pt       # pretrains vit_tiny on TinyImageNet: new.pt and new.json
"""
import math
import re
import tempfile
import textwrap
import time
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import v2


class Config(NamedTuple):
    """Sizes of a ViT, the pixel statistics its weights were trained with, and where those weights come from."""
    image_size: int
    patch: int
    width: int
    depth: int
    heads: int
    layer_scale: bool = False
    mean: tuple = (0.485, 0.456, 0.406)          # of ImageNet, for pixels in [0, 1]
    std: tuple = (0.229, 0.224, 0.225)
    url: str = ""                                # empty: the weights ship with the project
    rename: tuple = ()                           # (pattern, replacement): names in the published file -> names here


CONFIGS = {
    "vit_tiny": Config(64, 8, 192, 6, 3),
    "dinov2_vits14": Config(
        112, 14, 384, 12, 6, layer_scale=True,
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
        rename=((r"^patch_embed\.proj", "patch_embed"), (r"\.mlp\.", "."), (r"\.ls(\d)\.", r".scale\1."))),
    "vit_b_16": Config(
        224, 16, 768, 12, 12,
        url="https://download.pytorch.org/models/vit_b_16-c867db91.pth",
        rename=((r"^class_token", "cls_token"), (r"^encoder\.pos_embedding", "pos_embed"), (r"^conv_proj", "patch_embed"),
                (r"^encoder\.layers\.encoder_layer_", "blocks."), (r"^encoder\.ln", "norm"), (r"\.ln_", ".norm"),
                (r"\.self_attention\.in_proj_", ".attn.qkv."), (r"\.self_attention\.out_proj", ".attn.proj"),
                (r"\.mlp\.(0|linear_1)", ".fc1"), (r"\.mlp\.(3|linear_2)", ".fc2"))),
}
UNUSED = r"^(mask_token|heads?\..*)$"            # parts of published files that a feature extractor has no use for


class Attention(nn.Module):
    """Multi-head self-attention: softmax(Q K^T / sqrt(d_head)) V, then a projection."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, wanted=None):
        """x (B, N, D) -> (B, n, D): the outputs of all N tokens, or of the first n = wanted alone."""
        (B, N, D), h = x.shape, self.heads                                   # batch, tokens, width; heads
        q = self.query(x[:, :wanted]).view(B, -1, h, D // h).transpose(1, 2)         # (B, h, n, D / h)
        k = self.key(x).view(B, N, h, D // h).transpose(1, 2)                # (B, h, N, D / h)
        v = self.value(x).view(B, N, h, D // h).transpose(1, 2)              # (B, h, N, D / h)
        y = F.scaled_dot_product_attention(q, k, v)                          # (B, h, n, D / h)
        return self.proj(y.transpose(1, 2).reshape(B, -1, D))                # (B, n, D)


class LayerScale(nn.Module):
    """A learned scale per channel at the end of a branch (arXiv 2103.17239); of our substrates only DINOv2 has it."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.gamma * x


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width, heads, layer_scale):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale1, self.scale2 = (LayerScale(width) if layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x, wanted=None):                                       # (B, N, D) -> (B, N or wanted, D)
        x = x[:, :wanted] + self.scale1(self.attn(self.norm1(x), wanted))
        return x + self.scale2(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class ViT(nn.Module):
    """Images (B, 3, s, s), normalised with config.mean and config.std -> the normalised class token (B, width)."""

    def __init__(self, config, image_size=None):
        super().__init__()
        self.config, self.image_size = config, config.image_size if image_size is None else image_size
        n_patches = grid(config, self.image_size) ** 2
        self.patch_embed = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + n_patches, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.layer_scale) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)              # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)     # (B, 1 + N, D)
        x = x + self.pos_embed
        for block in self.blocks[:-1]:
            x = block(x)                                                     # (B, 1 + N, D)
        x = self.blocks[-1](x, wanted=1)         # of the last block's output only the class token is read: (B, 1, D)
        return self.norm(x[:, 0])                                            # (B, D)


def grid(config, image_size):
    """Patches along a side of an image. Raises ValueError if they are not a whole number."""
    if not 1 <= image_size < 10 ** 5 or image_size % config.patch:
        raise ValueError(f"image size {image_size} is not a positive multiple of the patch size {config.patch} below 100,000")
    return image_size // config.patch


def load(name, weights=None, image_size=None):
    """The substrate `name` (a key of CONFIGS) with pretrained weights: frozen, float32, in eval mode.

    weights: a file in the published layout; by default the one in weights/ or a download.
    image_size: side of the square input in pixels, any multiple of the patch size; positions are resized to fit, and kept as
    they were in vit.published_positions.
    Raises ValueError for an unknown name, a size or a file that does not fit, FileNotFoundError for a missing file, OSError and
    MemoryError for one that cannot be read.
    """
    if name not in CONFIGS:
        raise ValueError(f"unknown backbone '{name}': choose one of {', '.join(CONFIGS)}")
    vit = ViT(CONFIGS[name], image_size)
    state, source = read_weights(name, weights)
    try:
        state = rename(state, vit.config.rename)
        if "pos_embed" in state:
            vit.published_positions = state["pos_embed"]
            state["pos_embed"] = resize_positions(state["pos_embed"], grid(vit.config, vit.image_size))
        vit.load_state_dict(state)
    except RuntimeError as error:                # names the missing and unexpected keys and the wrong shapes
        raise ValueError(f"{source} does not fit {name}: {textwrap.shorten(str(error), 600)}") from None
    if not all(weight.isfinite().all() for weight in vit.parameters()):
        raise ValueError(f"{source} holds NaN or infinite weights: fetch it again")
    return vit.requires_grad_(False).eval()


def read_weights(name, weights):
    """The state dict as published, without executing pickles, and the file it came from: downloaded if it is not there."""
    url, path = CONFIGS[name].url, Path(weights or Path(__file__).parent / "weights" / f"{name}.pt")
    if url and not weights:
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                torch.hub.download_url_to_file(url, str(path))
        except (OSError, HTTPException) as error:
            raise FileNotFoundError(f"cannot download {url} ({error}): put the file at {path}, name it with --weights FILE, or use "
                                    "--backbone vit_tiny, which ships with the project") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        broken = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()    # torch.load looks at no checksum
        whole = not broken and all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())
    except FileNotFoundError:
        raise FileNotFoundError(f"no weights file {path}: give an existing file with --weights") from None
    except (OSError, MemoryError):
        raise
    except Exception as error:                   # bytes that are no PyTorch file make torch.load raise almost anything
        if "alloc" in str(error):                # or there is no memory to read them into
            raise MemoryError(f"for {path}: {error}") from None
        whole = False
    if not whole:
        raise ValueError(f"{path} is not a whole file of PyTorch weights: remove it and fetch it again")
    return state, path


def rename(state, rules):
    """Published names -> ours, without UNUSED; the fused 'attn.qkv' (3 D, ...) is split into query, key and value."""
    renamed = {}
    for key, value in state.items():
        if re.match(UNUSED, key):
            continue
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        if ".qkv." in key:
            for part, chunk in zip(("query", "key", "value"), value.chunk(3)):
                renamed[key.replace("qkv", part)] = chunk
        else:
            renamed[key] = value
    return renamed


def resize_positions(pos_embed, n):
    """Position embeddings (1, 1 + n0^2, D) for an n x n grid of patches; the class token's own (the first) stays.

    DINOv2's way, which its checkpoint expects: bicubic without antialiasing, scale factor (n + 0.1) / n0.
    """
    if pos_embed.ndim != 3:
        return pos_embed
    n0 = round(max(pos_embed.shape[1] - 1, 1) ** 0.5)
    if n == n0 or pos_embed.shape[1] != 1 + n0 ** 2:
        return pos_embed
    planes = pos_embed[:, 1:].float().unflatten(1, (n0, n0)).permute(0, 3, 1, 2)                # (1, D, n0, n0)
    planes = F.interpolate(planes, scale_factor=(n + 0.1) / n0, mode="bicubic")                 # (1, D, n, n)
    return torch.cat([pos_embed[:, :1].float(), planes.flatten(2).transpose(1, 2)], dim=1)        # (1, 1 + n^2, D)


# ---- training on a GPU -----------------------------------------------------------------------------------------------------

class Graphed:
    """Runs step(*inputs) on a GPU as a CUDA graph: a single launch replays all of its kernels, where eager mode launches
    each, and a small ViT's training step takes longer to launch than to compute.

    The first calls run eagerly, as warm-up; then the step is captured, once for each shape of the first input (the last
    batch of an epoch is smaller). The step must do all its work on the GPU and return nothing.
    """

    def __init__(self, step, warmup=3):
        self.step, self.warmup, self.graphs, self.stream = step, warmup, {}, torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()                           # the graphs' memory: they never run at once

    def __call__(self, *inputs):
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if self.warmup:
                self.warmup -= 1
                self.step(*inputs)
            else:
                if inputs[0].shape not in self.graphs:
                    self.graphs[inputs[0].shape] = self.capture(inputs)
                static, graph = self.graphs[inputs[0].shape]
                for ours, x in zip(static, inputs):
                    ours.copy_(x)
                graph.replay()
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, inputs):
        """The graph, which always reads the same tensors, and these tensors."""
        static, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.pool, self.stream):
            self.step(*static)
        return static, graph


# ---- python vit.py: pretrain vit_tiny ------------------------------------------------------------------------------------

NORMALISE = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(CONFIGS["vit_tiny"].mean, CONFIGS["vit_tiny"].std)])
AUGMENT = v2.Compose([v2.RandomResizedCrop(64, scale=(0.35, 1)), v2.RandomHorizontalFlip(), v2.TrivialAugmentWide()])
MIX = v2.RandomChoice([v2.MixUp(num_classes=200, alpha=0.8), v2.CutMix(num_classes=200), v2.Identity()])


def pretrain(train, epochs, batch_size, lr, device):
    """Supervised training of vit_tiny and a linear head on `train` (uint8 images, labels of 200 classes): (vit, head)."""
    vit, head = ViT(CONFIGS["vit_tiny"]).to(device), nn.Linear(192, 200).to(device)
    for layer in [*vit.modules(), head]:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    model, lr = nn.Sequential(vit, head), torch.tensor(lr, device=device)
    forward = torch.compile(model) if device == "cuda" else model            # fused kernels: twice the images a second
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.05, fused=True, capturable=device == "cuda")
    total_loss = torch.zeros((), device=device)

    def step(x, y):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False):
            loss = F.cross_entropy(forward(x), y, label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total_loss.add_(loss.detach())

    step = Graphed(step) if device == "cuda" else step
    images, labels = train.images.to(device), train.labels.to(device)
    per_epoch, peak = len(labels) // batch_size, lr.item()
    for epoch in range(epochs):
        start = time.perf_counter()
        for i, (x, y) in enumerate(augmented_batches(images, labels, batch_size)):
            done = (epoch + i / per_epoch) / epochs                          # share of the training, in [0, 1)
            lr.fill_(peak * min(done / 0.05, (1 + math.cos(math.pi * done)) / 2))    # linear warm-up, cosine decay
            step(x, y)
        print(f"epoch {epoch + 1}/{epochs}  loss {total_loss.item() / per_epoch:.3f}  "
              f"{len(labels) / (time.perf_counter() - start):,.0f} images/s", flush=True)
        total_loss.zero_()
    return vit, head


def augmented_batches(images, labels, batch_size, pool=8, group=128):
    """One epoch of full batches. Each group of images shares one draw of AUGMENT, since per image its many small launches
    would dominate the training; a pool of batches is augmented at once and shuffled, so that every batch mixes groups."""
    order = torch.randperm(len(labels), device=images.device)
    for indices in order[:len(order) // batch_size * batch_size].split(pool * batch_size):
        x = torch.cat([AUGMENT(images[part]) for part in indices.split(group)])
        for batch in torch.randperm(len(x), device=x.device).split(batch_size):
            yield MIX(NORMALISE(x[batch]), F.one_hot(labels[indices[batch]], 200).float())


@torch.no_grad()
def top1(vit, head, test, device):
    """Share of the images in `test` whose class is predicted right, in percent."""
    hits = [head(vit(NORMALISE(x.to(device)))).argmax(1).cpu() == y
            for x, y in zip(test.images.split(1000), test.labels.split(1000))]
    return 100 * torch.cat(hits).float().mean().item()


def main():
    """Pretrains vit_tiny on TinyImageNet; writes the weights in float16 and, beside them, a JSON file of the same name."""
    import data                                  # for this command alone: the model above needs nothing of ours
    import evaluate
    parser = data.Parser("python vit.py --data-dir data --out new.pt", "Pretrain vit_tiny on TinyImageNet.")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder that holds tiny-imagenet-200")
    parser.add_argument("--epochs", type=int, default=300, help="default: 300")
    parser.add_argument("--batch-size", type=int, default=256, help="default: 256")
    parser.add_argument("--lr", type=float, default=0.001, help="peak learning rate of AdamW (default: 0.001)")
    parser.add_argument("--out", type=Path, default=Path("weights/vit_tiny.pt"), help="a file that does not exist yet")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.epochs < 1 or args.batch_size < 1 or not args.lr > 0:
        raise ValueError(f"--epochs {args.epochs} --batch-size {args.batch_size} --lr {args.lr}: they must be positive")
    evaluate.check_device(args.device)
    if args.out.suffix != ".pt":
        raise ValueError(f"--out {args.out}: the name of a weights file must end in .pt")
    for path in (args.out, args.out.with_suffix(".json")):
        if path.exists():
            raise ValueError(f"{path} exists and runs depend on it: move it away, or name another file with --out")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out.parent).close()                      # raises an OSError now, not after the training
    torch.manual_seed(0)                         # the random augmentations of torchvision take no generator
    train, test = data.load("tinyimagenet", args.data_dir)
    if args.batch_size > len(train.labels):
        raise ValueError(f"--batch-size {args.batch_size} is more than the {len(train.labels)} training images")
    start = time.perf_counter()
    vit, head = pretrain(train, args.epochs, args.batch_size, args.lr, args.device)
    seconds = time.perf_counter() - start
    state = {key: value.half().cpu() for key, value in vit.state_dict().items()}
    data.atomically(args.out, lambda scratch: torch.save(state, scratch))    # nothing but weights, as published files are
    accuracy = top1(load("vit_tiny", args.out).to(args.device), head, test, args.device)
    data.save_json(args.out.with_suffix(".json"), {
        "top1": accuracy, "epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "seconds": seconds,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device, "torch": torch.__version__})
    print(f"top-1 on TinyImageNet val {accuracy:.2f} %, {seconds:.0f} s")


if __name__ == "__main__":
    from data import run_command
    run_command(main)
