"""Results and Catalog on Redis."""
