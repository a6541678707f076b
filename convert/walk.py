"""Calibration tokens walked through a model layer by layer, with what lies between the layers on the disk.

Hidden states, and gradients, of all tokens behind one layer are one file [windows, T, D]: `<kind>-<i>.npy` is what goes into
layer i, one more than there are layers for what comes out of the last. In memory: one layer's weights, one batch of tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from mlxmoe.convert.stream import LayerStream
from mlxmoe.errors import UserError

_BATCH_TOKENS = 2048

Rows = slice | np.ndarray  # which windows
Spill = Callable[[slice, mx.array], None]  # called with rows of the tokens, in order, and their values [B, T, D]


class Walk:
    """Tokens int32 [windows, T] on their way through a LayerStream. Works in `folder`."""

    def __init__(self, stream: LayerStream, tokens: np.ndarray, folder: Path):
        self.stream, self.tokens, self.folder = stream, tokens, folder

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.size)

    def path(self, kind: str, i: int, suffix: str = "npy") -> Path:
        return self.folder / f"{kind}-{i}.{suffix}"

    def batches(self) -> Iterator[slice]:
        step = max(1, _BATCH_TOKENS // self.tokens.shape[1])
        for start in range(0, len(self.tokens), step):
            yield slice(start, min(start + step, len(self.tokens)))

    def batch(self, rows: Rows) -> mx.array:
        return mx.array(self.tokens[rows])

    def read(self, kind: str, i: int, rows: Rows) -> mx.array:
        stored = np.load(self.path(kind, i), mmap_mode="r")[rows]
        array = mx.array(np.ascontiguousarray(stored))
        return array.view(mx.bfloat16) if stored.dtype == np.uint16 else array

    @contextmanager
    def spill(self, kind: str, i: int) -> Iterator[Spill]:
        """A file [windows, T, D] that is filled batch by batch and gets its name when it is complete. 16-bit floats are
        stored as bfloat16, whose range gradients need. Without a kind nothing is written."""
        path, temporary = self.path(kind, i), self.path(kind, i, "tmp")
        with ExitStack() as stack:
            stack.callback(temporary.unlink, missing_ok=True)
            file: BinaryIO | None = None

            def write(rows: slice, array: mx.array) -> None:
                nonlocal file
                values = np.array(array if array.dtype == mx.float32 else array.astype(mx.bfloat16).view(mx.uint16))
                if file is None:
                    assert rows.start == 0, "batches come in order"
                    file = stack.enter_context(open(temporary, "wb"))
                    shape = (len(self.tokens), *array.shape[1:])
                    header = {"descr": values.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(values.tobytes())

            yield write
            if file is not None:
                file.close()
                os.replace(temporary, path)

    def embed(self, kind: str) -> None:
        """What goes into the first layer, unless it is there."""
        if not self.path(kind, 0).is_file():
            with self.spill(kind, 0) as write:
                for rows in self.batches():
                    write(rows, self.stream.embed(self.batch(rows)))

    def advance(self, i: int, kind: str, observe: Callable[[slice, mx.array], None] | None = None) -> None:
        """The hidden states behind a loaded layer from those before it; `observe` is called with every batch of them. Raises
        UserError where they are not finite."""
        with self.spill(kind, i + 1) as write:
            for rows in self.batches():
                output = self.stream.run(i, self.batch(rows), self.read(kind, i, rows))
                if not mx.isfinite(output).all().item():
                    raise UserError(
                        f"the hidden states behind {self.stream.path(i)} are not finite",
                        "the checkpoint or its configuration is damaged; mlxmoe convert --method rtn does not run the model",
                    )
                if observe is not None:
                    observe(rows, output)
                write(rows, output)
