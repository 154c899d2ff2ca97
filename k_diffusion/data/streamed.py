"""Data sets that are read while they are fetched, and resume at the sample."""

import itertools
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset


class StreamedRows(Dataset[Any]):
    """The rows of a streamed data set by number, of which it holds a window.

    data: an iterable, such as a `datasets.IterableDataset`; length: its number of rows. Rows of the
    window that is held, or of one further on, are had by reading on; those before it by reading
    anew. Raises ValueError where there are fewer rows than length.
    """

    def __init__(self, data: Any, length: int, window: int):
        self.data, self.length, self.window = data, length, window
        self._rows: Iterator[Any] | None = None
        self._next = 0  # of the windows that are read
        self._held: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        # an iterator doesn't pickle
        return {**self.__dict__, "_rows": None, "_next": 0, "_held": []}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        window, place = divmod(index, self.window)
        if self._rows is None or window < self._next - 1:
            self._rows, self._next, self._held = iter(self.data), 0, []
        while self._next <= window:
            self._held = list(itertools.islice(self._rows, self.window))
            self._next += 1
        if place >= len(self._held):
            raise ValueError(
                f"the data set has fewer than the {self.length:,} rows that it says it has "
                "(dataset.num_examples)"
            )
        return self._held[place]

    def after(self, index: int) -> int:
        """The next row of the same window; after its last its first."""
        first = index - index % self.window
        return first + (index - first + 1) % min(self.window, self.length - first)


def rows_of(data: Any, split: str, window: int, length: int | None) -> StreamedRows:
    """A `datasets.IterableDataset` by rows. length: their number, where the data set doesn't say.

    Raises ValueError where nobody knows its length.
    """
    if length is None:
        splits = data.info.splits or {}
        length = splits[split].num_examples if split in splits else None
    if not length:
        raise ValueError(
            "dataset.num_examples: a streamed data set has to say how many rows its split "
            f"{split!r} has, and this one doesn't; set it, for dataset.split"
        )
    return StreamedRows(data, length, window)
