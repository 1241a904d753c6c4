"""`implementation="xla"` against the direct sum."""

from tests.parity import ParitySuite


class TestXla(ParitySuite):
    implementation = "xla"
