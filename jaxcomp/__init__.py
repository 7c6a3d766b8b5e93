"""jaxcomp: a functional compression toolkit for JAX."""

from jaxcomp import prune as prune
from jaxcomp import testing as testing
from jaxcomp.distill import distill_step as distill_step
from jaxcomp.distill import ensemble as ensemble
from jaxcomp.distill import soft_target_loss as soft_target_loss
from jaxcomp.node import CompressedArray as CompressedArray
from jaxcomp.node import TiedTensor as TiedTensor
from jaxcomp.node import densify as densify
from jaxcomp.node import is_compressed as is_compressed
from jaxcomp.prune import apply_masks as apply_masks
from jaxcomp.prune import clip_tree as clip_tree
from jaxcomp.prune import magnitude as magnitude
from jaxcomp.prune import prune_tree as prune_tree
from jaxcomp.prune import random_scores as random_scores
from jaxcomp.prune import top_mask as top_mask
from jaxcomp.quant import QTensor as QTensor
from jaxcomp.quant import quantize as quantize
from jaxcomp.quant import quantize_affine as quantize_affine
from jaxcomp.quant import quantize_searched as quantize_searched
from jaxcomp.quant import quantize_step as quantize_step
from jaxcomp.quant import quantize_tree as quantize_tree
from jaxcomp.report import Report as Report
from jaxcomp.report import report as report
from jaxcomp.share import SharedTensor as SharedTensor
from jaxcomp.share import palettize as palettize
from jaxcomp.share import palettize_to_rate as palettize_to_rate
from jaxcomp.share import share_to_rate as share_to_rate
from jaxcomp.share import share_tree as share_tree
from jaxcomp.share import tie_layers as tie_layers
from jaxcomp.storage import load as load
from jaxcomp.storage import save as save
from jaxcomp.train import decay_learning_rate as decay_learning_rate
from jaxcomp.train import fake_quantize as fake_quantize
from jaxcomp.train import keep_zeros as keep_zeros
from jaxcomp.train import learned_clip as learned_clip
from jaxcomp.train import learned_step as learned_step
from jaxcomp.train import left_alone as left_alone
from jaxcomp.train import prune_gradually as prune_gradually
from jaxcomp.train import regrow_randomly as regrow_randomly
from jaxcomp.train import restart_decay as restart_decay
from jaxcomp.train import rigl as rigl
from jaxcomp.tree import Where as Where
from jaxcomp.tree import is_matrix as is_matrix
from jaxcomp.tree import join as join
from jaxcomp.tree import map_values as map_values
from jaxcomp.tree import map_where as map_where
from jaxcomp.tree import path_matches as path_matches
from jaxcomp.tree import select as select
from jaxcomp.tree import split as split


__version__ = "0.1.0"
