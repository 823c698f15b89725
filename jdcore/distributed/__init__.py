"""Jacobian descent on several processes: the only place that knows DDP, FSDP and DTensor."""

from jdcore.distributed._means import global_means

__all__ = ["global_means"]
