"""Compression while training: links of an `optax.chain`, and wrappers of optimizers."""

from jaxcomp.train.decay import RestartDecayState as RestartDecayState
from jaxcomp.train.decay import decay_learning_rate as decay_learning_rate
from jaxcomp.train.decay import restart_decay as restart_decay
from jaxcomp.train.gradual import PruneGraduallyState as PruneGraduallyState
from jaxcomp.train.gradual import prune_gradually as prune_gradually
from jaxcomp.train.latent import PruneLatentState as PruneLatentState
from jaxcomp.train.latent import prune_straight_through as prune_straight_through
from jaxcomp.train.norms import FreezeAfterState as FreezeAfterState
from jaxcomp.train.norms import fold_norm as fold_norm
from jaxcomp.train.norms import fold_norms as fold_norms
from jaxcomp.train.norms import freeze_after as freeze_after
from jaxcomp.train.norms import freeze_norms as freeze_norms
from jaxcomp.train.norms import reestimate_norms as reestimate_norms
from jaxcomp.train.project import HardenState as HardenState
from jaxcomp.train.project import ProjectState as ProjectState
from jaxcomp.train.project import harden as harden
from jaxcomp.train.project import project as project
from jaxcomp.train.ranges import fake_quantize_range as fake_quantize_range
from jaxcomp.train.ranges import moving_range as moving_range
from jaxcomp.train.ranges import percentile_range as percentile_range
from jaxcomp.train.regrow import RegrowState as RegrowState
from jaxcomp.train.regrow import left_alone as left_alone
from jaxcomp.train.regrow import regrow_randomly as regrow_randomly
from jaxcomp.train.regrow import rigl as rigl
from jaxcomp.train.rewind import RewindState as RewindState
from jaxcomp.train.rewind import rewind_learning_rate as rewind_learning_rate
from jaxcomp.train.rewind import rewind_weights as rewind_weights
from jaxcomp.train.rounding import RoundState as RoundState
from jaxcomp.train.rounding import round_stochastically as round_stochastically
from jaxcomp.train.rounding import (
    round_to_step_stochastically as round_to_step_stochastically,
)
from jaxcomp.train.saliency import PruneByScoreState as PruneByScoreState
from jaxcomp.train.saliency import prune_by_movement as prune_by_movement
from jaxcomp.train.saliency import prune_by_saliency as prune_by_saliency
from jaxcomp.train.saliency import prune_by_soft_movement as prune_by_soft_movement
from jaxcomp.train.sharing import codebook_pull as codebook_pull
from jaxcomp.train.sharing import fake_share as fake_share
from jaxcomp.train.sharing import soft_share as soft_share
from jaxcomp.train.shrinkage import ShrinkState as ShrinkState
from jaxcomp.train.shrinkage import group_penalty as group_penalty
from jaxcomp.train.shrinkage import is_norm_scale as is_norm_scale
from jaxcomp.train.shrinkage import l1_penalty as l1_penalty
from jaxcomp.train.shrinkage import shrink_coupled as shrink_coupled
from jaxcomp.train.shrinkage import shrink_groups as shrink_groups
from jaxcomp.train.shrinkage import shrink_l1 as shrink_l1
from jaxcomp.train.straight_through import fake_quantize as fake_quantize
from jaxcomp.train.straight_through import learned_clip as learned_clip
from jaxcomp.train.straight_through import learned_step as learned_step
from jaxcomp.train.straight_through import learned_threshold as learned_threshold
from jaxcomp.train.zeros import KeepZerosState as KeepZerosState
from jaxcomp.train.zeros import keep_zeros as keep_zeros
