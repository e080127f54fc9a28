# SPDX-License-Identifier: Apache-2.0
"""The staircase: every implementation against masked dense products, and the counting sort that feeds it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pallas_kernels.ragged_prefix_mlp import (
    counting_sort,
    gpu,
    permute,
    ragged_prefix_mlp,
    ragged_prefix_projection,
    reference,
    specs,
    tpu,
    xla,
)
from tests.pallas_kernels import tpu_compiler

IMPLEMENTATIONS = ("xla", "interpret", "gpu_interpret")
# Odd numbers of rows and features; 4 units, so that blocks of 128 hidden numbers hold half a unit.
ROWS, WIDTH, UNITS, HIDDEN, OUTPUTS = 21, 9, 4, 1024, 7
COUNTS = st.lists(st.integers(0, ROWS), min_size=UNITS, max_size=UNITS).map(lambda c: sorted(c, reverse=True))


# Programs run a few times each.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def params(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = {"rows": (ROWS, WIDTH), "up": (WIDTH, HIDDEN), "bias": (HIDDEN,), "down": (HIDDEN, OUTPUTS)}
    scales = {"rows": 1.0, "up": WIDTH**-0.5, "bias": 0.5, "down": HIDDEN**-0.5}
    return {n: jnp.asarray(scales[n] * rng.normal(size=s).astype(np.float32), dtype) for n, s in shapes.items()}


@functools.cache
def moved():
    return np.random.default_rng(1).normal(size=(ROWS, OUTPUTS)).astype(np.float32)


@functools.cache
def runner(implementation, operation, activation="gelu_tanh"):
    """Values and all gradients of an operation, compiled once; the reference when the implementation is None."""

    def apply(rows, up, bias, down, counts):
        if operation == "projection":
            rows = jnp.tile(rows, (1, HIDDEN // WIDTH + 1))[:, :HIDDEN]
            arguments, options, name = (rows, counts, down), {}, "ragged_prefix_projection"
        else:
            arguments, options = (rows, counts, up, bias, down), {"activation": activation}
            name = "ragged_prefix_mlp"
        if implementation is None:
            return getattr(reference, name)(*arguments, **options)
        public = {"ragged_prefix_mlp": ragged_prefix_mlp, "ragged_prefix_projection": ragged_prefix_projection}
        return public[name](*arguments, **options, implementation=implementation)

    def run(counts, rows, up, bias, down):
        out, pull = jax.vjp(lambda *own: apply(*own, counts), rows, up, bias, down)
        return {
            "out": out,
            **dict(zip(("rows", "up", "bias", "down"), pull(jnp.asarray(moved(), out.dtype)), strict=True)),
        }

    return jax.jit(run, compiler_options=QUICK)


def run(implementation, operation, counts, dtype="float32", **changes):
    given_params = params(dtype) | changes
    activation = given_params.pop("activation", "gelu_tanh")
    return runner(implementation, operation, activation)(jnp.asarray(counts, jnp.int32), **given_params)


@pytest.mark.parametrize("operation", ["mlp", "projection"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestImplementation:
    """What every implementation must do."""

    @settings(max_examples=5, deadline=None)
    @given(counts=COUNTS)
    @example(counts=[0] * UNITS)
    @example(counts=[ROWS] * UNITS)
    @example(counts=[ROWS, 8, 0, 0])
    def test_equals_the_masked_dense_form_with_every_gradient(self, implementation, operation, counts):
        got, want = run(implementation, operation, counts), run(None, operation, counts)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(got["out"][counts[0] :], 0)
        np.testing.assert_array_equal(got["rows"][counts[0] :], 0)

    def test_rows_past_every_count_are_not_looked_at(self, implementation, operation):
        spoiled = params()["rows"].at[13:].set(jnp.nan)
        got, want = (run(implementation, operation, [13, 9, 9, 1], rows=rows) for rows in (spoiled, params()["rows"]))
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])

    def test_bfloat16_keeps_its_dtype_and_sums_in_float32(self, implementation, operation):
        counts = [ROWS, 17, 8, 0]
        got, want = run(implementation, operation, counts, "bfloat16"), run(None, operation, counts)
        for name in want:
            assert got[name].dtype == jnp.bfloat16
            np.testing.assert_allclose(got[name].astype(jnp.float32), want[name], rtol=2e-2, atol=6e-2, err_msg=name)

    def test_repeat_runs_are_equal(self, implementation, operation):
        first, second = (run(implementation, operation, [20, 11, 3, 3]) for _ in range(2))
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", [name for name in reference.ACTIVATIONS if name != "gelu_tanh"])
def test_every_activation_has_its_gradient(implementation, activation):
    got, want = (run(who, "mlp", [18, 12, 6, 2], activation=activation) for who in (implementation, None))
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_kernel_skips_tiles_and_crosses_them(monkeypatch):
    monkeypatch.setattr(tpu, "_ROWS", (8,))
    monkeypatch.setattr(tpu, "_HIDDEN", (128,))
    counts = jnp.array([21, 10, 8, 1])
    for operation in ("mlp", "projection"):
        got = runner.__wrapped__("interpret", operation)(counts, **params())
        want = run(None, operation, counts)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_gpu_kernel_skips_tiles_and_crosses_them(monkeypatch):
    monkeypatch.setattr(gpu, "_TILES", {4: gpu.Tiles(8, 128, 4, 1, 1)})
    counts = jnp.array([21, 10, 8, 1])
    for operation in ("mlp", "projection"):
        got = runner.__wrapped__("gpu_interpret", operation)(counts, **params())
        want = run(None, operation, counts)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_gpu_kernel_says_what_it_cannot_take():
    arrays = params()
    given_params = (arrays["rows"].astype(jnp.bfloat16), jnp.zeros(UNITS, jnp.int32))
    weights = [arrays[name] for name in ("up", "bias", "down")]
    with pytest.raises(NotImplementedError, match="all of float32, of bfloat16, or of float16; got bfloat16, float32"):
        ragged_prefix_mlp(*given_params, *weights, implementation="gpu")


def test_the_loops_have_tiles_of_both_sizes(monkeypatch):
    monkeypatch.setattr(xla, "_TILES", (8, 2))
    fresh = runner.__wrapped__("xla", "mlp")
    for counts in ([21, 12], [19, 19], [14, 0]):
        got, want = fresh(jnp.array(counts), **params()), run(None, "mlp", counts)
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5, err_msg=f"{counts} {name}")


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(0, 700), min_size=3, max_size=3), length=st.sampled_from((20, 32, 33, 700)))
@example(counts=[700, 129, 128], length=700)
def test_loops_cover_every_row_with_its_units_and_little_more(counts, length):
    counts = sorted((min(count, length) for count in counts), reverse=True)
    done = np.zeros(length, int)
    end = 0
    for units, tile, first, number in jax.tree.map(int, xla._runs(length, jnp.array(counts))):
        assert number == 0 or (first == end and end + number * tile <= length)
        done[first : first + number * tile] = units
        end += number * tile
    need = (np.arange(length)[:, None] < np.array(counts)).sum(axis=1)
    assert (done >= need).all()
    # Each unit does less than a small tile too much, besides the first rows, which it may do in vain.
    small = xla._TILES[-1]
    assert (done - need)[length % small or small :].sum() < small * len(counts)


def test_numpy_arrays_are_taken_outside_of_jit():
    own = {name: np.asarray(value) for name, value in params().items()}
    arguments = (own["rows"], jnp.array([20, 9]), own["up"], own["bias"], own["down"])
    got = ragged_prefix_mlp(*arguments, implementation="xla")
    want = reference.ragged_prefix_mlp(*map(jnp.asarray, arguments), activation="gelu_tanh")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_in_any_order_stay_where_they_are_and_are_added_to_a_base(implementation):
    need = jnp.asarray(np.random.default_rng(2).integers(0, 3, ROWS))
    order, inverse, counts = counting_sort(need, 2)
    own_params = params() | {"base": jnp.asarray(np.random.default_rng(3).normal(size=(ROWS, OUTPUTS)), jnp.float32)}

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(who, own):
        def total(own):
            rows = own["rows"] if who else own["rows"][order]
            arguments = (rows, counts, own["up"], own["bias"], own["down"])
            if who:
                options = {"places": (order, inverse), "base": own["base"], "implementation": who}
                out = ragged_prefix_mlp(*arguments, **options)
            else:
                out = own["base"] + reference.ragged_prefix_mlp(*arguments, activation="gelu_tanh")[inverse]
            return jnp.sum(out * moved()), out

        return jax.grad(total, has_aux=True)(own)

    got, want = gradients(implementation, own_params), gradients(None, own_params)
    for first, second in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-5)


def test_steps_without_work_are_the_last_of_their_tile():
    limits = jnp.repeat(jnp.array([21, 10, 8, 0]), 256)
    np.testing.assert_array_equal(tpu._live_blocks(limits, 8, 128, 21), [6, 4, 2])
    np.testing.assert_array_equal(tpu._live_tiles(limits, 8, 128), [3, 3, 2, 2, 1, 1, 0, 0])


# --- Sorting ------------------------------------------------------------------------------------------------------


@functools.cache
def sorter(units):
    return jax.jit(lambda need: counting_sort(need, units))


@settings(max_examples=40, deadline=None)
@given(need=hnp.arrays(np.int32, 13, elements=st.integers(-1, 5)), units=st.sampled_from((1, 4)))
@example(need=np.zeros(13, np.int32), units=4)
def test_counting_sort_is_a_stable_sort_by_falling_need(need, units):
    order, inverse, counts = sorter(units)(need)
    bounded = np.clip(need, 0, units)
    np.testing.assert_array_equal(order, np.argsort(-bounded, kind="stable"))
    np.testing.assert_array_equal(np.asarray(inverse)[order], np.arange(13))
    np.testing.assert_array_equal(counts, [(bounded > unit).sum() for unit in range(units)])
    assert order.dtype == inverse.dtype == counts.dtype == jnp.int32


def test_permuting_there_and_back_is_nothing_and_gradients_never_scatter():
    order, inverse, _ = counting_sort(jnp.array([0, 2, 1, 2, 0]), 2)
    rows = jnp.arange(10.0).reshape(5, 2)
    np.testing.assert_array_equal(permute(rows, order, inverse), rows[jnp.array([1, 3, 2, 0, 4])])
    np.testing.assert_array_equal(permute(permute(rows, order, inverse), inverse, order), rows)

    def gradient(moved):
        return jax.vjp(lambda x: permute(x, order, inverse), rows)[1](moved)[0]

    np.testing.assert_array_equal(gradient(rows), rows[inverse])
    assert "scatter" not in str(jax.make_jaxpr(gradient)(rows))


@pytest.mark.parametrize(
    ("need", "units", "message"),
    [
        (jnp.zeros((2, 3), jnp.int32), 4, r"integers \[R\] .*got int32 \(2, 3\), 4 units"),
        (jnp.zeros(3), 4, r"got float32 \(3,\)"),
        (jnp.zeros(3, jnp.int32), 0, r"at least one unit; .*0 units"),
    ],
)
def test_needs_that_cannot_be_sorted_are_refused(need, units, message):
    with pytest.raises(ValueError, match=message):
        counting_sort(need, units)


# --- Refusals -----------------------------------------------------------------------------------------------------


def shapes(rows=ROWS, width=WIDTH, hidden=HIDDEN, outputs=OUTPUTS, units=UNITS, kind=jnp.float32):
    drawn = [((rows, width), kind), ((units,), jnp.int32), ((width, hidden), kind), ((hidden,), kind)]
    return [jax.ShapeDtypeStruct(*shape) for shape in [*drawn, ((hidden, outputs), kind)]]


@pytest.mark.parametrize("implementation", ["tpu", "interpret"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 1100}, r"at most 512 or a multiple of 128; got 1100, the nearest is 1152"),
        ({"rows": 0}, r"at least one row; got \(0, 9\)"),
        ({"kind": jnp.float16}, r"all of float32 or all of bfloat16; got float16"),
        ({"rows": 2048, "width": 16384, "outputs": 16384}, r"MiB of on-chip memory, more than 13; use narrower rows"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(implementation, change, message):
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(ragged_prefix_mlp, implementation=implementation), *shapes(**change))


@pytest.mark.parametrize(
    ("position", "shape", "message"),
    [
        (0, (ROWS, WIDTH + 1), r"up must be \[D, U\] = \(10, 1024\)"),
        (1, (5,), r"K dividing the hidden width 1024; got int32 \(5,\)"),
        (3, (3,), r"bias \[U\]; got \(9, 1024\) and \(3,\)"),
        (4, (HIDDEN,), r"down \[U, E\]; got \(21, 9\) and \(1024,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(position, shape, message):
    arguments = shapes()
    arguments[position] = jax.ShapeDtypeStruct(shape, arguments[position].dtype)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(ragged_prefix_mlp, *arguments)
    with pytest.raises(ValueError, match=r"places must be two of \[R\] = \(21,\); got \[\(21,\), \(20,\)\]"):
        jax.eval_shape(lambda *own: ragged_prefix_mlp(*own, places=(jnp.zeros(21), jnp.zeros(20))), *shapes())
    with pytest.raises(ValueError, match=r"base must be \[R, E\] in float32; got float32 \(21, 6\)"):
        jax.eval_shape(lambda *own: ragged_prefix_mlp(*own, base=jnp.zeros((ROWS, OUTPUTS - 1))), *shapes())
    with pytest.raises(ValueError, match="activation='tanh' is not one of"):
        jax.eval_shape(functools.partial(ragged_prefix_mlp, activation="tanh"), *shapes())


@pytest.mark.parametrize("chip", tpu_compiler.CHIPS)
@pytest.mark.parametrize("name", specs.NAMED)
def test_it_compiles_for_every_tpu_with_its_gradients(chip, name):
    spec = specs.NAMED[name]
    arguments = shapes(spec.rows, spec.width, spec.hidden, spec.width, spec.units, spec.dtype)

    def both(rows, counts, up, bias, down):
        def loss(rows, up, bias, down):
            out = ragged_prefix_mlp(rows, counts, up, bias, down, implementation="tpu")
            return jnp.sum(ragged_prefix_projection(rows @ up, counts, down, implementation="tpu") + out)

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(rows, up, bias, down)

    # Forward, gradient of rows and gradient of weights of each operation.
    assert tpu_compiler.kernels(chip, both, *arguments) == 6
