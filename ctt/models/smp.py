"""The architectures of segmentation_models_pytorch."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import segmentation_models_pytorch
import timm
import torch
from segmentation_models_pytorch.encoders.timm_vit import TimmViTEncoder
from torch import Tensor, nn

from ctt.errors import UserError
from ctt.models.base import (
    BackboneModel,
    PooledNorm,
    are_patches,
    conv_bn,
    crop_to_stride,
    pad_to_multiple,
)
from ctt.models.timm_backbone import check_name

PROBE = 448  # whole patches of 14, 16 and 32 pixels


def architectures() -> list[str]:
    """Return names that `Smp` knows."""
    return sorted(segmentation_models_pytorch.MODEL_ARCHITECTURES_MAPPING)


class Smp(BackboneModel):
    """Encoder and decoder of the library; of its head only the number of channels it reads stays.

    Features are what the head reads, where that has D channels (deeplabv3, deeplabv3plus, upernet
    and segformer at D = 256). Elsewhere a 3x3 convolution with batch norm and ReLU takes it to D.
    Decoders of the U-Net kind work at the resolution of the image: choose a small D there.

    Images of any size: they are padded to what the encoder needs by the normalised colour 0. The
    stages are the library's, from the image on; one of no channels stands where the encoder has
    nothing at stride 2. Each stage of a ViT has the class token, in every cell, beside its map.

    Args:
        architecture: one of `architectures()`.
        num_classes: C.
        features: D.
        backbone: name of a timm model, else of an encoder that the library has itself.
        channels: of the images.

    Raises:
        UserError: no such architecture or backbone, or they do not fit each other.
    """

    first_map = 1

    def __init__(
        self,
        architecture: str,
        num_classes: int,
        features: int,
        backbone: str,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.backbone_name = backbone
        net = _create(architecture, backbone, channels)
        self.backbone, self.decoder = net.encoder, allow_single_values(net.decoder)
        self.patches = are_patches(net.encoder)
        # the coarsest stage of a DPT is at twice the stride of its encoder
        self.multiple = int(net.encoder.output_stride) * (2 if architecture == "dpt" else 1)
        # PAN halves the last stage three times over before its last convolution
        self.smallest = 8 * self.multiple if architecture == "pan" else 0
        encoder_channels = tuple(net.encoder.out_channels)
        self.is_vit = isinstance(net.encoder, TimmViTEncoder)
        self.has_token = self.is_vit and bool(net.encoder.has_prefix_tokens)
        self.lists_image = encoder_channels[0] == channels
        if self.has_token:
            encoder_channels = tuple(2 * channels for channels in encoder_channels)
        self.stage_channels = (
            encoder_channels if self.lists_image else (channels, *encoder_channels)
        )
        decoded, self.stride = self._probe(f"smp:{architecture}")
        # where nothing is to be converted the classifier reads the decoder itself
        self.project = nn.Identity() if decoded == features else conv_bn(decoded, features)
        self.classifier = nn.Conv2d(features, num_classes, 1)

    def encode(self, images: Tensor) -> list[Tensor]:
        found: Any = self.backbone(self._pad(self.adapted(images)))
        if self.is_vit:
            maps, tokens = found  # (B, dim, h, w) and (B, tokens, dim) of each stage
            if self.has_token:
                # the decoder reads the first token, that of the class
                pairs = zip(maps, tokens, strict=True)
                maps = [torch.cat([x, spread(token[:, 0], x)], dim=1) for x, token in pairs]
            return [images, *maps]
        return [images, *(found[1:] if self.lists_image else found)]

    def decode(self, stages: list[Tensor]) -> Tensor:
        return crop_to_stride(self.project(self._decode(stages)), stages[0], self.stride)

    def _decode(self, stages: list[Tensor]) -> Tensor:
        images, *maps = stages
        decoded: Tensor
        if self.is_vit:
            tokens: list[Tensor | None] = [None] * len(maps)
            if self.has_token:
                halves = [x.chunk(2, dim=1) for x in maps]
                maps = [x.contiguous() for x, _ in halves]
                tokens = [token[:, None, :, 0, 0] for _, token in halves]
            decoded = self.decoder(maps, tokens)
        else:
            decoded = self.decoder([self._pad(images), *maps] if self.lists_image else maps)
        return decoded

    def _pad(self, images: Tensor) -> Tensor:
        return pad_to_multiple(images, self.multiple, self.smallest)

    def _probe(self, name: str) -> tuple[int, int]:
        """Channels and stride of what the decoder gives; what it leaves unread is not trained.

        Several processes would wait for the gradients of stages and layers that none reads.
        """
        empty = copy.deepcopy(self).eval().to("meta")
        try:
            images = torch.empty(1, self.stage_channels[0], PROBE, PROBE, device="meta")
            decoded = empty._decode(empty.encode(images))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise _not_fitting(name, self.backbone_name, error) from None
        decoded.sum().backward()  # type: ignore[no-untyped-call]
        for key, parameter in empty.named_parameters():
            self.get_parameter(key).requires_grad_(parameter.grad is not None)
        return decoded.shape[1], PROBE // decoded.shape[2]


def _create(architecture: str, backbone: str, channels: int) -> Any:
    name = f"smp:{architecture}"
    if architecture not in architectures():
        known = ", ".join(f"smp:{known}" for known in architectures())
        raise UserError(f"`model.name` {name}: no such architecture. Known: {known}.")
    own = segmentation_models_pytorch.encoders.get_encoder_names()
    check_name(backbone, own)
    encoder = f"tu-{backbone}" if timm.is_model(backbone) else backbone
    # transformers take images of one size unless they are asked to
    options = {"dynamic_img_size": True} if backbone.startswith("vit_") else {}
    try:
        with warnings.catch_warnings(action="ignore"):  # about other ways to ask for an encoder
            return segmentation_models_pytorch.create_model(
                architecture, encoder, encoder_weights=None, in_channels=channels, **options
            )
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _not_fitting(name, backbone, error) from None


def _not_fitting(name: str, backbone: str, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0] or type(error).__name__
    return UserError(
        f"`model.name` {name} cannot be built on `model.backbone` {backbone} ({reason})."
    )


def spread(vectors: Tensor, maps: Tensor) -> Tensor:
    """Return vectors (B, D) in every cell of maps (B, _, h, w): (B, D, h, w)."""
    return vectors[:, :, None, None].expand(-1, -1, *maps.shape[-2:])


def allow_single_values(module: nn.Module) -> nn.Module:
    """Replace a module's batch norms by `PooledNorm`: some pool an image to a single pixel."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            norm = PooledNorm(child.num_features, child.eps, child.momentum)
            norm.load_state_dict(child.state_dict())
            setattr(module, name, norm)
        else:
            allow_single_values(child)
    return module
