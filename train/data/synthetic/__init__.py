"""Tasks with known answers, as sources of rows (``train.data.rows``): recall by one layer, by two, over a distance.

Row i depends on the task's seed and on i alone. A row is one segment, and only tokens that precede an answer have a
target, so cross entropy and ``accuracy`` count answers and nothing else.
"""

from train.data.synthetic.associative_recall import AssociativeRecall
from train.data.synthetic.multi_query_recall import MultiQueryRecall
from train.data.synthetic.needles import Needles
from train.data.synthetic.scoring import accuracy

__all__ = ["AssociativeRecall", "MultiQueryRecall", "Needles", "accuracy"]
