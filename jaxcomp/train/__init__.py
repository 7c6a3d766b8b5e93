"""Compression while training: links of an `optax.chain`."""

from jaxcomp.train.gradual import PruneGraduallyState as PruneGraduallyState
from jaxcomp.train.gradual import prune_gradually as prune_gradually
from jaxcomp.train.zeros import KeepZerosState as KeepZerosState
from jaxcomp.train.zeros import keep_zeros as keep_zeros
