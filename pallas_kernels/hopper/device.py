"""The device that the Hopper kernels need: its check and its size."""

import jax


def require_hopper() -> None:
    """Raises NotImplementedError unless the default device can run the Hopper kernels."""
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(f"the kernels need jax 0.11 or newer, this is {jax.__version__}")
    device = jax.devices()[0]
    if device.platform != "gpu" or getattr(device, "compute_capability", None) != "9.0":
        raise NotImplementedError(f"the kernels run on Hopper GPUs (compute capability 9.0), not on {device}")


def n_multiprocessors() -> int:
    """Streaming multiprocessors of the default device; an H200's 132 where it does not say."""
    return getattr(jax.devices()[0], "core_count", None) or 132
