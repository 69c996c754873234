"""Random damage to the bytes of a file, for campaigns on files."""

from __future__ import annotations

import random

# Sizes that occur in no good file, and some near the sizes that do.
SIZES = (
    *(-1, 0, 1, 2, 7, 255, 65_536, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 40),
    *(1 << 62, 1 << 63, (1 << 64) - 1, 1 << 64, 10**40, -(1 << 63)),
)


def damage(generator: random.Random, content: bytearray) -> None:
    """Change, cut off, add or move some bytes, most often once."""
    for _ in range(generator.choice((1, 1, 2, 8))):
        generator.choice((_flip, _overwrite, _cut, _insert, _move))(generator, content)


def _place(generator: random.Random, content: bytearray) -> int:
    """Draw a place, often near the beginning or the end, where headers and directories are."""
    near = min(len(content), 600)
    return generator.choice(
        (
            generator.randrange(len(content) + 1),
            generator.randrange(near + 1),
            len(content) - generator.randrange(near + 1),
        )
    )


def _flip(generator: random.Random, content: bytearray) -> None:
    if content:
        content[min(_place(generator, content), len(content) - 1)] ^= 1 << generator.randrange(8)


def _overwrite(generator: random.Random, content: bytearray) -> None:
    place, size = _place(generator, content), generator.choice((1, 2, 4, 8))
    value = generator.choice(SIZES) & ((1 << 8 * size) - 1)
    content[place : place + size] = value.to_bytes(size, generator.choice(("little", "big")))


def _cut(generator: random.Random, content: bytearray) -> None:
    place = _place(generator, content)
    del content[place : generator.choice((place + generator.randrange(64), len(content)))]


def _insert(generator: random.Random, content: bytearray) -> None:
    place = _place(generator, content)
    content[place:place] = generator.choice(
        (bytes(generator.randrange(40)), generator.randbytes(9), b"\xff" * 8)
    )


def _move(generator: random.Random, content: bytearray) -> None:
    begin, place = _place(generator, content), _place(generator, content)
    part = content[begin : begin + generator.randrange(200)]
    content[place : place + len(part)] = part
