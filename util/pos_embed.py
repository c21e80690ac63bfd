"""Re-export under the module name of MAE, which users of MAE import. It stays."""

from layers.pos_embed import resize_pos_embed, sincos_1d, sincos_2d

__all__ = ["resize_pos_embed", "sincos_1d", "sincos_2d"]
