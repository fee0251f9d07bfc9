"""The JAX versions that the Hopper kernels were tested with. Importing this file imports no kernel."""

HOPPER_TESTED_JAX = ("0.11", "0.12")  # 0.11.2 on H100 and H200, 0.12.0.1 interpreted and compiled for sm_90a
