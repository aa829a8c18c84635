import errno
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctt.data.digits import INFO
from ctt.errors import UserError
from ctt.inference import render
from ctt.inference.render import colorize, in_threads, overlay, palette_image, save_png


def test_threads_do_all_calls_and_their_mistakes_are_raised() -> None:
    done: list[int] = []
    with in_threads(2) as call:
        for number in range(50):
            call(done.append, number)
    assert sorted(done) == list(range(50))
    with pytest.raises(OSError, match="disk"), in_threads(0) as call:
        call(fail)


def fail() -> None:
    raise OSError("disk full")


def test_only_a_few_calls_wait() -> None:
    """Or else all pictures of a long list would be in memory."""
    gate, started = threading.Event(), []

    def wait(number: int) -> None:
        started.append(number)
        gate.wait()

    asked = []

    def ask() -> None:
        with in_threads(1) as call:
            for number in range(20):
                call(wait, number)
                asked.append(number)

    asking = threading.Thread(target=ask)
    asking.start()
    while len(asked) < 4:
        asking.join(0.01)
    asking.join(0.2)
    assert len(asked) == 4
    gate.set()
    asking.join()
    assert started == list(range(20))


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    class Broken:
        def save(self, path: Path, format: str) -> None:
            path.write_bytes(b"half of")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"x\.png"):
        save_png(Broken(), tmp_path / "x.png")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_overlay_leaves_the_background() -> None:
    image = torch.full((3, 1, 2), 100, dtype=torch.uint8)
    label = torch.tensor([[0, 3]])
    shown = np.array(overlay(image, label, INFO, 0.5))
    assert shown[0, 0].tolist() == [100, 100, 100]
    expected = (100 + np.array(INFO.palette[3])) / 2
    assert np.abs(shown[0, 1] - expected).max() <= 0.5
    mask = palette_image(label, INFO)
    assert np.array(mask).tolist() == [[0, 3]]
    assert np.array(mask.convert("RGB")).tolist() == colorize(label, INFO).tolist()
    assert colorize(torch.tensor([255]), INFO).tolist() == [[255, 255, 255]]


@pytest.mark.parametrize("strip", [1, 14, 20])
def test_an_overlay_is_made_strip_by_strip(monkeypatch: pytest.MonkeyPatch, strip: int) -> None:
    """At once, one of a photograph of 49 million pixels took 2.3 GiB."""
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, 9, 7), dtype=torch.uint8, generator=rng)
    label = torch.randint(11, (9, 7), generator=rng)
    whole = np.array(overlay(image, label, INFO))
    monkeypatch.setattr(render, "STRIP", strip)
    assert np.array_equal(np.array(overlay(image, label, INFO)), whole)
    assert np.abs(np.diff(whole.astype(int), axis=0)).sum(axis=(1, 2)).min() > 0


def test_pixels_without_a_class_stay_so_in_a_file(tmp_path: Path) -> None:
    label = torch.tensor([[0, 3, 255, 10]], dtype=torch.uint8)
    save_png(palette_image(label, INFO), tmp_path / "mask.png")
    assert np.array(Image.open(tmp_path / "mask.png")).tolist() == label.tolist()
