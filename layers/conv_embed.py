"""So-ViT's token embedding: a small residual convolutional network in place of non-overlapping patches."""

from functools import partial

from torch import Tensor, nn

from layers.transformer import check_images, patch_grid


class ConvTokenEmbed(nn.Module):
    """Images (B, in_chans, H, W) -> tokens (B, L, C), row by row (Xie et al. 2021).

    A 3x3 convolution and max pooling, three ResNet bottlenecks, a 1x1 convolution to the tokens' width. `patch_size` is
    the stride, 16 or, for small images, 8 (the third bottleneck then keeps the resolution). A token sees 33x33
    pixels, more than its cell, so that this embedding does not go together with masking.

    Raises ValueError on other strides, and on image sides that are no multiples of it.
    """

    def __init__(self, img_size: tuple[int, int], patch_size: tuple[int, int], in_chans: int, dim: int):
        super().__init__()
        if patch_size not in ((16, 16), (8, 8)):
            raise ValueError(
                f"--patch_embed conv works at --patch_size 16 or 8, found {patch_size[0]}x{patch_size[1]}"
            )
        from timm.models.resnet import Bottleneck  # timm takes seconds to import

        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.grid = patch_grid(img_size, patch_size)
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 64, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1))
        self.blocks, width = nn.Sequential(), 64
        for stride in (2, 2, patch_size[0] // 8):
            shortcut = nn.Sequential(nn.Conv2d(width, 256, 1, stride, bias=False), nn.BatchNorm2d(256))
            self.blocks.append(
                Bottleneck(
                    width, 64, stride, shortcut, norm_layer=partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
                )
            )
            width = 256
        self.proj = nn.Conv2d(256, dim, 1)

    def forward(self, imgs: Tensor) -> Tensor:
        check_images(imgs, self.in_chans, self.img_size)
        return self.proj(self.blocks(self.stem(imgs))).flatten(2).transpose(1, 2)
