"""Distillation: a small model learns what a big one knows."""

from jaxcomp.distill.bias import unseen_class_bias as unseen_class_bias
from jaxcomp.distill.cache import CachedTeacher as CachedTeacher
from jaxcomp.distill.cache import cache_teacher as cache_teacher
from jaxcomp.distill.cache import open_cache as open_cache
from jaxcomp.distill.ensemble import ensemble as ensemble
from jaxcomp.distill.features import with_features as with_features
from jaxcomp.distill.fit import Fitted as Fitted
from jaxcomp.distill.fit import fit_distill as fit_distill
from jaxcomp.distill.intermediates import pick as pick
from jaxcomp.distill.loss import Measured as Measured
from jaxcomp.distill.loss import distill_loss as distill_loss
from jaxcomp.distill.losses.chunks import in_chunks as in_chunks
from jaxcomp.distill.losses.correlation import (
    class_correlation_loss as class_correlation_loss,
)
from jaxcomp.distill.losses.correlation import correlation_loss as correlation_loss
from jaxcomp.distill.losses.decoupled import decoupled_loss as decoupled_loss
from jaxcomp.distill.losses.divergences import (
    jensen_shannon_loss as jensen_shannon_loss,
)
from jaxcomp.distill.losses.divergences import reverse_kl_loss as reverse_kl_loss
from jaxcomp.distill.losses.divergences import skewed_kl_loss as skewed_kl_loss
from jaxcomp.distill.losses.features import (
    attention_transfer_loss as attention_transfer_loss,
)
from jaxcomp.distill.losses.features import cosine_loss as cosine_loss
from jaxcomp.distill.losses.features import hint_loss as hint_loss
from jaxcomp.distill.losses.logits import logit_mse_loss as logit_mse_loss
from jaxcomp.distill.losses.logits import soft_target_loss as soft_target_loss
from jaxcomp.distill.losses.relations import angle_loss as angle_loss
from jaxcomp.distill.losses.relations import (
    attention_relation_loss as attention_relation_loss,
)
from jaxcomp.distill.losses.relations import distance_loss as distance_loss
from jaxcomp.distill.losses.relations import similarity_loss as similarity_loss
from jaxcomp.distill.losses.sparse import SparseTargets as SparseTargets
from jaxcomp.distill.losses.sparse import sampled_targets as sampled_targets
from jaxcomp.distill.losses.sparse import sparse_target_loss as sparse_target_loss
from jaxcomp.distill.losses.sparse import top_k_targets as top_k_targets
from jaxcomp.distill.outputs import Batch as Batch
from jaxcomp.distill.outputs import Outputs as Outputs
from jaxcomp.distill.projections import Projected as Projected
from jaxcomp.distill.projections import with_projections as with_projections
from jaxcomp.distill.step import distill_step as distill_step
