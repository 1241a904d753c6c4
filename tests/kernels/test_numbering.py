"""Quick names are Mosaic's own."""

from unittest import mock

from tests.kernels import numbering
from tests.kernels.programs import PROGRAMS
from tests.kernels.test_lowering import lowered


def test_names_are_those_of_mosaic():
    names: list[tuple[str, str]] = []

    def both(site, quick_name=numbering.quick_name):
        names.append((quick_name(site), numbering.name_of_site(site)))
        return names[-1][0]

    kernel, operands = next(program for program in PROGRAMS if program.name == "spectrum").build()
    with mock.patch.object(numbering, "quick_name", both), numbering.numbered_once():
        lowered(kernel, *operands)
    assert len(set(names)) > 50
    assert [quick for quick, _ in names] == [own for _, own in names]
