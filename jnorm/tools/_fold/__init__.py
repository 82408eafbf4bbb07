"""What `jnorm.tools.fold` is made of."""
