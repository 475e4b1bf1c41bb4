"""BWDS (Bolukbasi, Wang, Dekel and Saligrama, "Adaptive Neural Networks for Efficient Inference", 2017).

From the paper: The network is frozen. Each exit has a classifier (average pooling and one linear layer) and a decision
function. Decision functions are learned from the last exit to the first, as weighted binary classifiers "leave or
continue". When an exit is learned, all later decisions are fixed. So it is known for each sample where it would leave
if it continued. It should leave here if

    price * (loss here - loss there) <= FLOPs up to there - FLOPs up to here,

and the weight of the sample is the absolute difference of the two sides. `price`, the paper's lambda, says how much of
the network's FLOPs a loss of 1 is worth. A sweep over prices gives a curve of accuracy over FLOPs: `curve`.

Ours is how the sweep is kept. Under the best policies, a sample that leaves at one price leaves at every lower price:
the gain of leaving is a concave function of the price (the minimum of linear functions, minus a linear one), and it is
positive at the price 0. So each exit has one decision function per price, and a sample leaves at a price if the
functions of that price and of all lower prices say so. The certainty of an exit is the price below which the sample
leaves. Then a threshold is a price: `ee.thresholds = 8.0` takes the decisions that were learned for that price, and
`ee.calibrate` may choose another price for each exit.

Ours, too, where the source leaves it open:

- The loss is the error, 0 or 1. FLOPs are fractions of the network's.
- A decision function is a logistic regression. Its inputs are scores of the classifier (the largest probability, its
  margin to the second, the margin of the logarithms, the entropy, all probabilities) or the pooled features. It is
  found by L-BFGS, with a small ridge.
"""

from .decisions import decision_score, exit_labels, fit_decision, learn_at_price, sweep
from .head import PRICES, Decider, classifier_scores
from .network import build, curve, decide, train

__all__ = [
    "PRICES",
    "Decider",
    "build",
    "classifier_scores",
    "curve",
    "decide",
    "decision_score",
    "exit_labels",
    "fit_decision",
    "learn_at_price",
    "sweep",
    "train",
]
