"""Quantization: arrays to integer codes on a grid."""

from jaxcomp.quant.coarse import quantize_binary as quantize_binary
from jaxcomp.quant.coarse import quantize_ternary as quantize_ternary
from jaxcomp.quant.fixed import quantize_interval as quantize_interval
from jaxcomp.quant.fixed import quantize_step as quantize_step
from jaxcomp.quant.grid import QTensor as QTensor
from jaxcomp.quant.ranges import Range as Range
from jaxcomp.quant.ranges import largest as largest
from jaxcomp.quant.ranges import least_error as least_error
from jaxcomp.quant.ranges import percentile as percentile
from jaxcomp.quant.rate import quantize_to_rate as quantize_to_rate
from jaxcomp.quant.search import quantize_searched as quantize_searched
from jaxcomp.quant.stochastic import quantize_stochastically as quantize_stochastically
from jaxcomp.quant.uniform import quantize as quantize
from jaxcomp.quant.uniform import quantize_affine as quantize_affine
from jaxcomp.quant.uniform import quantize_tree as quantize_tree
