"""The ``dsa-jax`` command."""
