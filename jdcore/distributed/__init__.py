"""Jacobian descent on several processes: the only place that knows DDP, FSDP and DTensor."""
