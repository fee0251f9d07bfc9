"""Times and memory of the operations: ``python -m pallas_kernels.bench``."""
