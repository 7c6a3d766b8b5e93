"""Low rank: a matrix as the product of two thin ones, one of which layers may share."""

from jaxcomp.lowrank.basis import BasisTensor as BasisTensor
from jaxcomp.lowrank.basis import share_basis as share_basis
from jaxcomp.lowrank.factor import LowRankTensor as LowRankTensor
from jaxcomp.lowrank.factor import factorize as factorize
