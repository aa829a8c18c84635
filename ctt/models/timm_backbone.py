"""Convolutional backbones of timm, dilated to an output stride."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ctt.errors import UserError
from ctt.models.base import are_patches, crop_to_stride, pad_to_multiple


class Stages(nn.Module):
    """What the stages of a timm backbone give, from the finest to the coarsest.

    The dilated ResNets are equal to torchvision's `replace_stride_with_dilation`: the first block
    of a dilated stage keeps the dilation of the stage before, and bottlenecks stride in their 3x3
    convolution. (DeepLab's own Caffe networks dilate that block too and stride in the 1x1.)

    Networks that pad as TensorFlow does (`tf_...`) place their grid by the size of the image: by up
    to a stride less one pixel. Crops and images of sizes alike serve them best. A dilated ConvNeXt
    pads one side alone: each dilated stage lies half a stride or more further on. Swin transformers
    cannot be dilated, and are taken at their own stride of 32.

    Args:
        name: of a timm model, with or without the tag of its weights (`resnet101.tv_in1k`).
        output_stride: of the coarsest stage; where the network would go on to stride, it dilates.
        drop_path: rate of stochastic depth in the last block, falling to 0 in the first.
        in_channels: of the images.

    Attributes:
        channels, strides: of each stage.
        patches: cells look at patches that do not overlap, as those of ConvNeXt do.
        short: whether the network would drop the last rows and columns of an odd image, and
            return fewer than ceil(H / stride). Such images are padded by the normalised colour 0.

    Raises:
        UserError: timm has no such model, or it cannot be dilated, or takes no images of any size.
    """

    def __init__(
        self, name: str, output_stride: int, drop_path: float = 0.0, in_channels: int = 3
    ) -> None:
        super().__init__()
        self.windowed = is_windowed(name)
        # Swin's own rate is 0.1, and its sizes are fixed unless it is told otherwise
        own = {"strict_img_size": False, "drop_path_rate": 0.0}
        dilated = {"output_stride": output_stride}
        options = own if self.windowed else dilated
        net: Any = create(name, drop_path, features_only=True, in_chans=in_channels, **options)
        self.net = net
        self.patches = are_patches(net)
        self.channels: list[int] = net.feature_info.channels()
        self.strides: list[int] = net.feature_info.reduction()
        if self.strides[-1] != output_stride:
            raise UserError(
                f"`model.backbone` {name} gives features at stride {self.strides[-1]}, not "
                f"`model.output_stride` {output_stride}."
            )
        if self.windowed:
            self.short = True
            return
        side = 8 * output_stride + 1
        empty = copy.deepcopy(net).eval().to("meta")
        try:
            with torch.no_grad():
                probe = empty(torch.empty(1, in_channels, side, side, device="meta"))
        except (AssertionError, RuntimeError, ValueError) as error:
            what = f"it takes no images of {side} x {side}"
            raise not_serving(name, f"{what} ({_reason(error)})") from None
        self.short = probe[-1].shape[-1] != -(-side // output_stride)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return each stage, (B, channels, ceil(H / stride), ceil(W / stride)), of images (B, 3, H,
        W)."""
        stages: list[Tensor]
        if not self.short:
            stages = self.net(images)
            return stages
        stages = self.net(pad_to_multiple(images, self.strides[-1]))
        if self.windowed:
            stages = [x.permute(0, 3, 1, 2) for x in stages]  # channels come last
        return [crop_to_stride(x, images, s) for x, s in zip(stages, self.strides, strict=True)]


def is_windowed(name: str) -> bool:
    """Return whether a timm model is a Swin transformer."""
    return name.startswith(("swin_", "swinv2_")) and not name.startswith("swinv2_cr_")


def create(name: str, drop_path: float = 0.0, **options: Any) -> nn.Module:
    """Return a timm model with fresh weights.

    Args:
        drop_path: rate of stochastic depth, for models that have it.

    Raises:
        UserError: timm has no such model, or the model does not know the options.
    """
    check_name(name)
    if drop_path:
        options["drop_path_rate"] = drop_path
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, **options)
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        asked = ", ".join(f"{key} {value}" for key, value in options.items())
        what = f"timm does not build it with {asked}"
        raise not_serving(name, f"{what} ({_reason(error)})") from None
    return network


def not_serving(name: str, what: str) -> UserError:
    """Return the refusal of a backbone that an architecture cannot be built on, and why."""
    return UserError(
        f"`model.backbone` {name} cannot serve this `model.name`: {what}. ResNets, RegNets, "
        f"EfficientNets, MobileNets, ConvNeXts and Swins serve deeplabv2 and deeplabv3plus, ViTs "
        f"serve vit and dpt."
    )


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def check_name(name: str, others: Sequence[str] = ()) -> None:
    """Refuse what neither timm nor the list of `others` knows, with the names that come near."""
    if timm.is_model(name) or name in others:
        return
    near = difflib.get_close_matches(name, [*timm.list_models(), *others], n=5, cutoff=0.6)
    hint = f"Near: {', '.join(near)}." if near else "timm.list_models() lists them."
    raise UserError(f"`model.backbone` {name}: timm has no such model. {hint}")
