"""Every kernel that ships, as programs to lower or to compile: each configuration, dtype and extreme of options."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.fft_conv import kernel_sm90, spectrum_sm90
from pallas_kernels.fft_conv.config import CONFIGS, N1, Config, Kernel
from pallas_kernels.fft_conv.tables import dft_tables

DTYPES = ("bfloat16", "float16")
FEATURES = 768


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel with a configuration.

    Attributes:
      kernel: None is the one that transforms the taps.
      config: its own unless the program is to try another.
      options: False for the shortest code that its dispatch allows; True for everything at once: a sequence shorter
        than the transform, a count that ends inside a tile, and of a gated kernel both gates, each channel its own. For
        the taps, False is on one side, fewer than points, and True on both.
    """

    kernel: Kernel | None
    config: Config
    dtype: str
    options: bool

    def __str__(self) -> str:
        name = self.kernel.value if self.kernel else "spectrum"
        return f"{name}, n2 = {self.config.n2}, {self.dtype}, options {'on' if self.options else 'off'}"

    @property
    def function(self) -> str:
        """The name of the kernel's function."""
        if self.kernel is None:
            return "fft_conv_spectrum"
        return "fft_conv_backward" if self.kernel is Kernel.BACKWARD else "fft_conv_forward"

    def build(self):
        """The kernel and its operands, `jax.ShapeDtypeStruct`s."""
        return self._build_spectrum() if self.kernel is None else self._build_convolution()

    def _tables(self, dtype):
        return jax.eval_shape(lambda: (*dft_tables(self.config, dtype), jnp.zeros(1, jnp.int32)))

    def _build_spectrum(self):
        length = self.config.points - 8 * self.config.n2 * (not self.options)  # taps on both sides are never fewer
        taps = jax.ShapeDtypeStruct((FEATURES - self.options, 1 + self.options, length), jnp.float32)

        def transform(taps, *tables):
            return spectrum_sm90.tap_spectrum(taps, self.config, jnp.dtype(self.dtype), *tables)

        return transform, (taps, *self._tables(jnp.float32))

    def _build_convolution(self):
        n2, dtype = self.config.n2, jnp.dtype(self.dtype)
        channels = 2 if self.kernel in (Kernel.FORWARD_CHANNELS, Kernel.FORWARD_CHANNELS_GATED) else 1
        gated = self.kernel in (Kernel.FORWARD_GATED, Kernel.FORWARD_CHANNELS_GATED)
        batch, length = 64 - self.options, N1 - 8 * self.options
        post_gates = (channels if self.options else 1) if gated else 0
        pre_gate = gated and self.options
        shapes = kernel_sm90.Shapes(batch, channels, FEATURES, length, dtype, pre_gate, post_gates)

        def array(*shape):
            return jax.ShapeDtypeStruct(shape, dtype)

        u, per_channel = array(batch, FEATURES, length, n2), array(batch, channels, FEATURES, length, n2)
        if self.kernel is Kernel.BACKWARD:
            spectrum = array(FEATURES * channels, 2, N1, n2)
            return kernel_sm90.backward(self.config, shapes), (u, per_channel, spectrum, *self._tables(dtype))
        spectrum = array(FEATURES, 2 * channels, N1, n2)
        gate = array(batch, max(post_gates, 1), FEATURES, length, n2)
        return kernel_sm90.forward(self.config, shapes), (u, u, gate, spectrum, *self._tables(dtype))


_CONFIGURED = [
    *((kernel, config) for kernel, configs in CONFIGS.items() for config in configs.values()),
    *((None, Config(n2)) for n2 in CONFIGS[Kernel.FORWARD]),
]
PROGRAMS = tuple(
    Program(kernel, config, dtype, options)
    for kernel, config in _CONFIGURED
    for dtype in DTYPES
    for options in (False, True)
)

TYPICAL = tuple(program for program in PROGRAMS if program.dtype == "bfloat16" and program.options)
"""Each configuration once: the others differ in little."""
