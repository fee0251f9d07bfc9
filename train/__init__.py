"""Training of the model: the indexer warm-up, sparse training and what follows. Nothing is here yet."""
