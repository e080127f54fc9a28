# SPDX-License-Identifier: Apache-2.0
"""Adaptive Computation Modules in place of projections and feed-forward layers, and the map from dense parameters.

Shapes: B batch, N tokens, R rows, D features, E outputs, K learners, U hidden numbers of all learners.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from adaptive import registry
from adaptive.tokens import Signals, TokenSet
from adaptive.width import acm
from layers.parts import MLP, PROJECTIONS, Parts

# How learners run: drawn for training; the gate's choice with all learners computed, or really skipped; all; a fixed number.
MODES = ("sample", "masked", "skip", "all", "uniform")


class Gate(nn.Module):
    """Chooses learners: `[B, N, D] -> [B, N, K]` of 0 and 1, through linear layers with no nonlinearity between them.

    Attributes:
      learners: K; least: fewest of them, 0 or 1; hidden: widths of the inner layers.
      temperature: of the draw in training.

    Source: Wojcik et al. 2025; linear as in the public code.
    """

    learners: int
    least: int = 0
    hidden: tuple[int, ...] = (16, 16)
    temperature: float = 0.8
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the layers."""
        # No name may stand twice in one array.
        axes = [("embed", "gate"), *[("gate", "router")] * len(self.hidden)]
        widths = (*self.hidden, self.learners + 1 - self.least)
        if not self.hidden:
            axes = [("embed", "gate")]
        self.layers = [
            nn.Dense(
                width,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), axis),
                bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axis[1:]),
                name=f"layer_{index}",
            )
            for index, (width, axis) in enumerate(zip(widths, axes, strict=True))
        ]

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... C"]:
        """One for each choice, in float32."""
        for layer in self.layers:
            x = layer(x)
        return x.astype(jnp.float32)

    def __call__(self, x: Float[Array, "B N D"], *, sample: bool = False) -> Float[Array, "B N K"]:
        """The learners that run; drawn by the rng "dropout" with `sample`, else those of the largest logit."""
        signals = Signals(choice_logits=self.logits(x), rng=self.make_rng("dropout") if sample else None)
        return registry.get("acm")(TokenSet.create(x), signals, least=self.least, temperature=self.temperature)


class Learners(nn.Module):
    """K learners and their gate: `[B, N, D] -> [B, N, E]`.

    Attributes:
      outputs: E; width: hidden width of one learner; learners: K.
      least, gate_hidden, temperature: of the gate.
      activation: "gelu_tanh" for feed-forward layers, "identity" for projections.
      mode: one of `MODES`; number: of learners for every token with "uniform".
    """

    outputs: int
    width: int
    learners: int
    least: int = 0
    gate_hidden: tuple[int, ...] = (16, 16)
    temperature: float = 0.8
    activation: str = "gelu_tanh"
    mode: str = "skip"
    number: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N E"]:
        """What the chosen learners add up to."""
        up, bias, down = (leaf.astype(self.dtype) for leaf in self._weights(x.shape[-1]))
        gate = Gate(
            self.learners, self.least, self.gate_hidden, self.temperature, self.dtype, self.param_dtype, name="gate"
        )
        # The gate has its parameters in every mode.
        if self.is_initializing():
            gate(x)
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        if self.mode in ("all", "uniform"):
            used = self.width * (self.learners if self.mode == "all" else self.number)
            out = acm.ACTIVATIONS[self.activation](rows @ up[:, :used] + bias[:used]) @ down[:used]
            return out.reshape(*x.shape[:-1], self.outputs)
        chosen = gate(x, sample=self.mode == "sample").reshape(-1, self.learners)
        if self.mode == "skip":
            options = {"least": self.least, "implementation": self.implementation}
            out = acm.skipping(rows, chosen, up, bias, down, activation=self.activation, **options)
        else:
            out = acm.masked(rows, chosen, up, bias, down, activation=self.activation)
        return out.reshape(*x.shape[:-1], self.outputs)

    def _weights(self, inputs: int) -> tuple[Array, Array, Array]:
        hidden = self.width * self.learners
        shapes = {"up": (inputs, hidden), "bias": (hidden,), "down": (hidden, self.outputs)}
        # Names of axes as in the dense layers, so that all are placed alike.
        axes = {"up": ("embed", "mlp"), "bias": ("mlp",), "down": ("mlp", "embed")}
        fan_in = {"up": inputs, "bias": inputs, "down": self.width}
        return tuple(
            self.param(
                name, nn.with_logical_partitioning(_uniform(fan_in[name]), axes[name]), shapes[name], self.param_dtype
            )
            for name in shapes
        )


def _uniform(fan_in: int) -> Any:
    """Kaiming-uniform with a = sqrt 5: within 1 / sqrt(fan_in)."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        bound = 1 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class AcmMlp(nn.Module):
    """Learners with the face of `layers.mlp.Mlp`; `total` hidden numbers in all of them."""

    total: int
    settings: AcmParts
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], *, deterministic: bool = True) -> Float[Array, "B N D"]:
        """The layer; learners have no dropout."""
        del deterministic
        width = acm.mlp_width(self.total, self.settings.learners)
        options = self.settings.options() | {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Learners(x.shape[-1], width, activation="gelu_tanh", name="learners", **options)(x)


class AcmProjection(nn.Module):
    """Learners with the face of `layers.linear.Linear`: at least one runs, as there is no residual around them."""

    axes: tuple[str, ...]
    settings: AcmParts
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, features: tuple[int, ...]) -> Array:
        """`x [B, N, *inputs]` to `[B, N, *features]`."""
        contracted = len(self.axes) - len(features)
        x = x.reshape(*x.shape[: x.ndim - contracted], -1)
        outputs = math.prod(features)
        width = acm.projection_width(x.shape[-1], outputs, self.settings.learners)
        options = self.settings.options() | {"dtype": self.dtype, "param_dtype": self.param_dtype, "least": 1}
        options["number"] = max(options["number"], 1)
        out = Learners(outputs, width, activation="identity", name="learners", **options)(x)
        return out.reshape(*x.shape[:-1], *features)


@dataclasses.dataclass(frozen=True)
class AcmParts(Parts):
    """Projections and feed-forward layers as learners.

    Attributes:
      learners: K of each module; gate_hidden, temperature: of the gates.
      mode, number: see `MODES` and `Learners`.
      projections: whether projections become learners, or stay dense (speech models of the paper).
      implementation: of the staircase kernel.

    Raises:
      ValueError: an unknown mode, or a number of learners outside 0..K.

    Differs: learners use the tanh form of GELU. A gated feed-forward layer becomes learners of three halves of its hidden
      width, which cost as much; the paper has no gated layers.
    """

    learners: int = 4
    gate_hidden: tuple[int, ...] = (16, 16)
    temperature: float = 0.8
    mode: str = "skip"
    number: int = 0
    projections: bool = True
    implementation: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is not one of {MODES}")
        if not 0 <= self.number <= self.learners:
            raise ValueError(f"number must lie in 0..{self.learners} (the learners); got {self.number}")

    def options(self) -> dict[str, Any]:
        """Attributes of `Learners`."""
        names = ("learners", "gate_hidden", "temperature", "mode", "number", "implementation")
        return {name: getattr(self, name) for name in names}

    def projection(self, axes: tuple[str, ...], **options: Any) -> nn.Module:
        """Learners in place of a projection; its initialisers and bias are theirs."""
        if not self.projections:
            return super().projection(axes, **options)
        return AcmProjection(axes, self, **_kept(options))

    def mlp(self, hidden: int, **options: Any) -> nn.Module:
        """Learners in place of a feed-forward layer."""
        return AcmMlp(hidden, self, **_kept(options))

    def gated_mlp(self, hidden: int, **options: Any) -> nn.Module:
        """Learners in place of a gated one, of equal cost."""
        return AcmMlp(ungated(hidden), self, **_kept(options))


def _kept(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("dtype", "param_dtype", "name") if name in options}


def ungated(hidden: int) -> int:
    """Hidden width of two matrices that cost what three of `hidden` cost.

    Raises:
      ValueError: an odd width.
    """
    if hidden % 2:
        raise ValueError(f"a gated layer of odd hidden width {hidden} has no ungated one of equal cost")
    return 3 * hidden // 2


# --- From dense parameters ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Module:
    """A module that became learners.

    Attributes:
      path: of the dense module, as "block_0/mlp"; activation, least: of its learners.
      inputs, outputs, width: D, E, hidden width of a learner.
      dense: MACs of the dense module for one token.
      gate: those of the gate.
    """

    path: str
    activation: str
    least: int
    inputs: int
    outputs: int
    width: int
    dense: int
    gate: int

    @property
    def learner(self) -> int:
        """MACs of one learner for one token."""
        return (self.inputs + self.outputs) * self.width


def modules(params: Mapping[str, Any], parts: AcmParts, *, where: str = ".*") -> tuple[Module, ...]:
    """The modules of a dense model that `parts` replaces, in the order of the layers.

    Args:
      params: of the dense model: arrays, shapes or boxed leaves.
      where: a pattern that the path of a module has to match, such as "encoder_.*".

    Raises:
      ValueError: nothing matches, or the learners do not divide a width.
    """
    shapes = {path: leaf.shape for path, leaf in flatten_dict(meta.unbox(params)).items()}
    found = []
    for path in shapes:
        name, parent = "/".join(path[:-1]), path[:-2]
        if path[-1] != "kernel" or not re.fullmatch(where, name):
            continue
        if path[-2] in PROJECTIONS and (*parent, "query", "kernel") in shapes and parts.projections:
            found.append(_projection(name, shapes[path], parts))
    for parent in dict.fromkeys(path[:-2] for path in shapes if len(path) > 2 and path[-3] == MLP):
        name = "/".join(parent)
        if re.fullmatch(where, name):
            found.append(_mlp(name, {key: shapes.get((*parent, key, "kernel")) for key in ("hidden", "gate")}, parts))
    if not found:
        raise ValueError(
            f"no projection and no feed-forward layer matches {where!r}; is this the tree of a dense model?"
        )
    return tuple(sorted(found, key=lambda module: _natural(module.path)))


def _natural(path: str) -> list[Any]:
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", path)]


def _projection(path: str, shape: tuple[int, ...], parts: AcmParts) -> Module:
    # The output projection contracts heads and head width, the others the width of the stream.
    contracted = 2 if path.endswith("/out") else 1
    inputs, outputs = math.prod(shape[:contracted]), math.prod(shape[contracted:])
    width = acm.projection_width(inputs, outputs, parts.learners)
    gate = _gate_macs(inputs, parts, least=1)
    return Module(path, "identity", 1, inputs, outputs, width, inputs * outputs, gate)


def _mlp(path: str, shapes: Mapping[str, Any], parts: AcmParts) -> Module:
    inputs, hidden = shapes["hidden"]
    dense = (2 if shapes["gate"] is None else 3) * inputs * hidden
    total = hidden if shapes["gate"] is None else ungated(hidden)
    width = acm.mlp_width(total, parts.learners)
    return Module(path, "gelu_tanh", 0, inputs, inputs, width, dense, _gate_macs(inputs, parts, least=0))


def _gate_macs(inputs: int, parts: AcmParts, *, least: int) -> int:
    widths = (inputs, *parts.gate_hidden, parts.learners + 1 - least)
    return sum(a * b for a, b in itertools.pairwise(widths))


STARTS = ("random", "dense")


def acmize(
    params: Mapping[str, Any], parts: AcmParts, key: Array, *, where: str = ".*", start: str = "random"
) -> dict[str, Any]:
    """The parameters of a dense model with learners and gates in place of its projections and feed-forward layers.

    What is replaced learns from the dense modules by distillation; the rest is kept. The result fits
    `model.clone(parts=parts)`.

    Args:
      params: arrays of a ViT, a T5 or a decoder LM with unrolled layers.
      parts: see `AcmParts`; key: for the new parameters.
      where: a pattern for the paths of modules; "encoder_.*" for a T5.
      start: "random" draws all learners; "dense" cuts them from the dense module: its neurons, the heaviest first, and the
        singular vectors of its projections, so that every prefix is near the best of its width before any training.

    Raises:
      ValueError: nothing matches, the learners do not divide a width, or an unknown start.

    Source: Wojcik et al. 2025 ("ACMization").

    Differs: the paper draws all learners; start="dense" is ours, for short distillations.
    """
    if start not in STARTS:
        raise ValueError(f"start={start!r} is not one of {STARTS}")
    found = modules(params, parts, where=where)
    flat = flatten_dict(dict(params))
    paths = {tuple(module.path.split("/")) for module in found}
    kept = {path: leaf for path, leaf in flat.items() if not any(path[: len(p)] == p for p in paths)}
    for module, own in zip(found, jax.random.split(key, len(found)), strict=True):
        path = (*module.path.split("/"), "learners")
        fresh = meta.unbox(_learners(module, parts).init(own, jnp.zeros((1, 1, module.inputs))))["params"]
        if start == "dense":
            fresh = {**fresh, **_from_dense(flat, module, parts.learners)}
        kept |= {(*path, *name): leaf for name, leaf in flatten_dict(fresh).items()}
    return unflatten_dict(kept)


def _from_dense(flat: Mapping[tuple[str, ...], Array], module: Module, learners: int) -> dict[str, Array]:
    """Weights of learners cut from a dense module; none from a gated one, which has no single hidden layer."""
    path = tuple(module.path.split("/"))
    if module.activation == "identity":
        return _low_rank(flat[*path, "kernel"], flat.get((*path, "bias")), module, learners)
    if (*path, "gate", "kernel") in flat:
        return {}
    up, down = flat[*path, "hidden", "kernel"], flat[*path, "out", "kernel"]
    bias = flat.get((*path, "hidden", "bias"), jnp.zeros(up.shape[1], up.dtype))
    order = jnp.argsort(-jnp.linalg.norm(up, axis=0) * jnp.linalg.norm(down, axis=1))
    return {"up": up[:, order], "bias": bias[order], "down": down[order]}


def _low_rank(kernel: Array, bias: Array | None, module: Module, learners: int) -> dict[str, Array]:
    """The largest singular values first; the bias as what hidden biases can give of it."""
    rank = module.width * learners
    left, values, right = jnp.linalg.svd(kernel.reshape(module.inputs, module.outputs), full_matrices=False)
    root = jnp.sqrt(jnp.pad(values, (0, max(rank - len(values), 0)))[:rank])
    left = jnp.pad(left, ((0, 0), (0, max(rank - left.shape[1], 0))))[:, :rank]
    right = jnp.pad(right, ((0, max(rank - right.shape[0], 0)), (0, 0)))[:rank]
    down = root[:, None] * right
    inner = jnp.zeros(rank, kernel.dtype) if bias is None else bias.reshape(-1) @ jnp.linalg.pinv(down)
    return {"up": left * root, "bias": inner, "down": down}


def _learners(module: Module, parts: AcmParts) -> Learners:
    options = {**parts.options(), "mode": "masked", "least": module.least}
    return Learners(module.outputs, module.width, activation=module.activation, **options)


def weights(params: Mapping[str, Any], module: Module) -> tuple[Array, Array, Array]:
    """`(up, bias, down)` of a module's learners in the parameters of the whole model."""
    found = learners_of(params, module)
    return found["up"], found["bias"], found["down"]


def gate_logits(params: Mapping[str, Any], module: Module, parts: AcmParts, x: Float[Array, "R D"]) -> Array:
    """The logits of a module's gate for the rows `x`, from the parameters of the whole model."""
    gate = Gate(parts.learners, module.least, parts.gate_hidden, parts.temperature)
    return gate.apply({"params": learners_of(params, module)["gate"]}, x, method="logits")


def learners_of(params: Mapping[str, Any], module: Module) -> Mapping[str, Any]:
    """The subtree of a module's learners."""
    for name in (*module.path.split("/"), "learners"):
        params = params[name]
    return params
