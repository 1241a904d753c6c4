"""Every Triton program that ships was compiled as it is now, for every card, and used what it may.

`triton_programs.json` holds what the compiler said and the hash of what it compiled; the slow lane compiles again.
"""

import dataclasses
import importlib.metadata
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from flashbutterfly_jax import long_conv
from pallas_kernels.fft_conv import triton_launch
from pallas_kernels.fft_conv.triton_plans import (
    CARDS,
    MMA_PLANS,
    WGMMA_PLANS,
    Card,
    RegisterPlan,
    card_of,
    plan_for,
)

if not sys.platform.startswith("linux"):
    pytest.skip("Triton is for Linux", allow_module_level=True)

from tests.kernels import triton_programs
from tests.kernels.triton_programs import DTYPES, PROGRAMS, RENEW, TENSOR_CORES, directions

ROOT = Path(__file__).resolve().parents[2]
MAX_REGISTERS = 255


def test_every_program_was_compiled_as_it_is_now():
    outdated = triton_programs.outdated(triton_programs.table(), triton_programs.version())
    assert not outdated, f"{triton_programs.FILE.name} is older than what ships: {[*map(str, outdated)]}; {RENEW}"
    assert list(triton_programs.table()) == [*map(str, PROGRAMS)], RENEW


def test_the_table_was_made_with_the_pinned_compiler():
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert triton_programs.version() == pins["triton"], RENEW
    assert triton_launch.complaint({name: pins[name] for name in ("jax", "jax-triton", "triton")}) is None


def problems(program, row) -> list[str]:
    """What a program uses and may not."""
    found = [figure for figure in ("stack", "spills") if row[figure]]
    found += ["registers"] * (row["registers"] > MAX_REGISTERS)
    found += ["shared"] * (row["shared"] > min(program.plan.shared, program.card.shared))
    # Tiles of 32 rows are below what Hopper's and Blackwell's own products take: their sums are by HMMA.
    small = program.kernel == "correlate" and program.plan.block * program.constants["ROWS"] < 64
    product = "HMMA" if small else TENSOR_CORES[program.card.capability]
    found += ["products"] * (not row["products"].get(product))
    return found


def test_nothing_spills_and_shared_memory_suffices_and_tensor_cores_multiply():
    table = triton_programs.table()
    found = {str(one): problems(one, table[str(one)]) for one in PROGRAMS}
    assert {name: why for name, why in found.items() if why} == {}


def test_a_problem_is_seen():
    program = next(one for one in PROGRAMS if one.card.capability == "9.0")
    row = triton_programs.table()[str(program)]
    wrong = {"stack": 8, "spills": 1, "registers": 256, "shared": program.plan.shared + 1, "products": {"HMMA": 9}}
    for figure, value in wrong.items():
        assert problems(program, row | {figure: value}) == [figure]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("forward, gated, 64 x 32, bfloat16, sm_86", {"chunk": 16}),
        ("backward, taps, shared, 128 x 64, bfloat16, sm_90", {"packed": False}),
        ("forward, gated, aligned, 64 x 64, float32, sm_90", {"anew": 8}),
        ("backward, sequences, 64 x 128, float16, sm_100", {"anew": 8}),
    ],
)
def test_without_what_a_plan_has_for_it_there_is_stack(name, change):
    program = next(one for one in PROGRAMS if str(one) == name)
    changed = dataclasses.replace(program, plan=dataclasses.replace(program.plan, **change))
    assert problems(changed, triton_programs.verdict(changed)) == ["stack", "spills"]


def test_every_plan_dtype_and_direction_is_there_for_every_card():
    found = {(one.dtype, one.direction, one.plan, one.card.capability) for one in PROGRAMS}
    cards = [(dtype, card, plan) for dtype in DTYPES for card in CARDS.values() for plan in card.plans]
    assert found == {(dtype, way, plan, card.capability) for dtype, card, plan in cards for way in directions(plan)}


def test_a_program_missing_or_compiled_from_something_else_is_named():
    known = dict(triton_programs.table())
    first, second, *_ = PROGRAMS
    del known[str(first)]
    known[str(second)] = known[str(second)] | {"digest": "of something else"}
    assert triton_programs.outdated(known, triton_programs.version()) == [first, second]
    assert triton_programs.outdated(triton_programs.table(), "0.0.1") == list(PROGRAMS)


def test_a_digest_is_of_the_source_the_plan_the_types_and_the_card(monkeypatch):
    program = PROGRAMS[0]
    changed = [
        dataclasses.replace(program, plan=dataclasses.replace(program.plan, rows=4)),
        dataclasses.replace(program, plan=dataclasses.replace(program.plan, warps=8)),
        dataclasses.replace(program, dtype="float32"),
        dataclasses.replace(program, direction="forward, gated"),
        dataclasses.replace(program, card=CARDS["8.6"]),
    ]
    digests = [triton_programs.digest(one, "3.6.0") for one in [program, *changed]]
    monkeypatch.setattr(triton_programs, "_source", lambda module: "other")
    digests.append(triton_programs.digest(program, "3.6.0"))
    assert len(set(digests)) == len(digests)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_no_program_uses_more_than_the_table_says(program):
    row = triton_programs.verdict(program)
    assert problems(program, row) == []
    if importlib.metadata.version("triton") == triton_programs.version():
        known = triton_programs.table()[str(program)]
        assert row == {figure: known[figure] for figure in row}


def test_one_program_compiles_to_what_the_table_says():
    program = next(one for one in PROGRAMS if one.direction == "forward" and one.card.capability == "8.6")
    known = triton_programs.table()[str(program)]
    assert importlib.metadata.version("triton") == triton_programs.version(), "install with constraints.txt"
    assert triton_programs.verdict(program) == {figure: known[figure] for figure in known if figure != "digest"}


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        (("0.11.2", "0.3.1", "3.6.0"), None),
        (("0.11.1", "0.4.1", "3.7.0"), None),
        (("0.11.2", "0.4.0", "3.8.1"), None),
        (("0.11.2", "0.4.1", "3.6.0"), r"do not work together. Run .* jax-triton==0.3.1 \"triton==3.6.\*\""),
        (("0.11.2", "0.3.1", "3.8.0"), r"jax-triton==0.4.1 \"triton==3.8.\*\""),
        (("0.11.2", "0.4.1", "3.9.0"), r"jax 0.11.2, jax-triton 0.4.1 and triton 3.9.0 do not"),
        (("0.12.0.1", "0.4.1", "3.8.0"), r"jax 0.12.0.1, .* \"jax<0.12\""),
        (("0.11.2", None, "3.6.0"), "needs jax-triton, not installed here. Run "),
        (("0.11.2", None, None), "needs jax-triton and triton, not installed"),
    ],
)
def test_versions(versions, says):
    found = triton_launch.complaint(dict(zip(("jax", "jax-triton", "triton"), versions, strict=True)))
    assert found is None if says is None else re.search(says, found)
    assert found is None or 'implementation="xla"' in found


def test_without_triton_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setattr(triton_launch, "installed", lambda: {"jax": "0.11.2", "jax-triton": None, "triton": None})
    u, kernel = jnp.ones((1, 8)), jnp.ones((1, 8))
    with pytest.raises(NotImplementedError, match=r"needs jax-triton and triton, not installed here. Run `pip install"):
        long_conv(u, kernel, implementation="triton")
    assert long_conv(u, kernel, implementation=("triton", "xla")).shape == u.shape


@pytest.mark.parametrize(
    ("capabilities", "says"),
    [
        ({"7.5"}, "need tensor cores for bfloat16, compute capability 8.0 or newer; this GPU has 7.5"),
        ({"13.0"}, "compiled for compute capabilities 8.0, .*12.0; this GPU has 13.0"),
        ({"8.6", "8.9"}, r"\['8.6', '8.9'\]. Choose with CUDA_VISIBLE_DEVICES"),
    ],
)
def test_cards(capabilities, says):
    with pytest.raises(NotImplementedError, match=says):
        card_of(capabilities)


def test_a_card_with_little_shared_memory_has_shorter_sequences():
    card = Card("8.6", MMA_PLANS[2].shared)
    assert card.longest == MMA_PLANS[2].points
    assert plan_for(card.longest, card) is MMA_PLANS[2]
    with pytest.raises(NotImplementedError, match=r"at most 4096 steps on a GPU of .* which has 40 KB .* got 4097"):
        plan_for(card.longest + 1, card)


@pytest.mark.parametrize("change", [{"n1": 48}, {"rows": 0}, {"block": 256}, {"chunk": 32}, {"columns": 32}])
def test_a_plan_that_no_kernel_has_is_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be .*; got {next(iter(change.values()))}"):
        RegisterPlan(**dataclasses.asdict(MMA_PLANS[0]) | change)


def test_another_order_of_n2_is_refused_where_it_would_be_that_of_k2():
    with pytest.raises(ValueError, match="packed must be False where together is True"):
        dataclasses.replace(WGMMA_PLANS[0], packed=True)


class _Gpu:
    compute_capability = "8.9"


def test_the_keyword_of_each_jax_triton(monkeypatch):
    calls = []
    operand = jnp.ones(1)

    class JaxTriton:
        def triton_call(self, *operands, **keywords):
            calls.append(keywords)
            return [operand]

    monkeypatch.setattr(triton_launch.importlib, "import_module", lambda name: JaxTriton())
    monkeypatch.setattr(JaxTriton, "convolve", "kernel", raising=False)
    result = jax.ShapeDtypeStruct((1,), "float32")
    for version, keyword in (("0.3.1", "out_shape"), ("0.4.1", "out_type")):
        monkeypatch.setattr(triton_launch.importlib.metadata, "version", lambda name, version=version: version)
        assert triton_launch.launch("convolve", [operand], [result], 5, MMA_PLANS[0], CARDS["8.9"], {}) == [operand]
        assert calls[-1][keyword] == [result]
        assert calls[-1]["grid"] == (5,)
        assert calls[-1]["compute_capability"] == 89


def test_on_the_cpu_of_a_machine_with_a_gpu_the_kernel_says_what_else_there_is(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda backend: [_Gpu()])
    monkeypatch.setattr(
        triton_launch, "launch", lambda name, operands, results, *_: [jnp.zeros(r.shape, r.dtype) for r in results]
    )
    with pytest.raises(NotImplementedError, match=r'"triton" runs on CUDA devices; this computation is for \'cpu\'.'):
        long_conv(jnp.ones((1, 8)), jnp.ones((1, 8)), implementation="triton")


def test_none_takes_the_kernels_only_where_they_were_measured(monkeypatch):
    import importlib

    module = importlib.import_module("flashbutterfly_jax.functional.long_conv")
    u = jnp.ones((1, 2048), "bfloat16")
    monkeypatch.setattr(module, "_may_be_hopper", lambda: False)
    monkeypatch.setattr(module, "_capability", lambda: "8.0")
    assert module._default_order(u) == ("triton", "xla")
    for other in (u[:, :1023], u.astype("float32"), jnp.ones((1, 4096), "bfloat16")):
        assert module._default_order(other) == ("xla",)
    monkeypatch.setattr(module, "_capability", lambda: "9.0")
    assert module._default_order(jnp.ones((1, 4096), "bfloat16")) == ("triton", "xla")
    monkeypatch.setattr(module, "_may_be_hopper", lambda: True)
    assert module._default_order(u) == ("mosaic_gpu", "triton", "xla")
    assert module._default_order(u[:, :1023]) == ("mosaic_gpu", "xla")
    assert module._TRITON_LENGTHS.keys() == CARDS.keys()
    assert all(max(lengths) <= CARDS[card].longest for card, lengths in module._TRITON_LENGTHS.items())


def test_none_is_xla_where_triton_does_not_work(monkeypatch):
    """Also on a card for which the kernels come first."""
    import importlib

    module = importlib.import_module("flashbutterfly_jax.functional.long_conv")
    monkeypatch.setattr(module, "_may_be_hopper", lambda: False)
    monkeypatch.setattr(module, "_capability", lambda: "8.0")
    monkeypatch.setattr(triton_launch, "installed", lambda: {"jax": "0.11.2", "jax-triton": None, "triton": None})
    u, kernel = jnp.ones((1, 1024), "bfloat16"), jnp.ones((1, 8))
    text = str(jax.make_jaxpr(long_conv)(u, kernel))
    assert "fft" in text
    assert "cond[" not in text  # no choice is left
