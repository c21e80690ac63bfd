"""Predictions as files: index PNGs that `masks` reads."""

import os

import numpy as np
from PIL import Image
from torch import Tensor

from util.files.atomic import replacing


def write_mask(folder: str, name: str, classes: Tensor) -> str:
    """Write class numbers (H, W) as a PNG in `folder`, with the name of the image; return its path.

    Up to 256 classes take 8 bits, others 16. Of a name that leaves the folder the last part is kept.
    """
    path = os.path.normpath(os.path.join(folder, f"{os.path.splitext(name)[0]}.png"))
    if not path.startswith(os.path.normpath(folder) + os.sep):
        path = os.path.join(folder, f"{os.path.splitext(os.path.basename(name))[0]}.png")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    values = classes.cpu().numpy()
    depth = np.uint8 if values.max(initial=0) < 256 else np.uint16
    # A killed run leaves no half of a file.
    with replacing(path, "wb") as f:
        Image.fromarray(values.astype(depth)).save(f, format="PNG", optimize=True)
    return path
