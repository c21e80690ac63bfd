"""All classifiers by name: ours, and any timm backbone as timm/NAME."""
import difflib

import models_swin
import models_vit

MODELS = models_vit.MODELS | models_swin.MODELS


def build_classifier(name: str, **options):
    """`options` are the builder's keywords; ValueError names what there is, and the option that a model does not take."""
    if name.startswith("timm/"):
        from models_timm import timm_model  # timm takes seconds to import

        return timm_model(name.removeprefix("timm/"), **options)
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        raise ValueError(f"--model {name} is unknown" + (f"; did you mean {near[0]}?" if near else "")
                         + f" There are {', '.join(MODELS)}, and timm/NAME for timm's")
    return MODELS[name](**options)
