"""Quantization: arrays to integer codes on a grid."""

from jaxcomp.quant.coarse import quantize_binary as quantize_binary
from jaxcomp.quant.coarse import quantize_ternary as quantize_ternary
from jaxcomp.quant.grid import QTensor as QTensor
from jaxcomp.quant.grid import quantize as quantize
from jaxcomp.quant.grid import quantize_affine as quantize_affine
from jaxcomp.quant.grid import quantize_step as quantize_step
from jaxcomp.quant.grid import quantize_tree as quantize_tree
from jaxcomp.quant.rate import quantize_to_rate as quantize_to_rate
from jaxcomp.quant.search import quantize_searched as quantize_searched
