"""Rows of tokens: text, tasks with known answers, mixtures, batches."""
