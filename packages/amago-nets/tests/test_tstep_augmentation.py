from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from amago_nets.augmentation import RandomShift, clean_rows, crop_padded, random_shift


def crops(image: torch.Tensor, pad: int) -> dict[tuple[int, int], torch.Tensor]:
    """All crops of one `[C, H, W]` image padded by its edge."""
    h, w = image.shape[1:]
    padded = F.pad(image.double()[None], (pad,) * 4, mode="replicate")[0].to(image.dtype)
    return {(y, x): padded[:, y : y + h, x : x + w] for y in range(2 * pad + 1) for x in range(2 * pad + 1)}


def offset_of(shifted: torch.Tensor, image: torch.Tensor, pad: int) -> tuple[int, int]:
    found = [offset for offset, crop in crops(image, pad).items() if torch.equal(crop, shifted)]
    assert len(found) == 1
    return found[0]


def random_images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("rows", "share", "clean"), [(24, 0.75, 6), (1, 0.75, 0), (2, 0.75, 1), (10, 0.9, 1), (4, 1.0, 0), (4, 0.0, 3)]
)
def test_share_of_clean_rows(rows: int, share: float, clean: int) -> None:
    assert clean_rows(rows, share) == clean


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("pad", [1, 4])
def test_every_crop(pad: int, channels_first: bool) -> None:
    image = random_images(2, 7, 9)
    expected = crops(image, pad)
    offsets = torch.tensor(list(expected)).T
    batch = image.expand(offsets.shape[1], -1, -1, -1)
    if channels_first:
        cropped = crop_padded(batch, offsets, pad=pad, channels_first=True)
    else:
        cropped = crop_padded(batch.permute(0, 2, 3, 1), offsets, pad=pad).permute(0, 3, 1, 2)
    assert cropped.dtype == torch.uint8
    assert torch.equal(cropped, torch.stack(list(expected.values())))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_keeps_dtype_and_shape(dtype: torch.dtype) -> None:
    images = random_images(4, 3, 8, 8, 1).to(dtype)
    shifted = random_shift(images)
    assert shifted.dtype == dtype
    assert shifted.shape == images.shape
    assert not torch.equal(shifted, images)


def test_first_rows_stay_clean_and_frames_move_on_their_own() -> None:
    torch.manual_seed(0)
    images = random_images(8, 6, 3, 12, 12)
    shifted = random_shift(images, channels_first=True)
    assert torch.equal(shifted[:2], images[:2])
    offsets = [[offset_of(shifted[b, t], images[b, t], 4) for t in range(6)] for b in range(2, 8)]
    assert all(len(set(row)) > 1 for row in offsets)


def test_one_offset_for_a_sequence() -> None:
    torch.manual_seed(0)
    images = random_images(8, 6, 12, 12, 1)
    shifted = random_shift(images, per="sequence", share=1.0)
    offsets = [
        {offset_of(shifted[b, t].movedim(2, 0), images[b, t].movedim(2, 0), 4) for t in range(6)} for b in range(8)
    ]
    assert all(len(row) == 1 for row in offsets)
    assert len(set.union(*offsets)) > 1


def test_all_shifts_are_equally_likely() -> None:
    # Pixels hold their position: the middle one tells the offset.
    torch.manual_seed(0)
    n, size = 20_000, 9
    positions = torch.arange(size * size, dtype=torch.uint8).reshape(1, size, size, 1).expand(n, -1, -1, -1)
    middle = random_shift(positions, share=1.0)[:, 4, 4, 0].long()
    counts = torch.bincount(middle, minlength=81).double()
    expected = n / 81
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert counts.numel() == 81
    assert chi_square < 125  # 80 degrees of freedom: 0.1 % lie above 124.8


def test_constant_images_do_not_change() -> None:
    images = torch.full((4, 5, 6, 6, 3), 7, dtype=torch.uint8)
    assert torch.equal(random_shift(images), images)


def test_a_single_image_is_shifted() -> None:
    torch.manual_seed(0)
    image = random_images(6, 6, 3)
    assert any(not torch.equal(random_shift(image), image) for _ in range(3))


def test_generator_decides() -> None:
    images = random_images(6, 4, 8, 8, 3)
    first, second = (random_shift(images, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    before = torch.get_rng_state()
    random_shift(images, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)


def test_module_shifts_in_training_only() -> None:
    module, images = RandomShift(share=1.0), random_images(6, 8, 8, 3)
    assert not torch.equal(module(images), images)
    assert torch.equal(module.eval()(images), images)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pad": 0}, "pad=0.*>= 1"),
        ({"share": 1.5}, r"share=1.5.*\[0, 1\]"),
        ({"per": "batch"}, "per='batch'.*'sequence'"),
        ({"channels_first": 1}, "channels_first=1"),
    ],
)
def test_refuses(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RandomShift(**options)


def test_refuses_what_is_no_image() -> None:
    with pytest.raises(ValueError, match=r"images.shape=\(8, 8\)"):
        random_shift(random_images(8, 8))


@pytest.mark.filterwarnings("ignore")
def test_compiles() -> None:
    compiled = torch.compile(RandomShift(share=1.0), fullgraph=True)
    images = random_images(3, 2, 7, 7, 2)
    shifted = compiled(images)
    for b in range(3):
        for t in range(2):
            offset_of(shifted[b, t].movedim(2, 0), images[b, t].movedim(2, 0), 4)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    images = random_images(8, 3, 12, 12, 3)
    offsets = torch.randint(0, 9, (2, 8, 3))
    expected = crop_padded(images, offsets, pad=4)
    assert torch.equal(crop_padded(images.cuda(), offsets.cuda(), pad=4).cpu(), expected)
    generator = torch.Generator("cuda").manual_seed(0)
    assert random_shift(images.cuda(), generator=generator).shape == images.shape
