"""Draws what a run has done, as the picture on README's first screen.

    python -m results.picture runs/glyphs-20s-vit_micro-r8-seed0-..     # the folder of a til.py run

It needs nothing but the packages of the program. For a run with another data set, give --data-dir
as for til.py. The picture is an SVG file, named with --out (default: idea.svg in that folder).
"""
import argparse
import base64
import io
from pathlib import Path

import torch
from PIL import Image

import data
import lora
import til
from hopfield import Hopfield

BLUE, ORANGE, GREY, DARK = "#0072b2", "#d55e00", "#bbbbbb", "#333333"
SHOWN = (0, 7, 13)                              # the tasks in the first panel, counted from 0


def main():
    """Reads the folder, and writes the picture."""
    parser = data.parser(__doc__)
    parser.add_argument("run", type=Path, help="the folder of one run, with --memory hopfield")
    parser.add_argument("--data-dir", type=Path, default="data")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    path = args.run / "til-hopfield.json"
    if not path.exists():
        raise data.Mistake(f"there is no {path}: name the folder of one run of til.py, in which "
                           "--memory was hopfield")
    result = data.read(path)
    # A result has all options of its run. Where its images are, only the command line says.
    options = argparse.Namespace(**(result | vars(args)))
    train, test = til.load_images(options)
    images = data.digest(train.images, train.labels, test.images, test.labels)
    if images != result["content"]["images"]:
        raise data.Mistake(f"the images in {args.data_dir} are not those of this run: use the "
                           "same --data-dir as for til.py")
    if result["code"] != {name: data.digest_of_code(name) for name in result["code"]}:
        raise data.Mistake("the code was changed after this run: run til.py again")
    tasks = data.split(len(train.classes), result["splits"], result["seed"])
    T = len(tasks)
    thetas = [data.read(args.run / f"task{t:03}.pt")["theta"] for t in range(1, T + 1)]

    svg = [text(20, 40, "1. Train a modulation θ of the ViT for each task", bold=True)]
    for row, t in enumerate(t for t in SHOWN if t < T):
        svg += one_task(75 + 105 * row, t, train, tasks[t], thetas[t])
    svg += [text(20, 425, "2. Recall θ from its key", bold=True), *weights(70, 475, thetas),
            text(440, 425, "3. Classify with this θ", bold=True), *bars(475, result["figures"])]
    width, height = 860, 790
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            'font-family="Helvetica, Arial, sans-serif">'
            f'<rect width="{width}" height="{height}" fill="white"/>')
    out = args.out or args.run / "idea.svg"
    # First written to a file beside `out`, which is then renamed. So if the disk is full, an older
    # picture is kept.
    part = out.with_name(out.name + ".part")
    try:
        part.write_text("\n".join([head, *svg, "</svg>\n"]), "utf-8")
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    print(f"wrote {out}")


def one_task(y, t, train, classes, theta):
    """A picture of each of three classes of a task, and its theta as a strip."""
    svg = [text(20, y + 52, f"task {t + 1}")]
    for i, label in enumerate(classes[:3]):
        first = (train.labels == label).nonzero()[0].item()
        svg.append(thumbnail(115 + 84 * i, y + 6, train.images[first]))
    # The strip shows 60 of the elements of theta: blue are positive, and orange are negative.
    elements = torch.stack([piece[0] for piece in theta.chunk(60)])
    elements = elements / elements.abs().max()
    for i, value in enumerate(elements.tolist()):
        colour = BLUE if value > 0 else ORANGE
        svg.append(f'<rect x="{400 + 7 * i}" y="{y + 22}" width="7" height="46" fill="{colour}" '
                   f'fill-opacity="{abs(value) ** 0.7:.2f}"/>')
    svg += [f'<rect x="400" y="{y + 22}" width="420" height="46" fill="none" stroke="{GREY}"/>',
            f'<rect x="400" y="{y + 20}" width="42" height="50" fill="none" stroke="{DARK}" '
            'stroke-width="4"/>', text(398, y + 14, "key", size=20),
            text(820, y + 14, f"60 of the {len(theta):,} numbers of θ", size=20, anchor="end")]
    return svg


def weights(x, y, thetas):
    """softmax(beta K^T k) for the key k of each task: a row for each key."""
    memory = Hopfield()
    pairs = [lora.split_key(theta) for theta in thetas]
    for key, value in pairs:
        memory.write(key, value)
    T = len(thetas)
    cell = 260 / T
    svg = [text(x, y - 12, "share of each stored θ in a read", size=20)]
    for row, (key, _) in enumerate(pairs):
        for column, weight in enumerate(memory.attention(key).tolist()):
            if weight > 0.005:
                svg.append(f'<rect x="{x + cell * column:.1f}" y="{y + cell * row:.1f}" '
                           f'width="{cell:.1f}" height="{cell:.1f}" fill="{BLUE}" '
                           f'fill-opacity="{weight:.2f}"/>')
    svg += [f'<rect x="{x}" y="{y}" width="260" height="260" fill="none" stroke="{DARK}"/>',
            text(x + 130, y + 290, "stored θ of task 1 .. " + str(T), size=20, anchor="middle"),
            f'<g transform="rotate(90 {x - 24} {y + 130})">'
            + text(x - 24, y + 130, "key of task 1 .. " + str(T), size=20, anchor="middle")
            + "</g>"]
    return svg


def bars(y, figures):
    """The accuracy with each kind of modulation."""
    rows = (("none: no θ, the same head", "none", GREY),
            ("wrong: θ of another task, the same head", "wrong", GREY),
            ("linear: no θ, a head trained without θ", "linear", GREY),
            ("FAA(M): with the recalled θ", "FAA(M)", BLUE),
            ("FAA_GT: with θ as it was trained", "FAA_GT", DARK))
    svg = [text(440, y - 12, "accuracy in %, mean of all tasks", size=20)]
    for i, (name, heading, colour) in enumerate(rows):
        top = y + 12 + 56 * i
        value = figures[heading]
        svg += [text(440, top + 16, name, size=20),
                f'<rect x="440" y="{top + 23}" width="{3.2 * value:.1f}" height="18" '
                f'fill="{colour}"/>',
                text(448 + 3.2 * value, top + 40, f"{value:.1f}", size=20)]
    return svg


def thumbnail(x, y, image):
    """An image (3, h, w) as a part of the picture, 80 units wide."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
    content = base64.b64encode(file.getvalue()).decode()
    return (f'<image x="{x}" y="{y}" width="80" height="80" '
            f'href="data:image/png;base64,{content}"/>')


def text(x, y, words, size=24, bold=False, anchor="start"):
    """A piece of text. At 440 pixels, which is half of the width, it is still legible."""
    weight = ' font-weight="bold"' if bold else ""
    return (f'<text x="{x}" y="{y}" font-size="{size}"{weight} fill="{DARK}" '
            f'text-anchor="{anchor}">{words}</text>')


if __name__ == "__main__":
    with data.one_line_errors():
        main()
