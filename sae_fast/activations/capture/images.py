"""Images in batches: every image is a document, and its rows are the tokens of the model.

The column token_ids says what a row is: 0 a patch, 1 the class token, 2 a register. Its position is
the place among the tokens of the image, where patches stand row by row behind the other tokens.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sae_fast.activations.capture.documents import MAX_DOCUMENTS, Documents
from sae_fast.activations.capture.image_model import (
    PATCH,
    ImageModel,
    ImageShape,
    image_shape,
    processed,
)
from sae_fast.activations.capture.packages import capture_package
from sae_fast.activations.capture.sequences import START, SequenceConfig, TokenBatch, TokenCursor
from sae_fast.activations.errors import one_line

LOOKED_AT = 64  # first entries, among which an image is looked for


class ImageBatches:
    """The batches of some images.

    Args:
        documents: the images, in their order.
        model: what reads them.
        shape: what the model makes of an image.
        batch_size: images of a batch.
        exclude_special_tokens: whether the class token and registers are left out.
        threads: that read images from their files.
        stop: place in the order before which to end; default: all.
        start: place of the first image.
    """

    def __init__(
        self,
        documents: Documents,
        model: ImageModel,
        shape: ImageShape,
        *,
        batch_size: int,
        exclude_special_tokens: bool = True,
        threads: int = 1,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        if threads < 1:
            raise ValueError(f"num_proc must be at least 1, got {threads}")
        self.documents = documents
        self.config = SequenceConfig(len(shape.kinds), batch_size, False, exclude_special_tokens)
        self.start = replace(START, document=start)
        count = MAX_DOCUMENTS if documents.count is None else documents.count
        self.stop = count if stop is None else stop
        self._model = model
        self.shape = shape
        self._threads = threads
        kinds = torch.tensor(shape.kinds)
        self._kept = kinds == PATCH if exclude_special_tokens else torch.ones_like(kinds).bool()

    def between(self, start: int, stop: int | None = None) -> ImageBatches:
        """Return the batches of the images start..stop of the order."""
        return ImageBatches(
            self.documents,
            self._model,
            self.shape,
            batch_size=self.config.batch_size,
            exclude_special_tokens=self.config.exclude_special_tokens,
            threads=self._threads,
            start=start,
            stop=stop,
        )

    def sample(self, place: int, sequences: int) -> ImageBatches:
        """Return batches of at most `sequences` images, from a place on."""
        few = self.between(place, self.stop)
        few.config = replace(few.config, batch_size=min(sequences, few.config.batch_size))
        return few

    def rows_by_document(self, start: int, stop: int) -> list[int]:
        """Return the number of rows that each image makes."""
        rows = int(self._kept.sum())
        return [0 if entry is None else rows for entry in self.documents.read(start, stop)[1]]

    def iterate(self, cursor: TokenCursor | None = None) -> Generator[TokenBatch, None, None]:
        """Yield the batches from a cursor on, however often they have been made before.

        Raises ValueError for an image that cannot be read, with its number in the dataset.
        """
        cursor = self.start if cursor is None else cursor
        with ThreadPoolExecutor(self._threads, thread_name_prefix="images") as pool:
            while cursor.document < self.stop:
                end = min(cursor.document + self.config.batch_size, self.stop)
                numbers, entries = self.documents.read(cursor.document, end)
                if not entries:  # the end of a stream
                    return
                there = [
                    (int(number), entry)
                    for number, entry in zip(numbers, entries, strict=True)
                    if entry is not None
                ]
                following = replace(
                    cursor,
                    document=cursor.document + len(entries),
                    empty=cursor.empty + len(entries) - len(there),
                )
                if there:
                    following = replace(
                        following,
                        batch=cursor.batch + 1,
                        rows=cursor.rows + len(there) * int(self._kept.sum()),
                    )
                    read = partial(decoded, name=self.documents.name)
                    images = list(pool.map(read, *zip(*there, strict=True)))
                    yield self._batch(images, [number for number, _ in there], cursor, following)
                cursor = following

    def _batch(
        self, images: list[Any], numbers: list[int], cursor: TokenCursor, following: TokenCursor
    ) -> TokenBatch:
        pixels = processed(self._model.processor, images, numbers, self.documents.name)
        if tuple(pixels.shape[1:]) != self.shape.pixels:
            raise ValueError(
                f"model: its processor makes images of different sizes, {self.shape.pixels} and "
                f"{tuple(pixels.shape[1:])}; all must be of one size"
            )
        size = len(images), len(self.shape.kinds)
        return TokenBatch(
            torch.tensor(self.shape.kinds).expand(size),
            None,
            self._kept.expand(size),
            torch.tensor(numbers, dtype=torch.int32)[:, None].expand(size),
            torch.arange(size[1], dtype=torch.int32).expand(size),
            cursor,
            following,
            pixels=pixels,
        )


def open_images(
    documents: Documents, model: ImageModel, batch_size: int, *, keep_all: bool, threads: int
) -> ImageBatches:
    """Return the batches of images; the first image says what the model makes of each.

    Raises ValueError in one line where there is none, or the model makes no rows of patches.
    """
    numbers, entries = documents.read(0, LOOKED_AT)
    some = next(((int(n), e) for n, e in zip(numbers, entries, strict=True) if e is not None), None)
    if some is None:
        raise ValueError(f"dataset: {documents.name} has no images among its first {LOOKED_AT}")
    image = decoded(*some, documents.name)
    pixels = processed(model.processor, [image], [some[0]], documents.name)
    return ImageBatches(
        documents,
        model,
        image_shape(model, pixels),
        batch_size=batch_size,
        exclude_special_tokens=not keep_all,
        threads=threads,
    )


def decoded(number: int, entry: Any, name: str) -> Any:
    """Return an entry of a dataset as an image of Pillow in RGB; raise ValueError in one line."""
    try:
        return capture_package("datasets").Image().decode_example(entry).convert("RGB")
    except Exception as error:  # of Pillow, of files, of the network
        place = f" ({entry['path']})" if entry.get("path") else ""
        raise ValueError(
            f"dataset: image {number} of {name}{place} cannot be read: {one_line(error)}"
        ) from error
