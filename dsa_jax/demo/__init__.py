"""``make demo``: the small model of ``dsa_jax/nano`` at work."""
