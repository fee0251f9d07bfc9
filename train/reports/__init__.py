"""The report of a run, as text and pictures: `python -m train.reports RUN_DIR`."""
