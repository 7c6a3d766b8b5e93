"""Sharing: one value for many weights, one set of weights for many layers."""

from jaxcomp.share.layers import every as every
from jaxcomp.share.layers import layers_of as layers_of
from jaxcomp.share.layers import runs as runs
from jaxcomp.share.layers import similar_layers as similar_layers
from jaxcomp.share.palette import SharedTensor as SharedTensor
from jaxcomp.share.palette import palettize as palettize
from jaxcomp.share.palette import share_tree as share_tree
from jaxcomp.share.rate import palettize_to_rate as palettize_to_rate
from jaxcomp.share.rate import share_to_rate as share_to_rate
from jaxcomp.share.rows import RowSharedTensor as RowSharedTensor
from jaxcomp.share.rows import palettize_rows as palettize_rows
from jaxcomp.share.tie import average as average
from jaxcomp.share.tie import best_member as best_member
from jaxcomp.share.tie import member as member
from jaxcomp.share.tie import tie_layers as tie_layers
from jaxcomp.share.together import BorrowedTensor as BorrowedTensor
from jaxcomp.share.together import share_together as share_together
from jaxcomp.share.vectors import VectorTensor as VectorTensor
from jaxcomp.share.vectors import palettize_vectors as palettize_vectors
