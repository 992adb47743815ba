"""The work between a layer's products as Triton kernels: each array is read once and written once.

torch runs a kernel for each operation, and in between every array goes through the GPU's memory. The kernels here round
where the operations that they replace round (`elementwise.py` has those in torch), so that their numbers differ by no
more than the order of a sum. Where a product is added to something, the compiler may not make one operation of it.

Triton comes with PyTorch for CUDA. Nothing else imports this module, but `elementwise.py` where kernels can run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 2048
"""Elements of each array that a program of an elementwise kernel reads."""

ROW_ELEMENTS = 512
"""Elements of a row that a warp reads: 16 for each of its threads."""


def normalise(
    x: Tensor, weight: Tensor, epsilon: float, *, plus_one: bool, rounds_first: bool
) -> tuple[Tensor, Tensor]:
    """Return `x / rms(x)` times the weight for contiguous `x` `[..., width]`, and `1 / rms(x)`, float32 `[rows]`."""
    width = x.shape[-1]
    output = torch.empty_like(x)
    inverse = torch.empty(x.numel() // width, dtype=torch.float32, device=x.device)
    _normalise[(len(inverse),)](
        x, weight, output, inverse, width, epsilon,
        block=triton.next_power_of_2(width), plus_one=plus_one, rounds_first=rounds_first,
        num_warps=_warps(width), enable_fp_fusion=False,
    )  # fmt: skip
    return output, inverse


def normalise_back(
    gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, *, plus_one: bool, rounds_first: bool
) -> Tensor:
    """Return the gradient by `x` of `normalise`, for a contiguous gradient by its output."""
    width = x.shape[-1]
    by_x = torch.empty_like(x)
    _normalise_back[(len(inverse),)](
        gradient, x, weight, inverse, by_x, width,
        block=triton.next_power_of_2(width), plus_one=plus_one, rounds_first=rounds_first,
        num_warps=_warps(width), enable_fp_fusion=False,
    )  # fmt: skip
    return by_x


def gate_product(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`, for contiguous arrays of one shape."""
    inner = torch.empty_like(gate)
    count = gate.numel()
    _gate_product[(triton.cdiv(count, ELEMENTS),)](gate, up, inner, count, block=ELEMENTS, num_warps=8)
    return inner


def gate_gradients(gate: Tensor, up: Tensor, by_inner: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients by gate and up of `gate_product`, and write its value in place of the gradient by it."""
    by_gate, by_up = torch.empty_like(gate), torch.empty_like(gate)
    count = gate.numel()
    _gate_gradients[(triton.cdiv(count, ELEMENTS),)](
        gate, up, by_inner, by_gate, by_up, count, block=ELEMENTS, num_warps=8, enable_fp_fusion=False
    )
    return by_gate, by_up


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, *, back: bool) -> Tensor:
    """Return `x` `[rows, heads, tokens, size]`, rotated by angles `[rows or 1, tokens, size]`, or a gradient by it.

    In memory the result is `[rows, tokens, heads, size]`, as a projection writes it.
    """
    rows, heads, tokens, size = x.shape
    output = torch.empty((rows, tokens, heads, size), dtype=x.dtype, device=x.device)
    row_step, head_step, token_step, _ = x.stride()
    _rotate[(rows * tokens,)](
        x, cosine, sine, output, tokens, heads, size // 2, row_step, head_step, token_step,
        tokens if len(cosine) > 1 else 0,
        head_block=triton.next_power_of_2(heads), block=triton.next_power_of_2(size // 2), back=back,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return output.transpose(1, 2)


def unpack_affine(words: Tensor, scales: Tensor, biases: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return `scale * level + bias` `[rows, in]` of words int32 `[rows, in * bits / 32]`, rounded once to the dtype."""
    rows, row_words = words.shape
    width = row_words * 32 // bits
    output = torch.empty((rows, width), dtype=dtype, device=words.device)
    _unpack_affine[(rows, triton.cdiv(width, ELEMENTS))](
        words, scales, biases, output, width, row_words, scales.shape[1],
        bits=bits, group_size=width // scales.shape[1], block=ELEMENTS, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return output


def unpack_blocks(
    codes: Tensor, table: Tensor, scales: Tensor, nested: tuple[Tensor, Tensor, Tensor] | None, first: int,
    shape: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return rows of a weight in bitsandbytes' blocks, rounded once to the dtype.

    Args:
        codes: The whole weight's codes, uint8, the first of a byte in its upper half.
        table: The numbers of the 16 codes, float32.
        scales: The whole weight's scales of blocks, or their codes under double quantization.
        nested: The scales of those, the numbers of 256 codes, and an offset, all float32; None without them.
        first: The place of the rows' first element in the weight.
        shape: The rows' shape.
        sizes: The elements of a block, and the blocks that share a scale of scales.
        dtype: The dtype of the result.
    """
    output = torch.empty(shape, dtype=dtype, device=codes.device)
    outer, outer_table, offset = nested or (scales, scales, scales)
    _unpack_blocks[(triton.cdiv(output.numel(), ELEMENTS),)](
        codes, table, scales, outer, outer_table, offset, output, first, output.numel(),
        block_size=sizes[0], nested_size=sizes[1] if nested else 0, block=ELEMENTS, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return output


def _warps(width: int) -> int:
    return int(min(max(triton.next_power_of_2(width) // ROW_ELEMENTS, 1), 16))


@triton.jit
def _normalise(
    x: tl.tensor, weight: tl.tensor, output: tl.tensor, inverse: tl.tensor, width: tl.tensor, epsilon: tl.tensor,
    block: tl.constexpr, plus_one: tl.constexpr, rounds_first: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    values = tl.load(x + row * width + columns, inside, 0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values) / width + epsilon)
    tl.store(inverse + row, factor)
    scale = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    if plus_one:
        scale = scale + 1.0
    normalised = values * factor
    dtype = output.dtype.element_ty
    if rounds_first:
        normalised = normalised.to(dtype).to(tl.float32)
    tl.store(output + row * width + columns, (normalised * scale).to(dtype), inside)


@triton.jit
def _normalise_back(
    gradient: tl.tensor, x: tl.tensor, weight: tl.tensor, inverse: tl.tensor, by_x: tl.tensor, width: tl.tensor,
    block: tl.constexpr, plus_one: tl.constexpr, rounds_first: tl.constexpr,
) -> None:  # fmt: skip
    # With f = 1 / rms(x), n = f x and y = n w, and g = dL/dy: dL/dx = f (g w - n mean(g w n)).
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    factor = tl.load(inverse + row)
    normalised = tl.load(x + row * width + columns, inside, 0.0).to(tl.float32) * factor
    scale = tl.load(weight + columns, inside, 0.0).to(tl.float32)
    if plus_one:
        scale = scale + 1.0
    by_normalised = tl.load(gradient + row * width + columns, inside, 0.0).to(tl.float32) * scale
    dtype = by_x.dtype.element_ty
    if rounds_first:
        by_normalised = by_normalised.to(dtype).to(tl.float32)
    mean = tl.sum(by_normalised * normalised) / width
    tl.store(by_x + row * width + columns, (factor * (by_normalised - normalised * mean)).to(dtype), inside)


@triton.jit
def _gate_product(gate: tl.tensor, up: tl.tensor, inner: tl.tensor, count: tl.tensor, block: tl.constexpr) -> None:
    places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = places < count
    dtype = inner.dtype.element_ty
    gates = tl.load(gate + places, inside, 0.0).to(tl.float32)
    activated = (gates / (1.0 + tl.exp(-gates))).to(dtype).to(tl.float32)
    product = activated * tl.load(up + places, inside, 0.0).to(tl.float32)
    tl.store(inner + places, product.to(dtype), inside)


@triton.jit
def _gate_gradients(
    gate: tl.tensor,
    up: tl.tensor,
    by_inner: tl.tensor,
    by_gate: tl.tensor,
    by_up: tl.tensor,
    count: tl.tensor,
    block: tl.constexpr,
) -> None:
    # silu(z) = z s(z), with s(z) = 1 / (1 + exp(-z)), has the derivative s(z) (1 + z (1 - s(z))).
    places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = places < count
    dtype = by_gate.dtype.element_ty
    gates = tl.load(gate + places, inside, 0.0).to(tl.float32)
    ups = tl.load(up + places, inside, 0.0).to(tl.float32)
    outer = tl.load(by_inner + places, inside, 0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gates))
    activated = (gates * sigmoid).to(dtype).to(tl.float32)
    tl.store(by_inner + places, (activated * ups).to(dtype), inside)
    tl.store(by_up + places, (activated * outer).to(dtype), inside)
    by_activated = (outer * ups).to(dtype).to(tl.float32)
    tl.store(by_gate + places, (by_activated * sigmoid * (1.0 + gates * (1.0 - sigmoid))).to(dtype), inside)


@triton.jit
def _rotate(  # noqa: PLR0917  kernels take positions
    x: tl.tensor, cosine: tl.tensor, sine: tl.tensor, output: tl.tensor, tokens: tl.tensor, heads: tl.tensor,
    half: tl.tensor, row_step: tl.tensor, head_step: tl.tensor,
    token_step: tl.tensor, angle_step: tl.tensor, head_block: tl.constexpr, block: tl.constexpr, back: tl.constexpr,
) -> None:  # fmt: skip
    # A program rotates all heads of one token: (a, b) becomes (a cos - b sin, b cos + a sin), half of a head each.
    token = tl.program_id(0).to(tl.int64)
    row, place = token // tokens, token % tokens
    head, column = tl.arange(0, head_block)[:, None], tl.arange(0, block)[None, :]
    inside = (head < heads) & (column < half)
    angles = (row * angle_step + place) * 2 * half + column
    in_x = row * row_step + place * token_step + head * head_step + column
    in_output = (token * heads + head) * 2 * half + column
    is_column = column < half
    dtype = output.dtype.element_ty
    first = tl.load(x + in_x, inside, 0.0).to(tl.float32)
    second = tl.load(x + in_x + half, inside, 0.0).to(tl.float32)
    first_sine = tl.load(sine + angles, is_column, 0.0).to(tl.float32)
    second_sine = tl.load(sine + angles + half, is_column, 0.0).to(tl.float32)
    if back:
        first_turned, second_turned = second * second_sine, -(first * first_sine)
    else:
        first_turned, second_turned = -(second * first_sine), first * second_sine
    first = (first * tl.load(cosine + angles, is_column, 0.0).to(tl.float32)).to(dtype).to(tl.float32)
    second = (second * tl.load(cosine + angles + half, is_column, 0.0).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(output + in_output, (first + first_turned.to(dtype).to(tl.float32)).to(dtype), inside)
    tl.store(output + in_output + half, (second + second_turned.to(dtype).to(tl.float32)).to(dtype), inside)


@triton.jit
def _unpack_affine(
    words: tl.tensor, scales: tl.tensor, biases: tl.tensor, output: tl.tensor, width: tl.tensor, row_words: tl.tensor,
    groups: tl.tensor,
    bits: tl.constexpr, group_size: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    # A row is a stream of bits, lowest first. A level of 3, 5 or 6 bits may begin in one word and end in the next.
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    word = words + row * row_words + columns * bits // 32
    offset = columns * bits % 32
    levels = tl.load(word, inside, 0).to(tl.uint32, bitcast=True) >> offset.to(tl.uint32)
    if 32 % bits != 0:
        crosses = offset + bits > 32
        rest = tl.load(word + 1, inside & crosses, 0).to(tl.uint32, bitcast=True)
        levels |= rest << tl.where(crosses, 32 - offset, 0).to(tl.uint32)
    levels &= (1 << bits) - 1
    group = row * groups + columns // group_size
    product = tl.load(scales + group, inside, 0.0).to(tl.float32) * levels.to(tl.float32)
    values = product + tl.load(biases + group, inside, 0.0).to(tl.float32)
    tl.store(output + row * width + columns, values.to(output.dtype.element_ty), inside)


@triton.jit
def _unpack_blocks(  # noqa: PLR0917
    codes: tl.tensor, table: tl.tensor, scales: tl.tensor, outer: tl.tensor, outer_table: tl.tensor,
    offset: tl.tensor, output: tl.tensor, first: tl.tensor, count: tl.tensor,
    block_size: tl.constexpr, nested_size: tl.constexpr, block: tl.constexpr,
) -> None:  # fmt: skip
    places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = places < count
    element = first + places
    byte = tl.load(codes + element // 2, inside, 0).to(tl.int32)
    code = tl.where(element % 2 == 0, byte >> 4, byte & 15)
    number_of_block = element // block_size
    scale = tl.load(scales + number_of_block, inside, 0)
    if nested_size > 0:
        factor = tl.load(outer + number_of_block // nested_size, inside, 0.0)
        number = tl.load(outer_table + scale.to(tl.int32)) * factor + tl.load(offset)
    else:
        number = scale.to(tl.float32)
    tl.store(output + places, (tl.load(table + code) * number).to(output.dtype.element_ty), inside)
