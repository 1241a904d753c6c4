"""How many floating-point operations a language model needs: products with weights, attention and convolutions."""

import math
from typing import Protocol


class Shape(Protocol):
    """What decides it."""

    @property
    def mixer(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def features(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def attention_layers(self) -> tuple[int, ...]: ...


def training_flop(shape: Shape, vocab_size: int) -> float:
    """Of the forward and the backward pass of one sequence, the latter twice the former.

    A layer multiplies each step with 4 D^2 weights of its mixer and 8 D^2 of its MLP, and the embedding with its D V as
    the output. Causal attention has 2 L D more multiply-adds for each step, of which half are masked and not counted.
    Either of H3's convolutions has for each feature two real FFTs of 2 L points, 5/2 N log2 N each, and the product of
    spectra; what depends on the kernel alone is shared by the batch and left out.
    """
    length, features = shape.length, shape.features
    attention = shape.num_layers if shape.mixer == "attention" else len(set(shape.attention_layers))
    weights = shape.num_layers * 12 * features**2 + features * vocab_size
    products = 2 * weights * length
    points = 2 * length
    convolution = 2 * 2.5 * points * math.log2(points) + 6 * (points // 2 + 1)
    filters = (shape.num_layers - attention) * 2 * features * convolution
    return 3 * (products + attention * 2 * length**2 * features + filters)
