# SPDX-License-Identifier: Apache-2.0
"""The sharding table, and eight fake devices against one: same losses, parameters really split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import optim, parallel
from experiments.config import base_config

REPO = Path(__file__).resolve().parents[2]


def mesh_of(data: int, fsdp: int):
    """A mesh for placing shapes; it needs no devices."""
    return AbstractMesh((data, fsdp), parallel.AXES, axis_types=(AxisType.Auto,) * 2)


def boxed(shape, names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def spec(shape, names, preset="fsdp", devices=8):
    mesh = mesh_of(1, devices) if preset == "fsdp" else mesh_of(devices, 1)
    return parallel.param_shardings(mesh, preset, {"w": boxed(shape, names)})["w"].spec


@pytest.mark.parametrize(
    ("shape", "names", "want"),
    [
        ((32, 64), ("embed", "mlp"), P("fsdp", None)),
        ((64, 32), ("mlp", "embed"), P(None, "fsdp")),
        ((12, 64), ("embed", "mlp"), P(None, "fsdp")),  # 12 does not divide by 8, the next rule does
        ((12, 10), ("embed", "mlp"), P(None, None)),
        ((256, 32), ("vocab", "embed"), P(None, "fsdp")),
        ((3, 32, 64), ("layers", "embed", "mlp"), P(None, "fsdp", None)),
        ((8, 32), ("layers", "norm"), P(None, None)),
        ((32,), ("embed",), P(None)),  # vectors stay whole
        ((8, 64), ("layers", "mlp"), P(None, None)),  # so do stacked ones
        ((32, 4, 8), ("embed", "heads", "head_dim"), P("fsdp", None, None)),
        ((32, 32), ("embed", "embed"), P("fsdp", None)),  # a mesh axis is used once
        ((32, 8), (None, "gate"), P(None, None)),
    ],
)
def test_fsdp_splits_one_axis_by_the_table(shape, names, want):
    assert spec(shape, names) == want


@pytest.mark.parametrize("preset", ["dp", "none"])
def test_dp_splits_no_parameter(preset):
    assert spec((32, 64), ("embed", "mlp"), preset) == P(None, None)


def test_every_logical_name_of_the_layers_has_a_row():
    names = ("embed", "mlp", "heads", "head_dim", "qkv", "vocab", "patch", "position", "classes", "norm", "gate")
    assert {*names, "layers", "buckets"} <= set(parallel.LOGICAL_NAMES)
    assert len(set(parallel.LOGICAL_NAMES)) == len(parallel.RULES)
    assert {axis for row in parallel.RULES for axis in row[1:]} <= {None, *parallel.AXES}


@pytest.mark.parametrize("preset", ["dp", "fsdp"])
def test_an_unknown_logical_name_is_refused_under_every_preset(preset):
    with pytest.raises(ValueError, match=r"\['w'\] has logical axis 'embd'.*Known names: embed"):
        spec((32, 64), ("embd", "mlp"), preset)


def test_a_wrong_number_of_names_is_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 32, 64\) but axis names"):
        spec((4, 32, 64), ("embed", "mlp"))


@pytest.mark.parametrize(("shape", "names"), [((1030, 1030), ("embed", "mlp")), ((1024, 1032), (None, "gate"))])
def test_a_large_parameter_that_fsdp_cannot_split_is_refused(shape, names):
    with pytest.raises(ValueError, match=r"preset 'fsdp'\. Name its axes, make one divisible"):
        spec(shape, names)
    assert spec(shape, names, "dp") == P(None, None)
    assert spec(shape, names, "fsdp", devices=1) is not None  # one device holds everything anyway


def test_a_large_parameter_without_names_is_refused_too():
    with pytest.raises(ValueError, match="no axis of it can"):
        parallel.param_shardings(mesh_of(1, 8), "fsdp", {"w": jax.ShapeDtypeStruct((2048, 1024), jnp.float32)})


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_optimiser_state_inherits_the_shardings_of_the_parameters(name):
    variables = {
        "block": {"kernel": boxed((256, 512), ("embed", "mlp")), "bias": boxed((512,), ("mlp",))},
        "head": {"kernel": boxed((256, 16), ("embed", "classes"))},
    }
    mesh = mesh_of(1, 8)
    shardings = parallel.param_shardings(mesh, "fsdp", variables)
    params = nn.unbox(variables)
    config = base_config().optimizer
    config.update(name=name, weight_decay=0.1)
    state = {"opt": jax.eval_shape(optim.build(config, 10).init, params), "ema": params}
    placed = parallel.inherit_shardings(mesh, state, params, shardings)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    assert placed["ema"] == shardings
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        split = leaf.shape in ((256, 512), (256, 16))
        assert sharding.spec == (P("fsdp", None) if split else P(*sharding.spec)), leaf.shape
        assert split or not any(sharding.spec)
    moments = {"adamw": 2, "sgd": 1, "adafactor": 0}[name]  # adafactor keeps factors of large moments
    full = [x for x in jax.tree.leaves(state["opt"]) if x.shape == (256, 512)]
    assert len(full) == moments


def test_meshes_and_presets():
    devices = jax.devices()
    assert dict(parallel.make_mesh("dp").shape) == {"data": len(devices), "fsdp": 1}
    assert dict(parallel.make_mesh("fsdp").shape) == {"data": 1, "fsdp": len(devices)}
    assert parallel.make_mesh("none").size == 1
    assert set(parallel.make_mesh("dp").axis_types) == {AxisType.Auto}
    with pytest.raises(ValueError, match="known presets: none, dp, fsdp"):
        parallel.make_mesh("tp")


def test_batch_sizes_that_do_not_divide_are_refused_with_near_ones():
    parallel.check_batch_size(mesh_of(8, 1), 32, 4)
    with pytest.raises(ValueError, match=r"batch_size=20 .* 8 devices x accumulate=2 = 16.*: 16, 32"):
        parallel.check_batch_size(mesh_of(8, 1), 20, 2)


def test_shard_batch_keeps_values_and_refuses_what_devices_cannot_hold():
    mesh = parallel.make_mesh("none")
    batch = {"x": np.arange(6.0, dtype=np.float32).reshape(3, 2), "n": np.arange(3, dtype=np.int32)}
    placed = parallel.shard_batch(mesh, batch)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), placed, batch)
    assert placed["x"].sharding.is_equivalent_to(NamedSharding(mesh, P(parallel.AXES)), 2)
    with pytest.raises(ValueError, match=r"\['s'\] has dtype <U1"):
        parallel.shard_batch(mesh, {"s": np.array(["a"])})
    with pytest.raises(ValueError, match=r"\['s'\] has shape \(\)"):
        parallel.shard_batch(mesh, {"s": np.float32(1.0)})


HLO = """
  %all-reduce.7 = f32[128,64]{1,0} all-reduce(f32[128,64]{1,0} %dot.1), channel_id=1, to_apply=%add
  ROOT %ar = (f32[8]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), channel_id=2, metadata={op_name="x all-gather("}
  %all-gather-start.1 = (f32[16,8]{1,0:T(8,128)}, f32[128,8]{1,0:T(8,128)}) all-gather-start(%p), dimensions={0}
  %all-gather-done.1 = f32[128,8]{1,0:T(8,128)} all-gather-done(%all-gather-start.1)
  %cp = (s32[4]{0}, s32[4]{0}, u32[], u32[]) collective-permute-start(s32[4]{0} %q), source_target_pairs={{0,1}}
  %rs = f32[2]{0} reduce-scatter(f32[16]{0} %all-reduce.7), dimensions={0}
  %fusion = f32[9]{0} fusion(%all-reduce.7), kind=kLoop, calls=%c
  %scalar = pred[] all-reduce(pred[] %k), to_apply=%and
"""


def test_collectives_are_read_from_hlo_text():
    assert parallel.collectives(HLO) == [
        ("all-reduce", "f32", (128, 64), 32768),
        ("all-reduce", "f32", (8,), 32),
        ("all-reduce", "bf16", (2, 3), 12),
        ("all-gather", "f32", (128, 8), 4096),
        ("collective-permute", "s32", (4,), 16),
        ("reduce-scatter", "f32", (2,), 8),
        ("all-reduce", "pred", (), 1),
    ]


# ---- Eight fake devices, in one process of their own -----------------------------------------------------------------

EIGHT = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from experiments import parallel, train
from tests.experiments.toy import ToyData, ToyTask, config

assert jax.device_count() == 8
report = {}
runs = {"none": {}, "dp": {}, "fsdp": {}, "dp_accumulated": {"accumulate": 2}}
for name, extra in runs.items():
    preset = name.split("_")[0]
    settings = config(parallel__preset=preset, steps=12, **extra)
    data = ToyData(settings.batch_size)
    program = train.build_program(settings, ToyTask(noise=0.0), data.spec)
    compiled = program.lower().compile()
    state, healthy = program.create(None), jax.device_put(True, program.healthy.sharding)
    put = jax.tree.map(lambda x: x.sharding.spec, (state.params, state.opt_state, state.ema))
    iterator, losses = data.train_iterator(), []
    for _ in range(settings.steps):
        state, healthy, out = compiled(state, parallel.shard_batch(program.mesh, next(iterator)), healthy)
        losses.append(float(out["loss"]))
    kernels = {
        "params": state.params["Dense_1"]["kernel"],
        "ema": state.ema["Dense_1"]["kernel"],
        "moment": next(x for x in jax.tree.leaves(state.opt_state) if x.shape == (32, 64)),
    }
    report[name] = {
        "losses": losses,
        "specs_kept": jax.tree.map(lambda x: x.sharding.spec, (state.params, state.opt_state, state.ema)) == put,
        "shards": {k: [list(x.addressable_shards[0].data.shape), len(x.sharding.device_set)] for k, x in kernels.items()},
        "collectives": [list(c) for c in parallel.collectives(compiled)],
        "eval": train.evaluate(program, state.params, state.extra, data.eval_batches()),
    }
print("REPORT" + json.dumps(report))
"""


@pytest.fixture(scope="module")
def eight():
    options = {"cwd": REPO, "env": os.environ | {"JAX_PLATFORMS": "cpu"}, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", EIGHT], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("REPORT")[1])


@pytest.mark.parametrize("name", ["dp", "fsdp", "dp_accumulated"])
def test_eight_devices_give_the_losses_of_one(eight, name):
    one, many = eight["none"], eight[name]
    assert np.mean(one["losses"][-4:]) < np.mean(one["losses"][:4])
    np.testing.assert_allclose(many["losses"], one["losses"], atol=1e-5, rtol=0)
    assert many["eval"] == pytest.approx(one["eval"], abs=1e-5)


def test_under_fsdp_parameters_moments_and_average_are_really_split(eight):
    for kernel in ("params", "ema", "moment"):
        assert eight["fsdp"]["shards"][kernel] == [[4, 64], 8]
        assert eight["dp"]["shards"][kernel] == [[32, 64], 8]
        assert eight["none"]["shards"][kernel] == [[32, 64], 1]
    assert all(eight[name]["specs_kept"] for name in eight)


def test_collectives_are_those_of_the_preset(eight):
    kinds = {name: {c[0] for c in eight[name]["collectives"]} for name in eight}
    assert kinds["none"] == set()
    assert kinds["dp"] == {"all-reduce"}
    assert "all-gather" in kinds["fsdp"]
    # Microbatches are rows that each device already has: accumulating sends nothing but sums.
    assert kinds["dp_accumulated"] == {"all-reduce"}
    gradients = sum(c[3] for c in eight["dp"]["collectives"])
    parameters = 4 * (16 * 32 + 32 + 32 + 32 * 64 + 64 + 64 * 4 + 4)
    assert parameters <= gradients <= parameters + 256
