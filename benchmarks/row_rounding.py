"""Equal rows in one matrix product on MLX's CPU: how far apart do their results round?

    OMP_NUM_THREADS=1 python benchmarks/row_rounding.py

A library of matrix products takes rows in blocks and adds in another order at the end of a block. So a prompt's numbers
depend on how many others are continued with it, and on its place among them. The rows are equal, of width 576, and
multiplied with a random weight of 1,536 outputs in float32.
"""

from __future__ import annotations

import mindprint_mlx  # noqa: F401  # isort: skip  (before mlx: it decides what MLX multiplies matrices with)
import mlx.core as mx
import numpy as np

from mindprint_mlx.blas import prepare

WIDTH, OUTPUTS = 576, 1536
COUNTS = (1, 2, 4, 8, 12, 16)


def main() -> None:
    print(prepare().name)
    rng = np.random.default_rng(0)
    weight = mx.array(rng.normal(size=(OUTPUTS, WIDTH)).astype(np.float32))
    row = rng.normal(size=(1, WIDTH)).astype(np.float32)
    with mx.stream(mx.cpu):
        alone = np.array(mx.array(row) @ weight.T)[0]
        for count in COUNTS:
            found = np.array(mx.array(np.repeat(row, count, axis=0)) @ weight.T)
            among = float(np.abs(found - found[0]).max())
            of_one = float(np.abs(found - alone).max())
            print(f"{count:2d} rows: {among:.1e} apart from one another, {of_one:.1e} from one row")


if __name__ == "__main__":
    main()
