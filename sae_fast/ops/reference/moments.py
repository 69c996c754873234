"""Adam's moments in bfloat16 and 8 bits: their codes, in plain PyTorch.

`csrc/kernels/common/moments.h` says what they are; this is the same arithmetic, on int64 tensors
that hold unsigned 32-bit numbers, and gives the same bits.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MOMENT_BLOCK = 256  # columns that share a scale
MOMENT_DTYPES = (torch.float32, torch.bfloat16, torch.uint8)

_MASK = 0xFFFF_FFFF
_SIGN = 0x8000_0000
_MAGNITUDE = 0x7FFF_FFFF
_EXPONENT = 0x7F80_0000
_LARGEST_BFLOAT16 = 0x7F7F_0000
_ONE = 0x3F80_0000  # 1.0 in float32
_MANTISSA_BITS = 23
_DROPPED_BITS = 20  # of them, in 8 bits
_SMALLEST_SCALE = (127 - 120) << _MANTISSA_BITS  # 2^-120
_LARGEST_POWER = (127 + 125) << _MANTISSA_BITS  # 2^125


@dataclass(frozen=True)
class MomentFormat:
    """The 8-bit form of one of the two moments, and the random bits that round it."""

    largest_code: int
    sign_code: int
    octaves: int
    keeps_positive: bool  # whether a number other than 0 is never rounded to 0
    random_shift: int


EXP_AVG = MomentFormat(127, 128, 15, keeps_positive=False, random_shift=16)
EXP_AVG_SQ = MomentFormat(255, 0, 31, keeps_positive=True, random_shift=0)


def moment_blocks(d_in: int) -> int:
    """Return the number of scales in a row of 8-bit moments, one for 256 columns."""
    return -(-d_in // MOMENT_BLOCK)


def moment_random(
    step: Tensor,  # 0-d int64
    d_sae: int,
    d_in: int,
) -> Tensor:
    """Return 32 random bits for every weight of a step, [F, D] int64: 16 for each moment."""
    step = step.to(torch.int64)
    whole = _mix(_mix(step >> 32 & _MASK) ^ step & _MASK)
    latents = torch.arange(d_sae, device=step.device)
    seeds = _mix(whole + latents & _MASK)
    columns = torch.arange(d_in, device=step.device)
    return _mix(seeds[:, None] + columns & _MASK)


def decode_moment(
    codes: Tensor,  # [F, D] bfloat16 or uint8
    scale: Tensor | None,  # [F, moment_blocks(D)], of uint8
    moment: MomentFormat,
) -> Tensor:
    """Return the moment as float32, [F, D]."""
    if scale is None:
        return codes.float()
    code = codes.long()
    shifted = ((code & moment.largest_code) << _DROPPED_BITS) + _ONE
    magnitude = (_floats(shifted) - 1.0) * _by_column(scale, codes.size(1))
    return torch.where((code & moment.sign_code) != 0, -magnitude, magnitude)


def encode_moment_(
    codes: Tensor,  # [F, D] bfloat16 or uint8
    scale: Tensor | None,  # [F, moment_blocks(D)], of uint8
    values: Tensor,  # [F, D]
    random: Tensor,  # [F, D] int64, of moment_random
    moment: MomentFormat,
) -> None:
    """Write the codes of `values`, rounded by the moment's half of `random`, and their scales."""
    bits = _bits(values)
    drawn = random >> moment.random_shift & 0xFFFF
    if scale is None:
        rounded = (bits & _MAGNITUDE).clamp_max(_LARGEST_BFLOAT16) + drawn >> 16
        rounded = _kept_positive(rounded, bits, moment)
        codes.copy_(_floats((rounded | (bits & _SIGN) >> 16) << 16))
        return
    scale.copy_(_block_scales(bits & _MAGNITUDE, moment))
    shifted = _bits(1.0 + values.abs() * _by_column(1.0 / scale, codes.size(1)))
    fraction = _DROPPED_BITS - 16
    added = (drawn << fraction) + (1 << fraction - 1)
    code = (shifted - _ONE + added >> _DROPPED_BITS).clamp_max(moment.largest_code)
    code = _kept_positive(code, bits, moment)
    codes.copy_(code | ((bits & _SIGN) >> 24 & moment.sign_code))


def _block_scales(
    magnitude: Tensor,  # [F, D] int64: bits of |value|
    moment: MomentFormat,
) -> Tensor:
    """Return per block the power of two in whose units its numbers are below 2^octaves."""
    d_sae, d_in = magnitude.shape
    padded = F.pad(magnitude, (0, moment_blocks(d_in) * MOMENT_BLOCK - d_in))
    largest = padded.view(d_sae, -1, MOMENT_BLOCK).amax(2)
    below = moment.octaves - 1 << _MANTISSA_BITS
    exponent = (largest & _EXPONENT).clamp(below + _SMALLEST_SCALE, _LARGEST_POWER)
    return _floats(exponent - below)


def _by_column(scale: Tensor, d_in: int) -> Tensor:
    """Repeat scales [F, blocks] for every column, [F, D]."""
    return scale.repeat_interleave(MOMENT_BLOCK, dim=1)[:, :d_in]


def _kept_positive(code: Tensor, bits: Tensor, moment: MomentFormat) -> Tensor:
    if not moment.keeps_positive:
        return code
    return torch.maximum(code, (bits & _MAGNITUDE).clamp_max(1))


def _bits(values: Tensor) -> Tensor:
    """Return the bits of float32 numbers as unsigned 32-bit numbers in int64."""
    return values.float().contiguous().view(torch.int32).long() & _MASK


def _floats(bits: Tensor) -> Tensor:
    """Return the float32 numbers with these bits."""
    signed = torch.where(bits > _MAGNITUDE, bits - (_MASK + 1), bits)
    return signed.to(torch.int32).view(torch.float32)


def _mix(bits: Tensor) -> Tensor:
    """Hash 32 bits as mix_bits of csrc/kernels/common/moments.h does."""
    bits = bits ^ bits >> 16
    bits = _times(bits, 0x7FEB352D)
    bits = bits ^ bits >> 15
    bits = _times(bits, 0x846CA68B)
    return bits ^ bits >> 16


def _times(bits: Tensor, factor: int) -> Tensor:
    """Return the low 32 bits of a product, computed in parts that int64 can hold."""
    low, high = factor & 0xFFFF, factor >> 16
    return bits * low + ((bits * high & 0xFFFF) << 16) & _MASK
