"""FP8 (e4m3): the format, activations quantised at run time, weights held or stored in blocks."""
