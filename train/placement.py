"""Which devices hold the arrays of a run: one device, or the run's mesh with the shardings of ``dsa_jax.sharding``."""

import bisect
import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from dsa_jax.sharding import batch_sharding, make_mesh, param_shardings
from train.config import MeshSpec, Run, Stage
from train.loss import Batch
from train.step import TrainState, begin_stage


class RunSharding:
    """The mesh of a run (None: one device), and how each of the run's arrays is split over it.

    rows: the rows of each batch that this process's devices hold; it reads no others.

    Raises:
      ValueError: the mesh's size is not the number of devices, or the mesh does not divide the model, the batch or the
        sequence; the message names a mesh that would work.
    """

    def __init__(self, run: Run) -> None:
        self.model, self.shape = run.model, (run.batch, run.seq_len)
        spec = run.mesh or (MeshSpec() if jax.process_count() > 1 else None)
        self.mesh = make_mesh(**dataclasses.asdict(spec)) if spec else None
        self.rows: list[int] = list(range(run.batch))
        if self.mesh:
            # The mesh must divide each part of a batch too.
            batch_sharding(run.model, self.mesh, run.batch // run.accumulate, run.seq_len)
            self._of_batch = batch_sharding(run.model, self.mesh, *self.shape)
            self.rows = rows_on(jax.local_devices(), self._of_batch, self.shape)

    @property
    def n_devices(self) -> int:
        return self.mesh.size if self.mesh else 1

    def use_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """For everything that computes: the model asks JAX for the mesh in use."""
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def shardings(self, tree: Any) -> Any:
        """Of parameters, adapters or a state (arrays or shapes); None without a mesh, as ``jax.jit`` takes it."""
        return param_shardings(tree, self.model, self.mesh) if self.mesh else None

    def place(self, params: Any, shapes: Any) -> Any:
        """``params`` on the run's devices, once they proved to have the structure, shapes and dtypes of ``shapes``.

        Raises:
          ValueError: they have others; the message names the first leaf that differs.
        """
        try:
            chex.assert_trees_all_equal_shapes_and_dtypes(params, shapes)
        except AssertionError as error:
            raise ValueError(f"params must have the leaves of the run's model: {error}") from error
        return jax.device_put(params, self.shardings(params)) if self.mesh else params

    def with_shardings(self, shapes: Any) -> Any:
        """``shapes`` with a sharding for each array, for reading a checkpoint, whatever mesh wrote it."""
        device = SingleDeviceSharding(jax.devices()[0])
        shardings = self.shardings(shapes) or jax.tree.map(lambda _: device, shapes)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
        )

    def begin_stage(self, step: jax.Array | int, params: Any, stage: Stage) -> TrainState:
        """``train.step.begin_stage``, with each moment sharded as its parameter is."""
        if self.mesh is None:
            return begin_stage(jnp.int32(step), params, stage)

        def all_but_params(params):
            return dataclasses.replace(begin_stage(jnp.int32(int(step)), params, stage), params=None)

        shardings = self.shardings(jax.eval_shape(all_but_params, params))
        state = jax.jit(all_but_params, out_shardings=shardings)(params)
        return dataclasses.replace(state, params=params)

    def replicated(self, value: int) -> jax.Array:
        """An int32 scalar on all devices."""
        if self.mesh is None:
            return jnp.int32(value)
        return jax.device_put(np.int32(value), NamedSharding(self.mesh, P()))

    def global_batch(self, rows: dict[str, np.ndarray]) -> Batch:
        """The global batch [B T], of which this process read ``rows`` [len(self.rows) T]."""
        if self.mesh is None:
            return {name: jnp.asarray(array) for name, array in rows.items()}

        def global_array(array: np.ndarray) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                wanted = range(*index[0].indices(self.shape[0]))
                first = bisect.bisect_left(self.rows, wanted.start)
                return array[first : first + len(wanted), index[1]]

            return jax.make_array_from_callback(self.shape, self._of_batch, part)

        return {name: global_array(array) for name, array in rows.items()}


def rows_on(devices: Sequence[jax.Device], sharding: NamedSharding, shape: tuple[int, int]) -> list[int]:
    """The rows of a batch of this shape of which one of these devices holds a part."""
    parts = sharding.devices_indices_map(shape)
    return sorted({row for device in devices for row in range(shape[0])[parts[device][0]]})
