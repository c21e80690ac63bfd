"""The name under which MAE's users import this; it stays."""

from layers.pos_embed import resize_pos_embed, sincos_1d, sincos_2d

__all__ = ["resize_pos_embed", "sincos_1d", "sincos_2d"]
