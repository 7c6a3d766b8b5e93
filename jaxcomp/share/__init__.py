"""Sharing: one value for many weights, one set of weights for many layers."""

from jaxcomp.share.palette import SharedTensor as SharedTensor
from jaxcomp.share.palette import palettize as palettize
from jaxcomp.share.palette import share_tree as share_tree
from jaxcomp.share.rate import palettize_to_rate as palettize_to_rate
from jaxcomp.share.rate import share_to_rate as share_to_rate
from jaxcomp.share.tie import tie_layers as tie_layers
