"""The architectures of segmentation_models_pytorch."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import segmentation_models_pytorch
import timm
import torch
from torch import Tensor, nn

from ctt.errors import UserError
from ctt.models.base import BackboneModel, PooledNorm, conv_bn, crop_to_stride, pad_to_multiple
from ctt.models.timm_backbone import check_name

PROBE = 448  # whole patches of 14, 16 and 32 pixels


def architectures() -> list[str]:
    """Names that `Smp` knows."""
    return sorted(segmentation_models_pytorch.MODEL_ARCHITECTURES_MAPPING)


class Smp(BackboneModel):
    """Encoder and decoder of the library; of its head only the number of channels it reads stays.

    Features are what the head reads, where that has D channels (deeplabv3, deeplabv3plus, upernet
    and segformer at D = 256). Elsewhere a 3x3 convolution with batch norm and ReLU takes it to D.
    Decoders of the U-Net kind work at the resolution of the image: choose a small D there.

    Images of any size: they are padded to what the encoder needs by the normalised colour 0.

    Args:
        architecture: one of `architectures()`. num_classes: C. features: D.
        backbone: name of a timm model, else of an encoder that the library has itself.

    Raises:
        UserError: no such architecture or backbone, or they do not fit each other.
    """

    def __init__(self, architecture: str, num_classes: int, features: int, backbone: str) -> None:
        super().__init__()
        self.backbone_name = backbone
        net = _create(architecture, backbone)
        self.backbone, self.decoder = net.encoder, allow_single_values(net.decoder)
        # the coarsest stage of a DPT is at twice the stride of its encoder
        self.multiple = int(net.encoder.output_stride) * (2 if architecture == "dpt" else 1)
        # PAN halves the last stage three times over before its last convolution
        self.smallest = 8 * self.multiple if architecture == "pan" else 0
        channels, self.stride = self._probe(f"smp:{architecture}")
        # where nothing is to be converted the classifier reads the decoder itself
        self.project = nn.Identity() if channels == features else conv_bn(channels, features)
        self.classifier = nn.Conv2d(features, num_classes, 1)

    def extract(self, images: Tensor) -> Tensor:
        decoded = self._decode(pad_to_multiple(images, self.multiple, self.smallest))
        return crop_to_stride(self.project(decoded), images, self.stride)

    def _decode(self, images: Tensor) -> Tensor:
        stages = self.backbone(images)
        # the encoder of a ViT gives its class token beside the stages
        decoded: Tensor = (
            self.decoder(*stages) if isinstance(stages, tuple) else self.decoder(stages)
        )
        return decoded

    def _probe(self, name: str) -> tuple[int, int]:
        """Channels and stride of what the decoder gives; what it leaves unread is not trained.

        Several processes would wait for the gradients of stages and layers that none reads.
        """
        empty = copy.deepcopy(self).eval().to("meta")
        try:
            decoded = empty._decode(torch.empty(1, 3, PROBE, PROBE, device="meta"))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise _not_fitting(name, self.backbone_name, error) from None
        decoded.sum().backward()  # type: ignore[no-untyped-call]
        for key, parameter in empty.named_parameters():
            self.get_parameter(key).requires_grad_(parameter.grad is not None)
        return decoded.shape[1], PROBE // decoded.shape[2]


def _create(architecture: str, backbone: str) -> Any:
    name = f"smp:{architecture}"
    if architecture not in architectures():
        known = ", ".join(f"smp:{known}" for known in architectures())
        raise UserError(f"--model.name {name}: no such architecture. Known: {known}.")
    own = segmentation_models_pytorch.encoders.get_encoder_names()
    check_name(backbone, own)
    encoder = f"tu-{backbone}" if timm.is_model(backbone) else backbone
    # transformers take images of one size unless they are asked to
    options = {"dynamic_img_size": True} if backbone.startswith("vit_") else {}
    try:
        with warnings.catch_warnings(action="ignore"):  # about other ways to ask for an encoder
            return segmentation_models_pytorch.create_model(
                architecture, encoder, encoder_weights=None, **options
            )
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _not_fitting(name, backbone, error) from None


def _not_fitting(name: str, backbone: str, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return UserError(
        f"--model.name {name} cannot be built on --model.backbone {backbone} ({reason})."
    )


def allow_single_values(module: nn.Module) -> nn.Module:
    """The module with `PooledNorm` for its batch norms: some pool an image to a single pixel."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            norm = PooledNorm(child.num_features, child.eps, child.momentum)
            norm.load_state_dict(child.state_dict())
            setattr(module, name, norm)
        else:
            allow_single_values(child)
    return module
