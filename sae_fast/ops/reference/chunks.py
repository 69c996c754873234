"""Work in pieces of bounded memory."""

from collections.abc import Iterator

# Elements of the largest temporary: 16 MiB of float32, which stays near the cache.
CHUNK_ELEMENTS = 1 << 22


def chunks(count: int, width: int) -> Iterator[slice]:
    """Yield slices that cover range(count), each of at most CHUNK_ELEMENTS / width numbers."""
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
