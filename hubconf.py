"""Entry points of torch.hub.

    torch.hub.load(DIR, "encoder", checkpoint=FILE, source="local")
    torch.hub.load(DIR, "mae_vit_base_patch16", source="local", img_size=224)

DIR is the checkout, FILE a checkpoint. See mae_pl/__init__.py for what they return.
"""

from collections.abc import Callable
from typing import Any

import mae_pl
from mae_pl import classifier, encoder, model, total

dependencies = ["torch", "torchvision", "timm", "numpy"]


def _builder(name: str) -> Callable[..., Any]:
    def build(**options: Any) -> Any:
        return model(name, **options)

    build.__name__ = name
    build.__doc__ = f"The model {name} with random weights; options are those of its entry, as img_size=64."
    return build


globals().update({name: _builder(name) for name in mae_pl.names()})
__all__ = ["classifier", "encoder", "model", "total"]
