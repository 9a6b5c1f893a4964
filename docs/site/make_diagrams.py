"""Draw docs/pictures/depth.png and svd.png: what goes in and what comes out. No model is run.

    python docs/site/make_diagrams.py

The maps of depth.png are those of a scene that is computed here, a ball and a box before a wall:
its exact depth and normals, painted as mlxdiff paints what Marigold predicts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from make_pictures import FOLDER, FONT, sheet
from PIL import Image, ImageDraw

from mlxdiff.pictures import maps

SIDE = 144  # pixels of the scene
CAMERA = np.array([0.15, 1.0, 2.9])
BALL, RADIUS = np.array([-0.55, 0.6, 0.0]), 0.6
BOX = np.array([[0.25, 0.0, -0.9], [1.15, 0.9, 0.0]])  # least and greatest corner
LIGHT = np.array([0.5, 0.8, 0.6]) / np.sqrt(1.25)
WALL = 6.0  # from the camera
BLUE, INK, PALE = (70, 110, 170), (40, 40, 40), (238, 242, 248)


def scene() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return colours (H, W, 3) uint8, depth (H, W, 1) from 0 to 1, and unit normals (H, W, 3)."""
    across = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    x, y = np.meshgrid(across, -across)
    rays = np.stack([x, y - 0.18, np.full_like(x, -0.75)], -1)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    distance = WALL / -rays[..., 2]
    normals = np.zeros_like(rays)
    normals[...] = 0, 0, 1
    colours = np.full_like(rays, 225)

    def put(reach: np.ndarray, normal: np.ndarray, colour: Sequence[int]) -> None:
        nearer = reach < distance
        distance[nearer] = reach[nearer]
        normals[nearer] = np.broadcast_to(normal, rays.shape)[nearer]
        colours[nearer] = colour

    with np.errstate(divide="ignore", invalid="ignore"):
        floor = -CAMERA[1] / rays[..., 1]
        put(np.where(floor > 0, floor, np.inf), np.array([0, 1, 0]), (205, 190, 160))
        half = (rays * (CAMERA - BALL)).sum(-1)
        inside = half**2 - ((CAMERA - BALL) ** 2).sum() + RADIUS**2
        ball = np.where(inside > 0, -half - np.sqrt(inside), np.inf)
        on_ball = (CAMERA + ball[..., None] * rays - BALL) / RADIUS
        put(ball, np.nan_to_num(on_ball), (190, 70, 60))
        ends = (BOX[:, None, None] - CAMERA) / rays
        first, last = ends.min(0), ends.max(0)
        enter = first.max(-1)
        side = np.eye(3)[first.argmax(-1)] * -np.sign(rays)
        put(np.where(enter < last.min(-1), enter, np.inf), side, BLUE)
    light = 0.45 + 0.55 * np.clip((normals * LIGHT).sum(-1, keepdims=True), 0, 1)
    depth = distance * -rays[..., 2]
    depth = (depth - depth.min()) / (depth.max() - depth.min())
    return (colours * light).astype(np.uint8), depth[..., None].astype(np.float32), normals


def depth_figure() -> Image.Image:
    """The scene and its maps, in all forms."""
    colours, depth, normals = scene()
    grey, near = (
        Image.fromarray((one[..., 0] * 255).astype(np.uint8)) for one in (depth, 1 - depth)
    )
    pictures = [
        Image.fromarray(colours),
        grey.convert("RGB"),
        near.convert("RGB"),
        maps.paint(depth, "colors", False),
        maps.paint(normals.astype(np.float32), None, False),
    ]
    titles = ["--image", "--depth-as grey", "near", "colors", "normals"]
    return sheet([("", pictures)], titles, size=SIDE)


# ------------------------------------------------------------------------- Stable Video Diffusion


class Canvas:
    """A white page for boxes and arrows, in pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), "white")
        self.draw = ImageDraw.Draw(self.image)

    def box(self, x: int, y: int, width: int, height: int, *lines: str) -> None:
        self.draw.rectangle((x, y, x + width, y + height), PALE, BLUE)
        self.text(x + width // 2, y + height // 2, *lines)

    def text(self, x: int, y: int, *lines: str) -> None:
        top = y - 10 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.draw.text((x, top + 20 * number), line, INK, FONT, anchor="mm")

    def arrow(self, x: int, y: int, to: int) -> None:
        """Point to the right, to the edge of what stands at ``to``."""
        self.draw.line((x, y, to - 2, y), INK)
        self.draw.polygon([(to - 1, y), (to - 8, y - 4), (to - 8, y + 4)], INK)


def svd_figure() -> Image.Image:
    """What the networks of Stable Video Diffusion take, and what they give."""
    page = Canvas(880, 286)
    page.image.paste(Image.fromarray(scene()[0]).resize((96, 96)), (16, 36))
    page.text(64, 22, "--image")
    page.arrow(114, 60, 150)
    page.box(150, 42, 176, 36, "CLIP: one token")
    page.arrow(326, 60, 390)
    page.arrow(114, 110, 150)
    page.box(150, 92, 176, 36, "+ noise, VAE encoder")
    page.arrow(326, 110, 390)
    page.text(162, 172, "--fps  --motion-bucket", "--noise-augmentation")
    page.arrow(260, 172, 390)
    page.text(162, 236, "noise for each frame", "(--seed)")
    page.arrow(260, 236, 390)
    page.box(390, 42, 132, 212, "U-Net", "sees all frames", "25 steps")
    page.arrow(522, 148, 558)
    page.box(558, 112, 132, 72, "VAE decoder", "--decode-chunk")
    page.arrow(690, 148, 726)
    for number in (14, 3, 2, 1):
        shift = {14: 36, 3: 24, 2: 12, 1: 0}[number]
        place = (726 + shift, 118 - shift, 812 + shift, 182 - shift)
        page.draw.rectangle(place, "white", BLUE)
    page.text(769, 150, "frame 1")
    page.text(800, 66, "14 or 25")
    page.text(700, 222, "guidance: --min-guidance in the first", "frame, --guidance in the last")
    return page.image


def main() -> None:
    """Write both files."""
    for name, figure in (("depth", depth_figure()), ("svd", svd_figure())):
        path = FOLDER / f"{name}.png"
        figure.save(path, optimize=True)
        print(f"{path}: {figure.width}x{figure.height}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
