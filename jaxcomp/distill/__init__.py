"""Distillation: a small model learns what a big one knows."""

from jaxcomp.distill.ensemble import ensemble as ensemble
from jaxcomp.distill.loss import Measured as Measured
from jaxcomp.distill.loss import distill_loss as distill_loss
from jaxcomp.distill.losses.logits import soft_target_loss as soft_target_loss
from jaxcomp.distill.outputs import Batch as Batch
from jaxcomp.distill.outputs import Outputs as Outputs
from jaxcomp.distill.step import distill_step as distill_step
