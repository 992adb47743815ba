"""Quantized base models: the one definition, in NumPy, of the numbers that packed weights are.

Merging, verification, digests and every backend without a kernel for a format take their numbers from here, and the
kernels of the others are compared with them.
"""

from mindprint.models.quantized.scheme import METHODS, Method, Quantization, Scheme, read_quantization
from mindprint.models.quantized.weights import (
    QuantizedWeight,
    StoredTensor,
    dense_weights,
    load_dense,
    quantized_weights,
    read_rows,
)

__all__ = [
    "METHODS",
    "Method",
    "Quantization",
    "QuantizedWeight",
    "Scheme",
    "StoredTensor",
    "dense_weights",
    "load_dense",
    "quantized_weights",
    "read_quantization",
    "read_rows",
]
