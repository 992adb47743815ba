"""Core's losses on arrays that are traced: how a framework that differentiates hands them its own functions.

A traced array holds its values and a record of the operations that made it. `gradient` reads the record backwards
(reverse-mode differentiation: Griewank & Walther 2008, chapter 3). A framework such as JAX or PyTorch brings its own
arrays and its own gradient; a backend writes for it a class such as `TracedArrays`, and nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mindprint.losses import NUMPY

Array = NDArray[np.float64]
ONE, ZERO = np.ones(()), np.zeros(())


@dataclass(frozen=True, eq=False)
class Traced:
    """An array `[pairs]` or a scalar, with the arrays that it was made of and its derivative by each of them."""

    values: Array
    made_of: tuple[tuple[Traced, Array], ...] = ()

    # NumPy must leave `array + traced` to `Traced.__radd__` instead of adding element by element.
    __array_ufunc__ = None

    def __neg__(self) -> Traced:
        return Traced(-self.values, ((self, -ONE),))

    def __add__(self, other: Traced | Array | float) -> Traced:
        return Traced(self.values + values_of(other), ((self, ONE), *_part(other, ONE)))

    def __sub__(self, other: Traced | Array | float) -> Traced:
        return self + -other

    def __mul__(self, other: Traced | Array | float) -> Traced:
        values = values_of(other)
        return Traced(self.values * values, ((self, values), *_part(other, self.values)))

    def __truediv__(self, other: Traced | Array | float) -> Traced:
        return self * (other**-1.0 if isinstance(other, Traced) else 1.0 / values_of(other))

    def __pow__(self, power: float) -> Traced:
        return Traced(self.values**power, ((self, power * self.values ** (power - 1)),))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Array | float) -> Traced:
        return -self + other

    def __rtruediv__(self, other: Array | float) -> Traced:
        return self**-1.0 * other


class TracedArrays:
    """The functions that core's losses need (`mindprint.losses.ArrayNamespace`), each with its derivative."""

    def log_sigmoid(self, x: Traced) -> Traced:
        return Traced(NUMPY.log_sigmoid(x.values), ((x, NUMPY.sigmoid(-x.values)),))

    def sigmoid(self, x: Traced) -> Traced:
        # sigmoid' = sigmoid(x) * sigmoid(-x): written so, it does not cancel where sigmoid(x) is near 1.
        return Traced(NUMPY.sigmoid(x.values), ((x, NUMPY.sigmoid(x.values) * NUMPY.sigmoid(-x.values)),))

    def relu(self, x: Traced) -> Traced:
        # At the kink any slope from 0 to 1 is right, and 0 is the one that PyTorch takes.
        return Traced(NUMPY.relu(x.values), ((x, np.asarray(x.values > 0, np.float64)),))

    def exp(self, x: Traced) -> Traced:
        return Traced(NUMPY.exp(x.values), ((x, NUMPY.exp(x.values)),))

    def log1p(self, x: Traced) -> Traced:
        return Traced(NUMPY.log1p(x.values), ((x, 1.0 / (1.0 + x.values)),))

    def sum(self, x: Traced) -> Traced:
        return Traced(NUMPY.sum(x.values), ((x, np.ones_like(x.values)),))


def gradient(function: Callable[..., Traced], arguments: Sequence[Array]) -> tuple[Array, list[Array]]:
    """Return the value of a scalar function, and its derivative by each argument."""
    traced = [Traced(np.asarray(values, np.float64)) for values in arguments]
    result = function(*traced)
    # By identity, because equal arrays may be different inputs, and NumPy arrays are not hashable.
    slopes = {id(result): ONE}
    for array in reversed(_in_order(result)):
        for part, derivative in array.made_of:
            # The chain rule. An array that was used twice gets the sum of both contributions.
            slopes[id(part)] = slopes.get(id(part), ZERO) + slopes[id(array)] * derivative
    zeros = [np.zeros_like(array.values) for array in traced]
    return result.values, [slopes.get(id(array), zero) for array, zero in zip(traced, zeros, strict=True)]


def values_of(operand: Traced | Array | float) -> Array:
    """Return the values of an operand of any kind."""
    return operand.values if isinstance(operand, Traced) else np.asarray(operand, np.float64)


def _part(operand: Traced | Array | float, derivative: Array) -> tuple[tuple[Traced, Array], ...]:
    return ((operand, derivative),) if isinstance(operand, Traced) else ()


def _in_order(result: Traced) -> list[Traced]:
    """Return every array that the result depends on, each after those that it was made of."""
    ordered: dict[int, Traced] = {}

    def visit(array: Traced) -> None:
        if id(array) not in ordered:
            for part, _ in array.made_of:
                visit(part)
            ordered[id(array)] = array

    visit(result)
    return list(ordered.values())
