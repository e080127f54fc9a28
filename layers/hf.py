# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoints, a directory of `config.json` and safetensors: to a module with its variables, and back.

    module, variables, config = hf.load("byt5-small")
    logits, aux = module.apply(variables, input_ids, attention_mask, decoder_input_ids)
    hf.save("byt5-small-mine", module, variables, config)

    module, variables, config = hf.load("mrt5-small", rungs=(256, 512, 1024))
    logits, aux = module.apply(variables, input_ids, attention_mask, decoder_input_ids, deletion="hard")
    aux["delete_gate"]  # [B, N]

    module, variables, config = hf.load("qwen2-0.5b")
    logits, aux = module.apply(variables, input_ids, attention_mask)

A family of models is a module beside this one that knows its names and settings and touches no file:

- `MODULE`, `MODEL_TYPES`, `ARCHITECTURES`: the Linen class, and what `model_type` and `architectures` in config.json may say;
- `build(config, **overrides)`: the Linen module; `describe(module, config)`: the inverse, a config.json;
- `leaves(module, config, tensors)`: where each parameter lies (`layers.hf_leaf.Leaf`); `aliases(module)`: tensors that may
  repeat another; `skipped(module, config, name)`: tensors to leave out; `init(module, key)`: boxed variables.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from layers import hf_llama, hf_t5
from layers.hf_leaf import Leaf

FAMILIES = (hf_t5, hf_llama)
# safetensors' names of the dtypes that a parameter may be stored in, and the names in config.json.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SHARD_BYTES = 2 * 10**9
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHOWN = 8


def load(
    directory: str | os.PathLike[str], *, dtype: Any = jnp.float32, **overrides: Any
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """`(module, variables, config)` of a checkpoint; `config` is what config.json says.

    Tensors are read one at a time into their places, so that memory holds the model once.

    Args:
      directory: with config.json, and model.safetensors or model.safetensors.index.json with its shards.
      dtype: of the parameters and of the computation; `module.clone(dtype=...)` changes the latter alone.
      overrides: attributes of the module in place of what config.json says. Parameters that only an override brings (the gate
        of `gate="mrt5"` on a ByT5) start from their initialisers; `decoder_layers=0` leaves the decoder out.

    Raises:
      ValueError: no checkpoint there, an unknown kind of model, a setting that the module cannot express, or tensors that do
        not fit config.json: missing, too many, or of another shape or dtype, each named with what was found and expected.
    """
    directory = pathlib.Path(directory)
    config = _read_config(directory)
    family = _family(config)
    module = family.build(config, **{"dtype": jnp.dtype(dtype), **overrides})
    shapes = _shapes(family, module)
    with contextlib.ExitStack() as stack:
        tensors = _Tensors(directory, stack)
        tensors.drop_repeated(family.aliases(module))
        places = family.leaves(module, config, tensors.names)
        expected = {name: leaf.tensor_shape(shapes[leaf.path]) for leaf in places for name in leaf.tensors}
        extra = {name for name in tensors.names - set(expected) if not family.skipped(module, config, name)}
        tensors.check(expected, extra)
        params = {
            leaf.path: jnp.asarray(leaf.parameter(map(tensors.read, leaf.tensors), shapes[leaf.path], dtype))
            for leaf in places
        }
    params |= _initial(family, module, sorted(set(shapes) - set(params)), dtype)
    return module, {"params": unflatten_dict(params, sep="/")}, config


def module_class(directory: str | os.PathLike[str]) -> type[nn.Module]:
    """The Linen class that `load` makes of a checkpoint; reads config.json alone.

    Raises:
      ValueError: no checkpoint there, or an unknown kind of model.
    """
    return _family(_read_config(pathlib.Path(directory))).MODULE


def save(
    directory: str | os.PathLike[str],
    module: nn.Module,
    variables: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes a checkpoint that `load` and the transformers library read; returns its config.json.

    Parameters keep their dtype. config.json says what the module is; the rest, such as token ids, comes from `config`.

    Args:
      directory: made if need be; it must not hold a checkpoint yet.
      module, variables: as from `load`, or from training; boxed or not.
      config: as from `load`; None for a model that never was a checkpoint.
      shard_bytes: tensors beyond it go to another file. Memory holds one such file beside the model.

    Raises:
      ValueError: a checkpoint is there, the module has no such form, or the variables do not fit it.
    """
    directory = pathlib.Path(directory)
    if found := [name for name in ("config.json", _SINGLE, _INDEX) if (directory / name).exists()]:
        raise ValueError(f"{directory} already holds {', '.join(found)}; remove the checkpoint or choose another place")
    family = _family_of(module)
    described = family.describe(module, config or {})
    places = family.leaves(module, described)
    params = flatten_dict(nn.unbox(variables["params"]), sep="/")
    _check_params(params, _shapes(family, module), places)
    dtype = _common_dtype(params)
    described["torch_dtype" if "torch_dtype" in described else "dtype"] = dtype
    directory.mkdir(parents=True, exist_ok=True)
    _write_tensors(directory, places, params, shard_bytes)
    # Last, so that an interrupted save is no checkpoint.
    (directory / "config.json").write_text(_json(described))
    return described


def leaves(module: nn.Module, config: Mapping[str, Any]) -> list[Leaf]:
    """Where each parameter of a module lies in a checkpoint with this config; new ones have no place.

    Raises:
      ValueError: the module has no Hugging Face form.
    """
    return _family_of(module).leaves(module, config)


def abstract_params(module: nn.Module) -> dict[str, Any]:
    """The tree of parameters, as `jax.ShapeDtypeStruct`; allocates nothing.

    Raises:
      ValueError: the module has no Hugging Face form.
    """
    family = _family_of(module)
    return unflatten_dict(jax.eval_shape(lambda: _initialised(family, module)), sep="/")


# ---- Which family ----------------------------------------------------------------------------------------------------


def _read_config(directory: pathlib.Path) -> dict[str, Any]:
    """What config.json says, with `model_type` told from the architecture where it is not said."""
    path = directory / "config.json"
    if not path.exists():
        raise ValueError(f"{directory} has no config.json, so it is no Hugging Face checkpoint")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; it must be an object")
    if not config.get("model_type"):
        types = {name: kind for family in FAMILIES for name, kind in family.ARCHITECTURES.items()}
        config["model_type"] = next((types[name] for name in config.get("architectures") or () if name in types), None)
    return config


def _family(config: Mapping[str, Any]) -> Any:
    kind, architectures = config["model_type"], config.get("architectures") or ()
    family = next((family for family in FAMILIES if kind in family.MODEL_TYPES), None)
    if family is None:
        known = ", ".join(kind for family in FAMILIES for kind in family.MODEL_TYPES)
        raise ValueError(f"config.json has model_type {kind!r} (architectures {list(architectures)}); known: {known}")
    if architectures and not set(architectures) & set(family.ARCHITECTURES):
        raise ValueError(
            f"config.json has architectures {list(architectures)}; known: {', '.join(family.ARCHITECTURES)}"
        )
    return family


def _family_of(module: nn.Module) -> Any:
    family = next((family for family in FAMILIES if isinstance(module, family.MODULE)), None)
    if family is None:
        known = ", ".join(family.MODULE.__name__ for family in FAMILIES)
        raise ValueError(f"a {type(module).__name__} has no Hugging Face form; those with one: {known}")
    return family


def _initialised(family: Any, module: nn.Module) -> dict[str, Any]:
    return flatten_dict(nn.unbox(family.init(module, jax.random.key(0)))["params"], sep="/")


def _shapes(family: Any, module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter by its path; allocates nothing."""
    return {path: leaf.shape for path, leaf in jax.eval_shape(lambda: _initialised(family, module)).items()}


def _initial(family: Any, module: nn.Module, paths: list[str], dtype: Any) -> dict[str, Any]:
    """First values of some parameters; under jit the others are never made."""
    if not paths:
        return {}

    def pick() -> dict[str, Any]:
        values = _initialised(family, module)
        return {path: values[path].astype(dtype) for path in paths}

    return jax.jit(pick)()


# ---- Reading ---------------------------------------------------------------------------------------------------------


class _Tensors:
    """The tensors of a directory, of one file or of many, read when asked for."""

    def __init__(self, directory: pathlib.Path, stack: contextlib.ExitStack):
        self._directory = directory
        self._place = {name: (file, name) for file, names in _files(directory, stack) for name in names}

    @property
    def names(self) -> set[str]:
        return set(self._place)

    def read(self, name: str) -> np.ndarray:
        file, stored = self._place[name]
        return file.get_tensor(stored)

    def _head(self, name: str) -> tuple[list[int], str]:
        """Shape and dtype, without the data."""
        file, stored = self._place[name]
        part = file.get_slice(stored)
        return list(part.get_shape()), part.get_dtype()

    def drop_repeated(self, aliases: Mapping[str, str]) -> None:
        """Takes away each alias that repeats its original, or puts it in the place of one that is not there."""
        for alias, original in aliases.items():
            if alias not in self._place:
                continue
            if original in self._place and not np.array_equal(self.read(alias), self.read(original)):
                raise ValueError(
                    f"{alias} {self._head(alias)[0]} in {self._directory} differs from {original} "
                    f"{self._head(original)[0]}, which it must repeat by config.json; of an output head that stands for "
                    "itself, config.json says tie_word_embeddings false"
                )
            self._place.setdefault(original, self._place[alias])
            del self._place[alias]

    def check(self, expected: Mapping[str, tuple[int, ...]], extra: set[str]) -> None:
        """Raises ValueError that names each tensor which is missing, too many, or of another shape or dtype."""
        wrong = []
        for name, shape in expected.items():
            if name not in self._place:
                wrong.append(f"{name}: missing, expected {list(shape)}")
                continue
            found, dtype = self._head(name)
            if found != list(shape):
                wrong.append(f"{name}: found {found}, expected {list(shape)}")
            if dtype not in DTYPES:
                wrong.append(f"{name}: dtype {dtype}, expected {' or '.join(DTYPES)}")
        wrong += [f"{name}: unexpected, found {self._head(name)[0]}" for name in sorted(extra)]
        if not wrong:
            return
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise ValueError("\n  ".join([f"tensors in {self._directory} do not fit config.json:", *wrong[:_SHOWN], *more]))


def _files(directory: pathlib.Path, stack: contextlib.ExitStack) -> list[tuple[Any, list[str]]]:
    """Each open file with the names of its tensors."""
    if (directory / _SINGLE).exists():
        file = _open(directory / _SINGLE, stack)
        return [(file, list(file.keys()))]
    if not (directory / _INDEX).exists():
        raise ValueError(_no_tensors(directory))
    places = json.loads((directory / _INDEX).read_text()).get("weight_map", {})
    files = {shard: _open(directory / shard, stack) for shard in sorted(set(places.values()))}
    held = {shard: set(file.keys()) for shard, file in files.items()}
    for name, shard in places.items():
        if name not in held[shard]:
            raise ValueError(f"{_INDEX} places {name} in {shard}, which does not hold it")
    return [(file, [name for name, place in places.items() if place == shard]) for shard, file in files.items()]


def _open(path: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    if not path.exists():
        raise ValueError(f"{path} is missing, a file that {_INDEX} names; the download may be incomplete")
    try:
        # Not mapped: pages of the file would count beside the arrays that are made from them.
        return stack.enter_context(safe_open(path, framework="numpy", backend="pread"))
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path} ({size} bytes) cannot be read: {error}; it may be cut short or a Git LFS pointer"
        ) from error


def _no_tensors(directory: pathlib.Path) -> str:
    """Why there is nothing to read, and what to do about it."""
    if not list(directory.glob("pytorch_model*.bin")):
        return f"{directory} has neither {_SINGLE} nor {_INDEX}"
    return (
        f"{directory} has pytorch_model.bin but no {_SINGLE}. Where PyTorch and safetensors are installed, convert it there:\n"
        '  python -c "import glob, torch; from safetensors.torch import save_file; w = {}; '
        "[w.update(torch.load(p, weights_only=True)) for p in glob.glob('pytorch_model*.bin')]; "
        f"save_file({{k: v.contiguous().clone() for k, v in w.items()}}, '{_SINGLE}', {{'format': 'pt'}})\""
    )


# ---- Writing ---------------------------------------------------------------------------------------------------------


def _check_params(params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], leaves: Iterable[Leaf]) -> None:
    wrong = [
        f"{path}: found {list(params[path].shape) if path in params else 'nothing'}, "
        f"expected {list(shapes[path]) if path in shapes else 'nothing'}"
        for path in sorted({*params, *shapes})
        if path not in params or path not in shapes or params[path].shape != shapes[path]
    ]
    if wrong:
        raise ValueError("\n  ".join(["variables do not fit the module:", *wrong[:_SHOWN]]))
    if homeless := sorted(set(params) - {leaf.path for leaf in leaves}):
        raise ValueError(f"parameters without a place in a Hugging Face checkpoint: {', '.join(homeless[:_SHOWN])}")


def _common_dtype(params: Mapping[str, Any]) -> str:
    found = sorted({str(param.dtype) for param in params.values()})
    if len(found) > 1 or found[0] not in DTYPES.values():
        raise ValueError(f"parameters must share one dtype of {', '.join(DTYPES.values())}; found {', '.join(found)}")
    return found[0]


def _write_tensors(
    directory: pathlib.Path, leaves: Iterable[Leaf], params: Mapping[str, Any], shard_bytes: int
) -> None:
    """One file, or as many as `shard_bytes` asks for and an index."""
    shards = _shards(leaves, params, shard_bytes)
    names = [_SINGLE]
    if len(shards) > 1:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        tensors = {leaf.tensors[index]: leaf.tensor(np.asarray(params[leaf.path]), index) for leaf, index in shard}
        save_file(tensors, directory / name, metadata={"format": "pt"})
    if len(shards) == 1:
        return
    places = {leaf.tensors[index]: name for name, shard in zip(names, shards, strict=True) for leaf, index in shard}
    size = sum(param.nbytes for param in params.values())
    (directory / _INDEX).write_text(_json({"metadata": {"total_size": size}, "weight_map": places}))


def _shards(leaves: Iterable[Leaf], params: Mapping[str, Any], shard_bytes: int) -> list[list[tuple[Leaf, int]]]:
    """Tensors, as leaves and their index in them, in runs of at most `shard_bytes` (or of one tensor that is larger)."""
    shards: list[list[tuple[Leaf, int]]] = [[]]
    filled = 0
    for leaf in leaves:
        size = params[leaf.path].nbytes // len(leaf.tensors)
        for index in range(len(leaf.tensors)):
            if filled and filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append((leaf, index))
            filled += size
    return shards


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
