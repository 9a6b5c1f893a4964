"""The types of control image that a ControlNet-Union knows.

The number of a type is its place here (the model card of xinsir/controlnet-union-sdxl-1.0). The
first edition knows six types, the second (ProMax) eight.
"""

from __future__ import annotations

MODES = ("openpose", "depth", "sketch", "canny", "normal", "segment", "tile", "repaint")
"""openpose; depth; sketch (HED, PIDI, scribble, TED); canny (also lineart, MLSD); normal; segment;
tile; repaint (an image with a hole)."""
