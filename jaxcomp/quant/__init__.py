"""Quantization: arrays to integer codes on a grid."""

from jaxcomp.quant.blocks import best_exponent as best_exponent
from jaxcomp.quant.blocks import floor_exponent as floor_exponent
from jaxcomp.quant.blocks import quantize_mx as quantize_mx
from jaxcomp.quant.blocks import quantize_nf4 as quantize_nf4
from jaxcomp.quant.blocks import quantize_nvfp4 as quantize_nvfp4
from jaxcomp.quant.coarse import quantize_binary as quantize_binary
from jaxcomp.quant.coarse import quantize_ternary as quantize_ternary
from jaxcomp.quant.fixed import quantize_interval as quantize_interval
from jaxcomp.quant.fixed import quantize_step as quantize_step
from jaxcomp.quant.floats import FloatTensor as FloatTensor
from jaxcomp.quant.floats import quantize_float as quantize_float
from jaxcomp.quant.floats import to_float as to_float
from jaxcomp.quant.floats import to_powers as to_powers
from jaxcomp.quant.floats import widened as widened
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
