import torch
from hypothesis import given
from hypothesis import strategies as st

from ctt.data.mixing import (
    TRIES,
    classmix_mask,
    cow_mask,
    cutmix_mask,
    cutout_mask,
    half_area_mask,
    half_width_mask,
    mix,
    small_box_mask,
)
from ctt.data.seeding import generator


@given(st.integers(0, 1000), st.integers(1, 9))
def test_classmix_keeps_half_of_the_classes_whole(seed: int, classes: int) -> None:
    rng = generator("classmix", seed)
    label = torch.randint(0, classes, (3, 7, 5), generator=rng)
    label[:, 0] = 255
    keep = classmix_mask(label, torch.rand(3, 9, generator=rng))
    assert not keep[label == 255].any()
    for image, kept in zip(label, keep, strict=True):
        present = set(image[image != 255].tolist())
        chosen = {c for c in present if kept[image == c].any()}
        assert all(kept[image == c].all() for c in chosen)
        assert len(chosen) == (len(present) + 1) // 2


def test_cutmix_takes_a_box_of_a_quarter_to_a_half() -> None:
    keep = cutmix_mask((40, 60), torch.rand(4, 50, generator=generator("cutmix")))
    for kept in keep:
        rows, columns = (~kept).nonzero(as_tuple=True)
        box = ~kept[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.all()
        assert 0.2 < box.numel() / kept.numel() < 0.55


def test_everything_is_mixed_alike() -> None:
    label = torch.randint(0, 5, (4, 6, 6))
    image = torch.stack([label, 10 * label, 100 * label], dim=1).float()
    keep = torch.rand(4, 6, 6) < 0.5
    mixed_image, mixed_label = (mix(x, x.roll(1, dims=0), keep) for x in (image, label))
    assert torch.equal(mixed_image[:, 0].long(), mixed_label)
    assert torch.equal(mixed_label[2][keep[2]], label[2][keep[2]])
    assert torch.equal(mixed_label[2][~keep[2]], label[1][~keep[2]])


def test_fewer_classes_are_kept_of_an_odd_number() -> None:
    """Labels 0, 3, 7 and ignored pixels: three classes, of which the authors' program keeps one."""
    label = torch.tensor([[[0, 3, 7, 255]]])
    draw = torch.rand(1, 9, generator=generator("classmix"))
    assert classmix_mask(label, draw, fewer=True).sum() == 1
    assert classmix_mask(label, draw).sum() == 2


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_boxes_of_half_the_area(shape: float, top: float, left: float) -> None:
    draw = torch.tensor([[shape], [top], [left]])
    for mask in (half_area_mask, half_width_mask):
        keep = mask((100, 100), draw)
        assert abs(int((~keep).sum()) - 5000) <= 160  # a row and a column of rounding
    assert float((~half_width_mask((100, 100), draw))[0].any(dim=0).sum()) >= 49


def test_small_boxes_leave_every_other_image_whole() -> None:
    draw = torch.rand(1 + 4 * TRIES, 2000, generator=generator("small"))
    gone = (~small_box_mask((50, 80), draw)).flatten(1).float().mean(dim=1)
    boxes = gone[gone > 0]
    assert abs(len(boxes) / 2000 - 0.5) < 0.04
    assert float(boxes.min()) > 0.015
    assert float(boxes.max()) < 0.42


def test_blobs_make_up_one_half() -> None:
    rng = generator("cow")
    keep = cow_mask(torch.rand(4, 33, 47, generator=rng), torch.rand(4, generator=rng))
    assert ((keep.flatten(1).float().mean(dim=1) - 0.5).abs() < 0.01).all()
    edges = (keep[:, 1:] != keep[:, :-1]).float().mean()
    assert float(edges) < 0.1  # noise without blobs would have a half


def test_erased_boxes_have_every_area() -> None:
    draw = torch.rand(4, 3000, generator=generator("cutout"))
    gone = (~cutout_mask((60, 60), draw)).flatten(1).float().mean(dim=1)
    for share in (0.25, 0.5, 0.75):
        assert abs(float((gone < share).float().mean()) - share) < 0.05
