"""Distillation losses: pure functions on arrays, in nats per example."""
