"""Takes a model apart at module boundaries.

`partition` makes pieces that run one after the other, `cut_points` lists the legal cuts, and
`self_check` compares pieces with the model.
"""

from offramp.networks.taps import inputs_of, listening, tapped
from offramp.partition.checking import self_check
from offramp.partition.graph import ExportedGraph
from offramp.partition.listing import CutPoint, cut_points, evenly, unevenness
from offramp.partition.pieces import Partition, Piece, partition
from offramp.partition.stages import staged

__all__ = [
    "CutPoint",
    "ExportedGraph",
    "Partition",
    "Piece",
    "cut_points",
    "evenly",
    "inputs_of",
    "listening",
    "partition",
    "self_check",
    "staged",
    "tapped",
    "unevenness",
]
