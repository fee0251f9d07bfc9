"""Names of other packages that may move without notice; no other file of ``dsa_jax`` may use such a name.

| name | what for | why no public name | tried with |
| --- | --- | --- | --- |
| jax.experimental.mesh_utils.create_device_mesh | devices in the order of the machine's network | jax.make_mesh \
cannot set allow_split_physical_axes (it does on v5e only), without which many meshes of v4, v5p and tpu7x are \
refused; its documentation names this function | jax 0.10.2, 0.11.2, 0.12.0 |
| orbax.checkpoint._src... | written into a checkpoint's metadata, never imported | it is the path that Orbax itself \
writes there for the public StandardCheckpointHandler | orbax-checkpoint 0.12.8 |
"""

from jax.experimental.mesh_utils import create_device_mesh

ORBAX_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"

__all__ = ["ORBAX_HANDLER", "create_device_mesh"]
