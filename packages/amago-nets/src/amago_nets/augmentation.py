"""Random shifts of images, as integer crops of the padded image.

Dimensions: `B` rows of a batch, `N` images, `H` and `W` pixels, `C` channels. `...` stands for any leading axes:
`[B, L]` in training.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .validation import check_bool, check_choice, check_float, check_int

ShiftPer = Literal["frame", "sequence"]


def clean_rows(rows: int, share: float) -> int:
    """Number of rows at the front of a batch that are not augmented.

    Args:
        rows: size `B` of the batch.
        share: share of the batch to augment, in [0, 1].

    Returns:
        `ceil(B (1 - share))`, but at most `B - 1`, so that one row is always augmented.
    """
    # Rounded first: 10 * (1 - 0.9) is a little more than 1 in binary.
    return max(0, min(math.ceil(round(rows * (1.0 - share), 9)), rows - 1))


def crop_padded(images: Tensor, offsets: Tensor, *, pad: int, channels_first: bool = False) -> Tensor:
    """Pads every image by its edge pixels and crops it back to its size at an integer offset.

    Args:
        images: `[..., H, W, C]`, or `[..., C, H, W]` if `channels_first`; any dtype.
        offsets: `[2, ...]` integers in `[0, 2 pad]`, row and column of the crop in the padded image; `pad` leaves an
            image as it is.
        pad: pixels added on every side.
        channels_first: the order of the axes.

    Returns:
        A new tensor of the shape and dtype of `images`.
    """
    h, w = images.shape[-2:] if channels_first else images.shape[-3:-1]
    channels = images.shape[-3] if channels_first else images.shape[-1]
    # Reading at clamped positions is the crop of the padded image, without the padded image.
    shift = offsets.reshape(2, -1, 1) - pad
    rows = (shift[0] + torch.arange(h, device=images.device)).clamp(0, h - 1)
    cols = (shift[1] + torch.arange(w, device=images.device)).clamp(0, w - 1)
    n = rows.shape[0]
    pixels = rows.unsqueeze(2) * w + cols.unsqueeze(1)
    if channels_first:
        index = pixels.reshape(n, 1, h * w).expand(-1, channels, -1)
        return images.reshape(n, channels, h * w).gather(2, index).reshape(images.shape)
    first = torch.arange(n, device=images.device).reshape(n, 1, 1) * (h * w)
    return images.reshape(n * h * w, channels).index_select(0, (first + pixels).reshape(-1)).reshape(images.shape)


def random_shift(
    images: Tensor,
    *,
    pad: int = 4,
    share: float = 0.75,
    per: ShiftPer = "frame",
    channels_first: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Moves images by up to `pad` pixels in each direction; edge pixels fill what opens up.

    Args:
        images: `[B, ..., H, W, C]`, or `[B, ..., C, H, W]` if `channels_first`; any dtype. A single image is a batch of
            one.
        pad: largest shift in pixels; each of the `(2 pad + 1)^2` shifts is equally likely.
        share: share of the rows `B` to move, the last ones; the others stay as they are, see `clean_rows`.
        per: one shift for each "frame", or one for each row of the batch ("sequence").
        channels_first: the order of the axes.
        generator: source of randomness, on the device of `images`; None is torch's own.

    Returns:
        A new tensor of the shape and dtype of `images`.

    Raises:
        ValueError: if an argument is not allowed.

    Source: Yarats et al. (2021), "Mastering Visual Continuous Control" (DrQ-v2), there by bilinear sampling.
    """
    check_int("pad", pad)
    check_float("share", share, low=0.0, high=1.0)
    check_choice("per", per, get_args(ShiftPer))
    if images.ndim < 3:
        raise ValueError(f"images.shape={tuple(images.shape)} is not allowed; give three or more axes")
    lead = images.shape[:-3] or (1,)
    drawn = lead if per == "frame" else (lead[0], *(1 for _ in lead[1:]))
    offsets = torch.randint(0, 2 * pad + 1, (2, *drawn), generator=generator, device=images.device)
    # Clean rows take part with the offset that moves nothing: shapes then depend on nothing but the batch.
    offsets[:, : clean_rows(lead[0], share)] = pad
    return crop_padded(images, offsets.expand(2, *lead), pad=pad, channels_first=channels_first)


class RandomShift(nn.Module):
    """`random_shift` in training mode, the identity otherwise.

    Args:
        pad: see `random_shift`.
        share: see `random_shift`.
        per: see `random_shift`.
        channels_first: see `random_shift`.

    Raises:
        ValueError: if an argument is not allowed.
    """

    def __init__(
        self, *, pad: int = 4, share: float = 0.75, per: ShiftPer = "frame", channels_first: bool = False
    ) -> None:
        super().__init__()
        check_int("pad", pad)
        check_float("share", share, low=0.0, high=1.0)
        check_choice("per", per, get_args(ShiftPer))
        check_bool("channels_first", channels_first)
        self.pad = pad
        self.share = share
        self.per: ShiftPer = per
        self.channels_first = channels_first

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Moves `[B, ..., H, W, C]` images; the shape and dtype stay."""
        if not self.training:
            return images
        return random_shift(
            images,
            pad=self.pad,
            share=self.share,
            per=self.per,
            channels_first=self.channels_first,
            generator=generator,
        )
