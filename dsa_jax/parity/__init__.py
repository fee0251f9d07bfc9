"""Two runs of the same model side by side, and transformers as the reference."""
