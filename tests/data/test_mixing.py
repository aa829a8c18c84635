import torch
from hypothesis import given
from hypothesis import strategies as st

from ctt.data.mixing import classmix_mask, cutmix_mask, mix
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
