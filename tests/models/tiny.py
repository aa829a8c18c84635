"""Small vision transformers under names of their own, of kinds that timm has only large ones of."""

from typing import Any

from timm.models import register_model
from timm.models.eva import _create_eva
from timm.models.swin_transformer import _create_swin_transformer
from timm.models.vision_transformer import _create_vision_transformer
from torch import nn

SMALL = {"depth": 4, "embed_dim": 48, "num_heads": 3}
PATCH14 = "mini_vit_patch14_reg4"
ROTARY = "mini_vit_patch16_rotary"
SWIN = "swin_mini_window4_64"


@register_model
def mini_vit_patch14_reg4(pretrained: bool = False, **options: Any) -> nn.Module:
    """A DINOv2 with registers: layer scale, position embeddings of the patches alone."""
    kind = {"img_size": 56, "patch_size": 14, "init_values": 0.3}
    tokens = {"reg_tokens": 4, "no_embed_class": True}
    model: nn.Module = _create_vision_transformer(
        PATCH14, pretrained, **SMALL | kind | tokens | options
    )
    return model


@register_model
def mini_vit_patch16_rotary(pretrained: bool = False, **options: Any) -> nn.Module:
    """A DINOv3: rotary position embeddings alone, registers."""
    kind = {"img_size": 64, "patch_size": 16, "init_values": 0.3, "qkv_bias": False}
    rotary = {"rope_type": "dinov3", "use_rot_pos_emb": True, "use_abs_pos_emb": False}
    tokens = {"num_reg_tokens": 4, "use_fc_norm": False}
    model: nn.Module = _create_eva(ROTARY, pretrained, **SMALL | kind | rotary | tokens | options)
    return model


@register_model
def swin_mini_window4_64(pretrained: bool = False, **options: Any) -> nn.Module:
    """A Swin transformer."""
    kind = {"img_size": 64, "window_size": 4, "embed_dim": 24}
    depth = {"depths": (2, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
    model: nn.Module = _create_swin_transformer(SWIN, pretrained, **kind | depth | options)
    return model
