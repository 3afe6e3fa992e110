"""Where exits pay: the rule behind `off.cut(model, example, at="auto", labelled=rows)`.

Shapes: N labelled rows, of which T (every other one) train and H are held out; F pooled features, C
classes.

1. Candidates are the legal cuts, of those that end at one place the outermost; of many 24 near even
   shares of the multiply-adds, as `parts=` takes them.
2. At each, the exit that is asked for is made and timed, with a margin as its gate; so is the plain
   model, module by module. All times are milliseconds per row in a batch of up to 64, measured here
   and now.
3. A ridge regression on the labels stands for the trained exit: on what the exit pools (else on a
   grid of means), standardised over the T rows. A held-out row could leave where its margin reaches
   a threshold: the lowest at which 1 % of the rows that leave, or fewer, are lost against the
   model's own answers (wrong less mended).
4. An exit alone pays where the share that could leave is above head / (full - reach): its own time
   over the time that is saved. Of several, cuts are added one by one while the mean time of a
   held-out row falls by 2 % of the plain model's or more; then those are taken out again without
   which it is no higher.

It is an estimate that chooses places, and no promise: a trained exit does better than this
regression, segments run a little slower than the eager model, and times differ from run to run. The
rows count as rows that trained the network. Keeping a classifier only where its gain is worth it is
in Panda et al., Conditional Deep Learning, 2015, arXiv
1509.08971: there stage by stage and in operations, with the classifiers trained; ours looks at sets
of exits, in time.
"""
