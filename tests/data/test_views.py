import math
import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from ctt.data.seeding import generator
from ctt.data.views import GeometricView, PhotometricView, gaussian_blur, rotate_hue, window

MEAN = (0.5, 0.25, 0.75)


def view(
    crop: tuple[int, int] = (20, 24),
    scale: tuple[float, float] = (1, 1),
    flip: bool = False,
    rotation: float = 0,
    translation: float = 0,
) -> GeometricView:
    return GeometricView(crop, scale, flip, rotation, translation, MEAN)


def picture(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of labels 0..10 and an image whose first channel is 20 times the label."""
    blocks = torch.arange(11 * 2).reshape(2, 11) % 11
    label = blocks.repeat_interleave(-(-height // 2), 0).repeat_interleave(-(-width // 11), 1)
    label = label[:height, :width].to(torch.uint8)
    return torch.stack([20 * label, label, 255 - label]), label


def test_without_any_change_the_image_stays() -> None:
    image, label = picture(20, 24)
    seen, mask = view()(image, label, 0)
    assert torch.equal(seen, image)
    assert torch.equal(mask, label)


def test_crop_is_a_window_of_the_image() -> None:
    image, label = picture(40, 50)
    seen, mask = view()(image, label, 3)
    windows = image.unfold(1, 20, 1).unfold(2, 24, 1)  # (3, 21, 27, 20, 24)
    # the window starts at a fraction of a pixel, so colours are those of a neighbouring window
    distance = (windows.float() - seen[:, None, None].float()).abs().amax(dim=(0, 3, 4))
    assert distance.min() <= 200
    assert mask.max() <= 10


def test_flip_mirrors_image_and_label_alike() -> None:
    image, label = picture(20, 24)
    results = [view(flip=True)(image, label, seed) for seed in range(20)]
    mirrored = [torch.equal(seen, image.flip(2)) for seen, _ in results]
    assert 0 < sum(mirrored) < 20
    for (seen, mask), is_mirrored in zip(results, mirrored, strict=True):
        assert torch.equal(seen, image.flip(2) if is_mirrored else image)
        assert torch.equal(mask, label.flip(1) if is_mirrored else label)


@given(st.integers(0, 10_000), st.booleans())
def test_what_is_rotated_keeps_its_shape(seed: int, flip: bool) -> None:
    """In pixels the map is a rotation, mirrored or not, over the factor of the resize."""
    turning = view(crop=(20, 28), scale=(0.5, 2), flip=flip, rotation=60, translation=0.1)
    factor = 0.8
    theta = torch.tensor(
        turning.matrix((50, 30), factor, random.Random(seed)), dtype=torch.float64
    )[:, :2]
    pixels = torch.tensor([[30], [50]]) * theta / torch.tensor([28, 20])
    torch.testing.assert_close(pixels @ pixels.T, torch.eye(2, dtype=torch.float64) / factor**2)
    assert flip or torch.det(pixels) > 0


@given(st.integers(0, 10_000))
def test_image_and_label_move_together(seed: int) -> None:
    image, label = picture(60, 66)
    rich = view((33, 31), (0.7, 1.5), True, 25, 0.1)
    seen, mask = rich(image, label, seed)
    inside = mask != 255
    # away from the borders of the blocks the colour tells the label
    flat = (
        torch.nn.functional.max_pool2d(mask[None].float(), 5, 1, 2)[0]
        == -(torch.nn.functional.max_pool2d(-mask[None].float(), 5, 1, 2)[0])
    )
    chosen = (inside & flat)[2:-2, 2:-2]
    assert ((seen[0].float() / 20 - mask.float()).abs() < 0.2)[2:-2, 2:-2][chosen].all()


def test_padding_has_the_mean_colour_and_no_label() -> None:
    image, label = picture(10, 10)
    seen, mask = view((30, 30))(image, label, 1)
    outside = mask == 255
    assert outside.sum() >= 30 * 30 - 11 * 11
    corner = torch.nn.functional.max_pool2d((~outside)[None].float(), 3, 1, 1)[0] == 0
    for channel, mean in enumerate(MEAN):
        assert (seen[channel][corner] == round(255 * mean)).all()


def test_view_depends_on_its_seed_alone() -> None:
    image, label = picture(40, 50)
    rich = view((20, 20), (0.5, 1.6), True, 20, 0.2)
    first = rich(image, label, 5)
    torch.manual_seed(1)
    again, other = rich(image, label, 5), rich(image, label, 6)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_photometric_view_is_seeded_and_stays_in_range() -> None:
    images = torch.rand(6, 3, 17, 19)
    strong = PhotometricView(0.5, 0.8, 0.5, (0.1, 2.0))
    draws = [torch.rand(7, len(images), generator=generator(name)) for name in "aab"]
    first = strong(images, draws[0])
    assert torch.equal(first, strong(images, draws[1]))
    assert not torch.equal(first, strong(images, draws[2]))
    assert first.min() >= 0
    assert first.max() <= 1


def test_probability_0_changes_nothing() -> None:
    images = torch.rand(4, 3, 9, 9)
    assert torch.equal(
        PhotometricView(0.5, 0, 0, (1, 2))(images, torch.rand(7, len(images))), images
    )


def test_the_hue_has_a_range_of_its_own() -> None:
    images = torch.rand(4, 3, 6, 5)
    draw = torch.rand(8, 4)
    draw[4] = 0  # all of them are changed
    own = PhotometricView(0.0, 0.8, 0.0, (0.1, 2.0), hue=0.25)
    angle = (2 * draw[3] - 1) * 0.25 * 2 * math.pi
    expected = rotate_hue(images, angle[:, None, None, None])
    torch.testing.assert_close(own(images, draw), expected, rtol=1e-4, atol=1e-4)
    by_strength = PhotometricView(0.4, 0.8, 0.0, (0.1, 2.0))
    same = PhotometricView(0.4, 0.8, 0.0, (0.1, 2.0), hue=0.1)
    assert torch.equal(by_strength(images, draw), same(images, draw))
    still = PhotometricView(0.4, 0.8, 0.0, (0.1, 2.0), hue=0.0)(images, draw)
    assert not torch.equal(still, same(images, draw))


def test_hue_keeps_grey_and_turns_around() -> None:
    images = torch.rand(2, 3, 5, 5) * 0.4 + 0.3
    whole_turn = torch.full((2, 1, 1, 1), 2 * torch.pi)
    assert torch.allclose(rotate_hue(images, whole_turn), images, atol=1e-4)
    grey = images[:, :1].expand(-1, 3, -1, -1)
    assert torch.allclose(rotate_hue(grey, whole_turn / 3), grey, atol=1e-3)


def test_blur_of_each_image_has_its_own_sigma() -> None:
    images = torch.zeros(2, 3, 21, 21)
    images[:, :, 10, 10] = 1
    blurred = gaussian_blur(images, torch.tensor([0.1, 2.0]), 6)
    assert torch.allclose(blurred[0], images[0], atol=1e-6)
    expected = torch.exp(-0.5 * (torch.arange(-6, 7) / 2.0) ** 2)
    expected = expected / expected.sum()
    assert torch.allclose(blurred[1, 0, 10, 4:17], expected * expected[6], atol=1e-6)


@given(st.integers(0, 10_000), st.tuples(st.integers(1, 300), st.integers(1, 300)))
def test_reading_a_part_gives_what_the_whole_image_gives(seed: int, size: tuple[int, int]) -> None:
    rich = view((33, 47), (0.76, 1.6), True, 30, 0.3)
    rng = generator("part", seed)
    image = torch.randint(0, 256, (3, *size), generator=rng, dtype=torch.uint8)
    label = torch.randint(0, 21, size, generator=rng, dtype=torch.uint8)
    seen, mask = rich(image, label, seed)
    draw = random.Random(seed)
    theta = torch.tensor(rich.matrix(size, draw.uniform(*rich.scale), draw), dtype=torch.float64)
    grid = torch.nn.functional.affine_grid(theta[None], [1, 1, 33, 47], align_corners=False)
    mean = 255 * torch.tensor(MEAN, dtype=torch.float64)[:, None, None]
    expected = torch.nn.functional.grid_sample((image - mean)[None], grid, align_corners=False)[0]
    assert (seen.double() - (expected + mean)).abs().max() < 0.6
    near = torch.nn.functional.grid_sample(
        label[None, None].double() + 1, grid, "nearest", align_corners=False
    )[0, 0]
    # a coordinate in the middle between two pixels may go to either
    assert (mask == ((near - 1) % 256).to(torch.uint8)).float().mean() > 0.99


def test_only_the_part_that_is_shown_is_read() -> None:
    theta = view((100, 200), (1, 1)).matrix((1024, 2048), 1, random.Random(0))
    _, rows, columns = window(theta, (1024, 2048), 4)
    assert rows.stop - rows.start <= 110
    assert columns.stop - columns.start <= 210


def test_fine_patterns_do_not_turn_into_coarse_ones() -> None:
    stripes = (torch.arange(400) % 2 * 255).to(torch.uint8).expand(3, 400, 400)
    label = torch.zeros(400, 400, dtype=torch.uint8)
    for factor in (0.5, 0.6, 0.7):
        seen, _ = view((60, 60), (factor, factor))(stripes, label, 0)
        reduced = torch.nn.functional.interpolate(
            stripes[None].float(), scale_factor=factor, mode="bilinear", antialias=True
        )
        assert seen.float().std() <= reduced.std() + 3
        assert abs(seen.float().mean() - 127.5) < 3


def test_a_share_of_the_images_loses_its_colours() -> None:
    view = PhotometricView(0, 0, 0, (0.1, 2.0), grey_probability=0.3)
    images = torch.rand(400, 3, 2, 2)
    seen = view(images, torch.rand(view.DRAWS, 400))
    lost = (seen[:, :1] == seen).flatten(1).all(dim=1)
    assert abs(float(lost.float().mean()) - 0.3) < 0.1
    assert torch.equal(seen[~lost], images[~lost])
