"""The frozen encoder of a probe, of which the probe's checkpoints store checksums in its place."""

import zlib

from torch import nn

from util.files.names import printable
from util.flags.groups import pair
from util.weights.types import Checkpoint, stored_flags


def check_encoder(
    backbone: nn.Module, start: Checkpoint | None, finetune: str, input_size: tuple[int, int]
) -> str:
    """Return checksums of the encoder.

    The second one is that of the positional embedding, which other sizes of images change.

    Args:
        backbone: the encoder.
        start: the trained heads, if there are any.
        finetune: the file of the encoder, for messages.
        input_size: (H, W) of the images.

    Raises ValueError if the trained heads belong to another encoder.
    """
    sums = {False: 0, True: 0}
    for name, weight in backbone.named_parameters():
        embeds = "pos_embed" in name
        sums[embeds] = zlib.crc32(weight.detach().cpu().contiguous().numpy().data, sums[embeds])
    found = f"{sums[False]:08x}-{sums[True]:08x}"
    trained = stored_flags(start)
    own = trained.get("encoder")
    # Earlier probes store none.
    if start is None or not isinstance(own, str):
        return found
    count = len(found)
    before = trained.get("input_size") or input_size
    if pair(before, "`input_size`") != input_size:
        count = found.index("-")
    if own[:count] == found[:count]:
        return found
    path = printable(str(trained.get("finetune")))
    remedy = f"give the one that they were trained on ({path})"
    if path == finetune:
        remedy = "that file, or `pos_embed`, has changed since: give what they were trained on"
    raise ValueError(
        f"{start.path} holds heads for another encoder than {finetune}: {remedy}, or start a new probe in "
        "another `output_dir`"
    )
