"""What every network gives: logits and features from one forward."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Output(NamedTuple):
    """What a network gives for images (B, 3, H, W).

    Attributes:
        logits: (B, C, h, w), not upsampled.
        features: (B, D, h, w), the input of the last 1x1 classifier.
    """

    logits: Tensor
    features: Tensor


class Grid(NamedTuple):
    """Where the cells of a network's maps lie: cell r looks around pixel `stride` * r + `origin`.

    Attributes:
        stride: pixels from cell to cell.
        origin: pixel around which the first cell looks: 0 for convolutions that pad both sides,
            the middle of the first `stride` pixels, (stride - 1) / 2, for patches.
        label: the pixel whose label the first cell has, a whole number.
        cells: 0, or how many cells `stride` pixels have. They are then spread evenly from the first
            pixel of an image to the last one of its whole patches of `stride` pixels, as bilinear
            interpolation with aligned corners has them.
    """

    stride: int
    origin: float = 0.0
    label: int = 0
    cells: int = 0

    @classmethod
    def of_patches(cls, stride: int) -> Self:
        """Return the grid of patches of `stride` pixels that do not overlap."""
        return cls(stride, (stride - 1) / 2, (stride - 1) // 2)

    @property
    def distance(self) -> float:
        """Return the pixels between cells; not whole where cells are spread over patches."""
        return self.stride / max(1, self.cells)

    def every(self, n: int) -> "Grid":
        """Return the grid of every n-th cell, or of as many whole pixels where cells are spread."""
        if self.cells:
            return Grid(max(1, round(n * self.distance)))
        return self._replace(stride=n * self.stride)

    def pixels(self, length: int, device: torch.device) -> Tensor:
        """Return the pixel whose label each cell has, along a side of `length` pixels."""
        if not self.cells:
            whole = torch.arange(self.label, self.label + length, self.stride, device=device)
            return whole.clamp(max=length - 1)  # it may end before the middle of the last patch
        patches = -(-length // self.stride)
        last_cell, last = patches * self.cells - 1, patches * self.stride - 1
        cells = torch.arange(last_cell + 1, device=device)
        return rounded(cells * last, last_cell).clamp(max=length - 1)

    def nearest(self, coarse: "Grid", count: int, length: int, device: torch.device) -> Tensor:
        """Return the cell of this grid nearest to each of the first `count` cells of another one.

        Args:
            coarse: whose cells are not spread.
            length: how many cells this one has along the side.
        """
        place = 2 * torch.arange(count, device=device) * coarse.stride  # in half pixels
        if self.cells:
            last = length // self.cells * self.stride - 1
            cell = rounded((place + int(2 * coarse.origin)) * (length - 1), 2 * last)
        else:
            cell = rounded(place + int(2 * (coarse.origin - self.origin)), 2 * self.stride)
        return cell.clamp(min=0, max=length - 1)


def rounded(values: Tensor, divisor: int) -> Tensor:
    """Return values / divisor, whole numbers, to the nearest whole number; a half goes up."""
    return (2 * values + divisor).div(2 * divisor, rounding_mode="floor")


class SegmentationModel(nn.Module, ABC):
    """A network that gives features (B, D, h, w), and a 1x1 classifier on them.

    Subclasses implement `encode` and `decode`, between which others may perturb the stages;
    `classifier` is the last 1x1 convolution.

    Attributes:
        stride: input pixels for each pixel of the features: h = ceil(H / stride), unless `grid`
            spreads its cells; then the next whole number of pixels.
        multiple: of which the sides of an image are where the network does not pad it.
        patches: its cells look at patches that do not overlap; see `Grid`.
        legacy_grid: it was trained when logits were taken for those of patches in any network, and
            labels were read at every stride-th pixel.
        stage_channels: of each tensor that `encode` gives.
        first_map: which of them is the first that is no image.
        options: what `ctt.models.build` makes this network from, but the number of classes.
    """

    classifier: nn.Conv2d
    stride: int
    multiple = 1
    patches = False
    legacy_grid = False
    stage_channels: tuple[int, ...]
    first_map = 0
    options: dict[str, Any]

    @property
    def grid(self) -> Grid:
        """Return where the cells of logits and features lie in the images."""
        return self.grid_of(self.stride)

    def grid_of(self, stride: int) -> Grid:
        """Return where cells of `stride` pixels lie, such as those of a stage."""
        if self.legacy_grid:
            return Grid.of_patches(stride)._replace(label=0)
        return Grid.of_patches(stride) if self.patches else Grid(stride)

    @property
    def feature_channels(self) -> int:
        """Return D, the number of channels of the features."""
        return self.classifier.in_channels

    def stage_stride(self, stage: Tensor, size: tuple[int, int]) -> int:
        """Return the pixels from cell to cell of a stage of images of this height and width."""
        times = 1
        while -(-size[0] // (times * self.stride)) > stage.shape[2]:
            times *= 2
        return times * self.stride

    @abstractmethod
    def encode(self, images: Tensor) -> list[Tensor]:
        """Return what `decode` reads of images (B, 3, H, W), normalised.

        These are maps (B, `stage_channels[i]`, h_i, w_i), the finest first. Networks that pad their
        images have the images as they are for the first: `decode` reads the size of those alone.
        """

    @abstractmethod
    def decode(self, stages: list[Tensor]) -> Tensor:
        """Return features (B, D, h, w) of stages, which may be perturbed but keep their shapes."""

    def forward(self, images: Tensor) -> Output:
        return self.finish(self.encode(images))

    def finish(self, stages: list[Tensor]) -> Output:
        """Return the output for stages."""
        features = self.decode(stages)
        return Output(self.classifier(features), features)

    def scale_channels(self, stages: list[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
        """Return stages with factors (B, `stage_channels[i]`) on the channels of each.

        Images among the stages stay: `decode` reads their size alone.
        """
        first = self.first_map
        scaled = [x * f[:, :, None, None].to(x.dtype) for x, f in zip(stages, factors, strict=True)]
        return [*stages[:first], *scaled[first:]]

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters that a recipe may train with a larger learning rate."""
        return self.classifier.parameters()


class BackboneModel(SegmentationModel):
    """A network with a backbone that may start from published weights; the rest is its head.

    Attributes:
        backbone: named as in `backbone_name`.
        own_input: it takes images normalised in its own way, by `input_scale` and `input_shift`
            (3, 1, 1) of the normalised images that the network gets.
        batch_norm_frozen: the backbone's batch norms stay as they are, see `freeze_batch_norm`.
        backbone_frozen: the whole of it does, see `freeze_backbone`.
    """

    backbone: nn.Module
    backbone_name: str
    input_scale: Tensor
    input_shift: Tensor
    own_input = False
    batch_norm_frozen = False
    backbone_frozen = False

    def head_parameters(self) -> Iterator[nn.Parameter]:
        for name, parameter in self.named_parameters():
            if not name.startswith("backbone."):
                yield parameter

    def have_own_input(self) -> None:
        """Add a normalisation of the backbone alone; it changes nothing until `set_own_input`."""
        self.own_input = True
        self.register_buffer("input_scale", torch.ones(3, 1, 1))
        self.register_buffer("input_shift", torch.zeros(3, 1, 1))

    def set_own_input(
        self, data: tuple[Sequence[float], Sequence[float]], own: tuple[Sequence[float], ...]
    ) -> None:
        """Set the normalisation of the backbone.

        Args:
            data: mean and deviation of the channels in 0..1, by which images come normalised.
            own: those by which the backbone takes them.
        """
        (mean, std), (own_mean, own_std) = (
            (torch.tensor(x)[:, None, None] for x in pair) for pair in (data, own)
        )
        self.input_scale.copy_(std / own_std)
        self.input_shift.copy_((mean - own_mean) / own_std)

    def widen_own_input(self, channels: int) -> None:
        """Let further channels, which follow those of an image, reach the backbone as they are."""
        for name, value in (("input_scale", 1.0), ("input_shift", 0.0)):
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_full((channels, 1, 1), value)]))

    def adapted(self, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W), normalised as the network gets them, for the backbone."""
        return images * self.input_scale + self.input_shift if self.own_input else images

    def freeze_batch_norm(self) -> None:
        """Fix statistics, scale and shift of the backbone's batch norms for the whole run.

        The head's are left alone: theirs are fresh and have everything to learn.
        """
        self.batch_norm_frozen = True
        for norm in self._backbone_norms():
            norm.requires_grad_(False)
        self.train(self.training)

    def freeze_backbone(self) -> None:
        """Fix the backbone for the whole run, in evaluation mode; the head is trained."""
        self.backbone_frozen = True
        self.backbone.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.backbone_frozen:
            self.backbone.eval()
        if self.batch_norm_frozen:
            for norm in self._backbone_norms():
                norm.eval()
        return self

    def _backbone_norms(self) -> Iterator[nn.Module]:
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                yield module


class PooledNorm(nn.BatchNorm2d):
    """Batch norm that also takes one value a channel, as image pooling of a single image gives.

    A single value has no deviation, so the running statistics serve and are left as they are.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(x)


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    activate: bool = True,
) -> nn.Sequential:
    """Build a convolution that keeps the size (over the stride), batch norm and ReLU."""
    padding = dilation * (kernel // 2)
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    if activate:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def wide(values: Tensor) -> Tensor:
    """Return values of half precision in float32, others as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def scale_up(x: Tensor, size: tuple[int, int], factor: int, *, corners: bool) -> Tensor:
    """Return x (B, D, h, w) at `factor` times its resolution, bilinearly: (B, D, *size).

    Were h stretched to H, a pixel's place on the grid would depend on the size of the image, but
    for multiples of the stride: a network of stride 8 that is trained on crops of 321 would find
    classes of a larger image up to 3.5 pixels from where they are.

    Args:
        size: height and width of the result, at most `factor` times those of x.
        corners: row y of the result is row y / factor of x, as padded strided convolutions see it;
            else row (y + 0.5) / factor - 0.5, as patches do. Beyond the outermost rows of x its
            values stay.
    """
    if not corners:
        x = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
        return cut(x, size)
    # from the first row and column of x to the last ones
    inner = [factor * (n - 1) + 1 for n in x.shape[-2:]]
    if factor > 1:
        x = F.interpolate(x, size=inner, mode="bilinear", align_corners=True)
    if not torch.compiler.is_exporting() and (inner[0], inner[1]) == size:
        return x  # nothing is added; an exported graph would hold for such sizes alone
    bottom, right = size[0] - inner[0], size[1] - inner[1]
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # inductor expects another memory format of the gradient of F.pad than PyTorch returns
        x = torch.cat([x, x[:, :, -1:].expand(-1, -1, max(bottom, 0), -1)], dim=2)
        x = torch.cat([x, x[..., -1:].expand(-1, -1, -1, max(right, 0))], dim=3)
        return x[:, :, : size[0], : size[1]]
    return F.pad(x, (0, right, 0, bottom), mode="replicate")


def cut(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the first rows and columns of x (B, D, h, w), which has as many: (B, D, *size)."""
    # Gradients of a slice are no longer channels_last, and what follows then takes many times as
    # long; it would also make it a condition of an exported graph whether sides are multiples.
    return F.pad(x, (0, size[1] - x.shape[3], 0, size[0] - x.shape[2]))


def scale_up_like(x: Tensor, other: Tensor, factor: int, *, corners: bool) -> Tensor:
    """Return x at the resolution of `other`, which is `factor` times its own."""
    return scale_up(x, (other.shape[-2], other.shape[-1]), factor, corners=corners)


def subsample(x: Tensor, step: int) -> Tensor:
    """Return every `step`-th row and column of x (B, D, h, w), from the first: (B, D, h', w') with
    h' = ceil(h / step).

    x[:, :, ::step, ::step] has the same values, but its gradient is no longer channels_last.
    """
    return F.avg_pool2d(x, 1, step) if step > 1 else x


def upsample(logits: Tensor, size: tuple[int, int], grid: Grid) -> Tensor:
    """Return logits (B, C, h, w) at every pixel of the images, in float32 at least: (B, C, H, W).

    Args:
        logits: whose cells lie on `grid`.
        size: H and W.
    """
    if grid.cells:
        whole = [n // grid.cells * grid.stride for n in logits.shape[-2:]]
        x = F.interpolate(wide(logits), size=whole, mode="bilinear", align_corners=True)
        return cut(x, size)
    return scale_up(wide(logits), size, grid.stride, corners=grid.origin == 0)


def are_patches(module: nn.Module) -> bool:
    """Return whether the first convolution of a backbone looks at patches that do not overlap."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            kernel, stride = layer.kernel_size[0], layer.stride[0]
            return kernel == stride and not any(layer.padding)
    return False


def pad_to_multiple(images: Tensor, multiple: int, smallest: int = 0) -> Tensor:
    """Pad images with zeros, the mean colour, below and on the right, to multiples of `multiple`.

    They become `smallest` high and wide at least, which is such a multiple.
    """
    height, width = grid_size(images, multiple)
    bottom = max(height * multiple, smallest) - images.shape[-2]
    right = max(width * multiple, smallest) - images.shape[-1]
    return F.pad(images, (0, right, 0, bottom))


def crop_to_stride(features: Tensor, images: Tensor, stride: int) -> Tensor:
    """Cut off the features of padded images that show the padding alone."""
    height, width = grid_size(images, stride)
    return features[:, :, :height, :width]


def grid_size(images: Tensor, stride: int) -> tuple[int, int]:
    """Return height and width of the grid: ceil(H / stride) and ceil(W / stride).

    Written without negative numbers: ONNX rounds their division the other way.
    """
    height, width = images.shape[-2:]
    return (height + stride - 1) // stride, (width + stride - 1) // stride
