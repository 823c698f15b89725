"""A jdcore method for one main loss that auxiliary losses should help and never hinder."""
