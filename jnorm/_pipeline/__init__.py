"""The data path: any axes to canonical ones, THE differentiable unit, the running statistics. No norm is named in here."""
