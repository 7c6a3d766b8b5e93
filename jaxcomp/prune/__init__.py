"""Pruning: arrays to scores, scores to masks, masks to zeros."""

from jaxcomp.prune.at_init import given as given
from jaxcomp.prune.at_init import grasp as grasp
from jaxcomp.prune.at_init import masks_in_rounds as masks_in_rounds
from jaxcomp.prune.at_init import saliency as saliency
from jaxcomp.prune.at_init import synflow as synflow
from jaxcomp.prune.budgets import Budget as Budget
from jaxcomp.prune.budgets import erk_budget as erk_budget
from jaxcomp.prune.budgets import global_budget as global_budget
from jaxcomp.prune.budgets import leaf_budget as leaf_budget
from jaxcomp.prune.lamp import lamp_budget as lamp_budget
from jaxcomp.prune.oneshot import apply_masks as apply_masks
from jaxcomp.prune.oneshot import clip_tree as clip_tree
from jaxcomp.prune.oneshot import masks as masks
from jaxcomp.prune.oneshot import prune_tree as prune_tree
from jaxcomp.prune.patterns import in_blocks as in_blocks
from jaxcomp.prune.patterns import in_units as in_units
from jaxcomp.prune.patterns import nm_budget as nm_budget
from jaxcomp.prune.patterns import nm_mask as nm_mask
from jaxcomp.prune.scores import Score as Score
from jaxcomp.prune.scores import magnitude as magnitude
from jaxcomp.prune.scores import random_scores as random_scores
from jaxcomp.prune.top import top_mask as top_mask
