"""Where the arrays of a run lie: on the default device, or over the run's mesh as ``dsa_jax.sharding`` says."""

import bisect
import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from dsa_jax.sharding import batch_sharding, make_mesh, param_shardings
from train.config import MeshSpec, Run, Stage
from train.loss import Batch
from train.step import TrainState, begin_stage


class Layout:
    """The mesh of a run (None: one device), and what each of its arrays is split over.

    rows: those of every batch that devices of this process hold; no other has to be read here.

    Raises:
      ValueError: the mesh has not as many devices as there are, or does not divide the model, the batch or the
        sequence; the message names one that would do.
    """

    def __init__(self, run: Run) -> None:
        self.model, self.shape = run.model, (run.batch, run.seq_len)
        spec = run.mesh or (MeshSpec() if jax.process_count() > 1 else None)
        self.mesh = make_mesh(**dataclasses.asdict(spec)) if spec else None
        self.rows: list[int] = list(range(run.batch))
        if self.mesh:
            self._of_batch = batch_sharding(run.model, self.mesh, *self.shape)
            self.rows = rows_on(jax.local_devices(), self._of_batch, self.shape)

    @property
    def n_devices(self) -> int:
        return self.mesh.size if self.mesh else 1

    def in_use(self) -> contextlib.AbstractContextManager[Any]:
        """Around everything that computes: the model asks for the mesh in use."""
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def shardings(self, tree: Any) -> Any:
        """For parameters, adapters and states (arrays or shapes); None without a mesh, as ``jax.jit`` takes it."""
        return param_shardings(tree, self.model, self.mesh) if self.mesh else None

    def given(self, params: Any) -> Any:
        """These parameters, where they belong."""
        return jax.device_put(params, self.shardings(params)) if self.mesh else params

    def placed(self, shapes: Any) -> Any:
        """The shapes with the places of their arrays, as a checkpoint is read into them, wherever it was written."""
        device = SingleDeviceSharding(jax.devices()[0])
        where = self.shardings(shapes) or jax.tree.map(lambda _: device, shapes)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, where)

    def begin_stage(self, step: jax.Array | int, params: Any, stage: Stage) -> TrainState:
        """``train.step.begin_stage``, its moments where their parameters are."""
        if self.mesh is None:
            return begin_stage(jnp.int32(step), params, stage)

        def all_but_params(params):
            return dataclasses.replace(begin_stage(jnp.int32(int(step)), params, stage), params=None)

        where = self.shardings(jax.eval_shape(all_but_params, params))
        made = jax.jit(all_but_params, out_shardings=where)(params)
        return dataclasses.replace(made, params=params)

    def number(self, value: int) -> jax.Array:
        """An int32 that every device has."""
        return (
            jax.device_put(np.int32(value), NamedSharding(self.mesh, P())) if self.mesh else jnp.int32(value)
        )

    def batch(self, rows: dict[str, np.ndarray]) -> Batch:
        """A global batch [B T] of what each process read: its ``rows``."""
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
