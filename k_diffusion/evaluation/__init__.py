"""How good samples are: metrics, and the protocols that make them comparable."""
