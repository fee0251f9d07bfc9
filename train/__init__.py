"""Training: dense, indexer warm-up, sparse, as one resumable run; see ``train.runs`` and docs/training.md."""
