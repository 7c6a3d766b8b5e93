"""Distillation: a small model learns what a big one knows."""

from jaxcomp.distill.ensemble import ensemble as ensemble
from jaxcomp.distill.losses.logits import soft_target_loss as soft_target_loss
from jaxcomp.distill.step import distill_step as distill_step
