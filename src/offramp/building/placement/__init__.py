"""Where exits pay: the rule behind `off.cut(model, example, at="auto", labelled=rows)`.

Shapes: N labelled rows, of which T (every other one) train and H are held out; F pooled features, C
classes.

1. Candidates are the legal cuts. Of several cuts at the same place the outermost is taken; if there
   are more than 24, those at nearly even shares of the multiply-adds, as `parts=` takes them.
2. At each candidate the exit is made and timed, with a margin as its gate. The plain model is timed
   module by module. All times are milliseconds per row in a batch of up to 64, measured on this
   machine.
3. A ridge regression on the labels replaces the trained exit. It reads the features that the exit
   pools (otherwise a grid of means), standardised over the T rows. A held-out row could leave if
   its margin reaches a threshold: the lowest one at which at most 1 % of the rows that leave are
   lost against the model's own answers (newly wrong minus newly right).
4. A single exit pays if the share that could leave is above head / (full - reach): its own time
   over the time that it saves. For several exits, cuts are added one by one as long as the mean
   time of a held-out row falls by at least 2 % of the plain model's. Then each cut is taken out
   again without which the mean time is no higher.

This is an estimate for choosing places, and not a promise: a trained exit does better than the
regression, segments run a little slower than the eager model, and times differ from run to run. The
rows count as training rows of the network. Keeping a classifier only if its gain is worth it is
from Panda et al., Conditional Deep Learning, 2015, arXiv 1509.08971. There it is decided stage by
stage and in operations, with trained classifiers; ours looks at sets of exits, in time.
"""
