"""Streaming: every split of a sequence into a prompt and steps gives the full convolution, by one program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flashbutterfly_jax as fb
from tests.parity import direct_sum, relative_error

TOLERANCE = {
    "float64": 5e-15,  # 7.9e-16
    "float32": 1e-6,  # 3.3e-7
    "bfloat16": 4e-3,  # 3.0e-3; half a unit in the last place is 3.9e-3 of the smallest number of a binade
}


take_step = jax.jit(lambda stream, state, u_t: stream.step(state, u_t))


@jax.jit
def scan_steps(stream, state, u):
    state, y = jax.lax.scan(stream.step, state, jnp.moveaxis(u, -1, 0))
    return state, jnp.moveaxis(y, 0, -1)


def stepped(stream, u, prompt: int | None):
    """All of y, by one program for the steps of every split; None begins without a prompt."""
    if prompt is None:
        state, parts = stream.init(u.shape[:-2]), []
    else:
        state, y = jax.jit(type(stream).prefill)(stream, u[..., :prompt])
        parts = [np.asarray(y)]
    for t in range(prompt or 0, u.shape[-1]):
        state, y_t = take_step(stream, state, u[..., t])
        parts.append(np.asarray(y_t)[..., None])
    return np.concatenate(parts, -1)


def arrays(length, taps, channels=None, batch=(2,), features=2, seed=0):
    random = np.random.default_rng(seed)
    channels = () if channels is None else (channels,)
    return {
        "u": random.standard_normal((*batch, features, length)),
        "kernel": random.standard_normal((*channels, features, taps)),
        "skip": random.standard_normal((*channels, features)),
    }


# L, K, room. Powers of two, one over and one under; more taps than steps; rings, some that go round several times.
SHAPES = [(1, 1, 1), (31, 40, 31), (64, 64, 64), (129, 129, 200), (255, 300, 255), (300, 33, None), (300, 70, None)]


@pytest.mark.parametrize(
    ("length", "taps", "room", "method"),
    [(*shape, "tiled") for shape in SHAPES] + [(*shape, "direct") for shape in (SHAPES[3], SHAPES[-1])],
)
def test_every_kind_of_split(length, taps, room, method):
    with jax.enable_x64(True):
        exact = arrays(length, taps, channels=2)
        want = direct_sum(**exact)
        stream = fb.long_conv_stream(exact["kernel"], exact["skip"], max_length=room, method=method)
        for prompt in {None, 0, 1, length // 2, length}:
            assert relative_error(stepped(stream, exact["u"], prompt), want) < TOLERANCE["float64"]


@pytest.mark.slow  # each example compiles a step of its own; the splits above are the fast lane's
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    length=st.integers(1, 150),
    taps=st.integers(1, 200),
    bounded=st.booleans(),
    channels=st.sampled_from([None, 1, 2]),
    batch=st.lists(st.integers(1, 2), max_size=2).map(tuple),
    data=st.data(),
)
def test_random_splits(length, taps, bounded, channels, batch, data):
    exact = arrays(length, taps, channels, batch)
    room = data.draw(st.integers(length, 2 * length), "room") if bounded else None
    stream = fb.long_conv_stream(exact["kernel"].astype(np.float32), exact["skip"].astype(np.float32), max_length=room)
    got = stepped(stream, exact["u"].astype(np.float32), data.draw(st.integers(0, length), "prompt"))
    scale = direct_sum(**{name: np.abs(array) for name, array in exact.items()}).max()  # tiny cases can cancel
    assert np.abs(np.asarray(got, np.float64) - direct_sum(**exact)).max() < TOLERANCE["float32"] * scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_sequences(dtype):
    exact = arrays(200, 200)
    u, kernel = jnp.asarray(exact["u"], dtype), jnp.asarray(exact["kernel"], jnp.float32)
    stream = fb.long_conv_stream(kernel, max_length=200)
    y = stepped(stream, u, 77)
    assert y.dtype == dtype
    want = direct_sum(np.asarray(u, np.float64), np.asarray(kernel, np.float64))
    assert relative_error(y, want) < TOLERANCE[dtype]
    assert stream.init().buffer.dtype == jnp.float32


def test_no_sequences():
    stream = fb.long_conv_stream(np.ones((2, 8), np.float32))
    state, y = stream.prefill(np.ones((0, 2, 5), np.float32))
    assert y.shape == (0, 2, 5)
    assert stream.step(state, np.ones((0, 2), np.float32))[1].shape == (0, 2)


def test_one_program_and_the_same_bits():
    exact = arrays(130, 130)
    u = jnp.asarray(exact["u"], jnp.float32)
    stream = fb.long_conv_stream(jnp.asarray(exact["kernel"], jnp.float32), max_length=130)
    take_step.clear_cache()
    np.testing.assert_array_equal(stepped(stream, u, 7), stepped(stream, u, 7))
    assert take_step._cache_size() == 1
    np.testing.assert_array_equal(stepped(stream, u, None), scan_steps(stream, stream.init((2,)), u)[1])


def test_a_stream_takes_part_in_transformations():
    """vmap over whole streams, and the gradient through prompt and steps in kernel, skip and u."""
    with jax.enable_x64(True):
        exact = {name: jnp.asarray(x) for name, x in arrays(70, 70).items()}

        def by_stream(u, kernel, skip):
            stream = fb.long_conv_stream(kernel, skip, max_length=70)
            state, y = stream.prefill(u[..., :13])
            return jnp.concatenate([y, scan_steps(stream, state, u[..., 13:])[1]], -1)

        weights = np.random.default_rng(1).standard_normal((2, 2, 70))
        got, want = (
            jax.jit(jax.grad(lambda args, f=f: (f(**args) * weights).sum()))(exact) for f in (by_stream, fb.long_conv)
        )
        for name in exact:
            assert relative_error(got[name], np.asarray(want[name])) < TOLERANCE["float64"], name

        twice = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), exact)
        want = np.stack([direct_sum(**jax.tree.map(np.asarray, exact))] * 2) * np.array([1, 4])[:, None, None, None]
        assert relative_error(jax.vmap(by_stream)(**twice), want) < TOLERANCE["float64"]


def test_a_batch_of_states_is_gathered_like_any_pytree():
    """As a beam search does: the second sequence goes on from the first one's past."""
    exact = arrays(100, 100, batch=(2,))
    u = jnp.asarray(exact["u"], jnp.float32)
    stream = fb.long_conv_stream(jnp.asarray(exact["kernel"], jnp.float32), max_length=100)
    state, _ = stream.prefill(u[..., :50])
    state, _ = scan_steps(stream, state, u[..., 50:70])
    state = state._replace(buffer=state.buffer[jnp.array([0, 0])])
    _, y = scan_steps(stream, state, u[..., 70:])
    exact["u"][1, :, :70] = exact["u"][0, :, :70]
    assert relative_error(y, direct_sum(exact["u"], exact["kernel"])[..., 70:]) < TOLERANCE["float32"]


def test_steps_copy_no_buffer():
    """Work that grows with the room would be no better than a sum over it."""
    stream = fb.long_conv_stream(np.ones((2, 4096), np.float32), max_length=4096)
    step = jax.jit(lambda stream, state, u: stream.step(state, u), donate_argnums=1)
    state, u = stream.init((3,)), jnp.ones((3, 2))
    alone = step.lower(stream, state, u).compile().as_text()
    scanned = scan_steps.lower(stream, state, jnp.ones((3, 2, 8))).compile().as_text()
    inside = scanned[: scanned.index("\nENTRY")]  # the one copy outside the loop is of an argument that is kept
    for text in (alone, inside):
        assert "f32[3,1,2,4096]" in text
        assert not re.findall(r"f32\[3,1,2,4096\]\S* copy\(", text)


def test_nothing_moves_between_devices_that_share_the_features():
    mesh = jax.make_mesh((2, 4), ("data", "feature"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(x, *spec):
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))

    exact = arrays(100, 100, batch=(2,), features=4)
    stream = fb.long_conv_stream(exact["kernel"].astype(np.float32), max_length=100)
    stream = jax.tree.map(lambda x: place(x, None, "feature"), stream)
    u = place(exact["u"].astype(np.float32), "data", "feature")
    state = stream.init((2,))
    state = state._replace(buffer=place(state.buffer, "data", None, "feature"))
    compiled = scan_steps.lower(stream, state, u).compile()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", compiled.as_text())
    y = compiled(stream, state, u)[1]
    assert relative_error(y, direct_sum(exact["u"], exact["kernel"])) < TOLERANCE["float32"]
    assert y.addressable_shards[0].data.size == y.size // 8


class TestRefusals:
    def test_no_room(self):
        stream = fb.long_conv_stream(np.ones((2, 8), np.float32), max_length=5)
        with pytest.raises(ValueError, match="max_length = 5 steps have no room for 6 more after 0"):
            stream.prefill(np.ones((2, 6), np.float32))
        state, _ = stream.prefill(np.ones((2, 5), np.float32))
        with pytest.raises(
            ValueError, match="no room for 1 more after 5; make the stream with max_length of at least 6"
        ):
            stream.step(state, np.ones(2, np.float32))
        _, y = jax.jit(stream.step)(state, np.ones(2, np.float32))
        assert np.isnan(y).all()

    def test_states_of_others(self):
        stream = fb.long_conv_stream(np.ones((2, 8), np.float32), max_length=5)
        u_t = np.ones(2, np.float32)
        for kernel, room in ((np.ones((3, 8)), 5), (np.ones((2, 2, 8)), 5), (np.ones((2, 99)), 99)):
            other = fb.long_conv_stream(kernel.astype(np.float32), max_length=room).init()
            with pytest.raises(ValueError, match=r"state must be of this stream.* \(1, 2, 32\).* of another one"):
                stream.step(other, u_t)
        with jax.enable_x64(True):
            other = fb.long_conv_stream(np.ones((2, 8)), max_length=5).init()
        with pytest.raises(ValueError, match=r"dtype float32; got shape .* dtype float64"):
            stream.step(other, u_t)
        with pytest.raises(ValueError, match=r"state must be that of `init`.*; got tuple"):
            stream.step((1, 2), u_t)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"method": "fast"}, "method must be of .*; got 'fast'"),
            ({"max_length": 0}, "max_length must be a positive integer or None; got 0"),
            ({"max_length": 2.0}, "max_length must be a positive integer or None; got 2.0"),
            ({"kernel": np.ones(3)}, r"kernel must have shape .*; got shape \(3,\)"),
            ({"kernel": np.ones((2, 0))}, r"K >= 1; got shape \(2, 0\)"),
            ({"kernel": np.ones((2, 3), int)}, "kernel must have a real floating-point dtype; got int"),
            ({"skip": np.ones(3)}, r"skip must have shape \(2,\), .*; got shape \(3,\)"),
        ],
    )
    def test_streams(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            fb.long_conv_stream(**{"kernel": np.ones((2, 8), np.float32)} | arguments)

    def test_sequences(self):
        stream = fb.long_conv_stream(np.ones((2, 8), np.float32))
        state = stream.init((3,))
        with pytest.raises(ValueError, match=r"u must have shape \(\*B, D, L\) with D = 2 .*; got shape \(3, 8\)"):
            stream.prefill(np.ones((3, 8), np.float32))
        with pytest.raises(ValueError, match=r"u_t must have shape \(3, 2\), .*; got shape \(2,\)"):
            stream.step(state, np.ones(2, np.float32))
        with jax.enable_x64(True):
            for take in (lambda u: stream.prefill(u[..., None]), lambda u: stream.step(state, u)):
                with pytest.raises(ValueError, match=r"no wider than float32, .*; got float64\. Make the stream from"):
                    take(np.ones((3, 2)))
