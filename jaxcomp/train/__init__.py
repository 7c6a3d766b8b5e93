"""Compression while training: links of an `optax.chain`, and wrappers of optimizers."""

from jaxcomp.train.decay import RestartDecayState as RestartDecayState
from jaxcomp.train.decay import decay_learning_rate as decay_learning_rate
from jaxcomp.train.decay import restart_decay as restart_decay
from jaxcomp.train.gradual import PruneGraduallyState as PruneGraduallyState
from jaxcomp.train.gradual import prune_gradually as prune_gradually
from jaxcomp.train.regrow import RegrowState as RegrowState
from jaxcomp.train.regrow import left_alone as left_alone
from jaxcomp.train.regrow import regrow_randomly as regrow_randomly
from jaxcomp.train.regrow import rigl as rigl
from jaxcomp.train.straight_through import fake_quantize as fake_quantize
from jaxcomp.train.straight_through import learned_clip as learned_clip
from jaxcomp.train.straight_through import learned_step as learned_step
from jaxcomp.train.zeros import KeepZerosState as KeepZerosState
from jaxcomp.train.zeros import keep_zeros as keep_zeros
