"""Rows of tokens: packed text, tasks with known answers, mixtures, batches."""
