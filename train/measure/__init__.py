"""How good a model is, how fast, and what each part of the recipe does."""
