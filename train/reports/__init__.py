"""What a run did, as text and pictures: ``python -m train.reports RUN_DIR``."""
