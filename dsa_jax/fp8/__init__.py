"""FP8 (e4m3) numbers: activations quantised on the fly, weights kept or stored in blocks."""
