import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from ctt import models
from ctt.errors import UserError
from ctt.models import weights
from ctt.models.base import SegmentationModel


@pytest.fixture
def network() -> SegmentationModel:
    return models.build("deeplabv2", 5, 16, backbone="resnet18")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_students_start_from_networks_of_other_classes(tmp_path: Path, suffix: str) -> None:
    donor, network = (models.build("small", classes, 8, 4) for classes in (5, 11))
    path = tmp_path / f"donor{suffix}"
    if suffix == ".pth":
        torch.save(donor.state_dict(), path)
    else:
        save_file(donor.state_dict(), path)
    shown = weights.start_from(network, str(path))
    total = len(network.state_dict())
    assert f"{total - 2} of the network's {total} tensors" in shown
    assert "left over: classifier.bias, classifier.weight" in shown
    assert torch.equal(network.state_dict()["stem.0.weight"], donor.state_dict()["stem.0.weight"])


@pytest.mark.parametrize(
    ("prefix", "nest"),
    [
        ("", ""),  # timm, torchvision
        ("backbone.", ""),  # torchvision's segmentation networks
        ("module.encoder.", "state_dict"),
        ("Scale.", ""),  # DeepLab's PyTorch ports
        ("module.model.backbone.net.", "model"),
    ],
)
def test_names_of_other_trainers(
    network: SegmentationModel, tmp_path: Path, prefix: str, nest: str
) -> None:
    donor = timm.create_model("resnet18")
    values: dict[str, object] = {prefix + key: v for key, v in donor.state_dict().items()}
    torch.save({nest: values, "epoch": 3} if nest else values, tmp_path / "net.pth")
    shown = weights.start_from(network, str(tmp_path / "net.pth"))
    body = [name for name in network.state_dict() if name.startswith("backbone.")]
    assert f"{len(body)} of {len(body)} of the backbone" in shown
    assert f"left over: {prefix}fc.bias, {prefix}fc.weight." in shown
    own = network.state_dict()
    for key, value in donor.state_dict().items():
        if not key.startswith("fc."):
            assert torch.equal(own[f"backbone.net.{key}"], value)


def test_nets_of_features_that_join_names(tmp_path: Path) -> None:
    """timm renames stages.0 of a ConvNeXt to stages_0 when it makes a net of features."""
    network = models.build("deeplabv2", 5, 16, backbone="convnext_atto")
    save_file(timm.create_model("convnext_atto").state_dict(), tmp_path / "net.safetensors")
    shown = weights.start_from(network, str(tmp_path / "net.safetensors"))
    body = sum(name.startswith("backbone.") for name in network.state_dict())
    assert f"{body} of {body} of the backbone" in shown


def test_what_are_no_weights_of_this_network(network: SegmentationModel, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    torch.save({"a": tmp_path}, tmp_path / "code.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "text.safetensors").write_text("hello")
    for bad in ("other.pth", "code.pth", "list.pth", "text.pth", "empty.pth", "text.safetensors"):
        with pytest.raises(UserError, match=f"`model.weights` .*{bad}"):
            weights.start_from(network, str(tmp_path / bad))
    torch.save({"method": {"students.0.a": torch.ones(1)}, "optimizers": {}}, tmp_path / "last.pt")
    for place, what in (("", "this is a folder"), ("last.pt", "this is the checkpoint of a run")):
        with pytest.raises(UserError, match=rf"{what}.*best\.safetensors"):
            weights.start_from(network, str(tmp_path / place))
    with pytest.raises(UserError, match="there is no such file"):
        weights.start_from(network, "image-net")
    with pytest.raises(UserError, match="small has no backbone with published weights"):
        weights.start_from(models.build("small", 5, 8, 4), "imagenet")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of an empty cache, and a hub that cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_published_weights_without_network_or_cache(
    network: SegmentationModel, no_network: Path
) -> None:
    fetch = "ctt-data fetch weights --backbone resnet18"
    with pytest.raises(UserError, match=rf"{fetch}.*model.safetensors of timm/resnet18\.a1_in1k"):
        weights.start_from(network, "imagenet")
    with pytest.raises(UserError, match=r"cannot be downloaded .* of timm/resnet18\.a1_in1k"):
        weights.fetch_published("resnet18")
    with pytest.raises(UserError, match="none are published for efficientnet_b6"):
        weights.published("efficientnet_b6")
    with pytest.raises(UserError, match=r"none are published for resnet18\.no_tag"):
        weights.fetch_published("resnet18.no_tag")
    with pytest.raises(UserError, match=r"no weights for resnet18\.no_tag"):
        weights.published_input("resnet18.no_tag")
    with pytest.raises(UserError, match="of smp-hub/mit_b0"):
        weights.published("mit_b0")


def test_published_weights_from_the_cache(network: SegmentationModel, no_network: Path) -> None:
    repository = no_network / "models--timm--resnet18.a1_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc").mkdir(parents=True)
    donor = timm.create_model("resnet18")
    save_file(donor.state_dict(), repository / "snapshots" / "abc" / "model.safetensors")
    weights.start_from(network, "imagenet")
    own = network.state_dict()
    assert torch.equal(own["backbone.net.conv1.weight"], donor.state_dict()["conv1.weight"])


@pytest.mark.parametrize(
    ("backbone", "seen"),
    [("tf_efficientnet_lite0", ("palace", "daisy")), ("tf_efficientnet_lite2", ("palace",))],
)
def test_packaged_weights_see_what_is_in_a_photograph(
    backbone: str, seen: tuple[str, ...], no_network: Path
) -> None:
    from sklearn.datasets import load_sample_images

    if weights.packaged(backbone) is None:
        pytest.skip(f"{weights.PACKAGES[backbone][0]} is not installed")
    classifier = timm.create_model(backbone).eval()
    classifier.load_state_dict(weights.published(backbone))
    network = models.build("deeplabv3plus", 5, 16, backbone=backbone)
    shown = weights.start_from(network, "imagenet")
    body = sum(name.startswith("backbone.") for name in network.state_dict())
    assert f"{body} of {body} of the backbone" in shown
    classes = timm.data.ImageNetInfo()
    for pixels, expected in zip(load_sample_images().images, seen, strict=False):
        images = to_lite(torch.tensor(pixels))
        with torch.no_grad():
            label = int(classifier(images).argmax())
            ours = network.eval().backbone(images)[2]  # before the dilated stages
            theirs = classifier.forward_intermediates(images, intermediates_only=True)[2]
        assert expected in classes.index_to_description(label)
        torch.testing.assert_close(ours, theirs)


def to_lite(pixels: Tensor) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, 224, 224), the middle, as the network was trained to see it."""
    images = pixels.permute(2, 0, 1)[None].float() / 127.5 - 1
    small = torch.nn.functional.interpolate(images, size=(256, 384), mode="bilinear")
    return small[:, :, 16:240, 80:304]


@pytest.mark.parametrize(
    "wrapped",
    [
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "net._orig_mod.{}",
        "model.module.{}",
    ],
)
def test_wrapped_networks_and_numbers_of_numpy(
    network: SegmentationModel, tmp_path: Path, wrapped: str
) -> None:
    donor = {key: value + 1 for key, value in network.state_dict().items()}
    inner = {
        wrapped.format(key.replace("classifier.", "classifier._orig_mod.")): value
        for key, value in donor.items()
    }
    best = {"previous_best": np.float64(71.3), "epoch": np.int64(3), "single": np.float32(0.5)}
    torch.save({"model": inner, **best}, tmp_path / "w.pth")
    weights.start_from(network, str(tmp_path / "w.pth"))
    assert all(torch.equal(network.state_dict()[key], value) for key, value in donor.items())


def test_numbers_of_numpy_1(network: SegmentationModel, tmp_path: Path) -> None:
    state = network.state_dict()
    torch.save({"model": state, "best": np.float64(1)}, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as old,
        zipfile.ZipFile(tmp_path / "old.pth", "w") as new,
    ):
        for item in old.infolist():
            new.writestr(item.filename, old.read(item).replace(b"numpy._core", b"numpy.core"))
    assert "found" in weights.start_from(network, str(tmp_path / "old.pth"))


@pytest.mark.parametrize("content", [b"\x80\x02.", b"", b"\x80", b"text", b"PK\x03\x04"])
def test_a_broken_file_is_told(network: SegmentationModel, tmp_path: Path, content: bytes) -> None:
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            weights.start_from(network, str(tmp_path / name))


def test_positions_of_larger_images_are_interpolated(tmp_path: Path) -> None:
    donor = timm.create_model("vit_tiny_patch16_224", img_size=384, depth=4)
    ramp = torch.linspace(0, 1, 24).repeat_interleave(24)  # over the rows
    donor.pos_embed.data[:, 1:] = ramp[None, :, None]
    torch.save(donor.state_dict(), tmp_path / "w.pth")
    network = models.build("vit", 5, 16, backbone="vit_tiny_patch16_224")
    shown = weights.start_from(network, str(tmp_path / "w.pth"))
    assert "backbone.pos_embed is interpolated from 577 positions to 197." in shown
    table = network.state_dict()["backbone.pos_embed"]
    assert torch.equal(table[0, 0], donor.state_dict()["pos_embed"][0, 0])
    rows = table[0, 1:].reshape(14, 14, -1).mean(dim=(1, 2))
    assert torch.allclose(rows, torch.linspace(0, 1, 14), atol=0.05)


def test_weights_of_another_backbone_are_refused(tmp_path: Path) -> None:
    network = models.build("deeplabv2", 5, 16, backbone="resnet50")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"have a name of the backbone but another shape, such as"):
        weights.start_from(network, str(tmp_path / "w.pth"))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    tables = {"pos_embed": torch.zeros(1, 150, 192)}  # of images that are no squares
    torch.save(tables, tmp_path / "w.pth")
    vit = models.build("vit", 5, 16, backbone="vit_tiny_patch16_224")
    with pytest.raises(UserError, match="no tensor in the file has a name and shape"):
        weights.start_from(vit, str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("name", "backbone", "message"),
    [
        ("small", "", r"the network but another shape, such as stem.0.weight, \[8, 3, 3, 3\]"),
        ("deeplabv2", "resnet18", "no tensor in the file has a name and shape"),
    ],
)
def test_what_fits_by_chance_is_no_network(
    name: str, backbone: str, message: str, tmp_path: Path
) -> None:
    """Batch norms have counters of one shape, and classifiers of one dataset may be alike."""
    save_file(models.build("small", 5, 8, 8).state_dict(), tmp_path / "w.safetensors")
    network = models.build(name, 5, 8, 4, backbone=backbone)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(UserError, match=message):
        weights.start_from(network, str(tmp_path / "w.safetensors"))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_part_of_a_backbone_is_a_warning(network: SegmentationModel, tmp_path: Path) -> None:
    state = timm.create_model("resnet18").state_dict()
    part = {name: value for name, value in state.items() if not name.startswith("layer4.1.")}
    torch.save(part, tmp_path / "w.pth")
    shown = weights.start_from(network, str(tmp_path / "w.pth"))
    assert "Warning: 10 tensors of the backbone are not in the file, such as backbone.net." in shown
    older = {name: value for name, value in state.items() if "num_batches_tracked" not in name}
    torch.save(older, tmp_path / "w.pth")
    assert "Warning" not in weights.start_from(network, str(tmp_path / "w.pth"))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "body"])
def test_published_weights_from_a_package(
    whole: bool, no_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package's file has timm's tensors in timm's order, some without those of the classifier."""
    backbone = "tf_efficientnet_lite0"
    package, name = weights.PACKAGES[backbone]
    donor = timm.create_model(backbone).state_dict()
    own = [value for key, value in donor.items() if whole or not key.startswith("classifier.")]
    file = no_network / package / name
    file.parent.mkdir(parents=True)
    (no_network / package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    torch.save({f"its.{i}": value for i, value in enumerate(own)}, file)
    monkeypatch.syspath_prepend(str(no_network))
    found = weights.published(backbone)
    assert len(found) == len(own)
    assert all(torch.equal(value, donor[key]) for key, value in found.items())
    torch.save({f"its.{i}": value for i, value in enumerate(own[:-9])}, file)
    with pytest.raises(UserError, match=rf"{name} does not hold the tensors of timm's {backbone}"):
        weights.published(backbone)
