"""So-ViT's token embedding: a small residual convolutional network instead of a linear patch embedding."""

from functools import partial

from torch import Tensor, nn

from layers.transformer import check_images, patch_grid


class ConvTokenEmbed(nn.Module):
    """Images (B, in_chans, H, W) -> tokens (B, L, dim), row by row (Xie et al. 2021).

    The network is a 3x3 convolution with max pooling, three ResNet bottlenecks, and a 1x1 convolution
    to the token width. `patch_size` is its stride: 16, or 8 for small images (the third bottleneck
    then keeps the resolution). A token sees 33x33 pixels, more than its cell. So this embedding cannot
    be combined with masking.

    Raises ValueError if the stride is neither 16 nor 8, or if an image side is not a multiple of it.
    """

    def __init__(self, img_size: tuple[int, int], patch_size: tuple[int, int], in_chans: int, dim: int):
        super().__init__()
        if patch_size not in ((16, 16), (8, 8)):
            raise ValueError(
                f"`patch_embed` conv works at `patch_size` 16 or 8, found {patch_size[0]}x{patch_size[1]}"
            )
        # Imported here, because timm takes seconds to import and most runs do not need it.
        from timm.models.resnet import Bottleneck

        self.img_size = img_size
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.grid = patch_grid(img_size, patch_size)
        self.stem = nn.Sequential(nn.Conv2d(in_chans, 64, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1))
        self.blocks = nn.Sequential()
        # Normalisation inside the bottlenecks; the shortcuts have PyTorch's defaults.
        norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
        width = 64
        for stride in (2, 2, patch_size[0] // 8):
            shortcut = nn.Sequential(nn.Conv2d(width, 256, 1, stride, bias=False), nn.BatchNorm2d(256))
            # timm annotates `norm_layer` as a class, and takes any function that makes a module.
            block = Bottleneck(width, 64, stride, shortcut, norm_layer=norm)  # type: ignore[arg-type]
            self.blocks.append(block)
            width = 256
        self.proj = nn.Conv2d(256, dim, 1)

    def forward(self, imgs: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, L, dim). Raises ValueError on images of another shape."""
        check_images(imgs, self.in_chans, self.img_size)
        return self.embed(imgs)

    def embed(self, imgs: Tensor) -> Tensor:
        """The same for images of any size whose sides are multiples of the stride."""
        x = self.stem(imgs)  # (B, 64, H/2, W/2)
        x = self.blocks(x)  # (B, 256, h, w)
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, L, dim)
